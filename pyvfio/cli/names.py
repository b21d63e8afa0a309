"""Names of vendors and devices: udev's hardware database, else a pci.ids file, else none.

Source: the properties ID_*_FROM_DATABASE of udev's 60-pci-db rule and of its hwdb; the format of pci.ids (5).
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyvfio.kernel import Kernel
from pyvfio.pci import PciDevice
from pyvfio.pci.sysfs import device_path, is_running

PCI_IDS = tuple(
    Path(place)
    for place in (
        "/usr/share/hwdata/pci.ids",
        "/usr/share/misc/pci.ids",
        "/usr/share/pci.ids",
        "/var/lib/pciutils/pci.ids",
        "/usr/share/misc/pci.ids.gz",
    )
)
"""The files of pci.ids in the usual places."""


@dataclass(frozen=True, slots=True)
class Names:
    """The names of a device; None for an unknown one."""

    vendor: str | None = None
    device: str | None = None


class HardwareDatabase:
    """Names of vendors and devices, from the first source that has any.

    Cost: a file of pci.ids is read once, some 1.5 MB, and searched for each device in some 0.1 ms.
    """

    def __init__(self, kernel: Kernel, places: Sequence[Path] = PCI_IDS) -> None:
        self._kernel = kernel
        self._places = places
        self._udev = _Udev() if is_running(kernel) else None
        self._ids: bytes | None = None

    def names(self, device: PciDevice) -> Names:
        """Return the names of a device."""
        if self._udev is not None and (found := self._udev.names(device_path(self._kernel, device.bdf))) is not None:
            return found
        if self._ids is None:
            self._ids = _read_ids(self._places)
        return find_names(self._ids, device.vendor, device.device)


class _Udev:
    """The properties that udev keeps of a device; nothing where udev or libudev is missing."""

    def __init__(self) -> None:
        self._context = None
        with suppress(ImportError):
            import pyudev  # noqa: PLC0415 (so that importing pyvfio needs no libudev)

            self._context = pyudev.Context()

    def names(self, path: Path) -> Names | None:
        if self._context is None:
            return None
        import pyudev  # noqa: PLC0415

        try:
            found = pyudev.Devices.from_sys_path(self._context, str(path)).properties
            vendor, device = found.get("ID_VENDOR_FROM_DATABASE"), found.get("ID_MODEL_FROM_DATABASE")
        except pyudev.DeviceNotFoundError:
            return None
        return Names(vendor, device) if vendor or device else None


def _read_ids(places: Sequence[Path]) -> bytes:
    for place in places:
        with suppress(OSError, EOFError):
            return gzip.decompress(place.read_bytes()) if place.suffix == ".gz" else place.read_bytes()
    return b""


def find_names(ids: bytes, vendor: int, device: int) -> Names:
    """Return the names of a vendor and a device, as a file of pci.ids has them."""
    found = _entry(b"\n" + ids, f"\n{vendor:04x}  ")
    if found is None:
        return Names()
    name, below = found
    # The vendor's devices end at the next line that is neither indented nor empty nor a comment.
    lines = []
    for line in below.split(b"\n"):
        if line and line[:1] not in b"\t#":
            break
        lines.append(line)
    entry = _entry(b"\n" + b"\n".join(lines), f"\n\t{device:04x}  ")
    return Names(name, None if entry is None else entry[0])


def _entry(text: bytes, start: str) -> tuple[str, bytes] | None:
    """The rest of the line that begins with `start`, and the text below."""
    at = text.find(start.encode())
    if at < 0:
        return None
    name, _, below = text[at + len(start) :].partition(b"\n")
    return name.decode("utf-8", errors="replace").strip(), below
