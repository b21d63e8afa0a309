"""The cost of a block of n granules of one page, in a space whose number of mappings has no limit.

One resize maps n granules, and another unmaps them. Then one more granule is mapped, and looked up, among n. Before a
grow, the memory is populated, and the time for this is not part of a figure.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyvfio.dma import DmaMapper
from pyvfio.iommu.space import AddressSpace
from pyvfio.kernel import MADV_POPULATE_WRITE, Kernel
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.units import PAGE_SIZE
from tools.memory_cost import counted
from tools.report import MemoryRow, ScaleRow

COUNTS = (2000, 20_000, 200_000)
"""The numbers of granules. Type1 accepts 65,535 mappings."""
TRACED = 20_000
"""The most granules while Python objects are traced, which takes three times as long."""
MORE = 50
"""The operations on one more granule, of which the mean counts."""
OBJECTS = "a granule of a block"
"""The name of the row with the bytes of Python objects."""
KERNEL = "a granule of a block, in the kernel, without page tables"
"""The name of the row with the bytes in the kernel, which a fake does not have."""


class _Populate:
    """Populates new memory in a block, and sums up the time."""

    def __init__(self, kernel: Kernel, clock: Callable[[], float]) -> None:
        self._kernel, self._clock = kernel, clock
        self.seconds = 0.0

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        start = self._clock()
        if new_length > old_length:
            self._kernel.madvise(block.vaddr + old_length, new_length - old_length, MADV_POPULATE_WRITE)
        self.seconds += self._clock() - start


def measure(
    space: AddressSpace, clock: Callable[[], float], *, counts: Sequence[int] = COUNTS, fake: bool
) -> tuple[list[ScaleRow], list[MemoryRow]]:
    """Return the microseconds of one granule at each n, and the bytes of one granule among many.

    `clock` returns seconds. On a fake nothing is populated, since a fake pins no page.
    """
    found: dict[str, dict[int, float]] = {}
    in_kernel = 0.0
    for n in sorted(counts):
        costs, in_kernel = _costs(space, clock, n, fake=fake)
        for name, seconds in costs.items():
            found.setdefault(name, {})[n] = seconds * 1e6
    rows = [MemoryRow(OBJECTS, _objects(space, min(max(counts), TRACED)))]
    if not fake:
        rows.append(MemoryRow(KERNEL, in_kernel))
    return [ScaleRow(name, costs) for name, costs in found.items()], rows


def _costs(space: AddressSpace, clock: Callable[[], float], n: int, *, fake: bool) -> tuple[dict[str, float], float]:
    """Return the seconds of each operation on one granule, and the bytes of the kernel for one granule."""
    populate = _Populate(space.kernel, clock)
    costs: dict[str, float] = {}

    def spend(name: str, count: int, call: Callable[[], object]) -> None:
        start, populate.seconds = clock(), 0.0
        call()
        costs[name] = (clock() - start - populate.seconds) / count

    with _block(space, n + MORE) as (blocks, mapper, block):
        if not fake:
            blocks.add_notifier(populate)
        lengths = [(n + more) * PAGE_SIZE for more in range(1, MORE + 1)]
        block.resize(PAGE_SIZE)  # the first grow loads code and data
        before = _slab()
        spend("grow by n granules in one resize, each", n - 1, lambda: block.resize(n * PAGE_SIZE))
        in_kernel = (_slab() - before) / (n - 1)
        spend("grow by one more granule", MORE, lambda: _resize_to(block, lengths))
        last = block.vaddr + block.used_length - 8
        spend("vaddr to IOVA", MORE, lambda: [mapper.translate_vaddr(last) for _ in range(MORE)])
        shorter = [length - PAGE_SIZE for length in reversed(lengths)]
        spend("shrink by one granule", MORE, lambda: _resize_to(block, shorter))
        spend("shrink by n granules in one resize, each", n, lambda: block.resize(0))
    return costs, in_kernel


def _resize_to(block: RamBlock, lengths: Sequence[int]) -> None:
    for length in lengths:
        block.resize(length)


@contextmanager
def _block(space: AddressSpace, pages: int) -> Iterator[tuple[RamBlockList, DmaMapper, RamBlock]]:
    gc.collect()
    gc.disable()
    try:
        with (
            RamBlockList(kernel=space.kernel) as blocks,
            DmaMapper(space, blocks, resize="extend", granule=PAGE_SIZE) as mapper,
        ):
            yield blocks, mapper, blocks.add("measured", used_length=0, max_length=pages * PAGE_SIZE)
    finally:
        gc.enable()


def _objects(space: AddressSpace, n: int) -> float:
    """Return the bytes of Python objects for one of n granules."""
    with _block(space, n) as (_blocks, _mapper, block):
        tracemalloc.start(2)
        try:
            block.resize(n * PAGE_SIZE)
            gc.collect()
            return counted(tracemalloc.take_snapshot()) / n
        finally:
            tracemalloc.stop()


def _slab() -> int:
    """Return the bytes of the kernel's objects that cannot be reclaimed."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("SUnreclaim:"))
