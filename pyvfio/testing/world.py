"""The place where a test with a device runs: kernel, devices, limits, and the log of faults.

A test that takes all of these from a `World` runs from one file on the fake kernel, in a virtual machine and on
hardware.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.testing.fake import FakeKernel

_FAULT = re.compile(r"DMAR:.*fault addr.*|AMD-Vi:.*IO_PAGE_FAULT.*|virtio_iommu.*page fault.*")
_CAP_IPC_LOCK = 14


class WorldName(StrEnum):
    """The three kinds of world."""

    FAKE = "fake"
    VM = "vm"
    HARDWARE = "hardware"


class FaultLog(Protocol):
    """The reports of stopped DMA since the watch began."""

    @property
    def unreadable(self) -> str:
        """The reason why the log cannot be read; empty if it can."""
        ...

    def lines(self, *, timeout: float) -> list[str]:
        """Return a line for each report. Wait for the first one while the log gets any line within `timeout` seconds.

        One line may stand for several faults: kernels limit the rate of reports.
        """
        ...


class World(Protocol):
    """A kernel with devices.

    `name` is the kind of world, `release` the kernel, `bdfs` the devices for the test. Pass `kernel` to each call that
    opens an object. `logs_faults`: whether the IOMMU reports the DMA that the IOMMU stops.

    Synchronization: none. Limits hold for the process or the machine.
    """

    @property
    def name(self) -> WorldName:
        """Fake, virtual machine or hardware."""
        ...

    @property
    def release(self) -> str:
        """The release of the kernel, as uname -r prints it."""
        ...

    @property
    def kernel(self) -> Kernel:
        """The argument for `kernel=`."""
        ...

    @property
    def bdfs(self) -> tuple[str, ...]:
        """The PCI addresses of the devices, which are bound to vfio-pci."""
        ...

    @property
    def logs_faults(self) -> bool:
        """Whether the IOMMU reports faults, so that `watch_faults` sees them."""
        ...

    def locked_bytes(self) -> int:
        """Return how many bytes this process has locked or pinned. Each mapping for a device counts.

        type1 counts in VmLck, and iommufd in VmPin; with IOMMU_OPTION_RLIMIT_MODE, iommufd counts in both.
        """
        ...

    def watch_faults(self) -> AbstractContextManager[FaultLog]:
        """Collect the reports of stopped DMA from now on. If the log cannot be read, `FaultLog.unreadable` says why."""
        ...

    def memlock_limit(self, limit: int) -> AbstractContextManager[None]:
        """Let this process lock `limit` bytes at most, without a privilege that lifts the limit. Raises OSError."""
        ...

    def dma_entry_limit(self, limit: int) -> AbstractContextManager[None]:
        """Let containers that are opened meanwhile hold `limit` mappings at most. Changes the machine. Raises
        OSError."""
        ...


# ------------------------------------------------------------------------------------------------------------- fake


class FakeWorld:
    """The devices of a FakeKernel."""

    name = WorldName.FAKE
    logs_faults = True

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.release = kernel.version.name
        self.bdfs = kernel.bdfs

    def locked_bytes(self) -> int:
        """Return the counts of the fake, which are 0 while nothing is mapped."""
        return self.kernel.memlock().used + self.kernel.pinned

    @contextmanager
    def watch_faults(self) -> Iterator[FaultLog]:
        """Collect `FakeKernel.faults` from now on."""
        yield _Recorded(self.kernel)

    @contextmanager
    def memlock_limit(self, limit: int) -> Iterator[None]:
        """Set `FakeKernel.memlock_limit`. No setting of the process changes."""
        former = (self.kernel.memlock_limit, self.kernel.privileged)
        self.kernel.memlock_limit, self.kernel.privileged = limit, False
        try:
            yield
        finally:
            self.kernel.memlock_limit, self.kernel.privileged = former

    @contextmanager
    def dma_entry_limit(self, limit: int) -> Iterator[None]:
        """Set `FakeKernel.dma_entry_limit`."""
        former, self.kernel.dma_entry_limit = self.kernel.dma_entry_limit, limit
        try:
            yield
        finally:
            self.kernel.dma_entry_limit = former


class _Recorded:
    unreadable = ""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._start = len(kernel.faults)

    def lines(self, *, timeout: float) -> list[str]:  # noqa: ARG002 (nothing comes later)
        return [str(fault) for fault in self._kernel.faults[self._start :]]


# ------------------------------------------------------------------------------------------------------ real kernels


class LinuxWorld:
    """The running kernel, with devices that are bound to a VFIO driver."""

    def __init__(
        self, bdfs: Sequence[str], *, name: WorldName = WorldName.HARDWARE, kernel: LinuxKernel | None = None
    ) -> None:
        self.name = name
        self.kernel = kernel or LinuxKernel()
        self.release = os.uname().release
        self.bdfs = tuple(bdfs)

    @property
    def logs_faults(self) -> bool:
        """False for QEMU's amd-iommu. `amdvi_page_walk` returns without an event if there is no entry, and checks the
        rights of all levels but the last."""
        emulated = "hypervisor" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        return not (emulated and any((self.kernel.sysfs / "class/iommu").glob("ivhd*")))

    def locked_bytes(self) -> int:
        """Return VmLck and VmPin of /proc/self/status."""
        status = Path("/proc/self/status").read_bytes().split(b"\n")
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith((b"VmLck:", b"VmPin:")))

    @contextmanager
    def watch_faults(self) -> Iterator[FaultLog]:
        """Collect the lines of /dev/kmsg that report a fault."""
        try:
            log = Path("/dev/kmsg").open("rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            yield _Unreadable(
                f"/dev/kmsg cannot be read: {error.strerror}; root can read it, or sysctl "
                "kernel.dmesg_restrict=0 lets all users"
            )
            return
        with log:
            os.set_blocking(log.fileno(), False)
            log.seek(0, os.SEEK_END)
            yield _KernelLog(self.kernel, log.fileno())

    @contextmanager
    def memlock_limit(self, limit: int) -> Iterator[None]:
        """Set RLIMIT_MEMLOCK, and drop CAP_IPC_LOCK, which lifts the limit, in this thread."""
        with _memlock_limit(limit):
            yield

    @contextmanager
    def dma_entry_limit(self, limit: int) -> Iterator[None]:
        """Set the parameter of the module vfio_iommu_type1."""
        with dma_entry_limit(limit):
            yield


class _Unreadable:
    def __init__(self, why: str) -> None:
        self.unreadable = why

    def lines(self, *, timeout: float) -> list[str]:  # noqa: ARG002 (nothing ever comes)
        return []


class _KernelLog:
    unreadable = ""

    def __init__(self, kernel: Kernel, fd: int) -> None:
        self._kernel = kernel
        self._fd = fd
        self._found: list[str] = []

    def lines(self, *, timeout: float) -> list[str]:
        self._read()
        while not self._found and self._kernel.poll(self._fd, timeout):
            self._read()
        return list(self._found)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while True:
                # EPIPE: a record was overwritten before it was read. The next read returns the record behind.
                with suppress(BrokenPipeError):
                    record = os.read(self._fd, 8192).decode(errors="replace")
                    self._found += [match[0] for line in record.splitlines() if (match := _FAULT.search(line))]


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


@contextmanager
def _memlock_limit(limit: int) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(0x20080522, 0), (_Data * 2)()  # _LINUX_CAPABILITY_VERSION_3
    former = resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def capset(effective: int) -> None:
        data[0].effective = effective
        if libc.capset(ctypes.byref(header), data) != 0:
            raise OSError(ctypes.get_errno(), "capset")

    if libc.capget(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    effective = int(data[0].effective)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, _raised(former[1], limit)))
    capset(effective & ~(1 << _CAP_IPC_LOCK))
    try:
        yield
    finally:
        capset(effective)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, former)


def _raised(hard: int, limit: int) -> int:
    """Return the hard limit for a soft `limit`: the former one where that is high enough."""
    return hard if hard == resource.RLIM_INFINITY else max(hard, limit)


@contextmanager
def dma_entry_limit(limit: int) -> Iterator[None]:
    """Let containers of the running kernel that are opened meanwhile hold `limit` mappings at most. Raises OSError."""
    parameter = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    former = parameter.read_text(encoding="ascii")
    parameter.write_text(str(limit), encoding="ascii")
    try:
        yield
    finally:
        parameter.write_text(former, encoding="ascii")
