"""Devices without an IOMMU: opened by an explicit choice alone, with memory whose physical addresses are known."""

from __future__ import annotations

import errno
import gc
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Literal, NoReturn

import pytest

import pyvfio
from pyvfio import noiommu, pci
from pyvfio.iommufd_ioctls import iommu_ioas_noiommu_get_pa
from pyvfio.kernel import IoctlArgument
from pyvfio.noiommu import UnsafeByGroup, UnsafeByIommufd, UnsafeNoIommu
from pyvfio.pci.noiommu import PARAMETER
from pyvfio.testing.edu import Edu
from pyvfio.testing.fake import DmaFault, FakeDevice, FakeEdu, FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF
from tests.unit.processes import in_child, open_fds

Choice = Literal["type1", "iommufd", "unsafe-noiommu"]


@pytest.fixture(params=["6.12 group", "7.3 group", "7.3 iommufd"])
def kernel(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    """A machine without an IOMMU. At the end no descriptor is left, and the fake agrees with itself."""
    version, way = request.param.split()
    before = open_fds()
    with FakeKernel(version, iommu="none", iommufd=way == "iommufd") as fake:
        yield fake
        assert fake.descriptors == ()
        fake.check()
        assert fake.unmodelled == []
    assert noiommu._kept == set()
    assert open_fds().items() <= before.items()


def opened(kernel: FakeKernel, bdf: str = BDF) -> pyvfio.Device:
    """A device that was opened without protection."""
    with pytest.warns(pyvfio.UnsafeNoIommuWarning, match=f"{bdf} is opened WITHOUT PROTECTION"):
        return pyvfio.open_device(bdf, iommu="unsafe-noiommu", kernel=kernel)


@pytest.fixture
def device(kernel: FakeKernel) -> Iterator[pyvfio.Device]:
    """A device that was opened without protection."""
    with opened(kernel) as device:
        yield device


# --------------------------------------------------------------------------------------------------- physical memory


def test_a_device_reads_and_writes_memory_by_physical_addresses(device: pyvfio.Device) -> None:
    memory = device.unsafe_noiommu.allocate(2 * MIB)
    device.memory_enabled = device.bus_master = True
    edu = Edu(device.region(0))
    with memory.view() as view:
        view[0x1000:0x1005] = b"hello"
        edu.read_memory(memory.physical(0x1000, 5), 5)
        edu.write_memory(memory.physical(2 * MIB - 5, 5), 5)
        assert bytes(view[-5:]) == b"hello"


def test_the_ranges_are_the_whole_memory_in_order(device: pyvfio.Device) -> None:
    memory = device.unsafe_noiommu.allocate(6 * MIB)
    assert device.unsafe_noiommu.memories == [memory]
    assert sum(part.size for part in memory.ranges) == memory.size == 6 * MIB
    assert [part.offset for part in memory.ranges] == [0, 2 * MIB, 4 * MIB]
    assert [memory.physical(part.offset, part.size) for part in memory.ranges] == [
        part.address for part in memory.ranges
    ]


def test_bytes_that_are_not_contiguous_have_no_single_address(device: pyvfio.Device) -> None:
    memory = device.unsafe_noiommu.allocate(4 * MIB)
    with pytest.raises(ValueError, match="0x2 bytes at offset 0x1fffff are not contiguous"):
        memory.physical(2 * MIB - 1, 2)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 0), (2 * MIB, 1), (0, 2 * MIB + 1)])
def test_bytes_outside_of_the_memory_have_no_address(device: pyvfio.Device, offset: int, size: int) -> None:
    memory = device.unsafe_noiommu.allocate(2 * MIB)
    with pytest.raises(ValueError, match="are not all in a memory of 0x200000 bytes"):
        memory.physical(offset, size)


def test_memory_above_the_address_bits_of_the_device_is_refused_and_freed(device: pyvfio.Device) -> None:
    """The fake begins at 4 GiB."""
    before = open_fds()
    with pytest.raises(pyvfio.VfioError, match=r"physical address 0x100000000, and the device has 32 address bits"):
        device.unsafe_noiommu.allocate(2 * MIB, dma_bits=32)
    assert device.unsafe_noiommu.memories == []
    assert open_fds() == before
    assert device.unsafe_noiommu.allocate(2 * MIB, dma_bits=33).size == 2 * MIB


@pytest.mark.parametrize("size", [0, PAGE_SIZE, -2 * MIB])
def test_memory_is_of_whole_huge_pages(device: pyvfio.Device, size: int) -> None:
    with pytest.raises(ValueError, match=r"^size must be a multiple of 2097152 bytes and above 0, not "):
        device.unsafe_noiommu.allocate(size)


@pytest.mark.parametrize("bits", [12, 65])
def test_dma_bits_that_no_device_has_are_refused(device: pyvfio.Device, bits: int) -> None:
    with pytest.raises(ValueError, match="dma_bits must be 13 to 64"):
        device.unsafe_noiommu.allocate(2 * MIB, dma_bits=bits)


def test_a_device_of_13_address_bits_is_one_and_of_64_another(device: pyvfio.Device) -> None:
    with pytest.raises(pyvfio.VfioError, match="the device has 13 address bits"):
        device.unsafe_noiommu.allocate(2 * MIB, dma_bits=13)
    assert device.unsafe_noiommu.allocate(2 * MIB, dma_bits=64).size == 2 * MIB


def test_a_page_that_moved_is_found(device: pyvfio.Device) -> None:
    """The memory is made to look moved: the fake moves none."""
    memory = device.unsafe_noiommu.allocate(4 * MIB)
    memory.check_unmoved()
    memory.ranges = (memory.ranges[0], memory.ranges[1]._replace(address=0x1000))
    with pytest.raises(pyvfio.VfioError, match=r"address=0x1000, size=0x200000\) is no longer right.*Stop the device"):
        memory.check_unmoved()


def test_memory_lives_until_the_device_is_closed_and_not_longer(kernel: FakeKernel) -> None:
    device = opened(kernel)
    memory = device.unsafe_noiommu.allocate(2 * MIB)
    address = memory.physical()
    with pytest.raises(pyvfio.VfioError, match="cannot be freed while a device can access it"):
        device.unsafe_noiommu.close()
    assert kernel.dma_read(BDF, address, 1) == b"\0"
    unsafe = device.unsafe_noiommu
    device.close()
    assert unsafe.closed
    with pytest.raises(pyvfio.ClosedError):
        memory.view()
    with pytest.raises(pyvfio.ClosedError, match=r"no-IOMMU mode of .* has been closed"):
        unsafe.allocate(2 * MIB)
    with pytest.raises(pyvfio.ClosedError):
        memory.check_unmoved()


def test_garbage_collection_frees_no_memory_of_an_open_device(kernel: FakeKernel) -> None:
    """The device may still write. A program that loses the objects leaks the memory."""
    device = opened(kernel)
    address = device.unsafe_noiommu.allocate(2 * MIB).physical()
    fd = device.release_fd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del device
        gc.collect()
    assert kernel.dma_read(BDF, address, 1) == b"\0"
    kernel.close(fd)
    noiommu._kept.pop().close()  # what leaked, for the other tests


def test_a_view_keeps_the_memory_behind_the_close(kernel: FakeKernel) -> None:
    device = opened(kernel)
    with device.unsafe_noiommu.allocate(2 * MIB).view(0, 5) as view:
        device.close()
        view[:] = b"alive"
        assert bytes(view) == b"alive"


def test_memory_of_one_device_serves_the_other(kernel: FakeKernel) -> None:
    """No device is confined, so nothing need be shared."""
    with opened(kernel) as first, opened(kernel, OTHER_BDF):
        memory = first.unsafe_noiommu.allocate(2 * MIB)
        kernel.dma_write(OTHER_BDF, memory.physical(3), b"x")
        assert bytes(memory.view(3, 1)) == b"x"


def test_iommufd_pins_the_memory() -> None:
    with FakeKernel("7.3", iommu="none", iommufd=True) as kernel:
        with opened(kernel) as device:
            assert isinstance(device.unsafe_noiommu, UnsafeByIommufd)
            device.unsafe_noiommu.allocate(4 * MIB)
            assert kernel.pinned == 4 * MIB
            with pytest.raises(pyvfio.VfioError):
                device.unsafe_noiommu.allocate(4 * MIB, dma_bits=20)
            assert kernel.pinned == 4 * MIB
        assert kernel.pinned == 0


def test_a_process_without_cap_sys_admin_learns_that_addresses_are_hidden() -> None:
    with FakeKernel("6.12", iommu="none") as kernel, opened(kernel) as device:
        kernel.noiommu.shows_frames = False
        with pytest.raises(pyvfio.UnsupportedError, match=r"hides physical addresses.*CAP_SYS_ADMIN"):
            device.unsafe_noiommu.allocate(2 * MIB)
        assert device.unsafe_noiommu.memories == []


@pytest.mark.parametrize(
    ("call", "request_name", "text"),
    [("open", None, "pagemap could not be opened"), ("pread", None, "the pagemap could not be read")],
)
def test_an_unreadable_pagemap_is_an_error_with_the_file(call: str, request_name: str | None, text: str) -> None:
    with FakeKernel("6.12", iommu="none") as kernel, opened(kernel) as device:
        kernel.fail(call=call, request=request_name, errno=errno.EACCES)
        with pytest.raises(pyvfio.IoctlError, match=text):
            device.unsafe_noiommu.allocate(2 * MIB)
        assert device.unsafe_noiommu.allocate(2 * MIB).size == 2 * MIB


def test_a_refused_look_up_unpins_the_memory() -> None:
    with FakeKernel("7.3", iommu="none", iommufd=True) as kernel, opened(kernel) as device:
        kernel.noiommu.raw_io = False
        with pytest.raises(pyvfio.IoctlError, match="CAP_SYS_RAWIO") as caught:
            device.unsafe_noiommu.allocate(2 * MIB)
        assert caught.value.errno == errno.EPERM
        assert kernel.pinned == 0


class PlacedFrames(FakeKernel):
    """A kernel whose huge pages are where the test says: the fake has no neighbours.

    `answers`: an entry of the pagemap, or (address, length) for IOMMU_IOAS_NOIOMMU_GET_PA, for each look-up from now
    on. `asked`: how many bytes each IOMMU_IOAS_NOIOMMU_GET_PA was about.
    """

    def __init__(self, *, iommufd: bool) -> None:
        super().__init__("7.3" if iommufd else "6.12", iommu="none", iommufd=iommufd)
        self.answers: list[tuple[int, int]] = []
        self.asked: list[int] = []

    def place(self, *pieces: tuple[int, int]) -> None:
        """Have the next look-ups find the pieces: address and length in bytes."""
        self.answers += pieces

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Of the pagemap: soft-dirty (bit 55), exclusive (56), of a file (61), as a huge page is, and present (63)."""
        data = super().pread(fd, size, offset)
        if size != 8 or not self.answers:
            return data
        address, length = self.answers.pop(0)
        return struct.pack("=Q", (0b1_0100_0011 << 55 if length else 0) | address // PAGE_SIZE)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Of iommufd."""
        if not isinstance(argument, iommu_ioas_noiommu_get_pa):
            return super().ioctl(fd, request, argument)
        self.asked.append(argument.length)
        answer = super().ioctl(fd, request, argument)
        argument.out_phys, argument.length = self.answers.pop(0)
        return answer


@pytest.fixture(params=[False, True], ids=["group", "iommufd"])
def placed(request: pytest.FixtureRequest) -> Iterator[tuple[PlacedFrames, UnsafeNoIommu]]:
    """A kernel with places for huge pages, and the mode of an open device."""
    with PlacedFrames(iommufd=request.param) as kernel, opened(kernel) as device:
        yield kernel, device.unsafe_noiommu


@pytest.mark.parametrize(
    ("addresses", "ranges"),
    [
        ([0, 2, 4], [(0, 0, 6)]),
        ([0, 2, 6], [(0, 0, 4), (4, 6, 2)]),
        ([6, 2, 4], [(0, 6, 2), (2, 2, 4)]),
        ([4, 2, 0], [(0, 4, 2), (2, 2, 2), (4, 0, 2)]),
        ([8, 2, 10], [(0, 8, 2), (2, 2, 2), (4, 10, 2)]),
    ],
)
def test_huge_pages_that_are_neighbours_are_one_range(
    placed: tuple[PlacedFrames, UnsafeNoIommu], addresses: list[int], ranges: list[tuple[int, int, int]]
) -> None:
    """In MiB above 8 GiB. Only a neighbour above the page before is contiguous for the device."""
    kernel, unsafe = placed
    base = 8 * GIB
    kernel.place(*((base + address * MIB, 2 * MIB) for address in addresses))
    memory = unsafe.allocate(6 * MIB)
    assert memory.ranges == tuple((offset * MIB, base + at * MIB, size * MIB) for offset, at, size in ranges)
    for offset, at, size in ranges:
        assert memory.physical(offset * MIB, size * MIB) == base + at * MIB


@pytest.mark.parametrize(("address", "fits"), [((1 << 33) - 2 * MIB, True), ((1 << 33) - 2 * MIB + PAGE_SIZE, False)])
def test_memory_up_to_the_last_address_of_the_device_is_taken(
    placed: tuple[PlacedFrames, UnsafeNoIommu], address: int, *, fits: bool
) -> None:
    kernel, unsafe = placed
    kernel.place((address, 2 * MIB))
    if fits:
        assert unsafe.allocate(2 * MIB, dma_bits=33).physical() == address
    else:
        with pytest.raises(pyvfio.VfioError, match="the device has 33 address bits"):
            unsafe.allocate(2 * MIB, dma_bits=33)


def test_a_page_that_is_not_in_memory_has_no_address() -> None:
    """The rest of such an entry of the pagemap is no frame, but a place in the swap."""
    with PlacedFrames(iommufd=False) as kernel, opened(kernel) as device:
        kernel.place((8 * GIB, 0))
        with pytest.raises(pyvfio.VfioError, match=r"page at vaddr 0x[0-9a-f]+ is not in memory"):
            device.unsafe_noiommu.allocate(2 * MIB)
        assert device.unsafe_noiommu.memories == []


@pytest.mark.parametrize("length", [0, 2 * MIB + 1])
def test_a_contiguous_part_of_a_size_that_cannot_be_is_refused(length: int) -> None:
    """Without an end of the look-ups, or with addresses of memory that is somebody else's."""
    with PlacedFrames(iommufd=True) as kernel, opened(kernel) as device:
        kernel.place((8 * GIB, 2 * MIB), (4 * GIB, length))
        with pytest.raises(pyvfio.VfioError, match=rf"says that {length:#x} of 0x200000 bytes are contiguous"):
            device.unsafe_noiommu.allocate(4 * MIB)
        assert (device.unsafe_noiommu.memories, kernel.pinned) == ([], 0)


def test_each_contiguous_part_is_looked_up_once_whatever_its_size() -> None:
    """From the end of the one before, for all that is left; a part can be a byte long."""
    with PlacedFrames(iommufd=True) as kernel, opened(kernel) as device:
        kernel.place((8 * GIB, 3 * MIB), (4 * GIB, MIB - 1), (6 * GIB, 1))
        memory = device.unsafe_noiommu.allocate(4 * MIB)
        assert kernel.asked == [4 * MIB, MIB, 1]
        assert [tuple(part) for part in memory.ranges] == [
            (0, 8 * GIB, 3 * MIB),
            (3 * MIB, 4 * GIB, MIB - 1),
            (4 * MIB - 1, 6 * GIB, 1),
        ]


# ---------------------------------------------------------------------------------------------------- loud, and alone


def test_the_object_says_that_there_is_no_protection(device: pyvfio.Device) -> None:
    memory = device.unsafe_noiommu.allocate(2 * MIB)
    assert repr(device) == f"<Device {BDF} WITHOUT PROTECTION (no-IOMMU mode)>"
    assert "WITHOUT PROTECTION" in repr(device.unsafe_noiommu)
    assert "UNSAFE" in repr(memory)
    assert (UnsafeNoIommu.__doc__ or "").startswith("No protection")


def test_the_warning_names_the_line_of_the_program_and_can_prevent_the_open(kernel: FakeKernel) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel).close()
    assert [each.filename for each in caught] == [__file__]
    kernel.clear_trace()
    with pytest.raises(pyvfio.UnsafeNoIommuWarning):  # warnings are errors in these tests
        pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)
    assert list(kernel.trace) == []


@pytest.mark.parametrize("iommu", [None, "type1", "iommufd"])
def test_no_other_choice_opens_the_device(kernel: FakeKernel, iommu: Choice | None) -> None:
    """The refusal says what the device can reach, and names no choice that is refused too."""
    with pytest.raises(pyvfio.UnsupportedError, match=r"has no IOMMU.* all .*memory") as caught:
        pyvfio.open_device(BDF, iommu=iommu, kernel=kernel)
    assert not re.search('iommu="(type1|iommufd)"', str(caught.value))
    if iommu == "iommufd":
        assert 'iommu="unsafe-noiommu"' in caught.value.hint


def test_iommufd_without_unsafe_does_not_open_the_device() -> None:
    with FakeKernel("7.3", iommu="none", iommufd=True) as kernel:
        with pytest.raises(pyvfio.UnsupportedError, match="so no address space confines the device"):
            pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
        assert not [call for call in kernel.trace if call.request == "VFIO_DEVICE_BIND_IOMMUFD"]
        with pytest.raises(pyvfio.UnsupportedError, match="has no IOMMU"), pyvfio.Ioas(kernel=kernel) as space:
            pyvfio.open_device(BDF, space=space)
        assert kernel.descriptors == ()


def test_iommufd_is_not_chosen_where_only_the_node_without_an_iommu_exists() -> None:
    with FakeKernel("7.3", iommu="none", iommufd=True, type1=False) as kernel:
        with pytest.raises(pyvfio.UnsupportedError, match="so no address space confines the device"):
            pyvfio.open_device(BDF, kernel=kernel)
        with opened(kernel) as device:
            assert isinstance(device.unsafe_noiommu, UnsafeByIommufd)


def test_type1_alone_has_the_device_through_the_group() -> None:
    with FakeKernel("6.12", iommu="none", iommufd=True) as kernel, opened(kernel) as device:
        assert isinstance(device.unsafe_noiommu, UnsafeByGroup)
        assert device.iommufd is None
        assert device.group_number == 2


@pytest.mark.parametrize("name", ["space", "container"])
def test_a_device_without_protection_has_no_address_space(device: pyvfio.Device, name: str) -> None:
    with pytest.raises(pyvfio.UnsupportedError, match=rf"^{BDF} has no IOMMU .*, so the device .*unsafe-noiommu"):
        getattr(device, name)


def test_a_device_without_protection_moves_nowhere_and_says_which_device(
    kernel: FakeKernel, device: pyvfio.Device
) -> None:
    moves: dict[str, Callable[[], object]] = {
        "the device is attached to no address space": lambda: device.attach(device),  # type: ignore[arg-type]
        "nothing detaches the device": device.detach,
    }
    kernel.clear_trace()
    for words, move in moves.items():
        with pytest.raises(pyvfio.UnsupportedError, match=f"^{BDF} has no IOMMU .*, so {words}"):
            move()
    assert list(kernel.trace) == []
    assert device.open_neighbours() == [device]


def test_a_child_has_no_memory_of_the_device_of_the_parent(device: pyvfio.Device) -> None:
    def use() -> None:
        with pytest.raises(pyvfio.ForkedError):
            _ = device.unsafe_noiommu

    assert in_child(use) == 0


def test_a_device_that_is_in_no_group_has_no_number_of_one() -> None:
    """A kernel without groups, CONFIG_VFIO_GROUP."""
    with FakeKernel("7.3", iommu="none", iommufd=True) as kernel:
        (kernel.sysfs / "bus/pci/devices" / BDF / "iommu_group").unlink()
        with opened(kernel) as device, pytest.raises(pyvfio.VfioError, match=f"^{BDF} is in no IOMMU group"):
            _ = device.group_number


def _refuse(what: object) -> NoReturn:
    raise AssertionError(f"{what!r} was taken")


def test_whatever_keeps_a_promise_refuses_the_object_before_any_call(kernel: FakeKernel, device: pyvfio.Device) -> None:
    unsafe = device.unsafe_noiommu
    blocks = pyvfio.RamBlockList(kernel=kernel)
    kernel.clear_trace()
    with pytest.raises(TypeError):
        _refuse(pyvfio.DmaMapper(unsafe, blocks))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _refuse(pyvfio.DirtyTracking(unsafe))  # type: ignore[arg-type]
    with pytest.raises((TypeError, AttributeError)):
        blocks.add_notifier(unsafe)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        pyvfio.open_device(OTHER_BDF, space=unsafe)  # type: ignore[call-overload,arg-type,unused-ignore]
    with pytest.raises(pyvfio.UnsupportedError):
        device.detach()
    assert list(kernel.trace) == []


def test_a_device_cannot_be_moved_into_an_address_space() -> None:
    with FakeKernel("7.3", iommu="none", iommufd=True) as kernel, opened(kernel) as device:
        assert device.iommufd is not None
        assert device.iommufd.spaces == []
        with pyvfio.Ioas(device.iommufd) as space, pytest.raises(pyvfio.UnsupportedError, match="no address space"):
            device.attach(space)


def test_a_device_with_an_iommu_has_no_physical_addresses() -> None:
    with FakeKernel() as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        with pytest.raises(pyvfio.VfioError, match=re.escape(f"{BDF} has an IOMMU")):
            _ = device.unsafe_noiommu
        with pytest.raises(pyvfio.UnsupportedError, match=r"cannot be opened without one.*Leave iommu= out"):
            pyvfio.open_device(OTHER_BDF, iommu="unsafe-noiommu", kernel=kernel)


@pytest.mark.parametrize("argument", ["iommu_type", "container", "space"])
def test_arguments_of_address_spaces_are_refused(argument: str) -> None:
    with FakeKernel() as kernel, pyvfio.Container(kernel=kernel) as container:
        value = pyvfio.ioctls.VFIO_TYPE1v2_IOMMU if argument == "iommu_type" else container
        with pytest.raises(ValueError, match=r"iommu_type is for containers|iommu cannot be 'unsafe-noiommu'"):
            pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel, **{argument: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the switch and rights


def test_with_the_mode_off_the_error_says_what_to_write_and_what_it_risks(kernel: FakeKernel) -> None:
    kernel.noiommu.enabled = False
    kernel.bind(BDF, None)
    kernel.bind(BDF, "vfio-pci")
    assert pci.read_device(BDF, kernel=kernel).driver is None
    with pytest.raises(pyvfio.UnavailableError, match="no-IOMMU mode is off") as caught:
        pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)
    hint = caught.value.hint
    assert f"echo 1 >{kernel.sysfs / PARAMETER}" in hint
    assert "An IOMMU is better" in hint
    assert "any memory of this machine" in hint
    kernel.noiommu.enabled = True
    with pytest.raises(pyvfio.NotBoundError, match=f"pyvfio bind {BDF}"):
        pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)


@pytest.mark.parametrize(("loaded", "text"), [(True, "without CONFIG_VFIO_NOIOMMU"), (False, "modprobe vfio")])
def test_a_kernel_without_the_mode_is_named(*, loaded: bool, text: str) -> None:
    with FakeKernel("6.12", iommu="none") as kernel:
        kernel.bind(BDF, None)
        (kernel.sysfs / PARAMETER).unlink()
        if not loaded:
            (kernel.sysfs / PARAMETER).parent.rmdir()
            (kernel.sysfs / "module/vfio").rmdir()
        with pytest.raises(pyvfio.UnavailableError, match=text):
            pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)
        (kernel.sysfs / PARAMETER).parent.mkdir(parents=True, exist_ok=True)
        (kernel.sysfs / PARAMETER).touch()


def test_a_process_without_cap_sys_rawio_opens_nothing(kernel: FakeKernel) -> None:
    kernel.noiommu.raw_io = False
    with pytest.warns(pyvfio.UnsafeNoIommuWarning), pytest.raises(pyvfio.AccessDeniedError, match="CAP_SYS_RAWIO"):
        pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.EACCES, pyvfio.AccessDeniedError), (errno.ENOENT, pyvfio.UnavailableError)],
)
def test_a_container_that_cannot_be_opened_is_explained(number: int, error: type[pyvfio.VfioError]) -> None:
    with FakeKernel("6.12", iommu="none") as kernel:
        kernel.fail(call="open", errno=number)
        with pytest.warns(pyvfio.UnsafeNoIommuWarning), pytest.raises(error, match="/vfio/vfio"):
            pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)
        assert kernel.descriptors == ()


@pytest.mark.parametrize("request_name", ["VFIO_GROUP_SET_CONTAINER", "VFIO_SET_IOMMU", "VFIO_GROUP_GET_DEVICE_FD"])
def test_after_a_refused_step_of_the_group_nothing_is_open(request_name: str) -> None:
    with FakeKernel("6.12", iommu="none") as kernel:
        kernel.fail(request=request_name, errno=errno.EPERM)
        with pytest.warns(pyvfio.UnsafeNoIommuWarning), pytest.raises(pyvfio.IoctlError, match=request_name):
            pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)
        assert kernel.descriptors == ()


@pytest.mark.parametrize(
    "request_name", ["IOMMU_IOAS_ALLOC", "VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"]
)
def test_after_a_refused_step_of_iommufd_nothing_is_open(request_name: str) -> None:
    with FakeKernel("7.3", iommu="none", iommufd=True) as kernel:
        kernel.fail(request=request_name, errno=errno.ENOMEM)
        with pytest.warns(pyvfio.UnsafeNoIommuWarning), pytest.raises(pyvfio.IoctlError, match=request_name):
            pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)
        assert kernel.descriptors == ()


def test_a_device_is_opened_once(kernel: FakeKernel) -> None:
    with opened(kernel), pytest.warns(pyvfio.UnsafeNoIommuWarning), pytest.raises(pyvfio.VfioError):
        pyvfio.open_device(BDF, iommu="unsafe-noiommu", kernel=kernel)


# ------------------------------------------------------------------------------------------------------------ the fake


def test_the_fake_reaches_only_memory_whose_address_was_looked_up(kernel: FakeKernel, device: pyvfio.Device) -> None:
    with pytest.raises(DmaFault, match="nothing is mapped there"):
        kernel.dma_read(BDF, 0x1000, 1)
    assert kernel.mappings() == ()
    kernel.faults.clear()
    assert device.unsafe_noiommu.memories == []


def test_the_fake_makes_a_group_for_each_device_alone() -> None:
    with pytest.raises(ValueError, match="a group for each device alone"):
        FakeKernel(iommu="none", groups=[(2, [FakeEdu(BDF), FakeDevice(OTHER_BDF)])])
    with FakeKernel() as kernel, pytest.raises(ValueError, match="has an IOMMU"):
        _ = kernel.noiommu


def test_nodes_and_sysfs_are_those_of_the_mode() -> None:
    with FakeKernel("7.3", iommu="none", iommufd=True) as kernel:
        found = pci.read_device(BDF, kernel=kernel)
        assert (found.cdev, found.iommu_group) == ("noiommu-vfio0", 2)
        assert pci.group_node(2, kernel=kernel) == kernel.dev / "vfio/noiommu-2"
        assert (kernel.dev / "vfio/devices/noiommu-vfio0").exists()
        kernel.bind(BDF, None)
        assert pci.read_device(BDF, kernel=kernel).iommu_group is None
        assert not (kernel.dev / "vfio/noiommu-2").exists()
