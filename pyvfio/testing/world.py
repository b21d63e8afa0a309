"""Where a test with a device runs, and what it must see and arrange there that no system call of pyvfio's is for.

A test that takes its kernel, its device and what else it needs from a `World` runs on the fake kernel, in a virtual
machine and on hardware from the same file.
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
    """What a world is."""

    FAKE = "fake"
    VM = "vm"
    HARDWARE = "hardware"


class FaultLog(Protocol):
    """What has been said of stopped DMA since the watch began."""

    def lines(self, *, timeout: float) -> list[str]:
        """A line for each that was told; waits for the first as long as the log says anything within `timeout`
        seconds. One line may stand for several faults, for kernels limit their rate."""
        ...


class World(Protocol):
    """A kernel with devices.

    `name` says which world it is, `release` which kernel, `bdfs` the devices to be used; hand `kernel` to whatever
    opens something. `logs_faults`: whether the IOMMU reports what it stops.

    Synchronization: none; limits are the process's or the machine's.
    """

    @property
    def name(self) -> WorldName:
        """Fake, virtual machine or hardware."""
        ...

    @property
    def release(self) -> str:
        """The kernel's, as uname -r prints it."""
        ...

    @property
    def kernel(self) -> Kernel:
        """For `kernel=`."""
        ...

    @property
    def bdfs(self) -> tuple[str, ...]:
        """The devices' PCI addresses; bound to vfio-pci."""
        ...

    @property
    def logs_faults(self) -> bool:
        """Whether `watch_faults` sees anything."""
        ...

    def locked_bytes(self) -> int:
        """How many bytes this process has locked: each mapping for a device counts."""
        ...

    def watch_faults(self) -> AbstractContextManager[FaultLog]:
        """See what is stopped from now on. Where the log cannot be read, there is nothing in it."""
        ...

    def memlock_limit(self, limit: int) -> AbstractContextManager[None]:
        """This process may lock `limit` bytes in all, and has no privilege to exceed it; OSError where that cannot be
        arranged."""
        ...

    def dma_entry_limit(self, limit: int) -> AbstractContextManager[None]:
        """Containers that are opened meanwhile hold at most `limit` mappings; OSError. Changes the machine."""
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
        """The fake's own count, which is 0 when nothing is mapped."""
        return self.kernel.memlock().used

    @contextmanager
    def watch_faults(self) -> Iterator[FaultLog]:
        """`FakeKernel.faults`, from here on."""
        yield _Recorded(self.kernel)

    @contextmanager
    def memlock_limit(self, limit: int) -> Iterator[None]:
        """`FakeKernel.memlock_limit`; no setting of the process is changed."""
        former = (self.kernel.memlock_limit, self.kernel.privileged)
        self.kernel.memlock_limit, self.kernel.privileged = limit, False
        try:
            yield
        finally:
            self.kernel.memlock_limit, self.kernel.privileged = former

    @contextmanager
    def dma_entry_limit(self, limit: int) -> Iterator[None]:
        """`FakeKernel.dma_entry_limit`."""
        former, self.kernel.dma_entry_limit = self.kernel.dma_entry_limit, limit
        try:
            yield
        finally:
            self.kernel.dma_entry_limit = former


class _Recorded:
    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self._start = len(kernel.faults)

    def lines(self, *, timeout: float) -> list[str]:  # noqa: ARG002 (nothing comes later)
        return [str(fault) for fault in self._kernel.faults[self._start :]]


# ------------------------------------------------------------------------------------------------------ real kernels


class LinuxWorld:
    """The running kernel, with devices that are bound to a VFIO driver."""

    def __init__(self, bdfs: Sequence[str], *, name: WorldName = WorldName.HARDWARE) -> None:
        self.name = name
        self.kernel = LinuxKernel()
        self.release = os.uname().release
        self.bdfs = tuple(bdfs)

    @property
    def logs_faults(self) -> bool:
        """QEMU's amd-iommu reports nothing: `amdvi_page_walk` returns without an event where there is no entry, and
        checks the rights of all levels but the last."""
        emulated = "hypervisor" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
        return not (emulated and any((self.kernel.sysfs / "class/iommu").glob("ivhd*")))

    def locked_bytes(self) -> int:
        """VmLck."""
        return self.kernel.memlock().used

    @contextmanager
    def watch_faults(self) -> Iterator[FaultLog]:
        """/dev/kmsg."""
        try:
            log = Path("/dev/kmsg").open("rb", buffering=0)  # noqa: SIM115
        except OSError:
            yield _Unreadable()
            return
        with log:
            os.set_blocking(log.fileno(), False)
            log.seek(0, os.SEEK_END)
            yield _KernelLog(self.kernel, log.fileno())

    @contextmanager
    def memlock_limit(self, limit: int) -> Iterator[None]:
        """For this thread: RLIMIT_MEMLOCK is set, and CAP_IPC_LOCK, which lifts it, is laid down."""
        with _memlock_limit(limit):
            yield

    @contextmanager
    def dma_entry_limit(self, limit: int) -> Iterator[None]:
        """The parameter of the module vfio_iommu_type1."""
        with dma_entry_limit(limit):
            yield


class _Unreadable:
    def lines(self, *, timeout: float) -> list[str]:  # noqa: ARG002 (nothing ever comes)
        return []


class _KernelLog:
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
                # A record that was overwritten before it was read is EPIPE, and the next read goes on behind it.
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
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, former[1]))
    capset(effective & ~(1 << _CAP_IPC_LOCK))
    try:
        yield
    finally:
        capset(effective)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, former)


@contextmanager
def dma_entry_limit(limit: int) -> Iterator[None]:
    """Containers of the running kernel that are opened meanwhile hold at most `limit` mappings. OSError."""
    parameter = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    former = parameter.read_text(encoding="ascii")
    parameter.write_text(str(limit), encoding="ascii")
    try:
        yield
    finally:
        parameter.write_text(former, encoding="ascii")
