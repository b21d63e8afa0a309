"""The allocator of IOVA against a model: a dict of what is reserved, and sets of pages."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from pyvfio.errors import IovaOverlapError, IovaRangeError
from pyvfio.iommu.iova import IOVA_MIN, IovaAllocator
from pyvfio.units import PAGE_SIZE, U64_MAX, Iova, IovaRange

PAGES_IN_ALL = U64_MAX // PAGE_SIZE + 1
# Places where something begins: around 0, around 64 KiB, around the hole of x86, at the end of a u64. The limits of
# dma_bits cut them: 17 and 32 bits in the middle of some.
BASES = (0, IOVA_MIN // PAGE_SIZE - 2, 0xFEE00, 0xFFFF4, PAGES_IN_ALL - 24)
sizes = st.integers(1, 6)
places = st.builds(lambda base, step: min(base + step, PAGES_IN_ALL - 1), st.sampled_from(BASES), st.integers(0, 23))


@st.composite
def page_ranges(draw: st.DrawFn) -> list[range]:
    """Disjoint runs of pages, some of which touch."""
    found: list[range] = []
    for base, following in zip(BASES, (*BASES[1:], PAGES_IN_ALL), strict=True):
        position = base
        for gap, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=3)):
            if position + gap + length <= min(following, base + 24):
                found.append(range(position + gap, position + gap + length))
                position = found[-1].stop
    if draw(st.booleans()) and (not found or found[-1].stop <= PAGES_IN_ALL - 4):
        found.append(range(PAGES_IN_ALL - 4, PAGES_IN_ALL))
    return found


def iova_range(pages: range) -> IovaRange:
    """The addresses of pages."""
    return IovaRange(Iova(pages.start * PAGE_SIZE), Iova(pages.stop * PAGE_SIZE - 1))


class AllocatorMachine(RuleBasedStateMachine):
    """Everything is counted in pages here."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = IovaAllocator(page_size=PAGE_SIZE)
        self.ranges: list[range] = []
        self.taken: dict[int, range] = {}

    @initialize(ranges=page_ranges())
    def begin(self, ranges: list[range]) -> None:
        """With what a kernel reports, in any order."""
        self.allocator.set_ranges(map(iova_range, reversed(ranges)))
        self.ranges = ranges

    def fits(self, start: int, size: int) -> bool:
        """Whether these pages lie in one range and none of them is taken."""
        wanted = range(start, start + size)
        return any(r.start <= start and wanted.stop <= r.stop for r in self.ranges) and not any(
            wanted.start < other.stop and other.start < wanted.stop for other in self.taken.values()
        )

    def candidates(self, size: int, bits: int) -> list[int]:
        """Every page where `size` pages could begin that `reserve` may give out."""
        low, end = IOVA_MIN // PAGE_SIZE, (1 << bits) // PAGE_SIZE
        return [page for r in self.ranges for page in r if low <= page <= end - size and self.fits(page, size)]

    @rule(
        target=held,
        size=sizes,
        exponent=st.integers(0, 4),
        offset=st.integers(0, 31),
        top_down=st.booleans(),
        bits=st.sampled_from([17, 32, 63, 64]),
    )
    def reserve(self, *, size: int, exponent: int, offset: int, top_down: bool, bits: int) -> object:
        """The lowest or highest congruent place; else the lowest or highest of all; else an error with what is free
        below and above the limit."""
        candidates = self.candidates(size, bits)
        congruent = [page for page in candidates if (page - offset) % (1 << exponent) == 0] or candidates
        try:
            iova = self.allocator.reserve(
                size * PAGE_SIZE,
                alignment=PAGE_SIZE << exponent,
                offset=offset * PAGE_SIZE,
                top_down=top_down,
                dma_bits=bits,
            )
        except IovaRangeError as error:
            self._check_refusal(error, size, bits)
            return multiple()
        assert iova == (max(congruent) if top_down else min(congruent)) * PAGE_SIZE
        self.taken[iova // PAGE_SIZE] = range(iova // PAGE_SIZE, iova // PAGE_SIZE + size)
        return iova // PAGE_SIZE

    def _check_refusal(self, error: IovaRangeError, size: int, bits: int) -> None:
        assert not self.candidates(size, bits)
        assert error.largest_free < size * PAGE_SIZE
        assert (f"dma_bits={bits}" in error.message) == (error.largest_free_above > 0)
        above = [page for page in self.candidates(size, 64) if page * PAGE_SIZE >= 1 << bits]
        assert (error.largest_free_above >= size * PAGE_SIZE) == bool(above)
        assert ("more address bits" in error.hint) == bool(self.candidates(size, 64))

    @rule(target=held, place=places, size=sizes)
    def reserve_at(self, *, place: int, size: int) -> object:
        """Exactly what was asked for, or the error that says why not."""
        inside = any(r.start <= place and place + size <= r.stop for r in self.ranges)
        try:
            self.allocator.reserve_at(place * PAGE_SIZE, size * PAGE_SIZE)
        except IovaOverlapError:
            assert inside
            assert not self.fits(place, size)
            return multiple()
        except IovaRangeError:
            assert not inside
            return multiple()
        assert self.fits(place, size)
        self.taken[place] = range(place, place + size)
        return place

    @rule(place=consumes(held))
    def release(self, *, place: int) -> None:
        """What was reserved is free again."""
        self.allocator.release(place * PAGE_SIZE)
        del self.taken[place]

    @rule(ranges=page_ranges())
    def set_ranges(self, *, ranges: list[range]) -> None:
        """Taken over where every reservation stays usable, else refused."""
        usable = all(any(r.start <= t.start and t.stop <= r.stop for r in ranges) for t in self.taken.values())
        try:
            self.allocator.set_ranges(map(iova_range, ranges))
        except IovaRangeError:
            assert not usable
        else:
            assert usable
            self.ranges = ranges

    @precondition(lambda self: bool(self.ranges))
    @rule(data=st.data())
    def shrink_ranges(self, *, data: st.DataObject) -> None:
        """As attaching a group does: less of one range."""
        position = data.draw(st.integers(0, len(self.ranges) - 1))
        old = self.ranges[position]
        cut = data.draw(st.integers(0, len(old) - 1))
        self.set_ranges(ranges=[*self.ranges[:position], old[: len(old) - cut], *self.ranges[position + 1 :]])

    @invariant()
    def agrees(self) -> None:
        """What is reserved and what is free is what the model says, page for page."""
        self.allocator._check()
        assert self.allocator.ranges == tuple(map(iova_range, self.ranges))
        assert self.allocator.reservations == tuple(iova_range(self.taken[place]) for place in sorted(self.taken))
        reserved = {page for pages in self.taken.values() for page in pages}
        free = {
            page for r in self.allocator.free_ranges for page in range(r.start // PAGE_SIZE, (r.last + 1) // PAGE_SIZE)
        }
        assert not reserved & free
        assert reserved | free == {page for pages in self.ranges for page in pages}


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase
