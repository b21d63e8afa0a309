"""What is refused before anything is written: a driver that is not there or does not take the device, and a device
that is in use."""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Collection
from pathlib import Path

from pyvfio.errors import DeviceNotFoundError, GroupBusyError, Holder, UnavailableError, VfioError, nobody_found
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import group_node, has_iommus, holders_of_group, no_group
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, device_path, link_name, printable, read_device, read_text
from pyvfio.pci.usage import uses_of

_NAME_MAX = 255  # bytes: NAME_MAX of linux/limits.h


def checked_name(driver: str) -> str:
    """The name of a driver. ValueError for text that can be none: a path, or with control characters."""
    if not isinstance(driver, str):
        raise TypeError(f"the name of a driver is text, not {type(driver).__name__}")
    if driver in {"", ".", ".."} or "/" in driver or not driver.isprintable() or len(driver.encode()) > _NAME_MAX:
        raise ValueError(f"not the name of a driver: {driver[: _NAME_MAX + 1]!r}")
    return driver


def check_loaded(kernel: Kernel, driver: str) -> None:
    """Refuse a driver that is not loaded (UnavailableError), and what is no name of one (ValueError)."""
    if not (kernel.sysfs / "bus/pci/drivers" / checked_name(driver)).is_dir():
        raise UnavailableError(
            f"no PCI driver {driver} is loaded", hint=f"Load the module that has it: modprobe {driver}"
        )


def check_driver(kernel: Kernel, device: PciDevice, driver: str) -> None:
    """Refuse a driver that is not loaded; and VFIO's for a bridge, and for a device that can get no group."""
    if driver == NO_DRIVER:
        return
    check_loaded(kernel, driver)
    if "vfio" not in driver:
        return
    if device.is_bridge:
        raise VfioError(
            f"{device.bdf} is a PCI bridge, which {driver} does not take",
            hint="A bridge need not be bound to it: pcieport and no driver at all leave its group viable "
            f"(scripts/unbind --driver {NO_DRIVER} {device.bdf} takes any other from it)",
        )
    if device.iommu_group is not None or _is_unsafe_mode(kernel):
        return
    # A device that has a driver has the group that it gets. Another may get one now, where there is an IOMMU.
    if device.driver is not None or not has_iommus(kernel):
        raise no_group(kernel, device)


def _is_unsafe_mode(kernel: Kernel) -> bool:
    """Whether VFIO makes up groups for devices without an IOMMU."""
    return read_text(kernel.sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode") in {"Y", "1"}


def without_group(kernel: Kernel, bdf: str, driver: str | None) -> DeviceNotFoundError | None:
    """The reason for which VFIO's driver did not take a device, where that is the group which did not come."""
    device = read_device(kernel, bdf)
    if driver is None or "vfio" not in driver or device.iommu_group is not None or _is_unsafe_mode(kernel):
        return None
    return no_group(kernel, device, tried=True)


def check_idle(kernel: Kernel, device: PciDevice, *, force: bool) -> None:
    """Refuse a device whose group is open; and, unless forced, one that the machine itself is using.

    A device's virtual functions go when its driver does, so that they are looked at as well.
    """
    functions = [read_device(kernel, bdf) for bdf in _virtual_functions(kernel, device.bdf)]
    for each in (device, *functions):
        if each.iommu_group is not None:
            _check_group_closed(kernel, each.iommu_group)
    if force or device.driver is None or device.is_bridge:
        return
    for each in (device, *functions):
        if each.driver is not None and not each.is_vfio and (reasons := uses_of(kernel, each.bdf)):
            raise VfioError(
                f"{each.bdf} is in use through {printable(each.driver)}: {', '.join(reasons)}",
                hint="Take the interface down, unmount the disk; or force it, and lose what depends on it",
            )


def _virtual_functions(kernel: Kernel, bdf: str) -> list[str]:
    links = device_path(kernel, bdf).glob("virtfn*")
    return sorted(name for name in map(link_name, links) if name is not None)


def _check_group_closed(kernel: Kernel, group: int) -> None:
    holders = holders_of_group(kernel, group)
    if holders or _is_open_somewhere(kernel, group_node(kernel, group)):
        # Taking a device from VFIO would wait in the kernel until its user closes it (`vfio_unregister_group_dev`).
        raise GroupBusyError(group, holders, hint=_how_to_free(holders))


def _how_to_free(holders: Collection[Holder]) -> str:
    if holders:
        return "Its devices keep their drivers meanwhile: close them there, or end that process"
    return f"Its devices keep their drivers meanwhile, and {nobody_found()}"


def _is_open_somewhere(kernel: Kernel, node: Path) -> bool:
    """Whether the kernel says so, which knows of other namespaces and of device descriptors that outlive the group's
    (`vfio_group_fops_open`); False when this user may not ask."""
    if not node.exists():
        return False
    try:
        kernel.close(kernel.open(str(node), os.O_RDWR))
    except OSError as error:
        return error.errno == errnos.EBUSY
    return False
