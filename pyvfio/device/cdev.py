"""Devices that are opened by nodes of their own, /dev/vfio/devices/vfioN, bound to an iommufd and attached to a space.

The devices of one IOMMU group share the page table of the IOMMU. So a move of a device moves the open devices of the
group, and a detached device reaches the space while another device of the group is attached there.

Source: drivers/vfio/device_cdev.c; drivers/iommu/iommufd/device.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pyvfio import ioctls, pci
from pyvfio.container import Container, Group
from pyvfio.device.attachment import AttachedHandle, Attachment, GroupAttachment
from pyvfio.errors import IoctlError, RollbackError, UnsupportedError, VfioError, as_exception
from pyvfio.handle import Handle, attempt
from pyvfio.ioas import Ioas
from pyvfio.iommufd import Iommufd
from pyvfio.kernel import IoctlArgument, Kernel
from pyvfio.pci.cdevs import cdev_node, explain_bind, explain_cdev, no_cdev
from pyvfio.pci.noiommu import is_unprotected, no_protection

if TYPE_CHECKING:
    from uuid import UUID

    from pyvfio.noiommu import UnsafeNoIommu

_BIND, _INFO = ioctls.VFIO_DEVICE_BIND_IOMMUFD, ioctls.VFIO_DEVICE_GET_INFO


class CdevAttachment:
    """The attachment of a device that was opened by the device's own node."""

    unsafe: UnsafeNoIommu | None = None

    def __init__(self, space: Ioas) -> None:
        self.iommufd: Iommufd = space.iommufd
        """The iommufd to which the device is bound."""
        self.space: Ioas | None = space
        """The address space; None while the device is detached."""
        self.dev_id: int | None = None
        """The number of the device in the iommufd. None for a descriptor that was bound elsewhere."""
        self._bdf = ""
        self._group: int | None = None

    @property
    def owner(self) -> Iommufd:
        """As `Attachment.owner`."""
        return self.iommufd

    @property
    def group(self) -> Group:
        """As `Attachment.group`. Raises VfioError."""
        raise VfioError(
            f"{self._bdf} was opened by a node of its own, without the IOMMU group",
            hint="device.group_number is the number of the group",
        )

    @property
    def group_number(self) -> int:
        """As `Attachment.group_number`. Raises VfioError for a device without an IOMMU."""
        if self._group is None:
            raise VfioError(f"{self._bdf} is in no IOMMU group")
        return self._group

    @property
    def container(self) -> Container | None:
        """As `Attachment.container`. Raises VfioError."""
        raise VfioError(
            f"{self._bdf} was opened by a node of its own, and is in no container of type1",
            hint="device.space is the address space of the device",
        )

    @property
    def place(self) -> str:
        """As `Attachment.place`."""
        return "in no address space" if self.space is None else f"in I/O address space {self.space.id}"

    def neighbours(self) -> Iterable[Handle]:
        """As `Attachment.neighbours`: all devices of the iommufd."""
        return tuple(self.iommufd.devices)

    # ------------------------------------------------------------------------------------------------ open

    def open(self, bdf: str, vf_token: UUID | str | None) -> int:
        """Open the node and bind the device to the iommufd. Raises as `Device`."""
        kernel = self.iommufd.kernel
        token = None if vf_token is None else pci.parse_vf_token(vf_token).bytes
        self._know(bdf)
        path = cdev_node(bdf, kernel=kernel)
        if path is None:
            raise no_cdev(kernel, bdf)
        try:
            fd = kernel.open(str(path), os.O_RDWR)
        except OSError as error:
            raise explain_cdev(kernel, bdf, path, error) from error
        try:
            self._bind(fd, token)
        except BaseException:
            kernel.close(fd)
            raise
        return fd

    def _know(self, bdf: str) -> None:
        device = pci.read_device(bdf, kernel=self.iommufd.kernel)
        self._check_protected(device)
        self._bdf, self._group = bdf, device.iommu_group

    def _check_protected(self, device: pci.PciDevice) -> None:
        if is_unprotected(self.iommufd.kernel, device):
            raise no_protection(device.bdf, "no address space confines the device")

    def adopt(self, bdf: str, fd: int) -> None:
        """Bind the descriptor, unless a launcher or a former program has bound the descriptor already.

        Before a bind, each other request is EINVAL (`vfio_device_fops_unl_ioctl`), as on a container without an IOMMU.
        """
        self._know(bdf)
        info = ioctls.vfio_device_info(argsz=ctypes.sizeof(ioctls.vfio_device_info))
        if self._is_invalid(fd, _INFO, info) and self._is_invalid(fd, ioctls.VFIO_GET_API_VERSION):
            self._bind(fd, None)

    def _is_invalid(self, fd: int, request: int, argument: IoctlArgument = 0) -> bool:
        """Return whether a request is EINVAL."""
        try:
            self.iommufd.kernel.ioctl(fd, request, argument)
        except OSError as error:
            return error.errno == errno.EINVAL
        return False

    def _bind(self, fd: int, token: bytes | None) -> None:
        kernel, iommufd = self.iommufd.kernel, self.iommufd.fd
        argument = ioctls.vfio_device_bind_iommufd(argsz=ioctls.VFIO_DEVICE_BIND_IOMMUFD_MINSZ, iommufd=iommufd)
        uuid = ctypes.create_string_buffer(token or b"", 16)
        if token is not None:
            argument.argsz = ctypes.sizeof(argument)
            argument.flags = ioctls.VFIO_DEVICE_BIND_FLAG_TOKEN
            argument.token_uuid_ptr = ctypes.addressof(uuid)
        try:
            kernel.ioctl(fd, _BIND, argument)
        except OSError as error:
            raise (
                _explain_token(kernel, self._bdf, fd, error, has_token=token is not None)
                or explain_bind(kernel, self._bdf, error, iommufd=iommufd)
            ) from error
        self.dev_id = argument.out_devid

    # ------------------------------------------------------------------------------------------------ attach

    def enter(self, device: AttachedHandle) -> None:
        """As `Attachment.enter`. Raises VfioError if another device of the group is attached elsewhere."""
        if (space := self.space) is None:
            return
        space.check_usable()
        self._check_siblings(space)
        space.attach_device(device)
        try:
            if here := self._is_here(space):
                space.note_attached(device)
        except BaseException as error:
            _undo(self._bdf, error, [partial(_detach, device)])
            raise
        if not here:
            raise ValueError(f"the descriptor of {self._bdf} is bound to another iommufd than that of the space")

    def _is_here(self, space: Ioas) -> bool:
        """Return whether the device, which was attached to `space`, is bound to the iommufd.

        A descriptor that was bound elsewhere can be bound to another iommufd. The kernel then attached the device to a
        space of the same number there, which has perhaps been the space of the device. Without a device, the alignment
        is 1.
        """
        return self.dev_id is not None or self.iommufd.ioas_iova_ranges(space.id)[1] != 1

    def _siblings(self) -> list[tuple[AttachedHandle, CdevAttachment]]:
        """Return the open devices of the IOMMU group that are bound to the iommufd and attached, without this one."""
        found = [(each, each.attachment) for each in self.neighbours() if isinstance(each, AttachedHandle)]
        return [
            (device, other)
            for device, other in found
            if isinstance(other, CdevAttachment)
            and other is not self
            and other.space is not None
            and other._group == self._group is not None
        ]

    def _check_siblings(self, space: Ioas) -> None:
        for device, sibling in self._siblings():
            if sibling.space is not None and sibling.space is not space:
                raise VfioError(
                    f"{self._bdf} cannot be attached to {space.guard.what}: {device.bdf}, of the same IOMMU group "
                    f"{self._group}, is attached to {sibling.space.guard.what}",
                    hint="All devices of an IOMMU group use one address space: pass the space of the other device",
                )

    def attach(self, device: AttachedHandle, space: Ioas) -> None:
        """As `Attachment.attach`."""
        if not isinstance(space, Ioas):
            raise TypeError(f"space must be an Ioas, not {type(space).__name__}")
        self.iommufd.check_here()
        if space.iommufd is not self.iommufd:
            raise ValueError(
                f"{self._bdf} is bound to another iommufd than that of the space: make the space with "
                "Ioas(device.iommufd)"
            )
        space.check_usable()
        if self.space is None:
            self._check_siblings(space)
        moved = [(device, self), *(self._siblings() if self.space is not None else [])]
        space.attach_device(device)
        try:
            for each, _attachment in moved:
                space.note_attached(each)
        except BaseException as error:
            self._return(device, space, moved, error)
            raise
        for each, attachment in moved:
            former, attachment.space = attachment.space, space
            if former is not None and former is not space:
                former.note_detached(each)

    def _return(
        self,
        device: AttachedHandle,
        space: Ioas,
        moved: Sequence[tuple[AttachedHandle, CdevAttachment]],
        error: BaseException,
    ) -> None:
        steps: list[Callable[[], object]] = [partial(self._put_back, device, moved)]
        steps += [partial(space.note_detached, each) for each, attachment in moved if attachment.space is not space]
        _undo(self._bdf, error, steps)

    def _put_back(self, device: AttachedHandle, moved: Sequence[tuple[AttachedHandle, CdevAttachment]]) -> None:
        """Attach the device as before. If the kernel refuses, detach the devices: none reaches another space then."""
        if self.space is None:
            _detach(device)
            return
        try:
            self.space.attach_device(device)
        except BaseException:
            for each, attachment in moved:
                attempt(partial(attachment.detach, each), [])
            raise

    def detach(self, device: AttachedHandle) -> None:
        """As `Attachment.detach`."""
        if self.space is not None:
            self.iommufd.check_here()
            _detach(device)
            self.leave(device)

    def leave(self, device: AttachedHandle) -> None:
        """As `Attachment.leave`. The space reads the ranges again, which may now be wider."""
        space, self.space = self.space, None
        if space is not None:
            space.note_detached(device)

    def note_closed(self, device: AttachedHandle) -> None:
        """As `Attachment.note_closed`. With the last device, an iommufd ends whose spaces are closed."""
        self.leave(device)
        self.iommufd.end_unused()

    def note_closing(self, device: AttachedHandle) -> None:
        """As `Attachment.note_closing`."""
        if self.space is not None:
            _detach(device)

    def retract(self, device: AttachedHandle) -> None:
        """As `Attachment.retract`. The descriptor stays bound: only a close unbinds."""
        self.detach(device)

    def note_released(self, device: AttachedHandle) -> None:
        """As `Attachment.note_released`."""
        if self.space is not None and device in self.space.devices:
            self.space.devices.remove(device)


class ResumedAttachment(CdevAttachment):
    """The attachment of a device that a former process has bound, and attached to the space.

    `adopt`, `enter` and `retract` make no call that binds, attaches or detaches.
    """

    def __init__(self, space: Ioas, dev_id: int | None) -> None:
        super().__init__(space)
        self.dev_id = dev_id

    def adopt(self, bdf: str, fd: int) -> None:
        """As `Attachment.adopt`."""
        del fd
        self._know(bdf)

    def enter(self, device: AttachedHandle) -> None:
        """As `Attachment.enter`."""
        if (space := self.space) is not None:
            space.note_attached(device)

    def retract(self, device: AttachedHandle) -> None:
        """As `Attachment.retract`. The device stays attached."""
        self.leave(device)


def _detach(device: AttachedHandle) -> None:
    argument = ioctls.vfio_device_detach_iommufd_pt(argsz=ioctls.VFIO_DEVICE_DETACH_IOMMUFD_PT_MINSZ)
    device.ioctl("VFIO_DEVICE_DETACH_IOMMUFD_PT", argument)


def _undo(bdf: str, error: BaseException, steps: Iterable[Callable[[], object]]) -> None:
    """Make the calls that undo an attach. Raises RollbackError, after all calls, if one fails."""
    failures: list[Exception] = []
    for step in steps:
        attempt(step, failures)
    if failures:
        raise RollbackError(
            f"{bdf} could not be attached, and could not be put back",
            [as_exception(error), *failures],
            hint="Attach the device once more, or close the device: the close detaches the device",
        ) from error


def attachment_through(through: Group | Ioas) -> Attachment:
    """Return the attachment of a device that is opened through a group, or to an Ioas. Raises TypeError."""
    if isinstance(through, Group):
        return GroupAttachment(through)
    if isinstance(through, Ioas):
        return CdevAttachment(through)
    raise TypeError(f"a device is opened through a Group or an Ioas, not {type(through).__name__}")


# -------------------------------------------------------------------------------------------------------- the VF token


def _explain_token(kernel: Kernel, bdf: str, fd: int, error: OSError, *, has_token: bool) -> VfioError | None:
    """Return the error for a bind that the kernel refused because of the VF token, or None for other reasons."""
    if error.errno == errno.EINVAL and has_token:
        if not _knows_tokens(kernel, fd):
            return UnsupportedError(
                f"this kernel takes no VF token for a node of {bdf}: Linux 6.17 is the first that does",
                hint='Open the device through the group: open_device(..., iommu="type1", vf_token=…)',
            )
        hint = "Leave vf_token out unless the driver vfio-pci has the physical function of the device, too"
    elif error.errno == errno.EACCES:
        hint = _why_no_access(kernel, bdf, has_token=has_token)
    else:
        return None
    return IoctlError.of(
        error,
        f"{bdf} could not be bound to the iommufd",
        request="VFIO_DEVICE_BIND_IOMMUFD",
        arguments={"device": bdf, **({"vf_token": "given"} if has_token else {})},
        hint=hint,
    )


def _why_no_access(kernel: Kernel, bdf: str, *, has_token: bool) -> str:
    physical = pci.physical_function(bdf, kernel=kernel)
    if physical is None:
        return f"Virtual functions of {bdf} are open: pass the token with which they were opened as vf_token"
    return (
        f"vfio-pci also drives {physical}, the physical function of {bdf}, and so asks for "
        f"{'another' if has_token else 'a'} vf_token: the token that the program with {physical} set last"
    )


def _knows_tokens(kernel: Kernel, fd: int) -> bool:
    """Return whether a bind takes a VF token.

    Such a kernel refuses a structure with an unknown part, before anything else, with E2BIG (`copy_struct_from_user`).
    Older kernels read 16 bytes, and refuse the descriptor -1 with EINVAL.
    """
    probe = bytearray(ctypes.sizeof(ioctls.vfio_device_bind_iommufd) + 8)
    head = ioctls.vfio_device_bind_iommufd(argsz=len(probe), iommufd=-1)
    probe[: ctypes.sizeof(head)] = bytes(head)
    probe[-1] = 1
    try:
        kernel.ioctl(fd, _BIND, probe)
    except OSError as error:
        return error.errno == errno.E2BIG
    return False
