"""A device reads and writes a RAM block through every kind of resize, and is stopped one page outside it."""

from __future__ import annotations

import ctypes
import mmap

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import Kernel
from pyvfio.testing.probe import PageWitness
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig, pattern

RESIZES = [
    pytest.param(0, 2 * MIB, id="from nothing"),
    pytest.param(2 * MIB, 4 * MIB, id="grown"),
    pytest.param(4 * MIB, 2 * MIB, id="shrunk"),
    pytest.param(2 * MIB, 2 * MIB + PAGE_SIZE, id="grown by one page"),
    pytest.param(2 * MIB + PAGE_SIZE, 2 * MIB, id="shrunk by one page"),
    pytest.param(PAGE_SIZE, 64 * MIB, id="grown far"),
    pytest.param(64 * MIB, PAGE_SIZE, id="shrunk far"),
]


@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_the_device_reaches_all_of_a_block_before_and_after_a_resize(rig: Rig, old: int, new: int) -> None:
    """The first and the last bytes in use are read and written by the device, before and after."""
    block = rig.blocks.add("ring", used_length=old, max_length=GIB)
    iova = rig.mapper.iova(block)
    if old:
        assert rig.reaches(block, 0)
        assert rig.reaches(block, old - SIZE)
    block.resize(new)
    assert rig.mapper.iova(block) == iova, "the IOVA of a block never moves"
    assert rig.reaches(block, 0)
    assert rig.reaches(block, new - SIZE)
    rig.mapper._check()


def test_what_was_in_a_block_before_a_resize_is_there_for_the_device_after_it(rig: Rig) -> None:
    """Growing and shrinking keep the contents that stay in use."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    kept = pattern()
    with block.view() as view:
        view[MIB : MIB + SIZE] = kept
    for length in (4 * MIB, 2 * MIB, 64 * MIB, MIB + PAGE_SIZE):
        block.resize(length)
        assert rig.device_reads(rig.mapper.iova(block) + MIB) == kept


@pytest.mark.real_kernel("a fake reaches memory by virtual address and pins no physical page")
def test_a_page_that_was_given_back_is_out_of_the_devices_reach(rig: Rig) -> None:
    """A witness holds the physical page: before the shrink the device's write is seen in it, after it is not."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    iova = rig.mapper.iova(block) + MIB
    before, sent, after = pattern(), pattern(), pattern()
    with block.view() as view:
        view[MIB : MIB + SIZE] = before
    control, witness = PageWitness(block.vaddr + MIB), PageWitness(block.vaddr + MIB)
    rig.device_writes(iova, sent)
    assert control.look()[:SIZE] == sent, "the witness must see what the device writes while it may"
    block.resize(MIB)
    rig.device_writes(iova, after)
    assert witness.look()[:SIZE] == sent


def test_one_page_outside_a_block_is_stopped_and_works_again_after_regrowth(rig: Rig) -> None:
    """Behind used_length, before and after the block was ever that long, and again once it has shrunk."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    outside = rig.mapper.iova(block) + 2 * MIB
    assert rig.device_reads(outside) is None
    block.resize(2 * MIB + PAGE_SIZE)
    assert rig.reaches(block, 2 * MIB)
    block.resize(2 * MIB)
    assert rig.device_reads(outside) is None
    rig.device_writes(outside, pattern())
    block.resize(4 * MIB)
    with block.view() as view:
        assert bytes(view[2 * MIB : 2 * MIB + SIZE]) == bytes(SIZE), "regrown memory reads zero"
    assert rig.reaches(block, 2 * MIB)


@pytest.mark.parametrize("offset", [4 * MIB, 512 * MIB, GIB - PAGE_SIZE], ids=["behind", "middle", "last page"])
def test_the_reserved_tail_of_a_block_is_stopped(rig: Rig, offset: int) -> None:
    """IOVA that is reserved for growth reaches nothing."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    assert rig.device_reads(rig.mapper.iova(block) + offset) is None


def test_a_removed_block_is_stopped_and_its_iova_is_used_again(rig: Rig) -> None:
    """After removal the device reaches nothing there, until another block has the place."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    iova = rig.mapper.iova(block)
    with block.view() as view:
        view[:SIZE] = pattern()
    block.remove()
    assert rig.device_reads(iova) is None
    other = rig.blocks.add("other", used_length=2 * MIB, max_length=GIB)
    assert rig.mapper.iova(other) == iova
    assert rig.reaches(other, 0)


def test_a_block_shrunk_to_nothing_is_stopped_whole(rig: Rig) -> None:
    """used_length 0 is a length like others, both ways."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    with block.view() as view:
        view[:SIZE] = pattern()
    block.resize(0)
    assert rig.device_reads(rig.mapper.iova(block)) is None
    block.resize(PAGE_SIZE)
    assert rig.reaches(block, 0)


def test_an_isolated_access_one_page_outside_is_a_fault_in_the_kernels_log(rig: Rig, world: World) -> None:
    """The data shows that it was stopped, and the kernel says so, where the IOMMU tells it."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    outside = rig.mapper.iova(block) + 2 * MIB
    lines: list[str] = []
    # Of the faults that earlier tests have made, kernels log ten in five seconds and swallow the rest
    # (DEFAULT_RATELIMIT_INTERVAL): where this one was swallowed, the next is on its own.
    for _ in range(2 if world.logs_faults else 1):
        with world.watch_faults() as log:
            rig.device_writes(outside, pattern())
            lines = lines or log.lines(timeout=6.0)
    assert bool(lines) == world.logs_faults, lines
    assert rig.device_reads(outside) is None
    block.resize(2 * MIB + PAGE_SIZE)
    with block.view() as view:
        assert bytes(view[2 * MIB : 2 * MIB + SIZE]) == bytes(SIZE)


def test_memory_that_is_mapped_for_reading_is_not_written(rig: Rig) -> None:
    """write=False lets the device read, and read only."""
    page, there = rig.blocks.kernel.mmap(0, PAGE_SIZE, 3, 0x22), pattern()
    ctypes.memmove(page, there, SIZE)
    with rig.mapper.map_dma(vaddr=page, size=PAGE_SIZE, write=False) as mapping:
        rig.device_writes(mapping.iova, pattern())
        assert ctypes.string_at(page, SIZE) == there
        assert rig.device_reads(mapping.iova) == there
    rig.blocks.kernel.munmap(page, PAGE_SIZE)


@pytest.mark.only_type1("iommufd has one kind of address space")
def test_a_block_of_type1_v1_is_resized_as_one_of_v2_is(engine_bdfs: tuple[str, ...], kernel: Kernel) -> None:
    """The old type1, which unmaps by other rules, does for resizing too."""
    with Rig(engine_bdfs[0], kernel=kernel, iommu_type=ioctls.VFIO_TYPE1_IOMMU) as rig:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
        for length in (4 * MIB, PAGE_SIZE, 0, 2 * MIB):
            block.resize(length)
            rig.mapper._check()
        assert rig.reaches(block, 2 * MIB - SIZE)
        assert rig.device_reads(rig.mapper.iova(block) + 2 * MIB) is None


def test_the_device_reaches_a_block_above_4_gib_of_iova(engine_bdfs: tuple[str, ...], kernel: Kernel) -> None:
    """A block whose IOVA needs more than 32 bits."""
    with Rig(engine_bdfs[0], kernel=kernel, place=5 * GIB) as rig:
        block = rig.blocks.add("high", used_length=2 * MIB, max_length=GIB)
        assert rig.mapper.iova(block) == 5 * GIB
        assert rig.reaches(block, 0)
        block.resize(4 * MIB)
        assert rig.reaches(block, 4 * MIB - SIZE)
        assert rig.device_reads(5 * GIB + 4 * MIB) is None


def test_a_block_lies_where_the_iommu_can_use_large_pages(rig: Rig) -> None:
    """IOVA and vaddr are congruent modulo 2 MiB, also after a block that is smaller."""
    rig.blocks.add("small", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    assert (rig.mapper.iova(block) - block.vaddr) % (2 * MIB) == 0


def test_every_range_of_the_iommu_is_reached_from_its_first_page_to_its_last(rig: Rig) -> None:
    """In each range that the kernel reports, what is mapped at either end can be read by the device."""
    block = rig.blocks.add("source", used_length=2 * PAGE_SIZE, max_length=2 * PAGE_SIZE)
    desk = rig.mapper.iova(rig.blocks["desk"])
    for offered in rig.space.iova_ranges:
        for iova in (offered.start, offered.last + 1 - PAGE_SIZE):
            there = pattern()
            with block.view() as view:
                view[:SIZE] = there
            assert desk < iova or desk >= iova + PAGE_SIZE
            rig.space.map(vaddr=block.vaddr, iova=iova, size=PAGE_SIZE)
            assert rig.device_reads(iova) == there
            rig.space.unmap(iova=iova, size=PAGE_SIZE)
            assert rig.device_reads(iova) is None


def test_a_failed_resize_leaves_the_device_what_it_had(rig: Rig) -> None:
    """Where something is in the way of the new mapping, the old one is there again, and works."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=4 * MIB)
    iova = rig.mapper.iova(block)
    stranger = rig.blocks.add("stranger", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
    rig.space.map(vaddr=stranger.vaddr, iova=iova + 3 * MIB, size=PAGE_SIZE)
    with pytest.raises(pyvfio.IovaOverlapError) as caught:
        block.resize(4 * MIB)
    assert [existing.start for existing in caught.value.existing] == [iova + 3 * MIB]
    assert block.used_length == 2 * MIB
    assert rig.reaches(block, 2 * MIB - SIZE)
    rig.space.unmap(iova=iova + 3 * MIB, size=PAGE_SIZE)
    block.resize(4 * MIB)
    assert rig.reaches(block, 4 * MIB - SIZE)


def test_the_device_finds_the_bytes_of_memory_in_its_segments(rig: Rig) -> None:
    """Of a part of a block that crosses pages, one after the other, as a PRP list has them; and of a buffer."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    there, start = pattern(), MIB - SIZE // 2
    with block.view(start, SIZE) as view:
        view[:] = there
    segments = rig.mapper.segments(block, start, SIZE, boundary=PAGE_SIZE)
    assert [size for _iova, size in segments] == [SIZE // 2, SIZE // 2]
    found = [rig.device_reads(iova) for iova, _size in segments]
    assert b"".join(got[: SIZE // 2] for got in found if got is not None) == there
    with mmap.mmap(-1, 2 * PAGE_SIZE) as buffer, rig.mapper.map_buffer(buffer):
        buffer[PAGE_SIZE : PAGE_SIZE + SIZE] = there
        ((iova, size),) = rig.mapper.segments(buffer, PAGE_SIZE, SIZE)
        assert (rig.device_reads(iova), size) == (there, SIZE)


def test_rings_are_remapped_beside_buffers_in_granules(engine_bdfs: tuple[str, ...], kernel: Kernel) -> None:
    """In one mapper, each under its own policy, and the device reaches both through every length."""
    granules = pyvfio.Policy("extend", granule=MIB)
    chosen = {"buffers": granules}
    with Rig(engine_bdfs[0], kernel=kernel, policy_of=lambda block: chosen.get(block.idstr)) as rig:
        ring = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB)
        buffers = rig.blocks.add("buffers", used_length=2 * MIB, max_length=8 * MIB)
        ring.resize(3 * PAGE_SIZE)
        buffers.resize(4 * MIB)
        assert len(rig.space.mappings) == 1 + 1 + 4
        assert rig.reaches(ring, 3 * PAGE_SIZE - SIZE)
        assert rig.reaches(buffers, 4 * MIB - SIZE)
        with buffers.view(0, MIB) as view:
            buffers.resize(MIB)  # down to the end of what is in view
            view[:SIZE] = there = pattern()
            assert rig.device_reads(rig.mapper.iova(buffers)) == there
        assert rig.device_reads(rig.mapper.iova(buffers) + MIB) is None


def test_a_buffer_of_the_callers_own_is_reached_until_it_is_closed(rig: Rig) -> None:
    """map_buffer, map_dma and a temporary mapping all let the device in, and then no more."""
    memory = rig.blocks.kernel.mmap(0, 2 * PAGE_SIZE, 3, 0x22)
    try:
        there = pattern()
        with rig.mapper.map_dma(vaddr=memory, size=2 * PAGE_SIZE) as mapping:
            rig.device_writes(mapping.iova + PAGE_SIZE, there)
            assert rig.device_reads(mapping.iova + PAGE_SIZE) == there
            iova = mapping.iova
        assert rig.device_reads(iova + PAGE_SIZE) is None
        with rig.mapper.map_dma(vaddr=memory, size=2 * PAGE_SIZE, iova=7 * GIB) as mapping:
            assert rig.device_reads(7 * GIB + PAGE_SIZE) == there
    finally:
        rig.blocks.kernel.munmap(memory, 2 * PAGE_SIZE)


@pytest.mark.parametrize("bits", [None, 32, 64], ids=["39 bits", "32 bits", "limit lifted"])
def test_temporary_mappings_come_from_the_top_and_go_with_a_reset(
    engine_bdfs: tuple[str, ...], kernel: Kernel, bits: int | None
) -> None:
    """Of the address bits that the device has. A given-up mapping is reached until the reset, and not after it."""
    with Rig(engine_bdfs[0], kernel=kernel, dma_bits=bits) as rig, mmap.mmap(-1, PAGE_SIZE) as buffer:
        assert rig.mapper.dma_bits == bits or bits is None
        buffer[:SIZE] = there = pattern()
        temporary = rig.mapper.map_temporary(buffer)
        ranges, limit = rig.space.iova_ranges, 1 << rig.mapper.dma_bits
        top = max(min(offered.last + 1, limit) for offered in ranges if offered.start < limit)
        assert temporary.iova == top - PAGE_SIZE
        assert rig.device_reads(temporary.iova) == there
        temporary.close()
        assert rig.mapper.reset_temporary() == 0
        assert rig.device_reads(temporary.iova) is None
