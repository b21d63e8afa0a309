"""The answers of a device's descriptor to ioeventfds and features (kernel: vfio_main.c, vfio_pci_core.c)."""

from __future__ import annotations

import errno
import os
import struct
import time

import pytest

from pyvfio import ioctls
from tests.contract.world import BAD_ADDRESS, PAGE, Attached, World, refused

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
ENTRY, ENTRY_WITH_WAKEUP, EXIT, DMA_BUF, PRECOPY = 3, 4, 5, 11, 12
BAR_END = 1 << 20
CONFIG = 7 << 40
MSIX_TABLE, MSIX_TABLE_SIZE = 0x3000, 16 * 16  # of xhci, in BAR 0


@pytest.fixture
def device(v2: Attached) -> int:
    """The world's device: an edu, whose BAR 0 has 1 MiB."""
    return v2.world.open_device(v2.group)


def feature(world: World, fd: int, flags: int, *, argsz: int = 8, data: bytes = bytes(16)) -> None:
    """Call VFIO_DEVICE_FEATURE."""
    argument = bytearray(struct.pack("=II", argsz, flags) + data)
    assert world.ioctl(fd, ioctls.VFIO_DEVICE_FEATURE, argument) == 0


def ioeventfd(
    world: World, fd: int, event: int, *, width: int = 4, offset: int = 0x10, data: int = 0, argsz: int = 28
) -> None:
    """Call VFIO_DEVICE_IOEVENTFD."""
    argument = bytearray(struct.pack("=IIQQi", argsz, width, offset, data, event))
    assert world.ioctl(fd, ioctls.VFIO_DEVICE_IOEVENTFD, argument) == 0


def an_eventfd(world: World) -> int:
    """Return an eventfd that does not block."""
    return world.keep(world.kernel.eventfd(0, os.EFD_NONBLOCK))


@pytest.mark.parametrize("request_", [ioctls.VFIO_DEVICE_FEATURE, ioctls.VFIO_DEVICE_IOEVENTFD])
def test_a_bad_pointer_is_efault(v2: Attached, device: int, request_: int) -> None:
    with refused(errno.EFAULT):
        v2.world.ioctl(device, request_, BAD_ADDRESS)


# ----------------------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize(
    ("argsz", "flags"), [(7, SET | ENTRY), (0, SET | ENTRY), (8, 1 << 19 | ENTRY), (8, GET | SET | ENTRY)]
)
def test_a_feature_is_asked_for_in_a_way_that_makes_sense(v2: Attached, device: int, argsz: int, flags: int) -> None:
    with refused(errno.EINVAL):
        feature(v2.world, device, flags, argsz=argsz)


@pytest.mark.parametrize("number", [0, 1, 2, 6, 7, 8, 9, 10, 13, 14, 0xFFFF])
@pytest.mark.parametrize("how", [GET, SET, PROBE, PROBE | GET, 0])
def test_what_a_plain_device_does_not_have_is_enotty(v2: Attached, device: int, number: int, how: int) -> None:
    with refused(errno.ENOTTY):
        feature(v2.world, device, how | number, argsz=24)


@pytest.mark.parametrize("number", [ENTRY, ENTRY_WITH_WAKEUP, EXIT])
def test_low_power_can_be_set_and_probed_and_nothing_else(v2: Attached, device: int, number: int) -> None:
    for flags in (PROBE, PROBE | SET):
        feature(v2.world, device, flags | number)
    for flags in (0, GET, PROBE | GET, PROBE | GET | SET):
        with refused(errno.EINVAL):
            feature(v2.world, device, flags | number)


def test_low_power_is_entered_once_and_left_as_often_as_one_likes(v2: Attached, device: int) -> None:
    for _ in range(2):
        feature(v2.world, device, SET | ENTRY)
        with refused(errno.EINVAL):
            feature(v2.world, device, SET | ENTRY)
        for _ in range(2):
            feature(v2.world, device, SET | EXIT)


def test_the_wake_up_needs_an_eventfd(v2: Attached, device: int) -> None:
    for event, number in ((-1, errno.EINVAL), (1000, errno.EBADF), (device, errno.EINVAL)):
        with refused(number):
            feature(v2.world, device, SET | ENTRY_WITH_WAKEUP, argsz=16, data=struct.pack("=iI", event, 0))
    with refused(errno.EINVAL):
        feature(v2.world, device, SET | ENTRY_WITH_WAKEUP, argsz=15)


def test_in_low_power_registers_are_read_by_system_calls(v2: Attached, device: int) -> None:
    world = v2.world
    before = world.kernel.pread(device, 4, 0), world.kernel.pread(device, 4, CONFIG)
    feature(world, device, SET | ENTRY)
    for _ in range(2):
        assert (world.kernel.pread(device, 4, 0), world.kernel.pread(device, 4, CONFIG)) == before
    with refused(errno.EINVAL):
        feature(world, device, SET | ENTRY)
    feature(world, device, SET | EXIT)


def test_an_access_wakes_a_device_up_and_tells_an_eventfd_and_then_low_power_is_over(v2: Attached, device: int) -> None:
    world, event = v2.world, an_eventfd(v2.world)
    for _ in range(2):
        feature(world, device, SET | ENTRY_WITH_WAKEUP, argsz=16, data=struct.pack("=iI", event, 0))
        end = time.monotonic() + 60
        while not world.kernel.poll(event, 0.1):  # the kernel suspends the device a moment later
            world.kernel.pread(device, 4, CONFIG)
            assert time.monotonic() < end
        assert world.kernel.eventfd_read(event) == 1
        world.kernel.pread(device, 4, CONFIG)
        assert not world.kernel.poll(event, 0)
    feature(world, device, SET | ENTRY)
    feature(world, device, SET | EXIT)


# ----------------------------------------------------------------------------------------------------------- DMA-bufs


def dma_buf(
    world: World, fd: int, *ranges: tuple[int, int], region: int = 0, flags: int = 0, count: int | None = None
) -> int:
    """Return the descriptor of a DMA-buf."""
    count = len(ranges) if count is None else count
    data = struct.pack("=IIII", region, os.O_RDWR | os.O_CLOEXEC, flags, count)
    data += b"".join(struct.pack("=QQ", *each) for each in ranges)
    argument = bytearray(struct.pack("=II", 8 + len(data), GET | DMA_BUF) + data)
    return world.keep(world.ioctl(fd, ioctls.VFIO_DEVICE_FEATURE, argument))


def test_dma_buf_can_be_probed_since_6_19(v2: Attached, device: int) -> None:
    if not v2.world.since(6, 19):
        with refused(errno.ENOTTY):
            feature(v2.world, device, PROBE | DMA_BUF)
        with refused(errno.ENOTTY):
            dma_buf(v2.world, device, (0, PAGE))
        return
    feature(v2.world, device, PROBE | GET | DMA_BUF)
    for flags, argsz in ((SET, 24), (0, 24), (GET, 23), (GET, 24)):
        with refused(errno.EINVAL):
            feature(v2.world, device, flags | DMA_BUF, argsz=argsz)


def test_a_dma_buf_is_as_long_as_its_ranges_and_outlives_the_device(v2: Attached, device: int) -> None:
    if not v2.world.since(6, 19):
        return
    made = [dma_buf(v2.world, device, *ranges) for ranges in ([(0, PAGE)], [(0, PAGE), (BAR_END - PAGE, PAGE)])]
    made.append(dma_buf(v2.world, device, (0, BAR_END)))
    v2.world.close(device)
    assert [os.lseek(fd, 0, os.SEEK_END) for fd in made] == [PAGE, 2 * PAGE, BAR_END]
    assert not any(map(os.get_inheritable, made))


def test_a_dma_buf_is_made_of_whole_pages_of_a_bar_of_memory(
    v2: Attached, device: int, functions: tuple[World, World]
) -> None:
    world = v2.world
    if not world.since(6, 19):
        return
    for ranges in ([(0, 100)], [(100, PAGE)], [(0, 0)], [(BAR_END, PAGE)], [(0, 1 << 40)], [(PAGE, 2**64 - PAGE)]):
        with refused(errno.EINVAL):
            dma_buf(world, device, *ranges)
    with refused(errno.EOVERFLOW):
        dma_buf(world, device, (2**64 - PAGE, PAGE))
    for given in ({"flags": 1}, {"count": 0}):
        with refused(errno.EINVAL):
            dma_buf(world, device, (0, PAGE), **given)
    for region in (5, 6, 7, 8, 9, 1 << 31):  # refused before the ranges are checked
        with refused(errno.ENODEV):
            dma_buf(world, device, (0, 5), region=region)
    ports = functions[0].open_device(Attached.of(functions[0], ioctls.VFIO_TYPE1v2_IOMMU).group)
    for length in (5, PAGE):
        with refused(errno.EINVAL):
            dma_buf(world, ports, (0, length), region=1)


def test_precopy_is_known_since_7_1_and_then_einval_for_what_cannot_migrate(v2: Attached, device: int) -> None:
    for flags in (PROBE, SET):
        with refused(errno.EINVAL if v2.world.since(7, 1) else errno.ENOTTY):
            feature(v2.world, device, flags | PRECOPY)


# ---------------------------------------------------------------------------------------------------------- ioeventfds


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_ioeventfd_is_made_once_and_taken_back_once(v2: Attached, device: int, width: int) -> None:
    # An ioeventfd of eight bytes works on 6.1 too, although a read there is made of two halves.
    event = an_eventfd(v2.world)
    for _ in range(2):
        with refused(errno.ENODEV):
            ioeventfd(v2.world, device, -1, width=width)
        ioeventfd(v2.world, device, event, width=width)
        with refused(errno.EEXIST):
            ioeventfd(v2.world, device, event, width=width)
        ioeventfd(v2.world, device, -1, width=width)


def test_another_value_place_or_width_is_another_ioeventfd(v2: Attached, device: int) -> None:
    event = an_eventfd(v2.world)
    ioeventfd(v2.world, device, event)
    ioeventfd(v2.world, device, event, data=1)
    ioeventfd(v2.world, device, event, offset=0x14)
    ioeventfd(v2.world, device, event, width=2)


def test_eexist_comes_before_the_eventfd_is_looked_at(v2: Attached, device: int) -> None:
    ioeventfd(v2.world, device, an_eventfd(v2.world))
    with refused(errno.EEXIST):
        ioeventfd(v2.world, device, 1000)
    with refused(errno.EBADF):
        ioeventfd(v2.world, device, 1000, data=1)
    with refused(errno.EINVAL):
        ioeventfd(v2.world, device, device, data=1)


@pytest.mark.parametrize("width", [0, 3, 15, 16, 1 << 31])
def test_an_ioeventfd_has_one_width(v2: Attached, device: int, width: int) -> None:
    with refused(errno.EINVAL):
        ioeventfd(v2.world, device, -1, width=width)


@pytest.mark.parametrize("offset", [BAR_END, BAR_END - 3, 1 << 40, 6 << 40, 7 << 40, 9 << 40])
def test_an_ioeventfd_is_inside_a_bar(v2: Attached, device: int, offset: int) -> None:
    with refused(errno.EINVAL):
        ioeventfd(v2.world, device, -1, offset=offset)


def test_an_ioeventfd_may_be_the_last_bytes_of_a_bar(v2: Attached, device: int) -> None:
    with refused(errno.ENODEV):
        ioeventfd(v2.world, device, -1, offset=BAR_END - 4)


@pytest.mark.parametrize(("event", "argsz"), [(-2, 28), (-1, 27), (-1, 0)])
def test_a_number_below_minus_1_and_a_short_argsz_are_einval(v2: Attached, device: int, event: int, argsz: int) -> None:
    with refused(errno.EINVAL):
        ioeventfd(v2.world, device, event, argsz=argsz)


def test_an_ioeventfd_does_not_lie_in_the_table_of_msix_vectors(xhci: World) -> None:
    fd = xhci.open_device(Attached.of(xhci, ioctls.VFIO_TYPE1v2_IOMMU).group)
    event = an_eventfd(xhci)
    for offset in (MSIX_TABLE, MSIX_TABLE + MSIX_TABLE_SIZE - 4):
        with refused(errno.EINVAL):
            ioeventfd(xhci, fd, event, offset=offset)
    for offset in (MSIX_TABLE - 4, MSIX_TABLE + MSIX_TABLE_SIZE):
        ioeventfd(xhci, fd, event, offset=offset)


def test_a_device_has_1000_ioeventfds_at_most(v2: Attached, device: int) -> None:
    event = an_eventfd(v2.world)
    for data in range(1000):
        ioeventfd(v2.world, device, event, data=data)
    with refused(errno.ENOSPC):
        ioeventfd(v2.world, device, event, data=1000)
    ioeventfd(v2.world, device, -1, data=0)
    ioeventfd(v2.world, device, event, data=1000)


def test_the_last_descriptor_takes_the_ioeventfds_with_it(v2: Attached, device: int) -> None:
    ioeventfd(v2.world, device, an_eventfd(v2.world))
    v2.world.close(device)
    with refused(errno.ENODEV):
        ioeventfd(v2.world, v2.world.open_device(v2.group), -1)
