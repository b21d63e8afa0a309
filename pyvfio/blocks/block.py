"""A RAM block as a program holds it: memory at one address that is resized in place, and parts of which are discarded.

Made by `pyvfio.ramblock.RamBlockList.add`. The list also makes all changes, since its notifiers are told of them;
`pyvfio.blocks.state` has the state that they change.

Source: `RAMBlock` (include/exec/ramblock.h), and RamDiscardManager (include/exec/memory.h) for the parts.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple, Protocol, SupportsIndex

from pyvfio.blocks.state import BlockState, ResizedCallback
from pyvfio.errors import ClosedError, MemoryNotReturnedWarning
from pyvfio.extents import Extent, total
from pyvfio.guard import Guard, reading
from pyvfio.kernel import Kernel
from pyvfio.memory import MemoryKind, MemorySettings
from pyvfio.units import Vaddr, format_size


class _Owner(Protocol):
    """The list that a block is in."""

    kernel: Kernel
    guard: Guard

    def resize(self, block: RamBlock, used_length: int) -> OSError | None: ...

    def discard(self, block: RamBlock, offset: int, size: int) -> list[OSError]: ...

    def populate(self, block: RamBlock, offset: int, size: int) -> None: ...

    def remap(self, block: RamBlock, offset: int, size: int) -> None: ...

    def remove(self, block: RamBlock) -> None: ...


class FileRange(NamedTuple):
    """Memory that is a file's: `size` bytes at `vaddr` are those from `offset` on of the file behind `fd`."""

    fd: int
    offset: int
    vaddr: Vaddr
    size: int


class RamBlock:
    """Memory at `vaddr` that can be resized in place up to `max_length`. Made by `RamBlockList.add`.

    `used_length` bytes can be read and written, through `view()`, the buffer protocol (from Python 3.12 on) or
    `vaddr`; memory behind these bytes cannot be touched. Zero is a legal length. New memory reads zero.

    Synchronization: lengths may be read by any thread at any time. The list serializes changes.
    """

    __slots__ = ("__weakref__", "_list", "guard", "idstr", "page_size", "readonly", "state")

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
        self._list = owner
        self.guard = Guard(f"RAM block '{idstr}'", lock=owner.guard.lock)
        self.state = BlockState(
            owner.kernel,
            self.guard,
            idstr=idstr,
            max_length=max_length,
            settings=settings,
            memory=memory,
            resized=resized,
        )
        """The library's own."""
        self.idstr = idstr
        self.page_size = self.state.page_size
        """Lengths, and parts that are discarded, are multiples of this, in bytes."""
        self.readonly = readonly or self.state.memory.readable_only
        """Whether a device may only read it."""

    @property
    def vaddr(self) -> Vaddr:
        """Where the block begins in this process: a multiple of 2 MiB that never changes. Raises ClosedError once the
        block is removed."""
        if self.state.removed:
            raise self._closed()
        return self.state.start

    @property
    def used_length(self) -> int:
        """Bytes in use, from `vaddr` on."""
        return self.state.used_length

    @property
    def max_length(self) -> int:
        """Bytes of address space that are reserved: the most that `used_length` can be."""
        return self.state.max_length

    @property
    def whole(self) -> bool:
        """Whether all of `max_length` is memory, since a listener cannot follow a resize or a part could not be had:
        lengths change then, and nothing is given back."""
        return self.state.whole

    @property
    def discarded(self) -> tuple[Extent, ...]:
        """The parts of `[0, used_length)` that are discarded, and not populated since: (start, end) in bytes."""
        return self.state.discarded

    @property
    def populated(self) -> tuple[Extent, ...]:
        """The parts that devices reach: `[0, used_length)` less the discarded parts; (start, end) in bytes."""
        return tuple(Extent(*part) for part in self.state.populated_at(self.state.used_length))

    @property
    def prealloc(self) -> int:
        """How many threads have pages behind memory that comes into use (0: pages come when they are touched)."""
        return 0 if self.state.prealloc is None else self.state.prealloc.threads

    @property
    def file(self) -> FileRange | None:
        """The file that `[0, used_length)` is of, for listeners that map files; None for anonymous memory. The
        descriptor is the block's own."""
        found = self.state.memory.file
        return None if found is None else FileRange(*found, self.vaddr, self.used_length)

    @property
    def settings(self) -> MemorySettings:
        """The madvise settings that hold for all of the block's memory."""
        return self.state.memory.settings

    def resize(self, used_length: int) -> None:
        """Make the block `used_length` bytes long, tell all notifiers, and its `resized` callback last.

        The present length does nothing at all. Raises ValueError (misaligned, negative, above `max_length`) and
        BufferError (a live view reaches behind the new end) before any system call; IoctlError when there is no memory;
        and the exception of a notifier or callback that refuses. The block is then as it was. If the undo fails too,
        RollbackError is raised, and the memory in question is kept until a resize succeeds. Warns
        MemoryNotReturnedWarning when a shrink could not give its memory back.

        Synchronization: takes the list's lock. Cost: some system calls, and the work of the notifiers: O(used_length)
        for a DmaMapper that remaps.
        """
        kept = self._list.resize(self, used_length)
        if kept is not None:
            # Last, since a program may have made warnings errors: by now everything is in order.
            warnings.warn(
                f"RAM block '{self.idstr}' shrank to {format_size(used_length)}, but "
                f"{format_size(self.state.memory.retained)} could not be given back: {kept}. The limit "
                "vm.max_map_count may be reached",
                MemoryNotReturnedWarning,
                stacklevel=2,
            )

    def discard(self, offset: int, size: int) -> None:
        """Discard `[offset, offset + size)`: give the memory back, and let no device reach it until it is populated.

        A balloon and virtio-mem do this to memory that a guest does not use. The process may go on touching the memory,
        which reads zeros then. Parts that are discarded already stay discarded. Raises ValueError (misaligned, outside
        of `used_length`) before any system call; DiscardError where a claim rules discards out or a notifier could not
        follow; the exception of a notifier that refuses, and the block is then as it was; RollbackError as `resize`.
        Warns MemoryNotReturnedWarning when memory could not be given back: it is filled with zeros then.

        Synchronization: takes the list's lock. Cost: one madvise(2) for each part, and the work of the notifiers.
        Source: `ram_block_discard_range` and `ram_discard_manager_notify_discard` of QEMU.
        """
        for error in self._owner().discard(self, offset, size):
            warnings.warn(
                f"memory of RAM block '{self.idstr}' was discarded, but not given back: {error}. It reads zeros, and "
                "stays with this process",
                MemoryNotReturnedWarning,
                stacklevel=2,
            )

    def populate(self, offset: int, size: int) -> None:
        """Let devices reach `[offset, offset + size)` again; the memory reads zeros unless it was written since.

        Does nothing where nothing of it is discarded. Raises as `discard`, but for DiscardError.
        """
        self._owner().populate(self, offset, size)

    def remap(self, offset: int, size: int) -> None:
        """Put fresh pages behind `[offset, offset + size)`, and let devices reach them.

        For memory that has failed: a touch is SIGBUS, and a device that has pinned the failed page goes on reaching it.
        Address, IOVA and settings stay. Contents are lost: the memory reads zeros, or the contents of a caller's file,
        also for a private mapping. A shared file of the caller's gets fresh pages only with `punch=True`; without, the
        kernel may read a page from the disk again that had not been changed. Discarded parts stay discarded. No device
        reaches the part meanwhile, nor, where the kernel unmaps whole mappings only, the bytes that are mapped in one
        piece with it.

        Raises ValueError (misaligned, outside of `used_length`) and UnsupportedError (a notifier could not follow)
        before any system call; DiscardError where a discarded part may be in a device's reach since a `populate`
        failed; GapError where a mapper may let nothing else out of reach; IoctlError when there are no fresh pages; the
        exception of a notifier that refuses. Devices then reach the same memory as before. If the undo fails too,
        RollbackError is raised: devices reach less than the block has, until it is remapped or resized once more.

        Synchronization: takes the list's lock. Cost: up to three system calls, and the work of the notifiers. Source:
        `qemu_ram_remap` (system/physmem.c of QEMU); MADV_HWPOISON in madvise(2) lets it be tried.
        """
        self._owner().remap(self, offset, size)

    def remove(self) -> None:
        """As `RamBlockList.remove`."""
        self._owner().remove(self)

    @reading
    def view(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> memoryview:
        """Return a memoryview of `[offset, offset + size)`, writable unless the memory is a file that is open for
        reading only.

        Both are in bytes; `size` None means up to `used_length`. While the view or an object made from it (a slice, a
        numpy array) lives, the block can grow, but neither shrink below the end of the view nor be removed:
        BufferError. So a view of the part that is needed leaves the block free to shrink down to the end of that part,
        and a slice of a view of the whole does not. `release()` the view, or delete it. Closing the list removes the
        block all the same, and its memory stays until the last view goes.

        Raises ValueError where bytes of the part are not in use, TypeError, ClosedError.
        """
        self._owner()
        return self.state.view(*self.state.check_part(offset, size))

    def __buffer__(self, flags: int) -> memoryview:
        """`memoryview(block)` and `numpy.frombuffer(block)`, from Python 3.12 on."""
        del flags
        return self.view()

    def __repr__(self) -> str:
        where = "removed" if self.state.removed else f"vaddr={self.state.start:#x}"
        holes = f" discarded={total(self.discarded):#x}" if self.discarded else ""
        return f"<RamBlock {self.idstr!r} {where} used={self.used_length:#x} max={self.max_length:#x}{holes}>"

    def _owner(self) -> _Owner:
        if self.state.removed:
            raise self._closed()
        return self._list

    def _check(self) -> None:
        self.state._check()

    def _closed(self) -> ClosedError:
        return ClosedError(f"RAM block '{self.idstr}' has been removed")
