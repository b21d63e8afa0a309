"""The fake kernel as a tool: what tests arrange with it and see through it. What it shares with a real kernel is said
in tests/contract."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import MAP_FIXED, MAP_FIXED_NOREPLACE, PROT_NONE, Kernel, LinuxKernel
from pyvfio.pci import boot
from pyvfio.testing.fake import Bar, DmaFault, FakeDevice, FakeKernel, IommuModel
from pyvfio.testing.fake.pins import ByIova, Mapped, VaddrIndex, Violation
from pyvfio.testing.fake.process import (
    Pagemap,
    can_be_pinned,
    device_areas,
    device_areas_by_text,
    file_areas,
    maps_allow,
    read_memory,
    write_memory,
)
from pyvfio.units import MIB, PAGE_SIZE, U64_MAX, Iova, IovaRange, Vaddr

if TYPE_CHECKING:
    from _typeshed import TraceFunction

BDF = "0000:00:02.0"
OTHER = "0000:00:03.0"
PRIVATE = 0x22
READ, WRITE, BOTH = 1, 2, 3
BASE = 0x10_0000
PAGE = PAGE_SIZE
MADV_DONTNEED, MADV_HUGEPAGE = 4, 14


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A fake as it is without arguments."""
    with FakeKernel() as fake:
        yield fake


def attach(kernel: Kernel, group: int = 2, container: int | None = None) -> tuple[int, int]:
    """A container with type1 v2 and a group in it; their descriptors."""
    fresh = container is None
    if container is None:
        container = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
    group_fd = kernel.open(str(kernel.dev / "vfio" / str(group)), os.O_RDWR)
    kernel.ioctl(group_fd, ioctls.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))
    if fresh:
        kernel.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU)
    return container, group_fd


def map_dma(kernel: Kernel, container: int, vaddr: int, *, iova: int = BASE, size: int = PAGE, flags: int = 3) -> None:
    """VFIO_IOMMU_MAP_DMA."""
    argument = ioctls.vfio_iommu_type1_dma_map(argsz=32, flags=flags, vaddr=vaddr, iova=iova, size=size)
    kernel.ioctl(container, ioctls.VFIO_IOMMU_MAP_DMA, argument)


def unmap_dma(kernel: Kernel, container: int, *, iova: int = BASE, size: int = PAGE) -> int:
    """VFIO_IOMMU_UNMAP_DMA; how many bytes."""
    argument = ioctls.vfio_iommu_type1_dma_unmap(argsz=24, iova=iova, size=size)
    kernel.ioctl(container, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
    return argument.size


def open_device(kernel: Kernel, group_fd: int, bdf: str = BDF) -> int:
    """VFIO_GROUP_GET_DEVICE_FD."""
    return kernel.ioctl(group_fd, ioctls.VFIO_GROUP_GET_DEVICE_FD, bytearray(bdf.encode() + b"\0"))


def descriptors() -> set[str]:
    """The numbers of all descriptors of this process."""
    # The listing has its own descriptor, which is closed by now.
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def spans(first: int, end: int) -> IovaRange:
    """A range of pages."""
    return IovaRange.of(iova=Iova(first * PAGE), size=(end - first) * PAGE)


# ------------------------------------------------------------------------------------------------- how it is set up


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda: FakeKernel("5.10"), "5.10.*6.1, 6.12, 7.3"),
        (lambda: FakeKernel(iommu="smmu"), "smmu.*intel"),
        (lambda: FakeKernel(groups=[(1, [FakeDevice(BDF)]), (2, [FakeDevice(BDF)])]), f"{BDF}.*1 and 2"),
        (lambda: FakeKernel(groups=[(1, [FakeDevice(BDF)]), (1, [FakeDevice(OTHER)])]), "group 1 is declared twice"),
        (lambda: FakeKernel(groups=[(1, [])]), "group 1 has no device"),
        (lambda: FakeKernel(groups=[(-1, [FakeDevice(BDF)])]), "from 0 on, not -1"),
        (lambda: FakeKernel(groups=[(1, [BDF])]), "group 1: str is neither"),  # type: ignore[list-item]
        (lambda: FakeKernel(groups=[FakeDevice(BDF)]), r"\(number, \[devices\]\)"),  # type: ignore[list-item]
        (lambda: FakeKernel(iommu=None), "IommuModel, not None"),  # type: ignore[arg-type]
        (lambda: IommuModel((spans(0, 2), spans(1, 3))), "0x0-0x1fff and 0x1000-0x2fff"),
        (lambda: IommuModel((IovaRange(Iova(0), Iova(9)),)), "begin and end at a page"),
        (lambda: IommuModel(()), "at least one range"),
        (lambda: IommuModel((spans(0, 2),), iova_pgsizes=0), "no page size"),
        (lambda: IommuModel((spans(0, 2),), dma_entry_limit=-1), "negative"),
        (lambda: FakeDevice(BDF, vendor=0x12345), f"{BDF}: 0x12345 is no vendor"),
        (lambda: FakeDevice(BDF, class_code=1 << 24), "no class"),
        (lambda: FakeDevice(BDF, bars={0: PAGE}), f"{BDF}: BAR 0"),  # type: ignore[dict-item]
        (lambda: FakeDevice(BDF, bars={0: Bar(1 << 41)}), f"{BDF}: BAR 0"),
        (lambda: FakeDevice(BDF, msix_bar=0), "no MSI-X vectors"),
        (lambda: FakeDevice("2.0"), "'2.0'"),
        (lambda: FakeDevice(BDF, bars={6: Bar(PAGE)}), "0 to 5"),
        (lambda: FakeDevice(BDF, msi=3), "not 3"),
        (lambda: FakeDevice(BDF, msix=4096), "2048"),
        (lambda: FakeDevice(BDF, msix=1, msix_bar=2), "BAR 2"),
        (lambda: Bar(3000), "power of two"),
        (lambda: Bar(PAGE, read=lambda _offset, _width: 0), "both"),
    ],
)
def test_what_cannot_be_is_a_value_error_that_says_which(arguments: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        arguments()


@pytest.mark.parametrize(
    ("name", "version", "last", "sizes"),
    [
        ("intel", "6.1", 0x7FFFFFFFFF, 0x40201000),
        ("intel48", "7.3", 0xFFFFFFFFFFFF, 0x40201000),
        ("amd", "6.1", U64_MAX, 0xFFFFFF7FFFFFF000),
        ("amd", "6.12", U64_MAX, 0xFFF7FFFFFF000),
        ("amd", "7.3", 0xFFFFFFFFFFFF, 0x7F7FFFFFF000),
        ("virtio", "6.12", U64_MAX, 0xFFFFFFFFFFFFF000),
    ],
)
def test_ready_made_iommus_are_as_in_the_laboratory(name: str, version: str, last: int, sizes: int) -> None:
    model = FakeKernel(version, iommu=name).iommu
    assert (model.ranges[-1].last, model.iova_pgsizes) == (last, sizes)
    assert model.dma_entry_limit == 65535


def test_page_sizes_below_a_page_are_reported_as_a_page() -> None:
    span = (IovaRange(Iova(0), Iova(U64_MAX)),)
    assert IommuModel(span, iova_pgsizes=0x200A00).reported_pgsizes == 0x200000 | PAGE


def test_the_last_page_of_all_can_be_mapped_and_unmapped_in_7_3() -> None:
    with FakeKernel("7.3", iommu="virtio") as kernel:
        container, _group = attach(kernel)
        last = U64_MAX - PAGE + 1
        map_dma(kernel, container, kernel.mmap(0, PAGE, BOTH, PRIVATE), iova=last)
        assert kernel.dma_read(BDF, last, PAGE) == bytes(PAGE)
        assert unmap_dma(kernel, container, iova=last) == PAGE


# ----------------------------------------------------------------------------------------------------- sysfs and dev


def test_sysfs_leads_from_a_device_to_its_group_and_driver_and_back(kernel: FakeKernel) -> None:
    home = kernel.sysfs / "bus/pci/devices" / BDF
    assert (home / "iommu_group").resolve() == kernel.sysfs / "kernel/iommu_groups/2"
    assert (home / "driver").resolve().name == "vfio-pci"
    assert (kernel.sysfs / "bus/pci/drivers/vfio-pci" / BDF).resolve() == home.resolve()
    assert (kernel.sysfs / "kernel/iommu_groups/2/devices" / BDF).resolve() == home.resolve()
    assert (home / "vendor").read_text() == "0x1234\n"
    assert (home / "class").read_text() == "0x00ff00\n"
    assert sorted(node.name for node in (kernel.dev / "vfio").iterdir()) == ["2", "3", "vfio"]


def test_a_group_has_a_node_while_one_of_its_devices_is_bound_to_vfio(kernel: FakeKernel) -> None:
    for driver, exists in (("edu", False), (None, False), ("vfio-pci", True), ("mlx5_vfio_pci", True), ("edu", False)):
        kernel.bind(BDF, driver)
        assert (kernel.dev / "vfio/2").exists() == exists
    assert (kernel.sysfs / "bus/pci/drivers/edu" / BDF).exists()
    assert not (kernel.sysfs / "bus/pci/drivers/vfio-pci" / BDF).exists()


def test_the_directories_are_made_when_asked_for_and_gone_after_shutdown(tmp_path: Path) -> None:
    with FakeKernel() as kernel:
        root = kernel.dev
        assert root.is_dir()
    assert not root.exists()
    kernel.shutdown()


def test_a_kernel_that_is_forgotten_takes_its_directories_and_descriptors_with_it() -> None:
    before = descriptors()
    kernel = FakeKernel()
    attach(kernel)
    root = kernel.dev
    del kernel
    gc.collect()
    assert not root.exists()
    assert descriptors() == before


# ---------------------------------------------------------------------------------------------------- descriptors


def test_descriptors_are_real_and_all_closed_by_shutdown() -> None:
    before = descriptors()
    with FakeKernel() as kernel:
        inside = descriptors()  # its own, by which it asks about memory
        container, group = attach(kernel)
        device = open_device(kernel, group)
        assert descriptors() - inside == {str(container), str(group), str(device)}
        assert kernel.descriptors == (container, group, device)
        assert os.readlink(f"/proc/self/fd/{group}") == str(kernel.dev / "vfio/2")
    assert descriptors() == before


def test_an_ioctl_that_slips_past_the_seam_is_enotty(kernel: FakeKernel) -> None:
    container, group = attach(kernel)
    for fd in (container, group, open_device(kernel, group)):
        with pytest.raises(OSError, match="Inappropriate"):
            LinuxKernel().ioctl(fd, ioctls.VFIO_GET_API_VERSION)


def test_other_files_are_the_running_kernels(kernel: FakeKernel, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    fd = kernel.open(str(tmp_path / "file"), os.O_RDONLY)
    assert kernel.pread(fd, 4, 0) == b"data"
    with pytest.raises(OSError, match="Inappropriate"):
        kernel.ioctl(fd, ioctls.VFIO_GET_API_VERSION)
    kernel.close(fd)


@pytest.mark.parametrize(
    ("version", "named"),
    [("6.1", "Linux 6.1.0, built without CONFIG_IOMMUFD,"), ("6.12", "Linux 6.12.0, built without CONFIG_IOMMUFD,")],
)
def test_an_error_names_the_kernel_that_the_fake_models(version: str, named: str) -> None:
    """Not the running kernel, which a reader of the error would otherwise look at."""
    with FakeKernel(version) as kernel:
        for use in (
            partial(pyvfio.open_device, BDF, iommu="iommufd", kernel=kernel),
            partial(pyvfio.Ioas, kernel=kernel),
        ):
            with pytest.raises(pyvfio.UnavailableError, match=re.escape(named)):
                use()


@pytest.mark.parametrize(
    ("version", "iommufd", "type1"),
    [("6.1", 0, 1), *((name, *way) for name in ("6.12", "7.3") for way in ((0, 1), (1, 1), (1, 0)))],
)
def test_the_build_options_of_a_fake_are_those_of_its_nodes(version: str, iommufd: int, type1: int) -> None:
    """Options that the version does not have are left out."""
    with FakeKernel(version, iommufd=bool(iommufd), type1=bool(type1)) as kernel:
        options = boot.build_options(kernel)
        assert boot.release(kernel) == f"{version}.0"
        assert (options.get("IOMMUFD") == "y") == (kernel.dev / "iommu").exists()
        assert (options["VFIO_IOMMU_TYPE1"] == "y") == (kernel.dev / "vfio/vfio").exists()
        assert ("IOMMUFD" in options, "VFIO_GROUP" in options) == (version != "6.1", version != "6.1")


def test_a_descriptor_closed_behind_the_seam_is_noticed_when_its_number_comes_again(kernel: FakeKernel) -> None:
    _container, group = attach(kernel)
    os.close(group)
    assert kernel.open(str(kernel.dev / "vfio/2"), os.O_RDWR) == group


def test_a_buffer_that_argsz_overstates_is_a_buffer_error(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    info = ioctls.vfio_iommu_type1_info(argsz=4096)
    with pytest.raises(BufferError, match="buffer of 24"):
        kernel.ioctl(container, ioctls.VFIO_IOMMU_GET_INFO, info)


# ---------------------------------------------------------------------------------------------------- failures, trace


def test_the_nth_matching_call_fails_once_and_has_no_effect(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
    kernel.fail(call="ioctl", request=ioctls.VFIO_IOMMU_MAP_DMA, nth=2, errno=errno.ENOMEM)
    map_dma(kernel, container, vaddr)
    with pytest.raises(OSError, match="allocate memory"):
        map_dma(kernel, container, vaddr, iova=0)
    map_dma(kernel, container, vaddr, iova=2 * BASE)
    assert [entry.iova for entry in kernel.mappings()] == [BASE, 2 * BASE]


def test_a_call_may_fail_after_it_took_effect(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EINTR, after=True)
    with pytest.raises(InterruptedError):
        map_dma(kernel, container, kernel.mmap(0, PAGE, BOTH, PRIVATE))
    assert len(kernel.mappings()) == 1


def test_a_name_tells_requests_with_the_same_number_apart(kernel: FakeKernel) -> None:
    container, group = attach(kernel)
    device = open_device(kernel, group)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO)
    with pytest.raises(OSError, match="Bad address"):
        kernel.ioctl(device, ioctls.VFIO_DEVICE_PCI_HOT_RESET)
    with pytest.raises(OSError, match="Input/output"):
        kernel.ioctl(container, ioctls.VFIO_IOMMU_MAP_DMA)


@pytest.mark.parametrize("call", ["mmap", "munmap", "mprotect", "madvise", "eventfd", "open", "memlock"])
def test_any_call_can_fail(kernel: FakeKernel, call: str) -> None:
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
    calls: dict[str, Callable[[], object]] = {
        "mmap": lambda: kernel.mmap(0, PAGE, BOTH, PRIVATE),
        "munmap": lambda: kernel.munmap(vaddr, PAGE),
        "mprotect": lambda: kernel.mprotect(vaddr, PAGE, READ),
        "madvise": lambda: kernel.madvise(vaddr, PAGE, MADV_DONTNEED),
        "eventfd": lambda: kernel.eventfd(0, 0),
        "open": lambda: kernel.open("/dev/null", os.O_RDWR),
        "memlock": kernel.memlock,
    }
    kernel.fail(call=call, errno=errno.EPERM)
    with pytest.raises(PermissionError):
        calls[call]()
    write_memory(vaddr, b"still there")
    assert (kernel.trace[-1].call, kernel.trace[-1].errno) == (call, errno.EPERM)


def test_failures_that_cannot_happen_are_value_errors_and_others_can_be_taken_back(kernel: FakeKernel) -> None:
    with pytest.raises(ValueError, match="fork"):
        kernel.fail(call="fork", errno=1)
    with pytest.raises(ValueError, match="not 0"):
        kernel.fail(call="mmap", errno=1, nth=0)
    with pytest.raises(ValueError, match="no request"):
        kernel.fail(call="mmap", errno=1, request=1)
    kernel.fail(call="mmap", errno=errno.ENOMEM)
    kernel.clear_failures()
    kernel.munmap(kernel.mmap(0, PAGE, BOTH, PRIVATE), PAGE)


def test_the_trace_has_each_call_with_its_arguments_by_name(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
    kernel.clear_trace()
    map_dma(kernel, container, vaddr)
    with pytest.raises(FileExistsError):
        map_dma(kernel, container, vaddr)
    unmap_dma(kernel, container)
    kernel.munmap(vaddr, PAGE)
    assert [(call.request or call.call, call.result, call.errno) for call in kernel.trace] == [
        ("VFIO_IOMMU_MAP_DMA", 0, 0),
        ("VFIO_IOMMU_MAP_DMA", None, errno.EEXIST),
        ("VFIO_IOMMU_UNMAP_DMA", 0, 0),
        ("munmap", None, 0),
    ]
    assert kernel.trace[0].arguments["iova"] == BASE
    assert kernel.trace[0].arguments["vaddr"] == vaddr
    assert str(kernel.trace[1]).endswith("-> File exists")


# ------------------------------------------------------------------------------------------------------- locked memory


def test_memlock_is_what_the_test_says_it_is(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 4 * PAGE, BOTH, PRIVATE)
    kernel.memlock_limit = 2 * PAGE
    map_dma(kernel, container, vaddr, size=2 * PAGE)
    answer = kernel.memlock()
    assert (answer.limit, answer.used, answer.privileged) == (2 * PAGE, 2 * PAGE, False)
    with pytest.raises(OSError, match="allocate memory"):
        map_dma(kernel, container, vaddr, iova=0)
    kernel.privileged = True
    map_dma(kernel, container, vaddr, iova=0)
    assert kernel.memlock().used == 3 * PAGE


# -------------------------------------------------------------------------------------------------- memory taken away


def test_memory_of_many_mappings_that_goes_is_said_in_a_few_words(kernel: FakeKernel) -> None:
    """The error names the first and counts the others; `violations` has each, and another look adds none."""
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 20 * PAGE, BOTH, PRIVATE)
    for page in range(20):
        map_dma(kernel, container, vaddr + page * PAGE, iova=BASE + page * PAGE)
    kernel.munmap(vaddr, 20 * PAGE)
    for _ in range(2):
        with pytest.raises(AssertionError, match="and 4 more in `violations`") as caught:
            kernel.check()
        assert str(caught.value).count("munmap took") == 16
        assert len(kernel.violations) == 20


@given(
    spans=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=8),
    asked=st.tuples(st.integers(0, 60), st.integers(1, 12)),
)
def test_what_is_known_to_have_gone_is_found_by_iova(spans: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    """As a look at each says."""
    known = ByIova([Violation("munmap", Iova(start), Vaddr(0), size) for start, size in spans])
    start, end = asked[0], asked[0] + asked[1]
    assert known.meet(start, end) == any(first < end and start < first + size for first, size in spans)


@pytest.mark.parametrize("call", ["munmap", "mprotect", "madvise", "mmap"])
def test_memory_that_goes_while_it_is_mapped_is_a_violation_with_both_addresses(kernel: FakeKernel, call: str) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 8 * PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr, size=8 * PAGE)
    part = vaddr + 2 * PAGE
    kernel.check()
    calls: dict[str, Callable[[], object]] = {
        "munmap": lambda: kernel.munmap(part, PAGE),
        "mprotect": lambda: kernel.mprotect(part, PAGE, PROT_NONE),
        "madvise": lambda: kernel.madvise(part, PAGE, MADV_DONTNEED),
        "mmap": lambda: kernel.mmap(part, PAGE, BOTH, PRIVATE | MAP_FIXED),
    }
    calls[call]()
    assert kernel.violations == [(call, BASE + 2 * PAGE, part, PAGE)]
    with pytest.raises(AssertionError, match=f"{call} took 0x1000 bytes at vaddr {part:#x}, mapped at IOVA 0x102000"):
        kernel.check()


def test_what_takes_nothing_away_is_no_violation(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 3 * PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr + PAGE)
    kernel.munmap(vaddr, PAGE)
    kernel.mprotect(vaddr + 2 * PAGE, PAGE, PROT_NONE)
    kernel.mprotect(vaddr + PAGE, PAGE, BOTH)
    kernel.madvise(vaddr + PAGE, PAGE, MADV_HUGEPAGE)
    with pytest.raises(FileExistsError):
        kernel.mmap(vaddr + PAGE, PAGE, BOTH, PRIVATE | MAP_FIXED_NOREPLACE)
    kernel.fail(call="munmap", errno=errno.ENOMEM)
    with pytest.raises(OSError, match="allocate"):
        kernel.munmap(vaddr + PAGE, PAGE)
    unmap_dma(kernel, container)
    kernel.munmap(vaddr + PAGE, 2 * PAGE)
    kernel.check()


def test_memory_that_two_mappings_reach_is_two_violations(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 4 * PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr, size=4 * PAGE)
    map_dma(kernel, container, vaddr + PAGE, iova=0)
    kernel.munmap(vaddr, 4 * PAGE)
    assert sorted(violation.iova for violation in kernel.violations) == [0, BASE]


def test_the_index_by_address_finds_what_a_search_through_all_finds() -> None:
    index, entries = VaddrIndex(), []
    for number in range(200):
        vaddr, size = number * 37 % 101 * PAGE, (number % 7 + 1) * PAGE << number % 4
        entries.append(Mapped(Iova(number * MIB), size, Vaddr(vaddr), 3))
        index.add(entries[-1])
    for gone in entries[::3]:
        index.remove(gone)
    left = [entry for entry in entries if entry not in entries[::3]]
    for start in range(0, 120 * PAGE, 3 * PAGE):
        end = start + 2 * PAGE
        expected = [entry for entry in left if entry.vaddr < end and start < entry.vaddr + entry.size]
        assert sorted(index.over(start, end)) == sorted(expected)


# ------------------------------------------------------------------------------------------------------------- DMA


def test_a_device_reads_and_writes_the_memory_that_is_mapped(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, 4 * PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr + 2 * PAGE, iova=BASE, size=PAGE)
    map_dma(kernel, container, vaddr, iova=BASE + PAGE, size=PAGE)
    kernel.dma_write(BDF, BASE + PAGE - 2, b"abcd")
    assert read_memory(vaddr + 3 * PAGE - 2, 2) + read_memory(vaddr, 2) == b"abcd"
    assert kernel.dma_read(BDF, BASE + PAGE - 2, 4) == b"abcd"
    assert kernel.mappings(BDF) == kernel.mappings()
    assert kernel.mappings(OTHER) == ()


def test_the_iommu_stops_a_device_at_the_first_byte_that_it_may_not_reach(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr)
    with pytest.raises(DmaFault, match=r"DMA write of 0000:00:02\.0 stopped at IOVA 0x101000"):
        kernel.dma_write(BDF, BASE + PAGE - 1, b"xyz")
    assert read_memory(vaddr + PAGE - 1, 1) == b"x"
    unmap_dma(kernel, container)
    with pytest.raises(DmaFault):
        kernel.dma_read(BDF, BASE, 1)
    assert [(fault.bdf, fault.iova, fault.write) for fault in kernel.faults] == [
        (BDF, BASE + PAGE, True),
        (BDF, BASE, False),
    ]


def test_a_device_of_a_group_that_is_not_attached_reaches_nothing(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    map_dma(kernel, container, kernel.mmap(0, PAGE, BOTH, PRIVATE))
    with pytest.raises(DmaFault):
        kernel.dma_read(OTHER, BASE, 1)
    attach(kernel, 3, container)
    assert kernel.dma_read(OTHER, BASE, 1) == b"\0"
    with pytest.raises(ValueError, match=r"no device 0000:00:09\.0"):
        kernel.dma_read("0000:00:09.0", BASE, 1)


@pytest.mark.parametrize(
    ("version", "iommu", "readable"),
    [("6.1", "intel", True), ("6.12", "intel", True), ("7.3", "intel", False), ("6.12", "virtio", False)],
)
def test_a_mapping_has_the_rights_it_was_given_and_intels_write_only_is_readable_up_to_6_12(
    version: str,
    iommu: str,
    readable: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    with FakeKernel(version, iommu=iommu) as kernel:
        container, _group = attach(kernel)
        vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
        map_dma(kernel, container, vaddr, flags=WRITE)
        map_dma(kernel, container, vaddr, iova=0, flags=READ)
        kernel.dma_write(BDF, BASE, b"x")
        assert kernel.dma_read(BDF, 0, 1) == b"x"
        with pytest.raises(DmaFault):
            kernel.dma_write(BDF, 0, b"y")
        if readable:
            assert kernel.dma_read(BDF, BASE, 1) == b"x"
            return
        with pytest.raises(DmaFault):
            kernel.dma_read(BDF, BASE, 1)


def test_dma_to_memory_that_is_gone_is_an_assertion_error(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
    map_dma(kernel, container, vaddr)
    kernel.munmap(vaddr, PAGE)
    with pytest.raises(AssertionError, match=f"{vaddr:#x}"):
        kernel.dma_write(BDF, BASE, b"x")


# ----------------------------------------------------------------------------------------------------------- devices


def test_callbacks_see_each_register_access_with_its_width() -> None:
    seen: list[tuple[int, ...]] = []

    def read(offset: int, width: int) -> int:
        seen.append((offset, width))
        return 0x1122334455667788

    bar = Bar(MIB, read=read, write=lambda *access: seen.append(access))
    for version, expected in (("6.1", [(2, 2), (4, 4), (8, 2)]), ("6.12", [(2, 2), (4, 4), (8, 2)])):
        with FakeKernel(version, groups=[(2, [FakeDevice(BDF, bars={0: bar})])]) as kernel:
            _container, group = attach(kernel)
            fd = open_device(kernel, group)
            window = kernel.registers(fd, PAGE, PAGE)
            window.write(8, 4, 7)
            assert window.read(16, 8) == 0x1122334455667788
            window.close()
            assert seen == [(PAGE + 8, 4, 7), (PAGE + 16, 8)]
            seen.clear()
            assert kernel.pread(fd, 8, 2) == bytes.fromhex("8877 88776655 8877")
            assert kernel.pwrite(fd, b"\1\2\3\4", 2) == 4
            assert seen == [*expected, (2, 2, 0x0201), (4, 2, 0x0403)]
            seen.clear()


def test_eight_bytes_are_one_access_from_6_10_on_and_two_before() -> None:
    seen: list[tuple[int, ...]] = []
    bar = Bar(MIB, read=lambda _offset, _width: 0, write=lambda *access: seen.append(access))
    for version, expected in (("6.1", [(8, 4, 1), (12, 4, 2)]), ("6.12", [(8, 8, 2 << 32 | 1)])):
        with FakeKernel(version, groups=[(2, [FakeDevice(BDF, bars={0: bar})])]) as kernel:
            _container, group = attach(kernel)
            kernel.pwrite(open_device(kernel, group), struct.pack("<II", 1, 2), 8)
            assert seen == expected
            seen.clear()


def test_an_interrupt_of_the_device_signals_and_intx_masks_itself(kernel: FakeKernel) -> None:
    _container, group = attach(kernel)
    fd = open_device(kernel, group)
    event = kernel.eventfd(0, os.EFD_NONBLOCK)
    connect = ioctls.irq_set_eventfds(flags=4 | 32, index=0, start=0, eventfds=[event])
    kernel.ioctl(fd, ioctls.VFIO_DEVICE_SET_IRQS, connect)
    for _ in range(3):
        kernel.interrupt(BDF)
    assert kernel.eventfd_read(event) == 1
    unmask = ioctls.vfio_irq_set(argsz=20, flags=1 | 16, index=0, start=0, count=1)
    kernel.ioctl(fd, ioctls.VFIO_DEVICE_SET_IRQS, unmask)
    assert kernel.poll(event, 0)
    assert kernel.eventfd_read(event) == 1
    kernel.close(fd)
    kernel.interrupt(BDF)
    assert not kernel.poll(event, 0)
    kernel.close(event)


def set_intx(kernel: FakeKernel, fd: int, flags: int, *eventfds: int) -> None:
    """VFIO_DEVICE_SET_IRQS on INTx."""
    if eventfds:
        argument = ioctls.irq_set_eventfds(flags=flags, index=0, start=0, eventfds=eventfds)
        kernel.ioctl(fd, ioctls.VFIO_DEVICE_SET_IRQS, argument)
    else:
        argument = ioctls.vfio_irq_set(argsz=20, flags=flags | 1, index=0, start=0, count=1)
        kernel.ioctl(fd, ioctls.VFIO_DEVICE_SET_IRQS, argument)


@pytest.mark.parametrize("version", ["6.1", "6.12", "7.3"])
def test_a_refused_eventfd_leaves_intx_and_its_trigger_as_they_were(version: str) -> None:
    with FakeKernel(version) as kernel:
        fd = open_device(kernel, attach(kernel)[1])
        event = kernel.eventfd(0, os.EFD_NONBLOCK)
        set_intx(kernel, fd, 4 | 32, event)
        for number, words in ((1000, "Bad file"), (fd, "Invalid")):
            with pytest.raises(OSError, match=words):
                set_intx(kernel, fd, 4 | 32, number)
        kernel.interrupt(BDF)
        assert kernel.eventfd_read(event) == 1
        kernel.close(event)


def test_intx_is_masked_by_the_bit_in_command_that_disables_it(kernel: FakeKernel) -> None:
    fd, config = open_device(kernel, attach(kernel)[1]), 7 << 40
    event = kernel.eventfd(0, os.EFD_NONBLOCK)
    set_intx(kernel, fd, 4 | 32, event)
    kernel.pwrite(fd, struct.pack("<H", 0x402), config + 4)
    kernel.interrupt(BDF)
    set_intx(kernel, fd, 16)
    set_intx(kernel, fd, 32)
    assert not kernel.poll(event, 0)
    kernel.pwrite(fd, struct.pack("<H", 2), config + 4)
    assert kernel.eventfd_read(event) == 1
    kernel.close(event)


def test_intx_that_is_enabled_while_it_is_disabled_in_command_is_masked(kernel: FakeKernel) -> None:
    fd, config = open_device(kernel, attach(kernel)[1]), 7 << 40
    event = kernel.eventfd(0, os.EFD_NONBLOCK)
    kernel.pwrite(fd, struct.pack("<H", 0x402), config + 4)
    set_intx(kernel, fd, 4 | 32, event)
    kernel.interrupt(BDF)
    assert not kernel.poll(event, 0)
    kernel.close(event)


def test_bars_tell_their_size_and_kind_and_command_has_no_bits_but_its_own() -> None:
    device = FakeDevice(BDF, bars={0: Bar(MIB), 2: Bar(256, io=True), 3: Bar(1 << 40)})
    with FakeKernel(groups=[(2, [device])]) as kernel:
        fd, config = open_device(kernel, attach(kernel)[1]), 7 << 40
        assert struct.unpack("<6I", kernel.pread(fd, 24, config + 0x10)) == (0, 0, 1, 0, 0, 0)
        kernel.pwrite(fd, b"\xff" * 24, config + 0x10)
        assert struct.unpack("<6I", kernel.pread(fd, 24, config + 0x10)) == (0xFFF00000, 0, 0xFFFFFF01, 0, 0, 0)
        kernel.pwrite(fd, b"\xff\xff", config + 4)
        assert kernel.pread(fd, 2, config + 4) == struct.pack("<H", 0x77F)


def test_no_bytes_are_read_and_written_anywhere(kernel: FakeKernel) -> None:
    fd = open_device(kernel, attach(kernel)[1])
    for offset in (0, 8 << 40, 60 << 40):
        assert kernel.pread(fd, 0, offset) == b""
        assert kernel.pwrite(fd, b"", offset) == 0


def test_a_bar_without_callbacks_mapped_raw_is_the_memory_that_pread_reads() -> None:
    with FakeKernel(groups=[(2, [FakeDevice(BDF)])]) as kernel:
        _container, group = attach(kernel)
        fd = open_device(kernel, group)
        vaddr = kernel.mmap(0, PAGE, BOTH, 1, fd=fd, offset=PAGE)
        write_memory(vaddr, b"abc")
        assert kernel.pread(fd, 3, PAGE) == b"abc"
        kernel.munmap(vaddr, PAGE)


# ----------------------------------------------------------------------------------------------- this process's memory


def test_a_bad_address_is_efault_and_never_the_end_of_the_process() -> None:
    for vaddr in (0, 1, 1 << 46, 1 << 62, U64_MAX):
        with pytest.raises(OSError, match="Bad address"):
            read_memory(vaddr, 8)
        with pytest.raises(OSError, match="Bad address"):
            write_memory(vaddr, b"x")


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("protection", [PROT_NONE, READ, WRITE, BOTH])
@pytest.mark.parametrize("hole", [True, False])
def test_kernels_before_5_14_would_be_asked_in_a_way_that_agrees(
    kernel: FakeKernel, *, write: bool, protection: int, hole: bool
) -> None:
    vaddr = kernel.mmap(0, 3 * PAGE, BOTH, PRIVATE)
    kernel.mprotect(vaddr + PAGE, PAGE, protection)
    if hole:
        kernel.munmap(vaddr + 2 * PAGE, PAGE)
    assert maps_allow(vaddr, 3 * PAGE, write=write) == can_be_pinned(vaddr, 3 * PAGE, write=write)
    assert maps_allow(vaddr, PAGE, write=write)


def test_kernels_before_6_11_would_be_asked_for_mapped_bars_in_a_way_that_agrees() -> None:
    with FakeKernel(groups=[(2, [FakeDevice(BDF, bars={0: Bar(4 * PAGE)})])]) as kernel:
        device = open_device(kernel, attach(kernel)[1])
        bar = kernel.mmap(0, 3 * PAGE, BOTH, 1, fd=device, offset=PAGE)
        kernel.munmap(bar + PAGE, PAGE)
        for vaddr, size in ((bar, PAGE), (bar - PAGE, 5 * PAGE), (bar + PAGE, PAGE), (bar + 2 * PAGE, 8 * PAGE)):
            assert list(device_areas(vaddr, size)) == list(device_areas_by_text(vaddr, size))
        assert list(device_areas(bar, 3 * PAGE)) == [(0, PAGE, BDF, PAGE), (2 * PAGE, PAGE, BDF, 3 * PAGE)]


@pytest.mark.parametrize("ranges", [1, 100])
def test_mappings_of_a_file_are_found_however_many_ranges_devices_reach(ranges: int) -> None:
    linux = LinuxKernel()
    fd = linux.memfd_create("", 0)
    linux.ftruncate(fd, 8 * PAGE)
    shared = linux.mmap(0, 4 * PAGE, BOTH, 1, fd=fd, offset=2 * PAGE)
    private = linux.mmap(0, 4 * PAGE, BOTH, 2, fd=fd, offset=0)
    both = [(shared, shared + PAGE), (private + PAGE, private + 2 * PAGE)] * ranges
    found = [(shared + PAGE, 2 * PAGE), (private + 3 * PAGE, PAGE)]
    assert sorted(file_areas(fd, 3 * PAGE, 5 * PAGE, both)) == sorted(found)
    for vaddr in (shared, private):
        linux.munmap(vaddr, 4 * PAGE)
    linux.close(fd)


# ------------------------------------------------------------------------------------------------- processes, threads


def in_child(body: Callable[[], bool]) -> bool:
    """Whether `body` is true in a forked child."""
    pid = os.fork()
    if not pid:
        answer = False
        try:
            answer = body()
        finally:
            os._exit(0 if answer else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_child_closes_its_own_descriptors_and_changes_nothing_else(kernel: FakeKernel) -> None:
    container, group = attach(kernel)
    map_dma(kernel, container, kernel.mmap(0, PAGE, BOTH, PRIVATE))

    def child() -> bool:
        kernel.close(group)
        kernel.shutdown()
        kernel.munmap(kernel.mmap(0, PAGE, BOTH, PRIVATE), PAGE)
        return os.path.exists(f"/proc/self/fd/{container}") and not os.path.exists(f"/proc/self/fd/{group}")

    assert in_child(child)
    assert kernel.dev.exists()
    assert unmap_dma(kernel, container) == PAGE


@pytest.mark.parametrize("kept", ["device", "kernel", "both", "neither"])
def test_a_program_that_closes_nothing_ends_quietly(kept: str) -> None:
    """Whichever of the two goes first, at the end of the interpreter or before."""
    program = """
        import pyvfio
        from pyvfio import ioctls
        from pyvfio.testing import FakeKernel
        kernel = FakeKernel()
        device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
        mapper = pyvfio.DmaMapper(device.container, pyvfio.RamBlockList(kernel=kernel))
        """
    ends = {"device": "del kernel, mapper", "kernel": "del device, mapper", "both": "", "neither": "del kernel, device"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program) + ends[kept]], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_object_with_two_descriptors_is_released_once_in_the_end() -> None:
    """By the second time, the number of a file that the object had open could be the number of another file."""
    program = """
        import pyvfio
        from pyvfio.testing import FakeKernel
        kernel = FakeKernel(iommufd=True)
        device = pyvfio.open_device("0000:00:02.0", iommu="iommufd", kernel=kernel)
        kernel.dup(device.fd)
        """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_finalizers_do_nothing_in_a_child(kernel: FakeKernel) -> None:
    attach(kernel)
    root = kernel.dev

    def child() -> bool:
        kernel._finalizer()
        assert kernel._tree is not None
        kernel._tree._finalizer()
        return root.exists() and all(os.path.exists(f"/proc/self/fd/{fd}") for fd in kernel.descriptors)

    assert in_child(child)


def test_an_ioctl_in_a_child_says_what_is_wrong(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)

    def child() -> bool:
        with pytest.raises(RuntimeError, match="child"):
            kernel.ioctl(container, ioctls.VFIO_GET_API_VERSION)
        return True

    assert in_child(child)


def test_threads_map_and_unmap_at_once(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)
    failures: list[BaseException] = []

    def work(iova: int) -> None:
        try:
            for _ in range(200):
                map_dma(kernel, container, vaddr, iova=iova)
                assert unmap_dma(kernel, container, iova=iova) == PAGE
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number * PAGE,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert kernel.mappings() == ()
    assert kernel.memlock().used == 0


def test_a_map_takes_as_many_steps_among_20000_as_alone(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    vaddr = kernel.mmap(0, PAGE, BOTH, PRIVATE)

    def steps() -> int:
        lines = 0

        def count(_frame: FrameType, event: str, _argument: object) -> TraceFunction | None:
            nonlocal lines
            lines += event == "line"
            return count

        sys.settrace(count)
        try:
            map_dma(kernel, container, vaddr, iova=0)
            unmap_dma(kernel, container, iova=0)
        finally:
            sys.settrace(None)
        return lines

    alone = steps()
    for number in range(20_000):
        map_dma(kernel, container, vaddr, iova=BASE + number * PAGE)
    assert steps() <= alone + 20


def test_pages_that_were_only_read_are_the_page_of_zeros_whichever_way_one_asks() -> None:
    linux, pagemap = LinuxKernel(), Pagemap()
    vaddr = linux.mmap(0, 200 * PAGE, BOTH, PRIVATE)
    try:
        assert can_be_pinned(vaddr, 200 * PAGE, write=False)
        for page in range(0, 200, 2):
            write_memory(vaddr + page * PAGE, b"x")
        assert pagemap.zero_pages(vaddr, 200 * PAGE) == pagemap.zero_pages_by_flags(vaddr, 200 * PAGE) == 100
        assert pagemap.zero_pages(vaddr, PAGE) == pagemap.zero_pages_by_flags(vaddr, PAGE) == 0
        assert pagemap.zero_pages(vaddr + PAGE, PAGE) == pagemap.zero_pages_by_flags(vaddr + PAGE, PAGE) == 1
    finally:
        pagemap.close()
        linux.munmap(vaddr, 200 * PAGE)


def test_pages_of_a_file_are_not_the_page_of_zeros() -> None:
    linux, pagemap = LinuxKernel(), Pagemap()
    vaddr = linux.mmap(0, 4 * PAGE, BOTH, 0x21)
    try:
        assert can_be_pinned(vaddr, 4 * PAGE, write=False)
        assert pagemap.zero_pages(vaddr, 4 * PAGE) == pagemap.zero_pages_by_flags(vaddr, 4 * PAGE) == 0
    finally:
        pagemap.close()
        linux.munmap(vaddr, 4 * PAGE)


def test_an_iommu_that_nests_takes_type_6_where_the_kernel_has_it() -> None:
    model = IommuModel((IovaRange(Iova(0), Iova(U64_MAX)),), nests=True)
    for version, number in (("6.1", 0), ("6.12", 0), ("7.3", errno.ENODEV)):
        with FakeKernel(version, iommu=model) as kernel:
            container = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
            group = kernel.open(str(kernel.dev / "vfio/2"), os.O_RDWR)
            kernel.ioctl(group, ioctls.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))
            with pytest.raises(OSError, match="No such device") if number else contextlib.nullcontext():
                kernel.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1_NESTING_IOMMU)


def test_a_device_reaches_the_new_vaddr_of_a_mapping_and_its_memory_is_watched_there(kernel: FakeKernel) -> None:
    container, _group = attach(kernel)
    old, new = (kernel.mmap(0, PAGE, BOTH, PRIVATE) for _ in range(2))
    map_dma(kernel, container, old)
    argument = ioctls.vfio_iommu_type1_dma_unmap(argsz=24, flags=4, iova=BASE, size=PAGE)
    kernel.ioctl(container, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
    map_dma(kernel, container, new, flags=4)
    kernel.dma_write(BDF, BASE, b"new")
    assert read_memory(new, 3) == b"new"
    kernel.munmap(old, PAGE)
    assert kernel.violations == []
    kernel.munmap(new, PAGE)
    assert [violation.vaddr for violation in kernel.violations] == [new]


def test_what_hangs_on_a_descriptor_stays_until_the_last_duplicate_is_closed(kernel: FakeKernel) -> None:
    """A group is busy, and a device has its interrupts, whichever of the two is closed first."""
    bdf = kernel.bdfs[0]
    with pyvfio.Container(kernel=kernel) as container, pyvfio.open_device(bdf, container=container) as device:
        irq, number = device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX), device.group.number
        irq.enable(1)
        for fd in [kernel.dup(fd) for fd in (container.fd, device.group.fd, device.fd)]:
            kernel.close(fd)
            kernel.check()
        kernel.interrupt(bdf)
        assert irq.wait(timeout=0) == 1
        copies = [kernel.dup(fd) for fd in (device.group.fd, device.fd)]
        for handle in (device.group, device):
            handle.close_fd()
            kernel.check()
        for fd in copies:
            with pytest.raises(pyvfio.GroupBusyError):
                pyvfio.Group(number, kernel=kernel)
            kernel.close(fd)
            kernel.check()
        pyvfio.Group(number, kernel=kernel).close()
