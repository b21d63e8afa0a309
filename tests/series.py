"""The promises of docs/series.md and docs/reports.md, row by row, and whether test runs have kept them.

`python -m tests.series FILE...` reads the output of pytest runs with `--report-documented`. The exit status is 1 when a
test that a page names does not exist, did not run, did not pass, or did not pass on each kernel that the page promises.
`scripts/test` ends with it.

A row of docs/series.md is a heading `## 7. …`; a paragraph that begins with `Code:`, with links to modules and names in
them; and a list of tests by node id, as code, `(kernels)` behind those that run on each line of `KERNELS`,
`(kernels 6.12, 7)` behind those that run on these. An item `TODO …` is a test that is still to be written. A row of
docs/reports.md is a line of a table `| 7 | report | answer | tests |`; `<br>` separates the tests.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pyvfio.testing.kernels import LINES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/series.md"
REPORTS = ROOT / "docs/reports.md"
KERNELS = tuple(line.name for line in LINES.values() if not line.packaged)
ROWS = range(1, 33)

_HEADING = re.compile(r"## (\d+)\. \S.*")
_ITEM = re.compile(r"\* (?:`(tests/[\w/]+\.py::test_\w+)`|TODO (.+?))(?: \(kernels( [\d., ]+)?\))?")
_LINE = re.compile(r"\| (\d+) \|.* \| (.*) \|")
_MENTION = re.compile(r"\* `?tests/|tests/[\w/]+\.py::")
_LINK = re.compile(r"\[(\w[\w/]*\.py)\]\(\.\./(\w[\w/]*\.py)\)")
_NAME = re.compile(r"`([\w.]+)`")
_REPORT = re.compile(r"documented: (passed|FAILED) on (here|fake \S+|kernel \S+): (\S+)")


@dataclass
class Row:
    """One row of the page: `tests` by node id, each with the kernel lines that it must have passed on; `todo`, those
    that are still to be written; `code`, modules with the names that the page says are in them; `unclear`, lines about
    tests that are not in the form."""

    number: int
    tests: dict[str, tuple[str, ...]] = field(default_factory=dict)
    todo: list[str] = field(default_factory=list)
    code: list[tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)


class Report(NamedTuple):
    """What a run said of a test: `where` is `here`, `fake VERSION` or `kernel RELEASE`."""

    test: str
    where: str
    passed: bool


def read_rows(text: str) -> list[Row]:
    """The rows of a page, in its order. A line that names a test and belongs to no row is the first row's `unclear`."""
    rows: list[Row] = []
    stray: list[str] = []
    for line in _lines(text):
        if heading := _HEADING.fullmatch(line):
            rows.append(Row(int(heading[1])))
        elif rows:
            _read_line(rows[-1], line)
        elif _MENTION.search(line):
            stray.append(line)
    if rows:
        rows[0].unclear += stray
    return rows


def read_table(text: str) -> list[Row]:
    """The rows of the tables of a page, in its order. A stray line that names a test is the first's `unclear`."""
    rows: list[Row] = []
    stray: list[str] = []
    for line in text.splitlines():
        if cells := _LINE.fullmatch(line):
            rows.append(Row(int(cells[1])))
            for item in filter(None, cells[2].split("<br>")):
                _read_line(rows[-1], f"* {item}")
        elif _MENTION.search(line):
            stray.append(line)
    if rows:
        rows[0].unclear += stray
    return rows


def documented() -> Iterator[tuple[Path, list[Row]]]:
    """Each page, and its rows."""
    yield PAGE, read_rows(PAGE.read_text(encoding="utf-8"))
    yield REPORTS, read_table(REPORTS.read_text(encoding="utf-8"))


def _lines(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        yield from [" ".join(lines)] if paragraph.startswith("Code:") else lines


def _read_line(row: Row, line: str) -> None:
    if line.startswith("Code:"):
        links = tuple(target for shown, target in _LINK.findall(line) if shown == target)
        row.code.append((links, tuple(_NAME.findall(line))))
    elif item := _ITEM.fullmatch(line):
        test, todo, lines = item.groups()
        kernels = KERNELS if line.endswith("(kernels)") else ()
        wanted = tuple(lines.replace(",", " ").split()) if lines else kernels
        if todo:
            row.todo.append(todo)
        elif test in row.tests or not set(wanted) <= set(KERNELS):
            row.unclear.append(line)
        else:
            row.tests[test] = wanted
    elif _MENTION.search(line):
        row.unclear.append(line)


# ------------------------------------------------------------------------------------------------- what there is


@cache
def _functions(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    return frozenset(
        node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    )


@cache
def _names(path: Path) -> frozenset[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return frozenset(found)


def exists(test: str) -> bool:
    """Whether there is a function of that name in that file, which is not imported."""
    path, _, name = test.partition("::")
    return name in _functions(ROOT / path)


def complaints_of_page(rows: Sequence[Row]) -> Iterator[str]:
    """What is wrong with docs/series.md: rows that are missing, tests, modules and names that do not exist."""
    if [row.number for row in rows] != list(ROWS):
        yield f"the rows are not {ROWS[0]} to {ROWS[-1]} in order, but {', '.join(str(row.number) for row in rows)}"
    yield from complaints_of_tests(rows)
    for row in rows:
        if not row.code:
            yield f"row {row.number}: it does not say where the code is"
        for modules, names in row.code:
            yield from (f"row {row.number}: {complaint}" for complaint in _complaints_of_code(modules, names))


def complaints_of_table(rows: Sequence[Row]) -> Iterator[str]:
    """What is wrong with docs/reports.md: rows that are not numbered in order, tests that do not exist."""
    if not rows or [row.number for row in rows] != list(range(1, len(rows) + 1)):
        yield f"the rows are not numbered from 1, but {', '.join(str(row.number) for row in rows)}"
    yield from complaints_of_tests(rows)


def complaints_of_tests(rows: Sequence[Row]) -> Iterator[str]:
    """Rows of which no test is named, or one that does not exist."""
    for row in rows:
        yield from (f"row {row.number}: not understood: {line}" for line in row.unclear)
        yield from (f"row {row.number}: {test} does not exist" for test in row.tests if not exists(test))
        yield from (
            f"row {row.number}: {test} runs on kernels, and the page does not say so"
            for test, kernels in row.tests.items()
            if test.startswith(("tests/hw/", "tests/contract/")) and not kernels
        )
        if not row.tests and not row.todo:
            yield f"row {row.number}: no test shows it"


def _complaints_of_code(modules: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    there = [ROOT / module for module in modules if (ROOT / module).is_file()]
    yield from (f"{module} does not exist" for module in modules if ROOT / module not in there)
    if not modules:
        yield "the line of its code links to no module"
    for name in names:
        if not any(name.split(".")[-1] in _names(path) for path in there):
            yield f"{name} is in none of {', '.join(modules)}"


# --------------------------------------------------------------------------------------------- what runs have said


def read_reports(lines: Iterable[str]) -> Iterator[Report]:
    """Those of a run's output: each is a line of its own."""
    for line in lines:
        if found := _REPORT.fullmatch(line.strip()):
            yield Report(found[3], found[2], found[1] == "passed")


def report(test: str, where: str, *, passed: bool) -> str:
    """The line that `read_reports` reads."""
    return f"documented: {'passed' if passed else 'FAILED'} on {where}: {test}"


def _is_of(where: str, line: str) -> bool:
    kind, _, release = where.partition(" ")
    return kind == "kernel" and LINES[line].has(release)


def complaints_of_runs(rows: Sequence[Row], reports: Iterable[Report]) -> Iterator[str]:
    """What the page promises and runs have not shown."""
    seen: dict[str, list[Report]] = {}
    for found in reports:
        seen.setdefault(found.test, []).append(found)
    for row in rows:
        yield from (f"row {row.number}: {test} is still to be written" for test in row.todo)
        for test, kernels in row.tests.items():
            yield from (f"row {row.number}: {test} {what}" for what in _shortcomings(seen.get(test, []), kernels))


def _shortcomings(reports: Sequence[Report], kernels: Sequence[str]) -> Iterator[str]:
    yield from (f"did not pass on {found.where}" for found in reports if not found.passed)
    passed = [found.where for found in reports if found.passed]
    if not reports:
        yield "did not run"
    for line in kernels if reports else ():
        if not any(_is_of(where, line) for where in passed):
            yield f"did not pass on kernel {line}, only on {', '.join(dict.fromkeys(passed)) or 'none'}"


def main(arguments: Sequence[str]) -> int:
    """0 when all that the pages promise exists and was shown."""
    lines = [line for name in arguments for line in Path(name).read_text("utf-8", errors="replace").splitlines()]
    status = 0
    for page, rows in documented():
        of_page = complaints_of_page if page == PAGE else complaints_of_table
        complaints = [*of_page(rows), *complaints_of_runs(rows, read_reports(lines))]
        tests = {test: kernels for row in rows for test, kernels in row.tests.items()}
        real = sum(bool(kernels) for kernels in tests.values())
        shown = f"{len(rows)} rows are shown by {len(tests)} tests that passed, {real} of them on kernels"
        for line in complaints or [shown]:
            print(f"docs/{page.name}: {line}")
        status |= bool(complaints)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
