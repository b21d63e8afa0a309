"""The nodes of devices, /dev/vfio/devices/vfioN, and of iommufd, /dev/iommu: presence, holders, reasons for refusals.

Source: drivers/vfio/device_cdev.c, drivers/iommu/iommufd/device.c.
"""

from __future__ import annotations

import errno as errnos
from pathlib import Path

from pyvfio.arguments import checked_kernel
from pyvfio.errors import (
    DeviceGoneError,
    DeviceNotFoundError,
    GroupBusyError,
    GroupNotViableError,
    Holder,
    IoctlError,
    NotBoundError,
    UnavailableError,
    VfioError,
    descriptor_hint,
    nobody_found,
)
from pyvfio.kernel import Kernel
from pyvfio.pci.boot import build_options, release
from pyvfio.pci.groups import (
    group_members,
    group_node,
    has_iommus,
    holders_of,
    holders_of_any,
    member_nodes,
    no_group,
)
from pyvfio.pci.nodes import ABSENT, explain_open, not_passed_in, place_in_sysfs
from pyvfio.pci.noiommu import is_unprotected, no_protection
from pyvfio.pci.surroundings import look_around
from pyvfio.pci.sysfs import CDEVS, PciDevice, printable, read_device, read_text

UNSAFE = "module/iommufd/parameters/allow_unsafe_interrupts"
"""The parameter below sysfs without which iommufd takes no device whose interrupts are not remapped."""

IOMMUFD = "iommu"
"""The name of the node of iommufd, below the directory of device nodes."""

_BIND = "VFIO_DEVICE_BIND_IOMMUFD"
_BUSY = (errnos.EBUSY, errnos.EINVAL)


def cdev_node(bdf: str, *, kernel: Kernel | None = None) -> Path | None:
    """Return the path of a device's own node, /dev/vfio/devices/vfioN; None if the kernel made no node.

    The kernel makes the node when a VFIO driver binds the device, if built with CONFIG_VFIO_DEVICE_CDEV. The path need
    not exist in this /dev.

    Raises: as `read_device`. Synchronization: any thread. Cost: as `read_device`.
    Source: `vfio_device_add` and `vfio_device_devnode`.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> pci.cdev_node("0000:00:02.0", kernel=FakeKernel()) is None  # a kernel without CONFIG_VFIO_DEVICE_CDEV
        True
    """
    kernel = checked_kernel(kernel)
    name = read_device(bdf, kernel=kernel).cdev
    return None if name is None else kernel.dev / CDEVS / name


def has_iommufd(kernel: Kernel) -> bool:
    """Return whether the kernel has iommufd: the module is loaded, or opening /dev/iommu loads the module.

    A static node can exist without the module, and sysfs can show a node that this /dev lacks. Cost: two stat(2).
    """
    return (kernel.sysfs / "class/misc/iommu").exists() or iommufd_node(kernel).exists()


def iommufd_node(kernel: Kernel) -> Path:
    """Return the path of the node of iommufd. The node need not exist."""
    return kernel.dev / IOMMUFD


def has_group_nodes(kernel: Kernel) -> bool:
    """Return whether the kernel makes nodes of groups. False: a kernel without CONFIG_VFIO_GROUP, or without VFIO.

    Source: the class "vfio" of `vfio_group_init`.
    """
    return (kernel.sysfs / "class/vfio").exists()


def holders_of_cdev(bdf: str, *, kernel: Kernel | None = None) -> tuple[Holder, ...]:
    """Return the processes that have the device's own node open, as `holders_of`. No process if there is no node.

    Raises: as `read_device`.
    """
    kernel = checked_kernel(kernel)
    path = cdev_node(bdf, kernel=kernel)
    return () if path is None else holders_of(path, kernel=kernel)


# --- Opening -----------------------------------------------------------------------------------------------------


def no_cdev(kernel: Kernel, bdf: str) -> VfioError:
    """Return the error for a device without a node of its own, for which `cdev_node` returns None."""
    try:
        device = read_device(bdf, kernel=kernel)
    except DeviceNotFoundError as error:
        return error
    if not device.is_vfio:
        return _not_bound(device)
    if is_unprotected(kernel, device):  # iommufd has such devices from Linux 7.3 on, and type1 refuses them too
        return no_protection(bdf, "neither iommufd nor type1 opens the device")
    return UnavailableError(
        f"{bdf} has no node below {kernel.dev / CDEVS}: {_built(kernel)} makes none for devices bound to "
        f"{printable(device.driver or '')}",
        hint='Open the device through the group: open_device(..., iommu="type1"). Or boot a kernel with '
        "CONFIG_VFIO_DEVICE_CDEV and CONFIG_IOMMUFD",
    )


def _not_bound(device: PciDevice) -> NotBoundError:
    error = NotBoundError(
        f"{device.bdf} is bound to {printable(device.driver or 'no driver')}, not to vfio-pci",
        hint=f"pyvfio bind {device.bdf}",
    )
    error.driver = device.driver
    return error


def _built(kernel: Kernel) -> str:
    """Return the kernel as the subject of a sentence, with the missing option if the configuration can be read."""
    name = f"Linux {release(kernel)}".strip()
    options = build_options(kernel)
    for option in ("IOMMUFD", "VFIO_DEVICE_CDEV"):
        # VFIO_DEVICE_CDEV depends on IOMMUFD, so that a configuration without the one does not name the other.
        if options and options.get(option, "n") == "n":
            return f"{name}, built without CONFIG_{option},"
    return name


def explain_cdev(kernel: Kernel, bdf: str, path: Path | None, error: OSError) -> VfioError:
    """Return the error for a failed open of a device's own node. `path` None: as `no_cdev`.

    An open of the node is never refused because another process has the node open: `explain_bind` is for that. EBUSY
    and EINVAL of other kernels are explained nevertheless.
    """
    number = error.errno or 0
    if path is None:
        return no_cdev(kernel, bdf)
    if number in ABSENT:
        return _absent_cdev(kernel, bdf, path)
    if number in _BUSY:
        return _busy(kernel, bdf, holders_of(path, kernel=kernel)) or explain_open(path, error, look_around(kernel))
    return explain_open(path, error, look_around(kernel), bdf)


def _absent_cdev(kernel: Kernel, bdf: str, path: Path) -> VfioError:
    try:
        device = read_device(bdf, kernel=kernel)
    except DeviceNotFoundError as gone:
        return gone
    if device.cdev != path.name:  # the driver was unbound, or bound again, after the path was looked up
        return no_cdev(kernel, bdf) if device.cdev is None else _changed(device, path)
    driver = printable(device.driver or "")
    return not_passed_in(kernel, path, f"although {bdf} is bound to {driver}", place_in_sysfs(path))


def _changed(device: PciDevice, path: Path) -> DeviceGoneError:
    return DeviceGoneError(device.bdf, f"{path} is no longer the node of the device, which was bound again")


def explain_iommufd(kernel: Kernel, path: Path, error: OSError) -> VfioError:
    """Return the error for a failed open of the node of iommufd, /dev/iommu."""
    here = look_around(kernel)
    if error.errno not in ABSENT:
        return explain_open(path, error, here)
    if (kernel.sysfs / "class/misc/iommu").exists():
        return not_passed_in(kernel, path, "although the kernel has iommufd", "class/misc/iommu")
    options = build_options(kernel)
    if options and options.get("IOMMUFD", "n") == "n":  # kernels before 6.2 do not have the option
        return UnavailableError(
            f"there is no {path}: {_built(kernel)} has no iommufd",
            hint='Use type1: open_device(..., iommu="type1"). Or boot a kernel with CONFIG_IOMMUFD and '
            "CONFIG_VFIO_DEVICE_CDEV",
        )
    command = "modprobe iommufd"
    where = f"on the host, then start the container with --device {path}" if here.container else ""
    rest = where or ("" if here.root else "as root")
    return UnavailableError(
        f"there is no {path}: the kernel has no iommufd, or the module is not loaded",
        hint=f"{command}, {rest}" if rest else command,
    )


# --- Binding to an iommufd ---------------------------------------------------------------------------------------


def explain_bind(kernel: Kernel, bdf: str, error: OSError, *, iommufd: int = -1) -> VfioError:
    """Return the error for a failed VFIO_DEVICE_BIND_IOMMUFD. `iommufd`: the descriptor that the call was given.

    * GroupBusyError: EBUSY, the group is open through the group's node; EINVAL, the device is bound already, here or in
      another process; EPERM, another iommufd has a device of the group.
    * GroupNotViableError: EPERM or EBUSY, a kernel driver owns a device of the group.
    * DeviceNotFoundError, NotBoundError, DeviceGoneError: ENODEV.
    * IoctlError: all other reasons, such as interrupts that are not remapped (EPERM).

    Cost: a look at each process.
    Source: `vfio_df_ioctl_bind_iommufd`, `vfio_df_device_first_open`, `iommufd_device_bind`,
    `iommu_device_claim_dma_owner`.
    """
    try:
        device = read_device(bdf, kernel=kernel)
    except DeviceNotFoundError as gone:
        return gone
    number = error.errno or 0
    found: VfioError | None = None
    if number == errnos.ENODEV:
        found = _lost(kernel, device)
    elif number in {errnos.EPERM, errnos.EBUSY}:
        found = _not_viable(kernel, device) or _group_in_use(kernel, device, number)
    elif number == errnos.EINVAL and iommufd >= 0:
        found = _busy(kernel, bdf, _bound_elsewhere(kernel, device))
    return found or IoctlError.of(
        error,
        f"{bdf} could not be bound to the iommufd",
        request=_BIND,
        arguments={"device": bdf, "iommufd": iommufd},
        hint=_why_not_bound(kernel, number),
    )


def _lost(kernel: Kernel, device: PciDevice) -> VfioError:
    if not device.is_vfio:
        return _not_bound(device)
    if device.iommu_group is None and has_iommus(kernel):
        return no_group(kernel, device, tried=True)
    return DeviceGoneError(device.bdf, "VFIO is removing the device (ENODEV)")


def _not_viable(kernel: Kernel, device: PciDevice) -> GroupNotViableError | None:
    if device.iommu_group is None:
        return None
    members = group_members(device.iommu_group, kernel=kernel)
    if not any(member.blocks for member in members):
        return None
    return GroupNotViableError(device.iommu_group, members)


def _group_in_use(kernel: Kernel, device: PciDevice, number: int) -> GroupBusyError | None:
    """Return the error for a group that another user has. `number` is the errno.

    EBUSY: the group's node is open (`vfio_device_block_group`). EPERM: another iommufd owns the group.
    """
    group = device.iommu_group
    if group is None:
        return None
    if number == errnos.EBUSY:
        holders = holders_of(group_node(group, kernel=kernel), kernel=kernel)
        return GroupBusyError(group, holders, hint=how_to_free(holders))
    holders = holders_of_any((path for bdf, path in member_nodes(kernel, group) if bdf != device.bdf), kernel)
    if not holders:
        return None
    return GroupBusyError(
        group,
        holders,
        hint="All devices of a group are bound to one iommufd. Open them with one space or iommufd, or close the "
        "devices of the group in that process",
    )


def how_to_free(holders: tuple[Holder, ...]) -> str:
    """Return the hint for a device that is wanted through iommufd, and whose group or device `holders` have open."""
    once = "A device is bound to an iommufd only while no other user has the device or the group open"
    if any(not holder.is_this_process for holder in holders):
        return f"{once}: close the devices of the group in that process, or end the process"
    if holders:
        return (
            f"{once}. This process has the device open, or the group through type1: close those devices. An object "
            "that was never closed can stay open until gc.collect()"
        )
    return f"{once}, and {nobody_found()}"


def _bound_elsewhere(kernel: Kernel, device: PciDevice) -> tuple[Holder, ...]:
    holders = holders_of_cdev(device.bdf, kernel=kernel)
    return tuple(holder for holder in holders if not holder.is_this_process) or holders


def _busy(kernel: Kernel, bdf: str, holders: tuple[Holder, ...]) -> GroupBusyError | None:
    group = read_device(bdf, kernel=kernel).iommu_group
    if group is None or not holders:
        return None
    here = any(holder.is_this_process for holder in holders)
    return GroupBusyError(
        group,
        holders,
        device=bdf,
        hint="A device is bound to one iommufd, through one descriptor. "
        + (
            "Close the Device that has the device open. A Device that was never closed can stay open until gc.collect()"
            if here
            else "Close the device in that process, or end the process"
        ),
    )


def _why_not_bound(kernel: Kernel, number: int) -> str:
    if number == errnos.EPERM:
        return unsafe_interrupts_hint(kernel)
    hints = {
        errnos.EBADF: "The descriptor of the iommufd is closed",
        errnos.EBADFD: "The descriptor is not of /dev/iommu",
        errnos.EINVAL: "The descriptor of the iommufd is negative, the device was opened through a group, or the "
        "IOMMU does not keep the device's DMA coherent with caches",
    }
    return hints.get(number, "") or descriptor_hint(number)


def unsafe_interrupts_hint(kernel: Kernel) -> str:
    """Return the remedy for EPERM of VFIO_DEVICE_BIND_IOMMUFD where no other iommufd has the group.

    Source: `iommufd_device_bind`, with `iommu_group_has_isolated_msi`. The parameter of vfio_iommu_type1 has no effect.
    """
    here = look_around(kernel)
    path = kernel.sysfs / UNSAFE
    if read_text(path) in {"Y", "1"}:
        return (
            "iommufd was told to accept interrupts that are not remapped, so another iommufd may have a device of the "
            "group: look as root, or from outside this container or PID namespace"
        )
    risk = "which lets a device forge any interrupt of this machine"
    command = f"echo Y > {path}"
    where = "on the host" if here.container else "" if here.root else "as root"
    return (
        "The platform remaps no interrupts, or another iommufd has a device of the group. Turn interrupt remapping on "
        f"in the firmware, or accept the risk, {risk}: {command}{f', {where}' if where else ''}"
    )
