"""An IOMMU whose smallest page is larger than the CPU's: what does not fit is refused before anything is touched."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from functools import partial

import pytest

import pyvfio
from pyvfio.mapper.plan import BlockShape
from pyvfio.testing.fake import FakeKernel, IommuModel
from pyvfio.units import GIB, KIB, MIB, PAGE_SIZE, Iova, IovaRange
from tests.unit.fakes import BDF, OTHER_BDF, MapperFactory, Rig, nothing_left

PAGE = 64 * KIB
POLICIES: dict[str, MapperFactory] = {
    "remap": pyvfio.DmaMapper,
    "extend": partial(pyvfio.DmaMapper, resize="extend"),
    "no gap": partial(pyvfio.DmaMapper, resize="extend", allow_gap=False),
    "granule": partial(pyvfio.DmaMapper, resize="extend", granule=2 * PAGE),
}


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A kernel whose IOMMU has pages of 64 KiB, 32 MiB and 1 GiB."""
    iommu = IommuModel((IovaRange(Iova(0), Iova((1 << 39) - 1)),), iova_pgsizes=PAGE | 32 * MIB | GIB)
    with FakeKernel(iommu=iommu) as made:
        yield made


@pytest.fixture(params=list(POLICIES))
def rig(request: pytest.FixtureRequest, kernel: FakeKernel) -> Iterator[Rig]:
    """A mapper under each policy; nothing is left of it in the end."""
    with nothing_left(kernel), Rig(kernel, mapper=POLICIES[request.param]) as made:
        assert made.container.page_size == PAGE
        yield made
        made.check()


def vfio_calls(kernel: FakeKernel) -> list[str]:
    """Calls that change what is mapped."""
    return [call.request for call in kernel.trace if call.request and call.request.endswith("MAP_DMA")]


def test_lengths_of_whole_pages_work_as_anywhere(rig: Rig) -> None:
    """In every policy."""
    block = rig.add(used=4 * PAGE, maximum=MIB)
    for length in (8 * PAGE, 4 * PAGE, 0, 4 * PAGE):
        block.resize(length)
        rig.check()
    assert sum(size for _iova, _vaddr, size in rig.reached()) == 4 * PAGE


@pytest.mark.parametrize("length", [PAGE_SIZE, 5 * PAGE + PAGE_SIZE, PAGE // 2])
def test_a_resize_to_a_part_of_a_page_is_refused_before_anything_is_touched(rig: Rig, length: int) -> None:
    """No call unmaps the block to find out that it cannot be mapped again."""
    block = rig.add(used=4 * PAGE, maximum=MIB)
    before = rig.reached()
    rig.kernel.clear_trace()
    with pytest.raises(ValueError, match="used_length must be a multiple of the IOMMU's page, 0x10000 bytes, not"):
        block.resize(length)
    assert vfio_calls(rig.kernel) == []
    assert (block.used_length, rig.reached()) == (4 * PAGE, before)


@pytest.mark.parametrize(
    ("used", "maximum", "what"), [(PAGE_SIZE, MIB, "used_length"), (0, MIB + PAGE_SIZE, "max_length of RAM block 'a'")]
)
def test_a_block_of_a_part_of_a_page_is_refused(rig: Rig, used: int, maximum: int, what: str) -> None:
    """Nothing of it is reserved, and a plan says the same."""
    rig.kernel.clear_trace()
    with pytest.raises(ValueError, match=f"{what} must be a multiple of the IOMMU's page, 0x10000 bytes"):
        rig.add("a", used=used, maximum=maximum)
    with pytest.raises(ValueError, match="0x10000"):
        rig.mapper.plan([BlockShape("a", used, maximum)])
    assert vfio_calls(rig.kernel) == []
    assert not rig.container.reserved_iova
    assert len(rig.blocks) == 0


def test_a_part_of_a_page_is_neither_discarded_nor_populated(rig: Rig) -> None:
    """The device would go on reaching it, or would lose its neighbours."""
    block = rig.add(used=8 * PAGE, maximum=MIB)
    before = rig.reached()
    changes: list[Callable[[], None]] = [
        lambda: block.discard(0, PAGE_SIZE),
        lambda: block.discard(PAGE_SIZE, 2 * PAGE),
        lambda: block.discard(0, 2 * PAGE - PAGE_SIZE),
    ]
    for refused in changes:
        with pytest.raises(ValueError, match="of a part of RAM block 'ring' must be a multiple of the IOMMU's page"):
            refused()
    assert (block.discarded, rig.reached()) == ((), before)
    if rig.mapper.policy.allow_gap:
        block.discard(0, 2 * PAGE)
        with pytest.raises(ValueError, match="multiple of the IOMMU's page"):
            block.populate(0, PAGE_SIZE)
        block.populate(0, 2 * PAGE)
    assert sum(size for _iova, _vaddr, size in rig.reached()) == 8 * PAGE


def test_replaced_pages_take_their_page_of_the_iommu_along(rig: Rig) -> None:
    """Out of the device's reach and back, unless that is not allowed."""
    block = rig.add(used=8 * PAGE, maximum=MIB)
    if not rig.mapper.policy.allow_gap:
        with pytest.raises(pyvfio.GapError, match="one IOMMU page of 0x10000 bytes"):
            block.remap(PAGE_SIZE, PAGE_SIZE)
        return
    block.remap(PAGE_SIZE, PAGE_SIZE)
    rig.check()
    assert sum(size for _iova, _vaddr, size in rig.reached()) == 8 * PAGE


def test_a_buffer_of_a_part_of_a_page_is_refused(kernel: FakeKernel) -> None:
    """Before a call."""
    with nothing_left(kernel), Rig(kernel) as rig, mmap.mmap(-1, PAGE_SIZE) as buffer:
        kernel.clear_trace()
        for call in (rig.mapper.map_buffer, rig.mapper.map_temporary):
            with pytest.raises(ValueError, match="multiples of 0x10000"):
                call(buffer)
        assert vfio_calls(kernel) == []


def test_a_granule_below_the_page_of_the_iommu_is_refused(kernel: FakeKernel) -> None:
    """When a block comes, as before."""
    mapper: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)
    refused = pytest.raises(ValueError, match="a granule must be at least the IOMMU's page, 0x10000")
    with nothing_left(kernel), Rig(kernel, mapper=mapper) as rig, refused:
        rig.add(used=PAGE, maximum=MIB)


def test_a_part_of_a_bar_that_is_no_whole_pages_is_unsupported(kernel: FakeKernel) -> None:
    """The devices would reach more than the part. Nothing is left mapped, in no process."""
    with (
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel) as device,
        pyvfio.open_device(OTHER_BDF, kernel=kernel) as other,
        pyvfio.DmaMapper(device.container) as mapper,
    ):
        other.memory_enabled = True
        region = other.region(0)
        assert region.size >= PAGE
        for size in (PAGE_SIZE, 2 * PAGE_SIZE, 4 * PAGE_SIZE, 8 * PAGE_SIZE):
            with pytest.raises(pyvfio.UnsupportedError, match="whole pages of the IOMMU, 0x10000"):
                mapper.map_region(region, 0, size)
        assert not region.maps
        assert not region.dependents
        assert not kernel.mappings(BDF)
