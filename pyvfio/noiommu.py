"""Devices without an IOMMU get no protection: such a device reads and writes all memory of the machine.

A driver gives the device physical addresses. `UnsafeNoIommu` has the memory for that: huge pages, which the kernel
neither swaps out nor compacts, and the physical addresses of these pages.

Physical addresses have two sources:

* /proc/self/pagemap, for a device that was opened through a group. The pages are not pinned. An administrator can
  move the pages (migratepages, removal of a memory module). If the process is killed, the kernel can free the pages
  before the device stops.
* IOMMU_IOAS_NOIOMMU_GET_PA (Linux 7.3), for a device that was opened by a node of its own. iommufd pins the pages until
  the kernel has closed and stopped the device, also if the process is killed.

Source: Documentation/admin-guide/mm/pagemap.rst; drivers/vfio/container.c; drivers/iommu/iommufd.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

from pyvfio import ioctls
from pyvfio.container import Group
from pyvfio.errors import ClosedError, IoctlError, UnsafeNoIommuWarning, UnsupportedError, VfioError
from pyvfio.guard import ContextManager, Guard, close_now, closing, constructing, guarded
from pyvfio.handle import Handle, attempt_all
from pyvfio.iommufd import Iommufd
from pyvfio.memory import Memfd
from pyvfio.pci.nodes import explain_container
from pyvfio.pci.noiommu import RISK
from pyvfio.ramblock import RamBlockList
from pyvfio.unique import Unique
from pyvfio.units import MIB, PAGE_SIZE, Vaddr, check_whole_number

if TYPE_CHECKING:
    from pyvfio.kernel import Kernel
    from pyvfio.ramblock import RamBlock

logger = logging.getLogger(__name__)

_entry = struct.Struct("=Q")  # of pagemap
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_SET_IOMMU_HINTS = {
    errno.EPERM: "No-IOMMU mode needs CAP_SYS_RAWIO",
    errno.ENODEV: "The kernel was built without CONFIG_VFIO_NOIOMMU",
}
_kept: set[RamBlockList] = set()
# A device writes to memory until the device is closed. Until then, no garbage collection may free the memory.


class PhysicalRange(NamedTuple):
    """A part of memory that is contiguous for the device: `size` bytes from byte `offset` on, at physical `address`."""

    offset: int
    address: int
    size: int

    def __repr__(self) -> str:
        return f"PhysicalRange(offset={self.offset:#x}, address={self.address:#x}, size={self.size:#x})"


class PhysicalMemory(Unique):
    """Memory of huge pages whose physical addresses are known. `UnsafeNoIommu.allocate` makes the object.

    The memory lives until the device is closed, since the device can access it until then.

    Synchronization: any thread.
    """

    def __init__(self, space: UnsafeNoIommu, block: RamBlock, key: int, ranges: tuple[PhysicalRange, ...]) -> None:
        self._space = space
        self._block = block
        self._key = key
        self.size = block.used_length
        """The size in bytes."""
        self.vaddr: Vaddr = block.vaddr
        """The address in this process."""
        self.ranges = ranges
        """The parts that are contiguous for the device, ascending by offset. Together they are the whole memory."""

    def __repr__(self) -> str:
        return f"<PhysicalMemory UNSAFE of {self.size:#x} bytes, ranges: {len(self.ranges)}>"

    def physical(self, offset: int = 0, size: int = 1) -> int:
        """Return the physical address of byte `offset`, from which on `size` bytes are contiguous.

        Raises TypeError, and ValueError if the bytes are not in the memory, or not contiguous for the device. O(n) for
        n ranges.
        """
        offset, size = check_whole_number(offset, "offset"), check_whole_number(size, "size")
        if offset < 0 or size <= 0 or offset + size > self.size:
            raise ValueError(f"bytes {offset:#x} and {size:#x} more are not all in a memory of {self.size:#x} bytes")
        for part in self.ranges:
            if offset < part.offset + part.size:
                if offset + size > part.offset + part.size:
                    break
                return part.address + offset - part.offset
        raise ValueError(f"the {size:#x} bytes at offset {offset:#x} are not contiguous for the device: see `ranges`")

    def view(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> memoryview:
        """Return a writable view of `size` bytes from byte `offset` on; `size` None: up to the end.

        While a view lives, the memory is not freed, also after the close of the device. Raises ValueError, and
        ClosedError once the device is closed.
        """
        return self._block.view(offset, size)

    def check_unmoved(self) -> None:
        """Raise VfioError if a page has moved: the device then accesses the memory of somebody else.

        Huge pages move only on request of an administrator. Raises ClosedError once the device is closed.
        Cost: as the look-ups of `allocate`.
        """
        now = self._space.look_up(self._key, self.size, self._block.page_size)
        moved = [part for part in self.ranges if part not in now]
        if moved:
            raise VfioError(
                f"the physical address of the memory has changed: {moved[0]!r} is no longer right",
                hint="Stop the device at once: device.reset() or device.bus_master = False. These move huge pages: "
                "migratepages, a cpuset with memory_migrate, the removal of a memory module",
            )


class UnsafeNoIommu(ContextManager, Unique, ABC):
    """No protection: the device reads and writes all memory of the machine, whatever this object says.

    `device.unsafe_noiommu` of a device that was opened with `iommu="unsafe-noiommu"`. This is no address space. Nothing
    is mapped, nothing is confined, and no DmaMapper takes the object. A wrong address in a register of the device
    corrupts the kernel or any process.

    Synchronization: any thread.

    Example:
        >>> import pyvfio
        >>> import warnings
        >>> kernel = pyvfio.testing.FakeKernel("7.3", iommu="none")
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     device = pyvfio.open_device("0000:00:02.0", iommu="unsafe-noiommu", kernel=kernel)
        >>> memory = device.unsafe_noiommu.allocate(2 * pyvfio.MIB)
        >>> with memory.view(0, 5) as view:
        ...     view[:] = b"hello"
        >>> kernel.dma_read("0000:00:02.0", memory.physical(0, 5), 5)
        b'hello'
        >>> device.close()
    """

    def __init__(self, kernel: Kernel, what: str) -> None:
        self.kernel = kernel
        """The kernel that makes the system calls."""
        self.guard = Guard(f"no-IOMMU mode of {what}")
        self.closed = False
        """Whether the device has been closed."""
        self.memories: list[PhysicalMemory] = []
        """The memory that `allocate` returned. Read only."""
        self._blocks = RamBlockList(kernel=kernel)
        self._numbers = count()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"memories: {len(self.memories)}"
        return f"<{type(self).__name__}, WITHOUT PROTECTION, {state}>"

    # ------------------------------------------------------------------------------------------------ for subclasses

    @property
    @abstractmethod
    def owner(self) -> Group | Iommufd:
        """The handle through which the device is opened. For the library."""

    @abstractmethod
    def _pin(self, vaddr: int, size: int) -> int:
        """Keep pages where they are, and return a number for `_pieces`."""

    @abstractmethod
    def _unpin(self, key: int, size: int) -> None:
        """Undo `_pin`."""

    @abstractmethod
    def _pieces(self, key: int, size: int, page_size: int) -> Iterator[tuple[int, int]]:
        """Yield the physical address and the size of each contiguous piece, in order."""

    @abstractmethod
    def _close_owner(self) -> None:
        """Close the handles."""

    # ------------------------------------------------------------------------------------------------ memory

    @property
    def devices(self) -> list[Handle]:
        """The open devices. For the library."""
        return self.owner.devices

    @guarded
    def allocate(self, size: int, *, page_size: int = 2 * MIB, dma_bits: int = 64) -> PhysicalMemory:
        """Allocate memory of huge pages, filled with zeros, and look up the physical addresses.

        `size`: bytes, a multiple of `page_size`, which is the size of the huge pages. Within a huge page all bytes are
        contiguous; two huge pages need not be. `dma_bits`: the number of address bits of the device. The memory is
        freed when the device is closed, and not before.

        Raises TypeError, ValueError; ClosedError; IoctlError if there are too few huge pages. Raises VfioError, and
        frees the memory, if this process may not know physical addresses (CAP_SYS_ADMIN), or if a page lies above
        2^`dma_bits`.
        Cost: zeroing the memory; a read for each huge page, or through iommufd an ioctl for each contiguous part.
        """
        bits = check_whole_number(dma_bits, "dma_bits")
        if not PAGE_SIZE.bit_length() <= bits <= 64:
            raise ValueError(f"dma_bits must be {PAGE_SIZE.bit_length()} to 64, not {bits}")
        memory_kind, length = Memfd(hugetlb=page_size), check_whole_number(size, "size")
        if length <= 0 or length % page_size:
            raise ValueError(f"size must be a multiple of {page_size} bytes and above 0, not {length}")
        self._check_open()
        block = self._blocks.add(
            f"unsafe-noiommu-{next(self._numbers)}",
            used_length=length,
            max_length=length,
            memory=memory_kind,
            prealloc=1,
        )
        try:
            memory = self._locate(block, bits)
        except BaseException:
            block.remove()
            raise
        self.memories.append(memory)
        logger.debug("allocated %r", memory)
        return memory

    def _locate(self, block: RamBlock, dma_bits: int) -> PhysicalMemory:
        key = self._pin(block.vaddr, block.used_length)
        try:
            ranges = self.look_up(key, block.used_length, block.page_size)
            _check_reach(ranges, dma_bits)
        except BaseException:
            self._unpin(key, block.used_length)
            raise
        _kept.add(self._blocks)
        return PhysicalMemory(self, block, key, ranges)

    @guarded
    def look_up(self, key: int, size: int, page_size: int) -> tuple[PhysicalRange, ...]:
        """Return the present physical addresses, neighbours merged. For the library."""
        self._check_open()
        ranges: list[PhysicalRange] = []
        offset = 0
        for address, length in self._pieces(key, size, page_size):
            last = ranges[-1] if ranges else None
            if last is not None and last.address + last.size == address:
                ranges[-1] = last._replace(size=last.size + length)
            else:
                ranges.append(PhysicalRange(offset, address, length))
            offset += length
        return tuple(ranges)

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.guard.what} has been closed")

    @closing
    def close(self) -> None:
        """Free the memory. `Device.close` makes this call. Raises VfioError while the device is open."""
        if self.devices:
            raise VfioError(
                "the memory cannot be freed while a device can access it",
                hint="Close the device, which frees the memory",
            )
        if self.closed:
            return
        self._close_owner()
        self.closed = True
        self._blocks.close()
        _kept.discard(self._blocks)


def _check_reach(ranges: tuple[PhysicalRange, ...], dma_bits: int) -> None:
    for part in ranges:
        if part.address + part.size > 1 << dma_bits:
            raise VfioError(
                f"the kernel allocated memory at physical address {part.address:#x}, and the device has {dma_bits} "
                "address bits",
                hint="The kernel chooses huge pages. More pages (vm.nr_hugepages) and a second call can give others",
            )


# ---------------------------------------------------------------------------------------------------- through a group


class _Container(Handle):
    """A container that holds a group without an IOMMU. VFIO_SET_IOMMU is the only call that such a container knows."""

    @constructing(Handle.close_fd)
    def __init__(self, kernel: Kernel) -> None:
        path = kernel.dev / "vfio/vfio"
        try:
            fd = kernel.open(str(path), os.O_RDWR)
        except OSError as error:
            raise explain_container(kernel, path, error) from error
        super().__init__(kernel, fd, "the container without an IOMMU")


class UnsafeByGroup(UnsafeNoIommu):
    """No protection: a device that is opened through the group that VFIO made for it. As `UnsafeNoIommu`."""

    def __init__(self, kernel: Kernel, number: int) -> None:
        super().__init__(kernel, f"IOMMU group {number}")
        self._container = _Container(kernel)
        try:
            self._group = Group(number, kernel=kernel)
            try:
                self._group.set_container(self._container)
                self._container.ioctl(
                    "VFIO_SET_IOMMU", int(ioctls.VFIO_NOIOMMU_IOMMU), hints=_SET_IOMMU_HINTS, iommu="VFIO_NOIOMMU_IOMMU"
                )
            except BaseException:
                close_now(self._group)
                raise
        except BaseException:
            close_now(self._container)
            raise

    @property
    def owner(self) -> Group:
        """As `UnsafeNoIommu.owner`."""
        return self._group

    def _pin(self, vaddr: int, size: int) -> int:
        del size  # no call pins memory for a group. Huge pages stay where they are unless an administrator moves them
        return vaddr

    def _unpin(self, key: int, size: int) -> None:
        pass

    def _pieces(self, key: int, size: int, page_size: int) -> Iterator[tuple[int, int]]:
        path = str(self.kernel.proc / "self/pagemap")
        try:
            fd = self.kernel.open(path, os.O_RDONLY)
        except OSError as error:
            raise IoctlError.of(
                error, f"{path} could not be opened", request="open", arguments={"path": path}
            ) from error
        try:
            for vaddr in range(key, key + size, page_size):
                yield self._frame(fd, vaddr) * PAGE_SIZE, page_size
        finally:
            self.kernel.close(fd)

    def _frame(self, fd: int, vaddr: int) -> int:
        try:
            answer = self.kernel.pread(fd, _entry.size, vaddr // PAGE_SIZE * _entry.size)
        except OSError as error:
            raise IoctlError.of(
                error, "the pagemap could not be read", request="pread", arguments={"vaddr": vaddr}
            ) from error
        (entry,) = _entry.unpack(answer)
        if not entry & _PRESENT:
            raise VfioError(f"the page at vaddr {vaddr:#x} is not in memory, although the page was allocated")
        frame: int = entry & _FRAME
        if not frame:
            raise UnsupportedError(
                "the kernel hides physical addresses from this process: /proc/self/pagemap has the frame number 0",
                hint="Opening /proc/self/pagemap needs CAP_SYS_ADMIN outside of any user namespace: run as root of the "
                "machine",
            )
        return frame

    def _close_owner(self) -> None:
        attempt_all(
            f"closing {self.guard.what}", [partial(close_now, self._group), partial(close_now, self._container)]
        )


# ------------------------------------------------------------------------------------------- by a node of the device


class UnsafeByIommufd(UnsafeNoIommu):
    """No protection: a device that is opened by a node of its own, `noiommu-vfioN`. As `UnsafeNoIommu`."""

    def __init__(self, kernel: Kernel, bdf: str) -> None:
        super().__init__(kernel, bdf)
        self._iommufd = Iommufd(kernel=kernel)
        try:
            self.ioas_id = self._iommufd.ioas_alloc()
            """The number of the I/O address space, whose only use is to pin memory. For the library."""
        except BaseException:
            close_now(self._iommufd)
            raise

    @property
    def owner(self) -> Iommufd:
        """As `UnsafeNoIommu.owner`."""
        return self._iommufd

    def _pin(self, vaddr: int, size: int) -> int:
        return self._iommufd.ioas_map(self.ioas_id, vaddr=vaddr, size=size)

    def _unpin(self, key: int, size: int) -> None:
        self._iommufd.ioas_unmap(self.ioas_id, iova=key, size=size)

    def _pieces(self, key: int, size: int, page_size: int) -> Iterator[tuple[int, int]]:
        del page_size  # the kernel says how much is contiguous
        iova, end = key, key + size
        while iova < end:
            address, length = self._iommufd.ioas_noiommu_get_pa(self.ioas_id, iova=iova, size=end - iova)
            if not 0 < length <= end - iova:
                raise VfioError(f"the kernel says that {length:#x} of {end - iova:#x} bytes are contiguous")
            yield address, length
            iova += length

    def _close_owner(self) -> None:
        close_now(self._iommufd)


def warn_unsafe(bdf: str) -> None:
    """Warn that the device is opened without protection, at the line of the program. Raises if a filter says so."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyvfio."):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        UnsafeNoIommuWarning(f"{bdf} is opened WITHOUT PROTECTION: {RISK}"),
        stacklevel=level,
    )
