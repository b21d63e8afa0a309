"""Cuts of mappings in an I/O address space: what the rest of a mapping keeps, and the calls of a cut."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import pytest

import pyvfio
from pyvfio.iommu.space import Mapping
from pyvfio.testing import DmaFault
from pyvfio.units import PAGE_SIZE, Iova, Vaddr
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, SpecialKernel, requests

IOVA = 0x10_0000
Cut = Literal["pages", "replace"]


@contextmanager
def opened(cut: Cut) -> Iterator[tuple[pyvfio.Ioas, SpecialKernel, int]]:
    """A space with a device, and the address of 64 pages."""
    with SpecialKernel("7.3", iommufd=True) as kernel:
        memory = kernel.mmap(0, 64 * PAGE_SIZE, READ_WRITE, PRIVATE)
        with pyvfio.Ioas(kernel=kernel, cut=cut) as space, pyvfio.open_device(BDF, space=space) as device:
            device.bus_master = True
            yield space, kernel, memory
        kernel.munmap(memory, 64 * PAGE_SIZE)
        kernel.check()


def cut(space: pyvfio.Ioas, *, page: int, pages: int = 1) -> None:
    """As a mapper does."""
    with space.guard.lock:
        space.cut_locked(IOVA + page * PAGE_SIZE, pages * PAGE_SIZE)
    space._check()


def pages_of(space: pyvfio.Ioas) -> list[tuple[int, int]]:
    """The first page and the number of pages of each mapping."""
    return [((each.iova - IOVA) // PAGE_SIZE, each.size // PAGE_SIZE) for each in space.mappings]


def test_a_mapper_that_allows_no_gap_takes_no_space_whose_cuts_move_devices() -> None:
    """Nothing has changed in the space, which serves a mapper that allows a gap."""
    with opened("replace") as (space, kernel, _), pyvfio.RamBlockList(kernel=kernel) as blocks:
        blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=4 * PAGE_SIZE)
        with pytest.raises(ValueError, match="cut='pages'"):
            pyvfio.DmaMapper(space, blocks, resize="cut", allow_gap=False)
        assert not space.mappings
        pyvfio.DmaMapper(space, blocks, resize="cut").close()
    with opened("pages") as (space, kernel, _), pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=4 * PAGE_SIZE)
        with pyvfio.DmaMapper(space, blocks, resize="cut", allow_gap=False):
            block.resize(PAGE_SIZE)
            assert [mapping.size for mapping in space.mappings] == [PAGE_SIZE]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("way", ["pages", "replace"])
def test_the_rest_of_a_mapping_keeps_iova_memory_and_access_through_many_cuts(way: Cut, order: int) -> None:
    """Of a mapping that the device may only read, beside one that the device may write."""
    with opened(way) as (space, kernel, memory):
        for page, write in ((0, False), (32, True))[::order]:
            start = page * PAGE_SIZE
            space.map(vaddr=memory + start, iova=IOVA + start, size=32 * PAGE_SIZE, write=write)
        for page in (8, 24, 31, 16, 40):
            cut(space, page=page)
        cut(space, page=0)
        assert pages_of(space) == [(1, 7), (9, 7), (17, 7), (25, 6), (32, 8), (41, 23)]
        assert all(each.vaddr - memory == each.iova - IOVA for each in space.mappings)
        for page, writes in ((1, False), (9, False), (25, False), (32, True), (41, True)):
            assert kernel.dma_read(BDF, IOVA + page * PAGE_SIZE, 4) == bytes(4)
            with nullcontext() if writes else pytest.raises(DmaFault, match="does not allow"):
                kernel.dma_write(BDF, IOVA + page * PAGE_SIZE, b"word")


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("made", ["by address", "by descriptor", "by a copy of shared memory", "adopted"])
def test_a_cut_leaves_the_access_to_the_rest_however_the_mapping_was_made(made: str, *, write: bool) -> None:
    """By replacing, where the rest is mapped anew: with more access a device could write to memory that it may not."""
    with opened("replace") as (space, kernel, memory):
        other, fd = pyvfio.Ioas(shares_with=space), kernel.memfd_create("file", 0)
        kernel.ftruncate(fd, 4 * PAGE_SIZE)
        access = 3 if write else 1
        with other, pyvfio.open_device(OTHER_BDF, space=other), space.guard.lock:
            if made == "by a copy of shared memory":
                other.map(vaddr=memory, iova=IOVA, size=4 * PAGE_SIZE)
                space.map(vaddr=memory, iova=IOVA, size=4 * PAGE_SIZE, write=write)
                assert requests(kernel.trace)[-1] == "IOMMU_IOAS_COPY"
            elif made == "by descriptor":
                space.map_file_locked((fd, 0), memory, IOVA, 4 * PAGE_SIZE, access)
                assert requests(kernel.trace)[-1] == "IOMMU_IOAS_MAP_FILE"
            elif made == "adopted":
                mapping = Mapping(Iova(IOVA), 4 * PAGE_SIZE, Vaddr(memory))
                assert space.adopt(mapping, write=write) is False, "the kernel does not have the mapping"
                assert space.mappings == ()
                space.iommufd.ioas_map(space.id, vaddr=memory, size=4 * PAGE_SIZE, iova=IOVA, write=write)
                assert space.adopt(mapping, write=write) is True
            else:
                space.map(vaddr=memory, iova=IOVA, size=4 * PAGE_SIZE, write=write)
        kernel.close(fd)
        cut(space, page=1)
        assert pages_of(space) == [(0, 1), (2, 2)]
        for page in (0, 2, 3):
            assert kernel.dma_read(BDF, IOVA + page * PAGE_SIZE, 4) == bytes(4)
            with nullcontext() if write else pytest.raises(DmaFault, match="does not allow"):
                kernel.dma_write(BDF, IOVA + page * PAGE_SIZE, b"word")


@pytest.mark.parametrize("way", ["pages", "replace"])
def test_one_cut_can_take_the_end_of_one_mapping_and_the_begin_of_the_next(way: Cut) -> None:
    """And mappings between them as a whole."""
    with opened(way) as (space, kernel, memory):
        for page, pages in ((0, 4), (4, 4), (8, 4)):
            start = page * PAGE_SIZE
            space.map(vaddr=memory + start, iova=IOVA + start, size=pages * PAGE_SIZE, write=page != 8)
        cut(space, page=2, pages=8)
        assert pages_of(space) == [(0, 2), (10, 2)]
        with pytest.raises(DmaFault, match="does not allow"):
            kernel.dma_write(BDF, IOVA + 10 * PAGE_SIZE, b"word")


def test_a_copy_has_one_call_for_mappings_without_a_gap_and_of_one_access() -> None:
    """Each copy is a walk of page tables in the kernel."""
    with opened("replace") as (space, kernel, memory):
        for page in range(12):
            start = page * PAGE_SIZE
            space.map(vaddr=memory + start, iova=IOVA + start + (page >= 9) * PAGE_SIZE, size=PAGE_SIZE, write=page < 6)
        space.map(vaddr=memory, iova=IOVA + 16 * PAGE_SIZE, size=2 * PAGE_SIZE)
        kernel.clear_trace()
        cut(space, page=16)
        assert requests(kernel.trace).count("IOMMU_IOAS_COPY") == 4, "pages 0, 6, 10 and 17, with those behind them"
        assert pages_of(space) == [*((page, 1) for page in (*range(9), 10, 11, 12)), (17, 1)]
        for page in (0, 5, 6, 8, 10, 12, 17):
            with nullcontext() if page < 6 or page == 17 else pytest.raises(DmaFault, match="does not allow"):
                kernel.dma_write(BDF, IOVA + page * PAGE_SIZE, b"word")


def test_a_cut_by_pages_is_two_calls() -> None:
    """The space is chosen each time, since another user of the iommufd can have chosen another one."""
    with opened("pages") as (space, kernel, memory):
        space.map(vaddr=memory, iova=IOVA, size=8 * PAGE_SIZE)
        kernel.trace.clear()
        cut(space, page=2)
        assert [call.request for call in kernel.trace] == ["IOMMU_VFIO_IOAS", "VFIO_IOMMU_UNMAP_DMA"]


def test_after_an_unmap_that_failed_in_the_middle_the_table_is_what_the_kernel_has() -> None:
    """An unmap of several mappings is not atomic: a driver of the kernel that uses one of them refuses that one."""
    with opened("pages") as (space, kernel, memory):
        for page in range(3):
            space.map(vaddr=memory + page * PAGE_SIZE, iova=IOVA + page * PAGE_SIZE, size=PAGE_SIZE)
        space.iommufd.ioas_unmap(space.id, iova=IOVA, size=PAGE_SIZE)  # as the call that fails below does first
        kernel.fail(call="ioctl", request="IOMMU_IOAS_UNMAP", errno=errno.EBUSY)
        with pytest.raises(pyvfio.UnmapSizeError, match=r"IOMMU_IOAS_UNMAP .* unmapped 0x1000") as caught:
            space.unmap(iova=IOVA, size=3 * PAGE_SIZE)
        assert "EBUSY" in str(caught.value.__cause__)
        assert pages_of(space) == [(1, 1), (2, 1)]
        space._check()
        space.unmap(iova=IOVA + PAGE_SIZE, size=2 * PAGE_SIZE)


def test_an_unmap_that_failed_after_it_was_made_is_made_and_one_that_was_not_names_what_is_there() -> None:
    """The kernel is asked for each mapping of the range, and for none below."""
    with opened("pages") as (space, kernel, memory):
        space.map(vaddr=memory, iova=IOVA // 2, size=PAGE_SIZE)
        for page in range(2):
            space.map(vaddr=memory, iova=IOVA + page * PAGE_SIZE, size=PAGE_SIZE)
        kernel.fail(call="ioctl", request="IOMMU_IOAS_UNMAP", errno=errno.EBUSY)
        with pytest.raises(pyvfio.IoctlError, match=f"EBUSY, {space.guard.what}: ") as raised:
            space.unmap(iova=IOVA, size=2 * PAGE_SIZE)
        assert raised.value.arguments == {"iova": IOVA, "size": 2 * PAGE_SIZE}
        assert raised.value.hint == "The mappings in this range are: 0x100000-0x100fff, 0x101000-0x101fff"
        assert pages_of(space)[1:] == [(0, 1), (1, 1)]
        kernel.fail(call="ioctl", request="IOMMU_IOAS_UNMAP", errno=errno.EINTR, after=True)
        kernel.clear_trace()
        space.unmap(iova=IOVA, size=2 * PAGE_SIZE)
        assert requests(kernel.trace) == ["IOMMU_IOAS_UNMAP", "IOMMU_IOAS_COPY", "IOMMU_IOAS_COPY"]
        assert [(each.iova, each.size) for each in space.mappings] == [(IOVA // 2, PAGE_SIZE)]
        assert len(kernel.mappings(BDF)) == 1
        space.unmap_all()


@pytest.mark.parametrize("request_", ["IOMMU_VFIO_IOAS", "VFIO_IOMMU_UNMAP_DMA"])
def test_a_cut_by_pages_that_is_refused_changes_nothing_and_names_the_call(request_: str) -> None:
    """And the mappings in the range."""
    with opened("pages") as (space, kernel, memory):
        space.map(vaddr=memory, iova=IOVA // 2, size=PAGE_SIZE)
        space.map(vaddr=memory, iova=IOVA, size=4 * PAGE_SIZE)
        kernel.fail(call="ioctl", request=request_, errno=errno.EBUSY)
        with pytest.raises(pyvfio.IoctlError, match="EBUSY") as raised:
            cut(space, page=1, pages=2)
        assert raised.value.request == request_
        assert raised.value.arguments == {"iova": IOVA + PAGE_SIZE, "size": 2 * PAGE_SIZE}
        assert raised.value.hint == "The mappings in this range are: 0x100000-0x103fff"
        assert pages_of(space)[1:] == [(0, 4)]
        assert [each.size for each in kernel.mappings(BDF)] == [PAGE_SIZE, 4 * PAGE_SIZE]
        space.unmap_all()


def test_after_a_cut_that_found_less_the_table_is_what_the_kernel_has() -> None:
    """Another holder of the descriptor has unmapped a part: neither that part nor the cut one is mapped any more."""
    with opened("pages") as (space, _, memory):
        space.map(vaddr=memory, iova=IOVA // 2, size=PAGE_SIZE)
        for page in (0, 4, 8):
            space.map(vaddr=memory + page * PAGE_SIZE, iova=IOVA + page * PAGE_SIZE, size=4 * PAGE_SIZE, write=page < 8)
        space.iommufd.ioas_unmap(space.id, iova=IOVA + 4 * PAGE_SIZE, size=4 * PAGE_SIZE)
        with pytest.raises(pyvfio.UnmapSizeError) as caught:
            cut(space, page=2, pages=6)
        assert (caught.value.asked, caught.value.unmapped) == (6 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert "Known mappings in this range: 0x100000-0x103fff, 0x104000-0x107fff. " in caught.value.hint
        assert pages_of(space)[1:] == [(0, 2), (8, 4)]
        assert list(space._less_access) == [IOVA + 8 * PAGE_SIZE], "that of the mapping behind the cut"
        assert space.unmap_all() == 7 * PAGE_SIZE


def test_a_cut_by_pages_that_took_nothing_away_leaves_the_table_as_it_was() -> None:
    """The kernel is asked for each mapping of the range, and what it has is the truth."""
    with opened("pages") as (space, kernel, memory):
        space.map(vaddr=memory, iova=IOVA, size=4 * PAGE_SIZE)
        space.map(vaddr=memory + 4 * PAGE_SIZE, iova=IOVA + 4 * PAGE_SIZE, size=4 * PAGE_SIZE, write=False)
        kernel.fall_short_at(1)
        with pytest.raises(pyvfio.UnmapSizeError) as caught:
            cut(space, page=2, pages=4)
        assert (caught.value.iova, caught.value.asked, caught.value.unmapped) == (
            IOVA + 2 * PAGE_SIZE,
            4 * PAGE_SIZE,
            0,
        )
        assert pages_of(space) == [(0, 4), (4, 4)]
        cut(space, page=2, pages=4)
        assert pages_of(space) == [(0, 2), (6, 2)]
