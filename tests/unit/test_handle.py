"""Handle: a descriptor that is open until it is closed, and only in the process that opened it."""

from __future__ import annotations

import errno
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

import pyvfio
from pyvfio import handle as handle_module
from pyvfio import ioctls
from pyvfio.handle import Handle, attempt, attempt_all
from pyvfio.recording.format import Header, Reset
from pyvfio.recording.log import EventLog
from pyvfio.testing.fake import FakeKernel
from tests.unit.fakes import BDF, Interrupt, nothing_left
from tests.unit.processes import in_child, open_fds


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A kernel."""
    with FakeKernel() as made:
        yield made


def _handle(kernel: FakeKernel) -> Handle:
    return Handle(kernel, kernel.open("/dev/null", os.O_RDWR), "a thing")


def test_a_handle_is_open_until_it_is_closed(kernel: FakeKernel) -> None:
    """Closing twice is fine; using it afterwards says what has been closed."""
    with nothing_left(kernel):
        handle = _handle(kernel)
        assert os.fstat(handle.fd)
        assert handle.kernel is kernel
        closed = [handle.closed]
        for _ in range(2):
            handle.close()
            closed.append(handle.closed)
        assert closed == [False, True, True]
        with pytest.raises(pyvfio.ClosedError, match="a thing has been closed"):
            _ = handle.fd
        assert [call.call for call in kernel.trace] == ["open", "close"]


def test_leaving_a_with_statement_closes(kernel: FakeKernel) -> None:
    """Also by an exception."""
    with nothing_left(kernel), pytest.raises(RuntimeError, match="mine"), _handle(kernel):
        raise RuntimeError("mine")


@pytest.fixture
def without_stdin(kernel: FakeKernel) -> Iterator[None]:
    """The descriptor 0 is free, as in a daemon that has closed its standard input."""
    del kernel  # which has descriptors of its own, from before
    saved = os.dup(0)
    os.close(0)
    try:
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@pytest.mark.usefixtures("without_stdin")
def test_the_descriptor_0_is_one_as_any_other(kernel: FakeKernel) -> None:
    """It is used, handed over, taken back and closed."""
    with nothing_left(kernel):
        handle = _handle(kernel)
        assert (handle.fd, handle.closed) == (0, False)
        handle.check_usable()
        assert handle.use_fd(_is_open, 0, 0)
        for _ in range(2):
            handle.set_aside()
            assert not handle.closed
            for use in (handle.check_usable, handle.check_here, lambda: handle.use_fd(_is_open, 0, 0)):
                with pytest.raises(pyvfio.HandOverError):
                    use()
        for _ in range(2):
            handle.take_back()
            assert handle.fd == 0
        handle.close()
        assert handle.closed
    with nothing_left(kernel):
        handle = _handle(kernel)
        handle.set_aside()
        handle.close()
        assert handle.closed
    with nothing_left(kernel), pytest.warns(ResourceWarning, match="a thing was never closed"):
        _handle(kernel)


@pytest.mark.usefixtures("without_stdin")
def test_a_record_whose_descriptor_is_0_has_its_events(kernel: FakeKernel, tmp_path: Path) -> None:
    """And its end."""
    with nothing_left(kernel):
        log = EventLog(tmp_path / "record", Header(bytes(256), resettable=False), times=False, keep=0)
        log.add(Reset())
        log.close()
    assert (tmp_path / "record").read_text().endswith("begin\nreset\nend\n")


def test_close_that_reports_an_error_is_not_made_again(kernel: FakeKernel) -> None:
    """The descriptor is gone whatever close(2) says, and its number may be another's by the next time."""
    with nothing_left(kernel):
        handle = _handle(kernel)
        kernel.fail(call="close", errno=errno.EIO, after=True)
        with pytest.raises(OSError, match="Input/output"):
            handle.close()
        assert handle.closed
        handle.close()


def test_a_forgotten_handle_warns_and_closes_its_descriptor(kernel: FakeKernel) -> None:
    """As files do."""
    with nothing_left(kernel), pytest.warns(ResourceWarning, match="a thing was never closed"):
        _handle(kernel)


def test_a_forgotten_handle_is_closed_where_warnings_are_errors(kernel: FakeKernel) -> None:
    """The error has nowhere to go; the descriptor goes all the same."""
    seen: list[str] = []

    def hear(unraisable: object) -> None:
        seen.append(type(unraisable).__name__)

    former, sys.unraisablehook = sys.unraisablehook, hear
    try:
        with nothing_left(kernel), warnings.catch_warnings():
            warnings.simplefilter("error")
            _handle(kernel)
            gc.collect()
    finally:
        sys.unraisablehook = former
    assert seen == ["UnraisableHookArgs"]


def test_a_forgotten_device_closes_all_that_was_opened_for_it(kernel: FakeKernel) -> None:
    """Container, group and device hold each other; together they go."""
    with nothing_left(kernel):
        with pytest.warns(ResourceWarning, match="was never closed") as warned:
            _forget_a_device(kernel)
        told = {str(warning.message).split(" was")[0] for warning in warned}
        assert told == {"the VFIO container", "IOMMU group 2", f"device {BDF}"}


def _forget_a_device(kernel: FakeKernel) -> None:
    pyvfio.open_device(BDF, kernel=kernel)
    gc.collect()


def test_in_a_forked_child_using_a_handle_is_an_error_and_closing_it_is_nothing(kernel: FakeKernel) -> None:
    """The descriptor stays open in both; a child that forgets it does not warn either."""
    handle = _handle(kernel)
    fd, owner = handle.fd, os.getpid()

    def child() -> None:
        with pytest.raises(pyvfio.ForkedError, match=f"a thing belongs to process {owner}"):
            _ = handle.fd
        before = open_fds()
        handle.close()
        handle.__del__()
        assert open_fds() == before
        assert not handle.closed

    assert in_child(child) == 0
    assert handle.fd == fd
    handle.close()


def test_a_request_that_is_refused_says_what_was_asked_of_whom(kernel: FakeKernel) -> None:
    """The name in C, the arguments, the errno, and the hint for that errno alone."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        with pytest.raises(pyvfio.IoctlError) as caught:
            container.ioctl("VFIO_SET_IOMMU", 1, hints={errno.EINVAL: "this one", errno.EIO: "not this"}, iommu="one")
        assert caught.value.request == "VFIO_SET_IOMMU"
        assert caught.value.arguments == {"iommu": "one"}
        assert caught.value.hint == "this one"
        assert isinstance(caught.value.__cause__, OSError)
        assert str(caught.value).startswith("VFIO_SET_IOMMU(iommu=one): EINVAL, the VFIO container: Invalid argument")


def test_every_descriptor_is_closed_on_exec(kernel: FakeKernel) -> None:
    """Container, group, device, eventfds: no program that is started has them."""
    with nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as device:
        eventfds = device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
        for fd in (device.container.fd, device.group.fd, device.fd, *eventfds):
            assert not os.get_inheritable(fd)


def test_all_steps_of_a_tear_down_are_tried() -> None:
    """And all that they raised is told: the one failure as it is, several together."""
    made: list[int] = []

    def fails(what: str = "first") -> None:
        raise ValueError(what)

    attempt_all("a tear-down", [lambda: made.append(1)])
    with pytest.raises(ValueError, match="first"):
        attempt_all("a tear-down", [fails, lambda: made.append(2)])
    with pytest.raises(pyvfio.RollbackError) as caught:
        attempt_all("a tear-down", [fails, partial(fails, "second"), lambda: made.append(3)])
    assert str(caught.value) == "a tear-down: first; then second"
    assert made == [1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        attempt(_interrupts, [])


def _interrupts() -> None:
    raise KeyboardInterrupt


def _is_open(fd: int, *_others: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_close_waits_for_the_system_calls_of_other_threads(kernel: FakeKernel) -> None:
    """So that none of them meets another file that got the number."""
    before = open_fds()
    handle = _handle(kernel)
    begun, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def call(fd: int, *_others: int) -> None:
        begun.set()
        go_on.wait(10)
        seen.append(_is_open(fd))

    user, closer = (threading.Thread(target=step) for step in (lambda: handle.use_fd(call, 0, 0), handle.close))
    user.start()
    begun.wait(10)
    closer.start()
    closer.join(0.1)
    waits = closer.is_alive()
    with pytest.raises(pyvfio.ClosedError):
        handle.use_fd(_is_open, 0, 0)
    go_on.set()
    user.join()
    closer.join()
    assert (waits, seen, handle.closed, open_fds()) == (True, [True], True, before)


def test_a_close_in_a_system_call_of_its_own_thread_waits_for_nothing(kernel: FakeKernel) -> None:
    """Such as that of a signal handler."""
    before = open_fds()
    handle = _handle(kernel)
    begin = time.monotonic()
    handle.use_fd(lambda *_: handle.close(), 0, 0)
    assert time.monotonic() - begin < 0.9
    assert open_fds() == before


@pytest.mark.long
def test_a_close_that_a_system_call_waits_for_leaves_the_descriptor_to_it(kernel: FakeKernel) -> None:
    """After a second: a finalizer in that thread may wait for a lock of the thread that closes.

    The last of several calls closes it, and a call that ends while the handle is open closes nothing."""
    before = open_fds()
    handle = _handle(kernel)
    closer = threading.Thread(target=handle.close)
    begun, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def long_call(fd: int, *_others: int) -> None:
        begun.set()
        go_on.wait(30)
        seen.append(_is_open(fd))

    last = threading.Thread(target=lambda: handle.use_fd(long_call, 0, 0))
    last.start()
    begun.wait(10)
    assert handle.use_fd(_is_open, 0, 0)
    fd = handle.fd

    def call(fd: int, *_others: int) -> bool:
        closer.start()
        closer.join(10)
        return _is_open(fd)

    assert handle.use_fd(call, 0, 0)
    assert not closer.is_alive()
    seen.append(_is_open(fd))
    go_on.set()
    last.join()
    assert (seen, open_fds()) == ([True, True], before)


def _interrupted_at(nth: int, call: Callable[[], object]) -> int:
    """Make a call; at the nth place of handle.py at which Python looks for signals one comes, whose handler raises.
    Return how many there were."""
    count = 0

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        if event in {"call", "c_return"} and frame.f_code.co_filename == handle_module.__file__:
            count += 1
            if count == nth:
                sys.setprofile(None)
                raise Interrupt

    sys.setprofile(profile)
    try:
        with suppress(Interrupt):
            call()
    finally:
        sys.setprofile(None)
    return count


def test_a_system_call_that_a_signal_handler_ends_keeps_no_close_waiting(kernel: FakeKernel) -> None:
    """Wherever the handler raises."""
    before = open_fds()
    at = 1
    while True:
        handle = _handle(kernel)
        count = _interrupted_at(at, partial(handle.use_fd, kernel.pread, 1, 0))
        closer = threading.Thread(target=handle.close)
        begin = time.monotonic()
        closer.start()
        closer.join()
        assert time.monotonic() - begin < 0.9, at
        if count < at:
            break
        at += 1
    assert at > 4
    assert open_fds() == before
