"""Devices without an IOMMU: how such a device is opened, and its attachment to nothing.

Source: `vfio_group_ioctl_get_device_fd` in drivers/vfio/group.c; drivers/vfio/device_cdev.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyvfio import pci
from pyvfio.container import Container, Group
from pyvfio.device import cdev
from pyvfio.device.attachment import AttachedHandle, Attachment, GroupAttachment
from pyvfio.device.cdev import CdevAttachment
from pyvfio.handle import Handle
from pyvfio.iommufd import Iommufd
from pyvfio.noiommu import UnsafeByGroup, UnsafeByIommufd, UnsafeNoIommu, warn_unsafe
from pyvfio.page_tables import attach_to
from pyvfio.pci.cdevs import has_iommufd
from pyvfio.pci.noiommu import PREFIX, is_unprotected, no_protection, not_unprotected

if TYPE_CHECKING:
    from pyvfio.ioas import Ioas
    from pyvfio.kernel import Kernel

_PLACE = "WITHOUT PROTECTION (no-IOMMU mode)"


def open_space(kernel: Kernel, bdf: str) -> UnsafeNoIommu:
    """Warn, and return that through which a device without an IOMMU is opened.

    By the node of the device where there is one, since only iommufd pins memory. Nothing is left open after an error.

    Raises UnsafeNoIommuWarning if a filter says so, DeviceNotFoundError, NotBoundError, UnavailableError,
    UnsupportedError, and the errors of opening nodes.
    """
    found = pci.read_device(bdf, kernel=kernel)
    if not is_unprotected(kernel, found):
        raise not_unprotected(kernel, found)
    warn_unsafe(bdf)
    if found.cdev is not None and found.cdev.startswith(PREFIX) and has_iommufd(kernel):
        return UnsafeByIommufd(kernel, bdf)
    return UnsafeByGroup(kernel, pci.group_of(bdf, kernel=kernel))


def attachment_through(through: Group | Ioas | UnsafeNoIommu) -> Attachment:
    """Return the attachment of a device with or without an IOMMU. Raises as `cdev.attachment_through`."""
    if isinstance(through, UnsafeByIommufd):
        return NoIommuCdev(through, through.owner)
    if isinstance(through, UnsafeByGroup):
        return NoIommuGroup(through, through.owner)
    if isinstance(through, UnsafeNoIommu):
        raise TypeError(f"a device is opened through no {type(through).__name__}")
    return cdev.attachment_through(through)


class NoIommuGroup(GroupAttachment):
    """The attachment of a device that was opened through a group that VFIO made. As `Attachment`."""

    __slots__ = ("unsafe",)

    def __init__(self, space: UnsafeNoIommu, group: Group) -> None:
        super().__init__(group)
        self.unsafe: UnsafeNoIommu | None = space

    @property
    def place(self) -> str:
        """As `Attachment.place`."""
        return _PLACE

    def neighbours(self) -> Iterable[Handle]:
        """As `Attachment.neighbours`: the devices of the group."""
        return tuple(self.group.devices)

    def note_closed(self, device: AttachedHandle) -> None:
        """As `Attachment.note_closed`. `UnsafeNoIommu.close` closes the group."""

    def attach(self, device: AttachedHandle, space: Ioas) -> None:
        """As `Attachment.attach`. Raises UnsupportedError."""
        del space
        raise no_protection(device.bdf, "the device is attached to no address space")

    def detach(self, device: AttachedHandle) -> None:
        """As `Attachment.detach`. Raises UnsupportedError."""
        raise no_protection(device.bdf, "nothing detaches the device from memory")


class NoIommuCdev(CdevAttachment):
    """The attachment of a device that was opened by its node `noiommu-vfioN`. As `Attachment`.

    The device is attached to an I/O address space, which pins memory and confines nothing. `space` is None.
    """

    def __init__(self, space: UnsafeByIommufd, iommufd: Iommufd) -> None:
        self.iommufd = iommufd
        self.space = None
        self.unsafe: UnsafeNoIommu | None = space
        self.dev_id = None
        self._ioas_id = space.ioas_id
        self._bdf, self._group = "", None

    def _check_protected(self, device: pci.PciDevice) -> None:
        """Accept each device: the caller asked for no protection."""

    @property
    def container(self) -> Container | None:
        """As `Attachment.container`: None."""
        return None

    @property
    def place(self) -> str:
        """As `Attachment.place`."""
        return _PLACE

    def enter(self, device: AttachedHandle) -> None:
        """As `Attachment.enter`: from now on, memory in the I/O address space is pinned."""
        attach_to(device, self._ioas_id)

    def attach(self, device: AttachedHandle, space: Ioas) -> None:
        """As `Attachment.attach`. Raises UnsupportedError."""
        del space
        raise no_protection(device.bdf, "the device is attached to no address space")

    def detach(self, device: AttachedHandle) -> None:
        """As `Attachment.detach`. Raises UnsupportedError."""
        raise no_protection(device.bdf, "nothing detaches the device from memory")
