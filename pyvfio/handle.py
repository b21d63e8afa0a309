"""An owned file descriptor: open until it is closed, usable only in the process that opened it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

from pyvfio import ioctls
from pyvfio.errors import ClosedError, ForkedError, HandOverError, IoctlError, raise_collected
from pyvfio.kernel import IoctlArgument, Kernel


class Handle:
    """Base of everything that owns a descriptor: `Container`, `Group`, `Device`.

    A context manager; `close()` may be called twice. In a forked child, `fd` raises ForkedError and `close()` does
    nothing: the descriptor is shared, and what the child did with it would happen to its parent. An object that is
    forgotten warns ResourceWarning and closes its descriptor, as files do.

    Synchronization: none of its own.
    """

    def __init__(self, kernel: Kernel, fd: int, what: str) -> None:
        self._kernel = kernel
        self._fd = fd
        self._aside = -1  # the descriptor, while it is being handed to another process
        self._what = what
        self._pid = os.getpid()

    @property
    def kernel(self) -> Kernel:
        """Who makes the system calls; inherited by everything opened from here."""
        return self._kernel

    @property
    def fd(self) -> int:
        """The descriptor. Raises ClosedError, ForkedError in a child of the process that opened it, and HandOverError
        where it is being handed to another process."""
        if os.getpid() != self._pid:
            raise ForkedError(self._what, owner=self._pid)
        if self._fd < 0:
            self._check_here()
            raise ClosedError(f"{self._what} has been closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `close()` has been called."""
        return self._fd < 0 and self._aside < 0

    def _ioctl(
        self,
        request: str,
        argument: IoctlArgument = 0,
        /,
        *,
        hints: Mapping[int, str] | None = None,
        **given: int | str,
    ) -> int:
        """Make the request that linux/vfio.h calls `request`; `given` and the hint for the errno go into IoctlError."""
        number: int = vars(ioctls)[request]
        try:
            return self._kernel.ioctl(self.fd, number, argument)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"{self._what}: {error.strerror}",
                request=request,
                arguments=given,
                hint=(hints or {}).get(error.errno or 0, ""),
            ) from error

    def close(self) -> None:
        """Close the descriptor; twice is fine, and in a forked child nothing happens."""
        if not self._forked and self._fd >= 0:
            self._close_fd()

    def _set_aside(self) -> None:
        """Nobody may use it, until `_take_back`: it is being handed to another process. Twice is fine."""
        if self._aside < 0:
            self._aside = self._fd
        self._fd = -1

    def _take_back(self) -> None:
        """Undo `_set_aside`, also one that a signal handler has ended."""
        if self._aside >= 0:
            self._fd = self._aside
        self._aside = -1

    def _check_here(self) -> None:
        if self._aside >= 0:
            raise HandOverError(
                f"{self._what} is being handed to another process",
                hint="cancel() or finish() of the HandOver says who has it from now on",
            )

    def _abandon(self) -> None:
        """Forget the descriptor, which stays open."""
        self._fd = self._aside = -1

    @property
    def _forked(self) -> bool:
        return os.getpid() != self._pid

    def _close_fd(self) -> None:
        fd, self._fd = self._fd, -1  # first: a descriptor is gone even when close(2) reports an error
        self._kernel.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0 and not self._forked:
            try:
                warnings.warn(f"{self._what} was never closed", ResourceWarning, stacklevel=2, source=self)
            finally:  # a program may have made warnings errors
                self._close_fd()


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
