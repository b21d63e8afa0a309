"""The seam: every system call that pyvfio makes, as one protocol, and the real kernel behind it.

`Kernel` is what the floors above are written against. `LinuxKernel` passes each call on; `pyvfio.testing.FakeKernel`
answers the calls on VFIO file descriptors itself and passes the ones on process memory on. Struct encoding, argsz, the
lifetime of descriptors, the meaning of an errno and the order of calls are all above this line, so that one set of
sentences (`tests/contract`) can judge the fake and the kernel alike.

Whatever fails raises OSError with the kernel's errno and nothing else happens here.

Synchronization: stateless; any thread may call anything. Calls that enter the kernel release the GIL.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from pyvfio.guard import forget_in_child
from pyvfio.units import PAGE_SIZE, Vaddr

WritableBuffer: TypeAlias = bytearray | memoryview | ctypes.Structure | ctypes.Array[ctypes.c_char]
IoctlArgument: TypeAlias = int | WritableBuffer
"""What an ioctl is given: a number passed by value, or a buffer that the kernel may write. Never `bytes`: fcntl.ioctl
would return a copy of the buffer in place of the kernel's answer, and a device descriptor would be lost."""

_INT_MAX = (1 << 31) - 1  # fcntl.ioctl refuses larger ints up to Python 3.11 at least
_FCNTL_BUFFER_MAX = 1024  # up to here fcntl.ioctl works on a copy and releases the GIL
_CAP_IPC_LOCK = 14  # linux/capability.h
_F_GET_SEALS = 1034  # linux/fcntl.h
_MINCORE_MOST = 4 << 30  # bytes that are asked for at once: 1 MiB of answer
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {
    1: "B",
    2: "H",
    4: "I",
    8: "Q",
}  # of an integer with so many bytes, as `struct` has them
_MAP_FAILED = ctypes.c_void_p(-1).value

MAP_SHARED = 0x1
MAP_PRIVATE = 0x2
MAP_SHARED_VALIDATE = 0x3
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_FIXED_NOREPLACE = 0x100000
MAP_NORESERVE = 0x4000
MAP_SYNC = 0x80000
PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
FALLOC_FL_PUNCH_HOLE = 2
HUGETLBFS_MAGIC = 0x958458F6  # linux/magic.h
TMPFS_MAGIC = 0x01021994
F_SEAL_GROW = 4  # linux/fcntl.h
F_SEAL_WRITE = 8
F_SEAL_FUTURE_WRITE = 16
MADV_DODUMP = 17
MADV_POPULATE_READ = 22  # Python's mmap has no names for these
MADV_POPULATE_WRITE = 23
MADV_DONTNEED_LOCKED = 24  # since Linux 5.18
MCL_CURRENT = 1  # asm-generic/mman.h
MCL_FUTURE = 2
MCL_ONFAULT = 4


@dataclass(frozen=True, slots=True)
class Memlock:
    """How much memory this process may lock, and has locked; bytes. VFIO charges each mapping to it.

    `limit` is RLIMIT_MEMLOCK (None: unlimited), `used` is VmLck, `privileged` says that CAP_IPC_LOCK lifts the limit.
    `address_space` is VmSize, which is what mlockall(2) holds against the limit.
    Source: `vfio_lock_acct` and `vfio_pin_pages_remote` in drivers/vfio/vfio_iommu_type1.c; `mlockall` in mm/mlock.c.
    """

    limit: int | None
    used: int
    privileged: bool
    address_space: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class FileStatus:
    """An open file: its `mode` as stat(2) has it, its `size` in bytes, `file_system` by its magic number
    (linux/magic.h), the `block_size` of that, whether the descriptor lets it be read and written, the `seals` that it
    has (F_SEAL_*, 0 for what cannot be sealed), and its `identity`: st_dev and st_ino."""

    mode: int
    size: int
    file_system: int
    block_size: int
    readable: bool
    writable: bool
    seals: int
    identity: tuple[int, int]


class Cell(Protocol):
    """One register of a window, as a memoryview without dimensions has it: `cell[()]` loads, `cell[()] = value` stores.

    Once the window is closed, both raise ValueError.
    """

    def __getitem__(self, key: tuple[()], /) -> int:
        """Load it."""
        ...

    def __setitem__(self, key: tuple[()], value: int, /) -> None:
        """Store `value`."""
        ...


class Registers(Protocol):
    """A window on device registers, each access exactly as wide as asked for.

    `offset` is in bytes from the window's start, `width` is 1, 2, 4 or 8. Nothing is checked here but that the window
    is still open: `Region` has checked offset and width. An access of a closed window raises ValueError, and reaches no
    memory.

    Synchronization: any thread may access; `cell` and `close` are called by one thread at a time.
    """

    def read(self, offset: int, width: int) -> int:
        """Load `width` bytes as a little-endian number."""
        ...

    def write(self, offset: int, width: int, value: int) -> None:
        """Store `value` in `width` bytes, little-endian."""
        ...

    def cell(self, offset: int, width: int) -> Cell | None:
        """One register as an object; None where the window is not memory of this process."""
        ...

    def close(self) -> None:
        """Give the window back; twice is fine."""
        ...


class Kernel(Protocol):
    """Every system call that pyvfio makes. Each method raises OSError with the kernel's errno."""

    @property
    def sysfs(self) -> Path:
        """Where sysfs is mounted."""
        ...

    @property
    def dev(self) -> Path:
        """Where the device nodes are: `vfio/vfio`, `vfio/<group>`."""
        ...

    @property
    def proc(self) -> Path:
        """Where procfs is mounted."""
        ...

    def open(self, path: str, flags: int) -> int:
        """open(2); O_CLOEXEC is always added."""
        ...

    def close(self, fd: int) -> None:
        """close(2)."""
        ...

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """ioctl(2); a buffer holds what the kernel wrote, also when OSError is raised."""
        ...

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """pread(2): up to `size` bytes."""
        ...

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2): how many bytes were taken."""
        ...

    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """Map `size` bytes of a device descriptor (both multiples of a page) for register access."""
        ...

    def eventfd(self, initial: int, flags: int) -> int:
        """eventfd(2); EFD_CLOEXEC is always added."""
        ...

    def eventfd_read(self, fd: int) -> int:
        """Read an eventfd's counter; EAGAIN when it is zero and the descriptor does not block."""
        ...

    def eventfd_write(self, fd: int, value: int) -> None:
        """Add to an eventfd's counter."""
        ...

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """Wait until `fd` or one of `others` can be read, `timeout` seconds at most (None: for ever). Those that can
        be read; none: the time has passed."""
        ...

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """mmap(2); `vaddr` 0 lets the kernel choose."""
        ...

    def mprotect(self, vaddr: int, size: int, protection: int) -> None:
        """mprotect(2)."""
        ...

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """madvise(2)."""
        ...

    def munmap(self, vaddr: int, size: int) -> None:
        """munmap(2)."""
        ...

    def mlockall(self, flags: int) -> None:
        """mlockall(2); `flags` are MCL_*."""
        ...

    def munlockall(self) -> None:
        """munlockall(2)."""
        ...

    def munlock(self, vaddr: int, size: int) -> None:
        """munlock(2)."""
        ...

    def mlocked(self) -> int:
        """How many bytes of this process mlock(2) or mlockall(2) has locked, as /proc/self/smaps has them; of VmLck the
        rest is memory that devices reach, and its like. Milliseconds, and more where much memory is there: for errors
        only."""
        ...

    def resident(self, vaddr: int, size: int) -> int:
        """How many bytes of `[vaddr, vaddr + size)`, whole pages, are in memory: mincore(2). 1 ms for 1 GiB."""
        ...

    def memfd_create(self, name: str, flags: int) -> int:
        """memfd_create(2); MFD_CLOEXEC is always added."""
        ...

    def dup(self, fd: int) -> int:
        """Another descriptor of the same open file, close-on-exec: F_DUPFD_CLOEXEC of fcntl(2)."""
        ...

    def ftruncate(self, fd: int, size: int) -> None:
        """ftruncate(2)."""
        ...

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2)."""
        ...

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """fallocate(2) with mode 0, of a file on tmpfs or hugetlbfs, which have it; again when a signal handler has
        returned. Of a file elsewhere libc might write zeros in its place."""
        ...

    def file_status(self, fd: int) -> FileStatus:
        """fstat(2), fstatfs(2), F_GETFL and F_GET_SEALS of fcntl(2)."""
        ...

    def memlock(self) -> Memlock:
        """RLIMIT_MEMLOCK, VmLck and CAP_IPC_LOCK of this process; some 50 µs, so for errors and plans only."""
        ...


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return libc


_libc = _load_libc()


def _checked(result: int) -> int:
    # ctypes keeps errno per thread, so a signal handler or another thread cannot change it in between.
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class MappedRegisters:
    """Device memory mapped into this process: each access is one load or store of exactly its width.

    A memoryview's item access is a copy of `itemsize` bytes, which the C compiler makes one instruction; an 8-byte
    pwrite into a BAR is cut in two by some kernels (`vfio_pci_core_do_io_rw` before 6.10 has no 8-byte access).

    `close` releases every view before it unmaps. An item access holds the GIL from its look at the view to its copy, so
    no access is under way then, and each later one is ValueError. A child that is forked has its views released, too.
    """

    def __init__(self, kernel: Kernel, vaddr: Vaddr, size: int) -> None:
        self._kernel = kernel
        self._mapping: tuple[Vaddr, int] | None = (vaddr, size)
        window = memoryview((ctypes.c_char * size).from_address(vaddr)).cast("B")
        self._views = {width: window.cast(letter) for width, letter in _FORMATS.items()}
        self._cells: dict[tuple[int, int], memoryview] = {}
        forget_in_child(self)

    def read(self, offset: int, width: int) -> int:
        """Load `width` bytes at `offset`, which is a multiple of `width`."""
        return self._views[width][offset // width]

    def write(self, offset: int, width: int, value: int) -> None:
        """Store `value` in `width` bytes at `offset`, which is a multiple of `width`."""
        self._views[width][offset // width] = value

    def cell(self, offset: int, width: int) -> Cell:
        """A memoryview of the register, without dimensions: its access is the fastest that Python has."""
        if (offset, width) not in self._cells:
            register = self._views[1][offset : offset + width]
            self._cells[offset, width] = register.cast(_FORMATS[width], [])
        return self._cells[offset, width]

    def close(self) -> None:
        """Unmap the window; twice is fine."""
        if self._mapping is None:
            return
        (vaddr, size), self._mapping = self._mapping, None
        self.forget()
        self._kernel.munmap(vaddr, size)

    def forget(self) -> None:
        """Let each access raise ValueError, without a system call."""
        for view in (*self._cells.values(), *self._views.values()):
            view.release()


class LinuxKernel:
    """The running kernel. `sysfs`, `dev` and `proc` may be elsewhere, for a container that has them mounted
    elsewhere."""

    def __init__(self, *, sysfs: Path | str = "/sys", dev: Path | str = "/dev", proc: Path | str = "/proc") -> None:
        self._sysfs = Path(sysfs)
        self._dev = Path(dev)
        self._proc = Path(proc)

    @property
    def sysfs(self) -> Path:
        """Where sysfs is mounted."""
        return self._sysfs

    @property
    def dev(self) -> Path:
        """Where the device nodes are."""
        return self._dev

    @property
    def proc(self) -> Path:
        """Where procfs is mounted."""
        return self._proc

    def open(self, path: str, flags: int) -> int:
        """open(2) with O_CLOEXEC."""
        return os.open(path, flags | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """ioctl(2) through `fcntl.ioctl`, a quarter of the cost of a ctypes call; numbers that it refuses and buffers
        for which it would keep the GIL go through libc."""
        # What can always be written, a mapping's argument first.
        if (type(argument) is bytearray and len(argument) <= _FCNTL_BUFFER_MAX) or (
            isinstance(argument, ctypes.Structure) and ctypes.sizeof(argument) <= _FCNTL_BUFFER_MAX
        ):
            answer: int = fcntl.ioctl(fd, request, argument)
            return answer
        if isinstance(argument, int):
            if 0 <= argument <= _INT_MAX:
                return fcntl.ioctl(fd, request, argument)
            return _checked(_libc.ioctl(fd, request, argument))
        with memoryview(argument) as view:
            if view.readonly:
                raise TypeError("an ioctl's buffer must be writable: the kernel answers in it")
            if view.nbytes <= _FCNTL_BUFFER_MAX:
                result: int = fcntl.ioctl(fd, request, argument)
                return result
        anchor = ctypes.c_char.from_buffer(argument)  # as long as it lives, a bytearray cannot be moved
        return _checked(_libc.ioctl(fd, request, ctypes.addressof(anchor)))

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """pread(2)."""
        return os.pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        return os.pwrite(fd, data, offset)

    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """mmap(2) a BAR shared, readable and writable."""
        protection, shared = 3, 1
        return MappedRegisters(self, self.mmap(0, size, protection, shared, fd=fd, offset=offset), size)

    def eventfd(self, initial: int, flags: int) -> int:
        """eventfd(2) with EFD_CLOEXEC."""
        return os.eventfd(initial, flags | os.EFD_CLOEXEC)

    def eventfd_read(self, fd: int) -> int:
        """read(2) of eight bytes."""
        value: int = struct.unpack("=Q", os.read(fd, 8))[0]
        return value

    def eventfd_write(self, fd: int, value: int) -> None:
        """write(2) of eight bytes."""
        os.eventfd_write(fd, value)

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """poll(2)."""
        poller = select.poll()
        for each in (fd, *others):
            poller.register(each, select.POLLIN)
        # poll(2) takes milliseconds in an int; 24 days are as good as what is longer.
        ready = poller.poll(None if timeout is None else min(timeout * 1000, _INT_MAX))
        return tuple(number for number, _events in ready)

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """mmap(2)."""
        result: int | None = _libc.mmap(vaddr, size, protection, flags, fd, offset)
        if result == _MAP_FAILED:
            _checked(-1)
        return Vaddr(result or 0)

    def mprotect(self, vaddr: int, size: int, protection: int) -> None:
        """mprotect(2)."""
        if _libc.mprotect(vaddr, size, protection):
            _checked(-1)

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """madvise(2)."""
        if _libc.madvise(vaddr, size, advice):
            _checked(-1)

    def munmap(self, vaddr: int, size: int) -> None:
        """munmap(2)."""
        _checked(_libc.munmap(vaddr, size))

    def mlockall(self, flags: int) -> None:
        """mlockall(2)."""
        _checked(_libc.mlockall(flags))

    def munlockall(self) -> None:
        """munlockall(2)."""
        _checked(_libc.munlockall())

    def munlock(self, vaddr: int, size: int) -> None:
        """munlock(2)."""
        _checked(_libc.munlock(vaddr, size))

    def mlocked(self) -> int:
        """The areas of /proc/self/smaps with the flag "lo"."""
        locked, size = 0, 0
        for line in Path("/proc/self/smaps").read_bytes().split(b"\n"):
            if line.startswith(b"Size:"):
                size = int(line.split()[1]) * 1024
            elif line.startswith(b"VmFlags:") and b"lo" in line.split():
                locked += size
        return locked

    def resident(self, vaddr: int, size: int) -> int:
        """mincore(2), which says 1 or 0 for each page."""
        found = 0
        for start in range(vaddr, vaddr + size, _MINCORE_MOST):
            part = min(vaddr + size - start, _MINCORE_MOST)
            pages = ctypes.create_string_buffer(part // PAGE_SIZE)
            _checked(_libc.mincore(start, part, pages))
            found += pages.raw.count(b"\1")
        return found * PAGE_SIZE

    def memfd_create(self, name: str, flags: int) -> int:
        """memfd_create(2) with MFD_CLOEXEC."""
        return os.memfd_create(name, flags | os.MFD_CLOEXEC)

    def dup(self, fd: int) -> int:
        """fcntl(2)."""
        return os.dup(fd)

    def ftruncate(self, fd: int, size: int) -> None:
        """ftruncate(2)."""
        os.ftruncate(fd, size)

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2)."""
        if _libc.fallocate(fd, mode, offset, size):
            _checked(-1)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """posix_fallocate(3), which Python has without ctypes, at a tenth of its cost."""
        os.posix_fallocate(fd, offset, size)

    def file_status(self, fd: int) -> FileStatus:
        """fstat(2), fstatfs(2), fcntl(2)."""
        answer = (ctypes.c_long * 16)()  # struct statfs begins with f_type and f_bsize
        _checked(_libc.fstatfs(fd, ctypes.addressof(answer)))
        status, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            seals = fcntl.fcntl(fd, _F_GET_SEALS)
        except OSError:  # EINVAL: no file that can be sealed; EBADF: O_PATH
            seals = 0
        return FileStatus(
            mode=status.st_mode,
            size=status.st_size,
            file_system=answer[0],
            block_size=answer[1],
            readable=not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_WRONLY,
            writable=not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_RDONLY,
            seals=seals,
            identity=(status.st_dev, status.st_ino),
        )

    def memlock(self) -> Memlock:
        """getrlimit(2) and /proc/self/status."""
        soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        # As bytes: the name of a thread may hold a carriage return, which the kernel does not escape.
        lines = Path("/proc/self/status").read_bytes().split(b"\n")
        status = dict(line.decode("ascii", "replace").split(":", 1) for line in lines if b":" in line)
        return Memlock(
            # The kernel compares whole pages: vfio_pin_pages_remote shifts the limit right by PAGE_SHIFT.
            limit=None if soft == resource.RLIM_INFINITY else soft // PAGE_SIZE * PAGE_SIZE,
            used=int(status.get("VmLck", "0 kB").split()[0]) * 1024,
            privileged=bool(int(status["CapEff"], 16) >> _CAP_IPC_LOCK & 1),
            address_space=int(status.get("VmSize", "0 kB").split()[0]) * 1024,
        )
