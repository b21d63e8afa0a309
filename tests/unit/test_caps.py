"""The answers of the INFO ioctls: as 6.1 and 6.12 gave them, byte for byte, and as no kernel should."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from pyvfio import ioctls
from pyvfio.errors import CapabilityError
from pyvfio.info import (
    DeviceInfo,
    IommuInfo,
    IrqInfo,
    MigrationCapability,
    RawCapability,
    RegionInfo,
    parse_device_info,
    parse_iommu_info,
    parse_irq_info,
    parse_region_info,
    walk,
)
from pyvfio.units import Iova, IovaRange

# argsz, flags, iova_pgsizes, cap_offset, padding; then MIGRATION at 24, DMA_AVAIL, IOVA_RANGE with two ranges: what
# Intel's IOMMU in QEMU gives, whose hole is the window of the MSIs.
INFO_6_1 = bytes.fromhex(
    "74000000 03000000 0010204000000000 18000000 00000000"
    "0200 0100 38000000  00000000 00000000 0010000000000000 0000001000000000"
    "0300 0100 44000000  ffff0000"
    "0100 0100 00000000  02000000 00000000"
    "0000000000000000 ffffdffe00000000 0000f0fe00000000 ffffffff7f000000"
)
INFO_6_12 = bytes.fromhex(
    "78000000 03000000 0010204000000000 18000000 00000000"
    "0200 0100 38000000  00000000 00000000 0010000000000000 0000001000000000"
    "0300 0100 48000000  ffff0000 00000000"
    "0100 0100 00000000  02000000 00000000"
    "0000000000000000 ffffdffe00000000 0000f0fe00000000 ffffffff7f000000"
)
INFO = IommuInfo(
    iova_pgsizes=0x4020_1000,
    iova_ranges=(
        IovaRange(Iova(0), Iova(0xFEDF_FFFF)),
        IovaRange(Iova(0xFEF0_0000), Iova(0x7F_FFFF_FFFF)),
    ),
    dma_avail=65535,
    migration=MigrationCapability(flags=0, pgsize_bitmap=0x1000, max_dirty_bitmap_size=0x1000_0000),
)


def capability(id_: int, next_: int, body: bytes = b"", *, version: int = 1) -> bytes:
    return struct.pack("=HHI", id_, version, next_) + body


def iommu(*caps: bytes, flags: int = 3, pgsizes: int = 0x1000, first: int = 24) -> bytes:
    chain = b"".join(caps)
    return struct.pack("=IIQII", 24 + len(chain), flags, pgsizes, first, 0) + chain


def iova_ranges(*pairs: tuple[int, int], count: int | None = None, next_: int = 0) -> bytes:
    body = struct.pack("=II", len(pairs) if count is None else count, 0)
    return capability(1, next_, body + b"".join(struct.pack("=QQ", *pair) for pair in pairs))


def region(*caps: bytes, flags: int = 0xF, size: int = 0x4000, cap_offset: int = 32) -> bytes:
    chain = b"".join(caps)
    return struct.pack("=IIIIQQ", 32 + len(chain), flags, 2, cap_offset, size, 2 << 40) + chain


def test_the_info_of_6_1_is_116_bytes_with_a_capability_at_68_which_is_not_aligned() -> None:
    assert len(INFO_6_1) == 116
    assert [each.offset for each in walk(INFO_6_1, 24, 24)] == [24, 56, 68]
    assert parse_iommu_info(INFO_6_1) == INFO


def test_the_info_of_6_12_is_120_bytes_with_the_same_contents() -> None:
    assert len(INFO_6_12) == 120
    assert [each.offset for each in walk(INFO_6_12, 24, 24)] == [24, 56, 72]
    assert parse_iommu_info(INFO_6_12) == INFO


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_bytes_like_buffer_is_read(kind: type[bytes | bytearray | memoryview]) -> None:
    assert parse_iommu_info(kind(INFO_6_1)) == INFO


def test_what_lies_behind_argsz_is_not_the_kernels() -> None:
    assert parse_iommu_info(INFO_6_1 + b"\xff" * 900) == INFO
    assert parse_iommu_info(iommu(capability(77, 0, b"mine")) + b"yours").unknown[0].data[8:] == b"mine"
    with pytest.raises(CapabilityError, match="its 2 entries end at 48"):
        parse_iommu_info(iommu(iova_ranges((0, 1), count=2)) + bytes(16))


def test_a_chain_that_begins_at_0_is_empty() -> None:
    assert list(walk(bytes(100), 0, 24)) == []


def test_an_unknown_capability_goes_up_to_the_next_header_and_the_last_to_the_end() -> None:
    chain = capability(77, 40, b"abcdefgh") + capability(78, 0, b"ijk", version=9)
    assert list(walk(bytes(24) + chain, 24, 24)) == [
        RawCapability(77, 1, 24, chain[:16]),
        RawCapability(78, 9, 40, chain[16:]),
    ]
    assert [each.id for each in parse_iommu_info(iommu(chain)).unknown] == [77, 78]


def test_a_chain_may_run_backwards() -> None:
    chain = capability(5, 0, b"last") + capability(6, 24, b"first")
    assert [(each.offset, each.data[8:]) for each in walk(bytes(24) + chain, 36, 24)] == [(36, b"first"), (24, b"last")]


@pytest.mark.parametrize(
    ("buffer", "first", "complaint"),
    [
        (bytes(24) + capability(4, 24), 24, "capability 4 at offset 24 names offset 24 .* is a loop"),
        (bytes(24) + capability(4, 32) + capability(5, 24), 24, "capability 5 at offset 32 names offset 24"),
        (bytes(24) + capability(4, 8), 24, "capability 4 at offset 24 names .* offset 8, inside the structure of 24"),
        (bytes(24) + capability(4, 25), 24, "capability 4 at offset 24 names .* offset 25, whose header does not fit"),
        (bytes(24) + capability(4, 28, bytes(4)), 24, "capability 4 at offset 24: another one begins .* at 28"),
        (bytes(31), 24, "the answer names a capability at offset 24, whose header does not fit 31 bytes"),
        (bytes(64), 23, "the answer names a capability at offset 23, inside the structure of 24 bytes"),
        (bytes(64), 0xFFFF_FFFF, "the answer names a capability at offset 4294967295, whose header"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_with_its_offset(buffer: bytes, first: int, complaint: str) -> None:
    with pytest.raises(CapabilityError, match=complaint):
        list(walk(buffer, first, 24))


def test_without_capabilities_the_iommu_takes_65535_mappings_and_names_no_ranges() -> None:
    assert parse_iommu_info(iommu(flags=1, first=0)) == IommuInfo(0x1000, None, 65535, None)


def test_the_structure_of_16_bytes_of_an_old_kernel_is_an_answer() -> None:
    assert parse_iommu_info(struct.pack("=IIQ", 16, 1, 0x201000)) == IommuInfo(0x201000, None, 65535, None)


def test_cap_offset_is_not_looked_at_without_the_flag_of_the_iommu() -> None:
    assert parse_iommu_info(iommu(flags=1, first=0xDEAD_BEEF)).unknown == ()


def test_page_sizes_without_their_flag_are_those_of_4_kib() -> None:
    assert parse_iommu_info(iommu(flags=0, pgsizes=0xFFFF, first=0)).iova_pgsizes == 0x1000


def test_no_page_size_at_all_is_refused() -> None:
    with pytest.raises(CapabilityError, match="page sizes is empty"):
        parse_iommu_info(iommu(flags=1, pgsizes=0, first=0))


def test_mappings_left_are_read() -> None:
    assert parse_iommu_info(iommu(capability(3, 0, struct.pack("=I", 3)))).dma_avail == 3


def test_ranges_come_out_ascending() -> None:
    found = parse_iommu_info(iommu(iova_ranges((0x5000, 0x5FFF), (0, 0xFFF)))).iova_ranges
    assert found == (IovaRange(Iova(0), Iova(0xFFF)), IovaRange(Iova(0x5000), Iova(0x5FFF)))


def test_a_range_may_be_one_byte_or_end_with_the_last_of_u64() -> None:
    found = parse_iommu_info(iommu(iova_ranges((7, 7), (8, 2**64 - 1)))).iova_ranges
    assert found == (IovaRange(Iova(7), Iova(7)), IovaRange(Iova(8), Iova(2**64 - 1)))


def test_no_range_at_all_is_not_the_same_as_ranges_that_are_not_named() -> None:
    assert parse_iommu_info(iommu(iova_ranges())).iova_ranges == ()


@pytest.mark.parametrize(
    ("chain", "complaint"),
    [
        (
            iova_ranges((0x2000, 0x1FFF)),
            "capability 1 at offset 24: the range from 0x2000 ends before its start, at 0x1fff",
        ),
        (iova_ranges((0, 0x1000), (0x1000, 0x1FFF)), "from 0x1000 overlaps one that ends at 0x1000"),
        (iova_ranges((0, 1), count=2), "capability 1 at offset 24 has 32 bytes, and its 2 entries end at 48"),
        (iova_ranges(count=0xFFFF_FFFF), "capability 1 at offset 24 has 16 bytes"),
        (
            capability(1, 0, bytes(4)),
            "capability 1 at offset 24 has 12 bytes, and vfio_iommu_type1_info_cap_iova_range",
        ),
        (capability(3, 0), "capability 3 at offset 24 has 8 bytes, and vfio_iommu_type1_info_dma_avail has 12"),
        (capability(2, 0, bytes(20)), "capability 2 at offset 24 has 28 bytes, and .*_migration has 32"),
        (capability(3, 36, bytes(4)) + capability(3, 0, bytes(4)), "capability 3 at offset 36 repeats .* offset 24"),
        (capability(3, 0, bytes(4), version=2), "capability 3 at offset 24 has version 2, and only version 1 is known"),
    ],
)
def test_a_capability_of_the_iommu_that_cannot_be_is_refused(chain: bytes, complaint: str) -> None:
    with pytest.raises(CapabilityError, match=complaint):
        parse_iommu_info(iommu(chain))


@pytest.mark.parametrize("parse", [parse_iommu_info, parse_region_info, parse_device_info, parse_irq_info])
def test_an_answer_that_is_not_whole_is_refused_for_its_chain_would_look_empty(
    parse: Callable[[bytes], object],
) -> None:
    with pytest.raises(CapabilityError, match="needs 120 bytes and the buffer holds 40"):
        parse(struct.pack("=II", 120, 0xFF) + bytes(32))
    with pytest.raises(CapabilityError, match="15 bytes long"):
        parse(bytes(15))
    with pytest.raises(CapabilityError, match="says that it is 15 bytes long"):
        parse(struct.pack("=II", 15, 0) + bytes(32))


def test_a_region_without_capabilities_keeps_what_the_caller_left_in_cap_offset() -> None:
    found = parse_region_info(region(flags=7, cap_offset=0x1234_5678))
    assert found == RegionInfo(index=2, flags=ioctls.VfioRegionInfoFlags(7), size=0x4000, offset=2 << 40)


def test_the_region_with_the_msix_table_says_that_it_may_be_mapped_whole() -> None:
    found = parse_region_info(region(capability(3, 0)))
    assert (found.msix_mappable, found.sparse, found.type) == (True, None, None)


def test_a_sparse_region_lists_its_parts_and_parts_of_no_bytes_are_dropped() -> None:
    areas = struct.pack("=IIQQQQQQ", 3, 0, 0, 0x1000, 0x3000, 0x1000, 0x2000, 0)
    assert parse_region_info(region(capability(1, 0, areas))).sparse == ((0, 0x1000), (0x3000, 0x1000))


def test_a_region_of_the_devices_own_says_its_type() -> None:
    found = parse_region_info(region(capability(2, 48, struct.pack("=II", 0x8000_8086, 1)), capability(9, 0)))
    assert (found.type, found.subtype, [each.id for each in found.unknown]) == (0x8000_8086, 1, [9])


@pytest.mark.parametrize(
    ("chain", "complaint"),
    [
        (
            capability(1, 0, struct.pack("=IIQQ", 1, 0, 0x3001, 0x1000)),
            "0x1000 bytes at 0x3001 do not lie in .* 0x4000",
        ),
        (capability(1, 0, struct.pack("=IIQQ", 2, 0, 0, 0x1000)), "has 32 bytes, and its 2 entries end at 48"),
        (capability(2, 0, bytes(4)), "capability 2 at offset 32 has 12 bytes, and vfio_region_info_cap_type has 16"),
    ],
)
def test_a_capability_of_a_region_that_cannot_be_is_refused(chain: bytes, complaint: str) -> None:
    with pytest.raises(CapabilityError, match=complaint):
        parse_region_info(region(chain))


@pytest.mark.parametrize("size", [16, 20, 24])
def test_a_device_is_described_by_16_bytes_or_20_or_24(size: int) -> None:
    found = parse_device_info(struct.pack("=IIII", size, 3, 9, 5).ljust(size, b"\0"))
    assert found == DeviceInfo(flags=ioctls.VfioDeviceFlags(3), num_regions=9, num_irqs=5)


def test_a_device_says_which_atomic_operations_its_root_completes() -> None:
    chain = capability(5, 0, struct.pack("=II", 3, 0))
    found = parse_device_info(struct.pack("=IIIIII", 40, 0x82, 9, 5, 24, 0) + chain)
    assert found.atomic_comp == ioctls.VFIO_PCI_ATOMIC_COMP32 | ioctls.VFIO_PCI_ATOMIC_COMP64


def test_cap_offset_is_not_looked_at_without_the_flag_of_the_device() -> None:
    answer = struct.pack("=IIIIII", 40, 2, 9, 5, 24, 0) + capability(5, 0, struct.pack("=II", 3, 0))
    assert parse_device_info(answer) == DeviceInfo(flags=ioctls.VfioDeviceFlags(2), num_regions=9, num_irqs=5)


def test_the_chain_of_a_device_begins_at_20_before_the_structure_had_24_bytes() -> None:
    found = parse_device_info(struct.pack("=IIIII", 32, 0x82, 9, 5, 20) + capability(1, 0, b"zpci"))
    assert [(each.id, each.data[8:]) for each in found.unknown] == [(1, b"zpci")]


def test_an_interrupt_has_no_chain() -> None:
    found = parse_irq_info(struct.pack("=IIII", 16, 9, 2, 5))
    assert found == IrqInfo(index=2, flags=ioctls.VFIO_IRQ_INFO_EVENTFD | ioctls.VFIO_IRQ_INFO_NORESIZE, count=5)
