"""The promises of page tables and of hardware information (drivers/iommu/iommufd/hw_pagetable.c, device.c).

The kernel's own tests of the same: `alloc_hwpt_nested`, `get_hw_info`, `enforce_dirty` in selftests/iommu. IOMMUs of
QEMU 7.2 have neither nesting nor dirty tracking.
"""

from __future__ import annotations

import ctypes
import errno

import pytest

from pyvfio import iommufd_ioctls as uapi
from tests.contract.iommufd import NO_ID, Cdev, Iommufd, Rig
from tests.contract.world import BAD_ADDRESS, BASE, PAGE, refused

pytestmark = pytest.mark.iommufd

NEST_PARENT, DIRTY_TRACKING, FAULT_ID_VALID = 1, 2, 4


def hw_info(iommufd: Iommufd, device: int, *, size: int, address: int, flags: int = 0) -> tuple[int, int]:
    """Call IOMMU_GET_HW_INFO. Return the type and the length of the data."""
    answer = iommufd.call(uapi.IOMMU_GET_HW_INFO, "IIIQIIQ", flags, device, size, address, 0, 0, 0)
    return answer[4], answer[2]


def test_a_page_table_of_ones_own_is_attached_and_destroyed(rig: Rig) -> None:
    own = rig.iommufd.hwpt_alloc(rig.cdev.number, rig.ioas)
    assert own not in (rig.hwpt, rig.ioas, rig.cdev.number)
    rig.map()
    assert rig.cdev.attach(own) == own
    with refused(errno.ENOENT):
        rig.iommufd.destroy(rig.hwpt)
    with refused(errno.EBUSY):
        rig.iommufd.destroy(own)
    rig.cdev.detach()
    rig.iommufd.destroy(own)


def test_a_page_table_keeps_its_ioas_and_pins_its_mappings(iommufd: Iommufd, cdev: Cdev) -> None:
    ioas, before = iommufd.ioas(), iommufd.world.pinned()
    iommufd.map(ioas, size=2 * PAGE)
    own = iommufd.hwpt_alloc(cdev.number, ioas)
    assert iommufd.world.pinned() == before + 2 * PAGE
    with refused(errno.EBUSY):
        iommufd.destroy(ioas)
    iommufd.destroy(own)
    assert iommufd.world.pinned() == before
    iommufd.destroy(ioas)


def test_an_unknown_device_is_enoent_and_an_unknown_parent_einval(rig: Rig) -> None:
    for number in (0, NO_ID, rig.ioas):
        with refused(errno.ENOENT):
            rig.iommufd.hwpt_alloc(number, rig.ioas)
    for number in (0, NO_ID, rig.cdev.number):
        with refused(errno.EINVAL):
            rig.iommufd.hwpt_alloc(rig.cdev.number, number)


@pytest.mark.parametrize("flags", [NEST_PARENT, DIRTY_TRACKING, 1 << 31])
def test_flags_that_the_iommu_does_not_know_are_eopnotsupp(rig: Rig, flags: int) -> None:
    with refused(errno.EOPNOTSUPP):
        rig.iommufd.hwpt_alloc(rig.cdev.number, rig.ioas, flags)


def test_an_unknown_fault_queue_is_enoent_on_7_and_eopnotsupp_before(rig: Rig) -> None:
    with refused(errno.ENOENT if rig.world.since(7, 0) else errno.EOPNOTSUPP):
        rig.iommufd.hwpt_alloc(rig.cdev.number, rig.ioas, FAULT_ID_VALID)


def test_data_without_type_and_type_without_data_are_einval_before_the_device(iommufd: Iommufd) -> None:
    for kind, length in ((0, 8), (1, 0)):
        with refused(errno.EINVAL):
            iommufd.call(uapi.IOMMU_HWPT_ALLOC, "IIIIIIIQII", 0, NO_ID, NO_ID, 0, 0, kind, length, 0, 0, 0)


def test_a_page_table_is_no_parent_of_another(rig: Rig) -> None:
    own = rig.iommufd.hwpt_alloc(rig.cdev.number, rig.ioas)
    with refused(errno.EINVAL, errno.EOPNOTSUPP):
        rig.iommufd.hwpt_alloc(rig.cdev.number, own)


def test_without_dirty_tracking_it_is_neither_set_nor_read(rig: Rig) -> None:
    rig.map()
    for number in (0, NO_ID, rig.ioas, rig.cdev.number):
        for reserved in (0, 1):  # nobody looks at the reserved field
            with refused(errno.ENOENT):
                rig.iommufd.call(uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, "III", 1, number, reserved)
        with refused(errno.EOPNOTSUPP):
            rig.iommufd.call(uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, "III", 2, number, 0)
    for flags in (0, 1, 2):
        with refused(errno.EOPNOTSUPP):
            rig.iommufd.call(uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, "III", flags, rig.hwpt, 0)
    bitmap = ctypes.create_string_buffer(8)
    with refused(errno.EOPNOTSUPP):
        rig.iommufd.call(
            uapi.IOMMU_HWPT_GET_DIRTY_BITMAP,
            "IIIQQQQ",
            *(rig.hwpt, 0, 0, BASE, PAGE, PAGE, ctypes.addressof(bitmap)),
        )


# ------------------------------------------------------------------------------------------------------------- hardware


def test_the_length_of_the_data_is_the_kernels_and_the_rest_is_zeroed(rig: Rig) -> None:
    known = hw_info(rig.iommufd, rig.cdev.number, size=0, address=0)
    assert known in ((0, 0), (1, 24))
    for size in (known[1], known[1] + 16):
        buffer = ctypes.create_string_buffer(b"\xaa" * 64, 64)
        assert hw_info(rig.iommufd, rig.cdev.number, size=size, address=ctypes.addressof(buffer)) == known
        assert buffer.raw[known[1] : size] == bytes(size - known[1])
        assert buffer.raw[size:] == b"\xaa" * (64 - size)


def test_a_short_buffer_gets_the_beginning(rig: Rig) -> None:
    _, length = hw_info(rig.iommufd, rig.cdev.number, size=0, address=0)
    whole, part = (ctypes.create_string_buffer(b"\xaa" * 64, 64) for _ in range(2))
    hw_info(rig.iommufd, rig.cdev.number, size=length, address=ctypes.addressof(whole))
    hw_info(rig.iommufd, rig.cdev.number, size=length // 2, address=ctypes.addressof(part))
    assert part.raw[: length // 2] == whole.raw[: length // 2]
    assert part.raw[length // 2 :] == b"\xaa" * (64 - length // 2)


def test_unknown_flags_are_eopnotsupp_an_unknown_device_enoent_and_a_bad_address_efault(rig: Rig) -> None:
    with refused(errno.EOPNOTSUPP):
        hw_info(rig.iommufd, NO_ID, size=0, address=0, flags=2)
    for number in (0, NO_ID, rig.ioas):
        with refused(errno.ENOENT):
            hw_info(rig.iommufd, number, size=0, address=0)
    with refused(errno.EFAULT):
        hw_info(rig.iommufd, rig.cdev.number, size=64, address=BAD_ADDRESS)
