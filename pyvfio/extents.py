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
    parts = (Extent(max(one.start, start), min(one.end, end)) for one in extents)
    return [part for part in parts if part.start < part.end]


def without(extents: Iterable[Extent], *holes: Extent) -> list[Extent]:
    """`extents` less the bytes of the `holes`."""
    left = [extent for extent in extents if extent.start < extent.end]
    for hole in holes:
        left = [
            part
            for one in left
            for part in (Extent(one.start, min(one.end, hole.start)), Extent(max(one.start, hole.end), one.end))
            if part.start < part.end
        ]
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
