"""A plan says what adding blocks would do, and does nothing."""

from __future__ import annotations

import dataclasses
import errno
import math
import re
from functools import partial

import pytest

import pyvfio
from pyvfio import BlockShape
from pyvfio.testing.fake import FakeDevice, FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, Rig, SpecialKernel, requests, small_iommu

GRANULES = partial(pyvfio.DmaMapper, resize="extend", granule=2 * MIB)
EXTENDS = partial(pyvfio.DmaMapper, resize="extend")


SHAPES = [BlockShape("a", 4 * MIB, 64 * MIB), BlockShape("b", 0, GIB), BlockShape("c", PAGE_SIZE, 3 * PAGE_SIZE)]


def test_what_is_planned_is_what_comes(kernel: SpecialKernel) -> None:
    """The IOVA of each block, the mappings and the locked memory of all."""
    kernel.privileged = False
    kernel.memlock_limit = GIB
    with Rig(kernel) as rig:
        rig.add("earlier")
        former = kernel.memlock().used
        plan = rig.mapper.plan(SHAPES)
        left = rig.container.entries_left
        blocks = [
            rig.blocks.add(shape.idstr, used_length=shape.used_length, max_length=shape.max_length) for shape in SHAPES
        ]
        assert [planned.iova for planned in plan.blocks] == [rig.mapper.iova(block) for block in blocks]
        assert (plan.entries_left, plan.entries) == (left, left - rig.container.entries_left)
        assert (plan.memlock.used, plan.locked) == (former, kernel.memlock().used - former)
        assert plan.fits
        assert plan.iova_ranges == rig.container.iova_ranges


def test_a_plan_changes_nothing(kernel: SpecialKernel) -> None:
    """It asks the container for its info, and has memory of its own for a moment."""
    with Rig(kernel) as rig:
        rig.add("earlier")
        reserved, reached = rig.container.allocator.reservations, rig.reached()
        kernel.clear_trace()
        rig.mapper.plan(SHAPES)
        assert set(requests(kernel.trace)) == {"VFIO_IOMMU_GET_INFO", "memlock", "mmap", "munmap"}
        assert (rig.container.allocator.reservations, rig.reached()) == (reserved, reached)
        rig.check()


def test_a_plan_takes_blocks_that_are_there_already(kernel: SpecialKernel) -> None:
    """Those of a list that no mapper follows, placed where the mapper's `place` wants them."""
    with Rig(kernel) as rig, pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("here", used_length=MIB, max_length=GIB)
        with pyvfio.DmaMapper(rig.container, place=lambda _block: 0x4000_0000) as mapper:
            (planned,) = mapper.plan([block]).blocks
            assert planned == pyvfio.PlannedBlock("here", MIB, GIB, MIB, pyvfio.Iova(0x4000_0000), 1, 1)


@pytest.mark.parametrize(
    ("factory", "entries", "most"), [(pyvfio.DmaMapper, 1, 1), (EXTENDS, 1, None), (GRANULES, 2, 32)]
)
def test_how_many_mappings_a_block_takes_depends_on_how_it_is_resized(
    kernel: SpecialKernel, factory: partial[pyvfio.DmaMapper], entries: int, most: int | None
) -> None:
    """One, one for each time that it grows, or one for each granule."""
    with Rig(kernel, mapper=factory) as rig:
        plan = rig.mapper.plan([BlockShape("a", 4 * MIB, 64 * MIB), BlockShape("b", 0, 64 * MIB)])
        assert [(block.entries, block.entries_most) for block in plan.blocks] == [(entries, most), (0, most)]
        assert (plan.entries, plan.entries_most) == (entries, None if most is None else 2 * most)


def test_what_does_not_fit_is_said_as_adding_it_would() -> None:
    """The same error, with the same numbers, for mappings, for IOVA and for locked memory."""
    kernel = FakeKernel(iommu=small_iommu(40), groups=[(2, [FakeDevice(BDF)])])
    kernel.memlock_limit = 8 * MIB
    with kernel, Rig(kernel, mapper=GRANULES) as rig:
        plan = rig.mapper.plan(
            [
                BlockShape("fits", 2 * MIB, 64 * MIB),
                BlockShape("too many", 2 * MIB, 64 * MIB),
                BlockShape("too long", 0, 1 << 40),
                BlockShape("too much", 6 * MIB, 6 * MIB),
            ]
        )
        assert not plan.fits
        kinds = [type(error) for error in plan.shortages]
        assert kinds == [
            pyvfio.EntryLimitError,
            pyvfio.IovaRangeError,
            pyvfio.EntryLimitError,
            pyvfio.EntryLimitError,
            pyvfio.PinLimitError,
        ]
        rig.add("fits", used=2 * MIB, maximum=64 * MIB)
        with pytest.raises(pyvfio.EntryLimitError) as raised:
            rig.add("too many", used=2 * MIB, maximum=64 * MIB)
        assert str(raised.value) == str(plan.shortages[0])
        assert "may need 32 mappings of 2 MiB, and 8 are left" in str(raised.value)
        assert raised.value.arguments == {"max_length": 64 * MIB, "granule": 2 * MIB}
        assert [error.hint.split(",")[0] for error in plan.shortages[2:4]] == ["Remove blocks"] * 2
        assert "smallest granule that would fit is 8 MiB" in str(raised.value)
        rig.check()


def test_memory_that_can_be_locked_now_may_not_be_when_all_has_grown(kernel: SpecialKernel) -> None:
    """Both are said, and the first alone decides whether the blocks fit."""
    kernel.privileged = False
    kernel.memlock_limit = 8 * MIB
    with Rig(kernel) as rig:
        plan = rig.mapper.plan([BlockShape("a", 4 * MIB, 64 * MIB)])
        assert plan.fits
        (later,) = plan.shortages_when_grown
        assert isinstance(later, pyvfio.PinLimitError)
        assert (later.limit, later.used, later.asked) == (8 * MIB, 0, 64 * MIB)
        assert "does not fit" not in str(plan)
        assert "would not fit when grown" in str(plan)


def test_with_privilege_no_memory_is_too_much(kernel: SpecialKernel) -> None:
    """CAP_IPC_LOCK lifts the limit."""
    kernel.privileged = True
    kernel.memlock_limit = PAGE_SIZE
    with Rig(kernel) as rig:
        plan = rig.mapper.plan([BlockShape("a", 4 * MIB, 64 * MIB)])
        assert (plan.shortages, plan.shortages_when_grown) == ((), ())
        assert "no limit" in str(plan)


def test_iova_that_the_caller_chose_is_looked_at(kernel: SpecialKernel) -> None:
    """It is where the block will be, or why it will not."""
    with Rig(kernel) as rig:
        plan = rig.mapper.plan(
            [BlockShape("a", 0, MIB, iova=0x4000_0000), BlockShape("b", 0, MIB, iova=0x4000_0000 + MIB - PAGE_SIZE)]
        )
        assert [block.iova for block in plan.blocks] == [0x4000_0000, None]
        (error,) = plan.shortages
        assert isinstance(error, pyvfio.IovaOverlapError)


@pytest.mark.parametrize("shape", [BlockShape("a", 2, 1), BlockShape("a", 0, 0), BlockShape("a", 1, PAGE_SIZE)])
def test_lengths_that_can_never_be_right_are_refused(kernel: SpecialKernel, shape: BlockShape) -> None:
    """Before anything is asked."""
    with Rig(kernel) as rig, pytest.raises(ValueError, match="'a'"):
        rig.mapper.plan([shape])


def test_a_plan_can_be_read(kernel: SpecialKernel) -> None:
    """A line for each block, for each of the things that may run out, and for the time."""
    with Rig(kernel, mapper=GRANULES) as rig:
        text = str(rig.mapper.plan([BlockShape("a", 4 * MIB, 64 * MIB), BlockShape("b", 0, GIB)]))
    lines = text.split("\n")
    assert lines[0].startswith("a: 4 MiB of 64 MiB at IOVA 0x")
    assert lines[2] == "mappings: 2, at most 544; 65535 are left"
    assert lines[3].startswith("locked memory: 4 MiB, at most 1088 MiB; 0 bytes are locked")
    assert re.fullmatch(r"time: about \d+\.\d m?s", lines[5])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 ms"), (0.0234, "23.4 ms"), (0.9, "900.0 ms"), (1.0, "1.0 s"), (1.5, "1.5 s"), (1234.0, "1,234.0 s")],
)
def test_a_time_is_told_in_seconds_or_milliseconds(kernel: SpecialKernel, seconds: float, text: str) -> None:
    """Whichever has few digits."""
    with Rig(kernel) as rig:
        plan = dataclasses.replace(rig.mapper.plan([]), seconds=seconds)
    assert f"time: about {text}" in str(plan).split("\n")


def test_a_plan_tells_that_each_grow_takes_a_mapping(kernel: SpecialKernel) -> None:
    """If the number of grows decides how many mappings a block needs, no largest number is known."""
    with Rig(kernel, mapper=EXTENDS) as rig:
        text = str(rig.mapper.plan([BlockShape("a", 4 * MIB, 64 * MIB)]))
    assert "mappings: 1, one more for each grow; 65535 are left" in text.split("\n")


def test_a_longer_block_takes_more_time(kernel: SpecialKernel) -> None:
    """Seconds grow with what is used, from none for nothing; what is only reserved takes none."""
    with Rig(kernel) as rig:
        assert rig.mapper.plan([BlockShape("a", 0, GIB)]).seconds == 0
        assert rig.mapper.plan([BlockShape("a", GIB, GIB)]).seconds > 0


def test_a_closed_mapper_plans_nothing(kernel: SpecialKernel) -> None:
    """As it does nothing else."""
    with Rig(kernel) as rig:
        rig.mapper.close()
        with pytest.raises(pyvfio.ClosedError):
            rig.mapper.plan([])


def test_the_last_mapping_may_be_needed_when_a_block_has_grown() -> None:
    """An empty block takes none at first; where none is left, it is said that it could not grow."""
    kernel = FakeKernel(iommu=small_iommu(1), groups=[(2, [FakeDevice(BDF)])])
    with kernel, Rig(kernel) as rig:
        rig.add("there")
        plan = rig.mapper.plan([BlockShape("a", 0, MIB), BlockShape("b", 0, MIB)])
        assert plan.fits
        assert len(plan.shortages_when_grown) == 2
        for error in plan.shortages_when_grown:
            assert isinstance(error, pyvfio.EntryLimitError)
            assert "may need 1 mappings, and 0 are left" in str(error)
            assert "Remove blocks" in error.hint
            assert error.arguments == {"max_length": MIB}
        block = rig.add("a", used=0)
        with pytest.raises(pyvfio.EntryLimitError):
            block.resize(PAGE_SIZE)


def test_an_iova_that_is_taken_is_refused_as_adding_the_block_would_be(kernel: SpecialKernel) -> None:
    """By the reservation that is there."""
    with Rig(kernel) as rig:
        there = rig.mapper.iova(rig.add("there"))
        plan = rig.mapper.plan([BlockShape("a", 0, MIB, iova=there)])
        (error,) = plan.shortages
        assert isinstance(error, pyvfio.IovaOverlapError)
        assert error.existing[0].start == there


def test_discarded_parts_need_nothing_and_what_is_between_them_a_mapping_each(kernel: SpecialKernel) -> None:
    """Of a block that is there already."""
    with Rig(kernel) as rig, pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("holed", used_length=4 * PAGE_SIZE, max_length=MIB)
        block.discard(PAGE_SIZE, PAGE_SIZE)
        plan = rig.mapper.plan([block])
        assert (plan.entries, plan.locked) == (2, 3 * PAGE_SIZE)
        block.discard(0, 4 * PAGE_SIZE)
        plan = rig.mapper.plan([block])
        assert (plan.entries, plan.locked) == (0, 0)


@pytest.mark.parametrize("shift", [47, 50, 62])
def test_more_than_a_process_has_addresses_for_does_not_fit(shift: int) -> None:
    """Though the IOMMU has the IOVA for it."""
    kernel = FakeKernel(iommu="virtio", groups=[(2, [FakeDevice(BDF)])])
    with kernel, Rig(kernel) as rig:
        plan = rig.mapper.plan([BlockShape("a", 0, (1 << shift) + PAGE_SIZE)])
        assert "of address space could not be reserved" in str(plan.shortages[0])


@pytest.mark.parametrize("wrong", [1 << 64, 1 << 80])
def test_lengths_beyond_an_address_are_refused(kernel: SpecialKernel, wrong: int) -> None:
    """They can never be right."""
    with Rig(kernel) as rig, pytest.raises(ValueError, match=r"above 0 and below 2\^64"):
        rig.mapper.plan([BlockShape("a", 0, wrong)])


def test_what_is_no_set_of_blocks_is_refused(kernel: SpecialKernel) -> None:
    """One shape without a list, the same name twice, a name or a block that is there."""
    with Rig(kernel) as rig:
        there = rig.add("there")
        with pytest.raises(TypeError, match="takes a list of BlockShapes and RamBlocks, not of str"):
            rig.mapper.plan(BlockShape("a", 0, MIB))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="'a' is planned more than once"):
            rig.mapper.plan([BlockShape("a", 0, MIB)] * 2)
        for known in (BlockShape("there", 0, MIB), there):
            with pytest.raises(ValueError, match="already follows a RAM block 'there'"):
                rig.mapper.plan([known])


def test_a_plan_is_made_though_the_time_cannot_be_tried(kernel: SpecialKernel) -> None:
    """Without memory for that the seconds are no number; without the address space back, the plan is as it is."""
    with Rig(kernel) as rig:
        kernel.fail(call="mmap", errno=errno.ENOMEM)
        assert math.isnan(rig.mapper.plan(SHAPES).seconds)
        kernel.fail(call="munmap", errno=errno.ENOMEM)
        assert rig.mapper.plan(SHAPES).seconds > 0


def test_a_container_without_a_group_has_no_plan(kernel: SpecialKernel) -> None:
    """Attach one first: it brings the IOMMU."""
    refused = pytest.raises(pyvfio.VfioError, match="Attach a group first")
    with pyvfio.Container(kernel=kernel) as container, pyvfio.DmaMapper(container) as mapper, refused:
        mapper.plan([])


@pytest.mark.parametrize("by_process", [False, True])
def test_a_plan_in_an_ioas_says_whose_memory_the_limit_is_for(by_process: bool) -> None:  # noqa: FBT001
    """By default that of all processes of the user. Of those, a plan knows the part of this space, as an error does."""
    with SpecialKernel("7.3", iommufd=True) as kernel, pyvfio.Iommufd(kernel=kernel) as iommufd:
        kernel.privileged = False
        kernel.memlock_limit = 16 * MIB
        if by_process:
            iommufd.set_counts_by_process(enabled=True)
        with Rig(kernel, space=pyvfio.Ioas(iommufd)) as rig:
            rig.add("earlier", used=8 * MIB, maximum=8 * MIB)
            plan = rig.mapper.plan([BlockShape("a", 8 * MIB, 9 * MIB)])
            assert (plan.fits, len(plan.shortages_when_grown), plan.memlock.used) == (True, 1, 8 * MIB)
            assert plan.counts_by == ("process" if by_process else "user")
            assert ("for all processes of the user together, whose sum is unknown" in str(plan)) != by_process
            assert ("8 MiB are locked by this process, 16 MiB allowed" in str(plan)) == by_process
            plan = rig.mapper.plan([BlockShape("a", 9 * MIB, 9 * MIB)])
            (shortage,) = plan.shortages
            with pytest.raises(pyvfio.PinLimitError) as raised:
                rig.add("a", used=9 * MIB, maximum=9 * MIB)
            assert isinstance(shortage, pyvfio.PinLimitError)
            told, real = [(e.limit, e.used, e.asked, e.by_user, e.request) for e in (shortage, raised.value)]
            assert told == real == (16 * MIB, 8 * MIB, 9 * MIB, not by_process, "IOMMU_IOAS_MAP")
            assert ("lets the processes of this user pin 16 MiB in all" in shortage.message) != by_process


def test_the_error_of_a_whole_change_says_whose_memory_the_limit_is_for() -> None:
    """As that of one piece. The numbers are those of the change."""
    with SpecialKernel("7.3", iommufd=True) as kernel:
        kernel.privileged = False
        kernel.memlock_limit = 8 * MIB
        with Rig(kernel, mapper=GRANULES, space=pyvfio.Ioas(kernel=kernel)) as rig:
            block = rig.add("ring", used=2 * MIB, maximum=64 * MIB)
            with pytest.raises(pyvfio.PinLimitError, match="this user pin 8 MiB in all") as raised:
                block.resize(18 * MIB)
            error = raised.value
            assert "this address space has 2 MiB" in error.message
            assert (error.by_user, error.used, error.mapped, error.asked) == (True, 2 * MIB, 2 * MIB, 16 * MIB)


def test_the_part_of_other_processes_is_unknown_to_a_plan() -> None:
    """It fits, and says that the sum is unknown; the kernel refuses nevertheless."""
    with SpecialKernel("7.3", iommufd=True) as kernel:
        kernel.privileged = False
        kernel.memlock_limit = 8 * MIB
        with (
            Rig(kernel, space=pyvfio.Ioas(kernel=kernel)) as rig,
            pyvfio.Ioas(kernel=kernel) as elsewhere,
            pyvfio.open_device(OTHER_BDF, space=elsewhere),
            pyvfio.RamBlockList(kernel=kernel) as blocks,
            pyvfio.DmaMapper(elsewhere, blocks),
        ):
            blocks.add("theirs", used_length=6 * MIB, max_length=6 * MIB)
            plan = rig.mapper.plan([BlockShape("a", 4 * MIB, 4 * MIB)])
            assert plan.fits
            assert "whose sum is unknown" in str(plan)
            with pytest.raises(pyvfio.PinLimitError, match="have an unknown number"):
                rig.add("a", used=4 * MIB, maximum=4 * MIB)
