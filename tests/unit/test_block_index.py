"""The blocks of a list: found by name and by address, among many as among few, and while another thread changes it.

What a change costs is counted in calls, of Python's functions and of C's: a loop over all blocks or holes makes some.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import SupportsIndex, cast, overload

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvfio
from pyvfio.blocks.index import BlockIndex
from pyvfio.ramblock import RamBlock
from pyvfio.units import PAGE_SIZE


@dataclass(frozen=True)
class Start:
    """An address that counts how often it is asked for."""

    idstr: str
    at: int
    looks: list[int]

    @property
    def start(self) -> int:
        self.looks.append(self.at)
        return self.at


@dataclass(frozen=True)
class Block:
    """What an index looks at of a block."""

    state: Start


def block(start: int, looks: list[int] | None = None) -> RamBlock:
    """A block at that address."""
    return cast(RamBlock, Block(Start(f"at {start}", start, [] if looks is None else looks)))


@given(st.lists(st.integers(0, 30)), st.integers(-2, 32))
def test_an_index_is_a_dict_of_starts(starts: list[int], vaddr: int) -> None:
    """Each start that comes once more goes."""
    index, model = BlockIndex(), dict[int, RamBlock]()
    for start in starts:
        if start in model:
            index.remove(model.pop(start))
        else:
            model[start] = block(start)
            index.add(model[start])
        index._check()
    assert list(index) == [model[start] for start in sorted(model)]
    assert len(index) == len(model)
    assert index.below(vaddr) is model.get(max((start for start in model if start <= vaddr), default=-1))
    for start in range(30):
        assert index.named(f"at {start}") is model.get(start)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_to_add_find_and_remove_a_block_looks_at_a_logarithm_of_the_others(at: float) -> None:
    looks: list[int] = []
    number = 1 << 12
    index = BlockIndex()
    for start in range(number):
        index.add(block(2 * start, looks))
    between = block(2 * int(at * number) + 1, looks)
    changes: list[Callable[[], object]] = [
        lambda: index.add(between),
        lambda: index.below(2 * int(at * number) + 1),
        lambda: index.named("at 10"),
        lambda: index.remove(between),
    ]
    for change in changes:
        looks.clear()
        change()
        assert len(looks) <= 12 + 4


class Meanwhile(list[RamBlock]):
    """A list of which another thread removes an item before the first slice is taken."""

    def __init__(self, found: list[RamBlock], removed: int) -> None:
        super().__init__(found)
        self.removed: int | None = removed

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> RamBlock: ...
    @overload
    def __getitem__(self, index: slice, /) -> list[RamBlock]: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> RamBlock | list[RamBlock]:
        if isinstance(index, slice):
            removed, self.removed = self.removed, None
            if removed is not None:
                del self[removed]
        return super().__getitem__(index)


@pytest.mark.parametrize("removed", range(4))
@pytest.mark.parametrize("vaddr", range(0, 50, 5))
def test_a_look_up_finds_what_stays_while_another_thread_removes_a_block(removed: int, vaddr: int) -> None:
    found = [block(start) for start in (10, 20, 30, 40)]
    index = BlockIndex()
    index._ascending = Meanwhile(found, removed)
    below = [other for other in found if other.state.start <= vaddr and other is not found[removed]]
    assert index.below(vaddr) is (below[-1] if below else None)


def test_a_loop_over_the_blocks_may_remove_and_add_some() -> None:
    with pyvfio.RamBlockList() as blocks:
        for number in range(6):
            blocks.add(f"b{number}", used_length=0, max_length=PAGE_SIZE)
        seen = list(blocks)
        for number, each in enumerate(blocks):
            assert each is seen[number]
            each.remove()
            if number % 2:
                blocks.add(f"new {number}", used_length=0, max_length=PAGE_SIZE)
        assert [each.idstr for each in sorted(blocks, key=lambda each: each.idstr)] == ["new 1", "new 3", "new 5"]
        assert not any(each in blocks for each in seen)
        blocks._check()


def test_an_id_string_is_free_again_when_its_block_was_refused_or_removed() -> None:
    class Refusing:
        refused = False

        def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
            del block, used_length, max_length
            if not self.refused:
                self.refused = True
                raise RuntimeError

        def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None: ...

    def names(blocks: pyvfio.RamBlockList) -> Iterator[str]:
        return (each.idstr for each in blocks)

    with pyvfio.RamBlockList() as blocks:
        blocks.add_notifier(Refusing())
        with pytest.raises(RuntimeError):
            blocks.add("b", used_length=0, max_length=PAGE_SIZE)
        assert "b" not in blocks
        first = blocks.add("b", used_length=0, max_length=PAGE_SIZE)
        assert (blocks["b"], list(names(blocks))) == (first, ["b"])
        with pytest.raises(ValueError, match="already"):
            blocks.add("b", used_length=0, max_length=PAGE_SIZE)
        first.remove()
        assert ("b" in blocks, first in blocks) == (False, False)
        assert blocks.add("b", used_length=0, max_length=PAGE_SIZE) in blocks


# ---------------------------------------------------------------------------------------------- among many as among few


def calls(change: Callable[[], object]) -> int:
    """How many functions a change calls, those of C included."""
    found = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        change()
    finally:
        sys.setprofile(before)
    return found


def test_a_block_comes_changes_and_goes_by_as_many_calls_among_many_as_among_few() -> None:
    counts = []
    with pyvfio.RamBlockList() as blocks:
        for number in (8, 200):
            while len(blocks) < number:
                blocks.add(f"b{len(blocks)}", used_length=0, max_length=PAGE_SIZE)

            def life() -> None:
                one = blocks.add("one", used_length=0, max_length=PAGE_SIZE)
                one.resize(PAGE_SIZE)
                assert "one" in blocks
                assert blocks["one"] is one
                assert blocks.block_at(one.vaddr) is one
                one.remove()

            life()
            counts.append(calls(life))
    assert counts[1] <= counts[0] + 4


def calls_among_holes(holes: int, change: str) -> int:
    """How many functions a change of one page in the middle of so many holes calls."""
    used, page = 2 * holes, holes + 1
    with pyvfio.RamBlockList() as blocks:
        one = blocks.add("one", used_length=used * PAGE_SIZE, max_length=(used + 1) * PAGE_SIZE)
        for hole in range(0, used, 2):
            one.discard(hole * PAGE_SIZE, PAGE_SIZE)
        changes: dict[str, Callable[[], object]] = {
            "discard": lambda: one.discard(page * PAGE_SIZE, PAGE_SIZE),
            "populate": lambda: one.populate((page - 1) * PAGE_SIZE, PAGE_SIZE),
            "populated_in": lambda: one.state.populated_in(page * PAGE_SIZE, (page + 1) * PAGE_SIZE),
            "grow": lambda: one.resize((used + 1) * PAGE_SIZE),
            "shrink": lambda: one.resize((used - 1) * PAGE_SIZE),
        }
        found = calls(changes[change])
        one._check()
    return found


@pytest.mark.parametrize("change", ["discard", "populate", "populated_in", "grow", "shrink"])
def test_a_part_changes_by_as_many_calls_among_many_holes_as_among_few(change: str) -> None:
    assert calls_among_holes(200, change) <= calls_among_holes(4, change) + 4


@pytest.mark.long
@given(st.lists(st.tuples(st.sampled_from(["discard", "populate", "resize"]), st.integers(0, 12), st.integers(0, 12))))
def test_the_parts_of_a_block_are_those_of_a_set_of_pages(steps: list[tuple[str, int, int]]) -> None:
    populated, discarded = set(range(8)), set[int]()
    with pyvfio.RamBlockList() as blocks:
        one = blocks.add("one", used_length=8 * PAGE_SIZE, max_length=12 * PAGE_SIZE)
        for step, first, count in steps:
            used = len(populated) + len(discarded)
            part = set(range(min(first, used), min(first + count, used)))
            match step:
                case "discard":
                    one.discard(min(first, used) * PAGE_SIZE, len(part) * PAGE_SIZE)
                    populated, discarded = populated - part, discarded | part
                case "populate":
                    one.populate(min(first, used) * PAGE_SIZE, len(part) * PAGE_SIZE)
                    populated, discarded = populated | part, discarded - part
                case _:
                    one.resize(first * PAGE_SIZE)
                    populated = {page for page in populated if page < first} | set(range(used, first))
                    discarded = {page for page in discarded if page < first}
            assert pages_of(one.populated) == populated
            assert pages_of(one.discarded) == discarded
            start, end = first * PAGE_SIZE, (first + count) * PAGE_SIZE
            assert pages_of(one.state.populated_in(start, end)) == populated & set(range(first, first + count))
            one._check()


def pages_of(parts: Sequence[tuple[int, int]]) -> set[int]:
    """The pages that they have."""
    return {page for start, end in parts for page in range(start // PAGE_SIZE, end // PAGE_SIZE)}


def test_a_block_takes_little_memory() -> None:
    """Half a kilobyte of the process's own, beside what the block holds, and a margin for other versions of Python."""
    number = 200
    names = [f"b{index}" for index in range(number)]
    with pyvfio.RamBlockList() as blocks:
        blocks.add("first", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
        gc.collect()
        tracemalloc.start()
        try:
            before, _peak = tracemalloc.get_traced_memory()
            for name in names:
                blocks.add(name, used_length=PAGE_SIZE, max_length=PAGE_SIZE)
            gc.collect()
            after, _peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert after - before < 600 * number
