"""The mappings that an address space has in the kernel, sorted by IOVA."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import Self, TypeAlias

from pyvfio.iommu.buckets import Buckets
from pyvfio.iommu.space import Mapping
from pyvfio.units import Iova, Vaddr, format_ranges


class _Rows:
    """A bucket: the IOVA, size and vaddr of each mapping.

    The IOVAs are a list, not an array. Most IOVAs are objects that the allocator or a mapper holds too, so a list needs
    no more memory than an array. A search in a list takes half the time.
    """

    __slots__ = ("keys", "sizes", "vaddrs")

    def __init__(self, iovas: list[int], sizes: array[int], vaddrs: array[int]) -> None:
        self.keys = iovas
        self.sizes = sizes
        self.vaddrs = vaddrs

    def split(self) -> Self:
        half = len(self.keys) // 2
        upper = type(self)(self.keys[half:], self.sizes[half:], self.vaddrs[half:])
        self.delete(half, len(self.keys))
        return upper

    def extend(self, other: Self) -> None:
        self.keys.extend(other.keys)
        self.sizes.extend(other.sizes)
        self.vaddrs.extend(other.vaddrs)

    def delete(self, start: int, end: int) -> None:
        del self.keys[start:end]
        del self.sizes[start:end]
        del self.vaddrs[start:end]

    def mapping(self, position: int) -> Mapping:
        return Mapping(Iova(self.keys[position]), self.sizes[position], Vaddr(self.vaddrs[position]))


def _no_rows() -> _Rows:
    return _Rows([], array("Q"), array("Q"))


MOST_DESCRIBED = 8
"""The number of mappings that the message of an error names."""


def describe_mappings(mappings: Sequence[Mapping]) -> str:
    """Format the IOVAs of mappings, at most the first eight."""
    named = format_ranges(mapping.range for mapping in mappings[:MOST_DESCRIBED])
    return named + (", …" if len(mappings) > MOST_DESCRIBED else "")


Place: TypeAlias = tuple[_Rows, int]
"""The place of a mapping in a table. Valid until the next change."""


class MappingTable(Buckets[_Rows]):
    """The mappings that an address space has in the kernel, sorted by IOVA. 24 bytes each.

    The newest mapping stays apart from the sorted rows, as long as each `remove` follows its `add`: a driver that maps
    for each transfer moves no row. Another change, `is_whole` and `has_neighbours` insert the row, and later rows are
    inserted at once. Other look-ups move no row: a signal handler can raise in them.

    Synchronization: none; the owner serializes calls. Cost: as `Buckets`.
    """

    __slots__ = ("_apart", "_in_turn", "_last", "_length", "_newest", "_place", "changes")

    def __init__(self) -> None:
        super().__init__(_no_rows())
        self._newest = _Rows([0], array("Q", [0]), array("Q", [0]))
        self._place: Place = (self._newest, 0)
        self._apart = False
        """Whether `_newest` has a mapping."""
        self._in_turn = True  # whether the last `remove` followed its `add`
        self._last = -1  # the last key that was inserted at once
        self._length = 0  # the number of the sorted rows
        self.changes = 0
        """The number of changes."""

    def __len__(self) -> int:
        return self._length + self._apart

    def __bool__(self) -> bool:
        return self._apart or bool(self._buckets[0].keys)

    def __iter__(self) -> Iterator[Mapping]:
        sorted_rows = (
            Mapping(Iova(iova), size, Vaddr(vaddr))
            for rows in self._buckets
            for iova, size, vaddr in zip(rows.keys, rows.sizes, rows.vaddrs, strict=True)
        )
        if not self._apart:
            return sorted_rows
        every = list(sorted_rows)
        insort(every, self._newest.mapping(0))
        return iter(every)

    @property
    def mapped(self) -> int:
        """The number of bytes mapped. Cost: O(n)."""
        return sum(sum(rows.sizes) for rows in self._buckets) + (self._newest.sizes[0] if self._apart else 0)

    def add(self, iova: int, size: int, vaddr: int) -> None:
        """Add a mapping. The kernel has checked that no mapping overlaps."""
        self.changes += 1
        if self._apart:
            self._sort()
        if self._in_turn:
            newest = self._newest
            newest.keys[0], newest.sizes[0], newest.vaddrs[0] = iova, size, vaddr
            self._apart = True
        else:
            self._insert(iova, size, vaddr)
            self._last = iova

    def _insert(self, iova: int, size: int, vaddr: int) -> None:
        rows = self._only or self._buckets[bisect_right(self._firsts, iova) - 1]
        keys = rows.keys
        position = bisect_left(keys, iova)
        keys.insert(position, iova)
        rows.sizes.insert(position, size)
        rows.vaddrs.insert(position, vaddr)
        self._length += 1
        if len(keys) > self.most:
            self._changed(bisect_right(self._firsts, iova) - 1)

    def _sort(self) -> None:
        """Insert the newest mapping into the sorted rows. For changes only."""
        newest = self._newest
        self._insert(newest.keys[0], newest.sizes[0], newest.vaddrs[0])
        self._apart = self._in_turn = False

    def find(self, iova: int, size: int) -> Place | None:
        """Return the place of the mapping that is exactly `[iova, iova + size)`, or None."""
        if self._apart:
            newest = self._newest
            if newest.keys[0] == iova:
                return self._place if newest.sizes[0] == size else None
        rows = self._only or self._buckets[bisect_right(self._firsts, iova) - 1]
        keys = rows.keys
        position = bisect_left(keys, iova)
        if position < len(keys) and keys[position] == iova and rows.sizes[position] == size:
            return rows, position
        return None

    def remove(self, place: Place) -> None:
        """Remove the mapping at a place that `find` returned."""
        self.changes += 1
        rows, position = place
        if rows is self._newest:
            self._apart = False
            return
        iova = rows.keys[position]
        if iova == self._last:
            self._in_turn = True
        del rows.keys[position], rows.sizes[position], rows.vaddrs[position]
        self._length -= 1
        if self._only is None and (not position or len(rows.keys) < self.least):
            self._changed(bisect_right(self._firsts, iova) - 1)

    def has(self, iova: int, size: int, vaddr: int) -> bool:
        """Return whether exactly that mapping exists."""
        place = self.find(iova, size)
        return place is not None and place[0].vaddrs[place[1]] == vaddr

    def has_neighbours(self, iovas: Sequence[int], vaddrs: Sequence[int], end: int) -> bool:
        """Return whether mappings begin at exactly these IOVAs and vaddrs, and fill `[iovas[0], end)`."""
        if self._apart:
            self._sort()
        iovas_there: list[int] = []
        sizes_there: array[int] = array("Q")
        vaddrs_there: array[int] = array("Q")
        for rows, first, last in self._spans(iovas[0], end):
            iovas_there += rows.keys[first:last]
            sizes_there += rows.sizes[first:last]
            vaddrs_there += rows.vaddrs[first:last]
        if iovas_there != iovas or vaddrs_there != array("Q", vaddrs):
            return False
        # Mappings do not overlap, so the sizes add up to the distance exactly if there is no gap.
        whole: bool = iovas[0] + sum(sizes_there) == iovas[-1] + sizes_there[-1] == end
        return whole

    def overlapping(self, *, iova: int, size: int) -> list[Mapping]:
        """Return the mappings that share an address with `[iova, iova + size)`."""
        found: list[Mapping] = []
        for rows, start, end in self._spans(iova, iova + size):
            if start and rows.keys[start - 1] + rows.sizes[start - 1] > iova:
                found.append(rows.mapping(start - 1))  # a mapping that begins before `iova` and ends behind it
            found += map(rows.mapping, range(start, end))
        if self._apart:
            newest = self._newest.mapping(0)
            if newest.iova < iova + size and iova < newest.iova + newest.size:
                insort(found, newest)
        return found

    def is_whole(self, iova: int, size: int) -> bool:
        """Return whether mappings fill `[iova, iova + size)` without a gap, and none reaches beyond."""
        if self._apart:
            self._sort()
        reached = iova
        for rows, start, end in self._spans(iova, iova + size):
            if start == end or rows.keys[start] != reached:
                return False
            reached = rows.keys[end - 1] + rows.sizes[end - 1]
            # Mappings do not overlap, so the sizes add up to the distance exactly if there is no gap.
            if rows.keys[start] + sum(rows.sizes[start:end]) != reached:
                return False
        return reached == iova + size

    def discard(self, *, iova: int, size: int) -> None:
        """Remove the mappings that begin in `[iova, iova + size)`."""
        if self._apart:
            self._sort()
        self._cut(iova, iova + size)
        self._length = sum(len(rows.keys) for rows in self._buckets)
        self.changes += 1

    def cut(self, *, iova: int, size: int) -> None:
        """Remove `[iova, iova + size)` from the mappings. The rest of a mapping stays, as one or two mappings."""
        end = iova + size
        for start, length, vaddr in self.overlapping(iova=iova, size=size):
            place = self.find(start, length)
            if place is None:
                continue
            if start < iova:  # the head stays, where it is
                place[0].sizes[place[1]] = iova - start
                self.changes += 1
            else:
                self.remove(place)
            if end < start + length:
                self.add(end, start + length - end, vaddr + end - start)

    def at(self, iova: int) -> Mapping | None:
        """Return the mapping that covers `iova`, or None."""
        if self._apart and 0 <= iova - self._newest.keys[0] < self._newest.sizes[0]:
            return self._newest.mapping(0)
        number = bisect_right(self._firsts, iova) - 1
        rows = self._buckets[number]
        position = bisect_right(rows.keys, iova) - 1
        if position < 0 or iova >= rows.keys[position] + rows.sizes[position]:
            return None
        return rows.mapping(position)

    def clear(self) -> None:
        """Remove all mappings."""
        super().__init__(_no_rows())
        self._apart = False
        self._length = 0
        self.changes += 1

    def _check(self) -> None:
        super()._check()
        for rows in self._buckets:
            assert len(rows.keys) == len(rows.sizes) == len(rows.vaddrs)
        assert self._place == (self._newest, 0)
        mappings = list(self)
        assert len(self) == len(mappings)
        assert bool(self) == bool(mappings)
        for one, other in itertools.pairwise(mappings):
            assert one.range.last < other.iova
