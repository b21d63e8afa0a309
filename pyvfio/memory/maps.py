"""The mappings of this process, as the kernel lists them in /proc/self/maps."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from pathlib import Path


def areas(vaddr: int, size: int) -> list[tuple[int, int, str]]:
    """Return the lines of /proc/self/maps that overlap `[vaddr, vaddr + size)`: start, end, permissions."""
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
    found = areas(vaddr, size)
    covered = sum(min(end, vaddr + size) - max(start, vaddr) for start, end, _ in found)
    spans = ", ".join(f"{start:#x}-{end - 1:#x} {permissions}" for start, end, permissions in found[:4])
    if not found:
        return f"This process has nothing mapped at {vaddr:#x}-{vaddr + size - 1:#x}"
    hole = "" if covered == size else f"; {size - covered:#x} bytes of the range are not mapped at all"
    return f"This process has mapped there: {spans}{hole}"
