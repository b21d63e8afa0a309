"""The rows of a picture: spans of IOVA, groups of them, and the gaps between, ascending. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeAlias, get_args

from pyvfio.extents import Extent, Part
from pyvfio.units import IovaRange, format_size

Kind: TypeAlias = Literal["block", "buffer", "temporary", "planned", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)
KIND_OF: dict[str, Kind] = {kind: kind for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Span:
    """A range of reserved IOVA with one owner.

    `size` bytes from `iova` on are reserved. The first `used` bytes are in use. `pieces`: the kernel mappings, as
    ascending `Extent`s of offsets into the span. `kind` is "block" (a RAM block), "buffer" (`map_dma`, `map_buffer`),
    "temporary" (`map_temporary`), "planned" (a block of a `Plan`) or "other" (another mapper, or `Container.map`).
    """

    kind: Kind
    name: str
    iova: int
    size: int
    used: int
    pieces: tuple[Extent, ...]

    @property
    def end(self) -> int:
        """The first IOVA behind the span."""
        return self.iova + self.size

    @property
    def mapped(self) -> int:
        """The bytes that the device can reach."""
        return sum(piece.size for piece in self.pieces)

    @property
    def label(self) -> str:
        """The figures of the span in words, such as "8 MiB of 1 GiB (4 pieces)"."""
        words = format_size(self.used)
        if self.used != self.size:
            words += f" of {format_size(self.size)}"
        more = [f"{format_size(self.mapped)} mapped"] * (self.mapped != self.used and self.kind != "planned")
        more += [f"{len(self.pieces)} pieces"] * (len(self.pieces) > 1)
        return f"{words} ({', '.join(more)})" if more else words


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the picture: a span, a group of spans, free IOVA, or IOVA that the IOMMU does not offer.

    `name` and `label` are the words; `start` and `size` in bytes. `parts`: (style, start, end), offsets into the row,
    to be filled in that order.
    """

    style: str
    name: str
    label: str
    start: int
    size: int
    parts: tuple[tuple[str, int, int], ...] = ()


def rows_of(iova_ranges: Sequence[IovaRange], spans: Sequence[Span], most: int) -> list[Row]:
    """Return the rows of a picture, ascending by IOVA: about `most` of spans, and the gaps between them."""
    taken = [_span_row(span) for span in spans] if len(spans) <= most else _groups(spans, most)
    rows = list(taken)
    for offered in iova_ranges:
        rows += _gaps([row for row in taken if offered.start <= row.start <= offered.last], offered)
    for below, above in pairwise(iova_ranges):
        size = above.start - below.last - 1
        rows += [Row("closed", "not offered", format_size(size), below.last + 1, size)] * (size > 0)
    return sorted(rows, key=lambda row: row.start)


def _gaps(rows: Sequence[Row], offered: IovaRange) -> list[Row]:
    """The free IOVA of a range, between the rows in the range."""
    found: list[Row] = []
    at: int = offered.start
    for row in rows:
        if row.start > at:
            found.append(_free(at, row.start - at))
        at = row.start + row.size
    if at <= offered.last:
        found.append(_free(at, offered.last - at + 1))
    return found


def _free(start: int, size: int) -> Row:
    return Row("free", "free", format_size(size), start, size)


def _span_row(span: Span) -> Row:
    parts: list[tuple[str, int, int]] = [("used", 0, span.used)] if span.used else []
    parts += [("mapped", piece.start, piece.end) for piece in span.pieces]
    return Row(span.kind, span.name or span.kind, span.label, span.iova, span.size, tuple(parts))


def _groups(spans: Sequence[Span], most: int) -> list[Row]:
    """Rows of neighbouring spans: more spans than rows are a picture of none."""
    each = -(-len(spans) // max(most, 1))
    return [_group(spans[start : start + each]) for start in range(0, len(spans), each)]


def _group(spans: Sequence[Span]) -> Row:
    start, size = spans[0].iova, spans[-1].end - spans[0].iova
    kinds = sorted({span.kind for span in spans})
    name = f"{len(spans)} x {'/'.join(kinds)}"
    label = f"{format_size(sum(span.used for span in spans))} of {format_size(size)}"
    style = kinds[0] if len(kinds) == 1 else "other"
    return Row(style, name, label, start, size, tuple(_joined(spans, start)))


def _joined(spans: Sequence[Span], base: int) -> list[tuple[str, int, int]]:
    """The mapped parts of the spans, neighbours joined: a group may have thousands."""
    runs: list[Part] = []
    for span in spans:
        for piece in span.pieces:
            start, end = span.iova - base + piece.start, span.iova - base + piece.end
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
    return [("mapped", start, end) for start, end in runs]


def ruler(rows: Sequence[Row], shortest: float, longest: float) -> Callable[[int], float]:
    """Return a function from bytes to a drawn length, the same for rows and for the parts of rows.

    The scale is logarithmic, so that a page and a TiB both show: the smallest row is `shortest` long, the largest
    `longest`. Parts that are smaller than the smallest row are drawn in proportion to it.
    """
    sizes = [math.log2(row.size) for row in rows] or [0.0]
    low, high = min(sizes), max(sizes)
    if high == low:
        shortest = longest
    step = (longest - shortest) / (high - low) if high > low else 0.0

    def length(size: int) -> float:
        above = math.log2(size) - low if size > 0 else -math.inf
        return shortest + above * step if above > 0 else shortest * 2.0**above

    return length
