"""What is left of a change whose undo has failed, and that an undo does not fail for a progress callback."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

import pytest

import pyvfio
from pyvfio.testing import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import Rig


class RefusedError(Exception):
    """What a notifier or a callback raises."""


class Refuser:
    """A notifier that refuses everything while it is `on`."""

    on = False

    def _refuse(self, *_told: object) -> None:
        if self.on:
            raise RefusedError

    ram_block_added = ram_block_removed = ram_block_resized = _refuse


class Callback:
    """A progress callback that raises from the `nth` call on, once it is given."""

    def __init__(self) -> None:
        self.left: int | None = None

    def __call__(self, _progress: pyvfio.Progress) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise RefusedError


GRANULES = partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)
MAPPERS = pytest.mark.parametrize("mapper", [pyvfio.DmaMapper, GRANULES], ids=["remap", "granules"])


def told_last(rig: Rig) -> Refuser:
    """A notifier that is told of what comes and goes after the mapper of `rig`, which has no blocks."""
    refuser = Refuser()
    rig.blocks.remove_notifier(rig.mapper)
    rig.blocks.add_notifier(refuser)
    rig.blocks.add_notifier(rig.mapper)
    return refuser


@MAPPERS
def test_a_block_that_came_back_unmapped_is_followed_until_a_resize_maps_it(
    kernel: FakeKernel, mapper: type[pyvfio.DmaMapper]
) -> None:
    """Its removal was refused, and it could not be mapped again: it stays in the list, at its IOVA."""
    with Rig(kernel, mapper=mapper) as rig:
        refuser = told_last(rig)
        block = rig.add(used=4 * PAGE_SIZE)
        iova = rig.mapper.iova(block)
        refuser.on = True
        kernel.fail(request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT)
        with pytest.raises(pyvfio.RollbackError):
            block.remove()
        refuser.on = False
        assert (list(rig.blocks), rig.reached(), rig.mapper.iova(block)) == ([block], [], iova)
        rig.mapper._check()
        block.resize(5 * PAGE_SIZE)
        reached = rig.reached()
        assert (reached[0][0], sum(size for _iova, _vaddr, size in reached)) == (iova, 5 * PAGE_SIZE)
        rig.check()
        block.remove()
        assert rig.reached() == []


@MAPPERS
def test_closing_the_mapper_unmaps_what_a_failed_add_has_left(
    kernel: FakeKernel, mapper: type[pyvfio.DmaMapper]
) -> None:
    """Another notifier refused the block, which could not be unmapped again; a close that fails may be repeated."""
    with Rig(kernel, mapper=mapper) as rig:
        told_last(rig).on = True
        kernel.fail(request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError):
            rig.add(used=PAGE_SIZE)
        assert len(rig.reached()) == 1
        kernel.fail(request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.IoctlError):
            rig.mapper.close()
        assert len(rig.reached()) == 1
        rig.mapper.close()
        assert rig.reached() == []
        rig.check()


def test_closing_the_mapper_unmaps_pieces_of_a_block_that_it_has_refused(kernel: FakeKernel) -> None:
    """The second piece could not be mapped, and the first not unmapped."""
    with Rig(kernel, mapper=GRANULES) as rig:
        kernel.fail(request="VFIO_IOMMU_MAP_DMA", errno=errno.EFAULT, nth=2)
        kernel.fail(request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError):
            rig.add(used=2 * PAGE_SIZE)
        assert len(rig.reached()) == 1
        rig.mapper.close()
        assert rig.reached() == []
        rig.check()


@pytest.mark.parametrize("operation", ["add", "grow", "remove"])
def test_an_undo_does_not_end_where_a_progress_callback_raises(
    kernel: FakeKernel, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Another notifier has refused; the block is as it was, and what the callback raises is logged."""
    callback = Callback()
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, progress=callback)) as rig:
        refuser = told_last(rig)
        block = rig.add(used=2 * PAGE_SIZE)
        before = rig.reached()
        changes: dict[str, Callable[[], object]] = {
            "add": partial(rig.add, "other"),
            "grow": partial(block.resize, MIB),
            "remove": block.remove,
        }
        refuser.on, callback.left = True, 2 if operation == "grow" else 1  # unmap, map, and then the way back
        with pytest.raises(RefusedError):
            changes[operation]()
        refuser.on, callback.left = False, None
        assert (list(rig.blocks), rig.reached()) == ([block], before)
        assert "a progress callback raised" in caplog.text
        rig.check()


@pytest.mark.parametrize("allowed", range(3))
def test_a_callback_that_goes_on_raising_does_not_part_a_device_from_its_memory(
    kernel: FakeKernel, allowed: int
) -> None:
    """Pages are replaced, or not; devices reach them all the same."""
    callback = Callback()
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, progress=callback)) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        callback.left = allowed
        if allowed:
            block.remap(PAGE_SIZE, PAGE_SIZE)
        else:
            with pytest.raises(RefusedError):
                block.remap(PAGE_SIZE, PAGE_SIZE)
        callback.left = None
        assert rig.reached() == rig.expected() != []
        rig.check()
