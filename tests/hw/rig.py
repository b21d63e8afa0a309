"""What the tests on a device share: the whole set-up in one object, witnesses of physical pages, process state."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.testing import probe
from pyvfio.testing.edu import EDU_ID, LIMIT, Edu
from pyvfio.units import PAGE_SIZE

SIZE = LIMIT


def has_engine(device: pci.PciDevice) -> bool:
    """Whether it is a device whose DMA engine the tests can drive."""
    return (device.vendor, device.device) == EDU_ID


def pattern() -> bytes:
    """`SIZE` bytes that no other call has returned."""
    return probe.pattern(SIZE)


class Rig:
    """A device, blocks, a mapper that follows them, and a page through which the device's buffer can be looked at."""

    def __init__(
        self,
        bdf: str,
        *,
        container: pyvfio.Container | None = None,
        iommu_type: ioctls.VfioExtension | None = None,
        place: int | None = None,
    ) -> None:
        with ExitStack() as stack:
            self.device = stack.enter_context(pyvfio.open_device(bdf, container=container, iommu_type=iommu_type))
            self.device.memory_enabled = True
            self.device.bus_master = True
            self.engine = Edu(self.device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
            self.container = self.device.container
            self.blocks = stack.enter_context(pyvfio.RamBlockList())
            self.mapper = stack.enter_context(
                pyvfio.DmaMapper(
                    self.container, self.blocks, place=lambda block: place if block.idstr != "desk" else None
                )
            )
            desk = self.blocks.add("desk", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
            self._probe = probe.DmaProbe(self.engine, desk=desk, iova=self.mapper.iova(desk))
            self._stack = stack.pop_all()

    def device_reads(self, iova: int) -> bytes | None:
        """What the device gets when it reads `SIZE` bytes at `iova`; None when it is stopped."""
        return self._probe.read(iova, SIZE)

    def device_writes(self, iova: int, data: bytes) -> None:
        """Have the device write `data` at `iova`, whether or not it is stopped."""
        self._probe.write(iova, data)

    def reaches(self, block: pyvfio.RamBlock, offset: int) -> bool:
        """Whether the device reads and writes `SIZE` bytes at `offset` of `block`, in use: both, or neither."""
        iova, there, sent = self.mapper.iova(block) + offset, pattern(), pattern()
        with block.view() as view:
            view[offset : offset + SIZE] = there
        read = self.device_reads(iova) == there
        self.device_writes(iova, sent)
        with block.view() as view:
            written = bytes(view[offset : offset + SIZE])
        assert written in (there, sent)
        assert read == (written == sent), "the device could do one of reading and writing, but not the other"
        return read

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def locked_bytes() -> int:
    """VmLck of this process."""
    return pyvfio.LinuxKernel().memlock().used


def open_fds() -> dict[int, str]:
    """What this process has open."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
    return found


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


@contextmanager
def memlock_limit(limit: int) -> Iterator[None]:
    """This thread may lock `limit` bytes: RLIMIT_MEMLOCK is set and CAP_IPC_LOCK, which lifts it, is laid down."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(0x20080522, 0), (_Data * 2)()
    former = resource.getrlimit(resource.RLIMIT_MEMLOCK)

    def capset(effective: int) -> None:
        data[0].effective = effective
        if libc.capset(ctypes.byref(header), data) != 0:
            raise OSError(ctypes.get_errno(), "capset")

    if libc.capget(ctypes.byref(header), data) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    effective = int(data[0].effective)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, former[1]))
    capset(effective & ~(1 << 14))
    try:
        yield
    finally:
        capset(effective)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, former)


@contextmanager
def dma_entry_limit(limit: int) -> Iterator[None]:
    """Containers that are opened meanwhile hold at most `limit` mappings."""
    parameter = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    former = parameter.read_text(encoding="ascii")
    parameter.write_text(str(limit), encoding="ascii")
    try:
        yield
    finally:
        parameter.write_text(former, encoding="ascii")
