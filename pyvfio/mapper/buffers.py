"""Buffers of the caller's own: mapped for as long as the caller wants, or for one transfer.

A `BufferMapper` maps them into an `AddressSpace` at an IOVA that it finds, and knows which memory it has mapped. Memory
that is mapped already is not mapped again: the new `DmaMapping` holds the mapping that is there, which stays until the
last holder is closed. A derived class adds other memory that is mapped, such as RAM blocks.

Source: `qemu_vfio_dma_map` in QEMU's util/vfio-helpers.c, which has fixed and temporary mappings, too. There a
temporary mapping has no place of its own in the table, and goes with `qemu_vfio_dma_reset_temporary`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol, SupportsIndex

from pyvfio.errors import ClosedError, IoctlError, IovaOverlapError, VfioError
from pyvfio.guard import ContextManager, Guard, closing_in_hooks, guarded, making, reading
from pyvfio.handle import attempt_all
from pyvfio.iommu.iova import check_dma_bits
from pyvfio.iommu.space import AddressSpace
from pyvfio.mapper.segments import Limits, Segment, check_part, cut, join
from pyvfio.mapper.window import READ, WRITE, Window
from pyvfio.units import MIB, U64_MAX, Iova, Vaddr, check_whole_number

if TYPE_CHECKING:  # collections.abc has it from 3.12 on
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)

_vaddr = attrgetter("vaddr")  # half the cost of a function in Python

LARGE_PAGE = 2 * MIB
"""IOVA is congruent to vaddr modulo this, so that the IOMMU can use large pages where the memory does."""


class Reserve(Protocol):
    """Finds a place for `size` bytes of IOVA, as `AddressSpace.reserve_iova` does."""

    def __call__(self, size: int, *, alignment: int, offset: int, dma_bits: int) -> Iova: ...


class OwnMemory:
    """Memory of the caller's own that the mapper has mapped, and how many open mappings hold it.

    `view` keeps the buffer exported; it is None where the caller keeps the memory alive. `access`: READ and WRITE.
    `ended`: whether it was unmapped whoever held it.
    """

    __slots__ = ("access", "ended", "holders", "iova", "size", "vaddr", "view")

    def __init__(self, *, vaddr: Vaddr, iova: Iova, size: int, access: int, view: memoryview | None) -> None:
        self.vaddr = vaddr
        self.iova = iova
        self.size = size
        self.access = access
        self.view = view
        self.holders = 0
        self.ended = False

    def hold(self, holder: object) -> None:
        """Count one more holder."""
        del holder
        self.holders += 1

    def let_go(self, holder: object) -> None:
        """Count one holder less. Nothing happens where the mapper has dropped all."""
        del holder
        if self.holders:
            self.holders -= 1

    def reached_until(self, vaddr: int) -> int:
        """Return the end, exclusive, of the bytes that are mapped from `vaddr` on, which is one of them."""
        del vaddr
        return self.vaddr + self.size

    def release(self) -> None:
        """Let go of the buffer: the kernel has unmapped it."""
        if self.view is not None:
            self.view.release()
            self.view = None

    def __repr__(self) -> str:
        return f"<mapped memory vaddr={self.vaddr:#x} iova={self.iova:#x} size={self.size:#x} holders={self.holders}>"


class DmaMapping(ContextManager):
    """Memory of the caller's own that the device can reach: `size` bytes at `vaddr`, at `iova` for the device.

    Made by `map_dma`, `map_buffer` and `map_temporary`; a context manager. A buffer stays exported, so that it cannot
    be freed or resized, until the kernel has unmapped it. Where the memory was mapped already, this mapping holds the
    one that is there: a buffer stays mapped as a whole, and a block cannot lose the part, until the last is closed.

    Synchronization: any thread may close it, and so may a finalizer and a notifier's hook.
    """

    __slots__ = ("_mapper", "_memory", "_view", "guard", "iova", "size", "vaddr")

    def __init__(
        self, mapper: BufferMapper, memory: OwnMemory | Window, *, vaddr: int, size: int, view: memoryview | None
    ) -> None:
        self.guard = mapper.guard
        self._mapper: BufferMapper | None = mapper  # None once closed
        self._memory = memory
        self._view = view  # of a part of memory that has no view of its own
        self.vaddr = Vaddr(vaddr)
        self.iova = Iova(memory.iova + vaddr - memory.vaddr)
        self.size = size
        memory.hold(self)

    @closing_in_hooks
    def close(self) -> None:
        """Unmap the memory, unless another open mapping holds it. Twice is fine.

        The kernel's mapping of a temporary one stays until `reset_temporary()`. Raises UnmapSizeError or IoctlError;
        the memory is then still mapped, and `close` may be called again.
        """
        if self._mapper is not None:
            self._mapper.let_go(self, self._memory)
            self._mapper = None
            if self._view is not None:
                self._view.release()

    @property
    def closed(self) -> bool:
        """Whether it has been closed, or has ended because the BAR that it maps has gone. The kernel's mapping of a
        temporary one stays until `reset_temporary()`."""
        return self._mapper is None or (isinstance(self._memory, OwnMemory) and self._memory.ended)

    def check_made_by(self, mapper: BufferMapper) -> None:
        """Raise ClosedError when it is closed, ValueError when another mapper has made it. For the library."""
        if self.closed:
            raise ClosedError(f"{self!r} has been closed")
        if self._mapper is not mapper:
            raise ValueError(f"another mapper has made {self!r}")

    def __repr__(self) -> str:
        closed = " closed" if self.closed else ""
        return f"<DmaMapping vaddr={self.vaddr:#x} iova={self.iova:#x} size={self.size:#x}{closed}>"


class BufferMapper:
    """Maps buffers of the caller's own into `space`. `DmaMapper` is one that follows RAM blocks, too.

    `dma_bits`: IOVAs that it chooses lie below 2^`dma_bits`; None: the limit of `space`.

    Synchronization: every method may be called from any thread.
    """

    def __init__(self, space: AddressSpace, *, dma_bits: int | None = None) -> None:
        if not hasattr(space, "reserve_iova"):
            raise TypeError(f"space must be an AddressSpace, such as device.container, not {type(space).__name__}")
        self.guard = Guard("this DmaMapper")
        self._space = space
        self.dma_bits = space.dma_bits if dma_bits is None else check_dma_bits(dma_bits)
        """How many address bits the device has: IOVAs that the mapper chooses lie below 2^`dma_bits`."""
        self._fixed: list[OwnMemory] = []  # of map_dma and map_buffer, sorted by vaddr
        self._temporary: dict[Iova, OwnMemory] = {}  # without a holder: given up
        self._closed = False

    def __del__(self) -> None:
        known = self.__dict__
        mapped = (*known.get("_fixed", ()), *known.get("_temporary", {}).values())
        left = [memory for memory in mapped if memory.view is not None]
        if not left or self._closed or self.guard.forked:
            return
        # The kernel has it mapped, and nobody is left who could unmap it before the space is closed.
        self._space.keep(left)
        warnings.warn(f"{self!r} was never closed: its memory stays mapped", ResourceWarning, stacklevel=2, source=self)

    @property
    def space(self) -> AddressSpace:
        """Where it maps."""
        return self._space

    # ------------------------------------------------------------------------------------------------ fixed mappings

    def map_dma(
        self,
        *,
        vaddr: SupportsIndex,
        size: SupportsIndex,
        iova: SupportsIndex | None = None,
        read: bool = True,
        write: bool = True,
    ) -> DmaMapping:
        """Let the device reach `[vaddr, vaddr + size)`, both multiples of the IOMMU's smallest page.

        Memory that is wholly mapped already (part of a block, say) is not mapped again: the result has the IOVA that is
        there, and holds that mapping until it is closed. `iova`: the caller's own choice. The caller keeps the memory
        alive until the last mapping of it is closed; `map_buffer` sees to that itself.

        Raises ValueError (misaligned; overlaps mapped memory, or the reserved tail of a block, which would get a
        second IOVA when it grows; is mapped already, but for less access), IovaRangeError, IovaOverlapError,
        PinLimitError, EntryLimitError, IoctlError; VfioError where the space has lost its mappings.
        """
        vaddr, size = check_whole_number(vaddr, "vaddr"), check_whole_number(size, "size")
        return self._map_address(vaddr, size, iova, _access(read=read, write=write))

    @making(DmaMapping.close)
    def _map_address(self, vaddr: int, size: int, iova: SupportsIndex | None, access: int) -> DmaMapping:
        return self._map_fixed(vaddr, size, iova, access, None)

    def map_buffer(
        self,
        buffer: Buffer,
        *,
        iova: SupportsIndex | None = None,
        read: bool = True,
        write: bool = True,
    ) -> DmaMapping:
        """Let the device reach a writable buffer (mmap.mmap, memoryview, numpy array, ctypes array) as `map_dma` does.

        The buffer must begin and end at a page. It stays exported until the last mapping of it is closed, so it can be
        neither freed nor resized. A view of a RAM block is released at once: the block itself keeps the part.
        """
        return self._map_exported(buffer, iova, _access(read=read, write=write))

    @making(DmaMapping.close)
    def _map_exported(self, buffer: Buffer, iova: SupportsIndex | None, access: int) -> DmaMapping:
        view, vaddr = _export(buffer)
        try:
            return self._map_fixed(vaddr, view.nbytes, iova, access, view)
        except BaseException:
            view.release()
            raise

    def _map_fixed(
        self, vaddr: int, size: int, iova: SupportsIndex | None, access: int, view: memoryview | None
    ) -> DmaMapping:
        wanted = None if iova is None else check_whole_number(iova, "iova")
        self._check_extent(vaddr, size)
        self.check_open()
        known = self._known(vaddr, size, wanted, access)
        if known is not None:
            return self._hold(known, vaddr, size, view)
        memory = self._map(vaddr, size, wanted, access, view)
        self._fixed.insert(bisect_right(self._fixed, vaddr, key=_vaddr), memory)
        return DmaMapping(self, memory, vaddr=vaddr, size=size, view=None)

    def _hold(self, memory: OwnMemory | Window, vaddr: int, size: int, view: memoryview | None) -> DmaMapping:
        """Hold memory that is mapped already. Its own view, or the block, keeps it there; else `view` does."""
        if view is not None and (isinstance(memory, Window) or memory.view is not None):
            view.release()
            view = None
        return DmaMapping(self, memory, vaddr=vaddr, size=size, view=view)

    def _known(self, vaddr: int, size: int, iova: int | None, access: int) -> OwnMemory | Window | None:
        """Find memory that is mapped whole; ValueError where it is mapped in part, or would be later."""
        memory = self._find_mapped(vaddr, size)
        if memory is None:
            self._check_apart(vaddr, size)
            return None
        found = memory.iova + vaddr - memory.vaddr
        _check_place(found, vaddr, iova)
        if access & ~memory.access:
            raise _less_access(found)
        return memory

    def _find_mapped(self, vaddr: int, size: int) -> OwnMemory | Window | None:
        """As `_find`, for one more holder: of memory that another user of the space has unmapped there is none."""
        memory = self._find(vaddr, size)
        return None if isinstance(memory, OwnMemory) and not self._is_mapped(memory) else memory

    def _find(self, vaddr: int, size: int) -> OwnMemory | Window | None:
        """Find memory that is mapped whole, temporary mappings aside."""
        position = bisect_right(self._fixed, vaddr, key=_vaddr) - 1
        if position < 0 or vaddr + size > self._fixed[position].vaddr + self._fixed[position].size:
            return None
        return self._fixed[position]

    def _check_apart(self, vaddr: int, size: int) -> None:
        """ValueError where any of it is mapped."""
        self._check_no_block(vaddr, size)
        position = bisect_right(self._fixed, vaddr + size - 1, key=_vaddr) - 1
        if position >= 0 and self._fixed[position].vaddr + self._fixed[position].size > vaddr:
            known = self._fixed[position]
            lost = "" if self._is_mapped(known) else ", which somebody else has unmapped; close its DmaMapping first"
            raise ValueError(f"vaddr {vaddr:#x}-{vaddr + size - 1:#x} overlaps {known!r}{lost}")

    def _check_no_block(self, vaddr: int, size: int) -> None:
        """ValueError where any of it is a block's; here there are none."""

    def let_go(self, mapping: DmaMapping, memory: OwnMemory | Window) -> None:
        """Let go of memory that `mapping` holds, and unmap it where that was the last holder. For DmaMapping.close."""
        if isinstance(memory, OwnMemory) and memory.holders == 1:
            self._unmap(memory)
        memory.let_go(mapping)

    def _unmap(self, memory: OwnMemory) -> None:
        position = bisect_right(self._fixed, memory.vaddr, key=_vaddr) - 1
        if position < 0 or self._fixed[position] is not memory:
            return  # temporary, or unmapped with the mapper
        self._space.unmap_and_release(iova=memory.iova, size=memory.size, vaddr=memory.vaddr)
        del self._fixed[position]
        memory.release()

    def _is_mapped(self, memory: OwnMemory) -> bool:
        """Whether the space still maps it: another user of the space may have unmapped it."""
        return self._space.mapping_at(memory.iova) == (memory.iova, memory.size, memory.vaddr)

    # -------------------------------------------------------------------------------------------- temporary mappings

    def map_temporary(
        self, buffer: Buffer, *, iova: SupportsIndex | None = None, read: bool = True, write: bool = True
    ) -> DmaMapping:
        """Map a buffer for one transfer, at an IOVA from the top (2^`dma_bits`) down, so that it does not come between
        blocks.

        `iova`: the caller's own choice, also above the top.

        The kernel's mapping, the device's reach and the export of the buffer outlive `close`. They end with
        `reset_temporary`, or with a later map that finds mappings, memory to lock or IOVA used up, or the caller's own
        IOVA taken by them: that resets, and tries once more. Memory of a block, or of a fixed mapping, is mapped
        already: the result has the IOVA that is there, holds it until `close`, and leaves nothing behind. Raises as
        `map_buffer`.
        """
        return self._map_for_once(buffer, iova, _access(read=read, write=write))

    @making(DmaMapping.close)
    def _map_for_once(self, buffer: Buffer, iova: SupportsIndex | None, access: int) -> DmaMapping:
        view, vaddr = _export(buffer)
        try:
            return self._map_once(vaddr, view.nbytes, iova, access, view)
        except BaseException:
            view.release()
            raise

    def _map_once(self, vaddr: int, size: int, iova: SupportsIndex | None, access: int, view: memoryview) -> DmaMapping:
        wanted = None if iova is None else check_whole_number(iova, "iova")
        self._check_extent(vaddr, size)
        self.check_open()
        known = self._find_mapped(vaddr, size)
        if known is None:
            self._check_no_block(vaddr, size)
        elif not access & ~known.access:
            _check_place(known.iova + vaddr - known.vaddr, vaddr, wanted)
            return self._hold(known, vaddr, size, view)
        elif isinstance(known, Window):
            raise _less_access(known.iova + vaddr - known.vaddr)
        memory = self._map(vaddr, size, wanted, access, view, top_down=True)
        self._temporary[memory.iova] = memory
        return DmaMapping(self, memory, vaddr=vaddr, size=size, view=None)

    @guarded
    def reset_temporary(self) -> int:
        """Unmap all temporary mappings that have been closed. Return how many are still open, and stay.

        Raises UnmapSizeError or IoctlError; mappings that have not been unmapped stay known. Cost: one unmap for each
        run of neighbours.
        """
        given_up = sorted(iova for iova, memory in self._temporary.items() if not memory.holders)
        while given_up:
            self._unmap_run(self._take_run(given_up))
        return len(self._temporary)

    def _take_run(self, given_up: list[Iova]) -> list[OwnMemory]:
        run = [self._temporary[given_up.pop()]]
        while given_up and self._temporary[given_up[-1]].size + given_up[-1] == run[-1].iova:
            run.append(self._temporary[given_up.pop()])
        return run

    def _unmap_run(self, run: Sequence[OwnMemory]) -> None:
        if all(map(self._is_mapped, run)):
            self._space.unmap(iova=run[-1].iova, size=sum(memory.size for memory in run))
        else:
            for memory in filter(self._is_mapped, run):
                self._space.unmap(iova=memory.iova, size=memory.size)
        for memory in run:
            del self._temporary[memory.iova]
            self._space.release_iova(memory.iova)
            memory.release()

    # ------------------------------------------------------------------------------------------------ look-ups

    @reading
    def translate_vaddr(self, vaddr: SupportsIndex, size: SupportsIndex = 1) -> Iova:
        """Return the IOVA of `[vaddr, vaddr + size)`, all of which one block or one mapping of the caller's own maps.

        Raises LookupError when it is not: the tail of a block behind `used_length` is never found. ValueError: `size`
        is below 1. Temporary mappings are not looked at. O(log n).
        """
        start, length = check_whole_number(vaddr, "vaddr"), _size(size)
        if self._closed or self._space.lost:
            self.check_open()
        found = self._find(start, length)
        if found is None:
            raise LookupError(f"{length:#x} bytes at vaddr {start:#x} are not mapped for the device in one piece")
        return Iova(found.iova + start - found.vaddr)

    @reading
    def translate_iova(self, iova: SupportsIndex, size: SupportsIndex = 1) -> Vaddr:
        """Return the address in this process of `[iova, iova + size)`, all of it neighbours here, too.

        LookupError when a device would be stopped; ValueError: `size` is below 1. O(log n) and the number of pieces."""
        start, length = check_whole_number(iova, "iova"), _size(size)
        self.check_open()
        reached, apart = start, set()
        for mapping in self._space.mappings_in(iova=start, size=length):
            if mapping.iova > reached:
                break
            reached = mapping.iova + mapping.size
            apart.add(mapping.vaddr - mapping.iova)
        if reached < start + length or len(apart) != 1:
            raise LookupError(f"{length:#x} bytes at IOVA {start:#x} are not mapped for neighbours in this process")
        return Vaddr(start + apart.pop())

    @reading
    def segments(
        self,
        memory: DmaMapping | Buffer,
        /,
        offset: SupportsIndex = 0,
        size: SupportsIndex | None = None,
        *,
        max_segment: SupportsIndex | None = None,
        boundary: SupportsIndex | None = None,
    ) -> list[Segment]:
        """Return `[offset, offset + size)` of mapped memory as (iova, size) pairs, for scatter-gather and PRP lists.

        `memory`: a DmaMapping of this mapper, a RAM block, or a buffer whose memory is mapped (a view of a block, an
        mmap.mmap, a numpy array). All lengths are in bytes; `size` None means up to the end.
        `max_segment`: no segment is longer. `boundary`, a power of two: no segment crosses a multiple of it. The list
        has as few segments as these two allow: neighbours in IOVA are one.

        The IOVAs are valid as long as the memory stays mapped: hold a DmaMapping of it, or do not shrink the block.

        Raises ValueError: not inside `memory`, discarded, a buffer that is read-only or not contiguous, a mapping or
        block of another mapper; LookupError where bytes are not mapped, or by a temporary mapping alone, which is
        given as itself; TypeError; ClosedError. Cost: a look-up, O(log n), and 0.1 µs for each segment.
        """
        limits = Limits.checked(max_segment, boundary)
        if self._closed or self._space.lost:
            self.check_open()
        ranges = self._ranges(memory, offset, size)
        if len(ranges) == 1:
            return cut(*ranges[0], limits)
        return [segment for each in join(ranges) for segment in cut(*each, limits)]

    def _ranges(
        self, memory: DmaMapping | Buffer, offset: SupportsIndex, size: SupportsIndex | None
    ) -> list[tuple[int, int]]:
        """Find where a part of `memory` is mapped: (iova, size) in the order of its bytes."""
        if isinstance(memory, DmaMapping):
            memory.check_made_by(self)
            start, count = check_part(offset, size, memory.size, repr(memory))
            found = self._space.mappings_in(iova=memory.iova + start, size=count)
            first, end = memory.iova + start, memory.iova + start + count
            if sum(min(each.iova + each.size, end) - max(each.iova, first) for each in found) < count:
                raise LookupError(f"{memory!r} is not mapped any more: another user of the space has unmapped it")
            return [(memory.iova + start, count)]
        view, vaddr = _export(memory)
        try:
            start, count = check_part(offset, size, view.nbytes, "this buffer")
        finally:
            view.release()
        whole = self._find_mapped(vaddr + start, count)
        if whole is not None:
            return [(whole.iova + vaddr + start - whole.vaddr, count)]
        return self._walk(vaddr + start, count)

    def _walk(self, vaddr: int, size: int) -> list[tuple[int, int]]:
        """As `_ranges`, for memory that several mappings cover together."""
        ranges, end = [], vaddr + size
        while vaddr < end:
            memory = self._find_mapped(vaddr, 1)
            if memory is None:
                raise LookupError(
                    f"{end - vaddr:#x} bytes at vaddr {vaddr:#x} are not mapped for the device; of a temporary mapping "
                    "give the DmaMapping itself"
                )
            stop = min(end, memory.reached_until(vaddr))
            ranges.append((memory.iova + vaddr - memory.vaddr, stop - vaddr))
            vaddr = stop
        return ranges

    @reading
    def buffers(self) -> list[OwnMemory]:
        """Return the memory that is mapped besides blocks, temporary mappings that have been closed included."""
        return [*self._fixed, *self._temporary.values()]

    # ------------------------------------------------------------------------------------------------ below

    def _map(
        self, vaddr: int, size: int, wanted: int | None, access: int, view: memoryview | None, *, top_down: bool = False
    ) -> OwnMemory:
        """Map memory of the caller's own, at the IOVA that is wanted or at one that is found."""
        alignment = LARGE_PAGE if size >= LARGE_PAGE else 1
        read, write = access & READ != 0, access & WRITE != 0
        while True:
            try:
                iova = self._space.reserve_and_map(
                    vaddr=vaddr,
                    size=size,
                    iova=wanted,
                    alignment=alignment,
                    top_down=top_down,
                    read=read,
                    write=write,
                    dma_bits=self.dma_bits,
                )
            except IoctlError as error:
                if not self._recycle(error):
                    raise
            else:
                return OwnMemory(vaddr=Vaddr(vaddr), iova=iova, size=size, access=access, view=view)

    def _reserve(self, size: int, *, alignment: int, offset: int, dma_bits: int) -> Iova:
        try:
            return self._space.reserve_iova(size, alignment=alignment, offset=offset, dma_bits=dma_bits)
        except IoctlError as error:
            if not self._recycle(error):
                raise
            return self._space.reserve_iova(size, alignment=alignment, offset=offset, dma_bits=dma_bits)

    def _recycle(self, error: IoctlError) -> bool:
        """Reset temporary mappings where there is too little of something, or where those that are given up have the
        caller's own IOVA. Return whether another try makes sense."""
        given_up = [memory for memory in self._temporary.values() if not memory.holders]
        if isinstance(error, IovaOverlapError):
            if not any(taken.start == memory.iova for memory in given_up for taken in error.existing):
                return False
        elif error.errno not in (errno.ENOSPC, errno.ENOMEM) or not given_up:
            return False
        logger.debug("recycling temporary mappings: %s", error)
        self.reset_temporary()
        return True

    def _check_extent(self, vaddr: int, size: int) -> None:
        if size <= 0 or vaddr < 0 or vaddr + size - 1 > U64_MAX or (vaddr | size) % self._space.page_size:
            raise ValueError(
                f"vaddr {vaddr:#x} and size {size:#x} must be multiples of {self._space.page_size:#x}, the size above "
                "0: map whole pages, of mmap.mmap(-1, size) or of a block, as block.view(0, size). A bytearray or "
                "numpy array does not begin at a page"
            )

    def check_open(self) -> None:
        """Raise ClosedError when the mapper is closed, and VfioError when its space has lost all mappings."""
        if self._closed:
            raise ClosedError("this DmaMapper has been closed")
        if self._space.lost:
            raise VfioError(
                "nothing is mapped any more: the address space was closed, or has lost its last group",
                hint="Close this DmaMapper, and make another in a container with a group",
            )

    def _unmap_all(self) -> None:
        """Unmap all that is the caller's own, whoever holds it."""
        for memory in self._temporary.values():
            memory.holders = 0
        steps = [partial(self._unmap, memory) for memory in self._fixed]
        attempt_all("unmapping buffers", [*steps, self.reset_temporary])

    def _check(self) -> None:
        """The invariant: memory that is entered here is mapped as it is entered."""
        for memory in () if self._space.lost or self._space.closed else (*self._fixed, *self._temporary.values()):
            assert self._space.mapping_at(memory.iova) == (memory.iova, memory.size, memory.vaddr), memory
        addresses = [memory.vaddr for memory in self._fixed]
        assert addresses == sorted(addresses)
        assert all(memory.holders > 0 for memory in self._fixed)


def _access(*, read: bool, write: bool) -> int:
    return (READ if read else 0) | (WRITE if write else 0)


def _check_place(found: int, vaddr: int, wanted: int | None) -> None:
    """ValueError where memory that is mapped at `found` was to be at another IOVA."""
    if wanted is not None and wanted != found:
        raise ValueError(f"vaddr {vaddr:#x} is mapped at IOVA {found:#x}, so it is not mapped at {wanted:#x} as well")


def _less_access(iova: int) -> ValueError:
    return ValueError(
        f"the device may not do all that is wanted with the memory that is mapped at IOVA {iova:#x} already: close "
        "that mapping first, or let the block be written"
    )


def _size(size: SupportsIndex) -> int:
    if type(size) is int and size > 0:
        return size
    number = check_whole_number(size, "size")
    if number < 1:
        raise ValueError(f"a size must be at least 1 byte, not {number}")
    return number


def _export(buffer: Buffer) -> tuple[memoryview, Vaddr]:
    """A memoryview that keeps the buffer's memory where it is, and the address of its first byte."""
    view = memoryview(buffer)
    what = (
        "read-only" if view.readonly else "not contiguous" if not view.c_contiguous else "" if view.nbytes else "empty"
    )
    if what:
        size = view.nbytes
        view.release()
        raise ValueError(
            f"this buffer of {size} bytes is {what}, and one for DMA must be writable, contiguous and not empty; map "
            "memory that is not to be written with map_dma(vaddr=…, size=…, write=False)"
        )
    return view, Vaddr(ctypes.addressof(ctypes.c_char.from_buffer(view)))
