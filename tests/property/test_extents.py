"""Sets of extents against sets of bytes, and how much of a set a change of a few places looks at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvfio.extent_set import ExtentSet
from pyvfio.extents import Extent, Extents, added, clip, removed, runs, total, without

MOST = 40


def bytes_of(extents: Sequence[tuple[int, int]]) -> set[int]:
    """The bytes that they have."""
    return {byte for start, end in extents for byte in range(start, end)}


def extents_of(held: set[int]) -> Extents:
    """The fewest extents that have these bytes."""
    return tuple(runs(Extent(byte, byte + 1) for byte in sorted(held)))


held = st.sets(st.integers(0, MOST - 1))
sets = held.map(extents_of)
"""Ascending, without neighbours."""
edges = st.lists(st.integers(0, MOST), unique=True).map(sorted)
ascending = edges.map(lambda found: [*itertools.pairwise(found)][:: 1 + len(found) % 2])
"""Ascending and disjoint, some of them neighbours."""
holes = st.lists(st.tuples(st.integers(0, MOST), st.integers(0, MOST)))
"""In any order; some overlap, and some are empty or end before they begin."""


@given(ascending, st.integers(0, MOST), st.integers(0, MOST))
def test_a_clip_has_the_bytes_of_both(extents: list[tuple[int, int]], start: int, end: int) -> None:
    found = clip(extents, start, end)
    assert found == sorted(found)
    assert found == clip(iter(extents), start, end) == clip(tuple(extents), start, end)
    assert bytes_of(found) == bytes_of(extents) & set(range(start, end))
    assert all(isinstance(part, Extent) and part.size > 0 for part in found)


@given(ascending, holes)
def test_without_has_the_bytes_that_no_hole_has(extents: list[tuple[int, int]], holes: list[tuple[int, int]]) -> None:
    left = without(iter(extents), *holes)
    assert left == sorted(left)
    assert total(left) == len(bytes_of(left))  # disjoint
    assert bytes_of(left) == bytes_of(extents) - bytes_of(holes)
    assert all(isinstance(part, Extent) and part.size > 0 for part in left)


@given(sets, ascending)
def test_added_parts_join_their_neighbours(extents: Extents, parts: list[tuple[int, int]]) -> None:
    assert added(extents, parts) == extents_of(bytes_of(extents) | bytes_of(parts))


@given(sets, ascending)
def test_removed_parts_leave_the_rest(extents: Extents, parts: list[tuple[int, int]]) -> None:
    assert removed(extents, parts) == extents_of(bytes_of(extents) - bytes_of(parts))


class InChunks(ExtentSet):
    """Short chunks, so that few extents are in several."""

    MOST = 6
    LEAST = 2


@given(sets, st.lists(st.tuples(st.booleans(), ascending)), st.integers(0, MOST), st.integers(0, MOST))
def test_a_set_in_chunks_has_the_bytes_of_a_set_in_one(
    extents: Extents, changes: list[tuple[bool, list[tuple[int, int]]]], start: int, end: int
) -> None:
    kept, expected = InChunks(extents), extents
    kept._check()
    for adds, parts in changes:
        before, copy = kept, kept.extents
        kept, expected = (kept.added if adds else kept.removed)(parts), (added if adds else removed)(expected, parts)
        kept._check()
        assert tuple(before) == copy
    assert (kept.extents, bool(kept), kept.clip(start, end)) == (expected, bool(expected), clip(expected, start, end))
    assert kept.extents is kept.extents


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("adds", [True, False])
def test_every_part_joins_and_leaves_what_lies_in_other_chunks(first: int, *, adds: bool) -> None:
    """A part that fills the gap between two chunks is the neighbour of both."""
    extents = tuple(Extent(start, start + 1) for start in range(first, MOST, 2))
    kept = InChunks(extents)
    assert len(kept._chunks) > 4
    for start, end in itertools.combinations(range(MOST + 1), 2):
        changed = (kept.added if adds else kept.removed)([(start, end)])
        changed._check()
        assert tuple(changed) == (added if adds else removed)(extents, [(start, end)])
        assert kept.clip(start, end) == clip(extents, start, end)


def test_a_change_of_one_place_among_many_keeps_the_other_chunks() -> None:
    """A change copies one chunk; the others are the same objects."""
    many = ExtentSet((4 * number, 4 * number + 1) for number in range(10_000))
    changed = many.added([(20_002, 20_003)])
    changed._check()
    kept = {id(chunk) for chunk in many._chunks} & {id(chunk) for chunk in changed._chunks}
    assert len(kept) >= len(many._chunks) - 1
    assert len(many._chunks) <= 10_000 // (ExtentSet.MOST // 2) + 1


class Counted(Extent):
    """An extent that counts how often one is looked at."""

    looks = 0

    def __iter__(self) -> Iterator[int]:
        Counted.looks += 1
        return super().__iter__()

    def __getitem__(self, index: SupportsIndex | slice) -> int:  # type: ignore[override]
        Counted.looks += 1
        return super().__getitem__(index)  # type: ignore[return-value]

    def __lt__(self, other: object) -> bool:
        Counted.looks += 1
        return tuple(self) < other  # type: ignore[operator]

    def __gt__(self, other: object) -> bool:
        Counted.looks += 1
        return tuple(self) > other  # type: ignore[operator]


def looks_at(number: int, change: str) -> int:
    """How often a change in the middle of so many extents looks at one."""
    extents = tuple(Counted(start, start + 2) for start in range(0, 4 * number, 4))
    middle = 4 * (number // 2)
    Counted.looks = 0
    match change:
        case "clip":
            assert clip(extents, middle, middle + 4) == [(middle, middle + 2)]
        case "added":
            assert len(added(extents, [(middle + 2, middle + 4)])) == number - 1
        case _:
            assert len(removed(extents, [(middle, middle + 2)])) == number - 1
    return Counted.looks


@pytest.mark.parametrize("change", ["clip", "added", "removed"])
def test_a_change_of_one_part_looks_at_few_of_many_extents(change: str) -> None:
    """Twice the logarithm, and some."""
    assert looks_at(1 << 16, change) <= looks_at(1 << 4, change) + 2 * 12 * 2
