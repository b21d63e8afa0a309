"""Containers and groups: who holds whom, and until when.

A device descriptor holds its group, a group its container: closing the container's descriptor alone unmaps nothing,
and when the last group has left everything is unmapped.

Source: drivers/vfio/container.c and group.c (vfio_main.c and vfio.c before 6.2).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from pyvfio import ioctls
from pyvfio.testing.fake.device import PciDevice, is_vfio_driver
from pyvfio.testing.fake.feature import DeviceFeatures
from pyvfio.testing.fake.hot_reset import Buses, HotReset
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.pins import Pins
from pyvfio.testing.fake.process import Argument, BufferArgument, refuse
from pyvfio.testing.fake.sriov import Functions, check_token, parse_options
from pyvfio.testing.fake.type1 import Type1
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import PAGE_SIZE

_NAME_MAX = PAGE_SIZE  # strndup_user(arg, PAGE_SIZE)
_OWNERLESS = frozenset((None, "pci-stub", "pcieport"))  # drivers that do no DMA of their own (driver_managed_dma)


class Handler(Protocol):
    """The object behind a descriptor."""

    def ioctl(self, request: int, argument: Argument) -> int:
        """Answer a request; OSError with the kernel's errno."""
        ...

    def request_name(self, request: int) -> str:
        """What the request is called on this kind of descriptor."""
        ...

    def release(self, fd: int) -> None:
        """The descriptor was closed, the last of its open file."""
        ...

    def live_on(self, fd: int, other: int) -> None:
        """The descriptor was closed, and `other` is one of the same open file."""
        ...


class Machine(Protocol):
    """Whose IOMMU it is."""

    @property
    def iommu(self) -> IommuModel:
        """As it is now: the module's parameters can be changed at any time."""
        ...


class Container:
    """`struct vfio_container`: groups, and an IOMMU while there is a group."""

    def __init__(self, *, version: KernelVersion, machine: Machine, pins: Pins) -> None:
        self._version = version
        self._machine = machine
        self._pins = pins
        self.groups: list[Group] = []
        self.iommu: Type1 | None = None
        self._requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_GET_API_VERSION: ("VFIO_GET_API_VERSION", lambda _argument: ioctls.VFIO_API_VERSION),
            ioctls.VFIO_CHECK_EXTENSION: ("VFIO_CHECK_EXTENSION", self.check_extension),
            ioctls.VFIO_SET_IOMMU: ("VFIO_SET_IOMMU", self.set_iommu),
        }
        # Before an IOMMU is set these are known by name alone.
        self._iommu_names = {
            ioctls.VFIO_IOMMU_GET_INFO: "VFIO_IOMMU_GET_INFO",
            ioctls.VFIO_IOMMU_MAP_DMA: "VFIO_IOMMU_MAP_DMA",
            ioctls.VFIO_IOMMU_UNMAP_DMA: "VFIO_IOMMU_UNMAP_DMA",
            ioctls.VFIO_IOMMU_DIRTY_PAGES: "VFIO_IOMMU_DIRTY_PAGES",
        }

    def request_name(self, request: int) -> str:
        """The C name, or the number."""
        own = self._requests.get(request)
        return own[0] if own else self._iommu_names.get(request, hex(request))

    def ioctl(self, request: int, argument: Argument) -> int:
        """`vfio_fops_unl_ioctl`: what is unknown goes to the IOMMU (ENOTTY), EINVAL while there is none."""
        if self.iommu is not None:
            found = self.iommu.requests.get(request)
            if found is not None:
                return found[1](argument)
        found = self._requests.get(request)
        if found is None:
            refuse(errno.EINVAL if self.iommu is None else errno.ENOTTY)
        return found[1](argument)

    def release(self, fd: int) -> None:
        """Groups hold the container: nothing happens."""

    def live_on(self, fd: int, other: int) -> None:
        """Nor here."""

    def check_extension(self, argument: Argument) -> int:
        """`vfio_ioctl_check_extension`; never fails."""
        extension = argument.value
        if self.iommu is not None and extension == ioctls.VFIO_UPDATE_VADDR:
            return 1
        if self.iommu is not None and extension == ioctls.VFIO_DMA_CC_IOMMU:
            return int(self._machine.iommu.dma_is_coherent)
        if extension == ioctls.VFIO_TYPE1_NESTING_IOMMU:
            return int(self._version.nesting)
        return int(extension in (ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU, ioctls.VFIO_UNMAP_ALL))

    def set_iommu(self, argument: Argument) -> int:
        """`vfio_ioctl_set_iommu`: EINVAL (no group, or set already), ENODEV (nobody knows the type)."""
        if not self.groups or self.iommu is not None:
            refuse(errno.EINVAL)
        kind = argument.value
        if kind == ioctls.VFIO_UNMAP_ALL:
            refuse(errno.EINVAL)  # an extension that type1 has, and no type that it opens
        if not self.check_extension(argument):
            refuse(errno.ENODEV)
        if kind == ioctls.VFIO_TYPE1_NESTING_IOMMU and not self._machine.iommu.nests:
            refuse(errno.EINVAL)  # iommu_enable_nesting
        v2 = kind != ioctls.VFIO_TYPE1_IOMMU
        self.iommu = Type1(version=self._version, model=self._machine.iommu, pins=self._pins, v2=v2)
        return 0

    def attach(self, group: Group) -> None:
        """`vfio_container_attach_group`: EBUSY while a mapping has no address."""
        if self.iommu is not None and self.iommu.has_invalid_vaddr:
            refuse(errno.EBUSY)
        self.groups.append(group)

    def detach(self, group: Group) -> None:
        """`vfio_group_detach_container`: without a group there is no IOMMU, and nothing is mapped."""
        self.groups.remove(group)
        if not self.groups and self.iommu is not None:
            self.iommu.release()
            self.iommu = None


class Group:
    """`struct vfio_group`: opened once at a time; open as long as one of its devices is."""

    def __init__(self, number: int, devices: Sequence[PciDevice], files: DescriptorTable) -> None:
        self.number = number
        self.devices = tuple(devices)
        self.container: Container | None = None
        self.fd: int | None = None
        self._files = files
        self._features: dict[str, DeviceFeatures] = {}
        self._requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_GROUP_GET_STATUS: ("VFIO_GROUP_GET_STATUS", self.get_status),
            ioctls.VFIO_GROUP_SET_CONTAINER: ("VFIO_GROUP_SET_CONTAINER", self.set_container),
            ioctls.VFIO_GROUP_UNSET_CONTAINER: ("VFIO_GROUP_UNSET_CONTAINER", self.unset_container),
            ioctls.VFIO_GROUP_GET_DEVICE_FD: ("VFIO_GROUP_GET_DEVICE_FD", self.get_device_fd),
        }

    @property
    def busy(self) -> bool:
        """Open, or a device of it is."""
        return self.fd is not None or self.has_open_device

    @property
    def has_open_device(self) -> bool:
        """Whether a device descriptor is left."""
        return any(device.descriptors for device in self.devices)

    @property
    def viable(self) -> bool:
        """Whether no device of it belongs to a kernel driver."""
        return all(device.driver in _OWNERLESS or is_vfio_driver(device.driver) for device in self.devices)

    def request_name(self, request: int) -> str:
        """The C name, or the number."""
        return self._requests[request][0] if request in self._requests else hex(request)

    def ioctl(self, request: int, argument: Argument) -> int:
        """`vfio_group_fops_unl_ioctl`: ENOTTY for what is unknown."""
        found = self._requests.get(request)
        if found is None:
            refuse(errno.ENOTTY)
        return found[1](argument)

    def release(self, fd: int) -> None:
        """The group's descriptor was closed; devices that are open keep all as it is."""
        if fd == self.fd:
            self.fd = None
        self.device_closed()

    def live_on(self, fd: int, other: int) -> None:
        """It stays open by the other one."""
        if fd == self.fd:
            self.fd = other

    def device_closed(self) -> None:
        """Leave the container when nothing of the group is open."""
        if not self.busy:
            self._leave()

    def _leave(self) -> None:
        if self.container is not None:
            self.container.detach(self)
            self.container = None

    def get_status(self, argument: Argument) -> int:
        """`vfio_group_ioctl_get_status`: EFAULT, EINVAL."""
        argsz, _flags = struct.unpack("=II", argument.read(8))
        if argsz < 8:
            refuse(errno.EINVAL)
        flags = int(ioctls.VFIO_GROUP_FLAGS_VIABLE) if self.viable else 0
        if self.container is not None:
            flags = int(ioctls.VFIO_GROUP_FLAGS_VIABLE | ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET)
        argument.write(struct.pack("=II", argsz, flags))
        return 0

    def set_container(self, argument: Argument) -> int:
        """`vfio_group_ioctl_set_container`: EFAULT, EBADF, EINVAL (has one), not a container, EPERM (not viable)."""
        (fd,) = struct.unpack("=i", argument.read(4))
        container = self._files.container(fd)
        if self.container is not None:
            refuse(errno.EINVAL)
        if container is None:
            refuse(self._files.version.not_a_container)
        if not self.viable:
            refuse(errno.EPERM)
        container.attach(self)
        self.container = container
        return 0

    def unset_container(self, _argument: Argument) -> int:
        """`vfio_group_ioctl_unset_container`: EINVAL (none), EBUSY (a device is open)."""
        if self.container is None:
            refuse(errno.EINVAL)
        if self.has_open_device:
            refuse(errno.EBUSY)
        self._leave()
        return 0

    def get_device_fd(self, argument: Argument) -> int:
        """`vfio_group_ioctl_get_device_fd`: EFAULT, EINVAL (no end of string), ENODEV, EINVAL or EACCES (the token),
        EMFILE, EINVAL (no IOMMU)."""
        device = self._match(_read_name(argument))
        fd = device.open()
        if self.container is None or self.container.iommu is None:
            os.close(fd)
            refuse(errno.EINVAL)
        self._files.adopt(fd, DeviceHandle(device, self._features_of(device), self, HotReset(device, self._files)))
        device.hold(fd)
        return fd

    def _features_of(self, device: PciDevice) -> DeviceFeatures:
        if device.bdf not in self._features:
            self._features[device.bdf] = DeviceFeatures(device, self._files.version)
        return self._features[device.bdf]

    def _match(self, text: str) -> PciDevice:
        # vfio_pci_core_match: a name, and after a space options.
        for device in self.devices:
            name, options = text[: len(device.bdf)], text[len(device.bdf) :]
            if device.bdf == name and options[:1] in ("", " ") and is_vfio_driver(device.driver):
                check_token(device, parse_options(options), self._files)
                return device
        return refuse(errno.ENODEV)


def _read_name(argument: Argument) -> str:
    limit = min(argument.size, _NAME_MAX) if isinstance(argument, BufferArgument) else _NAME_MAX
    name = b""
    while len(name) < limit:
        byte = argument.read(1, len(name))
        if byte == b"\0":
            return name.decode("utf-8", "replace")
        name += byte
    if limit < _NAME_MAX:
        raise BufferError("the kernel reads behind the buffer: the device's name has no NUL at its end")
    return refuse(errno.EINVAL)


class DeviceHandle:
    """A descriptor of a device: several may be open, each holds the group."""

    def __init__(self, device: PciDevice, features: DeviceFeatures, group: Group, hot_reset: HotReset) -> None:
        self.device = device
        self.group = group
        self._features = features
        self._requests = {**device.requests, **features.requests, **hot_reset.requests}

    def _find(self, request: int) -> tuple[str, Callable[[Argument], int]] | None:
        return self._requests.get(request)

    def request_name(self, request: int) -> str:
        """The C name, or the number."""
        found = self._find(request)
        return hex(request) if found is None else found[0]

    def ioctl(self, request: int, argument: Argument) -> int:
        """`vfio_pci_core_ioctl`: ENOTTY for what is unknown. Each of them wakes the device up."""
        self.device.power.resume()
        found = self._find(request)
        if found is None:
            refuse(errno.ENOTTY)
        return found[1](argument)

    def release(self, fd: int) -> None:
        """The descriptor was closed."""
        self.device.release(fd)
        if not self.device.descriptors:
            self._features.release()
        self.group.device_closed()
        if not self.device.descriptors:  # what the container has now outlives the device
            self.device.on_bars_gone("the last close", self.device.bdf)

    def live_on(self, fd: int, other: int) -> None:
        """It stays open by the other one."""
        self.device.hold(other)
        self.device.descriptors.discard(fd)


def device_behind(handler: Handler) -> PciDevice:
    """The device that a descriptor is of; EINVAL where it is of something else."""
    if not isinstance(handler, DeviceHandle):
        refuse(errno.EINVAL)
    return handler.device


class DescriptorTable(Buses, Functions, Protocol):
    """What a group needs of the kernel that it is in: other descriptors, and other devices."""

    def container(self, fd: int) -> Container | None:
        """The container behind a descriptor, None when it is another file; EBADF when it is not open."""
        ...

    def adopt(self, fd: int, handler: Handler) -> None:
        """From now on `handler` answers for `fd`."""
        ...
