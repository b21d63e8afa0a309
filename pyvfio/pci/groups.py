"""IOMMU groups: the group of a device, or the reason for having none; the members, the node and the holders."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pyvfio.arguments import checked_kernel
from pyvfio.errors import DeviceNotFoundError, GroupMember, Holder
from pyvfio.kernel import Kernel
from pyvfio.pci.iommus import iommu_problems, iommu_units
from pyvfio.pci.sysfs import (
    CDEVS,
    PciDevice,
    cdev_name,
    is_vfio_driver,
    link_name,
    list_names,
    printable,
    read_device,
    read_text,
)

# Drivers with `driver_managed_dma` that are not drivers of VFIO. Until Linux 5.18 a bridge with any driver left the
# group viable. Since "PCI: portdrv: Set driver_managed_dma" a bridge with pcieport does, and a bridge with shpchp does
# not.
_HARMLESS_DRIVERS = frozenset({"pcieport", "pci-stub"})
_AT_BOOT = ("dmar", "ivhd")


def group_of(bdf: str, *, kernel: Kernel | None = None) -> int:
    """Return the number of the IOMMU group of a PCI function.

    Raises: ValueError if `bdf` is not a PCI address; DeviceNotFoundError if no such device exists, or if the device has
    no IOMMU group. The second error names the cause as far as sysfs and procfs show the cause (firmware, virtual
    machine, kernel command line), and the remedy.
    Synchronization: any thread. Cost: as `read_device`.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> pci.group_of("0000:00:02.0", kernel=FakeKernel())  # without kernel=: the running kernel
        2
    """
    kernel = checked_kernel(kernel)
    device = read_device(bdf, kernel=kernel)
    if device.iommu_group is None:
        raise no_group(kernel, device)
    return device.iommu_group


def no_group(kernel: Kernel, device: PciDevice, *, tried: bool = False) -> DeviceNotFoundError:
    """Return the error for a device without an IOMMU group. `tried`: binding a driver has made no group."""
    if not tried and comes_later(device, kernel=kernel):
        return DeviceNotFoundError(
            f"{device.bdf} is in no IOMMU group yet: the kernel makes the group when a driver is first bound",
            hint=f"Bind a driver: pyvfio bind {device.bdf}",
        )
    reason, hint = _why_no_group(kernel)
    return DeviceNotFoundError(f"{device.bdf} is in no IOMMU group: {reason}", hint=hint)


def has_iommus(kernel: Kernel) -> bool:
    """Return whether the kernel has initialized an IOMMU. The IOMMU need not cover all devices."""
    return bool(iommu_units(kernel))


def comes_later(device: PciDevice, *, kernel: Kernel | None = None) -> bool:
    """Return whether the kernel can make a group for `device` when a driver is first bound.

    Before Linux 6.15 the kernel does so if a firmware table assigns devices to the IOMMU: VIOT for virtio-iommu, IORT
    on arm64. The Intel and AMD drivers (dmar0, ivhd0) make all groups at boot. False for a device with a driver:
    binding that driver has made no group. False if the kernel has no group at all: binding the drivers of bridges would
    have made groups.

    Synchronization: any thread. Cost: two directories.
    Source: `acpi_iommu_configure_id`, which only `pci_dma_configure` calls.
    """
    kernel = checked_kernel(kernel)
    if device.iommu_group is not None or device.driver is not None or device.is_bridge:
        return False
    if not list_names(kernel.sysfs / "kernel/iommu_groups"):
        return False
    return any(not name.startswith(_AT_BOOT) for name in iommu_units(kernel))


def group_members(group: int, *, kernel: Kernel | None = None) -> tuple[GroupMember, ...]:
    """Return all devices of an IOMMU group in the order of the names, devices of other buses than PCI included.

    A member blocks the group if the member's driver uses the kernel's DMA API: any driver except VFIO's, pcieport and
    pci-stub. A member without a driver does not block.

    Raises: DeviceNotFoundError, with the numbers of all groups, if no such group exists.
    Synchronization: any thread. Cost: one directory, and two links for each member.
    Source: `driver_managed_dma` in drivers/pci, `iommu_group_claim_dma_owner` in drivers/iommu/iommu.c.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> pci.group_members(2, kernel=FakeKernel())  # without kernel=: the running kernel
        (GroupMember(bdf='0000:00:02.0', driver='vfio-pci', blocks=False),)
    """
    kernel = checked_kernel(kernel)
    directory = kernel.sysfs / "kernel/iommu_groups" / str(group) / "devices"
    names = list_names(directory)
    if not names:
        known = ", ".join(map(printable, sorted(list_names(directory.parent.parent), key=_by_number))) or "none"
        raise DeviceNotFoundError(f"there is no IOMMU group {group}", hint=f"The groups are: {known}")
    return tuple(_member(directory / name) for name in sorted(names))


def _by_number(name: str) -> tuple[int, str]:
    return int(name) if name.isdecimal() else -1, name


def _member(path: Path) -> GroupMember:
    driver = link_name(path / "driver")
    harmless = driver is None or driver in _HARMLESS_DRIVERS or is_vfio_driver(path, driver)
    return GroupMember(
        bdf=printable(path.name), driver=None if driver is None else printable(driver), blocks=not harmless
    )


def group_node(group: int, *, kernel: Kernel | None = None) -> Path:
    """Return the path of the device node of an IOMMU group.

    The node exists while a member of the group is bound to a VFIO driver. In no-IOMMU mode the node of a group that
    VFIO has made is `noiommu-N`.

    Synchronization: any thread. Cost: one small file.
    Source: `vfio_create_group` and `vfio_noiommu_group_alloc` in drivers/vfio/group.c.

    Example:
        >>> from pyvfio import pci
        >>> pci.group_node(7)
        PosixPath('/dev/vfio/7')
    """
    kernel = checked_kernel(kernel)
    made_up = read_text(kernel.sysfs / "kernel/iommu_groups" / str(group) / "name") == "vfio-noiommu"
    return kernel.dev / "vfio" / (f"noiommu-{group}" if made_up else str(group))


# --- Holders -----------------------------------------------------------------------------------------------------


def holders_of(path: Path | str, *, kernel: Kernel | None = None) -> tuple[Holder, ...]:
    """Return the processes that have `path` open, as far as the calling user is allowed to see.

    Device nodes are compared by device number: a node with another name in a container counts. Other files are compared
    by inode. Control characters in the names of processes are escaped. Not found are:

    * processes of other users, unless root calls;
    * processes in other PID namespaces;
    * mappings, and processes that hold only a device descriptor of the group.

    Raises: TypeError for an object that is no path; an unreadable /proc has no holders.
    Synchronization: any thread. Cost: a readlink for each descriptor of each process, 10 ms on a desktop.
    """
    return holders_of_any((Path(path),), kernel)


def holders_of_any(paths: Iterable[Path], kernel: Kernel | None = None) -> tuple[Holder, ...]:
    """Return the processes that have one of `paths` open, as `holders_of`, in one pass over the processes."""
    proc = checked_kernel(kernel).proc
    wanted: dict[tuple[int, ...], str] = {}
    for path in paths:
        with suppress(OSError):
            wanted[_identity(os.stat(path))] = path.name
    if not wanted:
        return ()
    here = this_process(proc)
    return tuple(
        Holder(pid, printable(read_text(proc / str(pid) / "comm") or "?"), is_this_process=pid == here)
        for pid in process_ids(proc)
        if _holds(proc, pid, wanted)
    )


def holders_of_group(kernel: Kernel, group: int) -> tuple[Holder, ...]:
    """Return the holders of the group's node and of the nodes of all members.

    While a member is bound to an iommufd through the member's own node, opening the group fails with EBUSY
    (`vfio_group_fops_open`).
    """
    nodes = (path for _bdf, path in member_nodes(kernel, group))
    return holders_of_any((group_node(group, kernel=kernel), *nodes), kernel)


def member_nodes(kernel: Kernel, group: int) -> tuple[tuple[str, Path], ...]:
    """Return the address and the node below /dev/vfio/devices of each member of a group that has such a node."""
    members = kernel.sysfs / "kernel/iommu_groups" / str(group) / "devices"
    names = ((member, cdev_name(members / member)) for member in sorted(list_names(members)))
    return tuple((member, kernel.dev / CDEVS / name) for member, name in names if name is not None)


def process_ids(proc: Path) -> list[int]:
    """Return the process ids in a procfs, ascending."""
    return sorted(int(name) for name in list_names(proc) if name.isdecimal())


def this_process(proc: Path) -> int:
    """Return the pid of this process in that /proc, which can belong to another PID namespace; 0 if unknown."""
    with suppress(OSError, ValueError):
        return int(os.readlink(proc / "self"))
    return 0


def _holds(proc: Path, pid: int, wanted: Mapping[tuple[int, ...], str]) -> bool:
    directory = proc / str(pid) / "fd"
    names = set(wanted.values())
    for name in list_names(directory):
        with suppress(OSError):
            target = os.readlink(directory / name)
            # stat() on a dead network mount does not return. So only possible matches are examined.
            possible = target.startswith("/dev/") or os.path.basename(target) in names
            if possible and _identity(os.stat(directory / name)) in wanted:
                return True
    return False


def _identity(status: os.stat_result) -> tuple[int, ...]:
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return stat.S_IFMT(status.st_mode), status.st_rdev
    return stat.S_IFMT(status.st_mode), status.st_dev, status.st_ino


# --- Why there is no group ---------------------------------------------------------------------------------------


def _why_no_group(kernel: Kernel) -> tuple[str, str]:
    if problems := iommu_problems(kernel):
        return problems[0].reason, problems[0].hint
    return (
        f"none of this machine's IOMMUs ({', '.join(iommu_units(kernel))}) covers the device",
        "Move the device to a slot or root port that an IOMMU covers",
    )
