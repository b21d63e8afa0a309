"""The basis of contract tests: a kernel, a device bound to a VFIO driver, and short names for the calls.

Everything goes through the seam: `Kernel` and the structures of `pyvfio.ioctls`. `World` contains the differences
between a fake and a real kernel in arranging a test. The observations of a test are the same on both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import pytest

from pyvfio import ioctls, pci
from pyvfio.kernel import IoctlArgument, Kernel
from pyvfio.units import KIB, PAGE_SIZE, IovaRange

PRIVATE = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
NONE, READ, WRITE = 0, 1, 2  # PROT_* and VFIO_DMA_MAP_FLAG_* have the same numbers
BOTH = READ | WRITE
BASE = 0x10_0000  # an IOVA that every IOMMU has
PAGE = PAGE_SIZE
NULL = 0
BAD_ADDRESS = 0x1000  # below vm.mmap_min_addr: never mapped
# Registers of an e1000e in BAR 0: ICR, which is cleared by a read, ICS, IMS, IMC; and LSC, a cause.
_INTERRUPT_CAUSE_READ, _INTERRUPT_CAUSE_SET, _INTERRUPT_MASK_SET, _INTERRUPT_MASK_CLEAR = 0xC0, 0xC8, 0xD0, 0xD8
_LINK_STATUS_CHANGE = 4
_CAP_IPC_LOCK = 14
_LINUX_CAPABILITY_VERSION_3 = 0x20080522


@contextlib.contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """Check that the code inside fails with this errno, or with one of these."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the errno is what is compared)
        yield
    got = caught.value.errno or 0
    assert got in numbers, f"{errno.errorcode.get(got)} instead of {[errno.errorcode.get(n) for n in numbers]}"


def real_message(kernel: Kernel, fd: int, _bdf: str) -> None:
    """Let an e1000e, a bus master open as `fd`, raise its interrupt: unmask a cause and set the cause.

    A cause that is set already raises no interrupt, and a reset by power states leaves the cause set. Therefore all
    causes are cleared first.
    """
    kernel.pwrite(fd, b"\xff" * 4, _INTERRUPT_MASK_CLEAR)
    kernel.pread(fd, 4, _INTERRUPT_CAUSE_READ)
    for register in (_INTERRUPT_MASK_SET, _INTERRUPT_CAUSE_SET):
        kernel.pwrite(fd, struct.pack("<I", _LINK_STATUS_CHANGE), register)


def real_pinned() -> int:
    """Return VmPin, the memory of this process that iommufd has pinned, in bytes."""
    _, _, tail = Path("/proc/self/status").read_bytes().partition(b"VmPin:")
    return int(tail.split(None, 1)[0]) * KIB


@contextlib.contextmanager
def real_memlock(limit: int, *, privileged: bool) -> Iterator[None]:
    """Set RLIMIT_MEMLOCK to `limit` bytes, with or without CAP_IPC_LOCK; restore both afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    before = ctypes.create_string_buffer(24)
    assert libc.capget(header, before) == 0
    values = list(struct.unpack("=6I", before.raw))
    if not privileged:
        values[0] &= ~(1 << _CAP_IPC_LOCK)  # the effective set; the permitted set stays, so the capability can return
    old = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, old[1]))
    assert libc.capset(header, struct.pack("=6I", *values)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before.raw) == 0
        resource.setrlimit(resource.RLIMIT_MEMLOCK, old)


def real_rebind(kernel: Kernel, bdf: str, driver: str | None) -> None:
    """Bind a device to another driver (None: to none), even if its group is in use. The driver may refuse."""
    home = kernel.sysfs / "bus/pci/devices" / bdf
    if (home / "driver").exists():
        pci.write_sysfs(home / "driver/unbind", bdf)
    pci.write_sysfs(home / "driver_override", f"{driver or pci.NO_DRIVER}\n")
    with contextlib.suppress(OSError):  # some kernels report a refusal of the driver here; the device has none then
        pci.write_sysfs(kernel.sysfs / "bus/pci/drivers_probe", bdf)


class MemlockLimit(Protocol):
    """Limits locked memory: the total in bytes, and whether this process may exceed the limit."""

    def __call__(self, limit: int, *, privileged: bool) -> contextlib.AbstractContextManager[None]: ...


@dataclass
class World:
    """A kernel and a device. `version` is (major, minor).

    Fakes and kernels differ in five arrangements. `limit_memlock` limits locked memory. `rebind(bdf, driver)` changes a
    driver. `forgive()` is called after a test unmapped memory that is mapped for a device, which a fake treats as a
    mistake. `have_raised(fd, bdf)` raises the message of an e1000e. `pinned()` returns the bytes of this process's
    memory that are pinned for devices through an iommufd.
    """

    kernel: Kernel
    bdf: str
    group: int
    version: tuple[int, int]
    limit_memlock: MemlockLimit
    rebind: Callable[[str, str | None], None]
    forgive: Callable[[], None]
    have_raised: Callable[[int, str], None]
    pinned: Callable[[], int]
    _fds: list[int] = field(default_factory=list)
    _memory: list[tuple[int, int]] = field(default_factory=list)
    _drivers: dict[str, str | None] = field(default_factory=dict)

    def around(self, bdf: str, group: int) -> World:
        """Return the same world around another device. `end` of one world is also that of the other."""
        return replace(self, bdf=bdf, group=group)

    def apart(self) -> World:
        """Return the same world, whose `end` closes only descriptors opened through that world."""
        return replace(self, _fds=[], _memory=[], _drivers={})

    def memlock(self, limit: int, *, privileged: bool = False) -> contextlib.AbstractContextManager[None]:
        """Limit locked memory in total, in bytes; a `privileged` process may exceed the limit."""
        return self.limit_memlock(limit, privileged=privileged)

    def driver_of(self, bdf: str) -> str | None:
        """Return the driver of a device."""
        return pci.read_device(bdf, kernel=self.kernel).driver

    def bind(self, bdf: str, driver: str | None) -> None:
        """Bind a device to another driver (None: to none) until the test ends. The driver may refuse."""
        self._drivers.setdefault(bdf, self.driver_of(bdf))
        self.rebind(bdf, driver)

    def since(self, major: int, minor: int) -> bool:
        """Return whether the kernel has that version or a later one."""
        return self.version >= (major, minor)

    def keep(self, fd: int) -> int:
        """Close `fd` at the end of the test, unless `close` did so."""
        self._fds.append(fd)
        return fd

    def open(self, name: str) -> int:
        """Open a node of /dev/vfio."""
        return self.keep(self.kernel.open(str(self.kernel.dev / "vfio" / name), os.O_RDWR))

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        self._fds.remove(fd)
        self.kernel.close(fd)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Make the ioctl."""
        return self.kernel.ioctl(fd, request, argument)

    def memory(self, size: int = PAGE, *, protection: int = BOTH) -> int:
        """Return the address of private anonymous memory that exists until the end of the test."""
        vaddr = self.kernel.mmap(0, size, protection, PRIVATE)
        self._memory.append((vaddr, size))
        return vaddr

    def end(self) -> None:
        """Close and unmap everything: devices before groups before containers; then restore the drivers."""
        for fd in reversed(self._fds):
            self.kernel.close(fd)
        for bdf, driver in self._drivers.items():
            self.rebind(bdf, driver)
        for vaddr, size in self._memory:
            self.kernel.munmap(vaddr, size)

    def set_container(self, group: int, container: int) -> None:
        """Call VFIO_GROUP_SET_CONTAINER."""
        self.ioctl(group, ioctls.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))

    def open_device(self, group: int, name: str | None = None) -> int:
        """Call VFIO_GROUP_GET_DEVICE_FD."""
        argument = bytearray((name or self.bdf).encode() + b"\0")
        return self.keep(self.ioctl(group, ioctls.VFIO_GROUP_GET_DEVICE_FD, argument))

    def status(self, group: int) -> int:
        """Return the flags of VFIO_GROUP_GET_STATUS."""
        answer = ioctls.vfio_group_status(argsz=8)
        self.ioctl(group, ioctls.VFIO_GROUP_GET_STATUS, answer)
        return answer.flags


@dataclass
class Sriov:
    """The world around a physical function of SR-IOV. `make_virtual` returns the world around a virtual one."""

    physical: World
    make_virtual: Callable[[], World]


@dataclass
class Attached:
    """A container with the world's group and an IOMMU type set."""

    world: World
    container: int
    group: int

    @classmethod
    def of(cls, world: World, kind: int) -> Attached:
        """Open, attach and set the IOMMU type."""
        attached = cls(world, world.open("vfio"), world.open(str(world.group)))
        world.set_container(attached.group, attached.container)
        world.ioctl(attached.container, ioctls.VFIO_SET_IOMMU, kind)
        return attached

    def map(
        self, *, iova: int = BASE, size: int = PAGE, vaddr: int | None = None, flags: int = BOTH, argsz: int = 32
    ) -> int:
        """Call VFIO_IOMMU_MAP_DMA for memory at `vaddr` (None: new memory of that size). Return the address."""
        if vaddr is None:
            vaddr = self.world.memory(size)
        argument = ioctls.vfio_iommu_type1_dma_map(argsz=argsz, flags=flags, vaddr=vaddr, iova=iova, size=size)
        before = bytes(argument)
        try:
            assert self.world.ioctl(self.container, ioctls.VFIO_IOMMU_MAP_DMA, argument) == 0
        finally:
            assert bytes(argument) == before, "the kernel never writes to this structure"
        return vaddr

    def unmap(self, *, iova: int = BASE, size: int = PAGE, flags: int = 0, argsz: int = 24) -> int:
        """Call VFIO_IOMMU_UNMAP_DMA. Return the number of unmapped bytes."""
        argument = ioctls.vfio_iommu_type1_dma_unmap(argsz=argsz, flags=flags, iova=iova, size=size)
        before = bytes(argument)
        try:
            assert self.world.ioctl(self.container, ioctls.VFIO_IOMMU_UNMAP_DMA, argument) == 0
        except OSError:
            assert bytes(argument) == before, "a call that fails writes nothing back"
            raise
        assert bytes(argument)[:16] == before[:16]
        return argument.size

    def unmap_all(self) -> int:
        """Unmap everything. Return the number of unmapped bytes."""
        return self.unmap(iova=0, size=0, flags=ioctls.VFIO_DMA_UNMAP_FLAG_ALL)

    def raw_info(self, argsz: int, *, room: int = 4096) -> bytes:
        """Return the answer of VFIO_IOMMU_GET_INFO in a buffer of `room` bytes 0xAA with this `argsz`."""
        buffer = (ctypes.c_char * room).from_buffer_copy(struct.pack("=I", argsz) + b"\xaa" * (room - 4))
        self.world.ioctl(self.container, ioctls.VFIO_IOMMU_GET_INFO, buffer)
        return buffer.raw

    def capabilities(self) -> dict[int, bytes]:
        """Return the capabilities by id, headers included, each up to the next one or the end of the answer."""
        total = struct.unpack_from("=I", self.raw_info(16))[0]
        answer = self.raw_info(total)
        at: int = struct.unpack_from("=I", answer, 16)[0]
        found = {}
        while at:
            identity, _version, following = struct.unpack_from("=HHI", answer, at)
            found[identity] = answer[at : following or total]
            at = following
        return found

    def ranges(self) -> list[IovaRange]:
        """Return the IOVA ranges."""
        body = self.capabilities()[ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE]
        (count,) = struct.unpack_from("=I", body, 8)
        return [IovaRange(*pair) for pair in struct.iter_unpack("=QQ", body[16 : 16 + 16 * count])]

    def avail(self) -> int:
        """Return the number of mappings that the container still accepts."""
        answer: int = struct.unpack_from("=I", self.capabilities()[ioctls.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL], 8)[0]
        return answer

    def locked(self) -> int:
        """Return the number of bytes that this process has locked."""
        return self.world.kernel.memlock().used
