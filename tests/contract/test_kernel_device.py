"""What a device's descriptor promises (kernel: drivers/vfio/pci). Irqs and registers are those of edu: on `fake`."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence

import pytest

from pyvfio import ioctls
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import MIB
from tests.contract.world import BAD_ADDRESS, PAGE, Attached, World, refused

INTX, MSI, MSIX, ERR, REQ = range(5)
NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = (1 << bit for bit in range(6))
CONFIG = 7 << 40
REQUESTS = [
    ioctls.VFIO_DEVICE_GET_INFO,
    ioctls.VFIO_DEVICE_GET_REGION_INFO,
    ioctls.VFIO_DEVICE_GET_IRQ_INFO,
    ioctls.VFIO_DEVICE_SET_IRQS,
]


@pytest.fixture
def device(v2: Attached) -> int:
    """The world's device."""
    return v2.world.open_device(v2.group)


@pytest.fixture
def second(fake_world: World) -> int:
    """0000:00:02.1 of the fake: 4 MSI and 8 MSI-X vectors, can be reset."""
    return fake_world.open_device(Attached.of(fake_world, 3).group, "0000:00:02.1")


def region(world: World, fd: int, index: int, argsz: int = 32) -> ioctls.vfio_region_info:
    """VFIO_DEVICE_GET_REGION_INFO."""
    answer = ioctls.vfio_region_info(argsz=argsz, index=index, cap_offset=0xAA)
    world.ioctl(fd, ioctls.VFIO_DEVICE_GET_REGION_INFO, answer)
    return answer


def irq_info(world: World, fd: int, index: int) -> tuple[int, int]:
    """Flags and count of VFIO_DEVICE_GET_IRQ_INFO."""
    answer = ioctls.vfio_irq_info(argsz=16, index=index)
    world.ioctl(fd, ioctls.VFIO_DEVICE_GET_IRQ_INFO, answer)
    return answer.flags, answer.count


def set_irqs(
    world: World, fd: int, index: int, flags: int, *, start: int = 0, count: int = 0, data: bytes = b""
) -> None:
    """VFIO_DEVICE_SET_IRQS."""
    head = struct.pack("=IIIII", 20 + len(data), flags, index, start, count)
    assert world.ioctl(fd, ioctls.VFIO_DEVICE_SET_IRQS, bytearray(head + data)) == 0


def connect(world: World, fd: int, index: int, eventfds: Sequence[int], *, start: int = 0) -> None:
    """Let vectors signal eventfds."""
    data = struct.pack(f"={len(eventfds)}i", *eventfds)
    set_irqs(world, fd, index, EVENTFD | TRIGGER, start=start, count=len(eventfds), data=data)


def eventfds(world: World, count: int) -> list[int]:
    """So many eventfds that do not block."""
    return [world.keep(world.kernel.eventfd(0, os.EFD_NONBLOCK)) for _ in range(count)]


def signalled(world: World, fds: Sequence[int]) -> list[int]:
    """The counters of eventfds, which are 0 afterwards."""
    return [world.kernel.eventfd_read(fd) if world.kernel.poll(fd, 0) else 0 for fd in fds]


# ------------------------------------------------------------------------------------------------------------- info


def test_a_pci_device_has_nine_regions_and_five_kinds_of_interrupt(v2: Attached, device: int) -> None:
    answer = ioctls.vfio_device_info(argsz=24)
    v2.world.ioctl(device, ioctls.VFIO_DEVICE_GET_INFO, answer)
    assert answer.flags & ioctls.VFIO_DEVICE_FLAGS_PCI
    assert (answer.num_regions, answer.num_irqs) == (9, 5)


@pytest.mark.parametrize("argsz", [16, 19, 20, 23, 24])
def test_the_info_is_written_back_as_far_as_the_kernel_knows_it(v2: Attached, device: int, argsz: int) -> None:
    written = min(argsz, 24) if v2.world.since(6, 6) else (16 if argsz < 20 else 20)
    buffer = (ctypes.c_char * 32).from_buffer_copy(struct.pack("=I", argsz) + b"\xaa" * 28)
    v2.world.ioctl(device, ioctls.VFIO_DEVICE_GET_INFO, buffer)
    assert buffer.raw[written:] == b"\xaa" * (32 - written)


def test_a_short_argsz_is_einval_and_nothing_is_written(v2: Attached, device: int) -> None:
    for request, argsz in zip(REQUESTS, (15, 31, 15, 19), strict=True):
        buffer = bytearray(struct.pack("=I", argsz) + b"\xaa" * 28)
        before = bytes(buffer)
        with refused(errno.EINVAL):
            v2.world.ioctl(device, request, buffer)
        assert buffer == before


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_bad_pointer_is_efault(v2: Attached, device: int, request_: int) -> None:
    with refused(errno.EFAULT):
        v2.world.ioctl(device, request_, BAD_ADDRESS)


def test_an_unknown_request_is_enotty(v2: Attached, device: int) -> None:
    for request in (ioctls.VFIO_GET_API_VERSION, 0x3B64 + 90, ioctls.VFIO_DEVICE_QUERY_GFX_PLANE):
        with refused(errno.ENOTTY):
            v2.world.ioctl(device, request)


def test_a_region_lies_at_its_index_times_2_to_the_40(v2: Attached, device: int) -> None:
    assert [region(v2.world, device, index).offset >> 40 for index in range(8)] == list(range(8))


@pytest.mark.parametrize("index", [8, 9, 100, (1 << 32) - 1])
def test_a_region_that_is_not_there_is_einval(v2: Attached, device: int, index: int) -> None:
    with refused(errno.EINVAL):
        region(v2.world, device, index)


def test_a_region_without_capabilities_leaves_cap_offset_as_it_was(v2: Attached, device: int) -> None:
    assert region(v2.world, device, 7).cap_offset == 0xAA


def test_configuration_space_is_256_or_4096_bytes_to_read_and_write(v2: Attached, device: int) -> None:
    answer = region(v2.world, device, 7)
    assert (answer.size in (256, 4096), answer.flags) == (True, 3)


@pytest.mark.parametrize("index", [5, 6, 1000])
def test_an_interrupt_that_is_not_there_is_einval(v2: Attached, device: int, index: int) -> None:
    with refused(errno.EINVAL):
        irq_info(v2.world, device, index)


def test_intx_can_be_masked_and_masks_itself_and_msi_has_a_fixed_size(v2: Attached, device: int) -> None:
    assert irq_info(v2.world, device, INTX)[0] == 7
    assert irq_info(v2.world, device, MSI)[0] == 9
    assert irq_info(v2.world, device, REQ) == (9, 1)


# ----------------------------------------------------------------------------------------------- reading and writing


def test_the_bus_master_bit_is_clear_at_first_and_can_be_set(v2: Attached, device: int) -> None:
    kernel = v2.world.kernel
    (command,) = struct.unpack("<H", kernel.pread(device, 2, CONFIG + 4))
    assert not command & 4
    assert kernel.pwrite(device, struct.pack("<H", command | 4), CONFIG + 4) == 2
    assert struct.unpack("<H", kernel.pread(device, 2, CONFIG + 4)) == (command | 4,)


def test_the_ids_in_configuration_space_are_those_of_sysfs_and_cannot_be_written(v2: Attached, device: int) -> None:
    kernel = v2.world.kernel
    home = kernel.sysfs / "bus/pci/devices" / v2.world.bdf
    ids = tuple(int((home / name).read_text(), 16) for name in ("vendor", "device"))
    kernel.pwrite(device, b"\0\0\0\0", CONFIG)
    assert struct.unpack("<HH", kernel.pread(device, 4, CONFIG)) == ids


def test_behind_configuration_space_is_efault(v2: Attached, device: int) -> None:
    size = region(v2.world, device, 7).size
    for offset, count in ((size, 4), (size - 2, 4)):
        with refused(errno.EFAULT):
            v2.world.kernel.pread(device, count, CONFIG + offset)


def test_no_bytes_are_no_error_and_no_region_is(v2: Attached, device: int) -> None:
    assert v2.world.kernel.pread(device, 0, CONFIG) == b""
    with refused(errno.EINVAL):
        v2.world.kernel.pread(device, 4, 9 << 40)
    with refused(errno.EINVAL):
        v2.world.kernel.pread(device, 4, 8 << 40)


def test_a_read_is_cut_at_the_end_of_a_bar_and_starts_inside_it(fake_world: World, second: int) -> None:
    kernel = fake_world.kernel
    assert kernel.pwrite(second, b"12345678", MIB - 4) == 4
    assert kernel.pread(second, 16, MIB - 4) == b"1234"
    for offset in (MIB, 1 << 40):
        with refused(errno.EINVAL):
            kernel.pread(second, 4, offset)


def test_a_bar_is_eio_while_memory_decoding_is_off(fake_world: World, second: int) -> None:
    fake_world.kernel.pwrite(second, b"\0\0", CONFIG + 4)
    with refused(errno.EIO):
        fake_world.kernel.pread(second, 4, 0)


def test_registers_and_pread_show_the_same_bar(fake_world: World, second: int) -> None:
    window = fake_world.kernel.registers(second, PAGE, PAGE)
    window.write(8, 4, 0x11223344)
    assert fake_world.kernel.pread(second, 4, PAGE + 8) == b"\x44\x33\x22\x11"
    assert window.read(8, 2) == 0x3344
    window.close()


@pytest.mark.parametrize(("offset", "size"), [(MIB, PAGE), (MIB - PAGE, 2 * PAGE), (1 << 40, PAGE), (CONFIG, PAGE)])
def test_only_what_lies_in_a_bar_can_be_mapped(fake_world: World, second: int, offset: int, size: int) -> None:
    with refused(errno.EINVAL):
        fake_world.kernel.registers(second, offset, size)
    with refused(errno.EINVAL):
        fake_world.kernel.mmap(0, PAGE, 3, 2, fd=second)


def test_a_device_that_cannot_be_reset_says_so_and_is_einval(fake_world: World) -> None:
    fd = fake_world.open_device(Attached.of(fake_world, 3).group)
    answer = ioctls.vfio_device_info(argsz=24)
    fake_world.ioctl(fd, ioctls.VFIO_DEVICE_GET_INFO, answer)
    assert answer.flags == ioctls.VFIO_DEVICE_FLAGS_PCI
    with refused(errno.EINVAL):
        fake_world.ioctl(fd, ioctls.VFIO_DEVICE_RESET)


def test_a_reset_clears_the_bars_and_leaves_the_mappings(fake: FakeKernel, fake_world: World) -> None:
    attached = Attached.of(fake_world, 3)
    fd = fake_world.open_device(attached.group, "0000:00:02.1")
    attached.map()
    fake.pwrite(fd, b"abcd", 0)
    assert fake.ioctl(fd, ioctls.VFIO_DEVICE_RESET) == 0
    assert fake.pread(fd, 4, 0) == bytes(4)
    assert attached.unmap() == PAGE


def test_the_bar_with_the_msix_table_says_that_it_may_be_mapped(fake_world: World, second: int) -> None:
    short = region(fake_world, second, 0)
    assert (short.flags, short.argsz, short.cap_offset, short.size) == (0xF, 40, 0, MIB)
    buffer = bytearray(struct.pack("=II", 40, 0) + bytes(32))
    fake_world.ioctl(second, ioctls.VFIO_DEVICE_GET_REGION_INFO, buffer)
    assert struct.unpack_from("=I", buffer, 12) == (32,)
    assert struct.unpack_from("=HHI", buffer, 32) == (3, 1, 0)


# ------------------------------------------------------------------------------------------------------- interrupts


def test_the_error_interrupt_is_there_on_conventional_pci_since_7_3(fake_world: World, second: int) -> None:
    if fake_world.since(7, 0):
        assert irq_info(fake_world, second, ERR) == (9, 1)
        return
    with refused(errno.EINVAL):
        irq_info(fake_world, second, ERR)


def test_msix_may_be_resized_since_6_5(fake_world: World, second: int) -> None:
    assert irq_info(fake_world, second, MSI) == (9, 4)
    assert irq_info(fake_world, second, MSIX) == (1 if fake_world.since(6, 5) else 9, 8)


@pytest.mark.parametrize(
    ("index", "flags", "vectors"),
    [
        (5, NONE | TRIGGER, (0, 0)),
        (MSI, NONE | TRIGGER, (4, 0)),
        (MSI, NONE | TRIGGER, (0, 5)),
        (MSI, NONE | TRIGGER, (3, 2)),
        (MSI, NONE | TRIGGER, (1, (1 << 32) - 1)),
        (MSI, TRIGGER, (0, 1)),
        (MSI, NONE | BOOL | TRIGGER, (0, 1)),
        (MSI, 64 | NONE | TRIGGER, (0, 1)),
        (MSI, EVENTFD | TRIGGER, (0, 1)),
        (INTX, NONE | MASK, (0, 1)),
        (INTX, NONE | TRIGGER, (0, 1)),
        (MSI, NONE | TRIGGER, (0, 1)),
        (REQ, NONE | TRIGGER, (0, 1)),
    ],
)
def test_what_makes_no_sense_is_einval(
    fake_world: World, second: int, index: int, flags: int, vectors: tuple[int, int]
) -> None:
    with refused(errno.EINVAL):
        set_irqs(fake_world, second, index, flags, start=vectors[0], count=vectors[1])


@pytest.mark.parametrize(
    ("index", "flags"),
    [(MSI, NONE | MASK), (MSIX, NONE | UNMASK), (REQ, NONE | MASK), (MSI, NONE), (MSI, NONE | MASK | TRIGGER)],
)
def test_an_action_that_the_interrupt_does_not_have_is_enotty(
    fake_world: World, second: int, index: int, flags: int
) -> None:
    with refused(errno.ENOTTY):
        set_irqs(fake_world, second, index, flags, count=1)


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_each_vector_signals_its_own_eventfd(fake_world: World, second: int, index: int) -> None:
    fds = eventfds(fake_world, 4)
    connect(fake_world, second, index, fds)
    assert signalled(fake_world, fds) == [0, 0, 0, 0]
    set_irqs(fake_world, second, index, NONE | TRIGGER, start=1, count=2)
    assert signalled(fake_world, fds) == [0, 1, 1, 0]
    set_irqs(fake_world, second, index, BOOL | TRIGGER, count=4, data=b"\1\0\0\1")
    assert signalled(fake_world, fds) == [1, 0, 0, 1]


def test_triggers_add_up_until_they_are_read(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 1)
    connect(fake_world, second, MSI, fds)
    for _ in range(3):
        set_irqs(fake_world, second, MSI, NONE | TRIGGER, count=1)
    assert signalled(fake_world, fds) == [3]


def test_one_kind_of_interrupt_is_enabled_at_a_time(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 1)
    connect(fake_world, second, MSI, fds)
    for other in (INTX, MSIX):
        with refused(errno.EINVAL):
            connect(fake_world, second, other, fds)
    set_irqs(fake_world, second, MSI, NONE | TRIGGER)
    connect(fake_world, second, INTX, fds)


@pytest.mark.parametrize("other", [INTX, MSIX])
def test_what_could_not_be_enabled_is_not_enabled(fake_world: World, second: int, other: int) -> None:
    with refused(errno.EBADF):
        connect(fake_world, second, MSI, [1000])
    connect(fake_world, second, other, eventfds(fake_world, 1))


def test_the_first_vector_is_one_of_the_device_even_where_none_is_meant(fake_world: World, second: int) -> None:
    connect(fake_world, second, MSI, eventfds(fake_world, 1))
    with refused(errno.EINVAL):
        set_irqs(fake_world, second, MSI, NONE | TRIGGER, start=4)
    set_irqs(fake_world, second, MSI, NONE | TRIGGER, start=3)
    connect(fake_world, second, INTX, eventfds(fake_world, 1))


def test_a_vector_can_be_disconnected_alone(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 2)
    connect(fake_world, second, MSI, fds)
    connect(fake_world, second, MSI, [-1], start=1)
    set_irqs(fake_world, second, MSI, NONE | TRIGGER, count=2)
    assert signalled(fake_world, fds) == [1, 0]


def test_msi_does_not_grow_while_it_is_enabled(fake_world: World, second: int) -> None:
    connect(fake_world, second, MSI, eventfds(fake_world, 2))
    with refused(errno.EINVAL):
        connect(fake_world, second, MSI, eventfds(fake_world, 1), start=2)


def test_msix_grows_while_it_is_enabled_since_6_5(fake_world: World, second: int) -> None:
    connect(fake_world, second, MSIX, eventfds(fake_world, 2))
    more = eventfds(fake_world, 1)
    if not fake_world.since(6, 5):
        with refused(errno.EINVAL):
            connect(fake_world, second, MSIX, more, start=5)
        return
    connect(fake_world, second, MSIX, more, start=5)
    set_irqs(fake_world, second, MSIX, NONE | TRIGGER, count=8)
    assert signalled(fake_world, more) == [1]


def test_triggering_beyond_the_enabled_vectors_is_einval_before_6_5_and_nothing_since(
    fake_world: World, second: int
) -> None:
    fds = eventfds(fake_world, 2)
    connect(fake_world, second, MSI, fds)
    if fake_world.since(6, 5):
        set_irqs(fake_world, second, MSI, NONE | TRIGGER, count=4)
        assert signalled(fake_world, fds) == [1, 1]
        return
    with refused(errno.EINVAL):
        set_irqs(fake_world, second, MSI, NONE | TRIGGER, count=4)


@pytest.mark.parametrize("index", [INTX, MSI, REQ])
def test_what_is_no_eventfd_is_einval_and_what_is_not_open_ebadf(fake_world: World, second: int, index: int) -> None:
    with refused(errno.EINVAL):
        connect(fake_world, second, index, [second])
    with refused(errno.EBADF):
        connect(fake_world, second, index, [1000])
    connect(fake_world, second, index, eventfds(fake_world, 1))


def test_a_bad_eventfd_disconnects_those_before_it(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 4)
    connect(fake_world, second, MSI, fds)
    with refused(errno.EBADF):
        connect(fake_world, second, MSI, [*fds[:2], 1000])
    set_irqs(fake_world, second, MSI, NONE | TRIGGER, count=4)
    assert signalled(fake_world, fds) == [0, 0, 0, 1]


def test_intx_is_triggered_and_signals_while_it_is_connected(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 1)
    connect(fake_world, second, INTX, fds)
    set_irqs(fake_world, second, INTX, NONE | TRIGGER, count=1)
    assert signalled(fake_world, fds) == [1]
    set_irqs(fake_world, second, INTX, NONE | TRIGGER)
    with refused(errno.EINVAL):
        set_irqs(fake_world, second, INTX, NONE | TRIGGER, count=1)


def test_masking_intx_by_eventfd_is_enotty(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 1)
    connect(fake_world, second, INTX, fds)
    with refused(errno.ENOTTY):
        set_irqs(fake_world, second, INTX, EVENTFD | MASK, count=1, data=struct.pack("=i", fds[0]))


def test_an_eventfd_is_signalled_after_its_owner_closed_it(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 1)
    copy = fake_world.keep(os.dup(fds[0]))
    connect(fake_world, second, MSI, fds)
    fake_world.close(fds[0])
    set_irqs(fake_world, second, MSI, NONE | TRIGGER, count=1)
    assert signalled(fake_world, [copy]) == [1]


def test_the_request_interrupt_is_set_signalled_and_cleared(fake_world: World, second: int) -> None:
    fds = eventfds(fake_world, 1)
    connect(fake_world, second, REQ, fds)
    set_irqs(fake_world, second, REQ, NONE | TRIGGER, count=1)
    assert signalled(fake_world, fds) == [1]
    set_irqs(fake_world, second, REQ, NONE | TRIGGER)
    with refused(errno.EINVAL):
        set_irqs(fake_world, second, REQ, NONE | TRIGGER)


def test_a_number_below_minus_1_is_no_eventfd_since_6_5_and_nothing_before(fake_world: World, second: int) -> None:
    if fake_world.since(6, 5):
        with refused(errno.EINVAL):
            connect(fake_world, second, REQ, [-2])
        return
    connect(fake_world, second, REQ, [-2])


def test_msi_cannot_be_disabled_while_it_is_not_enabled(fake_world: World, second: int) -> None:
    with refused(errno.EINVAL):
        set_irqs(fake_world, second, MSI, NONE | TRIGGER)


# Seen in random sequences; on every kernel's own device.


def test_a_device_without_msix_says_that_it_cannot_grow(v2: Attached, device: int) -> None:
    assert irq_info(v2.world, device, MSIX) == (9, 0)


def test_whether_a_request_interrupt_without_an_eventfd_is_signalled_is_no_question_for_bool(
    v2: Attached, device: int
) -> None:
    for data in (b"\0", b"\1"):
        set_irqs(v2.world, device, REQ, BOOL | TRIGGER, count=1, data=data)
    with refused(errno.EINVAL):
        set_irqs(v2.world, device, REQ, NONE | TRIGGER, count=1)
    with refused(errno.EINVAL):
        set_irqs(v2.world, device, REQ, BOOL | TRIGGER)


def test_one_eventfd_at_a_time_unmasks_intx(v2: Attached, device: int) -> None:
    fds = eventfds(v2.world, 3)
    connect(v2.world, device, INTX, fds[:1])
    unmask = struct.pack("=i", fds[1])
    set_irqs(v2.world, device, INTX, EVENTFD | UNMASK, count=1, data=unmask)
    with refused(errno.EBUSY):
        set_irqs(v2.world, device, INTX, EVENTFD | UNMASK, count=1, data=struct.pack("=i", fds[2]))
    set_irqs(v2.world, device, INTX, EVENTFD | UNMASK, count=1, data=struct.pack("=i", -1))
    with refused(errno.EBADF):
        set_irqs(v2.world, device, INTX, EVENTFD | UNMASK, count=1, data=struct.pack("=i", 1000))
    with refused(errno.ENOTTY):
        set_irqs(v2.world, device, INTX, EVENTFD | MASK, count=1, data=unmask)
    set_irqs(v2.world, device, INTX, NONE | TRIGGER)
