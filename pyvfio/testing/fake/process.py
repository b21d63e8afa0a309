"""The memory of this process as a kernel accesses the memory: by address. A bad address is EFAULT, never a crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import itertools
import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol

from pyvfio.kernel import WritableBuffer
from pyvfio.memory.maps import Area, query, query_ranges
from pyvfio.units import PAGE_SIZE, U64_MAX, align_down, align_up

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
DEVICE_MEMORY = "vfio-device"
"""The name of the memory files of fake devices, by which mappings of BARs are found."""
_DEVICE_MARK = f"/memfd:{DEVICE_MEMORY} "
_FEW = 64  # ranges: with more, the text of /proc/self/maps is as fast

_PAGEMAP_SCAN = 0xC060_6610  # linux/fs.h, since 6.7
_SCAN = struct.Struct("=12Q")  # struct pm_scan_arg
_REGIONS = 64
_Regions = ctypes.c_uint64 * (3 * _REGIONS)
_IS_ZERO_PAGE = 1 << 5  # PAGE_IS_PFNZERO
_SHARED_WRITABLE, _FILE_BACKED = 0x02 | 0x08, 0x20  # PROCMAP_QUERY_*
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


def check_open(fd: int) -> None:
    """Raise EBADF if a descriptor of this process is not open."""
    try:
        os.fstat(fd)
    except (OSError, OverflowError):
        refuse(errno.EBADF)


def _transfer(*, vaddr: int, buffer: ctypes.Array[ctypes.c_char], write: bool) -> None:
    # process_vm_* checks the pages of the other side, where memmove would end the process.
    call = _libc.process_vm_writev if write else _libc.process_vm_readv
    done, size, start = 0, len(buffer), ctypes.addressof(buffer)
    while done < size:
        here, there = _Iovec(start + done, size - done), _Iovec(vaddr + done, size - done)
        moved = int(call(os.getpid(), here, 1, there, 1, 0))
        if moved < 0 and ctypes.get_errno() != errno.EFAULT:
            # The memory is not at fault, so a driver under test must not see EFAULT.
            raise RuntimeError(
                f"{call.__name__}, by which the fake kernel accesses the memory of this process, failed: "
                f"{os.strerror(ctypes.get_errno())}. A sandbox (seccomp) must allow process_vm_readv and _writev."
            )
        if moved <= 0:
            refuse(errno.EFAULT)
        done += moved


def read_memory(vaddr: int, size: int) -> bytes:
    """Return `size` bytes of this process. Raises EFAULT if the process may not read the memory."""
    buffer = ctypes.create_string_buffer(size)
    _transfer(vaddr=vaddr, buffer=buffer, write=False)
    return buffer.raw


def write_memory(vaddr: int, data: bytes) -> None:
    """Write `data` at `vaddr`. Raises EFAULT if the process may not write all of the memory; a part may be written."""
    _transfer(vaddr=vaddr, buffer=(ctypes.c_char * len(data)).from_buffer_copy(data), write=True)


@functools.cache
def _populate_exists() -> bool:
    # A kernel before 5.14 answers EINVAL, as newer kernels do for memory without the right. Therefore the call is tried
    # on a page with that right.
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
    """A part of a range that is a mapping of a BAR of a fake device.

    `start`: the offset in the range. `offset`: the offset in the memory file of the device.
    """

    start: int
    size: int
    bdf: str
    offset: int


def device_areas(vaddr: int, size: int) -> Iterator[DeviceArea]:
    """Yield the parts of a range that are mappings of BARs of fake devices, ascending."""
    areas = query_ranges([(vaddr, vaddr + size)], named=True)
    if areas is None:
        yield from device_areas_by_text(vaddr, size)
    for area in areas or ():
        if area.name.startswith(_DEVICE_MARK):
            yield _device_area(vaddr, size, area.start, area.end, area.offset, area.name)


def _device_area(vaddr: int, size: int, first: int, last: int, offset: int, name: str) -> DeviceArea:  # noqa: PLR0917
    start, end = max(first, vaddr), min(last, vaddr + size)
    return DeviceArea(start - vaddr, end - start, name.removeprefix(_DEVICE_MARK).split()[0], offset + start - first)


def device_areas_by_text(vaddr: int, size: int) -> Iterator[DeviceArea]:
    """Yield the parts as `device_areas`, from the text of /proc/self/maps, on kernels before 6.11."""
    data = Path("/proc/self/maps").read_bytes()  # read for each mapping, so that only the lines of BARs are parsed
    at = data.find(_DEVICE_MARK.encode())
    while at >= 0:
        end_of_line = data.find(b"\n", at)
        line = data[data.rfind(b"\n", 0, at) + 1 : end_of_line].decode("ascii", "replace")
        at = data.find(_DEVICE_MARK.encode(), end_of_line)
        first, last = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
        if first < vaddr + size and vaddr < last:
            *_, offset, _device, _inode, name = line.split(maxsplit=5)
            yield _device_area(vaddr, size, first, last, int(offset, 16), name)


def maps_allow(vaddr: int, size: int, *, write: bool) -> bool:
    """Return whether /proc/self/maps has the whole range with the right. A file that is too short is not noticed."""
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
    """A snapshot of /proc/self/maps. Cost: O(n) to make, O(log n) for each look-up."""

    def __init__(self) -> None:
        lines = Path("/proc/self/maps").read_bytes().decode("ascii", "replace").split("\n")[:-1]
        self._areas = list(_areas(iter(lines)))
        self._ends = [end for _start, end, _rights in self._areas]

    def have(self, vaddr: int, size: int, *, rights: int) -> bool:
        """Return whether the process has the whole range, with PROT_READ or PROT_WRITE if they are in `rights`."""
        reached = vaddr
        for start, end, there in self._areas[bisect_right(self._ends, vaddr) :]:
            if start > reached or (rights & 1 and there[0] != "r") or (rights & 2 and there[1] != "w"):
                return False
            reached = end
            if reached >= vaddr + size:
                return True
        return False


def can_be_pinned(vaddr: int, size: int, *, write: bool) -> bool:
    """Return whether the running kernel would pin all of [`vaddr`, `vaddr + size`). The call populates the memory.

    MADV_POPULATE_READ and _WRITE fail where `pin_user_pages` without and with FOLL_WRITE fails. Kernels before 5.14 do
    not have this advice. There the rights of the memory areas decide, and memory behind the end of a file passes.
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
    """/proc/self/pagemap, open from the first look-up until `close`, since opening costs more than a look-up."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def _open(self) -> int:
        if self._fd is None:
            self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        return self._fd

    def close(self) -> None:
        """Close the file until the next look-up; twice is fine."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def is_present(self, vaddr: int) -> bool:
        """Return whether the page at `vaddr` is in memory."""
        data = os.pread(self._open(), 8, vaddr // PAGE_SIZE * 8)
        return len(data) == 8 and bool(struct.unpack("=Q", data)[0] & _PRESENT)

    def zero_pages(self, vaddr: int, size: int) -> int:
        """Return how many pages of [`vaddr`, `vaddr + size`), all present, are the shared page of zeros.

        Reads of never-written private memory map that page. Cost: some 5 µs. Source: PAGEMAP_SCAN, or
        `zero_pages_by_flags`.
        """
        if not _pagemap_scan_exists():
            return self.zero_pages_by_flags(vaddr, size)
        return _scan_for_zero(self._open(), vaddr, vaddr + size)

    def zero_pages_by_flags(self, vaddr: int, size: int) -> int:
        """Count as `zero_pages`, on kernels before 6.7: pages that are neither of a file nor exclusive to this process.

        After a fork, pages that are still shared with the child count too.
        """
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
    """Return the type of each mounted file system, by the device number."""
    found = {}
    for line in Path("/proc/self/mountinfo").read_bytes().decode("ascii", "replace").split("\n")[:-1]:
        before, _, after = line.partition(" - ")
        major, _, minor = before.split()[2].partition(":")
        found[int(major), int(minor)] = after.split()[0]
    return found


def file_areas(fd: int, start: int, end: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield where this process has bytes `start` to `end` of a file mapped, ascending: vaddr, size.

    A mapping that overlaps none of the `ranges`, given as start and end, may be left out.
    """
    status = os.fstat(fd)
    file = (os.major(status.st_dev), os.minor(status.st_dev)), status.st_ino
    few = list(itertools.islice(ranges, _FEW + 1))
    areas = query_ranges(few) if len(few) <= _FEW else None
    if areas is None:
        places = _file_places(*file)
    else:
        places = ((area.start, area.end, area.offset) for area in areas if (area.device, area.inode) == file)
    for first, last, offset in places:
        low, high = max(start, offset), min(end, offset + last - first)
        if low < high:
            yield first + low - offset, high - low


def _file_places(device: tuple[int, int], number: int) -> Iterator[tuple[int, int, int]]:
    """Yield the mappings of a file, from the text of /proc/self/maps: start, end, offset."""
    mark = b" %02x:%02x %d " % (*device, number)
    for line in Path("/proc/self/maps").read_bytes().split(b"\n"):
        if mark not in line:  # the format of show_vma_header_prefix; a path can contain the mark too
            continue
        span, _rights, offset, where, inode = line.split(maxsplit=5)[:5]
        if mark == b" %s %s " % (where, inode):
            first, last = span.split(b"-")
            yield int(first, 16), int(last, 16), int(offset, 16)


class FileAreas:
    """Finds shared writable mappings of files in /proc/self/maps, by PROCMAP_QUERY: 2 µs, on kernels from 6.11 on.

    The file is open from the start until `close`, so that no descriptor appears in the middle of a test.
    """

    def __init__(self) -> None:
        self._fd: int | None = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the file; twice is fine."""
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def first_tracked(self, vaddr: int, size: int) -> int | None:
        """Return where in [`vaddr`, `vaddr + size`) the first mapping begins of a file that devices must not write.

        Such a mapping is shared and writable, and the file system must see writes. None: there is no such mapping
        (memory files do not count), or the running kernel does not have PROCMAP_QUERY.
        """
        at, end = vaddr, vaddr + size
        wanted = 0  # mostly one mapping has the whole range; with flags the kernel walks over all others of the process
        while at < end and (found := self._next(at, wanted)) is not None and found.start < end:
            shared = found.flags & _SHARED_WRITABLE == _SHARED_WRITABLE
            if shared and _file_systems().get(found.device, "tmpfs") not in _UNTRACKED:
                return max(found.start, vaddr)
            at, wanted = found.end, _SHARED_WRITABLE | _FILE_BACKED
        return None

    def _next(self, vaddr: int, flags: int) -> Area | None:
        try:
            return query(-1 if self._fd is None else self._fd, vaddr, flags)
        except (OSError, ValueError):  # a kernel before 6.11, or the file is closed
            return None


class Argument(Protocol):
    """The third argument of an ioctl as the kernel uses the argument: a number, or memory to copy from and to."""

    @property
    def value(self) -> int:
        """The argument as a number: for a buffer, the address."""
        ...

    def read(self, size: int, offset: int = 0) -> bytes:
        """copy_from_user; EFAULT."""
        ...

    def write(self, data: bytes, offset: int = 0) -> None:
        """copy_to_user; EFAULT."""
        ...


class AddressArgument:
    """A number: a value, or an address that the caller passes and the kernel checks."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value & U64_MAX

    def read(self, size: int, offset: int = 0) -> bytes:
        """Read memory of this process. Raises EFAULT."""
        return read_memory(self.value + offset, size)

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write memory of this process. Raises EFAULT."""
        write_memory(self.value + offset, data)


class BufferArgument:
    """A buffer. Raises BufferError for an access beyond the end, which a kernel would make without an errno."""

    __slots__ = ("_buffer", "_size")

    def __init__(self, buffer: WritableBuffer) -> None:
        with memoryview(buffer) as view:
            if view.readonly:
                raise TypeError("the buffer of an ioctl must be writable, for the answer of the kernel")
            self._size = view.nbytes
        self._buffer = buffer

    @property
    def value(self) -> int:
        """The address of the buffer."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))

    @property
    def size(self) -> int:
        """The size of the buffer in bytes."""
        return self._size

    def _inside(self, size: int, offset: int) -> None:
        if offset + size > self._size:
            raise BufferError(
                f"the kernel accesses byte {offset + size} of a buffer of {self._size} bytes: argsz or size is wrong"
            )

    def read(self, size: int, offset: int = 0) -> bytes:
        """Read the buffer."""
        self._inside(size, offset)
        data: bytes = struct.unpack_from(f"{size}s", self._buffer, offset)[0]
        return data

    def write(self, data: bytes, offset: int = 0) -> None:
        """Write the buffer."""
        self._inside(len(data), offset)
        struct.pack_into(f"{len(data)}s", self._buffer, offset, data)
