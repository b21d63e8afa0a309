"""Memory that devices can reach: the bytes that are charged, the limit, and the release of memory under a mapping."""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

from pyvfio.testing.fake.process import (
    DeviceArea,
    FileAreas,
    MemoryAreas,
    Pagemap,
    can_be_pinned,
    device_areas,
    maps_allow,
    refuse,
)
from pyvfio.units import MIB, PAGE_SIZE, Iova, Vaddr, align_up

_WRITE = 2  # VFIO_DMA_MAP_FLAG_WRITE
_RIGHTS = 3
_DESCRIBED = 16  # violations that an error names
_FEW = 4 * MIB
_BATCH = 2 * MIB  # VFIO_BATCH_MAX_CAPACITY pages


class Account(Enum):
    """The account to which iommufd charges pages (`iopt_pages.account_mode`)."""

    NOBODY = 0  # the process has CAP_IPC_LOCK
    USER = 1
    PROCESS = 2


class Mapped(NamedTuple):
    """A live mapping: sizes in bytes, `flags` as passed to VFIO_IOMMU_MAP_DMA. `uncharged` bytes are not locked.

    `bars`: the parts that are BARs of devices. The mapping keeps these parts, even if the process maps other memory
    there later (`follow_fault_pfn` looks once).
    """

    iova: Iova
    size: int
    vaddr: Vaddr
    flags: int
    uncharged: int = 0
    bars: tuple[DeviceArea, ...] = ()


class Violation(NamedTuple):
    """Memory that `call` released while a device could reach it: `iova` and `vaddr` are the first bytes concerned."""

    call: str
    iova: Iova
    vaddr: Vaddr
    size: int

    def __str__(self) -> str:
        return f"{self.call} took {self.size:#x} bytes at vaddr {self.vaddr:#x}, mapped at IOVA {self.iova:#x}"


def describe(violations: Sequence[Violation]) -> str:
    """Return the first violations in words, and how many there are: one call can take memory from all mappings."""
    more = len(violations) - _DESCRIBED
    return "; ".join([*map(str, violations[:_DESCRIBED]), *([f"and {more} more in `violations`"] if more > 0 else [])])


class ByIova:
    """The recorded violations, for look-ups by IOVA. Cost: O(n log n) to make, O(log n) for each look-up."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        spans = sorted((each.iova, each.iova + each.size) for each in violations)
        self._starts = [start for start, _end in spans]
        self._ends = list(accumulate((end for _start, end in spans), max))  # the greatest end so far

    def meet(self, start: int, end: int) -> bool:
        """Return whether a violation shares a byte with [start, end)."""
        before = bisect_left(self._starts, end)
        return before > 0 and self._ends[before - 1] > start


@dataclass
class VaddrIndex:
    """Mappings by process address: a memory call finds the mappings in a range without a scan of all mappings.

    The index has a list for each size class 2^k, sorted by vaddr. An entry that overlaps [a, b) starts between a - 2^k
    and b. Cost: O(log n) to add, remove or look up, and a move within a list.
    """

    _classes: dict[int, list[tuple[int, Mapped]]] = field(default_factory=dict)

    def add(self, mapped: Mapped) -> None:
        """Add a mapping."""
        insort(self._classes.setdefault(mapped.size.bit_length(), []), (mapped.vaddr, mapped))

    def remove(self, mapped: Mapped) -> None:
        """Remove a mapping that is in the index."""
        entries = self._classes[mapped.size.bit_length()]
        del entries[bisect_left(entries, (mapped.vaddr, mapped))]

    def __iter__(self) -> Iterator[Mapped]:
        return (mapped for entries in self._classes.values() for _vaddr, mapped in entries)

    def over(self, start: int, end: int) -> Iterator[Mapped]:
        """Yield the mappings that share a byte with [start, end)."""
        for bits, entries in self._classes.items():
            for index in range(bisect_left(entries, (start - (1 << bits),)), len(entries)):
                vaddr, mapped = entries[index]
                if vaddr >= end:
                    break
                if vaddr + mapped.size > start:
                    yield mapped


@dataclass
class Pins:
    """`vfio_lock_acct` and `vfio_pin_pages_remote`: the charged bytes, and a limit that can be set at any time.

    `used`: the bytes charged to the process (VmLck), by type1 and by iommufd with IOMMU_OPTION_RLIMIT_MODE 1.
    `by_user`: the bytes that iommufd charges to the user. `pinned`: all bytes that iommufd has pinned (VmPin).
    """

    limit: int | None = None
    privileged: bool = False
    used: int = 0
    by_user: int = 0
    pinned: int = 0
    device_memory_is_mapped: bool = False
    """Whether a BAR was ever mapped. Only then /proc/self/maps is searched for BARs."""
    index: VaddrIndex = field(default_factory=VaddrIndex)
    violations: list[Violation] = field(default_factory=list)
    pagemap: Pagemap = field(default_factory=Pagemap)
    file_areas: FileAreas | None = None
    """The look-up of shared writable files on a disk. The file system does not see writes of a device, so that kernels
    refuse such files with EFAULT (`writable_file_mapping_allowed`). None: a kernel before 6.5, without that check.
    """

    def close(self) -> None:
        """Close the descriptors of the look-ups."""
        self.pagemap.close()
        if self.file_areas is not None:
            self.file_areas.close()

    @property
    def page_limit(self) -> int | None:
        """The limit in whole pages, as the kernel compares."""
        return None if self.limit is None else self.limit // PAGE_SIZE * PAGE_SIZE

    def pin(self, mapped: Mapped, *, write: bool, zero_page_is_free: bool = False) -> Mapped:
        """Charge and pin the memory of a mapping. Returns the mapping with `uncharged` and `bars`.

        Raises EFAULT or ENOMEM, for the first page that fails: the kernel pins a page and then checks the limit. After
        a failure nothing stays charged. `zero_page_is_free`: if only reads are allowed, never-written memory is pinned
        as the shared page of zeros, which is not charged (`is_invalid_reserved_pfn`). Memory of a device is not charged
        either.
        """
        within = mapped.size
        if self.page_limit is not None and not self.privileged:
            within = max(self.page_limit - self.used, 0)
        if within < mapped.size:
            # The kernel pins a batch before the count, so memory beyond the limit is populated too.
            can_be_pinned(mapped.vaddr, min(mapped.size, align_up(within + PAGE_SIZE, _BATCH)), write=write)
        if write and self.file_areas is not None:
            tracked = self.file_areas.first_tracked(mapped.vaddr, min(mapped.size, within + PAGE_SIZE))
            # The pages before the file are pinned first, and can fail with another errno.
            if tracked is not None and can_be_pinned(mapped.vaddr, tracked - mapped.vaddr, write=write):
                refuse(errno.EFAULT)
        zeros = zero_page_is_free and not write
        bars = tuple(device_areas(mapped.vaddr, mapped.size)) if self.device_memory_is_mapped else ()
        free = zeros or bool(bars)
        if free and within < mapped.size:
            self._walk(mapped, within, write=write, zeros=zeros)
        elif not can_be_pinned(mapped.vaddr, min(mapped.size, within + PAGE_SIZE), write=write):
            refuse(errno.EFAULT)
        elif mapped.size > within:
            refuse(errno.ENOMEM)
        if free:
            uncharged = self._free_pages(mapped.vaddr, mapped.size, bars, zeros=zeros) * PAGE_SIZE
            mapped = mapped._replace(uncharged=uncharged, bars=bars)
        self.used += mapped.size - mapped.uncharged
        self.index.add(mapped)
        return mapped

    def populate(self, vaddr: int, size: int, *, write: bool) -> bool:
        """Return whether iommufd can pin all of the memory, which the call populates (`pfn_reader_user_pin`).

        Unlike type1, iommufd pins no BARs.
        """
        if self.device_memory_is_mapped and next(device_areas(vaddr, size), None) is not None:
            return False
        if write and self.file_areas is not None and self.file_areas.first_tracked(vaddr, size) is not None:
            return False
        return can_be_pinned(vaddr, size, write=write) or (not write and self._is_present(vaddr, size))

    def _is_present(self, vaddr: int, size: int) -> bool:
        """Return whether each page can be read, or is there and can be written.

        `pin_user_pages_fast` looks at page tables only, in which a page that can be written can be read.
        """
        return all(
            can_be_pinned(page, PAGE_SIZE, write=False)
            or (self.pagemap.is_present(page) and maps_allow(page, PAGE_SIZE, write=True))
            for page in range(vaddr, vaddr + size, PAGE_SIZE)
        )

    def charge(self, account: Account, size: int) -> None:
        """Charge pages that iommufd has pinned (`do_update_pinned`). Raises ENOMEM, and nothing is charged then."""
        used = {Account.NOBODY: 0, Account.USER: self.by_user, Account.PROCESS: self.used}[account]
        if account is not Account.NOBODY and self.page_limit is not None and used + size > self.page_limit:
            refuse(errno.ENOMEM)
        self.uncharge(account, -size)

    def uncharge(self, account: Account, size: int) -> None:
        """Release the charge of pages that iommufd unpins."""
        self.pinned -= size
        if account is Account.USER:
            self.by_user -= size
        elif account is Account.PROCESS:
            self.used -= size

    def _free_pages(self, vaddr: int, size: int, areas: Iterable[DeviceArea], *, zeros: bool) -> int:
        of_devices = sum(area.size for area in areas) // PAGE_SIZE
        return of_devices + (self.pagemap.zero_pages(vaddr, size) if zeros else 0)

    def _walk(self, mapped: Mapped, within: int, *, write: bool, zeros: bool) -> None:
        # Page by page: whether a page counts towards the limit is known only after the page is populated.
        for vaddr in range(mapped.vaddr, mapped.vaddr + mapped.size, PAGE_SIZE):
            if not can_be_pinned(vaddr, PAGE_SIZE, write=write):
                refuse(errno.EFAULT)
            areas = device_areas(vaddr, PAGE_SIZE) if self.device_memory_is_mapped else ()
            if not self._free_pages(vaddr, PAGE_SIZE, areas, zeros=zeros):
                within -= PAGE_SIZE
            if within < 0:
                refuse(errno.ENOMEM)

    def unpin(self, mapped: Mapped, *, suspended: bool = False) -> None:
        """Release the charge of a mapping."""
        self.used -= mapped.size - mapped.uncharged
        if not suspended:
            self.index.remove(mapped)

    def suspend(self, mapped: Mapped) -> None:
        """Forget the address of a mapping: later calls on that memory do not concern the mapping."""
        self.index.remove(mapped)

    def resume(self, moved: Mapped) -> None:
        """Enter a mapping at the new address. Pinned pages and charge have stayed (`vfio_change_dma_owner`)."""
        self.index.add(moved)

    def gone(self, call: str, *, vaddr: int, size: int, takes: int, only_lost: bool = False) -> None:
        """Record that `call` released memory, for each mapping of the memory that has one of the rights `takes`.

        PROT_* and VFIO_DMA_MAP_FLAG_* have the same numbers. `only_lost`: record only memory that can no longer be
        pinned.
        """
        end = align_up(vaddr + size, PAGE_SIZE)
        for mapped in self.index.over(vaddr, end):
            first, last = max(vaddr, mapped.vaddr), min(end, mapped.vaddr + mapped.size)
            if not mapped.flags & takes:
                continue
            if only_lost and can_be_pinned(first, last - first, write=bool(mapped.flags & _WRITE)):
                continue
            iova = Iova(mapped.iova + first - mapped.vaddr)
            self.violations.append(Violation(call, iova, Vaddr(first), last - first))

    def bars_gone(self, call: str, bdf: str) -> None:
        """Record that `call` made the BARs of a device unreachable, for each mapping of one of the BARs."""
        for mapped in self.index if self.device_memory_is_mapped else ():
            for area in mapped.bars:
                if area.bdf == bdf:
                    iova, vaddr = Iova(mapped.iova + area.start), Vaddr(mapped.vaddr + area.start)
                    self.violations.append(Violation(call, iova, vaddr, area.size))

    def look_at_all(self) -> None:
        """Record memory of mappings that is gone or has lost access rights, by any call."""
        live = list(self.index)
        # A check of one mapping takes microseconds and grows with the size. Reading all areas of the process takes a
        # millisecond.
        areas = MemoryAreas() if sum(mapped.size for mapped in live) > _FEW else None
        known = ByIova(self.violations)
        for mapped in live:
            if areas is None:
                there = can_be_pinned(mapped.vaddr, mapped.size, write=bool(mapped.flags & _WRITE))
            else:
                there = areas.have(mapped.vaddr, mapped.size, rights=mapped.flags & _RIGHTS)
            if not there and not known.meet(mapped.iova, mapped.iova + mapped.size):
                self.violations.append(Violation("something", mapped.iova, mapped.vaddr, mapped.size))

    def _check(self, mappings: list[Mapped], charged: int, *, by_user: int = 0, pinned: int = 0) -> None:
        assert sorted(self.index) == sorted(mappings), "the index by vaddr differs from the mappings"
        assert self.used == charged >= 0, (self.used, charged)
        assert self.by_user == by_user >= 0, (self.by_user, by_user)
        assert self.pinned == pinned >= 0, (self.pinned, pinned)
