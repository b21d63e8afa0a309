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
import stat
from collections.abc import Callable
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
    """Private anonymous memory. `noreserve`: what is activated is not charged, and may be found missing when it is
    touched; refused where the machine allows no overcommitment (vm.overcommit_memory is 2), as the kernel would charge
    it there all the same."""

    noreserve: bool = False

    def __post_init__(self) -> None:
        check_bool(self.noreserve, "noreserve")

    @property
    def page_size(self) -> int:
        """What lengths are multiples of, as far as that is known beforehand, in bytes."""
        return PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Memfd:
    """Shared memory, in a memfd of the block's own, that others can map by its descriptor (`RamBlock.file`). Its length
    follows `used_length`. `hugetlb`: the size of its huge pages in bytes, of which lengths are multiples then."""

    hugetlb: int | None = None

    def __post_init__(self) -> None:
        if self.hugetlb is None:
            return
        object.__setattr__(self, "hugetlb", check_whole_number(self.hugetlb, "hugetlb"))
        if not is_power_of_two(self.hugetlb) or not PAGE_SIZE < self.hugetlb < 1 << 63:
            raise ValueError(f"huge pages have a power of two of bytes above {PAGE_SIZE}, not {self.hugetlb:#x}")

    @property
    def page_size(self) -> int:
        """What lengths are multiples of, in bytes."""
        return self.hugetlb or PAGE_SIZE


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of the caller's own, from `offset` on.

    The block duplicates the descriptor when it is added. The caller may close `fd` from then on.

    `shared`: what is written goes to the file, and what others write is seen. `grow`: the file may be made longer when
    the block grows, which it must be long enough for otherwise. `punch`: what the block gives back is punched out of
    the file; otherwise it stays there, and memory that comes back reads what the file holds, not zeros. A descriptor
    that is open for reading only makes a block that a device may only read, and so does a file that is sealed against
    writing. `pmem`: it is persistent memory, to be mapped with MAP_SYNC.

    Raises TypeError and ValueError for what can be right for no file.
    """

    fd: int
    offset: int = 0
    shared: bool = True
    grow: bool = False
    punch: bool = False
    pmem: bool = False

    def __post_init__(self) -> None:
        if hasattr(self.fd, "fileno"):
            raise TypeError(f"fd must be a descriptor, as fileno() has it, not {self.fd!r}")
        for name in ("fd", "offset"):
            object.__setattr__(self, name, check_whole_number(getattr(self, name), name))
        for name in ("shared", "grow", "punch", "pmem"):
            check_bool(getattr(self, name), name)
        if not 0 <= self.fd < 1 << 31:
            raise ValueError(f"no descriptor has the number {self.fd}")
        if self.offset < 0 or not is_aligned(self.offset, PAGE_SIZE):
            raise ValueError(f"offset must be a multiple of {PAGE_SIZE:#x} and not negative, not {self.offset:#x}")
        if not self.shared and (self.punch or self.pmem):
            raise ValueError("a private mapping of a file is not the file: it can be neither punched nor persistent")

    @property
    def page_size(self) -> int:
        """What lengths are multiples of, as far as that is known beforehand, in bytes."""
        return PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Received:
    """`memory` behind a descriptor that another process has handed over, and that the block closes when it is told to
    own it."""

    fd: int
    memory: Memfd | File

    @property
    def page_size(self) -> int:
        """As `memory`."""
        return self.memory.page_size


MemoryKind: TypeAlias = Anonymous | Memfd | File | Received


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
    owned: bool
    """Whether `close` closes `fd`."""
    charged: Charged
    """When its pages are charged to this process's control group, to stay there. Those of a shared file may have been
    before, or are written back, and those of a pool are not memory to it."""
    warnings: list[Warning]
    """What whoever chose this kind should know."""

    def provide(self, start: int, end: int) -> None:
        """Have pages for what is about to be made accessible, or raise OSError and have none."""
        ...

    def extend(self, end: int) -> None:
        """Have everything up to `end` where it can be touched, without asking whether there are pages. OSError."""
        ...

    def give_back(self, start: int, end: int) -> None:
        """The pages of what is not accessible any more. OSError."""
        ...

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """The pages of what stays accessible; it reads zeros. OSError."""
        ...

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """The pages of what is accessible and stays so go, whatever has become of them; other ones come when it is
        touched, or with `provide`. OSError."""
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
    if isinstance(kind, Received):
        if isinstance(kind.memory, Memfd):
            return _MemfdStore(kernel, kind.memory, idstr, fd=kind.fd)
        return _FileStore(kernel, kind.memory, max_length, fd=kind.fd)
    if not isinstance(kind, File):
        raise TypeError(f"memory is Anonymous(), Memfd() or File(fd), not {kind!r}")
    return _FileStore(kernel, kind, max_length)


def _forget(kernel: Kernel, vaddr: int, size: int) -> None:
    """Let nothing stand in this process's page tables, the marks of failed pages included. Locked memory answers EINVAL
    to MADV_DONTNEED, and from 5.18 on has a call of its own."""
    try:
        kernel.madvise(vaddr, size, mmap.MADV_DONTNEED)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        kernel.madvise(vaddr, size, MADV_DONTNEED_LOCKED)


def _overcommit() -> str:
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip()
    except OSError:  # the process sees no /proc
        return ""


class _AnonymousStore:
    fd, offset, page_size, protection = -1, 0, PAGE_SIZE, _READ_WRITE
    holds_contents, can_drop, is_own, owned = False, True, True, False
    charged: Charged = "touched"

    def __init__(self, kernel: Kernel, kind: Anonymous) -> None:
        self._kernel = kernel
        self.warnings: list[Warning] = []
        self.flags = MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if kind.noreserve:
            if _overcommit() == "2":
                raise ValueError("noreserve does nothing where vm.overcommit_memory is 2: the memory is charged anyway")
            self.flags |= MAP_NORESERVE

    def provide(self, start: int, end: int) -> None:
        """They come when they are touched."""

    def extend(self, end: int) -> None:
        """So it is."""

    def give_back(self, start: int, end: int) -> None:
        """They went with the mapping."""

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """MADV_DONTNEED."""
        _forget(self._kernel, vaddr + start, end - start)

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """They come when they are touched."""
        _forget(self._kernel, vaddr + start, end - start)

    def close(self) -> None:
        """Nothing was opened."""


class _FromDescriptor:
    """Base of stores with a descriptor, which they close if they own it."""

    _kernel: Kernel
    fd: int
    owned: bool

    def close(self) -> None:
        """Close the descriptor; twice is fine. Its memory stays for as long as it is mapped."""
        fd, self.fd = self.fd, -1
        if fd >= 0 and self.owned:
            with suppress(OSError):  # a descriptor is gone even when close(2) reports an error
                self._kernel.close(fd)


class _MemfdStore(_FromDescriptor):
    offset, protection, holds_contents, can_drop, is_own = 0, _READ_WRITE, False, True, True

    def __init__(self, kernel: Kernel, kind: Memfd, idstr: str, *, fd: int | None = None) -> None:
        self._kernel = kernel
        self.warnings: list[Warning] = []
        self.page_size = PAGE_SIZE
        self.owned = fd is None
        self.charged: Charged = "provided"
        # A huge page that is mapped would be reserved in the pool, for all of max_length.
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
                f"a memfd for RAM block '{idstr}' could not be made",
                request="memfd_create",
                arguments={"flags": flags},
                hint=self._why_not(error, flags),
            ) from error

    def _why_not(self, error: OSError, flags: int) -> str:
        if flags and error.errno == errno.ENODEV:
            there = sorted(int(path.name.split("-")[1].removesuffix("kB")) << 10 for path in _POOLS.glob("hugepages-*"))
            known = ", ".join(map(format_size, there)) or "none"
            return f"This kernel has no huge pages of {format_size(self.page_size)}; it has: {known}"
        return _NO_DESCRIPTORS if error.errno == errno.EMFILE else ""

    def provide(self, start: int, end: int) -> None:
        """fallocate(2): the only call that says whether there is memory, and makes the file as long as it is to be."""
        self._kernel.allocate(self.fd, start, end - start)

    def extend(self, end: int) -> None:
        """A file that is long enough."""
        self._kernel.ftruncate(self.fd, end)

    def give_back(self, start: int, end: int) -> None:
        """The file ends where the memory does."""
        del end
        self._kernel.ftruncate(self.fd, start)

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """A hole in the file."""
        del vaddr
        self._kernel.fallocate(self.fd, _PUNCH, start, end - start)

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """A hole takes the present ones out of the file, whatever they are, and forgetting them out of this process: a
        page that has failed stays in its page tables else (6.1 to 7.3)."""
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
        # The caller may close its descriptor, and the number is then another file's.
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
        if kind.shared and can_be_written and not self._in_memory:
            self.warnings.append(
                CannotBePinnedWarning(
                    "no device can be let write to a shared mapping of a file on a disk since Linux 6.5: it is EFAULT. "
                    "Add the block with readonly=True, or use Memfd() or a file on tmpfs or hugetlbfs"
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
                hint=_NO_DESCRIPTORS if error.errno == errno.EMFILE else "It must be open when the block is added",
            ) from error

    def _check_file(self, status: FileStatus) -> None:
        """What may be done with it."""
        kind = self._kind
        if not stat.S_ISREG(status.mode):
            what = _WHAT.get(stat.S_IFMT(status.mode), "something else, such as an eventfd")
            raise ValueError(f"descriptor {kind.fd} is no regular file, which can be memory, but {what}")
        if not status.readable:
            raise ValueError(f"descriptor {kind.fd} is open for writing only, or with O_PATH: it cannot be mapped")
        if (kind.grow or kind.punch) and not status.writable:
            raise ValueError("the file is open for reading only: it can be neither made longer nor punched")
        if kind.punch and status.seals & _NO_WRITING:
            raise ValueError("the file is sealed against writing (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE): no hole is made")

    def _check_lengths(self, status: FileStatus, max_length: int) -> None:
        """Whether it has, or can come to have, as many bytes."""
        offset, end = self.offset, self.offset + max_length
        if not is_aligned(offset, self.page_size):
            raise ValueError(f"offset must be a multiple of {self.page_size:#x} and not negative, not {offset:#x}")
        if end >= 1 << 63:
            raise ValueError(f"no file has bytes up to offset {offset:#x} and {format_size(max_length)} more")
        if status.size >= end:
            return
        left = format_size(max(status.size - offset, 0))
        wrong = f"the file ends {left} behind offset {offset:#x}, and max_length is {format_size(max_length)}: "
        if not self._kind.grow:
            raise ValueError(wrong + "make it longer, or let grow be True")
        if status.seals & F_SEAL_GROW:
            raise ValueError(wrong + "it cannot be made longer, since it is sealed against that (F_SEAL_GROW)")

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
        with suppress(OSError):  # a page of address space is lost
            self._kernel.munmap(probe, size)
        return MAP_SHARED_VALIDATE | MAP_SYNC

    def provide(self, start: int, end: int) -> None:
        """A file that is long enough, and has its pages where it may be changed."""
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
        """A file that is long enough."""
        needed = self.offset + end
        if self._kernel.file_status(self.fd).size >= needed:
            return
        if not self._kind.grow:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT) + ": the file has become too short")
        self._kernel.ftruncate(self.fd, needed)

    def give_back(self, start: int, end: int) -> None:
        """A hole, where that was asked for; the file stays as long as it is."""
        if self._kind.punch:
            self._kernel.fallocate(self.fd, _PUNCH, self.offset + start, end - start)

    def drop(self, vaddr: int, start: int, end: int) -> None:
        """A hole."""
        del vaddr
        self.give_back(start, end)

    def replace(self, vaddr: int, start: int, end: int) -> None:
        """Those of the file: other ones where it may be punched or the mapping is private, and where the kernel has
        taken a failed page out and reads it from the disk again."""
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
