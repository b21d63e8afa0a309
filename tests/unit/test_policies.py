"""A policy for each block: rings that are remapped beside buffers in granules, in one mapper."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import pytest

import pyvfio
from pyvfio import BlockShape, Policy
from pyvfio.live_update import hand_over, take_over
from pyvfio.live_update.state import State
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, MapperFactory, Rig, SpecialKernel, nothing_left, small_iommu

PAGES = Policy("extend", granule=PAGE_SIZE)
EXTEND = Policy("extend")
NO_GAP = Policy("extend", allow_gap=False)
REMAP = Policy("remap")
Chooser = Callable[[pyvfio.RamBlock | BlockShape], Policy | None]


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with a device."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made, nothing_left(made):
        yield made


def by_name(policies: Mapping[str, Policy]) -> Chooser:
    """The policy of a block by its id string, None where it is not among them."""
    return lambda block: policies.get(block.idstr)


def mapper_of(policies: Mapping[str, Policy]) -> MapperFactory:
    """A mapper that remaps all other blocks."""
    return partial(pyvfio.DmaMapper, policy_of=by_name(policies))


def pieces(rig: Rig, block: pyvfio.RamBlock) -> list[int]:
    """How many pages each of its pieces has."""
    window = dict(rig.mapper.windows())[block]
    return [piece.size // PAGE_SIZE for piece in window.pieces()]


def test_each_block_is_mapped_under_its_own_policy(kernel: SpecialKernel) -> None:
    """A ring in one piece, buffers in granules, a heap in a piece for each grow; DMA into the last two goes on."""
    with Rig(kernel, mapper=mapper_of({"buffers": PAGES, "heap": EXTEND})) as rig:
        ring, buffers, heap = rig.add("ring"), rig.add("buffers"), rig.add("heap")
        for pages in (4, 6, 5):
            for block in (ring, buffers, heap):
                kernel.clear_trace()
                block.resize(pages * PAGE_SIZE)
                rig.check()
        assert [pieces(rig, block) for block in (ring, buffers, heap)] == [[5], [1] * 5, [2, 2, 1]]
        buffers.discard(0, PAGE_SIZE)
        ring.discard(PAGE_SIZE, PAGE_SIZE)
        assert [pieces(rig, block) for block in (ring, buffers)] == [[1, 3], [1] * 4]
        for block in (ring, buffers, heap):
            block.remap(2 * PAGE_SIZE, PAGE_SIZE)
            rig.check()
        assert [pieces(rig, block) for block in (ring, buffers, heap)] == [[1, 3], [1] * 4, [2, 1, 1, 1]]


def test_lengths_are_checked_against_the_policy_of_the_block(kernel: SpecialKernel) -> None:
    """A granule of one block is nothing to another."""
    large = Policy("extend", granule=4 * PAGE_SIZE, allow_gap=False)
    with Rig(kernel, mapper=mapper_of({"buffers": large})) as rig:
        ring = rig.add("ring", used=PAGE_SIZE)
        with pytest.raises(ValueError, match="multiple of the granule 0x4000"):
            rig.add("buffers", used=PAGE_SIZE)
        buffers = rig.add("buffers", used=8 * PAGE_SIZE)
        changes: list[Callable[[], None]] = [lambda: buffers.resize(PAGE_SIZE), lambda: buffers.discard(0, PAGE_SIZE)]
        for refused in changes:
            with pytest.raises(ValueError, match="granule 0x4000"):
                refused()
        with pytest.raises(pyvfio.GapError):
            buffers.remap(0, PAGE_SIZE)
        ring.resize(3 * PAGE_SIZE)


def test_a_mapper_of_granules_may_have_blocks_that_are_remapped(kernel: SpecialKernel) -> None:
    """None leaves the block to the mapper's own policy."""
    mapper: MapperFactory = partial(
        pyvfio.DmaMapper, resize="extend", granule=2 * PAGE_SIZE, policy_of=by_name({"ring": REMAP})
    )
    with Rig(kernel, mapper=mapper) as rig:
        ring, buffers = rig.add("ring", used=3 * PAGE_SIZE), rig.add("buffers", used=4 * PAGE_SIZE)
        assert (pieces(rig, ring), pieces(rig, buffers)) == ([3], [2, 2])
        assert rig.mapper.policy == Policy("extend", granule=2 * PAGE_SIZE)


@pytest.mark.parametrize("wrong", ["remap", ("remap", None), 4096, False])
def test_a_policy_that_is_none_is_a_type_error_and_no_block_comes(kernel: SpecialKernel, wrong: object) -> None:
    """Before any call that maps; and so for a plan."""
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, policy_of=lambda _block: wrong)) as rig:  # type: ignore[arg-type, return-value]
        with pytest.raises(TypeError, match="policy_of"):
            rig.add()
        with pytest.raises(TypeError, match="policy_of"):
            rig.mapper.plan([BlockShape("ring", 0, MIB)])
        assert len(rig.blocks) == 0
        assert not rig.container.reserved_iova
        with pytest.raises(TypeError, match="must be callable"):
            pyvfio.DmaMapper(rig.container, policy_of=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cut", "policy", "error", "message"),
    [
        (None, Policy("cut"), pyvfio.UnsupportedError, "can unmap part of a mapping"),
        ("replace", Policy("cut", allow_gap=False), ValueError, "needs Ioas\\(cut='pages'\\)"),
    ],
    ids=["no cuts", "cuts with a gap"],
)
def test_a_block_whose_policy_the_space_cannot_follow_is_refused(
    cut: Literal["replace"] | None, policy: Policy, error: type[Exception], message: str
) -> None:
    """When the block is added, not when a shrink needs the cut; and in a plan. Blocks of other policies come."""
    with (
        SpecialKernel("7.3", iommufd=True) as kernel,
        pyvfio.Ioas(kernel=kernel, cut=cut) as space,
        Rig(kernel, space=space, mapper=mapper_of({"rings": policy})) as rig,
    ):
        rig.add("other")
        before = rig.reached(), rig.space.reserved_iova
        with pytest.raises(error, match=message):
            rig.add("rings")
        with pytest.raises(error, match=message):
            rig.mapper.plan([BlockShape("rings", 0, MIB)])
        assert (rig.reached(), rig.space.reserved_iova) == before
        assert "rings" not in rig.blocks
        rig.check()


class Stays:
    """A notifier that refuses removals until it lets go."""

    def __init__(self) -> None:
        self.refuses = True

    def ram_block_removed(self, block: pyvfio.RamBlock, _used_length: int, _max_length: int) -> None:
        """Refuse it."""
        if self.refuses:
            raise RuntimeError(f"{block.idstr} stays")


def test_a_block_keeps_its_policy_through_the_undo_of_a_removal(kernel: SpecialKernel) -> None:
    """What policy_of says by then is of no account."""
    policies, stays = {"buffers": PAGES}, Stays()

    def mapper(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        blocks.add_notifier(stays)  # is told of a removal after the mapper
        return pyvfio.DmaMapper(container, blocks, policy_of=by_name(policies))

    with Rig(kernel, mapper=mapper) as rig:
        buffers = rig.add("buffers", used=4 * PAGE_SIZE)
        before, reached = pieces(rig, buffers), rig.reached()
        policies["buffers"] = REMAP
        with pytest.raises(RuntimeError, match="stays"):
            buffers.remove()
        assert (pieces(rig, buffers), rig.reached()) == (before, reached) == ([1] * 4, reached)
        rig.check()
        stays.refuses = False
        buffers.remove()
        assert pieces(rig, rig.add("buffers", used=4 * PAGE_SIZE)) == [4]


# ------------------------------------------------------------------------------------------- mappings that are promised


@pytest.fixture
def narrow() -> Iterator[SpecialKernel]:
    """A kernel whose containers hold eight mappings."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made, nothing_left(made):
        made._machine.iommu = small_iommu(8)
        yield made


def test_a_block_without_granules_takes_no_mapping_that_is_promised(narrow: SpecialKernel) -> None:
    """Which a grow of the block with granules would miss later."""
    with Rig(narrow, mapper=mapper_of({"buffers": PAGES})) as rig:
        buffers = rig.add("buffers", used=PAGE_SIZE, maximum=6 * PAGE_SIZE)
        rings = [rig.add("one"), rig.add("two", used=0)]
        assert rig.container.entries_left == 6
        with pytest.raises(pyvfio.EntryLimitError, match="'three' may need 1 mappings, and 0 are left"):
            rig.add("three")
        plan = rig.mapper.plan([BlockShape("three", 0, MIB)])
        assert "'three' may need 1 mappings" in str(plan.shortages[0])
        buffers.resize(6 * PAGE_SIZE)
        for ring in rings:
            ring.resize(3 * PAGE_SIZE)
        assert rig.container.entries_left == 0


def test_blocks_without_granules_are_promised_nothing_where_no_block_has_them(narrow: SpecialKernel) -> None:
    """They take mappings as they need them."""
    with Rig(narrow) as rig:
        rings = [rig.add(f"ring {number}", used=0) for number in range(9)]
        for ring in rings[:8]:
            ring.resize(PAGE_SIZE)
        with pytest.raises(pyvfio.EntryLimitError, match="all 8 mappings"):
            rings[8].resize(PAGE_SIZE)


@pytest.mark.parametrize("late", ["buffers", "ring"])
def test_pieces_of_a_block_that_grew_often_are_joined_for_the_others(narrow: SpecialKernel, late: str) -> None:
    """It has been promised one mapping, whatever it has taken since."""
    with Rig(narrow, mapper=mapper_of({"buffers": PAGES, "heap": EXTEND})) as rig:
        others = {"buffers": rig.add("buffers", used=0, maximum=4 * PAGE_SIZE), "ring": rig.add("ring", used=0)}
        heap = rig.add("heap", used=PAGE_SIZE)
        for pages in range(2, 9):
            heap.resize(pages * PAGE_SIZE)
        assert rig.container.entries_left == 0
        others[late].resize(4 * PAGE_SIZE)
        rig.check()
        assert pieces(rig, heap) == [8]
        assert pieces(rig, others[late]) == ([1] * 4 if late == "buffers" else [4])


def test_pieces_that_may_not_leave_the_devices_reach_are_joined_for_nobody(narrow: SpecialKernel) -> None:
    """The refusal is the kernel's, and all is as it was."""
    with Rig(narrow, mapper=mapper_of({"heap": NO_GAP})) as rig:
        ring, heap = rig.add("ring", used=0), rig.add("heap", used=PAGE_SIZE)
        for pages in range(2, 9):
            heap.resize(pages * PAGE_SIZE)
        before = rig.reached()
        with pytest.raises(pyvfio.EntryLimitError, match="all 8 mappings"):
            ring.resize(PAGE_SIZE)
        assert rig.reached() == before


def test_a_join_for_another_block_that_fails_leaves_both_as_they_were(narrow: SpecialKernel) -> None:
    """The error is that of the join."""
    with Rig(narrow, mapper=mapper_of({"heap": EXTEND})) as rig:
        ring, heap = rig.add("ring", used=0), rig.add("heap", used=PAGE_SIZE)
        for pages in range(2, 9):
            heap.resize(pages * PAGE_SIZE)
        before = rig.reached()
        narrow.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=14)
        with pytest.raises(pyvfio.IoctlError) as caught:
            ring.resize(PAGE_SIZE)
        assert caught.value.errno == 14
        assert (rig.reached(), ring.used_length) == (before, 0)
        rig.check()


# -------------------------------------------------------------------------------------------------- plans, live update


def test_a_plan_has_the_policy_of_each_shape(kernel: SpecialKernel) -> None:
    """And needs what adding the blocks takes."""
    with Rig(kernel, mapper=mapper_of({"buffers": PAGES, "heap": EXTEND})) as rig:
        shapes = [BlockShape(name, 4 * PAGE_SIZE, 16 * PAGE_SIZE) for name in ("ring", "buffers", "heap")]
        plan = rig.mapper.plan(shapes)
        assert [(block.entries, block.entries_most) for block in plan.blocks] == [(1, 1), (4, 16), (1, None)]
        assert plan.fits
        left = rig.container.entries_left
        for shape in shapes:
            rig.add(shape.idstr, used=shape.used_length, maximum=shape.max_length)
        assert left - rig.container.entries_left == plan.entries
        with pyvfio.RamBlockList(kernel=kernel) as others:
            block = others.add("buffers", used_length=8 * PAGE_SIZE, max_length=MIB)
            with pyvfio.DmaMapper(rig.container, policy_of=by_name({"buffers": PAGES})) as mapper:
                assert mapper.plan([block]).entries == 8


def test_a_plan_of_granules_and_rings_finds_what_adding_them_would(narrow: SpecialKernel) -> None:
    """In their order."""
    with Rig(narrow, mapper=mapper_of({"buffers": PAGES})) as rig:
        shapes = [BlockShape("ring", 0, MIB), BlockShape("buffers", 0, 7 * PAGE_SIZE), BlockShape("late", 0, MIB)]
        plan = rig.mapper.plan(shapes)
        assert [error.message for error in plan.shortages] == [
            "RAM block 'late' may need 1 mappings, and 0 are left when all other blocks have theirs"
        ]
        for shape in shapes[:2]:
            rig.add(shape.idstr, used=shape.used_length, maximum=shape.max_length)
        with pytest.raises(pyvfio.EntryLimitError, match="'late' may need 1 mappings"):
            rig.add("late", used=0)


def test_a_hand_over_carries_the_policy_of_each_block(kernel: SpecialKernel) -> None:
    """Blocks that come later have that of the new process, and there is no second mapper."""
    policies = {"buffers": PAGES, "heap": EXTEND}
    with Rig(kernel, mapper=mapper_of(policies), memory=pyvfio.Memfd()) as rig:
        for name in ("ring", *policies):
            rig.add(name, used=4 * PAGE_SIZE)
        update = hand_over(rig.mapper)
        described = State.load(update.state)
        assert {block.idstr: block.policy for block in described.blocks} == {**policies, "ring": REMAP}
        fds = [kernel.dup(fd) for fd in update.fds]
        chooser = by_name({"more": PAGES, "ring": PAGES})
        with take_over(update.state, fds, kernel=kernel, policy_of=chooser) as taken:
            update.finish()
            blocks = taken.blocks
            for name in ("more", "other"):
                blocks.add(name, used_length=2 * PAGE_SIZE, max_length=MIB, memory=pyvfio.Memfd())
            for name in ("ring", *policies):
                blocks[name].resize(6 * PAGE_SIZE)
            sizes = {
                block.idstr: [piece.size // PAGE_SIZE for piece in window.pieces()]
                for block, window in taken.mapper.windows()
            }
            assert sizes == {"ring": [6], "buffers": [1] * 6, "heap": [4, 2], "more": [1, 1], "other": [2]}
            taken.mapper._check()
            again = hand_over(taken.mapper)
            assert {block.idstr: block.policy for block in State.load(again.state).blocks}["more"] == PAGES
            again.cancel()


def test_promises_hold_after_a_hand_over(narrow: SpecialKernel) -> None:
    """As they were made."""
    with Rig(narrow, mapper=mapper_of({"buffers": PAGES}), memory=pyvfio.Memfd()) as rig:
        rig.add("buffers", used=PAGE_SIZE, maximum=7 * PAGE_SIZE)
        rig.add("ring")
        update = hand_over(rig.mapper)
        with take_over(update.state, [narrow.dup(fd) for fd in update.fds], kernel=narrow) as taken:
            update.finish()
            rig.mapper._check()
            with pytest.raises(pyvfio.EntryLimitError, match="'more' may need 1 mappings, and 0 are left"):
                taken.blocks.add("more", used_length=0, max_length=PAGE_SIZE)
            taken.blocks["buffers"].resize(7 * PAGE_SIZE)


def test_a_policy_is_public_and_says_what_it_is() -> None:
    """As the options of a mapper do, with the same refusals."""
    assert repr(Policy("extend", granule=MIB)) == "Policy(resize='extend', granule=1048576, allow_gap=True)"
    for wrong in ({"granule": 3, "resize": "extend"}, {"granule": 4096}, {"resize": "other"}):
        with pytest.raises(ValueError, match=r"granule|resize"):
            Policy(**wrong)
