"""Segments of IOVA for scatter-gather lists and PRP lists: ranges, cut at the limits of a device. Pure.

An NVMe controller takes PRP entries, and no entry may cross a page (`boundary`). Other devices limit the length of an
element (`max_segment`), or forbid elements that cross 64 KiB or 4 GiB (`boundary`). In Linux, the limits of a device
are called `max_segment_size` and `segment_boundary_mask`.

Source: `nvme_pci_setup_prps` in drivers/nvme/host/pci.c; `dma_set_max_seg_size` and `dma_set_seg_boundary` in
include/linux/dma-mapping.h.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Generic, NamedTuple, SupportsIndex, TypeAlias, TypeVar, cast

from pyvfio.units import Iova, check_whole_number, is_power_of_two

Segment: TypeAlias = tuple[Iova, int]
"""The first IOVA of a segment, and its length in bytes."""

Parts: TypeAlias = tuple[int, int] | list[list[tuple[int, int]]]
"""The mapped ranges of parts of memory. A tuple (apart, end): one run of IOVA contains all parts. Byte `offset` is at
IOVA `apart + offset`, and the run ends at byte `end`, exclusive. A list: the runs of each part as (iova, size)."""

_Numbers = TypeVar("_Numbers")


class SegmentArrays(NamedTuple, Generic[_Numbers]):
    """The segments of several parts, one part after the other. All lengths are in bytes."""

    iovas: _Numbers
    """The first IOVA of each segment."""
    sizes: _Numbers
    """The length of each segment."""
    counts: _Numbers
    """The number of segments of each part."""


class Limits(NamedTuple):
    """The limits of one segment in bytes: its length, and the multiples that it must not cross. None: no limit."""

    max_segment: int | None
    boundary: int | None

    @classmethod
    def checked(cls, max_segment: SupportsIndex | None, boundary: SupportsIndex | None) -> Limits:
        """Return both as ints. Raises ValueError: below 1, or a boundary that is not a power of two; TypeError."""
        longest = None if max_segment is None else check_whole_number(max_segment, "max_segment")
        if longest is not None and longest < 1:
            raise ValueError(f"max_segment must be at least 1 byte, not {longest}")
        multiple = None if boundary is None else check_whole_number(boundary, "boundary")
        if multiple is not None and not is_power_of_two(multiple):
            raise ValueError(f"boundary must be a power of two, not {multiple}")
        return cls(longest, multiple)


def check_part(offset: SupportsIndex, size: SupportsIndex | None, length: int, what: str) -> tuple[int, int]:
    """Return the offset and the size of a part of `what`, which has `length` bytes. `size` None: up to the end.

    Raises ValueError if the part is empty or not inside; TypeError.
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
    """Join adjacent ranges. `ranges`: (iova, size) in bytes, in order."""
    joined: list[tuple[int, int]] = []
    for iova, size in ranges:
        if joined and sum(joined[-1]) == iova:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((iova, size))
    return joined


def cut_all(parts: Iterable[list[tuple[int, int]]], limits: Limits) -> SegmentArrays[array[int]]:
    """Cut the runs of each part as `cut` does. Returns arrays of type "Q"."""
    found = SegmentArrays(array("Q"), array("Q"), array("Q"))
    longest, boundary = limits
    if boundary is not None and longest is not None and boundary <= longest:
        longest = None
    for runs in parts:
        before = len(found.iovas)
        for iova, size in runs:
            end = iova + size
            if boundary is None:
                step = longest or size
                _extend(found, iova, end, step, iova + step)
            elif longest is None:
                _extend(found, iova, end, boundary, (iova | boundary - 1) + 1)
            else:
                for start, count in _steps(iova, end, boundary, (iova | boundary - 1) + 1):
                    _extend(found, start, start + count, longest, start + longest)
        found.counts.append(len(found.iovas) - before)
    return found


def _extend(found: SegmentArrays[array[int]], start: int, end: int, step: int, first: int) -> None:
    """Cut as `_steps` does, and append to arrays."""
    iovas, sizes, _counts = found
    iovas.append(start)
    if first >= end:
        sizes.append(end - start)
        return
    starts = range(first, end, step)
    iovas.extend(starts)
    sizes.append(first - start)
    sizes.extend(array("Q", (step,)) * len(starts))
    sizes[-1] = end - starts[-1]


def cut(iova: int, size: int, limits: Limits) -> list[Segment]:
    """Return the fewest segments within `limits` that cover `[iova, iova + size)`, in order. Cost: O(segments)."""
    longest, boundary = limits
    end = iova + size
    segments = [(iova, size)] if boundary is None else _steps(iova, end, boundary, (iova | boundary - 1) + 1)
    if longest is not None and (boundary is None or longest < boundary):
        whole, segments = segments, []
        for start, count in whole:
            segments += _steps(start, start + count, longest, start + longest)
    return cast("list[Segment]", segments)


def _steps(start: int, end: int, step: int, first: int) -> list[tuple[int, int]]:
    """Cut [start, end) at `first` and after every `step` bytes from there on."""
    if first >= end:
        return [(start, end - start)]
    last = end - (end - first) % step
    found = [(start, first - start), *[(at, step) for at in range(first, last, step)]]
    if last < end:
        found.append((last, end - last))
    return found
