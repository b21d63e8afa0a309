"""A random life of blocks, listeners, a mapper and a device, compared with a model, on a fake or on a real kernel.

A program could make every step. The model decides whether a step must succeed, must be refused or may be refused, and
predicts the state afterwards. After each step that state is checked, and the device itself is tried. `live` runs lives.
"""

from __future__ import annotations

import mmap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import ClassVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import pyvfio
from pyvfio import ioctls
from pyvfio.iommu.space import Mapping
from pyvfio.testing.edu import Edu
from pyvfio.testing.fake import FakeKernel
from pyvfio.testing.probe import DmaProbe, pattern
from pyvfio.testing.world import World
from pyvfio.units import PAGE_SIZE, Iova, Vaddr
from tests.life.listeners import CarefulListener, Listener, RefusalError
from tests.life.model import BlockModel, Piece, Way, runs_of
from tests.life.troubles import (
    CUTS,
    CallbackRefusal,
    Failing,
    FailingCalls,
    LittleMemory,
    MemoryLimit,
    Plan,
    Refusal,
    RefusingCallback,
    RefusingListener,
    Trouble,
    plans,
    refusals,
)
from tests.spaces import REQUESTS, Cut, can_replace, new_space

NAMES = ("a", "b", "c")
MAX_PAGES = 8
MAX_LISTENERS, MAX_BUFFERS = 3, 4
FEW_ENTRIES = 12
SIZE = 512  # bytes of one DMA transfer
STEPS = 50
"""The steps of one life."""

SHIFTS = (0, PAGE_SIZE // 4, PAGE_SIZE - SIZE, PAGE_SIZE - SIZE // 2)
CUT: tuple[Cut, ...] = (None, "pages", "replace")
WAYS = (
    Way("remap"),
    Way("extend"),
    Way("extend", allow_gap=False),
    Way("extend", 1),
    Way("extend", 2),
    Way("extend", 2, allow_gap=False),
    Way("cut"),
    Way("cut"),
)
REFUSED = (
    *(RefusalError, ValueError, BufferError, pyvfio.IoctlError, pyvfio.PinLimitError, pyvfio.EntryLimitError),
    *(pyvfio.GapError, pyvfio.DiscardError, pyvfio.UnsupportedError, pyvfio.RollbackError),
)
"""The exceptions with which a change can be refused."""

which = st.integers(0, 11)
SELDOM = 11  # one of these numbers, for rare choices
page = st.integers(0, MAX_PAGES - 1)
pages = st.integers(0, MAX_PAGES)


class Tally(Counter[str]):
    """The number of times that each step had each result; `steps` in all, and `lives` begun."""

    steps = 0
    lives = 0

    def ends(self) -> set[str]:
        """The results of all steps: success, or the names of refusals."""
        return {end.partition(": ")[2] for end in self}

    def both_ways(self) -> bool:
        """Whether the device has reached memory at least once, and was stopped at least once."""
        return self["dma: arrived"] > 0 and self["dma: stopped"] > 0

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.items()))
        return f"{self.steps} steps in {self.lives} lives: {ends}"


@dataclass
class Own:
    """A mapped buffer of the program. `temporary`: made by `map_temporary`; `given_up`: closed."""

    mapping: pyvfio.DmaMapping
    buffer: mmap.mmap
    temporary: bool
    given_up: bool = False

    def entry(self) -> Mapping:
        """The mapping in the address space."""
        return Mapping(self.mapping.iova, self.mapping.size, self.mapping.vaddr)


class RandomLife(RuleBasedStateMachine):
    """Three names for blocks of at most eight pages, mappers with changing policies, listeners, and own buffers."""

    worlds: ClassVar[Sequence[Callable[[], AbstractContextManager[World]]]]
    tally: ClassVar[Tally]
    transfers: ClassVar[int]
    """The number of transfers that the device tries in a life."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.model: dict[str, BlockModel] = {}
        self.listeners: list[Listener] = []  # the newest first
        self.journal: list[Listener] = []
        self.mapper: pyvfio.DmaMapper | None = None
        self.way = WAYS[0]
        self.own: list[Own] = []
        self.leaked: set[Mapping] = set()  # left by a failed undo; the mapper unmaps them on close
        self.orphans: set[Mapping] = set()  # left by a mapper that could not be made; unmapped with the space
        self.former: list[Iova] = []  # IOVAs that were mapped earlier
        self.met = Trouble()
        self.called: list[tuple[str, int]] = []
        self.questions = self.transfers
        self.changed = False
        self.unsure = False  # the last change met trouble: the same bytes may be mapped in other pieces
        self.spilled = False  # in addition, mappings may exist that nobody knows of
        self.kept = False  # memory may be kept in this life
        self.in_order = False
        self.tally.lives += 1

    @initialize(number=which, way=st.sampled_from(WAYS), few=st.booleans(), cut=st.sampled_from(CUT), used=pages)
    def begin(self, *, number: int, way: Way, few: bool, cut: Cut, used: int) -> None:
        """Make a device in a space of the world's kind, a page for the device's buffer, and a block.

        A container takes `few` mappings or many, and an I/O address space can `cut` mappings or not.
        """
        self.world = self.stack.enter_context(self.worlds[number % len(self.worlds)]())
        self.fake = self.world.kernel if isinstance(self.world.kernel, FakeKernel) else None
        kernel = self.world.kernel
        self.locked = self.world.locked_bytes()
        self.stack.callback(self._check_nothing_left)
        desk = self.stack.enter_context(pyvfio.RamBlockList(kernel=kernel)).add(
            "desk", used_length=PAGE_SIZE, max_length=PAGE_SIZE
        )
        with self.world.dma_entry_limit(FEW_ENTRIES) if few else nullcontext():
            device = self._open_device(cut)
            if cut == "replace" and self.space.can_cut and not can_replace(self.space):  # the life goes on otherwise
                device.close()
                self.space.close()
                device = self._open_device("pages")
        self.entries = FEW_ENTRIES if few and self.space.entries_left is not None else None
        device.memory_enabled = device.bus_master = True
        iova = self.space.reserve_iova(PAGE_SIZE, alignment=1, offset=0, top_down=True)
        self.space.map(vaddr=desk.vaddr, iova=iova, size=PAGE_SIZE)
        self.desk = Mapping(iova, PAGE_SIZE, desk.vaddr)
        self.probe = DmaProbe(Edu(device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX)), desk=desk, iova=iova)
        self.blocks = self.stack.enter_context(pyvfio.RamBlockList(kernel=kernel))
        self._open_mapper(way if self._allows(way) else WAYS[0], None)
        self.add(number=1, used=used, more=MAX_PAGES, plan=None)

    def _open_device(self, cut: Cut) -> pyvfio.Device:
        space = new_space(self.world.kernel, cut)
        self.space = space
        self.stack.enter_context(space)
        return self.stack.enter_context(pyvfio.open_device(self.world.bdfs[0], space=space))

    def teardown(self) -> None:
        """Close everything; after a failure in silence, so that the first failure is reported."""
        with nullcontext() if self.in_order else suppress(Exception), self.stack:
            for model in self.model.values():
                model.views.clear()
            if self.mapper is not None:
                self.mapper.close()

    def _check_nothing_left(self) -> None:
        assert self.fake is None or self.fake.descriptors == ()
        assert self.world.locked_bytes() == self.locked

    # ------------------------------------------------------------------------------------------------ how a change is

    def _pick(
        self, number: int, fit: Callable[[BlockModel], object] = lambda _model: True
    ) -> tuple[str, BlockModel, pyvfio.RamBlock]:
        """Return a block; mostly one that fits, if there is one."""
        fitting = sorted(idstr for idstr, model in self.model.items() if fit(model) or number == SELDOM)
        names = fitting or sorted(self.model)
        idstr = names[number % len(names)]
        return idstr, self.model[idstr], self.blocks[idstr]

    def _change(
        self,
        what: str,
        change: Callable[[], object],
        *,
        refused: Iterable[type[Exception] | None] = (),
        told: Sequence[Listener] | None = None,
        growth: int = 0,
        plan: Plan | Trouble = None,
    ) -> Exception | None:
        """Make a change, with the trouble of `plan`. Return the refusal, which the model must have predicted, or None.

        Each exception of `refused` prevents the change. `told`: the listeners called, in this order. `growth`: the
        number of pages that the change locks in addition.
        """
        self.in_order, self.changed = False, True
        self.journal.clear()
        self.called.clear()
        reasons = [reason for reason in refused if reason is not None]
        self.met = plan if isinstance(plan, Trouble) else self._trouble(plan, hopeless=bool(reasons))
        if self._exceeds(self.met.room(), growth):
            reasons.append(pyvfio.PinLimitError)
        refusal, said = self._attempt(change)
        self.unsure = self.met.happened or self.met.room() is not None or self.entries is not None
        self.kept |= isinstance(refusal, pyvfio.RollbackError)
        if refusal is None:
            self._check_made(what, reasons, told)
        else:
            self._check_refused(what, refusal, tuple(reasons))
        assert not said or self.met.happened or self.kept, said
        self.tally[f"{what}: {'made' if refusal is None else type(refusal).__name__}"] += 1
        return refusal

    def _trouble(self, plan: Plan, *, hopeless: bool) -> Trouble:
        """Return the trouble of a plan, if this world supports the plan.

        A `hopeless` change will be undone, and no listener may refuse the undo.
        """
        match plan:
            case RefusingListener(number, turn) if self.listeners:
                return Refusal(self.listeners[number % len(self.listeners)], 1 if hopeless else turn)
            case RefusingCallback():
                return CallbackRefusal()
            case LittleMemory(room):
                return MemoryLimit(self.world, room)
            case Failing(calls) if self.fake is not None:
                requests = REQUESTS[type(self.space)]
                known = [call for call in calls if call.name in requests or call.name not in CUTS]
                return FailingCalls(self.fake, known, requests, hits_undo=hopeless or len(calls) > 1)
        return Trouble()

    def _exceeds(self, room: int | None, growth: int) -> bool:
        spare = sum(own.mapping.size for own in self.own if own.given_up) // PAGE_SIZE
        return room is not None and growth > 0 and growth - spare > room

    def _attempt(self, change: Callable[[], object]) -> tuple[Exception | None, list[warnings.WarningMessage]]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                with self.met.arranged():
                    change()
            except (*REFUSED, OSError) as error:
                return error, said
        return None, said

    def _check_made(self, what: str, refused: list[type[Exception]], told: Sequence[Listener] | None) -> None:
        assert not refused, f"{what} was made, and had to be refused: {refused}"
        assert not (self.met.happened and self.met.certain), f"{what} was made, though somebody had refused it"
        assert told is None or self.journal == list(told), f"{what}: listeners were left out, or told in another order"

    def _check_refused(self, what: str, refusal: Exception, legal: tuple[type[Exception], ...]) -> None:
        explained = self.met.happened and self.met.explains(refusal)
        if not explained and (isinstance(refusal, pyvfio.RollbackError) or not isinstance(refusal, legal)):
            raise AssertionError(f"{what} was refused for no reason; one of these would be: {legal}") from refusal
        half = len(self.journal) // 2
        assert self.journal[half:] == self.journal[:half][::-1], f"{what}: the undo was told in another order"

    def _entry_refusal(self, model: BlockModel | None, after: list[Piece] | None) -> type[Exception] | None:
        """Return EntryLimitError if the container has too few entries for a block's pieces. `model` None: a buffer."""
        if self.entries is None or after is None:
            return None
        others = len(self._entries()) - sum(own.given_up for own in self.own) - (len(model.pieces) if model else 0)
        needed = len(runs_of({page for piece in after for page in piece.pages})) if self.way.joins else len(after)
        return pyvfio.EntryLimitError if others + needed > self.entries else None

    def _budget_refusal(self, *maxima: int, others: int) -> type[Exception] | None:
        """Return EntryLimitError if, beside `others`, not every granule of the blocks can get an entry."""
        needed = sum(map(self.way.entries, maxima))
        return (
            pyvfio.EntryLimitError if self.entries is not None and needed and needed + others > self.entries else None
        )

    def _misfit(self, *, length: int, wanted: set[int]) -> type[Exception] | None:
        return None if self.mapper is None or self.way.suits(length, wanted) else ValueError

    def _hurt(self, model: BlockModel, refusal: Exception | None, changing: set[int]) -> None:
        """Record the damage of a failed undo. A change that succeeds heals the block."""
        if self.mapper is None:
            return
        if isinstance(refusal, pyvfio.RollbackError):
            model.hurt = True
            model.suspect |= changing
        elif refusal is None:
            model.hurt, model.suspect = False, set()

    def _growth(self, model: BlockModel, wanted: set[int]) -> int:
        """Return the number of further pages that are locked when exactly `wanted` is in reach."""
        return len(wanted) - len(model.reached) if self.mapper else 0

    def _remap(self, model: BlockModel, after: list[Piece] | None) -> None:
        if self.mapper is not None and after is not None:
            model.pieces = after

    def _resized(self, idstr: str, length: int) -> None:
        """Check the length. The callback of every block."""
        assert self.blocks[idstr].used_length == length, "the callback was called before the block had changed"
        self.called.append((idstr, length))
        self.met.meet()

    # ------------------------------------------------------------------------------------------------ blocks

    @rule(number=which, used=pages, more=pages, plan=plans)
    def add(self, *, number: int, used: int, more: int, plan: Plan) -> None:
        """Add a block, which must read zeros; after a refusal there is no such block."""
        free = [name for name in NAMES if name not in self.model]
        name = free[0] if free and number != SELDOM else NAMES[0]
        maximum = max(1, min(used + more, MAX_PAGES))
        new = BlockModel(maximum, bytearray(used * PAGE_SIZE), 0)
        after = self.way.after([], new.populated) if self.mapper else []
        entries = len(self._entries()) + sum(self.way.entries(m.maximum) - len(m.pieces) for m in self.model.values())
        entries -= sum(own.given_up for own in self.own)  # an add that needs their entries resets them
        refusal = self._change(
            "add",
            lambda: self.blocks.add(
                name,
                used_length=used * PAGE_SIZE,
                max_length=maximum * PAGE_SIZE,
                resized=self._resized,
            ),
            refused=(
                ValueError if name in self.model else None,
                self._misfit(length=used, wanted=new.populated),
                self._entry_refusal(None, after),
                self._budget_refusal(maximum, others=entries) if self.mapper else None,
            ),
            told=self.listeners,
            growth=len(new.populated) if self.mapper else 0,
            plan=plan,
        )
        self.spilled |= isinstance(refusal, pyvfio.RollbackError)
        if refusal is None:
            block = self.blocks[name]
            new.vaddr = block.vaddr
            new.iova = self.mapper.iova(block) if self.mapper else None
            self._remap(new, after)
            self.model[name] = new
            self._fill(number, new, block)

    add_2 = add  # a second rule doubles the probability

    @precondition(lambda self: self.model)
    @rule(number=which, plan=st.one_of(plans, refusals))
    def remove(self, *, number: int, plan: Plan) -> None:
        """Remove a block, unless a view is alive."""
        idstr, model, block = self._pick(number)
        refusal = self._change(
            "remove", block.remove, refused=(BufferError if model.seen else None,), told=self.listeners, plan=plan
        )
        self._hurt(model, refusal, model.populated)
        if refusal is None:
            if model.iova is not None:
                self.former.append(Iova(model.iova))
            del self.model[idstr]

    remove_2 = remove

    @precondition(lambda self: self.model)
    @rule(number=which, length=pages, plan=plans)
    def resize(self, *, number: int, length: int, plan: Plan) -> None:
        """Resize a block. Old bytes stay, new bytes read zeros, and the callback is called; or nothing changes."""
        idstr, model, block = self._pick(number, lambda model: model.hurt)
        length = model.length if number == SELDOM else length % (model.maximum + 2)
        old, wanted = model.length, set(range(length)) - model.discarded
        if length == old:
            assert self._change("resize to the same", lambda: block.resize(length * PAGE_SIZE), told=()) is None
            return
        after = self.way.after(model.pieces, wanted) if self.mapper else []
        refusal = self._change(
            "grow" if length > old else "shrink",
            lambda: block.resize(length * PAGE_SIZE),
            refused=(
                ValueError if length > model.maximum else None,
                BufferError if length < old and length * PAGE_SIZE < model.seen else None,
                self._misfit(length=length, wanted=wanted),
                pyvfio.GapError if after is None else None,
                self._entry_refusal(model, after),
            ),
            told=self.listeners if length > old else self.listeners[::-1],
            growth=self._growth(model, wanted),
            plan=plan,
        )
        self._hurt(model, refusal, set(range(max(old, length))))
        if refusal is None:
            assert self.called == [(idstr, length * PAGE_SIZE)]
            model.resize(length)
            self._remap(model, after)
            self._fill(number, model, block)

    resize_2 = resize_3 = resize_4 = resize_5 = resize_6 = resize_7 = resize_8 = resize

    @staticmethod
    def _part(model: BlockModel, number: int, among: set[int], start: int, size: int) -> tuple[int, int]:
        """Return a part of a block: mostly with pages `among` it, and rarely beyond the end."""
        if among and number != SELDOM:
            start = sorted(among)[start % len(among)]
        return start, size if number == SELDOM else max(0, min(size, model.length - start))

    @precondition(lambda self: any(model.populated for model in self.model.values()))
    @rule(number=which, start=page, size=st.integers(1, MAX_PAGES), plan=plans)
    def discard(self, *, number: int, start: int, size: int, plan: Plan) -> None:
        """Discard a part. It reads zeros, and no device reaches it, unless a listener could not follow."""
        _idstr, model, block = self._pick(number, lambda model: model.populated)
        start, size = self._part(model, number, model.populated, start, size)
        asked = set(range(start, start + size))
        parts, wanted = asked & model.populated, model.populated - asked
        after = self.way.after(model.pieces, wanted) if self.mapper else []
        outside = start + size > model.length
        careless = not all(listener.careful for listener in self.listeners)
        refusal = self._change(
            "discard" if parts else "discard nothing",
            lambda: block.discard(start * PAGE_SIZE, size * PAGE_SIZE),
            refused=(
                ValueError if outside else None,
                pyvfio.DiscardError if careless and parts else None,
                self._misfit(length=model.length, wanted=wanted) if parts else None,
                pyvfio.GapError if after is None and parts else None,
                self._entry_refusal(model, after) if parts else None,
            ),
            told=self.listeners[::-1] if parts else (),
            growth=self._growth(model, wanted) if parts else 0,
            plan=plan,
        )
        if parts and not outside:
            self._hurt(model, refusal, parts)
        if refusal is None and parts:
            model.discard(parts)
            self._remap(model, after)

    @precondition(lambda self: any(model.discarded for model in self.model.values()))
    @rule(number=which, start=page, size=st.integers(1, MAX_PAGES), plan=plans)
    def populate(self, *, number: int, start: int, size: int, plan: Plan) -> None:
        """Populate a part. Devices reach it again, with all writes since the discard."""
        _idstr, model, block = self._pick(number, lambda model: model.discarded)
        start, size = self._part(model, number, model.discarded, start, size)
        parts = set(range(start, start + size)) & model.discarded
        wanted = model.populated | parts
        after = self.way.after(model.pieces, wanted) if self.mapper else []
        outside = start + size > model.length
        refusal = self._change(
            "populate" if parts else "populate nothing",
            lambda: block.populate(start * PAGE_SIZE, size * PAGE_SIZE),
            refused=(
                ValueError if outside else None,
                self._misfit(length=model.length, wanted=wanted) if parts else None,
                pyvfio.GapError if after is None and parts else None,
                self._entry_refusal(model, after) if parts else None,
            ),
            told=self.listeners if parts else (),
            growth=self._growth(model, wanted) if parts else 0,
            plan=plan,
        )
        if parts and not outside:
            self._hurt(model, refusal, parts)
        if refusal is None and parts:
            model.discarded -= parts
            self._remap(model, after)

    discard_2 = discard_3 = discard_4 = discard_5 = discard_6 = discard
    populate_2 = populate_3 = populate_4 = populate

    # If the container accepts few mappings, a remap may need too many in between. Pages that a failed undo left to a
    # device are not replaced. tests/unit covers both cases.
    @precondition(lambda self: self.entries is None and not self.kept)
    @precondition(lambda self: any(model.length for model in self.model.values()))
    @rule(number=which, start=page, size=st.integers(1, MAX_PAGES))
    def replace_pages(self, *, number: int, start: int, size: int) -> None:
        """Replace pages. They read zeros for the process and the device, unless a listener could not follow."""
        _idstr, model, block = self._pick(number, lambda model: model.length)
        start, size = self._part(model, number, set(range(model.length)), start, size)
        asked = set(range(start, start + size))
        parts = asked & model.populated
        # The result is that of a discard and populate, except for other pages of the same granule.
        gone = {page for part in parts for page in self.way.neighbours(part)}
        unexpected = bool(self.mapper) and not self.way.allow_gap and gone != parts
        between = self.way.after(model.pieces, model.populated - gone) if self.mapper else []
        careless = not all(listener.careful for listener in self.listeners)
        refusal = self._change(
            "replace pages" if parts else "replace pages out of reach",
            lambda: block.remap(start * PAGE_SIZE, size * PAGE_SIZE),
            refused=(
                ValueError if start + size > model.length else None,
                pyvfio.UnsupportedError if careless and parts else None,
                pyvfio.GapError if parts and (between is None or unexpected) else None,
            ),
            told=[*self.listeners[::-1], *self.listeners] if parts else (),
        )
        if refusal is None and size:
            model.clear(asked)
        if refusal is None and parts:
            self._hurt(model, None, parts)
            self._remap(model, self.way.after(between or [], model.populated))

    replace_pages_2 = replace_pages_3 = replace_pages

    @precondition(lambda self: any(model.length for model in self.model.values()))
    @rule(number=which, at=page)
    def write(self, *, number: int, at: int) -> None:
        """Write from the process, beginning at a page; discarded pages included."""
        _idstr, model, block = self._pick(number, lambda model: model.length)
        at = min(at, model.length)
        self._write(model, block, at * PAGE_SIZE, pattern(16) * ((model.length - at) * PAGE_SIZE // 16))

    def _fill(self, number: int, model: BlockModel, block: pyvfio.RamBlock) -> None:
        """Write most new memory at once, so that its contents are recognized wherever they appear."""
        with block.view() as view:
            assert bytes(view) == model.contents, "new memory does not read zero"
        if number % 4:
            self._write(model, block, 0, pattern(16) * (len(model.contents) // 16))

    def _write(self, model: BlockModel, block: pyvfio.RamBlock, offset: int, data: bytes) -> None:
        with block.view() as view:
            view[offset : offset + len(data)] = data
        model.contents[offset : offset + len(data)] = data

    @precondition(lambda self: self.model)
    @rule(number=which)
    def look(self, *, number: int) -> None:
        """Take a view, and keep it."""
        _idstr, model, block = self._pick(number)
        model.views.append(block.view())

    @precondition(lambda self: any(model.views for model in self.model.values()))
    @rule(number=which)
    def look_away(self, *, number: int) -> None:
        """Release one view."""
        seen = [model for _idstr, model in sorted(self.model.items()) if model.views]
        views = seen[number % len(seen)].views
        views.pop(number % len(views)).release()

    # ------------------------------------------------------------------------------------------------ who listens

    @precondition(lambda self: len(self.listeners) < MAX_LISTENERS)
    @rule(
        kind=st.sampled_from((CarefulListener, CarefulListener, CarefulListener, Listener)), refuse_in=st.integers(0, 4)
    )
    def follow(self, *, kind: type[Listener], refuse_in: int) -> None:
        """Add a listener, which is called for all blocks; after a refusal, the listener knows nothing."""
        listener = kind(self.model, self.journal)
        holed = any(model.discarded for model in self.model.values())
        refusal = self._change(
            "follow",
            lambda: self.blocks.add_notifier(listener),
            refused=(
                pyvfio.DiscardError if holed and not kind.careful else None,
                RefusalError if 0 < refuse_in <= len(self.model) else None,
            ),
            told=[listener] * len(self.model),
            plan=Refusal(listener, refuse_in),
        )
        if refusal is None:
            self.listeners.insert(0, listener)
        else:
            assert not listener.lengths

    @precondition(lambda self: self.listeners)
    @rule(number=which, plan=plans)
    def leave(self, *, number: int, plan: Plan) -> None:
        """Remove a listener, which then knows nothing; or the listener stays."""
        listener = self.listeners[number % len(self.listeners)]
        refusal = self._change(
            "leave", lambda: self.blocks.remove_notifier(listener), told=[listener] * len(self.model), plan=plan
        )
        if refusal is None:
            self.listeners.remove(listener)
            assert not listener.lengths

    @precondition(lambda self: self.mapper is not None)
    @rule(way=st.sampled_from((*WAYS, None)), plan=plans)
    def replace_mapper(self, *, way: Way | None, plan: Plan) -> None:
        """Close the mapper, which unmaps everything. A mapper with another policy may follow."""
        assert self.mapper is not None
        before = self._reached() | self._reachable()
        refusal = self._change("close the mapper", self.mapper.close, plan=plan)
        if refusal is not None:
            assert self._reached() <= before
            self.mapper.close()
        self.mapper = None
        self.leaked.clear()
        for own in self.own:
            own.buffer.close()
            self.former.append(own.mapping.iova)
        self.own.clear()
        for model in self.model.values():
            self.former += [] if model.iova is None else [Iova(model.iova)]
            model.iova, model.pieces, model.hurt, model.suspect = None, [], False, set()
        if way is not None:
            self._open_mapper(way, None)

    replace_mapper_2 = replace_mapper

    def _reached(self) -> set[tuple[int, int]]:
        """Return the pages that the device reaches, as (IOVA, vaddr)."""
        return {
            (mapping.iova + offset, mapping.vaddr + offset)
            for mapping in self.space.mappings
            for offset in range(0, mapping.size, PAGE_SIZE)
        }

    def _reachable(self) -> set[tuple[int, int]]:
        """Return the pages of blocks that the device must reach, as (IOVA, vaddr)."""
        return {
            (model.iova + page * PAGE_SIZE, model.vaddr + page * PAGE_SIZE)
            for model in self.model.values()
            for page in model.populated
            if model.iova is not None
        }

    @precondition(lambda self: self.mapper is None)
    @rule(way=st.sampled_from(WAYS), plan=plans)
    def open_mapper(self, *, way: Way, plan: Plan) -> None:
        """Open a mapper, which must take the blocks as they are, also with discarded parts."""
        self._open_mapper(way, plan)

    def _open_mapper(self, way: Way, plan: Plan) -> None:
        made: list[pyvfio.DmaMapper] = []
        after = {idstr: way.after([], model.populated) or [] for idstr, model in self.model.items()}
        self.way = way
        suits = all(way.suits(model.length, model.populated) for model in self.model.values())
        too_many = self.entries is not None and len(self._entries()) + sum(map(len, after.values())) > self.entries
        refusal = self._change(
            "open a mapper",
            lambda: made.append(
                pyvfio.DmaMapper(
                    self.space,
                    self.blocks,
                    resize=way.resize,
                    granule=way.granule and way.granule * PAGE_SIZE,
                    allow_gap=way.allow_gap,
                )
            ),
            refused=(
                None if suits else ValueError,
                None if self._allows(way) else pyvfio.UnsupportedError,
                pyvfio.EntryLimitError if too_many else None,
                self._budget_refusal(*(model.maximum for model in self.model.values()), others=len(self._entries())),
            ),
            growth=sum(len(model.populated) for model in self.model.values()),
            plan=plan,
        )
        self.spilled |= isinstance(refusal, pyvfio.RollbackError)
        if refusal is None:
            (self.mapper,) = made
            for idstr, model in self.model.items():
                model.iova, model.pieces = self.mapper.iova(self.blocks[idstr]), after[idstr]

    def _allows(self, way: Way) -> bool:
        """Return whether the space can do what a mapper of that way needs."""
        return way.resize != "cut" or self.space.can_cut

    # ------------------------------------------------------------------------------------------------ own buffers

    @precondition(lambda self: self.mapper is not None and len(self.own) < MAX_BUFFERS)
    @rule(size=st.integers(1, 3), temporary=st.booleans(), plan=plans)
    def map_buffer(self, *, size: int, temporary: bool, plan: Plan) -> None:
        """Map a buffer, which then cannot be closed; after a refusal it can."""
        assert self.mapper is not None
        buffer, made = mmap.mmap(-1, size * PAGE_SIZE), list[pyvfio.DmaMapping]()
        map_it = self.mapper.map_temporary if temporary else self.mapper.map_buffer
        refusal = self._change(
            "map a buffer for a time" if temporary else "map a buffer",
            lambda: made.append(map_it(buffer)),
            refused=(self._buffer_refusal(),),
            growth=size,
            plan=plan,
        )
        if refusal is None:
            self.own.append(Own(made[0], buffer, temporary))
        else:
            buffer.close()

    def _buffer_refusal(self) -> type[Exception] | None:
        there = len(self._entries()) - sum(own.given_up for own in self.own)
        return pyvfio.EntryLimitError if self.entries is not None and there + 1 > self.entries else None

    @precondition(lambda self: any(not own.given_up for own in self.own))
    @rule(number=which, plan=plans)
    def close_mapping(self, *, number: int, plan: Plan) -> None:
        """Close a mapping: it is unmapped, or waits for the next reset; after a refusal it stays mapped."""
        held = [own for own in self.own if not own.given_up]
        own = held[number % len(held)]
        with pytest.raises(BufferError):
            own.buffer.close()
        refusal = self._change(
            "give a mapping up" if own.temporary else "close a mapping", own.mapping.close, plan=plan
        )
        if refusal is not None:
            return
        if own.temporary:
            own.given_up = True
        else:
            self._forget(own)

    def _forget(self, own: Own) -> None:
        own.buffer.close()
        self.own.remove(own)
        self.former.append(own.mapping.iova)

    @precondition(lambda self: self.mapper is not None and any(own.given_up for own in self.own))
    @rule(plan=plans)
    def reset_temporary(self, *, plan: Plan) -> None:
        """Reset temporary mappings: closed ones are unmapped, open ones stay."""
        assert self.mapper is not None
        left: list[int] = []
        mapper = self.mapper
        if self._change("reset temporary mappings", lambda: left.append(mapper.reset_temporary()), plan=plan) is None:
            for own in [own for own in self.own if own.given_up]:
                self._forget(own)
            assert left == [sum(own.temporary for own in self.own)]

    @precondition(lambda self: self.mapper is not None and self.model)
    @rule(number=which, start=page, size=st.integers(1, MAX_PAGES))
    def translate(self, *, number: int, start: int, size: int) -> None:
        """Translate a part of a block both ways, if all of it is in reach. The part is not mapped twice."""
        assert self.mapper is not None
        _idstr, model, block = self._pick(number)
        start = min(start, model.maximum - 1)
        size = min(size, model.maximum - start)
        there = set(range(start, start + size)) <= model.reached
        vaddr, iova = block.vaddr + start * PAGE_SIZE, (model.iova or 0) + start * PAGE_SIZE
        with nullcontext() if there else pytest.raises(LookupError):
            assert self.mapper.translate_vaddr(vaddr, size * PAGE_SIZE) == iova
        with nullcontext() if there else pytest.raises(LookupError):
            assert self.mapper.translate_iova(iova, size * PAGE_SIZE) == vaddr
        with nullcontext() if there else pytest.raises(ValueError, match="grow the block"):
            mapping = self.mapper.map_dma(vaddr=vaddr, size=size * PAGE_SIZE)
            assert mapping.iova == iova
            mapping.close()  # the mapping would keep the block from losing the part
        self.tally[f"translate: {'found' if there else 'not found'}"] += 1

    # ------------------------------------------------------------------------------------------------ the device

    @precondition(lambda self: self.questions and any(model.iova is not None for model in self.model.values()))
    @rule(number=which, at=page, shift=st.sampled_from(SHIFTS), writes=st.booleans())
    def dma(self, *, number: int, at: int, shift: int, writes: bool) -> None:
        """Let the device move bytes of a block: it succeeds within reach, also across pieces, and fails elsewhere."""
        _idstr, model, block = self._pick(number)
        if number % 2 and model.reached:
            at = sorted(model.reached)[at % len(model.reached)]
        else:
            at = min(model.length, model.maximum - 1) if not at else at % model.maximum
        offset = at * PAGE_SIZE + shift
        asked = {offset // PAGE_SIZE, (offset + SIZE - 1) // PAGE_SIZE}
        if asked & model.reached and not asked <= model.reached:
            offset, asked = at * PAGE_SIZE, {at}  # the device decides how far a stopped transfer gets
        self.in_order = False
        self.questions -= 1
        if asked <= model.reached:
            self._dma_inside(model, block, offset, writes=writes)
        else:
            self._dma_outside(model, block, offset)

    dma_2 = dma_3 = dma

    def _dma_inside(self, model: BlockModel, block: pyvfio.RamBlock, offset: int, *, writes: bool) -> None:
        end = offset + SIZE
        if model.iova is None or end > len(model.contents):  # the remains of a failed undo
            return
        if writes:
            sent = pattern(SIZE)
            self.probe.write(model.iova + offset, sent)
            model.contents[offset:end] = sent
        else:
            if not any(model.contents[offset:end]):  # a stopped device may read zeros
                self._write(model, block, offset, pattern(SIZE))
            assert self.probe.read(model.iova + offset, SIZE) == bytes(model.contents[offset:end])
        self.tally["dma: arrived"] += 1

    def _dma_outside(self, model: BlockModel, block: pyvfio.RamBlock, offset: int) -> None:
        if model.iova is None:
            return
        if offset + SIZE <= len(model.contents):
            self._write(model, block, offset, pattern(SIZE))
        self._check_stopped(model.iova + offset)
        self.tally["dma: stopped"] += 1

    def _check_stopped(self, iova: int) -> None:
        """Check that the device cannot read back bytes that it wrote there."""
        self.probe.write(iova, pattern(SIZE))
        assert self.probe.read(iova, SIZE) is None, f"the device reaches IOVA {iova:#x}"

    @precondition(lambda self: self.questions and self.own)
    @rule(number=which, writes=st.booleans())
    def dma_of_a_buffer(self, *, number: int, writes: bool) -> None:
        """Let the device move bytes of a buffer, also of a closed one that is not unmapped yet."""
        own = self.own[number % len(self.own)]
        self.in_order = False
        self.questions -= 1
        sent = pattern(SIZE)
        if writes:
            self.probe.write(own.mapping.iova, sent)
            assert own.buffer[:SIZE] == sent
        else:
            own.buffer[:SIZE] = sent
            assert self.probe.read(own.mapping.iova, SIZE) == sent
        self.tally["dma: buffer"] += 1

    @precondition(lambda self: self.questions and self.former)
    @rule(number=which)
    def dma_of_the_past(self, *, number: int) -> None:
        """Check that the device reaches nothing at a former IOVA, unless something else is mapped there now."""
        iova = self.former[-1 - number % len(self.former)]
        if not any(entry.iova <= iova < entry.iova + entry.size for entry in self._entries()):
            self.in_order = False
            self.questions -= 1
            self._check_stopped(iova)
            self.tally["dma: gone"] += 1

    # ------------------------------------------------------------------------------------------------ what is true

    def _entries(self) -> set[Mapping]:
        """Return all mappings that must exist."""
        entries = {self.desk, *self.leaked, *self.orphans, *(own.entry() for own in self.own)}
        for model in self.model.values():
            for start, end in model.pieces:
                iova, vaddr = (model.iova or 0) + start * PAGE_SIZE, model.vaddr + start * PAGE_SIZE
                entries.add(Mapping(Iova(iova), (end - start) * PAGE_SIZE, Vaddr(vaddr)))
        return entries

    def _reserved(self) -> set[tuple[int, int]]:
        """Return the IOVAs that must be reserved, as (start, size)."""
        whole = {(m.iova, m.maximum * PAGE_SIZE) for m in self.model.values() if m.iova is not None}
        return whole | {(entry.iova, entry.size) for entry in (self.desk, *(own.entry() for own in self.own))}

    def _learn(self) -> None:
        """Read the facts that trouble leaves open: the pieces of each block, and which closed mappings still exist."""
        there = set(self.space.mappings)
        for own in [own for own in self.own if own.given_up and own.entry() not in there]:
            self._forget(own)
        for model in self.model.values():
            if model.iova is not None:
                found = self.space.mappings_in(iova=model.iova, size=model.maximum * PAGE_SIZE)
                starts = [(mapping.iova - model.iova) // PAGE_SIZE for mapping in found]
                model.pieces = [
                    Piece(start, start + m.size // PAGE_SIZE) for start, m in zip(starts, found, strict=True)
                ]
        if self.spilled:
            (self.orphans if self.mapper is None else self.leaked).update(there - self._entries())
        self.unsure = self.spilled = False

    @invariant()
    def agrees(self) -> None:
        """Compare blocks, memory, listeners, mappings and locked memory with the model."""
        self.in_order = False
        self.tally.steps += 1
        if self.unsure or self.spilled:
            self._learn()
        if self.changed:  # the check reads /proc/self/maps, which takes as long as all the rest
            self._check_structures()
        for idstr, model in self.model.items():
            self._check_block(model, self.blocks[idstr])
        assert [block.idstr for block in self.blocks] == sorted(self.model, key=lambda idstr: self.model[idstr].vaddr)
        for listener in self.listeners:
            assert listener.lengths == {idstr: len(model.contents) for idstr, model in self.model.items()}
            assert listener.holes == {idstr: model.discarded for idstr, model in self.model.items()}
        self._check_mappings()
        self._check_claims()
        self.in_order, self.changed = True, False

    def _check_structures(self) -> None:
        self.blocks._check()
        self.space._check()
        self.blocks.discards._check()
        if self.mapper is not None and not any(model.hurt for model in self.model.values()):
            self.mapper._check()

    def _check_block(self, model: BlockModel, block: pyvfio.RamBlock) -> None:
        assert (block.vaddr, block.used_length) == (model.vaddr, len(model.contents))
        assert [Piece(start // PAGE_SIZE, end // PAGE_SIZE) for start, end in block.populated] == runs_of(
            model.populated
        )
        with block.view() as view:
            assert bytes(view) == model.contents, "the block's memory is not what was written"
        for kept in model.views:
            assert bytes(kept) == model.contents[: len(kept)]
        if self.mapper is not None:
            assert self.mapper.iova(block) == model.iova, "an IOVA has moved"
        reach = model.populated if self.mapper is not None else set()
        if model.hurt:
            assert model.reached <= reach | model.suspect
        else:
            assert model.reached == reach, "the device does not reach just what is populated"

    def _check_mappings(self) -> None:
        entries = self._entries()
        assert set(self.space.mappings) == entries
        assert self.world.locked_bytes() - self.locked == sum(entry.size for entry in entries)
        assert self.kept or self._reserved() == {(span.start, span.size) for span in self.space.allocator.reservations}
        if self.fake is not None:
            assert {Mapping(m.iova, m.size, m.vaddr) for m in self.fake.mappings(self.world.bdfs[0])} == entries
            self.fake.check()
            self.fake.clear_trace()

    def _check_claims(self) -> None:
        with nullcontext() if self.mapper is None else pytest.raises(pyvfio.DiscardError):
            self.blocks.discards.require().close()


def live(
    worlds: Sequence[Callable[[], AbstractContextManager[World]]],
    *,
    steps: int,
    seed: int,
    transfers: int = STEPS,
    a_time: int = STEPS,
    shrink: bool = True,
    until: Iterable[type[Exception]] = (),
) -> Tally:
    """Run lives of `a_time` steps, each in one of `worlds`, until there were `steps`. Return how they went.

    The lives continue, for at most three times as many steps, until each refusal of `until` has occurred, and the
    device has both reached memory and been stopped. The device tries `transfers` in each life. The same `seed` gives
    the same lives. `shrink`: search for the shortest life that fails.
    """
    tally, names = Tally(), {refusal.__name__ for refusal in until}
    while tally.steps < steps or (tally.steps < 3 * steps and not (names <= tally.ends() and tally.both_ways())):
        life = type("Life", (RandomLife,), {"worlds": worlds, "tally": tally, "transfers": transfers})
        run_state_machine_as_test(
            hypothesis.seed(seed)(life),
            settings=settings(
                max_examples=-(-(steps - tally.steps) // a_time) if tally.steps < steps else steps // a_time // 10 + 1,
                stateful_step_count=a_time,
                deadline=None,
                database=None,
                phases=(Phase.generate, *([Phase.shrink] if shrink else [])),
                suppress_health_check=list(HealthCheck),
            ),
        )
        seed += 1
    return tally
