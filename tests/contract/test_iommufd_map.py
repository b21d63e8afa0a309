"""The promises of IOMMU_IOAS_MAP: refusals and their order, memory, chosen IOVA (drivers/iommu/iommufd/io_pagetable.c).

The kernel's own tests of the same: `area`, `area_auto_iova`, `ioas_iova_alloc`, `ioas_align_change` and
`reserved_overflow` in selftests/iommu; `vfio_dma_mapping_test`, `vfio_dma_map_limit_test` and
`vfio_dma_mapping_mmio_test` in selftests/vfio.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from itertools import pairwise

import pytest

from pyvfio import iommufd_ioctls as uapi
from pyvfio.units import KIB, MIB, U64_MAX, align_up
from tests.contract.iommufd import BOTH_WAYS, FIXED, READABLE, WRITEABLE, Cdev, Iommufd, Rig
from tests.contract.world import BASE, BOTH, NONE, NULL, PAGE, READ, WRITE, refused

pytestmark = pytest.mark.iommufd

LAST_PAGE = U64_MAX - PAGE + 1
MAP_SHARED, MAP_FIXED = 1, 0x10
MADV_HUGEPAGE = 14
SHAPES = [(0, 4), (-1, 2), (3, 2), (1, 1), (-1, 6), (0, 1), (3, 1)]


@pytest.mark.parametrize("size", [PAGE, 16 * PAGE, 512 * PAGE])
def test_a_mapping_is_unmapped_with_its_exact_size_and_only_once(rig: Rig, size: int) -> None:
    rig.map(iova=16 * MIB, size=size)
    assert rig.unmap(iova=16 * MIB, size=size) == size
    with refused(errno.ENOENT):
        rig.unmap(iova=16 * MIB, size=size)


def test_iova_0_can_be_mapped(rig: Rig) -> None:
    rig.map(iova=0)
    assert rig.unmap(iova=0) == PAGE


@pytest.mark.parametrize("flags", [READABLE, WRITEABLE, BOTH_WAYS])
def test_reading_writing_and_both_can_be_had(rig: Rig, flags: int) -> None:
    rig.map(flags=flags)


def test_neither_reading_nor_writing_is_einval_before_the_ioas_is_looked_up(rig: Rig) -> None:
    for ioas in (rig.ioas, 0):
        with refused(errno.EINVAL):
            rig.iommufd.map(ioas, flags=0)


@pytest.mark.parametrize("flags", [8, 1 << 31])
def test_other_flags_are_eopnotsupp(rig: Rig, flags: int) -> None:
    with refused(errno.EOPNOTSUPP):
        rig.map(flags=BOTH_WAYS | flags)


def test_flags_come_before_the_overflow_and_that_before_einval(rig: Rig) -> None:
    with refused(errno.EOPNOTSUPP):
        rig.map(flags=8, iova=U64_MAX)
    with refused(errno.EOVERFLOW):
        rig.map(flags=0, iova=U64_MAX)
    with refused(errno.EOVERFLOW):
        rig.map(flags=0, size=U64_MAX, vaddr=NULL)


def test_size_0_is_einval(rig: Rig) -> None:
    with refused(errno.EINVAL):
        rig.map(size=0)


@pytest.mark.parametrize(("iova", "shift", "size"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (PAGE // 2, 0, 0)])
def test_a_device_aligns_address_iova_and_size_to_pages(rig: Rig, iova: int, shift: int, size: int) -> None:
    with refused(errno.EINVAL):
        rig.map(iova=BASE + iova, vaddr=rig.world.memory(3 * PAGE) + shift, size=PAGE + size)


def test_without_a_device_any_byte_can_be_mapped(iommufd: Iommufd) -> None:
    ioas, vaddr = iommufd.ioas(), iommufd.world.memory()
    iommufd.map(ioas, iova=BASE + 3, vaddr=vaddr + 5, size=7)
    iommufd.map(ioas, iova=BASE + 10, vaddr=vaddr + 1, size=1)
    with refused(errno.EEXIST):
        iommufd.map(ioas, iova=BASE + 9, vaddr=vaddr, size=1)
    assert iommufd.unmap(ioas, iova=BASE + 3, size=7) == 7
    assert iommufd.unmap(ioas, iova=BASE + 10, size=1) == 1


def test_a_mapping_that_is_not_aligned_to_pages_refuses_the_device(cdev: Cdev, iommufd: Iommufd) -> None:
    ioas, vaddr = iommufd.ioas(), iommufd.world.memory(2 * PAGE)
    for iova, start, size in ((BASE + 1, vaddr, PAGE), (BASE, vaddr + 1, PAGE), (BASE, vaddr, PAGE + 1)):
        iommufd.map(ioas, iova=iova, vaddr=start, size=size)
        with refused(errno.EADDRINUSE):
            cdev.attach(ioas)
        assert iommufd.unmap_all(ioas) == size
    cdev.attach(ioas)


def test_an_iova_that_wraps_is_eoverflow(rig: Rig) -> None:
    with refused(errno.EOVERFLOW):
        rig.map(iova=LAST_PAGE, size=2 * PAGE)
    with refused(errno.EOVERFLOW):
        rig.map(iova=LAST_PAGE, size=1 << 63, vaddr=PAGE)
    with refused(errno.EOVERFLOW):
        rig.unmap(iova=LAST_PAGE, size=2 * PAGE)


def test_an_address_that_wraps_is_eoverflow_but_einval_before_7_for_a_size_of_almost_2_64(rig: Rig) -> None:
    with refused(errno.EOVERFLOW):
        rig.map(vaddr=LAST_PAGE, size=2 * PAGE)
    with refused(errno.EOVERFLOW if rig.world.since(7, 0) else errno.EINVAL):
        rig.map(vaddr=LAST_PAGE, size=LAST_PAGE)


def test_the_last_byte_of_2_64_can_be_named_by_no_call(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    with refused(errno.EOVERFLOW):
        iommufd.map(ioas, iova=U64_MAX, size=1)
    iommufd.map(ioas, iova=LAST_PAGE)
    assert iommufd.unmap(ioas, iova=LAST_PAGE) == PAGE


@pytest.mark.parametrize(("start", "pages"), SHAPES)
def test_any_overlap_is_eexist(rig: Rig, start: int, pages: int) -> None:
    rig.map(size=4 * PAGE)
    with refused(errno.EEXIST):
        rig.map(iova=BASE + start * PAGE, size=pages * PAGE)


def test_neighbours_do_not_overlap(rig: Rig) -> None:
    for page in (1, 0, 2):
        rig.map(iova=BASE + page * PAGE)
    assert rig.unmap(size=3 * PAGE) == 3 * PAGE


def test_the_same_memory_can_be_mapped_twice(rig: Rig) -> None:
    vaddr = rig.world.memory()
    for iova in (BASE, 0):
        rig.map(iova=iova, vaddr=vaddr)


def test_two_thousand_mappings_of_a_byte_are_fine_without_a_device(iommufd: Iommufd) -> None:
    ioas, vaddr = iommufd.ioas(), iommufd.world.memory()
    for number in range(2000):
        iommufd.map(ioas, iova=2 * number, vaddr=vaddr, size=1)
    assert iommufd.unmap_all(ioas) == 2000


def test_each_range_can_be_mapped_up_to_its_last_page_and_no_further(rig: Rig) -> None:
    for _, last in rig.ranges:
        page = last - PAGE + 1
        with refused(errno.EINVAL, errno.EOVERFLOW):
            rig.map(iova=page, size=2 * PAGE)
        rig.map(iova=page)
        assert rig.unmap(iova=page) == PAGE
        rig.map(iova=page)
        assert rig.unmap_all() == PAGE


def test_the_hole_between_two_ranges_is_einval(rig: Rig) -> None:
    first, second = rig.ranges[:2]
    hole = first[1] + 1
    for iova, size in ((hole, PAGE), (hole - PAGE, second[0] - hole + 2 * PAGE), (hole - PAGE, 2 * PAGE)):
        with refused(errno.EINVAL):
            rig.map(iova=iova, size=size)
    rig.map(iova=second[0])


def test_a_reserved_range_is_found_before_an_overlap_and_both_before_the_memory(rig: Rig) -> None:
    hole = rig.ranges[0][1] + 1
    rig.map(iova=hole - PAGE)
    with refused(errno.EINVAL):
        rig.map(iova=hole - PAGE, size=2 * PAGE, vaddr=PAGE)
    with refused(errno.EEXIST):
        rig.map(iova=hole - 2 * PAGE, size=2 * PAGE, vaddr=PAGE)


# -------------------------------------------------------------------------------------------------- the kernel's choice


def test_the_kernel_chooses_from_one_page_on_never_0(rig: Rig) -> None:
    assert rig.map(iova=None) == PAGE
    assert rig.map(iova=None) == 2 * PAGE
    rig.unmap(iova=PAGE)
    assert rig.map(iova=None) == PAGE


def test_the_choice_is_aligned_as_size_and_address_are(rig: Rig) -> None:
    memory = align_up(rig.world.memory(4 * MIB), 2 * MIB)
    for size, vaddr, alignment in (
        (64 * KIB, memory, 64 * KIB),
        (2 * MIB, memory, 2 * MIB),
        (64 * KIB, memory + PAGE, PAGE),
        (3 * PAGE, memory, 4 * PAGE),
        (2 * PAGE, memory + 2 * PAGE, 2 * PAGE),
    ):
        assert rig.map(iova=None, size=size, vaddr=vaddr) % alignment == 0


@pytest.mark.parametrize(("shift", "expected"), [(0, 64 * KIB), (8 * PAGE, 32 * KIB), (PAGE, PAGE)])
def test_the_choice_is_no_more_aligned_than_the_address(rig: Rig, shift: int, expected: int) -> None:
    memory = align_up(rig.world.memory(4 * MIB), 2 * MIB)
    assert rig.map(iova=None, size=64 * KIB, vaddr=memory + shift) == expected


def test_the_choice_overlaps_nothing_and_is_written_back(rig: Rig) -> None:
    spans = sorted((rig.map(iova=None, size=pages * PAGE), pages * PAGE) for pages in (1, 3, 2, 5, 1, 4))
    for (start, size), (following, _) in pairwise(spans):
        assert start + size <= following
    assert rig.unmap_all() == 16 * PAGE


def test_the_choice_is_outside_of_reserved_ranges(rig: Rig) -> None:
    (_, last), (second, _) = rig.ranges[:2]
    rig.iommufd.allow(rig.ioas, (last - 2 * PAGE + 1, last), (second, second + PAGE - 1))
    assert sorted(rig.map(iova=None) for _ in range(3)) == [last + 1 - 2 * PAGE, last + 1 - PAGE, second]
    with refused(errno.ENOSPC):
        rig.map(iova=None)


def test_a_size_that_no_range_has_is_enospc(rig: Rig) -> None:
    with refused(errno.ENOSPC):
        rig.map(iova=None, size=1 << 62, vaddr=PAGE)


# --------------------------------------------------------------------------------------------------- memory: EFAULT


@pytest.mark.parametrize("vaddr", [NULL, PAGE, 1 << 47, 1 << 62, 0xFFFF_8000_0000_0000, LAST_PAGE - PAGE])
def test_memory_that_is_not_this_process_s_is_efault(rig: Rig, vaddr: int) -> None:
    with refused(errno.EFAULT):
        rig.map(vaddr=vaddr)
    with refused(errno.ENOENT):
        rig.unmap()


def test_without_a_device_nothing_is_checked_or_pinned(iommufd: Iommufd) -> None:
    ioas, before = iommufd.ioas(), iommufd.world.pinned()
    iommufd.map(ioas, vaddr=NULL)
    iommufd.map(ioas, iova=0xFEE0_0000)
    iommufd.map(ioas, iova=1 << 60)
    assert iommufd.world.pinned() == before
    assert iommufd.unmap_all(ioas) == 3 * PAGE


@pytest.mark.parametrize(
    ("protection", "flags"),
    [(NONE, READABLE), (NONE, WRITEABLE), (READ, WRITEABLE), (READ, BOTH_WAYS), (WRITE, READABLE)],
)
def test_the_process_needs_the_rights_that_the_device_gets(rig: Rig, protection: int, flags: int) -> None:
    with refused(errno.EFAULT):
        rig.map(vaddr=rig.world.memory(protection=protection), flags=flags)


def test_pages_that_are_there_and_can_be_written_can_be_read_by_the_device(rig: Rig) -> None:
    vaddr = rig.world.memory(protection=WRITE)
    with refused(errno.EFAULT):
        rig.map(vaddr=vaddr, flags=READABLE)
    rig.map(vaddr=vaddr, flags=WRITEABLE)
    rig.map(iova=0, vaddr=vaddr, flags=READABLE)


@pytest.mark.parametrize(
    ("protection", "flags"), [(READ, READABLE), (WRITE, WRITEABLE), (WRITE, BOTH_WAYS), (BOTH, READABLE)]
)
def test_no_more_rights_than_those_are_needed(rig: Rig, protection: int, flags: int) -> None:
    rig.map(vaddr=rig.world.memory(protection=protection), flags=flags)


def test_a_hole_in_the_memory_is_efault_and_nothing_stays_mapped_or_pinned(rig: Rig) -> None:
    vaddr, before = rig.world.memory(4 * PAGE), rig.world.pinned()
    rig.world.kernel.munmap(vaddr + 2 * PAGE, PAGE)
    with refused(errno.EFAULT):
        rig.map(vaddr=vaddr, size=4 * PAGE)
    assert rig.world.pinned() == before
    rig.map(vaddr=vaddr, size=2 * PAGE)


def test_a_shared_file_is_mapped_up_to_its_end_and_no_further(rig: Rig) -> None:
    kernel = rig.world.kernel
    fd = kernel.memfd_create("contract", 0)
    kernel.ftruncate(fd, PAGE)
    vaddr = kernel.mmap(0, 2 * PAGE, BOTH, MAP_SHARED, fd=fd)
    kernel.close(fd)
    with refused(errno.EFAULT):
        rig.map(vaddr=vaddr, size=2 * PAGE)
    rig.map(vaddr=vaddr)
    rig.unmap()
    kernel.munmap(vaddr, 2 * PAGE)


def test_memory_may_have_been_joined_from_several_areas(rig: Rig) -> None:
    vaddr = rig.world.memory(2 * PAGE)
    rig.world.kernel.mmap(vaddr + PAGE, PAGE, BOTH, MAP_SHARED | 0x20 | MAP_FIXED)
    rig.map(vaddr=vaddr, size=2 * PAGE)


@pytest.mark.parametrize("pages", [1, 4])
def test_a_bar_by_its_address_is_efault(rig: Rig, pages: int) -> None:
    kernel = rig.world.kernel
    vaddr = kernel.mmap(0, 4 * PAGE, BOTH, MAP_SHARED, fd=rig.cdev.fd, offset=0)
    with refused(errno.EFAULT):
        rig.map(vaddr=vaddr, size=pages * PAGE)
    kernel.munmap(vaddr, 4 * PAGE)


def test_two_mib_of_huge_pages_can_be_mapped_and_not_unmapped_in_part(rig: Rig) -> None:
    before = rig.world.pinned()
    vaddr = align_up(rig.world.memory(4 * MIB), 2 * MIB)
    rig.world.kernel.madvise(vaddr, 2 * MIB, MADV_HUGEPAGE)
    ctypes.memset(vaddr, 1, 2 * MIB)
    rig.map(iova=2 * MIB, vaddr=vaddr, size=2 * MIB)
    assert rig.world.pinned() == before + 2 * MIB
    with refused(errno.ENOENT):
        rig.unmap(iova=2 * MIB)
    assert rig.unmap(iova=2 * MIB, size=2 * MIB) == 2 * MIB
    assert rig.world.pinned() == before


def test_a_mapping_stays_although_its_answer_cannot_be_written(rig: Rig) -> None:
    page = rig.world.memory()
    fields = (40, FIXED | BOTH_WAYS, rig.ioas, 0, rig.world.memory(), PAGE, BASE)
    ctypes.memmove(page, struct.pack("=IIIIQQQ", *fields), 40)
    rig.world.kernel.mprotect(page, PAGE, READ)
    with refused(errno.EFAULT):
        rig.world.ioctl(rig.iommufd.fd, uapi.IOMMU_IOAS_MAP, page)
    assert rig.unmap() == PAGE
