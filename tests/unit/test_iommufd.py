"""An open /dev/iommu: each ioctl as a method, on kernels of two ages; what a refusal says; who closes what."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import pyvfio
from pyvfio import Iommufd, IovaRange
from pyvfio import iommufd_ioctls as abi
from pyvfio.guard import Guard, closing
from pyvfio.handle import Handle
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import FakeKernel, IommuModel
from pyvfio.units import U64_MAX, Iova
from tests.unit.bare_iommufd import BareDevice
from tests.unit.fakes import BDF

PAGE = 4096
NO_ID = 999


@pytest.fixture(params=["6.12", "7.3"])
def kernel(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    with FakeKernel(request.param, iommufd=True) as fake:
        yield fake
        assert fake.descriptors == ()


@pytest.fixture
def newest() -> Iterator[FakeKernel]:
    with FakeKernel("7.3", iommufd=True) as fake:
        yield fake
        assert fake.descriptors == ()


@pytest.fixture
def memory() -> Iterator[int]:
    with mmap.mmap(-1, 16 * PAGE) as area:
        hold = ctypes.c_char.from_buffer(area)
        yield ctypes.addressof(hold)
        del hold


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("mapped")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def said(call: Callable[[], object], number: int) -> str:
    """What the error of a refused ioctl says."""
    with pytest.raises(pyvfio.IoctlError) as caught:
        call()
    assert caught.value.errno == number
    assert caught.value.hint
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ mappings


def test_memory_is_mapped_where_the_caller_says_and_unmapped_as_a_whole(kernel: FakeKernel, memory: int) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        assert iommufd.ioas_map(ioas, vaddr=memory, size=2 * PAGE, iova=0) == 0
        assert iommufd.ioas_map(ioas, vaddr=memory, size=PAGE, iova=8 * PAGE) == 8 * PAGE
        assert iommufd.ioas_unmap(ioas, iova=0, size=16 * PAGE) == 3 * PAGE
        assert iommufd.ioas_unmap_all(ioas) == 0


def test_the_kernel_chooses_an_iova_where_the_caller_names_none(kernel: FakeKernel, memory: int) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        iommufd.ioas_allow_iovas(ioas, [IovaRange.of(iova=0x100000, size=0x10000)])
        assert 0x100000 <= iommufd.ioas_map(ioas, vaddr=memory, size=PAGE) <= 0x10F000
        full = partial(iommufd.ioas_map, ioas, vaddr=memory, size=16 * PAGE)
        assert "ioas_allow_iovas" in said(full, errno.ENOSPC)
        iommufd.ioas_allow_iovas(ioas, [])
        full()
        assert iommufd.ioas_unmap_all(ioas) == 17 * PAGE


def test_each_access_is_a_flag_of_its_own(kernel: FakeKernel, memory: int) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        iommufd.ioas_map(ioas, vaddr=memory, size=PAGE, iova=0, write=False)
        iommufd.ioas_map(ioas, vaddr=memory, size=PAGE, iova=PAGE, read=False)
        flags = [call.arguments["flags"] for call in kernel.trace if call.request == "IOMMU_IOAS_MAP"]
        assert flags == [0b101, 0b011]
        assert "pass write=False" in said(
            partial(iommufd.ioas_copy, ioas, ioas, src_iova=0, size=PAGE, iova=4 * PAGE), errno.EPERM
        )


@pytest.mark.parametrize(("read", "write", "flags"), [(True, True, 0b110), (True, False, 0b100), (False, True, 0b010)])
def test_the_kernel_chooses_the_iova_whatever_the_access(
    kernel: FakeKernel,
    memory: int,
    read: bool,  # noqa: FBT001
    write: bool,  # noqa: FBT001
    flags: int,
) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        iommufd.ioas_map(iommufd.ioas_alloc(), vaddr=memory, size=PAGE, read=read, write=write)
        assert [call.arguments["flags"] for call in kernel.trace if call.request == "IOMMU_IOAS_MAP"] == [flags]


def test_each_access_of_a_copy_and_of_a_file_is_a_flag_of_its_own(newest: FakeKernel, memory: int, memfd: int) -> None:
    with Iommufd(kernel=newest) as iommufd:
        ioas = iommufd.ioas_alloc()
        iommufd.ioas_map(ioas, vaddr=memory, size=PAGE, iova=0)
        copy = partial(iommufd.ioas_copy, ioas, ioas, src_iova=0, size=PAGE)
        file = partial(iommufd.ioas_map_file, ioas, memfd, start=0, size=PAGE)
        for request, call, iova in (("IOMMU_IOAS_COPY", copy, PAGE), ("IOMMU_IOAS_MAP_FILE", file, 4 * PAGE)):
            call(iova=iova, write=False)
            call(iova=iova + PAGE, read=False)
            flags = [made.arguments["flags"] for made in newest.trace if made.request == request]
            assert flags == [0b101, 0b011], request


def test_an_unmap_that_cuts_a_mapping_keeps_the_errno(kernel: FakeKernel, memory: int) -> None:
    """As does one that finds nothing: the caller's own account tells the two apart."""
    with Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        iommufd.ioas_map(ioas, vaddr=memory, size=4 * PAGE, iova=0)
        text = said(partial(iommufd.ioas_unmap, ioas, iova=PAGE, size=PAGE), errno.ENOENT)
        assert "IOMMU_IOAS_UNMAP(ioas_id=0x1, iova=0x1000, size=0x1000): ENOENT" in text
        assert "begins or ends within a mapping" in text
        said(partial(iommufd.ioas_unmap, ioas, iova=64 * PAGE, size=PAGE), errno.ENOENT)
        assert iommufd.ioas_unmap_all(ioas) == 4 * PAGE


def test_a_copy_maps_the_same_memory_and_survives_the_source(kernel: FakeKernel, memory: int) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        source, target = iommufd.ioas_alloc(), iommufd.ioas_alloc()
        iommufd.ioas_map(source, vaddr=memory, size=4 * PAGE, iova=0)
        assert iommufd.ioas_copy(target, source, src_iova=PAGE, size=2 * PAGE, iova=8 * PAGE) == 8 * PAGE
        iommufd.destroy(source)
        assert iommufd.ioas_unmap_all(target) == 2 * PAGE
        gap = partial(iommufd.ioas_copy, target, target, src_iova=0, size=PAGE)
        assert "not mapped from end to end" in said(gap, errno.ENOENT)


def test_a_range_of_a_file_is_mapped_by_its_descriptor(newest: FakeKernel, memfd: int) -> None:
    with Iommufd(kernel=newest) as iommufd:
        assert iommufd.maps_files
        ioas = iommufd.ioas_alloc()
        assert iommufd.ioas_map_file(ioas, memfd, start=PAGE, size=2 * PAGE, iova=0) == 0
        iommufd.ioas_change_process()
        assert iommufd.ioas_unmap_all(ioas) == 2 * PAGE
        closed = partial(iommufd.ioas_map_file, ioas, 1 << 30, start=0, size=PAGE)
        assert "descriptor of the file is closed" in said(closed, errno.EBADF)


def test_a_kernel_that_is_too_old_for_a_call_is_told_with_the_first_one_that_has_it(memfd: int) -> None:
    with FakeKernel("6.12", iommufd=True) as kernel, Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        assert not iommufd.maps_files
        file = partial(iommufd.ioas_map_file, ioas, memfd, start=0, size=PAGE)
        assert "no IOMMU_IOAS_MAP_FILE (Linux 6.13): map by address" in said(file, errno.ENOTTY)
        assert "Linux 6.13" in said(iommufd.ioas_change_process, errno.ENOTTY)
        address = partial(iommufd.ioas_noiommu_get_pa, ioas, iova=0, size=PAGE)
        assert "Linux 7.3" in said(address, errno.ENOTTY)


def test_memory_that_is_mapped_by_address_stays_with_its_process(newest: FakeKernel, memory: int) -> None:
    with Iommufd(kernel=newest) as iommufd:
        iommufd.ioas_map(iommufd.ioas_alloc(), vaddr=memory, size=PAGE, iova=0)
        assert "not of a file" in said(iommufd.ioas_change_process, errno.EINVAL)


# ------------------------------------------------------------------------------------------------ spaces


def test_the_ranges_of_a_space_are_narrowed_by_a_device(kernel: FakeKernel) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        assert iommufd.ioas_iova_ranges(ioas) == ((IovaRange.of(iova=0, size=1 << 64),), 1)
        device = BareDevice(kernel, BDF)
        device.bind(iommufd.fd)
        device.attach(ioas)
        ranges, alignment = iommufd.ioas_iova_ranges(ioas)
        assert alignment == PAGE
        assert len(ranges) > 1
        assert "close" in said(partial(iommufd.destroy, ioas), errno.EBUSY).lower()
        device.close()
        iommufd.destroy(ioas)


def test_more_ranges_than_the_first_call_has_room_for_are_asked_for_again() -> None:
    many = tuple(IovaRange.of(iova=number << 20, size=1 << 19) for number in range(100))
    with FakeKernel("7.3", iommufd=True, iommu=IommuModel(many)) as kernel, Iommufd(kernel=kernel) as iommufd:
        ioas, device = iommufd.ioas_alloc(), BareDevice(kernel, BDF)
        device.bind(iommufd.fd)
        device.attach(ioas)
        assert iommufd.ioas_iova_ranges(ioas)[0] == many
        assert [call.request for call in kernel.trace].count("IOMMU_IOAS_IOVA_RANGES") == 2
        device.close()


class Greedy(FakeKernel):
    """A kernel whose answers never fit: it wants room for `wanted` ranges, or bytes about an IOMMU."""

    wanted = asked = 0

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        if isinstance(argument, abi.iommu_ioas_iova_ranges):
            self.asked = argument.num_iovas
            argument.num_iovas = max(self.wanted, argument.num_iovas)
            raise OSError(errno.EMSGSIZE, "")
        if isinstance(argument, abi.iommu_hw_info):
            self.asked = argument.data_len
            argument.data_len = self.wanted
            return 0
        return super().ioctl(fd, request, argument)


def test_an_answer_that_no_buffer_holds_is_malformed_and_one_that_the_largest_holds_is_asked_for() -> None:
    """65,536 ranges and a MiB about an IOMMU, in a second call. The kernel that refuses that room too is in error."""
    with Greedy("7.3", iommufd=True) as kernel, Iommufd(kernel=kernel) as iommufd:
        kernel.wanted = 1 << 16
        with pytest.raises(pyvfio.IoctlError, match="EMSGSIZE"):
            iommufd.ioas_iova_ranges(1)
        assert kernel.asked == 1 << 16
        kernel.wanted += 1
        with pytest.raises(pyvfio.CapabilityError, match="wants room for 65537 ranges"):
            iommufd.ioas_iova_ranges(1)
        kernel.wanted = 1 << 20
        assert len(iommufd.get_hw_info(1).data) == kernel.asked == 1 << 20
        kernel.wanted += 1
        with pytest.raises(pyvfio.CapabilityError, match="wants a buffer of 1048577 bytes"):
            iommufd.get_hw_info(1)


def test_large_pages_are_an_option_of_a_space(kernel: FakeKernel) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        assert iommufd.huge_pages(ioas)
        iommufd.set_huge_pages(ioas, enabled=False)
        assert not iommufd.huge_pages(ioas)


def test_a_refused_option_is_named_with_the_value_only_if_one_was_given(kernel: FakeKernel) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        given = "IOMMU_OPTION(option=IOMMU_OPTION_HUGE_PAGES, op=IOMMU_OPTION_OP_{}, object_id=0x3e7{})"
        assert given.format("GET", "") in said(partial(iommufd.huge_pages, NO_ID), errno.ENOENT)
        change = partial(iommufd.set_huge_pages, NO_ID, enabled=True)
        assert given.format("SET", ", value=0x1") in said(change, errno.ENOENT)


def test_who_is_charged_is_chosen_before_the_first_object(kernel: FakeKernel) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        before = iommufd.counts_by_process
        iommufd.set_counts_by_process(enabled=True)
        assert (before, iommufd.counts_by_process) == (False, True)
        iommufd.ioas_alloc()
        change = partial(iommufd.set_counts_by_process, enabled=False)
        assert "before the first I/O address space" in said(change, errno.EBUSY)


def test_only_a_privileged_process_chooses_who_is_charged(kernel: FakeKernel) -> None:
    kernel.may_set_limits = False
    with Iommufd(kernel=kernel) as iommufd:
        assert "CAP_SYS_RESOURCE" in said(partial(iommufd.set_counts_by_process, enabled=True), errno.EPERM)


def test_the_space_for_the_calls_of_a_container_is_set_and_cleared(kernel: FakeKernel) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        assert iommufd.vfio_ioas() is None
        ioas = iommufd.ioas_alloc()
        iommufd.set_vfio_ioas(ioas)
        assert iommufd.vfio_ioas() == ioas
        assert iommufd.ioctl("VFIO_GET_API_VERSION") == 0
        iommufd.clear_vfio_ioas()
        assert iommufd.vfio_ioas() is None
        assert "no I/O address space" in said(partial(iommufd.set_vfio_ioas, NO_ID), errno.ENOENT)


def test_a_range_can_end_with_the_last_page_of_64_bits(kernel: FakeKernel) -> None:
    """The kernel is asked about that one, and about none that ends behind."""
    with Iommufd(kernel=kernel) as iommufd:
        ioas, last = iommufd.ioas_alloc(), U64_MAX + 1 - PAGE
        assert "Nothing is mapped" in said(partial(iommufd.ioas_unmap, ioas, iova=last, size=PAGE), errno.ENOENT)
        with pytest.raises(ValueError, match=rf"iova {last:#x} with size 0x1001 ends above 2\^64"):
            iommufd.ioas_unmap(ioas, iova=last, size=PAGE + 1)


_MAP = {"vaddr": 3 * PAGE, "size": 2 * PAGE}
_REFUSED: tuple[tuple[str, Callable[[Iommufd], object], dict[str, object]], ...] = (
    ("IOMMU_DESTROY", lambda each: each.destroy(5), {"id": 5}),
    ("IOMMU_IOAS_ALLOC", lambda each: each.ioas_alloc(), {}),
    ("IOMMU_IOAS_IOVA_RANGES", lambda each: each.ioas_iova_ranges(5), {"ioas_id": 5}),
    (
        "IOMMU_IOAS_ALLOW_IOVAS",
        lambda each: each.ioas_allow_iovas(5, [IovaRange(Iova(1), Iova(2)), IovaRange(Iova(16), Iova(31))]),
        {"ioas_id": 5, "ranges": "0x1-0x2, 0x10-0x1f"},
    ),
    ("IOMMU_IOAS_ALLOW_IOVAS", lambda each: each.ioas_allow_iovas(5, []), {"ioas_id": 5, "ranges": "none"}),
    (
        "IOMMU_IOAS_MAP",
        lambda each: each.ioas_map(5, iova=7 * PAGE, vaddr=3 * PAGE, size=2 * PAGE, write=False),
        {"ioas_id": 5, "iova": 7 * PAGE, "flags": 5, **_MAP},
    ),
    (
        "IOMMU_IOAS_MAP",
        lambda each: each.ioas_map(5, vaddr=3 * PAGE, size=2 * PAGE, read=False),
        {"ioas_id": 5, "flags": 2, **_MAP},
    ),
    (
        "IOMMU_IOAS_MAP_FILE",
        lambda each: each.ioas_map_file(5, 0, start=3 * PAGE, size=2 * PAGE, iova=0),
        {"ioas_id": 5, "fd": 0, "start": 3 * PAGE, "size": 2 * PAGE, "iova": 0, "flags": 7},
    ),
    (
        "IOMMU_IOAS_COPY",
        lambda each: each.ioas_copy(5, 6, src_iova=3 * PAGE, size=2 * PAGE, iova=7 * PAGE),
        {"dst_ioas_id": 5, "src_ioas_id": 6, "src_iova": 3 * PAGE, "size": 2 * PAGE, "iova": 7 * PAGE, "flags": 7},
    ),
    (
        "IOMMU_IOAS_UNMAP",
        lambda each: each.ioas_unmap(5, iova=7 * PAGE, size=2 * PAGE),
        {"ioas_id": 5, "iova": 7 * PAGE, "size": 2 * PAGE},
    ),
    ("IOMMU_IOAS_UNMAP", lambda each: each.ioas_unmap_all(5), {"ioas_id": 5, "iova": 0, "size": U64_MAX}),
    ("IOMMU_IOAS_CHANGE_PROCESS", lambda each: each.ioas_change_process(), {}),
    (
        "IOMMU_IOAS_NOIOMMU_GET_PA",
        lambda each: each.ioas_noiommu_get_pa(5, iova=7 * PAGE, size=2 * PAGE),
        {"ioas_id": 5, "iova": 7 * PAGE, "size": 2 * PAGE},
    ),
    (
        "IOMMU_OPTION",
        lambda each: each.counts_by_process,
        {"option": "IOMMU_OPTION_RLIMIT_MODE", "op": "IOMMU_OPTION_OP_GET", "object_id": 0},
    ),
    (
        "IOMMU_OPTION",
        lambda each: each.set_counts_by_process(enabled=True),
        {"option": "IOMMU_OPTION_RLIMIT_MODE", "op": "IOMMU_OPTION_OP_SET", "object_id": 0, "value": 1},
    ),
    (
        "IOMMU_OPTION",
        lambda each: each.set_huge_pages(5, enabled=False),
        {"option": "IOMMU_OPTION_HUGE_PAGES", "op": "IOMMU_OPTION_OP_SET", "object_id": 5, "value": 0},
    ),
    ("IOMMU_VFIO_IOAS", lambda each: each.vfio_ioas(), {"op": "IOMMU_VFIO_IOAS_GET", "ioas_id": 0}),
    ("IOMMU_VFIO_IOAS", lambda each: each.set_vfio_ioas(5), {"op": "IOMMU_VFIO_IOAS_SET", "ioas_id": 5}),
    ("IOMMU_VFIO_IOAS", lambda each: each.clear_vfio_ioas(), {"op": "IOMMU_VFIO_IOAS_CLEAR", "ioas_id": 0}),
    ("IOMMU_HWPT_ALLOC", lambda each: each.hwpt_alloc(5, 6, flags=2), {"dev_id": 5, "pt_id": 6, "flags": 2}),
    (
        "IOMMU_HWPT_SET_DIRTY_TRACKING",
        lambda each: each.hwpt_set_dirty_tracking(5, enabled=True),
        {"hwpt_id": 5, "flags": 1},
    ),
    (
        "IOMMU_HWPT_GET_DIRTY_BITMAP",
        lambda each: each.hwpt_get_dirty_bitmap(5, iova=7 * PAGE, size=2 * PAGE, page_size=PAGE, clear=False),
        {"hwpt_id": 5, "iova": 7 * PAGE, "size": 2 * PAGE, "page_size": PAGE, "flags": 1},
    ),
    ("IOMMU_GET_HW_INFO", lambda each: each.get_hw_info(5), {"dev_id": 5}),
)


@pytest.mark.parametrize(
    ("request_name", "call", "given"), _REFUSED, ids=[f"{row[0]} {n}" for n, row in enumerate(_REFUSED)]
)
def test_a_refusal_has_the_arguments_of_the_call_by_their_names(
    newest: FakeKernel, request_name: str, call: Callable[[Iommufd], object], given: dict[str, object]
) -> None:
    """All of them, and no other; an IOVA that the kernel would choose is none."""
    with Iommufd(kernel=newest) as iommufd:
        newest.clear_trace()
        newest.fail(call="ioctl", request=request_name, errno=errno.EDOM)
        with pytest.raises(pyvfio.IoctlError, match="EDOM") as caught:
            call(iommufd)
        assert (caught.value.request, caught.value.arguments) == (request_name, given)
        assert len(newest.trace) == 1


def test_an_id_that_no_object_has_is_named(kernel: FakeKernel, memory: int) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        calls: list[Callable[[], object]] = [
            partial(iommufd.destroy, NO_ID),
            partial(iommufd.ioas_iova_ranges, NO_ID),
            partial(iommufd.ioas_allow_iovas, NO_ID, []),
            partial(iommufd.ioas_map, NO_ID, vaddr=memory, size=PAGE),
            partial(iommufd.ioas_copy, NO_ID, NO_ID, src_iova=0, size=PAGE),
            partial(iommufd.ioas_unmap, NO_ID, iova=0, size=PAGE),
            partial(iommufd.ioas_unmap_all, NO_ID),
            partial(iommufd.huge_pages, NO_ID),
            partial(iommufd.get_hw_info, NO_ID),
            partial(iommufd.hwpt_set_dirty_tracking, NO_ID, enabled=True),
        ]
        for call in calls:
            assert "0x3e7" in said(call, errno.ENOENT)


# ------------------------------------------------------------------------------------------------ page tables


def test_a_device_has_a_described_iommu_and_page_tables(kernel: FakeKernel) -> None:
    with Iommufd(kernel=kernel) as iommufd:
        ioas = iommufd.ioas_alloc()
        device = BareDevice(kernel, BDF)
        dev_id = device.bind(iommufd.fd)
        info = iommufd.get_hw_info(dev_id)
        assert info.data_type in list(abi.iommu_hw_info_type)
        hwpt = iommufd.hwpt_alloc(dev_id, ioas)
        iommufd.destroy(hwpt)
        tracked = partial(iommufd.hwpt_alloc, dev_id, ioas, flags=abi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        assert "no page tables with these flags" in said(tracked, errno.EOPNOTSUPP)
        device.close()


@pytest.mark.parametrize("number", [1, 99])
@pytest.mark.parametrize("size", [1, 64, 65, 200])
def test_a_described_iommu_has_a_named_kind_or_a_number_and_all_bytes(number: int, size: int) -> None:
    """A number that this version does not know; more bytes than the first call has room for, in a second call."""
    model = IommuModel((IovaRange.of(iova=0, size=1 << 39),), hw_type=number, hw_info=bytes(range(1, size + 1)))
    with FakeKernel("7.3", iommufd=True, iommu=model) as kernel, Iommufd(kernel=kernel) as iommufd:
        device = BareDevice(kernel, BDF)
        info = iommufd.get_hw_info(device.bind(iommufd.fd))
        assert (info.data_type, info.data) == (number, model.hw_info)
        assert isinstance(info.data_type, abi.iommu_hw_info_type) is (number == 1)
        assert [call.request for call in kernel.trace].count("IOMMU_GET_HW_INFO") == (1 if size <= 64 else 2)
        device.close()


def test_a_bitmap_has_a_bit_for_each_page_that_the_device_wrote(memory: int) -> None:
    tracking = replace(IommuModel((IovaRange.of(iova=0, size=1 << 39),)), dirty_tracking=True)
    with FakeKernel("7.3", iommufd=True, iommu=tracking) as kernel, Iommufd(kernel=kernel) as iommufd:
        ioas, device = iommufd.ioas_alloc(), BareDevice(kernel, BDF)
        dev_id = device.bind(iommufd.fd)
        hwpt = iommufd.hwpt_alloc(dev_id, ioas, flags=abi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        device.attach(hwpt)
        iommufd.ioas_map(ioas, vaddr=memory, size=16 * PAGE, iova=0x100000)
        iommufd.hwpt_set_dirty_tracking(hwpt, enabled=True)
        kernel.dma_write(BDF, 0x100000 + 3 * PAGE, b"written")
        look = partial(iommufd.hwpt_get_dirty_bitmap, hwpt, iova=0x100000, size=16 * PAGE, page_size=PAGE)
        assert look(clear=False) == (1 << 3).to_bytes(8, "little")
        assert look() == (1 << 3).to_bytes(8, "little")
        assert look() == bytes(8)
        iommufd.hwpt_set_dirty_tracking(hwpt, enabled=False)
        device.close()


# ------------------------------------------------------------------------------------------------ bad arguments


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"size": 0}, ValueError, "size must be above 0"),
        ({"size": -1}, ValueError, "size must be 0 or more"),
        ({"size": 1.5}, TypeError, "size must be a whole number"),
        ({"vaddr": 1 << 64}, ValueError, "vaddr must be 0 or more and have 64 bits"),
        ({"vaddr": U64_MAX, "size": 2}, ValueError, r"vaddr 0xffffffffffffffff with size 0x2 ends above 2\^64"),
        ({"iova": U64_MAX - PAGE + 2}, ValueError, r"iova 0x\w+ with size 0x1000 ends above 2\^64"),
        ({"read": False, "write": False}, ValueError, "read or write must be True"),
        ({"ioas_id": 1 << 32}, ValueError, "ioas_id must be 0 or more and have 32 bits at most"),
        ({"ioas_id": True}, TypeError, "ioas_id must be a whole number"),
    ],
)
def test_a_map_that_no_kernel_accepts_is_refused_before_the_call(
    newest: FakeKernel, arguments: dict[str, object], kind: type[Exception], words: str
) -> None:
    with Iommufd(kernel=newest) as iommufd:
        valid: dict[str, object] = {"ioas_id": iommufd.ioas_alloc(), "vaddr": 0x10000, "size": PAGE, "iova": 0}
        before = len(newest.trace)
        with pytest.raises(kind, match=words):
            partial(iommufd.ioas_map, **{**valid, **arguments})()  # type: ignore[arg-type]
        assert len(newest.trace) == before


def test_other_arguments_that_no_kernel_accepts_are_refused_before_the_call(newest: FakeKernel) -> None:
    with Iommufd(kernel=newest) as iommufd:
        ioas = iommufd.ioas_alloc()
        before = len(newest.trace)
        with pytest.raises(ValueError, match="ioas_unmap_all"):
            iommufd.ioas_unmap(ioas, iova=0, size=U64_MAX)
        with pytest.raises(ValueError, match="power of two"):
            iommufd.hwpt_get_dirty_bitmap(1, iova=0, size=PAGE, page_size=3)
        with pytest.raises(TypeError, match="IovaRange"):
            iommufd.ioas_allow_iovas(ioas, [(0, PAGE)])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="enabled must be True or False"):
            iommufd.set_huge_pages(ioas, enabled=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no file descriptor"):
            iommufd.ioas_map_file(ioas, -1, start=0, size=PAGE)
        assert len(newest.trace) == before


# ------------------------------------------------------------------------------------------------ open and close


def test_an_open_descriptor_becomes_an_iommufd(kernel: FakeKernel) -> None:
    with Iommufd(kernel=kernel) as first:
        ioas = first.ioas_alloc()
        with Iommufd.from_fd(kernel.dup(first.fd), kernel=kernel) as second:
            assert second.huge_pages(ioas)


def test_a_descriptor_of_another_kind_stays_the_callers(kernel: FakeKernel) -> None:
    container = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
    with pytest.raises(ValueError, match=f"descriptor {container} is not an iommufd"):
        Iommufd.from_fd(container, kernel=kernel)
    kernel.close(container)


def test_a_kernel_without_iommufd_says_so(kernel: FakeKernel) -> None:
    with FakeKernel("7.3") as old, pytest.raises(pyvfio.UnavailableError, match=r"there is no .*/iommu"):
        Iommufd(kernel=old)
    kernel.fail(call="open", errno=errno.EACCES)
    with pytest.raises(pyvfio.AccessDeniedError, match="may not be opened by this user"):
        Iommufd(kernel=kernel)


class Part(Handle):
    """A handle that notes its close; it leaves a list as devices and spaces do."""

    def __init__(self, kernel: FakeKernel, parts: list[Handle], closed: list[str], name: str) -> None:
        super().__init__(kernel, kernel.eventfd(0, 0), name, guard=Guard(name))
        self.parts, self.notes, self.stays = parts, closed, False
        parts.append(self)

    @closing
    def close(self) -> None:
        self.notes.append(self.guard.what)
        if self.stays:
            raise BufferError("a view exists")
        self.parts.remove(self)
        self.close_fd()


def test_a_close_ends_the_devices_then_the_spaces_then_the_descriptor(kernel: FakeKernel) -> None:
    iommufd, closed = Iommufd(kernel=kernel), list[str]()
    Part(kernel, iommufd.spaces, closed, "space")
    device = Part(kernel, iommufd.devices, closed, "device")
    device.stays = True
    with pytest.raises(BufferError, match="a view exists"):
        iommufd.close()
    assert (closed, iommufd.closed) == (["device"], False)
    device.stays = False
    iommufd.close()
    iommufd.close()
    assert (closed, iommufd.closed) == (["device", "device", "space"], True)
    with pytest.raises(pyvfio.ClosedError):
        iommufd.ioas_alloc()


def test_the_hints_name_calls_that_exist() -> None:
    text = (Path(pyvfio.__file__).parent / "iommu/iommufd_hints.py").read_text(encoding="utf-8")
    calls = {word for word in text.replace("(", "( ").split() if word.endswith("(") and word.startswith("ioas_")}
    assert calls
    assert all(hasattr(Iommufd, call.rstrip("(")) for call in calls)
