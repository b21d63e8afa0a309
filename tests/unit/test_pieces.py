"""In which pieces a block is mapped, which calls a resize makes of them, and what its survivors never notice."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvfio
from pyvfio.extents import Extent, clip, runs, without
from pyvfio.kernel import Memlock
from pyvfio.mapper.policy import Policy, steps
from pyvfio.testing.fake import Call, FakeDevice, FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, MapperFactory, Rig, SpecialKernel, nothing_left, small_iommu

EXTEND: MapperFactory = partial(pyvfio.DmaMapper, resize="extend")
GRANULE: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=2 * PAGE_SIZE)
NO_GAP: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", allow_gap=False)


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with a device."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made, nothing_left(made):
        yield made


def calls(trace: list[Call]) -> list[tuple[str, int, int]]:
    """What was mapped and unmapped: the call, the IOVA and the size."""
    found = []
    for call in trace:
        if call.request in ("VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"):
            name = "map" if call.request == "VFIO_IOMMU_MAP_DMA" else "unmap"
            found.append((name, int(call.arguments["iova"]), int(call.arguments["size"])))
    return found


def resized(rig: Rig, block: pyvfio.RamBlock, pages: int) -> list[tuple[str, int, int]]:
    """The calls of a resize, in pages from the block's IOVA on."""
    rig.kernel.clear_trace()
    block.resize(pages * PAGE_SIZE)
    iova = rig.mapper.iova(block)
    rig.check()
    return [(name, (start - iova) // PAGE_SIZE, size // PAGE_SIZE) for name, start, size in calls(rig.kernel.trace)]


# ------------------------------------------------------------------------------------------------------ extend


def test_a_grow_maps_the_difference_and_nothing_else(kernel: SpecialKernel) -> None:
    """What is mapped stays mapped."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        assert resized(rig, block, 5) == [("map", 2, 3)]
        assert resized(rig, block, 6) == [("map", 5, 1)]


def test_a_shrink_to_where_a_piece_begins_unmaps_whole_pieces_in_one_call(kernel: SpecialKernel) -> None:
    """However many there are."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        for pages in (5, 6, 9):
            resized(rig, block, pages)
        assert resized(rig, block, 5) == [("unmap", 5, 4)]
        assert resized(rig, block, 0) == [("unmap", 0, 5)]


def test_a_shrink_into_a_piece_maps_its_head_again_at_once_and_touches_no_other(kernel: SpecialKernel) -> None:
    """Before the rest of what goes is unmapped: the head is out of reach no longer than it must."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        for pages in (6, 9):
            resized(rig, block, pages)
        assert resized(rig, block, 3) == [("unmap", 2, 4), ("map", 2, 1), ("unmap", 6, 3)]


def test_the_iova_stays_and_neighbouring_pieces_are_one_range_to_who_looks_up(kernel: SpecialKernel) -> None:
    """Both ways."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=PAGE_SIZE)
        iova = rig.mapper.iova(block)
        block.resize(3 * PAGE_SIZE)
        assert len(rig.reached()) == 2
        assert rig.mapper.iova(block) == iova
        assert rig.mapper.translate_vaddr(block.vaddr, 3 * PAGE_SIZE) == iova
        assert rig.mapper.translate_iova(iova, 3 * PAGE_SIZE) == block.vaddr
        for found in (rig.mapper.translate_vaddr, rig.mapper.translate_iova):
            with pytest.raises(LookupError):
                found({rig.mapper.translate_vaddr: block.vaddr, rig.mapper.translate_iova: iova}[found], 3 * MIB)


def test_what_was_looked_up_once_is_known_from_the_first_byte_of_the_run_to_the_last(kernel: SpecialKernel) -> None:
    """The mapper keeps these bounds, and answers for any memory between them without another search."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=PAGE_SIZE)
        block.resize(3 * PAGE_SIZE)
        ((_, window),) = rig.mapper.windows()
        assert window.reaches(block.vaddr, 3 * PAGE_SIZE)
        for place in (0, 3 * PAGE_SIZE - 1):
            assert window.seen_from(block.vaddr + place) == (block.vaddr, block.vaddr + 3 * PAGE_SIZE)
        behind = block.vaddr + 3 * PAGE_SIZE
        assert window.seen_from(behind) == (behind, behind), "no byte was seen"


def test_memory_of_a_block_in_pieces_is_not_mapped_a_second_time(kernel: SpecialKernel) -> None:
    """It has its IOVA."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=PAGE_SIZE)
        block.resize(2 * PAGE_SIZE)
        with rig.mapper.map_dma(vaddr=block.vaddr, size=2 * PAGE_SIZE) as mapping:
            assert mapping.iova == rig.mapper.iova(block)


@pytest.mark.parametrize("policy", [pyvfio.DmaMapper, EXTEND], ids=["remap", "extend"])
def test_a_mapping_of_anothers_in_the_iova_of_a_block_stays(kernel: SpecialKernel, policy: MapperFactory) -> None:
    """The mapper unmaps pieces of the block and nothing else."""
    with Rig(kernel, mapper=policy) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        vaddr, iova = rig.memory(), rig.mapper.iova(block) + 8 * PAGE_SIZE
        rig.container.map(vaddr=vaddr, iova=iova, size=PAGE_SIZE)
        for pages in (6, 2, 0, 3):
            block.resize(pages * PAGE_SIZE)
            assert (iova, vaddr, PAGE_SIZE) in rig.reached()
        rig.container.unmap(iova=iova, size=PAGE_SIZE)
        rig.free(vaddr)
        assert rig.reached() == rig.expected()


# ----------------------------------------------------------------------------------------------------- granules


def test_with_a_granule_every_piece_is_one_and_no_survivor_is_ever_unmapped(kernel: SpecialKernel) -> None:
    """Whatever the lengths."""
    with Rig(kernel, mapper=GRANULE) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        for old, new in pairwise((4, 10, 6, 8, 0, 2, 2, 16, 14)):
            made = resized(rig, block, new)
            assert all(start >= min(old, new) for _name, start, _size in made), made
            assert [size for name, _start, size in made if name == "map"] == [2] * (max(new - old, 0) // 2)
            assert [size for name, _start, size in made if name == "unmap"] == [old - new] * (new < old)


def test_a_length_that_granules_do_not_make_up_is_refused_and_the_block_stays(kernel: SpecialKernel) -> None:
    """When it is added and when it is resized."""
    with Rig(kernel, mapper=GRANULE) as rig:
        with pytest.raises(ValueError, match="granule 0x2000, not 0x1000"):
            rig.add(used=PAGE_SIZE)
        block = rig.add(used=2 * PAGE_SIZE)
        with pytest.raises(ValueError, match="granule 0x2000, not 0x3000"):
            block.resize(3 * PAGE_SIZE)
        assert block.used_length == 2 * PAGE_SIZE
        rig.check()


def test_a_block_that_could_need_more_mappings_than_there_are_is_refused_when_it_is_added() -> None:
    """With the numbers, those that others may still need among them, and the granule that would fit."""
    model = small_iommu(entries=10)
    with FakeKernel(iommu=model, groups=[(2, [FakeDevice(BDF)])]) as kernel, Rig(kernel, mapper=GRANULE) as rig:
        first = rig.add("first", used=2 * PAGE_SIZE, maximum=8 * PAGE_SIZE)
        with pytest.raises(pyvfio.EntryLimitError, match=r"may need 8 mappings of 8 KiB, and 6 are left") as caught:
            rig.add("second", used=0, maximum=16 * PAGE_SIZE)
        assert (caught.value.used, caught.value.limit) == (8, 6)
        assert "granule that would fit is 16 KiB" in str(caught.value)
        second = rig.add("second", used=0, maximum=12 * PAGE_SIZE)
        with pytest.raises(pyvfio.EntryLimitError, match="dma_entry_limit"):
            rig.add("third", used=0, maximum=2 * PAGE_SIZE)
        for block in (first, second):  # what was promised is there
            block.resize(block.max_length)
        rig.check()


# --------------------------------------------------------------------------------------------- gaps and limits


def test_a_resize_that_would_need_a_gap_is_refused_before_any_call_where_none_is_allowed(
    kernel: SpecialKernel,
) -> None:
    """To where a piece begins it is made."""
    with Rig(kernel, mapper=NO_GAP) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        block.resize(6 * PAGE_SIZE)
        kernel.clear_trace()
        with pytest.raises(pyvfio.GapError, match=r"4 KiB that stay .* 0x4000-0x5fff") as caught:
            block.resize(5 * PAGE_SIZE)
        assert "granule" in str(caught.value)
        assert calls(kernel.trace) == []
        assert block.used_length == 6 * PAGE_SIZE
        assert resized(rig, block, 4) == [("unmap", 4, 2)]


def test_when_mappings_run_out_the_pieces_of_a_block_are_joined() -> None:
    """So that a block can always grow, as long as a gap is allowed."""
    model = small_iommu(entries=3)
    with FakeKernel(iommu=model, groups=[(2, [FakeDevice(BDF)])]) as kernel, Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=PAGE_SIZE)
        for pages in (2, 3):
            assert resized(rig, block, pages) == [("map", pages - 1, 1)]
        assert resized(rig, block, 4) == [("map", 3, 1), ("unmap", 0, 3), ("map", 0, 4)]
        assert len(rig.reached()) == 1


@pytest.mark.parametrize("new", [False, True])
def test_a_block_without_pieces_makes_another_join_its_own(new: bool) -> None:  # noqa: FBT001
    """The one that has most of them; and so does a block that is just added."""
    model = small_iommu(entries=5)
    with FakeKernel(iommu=model, groups=[(2, [FakeDevice(BDF)])]) as kernel, Rig(kernel, mapper=EXTEND) as rig:
        few, most = rig.add("few", used=PAGE_SIZE), rig.add("most", used=PAGE_SIZE)
        last = None if new else rig.add("last", used=0)
        for block, pages in ((few, 2), (most, 2), (most, 3)):
            block.resize(pages * PAGE_SIZE)
        if last is None:
            last = rig.add("last", used=PAGE_SIZE)
        else:
            last.resize(PAGE_SIZE)
        rig.check()
        pieces = {block.idstr: len(window.pieces()) for block, window in rig.mapper.windows()}
        assert pieces == {"few": 2, "most": 1, "last": 1}


def test_where_no_gap_is_allowed_pieces_are_not_joined() -> None:
    """The caller hears that there are too many."""
    model = small_iommu(entries=2)
    with FakeKernel(iommu=model, groups=[(2, [FakeDevice(BDF)])]) as kernel, Rig(kernel, mapper=NO_GAP) as rig:
        block = rig.add(used=PAGE_SIZE)
        block.resize(2 * PAGE_SIZE)
        before = rig.reached()
        with pytest.raises(pyvfio.EntryLimitError):
            block.resize(3 * PAGE_SIZE)
        assert (block.used_length, rig.reached()) == (2 * PAGE_SIZE, before)


def test_a_join_that_is_refused_leaves_every_piece_as_it_was() -> None:
    """And the block."""
    model = small_iommu(entries=2)
    with FakeKernel(iommu=model, groups=[(2, [FakeDevice(BDF)])]) as kernel, Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=PAGE_SIZE)
        block.resize(2 * PAGE_SIZE)
        before = rig.reached()
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=errno.ENOMEM)
        with pytest.raises(pyvfio.PinLimitError):
            block.resize(3 * PAGE_SIZE)
        assert (block.used_length, rig.reached()) == (2 * PAGE_SIZE, before)
        rig.check()


def test_after_an_undo_that_failed_the_next_resize_maps_what_was_lost(kernel: SpecialKernel) -> None:
    """Also below where that resize begins: the whole block is looked at."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        for nth in (1, 2):
            kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=nth, errno=errno.EFAULT)
        with pytest.raises(pyvfio.RollbackError, match="16 KiB may not be mapped any more"):
            block.resize(2 * PAGE_SIZE)
        assert rig.reached() == []
        block.resize(6 * PAGE_SIZE)
        assert rig.reached() == rig.expected()
        rig.check()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resize": "other"}, "'remap', 'extend' or 'cut'"),
        ({"granule": PAGE_SIZE}, "extend"),
        ({"allow_gap": False}, "extend"),
        ({"resize": "extend", "granule": 3 * PAGE_SIZE}, "power of two"),
        ({"resize": "extend", "granule": 0}, "power of two"),
        ({"resize": "extend", "granule": PAGE_SIZE // 2}, "IOMMU's page, 0x1000"),
    ],
)
def test_options_that_do_not_go_together_are_a_value_error(
    kernel: SpecialKernel, options: dict[str, object], words: str
) -> None:
    """Before anything is mapped."""
    make: MapperFactory = partial(pyvfio.DmaMapper, **options)  # type: ignore[arg-type]
    with Rig(kernel) as rig, pyvfio.RamBlockList(kernel=kernel) as blocks:
        blocks.add("ring", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
        with pytest.raises(ValueError, match=words):
            make(rig.container, blocks)


# ------------------------------------------------------------------------------------------- any pieces at all

lengths = st.lists(st.integers(0, 12), min_size=2, max_size=6)
extents = st.lists(st.integers(0, 24), unique=True, max_size=10).map(
    lambda marks: [Extent(a, b) for a, b in zip(sorted(marks)[::2], sorted(marks)[1::2], strict=False)]
)
POLICIES = [Policy(), Policy("extend"), Policy("extend", allow_gap=False), Policy("extend", granule=1), Policy("cut")]


@pytest.mark.long
@given(mapped=extents, wanted=extents, policy=st.sampled_from(POLICIES))
def test_the_steps_reach_what_is_wanted_and_unmap_whole_pieces_only(
    mapped: list[Extent], wanted: list[Extent], policy: Policy
) -> None:
    """On a model that refuses what the kernel refuses. Who needs a gap where none is allowed has GapError."""
    if policy.granule:
        mapped = [Extent(*piece) for one in mapped for _call, piece in policy.maps(*one)]
    needs_gap = policy.resize == "extend" and any(
        0 < sum(part.size for part in clip(wanted, *piece)) < piece.size for piece in mapped
    )
    if not policy.allow_gap and needs_gap:
        with pytest.raises(pyvfio.GapError):
            steps(mapped, wanted, policy)
        return
    pieces = list(mapped)
    for call, pair in steps(mapped, wanted, policy):
        extent = Extent(*pair)
        inside = [piece for piece in pieces if piece.start < extent.end and extent.start < piece.end]
        if call == "map":
            assert not inside, "EEXIST"
            pieces.append(extent)
            continue
        if call == "cut":
            assert policy.resize == "cut"
            assert len(inside) == 1, "a cut is within one piece"
            pieces = [*without(pieces, extent)]
            assert not clip(wanted, *extent), "a survivor was unmapped"
            continue
        assert runs(sorted(inside)) == [extent], "the kernel unmaps whole mappings only"
        pieces = [piece for piece in pieces if piece not in inside]
        if policy.granule or not policy.allow_gap or policy.resize == "cut":
            assert not clip(wanted, *extent), "a survivor was unmapped"
    assert runs(sorted(pieces)) == runs(wanted)


@given(one=extents, start=st.integers(0, 24), size=st.integers(1, 8))
def test_a_part_and_what_is_without_it_make_up_the_whole(one: list[Extent], start: int, size: int) -> None:
    """Nothing twice."""
    hole = Extent(start, start + size)
    parts = sorted(clip(one, *hole) + without(one, hole))
    assert runs(parts) == runs(one)
    assert sum(part.size for part in parts) == sum(extent.size for extent in one)


@pytest.mark.long
def test_a_refused_shrink_of_many_pieces_costs_as_one_that_succeeds(kernel: SpecialKernel) -> None:
    """The undo looks at each piece once, not at each for each."""

    def cpu(work: Callable[[], None]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def refused() -> None:
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(OSError, match="EIO"):
            block.resize(2 * PAGE_SIZE)

    with Rig(kernel, mapper=GRANULE) as rig:
        block = rig.add(used=8000 * PAGE_SIZE, maximum=8000 * PAGE_SIZE)
        costs = [cpu(refused) for _ in range(3)]
        assert min(costs) < 8 * cpu(lambda: block.resize(2 * PAGE_SIZE))


# ------------------------------------------------------------------------------------------- the limit of locked memory


def test_the_pin_limit_is_reported_for_the_whole_resize_and_not_for_a_granule(kernel: SpecialKernel) -> None:
    """What was locked before it, what it asked for in all, and how much is missing."""
    with Rig(kernel, mapper=GRANULE) as rig:
        block = rig.add(used=MIB // 2, maximum=16 * MIB)
        before = rig.reached()
        kernel.memlock_limit = MIB
        with pytest.raises(pyvfio.PinLimitError) as caught:
            block.resize(8 * MIB)
        error = caught.value
        assert (error.limit, error.used, error.mapped, error.asked) == (MIB, MIB // 2, MIB // 2, 15 * MIB // 2)
        assert "7680 KiB were asked for, so 7 MiB are missing" in error.message
        assert error.arguments["iova"] == rig.mapper.iova(block) + MIB // 2
        assert error.hint.startswith("ulimit -l 8192 (KiB)")
        assert error.errno == errno.ENOMEM
        assert rig.reached() == before


def test_the_pin_limit_is_reported_for_a_whole_new_block(kernel: SpecialKernel) -> None:
    """Of which nothing is locked afterwards."""
    with Rig(kernel, mapper=GRANULE) as rig:
        kernel.memlock_limit = MIB
        with pytest.raises(pyvfio.PinLimitError, match="2 MiB were asked for, so 1 MiB are missing"):
            rig.add(used=2 * MIB, maximum=4 * MIB)
        assert kernel.memlock().used == 0


def test_the_pin_limit_of_a_remap_counts_what_was_unmapped_and_what_is_mapped_again(kernel: SpecialKernel) -> None:
    """A block with a hole is two pieces, of which the first fits."""
    with Rig(kernel) as rig:
        block = rig.add(used=16 * PAGE_SIZE)
        block.discard(4 * PAGE_SIZE, 4 * PAGE_SIZE)
        kernel.memlock_limit = 14 * PAGE_SIZE
        with pytest.raises(pyvfio.PinLimitError) as caught:
            block.resize(24 * PAGE_SIZE)
        assert (caught.value.used, caught.value.asked) == (0, 20 * PAGE_SIZE)
        assert kernel.memlock().used == 12 * PAGE_SIZE


def test_the_pin_limit_counts_what_a_change_has_still_to_unmap_as_gone(kernel: SpecialKernel) -> None:
    """A change that maps the heads of two pieces, and unmaps a third piece after that."""
    with Rig(kernel, mapper=EXTEND) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        for pages in (8, 12):
            block.resize(pages * PAGE_SIZE)
        window = dict(rig.mapper.windows())[block]
        for limit, used, asked in ((5, 0, 6), (9, 8, 3)):  # where the whole would fit, the piece is what did not
            kernel.memlock_limit = limit * PAGE_SIZE
            with pytest.raises(pyvfio.RollbackError) as caught:
                window.change([(0, 3 * PAGE_SIZE), (4 * PAGE_SIZE, 7 * PAGE_SIZE)])
            refusal = caught.value.exceptions[0]
            assert isinstance(refusal, pyvfio.PinLimitError)
            assert (refusal.used, refusal.asked) == (used * PAGE_SIZE, asked * PAGE_SIZE)
            kernel.memlock_limit = None
            window.change([(0, 12 * PAGE_SIZE)])
            for pages in (4, 8, 12):
                block.resize(pages * PAGE_SIZE)


def test_a_want_of_memory_that_is_not_the_limits_is_the_kernels_own(kernel: SpecialKernel) -> None:
    """It has no numbers of a limit to put right."""
    with Rig(kernel, mapper=GRANULE) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=errno.ENOMEM)
        kernel.privileged = True
        with pytest.raises(pyvfio.PinLimitError, match="the kernel has no memory to map 8 KiB") as caught:
            block.resize(12 * PAGE_SIZE)
        assert caught.value.limit is None


class ForgetfulKernel(SpecialKernel):
    """A kernel that has a descriptor left for /proc once, and none after that. A page is locked elsewhere."""

    def __init__(self) -> None:
        super().__init__(groups=[(2, [FakeDevice(BDF)])])
        self.asked = 0

    def memlock(self) -> Memlock:
        """What VFIO has locked, and a page."""
        lock = super().memlock()
        return dataclasses.replace(lock, used=lock.used + PAGE_SIZE)

    def mlocked(self) -> int:
        """Say it once."""
        self.asked += 1
        if self.asked > 1:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return 0


def test_a_pin_limit_that_cannot_be_explained_for_the_whole_is_undone_all_the_same() -> None:
    """The error is that of the piece."""
    with ForgetfulKernel() as kernel, Rig(kernel, mapper=GRANULE) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        before = rig.reached()
        kernel.memlock_limit = 6 * PAGE_SIZE
        with pytest.raises(pyvfio.PinLimitError) as caught:
            block.resize(12 * PAGE_SIZE)
        assert (caught.value.asked, kernel.asked) == (2 * PAGE_SIZE, 2)
        assert rig.reached() == before
