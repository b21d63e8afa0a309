"""The agreement of two processes about an iommufd: a memory file that both have, with locks that end with a process.

With iommufd, the kernel does not tell whether a hand-over was cancelled, or whether another process has taken over. The
agreement does. The file has two flags:

* TAKEN: a process has taken over, or is about to. Written before IOMMU_IOAS_CHANGE_PROCESS.
* CANCELLED: the old process continues with all objects.

Each process also holds a lock on a byte of the file. The kernel releases the lock when the process ends or executes
another program, so that the other process can ask whether the first one still lives. A third lock orders the writes.

A lock belongs to an open file, so each process opens the file once more, through /proc.

Source: open file description locks in fcntl(2); F_OFD_SETLK.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum

from pyvfio.errors import IoctlError, UnavailableError, descriptor_hint
from pyvfio.kernel import Kernel

_NAME = "pyvfio live update"
_lock_layout = struct.Struct("@hhqqi0q")  # struct flock
_CANCELLED, _TAKEN = 0, 1  # the bytes with the flags
_ORDER = 2  # the byte whose lock orders the writes


class Side(IntEnum):
    """The two processes: for each the byte whose lock the process holds while alive."""

    OLD = 3
    NEW = 4


class Agreement:
    """One side of the agreement: a lock that is held until `close`.

    Synchronization: none; the caller holds the lock of a HandOver, or has the object alone.
    """

    def __init__(self, shared: int, side: Side) -> None:
        self.shared = shared
        """The descriptor that both processes have."""
        self._side = side
        self._fd = _open_anew(shared)

    @classmethod
    def make(cls, kernel: Kernel) -> Agreement:
        """Make an agreement in the old process. The object owns `shared`. Raises IoctlError, UnavailableError."""
        try:
            shared = kernel.memfd_create(_NAME, 0)
        except OSError as error:
            raise _refusal(error, "memfd_create", {"name": _NAME}) from error
        try:
            agreement = cls(shared, Side.OLD)
            agreement.hold()
        except BaseException:
            kernel.close(shared)
            raise
        return agreement

    def hold(self) -> bool:
        """Lock the byte of this side until `close`. Return False if another process holds the lock."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_WRLCK, self._side))
        except OSError:
            return False
        return True

    @property
    def is_alone(self) -> bool:
        """Whether the other process has ended, or has executed another program, or was never there."""
        other = Side.NEW if self._side is Side.OLD else Side.OLD
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, other))
        kind: int = _lock_layout.unpack(found)[0]
        return kind == fcntl.F_UNLCK

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Keep the other process from reading and writing flags meanwhile."""
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, _lock(fcntl.F_WRLCK, _ORDER))
        try:
            yield
        finally:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_UNLCK, _ORDER))

    @property
    def cancelled(self) -> bool:
        """Whether the old process continues with all objects."""
        return self._read(_CANCELLED)

    @property
    def taken(self) -> bool:
        """Whether a process has taken over, or was about to."""
        return self._read(_TAKEN)

    def cancel(self) -> None:
        """Set the flag CANCELLED."""
        self._write(_CANCELLED, value=True)

    def take(self, *, value: bool) -> None:
        """Set or clear the flag TAKEN."""
        self._write(_TAKEN, value=value)

    def _read(self, place: int) -> bool:
        return os.pread(self._fd, 1, place) == b"\1"

    def _write(self, place: int, *, value: bool) -> None:
        os.pwrite(self._fd, bytes([value]), place)

    def close(self) -> None:
        """Release the lock. A second call does nothing. `shared` stays open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _refusal(error: OSError, request: str, arguments: Mapping[str, int | str]) -> IoctlError:
    return IoctlError.of(
        error,
        f"the memory file of a live update could not be made: {error.strerror}",
        request=request,
        arguments=arguments,
        hint=descriptor_hint(error.errno or 0),
    )


def _lock(kind: int, place: int) -> bytes:
    return _lock_layout.pack(kind, os.SEEK_SET, place, 1, 0)


def _open_anew(shared: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{shared}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.EMFILE, errno.ENFILE}:
            raise _refusal(error, "open", {"fd": shared}) from error
        raise UnavailableError(
            f"the agreement of a live update cannot be opened through /proc: {error.strerror}",
            hint="A live update on iommufd needs /proc",
        ) from error
