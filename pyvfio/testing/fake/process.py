"""This process's memory as a kernel sees it: reached by address, a bad address is EFAULT and never a crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from pyvfio.kernel import WritableBuffer
from pyvfio.units import PAGE_SIZE, U64_MAX, align_down, align_up

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
DEVICE_MEMORY = "vfio-device"
"""What the memory files of fake devices are called, by which their mappings are known."""

_PAGEMAP_SCAN = 0xC060_6610  # linux/fs.h, since 6.7
_SCAN = struct.Struct("=12Q")  # struct pm_scan_arg
_REGIONS = 64
_Regions = ctypes.c_uint64 * (3 * _REGIONS)
_IS_ZERO_PAGE = 1 << 5  # PAGE_IS_PFNZERO
_PROCMAP_QUERY = 0xC068_6611  # linux/fs.h, since 6.11
_QUERY = struct.Struct("=9Q4I2Q")  # struct procmap_query
_SHARED_WRITABLE_FILE = 0x02 | 0x08 | 0x10 | 0x20  # VMA_WRITABLE, _SHARED, COVERING_OR_NEXT_VMA, FILE_BACKED_VMA
_ANY_QUERY = _QUERY.pack(_QUERY.size, _SHARED_WRITABLE_FILE, *[0] * 13)
_UNTRACKED = frozenset(("tmpfs", "ramfs", "hugetlbfs", "devtmpfs", "proc", "sysfs"))  # vma_needs_dirty_tracking
_PRESENT, _OF_FILE, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56  # Documentation/admin-guide/mm/pagemap.rst


class _Iovec(ctypes.Structure):
    base: int
    length: int
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for call in (libc.process_vm_readv, libc.process_vm_writev):
        vector = ctypes.POINTER(_Iovec)
        call.argtypes = [ctypes.c_int, vector, ctypes.c_ulong, vector, ctypes.c_ulong, ctypes.c_ulong]
        call.restype = ctypes.c_ssize_t
    return libc


_libc = _load_libc()


def refuse(number: int) -> NoReturn:
    """Raise the OSError of an errno."""
    raise OSError(number, os.strerror(number))


def _transfer(*, vaddr: int, buffer: ctypes.Array[ctypes.c_char], write: bool) -> None:
    # process_vm_* checks the far side page by page, where memmove would end the process.
    call = _libc.process_vm_writev if write else _libc.process_vm_readv
    done, size, start = 0, len(buffer), ctypes.addressof(buffer)
    while done < size:
        here, there = _Iovec(start + done, size - done), _Iovec(vaddr + done, size - done)
        moved = int(call(os.getpid(), here, 1, there, 1, 0))
        if moved < 0 and ctypes.get_errno() != errno.EFAULT:
            # The memory is not to blame, and a driver under test must not be told that it is.
            raise RuntimeError(
                f"the fake kernel reaches this process's memory with {call.__name__}, which fails: "
                f"{os.strerror(ctypes.get_errno())}. A sandbox (seccomp) has to allow process_vm_readv and _writev."
            )
        if moved <= 0:
            refuse(errno.EFAULT)
        done += moved


def read_memory(vaddr: int, size: int) -> bytes:
    """`size` bytes of this process; EFAULT where it may not read."""
    buffer = ctypes.create_string_buffer(size)
    _transfer(vaddr=vaddr, buffer=buffer, write=False)
    return buffer.raw


def write_memory(vaddr: int, data: bytes) -> None:
    """Put `data` at `vaddr`; EFAULT where this process may not write (a part may have been written)."""
    _transfer(vaddr=vaddr, buffer=(ctypes.c_char * len(data)).from_buffer_copy(data), write=True)


@functools.cache
def _populate_exists() -> bool:
    # A kernel before 5.14 answers EINVAL, as a newer one does for memory without the right: ask where it cannot fail.
    with contextlib.closing(mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) as page:
        window = ctypes.c_char.from_buffer(page)
        answer = int(_libc.madvise(ctypes.addressof(window), PAGE_SIZE, _MADV_POPULATE_READ))
        del window
    return answer == 0


def _areas(lines: Iterator[str]) -> Iterator[tuple[int, int, str]]:
    for line in lines:
        span, rights = line.split(" ", 2)[:2]
        start, _, end = span.partition("-")
        yield int(start, 16), int(end, 16), rights


class DeviceArea(NamedTuple):
    """A part of a range that is a mapping of a fake device's BAR: where in the range it begins, its size, the device,
    and where in the device's file it begins."""

    start: int
    size: int
    bdf: str
    offset: int


def device_areas(vaddr: int, size: int) -> Iterator[DeviceArea]:
    """What of a range is mappings of fake devices' BARs, ascending. Source: /proc/self/maps."""
    mark = f"/memfd:{DEVICE_MEMORY} "
    for line in Path("/proc/self/maps").read_text().splitlines():
        if mark not in line:
            continue
        first, last = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
        start, end = max(first, vaddr), min(last, vaddr + size)
        if start < end:
            offset = int(line.split(maxsplit=3)[2], 16) + start - first
            yield DeviceArea(start - vaddr, end - start, line.partition(mark)[2].split()[0], offset)


def maps_allow(vaddr: int, size: int, *, write: bool) -> bool:
    """Whether /proc/self/maps has the whole range with the right; knows nothing of a file that is too short."""
    reached = vaddr
    for start, end, rights in _areas(iter(Path("/proc/self/maps").read_text().splitlines())):
        if end <= reached:
            continue
        if start > reached or rights[1 if write else 0] not in "rw":
            return False
        reached = end
        if reached >= vaddr + size:
            return True
    return False


class MemoryAreas:
    """/proc/self/maps as it is now. O(n) once, O(log n) a question."""

    def __init__(self) -> None:
        lines = Path("/proc/self/maps").read_bytes().decode("ascii", "replace").split("\n")[:-1]
        self._areas = list(_areas(iter(lines)))
        self._ends = [end for _start, end, _rights in self._areas]

    def have(self, vaddr: int, size: int, *, rights: int) -> bool:
        """Whether all of a range is there, with PROT_READ or PROT_WRITE in `rights`."""
        reached = vaddr
        for start, end, there in self._areas[bisect_right(self._ends, vaddr) :]:
            if start > reached or (rights & 1 and there[0] != "r") or (rights & 2 and there[1] != "w"):
                return False
            reached = end
            if reached >= vaddr + size:
                return True
        return False


def can_be_pinned(vaddr: int, size: int, *, write: bool) -> bool:
    """Whether the running kernel would pin all of [`vaddr`, `vaddr + size`), found by populating it.

    MADV_POPULATE_READ and _WRITE fail where `pin_user_pages` with and without FOLL_WRITE does. Kernels before 5.14 do
    not have them: the rights of the memory areas decide there, and memory behind the end of its file passes.
    """
    if not _populate_exists():
        return maps_allow(vaddr, size, write=write)
    advice = _MADV_POPULATE_WRITE if write else _MADV_POPULATE_READ
    start, end = align_down(vaddr, PAGE_SIZE), align_up(vaddr + size, PAGE_SIZE)
    return end <= U64_MAX and int(_libc.madvise(start, end - start, advice)) == 0


@functools.cache
def _pagemap_scan_exists() -> bool:
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        try:
            fcntl.ioctl(pagemap, _PAGEMAP_SCAN, bytearray(_SCAN.pack(_SCAN.size, *[0] * 11)))
        except OSError:
            return False
    return True


class Pagemap:
    """/proc/self/pagemap, opened when it is first asked, as opening costs more than asking, and until `close`."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        return self._fd

    def close(self) -> None:
        """Until it is asked again; twice is fine."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def zero_pages(self, vaddr: int, size: int) -> int:
        """How many pages of [`vaddr`, `vaddr + size`) are the one page of zeros that all never-written private memory
        is read from; all of them must be there. Some 5 µs; source: PAGEMAP_SCAN, or `zero_pages_by_flags`."""
        if not _pagemap_scan_exists():
            return self.zero_pages_by_flags(vaddr, size)
        return _scan_for_zero(self._open(), vaddr, vaddr + size)

    def zero_pages_by_flags(self, vaddr: int, size: int) -> int:
        """As `zero_pages`, on kernels before 6.7: pages that are neither a file's nor this process's alone, which are
        those and, after a fork, what is still shared with the child."""
        data = os.pread(self._open(), size // PAGE_SIZE * 8, vaddr // PAGE_SIZE * 8)
        entries = struct.unpack(f"={size // PAGE_SIZE}Q", data)
        return sum(entry & (_PRESENT | _OF_FILE | _EXCLUSIVE) == _PRESENT for entry in entries)


def _scan_for_zero(pagemap: int, vaddr: int, end: int) -> int:
    regions, count = _Regions(), 0
    while vaddr < end:
        vector = ctypes.addressof(regions)
        argument = bytearray(
            _SCAN.pack(_SCAN.size, 0, vaddr, end, 0, vector, _REGIONS, 0, 0, _IS_ZERO_PAGE, 0, _IS_ZERO_PAGE)
        )
        for found in range(fcntl.ioctl(pagemap, _PAGEMAP_SCAN, argument)):
            count += (regions[3 * found + 1] - regions[3 * found]) // PAGE_SIZE
        (vaddr,) = struct.unpack_from("=Q", argument, 32)
    return count


@functools.cache
def _file_systems() -> dict[tuple[int, int], str]:
    """The type of each mounted file system, by the numbers of its device."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_bytes().decode("ascii", "replace").split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        major, _, minor = before.split()[2].partition(":")
        found[int(major), int(minor)] = after.split()[0]
    return found


def file_areas(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where this process has bytes `start` to `end` of a file mapped: vaddr, size. Source: /proc/self/maps."""
    status = os.fstat(fd)
    mark = b" %02x:%02x %d " % (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
    for line in Path("/proc/self/maps").read_bytes().split(b"\n"):
        if mark not in line:  # as the kernel writes it (show_vma_header_prefix); a path with it in goes by what follows
            continue
        span, _rights, offset, device, inode = line.split(maxsplit=5)[:5]
        if mark != b" %s %s " % (device, inode):
            continue
        first, last = (int(part, 16) for part in span.split(b"-"))
        begin = int(offset, 16)
        low, high = max(start, begin), min(end, begin + last - first)
        if low < high:
            yield first + low - begin, high - low


class FileAreas:
    """Finds shared writable mappings of files, in /proc/self/maps by PROCMAP_QUERY: 2 µs, on kernels from 6.11 on.

    Opened at once and until `close`, so that no descriptor appears in the middle of a test.
    """

    def __init__(self) -> None:
        self._fd: int | None = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Twice is fine."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def first_tracked(self, vaddr: int, size: int) -> int | None:
        """Where in [`vaddr`, `vaddr + size`) a shared writable mapping of a file begins whose file system must hear of
        what is written; memory files, and where the running kernel cannot be asked, are None."""
        at = vaddr
        while at < vaddr + size and (found := self._next(at)) is not None:
            start, end, device = found
            if start >= vaddr + size:
                break
            if _file_systems().get(device, "tmpfs") not in _UNTRACKED:
                return max(start, vaddr)
            at = end
        return None

    def _next(self, vaddr: int) -> tuple[int, int, tuple[int, int]] | None:
        argument = bytearray(_ANY_QUERY)
        struct.pack_into("=Q", argument, 16, vaddr)
        try:
            fcntl.ioctl(-1 if self._fd is None else self._fd, _PROCMAP_QUERY, argument)
        except (OSError, ValueError):  # there is none, or a kernel before 6.11
            return None
        answer = _QUERY.unpack(argument)
        return answer[3], answer[4], (answer[9], answer[10])


class Argument(Protocol):
    """The third argument of an ioctl, as the kernel uses it: a number, or memory to copy from and to."""

    @property
    def value(self) -> int:
        """The argument itself; the address, where it is a buffer."""
        ...

    def read(self, size: int, offset: int = 0) -> bytes:
        """copy_from_user; EFAULT."""
        ...

    def write(self, data: bytes, offset: int = 0) -> None:
        """copy_to_user; EFAULT."""
        ...


class AddressArgument:
    """A number: a value, or an address that the caller vouches for and the kernel does not trust."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value & U64_MAX

    def read(self, size: int, offset: int = 0) -> bytes:
        """From this process; EFAULT."""
        return read_memory(self.value + offset, size)

    def write(self, data: bytes, offset: int = 0) -> None:
        """To this process; EFAULT."""
        write_memory(self.value + offset, data)


class BufferArgument:
    """A buffer. Where a kernel would go beyond its end, which no errno reports, BufferError says so."""

    __slots__ = ("_buffer", "_size")

    def __init__(self, buffer: WritableBuffer) -> None:
        with memoryview(buffer) as view:
            if view.readonly:
                raise TypeError("an ioctl's buffer must be writable: the kernel answers in it")
            self._size = view.nbytes
        self._buffer = buffer

    @property
    def value(self) -> int:
        """Where the buffer is."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    @property
    def size(self) -> int:
        """How many bytes the buffer has."""
        return self._size

    def _inside(self, size: int, offset: int) -> None:
        if offset + size > self._size:
            raise BufferError(
                f"the kernel reaches byte {offset + size} of a buffer of {self._size}: wrong argsz or size"
            )

    def read(self, size: int, offset: int = 0) -> bytes:
        """From the buffer."""
        self._inside(size, offset)
        data: bytes = struct.unpack_from(f"{size}s", self._buffer, offset)[0]
        return data

    def write(self, data: bytes, offset: int = 0) -> None:
        """To the buffer."""
        self._inside(len(data), offset)
        struct.pack_into(f"{len(data)}s", self._buffer, offset, data)
