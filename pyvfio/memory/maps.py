"""The mappings of this process, as the kernel lists them in /proc/self/maps."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_PROCMAP_QUERY = 0xC068_6611  # linux/fs.h, since 6.11
_QUERY = struct.Struct("=9Q4I2Q")  # struct procmap_query
_COVERING_OR_NEXT = 0x10  # PROCMAP_QUERY_COVERING_OR_NEXT_VMA
_RIGHTS = ((1, "r"), (2, "w"), (4, "x"))  # PROCMAP_QUERY_VMA_READABLE, _WRITABLE, _EXECUTABLE
_SHARED = 8  # PROCMAP_QUERY_VMA_SHARED
_PATH_MAX = 4096


class Area(NamedTuple):
    """An answer of PROCMAP_QUERY. `flags`: PROCMAP_QUERY_VMA_*. `offset`, `device`, `inode` are of a file, or 0."""

    start: int
    end: int
    flags: int
    offset: int
    device: tuple[int, int]
    inode: int
    name: str = ""

    @property
    def permissions(self) -> str:
        """As /proc/self/maps shows the rights, such as "rw-p"."""
        rights = "".join(letter if self.flags & bit else "-" for bit, letter in _RIGHTS)
        return rights + ("s" if self.flags & _SHARED else "p")


def query(maps: int, vaddr: int, flags: int = 0, *, named: bool = False) -> Area | None:
    """Return the first mapping that ends behind `vaddr` and has all PROCMAP_QUERY_* `flags`; None without one.

    `maps` is a descriptor of /proc/self/maps. Raises OSError on kernels before 6.11. Cost: 1 µs; with `flags`, the
    kernel walks over the mappings without these flags.
    """
    name = ctypes.create_string_buffer(_PATH_MAX if named else 1)
    place = (_PATH_MAX, 0, ctypes.addressof(name), 0) if named else (0, 0, 0, 0)
    argument = bytearray(_QUERY.pack(_QUERY.size, _COVERING_OR_NEXT | flags, vaddr, *[0] * 8, *place))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, argument)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    _size, _flags, _vaddr, start, end, found, _page_size, offset, inode, major, minor, *_ = _QUERY.unpack(argument)
    return Area(start, end, found, offset, (major, minor), inode, name.value.decode("utf-8", "replace"))


def query_ranges(ranges: Iterable[tuple[int, int]], *, named: bool = False) -> list[Area] | None:
    """Return the mappings that overlap the ranges, start to end, each once; None on kernels before 6.11.

    `named`: shared mappings of files with the name of the file. Cost: 5 µs, and 2 µs for each mapping.
    """
    found = {}
    maps = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in ranges:
            at = start
            while at < end and (area := query(maps, at)) is not None and area.start < end:
                at = area.end
                if named and area.inode and area.flags & _SHARED:
                    area = query(maps, area.start, named=True) or area
                found[area.start] = area
    except OSError:
        return None
    finally:
        os.close(maps)
    return [area for _start, area in sorted(found.items())]


def areas(vaddr: int, size: int) -> list[tuple[int, int, str]]:
    """Return the lines of /proc/self/maps that overlap `[vaddr, vaddr + size)`: start, end, permissions.

    Cost: as `query_ranges`, or as `areas_by_text` on kernels before 6.11.
    """
    found = query_ranges([(vaddr, vaddr + size)])
    if found is None:
        return areas_by_text(vaddr, size)
    return [(area.start, area.end, area.permissions) for area in found]


def areas_by_text(vaddr: int, size: int) -> list[tuple[int, int, str]]:
    """Return the areas as `areas` does, from the text of the file. Cost: about 1 ms."""
    found = []
    # Read as bytes: a path may contain a carriage return, which the kernel does not escape and Python takes for the
    # end of a line.
    lines = Path("/proc/self/maps").read_bytes().split(b"\n")[:-1]
    # The lines ascend, and a large process has thousands: bisect, and parse only the few lines that matter.
    first = bisect_right(lines, vaddr, key=lambda line: _span(line)[1])
    for line in itertools.islice(lines, first, None):
        start, end = _span(line)
        if start >= vaddr + size:
            break
        found.append((start, end, line.split(maxsplit=2)[1].decode("ascii")))
    return found


def _span(line: bytes) -> tuple[int, int]:
    start, end = line.split(b" ", 1)[0].split(b"-")
    return int(start, 16), int(end, 16)


def describe(vaddr: int, size: int) -> str:
    """Describe this process's mappings in `[vaddr, vaddr + size)`, for error messages. Cost: about 1 ms."""
    found = areas_by_text(vaddr, size)  # the text also has the page of vsyscall
    covered = sum(min(end, vaddr + size) - max(start, vaddr) for start, end, _ in found)
    spans = ", ".join(f"{start:#x}-{end - 1:#x} {permissions}" for start, end, permissions in found[:4])
    if not found:
        return f"This process has nothing mapped at {vaddr:#x}-{vaddr + size - 1:#x}"
    hole = "" if covered == size else f"; {size - covered:#x} bytes of the range are not mapped at all"
    return f"This process has mapped there: {spans}{hole}"
