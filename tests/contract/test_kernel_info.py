"""The bytes that VFIO_IOMMU_GET_INFO writes, one by one (kernel: `vfio_iommu_type1_get_info`)."""

from __future__ import annotations

import errno
import struct
from itertools import pairwise

import pytest

from pyvfio import ioctls
from pyvfio.units import is_power_of_two
from tests.contract.world import BASE, PAGE, Attached, refused

RANGES, MIGRATION, AVAIL = 1, 2, 3
FILL = b"\xaa"


def total(attached: Attached) -> int:
    """Return the number of bytes of the whole answer."""
    size: int = struct.unpack_from("=I", attached.raw_info(16))[0]
    return size


def test_a_short_argsz_is_einval_and_nothing_is_written(v2: Attached) -> None:
    argument = ioctls.vfio_iommu_type1_info(argsz=15, flags=0xAA, iova_pgsizes=0xAA)
    with refused(errno.EINVAL):
        v2.world.ioctl(v2.container, ioctls.VFIO_IOMMU_GET_INFO, argument)
    assert (argument.argsz, argument.flags, argument.iova_pgsizes) == (15, 0xAA, 0xAA)


def test_the_answer_has_page_sizes_and_capabilities_whatever_flags_were_given(v2: Attached) -> None:
    _argsz, flags, sizes = struct.unpack_from("=IIQ", v2.raw_info(16))
    assert flags == 3
    assert sizes & -sizes == PAGE


def test_the_capabilities_come_in_the_kernels_order_each_of_version_1(v2: Attached) -> None:
    answer = v2.raw_info(total(v2))
    assert list(v2.capabilities()) == [MIGRATION, AVAIL, RANGES]
    assert [struct.unpack_from("=H", body, 2)[0] for body in v2.capabilities().values()] == [1, 1, 1]
    assert struct.unpack_from("=I", answer, 16) == (24,)


def test_capabilities_are_padded_to_8_bytes_since_6_6(v2: Attached) -> None:
    sizes = [len(body) for body in v2.capabilities().values()]
    assert sizes == [32, 16 if v2.world.since(6, 6) else 12, 16 + 16 * len(v2.ranges())]
    assert total(v2) == 24 + sum(sizes)


def test_padding_is_zero(v2: Attached) -> None:
    assert v2.capabilities()[AVAIL][12:] == bytes(4 if v2.world.since(6, 6) else 0)


def test_the_migration_capability_has_the_smallest_page_and_256_mib_of_bitmap(v2: Attached) -> None:
    flags, sizes, largest = struct.unpack_from("=I4xQQ", v2.capabilities()[MIGRATION], 8)
    assert (flags, sizes, largest) == (0, PAGE, 1 << 28)


def test_the_ranges_ascend_and_leave_the_interrupts_out(v2: Attached) -> None:
    ranges = v2.ranges()
    assert all(before.last < after.start for before, after in pairwise(ranges))
    assert not any(span.start <= 0xFEE00000 <= span.last for span in ranges)


@pytest.mark.parametrize("argsz", [16, 19, 20, 23, 24])
def test_a_short_buffer_is_told_the_size_and_gets_no_capability(v2: Attached, argsz: int) -> None:
    written = min(argsz, 24) if v2.world.since(6, 6) else (16 if argsz < 20 else 20)
    answer = v2.raw_info(argsz)
    assert answer[written:] == FILL * (len(answer) - written)
    assert answer[16:written] == bytes(written - 16)
    assert struct.unpack_from("=II", answer) == (total(v2), 3)


def test_one_byte_short_is_short(v2: Attached) -> None:
    size = total(v2)
    answer = v2.raw_info(size - 1)
    assert struct.unpack_from("=I", answer) == (size,)
    assert struct.unpack_from("=I", answer, 16) == (0,)
    assert answer[24:] == FILL * (len(answer) - 24)


@pytest.mark.parametrize("more", [0, 1, 100])
def test_a_buffer_that_is_long_enough_keeps_its_argsz_and_nothing_is_written_behind_the_chain(
    v2: Attached, more: int
) -> None:
    size = total(v2)
    answer = v2.raw_info(size + more)
    assert struct.unpack_from("=I", answer) == (size + more,)
    assert answer[size:] == FILL * (len(answer) - size)


def test_the_four_bytes_behind_cap_offset_are_written_since_6_6_only(v2: Attached) -> None:
    assert v2.raw_info(total(v2))[20:24] == (bytes(4) if v2.world.since(6, 6) else FILL * 4)


def test_each_mapping_takes_one_entry_whatever_its_size_and_gives_it_back(v2: Attached) -> None:
    before = v2.avail()
    v2.map(iova=BASE)
    v2.map(iova=0, size=16 * PAGE)
    assert v2.avail() == before - 2
    v2.unmap(iova=0, size=16 * PAGE)
    assert v2.avail() == before - 1


def test_a_refused_mapping_takes_no_entry(v2: Attached) -> None:
    before = v2.avail()
    with refused(errno.EFAULT):
        v2.map(vaddr=0)
    assert v2.avail() == before


def test_page_sizes_are_powers_of_two_by_bit(v2: Attached) -> None:
    (sizes,) = struct.unpack_from("=Q", v2.raw_info(16), 8)
    assert is_power_of_two(sizes & -sizes)


def test_qemus_intel_iommu_has_three_page_sizes_and_all_iovas_of_39_or_48_bits_but_those_of_interrupts(
    v2: Attached,
) -> None:
    assert struct.unpack_from("=Q", v2.raw_info(16), 8) == (0x4020_1000,)
    below, above = v2.ranges()
    assert (below.start, below.last, above.start) == (0, 0xFEDF_FFFF, 0xFEF0_0000)
    assert above.last in ((1 << 39) - 1, (1 << 48) - 1)
