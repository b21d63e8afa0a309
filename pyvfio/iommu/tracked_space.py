"""The pages that devices may have written, as far as all address spaces answer alike.

A page that was read from the kernel, and not yet reported to a caller that clears, is kept in the space. A kernel
forgets pages that it reports, and some kernels have no call that leaves the pages dirty.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from pyvfio.extent_set import ExtentSet
from pyvfio.extents import Extent
from pyvfio.guard import guarded
from pyvfio.handle import Handle
from pyvfio.iommu.space import Mapping
from pyvfio.iommu.table import MappingTable
from pyvfio.units import Iova, IovaRange, check_bool, check_whole_number


class TrackedSpace(Handle):
    """The base of `IovaSpace`: a table of mappings, and the record of the writes to them. As `DirtyRecord`."""

    table: MappingTable
    _kept_dirty = ExtentSet()  # by IOVA: pages that the kernel has forgotten, and that are still to be reported

    # ------------------------------------------------------------------------------------------------ for subclasses

    @property
    @abstractmethod
    def dirty_page_size(self) -> int:
        """As `DirtyRecord.dirty_page_size`."""

    @abstractmethod
    def start_dirty_tracking(self) -> None:
        """As `DirtyRecord.start_dirty_tracking`."""

    @abstractmethod
    def stop_dirty_tracking(self) -> None:
        """As `DirtyRecord.stop_dirty_tracking`."""

    @abstractmethod
    def _read_dirty(self, iova: int, size: int, *, clear: bool) -> list[Extent]:
        """Return the dirty pages of a part of `_dirty_parts`. Raises IoctlError."""

    @abstractmethod
    def _unmap_dirty(self, iova: int, size: int) -> list[Extent]:
        """Unmap a part of `_dirty_parts`, and return the pages that were dirty. Raises as `unmap`."""

    def _dirty_parts(self, mappings: Sequence[Mapping]) -> list[Extent]:
        """Return the parts of `mappings`, ascending and whole, for each of which the kernel is asked in one call."""
        return [Extent(mapping.iova, mapping.iova + mapping.size) for mapping in mappings]

    # ------------------------------------------------------------------------------------------------ the record

    @guarded
    def dirty_ranges(self, *, iova: int, size: int, clear: bool = True) -> tuple[IovaRange, ...]:
        """As `DirtyRecord.dirty_ranges`."""
        check_bool(clear, "clear")
        parts = self._dirty_parts(self._whole_mappings(iova, size))
        found: list[Extent] = []
        try:
            for start, end in parts:
                found += self._read_dirty(start, end - start, clear=clear)
        except BaseException:
            self._keep_dirty(found)
            raise
        return self._with_kept(parts, found, clear=clear)

    @guarded
    def unmap_dirty(self, *, iova: int, size: int) -> tuple[IovaRange, ...]:
        """As `DirtyRecord.unmap_dirty`."""
        parts = self._dirty_parts(self._whole_mappings(iova, size))
        found: list[Extent] = []
        for start, end in parts:
            found += self._unmap_dirty(start, end - start)
        return self._with_kept(parts, found, clear=True)

    @guarded
    def keep_dirty(self, ranges: Iterable[IovaRange]) -> None:
        """As `DirtyRecord.keep_dirty`."""
        self._keep_dirty([Extent(dirty.start, dirty.last + 1) for dirty in ranges])

    def _keep_dirty(self, extents: Sequence[Extent]) -> None:
        """Report `extents`, ascending and disjoint, with the next call."""
        self._kept_dirty = self._kept_dirty.added(extents)

    def _with_kept(self, parts: Sequence[Extent], found: Sequence[Extent], *, clear: bool) -> tuple[IovaRange, ...]:
        if self._kept_dirty:
            kept = [extent for start, end in parts for extent in self._kept_dirty.clip(start, end)]
            found = tuple(ExtentSet(found).added(kept))
            if clear:
                self._kept_dirty = self._kept_dirty.removed(parts)
        return tuple([IovaRange(Iova(start), Iova(end - 1)) for start, end in ExtentSet(found)])

    def _whole_mappings(self, iova: int, size: int) -> list[Mapping]:
        start, length = check_whole_number(iova, "iova"), check_whole_number(size, "size")
        self.check_usable()
        found = self.table.overlapping(iova=start, size=length) if length > 0 else []
        wanted = IovaRange.of(iova=start, size=max(length, 1))
        if cut := [mapping for mapping in found if not wanted.contains(mapping.range)]:
            raise ValueError(f"{wanted} cuts the mapping {cut[0].range}; dirty pages are reported of whole mappings")
        return found
