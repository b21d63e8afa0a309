"""Memory behind iommufd on the fake kernel: copies, files, accounts, dirty pages. A sentence a test."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from functools import partial

import pytest

from pyvfio import ioctls
from pyvfio.kernel import F_SEAL_WRITE
from pyvfio.testing.fake import FakeKernel, IommuModel
from pyvfio.units import KIB, MIB, PAGE_SIZE, Iova, IovaRange
from tests.unit.bare_iommufd import BareDevice, BareIommufd, outcome
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE

_BLOCK = 64 * KIB
_ADD_SEALS = 1033


@pytest.fixture(params=["6.12", "7.3"])
def kernel(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    """A kernel with iommufd beside type1. At the end the fake agrees with itself, and nothing is left."""
    with FakeKernel(request.param, iommufd=True) as fake:
        yield fake
        fake._machine._check_state()
    assert (fake.pinned, fake.charged_to_user, fake._pins.used) == (0, 0, 0)


@pytest.fixture
def newest() -> Iterator[FakeKernel]:
    """7.3, which maps files."""
    with FakeKernel("7.3", iommufd=True) as fake:
        yield fake
        fake._machine._check_state()
    assert (fake.pinned, fake.charged_to_user) == (0, 0)


def _attached(kernel: FakeKernel, bdf: str = BDF) -> tuple[BareIommufd, int, BareDevice]:
    """An iommufd, a space of it, and a device that is attached."""
    iommufd, device = BareIommufd(kernel), BareDevice(kernel, bdf)
    device.bind(iommufd.fd)
    ioas = iommufd.ioas()
    device.attach(ioas)
    return iommufd, ioas, device


def _memory(kernel: FakeKernel, size: int = 16 * MIB) -> int:
    return kernel.mmap(0, size, READ_WRITE, PRIVATE)


# ----------------------------------------------------------------------------------------------------------- copy


def test_a_copy_shares_the_memory_and_is_not_charged_again(kernel: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(kernel)
    memory, second = _memory(kernel), iommufd.ioas()
    iommufd.map(ioas, memory, MIB, 0)
    assert iommufd.copy(second, ioas, MIB // 2, to=MIB, start=PAGE_SIZE) == MIB
    other = BareDevice(kernel, OTHER_BDF)
    other.bind(iommufd.fd)
    other.attach(second)
    assert (kernel.pinned, kernel.charged_to_user) == (MIB, MIB)
    kernel.dma_write(OTHER_BDF, MIB, b"copy")
    assert kernel.dma_read(BDF, PAGE_SIZE, 4) == b"copy"
    iommufd.unmap(ioas, 0, MIB)
    assert kernel.pinned == MIB // 2
    kernel.dma_write(OTHER_BDF, MIB, b"stay")
    iommufd.unmap(second, MIB, MIB // 2)
    assert kernel.pinned == 0


def test_a_copy_needs_a_source_without_gap_and_with_the_right_to_write(kernel: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(kernel)
    memory, second = _memory(kernel), iommufd.ioas()
    iommufd.map(ioas, memory, _BLOCK, 0)
    iommufd.map(ioas, memory, _BLOCK, _BLOCK, flags=4)
    copy = partial(iommufd.copy, second, ioas)
    assert outcome(partial(copy, 0, to=0, start=0)) == "EINVAL"
    assert outcome(partial(copy, 2 * _BLOCK + PAGE_SIZE, to=0, start=0)) == "ENOENT"
    assert outcome(partial(copy, 2 * _BLOCK, to=0, start=0)) == "EPERM"
    assert iommufd.unmap(second, 0, (1 << 64) - 1) == 0  # not even the first area was copied
    assert copy(2 * _BLOCK, to=0, start=0, flags=4) == 0
    assert outcome(partial(copy, PAGE_SIZE, to=_BLOCK, start=0)) == "EEXIST"
    assert copy(PAGE_SIZE, to=None, start=0) == 2 * _BLOCK
    assert outcome(partial(iommufd.copy, 99, ioas, PAGE_SIZE, to=0, start=0)) == "ENOENT"


def test_pages_of_a_copy_that_are_pinned_already_need_no_memory_behind_them(kernel: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(kernel)
    memory = _memory(kernel)
    iommufd.map(ioas, memory, _BLOCK, 0)
    kernel.munmap(memory, _BLOCK)
    kernel.violations.clear()
    assert iommufd.copy(ioas, ioas, _BLOCK, to=MIB, start=0) == MIB
    assert outcome(partial(iommufd.map, ioas, memory, _BLOCK, 2 * MIB)) == "EFAULT"


def test_a_copy_of_a_part_that_was_cut_leaves_the_charge_of_each_page_right(kernel: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(kernel)
    iommufd.huge_pages(ioas, 0)
    iommufd.vfio_ioas(1, ioas)
    iommufd.map(ioas, _memory(kernel), _BLOCK, 0)
    iommufd.copy(ioas, ioas, _BLOCK, to=MIB, start=0)
    assert iommufd.unmap_dma(4 * PAGE_SIZE, PAGE_SIZE) == (0, PAGE_SIZE)
    assert kernel.pinned == _BLOCK  # the copy has the page
    assert iommufd.unmap_dma(MIB + 4 * PAGE_SIZE, PAGE_SIZE) == (0, PAGE_SIZE)
    assert kernel.pinned == _BLOCK - PAGE_SIZE
    kernel._machine._check_state()
    iommufd.unmap(ioas, 0, MIB)
    assert kernel.pinned == _BLOCK - PAGE_SIZE


# ------------------------------------------------------------------------------------------------------- accounts


def test_by_default_the_user_pays_and_nothing_shows_as_locked(kernel: FakeKernel) -> None:
    kernel.memlock_limit = 8 * MIB
    iommufd, ioas, _device = _attached(kernel)
    memory = _memory(kernel)
    iommufd.map(ioas, memory, 5 * MIB, 0)
    iommufd.map(ioas, memory, 2 * MIB, 5 * MIB)
    assert outcome(partial(iommufd.map, ioas, memory, 4 * MIB, 7 * MIB)) == "ENOMEM"
    assert (kernel.memlock().used, kernel.charged_to_user, kernel.pinned) == (0, 7 * MIB, 7 * MIB)
    second, space, _other = _attached(kernel, OTHER_BDF)  # of the same user
    assert outcome(partial(second.map, space, memory, 2 * MIB, 0)) == "ENOMEM"
    second.map(space, memory, MIB, 0)


def test_memory_of_type1_and_of_the_user_are_counted_apart(kernel: FakeKernel) -> None:
    kernel.memlock_limit = MIB
    iommufd, ioas, _device = _attached(kernel)
    memory = _memory(kernel)
    iommufd.map(ioas, memory, MIB, 0)
    container = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
    group = kernel.open(str(kernel.dev / "vfio/3"), os.O_RDWR)
    kernel.ioctl(group, ioctls.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))
    kernel.ioctl(container, ioctls.VFIO_SET_IOMMU, 3)
    kernel.ioctl(container, ioctls.VFIO_IOMMU_MAP_DMA, bytearray(struct.pack("=IIQQQ", 32, 3, memory, 0, MIB)))
    assert (kernel.memlock().used, kernel.charged_to_user) == (MIB, MIB)
    assert len(kernel.mappings()) == 2


def test_with_rlimit_mode_1_the_process_pays_as_for_type1(kernel: FakeKernel) -> None:
    kernel.memlock_limit = 8 * MIB
    iommufd = BareIommufd(kernel)
    iommufd.by_process()
    device, ioas = BareDevice(kernel, BDF), iommufd.ioas()
    device.bind(iommufd.fd)
    device.attach(ioas)
    memory = _memory(kernel)
    iommufd.map(ioas, memory, 7 * MIB, 0)
    assert (kernel.memlock().used, kernel.charged_to_user, kernel.pinned) == (7 * MIB, 0, 7 * MIB)
    assert outcome(partial(iommufd.map, ioas, memory, 2 * MIB, 8 * MIB)) == "ENOMEM"
    kernel._machine._check_state()


def test_the_mode_is_chosen_before_the_first_object_with_cap_sys_resource(kernel: FakeKernel) -> None:
    iommufd = BareIommufd(kernel)
    kernel.may_set_limits = False
    assert outcome(iommufd.by_process) == "EPERM"
    kernel.may_set_limits = True
    assert outcome(partial(iommufd.option, 0, 0, 0, 2)) == "EINVAL"
    assert outcome(partial(iommufd.option, 0, 1, 1)) == "EOPNOTSUPP"
    iommufd.ioas()
    assert outcome(iommufd.by_process) == "EBUSY"
    assert iommufd.option(0, 1, 0) == 0


def test_a_privileged_process_pays_nothing_and_its_memory_stays_free_later(kernel: FakeKernel) -> None:
    kernel.memlock_limit, kernel.privileged = MIB, True
    iommufd, ioas, device = _attached(kernel)
    memory = _memory(kernel)
    iommufd.map(ioas, memory, 8 * MIB, 0)
    assert (kernel.memlock().used, kernel.charged_to_user, kernel.pinned) == (0, 0, 8 * MIB)
    kernel.privileged = False
    device.detach()
    assert device.attach(ioas) == 3  # the payer was chosen by the map
    assert outcome(partial(iommufd.map, ioas, memory, 2 * MIB, 8 * MIB)) == "ENOMEM"


def test_all_pages_are_pinned_before_the_limit_is_asked(kernel: FakeKernel) -> None:
    kernel.memlock_limit = MIB
    iommufd, ioas, _device = _attached(kernel)
    memory = _memory(kernel)
    kernel.munmap(memory + 4 * MIB, PAGE_SIZE)
    assert outcome(partial(iommufd.map, ioas, memory, 4 * MIB, 0)) == "ENOMEM"
    assert outcome(partial(iommufd.map, ioas, memory, 5 * MIB, 0)) == "EFAULT"


def test_an_attach_that_is_over_the_limit_changes_nothing(kernel: FakeKernel) -> None:
    kernel.memlock_limit = MIB
    iommufd, ioas, device = _attached(kernel)
    device.detach()
    memory = _memory(kernel)
    iommufd.map(ioas, memory, MIB, 0)
    iommufd.map(ioas, memory, MIB, MIB)
    assert outcome(partial(device.attach, ioas)) == "ENOMEM"
    assert (kernel.pinned, kernel.charged_to_user, kernel.mappings()) == (0, 0, ())
    iommufd.unmap(ioas, MIB, MIB)
    device.attach(ioas)
    assert kernel.charged_to_user == MIB


# ---------------------------------------------------------------------------------------------------------- files


def test_a_memory_file_is_mapped_and_its_descriptor_can_be_closed(newest: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(newest)
    file = newest.memfd_create("block", 0)
    newest.ftruncate(file, 2 * MIB)
    memory = newest.mmap(0, 2 * MIB, READ_WRITE, 1, fd=file)
    assert iommufd.map_file(ioas, file, MIB, MIB) == MIB
    newest.close(file)
    newest.dma_write(BDF, MIB, b"in the file")
    assert ctypes.string_at(memory + MIB, 11) == b"in the file"
    assert (newest.pinned, newest.charged_to_user) == (MIB, MIB)
    newest.munmap(memory, 2 * MIB)  # the pages are the file's
    newest.check()
    assert newest.dma_read(BDF, MIB, 11) == b"in the file"
    assert iommufd.unmap(ioas, MIB, MIB) == MIB


def test_pages_of_a_mapped_file_that_are_released_are_a_violation(newest: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(newest)
    file = newest.memfd_create("block", 0)
    newest.ftruncate(file, MIB)
    iommufd.map_file(ioas, file, 0, MIB, iova=0)
    newest.ftruncate(file, _BLOCK)
    assert [(each.call, each.iova, each.size) for each in newest.violations] == [("ftruncate", _BLOCK, MIB - _BLOCK)]


def test_each_bad_file_has_its_errno_when_it_is_pinned(newest: FakeKernel) -> None:
    iommufd, ioas, device = _attached(newest)
    file, pipe = newest.memfd_create("block", 0), os.pipe()
    newest.ftruncate(file, MIB)
    mapped = partial(iommufd.map_file, ioas)
    assert outcome(partial(mapped, 9999, 0, PAGE_SIZE)) == "EBADF"
    assert outcome(partial(mapped, file, 0, 0)) == "EINVAL"
    assert outcome(partial(mapped, file, (1 << 64) - 5, PAGE_SIZE)) == "EOVERFLOW"
    for fd, start in ((file, MIB), (file, MIB - PAGE_SIZE), (file, 5), (pipe[0], 0), (file, 1 << 62)):
        assert outcome(partial(mapped, fd, start, 2 * PAGE_SIZE, iova=0)) == "EINVAL"
    device.detach()
    assert mapped(pipe[0], 0, PAGE_SIZE, iova=0) == 0
    assert outcome(partial(device.attach, ioas)) == "EINVAL"
    for fd in pipe:
        os.close(fd)


def test_a_file_that_is_open_for_reading_only_can_be_mapped_for_writes_of_devices(newest: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(newest)
    file = newest.memfd_create("block", 0)
    newest.ftruncate(file, MIB)
    readonly = os.open(f"/proc/self/fd/{file}", os.O_RDONLY)
    iommufd.map_file(ioas, readonly, 0, MIB, iova=0)
    os.close(readonly)
    newest.dma_write(BDF, 0, b"written")
    assert os.pread(file, 7, 0) == b"written"


def test_a_file_that_is_sealed_against_writing_can_be_mapped_for_writes_of_devices(newest: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(newest)
    file = os.memfd_create("block", os.MFD_ALLOW_SEALING)
    os.ftruncate(file, MIB)
    fcntl.fcntl(file, _ADD_SEALS, F_SEAL_WRITE)
    assert iommufd.map_file(ioas, file, 0, MIB, iova=0) == 0
    newest.check()
    assert newest.dma_read(BDF, 0, 4) == bytes(4)
    os.close(file)


def test_a_space_with_process_memory_cannot_change_the_process(newest: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(newest)
    file = newest.memfd_create("block", 0)
    newest.ftruncate(file, MIB)
    iommufd.map_file(ioas, file, 0, MIB, iova=0)
    iommufd.change_process()
    iommufd.map(ioas, _memory(newest), PAGE_SIZE, MIB)
    assert outcome(iommufd.change_process) == "EINVAL"


def test_no_window_of_the_fake_on_a_file_is_left(newest: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(newest)
    file = newest.memfd_create("seen-in-maps", 0)
    newest.ftruncate(file, MIB)
    iommufd.map_file(ioas, file, 0, MIB, iova=0)
    outcome(partial(iommufd.map_file, ioas, file, 0, MIB, iova=0))
    iommufd.copy(ioas, ioas, MIB, to=MIB, start=0)
    assert _windows() == 1
    iommufd.unmap(ioas, 0, MIB)
    assert _windows() == 1
    iommufd.unmap(ioas, MIB, MIB)
    assert _windows() == 0


def _windows() -> int:
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        return maps.read().count("seen-in-maps")


# ------------------------------------------------------------------------------------------------------ dirty pages

_TRACKING = IommuModel((IovaRange(Iova(0), Iova((1 << 39) - 1)),), dirty_tracking=True)


def test_an_iommu_that_tracks_marks_the_pages_that_devices_write() -> None:
    with FakeKernel("7.3", iommu=_TRACKING, iommufd=True) as kernel:
        iommufd, device = BareIommufd(kernel), BareDevice(kernel, BDF)
        number, ioas = device.bind(iommufd.fd), iommufd.ioas()
        hwpt = iommufd.hwpt(number, ioas, 2)
        device.attach(hwpt)
        iommufd.map(ioas, _memory(kernel), MIB, 0)
        get = partial(iommufd.get_dirty, hwpt, 0, MIB)
        assert outcome(get) == "EINVAL"  # tracking is off
        kernel.dma_write(BDF, 0, b"before")
        iommufd.set_dirty(hwpt, 1)
        assert get() == 0
        kernel.dma_write(BDF, 2 * PAGE_SIZE - 1, b"over the end of a page")
        kernel.dma_read(BDF, 5 * PAGE_SIZE, 1)
        assert iommufd.get_dirty(hwpt, 0, MIB, flags=1) == 0b110
        assert iommufd.get_dirty(hwpt, 2 * PAGE_SIZE, 2 * PAGE_SIZE) == 0b1
        assert get() == 0b10
        assert get() == 0
        assert outcome(partial(iommufd.get_dirty, hwpt, 0, 2 * MIB)) == "EINVAL"  # not wholly mapped
        assert outcome(partial(iommufd.get_dirty, hwpt, 5, PAGE_SIZE)) == "EINVAL"
        iommufd.set_dirty(hwpt, 0)


@pytest.mark.parametrize(("version", "of_nothing"), [("6.12", "EOVERFLOW"), ("7.3", "EINVAL")])
def test_an_iommu_that_does_not_track_refuses_after_the_range_was_checked(version: str, of_nothing: str) -> None:
    with FakeKernel(version, iommufd=True) as kernel:
        iommufd, _ioas, _device = _attached(kernel)
        assert outcome(partial(iommufd.set_dirty, 3, 1)) == "EOPNOTSUPP"
        assert outcome(partial(iommufd.get_dirty, 3, 0, PAGE_SIZE)) == "EOPNOTSUPP"
        assert outcome(partial(iommufd.get_dirty, 3, PAGE_SIZE, 0)) == of_nothing
        assert outcome(partial(iommufd.get_dirty, 3, 0, PAGE_SIZE, 0)) == "EINVAL"
        assert outcome(partial(iommufd.get_dirty, 2, 0, PAGE_SIZE)) == "ENOENT"


# --------------------------------------------------------------------------------------- the requests of containers


def _info(iommufd: BareIommufd, argsz: int) -> bytes:
    buffer = bytearray(struct.pack("=I", argsz) + b"\xee" * 116)
    iommufd.kernel.ioctl(iommufd.fd, ioctls.VFIO_IOMMU_GET_INFO, buffer)
    return bytes(buffer)


def test_the_information_of_a_container_always_tells_the_whole_size(kernel: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(kernel)
    assert outcome(partial(_info, iommufd, 200)) == "ENODEV"
    iommufd.vfio_ioas(1, ioas)
    assert outcome(partial(_info, iommufd, 15)) == "EINVAL"
    short, whole = _info(iommufd, 16), _info(iommufd, 120)
    assert short[:16] == struct.pack("=IIQ", 88, 3, 0x4020_1000)
    assert short[16:] == b"\xee" * 104
    assert struct.unpack_from("=II", whole, 16) == (24, 0)
    assert struct.unpack_from("=HHII", whole, 24) == (3, 1, 40, 0xFFFF_FFFF)
    assert struct.unpack_from("=HHIII", whole, 40) == (1, 1, 0, 2, 0)
    assert struct.unpack_from("=QQQQ", whole, 56) == (0, 0xFEDF_FFFF, 0xFEF0_0000, 0x7F_FFFF_FFFF)


def test_the_extensions_of_a_container_are_those_of_iommufd(kernel: FakeKernel) -> None:
    iommufd = BareIommufd(kernel)

    def ask(number: int) -> object:
        return outcome(partial(kernel.ioctl, iommufd.fd, ioctls.VFIO_CHECK_EXTENSION, number))

    assert [ask(number) for number in range(12)] == [0, 1, 0, 1, "ENODEV", 0, 0, 0, 1, 1, 0, 0]
    iommufd.vfio_ioas(1, iommufd.ioas())
    assert ask(4) == 1
    assert kernel.ioctl(iommufd.fd, ioctls.VFIO_GET_API_VERSION) == 0


def test_setting_type1_turns_huge_pages_off_and_type1v2_leaves_them_so(kernel: FakeKernel) -> None:
    iommufd, ioas, _device = _attached(kernel)
    set_iommu = partial(kernel.ioctl, iommufd.fd, ioctls.VFIO_SET_IOMMU)
    assert outcome(partial(set_iommu, 3)) == "ENODEV"
    iommufd.vfio_ioas(1, ioas)
    assert [outcome(partial(set_iommu, kind)) for kind in (1, 3, 8, 9)] == [0, 0, "EINVAL", "EINVAL"]
    assert iommufd.option(1, 1, ioas) == 0
    iommufd.map_dma(_memory(kernel), 0, _BLOCK)
    assert iommufd.unmap_dma(PAGE_SIZE, PAGE_SIZE) == (0, PAGE_SIZE)


def test_a_container_that_maps_without_rights_is_refused_by_the_page_table_alone(kernel: FakeKernel) -> None:
    iommufd, ioas, device = _attached(kernel)
    iommufd.vfio_ioas(1, ioas)
    memory = _memory(kernel)
    assert outcome(partial(iommufd.map_dma, memory, 0, PAGE_SIZE, 0)) == "EINVAL"
    assert outcome(partial(iommufd.map_dma, memory, 0, PAGE_SIZE, 4)) == "EINVAL"
    device.detach()
    iommufd.map_dma(memory, 0, PAGE_SIZE, 0)
    assert outcome(partial(device.attach, ioas)) == "EINVAL"


def test_the_space_of_a_container_is_chosen_asked_and_forgotten(kernel: FakeKernel) -> None:
    iommufd = BareIommufd(kernel)
    ioas = iommufd.ioas()
    get, choose, clear = 0, 1, 2
    assert outcome(partial(iommufd.vfio_ioas, get)) == "ENODEV"
    assert outcome(partial(iommufd.vfio_ioas, choose, 99)) == "ENOENT"
    iommufd.vfio_ioas(choose, ioas)
    assert iommufd.vfio_ioas(get) == ioas
    iommufd.vfio_ioas(clear)
    assert outcome(partial(iommufd.vfio_ioas, get)) == "ENODEV"
    iommufd.vfio_ioas(choose, ioas)
    iommufd.destroy(ioas)
    assert outcome(partial(iommufd.vfio_ioas, get)) == "ENODEV"
