"""The capabilities of a PCI device, as configuration space lists them: frozen snapshots.

Source: linux/pci_regs.h (PCI_CAP_ID_*, PCI_EXT_CAP_ID_*); `vfio_cap_init` and `vfio_ecap_init` in
drivers/vfio/pci/vfio_pci_config.c, which leave out the capabilities that they do not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pyvfio.errors import CapabilityError

POWER, VENDOR, EXPRESS, MSIX = 0x01, 0x09, 0x10, 0x11
EXTENDED_VENDOR = 0x0B

_STATUS, _HAS_LIST, _FIRST = 0x06, 0x10, 0x34
_HEADER_END, _STANDARD_END = 0x40, 0x100
_ABSENT = 0xFFFF_FFFF
_SPEEDS = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
_TABLE_ENTRY = 16
_D1, _D2 = 1 << 9, 1 << 10  # PCI_PM_CAP_D1, PCI_PM_CAP_D2
_NO_SOFT_RESET = 1 << 3
_FLR = 1 << 28  # PCI_EXP_DEVCAP_FLR


class _Config(Protocol):
    """Configuration space."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, size: int, /) -> bytes: ...

    def read8(self, offset: int, /) -> int: ...

    def read16(self, offset: int, /) -> int: ...

    def read32(self, offset: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability: `id` as PCI numbers them, and the `offset` in configuration space at which it begins, in bytes."""

    id: int
    offset: int


@dataclass(frozen=True, slots=True)
class MsixCapability(Capability):
    """MSI-X: where the table of vectors and the array of pending bits (PBA) lie.

    `table_bar` and `pba_bar` are numbers of BARs; offsets in the BAR and sizes in bytes. VFIO keeps the table to
    itself: a program enables vectors by `Device.irq`.
    """

    vectors: int
    enabled: bool
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int

    @property
    def table_size(self) -> int:
        """In bytes."""
        return _TABLE_ENTRY * self.vectors

    @property
    def pba_size(self) -> int:
        """In bytes: whole 64-bit words."""
        return -(-self.vectors // 64) * 8


@dataclass(frozen=True, slots=True)
class PowerCapability(Capability):
    """Power management: the `state` that the device is in (0 to 3, D0 to D3hot), and the `states` that it has.

    `keeps_state`: a device that returns from D3hot to D0 needs no new set-up (No_Soft_Reset).
    """

    state: int
    states: tuple[int, ...]
    keeps_state: bool


@dataclass(frozen=True, slots=True)
class PcieCapability(Capability):
    """PCI Express: the link as it is now, and the most that the device can do.

    `speed` and `max_speed` in GT/s, None where the device has no link or a newer one; `width` and `max_width` in lanes.
    `can_flr`: the device has a function-level reset.
    """

    speed: float | None
    width: int
    max_speed: float | None
    max_width: int
    can_flr: bool


@dataclass(frozen=True, slots=True)
class VendorCapability(Capability):
    """A vendor's own capability: `data` is all of it, with the header."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ExtendedVendorCapability(Capability):
    """A vendor's own extended capability: `vendor_id` and `revision` are the vendor's numbers, `data` is all of it."""

    vendor_id: int
    revision: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities of a device when they were read: `standard` ones and `extended` ones, in the list's order."""

    standard: tuple[Capability, ...]
    extended: tuple[Capability, ...]

    def find(self, identity: int) -> Capability | None:
        """Return the first standard capability of that id, None where the device has none."""
        return next((each for each in self.standard if each.id == identity), None)

    def find_extended(self, identity: int) -> Capability | None:
        """Return the first extended capability of that id, None where the device has none."""
        return next((each for each in self.extended if each.id == identity), None)

    @property
    def msix(self) -> MsixCapability | None:
        """MSI-X, None where the device has none."""
        return next((each for each in self.standard if isinstance(each, MsixCapability)), None)

    @property
    def power(self) -> PowerCapability | None:
        """Power management, None where the device has none."""
        return next((each for each in self.standard if isinstance(each, PowerCapability)), None)

    @property
    def pcie(self) -> PcieCapability | None:
        """PCI Express, None for a conventional device."""
        return next((each for each in self.standard if isinstance(each, PcieCapability)), None)

    @property
    def vendor(self) -> tuple[VendorCapability, ...]:
        """The vendor's own standard capabilities."""
        return tuple(each for each in self.standard if isinstance(each, VendorCapability))


def read_capabilities(config: _Config, bdf: str) -> Capabilities:
    """Read the two lists of capabilities of `bdf`.

    Raises CapabilityError for a list that has a loop, leaves its place, or has a capability that does.
    Cost: two reads for each capability, and up to four for one that has a class of its own.
    """
    standard = tuple(_parse(config, bdf, *each) for each in _walk(config, bdf))
    extended = tuple(_parse_extended(config, bdf, *each) for each in _walk_extended(config, bdf))
    return Capabilities(standard, extended)


def _walk(config: _Config, bdf: str) -> Iterator[tuple[int, int]]:
    if not config.read16(_STATUS) & _HAS_LIST:
        return
    seen: set[int] = set()
    at = config.read8(_FIRST) & ~3
    while at:
        _check_place(bdf, at, range(_HEADER_END, _STANDARD_END), seen)
        header = config.read16(at)
        if header & 0xFF == 0xFF:
            raise CapabilityError(f"{bdf} has a capability at {at:#x} that reads {header:#x}, as where no device is")
        yield header & 0xFF, at
        at = header >> 8 & ~3


def _walk_extended(config: _Config, bdf: str) -> Iterator[tuple[int, int]]:
    if config.size <= _STANDARD_END:
        return
    seen: set[int] = set()
    at = _STANDARD_END
    while at:
        _check_place(bdf, at, range(_STANDARD_END, config.size), seen)
        header = config.read32(at)
        if header == _ABSENT:
            if at != _STANDARD_END:
                raise CapabilityError(f"{bdf} has an extended capability at {at:#x} that reads {header:#x}")
            return
        if header & 0xFFFF:  # 0: a capability that VFIO hides (vfio_ecap_init), or no list
            yield header & 0xFFFF, at
        at = header >> 20 & ~3


def _check_place(bdf: str, at: int, places: range, seen: set[int]) -> None:
    if at not in places:
        raise CapabilityError(
            f"the capability list of {bdf} goes on at {at:#x}, and capabilities lie from {places.start:#x} to "
            f"{places.stop - 1:#x}"
        )
    if at in seen:
        raise CapabilityError(f"the capability list of {bdf} has a loop: it comes to {at:#x} a second time")
    seen.add(at)


def _bytes(config: _Config, bdf: str, at: int, size: int, least: int) -> bytes:
    """All of a capability that says itself how long it is."""
    end = _STANDARD_END if at < _STANDARD_END else config.size
    if size < least or at + size > end:
        raise CapabilityError(f"{bdf} has a capability at {at:#x} of {size} bytes, where {least} to {end - at} can be")
    return config.read(at, size)


def _parse(config: _Config, bdf: str, identity: int, at: int) -> Capability:
    if identity == VENDOR:
        return VendorCapability(identity, at, _bytes(config, bdf, at, config.read8(at + 2), 3))
    if identity == MSIX:
        return _parse_msix(_bytes(config, bdf, at, 12, 12), at)
    if identity == POWER:
        return _parse_power(_bytes(config, bdf, at, 8, 8), at)
    if identity == EXPRESS:
        return _parse_express(_bytes(config, bdf, at, 20, 20), at)
    return Capability(identity, at)


def _word(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _parse_msix(data: bytes, at: int) -> MsixCapability:
    control, table, pending = _word(data, 2, 2), _word(data, 4, 4), _word(data, 8, 4)
    return MsixCapability(
        MSIX,
        at,
        vectors=(control & 0x7FF) + 1,
        enabled=bool(control & 0x8000),
        table_bar=table & 7,
        table_offset=table & ~7,
        pba_bar=pending & 7,
        pba_offset=pending & ~7,
    )


def _parse_power(data: bytes, at: int) -> PowerCapability:
    has, control = _word(data, 2, 2), _word(data, 4, 2)
    states = (0, *((1,) if has & _D1 else ()), *((2,) if has & _D2 else ()), 3)
    return PowerCapability(POWER, at, state=control & 3, states=states, keeps_state=bool(control & _NO_SOFT_RESET))


def _parse_express(data: bytes, at: int) -> PcieCapability:
    can, most, now = _word(data, 4, 4), _word(data, 12, 4), _word(data, 18, 2)
    return PcieCapability(
        EXPRESS,
        at,
        speed=_SPEEDS.get(now & 0xF),
        width=now >> 4 & 0x3F,
        max_speed=_SPEEDS.get(most & 0xF),
        max_width=most >> 4 & 0x3F,
        can_flr=bool(can & _FLR),
    )


def _parse_extended(config: _Config, bdf: str, identity: int, at: int) -> Capability:
    if identity != EXTENDED_VENDOR:
        return Capability(identity, at)
    header = _word(_bytes(config, bdf, at, 8, 8), 4, 4)
    data = _bytes(config, bdf, at, header >> 20, 8)
    return ExtendedVendorCapability(identity, at, vendor_id=header & 0xFFFF, revision=header >> 16 & 0xF, data=data)
