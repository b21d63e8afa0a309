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

import logging
import operator
import os
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeAlias, TypeVar, runtime_checkable

from pyvfio.errors import (
    ClosedError,
    ForkedError,
    MemoryNotReturnedWarning,
    ReentrancyError,
    RollbackError,
    UnmapSizeError,
    VfioError,
    raise_collected,
)
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.memory import Exports, MemorySettings, Reservation
from pyvfio.units import PAGE_SIZE, Vaddr, format_size, is_aligned

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

ResizedCallback: TypeAlias = Callable[[str, int], None]
"""A block's own callback, given its id string and its new `used_length` (`RAMBlock.resized`)."""


@runtime_checkable
class SupportsRamBlockAdded(Protocol):
    """A notifier with this hook is told of every block, also of those that exist when it comes."""

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """`block` has come, or was there already. Raising refuses it."""
        ...


@runtime_checkable
class SupportsRamBlockRemoved(Protocol):
    """A notifier with this hook is told of every block that goes, and of all that remain when it goes itself."""

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """`block` is about to go. Raising keeps it."""
        ...


@runtime_checkable
class SupportsRamBlockResized(Protocol):
    """A notifier with this hook is told of every change of `used_length`."""

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """`block` changes from `old_length` to `new_length`; memory of both lengths is there. Raising refuses it, and
        whoever raises has left everything as it was, unless it raises RollbackError. Whoever returns reaches nothing
        behind `new_length` any more, whatever an earlier failure had left: that memory may now be given back."""
        ...


RamBlockNotifier: TypeAlias = SupportsRamBlockAdded | SupportsRamBlockRemoved | SupportsRamBlockResized
"""Whatever has at least one of the three hooks."""

_KEEP_MEMORY = (RollbackError, UnmapSizeError)  # after these nobody knows what a device still reaches


def _length(value: int, what: str) -> int:
    number = operator.index(value)
    if number < 0 or not is_aligned(number, PAGE_SIZE):
        raise ValueError(f"{what} must be a multiple of {PAGE_SIZE} bytes and not negative, not {number}")
    return number


class RamBlock:
    """Memory at `vaddr` that can be resized in place up to `max_length`. Made by `RamBlockList.add`.

    `used_length` bytes can be read and written, through `view()`, the buffer protocol (from Python 3.12 on) or
    `vaddr`; whatever lies behind cannot be touched. Zero is a legal length. New memory reads zero.

    Synchronization: lengths may be read by any thread at any time; resizing is serialized by the list.
    """

    __slots__ = (
        "__weakref__",
        "_exports",
        "_list",
        "_max_length",
        "_memory",
        "_pid",
        "_resized",
        "_start",
        "_used_length",
        "idstr",
    )

    def __init__(
        self,
        owner: RamBlockList,
        *,
        idstr: str,
        max_length: int,
        settings: MemorySettings | None,
        resized: ResizedCallback | None,
    ) -> None:
        self.idstr = idstr
        self._max_length = max_length
        self._list: RamBlockList | None = owner
        self._resized = resized
        self._used_length = 0
        self._exports = Exports()
        self._pid = os.getpid()
        self._memory = Reservation(owner.kernel, max_length=max_length, settings=settings)
        self._start = self._memory.vaddr  # stays when the memory goes: who looks the block up meanwhile goes by it

    @property
    def vaddr(self) -> Vaddr:
        """Where the block begins in this process: a multiple of 2 MiB that never changes. Raises ClosedError once the
        block is removed."""
        if not self._memory.vaddr:
            raise ClosedError(f"RAM block '{self.idstr}' has been removed")
        return self._memory.vaddr

    @property
    def used_length(self) -> int:
        """Bytes in use, from `vaddr` on."""
        return self._used_length

    @property
    def max_length(self) -> int:
        """Bytes of address space that are reserved: the most that `used_length` can be."""
        return self._max_length

    @property
    def page_size(self) -> int:
        """Lengths are multiples of this, in bytes."""
        return PAGE_SIZE

    @property
    def settings(self) -> MemorySettings:
        """The madvise settings that hold for all of the block's memory."""
        return self._memory.settings

    def resize(self, used_length: int) -> None:
        """Make the block `used_length` bytes long, tell all notifiers, and its `resized` callback last.

        The present length does nothing at all. Raises ValueError (misaligned, negative, above `max_length`) and
        BufferError (a live view reaches behind the new end) before any system call; IoctlError when there is no memory;
        whatever a notifier or the callback raises. The block is then as it was. RollbackError: neither the change nor
        its undo came to an end; the memory in question is kept. Warns MemoryNotReturnedWarning when a shrink could not
        give its memory back.

        Synchronization: takes the list's lock. Cost: some system calls, and what the notifiers do: O(used_length) for
        a DmaMapper that remaps.
        """
        self._owner()._resize(self, used_length)

    def remove(self) -> None:
        """As `RamBlockList.remove`."""
        self._owner().remove(self)

    def view(self) -> memoryview:
        """A writable memoryview of `[0, used_length)`.

        While it lives (or anything made from it: a slice, a numpy array), the block can grow, but neither shrink below
        the end of the view nor be removed: BufferError. `release()` it, or let go of it.
        """
        with self._owner()._lock:  # not in the middle of a shrink that another thread makes
            return self._exports.view(self.vaddr, self._used_length)

    def __buffer__(self, flags: int) -> memoryview:
        """`memoryview(block)` and `numpy.frombuffer(block)`, from Python 3.12 on."""
        del flags
        return self.view()

    def __repr__(self) -> str:
        where = f"vaddr={self._memory.vaddr:#x}" if self._memory.vaddr else "removed"
        return f"<RamBlock {self.idstr!r} {where} used={self._used_length:#x} max={self.max_length:#x}>"

    def _owner(self) -> RamBlockList:
        self._check_usable()
        if self._list is None:
            raise ClosedError(f"RAM block '{self.idstr}' has been removed")
        return self._list

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(f"RAM block '{self.idstr}'", owner=self._pid)

    def _check_views(self, end: int) -> None:
        reached = self._exports.end() - self.vaddr
        if reached > end:
            raise BufferError(
                f"RAM block '{self.idstr}' has a live view of {format_size(reached)}, so it cannot be "
                f"{'shrunk to ' + format_size(end) if end else 'emptied or removed'}; release the view first"
            )

    def _give_back(self) -> None:
        """After a grow that was undone: what it had activated goes, unless a hook has kept a view of it."""
        if self._memory.length == self._used_length or self._exports.end() > self._start + self._used_length:
            return
        try:
            self._memory.deactivate(self._used_length)
        except OSError as error:
            logger.warning("%s keeps what it was to grow by: %s", self, error)

    def _agree(self) -> None:
        """Nothing is in use that is not part of the block, wherever a change came to its end."""
        if self._memory.length > self._used_length:
            self._memory.retain(self._used_length)

    def _check(self) -> None:
        assert 0 <= self._used_length <= self.max_length
        assert self._memory.length == self._used_length
        self._memory._check()


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
        self._lock = threading.RLock()
        self._changing = False
        self._pid = os.getpid()

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
        settings: MemorySettings | None = None,
        resized: ResizedCallback | None = None,
    ) -> RamBlock:
        """Reserve `max_length` bytes, activate `used_length` of them, and tell all notifiers, the newest first.

        Both lengths are multiples of the page size; `used_length` may be 0. Raises ValueError for lengths that can
        never be right and for an id string that is taken, OSError or IoctlError when there is no address space or
        memory, and whatever a notifier raises; then there is no such block.
        """
        used, maximum = _length(used_length, "used_length"), _length(max_length, "max_length")
        if not used <= maximum or maximum == 0:
            raise ValueError(f"used_length {used:#x} must be at most max_length {maximum:#x}, which must not be 0")
        block = self._change(
            lambda: self._add(
                idstr, used_length=used, max_length=maximum, settings=settings or MemorySettings(), resized=resized
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
        settings: MemorySettings,
        resized: ResizedCallback | None,
    ) -> RamBlock:
        if any(block.idstr == idstr for block in self._blocks):
            raise ValueError(f"there is a RAM block '{idstr}' already")
        block = RamBlock(self, idstr=idstr, max_length=max_length, settings=settings, resized=resized)
        try:
            if used_length:
                block._memory.activate(used_length)
            block._used_length = used_length
            blocks = tuple(sorted((*self._blocks, block), key=lambda other: other._start))
            _tell(self._notifiers, _Added(block), f"adding RAM block '{idstr}'")
            self._blocks = blocks  # no call stands between, so that no signal handler can: it is told and known
        except BaseException as error:
            self._discard(block, error)
            raise
        return block

    @staticmethod
    def _discard(block: RamBlock, error: BaseException) -> None:
        block._list, block._used_length = None, 0
        if isinstance(error, _KEEP_MEMORY):
            block._memory.keep()
            logger.warning("the memory of %s is kept, since a device may still reach it: %s", block, error)
            return
        if block._exports.end():
            logger.warning("the memory of %s is kept, since a hook has kept a view of it", block)
            return
        try:
            block._memory.release()
        except OSError as failure:  # what the caller must hear of is why there is no block
            logger.warning("the address space of %s could not be given back: %s", block, failure)

    def remove(self, block: RamBlock) -> None:
        """Tell all notifiers, the newest first, and give the block's memory and address space back.

        Raises BufferError while a view of it lives, ValueError when it is not in this list, and whatever a notifier
        raises; then the block stays, and those who were told are told that it is there.
        """
        self._change(lambda: self._remove(block))
        logger.debug("removed %s", block)

    def _remove(self, block: RamBlock) -> None:
        if block not in self._blocks:
            raise ValueError(f"RAM block '{block.idstr}' is not in this list")
        block._check_views(0)
        blocks = tuple(other for other in self._blocks if other is not block)
        _tell(
            self._notifiers,
            _Removed(block),
            f"removing RAM block '{block.idstr}'",
            finally_check=lambda: block._check_views(0),
        )
        self._blocks, block._list, block._used_length = blocks, None, 0
        try:
            block._memory.release()
        except OSError as error:
            logger.warning("the address space of %s could not be given back: %s", block, error)

    def add_notifier(self, notifier: RamBlockNotifier) -> None:
        """Tell `notifier` of every block there is, and from now on of every change, before all older ones.

        Raises TypeError when it has none of the hooks, ValueError when it is in the list, and whatever it raises; then
        it is not in the list, and has been told that the blocks it knew are gone. When that fails too (RollbackError),
        the blocks' memory is never given back any more: nobody would tell whether a device still reaches it.
        """
        hooks = (SupportsRamBlockAdded, SupportsRamBlockRemoved, SupportsRamBlockResized)
        if not isinstance(notifier, hooks):
            raise TypeError(f"{notifier!r} has none of ram_block_added, ram_block_removed, ram_block_resized")
        self._change(lambda: self._add_notifier(notifier))

    def _add_notifier(self, notifier: RamBlockNotifier) -> None:
        if any(known is notifier for known in self._notifiers):
            raise ValueError(f"{notifier!r} is a notifier of this list already")
        notifiers = [notifier, *self._notifiers]
        try:
            self._replay(notifier, [_Added(block) for block in self._blocks], "adding a notifier")
        except _KEEP_MEMORY:
            for block in self._blocks:
                block._memory.keep()
            raise
        self._notifiers = notifiers

    def remove_notifier(self, notifier: RamBlockNotifier) -> None:
        """Tell `notifier` that every block is gone, and tell it nothing more.

        Raises ValueError when it is not in the list, and whatever it raises; then it stays, and is told again of the
        blocks that it was told are gone.
        """
        self._change(lambda: self._remove_notifier(notifier))

    def _remove_notifier(self, notifier: RamBlockNotifier) -> None:
        if not any(known is notifier for known in self._notifiers):
            raise ValueError(f"{notifier!r} is not a notifier of this list")
        notifiers = [known for known in self._notifiers if known is not notifier]
        self._replay(notifier, [_Removed(block) for block in reversed(self._blocks)], "removing a notifier")
        self._notifiers = notifiers

    @staticmethod
    def _replay(notifier: RamBlockNotifier, events: Sequence[_Event], what: str) -> None:
        told: list[_Event] = []
        try:
            for event in events:
                event.tell(notifier)
                told.append(event)
        except BaseException as error:
            _undo([(notifier, event) for event in told], error, what)
            raise

    def _resize(self, block: RamBlock, used_length: int) -> None:
        new = _length(used_length, "used_length")
        if new > block.max_length:
            raise ValueError(f"used_length {new:#x} is above max_length {block.max_length:#x} of '{block.idstr}'")
        kept = self._change(lambda: self._resize_to(block, new))
        if kept is not None:
            # Last, since a program may have made warnings errors: by now everything is in order.
            warnings.warn(
                f"RAM block '{block.idstr}' shrank to {format_size(new)}, but {format_size(block._memory.retained)} "
                f"could not be given back: {kept}. The limit vm.max_map_count may be reached",
                MemoryNotReturnedWarning,
                stacklevel=3,
            )

    def _resize_to(self, block: RamBlock, new: int) -> OSError | None:
        if block._list is None:
            raise ClosedError(f"RAM block '{block.idstr}' has been removed")
        old = block._used_length
        if new == old:
            return None
        kept: OSError | None = None
        try:
            if new > old:
                self._grow(block, old, new)
            else:
                kept = self._shrink(block, old, new)
        finally:
            block._agree()
        logger.debug("resized %s from %#x", block, old)
        return kept

    def _grow(self, block: RamBlock, old: int, new: int) -> None:
        try:
            block._memory.activate(new)
            self._commit(block, old, new, self._notifiers)
        except _KEEP_MEMORY:
            raise  # and retain: a device may still reach it
        except BaseException:
            block._give_back()
            raise

    def _shrink(self, block: RamBlock, old: int, new: int) -> OSError | None:
        block._check_views(new)
        self._commit(block, old, new, self._notifiers[::-1])
        try:
            block._memory.deactivate(new)
        except OSError as error:
            return error
        return None

    @staticmethod
    def _commit(block: RamBlock, old: int, new: int, notifiers: Sequence[RamBlockNotifier]) -> None:
        """Tell `notifiers`, change `used_length`, call the block's callback; or nothing of it."""
        what = f"resizing RAM block '{block.idstr}' from {format_size(old)} to {format_size(new)}"
        event = _Resized(block, old, new)
        _tell(notifiers, event, what, finally_check=lambda: block._check_views(new))
        block._used_length = new
        if block._resized is None:
            return
        try:
            block._resized(block.idstr, new)
        except BaseException as error:
            block._used_length = old
            _undo([(notifier, event) for notifier in notifiers], error, what)
            raise

    def _change(self, action: Callable[[], _Result]) -> _Result:
        # Not a context manager: a signal handler that raises between its entry and the block would leave it entered.
        if os.getpid() != self._pid:
            raise ForkedError("this list of RAM blocks", owner=self._pid)
        with self._lock:
            self._check_settled()
            try:
                self._changing = True
                return action()
            finally:
                self._changing = False

    def _check_settled(self) -> None:
        if self._changing:
            raise ReentrancyError(
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
            self._check_settled()
            for block in self._blocks:
                try:
                    self.remove(block)
                except Exception as error:
                    failures.append(error)
        raise_collected(f"{len(failures)} RAM blocks could not be removed", failures)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        assert not self._changing
        assert [block.vaddr for block in self._blocks] == sorted(block._start for block in self._blocks)
        assert len({block.idstr for block in self._blocks}) == len(self._blocks)
        for block in self._blocks:
            assert block._list is self
            block._check()


class _Event(Protocol):
    """Something a notifier is told, and its opposite."""

    def tell(self, notifier: RamBlockNotifier) -> None: ...

    def revoke(self, notifier: RamBlockNotifier) -> None: ...


class _Added:
    def __init__(self, block: RamBlock) -> None:
        self._block = block

    def tell(self, notifier: RamBlockNotifier) -> None:
        if isinstance(notifier, SupportsRamBlockAdded):
            notifier.ram_block_added(self._block, self._block.used_length, self._block.max_length)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        if isinstance(notifier, SupportsRamBlockRemoved):
            notifier.ram_block_removed(self._block, self._block.used_length, self._block.max_length)


class _Removed(_Added):
    tell, revoke = _Added.revoke, _Added.tell


class _Resized:
    def __init__(self, block: RamBlock, old: int, new: int) -> None:
        self._block, self._old, self._new = block, old, new

    def tell(self, notifier: RamBlockNotifier) -> None:
        if isinstance(notifier, SupportsRamBlockResized):
            notifier.ram_block_resized(self._block, self._old, self._new)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        if isinstance(notifier, SupportsRamBlockResized):
            notifier.ram_block_resized(self._block, self._new, self._old)


def _tell(
    notifiers: Sequence[RamBlockNotifier],
    event: _Event,
    what: str,
    *,
    finally_check: Callable[[], None] = lambda: None,
) -> None:
    """Tell all of them, or none: when one raises, those before it are told the opposite, the last told first.

    `finally_check` refuses for what the hooks have done meanwhile: a view that one has taken, for instance.
    """
    told: list[tuple[RamBlockNotifier, _Event]] = []
    try:
        for notifier in notifiers:
            event.tell(notifier)
            told.append((notifier, event))
        finally_check()
    except BaseException as error:
        _undo(told, error, what)
        raise


def _undo(told: Sequence[tuple[RamBlockNotifier, _Event]], cause: BaseException, what: str) -> None:
    failures: list[Exception] = []
    for notifier, event in reversed(told):
        try:
            event.revoke(notifier)
        except BaseException as error:  # a KeyboardInterrupt, too, must not end the undo in the middle
            failures.append(_as_exception(error))
    if failures:
        raise RollbackError(
            f"{what} failed, and so did its undo",
            [_as_exception(cause), *failures],
            hint="The memory in question is kept, since a device may still reach it",
        ) from cause


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else VfioError(f"interrupted by {type(error).__name__}")
