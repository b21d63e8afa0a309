"""How many address bits a device has: no IOVA that pyvfio chooses for a block or a buffer lies above them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio.mapper.plan import BlockShape
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.unit.fakes import BDF, Rig, nothing_left

TOP = 1 << 39
WIDE = [("6.1", "amd"), ("7.3", "amd"), ("7.3", "virtio"), ("6.12", "intel48")]


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A kernel whose IOMMU has 48 bits."""
    with FakeKernel("6.12", iommu="intel48") as made:
        yield made


@pytest.fixture
def rig(kernel: FakeKernel) -> Iterator[Rig]:
    """A mapper that follows a list; nothing is left of it in the end."""
    with nothing_left(kernel), Rig(kernel) as made:
        yield made
        made.check()


@pytest.mark.parametrize(("version", "iommu"), WIDE)
def test_no_iova_is_wider_than_what_devices_commonly_have(version: str, iommu: str) -> None:
    """A device that drops the upper bits would reach other memory. Temporary mappings begin at the top of 39 bits."""
    with FakeKernel(version, iommu=iommu) as kernel, nothing_left(kernel), Rig(kernel) as rig:
        assert rig.container.dma_bits == rig.mapper.dma_bits == 39
        block = rig.add(maximum=GIB)
        assert rig.mapper.iova(block) + block.max_length <= TOP
        with mmap.mmap(-1, PAGE_SIZE) as buffer, mmap.mmap(-1, 2 * PAGE_SIZE) as other:
            with rig.mapper.map_temporary(buffer) as first, rig.mapper.map_temporary(other) as second:
                assert (first.iova, second.iova) == (TOP - PAGE_SIZE, TOP - 3 * PAGE_SIZE)
            rig.mapper.reset_temporary()
            with rig.mapper.map_buffer(buffer) as mapping:
                assert mapping.iova < rig.mapper.iova(block) + block.max_length + MIB


def test_a_large_temporary_mapping_takes_no_more_than_it_needs(rig: Rig) -> None:
    """It is aligned for large pages, and what lies above it is the next one's."""
    with mmap.mmap(-1, 4 * MIB) as large, mmap.mmap(-1, PAGE_SIZE) as small:
        first, second = rig.mapper.map_temporary(large), rig.mapper.map_temporary(small)
        assert TOP - 6 * MIB < first.iova <= TOP - 4 * MIB
        assert (first.iova - first.vaddr) % (2 * MIB) == 0
        assert second.iova == TOP - PAGE_SIZE or first.iova == TOP - 4 * MIB
        reserved = sum(taken.size for taken in rig.container.reserved_iova)
        assert reserved == 4 * MIB + PAGE_SIZE
        for mapping in (first, second):
            mapping.close()
        rig.mapper.reset_temporary()


@pytest.mark.parametrize("bits", [32, 40, 48, 64])
def test_a_mapper_has_a_limit_of_its_own(kernel: FakeKernel, bits: int) -> None:
    """Below the container's or above it: a container may have devices of several widths."""
    with nothing_left(kernel), Rig(kernel) as rig:
        with pyvfio.DmaMapper(rig.container, dma_bits=bits) as mapper, mmap.mmap(-1, PAGE_SIZE) as buffer:
            with mapper.map_temporary(buffer) as mapping:
                assert mapping.iova == min(1 << bits, 1 << 48) - PAGE_SIZE
            mapper.reset_temporary()
        assert rig.container.dma_bits == 39


def test_a_container_hands_its_limit_to_its_mappers_and_to_raw_reservations(kernel: FakeKernel) -> None:
    """Unless the call has another."""
    with (
        nothing_left(kernel),
        pyvfio.Container(kernel=kernel, dma_bits=32) as container,
        pyvfio.open_device(BDF, kernel=kernel, container=container),
        pyvfio.DmaMapper(container) as mapper,
    ):
        assert mapper.dma_bits == 32
        taken = container.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0, top_down=True)
        wider = container.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0, top_down=True, dma_bits=40)
        assert (taken, wider) == ((1 << 32) - PAGE_SIZE, (1 << 40) - PAGE_SIZE)
        with mmap.mmap(-1, PAGE_SIZE) as buffer, mapper.map_buffer(buffer) as mapping:
            found = container.reserve_and_map(vaddr=mapping.vaddr, size=PAGE_SIZE, top_down=True)
            assert found == taken - PAGE_SIZE
            container.unmap_and_release(iova=found, size=PAGE_SIZE, vaddr=mapping.vaddr)


def test_the_callers_own_iova_may_lie_above(kernel: FakeKernel) -> None:
    """Of a block, a buffer and a temporary mapping: whoever names an IOVA knows the device."""
    high = 5 << 40
    with nothing_left(kernel), Rig(kernel, mapper=lambda c, b: pyvfio.DmaMapper(c, b, place=lambda _: high)) as rig:
        block = rig.add()
        assert rig.mapper.iova(block) == high
        with mmap.mmap(-1, PAGE_SIZE) as buffer, mmap.mmap(-1, PAGE_SIZE) as other:
            with (
                rig.mapper.map_buffer(buffer, iova=high + GIB) as fixed,
                rig.mapper.map_temporary(other, iova=high + 2 * GIB) as temporary,
            ):
                assert (fixed.iova, temporary.iova) == (high + GIB, high + 2 * GIB)
            rig.mapper.reset_temporary()
        rig.check()


def test_room_above_the_limit_is_named_when_there_is_none_below(kernel: FakeKernel) -> None:
    """With both numbers, and the argument; the mapper that has it finds the room."""
    with nothing_left(kernel), Rig(kernel) as rig:
        rig.container.reserve_iova_at(0xFEF0_0000, TOP - 0xFEF0_0000 - GIB)
        with pytest.raises(pyvfio.IovaRangeError, match=r"below 2\^39 \(dma_bits=39\).*free above it") as caught:
            rig.add(maximum=8 * GIB)
        assert (caught.value.largest_free, caught.value.largest_free_above) == (0xFEDF_0000, (1 << 48) - TOP)
        assert "DmaMapper(…, dma_bits=…)" in str(caught.value)
        with pyvfio.DmaMapper(rig.container, rig.blocks, dma_bits=64) as wide:
            rig.mapper.close()
            assert wide.iova(rig.add(maximum=8 * GIB)) >= TOP - GIB


def test_a_plan_keeps_to_the_limit(kernel: FakeKernel) -> None:
    """It finds what adding the blocks would find: no room below, or the same IOVA; a shape's own IOVA may lie above."""
    with nothing_left(kernel), Rig(kernel) as rig, pyvfio.DmaMapper(rig.container, dma_bits=32) as narrow:
        plan = narrow.plan([BlockShape("fits", 0, GIB), BlockShape("does not", 0, 4 * GIB)])
        assert [block.iova is None for block in plan.blocks] == [False, True]
        assert isinstance(plan.shortages[0], pyvfio.IovaRangeError)
        assert "dma_bits=32" in str(plan)
        assert narrow.plan([BlockShape("own", 0, GIB, iova=1 << 40)]).fits
        assert rig.mapper.plan([BlockShape("does not", 0, 4 * GIB)]).fits


@pytest.mark.parametrize(("wrong", "error"), [(16, ValueError), (65, ValueError), ("39", TypeError), (True, TypeError)])
def test_a_limit_that_can_never_be_right_is_refused_before_any_call(
    rig: Rig, kernel: FakeKernel, wrong: int, error: type[Exception]
) -> None:
    """By the container, the mapper and each reservation; a descriptor stays the caller's."""
    kernel.clear_trace()
    for call in (
        lambda: pyvfio.Container(kernel=kernel, dma_bits=wrong),
        lambda: pyvfio.Container.from_fd(rig.container.fd, kernel=kernel, dma_bits=wrong),
        lambda: pyvfio.DmaMapper(rig.container, dma_bits=wrong),
        lambda: rig.container.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0, dma_bits=wrong),
        lambda: rig.container.reserve_and_map(vaddr=PAGE_SIZE, size=PAGE_SIZE, dma_bits=wrong),
    ):
        with pytest.raises(error, match="dma_bits"):
            call()
    assert not kernel.trace
    assert not rig.container.closed


# --------------------------------------------------------------------------------------- a temporary mapping's own IOVA


def test_a_temporary_mapping_at_its_own_iova_follows_one_that_was_closed_there(rig: Rig) -> None:
    """The closed one is unmapped then; an open one is in the way."""
    iova = 1 << 32
    with mmap.mmap(-1, PAGE_SIZE) as one, mmap.mmap(-1, PAGE_SIZE) as two:
        first = rig.mapper.map_temporary(one, iova=iova)
        with pytest.raises(pyvfio.IovaOverlapError):
            rig.mapper.map_temporary(two, iova=iova)
        first.close()
        with rig.mapper.map_temporary(two, iova=iova) as second:
            assert rig.reached() == [(iova, second.vaddr, PAGE_SIZE)]
        with rig.mapper.map_buffer(one, iova=iova) as fixed:
            assert rig.reached() == [(iova, fixed.vaddr, PAGE_SIZE)]
            with rig.mapper.map_temporary(one, iova=iova) as known:
                assert known.iova == iova
            with pytest.raises(ValueError, match="is already mapped at IOVA 0x100000000, and cannot be mapped at"):
                rig.mapper.map_temporary(one, iova=iova + PAGE_SIZE)


def test_an_iova_that_a_block_has_is_in_the_way_whatever_was_closed(rig: Rig) -> None:
    """Temporary mappings elsewhere stay as they are."""
    block = rig.add()
    with mmap.mmap(-1, PAGE_SIZE) as one, mmap.mmap(-1, PAGE_SIZE) as two:
        rig.mapper.map_temporary(one).close()
        before = rig.reached()
        with pytest.raises(pyvfio.IovaOverlapError):
            rig.mapper.map_temporary(two, iova=rig.mapper.iova(block))
        assert rig.reached() == before
        for wrong, error in ((True, TypeError), ("1", TypeError), (-1, ValueError), (1 << 64, ValueError)):
            with pytest.raises(error):
                rig.mapper.map_temporary(two, iova=wrong)  # type: ignore[arg-type]
        rig.mapper.reset_temporary()
