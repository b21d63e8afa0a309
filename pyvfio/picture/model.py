"""A picture: the spans of an IOVA space at one moment. Frozen, and good as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from pyvfio.extents import Extent
from pyvfio.picture.rows import KIND_OF, KINDS, Row, Span, rows_of
from pyvfio.picture.svg import to_svg
from pyvfio.picture.text import to_text
from pyvfio.units import U64_MAX, Iova, IovaRange, check_whole_number

SCHEMA = "pyvfio.picture/1"


@dataclass(frozen=True, slots=True)
class Picture:
    """The IOVA space of a container at one moment: `spans` ascend by IOVA and do not overlap.

    `iova_ranges`: the addresses that the IOMMU offers. `dma_bits`: pyvfio places IOVAs below 2^`dma_bits`.
    `str()` of a picture is text for a terminal, and notebooks show the SVG. A snapshot: nothing follows later changes.
    """

    title: str
    iova_ranges: tuple[IovaRange, ...]
    spans: tuple[Span, ...]
    dma_bits: int

    def _rows(self, most: int) -> list[Row]:
        return rows_of(self.iova_ranges, self.spans, most)

    def svg(self, *, rows: int = 64) -> str:
        """Return the picture as an SVG document. Spans beyond `rows` are drawn in groups. O(spans and pieces)."""
        return svg_of([self], rows=rows)

    def text(self, *, width: int = 80, rows: int = 64, ascii_only: bool = False) -> str:
        """Return the picture as lines of at most `width` columns (30 at least)."""
        return to_text(self.title, self._rows(rows), width=width, ascii_only=ascii_only)

    def __str__(self) -> str:
        return self.text()

    def _repr_svg_(self) -> str:
        return self.svg()

    def titled(self, title: str) -> Self:
        """Return the same picture under another title."""
        return replace(self, title=title)

    def to_json(self) -> dict[str, object]:
        """Return the JSON document `pyvfio.picture/1`, which `pyvfio draw` and `from_json` read."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "dma_bits": self.dma_bits,
            "iova_ranges": [{"start": each.start, "last": each.last} for each in self.iova_ranges],
            "spans": [
                {
                    "kind": span.kind,
                    "name": span.name,
                    "iova": span.iova,
                    "size": span.size,
                    "used": span.used,
                    "pieces": [list(piece) for piece in span.pieces],
                }
                for span in self.spans
            ],
        }

    @classmethod
    def from_json(cls, document: str | Mapping[str, object]) -> Self:
        """Read a document that `to_json` has made, as text or parsed. Raises ValueError for any other."""
        found = json.loads(document) if isinstance(document, str) else document
        if not isinstance(found, Mapping) or found.get("schema") != SCHEMA:
            raise ValueError(f'not a document of the schema "{SCHEMA}"')
        try:
            made = cls(
                str(found["title"]),
                tuple(
                    IovaRange(Iova(_number(each["start"])), Iova(_number(each["last"])))
                    for each in _rows(found, "iova_ranges")
                ),
                tuple(_span(each) for each in _rows(found, "spans")),
                _number(found["dma_bits"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a {SCHEMA} document lacks, or has another kind of value for, {error}") from error
        made.check()
        return made

    def check(self) -> None:
        """Raise ValueError where spans overlap or do not ascend, or where a piece lies outside of its span."""
        for span in self.spans:
            _check_span(span)
        for before, after in pairwise(self.spans):
            if before.end > after.iova:
                raise ValueError(f"spans overlap or do not ascend: {before.iova:#x}, {after.iova:#x}")


def svg_of(pictures: Iterable[Picture], *, rows: int = 64) -> str:
    """Return one SVG document with the pictures below each other, such as before and after a resize."""
    return to_svg([(picture.title, rows_of(picture.iova_ranges, picture.spans, rows)) for picture in pictures])


def _check_span(span: Span) -> None:
    if span.kind not in KINDS:
        raise ValueError(f"the kind of a span is one of {', '.join(KINDS)}, not {span.kind!r}")
    if span.size < 1 or span.iova < 0 or span.end - 1 > U64_MAX or not 0 <= span.used <= span.size:
        raise ValueError(f"not a span: iova {span.iova:#x}, size {span.size:#x}, used {span.used:#x}")
    before = 0
    for piece in span.pieces:
        if not before <= piece.start < piece.end <= span.size:
            raise ValueError(f"pieces of the span at {span.iova:#x} must ascend and lie inside of the span: {piece}")
        before = piece.end


def _number(value: object) -> int:
    return check_whole_number(value, "a number of a picture")


def _rows(document: Mapping[str, object], key: str) -> Sequence[Mapping[str, object]]:
    rows = document[key]
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise TypeError(f"{key!r}, a list of objects")
    return rows


def _span(row: Mapping[str, object]) -> Span:
    pieces = row["pieces"]
    if not isinstance(pieces, list) or not all(isinstance(piece, list) and len(piece) == 2 for piece in pieces):
        raise TypeError("'pieces', a list of pairs")
    kind = KIND_OF.get(str(row["kind"]))
    if kind is None:
        raise ValueError(f"the kind of a span is one of {', '.join(KINDS)}, not {row['kind']!r}")
    return Span(
        kind,
        str(row["name"]),
        _number(row["iova"]),
        _number(row["size"]),
        _number(row["used"]),
        tuple(Extent(_number(start), _number(end)) for start, end in pieces),
    )
