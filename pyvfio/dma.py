"""Keeps what a device can reach equal to what RAM blocks hold, through every resize, at an IOVA that never moves.

A `DmaMapper` is a notifier of a `RamBlockList`. When a block comes, `max_length` of IOVA is reserved for it and its
`used_length` is mapped; when it is resized, the old mapping is taken away and the new one made at the same IOVA; when
it goes, both go. At every instant, also after any failure:

    what the device can reach  ⊆  [0, used_length), and what is just being changed

How, `pyvfio.pieces` decides. "remap" unmaps a block and maps it anew, which is not atomic: DMA into it that is under
way meanwhile is stopped. It is what `qemu_vfio_dma_map_resize` does (patch 14 of the series "Ram blocks with resizable
anonymous allocations under POSIX", QEMU 2020), less the defects of the posted code: swapped arguments, a lock that is
kept, a failing map that is taken for a mapping, a length of 0 that is lost, a new length that is not checked, an
address in the unmapped tail that is not recognised. "extend" maps and unmaps the difference, and what survives stays in
reach.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, TypeVar
from weakref import WeakKeyDictionary

from pyvfio.discards import DiscardClaim
from pyvfio.errors import ClosedError, EntryLimitError, IoctlError
from pyvfio.extents import Extent, runs, without
from pyvfio.handle import attempt_all
from pyvfio.pieces import Policy, Window
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.space import AddressSpace
from pyvfio.units import MIB, U64_MAX, Iova, Vaddr, format_size

if TYPE_CHECKING:  # collections.abc has it from 3.12 on
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)

_LARGE_PAGE = 2 * MIB
"""IOVA is congruent to vaddr modulo this, so that the IOMMU can use large pages where the memory does."""

_Result = TypeVar("_Result")


class DmaMapping:
    """Memory of the caller's own that the device can reach: `size` bytes at `vaddr`, at `iova` for the device.

    Made by `DmaMapper.map_dma`, `map_buffer` and `map_temporary`; a context manager. A buffer stays exported, so that
    it cannot be freed or resized, until the kernel has unmapped it.
    """

    __slots__ = ("_access", "_buffer", "_mapper", "iova", "size", "vaddr")

    def __init__(
        self,
        mapper: DmaMapper | None,
        *,
        vaddr: Vaddr,
        iova: Iova,
        size: int,
        access: int,
        buffer: memoryview | None,
    ) -> None:
        self._mapper = mapper  # None once closed, or where the mapping belongs to somebody else
        self._buffer = buffer
        self.vaddr = vaddr
        self.iova = iova
        self.size = size
        self._access = access  # as `_access` makes it

    def close(self) -> None:
        """Take the mapping away; twice is fine.

        A temporary one is only given up: it goes with the next `reset_temporary`. Where `map_dma` found the memory
        mapped already, that mapping stays. Raises UnmapSizeError or IoctlError, and then it is still mapped.
        """
        if self._mapper is not None:
            self._mapper._close_mapping(self)

    def _drop(self) -> None:
        self._mapper = None
        if self._buffer is not None:
            self._buffer.release()
            self._buffer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DmaMapping vaddr={self.vaddr:#x} iova={self.iova:#x} size={self.size:#x}>"


class _Followed(NamedTuple):
    """A block, and the IOVA that is its own for `max_length` bytes."""

    block: RamBlock
    window: Window


class DmaMapper:
    """Maps RAM blocks, and buffers of the caller's own, into an `AddressSpace`.

    `blocks`: follow that list from now on, blocks that it has included. `place`: asked for the IOVA of each block that
    comes; None leaves it to the mapper. `resize` and what goes with it say how a block's mapping follows its length:

    * "remap": unmapped, and mapped anew in one piece. DMA into the block that is under way meanwhile is stopped, so
      the caller quiesces the device. One mapping a block.
    * "extend": the difference is mapped, or unmapped in whole pieces; at most the head of the one piece that straddles
      the new end is unmapped and mapped again. A mapping for each grow; when the container takes no more, a block's
      pieces are joined by a remap.
    * "extend" with `granule` bytes (a power of two, at least `space.page_size`): all pieces are that long, lengths are
      multiples of it (ValueError), and no byte that survives is ever unmapped. A block that could need more mappings
      than there are is refused when it is added (EntryLimitError).

    `allow_gap=False`, with "extend": a resize for which a surviving byte would have to be unmapped is a GapError, or
    EntryLimitError where pieces would have to be joined.

    Raises what mapping the existing blocks raises; then it follows nothing. ValueError: options that do not go
    together.

    Synchronization: every method may be called from any thread. A block's hooks are called under the list's lock.
    Cost: a resize that remaps unmaps the old length and maps the new one, whatever the difference; one that extends
    costs what the difference does.
    """

    def __init__(
        self,
        space: AddressSpace,
        blocks: RamBlockList | None = None,
        *,
        resize: Literal["remap", "extend"] = "remap",
        granule: int | None = None,
        allow_gap: bool = True,
        place: Callable[[RamBlock], int | None] | None = None,
    ) -> None:
        if not hasattr(space, "reserve_iova"):
            raise TypeError(f"space must be an AddressSpace, such as device.container, not {type(space).__name__}")
        if not isinstance(blocks, RamBlockList | None):
            raise TypeError(f"blocks must be a RamBlockList, not {type(blocks).__name__}")
        self._policy = Policy(resize, granule, allow_gap)
        self._space = space
        self._place = place or (lambda _block: None)
        self._lock = threading.RLock()
        self._followed: list[_Followed] = []  # sorted by vaddr, windows being as long as their blocks
        self._pid = os.getpid()
        self._mappings: list[DmaMapping] = []  # map_dma and map_buffer, sorted by vaddr
        self._temporary: dict[Iova, DmaMapping] = {}
        self._former: WeakKeyDictionary[RamBlock, Iova] = WeakKeyDictionary()
        self._closed = False
        self._blocks = blocks
        self._claim: DiscardClaim | None = None
        if blocks is not None:
            self._claim = blocks.discards.disable_uncoordinated()
            try:
                blocks.add_notifier(self)
            except BaseException:
                self._claim.close()
                raise

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._followed)} blocks, {len(self._mappings)} mappings"
        return f"<DmaMapper {state}>"

    @property
    def space(self) -> AddressSpace:
        """Where it maps."""
        return self._space

    # ------------------------------------------------------------------------------------------------ RAM blocks

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Reserve `max_length` of IOVA and map what is populated, or nothing of it. ValueError: granules do not make it
        up."""
        with self._lock:
            self._check_open()
            self._policy.check_length(used_length, "used_length")
            self._check_parts(block, block._populated(used_length))  # it may have holes already
            self._check_budget(block, max_length)
            iova = self._reserve_for(block, max_length)
            window = Window(
                self._space,
                self._policy,
                idstr=block.idstr,
                vaddr=block.vaddr,
                iova=iova,
                size=max_length,
                map_piece=self._map,
            )
            followed = _Followed(block, window)
            try:
                self._change(followed, block._populated(used_length))
                logger.debug("added %r at iova=%#x", block, iova)
                self._followed.insert(bisect_right(self._followed, block.vaddr, key=_vaddr), followed)
            except BaseException as error:
                window.withdraw(error)  # a signal handler may have raised when all was mapped
                self._space.release_iova(iova)
                raise

    def _check_budget(self, block: RamBlock, max_length: int) -> None:
        """With a granule, each block can have all the mappings it may ever need."""
        granule = self._policy.granule
        if granule is None:
            return
        if granule % self._space.page_size:
            raise ValueError(
                f"a granule must be at least the IOMMU's page, {self._space.page_size:#x}, not {granule:#x}"
            )
        needed, left = self._policy.entries(max_length), self._space.entries_left
        left -= sum(self._policy.entries(f.window.size) - len(f.window.pieces()) for f in self._followed)
        if needed <= left:
            return
        fitting = granule
        while left > 0 and -(-max_length // fitting) > left:
            fitting *= 2
        error = EntryLimitError(
            errno.ENOSPC,
            f"RAM block '{block.idstr}' may need {needed} mappings of {format_size(granule)}, and {max(left, 0)} are "
            "left when all others have those they may need",
            request="VFIO_IOMMU_MAP_DMA",
            arguments={"max_length": max_length, "granule": granule},
            hint=f"The smallest granule that would fit is {format_size(fitting)}"
            if left > 0
            else "Remove blocks, or raise the module parameter vfio_iommu_type1.dma_entry_limit",
        )
        error.used, error.limit = needed, max(left, 0)
        raise error

    def _reserve_for(self, block: RamBlock, max_length: int) -> Iova:
        wanted = self._place(block)
        if wanted is not None:
            return self._space.reserve_iova_at(wanted, max_length)
        former = self._former.get(block)
        if former is not None:  # a block that comes back, after an undo for instance, finds its IOVA again
            try:
                return self._space.reserve_iova_at(former, max_length)
            except IoctlError:
                logger.debug("iova=%#x of %r has been given to another", former, block)
        return self._recycling(lambda: self._space.reserve_iova(max_length, alignment=_LARGE_PAGE, offset=block.vaddr))

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Unmap the block and give its IOVA back. Raises UnmapSizeError or IoctlError: it is then still reached."""
        del used_length, max_length
        with self._lock:
            followed = self._search(block)
            if followed is None:  # a signal handler has ended an earlier call behind the next lines; nothing is reached
                return
            followed.window.change([])
            logger.debug("removed %r from iova=%#x", block, followed.window.iova)
            self._former[block] = followed.window.iova
            self._followed.remove(followed)
            self._space.release_iova(followed.window.iova)

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Map `new_length` in place of `old_length`, at the same IOVA.

        When the kernel refuses, what was mapped is mapped again where it was unmapped, and the refusal raised. When
        that fails too, RollbackError: the device reaches less than the block has, until it is resized once more or
        removed.
        """
        with self._lock:
            self._check_open()
            followed = self._find(block)
            if not 0 <= new_length <= block.max_length:
                raise ValueError(f"{new_length:#x} is not within max_length {block.max_length:#x} of '{block.idstr}'")
            self._policy.check_length(new_length, "used_length")
            # Before, as the series traces it: what raises behind the change is taken for a refusal.
            logger.debug("resizing %r at iova=%#x from %#x to %#x", block, followed.window.iova, old_length, new_length)
            self._change(followed, block._populated(new_length), was=block._populated(old_length))

    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Unmap parts of the block; as `ram_block_resized`. ValueError: granules do not make them up."""
        with self._lock:
            self._check_parts(block, parts)
            self._change(self._find(block), without(block.populated, *parts), was=block.populated)

    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Map parts of the block again; as `ram_block_discarded`."""
        with self._lock:
            self._check_parts(block, parts)
            wanted = runs(sorted([*without(block.populated, *parts), *parts]))
            self._change(self._find(block), wanted, was=block.populated)

    def _check_parts(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        self._check_open()
        for part in parts:
            self._policy.check_length(part.start, f"where a part of RAM block '{block.idstr}' begins")
            self._policy.check_length(part.size, f"a part of RAM block '{block.idstr}'")

    def _change(self, followed: _Followed, wanted: Sequence[Extent], *, was: Sequence[Extent] | None = None) -> None:
        try:
            followed.window.change(wanted, was=was)
        except EntryLimitError:
            if self._policy.resize == "remap" or self._policy.granule or not self._policy.allow_gap:
                raise
            logger.debug("joining pieces: the container takes no more mappings")
            self._join(followed, wanted)

    def _join(self, followed: _Followed, wanted: Sequence[Extent]) -> None:
        """Where a block of many pieces becomes one, there is room again."""
        if not followed.window.pieces():
            most = max(self._followed, key=lambda each: len(each.window.pieces()), default=followed)
            most.window.change(runs(most.window.pieces()), join=True)
        followed.window.change(wanted, join=True)

    def _size_at(self, *, vaddr: int, iova: int) -> int:
        mapping = self._space.mapping_at(iova)
        return 0 if mapping is None or (mapping.iova, mapping.vaddr) != (iova, vaddr) else mapping.size

    def _search(self, block: RamBlock) -> _Followed | None:
        position = bisect_right(self._followed, block.vaddr, key=_vaddr) - 1
        if position < 0 or self._followed[position].block is not block:
            return None
        return self._followed[position]

    def _find(self, block: RamBlock) -> _Followed:
        followed = self._search(block)
        if followed is None:
            raise ValueError(f"RAM block '{block.idstr}' is not followed by this mapper")
        return followed

    # ------------------------------------------------------------------------------------------------ look-ups

    def iova(self, block: RamBlock) -> Iova:
        """Where `block` begins for the device; it stays there until the block is removed. Raises ValueError when the
        block is not followed, ClosedError."""
        with self._lock:
            self._check_open()
            return self._find(block).window.iova

    def translate_vaddr(self, vaddr: int, size: int = 1) -> Iova:
        """The IOVA of `[vaddr, vaddr + size)`, all of which one block or one mapping of the caller's own has mapped.

        Raises LookupError when it has not: the tail of a block behind `used_length` is never found. ValueError: `size`
        is below 1. Temporary mappings are not looked at. O(log n).
        """
        _check_size(size)
        with self._lock:
            found = self._find_vaddr(vaddr, size)
        if found is None:
            raise LookupError(f"{size:#x} bytes at vaddr {vaddr:#x} are not mapped for the device in one piece")
        return found

    def _find_vaddr(self, vaddr: int, size: int) -> Iova | None:
        position = bisect_right(self._followed, vaddr, key=_vaddr) - 1
        if position >= 0 and (window := self._followed[position].window).reaches(vaddr, size):
            return Iova(window.iova + vaddr - window.vaddr)
        mapping = self._own_mapping(vaddr, size)
        return None if mapping is None else Iova(mapping.iova + vaddr - mapping.vaddr)

    def _own_mapping(self, vaddr: int, size: int) -> DmaMapping | None:
        position = bisect_right(self._mappings, vaddr, key=lambda m: m.vaddr) - 1
        if position < 0 or vaddr + size > self._mappings[position].vaddr + self._mappings[position].size:
            return None
        return self._mappings[position]

    def translate_iova(self, iova: int, size: int = 1) -> Vaddr:
        """Where in this process the device ends up with `[iova, iova + size)`, all of it neighbours here, too.

        LookupError when it would be stopped; ValueError: `size` is below 1. O(log n) and the number of pieces."""
        _check_size(size)
        reached, apart = iova, set()
        for mapping in self._space.mappings_in(iova=iova, size=size):
            if mapping.iova > reached:
                break
            reached = mapping.iova + mapping.size
            apart.add(mapping.vaddr - mapping.iova)
        if reached < iova + size or len(apart) != 1:
            raise LookupError(f"{size:#x} bytes at IOVA {iova:#x} are not mapped for neighbours in this process")
        return Vaddr(iova + apart.pop())

    # ------------------------------------------------------------------------------------------------ own mappings

    def map_dma(
        self, *, vaddr: int, size: int, iova: int | None = None, read: bool = True, write: bool = True
    ) -> DmaMapping:
        """Let the device reach `[vaddr, vaddr + size)`, both multiples of the IOMMU's smallest page.

        Memory that is wholly mapped already (part of a block, say) is not mapped again: the IOVA is the one it has, and
        closing the result changes nothing. `iova`: the caller's own choice. The caller keeps the memory alive until the
        mapping is closed; `map_buffer` sees to that itself.

        Raises ValueError (misaligned; overlaps what is mapped, or the reserved tail of a block, which would get a
        second IOVA when it grows; is mapped already, but for less access), IovaRangeError, IovaOverlapError,
        PinLimitError, EntryLimitError, IoctlError.
        """
        return self._map_own(vaddr=vaddr, size=size, iova=iova, read=read, write=write, buffer=None)

    def map_buffer(
        self,
        buffer: Buffer,
        *,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
    ) -> DmaMapping:
        """Let the device reach a writable buffer (mmap.mmap, memoryview, numpy array, ctypes array) as `map_dma` does.

        The buffer must begin and end at a page. It stays exported until the mapping is closed, so it can be neither
        freed nor resized.
        """
        view, vaddr = _export(buffer)
        try:
            return self._map_own(vaddr=vaddr, size=view.nbytes, iova=iova, read=read, write=write, buffer=view)
        except BaseException:
            self._release_unless_held(view)
            raise

    def _release_unless_held(self, view: memoryview) -> None:
        """After a map that failed; it is still held where the device may reach it: its unmap failed, too."""
        if all(mapping._buffer is not view for mapping in self._own_mappings()):
            view.release()

    def _map_own(
        self, *, vaddr: int, size: int, iova: int | None, read: bool, write: bool, buffer: memoryview | None
    ) -> DmaMapping:
        self._check_extent(vaddr, size)
        with self._lock:
            self._check_open()
            access = _access(read=read, write=write)
            known = self._known(vaddr, size, iova, access)
            if known is not None:
                if buffer is not None:
                    buffer.release()
                return DmaMapping(None, vaddr=Vaddr(vaddr), iova=known, size=size, access=access, buffer=None)
            if iova is None:
                alignment = self._alignment(size)
                place = self._recycling(lambda: self._space.reserve_iova(size, alignment=alignment, offset=vaddr))
            else:
                place = self._space.reserve_iova_at(iova, size)
            mapping = DmaMapping(self, vaddr=Vaddr(vaddr), iova=place, size=size, access=access, buffer=buffer)
            # Entered first: what a signal handler leaves behind must be known, if only to be unmapped.
            self._mappings.insert(bisect_right(self._mappings, vaddr, key=lambda m: m.vaddr), mapping)
            try:
                self._map(vaddr=vaddr, iova=place, size=size, read=read, write=write)
            except BaseException:
                self._close_mapping(mapping)
                raise
        return mapping

    def _known(self, vaddr: int, size: int, iova: int | None, access: int) -> Iova | None:
        """The IOVA of memory that is mapped whole; ValueError where it is in part, or would be later."""
        found = self._find_vaddr(vaddr, size)
        if found is None:
            self._check_apart(vaddr, size)
            return None
        if iova is not None and iova != found:
            raise ValueError(f"vaddr {vaddr:#x} is mapped at IOVA {found:#x}, so it is not mapped at {iova:#x} as well")
        mapping = self._own_mapping(vaddr, size)
        if mapping is not None and access & ~mapping._access:
            raise ValueError(f"the device may not do with {mapping!r} all that is wanted: close that mapping first")
        return found

    def _check_apart(self, vaddr: int, size: int) -> None:
        position = bisect_right(self._followed, vaddr + size - 1, key=_vaddr) - 1
        if position >= 0 and self._followed[position].window.end > vaddr:
            block = self._followed[position].block
            raise ValueError(
                f"vaddr {vaddr:#x}-{vaddr + size - 1:#x} reaches into RAM block '{block.idstr}', which has IOVA of its "
                f"own for all of {block.vaddr:#x}-{block.vaddr + block.max_length - 1:#x}; grow the block instead"
            )
        position = bisect_right(self._mappings, vaddr + size - 1, key=lambda m: m.vaddr) - 1
        if position >= 0 and self._mappings[position].vaddr + self._mappings[position].size > vaddr:
            raise ValueError(f"vaddr {vaddr:#x}-{vaddr + size - 1:#x} overlaps {self._mappings[position]!r}")

    def map_temporary(self, buffer: Buffer, *, read: bool = True, write: bool = True) -> DmaMapping:
        """Map a buffer for one transfer, at an IOVA from the top down, so that it does not come between blocks.

        Closing the result gives it up, but the kernel's mapping stays until `reset_temporary`, which many share, or
        until mappings or memory to lock run out: then it is made by itself, and the map tried once more. The buffer
        stays exported, and within the device's reach, until then. Raises as `map_buffer`.
        """
        view, vaddr = _export(buffer)
        try:
            self._check_extent(vaddr, view.nbytes)
            with self._lock:
                self._check_open()
                place = self._recycling(lambda: self._reserve_temporary(vaddr, view.nbytes))
                access = _access(read=read, write=write)
                mapping = DmaMapping(self, vaddr=vaddr, iova=place, size=view.nbytes, access=access, buffer=view)
                self._temporary[place] = mapping
                try:
                    self._map(vaddr=vaddr, iova=place, size=view.nbytes, read=read, write=write)
                except BaseException:
                    self._unmap_run([mapping])
                    raise
        except BaseException:
            self._release_unless_held(view)
            raise
        return mapping

    def _reserve_temporary(self, vaddr: int, size: int) -> Iova:
        return self._space.reserve_iova(size, alignment=self._alignment(size), offset=vaddr, top_down=True)

    def reset_temporary(self) -> int:
        """Unmap all temporary mappings that have been closed; how many are still open, and stay.

        Raises UnmapSizeError or IoctlError; what has not been unmapped stays known. Cost: one unmap for each run of
        neighbours.
        """
        with self._lock:
            given_up = sorted(iova for iova, mapping in self._temporary.items() if mapping._mapper is None)
            while given_up:
                self._unmap_run(self._take_run(given_up))
            return len(self._temporary)

    def _take_run(self, given_up: list[Iova]) -> list[DmaMapping]:
        run = [self._temporary[given_up.pop()]]
        while given_up and self._temporary[given_up[-1]].size + given_up[-1] == run[-1].iova:
            run.append(self._temporary[given_up.pop()])
        return run

    def _unmap_run(self, run: list[DmaMapping]) -> None:
        if any(self._size_at(vaddr=mapping.vaddr, iova=mapping.iova) for mapping in run):
            self._space.unmap(iova=run[-1].iova, size=sum(mapping.size for mapping in run))
        for mapping in run:
            del self._temporary[mapping.iova]
            self._space.release_iova(mapping.iova)
            mapping._drop()

    def _close_mapping(self, mapping: DmaMapping) -> None:
        with self._lock:
            if mapping._mapper is None or os.getpid() != self._pid:  # another thread was first, or this is a child
                return
            if self._temporary.get(mapping.iova) is mapping:
                mapping._mapper = None
                return
            # What the space does not have went with its last group, or in a call that a signal handler ended.
            if self._size_at(vaddr=mapping.vaddr, iova=mapping.iova):
                self._space.unmap(iova=mapping.iova, size=mapping.size)
            position = bisect_right(self._mappings, mapping.vaddr, key=lambda m: m.vaddr) - 1
            if position >= 0 and self._mappings[position] is mapping:  # else a signal handler ended an earlier close
                del self._mappings[position]
                self._space.release_iova(mapping.iova)
            mapping._drop()

    # ------------------------------------------------------------------------------------------------ below

    def _map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        self._recycling(lambda: self._space.map(vaddr=vaddr, iova=iova, size=size, read=read, write=write))

    def _recycling(self, attempt: Callable[[], _Result]) -> _Result:
        """Try; where mappings, memory to lock or IOVA ran out and temporary mappings were given up, try once more."""
        try:
            return attempt()
        except IoctlError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            if not any(mapping._mapper is None for mapping in self._temporary.values()):
                raise
            logger.debug("recycling temporary mappings: %s", error)
            self.reset_temporary()
        return attempt()

    @staticmethod
    def _alignment(size: int) -> int:
        return _LARGE_PAGE if size >= _LARGE_PAGE else 1

    def _check_extent(self, vaddr: int, size: int) -> None:
        if size <= 0 or vaddr < 0 or vaddr + size - 1 > U64_MAX or (vaddr | size) % self._space.page_size:
            raise ValueError(
                f"vaddr {vaddr:#x} and size {size:#x} must be multiples of {self._space.page_size:#x}, the size above "
                "0; mmap.mmap(-1, size) and RAM blocks begin at a page, a bytearray or numpy array does not"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this DmaMapper has been closed")

    def close(self) -> None:
        """Leave the list of blocks and unmap everything; twice is fine, and in a forked child nothing happens.

        Raises what the steps raise, after all of them were tried; what could not be unmapped stays known, and `close`
        may be called again.
        """
        if self._closed or os.getpid() != self._pid:
            return
        closes = [mapping.close for mapping in self._own_mappings()]
        attempt_all("closing the DmaMapper", [self._leave, *closes, self.reset_temporary])
        self._closed = True

    def _leave(self) -> None:
        if self._blocks is not None:
            self._blocks.remove_notifier(self)
            self._blocks = None
        if self._claim is not None:
            self._claim.close()

    def _own_mappings(self) -> list[DmaMapping]:
        with self._lock:
            return [*self._mappings, *self._temporary.values()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        """The invariant: for each block, the space has mapped exactly what the block holds."""
        with self._lock:
            for block, window in self._followed:
                reached = runs(window.pieces())
                assert not without(reached, *block.populated), (block, reached)
                assert reached == list(block.populated) or not window.settled, (block, reached)
                assert self._policy.granule is None or all(p.size == self._policy.granule for p in window.pieces())
            for mapping in self._mappings:
                assert self._size_at(vaddr=mapping.vaddr, iova=mapping.iova) in (0, mapping.size), mapping
            for addresses in (list(map(_vaddr, self._followed)), [mapping.vaddr for mapping in self._mappings]):
                assert addresses == sorted(addresses)


def _vaddr(followed: _Followed) -> Vaddr:
    return followed.window.vaddr


def _access(*, read: bool, write: bool) -> int:
    return read | write << 1


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"a size must be at least 1 byte, not {size}")


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
