"""Accesses of devices to memory and to BARs of other devices, through the table of the IOMMU."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

from pyvfio.guard import uninterrupted
from pyvfio.testing.fake.device import PciDevice
from pyvfio.testing.fake.group import Group
from pyvfio.testing.fake.irqs import MSI, MSIX
from pyvfio.testing.fake.pins import Mapped, Violation
from pyvfio.testing.fake.process import DeviceArea, read_memory, write_memory
from pyvfio.units import Iova, Vaddr

logger = logging.getLogger(__name__)


class DmaFault(Exception):  # noqa: N818 (the name of the event in the IOMMU)
    """A stopped access of a device: `iova` is the first byte that may not be accessed, and `reason` says why."""

    def __init__(self, bdf: str, *, iova: int, write: bool, reason: str) -> None:
        super().__init__(f"DMA {'write' if write else 'read'} of {bdf} stopped at IOVA {iova:#x}: {reason}")
        self.bdf = bdf
        self.iova = iova
        self.write = write
        self.reason = reason


class DmaPath:
    """The path between devices and memory. `faults` keeps each stopped access, and `on_fault` is called with each."""

    def __init__(self, violations: list[Violation]) -> None:
        self._violations = violations
        self.devices: dict[str, PciDevice] = {}
        """The devices whose BARs can be reached, by address."""
        self.faults: list[DmaFault] = []
        self.on_fault: Callable[[DmaFault], object] | None = None

    def stop(self, device: PciDevice, *, iova: int, write: bool, reason: str) -> DmaFault:
        """Record a stopped access, and return the fault for the caller to raise."""
        fault = DmaFault(device.bdf, iova=iova, write=write, reason=reason)
        self.faults.append(fault)
        logger.info("%s", fault)
        if self.on_fault is not None:
            self.on_fault(fault)
        return fault

    def read(self, group: Group, device: PciDevice, *, iova: int, size: int) -> bytes:
        """Read memory as a device. Raises DmaFault, and AssertionError if the process released the memory."""
        parts = []
        for entry, at, count, area in self._pieces(group, device, iova=iova, size=size, write=False):
            if area is not None:
                target, offset = self._target(device, area, at - entry.iova, iova=at, write=False)
                parts.append(target.load(offset, count))
                continue
            try:
                parts.append(read_memory(entry.vaddr + at - entry.iova, count))
            except OSError as error:
                raise self._gone(group, entry, at, count) from error
        return b"".join(parts)

    def write(self, group: Group, device: PciDevice, *, iova: int, data: bytes) -> None:
        """Write memory as a device. Raises as `read`."""
        for entry, at, count, area in self._pieces(group, device, iova=iova, size=len(data), write=True):
            piece = data[at - iova : at - iova + count]
            if area is not None:
                target, offset = self._target(device, area, at - entry.iova, iova=at, write=True)
                target.store(offset, piece)
                continue
            try:
                write_memory(entry.vaddr + at - entry.iova, piece)
            except OSError as error:
                raise self._gone(group, entry, at, count) from error
            if group.translation is not None:
                group.translation.wrote(at, count)

    def _target(
        self, device: PciDevice, area: DeviceArea, position: int, *, iova: int, write: bool
    ) -> tuple[PciDevice, int]:
        """Return the device whose BAR is mapped, and the offset. Raises DmaFault if that device does not decode."""
        target, offset = self.devices[area.bdf], area.offset + position - area.start
        if not target.decodes:
            reason = f"{area.bdf} does not decode memory accesses, and its BAR is mapped there"
            raise self.stop(device, iova=iova, write=write, reason=reason)
        return target, offset

    def _gone(self, group: Group, entry: Mapped, at: int, count: int) -> Exception:
        """Return the exception for lost memory. The violation is recorded too, since a thread of a device may raise."""
        vaddr = Vaddr(entry.vaddr + at - entry.iova)
        iommu = group.translation
        if iommu is not None and iommu.is_suspended(entry):
            return NotImplementedError(
                f"IOVA {at:#x} has no address (VFIO_DMA_UNMAP_FLAG_VADDR at {vaddr:#x}), and the memory is gone: a "
                "real device still reaches the pages, which the fake kernel does not keep"
            )
        self._violations.append(Violation("something", Iova(at), vaddr, count))
        return AssertionError(
            f"a device accessed IOVA {at:#x}, whose memory at vaddr {vaddr:#x} is gone or lost its rights"
        )

    def _pieces(
        self, group: Group, device: PciDevice, *, iova: int, size: int, write: bool
    ) -> Iterator[tuple[Mapped, int, int, DeviceArea | None]]:
        iommu = group.translation
        end = iova + size
        while iova < end:
            entry = None if iommu is None else iommu.table.at(iova)
            if iommu is None or entry is None:
                raise self.stop(device, iova=iova, write=write, reason="nothing is mapped there")
            if not iommu.allows(entry, write=write):
                raise self.stop(device, iova=iova, write=write, reason="the mapping does not allow the access")
            area, limit = _area_at(entry, iova - entry.iova)
            count = min(end, entry.iova + limit) - iova
            yield entry, iova, count, area
            iova += count


def _area_at(entry: Mapped, position: int) -> tuple[DeviceArea | None, int]:
    """Return the BAR that a mapping has at `position`, or None for memory, and where in the mapping that part ends."""
    for area in entry.bars:
        if position < area.start:
            return None, area.start
        if position < area.start + area.size:
            return area, area.start + area.size
    return None, entry.size


class DeviceSlot:
    """The machine around a `FakePciDevice`: `pci_device.Slot`."""

    def __init__(self, path: DmaPath, group: Group, device: PciDevice, lock: threading.RLock) -> None:
        self.lock = lock
        self._path = path
        self._group = group
        self._device = device

    @property
    def command(self) -> int:
        """The PCI COMMAND register."""
        return self._device.command

    @property
    def decodes(self) -> bool:
        """Whether a memory BAR may be accessed."""
        return self._device.decodes

    def _check_master(self, *, iova: int, write: bool) -> None:
        if not self._device.bus_master:
            raise self._path.stop(self._device, iova=iova, write=write, reason="bus mastering is off")

    @uninterrupted()
    def dma_read(self, *, iova: int, size: int) -> bytes:
        """Read memory. Raises DmaFault, and AssertionError if the process released the memory."""
        with self.lock:
            self._check_master(iova=iova, write=False)
            return self._path.read(self._group, self._device, iova=iova, size=size)

    @uninterrupted()
    def dma_write(self, *, iova: int, data: bytes) -> None:
        """Write memory. Raises as `dma_read`."""
        with self.lock:
            self._check_master(iova=iova, write=True)
            self._path.write(self._group, self._device, iova=iova, data=data)

    @uninterrupted()
    def raise_interrupt(self, vector: int) -> None:
        """Send a message, which needs bus mastering, or raise INTx. Raises ValueError if there is no such vector."""
        with self.lock:
            self._device.check_vector(vector)
            irqs = self._device.irqs
            if irqs.enabled not in (MSI, MSIX):
                irqs.set_line(up=True)
            elif self._device.bus_master:
                irqs.raise_interrupt(vector)

    @uninterrupted()
    def signal(self, index: int, vector: int, times: int) -> bool:
        """As `Irqs.signal`."""
        with self.lock:
            return self._device.irqs.signal(index, vector, times)

    @uninterrupted()
    def lower_interrupt(self) -> None:
        """Lower the INTx line."""
        with self.lock:
            self._device.irqs.set_line(up=False)
