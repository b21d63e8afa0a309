"""The nodes of VFIO below /dev: the reasons for which one is not there, or may not be opened, and what helps where the
program runs."""

from __future__ import annotations

import errno as errnos
import os
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
from pyvfio.pci.sysfs import is_vfio_driver, link_name, list_names, printable, read_text

_ABSENT = (errnos.ENOENT, errnos.ENODEV, errnos.ENXIO, errnos.ENOTDIR)


def explain_container(kernel: Kernel, path: Path, error: OSError) -> VfioError:
    """The error for a container's node, /dev/vfio/vfio, that could not be opened."""
    if error.errno not in _ABSENT:
        return explain_open(path, error, look_around(kernel))
    if (kernel.sysfs / "class/misc/vfio").exists():
        return _not_handed_in(kernel, path, "though the kernel has VFIO's containers", "class/misc/vfio")
    if (kernel.dev / "iommu").exists() or (kernel.sysfs / "class/misc/iommu").exists():
        return UnavailableError(
            f"there is no {path}: this kernel has {kernel.dev / 'iommu'} (iommufd), and no containers of VFIO",
            hint="pyvfio maps through a container: it needs a kernel with CONFIG_VFIO_CONTAINER",
        )
    here = look_around(kernel)
    command = "modprobe -a vfio-pci vfio_iommu_type1"
    where = f"on the host, then start the container with --device {path}" if here.container else "on this machine"
    return UnavailableError(
        f"there is no {path}: this machine has no VFIO, or its module is not loaded",
        hint=f"{command}, {where}" if here.container else f"{command}{'' if here.root else ', as root'}",
    )


def explain_group(kernel: Kernel, number: int, path: Path, error: OSError) -> VfioError:
    """The error for a group's node that could not be opened, but for EBUSY."""
    if error.errno not in _ABSENT:
        return explain_open(path, error, look_around(kernel))
    members = group_members(kernel, number)
    directory = kernel.sysfs / "kernel/iommu_groups" / str(number) / "devices"
    places = [directory / member.bdf for member in members]
    bound = [place for place in places if is_vfio_driver(place, link_name(place / "driver"))]
    if not bound:
        return NotBoundError(
            f"there is no {path}: no device of IOMMU group {number} is bound to a VFIO driver",
            hint="Bind one of its devices to vfio-pci: scripts/bind " + " ".join(member.bdf for member in members),
        )
    cdevs = sorted(name for place in bound for name in list_names(place / "vfio-dev"))
    if cdevs and not (kernel.sysfs / "class/vfio").exists():
        return UnavailableError(
            f"there is no {path}: this kernel has {kernel.dev / 'vfio/devices' / printable(cdevs[0])} for the device, "
            "and no nodes of groups",
            hint="pyvfio opens devices by their groups: it needs a kernel with CONFIG_VFIO_GROUP",
        )
    driver = printable(link_name(bound[0] / "driver") or "")
    return _not_handed_in(
        kernel,
        path,
        f"though {bound[0].name} of IOMMU group {number} is bound to {driver}",
        f"class/vfio/{path.name}",
    )


def _not_handed_in(kernel: Kernel, path: Path, reason: str, place: str) -> UnavailableError:
    """The kernel has it, as sysfs says at `place`, and this /dev has not."""
    number = read_text(kernel.sysfs / place / "dev")
    if look_around(kernel).container:
        return UnavailableError(
            f"there is no {path}, {reason}: it was not handed into this container",
            hint=f"Start the container with --device {path}; in Kubernetes a device plugin does that",
        )
    made = "" if number is None else f"; or make the node: mknod {path} c {printable(number).replace(':', ' ')}"
    return UnavailableError(
        f"there is no {path}, {reason}: {kernel.dev} has not all of the machine's nodes",
        hint=f"Run where the machine's own /dev is mounted (devtmpfs){made}",
    )


def explain_open(path: Path, error: OSError, here: Surroundings) -> VfioError:
    """The error for a node that is there and could not be opened, with what helps in these surroundings.

    EPERM is a device cgroup's (`devcgroup_check_permission`), which root does not override; EACCES is that of the
    mode, of a mount with `nodev` (`may_open_dev`), or of a security module.
    """
    number = error.errno or 0
    if number == errnos.EPERM:
        return AccessDeniedError(str(path), number=number, hint=_why_not_permitted(path, here))
    if number == errnos.EACCES:
        return AccessDeniedError(str(path), number=number, hint=_why_no_access(path, here))
    return IoctlError.of(
        error,
        f"{path} could not be opened",
        request="open",
        arguments={"path": str(path)},
        hint=descriptor_hint(number),
    )


def _why_not_permitted(path: Path, here: Surroundings) -> str:
    if path.name.startswith("noiommu-"):
        return "A device without an IOMMU reaches all of memory: only a process with CAP_SYS_RAWIO may open its group"
    if here.container:
        return (
            f"The container's device cgroup does not allow it, whoever asks: start the container with --device {path} "
            "(in Kubernetes a device plugin does that)"
        )
    if here.service is not None:
        return (
            f"The device cgroup of {here.service} does not allow it, whoever asks: add DeviceAllow={path} rw to the "
            "unit, and restart it"
        )
    return (
        "A device cgroup does not allow it, whoever asks: a systemd service needs "
        f"DeviceAllow={path} rw, a container --device {path}"
    )


def _why_no_access(path: Path, here: Surroundings) -> str:
    mode = _mode(path)
    if here.root and here.user_namespace:
        return (
            f"{mode}; this is root of a user namespace, which has no rights outside of it. Give the node to a user "
            "that is mapped into the namespace, or open it outside and hand the descriptor in (Container.from_fd)"
        )
    if here.root:
        return (
            f"{mode}; root is refused by a mount with nodev (findmnt shows it), or by a security module (SELinux, "
            "AppArmor), whose log has the rule"
        )
    who = f"{mode}; this is user {here.user} with groups {list(here.groups)}"
    if here.container:
        return f"{who}. Start the container with a group that may open it: --group-add, or --user"
    return f'{who}. Run as root, or let a udev rule give it away: SUBSYSTEM=="vfio", GROUP="vfio", MODE="0660"'


def _mode(path: Path) -> str:
    try:
        status = os.stat(path)
    except OSError:
        return "It is of unknown mode"
    return f"It is {stat.filemode(status.st_mode)}, owner {status.st_uid}:{status.st_gid}"
