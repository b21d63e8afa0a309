"""The figures of `scripts/bench` as a picture: cost against size, both logarithmic, one line for each policy.

matplotlib draws the picture, and is imported only then. The same figures give the same file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pyvfio.errors import UnsupportedError
from pyvfio.units import MIB
from tools.report import Report, Resizes
from tools.scale_cost import GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

_SETTINGS: dict[RcKeyType, object] = {
    "svg.hashsalt": "pyvfio",  # without a salt, ids are random
    "svg.fonttype": "none",  # text has a tenth of the size of letters drawn as paths
    "font.size": 8,
    "axes.grid": True,
    "grid.linewidth": 0.3,
    "path.simplify": True,
}
_WIDTH, _HEIGHT, _COLUMNS = 4.4, 3.0, 2


class Line(NamedTuple):
    """One policy: microseconds by size. `dashed`: the bare system calls."""

    name: str
    points: Mapping[int, float]
    dashed: bool = False


class Panel(NamedTuple):
    """Lines with common axes."""

    title: str
    size: str
    lines: Sequence[Line]


def check_installed() -> None:
    """Raise UnsupportedError if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError(
            "matplotlib, which draws the pictures, is not installed",
            hint="pip install matplotlib",
        )


def panels(report: Report) -> list[Panel]:
    """Return the panels: grows and shrinks of each memory with several sizes, or groups of operations."""
    several = [resizes for resizes in report.resizes if len({row.size for row in resizes.rows}) > 1]
    made = [panel for resizes in several for panel in _of_resizes(resizes)]
    costs = {row.name: row.costs for row in report.scale}
    for title, names in GROUPS.items():
        lines = [Line(name, costs[name]) for name in names if name in costs]
        made += [Panel(title, "n", lines)] if lines else []
    return made


def _of_resizes(resizes: Resizes) -> list[Panel]:
    grows: list[Line] = []
    shrinks: list[Line] = []
    for policy in dict.fromkeys(row.policy for row in resizes.rows):
        rows = [row for row in resizes.rows if row.policy == policy]
        grows.append(Line(policy, {row.size // MIB: row.cost.grow for row in rows}))
        shrinks.append(Line(policy, {row.size // MIB: row.cost.shrink for row in rows}))
        bare = {row.size // MIB: row.bare for row in rows}
        grows.append(Line(f"{policy}, C", {size: cost.grow for size, cost in bare.items() if cost}, dashed=True))
        shrinks.append(Line(f"{policy}, C", {size: cost.shrink for size, cost in bare.items() if cost}, dashed=True))
    return [
        Panel(f"{verb} by 2 MiB; memory: {resizes.memory}", "block, MiB", [line for line in lines if line.points])
        for verb, lines in (("grow", grows), ("shrink", shrinks))
    ]


def draw(report: Report, path: Path) -> None:
    """Draw the report into an SVG file. Raises UnsupportedError without matplotlib, ValueError without figures."""
    check_installed()
    import matplotlib as mpl  # noqa: PLC0415 (an extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    drawn = panels(report)
    if not drawn:
        raise ValueError("these figures have no size to be drawn against")
    rows = -(-len(drawn) // _COLUMNS)
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(_WIDTH * min(_COLUMNS, len(drawn)), _HEIGHT * rows), layout="constrained")
        for index, panel in enumerate(drawn, start=1):
            _draw_panel(figure.add_subplot(rows, min(_COLUMNS, len(drawn)), index), panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _draw_panel(axes: Axes, panel: Panel) -> None:
    color = -1
    for line in panel.lines:
        color += not line.dashed  # a dashed line has the colour of the line before
        style = "--" if line.dashed else ".-"
        sizes, costs = zip(*sorted(line.points.items()), strict=True)
        axes.loglog(sizes, costs, style, color=f"C{color}", linewidth=1, label=line.name)
    axes.minorticks_off()  # minor ticks would be half of the file
    axes.set_title(panel.title)
    axes.set_xlabel(panel.size)
    axes.set_ylabel("µs")
    axes.legend(fontsize=6)
