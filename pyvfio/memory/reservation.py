"""Address space of which a part is memory: reserved as a whole, activated and given back at its end.

A `Reservation` holds `max_length` bytes of address space. `[0, length)` can be used; what lies behind cannot be touched
and is not charged. What the memory is, `pyvfio.memory.kinds` knows. It is what the series "Ram blocks with resizable
anonymous allocations under POSIX" (QEMU, 2020, patches 9 to 12 and 15) resizes, with two departures, both seen to
matter on running kernels:

* it grows by mprotect(2), not by a MAP_FIXED mapping: with overcommit_memory=2 a MAP_FIXED mapping that fails with
  ENOMEM has, on 6.1, already taken the reservation away, and a stranger's mmap can land in the hole. A failing mprotect
  leaves everything as it was;
* it shrinks by a fresh PROT_NONE mapping, which gives back the pages and the commit charge (mprotect with MADV_DONTNEED
  gives back the pages only), and whose settings are made again at once.
"""

from __future__ import annotations

import ctypes
import errno
import logging

from pyvfio.errors import ClosedError, IoctlError
from pyvfio.kernel import MAP_FIXED, PROT_NONE, Kernel
from pyvfio.memory import locking
from pyvfio.memory.kinds import Anonymous, Charged, MemoryKind, Received, make_store
from pyvfio.memory.maps import areas
from pyvfio.memory.settings import MemorySettings, apply_settings
from pyvfio.units import MIB, PAGE_SIZE, U64_MAX, Vaddr, align_up, format_size, is_aligned

logger = logging.getLogger(__name__)

ALIGNMENT = 2 * MIB
"""Reservations start at a multiple of this, so that transparent huge pages can back them from the first byte
(QEMU_VMALLOC_ALIGN)."""

_PRIVATE = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
# Where it is no want of memory.
_HINTS = dict.fromkeys(
    (errno.EPERM, errno.EACCES),
    "The file may have been sealed meanwhile, or its file system does not let it be written or made longer",
) | {
    errno.EFBIG: "The file would be longer than its file system or RLIMIT_FSIZE (ulimit -f) lets it be",
    errno.EAGAIN: "All memory of this process is locked (mlockall): raise RLIMIT_MEMLOCK (ulimit -l)",
    errno.EROFS: "The file system is mounted for reading only",
    errno.EFAULT: "The file must stay as long as the block may become",
}


class Reservation:
    """`max_length` bytes of address space at `vaddr`, of which `[0, length)` can be used, as `kind` has it.

    `vaddr` is a multiple of 2 MiB, or of its huge pages; one page behind `max_length` stays inaccessible as a guard,
    unless `activate_whole` needs it.
    New memory reads zero, also where it has been used, given up and taken again; that of a caller's file reads what the
    file holds. `idstr` names a memfd.

    Raises ValueError for a length that is not a positive multiple of the page size or that no address space can hold,
    IoctlError when there is no address space or the settings cannot be made. Nothing is charged for the
    reservation itself: 1 TiB succeeds with overcommit_memory=2.

    Synchronization: none; the owner serializes calls. Cost: at most three system calls and one per setting.
    Source: `qemu_ram_mmap_resizable`, `qemu_ram_mmap_resize` of the series.
    """

    __slots__ = (
        "_guarded",
        "_kept",
        "_kernel",
        "_length",
        "_settings",
        "_store",
        "_touched",
        "_unsettled",
        "held",
        "kind",
        "max_length",
        "vaddr",
    )

    def __init__(
        self,
        kernel: Kernel,
        *,
        max_length: int,
        settings: MemorySettings | None = None,
        kind: MemoryKind | None = None,
        idstr: str = "",
    ) -> None:
        if max_length <= 0 or not is_aligned(max_length, PAGE_SIZE):
            raise ValueError(f"max_length must be a positive multiple of {PAGE_SIZE} bytes, not {max_length}")
        if max_length + ALIGNMENT > U64_MAX:
            # ctypes would cut it to 64 bits, and the memory of others would be taken for ours.
            raise ValueError(f"max_length {max_length:#x} is more than an address space can hold")
        self._kernel = kernel
        self._settings = MemorySettings() if settings is None else settings
        self.max_length = max_length
        self._length = 0
        self._touched = 0  # old contents may be found up to here; above _length: not given back
        self.held = 0
        """Bytes that a device may still reach, from `vaddr` on, since what should have unmapped them has failed."""
        self._kept = False  # a device may reach any of it for ever
        self._guarded = True  # the page behind max_length is inaccessible
        self._unsettled: tuple[int, int] | None = None  # [start, end) that has lost its settings
        chosen = Anonymous() if kind is None else kind
        self.kind: MemoryKind = chosen.memory if isinstance(chosen, Received) else chosen
        """Where its pages come from, as the caller chose it."""
        self._store = make_store(kernel, chosen, idstr=idstr, max_length=max_length)
        try:
            self.vaddr = self._reserve()
        except BaseException:
            self._store.close()
            raise

    @property
    def length(self) -> int:
        """Bytes that can be used, from `vaddr` on."""
        return self._length

    @property
    def settings(self) -> MemorySettings:
        """What holds for all of this memory."""
        return self._settings

    @property
    def page_size(self) -> int:
        """What lengths are multiples of, in bytes."""
        return self._store.page_size

    @property
    def readable_only(self) -> bool:
        """Whether it cannot be written."""
        return not self._store.protection & 2

    @property
    def can_drop(self) -> bool:
        """Whether parts can be given back while they stay accessible."""
        return self._store.can_drop

    @property
    def charged(self) -> Charged:
        """When its pages are charged to this process's control group, to stay there until they are swapped out."""
        return self._store.charged

    @property
    def warnings(self) -> tuple[Warning, ...]:
        """What whoever chose this kind of memory should know."""
        return tuple(self._store.warnings)

    @property
    def file(self) -> tuple[int, int] | None:
        """The descriptor and the offset in it that the memory begins at; None for memory that is no file's."""
        return None if self._store.fd < 0 else (self._store.fd, self._store.offset)

    @property
    def retained(self) -> int:
        """Bytes behind `length` that a failed shrink could not give back; they are zeroed before they are seen."""
        return self._touched - self._length

    def _reserve(self) -> Vaddr:
        size = self.max_length + PAGE_SIZE
        if self.max_length % self._store.page_size:
            raise ValueError(f"max_length {self.max_length:#x} must be a multiple of {self._store.page_size:#x}")
        alignment = max(ALIGNMENT, self._store.page_size)
        flags = _PRIVATE if self._store.fd >= 0 else self._store.flags
        try:
            whole = self._kernel.mmap(0, size + alignment - PAGE_SIZE, PROT_NONE, flags)
        except OSError as error:
            raise self._no_space(error, size + alignment - PAGE_SIZE, {"size": size}) from error
        end = whole + size + alignment - PAGE_SIZE
        vaddr = Vaddr(align_up(whole, alignment))
        start = whole
        try:
            self._trim(whole, vaddr)
            start = vaddr
            self._trim(vaddr + size, end)
            end = vaddr + size
            if self._store.fd >= 0:
                self._map_file(vaddr)
            apply_settings(self._kernel, self._settings, vaddr=vaddr, size=size)
        except BaseException:
            self._abort(start, end)
            raise
        return vaddr

    def _abort(self, start: int, end: int) -> None:
        """Give the address space back, unless a fixed mapping that failed has taken a part of it away: another thread
        may have memory there."""
        reached = start
        for first, last, permissions in areas(start, end - start):
            if first > reached or permissions[:3] != "---":
                break
            reached = last
        if reached < end:
            return
        try:
            self._kernel.munmap(start, end - start)
        except OSError as error:
            logger.warning("address space %#x-%#x could not be given back: %s", start, end - 1, error)

    def _no_space(
        self, error: OSError, asked: int, arguments: dict[str, int | str], *, request: str = "mmap"
    ) -> IoctlError:
        what = f"{format_size(self.max_length)} of address space could not be reserved"
        if error.errno == errno.EAGAIN:
            lock = self._kernel.memlock()
            if not locking.suffices(lock, asked):
                why = f"{what}: mlockall holds what is to come, and locks address space, too. "
                return locking.limit_error(
                    error, lock, asked, kernel=self._kernel, request=request, arguments=arguments, why=why
                )
        hint = "Choose a smaller max_length, or raise RLIMIT_AS (ulimit -v); a process has 128 TiB at most"
        return IoctlError.of(error, what, request=request, arguments=arguments, hint=hint)

    def _trim(self, start: int, end: int) -> None:
        if start == end:
            return
        try:
            self._kernel.munmap(start, end - start)
        except OSError as error:
            raise self._no_space(error, end - start, {"vaddr": start, "size": end - start}, request="munmap") from error

    def _map_file(self, vaddr: int) -> None:
        try:
            self._map_inaccessible(vaddr, 0, self.max_length)
        except OSError as error:
            raise IoctlError.of(
                error,
                f"descriptor {self._store.fd} could not be mapped",
                request="mmap",
                arguments={"vaddr": vaddr, "size": self.max_length, "offset": self._store.offset},
                hint="It must be of a file that can be mapped; one that is sealed against writing, kernels before 6.7 "
                "map only where it is open for reading only",
            ) from error

    def _map_inaccessible(self, vaddr: int, start: int, end: int) -> None:
        try:
            self._map_fixed(vaddr, start, end)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            # All that is to come is locked, and the new mapping is held against RLIMIT_MEMLOCK while the old one still
            # counts (`do_mmap`). It is locked again with the new one.
            self._kernel.munlock(vaddr + start, end - start)
            self._map_fixed(vaddr, start, end)

    def _map_fixed(self, vaddr: int, start: int, end: int) -> None:
        store = self._store
        self._kernel.mmap(
            vaddr + start, end - start, PROT_NONE, store.flags | MAP_FIXED, fd=store.fd, offset=store.offset + start
        )

    def activate(self, length: int) -> None:
        """Make `[0, length)` usable; `length` is above the present one and at most `max_length`.

        Raises IoctlError (ENOMEM: the commit limit, RLIMIT_DATA or RLIMIT_AS is reached); then nothing has changed,
        /proc/self/maps included.
        """
        if self.vaddr == 0:
            raise self._released()
        if not self._length < length <= self.max_length:
            raise ValueError(f"cannot activate {length:#x} bytes: {self._length:#x} are, of {self.max_length:#x}")
        start, stale = self._length, self._touched
        if self._unsettled is not None:
            self._settle(length)
        store, step = self._store, "fallocate"
        try:
            store.provide(start, length)
            step = "mprotect"
            self._kernel.mprotect(self.vaddr + start, length - start, store.protection)
        except OSError as error:
            self._unprovide(length)
            raise self._no_memory(error, step, start, length) from error
        if stale < length:
            self._touched = length
        if start < stale and not store.holds_contents:
            self._clear(start, min(length, stale))
        self._length = length

    def resume(self, length: int) -> None:
        """Make `[0, length)` usable, whose pages are in the file already as another process has left them. Raises
        IoctlError."""
        if length:
            try:
                self._kernel.mprotect(self.vaddr, length, self._store.protection)
            except OSError as error:
                raise self._no_memory(error, "mprotect", 0, length) from error
        self._touched = self._length = length

    def own(self) -> None:
        """Close the descriptor with it."""
        self._store.owned = True

    def disown(self) -> None:
        """Leave the descriptor open, which is somebody else's."""
        self._store.owned = False

    def activate_whole(self, provided: int) -> None:
        """Make all of `max_length` usable where nothing is yet, with pages at least up to `provided`.

        It succeeds where `activate` does not because the process has as many mappings as it may (vm.max_map_count): a
        part that gets other rights is a mapping more. The guard page gets them, too, where it is of the same mapping,
        and guards no more. Raises IoctlError as `activate`.
        """
        self._check_open()
        if self._length:
            raise ValueError(f"{self._length:#x} bytes are active already")
        anonymous = self._store.fd < 0
        try:
            self._store.extend(self.max_length)
            self._store.provide(0, provided)
            self._kernel.mprotect(self.vaddr, self.max_length + (PAGE_SIZE if anonymous else 0), self._store.protection)
        except OSError as error:
            self._unprovide(self.max_length)
            raise self._no_memory(error, "mprotect", 0, self.max_length) from error
        self._guarded = not anonymous
        self._length = self._touched = self.max_length

    def provide(self, start: int, end: int) -> None:
        """Have pages behind `[start, end)` where the kind of memory lets that be asked for. Raises IoctlError."""
        try:
            self._store.provide(start, end)
        except OSError as error:
            raise self._no_memory(error, "fallocate", start, end) from error

    def _unprovide(self, length: int) -> None:
        """Give back the pages that a failed grow has provided, but for those that were retained before."""
        if self._touched < length and self._store.fd >= 0 and self._store.is_own:
            try:
                self._store.give_back(self._touched, length)
            except OSError as error:
                logger.debug("%#x keeps pages of a grow that failed: %s", self.vaddr, error)
                self._touched = length  # so that they are zeroed before they are seen

    def _no_memory(self, error: OSError, request: str, start: int, end: int) -> IoctlError:
        number = error.errno or 0
        hint = _HINTS.get(number) or (
            "Free memory, raise the commit limit (vm.overcommit_ratio, vm.overcommit_kbytes) where "
            "vm.overcommit_memory is 2, raise RLIMIT_DATA and RLIMIT_AS, or, for a process of very many mappings, "
            "vm.max_map_count"
        )
        if self._store.page_size > PAGE_SIZE and number not in _HINTS:
            pages = format_size(self._store.page_size)
            hint = (
                f"The pool of huge pages of {pages} may be too small (vm.nr_hugepages), or the hugetlb cgroup's limit"
            )
        return IoctlError.of(
            error,
            f"{format_size(end - start)} more memory could not be had: {error.strerror}",
            request=request,
            arguments={"vaddr": self.vaddr + start, "size": end - start},
            hint=hint,
        )

    def deactivate(self, length: int, *, undo: bool = False) -> None:
        """Give back everything from `length` on; `length` is below the present one. `undo`: it came into use by a
        change that was refused, so that what a caller's file holds there is not ours to punch.

        That says, too, that no device reaches behind `length` any more. Raises OSError when the memory could not be
        given back (the limit of mappings, vm.max_map_count); `length` has changed all the same, and the memory stays
        `retained`.
        """
        self._check_open()
        if not 0 <= length < self._length:
            raise ValueError(f"cannot deactivate down to {length:#x} bytes: {self._length:#x} are active")
        end = self._touched
        self._length = length
        if self._kept:
            return
        self.held = min(self.held, length)
        start, stop = self._unsettled or (length, end)
        self._unsettled = (min(start, length), max(stop, end))
        self._map_inaccessible(self.vaddr, length, end)
        if self._store.fd < 0:
            self._touched = length
        try:
            self._settle(self.max_length)
        except OSError as error:
            # Nothing depends on it before the memory is activated again, which then tries once more.
            logger.debug("settings of %#x wait until it is activated: %s", self.vaddr + length, error)
        if self._store.fd >= 0:
            if self._store.is_own or not undo:
                self._store.give_back(length, end)
            self._touched = length

    def drop(self, start: int, end: int) -> None:
        """Give the pages of `[start, end)`, which is active, back; it stays accessible and reads zeros. Raises OSError
        when they could not be given back; they are zeros all the same."""
        self._check_open()
        if not 0 <= start < end <= self._length:
            raise ValueError(f"cannot drop [{start:#x}, {end:#x}): {self._length:#x} bytes are active")
        if failure := self._zero(start, end):
            raise failure

    def clear(self, start: int, end: int) -> None:
        """Let `[start, end)`, which is active, read zeros, unless it is a file's whose contents it shows."""
        if not 0 <= start < end <= self._length:
            raise ValueError(f"cannot clear [{start:#x}, {end:#x}): {self._length:#x} bytes are active")
        if not self._store.holds_contents:
            ctypes.memset(self.vaddr + start, 0, end - start)

    def replace(self, start: int, end: int, *, provide: bool) -> None:
        """Have other pages behind `[start, end)`, which is active and which no device reaches: fresh ones that read
        zeros, or what a file holds. Settings stay. `provide`: at once, where that can be asked for; else when they are
        touched. Raises IoctlError; what stands there then may be either.

        Cost: up to three system calls.
        """
        self._check_open()
        if not 0 <= start < end <= self._length:
            raise ValueError(f"cannot replace [{start:#x}, {end:#x}): {self._length:#x} bytes are active")
        if self._kept:
            raise self._not_replaced(OSError(errno.EBUSY, "a device may still reach the present ones"), start, end)
        try:
            self._store.replace(self.vaddr, start, end)
            if provide and self._store.can_drop:
                self._store.provide(start, end)
        except OSError as error:
            raise self._not_replaced(error, start, end) from error

    def _not_replaced(self, error: OSError, start: int, end: int) -> IoctlError:
        hint = _HINTS.get(
            error.errno or 0, "Free memory, or huge pages where it is made of them, and remap it once more"
        )
        if self._kept:
            hint = (
                "Use another block: a change failed, and so did its undo, and nobody knows what is reached of this one"
            )
        elif not self._store.can_drop:
            hint = "The pages are a file's that is not to be punched; let that be with memory=File(fd, punch=True)"
        return IoctlError.of(
            error,
            f"other pages for {format_size(end - start)} could not be had: {error.strerror}",
            request="madvise" if self._store.fd < 0 or not self._store.can_drop else "fallocate",
            arguments={"vaddr": self.vaddr + start, "size": end - start},
            hint=hint,
        )

    def retain(self, length: int) -> None:
        """Say that only `[0, length)` is in use, and give nothing back: a device may still reach what lies behind,
        until `deactivate` says otherwise."""
        self._check_open()
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot retain from {length:#x} on: {self._length:#x} bytes are active")
        self.held = self._touched
        self._length = length

    def let_go(self) -> None:
        """Say that no device reaches more of it than it was told of, whatever an earlier failure had left."""
        if not self._kept:
            self.held = 0

    def keep(self) -> None:
        """Never give anything back from now on, not by `release` either: a device may reach any of it for ever."""
        self._kept = True
        self.held = self.max_length

    def _settle(self, length: int) -> None:
        if self._unsettled is None or self._unsettled[0] >= length:
            return
        start, end = self._unsettled
        apply_settings(self._kernel, self._settings, vaddr=self.vaddr + start, size=end - start)
        self._unsettled = None

    def _clear(self, start: int, end: int) -> None:
        """Let stale contents read zeros. Pages of a file have been provided, and a hole would lose them."""
        if self._store.fd < 0:
            self._zero(start, end)
        else:
            ctypes.memset(self.vaddr + start, 0, end - start)

    def _zero(self, start: int, end: int) -> OSError | None:
        """What kept the pages from being dropped."""
        # Pages that a device may reach must stay the ones that this process has; they are written, not dropped.
        failure = OSError(errno.EBUSY, "a device may still reach it")
        if start >= self.held:
            try:
                self._store.drop(self.vaddr, start, end)
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
        if self._kept:
            self._store.close()  # its memory stays for as long as it is mapped
        if self.vaddr == 0 or self._kept:
            return
        self._kernel.munmap(self.vaddr, self.max_length + PAGE_SIZE)
        self.vaddr = Vaddr(0)
        self._length = self._touched = self.held = 0
        self._store.close()

    def abandon(self) -> None:
        """Nobody will use it any more, and its memory stays where it is: only what was opened for it is closed."""
        self._store.close()

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
        assert 0 <= self._length <= self._touched <= self.max_length
        assert self._guarded or self._touched == self.max_length
        reached = int(self.vaddr)
        shared = "s" if self._store.flags & 1 else "p"
        usable = ("rw" if self._store.protection & 2 else "r-") + "-" + shared
        for start, end, permissions in areas(self.vaddr, self.max_length + PAGE_SIZE):
            first = max(start, self.vaddr)  # it merges with what lies before and is alike
            assert first == reached, hex(reached)
            reached = end
            # Between the two is memory that a shrink could not give back.
            assert permissions == usable or first >= self.vaddr + self._length, (hex(start), permissions)
            inside = end <= self.vaddr + self._touched or not self._guarded
            assert permissions[:3] == "---" or inside, (hex(end), permissions)
        assert reached >= self.vaddr + self.max_length + PAGE_SIZE, hex(reached)
