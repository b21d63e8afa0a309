"""The defects of the posted `qemu_vfio_dma_map_resize` (patch 14 of the series), and of its first version.

For each a sentence about a mapper's class. The real one keeps all of them; a copy with exactly that defect put in
breaks its sentence, so that the sentence is known to see it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import pytest

import pyvfio
from pyvfio.dma import DmaMapper
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE, Iova
from tests.unit.fakes import Rig

Sentence = Callable[[FakeKernel, type[DmaMapper]], None]


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A kernel."""
    with FakeKernel() as made:
        yield made


# ------------------------------------------------------------------------------------------------ the sentences


def a_resize_unmaps_the_old_length_and_maps_the_new_one_at_its_iova(
    kernel: FakeKernel, mapper: type[DmaMapper]
) -> None:
    """Arguments in their places: exactly the old mapping goes, exactly the new one comes."""
    with Rig(kernel, mapper=mapper) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        iova = rig.mapper.iova(block)
        kernel.clear_trace()
        block.resize(3 * PAGE_SIZE)
        calls = [(call.request, call.arguments) for call in kernel.trace if call.request.startswith("VFIO_IOMMU")]
        (unmap, unmapped), (map_, mapped) = calls
        assert (unmap, unmapped["iova"], unmapped["size"]) == ("VFIO_IOMMU_UNMAP_DMA", iova, 2 * PAGE_SIZE)
        assert (map_, mapped["iova"], mapped["size"]) == ("VFIO_IOMMU_MAP_DMA", iova, 3 * PAGE_SIZE)
        assert mapped["vaddr"] == block.vaddr
        assert rig.reached() == [(iova, block.vaddr, 3 * PAGE_SIZE)]


def another_thread_goes_on_after_a_resize_of_an_unknown_block(kernel: FakeKernel, mapper: type[DmaMapper]) -> None:
    """Whatever comes of a block that the mapper does not know, its lock is free afterwards."""
    with Rig(kernel, mapper=mapper) as rig:
        known = rig.add()
        with pyvfio.RamBlockList(kernel=kernel) as others:
            stranger = others.add("stranger", used_length=PAGE_SIZE, max_length=MIB)
            with suppress(ValueError):
                rig.mapper.ram_block_resized(stranger, PAGE_SIZE, 2 * PAGE_SIZE)
            another_thread_goes_on(rig, known)


def another_thread_goes_on_after_a_resize_that_was_refused(kernel: FakeKernel, mapper: type[DmaMapper]) -> None:
    """By the kernel, whether the old mapping could be made again or not: the mapper's lock is free afterwards."""
    with Rig(kernel, mapper=mapper) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        for refusals in (1, 2):
            for nth in range(1, refusals + 1):
                kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT, nth=nth)
            with pytest.raises((pyvfio.IoctlError, pyvfio.RollbackError)):
                block.resize(4 * PAGE_SIZE)
            another_thread_goes_on(rig, block)


def another_thread_goes_on(rig: Rig, block: pyvfio.RamBlock) -> None:
    """It gets an answer from the mapper."""
    found: list[Iova] = []
    thread = threading.Thread(target=lambda: found.append(rig.mapper.iova(block)), daemon=True)
    thread.start()
    thread.join(0.5)
    went_on = bool(found)
    while thread.is_alive():  # as often as it was taken
        rig.mapper.guard.lock.release()
        thread.join(0.1)
    assert went_on, "the lock is still held"


def a_map_that_fails_is_heard_of_and_undone(kernel: FakeKernel, mapper: type[DmaMapper]) -> None:
    """The caller gets the error, and the block is as it was, for the process and for the device."""
    with Rig(kernel, mapper=mapper) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        before = rig.reached()
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT)
        with pytest.raises(pyvfio.IoctlError):
            block.resize(4 * PAGE_SIZE)
        assert block.used_length == 2 * PAGE_SIZE
        assert rig.reached() == before
        block.resize(3 * PAGE_SIZE)
        assert rig.reached() == rig.expected()


def a_length_of_nothing_is_a_length_like_others(kernel: FakeKernel, mapper: type[DmaMapper]) -> None:
    """No map of 0 bytes is tried, and a block that grows from nothing is mapped."""
    with Rig(kernel, mapper=mapper) as rig:
        block = rig.add(used=2 * PAGE_SIZE)
        iova = rig.mapper.iova(block)
        block.resize(0)
        assert not rig.reached()
        block.resize(PAGE_SIZE)
        assert rig.reached() == [(iova, block.vaddr, PAGE_SIZE)]
        empty = rig.add("empty", used=0)
        empty.resize(PAGE_SIZE)
        assert rig.reached() == rig.expected()
        assert not any(call.errno for call in kernel.trace)


def a_length_above_the_reserved_one_is_refused_before_any_call(kernel: FakeKernel, mapper: type[DmaMapper]) -> None:
    """Whatever the list may think: beyond lies another block's IOVA."""
    with Rig(kernel, mapper=mapper) as rig:
        block = rig.add(used=PAGE_SIZE, maximum=2 * PAGE_SIZE)
        kernel.clear_trace()
        with pytest.raises(ValueError, match="max_length"):
            rig.mapper.ram_block_resized(block, PAGE_SIZE, 3 * PAGE_SIZE)
        assert not kernel.trace
        assert rig.reached() == rig.expected()


def memory_in_the_tail_of_a_block_gets_no_iova_of_its_own(kernel: FakeKernel, mapper: type[DmaMapper]) -> None:
    """It has one already, for when the block grows; until then it is refused."""
    with Rig(kernel, mapper=mapper) as rig:
        block = rig.add(used=PAGE_SIZE)
        kernel.clear_trace()
        with pytest.raises(ValueError, match="RAM block 'ring'"):
            rig.mapper.map_dma(vaddr=block.vaddr + 2 * PAGE_SIZE, size=PAGE_SIZE)
        assert not kernel.trace
        block.resize(4 * PAGE_SIZE)
        with rig.mapper.map_dma(vaddr=block.vaddr + 2 * PAGE_SIZE, size=PAGE_SIZE) as mapping:
            assert mapping.iova == rig.mapper.iova(block) + 2 * PAGE_SIZE


def the_iova_of_a_block_never_moves(kernel: FakeKernel, mapper: type[DmaMapper]) -> None:
    """Though there is room below it by now; and no resize uses any up."""
    with Rig(kernel, mapper=mapper) as rig:
        below, block = rig.add("below", used=PAGE_SIZE), rig.add(used=PAGE_SIZE)
        rig.add("neighbour", used=PAGE_SIZE)
        below.remove()
        iova, free = rig.mapper.iova(block), rig.container.allocator.free_ranges
        for length in (2 * PAGE_SIZE, 0, MIB, PAGE_SIZE):
            block.resize(length)
            assert rig.mapper.iova(block) == iova
            assert rig.container.allocator.free_ranges == free


# -------------------------------------------------------------------------------------------------- the defects


class SwappedInUnmap(DmaMapper):
    """`qemu_vfio_undo_mapping(s, m->iova, m->size)`, where the signature is (s, size, iova)."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        window = self._window_of(block)
        if old_length:
            self.space.unmap(iova=old_length, size=window.iova)
        if new_length:
            self.space.map(vaddr=window.vaddr, iova=window.iova, size=new_length)


class SwappedInMap(DmaMapper):
    """`qemu_vfio_do_mapping(s, m->host, m->iova, new_size)`, where the signature is (s, host, size, iova)."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        window = self._window_of(block)
        self.space.unmap(iova=window.iova, size=old_length)
        self.space.map(vaddr=window.vaddr, iova=new_length, size=window.iova)


class LockKept(DmaMapper):
    """`if (!m) { return; }` between qemu_mutex_lock and qemu_mutex_unlock."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        self.guard.lock.acquire()
        self._window_of(block)
        super().ram_block_resized(block, old_length, new_length)
        self.guard.lock.release()


class LockKeptByARefusal(DmaMapper):
    """The same where the kernel refuses: nothing comes between the two but what can fail."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        self.guard.lock.acquire()
        super().ram_block_resized(block, old_length, new_length)
        self.guard.lock.release()


class ResultIgnored(DmaMapper):
    """`qemu_vfio_do_mapping(…); m->size = new_size;`"""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        window = self._window_of(block)
        if old_length:
            self.space.unmap(iova=window.iova, size=old_length)
        with suppress(pyvfio.IoctlError):
            self.space.map(vaddr=window.vaddr, iova=window.iova, size=new_length)


class NothingIsMapped(DmaMapper):
    """A new length of 0 goes to the kernel, which says EINVAL."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there; around what refuses 0 before the kernel can."""
        window = self._window_of(block)
        if old_length:
            self.space.unmap(iova=window.iova, size=old_length)
        assert isinstance(self.space, pyvfio.Container)
        self.space.map_dma(vaddr=window.vaddr, iova=window.iova, size=new_length)


class GrowthFromNothingIsLost(DmaMapper):
    """`find_mapping` looks for the range that holds the address, and a range of 0 bytes holds none."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        if old_length:
            super().ram_block_resized(block, old_length, new_length)


class LengthUnchecked(DmaMapper):
    """No comparison of new_size with what was reserved."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        del old_length
        self._change(self._window_of(block), block.state.populated_at(new_length))


class TailUnknown(DmaMapper):
    """`find_mapping` compares with what is mapped, so that the reserved tail of a block is nobody's."""

    def _check_no_block(self, vaddr: int, size: int) -> None:
        """As there."""


class ReservedAnew(DmaMapper):
    """The same, and what was reserved is given back: the block lands where there is room now."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        self.ram_block_removed(block, old_length, block.max_length)
        self.ram_block_gone(block)
        self._former.clear()
        self.ram_block_added(block, new_length, block.max_length)


class RemovedAndAdded(DmaMapper):
    """The first version: a resize was `ram_block_removed` and `ram_block_added`, and low_water_mark only rises."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """As there."""
        self.ram_block_removed(block, old_length, block.max_length)
        self.ram_block_gone(block)
        self._former.clear()
        self.space.reserve_iova(block.max_length, alignment=PAGE_SIZE, offset=0)
        self.ram_block_added(block, new_length, block.max_length)


@dataclass(frozen=True)
class Defect:
    """A sentence, and a mapper that breaks it. `refused`: the words of the kernel or the container where it is one of
    them that refuses the call of the defect; the sentence itself says so elsewhere."""

    mapper: type[DmaMapper]
    sentence: Sentence
    refused: str = ""


DEFECTS = [
    Defect(
        SwappedInUnmap,
        a_resize_unmaps_the_old_length_and_maps_the_new_one_at_its_iova,
        r"IOVA 0x2000-.* cannot be unmapped",
    ),
    Defect(
        SwappedInMap,
        a_resize_unmaps_the_old_length_and_maps_the_new_one_at_its_iova,
        r"MAP_DMA\(.*iova=0x3000, .*EFAULT",
    ),
    Defect(LockKept, another_thread_goes_on_after_a_resize_of_an_unknown_block),
    Defect(LockKeptByARefusal, another_thread_goes_on_after_a_resize_that_was_refused),
    Defect(ResultIgnored, a_map_that_fails_is_heard_of_and_undone),
    Defect(NothingIsMapped, a_length_of_nothing_is_a_length_like_others, r"MAP_DMA\(.*size=0x0, .*EINVAL"),
    Defect(GrowthFromNothingIsLost, a_length_of_nothing_is_a_length_like_others),
    Defect(
        LengthUnchecked, a_length_above_the_reserved_one_is_refused_before_any_call, r"MAP_DMA\(.*size=0x2000, .*EFAULT"
    ),
    Defect(TailUnknown, memory_in_the_tail_of_a_block_gets_no_iova_of_its_own, r"MAP_DMA\(.*iova=0x10000, size=0x1000"),
    Defect(RemovedAndAdded, the_iova_of_a_block_never_moves),
    Defect(ReservedAnew, the_iova_of_a_block_never_moves),
]
SENTENCES = list(dict.fromkeys(defect.sentence for defect in DEFECTS))


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.__name__)
def test_the_mapper_keeps_the_sentence(kernel: FakeKernel, sentence: Sentence) -> None:
    """The real one."""
    sentence(kernel, DmaMapper)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.mapper.__name__)
def test_the_defect_as_posted_breaks_its_sentence(kernel: FakeKernel, defect: Defect) -> None:
    """So that the sentence is known to see it; a mapper that merely does not work would break every sentence."""
    seen: tuple[type[BaseException], ...] = (AssertionError, pytest.fail.Exception)
    with pytest.raises(pyvfio.VfioError if defect.refused else seen, match=defect.refused or None):
        defect.sentence(kernel, defect.mapper)
