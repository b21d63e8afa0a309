"""The mappings that an address space has put into the kernel, sorted by IOVA."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from pyvfio.iommu.space import Mapping
from pyvfio.units import Iova, Vaddr


class MappingTable:
    """Mappings sorted by IOVA, 32 bytes each: what an address space has put into the kernel.

    Synchronization: none; its owner serializes calls. Cost: look-ups O(log n), changes O(log n) and a move of the tail.
    """

    __slots__ = ("_iovas", "_rows")

    def __init__(self) -> None:
        # iova, size and vaddr of one mapping after the other. `_iovas` is a copy of every third, to search in.
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
        iovas = self._iovas
        if not iovas or iova > iovas[-1]:  # no search for what comes behind all others
            return len(iovas)
        return bisect_left(iovas, iova)

    def add(self, iova: int, size: int, vaddr: int) -> None:
        """Take a mapping in; the kernel has seen to it that it overlaps none."""
        iovas = self._iovas
        if not iovas or iova > iovas[-1]:
            iovas.append(iova)
            self._rows.extend((iova, size, vaddr))
        else:
            position = bisect_left(iovas, iova)
            iovas.insert(position, iova)
            self._rows[3 * position : 3 * position] = array("Q", (iova, size, vaddr))

    def overlapping(self, *, iova: int, size: int) -> list[Mapping]:
        """The mappings that share an address with `[iova, iova + size)`."""
        start, end = self._position(iova), self._position(iova + size)
        if start > 0:
            start -= self._rows[3 * start - 3] + self._rows[3 * start - 2] > iova  # the one before reaches in
        return [self._at(position) for position in range(start, end)]

    def is_whole(self, iova: int, size: int) -> bool:
        """Whether the mappings in `[iova, iova + size)` fill it, without a gap, and none reaches beyond."""
        start, end = self._position(iova), self._position(iova + size)
        if start == end or self._rows[3 * start] != iova:
            return False
        last, length = self._rows[3 * end - 3 : 3 * end - 1]
        return last + length == iova + size and (
            end - start == 1 or sum(self._rows[3 * start + 1 : 3 * end : 3]) == size
        )

    def has(self, iova: int, size: int, vaddr: int) -> bool:
        """Whether that mapping is there."""
        rows, row = self._rows, 3 * self._position(iova)
        return row < len(rows) and rows[row] == iova and rows[row + 1] == size and rows[row + 2] == vaddr

    def discard(self, *, iova: int, size: int) -> None:
        """Forget the mappings that begin in `[iova, iova + size)`."""
        start, end = self._position(iova), self._position(iova + size)
        del self._rows[3 * start : 3 * end]
        del self._iovas[start:end]

    def at(self, iova: int) -> Mapping | None:
        """The mapping that covers `iova`."""
        position = bisect_right(self._iovas, iova) - 1
        if position < 0 or iova >= self._rows[3 * position] + self._rows[3 * position + 1]:
            return None
        return self._at(position)

    def clear(self) -> None:
        """Forget all."""
        del self._rows[:]
        del self._iovas[:]

    def _check(self) -> None:
        mappings = list(self)
        for one, other in itertools.pairwise(mappings):
            assert one.range.last < other.iova
