"""A device's own node, /dev/vfio/devices/vfioN: bound to an iommufd, and attached to an address space.

Source: drivers/vfio/device_cdev.c and iommufd.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import Protocol

from pyvfio import ioctls
from pyvfio.testing.fake.device import PciDevice
from pyvfio.testing.fake.group import DescriptorTable, DeviceHandle, Group
from pyvfio.testing.fake.hot_reset import HotReset
from pyvfio.testing.fake.hwpt import BoundDevice
from pyvfio.testing.fake.iommufd import Iommufd
from pyvfio.testing.fake.process import Argument, read_memory, refuse
from pyvfio.testing.fake.sriov import check_token

_BIND = struct.Struct("=IIiI")
_TOKEN = struct.Struct("=Q")
_ATTACH = struct.Struct("=III")
_DETACH = struct.Struct("=II")
_PASID = int(ioctls.VFIO_DEVICE_ATTACH_PASID)  # VFIO_DEVICE_DETACH_PASID has the same number
_OUT_DEVID = 12
_PT_ID = 8


class Nodes(DescriptorTable, Protocol):
    """The services that a device node needs from the machine."""

    def iommufd(self, fd: int) -> Iommufd | None:
        """Return the iommufd behind a descriptor, or None for another file. Raises EBADF if `fd` is not open."""
        ...


class Cdev(DeviceHandle):
    """An open device node. Before VFIO_DEVICE_BIND_IOMMUFD every other request is EINVAL.

    `fd` is the memory of the device. `node` is the file in the tree, which stays open as long as the device: /proc
    shows who has the node open.
    """

    def __init__(self, device: PciDevice, group: Group, nodes: Nodes, fd: int, node: int) -> None:
        super().__init__(device, group.features_of(device), group, HotReset(device, nodes, self.owner))
        self.granted = False
        self._nodes = nodes
        self._fd = fd
        self._node = node
        self._iommufd: Iommufd | None = None
        self._bound: BoundDevice | None = None
        self._requests[ioctls.VFIO_DEVICE_BIND_IOMMUFD] = ("VFIO_DEVICE_BIND_IOMMUFD", self.bind)
        self._requests[ioctls.VFIO_DEVICE_ATTACH_IOMMUFD_PT] = ("VFIO_DEVICE_ATTACH_IOMMUFD_PT", self.attach)
        self._requests[ioctls.VFIO_DEVICE_DETACH_IOMMUFD_PT] = ("VFIO_DEVICE_DETACH_IOMMUFD_PT", self.detach)

    def owner(self) -> Iommufd | None:
        """Return the iommufd to which the device is bound."""
        return self._iommufd

    def ioctl(self, request: int, argument: Argument) -> int:
        """`vfio_device_fops_unl_ioctl`: EINVAL for all requests but a bind before the bind."""
        if request == ioctls.VFIO_DEVICE_BIND_IOMMUFD:
            return self.bind(argument)
        if not self.granted:
            refuse(errno.EINVAL)
        return super().ioctl(request, argument)

    def bind(self, argument: Argument) -> int:
        """`vfio_df_ioctl_bind_iommufd`: EFAULT, EINVAL, E2BIG (since 6.17), EINVAL, EBUSY (the group is open).

        Then EINVAL (bound already), EACCES (token), EBADF, EBADFD, EINVAL (bound by another descriptor), EPERM.
        """
        fd, token = self._read_bind(argument)
        if self.group.opened_as_group:
            refuse(errno.EBUSY)
        if self.granted:
            refuse(errno.EINVAL)
        if self._nodes.version.bind_structs:
            check_token(self.device, token, self._nodes)
        iommufd = self._nodes.iommufd(fd)
        if iommufd is None:
            refuse(errno.EBADFD)
        if self.device.descriptors:
            refuse(errno.EINVAL)
        bound = iommufd.bind(self.group, self.device)
        try:
            argument.write(struct.pack("=I", iommufd.number_of(bound)), _OUT_DEVID)
        except OSError:
            iommufd.unbind(bound)
            raise
        self._iommufd, self._bound, self.granted = iommufd, bound, True
        self.device.hold(self._fd)
        return 0

    def _read_bind(self, argument: Argument) -> tuple[int, bytes | None]:
        """Return the descriptor of the iommufd, and the token."""
        with_token = self._nodes.version.bind_structs
        if with_token and struct.unpack("=I", argument.read(4))[0] < _BIND.size:
            refuse(errno.EINVAL)
        argsz, flags, fd, _devid = _BIND.unpack(argument.read(_BIND.size))
        if argsz < _BIND.size:
            refuse(errno.EINVAL)
        pointer = 0
        if with_token:
            whole = _BIND.size + _TOKEN.size
            if argsz > whole and any(argument.read(argsz - whole, whole)):
                refuse(errno.E2BIG)
            tail = argument.read(min(argsz - _BIND.size, _TOKEN.size), _BIND.size)
            (pointer,) = _TOKEN.unpack(tail.ljust(_TOKEN.size, b"\0"))
        if flags & ~(ioctls.VFIO_DEVICE_BIND_FLAG_TOKEN if with_token else 0) or fd < 0:
            refuse(errno.EINVAL)
        return fd, read_memory(pointer, 16) if flags else None

    def attach(self, argument: Argument) -> int:
        """`vfio_df_ioctl_attach_pt`: EFAULT, EINVAL, then as `Iommufd.attach`. The page table's number is written."""
        argsz, flags, target = _ATTACH.unpack(argument.read(_ATTACH.size))
        with_pasid = self._check_flags(argument, argsz, flags, _ATTACH.size)
        iommufd, bound = self._attachable()
        if with_pasid:
            refuse(errno.EINVAL if target in iommufd.objects else errno.ENOENT)  # no device here has PASIDs
        number = iommufd.attach(bound, target)
        try:
            argument.write(struct.pack("=I", number), _PT_ID)
        except OSError:
            iommufd.detach(bound)
            raise
        return 0

    def detach(self, argument: Argument) -> int:
        """`vfio_df_ioctl_detach_pt`: EFAULT, EINVAL. Does nothing for a device that is not attached."""
        argsz, flags = _DETACH.unpack(argument.read(_DETACH.size))
        if not self._check_flags(argument, argsz, flags, _DETACH.size):
            iommufd, bound = self._attachable()
            iommufd.detach(bound)
        return 0

    def _check_flags(self, argument: Argument, argsz: int, flags: int, size: int) -> bool:
        """Return whether a PASID is given. EINVAL, EFAULT."""
        known = _PASID if self._nodes.version.bind_structs else 0
        if argsz < size or flags & ~known:
            refuse(errno.EINVAL)
        if flags and argsz < size + 4:
            refuse(errno.EINVAL)
        return bool(flags and argument.read(4, size))

    def _attachable(self) -> tuple[Iommufd, BoundDevice]:
        if self._iommufd is None or self._bound is None:
            refuse(errno.EINVAL)
        return self._iommufd, self._bound

    def release(self, fd: int) -> None:
        """`vfio_df_unbind_iommufd`: close the device, detach and unbind."""
        os.close(self._node)
        if self._iommufd is None or self._bound is None:
            return
        self.granted = False
        super().release(fd)
        iommufd, bound = self._iommufd, self._bound
        self._iommufd = self._bound = None
        iommufd.unbind(bound)

    def live_on(self, fd: int, other: int) -> None:
        """Keep the device open by `other`."""
        self._fd = other
        if self.granted:
            super().live_on(fd, other)
