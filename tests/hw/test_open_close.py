"""Opening and closing a device: everything works in between, and nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import Kernel
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import Rig
from tests.spaces import descriptors_of
from tests.unit.processes import open_fds


def test_nothing_is_pinned_and_no_descriptor_is_open_after_close(bdf: str, world: World) -> None:
    """Blocks, mappings, interrupts and registers in use: closing the device alone takes them all away."""
    fds, locked = open_fds(), world.locked_bytes()
    device = pyvfio.open_device(bdf, kernel=world.kernel)
    blocks = pyvfio.RamBlockList(kernel=world.kernel)
    mapper = pyvfio.DmaMapper(device.space, blocks)
    for number in range(3):
        blocks.add(f"b{number}", used_length=2 * MIB, max_length=GIB)
    device.memory_enabled = True
    device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
    device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX).read32(0)
    assert world.locked_bytes() - locked == 6 * MIB
    device.close()
    assert world.locked_bytes() == locked
    assert open_fds() == fds
    blocks.close()
    mapper.close()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_closing_the_mapper_leaves_nothing_mapped(device: pyvfio.Device, world: World, count: int) -> None:
    """Odd or even number of blocks: nothing is pinned, and all entries are free again where the kernel counts them."""
    locked, entries = world.locked_bytes(), device.space.entries_left
    with pyvfio.RamBlockList(kernel=world.kernel) as blocks:
        mapper = pyvfio.DmaMapper(device.space, blocks)
        for number in range(count):
            blocks.add(f"b{number}", used_length=(number + 1) * PAGE_SIZE, max_length=MIB)
        assert device.space.entries_left == (None if entries is None else entries - count)
        mapper.close()
        assert device.space.entries_left == entries
        assert world.locked_bytes() == locked
        assert not device.space.mappings


def test_descriptors_are_close_on_exec(device: pyvfio.Device) -> None:
    """None of them is seen by a program that this process starts."""
    for fd in (*descriptors_of(device), *device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)):
        assert not os.get_inheritable(fd)


def test_a_group_that_is_open_is_refused_with_its_holder(device: pyvfio.Device, kernel: Kernel) -> None:
    """A second opener learns which process has it."""
    with pytest.raises(pyvfio.GroupBusyError, match=f"pid {os.getpid()}") as caught:
        pyvfio.open_device(device.bdf, kernel=kernel)
    assert [holder.pid for holder in caught.value.holders] == [os.getpid()]


def test_a_device_can_be_opened_again_at_once(bdf: str, kernel: Kernel) -> None:
    """Closing frees the device."""
    for _ in range(3):
        with pyvfio.open_device(bdf, kernel=kernel) as device:
            assert device.info.num_regions >= 9


@pytest.mark.only_type1("a group and a container are among the descriptors")
def test_the_descriptors_of_a_launcher_are_used_as_ones_own(bdf: str, kernel: Kernel) -> None:
    """Each is known by its kind; memory is mapped through them, and they are closed with the objects."""
    before = open_fds()
    opened = pyvfio.open_device(bdf, kernel=kernel)
    number, opened.opened_with = opened.group.number, None
    fds = [handle.release_fd() for handle in (opened.container, opened.group, opened)]
    for wrong in fds[1:]:
        with pytest.raises(ValueError, match="is not a VFIO container"):
            pyvfio.Container.from_fd(wrong, kernel=kernel)
    for wrong in (fds[0], fds[2]):
        with pytest.raises(ValueError, match="is not an IOMMU group"):
            pyvfio.Group.from_fd(wrong, number=number, kernel=kernel)
    group = pyvfio.Group.from_fd(fds[1], number=number, kernel=kernel)
    container = pyvfio.Container.from_fd(fds[0], groups=[group], kernel=kernel)
    for wrong in fds[:2]:
        with pytest.raises(ValueError, match="is not a VFIO device"):
            pyvfio.Device.from_fd(group, bdf, wrong)
    device = pyvfio.Device.from_fd(group, bdf, fds[2])
    assert device.info.num_regions >= 9
    with pyvfio.RamBlockList(kernel=kernel) as blocks, pyvfio.DmaMapper(device.space, blocks):
        blocks.add("ring", used_length=2 * MIB, max_length=GIB)
        assert container.mappings
    container.close()
    assert open_fds() == before


def test_registers_are_read_and_written_at_their_width(rig: Rig) -> None:
    """32 and 64 bits through the BAR, 8, 16 and 32 through configuration space."""
    assert rig.engine.invert(0x12345678) == 0xEDCBA987
    config = rig.device.config
    assert (config.read16(0), config.read16(2), config.read32(0)) == (0x1234, 0x11E8, 0x11E81234)
    assert config.read8(0) == 0x34
    bar = rig.device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX)
    bar.write64(0x80, 0x1234_5678_9ABC_DEF0)
    assert bar.read64(0x80) == 0x1234_5678_9ABC_DEF0
    with pytest.raises(ValueError, match="misaligned"):
        bar.read32(2)
    with pytest.raises(ValueError, match="bytes"):
        bar.read32(bar.size)


@pytest.mark.real_kernel("a BAR of a fake, mapped raw, is memory without registers")
def test_a_mapped_region_shows_the_registers(rig: Rig) -> None:
    """The identification register through a raw mapping, which a live view keeps open."""
    bar = rig.device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX)
    with bar.mmap(0, PAGE_SIZE) as mapped, mapped.view() as view, view.cast("I") as words:
        assert words[0] & 0xFF == 0xED
        with pytest.raises(BufferError):
            mapped.close()


def test_a_region_without_memory_decoding_is_an_error_not_a_signal(rig: Rig) -> None:
    """Touching it would be SIGBUS."""
    rig.device.memory_enabled = False
    bar = rig.device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX)
    with pytest.raises(pyvfio.VfioError, match="memory_enabled"):
        bar.read32(0)
    rig.device.memory_enabled = True
    assert bar.read32(0) & 0xFF == 0xED


def test_bus_mastering_is_off_at_first_and_can_be_switched(device: pyvfio.Device) -> None:
    """PCI COMMAND, bit 2."""
    assert not device.bus_master
    device.bus_master = True
    assert device.bus_master
    device.bus_master = False
    assert not device.bus_master


def test_a_reset_is_made_or_refused_in_words(device: pyvfio.Device) -> None:
    """As the device's flags say."""
    if device.can_reset:
        device.reset()
    else:
        with pytest.raises(pyvfio.UnsupportedError, match="no reset"):
            device.reset()


def test_hot_reset_info_lists_the_devices_or_says_there_is_none(device: pyvfio.Device, kernel: Kernel) -> None:
    """A device on the root bus has neither slot nor bus to reset."""
    on_root_bus = (kernel.sysfs / "bus/pci/devices" / device.bdf).resolve().parent.name.startswith("pci")
    if on_root_bus:
        with pytest.raises(pyvfio.UnsupportedError, match=device.bdf):
            device.get_pci_hot_reset_info()
    else:
        assert device.bdf in [dependent.bdf for dependent in device.get_pci_hot_reset_info()]


def test_in_a_forked_child_a_device_is_an_error_and_closing_it_does_nothing(rig: Rig) -> None:
    """The child cannot harm its parent: no unmap, no close, a clear error."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    child = os.fork()
    if child == 0:
        refused = 0
        uses: list[Callable[[], object]] = [
            lambda: rig.device.fd,
            lambda: rig.device.config.read16(0),
            lambda: block.resize(MIB),
            block.view,
            block.remove,
            rig.space.unmap_all,
            lambda: rig.space.map(vaddr=block.vaddr, iova=9 * GIB, size=MIB),
        ]
        for use in uses:
            with suppress(pyvfio.ForkedError):
                use()
                refused -= 1
            refused += 1
        rig.mapper.close()
        rig.blocks.close()
        rig.device.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert rig.reaches(block, 0)
    assert rig.reaches(block, 2 * MIB - 2048)
