"""The promises of every command of /dev/iommu: size, reserved fields, ids, options (drivers/iommu/iommufd/main.c).

The kernel's own tests of the same: `cmd_fail`, `cmd_length`, `cmd_ex_fail`, `global_options` in selftests/iommu.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable

import pytest

from pyvfio import iommufd_ioctls as uapi
from tests.contract.iommufd import (
    BOTH_WAYS,
    FIXED,
    HUGE_PAGES,
    NO_ID,
    OPTION_GET,
    OPTION_SET,
    RLIMIT_MODE,
    Iommufd,
    Ranges,
    Rig,
)
from tests.contract.world import BAD_ADDRESS, BASE, PAGE, World, refused

pytestmark = pytest.mark.iommufd

# The least size of each structure: up to the end of the last field that the first kernel with the command knew.
LEAST = {
    "IOMMU_DESTROY": 8,
    "IOMMU_IOAS_ALLOC": 12,
    "IOMMU_IOAS_ALLOW_IOVAS": 24,
    "IOMMU_IOAS_COPY": 40,
    "IOMMU_IOAS_IOVA_RANGES": 32,
    "IOMMU_IOAS_MAP": 40,
    "IOMMU_IOAS_UNMAP": 24,
    "IOMMU_OPTION": 24,
    "IOMMU_VFIO_IOAS": 12,
    "IOMMU_HWPT_ALLOC": 24,
    "IOMMU_GET_HW_INFO": 32,
    "IOMMU_HWPT_SET_DIRTY_TRACKING": 16,
    "IOMMU_HWPT_GET_DIRTY_BITMAP": 48,
}
LEAST_SINCE_7 = {"IOMMU_IOAS_MAP_FILE": 40, "IOMMU_IOAS_CHANGE_PROCESS": 8}
LONGEST = 64
"""No structure is longer."""
each_command = pytest.mark.parametrize("name", list(LEAST))
each_new_command = pytest.mark.parametrize("name", list(LEAST_SINCE_7))


def send(iommufd: Iommufd, name: str, size: int, tail: bytes = b"") -> bytearray:
    """Make a call of `size` bytes, all fields zero but the last ones, which are `tail`. Return the structure."""
    argument = bytearray(struct.pack("=I", size) + bytes(size - 4 - len(tail)) + tail)
    iommufd.world.ioctl(iommufd.fd, int(getattr(uapi, name)), argument)
    return argument


def outcome(call: Callable[[], object]) -> int:
    """Return the errno of a call, 0 for success."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def test_iommufd_can_be_opened_many_times(world: World) -> None:
    first, second = Iommufd.of(world), Iommufd.of(world)
    assert first.ioas() == second.ioas() == 1


def test_an_iommufd_that_is_closed_takes_its_objects_along(world: World) -> None:
    iommufd = Iommufd.of(world)
    iommufd.map(iommufd.ioas())
    world.close(iommufd.fd)
    assert Iommufd.of(world).ioas() == 1


@pytest.mark.parametrize("number", [0x3B7F, 0x3B00, 0x3BC0, 0x3B00 + 0xFF])
def test_an_unknown_number_is_enotty(iommufd: Iommufd, number: int) -> None:
    with refused(errno.ENOTTY):
        iommufd.world.ioctl(iommufd.fd, number, BAD_ADDRESS)


def test_a_number_of_another_type_is_enotty_after_the_size_is_read(iommufd: Iommufd) -> None:
    wrong = uapi.IOMMU_IOAS_ALLOC ^ 0x100
    with refused(errno.EFAULT):
        iommufd.world.ioctl(iommufd.fd, wrong, BAD_ADDRESS)
    with refused(errno.ENOTTY):
        iommufd.world.ioctl(iommufd.fd, wrong, bytearray(64))


def test_commands_of_kernel_7_are_enotty_before(iommufd: Iommufd) -> None:
    expected = errno.EINVAL if iommufd.world.since(7, 0) else errno.ENOTTY
    for name in LEAST_SINCE_7:
        with refused(expected):
            iommufd.world.ioctl(iommufd.fd, int(getattr(uapi, name)), bytearray(struct.pack("=I", 4)) + bytes(60))


@each_command
def test_a_bad_pointer_is_efault(iommufd: Iommufd, name: str) -> None:
    with refused(errno.EFAULT):
        iommufd.world.ioctl(iommufd.fd, int(getattr(uapi, name)), BAD_ADDRESS)


@each_command
def test_a_structure_that_is_too_short_is_einval(iommufd: Iommufd, name: str) -> None:
    for size in (LEAST[name] - 1, 4, 0):
        argument = bytearray(struct.pack("=I", size)) + bytes(LONGEST)
        with refused(errno.EINVAL):
            iommufd.world.ioctl(iommufd.fd, int(getattr(uapi, name)), argument)


@each_command
def test_a_longer_structure_that_ends_in_zeros_is_the_same_call(iommufd: Iommufd, name: str) -> None:
    short = outcome(lambda: send(iommufd, name, LONGEST))
    assert short == outcome(lambda: send(iommufd, name, 2 * LONGEST))
    assert short not in (errno.E2BIG, errno.EFAULT, errno.ENOTTY)


@each_command
def test_a_longer_structure_with_another_end_is_e2big(iommufd: Iommufd, name: str) -> None:
    for size in (LONGEST + 1, LONGEST + 8, 2 * PAGE):
        with refused(errno.E2BIG):
            send(iommufd, name, size, b"\1")


@each_command
def test_a_structure_that_goes_beyond_the_memory_is_efault(iommufd: Iommufd, name: str) -> None:
    page = iommufd.world.memory(2 * PAGE)
    iommufd.world.kernel.munmap(page + PAGE, PAGE)
    start = page + PAGE - 8
    ctypes.memmove(start, struct.pack("=II", LEAST[name] if LEAST[name] > 8 else 12, 0), 8)
    with refused(errno.EFAULT):
        iommufd.world.ioctl(iommufd.fd, int(getattr(uapi, name)), start)


# -------------------------------------------------------------------------------------------------------------- ids


def test_ids_begin_at_1_and_the_lowest_free_one_is_next(iommufd: Iommufd) -> None:
    assert [iommufd.ioas() for _ in range(3)] == [1, 2, 3]
    iommufd.destroy(2)
    assert [iommufd.ioas() for _ in range(2)] == [2, 4]


@pytest.mark.parametrize("number", [0, 2, NO_ID, 0xFFFF_FFFF])
def test_to_destroy_an_id_that_is_none_is_enoent(iommufd: Iommufd, number: int) -> None:
    iommufd.ioas()
    with refused(errno.ENOENT):
        iommufd.destroy(number)


def test_an_ioas_is_destroyed_once(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.destroy(ioas)
    with refused(errno.ENOENT):
        iommufd.destroy(ioas)


def test_an_ioas_with_mappings_can_be_destroyed(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.map(ioas)
    iommufd.destroy(ioas)
    with refused(errno.ENOENT):
        iommufd.unmap(ioas)


def test_flags_of_ioas_alloc_are_eopnotsupp(iommufd: Iommufd) -> None:
    for flags in (1, 1 << 31):
        with refused(errno.EOPNOTSUPP):
            iommufd.call(uapi.IOMMU_IOAS_ALLOC, "II", flags, 0)


def test_the_id_is_written_back_and_no_more_than_the_size(iommufd: Iommufd) -> None:
    argument = bytearray(struct.pack("=III", 12, 0, 0xAAAA_AAAA) + b"\xbb" * 4)
    iommufd.world.ioctl(iommufd.fd, uapi.IOMMU_IOAS_ALLOC, argument)
    assert struct.unpack("=IIII", argument) == (12, 0, 1, 0xBBBB_BBBB)


def test_commands_of_an_ioas_refuse_an_id_that_is_none_and_one_of_a_device(rig: Rig) -> None:
    iommufd = rig.iommufd
    for number in (0, NO_ID, rig.cdev.number, rig.hwpt):
        calls = (
            lambda number=number: iommufd.map(number),
            lambda number=number: iommufd.unmap(number),
            lambda number=number: iommufd.copy(number, rig.ioas),
            lambda number=number: iommufd.copy(rig.ioas, number),
            lambda number=number: iommufd.iova_ranges(number),
            lambda number=number: iommufd.allow(number),
            lambda number=number: iommufd.huge_pages(number),
            lambda number=number: iommufd.vfio_ioas(1, number),
        )
        for call in calls:
            with refused(errno.ENOENT):
                call()


def test_reserved_fields_are_eopnotsupp_before_the_id_is_looked_up(iommufd: Iommufd) -> None:
    room = Ranges()
    for request, layout, fields in (
        (uapi.IOMMU_IOAS_MAP, "IIIQQQ", (FIXED | BOTH_WAYS, NO_ID, 1, 0, PAGE, BASE)),
        (uapi.IOMMU_IOAS_IOVA_RANGES, "IIIQQ", (NO_ID, 8, 1, room.address, 0)),
        (uapi.IOMMU_IOAS_ALLOW_IOVAS, "IIIQ", (NO_ID, 0, 1, room.address)),
        (uapi.IOMMU_OPTION, "IHHIQ", (HUGE_PAGES, OPTION_GET, 1, NO_ID, 0)),
        (uapi.IOMMU_VFIO_IOAS, "IHH", (NO_ID, 1, 1)),
        (uapi.IOMMU_HWPT_ALLOC, "IIIIIIIQII", (0, NO_ID, NO_ID, 0, 1, 0, 0, 0, 0, 0)),
    ):
        with refused(errno.EOPNOTSUPP):
            iommufd.call(request, layout, *fields)


# ---------------------------------------------------------------------------------------------------------- options


def test_an_unknown_option_and_an_unknown_operation_are_eopnotsupp(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    for option, operation, number in ((2, OPTION_GET, 0), (RLIMIT_MODE, 2, 0), (HUGE_PAGES, 2, ioas)):
        with refused(errno.EOPNOTSUPP):
            iommufd.option(option, operation, number)


def test_the_rlimit_mode_is_0_at_first_and_belongs_to_no_object(iommufd: Iommufd) -> None:
    assert iommufd.option(RLIMIT_MODE, OPTION_GET, 0, 77) == 0
    for operation in (OPTION_GET, OPTION_SET):
        with refused(errno.EOPNOTSUPP):
            iommufd.option(RLIMIT_MODE, operation, 1)


def test_the_rlimit_mode_is_0_or_1(iommufd: Iommufd) -> None:
    iommufd.option(RLIMIT_MODE, OPTION_SET, 0, 1)
    assert iommufd.option(RLIMIT_MODE, OPTION_GET, 0) == 1
    with refused(errno.EINVAL):
        iommufd.option(RLIMIT_MODE, OPTION_SET, 0, 2)
    assert iommufd.option(RLIMIT_MODE, OPTION_GET, 0) == 1
    iommufd.option(RLIMIT_MODE, OPTION_SET, 0, 0)
    assert iommufd.option(RLIMIT_MODE, OPTION_GET, 0) == 0


def test_the_rlimit_mode_cannot_change_while_there_is_any_object(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    for value in (0, 1, 2):
        with refused(errno.EBUSY):
            iommufd.option(RLIMIT_MODE, OPTION_SET, 0, value)
    iommufd.destroy(ioas)
    iommufd.option(RLIMIT_MODE, OPTION_SET, 0, 1)


def test_huge_pages_are_on_can_be_switched_and_are_0_or_1(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    assert iommufd.huge_pages(ioas) == 1
    for value in (0, 0, 1, 1, 0):
        iommufd.set_huge_pages(ioas, value)
        assert iommufd.huge_pages(ioas) == value
    with refused(errno.EINVAL):
        iommufd.set_huge_pages(ioas, 2)
    assert iommufd.huge_pages(ioas) == 0


def test_huge_pages_are_an_option_of_each_ioas(iommufd: Iommufd) -> None:
    first, second = iommufd.ioas(), iommufd.ioas()
    iommufd.set_huge_pages(first, 0)
    assert (iommufd.huge_pages(first), iommufd.huge_pages(second)) == (0, 1)
    for number in (0, NO_ID):
        with refused(errno.ENOENT):
            iommufd.huge_pages(number)


def test_huge_pages_cannot_be_switched_off_while_a_device_has_mappings(rig: Rig) -> None:
    rig.map()
    with refused(errno.EINVAL):
        rig.iommufd.set_huge_pages(rig.ioas, 0)
    assert rig.iommufd.huge_pages(rig.ioas) == 1
    rig.unmap()
    rig.iommufd.set_huge_pages(rig.ioas, 0)
    rig.map()
    rig.iommufd.set_huge_pages(rig.ioas, 0)
    rig.iommufd.set_huge_pages(rig.ioas, 1)
    assert rig.iommufd.huge_pages(rig.ioas) == 1


def test_without_a_device_huge_pages_can_be_switched_off_among_mappings_of_whole_pages(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.map(ioas)
    iommufd.set_huge_pages(ioas, 0)
    assert iommufd.huge_pages(ioas) == 0
    assert iommufd.iova_ranges(ioas)[1] == PAGE


def test_switched_off_huge_pages_align_an_ioas_to_pages(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.map(ioas, iova=BASE + 1)
    with refused(errno.EADDRINUSE):
        iommufd.set_huge_pages(ioas, 0)
    assert iommufd.huge_pages(ioas) == 1
    iommufd.unmap(ioas, iova=BASE + 1)
    iommufd.set_huge_pages(ioas, 0)
    with refused(errno.EINVAL):
        iommufd.map(ioas, iova=BASE + 1)


def test_the_descriptor_is_neither_read_nor_written(iommufd: Iommufd) -> None:
    with refused(errno.EINVAL):
        iommufd.world.kernel.pread(iommufd.fd, 1, 0)
    with refused(errno.EINVAL):
        iommufd.world.kernel.pwrite(iommufd.fd, b"1", 0)
