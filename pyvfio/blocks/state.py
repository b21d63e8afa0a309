"""The state of a RAM block: lengths, discarded parts, memory and views, and each step that changes the state.

For the library. A program has a `RamBlock`, and `pyvfio.ramblock.RamBlockList` orders the steps and calls notifiers.

Each step that concerns listeners takes `tell`, a `pyvfio.blocks.change.Change`. `tell` calls the listeners, and then
the argument of `tell`, which makes the change. If a listener refuses, `tell` raises, the step releases the memory that
the step had activated, and the state is as before. Three rules hold in each step:

* memory is activated before any listener is called, and released after all listeners were called;
* after RollbackError or UnmapSizeError a device may reach any of the memory in question, and the memory is kept;
* the memory of a removed block stays until its last view dies.

Source: `qemu_ram_resize`, `ram_block_discard_range` and `qemu_ram_remap` (system/physmem.c of QEMU).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Protocol, SupportsIndex, TypeAlias

from pyvfio.errors import REACH_UNKNOWN, DiscardError, IoctlError
from pyvfio.extent_set import NOTHING, ExtentSet
from pyvfio.extents import Extent, Extents, Part, added, clip, removed, total, without
from pyvfio.guard import Guard, call_out, closing
from pyvfio.kernel import Kernel
from pyvfio.memory import Exports, MemoryKind, MemorySettings, Reservation
from pyvfio.units import check_whole_number, format_size

logger = logging.getLogger(__name__)

ResizedCallback: TypeAlias = Callable[[str, int], None]
"""A block's own callback, called with the id string and the new `used_length` (`RAMBlock.resized`)."""

Tell: TypeAlias = Callable[[Callable[[], None]], None]
"""Calls all listeners, and then the argument, which makes the change. If a listener refuses, nothing changes."""


class Preallocation(Protocol):
    """Populates parts, (start, end) in bytes, with `threads` threads."""

    threads: int

    def check(self, parts: Sequence[tuple[int, int]]) -> None:
        """Raise IoctlError if the memory for `parts` certainly cannot be allocated."""
        ...

    def populate(self, parts: Sequence[tuple[int, int]], *, required: bool = False) -> None:
        """Populate `parts`. Raises IoctlError. `required`: also where the kernel cannot populate."""
        ...


class BlockState:
    """The state of one RAM block.

    Synchronization: each step needs the lock of the block's list. Any thread may read lengths and parts at any time:
    each is replaced in one assignment.
    """

    __slots__ = (
        "__weakref__",
        "_populated",
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
        """The block's address. Stays after the release of the memory: look-ups in sorted blocks use the address."""
        self.used_length = 0
        self.discarded = NOTHING
        """The discarded parts, with gaps between them, within [0, used_length)."""
        # Cached: `discarded`, `used_length`, and the result.
        self._populated: tuple[ExtentSet, int, Extents] = self.discarded, 0, ()
        self.doubtful: Extents = ()
        """The discarded parts that a device may still reach, because an undo failed."""
        self.whole = False
        """Whether all of `max_length` is allocated. A resize then changes the length, and releases no memory."""
        self.removed = False
        self.prealloc: Preallocation | None = None
        self.resized = resized
        self._views: Exports | None = None

    # ------------------------------------------------------------------------------------------------- look-ups

    @property
    def populated(self) -> Extents:
        """The parts that devices reach, with gaps between them: [0, used_length) less the discarded parts.

        Cost: O(discarded parts) after a change, else O(1).
        """
        discarded, used = self.discarded, self.used_length
        of, length, populated = self._populated
        if of is not discarded or length != used:
            populated = tuple(without([(0, used)], *discarded))
            self._populated = discarded, used, populated  # one assignment, because any thread may read
        return populated

    def populated_at(self, length: int) -> Sequence[Part]:
        """Return the parts that devices would reach at this `used_length`. Cost: O(discarded parts)."""
        whole = [(0, length)] if length else []
        return without(whole, *self.discarded) if self.discarded else whole

    def populated_in(self, start: int, end: int) -> list[Extent]:
        """Return the parts of [start, end) that devices reach. Cost: O(log n + results)."""
        end = min(end, self.used_length)
        return without([(start, end)], *self.discarded.clip(start, end))

    def check_part(self, offset: SupportsIndex, size: SupportsIndex | None) -> tuple[int, int]:
        """Return the offset and size of a part, in bytes; `size` None: up to `used_length`.

        Raises ValueError if the part is not in use; TypeError.
        """
        start = check_whole_number(offset, "offset")
        count = -1 if size is None else check_whole_number(size, "size")
        used = self.used_length  # read after the conversions: __index__ of a program's number may resize the block
        if size is None:
            count = max(used - start, 0)
        if start < 0 or count < 0 or start + count > used:
            raise ValueError(
                f"offset {start} and size {count} are not a part of RAM block '{self.idstr}' that is in use: "
                f"used_length is {used}"
            )
        return start, count

    def view(self, offset: int, size: int) -> memoryview:
        """Return a view of `[offset, offset + size)`, which must be in use. `check_views` respects live views."""
        if self._views is None:
            self._views = Exports()
        view = self._views.view(self.start + offset, size)
        return view.toreadonly() if self.memory.readable_only else view

    def check_views(self, end: int) -> None:
        """Raise BufferError if a view reaches behind `end`."""
        if self._views is not None and (reached := self._views.end() - self.start) > end:
            change = f"shrunk to {format_size(end)}" if end else "emptied or removed"
            raise BufferError(
                f"RAM block '{self.idstr}' cannot be {change}: "
                f"a live view reaches {format_size(reached)}; release the view first"
            )

    def _viewed_until(self) -> int:
        return 0 if self._views is None else self._views.end()

    def check_out_of_reach(self, parts: Sequence[Extent]) -> None:
        """Raise DiscardError if a device may reach some of `parts`, which are discarded."""
        doubtful = [found for part in parts for found in clip(self.doubtful, *part)]
        if doubtful:
            raise DiscardError(
                f"{format_size(total(doubtful))} of RAM block '{self.idstr}' are discarded, but a device may still "
                "reach them",
                hint="Populate these parts again: an earlier populate failed, and the undo failed too",
            )

    # ------------------------------------------------------------------------------------------------ its length

    def allocate(self, length: int) -> None:
        """Activate the first memory of the block: `length` bytes in use, or all of the block if `whole`.

        If activating the first part fails with ENOMEM, and all of the memory can be allocated, the block becomes whole:
        a process with vm.max_map_count mappings cannot split a mapping. Raises IoctlError.
        """
        needed = self.max_length if self.whole else length
        if needed:
            self._check_room(0, needed)
            if not self._extend(0, needed):
                try:
                    self.memory.activate(needed)
                except IoctlError as error:
                    if error.errno != errno.ENOMEM or not self._activate_whole(needed, error):
                        raise
                self._populate(0, needed)
        self.used_length = length

    def _activate_whole(self, needed: int, why: IoctlError) -> bool:
        """Return whether the whole block could be allocated after `needed` bytes could not: see `Reservation`."""
        try:
            self.memory.activate_whole(needed)
        except IoctlError as error:
            logger.debug("RAM block '%s' cannot be allocated in full, either: %s", self.idstr, error)
            return False
        if not self.whole:
            self.become_whole(f"a part could not be allocated alone: {why}")
        return True

    def become_whole(self, why: str) -> None:
        """Record that all of `max_length` is allocated from now on, and log the reason."""
        self.whole = True
        logger.warning("RAM block '%s' is allocated in full, %s: %s", self.idstr, format_size(self.max_length), why)

    def grow(self, length: int, tell: Tell) -> None:
        """Activate memory up to `length`, call `tell`, and set the length. Raises IoctlError, and as `tell`."""
        old = self.used_length
        try:
            if self.prealloc is not None:
                self.prealloc.check([(old, length)])
            if self.whole:
                self.memory.provide(old, length)  # a block that became whole may have no pages yet
                self._populate(old, length)
                self.memory.clear(old, length)
            elif self.prealloc is None or not self._extend(old, length):  # most blocks have none: no call for these
                self.memory.activate(length)
                if self.prealloc is not None:
                    self.prealloc.populate([(old, length)])
            self._relabel(length, tell)
        except REACH_UNKNOWN:
            if self.memory.length > old and not self.whole:
                self.memory.retain(old)  # a device may still reach the new memory
            raise
        except BaseException:
            self._take_back()
            raise

    def _extend(self, start: int, length: int) -> bool:
        """Activate memory of a memfd, and let several threads allocate the pages. Return False if that is impossible.

        fallocate(2) allocates in one thread, under the lock of the file. Only fallocate reports why pages are missing,
        so after any error nothing is active, and the caller takes that way.
        """
        if self.whole or not self._spreads or not self.memory.can_extend(start):
            return False
        try:
            self.memory.activate(length, allocate=False)
            self._populate(start, length, required=True)
        except IoctlError as error:
            logger.debug("RAM block '%s': %s", self.idstr, error)
            self._take_back()
            return False
        return True

    @property
    def _spreads(self) -> bool:
        """Whether several threads allocate pages."""
        return self.prealloc is not None and self.prealloc.threads > 1

    def shrink(self, length: int, tell: Tell) -> OSError | None:
        """Call `tell`, set the length, and release the memory behind. Return the error that kept the memory, or None.

        Raises BufferError, and as `tell`.
        """
        if self._views is not None:
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
            used, discarded = self.used_length, self.discarded
            if self._views is not None and length < used:
                self.check_views(length)  # a hook may have taken a view
            if discarded is not NOTHING and length < self.max_length:  # `if discarded` would cost a call of Python
                self.discarded = discarded.removed([(length, self.max_length)])
            self.used_length = length
            if self.resized is not None:
                try:
                    call_out(self.resized, (self.idstr, length))
                except BaseException:
                    self.used_length, self.discarded = used, discarded
                    raise

        tell(commit)
        if self.doubtful and length < self.max_length:
            self.doubtful = removed(self.doubtful, [(length, self.max_length)])
        if self.memory.held:
            self.memory.let_go()

    def _take_back(self) -> None:
        """Release the memory that a refused grow has activated.

        The memory is retained if a hook has kept a view of the memory, or if a device may still reach it after an
        earlier failed undo. The undo of the refused grow itself succeeded.
        """
        used = self.used_length
        if self.whole or self.memory.length == used:
            return
        if self.memory.held > used or self._viewed_until() > self.start + used:
            self.memory.retain(used)
            return
        try:
            self.memory.deactivate(used, undo=True)
        except OSError as error:
            logger.warning("RAM block '%s' keeps the memory of a refused grow: %s", self.idstr, error)

    def _check_room(self, start: int, end: int) -> None:
        if self.prealloc is not None:
            self.prealloc.check([(start, end)])

    def _populate(self, start: int, end: int, *, required: bool = False) -> None:
        if self.prealloc is not None:
            self.prealloc.populate([(start, end)], required=required)

    # --------------------------------------------------------------------------------------------------- its parts

    def discard(self, parts: Sequence[Extent], tell: Tell) -> list[OSError]:
        """Call `tell`, and release `parts`, all populated. Return the errors that kept memory, which reads zeros."""
        discarded = self.discarded.added(parts)

        def commit() -> None:
            self.discarded = discarded

        tell(commit)
        self.doubtful = removed(self.doubtful, parts)
        failures = []
        for part in parts:
            try:
                self.memory.drop(*part)
            except OSError as error:
                failures.append(error)
        return failures

    def populate(self, parts: Sequence[Extent], tell: Tell) -> None:
        """Allocate pages for `parts`, all discarded, and call `tell`. Raises IoctlError, and as `tell`."""
        if self.prealloc is not None:
            self.prealloc.check(parts)
        for part in parts:
            self.memory.provide(*part)
        if self.prealloc is not None:
            self.prealloc.populate(parts)

        def commit() -> None:
            self.discarded = self.discarded.removed(parts)

        try:
            tell(commit)
        except REACH_UNKNOWN:
            self.doubtful = added(self.doubtful, parts)
            raise
        self.doubtful = removed(self.doubtful, parts)

    def replace_pages(self, populated: Sequence[Extent], discarded: Sequence[Extent]) -> None:
        """Replace the pages of parts in use, and of parts that stay discarded. Raises IoctlError."""
        for part in populated:
            self.memory.replace(*part, provide=True)
        for part in discarded:
            self.memory.replace(*part, provide=False)
        if populated and self.prealloc is not None:
            # New pages are populated as on a grow. Without that, a read-only device would pin the shared zero page.
            self.prealloc.populate(populated)

    def receive(self, length: int, discarded: Sequence[Extent]) -> None:
        """Set the length and the discarded parts of memory that another process left. Raises IoctlError."""
        self.memory.resume(length)
        self.used_length, self.discarded = length, ExtentSet(discarded)

    # ----------------------------------------------------------------------------------------------------- its end

    def keep(self) -> None:
        """Never release memory from now on: a device may reach any of the memory permanently."""
        self.memory.keep()

    def leave(self) -> None:
        """Mark the block as removed: nothing of the block is in use."""
        self.removed, self.used_length, self.discarded = True, 0, NOTHING

    def release(self) -> None:
        """Release the memory and the address space, or let the death of the last live view do so.

        An error of the kernel is logged, and the memory stays.
        """
        if self._views is not None:
            self._views.watch(self.close)
        if self._viewed_until():
            logger.debug("the memory of RAM block '%s' stays until its last view dies", self.idstr)
            return
        try:
            self.memory.release()
        except OSError as error:
            logger.warning("the address space of RAM block '%s' could not be unmapped: %s", self.idstr, error)
            self.memory.abandon()

    @closing
    def close(self) -> None:
        """Release the memory if no view is alive. The finalizer of the views of a removed block."""
        if not self._viewed_until():
            self.release()

    def _check(self) -> None:
        assert 0 <= self.used_length <= self.max_length
        assert self.removed or self.memory.length == (self.max_length if self.whole else self.used_length)
        self.discarded._check()
        assert list(self.discarded) == self.discarded.clip(0, self.used_length)
        assert list(self.populated) == without([(0, self.used_length)], *self.discarded)
        assert not without(self.doubtful, *self.discarded)
        self.memory._check()
