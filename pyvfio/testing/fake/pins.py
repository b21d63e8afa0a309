"""Memory that devices can reach: what is charged for it, what the limit is, and what must not be taken away."""

from __future__ import annotations

import errno
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pyvfio.testing.fake.process import can_be_pinned, refuse
from pyvfio.units import PAGE_SIZE, Iova, Vaddr


class Mapped(NamedTuple):
    """A live mapping: sizes in bytes, `flags` as given to VFIO_IOMMU_MAP_DMA."""

    iova: Iova
    size: int
    vaddr: Vaddr
    flags: int


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
    index: VaddrIndex = field(default_factory=VaddrIndex)
    violations: list[Violation] = field(default_factory=list)

    @property
    def page_limit(self) -> int | None:
        """The limit in whole pages, as the kernel compares it."""
        return None if self.limit is None else self.limit // PAGE_SIZE * PAGE_SIZE

    def pin(self, mapped: Mapped, *, write: bool) -> None:
        """Charge and hold the memory of a mapping.

        EFAULT or ENOMEM, whichever page comes first: the kernel pins a page and then looks at the limit. Nothing stays
        charged after a failure.
        """
        within = mapped.size
        if self.page_limit is not None and not self.privileged:
            within = max(self.page_limit - self.used, 0)
        looked_at = min(mapped.size, within + PAGE_SIZE)
        if not can_be_pinned(mapped.vaddr, looked_at, write=write):
            refuse(errno.EFAULT)
        if mapped.size > within:
            refuse(errno.ENOMEM)
        self.used += mapped.size
        self.index.add(mapped)

    def unpin(self, mapped: Mapped) -> None:
        """Give back the charge of a mapping."""
        self.used -= mapped.size
        self.index.remove(mapped)

    def gone(self, call: str, *, vaddr: int, size: int) -> None:
        """Record that `call` took memory away, for each mapping that still reaches it."""
        end = vaddr + size
        for mapped in self.index.over(vaddr, end):
            first, last = max(vaddr, mapped.vaddr), min(end, mapped.vaddr + mapped.size)
            iova = Iova(mapped.iova + first - mapped.vaddr)
            self.violations.append(Violation(call, iova, Vaddr(first), last - first))
