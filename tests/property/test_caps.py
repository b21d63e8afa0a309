"""Whatever is built is read back, and whatever is read ends in a dataclass or in CapabilityError."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pyvfio.errors import CapabilityError
from pyvfio.info import (
    MigrationCapability,
    RawCapability,
    parse_device_info,
    parse_iommu_info,
    parse_irq_info,
    parse_region_info,
    walk,
)
from pyvfio.units import Iova, IovaRange

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
UNKNOWN_IDS = st.integers(6, 0xFFFF)

# id, version, what follows the header
Built = tuple[int, int, bytes]
unknown_capabilities = st.tuples(UNKNOWN_IDS, st.integers(0, 0xFFFF), st.binary(max_size=20))


def build(start: int, capabilities: list[Built], order: list[int]) -> tuple[int, bytes, list[int]]:
    """The bytes of `capabilities` one after another from `start`, chained in `order`: first offset, bytes, offsets."""
    offsets = [start + sum(8 + len(body) for _, _, body in capabilities[:place]) for place in range(len(capabilities))]
    following = dict(zip(order, [offsets[place] for place in order[1:]] + [0], strict=True)) if order else {}
    chain = b"".join(
        struct.pack("=HHI", id_, version, following[place]) + body
        for place, (id_, version, body) in enumerate(capabilities)
    )
    return (offsets[order[0]] if order else 0), chain, offsets


@given(st.data(), st.lists(unknown_capabilities, max_size=6), st.integers(8, 40))
def test_a_chain_in_any_order_is_read_as_it_was_built(data: st.DataObject, built: list[Built], start: int) -> None:
    order = data.draw(st.permutations(range(len(built))))
    first, chain, offsets = build(start, built, order)
    found = list(walk(bytes(start) + chain, first, start))
    assert found == [
        RawCapability(
            built[place][0],
            built[place][1],
            offsets[place],
            chain[offsets[place] - start :][: 8 + len(built[place][2])],
        )
        for place in order
    ]


@st.composite
def iova_ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Ranges without overlap, ascending; two that touch are two."""
    ends = sorted(draw(st.lists(U64, max_size=12, unique=True)))
    return list(zip(ends[::2], ends[1::2], strict=False))


@given(
    data=st.data(),
    ranges=iova_ranges(),
    avail=st.none() | U32,
    migration=st.none() | st.tuples(U32, U64, U64),
    others=st.lists(unknown_capabilities, max_size=3),
    pgsizes=U64.filter(bool),
)
def test_the_info_of_an_iommu_is_read_as_it_was_built(
    *,
    data: st.DataObject,
    ranges: list[tuple[int, int]],
    avail: int | None,
    migration: tuple[int, int, int] | None,
    others: list[Built],
    pgsizes: int,
) -> None:
    shuffled = data.draw(st.permutations(ranges))
    body = struct.pack("=II", len(ranges), 0) + b"".join(struct.pack("=QQ", *each) for each in shuffled)
    capabilities = [(1, 1, body), *others]
    capabilities += [] if avail is None else [(3, 1, struct.pack("=I", avail))]
    capabilities += [] if migration is None else [(2, 1, struct.pack("=IIQQ", migration[0], 0, *migration[1:]))]
    order = data.draw(st.permutations(range(len(capabilities))))
    first, chain, _ = build(24, capabilities, order)
    info = parse_iommu_info(struct.pack("=IIQII", 24 + len(chain), 3, pgsizes, first, 0) + chain)
    assert info.iova_ranges == tuple(IovaRange(Iova(start), Iova(last)) for start, last in ranges)
    assert (info.iova_pgsizes, info.dma_avail) == (pgsizes, 65535 if avail is None else avail)
    assert info.migration == (None if migration is None else MigrationCapability(*migration))
    assert sorted(each.id for each in info.unknown) == sorted(id_ for id_, _, _ in others)


@given(iova_ranges(), st.data())
def test_ranges_of_which_one_is_there_twice_are_refused(ranges: list[tuple[int, int]], data: st.DataObject) -> None:
    assume(ranges)
    again = [*ranges, data.draw(st.sampled_from(ranges))]
    body = struct.pack("=II", len(again), 0) + b"".join(struct.pack("=QQ", *each) for each in again)
    _, chain, _ = build(24, [(1, 1, body)], [0])
    with pytest.raises(CapabilityError, match="overlaps"):
        parse_iommu_info(struct.pack("=IIQII", 24 + len(chain), 3, 0x1000, 24, 0) + chain)


@st.composite
def tangled_chains(draw: st.DrawFn) -> bytes:
    """Headers anywhere that point anywhere: to each other, to themselves, into each other, out of the buffer."""
    buffer = bytearray(draw(st.integers(40, 80)))
    for place in draw(st.lists(st.integers(0, len(buffer) - 8), min_size=1, max_size=5)):
        struct.pack_into("=HHI", buffer, place, 7, 1, draw(st.integers(0, 84)))
    return bytes(buffer)


@given(st.binary(max_size=200) | tangled_chains(), U32 | st.integers(0, 80), st.integers(0, 40))
def test_any_bytes_are_a_chain_or_an_error_and_the_walk_ends(buffer: bytes, first: int, minimum: int) -> None:
    with suppress(CapabilityError):
        for capability in walk(buffer, first, minimum):
            assert capability.offset >= minimum
            assert capability.data == buffer[capability.offset :][: len(capability.data)]
            assert len(capability.data) >= 8


@st.composite
def plausible_answers(draw: st.DrawFn) -> bytes:
    """Small numbers, so that ids, counts and offsets hit; flags and argsz as they may be."""
    halves = draw(st.lists(st.integers(0, 9) | st.sampled_from([16, 20, 24, 32, 40, 48, 56, 64]), max_size=64))
    words = b"".join(struct.pack("=H", half) for half in halves)
    answer = bytearray(words.ljust(draw(st.integers(0, 128)), b"\0"))
    if len(answer) >= 24:
        struct.pack_into("=II", answer, 0, draw(st.integers(0, 140) | st.just(len(answer))), draw(st.just(0xFF) | U32))
        for cap_offset in (12, 16):
            struct.pack_into("=I", answer, cap_offset, draw(st.integers(0, 64)))
    return bytes(answer)


@pytest.mark.parametrize("parse", [parse_iommu_info, parse_region_info, parse_device_info, parse_irq_info])
@given(buffer=st.binary(max_size=160) | plausible_answers())
def test_any_bytes_are_an_answer_or_an_error(parse: Callable[[bytes], object], buffer: bytes) -> None:
    with suppress(CapabilityError):
        parse(buffer)
