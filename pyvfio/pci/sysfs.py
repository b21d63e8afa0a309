"""PCI functions as sysfs describes them, and readers of the small files, directories and links of sysfs."""

from __future__ import annotations

import errno
import logging
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyvfio.arguments import checked_kernel
from pyvfio.errors import DeviceNotFoundError, VfioError, descriptor_hint
from pyvfio.guard import uninterrupted
from pyvfio.kernel import Kernel

_logger = logging.getLogger(__name__)

NO_DRIVER = "none"
"""The name of the driver that leaves a device without a driver.

Source: `driver_override` in Documentation/ABI/testing/sysfs-bus-pci, which names "none" as the way to opt out.
"""

CDEVS = "vfio/devices"
"""The directory of the nodes of devices, below the directory of device nodes."""

_RUNNING_SYSFS = Path("/sys")
_BDF = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])")
# PCI-to-PCI, CardBus and semi-transparent bridges, which have a configuration header of type 1 or 2. Host and ISA
# bridges are ordinary devices to the kernel: their drivers do keep a group from being viable.
_BRIDGE_CLASSES = frozenset({0x0604, 0x0607, 0x0609})
NO_SYSFS = "No kernel writes this text: check the mount at this path with findmnt"
"""The hint of errors about texts that sysfs cannot have."""

_AT_ONCE = 4096  # bytes of one read: an attribute of sysfs has no more
_SHOWN = 40  # characters of a wrong text that an error quotes


@dataclass(frozen=True, slots=True)
class PciDevice:
    """A snapshot of a PCI function, read from the directory of the function in sysfs.

    * `class_code` is the 24-bit class, subclass and interface.
    * `driver` is the name of the driver, None without a driver; `driver_override` is None when no override is set.
    * `iommu_group` is the number of the IOMMU group, None without a group.
    * `numa_node` is None when the platform assigns no node.
    * `is_vfio` tells whether `driver` is vfio-pci or a variant of vfio-pci.
    * `is_bridge` tells whether the function is a PCI-to-PCI or CardBus bridge. VFIO never binds bridges.
    * `cdev` is the name of the device's node below /dev/vfio/devices, such as `vfio0`; None without a node.
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
    cdev: str | None = None


def parse_bdf(text: str) -> str:
    """Return the canonical address of a PCI function: lower case, with a domain.

    The domain is 0000 unless `text` has one. Domains can have up to eight digits, as behind Intel VMD.

    Raises: ValueError if `text` is not a PCI address; TypeError if `text` is not a string.

    Example:
        >>> from pyvfio import pci
        >>> pci.parse_bdf("3b:00.1")
        '0000:3b:00.1'
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


def read_device(bdf: str, *, kernel: Kernel | None = None) -> PciDevice:
    """Return a snapshot of a PCI function.

    Raises: ValueError if `bdf` is not a PCI address; DeviceNotFoundError, with the nearest addresses, if no such
    function exists; VfioError, with the name of the file, if sysfs has a text in place of a number.
    Synchronization: any thread.
    Cost: ten small files and one directory, less than a millisecond.
    Source: Documentation/ABI/testing/sysfs-bus-pci; `vfio_device_init` in drivers/vfio/vfio_main.c for `cdev`.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> kernel = FakeKernel()  # without kernel=: the running kernel
        >>> pci.read_device("0000:00:02.0", kernel=kernel).driver
        'vfio-pci'
    """
    kernel = checked_kernel(kernel)
    bdf = parse_bdf(bdf)
    path = device_path(kernel, bdf)
    home = f"{path}/"  # each `path / name` takes as long as the read of a file
    vendor, device, class_code = (read_number(home + name, 16) for name in ("vendor", "device", "class"))
    if vendor is None or device is None or class_code is None:
        raise _not_found(kernel, bdf)
    driver = link_name(home + "driver")
    override = read_text(home + "driver_override")
    group = link_name(home + "iommu_group")
    node = read_number(home + "numa_node", 10)
    return PciDevice(
        bdf=bdf,
        vendor=vendor,
        device=device,
        class_code=class_code,
        driver=driver,
        driver_override=None if override in {None, "", "(null)"} else override,
        iommu_group=None if group is None else parse_number(home + "iommu_group", group, 10),
        numa_node=None if node is None or node < 0 else node,
        is_bridge=class_code >> 8 in _BRIDGE_CLASSES,
        is_vfio=is_vfio_driver(path, driver),
        cdev=cdev_name(path),
    )


def _not_found(kernel: Kernel, bdf: str) -> DeviceNotFoundError:
    names = sorted(list_names(kernel.sysfs / "bus/pci/devices"))
    bus = bdf.rpartition(":")[0]
    beside = [name for name in names if name.startswith(f"{bus}:")]
    if not names:
        hint = f"{kernel.sysfs} has no PCI device at all"
    elif beside:
        hint = f"Bus {bus} has {', '.join(beside)}; pyvfio list shows all devices"
    else:
        import difflib  # noqa: PLC0415 (an error alone needs it)

        near = ", ".join(difflib.get_close_matches(bdf, names, n=3, cutoff=0.0))
        hint = f"There is no bus {bus}; the nearest devices are {near}; pyvfio list shows all devices"
    return DeviceNotFoundError(f"there is no PCI device {bdf}", hint=hint)


def devices(*, kernel: Kernel | None = None) -> tuple[PciDevice, ...]:
    """Return all PCI functions in the order of the addresses; an empty tuple on a machine without PCI.

    pyudev enumerates the running machine's own sysfs. Any other sysfs is read as a directory: libudev has no option for
    another root. Without libudev, the running machine's sysfs is read as a directory too.

    Raises: VfioError, with the name of the file, if sysfs has a text in place of an address or a number.
    Synchronization: any thread. A device that is removed meanwhile is left out.
    Cost: 0.3 ms for each device.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> kernel = FakeKernel()  # without kernel=: the running kernel
        >>> [device.bdf for device in pci.devices(kernel=kernel) if device.is_vfio]
        ['0000:00:02.0', '0000:00:03.0']
    """
    kernel = checked_kernel(kernel)
    found = []
    directory = kernel.sysfs / "bus/pci/devices"
    for bdf in sorted(_udev_names(kernel) or list_names(directory)):
        _check_address(directory, bdf)
        # The device can be removed between the listing and the read.
        with suppress(DeviceNotFoundError):
            found.append(read_device(bdf, kernel=kernel))
    return tuple(found)


def _check_address(directory: Path, name: str) -> None:
    try:
        parse_bdf(name)
    except ValueError as error:
        raise VfioError(f"{directory} has an entry {name!r}, which is not a PCI address", hint=NO_SYSFS) from error


def is_running(kernel: Kernel) -> bool:
    """Return whether `kernel.sysfs` is the running machine's own sysfs, the only one that libudev reads."""
    return kernel.sysfs.resolve() == _RUNNING_SYSFS


def _udev_names(kernel: Kernel) -> list[str]:
    if not is_running(kernel):
        return []
    try:
        import pyudev  # noqa: PLC0415 (importing pyvfio must not require libudev)

        return [str(device.sys_name) for device in pyudev.Context().list_devices(subsystem="pci")]
    except ImportError:
        _logger.debug("no libudev: enumerating %s instead", kernel.sysfs)
        return []


# --- Files -------------------------------------------------------------------------------------------------------


def device_path(kernel: Kernel, bdf: str) -> Path:
    """Return the directory of a PCI function in sysfs; `bdf` must be canonical."""
    return kernel.sysfs / "bus/pci/devices" / bdf


def is_vfio_driver(path: Path, driver: str | None) -> bool:
    """Return whether `driver`, which is bound to the device at `path`, is a driver of VFIO."""
    # A variant driver can have any name. Since Linux 6.1 each VFIO device has a directory vfio-dev below the device.
    return driver is not None and ("vfio" in driver or (path / "vfio-dev").is_dir())


def cdev_name(path: Path) -> str | None:
    """Return the name of the node below /dev/vfio/devices of the device at `path`; None if the kernel made no node.

    A kernel without CONFIG_VFIO_DEVICE_CDEV has the directory vfio-dev/vfioN too, without the file `dev`.
    """
    directory = path / "vfio-dev"
    return next((name for name in sorted(list_names(directory)) if (directory / name / "dev").exists()), None)


def _check_descriptors(error: OSError) -> None:
    """Raise VfioError if the process is out of descriptors: the file can exist nevertheless."""
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        raise VfioError(f"sysfs cannot be read: {error.strerror}", hint=descriptor_hint(error.errno)) from error


def read_text(path: Path | str) -> str | None:
    """Return the text of a small file without the final newline; None if the file cannot be read."""
    try:
        # Not Path.read_text(), which turns a carriage return in a name into a newline.
        return _read(path).decode("utf-8", errors="replace").rstrip("\n")
    except OSError as error:
        _check_descriptors(error)
        return None


@uninterrupted()
def _read(path: Path | str) -> bytes:
    """Read a file as `Path.read_bytes`, which makes nine system calls in place of four."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(file, _AT_ONCE)
        while more := os.read(file, _AT_ONCE):
            data += more
        return data
    finally:
        os.close(file)


def parse_number(path: Path | str, text: str, base: int) -> int:
    """Return `text`, read from `path`, as a number. Raises VfioError with the name of the file."""
    try:
        return int(text, base)
    except ValueError as error:
        raise VfioError(f"{path} contains {text[:_SHOWN]!r}, which is not a number", hint=NO_SYSFS) from error


def read_number(path: Path | str, base: int) -> int | None:
    """Return the number in a small file; None if the file cannot be read. Raises VfioError for any other text."""
    text = read_text(path)
    return None if text is None else parse_number(path, text, base)


def printable(text: str) -> str:
    """Return a name with all control and formatting characters escaped.

    Any user can choose the names of processes, network interfaces and mount points. Unescaped, such a name can move the
    cursor of a terminal or reverse the direction of text.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def list_names(path: Path) -> set[str]:
    """Return the names in a directory; an empty set if the directory cannot be read."""
    try:
        return set(os.listdir(path))
    except OSError as error:
        _check_descriptors(error)
        return set()


def link_name(path: Path | str) -> str | None:
    """Return the last part of the target of a symbolic link; None if `path` is not a link."""
    try:
        return os.path.basename(os.readlink(path))
    except OSError:  # never for want of descriptors: readlink(2) needs none
        return None
