"""What a set of RAM blocks will need of an address space, before anything is touched: mappings, locked memory, IOVA,
and roughly which time.

`rehearse` goes through the blocks as a `DmaMapper` would and collects what that would raise. It asks the space and the
kernel what is left, and changes nothing in either.

Source: the limits are `dma_entry_limit` and RLIMIT_MEMLOCK, as `vfio_dma_do_map` and `vfio_pin_pages_remote` in
drivers/vfio/vfio_iommu_type1.c count them: one entry a mapping, every mapped page charged.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from pyvfio.blocks.block import RamBlock
from pyvfio.errors import EntryLimitError, IoctlError, PinLimitError, VfioError
from pyvfio.extents import Extent, total
from pyvfio.iommu.iova import IovaAllocator
from pyvfio.iommu.space import AddressSpace
from pyvfio.kernel import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, Kernel, Memlock
from pyvfio.mapper.policy import Policy
from pyvfio.memory import locking
from pyvfio.units import MIB, U64_MAX, Iova, IovaRange, align_up, check_whole_number, format_ranges, format_size

_SAMPLE = 2 * MIB
_MOST_ADDRESS_SPACE = 1 << 47  # TASK_SIZE on x86-64


class BlockShape(NamedTuple):
    """A RAM block that is to come; lengths in bytes. `iova`: where the caller will place it, if anywhere."""

    idstr: str
    used_length: int
    max_length: int
    iova: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedBlock:
    """What one block will need. `populated`: bytes of `used_length` that are not discarded. `iova` is None where no
    IOVA is left for it; `entries` are mappings at first, `entries_most` at most if nothing more is discarded, None
    where that depends on how often the block grows."""

    idstr: str
    used_length: int
    max_length: int
    populated: int
    iova: Iova | None
    entries: int
    entries_most: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a set of blocks will need, against what there is. A snapshot; `str()` of it is for people.

    `shortages` are the errors that adding the blocks would raise, with their numbers and hints, and
    `shortages_when_grown` those that would come when all of these had grown to `max_length`, and no others. `seconds`:
    roughly, to map what is used of all, where none of it is populated yet; nan where that could not be tried.
    """

    blocks: tuple[PlannedBlock, ...]
    entries_left: int
    memlock: Memlock
    iova_ranges: tuple[IovaRange, ...]
    seconds: float
    shortages: tuple[VfioError, ...]
    shortages_when_grown: tuple[VfioError, ...]

    @property
    def fits(self) -> bool:
        """Whether all blocks can be added."""
        return not self.shortages

    @property
    def entries(self) -> int:
        """Mappings that the blocks take at first."""
        return sum(block.entries for block in self.blocks)

    @property
    def entries_most(self) -> int | None:
        """Mappings that they take at most; None where that depends on how often they grow."""
        most = [block.entries_most for block in self.blocks]
        return None if None in most else sum(count for count in most if count is not None)

    @property
    def locked(self) -> int:
        """Bytes that are locked for them at first."""
        return sum(block.populated for block in self.blocks)

    @property
    def locked_most(self) -> int:
        """Bytes that are locked for them when all have grown to `max_length`."""
        return sum(block.max_length for block in self.blocks)

    def __str__(self) -> str:
        most = "as many as they grow in" if self.entries_most is None else self.entries_most
        limit = self.memlock.limit
        allowed = "no limit" if limit is None or self.memlock.privileged else f"{format_size(limit)} allowed"
        lines = [
            f"{block.idstr}: {format_size(block.used_length)} of {format_size(block.max_length)} at "
            f"{'no IOVA' if block.iova is None else f'IOVA {block.iova:#x}'}"
            for block in self.blocks
        ]
        lines += [
            f"mappings: {self.entries}, at most {most}; {self.entries_left} are left",
            f"locked memory: {format_size(self.locked)}, at most {format_size(self.locked_most)}; "
            f"{format_size(self.memlock.used)} are locked, {allowed}",
            f"IOVA: {format_ranges(self.iova_ranges)}",
            f"time: some {self.seconds:,.3f} s",
            *(f"does not fit: {error}" for error in self.shortages),
            *(f"would not fit when grown: {error}" for error in self.shortages_when_grown),
        ]
        return "\n".join(lines)


class Rehearsal:
    """Stands in for an address space when IOVA is reserved: what is taken there is taken here, and nothing more."""

    def __init__(self, space: AddressSpace) -> None:
        self._allocator = IovaAllocator(space.iova_ranges, page_size=space.page_size)
        for taken in space.reserved_iova:
            self._allocator.reserve_at(taken.start, taken.size)

    def reserve_iova(self, size: int, *, alignment: int, offset: int, dma_bits: int) -> Iova:
        """As `AddressSpace.reserve_iova`."""
        return self._allocator.reserve(size, alignment=alignment, offset=offset, dma_bits=dma_bits)

    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """As `AddressSpace.reserve_iova_at`."""
        return self._allocator.reserve_at(iova, size)


class Budget:
    """The mappings that are left, and who may need how many of them."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, idstr: str, granule: int | None, *, needed: int, max_length: int) -> EntryLimitError | None:
        """Have them for one more block; the error where there are too few, with the granule that would fit."""
        left, self._left = max(self._left, 0), self._left - needed
        if needed <= left:
            return None
        error = EntryLimitError(
            errno.ENOSPC,
            f"RAM block '{idstr}' may need {needed} mappings"
            + ("" if granule is None else f" of {format_size(granule)}")
            + f", and {left} are left when all others have those they may need",
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
    left: int,
    threads: int,
    reserve: Callable[[Rehearsal, BlockShape | RamBlock], Iova],
) -> Plan:
    """What the blocks will need under the policy of each, of `left` mappings; `reserve` finds the IOVA of each. See
    `Plan`. `promises`: whether a block has granules, so that all are promised the mappings that they may need.

    Raises ValueError for lengths that can never be right. Cost: populates 2 MiB of memory of its own, to see how long
    that takes.
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
    memlock = space.kernel.memlock()
    used, most_locked = sum(block.populated for block in planned), sum(block.max_length for block in planned)
    _collect(shortages, _pin_shortage(space.kernel, memlock, used))
    _collect(grown, _pin_shortage(space.kernel, memlock, most_locked))
    return Plan(
        blocks=tuple(planned),
        entries_left=left,
        memlock=memlock,
        iova_ranges=space.iova_ranges,
        seconds=used / MIB * _seconds_per_mib(space.kernel) / max(1, min(threads, os.cpu_count() or 1)),
        shortages=tuple(shortages),
        shortages_when_grown=tuple(grown),
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
    """Return `shape`, with lengths that are ints. TypeError for what is none."""
    if isinstance(shape, RamBlock):
        return shape
    if not isinstance(shape, BlockShape):
        raise TypeError(f"a plan is made of BlockShapes and RamBlocks, in a list, not of {type(shape).__name__}")
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
    names = [shape.idstr for shape in shapes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"'{twice[0]}' is planned more than once")


def _check(shape: BlockShape | RamBlock, policy: Policy, page_size: int) -> None:
    used, maximum = shape.used_length, shape.max_length
    if not 0 <= used <= maximum or maximum == 0 or maximum > U64_MAX:
        raise ValueError(
            f"'{shape.idstr}': used_length {used:#x} must be within max_length {maximum:#x}, which must not be 0, nor "
            "more than an address has bits"
        )
    if (used | maximum) % page_size:
        raise ValueError(f"lengths of '{shape.idstr}' must be multiples of {page_size:#x}")
    policy.check_length(used, f"used_length of '{shape.idstr}'")


def _planned(shape: BlockShape | RamBlock, iova: Iova | None, policy: Policy) -> PlannedBlock:
    parts = shape.populated if isinstance(shape, RamBlock) else (Extent(0, shape.used_length),)
    entries = sum(policy.entries(part.size) for part in parts)
    most = None if policy.resize == "extend" and policy.granule is None else policy.entries(shape.max_length)
    return PlannedBlock(
        shape.idstr,
        shape.used_length,
        shape.max_length,
        total(parts),
        iova,
        entries,
        None if most is None else max(most, entries),
    )


def _pin_shortage(kernel: Kernel, lock: Memlock, size: int) -> PinLimitError | None:
    if locking.suffices(lock, size):
        return None
    refused = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return locking.limit_error(
        refused, lock, size, kernel=kernel, request="VFIO_IOMMU_MAP_DMA", arguments={"size": size}
    )


def _seconds_per_mib(kernel: Kernel) -> float:
    """What populating memory takes on this machine now, which is most of a first map: zeroing outweighs pinning."""
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
