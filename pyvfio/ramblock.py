"""RAM blocks that grow and shrink in place, and the listeners that are told before anything they reach changes.

A `RamBlock` has `max_length` bytes of address space, of which `[0, used_length)` are memory. A `RamBlockList` holds the
blocks and tells its notifiers of every block that is added, removed or resized; `DmaMapper` is one such notifier, and
nothing here knows of it.

At every instant, also when a notifier, a callback or the kernel refuses in the middle:

    memory that a notifier was told of  ⊆  memory that is activated

A grow activates memory, then tells. A shrink tells, then gives memory back. The undo runs backwards. The steps are
those of `pyvfio.blocks.state`; this module checks arguments, orders the steps and tells.

Source: `qemu_ram_resize`, `RAMBlockNotifier` (include/exec/ramlist.h) and patches 1, 13 and 16 of the series "Ram
blocks with resizable anonymous allocations under POSIX" (QEMU, 2020). There no notifier can refuse. Here each can, by
raising.
"""

from __future__ import annotations

import logging
import operator
import sys
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType

from pyvfio.blocks import parts
from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.change import Added, Change, Removed, Resized, tell_each
from pyvfio.blocks.discards import DiscardGuard
from pyvfio.blocks.notifier import HOOKS, RamBlockNotifier, reaches_for_good, reaches_whole_blocks
from pyvfio.blocks.progress import ProgressCallback, preallocate
from pyvfio.blocks.state import ResizedCallback
from pyvfio.errors import (
    REACH_UNKNOWN,
    CannotBePinnedWarning,
    ClosedError,
    HandOverError,
    ReentrancyError,
    UnsupportedError,
    raise_collected,
)
from pyvfio.extents import Extent
from pyvfio.guard import ContextManager, Guard, closing, guarded, making, undoing
from pyvfio.handle import attempt
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.memory import Anonymous, MemoryKind, MemorySettings
from pyvfio.memory.prefault import check_threads
from pyvfio.units import align_up, check_bool

__all__ = ["RamBlock", "RamBlockList", "RamBlockNotifier", "ResizedCallback"]

logger = logging.getLogger(__name__)


def _warn(warning: Warning) -> None:
    """Warn at the line of the program: frames of the guard lie between."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyvfio."):
        frame, level = frame.f_back, level + 1
    warnings.warn(warning, stacklevel=level)


def _length(value: int, what: str, page_size: int) -> int:
    if type(value) is int and value >= 0 and not value % page_size:  # what each resize passes
        return value
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be a whole number of bytes, not {value!r}") from None
    if number < 0 or number % page_size:
        instead = f"; use {align_up(number, page_size)}" if number > 0 else ""
        raise ValueError(f"{what} must be a multiple of {page_size} bytes and not negative, not {number}{instead}")
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


def _remove(block: RamBlock) -> None:
    block.remove()


class _Change:
    """One change of a list at a time, under its lock. It has no state of its own, so a list needs one."""

    __slots__ = ("_blocks",)

    def __init__(self, blocks: RamBlockList) -> None:
        self._blocks = blocks

    def __enter__(self) -> None:
        blocks = self._blocks
        if blocks.changing or blocks.handing is not None:
            blocks.check_unchanging()
        blocks.changing = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._blocks.changing = False


class RamBlockList(ContextManager):
    """The RAM blocks of a program and the notifiers that follow them.

    `kernel` makes the system calls on memory (default: the running kernel). Use it as a context manager: leaving
    removes all blocks.

    Synchronization: every method may be called from any thread. Changes are made one at a time. A notifier that changes
    the list from inside a hook gets ReentrancyError; `close` in a hook is put off to the end of the change.
    """

    def __init__(self, *, kernel: Kernel | None = None) -> None:
        self.kernel: Kernel = kernel or LinuxKernel()
        self.guard = Guard("this list of RAM blocks")
        # Sorted by vaddr. Replaced as a whole, never changed in place: it is read without the lock.
        self._blocks: tuple[RamBlock, ...] = ()
        self._notifiers: tuple[RamBlockNotifier, ...] = ()  # newest first, as QLIST_INSERT_HEAD leaves them
        self.changing = False
        """Whether a change is being made."""
        self._change = _Change(self)
        self.handing: object | None = None
        """The hand-over of the blocks to another process, while it is under way."""
        self._closed = False
        self.closing = False
        """Whether `close` is removing all blocks: also those of which something is in use."""
        self.discards = DiscardGuard()
        """Who may discard memory, and who rules it out."""

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, item: object) -> bool:
        """Whether a block, or a block with that id string, is in the list."""
        if isinstance(item, str):
            return any(block.idstr == item for block in self._blocks)
        return any(block is item for block in self._blocks)

    def __getitem__(self, idstr: str) -> RamBlock:
        """The block with that id string. Raises KeyError."""
        for block in self._blocks:
            if block.idstr == idstr:
                return block
        there = ", ".join(repr(block.idstr) for block in self._blocks[:8]) or "none"
        raise KeyError(f"no RAM block is named {idstr!r}; there are {there}")

    def __repr__(self) -> str:
        blocks = ", ".join(
            f"{block.idstr!r} {block.state.start:#x}+{block.used_length:#x}" for block in self._blocks[:8]
        )
        more = ", …" if self._blocks[8:] else ""
        count = f"{len(self._blocks)} block{'' if len(self._blocks) == 1 else 's'}"
        notifiers = f"{len(self._notifiers)} notifier{'' if len(self._notifiers) == 1 else 's'}"
        state = "closed" if self._closed else count
        return f"<RamBlockList {state}{': ' if blocks else ''}{blocks}{more}, {notifiers}>"

    @property
    def notifiers(self) -> tuple[RamBlockNotifier, ...]:
        """The notifiers, the newest first."""
        return self._notifiers

    def block_at(self, vaddr: int) -> RamBlock | None:
        """The block whose reserved address space holds `vaddr` (`qemu_ram_block_from_host`). O(log n)."""
        blocks, vaddr = self._blocks, operator.index(vaddr)
        position = bisect_right(blocks, vaddr, key=lambda block: block.state.start) - 1
        if position < 0 or vaddr >= blocks[position].state.start + blocks[position].max_length:
            return None
        return blocks[position]

    # ------------------------------------------------------------------------------------------------- blocks

    @making(_remove)
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
        `prealloc`: the number of threads that populate memory which comes into use, also when the block grows, before
        notifiers are told of it (0: pages come when they are touched). `progress` is called after each slice. Memory
        for which a control group's limit (memory.max) has no room is refused beforehand.

        All of `max_length` is allocated (`RamBlock.whole`), and a warning logged, where a notifier cannot follow a
        resize, or where the process has no mapping left for a part (vm.max_map_count).

        Both lengths are multiples of the memory's page size; `used_length` may be 0. Raises ValueError for lengths that
        can never be right and for an id string that is taken, IoctlError when there is no address space or memory,
        ClosedError when the list is closed, and the exception of a notifier that refuses. There is no such block then.
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
        threads = check_threads(prealloc, "prealloc")
        with self._change:
            self._check_open()
            if idstr in self:
                raise ValueError(f"there is a RAM block '{idstr}' already")
            block = RamBlock(
                self,
                idstr=idstr,
                max_length=maximum,
                settings=MemorySettings() if settings is None else settings,
                resized=resized,
                memory=kind,
                readonly=readonly,
            )
            preallocate(block, self.kernel, threads=threads, progress=progress)
            self._begin(block, used)
        logger.debug("added %s", block)
        return block

    def _begin(self, block: RamBlock, used_length: int) -> None:
        """Have the first memory of a new block, and tell of it, or release the block."""
        try:
            _length(used_length, "used_length", block.page_size)
            for warning in block.state.memory.warnings:
                if not (block.readonly and isinstance(warning, CannotBePinnedWarning)):
                    _warn(warning)  # first: a program may have made warnings errors
            if stuck := next(filter(reaches_for_good, self._notifiers), None):
                block.state.become_whole(f"{stuck!r} cannot follow a resize")
            block.state.allocate(used_length)
            blocks = self._with(block)
            Added(block, self._notifiers)(partial(self._set_blocks, blocks))
        except BaseException as error:
            if isinstance(error, REACH_UNKNOWN):
                block.state.keep()
                logger.warning("the memory of %s is kept, since a device may still reach it: %s", block, error)
            block.state.leave()
            block.state.release()
            raise

    def _with(self, block: RamBlock) -> tuple[RamBlock, ...]:
        return tuple(sorted((*self._blocks, block), key=lambda other: other.state.start))

    def _set_blocks(self, blocks: tuple[RamBlock, ...]) -> None:
        self._blocks = blocks

    @guarded
    def remove(self, block: RamBlock) -> None:
        """Tell all notifiers, the newest first, and give the block's memory and address space back.

        Raises BufferError while a view of it lives, ClosedError when it has been removed, ValueError when it is in
        another list, and the exception of a notifier that refuses. The block then stays, and the notifiers that were
        told are told that it is there.
        """
        with self._change:
            self._check_block(block)
            block.state.check_views(0)

            def commit() -> None:
                block.state.check_views(0)  # a hook may have taken one
                self._drop(block)

            Removed(block, self._notifiers)(commit)
            block.state.release()
        logger.debug("removed %s", block)

    def _drop(self, block: RamBlock) -> None:
        self._blocks = tuple(other for other in self._blocks if other is not block)
        block.state.leave()

    @guarded
    def resize(self, block: RamBlock, used_length: int) -> OSError | None:
        """As `RamBlock.resize`; returns the error that kept memory from being given back."""
        if not isinstance(block, RamBlock) or block.state.removed or block.guard.lock is not self.guard.lock:
            self._check_block(block)
        state = block.state
        old, new = state.used_length, _length(used_length, "used_length", state.page_size)
        if new > state.max_length:
            raise ValueError(f"used_length {new:#x} is above max_length {state.max_length:#x} of '{block.idstr}'")
        if self.changing or self.handing is not None:
            self.check_unchanging()
        self.changing = True
        try:  # as `_change`, which would cost a tenth of it
            if new > old:
                state.grow(new, Resized(block, old, new, self._notifiers))
            elif new < old:
                return state.shrink(new, Resized(block, old, new, self._notifiers[::-1]))
        finally:
            self.changing = False
        return None

    @guarded
    def discard(self, block: RamBlock, offset: int, size: int) -> list[OSError]:
        """As `RamBlock.discard`; returns the errors that kept memory from being given back."""
        with self._change:
            self._check_block(block)
            return parts.discard(block, _part(block, offset, size), self._notifiers, self.discards)

    @guarded
    def populate(self, block: RamBlock, offset: int, size: int) -> None:
        """As `RamBlock.populate`."""
        with self._change:
            self._check_block(block)
            parts.populate(block, _part(block, offset, size), self._notifiers)

    @guarded
    def remap(self, block: RamBlock, offset: int, size: int) -> None:
        """As `RamBlock.remap`."""
        with self._change:
            self._check_block(block)
            if (wanted := _part(block, offset, size)).size:
                parts.remap(block, wanted, self._notifiers)

    # ---------------------------------------------------------------------------------------------- notifiers

    @guarded
    def add_notifier(self, notifier: RamBlockNotifier) -> None:
        """Tell `notifier` of every block there is, and from now on of every change, before all older ones.

        Raises TypeError for an object without hooks, ValueError when the list has the notifier already,
        UnsupportedError when it is told of blocks and cannot follow a resize, but there are blocks that can be resized,
        ClosedError when the list is closed, and the notifier's own exception. The notifier is then not in the list, and
        has been told that the blocks it knew are gone. If that fails too, RollbackError is raised, and the memory of
        all blocks is kept for ever: a device may still reach it.
        """
        if not isinstance(notifier, HOOKS):
            raise TypeError(
                f"{notifier!r} has none of ram_block_added, _removed, _resized, nor both of _discarded and _populated"
            )
        with self._change:
            self._check_open()
            self._check_follows(notifier)
            try:
                self._replay(notifier, list(map(Added, self._blocks)), "adding", (notifier, *self._notifiers))
            except REACH_UNKNOWN:
                for block in self._blocks:
                    block.state.keep()
                raise

    def _check_follows(self, notifier: RamBlockNotifier) -> None:
        if self.knows(notifier):
            raise ValueError(f"{notifier!r} is a notifier of this list already")
        if reaches_for_good(notifier) and (resizable := [block for block in self._blocks if not block.whole]):
            raise UnsupportedError(
                f"{notifier!r} is told of blocks and cannot follow a resize, and RAM block '{resizable[0].idstr}' is "
                "not fully allocated",
                hint="Add it before the blocks, which are allocated in full then, or give it ram_block_resized",
            )
        if reaches_whole_blocks(notifier) and (holed := [block for block in self._blocks if block.discarded]):
            raise parts.cannot_follow(notifier, f"and parts of RAM block '{holed[0].idstr}' are discarded")

    @guarded
    def remove_notifier(self, notifier: RamBlockNotifier) -> None:
        """Tell `notifier` that every block is gone, and tell it nothing more.

        Raises ValueError when the list does not have it, and the notifier's own exception. The notifier then stays, and
        is told again of the blocks that it was told are gone.
        """
        with self._change:
            if not self.knows(notifier):
                raise ValueError(f"{notifier!r} is not a notifier of this list")
            left = tuple(known for known in self._notifiers if known is not notifier)
            self._replay(notifier, list(map(Removed, reversed(self._blocks))), "removing", left)

    def _replay(
        self, notifier: RamBlockNotifier, changes: Sequence[Change], verb: str, notifiers: tuple[RamBlockNotifier, ...]
    ) -> None:
        """Tell it all of `changes`, and have those `notifiers` then; or neither."""
        tell_each(notifier, changes, f"{verb} a notifier", partial(self._set_notifiers, notifiers))

    def _set_notifiers(self, notifiers: tuple[RamBlockNotifier, ...]) -> None:
        self._notifiers = notifiers

    def knows(self, notifier: RamBlockNotifier) -> bool:
        """Whether `notifier` is told of changes of this list."""
        return any(known is notifier for known in self._notifiers)

    # --------------------------------------------------------------------------------------------- live update

    @guarded
    def follow(self, notifier: RamBlockNotifier) -> None:
        """Let `notifier` be the only one, which knows all blocks already. For a list that was received."""
        self._notifiers = (notifier,)

    @guarded
    def receive(self, block: RamBlock, *, used_length: int, discarded: Sequence[Extent]) -> None:
        """Take in a block whose memory another process has filled; this list has no notifier. Raises IoctlError."""
        block.state.receive(used_length, discarded)
        self._blocks = self._with(block)

    @guarded
    def forget(self) -> None:
        """Release the memory that this process has of all blocks, which are another process's, and tell no notifier."""
        for block in self._blocks:
            self._drop(block)
            block.state.release()
        self._notifiers = ()

    @guarded
    def suspend(self, by: object) -> None:
        """Refuse all changes until `resume`, as the blocks are being handed to another process."""
        self.check_unchanging()
        self.handing = by

    def resume(self, by: object) -> None:
        """Allow changes again, if it was `by` that had suspended them. Also in a forked child, where none is made."""
        if self.handing is by:
            self.handing = None

    # ------------------------------------------------------------------------------------------------- changes

    def _check_block(self, block: RamBlock) -> None:
        """Raise where it is no block of this list."""
        if not isinstance(block, RamBlock):
            raise TypeError(f"expected a RamBlock, not {block!r}")
        if block.state.removed:
            raise ClosedError(f"RAM block '{block.idstr}' has been removed")
        if block.guard.lock is not self.guard.lock:  # a block has that of its list
            raise ValueError(f"RAM block '{block.idstr}' is not in this list")

    def check_unchanging(self) -> None:
        """Raise where a change is being made, or all of them are refused."""
        if self.handing is not None:
            raise HandOverError(
                "the RAM blocks are being handed to another process, so that none of them can change",
                hint="cancel() or finish() of the HandOver says who has them from now on",
            )
        if self.changing:
            raise ReentrancyError(
                "the list of RAM blocks is being changed, and a notifier or callback tries to change it once more",
                hint="Let the hook return first, and make the change after that",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this list of RAM blocks has been closed")

    @closing
    def close(self) -> None:
        """Remove all blocks; twice is fine, and in a forked child nothing happens.

        The memory of a block of which a view lives stays until the last view goes; no device reaches it. Raises the
        exceptions of notifiers that refuse, after all other blocks are removed; `close` may then be called again.
        """
        self.check_unchanging()
        failures: list[Exception] = []
        self.closing = True
        try:
            with undoing:  # a signal handler must not leave the list half closed
                for block in self._blocks:
                    attempt(partial(self._close_block, block), failures)
        finally:
            self.closing = False
        raise_collected(f"{len(failures)} RAM blocks could not be removed", failures)
        self._closed = True

    def _close_block(self, block: RamBlock) -> None:
        with self._change:
            Removed(block, self._notifiers)(partial(self._drop, block))
            block.state.release()

    def _check(self) -> None:
        assert not self.changing
        starts = [block.vaddr for block in self._blocks]
        assert starts == sorted(starts)
        assert len({block.idstr for block in self._blocks}) == len(self._blocks)
        for block in self._blocks:
            block.state._check()
