"""The pieces of one RAM block that are mapped, and the calls that change them.

`pyvfio.mapper.policy` chooses the calls. A `Window` makes all of them, or none: a change that fails in the middle is
undone piece by piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import Literal, Protocol

from pyvfio.errors import IoctlError, PinLimitError, RollbackError, as_exception
from pyvfio.extents import Extent, Part, clip, runs, total, without
from pyvfio.guard import checkpoint
from pyvfio.iommu.space import AddressSpace, Mapping
from pyvfio.mapper.policy import Policy, Step, steps
from pyvfio.memory.locking import restate
from pyvfio.units import Iova, Vaddr, format_size

READ, WRITE = 1, 2
"""What a device may do with memory that is mapped for it."""


def _difference(one: Sequence[Part], other: Sequence[Part]) -> Extent:
    """Where two sets of bytes differ, from the first byte to the last. Neither has neighbours, so that each end of an
    extent is an edge of the set; an edge of both is none of the difference."""
    edges = set(chain.from_iterable(one)) ^ set(chain.from_iterable(other))
    return Extent(min(edges), max(edges)) if edges else Extent(0, 0)


def _growth(reached: Sequence[Part], wanted: Sequence[Part]) -> Part | None:
    """What one run of bytes grows by at its end, if nothing else changes."""
    if len(reached) != 1 or len(wanted) != 1:
        return None
    (first, last), (start, end) = reached[0], wanted[0]
    return (last, end) if first == start and last < end else None


class Holder(Protocol):
    """A mapping of a part of a block, which the block must not lose while the mapping is open."""

    vaddr: Vaddr
    size: int


class Attendant(Protocol):
    """Looks after a change that may take long. What it raises is taken for a refusal, and the change undone."""

    def prepare(self, parts: Sequence[Part]) -> None:
        """`parts` of the block are about to be mapped, which were not; nothing has happened yet."""
        ...

    def report(self, call: Literal["map", "unmap"], done: int, total: int) -> None:
        """Such a call has been made: `done` of `total` bytes are mapped, or unmapped, now."""
        ...


class Window:
    """The IOVA of one block: `size` bytes from `iova` on, and the pieces of the block that are mapped there.

    The space knows which pieces are mapped; nothing here repeats that. `make_room` is asked when the space refuses a
    piece, and says whether another try makes sense. An `attendant` follows changes that take long. `access`: READ and
    WRITE, as far as the device may.

    Synchronization: none; its mapper serializes calls.
    """

    __slots__ = (
        "_attendant",
        "_idstr",
        "_make_room",
        "_reached",
        "_space",
        "access",
        "holders",
        "iova",
        "policy",
        "size",
        "vaddr",
    )

    def __init__(
        self,
        space: AddressSpace,
        policy: Policy,
        *,
        idstr: str,
        vaddr: Vaddr,
        iova: Iova,
        size: int,
        make_room: Callable[[IoctlError], bool],
        access: int = READ | WRITE,
        attendant: Attendant | None = None,
    ) -> None:
        self._idstr = idstr
        self._space = space
        self.policy = policy
        self._make_room = make_room
        self._attendant = attendant
        # What the last change has reached; None after one that failed, whose undo may have failed as well.
        self._reached: Sequence[Part] | None = []
        self.holders: set[Holder] = set()
        self.access = access
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

    def resume(self, reached: Sequence[Part]) -> None:
        """Note that `reached`, without neighbours, is mapped already."""
        self._reached = list(reached)

    @property
    def settled(self) -> bool:
        """Whether the last change succeeded."""
        return self._reached is not None

    def hold(self, holder: Holder) -> None:
        """Keep the bytes of `holder` mapped until `let_go`, as far as `check_held` is asked before each loss."""
        self.holders.add(holder)

    def let_go(self, holder: Holder) -> None:
        """Undo `hold`. Twice is fine."""
        self.holders.discard(holder)

    def check_held(self, kept: Sequence[Part]) -> None:
        """Raise BufferError where an open mapping has bytes outside `kept`, which has no neighbours."""
        for holder in self.holders:
            start = holder.vaddr - self.vaddr
            if not any(first <= start and start + holder.size <= last for first, last in kept):
                raise BufferError(
                    f"{holder!r} of a part of RAM block '{self._idstr}' is open, and the block would lose bytes of it; "
                    "close that mapping first"
                )

    def reaches(self, vaddr: int, size: int) -> bool:
        """Whether all of [vaddr, vaddr + size) is mapped, in one piece or in neighbours."""
        start, end = vaddr - self.vaddr, vaddr - self.vaddr + size
        if not 0 <= start < end <= self.size:
            return False
        return any(run.start <= start and end <= run.end for run in runs(self.pieces(Extent(start, end))))

    def reached_until(self, vaddr: int) -> int:
        """Return the end, exclusive, of the bytes that are mapped without a gap from `vaddr` on, which is one."""
        start = vaddr - self.vaddr
        return self.vaddr + runs(self.pieces(Extent(start, self.size)))[0].end

    def change(self, wanted: Sequence[Part], *, join: bool = False) -> None:
        """Map exactly `wanted`, which has no neighbours and belongs to the window from now on; with `join` in as few
        pieces as possible.

        Looks at the difference alone where the last change succeeded, else at the whole block. Raises GapError before
        any call, and the error of a call or of a signal handler at a checkpoint; the pieces are then as before.
        RollbackError where the undo fails, too.
        """
        reached, policy = self._reached, Policy() if join else self.policy
        before: Sequence[Part] = ()
        if policy.resize == "extend" and reached is not None and (grown := _growth(reached, wanted)):
            plan, region = policy.maps(*grown), grown  # nothing is there, and nothing goes
        else:
            region, before, plan = self._plan(policy, wanted)
        self._reached = None
        try:
            if self._attendant is not None:
                self._attend(self._attendant, plan, without(clip(wanted, *region), *before))
            elif len(plan) == 1:
                self._make(plan[0])
            else:
                for step in plan:
                    checkpoint()
                    self._make(step)
        except BaseException as error:
            whole = self._whole_limit(error, plan, before, region)
            self._restore(before, region, whole or error)
            if whole is not None:
                raise whole from error
            raise
        self._reached = wanted

    def _plan(self, policy: Policy, wanted: Sequence[Part]) -> tuple[Extent, list[Extent], list[Step]]:
        """Where something changes, the pieces that are there, and the steps."""
        if policy.resize == "remap" or self._reached is None:
            region = Extent(0, self.size)
        else:
            region = _difference(self._reached, wanted)
        before = self.pieces(region)
        if before:
            region = Extent(min(region.start, before[0].start), max(region.end, before[-1].end))
        return region, before, steps(before, clip(wanted, *region), policy)

    def _attend(self, attendant: Attendant, plan: Sequence[Step], new: Sequence[Part]) -> None:
        if new:
            attendant.prepare(new)
        totals, made = Counter[str](), Counter[str]()
        for call, (start, end) in plan:
            totals[call] += end - start
        for step in plan:
            checkpoint()
            self._make(step)
            call, (start, end) = step
            made[call] += end - start
            attendant.report(call, made[call], totals[call])

    def _make(self, step: Step) -> None:
        call, (start, end) = step
        if call == "unmap":
            self._space.unmap(iova=self.iova + start, size=end - start)
            return
        vaddr, iova, size, write = self.vaddr + start, self.iova + start, end - start, self.access & WRITE != 0
        try:
            self._space.map(vaddr=vaddr, iova=iova, size=size, write=write)
        except IoctlError as error:
            if not self._make_room(error):
                raise
            self._space.map(vaddr=vaddr, iova=iova, size=size, write=write)

    def _whole_limit(
        self, error: BaseException, plan: Sequence[Step], before: Sequence[Part], region: Part
    ) -> PinLimitError | None:
        """The error for all that a change was to pin, where `error` is the one for a piece. Nothing is undone yet."""
        maps = [part for call, part in plan if call == "map"]
        if not isinstance(error, PinLimitError) or error.limit is None or len(maps) < 2:
            return None
        known, now = set(before), self.pieces(region)
        made, unmaps = total([piece for piece in now if piece not in known]), [p for call, p in plan if call == "unmap"]
        leaving = total(unmaps) - (total(before) - (total(now) - made))
        size, locked, first = total(maps), made + leaving, maps[0][0]
        if error.used - locked + size <= error.limit:
            return None  # it was the piece that was too much: another one was to be unmapped after it
        arguments = {"vaddr": self.vaddr + first, "iova": self.iova + first, "size": size}
        with suppress(OSError):  # no descriptor is left to read /proc with, and the undo has to follow
            return restate(error, kernel=self._space.kernel, size=size, locked=locked, arguments=arguments)
        return None

    def _restore(self, before: Sequence[Part], region: tuple[int, int], cause: BaseException) -> None:
        """Have the pieces of `before` again, one by one. All new ones are unmapped before an old one is mapped."""
        now = self.pieces(region)
        known, there = set(before), set(now)
        new, lost = [piece for piece in now if piece not in known], [piece for piece in before if piece not in there]
        try:
            for run in runs(new):
                self._make(("unmap", run))
            for piece in lost:
                self._make(("map", piece))
        except Exception as error:
            raise RollbackError(
                f"a change of what is mapped of RAM block '{self._idstr}' failed, and so did its undo: "
                f"{format_size(total(lost))} may not be mapped any more, {format_size(total(new))} may still be",
                [as_exception(cause), error],
                hint="Its memory is kept. Resize it to another length, or remove it",
            ) from cause
