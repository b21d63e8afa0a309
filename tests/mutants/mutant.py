"""One mistake in one definition, and a list of them with the tests that must notice each."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Span(NamedTuple):
    """The lines of one definition in one file: `first` is counted from 0, `end` is exclusive."""

    path: Path
    first: int
    end: int


def definitions(node: ast.AST, outer: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield each function, class and constant below `node` with its qualified name, such as "Handle.close"."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield outer + name, child
                yield from definitions(child, f"{outer}{name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if isinstance(node, ast.Module | ast.ClassDef):
                    yield outer + name, child
            case _:
                yield from definitions(child, outer)


@cache
def _spans(folder: Path) -> dict[str, list[Span]]:
    spans: dict[str, list[Span]] = {}
    for path in sorted(folder.rglob("*.py")):
        for name, found in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            first = min([found.lineno, *(line.lineno for line in getattr(found, "decorator_list", []))]) - 1
            spans.setdefault(name, []).append(Span(path, first, found.end_lineno or found.lineno))
    return spans


class Mutant(NamedTuple):
    """In the definition `place` the text `old`, which occurs there once, becomes `new`.

    place: the qualified name of a function, class or constant, in whichever file the definition stands, so that a
    mutant survives a move. operation: the operation that the mistake is in, where the list is ordered by operations.
    """

    place: str
    old: str
    new: str
    operation: str = ""

    @property
    def what(self) -> str:
        """One line."""
        place = f"{self.operation}, {self.place}" if self.operation else self.place
        return f"{place}: {' '.join(self.old.split())}  ->  {' '.join(self.new.split())}"

    def find(self, folder: Path) -> Span:
        """Return the definition below `folder` that holds `old`. ValueError unless `old` occurs exactly once."""
        spans = _spans(folder).get(self.place, [])
        found = [span for span in spans for _ in range(_cut(span)[1].count(self.old))]
        if len(found) != 1:
            raise ValueError(
                f"{len(spans)} definitions are named {self.place}, and {len(found)} places in them are {self.old!r}: "
                "the list of mutants is out of date"
            )
        return found[0]

    def apply(self, folder: Path) -> tuple[Path, str]:
        """Return the file below `folder` that changes, and its mutated source. ValueError as in `find`."""
        span = self.find(folder)
        before, definition, after = _cut(span)
        return span.path, before + definition.replace(self.old, self.new) + after


@cache
def _lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines(keepends=True))


def _cut(span: Span) -> tuple[str, str, str]:
    lines = _lines(span.path)
    return "".join(lines[: span.first]), "".join(lines[span.first : span.end]), "".join(lines[span.end :])


class Suite(NamedTuple):
    """Mistakes in the definitions below `folder`.

    rounds: the arguments of pytest for each mutant, one list after another until a test fails; the last list runs
    every test that may notice.
    """

    folder: Path
    mutants: tuple[Mutant, ...]
    rounds: Callable[[Mutant], Sequence[Sequence[str]]]
