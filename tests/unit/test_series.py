"""docs/series.md names what there is, and whatever of it was not shown is found."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import series

HW, UNIT = "tests/hw/test_dma.py::test_a_block_shrunk_to_nothing_is_stopped_whole", "tests/unit/test_units.py::test_x"
PAGE = f"""# A page

## 1. One

Code: [pyvfio/units.py](../pyvfio/units.py),
[pyvfio/iova.py](../pyvfio/iova.py): `align_up`, `IovaAllocator.reserve`.

* `{HW}` (kernels)
* `{UNIT}`

## 2. Two

* `{HW}` (kernels 6.12, 7)
* TODO `tests/hw/test_more.py` (kernels)
"""
RELEASES = {"6.1": "6.1.0-56-amd64", "6.12": "6.12.95+deb12-amd64", "7": "7.3.4+deb13-amd64"}
KERNELS = [f"kernel {release}" for release in RELEASES.values()]


def said(test: str, *wheres: str, passed: bool = True) -> list[str]:
    """What runs print of a test, between other lines."""
    return ["....", *(series.report(test, where, passed=passed) + "\r" for where in wheres), "4 passed in 0.10s"]


def found(lines: Sequence[str], page: str = PAGE) -> list[str]:
    """What is missing."""
    return list(series.complaints_of_runs(series.read_rows(page), series.read_reports(lines)))


def test_the_page_names_rows_tests_and_code_that_there_are() -> None:
    """All rows, each with a test at least; functions in files, modules, and names in these."""
    rows = series.read_rows(series.PAGE.read_text(encoding="utf-8"))
    assert list(series.complaints_of_page(rows)) == []
    assert len(rows) == len(series.ROWS) == 32


def test_the_table_of_reports_names_tests_that_there_are() -> None:
    """All rows in order, each with a test at least."""
    rows = series.read_table(series.REPORTS.read_text(encoding="utf-8"))
    assert list(series.complaints_of_table(rows)) == []
    assert rows


def test_a_table_is_read_line_by_line() -> None:
    """Each test with the kernels that it is promised on; what names a test and is no row of the table is found."""
    one, two = series.read_table(f"| 1 | a | b | `{HW}` (kernels)<br>`{UNIT}` |\n| 2 | a | b | TODO more |\n`{UNIT}`\n")
    assert one.tests == {HW: ("6.1", "6.12", "7"), UNIT: ()}
    assert one.unclear == [f"`{UNIT}`"]
    assert two.todo == ["more"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("", "the rows are not numbered from 1, but "),
        (f"| 2 | a | b | `{HW}` (kernels) |", "the rows are not numbered from 1, but 2"),
        ("| 1 | a | b |  |", "row 1: no test shows it"),
        (f"| 1 | a | b | `{UNIT}` |", f"row 1: {UNIT} does not exist"),
        (f"| 1 | a | b | {UNIT} |", f"row 1: not understood: * {UNIT}"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_row(table: str, complaint: str) -> None:
    """Rows without a test, and tests that there are not."""
    assert complaint in list(series.complaints_of_table(series.read_table(table)))


def test_a_page_is_read_row_by_row() -> None:
    """Each test with the kernels that it is promised on."""
    one, two = series.read_rows(PAGE)
    assert (one.number, two.number) == (1, 2)
    assert one.tests == {HW: ("6.1", "6.12", "7"), UNIT: ()}
    assert two.tests == {HW: ("6.12", "7")}
    assert two.todo == ["`tests/hw/test_more.py`"]
    assert one.code == [(("pyvfio/units.py", "pyvfio/iova.py"), ("align_up", "IovaAllocator.reserve"))]


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("## 2. Two", "## 3. Two", "the rows are not 1 to 32 in order, but 1, 3"),
        (UNIT, UNIT, f"row 1: {UNIT} does not exist"),
        (UNIT, "tests/unit/test_nothing.py::test_x", "row 1: tests/unit/test_nothing.py::test_x does not exist"),
        ("(kernels)\n* `tests/u", "(kernel)\n* `tests/u", f"row 1: not understood: * `{HW}` (kernel)"),
        ("(kernels 6.12, 7)", "(kernels 6.12, 5)", f"row 2: not understood: * `{HW}` (kernels 6.12, 5)"),
        ("(kernels 6.12, 7)", "", f"row 2: not understood: * `{HW}` "),
        (" (kernels 6.12, 7)", "", f"row 2: {HW} runs on kernels, and the page does not say so"),
        ("# A page", f"# A page of {HW}", f"row 1: not understood: # A page of {HW}"),
        ("# A page", "# A page", "row 2: it does not say where the code is"),
        ("units.py", "unit.py", "row 1: pyvfio/unit.py does not exist"),
        ("`align_up`", "`align`", "row 1: align is in none of pyvfio/units.py, pyvfio/iova.py"),
        ("* TODO", "*", "row 2: not understood: * `tests/hw/test_more.py` (kernels)"),
    ],
)
def test_what_is_wrong_with_a_page_is_said_with_its_row(right: str, wrong: str, complaint: str) -> None:
    """Whatever names nothing, or is not understood and would be passed over."""
    assert right in PAGE
    assert complaint in list(series.complaints_of_page(series.read_rows(PAGE.replace(right, wrong))))


def test_a_row_without_a_test_is_found() -> None:
    """An empty list shows nothing."""
    assert "row 1: no test shows it" in list(series.complaints_of_page(series.read_rows("## 1. One\n\nIt works.\n")))


def test_nothing_is_missing_when_every_test_passed_where_it_has_to() -> None:
    """But what is still to be written."""
    lines = said(HW, "fake 6.12", *KERNELS) + said(UNIT, "here")
    assert found(lines) == ["row 2: `tests/hw/test_more.py` is still to be written"]


def test_a_test_that_did_not_run_is_found() -> None:
    """In each row that names it."""
    complaints = found(said(UNIT, "here"))
    assert f"row 1: {HW} did not run" in complaints
    assert f"row 2: {HW} did not run" in complaints
    assert not any(UNIT in complaint for complaint in complaints)


def test_a_test_that_ran_on_the_fake_only_is_found_for_each_kernel() -> None:
    """The kernels of the row, and no other."""
    complaints = found(said(HW, "fake 6.1", "here") + said(UNIT, "here"))
    missing = "did not pass on kernel {}, only on fake 6.1, here"
    assert [f"row 1: {HW} {missing.format(line)}" for line in RELEASES] == complaints[:3]
    assert [f"row 2: {HW} {missing.format(line)}" for line in ("6.12", "7")] == complaints[4:]


@pytest.mark.parametrize("line", RELEASES)
def test_a_kernel_that_a_test_did_not_run_on_is_found(line: str) -> None:
    """6.12 is not 6.1, nor is 7.3."""
    others = [f"kernel {release}" for name, release in RELEASES.items() if name != line]
    complaints = found(said(HW, *others) + said(UNIT, "here"))
    assert [complaint for complaint in complaints if complaint.startswith("row 1")] == [
        f"row 1: {HW} did not pass on kernel {line}, only on {', '.join(others)}"
    ]


def test_a_test_that_failed_somewhere_is_found_though_it_passed_elsewhere() -> None:
    """On whatever it failed."""
    lines = said(HW, *KERNELS) + said(HW, "fake 7.3", passed=False) + said(UNIT, "here")
    assert f"row 1: {HW} did not pass on fake 7.3" in found(lines)


def test_a_report_inside_of_another_line_is_none() -> None:
    """As when a failing test shows it."""
    assert list(series.read_reports([f"E   {series.report(UNIT, 'here', passed=True)}", "documented: passed"])) == []


def test_a_run_reports_what_is_documented_and_nothing_else() -> None:
    """A test with parameters as one, and where it ran."""
    arguments = ("tests/unit/test_units.py", "tests/hw/test_dma.py", "--fake=6.1", "-k", "reserved_tail or powers")
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--report-documented", *arguments)
    done = subprocess.run(command, cwd=series.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    tail = "tests/hw/test_dma.py::test_the_reserved_tail_of_a_block_is_stopped"
    assert list(series.read_reports(done.stdout.splitlines())) == [series.Report(tail, "fake 6.1", passed=True)]


def test_the_script_fails_where_something_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says what."""
    rows = series.read_rows(series.PAGE.read_text(encoding="utf-8"))
    tests = sorted({test for row in rows for test in row.tests})
    output = tmp_path / "output"
    output.write_text("\n".join(line for test in tests[1:] for line in said(test, *KERNELS)), encoding="utf-8")
    assert series.main([str(output)]) == 1
    assert f"{tests[0]} did not run" in capsys.readouterr().out
