"""The objects that a fake device calls: the callbacks of a BAR, and a follower of the driver."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

from pyvfio.guard import forget_in_child

ReadCallback: TypeAlias = Callable[[int, int], int]
WriteCallback: TypeAlias = Callable[[int, int, int], None]


class Follower(Protocol):
    """An object that follows the calls of a driver on a fake device, beyond registers. The fake's lock is held."""

    def opened(self) -> None:
        """The first descriptor of the device was opened."""
        ...

    def read_config(self, offset: int, data: bytes, /) -> bytes:
        """Return the bytes for a read of configuration space, in place of `data`."""
        ...

    def wrote_config(self, offset: int, data: bytes, /) -> None:
        """Configuration space was written."""
        ...

    def read_block(self, bar: int, offset: int, size: int, /) -> bytes:
        """Return the bytes for one pread(2) of a BAR."""
        ...

    def write_block(self, bar: int, offset: int, data: bytes, /) -> None:
        """A BAR was written by one pwrite(2)."""
        ...

    def was_reset(self, *, hot: bool) -> None:
        """The driver has reset the device, or with `hot` the bus."""
        ...

    def set_irqs(self) -> None:
        """The eventfds of interrupts have changed."""
        ...


class CallbackRegisters:
    """Registers that call a Bar's callbacks; `start` is where the window begins in the BAR. A child that is forked has
    them closed.

    Synchronization: `lock` is the fake kernel's, so that no access goes on when `close` has returned.
    """

    def __init__(
        self, *, start: int, read: ReadCallback, write: WriteCallback, lock: AbstractContextManager[object]
    ) -> None:
        self._start = start
        self._read = read
        self._write = write
        self._lock = lock
        self._closed = False
        forget_in_child(self)

    def read(self, offset: int, width: int) -> int:
        """Call the BAR's `read`."""
        self._check_open()  # without the lock, which a thread of the parent may hold without an end in a child
        with self._lock:
            self._check_open()
            return self._read(self._start + offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        """Call the BAR's `write`."""
        self._check_open()
        with self._lock:
            self._check_open()
            self._write(self._start + offset, width, value)

    def cell(self, offset: int, width: int) -> None:
        """None: these registers are no memory."""

    def numbers(self, width: int, size: int) -> None:
        """None: these registers are no memory."""

    def close(self) -> None:
        """Nothing was mapped; each later access is ValueError."""
        with self._lock:
            self._closed = True

    def forget(self) -> None:
        """Let each access raise ValueError, without the lock."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("operation forbidden on a register window that was closed")
