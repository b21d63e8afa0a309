"""The live views of a piece of memory through the buffer protocol."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable


class Exports:
    """The memoryviews of one piece of memory that are still alive.

    Before 3.12, CPython does not tell a Python object with the buffer protocol when a view is released. A ctypes array
    works in all versions: each view of the array, and each view of such a view, holds a reference to the array. A weak
    reference to the array therefore dies with the last view.

    Synchronization: none; the owner serializes calls. Cost: O(live views) for each call.
    """

    __slots__ = ("_exports",)

    def __init__(self) -> None:
        self._exports: list[weakref.ref[ctypes.Array[ctypes.c_ubyte]]] = []

    def view(self, vaddr: int, size: int) -> memoryview:
        """Return a writable memoryview. The memory must stay mapped while `end()` lies above `vaddr`."""
        if size == 0:
            return memoryview(bytearray())
        array = (ctypes.c_ubyte * size).from_address(vaddr)
        self._exports = [reference for reference in self._exports if reference() is not None]
        self._exports.append(weakref.ref(array))
        return memoryview(array).cast("B")

    def end(self) -> int:
        """Return the highest address, exclusive, that a live view reaches; 0 without live views."""
        if not self._exports:
            return 0
        arrays = (reference() for reference in self._exports)
        return max((ctypes.addressof(array) + len(array) for array in arrays if array is not None), default=0)

    def watch(self, step: Callable[[], object]) -> None:
        """Call `step` when each of the live views is freed, but not at the end of the program.

        The call runs in the thread that drops the last reference, between any two lines of that thread.
        """
        for reference in self._exports:
            if (array := reference()) is not None:
                weakref.finalize(array, step).atexit = False
