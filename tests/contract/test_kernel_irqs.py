"""The promises of a device's interrupts (kernel: drivers/vfio/pci/vfio_pci_intrs.c)."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Sequence

import pytest

from pyvfio import ioctls
from pyvfio.testing.edu import Edu
from tests.contract.world import Attached, World, refused

INTX, MSI, MSIX, ERR, REQ = range(5)
NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = (1 << bit for bit in range(6))


@pytest.fixture
def device(v2: Attached) -> int:
    """The world's device: an edu, which has INTx and one vector of MSI."""
    return v2.world.open_device(v2.group)


@pytest.fixture
def vectors(xhci: World) -> int:
    """A device with 16 vectors of MSI and 16 of MSI-X."""
    return xhci.open_device(Attached.of(xhci, ioctls.VFIO_TYPE1v2_IOMMU).group)


def irq_info(world: World, fd: int, index: int) -> tuple[int, int]:
    """Return flags and count of VFIO_DEVICE_GET_IRQ_INFO."""
    answer = ioctls.vfio_irq_info(argsz=16, index=index)
    world.ioctl(fd, ioctls.VFIO_DEVICE_GET_IRQ_INFO, answer)
    return answer.flags, answer.count


def set_irqs(
    world: World, fd: int, index: int, flags: int, *, start: int = 0, count: int = 0, data: bytes = b""
) -> None:
    """Call VFIO_DEVICE_SET_IRQS."""
    head = struct.pack("=IIIII", 20 + len(data), flags, index, start, count)
    assert world.ioctl(fd, ioctls.VFIO_DEVICE_SET_IRQS, bytearray(head + data)) == 0


def connect(world: World, fd: int, index: int, eventfds: Sequence[int], *, start: int = 0) -> None:
    """Let vectors signal eventfds."""
    data = struct.pack(f"={len(eventfds)}i", *eventfds)
    set_irqs(world, fd, index, EVENTFD | TRIGGER, start=start, count=len(eventfds), data=data)


def eventfds(world: World, count: int) -> list[int]:
    """Return `count` eventfds that do not block."""
    return [world.keep(world.kernel.eventfd(0, os.EFD_NONBLOCK)) for _ in range(count)]


def signalled(world: World, fds: Sequence[int]) -> list[int]:
    """Read the counters of eventfds, which are 0 afterwards."""
    return [world.kernel.eventfd_read(fd) if world.kernel.poll(fd, 0) else 0 for fd in fds]


@pytest.mark.parametrize("index", [5, 6, 1000])
def test_an_interrupt_that_is_not_there_is_einval(v2: Attached, device: int, index: int) -> None:
    with refused(errno.EINVAL):
        irq_info(v2.world, device, index)


def test_intx_can_be_masked_and_masks_itself_and_msi_has_a_fixed_size(v2: Attached, device: int) -> None:
    assert irq_info(v2.world, device, INTX)[0] == 7
    assert irq_info(v2.world, device, MSI)[0] == 9
    assert irq_info(v2.world, device, REQ) == (9, 1)


def test_the_error_interrupt_is_there_on_conventional_pci_since_7_3(v2: Attached, device: int) -> None:
    if v2.world.since(7, 0):
        assert irq_info(v2.world, device, ERR) == (9, 1)
        return
    with refused(errno.EINVAL):
        irq_info(v2.world, device, ERR)


def test_an_error_interrupt_that_is_not_there_cannot_be_set_either(v2: Attached, device: int) -> None:
    fds = eventfds(v2.world, 1)
    if v2.world.since(7, 0):
        connect(v2.world, device, ERR, fds)
        return
    with refused(errno.EINVAL):
        connect(v2.world, device, ERR, fds)


def test_the_error_interrupt_is_there_on_pci_express(xhci: World, vectors: int) -> None:
    assert irq_info(xhci, vectors, ERR) == (9, 1)


def test_a_device_without_a_pin_has_no_intx(functions: tuple[World, World]) -> None:
    fd = functions[0].open_device(Attached.of(functions[0], ioctls.VFIO_TYPE1v2_IOMMU).group)
    assert [irq_info(functions[0], fd, index) for index in (INTX, MSI, MSIX)] == [(7, 0), (9, 0), (9, 0)]
    for index in (INTX, MSI, MSIX):
        with refused(errno.EINVAL):
            connect(functions[0], fd, index, eventfds(functions[0], 1))


def test_msix_may_be_resized_since_6_5(xhci: World, vectors: int) -> None:
    assert irq_info(xhci, vectors, MSI) == (9, 16)
    assert irq_info(xhci, vectors, MSIX) == (1 if xhci.since(6, 5) else 9, 16)


@pytest.mark.parametrize(
    ("index", "flags", "which"),
    [
        (5, NONE | TRIGGER, (0, 0)),
        (MSI, NONE | TRIGGER, (16, 0)),
        (MSI, NONE | TRIGGER, (0, 17)),
        (MSI, NONE | TRIGGER, (15, 2)),
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
    xhci: World, vectors: int, index: int, flags: int, which: tuple[int, int]
) -> None:
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, index, flags, start=which[0], count=which[1])


@pytest.mark.parametrize(
    ("index", "flags"),
    [(MSI, NONE | MASK), (MSIX, NONE | UNMASK), (REQ, NONE | MASK), (MSI, NONE), (MSI, NONE | MASK | TRIGGER)],
)
def test_an_action_that_the_interrupt_does_not_have_is_enotty(
    xhci: World, vectors: int, index: int, flags: int
) -> None:
    with refused(errno.ENOTTY):
        set_irqs(xhci, vectors, index, flags, count=1)


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_each_vector_signals_its_own_eventfd(xhci: World, vectors: int, index: int) -> None:
    fds = eventfds(xhci, 4)
    connect(xhci, vectors, index, fds)
    assert signalled(xhci, fds) == [0, 0, 0, 0]
    set_irqs(xhci, vectors, index, NONE | TRIGGER, start=1, count=2)
    assert signalled(xhci, fds) == [0, 1, 1, 0]
    set_irqs(xhci, vectors, index, BOOL | TRIGGER, count=4, data=b"\1\0\0\1")
    assert signalled(xhci, fds) == [1, 0, 0, 1]


def test_triggers_add_up_until_they_are_read(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, MSI, fds)
    for _ in range(3):
        set_irqs(xhci, vectors, MSI, NONE | TRIGGER, count=1)
    assert signalled(xhci, fds) == [3]


def test_one_kind_of_interrupt_is_enabled_at_a_time(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, MSI, fds)
    for other in (INTX, MSIX):
        with refused(errno.EINVAL):
            connect(xhci, vectors, other, fds)
    set_irqs(xhci, vectors, MSI, NONE | TRIGGER)
    connect(xhci, vectors, INTX, fds)


@pytest.mark.parametrize("other", [INTX, MSIX])
def test_what_could_not_be_enabled_is_not_enabled(xhci: World, vectors: int, other: int) -> None:
    with refused(errno.EBADF):
        connect(xhci, vectors, MSI, [1000])
    connect(xhci, vectors, other, eventfds(xhci, 1))


def test_the_first_vector_is_one_of_the_device_even_where_none_is_meant(xhci: World, vectors: int) -> None:
    connect(xhci, vectors, MSI, eventfds(xhci, 1))
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, MSI, NONE | TRIGGER, start=16)
    set_irqs(xhci, vectors, MSI, NONE | TRIGGER, start=3)
    connect(xhci, vectors, INTX, eventfds(xhci, 1))


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_no_vectors_at_all_cannot_be_enabled(xhci: World, vectors: int, index: int) -> None:
    """ERANGE, from pci_alloc_irq_vectors; the kind is not enabled then."""
    with refused(errno.ERANGE):
        set_irqs(xhci, vectors, index, EVENTFD | TRIGGER)
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, index, NONE | TRIGGER, count=1)


def test_a_vector_can_be_disconnected_alone(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 2)
    connect(xhci, vectors, MSI, fds)
    connect(xhci, vectors, MSI, [-1], start=1)
    set_irqs(xhci, vectors, MSI, NONE | TRIGGER, count=2)
    assert signalled(xhci, fds) == [1, 0]


def test_msi_does_not_grow_while_it_is_enabled(xhci: World, vectors: int) -> None:
    connect(xhci, vectors, MSI, eventfds(xhci, 2))
    with refused(errno.EINVAL):
        connect(xhci, vectors, MSI, eventfds(xhci, 1), start=2)


def test_msix_grows_while_it_is_enabled_since_6_5(xhci: World, vectors: int) -> None:
    connect(xhci, vectors, MSIX, eventfds(xhci, 2))
    more = eventfds(xhci, 1)
    if not xhci.since(6, 5):
        with refused(errno.EINVAL):
            connect(xhci, vectors, MSIX, more, start=5)
        return
    connect(xhci, vectors, MSIX, more, start=5)
    set_irqs(xhci, vectors, MSIX, NONE | TRIGGER, count=8)
    assert signalled(xhci, more) == [1]


def test_triggering_beyond_the_enabled_vectors_is_einval_before_6_5_and_nothing_since(
    xhci: World, vectors: int
) -> None:
    fds = eventfds(xhci, 2)
    connect(xhci, vectors, MSI, fds)
    if xhci.since(6, 5):
        set_irqs(xhci, vectors, MSI, NONE | TRIGGER, count=4)
        assert signalled(xhci, fds) == [1, 1]
        return
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, MSI, NONE | TRIGGER, count=4)


@pytest.mark.parametrize("index", [INTX, MSI, MSIX, ERR, REQ])
def test_what_is_no_eventfd_is_einval_and_what_is_not_open_ebadf(xhci: World, vectors: int, index: int) -> None:
    with refused(errno.EINVAL):
        connect(xhci, vectors, index, [vectors])
    with refused(errno.EBADF):
        connect(xhci, vectors, index, [1000])
    connect(xhci, vectors, index, eventfds(xhci, 1))


def test_a_bad_eventfd_disconnects_those_before_it(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 4)
    connect(xhci, vectors, MSI, fds)
    with refused(errno.EBADF):
        connect(xhci, vectors, MSI, [*fds[:2], 1000])
    set_irqs(xhci, vectors, MSI, NONE | TRIGGER, count=4)
    assert signalled(xhci, fds) == [0, 0, 0, 1]


def test_intx_is_triggered_and_signals_while_it_is_connected(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, INTX, fds)
    set_irqs(xhci, vectors, INTX, NONE | TRIGGER, count=1)
    assert signalled(xhci, fds) == [1]
    set_irqs(xhci, vectors, INTX, NONE | TRIGGER)
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, INTX, NONE | TRIGGER, count=1)


def test_masking_intx_by_eventfd_is_enotty(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, INTX, fds)
    with refused(errno.ENOTTY):
        set_irqs(xhci, vectors, INTX, EVENTFD | MASK, count=1, data=struct.pack("=i", fds[0]))


def test_an_eventfd_is_signalled_after_its_owner_closed_it(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 1)
    copy = xhci.keep(os.dup(fds[0]))
    connect(xhci, vectors, MSI, fds)
    xhci.close(fds[0])
    set_irqs(xhci, vectors, MSI, NONE | TRIGGER, count=1)
    assert signalled(xhci, [copy]) == [1]


@pytest.mark.parametrize("index", [ERR, REQ])
def test_the_error_and_request_interrupts_are_set_signalled_and_cleared(xhci: World, vectors: int, index: int) -> None:
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, index, fds)
    set_irqs(xhci, vectors, index, NONE | TRIGGER, count=1)
    assert signalled(xhci, fds) == [1]
    set_irqs(xhci, vectors, index, NONE | TRIGGER)
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, index, NONE | TRIGGER)
    connect(xhci, vectors, index, fds)
    connect(xhci, vectors, index, [-1])
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, index, NONE | TRIGGER, count=1)


@pytest.mark.parametrize("index", [ERR, REQ])
def test_a_number_below_minus_1_is_no_eventfd_since_6_5_and_nothing_before(
    xhci: World, vectors: int, index: int
) -> None:
    if xhci.since(6, 5):
        with refused(errno.EINVAL):
            connect(xhci, vectors, index, [-2])
        return
    connect(xhci, vectors, index, [-2])


def test_msi_cannot_be_disabled_while_it_is_not_enabled(xhci: World, vectors: int) -> None:
    with refused(errno.EINVAL):
        set_irqs(xhci, vectors, MSI, NONE | TRIGGER)


# Seen in random sequences of calls.


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


# Added vectors, and INTx unmasked by an eventfd.


def rising(world: World, fd: int, *, timeout: float = 10) -> int:
    """Return the counter of an eventfd as soon as it is not 0; 0 after the timeout."""
    return world.kernel.eventfd_read(fd) if world.kernel.poll(fd, timeout) else 0


def is_read(world: World, fd: int) -> bool:
    """Return whether the kernel reads an eventfd some moment after a write."""
    deadline = time.monotonic() + 10
    while world.kernel.poll(fd, 0) and time.monotonic() < deadline:
        time.sleep(0.001)
    return not world.kernel.poll(fd, 0)


def unmask_by(world: World, device: int, eventfd: int) -> None:
    """Let an eventfd unmask INTx; -1: none."""
    set_irqs(world, device, INTX, EVENTFD | UNMASK, count=1, data=struct.pack("=i", eventfd))


@pytest.fixture
def line(v2: Attached, device: int) -> Edu:
    """The device's INTx line: asserted from an interrupt until the acknowledgement."""
    kernel = v2.world.kernel
    kernel.pwrite(device, struct.pack("<H", 6), (7 << 40) + 4)  # memory and bus master in PCI COMMAND

    class Bar:
        """BAR 0."""

        def read32(self, offset: int) -> int:
            """Read a register."""
            return int.from_bytes(kernel.pread(device, 4, offset), "little")

        def write32(self, offset: int, value: int) -> None:
            """Write a register."""
            kernel.pwrite(device, value.to_bytes(4, "little"), offset)

        read64, write64 = read32, write32

    return Edu(Bar())


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_a_gap_among_the_first_vectors_keeps_the_place_of_one_that_is_connected_later(
    xhci: World, vectors: int, index: int
) -> None:
    fds = eventfds(xhci, 3)
    connect(xhci, vectors, index, [fds[0], -1, -1, fds[1]])
    set_irqs(xhci, vectors, index, NONE | TRIGGER, count=4)
    assert signalled(xhci, fds) == [1, 1, 0]
    connect(xhci, vectors, index, [fds[2]], start=2)
    set_irqs(xhci, vectors, index, NONE | TRIGGER, count=4)
    assert signalled(xhci, fds) == [1, 1, 1]


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_a_first_call_may_begin_at_any_vector(xhci: World, vectors: int, index: int) -> None:
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, index, fds, start=3)
    set_irqs(xhci, vectors, index, NONE | TRIGGER, count=4)
    assert signalled(xhci, fds) == [1]


def test_a_first_call_may_connect_nothing_and_then_the_kind_is_enabled(xhci: World, vectors: int) -> None:
    connect(xhci, vectors, MSIX, [-1, -1])
    with refused(errno.EINVAL):
        connect(xhci, vectors, MSI, eventfds(xhci, 1))
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, MSIX, fds, start=1)
    set_irqs(xhci, vectors, MSIX, NONE | TRIGGER, start=1, count=1)
    assert signalled(xhci, fds) == [1]


@pytest.mark.parametrize("index", [MSI, MSIX])
def test_no_signal_of_a_vector_is_lost_while_others_are_connected_and_disconnected(
    xhci: World, vectors: int, index: int
) -> None:
    count = 16 if index == MSIX and xhci.since(6, 5) else 8
    fds, others = eventfds(xhci, 2), eventfds(xhci, 4)
    connect(xhci, vectors, index, [*fds, *[-1] * 6])
    raised, over = [0], threading.Event()

    def device_works() -> None:
        while not over.is_set():
            set_irqs(xhci, vectors, index, NONE | TRIGGER, count=2)
            raised[0] += 1

    thread = threading.Thread(target=device_works)
    thread.start()
    for _ in range(20):
        connect(xhci, vectors, index, others, start=count - 4)
        connect(xhci, vectors, index, [-1] * 4, start=count - 4)
    over.set()
    thread.join()
    assert signalled(xhci, fds) == raised * 2


def test_what_reaches_beyond_the_vectors_of_msi_disconnects_those_before_since_6_5_and_nothing_before(
    xhci: World, vectors: int
) -> None:
    fds = eventfds(xhci, 3)
    connect(xhci, vectors, MSI, fds[:2])
    with refused(errno.EINVAL):
        connect(xhci, vectors, MSI, fds[1:], start=1)
    set_irqs(xhci, vectors, MSI, NONE | TRIGGER, count=2)
    assert signalled(xhci, fds) == ([1, 0, 0] if xhci.since(6, 5) else [1, 1, 0])


def test_of_nothing_beyond_the_vectors_of_msi_no_word_is_said_since_6_5(xhci: World, vectors: int) -> None:
    connect(xhci, vectors, MSI, eventfds(xhci, 2))
    if xhci.since(6, 5):
        connect(xhci, vectors, MSI, [-1, -1], start=2)
        return
    with refused(errno.EINVAL):
        connect(xhci, vectors, MSI, [-1, -1], start=2)


def test_two_vectors_may_signal_one_eventfd(xhci: World, vectors: int) -> None:
    fds = eventfds(xhci, 1)
    connect(xhci, vectors, MSIX, fds * 2)
    set_irqs(xhci, vectors, MSIX, NONE | TRIGGER, count=2)
    assert signalled(xhci, fds) == [2]


def test_intx_is_unmasked_by_each_write_to_an_eventfd_which_the_kernel_reads(
    v2: Attached, device: int, line: Edu
) -> None:
    trigger, unmask = eventfds(v2.world, 2)
    connect(v2.world, device, INTX, [trigger])
    unmask_by(v2.world, device, unmask)
    for _ in range(3):
        line.raise_interrupt()
        assert rising(v2.world, trigger) == 1
        line.acknowledge_interrupt()
        v2.world.kernel.eventfd_write(unmask, 3)
        assert is_read(v2.world, unmask)
    assert v2.world.kernel.poll(trigger, 0.05) == ()
    set_irqs(v2.world, device, INTX, NONE | TRIGGER)


def test_a_line_that_is_still_up_signals_again_when_an_eventfd_unmasks_it(v2: Attached, device: int, line: Edu) -> None:
    trigger, unmask = eventfds(v2.world, 2)
    connect(v2.world, device, INTX, [trigger])
    unmask_by(v2.world, device, unmask)
    line.raise_interrupt()
    assert rising(v2.world, trigger) == 1
    assert v2.world.kernel.poll(trigger, 0.05) == ()
    v2.world.kernel.eventfd_write(unmask, 1)
    assert rising(v2.world, trigger) == 1
    line.acknowledge_interrupt()
    set_irqs(v2.world, device, INTX, NONE | TRIGGER)


def test_an_eventfd_that_was_written_to_before_unmasks_at_once_and_keeps_its_count(
    v2: Attached, device: int, line: Edu
) -> None:
    trigger, unmask = eventfds(v2.world, 2)
    connect(v2.world, device, INTX, [trigger])
    line.raise_interrupt()
    assert rising(v2.world, trigger) == 1
    v2.world.kernel.eventfd_write(unmask, 2)
    unmask_by(v2.world, device, unmask)
    assert rising(v2.world, trigger) == 1
    assert v2.world.kernel.eventfd_read(unmask) == 2
    line.acknowledge_interrupt()
    set_irqs(v2.world, device, INTX, NONE | TRIGGER)


def test_without_its_eventfd_intx_stays_masked_and_another_one_may_come(v2: Attached, device: int, line: Edu) -> None:
    trigger, first, second = eventfds(v2.world, 3)
    connect(v2.world, device, INTX, [trigger])
    unmask_by(v2.world, device, first)
    unmask_by(v2.world, device, -1)
    line.raise_interrupt()
    assert rising(v2.world, trigger) == 1
    v2.world.kernel.eventfd_write(first, 1)
    assert v2.world.kernel.poll(trigger, 0.05) == ()
    unmask_by(v2.world, device, second)
    v2.world.kernel.eventfd_write(second, 1)
    assert rising(v2.world, trigger) == 1
    line.acknowledge_interrupt()
    set_irqs(v2.world, device, INTX, NONE | TRIGGER)
    with refused(errno.EINVAL):
        unmask_by(v2.world, device, second)


def test_another_eventfd_for_intx_leaves_the_one_that_unmasks_it(v2: Attached, device: int, line: Edu) -> None:
    old, new, unmask = eventfds(v2.world, 3)
    connect(v2.world, device, INTX, [old])
    unmask_by(v2.world, device, unmask)
    connect(v2.world, device, INTX, [new])
    for _ in range(2):
        line.raise_interrupt()
        assert rising(v2.world, new) == 1
        line.acknowledge_interrupt()
        v2.world.kernel.eventfd_write(unmask, 1)
    with refused(errno.EBUSY):
        unmask_by(v2.world, device, unmask)
    assert signalled(v2.world, [old]) == [0]
    set_irqs(v2.world, device, INTX, NONE | TRIGGER)
