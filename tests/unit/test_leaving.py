"""A block that a list wants to remove, and that stays after all; mappers that are taken out, or collected."""

from __future__ import annotations

import errno
import gc
import itertools
import mmap
from collections.abc import Callable, Iterator
from functools import partial

import pytest

import pyvfio
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, Rig, nothing_left

GRANULES = partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A kernel with a device."""
    with FakeKernel() as made:
        yield made


class Refuses:
    """A notifier that refuses removals while it is told to, and does something first."""

    def __init__(self) -> None:
        self.first: Callable[[], object] | None = None

    def ram_block_removed(self, block: pyvfio.RamBlock, _used_length: int, _max_length: int) -> None:
        """Refuse it."""
        if self.first is not None:
            self.first()
            raise RuntimeError(f"{block.idstr} stays")


def refuse_removal(rig: Rig, block: pyvfio.RamBlock, first: Callable[[], object] = list) -> None:
    """Have a notifier that is asked after the mapper refuse the removal of a block. All is as before."""
    before, iova = rig.reached(), rig.mapper.iova(block)
    refuses = next(each for each in rig.blocks.notifiers if isinstance(each, Refuses))
    refuses.first = first
    with pytest.raises(RuntimeError, match="stays"):
        block.remove()
    refuses.first = None
    assert rig.mapper.iova(block) == iova
    assert set(before) <= set(rig.reached())
    rig.check()


def rig_that_refuses(kernel: FakeKernel, mapper: Callable[..., pyvfio.DmaMapper]) -> Rig:
    """A notifier that is older than the mapper is told of removals after it."""

    def make(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        blocks.add_notifier(Refuses())
        return mapper(container, blocks)

    return Rig(kernel, mapper=make)


@pytest.mark.parametrize("places", [itertools.count(0x1000_0000, 0x100_0000), iter([0x1000_0000])], ids=["new", "once"])
def test_a_block_whose_removal_is_refused_is_not_placed_anew(kernel: FakeKernel, places: Iterator[int]) -> None:
    """A `place` that would say another IOVA, or nothing, is not asked."""
    mapper = partial(pyvfio.DmaMapper, place=lambda _block: next(places))
    with nothing_left(kernel), rig_that_refuses(kernel, mapper) as rig:
        refuse_removal(rig, rig.add())


def test_nobody_gets_the_iova_of_a_block_before_its_removal_is_final(kernel: FakeKernel) -> None:
    """Another mapper of the space maps something while the list asks; afterwards the IOVA is free."""
    with nothing_left(kernel), rig_that_refuses(kernel, pyvfio.DmaMapper) as rig, mmap.mmap(-1, 2 * MIB) as memory:
        block = rig.add()
        iova = rig.mapper.iova(block)
        with pyvfio.DmaMapper(rig.container) as other:
            refuse_removal(rig, block, lambda: other.map_buffer(memory))
            block.remove()
            assert not any(taken.start == iova for taken in rig.container.reserved_iova)


def test_a_block_whose_removal_is_refused_needs_no_mapping_that_it_had_not(kernel: FakeKernel) -> None:
    """Buffers have taken those that it may need later."""
    kernel.dma_entry_limit = 8
    with nothing_left(kernel), rig_that_refuses(kernel, GRANULES) as rig:
        block = rig.add(used=2 * PAGE_SIZE, maximum=6 * PAGE_SIZE)
        buffers = [mmap.mmap(-1, PAGE_SIZE) for _ in range(4)]
        mappings = [rig.mapper.map_buffer(buffer) for buffer in buffers]
        refuse_removal(rig, block)
        for mapping in mappings:
            mapping.close()


def test_a_block_whose_addition_fails_gives_its_iova_back(kernel: FakeKernel) -> None:
    """A notifier that is told later refuses it."""

    class Declines:
        def ram_block_added(self, _block: pyvfio.RamBlock, _used_length: int, _max_length: int) -> None:
            raise RuntimeError("no")

        def ram_block_resized(self, _block: pyvfio.RamBlock, _old_length: int, _new_length: int) -> None:
            """Never called."""

    def make(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        mapper = pyvfio.DmaMapper(container, blocks)
        blocks.add_notifier(Declines())
        return mapper

    with nothing_left(kernel), Rig(kernel, mapper=make) as rig:
        with pytest.raises(RuntimeError, match="no"):
            rig.add()
        assert rig.container.reserved_iova == ()
        rig.check()


def test_a_removal_that_the_kernel_refuses_to_undo_keeps_the_iova(kernel: FakeKernel) -> None:
    """The block is out of reach, its IOVA is nobody's, and it can be removed."""
    with nothing_left(kernel), rig_that_refuses(kernel, pyvfio.DmaMapper) as rig:
        block = rig.add()
        refuses = next(each for each in rig.blocks.notifiers if isinstance(each, Refuses))
        refuses.first = lambda: kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError):
            block.remove()
        refuses.first = None
        assert rig.reached() == []
        assert len(rig.container.reserved_iova) == 1


def test_a_mapper_follows_the_list_that_it_was_made_with_and_no_other(kernel: FakeKernel) -> None:
    """A block of another list is refused, and by a mapper that was made without a list."""
    with nothing_left(kernel), Rig(kernel) as rig, pyvfio.RamBlockList(kernel=kernel) as others:
        with pyvfio.DmaMapper(rig.container) as without:
            for mapper in (rig.mapper, without):
                others.add_notifier(mapper)
                with pytest.raises(ValueError, match="is in another list: a DmaMapper follows only"):
                    others.add("other", used_length=PAGE_SIZE, max_length=MIB)
                others.remove_notifier(mapper)
        block = rig.add()
        rig.blocks.remove_notifier(rig.mapper)
        rig.blocks.add_notifier(rig.mapper)
        assert rig.reached() == [(rig.mapper.iova(block), block.vaddr, block.used_length)]


@pytest.mark.parametrize("temporary", [True, False])
def test_the_memory_of_a_mapper_that_nobody_closed_stays_as_long_as_it_is_mapped(
    kernel: FakeKernel, *, temporary: bool
) -> None:
    """Until the container is closed: the kernel has it mapped."""
    with nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as device:
        with pytest.warns(ResourceWarning, match="was never closed: its memory stays mapped"):
            _use_and_collect(device.container, temporary=temporary)
        assert len(kernel.mappings()) == 1
        kernel.check()


def _use_and_collect(container: pyvfio.Container, *, temporary: bool) -> None:
    mapper = pyvfio.DmaMapper(container)
    mapping = (mapper.map_temporary if temporary else mapper.map_buffer)(mmap.mmap(-1, PAGE_SIZE))
    if temporary:
        mapping.close()
    del mapper, mapping
    gc.collect()


def test_temporary_mappings_that_were_closed_make_room_for_a_block(kernel: FakeKernel) -> None:
    """For its mappings, and at the IOVA that `place` says."""
    kernel.dma_entry_limit = 8
    place = 0x100_0000
    with nothing_left(kernel), Rig(kernel, mapper=partial(GRANULES, place=lambda _block: place)) as rig:
        for number in range(8):
            rig.mapper.map_temporary(mmap.mmap(-1, PAGE_SIZE), iova=place + number * PAGE_SIZE).close()
        block = rig.add(used=PAGE_SIZE, maximum=4 * PAGE_SIZE)
        assert rig.mapper.iova(block) == place
        block.remove()
        rig.mapper.map_temporary(mmap.mmap(-1, PAGE_SIZE), iova=place).close()
        assert rig.mapper.iova(rig.add(used=PAGE_SIZE, maximum=PAGE_SIZE)) == place


def test_a_mapping_with_a_hole_has_no_segments(kernel: FakeKernel) -> None:
    """Mappings that lie partly outside of it count as far as they lie inside."""
    with nothing_left(kernel), Rig(kernel, mapper=partial(pyvfio.DmaMapper, resize="extend")) as rig:
        block = rig.add(used=4 * PAGE_SIZE, maximum=16 * PAGE_SIZE)
        block.resize(16 * PAGE_SIZE)
        mapping = rig.mapper.map_dma(vaddr=block.vaddr + 2 * PAGE_SIZE, size=4 * PAGE_SIZE)
        for nth in (2, 3, 4):
            kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO, nth=nth)
        with pytest.raises(pyvfio.RollbackError):
            block.remap(3 * PAGE_SIZE, PAGE_SIZE)
        with pytest.raises(LookupError, match="not mapped any more"):
            rig.mapper.segments(mapping)
        mapping.close()
