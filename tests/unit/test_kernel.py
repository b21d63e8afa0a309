"""The real kernel behind the seam: what it is given, and how it answers."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest

from pyvfio.kernel import PROT_NONE, IoctlArgument, Kernel, LinuxKernel, MappedRegisters, Memlock, ioctl_of_buffer
from pyvfio.testing import FakeKernel
from pyvfio.units import PAGE_SIZE, Vaddr
from tests.unit.fakes import Interrupt
from tests.unit.processes import in_child, maps

READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
PR_SET_NAME = 15
F_ADD_SEALS, F_SEAL_GROW = 1033, 4  # linux/fcntl.h
F_SEAL_SEAL = 1
KEEP_SIZE, PUNCH_HOLE = 1, 2  # linux/falloc.h
TMPFS_MAGIC = 0x0102_1994  # linux/magic.h


@pytest.fixture
def kernel() -> LinuxKernel:
    """The running one."""
    return LinuxKernel()


def test_both_kernels_are_what_the_floors_above_are_written_against() -> None:
    """mypy holds the classes to the protocol here."""
    kernels: list[type[Kernel]] = [LinuxKernel, FakeKernel]
    assert len(kernels) == 2


def test_sysfs_and_device_nodes_may_be_elsewhere(tmp_path: Path) -> None:
    """/sys, /dev and /proc, unless said otherwise."""
    here = LinuxKernel()
    assert (here.sysfs, here.dev, here.proc) == (Path("/sys"), Path("/dev"), Path("/proc"))
    there = LinuxKernel(sysfs=str(tmp_path), dev=tmp_path / "dev", proc=str(tmp_path / "proc"))
    assert (there.sysfs, there.dev, there.proc) == (tmp_path, tmp_path / "dev", tmp_path / "proc")


def test_descriptors_do_not_survive_exec(kernel: LinuxKernel, tmp_path: Path) -> None:
    """Files and eventfds are O_CLOEXEC, whatever flags were given."""
    (tmp_path / "file").touch()
    for fd in (kernel.open(str(tmp_path / "file"), os.O_RDWR), kernel.eventfd(0, 0)):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        kernel.close(fd)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


@pytest.mark.parametrize(("flags", "sealed"), [(0, F_SEAL_SEAL), (os.MFD_ALLOW_SEALING, 0)])
def test_a_file_in_memory_has_the_flags_and_the_name_that_it_was_made_with(
    kernel: LinuxKernel, flags: int, sealed: int
) -> None:
    """And none that a program inherits. Another descriptor of the same file neither."""
    fd = kernel.memfd_create("pyvfio-test", flags)
    again = kernel.dup(fd)
    assert [os.get_inheritable(each) for each in (fd, again)] == [False, False]
    assert [kernel.file_status(each).seals & F_SEAL_SEAL for each in (fd, again)] == [sealed, sealed]
    assert os.readlink(f"/proc/self/fd/{again}").startswith("/memfd:pyvfio-test")
    kernel.close(fd)
    kernel.ftruncate(again, PAGE_SIZE)
    assert kernel.file_status(again).size == PAGE_SIZE
    kernel.close(again)


def test_a_hole_is_where_the_call_says_and_of_that_size(kernel: LinuxKernel) -> None:
    """The bytes on both sides stay."""
    fd = kernel.memfd_create("pyvfio-test", 0)
    os.write(fd, b"x" * 5 * PAGE_SIZE)
    kernel.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, PAGE_SIZE, 3 * PAGE_SIZE)
    assert kernel.pread(fd, 6 * PAGE_SIZE, 0) == b"x" * PAGE_SIZE + bytes(3 * PAGE_SIZE) + b"x" * PAGE_SIZE
    kernel.close(fd)


def test_a_file_that_does_not_exist_is_enoent(kernel: LinuxKernel, tmp_path: Path) -> None:
    """An OSError with the kernel's errno."""
    with pytest.raises(FileNotFoundError):
        kernel.open(str(tmp_path / "none"), os.O_RDONLY)


def test_files_are_read_and_written_at_an_offset(kernel: LinuxKernel, tmp_path: Path) -> None:
    """Short reads at the end are short."""
    (tmp_path / "file").touch()
    fd = kernel.open(str(tmp_path / "file"), os.O_RDWR)
    assert kernel.pwrite(fd, b"abcd", 2) == 4
    assert kernel.pread(fd, 16, 1) == b"\0abcd"
    kernel.close(fd)


def test_pages_of_a_file_in_memory_are_had_all_or_none(kernel: LinuxKernel) -> None:
    """The file is made as long as that takes; one that may not be made longer has none of them, and keeps its
    length."""
    fd = os.memfd_create("pyvfio-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        kernel.allocate(fd, PAGE_SIZE, 2 * PAGE_SIZE)
        status = os.fstat(fd)
        assert (status.st_size, status.st_blocks * 512) == (3 * PAGE_SIZE, 2 * PAGE_SIZE)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_GROW)
        with pytest.raises(PermissionError):
            kernel.allocate(fd, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert os.fstat(fd) == status
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------------------------------- ioctl


def readable(kernel: LinuxKernel, buffer: bytearray | memoryview | ctypes.Array[ctypes.c_char]) -> int:
    """Ask a pipe that holds three bytes how many it has (FIONREAD), into `buffer`."""
    out, into = os.pipe()
    try:
        os.write(into, b"abc")
        assert kernel.ioctl(out, termios.FIONREAD, buffer) == 0
    finally:
        os.close(out)
        os.close(into)
    return int.from_bytes(bytes(memoryview(buffer).cast("B")[:4]), "little")


@pytest.mark.parametrize("size", [4, 1024, 1025, 65536])
def test_an_ioctl_answers_in_the_buffer_however_large_it_is(kernel: LinuxKernel, size: int) -> None:
    """Up to 1024 bytes fcntl.ioctl passes it on, above libc does; both leave what lies behind the answer."""
    buffer = bytearray(b"\xff" * size)
    assert readable(kernel, buffer) == 3
    assert bytes(buffer[4:]) == b"\xff" * (size - 4)
    assert readable(kernel, memoryview(bytearray(size))) == 3
    assert readable(kernel, (ctypes.c_char * size)()) == 3


def test_an_ioctl_takes_structures(kernel: LinuxKernel) -> None:
    """A ctypes structure is a buffer."""

    class Count(ctypes.Structure):
        number: int
        _fields_ = (("number", ctypes.c_int),)

    count = Count()
    out, into = os.pipe()
    os.write(into, b"abc")
    kernel.ioctl(out, termios.FIONREAD, count)
    assert count.number == 3
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("size", [8, 2000])
def test_a_buffer_that_cannot_be_written_is_refused(kernel: LinuxKernel, size: int) -> None:
    """The kernel's answer would be lost."""
    with pytest.raises(TypeError, match="writable"):
        kernel.ioctl(0, termios.FIONREAD, memoryview(bytes(size)))


@pytest.mark.parametrize("argument", [0, 1, (1 << 31) - 1, 1 << 31, 0xFFFF_FFFF, 1 << 63, -1])
def test_numbers_of_every_size_can_be_given_to_an_ioctl(kernel: LinuxKernel, argument: int) -> None:
    """Those that fcntl.ioctl refuses go through libc; ENOTTY says that the kernel has seen the call."""
    fd = kernel.eventfd(0, 0)
    with pytest.raises(OSError, match="ioctl") as raised:
        kernel.ioctl(fd, 0x3B64, argument)
    assert raised.value.errno == errno.ENOTTY
    kernel.close(fd)


def test_a_request_with_a_number_is_made(kernel: LinuxKernel) -> None:
    """FIONCLEX and FIOCLEX, which take any number: the descriptor loses close-on-exec, and gets it again."""
    fd = kernel.eventfd(0, 0)
    try:
        for request, flag in ((termios.FIONCLEX, 0), (termios.FIOCLEX, fcntl.FD_CLOEXEC)):
            for argument in (7, 1 << 40):
                assert kernel.ioctl(fd, request, argument) == 0
                assert fcntl.fcntl(fd, fcntl.F_GETFD) == flag
    finally:
        kernel.close(fd)


def test_an_address_reaches_the_kernel_unchanged(kernel: LinuxKernel) -> None:
    """An int above 2^31 is passed by value: here it is where the kernel is to answer."""
    number = ctypes.c_int(0)
    out, into = os.pipe()
    os.write(into, b"abcde")
    assert kernel.ioctl(out, termios.FIONREAD, ctypes.addressof(number)) == 0
    assert number.value == 5
    os.close(out)
    os.close(into)


@pytest.mark.parametrize("size", [8, 2000])
def test_a_refused_ioctl_is_an_oserror(kernel: LinuxKernel, size: int) -> None:
    """On both ways, with errno."""
    with pytest.raises(OSError, match="Bad file") as raised:
        kernel.ioctl(1 << 20, termios.FIONREAD, bytearray(size))
    assert raised.value.errno == errno.EBADF


# ------------------------------------------------------------------------------------------------------ eventfds


def test_an_eventfd_counts_and_reading_it_takes_the_count(kernel: LinuxKernel) -> None:
    """All of its 64 bits; empty, it is EAGAIN where it does not block."""
    fd = kernel.eventfd(3, os.EFD_NONBLOCK)
    os.eventfd_write(fd, (1 << 63) + 1)
    assert kernel.eventfd_read(fd) == (1 << 63) + 4
    with pytest.raises(BlockingIOError):
        kernel.eventfd_read(fd)
    kernel.close(fd)


@pytest.mark.long
def test_a_signal_handler_that_raises_in_a_read_loses_no_count(kernel: LinuxKernel) -> None:
    """Wherever in the read signals come, until a hundred have: the count stays in the eventfd, or is returned."""
    fd = kernel.eventfd(0, os.EFD_NONBLOCK)
    written = received = raised = 0

    def handler(_number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "eventfd_read":
            raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        while raised < 100 and written < 300_000:
            os.eventfd_write(fd, 1)
            written += 1
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + written % 16))
            try:
                received += kernel.eventfd_read(fd)
            except Interrupt:
                raised += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with suppress(BlockingIOError):
        received += kernel.eventfd_read(fd)
    kernel.close(fd)
    assert received == written


def test_a_poll_may_be_made_again_and_again(kernel: LinuxKernel) -> None:
    """It sees what is there each time, in milliseconds."""
    fds = [kernel.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    poll = kernel.poller(*fds)
    assert not poll(0)
    for fd in fds:
        os.eventfd_write(fd, 1)
        assert [ready for ready, _events in poll(None)] == [fd]
        assert kernel.eventfd_read(fd) == 1
    assert not poll(1)
    for fd in fds:
        kernel.close(fd)


def test_polling_waits_until_there_is_something_to_read(kernel: LinuxKernel) -> None:
    """No longer than it was told, and for ever where it was not."""
    fd = kernel.eventfd(0, 0)
    assert not kernel.poll(fd, 0)
    assert not kernel.poll(fd, 0.01)
    timer = threading.Timer(0.05, os.eventfd_write, (fd, 1))
    timer.start()
    assert kernel.poll(fd, None)
    timer.join()
    assert kernel.poll(fd, 0)
    kernel.close(fd)


# -------------------------------------------------------------------------------------------------------- memory


def test_memory_calls_do_what_their_names_say(kernel: LinuxKernel) -> None:
    """Seen in /proc/self/maps."""
    vaddr = kernel.mmap(0, 4 * PAGE_SIZE, PROT_NONE, ANONYMOUS)
    kernel.mprotect(vaddr + PAGE_SIZE, PAGE_SIZE, READ_WRITE)
    ctypes.memset(vaddr + PAGE_SIZE, 1, PAGE_SIZE)
    kernel.madvise(vaddr + PAGE_SIZE, PAGE_SIZE, mmap.MADV_DONTNEED)
    assert ctypes.string_at(vaddr + PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    assert [line.split()[1] for line in maps(vaddr + PAGE_SIZE, 2 * PAGE_SIZE)] == ["rw-p", "---p"]
    kernel.munmap(vaddr, 4 * PAGE_SIZE)
    assert not [line for line in maps(vaddr, 4 * PAGE_SIZE) if line.startswith(f"{vaddr:x}-")]


def test_a_file_is_mapped_from_an_offset(kernel: LinuxKernel) -> None:
    """A large one, too."""
    fd = os.memfd_create("pyvfio-test")
    os.pwrite(fd, b"here", 5 << 32)
    vaddr = kernel.mmap(0, PAGE_SIZE, READ_WRITE, mmap.MAP_SHARED, fd=fd, offset=5 << 32)
    assert ctypes.string_at(vaddr, 4) == b"here"
    kernel.munmap(vaddr, PAGE_SIZE)
    os.close(fd)


@pytest.fixture
def own_limit() -> Iterator[tuple[int, int]]:
    """RLIMIT_MEMLOCK, which the test may lower."""
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        yield limits
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, limits)


def test_locked_pages_are_counted_until_they_are_unlocked(kernel: LinuxKernel) -> None:
    """By munlock(2) a part, by munlockall(2) all; pages that are not locked are no part of the sum."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    vaddr = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, ANONYMOUS)
    try:
        locked, used = kernel.mlocked(), kernel.memlock().used
        assert libc.mlock(vaddr + PAGE_SIZE, 5 * PAGE_SIZE) == 0
        assert (kernel.mlocked() - locked, kernel.memlock().used - used) == (5 * PAGE_SIZE, 5 * PAGE_SIZE)
        kernel.munlock(vaddr + PAGE_SIZE, 2 * PAGE_SIZE)
        assert (kernel.mlocked() - locked, kernel.memlock().used - used) == (3 * PAGE_SIZE, 3 * PAGE_SIZE)
        kernel.munlockall()
        assert (kernel.mlocked(), kernel.memlock().used) == (0, 0)
        with pytest.raises(OSError, match="Cannot allocate"):
            kernel.munlock((1 << 47) - PAGE_SIZE, PAGE_SIZE)
    finally:
        kernel.munmap(vaddr, 8 * PAGE_SIZE)


def test_the_limit_is_the_soft_one_in_whole_pages(kernel: LinuxKernel, own_limit: tuple[int, int]) -> None:
    """None where there is none, and the address space is the one of /proc/self/statm."""
    soft, hard = own_limit
    assert kernel.memlock().limit == (None if soft == resource.RLIM_INFINITY else soft // PAGE_SIZE * PAGE_SIZE)
    for most, limit in ((3 * PAGE_SIZE, 3), (3 * PAGE_SIZE - 1, 2), (0, 0)):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, hard))
        assert kernel.memlock().limit == limit * PAGE_SIZE
    vaddr = kernel.mmap(0, 1 << 40, PROT_NONE, ANONYMOUS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    assert abs(kernel.memlock().address_space - pages * PAGE_SIZE) < 1 << 30
    kernel.munmap(vaddr, 1 << 40)


def test_the_status_of_a_file_is_that_of_the_kernel(kernel: LinuxKernel, tmp_path: Path) -> None:
    """A file in memory with seals, and one of a file system, which has none, opened to be read or written."""
    fd = os.memfd_create("pyvfio-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 3 * PAGE_SIZE)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_GROW)
    found = kernel.file_status(fd)
    assert (found.file_system, found.block_size, found.size, found.seals) == (
        TMPFS_MAGIC,
        PAGE_SIZE,
        3 * PAGE_SIZE,
        F_SEAL_GROW,
    )
    os.close(fd)
    (tmp_path / "file").write_bytes(b"abc")
    for flags, rights in ((os.O_RDONLY, (True, False)), (os.O_WRONLY, (False, True)), (os.O_RDWR, (True, True))):
        fd = os.open(tmp_path / "file", flags)
        found, status = kernel.file_status(fd), os.fstat(fd)
        assert (found.readable, found.writable) == rights
        assert (found.mode, found.size, found.identity) == (status.st_mode, 3, (status.st_dev, status.st_ino))
        assert found.block_size == os.statvfs(fd).f_bsize
        os.close(fd)
    out, into = os.pipe()
    assert kernel.file_status(out).seals == 0
    os.close(out)
    os.close(into)


def test_memory_calls_that_the_kernel_refuses_are_oserrors(kernel: LinuxKernel) -> None:
    """Each with the errno of its own."""
    with pytest.raises(OSError, match="Invalid") as raised:
        kernel.mmap(0, 0, PROT_NONE, ANONYMOUS)
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="Bad file") as raised:
        kernel.fallocate(1 << 20, 0, 0, PAGE_SIZE)
    assert raised.value.errno == errno.EBADF
    high = (1 << 63) + PAGE_SIZE
    for call in (kernel.mprotect, kernel.madvise):
        with pytest.raises(OSError, match="Cannot allocate"):
            call(high, PAGE_SIZE, 0)
    with pytest.raises(OSError, match="Invalid"):
        kernel.munmap(high, PAGE_SIZE)


def test_each_thread_gets_the_errno_of_its_own_call(kernel: LinuxKernel) -> None:
    """Two threads fail at the same time, each in its way."""
    seen: dict[int, set[int]] = {}

    def fail(size: int) -> None:
        seen[size] = set()
        for _ in range(300):
            try:
                kernel.mmap(0, size, PROT_NONE, ANONYMOUS)
            except OSError as error:
                seen[size].add(error.errno or 0)

    threads = [threading.Thread(target=fail, args=(size,)) for size in (0, 1 << 62)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: {errno.EINVAL}, 1 << 62: {errno.ENOMEM}}


def test_locked_memory_is_told_in_bytes_with_its_limit(kernel: LinuxKernel) -> None:
    """In a child, whose limit can be set: whole pages of it count, as the kernel compares pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def lock() -> None:
        before = kernel.memlock()
        vaddr = kernel.mmap(0, 4 * PAGE_SIZE, READ_WRITE, ANONYMOUS)
        assert libc.mlock(vaddr, 2 * PAGE_SIZE) == 0
        hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (3 * PAGE_SIZE + 100, hard))
        after = kernel.memlock()
        assert after == Memlock(limit=3 * PAGE_SIZE, used=before.used + 2 * PAGE_SIZE, privileged=before.privileged)
        if hard == resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, hard))
            assert kernel.memlock().limit is None

    assert in_child(lock) == 0


def test_cap_ipc_lock_is_seen(kernel: LinuxKernel) -> None:
    """As capget(2) has it: bit 14 of what is in effect."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("=Ii", 0x2008_0522, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    effective = int.from_bytes(data.raw[:4], "little")
    assert kernel.memlock().privileged == bool(effective >> 14 & 1)
    without = struct.pack("=I", effective & ~(1 << 14)) + data.raw[4:]
    assert libc.capset(header, without) == 0  # the capability stays permitted, and comes back
    try:
        assert kernel.memlock().privileged is False
    finally:
        assert libc.capset(header, data) == 0


@pytest.mark.parametrize("name", [b"a\rb", b"c\x0bd\x1ce", b"x: y", b"CapEff:\t0"])
def test_a_strange_name_of_the_process_does_not_matter(kernel: LinuxKernel, name: bytes) -> None:
    """The kernel escapes only newlines and backslashes in /proc/self/status."""
    libc = ctypes.CDLL(None)
    expected = kernel.memlock()

    def look() -> None:
        libc.prctl(PR_SET_NAME, name, 0, 0, 0)
        assert kernel.memlock() == expected

    assert in_child(look) == 0


# ----------------------------------------------------------------------------------------------------- registers


def test_registers_are_loaded_and_stored_in_exactly_their_width(kernel: LinuxKernel) -> None:
    """Little-endian, and their neighbours stay."""
    fd = os.memfd_create("pyvfio-test")
    os.ftruncate(fd, 2 * PAGE_SIZE)
    window = kernel.registers(fd, PAGE_SIZE, PAGE_SIZE)
    for place, width in enumerate((1, 2, 4, 8)):
        os.pwrite(fd, b"\xee" * 24, PAGE_SIZE + 64 * place)
        value = int.from_bytes(bytes(range(1, width + 1)), "little")
        window.write(64 * place + 8, width, value)
        assert window.read(64 * place + 8, width) == value
        expected = b"\xee" * 8 + bytes(range(1, width + 1)) + b"\xee" * (16 - width)
        assert os.pread(fd, 24, PAGE_SIZE + 64 * place) == expected
    window.write(PAGE_SIZE - 8, 8, (1 << 64) - 1)
    assert window.read(PAGE_SIZE - 1, 1) == 0xFF
    window.close()
    os.close(fd)


def test_a_value_that_does_not_fit_its_width_is_refused(kernel: LinuxKernel) -> None:
    """And nothing is stored."""
    fd = os.memfd_create("pyvfio-test")
    os.ftruncate(fd, PAGE_SIZE)
    window = kernel.registers(fd, 0, PAGE_SIZE)
    with pytest.raises(ValueError, match="memoryview"):
        window.write(0, 2, 0x1_0000)
    assert window.read(0, 8) == 0
    window.close()
    os.close(fd)


class Unmapping(LinuxKernel):
    """Counts what is unmapped."""

    def __init__(self) -> None:
        super().__init__()
        self.unmapped: list[tuple[int, int]] = []

    def munmap(self, vaddr: int, size: int) -> None:
        """munmap(2)."""
        self.unmapped.append((vaddr, size))
        super().munmap(vaddr, size)


def test_closed_registers_are_unmapped_once_and_cannot_be_used() -> None:
    """ValueError in place of SIGSEGV."""
    kernel = Unmapping()
    vaddr: Vaddr = kernel.mmap(0, PAGE_SIZE, READ_WRITE, ANONYMOUS)
    window = MappedRegisters(kernel, vaddr, PAGE_SIZE)
    window.close()
    window.close()
    assert kernel.unmapped == [(vaddr, PAGE_SIZE)]
    for use in (lambda: window.read(0, 4), lambda: window.write(0, 4, 0)):
        with pytest.raises(ValueError, match="released"):
            use()


def test_a_buffer_is_free_again_when_the_kernel_has_answered(kernel: LinuxKernel) -> None:
    """It is exported for the call only: a bytearray can grow after it."""
    buffer = bytearray(2000)
    assert readable(kernel, buffer) == 3
    buffer.extend(b"x" * 100_000)
    assert len(buffer) == 102_000


class _Counting(LinuxKernel):
    """With an `ioctl` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """One more."""
        self.count += 1
        return super().ioctl(fd, request, argument)


class _Passing:
    """Passes each call on, and counts the look-ups."""

    def __init__(self) -> None:
        self.kernel, self.count = LinuxKernel(), 0

    def __getattr__(self, name: str) -> object:
        self.count += name == "ioctl"
        return getattr(self.kernel, name)


def test_an_ioctl_with_a_buffer_is_made_without_a_method_unless_the_kernel_has_one_of_its_own() -> None:
    """A class derived from LinuxKernel, an object with a function of its own, one that passes calls on: each time."""
    assert ioctl_of_buffer(LinuxKernel()) is fcntl.ioctl
    derived, own, counted, passing = _Counting(), LinuxKernel(), _Counting(), _Passing()
    vars(own)["ioctl"] = counted.ioctl
    with Path(__file__).open("rb") as file:
        for kernel in (derived, own, passing):
            call = ioctl_of_buffer(kernel)  # type: ignore[arg-type]
            for _ in range(2):
                call(file.fileno(), termios.FIONREAD, bytearray(4))
    assert (derived.count, counted.count, passing.count) == (2, 2, 2)
