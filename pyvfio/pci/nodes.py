"""The device nodes of VFIO: why a node is missing or cannot be opened, with a remedy that fits the surroundings."""

from __future__ import annotations

import errno as errnos
import os
import re
import shlex
import stat
from pathlib import Path

from pyvfio.errors import (
    AccessDeniedError,
    IoctlError,
    NotBoundError,
    UnavailableError,
    VfioError,
    descriptor_hint,
)
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import group_members
from pyvfio.pci.surroundings import Surroundings, look_around
from pyvfio.pci.sysfs import CDEVS, cdev_name, is_vfio_driver, link_name, printable, read_text

ABSENT = (errnos.ENOENT, errnos.ENODEV, errnos.ENXIO, errnos.ENOTDIR)
"""The errnos of open(2) for a node that does not exist, or that no driver serves."""


def explain_container(kernel: Kernel, path: Path, error: OSError) -> VfioError:
    """Return the error for a failed open of the container's node, /dev/vfio/vfio."""
    if error.errno not in ABSENT:
        return explain_open(path, error, look_around(kernel))
    if (kernel.sysfs / "class/misc/vfio").exists():
        return not_passed_in(kernel, path, "although the kernel has VFIO containers", "class/misc/vfio")
    if (kernel.dev / "iommu").exists() or (kernel.sysfs / "class/misc/iommu").exists():
        return UnavailableError(
            f"there is no {path}: this kernel has {kernel.dev / 'iommu'} (iommufd), and no VFIO containers",
            hint='Use iommufd: open_device(..., iommu="iommufd"). Or boot a kernel with CONFIG_VFIO_CONTAINER',
        )
    here = look_around(kernel)
    command = "modprobe -a vfio-pci vfio_iommu_type1"
    where = f"on the host, then start the container with --device {path}" if here.container else "on this machine"
    return UnavailableError(
        f"there is no {path}: the kernel has no VFIO, or the module is not loaded",
        hint=f"{command}, {where}" if here.container else f"{command}{'' if here.root else ', as root'}",
    )


def explain_group(kernel: Kernel, number: int, path: Path, error: OSError) -> VfioError:
    """Return the error for a failed open of a group's node. EBUSY has an error of its own, GroupBusyError."""
    if error.errno not in ABSENT:
        return explain_open(path, error, look_around(kernel))
    members = group_members(number, kernel=kernel)
    directory = kernel.sysfs / "kernel/iommu_groups" / str(number) / "devices"
    places = [directory / member.bdf for member in members]
    bound = [place for place in places if is_vfio_driver(place, link_name(place / "driver"))]
    if not bound:
        return NotBoundError(
            f"there is no {path}: no device of IOMMU group {number} is bound to a VFIO driver",
            hint="Bind a device of the group to vfio-pci: pyvfio bind " + " ".join(member.bdf for member in members),
        )
    cdevs = [name for name in map(cdev_name, bound) if name is not None]
    if cdevs and not (kernel.sysfs / "class/vfio").exists():
        return UnavailableError(
            f"there is no {path}: this kernel has {kernel.dev / CDEVS / printable(cdevs[0])} for the device, "
            "and no nodes of groups",
            hint='Open the device by that node: open_device(..., iommu="iommufd"). Or boot a kernel with '
            "CONFIG_VFIO_GROUP",
        )
    driver = printable(link_name(bound[0] / "driver") or "")
    return not_passed_in(
        kernel,
        path,
        f"although {bound[0].name} of IOMMU group {number} is bound to {driver}",
        f"class/vfio/{path.name}",
    )


def mknod_command(kernel: Kernel, path: Path, place: str = "") -> str:
    """Return the shell command that makes a node of VFIO with the number in sysfs; empty if sysfs has no number."""
    match = re.fullmatch(r"(\d+):(\d+)", read_text(kernel.sysfs / (place or place_in_sysfs(path)) / "dev") or "")
    return "" if match is None else f"mknod {path} c {match[1]} {match[2]}"


def place_in_sysfs(path: Path) -> str:
    """Return the directory below sysfs that has the number of a node of VFIO or iommufd."""
    if path.name in {"vfio", "iommu"}:
        return f"class/misc/{path.name}"
    return f"class/{'vfio-dev' if path.parent.name == 'devices' else 'vfio'}/{path.name}"


def not_passed_in(kernel: Kernel, path: Path, reason: str, place: str) -> UnavailableError:
    """Return the error for a node that the kernel has, by `place` in sysfs, and that is missing in this /dev."""
    if look_around(kernel).container:
        return UnavailableError(
            f"there is no {path}, {reason}: the node was not passed into this container",
            hint=f"Start the container with --device {path}; in Kubernetes, use a device plugin",
        )
    command = mknod_command(kernel, path, place)
    made = f"; or make the node: {command}" if command else ""
    return UnavailableError(
        f"there is no {path}, {reason}: {kernel.dev} lacks nodes of this machine",
        hint=f"Run where the machine's own /dev (devtmpfs) is mounted{made}",
    )


def explain_open(path: Path, error: OSError, here: Surroundings, bdf: str = "BDF") -> VfioError:
    """Return the error for an existing node that could not be opened, with a remedy for these surroundings.

    `bdf`: the device of the node, for the command that gives rights.

    EPERM comes from a device cgroup (`devcgroup_check_permission`), also for root. EACCES comes from the mode, from a
    mount with `nodev` (`may_open_dev`), or from a security module.
    """
    number = error.errno or 0
    if number == errnos.EPERM:
        return AccessDeniedError(str(path), number=number, hint=_why_not_permitted(path, here))
    if number == errnos.EACCES:
        return AccessDeniedError(str(path), number=number, hint=_why_no_access(path, here, bdf))
    return IoctlError.of(
        error,
        f"{path} could not be opened",
        request="open",
        arguments={"path": str(path)},
        hint=descriptor_hint(number),
    )


def _why_not_permitted(path: Path, here: Surroundings) -> str:
    if path.name.startswith("noiommu-"):
        return "A device without an IOMMU can access all memory: opening the group requires CAP_SYS_RAWIO"
    if here.container:
        return (
            f"The container's device cgroup denies access to every user: start the container with --device {path} "
            "(in Kubernetes, use a device plugin)"
        )
    if here.service is not None:
        return (
            f"The device cgroup of {here.service} denies access to every user: add DeviceAllow={path} rw to the "
            "unit, and restart the service"
        )
    return (
        "A device cgroup denies access to every user: a systemd service needs "
        f"DeviceAllow={path} rw, a container --device {path}"
    )


def _why_no_access(path: Path, here: Surroundings, bdf: str) -> str:
    mode = _mode(path)
    if here.root and here.user_namespace:
        return (
            f"{mode}; this is root of a user namespace, without rights outside of the namespace. Give the node to a "
            "user that is mapped into the namespace, or open the node outside and pass the descriptor in "
            f"({_kind_of(path)}.from_fd)"
        )
    if here.root:
        return (
            f"{mode}; a mount with nodev (see findmnt) or a security module (SELinux, AppArmor; see its log) refuses "
            "root"
        )
    return f"{mode}; {explain_rights(path, here, bdf)}"


def _kind_of(path: Path) -> str:
    """Return the class that takes the descriptor of an open node."""
    if path.name in {"vfio", "iommu"}:
        return {"vfio": "Container", "iommu": "Iommufd"}[path.name]
    return "Device" if path.parent.name == "devices" else "Group"


def explain_rights(path: Path, here: Surroundings, bdf: str = "BDF") -> str:
    """Return how a user who is not root gets the right to open the node at `path`. `bdf`: a device of the group."""
    who = f"this is user {here.user} with groups {list(here.groups)}"
    if here.container:
        return f"{who}. Start the container with a user or group that has access: --user, --group-add"
    if path.name == "vfio":
        return f'{who}. Run as root, or write a udev rule: SUBSYSTEM=="misc", KERNEL=="vfio", MODE="0666"'
    command = give_command(here.user, bdf)
    return f"{who}. Run as root, or give the node to the user: {command} (with --persist at each boot, by a udev rule)"


def give_command(user: int, bdf: str, driver: str | None = None) -> str:
    """Return the command that gives a user the right to open the nodes of a device.

    The command also binds the device to `driver`, a driver of VFIO; None: to vfio-pci.
    """
    option = "" if driver is None else f"--driver {shlex.quote(printable(driver))} "
    return f"pyvfio bind {option}--user {user} {bdf}"


def _mode(path: Path) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "The mode is unknown"
    return f"The mode is {stat.filemode(status.st_mode)}, owner {status.st_uid}:{status.st_gid}"
