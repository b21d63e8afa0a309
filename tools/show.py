"""The figures of `scripts/bench` as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyvfio.cli.common import print_table
from pyvfio.units import format_size
from tools.path_cost import LIBVFN, PATHS
from tools.report import MemoryRow, PathRow, Report, Resizes, ScaleRow
from tools.resize_cost import STEP
from tools.targets import Verdict


def show(report: Report, verdicts: Sequence[Verdict]) -> None:
    """Print a table for each part of the report, with the verdicts on that part."""
    where = "the fake kernel, as" if report.world == "fake" else "in a virtual machine:"
    print(f"{where} Linux {report.kernel}, {report.iommu} IOMMU, {report.space}")
    for resizes in report.resizes:
        _show_resizes(resizes)
        _show_verdicts(verdicts, resizes.memory)
    if report.paths:
        _show_paths(report.paths)
        _show_verdicts(verdicts, "hot paths")
    if report.scale:
        _show_scale(report.scale)
        _show_verdicts(verdicts, "scale")
    if report.granules:
        _show_scale(report.granules)
        _show_verdicts(verdicts, "granules")
    if report.memory:
        _show_memory(report.memory)
        _show_verdicts(verdicts, "objects")
    _show_verdicts(verdicts, "import")


def _show_resizes(resizes: Resizes) -> None:
    print(f"\nmicroseconds to grow by {format_size(STEP)}, and to shrink again; memory: {resizes.memory}\n")
    print_table(
        ["POLICY", "BLOCK", "GROW", "SYSTEM CALLS", "PYVFIO ADDS", "SHRINK", "SYSTEM CALLS", "PYVFIO ADDS", "POPULATE"],
        [
            [
                row.policy,
                format_size(row.size),
                *_numbers([row.cost.grow, row.bare.grow if row.bare else None, row.grow_added]),
                *_numbers([row.cost.shrink, row.bare.shrink if row.bare else None, row.shrink_added]),
                *_numbers([row.cost.prefault]),
            ]
            for row in resizes.rows
        ],
    )
    print("\nTo populate the memory that is grown by is part of no other column.\n")


def _show_paths(rows: Sequence[PathRow]) -> None:
    print("\nmicroseconds of one operation\n")
    found = {row.key: row for row in rows}
    lines = []
    for path in PATHS:
        row = found.get(path.key, PathRow(path.key, None, None, None))
        figures = [_fine(each) for each in (row.pyvfio, row.bare, row.plain, path.libvfn)]
        lines.append([path.name, *figures])
    print_table(["PATH", "PYVFIO", "C", "PLAIN PYTHON", "LIBVFN*"], lines)
    print(f"\n* {LIBVFN}\n")


def _show_scale(rows: Sequence[ScaleRow]) -> None:
    counts = sorted({n for row in rows for n in row.costs})
    print("\nmicroseconds of one operation where there are n; the cost of n of them is proportional to n^EXPONENT\n")
    lines = [[row.name, *(_fine(row.costs.get(n)) for n in counts), _fine(row.exponent)] for row in rows]
    print_table(["OPERATION", *(f"n = {n:,}" for n in counts), "EXPONENT"], lines)
    print()


def _show_memory(rows: Sequence[MemoryRow]) -> None:
    print("\nbytes of Python objects\n")
    print_table(["ONE OF MANY", "BYTES"], [[row.name, f"{row.size:,.0f}"] for row in rows])
    print()


def _show_verdicts(verdicts: Sequence[Verdict], about: str) -> None:
    for verdict in verdicts:
        if verdict.about == about:
            print(f"{'ok    ' if verdict.ok else 'MISSED'}  {verdict.what}: {verdict.seen}", flush=True)


def _numbers(microseconds: Iterable[float | None]) -> list[str]:
    return ["" if each is None else f"{each:,.1f}" for each in microseconds]


def _fine(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.3f}" if number < 1 else f"{number:,.2f}"
