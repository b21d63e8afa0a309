"""The requests of VFIO containers on an iommufd, for the address space that IOMMU_VFIO_IOAS has chosen.

Source: drivers/iommu/iommufd/vfio_compat.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import Protocol

from pyvfio import ioctls
from pyvfio.testing.fake.ioas import Ioas
from pyvfio.testing.fake.process import Argument, refuse
from pyvfio.testing.fake.type1 import READ, WRITE
from pyvfio.units import PAGE_SIZE, U64_MAX

_MAP = struct.Struct("=IIQQQ")
_UNMAP = struct.Struct("=IIQQ")
_INFO = struct.Struct("=IIQII")
_INFO_MINSZ = 16
_ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
_ALWAYS = frozenset(
    (ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU, ioctls.VFIO_UNMAP_ALL, ioctls.VFIO_NOIOMMU_IOMMU)
)
_NO_LIMIT = 0xFFFF_FFFF


class Spaces(Protocol):
    """The iommufd."""

    def need_compat_ioas(self) -> Ioas:
        """Return the address space for these requests. ENODEV."""
        ...

    def map_user(self, ioas: Ioas, vaddr: int, length: int, iova: int | None, flags: int) -> int:
        """Map process memory."""
        ...


class CompatCalls:
    """`iommufd_vfio_ioctl`."""

    def __init__(self, spaces: Spaces) -> None:
        self._spaces = spaces
        self._requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_GET_API_VERSION: ("VFIO_GET_API_VERSION", lambda _argument: ioctls.VFIO_API_VERSION),
            ioctls.VFIO_CHECK_EXTENSION: ("VFIO_CHECK_EXTENSION", self.check_extension),
            ioctls.VFIO_SET_IOMMU: ("VFIO_SET_IOMMU", self.set_iommu),
            ioctls.VFIO_IOMMU_GET_INFO: ("VFIO_IOMMU_GET_INFO", self.get_info),
            ioctls.VFIO_IOMMU_MAP_DMA: ("VFIO_IOMMU_MAP_DMA", self.map_dma),
            ioctls.VFIO_IOMMU_UNMAP_DMA: ("VFIO_IOMMU_UNMAP_DMA", self.unmap_dma),
        }

    def request_name(self, request: int) -> str:
        """Return the C name, or the number."""
        return self._requests[request][0] if request in self._requests else hex(request)

    def ioctl(self, request: int, argument: Argument) -> int:
        """ENOTTY for unknown requests."""
        found = self._requests.get(request)
        return refuse(errno.ENOTTY) if found is None else found[1](argument)

    def check_extension(self, argument: Argument) -> int:
        """`iommufd_vfio_check_extension`: ENODEV for VFIO_DMA_CC_IOMMU without an address space."""
        if argument.value == ioctls.VFIO_DMA_CC_IOMMU:
            return int(all(table.model.dma_is_coherent for table in self._spaces.need_compat_ioas().tables))
        return int(argument.value in _ALWAYS)

    def set_iommu(self, argument: Argument) -> int:
        """`iommufd_vfio_set_iommu`: EINVAL, ENODEV. VFIO_TYPE1_IOMMU turns huge pages off, and nothing on again."""
        if argument.value not in (ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU):
            refuse(errno.EINVAL)
        ioas = self._spaces.need_compat_ioas()
        if argument.value == ioctls.VFIO_TYPE1_IOMMU:
            ioas.set_huge_pages(wanted=False)
        return 0

    def map_dma(self, argument: Argument) -> int:
        """`iommufd_vfio_map_dma`: EFAULT, EINVAL, ENODEV, then as IOMMU_IOAS_MAP with a fixed IOVA."""
        argsz, flags, vaddr, iova, size = _MAP.unpack(argument.read(_MAP.size))
        if argsz < _MAP.size or flags & ~(READ | WRITE):
            refuse(errno.EINVAL)
        self._spaces.map_user(self._spaces.need_compat_ioas(), vaddr, size, iova, flags)
        return 0

    def unmap_dma(self, argument: Argument) -> int:
        """`iommufd_vfio_unmap_dma`: EFAULT, EINVAL, ENODEV, EOVERFLOW, ENOENT (an area that is not whole).

        Without huge pages, areas are cut at both ends of the range first. `size` is written back, also after an error
        of the unmap itself: the bytes of whole areas before the error.
        """
        argsz, flags, iova, size = _UNMAP.unpack(argument.read(_UNMAP.size))
        if argsz < _UNMAP.size or flags & ~_ALL:
            refuse(errno.EINVAL)
        ioas = self._spaces.need_compat_ioas()
        if flags & _ALL and (iova or size):
            refuse(errno.EINVAL)
        unmapped, number = ioas.unmap(0, U64_MAX) if flags & _ALL else self._unmap(ioas, iova, size)
        argument.write(_UNMAP.pack(argsz, flags, iova, unmapped))
        if number:
            refuse(number)
        return 0

    @staticmethod
    def _unmap(ioas: Ioas, iova: int, size: int) -> tuple[int, int]:
        if not ioas.huge_pages:
            ioas.cut((iova + size - 1) & U64_MAX)
            if iova:
                ioas.cut(iova - 1)
        return ioas.unmap_range(iova, size)

    def get_info(self, argument: Argument) -> int:
        """`iommufd_vfio_iommu_get_info`: EFAULT, EINVAL, ENODEV. `argsz` becomes the whole size in any case."""
        argsz, _flags, _sizes = struct.unpack("=IIQ", argument.read(_INFO_MINSZ))
        if argsz < _INFO_MINSZ:
            refuse(errno.EINVAL)
        ioas = self._spaces.need_compat_ioas()
        spans = b"".join(struct.pack("=QQ", *span) for span in ioas.usable())
        available = struct.pack("=HHII", ioctls.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, 1, 0, _NO_LIMIT)
        at = _INFO.size + 16  # capabilities are aligned to 8 bytes
        head = struct.pack("=HHIII", ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, 1, 0, len(spans) // 16, 0)
        total = at + len(head) + len(spans)
        self._write_capabilities(argument, argsz, available, at, head + spans)
        sizes = _page_sizes(ioas)
        flags = ioctls.VFIO_IOMMU_INFO_PGSIZES | ioctls.VFIO_IOMMU_INFO_CAPS
        answer = _INFO.pack(total, flags, sizes, _INFO.size if argsz >= total else 0, 0)
        argument.write(answer[: min(argsz, _INFO.size)])
        return 0

    @staticmethod
    def _write_capabilities(argument: Argument, argsz: int, available: bytes, at: int, ranges: bytes) -> None:
        if argsz < _INFO.size + len(available):
            return
        chained = argsz >= at
        argument.write(available[:4] + struct.pack("=I", at if chained else 0) + available[8:], _INFO.size)
        room = (argsz - at - 16) // 16 * 16 if argsz >= at + 16 else -1
        if argsz >= at + len(ranges):
            argument.write(ranges, at)
        elif room > 0:
            argument.write(ranges[16 : 16 + room], at + 16)  # the ranges that fit, without the head


def _page_sizes(ioas: Ioas) -> int:
    """`iommufd_get_pagesizes`."""
    sizes = U64_MAX
    for table in ioas.tables:
        sizes &= table.model.iova_pgsizes
    small = sizes & (PAGE_SIZE - 1)
    return max((sizes - small) | (PAGE_SIZE if small else 0), ioas.alignment)
