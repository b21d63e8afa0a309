"""RAM blocks that grow and shrink in place, and notifiers that are called before their memory changes.

A `RamBlock` reserves `max_length` bytes of address space, of which `[0, used_length)` are memory. A `RamBlockList`
holds the blocks and calls notifiers for every block that is added, removed or resized. `DmaMapper` is such a notifier;
this module does not depend on `DmaMapper`.

At every instant, also when a notifier, a callback or the kernel refuses a step:

    memory of which a notifier knows  ⊆  memory that is activated

A grow activates memory, and then notifies. A shrink notifies, and then releases memory. The undo runs backwards. The
steps are in `pyvfio.blocks.state`; this module checks arguments, orders the steps and notifies.

Source: `qemu_ram_resize`, `RAMBlockNotifier` (include/exec/ramlist.h) and patches 1, 13 and 16 of the series "Ram
blocks with resizable anonymous allocations under POSIX" (QEMU, 2020). In that series no notifier can refuse. Here each
notifier can, by raising.
"""

from __future__ import annotations

import logging
import operator
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from types import TracebackType

from pyvfio.arguments import checked_kernel
from pyvfio.blocks import parts
from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.change import Added, Change, Removed, Resized, tell_each
from pyvfio.blocks.discards import DiscardGuard
from pyvfio.blocks.index import BlockIndex
from pyvfio.blocks.notifier import (
    RamBlockNotifier,
    check_called,
    check_hooks,
    reaches_for_good,
    reaches_whole_blocks,
)
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
from pyvfio.kernel import Kernel
from pyvfio.memory import Anonymous, MemoryKind, MemorySettings
from pyvfio.memory.prefault import check_threads
from pyvfio.unique import Unique
from pyvfio.units import align_up, as_number, check_bool

__all__ = ["RamBlock", "RamBlockList", "RamBlockNotifier", "ResizedCallback"]

logger = logging.getLogger(__name__)

_ANONYMOUS = Anonymous()


def _warn(warning: Warning) -> None:
    """Warn with the line of the program as the location. Frames of this package are skipped."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("pyvfio."):
        frame, level = frame.f_back, level + 1
    warnings.warn(warning, stacklevel=level)


def _length(value: int, what: str, page_size: int) -> int:
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
        raise ValueError(f"idstr is used in file names and must not contain NUL: {idstr!r}")
    if not isinstance(settings, MemorySettings | None):
        raise TypeError(f"settings must be a MemorySettings(), not {settings!r}")
    if not all(callback is None or callable(callback) for callback in callbacks):
        raise TypeError("progress and resized must be callable or None")
    for callback in callbacks:
        check_called(callback, "progress or resized")


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
    """A context for a change of a list, under the list's lock. A list makes one change at a time.

    The context has no state of its own, so each list has one object.
    """

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


class RamBlockList(ContextManager, Unique):
    """The RAM blocks of a program, and the notifiers that follow the blocks.

    `kernel` makes the system calls on memory (None: the running kernel). The list is a context manager: the end of the
    `with` block removes all blocks.

    Synchronization: any thread may call any method. The list makes one change at a time. A change in a notifier's hook
    raises ReentrancyError; a `close` in a hook is deferred to the end of the change. A loop over the list iterates over
    the blocks at the start of the loop.
    Cost: O(log n) to add, find or remove one of n blocks.

    Example:
        >>> import pyvfio
        >>> blocks = pyvfio.RamBlockList()
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
        >>> len(blocks), "ring" in blocks, blocks["ring"] is ring
        (1, True, True)
        >>> class Printer:
        ...     def ram_block_resized(self, block, old_length, new_length):
        ...         print(f"{block.idstr}: {old_length:#x} -> {new_length:#x}")
        >>> blocks.add_notifier(Printer())
        >>> ring.resize(3 * pyvfio.MIB)
        ring: 0x200000 -> 0x300000
        >>> blocks.close()
    """

    def __init__(self, *, kernel: Kernel | None = None) -> None:
        self.kernel: Kernel = checked_kernel(kernel)
        self.guard = Guard("this list of RAM blocks")
        self._blocks = BlockIndex()
        self._notifiers: tuple[RamBlockNotifier, ...] = ()  # newest first, as QLIST_INSERT_HEAD leaves them
        self.changing = False
        """Whether a change is in progress."""
        self._change = _Change(self)
        self.handing: object | None = None
        """The hand-over of the blocks to another process, while in progress; otherwise None."""
        self._closed = False
        self.closing = False
        """Whether `close` is removing all blocks, including blocks with parts in use."""
        self.discards = DiscardGuard()
        """The claims on discarding memory: who needs discards, and who forbids them."""

    def __iter__(self) -> Iterator[RamBlock]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, item: object) -> bool:
        """Return whether a block, or a block with that id string, is in the list."""
        if isinstance(item, str):
            return self._blocks.named(item) is not None
        return isinstance(item, RamBlock) and self._blocks.named(item.idstr) is item

    def __getitem__(self, idstr: str) -> RamBlock:
        """Return the block with that id string. Raises KeyError."""
        block = self._blocks.named(idstr)
        if block is not None:
            return block
        there = ", ".join(repr(block.idstr) for block in islice(self._blocks, 8)) or "none"
        raise KeyError(f"no RAM block is named {idstr!r}; the list has {there}")

    def __repr__(self) -> str:
        blocks = ", ".join(
            f"{block.idstr!r} {block.state.start:#x}+{block.used_length:#x}" for block in islice(self._blocks, 8)
        )
        more = ", …" if len(self._blocks) > 8 else ""
        count = f"{len(self._blocks)} block{'' if len(self._blocks) == 1 else 's'}"
        notifiers = f"{len(self._notifiers)} notifier{'' if len(self._notifiers) == 1 else 's'}"
        state = "closed" if self._closed else count
        return f"<RamBlockList {state}{': ' if blocks else ''}{blocks}{more}, {notifiers}>"

    @property
    def notifiers(self) -> tuple[RamBlockNotifier, ...]:
        """The notifiers, the newest first."""
        return self._notifiers

    def block_at(self, vaddr: int) -> RamBlock | None:
        """Return the block whose reserved address space contains `vaddr`, or None. Cost: O(log n).

        Source: `qemu_ram_block_from_host`.
        """
        vaddr = as_number(vaddr, "vaddr")
        block = self._blocks.below(vaddr)
        if block is None or vaddr >= block.state.start + block.state.max_length:
            return None
        return block

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
        """Add a block: reserve `max_length` bytes, activate `used_length` of them, and notify, newest notifier first.

        `used_length` and `max_length`: in bytes, multiples of the page size of the memory. `used_length` can be 0.
        `memory`: private anonymous memory (`Anonymous()`, the default), a new memfd (`Memfd()`, also of huge pages) or
        an open file (`File(fd)`).
        `readonly`: devices get read access only.
        `prealloc`: the number of threads that populate new memory before notifiers are called, also when the block
        grows. 0: pages are allocated on first access. `progress` is called after each populated slice. Memory that
        exceeds the limit of a control group (memory.max) is refused in advance.

        In two cases all of `max_length` is allocated (`RamBlock.whole`), and a warning is logged: a notifier cannot
        follow a resize, or vm.max_map_count permits no further split of a mapping.

        Raises ValueError for invalid lengths and for an id string in use. Raises IoctlError if address space or memory
        is exhausted, ClosedError if the list is closed, and the exception of a notifier that refuses. After an error
        the list has no such block.

        Example:
            >>> import pyvfio
            >>> blocks = pyvfio.RamBlockList()
            >>> ring = blocks.add("ring", used_length=4096, max_length=pyvfio.GIB)
            >>> shared = blocks.add("shared", used_length=0, max_length=pyvfio.GIB, memory=pyvfio.Memfd())
            >>> blocks["ring"].used_length, blocks["shared"].used_length
            (4096, 0)
            >>> blocks.close()
        """
        kind: MemoryKind = _ANONYMOUS if memory is None else memory
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
                raise ValueError(f"the list already has a RAM block '{idstr}'")
            block = RamBlock(
                self,
                idstr=idstr,
                max_length=maximum,
                settings=settings,
                resized=resized,
                memory=kind,
                readonly=readonly,
            )
            preallocate(block, self.kernel, threads=threads, progress=progress)
            self._begin(block, used)
        logger.debug("added %s", block)
        return block

    def _begin(self, block: RamBlock, used_length: int) -> None:
        """Activate the first memory of a new block and notify. After an error, release the block."""
        try:
            _length(used_length, "used_length", block.page_size)
            for warning in block.state.memory.warnings:
                if not (block.readonly and isinstance(warning, CannotBePinnedWarning)):
                    _warn(warning)  # before any other step: a warning filter can turn a warning into an exception
            if stuck := next(filter(reaches_for_good, self._notifiers), None):
                block.state.become_whole(f"{stuck!r} cannot follow a resize")
            block.state.allocate(used_length)
            Added(block, self._notifiers)(partial(self._blocks.add, block))
        except BaseException as error:
            if isinstance(error, REACH_UNKNOWN):
                block.state.keep()
                logger.warning("the memory of %s is kept: a device may still reach this memory: %s", block, error)
            block.state.leave()
            block.state.release()
            raise

    @guarded
    def remove(self, block: RamBlock) -> None:
        """Remove a block: notify, newest notifier first, and release the memory and the address space of the block.

        Raises BufferError while a view of the block exists. Raises ClosedError if the block has been removed,
        ValueError if the block is in another list, and the exception of a notifier that refuses. After an error the
        block stays, and the notifiers that have been called are notified that the block is added.
        """
        with self._change:
            self._check_block(block)
            block.state.check_views(0)

            def commit() -> None:
                block.state.check_views(0)  # again: a hook may have made a view
                self._drop(block)

            Removed(block, self._notifiers)(commit)
            block.state.release()
        logger.debug("removed %s", block)

    def _drop(self, block: RamBlock) -> None:
        self._blocks.remove(block)
        block.state.leave()

    @guarded
    def resize(self, block: RamBlock, used_length: int) -> OSError | None:
        """Resize a block as `RamBlock.resize`. Return the error, if memory could not be returned to the system."""
        if not isinstance(block, RamBlock) or block.state.removed or block.owner is not self:
            self._check_block(block)
        state, new = block.state, used_length
        if type(new) is not int or new < 0 or new % state.page_size:
            new = _length(used_length, "used_length", state.page_size)
        old = state.used_length
        if new > state.max_length:
            raise ValueError(f"used_length {new:#x} is above max_length {state.max_length:#x} of '{block.idstr}'")
        if self.changing or self.handing is not None:
            self.check_unchanging()
        self.changing = True
        try:  # the code of `_change`, which would add a tenth to the cost
            if new > old:
                state.grow(new, Resized(block, old, new, self._notifiers))
            elif new < old:
                return state.shrink(new, Resized(block, old, new, self._notifiers[::-1]))
        finally:
            self.changing = False
        return None

    @guarded
    def discard(self, block: RamBlock, offset: int, size: int) -> list[OSError]:
        """Discard memory as `RamBlock.discard`. Return the errors, if memory could not be returned to the system."""
        with self._change:
            self._check_block(block)
            return parts.discard(block, _part(block, offset, size), self._notifiers, self.discards)

    @guarded
    def populate(self, block: RamBlock, offset: int, size: int) -> None:
        """Populate memory as `RamBlock.populate`."""
        with self._change:
            self._check_block(block)
            parts.populate(block, _part(block, offset, size), self._notifiers)

    @guarded
    def remap(self, block: RamBlock, offset: int, size: int) -> None:
        """Replace pages as `RamBlock.remap`."""
        with self._change:
            self._check_block(block)
            if (wanted := _part(block, offset, size)).size:
                parts.remap(block, wanted, self._notifiers)

    # ---------------------------------------------------------------------------------------------- notifiers

    @guarded
    def add_notifier(self, notifier: RamBlockNotifier) -> None:
        """Add a notifier. Call its hook for every block now, and for every change from now on, before older notifiers.

        Raises TypeError for an object without hooks, for a class, and for hooks that are coroutine functions. Raises
        ValueError if the notifier is already in the list, and ClosedError if the list is closed. Raises
        UnsupportedError if the notifier has a hook for blocks but none for resizes, and a block can be resized. Raises
        the notifier's own exception.

        After an error the notifier is not in the list, and has been notified that the blocks it knew are removed. If
        that fails too, RollbackError is raised, and the memory of all blocks is kept permanently: a device may still
        reach this memory.
        """
        check_hooks(notifier)
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
            raise ValueError(f"{notifier!r} is already a notifier of this list")
        if reaches_for_good(notifier) and (resizable := [block for block in self._blocks if not block.whole]):
            raise UnsupportedError(
                f"{notifier!r} follows blocks but not resizes, and RAM block '{resizable[0].idstr}' is not fully "
                "allocated",
                hint="Add the notifier before the blocks, which are then fully allocated, or give the notifier a "
                "ram_block_resized hook",
            )
        if reaches_whole_blocks(notifier) and (holed := [block for block in self._blocks if block.state.discarded]):
            raise parts.cannot_follow(notifier, f"and parts of RAM block '{holed[0].idstr}' are discarded")

    @guarded
    def remove_notifier(self, notifier: RamBlockNotifier) -> None:
        """Remove a notifier, and notify it that every block is removed. No later change calls its hooks.

        Raises ValueError if the notifier is not in the list, and the notifier's own exception. After an error the
        notifier stays in the list, and is notified that the blocks in question are added.
        """
        with self._change:
            if not self.knows(notifier):
                raise ValueError(f"{notifier!r} is not a notifier of this list")
            left = tuple(known for known in self._notifiers if known is not notifier)
            self._replay(notifier, list(map(Removed, reversed(tuple(self._blocks)))), "removing", left)

    def _replay(
        self, notifier: RamBlockNotifier, changes: Sequence[Change], verb: str, notifiers: tuple[RamBlockNotifier, ...]
    ) -> None:
        """Notify of all `changes` and then set `notifiers`, or do neither."""
        tell_each(notifier, changes, f"{verb} a notifier", partial(self._set_notifiers, notifiers))

    def _set_notifiers(self, notifiers: tuple[RamBlockNotifier, ...]) -> None:
        self._notifiers = notifiers

    def knows(self, notifier: RamBlockNotifier) -> bool:
        """Return whether `notifier` is a notifier of this list."""
        return any(known is notifier for known in self._notifiers)

    # --------------------------------------------------------------------------------------------- live update

    @guarded
    def follow(self, notifier: RamBlockNotifier) -> None:
        """Make `notifier`, which already knows all blocks, the only notifier. For a list that was received."""
        self._notifiers = (notifier,)

    @guarded
    def receive(self, block: RamBlock, *, used_length: int, discarded: Sequence[Extent]) -> None:
        """Add a block whose memory another process has filled. The list must have no notifier. Raises IoctlError."""
        block.state.receive(used_length, discarded)
        self._blocks.add(block)

    @guarded
    def forget(self) -> None:
        """Release this process's memory of all blocks, which another process owns now. No notifier is called."""
        for block in self._blocks:
            self._drop(block)
            block.state.release()
        self._notifiers = ()

    @guarded
    def suspend(self, by: object) -> None:
        """Refuse all changes until `resume`, during a hand-over to another process."""
        self.check_unchanging()
        self.handing = by

    def resume(self, by: object) -> None:
        """Allow changes again, if `by` suspended them. Also works in a forked child, where no change is possible."""
        if self.handing is by:
            self.handing = None

    # ------------------------------------------------------------------------------------------------- changes

    def _check_block(self, block: RamBlock) -> None:
        """Raise TypeError, ClosedError or ValueError unless `block` is in this list."""
        if not isinstance(block, RamBlock):
            raise TypeError(f"expected a RamBlock, not {block!r}")
        if block.state.removed:
            raise ClosedError(f"RAM block '{block.idstr}' has been removed")
        if block.owner is not self:
            raise ValueError(f"RAM block '{block.idstr}' is not in this list")

    def check_unchanging(self) -> None:
        """Raise ReentrancyError during a change, and HandOverError while changes are suspended."""
        if self.handing is not None:
            raise HandOverError(
                "the RAM blocks are being handed to another process, and cannot change",
                hint="Call cancel() or finish() of the HandOver, which hand_over(mapper) returns again: the call "
                "decides which process owns the blocks",
            )
        if self.changing:
            raise ReentrancyError(
                "a notifier or callback tries to change the list of RAM blocks during a change of this list",
                hint="Return from the hook first, and make the second change afterwards",
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this list of RAM blocks has been closed")

    @closing
    def close(self) -> None:
        """Remove all blocks. Does nothing if already closed, or in a forked child.

        If a view of a block exists, the memory of the block is kept until the last view is released; no device reaches
        this memory. Raises the exceptions of notifiers that refuse, after all other blocks are removed. `close` can
        then be called again.
        """
        self.check_unchanging()
        failures: list[Exception] = []
        self.closing = True
        try:
            with undoing:  # a signal handler must not leave the list partly closed
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
        self._blocks._check()
        for block in self._blocks:
            block.state._check()
