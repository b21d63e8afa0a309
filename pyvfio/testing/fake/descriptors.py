"""The descriptors of a fake kernel: which object answers for which descriptor, also after a close past the seam."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

from pyvfio.testing.fake.group import Handler

logger = logging.getLogger(__name__)


class Descriptors:
    """Real descriptors of this process. `files`: the object behind each open one.

    Synchronization: the caller holds `lock` for changes. `find` takes the lock if necessary.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._owner = os.getpid()
        self.files: dict[int, Handler] = {}
        self._identities: dict[int, tuple[int, int]] = {}
        self._let_go: set[int] = set()  # closed by the fake: one more close by the holder does nothing
        self._is_shut_down = False

    def check_usable(self) -> None:
        """Raise RuntimeError in a forked child, and after `shut_down`."""
        if self.in_child:
            raise RuntimeError(
                f"this fake kernel is in process {self._owner}, and this is a child: make another in the child"
            )
        if self._is_shut_down:
            raise RuntimeError("this fake kernel was shut down (`shutdown`, or the end of the `with`): make another")

    @property
    def in_child(self) -> bool:
        """Whether this process is a forked child."""
        return os.getpid() != self._owner

    def adopt(self, fd: int, handler: Handler) -> None:
        """Let `handler` answer for `fd` from now on."""
        self.given_out(fd)
        self.files[fd] = handler
        self._identities[fd] = _identity(fd)

    def given_out(self, fd: int) -> None:
        """Note that the running kernel returned `fd`: an old descriptor with that number was closed by os.close."""
        self.forget(fd)
        self._let_go.discard(fd)

    def forget(self, fd: int) -> None:
        """Forget a closed descriptor, and release the object if no other descriptor refers to the object."""
        self._identities.pop(fd, None)
        stale = self.files.pop(fd, None)
        if stale is None:
            return
        other = next((each for each, handler in self.files.items() if handler is stale), None)
        if other is None:
            stale.release(fd)
        else:
            stale.live_on(fd, other)

    def find(self, fd: int) -> Handler | None:
        """Return the object behind `fd`, or None for a file that is not VFIO. Raises RuntimeError as `check_usable`."""
        handler = self.files.get(fd)
        if handler is None:
            if fd in self._let_go and self._is_shut_down:
                self.check_usable()
            return None
        if self.in_child:
            raise RuntimeError(f"descriptor {fd} is of a fake kernel in process {self._owner}, and this is a child")
        if _is_same_file(fd, self._identities):
            return handler
        with self._lock:
            self._lose(fd)
        return None

    def _lose(self, fd: int) -> None:
        # A program closed the descriptor with os.close. The number may belong to another file now, which must stay
        # open.
        logger.warning("descriptor %d was closed past the seam: the fake kernel forgets the descriptor", fd)
        self.forget(fd)
        self._let_go.add(fd)

    def sweep(self) -> None:
        """Forget descriptors that were closed past the seam."""
        for fd in [fd for fd in self.files if not _is_same_file(fd, self._identities)]:
            self._lose(fd)

    def is_closed_already(self, fd: int) -> bool:
        """Return whether `fd`, which the holder closes now, was closed already.

        The number may belong to another file now.
        """
        if fd in self.files:
            self.find(fd)
        if fd in self._let_go:
            self._let_go.discard(fd)
            return True
        return False

    def close(self, fd: int) -> None:
        """Close a descriptor with all dependent state, or a descriptor of another file."""
        os.close(fd)
        self.forget(fd)

    def shut_down(self) -> None:
        """Close all open descriptors. The holder may close each one once more."""
        self.sweep()
        for fd in list(self.files):
            self.close(fd)
            self._let_go.add(fd)
        self._is_shut_down = True

    def finalize(self) -> None:
        """Close all open descriptors: the kernel is garbage, or the interpreter ends.

        The holder may close each descriptor once more.
        """
        for fd in list(self.files):
            self._let_go.add(fd)
            handler = self.files.pop(fd)
            if _is_same_file(fd, self._identities):
                os.close(fd)
            if handler not in self.files.values():  # another descriptor can refer to the object
                handler.release(fd)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _is_same_file(fd: int, identities: Mapping[int, tuple[int, int]]) -> bool:
    # Checked with each call on a descriptor: 1 µs, a tenth of the cost of a mapping, so that no other file is ever
    # used.
    try:
        return _identity(fd) == identities[fd]
    except OSError:
        return False
