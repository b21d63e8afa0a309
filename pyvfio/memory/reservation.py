"""Address space of which a part is memory: reserved as a whole, activated and released at its end.

A `Reservation` holds `max_length` bytes of address space. `[0, length)` is usable; the rest is inaccessible and not
charged. `pyvfio.memory.kinds` defines the memory. The series "Ram blocks with resizable anonymous allocations under
POSIX" (QEMU, 2020, patches 9 to 12 and 15) resizes such address space. There are two differences, each needed on a
running kernel:

* A reservation grows by mprotect(2), not by a MAP_FIXED mapping. With overcommit_memory=2, a MAP_FIXED mapping that
  fails with ENOMEM has already removed the reservation (seen on 6.1). An mmap of another thread can then use the hole.
  An mprotect that fails leaves everything as before.
* A reservation shrinks by a new PROT_NONE mapping, which releases the pages and the commit charge; mprotect with
  MADV_DONTNEED releases the pages only. The settings of the new mapping are applied again at once.
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
"""Reservations begin at a multiple of this size, so that transparent huge pages can back them from the first byte
(QEMU_VMALLOC_ALIGN)."""

_SETTINGS = MemorySettings()
_PRIVATE = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
# Hints for errors other than out-of-memory.
_HINTS = dict.fromkeys(
    (errno.EPERM, errno.EACCES),
    "The file may have been sealed meanwhile, or its file system does not allow writing or extending the file",
) | {
    errno.EFBIG: "The file would exceed the largest size of its file system, or RLIMIT_FSIZE (ulimit -f)",
    errno.EAGAIN: "All memory of this process is locked (mlockall): raise RLIMIT_MEMLOCK (ulimit -l)",
    errno.EROFS: "The file system is mounted read-only",
    errno.EFAULT: "The file must stay as long as offset + max_length",
}


class Reservation:
    """`max_length` bytes of address space at `vaddr`, of which `[0, length)` is usable memory of the kind `kind`.

    `vaddr` is a multiple of 2 MiB and of the kind's huge pages. One page behind `max_length` stays inaccessible as a
    guard, unless `activate_whole` needs that page. New memory reads zeros, also memory that was released and activated
    again; memory of a caller's file reads the contents of the file. `idstr` names a memfd.

    The reservation itself is not charged: 1 TiB succeeds with overcommit_memory=2.

    Raises ValueError for a length that is not a positive multiple of the page size, or is larger than any address
    space. Raises IoctlError if no address space is left or the settings cannot be applied.

    Synchronization: none; the owner serializes calls. Cost: at most three system calls, and one for each setting.
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
            # ctypes would truncate the size to 64 bits, and memory of other owners would be mistaken for this block's.
            raise ValueError(f"max_length {max_length:#x} is more than an address space can hold")
        self._kernel = kernel
        self._settings = _SETTINGS if settings is None else settings
        self.max_length = max_length
        self._length = 0
        self._touched = 0  # bytes up to here may have old contents; those above _length were not released
        self.held = 0
        """The bytes from `vaddr` on that a device may still reach, because their unmap failed."""
        self._kept = False  # a device may reach all of the memory forever
        self._guarded = True  # the page behind max_length is inaccessible
        self._unsettled: tuple[int, int] | None = None  # [start, end) without its settings
        chosen = Anonymous() if kind is None else kind
        self.kind: MemoryKind = chosen.memory if isinstance(chosen, Received) else chosen
        """The kind of memory, as the caller chose it."""
        self._store = make_store(kernel, chosen, idstr=idstr, max_length=max_length)
        try:
            self.vaddr = self._reserve()
        except BaseException:
            self._store.close()
            raise

    @property
    def length(self) -> int:
        """The number of usable bytes, from `vaddr` on."""
        return self._length

    @property
    def settings(self) -> MemorySettings:
        """The settings of all of this memory."""
        return self._settings

    @property
    def page_size(self) -> int:
        """The bytes that lengths are multiples of."""
        return self._store.page_size

    @property
    def readable_only(self) -> bool:
        """Whether the memory cannot be written."""
        return not self._store.protection & 2

    @property
    def can_drop(self) -> bool:
        """Whether parts can be released while they stay accessible."""
        return self._store.can_drop

    @property
    def charged(self) -> Charged:
        """When the pages are charged to this process's control group, to stay charged until they are swapped out."""
        return self._store.charged

    @property
    def warnings(self) -> tuple[Warning, ...]:
        """Warnings for the caller who chose this kind of memory."""
        return tuple(self._store.warnings)

    @property
    def file(self) -> tuple[int, int] | None:
        """The descriptor, and the offset of the memory in the file; None for memory without a file."""
        return None if self._store.fd < 0 else (self._store.fd, self._store.offset)

    @property
    def shared_file(self) -> tuple[int, int] | None:
        """As `file`, but None if a device could not reach the same pages through the descriptor."""
        return self.file if self._store.shares_pages else None

    @property
    def retained(self) -> int:
        """The bytes behind `length` that a failed shrink could not release; zeroed before they are visible."""
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
        """Unmap the address space, unless a failed fixed mapping has removed a part of it.

        Another thread may have mapped memory in that part.
        """
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
            logger.warning("address space %#x-%#x could not be unmapped: %s", start, end - 1, error)

    def _no_space(
        self, error: OSError, asked: int, arguments: dict[str, int | str], *, request: str = "mmap"
    ) -> IoctlError:
        what = f"{format_size(self.max_length)} of address space could not be reserved"
        if error.errno == errno.EAGAIN:
            lock = self._kernel.memlock()
            if not locking.suffices(lock, asked):
                why = f"{what}: under mlockall, future memory is locked too, reserved address space included. "
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
                hint="The descriptor must be of a file that can be mapped. Kernels before 6.7 map a file sealed "
                "against writing only if its descriptor is open for reading only",
            ) from error

    def _map_inaccessible(self, vaddr: int, start: int, end: int) -> None:
        try:
            self._map_fixed(vaddr, start, end)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            # Under MCL_FUTURE, `do_mmap` checks the new mapping against RLIMIT_MEMLOCK while the old mapping is still
            # charged. The new mapping is locked again.
            self._kernel.munlock(vaddr + start, end - start)
            self._map_fixed(vaddr, start, end)

    def _map_fixed(self, vaddr: int, start: int, end: int) -> None:
        store = self._store
        self._kernel.mmap(
            vaddr + start, end - start, PROT_NONE, store.flags | MAP_FIXED, fd=store.fd, offset=store.offset + start
        )

    def can_extend(self, start: int) -> bool:
        """Return whether `activate(allocate=False)` allocates nothing from `start` on: the file has no pages there."""
        return self._store.fd >= 0 and self._store.is_own and start >= self._touched

    def activate(self, length: int, *, allocate: bool = True) -> None:
        """Make `[0, length)` usable. `length` must be above the present length and at most `max_length`.

        `allocate=False`: allocate no pages of a memfd. The caller populates the memory before anyone else touches it: a
        touch for which the kernel has no page is SIGBUS.

        Raises IoctlError (ENOMEM: the commit limit, RLIMIT_DATA or RLIMIT_AS is reached). On an error nothing has
        changed, /proc/self/maps included.
        """
        if self.vaddr == 0:
            raise self._released()
        if not self._length < length <= self.max_length:
            raise ValueError(f"cannot activate {length:#x} bytes: {self._length:#x} of {self.max_length:#x} are")
        start, stale = self._length, self._touched
        if self._unsettled is not None:
            self._settle(*self._unsettled)
        store, step = self._store, "fallocate"
        try:
            if not allocate:
                step = "ftruncate"
                store.extend(length)
            elif store.fd >= 0:  # otherwise the first touch allocates the pages
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
        """Make `[0, length)` usable. The file already contains the pages, as another process left them.

        Raises IoctlError.
        """
        if length:
            try:
                self._kernel.mprotect(self.vaddr, length, self._store.protection)
            except OSError as error:
                raise self._no_memory(error, "mprotect", 0, length) from error
        self._touched = self._length = length

    def own(self) -> None:
        """Own the descriptor: close the descriptor with the reservation."""
        self._store.owned = True

    def disown(self) -> None:
        """Disown the descriptor: leave the descriptor open, because another process or object owns it."""
        self._store.owned = False

    def activate_whole(self, provided: int) -> None:
        """Make all of `max_length` usable, with pages at least up to `provided`. No part may be usable yet.

        `activate` fails if the process has as many mappings as vm.max_map_count allows, because a part with other
        rights needs one more mapping. This call then succeeds. If the guard page belongs to the same mapping, the page
        becomes accessible too, and no longer guards. Raises IoctlError as `activate`.
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
        """Allocate pages for `[start, end)`, if the kind of memory can do so. Raises IoctlError."""
        try:
            self._store.provide(start, end)
        except OSError as error:
            raise self._no_memory(error, "fallocate", start, end) from error

    def _unprovide(self, length: int) -> None:
        """Release the pages that a failed grow allocated, except pages retained before."""
        if self._touched < length and self._store.fd >= 0 and self._store.is_own:
            try:
                self._store.give_back(self._touched, length)
            except OSError as error:
                logger.debug("%#x keeps pages of a grow that failed: %s", self.vaddr, error)
                self._touched = length  # so that the pages are zeroed before they are visible

    def _no_memory(self, error: OSError, request: str, start: int, end: int) -> IoctlError:
        number = error.errno or 0
        hint = _HINTS.get(number) or (
            "Free memory; raise RLIMIT_DATA and RLIMIT_AS; if vm.overcommit_memory is 2, raise the commit limit "
            "(vm.overcommit_ratio, vm.overcommit_kbytes); if the process has very many mappings, raise "
            "vm.max_map_count"
        )
        if self._store.page_size > PAGE_SIZE and number not in _HINTS:
            pages = format_size(self._store.page_size)
            hint = (
                f"The pool of huge pages of {pages} may be too small (vm.nr_hugepages), or the limit of the hugetlb "
                "cgroup"
            )
        return IoctlError.of(
            error,
            f"{format_size(end - start)} more memory could not be allocated: {error.strerror}",
            request=request,
            arguments={"vaddr": self.vaddr + start, "size": end - start},
            hint=hint,
        )

    def deactivate(self, length: int, *, undo: bool = False) -> None:
        """Release everything from `length` on. `length` must be below the present length.

        `undo`: the memory came into use by a change that was refused. The contents of a caller's file there are then
        not punched. The caller asserts that no device reaches behind `length` any more.

        Raises OSError if the memory could not be released (the limit of mappings, vm.max_map_count). `length` has
        changed nevertheless, and the memory stays `retained`.
        """
        if self.vaddr == 0:
            raise self._released()
        if not 0 <= length < self._length:
            raise ValueError(f"cannot deactivate down to {length:#x} bytes: {self._length:#x} are active")
        end, store = self._touched, self._store
        self._length = length
        if self._kept:
            return
        if self.held:
            self.held = min(self.held, length)
        lost = self._unsettled  # begins behind `length`: see `activate`
        self._unsettled = unsettled = (length, end if lost is None else max(lost[1], end))
        self._map_inaccessible(self.vaddr, length, end)
        if store.fd < 0:
            self._touched = length
        try:
            self._settle(*unsettled)
        except OSError as error:
            # The settings matter only once the memory is activated again; `activate` then tries once more.
            logger.debug("settings of %#x are postponed until the memory is activated: %s", self.vaddr + length, error)
        if store.fd >= 0:
            if store.is_own or not undo:
                store.give_back(length, end)
            self._touched = length

    def drop(self, start: int, end: int) -> None:
        """Release the pages of `[start, end)`, which must be active. The range stays accessible and reads zeros.

        Raises OSError if the pages could not be released; the range reads zeros nevertheless.
        """
        self._check_open()
        if not 0 <= start < end <= self._length:
            raise ValueError(f"cannot drop [{start:#x}, {end:#x}): {self._length:#x} bytes are active")
        if failure := self._zero(start, end):
            raise failure

    def clear(self, start: int, end: int) -> None:
        """Zero `[start, end)`, which must be active. Does nothing if the memory shows the contents of a file."""
        if not 0 <= start < end <= self._length:
            raise ValueError(f"cannot clear [{start:#x}, {end:#x}): {self._length:#x} bytes are active")
        if not self._store.holds_contents:
            ctypes.memset(self.vaddr + start, 0, end - start)

    def replace(self, start: int, end: int, *, provide: bool) -> None:
        """Replace the pages of `[start, end)`, which must be active and out of reach of all devices.

        The new pages read zeros, or the contents of a file. Settings stay. `provide`: allocate the pages at once, if
        the kind of memory can do so; otherwise the first touch does. Raises IoctlError; the range may then have old or
        new pages.

        Cost: up to three system calls.
        """
        self._check_open()
        if not 0 <= start < end <= self._length:
            raise ValueError(f"cannot replace [{start:#x}, {end:#x}): {self._length:#x} bytes are active")
        if self._kept:
            raise self._not_replaced(OSError(errno.EBUSY, "a device may still reach the present pages"), start, end)
        try:
            self._store.replace(self.vaddr, start, end)
            if provide and self._store.can_drop:
                self._store.provide(start, end)
        except OSError as error:
            raise self._not_replaced(error, start, end) from error

    def _not_replaced(self, error: OSError, start: int, end: int) -> IoctlError:
        hint = _HINTS.get(
            error.errno or 0, "Free memory, or huge pages if the block is made of them, and remap the range once more"
        )
        if self._kept:
            hint = (
                "Use another block: a change failed, and the undo failed too, so a device may still reach this memory"
            )
        elif not self._store.can_drop:
            hint = "The pages belong to a file that must not be punched; allow that with memory=File(fd, punch=True)"
        return IoctlError.of(
            error,
            f"new pages for {format_size(end - start)} could not be allocated: {error.strerror}",
            request="madvise" if self._store.fd < 0 or not self._store.can_drop else "fallocate",
            arguments={"vaddr": self.vaddr + start, "size": end - start},
            hint=hint,
        )

    def retain(self, length: int) -> None:
        """Reduce the usable memory to `[0, length)`, and release nothing.

        A device may still reach the memory behind `length`, until `deactivate` is called.
        """
        self._check_open()
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot retain from {length:#x} on: {self._length:#x} bytes are active")
        self.held = self._touched
        self._length = length

    def let_go(self) -> None:
        """Record that no device reaches memory behind `length` any more, also after earlier failures."""
        if not self._kept:
            self.held = 0

    def keep(self) -> None:
        """Never release anything from now on, also not in `release`: a device may reach the memory forever."""
        self._kept = True
        self.held = self.max_length

    def _settle(self, start: int, end: int) -> None:
        apply_settings(self._kernel, self._settings, vaddr=self.vaddr + start, size=end - start)
        self._unsettled = None

    def _clear(self, start: int, end: int) -> None:
        """Zero old contents. Pages of a file have been allocated already, and a hole would lose them."""
        if self._store.fd < 0:
            self._zero(start, end)
        else:
            ctypes.memset(self.vaddr + start, 0, end - start)

    def _zero(self, start: int, end: int) -> OSError | None:
        """Zero a range. Return the error that kept the pages from being dropped, or None."""
        # Pages that a device may reach must stay the pages of this process: they are written, not dropped.
        failure = OSError(errno.EBUSY, "a device may still reach the memory")
        if start >= self.held:
            try:
                self._store.drop(self.vaddr, start, end)
            except OSError as error:
                # Locked memory cannot be dropped (EINVAL), but can be written.
                logger.debug("%#x is written with zeros: %s", self.vaddr + start, error)
                failure = error
            else:
                return None
        ctypes.memset(self.vaddr + start, 0, end - start)
        return failure

    def release(self) -> None:
        """Unmap the address space, guard page included; a second call does nothing. On OSError nothing is unmapped."""
        if self._kept:
            self._store.close()  # the mapping keeps the memory alive
        if self.vaddr == 0 or self._kept:
            return
        self._kernel.munmap(self.vaddr, self.max_length + PAGE_SIZE)
        self.vaddr = Vaddr(0)
        self._length = self._touched = self.held = 0
        self._store.close()

    def abandon(self) -> None:
        """Close the descriptor. The memory stays mapped, and nobody uses the reservation any more."""
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
            first = max(start, self.vaddr)  # the kernel merges the area with an equal one below `vaddr`
            assert first == reached, hex(reached)
            reached = end
            # Between `length` and `_touched` lies memory that a shrink could not release.
            assert permissions == usable or first >= self.vaddr + self._length, (hex(start), permissions)
            inside = end <= self.vaddr + self._touched or not self._guarded
            assert permissions[:3] == "---" or inside, (hex(end), permissions)
        assert reached >= self.vaddr + self.max_length + PAGE_SIZE, hex(reached)
