"""Dirty tracking of type1: a bitmap for each mapping, and how it gets into the caller's memory, byte for byte.

Devices of QEMU cannot report what they wrote, so every mapped page is always dirty. What can be seen beyond that is how
the kernel shifts a mapping's own bitmap into place and forgets to wipe what it shifted.

Source: drivers/vfio/vfio_iommu_type1.c; the functions named below are there.
"""

from __future__ import annotations

import errno
import struct

from pyvfio.testing.fake.process import read_memory, refuse, write_memory
from pyvfio.units import PAGE_SIZE, U64_MAX

MAX_BITMAP = 0x1000_0000  # DIRTY_BITMAP_SIZE_MAX
_MAX_PAGES = (1 << 31) - 1  # DIRTY_BITMAP_PAGES_MAX
_WORD = 64
_USER_END = (1 << 47) - PAGE_SIZE  # TASK_SIZE_MAX with page tables of four levels, as the virtual machine has


def bitmap_bytes(pages: int) -> int:
    """How many bytes a bitmap of so many pages takes: whole words (`DIRTY_BITMAP_BYTES`)."""
    return (pages + _WORD - 1) // _WORD * 8


class Bitmap:
    """The bitmap of one mapping of `pages` pages, zero at first (`vfio_dma_bitmap_alloc`: EINVAL when too large)."""

    def __init__(self, pages: int) -> None:
        if pages > _MAX_PAGES:
            refuse(errno.EINVAL)
        self._pages = pages
        self._bits = 0

    def report(self, data: int, *, first: int) -> None:
        """`update_user_bitmap`: all pages are dirty; copy to the caller's bitmap at `data`, in which the mapping is at
        bit `first`. EFAULT.

        A mapping that does not begin at a word is shifted, in its own bitmap, and the caller's whole word is ORed into
        it: bits behind the mapping stay there and come out again the next time.
        """
        self._bits |= (1 << self._pages) - 1
        word, shift = divmod(first, _WORD)
        if shift:
            self._shift(shift)
            (before,) = struct.unpack("=Q", read_memory(data + word * 8, 8))
            self._bits |= before
        size = bitmap_bytes(self._pages + shift)
        write_memory(data + word * 8, (self._bits & ((1 << size * 8) - 1)).to_bytes(size, "little"))

    def _shift(self, shift: int) -> None:
        # bitmap_shift_left moves whole words, as many as have a bit of the result, and leaves the others alone.
        mask = (1 << bitmap_bytes(self._pages + shift) * 8) - 1
        self._bits = ((self._bits & mask) << shift) & mask | self._bits & ~mask

    def clear(self) -> None:
        """The pages, and only they, are clean (`vfio_iova_dirty_bitmap`)."""
        self._bits &= ~((1 << self._pages) - 1)


def check_bitmap(*, size: int, pgsize: int, bitmap_size: int, data: int) -> None:
    """`access_ok` and `verify_bitmap_size`: EINVAL. `size` bytes of IOVAs, `pgsize` each a bit of the bitmap."""
    if data + bitmap_size > _USER_END:
        refuse(errno.EINVAL)
    # __ffs of 0 is 64 on the processors of the last ten years, and a shift by 64 is one by 0.
    pages = size >> ((pgsize & -pgsize).bit_length() - 1 if pgsize else 0)
    needed = bitmap_bytes(pages) & U64_MAX
    if not pages or not bitmap_size or bitmap_size > MAX_BITMAP or bitmap_size < needed:
        refuse(errno.EINVAL)
