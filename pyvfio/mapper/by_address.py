"""Memory in the order of its addresses, found by bisection."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Generic, Protocol, Self, TypeVar

from pyvfio.iommu.buckets import Buckets
from pyvfio.units import Vaddr


class Addressed(Protocol):
    """An object at an address of this process."""

    @property
    def vaddr(self) -> Vaddr:
        """The address of the first byte. Never changes."""
        ...


_Thing = TypeVar("_Thing", bound=Addressed)


class _Things(Generic[_Thing]):
    """A bucket: addresses and objects in the same order."""

    __slots__ = ("keys", "things")

    def __init__(self, addresses: list[int], things: list[_Thing]) -> None:
        self.keys = addresses
        self.things = things

    def split(self) -> Self:
        half = len(self.keys) // 2
        upper = type(self)(self.keys[half:], self.things[half:])
        self.delete(half, len(self.keys))
        return upper

    def extend(self, other: Self) -> None:
        self.keys += other.keys
        self.things += other.things

    def delete(self, start: int, end: int) -> None:
        del self.keys[start:end]
        del self.things[start:end]


class ByAddress(Buckets[_Things[_Thing]], Generic[_Thing]):
    """Objects that begin at different addresses, in ascending order. Iteration yields all of them.

    Synchronization: none; the owner serializes calls. Cost: as `Buckets`; 16 bytes for each object, besides the object
    and its address.
    """

    __slots__ = ("changes",)

    def __init__(self) -> None:
        super().__init__(_Things([], []))  # addresses apart from objects: a search with a key takes three times as long
        self.changes = 0
        """The number of changes. A cached answer is valid until this number changes."""

    def __len__(self) -> int:
        return sum(len(bucket.keys) for bucket in self._buckets)

    def __iter__(self) -> Iterator[_Thing]:
        return (thing for bucket in self._buckets for thing in bucket.things)

    def add(self, thing: _Thing) -> None:
        """Add an object."""
        vaddr = thing.vaddr
        bucket = self._only or self._buckets[bisect_right(self._firsts, vaddr) - 1]
        keys = bucket.keys
        position = bisect_right(keys, vaddr)
        bucket.things.insert(position, thing)
        keys.insert(position, vaddr)
        self.changes += 1
        if len(keys) > self.most:
            self._changed(bisect_right(self._firsts, vaddr) - 1)

    def remove(self, vaddr: int) -> None:
        """Remove the object that begins at `vaddr`."""
        bucket = self._only or self._buckets[bisect_right(self._firsts, vaddr) - 1]
        position = bisect_right(bucket.keys, vaddr) - 1
        self.changes += 1
        del bucket.things[position], bucket.keys[position]
        if self._only is None and (not position or len(bucket.keys) < self.least):
            self._changed(bisect_right(self._firsts, vaddr) - 1)

    def below(self, vaddr: int) -> _Thing | None:
        """Return the last object that begins at or below `vaddr`, or None."""
        bucket = self._only or self._buckets[bisect_right(self._firsts, vaddr) - 1]
        position = bisect_right(bucket.keys, vaddr)
        return bucket.things[position - 1] if position else None

    def peek(self, vaddr: int) -> _Thing | None:
        """Return as `below` does, without a lock.

        The answer was correct at some moment during the call. While another thread makes a change, the answer may be
        None or a neighbour.
        """
        try:
            bucket = self._only or self._buckets[bisect_right(self._firsts, vaddr) - 1]
            position = bisect_right(bucket.keys, vaddr)
            return bucket.things[position - 1] if position else None
        except IndexError:  # another thread removed an object after the search
            return None

    def clear(self) -> None:
        """Remove all objects."""
        super().__init__(_Things([], []))
        self.changes += 1

    def _check(self) -> None:
        """The invariant: the addresses are those of the objects, and ascend."""
        super()._check()
        things = list(self)
        assert [vaddr for bucket in self._buckets for vaddr in bucket.keys] == [thing.vaddr for thing in things]
