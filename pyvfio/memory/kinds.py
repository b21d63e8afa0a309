"""What the memory of a block is: private, a memfd of its own, or a file of the caller's.

A kind says how the address space of a reservation is made (`flags`, `fd`, `offset`), where the pages come from when it
grows, and where they go when it shrinks. All kinds grow by mprotect(2) on what was mapped PROT_NONE when the
reservation was made: a MAP_FIXED mapping that fails may have taken away what was there, an mprotect that fails has not
(seen on 6.1, 6.12 and 7.3), and a file may be mapped beyond its end as long as nobody touches that.

Source: `qemu_ram_alloc_from_fd`, `ram_block_discard_range` and `qemu_fd_getpagesize` of QEMU; memfd_create(2),
fallocate(2); hugetlbfs_file_mmap in fs/hugetlbfs/inode.c.
"""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from pyvfio.errors import CannotBePinnedWarning, IoctlError, PersistenceWarning
from pyvfio.kernel import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    HUGETLBFS_MAGIC,
    MADV_DONTNEED_LOCKED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_SYNC,
    PROT_READ,
    PROT_WRITE,
    TMPFS_MAGIC,
    Kernel,
)
from pyvfio.units import PAGE_SIZE, format_size, is_aligned, is_power_of_two

_READ_WRITE = PROT_READ | PROT_WRITE
_MFD_HUGETLB = 4  # linux/memfd.h
_MFD_HUGE_SHIFT = 26
_PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@dataclass(frozen=True, slots=True)
class Anonymous:
    """Private anonymous memory. `noreserve`: what is activated is not charged, and may be found missing when it is
    touched; refused where the machine allows no overcommitment (vm.overcommit_memory is 2), as the kernel would charge
    it there all the same."""

    noreserve: bool = False


@dataclass(frozen=True, slots=True)
class Memfd:
    """Shared memory, in a memfd of the block's own, that others can map by its descriptor (`RamBlock.file`). Its length
    follows `used_length`. `hugetlb`: the size of its huge pages in bytes, of which lengths are multiples then."""

    hugetlb: int | None = None


@dataclass(frozen=True, slots=True)
class File:
    """A file of the caller's own, from `offset` on; the descriptor stays the caller's, who keeps it open.

    `shared`: what is written goes to the file, and what others write is seen. `grow`: the file may be made longer when
    the block grows, which it must be long enough for otherwise. `punch`: what the block gives back is punched out of
    the file; otherwise it stays there, and memory that comes back reads what the file holds, not zeros. A descriptor
    that is open for reading only makes a block that a device may only read. `pmem`: it is persistent memory, to be
    mapped with MAP_SYNC.
    """

    fd: int
    offset: int = 0
    shared: bool = True
    grow: bool = False
    punch: bool = False
    pmem: bool = False


MemoryKind: TypeAlias = Anonymous | Memfd | File


Charged: TypeAlias = Literal["touched", "provided", "never"]


class Store(Protocol):
    """Where the pages of one reservation are. Bytes are counted from its beginning."""

    flags: int
    fd: int
    offset: int
    page_size: int
    protection: int
    holds_contents: bool
    """Whether memory that comes back reads what was there, and is meant to."""
    is_own: bool
    """Whether its pages are nobody else's, so that an attempt that failed may take back those that it had provided."""
    can_drop: bool
    """Whether pages can be given back while the memory stays accessible."""
    charged: Charged
    """When its pages are charged to this process's control group, to stay there. Those of a shared file may have been
    before, or are written back, and those of a pool are not memory to it."""
    warnings: list[Warning]
    """What whoever chose this kind should know."""

    def provide(self, start: int, end: int) -> None:
        """Have pages for what is about to be made accessible, or raise OSError and have none."""
        ...

    def give_back(self, start: int, end: int) -> None:
        """The pages of what is not accessible any more. OSError."""
        ...

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """The pages of what stays accessible; it reads zeros. OSError."""
        ...

    def close(self) -> None:
        """Whatever was opened."""
        ...


def make_store(kernel: Kernel, kind: MemoryKind, *, idstr: str, max_length: int) -> Store:
    """What carries a kind out. Raises ValueError for what can never be right, IoctlError where the kernel refuses."""
    if isinstance(kind, Anonymous):
        return _AnonymousStore(kernel, kind)
    if isinstance(kind, Memfd):
        return _MemfdStore(kernel, kind, idstr)
    if not isinstance(kind, File):
        raise TypeError(f"memory is Anonymous(), Memfd() or File(fd), not {kind!r}")
    return _FileStore(kernel, kind, max_length)


class _AnonymousStore:
    fd, offset, page_size, protection = -1, 0, PAGE_SIZE, _READ_WRITE
    holds_contents, can_drop, is_own = False, True, True
    charged: Charged = "touched"

    def __init__(self, kernel: Kernel, kind: Anonymous) -> None:
        self._kernel = kernel
        self.warnings: list[Warning] = []
        self.flags = MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if kind.noreserve:
            if Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2":
                raise ValueError("noreserve does nothing where vm.overcommit_memory is 2: the memory is charged anyway")
            self.flags |= MAP_NORESERVE

    def provide(self, start: int, end: int) -> None:
        """They come when they are touched."""

    def give_back(self, start: int, end: int) -> None:
        """They went with the mapping."""

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """MADV_DONTNEED; memory that is locked answers EINVAL to it, and from 5.18 on has a call of its own."""
        try:
            self._kernel.madvise(vaddr + start, end - start, mmap.MADV_DONTNEED)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._kernel.madvise(vaddr + start, end - start, MADV_DONTNEED_LOCKED)

    def close(self) -> None:
        """Nothing was opened."""


class _MemfdStore:
    offset, protection, holds_contents, can_drop, is_own = 0, _READ_WRITE, False, True, True

    def __init__(self, kernel: Kernel, kind: Memfd, idstr: str) -> None:
        self._kernel = kernel
        self.warnings: list[Warning] = []
        self.page_size = PAGE_SIZE
        self.charged: Charged = "provided"
        # A huge page that is mapped would be reserved in the pool, for all of max_length.
        self.flags = MAP_SHARED | MAP_NORESERVE
        flags = 0
        if kind.hugetlb is not None:
            if not is_power_of_two(kind.hugetlb) or kind.hugetlb <= PAGE_SIZE:
                raise ValueError(f"huge pages have a power of two of bytes above {PAGE_SIZE}, not {kind.hugetlb!r}")
            self.page_size = kind.hugetlb
            self.charged = "never"
            flags = _MFD_HUGETLB | (kind.hugetlb.bit_length() - 1) << _MFD_HUGE_SHIFT
        try:
            self.fd = kernel.memfd_create(idstr.encode()[:200].decode(errors="ignore"), flags)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"a memfd for RAM block '{idstr}' could not be made",
                request="memfd_create",
                arguments={"flags": flags},
                hint=f"This kernel may have no huge pages of {format_size(self.page_size)}" if flags else "",
            ) from error

    def provide(self, start: int, end: int) -> None:
        """fallocate(2): the only call that says whether there is memory, and makes the file as long as it is to be."""
        self._kernel.fallocate(self.fd, 0, start, end - start)

    def give_back(self, start: int, end: int) -> None:
        """The file ends where the memory does."""
        del end
        self._kernel.ftruncate(self.fd, start)

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """A hole in the file."""
        del vaddr
        self._kernel.fallocate(self.fd, _PUNCH, start, end - start)

    def close(self) -> None:
        """The memfd; twice is fine. Its memory stays for as long as it is mapped."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):  # a descriptor is gone even when close(2) reports an error
                self._kernel.close(fd)


class _FileStore:
    is_own = False

    def __init__(self, kernel: Kernel, kind: File, max_length: int) -> None:
        self._kernel = kernel
        self._kind = kind
        self.fd, self.offset = kind.fd, kind.offset
        self.warnings: list[Warning] = []
        status = kernel.file_status(kind.fd)
        self.page_size = status.block_size if status.file_system == HUGETLBFS_MAGIC else PAGE_SIZE
        self.protection = _READ_WRITE if status.writable or not kind.shared else PROT_READ
        self.can_drop = kind.punch
        copied = not kind.shared and self.page_size == PAGE_SIZE
        self.charged: Charged = "touched" if copied else "never"
        self.holds_contents = kind.shared and not kind.punch
        if kind.offset < 0 or not is_aligned(kind.offset, self.page_size):
            raise ValueError(f"offset must be a multiple of {self.page_size:#x} and not negative, not {kind.offset:#x}")
        if kind.offset + max_length >= 1 << 63:
            raise ValueError(f"no file has bytes up to offset {kind.offset:#x} and {format_size(max_length)} more")
        if (kind.grow or kind.punch) and not status.writable:
            raise ValueError("the file is open for reading only: it can be neither made longer nor punched")
        if kind.punch and not kind.shared:
            raise ValueError("a private mapping of a file is not the file: it cannot be punched")
        if not kind.grow and status.size < kind.offset + max_length:
            raise ValueError(
                f"the file ends {format_size(max(status.size - kind.offset, 0))} behind offset {kind.offset:#x}, and "
                f"max_length is {format_size(max_length)}: make it longer, or let grow be True"
            )
        tracked = status.file_system not in (TMPFS_MAGIC, HUGETLBFS_MAGIC)
        if tracked and kind.shared and status.writable:
            self.warnings.append(
                CannotBePinnedWarning(
                    "no device can be let write to a shared mapping of a file on a disk since Linux 6.5: it is EFAULT"
                )
            )
        self.flags = self._flags()

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
                    "what is written may be lost when the machine goes down: the file cannot be mapped with MAP_SYNC, "
                    f"{error.strerror}"
                )
            )
            return MAP_SHARED
        self._kernel.munmap(probe, size)
        return MAP_SHARED_VALIDATE | MAP_SYNC

    def provide(self, start: int, end: int) -> None:
        """A file that is long enough, and has its pages where it may be changed."""
        needed = self.offset + end
        if self._kind.grow:
            try:
                self._kernel.fallocate(self.fd, 0, self.offset + start, end - start)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                if self._kernel.file_status(self.fd).size < needed:
                    self._kernel.ftruncate(self.fd, needed)
        elif self._kernel.file_status(self.fd).size < needed:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT) + ": the file has become too short")

    def give_back(self, start: int, end: int) -> None:
        """A hole, where that was asked for; the file stays as long as it is."""
        if self._kind.punch:
            self._kernel.fallocate(self.fd, _PUNCH, self.offset + start, end - start)

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """A hole."""
        del vaddr
        self.give_back(start, end)

    def close(self) -> None:
        """It is the caller's."""
