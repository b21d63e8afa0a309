"""The requests that the fake accepts without effect, or refuses although a kernel knows them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pyvfio import ioctls
from pyvfio.testing.fake.versions import KernelVersion


class Unmodelled(NamedTuple):
    """A request. `name`: the C name. `answered`: the answer of the fake, in words."""

    name: str
    answered: str

    def __str__(self) -> str:
        return f"{self.name} is not modelled: {self.answered}"


_PROBE = int(ioctls.VFIO_DEVICE_FEATURE_PROBE)
_FEATURES = {
    name: int(getattr(ioctls, name))
    for name in (
        "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY",
        "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP",
        "VFIO_DEVICE_FEATURE_DMA_BUF",
    )
}


def _feature(version: KernelVersion, argument: bytes) -> Unmodelled | None:
    (flags,) = struct.unpack_from("=I", argument, 4)
    for name, number in _FEATURES.items():
        if flags & int(ioctls.VFIO_DEVICE_FEATURE_MASK) != number or flags & _PROBE:
            continue
        if name != "VFIO_DEVICE_FEATURE_DMA_BUF":
            return Unmodelled(name, "0, and no state of the device is lost")
        if version.dma_buf:
            return Unmodelled(name, "a file of that size, which no driver takes")
    return None


def _region_info(_version: KernelVersion, argument: bytes) -> Unmodelled | None:
    (index,) = struct.unpack_from("=I", argument, 8)
    if index == ioctls.VFIO_PCI_ROM_REGION_INDEX:
        return Unmodelled("VFIO_PCI_ROM_REGION_INDEX", "a region of size 0, as of a device without ROM")
    if index == ioctls.VFIO_PCI_VGA_REGION_INDEX:
        return Unmodelled("VFIO_PCI_VGA_REGION_INDEX", "EINVAL, as of a device without VGA")
    return None


def _ioeventfd(_version: KernelVersion, _argument: bytes) -> Unmodelled:
    return Unmodelled("VFIO_DEVICE_IOEVENTFD", "0, and nothing is written when the eventfd is signalled")


_ASKED: Mapping[str, tuple[int, Callable[[KernelVersion, bytes], Unmodelled | None]]] = {
    "VFIO_DEVICE_FEATURE": (8, _feature),
    "VFIO_DEVICE_GET_REGION_INFO": (12, _region_info),
    "VFIO_DEVICE_IOEVENTFD": (28, _ioeventfd),
}


_IOMMUFD = frozenset(
    (
        "IOMMU_HWPT_INVALIDATE",
        "IOMMU_FAULT_QUEUE_ALLOC",
        "IOMMU_VIOMMU_ALLOC",
        "IOMMU_VDEVICE_ALLOC",
        "IOMMU_VEVENTQ_ALLOC",
        "IOMMU_HW_QUEUE_ALLOC",
        "IOMMU_IOAS_NOIOMMU_GET_PA",
    )
)


def unmodelled_part(
    version: KernelVersion, request: str, given: int | bytes, *, noiommu: bool = False
) -> Unmodelled | None:
    """Return the part of an ioctl that is not modelled, or None. `given`: the argument, as kept in the trace.

    `noiommu`: the machine has no IOMMU.
    """
    if request == "IOMMU_IOAS_NOIOMMU_GET_PA" and noiommu:
        return None
    if request == "VFIO_SET_IOMMU" and given == ioctls.VFIO_TYPE1_NESTING_IOMMU and version.nesting:
        return Unmodelled("VFIO_TYPE1_NESTING_IOMMU", "the behaviour of type1 v2")
    if request in _IOMMUFD:
        return Unmodelled(request, "EOPNOTSUPP")
    size, part = _ASKED.get(request, (0, None))
    return None if part is None or isinstance(given, int) or len(given) < size else part(version, given)
