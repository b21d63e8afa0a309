"""A RAM block's state: lengths, discarded parts, memory and views, and each step that changes them.

The library's own. A program has a `RamBlock`, and `pyvfio.ramblock.RamBlockList` orders the steps and tells notifiers.

Each step that listeners are told of takes `tell`: a `pyvfio.blocks.change.Change`, which tells them, and then calls its
argument, which makes the change. When a listener refuses, `tell` raises, the step takes back the memory that it had
activated, and the state is as before. Three rules hold in each step:

* memory is activated before anybody is told of it, and given back after everybody was told;
* after RollbackError or UnmapSizeError a device may reach any of the memory in question, and the memory is kept;
* the memory of a removed block stays until the last view of it has gone.

Source: `qemu_ram_resize`, `ram_block_discard_range` and `qemu_ram_remap` (system/physmem.c of QEMU).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, SupportsIndex, TypeAlias

from pyvfio.errors import REACH_UNKNOWN, DiscardError, IoctlError
from pyvfio.extents import Extent, Part, clip, runs, total, without
from pyvfio.guard import Guard, call_out, closing
from pyvfio.kernel import Kernel
from pyvfio.memory import Exports, MemoryKind, MemorySettings, Reservation
from pyvfio.units import check_whole_number, format_size

logger = logging.getLogger(__name__)

ResizedCallback: TypeAlias = Callable[[str, int], None]
"""A block's own callback, given its id string and its new `used_length` (`RAMBlock.resized`)."""

Tell: TypeAlias = Callable[[Callable[[], None]], None]
"""Tells all listeners of a change and then makes it, by calling the argument; or raises, and neither holds."""


class Preallocation(Protocol):
    """Has pages behind parts, (start, end) in bytes, by so many threads."""

    threads: int

    def check(self, parts: Sequence[tuple[int, int]]) -> None:
        """Raise IoctlError where there certainly is no memory for them."""
        ...

    def populate(self, parts: Sequence[tuple[int, int]]) -> None:
        """Populate them. Raises IoctlError."""
        ...


class BlockState:
    """The state of one RAM block.

    Synchronization: the lock of the block's list is held for each step. Lengths and parts may be read at any time: each
    is replaced as a whole.
    """

    __slots__ = (
        "__weakref__",
        "_views",
        "discarded",
        "doubtful",
        "guard",
        "idstr",
        "max_length",
        "memory",
        "page_size",
        "prealloc",
        "removed",
        "resized",
        "start",
        "used_length",
        "whole",
    )

    def __init__(
        self,
        kernel: Kernel,
        guard: Guard,
        *,
        idstr: str,
        max_length: int,
        settings: MemorySettings | None,
        memory: MemoryKind | None,
        resized: ResizedCallback | None,
    ) -> None:
        self.guard = guard
        self.idstr = idstr
        self.max_length = max_length
        self.memory = Reservation(kernel, max_length=max_length, settings=settings, kind=memory, idstr=idstr)
        self.page_size = self.memory.page_size
        self.start = self.memory.vaddr
        """The block's address, which stays when the memory goes: look-ups in sorted blocks go by it."""
        self.used_length = 0
        self.discarded: tuple[Extent, ...] = ()
        """Ascending, disjoint, within [0, used_length)."""
        self.doubtful: tuple[Extent, ...] = ()
        """Where it is discarded, a device may reach it: an undo has failed."""
        self.whole = False
        """Whether all of `max_length` is allocated; lengths change then, and nothing is given back."""
        self.removed = False
        self.prealloc: Preallocation | None = None
        self.resized = resized
        self._views = Exports()

    # ------------------------------------------------------------------------------------------------- look-ups

    def populated_at(self, length: int) -> Sequence[Part]:
        """The parts that devices reach, or would reach with that `used_length`."""
        whole = [(0, length)] if length else []
        return without(whole, *self.discarded) if self.discarded else whole

    def check_part(self, offset: SupportsIndex, size: SupportsIndex | None) -> tuple[int, int]:
        """Return the offset and size of a part, in bytes; `size` None: up to `used_length`. Raises ValueError where it
        is not in use, TypeError."""
        used = self.used_length
        start = check_whole_number(offset, "offset")
        count = max(used - start, 0) if size is None else check_whole_number(size, "size")
        if start < 0 or count < 0 or start + count > used:
            raise ValueError(
                f"offset {start} and size {count} are not a part of RAM block '{self.idstr}' that is in use: "
                f"used_length is {used}"
            )
        return start, count

    def view(self, offset: int, size: int) -> memoryview:
        """A view of `[offset, offset + size)`, which is in use. While it lives, `check_views` knows it."""
        view = self._views.view(self.start + offset, size)
        return view.toreadonly() if self.memory.readable_only else view

    def check_views(self, end: int) -> None:
        """Raise BufferError while a view reaches behind `end`."""
        reached = self._views.end() - self.start
        if reached > end:
            raise BufferError(
                f"RAM block '{self.idstr}' has a live view up to {format_size(reached)}, so it cannot be "
                f"{'shrunk to ' + format_size(end) if end else 'emptied or removed'}; release the view first"
            )

    def check_out_of_reach(self, parts: Sequence[Extent]) -> None:
        """Raise DiscardError where a device may reach some of `parts`, which are discarded."""
        doubtful = [found for part in parts for found in clip(self.doubtful, *part)]
        if doubtful:
            raise DiscardError(
                f"{format_size(total(doubtful))} of RAM block '{self.idstr}' are discarded, and a device may reach "
                "them all the same",
                hint="Populate them, which failed before, and so did its undo",
            )

    # ------------------------------------------------------------------------------------------------ its length

    def allocate(self, length: int) -> None:
        """Activate the first memory of the block: `length` bytes in use, or all of it where the block is `whole`.

        A block whose first part is ENOMEM becomes whole where all of it can be had: a process that has as many
        mappings as it may (vm.max_map_count) cannot split one. Raises IoctlError.
        """
        needed = self.max_length if self.whole else length
        if needed:
            self._check_room(0, needed)
            try:
                self.memory.activate(needed)
            except IoctlError as error:
                if error.errno != errno.ENOMEM or not self._activate_whole(needed, error):
                    raise
            self._populate(0, needed)
        self.used_length = length

    def _activate_whole(self, needed: int, why: IoctlError) -> bool:
        """Whether all of the block could be had where `needed` bytes could not: see `Reservation.activate_whole`."""
        try:
            self.memory.activate_whole(needed)
        except IoctlError as error:
            logger.debug("RAM block '%s' cannot be allocated in full, either: %s", self.idstr, error)
            return False
        if not self.whole:
            self.become_whole(f"a part of it could not be: {why}")
        return True

    def become_whole(self, why: str) -> None:
        """Let all of `max_length` be memory from now on, and log why."""
        self.whole = True
        logger.warning("RAM block '%s' is allocated in full, %s: %s", self.idstr, format_size(self.max_length), why)

    def grow(self, length: int, tell: Tell) -> None:
        """Activate memory up to `length`, tell, and have that length. Raises IoctlError and what `tell` raises."""
        old = self.used_length
        try:
            if self.prealloc is not None:
                self.prealloc.check([(old, length)])
            if self.whole:
                self.memory.provide(old, length)  # a block that became whole for want of mappings may have no pages
                self._populate(old, length)
                self.memory.clear(old, length)
            else:
                self.memory.activate(length)
                if self.prealloc is not None:
                    self.prealloc.populate([(old, length)])
            self._relabel(length, tell)
        except REACH_UNKNOWN:
            if self.memory.length > old and not self.whole:
                self.memory.retain(old)  # a device may still reach it
            raise
        except BaseException:
            self._take_back()
            raise

    def shrink(self, length: int, tell: Tell) -> OSError | None:
        """Tell, have that length, and give the memory behind back; the error that kept the memory here, if any.

        Raises BufferError and what `tell` raises.
        """
        self.check_views(length)
        self._relabel(length, tell)
        if self.whole:
            return None
        try:
            self.memory.deactivate(length)
        except OSError as error:
            return error
        return None

    def _relabel(self, length: int, tell: Tell) -> None:
        def commit() -> None:
            before = self.used_length, self.discarded
            if length < self.used_length:
                self.check_views(length)  # a hook may have taken one
            if self.discarded:
                self.discarded = tuple(clip(self.discarded, 0, length))
            self.used_length = length
            try:
                if self.resized is not None:
                    call_out(self.resized, (self.idstr, length))
            except BaseException:
                self.used_length, self.discarded = before
                raise

        tell(commit)
        if self.doubtful:
            self.doubtful = tuple(clip(self.doubtful, 0, length))
        if self.memory.held:
            self.memory.let_go()

    def _take_back(self) -> None:
        """Give back the memory that a refused grow has activated, unless a hook has kept a view of it or a device may
        reach it since an earlier undo failed: the present one has left everything as it was."""
        used = self.used_length
        if self.whole or self.memory.length == used:
            return
        if self.memory.held > used or self._views.end() > self.start + used:
            self.memory.retain(used)
            return
        try:
            self.memory.deactivate(used, undo=True)
        except OSError as error:
            logger.warning("RAM block '%s' keeps the memory that it was to grow by: %s", self.idstr, error)

    def _check_room(self, start: int, end: int) -> None:
        if self.prealloc is not None:
            self.prealloc.check([(start, end)])

    def _populate(self, start: int, end: int) -> None:
        if self.prealloc is not None:
            self.prealloc.populate([(start, end)])

    # --------------------------------------------------------------------------------------------------- its parts

    def discard(self, parts: Sequence[Extent], tell: Tell) -> list[OSError]:
        """Tell, and give `parts` back, all of them populated; the errors that kept memory here, which reads zeros."""
        discarded = tuple(runs(sorted((*self.discarded, *parts))))

        def commit() -> None:
            self.discarded = discarded

        tell(commit)
        self.doubtful = tuple(without(self.doubtful, *parts))
        failures = []
        for part in parts:
            try:
                self.memory.drop(*part)
            except OSError as error:
                failures.append(error)
        return failures

    def populate(self, parts: Sequence[Extent], tell: Tell) -> None:
        """Have pages for `parts`, all of them discarded, and tell. Raises IoctlError and what `tell` raises."""
        if self.prealloc is not None:
            self.prealloc.check(parts)
        for part in parts:
            self.memory.provide(*part)
        if self.prealloc is not None:
            self.prealloc.populate(parts)

        def commit() -> None:
            self.discarded = tuple(without(self.discarded, *parts))

        try:
            tell(commit)
        except REACH_UNKNOWN:
            self.doubtful = tuple(runs(sorted((*without(self.doubtful, *parts), *parts))))
            raise
        self.doubtful = tuple(without(self.doubtful, *parts))

    def replace_pages(self, populated: Sequence[Extent], discarded: Sequence[Extent]) -> None:
        """Put other pages behind parts, those in use and those that stay given back. Raises IoctlError."""
        for part in populated:
            self.memory.replace(*part, provide=True)
        for part in discarded:
            self.memory.replace(*part, provide=False)
        if populated and self.prealloc is not None:
            # As for memory that comes into use; and a device that only reads must not have the page of zeros.
            self.prealloc.populate(populated)

    def receive(self, length: int, discarded: Sequence[Extent]) -> None:
        """Have that length and those discarded parts, as another process has left the memory. Raises IoctlError."""
        self.memory.resume(length)
        self.used_length, self.discarded = length, tuple(discarded)

    # ----------------------------------------------------------------------------------------------------- its end

    def keep(self) -> None:
        """Never give memory back from now on: a device may reach any of it for ever."""
        self.memory.keep()

    def leave(self) -> None:
        """The block is in no list any more: nothing of it is in use."""
        self.removed, self.used_length, self.discarded = True, 0, ()

    def release(self) -> None:
        """Give the memory and its address space back, or let the last live view do so when it goes.

        An error of the kernel is logged, and the memory stays.
        """
        self._views.watch(self.close)
        if self._views.end():
            logger.debug("the memory of RAM block '%s' stays as long as a view of it", self.idstr)
            return
        try:
            self.memory.release()
        except OSError as error:
            logger.warning("the address space of RAM block '%s' could not be given back: %s", self.idstr, error)
            self.memory.abandon()

    @closing
    def close(self) -> None:
        """Release the memory if no view of it lives: the finalizer of the views of a block that was removed."""
        if not self._views.end():
            self.release()

    def _check(self) -> None:
        assert 0 <= self.used_length <= self.max_length
        assert self.removed or self.memory.length == (self.max_length if self.whole else self.used_length)
        assert list(self.discarded) == runs(clip(self.discarded, 0, self.used_length))
        assert not without(self.doubtful, *self.discarded)
        self.memory._check()
