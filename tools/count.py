"""Count private attributes used across modules, lines, and words: `python -m tools.count`.

Lines and private attributes are counted in the package without `testing/` and `cli/`, words in all docstrings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "pyvfio"
_APART = {"testing", "cli"}
_WHAT = {"what", "whatever", "whoever"}
_IT = {"it", "its"}


class Counts(NamedTuple):
    """The figures."""

    lines: int
    reaches: int
    words: int
    what: int
    it: int

    def __str__(self) -> str:
        """Format one line for each figure."""
        private, what, it = (
            f"{per_thousand(*pair):.1f}"
            for pair in ((self.reaches, self.lines), (self.what, self.words), (self.it, self.words))
        )
        return (
            f"lines without testing/ and cli/: {self.lines:,}\n"
            f"private attributes of others: {self.reaches}, {private} in 1,000 lines\n"
            f"what, whatever, whoever: {what} in 1,000 words of docstrings\n"
            f"it, its: {it} in 1,000 words of docstrings"
        )


def per_thousand(count: int, whole: int) -> float:
    """Return `count` for 1,000 of `whole`."""
    return 1000 * count / max(whole, 1)


def reaches(tree: ast.Module) -> Iterator[ast.Attribute]:
    """Yield each private attribute that is neither used on `self` or `cls` in this module nor one of its functions."""
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.attr for node in attributes if _is_of_self(node)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in attributes:
        private = node.attr.startswith("_") and not node.attr.startswith("__")
        if private and not _is_of_self(node) and node.attr not in own:
            yield node


def _is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def _words(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield from re.findall(r"[a-z']+", (ast.get_docstring(node) or "").lower())


def modules(package: Path = PACKAGE) -> Iterator[tuple[Path, str, bool]]:
    """Yield each module's path below `package`, its source, and whether it is outside of `testing/` and `cli/`."""
    for path in sorted(package.rglob("*.py")):
        below = path.relative_to(package)
        yield below, path.read_text(encoding="utf-8"), not _APART & set(below.parts)


def count(package: Path = PACKAGE) -> Counts:
    """Count in all modules below `package`."""
    lines = private = 0
    words: list[str] = []
    for _, source, counted in modules(package):
        tree = ast.parse(source)
        words += _words(tree)
        if counted:
            lines += source.count("\n")
            private += len(list(reaches(tree)))
    return Counts(lines, private, len(words), _among(words, _WHAT), _among(words, _IT))


def _among(words: Iterable[str], wanted: set[str]) -> int:
    return sum(word in wanted for word in words)


if __name__ == "__main__":
    print(count())
