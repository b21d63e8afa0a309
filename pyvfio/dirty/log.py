"""Dirty tracking of RAM blocks: the parts to copy again, as a snapshot that a person can read.

A `DirtyLog` is a notifier of a `RamBlockList`; a list without a log pays nothing. The log records the *clean* parts.
Only `snapshot(clear=True)` adds clean parts; every other event, error or undo only removes some. The log may therefore
report too many dirty pages at times, but never too few.

* An added block is dirty as a whole. After each resize, the block is dirty as a whole at its new length.
* Discarded parts are not dirty, because there is nothing to copy. Parts become dirty when they are populated again, or
  when their pages are replaced.
* If a change was undone, the parts that the change made dirty stay dirty.

Source: `qemu_ram_resize` of QEMU, which clears the dirty bits of the old length and sets those of the new length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex
from weakref import WeakKeyDictionary

from pyvfio.blocks.discards import DiscardClaim
from pyvfio.dirty.tracking import DirtyTracking
from pyvfio.dma import DmaMapper
from pyvfio.errors import ClosedError
from pyvfio.extents import Extent, clip, runs, span, total, without
from pyvfio.guard import ContextManager, Guard, close_now, closing, constructing, guarded, making
from pyvfio.iommu.space import Mapping
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.unique import Unique
from pyvfio.units import Iova, align_down, align_up, check_bool, check_whole_number, format_size


@dataclass(frozen=True, slots=True)
class DirtyBlock:
    """The parts of a RAM block to copy.

    `dirty`: extents with gaps between them, ascending, in bytes from the start of the block; whole pages of `page_size`
    bytes.
    """

    idstr: str
    used_length: int
    page_size: int
    dirty: tuple[Extent, ...]

    @property
    def pages(self) -> int:
        """The number of pages of the block."""
        return self.used_length // self.page_size

    @property
    def count(self) -> int:
        """The number of dirty pages."""
        return total(self.dirty) // self.page_size

    def __str__(self) -> str:
        shown = ", ".join(f"{start:#x}-{end - 1:#x}" for start, end in self.dirty[:8]) or "none"
        return (
            f"{self.count} of {self.pages} pages of {format_size(self.page_size)} of RAM block '{self.idstr}' are "
            f"dirty: {shown}{', …' if len(self.dirty) > 8 else ''}"
        )


def _end(log: DirtyLog) -> None:
    log.close()


class _Taken(NamedTuple):
    """A snapshot not yet returned to the caller."""

    log: DirtyLog
    block: RamBlock
    found: DirtyBlock


def _put_back(taken: _Taken) -> None:
    taken.log.soil(taken.block, taken.found.dirty)


class DirtyLog(ContextManager, Unique):
    """Tracks the dirty pages of the blocks of a list, until `close`; a context manager.

    The log sees changes that blocks undergo through the list, and nothing else. The log does not see writes of the
    process through a view, a buffer or an address: call `mark` after such a write. The log does not see writes of
    devices either: call `collect`. While the log is open, uncoordinated discards are forbidden (`blocks.discards`).

    To copy a block while devices write to the block, use this order:

        log.collect(block, tracking, mapper)
        found = log.snapshot(block, clear=True)
        copy(found.dirty)

    The kernel forgets the pages that it has reported, and the log forgets the pages that it has cleared. Therefore read
    the pages last. A transfer between any two of these lines is then in the copy, in the next `collect`, or in both. A
    copy made before the clear would lose the transfer. For the last round, stop the device first.

    A discard, populate or remap may briefly unmap more than its part: all bytes that are mapped in one piece with the
    part. The next `collect` then reports all of these bytes as dirty.

    Raises as `RamBlockList.add_notifier`; DiscardError if an existing claim requires uncoordinated discards.

    Synchronization: any thread may call any method; methods wait for a change of the list in progress. Cost, where n is
    the number of clean parts: a change or `mark` is O(log n) plus the clean parts concerned; a snapshot is O(n).

    Example:
        >>> import pyvfio
        >>> blocks = pyvfio.RamBlockList()
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
        >>> log = pyvfio.DirtyLog(blocks)
        >>> log.snapshot(ring, clear=True).dirty  # all of a new block is dirty
        (Extent(start=0, end=2097152),)
        >>> with ring.view(5000, 5) as memory:
        ...     memory[:] = b"hello"
        >>> log.mark(ring, 5000, 5)
        >>> log.snapshot(ring).dirty
        (Extent(start=4096, end=8192),)
        >>> log.close()
        >>> blocks.close()
    """

    @constructing(_end)
    def __init__(self, blocks: RamBlockList) -> None:
        if not isinstance(blocks, RamBlockList):
            raise TypeError(f"blocks must be a RamBlockList, not {type(blocks).__name__}")
        self.guard = Guard("this log", lock=blocks.guard.lock)
        self._blocks: RamBlockList | None = blocks
        # Ascending, disjoint, of whole pages; changed with the lock held. All other pages are dirty. The parts may
        # reach behind used_length and into discarded parts: no snapshot shows these, and they are removed when they
        # come into use again. A removed block disappears from the dictionary by itself.
        self._clean: WeakKeyDictionary[RamBlock, list[Extent]] = WeakKeyDictionary()
        self._claim: DiscardClaim = blocks.discards.disable_uncoordinated()
        try:
            blocks.add_notifier(self)
        except BaseException:
            close_now(self._claim)
            raise

    def __repr__(self) -> str:
        return f"<DirtyLog {'closed' if self._blocks is None else f'of {len(self._blocks)} blocks'}>"

    # ------------------------------------------------------------------------------------------------ the list's hooks

    @guarded
    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Record that the whole block is dirty."""
        del used_length, max_length
        self._clean.pop(block, None)

    @guarded
    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Record that all of the new length is dirty."""
        del old_length, new_length
        self._clean.pop(block, None)

    @guarded
    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Do nothing: no snapshot shows a discarded part."""

    @guarded
    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Record that the parts are dirty."""
        self._soil(block, parts)

    @guarded
    def ram_block_remapping(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Record that the parts are dirty: their contents are lost."""
        self._soil(block, parts)

    @guarded
    def ram_block_remapped(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Record the parts once more: a snapshot may have cleared them meanwhile."""
        self._soil(block, parts)

    @guarded
    def soil(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Record that `parts` of the block, whole pages, are dirty. For the undo of a snapshot."""
        self._soil(block, parts)

    def _soil(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        clean = self._clean.get(block)
        if clean and parts:
            first, behind = span(clean, parts[0].start, parts[-1].end)
            clean[first:behind] = without(clean[first:behind], *parts)

    # ------------------------------------------------------------------------------------------------ writes

    @guarded
    def mark(self, block: RamBlock, offset: SupportsIndex, size: SupportsIndex) -> None:
        """Record that the process has written `[offset, offset + size)`, in bytes: these pages are dirty.

        Raises ValueError (outside of `used_length`, not a block of this list), ClosedError.
        """
        start, length = check_whole_number(offset, "offset"), check_whole_number(size, "size")
        self._check_followed(block)
        if not 0 <= start <= start + length <= block.used_length:
            raise ValueError(
                f"{length:#x} bytes at offset {start:#x} do not lie in RAM block '{block.idstr}', whose used_length is "
                f"{block.used_length:#x}"
            )
        self._soil(block, [_pages(block, start, start + length)])

    @guarded
    def collect(self, block: RamBlock, tracking: DirtyTracking, mapper: DmaMapper) -> None:
        """Record the pages that devices may have written through `mapper`'s mappings of the block since the last call.

        The kernel's record is lost with a mapping: call `collect` before `mapper` is closed or leaves the list. After a
        resize no call is needed, because the whole block is dirty. Writes through other mappings of the same memory are
        not seen.

        Raises ValueError if `mapper` does not follow the block, or maps into another address space than `tracking`
        tracks. Raises as `DirtyTracking.read`; the failed mapping is then dirty. Cost: an ioctl for each mapping.
        """
        for given, kind in ((tracking, DirtyTracking), (mapper, DmaMapper)):
            if not isinstance(given, kind):
                raise TypeError(f"collect() needs a {kind.__name__}, not {given!r}")
        self._check_followed(block)
        if mapper.space is not tracking.space:
            raise ValueError("the mapper maps into another address space than the one that is tracked")
        iova = mapper.iova(block)
        for mapping in mapper.space.mappings_in(iova=iova, size=block.max_length):
            self._collect(block, iova, tracking, mapping)

    def _collect(self, block: RamBlock, iova: Iova, tracking: DirtyTracking, mapping: Mapping) -> None:
        part = _pages(block, mapping.iova - iova, mapping.iova - iova + mapping.size)
        clean = self._clean.get(block, [])
        before = clip(clean, *part)
        # The part is marked dirty first: the kernel forgets the pages that it reports, and the read may be interrupted.
        self._soil(block, [part])
        found = tracking.read(iova=mapping.iova, size=mapping.size)
        if before:
            written = [_pages(block, dirty.start - iova, dirty.last + 1 - iova) for dirty in found.dirty]
            first, behind = span(clean, part.start - 1, part.end + 1)  # adjacent parts are joined
            clean[first:behind] = runs(sorted([*clean[first:behind], *without(before, *written)]))

    # ------------------------------------------------------------------------------------------------ snapshots

    def snapshot(self, block: RamBlock, *, clear: bool = False) -> DirtyBlock:
        """Return the pages that are dirty now. `clear`: mark the pages as clean; copy the pages after that, not before.

        Raises ValueError if the block is not in this list; ClosedError.
        """
        check_bool(clear, "clear")
        return self._take(block, clear=clear).found

    @making(_put_back)
    def _take(self, block: RamBlock, *, clear: bool) -> _Taken:
        self._check_followed(block)
        dirty = tuple(runs(without(block.populated, *self._clean.get(block, ()))))
        if clear:
            self._clean[block] = list(block.populated)
        return _Taken(self, block, DirtyBlock(block.idstr, block.used_length, block.page_size, dirty))

    def _check_followed(self, block: RamBlock) -> None:
        if not isinstance(block, RamBlock):
            raise TypeError(f"block must be a RamBlock, not {block!r}")
        if self._blocks is None:
            raise ClosedError("this log has been closed")
        if not self._blocks.knows(self):
            raise ClosedError("this log was removed from its list, and sees no further changes")
        if self._blocks.block_at(block.vaddr) is not block:
            raise ValueError(f"RAM block '{block.idstr}' is not in the list that this log follows")

    @closing
    def close(self) -> None:
        """Leave the list. Does nothing after the first call, or in a forked child."""
        if self._blocks is None:
            return
        if self._blocks.knows(self):  # remove_notifier() may have removed the log
            self._blocks.remove_notifier(self)
        close_now(self._claim)
        self._blocks = None

    def _check(self) -> None:
        for block, clean in self._clean.items():
            assert clean == clip(sorted(clean), 0, block.max_length)
            assert all(one.end <= other.start for one, other in itertools.pairwise(clean))
            assert not any(edge % block.page_size for extent in clean for edge in extent)


def _pages(block: RamBlock, start: int, end: int) -> Extent:
    """Return the whole pages that contain [start, end), or an empty extent if that range is empty."""
    if start >= end:
        return Extent(start, start)
    return Extent(align_down(start, block.page_size), align_up(end, block.page_size))
