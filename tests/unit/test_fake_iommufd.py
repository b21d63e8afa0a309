"""iommufd of the fake kernel: what 6.12 and 7.3 do, a sentence a test. The calls are made through the seam."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from functools import partial

import pytest

from pyvfio import iommufd_ioctls as uapi
from pyvfio.testing.fake import DmaFault, FakeDevice, FakeKernel
from pyvfio.units import KIB, MIB, PAGE_SIZE, U64_MAX
from tests.unit.bare_iommufd import ALL, BareDevice, BareIommufd, outcome
from tests.unit.fakes import BDF, PRIVATE, READ_WRITE

INTEL = [(0, 0xFEDF_FFFF), (0xFEF0_0000, 0x7F_FFFF_FFFF)]
_BLOCK = 64 * KIB


@pytest.fixture(params=["6.12", "7.3"])
def kernel(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    """A kernel with iommufd beside type1. At the end the fake agrees with itself."""
    with FakeKernel(request.param, iommufd=True) as fake:
        yield fake
        fake._machine._check_state()


@pytest.fixture
def iommufd(kernel: FakeKernel) -> BareIommufd:
    """An open /dev/iommu."""
    return BareIommufd(kernel)


@pytest.fixture
def device(kernel: FakeKernel, iommufd: BareIommufd) -> BareDevice:
    """A device that is bound."""
    bound = BareDevice(kernel, BDF)
    bound.bind(iommufd.fd)
    return bound


@pytest.fixture
def ioas(iommufd: BareIommufd) -> int:
    """An address space."""
    return iommufd.ioas()


@pytest.fixture
def memory(kernel: FakeKernel) -> int:
    """1 MiB, aligned to 2 MiB."""
    return -(-kernel.mmap(0, 3 * MIB, READ_WRITE, PRIVATE) // (2 * MIB)) * 2 * MIB


@pytest.fixture
def attached(iommufd: BareIommufd, device: BareDevice, ioas: int) -> int:
    """An address space to which the device is attached."""
    device.attach(ioas)
    return ioas


# ------------------------------------------------------------------------------------------------------- dispatch


def test_objects_have_the_lowest_free_numbers_from_1_on(iommufd: BareIommufd) -> None:
    assert [iommufd.ioas() for _ in range(3)] == [1, 2, 3]
    iommufd.destroy(2)
    assert iommufd.ioas() == 2


def test_a_structure_that_is_too_short_is_einval_and_a_longer_one_must_end_with_zeros(iommufd: BareIommufd) -> None:
    call = iommufd.kernel.ioctl
    for size, tail, answer in ((11, b"", "EINVAL"), (16, bytes(4), 0), (16, b"\0\0\0\1", "E2BIG")):
        buffer = bytearray(struct.pack("=III", size, 0, 0) + tail)
        assert outcome(partial(call, iommufd.fd, uapi.IOMMU_IOAS_ALLOC, buffer)) == answer


def test_a_bad_address_is_efault(iommufd: BareIommufd) -> None:
    assert outcome(lambda: iommufd.kernel.ioctl(iommufd.fd, uapi.IOMMU_IOAS_ALLOC, 0)) == "EFAULT"


def test_numbers_outside_of_the_table_are_enotty_before_any_read(kernel: FakeKernel, iommufd: BareIommufd) -> None:
    last = uapi.IOMMU_FAULT_QUEUE_ALLOC if kernel.version.name == "6.12" else uapi.IOMMU_IOAS_NOIOMMU_GET_PA
    for request in (uapi.IOMMU_DESTROY - 1, last + 1):
        assert outcome(partial(kernel.ioctl, iommufd.fd, request, 0)) == "ENOTTY"
    assert outcome(lambda: kernel.ioctl(iommufd.fd, 0x1000 | uapi.IOMMU_DESTROY, 0)) == "EFAULT"
    assert (
        outcome(lambda: kernel.ioctl(iommufd.fd, 0x1_0000 | uapi.IOMMU_DESTROY, bytearray(b"\x08\0\0\0"))) == "ENOTTY"
    )


def test_what_6_12_does_not_have_is_enotty() -> None:
    with FakeKernel("6.12", iommufd=True) as kernel:
        iommufd = BareIommufd(kernel)
        assert outcome(iommufd.change_process) == "ENOTTY"
        assert outcome(lambda: iommufd.map_file(iommufd.ioas(), 0, 0, PAGE_SIZE)) == "ENOTTY"


def test_unknown_flags_are_eopnotsupp_before_the_number_is_looked_up(iommufd: BareIommufd) -> None:
    assert outcome(lambda: iommufd.call(uapi.IOMMU_IOAS_ALLOC, "II", 1, 0)) == "EOPNOTSUPP"
    assert outcome(lambda: iommufd.map(99, 0, PAGE_SIZE, flags=8 | 6)) == "EOPNOTSUPP"
    assert outcome(lambda: iommufd.map(99, 0, PAGE_SIZE)) == "ENOENT"


def test_an_unknown_number_and_one_of_another_kind_are_enoent(iommufd: BareIommufd, device: BareDevice) -> None:
    assert outcome(lambda: iommufd.destroy(0)) == "ENOENT"
    assert outcome(lambda: iommufd.ranges(1)) == "ENOENT"  # the device
    assert outcome(lambda: iommufd.destroy(1)) == "EBUSY"


# -------------------------------------------------------------------------------------------- without a page table


def test_a_space_without_a_device_is_everything_and_aligned_to_1(iommufd: BareIommufd, ioas: int) -> None:
    assert iommufd.ranges(ioas) == ([(0, U64_MAX)], 1, 1)


def test_without_a_device_nothing_is_checked_nor_pinned(kernel: FakeKernel, iommufd: BareIommufd, ioas: int) -> None:
    iommufd.map(ioas, 0x1000, 2 * PAGE_SIZE, 0xFEE0_0000)  # nobody's memory, in the window for messages
    assert kernel.pinned == 0
    assert kernel.mappings() == ()
    kernel.check()


def test_the_attach_fails_for_what_could_not_be_mapped_and_changes_nothing(
    kernel: FakeKernel, iommufd: BareIommufd, device: BareDevice, ioas: int, memory: int
) -> None:
    iommufd.map(ioas, memory, PAGE_SIZE, 0)
    iommufd.map(ioas, 0x1000, PAGE_SIZE, PAGE_SIZE)
    assert outcome(lambda: device.attach(ioas)) == "EFAULT"
    assert kernel.pinned == 0
    assert iommufd.ranges(ioas) == ([(0, U64_MAX)], 1, 1)
    iommufd.unmap(ioas, PAGE_SIZE, PAGE_SIZE)
    iommufd.map(ioas, memory, PAGE_SIZE, 0xFEE0_0000)
    assert outcome(lambda: device.attach(ioas)) == "EADDRINUSE"
    iommufd.unmap(ioas, 0xFEE0_0000, PAGE_SIZE)
    assert device.attach(ioas) == 3
    assert kernel.pinned == PAGE_SIZE


def test_the_last_detach_unpins_everything_and_keeps_the_areas(
    kernel: FakeKernel, iommufd: BareIommufd, device: BareDevice, attached: int, memory: int
) -> None:
    iommufd.map(attached, memory, MIB, 0)
    assert (kernel.pinned, len(kernel.mappings(BDF))) == (MIB, 1)
    device.detach()
    assert (kernel.pinned, kernel.mappings(BDF)) == (0, ())
    assert iommufd.ranges(attached)[0] == [(0, U64_MAX)]
    kernel.munmap(memory, MIB)  # nothing is pinned
    kernel.check()
    assert outcome(lambda: device.attach(attached)) == "EFAULT"
    assert iommufd.unmap(attached, 0, MIB) == MIB


# ------------------------------------------------------------------------------------------------------------ map


def test_a_device_narrows_the_ranges_to_those_of_its_iommu(iommufd: BareIommufd, attached: int) -> None:
    assert iommufd.ranges(attached) == (INTEL, 2, PAGE_SIZE)


def test_short_room_for_ranges_is_emsgsize_with_the_count(iommufd: BareIommufd, attached: int) -> None:
    spans = (ctypes.c_uint64 * 2)()
    buffer = bytearray(struct.pack("=IIIIQQ", 32, attached, 1, 0, ctypes.addressof(spans), 0))
    call = iommufd.kernel.ioctl
    assert outcome(lambda: call(iommufd.fd, uapi.IOMMU_IOAS_IOVA_RANGES, buffer)) == "EMSGSIZE"
    assert struct.unpack("=IIIIQQ", buffer)[2::3] == (2, PAGE_SIZE)
    assert tuple(spans) == INTEL[0]


def test_each_bad_map_has_its_errno(kernel: FakeKernel, iommufd: BareIommufd, attached: int, memory: int) -> None:
    iommufd.map(attached, memory, PAGE_SIZE, MIB)
    readonly = kernel.mmap(0, PAGE_SIZE, 1, PRIVATE)

    def mapped(vaddr: int, size: int, iova: int, flags: int = 6) -> object:
        return outcome(lambda: iommufd.map(attached, vaddr, size, iova, flags))

    assert mapped(memory, PAGE_SIZE, MIB) == "EEXIST"
    assert mapped(memory, 0, MIB) == "EINVAL"
    assert mapped(memory, 100, 0) == "EINVAL"
    assert mapped(memory, PAGE_SIZE, 100) == "EINVAL"
    assert mapped(memory + 8, PAGE_SIZE, 0) == "EINVAL"
    assert mapped(memory, PAGE_SIZE, 0, 0) == "EINVAL"
    assert mapped(memory, PAGE_SIZE, 0xFEE0_0000) == "EINVAL"
    assert mapped(memory, 2 * PAGE_SIZE, 0xFEDF_F000) == "EINVAL"
    assert mapped(memory, PAGE_SIZE, 1 << 39) == "EINVAL"
    assert mapped(memory, 2 * PAGE_SIZE, ALL - PAGE_SIZE + 1) == "EOVERFLOW"
    assert mapped(memory, ALL, 0) == "EOVERFLOW"
    assert mapped(memory, PAGE_SIZE, ALL) == "EOVERFLOW"
    assert mapped(ALL - PAGE_SIZE + 1, PAGE_SIZE, 0) == "EOVERFLOW"
    assert mapped(0x1000, PAGE_SIZE, 0) == "EFAULT"
    assert mapped(readonly, PAGE_SIZE, 0) == "EFAULT"
    assert mapped(readonly, PAGE_SIZE, 0, 4) == 0
    assert kernel.pinned == 2 * PAGE_SIZE


def test_a_bar_cannot_be_mapped_by_its_address(kernel: FakeKernel, iommufd: BareIommufd) -> None:
    with FakeKernel(kernel.version.name, iommufd=True, groups=[(2, [FakeDevice(BDF)])]) as own:
        device, space = BareDevice(own, BDF), BareIommufd(own)
        device.bind(space.fd)
        device.attach(ioas := space.ioas())
        bar = own.mmap(0, PAGE_SIZE, READ_WRITE, 1, fd=device.fd, offset=0)
        assert outcome(lambda: space.map(ioas, bar, PAGE_SIZE, 0)) == "EFAULT"
        own.munmap(bar, PAGE_SIZE)


def test_the_kernel_chooses_an_iova_from_0x1000_on_aligned_as_memory_and_size_are(
    iommufd: BareIommufd, attached: int, memory: int
) -> None:
    assert iommufd.map(attached, memory + PAGE_SIZE, PAGE_SIZE) == PAGE_SIZE
    assert iommufd.map(attached, memory, _BLOCK) == _BLOCK
    assert iommufd.map(attached, memory, 3 * PAGE_SIZE) == 4 * PAGE_SIZE
    iommufd.unmap(attached, PAGE_SIZE, PAGE_SIZE)
    assert iommufd.map(attached, memory, PAGE_SIZE) == PAGE_SIZE


def test_allowed_ranges_steer_only_what_the_kernel_chooses(iommufd: BareIommufd, attached: int, memory: int) -> None:
    iommufd.allow(attached, (0x10_0000, 0x10_FFFF), (0x30_0000, 0x30_FFFF))
    assert iommufd.map(attached, memory, PAGE_SIZE) == 0x10_0000
    assert iommufd.map(attached, memory, _BLOCK) == 0x30_0000
    assert outcome(lambda: iommufd.map(attached, memory, 2 * _BLOCK)) == "ENOSPC"
    assert iommufd.map(attached, memory, PAGE_SIZE, 0) == 0
    iommufd.allow(attached)
    assert iommufd.map(attached, memory, 2 * _BLOCK) == 2 * _BLOCK


def test_allowed_ranges_are_disjoint_and_reserve_nothing(iommufd: BareIommufd, attached: int) -> None:
    for spans, answer in (
        (((5, 5),), "EINVAL"),
        (((0, 9), (9, 12)), "EINVAL"),
        (((0xFEE0_0000, 0xFEE0_0FFF),), "EADDRINUSE"),
    ):
        assert outcome(partial(iommufd.allow, attached, *spans)) == answer


def test_a_device_cannot_reserve_what_is_allowed(iommufd: BareIommufd, device: BareDevice, ioas: int) -> None:
    iommufd.allow(ioas, (0xFEE0_0000, 0xFEE0_0FFF))
    assert outcome(lambda: device.attach(ioas)) == "EADDRINUSE"


# ---------------------------------------------------------------------------------------------------------- unmap


def test_an_unmap_takes_whole_areas_over_holes_and_tells_their_sum(
    iommufd: BareIommufd, attached: int, memory: int
) -> None:
    for iova in (0, _BLOCK, 3 * _BLOCK):
        iommufd.map(attached, memory, PAGE_SIZE, iova)
    assert iommufd.unmap(attached, 0, 4 * _BLOCK) == 3 * PAGE_SIZE
    assert outcome(lambda: iommufd.unmap(attached, 0, 4 * _BLOCK)) == "ENOENT"
    assert iommufd.unmap(attached, 0, ALL) == 0


def test_an_unmap_that_cuts_an_area_is_enoent_and_the_areas_before_are_gone(
    kernel: FakeKernel, iommufd: BareIommufd, attached: int, memory: int
) -> None:
    for iova in (0, _BLOCK, 2 * _BLOCK):
        iommufd.map(attached, memory, _BLOCK, iova)
    buffer = bytearray(struct.pack("=IIQQ", 24, attached, 0, 2 * _BLOCK + PAGE_SIZE))
    call = iommufd.kernel.ioctl
    assert outcome(lambda: call(iommufd.fd, uapi.IOMMU_IOAS_UNMAP, buffer)) == "ENOENT"
    assert struct.unpack("=IIQQ", buffer)[3] == 2 * _BLOCK + PAGE_SIZE  # not written
    assert [entry.iova for entry in kernel.mappings()] == [2 * _BLOCK]
    for start, size in ((2 * _BLOCK, PAGE_SIZE), (2 * _BLOCK + PAGE_SIZE, PAGE_SIZE), (3 * _BLOCK - 1, 1)):
        assert outcome(partial(iommufd.unmap, attached, start, size)) == "ENOENT"
    assert outcome(lambda: iommufd.unmap(attached, 0, 0)) == "EINVAL"
    assert outcome(lambda: iommufd.unmap(attached, 1, ALL)) == "EOVERFLOW"
    assert outcome(lambda: iommufd.unmap(attached, PAGE_SIZE, ALL - 1)) == "EOVERFLOW"


def test_without_huge_pages_the_requests_of_a_container_cut_an_area(
    kernel: FakeKernel, iommufd: BareIommufd, attached: int, memory: int
) -> None:
    iommufd.huge_pages(attached, 0)
    iommufd.map(attached, memory, _BLOCK, _BLOCK)
    assert iommufd.unmap_dma(_BLOCK, PAGE_SIZE) == ("ENODEV", PAGE_SIZE)
    iommufd.vfio_ioas(1, attached)
    assert iommufd.unmap_dma(_BLOCK + PAGE_SIZE, PAGE_SIZE) == (0, PAGE_SIZE)
    assert kernel.pinned == _BLOCK - PAGE_SIZE
    kernel.dma_write(BDF, _BLOCK, b"head")
    kernel.dma_write(BDF, _BLOCK + 2 * PAGE_SIZE, b"tail")
    assert ctypes.string_at(memory + 2 * PAGE_SIZE, 4) == b"tail"
    with pytest.raises(DmaFault):
        kernel.dma_read(BDF, _BLOCK + PAGE_SIZE, 1)
    kernel.munmap(memory + PAGE_SIZE, PAGE_SIZE)
    kernel.check()
    assert iommufd.unmap(attached, _BLOCK, PAGE_SIZE) == PAGE_SIZE  # an area of its own
    assert iommufd.unmap_dma(0, 2 * _BLOCK) == (0, _BLOCK - 2 * PAGE_SIZE)
    assert iommufd.unmap_dma(0, 2 * _BLOCK) == (0, 0)
    assert kernel.pinned == 0


def test_with_huge_pages_a_cut_is_enoent_and_the_size_before_the_error_is_written(
    iommufd: BareIommufd, attached: int, memory: int
) -> None:
    iommufd.vfio_ioas(1, attached)
    for iova in (0, _BLOCK):
        iommufd.map(attached, memory, _BLOCK, iova)
    assert iommufd.unmap_dma(0, _BLOCK + PAGE_SIZE) == ("ENOENT", _BLOCK)
    assert iommufd.unmap_dma(_BLOCK, PAGE_SIZE) == ("ENOENT", 0)
    assert iommufd.unmap_dma(0, 0, 2) == (0, _BLOCK)


def test_huge_pages_cannot_be_turned_off_while_a_page_table_has_areas(
    iommufd: BareIommufd, device: BareDevice, ioas: int, memory: int
) -> None:
    iommufd.map(ioas, memory, _BLOCK, 0)
    assert iommufd.huge_pages(ioas, 0) == 0
    assert iommufd.option(1, 1, ioas) == 0
    iommufd.huge_pages(ioas, 1)
    device.attach(ioas)
    assert outcome(lambda: iommufd.huge_pages(ioas, 0)) == "EINVAL"
    assert outcome(lambda: iommufd.huge_pages(ioas, 2)) == "EINVAL"
    assert outcome(lambda: iommufd.huge_pages(99, 0)) == "ENOENT"


def test_huge_pages_cannot_be_turned_off_over_areas_that_are_not_aligned(iommufd: BareIommufd, ioas: int) -> None:
    iommufd.map(ioas, 0x1000, 100, 0)
    assert outcome(lambda: iommufd.huge_pages(ioas, 0)) == "EADDRINUSE"
