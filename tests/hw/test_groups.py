"""Two groups: one address space that they share, or one each."""

from __future__ import annotations

import pytest

import pyvfio
from pyvfio.kernel import Kernel
from pyvfio.units import GIB, MIB
from tests.hw.rig import SIZE, Rig, pattern


@pytest.fixture
def two(engine_bdfs: tuple[str, ...]) -> tuple[str, str]:
    """Two devices with an engine."""
    if len(engine_bdfs) < 2:
        pytest.skip("this needs two devices with a DMA engine, in two groups")
    return engine_bdfs[0], engine_bdfs[1]


def test_two_groups_in_one_container_reach_the_same_block(two: tuple[str, str], kernel: Kernel) -> None:
    """What one device writes the other reads, before and after a resize, and both are stopped behind it."""
    with (
        pyvfio.Container(kernel=kernel) as container,
        Rig(two[0], kernel=kernel, container=container) as one,
        Rig(two[1], kernel=kernel, container=container) as other,
    ):
        assert one.device.group is not other.device.group
        block = one.blocks.add("shared", used_length=2 * MIB, max_length=GIB)
        iova = one.mapper.iova(block)
        for length in (2 * MIB, 4 * MIB, MIB):
            block.resize(length)
            sent = pattern()
            one.device_writes(iova + length - SIZE, sent)
            assert other.device_reads(iova + length - SIZE) == sent
            assert one.device_reads(iova + length) is None
            assert other.device_reads(iova + length) is None


def test_a_group_that_comes_later_reaches_what_is_mapped_already(two: tuple[str, str], kernel: Kernel) -> None:
    """Ranges are read anew, reservations still hold, and existing mappings count for the new group."""
    with pyvfio.Container(kernel=kernel) as container, Rig(two[0], kernel=kernel, container=container) as one:
        block = one.blocks.add("shared", used_length=2 * MIB, max_length=GIB)
        there = pattern()
        with block.view() as view:
            view[:SIZE] = there
        with Rig(two[1], kernel=kernel, container=container) as other:
            assert other.device_reads(one.mapper.iova(block)) == there
        assert one.device_reads(one.mapper.iova(block)) == there


def test_a_container_each_keeps_two_groups_apart(two: tuple[str, str], kernel: Kernel) -> None:
    """A device does not reach what is mapped for another group's container at the same IOVA."""
    with Rig(two[0], kernel=kernel) as one, Rig(two[1], kernel=kernel) as other:
        block = one.blocks.add("mine", used_length=2 * MIB, max_length=GIB)
        with block.view() as view:
            view[:SIZE] = pattern()
        assert other.device_reads(one.mapper.iova(block)) is None
        assert one.reaches(block, 0)


def test_a_device_may_be_opened_twice_in_one_group(two: tuple[str, str], kernel: Kernel) -> None:
    """Several devices, or descriptors, of a group live in one container; the group stays until the last goes."""
    with pyvfio.Container(kernel=kernel) as container:
        first = pyvfio.open_device(two[0], container=container)
        second = pyvfio.open_device(two[0], container=container)
        assert first.group is second.group
        first.close()
        assert second.config.read16(0) == 0x1234
        second.close()
