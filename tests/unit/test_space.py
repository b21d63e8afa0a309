"""The table of what an address space has put into the kernel."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pyvfio.iommu.space import Mapping
from pyvfio.iommu.table import MappingTable
from pyvfio.units import PAGE_SIZE, U64_MAX, Iova, IovaRange, Vaddr


def table(*mappings: tuple[int, int]) -> MappingTable:
    """With a mapping for each (iova, size), at vaddr iova + 1."""
    made = MappingTable()
    for iova, size in mappings:
        made.add(iova=iova, size=size, vaddr=iova + 1)
        made._check()
    return made


def test_a_mapping_says_the_range_that_it_covers() -> None:
    """Both ends inclusive."""
    assert Mapping(Iova(0x1000), 0x2000, Vaddr(0)).range == IovaRange(Iova(0x1000), Iova(0x2FFF))


def test_mappings_are_listed_by_iova_however_they_came() -> None:
    """With their own sizes and addresses."""
    made = table((0x5000, 0x1000), (0, 0x1000), (0x2000, 0x2000))
    assert list(made) == [
        Mapping(Iova(0), 0x1000, Vaddr(1)),
        Mapping(Iova(0x2000), 0x2000, Vaddr(0x2001)),
        Mapping(Iova(0x5000), 0x1000, Vaddr(0x5001)),
    ]
    assert len(made) == 3


def test_the_mapping_at_an_address_is_the_one_that_covers_it() -> None:
    """From its first byte to its last, and no further."""
    made = table((0x2000, 0x2000), (0x5000, 0x1000))
    found = {iova: made.at(iova) for iova in (0, 0x1FFF, 0x2000, 0x3FFF, 0x4000, 0x4FFF, 0x5FFF, 0x6000, U64_MAX)}
    assert {iova: mapping.iova for iova, mapping in found.items() if mapping} == {
        0x2000: 0x2000,
        0x3FFF: 0x2000,
        0x5FFF: 0x5000,
    }


def test_an_overlap_is_one_shared_address() -> None:
    """Neighbours do not overlap, and what begins before is found."""
    made = table((0x1000, 0x1000), (0x2000, 0x2000), (0x5000, 0x1000))
    assert [m.iova for m in made.overlapping(iova=0x3FFF, size=0x1002)] == [0x2000, 0x5000]
    assert made.overlapping(iova=0x4000, size=0x1000) == []
    assert [m.iova for m in made.overlapping(iova=0, size=1 << 64)] == [0x1000, 0x2000, 0x5000]


def test_the_last_page_of_a_u64_can_be_mapped() -> None:
    """It is found at its first and its last byte."""
    last = U64_MAX - PAGE_SIZE + 1
    made = table((last, PAGE_SIZE))
    assert made.at(last) == made.at(U64_MAX) == Mapping(Iova(last), PAGE_SIZE, Vaddr(last + 1))
    made.discard(iova=last, size=PAGE_SIZE)
    assert len(made) == 0


def test_what_begins_in_a_range_is_forgotten_and_nothing_else() -> None:
    """A mapping that begins before stays, though it reaches in."""
    made = table((0x1000, 0x2000), (0x3000, 0x1000), (0x4000, 0x1000), (0x5000, 0x1000))
    made.discard(iova=0x2000, size=0x3000)
    assert [m.iova for m in made] == [0x1000, 0x5000]
    made.clear()
    assert list(made) == []


def test_a_table_is_what_a_dict_says_after_many_changes() -> None:
    """Every look-up agrees with a walk through a dict."""
    chance = random.Random(1)  # noqa: S311
    made, model = MappingTable(), dict[int, int]()
    for _ in range(600):
        iova, pages = chance.randrange(64) * 0x1000, chance.randrange(1, 4)
        overlapping = [start for start, size in model.items() if start < iova + pages * 0x1000 and iova < start + size]
        assert sorted(overlapping) == [m.iova for m in made.overlapping(iova=iova, size=pages * 0x1000)]
        if overlapping:
            made.discard(iova=overlapping[0], size=model.pop(overlapping[0]))
        else:
            made.add(iova=iova, size=pages * 0x1000, vaddr=iova)
            model[iova] = pages * 0x1000
        made._check()
        assert {m.iova: m.size for m in made} == model


def test_each_change_gives_the_table_a_number_that_it_never_had() -> None:
    """A look-up that was noted with the number is valid while the number is the same. Look-ups change nothing."""
    made, seen = table((0x1000, 0x1000)), set[int]()
    steps: tuple[Callable[[], object], ...] = (
        lambda: made.add(iova=0x3000, size=0x3000, vaddr=0x9000),
        lambda: made.add(iova=0x8000, size=0x1000, vaddr=0),
        lambda: made.remove(made.find(0x8000, 0x1000) or pytest.fail("is there")),
        lambda: made.cut(iova=0x5000, size=0x1000),
        lambda: made.cut(iova=0x3000, size=0x1000),
        lambda: made.discard(iova=0x1000, size=0x1000),
        made.clear,
        lambda: made.add(iova=0x1000, size=0x1000, vaddr=0),
    )
    for step in steps:
        before = made.changes
        seen.add(before)
        assert (made.has(0x1000, 0x1000, 0x1001), made.at(0x20000), made.changes) == (
            0x1001 in {mapping.vaddr for mapping in made},
            None,
            before,
        )
        step()
        made._check()
        assert made.changes not in seen


def test_a_table_that_is_cleared_is_empty_and_takes_mappings_again() -> None:
    """Of few mappings and of many."""
    for count in (0, 1, 2000):
        made = table()
        for number in range(count):
            made.add(iova=number * 0x1000, size=0x1000, vaddr=0)
        assert (len(made), bool(made), made.mapped) == (count, count > 0, count * 0x1000)
        made.clear()
        made._check()
        assert (len(made), bool(made), list(made), made.mapped, made.at(0)) == (0, False, [], 0, None)
        made.add(iova=0x1000, size=0x1000, vaddr=5)
        made._check()
        assert len(made) == 1


def test_exactly_one_mapping_is_had_by_its_place_its_size_and_its_memory() -> None:
    """And nothing else is."""
    made = table((0x1000, 0x2000))
    assert made.has(0x1000, 0x2000, 0x1001)
    for other in ((0x2000, 0x2000, 0x1001), (0x1000, 0x1000, 0x1001), (0x1000, 0x2000, 0x1000), (0x9000, 1, 0)):
        assert made.has(*other) is False
