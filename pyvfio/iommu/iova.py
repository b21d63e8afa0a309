"""An allocator of I/O virtual addresses inside the ranges that the kernel reports. Pure.

Blocks are placed from 0x10000 upwards (QEMU_VFIO_IOVA_MIN), temporary mappings from the top downwards, so that the two
do not fragment each other. The top is 2^`dma_bits`, by default 2^39 (QEMU_VFIO_IOVA_MAX). Many devices have fewer
address bits than the IOMMU, and silently drop the upper bits of an IOVA. A caller can choose an address anywhere.

Released ranges are joined with free neighbours and used again. The allocator of QEMU (`qemu_vfio_find_fixed_iova`,
`qemu_vfio_find_temp_iova`) never reuses a range.
"""

from __future__ import annotations

import errno
import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from pyvfio.errors import IovaOverlapError, IovaRangeError, describe_ranges
from pyvfio.iommu.free_runs import FreeRuns
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
"""Lower addresses are used only if the caller names them: a device that is programmed with 0 by mistake must fault."""


DMA_BITS = 39
"""The default number of address bits of a device, as in QEMU's VFIO helpers."""

MOST_DMA_BITS = 64
"""The number of bits of an IOVA: no limit."""

_MOST_NAMED = 8  # ranges in the message of an error


def check_dma_bits(value: object) -> int:
    """Return a number of address bits as an int. Raises ValueError if no IOVA would be left to choose; TypeError."""
    bits = check_whole_number(value, "dma_bits")
    least = IOVA_MIN.bit_length()
    if not least <= bits <= MOST_DMA_BITS:
        raise ValueError(f"dma_bits must be {least} to {MOST_DMA_BITS}, as IOVAs are chosen from {IOVA_MIN:#x} on")
    return bits


class IovaAllocator:
    """Reserves ranges of IOVA inside `ranges`. The size of each is a multiple of `page_size`.

    Raises ValueError for sizes, alignments and addresses that are always invalid.

    Synchronization: none; `Container` serializes calls. Cost: one search or change of `FreeRuns` and one of a dict of
    reservations. An error also walks the free runs once.
    """

    def __init__(self, ranges: Iterable[IovaRange] = (), *, page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        """The smallest page of the IOMMU, in bytes. Every reservation is a multiple of it. `set_ranges` changes it."""
        self._ranges: tuple[IovaRange, ...] = ()
        self._lowest = IOVA_MIN
        self._reserved: dict[int, int] = {}  # first address -> size
        self._free = FreeRuns()  # no run crosses the end of a range
        # Two fast paths. If the last place found is released and nothing else has changed, the same search finds the
        # same place: a buffer is mapped and unmapped again and again. If nothing has changed at all, the same search
        # from the top finds the place below: the runs above are too short, as they were before. `_runs` removes such
        # places from the free runs, all at once.
        self._spare: int | None = None  # the place, once it is released
        self._answer: int | None = None  # the last place found, as long as nothing else has changed
        self._top = 0  # the place that the last search found in the free runs
        self._floor = 0  # the lowest place that the same search can find below `_answer`
        self._wanted = (0, 0, False, 0)  # the arguments of that search
        self.set_ranges(ranges, page_size=page_size)

    @property
    def ranges(self) -> tuple[IovaRange, ...]:
        """The ranges that the IOMMU offers, ascending."""
        return self._ranges

    @property
    def reservations(self) -> tuple[IovaRange, ...]:
        """The reserved ranges, ascending."""
        return tuple(IovaRange.of(iova=start, size=size) for start, size in sorted(self._reserved.items()))

    @property
    def free(self) -> int:
        """The number of bytes that are not reserved. Cost: O(free runs)."""
        return sum(last - start + 1 for start, last in self._runs())

    @property
    def free_ranges(self) -> tuple[IovaRange, ...]:
        """The ranges that are not reserved, ascending."""
        return tuple(IovaRange(Iova(start), Iova(last)) for start, last in self._runs())

    @property
    def largest_free(self) -> int:
        """The length in bytes of the longest free run: the most that `reserve` can still return."""
        return self._runs().longest(IOVA_MIN, U64_MAX)

    def set_ranges(self, ranges: Iterable[IovaRange], *, page_size: int | None = None) -> None:
        """Set the ranges that the kernel reports now. Attaching or detaching a group can change the ranges.

        Raises ValueError if ranges overlap or if the page size is not a power of two. Raises IovaRangeError if a
        reservation would lie outside the ranges or would not be a multiple of the page size. On an error nothing
        changes. The kernel checks live mappings only. Without this check, a block whose reserved tail has become
        unusable would fail much later, when the block grows.
        """
        new = tuple(sorted(ranges))
        size = self.page_size if page_size is None else page_size
        if not is_power_of_two(size):
            raise ValueError(f"page_size must be a power of two, not {size}")
        if any(one.overlaps(other) for one, other in itertools.pairwise(new)):
            raise ValueError(f"ranges of IOVA must not overlap: {format_ranges(new)}")
        starts = [offered.start for offered in new]

        def is_usable(start: int, length: int) -> bool:
            home = bisect_right(starts, start) - 1
            return home >= 0 and start + length - 1 <= new[home].last and is_aligned(start | length, size)

        if lost := [IovaRange.of(iova=each[0], size=each[1]) for each in self._taken() if not is_usable(*each)]:
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
        self._ranges, self.page_size, self._lowest = new, size, align_up(IOVA_MIN, size)
        self._free = FreeRuns(self._gaps(), frozenset(starts))
        self._spare = self._answer = None

    def _taken(self) -> list[tuple[int, int]]:
        return sorted(self._reserved.items())

    def _gaps(self) -> Iterator[tuple[int, int]]:
        """Yield the unreserved runs of each range."""
        taken = iter([*self._taken(), (U64_MAX + 1, 0)])
        start, size = next(taken)
        for offered in self._ranges:
            first = align_up(offered.start, self.page_size)
            last = align_down(offered.last + 1, self.page_size) - 1
            while start <= last:  # every reservation lies inside a range
                if first < start:
                    yield first, start - 1
                first = start + size
                start, size = next(taken)
            if first <= last:
                yield first, last

    def reserve(
        self,
        size: int,
        *,
        alignment: int | None = None,
        offset: int = 0,
        top_down: bool = False,
        dma_bits: int = MOST_DMA_BITS,
    ) -> Iova:
        """Reserve `size` bytes of IOVA below 2^`dma_bits`. Return the first address.

        The address leaves `offset % alignment` when divided by `alignment`, a power of two (default: the page size).
        Blocks pass 2 MiB and their vaddr, so that the IOMMU can use large pages. If no such place is free, any
        page-aligned place is used: a slower mapping is better than none. Raises IovaRangeError (ENOMEM) if that fails
        too.
        """
        return self.place(size, self.page_size if alignment is None else alignment, offset, top_down, dma_bits)

    def place(self, size: int, alignment: int, offset: int, top_down: bool, dma_bits: int) -> Iova:  # noqa: FBT001
        """Reserve as `reserve` does. The arguments are positional, for speed."""
        wanted = (size, alignment, top_down, dma_bits)
        start: int | None = None
        if wanted == self._wanted and (answer := self._answer) is not None:
            if self._spare is not None:
                start, self._spare = answer, None
            elif answer - size >= self._floor:
                start = self._answer = answer - size
        if start is None:
            start = self._top = self._floor = self._find(size, alignment, offset, top_down, dma_bits)
            self._wanted, self._answer = wanted, start if alignment <= self.page_size else None
            if top_down and (below := self._free.covering(start - 1)) is not None:
                self._floor = max(below[0], self._lowest)
        self._reserved[start] = size
        return start  # type: ignore[return-value]  # Iova() is a call, and int at runtime

    def _find(self, size: int, alignment: int, offset: int, top_down: bool, dma_bits: int) -> int:  # noqa: FBT001
        page, runs = self.page_size, self._runs()
        if size <= 0 or size & (page - 1):
            self._check_size(size)
        if alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"alignment must be a power of two, not {alignment}")
        take = runs.take_highest if top_down else runs.take_lowest
        highest, start = (1 << dma_bits) - 1, None
        if alignment > page:
            start = take(size, alignment, offset & alignment - page, self._lowest, highest)  # offset in whole pages
        if start is None:
            start = take(size, 0, 0, self._lowest, highest)
        if start is None:
            raise self._exhausted(size, dma_bits)
        return start

    def _runs(self) -> FreeRuns:
        """Return the free runs as they are. The next search cannot use a fast path."""
        if self._answer is not None and self._answer < self._top:
            self._free.take(self._answer, self._top - 1)
        if self._spare is not None:
            self._free.give(self._spare, self._spare + self._wanted[0] - 1)
        self._spare = self._answer = None
        return self._free

    def reserve_at(self, iova: int, size: int) -> Iova:
        """Reserve `[iova, iova + size)`, chosen by the caller.

        Raises ValueError if `iova` is misaligned. Raises IovaRangeError (EINVAL) if the addresses do not lie in one
        range of the IOMMU, and IovaOverlapError (EEXIST) if some are reserved.
        """
        self._check_size(size)
        if not 0 <= iova <= U64_MAX or not is_aligned(iova, self.page_size):
            raise ValueError(f"an IOVA must be a multiple of {self.page_size:#x} below 2^64, not {iova:#x}")
        if not self._runs().take(iova, iova + size - 1):
            raise self._not_free(iova, size)
        self._reserved[iova] = size
        return Iova(iova)

    def _not_free(self, iova: int, size: int) -> IovaRangeError | IovaOverlapError:
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
            return outside
        existing = tuple(IovaRange.of(iova=start, size=length) for start, length in self._overlapping(iova, size))
        overlap = IovaOverlapError(
            errno.EEXIST,
            f"IOVA {IovaRange.of(iova=iova, size=size)} is reserved already: {format_ranges(existing[:_MOST_NAMED])}"
            + (", …" if len(existing) > _MOST_NAMED else ""),
            request="reserve_at",
            arguments=arguments,
            hint="Let pyvfio choose the IOVA, or remove those mappings or blocks first",
        )
        overlap.existing = existing
        return overlap

    def _overlapping(self, iova: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield the reservations that share an address with `[iova, iova + size)`, which lies in one range."""
        at, end = iova, iova + size
        while at < end:
            free = self._free.covering(at)
            if free is not None:
                at = free[1] + 1
                continue
            start = self._reservation_of(at)
            yield start, self._reserved[start]
            at = start + self._reserved[start]

    def _reservation_of(self, iova: int) -> int:
        """Return the start of the reservation that contains `iova`.

        The search goes down from `iova` page by page, and up from the end of the last free run reservation by
        reservation. The shorter way ends the search.
        """
        reserved, page = self._reserved, self.page_size
        home = next(offered for offered in self._ranges if offered.start <= iova <= offered.last)
        free = self._free.below(iova)
        above = align_up(home.start, page) if free is None or free < home.start else free + 1
        below = iova
        while below not in reserved:
            following = above + reserved[above]
            if following > iova:
                return above
            above = following
            below -= page
        return below

    def release(self, iova: int) -> None:
        """Release the reservation that begins at `iova`. Raises KeyError if there is none."""
        try:
            size = self._reserved.pop(iova)
        except KeyError:
            raise KeyError(f"no IOVA is reserved from {iova:#x} on") from None
        if iova == self._answer and self._spare is None:
            self._spare = iova
        else:
            self._runs().give(iova, iova + size - 1)

    def release_neighbours(self, iovas: Sequence[int]) -> None:
        """Release adjacent reservations, given in ascending order. Raises KeyError if one of them does not exist."""
        reserved = self._reserved
        if not all(map(reserved.__contains__, iovas)):
            raise KeyError(f"not all of {iovas!r} are reserved")
        size = sum(map(reserved.pop, iovas))
        self._runs().give(iovas[0], iovas[0] + size - 1)

    def is_reserved(self, iova: int) -> bool:
        """Return whether a reservation begins at `iova`."""
        return iova in self._reserved

    def _check_size(self, size: int) -> None:
        if size <= 0 or not is_aligned(size, self.page_size):
            raise ValueError(f"a size of IOVA must be a positive multiple of {self.page_size:#x} bytes, not {size:#x}")

    def _exhausted(self, size: int, dma_bits: int) -> IovaRangeError:
        limit = 1 << dma_bits
        below, above = self._runs().longest(IOVA_MIN, limit - 1), self._runs().longest(limit, U64_MAX)
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
        free = FreeRuns(self._free, {offered.start for offered in self._ranges})
        if self._answer is not None and self._answer < self._top:  # as in _runs(): this check must change nothing
            assert free.take(self._answer, self._top - 1)
        if self._spare is not None:
            assert self._spare == self._answer
            free.give(self._spare, self._spare + self._wanted[0] - 1)
        assert list(free) == list(self._gaps())
        self._free._check()
        everything = sorted([*self.reservations, *(IovaRange(Iova(first), Iova(last)) for first, last in free)])
        for one, other in itertools.pairwise(everything):
            assert one.last < other.start, (str(one), str(other))
        for piece in everything:
            assert any(r.contains(piece) for r in self._ranges), str(piece)
