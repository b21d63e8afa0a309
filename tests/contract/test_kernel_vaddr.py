"""New addresses of mappings in the process (kernel: `vfio_dma_do_unmap` and `vfio_dma_do_map` with VADDR)."""

from __future__ import annotations

import errno

import pytest

from pyvfio import ioctls
from tests.contract.world import BASE, BOTH, NULL, PAGE, Attached, refused

MAP = int(ioctls.VFIO_DMA_MAP_FLAG_VADDR)
UNMAP = int(ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)
ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)


def test_giving_up_a_vaddr_unmaps_nothing_and_says_how_many_bytes_it_concerns(v2: Attached) -> None:
    before, avail = v2.locked(), v2.avail()
    v2.map(size=2 * PAGE)
    v2.map(iova=BASE + 4 * PAGE, size=PAGE)
    assert v2.unmap(size=8 * PAGE, flags=UNMAP) == 3 * PAGE
    assert (v2.locked(), v2.avail()) == (before + 3 * PAGE, avail - 2)
    assert v2.unmap(size=8 * PAGE) == 3 * PAGE


def test_all_vaddrs_can_be_given_up_at_once(v2: Attached) -> None:
    v2.map()
    v2.map(iova=0, size=2 * PAGE)
    assert v2.unmap(iova=0, size=0, flags=UNMAP | ALL) == 3 * PAGE


def test_where_nothing_is_mapped_nothing_is_given_up(v2: Attached) -> None:
    assert v2.unmap(flags=UNMAP) == 0


def test_a_vaddr_is_given_up_once_and_a_call_that_fails_gives_up_none(v2: Attached) -> None:
    for page in (0, 2, 4):
        v2.map(iova=BASE + page * PAGE)
    assert v2.unmap(iova=BASE + 2 * PAGE, flags=UNMAP) == PAGE
    with refused(errno.EINVAL):
        v2.unmap(size=5 * PAGE, flags=UNMAP)
    assert v2.unmap(flags=UNMAP) == PAGE
    # The failed call changed neither the neighbour, already given up, nor the mapping behind.
    with refused(errno.EINVAL):
        v2.unmap(iova=BASE + 2 * PAGE, flags=UNMAP)
    assert v2.unmap(iova=BASE + 4 * PAGE, flags=UNMAP) == PAGE


def test_a_mapping_is_not_cut_by_it_either(v2: Attached) -> None:
    v2.map(size=2 * PAGE)
    with refused(errno.EINVAL):
        v2.unmap(flags=UNMAP)


def test_a_new_vaddr_is_taken_once_for_exactly_the_mapping_that_waits_for_it(v2: Attached) -> None:
    v2.map(size=2 * PAGE)
    vaddr = v2.world.memory(4 * PAGE)
    with refused(errno.EINVAL):
        v2.map(vaddr=vaddr, size=2 * PAGE, flags=MAP)
    v2.unmap(size=2 * PAGE, flags=UNMAP)
    for iova, size in ((BASE, PAGE), (BASE + PAGE, PAGE), (BASE, 3 * PAGE), (BASE - PAGE, 3 * PAGE)):
        with refused(errno.EINVAL):
            v2.map(vaddr=vaddr, iova=iova, size=size, flags=MAP)
    v2.map(vaddr=vaddr, size=2 * PAGE, flags=MAP)
    with refused(errno.EINVAL):
        v2.map(vaddr=vaddr, size=2 * PAGE, flags=MAP)


def test_a_new_vaddr_where_nothing_is_mapped_is_enoent(v2: Attached) -> None:
    with refused(errno.ENOENT):
        v2.map(flags=MAP)


def test_enoent_comes_before_a_full_table_and_a_bad_range(v2: Attached) -> None:
    hole = v2.ranges()[0].last + 1
    vaddr = v2.world.memory()
    for entry in range(v2.avail()):
        v2.map(iova=BASE + entry * PAGE, vaddr=vaddr)
    with refused(errno.ENOENT):
        v2.map(iova=hole, vaddr=vaddr, flags=MAP)


@pytest.mark.parametrize("flags", [MAP | 1, MAP | 2, MAP | BOTH])
def test_a_new_vaddr_does_not_change_rights(v2: Attached, flags: int) -> None:
    v2.map()
    v2.unmap(flags=UNMAP)
    with refused(errno.EINVAL):
        v2.map(flags=flags)


def test_the_new_vaddr_is_not_looked_at_and_costs_nothing(v2: Attached) -> None:
    before = v2.locked()
    v2.map()
    v2.unmap(flags=UNMAP)
    with v2.world.memlock(before):
        v2.map(vaddr=NULL, flags=MAP)
    assert v2.locked() == before + PAGE
    assert v2.unmap() == PAGE
    assert v2.locked() == before


@pytest.mark.parametrize(("vaddr", "size"), [(1, PAGE), (0, PAGE + 1), (0, 0)])
def test_it_is_aligned_like_any_mapping(v2: Attached, vaddr: int, size: int) -> None:
    v2.map()
    v2.unmap(flags=UNMAP)
    with refused(errno.EINVAL):
        v2.map(vaddr=PAGE + vaddr, size=size, flags=MAP)


def test_meanwhile_other_mappings_come_and_go(v2: Attached) -> None:
    v2.map()
    v2.unmap(flags=UNMAP)
    v2.map(iova=0)
    assert v2.unmap(iova=0) == PAGE
    with refused(errno.EEXIST):
        v2.map()
    assert v2.unmap() == PAGE
    v2.map()
    assert v2.unmap(flags=UNMAP) == PAGE


def test_v1_gives_vaddrs_up_whole_mapping_by_whole_mapping(v1: Attached) -> None:
    v1.map(size=4 * PAGE)
    assert v1.unmap(size=PAGE, flags=UNMAP) == 4 * PAGE
    assert v1.unmap(iova=BASE + PAGE, size=PAGE, flags=UNMAP) == 0
    v1.map(size=4 * PAGE, flags=MAP)


def test_the_dirty_bitmap_goes_with_neither_all_nor_vaddr(v2: Attached) -> None:
    for flags in (ALL, UNMAP):
        with refused(errno.EINVAL):
            v2.unmap(iova=0, size=0, flags=int(ioctls.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP) | flags)
