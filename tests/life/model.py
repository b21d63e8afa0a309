"""What must be true of blocks and of what a device reaches of them, said once more and as simply as can be: in sets of
pages. It shares no code with what it judges."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from pyvfio.units import PAGE_SIZE


class Piece(NamedTuple):
    """Pages [start, end) of a block, one mapping of the kernel's."""

    start: int
    end: int

    @property
    def pages(self) -> set[int]:
        """Each."""
        return set(range(self.start, self.end))


def pages_of(pieces: Iterable[Piece]) -> set[int]:
    """All that they cover."""
    return {page for piece in pieces for page in range(piece.start, piece.end)}


def runs_of(pages: Collection[int]) -> list[Piece]:
    """The longest pieces that cover just these pages."""
    starts = sorted(page for page in pages if page - 1 not in pages)
    ends = sorted(page + 1 for page in pages if page + 1 not in pages)
    return [Piece(start, end) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Way:
    """How a mapper is told to follow resizes. `granule` in pages."""

    resize: Literal["remap", "extend"]
    granule: int | None = None
    allow_gap: bool = True

    @property
    def joins(self) -> bool:
        """Whether pieces become one where the container takes no more."""
        return self.resize == "extend" and self.granule is None and self.allow_gap

    def suits(self, length: int, pages: set[int]) -> bool:
        """Whether granules make up the length, and what is populated of it."""
        if self.granule is None:
            return True
        granules = [set(range(start, start + self.granule)) for start in range(0, length, self.granule)]
        return length % self.granule == 0 and all(granule <= pages or not granule & pages for granule in granules)

    def entries(self, maximum: int) -> int:
        """The mappings that a block may ever need and that are kept free for it: none but with a granule."""
        return -(-maximum // self.granule) if self.granule else 0

    def neighbours(self, page: int) -> range:
        """The pages that can be let go of only together with it, but for its piece."""
        step = self.granule or 1
        return range(page // step * step, page // step * step + step)

    def after(self, pieces: Iterable[Piece], wanted: set[int]) -> list[Piece] | None:
        """The pieces of a block once just `wanted` is in reach; None where that makes a gap that is not allowed."""
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
    """A block: what it contains, what is discarded of it, what is mapped of it and where.

    `maximum` and `discarded` are in pages. `hurt`: an undo has failed, so that a device may reach less than is
    populated, or some of what was being changed, which is in `suspect`; it is well after the next change.
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
        """In pages."""
        return len(self.contents) // PAGE_SIZE

    @property
    def populated(self) -> set[int]:
        """What a device is to reach."""
        return set(range(self.length)) - self.discarded

    @property
    def reached(self) -> set[int]:
        """What a device does reach."""
        return pages_of(self.pieces)

    @property
    def seen(self) -> int:
        """How far the longest live view reaches, in bytes."""
        return max(map(len, self.views), default=0)

    def resize(self, length: int) -> None:
        """What stays is as it was, what is new reads zero."""
        size = length * PAGE_SIZE
        self.contents = self.contents[:size] + bytes(max(0, size - len(self.contents)))
        self.discarded = {page for page in self.discarded if page < length}

    def discard(self, pages: set[int]) -> None:
        """They read zero."""
        self.clear(pages - self.discarded)
        self.discarded |= pages

    def clear(self, pages: set[int]) -> None:
        """They read zero."""
        for page in pages:
            self.contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
