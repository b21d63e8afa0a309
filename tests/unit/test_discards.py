"""Parts of a block that are given back and come back: who is told, who may refuse, and who rules it out altogether."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest

import pyvfio
from pyvfio.blocks.discards import DiscardClaim, DiscardGuard
from pyvfio.extents import Extent, runs
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import BDF, MapperFactory, Rig, SpecialKernel, nothing_left, requests
from tests.unit.processes import areas

GRANULE: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=2 * PAGE_SIZE)
PAGES: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)
EXTEND: MapperFactory = partial(pyvfio.DmaMapper, resize="extend")


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with a device."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made, nothing_left(made):
        yield made


@pytest.fixture(params=["remap", "extend", "granule"])
def rig(request: pytest.FixtureRequest, kernel: SpecialKernel) -> Iterator[Rig]:
    """A mapper under each policy."""
    mapper = {"remap": pyvfio.DmaMapper, "extend": EXTEND, "granule": PAGES}[request.param]
    with Rig(kernel, mapper=mapper) as made:
        yield made


def pages(*spans: tuple[int, int]) -> tuple[Extent, ...]:
    """Extents in bytes of spans in pages."""
    return tuple(Extent(start * PAGE_SIZE, end * PAGE_SIZE) for start, end in spans)


def discard(block: pyvfio.RamBlock, start: int, end: int) -> None:
    """Pages [start, end)."""
    block.discard(start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def populate(block: pyvfio.RamBlock, start: int, end: int) -> None:
    """Pages [start, end)."""
    block.populate(start * PAGE_SIZE, (end - start) * PAGE_SIZE)


def contents(block: pyvfio.RamBlock) -> bytes:
    """The first byte of each page."""
    return bytes(ctypes.string_at(block.vaddr + at, 1)[0] for at in range(0, block.used_length, PAGE_SIZE))


class Listener:
    """Follows everything, and writes it down; refuses what it is told to."""

    def __init__(self) -> None:
        self.told: list[tuple[str, tuple[Extent, ...]]] = []
        self.refuse = ""

    def _hear(self, what: str, parts: Sequence[Extent]) -> None:
        if what == self.refuse:
            raise PermissionError(errno.EPERM, what)
        self.told.append((what, tuple(parts)))

    def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """A block."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Another length."""

    def ram_block_discarded(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """Parts go."""
        del block
        self._hear("discarded", parts)

    def ram_block_populated(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """Parts come."""
        del block
        self._hear("populated", parts)


class Whole:
    """Reaches whole blocks."""

    def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """A block."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Another length."""


# -------------------------------------------------------------------------------------------- device and memory


def test_the_device_reaches_what_is_populated_and_nothing_else(rig: Rig) -> None:
    """Through discards and populates that overlap, under each policy."""
    block = rig.add(used=8 * PAGE_SIZE)
    for change, start, end, left in (
        (discard, 2, 4, pages((0, 2), (4, 8))),
        (discard, 3, 6, pages((0, 2), (6, 8))),
        (populate, 5, 8, pages((0, 2), (5, 8))),
        (populate, 0, 8, pages((0, 8))),
        (discard, 3, 4, pages((0, 3), (4, 8))),
        (discard, 1, 7, pages((0, 1), (7, 8))),
        (populate, 2, 3, pages((0, 1), (2, 3), (7, 8))),
        (populate, 0, 6, pages((0, 6), (7, 8))),
        (discard, 0, 8, ()),
        (populate, 1, 2, pages((1, 2))),
    ):
        change(block, start, end)
        assert block.populated == left
        rig.check()
    assert sum(size for _iova, _vaddr, size in rig.reached()) == PAGE_SIZE


def test_a_populate_on_both_sides_of_an_island_maps_both(rig: Rig) -> None:
    """The parts below the island are no growth of it."""
    block = rig.add(used=6 * PAGE_SIZE)
    discard(block, 0, 2)
    discard(block, 4, 6)
    populate(block, 0, 6)
    assert runs([Extent(iova, iova + size) for iova, _vaddr, size in rig.reached()]) == [
        Extent(rig.mapper.iova(block), rig.mapper.iova(block) + 6 * PAGE_SIZE)
    ]
    rig.check()


def test_what_was_discarded_is_given_back_and_reads_zeros(rig: Rig) -> None:
    """Before it is populated again, and after; the rest keeps its bytes."""
    block = rig.add(used=4 * PAGE_SIZE)
    ctypes.memset(block.vaddr, 7, block.used_length)
    before = sum(area.rss for area in areas(block.vaddr, block.used_length))
    discard(block, 1, 3)
    if not any(area.huge for area in areas(block.vaddr, block.used_length)):
        assert sum(area.rss for area in areas(block.vaddr, block.used_length)) == before - 2 * PAGE_SIZE
    assert contents(block) == b"\7\0\0\7"
    populate(block, 1, 3)
    assert contents(block) == b"\7\0\0\7"


def test_a_resize_keeps_what_is_discarded_and_new_memory_is_populated(rig: Rig) -> None:
    """What a shrink cuts off is forgotten."""
    block = rig.add(used=6 * PAGE_SIZE)
    discard(block, 1, 5)
    block.resize(3 * PAGE_SIZE)
    assert block.discarded == pages((1, 3))
    rig.check()
    block.resize(8 * PAGE_SIZE)
    assert block.populated == pages((0, 1), (3, 8))
    rig.check()


def test_a_shrink_that_its_callback_refuses_keeps_the_discarded_parts_of_the_tail(rig: Rig) -> None:
    """They are discarded as before, also behind the length that was refused."""

    def refuse(_idstr: str, length: int) -> None:
        if length == 3 * PAGE_SIZE:
            raise PermissionError(errno.EPERM, "no")

    block = rig.blocks.add("ring", used_length=6 * PAGE_SIZE, max_length=8 * PAGE_SIZE, resized=refuse)
    discard(block, 2, 5)
    with pytest.raises(PermissionError):
        block.resize(3 * PAGE_SIZE)
    assert (block.used_length, block.discarded) == (6 * PAGE_SIZE, pages((2, 5)))
    assert contents(block) == bytes(6)
    rig.check()
    assert sum(size for _iova, _vaddr, size in rig.reached()) == 3 * PAGE_SIZE


def test_with_granules_a_discard_unmaps_granules_and_touches_no_survivor(kernel: SpecialKernel) -> None:
    """And what granules do not make up is refused."""
    with Rig(kernel, mapper=GRANULE) as rig:
        block = rig.add(used=8 * PAGE_SIZE)
        kernel.clear_trace()
        discard(block, 2, 6)
        assert requests(kernel.trace) == ["VFIO_IOMMU_UNMAP_DMA", "madvise"]
        populate(block, 4, 6)
        with pytest.raises(ValueError, match="granule"):
            discard(block, 0, 1)
        with pytest.raises(ValueError, match="granule"):
            discard(block, 1, 3)
        rig.check()


def test_a_late_mapper_and_one_that_comes_back_map_only_what_is_populated(kernel: SpecialKernel) -> None:
    """No page of what is discarded is touched by it."""
    with Rig(kernel, mapper=PAGES) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        discard(block, 0, 3)
        rig.blocks.remove_notifier(rig.mapper)
        assert rig.reached() == []
        rig.blocks.add_notifier(rig.mapper)
        assert [size for _iova, _vaddr, size in rig.reached()] == [PAGE_SIZE]
        rig.check()
        block.remove()


@pytest.mark.parametrize("hole", [(0, 1), (1, 2), (3, 4), (1, 3)])
def test_a_late_mapper_refuses_a_block_whose_holes_its_granules_do_not_make_up(
    kernel: SpecialKernel, hole: tuple[int, int]
) -> None:
    """Whatever is in a granule with what is populated would be in the device's reach, too."""
    with Rig(kernel) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        rig.mapper.close()
        discard(block, *hole)
        with pytest.raises(ValueError, match=r"a part of RAM block 'ring' .*must be a multiple of the granule"):
            GRANULE(rig.container, rig.blocks)
        assert rig.reached() == []
        populate(block, *hole)
        discard(block, 2, 4)
        with GRANULE(rig.container, rig.blocks) as late:
            late._check()
            assert [size for _iova, _vaddr, size in rig.reached()] == [2 * PAGE_SIZE]


def test_a_mapper_that_was_cut_off_behind_an_unmap_finds_out_with_the_next_change(kernel: SpecialKernel) -> None:
    """Another notifier refuses, and a signal handler ends the undo: the mapper has heard one half, and no more."""
    with Rig(kernel, mapper=PAGES) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        rig.mapper.ram_block_discarded(block, pages((1, 2)))
        block.resize(6 * PAGE_SIZE)
        rig.check()
        rig.mapper.ram_block_resized(block, 6 * PAGE_SIZE, 2 * PAGE_SIZE)
        discard(block, 5, 6)
        rig.check()


def test_nothing_is_done_where_nothing_changes(rig: Rig) -> None:
    """No call and no word to anybody."""
    block = rig.add(used=4 * PAGE_SIZE)
    discard(block, 0, 2)
    listener = Listener()
    rig.blocks.add_notifier(listener)
    rig.kernel.clear_trace()
    discard(block, 0, 2)
    populate(block, 2, 4)
    discard(block, 1, 1)
    assert rig.kernel.trace == []
    assert listener.told == []


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [
        (1, PAGE_SIZE, "multiple of"),
        (0, 1, "multiple of"),
        (-PAGE_SIZE, PAGE_SIZE, "multiple of 4096 bytes and not negative"),
        (0, 5 * PAGE_SIZE, "not all in use"),
    ],
)
def test_a_part_that_is_misaligned_or_not_in_use_is_refused_before_any_call(
    rig: Rig, offset: int, size: int, words: str
) -> None:
    """ValueError."""
    block = rig.add(used=4 * PAGE_SIZE)
    rig.kernel.clear_trace()
    for change in (block.discard, block.populate):
        with pytest.raises(ValueError, match=words):
            change(offset, size)
    assert rig.kernel.trace == []


def test_memory_that_cannot_be_dropped_is_zeroed_and_a_warning_says_so(rig: Rig) -> None:
    """As locked memory cannot before Linux 5.18: both calls are refused."""
    block = rig.add(used=2 * PAGE_SIZE)
    ctypes.memset(block.vaddr, 7, block.used_length)
    for nth in (1, 2):
        rig.kernel.fail(call="madvise", errno=errno.EINVAL, nth=nth)
    with pytest.warns(pyvfio.MemoryNotReturnedWarning, match="reads zeros") as caught:
        block.discard(0, PAGE_SIZE)
    assert caught[0].filename == __file__
    assert contents(block) == b"\0\7"
    rig.check()


# ------------------------------------------------------------------------------------------------ who is told


def test_only_what_changes_is_told_and_the_oldest_hears_of_a_discard_first(kernel: SpecialKernel) -> None:
    """The newest of a populate, as of a shrink and a grow."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        order: list[str] = []

        class Ordered(Listener):
            def __init__(self, name: str) -> None:
                super().__init__()
                self.name = name

            def _hear(self, what: str, parts: Sequence[Extent]) -> None:
                super()._hear(what, parts)
                order.append(self.name)

        old, new = Ordered("old"), Ordered("new")
        blocks.add_notifier(old)
        blocks.add_notifier(new)
        block = blocks.add("ram", used_length=8 * PAGE_SIZE, max_length=8 * PAGE_SIZE)
        discard(block, 2, 4)
        discard(block, 0, 6)
        populate(block, 1, 8)
        assert new.told == [
            ("discarded", pages((2, 4))),
            ("discarded", pages((0, 2), (4, 6))),
            ("populated", pages((1, 6))),
        ]
        assert order == ["old", "new"] * 2 + ["new", "old"]


@pytest.mark.parametrize("change", ["discarded", "populated"])
def test_who_refuses_is_heard_and_all_is_as_before(rig: Rig, change: str) -> None:
    """Those who were told are told the reverse; no memory is lost."""
    block = rig.add(used=6 * PAGE_SIZE)
    discard(block, 2, 3)
    ctypes.memset(block.vaddr, 7, block.used_length)
    listener = Listener()
    rig.blocks.add_notifier(listener)
    listener.refuse = change
    before = block.populated, set(rig.reached()), contents(block)
    with pytest.raises(PermissionError):
        (discard if change == "discarded" else populate)(block, 0, 6)
    assert (block.populated, contents(block)) == (before[0], before[2])
    rig.check()
    assert sum(size for _i, _v, size in rig.reached()) == sum(size for _i, _v, size in before[1])


def test_while_a_notifier_reaches_whole_blocks_nothing_can_be_discarded(rig: Rig) -> None:
    """The refusal names it; and it cannot come while something is."""
    block, whole = rig.add(used=2 * PAGE_SIZE), Whole()
    rig.blocks.add_notifier(whole)
    with pytest.raises(pyvfio.DiscardError, match=r"Whole object .* reaches whole blocks"):
        discard(block, 0, 1)
    rig.blocks.remove_notifier(whole)
    discard(block, 0, 1)
    with pytest.raises(pyvfio.DiscardError, match="parts of RAM block 'ring' are discarded"):
        rig.blocks.add_notifier(whole)
    populate(block, 0, 1)
    rig.blocks.add_notifier(whole)


def test_a_removed_block_and_one_in_a_callback_are_not_discarded(kernel: SpecialKernel) -> None:
    """ClosedError and ReentrancyError, for both."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ram", used_length=PAGE_SIZE, max_length=2 * PAGE_SIZE)
        uses: list[Callable[[int, int], None]] = [block.discard, block.populate]

        class Meddler:
            def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
                del block, old_length, new_length
                for use in uses:
                    with pytest.raises(pyvfio.ReentrancyError):
                        use(0, PAGE_SIZE)

        blocks.add_notifier(Meddler())
        block.resize(2 * PAGE_SIZE)
        block.remove()
        for use in uses:
            with pytest.raises(pyvfio.ClosedError):
                use(0, PAGE_SIZE)


# -------------------------------------------------------------------------------------------------- the guard

CLAIMS: dict[str, Callable[[DiscardGuard], DiscardClaim]] = {
    "disable": DiscardGuard.disable,
    "disable_uncoordinated": DiscardGuard.disable_uncoordinated,
    "require": DiscardGuard.require,
    "require_coordinated": DiscardGuard.require_coordinated,
}
CONFLICTS = {
    frozenset(pair)
    for pair in (("disable", "require"), ("disable", "require_coordinated"), ("disable_uncoordinated", "require"))
}


@pytest.mark.parametrize("first", CLAIMS)
@pytest.mark.parametrize("second", CLAIMS)
def test_claims_go_together_or_not_as_in_qemu(first: str, second: str) -> None:
    """In either order, several times, and until they are given up."""
    guard = DiscardGuard()
    held = [CLAIMS[first](guard), CLAIMS[first](guard)]
    if frozenset((first, second)) not in CONFLICTS:
        CLAIMS[second](guard).close()
        return
    for claim in held:
        with pytest.raises(pyvfio.DiscardError, match=f"'{second}' is not compatible with '{first}'"):
            CLAIMS[second](guard)
        claim.close()
        claim.close()
        guard._check()
    with CLAIMS[second](guard) as claim:
        assert claim.kind == second


def test_a_claim_against_discards_is_kept_by_the_list(rig: Rig) -> None:
    """And a mapper rules out those that it is not told of, for as long as it follows."""
    block = rig.add(used=PAGE_SIZE)
    with rig.blocks.discards.disable(), pytest.raises(pyvfio.DiscardError, match="'disable'"):
        discard(block, 0, 1)
    with pytest.raises(pyvfio.DiscardError, match="'disable_uncoordinated'"):
        rig.blocks.discards.require()
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError):
        discard(block, 0, 1)
    rig.blocks.discards.disable().close()  # a discard has no claim afterwards
    discard(block, 0, 1)
    rig.blocks.discards.disable().close()
    rig.mapper.close()
    rig.blocks.discards.require().close()


@pytest.mark.parametrize(
    "follow",
    [lambda rig: pyvfio.DmaMapper(rig.space, rig.blocks), lambda rig: pyvfio.DirtyLog(rig.blocks)],
    ids=["mapper", "log"],
)
def test_whoever_cannot_follow_the_list_claims_nothing(rig: Rig, follow: Callable[[Rig], object]) -> None:
    """In the middle of a change the list takes no notifier."""
    rig.mapper.close()

    def callback(_idstr: str, _length: int) -> None:
        with pytest.raises(pyvfio.ReentrancyError):
            follow(rig)

    rig.blocks.add("ring", used_length=0, max_length=PAGE_SIZE, resized=callback).resize(PAGE_SIZE)
    rig.blocks.discards.require().close()


def test_discarding_and_populating_nothing_does_nothing(kernel: SpecialKernel, rig: Rig) -> None:
    """In the middle of what is populated, and of what is discarded: no call, no notification, no gap."""
    block = rig.add(used=4 * PAGE_SIZE)
    discard(block, 2, 4)
    before = (block.discarded, rig.reached())
    kernel.clear_trace()
    block.discard(PAGE_SIZE, 0)
    block.populate(3 * PAGE_SIZE, 0)
    assert (block.discarded, rig.reached(), kernel.trace) == (*before, [])
    rig.check()
