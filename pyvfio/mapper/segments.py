"""Segments of IOVA for scatter-gather lists and PRP lists: ranges, cut where a device needs them cut. Pure.

An NVMe controller takes PRP entries, none of which crosses a page (`boundary`). Other devices limit the length of an
element (`max_segment`), or forbid elements that cross 64 KiB or 4 GiB (`boundary`). These are `max_segment_size` and
`segment_boundary_mask` of a device in Linux.

Source: `nvme_pci_setup_prps` in drivers/nvme/host/pci.c; `dma_set_max_seg_size` and `dma_set_seg_boundary` in
include/linux/dma-mapping.h.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, SupportsIndex, TypeAlias, cast

from pyvfio.units import Iova, check_whole_number, is_power_of_two

Segment: TypeAlias = tuple[Iova, int]
"""The first IOVA of a segment, and its length in bytes."""


class Limits(NamedTuple):
    """The limits of one segment in bytes: its length, and the multiples that it must not cross. None: no limit."""

    max_segment: int | None
    boundary: int | None

    @classmethod
    def checked(cls, max_segment: SupportsIndex | None, boundary: SupportsIndex | None) -> Limits:
        """Return both as ints. Raises ValueError: below 1, or a boundary that is no power of two; TypeError."""
        longest = None if max_segment is None else check_whole_number(max_segment, "max_segment")
        if longest is not None and longest < 1:
            raise ValueError(f"max_segment must be at least 1 byte, not {longest}")
        multiple = None if boundary is None else check_whole_number(boundary, "boundary")
        if multiple is not None and not is_power_of_two(multiple):
            raise ValueError(f"boundary must be a power of two, not {multiple}")
        return cls(longest, multiple)


def check_part(offset: SupportsIndex, size: SupportsIndex | None, length: int, what: str) -> tuple[int, int]:
    """Return the offset and the size of a part of `what`, which has `length` bytes. `size` None: up to the end.

    Raises ValueError: a part without a byte, or one that is not inside; TypeError.
    """
    start = check_whole_number(offset, "offset")
    count = length - start if size is None else check_whole_number(size, "size")
    if start < 0 or (size is not None and count < 1):
        raise ValueError(f"offset must be at least 0 and size at least 1 byte, not {start} and {count}")
    if size is None and count < 1:
        raise ValueError(f"offset {start:#x} is behind the last of the {length:#x} bytes of {what}")
    if start + count > length:
        raise ValueError(f"bytes {start:#x}-{start + count - 1:#x} are outside of the {length:#x} bytes of {what}")
    return start, count


def join(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return `ranges`, (iova, size) in bytes and in order, with each run of neighbours as one."""
    joined: list[tuple[int, int]] = []
    for iova, size in ranges:
        if joined and sum(joined[-1]) == iova:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((iova, size))
    return joined


def cut(iova: int, size: int, limits: Limits) -> list[Segment]:
    """Return the fewest segments within `limits` that cover `[iova, iova + size)`, in order. O(segments)."""
    longest, boundary = limits
    end = iova + size
    segments = [(iova, size)] if boundary is None else _steps(iova, end, boundary, (iova | boundary - 1) + 1)
    if longest is not None and (boundary is None or longest < boundary):
        whole, segments = segments, []
        for start, count in whole:
            segments += _steps(start, start + count, longest, start + longest)
    return cast("list[Segment]", segments)


def _steps(start: int, end: int, step: int, first: int) -> list[tuple[int, int]]:
    """Cut [start, end) at `first` and at each `step` from there on."""
    if first >= end:
        return [(start, end - start)]
    last = end - (end - first) % step
    found = [(start, first - start), *[(at, step) for at in range(first, last, step)]]
    if last < end:
        found.append((last, end - last))
    return found
