"""Which pages of a block a device may have written, while it does and when they go."""

from __future__ import annotations

from pyvfio import DirtyTracking
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw.rig import Rig, pattern


def test_what_is_mapped_may_have_been_written(rig: Rig) -> None:
    """All of a block, and of it as it grows and shrinks; whatever the device does, it goes on."""
    block = rig.blocks.add("ring", used_length=8 * PAGE_SIZE, max_length=MIB)
    iova = rig.mapper.iova(block)
    with DirtyTracking(rig.container) as tracking:
        rig.device_writes(iova, pattern())
        for length in (8, 12, 2):
            block.resize(length * PAGE_SIZE)
            found = tracking.read(iova=iova, size=MIB)
            assert (found.pages, found.count) == (length, length)
            assert [(dirty.start, dirty.size) for dirty in found.dirty] == [(iova, length * PAGE_SIZE)]
        assert rig.reaches(block, 0)


def test_the_last_word_on_what_was_written_comes_with_the_unmap(rig: Rig) -> None:
    """Of memory of the caller's own; then it is out of reach."""
    block = rig.blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=4 * PAGE_SIZE)
    iova = rig.container.reserve_iova(4 * PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
    for page in (0, 2):
        rig.container.map(vaddr=block.vaddr + page * PAGE_SIZE, iova=iova + page * PAGE_SIZE, size=PAGE_SIZE)
    with DirtyTracking(rig.container) as tracking:
        found = tracking.unmap(iova=iova, size=4 * PAGE_SIZE)
    assert [(dirty.start - iova, dirty.size) for dirty in found.dirty] == [(0, PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE)]
    assert rig.device_reads(iova) is None
    rig.container.release_iova(iova)
