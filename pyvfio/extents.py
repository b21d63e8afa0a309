"""Bytes of a block: parts of it, and what of one set of parts is in another. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

Part: TypeAlias = tuple[int, int]
"""Bytes [start, end) of a block: an `Extent`, or a pair, which is made at a tenth of its cost."""


class Extent(NamedTuple):
    """Bytes [start, end) of a block."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start


def clip(extents: Iterable[Part], start: int, end: int) -> list[Extent]:
    """What of ascending, disjoint `extents` lies in [start, end)."""
    if start >= end:
        return []
    return [
        Extent(first if first > start else start, last if last < end else end)
        for first, last in extents
        if first < end and start < last and first < last
    ]


def without(extents: Iterable[Part], *holes: Part) -> list[Extent]:
    """`extents` less the bytes of the `holes`."""
    left = [Extent(start, end) for start, end in extents if start < end]
    for start, end in holes:
        if left:
            left = [*clip(left, 0, start), *clip(left, end, left[-1].end)]
    return left


def runs(extents: Iterable[Part]) -> list[Extent]:
    """Ascending, disjoint `extents` with neighbours as one."""
    found: list[Extent] = []
    for start, end in extents:
        joined = bool(found) and found[-1].end == start
        found.append(Extent(found.pop().start if joined else start, end))
    return found


def total(extents: Iterable[Part]) -> int:
    """How many bytes they are."""
    return sum(end - start for start, end in extents)
