"""What of RAM blocks has to be copied again: dirty tracking of a block, as a snapshot that a person can read.

A `DirtyLog` is a notifier of a `RamBlockList`; blocks that have none pay nothing. It keeps the *clean* parts: only
`snapshot(clear=True)` adds to them, and everything else, an error or an undo, takes away from them. So it says at times
that too much is dirty, never too little.

* A block that comes is dirty as a whole, and so it is after each resize, at its new length: it has to be copied again.
* Parts that are discarded are not dirty, as there is nothing to copy. They are when they are populated again, and so
  are parts whose pages were replaced.
* A change that was undone leaves dirty what it had made so.

Source: `qemu_ram_resize` of QEMU, which clears the dirty bits of the old length and sets those of the new one.
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
from pyvfio.extents import Extent, clip, runs, total, without
from pyvfio.guard import ContextManager, Guard, close_now, closing, constructing, guarded, making
from pyvfio.iommu.space import Mapping
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.units import Iova, align_down, align_up, check_whole_number, format_size


@dataclass(frozen=True, slots=True)
class DirtyBlock:
    """What of a RAM block has to be copied: `dirty`, ascending and neighbours joined, in bytes from the block's
    beginning, whole pages of `page_size` bytes."""

    idstr: str
    used_length: int
    page_size: int
    dirty: tuple[Extent, ...]

    @property
    def pages(self) -> int:
        """How many pages the block has."""
        return self.used_length // self.page_size

    @property
    def count(self) -> int:
        """How many of them are dirty."""
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
    """A snapshot that is on its way to the caller."""

    log: DirtyLog
    block: RamBlock
    found: DirtyBlock


def _put_back(taken: _Taken) -> None:
    taken.log.soil(taken.block, taken.found.dirty)


class DirtyLog(ContextManager):
    """Which pages of the blocks of a list are dirty, until `close`; a context manager.

    What changes blocks through the list is seen, and nothing else. What the process writes through a view, a buffer or
    an address is not: say it with `mark`, after the write. What devices write is not, either: `collect` it. While it is
    open no memory may be discarded behind its back (`blocks.discards`).

    To copy a block that is written meanwhile, in this order:

        log.collect(block, tracking, mapper)
        found = log.snapshot(block, clear=True)
        copy(found.dirty)

    The kernel forgets what it has told, and the log what it has cleared, so that the pages are read last: a transfer
    between any two of these lines is in what is copied, or in what the next `collect` finds, or in both. Copied before
    they are cleared, they would lose it. The last time, stop the device first.

    A discard, populate or remap may take more away than its part for a moment, what is mapped in one piece with it, and
    what the kernel knew of that with it: `collect` before, unless the kernel calls everything dirty that is mapped, as
    it does for PCI devices.

    Raises what `RamBlockList.add_notifier` raises, DiscardError where somebody claims discards nobody is told of.

    Synchronization: any thread may call anything; methods wait for a change of the list that is under way. Cost: a
    look-up in a dict for each change, O(number of clean extents) for each call.
    """

    @constructing(_end)
    def __init__(self, blocks: RamBlockList) -> None:
        if not isinstance(blocks, RamBlockList):
            raise TypeError(f"blocks must be a RamBlockList, not {type(blocks).__name__}")
        self.guard = Guard("this log", lock=blocks.guard.lock)
        self._blocks: RamBlockList | None = blocks
        # Ascending, disjoint, of whole pages; replaced as a whole. All else is dirty. The parts may reach behind
        # used_length and into discarded parts, which no snapshot shows, and which are removed when they come back.
        # A block that is removed drops out by itself.
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
        """Note that all of it is dirty."""
        del used_length, max_length
        self._clean.pop(block, None)

    @guarded
    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Note that all of the new length is dirty."""
        del old_length, new_length
        self._clean.pop(block, None)

    @guarded
    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Do nothing: no snapshot shows a discarded part."""

    @guarded
    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Note that the parts are dirty."""
        self._soil(block, parts)

    @guarded
    def ram_block_remapping(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Note that the parts are dirty: their contents are lost."""
        self._soil(block, parts)

    @guarded
    def ram_block_remapped(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Note so once more: a snapshot may have cleared the parts meanwhile."""
        self._soil(block, parts)

    @guarded
    def soil(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Note that `parts` of the block, whole pages, are dirty. For the undo of a snapshot."""
        self._soil(block, parts)

    def _soil(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        if block in self._clean:
            self._clean[block] = without(self._clean[block], *parts)

    # ------------------------------------------------------------------------------------------------ what is written

    @guarded
    def mark(self, block: RamBlock, offset: SupportsIndex, size: SupportsIndex) -> None:
        """Note that the process has written `[offset, offset + size)`, in bytes: their pages are dirty.

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
        """Note the pages that devices may have written through `mapper`'s mappings of the block since the last time.

        The kernel's record is lost with a mapping: collect before `mapper` is closed or leaves the list. A resize needs
        nothing, as all is dirty then. Writes through other mappings of the same memory are not seen.

        Raises ValueError where `mapper` does not follow the block or maps into another container than `tracking`'s, and
        the errors of `DirtyTracking.read`; the mapping that failed is then dirty. Cost: an ioctl for each mapping.
        """
        for given, kind in ((tracking, DirtyTracking), (mapper, DmaMapper)):
            if not isinstance(given, kind):
                raise TypeError(f"collect() needs a {kind.__name__}, not {given!r}")
        self._check_followed(block)
        if mapper.space is not tracking.container:
            raise ValueError("the mapper maps into another container than the one that is tracked")
        iova = mapper.iova(block)
        for mapping in mapper.space.mappings_in(iova=iova, size=block.max_length):
            self._collect(block, iova, tracking, mapping)

    def _collect(self, block: RamBlock, iova: Iova, tracking: DirtyTracking, mapping: Mapping) -> None:
        before = self._clean.get(block, [])
        # First, since the kernel forgets what it tells: nobody would know of it if this did not come to its end.
        self._soil(block, [_pages(block, mapping.iova - iova, mapping.iova - iova + mapping.size)])
        found = tracking.read(iova=mapping.iova, size=mapping.size)
        if before:
            written = [_pages(block, dirty.start - iova, dirty.last + 1 - iova) for dirty in found.dirty]
            self._clean[block] = without(before, *written)

    # ------------------------------------------------------------------------------------------------ what is dirty

    def snapshot(self, block: RamBlock, *, clear: bool = False) -> DirtyBlock:
        """Return the pages that are dirty now. `clear`: they are clean from now on; copy them after that, not before.

        Raises ValueError when it is not a block of this list, ClosedError.
        """
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
            raise ClosedError("this log has been taken out of the list that it followed, and is told nothing more")
        if self._blocks.block_at(block.vaddr) is not block:
            raise ValueError(f"RAM block '{block.idstr}' is not in the list that this log follows")

    @closing
    def close(self) -> None:
        """Leave the list. Twice is fine, and in a forked child nothing happens."""
        if self._blocks is None:
            return
        if self._blocks.knows(self):  # else it was taken out
            self._blocks.remove_notifier(self)
        close_now(self._claim)
        self._blocks = None

    def _check(self) -> None:
        for block, clean in self._clean.items():
            assert clean == clip(sorted(clean), 0, block.max_length)
            assert all(one.end <= other.start for one, other in itertools.pairwise(clean))
            assert not any(edge % block.page_size for extent in clean for edge in extent)


def _pages(block: RamBlock, start: int, end: int) -> Extent:
    """The whole pages that [start, end) lies in; none where that is empty."""
    if start >= end:
        return Extent(start, start)
    return Extent(align_down(start, block.page_size), align_up(end, block.page_size))
