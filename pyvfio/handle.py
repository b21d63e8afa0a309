"""An owned file descriptor. Only the process that opened the descriptor can use it."""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from threading import get_ident
from typing import ClassVar, TypeVar

from pyvfio import ioctls
from pyvfio.errors import ClosedError, HandOverError, IoctlError, raise_collected
from pyvfio.guard import ContextManager, Guard, closing, forget_in_child, run_outside, uninterrupted
from pyvfio.kernel import IoctlArgument, Kernel, LinuxKernel
from pyvfio.unique import Unique
from pyvfio.units import as_number

_First = TypeVar("_First")
_Second = TypeVar("_Second")
_Result = TypeVar("_Result")
_Answer = TypeVar("_Answer")
_NOT_THE_KIND = (errno.EBADF, errno.ENOTTY, errno.EINVAL)
_PATIENCE = 1.0  # seconds that a close waits for system calls of other threads
_INTERVAL = 0.0001  # seconds between two polls of that wait


class _Usable:
    """The descriptor of a usable handle; -1 after `close` or `set_aside`, and in a forked child."""

    __slots__ = ("__weakref__", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        forget_in_child(self)

    def forget(self) -> None:
        """Make the handle unusable, without a system call."""
        self.fd = -1


class Handle(ContextManager, Unique):
    """The base of all classes that own a descriptor, such as `Container`, `Group`, `Device` and `Iommufd`.

    A handle is a context manager, and `close()` can be called twice. In a forked child `fd` raises ForkedError, and
    `close()` does nothing. Parent and child share the kernel object, and a close in the child would change the state of
    the parent. A handle that is garbage collected while open closes the descriptor and warns ResourceWarning, as files
    do.

    Synchronization: `guard` holds the lock; see `pyvfio.guard`.
    """

    requests: ClassVar[Mapping[str, int]] = vars(ioctls)
    """The numbers of the requests of `ioctl`, by name. For the library."""

    def __init__(self, kernel: Kernel, fd: int, what: str, *, guard: Guard | None = None) -> None:
        self._kernel = kernel
        self._aside = -1  # the descriptor during a hand-over to another process
        self._users: list[int] = []  # the thread of each system call in progress on the descriptor
        self._left: list[int] = []  # the descriptor, when the last of these calls has to close it
        self._usable = _Usable(fd)
        self.guard = guard or Guard(what)
        self._fd = fd

    @property
    def kernel(self) -> Kernel:
        """The kernel that makes the system calls. Objects opened through this handle inherit the kernel."""
        return self._kernel

    @property
    def fd(self) -> int:
        """The descriptor.

        Raises ClosedError; ForkedError in a child of the process that opened the handle; HandOverError during a
        hand-over to another process.
        """
        fd = self._usable.fd
        if fd < 0:
            self.guard.check()
            self.check_here()
            raise ClosedError(f"{self.guard.what} has been closed")
        return fd

    @property
    def closed(self) -> bool:
        """Whether the handle has been closed."""
        return self._fd < 0 and self._aside < 0

    def check_usable(self) -> None:
        """Raise as `fd` does if the descriptor must not be used."""
        if self._usable.fd < 0:
            _ = self.fd

    def check_here(self) -> None:
        """Raise HandOverError during a hand-over to another process."""
        if self._aside >= 0:
            raise HandOverError(
                f"{self.guard.what} is being handed to another process",
                hint="Call cancel() or finish() of the HandOver, which hand_over(mapper) returns again: the call "
                "decides which process owns the object",
            )

    def ioctl(
        self,
        request: str,
        argument: IoctlArgument = 0,
        /,
        *,
        hints: Mapping[int, str] | None = None,
        **given: int | str,
    ) -> int:
        """Make the ioctl `request`, a name of linux/vfio.h or linux/iommufd.h, without further checks.

        Raises IoctlError with the arguments `given` and, if `hints` has an entry for the errno, that hint.
        """
        try:
            return self.use_fd(self._kernel.ioctl, self.requests[request], argument)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"{self.guard.what}: {error.strerror}",
                request=request,
                arguments=given,
                hint=(hints or {}).get(error.errno or 0, ""),
            ) from error

    def use_fd(self, call: Callable[[int, _First, _Second], _Result], first: _First, second: _Second, /) -> _Result:
        """Call `call(fd, first, second)` and keep the descriptor open during the call. For the library.

        No other file can get the number of the descriptor before the call returns. Raises as `fd`.

        Synchronization: any thread; takes no lock. A close waits for the calls of other threads.
        Cost: 0.3 µs. The two arguments fit ioctl, pread and pwrite; `*arguments` would add 1 µs.
        """
        me, users = get_ident(), self._users
        try:
            users.append(me)  # before the descriptor is read: a close invalidates the descriptor, then reads `users`
            fd = self._usable.fd
            if fd < 0:
                fd = self.fd  # raises the error that fits the state
            return call(fd, first, second)
        finally:
            try:  # noqa: SIM105 (suppress() costs as much as this whole method)
                users.remove(me)
            except ValueError:  # a signal handler raised before append()
                pass
            if self._left and not users:
                self._close_left()

    @property
    def has_dependents(self) -> bool:
        """Whether objects that depend on a region of an open device exist. For the library.

        A dependent, such as a mapping of a BAR for another device, is closed before the device.
        """
        return False

    def close_dependents(self) -> None:
        """Close all dependents before the device is closed. For the library.

        The caller holds no lock: the locks of mappers are above the lock of the device.
        """

    def end_dependents(self) -> bool:
        """Refuse new dependents from now on. Return whether none is left. For the library."""
        return True

    @closing
    def close(self) -> None:
        """Close the descriptor. Does nothing if already closed, or in a forked child."""
        self.close_fd()

    @uninterrupted()
    def close_fd(self) -> None:
        """Close the descriptor and nothing else. A descriptor that is set aside is closed too. For the library.

        Waits up to a second for system calls of other threads that use the descriptor. The wait is bounded, since a
        signal handler or a finalizer in such a call can wait for a lock that this thread holds. After a second, the
        last of these calls closes the descriptor.
        """
        fd = self.release_fd()
        if fd < 0:
            return
        if self._is_used_by_others():
            end = time.monotonic() + _PATIENCE
            while self._is_used_by_others():
                if time.monotonic() > end:
                    self._left.append(fd)
                    if not self._users:
                        self._close_left()
                    return
                time.sleep(_INTERVAL)
        self._kernel.close(fd)

    def _is_used_by_others(self) -> bool:
        return any(user != get_ident() for user in tuple(self._users))

    @uninterrupted()
    def _close_left(self) -> None:
        while self._left:
            with suppress(IndexError):  # another thread took the descriptor first
                self._kernel.close(self._left.pop())

    def release_fd(self) -> int:
        """Return the descriptor, which stays open and belongs to the caller; the handle is closed. For the library."""
        fd = max(self._fd, self._aside)
        # Before close(2): the kernel frees the descriptor even when close(2) returns an error.
        self._fd = self._aside = self._usable.fd = -1
        return fd

    def set_aside(self) -> None:
        """Refuse every use of the descriptor until `take_back`, for a hand-over. A second call does nothing."""
        if self._aside < 0:
            self._fd, self._aside, self._usable.fd = -1, self._fd, -1

    def take_back(self) -> None:
        """Undo `set_aside`."""
        if self._aside >= 0:
            self._fd, self._aside, self._usable.fd = self._aside, -1, self._aside

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) < 0 or self.guard.forked:
            return
        try:
            warnings.warn(f"{self.guard.what} was never closed", ResourceWarning, stacklevel=2, source=self)
        finally:  # a warning filter can turn the warning into an exception
            run_outside(self.close_fd)


def give_up_fd(handle: Handle) -> int:
    """Call `release_fd` of the handle's own class. For decorators."""
    return handle.release_fd()


def checked_fd(fd: int) -> int:
    """Return the number of a descriptor that the caller passed.

    Raises TypeError, and ValueError for a number that no descriptor can have.
    """
    if not 0 <= (number := as_number(fd, "fd")) < 1 << 31:  # descriptors are C ints
        raise ValueError(f"{number} is no file descriptor")
    return number


def check_kind(handle: Handle, question: Callable[[], _Answer], kind: str) -> _Answer:
    """Return the answer to an ioctl that only descriptors of one kind support. For the library.

    Raises ValueError for a descriptor of another kind. On any error the handle releases the descriptor, unclosed.
    """
    try:
        return question()
    except BaseException as error:
        fd = handle.release_fd()
        if isinstance(error, IoctlError) and error.errno in _NOT_THE_KIND:
            where = " of the running kernel; for a fake, pass kernel=" * isinstance(handle.kernel, LinuxKernel)
            raise ValueError(f"descriptor {fd} is not {kind}{where} ({error.request}: {error.strerror})") from error
        raise


def attempt(step: Callable[[], object], failures: list[Exception]) -> None:
    """Run one step of a tear-down. An exception is appended to `failures`, so that the next step can run."""
    try:
        step()
    except Exception as error:
        failures.append(error)


def attempt_all(what: str, steps: Iterable[Callable[[], object]]) -> None:
    """Run all steps of a tear-down, and then raise the single failure, or a RollbackError of several."""
    failures: list[Exception] = []
    for step in steps:
        attempt(step, failures)
    raise_collected(what, failures)
