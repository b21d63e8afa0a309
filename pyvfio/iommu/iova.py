"""Which I/O virtual addresses are free: an allocator inside the ranges that the kernel reports. Pure.

Blocks are placed from 0x10000 upwards (QEMU_VFIO_IOVA_MIN), temporary mappings from the top down, so that the two do
not fragment each other. The top is 2^`dma_bits`, by default 2^39 (QEMU_VFIO_IOVA_MAX): many devices have fewer address
bits than the IOMMU, and drop the upper bits of an IOVA silently. A caller may name an address of its own, anywhere.
What is released is joined with its free neighbours and used again; QEMU's allocator (`qemu_vfio_find_fixed_iova`,
`qemu_vfio_find_temp_iova`) never does.
"""

from __future__ import annotations

import errno
import itertools
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence

from pyvfio.errors import IovaOverlapError, IovaRangeError, describe_ranges
from pyvfio.units import (
    PAGE_SIZE,
    U64_MAX,
    Iova,
    IovaRange,
    align_down,
    align_up,
    check_whole_number,
    format_ranges,
    format_size,
    is_aligned,
    is_power_of_two,
)

IOVA_MIN = 0x10000
"""Addresses below are given out only to a caller who names them: a device that is told 0 by mistake should fault."""


DMA_BITS = 39
"""How many address bits a device has unless the caller says otherwise, as for QEMU's VFIO helpers."""

MOST_DMA_BITS = 64
"""As many as an IOVA has: no limit."""


def check_dma_bits(value: object) -> int:
    """Return a number of address bits as an int. Raises ValueError unless there are IOVAs to choose; TypeError."""
    bits = check_whole_number(value, "dma_bits")
    least = IOVA_MIN.bit_length()
    if not least <= bits <= MOST_DMA_BITS:
        raise ValueError(f"dma_bits must be {least} to {MOST_DMA_BITS}, as IOVAs are chosen from {IOVA_MIN:#x} on")
    return bits


class IovaAllocator:
    """Reserves ranges of IOVA inside `ranges`, each a multiple of `page_size`.

    Raises ValueError for sizes, alignments and addresses that can never be right.

    Synchronization: none; `Container` serializes calls. Cost: reserve O(free runs), release O(log n) and a list insert.
    """

    def __init__(self, ranges: Iterable[IovaRange] = (), *, page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        """The smallest page of the IOMMU, in bytes: every reservation is a multiple of it. `set_ranges` changes it."""
        self._ranges: tuple[IovaRange, ...] = ()
        self._reserved: dict[int, int] = {}  # first address -> last address
        self._free: list[tuple[int, int]] = []  # (first, last), sorted, maximal within one range
        self.set_ranges(ranges, page_size=page_size)

    @property
    def ranges(self) -> tuple[IovaRange, ...]:
        """What the IOMMU offers, ascending."""
        return self._ranges

    @property
    def reservations(self) -> tuple[IovaRange, ...]:
        """Everything reserved, ascending."""
        return tuple(IovaRange(Iova(start), Iova(last)) for start, last in sorted(self._reserved.items()))

    @property
    def free(self) -> int:
        """The number of bytes that are not reserved. O(free runs)."""
        return sum(last - start + 1 for start, last in self._free)

    @property
    def free_ranges(self) -> tuple[IovaRange, ...]:
        """The ranges that are not reserved, ascending."""
        return tuple(IovaRange(Iova(start), Iova(last)) for start, last in self._free)

    @property
    def largest_free(self) -> int:
        """The longest run of bytes that `reserve` may still give out."""
        return self._longest(IOVA_MIN, U64_MAX)

    def _longest(self, lowest: int, highest: int) -> int:
        """The longest free run of bytes in [lowest, highest]."""
        runs = (min(last, highest) - max(first, lowest) + 1 for first, last in self._free)
        return max(0, *runs, 0)

    def set_ranges(self, ranges: Iterable[IovaRange], *, page_size: int | None = None) -> None:
        """Take over what the kernel reports now; it can change when a group is attached or detached.

        Raises ValueError for ranges that overlap and a page size that is not a power of two; IovaRangeError when
        something reserved would lie outside or be no multiple of the page size. Then nothing has changed. The kernel
        checks live mappings only: the unmapped tail of a block would otherwise fail much later, when the block grows.
        """
        new = tuple(sorted(ranges))
        size = self.page_size if page_size is None else page_size
        if not is_power_of_two(size):
            raise ValueError(f"page_size must be a power of two, not {size}")
        if any(one.overlaps(other) for one, other in itertools.pairwise(new)):
            raise ValueError(f"ranges of IOVA must not overlap: {format_ranges(new)}")
        if lost := [
            taken
            for taken in self.reservations
            if not any(r.contains(taken) for r in new) or not is_aligned(taken.start | taken.size, size)
        ]:
            error = IovaRangeError(
                errno.EINVAL,
                f"{len(lost)} reserved ranges of IOVA have become unusable: {format_ranges(lost)}",
                request="VFIO_IOMMU_GET_INFO",
                arguments={},
                hint=f"{describe_ranges(new)}. Attach all groups before blocks are added, or put the group into a "
                "container of its own",
            )
            error.ranges = new
            raise error
        self._ranges, self.page_size = new, size
        self._free = list(self._gaps())

    def _gaps(self) -> Iterator[tuple[int, int]]:
        taken = sorted(self._reserved.items())
        for offered in self._ranges:
            start = align_up(offered.start, self.page_size)
            last = align_down(offered.last + 1, self.page_size) - 1
            for first_taken, last_taken in taken:
                if last_taken < start or first_taken > last:
                    continue
                if first_taken > start:
                    yield start, first_taken - 1
                start = last_taken + 1
            if start <= last:
                yield start, last

    def reserve(
        self,
        size: int,
        *,
        alignment: int | None = None,
        offset: int = 0,
        top_down: bool = False,
        dma_bits: int = MOST_DMA_BITS,
    ) -> Iova:
        """Reserve `size` bytes below 2^`dma_bits`, at an address that leaves `offset % alignment` when divided by
        `alignment`.

        `alignment` is a power of two (default: the page size). Blocks pass 2 MiB and their vaddr, so that the IOMMU can
        use large pages. Where no such place is left, any page-aligned one is taken: a slower mapping is better than
        none. Raises IovaRangeError (ENOMEM) when there is none either.
        """
        page = self.page_size
        if size <= 0 or size & (page - 1):
            self._check_size(size)
        if alignment is not None and not is_power_of_two(alignment):
            raise ValueError(f"alignment must be a power of two, not {alignment}")
        stride = page if alignment is None or alignment < page else alignment
        highest = (1 << dma_bits) - 1
        start = self._find(size, stride, offset, highest, top_down=top_down)
        if start is None and stride > page:
            start = self._find(size, page, 0, highest, top_down=top_down)
        if start is None:
            raise self._exhausted(size, dma_bits)
        self._take(start, start + size - 1)
        return Iova(start)

    def _find(self, size: int, stride: int, offset: int, highest: int, *, top_down: bool) -> int | None:
        offset = offset % stride & -self.page_size
        for first, last in reversed(self._free) if top_down else self._free:
            first, last = max(first, IOVA_MIN), min(last, highest)  # noqa: PLW2901
            # The last, or the first, address there that leaves `offset`: x & -stride rounds down, -(-x & -stride) up.
            start = (last + 1 - size - offset & -stride if top_down else -(offset - first & -stride)) + offset
            if first <= start and start + size - 1 <= last:
                return start
        return None

    def reserve_at(self, iova: int, size: int) -> Iova:
        """Reserve `[iova, iova + size)`, the caller's own choice.

        Raises ValueError when `iova` is misaligned, IovaRangeError (EINVAL) when the IOMMU has no such addresses in one
        range, IovaOverlapError (EEXIST) when part of it is reserved.
        """
        self._check_size(size)
        if not 0 <= iova <= U64_MAX or not is_aligned(iova, self.page_size):
            raise ValueError(f"an IOVA must be a multiple of {self.page_size:#x} below 2^64, not {iova:#x}")
        arguments = {"iova": iova, "size": size}
        if iova + size - 1 > U64_MAX or not any(r.contains(IovaRange.of(iova=iova, size=size)) for r in self._ranges):
            outside = IovaRangeError(
                errno.EINVAL,
                f"IOVA {iova:#x}-{iova + size - 1:#x} does not lie in one range of the IOMMU",
                request="reserve_at",
                arguments=arguments,
                hint=f"{describe_ranges(self._ranges)}. Leave the IOVA to pyvfio, or choose one inside",
            )
            outside.ranges = self._ranges
            raise outside
        if not self._is_free(iova, iova + size - 1):
            wanted = IovaRange.of(iova=iova, size=size)
            existing = tuple(taken for taken in self.reservations if taken.overlaps(wanted))
            overlap = IovaOverlapError(
                errno.EEXIST,
                f"IOVA {wanted} is reserved already: {format_ranges(existing)}",
                request="reserve_at",
                arguments=arguments,
                hint="Leave the IOVA to pyvfio, or remove what is there first",
            )
            overlap.existing = existing
            raise overlap
        self._take(iova, iova + size - 1)
        return Iova(iova)

    def release(self, iova: int) -> None:
        """Give back the reservation that begins at `iova`. Raises KeyError when none does."""
        last = self._reserved.pop(iova)
        position = bisect_left(self._free, (iova, last))
        start = iova
        home = self._range_of(iova)
        if position < len(self._free) and self._free[position][0] == last + 1 <= home.last:
            last = self._free.pop(position)[1]
        if position > 0 and home.start <= self._free[position - 1][1] == start - 1:
            start = self._free.pop(position - 1)[0]
        insort(self._free, (start, last))

    def is_reserved(self, iova: int) -> bool:
        """Whether a reservation begins at `iova`."""
        return iova in self._reserved

    def _range_of(self, iova: int) -> IovaRange:
        for offered in self._ranges:
            if offered.start <= iova <= offered.last:
                return offered
        raise KeyError(iova)

    def _is_free(self, start: int, last: int) -> bool:
        position = bisect_right(self._free, (start, U64_MAX + 1)) - 1
        return position >= 0 and last <= self._free[position][1]

    def _take(self, start: int, last: int) -> None:
        position = bisect_right(self._free, (start, U64_MAX + 1)) - 1
        first, end = self._free[position]
        pieces = [(first, start - 1)] if first < start else []
        if last < end:
            pieces.append((last + 1, end))
        self._free[position : position + 1] = pieces
        self._reserved[start] = last

    def _check_size(self, size: int) -> None:
        if size <= 0 or not is_aligned(size, self.page_size):
            raise ValueError(f"a size of IOVA must be a positive multiple of {self.page_size:#x} bytes, not {size:#x}")

    def _exhausted(self, size: int, dma_bits: int) -> IovaRangeError:
        limit = 1 << dma_bits
        below, above = self._longest(IOVA_MIN, limit - 1), self._longest(limit, U64_MAX)
        where, there, also = "", "", ""
        hint = (
            "Choose a smaller max_length or remove blocks; under QEMU an intel-iommu offers more with aw-bits=48, and "
            "dma_bits=48 lets pyvfio choose it"
        )
        if above:
            where, there = f" below 2^{dma_bits} (dma_bits={dma_bits})", " there"
            also = f", and {format_size(above)} are free above it"
        if self.largest_free >= size:
            hint = (
                "If the device has more address bits, say so with DmaMapper(…, dma_bits=…) or Container(dma_bits=…), "
                "or choose an IOVA above with iova= or place="
            )
        error = IovaRangeError(
            errno.ENOMEM,
            f"no {format_size(size)} of IOVA are left in one piece{where}: the longest free run{there} has "
            f"{format_size(below)}{also}, {len(self._reserved)} ranges are reserved",
            request="reserve",
            arguments={"size": size, "dma_bits": dma_bits} if above else {"size": size},
            hint=f"{describe_ranges(self._ranges)}. {hint}",
        )
        error.ranges = self._ranges
        error.largest_free, error.largest_free_above = below, above
        return error

    def _check(self) -> None:
        taken: Sequence[IovaRange] = self.reservations
        free: Sequence[IovaRange] = self.free_ranges
        everything = sorted([*taken, *free])
        for one, other in itertools.pairwise(everything):
            assert one.last < other.start, (str(one), str(other))
        for piece in everything:
            assert any(r.contains(piece) for r in self._ranges), str(piece)
        assert self._free == sorted(self._free) == list(self._gaps())
