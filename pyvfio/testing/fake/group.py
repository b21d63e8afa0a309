"""Containers and groups: which object holds which other one, and for how long.

A device descriptor holds the group, and a group holds the container. Closing the descriptor of the container alone
unmaps nothing. When the last group leaves, all mappings are unmapped.

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
from pyvfio.testing.fake.noiommu import NoIommu, knows_extension
from pyvfio.testing.fake.pins import Mapped, Pins
from pyvfio.testing.fake.process import Argument, BufferArgument, refuse
from pyvfio.testing.fake.sriov import Functions, check_token, parse_options
from pyvfio.testing.fake.type1 import DmaTable, Type1
from pyvfio.testing.fake.unmodelled import Unmodelled
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import PAGE_SIZE

_NAME_MAX = PAGE_SIZE  # strndup_user(arg, PAGE_SIZE)
_OWNERLESS = frozenset((None, "pci-stub", "pcieport"))  # drivers that do no DMA (driver_managed_dma)


class Handler(Protocol):
    """The object behind a descriptor."""

    def ioctl(self, request: int, argument: Argument) -> int:
        """Answer a request. Raises OSError with the kernel's errno."""
        ...

    def request_name(self, request: int) -> str:
        """Return the name of a request on this kind of descriptor."""
        ...

    def release(self, fd: int) -> None:
        """Handle the close of the last descriptor of an open file."""
        ...

    def live_on(self, fd: int, other: int) -> None:
        """Handle the close of a descriptor while `other`, of the same open file, stays open."""
        ...


class Machine(Protocol):
    """The machine with the IOMMU."""

    @property
    def iommu(self) -> IommuModel:
        """The current model: parameters of the module can change at any time."""
        ...

    @property
    def noiommu(self) -> NoIommu | None:
        """No-IOMMU mode of a machine without an IOMMU."""
        ...


class Translation(Protocol):
    """The translation between devices and memory: a type1 IOMMU, or a page table of iommufd."""

    @property
    def table(self) -> DmaTable:
        """The mappings."""
        ...

    def allows(self, entry: Mapped, *, write: bool) -> bool:
        """Return whether a device may read, or write, through a mapping."""
        ...

    def is_suspended(self, entry: Mapped) -> bool:
        """Return whether a mapping has no address for now."""
        ...

    def wrote(self, iova: int, size: int) -> None:
        """A device has written memory."""
        ...


class Claimed(Protocol):
    """The devices of a group that an iommufd has bound."""

    @property
    def owner(self) -> object:
        """The iommufd."""
        ...

    @property
    def translation(self) -> Translation | None:
        """The page table of the group."""
        ...


class Container:
    """`struct vfio_container`: groups, and an IOMMU while a group is attached."""

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
        # Until an IOMMU is set, the container knows only the names of these requests.
        self._iommu_names = {
            ioctls.VFIO_IOMMU_GET_INFO: "VFIO_IOMMU_GET_INFO",
            ioctls.VFIO_IOMMU_MAP_DMA: "VFIO_IOMMU_MAP_DMA",
            ioctls.VFIO_IOMMU_UNMAP_DMA: "VFIO_IOMMU_UNMAP_DMA",
            ioctls.VFIO_IOMMU_DIRTY_PAGES: "VFIO_IOMMU_DIRTY_PAGES",
        }

    def request_name(self, request: int) -> str:
        """Return the C name, or the number."""
        own = self._requests.get(request)
        return own[0] if own else self._iommu_names.get(request, hex(request))

    def ioctl(self, request: int, argument: Argument) -> int:
        """`vfio_fops_unl_ioctl`: passes unknown requests to the IOMMU (ENOTTY). EINVAL without an IOMMU."""
        if self.iommu is not None:
            found = self.iommu.requests.get(request)
            if found is not None:
                return found[1](argument)
        found = self._requests.get(request)
        if found is None:
            refuse(errno.EINVAL if self.iommu is None else errno.ENOTTY)
        return found[1](argument)

    def release(self, fd: int) -> None:
        """Do nothing, since groups hold the container."""

    def live_on(self, fd: int, other: int) -> None:
        """Do nothing, since groups hold the container."""

    def check_extension(self, argument: Argument) -> int:
        """`vfio_ioctl_check_extension`; never fails."""
        extension = argument.value
        answer = self._check_extension(extension)
        if (noiommu := self._machine.noiommu) is None:
            return answer
        return knows_extension(noiommu, extension, has_group=bool(self.groups), otherwise=answer)

    def _check_extension(self, extension: int) -> int:
        if self.iommu is not None and extension == ioctls.VFIO_UPDATE_VADDR:
            return 1
        if self.iommu is not None and extension == ioctls.VFIO_DMA_CC_IOMMU:
            return int(self._machine.iommu.dma_is_coherent)
        if extension == ioctls.VFIO_TYPE1_NESTING_IOMMU:
            return int(self._version.nesting)
        return int(extension in (ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU, ioctls.VFIO_UNMAP_ALL))

    def set_iommu(self, argument: Argument) -> int:
        """`vfio_ioctl_set_iommu`: EINVAL (no group, or set already), ENODEV (no driver knows the type)."""
        if not self.groups or self.iommu is not None:
            refuse(errno.EINVAL)
        kind = argument.value
        if self._machine.noiommu is not None:
            return self._set_no_iommu(self._machine.noiommu, kind)
        if kind == ioctls.VFIO_UNMAP_ALL:
            refuse(errno.EINVAL)  # an extension of type1, not an IOMMU type
        if not self.check_extension(argument):
            refuse(errno.ENODEV)
        if kind == ioctls.VFIO_TYPE1_NESTING_IOMMU and not self._machine.iommu.nests:
            refuse(errno.EINVAL)  # iommu_enable_nesting
        v2 = kind != ioctls.VFIO_TYPE1_IOMMU
        self.iommu = Type1(version=self._version, model=self._machine.iommu, pins=self._pins, v2=v2)
        return 0

    def _set_no_iommu(self, noiommu: NoIommu, kind: int) -> int:
        """`vfio_noiommu_open`: ENODEV (another type), EPERM. No request of an IOMMU is known afterwards."""
        if kind != ioctls.VFIO_NOIOMMU_IOMMU:
            refuse(errno.ENODEV)
        noiommu.check_raw_io()
        self.iommu = Type1(version=self._version, model=self._machine.iommu, pins=self._pins, v2=True)
        self.iommu.requests.clear()
        return 0

    def attach(self, group: Group) -> None:
        """`vfio_container_attach_group`: EBUSY while a mapping has no address."""
        if self.iommu is not None and self.iommu.has_invalid_vaddr:
            refuse(errno.EBUSY)
        self.groups.append(group)

    def detach(self, group: Group) -> None:
        """`vfio_group_detach_container`: without a group, the IOMMU is released and all mappings are unmapped."""
        self.groups.remove(group)
        if not self.groups and self.iommu is not None:
            self.iommu.release()
            self.iommu = None


class Group:
    """`struct vfio_group`: has one open file at most, and stays in use while a device of the group is open."""

    def __init__(self, number: int, devices: Sequence[PciDevice], files: DescriptorTable) -> None:
        self.number = number
        self.devices = tuple(devices)
        self.container: Container | None = None
        self.fd: int | None = None
        self.claim: Claimed | None = None
        """The claim of an iommufd, while a device of the group is bound to one."""
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
        """Whether the group or a device of the group is open."""
        return self.fd is not None or self.has_open_device

    @property
    def claimed(self) -> bool:
        """Whether user space owns the DMA of the group (`iommu_group_dma_owner_claimed`)."""
        return self.container is not None or self.claim is not None

    @property
    def opened_as_group(self) -> bool:
        """Whether the group, or a device by the group's descriptor, is open. Device nodes then cannot be bound."""
        return self.claim is None and self.busy

    @property
    def translation(self) -> Translation | None:
        """The translation of DMA for all devices of the group, or None: no access passes."""
        if self._files.noiommu is not None:
            return self._files.noiommu
        if self.claim is not None:
            return self.claim.translation
        return None if self.container is None else self.container.iommu

    @property
    def has_open_device(self) -> bool:
        """Whether a device descriptor is open."""
        return any(device.descriptors for device in self.devices)

    @property
    def node(self) -> str:
        """The name of the group's node below /dev/vfio."""
        return f"{'' if self._files.noiommu is None else 'noiommu-'}{self.number}"

    @property
    def has_device_nodes(self) -> bool:
        """Whether devices have nodes of their own."""
        return self._files.has_device_nodes

    @property
    def viable(self) -> bool:
        """Whether no device of the group is bound to a kernel driver that does DMA."""
        return all(device.driver in _OWNERLESS or is_vfio_driver(device.driver) for device in self.devices)

    def request_name(self, request: int) -> str:
        """Return the C name, or the number."""
        return self._requests[request][0] if request in self._requests else hex(request)

    def ioctl(self, request: int, argument: Argument) -> int:
        """`vfio_group_fops_unl_ioctl`: ENOTTY for unknown requests."""
        found = self._requests.get(request)
        if found is None:
            refuse(errno.ENOTTY)
        return found[1](argument)

    def release(self, fd: int) -> None:
        """Close the descriptor of the group. Open devices keep the group in the container."""
        if fd == self.fd:
            self.fd = None
        self.device_closed()

    def live_on(self, fd: int, other: int) -> None:
        """Keep the group open by `other`."""
        if fd == self.fd:
            self.fd = other

    def device_closed(self) -> None:
        """Leave the container if neither the group nor a device is open."""
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
            if self._files.iommufd(fd) is not None:
                self._files.warn(Unmodelled("VFIO_GROUP_SET_CONTAINER", "for an iommufd: EBADFD, as for other files"))
            refuse(self._files.version.not_a_container)
        if not self.viable:
            refuse(errno.EPERM)
        if self._files.noiommu is not None:
            self._files.noiommu.check_raw_io()
        container.attach(self)
        self.container = container
        return 0

    def unset_container(self, _argument: Argument) -> int:
        """`vfio_group_ioctl_unset_container`: EINVAL (no container), EBUSY (a device is open)."""
        if self.container is None:
            refuse(errno.EINVAL)
        if self.has_open_device:
            refuse(errno.EBUSY)
        self._leave()
        return 0

    def get_device_fd(self, argument: Argument) -> int:
        """`vfio_group_ioctl_get_device_fd`: return a device descriptor.

        EFAULT, EINVAL (no end of string), ENODEV, EINVAL or EACCES (the token), EMFILE, EINVAL (no IOMMU).
        """
        device = self._match(_read_name(argument))
        fd = device.open()
        if self.container is None or self.container.iommu is None:
            os.close(fd)
            refuse(errno.EINVAL)
        if self._files.noiommu is not None and not self._files.noiommu.raw_io:
            os.close(fd)
            refuse(errno.EPERM)
        self._files.adopt(fd, DeviceHandle(device, self.features_of(device), self, HotReset(device, self._files)))
        device.hold(fd)
        return fd

    def features_of(self, device: PciDevice) -> DeviceFeatures:
        """Return the features of a device, which all descriptors of the device share."""
        if device.bdf not in self._features:
            self._features[device.bdf] = DeviceFeatures(device, self._files.version)
        return self._features[device.bdf]

    def _match(self, text: str) -> PciDevice:
        # vfio_pci_core_match: the text is a name, with options after a space.
        for device in self.devices:
            name, options = text[: len(device.bdf)], text[len(device.bdf) :]
            if device.bdf == name and options[:1] in ("", " ") and is_vfio_driver(device.driver):
                check_token(device, parse_options(options), self._files)
                return device
        return refuse(errno.ENODEV)

    def _check(self) -> None:
        assert self.container is None or self in self.container.groups
        assert self.container is None or self.claim is None
        assert self.claim is None or self.has_open_device


def _read_name(argument: Argument) -> str:
    limit = min(argument.size, _NAME_MAX) if isinstance(argument, BufferArgument) else _NAME_MAX
    name = b""
    while len(name) < limit:
        byte = argument.read(1, len(name))
        if byte == b"\0":
            return name.decode("utf-8", "replace")
        name += byte
    if limit < _NAME_MAX:
        raise BufferError("the kernel reads behind the buffer: the name of the device does not end with NUL")
    return refuse(errno.EINVAL)


def _bind_of_group(argument: Argument) -> int:
    # vfio_df_ioctl_bind_iommufd reads the structure before it looks at the kind of the descriptor.
    argument.read(ioctls.VFIO_DEVICE_BIND_IOMMUFD_MINSZ)
    return refuse(errno.EINVAL)


class DeviceHandle:
    """A descriptor of a device. Several can be open, and each holds the group."""

    def __init__(self, device: PciDevice, features: DeviceFeatures, group: Group, hot_reset: HotReset) -> None:
        self.device = device
        self.group = group
        self.granted = True
        """Whether the descriptor gives access to the device."""
        self._features = features
        self._requests = {**device.requests, **features.requests, **hot_reset.requests}
        if group.has_device_nodes:
            self._requests[ioctls.VFIO_DEVICE_BIND_IOMMUFD] = ("VFIO_DEVICE_BIND_IOMMUFD", _bind_of_group)

    def _find(self, request: int) -> tuple[str, Callable[[Argument], int]] | None:
        return self._requests.get(request)

    def request_name(self, request: int) -> str:
        """Return the C name, or the number."""
        found = self._find(request)
        return hex(request) if found is None else found[0]

    def ioctl(self, request: int, argument: Argument) -> int:
        """`vfio_pci_core_ioctl`: ENOTTY for unknown requests. Each request resumes the device from low power."""
        self.device.power.resume()
        found = self._find(request)
        if found is None:
            refuse(errno.ENOTTY)
        return found[1](argument)

    def release(self, fd: int) -> None:
        """Close a descriptor of the device, with the device and the group if the descriptor is the last one."""
        self.device.release(fd)
        if not self.device.descriptors:
            self._features.release()
        self.group.device_closed()
        if not self.device.descriptors:  # mappings of the BARs in the container now outlive the device
            self.device.on_bars_gone("the last close", self.device.bdf)

    def live_on(self, fd: int, other: int) -> None:
        """Keep the device open by `other`."""
        self.device.hold(other)
        self.device.descriptors.discard(fd)


def device_behind(handler: Handler) -> PciDevice:
    """Return the device of a descriptor. EINVAL for another kind, and for a device node that is not bound."""
    if not isinstance(handler, DeviceHandle) or not handler.granted:
        refuse(errno.EINVAL)
    return handler.device


class DescriptorTable(Buses, Functions, Protocol):
    """The services that a group needs from the kernel: other descriptors, and other devices."""

    def container(self, fd: int) -> Container | None:
        """Return the container behind a descriptor, or None for another file. Raises EBADF if `fd` is not open."""
        ...

    def iommufd(self, fd: int) -> object | None:
        """Return the iommufd behind a descriptor, or None for another file. Raises EBADF if `fd` is not open."""
        ...

    @property
    def has_device_nodes(self) -> bool:
        """Whether the kernel was built with iommufd and device nodes."""
        ...

    @property
    def noiommu(self) -> NoIommu | None:
        """No-IOMMU mode of a machine without an IOMMU."""
        ...

    def adopt(self, fd: int, handler: Handler) -> None:
        """Let `handler` answer for `fd` from now on."""
        ...

    def warn(self, part: Unmodelled) -> None:
        """Note a request that is not modelled."""
        ...
