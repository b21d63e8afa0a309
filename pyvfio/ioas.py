"""An I/O address space of iommufd: the second `AddressSpace`, beside the container of type1.

What differs from type1, for a program:

* A device is opened by its own node, /dev/vfio/devices/vfioN, and can be moved to another space in one call.
* Without a device, the kernel checks nothing and pins nothing. pyvfio therefore maps only while a device is attached.
* The number of mappings has no limit.
* By default, RLIMIT_MEMLOCK limits the pinned memory of all processes of a user together, and VmLck does not show it.

Source: drivers/iommu/iommufd/ioas.c, io_pagetable.c and pages.c; Documentation/userspace-api/iommufd.rst.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import index
from typing import TYPE_CHECKING, Literal

from pyvfio import ioctls
from pyvfio import iommufd_ioctls as abi
from pyvfio.errors import (
    IoctlError,
    RollbackError,
    UnmapSizeError,
    VfioError,
    as_exception,
    descriptor_hint,
    raise_collected,
)
from pyvfio.extent_set import ExtentSet
from pyvfio.extents import Extent, runs
from pyvfio.guard import Guard, close_now, closing_after_dependents, constructing, guarded, uninterrupted
from pyvfio.handle import Handle, attempt
from pyvfio.iommu.attach_errors import cannot_move, explain_in_use
from pyvfio.iommu.dirty_bitmap import dirty_extents
from pyvfio.iommu.ioas_errors import IoasMapRefusal, no_bar
from pyvfio.iommu.iova import DMA_BITS, IovaAllocator, check_dma_bits
from pyvfio.iommu.iova_space import READ, WRITE, IovaSpace
from pyvfio.iommu.iova_space import logger as map_logger
from pyvfio.iommu.sharing import Sharing
from pyvfio.iommu.space import CountsBy, Mapping
from pyvfio.iommu.table import describe_mappings
from pyvfio.iommufd import Iommufd
from pyvfio.kernel import MADV_POPULATE_READ, Kernel, Memlock
from pyvfio.page_tables import BoundHandle, PageTables
from pyvfio.units import PAGE_SIZE, U64_MAX, Iova, Vaddr, format_ranges

logger = logging.getLogger(__name__)

# iommu_ioas_map, _unmap, _copy and _map_file. Filling in a ctypes structure would cost twice as much.
_map_layout = struct.Struct("=4I3Q")
_unmap_layout = struct.Struct("=2I2Q")
_copy_layout = struct.Struct("=4I3Q")
_map_file_layout = struct.Struct("=3Ii3Q")
_fill_map, _fill_unmap = _map_layout.pack_into, _unmap_layout.pack_into
_unmapped_of = struct.Struct("=16xQ").unpack_from
# iommu_vfio_ioas. The structure of a type1 unmap has the fields of iommu_ioas_unmap, with flags in place of the number.
_choose_layout = struct.Struct("=2I2H")
_CHOOSE, _CUT, _SET = int(abi.IOMMU_VFIO_IOAS), int(ioctls.VFIO_IOMMU_UNMAP_DMA), int(abi.IOMMU_VFIO_IOAS_SET)
_MAP, _UNMAP = int(abi.IOMMU_IOAS_MAP), int(abi.IOMMU_IOAS_UNMAP)
_FIXED = int(abi.IOMMU_IOAS_MAP_FIXED_IOVA)
_FLAGS = (
    _FIXED,
    _FIXED | int(abi.IOMMU_IOAS_MAP_READABLE),
    _FIXED | int(abi.IOMMU_IOAS_MAP_WRITEABLE),
    _FIXED | int(abi.IOMMU_IOAS_MAP_READABLE | abi.IOMMU_IOAS_MAP_WRITEABLE),
)
"""The flags of a map, by `access`."""


def _close_again(space: Ioas) -> None:
    """Close a space that no caller received: with the IOAS, and with an iommufd that was opened for the space."""
    space.close()


class Ioas(IovaSpace):
    """An I/O address space (IOAS) of an iommufd, which the attached devices share.

    `iommufd`: the iommufd to which the space belongs; None: open /dev/iommu. The iommufd is then closed with this space
    or, if other spaces or devices use the iommufd, later with the last of them. Devices of one iommufd can be moved
    among its spaces. `dma_bits`: as for `Container`. `cut`: how a part of a mapping is unmapped while the rest stays
    mapped, for a DmaMapper with resize="cut":

    * None: not at all.
    * "pages": the IOMMU maps pages of 4 KiB alone, so the kernel can cut a mapping at any page. DMA to the rest goes
      on. Maps are slower, the page tables take more memory, and translations cost the IOMMU more.
    * "replace": all mappings but the part are copied into a second IOAS, and each device is moved there in one call.
      Large pages stay. The cost grows with the memory that the space maps. The drivers of Intel's and AMD's IOMMUs
      stop all DMA of a device for the moment of the move: in 1,000 resizes on Linux 6.12 with QEMU's VT-d, a working
      device lost 3 of 165 copies. Some IOMMUs cannot move a device (virtio-iommu before Linux 7): each cut is then
      refused with UnsupportedError.

    `shares_with`: another space of the iommufd. If one of the spaces has mapped memory, a map of the same memory in the
    other is a copy: the pages are shared, and charged once. The existing mapping must begin at the same address of the
    process, and be at least as long. Thus each of several devices can have a space, and a DmaMapper for each space,
    with the same `resize` and `granule`, can follow one list of blocks. Memory that the process has replaced since
    (mmap, MADV_DONTNEED) must be unmapped from all spaces before the next map, as the mappers do.

    Raises UnavailableError (this kernel has no iommufd), AccessDeniedError, IoctlError; ClosedError if `iommufd` or
    `shares_with` has been closed.

    Synchronization: any thread may call any method. All spaces and devices of an iommufd share one lock.
    Cost: a map or unmap is one ioctl and 24 bytes of memory.
    Source: IOMMU_IOAS_ALLOC.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel("7.3", iommufd=True)
        >>> space = pyvfio.Ioas(kernel=kernel)
        >>> device = pyvfio.open_device("0000:00:02.0", space=space)
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> mapper = pyvfio.DmaMapper(space, blocks)
        >>> ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
        >>> ring.resize(4 * pyvfio.MIB)
        >>> [(hex(mapping.iova), hex(mapping.size)) for mapping in space.mappings]
        [('0x200000', '0x400000')]
    """

    _map_request, _unmap_request = "IOMMU_IOAS_MAP", "IOMMU_IOAS_UNMAP"
    _sharing: Sharing[Ioas] | None = None

    @constructing(_close_again)
    def __init__(
        self,
        iommufd: Iommufd | None = None,
        *,
        kernel: Kernel | None = None,
        dma_bits: int = DMA_BITS,
        cut: Literal["pages", "replace"] | None = None,
        shares_with: Ioas | None = None,
    ) -> None:
        if not isinstance(iommufd, Iommufd | None):
            raise TypeError(f"iommufd must be an Iommufd, not {type(iommufd).__name__}")
        bits = _checked_bits(dma_bits, cut)
        if not isinstance(shares_with, Ioas | None):
            raise TypeError(f"shares_with must be an Ioas, not {type(shares_with).__name__}")
        if shares_with is not None and shares_with.iommufd is not (iommufd := iommufd or shares_with.iommufd):
            raise ValueError("shares_with must be a space of the same iommufd")
        if shares_with is not None:
            shares_with.check_usable()
        if iommufd is not None and kernel not in (None, iommufd.kernel):
            raise ValueError("the iommufd has another kernel: leave kernel= out")
        owned = iommufd is None
        iommufd = iommufd or Iommufd(kernel=kernel)
        try:
            self._allocate(iommufd, bits, cut)
        except BaseException:
            if owned:
                close_now(iommufd)
            raise
        self._owned = owned
        if shares_with is not None:
            self._sharing = shares_with.share(self)

    def share(self, other: Ioas) -> Sharing[Ioas]:
        """Share pages with another space from now on. Mappings that exist here can be copied there. For the library."""
        with self.guard.lock:
            if self._sharing is None:
                self._sharing = Sharing[Ioas](self)
            self._sharing.add(other)
            return self._sharing

    @classmethod
    @uninterrupted(Handle.close_fd)
    def from_id(
        cls,
        iommufd: Iommufd,
        ioas_id: int,
        *,
        dma_bits: int = DMA_BITS,
        cut: Literal["pages", "replace"] | None = None,
    ) -> Ioas:
        """Make a space of an IOAS that the iommufd has already, such as that of a former process.

        `ioas_id`: the number. `cut`: as the IOAS was made. `mappings` is empty: an existing mapping is not known. The
        object owns the IOAS: `close` destroys the IOAS, and leaves the iommufd open.

        Raises TypeError; ValueError if the iommufd has no such IOAS, or an open `Ioas` has the IOAS. Cost: two system
        calls.
        """
        if not isinstance(iommufd, Iommufd):
            raise TypeError(f"iommufd must be an Iommufd, not {type(iommufd).__name__}")
        bits = _checked_bits(dma_bits, cut)
        try:
            iommufd.ioas_iova_ranges(ioas_id)
        except IoctlError as error:
            if error.errno != errno.ENOENT:
                raise
            raise ValueError(f"the iommufd has no address space of number {ioas_id}") from error
        ioas_id = index(ioas_id)
        if owner := [space for space in iommufd.spaces if isinstance(space, Ioas) and space.id == ioas_id]:
            raise ValueError(
                f"{owner[0]!r} is open, and would be destroyed by the close of another object of that number"
            )
        space = cls.__new__(cls)
        space._own(iommufd, ioas_id, _duplicate(iommufd), bits, cut)
        return space

    def _allocate(self, iommufd: Iommufd, dma_bits: int, cut: Literal["pages", "replace"] | None) -> None:
        ioas_id = iommufd.ioas_alloc()
        try:
            if cut == "pages":
                iommufd.set_huge_pages(ioas_id, enabled=False)
            fd = _duplicate(iommufd)
        except BaseException:
            iommufd.abandon(ioas_id)
            raise
        self._own(iommufd, ioas_id, fd, dma_bits, cut)

    def _own(
        self, iommufd: Iommufd, ioas_id: int, fd: int, dma_bits: int, cut: Literal["pages", "replace"] | None
    ) -> None:
        self.id = ioas_id
        """The number of the IOAS in the iommufd. A cut by "replace" changes the number."""
        self.iommufd = iommufd
        self.cut: Literal["pages", "replace"] | None = cut
        """How a part of a mapping is unmapped: "pages", "replace", or None: not at all."""
        self._less_access: dict[int, int] = {}  # by IOVA: the access of mappings that a device may not read and write
        self._tables = PageTables(iommufd, ioas_id)
        self.devices: list[BoundHandle] = []
        """The attached devices. Read only."""
        self._owned = False
        self._former: list[PageTables] = []  # of spaces that a cut replaced, and that are not destroyed yet
        # The arguments of map and unmap, filled in for each call, under the lock.
        self._map_argument = bytearray(_map_layout.size)
        self._unmap_argument = bytearray(_unmap_layout.size)
        what = f"I/O address space {ioas_id}"
        self._begin(iommufd.kernel, fd, what, dma_bits, guard=Guard(what, lock=iommufd.guard.lock))
        iommufd.spaces.append(self)

    def __repr__(self) -> str:
        devices, mappings = len(self.devices), len(self.table)
        counts = f"with {devices} device{'s' * (devices != 1)}, {mappings} mapping{'s' * (mappings != 1)}"
        state = "closed" if self.closed else counts
        return f"<Ioas {self.id} {state}>"

    # ------------------------------------------------------------------------------------------------ devices

    @guarded
    def attach_device(self, device: BoundHandle) -> None:
        """Attach a device in the kernel alone: to the space, or to a page table that records writes. For the library.

        Raises IoctlError. Raises UnsupportedError if dirty pages are tracked and the IOMMU of the device records no
        writes, and if the IOMMU cannot move a device that is attached elsewhere. The device then stays where it was.
        Source: VFIO_DEVICE_ATTACH_IOMMUFD_PT.
        """
        former = self._former_space(device)
        if former not in (None, self) and not self.devices and not self.table and self._moves(device) is False:
            # The kernel would move the device, to a space in which nothing can be mapped, and would not move it back.
            raise cannot_move(device.guard.what, self.guard.what)
        self._attach(device, self._tables, former)

    def _former_space(self, device: BoundHandle) -> Ioas | None:
        """Return the space to which a device is attached, or None."""
        spaces = (each for each in self.iommufd.spaces if isinstance(each, Ioas))
        return next((space for space in spaces if device in space.devices), None)

    def _attach(self, device: BoundHandle, tables: PageTables, former: Ioas | None) -> None:
        try:
            tables.attach(device)
        except IoctlError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            moves = None
            if former is not None:
                with suppress(IoctlError):
                    moves = self._moves(device)
            what = self.guard.what if former is not self else f"a copy of {self.guard.what} without the part to unmap"
            raise explain_in_use(
                error,
                device=device.guard.what,
                space=what,
                table=self.table,
                offered=None if former is None else former.iova_ranges,
                moves=moves,
            ) from error

    def _moves(self, device: BoundHandle) -> bool | None:
        """Return whether the IOMMU of an attached device can move the device; None: not known.

        Raises IoctlError. Cost: five ioctls.
        """
        if device.dev_id is None:
            return None
        tables = PageTables(self.iommufd, self.iommufd.ioas_alloc())
        self._former.append(tables)
        try:
            return tables.is_complete_at_once(device.dev_id)
        finally:
            self._destroy_former()

    @guarded
    def note_attached(self, device: BoundHandle) -> None:
        """Record that the kernel attached a device, and read the ranges and the page size. For the library.

        Raises IovaRangeError if a reserved IOVA lies outside the new ranges. The caller then detaches the device.
        """
        self.check_usable()
        self._read_ranges()
        if device not in self.devices:
            self.devices.append(device)
        logger.debug("attached a device to IOAS %d: IOVA %s", self.id, format_ranges(self.iova_ranges))

    @guarded
    def note_detached(self, device: BoundHandle) -> None:
        """Record that a device left. Mappings stay; without a device their pages are not pinned. For the library."""
        if device in self.devices:
            self.devices.remove(device)
        if self.closed:
            return
        if self.devices:
            # The device has left, whether or not the ranges can be read again. Those of before are safe: narrower.
            attempt(self._read_ranges, [])
            return
        self._ready = False
        if not self.allocator.reservations:
            self.allocator = IovaAllocator()  # the next device has other ranges

    def _read_ranges(self) -> None:
        ranges, alignment = self.iommufd.ioas_iova_ranges(self.id)
        # The alignment is 1 without a device. Mappings are of whole pages of the process, too.
        self._set_ranges(ranges, page_size=max(alignment, PAGE_SIZE))
        self._ready = True

    def _check_ready(self) -> None:
        self.check_usable()
        if not self._ready:
            raise VfioError(
                f"no device is attached to {self.guard.what}, so the kernel would neither check nor pin a mapping",
                hint="Open a device first: open_device(bdf, space=space), or device.attach(space)",
            )

    # ------------------------------------------------------------------------------------------------ map and unmap

    @property
    def entries_left(self) -> None:
        """None: an IOAS has no limit of mappings."""

    def map_locked(self, vaddr: int, iova: int, size: int, access: int) -> None:
        """As `AddressSpace.map_locked`. Raises VfioError if no device is attached."""
        if self._fd < 0 or not self._ready:
            self._check_ready()
        if self._sharing is not None and self._copy_from_others(vaddr, iova, size, access):
            return
        argument, ioctl = self._map_argument, self._ioctl
        _fill_map(argument, 0, 40, _FLAGS[access], self.id, 0, vaddr, size, iova)
        try:
            ioctl(self._fd, _MAP, argument)
        except OSError as error:
            raise self._refusal(error, vaddr, iova, size, access) from error
        # As `_note_map`: one call less for most mappings.
        self.table.add(iova, size, vaddr)
        if access != READ | WRITE or self._less_access:
            self._less_access[iova] = access
        if self._sharing is not None:
            self._sharing.note(self, vaddr, iova)
        if map_logger.isEnabledFor(logging.DEBUG):
            map_logger.debug("mapped iova=%#x vaddr=%#x size=%#x access=%d", iova, vaddr, size, access)

    if not TYPE_CHECKING:  # the checkers would have `self` be an IovaSpace
        _map = guarded(map_locked)

    @property
    def maps_files(self) -> bool:
        """As `AddressSpace.maps_files`: True from Linux 6.13 on."""
        return self.iommufd.maps_files

    def map_file_locked(self, file: tuple[int, int], vaddr: int, iova: int, size: int, access: int) -> None:
        """As `AddressSpace.map_file_locked`. Raises VfioError if no device is attached. Source: IOMMU_IOAS_MAP_FILE."""
        if self._fd < 0 or not self._ready:
            self._check_ready()
        if self._sharing is not None and self._copy_from_others(vaddr, iova, size, access):
            return
        fd, offset = file
        self._populate(vaddr, size)
        argument = bytearray(_map_file_layout.pack(40, _FLAGS[access], self.id, fd, offset, size, iova))
        try:
            self._kernel.ioctl(self._fd, abi.IOMMU_IOAS_MAP_FILE, argument)
        except OSError as error:
            raise self._refusal(error, vaddr, iova, size, access, file) from error
        self._note_map(vaddr, iova, size, access)

    @property
    def counts_by(self) -> CountsBy:
        """As `AddressSpace.counts_by`. Raises IoctlError. Cost: one ioctl."""
        return "process" if self.iommufd.counts_by_process else "user"

    @guarded
    def memlock(self) -> Memlock:
        """As `AddressSpace.memlock`."""
        lock = super().memlock()
        return lock if self.counts_by == "process" else replace(lock, used=self.table.mapped)

    def check_maps_bars(self) -> None:
        """As `AddressSpace.check_maps_bars`. Raises UnsupportedError. Source: `pfn_reader_user_pin`."""
        raise no_bar(self.guard.what)

    def _populate(self, vaddr: int, size: int) -> None:
        """Touch the pages of a file before devices reach the pages.

        fallocate(2) leaves pages of a memfd as they are, to be zeroed by the first touch of a process. The kernel pins
        such a page as the page is (`memfd_pin_folios`). A device would then read old contents of the machine's memory,
        and the first touch would zero what the device wrote. Seen on Linux 7.3.
        """
        try:
            self._kernel.madvise(vaddr, size, MADV_POPULATE_READ)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"the memory at {vaddr:#x} could not be populated: {error.strerror}",
                request="madvise",
                arguments={"vaddr": vaddr, "size": size, "advice": "MADV_POPULATE_READ"},
                hint="Free memory or huge pages" if error.errno in (errno.ENOMEM, errno.EFAULT) else "",
            ) from error

    def _note_map(self, vaddr: int, iova: int, size: int, access: int) -> None:
        self.table.add(iova, size, vaddr)
        if access != READ | WRITE or self._less_access:
            self._less_access[iova] = access
        if self._sharing is not None:
            self._sharing.note(self, vaddr, iova)
        if map_logger.isEnabledFor(logging.DEBUG):
            map_logger.debug("mapped iova=%#x vaddr=%#x size=%#x access=%d", iova, vaddr, size, access)

    @guarded
    def adopt(self, mapping: Mapping, *, write: bool) -> bool:
        """Record a mapping that the kernel has, and a former process made. For the library.

        Returns False, and records nothing, if the kernel does not have the mapping. `write`: whether devices may write.
        Cost: one ioctl.
        """
        if not self.has_in_kernel(mapping):
            return False
        self._note_map(mapping.vaddr, mapping.iova, mapping.size, READ | WRITE if write else READ)
        return True

    def has_in_kernel(self, mapping: Mapping) -> bool:
        """Return whether the kernel maps the range of `mapping`. For the library. Cost: one ioctl."""
        return not self._is_gone(mapping)

    def _refusal(  # noqa: PLR0917 (as `map_file_locked`)
        self, error: OSError, vaddr: int, iova: int, size: int, access: int, file: tuple[int, int] | None = None
    ) -> IoctlError:
        return IoasMapRefusal(
            error=error,
            vaddr=vaddr,
            iova=iova,
            size=size,
            flags=_FLAGS[access],
            kernel=self._kernel,
            table=self.table,
            ranges=self.iova_ranges,
            page_size=self.page_size,
            by_process=self.iommufd.counts_by_process,
            file=file,
        ).explain()

    def _unmap_in_kernel(self, iova: int, size: int) -> int:
        """Unmap whole mappings. The caller has compared them with the table, since the call is not atomic.

        The record of the writes ends with the mappings. If the range is mapped again, as by a remap of a block, all of
        the range is dirty.
        """
        if self._tables.tracks:
            self._keep_dirty([Extent(iova, iova + size)])
        argument, fd, ioctl = self._unmap_argument, self._fd, self._ioctl
        _fill_unmap(argument, 0, 24, self.id, iova, size)
        try:
            ioctl(fd if fd >= 0 else self.fd, _UNMAP, argument)
        except OSError as error:
            if error.errno == errno.ENOENT:  # nothing is mapped there, where type1 would report success and 0 bytes
                return 0
            return self._what_is_gone(self._not_unmapped(error, "IOMMU_IOAS_UNMAP", iova, size), iova, size)
        unmapped: int
        (unmapped,) = _unmapped_of(argument)
        return unmapped

    def _what_is_gone(self, refusal: IoctlError, iova: int, size: int) -> int:
        """Return the unmapped bytes if the kernel has unmapped all of the range although it reported an error.

        The call is not atomic: if a part is gone, UnmapSizeError is raised, and the table is corrected. Raises
        `refusal` if nothing is gone.
        """
        found = self.table.overlapping(iova=iova, size=size)
        gone = sum(mapping.size for mapping in found if self._is_gone(mapping))
        if not gone:
            raise refusal
        if gone != sum(mapping.size for mapping in found):
            self._note_unmap(iova, size, None, gone, refusal)
        return gone

    def _not_unmapped(self, error: OSError, request: str, iova: int, size: int) -> IoctlError:
        known = describe_mappings(self.table.overlapping(iova=iova, size=size))
        return IoctlError.of(
            error,
            f"{self.guard.what}: {error.strerror}",
            request=request,
            arguments={"iova": iova, "size": size},
            hint=f"The mappings in this range are: {known}",
        )

    @property
    def can_cut(self) -> bool:
        """As `AddressSpace.can_cut`: True if the space was made with `cut`."""
        return self.cut is not None

    @property
    def cut_opens_gap(self) -> bool:
        """As `AddressSpace.cut_opens_gap`: with `cut="replace"`, since an IOMMU driver may stop a device that moves.

        Source: `intel_iommu_attach_device` (`device_block_translation`) and `amd_iommu_attach_device`, up to Linux 7.3.
        """
        return self.cut == "replace"

    def cut_locked(self, iova: int, size: int) -> None:
        """As `AddressSpace.cut_locked`."""
        if self.cut is None:
            super().cut_locked(iova, size)
        found = self.table.overlapping(iova=iova, size=size)
        parts = [(max(m.iova, iova), min(m.iova + m.size, iova + size)) for m in found]
        if sum(end - start for start, end in parts) != size:
            self._refuse_unmap(iova, size)
            return
        if self._tables.tracks:
            self._keep_dirty([Extent(iova, iova + size)])  # as `_unmap_in_kernel`: the range can be mapped again
        if self.cut == "replace":
            if not self._tables.tracks and self.table.is_whole(iova, size):  # no mapping is cut
                self.unmap_locked(iova, size)
                return
            self._replace_without(iova, size)
        else:
            self._cut_pages(iova, size, parts)
        self._note_cut(iova, size, found)

    def _note_cut(self, iova: int, size: int, found: Sequence[Mapping]) -> None:
        """Remove the range from the mappings `found`, which are those with a byte in the range."""
        last = found[-1]
        if self._less_access and iova + size < last.iova + last.size:  # the part behind the range keeps the access
            self._less_access[iova + size] = self._less_access.get(last.iova, READ | WRITE)
        self.table.cut(iova=iova, size=size)

    def _cut_pages(self, iova: int, size: int, parts: Sequence[tuple[int, int]]) -> None:
        """Cut in the kernel.

        Only the call of type1, which an iommufd answers too, can cut. The call works on the space that IOMMU_VFIO_IOAS
        chose last, so the space is chosen each time. Source: `iommufd_vfio_unmap_dma`.
        """
        argument, request = self._unmap_argument, "IOMMU_VFIO_IOAS"
        try:
            self._kernel.ioctl(self._fd, _CHOOSE, bytearray(_choose_layout.pack(12, self.id, _SET, 0)))
            request = "VFIO_IOMMU_UNMAP_DMA"
            _fill_unmap(argument, 0, 24, 0, iova, size)
            self._kernel.ioctl(self._fd, _CUT, argument)
        except OSError as error:
            raise self._not_unmapped(error, request, iova, size) from error
        (unmapped,) = _unmapped_of(argument)
        if unmapped == size:
            return
        known = describe_mappings(self.table.overlapping(iova=iova, size=size))
        for start, end in parts:
            if self._is_gone(Mapping(Iova(start), end - start, Vaddr(0))):
                self._note_cut(start, end - start, self.table.overlapping(iova=start, size=end - start))
        raise UnmapSizeError(iova=iova, asked=size, unmapped=unmapped, known=known)

    def _replace_without(self, iova: int, size: int) -> None:
        """Copy all mappings but `[iova, iova + size)` into a new IOAS, move the devices there, and destroy the old one.

        Copies share their pages with the originals and are not charged again. Each device is moved in one call. DMA
        during the move can fail: see `cut_opens_gap`.

        Raises IoctlError, UnsupportedError if the IOMMU cannot move a device; nothing has changed then. Raises
        RollbackError if a device could not be moved back.
        """
        new, moved = self.iommufd.ioas_alloc(), list[BoundHandle]()
        tables = PageTables(self.iommufd, new, tracks=self._tables.tracks)
        try:
            for start, end, access in self._runs_without(iova, iova + size):
                self._copy((self.id, start), (new, start), end - start, access)
            for device in self.devices:
                self._attach(device, tables, self)
                moved.append(device)
        except BaseException as error:
            failures: list[Exception] = []
            for device in moved:
                attempt(partial(self._tables.attach, device), failures)
            self._former.append(tables)
            if any(left is tables for left, _error in self._try_former()):
                # The kernel may have moved the device that it refused. For a device that stayed, this changes nothing.
                for device in self.devices:
                    if device not in moved:
                        attempt(partial(self._tables.attach, device), failures)
                self._destroy_former()
            if failures:
                raise RollbackError(
                    f"{self.guard.what} could not be replaced, and a device could not be moved back",
                    [as_exception(error), *failures],
                    hint="Close the devices of the space",
                ) from error
            raise
        self._keep_all_dirty()  # nothing reaches the old space any more: the last look misses no write
        self._former.append(self._tables)
        self._tables, self.id = tables, new
        self._destroy_former()

    def _destroy_former(self) -> None:
        """Destroy the spaces that were replaced or not used. If the kernel refuses, the next cut or close tries again.

        No device reaches these spaces, so a refusal does not end the change.
        """
        for tables, error in self._try_former():
            number = tables.ioas_id
            logger.warning("IOAS %d, a former one of %r, could not be destroyed: %s", number, self, error)

    def _try_former(self) -> list[tuple[PageTables, VfioError]]:
        """Destroy the spaces that were replaced or not used. Return those that are left, and the errors."""
        left: list[tuple[PageTables, VfioError]] = []
        for tables in tuple(self._former):
            try:
                tables.destroy()
                self.iommufd.destroy(tables.ioas_id)
            except VfioError as error:
                if not (isinstance(error, IoctlError) and error.errno == errno.ENOENT):
                    left.append((tables, error))
                    continue
            self._former.remove(tables)
        return left

    def _runs_without(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the mapped ranges outside of [start, end), with their access: (first, end, access)."""
        found: list[tuple[int, int, int]] = []
        for mapping in self.table:
            access = self._less_access.get(mapping.iova, READ | WRITE)
            first, last = mapping.iova, mapping.iova + mapping.size
            for low, high in ((first, min(last, start)), (max(first, end), last)):
                if low >= high:
                    continue
                if found and found[-1][1:] == (low, access):
                    found[-1] = (found[-1][0], high, access)
                else:
                    found.append((low, high, access))
        return found

    @guarded
    def copy(
        self, source: Ioas, *, iova: int, size: int, at: int | None = None, read: bool = True, write: bool = True
    ) -> None:
        """Map here the memory that `source`, a space of the same iommufd, maps at `[iova, iova + size)`.

        `iova`, `size`: in bytes, the range of one or more whole mappings of `source`. `at`: the IOVA here; None: the
        same. The pages are shared and not charged again. If the original is unmapped later, the copy stays.

        Raises TypeError; ValueError for a space of another iommufd, and unless whole mappings of `source` fill the
        range; ClosedError; VfioError if no device is attached here. Raises IoctlError: EEXIST (something is mapped
        here), EPERM (`write` of a mapping that is read-only).
        Cost: in proportion to `size`, since the kernel maps each page for the devices; nothing is pinned again.
        Source: IOMMU_IOAS_COPY.
        """
        iova, size, place = index(iova), index(size), index(iova if at is None else at)
        if not isinstance(source, Ioas):
            raise TypeError(f"source must be an Ioas, not {type(source).__name__}")
        if source.iommufd is not self.iommufd:
            raise ValueError("source must be a space of the same iommufd: Ioas(space.iommufd)")
        self._check_map(0, place, size, READ)
        self._check_ready()
        if not (read or write):
            raise ValueError("read or write must be True: a mapping permits at least one of them")
        if not source.table.is_whole(iova, size):
            known = describe_mappings(source.table.overlapping(iova=iova, size=size))
            raise ValueError(f"mappings of the source must fill {size:#x} bytes at {iova:#x}; there are: {known}")
        access = (READ if read else 0) | (WRITE if write else 0)
        self._copy((source.id, iova), (self.id, place), size, access)
        for mapping in source.table.overlapping(iova=iova, size=size):
            self.table.add(mapping.iova - iova + place, mapping.size, mapping.vaddr)
            if access != READ | WRITE or self._less_access:
                self._less_access[mapping.iova - iova + place] = access

    def _copy_from_others(self, vaddr: int, iova: int, size: int, access: int) -> bool:
        """Map by a copy, if a space that shares pages with this one has the memory mapped. Return whether it has."""
        for other, place in self._sharing.places_of(vaddr) if self._sharing is not None else ():
            found = other.table.at(place)
            if other is self or found is None or (found.iova, found.vaddr) != (place, vaddr) or found.size < size:
                continue
            if access & ~other._less_access.get(place, READ | WRITE):
                continue
            self._copy((other.id, place), (self.id, iova), size, access)
            self._note_map(vaddr, iova, size, access)
            return True
        return False

    def _copy(self, source: tuple[int, int], target: tuple[int, int], size: int, access: int) -> None:
        """Copy `size` bytes from `source` to `target`, each the number of an IOAS and an IOVA there."""
        (source_id, iova), (target_id, place) = source, target
        argument = bytearray(_copy_layout.pack(40, _FLAGS[access], target_id, source_id, size, place, iova))
        try:
            self._kernel.ioctl(self._fd, abi.IOMMU_IOAS_COPY, argument)
        except OSError as error:
            hints = {
                errno.EPERM: "The source does not allow writing: pass write=False",
                errno.EEXIST: "Unmap that part first",
                errno.ENOENT: "The source does not map all of the range",
            }
            raise IoctlError.of(
                error,
                f"{self.guard.what}: {error.strerror}",
                request="IOMMU_IOAS_COPY",
                arguments={"source": source_id, "iova": iova, "size": size, "at": place},
                hint=hints.get(error.errno or 0, ""),
            ) from error

    # ------------------------------------------------------------------------------------------------ dirty pages

    @property
    def dirty_page_size(self) -> int:
        """As `DirtyRecord.dirty_page_size`."""
        return self.page_size

    @property
    def tracks(self) -> bool:
        """Whether the devices use page tables that record writes, for a DirtyTracking. For the library."""
        return self._tables.tracks

    @guarded
    def start_dirty_tracking(self) -> None:
        """As `DirtyRecord.start_dirty_tracking`. The devices are moved to page tables that record writes.

        Each device moves in one call, as by `Device.attach`. A device that is attached later gets such a page table
        too, or is refused. Cost: the kernel maps all memory of the space once more, without a second charge.
        Source: IOMMU_HWPT_ALLOC_DIRTY_TRACKING, IOMMU_HWPT_SET_DIRTY_TRACKING.
        """
        self._check_ready()
        if not self._tables.tracks:
            self._tables.start(self.devices)
            self._kept_dirty = ExtentSet()

    @guarded
    def stop_dirty_tracking(self) -> None:
        """As `DirtyRecord.stop_dirty_tracking`. The devices are moved back. Cost: as the start.

        If the kernel does not destroy a page table, that error is raised after the record has ended. A second call
        tries again.
        """
        if self.closed:
            return
        if self._tables.tracks:
            self._tables.stop(self.devices)
        else:
            self._tables.destroy()

    def _dirty_parts(self, mappings: Sequence[Mapping]) -> list[Extent]:
        """As `TrackedSpace._dirty_parts`: the kernel is asked for mappings without a gap between them in one call."""
        return runs(super()._dirty_parts(mappings))

    def _read_dirty(self, iova: int, size: int, *, clear: bool) -> list[Extent]:
        """As `TrackedSpace._read_dirty`. Source: IOMMU_HWPT_GET_DIRTY_BITMAP."""
        page, found = self.dirty_page_size, ExtentSet()
        try:
            for bits in self._tables.bitmaps(iova=iova, size=size, page_size=page, clear=clear):
                found = found.added(dirty_extents(bits, iova=iova, size=size, page_size=page))
        except BaseException:
            self._keep_dirty(found.extents)  # one of several page tables has forgotten them
            raise
        return list(found)

    def _unmap_dirty(self, iova: int, size: int) -> list[Extent]:
        """As `TrackedSpace._unmap_dirty`.

        With `cut="replace"`, the devices move to a copy of the space first, so the last look misses no write. Otherwise
        the pages are read before the unmap, and stay dirty in the kernel in case that the unmap fails.
        """
        self._tables.check_tracks()
        if self.cut == "replace":
            self._replace_without(iova, size)
            self.table.discard(iova=iova, size=size)
            return []  # the pages are among those that are kept
        found, kept = self._read_dirty(iova, size, clear=False), self._kept_dirty
        self.unmap_locked(iova, size)
        self._kept_dirty = kept  # without the whole range, which other unmaps keep
        return found

    def _keep_all_dirty(self) -> None:
        """Keep the dirty pages of all mappings. Pages that cannot be read are dirty."""
        if not self._tables.tracks:
            return
        for start, end in self._dirty_parts(list(self.table)):
            found = [Extent(start, end)]
            with suppress(VfioError):
                found = self._read_dirty(start, end - start, clear=False)
            self._keep_dirty(found)

    def _unmap_everything(self) -> int:
        unmapped = self._unmap_in_kernel(0, U64_MAX)
        if unmapped == self.table.mapped:
            self.table.clear()
        else:
            self._note_unmapped(0, U64_MAX + 1, unmapped)
        return unmapped

    def _is_gone(self, mapping: Mapping) -> bool:
        """Return whether the kernel no longer has the mapping.

        A copy of the mapping onto itself changes nothing. The kernel refuses with ENOENT if the source does not exist,
        and otherwise with EEXIST (`iommufd_ioas_copy`).
        """
        flags = _FIXED | int(abi.IOMMU_IOAS_MAP_READABLE)
        argument = bytearray(_copy_layout.pack(40, flags, self.id, self.id, mapping.size, mapping.iova, mapping.iova))
        try:
            self._kernel.ioctl(self.fd, abi.IOMMU_IOAS_COPY, argument)
        except OSError as error:
            return error.errno == errno.ENOENT
        return False

    def _drawn_as(self) -> str:
        return self.guard.what

    # ------------------------------------------------------------------------------------------------ the end

    def release_fd(self) -> int:
        """Release the descriptor as `Handle.release_fd`, and remove the space from the iommufd."""
        if self in self.iommufd.spaces:
            self.iommufd.spaces.remove(self)
        if self._sharing is not None:
            self._sharing.remove(self)
        return super().release_fd()

    def close_dependents(self) -> None:
        """Close the dependents of all devices. Errors are not raised here, but by the close of the device."""
        for device in tuple(self.devices):
            attempt(device.close_dependents, [])

    def _destroy(self) -> None:
        """Destroy the IOAS, unless another process still has the descriptor of an attached device (EBUSY).

        The kernel destroys such an IOAS with the last descriptor. ENOENT: an earlier call destroyed the IOAS, and
        failed nevertheless.
        """
        try:
            self.iommufd.destroy(self.id)
        except IoctlError as error:
            if error.errno not in (errno.EBUSY, errno.ENOENT):
                raise

    def _destroy_all(self) -> list[Exception]:
        """Destroy the IOAS, former ones, and page tables. Return the errors; a second call destroys the rest."""
        failures: list[Exception] = [error for _tables, error in self._try_former()]
        before = len(failures)
        attempt(self._tables.destroy, failures)
        if len(failures) == before:  # otherwise EBUSY
            attempt(self._destroy, failures)
        return failures

    @closing_after_dependents
    def close(self) -> None:
        """Close the attached devices, unmap all memory, and destroy the address space.

        Does nothing if already closed, or in a forked child. All steps are tried, and their errors are raised
        afterwards. A device that cannot be closed (BufferError: a view of a region exists) keeps the space open, with
        all mappings. Release the view, and close the space again. If the kernel does not destroy the space, the space
        stays open, without mappings, until a second close or the close of the iommufd.
        """
        if self.closed:
            return
        self.check_here()
        failures: list[Exception] = []
        for device in tuple(self.devices):
            attempt(partial(close_now, device), failures)
        # A space that `open_device` made is already closed here, together with its device.
        if not self.closed and not self.devices:
            if self.table:
                attempt(self._unmap_everything, failures)
            iommufd = self.iommufd
            iommufd.ends = iommufd.ends or self._owned
            ends = iommufd.ends and not iommufd.devices
            refused = self._destroy_all()
            failures += refused
            if not refused or (ends and iommufd.spaces == [self]):  # all objects end with the iommufd
                attempt(self.close_fd, failures)
            attempt(iommufd.end_unused, failures)
        raise_collected(f"closing {self.guard.what}", failures)


def _duplicate(iommufd: Iommufd) -> int:
    """Return a descriptor of the iommufd for a space. Raises IoctlError (EMFILE)."""
    number = iommufd.fd
    try:
        return iommufd.kernel.dup(number)
    except OSError as error:
        raise IoctlError.of(
            error,
            f"{iommufd.guard.what}: no descriptor for another I/O address space: {error.strerror}",
            request="fcntl",
            arguments={"fd": number},
            hint=descriptor_hint(error.errno or 0),
        ) from error


def _checked_bits(dma_bits: int, cut: str | None) -> int:
    """Return the checked `dma_bits` of a space with `cut`. Raises TypeError, ValueError."""
    if cut not in (None, "pages", "replace"):
        raise ValueError(f"cut must be None, 'pages' or 'replace', not {cut!r}")
    return check_dma_bits(dma_bits)
