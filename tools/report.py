"""The figures of one run of `scripts/bench`, and their form in JSON, which a virtual machine prints.

All times are in microseconds unless a name says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from pyvfio.cli.common import Json
from tools.fit import exponent_of


@dataclass(frozen=True, slots=True)
class Cost:
    """The least of some resizes by 2 MiB.

    `grow`: to grow without populating. `prefault`: to populate those 2 MiB. `shrink`: to shrink again.
    """

    grow: float
    prefault: float
    shrink: float


@dataclass(frozen=True, slots=True)
class ResizeRow:
    """One policy at one length of the block, in bytes; `bare`: the system calls alone."""

    policy: str
    size: int
    cost: Cost
    bare: Cost | None

    @property
    def grow_added(self) -> float | None:
        """The part of a grow that is not system calls."""
        return None if self.bare is None else self.cost.grow - self.bare.grow

    @property
    def shrink_added(self) -> float | None:
        """The part of a shrink that is not system calls."""
        return None if self.bare is None else self.cost.shrink - self.bare.shrink


@dataclass(frozen=True, slots=True)
class Resizes:
    """The rows of one kind of memory."""

    memory: str
    rows: Sequence[ResizeRow]


@dataclass(frozen=True, slots=True)
class PathRow:
    """One hot path: `key` of `tools.path_cost.PATHS`. None: the path cannot be measured there."""

    key: str
    pyvfio: float | None
    bare: float | None
    plain: float | None


@dataclass(frozen=True, slots=True)
class ScaleRow:
    """One operation: the cost at each n."""

    name: str
    costs: Mapping[int, float]

    @property
    def exponent(self) -> float | None:
        """The exponent of growth; see `exponent_of`."""
        return exponent_of(self.costs)


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """The bytes of Python objects for one of many things."""

    name: str
    size: float


@dataclass(frozen=True, slots=True)
class ImportCost:
    """Seconds of processor time: to import pyvfio and use its first name, and to import the yardstick."""

    pyvfio: float
    yardstick: float

    @property
    def ratio(self) -> float:
        """The cost of pyvfio in yardsticks."""
        return self.pyvfio / self.yardstick


@dataclass
class Report:
    """The figures of one run; parts that were not requested are empty.

    `world`: fake or vm. `space`: type1 or iommufd, the address space. `granules`: operations on a block of n granules.
    """

    world: str
    kernel: str
    iommu: str
    space: str = "type1"
    resizes: list[Resizes] = field(default_factory=list)
    paths: list[PathRow] = field(default_factory=list)
    scale: list[ScaleRow] = field(default_factory=list)
    granules: list[ScaleRow] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    imports: ImportCost | None = None


# ----------------------------------------------------------------------------------------------------------- to JSON


def to_json(report: Report) -> dict[str, Json]:
    """Return the figures for programs. Parts that were not requested are left out."""
    parts: dict[str, Json] = {
        "resizes": [_resizes_to_json(each) for each in report.resizes],
        "hot_paths": [
            {"path": row.key, "pyvfio_us": row.pyvfio, "c_us": row.bare, "python_us": row.plain} for row in report.paths
        ],
        "scale": [_scale_to_json(row) for row in report.scale],
        "granules": [_scale_to_json(row) for row in report.granules],
        "memory": [{"of": row.name, "bytes": row.size} for row in report.memory],
        "import": None
        if report.imports is None
        else {"pyvfio_s": report.imports.pyvfio, "yardstick_s": report.imports.yardstick},
    }
    head = {"world": report.world, "kernel": report.kernel, "iommu": report.iommu, "space": report.space}
    return {**head, **{name: part for name, part in parts.items() if part}}


def _scale_to_json(row: ScaleRow) -> dict[str, Json]:
    each: dict[str, Json] = {str(n): cost for n, cost in row.costs.items()}
    return {"operation": row.name, "each_us": each, "exponent": row.exponent}


def _resizes_to_json(resizes: Resizes) -> dict[str, Json]:
    return {
        "memory": resizes.memory,
        "rows": [
            {"policy": row.policy, "size": row.size, **_cost_to_json("", row.cost), **_cost_to_json("c_", row.bare)}
            for row in resizes.rows
        ],
    }


def _cost_to_json(prefix: str, cost: Cost | None) -> dict[str, Json]:
    figures = (None, None, None) if cost is None else (cost.grow, cost.shrink, cost.prefault)
    return {f"{prefix}{name}_us": figure for name, figure in zip(_COSTS, figures, strict=True)}


_COSTS = ("grow", "shrink", "prefault")


# --------------------------------------------------------------------------------------------------------- from JSON


def from_json(text: str) -> Report:
    """Return the figures of a text that `to_json` made. Raises ValueError and KeyError for any other text."""
    found = json.loads(text)
    imports = found.get("import")
    return Report(
        found["world"],
        found["kernel"],
        found["iommu"],
        found["space"],
        resizes=[Resizes(each["memory"], list(map(_resize_row, each["rows"]))) for each in found.get("resizes", ())],
        paths=[
            PathRow(row["path"], row["pyvfio_us"], row["c_us"], row["python_us"]) for row in found.get("hot_paths", ())
        ],
        scale=[_scale_row(row) for row in found.get("scale", ())],
        granules=[_scale_row(row) for row in found.get("granules", ())],
        memory=[MemoryRow(row["of"], row["bytes"]) for row in found.get("memory", ())],
        imports=None if imports is None else ImportCost(imports["pyvfio_s"], imports["yardstick_s"]),
    )


class _ScaleJson(TypedDict):
    operation: str
    each_us: Mapping[str, float]


def _scale_row(row: _ScaleJson) -> ScaleRow:
    return ScaleRow(row["operation"], {int(n): cost for n, cost in row["each_us"].items()})


def _resize_row(row: Mapping[str, int | float | str]) -> ResizeRow:
    cost = _cost_from_json("", row)
    if cost is None:
        raise ValueError(f"a row without figures: {row}")
    return ResizeRow(str(row["policy"]), int(row["size"]), cost, _cost_from_json("c_", row))


def _cost_from_json(prefix: str, row: Mapping[str, int | float | str]) -> Cost | None:
    figures = {name: row[f"{prefix}{name}_us"] for name in _COSTS}
    return None if figures["grow"] is None else Cost(**{name: float(figure) for name, figure in figures.items()})
