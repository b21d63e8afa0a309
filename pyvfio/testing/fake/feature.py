"""Requests on a device descriptor other than regions and interrupts: ioeventfds and features.

Source: drivers/vfio/vfio_main.c and pci/vfio_pci_core.c, vfio_pci_rdwr.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence

from pyvfio import ioctls
from pyvfio.testing.fake.device import Bar, PciDevice
from pyvfio.testing.fake.irqs import hold_eventfd
from pyvfio.testing.fake.process import Argument, refuse
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import PAGE_SIZE, U64_MAX

_GET = int(ioctls.VFIO_DEVICE_FEATURE_GET)
_SET = int(ioctls.VFIO_DEVICE_FEATURE_SET)
_PROBE = int(ioctls.VFIO_DEVICE_FEATURE_PROBE)
_FEATURE = int(ioctls.VFIO_DEVICE_FEATURE_MASK)
_IOEVENTFD = struct.Struct("=IIQQi")
_DMA_BUF = struct.Struct("=IIII")
_UUID = 16
_IOEVENTFDS = 1000  # VFIO_PCI_IOEVENTFD_MAX
_REGION_SHIFT = 40
_DMA_BUF_NUMBER = int(ioctls.VFIO_DEVICE_FEATURE_DMA_BUF)
_RANGE = 16
_BAR_ADDRESS = 0xFE00_0000  # an address on the bus: no fake device declares the addresses of BARs
_BARS = 6


class DeviceFeatures:
    """The state that all descriptors of one device share: ioeventfds and features.

    A signalled ioeventfd writes nothing. A DMA-buf is a file of the right size that no driver imports.
    """

    def __init__(self, device: PciDevice, version: KernelVersion) -> None:
        self._device = device
        self._version = version
        self._ioeventfds: dict[tuple[int, int, int], int] = {}
        self._features: dict[int, Callable[[Argument, int, int], int]] = {
            ioctls.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN: self._set_vf_token,
            ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY: self._enter_low_power,
            ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP: self._enter_low_power_with_wakeup,
            ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT: self._leave_low_power,
        }
        if version.dma_buf:
            self._features[_DMA_BUF_NUMBER] = self._dma_buf
        self.requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_DEVICE_IOEVENTFD: ("VFIO_DEVICE_IOEVENTFD", self.ioeventfd),
            ioctls.VFIO_DEVICE_FEATURE: ("VFIO_DEVICE_FEATURE", self.feature),
        }

    def release(self) -> None:
        """Drop the ioeventfds after the last descriptor of the device was closed."""
        for held in self._ioeventfds.values():
            os.close(held)
        self._ioeventfds.clear()

    # --------------------------------------------------------------------------------------- VFIO_DEVICE_IOEVENTFD

    def ioeventfd(self, argument: Argument) -> int:
        """`vfio_pci_ioeventfd`: EFAULT, EINVAL, EEXIST, ENODEV (fd -1 and not found), ENOSPC, EBADF, EINVAL."""
        argsz, flags, offset, data, fd = _IOEVENTFD.unpack(argument.read(_IOEVENTFD.size))
        widths = int(ioctls.VFIO_DEVICE_IOEVENTFD_SIZE_MASK)
        if argsz < _IOEVENTFD.size or flags & ~widths or flags.bit_count() != 1 or fd < -1:
            refuse(errno.EINVAL)
        self._check_place(offset, flags)
        return self._connect((offset, data, flags), fd)

    def _check_place(self, offset: int, width: int) -> None:
        index, position = offset >> _REGION_SHIFT, offset & ((1 << _REGION_SHIFT) - 1)
        bar = self._device.declared.bars.get(index) if index < _BARS else None
        if bar is None or position + width > bar.size:
            refuse(errno.EINVAL)
        table = self._device.declared.msix_table(index)
        if position < table.stop and position + width > table.start:
            refuse(errno.EINVAL)

    def _connect(self, key: tuple[int, int, int], fd: int) -> int:
        held = self._ioeventfds.get(key)
        if held is not None:
            if fd >= 0:
                refuse(errno.EEXIST)
            os.close(self._ioeventfds.pop(key))
            return 0
        if fd < 0:
            refuse(errno.ENODEV)
        if len(self._ioeventfds) >= _IOEVENTFDS:
            refuse(errno.ENOSPC)
        if (new := hold_eventfd(fd)) is not None:
            self._ioeventfds[key] = new
        return 0

    # ----------------------------------------------------------------------------------------- VFIO_DEVICE_FEATURE

    def feature(self, argument: Argument) -> int:
        """`vfio_ioctl_device_feature`: EFAULT, EINVAL, ENOTTY (not in this kernel, or not for this device)."""
        argsz, flags = struct.unpack("=II", argument.read(8))
        both = _GET | _SET
        if argsz < 8 or flags & ~(_FEATURE | both | _PROBE) or flags & (both | _PROBE) == both:
            refuse(errno.EINVAL)
        number = flags & _FEATURE
        if number == ioctls.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 and self._version.precopy_info_v2:
            refuse(errno.EINVAL)  # the feature exists, but not for a device without PRE_COPY
        found = self._features.get(number)
        if found is None:
            refuse(errno.ENOTTY)
        return found(argument, flags, argsz - 8)

    @staticmethod
    def _is_wanted(flags: int, size: int, *, needed: int, operation: int = _SET) -> bool:
        # vfio_check_feature for a feature with one operation. Returns whether the call is more than a probe.
        if flags & (_GET | _SET) & ~operation:
            refuse(errno.EINVAL)
        if flags & _PROBE:
            return False
        if not flags & operation or size < needed:
            refuse(errno.EINVAL)
        return True

    def _dma_buf(self, argument: Argument, flags: int, size: int) -> int:
        # vfio_pci_core_feature_dma_buf
        if not self._is_wanted(flags, size, needed=_DMA_BUF.size, operation=_GET):
            return 0
        region, open_flags, reserved, count = _DMA_BUF.unpack(argument.read(_DMA_BUF.size, 8))
        if reserved or not count:
            refuse(errno.EINVAL)
        bar = self._device.declared.bars.get(region)
        if bar is None:
            refuse(errno.ENODEV)
        ranges = list(struct.iter_unpack("=QQ", argument.read(_RANGE * count, 8 + _DMA_BUF.size)))
        self._check_ranges(bar, ranges)
        fd = os.memfd_create(f"dmabuf of {self._device.bdf}")
        os.ftruncate(fd, sum(length for _offset, length in ranges))
        os.set_inheritable(fd, not open_flags & os.O_CLOEXEC)
        return fd

    @staticmethod
    def _check_ranges(bar: Bar, ranges: Sequence[tuple[int, int]]) -> None:
        if any(not length or (offset | length) % PAGE_SIZE for offset, length in ranges):
            refuse(errno.EINVAL)
        if sum(length for _offset, length in ranges) > U64_MAX >> 1:
            refuse(errno.EINVAL)
        for offset, length in ranges:
            if _BAR_ADDRESS + offset + length > U64_MAX:
                refuse(errno.EOVERFLOW)
            if bar.io or offset + length > bar.size:
                refuse(errno.EINVAL)

    def _set_vf_token(self, argument: Argument, flags: int, size: int) -> int:
        # vfio_pci_core_feature_token
        if self._device.vf_token is None:
            refuse(errno.ENOTTY)
        if self._is_wanted(flags, size, needed=_UUID):
            self._device.vf_token = argument.read(_UUID, 8)
        return 0

    def _enter_low_power(self, _argument: Argument, flags: int, size: int) -> int:
        if self._is_wanted(flags, size, needed=0):
            self._device.power.enter()
        return 0

    def _enter_low_power_with_wakeup(self, argument: Argument, flags: int, size: int) -> int:
        if self._is_wanted(flags, size, needed=8):
            (fd,) = struct.unpack("=i", argument.read(8, 8)[:4])
            self._device.power.enter(hold_eventfd(fd) if fd >= 0 else refuse(errno.EINVAL))
        return 0

    def _leave_low_power(self, _argument: Argument, flags: int, size: int) -> int:
        if self._is_wanted(flags, size, needed=0):
            self._device.power.leave()
        return 0


def makes_descriptor(request: str, given: int | bytes) -> bool:
    """Return whether an ioctl on a device makes a descriptor if the ioctl succeeds: a DMA-buf."""
    if request != "VFIO_DEVICE_FEATURE" or isinstance(given, int) or len(given) < 8:
        return False
    flags = int.from_bytes(given[4:8], "little")
    return flags & (_FEATURE | _GET | _PROBE) == _GET | _DMA_BUF_NUMBER
