"""Calls of iommufd and of device nodes without the library: structures by their layout, through the seam."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path

from pyvfio import ioctls
from pyvfio import iommufd_ioctls as uapi
from pyvfio.kernel import Kernel

READABLE_WRITEABLE = 6
FIXED = 1
ALL = (1 << 64) - 1


def outcome(call: Callable[[], object]) -> object:
    """What a call returns, or the name of its errno."""
    try:
        return call()
    except OSError as error:
        return "EOPNOTSUPP" if error.errno == errno.EOPNOTSUPP else errno.errorcode[error.errno or 0]


class BareIommufd:
    """An open /dev/iommu."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.fd = kernel.open(str(kernel.dev / "iommu"), os.O_RDWR | os.O_CLOEXEC)

    def call(self, request: int, layout: str, *values: int) -> tuple[int, ...]:
        """Pass a structure that begins with its size; the structure afterwards, without the size."""
        buffer = bytearray(struct.pack("=I" + layout, struct.calcsize("=I" + layout), *values))
        self.kernel.ioctl(self.fd, request, buffer)
        return struct.unpack("=I" + layout, buffer)[1:]

    def ioas(self) -> int:
        return self.call(uapi.IOMMU_IOAS_ALLOC, "II", 0, 0)[1]

    def destroy(self, number: int) -> None:
        self.call(uapi.IOMMU_DESTROY, "I", number)

    def map(self, ioas: int, vaddr: int, size: int, iova: int | None = None, flags: int = READABLE_WRITEABLE) -> int:
        flags |= 0 if iova is None else FIXED
        return self.call(uapi.IOMMU_IOAS_MAP, "IIIQQQ", flags, ioas, 0, vaddr, size, iova or 0)[5]

    def map_file(
        self, ioas: int, fd: int, start: int, size: int, *, iova: int | None = None, flags: int = READABLE_WRITEABLE
    ) -> int:
        flags |= 0 if iova is None else FIXED
        return self.call(uapi.IOMMU_IOAS_MAP_FILE, "IIiQQQ", flags, ioas, fd, start, size, iova or 0)[5]

    def unmap(self, ioas: int, iova: int, size: int) -> int:
        return self.call(uapi.IOMMU_IOAS_UNMAP, "IQQ", ioas, iova, size)[2]

    def copy(
        self, target: int, source: int, size: int, *, to: int | None, start: int, flags: int = READABLE_WRITEABLE
    ) -> int:
        flags |= 0 if to is None else FIXED
        return self.call(uapi.IOMMU_IOAS_COPY, "IIIQQQ", flags, target, source, size, to or 0, start)[4]

    def ranges(self, ioas: int, room: int = 16) -> tuple[list[tuple[int, int]], int, int]:
        """The ranges that were written, how many there are, and the alignment."""
        spans = (ctypes.c_uint64 * (2 * room + 2))()
        answer = self.call(uapi.IOMMU_IOAS_IOVA_RANGES, "IIIQQ", ioas, room, 0, ctypes.addressof(spans), 0)
        return [(spans[2 * n], spans[2 * n + 1]) for n in range(min(answer[1], room))], answer[1], answer[4]

    def allow(self, ioas: int, *spans: tuple[int, int]) -> None:
        numbers = (ctypes.c_uint64 * (2 * len(spans) + 2))(*[number for span in spans for number in span])
        self.call(uapi.IOMMU_IOAS_ALLOW_IOVAS, "IIIQ", ioas, len(spans), 0, ctypes.addressof(numbers))

    def option(self, option: int, operation: int, number: int, value: int = 0) -> int:
        return self.call(uapi.IOMMU_OPTION, "IHHIQ", option, operation, 0, number, value)[4]

    def huge_pages(self, ioas: int, value: int) -> int:
        return self.option(1, 0, ioas, value)

    def by_process(self) -> int:
        return self.option(0, 0, 0, 1)

    def vfio_ioas(self, operation: int, ioas: int = 0) -> int:
        return self.call(uapi.IOMMU_VFIO_IOAS, "IHH", ioas, operation, 0)[0]

    def hwpt(self, device: int, target: int, flags: int = 0, data_type: int = 0, data_size: int = 0) -> int:
        values = (flags, device, target, 0, 0, data_type, data_size, 0, 0, 0)
        return self.call(uapi.IOMMU_HWPT_ALLOC, "7IQII", *values)[3]

    def hw_info(self, device: int, room: int) -> tuple[int, int, bytes]:
        """The size of the kernel's data, its type, and the buffer."""
        data = ctypes.create_string_buffer(b"\xff" * (room + 1), room + 1)
        answer = self.call(uapi.IOMMU_GET_HW_INFO, "IIIQIIQ", 0, device, room, ctypes.addressof(data), 0, 0, 0)
        return answer[2], answer[4], data.raw[:room]

    def set_dirty(self, hwpt: int, flags: int) -> None:
        self.call(uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, "III", flags, hwpt, 0)

    def get_dirty(self, hwpt: int, iova: int, size: int, page: int = 4096, flags: int = 0) -> int:
        """The bits of the pages."""
        words = (ctypes.c_uint64 * (size // page // 64 + 1))() if page else (ctypes.c_uint64 * 1)()
        values = (hwpt, flags, 0, iova, size, page, ctypes.addressof(words))
        self.call(uapi.IOMMU_HWPT_GET_DIRTY_BITMAP, "IIIQQQQ", *values)
        return int.from_bytes(bytes(words), "little")

    def change_process(self) -> None:
        self.call(uapi.IOMMU_IOAS_CHANGE_PROCESS, "I", 0)

    # The requests of a container, for the space of `vfio_ioas`.

    def map_dma(self, vaddr: int, iova: int, size: int, flags: int = 3) -> None:
        self.kernel.ioctl(
            self.fd, ioctls.VFIO_IOMMU_MAP_DMA, bytearray(struct.pack("=IIQQQ", 32, flags, vaddr, iova, size))
        )

    def unmap_dma(self, iova: int, size: int, flags: int = 0) -> tuple[object, int]:
        """0 or the errno, and the size that was written back."""
        buffer = bytearray(struct.pack("=IIQQ", 24, flags, iova, size))
        answer = outcome(lambda: self.kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, buffer))
        return answer, struct.unpack("=IIQQ", buffer)[3]

    def close(self) -> None:
        self.kernel.close(self.fd)


class BareDevice:
    """An open node of a device."""

    def __init__(self, kernel: Kernel, bdf: str) -> None:
        self.kernel = kernel
        self.fd = kernel.open(str(node_of(kernel, bdf)), os.O_RDWR | os.O_CLOEXEC)

    def call(self, request: int, layout: str, *values: int) -> tuple[int, ...]:
        buffer = bytearray(struct.pack("=I" + layout, struct.calcsize("=I" + layout), *values))
        self.kernel.ioctl(self.fd, request, buffer)
        return struct.unpack("=I" + layout, buffer)[1:]

    def bind(self, iommufd: int, flags: int = 0) -> int:
        return self.call(ioctls.VFIO_DEVICE_BIND_IOMMUFD, "IiI", flags, iommufd, 0)[2]

    def attach(self, target: int) -> int:
        return self.call(ioctls.VFIO_DEVICE_ATTACH_IOMMUFD_PT, "II", 0, target)[1]

    def detach(self) -> None:
        self.call(ioctls.VFIO_DEVICE_DETACH_IOMMUFD_PT, "I", 0)

    def info(self) -> tuple[int, ...]:
        """Flags, regions, irqs."""
        return self.call(ioctls.VFIO_DEVICE_GET_INFO, "IIII", 0, 0, 0, 0)[:3]

    def close(self) -> None:
        self.kernel.close(self.fd)


def node_of(kernel: Kernel, bdf: str) -> Path:
    """The node of a device, by sysfs."""
    (name,) = os.listdir(kernel.sysfs / "bus/pci/devices" / bdf / "vfio-dev")
    return kernel.dev / "vfio/devices" / name
