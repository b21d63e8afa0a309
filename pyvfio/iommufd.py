"""An open /dev/iommu, and a method for each ioctl that an owner of devices needs.

An iommufd has objects with numbers: I/O address spaces (IOAS), devices, and page tables of devices (HWPT). The methods
are thin: they check the ranges of arguments, make one ioctl, and explain a failure. `Ioas` keeps account of mappings.

The ioctls of virtual IOMMUs and of fault queues have structures in `pyvfio.iommufd_ioctls` and no methods;
`Iommufd.ioctl` makes them by name.

Source: Documentation/userspace-api/iommufd.rst; drivers/iommu/iommufd/main.c, ioas.c, io_pagetable.c, hw_pagetable.c,
device.c and vfio_compat.c.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from pyvfio import ioctls
from pyvfio import iommufd_ioctls as abi
from pyvfio.arguments import checked_kernel
from pyvfio.errors import CapabilityError, IoctlError, raise_collected
from pyvfio.guard import close_now, closing_after_dependents, constructing, guarded, uninterrupted
from pyvfio.handle import Handle, attempt, check_kind, checked_fd, give_up_fd
from pyvfio.iommu import iommufd_hints as hints
from pyvfio.kernel import Kernel
from pyvfio.pci.cdevs import explain_iommufd, iommufd_node
from pyvfio.units import U64_MAX, Iova, IovaRange, check_whole_number, is_power_of_two

_RANGES = 32  # the ranges of IOVA for which the first call has room
_RANGES_MAX = 1 << 16
_HW_INFO = 64  # the bytes of an IOMMU's answer for which the first call has room
_HW_INFO_MAX = 1 << 20
_WORD = 64  # the bits of a word of a bitmap of dirty pages


@dataclass(frozen=True, slots=True)
class HwInfo:
    """The description of the IOMMU of a device: the answer to IOMMU_GET_HW_INFO, a snapshot."""

    data_type: int
    """The kind of IOMMU, an `iommu_hw_info_type`; of a newer kernel, perhaps a number without a name here."""
    data: bytes
    """The structure of that kind, such as `iommu_hw_info_vtd`."""
    capabilities: abi.iommufd_hw_capabilities
    max_pasid_log2: int
    """The width of the device's PASIDs in bits; 0: no PASIDs, or a kernel before 6.15."""


class Iommufd(Handle):
    """An open /dev/iommu: the owner of I/O address spaces, and of the devices that are bound to it.

    Raises UnavailableError (the machine has no iommufd, or no node), AccessDeniedError, IoctlError.

    Ids are the kernel's numbers of objects, from 1 on, in one series for all kinds. All sizes are in bytes. Each method
    raises ValueError or TypeError for arguments that no kernel accepts. A refusal of the kernel raises IoctlError, with
    the errno, the arguments and a hint.

    Synchronization: any thread may call any method. Spaces and devices share the lock of the iommufd; the methods that
    make one ioctl take no lock.
    Cost: one ioctl each, unless stated.
    Source: `iommufd_fops`.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel("7.3", iommufd=True)
        >>> with pyvfio.Iommufd(kernel=kernel) as iommufd:
        ...     ioas_id = iommufd.ioas_alloc()
        ...     iommufd.ioas_iova_ranges(ioas_id)
        ((IovaRange(start=0x0, last=0xffffffffffffffff),), 1)
    """

    requests: ClassVar[Mapping[str, int]] = {**vars(ioctls), **vars(abi)}
    """The ioctls of both headers: an iommufd with `set_vfio_ioas` also answers those of a type1 container."""

    @constructing(Handle.close_fd)
    def __init__(self, *, kernel: Kernel | None = None) -> None:
        kernel = checked_kernel(kernel)
        path = iommufd_node(kernel)
        try:
            fd = kernel.open(str(path), os.O_RDWR)
        except OSError as error:
            raise explain_iommufd(kernel, path, error) from error
        self._own(kernel, fd)

    def _own(self, kernel: Kernel, fd: int) -> None:
        self.devices: list[Handle] = []
        """The open devices that are bound to the iommufd. Read only."""
        self.spaces: list[Handle] = []
        """The open I/O address spaces that were made through this object. Read only."""
        self.ends = False
        """Whether the close of the last space or device closes the iommufd: the `Ioas` that opened it is closed."""
        self.charge_moves = True
        """Whether `ioas_change_process` can charge all mappings to another process.

        False after the process to which a mapping was charged has ended, if memory counts by process. For the library.
        """
        self._maps_files: bool | None = None
        self._abandoned: list[int] = []
        super().__init__(kernel, fd, "the iommufd")

    @classmethod
    @uninterrupted(give_up_fd)
    def from_fd(cls, fd: int, *, kernel: Kernel | None = None) -> Iommufd:
        """Make an iommufd of an open descriptor, received from a privileged launcher or from a previous process.

        The object owns and closes the descriptor from then on. If `from_fd` raises, the caller still owns the
        descriptor. `devices` and `spaces` are empty: objects that exist are known by their ids only.

        Raises ValueError if the descriptor is closed, or does not belong to /dev/iommu. Cost: one ioctl.
        Source: IOMMU_OPTION.
        """
        iommufd = cls.__new__(cls)
        iommufd._own(checked_kernel(kernel), checked_fd(fd))
        check_kind(iommufd, iommufd._get_rlimit_mode, "an iommufd")
        return iommufd

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"open, devices: {len(self.devices)}, spaces: {len(self.spaces)}"
        return f"<Iommufd {state}>"

    # ------------------------------------------------------------------------------------------------ objects

    def destroy(self, object_id: int) -> None:
        """Destroy an object: an I/O address space with all mappings, or a page table. IOMMU_DESTROY.

        Raises IoctlError with EBUSY (in use) or ENOENT.
        """
        argument = abi.iommu_destroy(id=_u32(object_id, "object_id"))
        self._call("IOMMU_DESTROY", argument, hints.DESTROY, id=argument.id)

    @guarded
    def abandon(self, object_id: int) -> None:
        """Destroy an object that nothing uses. For the library.

        If the kernel refuses, does not raise, and tries again with the next such object.
        """
        self._abandoned.append(object_id)
        for number in tuple(self._abandoned):
            try:
                self.destroy(number)
            except IoctlError as error:
                if error.errno != errno.ENOENT:
                    continue
            self._abandoned.remove(number)

    def ioas_alloc(self) -> int:
        """Make an I/O address space, and return the id. `Ioas` is a space with an account of mappings."""
        argument = abi.iommu_ioas_alloc()
        self._call("IOMMU_IOAS_ALLOC", argument, {})
        return argument.out_ioas_id

    # ------------------------------------------------------------------------------------------------ IOVA

    def ioas_iova_ranges(self, ioas_id: int) -> tuple[tuple[IovaRange, ...], int]:
        """Return the ranges in which IOVAs can be mapped, ascending, and the alignment of mappings in bytes.

        Each attached device narrows the ranges. Without a device: 0 to 2^64-1, with an alignment of 1.

        Raises CapabilityError for a malformed answer. Cost: two ioctls for more than 32 ranges.
        """
        room = _RANGES
        while room <= _RANGES_MAX:
            places = (abi.iommu_iova_range * room)()
            argument = abi.iommu_ioas_iova_ranges(
                ioas_id=_u32(ioas_id, "ioas_id"), num_iovas=room, allowed_iovas=ctypes.addressof(places)
            )
            try:
                self._call("IOMMU_IOAS_IOVA_RANGES", argument, hints.IOVA_RANGES, ioas_id=argument.ioas_id)
            except IoctlError as error:
                if error.errno != errno.EMSGSIZE or argument.num_iovas <= room:
                    raise
                room = argument.num_iovas
                continue
            return _ranges(places[: argument.num_iovas]), argument.out_iova_alignment
        raise CapabilityError(f"IOMMU_IOAS_IOVA_RANGES wants room for {room} ranges")

    def ioas_allow_iovas(self, ioas_id: int, ranges: Iterable[IovaRange]) -> None:
        """Let the kernel choose IOVAs in these ranges only, and refuse devices that would narrow them.

        Replaces the ranges of an earlier call. Empty `ranges` remove the restriction. A caller can choose an IOVA
        outside of the ranges.

        Raises IoctlError with EADDRINUSE (a device reserves IOVA of the ranges), EINVAL (ranges overlap) or ENOENT.
        """
        given = [(each.start, each.last) for each in _checked_ranges(ranges)]
        places = (abi.iommu_iova_range * len(given))(*(abi.iommu_iova_range(*each) for each in given))
        argument = abi.iommu_ioas_allow_iovas(
            ioas_id=_u32(ioas_id, "ioas_id"), num_iovas=len(given), allowed_iovas=ctypes.addressof(places)
        )
        text = ", ".join(f"{start:#x}-{last:#x}" for start, last in given) or "none"
        self._call("IOMMU_IOAS_ALLOW_IOVAS", argument, hints.ALLOW_IOVAS, ioas_id=argument.ioas_id, ranges=text)

    # ------------------------------------------------------------------------------------------------ mappings

    def ioas_map(
        self, ioas_id: int, *, vaddr: int, size: int, iova: int | None = None, read: bool = True, write: bool = True
    ) -> Iova:
        """Map `[vaddr, vaddr + size)` of this process for devices, and return the IOVA.

        `iova` None: the kernel's choice. The map is all or nothing. While no device is attached to the space, the
        kernel checks and pins nothing, and the attach of a device can fail later.

        Raises IoctlError with EEXIST, EINVAL, EFAULT, ENOMEM, ENOSPC, EOVERFLOW or ENOENT.
        Cost: the kernel pins every page, if a device is attached.
        """
        flags = _map_flags(iova, read=read, write=write)
        argument = abi.iommu_ioas_map(
            flags=flags,
            ioas_id=_u32(ioas_id, "ioas_id"),
            user_va=_start(vaddr, size, "vaddr"),
            length=_size(size),
            iova=0 if iova is None else _start(iova, size, "iova"),
        )
        given = {"ioas_id": argument.ioas_id, "vaddr": argument.user_va, **_place(iova), "size": argument.length}
        self._call("IOMMU_IOAS_MAP", argument, hints.IOAS_MAP, **given, flags=flags)
        return Iova(argument.iova)

    def ioas_map_file(
        self,
        ioas_id: int,
        fd: int,
        *,
        start: int,
        size: int,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
    ) -> Iova:
        """Map `[start, start + size)` of a file for devices, and return the IOVA. `iova` None: the kernel's choice.

        The file is a memfd, on tmpfs or hugetlbfs, or a DMA-buf of a VFIO device's BAR. The descriptor can be closed
        afterwards. The kernel does not check whether the descriptor was opened for writing, or the memfd is sealed:
        devices can write to such a file. While no device is attached, the kernel checks nothing, as for `ioas_map`.

        Raises as `ioas_map`; IoctlError with ENOTTY on kernels before 6.13, and EBADF.
        Source: IOMMU_IOAS_MAP_FILE.
        """
        flags = _map_flags(iova, read=read, write=write)
        argument = abi.iommu_ioas_map_file(
            flags=flags,
            ioas_id=_u32(ioas_id, "ioas_id"),
            fd=checked_fd(fd),
            start=_start(start, size, "start"),
            length=_size(size),
            iova=0 if iova is None else _start(iova, size, "iova"),
        )
        given = {"ioas_id": argument.ioas_id, "fd": argument.fd, "start": argument.start, **_place(iova)}
        self._call("IOMMU_IOAS_MAP_FILE", argument, hints.IOAS_MAP_FILE, **given, size=argument.length, flags=flags)
        return Iova(argument.iova)

    @property
    def maps_files(self) -> bool:
        """Whether the kernel has `ioas_map_file`. Cost: one ioctl, the first time."""
        if self._maps_files is None:
            # A mapping for neither reading nor writing, which no kernel makes.
            argument = abi.iommu_ioas_map_file(fd=-1)
            try:
                self._call("IOMMU_IOAS_MAP_FILE", argument, {})
            except IoctlError as error:
                self._maps_files = error.errno != errno.ENOTTY
        return self._maps_files is not False

    def ioas_copy(
        self,
        dst_ioas_id: int,
        src_ioas_id: int,
        *,
        src_iova: int,
        size: int,
        iova: int | None = None,
        read: bool = True,
        write: bool = True,
    ) -> Iova:
        """Map the memory behind `[src_iova, src_iova + size)` of one space in another, and return the IOVA there.

        The pages are pinned and charged once for both spaces. The two spaces can be the same. `iova` None: the kernel's
        choice. Unmapping the source leaves the copy.

        Raises IoctlError with ENOENT (a gap in the source), EPERM (write, from memory that is mapped read-only),
        EEXIST, EINVAL or ENOSPC.
        """
        flags = _map_flags(iova, read=read, write=write)
        argument = abi.iommu_ioas_copy(
            flags=flags,
            dst_ioas_id=_u32(dst_ioas_id, "dst_ioas_id"),
            src_ioas_id=_u32(src_ioas_id, "src_ioas_id"),
            length=_size(size),
            dst_iova=0 if iova is None else _start(iova, size, "iova"),
            src_iova=_start(src_iova, size, "src_iova"),
        )
        given = {"dst_ioas_id": argument.dst_ioas_id, "src_ioas_id": argument.src_ioas_id, **_place(iova)}
        self._call(
            "IOMMU_IOAS_COPY",
            argument,
            hints.IOAS_COPY,
            **given,
            src_iova=argument.src_iova,
            size=argument.length,
            flags=flags,
        )
        return Iova(argument.dst_iova)

    def ioas_unmap(self, ioas_id: int, *, iova: int, size: int) -> int:
        """Unmap all mappings in `[iova, iova + size)`, and return the number of unmapped bytes.

        The call is not atomic: mappings are unmapped in ascending order, up to one that the range cuts. After an error
        some can be gone.

        Raises IoctlError with ENOENT: nothing is mapped there, a mapping is cut, or no such space.
        """
        argument = abi.iommu_ioas_unmap(
            ioas_id=_u32(ioas_id, "ioas_id"), iova=_start(iova, size, "iova"), length=_size(size)
        )
        if (argument.iova, argument.length) == (0, U64_MAX):
            raise ValueError("this range unmaps everything: call ioas_unmap_all()")
        return self._unmap(argument)

    def ioas_unmap_all(self, ioas_id: int) -> int:
        """Unmap all mappings of the space, and return the number of unmapped bytes; 0 if there are none."""
        return self._unmap(abi.iommu_ioas_unmap(ioas_id=_u32(ioas_id, "ioas_id"), iova=0, length=U64_MAX))

    def _unmap(self, argument: abi.iommu_ioas_unmap) -> int:
        given = {"ioas_id": argument.ioas_id, "iova": argument.iova, "size": argument.length}
        self._call("IOMMU_IOAS_UNMAP", argument, hints.IOAS_UNMAP, **given)
        return argument.length

    def ioas_change_process(self) -> None:
        """Charge the pinned memory of all mappings to this process. All or nothing. IOMMU_IOAS_CHANGE_PROCESS.

        For a live update: the new process makes this call on the received descriptor. All mappings must be of files. If
        memory counts by process, the old process must still live: otherwise the call is EINVAL, and Linux 7.3 charges
        the caller for good.

        Raises IoctlError with EINVAL (a mapping by address, or as above), ENOMEM (RLIMIT_MEMLOCK) or ENOTTY (before
        6.13).
        """
        self._call("IOMMU_IOAS_CHANGE_PROCESS", abi.iommu_ioas_change_process(), hints.CHANGE_PROCESS)

    def ioas_noiommu_get_pa(self, ioas_id: int, *, iova: int, size: int) -> tuple[int, int]:
        """Return the physical address of the memory at `iova`, and how many bytes from there on are contiguous.

        For devices without an IOMMU, which put this address on the bus. `size`: the most bytes to look at.

        Raises IoctlError with EOPNOTSUPP (no device without an IOMMU is attached), ENOENT (nothing is mapped there),
        EPERM (without CAP_SYS_RAWIO) or ENOTTY (before 7.3).
        """
        argument = abi.iommu_ioas_noiommu_get_pa(
            ioas_id=_u32(ioas_id, "ioas_id"), iova=_start(iova, size, "iova"), length=_size(size)
        )
        given = {"ioas_id": argument.ioas_id, "iova": argument.iova, "size": argument.length}
        self._call("IOMMU_IOAS_NOIOMMU_GET_PA", argument, hints.GET_PA, **given)
        return argument.out_phys, argument.length

    # ------------------------------------------------------------------------------------------------ options

    @property
    def counts_by_process(self) -> bool:
        """Whether pinned memory counts against RLIMIT_MEMLOCK by process. False, the default: by user.

        By process, the memory is in VmLck, together with mlock(2). By user, the limit is for the sum of all processes
        of the user, without mlock(2), and no file shows the sum.

        Raises IoctlError. Source: IOMMU_OPTION_RLIMIT_MODE.
        """
        return self._get_rlimit_mode() == 1

    def _get_rlimit_mode(self) -> int:
        return self._option(abi.IOMMU_OPTION_RLIMIT_MODE, abi.IOMMU_OPTION_OP_GET, hints.RLIMIT_MODE)

    def set_counts_by_process(self, *, enabled: bool) -> None:
        """Choose how pinned memory counts: see `counts_by_process`.

        Raises IoctlError with EPERM (without CAP_SYS_RESOURCE) or EBUSY (the iommufd has a space or a device already).
        """
        self._option(
            abi.IOMMU_OPTION_RLIMIT_MODE,
            abi.IOMMU_OPTION_OP_SET,
            hints.RLIMIT_MODE,
            value=_flag(enabled, "enabled"),
        )

    def huge_pages(self, ioas_id: int) -> bool:
        """Return whether page tables of the space may have large pages: True by default. IOMMU_OPTION_HUGE_PAGES."""
        found = self._option(
            abi.IOMMU_OPTION_HUGE_PAGES,
            abi.IOMMU_OPTION_OP_GET,
            hints.HUGE_PAGES,
            object_id=_u32(ioas_id, "ioas_id"),
        )
        return found == 1

    def set_huge_pages(self, ioas_id: int, *, enabled: bool) -> None:
        """Let the page tables of the space have large pages, or pages of the smallest size only.

        Without large pages, VFIO_IOMMU_UNMAP_DMA on the iommufd can unmap parts of mappings: see `set_vfio_ioas`.

        Raises IoctlError with EINVAL while a device is attached and memory is mapped.
        """
        self._option(
            abi.IOMMU_OPTION_HUGE_PAGES,
            abi.IOMMU_OPTION_OP_SET,
            hints.HUGE_PAGES,
            object_id=_u32(ioas_id, "ioas_id"),
            value=_flag(enabled, "enabled"),
        )

    def _option(
        self,
        option: abi.iommufd_option,
        op: abi.iommufd_option_ops,
        why: Mapping[int, str],
        *,
        object_id: int = 0,
        value: int = 0,
    ) -> int:
        argument = abi.iommu_option(option_id=option, op=op, object_id=object_id, val64=value)
        given: dict[str, int | str] = {"option": option.name, "op": op.name, "object_id": object_id}
        if op == abi.IOMMU_OPTION_OP_SET:
            given["value"] = value
        self._call("IOMMU_OPTION", argument, why, **given)
        return argument.val64

    def vfio_ioas(self) -> int | None:
        """Return the id of the space that the ioctls of a type1 container use on this iommufd. None: none is set."""
        try:
            return self._vfio_ioas(abi.IOMMU_VFIO_IOAS_GET)
        except IoctlError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def set_vfio_ioas(self, ioas_id: int) -> None:
        """Let the ioctls of a type1 container, such as VFIO_IOMMU_UNMAP_DMA, work on this space. IOMMU_VFIO_IOAS.

        Raises IoctlError with ENOENT.
        """
        self._vfio_ioas(abi.IOMMU_VFIO_IOAS_SET, _u32(ioas_id, "ioas_id"))

    def clear_vfio_ioas(self) -> None:
        """Undo `set_vfio_ioas`. Does nothing if no space is set."""
        self._vfio_ioas(abi.IOMMU_VFIO_IOAS_CLEAR)

    def _vfio_ioas(self, op: abi.iommufd_vfio_ioas_op, ioas_id: int = 0) -> int:
        argument = abi.iommu_vfio_ioas(ioas_id=ioas_id, op=op)
        self._call("IOMMU_VFIO_IOAS", argument, hints.VFIO_IOAS, op=op.name, ioas_id=ioas_id)
        return argument.ioas_id

    # ------------------------------------------------------------------------------------------------ page tables

    def hwpt_alloc(self, dev_id: int, pt_id: int, *, flags: int = 0) -> int:
        """Make a page table for the IOMMU of a device, and return the id. `flags`: of `iommufd_hwpt_alloc_flags`.

        `pt_id`: the I/O address space whose mappings the page table has. The device is not attached to the page table.

        Raises IoctlError with EOPNOTSUPP (the IOMMU lacks a flag's feature), ENOENT (no such device) or EINVAL.
        Cost: maps all memory of the space. Source: IOMMU_HWPT_ALLOC.
        """
        argument = abi.iommu_hwpt_alloc(
            flags=_u32(flags, "flags"), dev_id=_u32(dev_id, "dev_id"), pt_id=_u32(pt_id, "pt_id")
        )
        given = {"dev_id": argument.dev_id, "pt_id": argument.pt_id, "flags": argument.flags}
        self._call("IOMMU_HWPT_ALLOC", argument, hints.HWPT_ALLOC, **given)
        return argument.out_hwpt_id

    def hwpt_set_dirty_tracking(self, hwpt_id: int, *, enabled: bool) -> None:
        """Start or stop the tracking of pages that devices write. At the start, no page is dirty.

        Raises IoctlError with EOPNOTSUPP: the page table was made without IOMMU_HWPT_ALLOC_DIRTY_TRACKING.
        """
        flags = abi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE * _flag(enabled, "enabled")
        argument = abi.iommu_hwpt_set_dirty_tracking(flags=flags, hwpt_id=_u32(hwpt_id, "hwpt_id"))
        self._call("IOMMU_HWPT_SET_DIRTY_TRACKING", argument, hints.DIRTY, hwpt_id=argument.hwpt_id, flags=flags)

    def hwpt_get_dirty_bitmap(
        self, hwpt_id: int, *, iova: int, size: int, page_size: int, clear: bool = True
    ) -> bytearray:
        """Return a bitmap of the pages of `[iova, iova + size)` that devices wrote, a bit for each `page_size` bytes.

        Bit 0 of byte 0 is the page at `iova`. `iova`, `size`, `page_size`: in bytes. The length of the bitmap is a
        multiple of 8 bytes. `clear`: the kernel forgets these pages.

        Raises IoctlError with EOPNOTSUPP or EINVAL. Cost: a walk of the page table, and a flush of the IOMMU's TLB.
        """
        page_size = _u64(page_size, "page_size")
        if not is_power_of_two(page_size):
            raise ValueError(f"page_size must be a power of two, not {page_size:#x}")
        start, length = _start(iova, size, "iova"), _size(size)
        words = -(-length // (page_size * _WORD))
        bitmap = bytearray(words * _WORD // 8)
        flags = abi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR * (1 - _flag(clear, "clear"))
        argument = abi.iommu_hwpt_get_dirty_bitmap(
            hwpt_id=_u32(hwpt_id, "hwpt_id"),
            flags=flags,
            iova=start,
            length=length,
            page_size=page_size,
            data=ctypes.addressof(ctypes.c_char.from_buffer(bitmap)),
        )
        given = {"hwpt_id": argument.hwpt_id, "iova": start, "size": length, "page_size": page_size, "flags": flags}
        self._call("IOMMU_HWPT_GET_DIRTY_BITMAP", argument, hints.DIRTY, **given)
        return bitmap

    def get_hw_info(self, dev_id: int) -> HwInfo:
        """Return the description of the IOMMU of a device. Repeats the call if the answer needs a larger buffer.

        Raises IoctlError with EOPNOTSUPP (a device without an IOMMU) or ENOENT. Raises CapabilityError for an answer
        that no buffer holds.
        """
        room = _HW_INFO
        while room <= _HW_INFO_MAX:
            data = (ctypes.c_char * room)()
            argument = abi.iommu_hw_info(dev_id=_u32(dev_id, "dev_id"), data_len=room, data_uptr=ctypes.addressof(data))
            self._call("IOMMU_GET_HW_INFO", argument, hints.HW_INFO, dev_id=argument.dev_id)
            if argument.data_len <= room:
                return _hw_info(argument, data.raw[: argument.data_len])
            room = argument.data_len
        raise CapabilityError(f"IOMMU_GET_HW_INFO wants a buffer of {room} bytes")

    def _call(self, request: str, argument: ctypes.Structure, why: Mapping[int, str], **given: int | str) -> None:
        """Make an ioctl with a structure that begins with `size`."""
        ctypes.c_uint32.from_buffer(argument).value = ctypes.sizeof(argument)
        self.ioctl(request, argument, hints=why, **given)

    # ------------------------------------------------------------------------------------------------ the end

    def end_unused(self) -> None:
        """Close the iommufd, if the `Ioas` that opened it is closed and no device or space is left. For the library."""
        if self.ends and not (self.closed or self.devices or self.spaces):
            close_now(self)

    def close_dependents(self) -> None:
        """Close the dependents of all devices. Errors are not raised here, but by the close of the device."""
        for device in tuple(self.devices):
            attempt(device.close_dependents, [])

    @closing_after_dependents
    def close(self) -> None:
        """Close the devices, then the spaces, which unmaps their memory, and then the iommufd.

        Does nothing if already closed, or in a forked child. All steps are tried, and their errors are raised
        afterwards. A device that cannot be closed (BufferError: a view of a region exists) keeps the spaces and the
        iommufd open. Release the view, and close the iommufd again.
        """
        if self.closed:
            return
        self.check_here()
        failures: list[Exception] = []
        for device in tuple(self.devices):
            attempt(partial(close_now, device), failures)
        # The close of a space, or of the last device, can close the iommufd: an `Ioas` that opened the iommufd does.
        if not self.closed and not self.devices:
            for space in tuple(self.spaces):
                attempt(partial(close_now, space), failures)
            for space in tuple(self.spaces):  # the kernel refused to destroy these, which end with the last descriptor
                attempt(space.close_fd, failures)
            attempt(self.close_fd, failures)
        raise_collected("closing the iommufd", failures)


def _u32(value: int, what: str) -> int:
    return _limited(value, what, 32)


def _u64(value: int, what: str) -> int:
    return _limited(value, what, 64)


def _limited(value: int, what: str, bits: int) -> int:
    if not 0 <= (number := check_whole_number(value, what)) < 1 << bits:
        raise ValueError(f"{what} must be 0 or more and have {bits} bits at most, not {number:#x}")
    return number


def _size(size: int) -> int:
    if not (number := _u64(size, "size")):
        raise ValueError("size must be above 0")
    return number


def _start(start: int, size: int, what: str) -> int:
    """Return the start of a range of `size` bytes, all of which have addresses of 64 bits."""
    number = _u64(start, what)
    if number + _size(size) > 1 << 64:
        raise ValueError(f"{what} {number:#x} with size {size:#x} ends above 2^64")
    return number


def _flag(value: bool, what: str) -> int:  # noqa: FBT001 (the value of a keyword-only argument)
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, not {value!r}")
    return int(value)


def _map_flags(iova: int | None, *, read: bool, write: bool) -> int:
    if not (read or write):
        raise ValueError("read or write must be True: a mapping permits at least one of them")
    return (
        (0 if iova is None else abi.IOMMU_IOAS_MAP_FIXED_IOVA)
        | (abi.IOMMU_IOAS_MAP_READABLE if read else 0)
        | (abi.IOMMU_IOAS_MAP_WRITEABLE if write else 0)
    )


def _place(iova: int | None) -> dict[str, int]:
    return {} if iova is None else {"iova": iova}


def _checked_ranges(ranges: Iterable[IovaRange]) -> list[IovaRange]:
    given = list(ranges)
    for each in given:
        if not isinstance(each, IovaRange):
            raise TypeError(f"ranges must be IovaRanges, not {type(each).__name__}")
    return given


def _ranges(places: Iterable[abi.iommu_iova_range]) -> tuple[IovaRange, ...]:
    found = [(place.start, place.last) for place in places]
    if any(start > last for start, last in found):
        text = ", ".join(f"{start:#x}-{last:#x}" for start, last in found)
        raise CapabilityError(f"IOMMU_IOAS_IOVA_RANGES returned a range that ends before it starts: {text}")
    return tuple(IovaRange(Iova(start), Iova(last)) for start, last in found)


def _hw_info(argument: abi.iommu_hw_info, data: bytes) -> HwInfo:
    known = argument.out_data_type in set(abi.iommu_hw_info_type)
    return HwInfo(
        data_type=abi.iommu_hw_info_type(argument.out_data_type) if known else argument.out_data_type,
        data=data,
        capabilities=abi.iommufd_hw_capabilities(argument.out_capabilities),
        max_pasid_log2=argument.out_max_pasid_log2,
    )
