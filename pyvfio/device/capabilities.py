"""The capabilities of a PCI device in configuration space: frozen snapshots.

Source: linux/pci_regs.h (PCI_CAP_ID_*, PCI_EXT_CAP_ID_*); `vfio_cap_init` and `vfio_ecap_init` in
drivers/vfio/pci/vfio_pci_config.c, which hide capabilities that VFIO does not know.
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
    """A capability. `id`: the number in PCI. `offset`: the first byte in configuration space."""

    id: int
    offset: int


@dataclass(frozen=True, slots=True)
class MsixCapability(Capability):
    """MSI-X: the places of the table of vectors and of the array of pending bits (PBA).

    `table_bar` and `pba_bar` are numbers of BARs. Offsets in the BAR and sizes are in bytes. User space cannot access
    the table: a program enables vectors by `Device.irq`.
    """

    vectors: int
    enabled: bool
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int

    @property
    def table_size(self) -> int:
        """The size of the table in bytes."""
        return _TABLE_ENTRY * self.vectors

    @property
    def pba_size(self) -> int:
        """The size of the PBA in bytes, in whole 64-bit words."""
        return -(-self.vectors // 64) * 8


@dataclass(frozen=True, slots=True)
class PowerCapability(Capability):
    """Power management: the current `state` (0 to 3, D0 to D3hot), and the supported `states`.

    `keeps_state`: after a return from D3hot to D0, the device needs no new set-up (No_Soft_Reset).
    """

    state: int
    states: tuple[int, ...]
    keeps_state: bool


@dataclass(frozen=True, slots=True)
class PcieCapability(Capability):
    """PCI Express: the current link, and the maximum of the device.

    `speed` and `max_speed` are in GT/s, or None for a device without a link and for unknown speeds. `width` and
    `max_width` are in lanes. `can_flr`: the device has a function-level reset.
    """

    speed: float | None
    width: int
    max_speed: float | None
    max_width: int
    can_flr: bool


@dataclass(frozen=True, slots=True)
class VendorCapability(Capability):
    """A vendor-specific capability. `data`: all bytes, with the header."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ExtendedVendorCapability(Capability):
    """A vendor-specific extended capability. `vendor_id`, `revision`: numbers of the vendor. `data`: all bytes."""

    vendor_id: int
    revision: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The capabilities of a device when they were read: `standard` and `extended`, in the order of the lists.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> device.capabilities.standard
        (Capability(id=5, offset=64),)
        >>> device.capabilities.find(5)
        Capability(id=5, offset=64)
        >>> device.capabilities.msix is None
        True
    """

    standard: tuple[Capability, ...]
    extended: tuple[Capability, ...]

    def find(self, identity: int) -> Capability | None:
        """Return the first standard capability with an id, or None."""
        return next((each for each in self.standard if each.id == identity), None)

    def find_extended(self, identity: int) -> Capability | None:
        """Return the first extended capability with an id, or None."""
        return next((each for each in self.extended if each.id == identity), None)

    @property
    def msix(self) -> MsixCapability | None:
        """MSI-X, or None."""
        return next((each for each in self.standard if isinstance(each, MsixCapability)), None)

    @property
    def power(self) -> PowerCapability | None:
        """Power management, or None."""
        return next((each for each in self.standard if isinstance(each, PowerCapability)), None)

    @property
    def pcie(self) -> PcieCapability | None:
        """PCI Express, or None for a conventional device."""
        return next((each for each in self.standard if isinstance(each, PcieCapability)), None)

    @property
    def vendor(self) -> tuple[VendorCapability, ...]:
        """The vendor-specific standard capabilities."""
        return tuple(each for each in self.standard if isinstance(each, VendorCapability))


def read_capabilities(config: _Config, bdf: str) -> Capabilities:
    """Read the two capability lists of `bdf`.

    Raises CapabilityError for a list with a loop or a bad offset, and for a capability that exceeds configuration
    space. Cost: two reads for each capability, and up to four more for a capability with a class in this module.
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
            raise CapabilityError(f"the capability of {bdf} at {at:#x} reads {header:#x}, as if no device answers")
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
                raise CapabilityError(
                    f"the extended capability of {bdf} at {at:#x} reads {header:#x}, as if no device answers"
                )
            return
        if header & 0xFFFF:  # 0: a capability that VFIO hides (vfio_ecap_init), or no list
            yield header & 0xFFFF, at
        at = header >> 20 & ~3


def _check_place(bdf: str, at: int, places: range, seen: set[int]) -> None:
    if at not in places:
        raise CapabilityError(
            f"the capability list of {bdf} continues at {at:#x}, and capabilities lie from {places.start:#x} to "
            f"{places.stop - 1:#x}"
        )
    if at in seen:
        raise CapabilityError(f"the capability list of {bdf} has a loop: the list reaches {at:#x} twice")
    seen.add(at)


def _bytes(config: _Config, bdf: str, at: int, size: int, least: int) -> bytes:
    """Return the `size` bytes of a capability, which must be `least` at least."""
    end = _STANDARD_END if at < _STANDARD_END else config.size
    if size < least or at + size > end:
        raise CapabilityError(
            f"the capability of {bdf} at {at:#x} has {size} bytes: {least} is the least, and {end - at} fit"
        )
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
