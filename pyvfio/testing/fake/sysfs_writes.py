"""Writes to the sysfs of a fake kernel that change the driver of a device.

Source: drivers/pci/pci-sysfs.c, drivers/base/bus.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

from pyvfio.testing.fake.process import refuse


def write_sysfs(
    path: Path, value: str, *, sysfs: Path, bind: Callable[[str, str | None], object], own_driver: str | None
) -> None:
    """Take a write as the kernel does. `own_driver`: the driver that matches the device without an override.

    Raises OSError: ENODEV for another driver than the device has or takes, EACCES for a file that takes no text here.
    """
    word = value.strip()
    drivers, override = sysfs / "bus/pci/drivers", sysfs / "bus/pci/devices" / word / "driver_override"
    link = override.parent / "driver"
    driver = link.readlink().name if link.is_symlink() else None
    match path.name:
        case "driver_override":
            path.write_text(f"{word or '(null)'}\n", encoding="ascii")
        case "unbind" if driver is not None and driver == path.parent.name:
            bind(word, None)
        case "bind" | "drivers_probe":
            chosen = override.read_text(encoding="ascii").strip()
            wanted = own_driver if chosen == "(null)" else chosen
            if path.name == "bind" and (driver is not None or wanted != path.parent.name):
                refuse(errno.ENODEV)
            if driver is None and wanted is not None and (drivers / wanted).is_dir():
                bind(word, wanted)
        case "unbind":
            refuse(errno.ENODEV)
        case _:
            refuse(errno.EACCES)


def address_of(path: Path, value: str) -> str:
    """Return the PCI address that a write is about: the directory of an override, or the text."""
    return path.parent.name if path.name == "driver_override" else value.strip()
