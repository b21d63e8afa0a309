"""A RAM block: memory at one address that is resized in place, and parts of it that are given back meanwhile.

Made by `pyvfio.ramblock.RamBlockList.add`, which also makes all changes, for there are others to be told of them.

Source: `RAMBlock` (include/exec/ramblock.h), and RamDiscardManager (include/exec/memory.h) for the parts.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from pyvfio.errors import ClosedError, DiscardError, ForkedError
from pyvfio.extents import Extent, clip, runs, total, without
from pyvfio.kernel import Kernel
from pyvfio.memory import Exports, MemoryKind, MemorySettings, Reservation
from pyvfio.units import Vaddr, format_size

logger = logging.getLogger(__name__)

ResizedCallback: TypeAlias = Callable[[str, int], None]
"""A block's own callback, given its id string and its new `used_length` (`RAMBlock.resized`)."""


class _Owner(Protocol):
    """The list that a block is in."""

    kernel: Kernel
    _lock: threading.RLock

    def _resize(self, block: RamBlock, used_length: int) -> None: ...

    def _discard(self, block: RamBlock, offset: int, size: int) -> None: ...

    def _populate(self, block: RamBlock, offset: int, size: int) -> None: ...

    def _remap(self, block: RamBlock, offset: int, size: int) -> None: ...

    def remove(self, block: RamBlock) -> None: ...


class Preallocation(Protocol):
    """Sees to it that there are pages behind parts, (start, end) in bytes."""

    def check(self, parts: Sequence[tuple[int, int]]) -> None:
        """Raises IoctlError where there certainly is no memory for them."""
        ...

    def populate(self, parts: Sequence[tuple[int, int]]) -> None:
        """Have them. Raises IoctlError."""
        ...


class FileRange(NamedTuple):
    """Memory that is a file's: `size` bytes at `vaddr` are those from `offset` on of the file behind `fd`."""

    fd: int
    offset: int
    vaddr: Vaddr
    size: int


class RamBlock:
    """Memory at `vaddr` that can be resized in place up to `max_length`. Made by `RamBlockList.add`.

    `used_length` bytes can be read and written, through `view()`, the buffer protocol (from Python 3.12 on) or
    `vaddr`; whatever lies behind cannot be touched. Zero is a legal length. New memory reads zero.

    Synchronization: lengths may be read by any thread at any time; resizing is serialized by the list.
    """

    __slots__ = (
        "__weakref__",
        "_discarded",
        "_doubtful",
        "_exports",
        "_list",
        "_max_length",
        "_memory",
        "_pid",
        "_prealloc",
        "_resized",
        "_stale",
        "_start",
        "_used_length",
        "idstr",
        "page_size",
        "prealloc",
        "readonly",
        "whole",
    )

    def __init__(
        self,
        owner: _Owner,
        *,
        idstr: str,
        max_length: int,
        settings: MemorySettings | None,
        resized: ResizedCallback | None,
        memory: MemoryKind | None = None,
        readonly: bool = False,
    ) -> None:
        self.idstr = idstr
        self._max_length = max_length
        self._list: _Owner | None = owner
        self._resized = resized
        self.whole = False
        """Whether all of `max_length` is memory, since a listener cannot follow a resize or a part could not be had:
        lengths change then, and nothing is given back."""
        self._used_length = 0
        self._discarded: tuple[Extent, ...] = ()  # ascending, disjoint, within [0, used_length)
        self._stale: tuple[Extent, ...] = ()  # of that, what is still to be dropped
        self._doubtful: tuple[Extent, ...] = ()  # where it is discarded, a device may reach it: an undo has failed
        self._prealloc: Preallocation | None = None
        self.prealloc = 0
        """How many threads have pages behind whatever comes into use (0: pages come when they are touched)."""
        self._exports = Exports()
        self._pid = os.getpid()
        self._memory = Reservation(owner.kernel, max_length=max_length, settings=settings, kind=memory, idstr=idstr)
        self.page_size = self._memory.page_size
        """Lengths, and parts that are discarded, are multiples of this, in bytes."""
        self.readonly = readonly or self._memory.readable_only
        """Whether a device may only read it."""
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
    def discarded(self) -> tuple[Extent, ...]:
        """What has been discarded of `[0, used_length)` and not been populated since: (start, end) in bytes."""
        return self._discarded

    @property
    def populated(self) -> tuple[Extent, ...]:
        """What devices reach: `[0, used_length)` less what has been discarded; (start, end) in bytes."""
        return tuple(self._populated(self._used_length))

    def _populated(self, length: int) -> list[Extent]:
        """As it is or will be with that length."""
        if not self._discarded:
            # Extent(0, length) costs twice as much, and each resize makes one.
            return [tuple.__new__(Extent, (0, length))] if length else []
        return without([Extent(0, length)], *self._discarded)

    @property
    def file(self) -> FileRange | None:
        """The file that `[0, used_length)` is of, for whoever maps files; None for anonymous memory. The descriptor is
        the block's, or the caller's who gave it."""
        found = self._memory.file
        return None if found is None else FileRange(*found, self.vaddr, self._used_length)

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

    def discard(self, offset: int, size: int) -> None:
        """Give `[offset, offset + size)` back and let no device reach it, until it is populated again: what a balloon
        and virtio-mem do to memory that a guest does not use.

        The process may go on touching it, and reads zeros then. What is discarded already stays so, and nothing is done
        where all of it is. Raises ValueError (misaligned, outside of `used_length`) before any system call;
        DiscardError where somebody has ruled it out or a notifier could not follow; whatever a notifier raises, and the
        block is then as it was; RollbackError as `resize`. Warns MemoryNotReturnedWarning when the memory could not be
        given back: it is filled with zeros then.

        Synchronization: takes the list's lock. Cost: one madvise(2) for each part, and what the notifiers do. Source:
        `ram_block_discard_range` and `ram_discard_manager_notify_discard` of QEMU.
        """
        self._owner()._discard(self, offset, size)

    def populate(self, offset: int, size: int) -> None:
        """Let devices reach `[offset, offset + size)` again; it reads zeros where nobody has written since.

        Does nothing where nothing of it is discarded. Raises as `discard`, but for DiscardError.
        """
        self._owner()._populate(self, offset, size)

    def remap(self, offset: int, size: int) -> None:
        """Put fresh pages behind `[offset, offset + size)`, and let devices reach those: what is left to do when memory
        has failed, of which a touch is SIGBUS, and a device that has pinned it goes on reaching the failed page.

        Address, IOVA and settings stay, contents are lost: it reads zeros, or what a caller's file holds, also for a
        private mapping. A shared file of the caller's is given fresh pages only with `punch=True`; without, the kernel
        may read a page from the disk again that had not been changed. What is discarded of it stays given back. The
        part is out of the devices' reach meanwhile, and so are, where the kernel unmaps whole mappings only, the bytes
        that are mapped in one piece with it.

        Raises ValueError (misaligned, outside of `used_length`) and UnsupportedError (a notifier could not follow)
        before any system call, and DiscardError where a part is discarded that a failed `populate` may have left to a
        device; GapError where a mapper may let nothing else out of reach; IoctlError when there are no fresh pages, and
        whatever a notifier raises; devices then reach what they did. RollbackError: they reach less than the block has,
        until it is remapped or resized once more.

        Synchronization: takes the list's lock. Cost: up to three system calls, and what the notifiers do. Source:
        `qemu_ram_remap` (system/physmem.c of QEMU); MADV_HWPOISON in madvise(2) lets it be tried.
        """
        self._owner()._remap(self, offset, size)

    def remove(self) -> None:
        """As `RamBlockList.remove`."""
        self._owner().remove(self)

    def view(self) -> memoryview:
        """A memoryview of `[0, used_length)`, writable unless the memory is a file that is open for reading only.

        While it lives (or anything made from it: a slice, a numpy array), the block can grow, but neither shrink below
        the end of the view nor be removed: BufferError. `release()` it, or let go of it.
        """
        self._check_usable()
        with self._owner()._lock:  # not in the middle of a shrink that another thread makes
            view = self._exports.view(self.vaddr, self._used_length)
            return view.toreadonly() if self._memory.readable_only else view

    def __buffer__(self, flags: int) -> memoryview:
        """`memoryview(block)` and `numpy.frombuffer(block)`, from Python 3.12 on."""
        del flags
        return self.view()

    def __repr__(self) -> str:
        where = f"vaddr={self._memory.vaddr:#x}" if self._memory.vaddr else "removed"
        return f"<RamBlock {self.idstr!r} {where} used={self._used_length:#x} max={self.max_length:#x}>"

    def _owner(self) -> _Owner:
        if self._list is None:
            raise ClosedError(f"RAM block '{self.idstr}' has been removed")
        return self._list

    def _set_discarded(self, discarded: tuple[Extent, ...], stale: tuple[Extent, ...]) -> None:
        self._discarded, self._stale = discarded, stale

    def _check_out_of_reach(self, parts: Sequence[Extent]) -> None:
        """DiscardError where a device may reach some of `parts`, which are discarded."""
        doubtful = [found for part in parts for found in clip(self._doubtful, *part)]
        if doubtful:
            raise DiscardError(
                f"{format_size(total(doubtful))} of RAM block '{self.idstr}' are discarded, and a device may reach "
                "them all the same",
                hint="Populate them, which failed before, and so did its undo",
            )

    def _check_usable(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(f"RAM block '{self.idstr}'", owner=self._pid)

    def _check_views(self, end: int) -> None:
        reached = self._exports.end()
        if reached and (reached := reached - self.vaddr) > end:
            raise BufferError(
                f"RAM block '{self.idstr}' has a live view of {format_size(reached)}, so it cannot be "
                f"{'shrunk to ' + format_size(end) if end else 'emptied or removed'}; release the view first"
            )

    def _give_back(self) -> None:
        """After a grow that was undone: what it had activated goes, unless a hook has kept a view of it or a device may
        reach it since an earlier undo failed, for this one has left everything as it was."""
        if self.whole or self._memory.length == self._used_length or self._memory.held > self._used_length:
            return
        if self._exports.end() > self._start + self._used_length:
            return
        try:
            self._memory.deactivate(self._used_length, undo=True)
        except OSError as error:
            logger.warning("%s keeps what it was to grow by: %s", self, error)

    def _release(self) -> None:
        """The block is gone, and so is its memory, or at least nobody uses it."""
        try:
            self._memory.release()
        except OSError as error:
            logger.warning("the address space of %s could not be given back: %s", self, error)
            self._memory.abandon()

    def _agree(self) -> None:
        """Nothing is in use that is not part of the block, wherever a change came to its end."""
        if self._memory.length > self._used_length and not self.whole:
            self._memory.retain(self._used_length)

    def _check(self) -> None:
        assert 0 <= self._used_length <= self.max_length
        assert self._memory.length == (self.max_length if self.whole else self._used_length)
        assert not without(self._stale, *self._discarded)
        assert list(self._discarded) == runs(clip(self._discarded, 0, self._used_length))
        self._memory._check()
