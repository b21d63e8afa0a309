"""The machine behind a fake kernel: IOMMU groups with devices, found by descriptor, by address and by node."""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Sequence

from pyvfio.testing.fake.cdev import Cdev
from pyvfio.testing.fake.declaration import GroupDeclaration
from pyvfio.testing.fake.descriptors import Descriptors
from pyvfio.testing.fake.device import FakeDevice, PciDevice
from pyvfio.testing.fake.dma import DeviceSlot, DmaPath
from pyvfio.testing.fake.group import Container, DeviceHandle, Group, Handler
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.iommufd import Iommufd
from pyvfio.testing.fake.noiommu import NoIommu
from pyvfio.testing.fake.pages import Pages
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.testing.fake.pins import Account, Mapped, Pins
from pyvfio.testing.fake.process import check_open, refuse
from pyvfio.testing.fake.record import Record
from pyvfio.testing.fake.unmodelled import Unmodelled
from pyvfio.testing.fake.versions import KernelVersion


class Machine:
    """All groups and devices, and the ways in which a kernel is built. The caller holds the lock of the fake.

    `iommufd`: the kernel has /dev/iommu and device nodes. `type1`: the kernel has containers and nodes of groups.
    """

    def __init__(
        self,
        declared: Sequence[GroupDeclaration],
        *,
        version: KernelVersion,
        model: IommuModel,
        iommufd: bool,
        type1: bool,
        lock: threading.RLock,
        descriptors: Descriptors,
        pins: Pins,
        record: Record,
        noiommu: NoIommu | None = None,
    ) -> None:
        self.noiommu = noiommu
        """No-IOMMU mode; None on a machine with an IOMMU."""
        self.version = version
        self.iommu = model
        self.has_device_nodes = iommufd
        # Before 7.3, only devices with an IOMMU have nodes of their own.
        self.shows_device_nodes = iommufd and (noiommu is None or version.number >= (7, 3))
        self.has_groups = type1
        self.allow_unsafe_interrupts = True
        self.may_set_limits = True
        self._lock = lock
        self._descriptors = descriptors
        self._pins = pins
        self._record = record
        self.dma = DmaPath(pins.violations)
        self.groups = {number: self._group(number, devices) for number, devices in declared}
        found = [(group, device) for group in self.groups.values() for device in group.devices]
        self.places = dict(enumerate(found))
        """The group and the device behind each device node, by the number of the node."""

    def _group(self, number: int, devices: Sequence[FakeDevice | FakePciDevice]) -> Group:
        declared = [device.declaration if isinstance(device, FakePciDevice) else device for device in devices]
        # A weak reference: a strong one would keep the machine alive until the garbage collector runs.
        group = Group(number, [PciDevice(device, self.version, self._lock) for device in declared], weakref.proxy(self))
        for device, live in zip(devices, group.devices, strict=True):
            live.on_bars_gone = self._pins.bars_gone
            self.dma.devices[live.bdf] = live
            if isinstance(device, FakePciDevice):
                device._plug(DeviceSlot(self.dma, group, live, self._lock))
        return group

    def find(self, bdf: str) -> tuple[Group, PciDevice]:
        """Return a device and its group. Raises ValueError for an unknown device."""
        for group, device in self.places.values():
            if device.bdf == bdf:
                return group, device
        raise ValueError(f"the fake kernel has no device {bdf}")

    # ------------------------------------------------------------------------------- what the objects of nodes need

    def _behind(self, fd: int) -> Handler | None:
        handler = self._descriptors.find(fd)
        if handler is None:
            check_open(fd)
        return handler

    def container(self, fd: int) -> Container | None:
        """Return the container behind a descriptor, or None for another file. Raises EBADF if `fd` is not open."""
        handler = self._behind(fd)
        return handler if isinstance(handler, Container) else None

    def iommufd(self, fd: int) -> Iommufd | None:
        """Return the iommufd behind a descriptor, or None for another file. Raises EBADF if `fd` is not open."""
        handler = self._behind(fd)
        return handler if isinstance(handler, Iommufd) else None

    def group_number(self, fd: int) -> int | None:
        """Return the group number of a descriptor, or None for another file. Raises EBADF if `fd` is not open."""
        handler = self._behind(fd)
        return handler.number if isinstance(handler, Group) else None

    def is_node(self, fd: int) -> bool:
        """Return whether a descriptor is one of VFIO or iommufd. Raises EBADF if `fd` is not open."""
        return self._behind(fd) is not None

    def on_bus_of(self, bdf: str) -> list[tuple[int, PciDevice]]:
        """Return the devices on the bus of a device, also that device, by address, with the numbers of the groups."""
        bus = bdf.rpartition(":")[0]
        devices = [(group.number, device) for group, device in self.places.values()]
        return sorted((each for each in devices if each[1].bdf.rpartition(":")[0] == bus), key=lambda each: each[1].bdf)

    def device_at(self, bdf: str) -> PciDevice | None:
        """Return the device at an address, or None."""
        return next((device for _group, device in self.places.values() if device.bdf == bdf), None)

    def virtual_functions(self, bdf: str) -> list[PciDevice]:
        """Return the virtual functions of a physical function."""
        return [device for _group, device in self.places.values() if device.declared.pf == bdf]

    def devid(self, number: int, device: PciDevice, owner: object) -> int | None:
        """Return the number of a device in an iommufd: 0 for a device of a claimed group, None without a claim."""
        claim = self.groups[number].claim
        if claim is None or claim.owner is not owner or not isinstance(owner, Iommufd):
            return None
        return owner.device_number(device)

    def adopt(self, fd: int, handler: Handler) -> None:
        """Let `handler` answer for `fd` from now on."""
        self._descriptors.adopt(fd, handler)

    def warn(self, part: Unmodelled) -> None:
        """Note a request that is not modelled."""
        self._record.warn(part)

    # -------------------------------------------------------------------------------------------------------- nodes

    def open_node(self, name: str, fd: int) -> int:
        """Put the object of a node below /dev behind `fd`, which is open, and return the descriptor to use. EBUSY."""
        if name == "iommu" and self.has_device_nodes:
            self.adopt(fd, Iommufd(machine=weakref.proxy(self), pins=self._pins))
        elif name == "vfio/vfio" and self.has_groups:
            self.adopt(fd, Container(version=self.version, machine=weakref.proxy(self), pins=self._pins))
        elif (number := self._device_number(name)) is not None:
            return self._open_device(number, fd)
        elif (group := next((each for each in self.groups.values() if name == f"vfio/{each.node}"), None)) is not None:
            self._open_group(group, fd)
        return fd

    @property
    def device_prefix(self) -> str:
        """The name of the node of a device below /dev/vfio/devices, without the number."""
        return "vfio" if self.noiommu is None else "noiommu-vfio"

    def _device_number(self, name: str) -> int | None:
        number = name.removeprefix(f"vfio/devices/{self.device_prefix}")
        return int(number) if self.shows_device_nodes and number != name and number.isdecimal() else None

    def _open_device(self, number: int, node: int) -> int:
        if self.noiommu is not None and not self.noiommu.raw_io:
            os.close(node)
            refuse(errno.EPERM)
        group, device = self.places[number]
        fd = device.open()
        self.adopt(fd, Cdev(device, group, weakref.proxy(self), fd, node))
        return fd

    def _open_group(self, group: Group, fd: int) -> None:
        if self.noiommu is not None and not self.noiommu.raw_io:
            os.close(fd)
            refuse(errno.EPERM)
        if group.busy:
            os.close(fd)
            refuse(errno.EBUSY)
        group.fd = fd
        self.adopt(fd, group)

    # ----------------------------------------------------------------------------------------------------- checking

    def _check_state(self) -> None:
        handlers = set(self._descriptors.files.values())
        containers = {handler for handler in handlers if isinstance(handler, Container)}
        containers |= {group.container for group in self.groups.values() if group.container is not None}
        tables = [container.iommu for container in containers if container.iommu is not None]
        for container in containers:
            assert container.groups or container.iommu is None, "an IOMMU without a group"
            assert all(group.container is container for group in container.groups)
        for iommu in tables:
            iommu._check()
        memory, areas = self._check_iommufds(handlers)
        charges = {account: sum(each.pinned() for each in memory if each.account is account) for account in Account}
        self._pins._check(
            [entry for iommu in tables for entry in iommu.visible()] + areas,
            sum(iommu.charged() for iommu in tables) + charges[Account.PROCESS],
            by_user=charges[Account.USER],
            pinned=sum(charges.values()),
        )
        for group in self.groups.values():
            group._check()
            assert group.fd is None or self._descriptors.files.get(group.fd) is group
            for device in group.devices:
                assert all(isinstance(self._descriptors.files.get(fd), DeviceHandle) for fd in device.descriptors)

    def _check_iommufds(self, handlers: set[Handler]) -> tuple[set[Pages], list[Mapped]]:
        """Check each iommufd. Returns the memory that areas show, and the areas that are in page tables."""
        iommufds = {handler for handler in handlers if isinstance(handler, Iommufd)}
        owners = [group.claim.owner for group in self.groups.values() if group.claim is not None]
        iommufds |= {owner for owner in owners if isinstance(owner, Iommufd)}
        memory: set[Pages] = set()
        areas: list[Mapped] = []
        for each in iommufds:
            each._check()
            for space in each.spaces():
                memory |= space.all_pages()
                areas += space.pinned_areas()
        return memory, areas
