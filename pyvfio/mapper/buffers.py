"""Buffers of the caller's own that a device reaches: mapped for as long as the caller wants, or for one transfer.

A `BufferMapper` maps them into an `AddressSpace` at an IOVA that it finds, and knows what it has mapped. What it has
not mapped itself but may be reached all the same, RAM blocks for instance, a class derived from it knows.

Source: `qemu_vfio_dma_map` in QEMU's util/vfio-helpers.c, whose fixed and temporary mappings these are; there a
temporary one has no place of its own in the table either, and goes with `qemu_vfio_dma_reset_temporary`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from pyvfio.errors import ClosedError, IoctlError, RollbackError, VfioError, as_exception
from pyvfio.iommu.space import AddressSpace
from pyvfio.units import MIB, U64_MAX, Iova, Vaddr

if TYPE_CHECKING:  # collections.abc has it from 3.12 on
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)

READ = 1
"""What a device may do, as `_access` makes it."""
LARGE_PAGE = 2 * MIB
"""IOVA is congruent to vaddr modulo this, so that the IOMMU can use large pages where the memory does."""


class Reserve(Protocol):
    """Finds a place for `size` bytes of IOVA, as `AddressSpace.reserve_iova` does."""

    def __call__(self, size: int, *, alignment: int, offset: int) -> Iova: ...


class DmaMapping:
    """Memory of the caller's own that the device can reach: `size` bytes at `vaddr`, at `iova` for the device.

    Made by `map_dma`, `map_buffer` and `map_temporary`; a context manager. A buffer stays exported, so that
    it cannot be freed or resized, until the kernel has unmapped it.
    """

    __slots__ = ("_access", "_buffer", "_mapper", "iova", "size", "vaddr")

    def __init__(
        self,
        mapper: BufferMapper | None,
        *,
        vaddr: Vaddr,
        iova: Iova,
        size: int,
        access: int,
        buffer: memoryview | None,
    ) -> None:
        self._mapper = mapper  # None once closed, or where the mapping belongs to somebody else
        self._buffer = buffer
        self.vaddr = vaddr
        self.iova = iova
        self.size = size
        self._access = access  # as `_access` makes it

    def close(self) -> None:
        """Take the mapping away; twice is fine.

        A temporary one is only given up: it goes with the next `reset_temporary`. Where `map_dma` found the memory
        mapped already, that mapping stays. Raises UnmapSizeError or IoctlError, and then it is still mapped.
        """
        if self._mapper is not None:
            self._mapper._close_mapping(self)

    def _drop(self) -> None:
        self._mapper = None
        if self._buffer is not None:
            self._buffer.release()
            self._buffer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<DmaMapping vaddr={self.vaddr:#x} iova={self.iova:#x} size={self.size:#x}>"


class BufferMapper:
    """Maps buffers of the caller's own into `space`. `DmaMapper` is one that follows RAM blocks, too.

    Synchronization: every method may be called from any thread.
    """

    def __init__(self, space: AddressSpace) -> None:
        if not hasattr(space, "reserve_iova"):
            raise TypeError(f"space must be an AddressSpace, such as device.container, not {type(space).__name__}")
        self._space = space
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._mappings: list[DmaMapping] = []  # map_dma and map_buffer, sorted by vaddr
        self._temporary: dict[Iova, DmaMapping] = {}
        self._closed = False

    @property
    def space(self) -> AddressSpace:
        """Where it maps."""
        return self._space

    def _find_vaddr(self, vaddr: int, size: int) -> Iova | None:
        """The IOVA of memory that is mapped whole, temporary mappings aside."""
        mapping = self._own_mapping(vaddr, size)
        return None if mapping is None else Iova(mapping.iova + vaddr - mapping.vaddr)

    def _own_mapping(self, vaddr: int, size: int) -> DmaMapping | None:
        position = bisect_right(self._mappings, vaddr, key=lambda m: m.vaddr) - 1
        if position < 0 or vaddr + size > self._mappings[position].vaddr + self._mappings[position].size:
            return None
        return self._mappings[position]

    def map_dma(
        self, *, vaddr: int, size: int, iova: int | None = None, read: bool = True, write: bool = True
    ) -> DmaMapping:
        """Let the device reach `[vaddr, vaddr + size)`, both multiples of the IOMMU's smallest page.

        Memory that is wholly mapped already (part of a block, say) is not mapped again: the IOVA is the one it has, and
        closing the result changes nothing. `iova`: the caller's own choice. The caller keeps the memory alive until the
        mapping is closed; `map_buffer` sees to that itself.

        Raises ValueError (misaligned; overlaps what is mapped, or the reserved tail of a block, which would get a
        second IOVA when it grows; is mapped already, but for less access), IovaRangeError, IovaOverlapError,
        PinLimitError, EntryLimitError, IoctlError; RollbackError when what had been mapped could not be unmapped again.
        """
        return self._map_own(vaddr=vaddr, size=size, iova=iova, read=read, write=write, buffer=None)

    def map_buffer(
        self,
        buffer: Buffer,
        *,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
    ) -> DmaMapping:
        """Let the device reach a writable buffer (mmap.mmap, memoryview, numpy array, ctypes array) as `map_dma` does.

        The buffer must begin and end at a page. It stays exported until the mapping is closed, so it can be neither
        freed nor resized.
        """
        view, vaddr = _export(buffer)
        try:
            return self._map_own(vaddr=vaddr, size=view.nbytes, iova=iova, read=read, write=write, buffer=view)
        except BaseException:
            self._release_unless_held(view)
            raise

    def _release_unless_held(self, view: memoryview) -> None:
        """After a map that failed; it is still held where the device may reach it: its unmap failed, too."""
        if all(mapping._buffer is not view for mapping in self._own_mappings()):
            view.release()

    def _map_own(
        self, *, vaddr: int, size: int, iova: int | None, read: bool, write: bool, buffer: memoryview | None
    ) -> DmaMapping:
        self._check_extent(vaddr, size)
        with self._lock:
            self._check_open()
            access = _access(read=read, write=write)
            known = self._known(vaddr, size, iova, access)
            if known is not None:
                if buffer is not None:
                    buffer.release()
                return DmaMapping(None, vaddr=Vaddr(vaddr), iova=known, size=size, access=access, buffer=None)
            if iova is None:
                place = self._reserve(size, alignment=self._alignment(size), offset=vaddr)
            else:
                place = self._space.reserve_iova_at(iova, size)
            mapping = DmaMapping(self, vaddr=Vaddr(vaddr), iova=place, size=size, access=access, buffer=buffer)
            # Entered first: what a signal handler leaves behind must be known, if only to be unmapped.
            self._mappings.insert(bisect_right(self._mappings, vaddr, key=lambda m: m.vaddr), mapping)
            try:
                self._map(vaddr=vaddr, iova=place, size=size, read=read, write=write)
            except BaseException as error:
                self._undo(mapping, error, partial(self._close_mapping, mapping))
                raise
        return mapping

    @staticmethod
    def _undo(mapping: DmaMapping, cause: BaseException, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:
            if not isinstance(error, OSError | VfioError):
                raise  # a mistake of this program's, which is not to be taken for a refusal
            raise RollbackError(
                f"{mapping!r} could not be made, and its undo failed, too",
                [as_exception(cause), error],
                hint="The device may reach that memory: keep it until this mapper is closed, which tries again",
            ) from cause

    def _known(self, vaddr: int, size: int, iova: int | None, access: int) -> Iova | None:
        """The IOVA of memory that is mapped whole; ValueError where it is in part, or would be later."""
        self._forget_unmade(vaddr, size)
        found = self._find_vaddr(vaddr, size)
        if found is None:
            self._check_apart(vaddr, size)
            return None
        if iova is not None and iova != found:
            raise ValueError(f"vaddr {vaddr:#x} is mapped at IOVA {found:#x}, so it is not mapped at {iova:#x} as well")
        if access & ~self._allowed(vaddr, size):
            raise ValueError(
                f"the device may not do all that is wanted with what is mapped at IOVA {found:#x} already: close that "
                "mapping first, or let the block be written"
            )
        return found

    def _allowed(self, vaddr: int, size: int) -> int:
        """What the device may do with memory that is mapped whole, as `_access` makes it."""
        mapping = self._own_mapping(vaddr, size)
        return _access(read=True, write=True) if mapping is None else mapping._access

    def _forget_unmade(self, vaddr: int, size: int) -> None:
        """What was entered and never mapped: a signal handler has ended its making, and its undo."""
        for mapping in list(self._mappings):
            touches = mapping.vaddr < vaddr + size and vaddr < mapping.vaddr + mapping.size
            if touches and not self._size_at(vaddr=mapping.vaddr, iova=mapping.iova):
                self._close_mapping(mapping)

    def _check_apart(self, vaddr: int, size: int) -> None:
        """ValueError where any of it is mapped."""
        position = bisect_right(self._mappings, vaddr + size - 1, key=lambda m: m.vaddr) - 1
        if position >= 0 and self._mappings[position].vaddr + self._mappings[position].size > vaddr:
            raise ValueError(f"vaddr {vaddr:#x}-{vaddr + size - 1:#x} overlaps {self._mappings[position]!r}")

    def map_temporary(self, buffer: Buffer, *, read: bool = True, write: bool = True) -> DmaMapping:
        """Map a buffer for one transfer, at an IOVA from the top down, so that it does not come between blocks.

        Closing the result gives it up, but the kernel's mapping stays until `reset_temporary`, which many share, or
        until mappings or memory to lock run out: then it is made by itself, and the map tried once more. The buffer
        stays exported, and within the device's reach, until then. Raises as `map_buffer`.
        """
        view, vaddr = _export(buffer)
        try:
            self._check_extent(vaddr, view.nbytes)
            with self._lock:
                self._check_open()
                place = self._reserve(view.nbytes, alignment=self._alignment(view.nbytes), offset=vaddr, top_down=True)
                access = _access(read=read, write=write)
                mapping = DmaMapping(self, vaddr=vaddr, iova=place, size=view.nbytes, access=access, buffer=view)
                self._temporary[place] = mapping
                try:
                    self._map(vaddr=vaddr, iova=place, size=view.nbytes, read=read, write=write)
                except BaseException as error:
                    self._undo(mapping, error, partial(self._unmap_run, [mapping]))
                    raise
        except BaseException:
            self._release_unless_held(view)
            raise
        return mapping

    def reset_temporary(self) -> int:
        """Unmap all temporary mappings that have been closed; how many are still open, and stay.

        Raises UnmapSizeError or IoctlError; what has not been unmapped stays known. Cost: one unmap for each run of
        neighbours.
        """
        with self._lock:
            given_up = sorted(iova for iova, mapping in self._temporary.items() if mapping._mapper is None)
            while given_up:
                self._unmap_run(self._take_run(given_up))
            return len(self._temporary)

    def _take_run(self, given_up: list[Iova]) -> list[DmaMapping]:
        run = [self._temporary[given_up.pop()]]
        while given_up and self._temporary[given_up[-1]].size + given_up[-1] == run[-1].iova:
            run.append(self._temporary[given_up.pop()])
        return run

    def _unmap_run(self, run: list[DmaMapping]) -> None:
        if any(self._size_at(vaddr=mapping.vaddr, iova=mapping.iova) for mapping in run):
            self._space.unmap(iova=run[-1].iova, size=sum(mapping.size for mapping in run))
        for mapping in run:
            del self._temporary[mapping.iova]
            self._space.release_iova(mapping.iova)
            mapping._drop()

    def _close_mapping(self, mapping: DmaMapping) -> None:
        with self._lock:
            if mapping._mapper is None or os.getpid() != self._pid:  # another thread was first, or this is a child
                return
            if self._temporary.get(mapping.iova) is mapping:
                mapping._mapper = None
                return
            # What the space does not have went with its last group, or in a call that a signal handler ended.
            if self._size_at(vaddr=mapping.vaddr, iova=mapping.iova):
                self._space.unmap(iova=mapping.iova, size=mapping.size)
            position = bisect_right(self._mappings, mapping.vaddr, key=lambda m: m.vaddr) - 1
            if position >= 0 and self._mappings[position] is mapping:  # else a signal handler ended an earlier close
                del self._mappings[position]
                self._space.release_iova(mapping.iova)
            mapping._drop()

    def translate_vaddr(self, vaddr: int, size: int = 1) -> Iova:
        """The IOVA of `[vaddr, vaddr + size)`, all of which one block or one mapping of the caller's own has mapped.

        Raises LookupError when it has not: the tail of a block behind `used_length` is never found. ValueError: `size`
        is below 1. Temporary mappings are not looked at. O(log n).
        """
        _check_size(size)
        with self._lock:
            found = self._find_vaddr(vaddr, size)
        if found is None:
            raise LookupError(f"{size:#x} bytes at vaddr {vaddr:#x} are not mapped for the device in one piece")
        return found

    def translate_iova(self, iova: int, size: int = 1) -> Vaddr:
        """Where in this process the device ends up with `[iova, iova + size)`, all of it neighbours here, too.

        LookupError when it would be stopped; ValueError: `size` is below 1. O(log n) and the number of pieces."""
        _check_size(size)
        reached, apart = iova, set()
        for mapping in self._space.mappings_in(iova=iova, size=size):
            if mapping.iova > reached:
                break
            reached = mapping.iova + mapping.size
            apart.add(mapping.vaddr - mapping.iova)
        if reached < iova + size or len(apart) != 1:
            raise LookupError(f"{size:#x} bytes at IOVA {iova:#x} are not mapped for neighbours in this process")
        return Vaddr(iova + apart.pop())

    # ------------------------------------------------------------------------------------------------ below

    def _map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        try:
            self._space.map(vaddr=vaddr, iova=iova, size=size, read=read, write=write)
        except IoctlError as error:
            if not self._recycle(error):
                raise
            self._space.map(vaddr=vaddr, iova=iova, size=size, read=read, write=write)

    def _reserve(self, size: int, *, alignment: int, offset: int, top_down: bool = False) -> Iova:
        try:
            return self._space.reserve_iova(size, alignment=alignment, offset=offset, top_down=top_down)
        except IoctlError as error:
            if not self._recycle(error):
                raise
            return self._space.reserve_iova(size, alignment=alignment, offset=offset, top_down=top_down)

    def _recycle(self, error: IoctlError) -> bool:
        """Whether it is worth another try: mappings, memory to lock or IOVA ran out, and there were temporary mappings
        that had been given up."""
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            return False
        if not any(mapping._mapper is None for mapping in self._temporary.values()):
            return False
        logger.debug("recycling temporary mappings: %s", error)
        self.reset_temporary()
        return True

    @staticmethod
    def _alignment(size: int) -> int:
        return LARGE_PAGE if size >= LARGE_PAGE else 1

    def _check_extent(self, vaddr: int, size: int) -> None:
        if size <= 0 or vaddr < 0 or vaddr + size - 1 > U64_MAX or (vaddr | size) % self._space.page_size:
            raise ValueError(
                f"vaddr {vaddr:#x} and size {size:#x} must be multiples of {self._space.page_size:#x}, the size above "
                "0; mmap.mmap(-1, size) and RAM blocks begin at a page, a bytearray or numpy array does not"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("this DmaMapper has been closed")

    def _size_at(self, *, vaddr: int, iova: int) -> int:
        mapping = self._space.mapping_at(iova)
        return 0 if mapping is None or (mapping.iova, mapping.vaddr) != (iova, vaddr) else mapping.size

    def _own_mappings(self) -> list[DmaMapping]:
        with self._lock:
            return [*self._mappings, *self._temporary.values()]

    def _check(self) -> None:
        """The invariant: what is entered here is mapped as it is entered, or not at all."""
        with self._lock:
            for mapping in self._mappings:
                assert self._size_at(vaddr=mapping.vaddr, iova=mapping.iova) in (0, mapping.size), mapping
            addresses = [mapping.vaddr for mapping in self._mappings]
            assert addresses == sorted(addresses)


def _access(*, read: bool, write: bool) -> int:
    return read | write << 1


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"a size must be at least 1 byte, not {size}")


def _export(buffer: Buffer) -> tuple[memoryview, Vaddr]:
    """A memoryview that keeps the buffer's memory where it is, and the address of its first byte."""
    view = memoryview(buffer)
    what = (
        "read-only" if view.readonly else "not contiguous" if not view.c_contiguous else "" if view.nbytes else "empty"
    )
    if what:
        size = view.nbytes
        view.release()
        raise ValueError(
            f"this buffer of {size} bytes is {what}, and one for DMA must be writable, contiguous and not empty; map "
            "memory that is not to be written with map_dma(vaddr=…, size=…, write=False)"
        )
    return view, Vaddr(ctypes.addressof(ctypes.c_char.from_buffer(view)))
