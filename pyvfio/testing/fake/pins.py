"""Memory that devices can reach: what is charged for it, what the limit is, and what must not be taken away."""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pyvfio.testing.fake.process import (
    DeviceArea,
    FileAreas,
    MemoryAreas,
    Pagemap,
    can_be_pinned,
    device_areas,
    refuse,
)
from pyvfio.units import MIB, PAGE_SIZE, Iova, Vaddr, align_up

_WRITE = 2  # VFIO_DMA_MAP_FLAG_WRITE
_RIGHTS = 3
_FEW = 4 * MIB
_BATCH = 2 * MIB  # VFIO_BATCH_MAX_CAPACITY pages


class Mapped(NamedTuple):
    """A live mapping: sizes in bytes, `flags` as given to VFIO_IOMMU_MAP_DMA; `uncharged` bytes are not locked.

    `bars`: what of it is devices' BARs. The mapping keeps them, whatever the process does there later
    (`follow_fault_pfn` looks once).
    """

    iova: Iova
    size: int
    vaddr: Vaddr
    flags: int
    uncharged: int = 0
    bars: tuple[DeviceArea, ...] = ()


class Violation(NamedTuple):
    """Memory went away, by `call`, while a device could reach it: `iova` and `vaddr` are the first bytes concerned."""

    call: str
    iova: Iova
    vaddr: Vaddr
    size: int

    def __str__(self) -> str:
        return f"{self.call} took {self.size:#x} bytes at vaddr {self.vaddr:#x}, mapped at IOVA {self.iova:#x}"


@dataclass
class VaddrIndex:
    """Mappings by process address, so that a memory call finds those that it touches without looking at all.

    A list, sorted by vaddr, for each size class 2^k: what overlaps [a, b) starts between a - 2^k and b. Adding,
    removing and looking up cost O(log n) and a move within a list.
    """

    _classes: dict[int, list[tuple[int, Mapped]]] = field(default_factory=dict)

    def add(self, mapped: Mapped) -> None:
        """Enter a mapping."""
        insort(self._classes.setdefault(mapped.size.bit_length(), []), (mapped.vaddr, mapped))

    def remove(self, mapped: Mapped) -> None:
        """Strike out a mapping that is there."""
        entries = self._classes[mapped.size.bit_length()]
        del entries[bisect_left(entries, (mapped.vaddr, mapped))]

    def __iter__(self) -> Iterator[Mapped]:
        return (mapped for entries in self._classes.values() for _vaddr, mapped in entries)

    def over(self, start: int, end: int) -> Iterator[Mapped]:
        """The mappings that share a byte with [start, end)."""
        for bits, entries in self._classes.items():
            for index in range(bisect_left(entries, (start - (1 << bits),)), len(entries)):
                vaddr, mapped = entries[index]
                if vaddr >= end:
                    break
                if vaddr + mapped.size > start:
                    yield mapped


@dataclass
class Pins:
    """`vfio_lock_acct` and `vfio_pin_pages_remote`: bytes charged, against a limit that can be set at any time."""

    limit: int | None = None
    privileged: bool = False
    used: int = 0
    device_memory_is_mapped: bool = False
    """Whether a BAR was ever mapped: only then it is worth a look where."""
    index: VaddrIndex = field(default_factory=VaddrIndex)
    violations: list[Violation] = field(default_factory=list)
    pagemap: Pagemap = field(default_factory=Pagemap)
    file_areas: FileAreas | None = None
    """Where it looks for shared writable files on a disk. No file system hears of what a device writes to them, so that
    they are EFAULT (`writable_file_mapping_allowed`); None: a kernel before that (6.5)."""

    def close(self) -> None:
        """The descriptors by which it asks."""
        self.pagemap.close()
        if self.file_areas is not None:
            self.file_areas.close()

    @property
    def page_limit(self) -> int | None:
        """The limit in whole pages, as the kernel compares it."""
        return None if self.limit is None else self.limit // PAGE_SIZE * PAGE_SIZE

    def pin(self, mapped: Mapped, *, write: bool, zero_page_is_free: bool = False) -> Mapped:
        """Charge and hold the memory of a mapping; the mapping with what it was not charged.

        EFAULT or ENOMEM, whichever page comes first: the kernel pins a page and then looks at the limit. Nothing stays
        charged after a failure. `zero_page_is_free`: a device that only reads gets the page of zeros itself where
        nothing was ever written, and that page is charged to nobody (`is_invalid_reserved_pfn`). Nor is the memory of
        a device.
        """
        within = mapped.size
        if self.page_limit is not None and not self.privileged:
            within = max(self.page_limit - self.used, 0)
        if within < mapped.size:
            # The kernel pins a batch before it counts, so memory beyond the limit is populated all the same.
            can_be_pinned(mapped.vaddr, min(mapped.size, align_up(within + PAGE_SIZE, _BATCH)), write=write)
        if write and self.file_areas is not None:
            tracked = self.file_areas.first_tracked(mapped.vaddr, min(mapped.size, within + PAGE_SIZE))
            # What comes before it is pinned first, and may fail in its own way.
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
            uncharged = self._free_pages(mapped.vaddr, mapped.size, zeros=zeros) * PAGE_SIZE
            mapped = mapped._replace(uncharged=uncharged, bars=bars)
        self.used += mapped.size - mapped.uncharged
        self.index.add(mapped)
        return mapped

    def _free_pages(self, vaddr: int, size: int, *, zeros: bool) -> int:
        areas = device_areas(vaddr, size) if self.device_memory_is_mapped else ()
        of_devices = sum(area.size for area in areas) // PAGE_SIZE
        return of_devices + (self.pagemap.zero_pages(vaddr, size) if zeros else 0)

    def _walk(self, mapped: Mapped, within: int, *, write: bool, zeros: bool) -> None:
        # Page by page: which of them count towards the limit is known only when they are there.
        for vaddr in range(mapped.vaddr, mapped.vaddr + mapped.size, PAGE_SIZE):
            if not can_be_pinned(vaddr, PAGE_SIZE, write=write):
                refuse(errno.EFAULT)
            if not self._free_pages(vaddr, PAGE_SIZE, zeros=zeros):
                within -= PAGE_SIZE
            if within < 0:
                refuse(errno.ENOMEM)

    def unpin(self, mapped: Mapped, *, suspended: bool = False) -> None:
        """Give back the charge of a mapping."""
        self.used -= mapped.size - mapped.uncharged
        if not suspended:
            self.index.remove(mapped)

    def suspend(self, mapped: Mapped) -> None:
        """Its address was given up: what the process does there is not the mapping's concern any more."""
        self.index.remove(mapped)

    def resume(self, moved: Mapped) -> None:
        """It has an address again; what it pinned and was charged has stayed (`vfio_change_dma_owner`)."""
        self.index.add(moved)

    def gone(self, call: str, *, vaddr: int, size: int, takes: int, only_lost: bool = False) -> None:
        """Record that `call` took memory away, for each mapping that still reaches it and has one of the rights `takes`
        (PROT_* and VFIO_DMA_MAP_FLAG_* have the same numbers). `only_lost`: only where it is not there any more."""
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
        """Record that `call` took the BARs of a device away, for each mapping that reaches one."""
        for mapped in self.index if self.device_memory_is_mapped else ():
            for area in mapped.bars:
                if area.bdf == bdf:
                    iova, vaddr = Iova(mapped.iova + area.start), Vaddr(mapped.vaddr + area.start)
                    self.violations.append(Violation(call, iova, vaddr, area.size))

    def look_at_all(self) -> None:
        """Record memory of mappings that is not there any more, or has lost its rights, by whatever call."""
        live = list(self.index)
        # Asking for each costs microseconds and what its size does, reading all areas of the process a millisecond.
        areas = MemoryAreas() if sum(mapped.size for mapped in live) > _FEW else None
        for mapped in live:
            if areas is None:
                there = can_be_pinned(mapped.vaddr, mapped.size, write=bool(mapped.flags & _WRITE))
            else:
                there = areas.have(mapped.vaddr, mapped.size, rights=mapped.flags & _RIGHTS)
            if not there and not self._is_known(mapped):
                self.violations.append(Violation("something", mapped.iova, mapped.vaddr, mapped.size))

    def _is_known(self, mapped: Mapped) -> bool:
        end = mapped.iova + mapped.size
        return any(known.iova < end and mapped.iova < known.iova + known.size for known in self.violations)

    def _check(self, mappings: list[Mapped], charged: int) -> None:
        assert sorted(self.index) == sorted(mappings), "the index by vaddr is not what is mapped"
        assert self.used == charged >= 0, (self.used, charged)
