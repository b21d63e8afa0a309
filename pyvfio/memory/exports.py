"""Who still looks at a piece of memory through the buffer protocol."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable


class Exports:
    """The memoryviews that have been given out of one piece of memory and are still alive.

    CPython tells an object that implements the buffer protocol in Python when a view goes only from 3.12 on. A ctypes
    array works everywhere: every view made of it, and every view of a view, holds a reference to it, so a weak
    reference to the array dies with the last of them.

    Synchronization: none; the owner serializes calls. Cost: O(live views) a call.
    """

    __slots__ = ("_exports",)

    def __init__(self) -> None:
        self._exports: list[weakref.ref[ctypes.Array[ctypes.c_ubyte]]] = []

    def view(self, vaddr: int, size: int) -> memoryview:
        """A writable memoryview of bytes. The memory must stay mapped while `end()` is above it."""
        if size == 0:
            return memoryview(bytearray())
        array = (ctypes.c_ubyte * size).from_address(vaddr)
        self._exports = [reference for reference in self._exports if reference() is not None]
        self._exports.append(weakref.ref(array))
        return memoryview(array).cast("B")

    def end(self) -> int:
        """The highest address, exclusive, that a live view reaches; 0 when there is none."""
        if not self._exports:
            return 0
        arrays = (reference() for reference in self._exports)
        return max((ctypes.addressof(array) + len(array) for array in arrays if array is not None), default=0)

    def watch(self, step: Callable[[], object]) -> None:
        """Have `step` called when each of the live views has gone, in the thread that lets go of the last reference and
        between any two lines of it, but not at the end of the program."""
        for reference in self._exports:
            if (array := reference()) is not None:
                weakref.finalize(array, step).atexit = False
