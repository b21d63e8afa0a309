"""Find out which memory a device reaches: the device tries, and the data decides.

The kernel's log does not decide, since the kernel limits the rate of reports and QEMU merges faults. Errors of the
device do not decide, since `edu` reports none. So each access moves a pattern that no other access has moved.
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
    """Return `size` bytes, none of them 0 or 0xff. From 8 bytes on, no other call returns the same bytes."""
    return random.Random(next(_serial)).randbytes(size).translate(_NEITHER_0_NOR_FF)  # noqa: S311


class Engine(Protocol):
    """A device that copies between memory and a buffer in the device, as `pyvfio.testing.edu.Edu` does."""

    def read_memory(self, iova: int, size: int) -> None:
        """Copy `size` bytes at `iova` to the buffer."""
        ...

    def write_memory(self, iova: int, size: int) -> None:
        """Copy `size` bytes of the buffer to `iova`."""
        ...


class _Viewable(Protocol):
    def view(self) -> memoryview: ...


class DmaProbe:
    """Has `engine` read and write memory. `desk` is a page that `engine` reaches at `iova`: through this page the probe
    fills the buffer of the device, and looks at the buffer.

    Synchronization: none. Cost: one to three transfers for each call.
    """

    def __init__(self, engine: Engine, *, desk: _Viewable, iova: int) -> None:
        self._engine = engine
        self._desk = desk
        self._iova = iova

    def read(self, iova: int, size: int) -> bytes | None:
        """Return the bytes that the device gets for a read of `size` bytes at `iova`; None if the read is stopped.

        A stopped read leaves the buffer unchanged, or fills the buffer with zeros or ones: host bridges differ.
        """
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
        """Have the device write `data` at `iova`. The caller finds out whether the write was stopped."""
        self._fill(data)
        self._engine.write_memory(iova, len(data))

    def _fill(self, data: bytes) -> None:
        with self._desk.view() as view:
            view[: len(data)] = data
        self._engine.read_memory(self._iova, len(data))


class PageWitness:
    """Holds the physical page behind `vaddr`: a write of the device is seen after the process has released the page.

    vmsplice(2) puts the page itself into a pipe, and no copy. Raises OSError. Call `look` once, or `close`.
    """

    def __init__(self, vaddr: int) -> None:
        self._read, self._write = os.pipe()
        iovec = (ctypes.c_size_t * 2)(vaddr, PAGE_SIZE)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.vmsplice(self._write, iovec, ctypes.c_size_t(1), 0) != PAGE_SIZE:
            self.close()
            raise OSError(ctypes.get_errno(), "vmsplice of a page failed")

    def look(self) -> bytes:
        """Return the bytes of the page, and release the page."""
        try:
            return os.read(self._read, PAGE_SIZE)
        finally:
            self.close()

    def close(self) -> None:
        """Release the page."""
        os.close(self._read)
        os.close(self._write)
