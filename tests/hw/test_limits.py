"""What the kernel refuses: locked memory, entries, overlaps, bisecting unmaps, ranges; and what is left then."""

from __future__ import annotations

import errno
import mmap
from itertools import pairwise

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import Kernel
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, PAGE_SIZE, U64_MAX
from tests.hw.rig import SIZE, Rig, pattern


def test_a_resize_above_the_memlock_limit_is_refused_with_the_numbers(rig: Rig, world: World) -> None:
    """The block stays as it was, for the process and for the device, and nothing more is pinned."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    before = world.locked_bytes()
    with world.memlock_limit(8 * MIB):
        with pytest.raises(pyvfio.PinLimitError, match="RLIMIT_MEMLOCK") as caught:
            block.resize(16 * MIB)
        assert (caught.value.limit, caught.value.asked) == (8 * MIB, 16 * MIB)
        assert caught.value.errno == errno.ENOMEM
        assert "ulimit -l" in caught.value.hint
    assert block.used_length == 2 * MIB
    assert world.locked_bytes() == before
    assert rig.reaches(block, 2 * MIB - SIZE)
    block.resize(16 * MIB)
    assert rig.reaches(block, 16 * MIB - SIZE)


def test_a_resize_in_granules_above_the_memlock_limit_is_refused_with_the_numbers_of_all_of_it(
    engine_bdfs: tuple[str, ...], world: World
) -> None:
    """Some of its granules fit, and are gone again."""
    with Rig(engine_bdfs[0], kernel=world.kernel, resize="extend", granule=MIB) as rig:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
        before = world.locked_bytes()
        with world.memlock_limit(8 * MIB):
            with pytest.raises(pyvfio.PinLimitError, match="RLIMIT_MEMLOCK") as caught:
                block.resize(16 * MIB)
            assert (caught.value.limit, caught.value.used, caught.value.asked) == (8 * MIB, before, 14 * MIB)
        assert world.locked_bytes() == before
        assert rig.reaches(block, 2 * MIB - SIZE)


def test_what_is_mapped_is_locked_and_nothing_else(rig: Rig, world: World) -> None:
    """The kernel's count follows used_length, not max_length."""
    before = world.locked_bytes()
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=64 * GIB)
    assert world.locked_bytes() - before == 2 * MIB
    block.resize(8 * MIB)
    assert world.locked_bytes() - before == 8 * MIB
    block.resize(PAGE_SIZE)
    assert world.locked_bytes() - before == PAGE_SIZE
    block.remove()
    assert world.locked_bytes() == before


@pytest.mark.only_type1("an I/O address space takes any number of mappings")
def test_the_last_entry_is_followed_by_a_clear_refusal(engine_bdfs: tuple[str, ...], world: World) -> None:
    """ENOSPC says how many mappings there may be; temporary ones that are given up make room by themselves."""
    with world.dma_entry_limit(4), Rig(engine_bdfs[0], kernel=world.kernel) as rig:
        assert rig.space.entries_left == 3  # the rig has one
        blocks = [rig.blocks.add(f"b{i}", used_length=PAGE_SIZE, max_length=MIB) for i in range(2)]
        buffer = mmap.mmap(-1, PAGE_SIZE)
        temporary = rig.mapper.map_temporary(buffer)
        assert rig.space.entries_left == 0
        with pytest.raises(pyvfio.EntryLimitError, match="all 4 mappings") as caught:
            rig.blocks.add("one too many", used_length=PAGE_SIZE, max_length=MIB)
        assert (caught.value.limit, caught.value.used) == (4, 4)
        assert len(rig.blocks) == 3
        temporary.close()
        last = rig.blocks.add("fits now", used_length=PAGE_SIZE, max_length=MIB)
        assert rig.reaches(last, 0)
        assert rig.reaches(blocks[0], 0)
        buffer.close()


@pytest.mark.real_kernel("65,536 mappings take a fake a minute")
@pytest.mark.only_iommufd("a container takes no more mappings than a parameter allows")
def test_a_space_takes_more_mappings_than_a_container(rig: Rig) -> None:
    """One more than the usual limit of type1, in granules of a page; the device reaches the last one."""
    assert rig.space.entries_left is None
    pages = 65_536
    with (
        pyvfio.RamBlockList(kernel=rig.space.kernel) as blocks,
        pyvfio.DmaMapper(rig.space, blocks, resize="extend", granule=PAGE_SIZE) as mapper,
    ):
        block = blocks.add("ring", used_length=pages * PAGE_SIZE, max_length=pages * PAGE_SIZE)
        assert len(rig.space.mappings) == pages + 1  # the rig has one
        with block.view() as view:
            view[-SIZE:] = there = pattern()
        assert rig.device_reads(mapper.iova(block) + pages * PAGE_SIZE - SIZE) == there


def test_an_overlap_is_refused_and_says_what_is_there(rig: Rig) -> None:
    """EEXIST, with the mapping that is in the way."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=2 * MIB)
    iova = rig.mapper.iova(block)
    with pytest.raises(pyvfio.IovaOverlapError) as caught:
        rig.space.map(vaddr=block.vaddr, iova=iova + MIB, size=2 * MIB)
    assert caught.value.errno == errno.EEXIST
    assert caught.value.existing == (pyvfio.IovaRange.of(iova=iova, size=2 * MIB),)


@pytest.mark.only_type1("the two versions of type1 differ; test_cuts says it of iommufd")
@pytest.mark.parametrize("iommu_type", [ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU], ids=["v1", "v2"])
def test_an_unmap_that_cuts_a_mapping_in_two_is_never_taken_for_done(
    engine_bdfs: tuple[str, ...], kernel: Kernel, iommu_type: ioctls.VfioExtension
) -> None:
    """The kernel refuses on v2; on v1 it unmaps nothing, or more, and answers success. `unmap` makes no such call."""
    with Rig(engine_bdfs[0], kernel=kernel, iommu_type=iommu_type) as rig:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=2 * MIB)
        iova = rig.mapper.iova(block)
        v1 = iommu_type == ioctls.VFIO_TYPE1_IOMMU
        with pytest.raises(pyvfio.UnmapSizeError, match="Nothing has been unmapped"):
            rig.space.unmap(iova=iova + MIB, size=MIB)
        assert rig.reaches(block, 0)
        if v1:
            assert rig.container.unmap_dma(iova=iova, size=PAGE_SIZE) == 2 * MIB
            rig.container.map_dma(vaddr=block.vaddr, iova=iova, size=2 * MIB)
        else:
            with pytest.raises(pyvfio.IoctlError) as caught:
                rig.container.unmap_dma(iova=iova, size=PAGE_SIZE)
            assert caught.value.errno == errno.EINVAL


def test_a_mapping_outside_the_ranges_is_refused_with_the_ranges(rig: Rig) -> None:
    """In the window of message-signalled interrupts, across its edge, and above the top."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=2 * MIB)
    ranges = rig.space.iova_ranges
    for iova in (0xFEE00000, ranges[0].last + 1 - PAGE_SIZE):
        with pytest.raises(pyvfio.IovaRangeError) as caught:
            rig.space.map(vaddr=block.vaddr, iova=iova, size=2 * PAGE_SIZE)
        assert caught.value.ranges == ranges
        assert str(ranges[0]) in str(caught.value)


@pytest.mark.only_type1("the kernel counts the mappings of a container alone")
def test_the_last_page_of_64_bits_is_mapped_only_where_it_can_be_unmapped_again(rig: Rig) -> None:
    """Kernels up to 6.12 map it, and then unmap nothing at all when everything is to go."""
    block = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
    container, iova = rig.container, U64_MAX + 1 - PAGE_SIZE
    if container.iova_ranges[-1].last == U64_MAX:
        container.map(vaddr=block.vaddr, iova=iova, size=PAGE_SIZE)
    else:
        with pytest.raises(pyvfio.IovaRangeError):
            container.map(vaddr=block.vaddr, iova=iova, size=PAGE_SIZE)
    asked = sum(mapping.size for mapping in container.mappings)
    assert container.unmap_all() == asked > PAGE_SIZE
    assert container.get_info().dma_avail == container.entry_limit, "the kernel has nothing mapped any more"


def test_what_lies_between_the_ranges_is_what_the_group_has_reserved(device: pyvfio.Device, kernel: Kernel) -> None:
    """As sysfs lists it: no more, and no less, but for memory that is reserved until a driver takes the device."""
    group = kernel.sysfs / f"kernel/iommu_groups/{device.group_number}/reserved_regions"
    lines = [line.split() for line in group.read_text(encoding="ascii").splitlines()]
    reserved = [(int(start, 16), int(last, 16)) for start, last, kind in lines if kind != "direct-relaxable"]
    ranges = device.space.iova_ranges
    for start, last in reserved:
        assert not any(found.start <= last and start <= found.last for found in ranges), hex(start)
    between = {(before.last + 1, after.start - 1) for before, after in pairwise(ranges)}
    assert between <= set(reserved)


def test_memory_that_cannot_be_pinned_is_refused_with_what_is_there(rig: Rig) -> None:
    """EFAULT for the inaccessible tail of a block; the error shows the process's own mapping."""
    block = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=GIB)
    with pytest.raises(pyvfio.IoctlError, match="---p") as caught:
        rig.space.map(vaddr=block.vaddr + MIB, iova=9 * GIB, size=MIB)
    assert caught.value.errno == errno.EFAULT


def test_a_full_iova_space_is_refused_before_any_memory_is_mapped(engine_bdfs: tuple[str, ...], kernel: Kernel) -> None:
    """A block that no free range is long enough for ends in one error with the numbers, and is not there. The last
    range counts because the mapper lifts the limit of 39 bits."""
    with Rig(engine_bdfs[0], kernel=kernel, dma_bits=64) as rig:
        for free in rig.space.allocator.free_ranges:
            rig.space.reserve_iova_at(free.start, free.size)
        rig.space.release_iova(rig.space.allocator.reservations[-1].start)
        length = rig.space.allocator.largest_free
        rig.space.reserve_iova_at(rig.space.allocator.free_ranges[0].start, length - GIB)
        with pytest.raises(pyvfio.IovaRangeError, match="the longest free run has 1 GiB") as caught:
            rig.blocks.add("too long", used_length=PAGE_SIZE, max_length=GIB + PAGE_SIZE)
        assert caught.value.ranges == rig.space.iova_ranges
        assert caught.value.largest_free == GIB
        assert [block.idstr for block in rig.blocks] == ["desk"]


def test_room_above_the_address_bits_of_a_device_is_named_and_not_used(rig: Rig) -> None:
    """When all IOVAs of 39 bits are taken, the error has what is free above, which a wider mapper finds."""
    space, limit = rig.space, 1 << rig.mapper.dma_bits
    for free in space.allocator.free_ranges:
        if free.start < limit:
            space.reserve_iova_at(free.start, min(free.last + 1, limit) - free.start)
    above = space.allocator.largest_free
    with pytest.raises(pyvfio.IovaRangeError) as caught:
        rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=GIB)
    assert (caught.value.largest_free, caught.value.largest_free_above) == (0, above)
    assert ("dma_bits=39" in caught.value.message) == (above > 0)
    if above:
        with mmap.mmap(-1, PAGE_SIZE) as buffer, pyvfio.DmaMapper(space, dma_bits=64) as wide:
            buffer[:SIZE] = there = pattern()
            with wide.map_buffer(buffer) as mapping:
                assert mapping.iova >= limit
                assert rig.device_reads(mapping.iova) == there
