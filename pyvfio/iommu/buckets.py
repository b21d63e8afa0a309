"""Sorted rows in buckets: a change moves the rows of one bucket only, not all rows behind it. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Generic, Protocol, Self, TypeVar


class Bucket(Protocol):
    """Rows in the order of their keys. The keys are 64-bit numbers, all different."""

    @property
    def keys(self) -> Sequence[int]:
        """The keys, ascending."""
        ...

    def split(self) -> Self:
        """Remove and return the upper half."""
        ...

    def extend(self, other: Self) -> None:
        """Append the rows of `other`, whose keys are higher."""
        ...

    def delete(self, start: int, end: int) -> None:
        """Remove the rows from `start` to `end`, exclusive."""
        ...


_Bucket = TypeVar("_Bucket", bound=Bucket)


class Buckets(Generic[_Bucket]):
    """The buckets of one sorted table. A subclass adds the operations on rows.

    A bucket with more rows than `most` is split. A bucket with fewer rows than `least` is joined with a neighbour.

    Synchronization: none; the owner serializes calls. Cost: one bisect finds the bucket, another finds the row. A
    change moves at most `most` rows; few changes move buckets.
    """

    __slots__ = ("_buckets", "_firsts", "_only")
    most: ClassVar[int] = 512
    least: ClassVar[int] = 64

    def __init__(self, first: _Bucket) -> None:
        self._buckets = [first]
        # The first bucket is entered with 0, not with its first key, so that every key belongs to a bucket.
        self._firsts = [0]
        self._only: _Bucket | None = first
        """The only bucket, or None if there are several. Most tables are small, and a bisect costs three steps."""

    def _changed(self, number: int) -> None:
        """Split the bucket or join two buckets, as the length requires; then record the first key."""
        buckets, firsts = self._buckets, self._firsts
        length = len(buckets[number].keys)
        if length > self.most:
            upper = buckets[number].split()
            buckets.insert(number + 1, upper)
            firsts.insert(number + 1, upper.keys[0])
            self._only = None
        elif length < self.least and len(buckets) > 1:
            lower = max(number - 1, 0)
            buckets[lower].extend(buckets.pop(lower + 1))
            del firsts[lower + 1]
            self._only = None if len(buckets) > 1 else buckets[0]
            self._changed(lower)
            return
        if number:
            firsts[number] = buckets[number].keys[0]

    def _cut(self, start: int, end: int) -> None:
        """Remove the rows whose keys lie in `[start, end)`."""
        firsts, buckets = self._firsts, self._buckets
        following = start
        while following < end:
            number = bisect_right(firsts, following) - 1
            following = firsts[number + 1] if number + 1 < len(firsts) else end
            keys = buckets[number].keys
            first, last = bisect_left(keys, start), bisect_left(keys, end)
            if first < last:
                buckets[number].delete(first, last)
                self._changed(number)

    def _spans(self, start: int, end: int) -> Iterator[tuple[_Bucket, int, int]]:
        """Yield bucket, first position and end position (exclusive) of the rows whose keys lie in `[start, end)`."""
        number = bisect_right(self._firsts, start) - 1
        while number < len(self._firsts) and self._firsts[number] < end:
            bucket = self._buckets[number]
            yield bucket, bisect_left(bucket.keys, start), bisect_left(bucket.keys, end)
            number += 1

    def _check(self) -> None:
        keys = [bucket.keys for bucket in self._buckets]
        assert len(keys) == len(self._firsts)
        assert self._only is (None if len(keys) > 1 else self._buckets[0])
        assert self._firsts[0] == 0
        assert self._firsts[1:] == [each[0] for each in keys[1:]]
        every = [key for each in keys for key in each]
        assert all(one < other for one, other in pairwise(every)), every
        sizes = list(map(len, keys))
        assert max(sizes) <= self.most, sizes
        assert len(sizes) == 1 or min(sizes) >= self.least, sizes
