"""An I/O address space of iommufd: areas, reserved and allowed ranges, and the page tables that show the areas.

Without a page table nothing is pinned, and nothing is checked against the IOMMU.

Source: drivers/iommu/iommufd/io_pagetable.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.pages import Pages
from pyvfio.testing.fake.pins import Mapped
from pyvfio.testing.fake.process import refuse
from pyvfio.testing.fake.type1 import WRITE, DmaTable
from pyvfio.units import MIB, PAGE_SIZE, U64_MAX, Iova, IovaRange, Vaddr, align_up

_MAX_ALIGNMENT = 2 * MIB  # HPAGE_SIZE


class Slice(NamedTuple):
    """A part of pages: `start` and `size` in bytes."""

    pages: Pages
    start: int
    size: int


class PageTable(Protocol):
    """A page table of an IOMMU that shows the areas of the space (`struct iommu_domain`)."""

    @property
    def model(self) -> IommuModel:
        """The IOMMU."""
        ...

    def outside(self) -> list[IovaRange]:
        """Return the ranges outside of the aperture."""
        ...

    def unmapped(self, entry: Mapped) -> None:
        """An area was removed."""
        ...


class Ioas:
    """`struct iommufd_ioas` and `struct io_pagetable`."""

    def __init__(self) -> None:
        self.table = DmaTable()
        self.tables: list[PageTable] = []
        """The page tables: while there is one, all areas are pinned."""
        self.allowed: list[IovaRange] = []
        self.alignment = 1
        self.huge_pages = True
        self._pages: dict[int, Pages] = {}
        self._reserved: list[tuple[int, int, object]] = []

    # ------------------------------------------------------------------------------------------------------ map

    def map(self, slices: Sequence[Slice], size: int, iova: int | None, flags: int) -> int:
        """`iopt_map_pages`: add areas at `iova`, or where there is room, and return the IOVA. `flags` as type1's.

        EINVAL (length), then for a chosen IOVA ENOSPC, for a given one EINVAL, EOVERFLOW, EINVAL (reserved), EEXIST.
        Then EPERM, EINVAL (offset in a page), and with a page table EFAULT or ENOMEM.
        """
        if not size or size & (self.alignment - 1):
            refuse(errno.EINVAL)
        if iova is None:
            iova = self._find(slices[0].pages.hint + slices[0].start, size)
        else:
            self._check_free(iova, size)
        areas, at = [], iova
        for part in slices:
            if flags & WRITE and not part.pages.writable:
                refuse(errno.EPERM)
            if part.start % PAGE_SIZE & (self.alignment - 1):
                refuse(errno.EINVAL)
            areas.append((Mapped(Iova(at), part.size, Vaddr(part.pages.vaddr + part.start), flags), part.pages))
            at += part.size
        if self.tables:
            _fill(areas, self.tables)
        for entry, pages in areas:
            self._add(entry, pages)
        return iova

    def _add(self, entry: Mapped, pages: Pages) -> None:
        self.table.add(entry)
        self._pages[entry.iova] = pages
        pages.users += 1

    def _check_free(self, iova: int, size: int) -> None:
        if iova & (self.alignment - 1):
            refuse(errno.EINVAL)
        if iova + size - 1 > U64_MAX:
            refuse(errno.EOVERFLOW)
        if self._is_reserved(iova, iova + size - 1):
            refuse(errno.EINVAL)
        if self.table.overlaps(iova, iova + size - 1):
            refuse(errno.EEXIST)

    def _find(self, address: int, size: int) -> int:
        """`iopt_alloc_iova`: EOVERFLOW, EINVAL (the address is less aligned than the IOMMU needs), ENOSPC."""
        if size >= U64_MAX // 2:
            refuse(errno.EOVERFLOW)
        alignment = min(1 << (size - 1).bit_length(), _MAX_ALIGNMENT)
        if address:
            alignment = min(alignment, address & -address)
        if alignment < self.alignment:
            refuse(errno.EINVAL)
        first, last, offset = PAGE_SIZE, U64_MAX - PAGE_SIZE, address % PAGE_SIZE
        for start, end in self._allowed_spans(first, last):
            begin = align_up(start, alignment) | offset
            for hole, hole_end in holes(self._used(), begin, end) if begin <= end else ():
                at = align_up(hole, alignment) | offset
                if at + size - 1 <= hole_end:
                    return at
        return refuse(errno.ENOSPC)

    def _allowed_spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        if not self.allowed:
            yield first, last
            return
        at = first
        for start, end in holes(((span.start, span.last) for span in sorted(self.allowed)), first, last):
            if at < start:
                yield at, start - 1
            at = end + 1
        if at <= last:
            yield at, last

    def _used(self) -> Iterator[tuple[int, int]]:
        return heapq.merge(self._reserved_spans(), ((entry.iova, entry.iova + entry.size - 1) for entry in self.table))

    # ---------------------------------------------------------------------------------------------- copy, unmap, cut

    def slices(self, iova: int, size: int) -> list[Slice]:
        """`iopt_get_pages`: the memory of a mapped range. EINVAL, EOVERFLOW, ENOENT."""
        if not size:
            refuse(errno.EINVAL)
        last, parts = iova + size - 1, []
        if last > U64_MAX:
            refuse(errno.EOVERFLOW)
        while iova <= last:
            entry = self.table.at(iova)
            if entry is None:
                refuse(errno.ENOENT)
            end = min(last, entry.iova + entry.size - 1)
            pages = self._pages[entry.iova]
            parts.append(Slice(pages, entry.vaddr + iova - entry.iova - pages.vaddr, end - iova + 1))
            iova = end + 1
        for part in parts:
            part.pages.shared = True
        return parts

    def unmap(self, start: int, last: int) -> tuple[int, int]:
        """`iopt_unmap_iova_range`: remove whole areas, and return how many bytes were removed, and an errno or 0.

        ENOENT for an area that is not whole in the range; the areas before that one are gone.
        """
        first = self.table.at(start)
        if first is not None and first.iova < start:
            return 0, errno.ENOENT
        areas = self.table.starting_in(start, last)
        cut = bool(areas) and areas[-1].iova + areas[-1].size - 1 > last
        if cut:
            areas.pop()
        for entry in reversed(areas):  # the order cannot be seen, and removing from the end costs nothing
            self._remove(entry)
        return sum(entry.size for entry in areas), errno.ENOENT if cut else 0

    def unmap_range(self, iova: int, size: int) -> tuple[int, int]:
        """`iopt_unmap_iova`: as `unmap`, with EINVAL for no bytes, and EOVERFLOW."""
        if not size:
            return 0, errno.EINVAL
        return (0, errno.EOVERFLOW) if iova + size - 1 > U64_MAX else self.unmap(iova, iova + size - 1)

    def _remove(self, entry: Mapped) -> None:
        self.table.remove(entry)
        pages = self._pages.pop(entry.iova)
        if self.tables:
            pages.unfill(entry)
            for table in self.tables:
                table.unmapped(entry)
        pages.release()

    def cut(self, last: int) -> None:
        """`iopt_cut_iova`: end an area at `last`, and begin another one behind. EINVAL (alignment)."""
        entry = self.table.at(last)
        if entry is None or last in (entry.iova, entry.iova + entry.size - 1):
            return
        pages, size = self._pages[entry.iova], last + 1 - entry.iova
        if (last + 1) & (self.alignment - 1) or (entry.vaddr + size) & (self.alignment - 1):
            refuse(errno.EINVAL)
        before = entry._replace(size=size)
        after = Mapped(Iova(last + 1), entry.size - size, Vaddr(entry.vaddr + size), entry.flags)
        if self.tables:
            pages.split(entry, (before, after))
        self.table.replace(before)
        self._add(after, pages)

    # ------------------------------------------------------------------------------------ page tables and reservations

    def add_table(self, table: PageTable) -> None:
        """`iopt_table_add_domain`: show all areas in a page table. EINVAL, EADDRINUSE, EFAULT, ENOMEM.

        EADDRINUSE: an area is not aligned, or outside the aperture. After an error nothing has changed.
        """
        alignment = max(table.model.iova_alignment, self.alignment)
        if alignment > PAGE_SIZE:
            refuse(errno.EINVAL)
        if alignment != self.alignment:
            self._check_alignment(alignment)
        try:
            for span in table.outside():
                self._reserve(span, table)
            if not self.tables:
                _fill([(entry, self._pages[entry.iova]) for entry in self.table], [table])
        except OSError:
            self.unreserve(table)
            raise
        self.alignment = alignment
        self.tables.append(table)

    def remove_table(self, table: PageTable) -> None:
        """`iopt_table_remove_domain`: without another page table, all areas are unpinned."""
        self.tables.remove(table)
        for entry in self.table if not self.tables else ():
            self._pages[entry.iova].unfill(entry)
        self.unreserve(table)
        self.alignment = self._needed_alignment()

    def _needed_alignment(self) -> int:
        own = 1 if self.huge_pages else PAGE_SIZE
        return max([own, *(table.model.iova_alignment for table in self.tables)])

    def _check_alignment(self, alignment: int) -> None:
        for entry in self.table:
            if (entry.iova | entry.size | entry.vaddr % PAGE_SIZE) & (alignment - 1):
                refuse(errno.EADDRINUSE)

    def set_huge_pages(self, *, wanted: bool) -> None:
        """`iopt_enable_large_pages`, `iopt_disable_large_pages`: EINVAL (areas are in a page table), EADDRINUSE."""
        if not wanted and self.huge_pages:
            if self.tables and len(self.table):
                refuse(errno.EINVAL)
            self._check_alignment(PAGE_SIZE)
        self.huge_pages = wanted
        self.alignment = self._needed_alignment()

    def reserve_for(self, device: object, spans: Iterable[IovaRange]) -> None:
        """`iopt_table_enforce_dev_resv_regions`: EADDRINUSE, and nothing is reserved then."""
        try:
            for span in spans:
                self._reserve(span, device)
        except OSError:
            self.unreserve(device)
            raise

    def _reserve(self, span: IovaRange, owner: object) -> None:
        if self.table.overlaps(span.start, span.last) or any(map(span.overlaps, self.allowed)):
            refuse(errno.EADDRINUSE)
        self._reserved.append((span.start, span.last, owner))

    def unreserve(self, owner: object) -> None:
        """Remove all that a device or a page table has reserved."""
        self._reserved = [each for each in self._reserved if each[2] is not owner]

    def _is_reserved(self, start: int, last: int) -> bool:
        return any(first <= last and start <= end for first, end, _owner in self._reserved)

    def allow(self, spans: list[IovaRange]) -> None:
        """`iopt_set_allow_iova`: replace the ranges from which the kernel chooses IOVAs. EADDRINUSE."""
        if any(self._is_reserved(span.start, span.last) for span in spans):
            refuse(errno.EADDRINUSE)
        self.allowed = spans

    def usable(self) -> list[tuple[int, int]]:
        """Return the ranges that nothing has reserved: start and last."""
        return list(holes(self._reserved_spans(), 0, U64_MAX))

    def _reserved_spans(self) -> list[tuple[int, int]]:
        return sorted((start, last) for start, last, _owner in self._reserved)

    # ---------------------------------------------------------------------------------------------------- checking

    def all_pages(self) -> set[Pages]:
        """Return the memory of all areas."""
        return set(self._pages.values())

    def pinned_areas(self) -> list[Mapped]:
        """Return the areas that are in a page table, as the memory calls of the process see the areas."""
        return [self._pages[entry.iova].indexed(entry) for entry in self.table] if self.tables else []

    def _check(self) -> None:
        self.table._check()
        assert {entry.iova for entry in self.table} == self._pages.keys()
        for entry in self.table:
            assert not (entry.iova | entry.size) & (self.alignment - 1), entry
            assert not self._is_reserved(entry.iova, entry.iova + entry.size - 1), entry


def _fill(areas: Sequence[tuple[Mapped, Pages]], tables: Sequence[PageTable]) -> None:
    needs_rights = any(table.model.needs_rights for table in tables)
    for count, (entry, pages) in enumerate(areas):
        try:
            pages.fill(entry, needs_rights=needs_rights)
        except OSError:
            for before, its_pages in areas[:count]:
                its_pages.unfill(before)
            raise


def holes(used: Iterable[tuple[int, int]], first: int, last: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of [first, last] outside of `used`, which ascends: start and last, ascending."""
    at = first
    for start, end in used:
        if start > at:
            yield at, min(start - 1, last)
        at = max(at, end + 1)
        if at > last:
            return
    yield at, last
