"""The seam: one protocol with every system call that pyvfio makes, and the running kernel as an implementation.

All other modules are written against `Kernel`. `LinuxKernel` passes each call to the kernel.
`pyvfio.testing.FakeKernel` answers the calls on VFIO descriptors, and passes on the calls on process memory. Struct
encoding, argsz, the lifetime of descriptors, the meaning of an errno and the order of calls belong to the callers.
Therefore one set of tests (`tests/contract`) can check the fake and the kernel alike.

A call that fails raises OSError with the kernel's errno, and has no other effect here.

Synchronization: stateless; any thread may call any method. Calls that enter the kernel release the GIL.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, cast

from pyvfio.guard import forget_in_child
from pyvfio.units import PAGE_SIZE, Vaddr

WritableBuffer: TypeAlias = bytearray | memoryview | ctypes.Structure | ctypes.Array[ctypes.c_char]
IoctlArgument: TypeAlias = int | WritableBuffer
"""The argument of an ioctl: a number passed by value, or a buffer that the kernel can write to.

Never `bytes`: fcntl.ioctl would return a copy of the buffer instead of the kernel's return value, and a device
descriptor would be lost."""

Poll: TypeAlias = Callable[[float | None], Sequence[tuple[int, int]]]
"""A function that waits for descriptors, for a time in milliseconds (None: no limit).

Returns the descriptors that can be read, with the events of each."""

_INT_MAX = (1 << 31) - 1  # fcntl.ioctl refuses larger ints, at least up to Python 3.11
_FCNTL_BUFFER_MAX = 1024  # for up to so many bytes, fcntl.ioctl works on a copy and releases the GIL
_CAP_IPC_LOCK = 14  # linux/capability.h
_F_GET_SEALS = 1034  # linux/fcntl.h
_MINCORE_MOST = 4 << 30  # bytes per mincore(2) call, whose answer is then 1 MiB
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {
    1: "B",
    2: "H",
    4: "I",
    8: "Q",
}  # the `struct` format of an unsigned integer, by width in bytes
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
    """How many bytes of memory this process can lock, and has locked. VFIO charges each mapping to the process.

    `limit` is RLIMIT_MEMLOCK (None: unlimited), `used` is VmLck. `privileged`: CAP_IPC_LOCK lifts the limit.
    `address_space` is VmSize, which mlockall(2) compares with the limit.
    Source: `vfio_lock_acct` and `vfio_pin_pages_remote` in drivers/vfio/vfio_iommu_type1.c; `mlockall` in mm/mlock.c.
    """

    limit: int | None
    used: int
    privileged: bool
    address_space: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class FileStatus:
    """The state of an open file.

    * `mode`: st_mode of stat(2). `size`: in bytes.
    * `file_system`: the magic number of the file system (linux/magic.h). `block_size`: in bytes.
    * `readable` and `writable`: the access mode of the descriptor.
    * `seals`: F_SEAL_*; 0 for a file that cannot be sealed.
    * `identity`: st_dev and st_ino.
    """

    mode: int
    size: int
    file_system: int
    block_size: int
    readable: bool
    writable: bool
    seals: int
    identity: tuple[int, int]


class Cell(Protocol):
    """One register of a window, with the interface of a 0-dimensional memoryview.

    `cell[()]` loads, `cell[()] = value` stores. Both raise ValueError after the window is closed.
    """

    def __getitem__(self, key: tuple[()], /) -> int:
        """Load the register."""
        ...

    def __setitem__(self, key: tuple[()], value: int, /) -> None:
        """Store `value`."""
        ...


class Numbers(Protocol):
    """A window as an array of numbers of one width, with the interface of a memoryview.

    `numbers[i]` loads, `numbers[i] = value` stores. Raises IndexError beyond the end, ValueError for a number that does
    not fit, and TypeError for a value that is not a number. After the window is closed, and in a forked child, each
    access raises ValueError.
    """

    def __getitem__(self, index: int, /) -> int:
        """Load the number at `index`."""
        ...

    def __setitem__(self, index: int, value: int, /) -> None:
        """Store `value` at `index`."""
        ...


class Registers(Protocol):
    """A window on device registers. Each access has exactly the given width.

    `offset` is in bytes from the start of the window, `width` is 1, 2, 4 or 8. `Region` has checked both: a window
    checks only that it is open. An access raises ValueError, without touching memory, after the window is closed and in
    a forked child.

    Synchronization: any thread may access; only one thread at a time calls `cell`, `numbers` or `close`.
    """

    def read(self, offset: int, width: int) -> int:
        """Load `width` bytes as a little-endian number."""
        ...

    def write(self, offset: int, width: int, value: int) -> None:
        """Store `value` in `width` bytes, little-endian."""
        ...

    def cell(self, offset: int, width: int) -> Cell | None:
        """Return one register as an object; None if the window is not memory of this process."""
        ...

    def numbers(self, width: int, size: int) -> Numbers | None:
        """Return the first `size` bytes as numbers of `width` bytes; None if the window is not memory of this process.

        A remainder shorter than `width` is left out.
        """
        ...

    def close(self) -> None:
        """Release the window. Does nothing if already closed."""
        ...


class Kernel(Protocol):
    """Every system call that pyvfio makes. Each method raises OSError with the kernel's errno."""

    @property
    def sysfs(self) -> Path:
        """The mount point of sysfs."""
        ...

    @property
    def dev(self) -> Path:
        """The directory of the device nodes: `vfio/vfio`, `vfio/<group>`."""
        ...

    @property
    def proc(self) -> Path:
        """The mount point of procfs."""
        ...

    def open(self, path: str, flags: int) -> int:
        """open(2); O_CLOEXEC is always added."""
        ...

    def close(self, fd: int) -> None:
        """close(2)."""
        ...

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """ioctl(2); the kernel writes to the buffer, also when the call raises OSError."""
        ...

    def pread(self, fd: int, size: int, offset: int, /) -> bytes:
        """pread(2): up to `size` bytes."""
        ...

    def pwrite(self, fd: int, data: bytes, offset: int, /) -> int:
        """pwrite(2): the number of bytes written."""
        ...

    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """Map `size` bytes of a device descriptor (both multiples of a page) for register access."""
        ...

    def eventfd(self, initial: int, flags: int) -> int:
        """eventfd(2); EFD_CLOEXEC is always added."""
        ...

    def eventfd_read(self, fd: int) -> int:
        """Read the counter of an eventfd; EAGAIN if the counter is 0 and the descriptor does not block.

        The method must be written in Python, and no signal handler may raise between read(2) and the return: the count
        would be lost.
        """
        ...

    def eventfd_write(self, fd: int, value: int) -> None:
        """Add `value` to the counter of an eventfd."""
        ...

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """Wait until `fd` or one of `others` can be read, for at most `timeout` seconds (None: no limit).

        Returns the descriptors that can be read; an empty tuple on timeout.
        """
        ...

    def poller(self, *fds: int) -> Poll:
        """Return a function that waits like `poll`, for repeated calls by one thread at a time."""
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
        """Return how many bytes mlock(2) and mlockall(2) have locked, by /proc/self/smaps.

        The rest of VmLck is memory that is pinned, for devices for example. Cost: milliseconds, and more for a process
        with many mappings: for errors only.
        """
        ...

    def resident(self, vaddr: int, size: int) -> int:
        """Return how many bytes of `[vaddr, vaddr + size)`, whole pages, are resident: mincore(2). 1 ms for 1 GiB."""
        ...

    def memfd_create(self, name: str, flags: int) -> int:
        """memfd_create(2); MFD_CLOEXEC is always added."""
        ...

    def dup(self, fd: int) -> int:
        """Return another descriptor of the same open file, close-on-exec: F_DUPFD_CLOEXEC of fcntl(2)."""
        ...

    def ftruncate(self, fd: int, size: int) -> None:
        """ftruncate(2)."""
        ...

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """fallocate(2)."""
        ...

    def allocate(self, fd: int, offset: int, size: int, /) -> None:
        """fallocate(2) with mode 0, for files on tmpfs and hugetlbfs only. Retried after a signal handler returns.

        Those file systems have fallocate. On others, libc may write zeros instead.
        """
        ...

    def file_status(self, fd: int) -> FileStatus:
        """fstat(2), fstatfs(2), F_GETFL and F_GET_SEALS of fcntl(2)."""
        ...

    def memlock(self) -> Memlock:
        """Return RLIMIT_MEMLOCK, VmLck and CAP_IPC_LOCK of this process. Cost: 50 µs, for errors and plans only."""
        ...


def _load_libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size = ctypes.c_void_p  # as wide as size_t, and ctypes converts an int in a third of the time
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        size,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.mprotect.argtypes = [ctypes.c_void_p, size, ctypes.c_int]
    libc.madvise.argtypes = [ctypes.c_void_p, size, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    libc.munlock.argtypes = [ctypes.c_void_p, size]
    libc.mincore.argtypes = [ctypes.c_void_p, size, ctypes.c_char_p]
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return libc


_libc = _load_libc()


def _checked(result: int) -> int:
    # ctypes keeps errno per thread, so no signal handler and no other thread can change the value in between.
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class MappedRegisters:
    """Device memory mapped into this process. Each access is one load or store of exactly the given width.

    An item access of a memoryview copies `itemsize` bytes, for which the C compiler emits one instruction. An 8-byte
    pwrite to a BAR is two accesses on some kernels (`vfio_pci_core_do_io_rw` before 6.10 has no 8-byte access).

    `close` releases every view, and then unmaps. An item access holds the GIL from the check of the view to the end of
    the copy. Therefore no access is in progress when the views are released, and each later access raises ValueError.
    In a forked child all views are released.
    """

    def __init__(self, kernel: Kernel, vaddr: Vaddr, size: int) -> None:
        self._kernel = kernel
        self._mapping: tuple[Vaddr, int] | None = (vaddr, size)
        window = memoryview((ctypes.c_char * size).from_address(vaddr)).cast("B")
        self._views = {width: window.cast(letter) for width, letter in _FORMATS.items()}
        self._cells: dict[tuple[int, int], memoryview] = {}
        self._parts: list[memoryview] = []
        forget_in_child(self)

    def read(self, offset: int, width: int) -> int:
        """Load `width` bytes at `offset`, a multiple of `width`."""
        return self._views[width][offset // width]

    def write(self, offset: int, width: int, value: int) -> None:
        """Store `value` in `width` bytes at `offset`, a multiple of `width`."""
        self._views[width][offset // width] = value

    def cell(self, offset: int, width: int) -> Cell:
        """Return a 0-dimensional memoryview of the register: the fastest access that Python has."""
        if (offset, width) not in self._cells:
            register = self._views[1][offset : offset + width]
            self._cells[offset, width] = register.cast(_FORMATS[width], [])
        return self._cells[offset, width]

    def numbers(self, width: int, size: int) -> Numbers:
        """Return a memoryview of the first `size` bytes."""
        view = self._views[width][: size // width]
        self._parts.append(view)
        return view

    def close(self) -> None:
        """Unmap the window. Does nothing if already closed."""
        if self._mapping is None:
            return
        (vaddr, size), self._mapping = self._mapping, None
        self.forget()
        self._kernel.munmap(vaddr, size)

    def forget(self) -> None:
        """Release all views, without a system call: each later access raises ValueError."""
        for view in (*self._parts, *self._cells.values(), *self._views.values()):
            view.release()


def milliseconds(timeout: float | None) -> float | None:
    """Convert seconds to the milliseconds of poll(2), a C int. Longer times become 24 days."""
    return None if timeout is None else min(timeout * 1000, _INT_MAX)


class _Eventfd(int):
    """The descriptor of an eventfd. The attribute `count` reads the counter.

    Python checks for signals after calls of C functions, but not after attribute accesses. Therefore no handler runs
    between the read and the use of the attribute.
    """

    count = cast("int", property(os.eventfd_read))


class LinuxKernel:
    """The running kernel.

    `sysfs`, `dev` and `proc` are the mount points: a container can have them at other paths.
    """

    def __init__(self, *, sysfs: Path | str = "/sys", dev: Path | str = "/dev", proc: Path | str = "/proc") -> None:
        self._sysfs = Path(sysfs)
        self._dev = Path(dev)
        self._proc = Path(proc)

    @property
    def sysfs(self) -> Path:
        """The mount point of sysfs."""
        return self._sysfs

    @property
    def dev(self) -> Path:
        """The directory of the device nodes."""
        return self._dev

    @property
    def proc(self) -> Path:
        """The mount point of procfs."""
        return self._proc

    def open(self, path: str, flags: int) -> int:
        """open(2) with O_CLOEXEC."""
        return os.open(path, flags | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        """close(2)."""
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """ioctl(2) through `fcntl.ioctl`, a quarter of the cost of a ctypes call.

        Numbers that `fcntl.ioctl` refuses, and buffers for which the GIL would be held, go through libc.
        """
        # The buffers that are always writable; first the type that every map passes.
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
        anchor = ctypes.c_char.from_buffer(argument)  # this export keeps a bytearray from being moved
        return _checked(_libc.ioctl(fd, request, ctypes.addressof(anchor)))

    # The functions themselves: a wrapping method would add a third to the cost of the system call.
    pread = staticmethod(os.pread)
    pwrite = staticmethod(os.pwrite)

    def registers(self, fd: int, offset: int, size: int) -> Registers:
        """mmap(2) a BAR shared, readable and writable."""
        protection, shared = 3, 1
        return MappedRegisters(self, self.mmap(0, size, protection, shared, fd=fd, offset=offset), size)

    def eventfd(self, initial: int, flags: int) -> int:
        """eventfd(2) with EFD_CLOEXEC. Returns an int of a class that `eventfd_read` reads at a lower cost."""
        return _Eventfd(os.eventfd(initial, flags | os.EFD_CLOEXEC))

    def eventfd_read(self, fd: int) -> int:
        """read(2) of eight bytes."""
        while True:
            try:
                return fd.count if type(fd) is _Eventfd else _Eventfd(fd).count
            except InterruptedError:  # a blocking descriptor, and no count was read
                pass

    def eventfd_write(self, fd: int, value: int) -> None:
        """write(2) of eight bytes."""
        os.eventfd_write(fd, value)

    def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
        """poll(2)."""
        return tuple(number for number, _events in self.poller(fd, *others)(milliseconds(timeout)))

    def poller(self, *fds: int) -> Poll:
        """Return the method of a poll object."""
        poller = select.poll()
        for fd in fds:
            poller.register(fd, select.POLLIN)
        return poller.poll

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
        """Add up the areas of /proc/self/smaps with the flag "lo"."""
        locked, size = 0, 0
        for line in Path("/proc/self/smaps").read_bytes().split(b"\n"):
            if line.startswith(b"Size:"):
                size = int(line.split()[1]) * 1024
            elif line.startswith(b"VmFlags:") and b"lo" in line.split():
                locked += size
        return locked

    def resident(self, vaddr: int, size: int) -> int:
        """mincore(2), which reports 1 or 0 for each page."""
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

    allocate = staticmethod(os.posix_fallocate)  # a ctypes call costs ten times as much

    def file_status(self, fd: int) -> FileStatus:
        """fstat(2), fstatfs(2), fcntl(2)."""
        answer = (ctypes.c_long * 16)()  # struct statfs begins with f_type and f_bsize
        _checked(_libc.fstatfs(fd, ctypes.addressof(answer)))
        status, flags = os.fstat(fd), fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            seals = fcntl.fcntl(fd, _F_GET_SEALS)
        except OSError:  # EINVAL: the file cannot be sealed; EBADF: O_PATH
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
        # As bytes: a thread's name can contain a carriage return, which the kernel does not escape.
        lines = Path("/proc/self/status").read_bytes().split(b"\n")
        status = dict(line.decode("ascii", "replace").split(":", 1) for line in lines if b":" in line)
        return Memlock(
            # The kernel compares whole pages: vfio_pin_pages_remote shifts the limit right by PAGE_SHIFT.
            limit=None if soft == resource.RLIM_INFINITY else soft // PAGE_SIZE * PAGE_SIZE,
            used=int(status.get("VmLck", "0 kB").split()[0]) * 1024,
            privileged=bool(int(status["CapEff"], 16) >> _CAP_IPC_LOCK & 1),
            address_space=int(status.get("VmSize", "0 kB").split()[0]) * 1024,
        )


def ioctl_of_buffer(kernel: Kernel) -> Callable[[int, int, bytearray], object]:
    """Return the call `ioctl` of `kernel` for buffers of at most 1024 bytes: without a method around it, if possible.

    For calls of which each map makes one: the method would take as long as `fcntl.ioctl` without the system call.
    """
    if getattr(type(kernel), "ioctl", None) is LinuxKernel.ioctl and "ioctl" not in vars(kernel):
        return fcntl.ioctl

    def make(fd: int, request: int, argument: bytearray) -> int:
        return kernel.ioctl(fd, request, argument)  # looked up for each call: an object may pass calls on

    return make
