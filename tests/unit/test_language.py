"""The language of docstrings and pages is counted, and the counts have limits: `python -m tools.language`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.language import (
    IT_LIMIT,
    KINDS,
    ROOT,
    WHAT_LIMIT,
    Counts,
    counts,
    exceeding,
    main,
    modules,
    pages,
    read,
    sentences,
    texts_of_page,
    texts_of_source,
    total,
    worst,
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_of_all_files_together_are_within_the_limits(kind: str) -> None:
    """Of docstrings, comments, messages and pages; and none of them has a turn that is ruled out."""
    found = read([*modules(), *pages()])
    figures = total(counts(found, kind).values())
    told = "\n".join(worst(found, 20, [kind]))
    assert figures.what_per_thousand <= WHAT_LIMIT, told
    assert figures.it_per_thousand <= IT_LIMIT, told
    assert not figures.turns, "\n".join(each.prose for some in found.values() for each in some if each.turns)


def test_each_file_is_within_the_limits() -> None:
    """A page or a module, by itself: `python -m tools.language --worst 20 FILE` shows the sentences to change."""
    assert exceeding() == []


def count_source(source: str, kind: str) -> Counts:
    """Return the figures of the texts of one kind."""
    return Counts.of(each for each in sentences(texts_of_source("a.py", source)) if each.text.kind == kind)


@pytest.mark.parametrize(
    ("source", "kind", "figures"),
    [
        ('"""What it maps."""', "docstrings", (3, 1, 1)),
        ('class A:\n    """It is."""\n    size = 1\n    """Its size."""', "docstrings", (4, 0, 2)),
        ('size: int = 1\n"""Its size."""', "docstrings", (2, 0, 1)),
        ('async def a():\n    """Map whatever comes."""', "docstrings", (3, 1, 0)),
        ('def a():\n    """Map.\n\n    Example:\n        >>> it = what\n        it\n    """', "docstrings", (2, 0, 0)),
        ('def a():\n    """Map.\n\n        it.what()\n\n    Unmap."""', "docstrings", (2, 0, 0)),
        ('"""Map `what it is`, and ``its``."""', "docstrings", (4, 0, 0)),
        ("x = 1  # what it is\ny = 2\n# of its own\n# and more", "comments", (8, 1, 2)),
        ("x = 1  # noqa: S606 (its own)\n# ----- it ------", "comments", (2, 0, 1)),
        ('raise A(f"{b} is what it " f"has: {c!r}", hint="its own size")', "messages", (9, 1, 2)),
        ('f("a", "b c", "#! it is a script")', "messages", (0, 0, 0)),
    ],
)
def test_each_kind_of_text_is_counted(source: str, kind: str, figures: tuple[int, int, int]) -> None:
    """Its words, the "what" and the "it", without code; code in a sentence is one word."""
    assert count_source(source, kind)[:3] == figures


def test_the_prose_of_a_page_is_counted_without_its_code() -> None:
    """Blocks, comments and addresses of links are left out; a cell and an item of a list are sentences."""
    page = (
        "# What it is\n\nIt maps [a block](what.md).\nSo it does.\n\n```python\nit = what\n```\n\n<!-- it\nis -->\n"
        "* one\n  two\n* three\n\n| it | what |\n|---|---|\n"
    )
    found = list(sentences(texts_of_page("a.md", page)))
    assert sorted(each.prose for each in found) == [
        *("It maps a block.", "So it does.", "What it is", "it", "one two", "three", "what"),
    ]
    assert Counts.of(found) == (15, 2, 4, 7, 0, 5, 0)


def test_long_sentences_pronouns_and_turns_are_counted() -> None:
    """A sentence of 26 words is long; one that begins with a pronoun is counted, wherever it stands."""
    words = " ".join(["map"] * 25)
    assert count_source(f'"""{words}."""', "docstrings").long == 0
    assert count_source(f'"""{words} it."""', "docstrings").long == 1
    assert count_source('"""Map it. It is mapped. They are. Nor is it."""', "docstrings").pronoun == 3
    assert count_source('"""Map it anew: so it is, likewise."""', "docstrings").turns == 3
    assert count_source('"""An annex, and a renewed one."""', "docstrings").turns == 0


def test_the_command_prints_tables_and_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each file and one for all; with --worst the sentences, and where they stand."""
    assert main([str(ROOT / "pyvfio" / "units.py"), "--kind", "docstrings"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-1] for row in rows if row] == ["docstrings", "pyvfio/units.py", "them"]
    assert main(["--exceeding"]) == 0
    assert capsys.readouterr().out.split() == exceeding()
    page = tmp_path / "page.md"
    page.write_text("It is what it is.\n")
    found = read([page], tmp_path)
    assert list(worst(found, 1)) == ["\npages:", "page.md:1: It is what it is."]
