"""Which pages of a block a device may have written, while it does and when they go."""

from __future__ import annotations

import pytest

from pyvfio import DirtyLog, DirtyTracking
from pyvfio.kernel import Kernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw.rig import Rig, pattern

pytestmark = pytest.mark.only_type1("the bitmap of dirty pages is that of a container")


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
    iova = rig.space.reserve_iova(4 * PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
    for page in (0, 2):
        rig.space.map(vaddr=block.vaddr + page * PAGE_SIZE, iova=iova + page * PAGE_SIZE, size=PAGE_SIZE)
    with DirtyTracking(rig.container) as tracking:
        found = tracking.unmap(iova=iova, size=4 * PAGE_SIZE)
    assert [(dirty.start - iova, dirty.size) for dirty in found.dirty] == [(0, PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE)]
    assert rig.device_reads(iova) is None
    rig.space.release_iova(iova)


def test_what_a_device_writes_is_dirty_after_a_resize_and_after_a_clear(rig: Rig) -> None:
    """In the snapshot of the block: all of it after a resize; after a clear nothing, until what was written since is
    collected."""
    block = rig.blocks.add("ring", used_length=8 * PAGE_SIZE, max_length=MIB)
    iova = rig.mapper.iova(block)
    with DirtyLog(rig.blocks) as log, DirtyTracking(rig.container) as tracking:
        for length in (12, 4):
            block.resize(length * PAGE_SIZE)
            assert log.snapshot(block, clear=True).dirty == ((0, length * PAGE_SIZE),)
            assert log.snapshot(block).count == 0
            rig.device_writes(iova + PAGE_SIZE, pattern())
            log.collect(block, tracking, rig.mapper)
            start, end = log.snapshot(block).dirty[0]
            assert start <= PAGE_SIZE < 2 * PAGE_SIZE <= end
        block.discard(0, PAGE_SIZE)
        log.collect(block, tracking, rig.mapper)
        assert log.snapshot(block).dirty == ((PAGE_SIZE, 4 * PAGE_SIZE),)


@pytest.mark.parametrize("granule", [None, PAGE_SIZE], ids=["remap", "granules"])
def test_a_copy_of_what_is_dirty_is_the_block(
    engine_bdfs: tuple[str, ...], kernel: Kernel, granule: int | None
) -> None:
    """Though the device goes on writing while it is made, and the block grows and shrinks: nothing is copied but what a
    snapshot names."""
    copy = bytearray(MIB)
    with Rig(engine_bdfs[0], kernel=kernel, resize="extend" if granule else "remap", granule=granule) as rig:
        block = rig.blocks.add("ring", used_length=8 * PAGE_SIZE, max_length=MIB)
        iova = rig.mapper.iova(block)
        with DirtyLog(rig.blocks) as log, DirtyTracking(rig.container) as tracking:
            for turn, length in enumerate((8, 12, 12, 3, 8, 8)):
                block.resize(length * PAGE_SIZE)
                rig.device_writes(iova + turn % 3 * PAGE_SIZE, pattern())
                log.collect(block, tracking, rig.mapper)
                rig.device_writes(iova + (turn + 1) % 3 * PAGE_SIZE, pattern())
                found = log.snapshot(block, clear=True)
                rig.device_writes(iova + (turn + 2) % 3 * PAGE_SIZE, pattern())
                with block.view() as view:
                    for start, end in found.dirty:
                        copy[start:end] = view[start:end]
                rig.device_writes(iova + turn % 2 * PAGE_SIZE, pattern())
            log.collect(block, tracking, rig.mapper)
            with block.view() as view:
                for start, end in log.snapshot(block, clear=True).dirty:
                    copy[start:end] = view[start:end]
                assert bytes(view) == copy[: block.used_length]
