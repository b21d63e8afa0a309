"""The kernels that sequences are played on: the fake, and the running kernel of a machine without other users.

A stage also sets the limits that sequences change, and reads the counts of locked and pinned pages.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from pyvfio import pci
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.testing.fake import VERSIONS, FakeDevice, FakeKernel
from pyvfio.testing.fake.iommu import iommu_model
from pyvfio.units import KIB, PAGE_SIZE

Space = Literal["type1", "iommufd"]
"""The address space that sequences are about."""
SPACES: tuple[Space, ...] = ("type1", "iommufd")

_CAP_IPC_LOCK = 14
_CAPABILITY_VERSION = 0x20080522
_ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")


class Pages(NamedTuple):
    """The memory of this process that devices have, in pages: VmLck and VmPin."""

    locked: int
    pinned: int


class Stage(Protocol):
    """A kernel with two groups, and the settings that sequences change besides calling the kernel."""

    @property
    def kernel(self) -> Kernel:
        """The seam."""
        ...

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of the groups."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """A PCI address in each group."""
        ...

    @property
    def cdevs(self) -> tuple[str, ...]:
        """The node of each device, below `vfio` in the directory of nodes; empty for a kernel without iommufd."""
        ...

    def begin(self, entry_limit: int) -> None:
        """Begin an episode: no limit on locked memory, CAP_IPC_LOCK, at most `entry_limit` mappings in a container."""
        ...

    def end(self) -> None:
        """End an episode, whose descriptors are closed."""
        ...

    def pages(self) -> Pages:
        """Return the number of pages that VFIO has locked and that iommufd has pinned for this process."""
        ...

    def limit(self, pages: int) -> None:
        """Set RLIMIT_MEMLOCK (-1: no limit)."""
        ...

    def privilege(self, there: int) -> None:
        """Set CAP_IPC_LOCK (0: drop the capability)."""
        ...


class FakeStage:
    """The fake kernel of a version ("6.1", "6.12", "7.3") with an IOMMU by name, new in each episode."""

    devices = ("0000:00:02.0", "0000:00:03.0")
    groups = (2, 3)

    def __init__(self, version: str, iommu: str, space: Space = "type1") -> None:
        self._version = version
        self._iommufd = space == "iommufd"
        self.cdevs = ("devices/vfio0", "devices/vfio1") if self._iommufd else ()
        self._model = iommu_model(iommu, VERSIONS[version])
        self.begin(self._model.dma_entry_limit)

    def begin(self, entry_limit: int) -> None:
        """Make a new kernel."""
        declared = [(number, [FakeDevice(bdf)]) for number, bdf in zip(self.groups, self.devices, strict=True)]
        model = replace(self._model, dma_entry_limit=entry_limit)
        self.kernel = FakeKernel(self._version, iommu=model, groups=declared, iommufd=self._iommufd)
        self.kernel.allow_unsafe_interrupts = True
        self.privilege(1)

    def end(self) -> None:
        """Close everything."""
        self.kernel.shutdown()

    def pages(self) -> Pages:
        """Read the fake's own account."""
        return Pages(self.kernel.memlock().used // PAGE_SIZE, self.kernel.pinned // PAGE_SIZE)

    def limit(self, pages: int) -> None:
        """Set the fake's limit."""
        self.kernel.memlock_limit = None if pages < 0 else pages * PAGE_SIZE

    def privilege(self, there: int) -> None:
        """Set the fake's privilege."""
        self.kernel.privileged = bool(there)


class LinuxStage:
    """The running kernel, with the first two of the given devices; for a machine without other users."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.kernel: Kernel = LinuxKernel()
        self.devices = tuple(devices[:2])
        self.groups = tuple(pci.group_of(bdf, kernel=self.kernel) for bdf in self.devices)
        self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._base = Pages(0, 0)
        self.cdevs = tuple(f"devices/{name}" for bdf in self.devices for name in self._cdevs(bdf))

    def _cdevs(self, bdf: str) -> list[str]:
        """Return the node of a device. Kernels without cdevs have the directory too, without numbers of a node."""
        home = self.kernel.sysfs / "bus/pci/devices" / bdf / "vfio-dev"
        return [entry.name for entry in home.glob("vfio*") if (entry / "dev").exists()]

    def begin(self, entry_limit: int) -> None:
        """Set the module's parameter. Pages that a kernel never unlocked are no longer counted."""
        _ENTRY_LIMIT.write_text(str(entry_limit), encoding="ascii")
        self.end()
        now = self.pages()
        self._base = Pages(self._base.locked + now.locked, self._base.pinned + now.pinned)

    def end(self) -> None:
        """Restore the settings."""
        self.limit(-1)
        self.privilege(1)

    def pages(self) -> Pages:
        """Return VmLck and VmPin, less the pages locked and pinned when the episode began."""
        _, _, tail = os.pread(self._status, 8192, 0).partition(b"VmLck:")
        found = (tail, tail.partition(b"VmPin:")[2])
        sizes = [int(each.split(None, 1)[0]) * KIB // PAGE_SIZE for each in found]
        return Pages(sizes[0] - self._base.locked, sizes[1] - self._base.pinned)

    def limit(self, pages: int) -> None:
        """Call setrlimit(2)."""
        soft = resource.RLIM_INFINITY if pages < 0 else (pages + self._base.locked) * PAGE_SIZE
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, resource.RLIM_INFINITY))

    def privilege(self, there: int) -> None:
        """Call capset(2)."""
        header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
        now = ctypes.create_string_buffer(24)
        self._libc.capget(header, now)
        effective, permitted, *rest = struct.unpack("=6I", now.raw)
        bit = 1 << _CAP_IPC_LOCK
        effective = effective | bit if there else effective & ~bit
        self._libc.capset(header, struct.pack("=6I", effective, permitted, *rest))
