"""Set arithmetic on the bytes of a block: extents, and their unions, differences and intersections. Pure.

`added` and `removed` change a set in a few places: both look at the extents near the change, and copy the others.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

Part: TypeAlias = tuple[int, int]
"""Bytes [start, end) of a block: an `Extent`, or a plain pair, which costs a tenth as much to make."""


class Extent(NamedTuple):
    """Bytes [start, end) of a block."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """The length in bytes."""
        return self.end - self.start


Extents: TypeAlias = tuple[Extent, ...]
"""Ascending, disjoint and non-empty extents. A change replaces the whole tuple, so that any thread may read the set."""


def span(extents: Sequence[Part], start: int, end: int) -> tuple[int, int]:
    """Return the slice of ascending, disjoint `extents` with bytes in the non-empty range [start, end).

    Cost: O(log n).
    """
    first = bisect_right(extents, (start,))  # compares pairs: extents from `first` on begin at `start` or above
    if first and extents[first - 1][1] > start:
        first -= 1
    return first, bisect_left(extents, (end,), first)


def clip(extents: Iterable[Part], start: int, end: int) -> list[Extent]:
    """Return the parts of ascending, disjoint `extents` that lie in [start, end).

    Cost: O(log n) and the length of the answer, for a list or a tuple.
    """
    if start >= end:
        return []
    if isinstance(extents, (list, tuple)):
        first, behind = span(extents, start, end)
        extents = extents[first:behind]
    return [
        Extent(first if first > start else start, last if last < end else end)
        for first, last in extents
        if first < end and start < last and first < last
    ]


def without(extents: Iterable[Part], *holes: Part) -> list[Extent]:
    """Return ascending, disjoint `extents` less the bytes of `holes`, which can be in any order.

    Cost: one walk over both, and sorting the holes.
    """
    left: list[Extent] = []
    gone = iter(sorted(hole for hole in holes if hole[0] < hole[1]))
    hole = next(gone, None)
    for start, end in extents:
        while hole is not None and hole[0] < end:
            if start < hole[0]:
                left.append(Extent(start, hole[0]))
            start = max(start, hole[1])  # noqa: PLW2901 (the rest of the extent)
            if hole[1] > end:
                break  # the hole can reach into the next extent
            hole = next(gone, None)
        if start < end:
            left.append(Extent(start, end))
    return left


def runs(extents: Iterable[Part]) -> list[Extent]:
    """Return ascending, disjoint `extents` with adjacent ones joined."""
    found: list[Extent] = []
    for start, end in extents:
        joined = bool(found) and found[-1].end == start
        found.append(Extent(found.pop().start if joined else start, end))
    return found


def total(extents: Iterable[Part]) -> int:
    """Return the number of bytes of all `extents`."""
    return sum(end - start for start, end in extents)


def added(extents: Extents, parts: Sequence[Part]) -> Extents:
    """Return `extents` together with the ascending, disjoint `parts`. Adjacent extents are joined in the answer.

    No two of `extents` are adjacent before.
    Cost: O(log n), the extents between the first part and the last, and a copy of the others.
    """
    if not parts:
        return extents
    # One byte more on each side, so that adjacent extents are found and joined.
    first, behind = span(extents, parts[0][0] - 1, parts[-1][1] + 1)
    near = without(extents[first:behind], *parts)
    return _replaced(extents, first, behind, runs(sorted([*near, *parts])))


def removed(extents: Extents, parts: Sequence[Part]) -> Extents:
    """Return `extents` less the bytes of the ascending, disjoint `parts`. Cost: as `added`."""
    if not parts:
        return extents
    first, behind = span(extents, parts[0][0], parts[-1][1])
    if first == behind:
        return extents
    return _replaced(extents, first, behind, without(extents[first:behind], *parts))


def _replaced(extents: Extents, first: int, behind: int, by: list[Extent]) -> Extents:
    copy = list(extents)  # two copies in all; joining two slices around the new extents would make three
    copy[first:behind] = by
    return tuple(copy)
