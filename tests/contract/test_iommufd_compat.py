"""The promises of type1's calls on an iommufd, and of a cut inside a mapping (drivers/iommu/iommufd/vfio_compat.c).

The kernel's own tests of the same: `vfio_ioas`, `simple_ioctls`, `unmap_cmd`, `map_cmd`, `info_cmd`, `set_iommu_cmd`,
`option_huge_pages`, `get_info`, `map`, `huge_map` in selftests/iommu.
"""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from pyvfio import ioctls
from pyvfio.units import MIB, U64_MAX
from tests.contract.iommufd import NO_ID, VFIO_CLEAR, VFIO_GET, VFIO_SET, Iommufd, Rig
from tests.contract.world import BAD_ADDRESS, BASE, NULL, PAGE, READ, Attached, World, refused

pytestmark = pytest.mark.iommufd

ALL, UNKNOWN = 2, 1 << 31
TYPE1, TYPE1V2, NOIOMMU = 1, 3, 8


@pytest.fixture
def compat(rig: Rig) -> Rig:
    """A device attached to the IOAS that type1's calls are for."""
    rig.iommufd.vfio_ioas(VFIO_SET, rig.ioas)
    return rig


@pytest.fixture
def cuttable(iommufd: Iommufd) -> Rig:
    """The same with huge pages off, so that mappings can be cut."""
    ioas = iommufd.ioas()
    iommufd.set_huge_pages(ioas, 0)
    iommufd.vfio_ioas(VFIO_SET, ioas)
    return Rig.of(iommufd, ioas=ioas)


def info(iommufd: Iommufd, argsz: int, *, room: int = 512) -> bytes:
    """Return the answer of VFIO_IOMMU_GET_INFO in a buffer of bytes 0xAA with this `argsz`."""
    buffer = (ctypes.c_char * room).from_buffer_copy(struct.pack("=I", argsz) + b"\xaa" * (room - 4))
    iommufd.world.ioctl(iommufd.fd, ioctls.VFIO_IOMMU_GET_INFO, buffer)
    return buffer.raw


# ---------------------------------------------------------------------------------------------------- which IOAS it is


def test_there_is_no_ioas_for_type1_s_calls_until_one_is_set(iommufd: Iommufd) -> None:
    with refused(errno.ENODEV):
        iommufd.vfio_ioas(VFIO_GET)
    for number in (0, NO_ID):
        with refused(errno.ENOENT):
            iommufd.vfio_ioas(VFIO_SET, number)
    ioas = iommufd.ioas()
    for _ in range(2):
        iommufd.vfio_ioas(VFIO_SET, ioas)
        assert iommufd.vfio_ioas(VFIO_GET) == ioas
    iommufd.vfio_ioas(VFIO_CLEAR)
    with refused(errno.ENODEV):
        iommufd.vfio_ioas(VFIO_GET)
    iommufd.vfio_ioas(VFIO_CLEAR)


def test_an_unknown_operation_is_eopnotsupp(iommufd: Iommufd) -> None:
    with refused(errno.EOPNOTSUPP):
        iommufd.vfio_ioas(3)


def test_an_ioas_that_is_destroyed_is_cleared(iommufd: Iommufd) -> None:
    ioas = iommufd.ioas()
    iommufd.vfio_ioas(VFIO_SET, ioas)
    iommufd.destroy(ioas)
    with refused(errno.ENODEV):
        iommufd.vfio_ioas(VFIO_GET)


def test_without_an_ioas_the_calls_are_einval_for_their_structure_and_else_enodev(iommufd: Iommufd) -> None:
    world, fd = iommufd.world, iommufd.fd
    for request, layout, size in (
        (ioctls.VFIO_IOMMU_MAP_DMA, "=IIQQQ", 32),
        (ioctls.VFIO_IOMMU_UNMAP_DMA, "=IIQQ", 24),
        (ioctls.VFIO_IOMMU_GET_INFO, "=IIQ", 16),
    ):
        rest = [0] * (len(layout) - 3)
        with refused(errno.EINVAL):
            world.ioctl(fd, request, bytearray(struct.pack(layout, size - 1, 0, *rest)))
        with refused(errno.ENODEV):
            world.ioctl(fd, request, bytearray(struct.pack(layout, size, 0, *rest)))
        with refused(errno.EFAULT):
            world.ioctl(fd, request, BAD_ADDRESS)
        if request != ioctls.VFIO_IOMMU_GET_INFO:
            with refused(errno.EINVAL):
                world.ioctl(fd, request, bytearray(struct.pack(layout, size, UNKNOWN, *rest)))
    for kind, expected in ((TYPE1, errno.ENODEV), (TYPE1V2, errno.ENODEV), (99, errno.EINVAL)):
        with refused(expected):
            world.ioctl(fd, ioctls.VFIO_SET_IOMMU, kind)


def test_version_and_extensions_are_answered_without_an_ioas(iommufd: Iommufd) -> None:
    world, fd = iommufd.world, iommufd.fd
    assert world.ioctl(fd, ioctls.VFIO_GET_API_VERSION) == 0
    for extension, answer in ((1, 1), (3, 1), (9, 1), (2, 0), (6, 0), (7, 0), (10, 0), (99, 0)):
        assert world.ioctl(fd, ioctls.VFIO_CHECK_EXTENSION, extension) == answer, extension


def test_dirty_pages_and_unknown_requests_are_enotty(compat: Rig) -> None:
    for request in (ioctls.VFIO_IOMMU_DIRTY_PAGES, 0x3B79):
        with refused(errno.ENOTTY):
            compat.world.ioctl(compat.iommufd.fd, request, bytearray(64))


def test_kinds_of_iommu_are_type1_and_v2_and_either_again(compat: Rig) -> None:
    for kind in (TYPE1V2, TYPE1V2, TYPE1, TYPE1V2):
        compat.world.ioctl(compat.iommufd.fd, ioctls.VFIO_SET_IOMMU, kind)
    for kind in (0, 2, NOIOMMU, 9, 10, 99):
        with refused(errno.EINVAL):
            compat.world.ioctl(compat.iommufd.fd, ioctls.VFIO_SET_IOMMU, kind)


def test_type1_v1_switches_huge_pages_off_and_v2_leaves_them_off(compat: Rig) -> None:
    iommufd = compat.iommufd
    iommufd.world.ioctl(iommufd.fd, ioctls.VFIO_SET_IOMMU, TYPE1V2)
    assert iommufd.huge_pages(compat.ioas) == 1
    for kind in (TYPE1, TYPE1V2):
        iommufd.world.ioctl(iommufd.fd, ioctls.VFIO_SET_IOMMU, kind)
        assert iommufd.huge_pages(compat.ioas) == 0


# ------------------------------------------------------------------------------------------------------- map and unmap


def test_map_and_unmap_are_those_of_the_ioas(compat: Rig) -> None:
    compat.iommufd.compat_map(size=2 * PAGE)
    assert compat.unmap(size=2 * PAGE) == 2 * PAGE
    compat.map(size=2 * PAGE)
    assert compat.iommufd.compat_unmap(size=2 * PAGE) == 2 * PAGE


@pytest.mark.parametrize(
    ("iova", "size", "flags", "expected"),
    [
        (BASE, PAGE, 0, errno.EINVAL),
        (BASE, PAGE, 1, 0),
        (BASE, 0, 3, errno.EINVAL),
        (BASE + 1, PAGE, 3, errno.EINVAL),
        (BASE, PAGE, 4, errno.EINVAL),
        (BASE, PAGE, 8, errno.EINVAL),
        (0xFEE0_0000, PAGE, 3, errno.EINVAL),
        (U64_MAX - PAGE + 1, 2 * PAGE, 3, errno.EOVERFLOW),
        (2 * BASE, PAGE, 3, errno.EEXIST),
    ],
)
def test_a_map_is_refused_as_ioas_map_refuses(compat: Rig, iova: int, size: int, flags: int, expected: int) -> None:
    compat.map(iova=2 * BASE)
    if expected:
        with refused(expected):
            compat.iommufd.compat_map(iova=iova, size=size, flags=flags)
    else:
        compat.iommufd.compat_map(iova=iova, size=size, flags=flags)
    assert compat.unmap(iova=2 * BASE) == PAGE


def test_bad_memory_is_efault(compat: Rig) -> None:
    with refused(errno.EFAULT):
        compat.iommufd.compat_map(vaddr=NULL)


def test_unmap_all_takes_no_range(compat: Rig) -> None:
    for page in (0, 2):
        compat.iommufd.compat_map(iova=BASE + page * PAGE)
    for iova, size in ((BASE, 0), (0, PAGE)):
        with refused(errno.EINVAL):
            compat.iommufd.compat_unmap(iova=iova, size=size, flags=ALL)
    assert compat.iommufd.compat_unmap(iova=0, size=0, flags=ALL) == 2 * PAGE
    assert compat.iommufd.compat_unmap(iova=0, size=0, flags=ALL) == 0


@pytest.mark.parametrize("flags", [1, 4, 8, ALL | 4, UNKNOWN])
def test_other_flags_of_unmap_are_einval(compat: Rig, flags: int) -> None:
    with refused(errno.EINVAL):
        compat.iommufd.compat_unmap(flags=flags)


def test_nothing_to_unmap_is_0_bytes_as_with_type1(compat: Rig) -> None:
    assert compat.iommufd.compat_unmap() == 0
    compat.map()
    assert compat.iommufd.compat_unmap(iova=BASE + PAGE, size=4 * PAGE) == 0


def test_with_huge_pages_a_cut_is_enoent_and_the_size_is_written_back(compat: Rig) -> None:
    for page in (0, 1):
        compat.map(iova=BASE + page * PAGE)
    compat.map(iova=BASE + 2 * PAGE, size=2 * PAGE)
    argument = bytearray(struct.pack("=IIQQ", 24, 0, BASE, 3 * PAGE))
    with refused(errno.ENOENT):
        compat.world.ioctl(compat.iommufd.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
    assert struct.unpack("=IIQQ", argument) == (24, 0, BASE, 2 * PAGE)
    assert compat.iommufd.mapped(compat.ioas) == [2, 3]


def test_the_answer_of_an_unmap_that_cannot_be_written_is_efault(compat: Rig) -> None:
    compat.map()
    page = compat.world.memory()
    ctypes.memmove(page, struct.pack("=IIQQ", 24, 0, BASE, PAGE), 24)
    compat.world.kernel.mprotect(page, PAGE, READ)
    with refused(errno.EFAULT):
        compat.world.ioctl(compat.iommufd.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, page)
    assert compat.unmap_all() == 0


# ----------------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize(("start", "pages"), [(0, 1), (7, 9), (15, 1), (3, 4), (8, 8), (-2, 4), (14, 9), (-1, 18)])
def test_without_huge_pages_any_pages_can_be_cut_out(cuttable: Rig, start: int, pages: int) -> None:
    before = cuttable.world.pinned()
    cuttable.map(size=16 * PAGE)
    gone = [page for page in range(start, start + pages) if 0 <= page < 16]
    assert cuttable.iommufd.compat_unmap(iova=BASE + start * PAGE, size=pages * PAGE) == len(gone) * PAGE
    assert cuttable.world.pinned() == before + (16 - len(gone)) * PAGE
    assert cuttable.iommufd.mapped(cuttable.ioas) == [page for page in range(16) if page not in gone]


def test_a_cut_leaves_mappings_of_their_own(cuttable: Rig) -> None:
    cuttable.map(size=16 * PAGE)
    cuttable.iommufd.compat_unmap(iova=BASE + 4 * PAGE, size=2 * PAGE)
    with refused(errno.ENOENT):
        cuttable.unmap(size=3 * PAGE)
    assert cuttable.unmap(size=4 * PAGE) == 4 * PAGE
    assert cuttable.unmap(iova=BASE + 6 * PAGE, size=10 * PAGE) == 10 * PAGE


def test_the_native_unmap_cuts_nothing_with_huge_pages_off_either(cuttable: Rig) -> None:
    cuttable.map(size=4 * PAGE)
    with refused(errno.ENOENT):
        cuttable.unmap(size=PAGE)


def test_a_refused_unmap_may_have_cut(cuttable: Rig) -> None:
    """A mapping that was cut at an address and not unmapped there is two mappings."""
    cuttable.map(size=4 * PAGE)
    assert cuttable.iommufd.compat_unmap(iova=BASE + 2 * PAGE, size=4 * PAGE) == 2 * PAGE
    assert cuttable.unmap(size=2 * PAGE) == 2 * PAGE


@pytest.mark.parametrize(("start", "size"), [(1, PAGE), (0, PAGE - 1), (PAGE // 2, PAGE)])
def test_a_cut_inside_of_a_page_is_einval(cuttable: Rig, start: int, size: int) -> None:
    cuttable.map(size=4 * PAGE)
    with refused(errno.EINVAL):
        cuttable.iommufd.compat_unmap(iova=BASE + start, size=size)
    assert cuttable.iommufd.mapped(cuttable.ioas) == [0, 1, 2, 3]


def test_a_copy_is_cut_apart_from_the_source(cuttable: Rig) -> None:
    before = cuttable.world.pinned()
    cuttable.map(size=8 * PAGE)
    cuttable.iommufd.copy(cuttable.ioas, cuttable.ioas, iova=0, size=8 * PAGE)
    assert cuttable.iommufd.compat_unmap(iova=BASE + PAGE, size=3 * PAGE) == 3 * PAGE
    assert cuttable.world.pinned() == before + 8 * PAGE
    assert cuttable.iommufd.compat_unmap(iova=2 * PAGE, size=2 * PAGE) == 2 * PAGE
    assert cuttable.world.pinned() == before + 6 * PAGE


def test_a_mebibyte_is_cut_off_two(cuttable: Rig) -> None:
    before = cuttable.world.pinned()
    cuttable.map(iova=2 * MIB, size=2 * MIB)
    assert cuttable.iommufd.compat_unmap(iova=3 * MIB, size=MIB) == MIB
    assert cuttable.world.pinned() == before + MIB
    assert cuttable.unmap(iova=2 * MIB, size=MIB) == MIB


# ------------------------------------------------------------------------------------------------------- information


def test_info_tells_the_size_it_needs_and_gives_capabilities_where_there_is_room(compat: Rig) -> None:
    total = struct.unpack_from("=I", info(compat.iommufd, 16))[0]
    ranges = compat.ranges
    for argsz in range(24, total):
        answer = info(compat.iommufd, argsz)
        assert struct.unpack_from("=II", answer) == (total, 3)
        assert struct.unpack_from("=I", answer, 16)[0] == 0
        assert answer[argsz:] == b"\xaa" * (512 - argsz)
    answer = info(compat.iommufd, total)
    first = struct.unpack_from("=I", answer, 16)[0]
    identity, version, following, avail = struct.unpack_from("=HHII", answer, first)
    assert (identity, version, avail) == (ioctls.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, U64_MAX >> 32)
    identity, version, following, count = struct.unpack_from("=HHII", answer, following)
    assert (identity, version, following) == (ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0)
    at = answer.index(struct.pack("=QQ", *ranges[0]))
    assert list(struct.iter_unpack("=QQ", answer[at : at + 16 * count])) == ranges


def test_a_bad_pointer_for_info_is_efault(compat: Rig) -> None:
    with refused(errno.EFAULT):
        compat.world.ioctl(compat.iommufd.fd, ioctls.VFIO_IOMMU_GET_INFO, BAD_ADDRESS)


# -------------------------------------------------------------------------------------------- a group in an iommufd


@pytest.mark.real_kernel("the fake takes no iommufd in place of a container")
def test_a_group_takes_an_iommufd_for_a_container_and_makes_an_ioas(iommufd: Iommufd) -> None:
    world = iommufd.world
    group = world.open(str(world.group))
    world.set_container(group, iommufd.fd)
    ioas = iommufd.vfio_ioas(VFIO_GET)
    world.open_device(group)
    assert iommufd.iova_ranges(ioas)[1] == PAGE
    before = world.pinned()
    iommufd.compat_map(size=2 * PAGE)
    assert world.pinned() == before + 2 * PAGE
    assert iommufd.unmap(ioas, size=2 * PAGE) == 2 * PAGE


@pytest.mark.real_kernel("the fake takes no iommufd in place of a container")
def test_a_group_of_an_iommufd_has_a_container_and_leaves_it(iommufd: Iommufd) -> None:
    world = iommufd.world
    group = world.open(str(world.group))
    world.set_container(group, iommufd.fd)
    assert world.status(group) == 3
    with refused(errno.EINVAL):
        world.set_container(group, iommufd.fd)
    world.ioctl(group, ioctls.VFIO_GROUP_UNSET_CONTAINER)
    assert world.status(group) == 1


def test_type1_containers_and_an_iommufd_live_side_by_side(rig: Rig, other: World) -> None:
    attached = Attached.of(other, ioctls.VFIO_TYPE1v2_IOMMU)
    attached.map()
    rig.map()
    assert (attached.unmap(), rig.unmap()) == (PAGE, PAGE)
