"""The type1 IOMMU of a container: the table of mappings, and the ioctls in the order of checks of the kernel.

Source: drivers/vfio/vfio_iommu_type1.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from pyvfio import ioctls
from pyvfio.testing.fake.dirty import MAX_BITMAP, Bitmap, check_bitmap
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.pins import Mapped, Pins
from pyvfio.testing.fake.process import Argument, refuse
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import U64_MAX, Iova, Vaddr, align_up

READ = int(ioctls.VFIO_DMA_MAP_FLAG_READ)
WRITE = int(ioctls.VFIO_DMA_MAP_FLAG_WRITE)
_MAP_VADDR = int(ioctls.VFIO_DMA_MAP_FLAG_VADDR)
_GET_DIRTY = int(ioctls.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP)
_ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
_VADDR = int(ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)
_START = int(ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
_STOP = int(ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)
_GET_BITMAP = int(ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP)
_MAP = struct.Struct("=IIQQQ")
_UNMAP = struct.Struct("=IIQQ")
_BITMAP = struct.Struct("=QQQ")
_DIRTY = struct.Struct("=II")
_RANGE = struct.Struct("=QQQQQ")
_INFO = struct.Struct("=IIQII")
_CAPABILITY = struct.Struct("=HHI")
_INFO_MINSZ = 16


class DmaTable:
    """Disjoint mappings by IOVA. Cost: O(log n); adding and removing also move a list of numbers."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: dict[int, Mapped] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Mapped]:
        return (self._entries[start] for start in self._starts)

    def at(self, iova: int) -> Mapped | None:
        """Return the mapping of the byte at `iova`, or None."""
        index = bisect_right(self._starts, iova) - 1
        if index < 0:
            return None
        entry = self._entries[self._starts[index]]
        return entry if iova < entry.iova + entry.size else None

    def overlaps(self, start: int, last: int) -> bool:
        """Return whether a mapping has a byte in [start, last]."""
        index = bisect_left(self._starts, start)
        return (index < len(self._starts) and self._starts[index] <= last) or self.at(start) is not None

    def starting_in(self, start: int, last: int) -> list[Mapped]:
        """Return the mappings whose first byte is in [start, last]."""
        first, end = bisect_left(self._starts, start), bisect_right(self._starts, last)
        return [self._entries[key] for key in self._starts[first:end]]

    def add(self, entry: Mapped) -> None:
        """Add a mapping that overlaps no other one."""
        self._starts.insert(bisect_left(self._starts, entry.iova), entry.iova)
        self._entries[entry.iova] = entry

    def replace(self, entry: Mapped) -> None:
        """Replace a mapping by one with the same IOVA and size."""
        self._entries[entry.iova] = entry

    def remove(self, entry: Mapped) -> None:
        """Remove a mapping that is in the table."""
        del self._starts[bisect_left(self._starts, entry.iova)]
        del self._entries[entry.iova]

    def _check(self) -> None:
        assert self._entries.keys() == set(self._starts)
        for before, after in pairwise(self):
            assert before.iova + before.size <= after.iova, (before, after)


class Type1:
    """The IOMMU of a container. `v2`: VFIO_TYPE1v2_IOMMU, where an unmap takes whole mappings or fails."""

    def __init__(self, *, version: KernelVersion, model: IommuModel, pins: Pins, v2: bool) -> None:
        self._version = version
        self._model = model
        self._pins = pins
        self._v2 = v2
        self._range_starts = [span.start for span in model.ranges]
        self._page = model.reported_pgsizes & -model.reported_pgsizes
        self._entry_limit = model.dma_entry_limit  # read when the IOMMU is set: later changes apply to later containers
        self.table = DmaTable()
        self._invalid: set[int] = set()  # IOVAs of mappings without an address
        self._bitmaps: dict[int, Bitmap] | None = None  # by IOVA, while dirty pages are tracked
        self.requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_IOMMU_GET_INFO: ("VFIO_IOMMU_GET_INFO", self.get_info),
            ioctls.VFIO_IOMMU_MAP_DMA: ("VFIO_IOMMU_MAP_DMA", self.map_dma),
            ioctls.VFIO_IOMMU_UNMAP_DMA: ("VFIO_IOMMU_UNMAP_DMA", self.unmap_dma),
            ioctls.VFIO_IOMMU_DIRTY_PAGES: ("VFIO_IOMMU_DIRTY_PAGES", self.dirty_pages),
        }

    def release(self) -> None:
        """Unmap and uncharge everything after the last group left (`vfio_iommu_unmap_unpin_all`)."""
        for entry in reversed(list(self.table)):  # from the end of each list, which costs nothing
            self._remove(entry)

    def visible(self) -> list[Mapped]:
        """Return the mappings that have an address."""
        return [entry for entry in self.table if entry.iova not in self._invalid]

    def is_suspended(self, entry: Mapped) -> bool:
        """Return whether a mapping has no address (VFIO_DMA_UNMAP_FLAG_VADDR)."""
        return entry.iova in self._invalid

    def charged(self) -> int:
        """Return the number of bytes that are locked for the mappings."""
        return sum(entry.size - entry.uncharged for entry in self.table)

    def _check(self) -> None:
        self.table._check()
        starts = {entry.iova for entry in self.table}
        assert self._invalid <= starts
        assert self._bitmaps is None or self._bitmaps.keys() == starts
        assert len(self.table) <= self._entry_limit
        for entry in self.table:
            assert not (entry.iova | entry.size | entry.vaddr) & (self._page - 1), entry
            assert self._in_range(entry.iova, entry.iova + entry.size - 1), entry

    @property
    def has_invalid_vaddr(self) -> bool:
        """Whether a mapping waits for a new address (`vaddr_invalid_count`). Meanwhile no group can be attached."""
        return bool(self._invalid)

    def _remove(self, entry: Mapped) -> None:
        self.table.remove(entry)
        self._pins.unpin(entry, suspended=entry.iova in self._invalid)
        self._invalid.discard(entry.iova)
        if self._bitmaps is not None:
            del self._bitmaps[entry.iova]

    def allows(self, entry: Mapped, *, write: bool) -> bool:
        """Return whether the IOMMU lets a device read, or write, through a mapping."""
        if write:
            return bool(entry.flags & WRITE)
        leaky = self._model.write_is_readable and self._version.write_is_readable
        return bool(entry.flags & READ) or leaky

    def wrote(self, iova: int, size: int) -> None:
        """Do nothing: every page is always dirty."""

    # ---------------------------------------------------------------------------------------- VFIO_IOMMU_GET_INFO

    def _capabilities(self) -> bytes:
        ranges = self._model.ranges
        bodies = [
            (ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, struct.pack("=IIQQ", 0, 0, self._page, MAX_BITMAP)),
            (ioctls.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, struct.pack("=I", self._entry_limit - len(self.table))),
        ]
        if ranges:
            spans = b"".join(struct.pack("=QQ", span.start, span.last) for span in ranges)
            head = struct.pack("=II", len(ranges), 0)
            bodies.append((ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, head + spans))
        chain, position = b"", _INFO.size
        for number, (identity, body) in enumerate(bodies, start=1):
            size = align_up(_CAPABILITY.size + len(body), self._version.capability_alignment)
            position += size
            following = position if number < len(bodies) else 0
            chain += (_CAPABILITY.pack(identity, 1, following) + body).ljust(size, b"\0")
        return chain

    def get_info(self, argument: Argument) -> int:
        """`vfio_iommu_type1_get_info`: EFAULT, EINVAL (argsz)."""
        argsz, _flags, _sizes = struct.unpack("=IIQ", argument.read(_INFO_MINSZ))
        if argsz < _INFO_MINSZ:
            refuse(errno.EINVAL)
        written = info_write_back(self._version, argsz)
        capabilities, offset = self._capabilities(), 0
        if argsz < _INFO.size + len(capabilities):
            argsz = _INFO.size + len(capabilities)
        else:
            argument.write(capabilities, _INFO.size)
            offset = _INFO.size
        flags = ioctls.VFIO_IOMMU_INFO_PGSIZES | ioctls.VFIO_IOMMU_INFO_CAPS
        argument.write(_INFO.pack(argsz, flags, self._model.reported_pgsizes, offset, 0)[:written])
        return 0

    # ----------------------------------------------------------------------------------------- VFIO_IOMMU_MAP_DMA

    def map_dma(self, argument: Argument) -> int:
        """`vfio_dma_do_map`: EFAULT, EINVAL, EOVERFLOW (7.3), EEXIST, ENOSPC, EINVAL (range), EFAULT or ENOMEM.

        With VFIO_DMA_MAP_FLAG_VADDR: ENOENT, EINVAL.
        """
        argsz, flags, vaddr, iova, size = _MAP.unpack(argument.read(_MAP.size))
        if argsz < _MAP.size or flags & ~(READ | WRITE | _MAP_VADDR):
            refuse(errno.EINVAL)
        self._check_map(vaddr=vaddr, iova=iova, size=size, flags=flags)
        if flags & _MAP_VADDR:
            self._move_vaddr(vaddr=vaddr, iova=iova, size=size)
            return 0
        if self.table.overlaps(iova, iova + size - 1):
            refuse(errno.EEXIST)
        if len(self.table) >= self._entry_limit:
            refuse(errno.ENOSPC)
        if not self._in_range(iova, iova + size - 1):
            refuse(errno.EINVAL)
        entry = Mapped(Iova(iova), size, Vaddr(vaddr), flags)
        free = self._version.zero_page_is_free
        entry = self._pins.pin(entry, write=bool(flags & WRITE), zero_page_is_free=free)
        self.table.add(entry)
        if self._bitmaps is not None:
            self._track(entry)
        return 0

    def _check_map(self, *, vaddr: int, iova: int, size: int, flags: int) -> None:
        wraps = iova + size - 1 > U64_MAX or vaddr + size - 1 > U64_MAX
        early = self._version.overflow == errno.EOVERFLOW
        if early and size and wraps:
            refuse(errno.EOVERFLOW)
        if bool(flags & _MAP_VADDR) == bool(flags & (READ | WRITE)):
            refuse(errno.EINVAL)
        if not size or (size | iova | vaddr) & (self._page - 1) or wraps:
            refuse(errno.EINVAL)

    def _move_vaddr(self, *, vaddr: int, iova: int, size: int) -> None:
        if not self.table.overlaps(iova, iova + size - 1):
            refuse(errno.ENOENT)
        entry = self.table.at(iova)
        if entry is None or iova not in self._invalid or (entry.iova, entry.size) != (iova, size):
            refuse(errno.EINVAL)
        moved = entry._replace(vaddr=Vaddr(vaddr))
        self.table.replace(moved)
        self._pins.resume(moved)
        self._invalid.discard(iova)

    def _in_range(self, start: int, last: int) -> bool:
        index = bisect_right(self._range_starts, start) - 1
        return index >= 0 and last <= self._model.ranges[index].last

    # --------------------------------------------------------------------------------------- VFIO_IOMMU_UNMAP_DMA

    def unmap_dma(self, argument: Argument) -> int:
        """`vfio_dma_do_unmap`: EFAULT, EINVAL, EOVERFLOW (7.3). `size` is written back on success only.

        With GET_DIRTY_BITMAP and a bad pointer: EFAULT, and the mappings that were reported before are gone.
        """
        argsz, flags, iova, size = _UNMAP.unpack(argument.read(_UNMAP.size))
        if argsz < _UNMAP.size or flags & ~(_GET_DIRTY | _ALL | _VADDR):
            refuse(errno.EINVAL)
        bitmap = self._bitmap_argument(argument, argsz, flags, size) if flags & _GET_DIRTY else None
        if iova & (self._page - 1):
            refuse(errno.EINVAL)
        everything = self._wants_all(flags, iova, size)
        if bitmap is not None and (self._bitmaps is None or bitmap[0] != self._page):
            refuse(errno.EINVAL)
        entries = list(self.table) if everything else self._doomed(iova, size)
        if flags & _VADDR:
            self._invalidate(entries)
        else:
            self._unmap(entries, base=iova, data=None if bitmap is None else bitmap[2])
        argument.write(_UNMAP.pack(argsz, flags, iova, sum(entry.size for entry in entries)))
        return 0

    def _bitmap_argument(self, argument: Argument, argsz: int, flags: int, size: int) -> tuple[int, int, int]:
        if flags & (_ALL | _VADDR) or argsz < _UNMAP.size + _BITMAP.size:
            refuse(errno.EINVAL)
        pgsize, bitmap_size, data = _BITMAP.unpack(argument.read(_BITMAP.size, _UNMAP.size))
        check_bitmap(size=size, pgsize=pgsize, bitmap_size=bitmap_size, data=data)
        return pgsize, bitmap_size, data

    def _unmap(self, entries: Sequence[Mapped], *, base: int, data: int | None) -> None:
        # Without a bitmap the order cannot be seen, and removing from the end of each list costs nothing.
        for entry in entries if data is not None else reversed(entries):
            if self._bitmaps is not None and data is not None:
                self._bitmaps[entry.iova].report(data, first=(entry.iova - base) // self._page)
            self._remove(entry)

    def _invalidate(self, entries: Sequence[Mapped]) -> None:
        starts = {entry.iova for entry in entries}
        for count, entry in enumerate(entries):
            if entry.iova in self._invalid:
                self._invalid -= {earlier.iova for earlier in entries[:count]}
                refuse(errno.EINVAL)
        for entry in entries:
            self._pins.suspend(entry)
        self._invalid |= starts

    def _wants_all(self, flags: int, iova: int, size: int) -> bool:
        if flags & _ALL:
            if iova or size:
                refuse(errno.EINVAL)
            return True
        if not size or size & (self._page - 1):
            refuse(errno.EINVAL)
        if iova + size - 1 > U64_MAX:
            refuse(self._version.overflow)
        return False

    def _doomed(self, iova: int, size: int) -> list[Mapped]:
        last = iova + size - 1
        if self._v2:
            self._check_not_cut(iova, last)
        else:
            first = self.table.at(iova)
            if first is not None and first.iova != iova:
                return []  # v1 stops at a mapping that starts before the range
        if last == U64_MAX and not self._version.unmaps_end_of_u64:
            return []  # the exclusive end wraps to 0, so every mapping starts at or behind the end
        return self.table.starting_in(iova, last)

    def _check_not_cut(self, iova: int, last: int) -> None:
        first, final = self.table.at(iova), self.table.at(last)
        if (first is not None and first.iova != iova) or (final is not None and final.iova + final.size - 1 != last):
            refuse(errno.EINVAL)

    # -------------------------------------------------------------------------------------- VFIO_IOMMU_DIRTY_PAGES

    def dirty_pages(self, argument: Argument) -> int:
        """`vfio_iommu_type1_dirty_pages`: EACCES (v1), EFAULT, EINVAL, EOVERFLOW (7.3)."""
        if not self._v2:
            refuse(errno.EACCES)
        argsz, flags = _DIRTY.unpack(argument.read(_DIRTY.size))
        if argsz < _DIRTY.size or flags not in (_START, _STOP, _GET_BITMAP):
            refuse(errno.EINVAL)
        if flags == _START and self._bitmaps is None:
            self._bitmaps = {}
            for entry in self.table:
                self._track(entry)
        elif flags == _STOP:
            self._bitmaps = None
        elif flags == _GET_BITMAP:
            self._get_bitmap(argument, argsz)
        return 0

    def _track(self, entry: Mapped) -> None:
        if self._bitmaps is not None:
            self._bitmaps[entry.iova] = Bitmap(entry.size // self._page)

    def _get_bitmap(self, argument: Argument, argsz: int) -> None:
        if argsz < _DIRTY.size + _RANGE.size:
            refuse(errno.EINVAL)
        iova, size, pgsize, bitmap_size, data = _RANGE.unpack(argument.read(_RANGE.size, _DIRTY.size))
        self._check_dirty_range(iova, size)
        check_bitmap(size=size, pgsize=pgsize, bitmap_size=bitmap_size, data=data)
        if pgsize != self._page or (iova | size) & (self._page - 1) or not size or self._bitmaps is None:
            refuse(errno.EINVAL)
        self._check_not_cut(iova, iova + size - 1)
        for entry in self.table.starting_in(iova, iova + size - 1):
            bitmap = self._bitmaps[entry.iova]
            bitmap.report(data, first=(entry.iova - iova) // self._page)
            bitmap.clear()

    def _check_dirty_range(self, iova: int, size: int) -> None:
        if self._version.overflow == errno.EOVERFLOW:
            if not size:
                refuse(errno.EINVAL)
            if iova + size - 1 > U64_MAX:
                refuse(errno.EOVERFLOW)
        elif iova + size > U64_MAX:  # the exclusive end must not wrap either
            refuse(errno.EINVAL)


def info_write_back(version: KernelVersion, argsz: int) -> int:
    """Return the number of bytes of an info structure that a kernel writes back."""
    if version.info_whole_tail:
        return version.info_tail if argsz >= version.info_tail else _INFO_MINSZ
    return min(argsz, version.info_tail)
