"""The promises of a device's cdev: bind, attach, replace, detach, and the group beside it (drivers/vfio/device_cdev.c).

The kernel's own tests of the same: `vfio_iommufd_setup_test` in selftests/vfio; `ioas_destroy`, `hwpt_attach`,
`replace` in selftests/iommu.
"""

from __future__ import annotations

import errno
import struct

import pytest

from pyvfio import ioctls
from tests.contract.iommufd import EVERYTHING, NO_ID, Cdev, Iommufd, Rig, open_cdev
from tests.contract.world import BAD_ADDRESS, BASE, NULL, PAGE, Attached, World, refused

pytestmark = pytest.mark.iommufd

MSI = 0xFEE0_0000


@pytest.fixture
def unbound(iommufd: Iommufd) -> Cdev:
    """An open cdev that is bound to no iommufd."""
    return Cdev.of(iommufd.world)


# ------------------------------------------------------------------------------------------------------------- bind


def test_before_bind_every_call_is_einval(unbound: Cdev, iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    for call in (unbound.get_info, lambda: unbound.attach(ioas), unbound.detach):
        with refused(errno.EINVAL):
            call()
    for request in (ioctls.VFIO_DEVICE_RESET, ioctls.VFIO_DEVICE_GET_REGION_INFO, 0x3BFF):
        with refused(errno.EINVAL):
            unbound.world.ioctl(unbound.fd, request, bytearray(64))
    with refused(errno.EINVAL):
        unbound.world.kernel.pread(unbound.fd, 4, 7 << 40)


def test_after_bind_the_device_answers(unbound: Cdev, iommufd: Iommufd) -> None:
    unbound.bind(iommufd.fd)
    assert unbound.get_info() == 9
    unbound.world.kernel.pread(unbound.fd, 4, 7 << 40)


def test_a_bound_device_is_an_object_with_an_id_which_nobody_destroys(unbound: Cdev, iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    assert unbound.bind(iommufd.fd) not in (0, ioas)
    with refused(errno.EBUSY):
        iommufd.destroy(unbound.number)
    unbound.world.close(unbound.fd)
    with refused(errno.ENOENT):
        iommufd.destroy(unbound.number)


@pytest.mark.parametrize(
    ("argsz", "flags", "fd"),
    [(15, 0, None), (0, 0, None), (16, 1 << 31, None), (16, 2, None), (16, 0, -1), (16, 0, -2)],
)
def test_a_short_argsz_unknown_flags_and_a_negative_descriptor_are_einval(
    unbound: Cdev, iommufd: Iommufd, argsz: int, flags: int, fd: int | None
) -> None:
    with refused(errno.EINVAL):
        unbound.bind(iommufd.fd if fd is None else fd, argsz=argsz, flags=flags)
    unbound.bind(iommufd.fd)


def test_a_closed_descriptor_is_ebadf_and_another_file_ebadfd(unbound: Cdev, iommufd: Iommufd) -> None:
    world = iommufd.world
    with refused(errno.EBADF):
        unbound.bind(1000)
    for fd in (world.keep(world.kernel.eventfd(0, 0)), unbound.fd):
        with refused(errno.EBADFD):
            unbound.bind(fd)
    unbound.bind(iommufd.fd)


def test_a_container_of_type1_is_not_an_iommufd(unbound: Cdev) -> None:
    with refused(errno.EBADFD):
        unbound.bind(unbound.world.open("vfio"))


def test_a_second_bind_is_einval_whatever_the_descriptor(unbound: Cdev, iommufd: Iommufd) -> None:
    unbound.bind(iommufd.fd)
    for fd in (iommufd.fd, Iommufd.of(unbound.world).fd, 1000, -1):
        with refused(errno.EINVAL):
            unbound.bind(fd)


def test_the_cdev_opens_many_times_and_binds_once(unbound: Cdev, iommufd: Iommufd) -> None:
    second = Cdev(unbound.world, open_cdev(unbound.world))
    unbound.bind(iommufd.fd)
    with refused(errno.EINVAL):
        second.bind(iommufd.fd)
    with refused(errno.EINVAL):
        second.get_info()
    unbound.world.close(unbound.fd)
    second.bind(iommufd.fd)
    assert second.get_info() == 9


def test_a_bad_pointer_is_efault(unbound: Cdev, iommufd: Iommufd) -> None:
    with refused(errno.EFAULT):
        unbound.world.ioctl(unbound.fd, ioctls.VFIO_DEVICE_BIND_IOMMUFD, BAD_ADDRESS)
    unbound.bind(iommufd.fd)
    for request in (ioctls.VFIO_DEVICE_ATTACH_IOMMUFD_PT, ioctls.VFIO_DEVICE_DETACH_IOMMUFD_PT):
        with refused(errno.EFAULT):
            unbound.world.ioctl(unbound.fd, request, BAD_ADDRESS)


def test_a_longer_bind_may_end_in_anything_but_on_7(unbound: Cdev, iommufd: Iommufd) -> None:
    argument = bytearray(struct.pack("=IIiIQQ", 32, 0, iommufd.fd, 0, 0, 1))
    if unbound.world.since(7, 0):
        with refused(errno.E2BIG):
            unbound.world.ioctl(unbound.fd, ioctls.VFIO_DEVICE_BIND_IOMMUFD, argument)
    else:
        unbound.world.ioctl(unbound.fd, ioctls.VFIO_DEVICE_BIND_IOMMUFD, argument)


# ----------------------------------------------------------------------------------------------- the group beside it


def test_an_open_group_is_ebusy_for_bind(unbound: Cdev, iommufd: Iommufd) -> None:
    group = unbound.world.open(str(unbound.world.group))
    with refused(errno.EBUSY):
        unbound.bind(iommufd.fd)
    unbound.world.close(group)
    unbound.bind(iommufd.fd)


def test_a_bound_cdev_is_ebusy_for_the_group(unbound: Cdev, iommufd: Iommufd) -> None:
    world = unbound.world
    world.close(world.open(str(world.group)))
    unbound.bind(iommufd.fd)
    with refused(errno.EBUSY):
        world.open(str(world.group))
    world.close(unbound.fd)
    world.open(str(world.group))


def test_a_cdev_that_is_open_but_not_bound_disturbs_no_group(unbound: Cdev) -> None:
    attached = Attached.of(unbound.world, ioctls.VFIO_TYPE1v2_IOMMU)
    attached.world.open_device(attached.group)
    attached.map()


def test_bind_is_not_for_a_device_of_a_group(iommufd: Iommufd) -> None:
    attached = Attached.of(iommufd.world, ioctls.VFIO_TYPE1v2_IOMMU)
    device = Cdev(iommufd.world, attached.world.open_device(attached.group))
    with refused(errno.EINVAL):
        device.bind(iommufd.fd)


def test_attach_and_detach_are_not_for_a_device_of_a_group(iommufd: Iommufd) -> None:
    attached = Attached.of(iommufd.world, ioctls.VFIO_TYPE1v2_IOMMU)
    device = Cdev(iommufd.world, attached.world.open_device(attached.group))
    for call in (lambda: device.attach(iommufd.ioas()), device.detach):
        with refused(errno.ENOTTY, errno.EINVAL):
            call()


# ------------------------------------------------------------------------------------------------------- attach, detach


def test_attach_answers_with_the_id_of_a_page_table_that_is_the_kernels(rig: Rig) -> None:
    assert rig.hwpt not in (rig.ioas, rig.cdev.number)
    with refused(errno.EBUSY):
        rig.iommufd.destroy(rig.hwpt)


def test_the_same_attach_again_is_fine(rig: Rig) -> None:
    assert rig.cdev.attach(rig.ioas) == rig.hwpt
    assert rig.cdev.attach(rig.hwpt) == rig.hwpt


def test_an_attached_ioas_is_not_destroyed(rig: Rig) -> None:
    with refused(errno.EBUSY):
        rig.iommufd.destroy(rig.ioas)
    rig.cdev.detach()
    rig.iommufd.destroy(rig.ioas)


def test_the_page_table_goes_with_the_device(rig: Rig) -> None:
    rig.cdev.detach()
    with refused(errno.ENOENT):
        rig.iommufd.destroy(rig.hwpt)


def test_an_unknown_id_is_enoent_and_a_device_einval(rig: Rig) -> None:
    for number in (0, NO_ID, 0xFFFF_FFFF):
        with refused(errno.ENOENT):
            rig.cdev.attach(number)
    with refused(errno.EINVAL):
        rig.cdev.attach(rig.cdev.number)
    assert rig.cdev.attach(rig.ioas) == rig.hwpt


def test_short_argsz_and_flags_of_attach_and_detach_are_einval(rig: Rig) -> None:
    for argsz, flags in ((11, 0), (12, 2), (12, 1 << 31)):
        with refused(errno.EINVAL):
            rig.cdev.attach(rig.ioas, argsz=argsz, flags=flags)
    for argsz, flags in ((7, 0), (8, 2), (8, 1 << 31)):
        with refused(errno.EINVAL):
            rig.cdev.detach(argsz=argsz, flags=flags)


def test_detach_is_fine_at_any_time(rig: Rig) -> None:
    for _ in range(2):
        rig.cdev.detach()
    rig.cdev.attach(rig.ioas)


def test_attach_to_another_ioas_replaces_the_present_one(rig: Rig) -> None:
    other, before = rig.iommufd.ioas(), rig.world.pinned()
    rig.map(size=4 * PAGE)
    rig.iommufd.map(other, size=2 * PAGE)
    assert rig.world.pinned() == before + 4 * PAGE
    rig.cdev.attach(other)
    assert rig.world.pinned() == before + 2 * PAGE
    assert rig.iommufd.iova_ranges(rig.ioas) == ([EVERYTHING], 1)
    rig.iommufd.destroy(rig.ioas)
    with refused(errno.EBUSY):
        rig.iommufd.destroy(other)


def test_a_replace_that_is_refused_leaves_the_present_one(rig: Rig) -> None:
    other = rig.iommufd.ioas()
    rig.iommufd.map(other, iova=MSI)
    with refused(errno.EADDRINUSE):
        rig.cdev.attach(other)
    assert rig.cdev.attach(rig.ioas) == rig.hwpt
    rig.iommufd.destroy(other)


@pytest.mark.parametrize(("iova", "vaddr", "expected"), [(BASE, NULL, errno.EFAULT), (MSI, None, errno.EADDRINUSE)])
def test_attach_checks_the_mappings_and_works_when_the_bad_one_is_unmapped(
    iommufd: Iommufd, cdev: Cdev, iova: int, vaddr: int | None, expected: int
) -> None:
    ioas, before = iommufd.ioas(), iommufd.world.pinned()
    iommufd.map(ioas, iova=0, size=2 * PAGE)
    iommufd.map(ioas, iova=iova, vaddr=vaddr)
    with refused(expected):
        cdev.attach(ioas)
    assert iommufd.world.pinned() == before
    assert iommufd.iova_ranges(ioas) == ([EVERYTHING], 1)
    iommufd.unmap(ioas, iova=iova)
    cdev.attach(ioas)
    assert iommufd.world.pinned() == before + 2 * PAGE


def test_a_mapping_above_the_aperture_refuses_the_device(iommufd: Iommufd, cdev: Cdev) -> None:
    ioas = iommufd.ioas()
    iommufd.map(ioas, iova=1 << 60)
    with refused(errno.EADDRINUSE):
        cdev.attach(ioas)
    iommufd.unmap(ioas, iova=1 << 60)
    cdev.attach(ioas)


def test_pages_are_pinned_while_a_device_is_attached(rig: Rig) -> None:
    before = rig.world.pinned()
    rig.map(size=4 * PAGE)
    assert rig.world.pinned() == before + 4 * PAGE
    rig.cdev.detach()
    assert rig.world.pinned() == before
    rig.cdev.attach(rig.ioas)
    assert rig.world.pinned() == before + 4 * PAGE
    rig.world.close(rig.cdev.fd)
    assert rig.world.pinned() == before
    assert rig.unmap(size=4 * PAGE) == 4 * PAGE


def test_closing_the_iommufd_leaves_the_mappings_to_the_device(rig: Rig) -> None:
    before = rig.world.pinned()
    rig.map(size=4 * PAGE)
    rig.world.close(rig.iommufd.fd)
    assert rig.world.pinned() == before + 4 * PAGE
    assert rig.cdev.get_info() == 9
    rig.world.close(rig.cdev.fd)
    assert rig.world.pinned() == before


def test_two_descriptors_of_one_open_iommufd_are_one(rig: Rig) -> None:
    second = Iommufd(rig.world, rig.world.keep(rig.world.kernel.dup(rig.iommufd.fd)))
    rig.map()
    rig.world.close(rig.iommufd.fd)
    assert second.unmap(rig.ioas) == PAGE


def test_two_devices_have_an_ioas_each_or_one_together(rig: Rig, other: World) -> None:
    cdev, before = Cdev.of(other), rig.world.pinned()
    cdev.bind(rig.iommufd.fd)
    apart = rig.iommufd.ioas()
    cdev.attach(apart)
    rig.map(size=2 * PAGE)
    rig.iommufd.map(apart, size=PAGE)
    assert rig.world.pinned() == before + 3 * PAGE
    cdev.attach(rig.ioas)
    assert rig.world.pinned() == before + 2 * PAGE
    rig.cdev.detach()
    assert rig.world.pinned() == before + 2 * PAGE
    cdev.detach()
    assert rig.world.pinned() == before


def test_objects_of_one_iommufd_are_none_of_another(rig: Rig) -> None:
    second = Iommufd.of(rig.world)
    for _ in range(5):
        number = second.ioas()
    with refused(errno.ENOENT):
        rig.cdev.attach(number + 10)
    with refused(errno.ENOENT):
        second.unmap(number + 10)
