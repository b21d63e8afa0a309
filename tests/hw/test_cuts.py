"""Parts of mappings that are unmapped while the device reaches the rest, and devices that move among spaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio.kernel import Kernel
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig, pattern
from tests.spaces import can_replace

pytestmark = pytest.mark.only_iommufd("type1 cuts no mapping, copies none and moves no device")


@pytest.fixture(params=["pages", "replace"])
def rig(request: pytest.FixtureRequest, engine_bdfs: tuple[str, ...], kernel: Kernel) -> Iterator[Rig]:
    """A mapper that cuts, in both ways that a space can."""
    with Rig(engine_bdfs[0], kernel=kernel, resize="cut", cut=request.param) as made:
        yield made


def test_a_hole_in_one_mapping_is_stopped_and_both_ends_are_reached(rig: Rig, world: World) -> None:
    """The pages of the hole are unpinned, and come back with zeros."""
    block = rig.blocks.add("ring", used_length=4 * MIB, max_length=GIB)
    iova, locked = rig.mapper.iova(block), world.locked_bytes()
    with block.view() as view:
        view[MIB : MIB + SIZE] = pattern()
    if not can_replace(rig.space):
        rig.refuses(block, lambda: block.discard(MIB, 2 * MIB))
        return
    block.discard(MIB, 2 * MIB)
    assert world.locked_bytes() == locked - 2 * MIB
    for offset in (MIB, 3 * MIB - SIZE):
        assert rig.device_reads(iova + offset) is None
    for offset in (MIB - SIZE, 3 * MIB):
        assert rig.reaches(block, offset)
    block.populate(MIB, 2 * MIB)
    assert world.locked_bytes() == locked
    assert rig.reaches(block, MIB)
    rig.mapper._check()


def test_a_cut_of_a_mapping_for_reading_leaves_the_rest_for_reading(rig: Rig) -> None:
    """The device cannot write the rest then, as before."""
    block = rig.blocks.add("rom", used_length=4 * PAGE_SIZE, max_length=MIB, readonly=True)
    if not can_replace(rig.space):
        rig.refuses(block, lambda: block.resize(2 * PAGE_SIZE))
        return
    block.resize(2 * PAGE_SIZE)
    iova, there = rig.mapper.iova(block), pattern()
    with block.view() as view:
        view[:SIZE] = there
    rig.device_writes(iova, pattern())
    assert rig.device_reads(iova) == there
    assert rig.device_reads(iova + 2 * PAGE_SIZE) is None


def test_an_unmap_of_a_part_is_refused_and_changes_nothing(rig: Rig) -> None:
    """A program asks for whole mappings, or resizes a block."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=2 * MIB)
    with pytest.raises(pyvfio.UnmapSizeError, match="Nothing has been unmapped"):
        rig.space.unmap(iova=rig.mapper.iova(block) + MIB, size=MIB)
    assert rig.reaches(block, 2 * MIB - SIZE)


def test_a_block_that_is_copied_into_a_second_space_is_reached_from_both_and_charged_once(
    engine_bdfs: tuple[str, ...], world: World
) -> None:
    """Two devices of one iommufd, each with a space of its own."""
    if len(engine_bdfs) < 2:
        pytest.skip("this needs two devices with a DMA engine")
    with Rig(engine_bdfs[0], kernel=world.kernel) as rig:
        assert isinstance(rig.space, pyvfio.Ioas)
        with pyvfio.Ioas(rig.space.iommufd) as second, Rig(engine_bdfs[1], kernel=world.kernel, space=second) as other:
            block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
            locked, iova = world.locked_bytes(), rig.mapper.iova(block)
            second.copy(rig.space, iova=iova, size=2 * MIB, at=8 * GIB)
            assert world.locked_bytes() == locked
            there = pattern()
            with block.view() as view:
                view[:SIZE] = there
            assert (rig.device_reads(iova), other.device_reads(8 * GIB)) == (there, there)
            second.unmap(iova=8 * GIB, size=2 * MIB)
            assert other.device_reads(8 * GIB) is None
            assert rig.device_reads(iova) == there


def test_a_device_that_moves_reaches_the_memory_of_the_other_space(
    engine_bdfs: tuple[str, ...], kernel: Kernel
) -> None:
    """At the same IOVA, and that of the first space when the device comes back."""
    with pyvfio.Ioas(kernel=kernel) as home, Rig(engine_bdfs[0], kernel=kernel, space=home) as rig:
        block = rig.blocks.add("ring", used_length=MIB, max_length=MIB)
        desk, iova = rig.mapper.iova(rig.blocks["desk"]), rig.mapper.iova(block)
        ours, theirs = pattern(), pattern()
        with pyvfio.Ioas(home.iommufd) as away, pyvfio.RamBlockList(kernel=kernel) as blocks:
            other = blocks.add("other", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
            for memory, data in ((block, ours), (other, theirs)):
                with memory.view() as view:
                    view[:SIZE] = data
            rig.move(away)
            away.copy(home, iova=desk, size=PAGE_SIZE)
            away.map(vaddr=other.vaddr, iova=iova, size=PAGE_SIZE)
            assert rig.device_reads(iova) == theirs
            assert rig.device_reads(iova + PAGE_SIZE) is None
            rig.move(home)
            assert rig.device_reads(iova) == ours
