"""The cost of each operation among n things: blocks, pieces, holes, mappings, dirty pages.

A family makes n things and measures several operations on the things. The least of some runs counts. The garbage
collector is off during a run. `tools.fit` derives from the costs how an operation grows with n, on the fake and on a
kernel.
"""

from __future__ import annotations

import array
import ctypes
import gc
import math
import mmap
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeAlias, TypeVar

from pyvfio.container import Container
from pyvfio.dirty import DirtyLog, DirtyTracking
from pyvfio.dma import DmaMapper
from pyvfio.ioas import Ioas
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.units import PAGE_SIZE
from tools.report import ScaleRow

COUNTS = (10, 100, 1000, 10_000)
PATIENCE = 10.0
"""Seconds. If the time of a family, extrapolated to the next n, exceeds this limit, the family is not measured there:
an operation of the family is quadratic, or worse."""
_REPEATED = 2000
_ENOUGH = 0.4
_RUNS = 20
"""A family runs at an n until `_REPEATED` operations have been measured, or `_ENOUGH` seconds have passed, or `_RUNS`
times."""
_TRIES = 6
_SOME = 300
"""The number of operations that are measured if an operation changes nothing."""

_Item = TypeVar("_Item")


class Scene(NamedTuple):
    """The surroundings of a family. `vaddr`: the address of two pages for each of n. `clock` returns seconds."""

    space: Container | Ioas
    vaddr: int
    clock: Callable[[], float]

    def page(self, index: int) -> int:
        """Return the address of a page."""
        return self.vaddr + index * PAGE_SIZE


class Run:
    """One run of a family: the seconds of each operation, and of the run."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.costs: dict[str, float] = {}
        self.seconds = 0.0

    def each(self, name: str, items: Sequence[_Item], call: Callable[[_Item], object]) -> None:
        """Measure the calls, one for each item."""
        start = self._clock()
        for item in items:
            call(item)
        self.costs[name] = (self._clock() - start) / len(items)

    def whole(self, name: str, count: int, call: Callable[[], object]) -> None:
        """Measure one call for `count` things, and note the cost of one thing."""
        start = self._clock()
        call()
        self.costs[name] = (self._clock() - start) / count


def _shuffled(items: Iterable[_Item]) -> list[_Item]:
    """Return the items in a random order that is the same each time."""
    found = list(items)
    random.Random(1).shuffle(found)  # noqa: S311
    return found


def _some(items: Sequence[_Item]) -> list[_Item]:
    """Return `_SOME` items, of which 8 are different: among more, a larger n would miss the caches more often."""
    few = items[:: max(len(items) // 8, 1)]
    return [few[index % len(few)] for index in range(_SOME)]


# ---------------------------------------------------------------------------------------------------------- families


def blocks(scene: Scene, n: int, run: Run) -> None:
    """Measure blocks of one page that a mapper follows."""
    kernel = scene.space.kernel
    with RamBlockList(kernel=kernel) as made, DmaMapper(scene.space, made):
        add = partial(made.add, used_length=PAGE_SIZE, max_length=2 * PAGE_SIZE)
        run.each("add a block", [f"block {index}" for index in range(n)], add)
        found = _shuffled(made)
        run.each("find a block by its name", _some([block.idstr for block in found]), made.__getitem__)
        run.each("find a block by an address", _some([block.vaddr for block in found]), made.block_at)
        run.each("grow a block", found[: max(n // 2, 1)], lambda block: block.resize(2 * PAGE_SIZE))
        run.each("remove a block", found[: max(n // 2, 1)], made.remove)
        run.whole("close a list, each block", len(made), made.close)


def pieces(scene: Scene, n: int, run: Run) -> None:
    """Measure a block of n granules of one page."""
    with _block(scene, n, used=0, granule=PAGE_SIZE) as (block, mapper):
        lengths = range(PAGE_SIZE, (n + 1) * PAGE_SIZE, PAGE_SIZE)
        run.each("grow by a granule", lengths, block.resize)
        with mapper.map_dma(vaddr=block.vaddr, size=PAGE_SIZE):
            run.each("shrink that a mapping refuses", range(min(n, 50)), lambda _: _refused(block))
        run.each("shrink by a granule", lengths[-2::-1], block.resize) if n > 1 else None
        block.resize(0)
    with _block(scene, n, used=0, granule=None) as (block, _mapper):
        run.each("grow by a piece, extend", lengths, block.resize)
        run.each("shrink by a piece, extend", [*lengths[-2::-1], 0], block.resize)


def _refused(block: RamBlock) -> None:
    try:
        block.resize(0)
    except BufferError:
        return
    raise AssertionError("a block shrank below a mapping of a part of it")


@contextmanager
def _block(scene: Scene, pages: int, *, used: int, granule: int | None) -> Iterator[tuple[RamBlock, DmaMapper]]:
    kernel, length = scene.space.kernel, pages * PAGE_SIZE
    with (
        RamBlockList(kernel=kernel) as made,
        DmaMapper(scene.space, made, resize="extend", granule=granule) as mapper,
    ):
        yield made.add("measured", used_length=used * PAGE_SIZE, max_length=length), mapper


def holes(scene: Scene, n: int, run: Run) -> None:
    """Measure a block of 2n granules of which every second one is discarded."""
    with _block(scene, 2 * n, used=2 * n, granule=PAGE_SIZE) as (block, mapper):
        offsets = _shuffled(range(0, 2 * n * PAGE_SIZE, 2 * PAGE_SIZE))
        run.each("discard one part more", offsets, lambda offset: block.discard(offset, PAGE_SIZE))
        run.whole("segments of a block, each", n, lambda: [mapper.segments(block.view(o, PAGE_SIZE)) for o in _odd(n)])
        run.each("populate one part", offsets, lambda offset: block.populate(offset, PAGE_SIZE))


def _odd(n: int) -> range:
    return range(PAGE_SIZE, 2 * n * PAGE_SIZE, 2 * PAGE_SIZE)


def mappings(scene: Scene, n: int, run: Run) -> None:
    """Measure mappings of one page, none next to another."""
    with DmaMapper(scene.space) as mapper:
        add = partial(mapper.map_dma, size=PAGE_SIZE)
        vaddrs = _shuffled(map(scene.page, range(0, 2 * n, 2)))
        held = []
        run.each("map one more", vaddrs, lambda vaddr: held.append(add(vaddr=vaddr)))
        more = [scene.page(1)] * _SOME
        run.each("map and unmap one more", more, lambda vaddr: add(vaddr=vaddr).close())
        wanted = [vaddr + 8 for vaddr in _some(vaddrs)]
        run.each("vaddr to IOVA", wanted, mapper.translate_vaddr)
        iovas = [mapper.translate_iova(mapping.iova) and mapping.iova for mapping in held]
        run.each("IOVA to vaddr", _some(iovas), mapper.translate_iova)
        if hasattr(mapper, "translate_vaddrs"):
            addresses = array.array("Q", vaddrs)
            run.whole("vaddr to IOVA in bulk, each", n, lambda: mapper.translate_vaddrs(addresses))
        run.each("close a mapping", _shuffled(held), lambda mapping: mapping.close())
        for vaddr in vaddrs:
            add(vaddr=vaddr)
        run.whole("close a mapper, each mapping", n, mapper.close)


def temporaries(scene: Scene, n: int, run: Run) -> None:
    """Measure temporary mappings, all unmapped by one reset."""
    pages = [(ctypes.c_char * PAGE_SIZE).from_address(scene.page(index)) for index in range(n)]
    with DmaMapper(scene.space) as mapper:
        run.each("map_temporary + close", pages, lambda page: mapper.map_temporary(page).close())
        run.whole("reset_temporary, each mapping", n, mapper.reset_temporary)


def iova_holes(scene: Scene, n: int, run: Run) -> None:
    """Measure IOVA of which every second page is free, and one more mapping of two pages."""
    space = scene.space
    reserve = partial(space.reserve_iova, PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
    taken = [reserve() for _ in range(2 * n)]
    run.each("release IOVA", _shuffled(taken[::2]), space.release_iova)
    longer = partial(space.reserve_iova, 2 * PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
    run.each("IOVA for two pages among holes", range(_SOME), lambda _: space.release_iova(longer()))
    run.each("IOVA of a hole", range(n), lambda _: reserve())
    for reserved in space.reserved_iova:
        space.release_iova(reserved.start)


def dirty(scene: Scene, n: int, run: Run) -> None:
    """Measure dirty pages: of a container, and in a log of a block."""
    space, size = scene.space, n * PAGE_SIZE
    if isinstance(space, Container):
        _tracked(scene, space, n, run)
    with RamBlockList(kernel=space.kernel) as made, DirtyLog(made) as log:
        block = made.add("measured", used_length=2 * size, max_length=2 * size)
        log.snapshot(block, clear=True)
        offsets = _shuffled(range(0, 2 * size, 2 * PAGE_SIZE))
        run.each("mark one page more", offsets, lambda offset: log.mark(block, offset, 1))
        run.whole("snapshot of a log, each part", n, lambda: log.snapshot(block))


def _tracked(scene: Scene, container: Container, n: int, run: Run) -> None:
    """Measure dirty pages in n mappings of one page, and in one mapping of n pages."""
    size = n * PAGE_SIZE
    with DmaMapper(container) as mapper, DirtyTracking(container) as tracking:
        held = [mapper.map_dma(vaddr=scene.page(index), size=PAGE_SIZE) for index in range(n)]
        first, last = held[0].iova, held[-1].iova
        run.whole("read dirty pages, each mapping", n, lambda: tracking.read(iova=first, size=last - first + PAGE_SIZE))
    with DmaMapper(container) as mapper, DirtyTracking(container) as tracking:
        one = mapper.map_dma(vaddr=scene.vaddr, size=size)
        run.whole("read dirty pages, each page", n, lambda: tracking.read(iova=one.iova, size=size))


_Family: TypeAlias = Callable[[Scene, int, Run], None]

FAMILIES: Sequence[_Family] = (blocks, pieces, holes, mappings, temporaries, iova_holes, dirty)


GROUPS: Mapping[str, Sequence[str]] = {
    "blocks": (
        "add a block",
        "find a block by its name",
        "find a block by an address",
        "grow a block",
        "remove a block",
        "close a list, each block",
    ),
    "pieces": (
        "grow by a granule",
        "shrink that a mapping refuses",
        "shrink by a granule",
        "grow by a piece, extend",
        "shrink by a piece, extend",
    ),
    "holes": ("discard one part more", "segments of a block, each", "populate one part"),
    "mappings": ("map one more", "map and unmap one more", "close a mapping", "close a mapper, each mapping"),
    "temporary mappings": ("map_temporary + close", "reset_temporary, each mapping"),
    "translation": ("vaddr to IOVA", "IOVA to vaddr", "vaddr to IOVA in bulk, each"),
    "IOVA": ("release IOVA", "IOVA for two pages among holes", "IOVA of a hole"),
    "dirty pages": (
        "read dirty pages, each mapping",
        "read dirty pages, each page",
        "mark one page more",
        "snapshot of a log, each part",
    ),
}
"""The operations of each picture."""


# --------------------------------------------------------------------------------------------------------- measuring


def measure(
    space: Container | Ioas,
    clock: Callable[[], float],
    *,
    counts: Sequence[int] = COUNTS,
    families: Sequence[_Family] = FAMILIES,
    done: Callable[[int], object] = lambda _more: None,
    doubtful: Callable[[ScaleRow], bool] = lambda _row: False,
) -> list[ScaleRow]:
    """Measure every family at each n. `done` is called with 1 after each family.

    Families with a `doubtful` row are measured again after all others, up to `_TRIES` times. Other work of the machine
    makes costs larger, never smaller, and lasts: so the tries are spread over the measurement, and the least counts.
    """
    memory = mmap.mmap(-1, 2 * max(counts) * PAGE_SIZE)
    first = ctypes.c_char.from_buffer(memory)
    scene = Scene(space, ctypes.addressof(first), clock)
    ctypes.memset(scene.vaddr, 1, len(memory))
    found: list[list[ScaleRow]] = []
    for family in families:
        found.append(_measure_family(family, scene, sorted(counts)))
        done(1)
    for _ in range(_TRIES - 1):
        for number, family in enumerate(families):
            if any(map(doubtful, found[number])):
                found[number] = _least(found[number], _measure_family(family, scene, sorted(counts)))
    gc.unfreeze()
    del first
    memory.close()
    return [row for rows in found for row in rows]


def _least(rows: Sequence[ScaleRow], again: Sequence[ScaleRow]) -> list[ScaleRow]:
    """Return the least of two measurements at each n."""
    others = {row.name: row.costs for row in again}
    return [
        ScaleRow(row.name, {n: min(cost, others[row.name].get(n, cost)) for n, cost in row.costs.items()})
        for row in rows
    ]


def _measure_family(family: _Family, scene: Scene, counts: Sequence[int]) -> list[ScaleRow]:
    found: dict[str, dict[int, float]] = {}
    taken: dict[int, float] = {}
    gc.freeze()  # a collection visits the objects of this family, and not all calls in the trace of a fake
    for n in counts:
        if _expected(taken, n) <= PATIENCE:
            runs = _runs(family, scene, n)
            taken[n] = min(run.seconds for run in runs)
            for name in runs[0].costs:
                found.setdefault(name, {})[n] = min(run.costs[name] for run in runs) * 1e6
    return [ScaleRow(name, costs) for name, costs in found.items()]


def _runs(family: _Family, scene: Scene, n: int) -> list[Run]:
    runs: list[Run] = []
    most = min(_RUNS, -(-_REPEATED // n))
    while not runs or (len(runs) < most and sum(run.seconds for run in runs) < _ENOUGH):
        runs.append(Run(scene.clock))
        _run(family, scene, n, runs[-1])
    return runs


def _expected(taken: Mapping[int, float], n: int) -> float:
    """Return the seconds that a family will take at n, extrapolated from smaller n."""
    if len(taken) < 2:
        return 0.0
    (before, least), (last, most) = sorted(taken.items())[-2:]
    growth = math.log(most / least) / math.log(last / before)
    return most * math.exp(growth * math.log(n / last))


def _run(family: _Family, scene: Scene, n: int, run: Run) -> None:
    gc.collect()
    gc.disable()
    start = scene.clock()
    try:
        family(scene, n, run)
    finally:
        gc.enable()
    run.seconds = scene.clock() - start
