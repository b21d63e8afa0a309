"""Resets of a whole bus: the devices that a reset reaches, and the groups that a caller must own.

The bus of a device follows from the address. Bus 0 is a root bus, which cannot be reset.

Source: drivers/vfio/pci/vfio_pci_core.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from pyvfio import ioctls
from pyvfio.testing.fake.device import PciDevice, is_vfio_driver
from pyvfio.testing.fake.process import Argument, refuse
from pyvfio.testing.fake.versions import KernelVersion

_HEAD = struct.Struct("=III")
_DEVICE = struct.Struct("=IHBB")
_ROOT_BUS = 0
_DEV_ID = int(ioctls.VFIO_PCI_HOT_RESET_FLAG_DEV_ID)
_OWNED = int(ioctls.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED)
_NOT_OWNED = 0xFFFF_FFFF  # VFIO_PCI_DEVID_NOT_OWNED


class Buses(Protocol):
    """The services that a hot reset needs from the kernel: other devices, and groups by descriptor."""

    @property
    def version(self) -> KernelVersion:
        """The kernel that the fake models."""
        ...

    def on_bus_of(self, bdf: str) -> Sequence[tuple[int, PciDevice]]:
        """Return the devices on the bus of a device, also that device, by address, with the numbers of the groups."""
        ...

    def group_number(self, fd: int) -> int | None:
        """Return the group number of a descriptor, or None for another file. Raises EBADF if `fd` is not open."""
        ...

    def devid(self, number: int, device: PciDevice, owner: object) -> int | None:
        """Return the number of a device of group `number` in an iommufd.

        0: the device is not bound, but its group is. None: the iommufd does not own the group.
        """
        ...


def _no_owner() -> None:
    return None


class HotReset:
    """The hot reset of a device: a reset of the bus of the device. `owner`: returns the iommufd of a device node."""

    def __init__(self, device: PciDevice, buses: Buses, owner: Callable[[], object | None] = _no_owner) -> None:
        self._device = device
        self._buses = buses
        self._owner = owner
        self.requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", self.get_info),
            ioctls.VFIO_DEVICE_PCI_HOT_RESET: ("VFIO_DEVICE_PCI_HOT_RESET", self.reset),
        }

    def _affected(self) -> Sequence[tuple[int, PciDevice]]:
        if _address(self._device.bdf)[1] == _ROOT_BUS:
            refuse(errno.ENODEV)
        return self._buses.on_bus_of(self._device.bdf)

    def get_info(self, argument: Argument) -> int:
        """`vfio_pci_ioctl_get_pci_hot_reset_info`: EFAULT, EINVAL, ENODEV, ENOSPC (with the count)."""
        argsz, _flags, _count = _HEAD.unpack(argument.read(_HEAD.size))
        if argsz < _HEAD.size:
            refuse(errno.EINVAL)
        affected = self._affected()
        if argsz < _HEAD.size + _DEVICE.size * len(affected):
            argument.write(_HEAD.pack(argsz, 0, len(affected)))
            refuse(errno.ENOSPC)
        owner = self._owner()
        numbers = [group if owner is None else self._buses.devid(group, each, owner) for group, each in affected]
        flags = 0 if owner is None else _DEV_ID | (0 if None in numbers else _OWNED)
        argument.write(_HEAD.pack(argsz, flags, len(affected)))
        entries = [
            _DEVICE.pack(_NOT_OWNED if number is None else number, *_address(device.bdf))
            for number, (_group, device) in zip(numbers, affected, strict=True)
        ]
        argument.write(b"".join(entries), _HEAD.size)
        return 0

    def reset(self, argument: Argument) -> int:
        """`vfio_pci_ioctl_pci_hot_reset`: EFAULT, EINVAL, ENODEV, EBADF.

        EINVAL also if a device on the bus has no VFIO driver, or is not in one of the given groups.
        """
        argsz, flags, count = _HEAD.unpack(argument.read(_HEAD.size))
        owner = self._owner()
        wrong_count = bool(count) if owner is not None else not count and self._buses.version.hot_reset_counts_first
        if argsz < _HEAD.size or flags or wrong_count:
            refuse(errno.EINVAL)
        affected = self._affected()
        if owner is not None:
            owned = [self._buses.devid(group, device, owner) is not None for group, device in affected]
        else:
            if not 0 < count <= len(affected):
                refuse(errno.EINVAL)
            given = self._groups(argument.read(4 * count, _HEAD.size))
            owned = [group in given for group, _device in affected]
        if not all(owned) or not all(is_vfio_driver(device.driver) for _group, device in affected):
            refuse(errno.EINVAL)
        for _group, device in affected:
            device.clear()
        return 0

    def _groups(self, data: bytes) -> set[int]:
        groups = set()
        for (fd,) in struct.iter_unpack("=i", data):
            number = self._buses.group_number(fd)
            groups.add(refuse(errno.EINVAL) if number is None else number)
        return groups


def _address(bdf: str) -> tuple[int, int, int]:
    domain, bus, rest = bdf.split(":")
    slot, function = rest.split(".")
    return int(domain, 16), int(bus, 16), int(slot, 16) << 3 | int(function)
