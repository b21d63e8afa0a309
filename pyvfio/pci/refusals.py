"""What is refused before anything is written: a driver that is not there or does not take the device, and a device
that is in use."""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Iterator
from pathlib import Path

from pyvfio.errors import GroupBusyError, UnavailableError, VfioError
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import group_node, group_of, holders_of
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, device_path, list_names, read_text

_IFF_UP = 1  # linux/if.h


def check_loaded(kernel: Kernel, driver: str) -> None:
    """Refuse a driver that is not loaded (UnavailableError), and what is no name of one (ValueError)."""
    if not driver or "/" in driver:
        raise ValueError(f"not the name of a driver: {driver!r}")
    if not (kernel.sysfs / "bus/pci/drivers" / driver).is_dir():
        raise UnavailableError(
            f"no PCI driver {driver} is loaded", hint=f"Load the module that has it: modprobe {driver}"
        )


def check_driver(kernel: Kernel, device: PciDevice, driver: str, proc: Path) -> None:
    """Refuse a driver that is not loaded; and VFIO's for a bridge, and for a device that is in no group."""
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
    unsafe = read_text(kernel.sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode")
    if unsafe not in {"Y", "1"}:
        group_of(kernel, device.bdf, proc=proc)


def check_idle(kernel: Kernel, device: PciDevice, *, force: bool, proc: Path) -> None:
    """Refuse a device whose group is open; and, unless forced, one that the machine itself is using."""
    if device.iommu_group is not None:
        _check_group_closed(kernel, device, device.iommu_group, proc)
    if device.driver is None or device.is_vfio or device.is_bridge or force:
        return
    reasons = [*_interfaces_up(kernel, device.bdf), *_disks_in_use(kernel, device.bdf, proc)]
    if reasons:
        raise VfioError(
            f"{device.bdf} is in use through {device.driver}: {', '.join(reasons)}",
            hint="Take the interface down, unmount the disk; or force it, and lose what depends on it",
        )


def _check_group_closed(kernel: Kernel, device: PciDevice, group: int, proc: Path) -> None:
    nodes = [group_node(kernel, group)]
    nodes += [kernel.dev / "vfio/devices" / name for name in list_names(device_path(kernel, device.bdf) / "vfio-dev")]
    holders = {holder.pid: holder for node in nodes for holder in holders_of(kernel, node, proc=proc)}
    if holders or _is_open_somewhere(kernel, nodes[0]):
        raise GroupBusyError(group, tuple(holders.values()))


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


def _interfaces_up(kernel: Kernel, bdf: str) -> Iterator[str]:
    for path in _class_devices(kernel, "net", bdf):
        if int(read_text(path / "flags") or "0", 16) & _IFF_UP or read_text(path / "operstate") == "up":
            yield f"network interface {path.name} is up"


def _disks_in_use(kernel: Kernel, bdf: str, proc: Path) -> Iterator[str]:
    mounted = _mounted(proc)
    swaps = (read_text(proc / "swaps") or "").split()
    for path in _class_devices(kernel, "block", bdf):
        where = mounted.get(read_text(path / "dev") or "") or mounted.get(f"/dev/{path.name}")
        if where is not None:
            yield f"{path.name} is mounted at {where}"
        elif f"/dev/{path.name}" in swaps:
            yield f"{path.name} is swapped to"
        elif holders := list_names(path / "holders"):
            yield f"{path.name} is part of {', '.join(sorted(holders))}"


def _mounted(proc: Path) -> dict[str, str]:
    """Where block devices are mounted, by number (`8:1`) and by source: btrfs mounts have numbers of their own."""
    places = {}
    for line in (read_text(proc / "self/mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        places[fields[2]] = places[after.split()[1]] = fields[4]
    return places


def _class_devices(kernel: Kernel, subsystem: str, bdf: str) -> Iterator[Path]:
    """The network interfaces or block devices that stand on a PCI function, however deep, partitions included."""
    root = device_path(kernel, bdf).resolve()
    for name in sorted(list_names(kernel.sysfs / "class" / subsystem)):
        path = (kernel.sysfs / "class" / subsystem / name).resolve()
        if any(root in place.parents for place in (path, *_nvme_controllers(path))):
            yield path


def _nvme_controllers(disk: Path) -> list[Path]:
    # With native multipath a namespace belongs to its subsystem, below devices/virtual, which links to its controllers.
    for place in disk.parents:
        if place.parent.name == "nvme-subsystem":
            return [(place / name).resolve() for name in list_names(place) if (place / name).is_symlink()]
    return []
