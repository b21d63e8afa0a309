"""The promises of IOMMU_IOAS_IOVA_RANGES and IOMMU_IOAS_ALLOW_IOVAS (drivers/iommu/iommufd/ioas.c).

The kernel's own tests of the same: `iova_ranges`, `area_allowed`, `area_auto_iova` in selftests/iommu.
"""

from __future__ import annotations

import errno
import struct

import pytest

from pyvfio import iommufd_ioctls as uapi
from pyvfio.units import MIB, U64_MAX
from tests.contract.iommufd import EVERYTHING, Cdev, Iommufd, Ranges, Rig, Span
from tests.contract.world import BAD_ADDRESS, BASE, PAGE, refused

pytestmark = pytest.mark.iommufd


def ask(iommufd: Iommufd, ioas: int, count: int, address: int) -> tuple[int, int, int]:
    """Call IOMMU_IOAS_IOVA_RANGES with room for `count` ranges. Return errno, the count and the alignment written."""
    argument = bytearray(struct.pack("=IIIIQQ", 32, ioas, count, 0, address, 77))
    number = 0
    try:
        iommufd.world.ioctl(iommufd.fd, uapi.IOMMU_IOAS_IOVA_RANGES, argument)
    except OSError as error:
        number = error.errno or 0
    _, _, found, _, _, alignment = struct.unpack("=IIIIQQ", argument)
    return number, found, alignment


def test_without_a_device_every_iova_is_free_to_the_byte(iommufd: Iommufd) -> None:
    assert iommufd.iova_ranges(iommufd.ioas()) == ([EVERYTHING], 1)


def test_a_device_takes_the_interrupts_range_and_aligns_to_pages(rig: Rig) -> None:
    ranges, alignment = rig.iommufd.iova_ranges(rig.ioas)
    assert alignment == PAGE
    assert [ranges[0], ranges[1][0]] == [(0, 0xFEE0_0000 - 1), 0xFEF0_0000]
    assert ranges[-1][1] < U64_MAX


def test_a_device_that_leaves_gives_every_iova_back(rig: Rig) -> None:
    rig.cdev.detach()
    assert rig.iommufd.iova_ranges(rig.ioas) == ([EVERYTHING], 1)


def test_mappings_change_no_range(rig: Rig) -> None:
    before = rig.ranges
    rig.map()
    assert rig.ranges == before


def test_too_little_room_is_emsgsize_with_the_count_and_the_ranges_that_fit(rig: Rig) -> None:
    ranges = rig.ranges
    for count in range(len(ranges)):
        room = Ranges([(7, 7)] * 8)
        assert ask(rig.iommufd, rig.ioas, count, room.address) == (errno.EMSGSIZE, len(ranges), PAGE)
        assert room.read(8) == ranges[:count] + [(7, 7)] * (8 - count)


def test_more_room_than_ranges_is_left_alone(rig: Rig) -> None:
    ranges, room = rig.ranges, Ranges([(7, 7)] * 8)
    assert ask(rig.iommufd, rig.ioas, 8, room.address) == (0, len(ranges), PAGE)
    assert room.read(8) == ranges + [(7, 7)] * (8 - len(ranges))


def test_a_bad_address_for_the_ranges_is_efault_unless_there_is_no_room(rig: Rig) -> None:
    assert ask(rig.iommufd, rig.ioas, 8, BAD_ADDRESS)[0] == errno.EFAULT
    assert ask(rig.iommufd, rig.ioas, 0, BAD_ADDRESS)[:2] == (errno.EMSGSIZE, len(rig.ranges))


@pytest.mark.parametrize(
    "spans",
    [
        [(PAGE, PAGE)],
        [(2 * PAGE, PAGE)],
        [(0, PAGE - 1), (PAGE - 1, 2 * PAGE)],
        [(0, 8 * PAGE), (PAGE, 2 * PAGE)],
        [(PAGE, 2 * PAGE), (PAGE, 2 * PAGE)],
    ],
)
def test_allowed_ranges_are_two_bytes_at_least_and_do_not_overlap(iommufd: Iommufd, spans: list[Span]) -> None:
    with refused(errno.EINVAL):
        iommufd.allow(iommufd.ioas(), *spans)


def test_a_bad_address_of_allowed_ranges_is_efault(iommufd: Iommufd) -> None:
    with refused(errno.EFAULT):
        iommufd.call(uapi.IOMMU_IOAS_ALLOW_IOVAS, "IIIQ", iommufd.ioas(), 1, 0, BAD_ADDRESS)


def test_a_chosen_iova_is_in_the_allowed_ranges(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.allow(ioas, (4 * MIB, 4 * MIB + PAGE - 1), (6 * MIB, 6 * MIB + 2 * PAGE - 1))
    assert iommufd.map(ioas, iova=None, size=2 * PAGE) == 6 * MIB
    assert iommufd.map(ioas, iova=None) == 4 * MIB
    with refused(errno.ENOSPC):
        iommufd.map(ioas, iova=None)


def test_a_fixed_iova_may_be_outside_of_the_allowed_ranges(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.allow(ioas, (4 * MIB, 5 * MIB - 1))
    assert iommufd.map(ioas) == BASE


def test_allowed_ranges_replace_the_former_ones_and_none_allows_all(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.allow(ioas, (4 * MIB, 5 * MIB - 1))
    iommufd.allow(ioas, (8 * MIB, 9 * MIB - 1))
    assert iommufd.map(ioas, iova=None) == 8 * MIB
    iommufd.allow(ioas)
    assert iommufd.map(ioas, iova=None) == PAGE


def test_ranges_that_are_refused_leave_the_former_ones(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.allow(ioas, (4 * MIB, 5 * MIB - 1))
    with refused(errno.EINVAL):
        iommufd.allow(ioas, (8 * MIB, 9 * MIB - 1), (8 * MIB, 9 * MIB - 1))
    assert iommufd.map(ioas, iova=None) == 4 * MIB


def test_allowed_ranges_change_neither_the_ranges_nor_the_mappings(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.map(ioas)
    iommufd.allow(ioas, (4 * MIB, 5 * MIB - 1))
    assert iommufd.iova_ranges(ioas) == ([EVERYTHING], 1)
    assert iommufd.unmap(ioas) == PAGE


def test_a_reserved_range_cannot_be_allowed(rig: Rig) -> None:
    for span in ((0xFEE0_0000, 0xFEEF_FFFF), (0xFEDF_F000, 0xFEE0_0000), (0, U64_MAX)):
        with refused(errno.EADDRINUSE):
            rig.iommufd.allow(rig.ioas, span)
    rig.iommufd.allow(rig.ioas, (0, 0xFEDF_FFFF))


def test_an_allowed_range_refuses_a_device_that_reserves_it(iommufd: Iommufd, cdev: Cdev) -> None:
    ioas = iommufd.ioas()
    iommufd.allow(ioas, (0xFEE0_0000, 0xFEE0_0FFF))
    with refused(errno.EADDRINUSE):
        cdev.attach(ioas)
    iommufd.allow(ioas)
    cdev.attach(ioas)
