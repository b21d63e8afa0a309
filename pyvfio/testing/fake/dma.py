"""Accesses of a device to memory: through the IOMMU's table, as far as it lets them."""

from __future__ import annotations

from collections.abc import Iterator

from pyvfio.testing.fake.device import PciDevice
from pyvfio.testing.fake.group import Group
from pyvfio.testing.fake.pins import Mapped
from pyvfio.testing.fake.process import read_memory, write_memory


class DmaFault(Exception):  # noqa: N818 (what an IOMMU calls it)
    """The IOMMU stopped an access of a device at `iova`, its first byte that may not be accessed."""

    def __init__(self, bdf: str, *, iova: int, write: bool) -> None:
        super().__init__(f"DMA {'write' if write else 'read'} of {bdf} stopped at IOVA {iova:#x}")
        self.bdf = bdf
        self.iova = iova
        self.write = write


class DmaPath:
    """What lies between devices and memory. `faults` keeps each stopped access."""

    def __init__(self) -> None:
        self.faults: list[DmaFault] = []

    def read(self, group: Group, device: PciDevice, *, iova: int, size: int) -> bytes:
        """DmaFault, AssertionError (the process took the memory away)."""
        parts = []
        for entry, at, count in self._pieces(group, device, iova=iova, size=size, write=False):
            try:
                parts.append(read_memory(entry.vaddr + at - entry.iova, count))
            except OSError as error:
                raise _gone(entry, at) from error
        return b"".join(parts)

    def write(self, group: Group, device: PciDevice, *, iova: int, data: bytes) -> None:
        """As `read`."""
        for entry, at, count in self._pieces(group, device, iova=iova, size=len(data), write=True):
            try:
                write_memory(entry.vaddr + at - entry.iova, data[at - iova : at - iova + count])
            except OSError as error:
                raise _gone(entry, at) from error

    def _pieces(
        self, group: Group, device: PciDevice, *, iova: int, size: int, write: bool
    ) -> Iterator[tuple[Mapped, int, int]]:
        iommu = None if group.container is None else group.container.iommu
        end = iova + size
        while iova < end:
            entry = None if iommu is None else iommu.table.at(iova)
            if iommu is None or entry is None or not iommu.allows(entry, write=write):
                fault = DmaFault(device.bdf, iova=iova, write=write)
                self.faults.append(fault)
                raise fault
            count = min(end, entry.iova + entry.size) - iova
            yield entry, iova, count
            iova += count


def _gone(entry: Mapped, at: int) -> AssertionError:
    vaddr = entry.vaddr + at - entry.iova
    return AssertionError(
        f"a device accessed IOVA {at:#x}, whose memory at vaddr {vaddr:#x} is gone or lost its rights"
    )
