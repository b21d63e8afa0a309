"""A machine without an IOMMU: devices reach all memory by physical addresses, which the fake makes up.

A look-up of an address gives each aligned 2 MiB of the process a physical home of its own. No two of them are
neighbours. The home of an address never changes, and devices reach the memory that is at the address now.

Source: drivers/vfio/container.c and group.c; Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import errno
import struct
from pathlib import Path

from pyvfio import ioctls
from pyvfio.kernel import LinuxKernel
from pyvfio.testing.fake.pins import Mapped
from pyvfio.testing.fake.process import Argument, refuse
from pyvfio.testing.fake.type1 import READ, WRITE, DmaTable
from pyvfio.units import MIB, PAGE_SIZE, Iova, Vaddr, align_down

PARAMETERS = "module/vfio/parameters"
"""The directory below sysfs with the parameter of the mode."""

HUGE = 2 * MIB
"""The bytes that are contiguous in physical memory."""

_FIRST = 0x1_0000_0000  # where the first memory is
_STEP = 2 * HUGE
_ENTRY = struct.Struct("=Q")
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1
_HUGETLB = 4  # MFD_HUGETLB, with the size in the upper bits
_SHIFT = 26


class NoIommu:
    """No-IOMMU mode of a fake machine, and the physical memory.

    `raw_io`: whether the process has CAP_SYS_RAWIO, which each open needs. `shows_frames`: whether the process has
    CAP_SYS_ADMIN, without which /proc/self/pagemap has zeros for physical addresses. Both can be set at any time.
    """

    def __init__(self) -> None:
        self.raw_io = True
        self.shows_frames = True
        self.table = DmaTable()
        """The memory whose addresses have been looked up, by physical address."""
        self._enabled = True
        self._file: Path | None = None
        self._homes: dict[int, int] = {}

    @property
    def enabled(self) -> bool:
        """The parameter enable_unsafe_noiommu_mode: without, vfio-pci binds no device. Can be set at any time."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self.show()

    def show(self, sysfs: Path | None = None) -> None:
        """Show the parameter in the file below `sysfs`, from now on at each change."""
        if sysfs is not None:
            self._file = sysfs / PARAMETERS / "enable_unsafe_noiommu_mode"
        if self._file is not None:
            self._file.write_text("Y\n" if self._enabled else "N\n")

    def check_raw_io(self) -> None:
        """EPERM without CAP_SYS_RAWIO."""
        if not self.raw_io:
            refuse(errno.EPERM)

    # ------------------------------------------------------------------------------------------- what DMA needs

    def allows(self, entry: Mapped, *, write: bool) -> bool:
        """Return True: nothing stops a device."""
        del entry, write
        return True

    def is_suspended(self, entry: Mapped) -> bool:
        """Return False: nothing is mapped."""
        del entry
        return False

    def wrote(self, iova: int, size: int) -> None:
        """Do nothing: no page is tracked."""

    # ---------------------------------------------------------------------------------------------- physical memory

    def address_of(self, vaddr: int) -> int:
        """Return the physical address of memory of the process."""
        start = align_down(vaddr, HUGE)
        if start not in self._homes:
            home = self._homes[start] = _FIRST + len(self._homes) * _STEP
            self.table.add(Mapped(Iova(home), HUGE, Vaddr(start), READ | WRITE))
        return self._homes[start] + vaddr - start

    def contiguous(self, vaddr: int, size: int) -> int:
        """Return how many of `size` bytes at `vaddr` are contiguous in physical memory."""
        return min(size, align_down(vaddr, HUGE) + HUGE - vaddr)


class FramesOfProcess:
    """An open /proc/self/pagemap. The frame numbers are those of the fake, and zeros without CAP_SYS_ADMIN."""

    def __init__(self, noiommu: NoIommu) -> None:
        self._noiommu = noiommu
        self._shows = noiommu.shows_frames  # of the time of the open, as in `pagemap_read`
        self._linux = LinuxKernel()

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read entries of 8 bytes for each page."""
        data = bytearray(self._linux.pread(fd, size, offset))
        for at in range(0, len(data), _ENTRY.size):
            (entry,) = _ENTRY.unpack_from(data, at)
            if entry & _PRESENT:
                vaddr = (offset + at) // _ENTRY.size * PAGE_SIZE
                frame = self._noiommu.address_of(vaddr) // PAGE_SIZE if self._shows else 0
                _ENTRY.pack_into(data, at, entry & ~_FRAME | frame)
        return bytes(data)

    def ioctl(self, request: int, argument: Argument) -> int:
        """ENOTTY."""
        del request, argument
        return refuse(errno.ENOTTY)

    def request_name(self, request: int) -> str:
        """Return the number."""
        return hex(request)

    def release(self, fd: int) -> None:
        """Do nothing."""

    def live_on(self, fd: int, other: int) -> None:
        """Do nothing."""


def without_huge_pages(flags: int) -> int:
    """Return the flags of memfd_create for memory that stands for huge pages. ENODEV for sizes other than 2 MiB."""
    if not flags & _HUGETLB:
        return flags
    if flags >> _SHIFT not in (0, HUGE.bit_length() - 1):
        refuse(errno.ENODEV)
    return flags & (1 << _SHIFT) - 1 & ~_HUGETLB


def knows_extension(noiommu: NoIommu, extension: int, *, has_group: bool, otherwise: int) -> int:
    """Return the answer to VFIO_CHECK_EXTENSION. With a group, a container knows nothing else.

    Source: `vfio_iommu_driver_allowed`.
    """
    if has_group or extension == ioctls.VFIO_NOIOMMU_IOMMU:
        return int(extension == ioctls.VFIO_NOIOMMU_IOMMU and (has_group or noiommu.enabled))
    return otherwise
