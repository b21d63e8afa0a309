"""Dirty tracking of an address space: the pages that devices may have written, as a snapshot that a person can read.

The kernels of both address spaces record at least the pages that devices wrote, and report more at times:

* type1 does not ask the IOMMU. Every mapped page counts as dirty each time (`vfio_iova_dirty_bitmap`), so a tracker
  reports the pages to copy again, not the pages written.
* iommufd reads the bits that the IOMMU sets in page tables. A large page of the IOMMU counts as a whole: an `Ioas` with
  `cut="pages"` has small pages alone. IOMMUs without such bits are refused.

Source: VFIO_IOMMU_DIRTY_PAGES, `vfio_iommu_type1_dirty_pages` in drivers/vfio/vfio_iommu_type1.c;
IOMMU_HWPT_GET_DIRTY_BITMAP, `iommufd_hwpt_get_dirty_bitmap` in drivers/iommu/iommufd/hw_pagetable.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

from pyvfio.errors import ClosedError
from pyvfio.guard import ContextManager, Guard, closing, constructing, guarded, making
from pyvfio.iommu.space import AddressSpace, DirtyRecord
from pyvfio.unique import Unique
from pyvfio.units import IovaRange, check_bool, check_whole_number, format_ranges, format_size


@dataclass(frozen=True, slots=True)
class DirtyPages:
    """The pages of some mappings that devices may have written.

    `dirty`: ranges with gaps between them, ascending. `pages`: the number of all pages, of `page_size` bytes each.
    """

    page_size: int
    pages: int
    dirty: tuple[IovaRange, ...]

    @property
    def count(self) -> int:
        """The number of dirty pages."""
        return sum(found.size for found in self.dirty) // self.page_size

    def __str__(self) -> str:
        shown = format_ranges(self.dirty[:8]) + (", …" if len(self.dirty) > 8 else "")
        return f"{self.count} of {self.pages} pages of {format_size(self.page_size)} are dirty: {shown}"


def _end(tracking: DirtyTracking) -> None:
    tracking.close()


class _Taken(NamedTuple):
    """An answer not yet returned to the caller."""

    space: DirtyRecord
    found: DirtyPages


def _put_back(taken: _Taken) -> None:
    taken.space.keep_dirty(taken.found.dirty)


class DirtyTracking(ContextManager, Unique):
    """Lets the kernel track the pages that the devices of `space` write, until `close`; a context manager.

    `space`: a Container or an Ioas, such as `device.space`. The devices of an Ioas are moved to page tables that record
    writes, and moved back at the close. Each device moves in one call, as by `Device.attach`.

    Raises UnsupportedError, before any change, if an IOMMU or the kernel cannot track. Raises VfioError while the space
    has no device; IoctlError.

    Synchronization: any thread may call any method; methods take the lock of the space. The kernel tracks a space once:
    closing one tracker ends the tracking of all others, and pages that one tracker reads are clean for the others.
    Cost: on an Ioas, the start and the close map all memory of the space once.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> mapper = pyvfio.DmaMapper(device.space, blocks)
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
        >>> with pyvfio.DirtyTracking(device.space) as tracking:
        ...     found = tracking.read(iova=mapper.iova(ring), size=ring.used_length)
        >>> found.count, found.pages  # Linux reports all mapped pages of a PCI device in a container as dirty
        (512, 512)
    """

    @constructing(_end)
    def __init__(self, space: AddressSpace) -> None:
        if not hasattr(space, "start_dirty_tracking"):
            raise TypeError(f"space must be an AddressSpace, such as device.space, not {type(space).__name__}")
        self.guard = Guard("this tracking", lock=space.guard.lock)
        self.space = space
        """The tracked address space."""
        self.page_size = space.dirty_page_size
        """The size of a tracked page, in bytes."""
        space.start_dirty_tracking()
        self._open = True

    def __repr__(self) -> str:
        state = "" if self._open else " closed"
        return f"<DirtyTracking{state} page_size={self.page_size:#x} of {self.space!r}>"

    def read(self, *, iova: SupportsIndex, size: SupportsIndex, clear: bool = True) -> DirtyPages:
        """Return the pages of the mappings in `[iova, iova + size)` that devices may have written since the last look.

        `clear`: the pages are clean from now on. Copy the pages after the call, not before: a page that a device writes
        meanwhile is in the next answer. For the last round, stop the devices first.

        The record of a mapping ends with the mapping: read before an unmap, or use `unmap`. If the IOVA is mapped
        again, as by a remap of a block, all pages of the new mapping are dirty.

        Raises ValueError if the range cuts a mapping; IoctlError, and then no page is forgotten. Cost: a bitmap for
        each mapping, one byte for 8 pages, and an object for each run of dirty pages. An ioctl for each mapping of a
        Container, and for each run of mappings of an Ioas.
        """
        check_bool(clear, "clear")
        return (self._clear if clear else self._look)(iova, size).found

    @making(_put_back)
    def _clear(self, iova: SupportsIndex, size: SupportsIndex) -> _Taken:
        return self._take(iova, size, clear=True)

    @guarded
    def _look(self, iova: SupportsIndex, size: SupportsIndex) -> _Taken:
        return self._take(iova, size, clear=False)

    def _take(self, iova: SupportsIndex, size: SupportsIndex, *, clear: bool) -> _Taken:
        start, length = self._range(iova, size)
        pages = self._pages(start, length)
        found = self.space.dirty_ranges(iova=start, size=length, clear=clear)
        return _Taken(self.space, DirtyPages(self.page_size, pages, found))

    @guarded
    def unmap(self, *, iova: SupportsIndex, size: SupportsIndex) -> DirtyPages:
        """Unmap the mappings in `[iova, iova + size)`, and return the pages that devices may have written.

        A Container, and an Ioas with `cut="replace"`, report each write up to the unmap. For another Ioas, the kernel
        has one call to read and one to unmap, and a write between the two is lost. Stop the devices before, or treat
        all of the range as dirty.

        Raises as `read` and `AddressSpace.unmap`. If a mapping fails, the mappings before are unmapped, and their dirty
        pages are lost: treat all of their pages as dirty.
        """
        start, length = self._range(iova, size)
        pages = self._pages(start, length)
        return DirtyPages(self.page_size, pages, self.space.unmap_dirty(iova=start, size=length))

    def _range(self, iova: SupportsIndex, size: SupportsIndex) -> tuple[int, int]:
        if not self._open:
            raise ClosedError("this tracking has been closed")
        return check_whole_number(iova, "iova"), check_whole_number(size, "size")

    def _pages(self, iova: int, size: int) -> int:
        found = self.space.mappings_in(iova=iova, size=size) if size > 0 else []
        return sum(mapping.size for mapping in found) // self.page_size

    @closing
    def close(self) -> None:
        """End the tracking. Does nothing after the first call, or if the space has been closed."""
        if self._open:
            self.space.stop_dirty_tracking()
        self._open = False
