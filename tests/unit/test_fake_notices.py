"""What the fake kernel notices: memory that a device is about to lose, its own state, and failures that never came."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from pyvfio import ioctls
from pyvfio.kernel import MAP_FIXED, PROT_NONE, LinuxKernel
from pyvfio.testing.fake import VERSIONS, Bar, FakeDevice, FakeKernel, FakePciDevice
from pyvfio.units import MIB, Vaddr
from tests.unit.test_fake import (
    BASE,
    BDF,
    BOTH,
    MADV_DONTNEED,
    PAGE,
    PRIVATE,
    READ,
    attach,
    in_child,
    map_dma,
    open_device,
    unmap_dma,
)

UNMAP_VADDR, MAP_VADDR = 4, 4
MAP_HUGETLB = 0x40000
SHARED = 1
MADV_FREE, MADV_GUARD_INSTALL = 8, 102


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A fake as it is without arguments."""
    with FakeKernel() as fake:
        yield fake


@pytest.fixture
def mapped(kernel: FakeKernel) -> int:
    """The address of two pages that the device reaches at BASE, and a third that it does not."""
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 3 * PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr, size=2 * PAGE)
    return vaddr


def taken(kernel: FakeKernel) -> list[tuple[str, int, int]]:
    """The violations: call, IOVA and size in pages."""
    return [(each.call, (each.iova - BASE) // PAGE, each.size // PAGE) for each in kernel.violations]


# ------------------------------------------------------------------------------------------------- through the seam


def test_a_call_that_fails_half_way_has_taken_what_it_came_to(kernel: FakeKernel, mapped: int) -> None:
    """mprotect stops at a hole, and what lies before it is inaccessible."""
    kernel.munmap(mapped + 2 * PAGE, PAGE)
    with pytest.raises(OSError, match="allocate"):
        kernel.mprotect(mapped, 3 * PAGE, PROT_NONE)
    assert taken(kernel) == [("mprotect", 0, 2)]


def test_a_discard_that_fails_at_a_hole_has_taken_all_the_rest(kernel: FakeKernel, mapped: int) -> None:
    """madvise goes on behind it, and says ENOMEM at the end."""
    kernel.munmap(mapped + 2 * PAGE, PAGE)
    with pytest.raises(OSError, match="allocate"):
        kernel.madvise(mapped, 3 * PAGE, MADV_DONTNEED)
    assert taken(kernel) == [("madvise", 0, 2)]


def test_a_fixed_mapping_that_fails_when_it_has_unmapped_is_noticed(kernel: FakeKernel) -> None:
    """As where the pool of huge pages is empty: a hole is left."""
    container, _group = attach(kernel)
    whole = kernel.mmap(0, 4 * MIB, BOTH, PRIVATE)
    aligned = -(-whole // (2 * MIB)) * 2 * MIB
    map_dma(kernel, container, aligned)
    with suppress(OSError):  # where there are huge pages, it is a mapping like others
        kernel.mmap(aligned, 2 * MIB, BOTH, PRIVATE | MAP_FIXED | MAP_HUGETLB)
    assert [(each.vaddr, each.size) for each in kernel.violations] == [(aligned, PAGE)]
    kernel.munmap(aligned, 2 * MIB)


def test_a_call_that_fails_and_has_done_nothing_is_no_violation(kernel: FakeKernel, mapped: int) -> None:
    """The memory is there."""
    with pytest.raises(OSError, match="Invalid"):
        kernel.madvise(mapped, PAGE, 9999)
    with pytest.raises(OSError, match="Invalid"):
        kernel.munmap(mapped + 1, PAGE)
    assert taken(kernel) == []


@pytest.mark.parametrize(
    ("protection", "flags", "gone"), [(READ, BOTH, 2), (READ, READ, 0), (4, READ, 2), (0, READ, 2)]
)
def test_rights_that_a_mapping_has_and_its_memory_no_longer_are_a_violation(
    kernel: FakeKernel, protection: int, flags: int, gone: int
) -> None:
    """A device that may write has pages that the process must be able to write."""
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 2 * PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr, size=2 * PAGE, flags=flags)
    kernel.mprotect(vaddr, 2 * PAGE, protection)
    assert taken(kernel) == [("mprotect", 0, gone)] * bool(gone)


def test_the_part_of_a_page_that_is_unmapped_takes_the_page(kernel: FakeKernel, mapped: int) -> None:
    """As a kernel rounds it."""
    kernel.munmap(mapped, 1)
    assert taken(kernel) == [("munmap", 0, 1)]


@pytest.mark.parametrize("advice", [MADV_DONTNEED, MADV_FREE, MADV_GUARD_INSTALL])
def test_advice_that_is_not_known_to_be_harmless_takes_memory(kernel: FakeKernel, mapped: int, advice: int) -> None:
    """Where the running kernel knows it."""
    known = True
    try:
        kernel.madvise(mapped, PAGE, advice)
    except OSError:
        known = False
    assert taken(kernel) == [("madvise", 0, 1)] * known


def test_memory_whose_address_was_given_up_may_go_until_the_mapping_has_another(kernel: FakeKernel) -> None:
    """A live update: the pages stay with the device; only what it reaches through them does the fake not keep."""
    container, _group = attach(kernel)
    old, new = (kernel.mmap(0, PAGE, BOTH, PRIVATE) for _ in range(2))
    map_dma(kernel, container, old)
    argument = ioctls.vfio_iommu_type1_dma_unmap(argsz=24, flags=UNMAP_VADDR, iova=BASE, size=PAGE)
    kernel.ioctl(container, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
    kernel.munmap(old, PAGE)
    kernel.check()
    with pytest.raises(NotImplementedError, match="does not keep"):
        kernel.dma_read(BDF, BASE, 1)
    map_dma(kernel, container, new, flags=MAP_VADDR)
    kernel.check()
    kernel.munmap(new, PAGE)
    assert taken(kernel) == [("munmap", 0, 1)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_shared_file_on_a_disk_cannot_be_mapped_for_writing_since_6_12(
    version: str, where: str, tmp_path: Path
) -> None:
    """Its file system would not hear of what the device writes; a file in memory has nobody who must."""
    directory = tmp_path if where == "disk" else Path("/dev/shm")  # noqa: S108 (deleted at once)
    with FakeKernel(version) as kernel, tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(2 * PAGE)
        kind = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=True).stdout
        container, _group = attach(kernel)
        around = kernel.mmap(0, 4 * PAGE, BOTH, PRIVATE)
        kernel.mmap(around + PAGE, 2 * PAGE, BOTH, SHARED | MAP_FIXED, fd=file.fileno())
        refused = version != "6.1" and kind.strip() not in ("tmpfs", "ramfs")
        with pytest.raises(OSError, match="Bad address") if refused else nullcontext():
            map_dma(kernel, container, around, size=4 * PAGE)
        map_dma(kernel, container, around, iova=BASE + MIB, size=4 * PAGE, flags=READ)
        map_dma(kernel, container, around, iova=BASE + 2 * MIB, size=PAGE)
        if refused:
            kernel.memlock_limit = kernel.memlock().used  # which the page before it exceeds
            with pytest.raises(OSError, match="allocate"):
                map_dma(kernel, container, around, size=4 * PAGE)
    LinuxKernel().munmap(around, 4 * PAGE)


# ------------------------------------------------------------------------------------------------- behind its back


def test_memory_that_goes_behind_its_back_is_noticed_by_check(kernel: FakeKernel, mapped: int) -> None:
    """Once, whatever took it."""
    kernel.check()
    LinuxKernel().munmap(mapped + PAGE, PAGE)
    for _ in range(2):
        with pytest.raises(AssertionError, match="something took 0x2000 bytes"):
            kernel.check()
    assert len(kernel.violations) == 1


def test_an_access_of_a_device_to_memory_that_is_gone_is_on_record(kernel: FakeKernel, mapped: int) -> None:
    """It may have been made in a thread of the device's own, whose AssertionError nobody sees."""
    LinuxKernel().mprotect(mapped, PAGE, PROT_NONE)
    with pytest.raises(AssertionError, match="is gone or lost its rights"):
        kernel.dma_write(BDF, BASE + 10, b"abc")
    assert [(each.iova, each.vaddr, each.size) for each in kernel.violations] == [(BASE + 10, mapped + 10, 3)]


# ------------------------------------------------------------------------------------------------- its own state


def _spoil(kernel: FakeKernel, what: str) -> Callable[[], object]:
    """Put one thing out of order; what mends it."""
    container = kernel._machine.groups[2].container
    assert container is not None
    iommu = container.iommu
    assert iommu is not None
    entry = next(iter(iommu.table))
    match what:
        case "charge":
            kernel._pins.used += 1
            return lambda: setattr(kernel._pins, "used", kernel._pins.used - 1)
        case "index":
            kernel._pins.index.remove(entry)
            return lambda: kernel._pins.index.add(entry)
        case "vaddr":
            iommu._invalid.add(0)
            return iommu._invalid.clear
        case "limit":
            iommu._entry_limit = 0
            return lambda: setattr(iommu, "_entry_limit", 65535)
        case "alignment":
            odd = entry._replace(vaddr=Vaddr(entry.vaddr + 1))
            iommu.table.replace(odd)
            return lambda: iommu.table.replace(entry)
        case _:
            groups = list(container.groups)
            container.groups.clear()
            return lambda: container.groups.extend(groups)


@pytest.mark.parametrize("what", ["charge", "index", "vaddr", "limit", "alignment", "groups"])
def test_check_sees_when_the_fake_itself_is_not_in_order(kernel: FakeKernel, mapped: int, what: str) -> None:
    """Each thing that it knows twice, and each limit."""
    del mapped
    kernel.check()
    mend = _spoil(kernel, what)
    with pytest.raises(AssertionError):
        kernel.check()
    mend()
    kernel.check()


def test_the_entry_limit_is_the_one_when_the_iommu_is_set(kernel: FakeKernel) -> None:
    """Not when the container was opened."""
    container = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
    group = kernel.open(str(kernel.dev / "vfio/2"), os.O_RDWR)
    kernel.ioctl(group, ioctls.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))
    kernel.dma_entry_limit = 1
    kernel.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU)
    kernel.dma_entry_limit = 5
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr)
    with pytest.raises(OSError, match="No space"):
        map_dma(kernel, container, vaddr, iova=BASE + PAGE)
    unmap_dma(kernel, container)


def test_who_closes_a_descriptor_after_shutdown_closes_nobody_elses() -> None:
    """The number may be another file's by then."""
    kernel = FakeKernel()
    container, group = attach(kernel)
    kernel.shutdown()
    others = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]
    assert {container, group} <= set(others)
    kernel.close(container)
    kernel.close(group)
    for fd in others:
        os.close(fd)


def test_a_descriptor_that_was_closed_behind_its_back_does_not_stop_shutdown() -> None:
    """What is left is closed."""
    kernel = FakeKernel()
    container, group = attach(kernel)
    os.close(container)
    kernel.shutdown()
    assert kernel.descriptors == ()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(group)


def closed_and_taken(fd: int) -> int:
    """A stranger's file with the number of a descriptor that was closed past the seam."""
    os.close(fd)
    stranger = os.open("/dev/null", os.O_RDWR)
    assert stranger == fd
    return stranger


def test_a_file_that_got_a_lost_descriptors_number_is_neither_answered_for_nor_closed() -> None:
    """By any call, by its former owner's close, and by shutdown."""
    kernel = FakeKernel()
    container, group = attach(kernel)
    strangers = [closed_and_taken(fd) for fd in (open_device(kernel, group), group, container)]
    with pytest.raises(OSError, match="Inappropriate"):
        kernel.ioctl(strangers[0], ioctls.VFIO_DEVICE_GET_INFO, ioctls.vfio_device_info(argsz=24))
    assert kernel.pread(strangers[0], 4, 0) == b""
    kernel.close(strangers[1])
    kernel.shutdown()
    kernel.close(strangers[2])
    for fd in strangers:
        os.close(fd)


def test_what_hangs_on_a_lost_descriptor_is_released(kernel: FakeKernel) -> None:
    """As when the last descriptor goes by close: the group can be opened again, and nothing is mapped."""
    container, group = attach(kernel)
    map_dma(kernel, container, kernel.mmap(0, PAGE, BOTH, PRIVATE))
    os.close(group)
    again = kernel.open(str(kernel.dev / "vfio/2"), os.O_RDWR)
    assert kernel.mappings() == ()
    kernel.close(again)


def test_a_device_is_not_opened_by_duplicating_a_lost_descriptor(kernel: FakeKernel) -> None:
    """It would be a second descriptor of the stranger's file."""
    _container, group = attach(kernel)
    stranger = closed_and_taken(open_device(kernel, group))
    assert os.fstat(open_device(kernel, group)).st_ino != os.fstat(stranger).st_ino
    os.close(stranger)


# ------------------------------------------------------------------------------------------------- failures


def test_any_call_can_be_made_to_fail_by_its_number(kernel: FakeKernel) -> None:
    """So that a test can fail the first, the second …, whatever they are."""
    kernel.fail(errno=errno.EIO, nth=3)
    fds = [kernel.eventfd(0, 0) for _ in range(2)]
    assert list(kernel.planned_failures) == ["call 1 from now of any call fails with EIO"]
    with pytest.raises(OSError, match="Input/output"):
        kernel.mmap(0, PAGE, BOTH, PRIVATE)
    assert not list(kernel.planned_failures)
    for fd in fds:
        kernel.close(fd)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"call": "ioctl", "request": "VFIO_IOMMU_MAP_DMAA", "errno": 5}, "VFIO_IOMMU_MAP_DMAA"),
        ({"call": "ioctl", "errno": 0}, "errno: 0"),
        ({"call": "ioctl", "errno": -5}, "errno: -5"),
        ({"call": "iotcl", "errno": 5}, "iotcl"),
    ],
)
def test_a_failure_that_can_never_happen_is_refused(kernel: FakeKernel, plan: dict[str, str | int], words: str) -> None:
    """A test with a misspelt name would pass."""
    with pytest.raises(ValueError, match=words):
        kernel.fail(**plan)  # type: ignore[arg-type]


def test_an_interrupt_that_the_device_does_not_have_is_a_value_error() -> None:
    """It would be lost on hardware without a word."""

    with FakeKernel(groups=[(2, [FakeDevice(BDF, msi=2)])]) as kernel:
        kernel.interrupt(BDF, 1)
        with pytest.raises(ValueError, match="vectors 0 to 1, not 2"):
            kernel.interrupt(BDF, 2)
    with FakeKernel(groups=[(2, [FakeDevice(BDF)])]) as kernel, pytest.raises(ValueError, match="0 to 0"):
        kernel.interrupt(BDF, 1)


def test_a_real_buffer_that_is_closed_under_a_mapping_is_noticed(kernel: FakeKernel) -> None:
    """mmap.mmap calls munmap without the seam."""
    container, _group = attach(kernel)
    buffer = mmap.mmap(-1, PAGE)
    address = ctypes.c_char.from_buffer(buffer)
    vaddr = ctypes.addressof(address)
    map_dma(kernel, container, vaddr)
    del address
    buffer.close()
    with pytest.raises(AssertionError, match="something took"):
        kernel.check()


# ------------------------------------------------------------------------------------------------- how calls fail


def test_a_descriptor_whose_call_fails_afterwards_is_closed_again(kernel: FakeKernel) -> None:
    """The caller never learns its number."""
    container, group = attach(kernel)
    before = set(os.listdir("/proc/self/fd"))
    calls: dict[str, Callable[[], object]] = {
        "open": lambda: kernel.open(str(kernel.dev / "vfio/3"), os.O_RDWR),
        "eventfd": lambda: kernel.eventfd(0, 0),
        "ioctl": lambda: open_device(kernel, group),
    }
    for call, make in calls.items():
        kernel.fail(call=call, errno=errno.EINTR, after=True)
        with pytest.raises(InterruptedError):
            make()
    assert set(os.listdir("/proc/self/fd")) == before
    assert kernel.descriptors == (container, group)
    kernel.close(kernel.open(str(kernel.dev / "vfio/3"), os.O_RDWR))


def test_a_close_that_fails_has_closed(kernel: FakeKernel) -> None:
    """As on Linux: who tries again closes somebody else's descriptor."""
    container, group = attach(kernel)
    kernel.fail(call="close", errno=errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        kernel.close(group)
    assert kernel.descriptors == (container,)
    kernel.close(kernel.open(str(kernel.dev / "vfio/2"), os.O_RDWR))


def test_a_call_that_ends_in_any_exception_is_in_the_trace(kernel: FakeKernel) -> None:
    """With the exception in words."""
    container, _group = attach(kernel)
    with pytest.raises(BufferError):
        kernel.ioctl(container, ioctls.VFIO_IOMMU_MAP_DMA, bytearray(8))
    call = kernel.trace[-1]
    assert (call.request, call.result, call.errno) == ("VFIO_IOMMU_MAP_DMA", None, 0)
    assert "buffer of 8" in call.error
    assert "BufferError" in str(call)


def test_the_trace_names_what_is_in_small_arguments(kernel: FakeKernel) -> None:
    """A container's number, a device's name, a feature, an ioeventfd, a range of dirty pages."""
    container, group = attach(kernel)
    device = open_device(kernel, group)
    with suppress(OSError):
        kernel.ioctl(device, ioctls.VFIO_DEVICE_FEATURE, bytearray(struct.pack("=II", 8, 7)))
    with suppress(OSError):
        kernel.ioctl(device, ioctls.VFIO_DEVICE_IOEVENTFD, bytearray(struct.pack("=IIQQiI", 32, 4, 64, 5, 77, 0)))
    kernel.ioctl(container, ioctls.VFIO_IOMMU_DIRTY_PAGES, bytearray(struct.pack("=II", 8, 1)))
    with suppress(OSError):
        kernel.ioctl(container, ioctls.VFIO_IOMMU_DIRTY_PAGES, bytearray(struct.pack("=IIQQQQQ", 48, 4, 9, 1, 2, 3, 0)))
    seen = {call.request: call.arguments for call in kernel.trace}
    assert seen["VFIO_GROUP_SET_CONTAINER"]["container"] == container
    assert seen["VFIO_GROUP_GET_DEVICE_FD"]["name"] == BDF
    assert seen["VFIO_DEVICE_FEATURE"]["flags"] == 7
    assert seen["VFIO_DEVICE_IOEVENTFD"]["data"] == 5
    assert seen["VFIO_IOMMU_DIRTY_PAGES"]["iova"] == 9


# ------------------------------------------------------------------------------------------------- what it is not


def test_what_is_asked_for_and_not_modelled_is_told_by_name_and_once(caplog: pytest.LogCaptureFixture) -> None:
    """A driver's test that relies on it would pass for the wrong reason."""
    caplog.set_level(logging.WARNING, logger="pyvfio.testing.fake")  # a tool that ran before may want less of it
    with FakeKernel("7.3") as kernel:
        fd = open_device(kernel, attach(kernel)[1])
        for index in (0, 6, 6, 8):
            with suppress(OSError):
                argument = ioctls.vfio_region_info(argsz=32, index=index)
                kernel.ioctl(fd, ioctls.VFIO_DEVICE_GET_REGION_INFO, argument)
        get = int(ioctls.VFIO_DEVICE_FEATURE_GET)
        for feature in (11 | get, 3 | int(ioctls.VFIO_DEVICE_FEATURE_PROBE), 5):
            with suppress(OSError):
                kernel.ioctl(fd, ioctls.VFIO_DEVICE_FEATURE, bytearray(struct.pack("=II16x", 24, feature)))
        kernel.mmap(0, PAGE, BOTH, 1, fd=fd)
        names = [part.name for part in kernel.unmodelled]
    assert names == [
        "VFIO_PCI_ROM_REGION_INDEX",
        "VFIO_PCI_VGA_REGION_INDEX",
        "VFIO_DEVICE_FEATURE_DMA_BUF",
        "mmap",
    ]
    assert [record.message for record in caplog.records] == [str(part) for part in kernel.unmodelled]


class Silent(FakePciDevice):
    """Its registers say nothing."""

    def reset(self) -> None:
        """Nothing to be reset."""

    def read_register(self, _bar: int, _offset: int, _width: int, /) -> int:
        """A return that was forgotten."""
        return None  # type: ignore[return-value]

    def write_register(self, _bar: int, _offset: int, _width: int, _value: int, /) -> None:
        """Nothing."""


def test_a_register_that_reads_as_nothing_is_an_error_with_the_devices_name() -> None:
    """And the place in it."""
    with FakeKernel(groups=[(2, [Silent(BDF)])]) as kernel:
        fd = open_device(kernel, attach(kernel)[1])
        with pytest.raises(TypeError, match=r"Silent.read_register\(0, 0x8, 4\) returned None"):
            kernel.pread(fd, 4, 8)


@pytest.mark.parametrize(
    ("declare", "words"),
    [
        (lambda: FakeDevice(BDF, config={0x40: b"abcd", 0x42: b"zz"}), "4 bytes .* at 0x40 reach 0x42"),
        (lambda: FakeDevice(BDF, msix=2048, msix_bar=0, bars={0: Bar(PAGE)}), "ends at 0x8000, and BAR 0 at 0x1000"),
        (lambda: FakeDevice(BDF, msix=2, msix_offset=0), "say msix_bar"),
    ],
)
def test_a_device_that_cannot_be_is_a_value_error(declare: Callable[[], object], words: str) -> None:
    """With the numbers of the case."""
    with pytest.raises(ValueError, match=words):
        declare()


# ------------------------------------------------------------------------------------------------- whose it is


USES: dict[str, Callable[[FakeKernel, int], object]] = {
    "open": lambda kernel, _fd: kernel.open("/dev/null", os.O_RDONLY),
    "ioctl": lambda kernel, fd: kernel.ioctl(fd, ioctls.VFIO_GET_API_VERSION),
    "pread": lambda kernel, fd: kernel.pread(fd, 4, 0),
    "bind": lambda kernel, _fd: kernel.bind(BDF, None),
    "sysfs": lambda kernel, _fd: kernel.sysfs,
    "dev": lambda kernel, _fd: kernel.dev,
    "limit": lambda kernel, _fd: setattr(kernel, "memlock_limit", 1),
    "interrupt": lambda kernel, _fd: kernel.interrupt(BDF),
    "dma": lambda kernel, _fd: kernel.dma_read(BDF, 0, 1),
}


@pytest.mark.parametrize("use", USES)
def test_a_kernel_that_was_shut_down_says_so(use: str) -> None:
    """To whoever uses it, but for closing and for memory."""
    kernel = FakeKernel()
    container, _group = attach(kernel)
    kernel.shutdown()
    with pytest.raises(RuntimeError, match="was shut down"):
        USES[use](kernel, container)
    kernel.close(container)
    kernel.munmap(kernel.mmap(0, PAGE, BOTH, PRIVATE), PAGE)


@pytest.mark.parametrize("use", [*USES, "memlock"])
def test_a_parents_kernel_says_so_in_a_child(kernel: FakeKernel, use: str) -> None:
    """Its state is the parent's, and what it did here would be lost."""
    container, _group = attach(kernel)

    def child() -> bool:
        with pytest.raises(RuntimeError, match="child"):
            (USES | {"memlock": lambda kernel, _fd: kernel.memlock()})[use](kernel, container)
        return True

    assert in_child(child)
