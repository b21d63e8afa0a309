"""The runs of free IOVA, sorted, and a search for the lowest or highest run that is long enough. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Set
from itertools import pairwise
from operator import sub
from typing import Self

from pyvfio.iommu.buckets import Buckets


class _Runs:
    """A bucket: the first and last address of each run. `longest` is an upper bound of `last - first`."""

    __slots__ = ("keys", "lasts", "longest")

    def __init__(self, firsts: list[int], lasts: list[int]) -> None:
        self.keys = firsts
        self.lasts = lasts
        self.longest = self.measure()

    def measure(self) -> int:
        return max(map(sub, self.lasts, self.keys), default=-1)

    def split(self) -> Self:
        half = len(self.keys) // 2
        upper = type(self)(self.keys[half:], self.lasts[half:])
        self.delete(half, len(self.keys))
        self.longest = self.measure()
        return upper

    def extend(self, other: Self) -> None:
        self.keys.extend(other.keys)
        self.lasts.extend(other.lasts)
        self.longest = max(self.longest, other.longest)

    def delete(self, start: int, end: int) -> None:
        del self.keys[start:end]
        del self.lasts[start:end]


class FreeRuns(Buckets[_Runs]):
    """Runs of addresses, both ends inclusive, that do not overlap.

    `seams`: addresses at which a run always begins. Such a run is never joined with the run below.

    Synchronization: none; the owner serializes calls. Cost: a change costs as much as in `Buckets`. A search costs
    O(log n) plus the runs of one bucket. Runs that are long enough, but contain no address with the remainder, are
    tried one by one. The search remembers where it ended, so each of them is tried once for each size, stride and
    offset until one of them grows.
    """

    __slots__ = ("_floors", "_seams", "_tree")
    most = 64
    least = 8
    most_floors = 64

    def __init__(self, runs: Iterable[tuple[int, int]] = (), seams: Set[int] = frozenset()) -> None:
        super().__init__(_Runs([], []))
        self._seams = seams
        every = list(runs)
        chunks = [every[at : at + self.most // 2] for at in range(0, len(every), self.most // 2)]
        if len(chunks) > 1:
            chunks[-2:] = [chunks[-2] + chunks[-1]]
        if chunks:
            self._buckets = [_Runs([run[0] for run in chunk], [run[1] for run in chunk]) for chunk in chunks]
            self._firsts = [0, *(runs.keys[0] for runs in self._buckets[1:])]
            self._only = self._buckets[0] if len(chunks) == 1 else None
        # For the arguments of each search with a stride: no place is free below this address.
        self._floors: dict[tuple[int, ...], int] = {}
        self._tree: list[int] = []
        self._grow_tree()

        # A binary tree of maxima. Leaves are `longest` of the buckets, from len(tree) / 2 on; node n has the maximum of
        # nodes 2n and 2n + 1.

    def _grow_tree(self) -> None:
        width = 1 << (len(self._buckets) - 1).bit_length()
        tree = [-1] * width + [runs.longest for runs in self._buckets] + [-1] * (width - len(self._buckets))
        for node in range(width - 1, 0, -1):
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
        self._tree = tree

    def _note_longest(self, number: int, longest: int) -> None:
        self._buckets[number].longest = longest
        tree = self._tree
        node = len(tree) // 2 + number
        tree[node] = longest
        while node > 1:
            node //= 2
            tree[node] = max(tree[2 * node], tree[2 * node + 1])

    def _next(self, number: int, least: int, *, down: bool) -> int:
        """Return the first bucket from `number` upwards (or downwards) that may have a run of more than `least`
        addresses, or -1."""
        tree, side = self._tree, int(down)
        width = len(tree) // 2
        node = width + number
        if tree[node] >= least:
            return number
        while node > 1:
            if node & 1 == side and tree[node ^ 1] >= least:
                node ^= 1
                while node < width:
                    node = 2 * node + side
                    if tree[node] < least:
                        node ^= 1
                return node - width
            node //= 2
        return -1

    def _changed(self, number: int) -> None:
        count = len(self._buckets)
        super()._changed(number)
        if len(self._buckets) != count:
            self._grow_tree()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (run for runs in self._buckets for run in zip(runs.keys, runs.lasts, strict=True))

    def covering(self, address: int) -> tuple[int, int] | None:
        """Return the run that contains `address`."""
        runs = self._buckets[bisect_right(self._firsts, address) - 1]
        position = bisect_right(runs.keys, address) - 1
        if position < 0 or runs.lasts[position] < address:
            return None
        return runs.keys[position], runs.lasts[position]

    def below(self, address: int) -> int | None:
        """Return the last address of the last run that begins below `address`."""
        number = bisect_right(self._firsts, address) - 1
        position = bisect_left(self._buckets[number].keys, address)
        if not position:
            if not number:
                return None
            number, position = number - 1, len(self._buckets[number - 1].keys)
        return self._buckets[number].lasts[position - 1]

    def longest(self, lowest: int, highest: int) -> int:
        """Return the length of the longest run in `[lowest, highest]`."""
        longest = -1
        start, end = bisect_right(self._firsts, lowest) - 1, bisect_right(self._firsts, highest)
        for number in range(start, end):
            runs = self._buckets[number]
            if runs.longest <= longest:
                continue
            if start < number < end - 1:
                self._note_longest(number, runs.measure())
                longest = max(longest, runs.longest)
            else:
                pairs = zip(runs.keys, runs.lasts, strict=True)
                longest = max(longest, *(min(last, highest) - max(first, lowest) for first, last in pairs), -1)
        return longest + 1

    def take_lowest(self, size: int, stride: int, offset: int, lowest: int, highest: int) -> int | None:
        """Remove `size` addresses at the lowest place in `[lowest, highest]` with the wanted remainder. Return it.

        `stride`, a power of two, and `offset`: the place leaves `offset` when divided by `stride`. `stride` 0: every
        place in a run is allowed, because the ends of runs and `lowest` are aligned already.
        """
        least, number, search = size - 1, 0, (size, stride, offset, lowest, highest)
        if stride:
            number = bisect_right(self._firsts, self._floors.get(search, 0)) - 1
        while number < len(self._buckets):
            if self._only is None:
                number = self._next(number, least, down=False)
                if number < 0 or self._firsts[number] > highest:
                    return None
            runs = self._buckets[number]
            keys, lasts, position = runs.keys, runs.lasts, 0
            while position < len(keys):
                first, last = keys[position], lasts[position]
                if last - first >= least:
                    start = first if first > lowest else lowest
                    if stride:
                        # x & -stride rounds down, and -(-x & -stride) up.
                        start = -(offset - start & -stride) + offset
                    end = start + least
                    if end <= last and end <= highest:
                        if stride:
                            self._note_floor(search, start)
                        self._take(number, position, start, end)
                        return start
                position += 1
            self._note_longest(number, runs.measure())
            number += 1
        return None

    def _note_floor(self, search: tuple[int, ...], floor: int) -> None:
        if len(self._floors) >= self.most_floors:
            self._floors.clear()
        self._floors[search] = floor

    def take_highest(self, size: int, stride: int, offset: int, lowest: int, highest: int) -> int | None:
        """As `take_lowest`, at the highest place."""
        least = size - 1
        number = bisect_right(self._firsts, highest) - 1
        while number >= 0:
            if self._only is None:
                number = self._next(number, least, down=True)
                if number < 0:
                    return None
            runs = self._buckets[number]
            keys, lasts = runs.keys, runs.lasts
            position = bisect_right(keys, highest) - 1
            while position >= 0:
                first, last = keys[position], lasts[position]
                if last - first >= least:
                    start = (last if last < highest else highest) - least
                    if stride:
                        start = (start - offset & -stride) + offset
                    if start >= first and start >= lowest:
                        self._take(number, position, start, start + least)
                        return start
                position -= 1
            self._note_longest(number, runs.measure())
            number -= 1
        return None

    def take(self, start: int, last: int) -> bool:
        """Remove `[start, last]`. Return False, and change nothing, unless one run contains all of it."""
        number = bisect_right(self._firsts, start) - 1
        runs = self._buckets[number]
        keys, lasts = runs.keys, runs.lasts
        position = bisect_right(keys, start) - 1
        if position < 0 or lasts[position] < last:
            return False
        self._take(number, position, start, last)
        return True

    def _take(self, number: int, position: int, start: int, last: int) -> None:
        """Remove `[start, last]` from one run."""
        runs = self._buckets[number]
        keys, lasts = runs.keys, runs.lasts
        end = lasts[position]
        if keys[position] < start:
            lasts[position] = start - 1
            if last < end:
                keys.insert(position + 1, last + 1)
                lasts.insert(position + 1, end)
                if len(keys) > self.most:
                    self._changed(number)
            return
        if last < end:
            keys[position] = last + 1
        else:
            del keys[position], lasts[position]
        if self._only is None:
            self._changed(number)

    def give(self, start: int, last: int) -> None:
        """Add `[start, last]`, which no run overlaps, and join it with adjacent runs."""
        number = 0 if self._only is not None else bisect_right(self._firsts, start) - 1
        runs, after = self._buckets[number], last + 1
        keys, lasts = runs.keys, runs.lasts
        position = bisect_left(keys, start)
        if position == len(keys) and self._only is None and self._joins_next(number, start, after):
            return
        joins_below = position > 0 and lasts[position - 1] == start - 1 and start not in self._seams
        if position < len(keys) and keys[position] == after and after not in self._seams:
            last = lasts[position]
            if joins_below:
                del keys[position], lasts[position]
            else:
                keys[position] = start
        elif not joins_below:
            keys.insert(position, start)
            lasts.insert(position, last)
        if joins_below:
            start = keys[position - 1]
            lasts[position - 1] = last
        for search, floor in self._floors.items():
            if floor > start:
                self._floors[search] = start
        if last - start > runs.longest:
            self._note_longest(number, last - start)
        if self._only is None or len(keys) > self.most:
            self._changed(number)

    def _joins_next(self, number: int, start: int, after: int) -> bool:
        """Add `[start, after - 1]` to the first run of the next bucket, if that run begins at `after`."""
        if after in self._seams or self._firsts[number + 1 : number + 2] != [after]:
            return False
        last = self._buckets[number + 1].lasts[0]
        self._buckets[number + 1].delete(0, 1)
        self._changed(number + 1)
        self.give(start, last)
        return True

    def _check(self) -> None:
        super()._check()
        for runs in self._buckets:
            assert len(runs.keys) == len(runs.lasts)
            assert runs.longest >= runs.measure()
        tree = self._tree
        self._grow_tree()
        assert tree == self._tree
        assert all(first <= last for first, last in self)
        for (size, stride, offset, lowest, highest), floor in self._floors.items():
            for first, last in self:
                start = -(offset - max(first, lowest) & -stride) + offset
                assert start >= floor or start + size - 1 > min(last, highest)
        for (_first, last), (first, _last) in pairwise(self):
            assert last + 1 < first or (last + 1 == first and first in self._seams)
