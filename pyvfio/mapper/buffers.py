"""Buffers of the caller: mapped until the caller closes the mapping, or for one transfer.

A `BufferMapper` chooses an IOVA in an `AddressSpace`, maps the buffer there, and records the mapped memory. Memory that
is mapped already is not mapped again: the new `DmaMapping` shares the existing mapping, which stays until the last
holder is closed. Subclasses map other memory too, such as RAM blocks.

Source: `qemu_vfio_dma_map` in QEMU's util/vfio-helpers.c, which has fixed and temporary mappings too. In QEMU, a
temporary mapping has no entry in the table of mappings, and `qemu_vfio_dma_reset_temporary` unmaps all of them.
"""

from __future__ import annotations

import errno
import logging
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Never, Protocol, SupportsIndex, TypeVar

from pyvfio.errors import ClosedError, IoctlError, IovaOverlapError, VfioError
from pyvfio.guard import ContextManager, Guard, closing_in_hooks, closing_in_one_step, guarded, making, reading
from pyvfio.handle import attempt_all
from pyvfio.iommu.iova import check_dma_bits
from pyvfio.iommu.space import AddressSpace
from pyvfio.mapper.by_address import ByAddress
from pyvfio.mapper.held import Exports, OwnMemory, TemporaryMemory, export_buffer
from pyvfio.mapper.window import READ, WRITE, Window
from pyvfio.unique import Unique
from pyvfio.units import MIB, Iova, Vaddr, check_whole_number

if TYPE_CHECKING:  # collections.abc has it from 3.12 on
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)

_Own = TypeVar("_Own", bound=OwnMemory)

LARGE_PAGE = 2 * MIB
"""IOVA is congruent to vaddr modulo this size, so that the IOMMU can use large pages for memory in large pages."""


class Reserve(Protocol):
    """Reserves `size` bytes of IOVA, as `AddressSpace.reserve_iova` does."""

    def __call__(self, size: int, *, alignment: int, offset: int, dma_bits: int) -> Iova: ...


class DmaMapping(ContextManager, Unique):
    """Memory of the caller that the device can reach: `size` bytes at `vaddr`, and at `iova` for the device.

    Made by `map_dma`, `map_buffer` and `map_temporary`; a context manager. A buffer stays exported, and so cannot be
    freed or resized, until the kernel has unmapped it. If the memory was mapped already, this object shares the
    existing mapping. Until the last holder is closed, a buffer stays mapped as a whole, and a block keeps the part.

    Synchronization: any thread can close a DmaMapping; so can a finalizer and a notifier's hook.
    """

    __slots__ = ("_mapper", "_memory", "guard", "iova", "size", "vaddr")
    _view: memoryview | None = None
    """The export of a part of memory that was mapped by address, without an export."""

    def __init__(self, mapper: BufferMapper, memory: OwnMemory | Window, vaddr: Vaddr, size: int) -> None:
        self.guard = mapper.guard
        self._mapper: BufferMapper | None = mapper  # None once closed
        self._memory = memory
        self.vaddr = vaddr
        self.iova = memory.iova if vaddr == memory.vaddr else Iova(memory.iova + vaddr - memory.vaddr)
        self.size = size

    @closing_in_hooks
    def close(self) -> None:
        """Unmap the memory, unless another open mapping holds it. A second call does nothing.

        The kernel's mapping of a closed temporary mapping stays until `reset_temporary()`. Raises UnmapSizeError or
        IoctlError; the memory is then still mapped, and `close` may be called again.
        """
        if self._mapper is not None:
            self._mapper.let_go(self, self._memory)
            self._mapper = None
            if self._view is not None:
                self._view.release()

    @property
    def closed(self) -> bool:
        """Whether the mapping has been closed, or has ended with its BAR (see `map_region`).

        The kernel's mapping of a closed temporary mapping stays until `reset_temporary()`.
        """
        return self._mapper is None or (isinstance(self._memory, OwnMemory) and self._memory.ended)

    def check_made_by(self, mapper: BufferMapper) -> None:
        """Raise ClosedError if the mapping is closed, and ValueError if another mapper made it. For the library."""
        if self.closed:
            raise ClosedError(f"{self!r} has been closed")
        if self._mapper is not mapper:
            raise ValueError(f"another mapper has made {self!r}")

    def __repr__(self) -> str:
        closed = " closed" if self.closed else ""
        return f"<DmaMapping vaddr={self.vaddr:#x} iova={self.iova:#x} size={self.size:#x}{closed}>"


class _MappingOfView(DmaMapping):
    """A mapping of a part of memory that was mapped by its address. This mapping keeps the part's buffer exported."""

    __slots__ = ("_view",)

    def __init__(
        self, mapper: BufferMapper, memory: OwnMemory | Window, vaddr: Vaddr, size: int, view: memoryview
    ) -> None:
        self._view = view
        super().__init__(mapper, memory, vaddr, size)


class _TemporaryMapping(DmaMapping):
    """A mapping of temporary memory, which has no other holder. `reset_temporary` does the work of the close."""

    __slots__ = ()
    _memory: TemporaryMemory

    @closing_in_one_step
    def close(self) -> None:
        """Leave the memory to the next `reset_temporary()`. A second call does nothing."""
        if self._mapper is not None:
            self._mapper.left[self._memory], self._mapper = None, None


def _close(mapping: DmaMapping) -> None:
    mapping.close()


class BufferMapper(Unique):
    """Maps buffers of the caller into `space`. The subclass `DmaMapper` also follows RAM blocks.

    `dma_bits`: IOVAs chosen by the mapper lie below 2^`dma_bits`; None: the limit of `space`.

    Synchronization: any thread may call any method.
    """

    def __init__(self, space: AddressSpace, *, dma_bits: int | None = None) -> None:
        if not hasattr(space, "reserve_iova"):
            raise TypeError(f"space must be an AddressSpace, such as device.space, not {type(space).__name__}")
        self.guard = Guard("this DmaMapper")
        self._space = space
        self.dma_bits = space.dma_bits if dma_bits is None else check_dma_bits(dma_bits)
        """The number of address bits of the device. IOVAs chosen by the mapper lie below 2^`dma_bits`."""
        self._fixed = ByAddress[OwnMemory]()  # made by map_dma and map_buffer
        self._temporary: dict[Iova, TemporaryMemory] = {}  # until it is unmapped
        self.left: dict[TemporaryMemory, None] = {}
        """Temporary memory whose mapping has been closed since the last reset. For the close of the mapping."""
        self._given_up: list[TemporaryMemory] = []  # closed temporary memory, which the next reset unmaps
        self._exports = Exports()
        self._size = 0  # the size of the last map
        self._closed = False

    def __del__(self) -> None:
        if "_closed" not in self.__dict__ or self._closed or self.guard.forked:
            return
        left = [memory for memory in self._own() if memory.export is not None]
        if not left:
            return
        # The memory is still mapped in the kernel, and only closing the space can unmap it now.
        self._space.keep(left)
        warnings.warn(f"{self!r} was never closed: its memory stays mapped", ResourceWarning, stacklevel=2, source=self)

    def _own(self) -> list[OwnMemory]:
        return [*self._fixed, *self._temporary.values()]

    @property
    def space(self) -> AddressSpace:
        """The address space that receives the mappings."""
        return self._space

    # ------------------------------------------------------------------------------------------------ fixed mappings

    def map_dma(
        self,
        *,
        vaddr: SupportsIndex,
        size: SupportsIndex,
        iova: SupportsIndex | None = None,
        read: bool = True,
        write: bool = True,
    ) -> DmaMapping:
        """Map `[vaddr, vaddr + size)` for the device. Both are multiples of the IOMMU's smallest page.

        `iova`: an IOVA chosen by the caller. The caller must keep the memory alive until the last mapping of it is
        closed; `map_buffer` does so by itself. Memory that is mapped whole already, for example as part of a block, is
        not mapped again. The result then has the existing IOVA, and holds the existing mapping until the result is
        closed.

        Raises ValueError if the memory is misaligned, overlaps mapped memory, or is mapped already with less access.
        ValueError also if the memory overlaps the reserved tail of a block: the tail would get a second IOVA when the
        block grows. Raises IovaRangeError, IovaOverlapError, PinLimitError, EntryLimitError, IoctlError; VfioError if
        the space has lost its mappings.

        Example:
            >>> import pyvfio
            >>> kernel = pyvfio.testing.FakeKernel()
            >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
            >>> blocks = pyvfio.RamBlockList(kernel=kernel)
            >>> mapper = pyvfio.DmaMapper(device.space, blocks)
            >>> memory = pyvfio.RamBlockList(kernel=kernel).add("memory", used_length=4096, max_length=4096)
            >>> with mapper.map_dma(vaddr=memory.vaddr, size=4096, iova=0x100000) as mapping:
            ...     print(hex(mapping.iova), hex(mapping.size))
            0x100000 0x1000
        """
        if type(vaddr) is not int or type(size) is not int:
            vaddr, size = check_whole_number(vaddr, "vaddr"), check_whole_number(size, "size")
        access = READ | WRITE if read and write else _access(read=read, write=write)
        return self._map_address(vaddr, size, iova, access, None)

    def map_buffer(
        self,
        buffer: Buffer,
        *,
        iova: SupportsIndex | None = None,
        read: bool = True,
        write: bool = True,
    ) -> DmaMapping:
        """Map a writable buffer (mmap.mmap, memoryview, numpy array, ctypes array) as `map_dma` does.

        The buffer must begin and end at a page boundary. The buffer stays exported until its last mapping is closed,
        and so can be neither freed nor resized. A view of a RAM block is released at once: the block itself keeps the
        part.

        Example:
            >>> import mmap
            >>> import pyvfio
            >>> kernel = pyvfio.testing.FakeKernel()
            >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
            >>> blocks = pyvfio.RamBlockList(kernel=kernel)
            >>> mapper = pyvfio.DmaMapper(device.space, blocks)
            >>> buffer = mmap.mmap(-1, 2 * pyvfio.PAGE_SIZE)
            >>> buffer[:5] = b"hello"
            >>> device.bus_master = True
            >>> with mapper.map_buffer(buffer) as mapping:
            ...     kernel.dma_read("0000:00:02.0", mapping.iova, 5)  # as the device reads
            b'hello'
        """
        return self._map_exported(buffer, iova, READ | WRITE if read and write else _access(read=read, write=write))

    @making(DmaMapping.close)
    def _map_exported(self, buffer: Buffer, iova: SupportsIndex | None, access: int) -> DmaMapping:
        view, vaddr = export_buffer(buffer)
        try:
            return self._map_fixed(vaddr, view.nbytes, iova, access, view)
        except BaseException:
            view.release()
            raise

    def _map_fixed(
        self, vaddr: int, size: int, iova: SupportsIndex | None, access: int, view: memoryview | None
    ) -> DmaMapping:
        wanted = None if iova is None else check_whole_number(iova, "iova")
        union, space = vaddr | size, self._space
        if union & (space.page_size - 1) or union >> 63 or not size or self._closed or space.lost:
            self._check_usable(vaddr, size)
        known = self._known(vaddr, size, wanted, access)
        if known is not None:
            return self._hold(known, vaddr, size, view)
        memory = self._map(vaddr, size, wanted, access, view, OwnMemory)
        self._fixed.add(memory)
        return DmaMapping(self, memory, memory.vaddr, memory.size)

    _map_address = making(DmaMapping.close)(_map_fixed)

    def _hold(self, memory: OwnMemory | Window, vaddr: int, size: int, view: memoryview | None) -> DmaMapping:
        """Share memory that is mapped already. Keep `view`, unless another export or a block keeps the bytes."""
        made: DmaMapping
        if view is not None and isinstance(memory, OwnMemory) and memory.export is None:
            made = _MappingOfView(self, memory, Vaddr(vaddr), size, view)
        else:
            if view is not None:
                view.release()
            made = DmaMapping(self, memory, Vaddr(vaddr), size)
        memory.hold(made)
        return made

    def _known(self, vaddr: int, size: int, iova: int | None, access: int) -> OwnMemory | Window | None:
        """Return memory that is mapped whole, or None. Raises ValueError if a part is mapped, or would be later."""
        own = self._fixed.below(vaddr + size - 1)
        memory: OwnMemory | Window | None
        if own is None or own.vaddr + own.size <= vaddr:
            memory = self._block_of(vaddr, size)
            if memory is None:
                return None
        else:
            memory = own
            if not self._holds(own, vaddr, size):
                self._refuse_overlap(own, vaddr, size)
        found = memory.iova + vaddr - memory.vaddr
        _check_place(found, vaddr, iova)
        if access & ~memory.access:
            _refuse_access(found)
        return memory

    def _holds(self, memory: OwnMemory, vaddr: int, size: int) -> bool:
        """Return whether that memory contains all these bytes, and no other user of the space has unmapped it."""
        whole = memory.vaddr <= vaddr and vaddr + size <= memory.vaddr + memory.size
        return whole and self._is_mapped(memory)

    def _refuse_overlap(self, known: OwnMemory, vaddr: int, size: int) -> Never:
        self._check_no_block(vaddr, size)
        lost = "" if self._is_mapped(known) else ", which another user has unmapped; close its DmaMapping first"
        raise ValueError(f"vaddr {vaddr:#x}-{vaddr + size - 1:#x} overlaps {known!r}{lost}")

    def _find_mapped(self, vaddr: int, size: int) -> OwnMemory | Window | None:
        """As `_find`, for a new holder: memory that another user of the space has unmapped is not returned."""
        memory = self._find(vaddr, size)
        return None if isinstance(memory, OwnMemory) and not self._is_mapped(memory) else memory

    def _find(self, vaddr: int, size: int) -> OwnMemory | Window | None:
        """Return memory that is mapped whole, or None. Temporary mappings are not searched."""
        memory = self._fixed.below(vaddr)
        if memory is not None and vaddr + size <= memory.vaddr + memory.size:
            return memory
        return self._find_block(vaddr, size)

    def _find_block(self, vaddr: int, size: int) -> Window | None:
        """Return the window of the block that maps all these bytes, or None. This class has no blocks."""
        del vaddr, size
        return None

    def _block_of(self, vaddr: int, size: int) -> Window | None:
        """Return as `_find_block`. Raises as `_check_no_block`. This class has no blocks."""
        del vaddr, size
        return None

    def _check_no_block(self, vaddr: int, size: int) -> None:
        """Raise ValueError if any of these bytes belong to a block. This class has no blocks."""

    def let_go(self, mapping: DmaMapping, memory: OwnMemory | Window) -> None:
        """Drop `mapping` as a holder, and unmap the memory after the last holder. For DmaMapping.close."""
        if not isinstance(memory, OwnMemory) or memory.holders > 1:
            memory.let_go(mapping)
        else:
            self._unmap(memory)

    def _unmap(self, memory: OwnMemory) -> None:
        """Unmap fixed memory, regardless of its holders. Does nothing if the memory was unmapped before."""
        if not memory.holders:
            return
        space = self._space
        lock = space.guard.lock
        lock.acquire()  # `with` costs twice as much
        try:
            space.unmap_and_release_locked(memory.iova, memory.size, memory.vaddr)
        finally:
            lock.release()
        self._fixed.remove(memory.vaddr)
        memory.holders = 0
        self._release(memory)

    def _release(self, memory: OwnMemory) -> None:
        if memory.export is not None:
            self._exports.release(memory.export)
            memory.export = None
        memory.release()

    def _is_mapped(self, memory: OwnMemory) -> bool:
        """Return whether the space still maps the memory. Another user of the space can have unmapped it."""
        with self._space.guard.lock:
            return self._space.is_mapped_locked(memory.iova, memory.size, memory.vaddr)

    # -------------------------------------------------------------------------------------------- temporary mappings

    def map_temporary(
        self, buffer: Buffer, *, iova: SupportsIndex | None = None, read: bool = True, write: bool = True
    ) -> DmaMapping:
        """Map a buffer for one transfer, at an IOVA from the top (2^`dma_bits`) downwards.

        Temporary IOVAs lie apart from those of blocks. `iova`: an IOVA chosen by the caller, also above the top.

        After `close`, the buffer stays mapped in the kernel, exported, and within the device's reach until
        `reset_temporary`. If a later map finds too few mappings, too little lockable memory or too little IOVA, the
        mapper resets by itself and tries once more. The mapper does the same if closed temporary mappings occupy the
        caller's IOVA.

        Memory of a block or of a fixed mapping is mapped already. The result then has the existing IOVA, holds the
        mapping until `close`, and leaves nothing mapped afterwards. Raises as `map_buffer`.

        Example:
            >>> import mmap
            >>> import pyvfio
            >>> kernel = pyvfio.testing.FakeKernel()
            >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
            >>> blocks = pyvfio.RamBlockList(kernel=kernel)
            >>> mapper = pyvfio.DmaMapper(device.space, blocks)
            >>> buffer = mmap.mmap(-1, 2 * pyvfio.PAGE_SIZE)
            >>> with mapper.map_temporary(buffer) as mapping:
            ...     print(hex(mapping.iova), hex(mapping.size))
            0x7fffffe000 0x2000
            >>> len(device.space.mappings)  # the mapping outlives close()
            1
            >>> mapper.reset_temporary()
            0
        """
        return self._map_for_once(buffer, iova, READ | WRITE if read and write else _access(read=read, write=write))

    @making(_close)
    def _map_for_once(self, buffer: Buffer, iova: SupportsIndex | None, access: int) -> DmaMapping:
        view, vaddr = export_buffer(buffer)
        try:
            size, space = view.nbytes, self._space
            wanted = None if iova is None else check_whole_number(iova, "iova")
            if (vaddr | size) & (space.page_size - 1) or self._closed or space.lost:
                self._check_usable(vaddr, size)
            own = self._fixed.below(vaddr + size - 1)
            known = self._block_of(vaddr, size) if own is None or not self._holds(own, vaddr, size) else own
            if known is not None:
                if not access & ~known.access:
                    _check_place(known.iova + vaddr - known.vaddr, vaddr, wanted)
                    return self._hold(known, vaddr, size, view)
                if isinstance(known, Window):
                    _refuse_access(known.iova + vaddr - known.vaddr)
            memory = self._map(vaddr, size, wanted, access, view, TemporaryMemory)
            self._temporary[memory.iova] = memory
            return _TemporaryMapping(self, memory, memory.vaddr, size)
        except BaseException:
            view.release()
            raise

    @guarded
    def reset_temporary(self) -> int:
        """Unmap all closed temporary mappings. Return the number of temporary mappings that are still open.

        Raises UnmapSizeError or IoctlError; mappings that could not be unmapped stay recorded. Cost: one unmap for each
        run of adjacent mappings.
        """
        if self._gather():
            with self._space.guard.lock:
                self._reset()
        return len(self._temporary)

    def _gather(self) -> Sequence[TemporaryMemory]:
        """Return all closed temporary memory, the newly closed included."""
        if self.left:
            left, self.left = self.left, {}  # one step: a finalizer, or another thread, can close a mapping meanwhile
            closed = [memory for memory in left if memory.holders]  # 0 if _unmap_all() has dropped all holders
            for memory in closed:
                memory.holders = 0
            self._given_up += closed
        return self._given_up

    def _reset(self) -> None:
        """Unmap runs of adjacent mappings, from the top downwards."""
        given_up = self._given_up
        given_up.sort(key=_iova_of)
        while given_up:
            first, follows = len(given_up), given_up[-1].iova + given_up[-1].size
            for memory in reversed(given_up):
                if memory.iova + memory.size != follows:
                    break
                first, follows = first - 1, memory.iova
            self._unmap_run(first)

    def _unmap_run(self, first: int) -> None:
        """Unmap the given up memory from `first` on, all adjacent, in one call if all of the mappings still exist."""
        run = self._given_up[first:]
        iovas, vaddrs = [memory.iova for memory in run], [memory.vaddr for memory in run]
        if self._space.unmap_neighbours_locked(iovas, vaddrs, run[-1].iova + run[-1].size - iovas[0]):
            del self._given_up[first:]
            self._drop(run, iovas)
            return
        for memory in reversed(run):
            self._space.unmap_and_release_locked(memory.iova, memory.size, memory.vaddr)
            self._drop([self._given_up.pop()], [memory.iova])

    def _drop(self, run: Sequence[TemporaryMemory], iovas: Iterable[Iova]) -> None:
        """Forget temporary memory that the kernel has unmapped, and release the buffers."""
        temporary = self._temporary
        for iova in iovas:
            del temporary[iova]
        self._exports.release_each(run)

    @reading
    def buffers(self) -> list[OwnMemory]:
        """Return the mapped memory other than blocks, closed temporary mappings included."""
        return self._own()

    # ------------------------------------------------------------------------------------------------ below

    def _map(  # noqa: PLR0917 (by positions)
        self,
        vaddr: int,
        size: int,
        wanted: int | None,
        access: int,
        view: memoryview | None,
        kind: type[_Own],
    ) -> _Own:
        """Map memory of the caller at the IOVA `wanted`, or at an IOVA that the space chooses."""
        space, export = self._space, None if view is None else self._exports.keep(view, vaddr)
        alignment = LARGE_PAGE if size >= LARGE_PAGE else 1
        if size == self._size:
            size = self._size  # one int object for all mappings of the same size
        else:
            self._size = size
        lock, top_down, dma_bits = space.guard.lock, kind.temporary, self.dma_bits
        try:
            while True:
                lock.acquire()
                try:
                    iova = space.reserve_and_map_locked(vaddr, size, wanted, alignment, top_down, access, dma_bits)
                    return kind(vaddr, iova, size, access, export)
                except IoctlError as error:
                    if not self._recycle(error):
                        raise
                finally:
                    lock.release()
        except BaseException:
            if export is not None:
                self._exports.release(export)
            raise

    def _reserve(self, size: int, *, alignment: int, offset: int, dma_bits: int) -> Iova:
        try:
            return self._space.reserve_iova(size, alignment=alignment, offset=offset, dma_bits=dma_bits)
        except IoctlError as error:
            if not self._recycle(error):
                raise
            return self._space.reserve_iova(size, alignment=alignment, offset=offset, dma_bits=dma_bits)

    def _recycle(self, error: IoctlError) -> bool:
        """Reset temporary mappings if the error was a shortage, or if closed ones occupy the caller's IOVA.

        Returns whether another attempt makes sense.
        """
        if isinstance(error, IovaOverlapError):
            closed = {memory.iova for memory in self._gather()}
            if not any(taken.start in closed for taken in error.existing):
                return False
        elif error.errno not in (errno.ENOSPC, errno.ENOMEM) or not self._gather():
            return False
        logger.debug("recycling temporary mappings: %s", error)
        self.reset_temporary()
        return True

    def _check_usable(self, vaddr: int, size: int) -> None:
        """Raise if the mapper can map nothing any more, and ValueError if that memory can never be mapped."""
        page, union = self._space.page_size, vaddr | size
        if union & (page - 1) or union < 0 or size <= 0 or vaddr + size > 1 << 64:
            raise ValueError(
                f"vaddr {vaddr:#x} and size {size:#x} must be multiples of {page:#x}, the size above 0: map whole "
                "pages, of mmap.mmap(-1, size) or of a block, as block.view(0, size). A bytearray or numpy array does "
                "not begin at a page"
            )
        if self._closed or self._space.lost:
            self.check_open()

    def check_open(self) -> None:
        """Raise ClosedError if the mapper is closed, and VfioError if its space has lost all mappings."""
        if self._closed:
            raise ClosedError("this DmaMapper has been closed")
        if self._space.lost:
            raise VfioError(
                "nothing is mapped any more: the address space was closed, or its last group was detached",
                hint="Close this DmaMapper, and make another in a container with a group",
            )

    def _unmap_all(self) -> None:
        """Unmap all memory other than blocks, regardless of its holders."""
        self._given_up[:] = self._temporary.values()
        for memory in self._given_up:
            memory.holders = 0
        steps = [partial(self._unmap, memory) for memory in reversed(list(self._fixed))]
        attempt_all("unmapping buffers", [*steps, self.reset_temporary])

    def _check(self) -> None:
        """The invariant: the space maps all recorded memory exactly as recorded."""
        for memory in () if self._space.lost or self._space.closed else self._own():
            assert self._space.mapping_at(memory.iova) == (memory.iova, memory.size, memory.vaddr), memory
        self._fixed._check()
        closed = [memory for memory in self._temporary.values() if not memory.holders]
        assert sorted(map(id, closed)) == sorted(map(id, self._given_up))
        assert all(self._temporary[iova].iova == iova for iova in self._temporary)
        assert all(memory.holders > 0 for memory in self._fixed)
        self._exports._check(memory.export for memory in self._own())


_iova_of = attrgetter("iova")


def _access(*, read: bool, write: bool) -> int:
    return (READ if read else 0) | (WRITE if write else 0)


def _check_place(found: int, vaddr: int, wanted: int | None) -> None:
    """Raise ValueError if `wanted` is another IOVA than `found`, where the memory is mapped."""
    if wanted is not None and wanted != found:
        raise ValueError(
            f"vaddr {vaddr:#x} is already mapped at IOVA {found:#x}, and cannot be mapped at {wanted:#x}, too"
        )


def _refuse_access(iova: int) -> Never:
    raise ValueError(
        f"the memory is mapped already, at IOVA {iova:#x}, with less access than was asked for: close that mapping "
        "first, or add the block with write access"
    )
