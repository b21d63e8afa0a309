"""DmaMapper on a fake kernel: what is reserved, mapped, looked up, recycled, and what is left after failures."""

from __future__ import annotations

import ctypes
import errno
import gc
import logging
import mmap
import os
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, Interrupt, Rig, SpecialKernel, nothing_left, requests, small_iommu
from tests.unit.processes import in_child

if TYPE_CHECKING:
    from _typeshed import TraceFunction


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


# ------------------------------------------------------------------------------------------------------- blocks


def test_a_block_is_mapped_as_long_as_it_is_and_reserved_as_long_as_it_may_be(rig: Rig) -> None:
    """`used_length` is reached, `max_length` of IOVA is nobody else's."""
    block = rig.add(used=2 * PAGE_SIZE, maximum=GIB)
    iova = rig.mapper.iova(block)
    assert rig.reached() == [(iova, block.vaddr, 2 * PAGE_SIZE)]
    assert rig.container.allocator.reservations == (pyvfio.IovaRange.of(iova=iova, size=GIB),)


def test_a_block_lies_where_large_pages_can_be_used(rig: Rig) -> None:
    """Its IOVA is congruent to its vaddr modulo 2 MiB, also behind a smaller one."""
    rig.add("small", used=PAGE_SIZE, maximum=PAGE_SIZE)
    block = rig.add("large", maximum=GIB)
    assert (rig.mapper.iova(block) - block.vaddr) % (2 * MIB) == 0


@pytest.mark.parametrize("size", [2 * MIB, 4 * MIB])
def test_a_buffer_of_a_large_page_lies_where_large_pages_can_be_used(rig: Rig, size: int) -> None:
    """As a block does, also beside a smaller buffer."""
    for way in (rig.mapper.map_buffer, rig.mapper.map_temporary):
        with way(mmap.mmap(-1, PAGE_SIZE)), way(mmap.mmap(-1, size)) as large:
            assert (large.iova - large.vaddr) % (2 * MIB) == 0


@pytest.mark.parametrize("iommu_type", [ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU], ids=["v1", "v2"])
def test_a_resize_is_an_unmap_and_a_map_at_the_same_iova(kernel: FakeKernel, iommu_type: ioctls.VfioExtension) -> None:
    """Through every kind of length, with nothing in between."""
    with nothing_left(kernel), Rig(kernel, iommu_type=iommu_type) as rig:
        block = rig.add(used=0)
        iova = rig.mapper.iova(block)
        for old, new in pairwise((0, 2, 1, MIB // PAGE_SIZE, 0, 3)):
            kernel.clear_trace()
            block.resize(new * PAGE_SIZE)
            assert rig.mapper.iova(block) == iova
            assert rig.reached() == rig.expected() == [(iova, block.vaddr, new * PAGE_SIZE)] * bool(new)
            made = [name for name in requests(kernel.trace) if name.startswith("VFIO")]
            assert made == ["VFIO_IOMMU_UNMAP_DMA"] * bool(old) + ["VFIO_IOMMU_MAP_DMA"] * bool(new)
            rig.check()


def test_a_map_that_is_refused_leaves_the_old_mapping(rig: Rig) -> None:
    """The error is the kernel's, and the device still reaches what it reached."""
    block = rig.add(used=2 * PAGE_SIZE)
    before = rig.reached()
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT)
    with pytest.raises(pyvfio.IoctlError) as caught:
        block.resize(4 * PAGE_SIZE)
    assert caught.value.errno == errno.EFAULT
    assert (block.used_length, rig.reached()) == (2 * PAGE_SIZE, before)


@pytest.mark.parametrize("new", [4, 1], ids=["grow", "shrink"])
def test_when_the_old_mapping_cannot_be_made_again_memory_is_kept_and_the_next_resize_heals(rig: Rig, new: int) -> None:
    """RollbackError says that the device reaches nothing of the block."""
    block = rig.add(used=2 * PAGE_SIZE)
    iova = rig.mapper.iova(block)
    ctypes.memset(block.vaddr, 7, 2 * PAGE_SIZE)
    for nth in (1, 2):
        rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=nth, errno=errno.EFAULT)
    rig.kernel.clear_trace()
    with pytest.raises(pyvfio.RollbackError, match="not be mapped any more") as caught:
        block.resize(new * PAGE_SIZE)
    assert [error.errno for error in caught.value.exceptions if isinstance(error, OSError)] == [errno.EFAULT] * 2
    assert not {"munmap", "madvise", "mmap"} & set(requests(rig.kernel.trace)), "no memory is given back"
    assert block.used_length == 2 * PAGE_SIZE
    assert ctypes.string_at(block.vaddr, 2 * PAGE_SIZE) == b"\7" * 2 * PAGE_SIZE
    assert rig.reached() == []
    with pytest.raises(LookupError):
        rig.mapper.translate_vaddr(block.vaddr)
    rig.check()
    block.resize(3 * PAGE_SIZE)
    assert rig.reached() == [(iova, block.vaddr, 3 * PAGE_SIZE)]


def test_a_block_whose_mapping_was_lost_can_be_removed(rig: Rig) -> None:
    """Nothing is to be unmapped then."""
    block = rig.add()
    for nth in (1, 2):
        rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=nth, errno=errno.EFAULT)
    with pytest.raises(pyvfio.RollbackError):
        block.resize(PAGE_SIZE)
    block.remove()
    assert not rig.container.allocator.reservations


def test_memory_is_not_given_back_when_the_kernel_unmaps_another_number_of_bytes(rig: Rig) -> None:
    """Somebody has unmapped it behind the mapper's back: what the device reaches is not known any more."""
    block = rig.add(used=2 * PAGE_SIZE)
    unmap = ioctls.vfio_iommu_type1_dma_unmap(24, 0, rig.mapper.iova(block), 2 * PAGE_SIZE)
    rig.kernel.ioctl(rig.container.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, unmap)
    rig.kernel.clear_trace()
    with pytest.raises(pyvfio.UnmapSizeError, match=r"asked for 0x2000 bytes .* unmapped 0x0") as caught:
        block.resize(PAGE_SIZE)
    assert (caught.value.asked, caught.value.unmapped) == (2 * PAGE_SIZE, 0)
    assert not {"munmap", "mmap"} & set(requests(rig.kernel.trace))
    assert block.used_length == 2 * PAGE_SIZE
    assert rig.reached() == rig.expected()  # the undo has mapped it again


def test_a_block_that_is_refused_leaves_no_iova_behind(rig: Rig) -> None:
    """Neither reserved nor mapped, and the list has it not."""
    rig.kernel.memlock_limit = PAGE_SIZE
    with pytest.raises(pyvfio.PinLimitError):
        rig.add(used=2 * PAGE_SIZE)
    assert not rig.container.allocator.reservations
    assert not rig.reached()
    assert not len(rig.blocks)


def test_a_removed_block_gives_its_iova_to_the_next(rig: Rig) -> None:
    """Nothing is used up by blocks that come and go."""
    block = rig.add()
    iova = rig.mapper.iova(block)
    block.remove()
    assert rig.reached() == []
    assert rig.mapper.iova(rig.add("next")) == iova


def test_the_removal_of_a_block_that_is_not_followed_is_nothing(rig: Rig) -> None:
    """Nothing of it is reached, and a removal that a signal handler ended at its end must not be stuck for ever."""
    block = rig.add()
    reached = rig.reached()
    with pyvfio.RamBlockList(kernel=rig.kernel) as others:
        stranger = others.add("stranger", used_length=PAGE_SIZE, max_length=MIB)
        rig.mapper.ram_block_removed(stranger, PAGE_SIZE, MIB)
    assert rig.reached() == reached
    assert rig.mapper.translate_vaddr(block.vaddr) == rig.mapper.iova(block)


def test_the_caller_may_choose_the_iova_of_each_block(kernel: SpecialKernel) -> None:
    """`place` is asked; None leaves it to the mapper; what cannot be is refused with what is there."""
    places = {"high": 5 * GIB, "again": 5 * GIB + 4 * PAGE_SIZE}
    with nothing_left(kernel), Rig(kernel) as rig:
        rig.mapper.close()
        with pyvfio.DmaMapper(rig.container, rig.blocks, place=lambda block: places.get(block.idstr)) as mapper:
            assert mapper.iova(rig.add("high")) == 5 * GIB
            assert mapper.iova(rig.add("anywhere")) != 5 * GIB
            with pytest.raises(pyvfio.IovaOverlapError) as caught:
                rig.add("again")
            assert caught.value.existing == (pyvfio.IovaRange.of(iova=5 * GIB, size=MIB),)


def test_a_late_mapper_gets_the_blocks_that_exist(rig: Rig) -> None:
    """As long as they are, at IOVAs of its own."""
    blocks = [rig.add("one"), rig.add("two", used=0), rig.add("three", used=PAGE_SIZE)]
    with pyvfio.DmaMapper(rig.container, rig.blocks) as late:
        reached = rig.reached()
        for block in blocks:
            assert ((late.iova(block), block.vaddr, block.used_length) in reached) == bool(block.used_length)
            assert late.iova(block) != rig.mapper.iova(block)
        late._check()
    assert rig.reached() == rig.expected()


def test_a_late_mapper_that_cannot_map_one_of_the_blocks_follows_none(rig: Rig) -> None:
    """What it had mapped of the others is unmapped."""
    for number in range(3):
        rig.add(f"b{number}")
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=3, errno=errno.ENOMEM)
    reservations = rig.container.allocator.reservations
    with pytest.raises(pyvfio.PinLimitError):
        pyvfio.DmaMapper(rig.container, rig.blocks)
    assert rig.reached() == rig.expected()
    assert rig.container.allocator.reservations == reservations


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_mapper_that_leaves_unmaps_everything(rig: Rig, count: int) -> None:
    """Blocks, mappings of the caller's own, temporary ones, given up or not: odd and even numbers of each."""
    buffers = [mmap.mmap(-1, PAGE_SIZE) for _ in range(2 * count)]
    for number in range(count):
        rig.add(f"b{number}")
        rig.mapper.map_buffer(buffers[number])
        temporary = rig.mapper.map_temporary(buffers[count + number])
        if number % 2:
            temporary.close()
    assert len(rig.reached()) == 3 * count
    entries = rig.container.entries_left
    rig.mapper.close()
    assert rig.reached() == []
    assert rig.container.entries_left == entries + 3 * count
    assert not rig.container.allocator.reservations
    for buffer in buffers:
        buffer.close()
    rig.mapper.close()
    with pytest.raises(pyvfio.ClosedError):
        rig.mapper.map_dma(vaddr=0x10000, size=PAGE_SIZE)


def test_a_mapper_that_left_is_not_told_of_anything_more(rig: Rig) -> None:
    """Blocks live on without it."""
    block = rig.add()
    rig.mapper.close()
    block.resize(4 * PAGE_SIZE)
    rig.add("another")
    assert rig.reached() == []


def test_closing_a_mapper_can_be_tried_again(rig: Rig) -> None:
    """What could not be unmapped stays known, the rest is gone."""
    memory = rig.memory(2 * PAGE_SIZE)
    for number in range(2):
        rig.mapper.map_dma(vaddr=memory + number * PAGE_SIZE, size=PAGE_SIZE)
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError):
        rig.mapper.close()
    assert len(rig.reached()) == 1
    rig.mapper.close()
    assert rig.reached() == []
    rig.free(memory, 2 * PAGE_SIZE)


def test_two_mappers_in_two_containers_follow_the_same_list(kernel: SpecialKernel) -> None:
    """Each device reaches what is in use, and one mapper's refusal leaves both as they were."""
    with (
        nothing_left(kernel),
        Rig(kernel) as rig,
        pyvfio.open_device(OTHER_BDF, kernel=kernel) as other,
        pyvfio.DmaMapper(other.container, rig.blocks) as mapper,
    ):
        block = rig.add(used=2 * PAGE_SIZE)
        for length in (4, 1, 0, 3):
            block.resize(length * PAGE_SIZE)
            for bdf, follows in ((BDF, rig.mapper), (OTHER_BDF, mapper)):
                reached = [(m.iova, m.vaddr, m.size) for m in kernel.mappings(bdf)]
                iova = follows.iova(block)
                assert reached == ([(iova, block.vaddr, length * PAGE_SIZE)] if length else [])
        before = kernel.mappings()
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=errno.EFAULT)  # the older mapper's
        with pytest.raises(pyvfio.IoctlError):
            block.resize(5 * PAGE_SIZE)
        assert kernel.mappings() == before
        assert block.used_length == 3 * PAGE_SIZE


class _Refuses:
    """A notifier that refuses what it is told to."""

    def __init__(self) -> None:
        self.refuses = False

    def ram_block_removed(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """When told to."""
        del block, used_length, max_length
        if self.refuses:
            raise ValueError("refused")


def test_a_block_that_comes_back_finds_its_iova(rig: Rig) -> None:
    """After the undo of a removal, and when a mapper leaves the list and comes again."""
    refuses = _Refuses()
    rig.mapper.close()
    rig.blocks.add_notifier(refuses)
    rig.mapper = pyvfio.DmaMapper(rig.container, rig.blocks)
    rig.add("first")
    block = rig.add("second", used=PAGE_SIZE)
    iova = rig.mapper.iova(block)
    rig.blocks["first"].remove()
    refuses.refuses = True
    with pytest.raises(ValueError, match="refused"):
        block.remove()
    assert rig.mapper.iova(block) == iova
    assert rig.reached() == [(iova, block.vaddr, PAGE_SIZE)]
    rig.blocks.remove_notifier(rig.mapper)
    rig.blocks.add_notifier(rig.mapper)
    assert rig.mapper.iova(block) == iova
    refuses.refuses = False


def test_a_resize_that_is_not_remap_does_not_exist() -> None:
    """ValueError, before anything."""
    with pytest.raises(ValueError, match="remap"):
        pyvfio.DmaMapper(pyvfio.Container.__new__(pyvfio.Container), resize="other")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ look-ups


def test_addresses_are_found_both_ways_when_all_of_the_range_is_mapped(rig: Rig) -> None:
    """From the first byte to the last, and not one byte more."""
    block = rig.add(used=2 * PAGE_SIZE)
    iova, mapper = rig.mapper.iova(block), rig.mapper
    for offset, size in ((0, 1), (0, 2 * PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE), (2 * PAGE_SIZE - 1, 1)):
        assert mapper.translate_vaddr(block.vaddr + offset, size) == iova + offset
        assert mapper.translate_iova(iova + offset, size) == block.vaddr + offset
    for offset, size in ((-1, 1), (0, 2 * PAGE_SIZE + 1), (2 * PAGE_SIZE, 1), (2 * PAGE_SIZE - 1, 2), (-1, 2)):
        with pytest.raises(LookupError):
            mapper.translate_vaddr(block.vaddr + offset, size)
        with pytest.raises(LookupError):
            mapper.translate_iova(iova + offset, size)


@pytest.mark.long
def test_a_look_up_takes_hardly_more_steps_among_many_mappings_than_among_few(rig: Rig) -> None:
    """Of blocks, of buffers and of what the kernel has: found by bisection, as the lines that are run say."""
    buffers = rig.memory(2 * 256 * PAGE_SIZE)
    taken = []
    for number in range(256):
        rig.add(str(number), used=PAGE_SIZE, maximum=PAGE_SIZE)
        rig.mapper.map_dma(vaddr=buffers + 2 * number * PAGE_SIZE, size=PAGE_SIZE)
        if number in (3, 255):
            wanted = (rig.blocks["2"].vaddr, buffers + 2 * 2 * PAGE_SIZE)
            taken.append([lines_run(partial(rig.mapper.translate_vaddr, vaddr)) for vaddr in wanted])
            taken[-1] += [lines_run(partial(rig.container.mapping_at, rig.mapper.translate_vaddr(v))) for v in wanted]
    assert all(many <= few + 100 for few, many in zip(*taken, strict=True)), taken


def lines_run(action: Callable[[], object]) -> int:
    """How many lines of Python an action takes, calls and returns included."""
    count, before = 0, sys.gettrace()

    def trace(_frame: FrameType, _event: str, _argument: object) -> TraceFunction:
        nonlocal count
        count += 1
        return trace

    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("size", [0, -1])
def test_a_look_up_of_no_bytes_is_a_mistake(rig: Rig, size: int) -> None:
    """It would find addresses that nothing is mapped at."""
    block = rig.add()
    with pytest.raises(ValueError, match="at least 1 byte"):
        rig.mapper.translate_vaddr(block.vaddr + MIB, size)
    with pytest.raises(ValueError, match="at least 1 byte"):
        rig.mapper.translate_iova(rig.mapper.iova(block) + MIB, size)


def test_a_range_over_two_neighbouring_mappings_is_not_found(rig: Rig) -> None:
    """Their IOVAs need not be neighbours."""
    memory = rig.memory(2 * PAGE_SIZE)
    one = rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
    two = rig.mapper.map_dma(vaddr=memory + PAGE_SIZE, size=PAGE_SIZE)
    assert rig.mapper.translate_vaddr(memory + PAGE_SIZE, PAGE_SIZE) == two.iova
    with pytest.raises(LookupError):
        rig.mapper.translate_vaddr(memory, 2 * PAGE_SIZE)
    one.close()
    two.close()
    rig.free(memory, 2 * PAGE_SIZE)


def test_the_iova_of_a_block_of_another_list_is_refused(rig: Rig) -> None:
    """By its name."""
    with pyvfio.RamBlockList(kernel=rig.kernel) as others:
        stranger = others.add("stranger", used_length=0, max_length=MIB)
        with pytest.raises(ValueError, match="does not follow RAM block 'stranger'"):
            rig.mapper.iova(stranger)


# -------------------------------------------------------------------------------------------- mappings of one's own


def test_memory_of_ones_own_is_reached_until_the_mapping_is_closed(rig: Rig) -> None:
    """Data goes both ways; then the IOVA is free again."""
    memory = rig.memory()
    with rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE) as mapping:
        rig.kernel.dma_write(BDF, mapping.iova + 5, b"hello")
        assert ctypes.string_at(memory + 5, 5) == b"hello"
        assert rig.mapper.translate_iova(mapping.iova + 5) == memory + 5
        assert f"{mapping.iova:#x}" in repr(mapping)
    mapping.close()
    assert rig.reached() == []
    assert not rig.container.allocator.reservations
    rig.free(memory)


@pytest.mark.parametrize(("read", "write"), [(True, False), (False, True)], ids=["read", "write"])
def test_the_device_may_do_what_the_mapping_says(rig: Rig, *, read: bool, write: bool) -> None:
    """READ and WRITE of VFIO_IOMMU_MAP_DMA, however the memory is mapped."""
    memory, pages = rig.memory(), _pages(2)
    with (
        rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE, read=read, write=write),
        rig.mapper.map_buffer(pages[0], read=read, write=write),
        rig.mapper.map_temporary(pages[1], read=read, write=write),
    ):
        assert [mapping.flags for mapping in rig.kernel.mappings()] == [read + 2 * write] * 3
    rig.mapper.reset_temporary()
    rig.free(memory)


def test_without_a_word_the_device_may_read_and_write(rig: Rig) -> None:
    """Memory that is mapped in whichever way."""
    memory, pages = rig.memory(), _pages(2)
    with (
        rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE),
        rig.mapper.map_buffer(pages[0]),
        rig.mapper.map_temporary(pages[1]),
    ):
        assert [mapping.flags for mapping in rig.kernel.mappings()] == [3, 3, 3]
    rig.mapper.reset_temporary()
    rig.free(memory)


def test_after_a_change_that_was_made_the_next_one_looks_at_the_difference_alone(rig: Rig) -> None:
    """What is mapped is known again."""
    block = rig.add("ring", used=PAGE_SIZE)
    for pages in (2, 1, 0, 3):
        block.resize(pages * PAGE_SIZE)
        assert [window.settled for _block, window in rig.mapper.windows()] == [True]


def test_a_debug_log_has_each_mapping_that_is_made_and_taken_away(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """And nothing else of them is logged."""
    page = _pages(1)[0]
    for level, count in ((logging.DEBUG, 1), (logging.INFO, 0)):
        caplog.clear()
        with caplog.at_level(level, logger="pyvfio"), rig.mapper.map_buffer(page) as mapping:
            made = f"mapped iova={mapping.iova:#x} vaddr={mapping.vaddr:#x} size=0x1000"
        assert sum(made in record.message for record in caplog.records) == count
        gone = f"unmapped iova={mapping.iova:#x} size=0x1000"
        assert sum(gone in record.message for record in caplog.records) == count


def test_a_log_that_raises_gives_no_iova_back_that_is_mapped(rig: Rig) -> None:
    """As a filter of the program's may."""

    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError(record.msg)

    logger, page = logging.getLogger("pyvfio.iommu.iova_space"), _pages(1)[0]
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addFilter(refuse)
    try:
        with pytest.raises(ValueError, match="mapped iova"):
            rig.mapper.map_buffer(page)
    finally:
        logger.removeFilter(refuse)
        logger.setLevel(level)
    (mapping,), (taken,) = rig.container.mappings, rig.container.reserved_iova
    assert mapping.iova == taken.start
    rig.container.unmap_and_release(iova=mapping.iova, size=mapping.size, vaddr=mapping.vaddr)


def test_a_log_that_raises_behind_a_grow_leaves_the_block_and_its_mappings_as_they_were(rig: Rig) -> None:
    """Under "extend", too, where one piece is mapped without a plan."""

    def refuse(record: logging.LogRecord) -> bool:
        if record.msg.startswith("mapped"):
            raise ValueError(record.msg)
        return True

    with pyvfio.RamBlockList(kernel=rig.kernel) as blocks, pyvfio.DmaMapper(rig.container, blocks, resize="extend"):
        ring = blocks.add("grows", used_length=PAGE_SIZE, max_length=8 * PAGE_SIZE)
        before, logger = rig.container.mappings, logging.getLogger("pyvfio.iommu.iova_space")
        level = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addFilter(refuse)
        try:
            with pytest.raises(ValueError, match="mapped iova"):
                ring.resize(2 * PAGE_SIZE)
        finally:
            logger.removeFilter(refuse)
            logger.setLevel(level)
        assert (ring.used_length, rig.container.mappings) == (PAGE_SIZE, before)
        ring.resize(2 * PAGE_SIZE)
        assert len(rig.container.mappings) == len(before) + 1


def test_a_buffer_that_does_not_begin_at_a_page_is_refused_with_its_place(rig: Rig) -> None:
    """Whichever way it is to be mapped."""
    memory = mmap.mmap(-1, 3 * PAGE_SIZE)
    vaddr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with memoryview(memory)[8 : 8 + PAGE_SIZE] as view:
        for use in (rig.mapper.map_buffer, rig.mapper.map_temporary):
            with pytest.raises(ValueError, match=f"vaddr {vaddr + 8:#x} and size {PAGE_SIZE:#x} must be"):
                use(view)


def test_a_mapper_whose_close_was_refused_still_keeps_what_open_mappings_have(rig: Rig) -> None:
    """It follows its list as before."""
    block = rig.add("ring", used=2 * PAGE_SIZE)
    held = rig.mapper.map_dma(vaddr=block.vaddr, size=PAGE_SIZE)
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError):
        rig.mapper.close()
    with pytest.raises(BufferError, match="is open"):
        block.remove()
    held.close()
    block.remove()


def test_a_block_for_which_temporary_mappings_are_recycled_lies_as_others_do(rig: Rig) -> None:
    """Congruent to its address modulo 2 MiB, so that the IOMMU can use large pages."""
    rig.mapper.map_temporary(mmap.mmap(-1, 6 * MIB)).close()
    taken = [rig.container.reserve_iova_at(free.start, free.size) for free in rig.container.allocator.free_ranges]
    block = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB)
    assert (rig.mapper.iova(block) - block.vaddr) % (2 * MIB) == 0
    for iova in taken:
        rig.container.release_iova(iova)


def test_memory_that_is_mapped_already_has_the_iova_that_it_has(rig: Rig) -> None:
    """Without a call, also for a part of it; closing the second changes nothing."""
    memory = rig.memory(4 * PAGE_SIZE)
    block = rig.add(used=2 * PAGE_SIZE)
    first = rig.mapper.map_dma(vaddr=memory, size=4 * PAGE_SIZE)
    reached = rig.reached()
    rig.kernel.clear_trace()
    again = rig.mapper.map_dma(vaddr=memory + PAGE_SIZE, size=2 * PAGE_SIZE)
    inside = rig.mapper.map_dma(vaddr=block.vaddr + PAGE_SIZE, size=PAGE_SIZE)
    assert again.iova == first.iova + PAGE_SIZE
    assert inside.iova == rig.mapper.iova(block) + PAGE_SIZE
    again.close()
    inside.close()
    assert not rig.kernel.trace
    assert rig.reached() == reached
    first.close()
    rig.free(memory, 4 * PAGE_SIZE)


def test_memory_that_is_mapped_for_less_access_is_not_said_to_be_mapped(rig: Rig) -> None:
    """The device would be stopped at what the caller was promised."""
    memory = rig.memory(2 * PAGE_SIZE)
    with rig.mapper.map_dma(vaddr=memory, size=2 * PAGE_SIZE, write=False) as mapping:
        with pytest.raises(ValueError, match="with less access than was asked for"):
            rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
        with pytest.raises(ValueError, match="with less access than was asked for"):
            rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE, read=False)
        with rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE, write=False) as part:
            assert part.iova == mapping.iova
    rig.free(memory, 2 * PAGE_SIZE)


@pytest.mark.parametrize(
    ("offset", "size"), [(2, 1), (1, 2), (255, 1), (-1, 2)], ids=["tail", "across", "last page", "before"]
)
def test_memory_that_reaches_into_a_block_and_is_not_in_use_is_refused(rig: Rig, offset: int, size: int) -> None:
    """It has an IOVA already, for when the block grows to it, and would get a second one."""
    block = rig.add(used=2 * PAGE_SIZE)
    rig.kernel.clear_trace()
    with pytest.raises(ValueError, match="reaches into RAM block 'ring'"):
        rig.mapper.map_dma(vaddr=block.vaddr + offset * PAGE_SIZE, size=size * PAGE_SIZE)
    assert not rig.kernel.trace


def map_beside(mapper: pyvfio.DmaMapper, block: pyvfio.RamBlock) -> None:
    """Map the page before a block, and the one behind its reserved memory. ValueError if they count as the block's."""
    for vaddr in (block.vaddr - PAGE_SIZE, block.vaddr + block.max_length):
        with suppress(pyvfio.IoctlError):  # often there is no memory
            mapper.map_dma(vaddr=vaddr, size=PAGE_SIZE).close()


def test_memory_beside_a_block_does_not_belong_to_the_block(rig: Rig) -> None:
    """However long it is."""
    block = rig.add(used=0)
    map_beside(rig.mapper, block)
    block.resize(MIB)
    map_beside(rig.mapper, block)


def test_memory_that_is_mapped_in_part_is_refused(rig: Rig) -> None:
    """From either side."""
    memory = rig.memory(4 * PAGE_SIZE)
    with rig.mapper.map_dma(vaddr=memory + PAGE_SIZE, size=2 * PAGE_SIZE):
        for offset, size in ((0, 2), (2, 2), (0, 4)):
            with pytest.raises(ValueError, match="overlaps <mapped memory"):
                rig.mapper.map_dma(vaddr=memory + offset * PAGE_SIZE, size=size * PAGE_SIZE)
        rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE).close()
        rig.mapper.map_dma(vaddr=memory + 3 * PAGE_SIZE, size=PAGE_SIZE).close()
    rig.free(memory, 4 * PAGE_SIZE)


def test_the_caller_may_choose_the_iova_of_a_mapping_once(rig: Rig) -> None:
    """Memory that has one does not get another."""
    memory = rig.memory()
    with rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE, iova=7 * GIB) as mapping:
        assert mapping.iova == 7 * GIB
        with rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE, iova=7 * GIB) as again:
            assert again.iova == 7 * GIB
        with pytest.raises(ValueError, match="is already mapped at IOVA 0x1c0000000"):
            rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE, iova=8 * GIB)
    rig.free(memory)


@pytest.mark.parametrize(
    ("vaddr", "size"),
    [
        (1, PAGE_SIZE),
        (PAGE_SIZE, 1),
        (PAGE_SIZE, 0),
        (PAGE_SIZE, -PAGE_SIZE),
        (-PAGE_SIZE, PAGE_SIZE),
        (1 << 64, PAGE_SIZE),
    ],
)
def test_what_can_never_be_mapped_is_refused_before_any_call(rig: Rig, vaddr: int, size: int) -> None:
    """Misaligned, empty, negative, behind the end of all addresses."""
    rig.kernel.clear_trace()
    with pytest.raises(ValueError, match="multiples of 0x1000"):
        rig.mapper.map_dma(vaddr=vaddr, size=size)
    assert not rig.kernel.trace


def test_a_mapping_that_fails_leaves_nothing_behind(rig: Rig) -> None:
    """No IOVA, no entry; the memory can be mapped at once."""
    memory = rig.memory()
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT)
    with pytest.raises(pyvfio.IoctlError):
        rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
    assert not rig.container.allocator.reservations
    rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE).close()
    rig.free(memory)


def test_a_mapping_that_cannot_be_unmapped_stays(rig: Rig) -> None:
    """It is still reached, known, and can be closed once more."""
    memory = rig.memory()
    mapping = rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError):
        mapping.close()
    assert rig.mapper.translate_vaddr(memory) == mapping.iova
    mapping.close()
    assert rig.reached() == []
    rig.free(memory)


# ---------------------------------------------------------------------------------------------------- buffers


def test_a_buffer_is_kept_exported_until_it_is_unmapped(rig: Rig) -> None:
    """An mmap cannot be closed, nor an array or a bytearray resized, while the device reaches it."""
    area = mmap.mmap(-1, 2 * PAGE_SIZE)
    mapping = rig.mapper.map_buffer(area)
    with pytest.raises(BufferError):
        area.close()
    with pytest.raises(BufferError):
        area.resize(PAGE_SIZE)
    rig.kernel.dma_write(BDF, mapping.iova, b"device")
    assert area[:6] == b"device"
    mapping.close()
    area.close()


def test_a_bytearray_cannot_be_resized_while_part_of_it_is_mapped(rig: Rig) -> None:
    """Through a memoryview of the pages in it."""
    backing = bytearray(2 * PAGE_SIZE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(backing)) % PAGE_SIZE
    with memoryview(backing) as whole, whole[start : start + PAGE_SIZE] as page:
        mapping = rig.mapper.map_buffer(page)
    with pytest.raises(BufferError):
        backing.extend(b"more")
    mapping.close()
    backing.extend(b"more")


def test_numpy_arrays_are_mapped_where_they_are(rig: Rig) -> None:
    """Of any type of number."""
    backing = np.zeros(PAGE_SIZE // 4 * 3, dtype=np.uint32)
    start = -backing.ctypes.data % PAGE_SIZE // 4
    page = backing[start : start + PAGE_SIZE // 4]
    with rig.mapper.map_buffer(page.data) as mapping:
        assert (mapping.vaddr, mapping.size) == (page.ctypes.data, PAGE_SIZE)
        rig.kernel.dma_write(BDF, mapping.iova + 4, b"\1\0\0\0")
    assert page[1] == 1


def test_a_buffer_that_cannot_be_mapped_is_let_go(rig: Rig) -> None:
    """At once, also while the error is at hand."""
    for use in (rig.mapper.map_buffer, rig.mapper.map_temporary):
        area = mmap.mmap(-1, PAGE_SIZE)
        rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT)
        with pytest.raises(pyvfio.IoctlError):
            use(area)
        area.close()


@pytest.mark.parametrize(
    "buffer",
    [
        pytest.param(bytes(PAGE_SIZE), id="read-only"),
        pytest.param(memoryview(bytearray(2 * PAGE_SIZE))[::2], id="with gaps"),
        pytest.param(np.zeros((64, 64), dtype=np.uint8, order="F"), id="column by column"),
        pytest.param(bytearray(), id="empty"),
    ],
)
def test_buffers_that_are_no_plain_memory_are_refused(rig: Rig, buffer: memoryview) -> None:
    """Before any call."""
    rig.kernel.clear_trace()
    for use in (rig.mapper.map_buffer, rig.mapper.map_temporary):
        with pytest.raises(ValueError, match="writable, contiguous and not empty"):
            use(buffer)
    assert not rig.kernel.trace


def test_a_buffer_that_is_not_whole_pages_is_refused_and_let_go(rig: Rig) -> None:
    """An IOMMU maps pages: the device would reach the neighbours."""
    backing = bytearray(PAGE_SIZE + 1)
    for use in (rig.mapper.map_buffer, rig.mapper.map_temporary):
        with pytest.raises(ValueError, match="multiples"):
            use(backing)
    backing.append(0)


# ------------------------------------------------------------------------------------------------- temporary ones


def _pages(count: int) -> list[mmap.mmap]:
    return [mmap.mmap(-1, PAGE_SIZE) for _ in range(count)]


@pytest.mark.parametrize("refuser", ["kernel", "listener"])
def test_what_a_failed_undo_left_in_reach_is_not_given_back_when_the_next_grow_is_refused(
    kernel: SpecialKernel, refuser: str
) -> None:
    """That grow leaves all as it was; the next that succeeds puts it in order."""
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)) as rig:
        block = rig.add(used=0)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=errno.EFAULT)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EINVAL)
        with pytest.raises(pyvfio.RollbackError):
            block.resize(2 * PAGE_SIZE)
        assert rig.reached() == [(rig.mapper.iova(block), block.vaddr, PAGE_SIZE)]
        if refuser == "kernel":
            kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT)
            with pytest.raises(pyvfio.IoctlError):
                block.resize(2 * PAGE_SIZE)
        else:
            rig.blocks.add_notifier(_Refuser())
            with pytest.raises(ZeroDivisionError):
                block.resize(2 * PAGE_SIZE)
            rig.blocks.remove_notifier(rig.blocks.notifiers[0])
        kernel.check()
        block.resize(3 * PAGE_SIZE)
        rig.check()
        assert [size for _iova, _vaddr, size in rig.reached()] == 3 * [PAGE_SIZE]
        with block.view() as view:
            assert bytes(view) == bytes(3 * PAGE_SIZE)


class _Refuser:
    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:  # noqa: ARG002
        raise ZeroDivisionError


def test_temporary_mappings_come_from_the_top_down(rig: Rig) -> None:
    """So that they do not come between blocks."""
    top = rig.container.iova_ranges[-1].last + 1
    mappings = [rig.mapper.map_temporary(page) for page in _pages(3)]
    assert [mapping.iova for mapping in mappings] == [top - (number + 1) * PAGE_SIZE for number in range(3)]


def test_a_temporary_mapping_that_is_given_up_stays_until_the_reset(rig: Rig) -> None:
    """Reached, exported; after the reset neither, and the reset says how many are still open."""
    pages = _pages(2)
    given_up, held = (rig.mapper.map_temporary(page) for page in pages)
    given_up.close()
    given_up.close()
    assert len(rig.reached()) == 2
    with pytest.raises(BufferError):
        pages[0].close()
    assert rig.mapper.reset_temporary() == 1
    assert [iova for iova, _vaddr, _size in rig.reached()] == [held.iova]
    pages[0].close()
    held.close()
    assert rig.mapper.reset_temporary() == 0
    assert rig.mapper.reset_temporary() == 0


def test_a_temporary_mapping_that_outlives_its_mapper_is_closed_and_nothing_else(rig: Rig) -> None:
    """The mapper has unmapped the memory, whose IOVA another mapper uses meanwhile."""
    (page, other) = _pages(2)
    mapping = rig.mapper.map_temporary(page)
    rig.mapper.close()
    with pyvfio.DmaMapper(rig.container) as late, late.map_temporary(other) as same:
        assert same.iova == mapping.iova
        mapping.close()
        assert mapping.closed
        rig.mapper._check()
        assert rig.mapper.reset_temporary() == 0
        assert [iova for iova, _vaddr, _size in rig.reached()] == [same.iova]


def test_a_temporary_mapping_is_closed_while_another_thread_holds_its_mapper(rig: Rig) -> None:
    """The close takes no lock. The next reset unmaps the memory."""
    (page,) = _pages(1)
    mapping = rig.mapper.map_temporary(page)
    with rig.mapper.guard.lock:
        closer = threading.Thread(target=mapping.close)
        closer.start()
        closer.join(10)
        assert mapping.closed
    rig.mapper._check()
    assert rig.mapper.reset_temporary() == 0
    assert rig.reached() == []


@pytest.mark.parametrize("count", [1, 64])
def test_a_child_that_closes_a_temporary_mapping_changes_nothing(rig: Rig, count: int) -> None:
    """Not even its own copy."""
    mappings = [rig.mapper.map_temporary(page) for page in _pages(count)]
    if (pid := os.fork()) == 0:
        for mapping in mappings:
            mapping.close()
        os._exit(sum(mapping.closed for mapping in mappings))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert rig.mapper.reset_temporary() == count


def test_neighbouring_temporary_mappings_are_unmapped_in_one_call(rig: Rig) -> None:
    """One call for each run between those that are still open."""
    mappings = [rig.mapper.map_temporary(page) for page in _pages(7)]
    for number in (0, 1, 2, 4, 5):
        mappings[number].close()
    rig.kernel.clear_trace()
    assert rig.mapper.reset_temporary() == 2
    unmaps = [(call.arguments["iova"], call.arguments["size"]) for call in rig.kernel.trace]
    assert unmaps == [(mappings[2].iova, 3 * PAGE_SIZE), (mappings[5].iova, 2 * PAGE_SIZE)]


def test_a_reset_that_fails_keeps_what_it_could_not_unmap(rig: Rig) -> None:
    """Known, exported, and unmapped by the next one."""
    mappings = [rig.mapper.map_temporary(page) for page in _pages(3)]
    mappings[0].close()
    mappings[2].close()
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", nth=2, errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError):
        rig.mapper.reset_temporary()
    assert len(rig.reached()) == 2
    assert rig.mapper.reset_temporary() == 1
    assert len(rig.reached()) == 1


@pytest.mark.parametrize(
    ("number", "refusal"), [(errno.ENOMEM, pyvfio.PinLimitError), (errno.ENOSPC, pyvfio.EntryLimitError)]
)
@pytest.mark.parametrize("kind", ["add", "grow", "map_dma", "map_temporary"])
def test_temporary_mappings_are_recycled_once_when_there_is_no_room(
    rig: Rig, number: int, refusal: type[pyvfio.IoctlError], kind: str
) -> None:
    """And the map is tried once more; a second refusal is final."""
    memory, block = rig.memory(2 * PAGE_SIZE), rig.add("block", used=PAGE_SIZE)
    page = _pages(1)[0]
    uses: dict[str, Callable[[int], object]] = {
        "add": lambda turn: rig.add(f"new {turn}"),
        "grow": lambda turn: block.resize((turn + 2) * PAGE_SIZE),
        "map_dma": lambda turn: rig.mapper.map_dma(vaddr=memory + turn * PAGE_SIZE, size=PAGE_SIZE),
        "map_temporary": lambda _turn: rig.mapper.map_temporary(page),
    }
    for turn, times in enumerate((1, 2)):
        rig.mapper.map_temporary(_pages(1)[0]).close()
        for nth in range(1, times + 1):
            rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=nth, errno=number)
        rig.kernel.clear_trace()
        if times == 1:
            uses[kind](turn)
        else:
            with pytest.raises(refusal):
                uses[kind](turn)
        made = [name for name in requests(rig.kernel.trace) if name.startswith("VFIO")]
        assert made[kind == "grow" :][:3] == ["VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA", "VFIO_IOMMU_MAP_DMA"]
        rig.check()
    rig.mapper.close()
    rig.free(memory, 2 * PAGE_SIZE)


def test_temporary_mappings_are_recycled_when_no_iova_is_left(rig: Rig) -> None:
    """Before anything is mapped: what is there was given up, and its IOVA is had again."""
    given_up, page = _pages(2)
    mapping = rig.mapper.map_temporary(given_up)
    mapping.close()
    taken = [rig.container.reserve_iova_at(free.start, free.size) for free in rig.container.allocator.free_ranges]
    assert rig.mapper.map_temporary(page).iova == mapping.iova
    with pytest.raises(pyvfio.IovaRangeError, match="no 4 KiB of IOVA are left"):
        rig.mapper.map_temporary(_pages(1)[0])
    for iova in taken:
        rig.container.release_iova(iova)


def test_without_temporary_mappings_to_recycle_the_first_refusal_is_final(rig: Rig) -> None:
    """Those that are open are not touched."""
    held = rig.mapper.map_temporary(_pages(1)[0])
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOSPC)
    with pytest.raises(pyvfio.EntryLimitError):
        rig.mapper.map_temporary(_pages(1)[0])
    assert [iova for iova, _vaddr, _size in rig.reached()] == [held.iova]


def test_other_refusals_recycle_nothing(rig: Rig) -> None:
    """Room is not what is missing."""
    rig.mapper.map_temporary(_pages(1)[0]).close()
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT)
    with pytest.raises(pyvfio.IoctlError):
        rig.mapper.map_temporary(_pages(1)[0])
    assert len(rig.reached()) == 1


def test_the_iova_of_an_open_mapping_is_refused_and_only_closed_ones_make_way(rig: Rig) -> None:
    """Those that lie there. Others stay, as after any refusal."""
    pages, two = _pages(3), mmap.mmap(-1, 2 * PAGE_SIZE)
    rig.mapper.map_temporary(pages[0]).close()
    with rig.mapper.map_temporary(pages[1], iova=GIB) as held:
        for way in (rig.mapper.map_buffer, rig.mapper.map_temporary):
            with pytest.raises(pyvfio.IovaOverlapError) as caught:
                way(two, iova=GIB - PAGE_SIZE)
            assert [taken.start for taken in caught.value.existing] == [held.iova]
        assert len(rig.reached()) == 2
        rig.mapper.map_temporary(pages[2], iova=GIB - PAGE_SIZE).close()
        with pytest.raises(pyvfio.IovaOverlapError):
            rig.mapper.map_buffer(two, iova=GIB - PAGE_SIZE)
        assert [iova for iova, _vaddr, _size in rig.reached()] == [held.iova]
    with rig.mapper.map_buffer(two, iova=GIB - PAGE_SIZE) as mapping:
        assert [iova for iova, _vaddr, _size in rig.reached()] == [mapping.iova]


def test_full_containers_take_temporary_mappings_without_end(kernel: SpecialKernel) -> None:
    """With no failure arranged: the entry limit alone."""
    with FakeKernel(iommu=small_iommu(3)) as small, nothing_left(small), Rig(small) as rig:
        rig.add()
        for page in _pages(9):
            rig.mapper.map_temporary(page).close()
        assert len(rig.reached()) <= 3
        rig.check()


# ------------------------------------------------------------------------------------------------------ interrupts


def test_an_interrupt_after_a_long_map_leaves_nothing_mapped(kernel: SpecialKernel, rig: Rig) -> None:
    """A signal handler that raises does so when the kernel's call returns, and by then all is mapped."""
    memory = rig.memory()
    kernel.interrupt_at(1, after=True)
    with pytest.raises(Interrupt):
        rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
    assert rig.reached() == []
    assert not rig.container.allocator.reservations
    rig.free(memory)


def test_an_interrupt_after_a_long_unmap_is_made_good(kernel: SpecialKernel, rig: Rig) -> None:
    """The block is mapped again, as long as it was, and the next resize works."""
    block = rig.add(used=2 * PAGE_SIZE)
    before = rig.reached()
    kernel.interrupt_at(1, after=True)
    with pytest.raises(Interrupt):
        block.resize(PAGE_SIZE)
    assert (rig.reached(), block.used_length) == (before, 2 * PAGE_SIZE)
    block.resize(PAGE_SIZE)
    assert rig.reached() == rig.expected()


# ------------------------------------------------------------------------------------------- processes and memory


def test_in_a_forked_child_nothing_is_unmapped_and_closing_does_nothing(rig: Rig) -> None:
    """Closes are silent there; anything else is ForkedError."""
    block, memory = rig.add(), rig.memory(2 * PAGE_SIZE)
    mapping = rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
    temporary = rig.mapper.map_temporary(_pages(1)[0])
    temporary.close()
    reached = rig.reached()

    uses: list[Callable[[], object]] = [
        lambda: rig.mapper.map_dma(vaddr=memory + PAGE_SIZE, size=PAGE_SIZE),
        rig.mapper.reset_temporary,
        lambda: block.resize(PAGE_SIZE),
    ]

    def child() -> None:
        for use in uses:
            with pytest.raises(pyvfio.ForkedError):
                use()
        mapping.close()
        rig.mapper.close()
        rig.blocks.close()
        rig.device.close()

    assert in_child(child) == 0
    assert rig.reached() == reached
    rig.mapper.close()
    rig.free(memory, 2 * PAGE_SIZE)


@pytest.mark.long
def test_a_mapping_costs_at_most_300_bytes(rig: Rig) -> None:
    """Handle, allocator, table and every number in them, as tracemalloc counts them over thousands of mappings."""
    count = 2_000
    memory = rig.memory(count * PAGE_SIZE)
    for number in range(count, count - 100, -1):  # what is allocated once
        rig.mapper.map_dma(vaddr=memory + (number - 1) * PAGE_SIZE, size=PAGE_SIZE)
    filters = (
        tracemalloc.Filter(inclusive=False, filename_pattern="*/testing/*"),
        tracemalloc.Filter(inclusive=False, filename_pattern="<string>"),  # the fake's named tuples, made by exec
        tracemalloc.Filter(inclusive=False, filename_pattern=tracemalloc.__file__),
    )
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.take_snapshot().filter_traces(filters)
    for number in range(count - 100):
        rig.mapper.map_dma(vaddr=memory + number * PAGE_SIZE, size=PAGE_SIZE)
        rig.kernel.clear_trace()
    gc.collect()
    after = tracemalloc.take_snapshot().filter_traces(filters)
    tracemalloc.stop()
    used = sum(difference.size_diff for difference in after.compare_to(before, "filename"))
    print(f"{used / (count - 100):.0f} bytes a mapping")
    assert used / (count - 100) <= 300
    rig.device.close()
    rig.mapper.close()
    rig.free(memory, count * PAGE_SIZE)


def is_free(lock: threading.RLock) -> bool:
    """Whether another thread can take it."""

    def take() -> bool:
        taken = lock.acquire(blocking=False)
        if taken:
            lock.release()
        return taken

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(take).result()


@pytest.mark.parametrize("refused", [None, "VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"])
def test_after_each_call_other_threads_can_use_the_space(rig: Rig, refused: str | None) -> None:
    """Whether the kernel has refused the call or not."""
    pages, block = _pages(2), rig.add()
    calls: list[Callable[[], object]] = [
        lambda: block.resize(4 * PAGE_SIZE),
        lambda: block.discard(0, PAGE_SIZE),
        lambda: block.populate(0, PAGE_SIZE),
        lambda: block.remap(0, PAGE_SIZE),
        lambda: block.resize(PAGE_SIZE),
        lambda: rig.mapper.map_buffer(pages[0]).close(),
        lambda: rig.mapper.map_temporary(pages[1]).close(),
        rig.mapper.reset_temporary,
        rig.mapper.close,
    ]
    for call in calls:
        if refused is not None:
            rig.kernel.fail(call="ioctl", request=refused, errno=errno.EIO)
        with suppress(pyvfio.VfioError):
            call()
        assert is_free(rig.space.guard.lock)
        rig.kernel.clear_failures()


def test_what_is_no_address_space_or_no_list_of_blocks_is_refused_at_once(rig: Rig) -> None:
    """A device in place of its container is the likeliest mistake."""
    with pytest.raises(TypeError, match=r"such as device\.space, not Device"):
        pyvfio.DmaMapper(rig.device)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a RamBlockList, not list"):
        pyvfio.DmaMapper(rig.device.container, [])  # type: ignore[arg-type]


def test_a_mapper_that_is_closed_says_so(rig: Rig) -> None:
    """Also when it is asked for an IOVA."""
    block = rig.blocks.add("ram", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
    rig.mapper.close()
    with pytest.raises(pyvfio.ClosedError):
        rig.mapper.iova(block)


def test_what_a_grow_left_in_reach_whose_undo_failed_is_memory_that_is_kept(kernel: SpecialKernel) -> None:
    """The block is as it was, and its next resize sets things right."""
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)) as rig:
        block = rig.add(used=PAGE_SIZE)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=3, errno=errno.EIO)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError):
            block.resize(4 * PAGE_SIZE)
        assert (block.used_length, len(rig.reached())) == (PAGE_SIZE, 3)
        rig.check()
        block.resize(2 * PAGE_SIZE)
        assert rig.reached() == [
            (rig.mapper.iova(block) + offset, block.vaddr + offset, PAGE_SIZE) for offset in (0, PAGE_SIZE)
        ]
        rig.check()


def test_a_mapper_that_was_taken_out_of_the_list_closes_all_the_same(kernel: SpecialKernel) -> None:
    """Somebody else has removed the notifier."""
    with Rig(kernel) as rig:
        rig.add()
        rig.blocks.remove_notifier(rig.mapper)
        assert rig.reached() == []
        rig.mapper.close()


@pytest.mark.parametrize("wrong", [{"progress": 5}, {"place": 5}])
def test_what_is_to_be_called_must_be_callable(kernel: SpecialKernel, wrong: dict[str, int]) -> None:
    """Said when the mapper is made, not when it is needed."""
    with Rig(kernel) as rig, pytest.raises(TypeError, match="must be callable"):
        pyvfio.DmaMapper(rig.container, **wrong)  # type: ignore[arg-type]


def test_a_list_on_another_kernel_is_refused(rig: Rig) -> None:
    """The device could not reach its memory."""
    with pyvfio.RamBlockList() as blocks, pytest.raises(ValueError, match="pass the same kernel= to both"):
        pyvfio.DmaMapper(rig.container, blocks)
    with FakeKernel() as other, pyvfio.RamBlockList(kernel=other) as blocks, pytest.raises(ValueError, match="kernel="):
        pyvfio.DmaMapper(rig.container, blocks)


def test_numbers_of_numpy_are_numbers_and_the_answers_are_plain_ints(rig: Rig) -> None:
    """Whatever their width: a sum of two does not wrap."""
    memory, block = rig.memory(), rig.add()
    mapper = rig.mapper
    with mapper.map_dma(vaddr=np.uint64(memory), size=np.uint16(PAGE_SIZE), iova=np.uint64(7 * GIB)) as mapping:
        answers = [mapping.vaddr, mapping.iova, mapping.size]
        answers += [mapper.translate_vaddr(np.uint64(memory), np.int8(1)), mapper.translate_iova(np.uint64(7 * GIB))]
        assert answers == [memory, 7 * GIB, PAGE_SIZE, 7 * GIB, memory]
        assert all(type(answer) is int for answer in answers)
    with pytest.raises(ValueError, match="must be multiples"):
        mapper.map_dma(vaddr=np.uint64(1 << 63), size=np.uint64((1 << 64) - PAGE_SIZE))
    planned = mapper.plan([pyvfio.BlockShape("new", np.uint16(PAGE_SIZE), np.uint32(MIB), np.uint64(8 * GIB))])  # type: ignore[arg-type]
    assert (planned.locked, planned.locked_most, planned.blocks[0].iova) == (PAGE_SIZE, MIB, 8 * GIB)
    assert {type(number) for number in (planned.locked_most, planned.blocks[0].iova)} == {int}
    late = pyvfio.DmaMapper(
        rig.container,
        rig.blocks,
        resize="extend",
        granule=np.uint16(PAGE_SIZE),  # type: ignore[arg-type]
        prefault=np.int8(1),  # type: ignore[arg-type]
        place=lambda _block: np.uint64(9 * GIB),  # type: ignore[arg-type, return-value]
    )
    assert (late.iova(block), type(late.iova(block)), type(late.policy.granule)) == (9 * GIB, int, int)
    late.close()
    rig.free(memory)


@pytest.mark.parametrize(
    "use",
    [
        lambda mapper, _page: mapper.iova(5),
        lambda mapper, _page: mapper.iova("ring"),
        lambda mapper, _page: mapper.iova(None),
        lambda mapper, _page: mapper.map_dma(vaddr=None, size=PAGE_SIZE),
        lambda mapper, _page: mapper.map_dma(vaddr=0x10000, size="page"),
        lambda mapper, _page: mapper.map_dma(vaddr=0x10000, size=4096.0),
        lambda mapper, _page: mapper.map_dma(vaddr=0x10000, size=PAGE_SIZE, iova="high"),
        lambda mapper, page: mapper.map_buffer(page, iova=1.0),
        lambda mapper, _page: mapper.map_buffer(5),
        lambda mapper, _page: mapper.map_temporary(None),
        lambda mapper, _page: mapper.translate_vaddr("there"),
        lambda mapper, _page: mapper.translate_iova(0, "all"),
        lambda mapper, _page: mapper.plan(["ring"]),
        lambda mapper, _page: mapper.plan([pyvfio.BlockShape("ring", "1", 2)]),  # type: ignore[arg-type]
        lambda mapper, _page: pyvfio.DmaMapper(mapper.space, resize=5),  # type: ignore[arg-type]
        lambda mapper, _page: pyvfio.DmaMapper(mapper.space, resize="extend", granule="4 KiB"),  # type: ignore[arg-type]
        lambda mapper, _page: pyvfio.DmaMapper(mapper.space, resize="extend", allow_gap="no"),  # type: ignore[arg-type]
        lambda mapper, _page: pyvfio.DirtyTracking(mapper),
        lambda mapper, _page: pyvfio.DirtyTracking(mapper.space).read(iova="all", size=1),  # type: ignore[arg-type]
    ],
)
def test_an_argument_of_the_wrong_class_is_a_type_error(
    rig: Rig, use: Callable[[pyvfio.DmaMapper, mmap.mmap], object]
) -> None:
    """Before anything is mapped, and a buffer is not exported any more."""
    page = mmap.mmap(-1, PAGE_SIZE)
    with pytest.raises(TypeError):
        use(rig.mapper, page)
    page.close()
    assert not rig.container.mappings


def test_what_is_seen_of_a_mapper_is_hexadecimal_and_says_what_matters(rig: Rig) -> None:
    """In a debugger, or in an error."""
    page = mmap.mmap(-1, PAGE_SIZE)
    mapping = rig.mapper.map_buffer(page, iova=0x10000)
    rig.mapper.map_temporary(mmap.mmap(-1, PAGE_SIZE))
    rig.add()
    assert repr(rig.mapper) == "<DmaMapper remap: 1 block, 1 buffer, 1 temporary>"
    with pyvfio.DmaMapper(rig.container, resize="extend", granule=PAGE_SIZE) as other:
        assert repr(other) == "<DmaMapper extend granule=0x1000: 0 blocks, 0 buffers, 0 temporary>"
    assert repr(other) == "<DmaMapper closed>"
    assert repr(mapping) == f"<DmaMapping vaddr={mapping.vaddr:#x} iova=0x10000 size=0x1000>"
    mapping.close()
    assert repr(mapping) == f"<DmaMapping vaddr={mapping.vaddr:#x} iova=0x10000 size=0x1000 closed>"
    with pyvfio.DirtyTracking(rig.container) as tracking:
        assert repr(tracking) == f"<DirtyTracking page_size=0x1000 of {rig.container!r}>"
    assert repr(tracking) == f"<DirtyTracking closed page_size=0x1000 of {rig.container!r}>"
    assert repr(pyvfio.IovaRange.of(iova=0x10000, size=0x1000)) == "IovaRange(start=0x10000, last=0x10fff)"


def test_a_signal_in_a_reset_comes_behind_it(kernel: SpecialKernel, rig: Rig) -> None:
    """And nothing of it is left over."""
    pages = _pages(2)
    first, second = (rig.mapper.map_temporary(page) for page in pages)
    first.close()
    kernel.interrupt_at(1, after=False)
    with pytest.raises(Interrupt):
        rig.mapper.reset_temporary()
    assert [iova for iova, _vaddr, _size in rig.reached()] == [second.iova]
    second.close()
    assert rig.mapper.reset_temporary() == 0
    for page in pages:
        page.close()


@pytest.mark.parametrize("kind", ["map_dma", "map_buffer", "map_temporary"])
def test_a_signal_while_memory_is_mapped_leaves_no_mapping_that_nobody_has(
    kernel: SpecialKernel, rig: Rig, kind: str
) -> None:
    """It comes when the call ends, and the object that nobody receives is closed."""
    page, memory = mmap.mmap(-1, PAGE_SIZE), rig.memory()
    kernel.interrupt_at(1, after=True)
    make = {
        "map_dma": partial(rig.mapper.map_dma, vaddr=memory, size=PAGE_SIZE),
        "map_buffer": partial(rig.mapper.map_buffer, page),
        "map_temporary": partial(rig.mapper.map_temporary, page),
    }[kind]
    with pytest.raises(Interrupt):
        make()
    assert len(rig.reached()) == (kind == "map_temporary")
    assert rig.mapper.reset_temporary() == 0
    assert not rig.container.allocator.reservations
    page.close()
    rig.free(memory)


def test_a_signal_between_two_pieces_of_a_block_is_a_refusal(kernel: SpecialKernel) -> None:
    """No piece behind it is mapped, and those before it are unmapped again."""
    with nothing_left(kernel), Rig(kernel, mapper=partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)) as rig:
        block = rig.add(used=PAGE_SIZE)
        before = rig.reached()
        calls = 2 + 1  # mprotect and the first map come before it
        kernel.interrupt_at(calls, after=True)
        kernel.clear_trace()
        with pytest.raises(Interrupt):
            block.resize(9 * PAGE_SIZE)
        assert requests(kernel.trace).count("VFIO_IOMMU_MAP_DMA") < 8
        assert (rig.reached(), block.used_length) == (before, PAGE_SIZE)
        rig.check()


def test_the_close_of_a_mapper_takes_the_lock_of_its_list_first(rig: Rig) -> None:
    """Another thread that changes a block holds that one when it comes to the mapper's."""
    block, entered, left = rig.add(), threading.Event(), threading.Event()

    class Waits:
        def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
            del block, old_length, new_length
            entered.set()
            left.wait()

    rig.blocks.add_notifier(Waits())
    changer = threading.Thread(target=block.resize, args=(MIB,))
    changer.start()
    entered.wait()
    closer = threading.Thread(target=rig.mapper.close)
    closer.start()
    closer.join(0.1)
    left.set()
    changer.join()
    closer.join()
    assert (block.used_length, rig.reached()) == (MIB, [])


def test_memory_of_a_block_that_is_being_removed_is_not_mapped_again(rig: Rig) -> None:
    """A hook that runs when the mapper has left the block finds it refused: the memory is about to go."""
    found: list[str] = []

    class Late:
        def ram_block_removed(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
            del used_length, max_length
            try:
                rig.mapper.map_dma(vaddr=block.state.start, size=PAGE_SIZE)
            except ValueError as error:
                found.append(str(error))
            map_beside(rig.mapper, block)

    with pyvfio.RamBlockList(kernel=rig.kernel) as blocks:
        blocks.add_notifier(Late())
        with pyvfio.DmaMapper(rig.container, blocks) as mapper:
            rig.mapper, before = mapper, rig.mapper
            blocks.add("leaving", used_length=PAGE_SIZE, max_length=PAGE_SIZE).remove()
            rig.mapper = before
    assert len(found) == 1
    assert "being removed" in found[0]
