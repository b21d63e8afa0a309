"""Two devices in two groups: one address space that they share, or one each."""

from __future__ import annotations

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import Kernel
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig, pattern
from tests.spaces import AddressSpace


@pytest.fixture
def two(engine_bdfs: tuple[str, ...]) -> tuple[str, str]:
    """Two devices with an engine."""
    if len(engine_bdfs) < 2:
        pytest.skip("this needs two devices with a DMA engine, in two groups")
    return engine_bdfs[0], engine_bdfs[1]


def test_two_groups_in_one_space_reach_the_same_block(
    two: tuple[str, str], kernel: Kernel, space: AddressSpace
) -> None:
    """What one device writes the other reads, before and after a resize, and both are stopped behind it."""
    with Rig(two[0], kernel=kernel, space=space) as one, Rig(two[1], kernel=kernel, space=space) as other:
        assert one.device.group_number != other.device.group_number
        block = one.blocks.add("shared", used_length=2 * MIB, max_length=GIB)
        iova = one.mapper.iova(block)
        for length in (2 * MIB, 4 * MIB, MIB):
            block.resize(length)
            sent = pattern()
            one.device_writes(iova + length - SIZE, sent)
            assert other.device_reads(iova + length - SIZE) == sent
            assert one.device_reads(iova + length) is None
            assert other.device_reads(iova + length) is None


def test_a_group_that_comes_later_reaches_what_is_mapped_already(
    two: tuple[str, str], kernel: Kernel, space: AddressSpace
) -> None:
    """Ranges are read anew, reservations still hold, and existing mappings count for the new group."""
    with Rig(two[0], kernel=kernel, space=space) as one:
        block = one.blocks.add("shared", used_length=2 * MIB, max_length=GIB)
        there = pattern()
        with block.view() as view:
            view[:SIZE] = there
        with Rig(two[1], kernel=kernel, space=space) as other:
            assert other.device_reads(one.mapper.iova(block)) == there
        assert one.device_reads(one.mapper.iova(block)) == there


def test_a_space_each_keeps_two_groups_apart(two: tuple[str, str], kernel: Kernel) -> None:
    """A device does not reach what is mapped for another group's space at the same IOVA."""
    with Rig(two[0], kernel=kernel) as one, Rig(two[1], kernel=kernel) as other:
        block = one.blocks.add("mine", used_length=2 * MIB, max_length=GIB)
        with block.view() as view:
            view[:SIZE] = pattern()
        assert other.device_reads(one.mapper.iova(block)) is None
        assert one.reaches(block, 0)


def test_a_device_is_opened_once_at_a_time(two: tuple[str, str], space: AddressSpace) -> None:
    """The second try leaves the first device as it is."""
    first = pyvfio.open_device(two[0], space=space)
    with pytest.raises(pyvfio.VfioError, match="is open already in "):
        pyvfio.open_device(two[0], space=space)
    assert first.config.read16(0) == 0x1234
    first.close()
    pyvfio.open_device(two[0], space=space).close()


@pytest.mark.only_type1("a device of iommufd opens no group")
def test_a_group_goes_with_its_last_device(two: tuple[str, str], kernel: Kernel) -> None:
    """Anybody can open it then."""
    with pyvfio.Container(kernel=kernel) as container:
        first = pyvfio.open_device(two[0], container=container)
        first.close()
        assert container.groups == {}
        pyvfio.Group(first.group.number, kernel=kernel).close()
        pyvfio.open_device(two[0], container=container).close()


@pytest.mark.only_type1("a device of iommufd opens no group, and mappings stay without a device")
def test_the_last_group_does_not_leave_while_a_device_reaches_memory(bdf: str, kernel: Kernel) -> None:
    """Refused by `close` as by `detach`: the transfers go on. Without mappings it leaves with its device."""
    with pyvfio.Container(kernel=kernel) as container:
        with Rig(bdf, kernel=kernel, space=container) as rig:
            group = rig.device.group
            block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
            for leave in (group.close, lambda: container.detach(group)):
                with pytest.raises(pyvfio.VfioError, match=r"last group of the container, with \d+ mappings? left"):
                    leave()
            assert rig.reaches(block, 0)
        assert container.groups == {}
        assert not container.lost
        with Rig(bdf, kernel=kernel, space=container) as again:
            assert again.reaches(again.blocks.add("ring", used_length=MIB, max_length=GIB), 0)


@pytest.mark.only_type1("a device of iommufd opens no group, and mappings stay without a device")
def test_a_last_group_that_left_past_its_container_is_noticed(bdf: str, world: World) -> None:
    """The kernel has unmapped everything then: nothing is locked, and the container says so."""
    locked = world.locked_bytes()
    with pyvfio.Container(kernel=world.kernel) as container, pyvfio.RamBlockList(kernel=world.kernel) as blocks:
        device = pyvfio.open_device(bdf, container=container)
        block = blocks.add("ring", used_length=2 * MIB, max_length=GIB)
        container.map(vaddr=block.vaddr, iova=MIB, size=2 * MIB)
        device.close()
        (group,) = container.groups.values()
        assert world.locked_bytes() - locked == 2 * MIB
        group.unset_container()
        assert container.lost
        assert world.locked_bytes() == locked
        assert not container.mappings
        group.close()


@pytest.mark.only_type1("the kernel counts the mappings of a container alone")
def test_after_an_unmap_past_the_container_its_table_is_what_the_kernel_has(bdf: str, kernel: Kernel) -> None:
    """By the number of mappings that the kernel counts; `unmap_all` ends them."""
    with pyvfio.open_device(bdf, kernel=kernel) as device, pyvfio.RamBlockList(kernel=kernel) as blocks:
        container = device.container
        block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=GIB)
        room = container.entries_left
        for number in range(4):
            offset = number * PAGE_SIZE
            container.map(vaddr=block.vaddr + offset, iova=MIB + offset, size=PAGE_SIZE)
        past = ioctls.vfio_iommu_type1_dma_unmap(24, 0, MIB + PAGE_SIZE, PAGE_SIZE)
        kernel.ioctl(container.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, past)
        with pytest.raises(pyvfio.UnmapSizeError):
            container.unmap(iova=MIB, size=2 * PAGE_SIZE)
        assert [m.iova for m in container.mappings] == [MIB + 2 * PAGE_SIZE, MIB + 3 * PAGE_SIZE]
        assert container.get_info().dma_avail == room - 2
        container.map_dma(vaddr=block.vaddr, iova=MIB, size=PAGE_SIZE)
        container.unmap_dma(iova=MIB + 2 * PAGE_SIZE, size=8 * PAGE_SIZE)
        assert [m.iova for m in container.mappings] == [MIB]
        assert container.get_info().dma_avail == room - 1
        assert container.unmap_all() == PAGE_SIZE
        assert container.get_info().dma_avail == room
