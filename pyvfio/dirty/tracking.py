"""Which pages devices may have written: dirty tracking of a container, as a snapshot that a person can read.

Where the IOMMU does not know itself what was written, which is so with type1 and real devices, everything that is
mapped counts as dirty, each time (`vfio_iova_dirty_bitmap`): a tracker says what has to be copied again, not what was
written.

Each mapping is asked for on its own. Asked for several at once, kernels write into the bitmap by whole words, and a bit
that one call left behind a mapping's end shows up in a later one (`update_user_bitmap`).

Source: VFIO_IOMMU_DIRTY_PAGES, `vfio_iommu_type1_dirty_pages` in drivers/vfio/vfio_iommu_type1.c.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import SupportsIndex, TypeAlias

from pyvfio import ioctls
from pyvfio.container import Container
from pyvfio.errors import ClosedError, UnsupportedError
from pyvfio.guard import ContextManager, Guard, closing, constructing, guarded
from pyvfio.info import MigrationCapability
from pyvfio.iommu.space import Mapping
from pyvfio.units import Iova, IovaRange, align_up, check_whole_number, format_ranges, format_size

_Ask: TypeAlias = Callable[[Mapping, ioctls.vfio_bitmap], None]


@dataclass(frozen=True, slots=True)
class DirtyPages:
    """What devices may have written of some mappings: `dirty`, ascending and neighbours joined, of `pages` pages of
    `page_size` bytes."""

    page_size: int
    pages: int
    dirty: tuple[IovaRange, ...]

    @property
    def count(self) -> int:
        """How many pages are dirty."""
        return sum(found.size for found in self.dirty) // self.page_size

    def __str__(self) -> str:
        shown = format_ranges(self.dirty[:8]) + (", …" if len(self.dirty) > 8 else "")
        return f"{self.count} of {self.pages} pages of {format_size(self.page_size)} are dirty: {shown}"


def _end(tracking: DirtyTracking) -> None:
    tracking.close()


class DirtyTracking(ContextManager):
    """Lets the kernel track the pages that the devices of `container` write, until `close`; a context manager.

    Raises UnsupportedError where the IOMMU cannot, VfioError while the container has no group, IoctlError.

    Synchronization: any thread may call anything. One container is tracked once: closing one tracker ends it for all.
    """

    @constructing(_end)
    def __init__(self, container: Container) -> None:
        if not isinstance(container, Container):
            raise TypeError(f"container must be a Container, such as device.container, not {type(container).__name__}")
        self.guard = Guard("this tracking")
        self.container = container
        """The container that is tracked."""
        self._capability = self._can(container)
        self._ask(ioctls.vfio_iommu_type1_dirty_bitmap(8, ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_START))
        self._open = True

    def __repr__(self) -> str:
        state = "" if self._open else " closed"
        return f"<DirtyTracking{state} page_size={self.page_size:#x} of {self.container!r}>"

    @staticmethod
    def _can(container: Container) -> MigrationCapability:
        if (capability := container.info.migration) is None:
            raise UnsupportedError(
                "this IOMMU does not track what devices write", hint="VFIO_TYPE1v2_IOMMU does, from Linux 5.8 on"
            )
        return capability

    @property
    def page_size(self) -> int:
        """The size of the pages that are tracked, in bytes."""
        return self._capability.pgsize_bitmap & -self._capability.pgsize_bitmap

    @guarded
    def read(self, *, iova: SupportsIndex, size: SupportsIndex) -> DirtyPages:
        """Return the pages that may have been written of the mappings in `[iova, iova + size)`, whole ones only.

        Raises ValueError where a mapping is cut, IoctlError. Cost: an ioctl and a bitmap for each mapping.
        """
        return self._snapshot(self._whole_mappings(iova, size), self._dirty)

    @guarded
    def unmap(self, *, iova: SupportsIndex, size: SupportsIndex) -> DirtyPages:
        """Unmap those mappings, and return the pages that may have been written until then.

        Raises as `read` and `Container.unmap`; the mappings before the one that failed are then unmapped.
        """
        return self._snapshot(self._whole_mappings(iova, size), self._unmap)

    def _whole_mappings(self, iova: SupportsIndex, size: SupportsIndex) -> list[Mapping]:
        if not self._open:
            raise ClosedError("this tracking has been closed")
        start, length = check_whole_number(iova, "iova"), check_whole_number(size, "size")
        found = self.container.mappings_in(iova=start, size=length) if length > 0 else []
        wanted = IovaRange.of(iova=start, size=max(length, 1))
        if cut := [mapping for mapping in found if not wanted.contains(mapping.range)]:
            raise ValueError(f"{wanted} cuts the mapping {cut[0].range}; the kernel tells of whole ones only")
        return found

    def _snapshot(self, mappings: list[Mapping], ask: _Ask) -> DirtyPages:
        dirty: list[IovaRange] = []
        for mapping in mappings:
            bits = (ctypes.c_uint8 * align_up(-(-mapping.size // self.page_size // 8) or 8, 8))()
            if len(bits) > self._capability.max_dirty_bitmap_size:
                raise ValueError(f"mapping {mapping.range} is too long for a bitmap: map it in shorter pieces")
            ask(mapping, ioctls.vfio_bitmap(self.page_size, len(bits), ctypes.addressof(bits)))
            for found in self._ranges(mapping, bytes(bits)):
                if dirty and dirty[-1].last + 1 == found.start:
                    dirty[-1] = IovaRange(dirty[-1].start, found.last)
                else:
                    dirty.append(found)
        pages = sum(mapping.size for mapping in mappings) // self.page_size
        return DirtyPages(self.page_size, pages, tuple(dirty))

    def _ranges(self, mapping: Mapping, bits: bytes) -> Iterator[IovaRange]:
        for page in range(mapping.size // self.page_size):
            if bits[page // 8] >> page % 8 & 1:
                yield IovaRange.of(iova=Iova(mapping.iova + page * self.page_size), size=self.page_size)

    def _dirty(self, mapping: Mapping, bitmap: ioctls.vfio_bitmap) -> None:
        argument = ioctls.DirtyBitmapWithRange(48, ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP)
        argument.get = ioctls.vfio_iommu_type1_dirty_bitmap_get(mapping.iova, mapping.size, bitmap)
        self._ask(argument)

    def _unmap(self, mapping: Mapping, bitmap: ioctls.vfio_bitmap) -> None:
        self.container.unmap(iova=mapping.iova, size=mapping.size, bitmap=bitmap)

    def _ask(self, argument: ioctls.vfio_iommu_type1_dirty_bitmap) -> None:
        self.container.ioctl("VFIO_IOMMU_DIRTY_PAGES", argument, flags=argument.flags)

    @closing
    def close(self) -> None:
        """End the tracking. Twice is fine, and so is a container that has been closed."""
        if self._open and not self.container.lost:
            self._ask(ioctls.vfio_iommu_type1_dirty_bitmap(8, ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP))
        self._open = False
