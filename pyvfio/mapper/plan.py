"""The needs of a set of RAM blocks, computed before any change: mappings, locked memory, IOVA, and approximate time.

`rehearse` goes through the blocks as a `DmaMapper` would, and collects the errors that the mapper would raise. The
function reads the remaining resources of the space and the kernel, and changes neither.

The limits are `dma_entry_limit`, one entry for each mapping, and RLIMIT_MEMLOCK, every mapped page charged to the
process or, by iommufd, to the user (`AddressSpace.counts_by`). Source:
`vfio_dma_do_map` and `vfio_pin_pages_remote` in drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pyvfio.blocks.block import RamBlock
from pyvfio.errors import EntryLimitError, IoctlError, VfioError
from pyvfio.extents import Extent, total
from pyvfio.iommu.iova import IovaAllocator
from pyvfio.iommu.space import AddressSpace, CountsBy
from pyvfio.kernel import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, Kernel, Memlock
from pyvfio.mapper.policy import Policy
from pyvfio.pci.sysfs import printable
from pyvfio.units import MIB, U64_MAX, Iova, IovaRange, align_up, check_whole_number, format_ranges, format_size

if TYPE_CHECKING:
    from pyvfio.picture import Picture

_SAMPLE = 2 * MIB
_MOST_ADDRESS_SPACE = 1 << 47  # TASK_SIZE on x86-64


class BlockShape(NamedTuple):
    """A RAM block to be added later; lengths in bytes. `iova`: the IOVA that the caller will choose, or None."""

    idstr: str
    used_length: int
    max_length: int
    iova: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """The needs of one block.

    `populated`: bytes of `used_length` that are not discarded. `iova`: None if no IOVA is left. `entries`: mappings at
    first. `entries_most`: the most mappings if no further part is discarded; None if that depends on how often the
    block grows.
    """

    idstr: str
    used_length: int
    max_length: int
    populated: int
    iova: Iova | None
    entries: int
    entries_most: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The needs of a set of blocks, compared with the remaining resources. A snapshot; `str()` formats it for people.

    `shortages`: the errors that adding the blocks would raise, with their numbers and hints. `shortages_when_grown`:
    the errors that would follow if all these blocks, and no others, had grown to `max_length`. `seconds`: approximate
    time to map the used memory of all blocks if none of it is populated yet; nan if the measurement failed.

    `counts_by`: whose memory the limit of `memlock` is for, of this process ("process") or of all processes of the user
    ("user", the default of iommufd). By user, `memlock.used` is the part of this address space. The part of other
    spaces and processes is unknown, so that blocks that fit can be refused nevertheless.
    """

    blocks: tuple[PlannedBlock, ...]
    entries_left: int | None
    memlock: Memlock
    iova_ranges: tuple[IovaRange, ...]
    seconds: float
    shortages: tuple[VfioError, ...]
    shortages_when_grown: tuple[VfioError, ...]
    counts_by: CountsBy = "process"

    @property
    def fits(self) -> bool:
        """Whether all blocks can be added."""
        return not self.shortages

    @property
    def entries(self) -> int:
        """The mappings that the blocks need at first."""
        return sum(block.entries for block in self.blocks)

    @property
    def entries_most(self) -> int | None:
        """The most mappings that the blocks can need. None if that depends on how often the blocks grow."""
        most = [block.entries_most for block in self.blocks]
        return None if None in most else sum(count for count in most if count is not None)

    @property
    def locked(self) -> int:
        """The bytes locked for the blocks at first."""
        return sum(block.populated for block in self.blocks)

    @property
    def locked_most(self) -> int:
        """The bytes locked for the blocks when all have grown to `max_length`."""
        return sum(block.max_length for block in self.blocks)

    def picture(self) -> Picture:
        """Return a `Picture` of the planned blocks alone. Blocks for which no IOVA is left are not in it."""
        from pyvfio.picture import Picture, Span  # noqa: PLC0415 (few programs draw)

        spans = [
            Span("planned", block.idstr, block.iova, block.max_length, block.used_length, ())
            for block in self.blocks
            if block.iova is not None
        ]
        spans.sort(key=lambda span: span.iova)
        return Picture(
            f"plan of {len(self.blocks)} block{'s' * (len(self.blocks) != 1)}", self.iova_ranges, tuple(spans), 64
        )

    def _repr_svg_(self) -> str:
        return self.picture().svg()

    def __str__(self) -> str:
        most = "one more for each grow" if self.entries_most is None else f"at most {self.entries_most}"
        lines = [
            f"{printable(block.idstr)}: {format_size(block.used_length)} of {format_size(block.max_length)} at "
            f"{'no IOVA' if block.iova is None else f'IOVA {block.iova:#x}'}"
            for block in self.blocks
        ]
        left = "no limit" if self.entries_left is None else f"{self.entries_left} are left"
        lines += [
            f"mappings: {self.entries}, {most}; {left}",
            f"locked memory: {format_size(self.locked)}, at most {format_size(self.locked_most)}; {self._limit()}",
            f"IOVA: {format_ranges(self.iova_ranges)}",
            f"time: about {_duration(self.seconds)}",
            *(f"does not fit: {error}" for error in self.shortages),
            *(f"would not fit when grown: {error}" for error in self.shortages_when_grown),
        ]
        return "\n".join(lines)

    def _limit(self) -> str:
        used, limit = format_size(self.memlock.used), self.memlock.limit
        free = limit is None or self.memlock.privileged
        allowed = "no limit" if limit is None or free else f"{format_size(limit)} allowed"
        if self.counts_by == "process":
            return f"{used} are locked by this process, {allowed}"
        return f"{used} by this address space, {allowed}" + (
            "" if free else " for all processes of the user together, whose sum is unknown"
        )


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


class Rehearsal:
    """A stand-in for an address space when IOVA is reserved. Begins with the reservations of the space."""

    def __init__(self, space: AddressSpace) -> None:
        self._allocator = IovaAllocator(space.iova_ranges, page_size=space.page_size)
        for taken in space.reserved_iova:
            self._allocator.reserve_at(taken.start, taken.size)

    def reserve_iova(self, size: int, *, alignment: int, offset: int, dma_bits: int) -> Iova:
        """Reserve as `AddressSpace.reserve_iova` does."""
        return self._allocator.reserve(size, alignment=alignment, offset=offset, dma_bits=dma_bits)

    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """Reserve as `AddressSpace.reserve_iova_at` does."""
        return self._allocator.reserve_at(iova, size)


class Budget:
    """The remaining mappings, given out to one block after the other."""

    def __init__(self, left: int | None) -> None:
        self._left = left  # None: no limit

    def take(self, idstr: str, granule: int | None, *, needed: int, max_length: int) -> EntryLimitError | None:
        """Take the mappings of one more block. If too few are left, return an error that names a granule that fits."""
        if self._left is None:
            return None
        left, self._left = max(self._left, 0), self._left - needed
        if needed <= left:
            return None
        error = EntryLimitError(
            errno.ENOSPC,
            f"RAM block '{idstr}' may need {needed} mappings"
            + ("" if granule is None else f" of {format_size(granule)}")
            + f", and {left} are left when all other blocks have theirs",
            request="VFIO_IOMMU_MAP_DMA",
            arguments={"max_length": max_length, **({} if granule is None else {"granule": granule})},
            hint=self._hint(granule, left, max_length),
        )
        error.used, error.limit = needed, left
        return error

    @staticmethod
    def _hint(granule: int | None, left: int, max_length: int) -> str:
        if granule is None or left == 0:
            return "Remove blocks, or raise the module parameter vfio_iommu_type1.dma_entry_limit"
        while -(-max_length // granule) > left:
            granule *= 2
        return f"The smallest granule that would fit is {format_size(granule)}"


def rehearse(
    space: AddressSpace,
    wanted: Sequence[BlockShape | RamBlock],
    policies: Sequence[Policy],
    *,
    promises: bool,
    left: int | None,
    threads: int,
    reserve: Callable[[Rehearsal, BlockShape | RamBlock], Iova],
) -> Plan:
    """Compute the needs of the blocks, each under its policy, with `left` mappings remaining. See `Plan`.

    `left`: None means no limit. `reserve` finds the IOVA of each block. `promises`: whether a block has granules; each
    block is then promised all mappings that the block may need.

    Raises ValueError for lengths that are always invalid. Cost: populates 2 MiB of temporary memory, to measure the
    time.
    """
    _check_all(wanted, policies, space.page_size)
    shortages: list[VfioError] = []
    grown: list[VfioError] = []
    now, later, rehearsal = Budget(left), Budget(left), Rehearsal(space)
    planned = []
    for shape, policy in zip(wanted, policies, strict=True):
        block = _planned(shape, _reserve(reserve, rehearsal, shape, shortages), policy)
        planned.append(block)
        most, length = max(policy.entries(block.max_length), block.entries), block.max_length
        needed = most if promises else block.entries
        _collect(shortages, now.take(block.idstr, policy.granule, needed=needed, max_length=length))
        if not promises:
            _collect(grown, later.take(block.idstr, None, needed=most, max_length=length))
    used, most_locked = sum(block.populated for block in planned), sum(block.max_length for block in planned)
    _collect(shortages, space.pin_shortage(used))
    _collect(grown, space.pin_shortage(most_locked))
    return Plan(
        blocks=tuple(planned),
        entries_left=left,
        memlock=space.memlock(),
        iova_ranges=space.iova_ranges,
        seconds=used / MIB * _seconds_per_mib(space.kernel) / max(1, min(threads, os.cpu_count() or 1)),
        shortages=tuple(shortages),
        shortages_when_grown=tuple(grown),
        counts_by=space.counts_by,
    )


def _collect(errors: list[VfioError], error: VfioError | None) -> None:
    if error is not None:
        errors.append(error)


def _reserve(
    reserve: Callable[[Rehearsal, BlockShape | RamBlock], Iova],
    rehearsal: Rehearsal,
    shape: BlockShape | RamBlock,
    shortages: list[VfioError],
) -> Iova | None:
    if shape.max_length > _MOST_ADDRESS_SPACE:
        error = IoctlError(
            errno.ENOMEM,
            f"{format_size(shape.max_length)} of address space could not be reserved",
            request="mmap",
            arguments={"size": shape.max_length},
            hint="Choose a smaller max_length; a process has 128 TiB at most",
        )
        shortages.append(error)
        return None
    try:
        return reserve(rehearsal, shape)
    except IoctlError as error:
        shortages.append(error)
    return None


def check_shape(shape: BlockShape | RamBlock) -> BlockShape | RamBlock:
    """Return `shape` with lengths as ints. Raises TypeError for other objects than BlockShape and RamBlock."""
    if isinstance(shape, RamBlock):
        return shape
    if not isinstance(shape, BlockShape):
        raise TypeError(f"a plan takes a list of BlockShapes and RamBlocks, not of {type(shape).__name__}")
    idstr, used, maximum, iova = shape
    return BlockShape(
        idstr,
        check_whole_number(used, "used_length"),
        check_whole_number(maximum, "max_length"),
        None if iova is None else check_whole_number(iova, "iova"),
    )


def _check_all(shapes: Sequence[BlockShape | RamBlock], policies: Sequence[Policy], page_size: int) -> None:
    for shape, policy in zip(shapes, policies, strict=True):
        _check(shape, policy, page_size)
    names = Counter(shape.idstr for shape in shapes)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"'{twice[0]}' is planned more than once")


def _check(shape: BlockShape | RamBlock, policy: Policy, page_size: int) -> None:
    used, maximum = shape.used_length, shape.max_length
    if not 0 <= used <= maximum or maximum == 0 or maximum > U64_MAX:
        raise ValueError(
            f"'{shape.idstr}': used_length {used:#x} must be within max_length {maximum:#x}, which must be above 0 and "
            "below 2^64"
        )
    if (used | maximum) % page_size:
        raise ValueError(f"lengths of '{shape.idstr}' must be multiples of {page_size:#x}")
    policy.check_length(used, f"used_length of '{shape.idstr}'")


def _planned(shape: BlockShape | RamBlock, iova: Iova | None, policy: Policy) -> PlannedBlock:
    parts = shape.populated if isinstance(shape, RamBlock) else (Extent(0, shape.used_length),)
    entries = sum(policy.entries(part.size) for part in parts)
    most = None if policy.resize != "remap" and policy.granule is None else policy.entries(shape.max_length)
    return PlannedBlock(
        shape.idstr,
        shape.used_length,
        shape.max_length,
        total(parts),
        iova,
        entries,
        None if most is None else max(most, entries),
    )


def _seconds_per_mib(kernel: Kernel) -> float:
    """Measure the time to populate memory on this machine: most of a first map, as zeroing outweighs pinning."""
    size = 2 * _SAMPLE
    try:
        whole = kernel.mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS)
    except OSError:
        return math.nan
    try:
        start = time.perf_counter()
        ctypes.memset(align_up(whole, _SAMPLE), 0, _SAMPLE)
        return (time.perf_counter() - start) / (_SAMPLE / MIB)
    finally:
        with suppress(OSError):
            kernel.munmap(whole, size)
