"""An exclusive lock for each device: test processes that share hardware take turns.

The lock of a device is flock(2) on a file named after the device, in a directory that all users of the machine share.
The kernel releases the lock when the process ends, however the process ends. The file stays, and has the process that
holds the lock.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

DIRECTORY_VARIABLE = "PYVFIO_LOCK_DIR"
"""The environment variable that names another directory."""
_SHARED = Path("/run/lock")
_INTERVAL = 0.1  # seconds between two attempts
_OWNER_MAX = 4096


def lock_directory(environment: Mapping[str, str] = os.environ, *, shared: Path = _SHARED) -> Path:
    """Return the directory of the lock files: the first of these that is there, or can be made.

    1. $PYVFIO_LOCK_DIR;
    2. /run/lock/pyvfio, which all users share;
    3. $XDG_RUNTIME_DIR/pyvfio, else pyvfio-locks in the directory for temporary files: other users may have another.

    Raises OSError if none can be made.
    """
    if named := environment.get(DIRECTORY_VARIABLE):
        return _made(Path(named))
    with suppress(OSError):
        return _made(shared / "pyvfio")
    if runtime := environment.get("XDG_RUNTIME_DIR"):
        with suppress(OSError):
            return _made(Path(runtime) / "pyvfio")
    return _made(Path(tempfile.gettempdir()) / "pyvfio-locks")


def _made(directory: Path) -> Path:
    """Make a directory in which each user can make files. A directory that exists must be writable."""
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        if not os.access(directory, os.W_OK | os.X_OK):
            raise
    else:
        directory.chmod(0o1777)
    return directory


class DeviceLock:
    """The lock of one device. `owner` names the process in messages of others.

    Synchronization: one thread. A forked child holds the lock, too, until the child closes the descriptor or the
    parent calls `release`.
    """

    def __init__(self, bdf: str, *, directory: Path, owner: str) -> None:
        self.bdf = bdf
        self.path = directory / f"{bdf}.lock"
        self._owner = owner
        self._fd = -1

    def take(self) -> bool:
        """Take the lock unless another process holds the lock. Return whether the lock was taken. Raises OSError."""
        fd = self._open()
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()} {self._owner}\n".encode(errors="backslashreplace")[:_OWNER_MAX], 0)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            # Without O_CREAT first: fs.protected_regular refuses O_CREAT for another user's file in a sticky directory.
            return os.open(self.path, flags)
        except FileNotFoundError:
            fd = os.open(self.path, flags | os.O_CREAT, 0o666)
            with suppress(OSError):
                os.fchmod(fd, 0o666)  # the umask may have removed bits
            return fd

    def holder(self) -> str:
        """Return the process that holds the lock, as the file names it: "pid 12 (command)"."""
        try:
            pid, _, command = self.path.read_text(encoding="utf-8", errors="replace").strip().partition(" ")
        except OSError:
            return "an unknown process"
        return f"pid {pid} ({command})" if pid else "an unknown process"

    def release(self) -> None:
        """Give up the lock; twice is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            fcntl.flock(fd, fcntl.LOCK_UN)  # for a child that has the descriptor, too
            os.close(fd)


class LockTimeoutError(Exception):
    """Other processes have held the locks of devices for too long."""


def take_locks(
    bdfs: Sequence[str],
    count: int,
    *,
    timeout: float,
    waiting: Callable[[str], object],
    owner: str | None = None,
    directory: Path | None = None,
) -> list[DeviceLock]:
    """Take the locks of `count` of the devices, and return them in the order of `bdfs`.

    While too few are free, none is held: processes that need several devices cannot deadlock. The
    first time, `waiting` is called with a message that names the processes that hold the locks. `timeout` in seconds.

    Raises LockTimeoutError, OSError; ValueError for more devices than there are. Cost: a few system calls for each
    device, ten times a second while devices are held by others.
    """
    if not 0 < count <= len(bdfs):
        raise ValueError(f"{count} of {len(bdfs)} devices cannot be locked")
    where = lock_directory() if directory is None else directory
    name = " ".join(sys.argv) if owner is None else owner
    locks = [DeviceLock(bdf, directory=where, owner=name) for bdf in bdfs]
    end, told = time.monotonic() + timeout, False
    while True:
        taken: list[DeviceLock] = []
        try:
            if _take_some(locks, count, taken):
                return taken
        except BaseException:
            _release(taken)
            raise
        _release(taken)
        busy = ", ".join(f"{lock.bdf} by {lock.holder()}" for lock in locks if lock not in taken)
        if time.monotonic() > end:
            raise LockTimeoutError(f"after {timeout:g} s devices are still held: {busy}; the locks are in {where}")
        if not told:
            waiting(f"waiting for {count} of {len(bdfs)} devices; held: {busy}")
            told = True
        time.sleep(_INTERVAL)


def _take_some(locks: Sequence[DeviceLock], count: int, taken: list[DeviceLock]) -> bool:
    for lock in locks:
        if lock.take():
            taken.append(lock)
        if len(taken) == count:
            return True
    return False


def _release(locks: Sequence[DeviceLock]) -> None:
    for lock in locks:
        lock.release()
