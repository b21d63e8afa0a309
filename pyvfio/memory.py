"""Process memory that can grow and shrink in place: reserve, activate, deactivate, release.

A `Reservation` holds `max_length` bytes of address space. `[0, length)` can be used; what lies behind cannot be touched
and is not charged. It is private anonymous memory, the kind that the series "Ram blocks with resizable anonymous
allocations under POSIX" (QEMU, 2020, patches 9 to 12 and 15) resizes, with two departures, both seen to matter on
running kernels:

* it grows by mprotect(2), not by a MAP_FIXED mapping: with overcommit_memory=2 a MAP_FIXED mapping that fails with
  ENOMEM has, on 6.1, already taken the reservation away, and a stranger's mmap can land in the hole. A failing mprotect
  leaves everything as it was;
* it shrinks by a fresh PROT_NONE mapping, which gives back the pages and the commit charge (mprotect with MADV_DONTNEED
  gives back the pages only), and whose settings are made again at once.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import mmap
import weakref
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from pyvfio.errors import ClosedError, IoctlError
from pyvfio.kernel import MAP_FIXED, PROT_NONE, Kernel
from pyvfio.units import MIB, PAGE_SIZE, U64_MAX, Vaddr, align_up, format_size, is_aligned

logger = logging.getLogger(__name__)

ALIGNMENT = 2 * MIB
"""Reservations start at a multiple of this, so that transparent huge pages can back them from the first byte
(QEMU_VMALLOC_ALIGN)."""

_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """What madvise(2) is told about all memory of a block, kept through every resize.

    `dontfork`: a child does not inherit the memory (on by default: copy-on-write after a fork would part the process's
    pages from those the device has). `hugepage`: transparent huge pages may back it. `dontdump`: left out of core
    dumps. `mergeable`: KSM may merge it; merging moves pages, so leave it off for memory that a device reaches.
    """

    dontfork: bool = True
    hugepage: bool = True
    dontdump: bool = False
    mergeable: bool = False

    @property
    def advices(self) -> tuple[int, ...]:
        """The madvise advices, in the order of `qemu_ram_apply_settings`."""
        chosen = (
            (self.mergeable, mmap.MADV_MERGEABLE),
            (self.dontdump, mmap.MADV_DONTDUMP),
            (self.hugepage, mmap.MADV_HUGEPAGE),
            (self.dontfork, mmap.MADV_DONTFORK),
        )
        return tuple(advice for wanted, advice in chosen if wanted)


# A kernel built without KSM or without transparent huge pages answers EINVAL; both only save memory or time.
_MAY_BE_MISSING = (mmap.MADV_MERGEABLE, mmap.MADV_HUGEPAGE)


def apply_settings(kernel: Kernel, settings: MemorySettings, *, vaddr: int, size: int) -> None:
    """Make `settings` on `[vaddr, vaddr + size)`. Raises IoctlError; up to four system calls."""
    for advice in settings.advices:
        try:
            kernel.madvise(vaddr, size, advice)
        except OSError as error:
            if error.errno != errno.EINVAL or advice not in _MAY_BE_MISSING:
                raise IoctlError.of(
                    error,
                    "a setting of a block's memory could not be made",
                    request="madvise",
                    arguments={"vaddr": vaddr, "size": size, "advice": advice},
                    hint="The process may have as many mappings as it may (vm.max_map_count)",
                ) from error
            logger.debug("madvise(%#x, %#x, %d): not built into this kernel", vaddr, size, advice)


class Reservation:
    """`max_length` bytes of address space at `vaddr`, of which `[0, length)` can be read and written.

    `vaddr` is a multiple of 2 MiB; one page behind `max_length` stays inaccessible as a guard. New memory reads zero,
    also where it has been used, given up and taken again.

    Raises ValueError for a length that is not a positive multiple of the page size or that no address space can hold,
    IoctlError when there is no address space or the settings cannot be made. Nothing is charged for the
    reservation itself: 1 TiB succeeds with overcommit_memory=2.

    Synchronization: none; the owner serializes calls. Cost: at most three system calls and one per setting.
    Source: `qemu_ram_mmap_resizable`, `qemu_ram_mmap_resize` of the series.
    """

    __slots__ = (
        "_accessible",
        "_held",
        "_kept",
        "_kernel",
        "_length",
        "_settings",
        "_touched",
        "_unsettled",
        "max_length",
        "vaddr",
    )

    def __init__(self, kernel: Kernel, *, max_length: int, settings: MemorySettings | None = None) -> None:
        if max_length <= 0 or not is_aligned(max_length, PAGE_SIZE):
            raise ValueError(f"max_length must be a positive multiple of {PAGE_SIZE} bytes, not {max_length}")
        if max_length + ALIGNMENT > U64_MAX:
            # ctypes would cut it to 64 bits, and the memory of others would be taken for ours.
            raise ValueError(f"max_length {max_length:#x} is more than an address space can hold")
        self._kernel = kernel
        self._settings = settings or MemorySettings()
        self.max_length = max_length
        # Each of these is changed on the safe side of the system call it speaks of, so that a signal handler that
        # raises in between leaves too much zeroing or too many mprotects to do, never too few.
        self._length = 0
        self._accessible = 0  # known to be readable and writable up to here
        self._touched = 0  # old contents may be found up to here; above _length: not given back
        self._held = 0  # a device may still reach up to here, unless the next shrink says otherwise
        self._kept = False  # a device may reach any of it for ever
        self._unsettled: tuple[int, int] | None = None  # [start, end) that has lost its settings
        self.vaddr = self._reserve()

    @property
    def length(self) -> int:
        """Bytes that can be used, from `vaddr` on."""
        return self._length

    @property
    def settings(self) -> MemorySettings:
        """What holds for all of this memory."""
        return self._settings

    @property
    def retained(self) -> int:
        """Bytes behind `length` that a failed shrink could not give back; they are zeroed before they are seen."""
        return self._touched - self._length

    @property
    def held(self) -> int:
        """Bytes that a device may still reach, from `vaddr` on, since what should have unmapped them has failed."""
        return self._held

    def _reserve(self) -> Vaddr:
        size = self.max_length + PAGE_SIZE
        try:
            whole = self._kernel.mmap(0, size + ALIGNMENT - PAGE_SIZE, PROT_NONE, _ANONYMOUS)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"{format_size(self.max_length)} of address space could not be reserved",
                request="mmap",
                arguments={"size": size},
                hint="Choose a smaller max_length, or raise RLIMIT_AS (ulimit -v); a process has 128 TiB at most",
            ) from error
        end = whole + size + ALIGNMENT - PAGE_SIZE
        vaddr = Vaddr(align_up(whole, ALIGNMENT))
        head, body, tail = (whole, vaddr), (vaddr, vaddr + size), (vaddr + size, end)
        ours = [head, body, tail]
        try:
            for piece in (head, tail):
                self._trim(ours, piece)
            apply_settings(self._kernel, self._settings, vaddr=vaddr, size=size)
        except BaseException:
            for start, stop in ours:
                if start < stop:
                    self._kernel.munmap(start, stop - start)
            raise
        return vaddr

    def _trim(self, ours: list[tuple[int, int]], piece: tuple[int, int]) -> None:
        start, end = piece
        if start == end:
            return
        ours.remove(piece)  # first: another thread may have memory there as soon as it is unmapped
        try:
            self._kernel.munmap(start, end - start)
        except OSError:
            ours.append(piece)
            raise

    def activate(self, length: int) -> None:
        """Make `[0, length)` usable; `length` is above the present one and at most `max_length`.

        Raises IoctlError (ENOMEM: the commit limit, RLIMIT_DATA or RLIMIT_AS is reached); then nothing has changed,
        /proc/self/maps included.
        """
        if self.vaddr == 0:
            raise self._released()
        if not self._length < length <= self.max_length:
            raise ValueError(f"cannot activate {length:#x} bytes: {self._length:#x} are, of {self.max_length:#x}")
        stale = self._touched
        self._open_up(length)
        if self._length < stale:
            self._zero(self._length, min(length, stale))
        self._length = length

    def _open_up(self, length: int) -> None:
        start, touched = self._accessible, self._touched
        if start >= length:  # a grow to there was interrupted after it had come this far
            return
        if self._unsettled is not None:
            self._settle(length)
        try:
            self._touched = max(touched, length)
            self._kernel.mprotect(self.vaddr + start, length - start, _READ_WRITE)
        except OSError as error:
            self._touched = touched
            raise IoctlError.of(
                error,
                f"{format_size(length - start)} more memory could not be had",
                request="mprotect",
                arguments={"vaddr": self.vaddr + start, "size": length - start},
                hint="Free memory, raise the commit limit (vm.overcommit_ratio, vm.overcommit_kbytes) where "
                "vm.overcommit_memory is 2, or raise RLIMIT_DATA and RLIMIT_AS",
            ) from error
        self._accessible = length

    def deactivate(self, length: int) -> None:
        """Give back everything from `length` on; `length` is below the present one.

        That says, too, that no device reaches behind `length` any more. Raises OSError when the memory could not be
        given back (the limit of mappings, vm.max_map_count); `length` has changed all the same, and the memory stays
        `retained`.
        """
        self._check_open()
        if not 0 <= length < self._length:
            raise ValueError(f"cannot deactivate down to {length:#x} bytes: {self._length:#x} are active")
        end = self._touched
        self._length = self._accessible = length
        if self._kept:
            return
        self._held = min(self._held, length)
        start, stop = self._unsettled or (length, end)
        self._unsettled = (min(start, length), max(stop, end))
        self._kernel.mmap(self.vaddr + length, end - length, PROT_NONE, _ANONYMOUS | MAP_FIXED)
        self._touched = length
        try:
            self._settle(self.max_length)
        except OSError as error:
            # Nothing depends on it before the memory is activated again, which then tries once more.
            logger.debug("settings of %#x wait until it is activated: %s", self.vaddr + length, error)

    def drop(self, start: int, end: int) -> None:
        """Give the pages of `[start, end)`, which is active, back; it stays accessible and reads zeros. Raises OSError
        when they could not be given back; they are zeros all the same."""
        self._check_open()
        if not 0 <= start < end <= self._length:
            raise ValueError(f"cannot drop [{start:#x}, {end:#x}): {self._length:#x} bytes are active")
        if failure := self._zero(start, end):
            raise failure

    def retain(self, length: int) -> None:
        """Say that only `[0, length)` is in use, and give nothing back: a device may still reach what lies behind,
        until `deactivate` says otherwise."""
        self._check_open()
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot retain from {length:#x} on: {self._length:#x} bytes are active")
        self._held = self._touched
        self._length = self._accessible = length

    def keep(self) -> None:
        """Never give anything back from now on, not by `release` either: a device may reach any of it for ever."""
        self._kept = True
        self._held = self.max_length

    def _settle(self, length: int) -> None:
        if self._unsettled is None or self._unsettled[0] >= length:
            return
        start, end = self._unsettled
        apply_settings(self._kernel, self._settings, vaddr=self.vaddr + start, size=end - start)
        self._unsettled = None

    def _zero(self, start: int, end: int) -> OSError | None:
        """What kept the pages from being dropped."""
        # Pages that a device may reach must stay the ones that this process has; they are written, not dropped.
        failure = OSError(errno.EBUSY, "a device may still reach it")
        if start >= self._held:
            try:
                self._kernel.madvise(self.vaddr + start, end - start, mmap.MADV_DONTNEED)
            except OSError as error:
                # Locked memory cannot be dropped (EINVAL); it can be written.
                logger.debug("%#x is written with zeros: %s", self.vaddr + start, error)
                failure = error
            else:
                return None
        ctypes.memset(self.vaddr + start, 0, end - start)
        return failure

    def release(self) -> None:
        """Give the address space back, guard page included; twice is fine. Raises OSError, and then still holds it."""
        if self.vaddr == 0 or self._kept:
            return
        # First: once it is unmapped it may be another's, and must not be unmapped again.
        vaddr = Vaddr(self.vaddr)
        self.vaddr = Vaddr(0)
        try:
            self._kernel.munmap(vaddr, self.max_length + PAGE_SIZE)
        except OSError:
            self.vaddr = vaddr
            raise
        self._length = self._accessible = self._touched = self._held = 0

    def _check_open(self) -> None:
        if self.vaddr == 0:
            raise self._released()

    @staticmethod
    def _released() -> ClosedError:
        return ClosedError("this memory has been released")

    def _check(self) -> None:
        assert is_aligned(self.vaddr, ALIGNMENT)
        if not self.vaddr:
            return
        assert 0 <= self._length <= self._accessible <= self._touched <= self.max_length
        reached = int(self.vaddr)
        for start, end, permissions in _maps(self.vaddr, self.max_length + PAGE_SIZE):
            first = max(start, self.vaddr)  # it merges with what lies before and is alike
            assert first == reached, hex(reached)
            reached = end
            # Between the two stands what a shrink could not give back, or a grow was interrupted in.
            assert permissions == "rw-p" or first >= self.vaddr + self._accessible, (hex(start), permissions)
            assert permissions == "---p" or end <= self.vaddr + self._touched, (hex(end), permissions)
        assert reached >= self.vaddr + self.max_length + PAGE_SIZE, hex(reached)


def _maps(vaddr: int, size: int) -> list[tuple[int, int, str]]:
    """The lines of /proc/self/maps that lie in `[vaddr, vaddr + size)`: start, end, permissions."""
    found = []
    # As bytes: a path may hold a carriage return, which the kernel does not escape and Python takes for a line's end.
    lines = Path("/proc/self/maps").read_bytes().split(b"\n")[:-1]
    # They ascend, and a large process has thousands: search, and read those few that matter.
    first = bisect_right(lines, vaddr, key=lambda line: _span(line)[1])
    for line in itertools.islice(lines, first, None):
        start, end = _span(line)
        if start >= vaddr + size:
            break
        found.append((start, end, line.split(maxsplit=2)[1].decode("ascii")))
    return found


def _span(line: bytes) -> tuple[int, int]:
    start, end = line.split(b" ", 1)[0].split(b"-")
    return int(start, 16), int(end, 16)


def describe(vaddr: int, size: int) -> str:
    """What this process has at `[vaddr, vaddr + size)`, in words, for error messages; about 1 ms."""
    found = _maps(vaddr, size)
    covered = sum(min(end, vaddr + size) - max(start, vaddr) for start, end, _ in found)
    spans = ", ".join(f"{start:#x}-{end - 1:#x} {permissions}" for start, end, permissions in found[:4])
    if not found:
        return f"This process has nothing mapped at {vaddr:#x}-{vaddr + size - 1:#x}"
    hole = "" if covered == size else f"; {size - covered:#x} bytes of it are not mapped at all"
    return f"This process has there: {spans}{hole}"


class Exports:
    """The memoryviews that have been given out of one piece of memory and are still alive.

    CPython tells an object that implements the buffer protocol in Python when a view goes only from 3.12 on. A ctypes
    array works everywhere: every view made of it, and every view of a view, holds a reference to it, so a weak
    reference to the array dies with the last of them.

    Synchronization: none; the owner serializes calls. Cost: O(live views) a call.
    """

    __slots__ = ("_exports",)

    def __init__(self) -> None:
        self._exports: list[weakref.ref[ctypes.Array[ctypes.c_ubyte]]] = []

    def view(self, vaddr: int, size: int) -> memoryview:
        """A writable memoryview of bytes. The memory must stay mapped while `end()` is above it."""
        if size == 0:
            return memoryview(bytearray())
        array = (ctypes.c_ubyte * size).from_address(vaddr)
        self._exports = [reference for reference in self._exports if reference() is not None]
        self._exports.append(weakref.ref(array))
        return memoryview(array).cast("B")

    def end(self) -> int:
        """The highest address, exclusive, that a live view reaches; 0 when there is none."""
        if not self._exports:
            return 0
        arrays = (reference() for reference in self._exports)
        return max((ctypes.addressof(array) + len(array) for array in arrays if array is not None), default=0)
