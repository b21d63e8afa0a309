"""An eventfd that the kernel reads: each write to the eventfd causes a call.

Source: drivers/vfio/virqfd.c (`vfio_virqfd_enable`, `virqfd_wakeup`). A thread replaces the wait queue of the kernel.
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections.abc import Callable

_PATIENCE = 0.01  # seconds between two checks for the end, while another thread has the lock


class Virqfd:
    """Calls the method `signalled` under the lock of the fake after each write to the eventfd, and reads the eventfd.

    `held` is closed by `close`. `pending`: the eventfd had a count before. The count stays in the eventfd, as with a
    kernel. The thread keeps neither the object of `signalled` nor the fake alive.
    """

    def __init__(self, held: int, lock: threading.RLock, signalled: Callable[[], None]) -> None:
        self._held = held
        self._lock = lock
        self._signalled = weakref.WeakMethod(signalled)
        self._stop = os.eventfd(0, os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        # Edge-triggered: a remaining count is no event, and each write is one.
        self._epoll.register(held, select.EPOLLIN | select.EPOLLET)
        self.pending = bool(self._epoll.poll(0))
        self._epoll.register(self._stop, select.EPOLLIN)
        self._ended = False
        self._thread = threading.Thread(target=self._listen, name="virqfd of a fake kernel", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while not self._ended:
            events = self._epoll.poll()
            if any(fd == self._held for fd, _event in events) and self._have_lock():
                try:
                    if not self._ended:
                        self._call()
                finally:
                    self._lock.release()

    def _have_lock(self) -> bool:
        """Take the lock. Returns False if `close`, which has the lock, waits for this thread."""
        while not self._ended:
            if self._lock.acquire(timeout=_PATIENCE):
                return True
        return False

    def _call(self) -> None:
        signalled = self._signalled()
        if signalled is None:
            self._ended = True
            return
        if select.select([self._held], [], [], 0)[0]:
            os.eventfd_read(self._held)
        signalled()

    def close(self) -> None:
        """Stop the thread. The caller holds the lock of the fake."""
        self._ended = True
        os.eventfd_write(self._stop, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._epoll.close()
        for fd in (self._held, self._stop):
            os.close(fd)
