"""The promises of IOMMU_IOAS_UNMAP (kernel: `iopt_unmap_iova_range` in drivers/iommu/iommufd/io_pagetable.c).

The kernel's own tests of the same: `area`, `unmap_fully_contained_areas`, `ioas_area_destroy` in selftests/iommu.
"""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from pyvfio import iommufd_ioctls as uapi
from pyvfio.units import U64_MAX
from tests.contract.iommufd import Iommufd, Rig
from tests.contract.world import BASE, BOTH, PAGE, PRIVATE, READ, refused

pytestmark = pytest.mark.iommufd


@pytest.mark.parametrize(("start", "pages"), [(0, 1), (3, 1), (1, 2), (-1, 2), (3, 2), (1, 8), (-1, 4)])
def test_a_part_of_a_mapping_is_enoent_and_nothing_is_unmapped(rig: Rig, start: int, pages: int) -> None:
    rig.map(size=4 * PAGE)
    with refused(errno.ENOENT):
        rig.unmap(iova=BASE + start * PAGE, size=pages * PAGE)
    assert rig.unmap(size=4 * PAGE) == 4 * PAGE


def test_where_nothing_is_mapped_it_is_enoent(rig: Rig) -> None:
    rig.map()
    for iova in (0, BASE - PAGE, BASE + PAGE):
        with refused(errno.ENOENT):
            rig.unmap(iova=iova)


def test_several_whole_mappings_go_in_one_call_over_holes(rig: Rig) -> None:
    for page in (0, 1, 3, 7):
        rig.map(iova=BASE + page * PAGE)
    assert rig.unmap(iova=BASE - PAGE, size=16 * PAGE) == 4 * PAGE


def test_a_call_that_cuts_the_last_of_three_mappings_has_unmapped_the_others(rig: Rig) -> None:
    for page in (0, 1):
        rig.map(iova=BASE + page * PAGE)
    rig.map(iova=BASE + 2 * PAGE, size=2 * PAGE)
    with refused(errno.ENOENT):
        rig.unmap(size=3 * PAGE)
    assert rig.iommufd.mapped(rig.ioas) == [2, 3]
    rig.map()
    with refused(errno.ENOENT):
        rig.unmap(size=3 * PAGE)
    assert rig.iommufd.mapped(rig.ioas) == [2, 3]


def test_a_call_that_cuts_the_first_of_three_mappings_unmaps_nothing(rig: Rig) -> None:
    rig.map(size=2 * PAGE)
    for page in (2, 3):
        rig.map(iova=BASE + page * PAGE)
    with refused(errno.ENOENT):
        rig.unmap(iova=BASE + PAGE, size=3 * PAGE)
    assert rig.iommufd.mapped(rig.ioas) == [0, 1, 2, 3]


def test_everything_can_be_unmapped_even_nothing(rig: Rig) -> None:
    assert rig.unmap_all() == 0
    for page in (0, 2, 5):
        rig.map(iova=page * PAGE)
    assert rig.unmap_all() == 3 * PAGE
    assert rig.unmap_all() == 0


@pytest.mark.parametrize(
    ("iova", "size", "expected"),
    [
        (BASE, 0, errno.EINVAL),
        (0, 0, errno.EINVAL),
        (1, U64_MAX, errno.EOVERFLOW),
        (U64_MAX, 1, errno.EOVERFLOW),
        (U64_MAX - 1, 3, errno.EOVERFLOW),
        (BASE, U64_MAX - 1, errno.EOVERFLOW),
        (0, U64_MAX - 1, 0),
        (U64_MAX - PAGE, PAGE, errno.ENOENT),
    ],
)
def test_size_0_is_einval_and_an_end_beyond_2_64_eoverflow(rig: Rig, iova: int, size: int, expected: int) -> None:
    rig.map()
    if expected:
        with refused(expected):
            rig.unmap(iova=iova, size=size)
    else:
        assert rig.unmap(iova=iova, size=size) == PAGE


def test_addresses_that_are_no_multiples_of_a_page_can_unmap_what_is_between(rig: Rig) -> None:
    rig.map()
    assert rig.unmap(iova=BASE - 1, size=PAGE + 2) == PAGE


def test_unmapped_memory_is_no_longer_pinned(rig: Rig) -> None:
    before = rig.world.pinned()
    rig.map(size=4 * PAGE)
    assert rig.world.pinned() == before + 4 * PAGE
    rig.unmap(size=4 * PAGE)
    assert rig.world.pinned() == before


def test_an_unmap_whose_answer_cannot_be_written_has_unmapped(rig: Rig) -> None:
    rig.map()
    page = rig.world.memory()
    ctypes.memmove(page, struct.pack("=IIQQ", 24, rig.ioas, BASE, PAGE), 24)
    rig.world.kernel.mprotect(page, PAGE, READ)
    with refused(errno.EFAULT):
        rig.world.ioctl(rig.iommufd.fd, uapi.IOMMU_IOAS_UNMAP, page)
    assert rig.unmap_all() == 0


def test_memory_that_goes_stays_pinned_until_it_is_unmapped(rig: Rig) -> None:
    kernel, before = rig.world.kernel, rig.world.pinned()
    vaddr = kernel.mmap(0, 2 * PAGE, BOTH, PRIVATE)
    rig.map(vaddr=vaddr, size=2 * PAGE)
    kernel.munmap(vaddr, 2 * PAGE)
    rig.world.forgive()
    assert rig.world.pinned() == before + 2 * PAGE
    assert rig.unmap(size=2 * PAGE) == 2 * PAGE
    assert rig.world.pinned() == before


def test_mappings_of_another_ioas_are_others(iommufd: Iommufd) -> None:
    first, second = iommufd.ioas(), iommufd.ioas()
    iommufd.map(first)
    with refused(errno.ENOENT):
        iommufd.unmap(second)
    iommufd.map(second)
    assert iommufd.unmap_all(first) == PAGE
    assert iommufd.unmap_all(second) == PAGE
