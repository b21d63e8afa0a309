"""The facts of a PCI device that `pyvfio info` shows, as sysfs and configuration space have them: frozen snapshots.

Source: Documentation/ABI/testing/sysfs-bus-pci; `resource_show` in drivers/pci/pci-sysfs.c; linux/ioport.h.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pyvfio.device.capabilities import Capabilities, read_capabilities
from pyvfio.errors import CapabilityError
from pyvfio.kernel import Kernel
from pyvfio.pci.boot import release
from pyvfio.pci.sysfs import device_path, link_name, list_names, read_number, read_text

MODULES = Path("/lib/modules")
"""Where the modules of kernels are, each kernel's below its release."""

_IO, _MEMORY, _PREFETCH, _WIDE, _UNSET = 0x100, 0x200, 0x2000, 0x100000, 0x20000000  # IORESOURCE_*
_ROM = 6  # the place of the expansion ROM, behind the BARs
_HEADER = 64  # bytes of configuration space that every user can read
_STATUS, _HAS_LIST = 0x06, 0x10


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register, or the expansion ROM (`number` 6).

    `start` is the physical address, None for a BAR without one; `size` in bytes; `width` in bits.
    """

    number: int
    kind: str
    start: int | None
    size: int
    width: int
    prefetchable: bool

    @property
    def name(self) -> str:
        """BAR 0 to BAR 5, or ROM."""
        return "ROM" if self.number == _ROM else f"BAR {self.number}"


@dataclass(frozen=True, slots=True)
class Link:
    """The PCI Express link: speeds such as "8.0 GT/s PCIe", widths in lanes; None for an unknown value."""

    speed: str | None
    width: int | None
    max_speed: str | None
    max_width: int | None


@dataclass(frozen=True, slots=True)
class Sriov:
    """SR-IOV: the physical function of a virtual one, or the virtual functions of a physical one and their limit."""

    physical_function: str | None
    virtual_functions: tuple[str, ...]
    total: int


@dataclass(frozen=True, slots=True)
class Power:
    """Power: the `state` (D0 to D3cold), the `runtime` status of the kernel's power management, and whether D3cold is
    allowed; None for a value that the kernel does not give."""

    state: str | None
    runtime: str | None
    d3cold_allowed: bool | None


@dataclass(frozen=True, slots=True)
class Modules:
    """Kernel modules whose alias matches a device: for drivers of the kernel, and for drivers of VFIO."""

    kernel: tuple[str, ...]
    vfio: tuple[str, ...]


def read_bars(kernel: Kernel, bdf: str) -> tuple[Bar, ...]:
    """Return the BARs that a device has, and the ROM."""
    lines = (read_text(device_path(kernel, bdf) / "resource") or "").splitlines()
    return tuple(_bars(lines[: _ROM + 1]))


def _bars(lines: Sequence[str]) -> Iterator[Bar]:
    for number, line in enumerate(lines):
        if not re.fullmatch(r"(0x[0-9a-f]+ ){2}0x[0-9a-f]+", line):
            continue
        start, last, flags = (int(word, 16) for word in line.split())
        if flags & (_IO | _MEMORY):
            yield Bar(
                number=number,
                kind="memory" if flags & _MEMORY else "io",
                start=None if flags & _UNSET else start,
                size=last - start + 1,
                width=64 if flags & _WIDE else 32,
                prefetchable=bool(flags & _PREFETCH),
            )


def read_link(kernel: Kernel, bdf: str) -> Link | None:
    """Return the link of a device; None for a device without one."""
    path = device_path(kernel, bdf)
    speed, most = read_text(path / "current_link_speed"), read_text(path / "max_link_speed")
    if speed is None and most is None:
        return None
    width, max_width = (read_number(path / name, 10) for name in ("current_link_width", "max_link_width"))
    return Link(_known(speed), width or None, _known(most), max_width or None)


def _known(speed: str | None) -> str | None:
    return None if speed is None or speed.startswith("Unknown") else speed


def read_sriov(kernel: Kernel, bdf: str) -> Sriov | None:
    """Return the SR-IOV functions of a device; None for a device without SR-IOV."""
    path = device_path(kernel, bdf)
    total = read_number(path / "sriov_totalvfs", 10)
    above = link_name(path / "physfn")
    if total is None and above is None:
        return None
    links = sorted(
        (name for name in list_names(path) if re.fullmatch(r"virtfn\d+", name)), key=lambda name: int(name[6:])
    )
    return Sriov(above, tuple(found for name in links if (found := link_name(path / name))), total or 0)


def read_power(kernel: Kernel, bdf: str) -> Power:
    """Return the power state of a device."""
    path = device_path(kernel, bdf)
    allowed = read_text(path / "d3cold_allowed")
    return Power(
        read_text(path / "power_state"),
        read_text(path / "power/runtime_status"),
        None if allowed is None else allowed == "1",
    )


def read_reset_methods(kernel: Kernel, bdf: str) -> tuple[str, ...] | None:
    """Return the ways in which the kernel can reset a device, the first one first used; None where the kernel does not
    say (before Linux 5.15)."""
    path = device_path(kernel, bdf)
    methods = read_text(path / "reset_method")
    if methods is not None:
        return tuple(methods.split())
    # The files are there for devices that can be reset: without both, a newer kernel has none and an older cannot say.
    number = re.match(r"(\d+)\.(\d+)", release(kernel))
    new = number is not None and (int(number[1]), int(number[2])) >= (5, 15)
    return () if new and not (path / "reset").exists() else None


def find_modules(kernel: Kernel, bdf: str, modules: Path = MODULES) -> Modules | None:
    """Return the modules that the running kernel's modules.alias names for a device; None without that file.

    Drivers that are built in have no alias there. Cost: some 20,000 lines, 10 ms.
    """
    alias = read_text(device_path(kernel, bdf) / "modalias")
    name = release(kernel)
    table = read_text(modules / name / "modules.alias") if name else None
    if alias is None or table is None:
        return None
    found: dict[str, set[str]] = {"pci:": set(), "vfio_pci:": set()}
    rest = alias.removeprefix("pci:")
    starts = tuple(f"alias {bus}v{vendor}" for bus in found for vendor in (rest[1:9], "*"))
    for line in table.splitlines():
        if line.startswith(starts):
            _, pattern, name = line.split()[:3]
            bus, _, pattern = pattern.partition(":")
            if fnmatchcase(rest, pattern):
                found[f"{bus}:"].add(name)
    return Modules(tuple(sorted(found["pci:"])), tuple(sorted(found["vfio_pci:"])))


class _ConfigFile:
    """Configuration space as it was read from sysfs."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]

    def read8(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 1), "little")

    def read16(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 2), "little")

    def read32(self, offset: int) -> int:
        return int.from_bytes(self.read(offset, 4), "little")


def find_capabilities(kernel: Kernel, bdf: str) -> Capabilities | str:
    """Return the capabilities of a device, or the reason why they cannot be read."""
    try:
        config = _ConfigFile((device_path(kernel, bdf) / "config").read_bytes())
    except OSError as error:
        return f"configuration space cannot be read: {error.strerror}"
    if config.size < _HEADER:
        return f"configuration space has {config.size} bytes, where {_HEADER} or more are expected"
    if config.size == _HEADER and config.read16(_STATUS) & _HAS_LIST:
        return "root alone can read them"
    try:
        return read_capabilities(config, bdf)
    except CapabilityError as error:
        return str(error)
