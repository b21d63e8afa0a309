"""The owner of a device, through which the device was opened, and the address space of the device.

A device opened through a group has the address space of the group's container. `pyvfio.device.cdev` has the devices
that are opened by nodes of their own.

Source: `vfio_group_ioctl_get_device_fd` in drivers/vfio/group.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from pyvfio.container import Container, Group
from pyvfio.errors import ClosedError, UnsupportedError, VfioError
from pyvfio.guard import Guarded, close_now, guarded, holding
from pyvfio.handle import Handle
from pyvfio.page_tables import BoundHandle
from pyvfio.pci.noiommu import no_protection

if TYPE_CHECKING:
    from uuid import UUID

    from pyvfio.ioas import Ioas
    from pyvfio.iommufd import Iommufd
    from pyvfio.kernel import Kernel
    from pyvfio.noiommu import UnsafeNoIommu


class DmaOwner(Guarded, Protocol):
    """The handle through which a device was opened: a Group or an Iommufd. The kernel gives a group to one owner.

    The devices of an owner share the lock of the owner.
    Source: `iommu_group_claim_dma_owner` and `iommu_device_claim_dma_owner` in drivers/iommu/iommu.c.
    """

    @property
    def kernel(self) -> Kernel:
        """The kernel that makes the system calls."""
        ...

    @property
    def devices(self) -> list[Handle]:
        """The open devices of the owner. A device enters and removes itself."""
        ...

    def check_here(self) -> None:
        """Raise HandOverError during a hand-over to another process."""
        ...


class Attachment(Protocol):
    """The owner and the address space of one device. For the library."""

    @property
    def owner(self) -> DmaOwner:
        """The handle through which the device was opened."""
        ...

    @property
    def group(self) -> Group:
        """The group through which the device was opened. Raises VfioError without one."""
        ...

    @property
    def group_number(self) -> int:
        """The number of the IOMMU group of the device."""
        ...

    @property
    def iommufd(self) -> Iommufd | None:
        """The iommufd to which the device is bound, or None."""
        ...

    @property
    def dev_id(self) -> int | None:
        """The number of the device in the iommufd, or None."""
        ...

    @property
    def space(self) -> Container | Ioas | None:
        """The address space; None while the device has none."""
        ...

    @property
    def container(self) -> Container | None:
        """The container of the device's group. Raises VfioError for a device without one."""
        ...

    @property
    def unsafe(self) -> UnsafeNoIommu | None:
        """The memory of a device in no-IOMMU mode; None for all other devices."""
        ...

    @property
    def place(self) -> str:
        """The place of the device, in messages: `in group 2`."""
        ...

    def open(self, bdf: str, vf_token: UUID | str | None) -> int:
        """Open the device, and return the descriptor."""
        ...

    def adopt(self, bdf: str, fd: int) -> None:
        """Make an open descriptor of the device usable."""
        ...

    def enter(self, device: AttachedHandle) -> None:
        """Attach a device that was opened. The caller holds the lock of the owner."""
        ...

    def retract(self, device: AttachedHandle) -> None:
        """Undo `enter` for a device whose descriptor stays open."""
        ...

    def leave(self, device: AttachedHandle) -> None:
        """Note that the kernel detached the device."""
        ...

    def note_closing(self, device: AttachedHandle) -> None:
        """Detach the device from the address space, before the descriptor is closed.

        A child of a fork may have the descriptor too, and a close alone would then leave the device attached.
        """
        ...

    def note_released(self, device: AttachedHandle) -> None:
        """Note that the descriptor is no longer the device's. Takes no lock."""
        ...

    def note_closed(self, device: AttachedHandle) -> None:
        """Note that the descriptor of the device was closed, and release the owner if nothing else needs the owner."""
        ...

    def attach(self, device: AttachedHandle, space: Ioas) -> None:
        """Attach the device to another address space, in place of the present one."""
        ...

    def detach(self, device: AttachedHandle) -> None:
        """Detach the device from the address space."""
        ...

    def neighbours(self) -> Iterable[Handle]:
        """Return the open devices whose lock is the lock of this device."""
        ...


class AttachedHandle(BoundHandle):
    """The base of `Device`: a handle with an owner and an address space."""

    bdf: str
    attachment: Attachment
    """The owner and the address space. For the library."""
    owner: DmaOwner
    """The handle through which the device was opened: a Group or an Iommufd. For the library."""

    @property
    def space(self) -> Container | Ioas:
        """The address space of the device: a Container or an Ioas, to map memory for the DMA of the device.

        Raises ClosedError, and VfioError while the device is detached. Raises UnsupportedError for a device in no-IOMMU
        mode: see `unsafe_noiommu`.
        """
        if self.attachment.unsafe is not None:
            raise no_protection(self.bdf, "the device has no address space")
        space = self.attachment.space
        if not self.closed and space is not None:
            return space
        if self.closed or self.iommufd is None:
            raise ClosedError(f"device {self.bdf} has been closed")
        raise VfioError(
            f"{self.bdf} is attached to no address space", hint="Call device.attach(space) with an Ioas of the iommufd"
        )

    @property
    def container(self) -> Container:
        """The container of the device's group, which is `space` too.

        Raises ClosedError, and VfioError for a device on an iommufd. Raises as `space` in no-IOMMU mode.
        """
        if self.attachment.unsafe is not None:
            raise no_protection(self.bdf, "the device is in no container with an IOMMU")
        container = self.attachment.container
        if self.closed or container is None:
            raise ClosedError(f"device {self.bdf} has been closed")
        return container

    @property
    def unsafe_noiommu(self) -> UnsafeNoIommu:
        """The memory with physical addresses of a device that was opened WITHOUT PROTECTION, in no-IOMMU mode.

        Raises VfioError for a device with an IOMMU, and ForkedError in a child.
        """
        self.guard.check()
        if (unsafe := self.attachment.unsafe) is None:
            raise VfioError(
                f"{self.bdf} has an IOMMU, which translates all addresses of the device",
                hint="device.space is the address space of the device",
            )
        return unsafe

    @property
    def group(self) -> Group:
        """The IOMMU group through which the device was opened. Raises VfioError for a device on an iommufd."""
        return self.attachment.group

    @property
    def group_number(self) -> int:
        """The number of the device's IOMMU group. Raises VfioError for a device without a group."""
        return self.attachment.group_number

    @property
    def iommufd(self) -> Iommufd | None:
        """The iommufd to which the device is bound; None for a device that was opened through a group."""
        return self.attachment.iommufd

    @property
    def dev_id(self) -> int | None:
        """The number of the device in the iommufd, for the methods of `Iommufd`.

        None for a device that was opened through a group, and for a descriptor that was bound elsewhere.
        """
        return self.attachment.dev_id

    @guarded
    def attach(self, space: Ioas) -> None:
        """Attach the device to another address space of the iommufd, in place of the present one.

        The device moves in one ioctl: each access uses the one space or the other, or fails. Some drivers of IOMMUs
        (Intel, AMD) stop all DMA of the device for the moment of the move. The attached devices of the same IOMMU group
        move too, since the kernel has one page table for the group. If the device is detached, no other device moves.

        Raises TypeError; ValueError for a space of another iommufd; ClosedError. Raises UnsupportedError for a device
        that was opened through a group, and where the IOMMU cannot move a device (virtio-iommu before Linux 7): there,
        first call `detach` of each attached device of the group. Raises VfioError for a detached device if another
        device of the group is attached to another space. Raises IoctlError and IovaRangeError; the device then stays
        where it was. If the undo fails too, RollbackError is raised, and the device is detached.
        Cost: the kernel pins the memory of a space when the first device is attached.
        Source: VFIO_DEVICE_ATTACH_IOMMUFD_PT, `iommufd_device_replace`.
        """
        self.check_usable()
        self.attachment.attach(self, space)

    @guarded
    def detach(self) -> None:
        """Detach the device from the address space: DMA fails until `attach`. Does nothing if already detached.

        Mappings stay in the space. While another device of the IOMMU group is attached, the kernel leaves the page
        table of the group in place, and the DMA of this device still reaches the space.

        Raises ClosedError, IoctlError. Raises UnsupportedError for a device that was opened through a group.
        Source: VFIO_DEVICE_DETACH_IOMMUFD_PT.
        """
        self.check_usable()
        self.attachment.detach(self)

    def _join(self) -> None:
        """Attach the device, and enter the device in the owner.

        The lock of the owner is held, so that no reset of the bus is in progress.
        """
        with holding(self.owner):
            check_not_open(self.attachment, self.bdf)
            self.attachment.enter(self)
            self.owner.devices.append(self)

    def release_fd(self) -> int:
        """Release the descriptor as `Handle.release_fd`, and remove the device from its owner."""
        if self in self.owner.devices:
            self.owner.devices.remove(self)
        self.attachment.note_released(self)
        return super().release_fd()


def check_not_open(attachment: Attachment, bdf: str) -> None:
    """Raise VfioError if the owner has an open Device of that address: neither would see the changes of the other."""
    owner = attachment.owner
    owner.check_here()
    if any(isinstance(device, AttachedHandle) and device.bdf == bdf for device in tuple(owner.devices)):
        raise VfioError(
            f"device {bdf} is open already in {owner.guard.what}",
            hint=f"Use the Device in {'iommufd' if attachment.iommufd else 'group'}.devices, or close() that one first",
        )


class GroupAttachment:
    """The attachment of a device that was opened through a group."""

    __slots__ = ("group",)

    dev_id = None
    iommufd = None
    unsafe: UnsafeNoIommu | None = None

    def __init__(self, group: Group) -> None:
        self.group = group

    @property
    def owner(self) -> Group:
        """As `Attachment.owner`."""
        return self.group

    @property
    def group_number(self) -> int:
        """As `Attachment.group_number`."""
        return self.group.number

    @property
    def space(self) -> Container | None:
        """As `Attachment.space`: the container of the group."""
        return self.group.container

    @property
    def container(self) -> Container | None:
        """As `Attachment.container`."""
        return self.group.container

    @property
    def place(self) -> str:
        """As `Attachment.place`."""
        return f"in group {self.group.number}"

    def open(self, bdf: str, vf_token: UUID | str | None) -> int:
        """As `Attachment.open`."""
        return self.group.get_device_fd(bdf, vf_token=vf_token)

    def adopt(self, bdf: str, fd: int) -> None:
        """As `Attachment.adopt`. Raises ValueError for a group without a container."""
        del bdf, fd
        if self.group.container is None:
            raise ValueError(
                f"IOMMU group {self.group.number} is in no Container: attach() the group, or use Container.from_fd()"
            )

    def enter(self, device: AttachedHandle) -> None:
        """As `Attachment.enter`. The container of the group has the device already."""

    retract = leave = note_closing = note_released = enter

    def note_closed(self, device: AttachedHandle) -> None:
        """As `Attachment.note_closed`. With the last device, the group leaves the container."""
        del device
        group, container = self.group, self.group.container
        if group.leaves and not group.devices and container is not None and not container.must_stay(group):
            close_now(group)

    def attach(self, device: AttachedHandle, space: Ioas) -> None:
        """As `Attachment.attach`. Raises UnsupportedError."""
        del space
        raise _has_group(device, "moved to another address space")

    def detach(self, device: AttachedHandle) -> None:
        """As `Attachment.detach`. Raises UnsupportedError."""
        raise _has_group(device, "detached alone")

    def neighbours(self) -> Iterable[Handle]:
        """As `Attachment.neighbours`: the devices of all groups in the container."""
        return [] if (container := self.group.container) is None else devices_of(container)


def _has_group(device: AttachedHandle, refused: str) -> UnsupportedError:
    return UnsupportedError(
        f"{device.bdf} was opened through an IOMMU group, and cannot be {refused}",
        hint='Open the device with open_device(..., iommu="iommufd"). Or close the devices of the group, and move the '
        "group: Container.detach and attach",
    )


def devices_of(space: Container | Ioas | UnsafeNoIommu) -> list[Handle]:
    """Return the open devices of an address space: of all groups in a container, or those attached to an Ioas."""
    if isinstance(space, Container):
        return [device for group in tuple(space.groups.values()) for device in tuple(group.devices)]
    return list(space.devices)
