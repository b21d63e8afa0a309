"""A VFIO container with a type1 IOMMU: open a container, attach groups, and map memory for their devices.

Source: Documentation/driver-api/vfio.rst; drivers/vfio/container.c, group.c and vfio_iommu_type1.c.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import struct
from collections.abc import Iterable
from functools import partial
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

from pyvfio import ioctls, pci
from pyvfio.arguments import checked_kernel
from pyvfio.errors import (
    CapabilityError,
    GroupBusyError,
    GroupNotViableError,
    IoctlError,
    IovaRangeError,
    RollbackError,
    UnsupportedError,
    VfioError,
    describe_ranges,
    descriptor_hint,
    raise_collected,
)
from pyvfio.extent_set import ExtentSet
from pyvfio.extents import Extent
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
from pyvfio.handle import Handle, attempt, check_kind, checked_fd, give_up_fd
from pyvfio.info import DEFAULT_DMA_AVAIL, IommuInfo, MigrationCapability, parse_iommu_info
from pyvfio.iommu.dirty_bitmap import dirty_extents
from pyvfio.iommu.iova import DMA_BITS, IovaAllocator, check_dma_bits
from pyvfio.iommu.iova_space import IovaSpace
from pyvfio.iommu.iova_space import logger as map_logger
from pyvfio.iommu.space import Mapping
from pyvfio.iommu.table import describe_mappings
from pyvfio.iommu.type1_errors import Type1MapRefusal
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import holders_of_group
from pyvfio.pci.nodes import explain_container, explain_group
from pyvfio.units import GIB, U64_MAX, Iova, IovaRange, align_up, format_ranges

if TYPE_CHECKING:
    from uuid import UUID


logger = logging.getLogger(__name__)

IommuType = ioctls.VfioExtension

_READ = int(ioctls.VFIO_DMA_MAP_FLAG_READ)
_WRITE = int(ioctls.VFIO_DMA_MAP_FLAG_WRITE)
_READ_WRITE = _READ | _WRITE
_MAP_VADDR = int(ioctls.VFIO_DMA_MAP_FLAG_VADDR)
_ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
_UNMAP_VADDR = int(ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)
# vfio_iommu_type1_dma_map and vfio_iommu_type1_dma_unmap. Filling in a ctypes structure would cost twice as much.
_dma_map = struct.Struct("=2I3Q")
_dma_unmap = struct.Struct("=2I2Q")
_fill_map, _fill_unmap = _dma_map.pack_into, _dma_unmap.pack_into
_unmapped_of = struct.Struct("=16xQ").unpack_from
_END = 1 << 64
_MAP, _UNMAP = int(ioctls.VFIO_IOMMU_MAP_DMA), int(ioctls.VFIO_IOMMU_UNMAP_DMA)
_INFO_MAX = 1 << 20  # the longest answer to VFIO_IOMMU_GET_INFO that is accepted, in bytes
_UNKNOWN_RANGE = IovaRange(Iova(0), Iova(512 * GIB - 1))
"""Assumed if the kernel reports no ranges (before 5.4): 39 bits, the smallest width of common IOMMUs."""


class Group(Handle):
    """An open IOMMU group: the smallest set of devices that an IOMMU can isolate from other devices.

    Raises UnavailableError or NotBoundError if the group has no node, GroupBusyError if the group is already open, and
    AccessDeniedError.
    Source: `vfio_group_fops_open`.
    """

    @constructing(Handle.close_fd)
    def __init__(self, number: int, *, kernel: Kernel | None = None) -> None:
        number = _checked_number(number)
        kernel = checked_kernel(kernel)
        path = pci.group_node(number, kernel=kernel)
        try:
            fd = kernel.open(str(path), os.O_RDWR)
        except OSError as error:
            raise self._explain(kernel, number, path, error) from error
        self._own(kernel, fd, number)
        self.has_iommu = not path.name.startswith("noiommu-")

    def _own(self, kernel: Kernel, fd: int, number: int) -> None:
        self.number = number
        self.has_iommu = True
        """False for a group that VFIO created for a device without an IOMMU. Always True after `from_fd`."""
        self.container: Container | None = None
        self.devices: list[Handle] = []
        self.leaves = False
        """Whether the close of the last device also detaches and closes the group: `open_device` opened the group.

        The last group of a container stays while memory is mapped."""
        super().__init__(kernel, fd, f"IOMMU group {number}")

    @classmethod
    @uninterrupted(give_up_fd)
    def from_fd(cls, fd: int, *, number: int, kernel: Kernel | None = None) -> Group:
        """Make a group of an open descriptor, received from a privileged launcher or from a previous process.

        `number`: the N of /dev/vfio/N. The object owns the descriptor from then on, and closes it. If `from_fd` raises,
        the caller still owns the descriptor. Next, call `Container.attach`. If the group is already in a container,
        pass the group to `Container.from_fd(..., groups=[group])` instead.

        Raises ValueError if the descriptor is closed, or does not belong to an IOMMU group. Cost: one ioctl.
        Source: VFIO_GROUP_GET_STATUS.
        """
        group = cls.__new__(cls)
        group._own(checked_kernel(kernel), checked_fd(fd), _checked_number(number))
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
        """Return the flags of VFIO_GROUP_GET_STATUS: whether the group is viable, and whether it has a container."""
        status = ioctls.vfio_group_status(argsz=ctypes.sizeof(ioctls.vfio_group_status))
        self.ioctl("VFIO_GROUP_GET_STATUS", status)
        return ioctls.VfioGroupFlags(status.flags)

    def check_viable(self) -> None:
        """Raise GroupNotViableError, which lists the devices of the group, if a kernel driver owns one of them."""
        if not self.get_status() & ioctls.VFIO_GROUP_FLAGS_VIABLE:
            raise GroupNotViableError(self.number, pci.group_members(self.number, kernel=self.kernel))

    def set_container(self, container: Handle) -> None:
        """Make the raw ioctl VFIO_GROUP_SET_CONTAINER. Use `Container.attach`, which also sets the IOMMU."""
        hints = {
            errno.EPERM: "A device of the group is not isolated: a kernel driver owns the device, or the platform has "
            "no interrupt remapping and vfio_iommu_type1 was loaded without allow_unsafe_interrupts=1",
            errno.EINVAL: "The group already has a container, or the group's IOMMU does not offer the IOVAs that are "
            "mapped in this container. Attach all groups before memory is mapped, or use one container for each group",
            errno.EBUSY: "Another user owns the group's IOMMU domain, or memory is being handed to another process",
        }
        argument = (ctypes.c_char * 4).from_buffer_copy(struct.pack("=i", container.fd))
        self.ioctl("VFIO_GROUP_SET_CONTAINER", argument, hints=hints, fd=container.fd)

    @guarded
    def unset_container(self) -> None:
        """Make the raw ioctl VFIO_GROUP_UNSET_CONTAINER. Use `Container.detach`, which never unmaps memory.

        When the last group leaves a container, the kernel unmaps everything: the container is then `lost`.
        Raises IoctlError (EBUSY while a device of the group is open).
        """
        hints = {errno.EBUSY: "Close the group's devices first"}
        self.ioctl("VFIO_GROUP_UNSET_CONTAINER", hints=hints)
        if self.container is not None:
            self.container.note_left(self)

    def get_device_fd(self, bdf: str, *, vf_token: UUID | str | None = None) -> int:
        """Return a new descriptor of the device `bdf`, close-on-exec: VFIO_GROUP_GET_DEVICE_FD. The caller closes it.

        `vf_token`, for a virtual function: the token of the physical function, if vfio-pci drives that function too.
        For a physical function: the token that users of the virtual functions must pass from now on. While a virtual
        function is open, this must be the token in use.

        Raises TypeError, and ValueError for a token that is not a UUID. Raises IoctlError with ENODEV (the device is
        not in the group, or not bound to vfio-pci), EACCES (wrong token) or EINVAL (no token expected).
        Source: `vfio_pci_core_match`.
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
            return f"{bdf} is not in group {self.number}, or not bound to vfio-pci: pyvfio bind {bdf}"
        if number == errno.EINVAL:
            return self._why_invalid(bdf, has_token=has_token)
        if number != errno.EACCES:
            return descriptor_hint(number or 0)
        physical = pci.physical_function(bdf, kernel=self.kernel)
        if physical is None:
            return f"Virtual functions of {bdf} are open: pass the token with which they were opened as vf_token"
        token = "another vf_token" if has_token else "a vf_token"
        return (
            f"vfio-pci also drives {physical}, the physical function of {bdf}, and so asks for {token}: the token that "
            f"the program with {physical} set last, by open_device({physical!r}, vf_token=) or set_vf_token()"
        )

    def _why_invalid(self, bdf: str, *, has_token: bool) -> str:
        if not has_token or self.container is None:
            return "Attach the group to a container with an IOMMU first: Container.attach"
        if (physical := pci.physical_function(bdf, kernel=self.kernel)) is not None:
            return f"Leave vf_token out: {physical}, the physical function of {bdf}, is not bound to vfio-pci"
        return f"Leave vf_token out: {bdf} is neither a virtual function nor a physical function with SR-IOV"

    def close_dependents(self) -> None:
        """Close the dependents of all devices. Errors are not raised here, but by the close of the device."""
        for device in tuple(self.devices):
            attempt(device.close_dependents, [])

    @closing_after_dependents
    def close(self) -> None:
        """Close the devices of the group, remove the group from the container, and close the group.

        Does nothing if already closed, or in a forked child. Raises VfioError, and does nothing, if the group is the
        last one of a container with mapped memory, which the kernel would unmap. Otherwise all steps are tried, and
        their errors are raised afterwards. A device that cannot be closed (BufferError: a view of a region exists)
        keeps the group open. Release the view, and close the group again.
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
    """Remove a group without open devices from the container, and close the group."""
    if (container := group.container) is not None:
        try:
            group.unset_container()
        except VfioError:  # EBUSY: another process has a device open. The kernel removes the group after the close
            container.groups.pop(group.number, None)
            group.container = None
    attempt(group.close_fd, failures)


def _checked_number(number: int) -> int:
    if (number := index(number)) < 0:
        raise ValueError(f"the number of an IOMMU group is 0 or more, not {number}")
    return number


def _without_last_page(offered: IovaRange, page_size: int) -> IovaRange:
    """Return the range without the last page of the 64-bit address space."""
    if offered.last < U64_MAX or offered.size <= page_size:
        return offered
    return IovaRange(offered.start, Iova(offered.last - page_size))


class Container(IovaSpace):
    """A VFIO container: an `AddressSpace` that the devices of all attached groups share.

    `iommu_type`: VFIO_TYPE1v2_IOMMU or VFIO_TYPE1_IOMMU. None: the first of these that the kernel supports.
    `dma_bits`, 17 to 64: the number of address bits of the devices. pyvfio chooses IOVAs below 2^`dma_bits`, unless a
    DmaMapper has another limit. An IOVA that the caller chooses can lie above.

    Raises UnavailableError (the machine has no VFIO), AccessDeniedError, UnsupportedError (API version, no type1).

    Synchronization: any thread may call any method. Methods take the container's lock, which a long map holds.
    Cost: a map or unmap is one ioctl and 24 bytes of memory.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> container = pyvfio.Container(kernel=kernel)
        >>> first = pyvfio.open_device("0000:00:02.0", container=container)
        >>> second = pyvfio.open_device("0000:00:03.0", container=container)
        >>> sorted(container.groups)
        [2, 3]
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> ring = blocks.add("ring", used_length=pyvfio.MIB, max_length=pyvfio.MIB)
        >>> container.map(vaddr=ring.vaddr, iova=0x100000, size=ring.used_length)
        >>> [(hex(mapping.iova), hex(mapping.size)) for mapping in container.mappings]
        [('0x100000', '0x100000')]
        >>> container.unmap(iova=0x100000, size=ring.used_length)
    """

    @constructing(Handle.close_fd)
    def __init__(
        self,
        *,
        kernel: Kernel | None = None,
        iommu_type: ioctls.VfioExtension | None = None,
        dma_bits: int = DMA_BITS,
    ) -> None:
        kernel, wanted, bits = checked_kernel(kernel), _checked_type(iommu_type), check_dma_bits(dma_bits)
        self._own(kernel, self._open(kernel), bits)
        try:
            self._check_version()
            self._iommu_type = self._choose(wanted)
        except BaseException:
            self.close_fd()
            raise

    def _own(self, kernel: Kernel, fd: int, dma_bits: int) -> None:
        self.groups: dict[int, Group] = {}
        """The attached groups, by number. Read only."""
        self.entry_limit = DEFAULT_DMA_AVAIL
        """The limit of mappings in the container, as the kernel reported when the first group was attached."""
        self._info: IommuInfo | None = None
        self._refuses_last_page = False
        # The arguments of map and unmap, filled in for each call, under the lock.
        self._map_argument = bytearray(_dma_map.size)
        self._unmap_argument = bytearray(_dma_unmap.size)
        self._iommu_type = ioctls.VFIO_TYPE1v2_IOMMU
        self._begin(kernel, fd, "the VFIO container", dma_bits)

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
        """Make a container of an open descriptor, received from a privileged launcher or from a previous process.

        `groups`: the groups in the container, if an IOMMU has been set; `iommu_type` is then the type that was set
        (None: type 1v2). `mapped`: the number of existing mappings, which are not in `mappings`. `dma_bits`: as for
        `Container`. The object owns the descriptor from then on, and closes it. If `from_fd` raises, the caller still
        owns the descriptor.

        Raises ValueError if the descriptor is closed or does not belong to a VFIO container, or if a group has no
        container. Raises UnsupportedError, and IoctlError (EINVAL: no IOMMU is set).
        Cost: three ioctls, and one for each group.
        Source: VFIO_GET_API_VERSION, VFIO_GROUP_GET_STATUS, VFIO_IOMMU_GET_INFO.
        """
        wanted, groups, mapped = _checked_type(iommu_type), _checked_groups(groups), index(mapped)
        bits = check_dma_bits(dma_bits)
        container = cls.__new__(cls)
        container._own(checked_kernel(kernel), checked_fd(fd), bits)
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
                raise ValueError(f"IOMMU group {group.number} is in no container: use attach()")
        info = self.get_info()
        self._adopt(info)
        self.entry_limit = info.dma_avail + mapped
        for group in groups:
            self._enter(group)

    def _enter(self, group: Group) -> None:
        self.groups[group.number] = group
        group.container = self
        group.guard = Guard(group.guard.what, lock=self.guard.lock)  # one lock: no call has to take locks upwards

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
                f"the kernel has version {version} of the VFIO API; pyvfio needs version {ioctls.VFIO_API_VERSION}"
            )

    def _choose(self, wanted: ioctls.VfioExtension | None) -> ioctls.VfioExtension:
        preferred = [ioctls.VFIO_TYPE1v2_IOMMU, ioctls.VFIO_TYPE1_IOMMU] if wanted is None else [wanted]
        for iommu_type in preferred:
            if self.check_extension(iommu_type):
                return iommu_type
        names = " nor ".join(iommu_type.name for iommu_type in preferred)
        raise UnsupportedError(
            f"the kernel has no {names}", hint="pyvfio needs this IOMMU driver: modprobe vfio_iommu_type1"
        )

    # ------------------------------------------------------------------------------------------------ ioctls

    def get_api_version(self) -> int:
        """Return the answer to VFIO_GET_API_VERSION."""
        return self.ioctl("VFIO_GET_API_VERSION")

    def check_extension(self, extension: ioctls.VfioExtension) -> int:
        """Return the answer to VFIO_CHECK_EXTENSION: 0 if the kernel, or the IOMMU that is set, lacks the extension."""
        return self.ioctl("VFIO_CHECK_EXTENSION", index(extension), extension=index(extension))

    def set_iommu(self, iommu_type: ioctls.VfioExtension) -> None:
        """Make the raw ioctl VFIO_SET_IOMMU. `attach` makes this call for the first group."""
        hints = {
            errno.EPERM: "The platform has no interrupt remapping, so a device could forge interrupts. Enable "
            "interrupt remapping in the firmware (QEMU: intel-iommu,intremap=on), or accept the risk: modprobe "
            "vfio_iommu_type1 allow_unsafe_interrupts=1",
            errno.ENODEV: "modprobe vfio_iommu_type1. If the module is loaded, the group has no IOMMU (noiommu-N)",
            errno.EINVAL: "The container has no group or already has an IOMMU, or the group's IOMMU offers no IOVAs",
        }
        self.ioctl("VFIO_SET_IOMMU", index(iommu_type), hints=hints, iommu=iommu_type.name)

    def get_info(self) -> IommuInfo:
        """Return the answer to VFIO_IOMMU_GET_INFO. Repeats the call with a larger buffer until all capabilities fit.

        Raises CapabilityError for a malformed answer.
        """
        size = ctypes.sizeof(ioctls.vfio_iommu_type1_info)
        while size <= _INFO_MAX:
            buffer = bytearray(size)
            struct.pack_into("=I", buffer, 0, size)  # argsz, never above the length of the buffer
            self.ioctl("VFIO_IOMMU_GET_INFO", buffer, argsz=size)
            (needed,) = struct.unpack_from("=I", buffer)
            if needed <= size:
                return parse_iommu_info(buffer)
            size = needed
        raise CapabilityError(f"VFIO_IOMMU_GET_INFO wants a buffer of {size} bytes")

    def map_dma(self, *, vaddr: int, iova: int, size: int, flags: int = _READ | _WRITE) -> None:
        """Make the raw ioctl VFIO_IOMMU_MAP_DMA, and add the mapping to `mappings`. Use `map`, which checks arguments.

        Raises TypeError, PinLimitError, EntryLimitError, IovaOverlapError, IovaRangeError or IoctlError.
        """
        self._map(index(vaddr), index(iova), index(size), index(flags))

    def map_locked(self, vaddr: int, iova: int, size: int, access: int) -> None:
        """As `AddressSpace.map_locked`. `access` can be any flags of VFIO_IOMMU_MAP_DMA."""
        argument, fd, ioctl = self._map_argument, self._fd, self._ioctl
        try:
            _fill_map(argument, 0, 32, access, vaddr, iova, size)
        except struct.error as error:
            raise ValueError(f"vaddr, iova and size have 64 bits, flags has 32: {error}") from error
        try:
            ioctl(fd if fd >= 0 else self.fd, _MAP, argument)
        except OSError as error:
            raise Type1MapRefusal(
                error=error,
                vaddr=vaddr,
                iova=iova,
                size=size,
                flags=access,
                kernel=self._kernel,
                table=self.table,
                entry_limit=self.entry_limit,
                ranges=self.iova_ranges,
                page_size=self.page_size,
                attached=self._info is not None,
            ).explain() from error
        if access & _MAP_VADDR:
            self.table.discard(iova=iova, size=size)
        self.table.add(iova, size, vaddr)
        if map_logger.isEnabledFor(logging.DEBUG):  # checked first, since each grow makes this call
            map_logger.debug("mapped iova=%#x vaddr=%#x size=%#x flags=%#x", iova, vaddr, size, access)

    if not TYPE_CHECKING:  # the checkers would have `self` be an IovaSpace
        _map = guarded(map_locked)

    @guarded
    def unmap_dma(self, *, iova: int, size: int, flags: int = 0, bitmap: ioctls.vfio_bitmap | None = None) -> int:
        """Make the raw ioctl VFIO_IOMMU_UNMAP_DMA, update `mappings`, and return how many bytes the kernel unmapped.

        Use `unmap`, which checks that the kernel unmapped the whole range. `bitmap`: receives the pages that may have
        been written up to the unmap (VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP).

        Raises TypeError, ValueError, IoctlError.
        """
        iova, size, flags = index(iova), index(size), index(flags)
        if not (0 <= iova <= U64_MAX and 0 <= size <= U64_MAX and 0 <= flags < 1 << 32):
            raise ValueError(f"iova and size have 64 bits, flags has 32: {iova:#x}, {size:#x}, {flags:#x}")
        unmapped = self._unmap_dma(iova, size, flags, bitmap)
        if flags & _UNMAP_VADDR:
            return unmapped
        if flags & _ALL and unmapped == self.table.mapped:
            self.table.clear()
        else:
            self._note_unmapped(*((0, _END) if flags & _ALL else (iova, size)), unmapped)
        return unmapped

    def _unmap_in_kernel(self, iova: int, size: int) -> int:
        argument, fd, ioctl = self._unmap_argument, self._fd, self._ioctl
        _fill_unmap(argument, 0, 24, 0, iova, size)
        try:
            ioctl(fd if fd >= 0 else self.fd, _UNMAP, argument)
        except OSError as error:
            raise self._not_unmapped(error, iova, size, 0) from error
        unmapped: int
        (unmapped,) = _unmapped_of(argument)
        return unmapped

    def _unmap_dma(self, iova: int, size: int, flags: int, bitmap: ioctls.vfio_bitmap | None) -> int:
        argument: bytearray | ioctls.DmaUnmapWithBitmap
        if bitmap is None:
            argument = bytearray(_dma_unmap.pack(24, flags, iova, size))
        else:
            flags |= ioctls.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
            argument = ioctls.DmaUnmapWithBitmap(48, flags, iova, size, bitmap)
        try:
            self._kernel.ioctl(self.fd, _UNMAP, argument)
        except OSError as error:
            raise self._not_unmapped(error, iova, size, flags) from error
        unmapped: int
        (unmapped,) = _unmapped_of(argument)
        return unmapped

    def _not_unmapped(self, error: OSError, iova: int, size: int, flags: int) -> IoctlError:
        found = describe_mappings(self.table.overlapping(iova=iova, size=max(size, 1)))
        hint = f"The range must cover whole mappings. The mappings in this range are: {found}"
        return IoctlError.of(
            error,
            f"{self.guard.what}: {error.strerror}",
            request="VFIO_IOMMU_UNMAP_DMA",
            arguments={"iova": iova, "size": size, "flags": flags},
            hint=hint if error.errno == errno.EINVAL else "",
        )

    def _is_gone(self, mapping: Mapping) -> bool:
        """Return whether the kernel no longer has the mapping.

        The kernel refuses a new vaddr: with ENOENT if the mapping does not exist, and with EINVAL if the mapping has a
        valid vaddr (`vfio_dma_do_map`).
        """
        argument = bytearray(_dma_map.pack(32, _MAP_VADDR, mapping.vaddr, mapping.iova, mapping.size))
        try:
            self._kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_MAP_DMA, argument)
        except OSError as error:
            return error.errno == errno.ENOENT
        return False

    # ------------------------------------------------------------------------------------------------ groups

    @property
    def iommu_type(self) -> ioctls.VfioExtension:
        """The IOMMU type, which is set when the first group is attached."""
        return self._iommu_type

    def __repr__(self) -> str:
        mappings = len(self.table)
        counts = f"groups {sorted(self.groups)}, {mappings} mapping{'s' * (mappings != 1)}"
        state = "closed" if self.closed else counts
        return f"<Container {self._iommu_type.name} {state}>"

    def group(self, number: int) -> Group | None:
        """Return the attached group with that number, or None."""
        return self.groups.get(index(number))

    @guarded
    def attach(self, group: Group) -> None:
        """Add a viable group to the container. The first group sets the IOMMU; each group updates the IOVA ranges.

        From now on the container closes the group.

        Raises GroupNotViableError; UnsupportedError for a group without an IOMMU; IoctlError; CapabilityError;
        IovaRangeError if a reserved IOVA is outside the new ranges. After an error the group is not in the container.
        If the removal of the group fails too, RollbackError is raised.
        """
        if not isinstance(group, Group):
            raise TypeError(f"group must be a Group, not {type(group).__name__}")
        if not group.has_iommu:
            raise UnsupportedError(
                f"IOMMU group {group.number} has no IOMMU (noiommu mode): its device can access all of memory",
                hint="pyvfio maps through an IOMMU only: enable the IOMMU, and disable enable_unsafe_noiommu_mode",
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
                    f"IOMMU group {group.number} cannot be used, and could not be removed from the container",
                    [error, *failures],
                    hint="Close the group: the close removes the group from the container",
                ) from error
            raise
        if not self.groups:
            self.entry_limit = info.dma_avail
        self._enter(group)
        logger.debug("attached group %d: IOVA %s", group.number, format_ranges(self.iova_ranges))

    @making(Group.close)
    def open_group(self, number: int) -> Group:
        """Open an IOMMU group and attach the group. Raises as `Group` and `attach`; the group is then closed."""
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
        self._set_ranges(ranges, page_size=page_size)
        self._info, self._refuses_last_page, self._ready = info, refuses_last_page, True

    def _unmaps_last_page(self, page_size: int) -> bool:
        """Return whether the kernel can unmap a range that ends at 2^64.

        Kernels up to at least 6.12 cannot. `vfio_dma_do_unmap` compares with iova + size, which wraps to 0. The call
        then finds no mapping, and with VFIO_DMA_UNMAP_FLAG_ALL also misses all other mappings. Newer kernels return
        EOVERFLOW for a range that wraps, which identifies them. Such a range unmaps nothing on any kernel.
        """
        wraps = bytearray(_dma_unmap.pack(_dma_unmap.size, 0, U64_MAX + 1 - page_size, 2 * page_size))
        try:
            self._kernel.ioctl(self.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, wraps)
        except OSError as error:
            return error.errno == errno.EOVERFLOW
        return False

    @guarded
    def detach(self, group: Group) -> None:
        """Remove a group, whose devices must be closed, from the container.

        Raises VfioError if the group is the last one and memory is mapped, since the kernel would unmap the memory.
        Raises IoctlError (EBUSY) while a device of the group is open; ValueError for a group of another container;
        TypeError.
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
        """Return whether the group is the last one while memory is mapped: without a group the kernel unmaps all."""
        return bool(self.table) and list(self.groups.values()) == [group]

    def check_stays(self, group: Group) -> None:
        """Raise VfioError if `must_stay(group)`."""
        if self.must_stay(group):
            mappings = f"{len(self.table)} mapping{'s' * (len(self.table) != 1)}"
            raise VfioError(
                f"IOMMU group {group.number} is the last group of the container, with {mappings} left",
                hint="Close the mappers, or call unmap_all(), first: without a group the kernel unmaps all memory",
            )

    def note_left(self, group: Group) -> None:
        """Record that the kernel removed a group, and unmapped everything with the last one. For the library."""
        self.groups.pop(group.number, None)
        group.container = None
        group.guard = Guard(group.guard.what)
        if not self.groups:
            self._info, self._ready = None, False
            self.lost = self.lost or bool(self.table)
            self.table.clear()
            if not self.allocator.reservations:
                self.allocator = IovaAllocator()  # the next group has other ranges

    # ------------------------------------------------------------------------------------------------ address space

    @property
    def info(self) -> IommuInfo:
        """The answer to VFIO_IOMMU_GET_INFO when the last group was attached. Raises VfioError without a group."""
        if self._info is None:
            raise VfioError("the container has no group yet", hint="Attach a group first: the group sets the IOMMU")
        return self._info

    @property
    def iova_pgsizes(self) -> int:
        """A bitmap of the page sizes that the IOMMU supports."""
        return self.info.iova_pgsizes

    @property
    @reading
    def entries_left(self) -> int:
        """How many more mappings the kernel accepts. Raises VfioError without a group. Cost: one ioctl."""
        self._check_ready()
        # Kernels before 5.10 do not report the number; DEFAULT_DMA_AVAIL is their limit.
        return min(self.get_info().dma_avail, self.entry_limit - len(self.table))

    def _check_ready(self) -> None:
        self.check_usable()
        _ = self.info  # raises without a group

    def _check_place(self, iova: int, size: int) -> None:
        if self._refuses_last_page and iova + size == _END:
            raise self._no_last_page(iova, size)

    def _drawn_as(self) -> str:
        groups = " and ".join(map(str, sorted(self.groups)))
        return f"container of IOMMU group{'s' * (len(self.groups) != 1)} {groups}"

    def _no_last_page(self, iova: int, size: int) -> IovaRangeError:
        error = IovaRangeError(
            errno.EINVAL,
            f"IOVA {iova:#x}-{U64_MAX:#x} ends with the last page of 64 bits, which this kernel can map but not unmap: "
            "unmap_all() would then unmap no mapping at all",
            request="VFIO_IOMMU_MAP_DMA",
            arguments={"iova": iova, "size": size},
            hint=f"{describe_ranges(self.iova_ranges)}. Leave the last page out, or use a newer kernel (7 works)",
        )
        error.ranges = self.iova_ranges
        return error

    def _unmap_everything(self) -> int:
        if self._info is None:
            return 0
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

    # ------------------------------------------------------------------------------------------------ dirty pages

    @property
    def dirty_page_size(self) -> int:
        """As `DirtyRecord.dirty_page_size`. Raises VfioError without a group."""
        sizes = self._dirty_capability.pgsize_bitmap
        return sizes & -sizes

    @property
    def _dirty_capability(self) -> MigrationCapability:
        if (capability := self.info.migration) is None:
            raise UnsupportedError(
                "this IOMMU does not track writes of devices", hint="VFIO_TYPE1v2_IOMMU does so from Linux 5.8 on"
            )
        return capability

    @guarded
    def start_dirty_tracking(self) -> None:
        """As `DirtyRecord.start_dirty_tracking`. Source: VFIO_IOMMU_DIRTY_PAGES_FLAG_START."""
        _ = self._dirty_capability
        self._dirty_pages(ioctls.vfio_iommu_type1_dirty_bitmap(8, ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_START))
        self._kept_dirty = ExtentSet()

    @guarded
    def stop_dirty_tracking(self) -> None:
        """As `DirtyRecord.stop_dirty_tracking`. Source: VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP."""
        if not self.lost:
            self._dirty_pages(ioctls.vfio_iommu_type1_dirty_bitmap(8, ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP))

    def _read_dirty(self, iova: int, size: int, *, clear: bool) -> list[Extent]:
        """Return the dirty pages of one mapping, which the kernel forgets in any case.

        If several mappings are read at once, kernels write whole words into the bitmap, and a bit that one call left
        behind the end of a mapping appears in a later call (`update_user_bitmap`).
        """
        bits, bitmap = self._make_bitmap(iova, size)
        argument = ioctls.DirtyBitmapWithRange(48, ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP)
        argument.get = ioctls.vfio_iommu_type1_dirty_bitmap_get(iova, size, bitmap)
        self._dirty_pages(argument)
        found = dirty_extents(bytes(bits), iova=iova, size=size, page_size=self.dirty_page_size)
        if not clear:
            self._keep_dirty(found)
        return found

    def _unmap_dirty(self, iova: int, size: int) -> list[Extent]:
        """Unmap one mapping, and return the dirty pages. Source: VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP."""
        bits, bitmap = self._make_bitmap(iova, size)
        self._note_unmap(iova, size, self.table.find(iova, size), self._unmap_dma(iova, size, 0, bitmap))
        return dirty_extents(bytes(bits), iova=iova, size=size, page_size=self.dirty_page_size)

    def _make_bitmap(self, iova: int, size: int) -> tuple[ctypes.Array[ctypes.c_uint8], ioctls.vfio_bitmap]:
        capability, page = self._dirty_capability, self.dirty_page_size
        bits = (ctypes.c_uint8 * align_up(-(-size // page // 8) or 8, 8))()
        if len(bits) > capability.max_dirty_bitmap_size:
            mapping = IovaRange.of(iova=iova, size=size)
            raise ValueError(f"mapping {mapping} is too long for a dirty bitmap: map shorter pieces")
        return bits, ioctls.vfio_bitmap(page, len(bits), ctypes.addressof(bits))

    def _dirty_pages(self, argument: ioctls.vfio_iommu_type1_dirty_bitmap) -> None:
        self.ioctl("VFIO_IOMMU_DIRTY_PAGES", argument, flags=argument.flags)

    # ------------------------------------------------------------------------------------------------ the end

    def close_dependents(self) -> None:
        """Close the dependents of all groups. Errors are not raised here, but by the close of the device."""
        for group in tuple(self.groups.values()):
            group.close_dependents()

    @closing_after_dependents
    def close(self) -> None:
        """Close the devices, unmap all memory, remove and close the groups, and close the container.

        Does nothing if already closed, or in a forked child. All steps are tried, and their errors are raised
        afterwards. A device that cannot be closed (BufferError: a view of a region exists) keeps the group and the
        container open, with all mappings. Release the view, and close the container again.
        """
        if self.closed:
            return
        self.check_here()
        failures: list[Exception] = []
        groups = tuple(self.groups.values())
        _close_devices(groups, failures)
        # A container that `open_device` made is already closed here, together with its device.
        if not self.closed and not any(group.devices for group in groups):
            if self.table:
                attempt(self._unmap_everything, failures)
            for group in tuple(self.groups.values()):
                _end(group, failures)
            attempt(self.close_fd, failures)
        raise_collected("closing the VFIO container", failures)


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
            raise ValueError(f"IOMMU group {group.number} is in another container")
    return given
