"""Dirty tracking of type1: a bitmap for each mapping, copied to memory of the caller byte for byte.

Devices of QEMU cannot report writes, so every mapped page is always dirty. Beyond that, the copies show a defect of the
kernel: the bitmap of a mapping is shifted in place, and the shifted bits are not cleared.

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
_USER_END = (1 << 47) - PAGE_SIZE  # TASK_SIZE_MAX with page tables of four levels, as in the virtual machine


def bitmap_bytes(pages: int) -> int:
    """Return the size in bytes of a bitmap for `pages` pages, in whole words (`DIRTY_BITMAP_BYTES`)."""
    return (pages + _WORD - 1) // _WORD * 8


class Bitmap:
    """The bitmap of a mapping of `pages` pages, at first zero (`vfio_dma_bitmap_alloc`: EINVAL for too many)."""

    def __init__(self, pages: int) -> None:
        if pages > _MAX_PAGES:
            refuse(errno.EINVAL)
        self._pages = pages
        self._bits = 0

    def report(self, data: int, *, first: int) -> None:
        """`update_user_bitmap`: mark all pages dirty, and copy the bits to the bitmap of the caller. EFAULT.

        The mapping begins at bit `first` of the bitmap at `data`. If that is not the first bit of a word, the kernel
        shifts the bitmap of the mapping in place, and ORs the word of the caller into the bitmap. Bits behind the
        mapping stay in the bitmap, and the next report copies these bits too.
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
        # bitmap_shift_left moves only the whole words that have a bit of the result.
        mask = (1 << bitmap_bytes(self._pages + shift) * 8) - 1
        self._bits = ((self._bits & mask) << shift) & mask | self._bits & ~mask

    def clear(self) -> None:
        """Mark the pages of the mapping clean, and no other bits (`vfio_iova_dirty_bitmap`)."""
        self._bits &= ~((1 << self._pages) - 1)


def check_bitmap(*, size: int, pgsize: int, bitmap_size: int, data: int) -> None:
    """`access_ok` and `verify_bitmap_size`: EINVAL. The bitmap has a bit for each `pgsize` of `size` bytes of IOVA."""
    if data + bitmap_size > _USER_END:
        refuse(errno.EINVAL)
    # On processors of the last ten years, __ffs(0) is 64, and a shift by 64 is a shift by 0.
    pages = size >> ((pgsize & -pgsize).bit_length() - 1 if pgsize else 0)
    needed = bitmap_bytes(pages) & U64_MAX
    if not pages or not bitmap_size or bitmap_size > MAX_BITMAP or bitmap_size < needed:
        refuse(errno.EINVAL)
