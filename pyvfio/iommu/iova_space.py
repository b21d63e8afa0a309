"""What all I/O address spaces share: the table of mappings, the reservations of IOVA, and the calls on both.

`Container` (VFIO type1) and `Ioas` (iommufd) are the subclasses. A subclass has the system calls and their errors.
"""

from __future__ import annotations

import errno
import logging
import os
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import islice
from operator import index
from typing import TYPE_CHECKING

from pyvfio.errors import PinLimitError, UnmapSizeError, UnsupportedError
from pyvfio.guard import Guard, guarded, reading
from pyvfio.iommu.iova import IovaAllocator, check_dma_bits
from pyvfio.iommu.space import CountsBy, Mapping
from pyvfio.iommu.table import MOST_DESCRIBED, MappingTable, Place, describe_mappings
from pyvfio.iommu.tracked_space import TrackedSpace
from pyvfio.kernel import Kernel, Memlock, ioctl_of_buffer
from pyvfio.memory import locking
from pyvfio.units import Iova, IovaRange

if TYPE_CHECKING:
    from pyvfio.picture import Picture

logger = logging.getLogger(__name__)

READ, WRITE = 1, 2
"""The bits of `access`."""
_BOTH = READ | WRITE

_END = 1 << 64


class IovaSpace(TrackedSpace):
    """The base of all address spaces: see `AddressSpace` for the methods that a mapper uses.

    Synchronization: any thread may call any method. Methods take the lock of `guard`, which a long map holds.
    """

    _map_request, _unmap_request = "VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"

    def _begin(self, kernel: Kernel, fd: int, what: str, dma_bits: int, guard: Guard | None = None) -> None:
        self.table = MappingTable()
        """The mappings that were made through this object. For the library; `mappings` is a copy."""
        self.lost = False
        """Whether all mappings were lost with the last device, or with `close`. Never becomes False again."""
        self.why = "the program made this object"
        """Why `open_device` chose this kind of address space."""
        self.handing: object | None = None
        """The HandOver in progress, or None."""
        self.allocator = IovaAllocator()
        self.page_size = self.allocator.page_size
        """The smallest page size of the IOMMU, in bytes."""
        self._ready = False  # whether a device uses the space, so that ranges and page size are known
        self._dma_bits = dma_bits
        self._kept: list[object] = []
        self._ioctl = ioctl_of_buffer(kernel)
        super().__init__(kernel, fd, what, guard=guard)

    # ------------------------------------------------------------------------------------------------ for subclasses

    @abstractmethod
    def map_locked(self, vaddr: int, iova: int, size: int, access: int) -> None:
        """Map in the kernel, and add the mapping to the table. Raises IoctlError. As `AddressSpace.map_locked`."""

    def _map(self, vaddr: int, iova: int, size: int, access: int) -> None:
        """Call `map_locked` in a guarded call. A subclass sets `_map = guarded(map_locked)`, which is one call less."""
        raise NotImplementedError

    @abstractmethod
    def _unmap_in_kernel(self, iova: int, size: int) -> int:
        """Unmap in the kernel alone, and return the number of unmapped bytes. Raises IoctlError."""

    @abstractmethod
    def _unmap_everything(self) -> int:
        """Unmap all mappings, and return the number of unmapped bytes. Raises IoctlError."""

    @abstractmethod
    def _is_gone(self, mapping: Mapping) -> bool:
        """Return whether the kernel no longer has a mapping that the table has."""

    @abstractmethod
    def _check_ready(self) -> None:
        """Raise VfioError unless a device uses the space, so that the ranges are known. Raises as `fd`."""

    @property
    @abstractmethod
    def entries_left(self) -> int | None:
        """As `AddressSpace.entries_left`."""

    @abstractmethod
    def _drawn_as(self) -> str:
        """Return the words for the space in a picture's title."""

    # ------------------------------------------------------------------------------------------------ what is there

    @property
    def takes_mappings(self) -> bool:
        """As `AddressSpace.takes_mappings`."""
        return self._ready

    def check_takes_mappings(self) -> None:
        """As `AddressSpace.check_takes_mappings`."""
        self._check_ready()

    @property
    def changes(self) -> int:
        """The number of changes of the mappings so far. The result of a look-up is valid while this number is equal."""
        return self.table.changes

    @property
    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """The ranges in which IOVAs can be mapped, ascending."""
        return self.allocator.ranges

    @property
    def dma_bits(self) -> int:
        """The number of address bits of the devices: pyvfio chooses IOVAs below 2^`dma_bits`."""
        return self._dma_bits

    @property
    @reading
    def reserved_iova(self) -> tuple[IovaRange, ...]:
        """The reserved parts of `iova_ranges`, ascending."""
        return self.allocator.reservations

    @property
    @reading
    def mappings(self) -> tuple[Mapping, ...]:
        """The mappings that were made through this object, ascending. Cost: O(n)."""
        return tuple(self.table)

    @reading
    def picture(self) -> Picture:
        """Return a `Picture` of the IOVA space: the ranges of the IOMMU, reserved IOVA and mappings.

        `DmaMapper.picture()` also knows the names of blocks. Raises VfioError while no device uses the space.
        O(n log n).
        """
        from pyvfio.picture import picture_of  # noqa: PLC0415 (few programs draw)

        self._check_ready()
        count = len(self.table)
        return picture_of(self, f"{self._drawn_as()}: {count} mapping{'s' * (count != 1)}")

    def _repr_svg_(self) -> str | None:
        return self.picture().svg() if self._fd >= 0 and self._ready else None

    @reading
    def mapping_at(self, iova: int) -> Mapping | None:
        """Return the mapping that covers `iova`, or None. Cost: O(log n)."""
        return self.table.at(iova)

    @reading
    def mappings_in(self, *, iova: int, size: int) -> list[Mapping]:
        """Return the mappings that overlap `[iova, iova + size)`, ascending. Cost: O(log n + their number)."""
        return self.table.overlapping(iova=iova, size=size)

    # ------------------------------------------------------------------------------------------------ IOVA

    def _set_ranges(self, ranges: Iterable[IovaRange], *, page_size: int) -> None:
        """Set ranges and page size as `IovaAllocator.set_ranges`."""
        self.allocator.set_ranges(ranges, page_size=page_size)
        self.page_size = page_size

    @guarded
    def reserve_iova(
        self, size: int, *, alignment: int, offset: int, top_down: bool = False, dma_bits: int | None = None
    ) -> Iova:
        """Reserve IOVA as `IovaAllocator.reserve`. `dma_bits` None: the limit of the space.

        Raises as `IovaAllocator.reserve`; TypeError; VfioError without a device.
        """
        size, alignment, offset = index(size), index(alignment), index(offset)
        bits = self._dma_bits if dma_bits is None else check_dma_bits(dma_bits)
        self._check_ready()
        return self.allocator.reserve(size, alignment=alignment, offset=offset, top_down=top_down, dma_bits=bits)

    @guarded
    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """Reserve the IOVA that the caller chooses, as `IovaAllocator.reserve_at`.

        Raises as `IovaAllocator.reserve_at`; TypeError; VfioError without a device.
        """
        iova, size = index(iova), index(size)
        self._check_ready()
        return self.allocator.reserve_at(iova, size)

    @guarded
    def release_iova(self, iova: int) -> None:
        """Release a reservation as `IovaAllocator.release`. Raises as `IovaAllocator.release`; TypeError."""
        self.allocator.release(index(iova))

    # ------------------------------------------------------------------------------------------------ map

    def map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        """Map `[vaddr, vaddr + size)` at `iova`, for reading and writing by the devices of the space.

        The map is all or nothing. Invalid arguments raise TypeError or ValueError before any system call. Raises
        IoctlError, or a subclass with a hint for the case.
        Cost: the kernel pins every page, some 30 ns for each resident page. Other pages are allocated and zeroed first.
        """
        try:
            union = vaddr | iova | size
        except (TypeError, OverflowError):  # numpy combines no numbers of different sign or width
            union = None
        if type(union) is not int:
            vaddr, iova, size = index(vaddr), index(iova), index(size)
            union = vaddr | iova | size
        access = _BOTH if read and write else (READ if read else 0) | (WRITE if write else 0)
        if union & (self.page_size - 1) or union >> 63 or not size or not access:  # negative or large, or never right
            self._check_map(vaddr, iova, size, access)
        self._map(vaddr, iova, size, access)

    def _check_map(self, vaddr: int, iova: int, size: int, access: int) -> None:
        """Raise if the arguments of `map` are invalid."""
        page = self.page_size
        self._check_unmap(iova, size)
        if vaddr < 0 or vaddr & (page - 1) or vaddr + size > _END or not access:
            raise self._not_memory(vaddr, size, access)
        self._check_place(iova, size)

    def _check_place(self, iova: int, size: int) -> None:
        """Raise if the kernel would accept a map there that it cannot undo."""

    def _not_memory(self, vaddr: int, size: int, access: int) -> ValueError:
        if not access:
            return ValueError("read or write must be True: a mapping permits at least one of them")
        return ValueError(f"no process has {size:#x} bytes at vaddr {vaddr:#x} in pages of {self.page_size:#x}")

    def reserve_and_map(
        self,
        *,
        vaddr: int,
        size: int,
        iova: int | None = None,
        alignment: int = 1,
        top_down: bool = False,
        read: bool = True,
        write: bool = True,
        dma_bits: int | None = None,
    ) -> Iova:
        """Reserve IOVA and map memory there in one call, or do neither.

        `iova`: the choice of the caller, as for `reserve_iova_at`. None: chosen as by `reserve_iova` with `alignment`,
        `top_down` and `dma_bits`.

        Raises as `reserve_iova` or `reserve_iova_at`, and as `map`.
        """
        access = (READ if read else 0) | (WRITE if write else 0)
        bits = self._dma_bits if dma_bits is None else check_dma_bits(dma_bits)
        place = None if iova is None else index(iova)
        return self._reserve_and_map(index(vaddr), index(size), place, index(alignment), top_down, access, bits)

    @guarded
    def _reserve_and_map(  # noqa: PLR0917
        self,
        vaddr: int,
        size: int,
        iova: int | None,
        alignment: int,
        top_down: bool,  # noqa: FBT001
        access: int,
        dma_bits: int,
    ) -> Iova:
        self._check_ready()
        if vaddr < 0 or vaddr & (self.page_size - 1) or vaddr + size > _END or not access:
            raise self._not_memory(vaddr, size, access)
        return self.reserve_and_map_locked(vaddr, size, iova, alignment, top_down, access, dma_bits)

    def reserve_and_map_locked(  # noqa: PLR0917
        self,
        vaddr: int,
        size: int,
        iova: int | None,
        alignment: int,
        top_down: bool,  # noqa: FBT001
        access: int,
        dma_bits: int,
    ) -> Iova:
        """As `AddressSpace.reserve_and_map_locked`."""
        if self._fd < 0 or not self._ready:
            self._check_ready()
        allocator = self.allocator
        if iova is None:
            place = allocator.place(size, alignment, vaddr, top_down, dma_bits)
        else:
            place = allocator.reserve_at(iova, size)
        try:
            self.map_locked(vaddr, place, size, access)
        except BaseException:
            if not self.table.has(place, size, vaddr):  # True if a logging filter raised after the map
                allocator.release(place)
            raise
        return place

    # ------------------------------------------------------------------------------------------------ unmap

    def unmap(self, *, iova: int, size: int) -> None:
        """Unmap whole mappings. After the return no device reaches any of the `size` bytes at `iova`.

        Raises UnmapSizeError before any system call if the mappings do not fill the range exactly. Raises
        UnmapSizeError after the call if the kernel unmapped another number of bytes; `mappings` is then corrected.
        Raises IoctlError if the kernel refuses, and ValueError for an invalid range.
        """
        try:
            union = iova | size
        except (TypeError, OverflowError):  # as in `map`
            union = None
        if type(union) is not int:
            iova, size = index(iova), index(size)
            union = iova | size
        if union & (self.page_size - 1) or union >> 63 or not size:  # negative or large, or never right
            self._check_unmap(iova, size)
        self._unmap(iova, size)

    def _check_unmap(self, iova: int, size: int) -> None:
        """Raise if the arguments of `unmap` are invalid."""
        if size <= 0 or iova < 0 or (iova | size) & (self.page_size - 1) or iova + size > _END:
            raise self._misaligned(iova, size)

    def unmap_locked(self, iova: int, size: int) -> None:
        """As `AddressSpace.unmap_locked`."""
        table = self.table
        place = table.find(iova, size)
        if place is None and not table.is_whole(iova, size):
            self._refuse_unmap(iova, size)
            return
        unmapped = self._unmap_in_kernel(iova, size)
        if unmapped == size and place is not None:  # not `_note_unmap`: one call less for most unmaps
            table.remove(place)
            if logger.isEnabledFor(logging.DEBUG):
                logger.debug("unmapped iova=%#x size=%#x", iova, size)
            return
        self._note_unmap(iova, size, place, unmapped)

    _unmap = guarded(unmap_locked)

    def _note_unmap(
        self, iova: int, size: int, place: Place | None, unmapped: int, refusal: Exception | None = None
    ) -> None:
        """Remove the mapping at `place` from the table, or several (None). Raises UnmapSizeError unless all are gone.

        `unmapped`: the number of bytes that the kernel unmapped. `refusal`: the error of a call that failed in between.
        """
        if unmapped != size:
            known = describe_mappings(self.table.overlapping(iova=iova, size=size))
            self._note_unmapped(iova, size, unmapped)
            raise UnmapSizeError(
                iova=iova, asked=size, unmapped=unmapped, known=known, request=self._unmap_request
            ) from refusal
        if place is not None:
            self.table.remove(place)
        else:
            self.table.discard(iova=iova, size=size)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("unmapped iova=%#x size=%#x", iova, size)

    def _note_unmapped(self, iova: int, size: int, unmapped: int) -> None:
        """Remove the mappings in `[iova, iova + size)` that the kernel unmapped from the table.

        If `unmapped` is the size of all mappings there, all are removed. Otherwise the kernel is asked for each one.
        """
        found = self.table.overlapping(iova=iova, size=size)
        if found and unmapped == sum(mapping.size for mapping in found):
            self.table.discard(iova=found[0].iova, size=found[-1].range.last - found[0].iova + 1)
            return
        for mapping in filter(self._is_gone, found):
            self.table.discard(iova=mapping.iova, size=mapping.size)

    def unmap_and_release(self, *, iova: int, size: int, vaddr: int) -> None:
        """Unmap a mapping, unless another call did so before, and release the IOVA.

        Raises as `unmap`. Raises KeyError, and changes nothing, if no reservation begins at `iova`.
        """
        self._unmap_and_release(index(iova), index(size), index(vaddr))

    def unmap_and_release_locked(self, iova: int, size: int, vaddr: int) -> None:
        """As `AddressSpace.unmap_and_release_locked`."""
        if not self.allocator.is_reserved(iova):
            raise KeyError(f"no IOVA is reserved from {iova:#x} on")
        place = self.table.find(iova, size)
        if place is not None and place[0].vaddrs[place[1]] == vaddr:
            self._note_unmap(iova, size, place, self._unmap_in_kernel(iova, size))
        self.allocator.release(iova)

    _unmap_and_release = guarded(unmap_and_release_locked)

    def unmap_neighbours_locked(self, iovas: Sequence[int], vaddrs: Sequence[int], size: int) -> bool:
        """As `AddressSpace.unmap_neighbours_locked`."""
        if not self.table.has_neighbours(iovas, vaddrs, iovas[0] + size):
            return False
        self._note_unmap(iovas[0], size, None, self._unmap_in_kernel(iovas[0], size))
        self.allocator.release_neighbours(iovas)
        return True

    @property
    def maps_files(self) -> bool:
        """As `AddressSpace.maps_files`."""
        return False

    def map_file_locked(self, file: tuple[int, int], vaddr: int, iova: int, size: int, access: int) -> None:
        """As `AddressSpace.map_file_locked`. Here: by the address."""
        del file
        self.map_locked(vaddr, iova, size, access)

    @property
    def counts_by(self) -> CountsBy:
        """As `AddressSpace.counts_by`."""
        return "process"

    @guarded
    def memlock(self) -> Memlock:
        """As `AddressSpace.memlock`."""
        return self._kernel.memlock()

    @guarded
    def pin_shortage(self, size: int) -> PinLimitError | None:
        """As `AddressSpace.pin_shortage`."""
        lock = self.memlock()
        if locking.suffices(lock, size):
            return None
        refused, given = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), {"size": size}
        if lock.limit is not None and self.counts_by == "user":
            return locking.user_limit_error(
                refused, lock.limit, size, mapped=lock.used, request=self._map_request, arguments=given
            )
        return locking.limit_error(refused, lock, size, kernel=self._kernel, request=self._map_request, arguments=given)

    def check_maps_bars(self) -> None:
        """As `AddressSpace.check_maps_bars`. Here: BARs can be mapped."""

    @property
    def can_cut(self) -> bool:
        """As `AddressSpace.can_cut`."""
        return False

    @property
    def cut_opens_gap(self) -> bool:
        """As `AddressSpace.cut_opens_gap`."""
        return False

    def cut_locked(self, iova: int, size: int) -> None:
        """As `AddressSpace.cut_locked`."""
        raise UnsupportedError(
            f"{self.guard.what} cannot unmap part of a mapping: {size:#x} bytes at {iova:#x}",
            hint="pyvfio.Ioas(cut='pages') can, where the kernel has iommufd",
        )

    def is_mapped_locked(self, iova: int, size: int, vaddr: int) -> bool:
        """As `AddressSpace.is_mapped_locked`."""
        return self.table.has(iova, size, vaddr)

    def _refuse_unmap(self, iova: int, size: int) -> None:
        """Raise UnmapSizeError for a range that mappings do not fill exactly. Return if all mappings were lost."""
        found = self.table.overlapping(iova=iova, size=size)
        if found:
            self.check_usable()
        elif self.lost:
            return
        raise UnmapSizeError(iova=iova, asked=size, unmapped=0, known=describe_mappings(found), refused=True)

    @guarded
    def unmap_all(self) -> int:
        """Unmap all mappings of the space, and return how many bytes were unmapped.

        Mappings of other processes in the same space are unmapped too. IOVA stays reserved.

        Raises UnmapSizeError if the kernel unmapped less than was mapped through this object, and IoctlError if the
        kernel refuses. Cost: one ioctl, but one for each mapping if the kernel lacks VFIO_UNMAP_ALL (5.12).
        Source: VFIO_DMA_UNMAP_FLAG_ALL, IOMMU_IOAS_UNMAP.
        """
        self.check_usable()
        asked, first = self.table.mapped, list(islice(self.table, MOST_DESCRIBED + 1))
        unmapped = self._unmap_everything()
        if unmapped < asked:
            raise UnmapSizeError(
                iova=0, asked=asked, unmapped=unmapped, known=describe_mappings(first), request=self._unmap_request
            )
        return unmapped

    def _misaligned(self, iova: int, size: int) -> ValueError:
        return ValueError(
            f"iova and size must be multiples of {self.page_size:#x}, size must be above 0, and the end must be within "
            f"64 bits: iova {iova:#x}, size {size:#x}"
        )

    # ------------------------------------------------------------------------------------------------ the end

    def close_fd(self) -> None:
        """Close the descriptor. The space is then `lost`, unless the table still has mappings."""
        super().close_fd()
        self.lost = self.lost or not self.table
        if self.lost:
            self._kept.clear()

    def keep(self, memory: Iterable[object]) -> None:
        """As `AddressSpace.keep`."""
        self._kept.extend(memory)

    @reading
    def _check(self) -> None:
        self.table._check()
        self.allocator._check()
