"""The promises of a reset of a whole bus (kernel: vfio_pci_core.c)."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import pytest

from pyvfio import ioctls
from tests.contract.devices import VFIO, Company, Member
from tests.contract.world import BAD_ADDRESS, BOTH, NONE, PAGE, Attached, World, refused

CONFIG = ioctls.VFIO_PCI_CONFIG_REGION_INDEX << 40
BAR4 = ioctls.VFIO_PCI_BAR4_REGION_INDEX << 40
COMMAND, BARS = CONFIG + 0x04, CONFIG + 0x10
MEMORY, MASTER, INTX_DISABLE = 0x2, 0x4, 0x400
BASE = 0x2800  # of an e1000e, in BAR 0: where the receive ring lies, RDBAL; 0 after power-on
STATUS = BAR4 + 0x14  # of a virtio device, in its common configuration; 0 after power-on
SHARED = 1  # MAP_SHARED


@pytest.fixture
def device(v2: Attached) -> int:
    """The world's device: an edu, on a root bus."""
    return v2.world.open_device(v2.group)


def hot_reset(world: World, fd: int, *groups: int, argsz: int = 12, flags: int = 0, count: int | None = None) -> None:
    """Call VFIO_DEVICE_PCI_HOT_RESET with groups; `count` may differ from their number."""
    head = struct.pack("=III", argsz, flags, len(groups) if count is None else count)
    argument = bytearray(head + struct.pack(f"={len(groups)}i", *groups) + bytes(32))
    assert world.ioctl(fd, ioctls.VFIO_DEVICE_PCI_HOT_RESET, argument) == 0


def hot_reset_info(world: World, fd: int, argsz: int) -> bytes:
    """Return the answer of VFIO_DEVICE_GET_PCI_HOT_RESET_INFO in bytes 0xAA with this `argsz`; ENOSPC is no error."""
    buffer = bytearray(struct.pack("=I", argsz) + b"\xaa" * 60)
    with contextlib.suppress(OSError):
        world.ioctl(fd, ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, buffer)
    return bytes(buffer)


def entry(member: Member) -> bytes:
    """Return the entry of a device in that answer."""
    _domain, bus, rest = member.bdf.split(":")
    slot, function = rest.split(".")
    return struct.pack("=IHBB", member.group, 0, int(bus, 16), int(slot, 16) << 3 | int(function))


@pytest.fixture
def behind(bridged: World, company: Company) -> Attached:
    """A container with the group behind the bridge, both devices bound to vfio-pci."""
    bridged.bind(company.rng.bdf, VFIO)
    return Attached.of(bridged, ioctls.VFIO_TYPE1v2_IOMMU)


@pytest.mark.parametrize("request_", [ioctls.VFIO_DEVICE_PCI_HOT_RESET, ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO])
def test_a_bad_pointer_is_efault(v2: Attached, device: int, request_: int) -> None:
    with refused(errno.EFAULT):
        v2.world.ioctl(device, request_, BAD_ADDRESS)


def test_a_device_on_a_root_bus_cannot_be_hot_reset(v2: Attached, device: int) -> None:
    argument = bytearray(struct.pack("=III", 12, 7, 7))
    with refused(errno.ENODEV):
        v2.world.ioctl(device, ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, argument)
    assert argument == struct.pack("=III", 12, 7, 7)
    with refused(errno.ENODEV):
        hot_reset(v2.world, device, count=1)


def test_no_group_at_all_is_einval_before_that_since_6_5(v2: Attached, device: int) -> None:
    with refused(errno.EINVAL if v2.world.since(6, 5) else errno.ENODEV):
        hot_reset(v2.world, device)


def test_a_short_argsz_and_flags_are_einval(v2: Attached, device: int) -> None:
    for argsz, flags in ((11, 0), (12, 1)):
        with refused(errno.EINVAL):
            hot_reset(v2.world, device, argsz=argsz, flags=flags, count=1)
    with refused(errno.EINVAL):
        v2.world.ioctl(device, ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, bytearray(struct.pack("=III", 11, 0, 0)))


def test_a_device_alone_on_its_bus_is_all_that_a_hot_reset_of_it_reaches(e1000e: World, company: Company) -> None:
    fd = e1000e.open_device(Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU).group)
    for argsz in (20, 50):
        answer = hot_reset_info(e1000e, fd, argsz)
        assert answer == struct.pack("=III", argsz, 0, 1) + entry(company.e1000e) + b"\xaa" * 44


def test_a_hot_reset_reaches_every_device_on_the_bus_whoever_has_it(bridged: World, company: Company) -> None:
    bridged.bind(company.rng.bdf, None)
    fd = bridged.open_device(Attached.of(bridged, ioctls.VFIO_TYPE1v2_IOMMU).group)
    answer = hot_reset_info(bridged, fd, 28)
    assert answer == struct.pack("=III", 28, 0, 2) + entry(company.bridged) + entry(company.rng) + b"\xaa" * 36


@pytest.mark.parametrize("argsz", [12, 27])
def test_who_has_no_room_for_the_devices_that_a_hot_reset_reaches_is_told_how_many(
    behind: Attached, argsz: int
) -> None:
    fd = behind.world.open_device(behind.group)
    argument = bytearray(struct.pack("=III", argsz, 7, 7) + b"\xaa" * 16)
    with refused(errno.ENOSPC):
        behind.world.ioctl(fd, ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, argument)
    assert bytes(argument) == struct.pack("=III", argsz, 0, 2) + b"\xaa" * 16


def test_whoever_has_the_group_of_all_devices_on_a_bus_resets_it_and_mappings_stay(behind: Attached) -> None:
    fd = behind.world.open_device(behind.group)
    before = behind.locked()
    behind.map()
    hot_reset(behind.world, fd, behind.group)
    hot_reset(behind.world, fd, behind.group, behind.group)
    assert behind.locked() == before + PAGE
    assert behind.unmap() == PAGE


def test_a_bus_with_a_device_that_is_not_vfios_is_not_reset(bridged: World, company: Company) -> None:
    bridged.bind(company.rng.bdf, None)
    attached = Attached.of(bridged, ioctls.VFIO_TYPE1v2_IOMMU)
    fd = bridged.open_device(attached.group)
    with refused(errno.EINVAL):
        hot_reset(bridged, fd, attached.group)


def test_a_bus_is_not_reset_with_other_groups_than_those_of_its_devices(behind: Attached, other: World) -> None:
    fd = behind.world.open_device(behind.group)
    with refused(errno.EINVAL):
        hot_reset(behind.world, fd, other.open(str(other.group)))


def test_what_is_no_group_is_einval_and_what_is_not_open_ebadf(behind: Attached) -> None:
    fd = behind.world.open_device(behind.group)
    for number, expected in (
        (behind.container, errno.EINVAL),
        (fd, errno.EINVAL),
        (1000, errno.EBADF),
        (-1, errno.EBADF),
    ):
        with refused(expected):
            hot_reset(behind.world, fd, number)
        with refused(expected):
            hot_reset(behind.world, fd, behind.group, number)


def test_a_hot_reset_takes_one_group_at_least_and_no_more_than_there_are_devices(behind: Attached) -> None:
    fd = behind.world.open_device(behind.group)
    for count in (0, 3, 1 << 31, (1 << 32) - 1):
        with refused(errno.EINVAL):
            hot_reset(behind.world, fd, *[behind.group] * 3, count=count)


def test_the_groups_of_a_hot_reset_behind_a_bad_pointer_are_efault(behind: Attached) -> None:
    fd = behind.world.open_device(behind.group)
    page = behind.world.memory(2 * PAGE)
    behind.world.kernel.mprotect(page + PAGE, PAGE, NONE)
    ctypes.memmove(page + PAGE - 12, struct.pack("=III", 16, 0, 1), 12)
    with refused(errno.EFAULT):
        behind.world.ioctl(fd, ioctls.VFIO_DEVICE_PCI_HOT_RESET, page + PAGE - 12)


# ------------------------------------------------------------------------------------------------ what a reset leaves


@pytest.fixture(params=["VFIO_DEVICE_RESET", "VFIO_DEVICE_PCI_HOT_RESET"])
def reset(request: pytest.FixtureRequest, e1000e: World) -> Reset:
    """An open e1000e that decodes memory and is a bus master, and a reset of the device, or of its bus."""
    group = Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU).group
    fd = e1000e.open_device(group)
    e1000e.kernel.pwrite(fd, struct.pack("<H", MEMORY | MASTER | INTX_DISABLE), COMMAND)
    if request.param == "VFIO_DEVICE_RESET":
        return Reset(e1000e, fd, lambda: e1000e.ioctl(fd, ioctls.VFIO_DEVICE_RESET))
    return Reset(e1000e, fd, lambda: hot_reset(e1000e, fd, group))


class Reset(NamedTuple):
    """The result of the fixture `reset`."""

    world: World
    fd: int
    make: Callable[[], object]

    def read(self, offset: int, size: int) -> bytes:
        """Read registers or configuration space."""
        return self.world.kernel.pread(self.fd, size, offset)


def test_a_reset_keeps_command_and_where_bars_are(reset: Reset) -> None:
    command, bars = reset.read(COMMAND, 2), reset.read(BARS, 24)
    assert command == struct.pack("<H", MEMORY | MASTER | INTX_DISABLE)
    reset.make()
    assert (reset.read(COMMAND, 2), reset.read(BARS, 24)) == (command, bars)


def test_messages_that_are_enabled_stay_so_through_a_reset(reset: Reset) -> None:
    kernel = reset.world.kernel
    eventfd = reset.world.keep(kernel.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    flags = ioctls.VFIO_IRQ_SET_DATA_EVENTFD | ioctls.VFIO_IRQ_SET_ACTION_TRIGGER
    index = ioctls.VFIO_PCI_MSI_IRQ_INDEX
    argument = ioctls.irq_set_eventfds(flags=flags, index=index, start=0, eventfds=[eventfd])
    reset.world.ioctl(reset.fd, ioctls.VFIO_DEVICE_SET_IRQS, argument)
    reset.make()
    assert not kernel.poll(eventfd, 0)
    reset.world.have_raised(reset.fd, reset.world.bdf)
    assert kernel.poll(eventfd, 5)
    assert kernel.eventfd_read(eventfd) == 1


def test_a_bar_that_is_mapped_stays_so_through_a_reset(reset: Reset) -> None:
    kernel = reset.world.kernel
    vaddr = kernel.mmap(0, 4 * PAGE, BOTH, SHARED, fd=reset.fd, offset=0)
    try:
        reset.make()
        register = ctypes.c_uint32.from_address(vaddr + BASE)
        register.value = 0x12345000
        assert reset.read(BASE, 4) == struct.pack("<I", 0x12345000)
    finally:
        kernel.munmap(vaddr, 4 * PAGE)


def test_a_hot_reset_takes_registers_back_to_what_they_are_after_power_on(e1000e: World) -> None:
    group = Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU).group
    fd = e1000e.open_device(group)
    e1000e.kernel.pwrite(fd, struct.pack("<H", MEMORY), COMMAND)
    e1000e.kernel.pwrite(fd, struct.pack("<I", 0x12345000), BASE)
    assert e1000e.kernel.pread(fd, 4, BASE) == struct.pack("<I", 0x12345000)
    hot_reset(e1000e, fd, group)
    assert e1000e.kernel.pread(fd, 4, BASE) == bytes(4)


def test_a_hot_reset_does_so_to_each_device_on_the_bus_and_keeps_its_command(
    behind: Attached, company: Company
) -> None:
    world = behind.world
    fd, sibling = world.open_device(behind.group), world.open_device(behind.group, company.rng.bdf)
    world.kernel.pwrite(sibling, struct.pack("<H", MEMORY | MASTER), COMMAND)
    command, bars = world.kernel.pread(sibling, 2, COMMAND), world.kernel.pread(sibling, 24, BARS)
    for status in (1, 3):  # acknowledged, and driven
        world.kernel.pwrite(sibling, bytes((status,)), STATUS)
    assert world.kernel.pread(sibling, 1, STATUS) == b"\x03"
    hot_reset(world, fd, behind.group)
    assert world.kernel.pread(sibling, 1, STATUS) == b"\0"
    assert (world.kernel.pread(sibling, 2, COMMAND), world.kernel.pread(sibling, 24, BARS)) == (command, bars)


def test_a_reset_takes_the_mapping_of_a_bar_from_no_other_device(e1000e: World, v2: Attached) -> None:
    # Nothing tells type1 that a BAR disappears: the mapping stays until the unmap.
    group = Attached.of(e1000e, ioctls.VFIO_TYPE1v2_IOMMU).group
    fd = e1000e.open_device(group)
    e1000e.kernel.pwrite(fd, struct.pack("<H", MEMORY), COMMAND)
    vaddr = e1000e.kernel.mmap(0, PAGE, BOTH, SHARED, fd=fd, offset=0)
    v2.map(vaddr=vaddr)
    hot_reset(e1000e, fd, group)
    e1000e.kernel.pwrite(fd, bytes(2), COMMAND)
    assert v2.unmap() == PAGE
    e1000e.kernel.munmap(vaddr, PAGE)
    e1000e.forgive()
