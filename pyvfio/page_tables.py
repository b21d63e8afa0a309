"""The page tables of an I/O address space: those of the kernel, or those that record the writes of devices.

A device that is attached to an I/O address space uses a page table that the kernel made (an automatic HWPT). Such a
page table records no writes. To record writes, a page table is made for each kind of IOMMU, and the devices are
attached to that page table in place of the address space. Both page tables have the mappings of the same space.

Source: drivers/iommu/iommufd/hw_pagetable.c and device.c; IOMMU_HWPT_ALLOC_DIRTY_TRACKING.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from pyvfio import ioctls
from pyvfio import iommufd_ioctls as abi
from pyvfio.errors import IoctlError, RollbackError, UnsupportedError, VfioError, as_exception, raise_collected
from pyvfio.handle import Handle, attempt
from pyvfio.iommufd import Iommufd
from pyvfio.units import PAGE_SIZE

_ATTACH_HINTS = {
    errno.EFAULT: "Memory that the space maps no longer exists in this process: unmap the memory first",
    errno.ENOMEM: "The attach of the first device pins all memory of the space, and RLIMIT_MEMLOCK or the free memory "
    "does not suffice: raise `ulimit -l`, or unmap memory",
    errno.EINVAL: "Either the IOMMU of the device cannot use the space: make a space for this device alone. Or another "
    "device of the IOMMU group is attached to another space: attach all devices of the group to one space",
    errno.ENOENT: "The kernel has no address space of that number in the iommufd of the device",
    errno.ENOTTY: "The device was opened through an IOMMU group, not by the node of the device",
}


class BoundHandle(Handle):
    """The base of devices, which may be bound to an iommufd."""

    @property
    @abstractmethod
    def dev_id(self) -> int | None:
        """The number of the device in the iommufd.

        None for a device that was opened through a group, and for a descriptor that was bound elsewhere.
        """


class PageTables:
    """The page tables of the I/O address space `ioas_id`, and the calls that attach devices to them.

    `tracks`: whether the page tables record writes. The caller holds the lock of the iommufd.
    """

    def __init__(self, iommufd: Iommufd, ioas_id: int, *, tracks: bool = False) -> None:
        self.ioas_id = ioas_id
        self.tracks = tracks
        self._iommufd = iommufd
        self._ids: list[int] = []  # of the page tables that record writes
        self._left: list[int] = []  # of those that no device uses, and that the kernel has not destroyed yet

    def attach(self, device: BoundHandle) -> None:
        """Attach a device, in place of the space or page table that the device uses, if any.

        Raises IoctlError; UnsupportedError if the space tracks and the IOMMU of the device cannot. The device then
        stays where it was.
        """
        if not self.tracks:
            attach_to(device, self.ioas_id)
            return
        for hwpt_id in self._ids:
            try:
                attach_to(device, hwpt_id)
            except IoctlError as error:
                if error.errno != errno.EINVAL:  # EINVAL: another IOMMU, which needs a page table of another kind
                    raise
            else:
                return
        self._attach_to_new(device)

    def _attach_to_new(self, device: BoundHandle) -> None:
        dev_id = self._check_tracks(device)
        hwpt_id = self._allocate(device, dev_id)
        try:
            self._iommufd.hwpt_set_dirty_tracking(hwpt_id, enabled=True)  # before a device can write
            attach_to(device, hwpt_id)
        except BaseException:
            self._left.append(hwpt_id)
            attempt(self._destroy_left, [])
            raise
        self._ids.append(hwpt_id)

    def _allocate(self, device: BoundHandle, dev_id: int) -> int:
        flags = int(abi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
        try:
            return self._iommufd.hwpt_alloc(dev_id, self.ioas_id, flags=flags)
        except IoctlError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.ENOTTY}:
                raise _no_tracking(device) from error
            raise

    def _check_tracks(self, device: BoundHandle) -> int:
        """Return the number of the device. Raises UnsupportedError if the IOMMU records no writes; changes nothing."""
        if device.dev_id is None:
            raise UnsupportedError(
                f"writes of {device.guard.what} cannot be recorded: the device was bound elsewhere, and the number of "
                "the device in the iommufd is not known",
                hint="Open the device in this process",
            )
        try:
            capabilities = self._iommufd.get_hw_info(device.dev_id).capabilities
        except IoctlError as error:
            if error.errno in {errno.EOPNOTSUPP, errno.ENOTTY}:
                raise _no_tracking(device) from error
            raise
        if not capabilities & abi.IOMMU_HW_CAP_DIRTY_TRACKING:
            raise _no_tracking(device)
        return device.dev_id

    def is_complete_at_once(self, dev_id: int) -> bool:
        """Return whether the IOMMU of a device completes a page table before the device is attached to the table.

        If not, a device that is attached cannot move to a space: see `pyvfio.iommu.attach_errors`. The space of these
        page tables must be empty and of no further use: this method makes a page table, after which the space may have
        no usable IOVA. `destroy` destroys that page table. Raises IoctlError. Cost: two ioctls.
        """
        self._left.append(self._iommufd.hwpt_alloc(dev_id, self.ioas_id))
        ranges, _alignment = self._iommufd.ioas_iova_ranges(self.ioas_id)
        return any(each.size >= PAGE_SIZE for each in ranges)

    # ------------------------------------------------------------------------------------------------ tracking

    def start(self, devices: Sequence[BoundHandle]) -> None:
        """Move the devices to page tables that record writes. At the start, no page is dirty.

        Raises UnsupportedError before any change; IoctlError, after the moved devices were moved back. RollbackError if
        one could not be moved back.
        """
        for device in devices:
            self._check_tracks(device)
        moved: list[BoundHandle] = []
        self.tracks = True
        try:
            for device in devices:
                self.attach(device)
                moved.append(device)
        except BaseException as error:
            self.tracks = False
            self._undo(error, [*(partial(self.attach, device) for device in moved), self.destroy])
            raise

    def stop(self, devices: Sequence[BoundHandle]) -> None:
        """Move the devices back to a page table that records no writes, and destroy the others.

        Raises IoctlError after the moved devices were moved back; RollbackError if one could not be moved back.
        """
        moved: list[BoundHandle] = []
        try:
            for device in devices:
                attach_to(device, self.ioas_id)
                moved.append(device)
        except BaseException as error:
            self._undo(error, [partial(self.attach, device) for device in moved])
            raise
        self.tracks = False
        self.destroy()

    @staticmethod
    def _undo(error: BaseException, steps: Iterable[Callable[[], object]]) -> None:
        failures: list[Exception] = []
        for step in steps:
            attempt(step, failures)
        if failures:
            raise RollbackError(
                "a device could not be moved to another page table, and could not be moved back",
                [as_exception(error), *failures],
                hint="Close the devices of the space",
            ) from error

    def destroy(self) -> None:
        """Destroy the page tables that record writes, which no device uses any more.

        Raises IoctlError, or a group, after all were tried. A second call destroys those that are left. A page table
        that is gone was destroyed by a call that failed nevertheless.
        """
        self._left += self._ids
        self._ids.clear()
        self._destroy_left()

    def _destroy_left(self) -> None:
        failures: list[Exception] = []
        for hwpt_id in tuple(self._left):
            try:
                self._iommufd.destroy(hwpt_id)
            except VfioError as error:
                if not (isinstance(error, IoctlError) and error.errno == errno.ENOENT):
                    failures.append(error)
                    continue
            self._left.remove(hwpt_id)
        raise_collected("destroying page tables", failures)

    def check_tracks(self) -> None:
        """Raise VfioError unless the page tables record writes."""
        if not self.tracks:
            raise VfioError(
                f"the writes of devices to I/O address space {self.ioas_id} are not recorded",
                hint="Another DirtyTracking of the space was closed, which ended the recording: open a new one",
            )

    def bitmaps(self, *, iova: int, size: int, page_size: int, clear: bool) -> Iterator[bytes]:
        """Yield, for each page table, a bitmap of the pages of `[iova, iova + size)` that devices wrote through it.

        Mappings fill the range. Raises as `check_tracks`; IoctlError.
        """
        self.check_tracks()
        read = self._iommufd.hwpt_get_dirty_bitmap
        for hwpt_id in self._ids:
            yield bytes(read(hwpt_id, iova=iova, size=size, page_size=page_size, clear=clear))


def attach_to(device: BoundHandle, pt_id: int) -> None:
    argument = ioctls.vfio_device_attach_iommufd_pt(argsz=ioctls.VFIO_DEVICE_ATTACH_IOMMUFD_PT_MINSZ, pt_id=pt_id)
    device.ioctl("VFIO_DEVICE_ATTACH_IOMMUFD_PT", argument, hints=_ATTACH_HINTS, pt_id=pt_id)


def _no_tracking(device: BoundHandle) -> UnsupportedError:
    return UnsupportedError(
        f"the IOMMU of {device.guard.what} does not record the pages that devices write",
        hint="Copy all memory that devices can write. Or open the device with type1, where the kernel reports all "
        "mapped pages as dirty",
    )
