"""The promises of VFIO_IOMMU_UNMAP_DMA: whole mappings, and a count of bytes (kernel: `vfio_dma_do_unmap`)."""

from __future__ import annotations

import errno

import pytest

from pyvfio import ioctls
from pyvfio.units import U64_MAX
from tests.contract.world import BASE, PAGE, Attached, refused

ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
LAST_PAGE = U64_MAX - PAGE + 1


def three(attached: Attached) -> None:
    """Map 2, 3 and 4 pages at pages 0, 10 and 20 behind BASE."""
    for page, size in ((0, 2), (10, 3), (20, 4)):
        attached.map(iova=BASE + page * PAGE, size=size * PAGE)


@pytest.mark.parametrize("argsz", [0, 23])
def test_a_short_argsz_is_einval(v2: Attached, argsz: int) -> None:
    v2.map()
    with refused(errno.EINVAL):
        v2.unmap(argsz=argsz)


@pytest.mark.parametrize("flags", [8, 1 << 31])
def test_unknown_flags_are_einval(v2: Attached, flags: int) -> None:
    v2.map()
    with refused(errno.EINVAL):
        v2.unmap(flags=flags)


def test_nothing_there_is_success_and_0_bytes(v2: Attached) -> None:
    assert v2.unmap() == 0


def test_what_no_range_has_can_be_unmapped_too(v2: Attached) -> None:
    assert v2.unmap(iova=LAST_PAGE, size=PAGE) == 0
    assert v2.unmap(iova=0, size=LAST_PAGE) == 0


def test_size_0_is_einval(v2: Attached) -> None:
    with refused(errno.EINVAL):
        v2.unmap(size=0)


@pytest.mark.parametrize(("iova", "size"), [(1, 0), (0, 1), (PAGE // 2, PAGE // 2)])
def test_iova_and_size_are_multiples_of_the_smallest_page(v2: Attached, iova: int, size: int) -> None:
    with refused(errno.EINVAL):
        v2.unmap(iova=BASE + iova, size=PAGE + size)


def test_a_range_that_wraps_is_einval_and_eoverflow_in_7_3(v2: Attached) -> None:
    with refused(errno.EOVERFLOW if v2.world.since(7, 0) else errno.EINVAL):
        v2.unmap(iova=LAST_PAGE, size=2 * PAGE)


def test_all_mappings_inside_the_range_go_and_their_sizes_are_added_up(v2: Attached) -> None:
    three(v2)
    assert v2.unmap(size=15 * PAGE) == 5 * PAGE
    assert v2.unmap(size=30 * PAGE) == 4 * PAGE


def test_a_mapping_that_touches_the_range_from_outside_stays(v2: Attached) -> None:
    three(v2)
    assert v2.unmap(iova=BASE + 2 * PAGE, size=8 * PAGE) == 0
    assert v2.unmap_all() == 9 * PAGE


@pytest.mark.parametrize(
    ("first", "pages"), [(1, 1), (0, 1), (11, 1), (0, 11), (11, 20), (1, 30), (10, 2), (12, 1), (21, 9)]
)
def test_v2_does_not_cut_a_mapping_and_then_unmaps_nothing_at_all(v2: Attached, first: int, pages: int) -> None:
    three(v2)
    before = v2.locked()
    with refused(errno.EINVAL):
        v2.unmap(iova=BASE + first * PAGE, size=pages * PAGE)
    assert v2.locked() == before
    assert v2.unmap(size=24 * PAGE) == 9 * PAGE


@pytest.mark.parametrize(("first", "pages"), [(1, 1), (1, 30), (11, 1), (12, 20)])
def test_v1_unmaps_nothing_when_the_first_mapping_starts_before_the_range(v1: Attached, first: int, pages: int) -> None:
    three(v1)
    assert v1.unmap(iova=BASE + first * PAGE, size=pages * PAGE) == 0
    assert v1.unmap(size=24 * PAGE) == 9 * PAGE


@pytest.mark.parametrize(("first", "pages", "gone"), [(0, 1, 2), (0, 11, 5), (10, 1, 3), (5, 16, 7), (2, 8, 0)])
def test_v1_unmaps_whole_each_mapping_that_starts_in_the_range(v1: Attached, first: int, pages: int, gone: int) -> None:
    three(v1)
    assert v1.unmap(iova=BASE + first * PAGE, size=pages * PAGE) == gone * PAGE
    assert v1.unmap_all() == (9 - gone) * PAGE


@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_all_unmaps_everything_in_every_range(request: pytest.FixtureRequest, kind: str, world_name: str) -> None:
    attached: Attached = request.getfixturevalue(kind)
    for span in attached.ranges():
        attached.map(iova=span.last - PAGE + 1)
    assert attached.unmap_all() == len(attached.ranges()) * PAGE
    assert attached.unmap_all() == 0


@pytest.mark.parametrize(("iova", "size"), [(BASE, 0), (0, PAGE), (BASE, PAGE)])
def test_all_takes_neither_iova_nor_size(v2: Attached, iova: int, size: int) -> None:
    v2.map()
    with refused(errno.EINVAL):
        v2.unmap(iova=iova, size=size, flags=ALL)
    assert v2.unmap() == PAGE


def test_a_range_that_ends_at_2_to_the_64_finds_its_mappings_since_7_3_only(v2: Attached) -> None:
    v2.map()
    found = v2.unmap(iova=BASE, size=U64_MAX - BASE + 1)
    assert found == (PAGE if v2.world.since(7, 0) else 0)
    assert v2.unmap() == PAGE - found


def test_the_errno_of_a_range_that_wraps_tells_whether_the_last_page_can_be_unmapped(v2: Attached) -> None:
    v2.map()
    with pytest.raises(OSError, match=r"Invalid argument|Value too large") as caught:
        v2.unmap(iova=LAST_PAGE, size=2 * PAGE)
    found = v2.unmap(iova=BASE, size=U64_MAX - BASE + 1)
    assert (caught.value.errno == errno.EOVERFLOW) == (found == PAGE)
    assert v2.unmap() == PAGE - found


def test_such_a_range_is_still_not_allowed_to_cut_a_mapping(v2: Attached) -> None:
    v2.map(size=2 * PAGE)
    with refused(errno.EINVAL):
        v2.unmap(iova=BASE + PAGE, size=U64_MAX - BASE - PAGE + 1)


def test_the_whole_space_but_its_last_page_can_be_unmapped_at_once(v2: Attached) -> None:
    three(v2)
    assert v2.unmap(iova=0, size=LAST_PAGE) == 9 * PAGE


def test_an_iova_can_be_mapped_again_after_it_was_unmapped(v2: Attached) -> None:
    for _ in range(3):
        v2.map(size=2 * PAGE)
        assert v2.unmap(size=2 * PAGE) == 2 * PAGE
