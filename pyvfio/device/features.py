"""The features of a device: VFIO_DEVICE_FEATURE by number, with helpers for low power and DMA-bufs.

Source: `vfio_ioctl_device_feature` in drivers/vfio/vfio_main.c; `vfio_pci_core_ioctl_feature` in
drivers/vfio/pci/vfio_pci_core.c; vfio_pci_dmabuf.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Generic, Protocol, TypeVar, overload

from pyvfio import ioctls
from pyvfio.arguments import checked_items
from pyvfio.device.eventfds import check_eventfd
from pyvfio.device.windows import Windows
from pyvfio.errors import IoctlError, UnsupportedError, VfioError
from pyvfio.guard import Guard
from pyvfio.handle import Handle
from pyvfio.kernel import IoctlArgument, Kernel
from pyvfio.units import PAGE_SIZE, as_number, check_whole_number, is_aligned

_GET = ioctls.VFIO_DEVICE_FEATURE_GET
_SET = ioctls.VFIO_DEVICE_FEATURE_SET
_PROBE = int(ioctls.VFIO_DEVICE_FEATURE_PROBE)
_NONE = ioctls.VfioDeviceFeatureFlags(0)
_HEADER = struct.Struct("=II")
_ENTRY = ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY
_ENTRY_WITH_WAKEUP = ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP
_EXIT = ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT
_ABSENT = (errno.ENOTTY, errno.EOPNOTSUPP)
_VARIANT = "The feature needs a variant driver in place of vfio-pci, such as mlx5_vfio_pci"
_NEEDS: Mapping[int, str] = {
    ioctls.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN: "Only a physical function with SR-IOV has a VF token",
    ioctls.VFIO_DEVICE_FEATURE_MIGRATION: _VARIANT,
    ioctls.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: _VARIANT,
    _ENTRY: "The feature needs Linux 6.1",
    _ENTRY_WITH_WAKEUP: "The feature needs Linux 6.1",
    _EXIT: "The feature needs Linux 6.1",
    ioctls.VFIO_DEVICE_FEATURE_DMA_LOGGING_START: _VARIANT,
    ioctls.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: _VARIANT,
    ioctls.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: _VARIANT,
    ioctls.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: _VARIANT,
    ioctls.VFIO_DEVICE_FEATURE_BUS_MASTER: "The feature is for CDX devices; a PCI device has Device.bus_master",
    ioctls.VFIO_DEVICE_FEATURE_DMA_BUF: "The feature needs Linux 6.19, built with CONFIG_VFIO_PCI_DMABUF",
    ioctls.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: _VARIANT,
}

_NAMES = {feature.value: feature.name for feature in ioctls.VfioDeviceFeature}
_Data = TypeVar("_Data")
_Struct = TypeVar("_Struct", bound=ctypes.Structure)


class FeatureOwner(Protocol):
    """The device of a feature."""

    bdf: str

    @property
    def guard(self) -> Guard: ...

    @property
    def kernel(self) -> Kernel: ...

    @property
    def closed(self) -> bool: ...

    @property
    def windows(self) -> Windows: ...

    def check_usable(self) -> None: ...

    def feature(self, number: int, /) -> Feature: ...

    def ioctl(
        self,
        request: str,
        argument: IoctlArgument = 0,
        /,
        *,
        hints: Mapping[int, str] | None = None,
        **given: int | str,
    ) -> int: ...


@dataclass(frozen=True, slots=True)
class FeatureAnswer(Generic[_Data]):
    """The answer of the kernel to `Feature.get`.

    `value`: the result of the ioctl, 0 or a descriptor, which the caller must close. `data`: the data that the kernel
    wrote, of the class that was passed.
    """

    value: int
    data: _Data


class Feature:
    """A feature of a device by number: `Device.feature`. Data are bytes, or a structure of `pyvfio.ioctls`.

    Raises IoctlError; UnsupportedError, with the needs of the feature, if the kernel or the device does not have the
    feature.

    Synchronization: any thread. Cost: one ioctl for each call.
    """

    def __init__(self, device: FeatureOwner, number: int) -> None:
        self._device = device
        self.number = number

    @property
    def name(self) -> str:
        """The C name, or the number."""
        return _NAMES.get(self.number, f"feature {self.number}")

    def __repr__(self) -> str:
        return f"<Feature {self.name} of {self._device.bdf}>"

    def probe(self) -> ioctls.VfioDeviceFeatureFlags:
        """Return the operations that the kernel supports, VFIO_DEVICE_FEATURE_GET and _SET, or 0 (false) for none."""
        found = _NONE
        for how in (_GET, _SET):
            try:
                self._call(_PROBE | how, bytearray())
            except IoctlError as error:
                if error.errno not in (*_ABSENT, errno.EINVAL):
                    raise
            else:
                found |= how
        return found

    @overload
    def get(self, data: _Struct) -> FeatureAnswer[_Struct]: ...

    @overload
    def get(self, data: bytes | bytearray) -> FeatureAnswer[bytes]: ...

    def get(self, data: _Struct | bytes | bytearray) -> FeatureAnswer[_Struct] | FeatureAnswer[bytes]:
        """Read the feature: VFIO_DEVICE_FEATURE_GET.

        `data`: the input of the kernel, in the length of the answer. `data` is not changed; the answer has a copy.
        """
        buffer = _payload(data)
        value = self._use(_GET, buffer)
        if isinstance(data, ctypes.Structure):
            return FeatureAnswer(value, type(data).from_buffer_copy(buffer, _HEADER.size))
        return FeatureAnswer(value, bytes(buffer[_HEADER.size :]))

    def set(self, data: ctypes.Structure | bytes | bytearray = b"") -> int:
        """Set the feature, and return the result of the ioctl: VFIO_DEVICE_FEATURE_SET.

        Before an entry into low power, the mapped windows of all BARs are dropped, as by `Device.enter_low_power`.
        """
        change = partial(self._use, _SET, _payload(data))
        if self.number in (_ENTRY, _ENTRY_WITH_WAKEUP):
            self._device.check_usable()
            return self._device.windows.change(change, low_power=True)
        if self.number == _EXIT:
            self._device.check_usable()
            return self._device.windows.change(change, keep="all maps", low_power=False)
        return change()

    def _use(self, how: ioctls.VfioDeviceFeatureFlags, buffer: bytearray) -> int:
        try:
            return self._call(int(how), buffer)
        except IoctlError as error:
            if error.errno in _ABSENT:
                hint = _NEEDS.get(self.number, "Another kernel, or another driver of the device, may have the feature")
                raise UnsupportedError(f"{self._device.bdf} has no {self.name}", hint=hint) from error
            if error.errno == errno.EINVAL and not how & (can := self.probe()):
                verb = "read" if how == _GET else "set"
                hint = "The feature can only be set" if can else _NEEDS.get(self.number, "")
                if can == _GET:
                    hint = "The feature can only be read"
                raise UnsupportedError(f"{self.name} of {self._device.bdf} cannot be {verb}", hint=hint) from error
            raise

    def _call(self, flags: int, buffer: bytearray) -> int:
        if not buffer:
            buffer = bytearray(_HEADER.size)
        _HEADER.pack_into(buffer, 0, len(buffer), flags | self.number)
        return self._device.ioctl("VFIO_DEVICE_FEATURE", buffer, feature=self.name, flags=flags, argsz=len(buffer))


def _payload(data: ctypes.Structure | bytes | bytearray) -> bytearray:
    """Return the buffer of an ioctl: space for the header, and `data`."""
    if not isinstance(data, bytes | bytearray | ctypes.Structure):
        raise TypeError(f"the data of a feature must be bytes or a ctypes.Structure, not {type(data).__name__}")
    return bytearray(_HEADER.size) + bytes(data)


def checked_number(number: int) -> int:
    """Return the number of a feature. Raises TypeError, and ValueError for a number that does not fit 16 bits."""
    if not 0 <= (number := as_number(number, "number")) <= ioctls.VFIO_DEVICE_FEATURE_MASK:
        raise ValueError(f"the number of a feature is from 0 to {ioctls.VFIO_DEVICE_FEATURE_MASK:#x}, not {number}")
    return number


# ------------------------------------------------------------------------------------------------ low power


def enter_low_power(device: FeatureOwner, wakeup_fd: int | None) -> None:
    """Enter low power: see `Device.enter_low_power`."""
    if wakeup_fd is not None:  # checked before windows are dropped; ctypes would truncate a number that is too large
        wakeup_fd = check_whole_number(wakeup_fd, "wakeup_fd")
        check_eventfd(wakeup_fd, f"the low power of {device.bdf}")
    try:
        if wakeup_fd is None:
            device.feature(_ENTRY).set()
        else:
            argument = ioctls.vfio_device_low_power_entry_with_wakeup(wakeup_eventfd=wakeup_fd)
            device.feature(_ENTRY_WITH_WAKEUP).set(argument)
    except IoctlError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
        why = "The device is in low power already" if wakeup_fd is None or device.windows.low_power else ""
        why = why or f"wakeup_fd, {wakeup_fd}, is no eventfd"
        raise IoctlError.of(error, error.message, request=error.request, arguments=error.arguments, hint=why) from error


class LowPower:
    """A device in low power during a `with` block: the result of `Device.low_power`."""

    def __init__(self, device: FeatureOwner, wakeup_fd: int | None) -> None:
        self._device = device
        self._wakeup_fd = wakeup_fd

    def __enter__(self) -> None:
        enter_low_power(self._device, self._wakeup_fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.closed:
            return
        try:
            self._device.feature(_EXIT).set()
        except VfioError as failure:
            if error is None:
                raise
            error.add_note(f"{self._device.bdf} could not leave low power: {failure}")


# ------------------------------------------------------------------------------------------------ DMA-bufs


class DmaBuf(Handle):
    """A DMA-buf of parts of a BAR, for DMA by another driver: the result of `Device.dma_buf`.

    Pass `fd` to the importer (an RDMA NIC, a GPU, iommufd). `size`: the bytes of all parts. While the device does not
    decode memory accesses, in low power and during a reset, the kernel revokes the access of importers. When the device
    is closed, the access is revoked for good. Closing this object closes only the descriptor.

    Synchronization: any thread.
    """

    def __init__(self, device: FeatureOwner, bar: int, ranges: tuple[tuple[int, int], ...]) -> None:
        self.bdf = device.bdf
        self.bar = bar
        self.ranges = ranges
        self.size = sum(size for _offset, size in ranges)
        flags = os.O_RDWR | os.O_CLOEXEC
        argument = ioctls.feature_dma_buf(region_index=bar, open_flags=flags, ranges=ranges)
        try:
            fd = device.feature(ioctls.VFIO_DEVICE_FEATURE_DMA_BUF).get(argument).value
        except IoctlError as error:
            if error.errno not in (errno.ENODEV, errno.EINVAL):
                raise
            why = f"BAR {bar} is not memory, or cannot be a target of DMA"
            raise IoctlError.of(
                error, error.message, request=error.request, arguments=error.arguments, hint=why
            ) from error
        super().__init__(device.kernel, fd, f"a DMA-buf of BAR {bar} of {device.bdf}")

    def __repr__(self) -> str:
        return f"<DmaBuf of BAR {self.bar} of {self.bdf} size={self.size:#x}{', closed' if self.closed else ''}>"


def drop_dma_buf(made: DmaBuf) -> None:
    """Close a DMA-buf that the caller never received."""
    made.close_fd()


def checked_ranges(ranges: Iterable[tuple[int, int]] | None, size: int, what: str) -> tuple[tuple[int, int], ...]:
    """Return the parts of a BAR, or the whole BAR for None.

    Raises TypeError, and ValueError for parts that are not whole pages or not in the BAR.
    """
    given = [(0, size)] if ranges is None else checked_items(ranges, "ranges")
    checked = tuple((as_number(offset, "offset"), as_number(length, "size")) for offset, length in given)
    if not checked:
        raise ValueError("a DMA-buf needs one part at least")
    for offset, length in checked:
        if length <= 0 or offset < 0 or offset + length > size or not is_aligned(offset | length, PAGE_SIZE):
            raise ValueError(
                f"a DMA-buf needs whole pages of {PAGE_SIZE} bytes: {what}, of {size:#x} bytes, has no such "
                f"{length:#x} bytes at {offset:#x}"
            )
    return checked
