"""The promises of IOMMU_IOAS_MAP_FILE and of IOMMU_IOAS_CHANGE_PROCESS (7.x; drivers/iommu/iommufd/pages.c, ioas.c).

The kernel's own tests of the same: `change_process`, and the variants with a memfd, in selftests/iommu.
"""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from pyvfio import iommufd_ioctls as uapi
from pyvfio.units import U64_MAX
from tests.contract.iommufd import (
    BOTH_WAYS,
    NO_ID,
    OPTION_SET,
    READABLE,
    RLIMIT_MODE,
    VFIO_SET,
    WRITEABLE,
    Cdev,
    Iommufd,
    Rig,
)
from tests.contract.world import BASE, BOTH, PAGE, World, refused

pytestmark = pytest.mark.iommufd(since=(7, 0))

F_ADD_SEALS, F_SEAL_WRITE, MFD_ALLOW_SEALING = 1033, 8, 2
SHARED = 1


def memfd(world: World, size: int, flags: int = 0) -> int:
    """Return a memory file of `size` bytes, open until the end of the test."""
    fd = world.keep(world.kernel.memfd_create("contract", flags))
    world.kernel.ftruncate(fd, size)
    return fd


def change_process(iommufd: Iommufd, reserved: int = 0) -> None:
    """Call IOMMU_IOAS_CHANGE_PROCESS."""
    iommufd.call(uapi.IOMMU_IOAS_CHANGE_PROCESS, "I", reserved)


def test_a_memory_file_is_mapped_in_parts_and_outlives_its_descriptor(rig: Rig) -> None:
    before, fd = rig.world.pinned(), memfd(rig.world, 8 * PAGE)
    rig.iommufd.map_file(rig.ioas, fd, size=2 * PAGE)
    rig.iommufd.map_file(rig.ioas, fd, start=3 * PAGE, size=5 * PAGE, iova=0)
    rig.world.close(fd)
    assert rig.world.pinned() == before + 7 * PAGE
    assert rig.unmap(size=2 * PAGE) == 2 * PAGE
    assert rig.unmap(iova=0, size=5 * PAGE) == 5 * PAGE
    assert rig.world.pinned() == before


def test_the_kernel_chooses_an_iova_for_a_file_too(rig: Rig) -> None:
    fd = memfd(rig.world, 2 * PAGE)
    assert rig.iommufd.map_file(rig.ioas, fd, iova=None) == PAGE


@pytest.mark.parametrize("pages", [2, 3])
def test_beyond_the_end_of_the_file_is_einval(rig: Rig, pages: int) -> None:
    fd = memfd(rig.world, 2 * PAGE)
    with refused(errno.EINVAL):
        rig.iommufd.map_file(rig.ioas, fd, start=(pages - 1) * PAGE, size=2 * PAGE)
    assert rig.unmap_all() == 0


def test_without_a_device_the_end_is_checked_by_the_attach(iommufd: Iommufd, cdev: Cdev) -> None:
    ioas, fd = iommufd.ioas(), memfd(iommufd.world, PAGE)
    iommufd.map_file(ioas, fd, size=2 * PAGE)
    with refused(errno.EINVAL):
        cdev.attach(ioas)
    iommufd.world.kernel.ftruncate(fd, 2 * PAGE)
    cdev.attach(ioas)


def test_a_descriptor_that_is_not_open_is_ebadf_and_another_file_einval(rig: Rig) -> None:
    world = rig.world
    for fd in (-1, 1000):
        with refused(errno.EBADF):
            rig.iommufd.map_file(rig.ioas, fd)
    own = world.keep(os.open("/proc/version", os.O_RDONLY))
    for fd in (world.keep(world.kernel.eventfd(0, 0)), rig.iommufd.fd, rig.cdev.fd, own):
        with refused(errno.EINVAL):
            rig.iommufd.map_file(rig.ioas, fd)


def test_numbers_are_refused_as_those_of_map(rig: Rig) -> None:
    fd = memfd(rig.world, 2 * PAGE)
    iommufd, ioas = rig.iommufd, rig.ioas
    rig.map(iova=4 * PAGE)
    for expected, arguments in (
        (errno.EOPNOTSUPP, {"flags": BOTH_WAYS | 8}),
        (errno.EINVAL, {"flags": 0}),
        (errno.EINVAL, {"size": 0}),
        (errno.EINVAL, {"start": 1}),
        (errno.EINVAL, {"size": PAGE + 1}),
        (errno.EINVAL, {"iova": 1}),
        (errno.EINVAL, {"iova": 0xFEE0_0000}),
        (errno.EEXIST, {"iova": 4 * PAGE}),
        (errno.EOVERFLOW, {"iova": U64_MAX}),
        (errno.EOVERFLOW, {"size": U64_MAX}),
        (errno.EOVERFLOW, {"start": U64_MAX - PAGE + 1, "size": 2 * PAGE}),
    ):
        with refused(expected):
            iommufd.map_file(ioas, fd, **arguments)
    with refused(errno.ENOENT):
        iommufd.map_file(NO_ID, fd)


def test_the_range_is_looked_at_before_the_descriptor_and_the_ioas_before_both(rig: Rig) -> None:
    with refused(errno.ENOENT):
        rig.iommufd.map_file(NO_ID, -1, size=0)
    with refused(errno.EINVAL):
        rig.iommufd.map_file(rig.ioas, -1, size=0)
    with refused(errno.EOVERFLOW):
        rig.iommufd.map_file(rig.ioas, -1, start=2 * PAGE, size=U64_MAX - PAGE)


def test_a_file_that_can_only_be_read_is_mapped_for_writes_of_the_device(rig: Rig) -> None:
    fd = memfd(rig.world, PAGE)
    read_only = rig.world.keep(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
    rig.iommufd.map_file(rig.ioas, read_only)
    sealed = memfd(rig.world, PAGE, MFD_ALLOW_SEALING)
    fcntl.fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE)
    rig.iommufd.map_file(rig.ioas, sealed, iova=0, flags=WRITEABLE)


def test_a_file_that_is_cut_stays_pinned_until_it_is_unmapped(rig: Rig) -> None:
    before, fd = rig.world.pinned(), memfd(rig.world, 2 * PAGE)
    rig.iommufd.map_file(rig.ioas, fd, size=2 * PAGE)
    rig.world.kernel.ftruncate(fd, 0)
    rig.world.forgive()
    assert rig.world.pinned() == before + 2 * PAGE
    with refused(errno.EINVAL):
        rig.iommufd.map_file(rig.ioas, fd, iova=0)
    assert rig.unmap(size=2 * PAGE) == 2 * PAGE


def test_a_file_is_copied_and_its_copy_is_pinned_once(rig: Rig) -> None:
    before, fd = rig.world.pinned(), memfd(rig.world, 4 * PAGE)
    rig.iommufd.map_file(rig.ioas, fd, size=4 * PAGE)
    rig.iommufd.copy(rig.ioas, rig.ioas, source_iova=BASE + PAGE, iova=0, size=2 * PAGE)
    assert rig.world.pinned() == before + 4 * PAGE


def test_a_file_can_be_cut(iommufd: Iommufd) -> None:
    ioas, before, fd = iommufd.ioas(), iommufd.world.pinned(), memfd(iommufd.world, 4 * PAGE)
    iommufd.set_huge_pages(ioas, 0)
    iommufd.vfio_ioas(VFIO_SET, ioas)
    rig = Rig.of(iommufd, ioas=ioas)
    iommufd.map_file(ioas, fd, size=4 * PAGE)
    assert iommufd.compat_unmap(iova=BASE + PAGE, size=2 * PAGE) == 2 * PAGE
    assert rig.world.pinned() == before + 2 * PAGE
    assert iommufd.mapped(ioas) == [0, 3]


@pytest.mark.parametrize("mode", [0, 1], ids=["by user", "by process"])
def test_the_pages_of_a_file_are_charged(world: World, mode: int) -> None:
    iommufd = Iommufd.of(world)
    iommufd.option(RLIMIT_MODE, OPTION_SET, 0, mode)
    rig, fd = Rig.of(iommufd), memfd(world, 4 * PAGE)
    with world.memlock(2 * PAGE + (world.kernel.memlock().used if mode else 0)):
        with refused(errno.ENOMEM):
            iommufd.map_file(rig.ioas, fd, size=4 * PAGE)
        iommufd.map_file(rig.ioas, fd, size=2 * PAGE)
        with refused(errno.ENOMEM):
            iommufd.map_file(rig.ioas, fd, iova=0)


# ---------------------------------------------------------------------------------------------------- change_process


def test_files_change_to_the_process_that_has_them_already(rig: Rig) -> None:
    before, fd = rig.world.pinned(), memfd(rig.world, 2 * PAGE)
    change_process(rig.iommufd)
    rig.iommufd.map_file(rig.ioas, fd, size=2 * PAGE)
    change_process(rig.iommufd)
    assert rig.world.pinned() == before + 2 * PAGE
    assert rig.unmap(size=2 * PAGE) == 2 * PAGE
    assert rig.world.pinned() == before


def test_a_mapping_by_address_in_any_ioas_is_einval_for_change_process(rig: Rig) -> None:
    fd, apart = memfd(rig.world, 2 * PAGE), rig.iommufd.ioas()
    vaddr = rig.world.kernel.mmap(0, PAGE, BOTH, SHARED, fd=fd)
    rig.iommufd.map_file(rig.ioas, fd)
    rig.iommufd.map(apart, vaddr=vaddr, flags=READABLE)
    with refused(errno.EINVAL):
        change_process(rig.iommufd)
    rig.iommufd.unmap(apart)
    change_process(rig.iommufd)
    rig.world.kernel.munmap(vaddr, PAGE)


def test_reserved_bytes_of_change_process_are_eopnotsupp(iommufd: Iommufd) -> None:
    with refused(errno.EOPNOTSUPP):
        change_process(iommufd, 1)
    change_process(iommufd)
