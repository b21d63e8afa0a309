"""What a device can reach, found out by having it try, and judged by the data alone.

The kernel's log is no witness: it limits its rate, and QEMU compresses faults. Nor is an error of the device: `edu` has
none. So every access moves a pattern that has never been used before.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import random
from typing import Protocol

from pyvfio.units import PAGE_SIZE

_serial = itertools.count(1)
_NEITHER_0_NOR_FF = bytes((1, *range(1, 255), 254))


def pattern(size: int) -> bytes:
    """`size` bytes that no other call returns (from 8 bytes on), none of them 0 or 0xff."""
    return random.Random(next(_serial)).randbytes(size).translate(_NEITHER_0_NOR_FF)  # noqa: S311


class Engine(Protocol):
    """A device that copies between memory and a buffer of its own, as `pyvfio.testing.edu.Edu` does."""

    def read_memory(self, iova: int, size: int) -> None:
        """Memory to buffer."""
        ...

    def write_memory(self, iova: int, size: int) -> None:
        """Buffer to memory."""
        ...


class _Viewable(Protocol):
    def view(self) -> memoryview: ...


class DmaProbe:
    """Has `engine` read and write memory. `desk` is a page that it reaches at `iova`, through which its buffer is
    filled and looked at.

    Synchronization: none. Cost: one to three transfers a call.
    """

    def __init__(self, engine: Engine, *, desk: _Viewable, iova: int) -> None:
        self._engine = engine
        self._desk = desk
        self._iova = iova

    def read(self, iova: int, size: int) -> bytes | None:
        """What the device gets when it reads `size` bytes at `iova`; None when it is stopped: its buffer is then left
        alone, or filled with all zeros or all ones, as the host bridge likes."""
        untouched = pattern(size)
        self._fill(untouched)
        self._engine.read_memory(iova, size)
        with self._desk.view() as view:
            view[:size] = bytes(size)
        self._engine.write_memory(self._iova, size)
        with self._desk.view() as view:
            got = bytes(view[:size])
        return None if got in (untouched, bytes(size), b"\xff" * size) else got

    def write(self, iova: int, data: bytes) -> None:
        """Have the device write `data` at `iova`; whether it is stopped is for the caller to find out."""
        self._fill(data)
        self._engine.write_memory(iova, len(data))

    def _fill(self, data: bytes) -> None:
        with self._desk.view() as view:
            view[: len(data)] = data
        self._engine.read_memory(self._iova, len(data))


class PageWitness:
    """Holds the physical page behind `vaddr`, so that a write to it is seen after the process has given it back.

    vmsplice(2) puts the page itself into a pipe, not a copy of it. Raises OSError. `look` once, or `close`.
    """

    def __init__(self, vaddr: int) -> None:
        self._read, self._write = os.pipe()
        iovec = (ctypes.c_size_t * 2)(vaddr, PAGE_SIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.vmsplice(self._write, iovec, ctypes.c_size_t(1), 0) != PAGE_SIZE:
            self.close()
            raise OSError(ctypes.get_errno(), "vmsplice of a page failed")

    def look(self) -> bytes:
        """What the page holds now; and let go of it."""
        try:
            return os.read(self._read, PAGE_SIZE)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the page."""
        os.close(self._read)
        os.close(self._write)
