"""Bytes of a block: parts of it, and what of one set of parts is in another. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Extent(NamedTuple):
    """Bytes [start, end) of a block."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start


def clip(extents: Iterable[Extent], start: int, end: int) -> list[Extent]:
    """What of ascending, disjoint `extents` lies in [start, end)."""
    if start >= end:
        return []
    return [
        Extent(first if first > start else start, last if last < end else end)
        for first, last in extents
        if first < end and start < last and first < last
    ]


def without(extents: Iterable[Extent], *holes: Extent) -> list[Extent]:
    """`extents` less the bytes of the `holes`."""
    left = [extent for extent in extents if extent.start < extent.end]
    for hole in holes:
        if left:
            left = [*clip(left, 0, hole.start), *clip(left, hole.end, left[-1].end)]
    return left


def runs(extents: Iterable[Extent]) -> list[Extent]:
    """Ascending, disjoint `extents` with neighbours as one."""
    found: list[Extent] = []
    for one in extents:
        if found and found[-1].end == one.start:
            found[-1] = Extent(found[-1].start, one.end)
        else:
            found.append(one)
    return found


def total(extents: Iterable[Extent]) -> int:
    """How many bytes they are."""
    return sum(extent.size for extent in extents)
