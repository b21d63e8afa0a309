"""Sorted tables in buckets against plain lists: every answer, with buckets so small that they are split and joined."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pyvfio.errors import IovaOverlapError, IovaRangeError
from pyvfio.iommu import iova
from pyvfio.iommu.free_runs import FreeRuns
from pyvfio.iommu.iova import IOVA_MIN, IovaAllocator
from pyvfio.iommu.table import MappingTable
from pyvfio.mapper.by_address import ByAddress
from pyvfio.units import PAGE_SIZE, U64_MAX, Iova, IovaRange, Vaddr

if TYPE_CHECKING:
    from _typeshed import TraceFunction


class SmallTable(MappingTable):
    """With few rows in a bucket."""

    __slots__ = ()
    most, least = 8, 2


class SmallRuns(FreeRuns):
    """With few runs in a bucket."""

    __slots__ = ()
    most, least = 8, 2


class Thing(NamedTuple):
    """At an address."""

    vaddr: Vaddr


class SmallByAddress(ByAddress[Thing]):
    """With few things in a bucket."""

    __slots__ = ()
    most, least = 8, 2


def count_lines(step: Callable[[], object]) -> int:
    """How many lines of the package a step runs: a cost that does not hang on the machine, nor on a collection."""
    lines = 0

    def trace(frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
        nonlocal lines
        if "/pyvfio/" not in frame.f_code.co_filename:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        step()
    finally:
        sys.settrace(before)
    return lines


# ------------------------------------------------------------------------------------------------------- mappings


@pytest.mark.parametrize("seed", range(12))
def test_a_table_in_buckets_answers_as_a_dict_does(seed: int) -> None:
    """Look-ups of one address, of ranges with and without gaps, of neighbours; removals of one and of many."""
    chance = random.Random(seed)  # noqa: S311
    made, model = SmallTable(), dict[int, int]()
    for _ in range(500):
        at, size = chance.randrange(160) * PAGE_SIZE, chance.randrange(1, 5) * PAGE_SIZE
        there = sorted(start for start, length in model.items() if start < at + size and at < start + length)
        assert [mapping.iova for mapping in made.overlapping(iova=at, size=size)] == there
        found = made.at(at)
        assert (found and found.iova) == next((start for start in there if start <= at), None)
        filled = there[:1] == [at] and sum(model[start] for start in there) == size
        whole = filled and there[-1] + model[there[-1]] == at + size
        assert made.is_whole(at, size) == whole
        if there:
            vaddrs = [start + 7 for start in there]
            assert made.has_neighbours(there, vaddrs, at + size) == made.is_whole(there[0], at + size - there[0])
            assert not made.has_neighbours(there[1:] or [at + 1], vaddrs, at + size)
            assert not made.has_neighbours(there, [*vaddrs[:-1], 1], at + size)
        if not there:
            made.add(at, size, at + 7)
            newest = made.find(at, size)
            assert newest is not None
            assert made.find(at, size + PAGE_SIZE) is None
            if chance.random() < 0.8:
                model[at] = size
            else:
                made.remove(newest)
        elif chance.random() < 0.5:
            place = made.find(there[0], model[there[0]])
            assert place is not None
            assert made.has(there[0], model[there[0]], there[0] + 7)
            made.remove(place)
            del model[there[0]]
        elif chance.random() < 0.2:
            size = chance.randrange(1, 80) * PAGE_SIZE
            made.discard(iova=at, size=size)
            model = {start: length for start, length in model.items() if not at <= start < at + size}
        made._check()
        assert {mapping.iova: mapping.size for mapping in made} == model
        assert (len(made), bool(made), made.mapped) == (len(model), bool(model), sum(model.values()))


@pytest.mark.parametrize(
    "look_up",
    [
        list,
        len,
        lambda table: table.mapped,
        lambda table: table.at(PAGE_SIZE),
        lambda table: table.overlapping(iova=0, size=8 * PAGE_SIZE),
        lambda table: table.find(2 * PAGE_SIZE, PAGE_SIZE),
        lambda table: table.has(PAGE_SIZE, PAGE_SIZE, 7),
    ],
)
def test_a_look_up_in_a_table_moves_no_row_so_a_signal_handler_can_raise_in_it(
    look_up: Callable[[MappingTable], object],
) -> None:
    """The newest mapping stays where it is, until the next change."""
    made = SmallTable()
    for number in (0, 2, 3, 1):
        if number == 1:
            removed = made.find(3 * PAGE_SIZE, PAGE_SIZE)
            assert removed is not None
            made.remove(removed)
        made.add(number * PAGE_SIZE, PAGE_SIZE, 7)
    before = [list(rows.keys) for rows in made._buckets]
    look_up(made)
    assert [list(rows.keys) for rows in made._buckets] == before == [[0, 2 * PAGE_SIZE]]


def test_the_newest_mapping_is_removed_again_at_the_same_cost_among_many() -> None:
    def once(made: MappingTable) -> None:
        made.add(5, 1, 7)
        place = made.find(5, 1)
        assert place is not None
        made.remove(place)

    few, many = SmallTable(), SmallTable()
    for number in range(10, 1000):
        many.add(number, 1, 7)
    once(many)
    assert count_lines(lambda: once(many)) == count_lines(lambda: once(few))


@pytest.mark.parametrize("seed", range(6))
def test_things_by_address_are_found_as_in_a_sorted_list(seed: int) -> None:
    """With the lock and without, also after a removal. The number of changes never returns to a former one."""
    chance = random.Random(seed)  # noqa: S311
    made, model = SmallByAddress(), list[int]()
    for _ in range(500):
        vaddr = chance.randrange(200)
        below = [each for each in model if each <= vaddr]
        for found in (made.below(vaddr), made.peek(vaddr)):
            assert (None if found is None else found.vaddr) == (below[-1] if below else None)
        before = made.changes, list(model)
        if vaddr in model:
            made.remove(vaddr)
            model.remove(vaddr)
        elif chance.random() < 0.6:
            made.add(Thing(Vaddr(vaddr)))
            model = sorted([*model, vaddr])
        made._check()
        assert [thing.vaddr for thing in made] == model
        assert (made.changes > before[0]) == (model != before[1])
    last = made.changes
    made.clear()
    made._check()
    assert (len(made), made.peek(200)) == (0, None)
    assert made.changes > last


# ------------------------------------------------------------------------------------------------------ what is free


class Simple:
    """The allocator as it is explained: a list of free runs, looked at from one end."""

    def __init__(self, ranges: tuple[IovaRange, ...]) -> None:
        self.ranges = ranges
        self.reserved: dict[int, int] = {}

    def free(self) -> list[tuple[int, int]]:
        """Every free run."""
        runs = []
        for offered in self.ranges:
            start = int(offered.start)
            for taken, size in sorted(self.reserved.items()):
                if offered.start <= taken <= offered.last:
                    if start < taken:
                        runs.append((start, taken - 1))
                    start = taken + size
            if start <= offered.last:
                runs.append((start, offered.last))
        return runs

    def reserve(self, size: int, alignment: int, offset: int, top_down: bool, dma_bits: int) -> int | None:  # noqa: FBT001
        """The lowest or highest place that leaves `offset`; else of all."""
        runs = self.free()
        for stride in (max(alignment, PAGE_SIZE), PAGE_SIZE):
            remainder = offset % stride & -PAGE_SIZE
            for first, last in reversed(runs) if top_down else runs:
                low, high = max(first, IOVA_MIN), min(last, (1 << dma_bits) - 1)
                if top_down:
                    start = (high + 1 - size - remainder) // stride * stride + remainder
                else:
                    start = -((remainder - low) // stride) * stride + remainder
                if low <= start and start + size - 1 <= high:
                    self.reserved[start] = size
                    return start
        return None

    def reserve_at(self, start: int, size: int) -> bool:
        """Where all of it is in one free run."""
        fits = any(first <= start and start + size - 1 <= last for first, last in self.free())
        if fits:
            self.reserved[start] = size
        return fits


RANGES = (
    IovaRange(Iova(0), Iova(0x4_FFFF)),
    IovaRange(Iova(0x5_0000), Iova(0x1F_FFFF)),  # touches the first, and is none with it
    IovaRange(Iova(0x80_0000), Iova(0xFF_FFFF)),
    IovaRange(Iova((1 << 39) - 0x10_0000), Iova((1 << 39) + 0x7F_FFFF)),
    IovaRange(Iova(U64_MAX + 1 - 0x4_0000), Iova(U64_MAX)),
)


class Pair:
    """The allocator and the simple one, which are asked the same. `again`: how often a search is the last one again."""

    def __init__(self, seed: int, again: float = 0) -> None:
        self.chance, self.again = random.Random(seed), again  # noqa: S311
        self.search = (PAGE_SIZE, 1, 0, True, 39)
        self.made, self.model, self.held = IovaAllocator(RANGES), Simple(RANGES), list[int]()

    def reserve(self) -> None:
        """The same place, or none."""
        chance = self.chance
        if chance.random() >= self.again:
            size = chance.choice([1, 1, 1, 2, 3, 8, 64, 600]) * PAGE_SIZE
            alignment, offset = chance.choice([1, 1, PAGE_SIZE, 16 * PAGE_SIZE]), chance.randrange(32) * PAGE_SIZE
            top_down, bits = chance.random() < 0.4, chance.choice([17, 21, 39, 39, 64])
            self.search = size, alignment, offset, top_down, bits
        start = self.model.reserve(*self.search)
        if start is None:
            with pytest.raises(IovaRangeError):
                self.made.place(*self.search)
            return
        assert self.made.place(*self.search) == start
        self.held.append(start)

    def reserve_at(self) -> None:
        """There, or the error that names what is there."""
        start = self.chance.choice(RANGES).start + self.chance.randrange(70) * PAGE_SIZE
        size = self.chance.choice([1, 2, 30]) * PAGE_SIZE
        reserved = dict(self.model.reserved)
        if start < 1 << 64 and self.model.reserve_at(start, size):
            assert self.made.reserve_at(start, size) == start
            self.held.append(start)
            return
        with pytest.raises((IovaOverlapError, IovaRangeError, ValueError)) as raised:
            self.made.reserve_at(start, size)
        if isinstance(raised.value, IovaOverlapError):
            taken = [each for each, length in reserved.items() if each < start + size and start < each + length]
            assert [each.start for each in raised.value.existing] == sorted(taken)

    def release(self) -> None:
        """Mostly the last one."""
        if self.held:
            last = self.chance.random() < 0.7
            start = self.held.pop(-1 if last else self.chance.randrange(len(self.held)))
            self.made.release(start)
            del self.model.reserved[start]

    def look(self) -> None:
        """At all that is free."""
        free = self.model.free()
        assert [(each.start, each.last) for each in self.made.free_ranges] == free
        assert self.made.largest_free == max(0, *(last + 1 - max(first, IOVA_MIN) for first, last in free), 0)


@pytest.mark.long
@pytest.mark.parametrize("looks", [False, True], ids=["between looks", "looked at each time"])
@pytest.mark.parametrize("seed", range(8))
def test_the_allocator_answers_as_the_simple_one(monkeypatch: pytest.MonkeyPatch, seed: int, *, looks: bool) -> None:
    """Each place, each refusal. A look at what is free ends the spare place, so that one half has none."""
    monkeypatch.setattr(iova, "FreeRuns", SmallRuns)
    pair = Pair(seed)
    steps = [pair.reserve] * 11 + [pair.reserve_at] * 2 + [pair.release] * 7
    for _ in range(500):
        pair.chance.choice(steps)()
        pair.made._check()
        assert sorted(pair.held) == [each.start for each in pair.made.reservations]
        if looks:
            pair.look()
    pair.look()


@pytest.mark.parametrize("count", [*range(1, 10), 16, 17])
def test_the_only_long_run_is_found_in_whichever_bucket_it_is(count: int) -> None:
    """From both ends, with and without a stride, after a search that has found nothing has measured every bucket."""
    page, highest = PAGE_SIZE, (1 << 39) - 1
    for place in range(4 * count):  # runs; a bucket begins with four
        start = 8 * place * page
        for stride in (0, 4 * page):
            for down in (False, True):
                made = SmallRuns(
                    (8 * at * page, (8 * at + (4 if at == place else 2)) * page - 1) for at in range(4 * count)
                )
                take = made.take_highest if down else made.take_lowest
                assert take(5 * page, stride, 0, 0, highest) is None
                made._check()
                assert take(4 * page, stride, 0, 0, highest) == start
                assert take(3 * page, stride, 0, 0, highest) is None
                made._check()
                made.give(start, start + 4 * page - 1)
                assert take(4 * page, stride, 0, 0, highest) == start


def test_the_longest_run_within_limits_is_that_of_a_walk_over_all() -> None:
    """Whichever bucket a limit cuts."""
    chance = random.Random(7)  # noqa: S311 (nothing secret)
    runs = [(100 * at, 100 * at + chance.randrange(90)) for at in range(40)]
    made = SmallRuns(runs)
    for lowest in range(0, 4000, 130):
        for highest in range(lowest, 4000, 70):
            within = [min(last, highest) - max(first, lowest) + 1 for first, last in runs]
            assert made.longest(lowest, highest) == max(0, *within), (lowest, highest)


@pytest.mark.parametrize("again", [0.6, 0.95])
@pytest.mark.parametrize("seed", range(12))
def test_the_same_search_again_answers_as_the_simple_one(
    monkeypatch: pytest.MonkeyPatch, seed: int, *, again: float
) -> None:
    """From the top, mostly the place below the last one: until the run ends, or something else has changed."""
    monkeypatch.setattr(iova, "FreeRuns", SmallRuns)
    pair = Pair(seed, again)
    steps = [pair.reserve] * 22 + [pair.reserve_at] + [pair.release] * 14
    for _ in range(300):
        pair.chance.choice(steps)()
        pair.made._check()
    pair.look()


def test_the_place_below_the_last_one_is_had_without_a_search() -> None:
    """Down to the lowest address of the run, which a search takes."""
    made = IovaAllocator([IovaRange(Iova(0), Iova(IOVA_MIN + 4 * PAGE_SIZE - 1))])
    assert made.place(PAGE_SIZE, 1, 0, True, 39) == IOVA_MIN + 3 * PAGE_SIZE  # noqa: FBT003
    lines = count_lines(lambda: made.place(PAGE_SIZE, 1, 0, True, 39))  # noqa: FBT003
    assert lines < 20
    made._check()
    assert [made.place(PAGE_SIZE, 1, 0, True, 39) for _ in range(2)] == [IOVA_MIN + PAGE_SIZE, IOVA_MIN]  # noqa: FBT003
    with pytest.raises(IovaRangeError):  # lower addresses are only for a caller who names them
        made.place(PAGE_SIZE, 1, 0, True, 39)  # noqa: FBT003
    made._check()


def test_a_place_that_is_released_is_had_again_without_a_search() -> None:
    """And is free for every other question meanwhile."""
    made = IovaAllocator(RANGES)
    first = made.place(PAGE_SIZE, 1, 0, False, 39)  # noqa: FBT003
    made.release(first)
    again = count_lines(lambda: made.place(PAGE_SIZE, 1, 0, False, 39))  # noqa: FBT003
    assert again < 12
    made.release(first)
    assert made.reserve_at(first, 2 * PAGE_SIZE) == first
    with pytest.raises(KeyError):
        made.release(first + PAGE_SIZE)
    made._check()


def test_the_lowest_place_is_found_though_the_last_one_was_released_last() -> None:
    """The spare place is the answer only while nothing else has changed."""
    made = IovaAllocator(RANGES)
    lower, upper = made.reserve(PAGE_SIZE), made.reserve(PAGE_SIZE)
    made.release(lower)
    made.release(upper)
    assert made.reserve(PAGE_SIZE) == lower


def test_neighbours_are_released_as_one_run() -> None:
    """And all of them are free then."""
    made = IovaAllocator(RANGES)
    before = made.free_ranges
    taken = [made.reserve(PAGE_SIZE) for _ in range(40)]
    made.release_neighbours(taken)
    assert made.free_ranges == before
    with pytest.raises(KeyError):
        made.release_neighbours(taken)


@pytest.mark.parametrize("top_down", [False, True])
def test_a_search_among_many_holes_looks_at_few_of_them(*, top_down: bool) -> None:
    """Lines of Python, among 50 holes and among 20,000; each hole is too small."""

    def search(holes: int) -> int:
        whole = (IovaRange(Iova(0), Iova((1 << 39) - 1)),)
        made = IovaAllocator(whole)
        for number in range(holes):
            below, above = IOVA_MIN + 2 * number * PAGE_SIZE, (1 << 39) - (2 * number + 2) * PAGE_SIZE
            made.reserve_at(above if top_down else below, PAGE_SIZE)
        return max(count_lines(lambda: made.place(2 * PAGE_SIZE, 1, 0, top_down, 39)) for _ in range(2))

    assert search(20_000) < search(50) + 300


def test_an_overlap_among_many_reservations_is_explained_at_the_cost_of_few() -> None:
    """Neighbours without a gap: the way up from the last free run would be long."""

    def refuse(count: int) -> int:
        made = IovaAllocator((IovaRange(Iova(0), Iova((1 << 39) - 1)),))
        for number in range(count):
            made.reserve_at(IOVA_MIN + number * PAGE_SIZE, PAGE_SIZE)

        def overlap() -> None:
            with pytest.raises(IovaOverlapError):
                made.reserve_at(IOVA_MIN + (count - 5) * PAGE_SIZE, PAGE_SIZE)

        return count_lines(overlap)

    assert refuse(10_000) < refuse(10) + 200
