"""What sysfs says of a PCI function, and the small files, directories and links that it says it with."""

from __future__ import annotations

import difflib
import errno
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyvfio.errors import DeviceNotFoundError, VfioError, descriptor_hint
from pyvfio.kernel import Kernel

_logger = logging.getLogger(__name__)

NO_DRIVER = "none"
"""As a driver to bind to: none at all. sysfs-bus-pci names this value of `driver_override` as the way to opt out."""

_RUNNING_SYSFS = Path("/sys")
_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
# PCI-to-PCI, CardBus and semi-transparent bridges: what has a header of type 1 or 2. Host and ISA bridges are ordinary
# devices to the kernel, and their drivers do keep a group from being viable.
_BRIDGE_CLASSES = frozenset({0x0604, 0x0607, 0x0609})
_NO_SYSFS = "No kernel writes that: see what is mounted there"
_SHOWN = 40  # characters of a text that is wrong


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A snapshot of a PCI function: what its directory in sysfs said when it was read.

    `class_code` is the 24-bit class, subclass and interface; `numa_node` is None where the platform says none;
    `is_vfio` says that `driver` hands the device to user space through VFIO (vfio-pci or a variant of it);
    `is_bridge` that it is a PCI-to-PCI or CardBus bridge, which VFIO never takes.
    """

    bdf: str
    vendor: int
    device: int
    class_code: int
    driver: str | None
    driver_override: str | None
    iommu_group: int | None
    numa_node: int | None
    is_bridge: bool
    is_vfio: bool


def parse_bdf(text: str) -> str:
    """The canonical address of a PCI function: `0000:00:02.0`, lower case, with its domain (0000 where none is given).

    Raises ValueError for any other text, TypeError for no text. Domains may have more than four digits, as those behind
    Intel VMD do.
    """
    if not isinstance(text, str):
        raise TypeError(f"a PCI address is text, such as '0000:00:02.0', not {type(text).__name__}")
    match = _BDF.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(
            f"not a PCI address: {text!r} (expected [domain:]bus:device.function in hexadecimal, such as 0000:00:02.0, "
            "with a device up to 1f and a function up to 7)"
        )
    domain, bus, device, function = match.groups()
    return f"{domain or '0000'}:{bus}:{device}.{function}"


# --- Reading -----------------------------------------------------------------------------------------------------


def read_device(kernel: Kernel, bdf: str) -> PciDevice:
    """What sysfs says about a PCI function now.

    Raises ValueError for what is no address and DeviceNotFoundError, which names what is near, for what is not there;
    VfioError, which names the file, where sysfs does not say a number that it should.
    Cost: ten small files, well below a millisecond. Source: Documentation/ABI/testing/sysfs-bus-pci.
    """
    bdf = parse_bdf(bdf)
    path = device_path(kernel, bdf)
    vendor, device, class_code = (read_number(path / name, 16) for name in ("vendor", "device", "class"))
    if vendor is None or device is None or class_code is None:
        raise _not_found(kernel, bdf)
    driver = link_name(path / "driver")
    override = read_text(path / "driver_override")
    group = link_name(path / "iommu_group")
    node = read_number(path / "numa_node", 10)
    return PciDevice(
        bdf=bdf,
        vendor=vendor,
        device=device,
        class_code=class_code,
        driver=driver,
        driver_override=None if override in {None, "", "(null)"} else override,
        iommu_group=None if group is None else parse_number(path / "iommu_group", group, 10),
        numa_node=None if node is None or node < 0 else node,
        is_bridge=class_code >> 8 in _BRIDGE_CLASSES,
        is_vfio=is_vfio_driver(path, driver),
    )


def _not_found(kernel: Kernel, bdf: str) -> DeviceNotFoundError:
    names = sorted(list_names(kernel.sysfs / "bus/pci/devices"))
    bus = bdf.rpartition(":")[0]
    beside = [name for name in names if name.startswith(f"{bus}:")]
    if not names:
        hint = f"There is no PCI device in {kernel.sysfs} at all"
    elif beside:
        hint = f"On bus {bus} there are {', '.join(beside)}; scripts/list shows all"
    else:
        near = ", ".join(difflib.get_close_matches(bdf, names, n=3, cutoff=0.0))
        hint = f"There is no bus {bus}; the nearest are {near}; scripts/list shows all"
    return DeviceNotFoundError(f"there is no PCI device {bdf}", hint=hint)


def enumerate_devices(kernel: Kernel) -> tuple[PciDevice, ...]:
    """All PCI functions, in the order of their addresses; empty where there is no PCI.

    The running machine's sysfs is enumerated by pyudev; any other root by reading the directory, because libudev cannot
    be given a root, and so is the machine's own where libudev is missing. Raises VfioError, which names the file, where
    sysfs does not say an address or a number. Cost: some 0.3 ms a device.
    """
    devices = []
    directory = kernel.sysfs / "bus/pci/devices"
    for bdf in sorted(_udev_names(kernel) or list_names(directory)):
        _check_address(directory, bdf)
        # A device may go between the listing and the reading of it.
        with suppress(DeviceNotFoundError):
            devices.append(read_device(kernel, bdf))
    return tuple(devices)


def _check_address(directory: Path, name: str) -> None:
    try:
        parse_bdf(name)
    except ValueError as error:
        raise VfioError(f"in {directory} there is {name!r}, which is no PCI address", hint=_NO_SYSFS) from error


def is_running(kernel: Kernel) -> bool:
    """Whether this kernel's sysfs is the running machine's own, of which alone libudev knows."""
    return kernel.sysfs.resolve() == _RUNNING_SYSFS


def _udev_names(kernel: Kernel) -> list[str]:
    if not is_running(kernel):
        return []
    try:
        import pyudev  # noqa: PLC0415 (so that importing pyvfio needs no libudev)

        return [str(device.sys_name) for device in pyudev.Context().list_devices(subsystem="pci")]
    except ImportError:
        _logger.debug("no libudev: enumerating %s instead", kernel.sysfs)
        return []


# --- Files -------------------------------------------------------------------------------------------------------


def device_path(kernel: Kernel, bdf: str) -> Path:
    """The directory of a PCI function; `bdf` is canonical."""
    return kernel.sysfs / "bus/pci/devices" / bdf


def is_vfio_driver(path: Path, driver: str | None) -> bool:
    """Whether `driver`, which has the device at `path`, hands it to user space through VFIO."""
    # A variant driver may have any name; what it registers with VFIO shows below the device since Linux 6.1.
    return driver is not None and ("vfio" in driver or (path / "vfio-dev").is_dir())


def _check_descriptors(error: OSError) -> None:
    """What could not be read for want of a descriptor may well be there."""
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        raise VfioError(f"sysfs cannot be read: {error.strerror}", hint=descriptor_hint(error.errno)) from error


def read_text(path: Path) -> str | None:
    """What a small file says, without the newline; None when it cannot be read."""
    try:
        # Not read_text(), which would take a carriage return in somebody's name for the end of a line.
        return path.read_bytes().decode("utf-8", errors="replace").rstrip("\n")
    except OSError as error:
        _check_descriptors(error)
        return None


def parse_number(path: Path, text: str, base: int) -> int:
    """The number that sysfs says at `path`. VfioError, which names the file, where `text` is none."""
    try:
        return int(text, base)
    except ValueError as error:
        raise VfioError(f"{path} says {text[:_SHOWN]!r}, which is no number", hint=_NO_SYSFS) from error


def read_number(path: Path, base: int) -> int | None:
    """What a small file says as a number; None when it cannot be read. VfioError where it says none."""
    text = read_text(path)
    return None if text is None else parse_number(path, text, base)


def printable(text: str) -> str:
    """A name as it can be printed: what would move a terminal's cursor, or turn its text around, as an escape.

    Processes, network interfaces and mount points have names that any user may choose.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def list_names(path: Path) -> set[str]:
    """What is in a directory; nothing when it cannot be read."""
    try:
        return set(os.listdir(path))
    except OSError as error:
        _check_descriptors(error)
        return set()


def link_name(path: Path) -> str | None:
    """The last part of where a symbolic link leads; None when there is none."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError as error:
        _check_descriptors(error)
        return None
