"""An owned file descriptor: open until it is closed, usable only in the process that opened it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from operator import index
from threading import get_ident
from typing import TypeVar, TypeVarTuple

from pyvfio import ioctls
from pyvfio.errors import ClosedError, HandOverError, IoctlError, raise_collected
from pyvfio.guard import ContextManager, Guard, closing, run_outside, uninterrupted
from pyvfio.kernel import IoctlArgument, Kernel

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")
_PATIENCE = 1.0  # seconds that a close waits for system calls of other threads
_INTERVAL = 0.0001  # seconds between two looks


class Handle(ContextManager):
    """Base of everything that owns a descriptor: `Container`, `Group`, `Device`.

    A context manager; `close()` may be called twice. In a forked child, `fd` raises ForkedError and `close()` does
    nothing: the descriptor is shared, and the child would act on its parent. An object that is forgotten warns
    ResourceWarning and closes its descriptor, as files do.

    Synchronization: `guard` has the lock; see `pyvfio.guard`.
    """

    def __init__(self, kernel: Kernel, fd: int, what: str, *, guard: Guard | None = None) -> None:
        self._kernel = kernel
        self._aside = -1  # the descriptor, while it is being handed to another process
        self._users: list[int] = []  # the threads that are in a system call with the descriptor, once for each call
        self._left: list[int] = []  # the descriptor that the last of them closes
        self.guard = guard or Guard(what)
        self._fd = fd

    @property
    def kernel(self) -> Kernel:
        """Who makes the system calls; inherited by everything opened from here."""
        return self._kernel

    @property
    def fd(self) -> int:
        """The descriptor. Raises ClosedError, ForkedError in a child of the process that opened it, and HandOverError
        where it is being handed to another process."""
        self.guard.check()
        if self._fd < 0:
            self.check_here()
            raise ClosedError(f"{self.guard.what} has been closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close()` has been called."""
        return self._fd < 0 and self._aside < 0

    def check_usable(self) -> None:
        """Raise as `fd` does where the descriptor must not be used."""
        _ = self.fd

    def check_here(self) -> None:
        """Raise HandOverError while the descriptor is being handed to another process."""
        if self._aside >= 0:
            raise HandOverError(
                f"{self.guard.what} is being handed to another process",
                hint="cancel() or finish() of the HandOver says who has it from now on",
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
        """Make the ioctl that linux/vfio.h calls `request`, as it is. Raises IoctlError, which has `given` and, of
        `hints`, the one for the errno."""
        number: int = vars(ioctls)[request]
        try:
            return self.use_fd(self._kernel.ioctl, number, argument)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"{self.guard.what}: {error.strerror}",
                request=request,
                arguments=given,
                hint=(hints or {}).get(error.errno or 0, ""),
            ) from error

    def use_fd(self, call: Callable[[int, *_Arguments], _Result], /, *arguments: *_Arguments) -> _Result:
        """Call `call(fd, *arguments)`, and keep the descriptor open meanwhile: no other file gets its number. Raises as
        `fd`. For the library.

        Synchronization: any thread; no lock. A close waits for the calls of other threads. Cost: 0.6 µs.
        """
        me = get_ident()
        try:
            self._users.append(me)  # before the look at the descriptor: a close looks in the other order
            return call(self.fd, *arguments)
        finally:
            self._users.remove(me)
            if self._left and not self._users:
                self._close_left()

    @property
    def has_dependents(self) -> bool:
        """Whether something reaches a region of a device that is open by it, and ends before. For the library."""
        return False

    def close_dependents(self) -> None:
        """End what reaches a region of a device that is open by it, before that device is closed. For the library; the
        caller holds no lock, since those of mappers are above."""

    def end_dependents(self) -> bool:
        """Let nothing reach a region of it any more. Return whether nothing does. For the library."""
        return True

    @closing
    def close(self) -> None:
        """Close the descriptor; twice is fine, and in a forked child nothing happens."""
        self.close_fd()

    @uninterrupted()
    def close_fd(self) -> None:
        """Close the descriptor and nothing else, also one that is set aside. For the library.

        System calls of other threads end before, a second at most: a signal handler or a finalizer in one of them may
        wait for a lock that this thread holds. After that time the last of these calls closes the descriptor.
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
            with suppress(IndexError):  # another thread was first
                self._kernel.close(self._left.pop())

    def release_fd(self) -> int:
        """Give up the descriptor, which stays open and is the caller's; the object is closed. For the library."""
        fd = max(self._fd, self._aside)
        self._fd = self._aside = -1  # before close(2): a descriptor is gone even when that reports an error
        return fd

    def set_aside(self) -> None:
        """Let nobody use the descriptor until `take_back`: it is being handed to another process. Twice is fine."""
        if self._aside < 0:
            self._fd, self._aside = -1, self._fd

    def take_back(self) -> None:
        """Undo `set_aside`."""
        if self._aside >= 0:
            self._fd, self._aside = self._aside, -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) < 0 or self.guard.forked:
            return
        try:
            warnings.warn(f"{self.guard.what} was never closed", ResourceWarning, stacklevel=2, source=self)
        finally:  # a program may have made warnings errors
            run_outside(self.close_fd)


def give_up_fd(handle: Handle) -> int:
    """As `Handle.release_fd`, of its class."""
    return handle.release_fd()


def checked_fd(fd: int) -> int:
    """A descriptor's number that the caller has given. Raises TypeError, and ValueError for one that is none."""
    if not 0 <= (number := index(fd)) < 1 << 31:  # an int in C
        raise ValueError(f"{number} is no file descriptor")
    return number


def attempt(step: Callable[[], object], failures: list[Exception]) -> None:
    """Make one step of a tear-down; what it raises goes to `failures`, so that the next step is made all the same."""
    try:
        step()
    except Exception as error:
        failures.append(error)


def attempt_all(what: str, steps: Iterable[Callable[[], object]]) -> None:
    """Make all steps of a tear-down, and then raise what they raised: the one failure, or a RollbackError of all."""
    failures: list[Exception] = []
    for step in steps:
        attempt(step, failures)
    raise_collected(what, failures)
