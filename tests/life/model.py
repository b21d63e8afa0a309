"""A model of blocks and of the memory that a device reaches: as simple as possible, in sets of pages.

The model shares no code with the library that it judges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pyvfio.units import PAGE_SIZE


class Piece(NamedTuple):
    """Pages [start, end) of a block: one mapping of the kernel."""

    start: int
    end: int

    @property
    def pages(self) -> set[int]:
        """The numbers of the pages."""
        return set(range(self.start, self.end))


def pages_of(pieces: Iterable[Piece]) -> set[int]:
    """Return all pages of the pieces."""
    return {page for piece in pieces for page in range(piece.start, piece.end)}


def runs_of(pages: Collection[int]) -> list[Piece]:
    """Return the longest pieces that cover exactly these pages."""
    starts = sorted(page for page in pages if page - 1 not in pages)
    ends = sorted(page + 1 for page in pages if page + 1 not in pages)
    return [Piece(start, end) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Way:
    """The way that a mapper follows resizes. `granule` in pages."""

    resize: Literal["remap", "extend", "cut"]
    granule: int | None = None
    allow_gap: bool = True

    @property
    def joins(self) -> bool:
        """Whether pieces are joined if the container accepts no more mappings."""
        return self.resize == "extend" and self.granule is None and self.allow_gap

    def suits(self, length: int, pages: set[int]) -> bool:
        """Return whether the length and the populated pages consist of whole granules."""
        if self.granule is None:
            return True
        granules = [set(range(start, start + self.granule)) for start in range(0, length, self.granule)]
        return length % self.granule == 0 and all(granule <= pages or not granule & pages for granule in granules)

    def entries(self, maximum: int) -> int:
        """Return the number of mappings reserved for a block: 0 without a granule."""
        return -(-maximum // self.granule) if self.granule else 0

    def neighbours(self, page: int) -> range:
        """Return the pages that can be unmapped only together with `page`, apart from its piece."""
        step = self.granule or 1
        return range(page // step * step, page // step * step + step)

    def after(self, pieces: Iterable[Piece], wanted: set[int]) -> list[Piece] | None:
        """Return the pieces of a block that reaches exactly `wanted`; None if that needs a forbidden gap."""
        if self.resize == "remap":
            return runs_of(wanted)
        stay: list[Piece] = []
        for piece in pieces:
            inside = piece.pages & wanted
            if inside and inside != piece.pages and not self.allow_gap:
                return None
            stay += runs_of(inside)
        for run in runs_of(wanted - pages_of(stay)):
            step = self.granule or run.end - run.start
            stay += [Piece(start, start + step) for start in range(run.start, run.end, step)]
        return sorted(stay)


@dataclass
class BlockModel:
    """A block: contents, discarded pages, and mapped pieces with their IOVA.

    `maximum` and `discarded` are in pages. `hurt`: an undo has failed. A device may then reach fewer pages than are
    populated, or some pages of the failed change, which are in `suspect`. The next success heals the block.
    """

    maximum: int
    contents: bytearray
    vaddr: int
    discarded: set[int] = field(default_factory=set)
    pieces: list[Piece] = field(default_factory=list)
    iova: int | None = None
    views: list[memoryview] = field(default_factory=list)
    hurt: bool = False
    suspect: set[int] = field(default_factory=set)

    @property
    def length(self) -> int:
        """The length in pages."""
        return len(self.contents) // PAGE_SIZE

    @property
    def populated(self) -> set[int]:
        """The pages that a device must reach."""
        return set(range(self.length)) - self.discarded

    @property
    def reached(self) -> set[int]:
        """The pages that a device reaches."""
        return pages_of(self.pieces)

    @property
    def seen(self) -> int:
        """The end of the longest live view, in bytes."""
        return max(map(len, self.views), default=0)

    def resize(self, length: int) -> None:
        """Change the length: old pages keep their contents, new pages read zeros."""
        size = length * PAGE_SIZE
        self.contents = self.contents[:size] + bytes(max(0, size - len(self.contents)))
        self.discarded = {page for page in self.discarded if page < length}

    def discard(self, pages: set[int]) -> None:
        """Discard pages, which then read zeros."""
        self.clear(pages - self.discarded)
        self.discarded |= pages

    def clear(self, pages: set[int]) -> None:
        """Zero pages."""
        for page in pages:
            self.contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
