"""Calls on the memory of this process: real, and observed, since devices may reach memory that a call releases."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from pyvfio.guard import uninterrupted
from pyvfio.kernel import FALLOC_FL_KEEP_SIZE, MAP_FIXED, FileStatus, LinuxKernel
from pyvfio.testing.fake.descriptors import Descriptors
from pyvfio.testing.fake.group import device_behind
from pyvfio.testing.fake.pins import Pins
from pyvfio.testing.fake.process import file_areas, refuse
from pyvfio.testing.fake.record import Record
from pyvfio.testing.fake.unmodelled import Unmodelled
from pyvfio.units import U64_MAX, Vaddr

_Answer = TypeVar("_Answer")
_MAP_FIXED_NOREPLACE = 0x100000
_MAP_SHARED = 1
_READ_WRITE = 3
# MADV_NORMAL to _WILLNEED, _DONTFORK to _POPULATE_WRITE, _COLLAPSE. All other advice can release pages.
_HARMLESS = frozenset((0, 1, 2, 3, *range(10, 24), 25))


class MemoryCalls:
    """The part of a `Kernel` that concerns process memory, and the files of that memory.

    In a forked child the calls are not observed.
    """

    def __init__(self, *, lock: threading.RLock, descriptors: Descriptors, pins: Pins, record: Record) -> None:
        self._lock = lock
        self._linux = LinuxKernel()
        self._descriptors = descriptors
        self._pins = pins
        self._record = record

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """Map memory; the call is real and observed. MAP_FIXED releases the former memory.

        A BAR is memory without side effects.
        """

        def act() -> Vaddr:
            handler = self._descriptors.find(fd)
            if handler is not None:
                if not flags & _MAP_SHARED:
                    refuse(errno.EINVAL)
                bar = device_behind(handler).declared.bars[device_behind(handler).check_mmap(offset, size)]
                if bar.read is not None:
                    self._record.warn(Unmodelled("mmap", "memory, without the registers of the BAR"))
                self._pins.device_memory_is_mapped = True
            return self._linux.mmap(vaddr, size, protection, flags, fd=fd, offset=offset)

        replaces = flags & MAP_FIXED and not flags & _MAP_FIXED_NOREPLACE
        given = (vaddr, size, protection, flags, fd, offset)
        return self._memory_call("mmap", given, act, takes=_READ_WRITE if replaces else 0)

    def mprotect(self, vaddr: int, size: int, protection: int) -> None:
        """Change access rights; the call is real and observed. Mappings that need a removed right lose the memory."""
        self._memory_call(
            "mprotect",
            (vaddr, size, protection),
            lambda: self._linux.mprotect(vaddr, size, protection),
            takes=_READ_WRITE & ~protection,
        )

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """Advise; the call is real and observed. Discarding releases memory."""
        self._memory_call(
            "madvise",
            (vaddr, size, advice),
            lambda: self._linux.madvise(vaddr, size, advice),
            takes=0 if advice in _HARMLESS else _READ_WRITE,
        )

    def munmap(self, vaddr: int, size: int) -> None:
        """Unmap memory; the call is real and observed."""
        self._memory_call("munmap", (vaddr, size), lambda: self._linux.munmap(vaddr, size), takes=_READ_WRITE)

    @uninterrupted()
    def _memory_call(self, call: str, given: tuple[int, ...], action: Callable[[], _Answer], *, takes: int) -> _Answer:
        """Make a call. `takes`: PROT_* bits; mappings that have one of these bits lose the memory."""
        if self._descriptors.in_child:
            return action()
        with self._lock:
            made, number = False, 0

            def act() -> _Answer:
                nonlocal made, number
                made = True
                try:
                    return action()
                except OSError as error:
                    number = error.errno or 0
                    raise

            try:
                return self._record.observed(call, given, act)
            finally:
                if made and takes:
                    # A failed call can have done a part of the work, so the remaining memory is checked. Not so for
                    # madvise with ENOMEM, which continues behind a hole and fails at the end.
                    asked = bool(number) and (call, number) != ("madvise", errno.ENOMEM)
                    self._pins.gone(call, vaddr=given[0], size=given[1], takes=takes, only_lost=asked)

    def mlockall(self, flags: int) -> None:
        """Make the real call."""
        self._record.observed("mlockall", (flags,), lambda: self._linux.mlockall(flags))

    def munlockall(self) -> None:
        """Make the real call."""
        self._record.observed("munlockall", (), self._linux.munlockall)

    def munlock(self, vaddr: int, size: int) -> None:
        """Make the real call."""
        self._record.observed("munlock", (vaddr, size), lambda: self._linux.munlock(vaddr, size))

    def mlocked(self) -> int:
        """Return 0: memory that the process locks is not counted, nor does `memlock` count such memory."""
        return self._record.observed("mlocked", (), lambda: 0)

    def resident(self, vaddr: int, size: int) -> int:
        """Make the real call."""
        return self._record.observed("resident", (vaddr, size), lambda: self._linux.resident(vaddr, size))

    @uninterrupted()
    def memfd_create(self, name: str, flags: int) -> int:
        """Make the real call."""
        if self._descriptors.in_child:
            return self._linux.memfd_create(name, flags)
        with self._lock:
            fd = self._record.observed(
                "memfd_create", (name, flags), lambda: self._linux.memfd_create(name, flags), undo=os.close
            )
            self._descriptors.given_out(fd)
            return fd

    @uninterrupted()
    def dup(self, fd: int) -> int:
        """Duplicate a descriptor, also one of the fake, whose object lives until the last descriptor is closed."""
        if self._descriptors.in_child:
            return self._linux.dup(fd)
        with self._lock:
            handler = self._descriptors.find(fd)
            copy = self._record.observed("dup", (fd,), lambda: self._linux.dup(fd), undo=os.close)
            self._descriptors.given_out(copy)
            if handler is not None:
                self._descriptors.adopt(copy, handler)
            return copy

    def ftruncate(self, fd: int, size: int) -> None:
        """Set the size of a file; the call is real and observed. Mappings of the cut part lose the memory."""
        self._file_call("ftruncate", (fd, size), lambda: self._linux.ftruncate(fd, size), fd=fd, start=size)

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """Allocate or punch a hole; the call is real and observed. A punched hole releases memory."""

        def act() -> None:
            self._linux.fallocate(fd, mode, offset, size)

        end = offset + size if mode & ~FALLOC_FL_KEEP_SIZE else offset
        self._file_call("fallocate", (fd, mode, offset, size), act, fd=fd, start=offset, end=end)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """Allocate by the real call. The trace and planned failures name the call `fallocate`."""

        def act() -> None:
            self._linux.allocate(fd, offset, size)

        self._file_call("fallocate", (fd, 0, offset, size), act, fd=fd, start=offset, end=offset)

    def file_status(self, fd: int) -> FileStatus:
        """Make the real call."""
        return self._record.observed("file_status", (fd,), lambda: self._linux.file_status(fd))

    @uninterrupted()
    def _file_call(
        self, call: str, given: tuple[int, ...], action: Callable[[], None], *, fd: int, start: int, end: int = U64_MAX
    ) -> None:
        """Make a call that releases the pages of a file from `start` to `end`, which devices may reach."""
        if self._descriptors.in_child:
            action()
            return
        with self._lock:
            # Looked up before the call: afterwards, pages behind the new end of the file cannot be found.
            reached = ((each.vaddr, each.vaddr + each.size) for each in self._pins.index)
            areas = list(file_areas(fd, start, end, reached)) if start < end else []
            made = False

            def act() -> None:
                nonlocal made
                action()
                made = True

            try:
                self._record.observed(call, given, act)
            finally:
                for vaddr, size in areas if made else ():
                    self._pins.gone(call, vaddr=vaddr, size=size, takes=_READ_WRITE)
