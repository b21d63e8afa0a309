"""Bitmaps of dirty pages, as kernels fill them in, and the extents of dirty IOVA that they stand for. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from pyvfio.extents import Extent

_BYTES = re.compile(rb"\xff+|\x00+|.", re.DOTALL)
"""The bytes of a bitmap: a run of bytes with all bits set, a run of bytes with no bit set, or one mixed byte."""


def dirty_extents(bits: bytes, *, iova: int, size: int, page_size: int) -> list[Extent]:
    """Return the dirty parts of `[iova, iova + size)`, ascending and with gaps between them.

    Bit 0 of byte 0 is the page at `iova`. Bits behind the range are ignored. Cost: as `_runs`.
    """
    return [
        Extent(iova + first * page_size, iova + end * page_size) for first, end in _runs(bits, -(-size // page_size))
    ]


def _runs(bits: bytes, count: int) -> Iterator[tuple[int, int]]:
    """Yield the runs [first, end) of set bits among the first `count` bits.

    Later bits are ignored: the kernel leaves bits of other calls there.

    Cost: a search at the speed of memory, and O(1) for each run. Each mixed byte ends a run.
    """
    bits = bits[: -(-count // 8)]
    if count % 8:
        bits = bits[:-1] + bytes([bits[-1] & ((1 << count % 8) - 1)])
    first = end = 0  # a run that the next byte may continue
    for found in _BYTES.finditer(bits):
        at, behind = found.span()
        byte = bits[at]
        for start, stop in [(0, 8 * (behind - at))] if byte == 0xFF else _runs_of(byte):
            if 8 * at + start > end:
                if first < end:
                    yield first, end
                first = 8 * at + start
            end = 8 * at + stop
    if first < end:
        yield first, end


@cache
def _runs_of(byte: int) -> tuple[tuple[int, int], ...]:
    """Return the runs [first, end) of set bits in one byte."""
    edges = byte ^ byte << 1  # where a bit differs from the one below it
    at = [bit for bit in range(9) if edges >> bit & 1]
    return tuple(zip(at[::2], at[1::2], strict=True))
