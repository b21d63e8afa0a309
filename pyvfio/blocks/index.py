"""The blocks of a list, by id string and by address."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter

from pyvfio.blocks.block import RamBlock

# attrgetter is implemented in C, so that no other thread runs during a search.
_START = attrgetter("state.start")
_ID = attrgetter("state.idstr")


class BlockIndex:
    """The blocks of a list, in the order of their addresses. No two blocks share an address or an id string.

    Synchronization: `add` and `remove` need the lock of the list. Any thread may search at any time: a look-up reads
    the index in one step, and iteration uses a copy. Cost: O(log n), and a memmove of eight bytes for each block at a
    higher address.
    """

    __slots__ = ("_ascending", "_named")

    def __init__(self) -> None:
        self._ascending: list[RamBlock] = []
        self._named: dict[str, RamBlock] = {}

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(tuple(self._ascending))

    def __len__(self) -> int:
        return len(self._ascending)

    def add(self, block: RamBlock) -> None:
        """Add a block, whose address and id string must be unique."""
        self._named[_ID(block)] = block
        self._ascending.insert(bisect_left(self._ascending, _START(block), key=_START), block)

    def remove(self, block: RamBlock) -> None:
        """Remove a block, which must be in the index."""
        del self._ascending[bisect_left(self._ascending, _START(block), key=_START)]
        del self._named[_ID(block)]

    def named(self, idstr: str) -> RamBlock | None:
        """Return the block with that id string, or None. Cost: O(1)."""
        return self._named.get(idstr)

    def below(self, vaddr: int) -> RamBlock | None:
        """Return the last block that begins at or below `vaddr`, or None."""
        ascending = self._ascending
        while ascending:
            above = bisect_right(ascending, vaddr, key=_START)
            first = above - 1 if above else 0
            near = ascending[first : above + 1]
            # Another thread may have changed the list between the two lines above. The slice is atomic: if one of its
            # blocks begins above `vaddr` and the other does not, the two are the right neighbours.
            if bisect_right(near, vaddr, key=_START) == above - first:
                return near[0] if above else None
        return None

    def _check(self) -> None:
        starts = [_START(block) for block in self._ascending]
        assert all(one < other for one, other in pairwise(starts))
        assert {_ID(block): block for block in self._ascending} == self._named
        assert len(self._named) == len(starts)
