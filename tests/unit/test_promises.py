"""An add that needs the mappings of closed temporary ones takes them."""

from __future__ import annotations

import mmap

import pytest

import pyvfio
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import BDF, small_iommu


def test_a_block_with_granules_is_added_when_closed_temporary_mappings_have_the_last_mappings() -> None:
    """The mapper resets these before it refuses the block. An open one is not reset: then the block is refused."""
    with (
        FakeKernel(iommu=small_iommu(entries=4)) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pyvfio.DmaMapper(device.container, blocks, resize="extend", granule=PAGE_SIZE) as mapper,
    ):
        temporary = mapper.map_temporary(mmap.mmap(-1, PAGE_SIZE))
        length = (device.container.entries_left + 1) * PAGE_SIZE
        with pytest.raises(pyvfio.EntryLimitError):
            blocks.add("ring", used_length=PAGE_SIZE, max_length=length)
        temporary.close()
        ring = blocks.add("ring", used_length=PAGE_SIZE, max_length=length)
        ring.resize(length)
        assert device.container.entries_left == 0
