"""Resets of a whole bus: which devices they reach, and who may have them.

A device's bus is told from its address: bus 0 is a root bus, which nothing resets.

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


class Buses(Protocol):
    """What a hot reset needs of the kernel that it is in: other devices, and groups by descriptor."""

    @property
    def version(self) -> KernelVersion:
        """Which kernel this is."""
        ...

    def on_bus_of(self, bdf: str) -> Sequence[tuple[int, PciDevice]]:
        """The devices on the bus of one, itself too, by address, with the numbers of their groups."""
        ...

    def group_number(self, fd: int) -> int | None:
        """The number of the group behind a descriptor, None when it is another file; EBADF when it is not open."""
        ...


class HotReset:
    """The hot reset of one device: of the bus that it is on."""

    def __init__(self, device: PciDevice, buses: Buses) -> None:
        self._device = device
        self._buses = buses
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
        argument.write(_HEAD.pack(argsz, 0, len(affected)))
        if argsz < _HEAD.size + _DEVICE.size * len(affected):
            refuse(errno.ENOSPC)
        entries = [_DEVICE.pack(group, *_address(device.bdf)) for group, device in affected]
        argument.write(b"".join(entries), _HEAD.size)
        return 0

    def reset(self, argument: Argument) -> int:
        """`vfio_pci_ioctl_pci_hot_reset`: EFAULT, EINVAL, ENODEV, EBADF; EINVAL also where the bus has a device that is
        not VFIO's or not in the groups that are given."""
        argsz, flags, count = _HEAD.unpack(argument.read(_HEAD.size))
        if argsz < _HEAD.size or flags or (not count and self._buses.version.hot_reset_counts_first):
            refuse(errno.EINVAL)
        affected = self._affected()
        if not 0 < count <= len(affected):
            refuse(errno.EINVAL)
        given = self._groups(argument.read(4 * count, _HEAD.size))
        if not all(is_vfio_driver(device.driver) and group in given for group, device in affected):
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
