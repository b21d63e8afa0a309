"""IOMMU groups: which one a device is in or why it is in none, who its members are, its node, and who has that open."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from pyvfio.errors import DeviceNotFoundError, GroupMember, Holder
from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import (
    PciDevice,
    is_vfio_driver,
    link_name,
    list_names,
    printable,
    read_device,
    read_text,
)

# Drivers with `driver_managed_dma` that do not belong to VFIO. Any driver of a bridge was let through until Linux 5.18;
# since "PCI: portdrv: Set driver_managed_dma" pcieport is, and shpchp is not.
_HARMLESS_DRIVERS = frozenset({"pcieport", "pci-stub"})
_AT_BOOT = ("dmar", "ivhd")


def group_of(kernel: Kernel, bdf: str) -> int:
    """The number of the IOMMU group that a PCI function is in.

    Raises DeviceNotFoundError when there is no such device, and when it is in no group; then the error says which of
    firmware, virtual machine and kernel command line is the cause, as far as sysfs and procfs show, and what to do.
    """
    device = read_device(kernel, bdf)
    if device.iommu_group is None:
        raise no_group(kernel, device)
    return device.iommu_group


def no_group(kernel: Kernel, device: PciDevice, *, tried: bool = False) -> DeviceNotFoundError:
    """The error for a device that is in no group. `tried`: also after a driver was bound to it."""
    if not tried and comes_later(kernel, device):
        return DeviceNotFoundError(
            f"{device.bdf} is in no IOMMU group yet: the IOMMU makes one when a driver is first bound to it",
            hint=f"scripts/bind {device.bdf}",
        )
    reason, hint = _why_no_group(kernel)
    return DeviceNotFoundError(f"{device.bdf} is in no IOMMU group: {reason}", hint=hint)


def has_iommus(kernel: Kernel) -> bool:
    """Whether the kernel has taken up an IOMMU, whichever devices that covers."""
    return bool(list_names(kernel.sysfs / "class/iommu"))


def comes_later(kernel: Kernel, device: PciDevice) -> bool:
    """Whether a device without a group may get one when a driver is first bound to it.

    So it is before Linux 6.15 where firmware's tables say which IOMMU a device is behind: VIOT for virtio-iommu, IORT
    on arm64 (`acpi_iommu_configure_id`, called by `pci_dma_configure` alone). Those of Intel and AMD, dmar0 and ivhd0,
    make all groups at boot. A device that has a driver has no group to come, and neither has any device where the
    kernel has made no group at all: there each bridge's driver would have had one made.
    """
    if device.iommu_group is not None or device.driver is not None or device.is_bridge:
        return False
    if not list_names(kernel.sysfs / "kernel/iommu_groups"):
        return False
    return any(not name.startswith(_AT_BOOT) for name in list_names(kernel.sysfs / "class/iommu"))


def group_members(kernel: Kernel, group: int) -> tuple[GroupMember, ...]:
    """All devices of an IOMMU group, also those that are not PCI, in the order of their names.

    One blocks when it is bound to a driver that uses the kernel's DMA API: any but VFIO's, pcieport and pci-stub. No
    driver is fine. Raises DeviceNotFoundError when there is no such group.
    Source: `driver_managed_dma` in drivers/pci, `iommu_group_claim_dma_owner` in drivers/iommu/iommu.c.
    """
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


def group_node(kernel: Kernel, group: int) -> Path:
    """The group's device node, which is there once a member is bound to a VFIO driver: `dev/vfio/7`.

    A group that VFIO made up for a device without an IOMMU has `dev/vfio/noiommu-7`.
    Source: `vfio_create_group` and `vfio_noiommu_group_alloc` in drivers/vfio/group.c.
    """
    made_up = read_text(kernel.sysfs / "kernel/iommu_groups" / str(group) / "name") == "vfio-noiommu"
    return kernel.dev / "vfio" / (f"noiommu-{group}" if made_up else str(group))


# --- Holders -----------------------------------------------------------------------------------------------------


def holders_of(kernel: Kernel, path: Path) -> tuple[Holder, ...]:
    """The processes that have a file open, as far as this user may see; never raises.

    A device node is told by its number, so that a node of another name in a container counts; another file by its
    inode. Control characters in the name of a process are escaped. Not seen: other users' processes unless root asks,
    other PID namespaces, mappings, and what only holds a device descriptor of a group. Cost: a readlink for each
    descriptor of each process, some 10 ms on a desktop.
    """
    proc = kernel.proc
    try:
        wanted = _identity(os.stat(path))
    except OSError:
        return ()
    pids = process_ids(proc)
    here = _this_process(proc)
    return tuple(
        Holder(pid, printable(read_text(proc / str(pid) / "comm") or "?"), is_this_process=pid == here)
        for pid in pids
        if _holds(proc, pid, path, wanted)
    )


def holders_of_group(kernel: Kernel, group: int) -> tuple[Holder, ...]:
    """As `holders_of`, of the group's node and of the nodes of its devices: a device that is open by its own keeps the
    group from being opened (`vfio_group_fops_open`, EBUSY)."""
    members = kernel.sysfs / "kernel/iommu_groups" / str(group) / "devices"
    nodes = [group_node(kernel, group)]
    for member in sorted(list_names(members)):
        nodes += [kernel.dev / "vfio/devices" / name for name in sorted(list_names(members / member / "vfio-dev"))]
    found = {holder.pid: holder for node in nodes for holder in holders_of(kernel, node)}
    return tuple(found[pid] for pid in sorted(found))


def process_ids(proc: Path) -> list[int]:
    """The processes that a procfs shows, ascending."""
    return sorted(int(name) for name in list_names(proc) if name.isdecimal())


def _this_process(proc: Path) -> int:
    """The pid as that /proc counts, which may be of another namespace; 0 where it does not say."""
    with suppress(OSError, ValueError):
        return int(os.readlink(proc / "self"))
    return 0


def _holds(proc: Path, pid: int, path: Path, wanted: tuple[int, ...]) -> bool:
    directory = proc / str(pid) / "fd"
    for name in list_names(directory):
        with suppress(OSError):
            target = os.readlink(directory / name)
            # stat() of a file on a dead network mount does not return, so only what may be the file is asked.
            if (target.startswith("/dev/") or os.path.basename(target) == path.name) and _identity(
                os.stat(directory / name)
            ) == wanted:
                return True
    return False


def _identity(status: os.stat_result) -> tuple[int, ...]:
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return stat.S_IFMT(status.st_mode), status.st_rdev
    return stat.S_IFMT(status.st_mode), status.st_dev, status.st_ino


# --- Why there is no group ---------------------------------------------------------------------------------------


def _why_no_group(kernel: Kernel) -> tuple[str, str]:
    units = ", ".join(sorted(list_names(kernel.sysfs / "class/iommu")))
    tables = list_names(kernel.sysfs / "firmware/acpi/tables") & {"DMAR", "IVRS", "IORT", "VIOT"}
    options = _iommu_options(kernel.proc)
    off = sorted(word for word in options if word.endswith("=off"))
    cases = (
        (
            bool(units) and not list_names(kernel.sysfs / "kernel/iommu_groups"),
            f"the kernel has this machine's IOMMUs ({units}), and has made no group for any device",
            "It has logged why: dmesg | grep -i iommu",
        ),
        (
            bool(units),
            f"none of this machine's IOMMUs ({units}) covers it",
            "It can be used through VFIO only where one does, in another slot or behind another root port",
        ),
        (
            bool(off),
            f"the kernel was told not to use the IOMMU ({', '.join(off)})",
            "Take that off the kernel command line and boot again",
        ),
        (
            "DMAR" in tables and "intel_iommu=on" not in options,
            "the firmware announces an IOMMU, and the kernel was not told to use it",
            "Add intel_iommu=on to the kernel command line and boot again",
        ),
        (
            bool(tables),
            f"the firmware announces an IOMMU ({', '.join(sorted(tables))}), and the kernel has not taken it up",
            "See dmesg | grep -i -e dmar -e iommu; its driver may be missing (virtio_iommu is often a module)",
        ),
        (
            _is_virtual_machine(kernel),
            "this virtual machine has no IOMMU of its own",
            "Give it one; of QEMU: -machine q35,kernel-irqchip=split -device intel-iommu,intremap=on,caching-mode=on "
            "(and intel_iommu=on on the guest's command line), or -device virtio-iommu-pci",
        ),
        (
            True,
            "the firmware announces no IOMMU",
            "Turn it on in the firmware's set-up (Intel: VT-d, AMD: IOMMU or AMD-Vi); then add intel_iommu=on to the "
            "kernel command line on Intel",
        ),
    )
    return next((reason, hint) for applies, reason, hint in cases if applies)


def _iommu_options(proc: Path) -> set[str]:
    """`intel_iommu=on,sm_on` of the kernel command line as `intel_iommu=on` and `intel_iommu=sm_on`."""
    options = set()
    for word in (read_text(proc / "cmdline") or "").split():
        name, _, values = word.partition("=")
        if name in {"iommu", "intel_iommu", "amd_iommu"}:
            options |= {f"{name}={value}" for value in values.split(",")}
    return options


def _is_virtual_machine(kernel: Kernel) -> bool:
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", read_text(kernel.proc / "cpuinfo") or "", re.MULTILINE)
    return flags is not None or read_text(kernel.sysfs / "class/dmi/id/sys_vendor") == "QEMU"
