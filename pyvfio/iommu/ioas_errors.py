"""The errors of IOMMU_IOAS_MAP and IOMMU_IOAS_MAP_FILE.

Source: `iommufd_ioas_map`, `iopt_map_pages`, `pfn_reader_user_pin` and `do_update_pinned` in drivers/iommu/iommufd.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from pyvfio.errors import IoctlError, PinLimitError, UnsupportedError
from pyvfio.iommu.map_errors import MapRefusal
from pyvfio.memory import locking

_BARS = (
    'A BAR can be mapped with type1: open_device(..., iommu="type1"). Kernels that map a DMA-buf (seen on Linux 7.3, '
    "with CONFIG_VFIO_PCI_DMABUF) map the BAR by a descriptor: reserve IOVA with space.reserve_iova(...), and call "
    "space.iommufd.ioas_map_file(space.id, device.dma_buf(region).fd, start=0, size=..., iova=...)"
)


def no_bar(space: str) -> UnsupportedError:
    """Return the error for a BAR that was to be mapped into an Ioas by address."""
    return UnsupportedError(f"{space} cannot map a BAR of a device by address: iommufd pins only memory", hint=_BARS)


@dataclass(frozen=True, slots=True, kw_only=True)
class IoasMapRefusal(MapRefusal):
    """An IOMMU_IOAS_MAP or IOMMU_IOAS_MAP_FILE that failed.

    `by_process`: whether pinned pages count for the process; False: for the user, over all its processes.
    `file`: the descriptor and the offset of a map by descriptor.
    """

    by_process: bool
    file: tuple[int, int] | None = None

    call = "IOMMU_IOAS_MAP"

    @property
    def request(self) -> str:
        """IOMMU_IOAS_MAP, or IOMMU_IOAS_MAP_FILE."""
        return self.call if self.file is None else f"{self.call}_FILE"

    def explain_errno(self, number: int) -> IoctlError | None:
        """As `MapRefusal.explain_errno`."""
        if number == errno.ENOENT:
            return self.say(
                IoctlError,
                "the address space does not exist any more",
                "Another holder of the descriptor destroyed the space",
            )
        if number == errno.EADDRINUSE:
            return self.say(
                IoctlError, "IOMMU_IOAS_ALLOW_IOVAS does not allow that range", "Choose an IOVA in the allowed ranges"
            )
        return MapRefusal.explain_errno(self, number)

    def fault(self) -> IoctlError:
        """As `MapRefusal.fault`, with a BAR as a further reason."""
        explained = MapRefusal.fault(self)
        explained.hint += ". iommufd does not map a BAR of a device by address" * (self.file is None)
        return explained

    def memory(self) -> PinLimitError:
        """Explain ENOMEM.

        If memory counts by user, no file shows the pinned memory of all processes. The error then has the limit and the
        part of this space.
        """
        lock = self.kernel.memlock()
        if self.by_process:
            return MapRefusal.memory(self)
        if lock.limit is None or lock.privileged:
            return self.no_memory()
        return locking.user_limit_error(
            self.error, lock.limit, self.size, mapped=self.table.mapped, request=self.request, arguments=self.given
        )
