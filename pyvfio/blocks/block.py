"""The handle of a RAM block: memory at one address that can be resized in place, and whose parts can be discarded.

`pyvfio.ramblock.RamBlockList.add` makes blocks. The list also makes all changes, because a change involves the list's
notifiers. `pyvfio.blocks.state` has the state of a block.

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
from pyvfio.unique import Unique
from pyvfio.units import Vaddr, format_size


class _Owner(Protocol):
    """The list of a block."""

    kernel: Kernel
    guard: Guard

    def resize(self, block: RamBlock, used_length: int) -> OSError | None: ...

    def discard(self, block: RamBlock, offset: int, size: int) -> list[OSError]: ...

    def populate(self, block: RamBlock, offset: int, size: int) -> None: ...

    def remap(self, block: RamBlock, offset: int, size: int) -> None: ...

    def remove(self, block: RamBlock) -> None: ...


class FileRange(NamedTuple):
    """Memory of a file: the `size` bytes at `vaddr` are the bytes from `offset` on of the file behind `fd`."""

    fd: int
    offset: int
    vaddr: Vaddr
    size: int


class RamBlock(Unique):
    """Memory at `vaddr` that can be resized in place up to `max_length`. Made by `RamBlockList.add`.

    `used_length` bytes can be read and written, through `view()`, the buffer protocol (from Python 3.12 on) or
    `vaddr`; the memory behind is inaccessible. Zero is a valid length. New memory reads zeros.

    Synchronization: any thread may read lengths at any time. The list serializes changes.

    Example:
        >>> import pyvfio
        >>> blocks = pyvfio.RamBlockList()
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
        >>> ring.idstr, ring.used_length, ring.max_length
        ('ring', 2097152, 1073741824)
        >>> ring.remove()
        >>> len(blocks)
        0
        >>> blocks.close()
    """

    __slots__ = ("__weakref__", "owner", "readonly", "state")

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
        self.owner = owner
        """The list that made the block. For the library."""
        self.state = BlockState(
            owner.kernel,
            owner.guard,
            idstr=idstr,
            max_length=max_length,
            settings=settings,
            memory=memory,
            resized=resized,
        )
        """The state of the block. For the library."""
        self.readonly = readonly or self.state.memory.readable_only
        """Whether a device may only read the block."""

    @property
    def guard(self) -> Guard:
        """A guard with the lock and the process of the list, and the name of the block."""
        guard = Guard(f"RAM block '{self.idstr}'", lock=self.owner.guard.lock)
        guard.pid = self.owner.guard.pid
        return guard

    @property
    def idstr(self) -> str:
        """The name under which the block was added."""
        return self.state.idstr

    @property
    def page_size(self) -> int:
        """Lengths, and offsets and sizes of discarded parts, are multiples of this size, in bytes."""
        return self.state.page_size

    @property
    def vaddr(self) -> Vaddr:
        """The address of the block in this process: a multiple of 2 MiB that never changes.

        Raises ClosedError after the block is removed.
        """
        if self.state.removed:
            raise self._closed()
        return self.state.start

    @property
    def used_length(self) -> int:
        """The number of bytes in use, from `vaddr` on."""
        return self.state.used_length

    @property
    def max_length(self) -> int:
        """The number of reserved bytes of address space: the upper limit of `used_length`."""
        return self.state.max_length

    @property
    def whole(self) -> bool:
        """Whether all of `max_length` is allocated.

        A block is allocated in full if a notifier cannot follow a resize, or if a part could not be allocated. A resize
        then changes the length, and no memory is released.
        """
        return self.state.whole

    @property
    def discarded(self) -> tuple[Extent, ...]:
        """The discarded parts of `[0, used_length)`, as (start, end) in bytes. A populated part is no longer listed."""
        return self.state.discarded.extents

    @property
    def populated(self) -> tuple[Extent, ...]:
        """The parts that devices reach: `[0, used_length)` less the discarded parts, as (start, end) in bytes."""
        return self.state.populated

    @property
    def prealloc(self) -> int:
        """The number of threads that populate memory when the memory comes into use. 0: the first touch populates."""
        return 0 if self.state.prealloc is None else self.state.prealloc.threads

    @property
    def file(self) -> FileRange | None:
        """The file of `[0, used_length)`, for listeners that map files; None for anonymous memory.

        The descriptor belongs to the block.
        """
        found = self.state.memory.file
        return None if found is None else FileRange(*found, self.vaddr, self.used_length)

    @property
    def settings(self) -> MemorySettings:
        """The madvise settings of all memory of the block."""
        return self.state.memory.settings

    def resize(self, used_length: int) -> None:
        """Change `used_length`, and call all notifiers; the block's own `resized` callback is called last.

        The present length does nothing.

        Raises ValueError (misaligned, negative, above `max_length`) and BufferError (a live view reaches behind the new
        end) before any system call. Raises IoctlError if no memory is left, and the exception of a notifier or callback
        that refuses. The block is then as before. If the undo fails too, RollbackError is raised, and the memory in
        question is kept until a resize succeeds. Warns MemoryNotReturnedWarning if a shrink could not release the
        memory.

        Synchronization: takes the list's lock. Cost: some system calls, and the work of the notifiers: O(used_length)
        for a DmaMapper that remaps.

        Example:
            >>> import pyvfio
            >>> blocks = pyvfio.RamBlockList()
            >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
            >>> vaddr = ring.vaddr
            >>> ring.resize(4 * pyvfio.MIB)
            >>> ring.used_length == 4 * pyvfio.MIB, ring.vaddr == vaddr
            (True, True)
            >>> ring.resize(pyvfio.MIB)
            >>> blocks.close()
        """
        kept = self.owner.resize(self, used_length)
        if kept is not None:
            # The warning comes last: a program may turn warnings into errors, and the change is complete by now.
            warnings.warn(
                f"RAM block '{self.idstr}' shrank to {format_size(used_length)}, but "
                f"{format_size(self.state.memory.retained)} could not be released: {kept}. The limit "
                "vm.max_map_count may be reached",
                MemoryNotReturnedWarning,
                stacklevel=2,
            )

    def discard(self, offset: int, size: int) -> None:
        """Discard `[offset, offset + size)`: release the memory, and unmap the part for devices until `populate`.

        A balloon and virtio-mem discard memory that a guest does not use. The process may still touch the memory, which
        then reads zeros. Parts that are discarded already stay discarded.

        Raises ValueError (misaligned, outside of `used_length`) before any system call. Raises DiscardError if a claim
        excludes discards or a notifier could not follow. Raises the exception of a notifier that refuses; the block is
        then as before. RollbackError as in `resize`. Warns MemoryNotReturnedWarning if memory could not be released;
        the memory is then zeroed.

        Synchronization: takes the list's lock. Cost: one madvise(2) for each part, and the work of the notifiers. Among
        n discarded parts, the block searches O(log n) and copies the rest, 6 ns each.
        Source: `ram_block_discard_range` and `ram_discard_manager_notify_discard` of QEMU.
        """
        for error in self._owner().discard(self, offset, size):
            warnings.warn(
                f"memory of RAM block '{self.idstr}' was discarded, but could not be released: {error}. The memory "
                "reads zeros, and stays charged to this process",
                MemoryNotReturnedWarning,
                stacklevel=2,
            )

    def populate(self, offset: int, size: int) -> None:
        """Map `[offset, offset + size)` for devices again. The memory reads zeros, unless written since the discard.

        Does nothing if no part of the range is discarded. Raises as `discard`, except DiscardError.
        """
        self._owner().populate(self, offset, size)

    def remap(self, offset: int, size: int) -> None:
        """Replace the pages of `[offset, offset + size)` by fresh pages, and let devices reach the fresh pages.

        For memory that has failed. The process gets SIGBUS when it touches a failed page, but a device that has pinned
        the page still reaches the page. Address, IOVA and settings stay. The contents are lost: the memory reads zeros,
        or the contents of a caller's file, also for a private mapping.

        A shared file of the caller gets fresh pages only with `punch=True`. Without `punch`, the kernel may read the
        page from the disk again if the page had not been modified. Discarded parts stay discarded. No device reaches
        the part during the call. If the kernel can unmap whole mappings only, no device reaches the rest of those
        mappings either.

        Raises ValueError (misaligned, outside of `used_length`) and UnsupportedError (a notifier could not follow)
        before any system call. Raises DiscardError if a `populate` failed, so that a device may still reach a discarded
        part. Raises GapError if a mapper must not unmap other bytes. Raises IoctlError if no fresh pages are left, and
        the exception of a notifier that refuses. Devices then reach the same memory as before. If the undo fails too,
        RollbackError is raised: devices reach less than the block has, until another remap or resize succeeds.

        Synchronization: takes the list's lock. Cost: up to three system calls, and the work of the notifiers. Source:
        `qemu_ram_remap` (system/physmem.c of QEMU). For a test, MADV_HWPOISON of madvise(2) makes a page fail.
        """
        self._owner().remap(self, offset, size)

    def remove(self) -> None:
        """Remove the block, as `RamBlockList.remove` does."""
        self._owner().remove(self)

    @reading
    def view(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> memoryview:
        """Return a memoryview of `[offset, offset + size)`. `size` None: up to `used_length`; both in bytes.

        The view is read-only if the memory is a file that is open for reading only. While the view, or an object made
        from the view (a slice, a numpy array), is alive, the block can grow. The block can neither shrink below the end
        of the view nor be removed: BufferError is raised. Therefore a view of just the needed part lets the block
        shrink down to the end of that part. A slice of a view of the whole block does not. `release()` the view, or
        delete the view. Closing the list removes the block nevertheless, and the memory stays until the last view dies.

        Raises ValueError if bytes of the part are not in use, TypeError, ClosedError.

        Example:
            >>> import pyvfio
            >>> blocks = pyvfio.RamBlockList()
            >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
            >>> with ring.view(0, 5) as memory:
            ...     memory[:] = b"hello"
            >>> with ring.view() as memory:
            ...     print(bytes(memory[:8]))
            b'hello\\x00\\x00\\x00'
            >>> blocks.close()
        """
        self._owner()
        return self.state.view(*self.state.check_part(offset, size))

    def __buffer__(self, flags: int) -> memoryview:
        """Return a view for `memoryview(block)` and `numpy.frombuffer(block)`, from Python 3.12 on."""
        del flags
        return self.view()

    def __repr__(self) -> str:
        where = "removed" if self.state.removed else f"vaddr={self.state.start:#x}"
        holes = f" discarded={total(self.discarded):#x}" if self.discarded else ""
        return f"<RamBlock {self.idstr!r} {where} used={self.used_length:#x} max={self.max_length:#x}{holes}>"

    def _owner(self) -> _Owner:
        if self.state.removed:
            raise self._closed()
        return self.owner

    def _check(self) -> None:
        self.state._check()

    def _closed(self) -> ClosedError:
        return ClosedError(f"RAM block '{self.idstr}' has been removed")
