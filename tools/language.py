"""Count how the project writes: `python -m tools.language [--worst N] [PATH...]`.

A table for each kind of text: docstrings (also those of attributes), comments, messages (all other text of three words
or more in the source) and pages. A row has a file's words, "what" and "it" in 1,000 words, and the number of long
sentences, of sentences that begin with a pronoun, and of turns that CONTRIBUTING.md rules out. Code is left out of
pages and docstrings; code within a sentence counts as one word.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("docstrings", "comments", "messages", "pages")
WHAT_LIMIT = 3.0
"""So many of what, whatever, whoever in 1,000 words."""
IT_LIMIT = 15.0
"""So many of it, its in 1,000 words."""
LONGEST = 25
"""A sentence of more words is long."""

_WHAT = {"what", "whatever", "whoever"}
_IT = {"it", "its"}
_PRONOUNS = {"it", "its", "they", "their", "so", "nor", "what", "whatever", "who", "whoever"}
TURNS = (
    *("so it is", "so is", "so are", "so does", "nor here", "likewise", "who cannot", "that which", "whoever"),
    *("anew", "all the same", "for ever", "be had", "is had", "has it not", "have it not", "let go", "lets go"),
    *("take away", "takes away", "taken away", "took away", "give back", "gives back", "given back", "gave back"),
    *("should even", "in other hands", "is there already", "is to come", "are to come", "as it is", "is no more"),
)
"""Turns of phrase that the field does not use."""

_TURN = re.compile(rf"\b(?:{'|'.join(TURNS)})\b", re.IGNORECASE)
_CODE = "CODE"
_WORD = re.compile(r"[A-Za-z][A-Za-z']*")
_END = re.compile(r"(?<=[.!?])[)\"”*]*\s+(?=[A-Z`\"“(*_\[0-9])")
_ITEM = re.compile(r"^\s*(?:[*+-]|\d+\.|:\w+[^:]*:)\s+")


class Text(NamedTuple):
    """A piece of prose, and where it begins."""

    path: str
    line: int
    kind: str
    prose: str


class Sentence(NamedTuple):
    """A sentence of a text. Its words are in lower case."""

    text: Text
    prose: str
    words: list[str]

    @property
    def what(self) -> int:
        """How often it says "what"."""
        return sum(word in _WHAT for word in self.words)

    @property
    def it(self) -> int:
        """How often it says "it"."""
        return sum(word in _IT for word in self.words)

    @property
    def long(self) -> int:
        """1 for more than `LONGEST` words."""
        return int(len(self.words) > LONGEST)

    @property
    def pronoun(self) -> int:
        """1 for a sentence that begins with a pronoun."""
        return int(bool(self.words) and self.words[0] in _PRONOUNS)

    @property
    def turns(self) -> int:
        """How many turns that are ruled out it has."""
        return len(_TURN.findall(self.prose))


class Counts(NamedTuple):
    """The figures of a file, or of several."""

    words: int = 0
    what: int = 0
    it: int = 0
    sentences: int = 0
    long: int = 0
    pronoun: int = 0
    turns: int = 0

    @classmethod
    def of(cls, sentences: Iterable[Sentence]) -> Counts:
        """Count in all of `sentences`."""
        rows = [(len(s.words), s.what, s.it, 1, s.long, s.pronoun, s.turns) for s in sentences]
        return cls(*map(sum, zip(*rows, strict=True))) if rows else cls()

    @property
    def what_per_thousand(self) -> float:
        """How often "what" stands in 1,000 words."""
        return 1000 * self.what / max(self.words, 1)

    @property
    def it_per_thousand(self) -> float:
        """How often "it" stands in 1,000 words."""
        return 1000 * self.it / max(self.words, 1)

    @property
    def exceeds(self) -> bool:
        """Whether a limit is exceeded, or a turn is ruled out."""
        return self.what_per_thousand > WHAT_LIMIT or self.it_per_thousand > IT_LIMIT or self.turns > 0

    def row(self, name: str) -> str:
        """Return a line of the table."""
        return (
            f"{self.words:7} {self.what_per_thousand:6.1f} {self.it_per_thousand:6.1f} {self.long:6} "
            f"{self.pronoun:8} {self.turns:6}  {name}"
        )


HEADER = f"{'words':>7} {'what':>6} {'it':>6} {'long':>6} {'pronoun':>8} {'turns':>6}"


# ------------------------------------------------------------------------------------------------------- Python files


def texts_of_source(path: str, source: str) -> Iterator[Text]:
    """Yield the docstrings, messages and comments of a module."""
    nodes = list(ast.walk(ast.parse(source)))
    documented: set[int] = set()
    for owner in nodes:
        for string in _docstrings(owner):
            documented.add(id(string))
            yield Text(path, string.lineno, "docstrings", _without_examples(inspect.cleandoc(str(string.value))))
    inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in nodes:
        joined = isinstance(node, ast.JoinedStr)
        if id(node) in documented or (id(node) in inside and not joined):
            continue
        message = _message(node)
        if len(_WORD.findall(message)) >= 3:
            yield Text(path, getattr(node, "lineno", 0), "messages", message)
    yield from _comments(path, source)


def _docstrings(owner: ast.AST) -> Iterator[ast.Constant]:
    """Yield the docstring of a module, class or function, and those behind assignments in it."""
    body: list[ast.stmt] = [] if isinstance(owner, ast.Lambda | ast.IfExp) else getattr(owner, "body", [])
    has_own = isinstance(owner, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    for place, node in enumerate(body):
        follows = place > 0 and isinstance(body[place - 1], ast.Assign | ast.AnnAssign)
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
            and (follows or (has_own and place == 0))
        ):
            yield node.value


def _message(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else _CODE for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and not node.value.startswith("#!"):
        return node.value
    return ""


def _without_examples(docstring: str) -> str:
    """Leave out indented blocks, and everything from a prompt to the end of its block."""
    blocks = []
    for block in re.split(r"\n\s*\n", docstring):
        prose = re.split(r"^\s*>>> ", block, maxsplit=1, flags=re.MULTILINE)[0]
        if not all(line.startswith("    ") for line in block.splitlines()):
            blocks.append(prose)
    return "\n\n".join(blocks)


def _comments(path: str, source: str) -> Iterator[Text]:
    """Yield comments, those on neighbouring lines as one, without rulers and what linters are told."""
    block: list[str] = []
    start = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        prose = re.sub(r"^#\s*", "", token.string)
        prose = re.sub(r"(noqa|type: ignore|pyright: ignore|pragma)(: ?[\w, ]+|\[[\w, -]+\])?|^-{3,}.*|^!.*", "", prose)
        alone = not token.line[: token.start[1]].strip()
        if block and not (alone and token.start[0] == last + 1):
            yield Text(path, start, "comments", "\n".join(block))
            block = []
        start = start if block else token.start[0]
        last = token.start[0]
        if prose.strip():
            block.append(prose)
    if block:
        yield Text(path, start, "comments", "\n".join(block))


# -------------------------------------------------------------------------------------------------------------- pages


def texts_of_page(path: str, page: str) -> Iterator[Text]:
    """Yield each paragraph, heading, item and cell of a page in Markdown, without blocks of code and addresses."""
    page = re.sub(r"^---\n.*?\n---\n", "", page, flags=re.DOTALL)
    for pattern in (r"^( *)(`{3,}|~{3,}|:{3,}).*?^ *\2", r"<!--.*?-->"):
        page = re.sub(pattern, lambda found: "\n" * found[0].count("\n"), page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", page)
    for number, line in enumerate(page.splitlines(), 1):
        if line.startswith("|"):
            for cell in line.strip().strip("|").split("|"):
                yield Text(path, number, "pages", cell)
    page = re.sub(r"^\|.*$", "", page, flags=re.MULTILINE)
    number = 1
    for block in re.split(r"(\n\s*\n)", page):
        if block.strip():
            yield Text(path, number, "pages", re.sub(r"^(#+ .*)$", r"\1\n\n", block, flags=re.MULTILINE))
        number += block.count("\n")


# ---------------------------------------------------------------------------------------------------------- sentences


def sentences(texts: Iterable[Text]) -> Iterator[Sentence]:
    """Yield the sentences of all texts: units end at a stop, at an item of a list and at an empty line."""
    for text in texts:
        for unit in _units(text.prose):
            for prose in _END.split(unit):
                words = [word.lower() for word in _WORD.findall(prose)]
                if words:
                    yield Sentence(text, prose.strip(), words)


def _units(prose: str) -> Iterator[str]:
    prose = re.sub(r"``.+?``|`[^`]+`", _CODE, prose, flags=re.DOTALL)
    unit: list[str] = []
    for line in [*prose.splitlines(), ""]:
        if not line.strip() or _ITEM.match(line):
            if unit:
                yield " ".join(unit)
            unit = []
        if line.strip():
            unit.append(_ITEM.sub("", line).strip(" #"))
    if unit:
        yield " ".join(unit)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the project's pages."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def modules(root: Path = ROOT) -> list[Path]:
    """Return the modules of the package."""
    return sorted((root / "pyvfio").rglob("*.py"))


def read(paths: Iterable[Path], root: Path = ROOT) -> dict[str, list[Sentence]]:
    """Return the sentences of each file, by its path from `root`."""
    found: dict[str, list[Sentence]] = {}
    for path in paths:
        name = str(path.resolve().relative_to(root))
        found[name] = list(_sentences_of(name, path.read_text(encoding="utf-8")))
    return found


@cache
def _sentences_of(name: str, content: str) -> tuple[Sentence, ...]:
    parse: Callable[[str, str], Iterator[Text]] = texts_of_page if name.endswith(".md") else texts_of_source
    return tuple(sentences(parse(name, content)))


def counts(found: dict[str, list[Sentence]], kind: str) -> dict[str, Counts]:
    """Return the figures of each file that has text of that kind."""
    of_kind = {name: [each for each in some if each.text.kind == kind] for name, some in found.items()}
    return {name: Counts.of(some) for name, some in of_kind.items() if some}


def total(each: Iterable[Counts]) -> Counts:
    """Add up the figures of several files."""
    rows = list(each)
    return Counts(*map(sum, zip(*rows, strict=True))) if rows else Counts()


def exceeding(root: Path = ROOT) -> list[str]:
    """Return the modules and pages whose docstrings or text exceed a limit."""
    found = read([*modules(root), *pages(root)], root)
    figures = counts(found, "docstrings") | counts(found, "pages")
    return sorted(name for name, each in figures.items() if each.exceeds)


# ------------------------------------------------------------------------------------------------------------- output


def table(found: dict[str, list[Sentence]], kinds: Sequence[str] = KINDS) -> Iterator[str]:
    """Yield the lines of the tables; in each the worst files first."""
    for kind in kinds:
        figures = counts(found, kind)
        if not figures:
            continue
        yield f"\n{HEADER}  {kind}"
        ordered = sorted(figures.items(), key=lambda pair: (-pair[1].it - pair[1].what - pair[1].turns, pair[0]))
        yield from (each.row(name) for name, each in ordered)
        yield total(figures.values()).row("all of them")


def worst(found: dict[str, list[Sentence]], number: int, kinds: Sequence[str] = KINDS) -> Iterator[str]:
    """Yield the `number` sentences of each kind that make most of the figures."""

    def weight(each: Sentence) -> int:
        return 3 * each.what + 2 * each.it + 2 * each.turns + 2 * each.pronoun + max(len(each.words) - LONGEST, 0) // 5

    for kind in kinds:
        some = [each for group in found.values() for each in group if each.text.kind == kind and weight(each)]
        if some:
            yield f"\n{kind}:"
        for each in sorted(some, key=lambda one: -weight(one))[:number]:
            yield f"{each.text.path}:{each.text.line}: {' '.join(each.prose.split())}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tools.language", description="Count how the project writes.")
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="files or folders; without: all of pyvfio/")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind of text; repeatable")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="print the N worst sentences of each kind")
    parser.add_argument("--exceeding", action="store_true", help="print the modules and pages that exceed a limit")
    options = parser.parse_args(arguments)
    if options.exceeding:
        print(*exceeding(), sep="\n")
        return 0
    given = [each for path in options.paths for each in (sorted(path.rglob("*.[pm][yd]")) if path.is_dir() else [path])]
    found = read(given or [*modules(), *pages()])
    kinds = options.kind or KINDS
    lines = worst(found, options.worst, kinds) if options.worst else table(found, kinds)
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
