"""Two mappings of the same memory: a device reaches it until the last one is closed, and nothing else in its place."""

from __future__ import annotations

import mmap
from functools import partial
from typing import Literal

import pytest

import pyvfio
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig, pattern


@pytest.mark.parametrize("temporary", [False, True], ids=["fixed", "temporary"])
def test_two_holders_of_a_buffer_each_keep_it_within_the_devices_reach(rig: Rig, *, temporary: bool) -> None:
    """One of all of it and one of a part, closed in that order; another buffer that comes meanwhile is apart."""
    with mmap.mmap(-1, MIB) as memory, mmap.mmap(-1, MIB) as other:
        whole = rig.mapper.map_buffer(memory)
        with memoryview(memory) as view, view[PAGE_SIZE : 2 * PAGE_SIZE] as page:
            part = rig.mapper.map_temporary(page) if temporary else rig.mapper.map_buffer(page)
        assert part.iova == whole.iova + PAGE_SIZE
        whole.close()
        there, sent = pattern(), pattern()
        other[:SIZE] = there
        with rig.mapper.map_buffer(other) as elsewhere:
            rig.device_writes(part.iova, sent)
            assert memory[PAGE_SIZE : PAGE_SIZE + SIZE] == sent
            assert other[SIZE:] == bytes(MIB - SIZE)
            assert rig.device_reads(elsewhere.iova) == there
            with pytest.raises(BufferError):
                memory.resize(2 * MIB)
        part.close()
        assert rig.device_reads(part.iova) is None
        memory.resize(2 * MIB)


@pytest.mark.parametrize("resize", ["remap", "extend"])
def test_a_block_keeps_a_part_that_is_mapped_within_the_devices_reach(
    rig: Rig, resize: Literal["remap", "extend"]
) -> None:
    """It cannot lose the part; once that mapping is closed it can, and the device is stopped there."""
    with (
        pyvfio.RamBlockList(kernel=rig.space.kernel) as blocks,
        pyvfio.DmaMapper(rig.space, blocks, resize=resize) as mapper,
    ):
        block = blocks.add("held", used_length=4 * PAGE_SIZE, max_length=MIB)
        with block.view() as view, view[2 * PAGE_SIZE : 3 * PAGE_SIZE] as page:
            mapping = mapper.map_buffer(page)
        for lose in (partial(block.resize, PAGE_SIZE), partial(block.discard, 0, 4 * PAGE_SIZE), block.remove):
            with pytest.raises(BufferError, match=repr(mapping)):
                lose()
            sent = pattern()
            rig.device_writes(mapping.iova, sent)
            with block.view() as view:
                assert bytes(view[2 * PAGE_SIZE : 2 * PAGE_SIZE + SIZE]) == sent
        block.resize(MIB)
        assert mapper.translate_vaddr(mapping.vaddr) == mapping.iova
        mapping.close()
        block.resize(PAGE_SIZE)
        assert rig.device_reads(mapping.iova) is None
