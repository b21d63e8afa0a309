"""Page tables of iommufd, and the devices of an IOMMU group that an iommufd has claimed.

All devices of a group use one page table. An automatic page table is destroyed when the last device leaves.

Source: drivers/iommu/iommufd/hw_pagetable.c and device.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import struct

from pyvfio.testing.fake.device import PciDevice
from pyvfio.testing.fake.group import Group
from pyvfio.testing.fake.ioas import Ioas
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.pins import Mapped
from pyvfio.testing.fake.process import read_memory, refuse, write_memory
from pyvfio.testing.fake.type1 import READ, WRITE, DmaTable
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import PAGE_SIZE, U64_MAX, IovaRange

_NO_CLEAR = 1  # IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR


class Hwpt:
    """`struct iommufd_hwpt_paging`: a page table that shows an address space. `automatic`: made by an attach.

    `users`: the number of devices. `tracks`: made with IOMMU_HWPT_ALLOC_DIRTY_TRACKING.
    """

    def __init__(
        self, ioas: Ioas, model: IommuModel, version: KernelVersion, *, automatic: bool, tracks: bool = False
    ) -> None:
        self.ioas = ioas
        self.model = model
        self.automatic = automatic
        self.tracks = tracks
        self.users = 0
        self.tracking = False
        self._leaky = model.write_is_readable and version.write_is_readable
        self._refuses_empty = version.iommufd_last > 0x8E
        self._dirty: set[int] = set()  # page numbers of IOVA

    # ------------------------------------------------------------------------------------------- what DMA needs

    @property
    def table(self) -> DmaTable:
        """The areas that devices reach."""
        return self.ioas.table

    def allows(self, entry: Mapped, *, write: bool) -> bool:
        """Return whether the IOMMU lets a device read, or write, through an area."""
        return bool(entry.flags & WRITE) if write else bool(entry.flags & READ) or self._leaky

    def is_suspended(self, entry: Mapped) -> bool:  # noqa: ARG002 (of each translation)
        """Return False: no area of iommufd loses the address."""
        return False

    def outside(self) -> list[IovaRange]:
        """Return the ranges outside of the aperture, which can depend on whether a device is attached."""
        return self.model.outside(attached=bool(self.users))

    def wrote(self, iova: int, size: int) -> None:
        """A device has written memory."""
        if self.tracking:
            self._dirty.update(range(iova // PAGE_SIZE, (iova + size - 1) // PAGE_SIZE + 1))

    def unmapped(self, entry: Mapped) -> None:
        """Forget the dirty pages of an area that was removed."""
        if self._dirty:
            self._dirty -= set(range(entry.iova // PAGE_SIZE, (entry.iova + entry.size) // PAGE_SIZE))

    # ---------------------------------------------------------------------------------------------- dirty pages

    def set_tracking(self, *, enable: bool) -> None:
        """`iopt_set_dirty_tracking`: EOPNOTSUPP. Tracking begins with clean pages."""
        if not self.tracks:
            refuse(errno.EOPNOTSUPP)
        if enable and not self.tracking:
            self._dirty.clear()
        self.tracking = enable

    def get_dirty(self, *, flags: int, iova: int, size: int, page: int, data: int) -> None:
        """`iopt_read_and_clear_dirty_data`: set the bits of dirty pages in memory at `data`. Other bits stay.

        EINVAL, EOVERFLOW, EOPNOTSUPP, EINVAL (tracking is off, or an address is not mapped), EFAULT.
        """
        self._check_range(iova, size, page)
        if not self.tracks:
            refuse(errno.EOPNOTSUPP)
        last = iova + size - 1
        if not self._is_mapped(iova, last) or not self.tracking:
            refuse(errno.EINVAL)
        found = {number for number in self._dirty if iova <= number * PAGE_SIZE <= last}
        for bit in sorted({(number * PAGE_SIZE - iova) // page for number in found}):
            (word,) = struct.unpack("=Q", read_memory(data + bit // 64 * 8, 8))
            write_memory(data + bit // 64 * 8, struct.pack("=Q", word | 1 << bit % 64))
        if not flags & _NO_CLEAR:
            self._dirty -= found

    def _check_range(self, iova: int, size: int, page: int) -> None:
        if not size and self._refuses_empty:
            refuse(errno.EINVAL)
        end = iova + size if size else iova + U64_MAX + 1  # length - 1 wraps
        if end - 1 > U64_MAX:
            refuse(errno.EOVERFLOW)
        if (iova | end) & (self.ioas.alignment - 1) or not page or (iova | end) & (page - 1):
            refuse(errno.EINVAL)

    def _is_mapped(self, iova: int, last: int) -> bool:
        while iova <= last:
            entry = self.table.at(iova)
            if entry is None:
                return False
            iova = entry.iova + entry.size
        return True


class BoundDevice:
    """`struct iommufd_device`: a device that belongs to an iommufd."""

    def __init__(self, device: PciDevice, claim: Claim) -> None:
        self.device = device
        self.claim = claim
        self.attached = False


class Claim:
    """`struct iommufd_group`: the devices of a group that are bound, and the page table of the group."""

    def __init__(self, owner: object, group: Group) -> None:
        self.owner = owner
        self.group = group
        self.bound: list[BoundDevice] = []
        self.attached: list[BoundDevice] = []
        self.hwpt: Hwpt | None = None

    @property
    def translation(self) -> Hwpt | None:
        """The page table that devices of the group use, or None: no access passes."""
        return self.hwpt

    def attach(self, bound: BoundDevice, hwpt: Hwpt) -> None:
        """`iommufd_hw_pagetable_attach`: EINVAL (the group has another page table), EADDRINUSE."""
        if self.hwpt is not None and self.hwpt is not hwpt:
            refuse(errno.EINVAL)
        hwpt.ioas.reserve_for(bound, hwpt.model.gaps())
        self.hwpt, bound.attached = hwpt, True
        self.attached.append(bound)
        hwpt.users += 1

    def replace(self, hwpt: Hwpt) -> Hwpt:
        """`iommufd_device_do_replace`: let all devices of the group use `hwpt`, and return the former one.

        EADDRINUSE, and nothing has changed then.
        """
        old = self.hwpt
        if old is None or old is hwpt:
            return hwpt
        if old.ioas is not hwpt.ioas:
            try:
                for bound in self.attached:
                    hwpt.ioas.reserve_for(bound, hwpt.model.gaps())
            except OSError:
                for bound in self.attached:
                    hwpt.ioas.unreserve(bound)
                raise
            for bound in self.attached:
                old.ioas.unreserve(bound)
        self.hwpt = hwpt
        hwpt.users += len(self.attached)
        old.users -= len(self.attached)
        return old

    def detach(self, bound: BoundDevice) -> Hwpt | None:
        """`iommufd_hw_pagetable_detach`: return the page table that the device has used."""
        hwpt = self.hwpt
        if hwpt is None or not bound.attached:
            return None
        self.attached.remove(bound)
        bound.attached = False
        if not self.attached:
            self.hwpt = None
        hwpt.ioas.unreserve(bound)
        hwpt.users -= 1
        return hwpt
