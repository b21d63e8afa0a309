"""The promises of IOMMU_IOAS_COPY (kernel: `iopt_get_pages`, `iopt_map_pages` in drivers/iommu/iommufd).

The kernel's own tests of the same: `copy_area`, `copy_sweep`, `user_copy` in selftests/iommu.
"""

from __future__ import annotations

import errno

import pytest

from pyvfio.units import U64_MAX
from tests.contract.iommufd import BOTH_WAYS, READABLE, WRITEABLE, Iommufd, Rig
from tests.contract.world import BASE, BOTH, NULL, PAGE, PRIVATE, refused

pytestmark = pytest.mark.iommufd


def test_a_mapping_is_copied_within_an_ioas_and_to_another(rig: Rig) -> None:
    other = rig.iommufd.ioas()
    rig.map()
    rig.iommufd.copy(rig.ioas, rig.ioas, iova=0)
    rig.iommufd.copy(other, rig.ioas, iova=5 * PAGE)
    assert rig.unmap(iova=0) == PAGE
    assert rig.iommufd.unmap(other, iova=5 * PAGE) == PAGE
    assert rig.unmap() == PAGE


def test_copies_are_pinned_once(rig: Rig) -> None:
    before = rig.world.pinned()
    rig.map(size=4 * PAGE)
    for iova in (0, 8 * PAGE):
        rig.iommufd.copy(rig.ioas, rig.ioas, iova=iova, size=4 * PAGE)
    assert rig.world.pinned() == before + 4 * PAGE
    for iova in (BASE, 0):
        assert rig.unmap(iova=iova, size=4 * PAGE) == 4 * PAGE
        assert rig.world.pinned() == before + 4 * PAGE
    assert rig.unmap(iova=8 * PAGE, size=4 * PAGE) == 4 * PAGE
    assert rig.world.pinned() == before


def test_a_copy_outlives_the_source_and_the_memory(rig: Rig) -> None:
    kernel, source, before = rig.world.kernel, rig.iommufd.ioas(), rig.world.pinned()
    vaddr = kernel.mmap(0, 2 * PAGE, BOTH, PRIVATE)
    rig.iommufd.map(source, vaddr=vaddr, size=2 * PAGE)
    rig.iommufd.copy(rig.ioas, source, size=2 * PAGE)
    rig.iommufd.destroy(source)
    kernel.munmap(vaddr, 2 * PAGE)
    rig.world.forgive()
    assert rig.world.pinned() == before + 2 * PAGE
    assert rig.unmap(size=2 * PAGE) == 2 * PAGE
    assert rig.world.pinned() == before


def test_a_part_can_be_copied_and_several_neighbours_at_once(rig: Rig) -> None:
    other = rig.iommufd.ioas()
    rig.map(size=4 * PAGE)
    rig.map(iova=BASE + 4 * PAGE, size=2 * PAGE)
    rig.iommufd.copy(other, rig.ioas, source_iova=BASE + PAGE, iova=0, size=2 * PAGE)
    assert rig.iommufd.unmap(other, iova=0, size=2 * PAGE) == 2 * PAGE
    rig.iommufd.copy(other, rig.ioas, source_iova=BASE + PAGE, iova=0, size=4 * PAGE)
    assert rig.iommufd.unmap(other, iova=0, size=4 * PAGE) == 4 * PAGE


def test_a_copy_of_neighbours_is_a_mapping_each(rig: Rig) -> None:
    other = rig.iommufd.ioas()
    rig.map(size=2 * PAGE)
    rig.map(iova=BASE + 2 * PAGE, size=2 * PAGE)
    rig.iommufd.copy(other, rig.ioas, iova=0, size=4 * PAGE)
    with refused(errno.ENOENT):
        rig.iommufd.unmap(other, iova=0, size=PAGE)
    assert rig.iommufd.unmap(other, iova=0, size=2 * PAGE) == 2 * PAGE
    assert rig.iommufd.unmap(other, iova=2 * PAGE, size=2 * PAGE) == 2 * PAGE


@pytest.mark.parametrize(
    ("start", "pages"), [(-1, 1), (-1, 2), (-1, 9), (0, 3), (1, 2), (2, 1), (2, 2), (0, 9), (4, 2), (7, 2), (8, 1)]
)
def test_a_source_with_a_gap_is_enoent(rig: Rig, start: int, pages: int) -> None:
    """Pages 0, 1 and 3, 4 … 7 are mapped."""
    other = rig.iommufd.ioas()
    rig.map(size=2 * PAGE)
    rig.map(iova=BASE + 3 * PAGE)
    rig.map(iova=BASE + 4 * PAGE, size=4 * PAGE)
    if start == 4:
        rig.unmap(iova=BASE + 4 * PAGE, size=4 * PAGE)
    with refused(errno.ENOENT):
        rig.iommufd.copy(other, rig.ioas, source_iova=BASE + start * PAGE, size=pages * PAGE)
    assert rig.iommufd.unmap_all(other) == 0


def test_size_0_is_einval_and_numbers_beyond_2_64_are_eoverflow(rig: Rig) -> None:
    rig.map()
    with refused(errno.EINVAL):
        rig.iommufd.copy(rig.ioas, rig.ioas, size=0)
    for size, iova, source in ((U64_MAX, 0, 0), (PAGE, U64_MAX, 0), (PAGE, 0, U64_MAX - 1), (U64_MAX - 1, 0, BASE)):
        with refused(errno.EOVERFLOW):
            rig.iommufd.copy(rig.ioas, rig.ioas, size=size, iova=iova, source_iova=source)


def test_unknown_flags_are_eopnotsupp(rig: Rig) -> None:
    with refused(errno.EOPNOTSUPP):
        rig.iommufd.copy(0, 0, flags=BOTH_WAYS | 8)


def test_a_copy_may_have_fewer_rights_than_the_source_but_no_write_of_a_read_only_one(rig: Rig) -> None:
    vaddr = rig.world.memory()
    rig.map(vaddr=vaddr, flags=READABLE)
    for flags in (WRITEABLE, BOTH_WAYS):
        with refused(errno.EPERM):
            rig.iommufd.copy(rig.ioas, rig.ioas, iova=0, flags=flags)
    rig.iommufd.copy(rig.ioas, rig.ioas, iova=0, flags=READABLE)
    rig.map(iova=2 * PAGE, vaddr=vaddr, flags=WRITEABLE)
    rig.iommufd.copy(rig.ioas, rig.ioas, source_iova=2 * PAGE, iova=4 * PAGE, flags=READABLE)


def test_the_target_is_refused_as_that_of_a_map_is(rig: Rig) -> None:
    rig.map(size=2 * PAGE)
    hole = rig.ranges[0][1] + 1
    for iova, expected in (
        (BASE, errno.EEXIST),
        (BASE + PAGE, errno.EEXIST),
        (hole, errno.EINVAL),
        (hole - PAGE, errno.EINVAL),
        (1, errno.EINVAL),
        (U64_MAX - PAGE + 1, errno.EOVERFLOW),
    ):
        with refused(expected):
            rig.iommufd.copy(rig.ioas, rig.ioas, iova=iova, size=2 * PAGE)


def test_the_kernel_chooses_the_iova_of_a_copy(rig: Rig) -> None:
    rig.map()
    assert rig.iommufd.copy(rig.ioas, rig.ioas, iova=None) == PAGE
    assert rig.iommufd.copy(rig.ioas, rig.ioas, iova=None) == 2 * PAGE


def test_a_part_of_a_page_is_copied_where_no_device_is(iommufd: Iommufd) -> None:
    source, target = iommufd.ioas(), iommufd.ioas()
    iommufd.map(source, size=2 * PAGE)
    iommufd.copy(target, source, source_iova=BASE + 1, iova=7, size=100)
    assert iommufd.unmap(target, iova=7, size=100) == 100


def test_memory_that_was_never_checked_is_checked_by_the_copy_to_a_device(rig: Rig) -> None:
    source = rig.iommufd.ioas()
    rig.iommufd.map(source, vaddr=NULL)
    with refused(errno.EFAULT):
        rig.iommufd.copy(rig.ioas, source)
    assert rig.unmap_all() == 0


def test_a_copy_in_an_ioas_without_device_is_copied_on(rig: Rig) -> None:
    first, second = rig.iommufd.ioas(), rig.iommufd.ioas()
    before = rig.world.pinned()
    rig.iommufd.map(first, size=2 * PAGE)
    rig.iommufd.copy(second, first, iova=0, size=2 * PAGE)
    assert rig.world.pinned() == before
    rig.iommufd.destroy(first)
    rig.iommufd.copy(rig.ioas, second, source_iova=0, size=2 * PAGE)
    assert rig.world.pinned() == before + 2 * PAGE
