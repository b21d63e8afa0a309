"""RAM blocks that grow and shrink in place, and the listeners that are told before anything they reach changes.

A `RamBlock` has `max_length` bytes of address space, of which `[0, used_length)` are memory. A `RamBlockList` holds the
blocks and tells its notifiers of every block that is added, removed or resized; `DmaMapper` is one such notifier, and
nothing here knows of it.

What holds at every instant, also when a notifier, a callback or the kernel refuses in the middle:

    what a notifier was told is there  ⊆  memory that is activated

A grow activates memory, then tells; a shrink tells, then gives memory back. Undo runs backwards.

Source: `qemu_ram_resize`, `RAMBlockNotifier` (include/exec/ramlist.h) and patches 1, 13 and 16 of the series "Ram
blocks with resizable anonymous allocations under POSIX" (QEMU, 2020). There no notifier can refuse; here each can, by
raising.
"""

from __future__ import annotations

import errno
import logging
import operator
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Self, TypeVar, TypeVarTuple

from pyvfio.blocks import parts
from pyvfio.blocks.block import RamBlock, ResizedCallback
from pyvfio.blocks.change import Added, Bookkeeping, Event, Removed, Resized, tell_all
from pyvfio.blocks.discards import DiscardGuard
from pyvfio.blocks.notifier import HOOKS, RamBlockNotifier, reaches_for_good, reaches_whole_blocks
from pyvfio.blocks.progress import LongWork, ProgressCallback
from pyvfio.errors import (
    REACH_UNKNOWN,
    CannotBePinnedWarning,
    ClosedError,
    ForkedError,
    HandOverError,
    IoctlError,
    MemoryNotReturnedWarning,
    ReentrancyError,
    UnsupportedError,
    VfioError,
    raise_collected,
)
from pyvfio.extents import Extent
from pyvfio.guard import Guard
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.memory import Anonymous, MemoryKind, MemorySettings
from pyvfio.memory.prefault import check_threads
from pyvfio.units import check_bool, format_size

__all__ = ["RamBlock", "RamBlockList", "RamBlockNotifier", "ResizedCallback"]

logger = logging.getLogger(__name__)

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


def _length(value: int, what: str, page_size: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be a whole number of bytes, not {value!r}") from None
    if number < 0 or number % page_size:
        raise ValueError(f"{what} must be a multiple of {page_size} bytes and not negative, not {number}")
    return number


def _check_options(idstr: object, settings: object, *, callbacks: Sequence[object]) -> None:
    if not isinstance(idstr, str):
        raise TypeError(f"idstr must be text, not {idstr!r}")
    if "\0" in idstr:
        raise ValueError(f"idstr names files, so that no NUL can be in it: {idstr!r}")
    if not isinstance(settings, MemorySettings | None):
        raise TypeError(f"settings must be a MemorySettings(), not {settings!r}")
    if not all(callback is None or callable(callback) for callback in callbacks):
        raise TypeError("progress and resized are called, so that they must be callable")


def _part(block: RamBlock, offset: int, size: int) -> Extent:
    start, length = _length(offset, "offset", block.page_size), _length(size, "size", block.page_size)
    if start + length > block.used_length:
        raise ValueError(
            f"bytes {start:#x}-{start + length - 1:#x} are not all in use: used_length of RAM block '{block.idstr}' is "
            f"{block.used_length:#x}"
        )
    return Extent(start, start + length)


def _say_whole(block: RamBlock, why: str) -> None:
    logger.warning("RAM block '%s' is allocated in full, %s: %s", block.idstr, format_size(block.max_length), why)


class RamBlockList:
    """The RAM blocks of a program and the notifiers that follow them.

    `kernel` makes the system calls on memory (default: the running kernel). Use it as a context manager: leaving
    removes all blocks.

    Synchronization: every method may be called from any thread; changes are made one at a time. A notifier that changes
    the list from inside a hook gets ReentrancyError: it would tell others of a state that does not stand yet.
    """

    def __init__(self, *, kernel: Kernel | None = None) -> None:
        self.kernel: Kernel = kernel or LinuxKernel()
        # Sorted by vaddr. Replaced as a whole, never changed in place: it is read without the lock.
        self._blocks: tuple[RamBlock, ...] = ()
        self._notifiers: list[RamBlockNotifier] = []  # newest first, as QLIST_INSERT_HEAD leaves them
        self.guard = Guard("this list of RAM blocks")
        self._lock = self.guard.lock
        self.closing = False
        """Whether `close` is removing all blocks."""
        self._changing = False
        self._handing: object | None = None  # who hands the blocks to another process; then `_changing` is set, too
        self._pid = os.getpid()
        self.discards = DiscardGuard()
        """Who may discard memory, and who rules it out."""

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, idstr: str) -> RamBlock:
        """The block with that id string. Raises KeyError."""
        for block in self._blocks:
            if block.idstr == idstr:
                return block
        raise KeyError(idstr)

    def block_at(self, vaddr: int) -> RamBlock | None:
        """The block whose reserved address space holds `vaddr` (`qemu_ram_block_from_host`). O(log n)."""
        blocks = self._blocks
        position = bisect_right(blocks, vaddr, key=lambda block: block._start) - 1
        if position < 0 or vaddr >= blocks[position]._start + blocks[position].max_length:
            return None
        return blocks[position]

    def add(
        self,
        idstr: str,
        *,
        used_length: int,
        max_length: int,
        memory: MemoryKind | None = None,
        readonly: bool = False,
        prealloc: int = 0,
        progress: ProgressCallback | None = None,
        settings: MemorySettings | None = None,
        resized: ResizedCallback | None = None,
    ) -> RamBlock:
        """Reserve `max_length` bytes, activate `used_length` of them, and tell all notifiers, the newest first.

        `memory`: private anonymous memory (`Anonymous()`, the default), a memfd of the block's own (`Memfd()`, also of
        huge pages) or a file of the caller's (`File(fd)`). `readonly`: devices may only read it.
        `prealloc`: how many threads see to it that there are pages behind whatever comes into use, also when the block
        grows, before anybody is told of it (0: pages come when they are touched); `progress` is told how far they are.
        What the limit of a control group (memory.max) has no room for is refused beforehand.

        Where a listener cannot follow a resize, or the process has no mapping left for a part (vm.max_map_count), all
        of `max_length` is allocated (`RamBlock.whole`), and a warning logged.

        Both lengths are multiples of the memory's page size; `used_length` may be 0. Raises ValueError for lengths that
        can never be right and for an id string that is taken, OSError or IoctlError when there is no address space or
        memory, and whatever a notifier raises; then there is no such block.
        """
        kind: MemoryKind = Anonymous() if memory is None else memory
        if not isinstance(kind, MemoryKind):
            raise TypeError(f"memory is Anonymous(), Memfd() or File(fd), not {kind!r}")
        used = _length(used_length, "used_length", kind.page_size)
        maximum = _length(max_length, "max_length", kind.page_size)
        if not used <= maximum or maximum == 0:
            raise ValueError(f"used_length {used:#x} must be at most max_length {maximum:#x}, which must not be 0")
        _check_options(idstr, settings, callbacks=(progress, resized))
        check_bool(readonly, "readonly")
        check_threads(prealloc, "prealloc")
        block = self._change(
            partial(
                self._add,
                idstr,
                used_length=used,
                max_length=maximum,
                memory=kind,
                readonly=readonly,
                prealloc=prealloc,
                progress=progress,
                settings=MemorySettings() if settings is None else settings,
                resized=resized,
            )
        )
        logger.debug("added %s", block)
        return block

    def _add(
        self,
        idstr: str,
        *,
        used_length: int,
        max_length: int,
        memory: MemoryKind | None,
        readonly: bool,
        prealloc: int,
        progress: ProgressCallback | None,
        settings: MemorySettings,
        resized: ResizedCallback | None,
    ) -> RamBlock:
        if any(block.idstr == idstr for block in self._blocks):
            raise ValueError(f"there is a RAM block '{idstr}' already")
        block = RamBlock(
            self,
            idstr=idstr,
            max_length=max_length,
            settings=settings,
            resized=resized,
            memory=memory,
            readonly=readonly,
        )
        self._set_prealloc(block, prealloc, progress)
        blocks = tuple(sorted((*self._blocks, block), key=lambda other: other._start))
        change = Bookkeeping(Added(block), partial(self._set_blocks, blocks), partial(self._set_blocks, self._blocks))
        try:
            _length(used_length, "used_length", block.page_size)
            for warning in block._memory.warnings:
                if not (readonly and isinstance(warning, CannotBePinnedWarning)):
                    warnings.warn(warning, stacklevel=4)  # first: a program may have made warnings errors
            self._allocate(block, used_length)
            block._used_length = used_length
            tell_all(self._notifiers, [Added(block)] * len(self._notifiers), change)
        except BaseException as error:
            self._abandon(block, error, settled=change.settled)
            raise
        return block

    def _allocate(self, block: RamBlock, used_length: int) -> None:
        """The first memory of a block: what is used, or all of it."""
        block.whole = self._must_be_whole(block)
        length = block.max_length if block.whole else used_length
        if not length:
            return
        if block._prealloc is not None:
            block._prealloc.check([(0, length)])
        try:
            block._memory.activate(length)
        except IoctlError as error:
            if error.errno != errno.ENOMEM or not self._has_whole(block, length, error):
                raise
        if block._prealloc is not None:
            block._prealloc.populate([(0, length)])

    @staticmethod
    def _has_whole(block: RamBlock, length: int, why: IoctlError) -> bool:
        """Whether all of `max_length` could be had where `length` bytes could not: see `Reservation.activate_whole`."""
        try:
            block._memory.activate_whole(length)
        except IoctlError as error:
            logger.debug("%s cannot be allocated in full, either: %s", block, error)
            return False
        if not block.whole:
            _say_whole(block, f"a part of it could not be: {why}")
        block.whole = True
        return True

    def _set_prealloc(self, block: RamBlock, threads: int, progress: ProgressCallback | None) -> None:
        block.prealloc = threads
        if threads:
            touch = not block._memory.readable_only
            block._prealloc = LongWork(self.kernel, block, threads=threads, callback=progress, touch=touch)

    def _must_be_whole(self, block: RamBlock) -> bool:
        for notifier in self._notifiers:
            if reaches_for_good(notifier):
                _say_whole(block, f"{notifier!r} cannot follow a resize")
                return True
        return False

    @staticmethod
    def _abandon(block: RamBlock, error: BaseException, *, settled: bool) -> None:
        block._list, block._used_length = None, 0
        if isinstance(error, REACH_UNKNOWN) or not settled:
            block._memory.keep()
            logger.warning("the memory of %s is kept, since a device may still reach it: %s", block, error)
            block._memory.abandon()
        elif block._exports.end():
            logger.warning("the memory of %s is kept, since a hook has kept a view of it", block)
            block._memory.abandon()
        else:
            block._release()  # what the caller must hear of is why there is no block

    def _receive(
        self, block: RamBlock, *, used_length: int, discarded: Sequence[Extent], stale: Sequence[Extent]
    ) -> None:
        """Take in a block whose memory another process has filled; this list has no notifier. OSError."""
        block._memory.resume(used_length)
        block._used_length = used_length
        block._set_discarded(tuple(discarded), tuple(stale))
        self._blocks = tuple(sorted((*self._blocks, block), key=lambda other: other._start))

    def _forget(self) -> None:
        """The blocks are another process's: their memory here goes, and nobody is told."""
        with self._lock:
            for block in self._blocks:
                block._list, block._used_length = None, 0
                block._release()
            self._blocks, self._notifiers = (), []

    def remove(self, block: RamBlock) -> None:
        """Tell all notifiers, the newest first, and give the block's memory and address space back.

        Raises BufferError while a view of it lives, ValueError when it is not in this list, and whatever a notifier
        raises; then the block stays, and those who were told are told that it is there.
        """
        self._change(partial(self._remove, block))
        logger.debug("removed %s", block)

    def _remove(self, block: RamBlock) -> None:
        if block not in self._blocks:
            raise ValueError(f"RAM block '{block.idstr}' is not in this list")
        block._check_views(0)
        blocks = tuple(other for other in self._blocks if other is not block)

        def commit() -> None:
            block._check_views(0)  # a hook may have taken one
            self._blocks, block._list, block._used_length = blocks, None, 0

        before = self._blocks, self, block._used_length

        def rollback() -> None:
            self._blocks, block._list, block._used_length = before

        self._tell(self._notifiers, Removed(block), commit=commit, rollback=rollback)
        block._release()

    def add_notifier(self, notifier: RamBlockNotifier) -> None:
        """Tell `notifier` of every block there is, and from now on of every change, before all older ones.

        Raises TypeError when it has none of the hooks, ValueError when it is in the list, UnsupportedError when it is
        told of blocks and cannot follow a resize, but there are blocks that can be resized, and whatever it raises;
        then it is not in the list, and has been told that the blocks it knew are gone. When that fails too
        (RollbackError), the blocks' memory is never given back any more: nobody would tell whether a device still
        reaches it.
        """
        if not isinstance(notifier, HOOKS):
            raise TypeError(
                f"{notifier!r} has none of ram_block_added, _removed, _resized, nor both of _discarded and _populated"
            )
        self._change(partial(self._add_notifier, notifier))

    def _add_notifier(self, notifier: RamBlockNotifier) -> None:
        if self._knows(notifier):
            raise ValueError(f"{notifier!r} is a notifier of this list already")
        if reaches_for_good(notifier) and (resizable := [block for block in self._blocks if not block.whole]):
            raise UnsupportedError(
                f"{notifier!r} is told of blocks and cannot follow a resize, and RAM block '{resizable[0].idstr}' is "
                "memory only as far as it is used",
                hint="Add it before the blocks, which are allocated in full then, or give it ram_block_resized",
            )
        if reaches_whole_blocks(notifier) and (holed := [block for block in self._blocks if block._discarded]):
            raise parts.cannot_follow(notifier, f"and parts of RAM block '{holed[0].idstr}' are discarded")
        notifiers = [notifier, *self._notifiers]
        try:
            self._replay(notifier, [Added(block) for block in self._blocks], "adding a notifier", notifiers)
        except REACH_UNKNOWN:
            for block in self._blocks:
                block._memory.keep()
            raise

    def remove_notifier(self, notifier: RamBlockNotifier) -> None:
        """Tell `notifier` that every block is gone, and tell it nothing more.

        Raises ValueError when it is not in the list, and whatever it raises; then it stays, and is told again of the
        blocks that it was told are gone.
        """
        self._change(partial(self._remove_notifier, notifier))

    def _remove_notifier(self, notifier: RamBlockNotifier) -> None:
        if not self._knows(notifier):
            raise ValueError(f"{notifier!r} is not a notifier of this list")
        notifiers = [known for known in self._notifiers if known is not notifier]
        events = [Removed(block) for block in reversed(self._blocks)]
        self._replay(notifier, events, "removing a notifier", notifiers)

    def _replay(
        self, notifier: RamBlockNotifier, events: Sequence[Event], what: str, notifiers: list[RamBlockNotifier]
    ) -> None:
        """Tell it all of `events`, and have those `notifiers` then; or neither."""
        before = self._notifiers
        change = Bookkeeping(what, partial(self._set_notifiers, notifiers), partial(self._set_notifiers, before))
        tell_all([notifier] * len(events), events, change)

    def _knows(self, notifier: RamBlockNotifier) -> bool:
        return any(known is notifier for known in self._notifiers)

    def _set_notifiers(self, notifiers: list[RamBlockNotifier]) -> None:
        self._notifiers = notifiers

    def _set_blocks(self, blocks: tuple[RamBlock, ...]) -> None:
        self._blocks = blocks

    @staticmethod
    def _tell(
        notifiers: Sequence[RamBlockNotifier],
        event: Event,
        *,
        commit: Callable[[], None],
        rollback: Callable[[], None],
    ) -> None:
        tell_all(notifiers, [event] * len(notifiers), Bookkeeping(event, commit, rollback))

    def _resize(self, block: RamBlock, used_length: int) -> None:
        new = _length(used_length, "used_length", block.page_size)
        if new > block._max_length:
            raise ValueError(f"used_length {new:#x} is above max_length {block.max_length:#x} of '{block.idstr}'")
        kept = self._change(self._resize_to, block, new)
        if kept is not None:
            # Last, since a program may have made warnings errors: by now everything is in order.
            warnings.warn(
                f"RAM block '{block.idstr}' shrank to {format_size(new)}, but {format_size(block._memory.retained)} "
                f"could not be given back: {kept}. The limit vm.max_map_count may be reached",
                MemoryNotReturnedWarning,
                stacklevel=3,
            )

    def _resize_to(self, block: RamBlock, new: int) -> OSError | None:
        self._check_there(block)
        old = block._used_length
        if new == old:
            return None
        kept: OSError | None = None
        try:
            if block.whole:
                self._relabel(block, old, new)
            elif new > old:
                self._grow(block, old, new)
            else:
                kept = self._shrink(block, old, new)
        except BaseException:
            block._agree()
            raise
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("resized %s from %#x", block, old)
        return kept

    def _relabel(self, block: RamBlock, old: int, new: int) -> None:
        """A block that is memory altogether has another length; what comes back reads zeros."""
        if new > old:
            if block._prealloc is not None:
                block._prealloc.check([(old, new)])
            block._memory.provide(old, new)  # it may have been allocated in full for want of mappings, and have none
            if block._prealloc is not None:
                block._prealloc.populate([(old, new)])
            block._memory.clear(old, new)
            self._commit(Resized(block, old, new), self._notifiers)
        else:
            block._check_views(new)
            self._commit(Resized(block, old, new), self._notifiers[::-1])

    def _grow(self, block: RamBlock, old: int, new: int) -> None:
        event = Resized(block, old, new)
        try:
            self._activate(block, old, new)
            self._commit(event, self._notifiers)
        except REACH_UNKNOWN:
            raise  # and retain: a device may still reach it
        except BaseException:
            if event.settled:  # else a second signal has ended the undo: retain, too
                block._give_back()
            raise

    @staticmethod
    def _activate(block: RamBlock, old: int, new: int) -> None:
        if block._prealloc is None:
            block._memory.activate(new)
            return
        block._prealloc.check([(old, new)])
        block._memory.activate(new)
        block._prealloc.populate([(old, new)])

    def _shrink(self, block: RamBlock, old: int, new: int) -> OSError | None:
        block._check_views(new)
        self._commit(Resized(block, old, new), self._notifiers[::-1])
        try:
            block._memory.deactivate(new)
        except OSError as error:
            return error
        return None

    def _discard(self, block: RamBlock, offset: int, size: int) -> None:
        kept = self._change(self._discard_part, block, offset, size)
        for error in kept:
            warnings.warn(
                f"memory of RAM block '{block.idstr}' was discarded, but not given back: {error}. It reads zeros, and "
                "stays with this process",
                MemoryNotReturnedWarning,
                stacklevel=3,
            )

    def _discard_part(self, block: RamBlock, offset: int, size: int) -> list[OSError]:
        wanted = _part(block, offset, size)
        self._check_there(block)
        return parts.discard(block, wanted, self._notifiers, self.discards)

    def _populate(self, block: RamBlock, offset: int, size: int) -> None:
        self._change(self._populate_part, block, offset, size)

    def _populate_part(self, block: RamBlock, offset: int, size: int) -> None:
        wanted = _part(block, offset, size)
        self._check_there(block)
        parts.populate(block, wanted, self._notifiers)

    def _remap(self, block: RamBlock, offset: int, size: int) -> None:
        self._change(self._remap_part, block, offset, size)

    def _remap_part(self, block: RamBlock, offset: int, size: int) -> None:
        wanted = _part(block, offset, size)
        self._check_there(block)
        if wanted.size:
            parts.remap(block, wanted, self._notifiers)

    @staticmethod
    def _check_there(block: RamBlock) -> None:
        if block._list is None:
            raise ClosedError(f"RAM block '{block.idstr}' has been removed")

    @staticmethod
    def _commit(event: Resized, notifiers: Sequence[RamBlockNotifier]) -> None:
        """Tell `notifiers`, change `used_length`, call the block's callback; or nothing of it."""
        tell_all(notifiers, [event] * len(notifiers), event)

    def _change(self, action: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
        # Not a context manager: a signal handler that raises between its entry and the block would leave it entered.
        if os.getpid() != self._pid:
            raise ForkedError("this list of RAM blocks", owner=self._pid)
        with self._lock:
            if self._changing:
                raise self._reentered()
            try:
                self._changing = True
                return action(*arguments)
            finally:
                self._changing = False

    def _suspend(self, by: object) -> None:
        """Refuse all changes until `_resume`, as the blocks are being handed to another process."""
        if os.getpid() != self._pid:
            raise ForkedError("this list of RAM blocks", owner=self._pid)
        with self._lock:
            if self._changing:
                raise self._reentered()
            self._handing, self._changing = by, True

    def _resume(self, by: object) -> None:
        with self._lock:
            if self._handing is by:
                self._changing, self._handing = False, None

    def _reentered(self) -> VfioError:
        if self._handing is not None:
            return HandOverError(
                "the RAM blocks are being handed to another process, so that none of them can change",
                hint="cancel() or finish() of the HandOver says who has them from now on",
            )
        return ReentrancyError(
            "the list of RAM blocks is being changed, and a notifier or callback tries to change it once more",
            hint="Let the hook return first, and make the change after that",
        )

    def close(self) -> None:
        """Remove all blocks; twice is fine, and in a forked child it does nothing at all.

        Raises BufferError and whatever notifiers raise, as `remove` does, after having removed all others.
        """
        if os.getpid() != self._pid:
            return
        failures: list[Exception] = []
        with self._lock:
            if self._changing:
                raise self._reentered()
            self.closing = True
            try:
                for block in self._blocks:
                    try:
                        self.remove(block)
                    except Exception as error:
                        failures.append(error)
            finally:
                self.closing = False
        raise_collected(f"{len(failures)} RAM blocks could not be removed", failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        assert not self._changing or self._handing is not None
        assert [block.vaddr for block in self._blocks] == sorted(block._start for block in self._blocks)
        assert len({block.idstr for block in self._blocks}) == len(self._blocks)
        for block in self._blocks:
            assert block._list is self
            block._check()
