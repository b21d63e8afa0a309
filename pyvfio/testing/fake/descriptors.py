"""The descriptors of a fake kernel: who answers for which, also where somebody closes one without telling."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping

from pyvfio.testing.fake.group import Handler

logger = logging.getLogger(__name__)


class Descriptors:
    """Real ones, of this process. `files`: the objects behind those that are open.

    Synchronization: `lock` is held by whoever changes something; `find` takes it where it has to.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._owner = os.getpid()
        self.files: dict[int, Handler] = {}
        self._identities: dict[int, tuple[int, int]] = {}
        self._let_go: set[int] = set()  # numbers that were ours and are not: their owner's close is none
        self._is_shut_down = False

    def check_usable(self) -> None:
        """RuntimeError in a forked child, and after `shut_down`."""
        if self.in_child:
            raise RuntimeError(f"this fake kernel is in process {self._owner}, and this is a child: make another here")
        if self._is_shut_down:
            raise RuntimeError("this fake kernel was shut down (shutdown, or the end of its `with`): make another")

    @property
    def in_child(self) -> bool:
        """Whether this is a forked child."""
        return os.getpid() != self._owner

    def adopt(self, fd: int, handler: Handler) -> None:
        """From now on `handler` answers for `fd`."""
        self.given_out(fd)
        self.files[fd] = handler
        self._identities[fd] = _identity(fd)

    def given_out(self, fd: int) -> None:
        """The running kernel gave this number out anew, so if it was one of these, somebody closed it with os.close."""
        self.forget(fd)
        self._let_go.discard(fd)

    def forget(self, fd: int) -> None:
        """It is closed: so is what was open by it, unless it has another."""
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
        """Who answers for it; None where it is no VFIO descriptor. RuntimeError where `check_usable` says so."""
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
        # Somebody has closed it with os.close, and the number may be another file's: not ours to answer for or close.
        logger.warning("descriptor %d was closed past the seam; the fake kernel lets it go", fd)
        self.forget(fd)
        self._let_go.add(fd)

    def sweep(self) -> None:
        """Let go what was closed past the seam."""
        for fd in [fd for fd in self.files if not _is_same_file(fd, self._identities)]:
            self._lose(fd)

    def is_closed_already(self, fd: int) -> bool:
        """Whether its owner, who closes it now, did so past the seam; the number may be another file's by now."""
        if fd in self.files:
            self.find(fd)
        if fd in self._let_go:
            self._let_go.discard(fd)
            return True
        return False

    def close(self, fd: int) -> None:
        """Close it, and what hangs on it; or a descriptor that is none of these."""
        os.close(fd)
        self.forget(fd)

    def shut_down(self) -> None:
        """Close all that are left. Their owners may close each once more."""
        self.sweep()
        for fd in list(self.files):
            self.close(fd)
            self._let_go.add(fd)
        self._is_shut_down = True

    def finalize(self) -> None:
        """Close all that are left, of a kernel that nobody refers to, or when the interpreter ends. Their owners may
        close each once more."""
        for fd in list(self.files):
            self._let_go.add(fd)
            handler = self.files.pop(fd)
            if _is_same_file(fd, self._identities):
                os.close(fd)
            handler.release(fd)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _is_same_file(fd: int, identities: Mapping[int, tuple[int, int]]) -> bool:
    # With each call on a descriptor: a microsecond, a tenth of what a mapping costs, for never touching another's file.
    try:
        return _identity(fd) == identities[fd]
    except OSError:
        return False
