"""Which I/O virtual addresses are given out, and which never."""

from __future__ import annotations

import errno

import pytest

from pyvfio.errors import IovaOverlapError, IovaRangeError
from pyvfio.iommu.iova import IOVA_MIN, IovaAllocator, check_dma_bits
from pyvfio.units import GIB, KIB, MIB, PAGE_SIZE, U64_MAX, Iova, IovaRange

PAGE = 4096
LAST_PAGE = U64_MAX + 1 - PAGE


def span(start: int, last: int) -> IovaRange:
    """Both ends inclusive."""
    return IovaRange(Iova(start), Iova(last))


WHOLE = (span(0, U64_MAX),)
MSI = (span(0, 0xFEDF_FFFF), span(0xFEF0_0000, (1 << 39) - 1))
THREE = (span(0, 0x4_FFFF), span(0x8_0000, 0xB_FFFF), span(U64_MAX + 1 - 0x4_0000, U64_MAX))


def allocator(*ranges: IovaRange, page_size: int = PAGE) -> IovaAllocator:
    """Inside `ranges`."""
    made = IovaAllocator(ranges, page_size=page_size)
    made._check()
    return made


def take_all(made: IovaAllocator, size: int, *, top_down: bool = False, dma_bits: int = 64) -> list[int]:
    """Reserve until there is nothing left."""
    taken = []
    while True:
        try:
            taken.append(int(made.reserve(size, top_down=top_down, dma_bits=dma_bits)))
        except IovaRangeError:
            made._check()
            return taken


# ------------------------------------------------------------------------------------------------- where it begins


def test_blocks_are_placed_from_64_kib_upwards() -> None:
    """One behind the other, without a gap."""
    made = allocator(*WHOLE)
    assert [made.reserve(size) for size in (PAGE, MIB, 3 * PAGE)] == [0x1_0000, 0x1_1000, 0x11_1000]
    assert IOVA_MIN == 0x1_0000


def test_temporary_mappings_are_placed_from_the_top_down() -> None:
    """From the last page of a u64, too."""
    made = allocator(*WHOLE)
    assert made.reserve(PAGE, top_down=True) == LAST_PAGE
    assert made.reserve(2 * PAGE, top_down=True) == LAST_PAGE - 2 * PAGE


def test_both_sides_meet_in_the_middle_and_nothing_is_given_out_twice() -> None:
    """Then there is nothing left, and the error says so with the numbers."""
    made = allocator(span(0, 0xF_FFFF))
    low, high = [], []
    for _ in range(120):
        low.append(made.reserve(PAGE))
        high.append(made.reserve(PAGE, top_down=True))
        made._check()
    assert sorted([*low, *high]) == list(range(IOVA_MIN, 0x10_0000, PAGE))
    assert low[-1] + PAGE == high[-1]
    for top_down in (False, True):
        with pytest.raises(IovaRangeError, match="no 4 KiB of IOVA are left") as raised:
            made.reserve(PAGE, top_down=top_down)
        assert raised.value.errno == errno.ENOMEM
        assert raised.value.largest_free == 0
        assert raised.value.ranges == (span(0, 0xF_FFFF),)
        assert "240 ranges are reserved" in str(raised.value)


def test_an_exhausted_allocator_says_how_much_would_still_fit() -> None:
    """What lies below 64 KiB does not count, as `reserve` never gives it out."""
    made = allocator(span(0, 0x2_FFFF))
    with pytest.raises(IovaRangeError, match="longest free run has 128 KiB") as raised:
        made.reserve(132 * KIB)
    assert raised.value.largest_free == made.largest_free == 128 * KIB
    assert made.reserve(made.largest_free) == IOVA_MIN
    assert made.largest_free == 0
    assert allocator(span(0, 0xFFFF)).largest_free == 0


def test_without_ranges_nothing_can_be_reserved() -> None:
    """A container has none before its first group."""
    with pytest.raises(IovaRangeError, match="The IOMMU offers none"):
        allocator().reserve(PAGE)


# ------------------------------------------------------------------------------------------------ the address bits


def test_nothing_is_chosen_above_the_address_bits_of_a_device() -> None:
    """From the bottom up, and from the top of the limit down: its last page is given out, and none behind."""
    made = allocator(*WHOLE)
    assert made.reserve(PAGE, dma_bits=39, top_down=True) == (1 << 39) - PAGE
    assert made.reserve(2 * PAGE, dma_bits=39, top_down=True) == (1 << 39) - 3 * PAGE
    assert take_all(allocator(span(0, 0xFFFF_FFFF)), PAGE, dma_bits=17) == list(range(0x1_0000, 0x2_0000, PAGE))
    assert take_all(allocator(*WHOLE), PAGE, dma_bits=17, top_down=True) == list(range(0x1_F000, 0xF000, -PAGE))


def test_a_block_ends_below_the_limit_not_only_begins_there() -> None:
    """All of its length lies below."""
    with pytest.raises(IovaRangeError, match="dma_bits=17"):
        allocator(*WHOLE).reserve(0x1_1000, dma_bits=17)
    assert allocator(*WHOLE).reserve(0x1_0000, dma_bits=17) == 0x1_0000


def test_when_there_is_room_above_the_limit_alone_the_error_says_so_with_both_numbers() -> None:
    """And names the argument that opens it."""
    made = allocator(span(0, (1 << 40) - 1))
    made.reserve_at(0, (1 << 39) - GIB)
    with pytest.raises(IovaRangeError) as caught:
        made.reserve(2 * GIB, dma_bits=39)
    assert str(caught.value).startswith(
        "reserve(size=0x80000000, dma_bits=0x27): ENOMEM, no 2 GiB of IOVA are left in one piece below 2^39 "
        "(dma_bits=39): the longest free run there has 1 GiB, and 512 GiB are free above it, 1 ranges are reserved"
    )
    assert "DmaMapper(…, dma_bits=…)" in caught.value.hint
    assert (caught.value.largest_free, caught.value.largest_free_above) == (GIB, 512 * GIB)
    assert made.reserve(2 * GIB, dma_bits=40) == (1 << 39) - GIB


def test_when_more_bits_would_not_help_they_are_not_what_the_hint_says() -> None:
    """The message has the numbers all the same; where nothing is above, it has none of the limit."""
    with pytest.raises(IovaRangeError, match=r"dma_bits=39.*512 GiB are free above it") as caught:
        allocator(span(0, (1 << 40) - 1)).reserve(1 << 41, dma_bits=39)
    assert "has more address bits" not in caught.value.hint
    with pytest.raises(IovaRangeError, match="are left in one piece: the longest free run has") as caught:
        allocator(span(0, (1 << 39) - 1)).reserve(1 << 40, dma_bits=39)
    assert caught.value.largest_free_above == 0


def test_the_callers_own_iova_may_lie_above_every_limit() -> None:
    """Up to what the IOMMU offers."""
    made = allocator(*WHOLE)
    assert made.reserve_at(LAST_PAGE, PAGE) == LAST_PAGE


@pytest.mark.parametrize("bits", [16, 65, 0, -1])
def test_a_number_of_address_bits_leaves_room_and_is_one_of_a_u64(bits: int) -> None:
    """Below 64 KiB nothing is chosen."""
    with pytest.raises(ValueError, match="dma_bits must be 17 to 64"):
        check_dma_bits(bits)
    assert [check_dma_bits(bits) for bits in (17, 64)] == [17, 64]


# ---------------------------------------------------------------------------------------------------- holes, edges


def test_holes_are_left_out_from_below_and_from_above() -> None:
    """Every page of three ranges is given out once, from 64 KiB on, and none of what lies between."""
    every = [page for r in THREE for page in range(max(r.start, IOVA_MIN), r.last, PAGE)]
    assert take_all(allocator(*THREE), PAGE) == every
    assert take_all(allocator(*THREE), PAGE, top_down=True) == every[::-1]


@pytest.mark.parametrize("top_down", [False, True])
def test_nothing_lies_across_a_hole(*, top_down: bool) -> None:
    """256 KiB fit into each range of 256 KiB once, and not into what is left of the first."""
    assert sorted(take_all(allocator(*THREE), 256 * KIB, top_down=top_down)) == [
        0x1_0000,
        0x8_0000,
        U64_MAX + 1 - 0x4_0000,
    ]


def test_the_hole_of_the_interrupt_controller_is_never_given_out() -> None:
    """0xfee00000 to 0xfeefffff on x86."""
    made = allocator(*MSI)
    taken = [made.reserve(GIB) for _ in range(8)]
    for iova in taken:
        assert not span(iova, iova + GIB - 1).overlaps(span(0xFEE0_0000, 0xFEEF_FFFF))
    assert taken[2] + GIB <= 0xFEE0_0000
    assert taken[3] >= 0xFEF0_0000


def test_the_last_page_of_a_u64_is_given_out_and_comes_back() -> None:
    """An exclusive end would not fit a u64."""
    made = allocator(span(LAST_PAGE, U64_MAX))
    assert made.reserve(PAGE) == LAST_PAGE
    made.release(LAST_PAGE)
    made._check()
    assert made.reserve_at(LAST_PAGE, PAGE) == LAST_PAGE
    assert made.free_ranges == ()


def test_all_of_a_u64_is_one_run() -> None:
    """2^64 bytes, of which 64 KiB are kept for callers who name them."""
    made = allocator(*WHOLE)
    assert made.reserve_at(0, 1 << 64) == 0
    made.release(0)
    assert made.reserve((1 << 64) - IOVA_MIN) == IOVA_MIN


def test_ranges_are_cut_to_whole_pages_of_the_iommu() -> None:
    """With 64 KiB pages, what does not fill one is of no use."""
    made = allocator(span(0x1_8000, 0x4_7FFF), page_size=64 * KIB)
    assert take_all(made, 64 * KIB) == [0x2_0000, 0x3_0000]


def test_a_range_smaller_than_a_page_gives_nothing() -> None:
    """Nor does one that has a page's size but not its alignment."""
    made = allocator(span(0x1_8000, 0x2_7FFF), page_size=64 * KIB)
    assert made.free_ranges == ()


# ------------------------------------------------------------------------------------------------------ alignment


@pytest.mark.parametrize("top_down", [False, True])
@pytest.mark.parametrize("vaddr", [0x7F12_3456_7000, 0x7F12_3440_0000, 0x1000])
def test_an_iova_is_congruent_to_the_address_modulo_the_alignment(*, vaddr: int, top_down: bool) -> None:
    """So that the IOMMU can use large pages."""
    made = allocator(*MSI)
    made.reserve(PAGE)
    for _ in range(4):
        iova = made.reserve(4 * MIB, alignment=2 * MIB, offset=vaddr, top_down=top_down)
        assert iova % (2 * MIB) == vaddr % (2 * MIB)
        made._check()


def test_the_nearest_congruent_address_is_taken() -> None:
    """Nothing is wasted beyond it: below 2 MiB, where it lies there."""
    made = allocator(*WHOLE)
    assert made.reserve(PAGE, alignment=2 * MIB, offset=0x5_0000) == 0x5_0000
    assert made.reserve(PAGE, alignment=2 * MIB, offset=0x5_0000) == 0x25_0000
    assert made.reserve(PAGE, alignment=2 * MIB, offset=0) == 0x20_0000
    assert made.reserve(2 * PAGE, alignment=2 * MIB, offset=PAGE, top_down=True) == U64_MAX + 1 - 2 * MIB + PAGE


def test_an_address_that_fits_the_top_exactly_is_taken() -> None:
    """The block ends with the range."""
    made = allocator(*WHOLE)
    assert made.reserve(2 * MIB, alignment=2 * MIB, top_down=True) == U64_MAX + 1 - 2 * MIB


@pytest.mark.parametrize("top_down", [False, True])
def test_where_no_congruent_address_is_left_any_other_will_do(*, top_down: bool) -> None:
    """A slower mapping is better than none."""
    made = allocator(span(0x1_0000, 0x1F_FFFF))
    iova = made.reserve(MIB, alignment=2 * MIB, offset=0x18_0000, top_down=top_down)
    assert iova == (0x10_0000 if top_down else 0x1_0000)


def test_an_alignment_below_the_page_is_that_of_the_page() -> None:
    """An IOMMU with 64 KiB pages maps nothing finer."""
    made = allocator(*WHOLE, page_size=64 * KIB)
    assert made.reserve(64 * KIB, alignment=1, offset=0x1234) % (64 * KIB) == 0
    assert made.reserve(64 * KIB, alignment=2 * MIB, offset=0x1_3000) == 0x21_0000


# -------------------------------------------------------------------------------------------------- a caller's own


@pytest.mark.parametrize("iova", [0, PAGE, 0xF000, 0x1_0000, 0xFED0_0000, 0xFEF0_0000, (1 << 39) - PAGE])
def test_a_caller_may_name_any_address_that_the_iommu_has(iova: int) -> None:
    """Also 0, and the last page of a range."""
    made = allocator(*MSI)
    assert made.reserve_at(iova, PAGE) == iova
    assert made.reservations == (span(iova, iova + PAGE - 1),)
    made._check()


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (0xFEE0_0000, PAGE),
        (0xFEDF_F000, 2 * PAGE),
        (0xFEDF_F000, 0x10_3000),
        (1 << 39, PAGE),
        ((1 << 39) - PAGE, 2 * PAGE),
        (LAST_PAGE, PAGE),
        (LAST_PAGE, 2 * PAGE),
    ],
)
def test_an_address_that_is_not_in_one_range_is_refused(iova: int, size: int) -> None:
    """In a hole, across one, behind the end, around the end of a u64; the error has the ranges."""
    made = allocator(*MSI)
    with pytest.raises(IovaRangeError, match="0x0-0xfedfffff, 0xfef00000-0x7fffffffff") as raised:
        made.reserve_at(iova, size)
    assert raised.value.errno == errno.EINVAL
    assert raised.value.ranges == MSI
    assert raised.value.arguments == {"iova": iova, "size": size}
    assert made.reservations == ()
    made._check()


def test_a_mapping_around_the_end_of_a_u64_is_refused() -> None:
    """Though both of its ends are addresses."""
    with pytest.raises(IovaRangeError):
        allocator(*WHOLE).reserve_at(LAST_PAGE, 2 * PAGE)


@pytest.mark.parametrize(("iova", "size"), [(0x1_F000, PAGE), (0x1_E000, 2 * PAGE), (0x2_1000, PAGE), (0, 0x10_0000)])
def test_an_address_that_is_reserved_is_refused_with_what_is_there(iova: int, size: int) -> None:
    """Neighbours are no overlap, one page is."""
    made = allocator(*WHOLE)
    made.reserve_at(0x1_F000, PAGE)
    made.reserve_at(0x2_1000, 2 * PAGE)
    with pytest.raises(IovaOverlapError) as raised:
        made.reserve_at(iova, size)
    assert raised.value.errno == errno.EEXIST
    assert raised.value.existing == tuple(r for r in made.reservations if r.overlaps(span(iova, iova + size - 1)))
    assert made.reserve_at(0x2_0000, PAGE) == 0x2_0000
    made._check()


def test_an_overlap_with_many_reservations_names_the_first_eight() -> None:
    """The rest is a mark of omission in the message, and complete in the error."""
    made = allocator(*WHOLE)
    for number in range(9):
        made.reserve_at((16 + number) * PAGE, PAGE)
    for count in (8, 9):
        with pytest.raises(IovaOverlapError) as raised:
            made.reserve_at(16 * PAGE, count * PAGE)
        assert raised.value.existing == made.reservations[:count]
        named = ", ".join(f"{(16 + number) * PAGE:#x}-{(17 + number) * PAGE - 1:#x}" for number in range(8))
        assert f"is reserved already: {named}" in str(raised.value)
        assert ("…" in str(raised.value)) == (count > 8)


@pytest.mark.parametrize("iova", [1, PAGE - 1, -PAGE, 1 << 64])
def test_an_address_that_can_never_be_right_is_a_value_error(iova: int) -> None:
    """Misaligned, negative or too large."""
    with pytest.raises(ValueError, match="an IOVA must be"):
        allocator(*WHOLE).reserve_at(iova, PAGE)


@pytest.mark.parametrize("size", [0, -PAGE, 1, 2, PAGE // 2, PAGE + 1, PAGE + 2, PAGE + PAGE // 2])
def test_a_size_that_can_never_be_right_is_a_value_error(size: int) -> None:
    """Wherever it is asked for."""
    made = allocator(*WHOLE)
    with pytest.raises(ValueError, match="a size of IOVA"):
        made.reserve(size)
    with pytest.raises(ValueError, match="a size of IOVA"):
        made.reserve_at(0, size)


@pytest.mark.parametrize("number", [0, 3, -1, 4097])
def test_alignments_and_pages_are_powers_of_two(number: int) -> None:
    """0 is none, and not the default either."""
    with pytest.raises(ValueError, match="alignment must be a power of two"):
        allocator(*WHOLE).reserve(PAGE, alignment=number)
    with pytest.raises(ValueError, match="page_size must be a power of two"):
        allocator(page_size=number)
    made = allocator(*WHOLE)
    with pytest.raises(ValueError, match="page_size must be a power of two"):
        made.set_ranges(WHOLE, page_size=number)
    assert made.page_size == PAGE


# ------------------------------------------------------------------------------------------------------- releasing


def test_released_neighbours_are_joined_and_used_again() -> None:
    """In whichever order they are released."""
    made = allocator(span(0x1_0000, 0x4_FFFF))
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (1, 3, 0, 2)):
        taken = [made.reserve(64 * KIB) for _ in range(4)]
        assert not made.free_ranges
        for position in order:
            made.release(taken[position])
            made._check()
        assert made.free_ranges == (span(0x1_0000, 0x4_FFFF),)


def test_nothing_is_joined_across_a_hole() -> None:
    """Two ranges stay two runs."""
    made = allocator(*THREE)
    for iova, size in ((0x4_F000, PAGE), (0x8_0000, PAGE)):
        made.reserve_at(iova, size)
    made.release(0x4_F000)
    made.release(0x8_0000)
    assert made.free_ranges == THREE
    made._check()


@pytest.mark.parametrize("order", [(0x1_F000, 0x2_0000), (0x2_0000, 0x1_F000)])
def test_nothing_is_joined_across_two_ranges_of_the_kernel_that_touch(order: tuple[int, int]) -> None:
    """A mapping lies wholly within one."""
    made = allocator(span(0x1_0000, 0x1_FFFF), span(0x2_0000, 0x2_FFFF))
    for iova in order:
        made.reserve_at(iova, PAGE)
    for iova in order:
        made.release(iova)
        made._check()
    assert made.free_ranges == (span(0x1_0000, 0x1_FFFF), span(0x2_0000, 0x2_FFFF))
    with pytest.raises(IovaRangeError):
        made.reserve(68 * KIB)
    with pytest.raises(IovaRangeError):
        made.reserve_at(0x1_F000, 2 * PAGE)


def test_releasing_what_is_not_reserved_is_a_key_error() -> None:
    """The middle of a reservation is none, and what was released once is none any more."""
    made = allocator(*WHOLE)
    iova = made.reserve(2 * PAGE)
    with pytest.raises(KeyError, match="no IOVA is reserved from 0x"):
        made.release(iova + PAGE)
    made.release(iova)
    with pytest.raises(KeyError):
        made.release(iova)
    made._check()


# -------------------------------------------------------------------------------------------- ranges that change


def test_new_ranges_are_taken_over_around_what_is_reserved() -> None:
    """What they exclude is not given out any more, what they add is."""
    made = allocator(span(0, 0xF_FFFF))
    made.reserve_at(0x4_0000, PAGE)
    made.set_ranges([span(0x8_0000, 0x10_0FFF), span(0x4_0000, 0x4_1FFF)])
    made._check()
    assert made.ranges == (span(0x4_0000, 0x4_1FFF), span(0x8_0000, 0x10_0FFF))
    assert made.free_ranges == (span(0x4_1000, 0x4_1FFF), span(0x8_0000, 0x10_0FFF))


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [span(0, 0x1_FFFF)],
        [span(0, 0x2_0FFF), span(0x2_1000, 0xF_FFFF)],
        [span(0, 0x2_0FFF), span(0x2_2000, 0xF_FFFF)],
    ],
)
def test_ranges_that_make_a_reservation_unusable_are_refused_and_change_nothing(ranges: list[IovaRange]) -> None:
    """It lies outside, in part or across two; the tail of a block would fail much later, when it grows."""
    made = allocator(*MSI)
    made.reserve_at(0x2_0000, 2 * PAGE)
    free = made.free_ranges
    with pytest.raises(IovaRangeError, match="have become unusable: 0x20000-0x21fff") as raised:
        made.set_ranges(ranges, page_size=64 * KIB if not ranges else None)
    assert raised.value.ranges == tuple(ranges)
    assert (made.ranges, made.page_size, made.free_ranges) == (MSI, PAGE, free)
    made._check()


def test_a_page_size_that_cuts_a_reservation_is_refused() -> None:
    """Neither its start nor its end could be mapped any more."""
    for iova, size in ((0x2_1000, 0xF000), (0x2_0000, 0x1000)):
        made = allocator(*WHOLE)
        made.reserve_at(iova, size)
        with pytest.raises(IovaRangeError, match="unusable"):
            made.set_ranges(WHOLE, page_size=64 * KIB)
        assert made.page_size == PAGE
    made = allocator(*WHOLE)
    made.reserve_at(0x2_0000, 64 * KIB)
    made.set_ranges(WHOLE, page_size=64 * KIB)
    assert made.page_size == 64 * KIB
    made._check()


def test_ranges_that_overlap_are_refused() -> None:
    """An address would be given out twice."""
    made = allocator(*WHOLE)
    with pytest.raises(ValueError, match="must not overlap"):
        made.set_ranges([span(0, 0x1_FFFF), span(0x1_F000, 0x2_FFFF)])
    assert made.ranges == WHOLE


def test_the_page_size_stays_when_only_ranges_change() -> None:
    """And is that of the process unless said otherwise."""
    assert IovaAllocator().page_size == PAGE_SIZE
    made = allocator(*WHOLE, page_size=64 * KIB)
    made.set_ranges(MSI)
    assert made.page_size == 64 * KIB


def test_free_counts_the_bytes_of_the_free_ranges() -> None:
    """Before and after a reservation."""
    made = IovaAllocator((span(0x1_0000, 0x4_FFFF),))
    assert made.free == 0x4_0000
    made.reserve(0x1_0000)
    assert made.free == 0x3_0000 == sum(found.size for found in made.free_ranges)
