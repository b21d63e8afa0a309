"""Checks before the first write: the driver is loaded and fits the device, and the device is not in use."""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from pyvfio.errors import DeviceNotFoundError, GroupBusyError, Holder, UnavailableError, VfioError, nobody_found
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import group_node, has_iommus, holders_of_group, no_group
from pyvfio.pci.noiommu import is_enabled
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, device_path, link_name, printable, read_device
from pyvfio.pci.usage import Use, find_uses

_NAME_MAX = 255  # bytes: NAME_MAX of linux/limits.h


def checked_name(driver: str) -> str:
    """Return the name of a driver. Raises ValueError for a path, control characters, or more than 255 bytes."""
    if not isinstance(driver, str):
        raise TypeError(f"the name of a driver is text, not {type(driver).__name__}")
    if driver in {"", ".", ".."} or "/" in driver or not driver.isprintable() or len(driver.encode()) > _NAME_MAX:
        raise ValueError(f"not the name of a driver: {driver[: _NAME_MAX + 1]!r}")
    return driver


def check_loaded(kernel: Kernel, driver: str, bdf: str) -> None:
    """Raise UnavailableError if the driver is not loaded, ValueError if the name is not valid. `bdf`: for the hint."""
    if not (kernel.sysfs / "bus/pci/drivers" / checked_name(driver)).is_dir():
        hint = f"Load the driver's module: modprobe {driver}"
        if "vfio" in driver:
            hint += f". If there is no such module, pyvfio doctor {bdf} names the remedy"
        raise UnavailableError(f"no PCI driver {driver} is loaded", hint=hint)


def check_driver(kernel: Kernel, device: PciDevice, driver: str) -> None:
    """Refuse a driver that is not loaded, and a VFIO driver for a bridge or for a device that can have no group."""
    if driver == NO_DRIVER:
        return
    check_loaded(kernel, driver, device.bdf)
    if "vfio" not in driver:
        return
    if device.is_bridge:
        raise VfioError(
            f"{device.bdf} is a PCI bridge, and {driver} binds no bridges",
            hint="The group is viable while the bridge has pcieport or no driver. To remove another driver: "
            f"pyvfio unbind --driver {NO_DRIVER} {device.bdf}",
        )
    if device.iommu_group is not None or is_enabled(kernel):
        return
    # Binding a driver makes the group. So a device with a driver and without a group never gets a group.
    if device.driver is not None or not has_iommus(kernel):
        raise no_group(kernel, device)


def without_group(kernel: Kernel, bdf: str, driver: str | None) -> DeviceNotFoundError | None:
    """Return the error if the missing group is the reason why the VFIO driver did not bind; None otherwise."""
    device = read_device(bdf, kernel=kernel)
    if driver is None or "vfio" not in driver or device.iommu_group is not None or is_enabled(kernel):
        return None
    return no_group(kernel, device, tried=True)


def check_idle(kernel: Kernel, device: PciDevice, *, force: bool) -> None:
    """Refuse a device whose group is open; unless `force`, refuse a device that the machine itself uses.

    The virtual functions are examined too: they disappear with the driver of the physical function.
    """
    functions = [read_device(bdf, kernel=kernel) for bdf in _virtual_functions(kernel, device.bdf)]
    for each in (device, *functions):
        if each.iommu_group is not None:
            _check_group_closed(kernel, each.iommu_group)
    if force or device.driver is None or device.is_bridge:
        return
    for each in (device, *functions):
        if each.driver is not None and not each.is_vfio and (uses := find_uses(kernel, each.bdf)):
            raise VfioError(
                f"{each.bdf} is in use through {printable(each.driver)}: {', '.join(use.text for use in uses)}",
                hint=_how_to_end(uses),
            )


def _how_to_end(uses: Sequence[Use]) -> str:
    """Return the commands that end the uses, and the price of `force`."""
    commands = "; ".join(use.command for use in uses if use.command)
    losses = " and ".join(dict.fromkeys(use.loss for use in uses))
    end = f"End the use: {commands}" if commands else "End the use first"
    return f"{end}. Or pass --force (in Python: force=True) and lose {losses}"


def _virtual_functions(kernel: Kernel, bdf: str) -> list[str]:
    links = device_path(kernel, bdf).glob("virtfn*")
    return sorted(name for name in map(link_name, links) if name is not None)


def _check_group_closed(kernel: Kernel, group: int) -> None:
    holders = holders_of_group(kernel, group)
    if holders or is_open_somewhere(kernel, group_node(group, kernel=kernel)):
        # Unbinding from VFIO would wait in the kernel until the user closes the device (`vfio_unregister_group_dev`).
        raise GroupBusyError(group, holders, hint=_how_to_free(holders))


def _how_to_free(holders: Collection[Holder]) -> str:
    if holders:
        return "Close the devices of the group in that process, or end the process"
    return f"No driver of the group can be changed while the group is open, and {nobody_found()}"


def is_open_somewhere(kernel: Kernel, node: Path) -> bool:
    """Return whether the kernel reports the group as open; False if this user is not allowed to open the node.

    The kernel knows other namespaces, and device descriptors that outlive the group's (`vfio_group_fops_open`).
    """
    if not node.exists():
        return False
    try:
        kernel.close(kernel.open(str(node), os.O_RDWR))
    except OSError as error:
        return error.errno == errnos.EBUSY
    return False
