"""Notifiers that record their calls, compare the record with the truth, and refuse on demand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyvfio.extents import Extent
from pyvfio.ramblock import RamBlock
from pyvfio.units import PAGE_SIZE
from tests.life.model import BlockModel


class RefusalError(Exception):
    """A hook or a callback refuses."""


class Listener:
    """A notifier that reaches whole blocks.

    `truth`: the state of the blocks before the present change. `journal` gets the listener for each hook that returns.
    """

    careful = False

    def __init__(self, truth: Mapping[str, BlockModel], journal: list[Listener]) -> None:
        self.lengths: dict[str, int] = {}
        self.holes: dict[str, set[int]] = {}
        self.refuse_in = 0
        self.refused = False
        self._truth = truth
        self._journal = journal

    def _turn(self, block: RamBlock, length: int) -> None:
        assert length <= block.state.memory.length, "a listener was told of bytes that are no memory"
        if block.idstr in self._truth:
            model = self._truth[block.idstr]
            assert block.used_length == len(model.contents), "the block has changed before all were told"
            assert _pages(block.discarded) == model.discarded, "parts were discarded before all were told"
            with block.view() as view:
                assert bytes(view) == model.contents, "memory was given back before all were told"
        self.refuse_in -= 1
        if self.refuse_in == 0:
            self.refused = True
            raise RefusalError
        self._journal.append(self)

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Record a new block."""
        assert block.idstr not in self.lengths
        assert (used_length, max_length) == (block.used_length, block.max_length)
        self._turn(block, used_length)
        self.lengths[block.idstr], self.holes[block.idstr] = used_length, _pages(block.discarded)

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Record the removal of a block."""
        assert (self.lengths[block.idstr], block.max_length) == (used_length, max_length)
        self._turn(block, used_length)
        del self.lengths[block.idstr], self.holes[block.idstr]

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Record a new length."""
        assert self.lengths[block.idstr] == old_length
        self._turn(block, max(old_length, new_length))
        self.lengths[block.idstr] = new_length


class CarefulListener(Listener):
    """A notifier that follows discards, populates and remaps of parts."""

    careful = True

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Record a new length. Holes behind the new end are forgotten, and return only with an undo."""
        super().ram_block_resized(block, old_length, new_length)
        holes = self._truth[block.idstr].discarded
        self.holes[block.idstr] = {page for page in holes if page < new_length // PAGE_SIZE}

    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Record holes, all of which must have been populated."""
        pages = _pages(parts)
        assert pages, "a listener was told of nothing"
        assert not pages & self.holes[block.idstr]
        self._turn(block, parts[-1].end)
        self.holes[block.idstr] |= pages

    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Record populated pages, all of which must have been holes."""
        pages = _pages(parts)
        assert pages, "a listener was told of nothing"
        assert pages <= self.holes[block.idstr]
        self._turn(block, parts[-1].end)
        self.holes[block.idstr] -= pages

    def ram_block_remapping(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Check that all pages are populated."""
        assert _pages(parts), "a listener was told of nothing"
        assert not _pages(parts) & self.holes[block.idstr]
        self._turn(block, parts[-1].end)

    def ram_block_remapped(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Check that all pages are still populated, with new contents, or with the old contents after a refusal."""
        assert not _pages(parts) & self.holes[block.idstr]
        self._journal.append(self)


def _pages(parts: Sequence[Extent]) -> set[int]:
    return {page for part in parts for page in range(part.start // PAGE_SIZE, part.end // PAGE_SIZE)}
