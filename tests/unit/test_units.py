"""Lengths, addresses and ranges: the arithmetic."""

from __future__ import annotations

import mmap
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvfio.units import (
    GIB,
    KIB,
    MIB,
    PAGE_SIZE,
    TIB,
    U64_MAX,
    Iova,
    IovaRange,
    align_down,
    align_up,
    check_bool,
    check_whole_number,
    format_ranges,
    format_size,
    is_aligned,
    is_power_of_two,
)

u64 = st.integers(0, U64_MAX)
powers = st.integers(0, 63).map(lambda exponent: 1 << exponent)


def test_the_page_is_that_of_this_process() -> None:
    """PAGE_SIZE is what mmap aligns to."""
    assert PAGE_SIZE == mmap.PAGESIZE


def test_units_are_powers_of_1024() -> None:
    """Each unit is 1024 of the one below."""
    assert (KIB, MIB, GIB, TIB) == (1024, 1024**2, 1024**3, 1024**4)


@pytest.mark.parametrize("number", [1, 2, 4096, 1 << 63, 1 << 64])
def test_powers_of_two_are_recognised(number: int) -> None:
    """1 is one, and so is what does not fit a u64."""
    assert is_power_of_two(number)


@pytest.mark.parametrize("number", [0, -1, -2, 3, 4097, U64_MAX])
def test_other_numbers_are_no_powers_of_two(number: int) -> None:
    """Neither zero nor anything negative is a power of two."""
    assert not is_power_of_two(number)


@given(number=u64, alignment=powers)
def test_aligning_finds_the_nearest_multiple_on_either_side(number: int, alignment: int) -> None:
    """What is aligned down and up is a multiple, less than one alignment away, on its side."""
    down, up = align_down(number, alignment), align_up(number, alignment)
    assert down % alignment == up % alignment == 0
    assert number - alignment < down <= number <= up < number + alignment
    assert is_aligned(number, alignment) == (down == number) == (up == number)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (4097, "4097 bytes"),
        (1024, "1 KiB"),
        (9999 * KIB, "9999 KiB"),
        (10_000 * KIB, "9.8 MiB"),
        (10_000, "9.8 KiB"),
        (3 << 50, "3 PiB"),
        (5 * TIB, "5 TiB"),
        (3 * MIB, "3 MiB"),
        (GIB + MIB, "1025 MiB"),
        (GIB, "1 GiB"),
        (1 << 64, "16 EiB"),
        (520209 * MIB, "508.0 GiB"),
    ],
)
def test_a_size_is_written_in_the_largest_unit_that_divides_it(size: int, text: str) -> None:
    """No digits are lost, but where there are five and more."""
    assert format_size(size) == text


def test_a_range_may_end_at_the_last_address_of_a_u64() -> None:
    """Both ends are inclusive, so the whole of 2^64 can be said."""
    assert IovaRange.of(iova=0, size=1 << 64) == IovaRange(Iova(0), Iova(U64_MAX))
    assert IovaRange(Iova(0), Iova(U64_MAX)).size == 1 << 64


@pytest.mark.parametrize(("start", "size"), [(0, 1), (U64_MAX, 1), (0x1000, 0x3000), (1 << 63, 1 << 63)])
def test_a_range_has_as_many_bytes_as_it_was_made_of(start: int, size: int) -> None:
    """Wherever it begins."""
    made = IovaRange.of(iova=start, size=size)
    assert (made.start, made.last, made.size) == (start, start + size - 1, size)


@pytest.mark.parametrize(("start", "last"), [(1, 0), (-1, 5), (0, 1 << 64), (1 << 64, 1 << 64)])
def test_what_is_no_range_of_u64_is_refused(start: int, last: int) -> None:
    """Empty, negative and too large ranges cannot be made."""
    with pytest.raises(ValueError, match="not a range of u64"):
        IovaRange(Iova(start), Iova(last))


@given(ranges=st.tuples(u64, u64, u64, u64))
def test_containing_and_overlapping_are_what_sets_of_addresses_say(ranges: tuple[int, int, int, int]) -> None:
    """The same holds as for `range` objects."""
    a, b, c, d = ranges
    one = IovaRange(Iova(min(a, b)), Iova(max(a, b)))
    other = IovaRange(Iova(min(c, d)), Iova(max(c, d)))
    common = range(max(one.start, other.start), min(one.last, other.last) + 1)
    assert one.overlaps(other) == other.overlaps(one) == (common.stop > common.start)
    assert one.contains(other) == (common == range(other.start, other.last + 1))


def test_one_shared_address_is_an_overlap_and_neighbours_have_none() -> None:
    """Both ends belong to a range."""
    low, high = IovaRange(Iova(0), Iova(0xFFF)), IovaRange(Iova(0x1000), Iova(0x1FFF))
    assert not low.overlaps(high)
    assert low.overlaps(IovaRange(Iova(0xFFF), Iova(0x1000)))


def test_ranges_are_written_as_the_kernel_writes_them() -> None:
    """In hex, both ends; nothing is `none`."""
    ranges = [IovaRange(Iova(0), Iova(0xFEDFFFFF)), IovaRange(Iova(0xFEF00000), Iova(0x7FFFFFFFFF))]
    assert format_ranges(ranges) == "0x0-0xfedfffff, 0xfef00000-0x7fffffffff"
    assert format_ranges([]) == "none"


class Index:
    """A number of another library, such as numpy's."""

    def __index__(self) -> int:
        """7."""
        return 7


def test_whole_numbers_are_ints_of_any_library() -> None:
    """An int of Python is what comes out."""
    for value, number in ((5, 5), (-1, -1), (1 << 64, 1 << 64), (Index(), 7)):
        found = check_whole_number(value, "size")
        assert (found, type(found)) == (number, int)


@pytest.mark.parametrize("value", [True, False, 1.0, "1", b"1", None])
def test_what_is_no_whole_number_is_refused_by_name(value: object) -> None:
    """A bool is a mistake."""
    with pytest.raises(TypeError, match=f"^size must be a whole number, not {re.escape(repr(value))}$"):
        check_whole_number(value, "size")


def test_a_switch_is_true_or_false_and_nothing_that_is_like_them() -> None:
    """A string "no" would be true."""
    for value in (True, False):
        check_bool(value, "times")
    for other in (1, 0, "no", None):
        with pytest.raises(TypeError, match=f"^times must be True or False, not {other!r}$"):
            check_bool(other, "times")
