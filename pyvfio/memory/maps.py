"""The mappings of this process, as the kernel lists them in /proc/self/maps."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

_PROCMAP_QUERY = 0xC068_6611  # linux/fs.h, since 6.11
_QUERY = struct.Struct("=9Q4I2Q")  # struct procmap_query
_COVERING_OR_NEXT = 0x10  # PROCMAP_QUERY_COVERING_OR_NEXT_VMA
_RIGHTS = ((1, "r"), (2, "w"), (4, "x"))  # PROCMAP_QUERY_VMA_READABLE, _WRITABLE, _EXECUTABLE
_SHARED = 8  # PROCMAP_QUERY_VMA_SHARED


class Area(NamedTuple):
    """An answer of PROCMAP_QUERY. `flags`: PROCMAP_QUERY_VMA_*. `device`: major and minor number of the file."""

    start: int
    end: int
    flags: int
    device: tuple[int, int]

    @property
    def permissions(self) -> str:
        """As /proc/self/maps shows the rights, such as "rw-p"."""
        rights = "".join(letter if self.flags & bit else "-" for bit, letter in _RIGHTS)
        return rights + ("s" if self.flags & _SHARED else "p")


def query(maps: int, vaddr: int, flags: int = 0) -> Area | None:
    """Return the first mapping that ends behind `vaddr` and has all PROCMAP_QUERY_* `flags`; None without one.

    `maps` is a descriptor of /proc/self/maps. Raises OSError on kernels before 6.11. Cost: 1 µs; with `flags`, the
    kernel walks over the mappings without these flags.
    """
    argument = bytearray(_QUERY.pack(_QUERY.size, _COVERING_OR_NEXT | flags, vaddr, *[0] * 12))
    try:
        fcntl.ioctl(maps, _PROCMAP_QUERY, argument)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    answer = _QUERY.unpack(argument)
    return Area(answer[3], answer[4], answer[5], (answer[9], answer[10]))


def areas(vaddr: int, size: int) -> list[tuple[int, int, str]]:
    """Return the lines of /proc/self/maps that overlap `[vaddr, vaddr + size)`: start, end, permissions.

    Cost: 10 µs, or those of `areas_by_text` on kernels before 6.11.
    """
    maps = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _areas_by_query(maps, vaddr, vaddr + size)
    except OSError:
        return areas_by_text(vaddr, size)
    finally:
        os.close(maps)


def _areas_by_query(maps: int, vaddr: int, end: int) -> list[tuple[int, int, str]]:
    found = []
    while vaddr < end and (area := query(maps, vaddr)) is not None and area.start < end:
        found.append((area.start, area.end, area.permissions))
        vaddr = area.end
    return found


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
