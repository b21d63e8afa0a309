"""Capabilities of a PCI device: what QEMU's devices have, and lists that no device should have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvfio
from pyvfio.device.capabilities import Capabilities, Capability, read_capabilities
from pyvfio.testing.fake import FakeDevice, FakeKernel
from tests.unit.fakes import BDF

LISTED = {0x06: b"\x10\x00"}
# From configuration space of QEMU 7.2's e1000e and nvme, as Linux 7.3.4 shows them to users.
E1000E = {
    **LISTED,
    0x34: b"\xc8",
    0xA0: bytes.fromhex("110004000300000003200000"),
    0xC8: bytes.fromhex("01d0220000000000"),
    0xD0: bytes.fromhex("05e08000000000000000000000000000"),
    0xE0: bytes.fromhex("10a0010000800000000000001104000000001100"),
    0x100: bytes.fromhex("01000214"),
    0x140: bytes.fromhex("03000100"),
}
NVME = {
    **LISTED,
    0x34: b"\x40",
    0x40: bytes.fromhex("11803e000020000000300000"),
    0x60: bytes.fromhex("0100030008000000"),
    0x80: bytes.fromhex("1060020000800010000000001104000000001100"),
    0x100: bytes.fromhex("0e000112"),
    0x120: bytes.fromhex("10000100"),
}


class Config:
    """Configuration space of given bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.reads = 0

    def read(self, offset: int, size: int, /) -> bytes:
        """Bytes, all of them inside."""
        assert 0 <= offset <= self.size - size
        self.reads += 1
        return self.data[offset : offset + size]

    def read8(self, offset: int, /) -> int:
        """A byte."""
        return self.read(offset, 1)[0]

    def read16(self, offset: int, /) -> int:
        """Two bytes, aligned."""
        assert offset % 2 == 0
        return int.from_bytes(self.read(offset, 2), "little")

    def read32(self, offset: int, /) -> int:
        """Four bytes, aligned."""
        assert offset % 4 == 0
        return int.from_bytes(self.read(offset, 4), "little")


def space(parts: Mapping[int, bytes], *, size: int = 4096) -> Config:
    """Configuration space with these bytes at these offsets, and zeros."""
    data = bytearray(size)
    for offset, part in parts.items():
        data[offset : offset + len(part)] = part
    return Config(bytes(data))


def capabilities(parts: Mapping[int, bytes], *, pcie: bool = True) -> Capabilities:
    """The capabilities of a device on a fake kernel that has these bytes."""
    declared = FakeDevice(BDF, config=parts, pcie=pcie)
    with FakeKernel(groups=[(2, [declared])]) as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        return device.capabilities


def ids(found: tuple[Capability, ...]) -> list[tuple[int, int]]:
    """The ids and offsets, in order."""
    return [(each.id, each.offset) for each in found]


def test_an_e1000e_has_power_management_msi_express_and_msix() -> None:
    """In the order of the list; with error reporting and a serial number behind them."""
    found = capabilities(E1000E)
    assert ids(found.standard) == [(1, 0xC8), (5, 0xD0), (0x10, 0xE0), (0x11, 0xA0)]
    assert ids(found.extended) == [(1, 0x100), (3, 0x140)]
    assert found.msix is not None
    assert (found.msix.vectors, found.msix.enabled) == (5, False)
    assert (found.msix.table_bar, found.msix.table_offset, found.msix.table_size) == (3, 0, 80)
    assert (found.msix.pba_bar, found.msix.pba_offset, found.msix.pba_size) == (3, 0x2000, 8)
    assert found.power is not None
    assert (found.power.state, found.power.states, found.power.keeps_state) == (0, (0, 3), False)
    assert found.pcie is not None
    assert (found.pcie.speed, found.pcie.width) == (2.5, 1)
    assert (found.pcie.max_speed, found.pcie.max_width, found.pcie.can_flr) == (2.5, 1, False)
    assert found.find(5) == Capability(5, 0xD0)
    assert found.find_extended(3) == Capability(3, 0x140)
    assert (found.find(0x13), found.find_extended(0x10)) == (None, None)


def test_an_nvme_controller_has_a_function_level_reset_and_keeps_its_state() -> None:
    """63 vectors, with MSI-X enabled; ARI and SR-IOV."""
    found = capabilities(NVME)
    assert found.msix is not None
    assert (found.msix.vectors, found.msix.table_size, found.msix.pba_size) == (63, 1008, 8)
    assert (found.msix.table_bar, found.msix.table_offset, found.msix.pba_offset) == (0, 0x2000, 0x3000)
    assert found.power is not None
    assert found.power.keeps_state
    assert found.pcie is not None
    assert found.pcie.can_flr
    assert ids(found.extended) == [(0xE, 0x100), (0x10, 0x120)]


def test_a_device_without_a_list_has_none() -> None:
    """Whatever its pointer says; a conventional device has no extended ones."""
    assert capabilities({0x34: b"\x40", 0x40: b"\x05\x00"}) == Capabilities((), ())
    assert ids(capabilities({**LISTED, 0x34: b"\x40", 0x40: b"\x05\x00"}, pcie=False).standard) == [(5, 0x40)]


def test_the_states_link_and_vectors_are_those_of_the_registers() -> None:
    """D3hot with D1 and D2 to have; 16 GT/s and 8 lanes of 32 GT/s and 16; 2048 vectors that are enabled."""
    found = capabilities(
        {
            **LISTED,
            0x34: b"\x43",  # the lowest two bits are reserved
            0x40: bytes.fromhex("0150000603000000"),
            0x50: bytes.fromhex("10700200000000000000000005010000000084000000"),
            0x70: bytes.fromhex("1100ff870508000006100000"),
        }
    )
    assert ids(found.standard) == [(1, 0x40), (0x10, 0x50), (0x11, 0x70)]
    assert found.power is not None
    assert (found.power.state, found.power.states) == (3, (0, 1, 2, 3))
    assert found.pcie is not None
    assert (found.pcie.speed, found.pcie.width) == (16.0, 8)
    assert (found.pcie.max_speed, found.pcie.max_width) == (32.0, 16)
    assert found.msix is not None
    assert (found.msix.vectors, found.msix.enabled) == (2048, True)
    assert (found.msix.table_bar, found.msix.table_offset) == (5, 0x800)
    assert (found.msix.pba_bar, found.msix.pba_offset, found.msix.pba_size) == (6, 0x1000, 256)


def test_a_device_on_the_root_complex_has_no_link() -> None:
    """Its speed is None, and so is one that is newer than this library."""
    for code in ("00", "0f"):
        found = capabilities({**LISTED, 0x34: b"\x40", 0x40: bytes.fromhex(f"100092000000000000000000{code}000000")})
        assert found.pcie is not None
        assert (found.pcie.speed, found.pcie.width, found.pcie.max_speed) == (None, 0, None)


def test_a_vendors_own_capabilities_are_bytes() -> None:
    """As many as they say; several of them, as virtio has, and an extended one with the vendor's numbers."""
    first, second = bytes.fromhex("0950100102030405060708090a0b0c0d"), bytes.fromhex("09000411")
    extended = bytes.fromhex("0b000100 341205 01 aabbccdd".replace(" ", ""))
    found = capabilities(
        {**LISTED, 0x34: b"\x40", 0x40: first, 0x50: second, 0x100: extended[:4] + b"\x34\x12\xc5\x00" + extended[8:]}
    )
    assert [each.data for each in found.vendor] == [first, second]
    assert ids(found.standard) == [(9, 0x40), (9, 0x50)]
    own = found.find_extended(0xB)
    assert isinstance(own, pyvfio.ExtendedVendorCapability)
    assert (own.vendor_id, own.revision, own.data[8:]) == (0x1234, 5, extended[8:])


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(("vectors", "size"), [(1, 8), (64, 8), (65, 16), (128, 16), (129, 24)])
def test_the_pending_bits_of_vectors_are_whole_words(vectors: int, size: int, *, enabled: bool) -> None:
    """One bit for each vector. The number of vectors and the switch share a register."""
    control = (vectors - 1 | enabled << 15).to_bytes(2, "little")
    msix = capabilities({**LISTED, 0x34: b"\x40", 0x40: b"\x11\x00" + control}).msix
    assert msix is not None
    assert (msix.vectors, msix.pba_size, msix.enabled) == (vectors, size, enabled)


@pytest.mark.parametrize(
    ("at", "data"),
    [(0xF8, b"\x01"), (0xF4, b"\x11"), (0xEC, b"\x10"), (0xFC, b"\x09\x00\x04"), (0xFC, b"\x09\x00\x03")],
)
def test_a_capability_may_end_with_the_space_of_its_list(at: int, data: bytes) -> None:
    """The last byte is a part of the space, for standard and for extended capabilities."""
    extended = bytes.fromhex("0b000100 3412 8500")
    found = capabilities({**LISTED, 0x34: bytes([at]), at: data, 0x100: bytes.fromhex("010081ff"), 0xFF8: extended})
    assert ids(found.standard) == [(data[0], at)]
    own = found.find_extended(0xB)
    assert isinstance(own, pyvfio.ExtendedVendorCapability)
    assert (own.offset, own.vendor_id, own.revision, own.data) == (0xFF8, 0x1234, 5, extended)


def test_an_extended_capability_that_vfio_hides_is_left_out() -> None:
    """`vfio_ecap_init` leaves the pointer of the first one, and zeros in place of its id."""
    found = capabilities({0x100: bytes.fromhex("00000014"), 0x140: bytes.fromhex("03000100")})
    assert ids(found.extended) == [(3, 0x140)]


BROKEN: Mapping[str, tuple[str, Mapping[int, bytes]]] = {
    "a loop": ("a loop: the list reaches 0x40", {0x34: b"\x40", 0x40: b"\x05\x50", 0x50: b"\x05\x40"}),
    "a loop of one": ("a loop: the list reaches 0x40", {0x34: b"\x40", 0x40: b"\x05\x40"}),
    "into the header": ("continues at 0x10, and", {0x34: b"\x40", 0x40: b"\x05\x10"}),
    "begins in the header": ("continues at 0x4, and", {0x34: b"\x04"}),
    "all ones": ("at 0x40 reads 0xffff", {0x34: b"\x40", 0x40: b"\xff\xff"}),
    "MSI-X at the end": ("has 12 bytes: 12 is the least, and 4 fit", {0x34: b"\xfc", 0xFC: b"\x11\x00"}),
    "power at the end": ("has 8 bytes: 8 is the least, and 4 fit", {0x34: b"\xfc", 0xFC: b"\x01\x00"}),
    "a link at the end": ("has 20 bytes", {0x34: b"\xf0", 0xF0: b"\x10\x00"}),
    "a vendor's that is too long": ("has 255 bytes", {0x34: b"\x40", 0x40: b"\x09\x00\xff"}),
    "a vendor's that is too short": ("has 2 bytes: 3 is the least", {0x34: b"\x40", 0x40: b"\x09\x00\x02"}),
    "an extended loop": ("a loop: the list reaches 0x100", {0x100: bytes.fromhex("01000110")}),
    "out of extended space": (
        "continues at 0x40, and .* from 0x100 to 0xfff",
        {0x100: bytes.fromhex("01000104")},
    ),
    "extended ones": ("at 0x200 reads 0xffffffff", {0x100: bytes.fromhex("01000120"), 0x200: b"\xff" * 4}),
    "a vendor's extended one": ("has 4095 bytes", {0x100: bytes.fromhex("0b000100 0000f0ff".replace(" ", ""))}),
    "a vendor's extended one that is too short": (
        "has 7 bytes: 8 is the least",
        {0x100: bytes.fromhex("0b000100 00007000")},
    ),
    "a vendor's at the end": (
        "has 8 bytes",
        {0x100: bytes.fromhex("010001fc"), 0xFC0: bytes.fromhex("0100c1ff"), 0xFFC: b"\x0b\x00\x01\x00"},
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_list_that_no_device_can_have_is_an_error(kind: str) -> None:
    """CapabilityError says where; nothing hangs."""
    message, parts = BROKEN[kind]
    with pytest.raises(pyvfio.CapabilityError, match=f"{BDF} .*{message}"):
        capabilities({**LISTED, **parts})


@given(st.binary(min_size=512, max_size=512), st.integers(0, 255), st.booleans())
def test_whatever_bytes_there_are_the_walk_ends(data: bytes, first: int, whole: bool) -> None:  # noqa: FBT001
    """With capabilities that are inside, or an error; and in a number of reads that is bounded."""
    size = 4096 if whole else 256
    config = space({0: data[:size], 0x06: b"\x10\x00", 0x34: bytes([first])}, size=size)
    try:
        found = read_capabilities(config, BDF)
    except pyvfio.CapabilityError:
        pass
    else:
        assert all(0x40 <= each.offset < 0x100 for each in found.standard)
        assert all(0x100 <= each.offset < config.size for each in found.extended)
    assert config.reads < 4 * (64 + 1024)


def test_a_snapshot_is_frozen_and_stays_as_it_was() -> None:
    """Each read makes another one."""
    found = capabilities(NVME)
    assert found.msix is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.msix.enabled = False  # type: ignore[misc]
    assert found == capabilities(NVME)
    assert hash(found) == hash(capabilities(NVME))
