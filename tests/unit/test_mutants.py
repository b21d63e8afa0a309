"""The lists of `scripts/mutants` fit the sources as they are; that each is caught is for the script to show."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.mutants import fake, library, listeners
from tests.mutants.mutant import ROOT, Mutant, Suite

OPERATIONS = (
    *("open", "add", "grow", "shrink", "discard", "populate", "replace pages"),
    *("remove", "temporary map", "close"),
)


@cache
def dump(source: str) -> str:
    """The program, without its layout and comments."""
    return ast.dump(ast.parse(source))


@pytest.mark.parametrize(
    ("suite", "mutant"),
    [(suite, mutant) for suite in (fake.SUITE, library.SUITE, listeners.SUITE) for mutant in suite.mutants],
    ids=lambda given: given.what[:60] if isinstance(given, Mutant) else "",
)
def test_each_mutant_changes_one_place_and_is_still_python(suite: Suite, mutant: Mutant) -> None:
    """And is another program than the one it was made of."""
    source = (ROOT / suite.folder / mutant.file).read_text(encoding="utf-8")
    assert dump(mutant.apply(source)) != dump(source)


def test_there_are_enough_of_them() -> None:
    """Of each kind."""
    assert len(fake.SUITE.mutants) >= 25
    assert len(library.SUITE.mutants) >= 20
    assert len(listeners.SUITE.mutants) >= 15


def test_each_operation_has_a_mistake_of_its_own() -> None:
    """And there is no operation beside those."""
    assert {mutant.operation for mutant in library.SUITE.mutants} == set(OPERATIONS)


def test_each_part_that_listens_or_hands_over_has_a_mistake_of_its_own() -> None:
    """And tests that there are have to notice it."""
    parts = {mutant.operation: listeners.SUITE.rounds(mutant) for mutant in listeners.SUITE.mutants}
    assert set(parts) == {"whole block", "dirty log", "pages replaced", "hand-over"}
    assert all((ROOT / arguments[0]).is_file() for rounds in parts.values() for arguments in rounds)


@pytest.mark.parametrize("text", ["", "a a"])
def test_a_list_that_is_out_of_date_says_so(text: str) -> None:
    """In place of a mistake that nobody made."""
    with pytest.raises(ValueError, match="out of date"):
        Mutant("type1.py", "a", "b").apply(text)
