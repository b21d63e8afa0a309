"""Irq on a fake kernel: own eventfds, gaps, vectors that are added and stopped, waiting for several at once."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import gc
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.device import Irq
from pyvfio.device.eventfds import Eventfd, Vectors
from pyvfio.guard import Guard
from pyvfio.kernel import IoctlArgument, LinuxKernel, Poll
from pyvfio.testing.fake import FakeDevice, FakeKernel
from tests.interruptions.points import Walk
from tests.unit.fakes import BDF, Interrupt, SpecialKernel, nothing_left, requests
from tests.unit.processes import open_fds

INTX, MSI, MSIX, ERR, REQ = range(5)
OLD, NEW = "6.1", "6.12"
DEVICE = FakeDevice(BDF, msi=8, msix=16, pcie=True)


@contextmanager
def opened(version: str = NEW) -> Iterator[tuple[SpecialKernel, pyvfio.Device]]:
    """A device with 8 vectors of MSI and 16 of MSI-X; nothing of it is left at the end."""
    with (
        SpecialKernel(version, groups=[(2, [DEVICE])]) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        yield kernel, device


@pytest.fixture
def kernel(device: pyvfio.Device) -> SpecialKernel:
    """Linux 6.12."""
    assert isinstance(device.kernel, SpecialKernel)
    return device.kernel


@pytest.fixture
def device() -> Iterator[pyvfio.Device]:
    """On Linux 6.12."""
    with opened() as (_kernel, made):
        yield made


@pytest.fixture
def own() -> Iterator[list[int]]:
    """Eventfds of the program's own, which are open until the test ends, whatever pyvfio does."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(8)]
    yield fds
    for fd in fds:
        os.close(fd)


def count(fd: int) -> int:
    """The counter of an eventfd, which is 0 afterwards."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def set_irqs(kernel: FakeKernel) -> list[tuple[int, int]]:
    """The vectors that calls of VFIO_DEVICE_SET_IRQS have named: the first, and how many."""
    calls = [call for call in kernel.trace if call.request == "VFIO_DEVICE_SET_IRQS"]
    return [(int(call.arguments["start"]), int(call.arguments["count"])) for call in calls]


# -------------------------------------------------------------------------------------------------------- several


def test_all_vectors_that_were_raised_are_told_and_no_other(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Each with its count, in one call; and then none, when the time has passed."""
    irq = device.irq(MSIX)
    irq.enable(4)
    for vector in (1, 3, 3):
        kernel.interrupt(BDF, vector)
    assert irq.wait_any(timeout=10) == {1: 1, 3: 2}
    assert irq.wait_any(timeout=0) == {}
    assert irq.wait_any(timeout=0.01) == {}


def test_one_waits_for_some_vectors_and_leaves_the_others(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """A generator will do."""
    irq = device.irq(MSIX)
    irq.enable(4)
    kernel.interrupt(BDF, 0)
    kernel.interrupt(BDF, 2)
    assert irq.wait_any((vector for vector in (2, 3)), timeout=10) == {2: 1}
    assert irq.wait_any([3, 3], timeout=0) == {}
    assert irq.wait(0, timeout=0) == 1


def in_poll(thread: threading.Thread) -> bool:
    """Whether it waits."""
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == "poll"


@contextmanager
def waiting(call: Callable[[], object], heard: list[object]) -> Iterator[None]:
    """While another thread is in that call; what comes of it is in `heard` at the end."""

    def run() -> None:
        try:
            heard.append(call())
        except pyvfio.VfioError as error:
            heard.append(error.with_traceback(None))  # which has the frames, and those the eventfds

    thread = threading.Thread(target=run, daemon=True)  # one that nobody wakes must not keep the process
    thread.start()
    while not in_poll(thread):
        time.sleep(0.001)
    yield
    thread.join(20)
    assert not thread.is_alive()


class _Resetting(SpecialKernel):
    """Calls `between` in the middle of a reset, as another thread would."""

    between: Callable[[], object] = staticmethod(lambda: None)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0, /) -> int:
        if request == ioctls.VFIO_DEVICE_RESET:
            self.between()
        return super().ioctl(fd, request, argument)


def test_a_device_that_is_being_closed_enables_no_interrupt_any_more() -> None:
    """Those that are enabled have been disabled by then, and nobody would wake a thread that waits for another."""
    with (
        _Resetting(groups=[(2, [FakeDevice(BDF, msi=8, msix=16, resettable=True)])]) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        device.irq(MSI).enable(2)
        refused: list[BaseException] = []

        def between() -> None:
            for irq in (device.irq(MSI), device.irq(MSIX)):
                with pytest.raises(pyvfio.ClosedError, match="is being closed") as caught:
                    irq.enable()
                refused.append(caught.value)

        kernel.between = between
        device.close()
        assert len(refused) == 2
        assert device.irqs[0].fds == ()


@pytest.mark.parametrize("ended", ["disabled", "closed", "its vectors"])
def test_a_thread_that_waits_for_several_hears_the_end(device: pyvfio.Device, ended: str) -> None:
    """As of `wait`."""
    irq = device.irq(MSIX)
    irq.enable(4)
    ends: dict[str, Callable[[], None]] = {
        "disabled": irq.disable,
        "closed": device.close,
        "its vectors": lambda: irq.disable(1),
    }
    heard: list[object] = []
    with waiting(lambda: irq.wait_any([1, 2]), heard):
        ends[ended]()
    (error,) = heard
    assert isinstance(error, pyvfio.VfioError)
    assert isinstance(error, pyvfio.ClosedError) == (ended == "closed")


def test_a_thread_that_waits_for_all_hears_of_a_vector_that_is_added(
    kernel: SpecialKernel, device: pyvfio.Device
) -> None:
    """And one that waits for another vector is not disturbed."""
    irq = device.irq(MSIX)
    irq.enable(2)
    heard: list[object] = []
    with waiting(irq.wait_any, heard):
        irq.enable(1, start=5)
        kernel.interrupt(BDF, 5)
    with waiting(lambda: irq.wait(1), heard):
        irq.enable(1, start=3)
        irq.disable(5)
        kernel.interrupt(BDF, 1)
    assert heard == [{5: 1}, 1]


def test_vectors_that_share_an_eventfd_are_told_together(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """The counter is one; a second read would find nothing."""
    irq = device.irq(MSIX)
    irq.enable(fds=[own[0], own[1], own[1]])
    kernel.interrupt(BDF, 1)
    kernel.interrupt(BDF, 2)
    assert irq.wait_any(timeout=10) == {1: 2, 2: 2}


@pytest.mark.parametrize(
    ("vectors", "error"), [([], ValueError), ([4], ValueError), ([-1], ValueError), (["0"], TypeError), (3, TypeError)]
)
def test_what_cannot_be_waited_for_is_refused(
    device: pyvfio.Device, vectors: Sequence[int], error: type[Exception]
) -> None:
    """It would last for ever."""
    irq = device.irq(MSIX)
    irq.enable(4)
    with pytest.raises(error):
        irq.wait_any(vectors)
    with pytest.raises(TypeError):
        irq.wait_any(timeout="1")  # type: ignore[arg-type]
    for wait in (irq.wait_any, partial(irq.wait, 0)):
        with pytest.raises(ValueError, match="not a number"):
            wait(timeout=float("nan"))


def test_nothing_can_be_waited_for_before_it_is_enabled(device: pyvfio.Device) -> None:
    """As of `wait`."""
    with pytest.raises(pyvfio.VfioError, match="is not enabled"):
        device.irq(MSI).wait_any(timeout=0)


# ------------------------------------------------------------------------------------- own eventfds, and which vectors


def test_own_eventfds_are_signalled_and_never_closed(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """With a gap between them, from the vector on that the program says."""
    irq = device.irq(MSIX)
    assert irq.enable(fds=[own[0], None, own[1]], start=2) == (own[0], None, own[1])
    assert irq.fds == (None, None, own[0], None, own[1])
    for vector in range(8):
        kernel.interrupt(BDF, vector)
    assert irq.wait_any(timeout=0) == {2: 1, 4: 1}
    kernel.interrupt(BDF, 4)
    assert count(own[1]) == 1
    irq.disable()
    assert set(own) <= set(open_fds())
    assert len(irq.fds) == 0


def test_a_program_may_close_an_own_eventfd_that_is_enabled(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """pyvfio waits on a duplicate: the number may be another file's by then."""
    irq = device.irq(MSIX)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    irq.enable(fds=[fd])
    os.close(fd)
    other = os.eventfd(7, os.EFD_NONBLOCK)
    assert other == fd
    kernel.interrupt(BDF, 0)
    assert irq.wait(timeout=10) == 1
    assert irq.enable(fds=[other]) == (other,)
    assert irq.wait(timeout=0) == 7
    os.close(other)


def test_a_first_vector_may_be_given_for_new_eventfds_too(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """The vectors before it signal nothing."""
    irq = device.irq(MSIX)
    first = irq.enable(2, start=3)
    more = irq.enable(1, start=1)
    assert irq.fds == (None, more[0], None, *first)
    kernel.interrupt(BDF, 1)
    kernel.interrupt(BDF, 3)
    assert irq.wait_any(timeout=0) == {1: 1, 3: 1}
    with pytest.raises(pyvfio.VfioError, match="enabled already"):
        irq.enable(3, start=2)


def test_vectors_are_added_and_stopped_without_a_word_about_the_others(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """No call names a vector that stays as it is, so that the kernel touches none of them."""
    irq = device.irq(MSIX)
    irq.enable(fds=own[:4])
    kernel.clear_trace()
    irq.enable(fds=own[4:6], start=4)
    irq.enable(fds=[*own[:6], None, own[6]])
    irq.disable(1, 2, 5)
    irq.disable(1, 2, 5)
    irq.enable(fds=[None], start=0)
    irq.enable(fds=[None, None], start=14)
    assert set_irqs(kernel) == [(4, 2), (7, 1), (1, 2), (5, 1), (0, 1)]
    assert irq.fds == (None, None, None, own[3], own[4], None, None, own[6])
    with pytest.raises(pyvfio.VfioError, match=r"vector 1 of VFIO_PCI_MSIX.* is not enabled"):
        irq.wait(1)
    for vector in range(8):
        kernel.interrupt(BDF, vector)
    assert [count(fd) for fd in own] == [0, 0, 0, 1, 1, 0, 1, 0]


@pytest.mark.long
def test_no_signal_is_lost_while_vectors_come_and_go(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """The device raises two vectors all the while; others are added, replaced and stopped a hundred times."""
    irq = device.irq(MSIX)
    irq.enable(2)
    raised, seen, over, done = [0, 0], [0, 0], threading.Event(), threading.Event()

    def device_works() -> None:
        while not over.is_set():
            vector = sum(raised) % 2
            kernel.interrupt(BDF, vector)
            raised[vector] += 1

    def driver_waits() -> None:
        while not done.is_set() or sum(raised) > sum(seen):
            times = irq.wait_any(timeout=0.05)
            seen[:] = [seen[vector] + times.get(vector, 0) for vector in (0, 1)]

    threads = [threading.Thread(target=run, daemon=True) for run in (device_works, driver_waits)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        irq.enable(fds=[own[0], None, own[1]], start=2)
        irq.enable(fds=[own[2], own[3]], start=4)
        irq.enable(1, start=9)
        irq.disable(2, 9)
        irq.enable(fds=[None, None, None], start=3)
    over.set()
    threads[0].join()
    done.set()
    threads[1].join(20)
    assert raised == seen
    assert min(raised) > 0


# ------------------------------------------------------------------------------------------- what the kernel cannot


@pytest.mark.parametrize(("version", "index"), [(OLD, MSI), (NEW, MSI), (OLD, MSIX)])
def test_where_none_can_be_added_the_error_says_so_before_any_call(version: str, index: int, own: list[int]) -> None:
    """And what to do, which then works."""
    with opened(version) as (kernel, device):
        irq = device.irq(index)
        irq.enable(fds=[own[0], None])
        assert not irq.can_grow
        kernel.clear_trace()
        why = "2 of .* and vector 3 cannot be added: " + ("only MSI-X" if index == MSI else "that needs Linux 6.5")
        with pytest.raises(pyvfio.UnsupportedError, match=why) as got:
            irq.enable(fds=[own[1], own[2], None], start=2)
        assert "None in fds reserves a vector" in str(got.value)
        assert requests(kernel.trace) == []
        irq.enable(fds=[own[1], None, None], start=1)
        kernel.interrupt(BDF, 1)
        assert count(own[1]) == 1
        irq.disable()
        irq.enable(fds=[own[0], None, None, None])
        irq.enable(fds=[own[3]], start=3)
        kernel.interrupt(BDF, 3)
        assert irq.wait_any(timeout=0) == {3: 1}


def test_where_they_can_be_added_the_interrupt_says_so(device: pyvfio.Device) -> None:
    """MSI-X, from 6.5 on."""
    assert [device.irq(index).can_grow for index in (INTX, MSI, MSIX, ERR, REQ)] == [False, False, True, False, False]


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_any_vector_that_is_left_can_be_added(vectors: int) -> None:
    """Down to the second of two."""
    with (
        SpecialKernel(groups=[(2, [FakeDevice(BDF, msi=1, msix=vectors)])]) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        irq = device.irq(MSIX)
        assert irq.can_grow == (vectors > 1)
        for vector in range(vectors):
            irq.enable(1, start=vector)
            kernel.interrupt(BDF, vector)
        assert irq.wait_any(timeout=0) == dict.fromkeys(range(vectors), 1)
        with pytest.raises(pyvfio.UnsupportedError, match=f"has {vectors} vector"):
            irq.enable(1, start=vectors)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_closed_device_says_so_whatever_is_asked_of_its_interrupts(own: list[int], *, enabled: bool) -> None:
    """And not that the interrupt is not enabled."""
    with SpecialKernel(groups=[(2, [DEVICE])]) as kernel, nothing_left(kernel):
        device = pyvfio.open_device(BDF, kernel=kernel)
        irq = device.irq(INTX)
        if enabled:
            irq.enable()
        device.close()
        calls: list[Callable[[], object]] = [irq.trigger, irq.wait, irq.wait_any, irq.mask, irq.unmask, irq.enable]
        calls += [partial(irq.unmask_by, None), partial(irq.enable, fds=own[:1]), partial(irq.unmask_by, own[0])]
        kernel.clear_trace()
        for call in calls:
            with pytest.raises(pyvfio.ClosedError, match="has been closed"):
                call()
        irq.disable()
        irq.disable(0)
        assert not kernel.trace


# ---------------------------------------------------------------------------------------- what the kernel refuses


@pytest.mark.parametrize("refused", [1, 2])
def test_a_change_that_is_refused_leaves_every_vector_as_it_was(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int], refused: int
) -> None:
    """The kernel has disconnected those up to the one that it met; they have their eventfds again."""
    irq = device.irq(MSIX)
    fds = irq.enable(4)
    before = open_fds()
    kernel.fail(call="ioctl", request="VFIO_DEVICE_SET_IRQS", nth=refused, errno=errno.ENOSPC, after=True)
    with pytest.raises(pyvfio.IoctlError, match="SET_IRQS") as caught:
        irq.enable(fds=[own[0], own[1], fds[2], own[2], own[3]])
    assert caught.value.errno == errno.ENOSPC
    assert (irq.fds, open_fds()) == (fds, before)
    for vector in range(5):
        kernel.interrupt(BDF, vector)
    assert irq.wait_any(timeout=0) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert [count(fd) for fd in own] == [0] * 8


class _Spiteful(SpecialKernel):
    """The third eventfd of the next call is closed when the kernel looks at it, by another thread of the program."""

    spite = True

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """See above."""
        if request == ioctls.VFIO_DEVICE_SET_IRQS and self.spite and isinstance(argument, ctypes.Structure):
            self.spite = False
            struct.pack_into("=i", argument, 20 + 2 * 4, 1 << 20)
        return super().ioctl(fd, request, argument)


def test_of_a_refused_call_the_kernel_keeps_nothing_up_to_the_eventfd_that_it_met(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """EBADF at the third of four vectors; each of them signals the eventfd again that it had, as the table says."""
    irq = device.irq(MSIX)
    irq.enable(fds=own[:4])
    assert repr(irq) == f"<Irq VFIO_PCI_MSIX_IRQ_INDEX of {BDF} 4 of 16 enabled>"
    kernel.__class__ = _Spiteful
    with pytest.raises(pyvfio.IoctlError) as caught:
        irq.enable(fds=own[4:])
    kernel.__class__ = SpecialKernel
    assert caught.value.errno == errno.EBADF
    assert irq.fds == tuple(own[:4])
    for vector in range(4):
        kernel.interrupt(BDF, vector)
    assert [count(fd) for fd in own] == [1] * 4 + [0] * 4


def test_what_can_not_be_put_back_is_said_and_the_others_go_on(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """The table then says of these vectors that they signal nothing, as the kernel has it."""
    irq = device.irq(MSIX)
    irq.enable(fds=own[:4])
    kernel.fail(call="ioctl", request="VFIO_DEVICE_SET_IRQS", nth=1, errno=errno.ENOSPC)
    kernel.fail(call="ioctl", request="VFIO_DEVICE_SET_IRQS", nth=2, errno=errno.ENOMEM)
    heard: list[object] = []
    with (
        waiting(lambda: irq.wait(1), heard),
        pytest.raises(pyvfio.RollbackError, match=r"vectors \[1, 2\] signal nothing now"),
    ):
        irq.enable(fds=own[4:6], start=1)
    assert isinstance(heard[0], pyvfio.VfioError)
    assert irq.fds == (own[0], None, None, own[3])
    for vector in range(4):
        kernel.interrupt(BDF, vector)
    assert [count(fd) for fd in own] == [1, 0, 0, 1, 0, 0, 0, 0]
    irq.enable(fds=own[1:3], start=1)
    kernel.interrupt(BDF, 2)
    assert irq.wait_any(timeout=0) == {2: 1}
    gc.collect()  # the errors have frames, and those the eventfds that a thread waited for


def test_a_refused_first_call_enables_nothing(kernel: SpecialKernel, device: pyvfio.Device, own: list[int]) -> None:
    """Another kind can be enabled then."""
    kernel.fail(call="ioctl", request="VFIO_DEVICE_SET_IRQS", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.IoctlError):
        device.irq(MSIX).enable(fds=own)
    assert device.irq(MSIX).fds == ()
    device.irq(MSI).enable(fds=own[:4])


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"fds": 3}, TypeError, "list"),
        ({"fds": b"\5"}, TypeError, "list"),
        ({"fds": {5}}, TypeError, "list"),
        ({"fds": ["5"]}, TypeError, "whole number"),
        ({"fds": [5.0]}, TypeError, "whole number"),
        ({"fds": [True]}, TypeError, "whole number"),
        ({"fds": []}, ValueError, "at least one"),
        ({"fds": [-1]}, ValueError, "None stands for"),
        ({"fds": [1 << 31]}, ValueError, "no file descriptor"),
        ({"fds": [None], "start": "0"}, TypeError, "start"),
        ({"fds": [None], "start": 1.0}, TypeError, "start"),
        ({"fds": [None], "start": -1}, ValueError, "start must be 0"),
        ({"fds": [None], "start": 16}, pyvfio.UnsupportedError, "has 16 vectors, so 16 to 16"),
        ({"fds": [None] * 17}, pyvfio.UnsupportedError, "has 16 vectors, so 17"),
        ({"vectors": 2, "start": 15}, pyvfio.UnsupportedError, "has 16 vectors, so 15 to 16"),
        ({"vectors": 1, "start": 1 << 70}, pyvfio.UnsupportedError, "has 16 vectors"),
        ({"vectors": 0, "start": 1}, ValueError, "at least one"),
        ({"vectors": 1, "fds": [None]}, TypeError, "not both"),
    ],
)
def test_what_can_never_be_right_is_refused_before_any_call(
    kernel: SpecialKernel, device: pyvfio.Device, arguments: dict[str, object], error: type[Exception], says: str
) -> None:
    """Of a wrong class, out of range, too many."""
    irq = device.irq(MSIX)
    for index in (INTX, MSI):
        assert device.irq(index).count
    enable: Callable[..., object] = irq.enable
    kernel.clear_trace()
    with pytest.raises(error, match=says):
        enable(**arguments)
    assert kernel.trace == []
    assert irq.fds == ()


def test_a_descriptor_that_is_no_eventfd_is_refused_and_nothing_is_changed(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """Closed ones, files, a device of another kernel: the eventfds before them keep their vectors."""
    irq = device.irq(MSIX)
    irq.enable(fds=own[:2])
    with FakeKernel(groups=[(3, [FakeDevice("0000:00:09.0")])]) as other, open(os.devnull) as null:
        stranger = pyvfio.open_device("0000:00:09.0", kernel=other)
        read, write = os.pipe()
        os.close(write)
        before, kernel_calls = open_fds(), len(set_irqs(kernel))
        for fd, says in (
            (null.fileno(), "no eventfd"),
            (stranger.fd, "no eventfd"),
            (device.fd, "no eventfd"),
            (read, "no eventfd"),
            (write, "is closed"),
            (0, "no eventfd"),
            ((1 << 31) - 1, "is closed"),
        ):
            with pytest.raises(ValueError, match=f"descriptor {fd} .*{says}"):
                irq.enable(fds=[own[2], own[3], fd])
        assert open_fds() == before
        assert len(set_irqs(kernel)) == kernel_calls
        os.close(read)
        stranger.close()
    kernel.interrupt(BDF, 0)
    assert (irq.fds, irq.wait(0, timeout=0)) == (tuple(own[:2]), 1)


@contextmanager
def _descriptors_left(number: int) -> Iterator[int]:
    """So many can be opened; the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(open_fds()) + 1
    filled = [os.dup(0) for _ in range(limit - len(open_fds()))]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + number, hard))
    try:
        yield limit + number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filled:
            os.close(fd)


def test_want_of_descriptors_names_how_many_are_needed_and_how_many_there_can_be(
    device: pyvfio.Device, own: list[int]
) -> None:
    """For new eventfds and for duplicates; nothing is left, and less is had then."""
    irq = device.irq(MSIX)
    _ = irq.count
    calls: tuple[Callable[[], object], ...] = (lambda: irq.enable(8), lambda: irq.enable(fds=own))
    for call in calls:
        with _descriptors_left(5) as limit:
            said = (
                rf"EMFILE.* for 8 vectors.* 9 descriptors are needed.* \d of them could be made.* can have {limit} open"
            )
            with pytest.raises(pyvfio.IoctlError, match=said) as caught:
                call()
            assert caught.value.arguments == {"device": BDF, "index": MSIX, "vectors": 8}
            irq.enable(2)
            irq.disable()


@pytest.mark.parametrize(
    ("vector", "error"), [("0", TypeError), (1.0, TypeError), (True, TypeError), (-1, ValueError), (16, ValueError)]
)
def test_a_vector_that_cannot_be_stopped_is_refused(
    kernel: SpecialKernel, device: pyvfio.Device, vector: int, error: type[Exception]
) -> None:
    """Before anything is stopped."""
    irq = device.irq(MSIX)
    irq.enable(2)
    kernel.clear_trace()
    with pytest.raises(error):
        irq.disable(0, vector)
    assert kernel.trace == []


@pytest.mark.parametrize("index", [INTX, ERR, REQ])
def test_kinds_with_one_vector_take_an_own_eventfd_and_end_with_it(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int], index: int
) -> None:
    """Also where the eventfd was replaced, or taken away, before."""
    irq = device.irq(index)
    irq.enable(fds=[own[0]])
    irq.enable(fds=[own[1]])
    irq.trigger()
    assert (count(own[0]), irq.wait(timeout=0)) == (0, 1)
    irq.disable(0)
    assert irq.enable(fds=[own[0]]) == (own[0],)
    assert irq.enable(fds=[None]) == (None,)
    irq.disable()
    irq.enable(fds=[None])
    irq.disable()
    assert device.irq(MSI).enable(1)


def test_asyncio_waits_for_an_interrupt(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """By the eventfd, with a wait that does not wait."""
    irq = device.irq(MSIX)
    (fd,) = irq.enable(1)

    async def run() -> int:
        raised = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(fd, lambda: raised.set_result(irq.wait(timeout=0)))
        asyncio.get_running_loop().call_later(0.01, kernel.interrupt, BDF)
        try:
            return await asyncio.wait_for(raised, 60)
        finally:
            asyncio.get_running_loop().remove_reader(fd)

    assert asyncio.run(run()) == 1


# ------------------------------------------------------------------------------------- INTx, unmasked by an eventfd


def test_each_write_to_the_eventfd_unmasks_intx(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """The descriptor is the program's, which may write to another of the same eventfd; `disable` ends it."""
    irq = device.irq(INTX)
    irq.enable()
    mine = os.eventfd(0, os.EFD_NONBLOCK)
    theirs = os.dup(mine)
    irq.unmask_by(mine)
    for _ in range(3):
        kernel.interrupt(BDF)
        kernel.interrupt(BDF)
        assert irq.wait(timeout=60) == 1
        assert irq.wait(timeout=0) == 0
        os.eventfd_write(theirs, 1)
        assert irq.wait(timeout=60) == 1
        os.eventfd_write(mine, 1)
        while kernel.poll(mine, 0):  # until then an interrupt is one with that before
            time.sleep(0.001)
    irq.disable()
    irq.enable()
    irq.unmask_by(theirs)
    for fd in (mine, theirs):
        os.close(fd)


def test_there_is_one_such_eventfd_until_it_is_taken_away(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """The second is EBUSY, and the error says what to do; the first works on."""
    irq = device.irq(INTX)
    irq.enable()
    irq.unmask_by(None)
    irq.unmask_by(own[0])
    before = open_fds()
    with pytest.raises(pyvfio.IoctlError, match=r"EBUSY.*unmask_by\(None\)") as caught:
        irq.unmask_by(own[1])
    assert caught.value.errno == errno.EBUSY
    assert open_fds() == before
    kernel.interrupt(BDF)
    kernel.interrupt(BDF)
    assert irq.wait(timeout=60) == 1
    os.eventfd_write(own[0], 1)
    assert irq.wait(timeout=60) == 1
    irq.unmask_by(None)
    irq.unmask_by(own[1])
    kernel.interrupt(BDF)
    os.eventfd_write(own[1], 1)
    assert irq.wait(timeout=60) == 1


def test_what_cannot_unmask_intx_is_refused_and_changes_nothing(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """Of a wrong class, closed, no eventfd; another kind is the kernel's ENOTTY, and nothing works before `enable`."""
    irq = device.irq(INTX)
    with pytest.raises(pyvfio.VfioError, match="is not enabled"):
        irq.unmask_by(own[0])
    irq.enable()
    unmask_by: Callable[[object], None] = irq.unmask_by  # type: ignore[assignment]
    with open(os.devnull) as null:
        closed = os.dup(own[0])
        os.close(closed)
        before, calls = open_fds(), set_irqs(kernel)
        for fd, error, says in (
            ("3", TypeError, "whole number"),
            (1.0, TypeError, "whole number"),
            (True, TypeError, "whole number"),
            (-1, ValueError, "no file descriptor"),
            (1 << 40, ValueError, "no file descriptor"),
            (closed, ValueError, "is closed"),
            (null.fileno(), ValueError, "no eventfd"),
            (device.fd, ValueError, "no eventfd"),
        ):
            with pytest.raises(error, match=says):
                unmask_by(fd)
        assert (open_fds(), set_irqs(kernel)) == (before, calls)
    irq.disable()
    device.irq(MSI).enable()
    with pytest.raises(pyvfio.IoctlError, match="Only INTx") as caught:
        device.irq(MSI).unmask_by(own[0])
    assert caught.value.errno == errno.ENOTTY


@pytest.mark.parametrize("own_ones", [False, True])
def test_threads_that_wait_for_the_same_vectors_share_what_comes(
    kernel: SpecialKernel, device: pyvfio.Device, own: Sequence[int], *, own_ones: bool
) -> None:
    """Each signal is received once; none of the threads hears of the others."""
    irq = device.irq(MSIX)
    if own_ones:
        irq.enable(fds=own[:2])
    else:
        irq.enable(2)
    received: list[int] = []
    wrong: list[BaseException] = []

    def wait(turn: int) -> None:
        try:
            while sum(received) < 400:
                got = irq.wait_any(timeout=0.05) if turn % 2 else {1: irq.wait(1, timeout=0.05)}
                received.append(sum(got.values()))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=wait, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(400):
        kernel.interrupt(BDF, 1)
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(received) == 400


class RacedKernel(SpecialKernel):
    """A fake kernel whose device raises vector 1 when somebody polls; `others` signals more are read by another thread,
    between the poll of this one and its read."""

    others = 3

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """Raise it first."""
        self.interrupt(BDF, 1)
        return super().poll(fd, timeout, *others)

    def eventfd_read(self, fd: int) -> int:
        """Read it twice, where it is another thread's."""
        count = super().eventfd_read(fd)
        if self.others == 0:
            return count
        self.others -= 1
        return super().eventfd_read(fd)


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("own_ones", [False, True])
@pytest.mark.parametrize(
    "wait", [lambda irq, end: irq.wait(1, timeout=end), lambda irq, end: irq.wait_any(timeout=end).get(1, 0)]
)
def test_a_wait_goes_on_where_another_thread_has_read_first(
    own: Sequence[int], wait: Callable[[Irq, float | None], int], *, own_ones: bool, timeout: float | None
) -> None:
    """0 is the end of the time, and nothing else."""
    with RacedKernel(groups=[(2, [DEVICE])]) as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        irq = device.irq(MSIX)
        if own_ones:
            irq.enable(fds=own[:2])
        else:
            irq.enable(2)
        assert wait(irq, timeout) == 1
        assert kernel.others == 0


class ReplacingKernel(SpecialKernel):
    """A fake kernel in which `meanwhile` happens once, between the look of a thread that waits and its read."""

    meanwhile: Callable[[], object] | None = None

    def eventfd_read(self, fd: int) -> int:
        """Do that first."""
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().eventfd_read(fd)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize(
    "wait", [lambda irq: {0: irq.wait(0, timeout=0)}, lambda irq: irq.wait_any(timeout=0)], ids=["wait", "wait_any"]
)
@pytest.mark.parametrize("changes", [1, 2, 3])
def test_a_thread_that_is_about_to_read_has_its_eventfd_whatever_others_change(
    wait: Callable[[Irq], dict[int, int]], *, both: bool, changes: int
) -> None:
    """Its vector is kept by some changes, and stopped at last: until it has read, no other file gets the number."""
    before = open_fds()
    with ReplacingKernel(groups=[(2, [DEVICE])]) as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        irq = device.irq(MSIX)
        irq.enable(4)

        def change() -> None:
            for vector in range(1, changes + 1):
                irq.disable(vector)
            irq.disable()

        for vector in range(1 + both):
            kernel.interrupt(BDF, vector)
        kernel.meanwhile = change
        assert wait(irq)[0] == 1
        assert irq.fds == ()
    gc.collect()
    assert open_fds() == before


def test_a_thread_that_comes_when_the_eventfds_are_closed_hears_the_end() -> None:
    """With the poll of the running kernel, which takes no number of a closed one."""
    kernel, guard = LinuxKernel(), Guard("an interrupt")
    row = (Eventfd(kernel, guard, kernel.eventfd(0, os.EFD_NONBLOCK)),)
    waits: tuple[Callable[[Vectors], object], ...] = (lambda it: it.wait_one(0, None), lambda it: it.wait((0,), None))
    for wait in waits:
        vectors = Vectors(kernel, guard, row, Eventfd(kernel, guard, kernel.eventfd(0, os.EFD_NONBLOCK)))
        vectors.end(pyvfio.VfioError("it was disabled"))
        with pytest.raises(pyvfio.VfioError, match="it was disabled"):
            wait(vectors)


def test_an_interrupt_that_is_there_is_read_without_a_poll(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """One system call; an eventfd of the program's own may block, and is polled before."""
    irq = device.irq(MSI)
    irq.enable()
    kernel.interrupt(BDF)
    kernel.clear_trace()
    assert irq.wait() == 1
    assert requests(kernel.trace) == ["eventfd_read"]
    irq.disable()
    fd = os.eventfd(0)
    irq.enable(fds=[fd])
    kernel.interrupt(BDF)
    kernel.clear_trace()
    assert irq.wait() == 1
    assert irq.wait(timeout=0) == 0
    assert requests(kernel.trace) == ["poll", "eventfd_read", "poll"]
    irq.disable()
    os.close(fd)


def test_a_program_that_waits_for_many_combinations_keeps_few_polls(device: pyvfio.Device) -> None:
    """So that memory stays small."""
    irq = device.irq(MSIX)
    irq.enable(4)
    for first in range(4):
        for second in range(4):
            assert irq.wait_any((first, second, 3), timeout=0) == {}
    assert irq._enabled is not None
    assert len(irq._enabled._turns) <= 5


def _wait_for_first(irq: Irq) -> dict[int, int]:
    return {0: irq.wait(0, timeout=0)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wait", [_wait_for_first, lambda irq: irq.wait_any(timeout=0)], ids=["wait", "wait_any"])
def test_a_signal_handler_that_raises_in_a_wait_loses_no_interrupt(
    device: pyvfio.Device, own: Sequence[int], wait: Callable[[Irq], dict[int, int]], *, shared: bool
) -> None:
    """At whatever point it comes: what was read is in the eventfd again, or the program has received it."""

    def handler(*_: object) -> None:
        raise Interrupt

    gc.collect()  # no finalizer of another test's objects is to run under the walk, where the handler would raise
    irq = device.irq(MSIX)
    irq.enable(fds=[own[0], own[0] if shared else own[1]])
    before = signal.signal(signal.SIGUSR1, handler)
    put_back = 0
    try:
        walk = Walk()
        for at in range(1, 1000):
            for vector in (0, 0, 1):
                irq.trigger(vector)
            expected = irq.wait_any(timeout=0)
            for vector in (0, 0, 1):
                irq.trigger(vector)
            walk = Walk({at: partial(signal.raise_signal, signal.SIGUSR1)})
            received: dict[int, int] = {}
            try:
                received = walk.run(partial(wait, irq))
            except Interrupt:
                put_back += 1
            rest = irq.wait_any(timeout=0)
            for vector in (0,) if shared else (0, 1):
                assert (received.get(vector) or rest.get(vector)) == expected[vector], walk.where
            if walk.count < at:
                break
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert walk.count > 20
    assert put_back > 20


def test_nothing_is_put_back_into_an_eventfd_that_is_closed(device: pyvfio.Device) -> None:
    """Its number may be another file's, or none."""
    irq = device.irq(MSIX)
    irq.enable(1)
    vectors = irq._enabled
    assert vectors is not None
    eventfd = vectors.row[0]
    assert eventfd is not None
    vectors.put_back([(eventfd, 3)])
    assert irq.wait(0, timeout=0) == 3
    irq.disable()
    vectors.put_back([(eventfd, 3)])
    assert eventfd.fd < 0


def test_where_a_handler_disables_the_interrupt_and_raises_nothing_is_put_back(device: pyvfio.Device) -> None:
    """The eventfds are closed then, and their numbers may be other files'."""
    irq = device.irq(MSIX)

    def handler(*_: object) -> None:
        irq.disable()
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        walk, at = Walk(), 0
        while at <= walk.count:
            at += 1
            irq.enable(2)
            irq.trigger(1)
            walk = Walk({at: partial(signal.raise_signal, signal.SIGUSR1)})
            try:
                assert walk.run(partial(irq.wait_any, timeout=0)) == {1: 1}
            except Interrupt:
                assert irq.fds == ()
            irq.disable()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert at > 20


# ------------------------------------------------------------------------------------------------- what a wait leaves


class _Watched(SpecialKernel):
    """Notes the timeout of each poll, and counts the objects that poll."""

    polls: list[float | None]
    pollers = 0

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """Note the timeout."""
        self.polls.append(timeout)
        return super().poll(fd, timeout, *others)

    def poller(self, *fds: int) -> Poll:
        """Count."""
        self.pollers += 1
        return super().poller(*fds)


@pytest.fixture
def watched() -> Iterator[_Watched]:
    """Linux 6.12."""
    with _Watched(groups=[(2, [DEVICE])]) as kernel, nothing_left(kernel):
        kernel.polls = []
        yield kernel


_WAITS: dict[str, Callable[[Irq, float | None], object]] = {
    "one": lambda irq, timeout: irq.wait(1, timeout=timeout),
    "any of one": lambda irq, timeout: irq.wait_any([1], timeout=timeout),
    "any": lambda irq, timeout: irq.wait_any(timeout=timeout),
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wait", _WAITS)
def test_a_wait_polls_for_the_time_that_is_left(
    watched: _Watched, own: Sequence[int], wait: str, *, shared: bool
) -> None:
    """All of the time at first, and less if another thread has read the eventfd meanwhile. poll(2) counts in an int."""
    with pyvfio.open_device(BDF, kernel=watched) as device:
        irq = device.irq(MSIX)
        irq.enable(fds=own[:2] if shared else [own[0], own[1]])
        for timeout, polled in ((None, None), (2.5, 2.5), (0, 0), (-1, 0), (1e12, ((1 << 31) - 1) / 1000)):
            irq.trigger(1)
            watched.polls.clear()
            assert _WAITS[wait](irq, timeout) in (1, {1: 1})
            assert watched.polls == [polled]
        for timeout in (None, 60.0):
            irq.trigger(1)
            watched.polls.clear()
            watched.fail(call="eventfd_read", errno=errno.EAGAIN)
            assert _WAITS[wait](irq, timeout) in (1, {1: 1})
            first, second = watched.polls
            assert (first, second) == (None, None) if timeout is None else 0 < (second or 0) <= (first or 0) == 60


@pytest.mark.parametrize("own_ones", [False, True])
@pytest.mark.parametrize("wait", _WAITS)
def test_a_wait_that_has_ended_is_nobody_to_wake_and_the_next_one_polls_as_the_first_did(
    watched: _Watched, own: Sequence[int], wait: str, *, own_ones: bool
) -> None:
    """With an interrupt or two, after the time, and with an error."""
    with pyvfio.open_device(BDF, kernel=watched) as device:
        irq = device.irq(MSIX)
        for raised in ([1], [0, 1], [], None):
            if own_ones:
                irq.enable(fds=own[:2])
            else:
                irq.enable(2)
            watched.pollers = 0
            for _ in range(3):
                for vector in [1] if raised is None else raised:
                    irq.trigger(vector)
                if raised is None:
                    watched.fail(call="eventfd_read", errno=errno.EIO)
                    with pytest.raises(OSError, match="Input/output"):
                        _WAITS[wait](irq, 0)
                    irq.wait_any(timeout=0)
                else:
                    assert bool(_WAITS[wait](irq, 0)) == (1 in raised)
                irq.wait(0, timeout=0)
            assert raised is None or watched.pollers == 2
            watched.clear_trace()
            irq.disable()
            assert requests(watched.trace) == ["VFIO_DEVICE_SET_IRQS", *["close"] * 3]


@pytest.mark.parametrize("own_ones", [False, True])
def test_a_wait_for_several_goes_on_where_others_have_read_all_of_them(
    kernel: SpecialKernel, device: pyvfio.Device, own: Sequence[int], *, own_ones: bool
) -> None:
    """An empty answer is the end of the time, and nothing else."""
    irq = device.irq(MSIX)
    if own_ones:
        irq.enable(fds=own[:2])
    else:
        irq.enable(2)
    for read in ([0, 1], [0], [1]):
        for vector, times in enumerate((2, 3)):
            for _ in range(times):
                irq.trigger(vector)
        for vector in read:
            kernel.fail(call="eventfd_read", errno=errno.EAGAIN, nth=vector + 1)
        counts = irq.wait_any(timeout=60)
        if len(read) == 1:
            assert read[0] not in counts, "another thread has that count"
            counts |= irq.wait_any(timeout=60)
        assert counts == {0: 2, 1: 3}
        assert kernel.planned_failures == ()


# ----------------------------------------------------------------------------------------- small changes, and hints


def test_another_descriptor_of_the_eventfd_that_a_vector_has_is_no_change_for_the_kernel(
    kernel: SpecialKernel, device: pyvfio.Device, own: list[int]
) -> None:
    """The program knows the vector by the new number from then on, and no signal is lost."""
    irq = device.irq(MSIX)
    irq.enable(fds=own[:2])
    kernel.interrupt(BDF, 0)
    again = os.dup(own[0])
    kernel.clear_trace()
    assert irq.enable(fds=[again]) == (again,)
    assert set_irqs(kernel) == []
    assert irq.fds == (again, own[1])
    kernel.interrupt(BDF, 0)
    assert irq.wait(0, timeout=0) == 2
    os.close(again)


def test_the_eventfd_that_unmasks_is_closed_when_it_no_longer_does(device: pyvfio.Device, own: list[int]) -> None:
    """The duplicate of the library, at once; the program's own stays open."""
    irq = device.irq(INTX)
    irq.enable()
    before = open_fds()
    irq.unmask_by(own[0])
    assert len(open_fds()) > len(before)
    irq.unmask_by(None)
    assert open_fds() == before
    irq.unmask_by(own[0])
    held = irq.held()
    irq.disable()
    assert [eventfd.fd for eventfd in (*held[0], held[1]) if eventfd is not None] == [-1, -1]
    irq.enable()
    assert open_fds() == before
    assert irq.held()[1] is None


@pytest.mark.parametrize(
    ("enabled", "asked", "hint"),
    [
        (MSI, MSIX, r"Only one kind .*device\.irq\(VFIO_PCI_MSI_IRQ_INDEX\)"),
        (INTX, MSI, r"Only one kind .*device\.irq\(VFIO_PCI_INTX_IRQ_INDEX\)"),
        (REQ, MSIX, "Only an enabled interrupt"),
        (MSI, REQ, "Only an enabled interrupt"),
        (None, MSIX, "Only an enabled interrupt"),
        (MSIX, MSIX, "Only an enabled interrupt"),
    ],
)
def test_a_refusal_names_an_interrupt_that_is_in_the_way_and_no_other(
    kernel: SpecialKernel, device: pyvfio.Device, enabled: int | None, asked: int, hint: str
) -> None:
    """INTx, MSI and MSI-X exclude each other. The error has the arguments of the call."""
    for index in (INTX, MSI, MSIX, ERR, REQ):
        assert device.irq(index).fds == ()
    if enabled is not None:
        device.irq(enabled).enable()
    kernel.fail(call="ioctl", request="VFIO_DEVICE_SET_IRQS", errno=errno.EINVAL)
    start = 1 if enabled == asked else 0
    with pytest.raises(pyvfio.IoctlError, match=hint) as caught:
        device.irq(asked).enable(1, start=start)
    flags = ioctls.VFIO_IRQ_SET_DATA_EVENTFD | ioctls.VFIO_IRQ_SET_ACTION_TRIGGER
    assert caught.value.arguments == {"flags": flags, "index": asked, "start": start, "count": 1}


def test_a_kind_without_vectors_says_that_there_are_none() -> None:
    """Whatever is asked of that kind."""
    with (
        SpecialKernel(groups=[(2, [FakeDevice(BDF, msi=1, msix=0)])]) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        msi, msix = device.irq(MSI), device.irq(MSIX)
        assert [(irq.count, irq.can_grow) for irq in (msi, msix)] == [(1, False), (0, False)]
        refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
            (ValueError, "has no vectors, not 0", partial(msix.disable, 0)),
            (ValueError, "MSI_IRQ_INDEX .* has vectors 0 to 0, not 1", partial(msi.disable, 1)),
            (pyvfio.UnsupportedError, "has 0 vectors, so 1 cannot be enabled", msix.enable),
            (pyvfio.UnsupportedError, "has 1 vector, so 2 cannot be enabled", partial(msi.enable, 2)),
        ]
        for error, says, call in refused:
            with pytest.raises(error, match=says):
                call()
