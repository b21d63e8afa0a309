"""The memory behind mappings of iommufd: pinned while a page table shows the memory, and charged once.

Source: `struct iopt_pages` in drivers/iommu/iommufd/pages.c; the functions named below are there.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter

from pyvfio.kernel import HUGETLBFS_MAGIC, MAP_SHARED, PROT_READ, PROT_WRITE, TMPFS_MAGIC, LinuxKernel
from pyvfio.testing.fake.pins import Account, Mapped, Pins
from pyvfio.testing.fake.process import refuse
from pyvfio.units import PAGE_SIZE, Vaddr, align_down, align_up

_RIGHT_TO_READ = 1  # VFIO_DMA_MAP_FLAG_READ
_FILE_END = 1 << 46  # half of the address space, which no file fills


class FileWindow:
    """A mapping of a part of a file by the fake, through which devices reach the file.

    Only memory files (memfd, tmpfs, hugetlbfs) have pages that a device can reach. `vaddr` is 0 for other files. A
    descriptor of the fake itself is given as None, since a memory file stands for the node.
    `writable`: whether the file could be mapped for writing. A kernel pins the pages of a sealed file too, but no
    process can write them.
    """

    def __init__(self, fd: int | None, start: int, size: int) -> None:
        self._linux = LinuxKernel()
        self.vaddr = 0
        self.writable = True
        if fd is not None:
            self._open(fd, start, size)

    def _open(self, fd: int, start: int, size: int) -> None:
        status = self._linux.file_status(fd)
        if status.file_system not in (TMPFS_MAGIC, HUGETLBFS_MAGIC):
            return
        block = max(status.block_size, PAGE_SIZE) if status.file_system == HUGETLBFS_MAGIC else PAGE_SIZE
        if start + size > _FILE_END:
            return
        self._start = align_down(start, block)
        self._size = align_up(start + size, block) - self._start
        with contextlib.suppress(OSError):  # no such range of a file can be mapped, so no page can be pinned
            self._base = self._map(fd)
            self.vaddr = self._base + start - self._start

    def _map(self, fd: int) -> int:
        try:
            whole = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)  # `fd` may be open for reading only
            try:
                return self._map_with(whole, PROT_READ | PROT_WRITE)
            finally:
                os.close(whole)
        except OSError:
            self.writable = False
            return self._map_with(fd, PROT_READ)

    def _map_with(self, fd: int, protection: int) -> int:
        return self._linux.mmap(0, self._size, protection, MAP_SHARED, fd=fd, offset=self._start)

    def close(self) -> None:
        """Remove the mapping; twice is fine."""
        if self.vaddr:
            self.vaddr = 0
            self._linux.munmap(self._base, self._size)


class Pages:
    """The memory of one IOMMU_IOAS_MAP or IOMMU_IOAS_MAP_FILE, which copies of the mapping share.

    `vaddr` is the address of the first page, or 0 for a file whose pages no device can reach. `hint`: the number whose
    alignment the kernel keeps when the kernel chooses an IOVA. `users`: the number of areas that show the memory.
    """

    def __init__(
        self, pins: Pins, *, vaddr: int, writable: bool, account: Account, hint: int, window: FileWindow | None = None
    ) -> None:
        self._pins = pins
        self.vaddr = vaddr
        self.writable = writable
        self.account = account
        self.hint = hint
        self.window = window
        self.users = 0
        self.shared = False
        """Whether areas may overlap. Each pin and unpin then looks for the pages of other areas."""
        self._filled: Counter[tuple[int, int]] = Counter()  # pages [first, end) of each area in a page table

    @property
    def _write(self) -> bool:
        return self.writable and (self.window is None or self.window.writable)

    def fill(self, entry: Mapped, *, needs_rights: bool) -> None:
        """Pin and charge the pages of an area that no other area has pinned (`iopt_area_fill_domains`).

        All pages are pinned before any is charged. Raises EFAULT for memory that cannot be pinned (EINVAL for a file),
        EINVAL for an area without rights if the page table needs some, and ENOMEM for the limit.
        """
        span = self._span(entry)
        missing = self._missing(*span)
        for first, end in missing:
            at = self.vaddr + first * PAGE_SIZE
            if not self.vaddr or not self._pins.populate(at, (end - first) * PAGE_SIZE, write=self._write):
                refuse(errno.EFAULT if self.window is None else errno.EINVAL)
        if needs_rights and not entry.flags:
            refuse(errno.EINVAL)
        self._pins.charge(self.account, _bytes(missing))
        self._filled[span] += 1
        self._pins.index.add(self.indexed(entry))

    def unfill(self, entry: Mapped) -> None:
        """Unpin the pages of an area that no other area needs (`iopt_area_unfill_domains`)."""
        span = self._span(entry)
        self._forget(span)
        self._pins.uncharge(self.account, _bytes(self._missing(*span)))
        self._pins.index.remove(self.indexed(entry))

    def split(self, entry: Mapped, parts: tuple[Mapped, Mapped]) -> None:
        """Replace an area that is in a page table by two (`iopt_area_split`). Pins and charge stay."""
        self._forget(self._span(entry))
        self._pins.index.remove(self.indexed(entry))
        for part in parts:
            self._filled[self._span(part)] += 1
            self._pins.index.add(self.indexed(part))

    def release(self) -> None:
        """Forget an area. With the last one, the window on a file is closed."""
        self.users -= 1
        self.drop_unused()

    def drop_unused(self) -> None:
        """Close the window on a file if no area shows the memory: the last area went, or none could be made."""
        if not self.users and self.window is not None:
            self.window.close()

    def pinned(self) -> int:
        """Return the number of bytes that are pinned."""
        count, reached = 0, 0
        for first, end in sorted(self._filled):
            count += max(end - max(first, reached), 0)
            reached = max(reached, end)
        return count * PAGE_SIZE

    def _forget(self, span: tuple[int, int]) -> None:
        self._filled[span] -= 1
        if not self._filled[span]:
            del self._filled[span]

    def indexed(self, entry: Mapped) -> Mapped:
        """Return an area as the memory calls of the process see the area."""
        # Of a file that cannot be mapped for writing, the process never loses the right to write.
        cannot_write = self.window is not None and not self.window.writable
        return entry._replace(flags=entry.flags & _RIGHT_TO_READ) if cannot_write else entry

    def _span(self, entry: Mapped) -> tuple[int, int]:
        offset = entry.vaddr - self.vaddr
        return offset // PAGE_SIZE, align_up(offset + entry.size, PAGE_SIZE) // PAGE_SIZE

    def _missing(self, first: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of pages [first, end) that no area in a page table shows."""
        if not self.shared:
            return [(first, end)]
        parts = []
        for start, stop in sorted(self._filled):
            if start >= end:
                break
            if start > first:
                parts.append((first, start))
            first = max(first, stop)
        return [*parts, (first, end)] if first < end else parts


def user_pages(pins: Pins, *, vaddr: int, writable: bool, account: Account) -> tuple[Pages, int]:
    """Return the pages of process memory, and the offset of `vaddr` in the pages (`iopt_alloc_user_pages`)."""
    start = align_down(vaddr, PAGE_SIZE)
    return Pages(pins, vaddr=Vaddr(start), writable=writable, account=account, hint=start), vaddr - start


def file_pages(
    pins: Pins, *, fd: int | None, start: int, size: int, writable: bool, account: Account
) -> tuple[Pages, int]:
    """Return the pages of a file, and the offset of `start` in the pages (`iopt_alloc_file_pages`)."""
    first = align_down(start, PAGE_SIZE)
    window = FileWindow(fd, first, size + start - first)
    pages = Pages(pins, vaddr=window.vaddr, writable=writable, account=account, hint=first, window=window)
    return pages, start - first


def _bytes(parts: list[tuple[int, int]]) -> int:
    return sum(end - first for first, end in parts) * PAGE_SIZE
