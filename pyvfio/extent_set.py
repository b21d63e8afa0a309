"""A set of extents that is replaced as a whole, and costs little to replace. Pure.

A tuple of extents has the first property. To replace a tuple of n extents, n pointers are copied and n reference counts
are changed, which takes longer than the rest of a change from some thousand extents on, and longest where other
programs have evicted the extents from the processor's caches.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Self, TypeAlias

from pyvfio.extents import Extent, Extents, Part, added, removed, runs, span

_Chunks: TypeAlias = tuple[Extents, ...]


def _starts(chunks: _Chunks) -> tuple[int, ...]:
    return tuple([chunk[0].start for chunk in chunks])


class ExtentSet:
    """Extents in ascending order, disjoint and without neighbours, in chunks.

    Synchronization: immutable, so any thread can read a set. Cost of `added` and `removed` for a few places: O(log n),
    one chunk, and a copy of the list of chunks.
    """

    __slots__ = ("_chunks", "_extents", "_starts")
    MOST = 256
    """Extents in a chunk. A longer chunk is split."""
    LEAST = 32
    """A shorter chunk is joined with a neighbour."""

    def __init__(self, extents: Iterable[Part] = ()) -> None:
        """Make a set of ascending, disjoint `extents`."""
        self._chunks: _Chunks = tuple(self._cut(tuple(runs(extents))))
        self._starts = _starts(self._chunks)
        self._extents: Extents | None = None

    @classmethod
    def _cut(cls, extents: Extents) -> Iterator[Extents]:
        """Yield `extents` in chunks of like length: in one if there are few, else about half as long as can be."""
        count = -(-len(extents) // (cls.MOST // 2)) if len(extents) > cls.MOST else min(len(extents), 1)
        edges = [len(extents) * number // count for number in range(count + 1)] if count else []
        return (extents[start:end] for start, end in pairwise(edges))

    @property
    def extents(self) -> Extents:
        """The extents as a tuple, the same each time. Cost: O(n) once."""
        if self._extents is None:
            self._extents = tuple(self)
        return self._extents

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def __iter__(self) -> Iterator[Extent]:
        return chain.from_iterable(self._chunks)

    def clip(self, start: int, end: int) -> list[Extent]:
        """Return the parts of the extents in [start, end). Cost: O(log n) and the parts."""
        if start >= end:
            return []
        found: list[Extent] = []
        for chunk in self._chunks[slice(*self._near(start, end))]:
            first, behind = span(chunk, start, end)
            found += chunk[first:behind]
        if found:
            # Only the first and the last can reach beyond the two ends.
            found[0] = Extent(max(found[0].start, start), found[0].end)
            found[-1] = Extent(found[-1].start, min(found[-1].end, end))
        return found

    def added(self, parts: Sequence[Part]) -> Self:
        """Return the set with the ascending, disjoint `parts`."""
        if not parts:
            return self
        # One byte more at each end: neighbours are joined.
        first, behind = self._near(parts[0][0] - 1, parts[-1][1] + 1)
        return self._replaced(first, behind, added(self._joined(first, behind), parts))

    def removed(self, parts: Sequence[Part]) -> Self:
        """Return the set without the bytes of the ascending, disjoint `parts`."""
        if not parts:
            return self
        first, behind = self._near(parts[0][0], parts[-1][1])
        before = self._joined(first, behind)
        after = removed(before, parts)
        return self if after is before else self._replaced(first, behind, after)

    def _near(self, start: int, end: int) -> tuple[int, int]:
        """Return the slice of the chunks that can have bytes in [start, end): one at least, if there are any."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        return first, bisect_left(self._starts, end, first + 1)

    def _joined(self, first: int, behind: int) -> Extents:
        if behind - first == 1 and self._chunks:
            return self._chunks[first]
        return tuple(chain.from_iterable(self._chunks[first:behind]))

    def _replaced(self, first: int, behind: int, by: Extents) -> Self:
        chunks = self._chunks
        if len(by) < self.LEAST and len(chunks) > behind - first:
            if first:
                first -= 1
                by = (*chunks[first], *by)
            else:
                by = (*by, *chunks[behind])
                behind += 1
        new = (by,) if 0 < len(by) <= self.MOST else tuple(self._cut(by))
        made = object.__new__(type(self))
        made._chunks = chunks[:first] + new + chunks[behind:]
        made._starts = self._starts[:first] + _starts(new) + self._starts[behind:]
        made._extents = None
        return made

    def _check(self) -> None:
        assert list(self) == runs(self), self
        assert self._starts == _starts(self._chunks)
        sizes = [len(chunk) for chunk in self._chunks]
        assert all(0 < size <= self.MOST for size in sizes), sizes
        assert len(sizes) < 2 or min(sizes) >= self.LEAST, sizes


NOTHING = ExtentSet()
"""The empty set. One object for all blocks without discarded parts: most blocks have none."""
