"""Many addresses and many parts in one call: the answers are those of the single call, with numpy and without."""

from __future__ import annotations

import errno
import mmap
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pyvfio
from pyvfio.mapper.runs import Runs
from pyvfio.mapper.segments import Limits, cut, cut_all
from pyvfio.mapper.vectors import RunVectors, cut_vectors
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import Rig, SpecialKernel, nothing_left
from tests.unit.processes import in_child

Forms = Callable[[Sequence[int]], object]
HIGH = 5 << 30
_GRANULES = partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)
FORMS: dict[str, Forms] = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "array": lambda numbers: array("Q", numbers),
    "signed array": lambda numbers: array("q", numbers),
    "numpy": lambda numbers: np.array(numbers, dtype=np.uint64),
    "signed numpy": lambda numbers: np.array(numbers, dtype=np.int64),
    "other byte order": lambda numbers: np.array(numbers, dtype=">u8"),
    "every second": lambda numbers: np.repeat(np.array(numbers, dtype=np.uint64), 2)[::2],
    "numpy's numbers": lambda numbers: [np.uint64(number) for number in numbers],
}


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with two devices, in two groups."""
    with SpecialKernel() as made:
        yield made


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """A mapper that follows a list, in the container of a device; nothing is left of it in the end."""
    with nothing_left(kernel), Rig(kernel) as made:
        yield made
        made.check()


@pytest.fixture(params=["with numpy", "without numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A program that has imported numpy, and one that has not."""
    if request.param == "without numpy":
        monkeypatch.delitem(sys.modules, "numpy")
    name: str = request.param
    return name


def single(mapper: pyvfio.DmaMapper, vaddrs: Sequence[int], size: int) -> list[int | None]:
    """The answers of the single call; None for LookupError."""
    answers: list[int | None] = []
    for vaddr in vaddrs:
        try:
            answers.append(mapper.translate_vaddr(vaddr, size))
        except LookupError:
            answers.append(None)
    return answers


# ------------------------------------------------------------------------------------------------------------ addresses


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_addresses_is_translated(rig: Rig, form: str) -> None:
    """A numpy array gives one of uint64, anything else an array."""
    block = rig.add(used=4 * PAGE_SIZE)
    vaddrs = [block.vaddr + offset for offset in (0, 5, 4 * PAGE_SIZE - 8, PAGE_SIZE)]
    found = rig.mapper.translate_vaddrs(FORMS[form](vaddrs), 8)  # type: ignore[call-overload]
    assert list(found) == [rig.mapper.iova(block) + vaddr - block.vaddr for vaddr in vaddrs]
    if isinstance(FORMS[form](vaddrs), np.ndarray):
        assert (type(found), found.dtype) == (np.ndarray, np.uint64)
    else:
        assert (type(found), found.typecode) == (array, "Q")


def test_without_numpy_the_answer_is_the_same(rig: Rig, way: str) -> None:
    """And the caller's array can be resized afterwards."""
    block = rig.add(used=4 * PAGE_SIZE)
    vaddrs = array("Q", range(block.vaddr, block.vaddr + 4 * PAGE_SIZE, 64))
    wanted = array("Q", [rig.mapper.translate_vaddr(vaddr, 64) for vaddr in vaddrs])
    assert rig.mapper.translate_vaddrs(vaddrs, 64) == wanted, way
    with pytest.raises(LookupError):
        rig.mapper.translate_vaddrs(vaddrs, 65)
    vaddrs.append(0)
    assert rig.mapper.translate_vaddrs([]) == array("Q")


def test_an_array_of_any_shape_keeps_it(rig: Rig) -> None:
    """Two dimensions, none, and no element."""
    block = rig.add(used=4 * PAGE_SIZE)
    square = np.array([[0, 1], [2, 3]], dtype=np.int64) * PAGE_SIZE + block.vaddr
    apart = rig.mapper.iova(block) - block.vaddr
    assert (rig.mapper.translate_vaddrs(square) == (square + apart).astype(np.uint64)).all()
    assert rig.mapper.translate_vaddrs(np.array(block.vaddr)).shape == ()
    assert rig.mapper.translate_vaddrs(np.empty((0, 3), dtype=np.uint32)).shape == (0, 3)


@pytest.mark.parametrize("bad", [[-1], [1 << 64, -1], [0, 5, 0], [(1 << 64) - 1]], ids=repr)
def test_addresses_that_are_not_mapped_are_counted_and_the_first_is_named(rig: Rig, way: str, bad: list[int]) -> None:
    """All or nothing. Also addresses that no array can hold."""
    block = rig.add(used=PAGE_SIZE)
    vaddrs = [block.vaddr, block.vaddr + 8, block.vaddr + 16, *bad]
    message = f"^{len(bad)} of {len(vaddrs)} addresses .* vaddr {bad[0]:#x}, number 3 counted from 0"
    for given_as in (list, iter):
        with pytest.raises(LookupError, match=message):
            rig.mapper.translate_vaddrs(given_as(vaddrs))
    if way == "with numpy" and 0 <= bad[0] < 1 << 64:
        with pytest.raises(LookupError, match=message):
            rig.mapper.translate_vaddrs(np.array(vaddrs, dtype=np.uint64))
    if bad == [-1]:
        for signed in (array("q", vaddrs), np.array(vaddrs) if way == "with numpy" else array("q", vaddrs)):
            with pytest.raises(LookupError, match=message):
                rig.mapper.translate_vaddrs(signed)


WRONG: list[object] = [
    5,
    None,
    "ab",
    [1.0],
    [True],
    array("d", [1.0]),
    [[1]],
    np.array([1.0]),
    np.array([True]),
    np.array(["1"]),
    np.array([1], dtype=object),
]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_sequence_of_whole_numbers_is_a_type_error(rig: Rig, wrong: object) -> None:
    """Before anything is looked up."""
    block = rig.add()
    with pytest.raises(TypeError):
        rig.mapper.translate_vaddrs(wrong)  # type: ignore[call-overload]
    if not isinstance(wrong, int):
        with pytest.raises(TypeError):
            rig.mapper.segment_arrays(block, wrong)  # type: ignore[call-overload]


def test_a_size_that_no_range_can_have_is_a_value_error(rig: Rig, way: str) -> None:
    """Also where no address is given. One that is larger than any memory is not mapped."""
    block = rig.add()
    for size in (0, -1):
        with pytest.raises(ValueError, match="at least 1 byte"):
            rig.mapper.translate_vaddrs([], size)
    for size in (3 * PAGE_SIZE, 1 << 64, 1 << 70):
        with pytest.raises(LookupError, match=rf"1 of 1 .* with {size:#x} bytes"):
            rig.mapper.translate_vaddrs([block.vaddr], size)
    assert way


def test_two_mappings_that_are_neighbours_are_two_pieces_of_a_block_are_one(rig: Rig, way: str) -> None:
    """As for the single call."""
    memory = rig.memory(4 * PAGE_SIZE)
    with ExitStack() as stack:
        one = stack.enter_context(rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE, iova=MIB))
        two = stack.enter_context(rig.mapper.map_dma(vaddr=memory + PAGE_SIZE, size=PAGE_SIZE, iova=MIB + PAGE_SIZE))
        assert list(rig.mapper.translate_vaddrs([memory, memory + PAGE_SIZE], PAGE_SIZE)) == [one.iova, two.iova]
        with pytest.raises(LookupError, match=r"1 of 2 .* number 1 "):
            rig.mapper.translate_vaddrs([memory, memory + 1], PAGE_SIZE)
    rig.free(memory, 4 * PAGE_SIZE)
    with (
        pyvfio.RamBlockList(kernel=rig.kernel) as blocks,
        pyvfio.DmaMapper(rig.container, blocks, resize="extend") as mapper,
    ):
        block = blocks.add("grown", used_length=PAGE_SIZE, max_length=MIB)
        block.resize(3 * PAGE_SIZE)
        assert list(mapper.translate_vaddrs([block.vaddr + 5], 2 * PAGE_SIZE)) == [mapper.iova(block) + 5]
    assert way


def test_a_mapper_that_has_nothing_any_more_translates_nothing(rig: Rig, way: str) -> None:
    """Closed, or its space was."""
    block = rig.add()
    assert len(rig.mapper.translate_vaddrs([block.vaddr])) == 1
    vaddr = block.vaddr
    rig.mapper.close()
    for call in (lambda: rig.mapper.translate_vaddrs([vaddr]), lambda: rig.mapper.segment_arrays(block, [0], 1)):
        with pytest.raises(pyvfio.ClosedError):
            call()
    assert way


def test_a_callback_in_the_middle_of_a_change_sees_what_is_mapped_then(kernel: SpecialKernel) -> None:
    """The runs that were made for it are not kept for the time after the change."""
    seen: list[object] = []

    def look(progress: pyvfio.Progress) -> None:
        with pytest.raises(LookupError):  # nothing is found of a block that has not come yet
            made.mapper.translate_vaddrs([0])
        seen.append(progress)

    def factory(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        return pyvfio.DmaMapper(container, blocks, progress=look)

    with nothing_left(kernel), Rig(kernel, mapper=factory) as made:
        block = made.add()
        assert seen
        assert list(made.mapper.translate_vaddrs([block.vaddr])) == [made.mapper.iova(block)]


def test_a_few_addresses_after_a_change_are_found_one_by_one_and_many_through_runs(rig: Rig) -> None:
    """Runs of all that is mapped are made for as many addresses as make it worth while."""
    memory = rig.memory(64 * PAGE_SIZE)
    held = [rig.mapper.map_dma(vaddr=memory + n * PAGE_SIZE, size=PAGE_SIZE) for n in range(64)]
    wanted = [mapping.iova for mapping in held]
    mapper = rig.mapper
    for times, count, made in ((1, 31, False), (1, 1, True), (1, 1, True)):
        for _ in range(times):
            assert list(mapper.translate_vaddrs(range(memory, memory + count * PAGE_SIZE, PAGE_SIZE))) == wanted[:count]
        assert (mapper._runs_at == mapper._changes()) == made
    held.pop().close()
    with pytest.raises(LookupError, match=r"1 of 64 .* number 63 "):
        mapper.translate_vaddrs(range(memory, memory + 64 * PAGE_SIZE, PAGE_SIZE))
    with pytest.raises(LookupError, match=r"1 of 2 .* number 1 "):
        mapper.translate_vaddrs([memory, memory + 63 * PAGE_SIZE])
    for mapping in held:
        mapping.close()
    rig.free(memory, 64 * PAGE_SIZE)


def test_memory_that_was_closed_is_not_found_again(rig: Rig, way: str) -> None:
    """Whether the look-up before was the same, and whether another user of the space has unmapped it meanwhile."""
    memory = rig.memory(2 * PAGE_SIZE)
    for unmaps in (False, True):
        mapping = rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
        for _ in range(2):
            assert rig.mapper.translate_vaddr(memory + 8) == mapping.iova + 8
            if unmaps and rig.container.mappings:
                rig.container.unmap(iova=mapping.iova, size=PAGE_SIZE)
        assert list(rig.mapper.translate_vaddrs([memory + 8])) == [mapping.iova + 8]
        mapping.close()
        for call in (rig.mapper.translate_vaddr, lambda vaddr: rig.mapper.translate_vaddrs([vaddr])):
            with pytest.raises(LookupError):
                call(memory + 8)
    rig.free(memory, 2 * PAGE_SIZE)
    assert way


def test_of_a_block_only_what_is_mapped_now_is_found(kernel: SpecialKernel, way: str) -> None:
    """After a shrink, a grow, and behind the mapper's back."""

    def factory(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        return pyvfio.DmaMapper(container, blocks, resize="extend", granule=PAGE_SIZE)

    with nothing_left(kernel), Rig(kernel, mapper=factory) as made:
        block, mapper = made.add(used=4 * PAGE_SIZE), made.mapper
        iova = mapper.iova(block)

        def found(page: int) -> bool:
            vaddr, wanted = block.vaddr + page * PAGE_SIZE, iova + page * PAGE_SIZE
            answers = single(mapper, [vaddr], PAGE_SIZE)
            compare(mapper, [vaddr], answers, PAGE_SIZE)
            assert answers in ([wanted], [None])
            return answers == [wanted]

        assert [found(page) for page in (3, 0, 4)] == [True, True, False]
        block.resize(3 * PAGE_SIZE)
        assert [found(page) for page in (3, 0, 2)] == [False, True, True]
        made.container.unmap(iova=iova + PAGE_SIZE, size=PAGE_SIZE)
        assert [found(page) for page in (0, 1, 2)] == [True, False, True]
        made.container.map(vaddr=block.vaddr + PAGE_SIZE, iova=iova + PAGE_SIZE, size=PAGE_SIZE)
        assert found(1)
    assert way


PAGES = 24
change = st.one_of(
    st.tuples(st.just("map"), st.integers(0, PAGES - 1), st.integers(1, 4)),
    st.tuples(st.just("close"), st.integers(0, PAGES - 1), st.just(0)),
    st.tuples(st.just("add"), st.integers(0, 8), st.sampled_from([8, 16])),
    st.tuples(st.just("resize"), st.integers(0, 5), st.integers(0, 8)),
    st.tuples(st.just("discard"), st.integers(0, 5), st.integers(0, 7)),
    st.tuples(st.just("remove"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("another unmaps"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("fail"), st.integers(0, 5), st.integers(0, 8)),
)


def apply(rig: Rig, memory: int, held: list[pyvfio.DmaMapping], step: tuple[str, int, int]) -> None:
    """Make one change, or nothing where it cannot be made."""
    action, one, other = step
    blocks, there = list(rig.blocks), rig.container.mappings
    with suppress(ValueError, BufferError, pyvfio.VfioError):
        if action == "map":
            held.append(rig.mapper.map_dma(vaddr=memory + one * PAGE_SIZE, size=other * PAGE_SIZE))
        elif action == "close" and held:
            held.pop(one % len(held)).close()
        elif action == "another unmaps" and there:
            rig.container.unmap(iova=there[one % len(there)].iova, size=there[one % len(there)].size)
        elif action == "add" and len(blocks) < 5:
            rig.add(f"{len(held)} {len(rig.kernel.trace)}", used=one * PAGE_SIZE, maximum=other * PAGE_SIZE)
        elif blocks:
            apply_to_block(rig, blocks[one % len(blocks)], action, other * PAGE_SIZE)
    rig.kernel.clear_failures()


def apply_to_block(rig: Rig, block: pyvfio.RamBlock, action: str, length: int) -> None:
    """Make one change of a block. One that fails cannot be undone."""
    if action == "fail":
        for nth in (1, 2):
            rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=nth, errno=errno.EFAULT)
    if action in {"resize", "fail"}:
        block.resize(length)
    elif action == "discard":
        block.discard(length, PAGE_SIZE)
    elif action == "remove":
        block.remove()


def questions(rig: Rig, memory: int) -> list[int]:
    """Addresses in, at the ends of and around everything that is or was mapped."""
    starts = [memory + page * PAGE_SIZE for page in range(-1, PAGES + 5)]
    starts += [block.vaddr + page * PAGE_SIZE for block in rig.blocks for page in range(-1, 17)]
    return sorted(start + delta for start in starts for delta in (0, 1, PAGE_SIZE - 1))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pyvfio.errors.MemoryNotReturnedWarning")  # some changes fail
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    resize=st.sampled_from(["remap", "extend", "granule"]),
    lives=st.lists(st.lists(change, min_size=3, max_size=10), min_size=1, max_size=4),
    size=st.sampled_from([1, 8, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE]),
    order=st.randoms(use_true_random=False),
)
def test_many_at_once_are_as_many_one_by_one(
    resize: str, lives: list[list[tuple[str, int, int]]], size: int, order: Random
) -> None:
    """After any changes of blocks and buffers, some of which fail, and behind the mapper's back: found or not found."""

    def factory(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        if resize == "granule":
            return pyvfio.DmaMapper(container, blocks, resize="extend", granule=PAGE_SIZE)
        return pyvfio.DmaMapper(container, blocks, resize="extend" if resize == "extend" else "remap")

    with FakeKernel("6.12") as kernel, Rig(kernel, mapper=factory) as rig:
        memory, held = rig.memory((PAGES + 4) * PAGE_SIZE), list[pyvfio.DmaMapping]()
        for life in lives:
            for step in life:
                apply(rig, memory, held, step)
            vaddrs = questions(rig, memory)
            if size == 8:
                order.shuffle(vaddrs)
            answers = single(rig.mapper, vaddrs, size)
            compare(rig.mapper, vaddrs, answers, size)
        for mapping in held:
            mapping.close()
        rig.mapper.close()
        rig.free(memory, (PAGES + 4) * PAGE_SIZE)


def compare(mapper: pyvfio.DmaMapper, vaddrs: list[int], answers: list[int | None], size: int) -> None:
    """In bulk: all addresses, those that are mapped, with runs in pure Python and with vectors, and one by one."""
    known = [(vaddr, iova) for vaddr, iova in zip(vaddrs, answers, strict=True) if iova is not None]
    wanted, asked = [iova for _vaddr, iova in known], [vaddr for vaddr, _iova in known]
    for part in (slice(0, 1), slice(None)):  # the first of them may be found without runs
        assert list(mapper.translate_vaddrs(np.array(asked, dtype=np.uint64)[part], size)) == wanted[part]
        assert list(mapper._translate(array("Q", asked[part]), size)) == wanted[part]
        assert list(mapper._translate_each(asked[part], size)) == wanted[part]
    missing = [number for number, iova in enumerate(answers) if iova is None]
    if missing:
        message = f"^{len(missing)} of {len(vaddrs)} .* vaddr {vaddrs[missing[0]]:#x}, number {missing[0]} "
        calls: list[Callable[[], object]] = [
            lambda: mapper.translate_vaddrs(vaddrs, size),
            lambda: mapper._translate(vaddrs, size),
            lambda: mapper._translate_each(vaddrs, size),
        ]
        for call in calls:
            with pytest.raises(LookupError, match=message):
                call()


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Pieces that do not overlap: dense, in clusters, or far apart."""
    at, pieces = draw(st.sampled_from([0, 1, 1 << 20, 1 << 47])), []
    for number in range(draw(st.integers(0, 40))):
        at += draw(st.sampled_from([0, 1, 3, 64, 1 << 12, 1 << 30]))
        size = draw(st.sampled_from([1, 2, 3, 64, 1 << 12]))
        pieces.append((at, size, draw(st.integers(0, (1 << 64) - size)), number))
        at += size
    return pieces


@pytest.mark.long
@settings(max_examples=200)
@given(pieces=layouts(), size=st.integers(1, 70), data=st.data())
def test_runs_and_vectors_find_the_run_that_a_walk_finds(
    pieces: list[tuple[int, int, int, int]], size: int, data: st.DataObject
) -> None:
    """However they lie: with a table of buckets, or without."""
    edges = [0, 1, (1 << 64) - 1, *(edge for at, length, _iova, _owner in pieces for edge in (at, at + length))]
    near = st.sampled_from(edges).flatmap(lambda edge: st.integers(max(edge - 2, 0), min(edge + 2, (1 << 64) - 1)))
    vaddrs = data.draw(st.lists(near, max_size=30))
    answers = [
        next((iova + vaddr - at for at, length, iova, _ in pieces if at <= vaddr <= at + length - size), None)
        for vaddr in vaddrs
    ]
    runs = Runs.of(pieces)
    vectors = RunVectors(runs)
    known = array("Q", [vaddr for vaddr, iova in zip(vaddrs, answers, strict=True) if iova is not None])
    wanted = [iova for iova in answers if iova is not None]
    assert list(runs.translate(known, size)) == wanted
    assert list(vectors.translate(np.array(known, dtype=np.uint64), size)) == wanted
    if None in answers:
        message = f"^{answers.count(None)} of {len(vaddrs)} .* number {answers.index(None)} "
        with pytest.raises(LookupError, match=message):
            runs.translate(vaddrs, size)
        with pytest.raises(LookupError, match=message):
            vectors.translate(np.array(vaddrs, dtype=np.uint64), size)


SOME = {
    "none": [],
    "at 0": [(0, 3, 500, 0)],
    "behind 0": [(1, 3, 500, 0)],
    "apart": [(3, 4, 500, 0), (8, 2, 700, 1), (10, 1, 600, 2), (13, 5, 900, 3)],
    "neighbours of one owner": [(5, 2, 700, 7), (3, 2, 698, 7), (7, 1, 702, 8)],
}


@pytest.mark.parametrize("layout", SOME)
def test_an_address_is_found_or_not_whatever_was_looked_up_before(layout: str) -> None:
    """The run of the address before is tried first, and the next run; also where no address was before."""
    pieces = SOME[layout]
    owners = {at: {piece[3] for piece in pieces if piece[0] <= at < piece[0] + piece[1]} for at in range(-1, 30)}
    iovas = {at: iova + at - start for start, length, iova, _ in pieces for at in range(start, start + length)}
    runs = Runs.of(pieces)
    vectors = RunVectors(runs)
    for size in range(1, 6):
        of = {at: set[int].intersection(*(owners[at + byte] for byte in range(size))) for at in range(-1, 24)}
        for pair in product(of, repeat=2):
            bad = [at for at in pair if not of[at]]
            if not bad:
                assert list(runs.translate(pair, size)) == [iovas[at] for at in pair]
                continue
            message = f"^{len(bad)} of 2 .* vaddr {bad[0]:#x}, number {pair.index(bad[0])} "
            with pytest.raises(LookupError, match=message):
                runs.translate(pair, size)
        for at in range(24):
            with nullcontext() if of[at] else pytest.raises(LookupError, match=r"^1 of 1 "):
                assert list(vectors.translate(np.array([at], dtype=np.uint64), size)) == [iovas[at]]


# ------------------------------------------------------------------------------------------------------------- segments


@pytest.mark.long
@given(
    parts=st.lists(st.tuples(st.integers(0, 1 << 13), st.integers(1, 1 << 12)), max_size=5),
    top=st.booleans(),
    max_segment=st.none() | st.integers(1, 1 << 11) | st.just(1 << 70),
    boundary=st.none() | st.sampled_from([1 << bit for bit in (0, 2, 5, 11, 12, 13, 64, 70)]),
)
def test_arrays_have_the_segments_of_the_single_cut(
    *, parts: list[tuple[int, int]], top: bool, max_segment: int | None, boundary: int | None
) -> None:
    """Of any ranges within any limits, also of those that end at 2^64."""
    limits = Limits.checked(max_segment, boundary)
    apart = (1 << 64) - max((at + size for at, size in parts), default=0) if top else 0
    wanted = [cut(apart + at, size, limits) for at, size in parts]
    found = cut_all(([(apart + at, size)] for at, size in parts), limits)
    assert list(zip(found.iovas, found.sizes, strict=True)) == [segment for each in wanted for segment in each]
    assert list(found.counts) == [len(each) for each in wanted]
    for size in {size for _at, size in parts}:
        offsets = [at for at, length in parts if length == size]
        same = cut_vectors((apart, 1 << 14), np.array(offsets, dtype=np.uint64), size, limits)
        alone = cut_all(([(apart + at, size)] for at in offsets), limits)
        assert [list(each) for each in same] == [list(each) for each in alone]


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_block_have_the_segments_of_each(rig: Rig, form: str) -> None:
    """Whatever form the offsets have, and whichever of two limits is less."""
    block = rig.add(used=16 * PAGE_SIZE)
    offsets = [0x1080, 0, 7 * PAGE_SIZE]
    both = [{"max_segment": most, "boundary": 0x1000} for most in (1000, 0xFFF, 0x1000, 0x1001, 5000, 1 << 64)]
    one: list[dict[str, int]] = [{"boundary": PAGE_SIZE}, {"max_segment": 5000}, {}]
    for size, limits in product((0x2100, None, 8), one + both):
        found = rig.mapper.segment_arrays(block, FORMS[form](offsets), size, **limits)  # type: ignore[call-overload]
        each = [rig.mapper.segments(block, offset, size, **limits) for offset in offsets]
        assert list(zip(found.iovas, found.sizes, strict=True)) == [segment for one in each for segment in one]
        assert list(found.counts) == [len(one) for one in each]
        kinds = {type(numbers) for numbers in found}
        assert kinds == ({np.ndarray} if isinstance(FORMS[form](offsets), np.ndarray) else {array})


def test_a_prp_list_is_the_array_of_one_part(rig: Rig, way: str) -> None:
    """As a driver copies it into its memory."""
    block = rig.add(used=16 * PAGE_SIZE)
    iova = rig.mapper.iova(block)
    found = rig.mapper.segment_arrays(block, 0x1200, 0x2000, boundary=PAGE_SIZE)
    assert list(found.iovas) == [iova + 0x1200, iova + 0x2000, iova + 0x3000]
    page = memoryview(bytearray(PAGE_SIZE)).cast("Q")
    page[: len(found.iovas)] = memoryview(found.iovas)
    assert page.tolist()[:4] == [*found.iovas, 0]
    assert way


def test_parts_around_a_hole_and_in_several_mappings_are_looked_up_one_by_one(rig: Rig, way: str) -> None:
    """The error is the first part's that has one."""
    block = rig.add(used=8 * PAGE_SIZE)
    block.discard(2 * PAGE_SIZE, PAGE_SIZE)
    iova, parts = rig.mapper.iova(block), rig.mapper.segment_arrays
    assert list(parts(block, [0, 4 * PAGE_SIZE], PAGE_SIZE).iovas) == [iova, iova + 4 * PAGE_SIZE]
    with pytest.raises(ValueError, match=r"0x2000-0x2fff .* are discarded"):
        parts(block, [4 * PAGE_SIZE, PAGE_SIZE], 2 * PAGE_SIZE)
    for wrong in ([0, -1], [0, 8 * PAGE_SIZE], [7 * PAGE_SIZE + 1]):
        with pytest.raises(ValueError, match=r"offset|outside"):
            parts(block, wrong, PAGE_SIZE)
    with pytest.raises(ValueError, match="behind the last"):
        parts(block, [3 * PAGE_SIZE, 8 * PAGE_SIZE])
    for size in (0, -PAGE_SIZE):
        with pytest.raises(ValueError, match="size at least 1"):
            parts(block, [0, 4 * PAGE_SIZE], size)
    with mmap.mmap(-1, 2 * PAGE_SIZE) as memory, memoryview(memory) as view:
        one, two = view[:PAGE_SIZE], view[PAGE_SIZE:]
        with rig.mapper.map_buffer(one, iova=5 << 30), rig.mapper.map_buffer(two, iova=4 << 30):
            found = parts(memory, [PAGE_SIZE - 8, 0], 16)
            assert [list(each) for each in found] == [[(5 << 30) + PAGE_SIZE - 8, 4 << 30, 5 << 30], [8, 8, 16], [2, 1]]
            if way == "with numpy":
                same = parts(memory, np.array([PAGE_SIZE - 8, 0]), 16)
                assert [list(each) for each in same] == [list(each) for each in found]
        one.release()
        two.release()


def test_a_mapping_and_no_part_at_all(rig: Rig, way: str) -> None:
    """A DmaMapping is memory, too, until another user of the space unmaps it."""
    with mmap.mmap(-1, 2 * PAGE_SIZE) as memory:
        with rig.mapper.map_temporary(memory) as mapping:
            found = rig.mapper.segment_arrays(mapping, [PAGE_SIZE, 0], PAGE_SIZE)
            assert list(found.iovas) == [mapping.iova + PAGE_SIZE, mapping.iova]
            assert [list(each) for each in rig.mapper.segment_arrays(mapping, [])] == [[], [], []]
            if way == "with numpy":
                none = rig.mapper.segment_arrays(mapping, np.empty(0, dtype=np.int64), 5, boundary=8, max_segment=3)
                assert [list(each) for each in none] == [[], [], []]
            rig.container.unmap(iova=mapping.iova, size=2 * PAGE_SIZE)
            with pytest.raises(LookupError, match="another user of the space"):
                rig.mapper.segment_arrays(mapping, [0], PAGE_SIZE)
        rig.mapper.reset_temporary()


# ---------------------------------------------------------------------------------------------------------------- numpy


@pytest.mark.long
def test_a_program_that_does_not_use_numpy_does_not_get_it() -> None:
    """Nothing here imports it: not pyvfio, not a look-up of many addresses."""
    program = """if True:
        import sys
        sys.modules["numpy"] = None  # as where it is not installed
        import pyvfio
        from pyvfio.testing import FakeKernel
        with FakeKernel("6.1") as kernel:
            device = pyvfio.open_device(kernel.bdfs[0], kernel=kernel)
            with device, pyvfio.RamBlockList(kernel=kernel) as blocks:
                with pyvfio.DmaMapper(device.container, blocks) as mapper:
                    ring = blocks.add("ring", used_length=4096, max_length=4096)
                    print(list(mapper.translate_vaddrs([ring.vaddr + 5]))[0] - mapper.iova(ring))
                    print(*mapper.segment_arrays(ring, [0, 64], 64).sizes)
        assert "pyvfio.mapper.vectors" not in sys.modules
    """
    root = str(Path(pyvfio.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root, timeout=60
    )
    assert done.stdout.split() == ["5", "64", "64"]


def test_an_answer_that_was_kept_is_not_given_when_the_memory_is_mapped_no_more(kernel: SpecialKernel) -> None:
    """A block of several pieces loses some of them in one call, and a buffer is closed."""
    with Rig(kernel, mapper=_GRANULES) as rig, mmap.mmap(-1, PAGE_SIZE) as memory:
        block = rig.add(used=8 * PAGE_SIZE, maximum=8 * PAGE_SIZE)
        assert rig.mapper.translate_vaddr(block.vaddr + 7 * PAGE_SIZE) == rig.mapper.iova(block) + 7 * PAGE_SIZE
        block.resize(3 * PAGE_SIZE)
        with pytest.raises(LookupError):
            rig.mapper.translate_vaddr(block.vaddr + 7 * PAGE_SIZE)
        mapping = rig.mapper.map_buffer(memory)
        assert rig.mapper.translate_vaddr(mapping.vaddr) == mapping.iova
        mapping.close()
        with pytest.raises(LookupError):
            rig.mapper.translate_vaddr(mapping.vaddr)


def test_an_answer_that_was_kept_is_given_for_bytes_of_the_same_memory_alone(rig: Rig) -> None:
    """Not for a byte before, nor for one behind, whether a block or memory of the caller was asked for before."""
    memory = rig.memory(6 * PAGE_SIZE)
    block, mapping = rig.add(), rig.mapper.map_dma(vaddr=memory + 2 * PAGE_SIZE, size=2 * PAGE_SIZE, iova=HIGH)
    places = ((block.vaddr, rig.mapper.iova(block)), (mapping.vaddr, HIGH))
    asked: dict[tuple[int, int], int | None] = {}
    for start, iova in places:
        for offset, size in product((-1, 0, 1, PAGE_SIZE, 2 * PAGE_SIZE - 1, 2 * PAGE_SIZE), (1, 2, PAGE_SIZE)):
            inside = 0 <= offset <= 2 * PAGE_SIZE - size
            asked[start + offset, size] = iova + offset if inside else None
    for before, then in product(asked, repeat=2):
        for vaddr, size in (before, then):
            assert single(rig.mapper, [vaddr], size) == [asked[vaddr, size]]
    mapping.close()
    rig.free(memory, 6 * PAGE_SIZE)


def test_a_child_gets_no_answer_that_its_parent_has_kept(kernel: SpecialKernel) -> None:
    """Though it takes no lock and makes no call."""
    with Rig(kernel) as rig:
        block = rig.add(used=PAGE_SIZE, maximum=PAGE_SIZE)
        rig.mapper.translate_vaddr(block.vaddr)

        def ask() -> None:
            with pytest.raises(pyvfio.ForkedError):
                rig.mapper.translate_vaddr(block.vaddr)

        assert in_child(ask) == 0
