"""What a device's descriptor answers besides regions and interrupts: ioeventfds and features.

Source: drivers/vfio/vfio_main.c and pci/vfio_pci_core.c, vfio_pci_rdwr.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

from pyvfio import ioctls
from pyvfio.testing.fake.device import PciDevice
from pyvfio.testing.fake.irqs import hold_eventfd
from pyvfio.testing.fake.process import Argument, refuse
from pyvfio.testing.fake.versions import KernelVersion

_GET = int(ioctls.VFIO_DEVICE_FEATURE_GET)
_SET = int(ioctls.VFIO_DEVICE_FEATURE_SET)
_PROBE = int(ioctls.VFIO_DEVICE_FEATURE_PROBE)
_FEATURE = int(ioctls.VFIO_DEVICE_FEATURE_MASK)
_IOEVENTFD = struct.Struct("=IIQQi")
_DMA_BUF = struct.Struct("=IIII")
_IOEVENTFDS = 1000  # VFIO_PCI_IOEVENTFD_MAX
_REGION_SHIFT = 40
_BARS = 6


class DeviceFeatures:
    """What all descriptors of one device share: its ioeventfds and whether it is in low power.

    Answers only: nothing is written when an ioeventfd is signalled, and low power changes nothing that can be seen.
    """

    def __init__(self, device: PciDevice, version: KernelVersion) -> None:
        self._device = device
        self._version = version
        self._ioeventfds: dict[tuple[int, int, int], int] = {}
        self._low_power = False
        self._features: dict[int, Callable[[Argument, int, int], int]] = {
            ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY: self._enter_low_power,
            ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP: self._enter_low_power_with_wakeup,
            ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT: self._leave_low_power,
        }
        if version.dma_buf:
            self._features[ioctls.VFIO_DEVICE_FEATURE_DMA_BUF] = self._dma_buf
        self.requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_DEVICE_IOEVENTFD: ("VFIO_DEVICE_IOEVENTFD", self.ioeventfd),
            ioctls.VFIO_DEVICE_FEATURE: ("VFIO_DEVICE_FEATURE", self.feature),
        }

    def release(self) -> None:
        """The last descriptor of the device was closed."""
        for held in self._ioeventfds.values():
            os.close(held)
        self._ioeventfds.clear()
        self._low_power = False

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
        """`vfio_ioctl_device_feature`: EFAULT, EINVAL, ENOTTY (this device or kernel does not have it)."""
        argsz, flags = struct.unpack("=II", argument.read(8))
        both = _GET | _SET
        if argsz < 8 or flags & ~(_FEATURE | both | _PROBE) or flags & (both | _PROBE) == both:
            refuse(errno.EINVAL)
        number = flags & _FEATURE
        if number == ioctls.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 and self._version.precopy_info_v2:
            refuse(errno.EINVAL)  # there is one, but not for a device that has no PRE_COPY
        found = self._features.get(number)
        if found is None:
            refuse(errno.ENOTTY)
        return found(argument, flags, argsz - 8)

    @staticmethod
    def _is_wanted(flags: int, size: int, *, needed: int, operation: int = _SET) -> bool:
        # vfio_check_feature for a feature with one operation; whether more is wanted than to know that it exists.
        if flags & (_GET | _SET) & ~operation:
            refuse(errno.EINVAL)
        if flags & _PROBE:
            return False
        if not flags & operation or size < needed:
            refuse(errno.EINVAL)
        return True

    def _dma_buf(self, argument: Argument, flags: int, size: int) -> int:
        # vfio_pci_core_feature_dma_buf: what is refused, not what it makes.
        if self._is_wanted(flags, size, needed=_DMA_BUF.size, operation=_GET):
            _region, _open_flags, reserved, ranges = _DMA_BUF.unpack(argument.read(_DMA_BUF.size, 8))
            refuse(errno.EINVAL if reserved or not ranges else errno.ENOTTY)
        return 0

    def _enter_low_power(self, _argument: Argument, flags: int, size: int) -> int:
        if self._is_wanted(flags, size, needed=0):
            self._engage()
        return 0

    def _engage(self) -> None:
        if self._low_power:
            refuse(errno.EINVAL)
        self._low_power = True

    def _enter_low_power_with_wakeup(self, argument: Argument, flags: int, size: int) -> int:
        if self._is_wanted(flags, size, needed=8):
            (fd,) = struct.unpack("=i", argument.read(8, 8)[:4])
            held = hold_eventfd(fd) if fd >= 0 else refuse(errno.EINVAL)
            if held is not None:
                os.close(held)  # nothing wakes a fake device up
            self._engage()
        return 0

    def _leave_low_power(self, _argument: Argument, flags: int, size: int) -> int:
        if self._is_wanted(flags, size, needed=0):
            self._low_power = False
        return 0
