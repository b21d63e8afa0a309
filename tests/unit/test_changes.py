"""A block's window against a plain model, whatever call fails; and how much a change looks at."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast, overload

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pyvfio
from pyvfio.errors import IoctlError, RollbackError
from pyvfio.extents import Extent, Part, runs, without
from pyvfio.guard import Guard
from pyvfio.iommu.space import AddressSpace, Mapping
from pyvfio.mapper.policy import Policy, steps
from pyvfio.mapper.promises import Promises
from pyvfio.mapper.window import READ, WRITE, Holders, Window
from pyvfio.testing.fake import FakeDevice, FakeKernel
from pyvfio.units import PAGE_SIZE, Iova, Vaddr
from tests.unit.counting import called, python_calls
from tests.unit.fakes import BDF, MapperFactory, Rig, SpecialKernel, nothing_left, small_iommu

SIZE = 24
BASE, VADDR = Iova(1000), Vaddr(5000)
GRANULES: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)
EXTEND: MapperFactory = partial(pyvfio.DmaMapper, resize="extend")


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with a device, and no limit of locked memory."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made, nothing_left(made):
        made.privileged = True
        yield made


# --------------------------------------------------------------------------------------------- a window and its model


class PlainSpace:
    """Mappings in a dict; the calls that are in `failing`, counted from the last change, raise."""

    def __init__(self) -> None:
        self.guard = Guard("this space")
        self.there: dict[int, Mapping] = {}
        self.failing: set[int] = set()
        self.made = 0

    def _call(self) -> None:
        self.made += 1
        if self.made in self.failing:
            raise IoctlError(errno.EIO, "as planned", request="MAP", arguments={})

    def mappings_in(self, *, iova: int, size: int) -> list[Mapping]:
        """As the protocol says."""
        found = (self.there[start] for start in sorted(self.there))
        return [each for each in found if each.iova < iova + size and iova < each.iova + each.size]

    def map_locked(self, vaddr: int, iova: int, size: int, access: int) -> None:
        """As the protocol says; an overlap is an error of the caller."""
        self._call()
        assert access == READ | WRITE
        assert size > 0
        assert not self.mappings_in(iova=iova, size=size), "mapped twice"
        self.there[iova] = Mapping(Iova(iova), size, Vaddr(vaddr))

    def unmap_locked(self, iova: int, size: int) -> None:
        """As the protocol says; so is a mapping that is cut, or a gap."""
        self._call()
        found = self.mappings_in(iova=iova, size=size)
        assert runs((each.iova, each.iova + each.size) for each in found) == [(iova, iova + size)], "cut, or a gap"
        for each in found:
            del self.there[each.iova]


def extents(pages: set[int]) -> list[Extent]:
    """The longest parts that these bytes make up."""
    return runs(Extent(page, page + 1) for page in sorted(pages))


class Step:
    """One change of a window: what it does, to which units of the block, and the calls that fail."""

    def __init__(self, kind: str, units: frozenset[int], failing: frozenset[int]) -> None:
        self.kind, self.units, self.failing = kind, units, failing

    def __repr__(self) -> str:
        return f"Step({self.kind!r}, {set(self.units)}, {set(self.failing)})"


POLICIES = {
    "remap": Policy(),
    "extend": Policy("extend"),
    "granule": Policy("extend", 2),
    "granule without gap": Policy("extend", 2, allow_gap=False),
}
steps_of_a_life = st.lists(
    st.builds(
        Step,
        st.sampled_from(["map", "unmap", "change", "join"]),
        st.frozensets(st.integers(0, SIZE // 2 - 1)),
        st.frozensets(st.integers(1, 5), max_size=2),
    ),
    max_size=12,
)


@pytest.mark.long
@given(st.sampled_from(sorted(POLICIES)), steps_of_a_life)
@example(
    "extend",
    [
        Step("map", frozenset({1}), frozenset()),
        Step("map", frozenset({0, 1, 2}), frozenset({2, 3})),
        Step("unmap", frozenset(), frozenset()),
    ],
)
@example(  # parts in one piece, and another piece in the second part
    "extend",
    [
        Step("map", frozenset({0, 1, 2}), frozenset()),
        Step("map", frozenset({3}), frozenset()),
        Step("unmap", frozenset({0, 2, 3}), frozenset()),
    ],
)
def test_a_window_reaches_what_it_was_told_or_what_it_reached_before(name: str, life: list[Step]) -> None:
    """A change that fails leaves every piece as it was, unless its undo fails; what is promised is always right."""
    policy, space, reached = POLICIES[name], PlainSpace(), set[int]()
    promises = Promises(cast(AddressSpace, space), made=True)
    window = Window(
        cast(AddressSpace, space),
        policy,
        idstr="ring",
        vaddr=VADDR,
        iova=BASE,
        size=SIZE,
        make_room=lambda _error: False,
    )
    window.enter(promises)
    for step in life:
        space.failing, space.made = set(step.failing), 0
        bytes_of = {2 * unit + low for unit in step.units for low in (0, 1)}
        before = window.pieces()
        wanted, change = _told(window, step.kind, reached, bytes_of)
        try:
            change()
        except RollbackError:
            reached = {byte for start, end in window.pieces() for byte in range(start, end)}
            assert not window.settled
        except IoctlError:
            assert window.pieces() == before
            assert not window.settled
        else:
            reached = wanted
            assert window.settled
            if step.kind == "join" and policy.granule is None:
                assert window.pieces() == extents(wanted)
        assert runs(window.pieces()) == extents(reached)
        assert window.reached == len(reached)
        assert promises.total == window.promised == policy.entries(SIZE) - policy.entries(len(reached))
        if window.settled:
            window._check()
    window.leave()
    assert promises.total == 0


def _told(window: Window, kind: str, reached: set[int], of: set[int]) -> tuple[set[int], Callable[[], None]]:
    """What is to be reached, and the call for it."""
    if kind == "map" and window.policy.resize == "extend":
        return reached | of, partial(window.map, extents(of - reached))
    if kind == "unmap" and window.policy.allow_gap:
        return reached - of, partial(window.unmap, extents(of & reached))
    return of, partial(window.change, extents(of), join=kind == "join" and window.policy.granule is None)


class Held:
    """A mapping of a part. The number is its place in a small set."""

    def __init__(self, number: int, start: int, size: int) -> None:
        self.vaddr, self.size, self.number = Vaddr(start), size, number

    def __hash__(self) -> int:
        return self.number


@pytest.mark.long
@example([(7, 2), (12, 1), (9, 3)], set(), 9, 3)  # the neighbours on both sides come first
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8))),
    st.sets(st.integers(0, 40)),
    st.integers(0, 30),
    st.integers(1, 8),
)
def test_whoever_holds_a_byte_is_found(parts: list[tuple[int, int]], closed: set[int], start: int, size: int) -> None:
    """And nobody else; one that was closed, once or twice, holds nothing."""
    holders, all_of_them = Holders(), [Held(number, *part) for number, part in enumerate(parts)]
    for each in all_of_them:
        holders.add(each)
    for number in (*closed, *closed):
        if number < len(all_of_them):
            holders.discard(all_of_them[number])
        holders._check()
    guilty = [
        each
        for number, each in enumerate(all_of_them)
        if number not in closed and each.vaddr < start + size and start < each.vaddr + each.size
    ]
    found = holders.find(start, start + size)
    assert found in guilty if guilty else found is None


# ------------------------------------------------------------------------------------------------- what it looks at


def changes(rig: Rig, block: pyvfio.RamBlock, pages: int) -> list[int]:
    """What it takes to discard a page, to populate it, to replace it, and to grow and shrink, of a block with holes."""
    size = pages * PAGE_SIZE
    takes = [
        python_calls(partial(block.discard, size // 2 + PAGE_SIZE, PAGE_SIZE)),
        python_calls(partial(block.populate, size // 2 + PAGE_SIZE, PAGE_SIZE)),
        python_calls(partial(block.remap, size // 2 + PAGE_SIZE, PAGE_SIZE)),
        python_calls(partial(block.resize, size + PAGE_SIZE)),
        python_calls(partial(block.resize, size)),
        python_calls(partial(_refused, rig, partial(block.resize, size - PAGE_SIZE))),
    ]
    rig.check()
    return takes


def _refused(rig: Rig, change: Callable[[], None]) -> None:
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(OSError, match="EIO"):
        change()


def holed(rig: Rig, pages: int) -> pyvfio.RamBlock:
    """A block every fourth page of which is discarded."""
    block = rig.add(f"of {pages}", used=pages * PAGE_SIZE, maximum=(pages + 4) * PAGE_SIZE)
    for page in range(0, pages, 4):
        block.discard(page * PAGE_SIZE, PAGE_SIZE)
    return block


def test_a_change_looks_at_the_pieces_that_it_concerns_and_at_no_other(kernel: SpecialKernel) -> None:
    """Among 600 pieces and 200 holes it takes what it takes among 24 and eight."""
    with Rig(kernel, mapper=GRANULES) as rig:
        few, many = (changes(rig, holed(rig, pages), pages) for pages in (32, 800))
        assert all(one <= other + 8 for one, other in zip(many, few, strict=True)), (few, many)


@pytest.mark.long
def test_a_block_that_comes_looks_at_no_piece_of_others(kernel: SpecialKernel) -> None:
    """How many mappings are promised to them is known."""
    with Rig(kernel, mapper=GRANULES) as rig:
        grown = rig.add("grown", used=1000 * PAGE_SIZE, maximum=4000 * PAGE_SIZE)  # more than a bucket
        rig.add("first", used=2 * PAGE_SIZE, maximum=4 * PAGE_SIZE)
        few = python_calls(partial(rig.add, "one", used=2 * PAGE_SIZE, maximum=4 * PAGE_SIZE))
        grown.resize(4000 * PAGE_SIZE)
        many = python_calls(partial(rig.add, "other", used=2 * PAGE_SIZE, maximum=4 * PAGE_SIZE))
        assert many <= few + 8
        rig.check()


def test_a_part_that_nobody_holds_goes_without_a_look_at_each_holder(kernel: SpecialKernel) -> None:
    """Whatever else is held of the block."""
    with Rig(kernel, mapper=GRANULES) as rig:
        block = rig.add(used=400 * PAGE_SIZE, maximum=400 * PAGE_SIZE)
        takes, held = [], list[pyvfio.DmaMapping]()
        for count in (2, 300):
            while len(held) < count:
                held.append(rig.mapper.map_dma(vaddr=block.vaddr + len(held) * PAGE_SIZE, size=PAGE_SIZE))
            takes.append(python_calls(partial(block.discard, 350 * PAGE_SIZE, PAGE_SIZE)))
            block.populate(350 * PAGE_SIZE, PAGE_SIZE)
        assert takes[1] <= takes[0] + 4
        with pytest.raises(BufferError):
            block.discard(299 * PAGE_SIZE, 2 * PAGE_SIZE)
        for mapping in held:
            mapping.close()
        block.discard(0, 350 * PAGE_SIZE)
        rig.check()


def test_a_refused_shrink_looks_at_each_piece_a_few_times(kernel: SpecialKernel) -> None:
    """Not at all for each."""

    def takes(pages: int) -> int:
        block = rig.add(f"of {pages}", used=pages * PAGE_SIZE, maximum=pages * PAGE_SIZE)
        return python_calls(partial(_refused, rig, partial(block.resize, PAGE_SIZE)))

    with Rig(kernel, mapper=GRANULES) as rig:
        few, many = takes(100), takes(1000)
        assert many < 12 * few
        rig.check()


def test_a_grow_looks_up_nothing(kernel: SpecialKernel) -> None:
    """It maps what comes; a shrink looks once at what goes."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        for pages in (4, 6, 8):
            assert "IovaSpace.mappings_in" not in called(partial(block.resize, pages * PAGE_SIZE))
        assert called(partial(block.resize, 4 * PAGE_SIZE)).count("IovaSpace.mappings_in") == 1
        rig.check()


# -------------------------------------------------------------------------------------------- after what went wrong


@pytest.mark.parametrize("mapper", [EXTEND, GRANULES], ids=["extend", "granules"])
@pytest.mark.parametrize("before", [False, True], ids=["alone", "after a grow"])
def test_half_of_a_change_is_noticed_by_the_next(kernel: SpecialKernel, mapper: MapperFactory, before: bool) -> None:  # noqa: FBT001
    """Whichever it is: the block is looked at as a whole."""

    def part(first: int, end: int) -> list[Extent]:
        return [Extent(first * PAGE_SIZE, end * PAGE_SIZE)]

    with Rig(kernel, mapper=mapper) as rig:
        block = rig.add(used=8 * PAGE_SIZE)
        block.discard(6 * PAGE_SIZE, PAGE_SIZE)
        halves: list[Callable[[], None]] = [
            partial(rig.mapper.ram_block_discarded, block, part(1, 2)),
            partial(rig.mapper.ram_block_populated, block, part(6, 7)),
            partial(rig.mapper.ram_block_remapping, block, part(2, 3)),
        ]
        for half in halves:
            if before:
                block.resize(block.used_length + PAGE_SIZE)
            if half is halves[1]:
                kernel.privileged = True
            half()
            block.resize(block.used_length + PAGE_SIZE)
            rig.check()
            assert rig.mapper.windows()[0][1].settled


@pytest.mark.parametrize("mapper", [EXTEND, GRANULES], ids=["extend", "granules"])
def test_who_has_the_pages_again_and_is_asked_once_more_does_nothing(
    kernel: SpecialKernel, mapper: MapperFactory
) -> None:
    """As the undo of a replacement does, where another listener has failed to take them."""
    with Rig(kernel, mapper=mapper) as rig:
        block, parts = rig.add(used=8 * PAGE_SIZE), [Extent(2 * PAGE_SIZE, 3 * PAGE_SIZE)]
        rig.mapper.ram_block_remapping(block, parts)
        rig.mapper.ram_block_remapped(block, parts)
        kernel.clear_trace()
        rig.mapper.ram_block_remapped(block, parts)
        assert not kernel.trace
        rig.check()


def test_a_change_that_is_taken_back_is_told_in_parts_as_well(kernel: SpecialKernel) -> None:
    """Another listener refuses: the mapper undoes its own step, and knows where it stands."""

    class Refuses:
        def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
            del block, old_length, new_length
            raise ArithmeticError

    with Rig(kernel, mapper=GRANULES) as rig:
        block = holed(rig, 32)
        refuses = Refuses()
        rig.blocks.add_notifier(refuses)
        for length in (34, 30, 28):
            with pytest.raises(ArithmeticError):
                block.resize(length * PAGE_SIZE)
            rig.check()
        rig.blocks.remove_notifier(refuses)
        block.resize(30 * PAGE_SIZE)
        rig.check()


@pytest.mark.parametrize("refused", [False, True])
def test_pieces_are_joined_for_others_however_they_came_apart(refused: bool) -> None:  # noqa: FBT001
    """By a plain grow, or by one after a change that was refused, for which the whole block is looked at."""
    with (
        FakeKernel(iommu=small_iommu(entries=2), groups=[(2, [FakeDevice(BDF)])]) as kernel,
        Rig(kernel, mapper=EXTEND) as rig,
    ):
        block, empty = rig.add(used=PAGE_SIZE), rig.add("empty", used=0)
        if refused:
            kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO)
            with pytest.raises(OSError, match="EIO"):
                block.resize(2 * PAGE_SIZE)
        block.resize(3 * PAGE_SIZE)
        assert len(rig.reached()) == 2
        empty.resize(PAGE_SIZE)
        assert rig.reached() == rig.expected()
        rig.check()


def test_what_is_promised_is_right_after_a_change_and_its_undo_have_failed(kernel: SpecialKernel) -> None:
    """And when the block has gone."""
    with Rig(kernel, mapper=GRANULES) as rig:
        block = rig.add(used=6 * PAGE_SIZE, maximum=10 * PAGE_SIZE)
        promises = rig.mapper._promises
        assert promises.total == 4
        block.discard(0, 2 * PAGE_SIZE)
        assert promises.total == 6
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=errno.EIO)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(RollbackError):
            block.populate(0, 2 * PAGE_SIZE)
        assert promises.total == 5
        assert [window.promised for _block, window in rig.mapper.windows()] == [5]
        block.populate(0, 2 * PAGE_SIZE)
        assert promises.total == 4
        rig.check()
        block.remove()
        assert promises.total == 0


def test_the_steps_look_at_wanted_parts_once() -> None:
    """However many pieces there are, and whichever are wanted."""

    class Counting(Sequence[Part]):
        def __init__(self, parts: list[Extent]) -> None:
            self.parts, self.looks = parts, 0

        def __len__(self) -> int:
            return len(self.parts)

        @overload
        def __getitem__(self, index: int) -> Part: ...
        @overload
        def __getitem__(self, index: slice) -> Sequence[Part]: ...
        def __getitem__(self, index: int | slice) -> Part | Sequence[Part]:
            found = self.parts[index]
            self.looks += len(found) if isinstance(index, slice) else 1
            return found

    pieces = [Extent(at, at + 2) for at in range(0, 2000, 2)]
    wanted = Counting(without(pieces, *((at, at + 2) for at in range(0, 2000, 8))))
    made = steps(pieces, wanted, Policy("extend", 2))
    assert [step for step in made if step[0] == "map"] == []
    assert len(made) == 250
    assert wanted.looks < 6 * len(pieces)
