"""Short names for the calls on /dev/iommu and on a device's cdev, for the contract tests of iommufd.

Each call packs the structure of <linux/iommufd.h> by itself, makes the ioctl through the seam, and unpacks the answer.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pyvfio import ioctls
from pyvfio import iommufd_ioctls as uapi
from pyvfio.units import U64_MAX
from tests.contract.world import BASE, PAGE, World

FIXED, WRITEABLE, READABLE = 1, 2, 4  # IOMMU_IOAS_MAP_*
BOTH_WAYS = WRITEABLE | READABLE
OPTION_SET, OPTION_GET = 0, 1
RLIMIT_MODE, HUGE_PAGES = 0, 1  # IOMMU_OPTION_*
VFIO_GET, VFIO_SET, VFIO_CLEAR = 0, 1, 2  # IOMMU_VFIO_IOAS_*
EVERYTHING = (0, U64_MAX)
NO_ID = 0x7FFF_FFFF  # an id that no object has
ROOM = 8  # ranges

Span = tuple[int, int]
"""The first and the last byte of a range of IOVA."""


class Ranges:
    """Memory for structures iommu_iova_range."""

    def __init__(self, spans: Sequence[Span] = (), *, room: int = ROOM) -> None:
        flat = [number for span in spans for number in span]
        self._array = (ctypes.c_uint64 * (2 * max(room, len(spans))))(*flat)

    @property
    def address(self) -> int:
        """The address of the first range."""
        return ctypes.addressof(self._array)

    def read(self, count: int) -> list[Span]:
        """Return the first `count` ranges."""
        return [(self._array[2 * at], self._array[2 * at + 1]) for at in range(count)]


@dataclass
class Iommufd:
    """An open /dev/iommu."""

    world: World
    fd: int

    @classmethod
    def of(cls, world: World) -> Iommufd:
        """Open /dev/iommu."""
        return cls(world, world.keep(world.kernel.open(str(world.kernel.dev / "iommu"), os.O_RDWR)))

    def call(self, request: int, layout: str, *fields: int) -> tuple[int, ...]:
        """Make an ioctl with a structure of `size` and these fields. Return the fields after the call, without `size`.

        A call that fails leaves the structure as before.
        """
        size = struct.calcsize("=I" + layout)
        argument = bytearray(struct.pack("=I" + layout, size, *fields))
        before = bytes(argument)
        try:
            assert self.world.ioctl(self.fd, request, argument) == 0
        except OSError:
            assert bytes(argument) == before, "a call that fails writes nothing"
            raise
        return struct.unpack("=I" + layout, argument)[1:]

    def destroy(self, number: int) -> None:
        """Call IOMMU_DESTROY."""
        self.call(uapi.IOMMU_DESTROY, "I", number)

    def ioas(self) -> int:
        """Call IOMMU_IOAS_ALLOC. Return the id."""
        return self.call(uapi.IOMMU_IOAS_ALLOC, "II", 0, 0)[1]

    def map(
        self, ioas: int, *, iova: int | None = BASE, size: int = PAGE, vaddr: int | None = None, flags: int = BOTH_WAYS
    ) -> int:
        """Call IOMMU_IOAS_MAP for `vaddr` (None: new memory), at `iova` (None: of the kernel's choice).

        Return the IOVA.
        """
        if vaddr is None:
            vaddr = self.world.memory(max(size, PAGE))
        where = 0 if iova is None else iova
        flags |= 0 if iova is None else FIXED
        return self.call(uapi.IOMMU_IOAS_MAP, "IIIQQQ", flags, ioas, 0, vaddr, size, where)[5]

    def map_file(
        self,
        ioas: int,
        fd: int,
        *,
        start: int = 0,
        size: int = PAGE,
        iova: int | None = BASE,
        flags: int = BOTH_WAYS,
    ) -> int:
        """Call IOMMU_IOAS_MAP_FILE. Return the IOVA."""
        where = 0 if iova is None else iova
        flags |= 0 if iova is None else FIXED
        return self.call(uapi.IOMMU_IOAS_MAP_FILE, "IIiQQQ", flags, ioas, fd, start, size, where)[5]

    def unmap(self, ioas: int, *, iova: int = BASE, size: int = PAGE) -> int:
        """Call IOMMU_IOAS_UNMAP. Return the number of unmapped bytes."""
        return self.call(uapi.IOMMU_IOAS_UNMAP, "IQQ", ioas, iova, size)[2]

    def unmap_all(self, ioas: int) -> int:
        """Unmap everything. Return the number of unmapped bytes."""
        return self.unmap(ioas, iova=0, size=U64_MAX)

    def copy(
        self,
        target: int,
        source: int,
        *,
        iova: int | None = BASE,
        size: int = PAGE,
        source_iova: int = BASE,
        flags: int = BOTH_WAYS,
    ) -> int:
        """Call IOMMU_IOAS_COPY. Return the IOVA in the target."""
        where = 0 if iova is None else iova
        flags |= 0 if iova is None else FIXED
        return self.call(uapi.IOMMU_IOAS_COPY, "IIIQQQ", flags, target, source, size, where, source_iova)[4]

    def iova_ranges(self, ioas: int) -> tuple[list[Span], int]:
        """Call IOMMU_IOAS_IOVA_RANGES. Return the ranges and the alignment."""
        room = Ranges()
        answer = self.call(uapi.IOMMU_IOAS_IOVA_RANGES, "IIIQQ", ioas, ROOM, 0, room.address, 0)
        assert answer[1] <= ROOM
        return room.read(answer[1]), answer[4]

    def allow(self, ioas: int, *spans: Span) -> None:
        """Call IOMMU_IOAS_ALLOW_IOVAS."""
        ranges = Ranges(spans)
        self.call(uapi.IOMMU_IOAS_ALLOW_IOVAS, "IIIQ", ioas, len(spans), 0, ranges.address)

    def option(self, option: int, operation: int, number: int, value: int = 0) -> int:
        """Call IOMMU_OPTION. Return the value."""
        return self.call(uapi.IOMMU_OPTION, "IHHIQ", option, operation, 0, number, value)[4]

    def huge_pages(self, ioas: int) -> int:
        """Return the value of the option HUGE_PAGES."""
        return self.option(HUGE_PAGES, OPTION_GET, ioas)

    def set_huge_pages(self, ioas: int, value: int) -> None:
        """Set the option HUGE_PAGES."""
        self.option(HUGE_PAGES, OPTION_SET, ioas, value)

    def vfio_ioas(self, operation: int, ioas: int = 0) -> int:
        """Call IOMMU_VFIO_IOAS. Return the id."""
        return self.call(uapi.IOMMU_VFIO_IOAS, "IHH", ioas, operation, 0)[0]

    def hwpt_alloc(self, device: int, parent: int, flags: int = 0) -> int:
        """Call IOMMU_HWPT_ALLOC without data. Return the id."""
        return self.call(uapi.IOMMU_HWPT_ALLOC, "IIIIIIIQII", flags, device, parent, 0, 0, 0, 0, 0, 0, 0)[3]

    def compat_map(self, *, iova: int = BASE, size: int = PAGE, vaddr: int | None = None, flags: int = 3) -> None:
        """Call VFIO_IOMMU_MAP_DMA on the iommufd."""
        vaddr = self.world.memory(max(size, PAGE)) if vaddr is None else vaddr
        argument = ioctls.vfio_iommu_type1_dma_map(argsz=32, flags=flags, vaddr=vaddr, iova=iova, size=size)
        self.world.ioctl(self.fd, ioctls.VFIO_IOMMU_MAP_DMA, argument)

    def compat_unmap(self, *, iova: int = BASE, size: int = PAGE, flags: int = 0) -> int:
        """Call VFIO_IOMMU_UNMAP_DMA on the iommufd. Return the number of unmapped bytes."""
        argument = ioctls.vfio_iommu_type1_dma_unmap(argsz=24, flags=flags, iova=iova, size=size)
        self.world.ioctl(self.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
        return argument.size

    def mapped(self, ioas: int, first: int = BASE, pages: int = 64) -> list[int]:
        """Return the pages from `first` on that are mapped, found by copies of one page into an IOAS apart."""
        probe, found = self.ioas(), []
        for page in range(pages):
            try:
                self.copy(probe, ioas, source_iova=first + page * PAGE, iova=page * PAGE, flags=READABLE)
            except FileNotFoundError:
                continue
            found.append(page)
        self.unmap_all(probe)
        self.destroy(probe)
        return found


@dataclass
class Cdev:
    """An open cdev of a device, not bound."""

    world: World
    fd: int
    number: int = 0
    """The device's id in the iommufd, after `bind`."""

    @classmethod
    def of(cls, world: World) -> Cdev:
        """Open the cdev of the world's device."""
        return cls(world, open_cdev(world))

    def bind(self, iommufd: int, *, argsz: int = 16, flags: int = 0) -> int:
        """Call VFIO_DEVICE_BIND_IOMMUFD. Return the id of the device."""
        argument = bytearray(struct.pack("=IIiI", argsz, flags, iommufd, 0))
        assert self.world.ioctl(self.fd, ioctls.VFIO_DEVICE_BIND_IOMMUFD, argument) == 0
        self.number = struct.unpack("=IIiI", argument)[3]
        return self.number

    def attach(self, number: int, *, argsz: int = 12, flags: int = 0) -> int:
        """Call VFIO_DEVICE_ATTACH_IOMMUFD_PT. Return the id of the page table."""
        argument = bytearray(struct.pack("=III", argsz, flags, number))
        before = bytes(argument)
        try:
            assert self.world.ioctl(self.fd, ioctls.VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument) == 0
        except OSError:
            assert bytes(argument) == before, "a call that fails writes nothing"
            raise
        answer: int = struct.unpack("=III", argument)[2]
        return answer

    def detach(self, *, argsz: int = 8, flags: int = 0) -> None:
        """Call VFIO_DEVICE_DETACH_IOMMUFD_PT."""
        argument = bytearray(struct.pack("=II", argsz, flags))
        assert self.world.ioctl(self.fd, ioctls.VFIO_DEVICE_DETACH_IOMMUFD_PT, argument) == 0

    def get_info(self) -> int:
        """Call VFIO_DEVICE_GET_INFO. Return the number of regions."""
        argument = bytearray(struct.pack("=IIIII", 20, 0, 0, 0, 0))
        assert self.world.ioctl(self.fd, ioctls.VFIO_DEVICE_GET_INFO, argument) == 0
        answer: int = struct.unpack("=IIIII", argument)[2]
        return answer


def cdev_path(world: World) -> str:
    """Return the path of the cdev of the world's device."""
    (name,) = os.listdir(world.kernel.sysfs / "bus/pci/devices" / world.bdf / "vfio-dev")
    return str(world.kernel.dev / "vfio/devices" / name)


def open_cdev(world: World) -> int:
    """Open the cdev of the world's device."""
    return world.keep(world.kernel.open(cdev_path(world), os.O_RDWR))


@dataclass
class Rig:
    """A device that is bound to an iommufd and attached to an IOAS, with short names for the calls on both."""

    iommufd: Iommufd
    cdev: Cdev
    ioas: int
    hwpt: int

    @classmethod
    def of(cls, iommufd: Iommufd, *, ioas: int | None = None) -> Rig:
        """Bind the device of the iommufd's world, and attach the device to `ioas` (None: a new one)."""
        cdev = Cdev.of(iommufd.world)
        cdev.bind(iommufd.fd)
        ioas = iommufd.ioas() if ioas is None else ioas
        return cls(iommufd, cdev, ioas, cdev.attach(ioas))

    @property
    def world(self) -> World:
        """The kernel and the device."""
        return self.iommufd.world

    @property
    def ranges(self) -> list[Span]:
        """The ranges of IOVA that can be mapped."""
        return self.iommufd.iova_ranges(self.ioas)[0]

    def map(
        self, *, iova: int | None = BASE, size: int = PAGE, vaddr: int | None = None, flags: int = BOTH_WAYS
    ) -> int:
        """Call IOMMU_IOAS_MAP. Return the IOVA."""
        return self.iommufd.map(self.ioas, iova=iova, size=size, vaddr=vaddr, flags=flags)

    def unmap(self, *, iova: int = BASE, size: int = PAGE) -> int:
        """Call IOMMU_IOAS_UNMAP. Return the number of unmapped bytes."""
        return self.iommufd.unmap(self.ioas, iova=iova, size=size)

    def unmap_all(self) -> int:
        """Unmap everything. Return the number of unmapped bytes."""
        return self.iommufd.unmap_all(self.ioas)
