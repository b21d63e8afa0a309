"""The errors of VFIO_IOMMU_MAP_DMA.

Source: `vfio_dma_do_map` and `vfio_pin_pages_remote` in drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from pyvfio.errors import EntryLimitError, IoctlError
from pyvfio.iommu.map_errors import MapRefusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Type1MapRefusal(MapRefusal):
    """A VFIO_IOMMU_MAP_DMA that failed.

    `entry_limit`: how many mappings are allowed; `attached`: whether a group is attached.
    """

    entry_limit: int
    attached: bool

    call = "VFIO_IOMMU_MAP_DMA"

    def explain_errno(self, number: int) -> IoctlError | None:
        """As `MapRefusal.explain_errno`."""
        if number == errno.ENOSPC:
            return self._entries()
        if number in (errno.EINVAL, errno.EOVERFLOW) and not self.attached:
            return self.say(IoctlError, f"{self.error.strerror}", "The container has no group yet: attach one first")
        return MapRefusal.explain_errno(self, number)

    def _entries(self) -> EntryLimitError:
        explained = self.say(
            EntryLimitError,
            f"all {self.entry_limit} mappings that this container may hold are in use; this process made "
            f"{len(self.table)} of them",
            "Map larger pieces, or raise /sys/module/vfio_iommu_type1/parameters/dma_entry_limit, which a container "
            "reads when its first group is attached",
        )
        explained.used, explained.limit = len(self.table), self.entry_limit
        return explained
