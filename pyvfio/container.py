"""A VFIO container with a type1 IOMMU: opening it, attaching groups, mapping memory for their devices.

Source: Documentation/driver-api/vfio.rst; drivers/vfio/container.c, group.c and vfio_iommu_type1.c.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import struct
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from pyvfio import ioctls, pci
from pyvfio.errors import (
    AccessDeniedError,
    CapabilityError,
    GroupBusyError,
    GroupNotViableError,
    IoctlError,
    NotBoundError,
    RollbackError,
    UnavailableError,
    UnmapSizeError,
    UnsupportedError,
    VfioError,
    raise_collected,
)
from pyvfio.handle import Handle, attempt, attempt_all
from pyvfio.info import DEFAULT_DMA_AVAIL, IommuInfo, parse_iommu_info
from pyvfio.iommu.iova import IovaAllocator
from pyvfio.iommu.space import Mapping
from pyvfio.iommu.table import MappingTable
from pyvfio.iommu.type1_errors import MapRefusal, describe_mappings
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.units import GIB, U64_MAX, Iova, IovaRange, format_ranges

logger = logging.getLogger(__name__)

IommuType = ioctls.VfioExtension

_READ = int(ioctls.VFIO_DMA_MAP_FLAG_READ)
_WRITE = int(ioctls.VFIO_DMA_MAP_FLAG_WRITE)
_ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
_pack_dma_map = struct.Struct("=2I3Q").pack  # vfio_iommu_type1_dma_map, at half of what filling that in costs
_INFO_MAX = 1 << 20  # an answer longer than this is no answer
_UNKNOWN_RANGE = IovaRange(Iova(0), Iova(512 * GIB - 1))
"""Assumed where the kernel reports no ranges (before 5.4): 39 bits, the least that an IOMMU of the field has."""


def _open_error(error: OSError, path: str) -> VfioError:
    if error.errno in (errno.EACCES, errno.EPERM):
        try:
            status = os.stat(path)
            mode = f"{stat.filemode(status.st_mode)}, owner {status.st_uid}:{status.st_gid}"
        except OSError:
            mode = "of unknown mode"
        return AccessDeniedError(
            path,
            hint=f"It is {mode}; this is user {os.geteuid()} with groups {sorted(os.getgroups())}. Run as root, or let "
            f'a udev rule give it away: SUBSYSTEM=="vfio", GROUP="vfio", MODE="0660"',
        )
    hint = (
        "Close files, or raise the limit of open ones: ulimit -n" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    )
    return IoctlError.of(error, f"{path} could not be opened", request="open", arguments={"path": path}, hint=hint)


class Group(Handle):
    """An open IOMMU group: the smallest set of devices that an IOMMU can keep apart from the rest.

    Raises UnavailableError or NotBoundError when there is no node for it, GroupBusyError when it is open already,
    AccessDeniedError. Source: `vfio_group_fops_open`.
    """

    def __init__(self, number: int, *, kernel: Kernel | None = None) -> None:
        kernel = kernel or LinuxKernel()
        path = str(pci.group_node(kernel, number))
        try:
            fd = kernel.open(path, os.O_RDWR)
        except OSError as error:
            raise self._explain(kernel, number, path, error) from error
        self._begin(kernel, fd, number)

    def _begin(self, kernel: Kernel, fd: int, number: int) -> None:
        super().__init__(kernel, fd, f"IOMMU group {number}")
        self.number = number
        self.container: Container | None = None
        self.devices: list[Handle] = []

    @staticmethod
    def _explain(kernel: Kernel, number: int, path: str, error: OSError) -> VfioError:
        if error.errno == errno.EBUSY:
            return GroupBusyError(number, pci.holders_of(kernel, pci.group_node(kernel, number)))
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            members = " ".join(member.bdf for member in pci.group_members(kernel, number))
            return NotBoundError(
                f"there is no {path}: no device of IOMMU group {number} is bound to a VFIO driver",
                hint=f"Bind one of its devices to vfio-pci: scripts/bind {members}",
            )
        return _open_error(error, path)

    def get_status(self) -> ioctls.VfioGroupFlags:
        """VFIO_GROUP_GET_STATUS: whether the group is viable and in a container."""
        status = ioctls.vfio_group_status(argsz=ctypes.sizeof(ioctls.vfio_group_status))
        self._ioctl("VFIO_GROUP_GET_STATUS", status)
        return ioctls.VfioGroupFlags(status.flags)

    def check_viable(self) -> None:
        """Raises GroupNotViableError, with the members that block it, when a kernel driver owns one of its devices."""
        if not self.get_status() & ioctls.VFIO_GROUP_FLAGS_VIABLE:
            raise GroupNotViableError(self.number, pci.group_members(self.kernel, self.number))

    def set_container(self, container: Container) -> None:
        """VFIO_GROUP_SET_CONTAINER; `Container.attach` does all that belongs to it."""
        hints = {
            errno.EPERM: "A device of the group is not isolated: it belongs to a kernel driver, or the platform has no "
            "interrupt remapping and vfio_iommu_type1 was loaded without allow_unsafe_interrupts=1",
            errno.EINVAL: "The group is in a container already, or its IOMMU does not offer the IOVAs that are mapped "
            "there; attach all groups before memory is mapped, or use a container for each",
            errno.EBUSY: "The group's IOMMU domain is in other hands, or memory is being handed to another process",
        }
        argument = (ctypes.c_char * 4).from_buffer_copy(struct.pack("=i", container.fd))
        self._ioctl("VFIO_GROUP_SET_CONTAINER", argument, hints=hints, fd=container.fd)

    def unset_container(self) -> None:
        """VFIO_GROUP_UNSET_CONTAINER; EBUSY while a device of the group is open."""
        hints = {errno.EBUSY: "Close the group's devices first"}
        self._ioctl("VFIO_GROUP_UNSET_CONTAINER", hints=hints)

    def get_device_fd(self, bdf: str) -> int:
        """VFIO_GROUP_GET_DEVICE_FD: a new descriptor of the device, close-on-exec; the caller closes it."""
        hints = {errno.ENODEV: f"It is not in group {self.number}, or not bound to vfio-pci: scripts/bind {bdf}"}
        name = ctypes.create_string_buffer(bdf.encode("ascii"))
        return self._ioctl("VFIO_GROUP_GET_DEVICE_FD", name, hints=hints, name=bdf)

    def close(self) -> None:
        """Close its devices, take it out of its container, close it; twice is fine, in a forked child nothing happens.

        Raises what the steps raise, after all of them were tried.
        """
        if self._forked or self.closed:
            return
        self._check_here()
        failures: list[Exception] = []
        for device in tuple(self.devices):
            attempt(device.close, failures)
        if not self.closed:  # else with a device whose container it was: `open_device`
            if self.container is not None:
                self.container._let_go(self, failures)
                self.container = None
            attempt(self._close_fd, failures)
        raise_collected(f"closing IOMMU group {self.number}", failures)


def _unmappable_again(offered: IovaRange, page_size: int) -> IovaRange:
    """The range less the last page of all. What ends at 2^64 can be mapped, but up to 6.12 at least not be unmapped
    again: `vfio_dma_do_unmap` compares with iova + size, which wraps to 0, and finds nothing."""
    if offered.last < U64_MAX or offered.size <= page_size:
        return offered
    return IovaRange(offered.start, Iova(offered.last - page_size))


class Container(Handle):
    """A VFIO container: an `AddressSpace` that the devices of its groups share.

    `iommu_type` is VFIO_TYPE1v2_IOMMU where the kernel has it, unless the caller asks for VFIO_TYPE1_IOMMU.

    Raises UnavailableError (no VFIO on this machine), AccessDeniedError, UnsupportedError (API version, no type1).

    Synchronization: every method may be called from any thread; they take the container's lock, which a long map holds.
    Cost: a map or unmap is one ioctl and 24 bytes.
    """

    def __init__(self, *, kernel: Kernel | None = None, iommu_type: ioctls.VfioExtension | None = None) -> None:
        kernel = kernel or LinuxKernel()
        if iommu_type not in (None, ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU):
            raise ValueError(f"iommu_type must be VFIO_TYPE1_IOMMU or VFIO_TYPE1v2_IOMMU, not {iommu_type!r}")
        self._begin(kernel, self._open(kernel))
        try:
            self._check_version()
            self._iommu_type = self._choose(iommu_type)
        except BaseException:
            self._close_fd()
            raise

    def _begin(self, kernel: Kernel, fd: int) -> None:
        super().__init__(kernel, fd, "the VFIO container")
        self._lock = threading.RLock()
        self._groups: dict[int, Group] = {}
        self._table = MappingTable()
        self._info: IommuInfo | None = None
        self._entry_limit = DEFAULT_DMA_AVAIL
        self.allocator = IovaAllocator()
        self._handing: object | None = None  # who hands it to another process

    def _resume(self, iommu_type: ioctls.VfioExtension, groups: Iterable[Group], *, mapped: int) -> None:
        """As another process has left it, with that IOMMU set, those groups in it, and so many mappings, which the
        caller enters."""
        self._check_version()
        self._iommu_type = iommu_type
        info = self.get_info()
        self._adopt(info)
        self._entry_limit = info.dma_avail + mapped
        for group in groups:
            self._groups[group.number] = group
            group.container = self

    @staticmethod
    def _open(kernel: Kernel) -> int:
        path = str(kernel.dev / "vfio" / "vfio")
        try:
            return kernel.open(path, os.O_RDWR)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                raise _open_error(error, path) from error
            raise UnavailableError(
                f"there is no {path}: this machine has no VFIO, or its module is not loaded",
                hint="modprobe -a vfio-pci vfio_iommu_type1 as root; in a container, hand in /dev/vfio",
            ) from error

    def _check_version(self) -> None:
        if (version := self.get_api_version()) != ioctls.VFIO_API_VERSION:
            raise UnsupportedError(
                f"the kernel speaks version {version} of the VFIO API, and pyvfio version {ioctls.VFIO_API_VERSION}"
            )

    def _choose(self, wanted: ioctls.VfioExtension | None) -> ioctls.VfioExtension:
        preferred = [ioctls.VFIO_TYPE1v2_IOMMU, ioctls.VFIO_TYPE1_IOMMU] if wanted is None else [wanted]
        for iommu_type in preferred:
            if self.check_extension(iommu_type):
                return iommu_type
        names = " nor ".join(iommu_type.name for iommu_type in preferred)
        raise UnsupportedError(
            f"the kernel has no {names}", hint="modprobe vfio_iommu_type1; pyvfio needs that IOMMU driver"
        )

    # ------------------------------------------------------------------------------------------------ ioctls

    def get_api_version(self) -> int:
        """VFIO_GET_API_VERSION."""
        return self._ioctl("VFIO_GET_API_VERSION")

    def check_extension(self, extension: ioctls.VfioExtension) -> int:
        """VFIO_CHECK_EXTENSION: 0 where the kernel, or the IOMMU that is set, has it not."""
        return self._ioctl("VFIO_CHECK_EXTENSION", int(extension), extension=int(extension))

    def set_iommu(self, iommu_type: ioctls.VfioExtension) -> None:
        """VFIO_SET_IOMMU; `attach` does it with the first group."""
        hints = {
            errno.EPERM: "The platform has no interrupt remapping, so a device could forge interrupts. Turn it on in "
            "the firmware (QEMU: intel-iommu,intremap=on), or accept the risk: modprobe vfio_iommu_type1 "
            "allow_unsafe_interrupts=1",
            errno.ENODEV: "modprobe vfio_iommu_type1",
            errno.EINVAL: "The container has no group, or an IOMMU already, or the group's IOMMU offers no IOVAs",
        }
        self._ioctl("VFIO_SET_IOMMU", int(iommu_type), hints=hints, iommu=iommu_type.name)

    def get_info(self) -> IommuInfo:
        """VFIO_IOMMU_GET_INFO, asked again with a larger buffer until all capabilities fit.

        Raises CapabilityError for a malformed answer.
        """
        size = ctypes.sizeof(ioctls.vfio_iommu_type1_info)
        while size <= _INFO_MAX:
            buffer = bytearray(size)
            struct.pack_into("=I", buffer, 0, size)  # never more than the buffer holds
            self._ioctl("VFIO_IOMMU_GET_INFO", buffer, argsz=size)
            (needed,) = struct.unpack_from("=I", buffer)
            if needed <= size:
                return parse_iommu_info(buffer)
            size = needed
        raise CapabilityError(f"VFIO_IOMMU_GET_INFO wants a buffer of {size} bytes")

    def map_dma(self, *, vaddr: int, iova: int, size: int, flags: int = _READ | _WRITE) -> None:
        """VFIO_IOMMU_MAP_DMA, as it is: nothing is checked or recorded here. `map` is what you want.

        Raises PinLimitError, EntryLimitError, IovaOverlapError, IovaRangeError or IoctlError.
        """
        argument = bytearray(_pack_dma_map(32, flags, vaddr, iova, size))
        try:
            self._kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_MAP_DMA, argument)
        except OSError as error:
            raise MapRefusal(
                error=error,
                vaddr=vaddr,
                iova=iova,
                size=size,
                flags=flags,
                kernel=self._kernel,
                overlapping=self._table.overlapping(iova=iova, size=size),
                made_here=len(self._table),
                entry_limit=self._entry_limit,
                mapped=self._table.mapped,
                ranges=self.iova_ranges,
                page_size=self.page_size,
                attached=self._info is not None,
            ).explain() from error

    def unmap_dma(self, *, iova: int, size: int, flags: int = 0, bitmap: ioctls.vfio_bitmap | None = None) -> int:
        """VFIO_IOMMU_UNMAP_DMA, as it is: how many bytes the kernel unmapped. `unmap` is what you want.

        `bitmap`: where it says what may have been written until then (VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP).
        """
        argument = ioctls.vfio_iommu_type1_dma_unmap(24, flags, iova, size)
        if bitmap is not None:
            flags |= ioctls.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
            argument = ioctls.DmaUnmapWithBitmap(48, flags, iova, size, bitmap)
        try:
            self._kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
        except OSError as error:
            found = describe_mappings(self._table.overlapping(iova=iova, size=max(size, 1)))
            hint = f"The range must cover mappings whole; here are: {found}"
            raise IoctlError.of(
                error,
                f"{self._what}: {error.strerror}",
                request="VFIO_IOMMU_UNMAP_DMA",
                arguments={"iova": iova, "size": size, "flags": flags},
                hint=hint if error.errno == errno.EINVAL else "",
            ) from error
        return argument.size

    # ------------------------------------------------------------------------------------------------ groups

    @property
    def iommu_type(self) -> ioctls.VfioExtension:
        """The IOMMU type that is set with the first group."""
        return self._iommu_type

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"groups {sorted(self._groups)}, {len(self._table)} mappings"
        return f"<Container {self._iommu_type.name} {state}>"

    def group(self, number: int) -> Group | None:
        """The group with that number, if it is attached."""
        return self._groups.get(number)

    def attach(self, group: Group) -> None:
        """Put a viable group into the container; the first one sets the IOMMU. Ranges are read anew.

        Raises GroupNotViableError, IoctlError, CapabilityError, and IovaRangeError when an IOVA that is reserved could
        not be used any more; the group is then outside as before (RollbackError: it would not leave). From now on the
        container closes the group.
        """
        with self._lock:
            group.check_viable()
            group.set_container(self)
            first = not self._groups
            try:
                if first:
                    self.set_iommu(self._iommu_type)
                self._adopt(self.get_info())
            except BaseException as error:
                failures: list[Exception] = []
                attempt(group.unset_container, failures)
                if failures and isinstance(error, Exception):
                    raise RollbackError(
                        f"IOMMU group {group.number} cannot be used, and could not be taken out of the container",
                        [error, *failures],
                        hint="Close the group: that takes it out",
                    ) from error
                raise
            if first and self._info is not None:
                self._entry_limit = self._info.dma_avail
            self._groups[group.number] = group
            group.container = self
        logger.debug("attached group %d: IOVA %s", group.number, format_ranges(self.iova_ranges))

    def _adopt(self, info: IommuInfo) -> None:
        page_size = info.iova_pgsizes & -info.iova_pgsizes
        ranges = (_UNKNOWN_RANGE,) if info.iova_ranges is None else info.iova_ranges
        self.allocator.set_ranges((_unmappable_again(r, page_size) for r in ranges), page_size=page_size)
        self._info = info

    def detach(self, group: Group) -> None:
        """Take a group out of the container. Its devices must be closed (EBUSY).

        Raises VfioError when it is the last one and memory is mapped: the kernel would unmap it unseen.
        """
        with self._lock:
            assert self.fd >= 0  # raises where it must not be used
            if self._groups.get(group.number) is not group:
                raise ValueError(f"group {group.number} is not in this container")
            if len(self._groups) == 1 and len(self._table):
                raise VfioError(
                    f"group {group.number} is the container's last, and {len(self._table)} mappings are left",
                    hint="Unmap them first: with the last group the kernel takes them all away",
                )
            group.unset_container()
            group.container = None
            del self._groups[group.number]
            if self._groups:
                self._adopt(self.get_info())
            else:
                self._info = None

    # ------------------------------------------------------------------------------------------------ address space

    @property
    def lost(self) -> bool:
        """Whether everything that was mapped has gone with `close`."""
        return self.closed

    @property
    def page_size(self) -> int:
        """The smallest page of the IOMMU, in bytes."""
        return self.allocator.page_size

    @property
    def info(self) -> IommuInfo:
        """What the kernel said of the IOMMU when the last group was attached. Raises VfioError before the first."""
        if self._info is None:
            raise VfioError("the container has no group yet", hint="Attach a group first; it brings the IOMMU")
        return self._info

    @property
    def iova_pgsizes(self) -> int:
        """Bitmap of the page sizes that the IOMMU knows."""
        return self.info.iova_pgsizes

    @property
    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """Where mappings may lie, ascending: what the kernel reports, less the last page of 2^64."""
        return self.allocator.ranges

    @property
    def reserved_iova(self) -> tuple[IovaRange, ...]:
        """Of `iova_ranges`, what has been reserved, ascending."""
        with self._lock:
            return self.allocator.reservations

    @property
    def entries_left(self) -> int:
        """How many more mappings the kernel takes. One ioctl. Raises VfioError while there is no group."""
        with self._lock:
            self._check_ready()
            # Kernels before 5.10 do not say (DEFAULT_DMA_AVAIL stands in) and stop at the same number.
            return min(self.get_info().dma_avail, self._entry_limit - len(self._table))

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """What has been mapped through this object, ascending. O(n)."""
        with self._lock:
            return tuple(self._table)

    def mapping_at(self, iova: int) -> Mapping | None:
        """The mapping that covers `iova`. O(log n)."""
        with self._lock:
            return self._table.at(iova)

    def mappings_in(self, *, iova: int, size: int) -> list[Mapping]:
        """The mappings that share an address with `[iova, iova + size)`, ascending. O(log n) and their number."""
        with self._lock:
            return self._table.overlapping(iova=iova, size=size)

    def reserve_iova(self, size: int, *, alignment: int, offset: int, top_down: bool = False) -> Iova:
        """Reserve IOVA; as `IovaAllocator.reserve`. Raises VfioError while there is no group."""
        with self._lock:
            self._check_ready()
            return self.allocator.reserve(size, alignment=alignment, offset=offset, top_down=top_down)

    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """Reserve the caller's own IOVA; as `IovaAllocator.reserve_at`. Raises VfioError while there is no group."""
        with self._lock:
            self._check_ready()
            return self.allocator.reserve_at(iova, size)

    def release_iova(self, iova: int) -> None:
        """Give a reservation back; as `IovaAllocator.release`."""
        with self._lock:
            self.allocator.release(iova)

    def _check_ready(self) -> None:
        assert self.fd >= 0  # raises ClosedError or ForkedError
        assert self.info is not None  # raises where there is no group

    def map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        """Let the devices of the container's groups read and write `[vaddr, vaddr + size)` at `iova`.

        Raises ValueError before any system call for what can never be right; otherwise as `map_dma`. All or nothing.
        Cost: the kernel pins every page: some 30 ns each where they are there, and zeroing where they are not.
        """
        if size <= 0 or iova < 0 or (vaddr | iova | size) & (self.allocator.page_size - 1) or iova + size - 1 > U64_MAX:
            raise self._misaligned(iova, size)
        if vaddr < 0 or vaddr + size - 1 > U64_MAX:  # ctypes would cut it to 64 bits
            raise ValueError(f"no process has {size:#x} bytes at vaddr {vaddr:#x}")
        if not (read or write):
            raise ValueError("the device must be let read or write")
        with self._lock:
            try:
                self.map_dma(vaddr=vaddr, iova=iova, size=size, flags=read * _READ | write * _WRITE)
                self._table.add(iova=iova, size=size, vaddr=vaddr)
            except (OSError, VfioError):
                raise
            except BaseException:
                self._withdraw(vaddr=vaddr, iova=iova, size=size)
                raise
        if logger.isEnabledFor(logging.DEBUG):  # each grow passes here
            logger.debug("mapped iova=%#x vaddr=%#x size=%#x", iova, vaddr, size)

    def _withdraw(self, *, vaddr: int, iova: int, size: int) -> None:
        """A signal handler has raised: after a long map likely between the kernel's answer and its entry here.

        What is entered is left to the caller, who finds it with `mapping_at`. What is not must not stay either, for
        nobody would know of it.
        """
        if self._table.overlapping(iova=iova, size=size):
            return
        try:
            self.unmap_dma(iova=iova, size=size)
        except (OSError, VfioError) as error:
            self._table.add(iova=iova, size=size, vaddr=vaddr)  # so that nobody takes its IOVA or its memory for free
            raise RollbackError(
                f"mapping IOVA {IovaRange.of(iova=iova, size=size)} was interrupted, and it could not be unmapped",
                [error],
                hint="The device may reach it; its memory is kept",
            ) from error

    def unmap(self, *, iova: int, size: int, bitmap: ioctls.vfio_bitmap | None = None) -> None:
        """Take whole mappings away; when it returns, exactly `size` bytes at `iova` are out of the devices' reach.

        `bitmap`: as `unmap_dma`; `pyvfio.dirty.tracking` makes one.

        Raises UnmapSizeError when the kernel says another number, IoctlError when it refuses.
        """
        if size <= 0 or iova < 0 or (iova | size) & (self.allocator.page_size - 1) or iova + size - 1 > U64_MAX:
            raise self._misaligned(iova, size)
        with self._lock:
            if self.closed and not self._table.overlapping(iova=iova, size=size):
                return  # close() has unmapped it
            try:
                self._unmap_exactly(iova=iova, size=size, bitmap=bitmap)
            except (OSError, VfioError):
                raise
            except BaseException:
                # A signal handler has raised, perhaps when the kernel had done it: asked again, it then says 0.
                wanted = IovaRange.of(iova=iova, size=size)
                whole = all(wanted.contains(found.range) for found in self._table.overlapping(iova=iova, size=size))
                with suppress(OSError, VfioError):
                    if self.unmap_dma(iova=iova, size=size) in (0, size) and whole:
                        self._table.discard(iova=iova, size=size)
                raise
        logger.debug("unmapped iova=%#x size=%#x", iova, size)

    def _unmap_exactly(self, *, iova: int, size: int, bitmap: ioctls.vfio_bitmap | None) -> None:
        unmapped = self.unmap_dma(iova=iova, size=size, bitmap=bitmap)
        if unmapped != size:
            known = describe_mappings(self._table.overlapping(iova=iova, size=size))
            raise UnmapSizeError(iova=iova, asked=size, unmapped=unmapped, known=known)
        self._table.discard(iova=iova, size=size)

    def _misaligned(self, iova: int, size: int) -> ValueError:
        return ValueError(
            f"addresses and size must be multiples of {self.page_size:#x}, the size above 0 and the end within 64 "
            f"bits: iova {iova:#x}, size {size:#x}"
        )

    # ------------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Close the devices, unmap everything, take the groups out and close them, close the container.

        Twice is fine; in a forked child nothing happens. Raises what the steps raise, after all of them were tried.
        """
        if self._forked or self.closed:
            return
        self._check_here()
        failures: list[Exception] = []
        with self._lock:
            for group in tuple(self._groups.values()):
                for device in tuple(group.devices):
                    attempt(device.close, failures)
            if not self.closed:  # else with the device that it was opened for: `open_device`
                attempt(self._unmap_everything, failures)
                for group in tuple(self._groups.values()):
                    attempt(group.close, failures)
                attempt(self._close_fd, failures)
        raise_collected("closing the VFIO container", failures)

    def _let_go(self, group: Group, failures: list[Exception]) -> None:
        """`group` is being closed: take it out."""
        with self._lock:
            last = self._groups.pop(group.number, None) is not None and not self._groups
            if last:
                attempt(self._unmap_everything, failures)  # the kernel would, with its last group, but unseen
                self._info = None
            # Another process that still has a device open keeps the group in (EBUSY); it leaves when that one closes.
            stays: list[Exception] = []
            attempt(group.unset_container, stays)
            if last and not stays:
                self._table.clear()  # whatever could not be unmapped went now

    def _unmap_everything(self) -> None:
        if not len(self._table):
            return
        if self.check_extension(ioctls.VFIO_UNMAP_ALL):
            self.unmap_dma(iova=0, size=0, flags=_ALL)
            self._table.clear()
            return
        steps = [partial(self.unmap, iova=mapping.iova, size=mapping.size) for mapping in self._table]
        attempt_all("unmapping everything", steps)

    def _check(self) -> None:
        with self._lock:
            self._table._check()
            self.allocator._check()
