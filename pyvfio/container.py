"""A VFIO container with a type1 IOMMU: opening it, attaching groups, mapping memory for their devices.

Source: Documentation/driver-api/vfio.rst; drivers/vfio/container.c, group.c and vfio_iommu_type1.c.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
from collections.abc import Callable, Iterable
from functools import partial
from operator import index
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from pyvfio import ioctls, pci
from pyvfio.errors import (
    CapabilityError,
    GroupBusyError,
    GroupNotViableError,
    IoctlError,
    IovaRangeError,
    RollbackError,
    UnmapSizeError,
    UnsupportedError,
    VfioError,
    describe_ranges,
    descriptor_hint,
    raise_collected,
)
from pyvfio.guard import (
    Guard,
    close_now,
    closing_after_dependents,
    constructing,
    guarded,
    making,
    reading,
    uninterrupted,
)
from pyvfio.handle import Handle, attempt, checked_fd, give_up_fd
from pyvfio.info import DEFAULT_DMA_AVAIL, IommuInfo, parse_iommu_info
from pyvfio.iommu.iova import DMA_BITS, IovaAllocator, check_dma_bits
from pyvfio.iommu.space import Mapping
from pyvfio.iommu.table import MappingTable
from pyvfio.iommu.type1_errors import MapRefusal, describe_mappings
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.groups import holders_of_group
from pyvfio.pci.nodes import explain_container, explain_group
from pyvfio.units import GIB, U64_MAX, Iova, IovaRange, format_ranges

logger = logging.getLogger(__name__)

IommuType = ioctls.VfioExtension

_READ = int(ioctls.VFIO_DMA_MAP_FLAG_READ)
_WRITE = int(ioctls.VFIO_DMA_MAP_FLAG_WRITE)
_MAP_VADDR = int(ioctls.VFIO_DMA_MAP_FLAG_VADDR)
_ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
_UNMAP_VADDR = int(ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)
_pack_dma_map = struct.Struct("=2I3Q").pack  # vfio_iommu_type1_dma_map, at half of what filling that in costs
_dma_unmap = struct.Struct("=2I2Q")  # vfio_iommu_type1_dma_unmap
_NOT_THE_KIND = (errno.EBADF, errno.ENOTTY, errno.EINVAL)
_Answer = TypeVar("_Answer")
_INFO_MAX = 1 << 20  # an answer longer than this is no answer
_UNKNOWN_RANGE = IovaRange(Iova(0), Iova(512 * GIB - 1))
"""Assumed where the kernel reports no ranges (before 5.4): 39 bits, the least that an IOMMU of the field has."""


class Group(Handle):
    """An open IOMMU group: the smallest set of devices that an IOMMU can keep apart from the rest.

    Raises UnavailableError or NotBoundError when there is no node for it, GroupBusyError when it is open already,
    AccessDeniedError. Source: `vfio_group_fops_open`.
    """

    @constructing(Handle.close_fd)
    def __init__(self, number: int, *, kernel: Kernel | None = None) -> None:
        number = _checked_number(number)
        kernel = kernel or LinuxKernel()
        path = pci.group_node(kernel, number)
        try:
            fd = kernel.open(str(path), os.O_RDWR)
        except OSError as error:
            raise self._explain(kernel, number, path, error) from error
        self._own(kernel, fd, number)
        self.has_iommu = not path.name.startswith("noiommu-")

    def _own(self, kernel: Kernel, fd: int, number: int) -> None:
        self.number = number
        self.has_iommu = True
        """False for a group that VFIO made up for a device without an IOMMU. `from_fd` does not look."""
        self.container: Container | None = None
        self.devices: list[Handle] = []
        self.leaves = False
        """Whether the group leaves its container and is closed with its last device, because `open_device` opened it.
        It stays while it is the container's last group and memory is mapped."""
        super().__init__(kernel, fd, f"IOMMU group {number}")

    @classmethod
    @uninterrupted(give_up_fd)
    def from_fd(cls, fd: int, *, number: int, kernel: Kernel | None = None) -> Group:
        """Make a group of a descriptor that is open already: a launcher's with more rights, or a former program's.

        `number`: as its node has it, /dev/vfio/<number>. The descriptor is the object's own from then on, and is closed
        with it; where this raises, it is the caller's as before. `Container.attach` comes next, or
        `Container.from_fd(..., groups=[group])` where the group is in that container already.

        Raises ValueError where the descriptor is closed or no IOMMU group's. Cost: one ioctl.
        Source: VFIO_GROUP_GET_STATUS.
        """
        group = cls.__new__(cls)
        group._own(kernel or LinuxKernel(), checked_fd(fd), _checked_number(number))
        check_kind(group, group.get_status, "an IOMMU group")
        return group

    def __repr__(self) -> str:
        state = "closed" if self.closed else "in no container" if self.container is None else "in a container"
        return f"<Group {self.number} {state}, open devices: {len(self.devices)}>"

    @staticmethod
    def _explain(kernel: Kernel, number: int, path: Path, error: OSError) -> VfioError:
        if error.errno == errno.EBUSY:
            return GroupBusyError(number, holders_of_group(kernel, number))
        return explain_group(kernel, number, path, error)

    def get_status(self) -> ioctls.VfioGroupFlags:
        """VFIO_GROUP_GET_STATUS: whether the group is viable and in a container."""
        status = ioctls.vfio_group_status(argsz=ctypes.sizeof(ioctls.vfio_group_status))
        self.ioctl("VFIO_GROUP_GET_STATUS", status)
        return ioctls.VfioGroupFlags(status.flags)

    def check_viable(self) -> None:
        """Raises GroupNotViableError, with the members that block it, when a kernel driver owns one of its devices."""
        if not self.get_status() & ioctls.VFIO_GROUP_FLAGS_VIABLE:
            raise GroupNotViableError(self.number, pci.group_members(self.kernel, self.number))

    def set_container(self, container: Container) -> None:
        """VFIO_GROUP_SET_CONTAINER, as it is. Use `Container.attach`, which also sets the IOMMU."""
        hints = {
            errno.EPERM: "A device of the group is not isolated: it belongs to a kernel driver, or the platform has no "
            "interrupt remapping and vfio_iommu_type1 was loaded without allow_unsafe_interrupts=1",
            errno.EINVAL: "The group is in a container already, or its IOMMU does not offer the IOVAs that are mapped "
            "there; attach all groups before memory is mapped, or use a container for each",
            errno.EBUSY: "The group's IOMMU domain is in other hands, or memory is being handed to another process",
        }
        argument = (ctypes.c_char * 4).from_buffer_copy(struct.pack("=i", container.fd))
        self.ioctl("VFIO_GROUP_SET_CONTAINER", argument, hints=hints, fd=container.fd)

    @guarded
    def unset_container(self) -> None:
        """VFIO_GROUP_UNSET_CONTAINER, as it is. Use `Container.detach`, which refuses while memory would be unmapped.

        With a container's last group the kernel unmaps everything: the container is `lost` then. Raises IoctlError
        (EBUSY while a device of the group is open).
        """
        hints = {errno.EBUSY: "Close the group's devices first"}
        self.ioctl("VFIO_GROUP_UNSET_CONTAINER", hints=hints)
        if self.container is not None:
            self.container.note_left(self)

    def get_device_fd(self, bdf: str, *, vf_token: UUID | str | None = None) -> int:
        """VFIO_GROUP_GET_DEVICE_FD: a new descriptor of the device, close-on-exec; the caller closes it.

        `vf_token`: for a virtual function whose physical function is bound to vfio-pci, the token of that one. For a
        physical function, the token that its virtual functions ask for from now on, or ask for already while one is
        open.

        Raises TypeError, and ValueError for a token that is no UUID; IoctlError (ENODEV: not in the group, or not bound
        to vfio-pci; EACCES: another token is wanted; EINVAL: none is). Source: `vfio_pci_core_match`.
        """
        name = bdf if vf_token is None else f"{bdf} vf_token={pci.parse_vf_token(vf_token)}"
        try:
            return self._kernel.ioctl(
                self.fd, ioctls.VFIO_GROUP_GET_DEVICE_FD, ctypes.create_string_buffer(name.encode("ascii"))
            )
        except OSError as error:
            raise IoctlError.of(
                error,
                f"{self.guard.what}: {error.strerror}",
                request="VFIO_GROUP_GET_DEVICE_FD",
                arguments={"name": bdf, **({} if vf_token is None else {"vf_token": "given"})},
                hint=self._why_not_opened(bdf, error.errno, has_token=vf_token is not None),
            ) from error

    def _why_not_opened(self, bdf: str, number: int | None, *, has_token: bool) -> str:
        if number == errno.ENODEV:
            return f"It is not in group {self.number}, or not bound to vfio-pci: scripts/bind {bdf}"
        if number == errno.EINVAL:
            return self._why_invalid(bdf, has_token=has_token)
        if number != errno.EACCES:
            return descriptor_hint(number or 0)
        physical = pci.physical_function(self.kernel, bdf)
        if physical is None:
            return "Virtual functions of it are open: give vf_token, the token that they were opened with"
        token = "another token than this one" if has_token else "vf_token, a token"
        return (
            f"{physical}, whose virtual function it is, is bound to vfio-pci, so it wants {token}: the one that the "
            f"program with {physical} has set last, by open_device({physical!r}, vf_token=) or set_vf_token()"
        )

    def _why_invalid(self, bdf: str, *, has_token: bool) -> str:
        if not has_token or self.container is None:
            return "Attach the group to a container with an IOMMU first: Container.attach"
        if (physical := pci.physical_function(self.kernel, bdf)) is not None:
            return f"Leave vf_token out: {physical}, whose virtual function it is, is not bound to vfio-pci"
        return "Leave vf_token out: it is neither a virtual function nor a physical one with SR-IOV"

    def close_dependents(self) -> None:
        """As `Handle.close_dependents`. An error is left to the device: where a dependent stays, its close raises."""
        for device in tuple(self.devices):
            attempt(device.close_dependents, [])

    @closing_after_dependents
    def close(self) -> None:
        """Close the group's devices, take it out of its container, close it; twice is fine, and in a forked child
        nothing happens.

        Raises VfioError, and does nothing, while the group is the container's last one and memory is mapped: the kernel
        would unmap it. Otherwise raises the errors of the steps, after all of them were tried. A device that cannot be
        closed (BufferError: a view of a region lives) keeps the group open; close it again then.
        """
        if self.closed:
            return
        self.check_here()
        if self.container is not None:
            self.container.check_stays(self)
        failures: list[Exception] = []
        _close_devices([self], failures)
        if not self.closed and not self.devices:
            _end(self, failures)
        raise_collected(f"closing IOMMU group {self.number}", failures)


def _close_devices(groups: Iterable[Group], failures: list[Exception]) -> None:
    for group in groups:
        for device in tuple(group.devices):
            attempt(partial(close_now, device), failures)


def _end(group: Group, failures: list[Exception]) -> None:
    """Take a group without devices out of its container, and close it."""
    if (container := group.container) is not None:
        try:
            group.unset_container()
        except VfioError:  # EBUSY: another process has a device open, and the group leaves when that one closes
            container.groups.pop(group.number, None)
            group.container = None
    attempt(group.close_fd, failures)


def _checked_number(number: int) -> int:
    if (number := index(number)) < 0:
        raise ValueError(f"an IOMMU group has a number of 0 or more, not {number}")
    return number


def check_kind(handle: Handle, question: Callable[[], _Answer], kind: str) -> _Answer:
    """The answer to an ioctl that only the descriptors of one kind answer. ValueError, and the descriptor is given up,
    for one of another kind; for the library."""
    try:
        return question()
    except BaseException as error:
        fd = handle.release_fd()
        if isinstance(error, IoctlError) and error.errno in _NOT_THE_KIND:
            where = " of the running kernel; give kernel= with one of a fake" * isinstance(handle.kernel, LinuxKernel)
            raise ValueError(f"descriptor {fd} is not {kind}{where} ({error.request}: {error.strerror})") from error
        raise


def _without_last_page(offered: IovaRange, page_size: int) -> IovaRange:
    """The range less the last page of all 64 bits."""
    if offered.last < U64_MAX or offered.size <= page_size:
        return offered
    return IovaRange(offered.start, Iova(offered.last - page_size))


class Container(Handle):
    """A VFIO container: an `AddressSpace` that the devices of its groups share.

    `iommu_type` is VFIO_TYPE1v2_IOMMU where the kernel has it, unless the caller asks for VFIO_TYPE1_IOMMU. `dma_bits`,
    17 to 64: how many address bits its devices have. IOVAs that pyvfio chooses lie below 2^`dma_bits`, unless a
    DmaMapper has a limit of its own; an IOVA of the caller's may lie above.

    Raises UnavailableError (no VFIO on this machine), AccessDeniedError, UnsupportedError (API version, no type1).

    Synchronization: every method may be called from any thread; they take the container's lock, which a long map holds.
    Cost: a map or unmap is one ioctl and 24 bytes.
    """

    @constructing(Handle.close_fd)
    def __init__(
        self,
        *,
        kernel: Kernel | None = None,
        iommu_type: ioctls.VfioExtension | None = None,
        dma_bits: int = DMA_BITS,
    ) -> None:
        kernel, wanted, bits = kernel or LinuxKernel(), _checked_type(iommu_type), check_dma_bits(dma_bits)
        self._own(kernel, self._open(kernel), bits)
        try:
            self._check_version()
            self._iommu_type = self._choose(wanted)
        except BaseException:
            self.close_fd()
            raise

    def _own(self, kernel: Kernel, fd: int, dma_bits: int) -> None:
        self.groups: dict[int, Group] = {}
        """The groups that are attached, by their numbers. Read only."""
        self.table = MappingTable()
        """The mappings that this object has put into the kernel. For the library; `mappings` has a copy."""
        self.handing: object | None = None
        """The HandOver that is under way, if one is."""
        self.lost = False
        """Whether everything that was mapped has gone with the last group, or with `close`. It stays so."""
        self.entry_limit = DEFAULT_DMA_AVAIL
        """How many mappings the kernel takes in all, as it said with the first group."""
        self._dma_bits = dma_bits
        self._info: IommuInfo | None = None
        self._refuses_last_page = False
        self._kept: list[object] = []
        self._iommu_type = ioctls.VFIO_TYPE1v2_IOMMU
        self.allocator = IovaAllocator()
        super().__init__(kernel, fd, "the VFIO container")

    @classmethod
    @uninterrupted(give_up_fd)
    def from_fd(
        cls,
        fd: int,
        *,
        iommu_type: ioctls.VfioExtension | None = None,
        groups: Iterable[Group] = (),
        mapped: int = 0,
        dma_bits: int = DMA_BITS,
        kernel: Kernel | None = None,
    ) -> Container:
        """Make a container of a descriptor that is open already: a launcher's with more rights, or a former program's.

        `groups`: those that are in it, where an IOMMU has been set, and `iommu_type` is the one that was set (type 1v2
        if not given). `mapped`: how many mappings it has; none of them is in `mappings`. `dma_bits`: as of `Container`.
        The descriptor is the object's own from then on, and is closed with it; where this raises, it is the caller's as
        before.

        Raises ValueError where the descriptor is closed or no VFIO container's, or where a group is in no container;
        UnsupportedError; IoctlError (EINVAL: no IOMMU is set). Cost: three ioctls and one for each group.
        Source: VFIO_GET_API_VERSION, VFIO_GROUP_GET_STATUS, VFIO_IOMMU_GET_INFO.
        """
        wanted, groups, mapped = _checked_type(iommu_type), _checked_groups(groups), index(mapped)
        bits = check_dma_bits(dma_bits)
        container = cls.__new__(cls)
        container._own(kernel or LinuxKernel(), checked_fd(fd), bits)
        check_kind(container, container._check_version, "a VFIO container")
        try:
            container._iommu_type = container._choose(wanted)
            if groups:
                container._resume(groups, mapped)
        except BaseException:
            container.release_fd()
            raise
        return container

    def _resume(self, groups: list[Group], mapped: int) -> None:
        for group in groups:
            if not group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET:
                raise ValueError(f"IOMMU group {group.number} is in no container: attach() it")
        info = self.get_info()
        self._adopt(info)
        self.entry_limit = info.dma_avail + mapped
        for group in groups:
            self._enter(group)

    def _enter(self, group: Group) -> None:
        self.groups[group.number] = group
        group.container = self
        group.guard = Guard(group.guard.what, lock=self.guard.lock)  # so that no two locks have to be taken upwards

    @staticmethod
    def _open(kernel: Kernel) -> int:
        path = kernel.dev / "vfio" / "vfio"
        try:
            return kernel.open(str(path), os.O_RDWR)
        except OSError as error:
            raise explain_container(kernel, path, error) from error

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
        return self.ioctl("VFIO_GET_API_VERSION")

    def check_extension(self, extension: ioctls.VfioExtension) -> int:
        """VFIO_CHECK_EXTENSION: 0 where the kernel, or the IOMMU that is set, has it not."""
        return self.ioctl("VFIO_CHECK_EXTENSION", index(extension), extension=index(extension))

    def set_iommu(self, iommu_type: ioctls.VfioExtension) -> None:
        """VFIO_SET_IOMMU; `attach` does it with the first group."""
        hints = {
            errno.EPERM: "The platform has no interrupt remapping, so a device could forge interrupts. Turn it on in "
            "the firmware (QEMU: intel-iommu,intremap=on), or accept the risk: modprobe vfio_iommu_type1 "
            "allow_unsafe_interrupts=1",
            errno.ENODEV: "modprobe vfio_iommu_type1; where that is loaded, the group has no IOMMU (noiommu-N)",
            errno.EINVAL: "The container has no group, or an IOMMU already, or the group's IOMMU offers no IOVAs",
        }
        self.ioctl("VFIO_SET_IOMMU", index(iommu_type), hints=hints, iommu=iommu_type.name)

    def get_info(self) -> IommuInfo:
        """VFIO_IOMMU_GET_INFO, asked again with a larger buffer until all capabilities fit.

        Raises CapabilityError for a malformed answer.
        """
        size = ctypes.sizeof(ioctls.vfio_iommu_type1_info)
        while size <= _INFO_MAX:
            buffer = bytearray(size)
            struct.pack_into("=I", buffer, 0, size)  # never more than the buffer holds
            self.ioctl("VFIO_IOMMU_GET_INFO", buffer, argsz=size)
            (needed,) = struct.unpack_from("=I", buffer)
            if needed <= size:
                return parse_iommu_info(buffer)
            size = needed
        raise CapabilityError(f"VFIO_IOMMU_GET_INFO wants a buffer of {size} bytes")

    def map_dma(self, *, vaddr: int, iova: int, size: int, flags: int = _READ | _WRITE) -> None:
        """VFIO_IOMMU_MAP_DMA, as it is; `mappings` shows what it did. Use `map`, which checks its arguments.

        Raises TypeError, PinLimitError, EntryLimitError, IovaOverlapError, IovaRangeError or IoctlError.
        """
        self._map_dma(index(vaddr), index(iova), index(size), index(flags))

    def _map_unguarded(self, vaddr: int, iova: int, size: int, flags: int) -> None:
        try:
            argument = bytearray(_pack_dma_map(32, flags, vaddr, iova, size))
        except struct.error as error:
            raise ValueError(f"vaddr, iova and size are of 64 bits, flags of 32: {error}") from error
        try:
            self._kernel.ioctl(self._fd if self._fd >= 0 else self.fd, ioctls.VFIO_IOMMU_MAP_DMA, argument)
        except OSError as error:
            raise MapRefusal(
                error=error,
                vaddr=vaddr,
                iova=iova,
                size=size,
                flags=flags,
                kernel=self._kernel,
                overlapping=self.table.overlapping(iova=iova, size=size),
                made_here=len(self.table),
                entry_limit=self.entry_limit,
                mapped=self.table.mapped,
                ranges=self.iova_ranges,
                page_size=self.page_size,
                attached=self._info is not None,
            ).explain() from error
        if flags & _MAP_VADDR:
            self.table.discard(iova=iova, size=size)
        self.table.add(iova, size, vaddr)
        if logger.isEnabledFor(logging.DEBUG):  # each grow passes here
            logger.debug("mapped iova=%#x vaddr=%#x size=%#x flags=%#x", iova, vaddr, size, flags)

    _map_dma = guarded(_map_unguarded)

    @guarded
    def unmap_dma(self, *, iova: int, size: int, flags: int = 0, bitmap: ioctls.vfio_bitmap | None = None) -> int:
        """VFIO_IOMMU_UNMAP_DMA, as it is: how many bytes the kernel unmapped, which `mappings` shows. Use `unmap`,
        which checks that it was all of them.

        `bitmap`: for the pages that may have been written until then (VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP).
        Raises TypeError, ValueError, IoctlError.
        """
        iova, size, flags = index(iova), index(size), index(flags)
        if not (0 <= iova <= U64_MAX and 0 <= size <= U64_MAX and 0 <= flags < 1 << 32):
            raise ValueError(f"iova and size are of 64 bits, flags of 32: {iova:#x}, {size:#x}, {flags:#x}")
        found = list(self.table) if flags & _ALL else self.table.overlapping(iova=iova, size=size)
        unmapped = self._unmap_dma(iova, size, flags, bitmap)
        if not flags & _UNMAP_VADDR:
            self._note_unmapped(found, unmapped)
        return unmapped

    def _unmap_dma(self, iova: int, size: int, flags: int, bitmap: ioctls.vfio_bitmap | None) -> int:
        argument: bytearray | ioctls.DmaUnmapWithBitmap
        if bitmap is None:
            argument = bytearray(_dma_unmap.pack(24, flags, iova, size))  # a structure costs three times as much
        else:
            flags |= ioctls.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
            argument = ioctls.DmaUnmapWithBitmap(48, flags, iova, size, bitmap)
        try:
            self._kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
        except OSError as error:
            found = describe_mappings(self.table.overlapping(iova=iova, size=max(size, 1)))
            hint = f"The range must cover mappings whole; here are: {found}"
            raise IoctlError.of(
                error,
                f"{self.guard.what}: {error.strerror}",
                request="VFIO_IOMMU_UNMAP_DMA",
                arguments={"iova": iova, "size": size, "flags": flags},
                hint=hint if error.errno == errno.EINVAL else "",
            ) from error
        unmapped: int = _dma_unmap.unpack_from(argument)[3]
        return unmapped

    def _note_unmapped(self, found: list[Mapping], unmapped: int) -> None:
        """Forget the mappings of a range that the kernel has no more: all, if it unmapped just as many bytes."""
        if found and unmapped == sum(mapping.size for mapping in found):
            self.table.discard(iova=found[0].iova, size=found[-1].range.last - found[0].iova + 1)
            return
        for mapping in filter(self._is_gone, found):
            self.table.discard(iova=mapping.iova, size=mapping.size)

    def _is_gone(self, mapping: Mapping) -> bool:
        """Ask the kernel, which refuses a new address for a mapping that it has not with ENOENT, and for one whose
        address is valid with EINVAL (`vfio_dma_do_map`)."""
        argument = bytearray(_pack_dma_map(32, _MAP_VADDR, mapping.vaddr, mapping.iova, mapping.size))
        try:
            self._kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_MAP_DMA, argument)
        except OSError as error:
            return error.errno == errno.ENOENT
        return False

    # ------------------------------------------------------------------------------------------------ groups

    @property
    def iommu_type(self) -> ioctls.VfioExtension:
        """The IOMMU type that is set with the first group."""
        return self._iommu_type

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"groups {sorted(self.groups)}, {len(self.table)} mappings"
        return f"<Container {self._iommu_type.name} {state}>"

    def group(self, number: int) -> Group | None:
        """The group with that number, if it is attached."""
        return self.groups.get(index(number))

    @guarded
    def attach(self, group: Group) -> None:
        """Put a viable group into the container; the first one sets the IOMMU. Ranges are read anew.

        Raises GroupNotViableError, UnsupportedError for a group without an IOMMU, IoctlError, CapabilityError, and
        IovaRangeError when an IOVA that is reserved could not be used any more; the group is then outside as before
        (RollbackError: it would not leave). From now on the container closes the group.
        """
        if not isinstance(group, Group):
            raise TypeError(f"group must be a Group, not {type(group).__name__}")
        if not group.has_iommu:
            raise UnsupportedError(
                f"IOMMU group {group.number} has no IOMMU: VFIO made it up, and its device reaches all of memory",
                hint="pyvfio maps through an IOMMU only: turn on the machine's, and enable_unsafe_noiommu_mode off",
            )
        group.check_viable()
        group.set_container(self)
        try:
            if not self.groups:
                self.set_iommu(self._iommu_type)
            info = self.get_info()
            self._adopt(info)
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
        if not self.groups:
            self.entry_limit = info.dma_avail
        self._enter(group)
        logger.debug("attached group %d: IOVA %s", group.number, format_ranges(self.iova_ranges))

    @making(Group.close)
    def open_group(self, number: int) -> Group:
        """Open an IOMMU group and attach it. Raises as `Group` and `attach`, and then the group is closed."""
        group = Group(number, kernel=self._kernel)
        try:
            self.attach(group)
        except BaseException:
            group.close_fd()
            raise
        return group

    def _adopt(self, info: IommuInfo) -> None:
        page_size = info.iova_pgsizes & -info.iova_pgsizes
        ranges = (_UNKNOWN_RANGE,) if info.iova_ranges is None else info.iova_ranges
        refuses_last_page = any(r.last == U64_MAX for r in ranges) and not self._unmaps_last_page(page_size)
        if refuses_last_page:
            ranges = tuple(_without_last_page(r, page_size) for r in ranges)
        self.allocator.set_ranges(ranges, page_size=page_size)
        self._info, self._refuses_last_page = info, refuses_last_page

    def _unmaps_last_page(self, page_size: int) -> bool:
        """Whether the kernel can unmap what ends at 2^64. Up to 6.12 at least it cannot: `vfio_dma_do_unmap` compares
        with iova + size, which wraps to 0, and finds nothing, not even other mappings with VFIO_DMA_UNMAP_FLAG_ALL.
        Kernels that can know an overflow by its own errno, so a range that wraps tells; it unmaps nothing on any."""
        wraps = bytearray(_dma_unmap.pack(_dma_unmap.size, 0, U64_MAX + 1 - page_size, 2 * page_size))
        try:
            self._kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, wraps)
        except OSError as error:
            return error.errno == errno.EOVERFLOW
        return False

    @guarded
    def detach(self, group: Group) -> None:
        """Take a group out of the container. Its devices must be closed (EBUSY).

        Raises VfioError when the group is the last one and memory is mapped, which the kernel would unmap.
        """
        self.check_usable()
        if not isinstance(group, Group):
            raise TypeError(f"group must be a Group, not {type(group).__name__}")
        if self.groups.get(group.number) is not group:
            raise ValueError(f"group {group.number} is not in this container")
        self.check_stays(group)
        group.unset_container()
        if self.groups:
            self._adopt(self.get_info())

    def must_stay(self, group: Group) -> bool:
        """Whether the group is the last one, and memory is mapped, which the kernel would unmap with it."""
        return bool(len(self.table)) and list(self.groups.values()) == [group]

    def check_stays(self, group: Group) -> None:
        """Raise VfioError where `must_stay`."""
        if self.must_stay(group):
            raise VfioError(
                f"IOMMU group {group.number} is the container's last one, and {len(self.table)} mappings are left",
                hint="Unmap them first (close the mappers, or unmap_all()): with the last group the kernel unmaps all",
            )

    def note_left(self, group: Group) -> None:
        """Forget a group that the kernel has taken out, and everything mapped with the last one. For the library."""
        self.groups.pop(group.number, None)
        group.container = None
        group.guard = Guard(group.guard.what)
        if not self.groups:
            self._info = None
            self.lost = self.lost or bool(len(self.table))
            self.table.clear()
            if not self.allocator.reservations:
                self.allocator = IovaAllocator()  # the next group brings ranges of its own

    # ------------------------------------------------------------------------------------------------ address space

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
        """Where mappings may lie, ascending: what the kernel reports, less the last page of 2^64 where the kernel could
        not unmap it again."""
        return self.allocator.ranges

    @property
    def dma_bits(self) -> int:
        """How many address bits its devices have: IOVAs that pyvfio chooses lie below 2^`dma_bits`."""
        return self._dma_bits

    @property
    @reading
    def reserved_iova(self) -> tuple[IovaRange, ...]:
        """Of `iova_ranges`, what has been reserved, ascending."""
        return self.allocator.reservations

    @property
    @reading
    def entries_left(self) -> int:
        """How many more mappings the kernel takes. One ioctl. Raises VfioError while there is no group."""
        self._check_ready()
        # Kernels before 5.10 do not say (DEFAULT_DMA_AVAIL stands in) and stop at the same number.
        return min(self.get_info().dma_avail, self.entry_limit - len(self.table))

    @property
    @reading
    def mappings(self) -> tuple[Mapping, ...]:
        """What has been mapped through this object, ascending. O(n)."""
        return tuple(self.table)

    @reading
    def mapping_at(self, iova: int) -> Mapping | None:
        """The mapping that covers `iova`. O(log n)."""
        return self.table.at(iova)

    @reading
    def mappings_in(self, *, iova: int, size: int) -> list[Mapping]:
        """The mappings that share an address with `[iova, iova + size)`, ascending. O(log n) and their number."""
        return self.table.overlapping(iova=iova, size=size)

    @guarded
    def reserve_iova(
        self, size: int, *, alignment: int, offset: int, top_down: bool = False, dma_bits: int | None = None
    ) -> Iova:
        """Reserve IOVA; as `IovaAllocator.reserve`. `dma_bits` None: the container's. Raises TypeError, and VfioError
        while there is no group."""
        size, alignment, offset = index(size), index(alignment), index(offset)
        bits = self._dma_bits if dma_bits is None else check_dma_bits(dma_bits)
        self._check_ready()
        return self.allocator.reserve(size, alignment=alignment, offset=offset, top_down=top_down, dma_bits=bits)

    @guarded
    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """Reserve the caller's own IOVA; as `IovaAllocator.reserve_at`. Raises TypeError, and VfioError while there is
        no group."""
        iova, size = index(iova), index(size)
        self._check_ready()
        return self.allocator.reserve_at(iova, size)

    @guarded
    def release_iova(self, iova: int) -> None:
        """Give a reservation back; as `IovaAllocator.release`. Raises TypeError."""
        self.allocator.release(index(iova))

    def _check_ready(self) -> None:
        self.check_usable()
        _ = self.info  # raises where there is no group

    def map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        """Let the devices of the container's groups read and write `[vaddr, vaddr + size)` at `iova`.

        Raises TypeError and ValueError before any system call for arguments that can never be right; otherwise as
        `map_dma`. All or nothing.
        Cost: the kernel pins every page: some 30 ns each where they are there, and zeroing where they are not.
        """
        vaddr, iova, size = index(vaddr), index(iova), index(size)
        flags = (_READ if read else 0) | (_WRITE if write else 0)
        if size <= 0 or iova < 0 or (iova | size) & (self.allocator.page_size - 1) or iova + size - 1 > U64_MAX:
            raise self._misaligned(iova, size)
        if vaddr < 0 or vaddr & (self.allocator.page_size - 1) or vaddr + size - 1 > U64_MAX or not flags:
            raise self._not_memory(vaddr, size, flags)
        if self._refuses_last_page and iova + size - 1 == U64_MAX:
            raise self._no_last_page(iova, size)
        self._map_dma(vaddr, iova, size, flags)

    def _no_last_page(self, iova: int, size: int) -> IovaRangeError:
        error = IovaRangeError(
            errno.EINVAL,
            f"IOVA {iova:#x}-{U64_MAX:#x} ends with the last page of 64 bits, which this kernel maps and cannot unmap "
            "again: unmap_all() would leave all other mappings, too",
            request="VFIO_IOMMU_MAP_DMA",
            arguments={"iova": iova, "size": size},
            hint=f"{describe_ranges(self.iova_ranges)}. Leave the last page out, or use a newer kernel (7 can)",
        )
        error.ranges = self.iova_ranges
        return error

    def _not_memory(self, vaddr: int, size: int, flags: int) -> ValueError:
        if not flags:
            return ValueError("the device must be let read or write")
        return ValueError(f"no process has {size:#x} bytes at vaddr {vaddr:#x} in pages of {self.page_size:#x}")

    def unmap(self, *, iova: int, size: int, bitmap: ioctls.vfio_bitmap | None = None) -> None:
        """Unmap whole mappings; when it returns, exactly `size` bytes at `iova` are out of the devices' reach.

        `bitmap`: as `unmap_dma`; `pyvfio.dirty.tracking` makes one.

        Raises UnmapSizeError before any call where the mappings there are others, or reach beyond the range, and
        UnmapSizeError after the call when the kernel says another number; then `mappings` has what the kernel has.
        Raises IoctlError when the kernel refuses, ValueError for a range that can never be right.
        """
        iova, size = index(iova), index(size)
        page = self.allocator.page_size
        if size <= 0 or iova < 0 or (iova | size) & (page - 1) or iova + size - 1 > U64_MAX:
            raise self._misaligned(iova, size)
        self._unmap(iova, size, bitmap)

    @guarded
    def _unmap(self, iova: int, size: int, bitmap: ioctls.vfio_bitmap | None) -> None:
        if not self.table.is_whole(iova, size):
            self._refuse_unmap(iova, size)
            return
        self._unmap_known(iova, size, bitmap)

    def _unmap_known(self, iova: int, size: int, bitmap: ioctls.vfio_bitmap | None) -> None:
        unmapped = self._unmap_dma(iova, size, 0, bitmap)
        if unmapped == size:
            self.table.discard(iova=iova, size=size)
        else:
            found = self.table.overlapping(iova=iova, size=size)
            self._note_unmapped(found, unmapped)
            raise UnmapSizeError(iova=iova, asked=size, unmapped=unmapped, known=describe_mappings(found))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("unmapped iova=%#x size=%#x", iova, size)

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
        """Reserve IOVA and map memory there, or neither: one call where `reserve_iova` and `map` are two.

        `iova`: the caller's own, as for `reserve_iova_at`; else one is found as `reserve_iova` does, for that
        `alignment`, `top_down` and `dma_bits`. Raises as those, and as `map`.
        """
        flags = (_READ if read else 0) | (_WRITE if write else 0)
        bits = self._dma_bits if dma_bits is None else check_dma_bits(dma_bits)
        place = None if iova is None else index(iova)
        return self._reserve_and_map(index(vaddr), index(size), place, index(alignment), top_down, flags, bits)

    @guarded  # by their positions: keywords cost a guarded call as much as its lock
    def _reserve_and_map(  # noqa: PLR0917
        self,
        vaddr: int,
        size: int,
        iova: int | None,
        alignment: int,
        top_down: bool,  # noqa: FBT001
        flags: int,
        dma_bits: int,
    ) -> Iova:
        if self._fd < 0 or self._info is None:
            self._check_ready()
        allocator = self.allocator
        if vaddr < 0 or vaddr & (allocator.page_size - 1) or vaddr + size - 1 > U64_MAX or not flags:
            raise self._not_memory(vaddr, size, flags)
        if iova is None:
            place = allocator.reserve(size, alignment=alignment, offset=vaddr, top_down=top_down, dma_bits=dma_bits)
        else:
            place = allocator.reserve_at(iova, size)
        try:
            self._map_unguarded(vaddr, place, size, flags)
        except BaseException:
            if not self.table.has(place, size, vaddr):  # it is, where a filter of the log has raised
                allocator.release(place)
            raise
        return place

    def unmap_and_release(self, *, iova: int, size: int, vaddr: int) -> None:
        """Unmap a mapping, unless somebody else has done so already, and release its IOVA. Raises as `unmap`, and
        KeyError where no IOVA is reserved from there on; nothing has changed then."""
        self._unmap_and_release(index(iova), index(size), index(vaddr))

    @guarded
    def _unmap_and_release(self, iova: int, size: int, vaddr: int) -> None:
        if not self.allocator.is_reserved(iova):
            raise KeyError(f"no IOVA is reserved from {iova:#x} on")
        if self.table.has(iova, size, vaddr):
            self._unmap_known(iova, size, None)
        self.allocator.release(iova)

    def _refuse_unmap(self, iova: int, size: int) -> None:
        """Raise for a range that is not what is mapped, unless everything has gone already."""
        found = self.table.overlapping(iova=iova, size=size)
        if found:
            self.check_usable()
        elif self.lost:
            return
        raise UnmapSizeError(iova=iova, asked=size, unmapped=0, known=describe_mappings(found), refused=True)

    @guarded
    def unmap_all(self) -> int:
        """Unmap everything that is mapped in the container, also by other processes; how many bytes that was.

        IOVA stays reserved. Raises UnmapSizeError when the kernel unmapped less than was mapped through this object,
        IoctlError when it refuses. Cost: one ioctl, where the kernel has VFIO_UNMAP_ALL (5.12), else one a mapping.
        Source: VFIO_DMA_UNMAP_FLAG_ALL.
        """
        self.check_usable()
        if self._info is None:
            return 0
        asked, known = self.table.mapped, describe_mappings(list(self.table))
        unmapped = self._unmap_everything()
        if unmapped < asked:
            raise UnmapSizeError(iova=0, asked=asked, unmapped=unmapped, known=known)
        return unmapped

    def _unmap_everything(self) -> int:
        if self.check_extension(ioctls.VFIO_UNMAP_ALL):
            return self.unmap_dma(iova=0, size=0, flags=_ALL)
        unmapped, failures = 0, list[Exception]()
        for mapping in tuple(self.table):
            try:
                unmapped += self.unmap_dma(iova=mapping.iova, size=mapping.size)
            except VfioError as error:
                failures.append(error)
        raise_collected("unmapping everything", failures)
        return unmapped

    def _misaligned(self, iova: int, size: int) -> ValueError:
        return ValueError(
            f"addresses and size must be multiples of {self.page_size:#x}, the size above 0 and the end within 64 "
            f"bits: iova {iova:#x}, size {size:#x}"
        )

    # ------------------------------------------------------------------------------------------------ the end

    def close_fd(self) -> None:
        """Close the descriptor: everything is unmapped, if the table says so."""
        super().close_fd()
        self.lost = self.lost or not len(self.table)
        if self.lost:
            self._kept.clear()

    def keep(self, memory: Iterable[object]) -> None:
        """As `AddressSpace.keep`."""
        self._kept.extend(memory)

    def close_dependents(self) -> None:
        """As `Group.close_dependents`."""
        for group in tuple(self.groups.values()):
            group.close_dependents()

    @closing_after_dependents
    def close(self) -> None:
        """Close the devices, unmap everything, take the groups out and close them, close the container.

        Twice is fine; in a forked child nothing happens. Raises the errors of the steps, after all of them were tried.
        A device that cannot be closed (BufferError: a view of a region lives) keeps its group and the container open,
        with everything mapped; close it again then.
        """
        if self.closed:
            return
        self.check_here()
        failures: list[Exception] = []
        groups = tuple(self.groups.values())
        _close_devices(groups, failures)
        # Else it was closed with the device that it was opened for: `open_device`.
        if not self.closed and not any(group.devices for group in groups):
            if len(self.table):
                attempt(self._unmap_everything, failures)
            for group in tuple(self.groups.values()):
                _end(group, failures)
            attempt(self.close_fd, failures)
        raise_collected("closing the VFIO container", failures)

    @reading
    def _check(self) -> None:
        self.table._check()
        self.allocator._check()


def _checked_type(iommu_type: ioctls.VfioExtension | None) -> ioctls.VfioExtension | None:
    if iommu_type is None:
        return None
    if index(iommu_type) not in (ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU):
        raise ValueError(f"iommu_type must be VFIO_TYPE1_IOMMU or VFIO_TYPE1v2_IOMMU, not {iommu_type!r}")
    return ioctls.VfioExtension(index(iommu_type))


def _checked_groups(groups: Iterable[Group]) -> list[Group]:
    given = list(groups)
    for group in given:
        if not isinstance(group, Group):
            raise TypeError(f"groups must be Groups, not {type(group).__name__}")
        if group.container is not None:
            raise ValueError(f"IOMMU group {group.number} is in another Container")
    return given
