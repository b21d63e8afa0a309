"""The mapped pieces of one RAM block, and the calls that change them.

`pyvfio.mapper.policy` chooses the calls. A `Window` makes all of them or none: a change that fails in the middle is
undone piece by piece.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, Protocol

from pyvfio.errors import IoctlError, PinLimitError, RollbackError, as_exception
from pyvfio.extents import Extent, Part, clip, runs, total, without
from pyvfio.guard import checkpoint
from pyvfio.iommu.space import AddressSpace
from pyvfio.mapper.policy import Policy, Step, steps
from pyvfio.mapper.promises import Promises
from pyvfio.memory.locking import restate
from pyvfio.units import Iova, Vaddr, format_size

READ, WRITE = 1, 2
"""The access that a device has to mapped memory."""


class Populated(Protocol):
    """A block, as a window uses it."""

    def populated_in(self, start: int, end: int) -> Sequence[Part]:
        """The parts of [start, end) that devices must reach, ascending and with gaps between them."""
        ...


class Holder(Protocol):
    """A mapping of a part of a block. While the mapping is open, the block must not lose the part."""

    vaddr: Vaddr
    size: int


class Holders:
    """The open mappings of parts of one block.

    Cost: O(log n) and a move of the tail for each call. If `find` finds one, all mappings are searched.
    """

    __slots__ = ("_all", "_ends", "_starts")

    def __init__(self) -> None:
        self._all: set[Holder] = set()
        self._starts: list[int] = []  # of all holders, sorted
        self._ends: list[int] = []  # of all holders, sorted, exclusive

    def add(self, holder: Holder) -> None:
        """Add a holder."""
        self._all.add(holder)
        insort(self._starts, holder.vaddr)
        insort(self._ends, holder.vaddr + holder.size)

    def discard(self, holder: Holder) -> None:
        """Undo `add`. A second call does nothing."""
        if holder in self._all:
            self._all.remove(holder)
            del self._starts[bisect_left(self._starts, holder.vaddr)]
            del self._ends[bisect_left(self._ends, holder.vaddr + holder.size)]

    def find(self, start: int, end: int) -> Holder | None:
        """Return a holder with a byte in the addresses [start, end), which must not be empty; None if there is none."""
        if bisect_left(self._starts, end) == bisect_right(self._ends, start):
            return None  # all holders that begin before `end` have ended at or before `start`
        return next(each for each in self._all if each.vaddr < end and start < each.vaddr + each.size)

    def _check(self) -> None:
        assert self._starts == sorted(each.vaddr for each in self._all)
        assert self._ends == sorted(each.vaddr + each.size for each in self._all)


class Attendant(Protocol):
    """Follows a change that may take long. An exception from a method counts as a refusal: the change is undone."""

    def prepare(self, parts: Sequence[Part]) -> None:
        """Prepare `parts` of the block, which were not mapped, for a map. Nothing has been changed yet."""
        ...

    def report(self, call: Literal["map", "unmap"], done: int, total: int) -> None:
        """Report progress after a call of this kind: `done` of `total` bytes are mapped, or unmapped, now."""
        ...


class Window:
    """The IOVA of one block: `size` bytes from `iova` on, and the pieces of the block that are mapped there.

    The address space records the mapped pieces; the window has no copy. If the space refuses a piece, `make_room`
    decides whether another attempt makes sense. An `attendant` follows changes that take long. `access`: READ and
    WRITE, as allowed for the device. `file`: the descriptor of the block's file and the offset of its first byte, if
    the space maps files.

    A change concerns either the parts that the mapper names (`map`, `unmap`) or the whole block (`change`). `follows`
    decides whether the parts are enough.

    Synchronization: none; the mapper serializes calls. Cost: proportional to the parts that change, and O(log n) for
    each part, where n is the number of mappings in the space.
    """

    __slots__ = (
        "_attendant",
        "_file",
        "_gained",
        "_holders",
        "_idstr",
        "_last",
        "_make_room",
        "_promises",
        "_run",
        "_space",
        "access",
        "in_pieces",
        "iova",
        "policy",
        "reached",
        "settled",
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
        file: tuple[int, int] | None = None,
        attendant: Attendant | None = None,
    ) -> None:
        self._idstr = idstr
        self._space = space
        self.policy = policy
        self._make_room = make_room
        self._attendant = attendant
        self.settled = True
        """Whether the last change succeeded."""
        self.reached = 0
        """The number of mapped bytes. After an undo that failed: the number of bytes found mapped then."""
        self.in_pieces = False
        """Whether adjacent pieces may be mapped separately, so that joining them would free mappings."""
        self._last: Sequence[Part] = ()  # the parts of the last `map` (`_gained`) or `unmap`
        self._gained = False
        self._promises: Promises | None = None
        self._holders: Holders | None = None  # made with the first holder: most blocks have none
        # The space's count of changes, and a run of adjacent pieces that `reaches` found at that count.
        self._run = (-1, 0, 0)
        self.access = access
        self._file = file
        self.vaddr = vaddr
        self.iova = iova
        self.size = size

    @property
    def end(self) -> int:
        """The end of the block's address space, exclusive."""
        return self.vaddr + self.size

    def pieces(self, within: tuple[int, int] | None = None) -> list[Extent]:
        """Return the mapped pieces with a byte in `within` (None: all), ascending. Cost: O(log n + results)."""
        return [Extent(*piece) for piece in self._pieces(within or (0, self.size))]

    def _pieces(self, within: Part) -> list[Part]:
        start, end = within
        if start >= end:
            return []
        base, apart = self.iova, self.vaddr - self.iova
        found = self._space.mappings_in(iova=base + start, size=end - start)
        return [(iova - base, iova - base + size) for iova, size, vaddr in found if vaddr - iova == apart]

    def _pieces_of(self, parts: Sequence[Part]) -> list[Part]:
        """Return the pieces with a byte in one of `parts`, which ascend."""
        if len(parts) == 1:
            return self._pieces(parts[0])
        found: list[Part] = []
        for part in parts:
            more = self._pieces(part)
            found += more[1:] if found and more and more[0] == found[-1] else more
        return found

    # ---------------------------------------------------------------------------------------- promises and holders

    @property
    def promised(self) -> int:
        """The number of further mappings that the block may need if no further part is discarded."""
        return self.policy.entries(self.size) - self.policy.entries(self.reached)

    def enter(self, promises: Promises) -> None:
        """Count the mappings that the block may need in `promises`, until `leave`."""
        promises.total += self.promised
        self._promises = promises

    def leave(self) -> None:
        """Undo `enter`."""
        if self._promises is not None:
            self._promises.total -= self.promised
            self._promises = None

    def _note(self, reached: int) -> None:
        promises, before, granule = self._promises, self.reached, self.policy.granule
        self.reached = reached
        if promises is None:
            return
        if granule is not None:
            promises.total -= (reached - before) // granule
        elif not (before and reached):
            promises.total += self.policy.entries(before) - self.policy.entries(reached)

    def _recount(self) -> None:
        """Count the mapped bytes again."""
        promises = self._promises
        self.leave()
        self.reached = total(self._pieces((0, self.size)))
        if promises is not None:
            self.enter(promises)

    @property
    def is_by_file(self) -> bool:
        """Whether the block is mapped by the descriptor of the file, and not by address."""
        return self._file is not None

    def resume(self, reached: Sequence[Part]) -> None:
        """Record that `reached` is mapped already."""
        self.in_pieces = True
        self._note(total(reached))

    def hold(self, holder: Holder) -> None:
        """Keep the bytes of `holder` mapped until `let_go`. `check_held` must be called before each loss of bytes."""
        if self._holders is None:
            self._holders = Holders()
        self._holders.add(holder)

    def let_go(self, holder: Holder) -> None:
        """Undo `hold`. A second call does nothing."""
        if self._holders is not None:
            self._holders.discard(holder)

    def check_held(self, lost: Sequence[Part]) -> None:
        """Raise BufferError if an open mapping has bytes in one of the parts `lost`."""
        if self._holders is None:
            return
        for start, end in lost:
            holder = self._holders.find(self.vaddr + start, self.vaddr + end)
            if holder is not None:
                raise BufferError(
                    f"{holder!r} of a part of RAM block '{self._idstr}' is open, and the block would lose bytes of "
                    "that part; close that mapping first"
                )

    # ---------------------------------------------------------------------------------------------------- look-ups

    def reaches(self, vaddr: int, size: int) -> bool:
        """Return whether all of [vaddr, vaddr + size) is mapped, in one piece or in adjacent pieces.

        Cost: O(log n) and the number of pieces; less while the space does not change.
        """
        start = vaddr - self.vaddr
        end = start + size
        changes, first, last = self._run
        if first <= start and end <= last and changes == self._space.changes:
            return start < end
        if not 0 <= start < end <= self.size:
            return False
        changes = self._space.changes  # read before the search: a concurrent change then voids the cached run
        for run in runs(self._pieces((start, end))):
            if run.start <= start and end <= run.end:
                self._run = (changes, *run)
                return True
        return False

    def has_seen(self, vaddr: int, size: int) -> bool:
        """Return whether `reaches` found all of [vaddr, vaddr + size), and the space has not changed since.

        For a caller without the lock.
        """
        start = vaddr - self.vaddr
        changes, first, last = self._run
        return first <= start and start + size <= last and changes == self._space.changes

    def seen_from(self, vaddr: int) -> tuple[int, int]:
        """Return the first address and the end of the run that the last `reaches` found. `vaddr` was in that run."""
        _changes, first, end = self._run
        start = vaddr - self.vaddr
        return (self.vaddr + first, self.vaddr + end) if first <= start < end else (vaddr, vaddr)

    def reached_until(self, vaddr: int) -> int:
        """Return the end, exclusive, of the bytes mapped without a gap from `vaddr` on. `vaddr` must be mapped."""
        start = vaddr - self.vaddr
        return self.vaddr + runs(self._pieces((start, self.size)))[0].end

    # ----------------------------------------------------------------------------------------------------- changes

    def follows(self, block: Populated, parts: Sequence[Part], *, gains: bool) -> bool:
        """Return whether a `map` (`gains`) or `unmap` of `parts` makes the window equal to the changed `block`.

        False under "remap" and after a change that failed. False also if the block did not make the change of the last
        `map` or `unmap`, and no undo followed: block and window then differ. In these cases the mapper must call
        `change`.
        """
        if self.policy.resize == "remap" or not self.settled:
            return False
        last, gained = self._last, self._gained
        if not last or (gained is not gains and last == parts):  # the second case undoes the last change
            return True
        return all(block.populated_in(*part) == ([part] if gained else []) for part in last)

    def has_just_lost(self, parts: Sequence[Part]) -> bool:
        """Return whether the last change was an `unmap` of exactly these parts, and succeeded."""
        return self.settled and not self._gained and self._last == parts

    def map(self, parts: Sequence[Part]) -> None:
        """Map `parts`, none of which is mapped. Raises as `change`."""
        policy = self.policy
        start, end = parts[0] if len(parts) == 1 else (0, 0)
        size = end - start
        if size and (policy.granule is None or policy.granule == size) and self._attendant is None:
            try:  # the path of most resizes, without a plan
                self._map_piece(start, end)
            except BaseException as error:
                self._undo([("map", (start, end))], (), parts, error)
                raise
        else:
            size = total(parts)
            self._carry_out([step for part in parts for step in policy.maps(*part)], (), parts, parts)
        self.in_pieces = self.in_pieces or self.reached > 0
        self._note(self.reached + size)
        self.settled, self._last, self._gained = True, parts, True

    def unmap(self, parts: Sequence[Part]) -> None:
        """Unmap the mapped bytes of `parts`, which ascend. Raises as `change`."""
        before = self._pieces_of(parts)
        found = parts if before == parts else runs(before)
        if found == parts:  # only whole pieces
            plan: Sequence[Step] = [("unmap", part) for part in parts]
            lost = total(parts)
        elif self.policy.resize == "cut" and len(parts) == len(found) == 1 and without(parts, *found) == []:
            cut: Step = ("cut", parts[0])  # one call, also where the part lies in several pieces
            plan, lost = [cut], total(parts)
        else:
            kept = without(before, *parts)
            plan, lost = steps(before, kept, self.policy), total(before) - total(kept)
        self._carry_out(plan, before, parts, ())
        self._note(self.reached - lost)
        self.settled, self._last, self._gained = True, parts, False

    def change(self, wanted: Sequence[Part], *, join: bool = False) -> None:
        """Map exactly `wanted`, whose extents have gaps between them; with `join`, in as few pieces as possible.

        Raises GapError before any call. If a call fails, or a signal handler raises at a checkpoint, the error is
        raised, and the pieces are as before. If the undo fails too, RollbackError is raised. Cost: reads all pieces of
        the block.
        """
        whole, wanted = [(0, self.size)], clip(wanted, 0, self.size)
        before = self._pieces_of(whole)
        plan = steps(before, wanted, Policy() if join else self.policy)
        self._carry_out(plan, before, whole, without(wanted, *before) if self._attendant is not None else ())
        self.in_pieces = bool(before) and not join
        self._note(total(wanted))
        self.settled, self._last = True, ()

    def _carry_out(
        self, plan: Sequence[Step], before: Sequence[Part], parts: Sequence[Part], new: Sequence[Part]
    ) -> None:
        """Make all calls of `plan`, or none.

        `before`: the pieces with a byte in `parts`, which contain the whole plan. `new`: the bytes of `parts` that were
        not mapped.
        """
        try:
            if self._attendant is not None:
                self._attend(self._attendant, plan, new)
            elif len(plan) == 1:
                self._make(plan[0])
            else:
                for step in plan:
                    checkpoint()
                    self._make(step)
        except BaseException as error:
            self._undo(plan, before, parts, error)
            raise

    def _undo(self, plan: Sequence[Step], before: Sequence[Part], parts: Sequence[Part], error: BaseException) -> None:
        """Undo a part of `plan`, after `error`. Raises another error if that one describes the change better."""
        self.settled = False
        concerned = runs(sorted([*before, *without(parts, *before)]))
        whole = self._whole_limit(error, plan, before, concerned)
        self._restore(before, concerned, whole or error)
        if whole is not None:
            raise whole from error

    def _attend(self, attendant: Attendant, plan: Sequence[Step], new: Sequence[Part]) -> None:
        if new:
            attendant.prepare(new)
        totals, made = Counter[str](), Counter[str]()
        for call, (start, end) in plan:
            totals["map" if call == "map" else "unmap"] += end - start
        for step in plan:
            checkpoint()
            self._make(step)
            call, (start, end) = step
            kind: Literal["map", "unmap"] = "map" if call == "map" else "unmap"
            made[kind] += end - start
            attendant.report(kind, made[kind], totals[kind])

    def _make(self, step: Step) -> None:
        call, (start, end) = step
        if call == "map":
            self._map_piece(start, end)
            return
        space = self._space
        lock = space.guard.lock
        lock.acquire()  # `with` costs twice as much
        try:
            if call == "cut":
                space.cut_locked(self.iova + start, end - start)
            else:
                space.unmap_locked(self.iova + start, end - start)
        finally:
            lock.release()

    def _map_piece(self, start: int, end: int) -> None:
        space = self._space
        lock = space.guard.lock
        lock.acquire()
        try:
            if self._file is None:  # not `_map`: one call less for most blocks
                space.map_locked(self.vaddr + start, self.iova + start, end - start, self.access)
            else:
                self._map(start, end - start)
        except IoctlError as error:
            if not self._make_room(error):
                raise
            self._map(start, end - start)
        finally:
            lock.release()

    def _map(self, start: int, size: int) -> None:
        vaddr, iova = self.vaddr + start, self.iova + start
        if self._file is None:
            self._space.map_locked(vaddr, iova, size, self.access)
        else:
            fd, offset = self._file
            self._space.map_file_locked((fd, offset + start), vaddr, iova, size, self.access)

    def _whole_limit(
        self, error: BaseException, plan: Sequence[Step], before: Sequence[Part], concerned: Sequence[Part]
    ) -> PinLimitError | None:
        """Return the error for all bytes of a change, if `error` is for one piece. Nothing is undone yet."""
        maps = [part for call, part in plan if call == "map"]
        if not isinstance(error, PinLimitError) or error.limit is None or len(maps) < 2:
            return None
        known, now = set(before), self._pieces_of(concerned)
        made, unmaps = total([piece for piece in now if piece not in known]), [p for call, p in plan if call == "unmap"]
        leaving = total(unmaps) - (total(before) - (total(now) - made))
        size, locked, first = total(maps), made + leaving, maps[0][0]
        if error.used - locked + size <= error.limit:
            return None  # the limit suffices for the change as a whole: a later unmap would have made room
        arguments = {"vaddr": self.vaddr + first, "iova": self.iova + first, "size": size}
        with suppress(OSError):  # /proc cannot be read if no file descriptor is left; the undo must run nevertheless
            return restate(error, kernel=self._space.kernel, size=size, locked=locked, arguments=arguments)
        return None

    def _restore(self, before: Sequence[Part], concerned: Sequence[Part], cause: BaseException) -> None:
        """Restore the pieces of `before`, one by one. All new pieces are unmapped before an old piece is mapped.

        Cost: linear in the pieces that exist now or existed before.
        """
        now = self._pieces_of(concerned)
        undo: Literal["unmap", "cut"] = "unmap"
        new: list[Part]
        lost: list[Part]
        if self.policy.resize == "cut":  # the bytes in reach matter, and not the pieces: a remap would be a gap
            undo, new, lost = "cut", list(without(now, *before)), list(without(before, *now))
            self.in_pieces = True
        else:
            known, there = set(before), set(now)
            new = [piece for piece in now if piece not in known]
            lost = [piece for piece in before if piece not in there]
        try:
            for run in runs(new):
                self._make((undo, run))
            for piece in lost:
                self._make(("map", piece))
        except Exception as error:
            self._recount()
            self.in_pieces = True  # nobody knows in which pieces the block is left
            raise RollbackError(
                f"a change of the mappings of RAM block '{self._idstr}' failed, and the undo failed too: "
                f"{format_size(total(lost))} may not be mapped any more, {format_size(total(new))} may still be mapped",
                [as_exception(cause), error],
                hint="The memory of the block is kept. Resize the block to another length, or remove the block",
            ) from cause

    def _check(self) -> None:
        pieces = self._pieces((0, self.size))
        assert self.reached == total(pieces), (self.reached, pieces)
        assert self.in_pieces or self.policy.granule or len(pieces) == len(runs(pieces))
        granule = self.policy.granule
        assert granule is None or all(end - start == granule for start, end in pieces)
        if self._holders is not None:
            self._holders._check()
