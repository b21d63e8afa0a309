"""The limits of `scripts/bench --check`, and the verdicts on the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pyvfio.units import MIB, format_size
from tools import granule_cost
from tools.fit import exponent_of
from tools.path_cost import MOST, PATHS
from tools.report import ImportCost, MemoryRow, PathRow, Report, ResizeRow, Resizes, ScaleRow

FLAT = 0.05
"""With extend and with granules, the cost of growing must not depend on the length, except for this fraction."""
CHEAPER = 200
"""A remap at the largest length must cost this many times as much, if the length is at least `CHEAPER_FROM`."""
CHEAPER_FROM = 512 * MIB

EXPONENT = 1.15
"""The limit of the exponent of the cost of n operations: among 10,000, one may cost twice as much as among 100."""

WALKS = {"read dirty pages, each mapping": 1.35}
"""The limit of the exponent for calls in which kernels walk over all lower mappings (`vfio_iova_dirty_bitmap`). For
kernels only: the fake has no such walk."""

NOISE = 0.3
"""If the clock is the processor time, an exponent above `EXPONENT` by at most this number is measured again."""

MISSES = 5.0
"""Microseconds allowed in addition for each operation, whose objects may have left the caches of a busy processor. This
number is added to each cost before the exponent is computed, but not if the clock counts instructions."""

OBJECTS = {
    "a mapping by map_dma": 300,
    "a mapping by map_buffer": 300,
    "a temporary mapping": 300,
    "a block": 1000,
    granule_cost.OBJECTS: 300,
}
"""The most bytes of Python objects for one of many things."""

IMPORT = 1.7
"""The most that the import may take, in yardsticks of `tools.import_cost`. On a machine where the yardstick takes
0.057 s, and a Python that imports nothing 0.024 s, the limit is 0.12 s in all."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits on one line of kernels, in microseconds of a clock that counts instructions: 1,000 of them each.

    `paths`: limits of the hot paths, by key. `among`: the most that one mapping among 16,384 may cost, in costs among
    16. `grow_added`, `shrink_added`: the part that is not system calls, for 2 MiB of anonymous memory. The system calls
    of a shrink take 188 µs on Linux 6.1 and 158 µs on 7. `cut_added`: the same for a shrink that cuts a mapping, by
    policy.
    """

    paths: Mapping[str, float]
    among: float
    grow_added: float
    shrink_added: float
    cut_added: Mapping[str, float] = field(default_factory=dict)


_PATHS = {
    "container": 46.8,
    "map_dma": 71.1,
    "map_buffer": 79.9,
    "temporary": 60.0,
    "translate_16": 6.0,
    "translate_1000": 6.0,
    "translate_16384": 6.0,
    "translate_all": 5.5,
    "translate_numpy": 0.1,
    "read32": 2.5,
    "write32": 2.5,
    "register_read": 0.8,
    "register_write": 0.8,
    "config": 8.0,
    "interrupt": 8.0,
}
_BY_SYSTEM_CALLS = ("container", "map_dma", "map_buffer", "temporary", "config", "interrupt")

LATER = 1.02
"""The most that paths with system calls may take on later kernels, in times of Linux 6.1. Measured: 1.00 to 1.01 times
where pyvfio takes most of the time."""

LIMITS: Mapping[str, Limits] = {
    "6.1": Limits(_PATHS, among=1.16, grow_added=62.0, shrink_added=137.0),
    "7": Limits(
        {**_PATHS, **{key: LATER * _PATHS[key] for key in _BY_SYSTEM_CALLS}},
        among=1.16,
        grow_added=62.0,
        shrink_added=137.0,
    ),
}
"""The limits of type1 by line of kernels. A kernel has the limits of the newest line that is not newer."""

_CUTS = {"cut-pages": 213.0, "cut-replace": 340.0}
IOMMUFD: Mapping[str, Limits] = {
    "6.12": Limits(
        {**_PATHS, "container": 52.7, "map_dma": 77.1, "map_buffer": 85.9, "temporary": 65.7},
        among=1.16,
        grow_added=64.0,
        shrink_added=137.0,
        cut_added=_CUTS,
    ),
    "7": Limits(
        {**_PATHS, "container": 55.2, "map_dma": 79.6, "map_buffer": 88.4, "temporary": 67.9},
        among=1.16,
        grow_added=74.0,
        shrink_added=137.0,
        cut_added=_CUTS,
    ),
}
"""The limits of iommufd by line of kernels."""


def limits_of(release: str, space: str = "type1") -> Limits:
    """Return the limits for a kernel and an address space. `release`: as `uname -r` prints it."""
    limits, version = IOMMUFD if space == "iommufd" else LIMITS, _version(release)
    older = [line for line in limits if _version(line) <= version]
    return limits[max(older, key=_version) if older else min(limits, key=_version)]


def _version(release: str) -> tuple[int, ...]:
    numbers = release.partition("-")[0].split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())


@dataclass(frozen=True, slots=True)
class Verdict:
    """One condition, and the figure seen. `about`: the part of the report."""

    about: str
    what: str
    ok: bool
    seen: str


def judge(report: Report) -> Iterator[Verdict]:
    """Compare the figures with each limit. Parts that are not in the report are ignored.

    Times of the fake are not judged; exponents, memory and import are.
    """
    limits = limits_of(report.kernel, report.space)
    if report.world != "fake":
        for resizes in report.resizes:
            yield from judge_resizes(resizes, limits)
        if report.paths:
            yield from judge_paths(report.paths, limits)
    most = max((n for row in report.scale for n in row.costs), default=0)
    for row in report.scale:
        yield judge_scale(row, most, fake=report.world == "fake")
    most = max((n for row in report.granules for n in row.costs), default=0)
    for row in report.granules:
        yield judge_scale(row, most, fake=report.world == "fake", about="granules")
    yield from judge_memory(report.memory)
    if report.imports is not None:
        yield judge_import(report.imports)


# ----------------------------------------------------------------------------------------------------------- resizes


def judge_resizes(resizes: Resizes, limits: Limits) -> Iterator[Verdict]:
    """Judge the rows of one kind of memory. Limits whose rows are missing are ignored.

    The pages of a file are zeroed in the resize itself, which costs more than mapping them. Therefore the limit on the
    whole is for anonymous memory only.
    """
    remaps = {row.size: row.cost.grow for row in resizes.rows if row.policy == "remap"}
    if resizes.memory != "anonymous":
        remaps = {}
    for policy in ("extend", "granule"):
        rows = [row for row in resizes.rows if row.policy == policy]
        yield from _flat(resizes.memory, policy, rows)
        for row in rows:
            if row.size >= CHEAPER_FROM and row.size in remaps:
                times = remaps[row.size] / row.cost.grow
                what = f"{policy}: growing is {CHEAPER} times cheaper than remap at {format_size(row.size)}"
                yield Verdict(resizes.memory, what, times >= CHEAPER, f"{times:,.0f} times")
        yield from _added(resizes.memory, policy, rows, limits.grow_added, limits.shrink_added)
    for policy, limit in limits.cut_added.items():
        rows = [row for row in resizes.rows if row.policy == policy]
        yield from _flat(resizes.memory, policy, rows)
        yield from _added(resizes.memory, policy, rows, limits.grow_added, limit)


def _flat(memory: str, policy: str, rows: Sequence[ResizeRow]) -> Iterator[Verdict]:
    if len(rows) < 2:
        return
    verbs = {"growing": [row.cost.grow for row in rows], "shrinking": [row.cost.shrink for row in rows]}
    if policy == "cut-replace":  # the kernel copies what stays into another space
        del verbs["shrinking"]
    for verb, costs in verbs.items():
        spread = max(costs) / min(costs) - 1
        seen = f"{min(costs):,.1f} to {max(costs):,.1f} µs, {spread:.1%} apart"
        yield Verdict(
            memory, f"{policy}: {verb} costs the same at every length within {FLAT:.0%}", spread <= FLAT, seen
        )


def _added(
    memory: str, policy: str, rows: Sequence[ResizeRow], grow_added: float, shrink_added: float
) -> Iterator[Verdict]:
    grows = [row.grow_added for row in rows if row.grow_added is not None]
    shrinks = [row.shrink_added for row in rows if row.shrink_added is not None]
    if not grows or not shrinks:
        return
    apart = max(row.cost.prefault for row in rows)
    left_out = f"; populating {format_size(2 * MIB)}, {apart:,.1f} µs, is left out"
    what = f"{policy}: pyvfio adds at most {grow_added:.0f} µs to the system calls of a grow"
    yield Verdict(memory, what, max(grows) <= grow_added, f"{max(grows):.1f} µs{left_out}")
    what = f"{policy}: pyvfio adds at most {shrink_added:.0f} µs to the system calls of a shrink"
    yield Verdict(memory, what, max(shrinks) <= shrink_added, f"{max(shrinks):.1f} µs")


# -------------------------------------------------------------------------------------------------------- hot paths


def judge_paths(rows: Sequence[PathRow], limits: Limits) -> Iterator[Verdict]:
    """Judge each hot path that has a limit. A path that could not be measured fails."""
    found = {row.key: row.pyvfio for row in rows}
    for path in PATHS:
        limit = limits.paths.get(path.key)
        if limit is not None:
            cost = found.get(path.key)
            ok = cost is not None and cost <= limit
            yield Verdict("hot paths", f"{path.name}: at most {limit:g} µs", ok, _microseconds(cost))
    for call in ("map_dma", "map_buffer"):
        few, many = found.get(f"{call}_16"), found.get(f"{call}_{MOST}")
        times = None if few is None or many is None else many / few
        what = f"{call} + close: among {MOST:,} at most {limits.among:g} times as long as among 16"
        seen = "not measured" if times is None else f"{times:.2f} times"
        yield Verdict("hot paths", what, times is not None and times <= limits.among, seen)


def _microseconds(cost: float | None) -> str:
    return "not there" if cost is None else f"{cost:,.2f} µs"


# ------------------------------------------------------------------------------------------------------ scale, objects


def exponent_on_host(row: ScaleRow) -> float | None:
    """Return the exponent to judge if the clock is the processor time."""
    return exponent_of({n: cost + MISSES for n, cost in row.costs.items()})


def judge_scale(row: ScaleRow, most: int, *, fake: bool, about: str = "scale") -> Verdict:
    """Judge whether n operations cost at most n^EXPONENT, up to n = `most`; on kernels, WALKS has other exponents."""
    exponent, largest = exponent_on_host(row) if fake else row.exponent, max(row.costs)
    limit = EXPONENT if fake else WALKS.get(row.name, EXPONENT)
    seen = "measured at one n only" if exponent is None else f"n^{exponent:.2f}"
    if largest < most:
        seen += f"; not measured beyond n = {largest:,}, which would take too long"
    ok = exponent is not None and exponent <= limit and largest == most
    return Verdict(about, f"{row.name}: at most n^{limit} for n", ok, seen)


def judge_memory(rows: Sequence[MemoryRow]) -> Iterator[Verdict]:
    """Judge the bytes for one of many things."""
    for row in rows:
        limit = OBJECTS.get(row.name)
        if limit is not None:
            yield Verdict(
                "objects", f"{row.name}: at most {limit:,} bytes", row.size <= limit, f"{row.size:,.0f} bytes"
            )


def judge_import(cost: ImportCost) -> Verdict:
    """Judge the time of the import, relative to the yardstick."""
    seen = f"{cost.ratio:.2f} times; {cost.pyvfio:.3f} s beside {cost.yardstick:.3f} s"
    what = f"import pyvfio and its first name: at most {IMPORT:g} times the yardstick"
    return Verdict("import", what, cost.ratio <= IMPORT, seen)
