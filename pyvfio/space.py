"""What a DmaMapper sees of an IOMMU: an address space that memory can be mapped into.

`Container` (VFIO type1) is the first implementation. Nothing above this module may know which one it talks to.
"""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from pyvfio.kernel import Kernel
from pyvfio.units import Iova, IovaRange, Vaddr


class Mapping(NamedTuple):
    """One kernel mapping: `size` bytes at `vaddr` of this process, reached by the device at `iova`."""

    iova: Iova
    size: int
    vaddr: Vaddr

    @property
    def range(self) -> IovaRange:
        """The IOVAs that it covers."""
        return IovaRange.of(iova=self.iova, size=self.size)


class AddressSpace(Protocol):
    """An I/O address space. All sizes and addresses are multiples of `page_size`; every argument is keyword-only.

    Synchronization: implementations serialize calls; any thread may call anything.
    """

    @property
    def kernel(self) -> Kernel:
        """Who makes the system calls."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it has been closed; what it had mapped is unmapped then, or `unmap` says otherwise."""
        ...

    @property
    def page_size(self) -> int:
        """The smallest page of the IOMMU, in bytes."""
        ...

    @property
    def iova_pgsizes(self) -> int:
        """Bitmap of the page sizes that the IOMMU knows."""
        ...

    @property
    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """Where mappings may lie, ascending; a mapping lies wholly within one."""
        ...

    @property
    def reserved_iova(self) -> tuple[IovaRange, ...]:
        """Of `iova_ranges`, what has been reserved, ascending."""
        ...

    @property
    def entries_left(self) -> int:
        """How many more mappings it takes."""
        ...

    def reserve_iova(self, size: int, *, alignment: int, offset: int, top_down: bool = False) -> Iova:
        """As `IovaAllocator.reserve`."""
        ...

    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """As `IovaAllocator.reserve_at`."""
        ...

    def release_iova(self, iova: int) -> None:
        """As `IovaAllocator.release`; nothing happens when the space is closed."""
        ...

    def map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        """Let the device read (`read`) and write (`write`) `[vaddr, vaddr + size)` at `iova`.

        All or nothing. Raises IoctlError, or the subclass of it that says what to do.
        """
        ...

    def unmap(self, *, iova: int, size: int) -> None:
        """Take one or several whole mappings away. When it returns, exactly those `size` bytes are out of the device's
        reach; on a closed space, and on one whose last device has left, it does nothing when none of them is left.
        Raises UnmapSizeError or IoctlError."""
        ...

    def mapping_at(self, iova: int) -> Mapping | None:
        """The mapping that covers `iova`. O(log n)."""
        ...

    def mappings_in(self, *, iova: int, size: int) -> list[Mapping]:
        """The mappings that share an address with `[iova, iova + size)`, ascending. O(log n) and their number."""
        ...


class MappingTable:
    """Mappings sorted by IOVA, 32 bytes each: what an address space has put into the kernel.

    Synchronization: none; its owner serializes calls. Cost: look-ups O(log n), changes O(log n) and a move of the tail.
    """

    __slots__ = ("_iovas", "_rows")

    def __init__(self) -> None:
        # iova, size, vaddr of one mapping after the other, in one array: a change is one operation, so that a signal
        # handler that raises cannot leave half of it. `_iovas` is a copy of every third to search in, at C's speed.
        self._rows = array("Q")
        self._iovas = array("Q")

    def __len__(self) -> int:
        return len(self._rows) // 3

    def __iter__(self) -> Iterator[Mapping]:
        return (self._at(position) for position in range(len(self)))

    @property
    def mapped(self) -> int:
        """Bytes of all mappings together. O(n)."""
        return sum(self._rows[1::3])

    def _at(self, position: int) -> Mapping:
        iova, size, vaddr = self._rows[3 * position : 3 * position + 3]
        return Mapping(Iova(iova), size, Vaddr(vaddr))

    def _position(self, iova: int) -> int:
        """Of the first mapping that does not begin below `iova`."""
        if 3 * len(self._iovas) != len(self._rows):  # a change was interrupted before it came to the copy
            self._iovas = self._rows[::3]
        iovas = self._iovas
        if not iovas or iova > iovas[-1]:  # no search for what comes behind all others
            return len(iovas)
        return bisect_left(iovas, iova)

    def add(self, *, iova: int, size: int, vaddr: int) -> None:
        """Take a mapping in; the kernel has seen to it that it overlaps none."""
        position = self._position(iova)
        if position == len(self._iovas):
            self._rows.extend((iova, size, vaddr))
        else:
            self._rows[3 * position : 3 * position] = array("Q", (iova, size, vaddr))
        self._iovas.insert(position, iova)

    def overlapping(self, *, iova: int, size: int) -> list[Mapping]:
        """The mappings that share an address with `[iova, iova + size)`."""
        start, end = self._position(iova), self._position(iova + size)
        if start > 0:
            start -= self._rows[3 * start - 3] + self._rows[3 * start - 2] > iova  # the one before reaches in
        return [self._at(position) for position in range(start, end)]

    def discard(self, *, iova: int, size: int) -> None:
        """Forget the mappings that begin in `[iova, iova + size)`."""
        start, end = self._position(iova), self._position(iova + size)
        del self._rows[3 * start : 3 * end]
        del self._iovas[start:end]

    def at(self, iova: int) -> Mapping | None:
        """The mapping that covers `iova`."""
        found = self.overlapping(iova=iova, size=1)
        return found[0] if found else None

    def clear(self) -> None:
        """Forget all."""
        del self._rows[:]
        del self._iovas[:]

    def _check(self) -> None:
        mappings = list(self)
        for one, other in itertools.pairwise(mappings):
            assert one.range.last < other.iova
