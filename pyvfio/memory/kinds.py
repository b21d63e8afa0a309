"""The memory of a block: private, a memfd of the block, or a file of the caller.

A kind defines the address space of a reservation (`flags`, `fd`, `offset`), the source of pages for a grow, and the
release of pages for a shrink. All kinds map the whole reservation PROT_NONE at first, and grow by mprotect(2). A
MAP_FIXED mapping that fails may have removed the old mapping; an mprotect that fails has changed nothing (seen on 6.1,
6.12 and 7.3). A file may be mapped beyond its end as long as nobody touches that part.

Source: `qemu_ram_alloc_from_fd`, `ram_block_discard_range` and `qemu_fd_getpagesize` of QEMU; memfd_create(2),
fallocate(2); hugetlbfs_file_mmap in fs/hugetlbfs/inode.c.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypeVar

from pyvfio.errors import CannotBePinnedWarning, IoctlError, PersistenceWarning
from pyvfio.kernel import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_WRITE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    HUGETLBFS_MAGIC,
    MADV_DONTNEED_LOCKED,
    MADV_POPULATE_READ,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_SYNC,
    PROT_READ,
    PROT_WRITE,
    TMPFS_MAGIC,
    FileStatus,
    Kernel,
)
from pyvfio.units import PAGE_SIZE, check_bool, check_whole_number, format_size, is_aligned, is_power_of_two

_Answer = TypeVar("_Answer")

_READ_WRITE = PROT_READ | PROT_WRITE
_NO_WRITING = F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
_WHAT = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFLNK: "a symbolic link",
}
_NO_DESCRIPTORS = "Close descriptors, or raise RLIMIT_NOFILE (ulimit -n)"
_MFD_HUGETLB = 4  # linux/memfd.h
_MFD_HUGE_SHIFT = 26
_POOLS = Path("/sys/kernel/mm/hugepages")
_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@dataclass(frozen=True, slots=True)
class Anonymous:
    """Private anonymous memory.

    `noreserve`: activated memory is not charged against the commit limit. A later touch of the memory may then find no
    pages. If vm.overcommit_memory is 2, adding the block raises ValueError, because the kernel would charge the
    memory nevertheless.
    """

    noreserve: bool = False

    def __post_init__(self) -> None:
        check_bool(self.noreserve, "noreserve")

    @property
    def page_size(self) -> int:
        """The bytes that lengths are multiples of, as far as known before the block is made."""
        return PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Memfd:
    """Shared memory in a memfd of the block. Other processes can map the memory by its descriptor (`RamBlock.file`).

    The length of the memfd follows `used_length`. `hugetlb`: the size of huge pages in bytes; lengths must then be
    multiples of this size.
    """

    hugetlb: int | None = None

    def __post_init__(self) -> None:
        if self.hugetlb is None:
            return
        object.__setattr__(self, "hugetlb", check_whole_number(self.hugetlb, "hugetlb"))
        if not is_power_of_two(self.hugetlb) or not PAGE_SIZE < self.hugetlb < 1 << 63:
            raise ValueError(f"huge pages have a power of two of bytes above {PAGE_SIZE}, not {self.hugetlb:#x}")

    @property
    def page_size(self) -> int:
        """The bytes that lengths are multiples of."""
        return self.hugetlb or PAGE_SIZE


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of the caller, from `offset` on.

    The block duplicates the descriptor when the block is added. The caller may close `fd` afterwards.

    * `shared`: writes go to the file, and writes of other processes are visible.
    * `grow`: the file is extended when the block grows. Without `grow`, the file must be long enough for `max_length`.
    * `punch`: memory that the block releases is punched out of the file. Without `punch`, the file keeps the contents,
      and memory that is activated again reads the file, not zeros.
    * `pmem`: the file is persistent memory, mapped with MAP_SYNC.

    If the descriptor is open for reading only, or the file is sealed against writing, a device can only read the block.

    Raises TypeError and ValueError for options that are invalid for every file.
    """

    fd: int
    offset: int = 0
    shared: bool = True
    grow: bool = False
    punch: bool = False
    pmem: bool = False

    def __post_init__(self) -> None:
        if hasattr(self.fd, "fileno"):
            raise TypeError(f"fd must be a descriptor, such as file.fileno(), not {self.fd!r}")
        for name in ("fd", "offset"):
            object.__setattr__(self, name, check_whole_number(getattr(self, name), name))
        for name in ("shared", "grow", "punch", "pmem"):
            check_bool(getattr(self, name), name)
        if not 0 <= self.fd < 1 << 31:
            raise ValueError(f"no descriptor has the number {self.fd}")
        if self.offset < 0 or not is_aligned(self.offset, PAGE_SIZE):
            raise ValueError(f"offset must be a multiple of {PAGE_SIZE:#x} and not negative, not {self.offset:#x}")
        if not self.shared and (self.punch or self.pmem):
            raise ValueError("shared=False maps private copies of the file's pages: set neither punch nor pmem")

    @property
    def page_size(self) -> int:
        """The bytes that lengths are multiples of, as far as known before the block is made."""
        return PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Received:
    """`memory` behind a descriptor received from another process.

    The block closes the descriptor only after the block has been told to own the descriptor.
    """

    fd: int
    memory: Memfd | File

    @property
    def page_size(self) -> int:
        """The page size of `memory`."""
        return self.memory.page_size


MemoryKind: TypeAlias = Anonymous | Memfd | File | Received


Charged: TypeAlias = Literal["touched", "provided", "never"]


class Store(Protocol):
    """The pages of one reservation. Bytes are counted from the start of the reservation."""

    flags: int
    fd: int
    offset: int
    page_size: int
    protection: int
    holds_contents: bool
    """Whether memory that is activated again reads its old contents, as intended for this kind."""
    is_own: bool
    """Whether no other owner exists for the pages, so that a failed grow may release the pages that it allocated."""
    can_drop: bool
    """Whether pages can be released while the memory stays accessible."""
    owned: bool
    """Whether `close` closes `fd`."""
    shares_pages: bool
    """Whether the pages are those of a memfd, or of a file on tmpfs or hugetlbfs: iommufd maps such files by `fd`."""
    charged: Charged
    """When the pages are charged to this process's control group, to stay charged.

    Pages of a shared file may have been charged before, or are written back. Pages of a pool are not charged as memory.
    """

    @property
    def warnings(self) -> Sequence[Warning]:
        """Warnings for the caller who chose this kind."""
        ...

    def provide(self, start: int, end: int) -> None:
        """Allocate pages for memory that will be made accessible. On OSError nothing is allocated."""
        ...

    def extend(self, end: int) -> None:
        """Make everything up to `end` safe to touch, without allocating pages. Raises OSError."""
        ...

    def give_back(self, start: int, end: int) -> None:
        """Release the pages of memory that is no longer accessible. Raises OSError."""
        ...

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """Release the pages of memory that stays accessible and then reads zeros. Raises OSError."""
        ...

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """Replace the pages of accessible memory, also failed ones (hwpoison).

        The new pages are allocated by the first touch, or by `provide`. Raises OSError.
        """
        ...

    def close(self) -> None:
        """Close the descriptor, if there is one."""
        ...


def make_store(kernel: Kernel, kind: MemoryKind, *, idstr: str, max_length: int) -> Store:
    """Return the store for a kind. Raises ValueError for options that are always invalid, and IoctlError."""
    if isinstance(kind, Anonymous):
        return _AnonymousStore(kernel, kind)
    if isinstance(kind, Memfd):
        return _MemfdStore(kernel, kind, idstr)
    if isinstance(kind, Received):
        if isinstance(kind.memory, Memfd):
            return _MemfdStore(kernel, kind.memory, idstr, fd=kind.fd)
        return _FileStore(kernel, kind.memory, max_length, fd=kind.fd)
    return _FileStore(kernel, kind, max_length)


def _forget(kernel: Kernel, vaddr: int, size: int) -> None:
    """Clear this process's page table entries, the marks of failed pages included.

    For locked memory MADV_DONTNEED returns EINVAL. Linux 5.18 added MADV_DONTNEED_LOCKED for that case.
    """
    try:
        kernel.madvise(vaddr, size, mmap.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        kernel.madvise(vaddr, size, MADV_DONTNEED_LOCKED)


def _never_overcommits(kernel: Kernel) -> bool:
    try:
        return (kernel.proc / "sys/vm/overcommit_memory").read_bytes().strip() == b"2"
    except OSError:  # /proc is not mounted
        return False


class _AnonymousStore:
    fd, offset, page_size, protection = -1, 0, PAGE_SIZE, _READ_WRITE
    holds_contents, can_drop, is_own, owned, shares_pages = False, True, True, False, False
    charged: Charged = "touched"
    warnings: Sequence[Warning] = ()
    __slots__ = ("_kernel", "flags")

    def __init__(self, kernel: Kernel, kind: Anonymous) -> None:
        self._kernel = kernel
        self.flags = MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if kind.noreserve:
            if _never_overcommits(kernel):
                raise ValueError("noreserve has no effect if vm.overcommit_memory is 2: the memory is charged anyway")
            self.flags |= MAP_NORESERVE

    def provide(self, start: int, end: int) -> None:
        """Do nothing: the first touch allocates pages."""

    def extend(self, end: int) -> None:
        """Do nothing: anonymous memory is always safe to touch."""

    def give_back(self, start: int, end: int) -> None:
        """Do nothing: the pages were freed with the mapping."""

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """Drop the pages with MADV_DONTNEED."""
        _forget(self._kernel, vaddr + start, end - start)

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """Drop the pages: the first touch allocates new ones."""
        _forget(self._kernel, vaddr + start, end - start)

    def close(self) -> None:
        """Do nothing: there is no descriptor."""


class _FromDescriptor:
    """Base of stores with a descriptor. A store that owns its descriptor closes the descriptor."""

    __slots__ = ("_kernel", "fd", "owned")
    _kernel: Kernel
    fd: int
    owned: bool

    def close(self) -> None:
        """Close the descriptor; a second call does nothing. The memory stays while mapped."""
        fd, self.fd = self.fd, -1
        if fd >= 0 and self.owned:
            with suppress(OSError):  # the descriptor is closed even if close(2) reports an error
                self._kernel.close(fd)


class _MemfdStore(_FromDescriptor):
    offset, protection, holds_contents, can_drop, is_own = 0, _READ_WRITE, False, True, True
    shares_pages = True
    warnings: Sequence[Warning] = ()
    __slots__ = ("charged", "flags", "page_size")

    def __init__(self, kernel: Kernel, kind: Memfd, idstr: str, *, fd: int | None = None) -> None:
        self._kernel = kernel
        self.page_size = PAGE_SIZE
        self.owned = fd is None
        self.charged: Charged = "provided"
        # Without MAP_NORESERVE, the mapping would reserve huge pages of the pool for all of max_length.
        self.flags = MAP_SHARED | MAP_NORESERVE
        flags = 0
        if kind.hugetlb is not None:
            self.page_size = kind.hugetlb
            self.charged = "never"
            flags = _MFD_HUGETLB | (kind.hugetlb.bit_length() - 1) << _MFD_HUGE_SHIFT
        if fd is not None:
            self.fd = fd
            return
        try:
            name = idstr.encode(errors="replace")[:200].decode(errors="ignore")
            self.fd = kernel.memfd_create(name, flags)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"no memfd could be made for RAM block '{idstr}'",
                request="memfd_create",
                arguments={"flags": flags},
                hint=self._why_not(error, flags),
            ) from error

    def _why_not(self, error: OSError, flags: int) -> str:
        if flags and error.errno == errno.ENODEV:
            there = sorted(int(path.name.split("-")[1].removesuffix("kB")) << 10 for path in _POOLS.glob("hugepages-*"))
            known = ", ".join(map(format_size, there)) or "none"
            return f"This kernel has no huge pages of {format_size(self.page_size)}. Available sizes: {known}"
        return _NO_DESCRIPTORS if error.errno == errno.EMFILE else ""

    def provide(self, start: int, end: int) -> None:
        """Allocate with fallocate(2): the only call that reports missing memory. The call also extends the file."""
        self._kernel.allocate(self.fd, start, end - start)

    def extend(self, end: int) -> None:
        """Extend the file."""
        self._kernel.ftruncate(self.fd, end)

    def give_back(self, start: int, end: int) -> None:
        """Truncate the file to the new end."""
        del end
        self._kernel.ftruncate(self.fd, start)

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """Punch a hole into the file."""
        del vaddr
        self._kernel.fallocate(self.fd, _PUNCH, start, end - start)

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """Punch a hole into the file, and clear this process's page table entries.

        The hole removes the old pages from the file, failed ones too. The entry of a failed page would otherwise stay
        in the page tables of this process (6.1 to 7.3).
        """
        self._kernel.fallocate(self.fd, _PUNCH, start, end - start)
        _forget(self._kernel, vaddr + start, end - start)


class _FileStore(_FromDescriptor):
    is_own = False

    def __init__(self, kernel: Kernel, kind: File, max_length: int, *, fd: int | None = None) -> None:
        self._kernel = kernel
        self._kind = kind
        self.offset = kind.offset
        self.warnings: list[Warning] = []
        self.owned = fd is None
        # The caller may close its descriptor, and the number may then name another file.
        self.fd = self._try("dup", partial(kernel.dup, kind.fd)) if fd is None else fd
        try:
            self._examine(max_length)
        except BaseException:
            self.close()
            raise

    def _examine(self, max_length: int) -> None:
        kind, status = self._kind, self._try("fstat", partial(self._kernel.file_status, self.fd))
        self.page_size = status.block_size if status.file_system == HUGETLBFS_MAGIC else PAGE_SIZE
        can_be_written = status.writable and not status.seals & _NO_WRITING
        self.protection = _READ_WRITE if can_be_written or not kind.shared else PROT_READ
        self.can_drop = kind.punch
        copied = not kind.shared and self.page_size == PAGE_SIZE
        self.charged: Charged = "touched" if copied else "never"
        self.holds_contents = kind.shared and not kind.punch
        self._check_file(status)
        self._check_lengths(status, max_length)
        self._in_memory = status.file_system in (TMPFS_MAGIC, HUGETLBFS_MAGIC)
        self.shares_pages = kind.shared and self._in_memory
        if kind.shared and can_be_written and not self._in_memory:
            self.warnings.append(
                CannotBePinnedWarning(
                    "no device can write to a shared mapping of a file on a disk since Linux 6.5: the kernel returns "
                    "EFAULT. Add the block with readonly=True, or use Memfd() or a file on tmpfs or hugetlbfs"
                )
            )
        self.flags = self._flags()

    def _try(self, request: str, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except OSError as error:
            raise IoctlError.of(
                error,
                f"descriptor {self._kind.fd} could not be used: {error.strerror}",
                request=request,
                arguments={"fd": self._kind.fd},
                hint=_NO_DESCRIPTORS if error.errno == errno.EMFILE else "Keep the file open until the block is added",
            ) from error

    def _check_file(self, status: FileStatus) -> None:
        """Check that the file can be mapped and changed as the options require."""
        kind = self._kind
        if not stat.S_ISREG(status.mode):
            what = _WHAT.get(stat.S_IFMT(status.mode), "an anonymous inode, such as an eventfd")
            raise ValueError(f"descriptor {kind.fd} is {what}; only a regular file can be memory")
        if not status.readable:
            raise ValueError(f"descriptor {kind.fd} is open for writing only, or with O_PATH: it cannot be mapped")
        if (kind.grow or kind.punch) and not status.writable:
            raise ValueError("the file is open for reading only: grow and punch need a descriptor open for writing")
        if kind.punch and status.seals & _NO_WRITING:
            raise ValueError("punch: the file is sealed against writing (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE)")

    def _check_lengths(self, status: FileStatus, max_length: int) -> None:
        """Check that the file has enough bytes, or can be extended."""
        offset, end = self.offset, self.offset + max_length
        if not is_aligned(offset, self.page_size):
            raise ValueError(f"offset must be a multiple of {self.page_size:#x} and not negative, not {offset:#x}")
        if end >= 1 << 63:
            raise ValueError(f"no file can hold {format_size(max_length)} from offset {offset:#x} on")
        if status.size >= end:
            return
        left = format_size(max(status.size - offset, 0))
        wrong = f"the file ends {left} behind offset {offset:#x}, and max_length is {format_size(max_length)}: "
        if not self._kind.grow:
            raise ValueError(wrong + "extend the file, or set grow=True")
        if status.seals & F_SEAL_GROW:
            raise ValueError(wrong + "the file cannot be extended, because it is sealed against growing (F_SEAL_GROW)")

    def _flags(self) -> int:
        if not self._kind.shared:
            return MAP_PRIVATE | MAP_NORESERVE
        if not self._kind.pmem:
            return MAP_SHARED | MAP_NORESERVE
        size = self.page_size
        try:
            probe = self._kernel.mmap(
                0, size, self.protection, MAP_SHARED_VALIDATE | MAP_SYNC, fd=self.fd, offset=self.offset
            )
        except OSError as error:
            self.warnings.append(
                PersistenceWarning(
                    "writes may be lost if the machine goes down: the file cannot be mapped with MAP_SYNC, "
                    f"{error.strerror}"
                )
            )
            return MAP_SHARED
        with suppress(OSError):  # the only loss is one page of address space
            self._kernel.munmap(probe, size)
        return MAP_SHARED_VALIDATE | MAP_SYNC

    def provide(self, start: int, end: int) -> None:
        """Extend the file, and allocate its pages if the block may change the file."""
        if not self._kind.grow:
            self.extend(end)
            return
        if self._in_memory:
            self._kernel.allocate(self.fd, self.offset + start, end - start)
            return
        try:
            self._kernel.fallocate(self.fd, 0, self.offset + start, end - start)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self.extend(end)

    def extend(self, end: int) -> None:
        """Extend the file, if `grow` allows that and the file is too short."""
        needed = self.offset + end
        if self._kernel.file_status(self.fd).size >= needed:
            return
        if not self._kind.grow:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT) + ": the file has become too short")
        self._kernel.ftruncate(self.fd, needed)

    def give_back(self, start: int, end: int) -> None:
        """Punch a hole, if `punch` is set. The file keeps its length."""
        if self._kind.punch:
            self._kernel.fallocate(self.fd, _PUNCH, self.offset + start, end - start)

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """Punch a hole."""
        del vaddr
        self.give_back(start, end)

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """Map the pages of the file again.

        The pages are new if the file may be punched or if the mapping is private. Otherwise a failed page is new only
        if the kernel has removed the page, and can read it from the disk again.
        """
        if self._kind.punch:
            self._kernel.fallocate(self.fd, _PUNCH, self.offset + start, end - start)
        _forget(self._kernel, vaddr + start, end - start)
        if self._kind.shared and not self._kind.punch:
            self._check_readable(vaddr + start, end - start)

    def _check_readable(self, vaddr: int, size: int) -> None:
        try:
            self._kernel.madvise(vaddr, size, MADV_POPULATE_READ)
        except OSError as error:
            if error.errno != errno.EINVAL:  # Linux before 5.14
                raise
