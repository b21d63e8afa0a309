"""The pieces of one RAM block that are mapped, and the fewest calls that turn them into what is wanted.

A *piece* is one kernel mapping of a block. The kernel unmaps whole mappings only (VFIO_TYPE1v2_IOMMU refuses to cut
one, EINVAL), so that how a block was mapped decides what a later resize can keep:

* remap, in one piece: any resize unmaps it all and maps it anew. All of it is out of reach meanwhile.
* extend: a grow maps the difference, as a piece. A shrink unmaps whole pieces; the one that straddles the new end is
  unmapped, and its head mapped. All that stays is in reach throughout, but for that head.
* extend with a granule: a grow maps the difference, a piece for each granule, and a shrink unmaps granules. All that
  stays is in reach throughout.

`steps` is the whole of that choice, and pure. A `Window` carries it out, or nothing of it: what fails in the middle is
taken back piece by piece.

Source: `vfio_dma_do_map`, `vfio_dma_do_unmap` in drivers/vfio/vfio_iommu_type1.c; granules are what QEMU's
RamDiscardManager listener maps, so that each can go alone (hw/vfio/common.c).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol, TypeAlias

from pyvfio.errors import GapError, RollbackError, as_exception
from pyvfio.extents import Extent, clip, runs, total, without
from pyvfio.space import AddressSpace, Mapping
from pyvfio.units import Iova, Vaddr, align_down, align_up, format_size, is_power_of_two

Step: TypeAlias = tuple[Literal["map", "unmap"], tuple[int, int]]
"""One call: a piece that is mapped, or a run of whole pieces that is unmapped; an Extent, or as plain a pair."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a block is mapped; see this module. `granule` in bytes, with "extend" only. `allow_gap`: whether bytes that
    survive a resize may be out of the device's reach for a moment. ValueError for what does not go together."""

    resize: Literal["remap", "extend"] = "remap"
    granule: int | None = None
    allow_gap: bool = True

    def __post_init__(self) -> None:
        if self.resize not in ("remap", "extend"):
            raise ValueError(f"resize must be 'remap' or 'extend', not {self.resize!r}")
        if self.resize == "remap" and self.granule is not None:
            raise ValueError("a granule goes with resize='extend': a remap maps a block in one piece")
        if self.resize == "remap" and not self.allow_gap:
            raise ValueError("resize='remap' unmaps a block each time; allow_gap=False goes with resize='extend'")
        if self.granule is not None and not is_power_of_two(self.granule):
            raise ValueError(f"a granule must be a power of two, not {self.granule!r}")

    def check_length(self, length: int, what: str) -> None:
        """ValueError when granules do not make up `length`."""
        if self.granule is not None and length & (self.granule - 1):
            raise ValueError(f"{what} must be a multiple of the granule {self.granule:#x}, not {length:#x}")

    def round_out(self, parts: Sequence[Extent]) -> list[Extent]:
        """The whole granules that `parts`, which ascend, have a byte of. GapError: more than that, and not allowed."""
        granule = self.granule
        if granule is None:
            return list(parts)
        rounded: list[Extent] = []
        for start, end in parts:
            first = max(align_down(start, granule), rounded[-1].end if rounded else 0)
            if first < end:
                rounded.append(Extent(first, align_up(end, granule)))
        rounded = runs(rounded)
        if not self.allow_gap and rounded != runs(parts):
            raise GapError(
                f"{format_size(total(rounded) - total(parts))} that stay would be out of the device's reach for a "
                f"moment: they are in one granule of {granule:#x} bytes with pages that are to be replaced",
                hint="Remap whole granules, whose contents are lost then, or let allow_gap be True",
            )
        return rounded

    def maps(self, start: int, end: int) -> list[Step]:
        """The calls that map [start, end), a piece each."""
        if self.granule is None or end - start == self.granule:
            return [("map", (start, end))]
        return [("map", (piece, piece + self.granule)) for piece in range(start, end, self.granule)]

    def entries(self, length: int) -> int:
        """How many mappings a block may need that is at most `length` long and never discarded in part: one, where
        pieces can be joined."""
        return -(-length // self.granule) if self.granule else min(length, 1)


def steps(mapped: Sequence[Extent], wanted: Sequence[Extent], policy: Policy) -> list[Step]:
    """The calls that make `mapped`, the pieces there are, cover exactly `wanted`; both ascend and are disjoint.

    Raises GapError when bytes of both would be unmapped and `policy` allows no gap.
    """
    if policy.resize == "remap":
        kept = list(mapped) == list(wanted)
        return [] if kept else [*(("unmap", run) for run in runs(mapped)), *(("map", extent) for extent in wanted)]
    calls: list[Step] = []
    new, gone = list(wanted), []
    for piece in mapped:
        inside = clip(wanted, *piece)
        new = without(new, piece)
        if inside == [piece]:
            continue
        if not inside:
            gone.append(piece)
            continue
        if not policy.allow_gap:
            raise _gap(piece, inside)
        # Each head again at once, so that it is out of reach for no longer than its own map takes.
        calls += [("unmap", piece), *(("map", extent) for extent in inside)]
    calls += [("unmap", run) for run in runs(gone)]
    for extent in new:
        calls += policy.maps(*extent)
    return calls


def _difference(one: Sequence[Extent], other: Sequence[Extent]) -> Extent:
    """Where two sets of bytes differ, from the first byte to the last. Neither has neighbours, so that each end of an
    extent is an edge of the set; an edge of both is none of the difference."""
    edges = set(chain.from_iterable(one)) ^ set(chain.from_iterable(other))
    return Extent(min(edges), max(edges)) if edges else Extent(0, 0)


def _growth(reached: Sequence[Extent], wanted: Sequence[Extent]) -> tuple[int, int] | None:
    """What a block of which nothing is discarded grows by."""
    if len(wanted) != 1 or len(reached) != 1:
        return None
    before, after = reached[0], wanted[0]
    if before.start != after.start or before.end >= after.end:
        return None
    return before.end, after.end


def _gap(piece: Extent, inside: Sequence[Extent]) -> GapError:
    return GapError(
        f"{format_size(total(inside))} that stay would be out of the device's reach for a moment: they are mapped in "
        f"one piece, bytes {piece.start:#x}-{piece.end - 1:#x} of the block, with what is to go",
        hint="Shrink to where a piece begins, map with granule=, or let allow_gap be True and quiesce the device",
    )


class _Map(Protocol):
    def __call__(self, *, vaddr: int, iova: int, size: int) -> None: ...


class Attendant(Protocol):
    """Looks after a change that may take long. What it raises is taken for a refusal, and the change undone."""

    def prepare(self, parts: Sequence[Extent]) -> None:
        """`parts` of the block are about to be mapped, which were not; nothing has happened yet."""
        ...

    def report(self, call: Literal["map", "unmap"], done: int, total: int) -> None:
        """Such a call has been made: `done` of `total` bytes are mapped, or unmapped, now."""
        ...


class Window:
    """The IOVA of one block, `size` bytes from `iova` on, and what of the block is mapped there.

    What is mapped is the space's word alone: a signal handler can raise between the space's change and any note here.
    `map_piece` makes one mapping, `space` takes mappings away, `attendant` is there when either takes long.
    Synchronization: none; its mapper serializes calls.
    """

    __slots__ = ("_attendant", "_idstr", "_map_piece", "_policy", "_reached", "_space", "iova", "size", "vaddr")

    def __init__(
        self,
        space: AddressSpace,
        policy: Policy,
        *,
        idstr: str,
        vaddr: Vaddr,
        iova: Iova,
        size: int,
        map_piece: _Map,
        attendant: Attendant | None = None,
    ) -> None:
        self._idstr = idstr
        self._space = space
        self._policy = policy
        self._map_piece = map_piece
        self._attendant = attendant
        # What the last change was to reach; None while one is made, and after one of which not even the undo succeeded.
        self._reached: Sequence[Extent] | None = []
        self.vaddr = vaddr
        self.iova = iova
        self.size = size

    @property
    def end(self) -> int:
        """Where the block's address space ends, exclusive."""
        return self.vaddr + self.size

    def pieces(self, within: tuple[int, int] | None = None) -> list[Extent]:
        """What is mapped, ascending: pieces that have a byte in `within` (None: all). O(log n) and their number."""
        start, end = within or (0, self.size)
        if start >= end:
            return []
        found = self._space.mappings_in(iova=self.iova + start, size=end - start)
        return [self._extent(mapping) for mapping in found if self._is_ours(mapping)]

    def _is_ours(self, mapping: Mapping) -> bool:
        return mapping.vaddr - mapping.iova == self.vaddr - self.iova

    def _extent(self, mapping: Mapping) -> Extent:
        return Extent(mapping.iova - self.iova, mapping.iova + mapping.size - self.iova)

    def resume(self, reached: Sequence[Extent]) -> None:
        """`reached`, without neighbours, is mapped already."""
        self._reached = list(reached)

    @property
    def settled(self) -> bool:
        """Whether the last change, or its undo, came to its end."""
        return self._reached is not None

    def reaches(self, vaddr: int, size: int) -> bool:
        """Whether all of [vaddr, vaddr + size) is mapped, in one piece or in neighbours."""
        start, end = vaddr - self.vaddr, vaddr - self.vaddr + size
        if not 0 <= start < end <= self.size:
            return False
        return any(run.start <= start and end <= run.end for run in runs(self.pieces(Extent(start, end))))

    def change(self, wanted: Sequence[Extent], *, join: bool = False) -> None:
        """Let exactly `wanted`, which has no neighbours and is the window's from now on, be mapped, in as few pieces as
        can be with `join`.

        Where the last change came to its end, only the difference is looked at, else the whole block. Raises GapError
        before any call, and what a call raises; then the pieces are as they were. RollbackError when not even that
        could be reached.
        """
        region, before, plan = self._plan(wanted, join=join)
        self._reached = None
        try:
            if self._attendant is not None:
                self._attend(self._attendant, plan, without(clip(wanted, *region), *before))
            else:
                for step in plan:
                    self._make(step)
        except BaseException as error:
            self._restore(before, region, error)
            raise
        # Last, so that after an interruption before it the next change looks at the whole block.
        self._reached = wanted

    def _plan(self, wanted: Sequence[Extent], *, join: bool) -> tuple[tuple[int, int], list[Extent], list[Step]]:
        """Where something changes, the pieces that are there, and the steps."""
        policy = Policy() if join else self._policy
        if policy.resize == "remap" or self._reached is None:
            region = Extent(0, self.size)
        elif grown := _growth(self._reached, wanted):  # what happens most: nothing is there, and nothing goes
            return grown, [], policy.maps(grown[0], grown[1])
        else:
            region = _difference(self._reached, wanted)
        before = self.pieces(region)
        if before:
            region = Extent(min(region.start, before[0].start), max(region.end, before[-1].end))
        return region, before, steps(before, clip(wanted, *region), policy)

    def _attend(self, attendant: Attendant, plan: Sequence[Step], new: Sequence[Extent]) -> None:
        if new:
            attendant.prepare(new)
        totals, made = Counter[str](), Counter[str]()
        for call, (start, end) in plan:
            totals[call] += end - start
        for step in plan:
            self._make(step)
            call, (start, end) = step
            made[call] += end - start
            attendant.report(call, made[call], totals[call])

    def withdraw(self, cause: BaseException) -> None:
        """Let nothing be mapped, since `cause` keeps the block from coming. RollbackError."""
        self._restore([], Extent(0, self.size), cause)

    def _make(self, step: Step) -> None:
        call, (start, end) = step
        if call == "unmap":
            self._space.unmap(iova=self.iova + start, size=end - start)
        else:
            self._map_piece(vaddr=self.vaddr + start, iova=self.iova + start, size=end - start)

    def _restore(self, before: Sequence[Extent], region: tuple[int, int], cause: BaseException) -> None:
        """Piece by piece what there was; every new one is taken away before an old one comes back."""
        now = self.pieces(region)
        new, lost = [piece for piece in now if piece not in before], [piece for piece in before if piece not in now]
        try:
            for run in runs(new):
                self._make(("unmap", run))
            for piece in lost:
                self._make(("map", piece))
        except BaseException as error:  # a second KeyboardInterrupt, too: nobody may take the memory back now
            raise RollbackError(
                f"a change of what is mapped of RAM block '{self._idstr}' failed, and so did its undo: "
                f"{format_size(total(lost))} may not be mapped any more, {format_size(total(new))} may still be",
                [as_exception(cause), as_exception(error)],
                hint="Its memory is kept. Resize it to another length, or remove it",
            ) from cause
