"""Calls on the memory of this process: the real ones, but seen, for devices may reach what they take away."""

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
# MADV_NORMAL to _WILLNEED, _DONTFORK to _POPULATE_WRITE, _COLLAPSE: whatever else there is takes pages away.
_HARMLESS = frozenset((0, 1, 2, 3, *range(10, 24), 25))


class MemoryCalls:
    """The part of a `Kernel` that is about process memory, and about the files that it is made of.

    In a forked child they are the real ones and no more.
    """

    def __init__(self, *, lock: threading.RLock, descriptors: Descriptors, pins: Pins, record: Record) -> None:
        self._lock = lock
        self._linux = LinuxKernel()
        self._descriptors = descriptors
        self._pins = pins
        self._record = record

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """The real one, seen: with MAP_FIXED it takes away what is there. A BAR is memory without side effects."""

        def act() -> Vaddr:
            handler = self._descriptors.find(fd)
            if handler is not None:
                if not flags & _MAP_SHARED:
                    refuse(errno.EINVAL)
                bar = device_behind(handler).declared.bars[device_behind(handler).check_mmap(offset, size)]
                if bar.read is not None:
                    self._record.warn(Unmodelled("mmap", "a BAR's memory, without the registers that are in it"))
                self._pins.device_memory_is_mapped = True
            return self._linux.mmap(vaddr, size, protection, flags, fd=fd, offset=offset)

        replaces = flags & MAP_FIXED and not flags & _MAP_FIXED_NOREPLACE
        given = (vaddr, size, protection, flags, fd, offset)
        return self._memory_call("mmap", given, act, takes=_READ_WRITE if replaces else 0)

    def mprotect(self, vaddr: int, size: int, protection: int) -> None:
        """The real one, seen: it takes away memory whose rights a mapping has and it no longer."""
        self._memory_call(
            "mprotect",
            (vaddr, size, protection),
            lambda: self._linux.mprotect(vaddr, size, protection),
            takes=_READ_WRITE & ~protection,
        )

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """The real one, seen: discarding takes memory away."""
        self._memory_call(
            "madvise",
            (vaddr, size, advice),
            lambda: self._linux.madvise(vaddr, size, advice),
            takes=0 if advice in _HARMLESS else _READ_WRITE,
        )

    def munmap(self, vaddr: int, size: int) -> None:
        """The real one, seen."""
        self._memory_call("munmap", (vaddr, size), lambda: self._linux.munmap(vaddr, size), takes=_READ_WRITE)

    @uninterrupted()
    def _memory_call(self, call: str, given: tuple[int, ...], action: Callable[[], _Answer], *, takes: int) -> _Answer:
        """`takes`: PROT_* bits; mappings that have one of them lose the memory."""
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
                    # A call that fails may have come half way: what is left of the memory tells, but for madvise, which
                    # goes on behind a hole and says ENOMEM at the end.
                    asked = bool(number) and (call, number) != ("madvise", errno.ENOMEM)
                    self._pins.gone(call, vaddr=given[0], size=given[1], takes=takes, only_lost=asked)

    def mlockall(self, flags: int) -> None:
        """The real one."""
        self._record.observed("mlockall", (flags,), lambda: self._linux.mlockall(flags))

    def munlockall(self) -> None:
        """The real one."""
        self._record.observed("munlockall", (), self._linux.munlockall)

    def munlock(self, vaddr: int, size: int) -> None:
        """The real one."""
        self._record.observed("munlock", (vaddr, size), lambda: self._linux.munlock(vaddr, size))

    def mlocked(self) -> int:
        """0: what the process locks is not counted here, by `memlock` either."""
        return self._record.observed("mlocked", (), lambda: 0)

    def resident(self, vaddr: int, size: int) -> int:
        """The real one."""
        return self._record.observed("resident", (vaddr, size), lambda: self._linux.resident(vaddr, size))

    @uninterrupted()
    def memfd_create(self, name: str, flags: int) -> int:
        """The real one."""
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
        """The real one, also of the fake's own descriptors: an object of the kernel's goes with the last descriptor."""
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
        """The real one, seen: what is cut off is taken from whoever has it mapped."""
        self._file_call("ftruncate", (fd, size), lambda: self._linux.ftruncate(fd, size), fd=fd, start=size)

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """The real one, seen: a hole that is punched takes memory away."""

        def act() -> None:
            self._linux.fallocate(fd, mode, offset, size)

        end = offset + size if mode & ~FALLOC_FL_KEEP_SIZE else offset
        self._file_call("fallocate", (fd, mode, offset, size), act, fd=fd, start=offset, end=end)

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """The real one; in the trace, and where it is to fail, it is a `fallocate`."""

        def act() -> None:
            self._linux.allocate(fd, offset, size)

        self._file_call("fallocate", (fd, 0, offset, size), act, fd=fd, start=offset, end=offset)

    def file_status(self, fd: int) -> FileStatus:
        """The real one."""
        return self._record.observed("file_status", (fd,), lambda: self._linux.file_status(fd))

    @uninterrupted()
    def _file_call(
        self, call: str, given: tuple[int, ...], action: Callable[[], None], *, fd: int, start: int, end: int = U64_MAX
    ) -> None:
        """The pages of a file from `start` to `end` go, and what devices reach of them with them."""
        if self._descriptors.in_child:
            action()
            return
        with self._lock:
            # Before, for what is behind the new end of a file has no pages to be found by.
            areas = list(file_areas(fd, start, end)) if start < end and self._pins.used else []
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
