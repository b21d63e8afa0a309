"""The picture of an address space: the ranges that are reserved there, and the mappings in them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from pyvfio.extents import Extent
from pyvfio.iommu.space import AddressSpace, Mapping
from pyvfio.picture.model import Picture
from pyvfio.picture.rows import Span


def picture_of(space: AddressSpace, title: str, known: Iterable[Span] = ()) -> Picture:
    """Return a picture of `space`: the spans that are `known`, and all other reserved or mapped IOVA as "other".

    O(n log n), n reservations and mappings. Synchronization: none; the caller holds the space's lock.
    """
    spans = {span.iova: span for span in known}
    for reserved in space.reserved_iova:
        if reserved.start not in spans:
            found = space.mappings_in(iova=reserved.start, size=reserved.size)
            spans[reserved.start] = _other(reserved.start, reserved.size, found)
    starts = sorted(spans)
    for mapping in space.mappings_in(iova=0, size=1 << 64):  # `Container.map` needs no reservation
        before = bisect_right(starts, mapping.iova)
        if before == 0 or spans[starts[before - 1]].end <= mapping.iova:
            spans[mapping.iova] = _other(mapping.iova, mapping.size, [mapping])
    return Picture(title, space.iova_ranges, tuple(spans[iova] for iova in sorted(spans)), space.dma_bits)


def _other(start: int, size: int, mappings: Iterable[Mapping]) -> Span:
    pieces = tuple(Extent(iova - start, iova - start + length) for iova, length, _vaddr in mappings)
    return Span("other", "", start, size, sum(piece.size for piece in pieces), pieces)
