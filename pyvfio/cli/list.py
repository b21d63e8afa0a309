"""`scripts/list`: the machine's PCI devices, and what keeps each from being used through VFIO. Needs no root."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyvfio import pci
from pyvfio.cli.common import FAILED, OK, Json, Selector, complain, print_json, print_table, run, selector_argument
from pyvfio.errors import DeviceNotFoundError, GroupMember, Holder, VfioError
from pyvfio.kernel import Kernel, LinuxKernel

NAME = "list"

_LATER = "after the first bind"

# pci_ids.h of Linux: classes in words, the more exact (class and subclass) first asked.
_SUBCLASSES = {
    0x0101: "IDE controller",
    0x0104: "RAID controller",
    0x0106: "SATA controller",
    0x0107: "SAS controller",
    0x0108: "NVMe controller",
    0x0200: "Ethernet controller",
    0x0300: "VGA controller",
    0x0302: "3D controller",
    0x0403: "audio device",
    0x0600: "host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0607: "CardBus bridge",
    0x0C03: "USB controller",
    0x0C05: "SMBus",
}
_CLASSES = {
    0x00: "unclassified",
    0x01: "mass storage",
    0x02: "network controller",
    0x03: "display controller",
    0x04: "multimedia",
    0x05: "memory controller",
    0x06: "bridge",
    0x07: "communication",
    0x08: "system peripheral",
    0x09: "input device",
    0x0A: "docking station",
    0x0B: "processor",
    0x0C: "serial bus",
    0x0D: "wireless",
    0x0E: "intelligent I/O",
    0x0F: "satellite",
    0x10: "encryption",
    0x11: "signal processing",
    0x12: "accelerator",
    0x13: "instrumentation",
    0x40: "coprocessor",
    0xFF: "unassigned class",
}


@dataclass(frozen=True, slots=True)
class GroupState:
    """An IOMMU group: who blocks it, its node if there is one, and who has that open. `made_up`: VFIO has made it for a
    device without an IOMMU."""

    blockers: tuple[GroupMember, ...]
    node: Path | None
    holders: tuple[Holder, ...]
    made_up: bool

    @property
    def viable(self) -> bool:
        """Whether pyvfio can use it as it is."""
        return not self.blockers and not self.made_up


def class_name(class_code: int) -> str:
    """A 24-bit PCI class in words; its number where there are none."""
    return _SUBCLASSES.get(class_code >> 8) or _CLASSES.get(class_code >> 16) or f"class {class_code:06x}"


def group_state(kernel: Kernel, group: int | None) -> GroupState | None:
    """What there is to say of a group; None where there is no group (any more)."""
    if group is None:
        return None
    try:
        members = pci.group_members(kernel, group)
    except DeviceNotFoundError:
        return None
    node = pci.group_node(kernel, group)
    blockers = tuple(member for member in members if member.blocks)
    made_up = node.name.startswith("noiommu-")
    return GroupState(blockers, node if node.exists() else None, pci.holders_of(kernel, node), made_up)


def as_row(kernel: Kernel, device: pci.PciDevice, state: GroupState | None) -> list[str]:
    """A device as a line of the table."""
    later = _LATER if pci.comes_later(kernel, device) else ""
    return [
        device.bdf,
        f"{device.vendor:04x}:{device.device:04x}",
        class_name(device.class_code),
        device.driver or "",
        later if device.iommu_group is None else str(device.iommu_group),
        _viable(state),
        "" if device.numa_node is None else str(device.numa_node),
        "" if state is None else ", ".join(f"{holder.command} ({holder.pid})" for holder in state.holders),
    ]


def _viable(state: GroupState | None) -> str:
    if state is None:
        return ""
    if state.made_up:
        return "no: no IOMMU"
    return f"no: {', '.join(member.bdf for member in state.blockers)}" if state.blockers else "yes"


def as_json(kernel: Kernel, device: pci.PciDevice, state: GroupState | None) -> Json:
    """A device for programs. The keys are kept; new ones may come."""
    return {
        "bdf": device.bdf,
        "vendor": f"{device.vendor:04x}",
        "device": f"{device.device:04x}",
        "class": f"{device.class_code:06x}",
        "class_name": class_name(device.class_code),
        "driver": device.driver,
        "driver_override": device.driver_override,
        "is_bridge": device.is_bridge,
        "is_vfio": device.is_vfio,
        "numa_node": device.numa_node,
        "iommu_group": device.iommu_group,
        "group_after_bind": pci.comes_later(kernel, device),
        "group_viable": None if state is None else state.viable,
        "group_blockers": [] if state is None else [member.bdf for member in state.blockers],
        "group_node": None if state is None or state.node is None else str(state.node),
        "group_holders": []
        if state is None
        else [{"pid": holder.pid, "command": holder.command} for holder in state.holders],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="List PCI devices with driver, IOMMU group, whether the group is viable (and if not, which devices "
        "keep it from being so), NUMA node, and who has the group open, as far as this user may see.",
    )
    parser.add_argument(
        "device", nargs="*", type=selector_argument, metavar="BDF|VENDOR:DEVICE", help="only these, e.g. 8086:10d3"
    )
    parser.add_argument("--group", type=int, metavar="N", help="only the devices of this IOMMU group")
    parser.add_argument("--driver", metavar="D", help=f"only those bound to this driver ({pci.NO_DRIVER}: to none)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _selected(device: pci.PciDevice, options: argparse.Namespace) -> bool:
    return (
        (not options.device or any(selector(device) for selector in options.device))
        and (options.group is None or device.iommu_group == options.group)
        and (options.driver is None or (device.driver or pci.NO_DRIVER) == options.driver)
    )


def main(arguments: Sequence[str] | None = None, *, kernel: Kernel | None = None) -> int:
    """Print what was asked for; status 1 when a device or group that was asked for does not exist, and 0 also when
    options that narrow the list leave nothing of it."""
    options = _parser().parse_args(arguments)
    kernel = kernel or LinuxKernel()
    try:
        every = pci.enumerate_devices(kernel)
        missing = list(_missing(kernel, every, options.device, options.group))
        devices = [device for device in every if _selected(device, options)]
        states = {group: group_state(kernel, group) for group in {device.iommu_group for device in devices}}
    except VfioError:
        if options.json:
            print_json([])
        raise
    if options.json:
        print_json([as_json(kernel, device, states[device.iommu_group]) for device in devices])
    elif devices or not missing:
        header = ("BDF", "ID", "CLASS", "DRIVER", "GROUP", "VIABLE", "NUMA", "OPEN BY")
        print_table(header, [as_row(kernel, device, states[device.iommu_group]) for device in devices])
    for error in missing:
        complain(NAME, error)
    return FAILED if missing else OK


def _missing(
    kernel: Kernel, every: Sequence[pci.PciDevice], selectors: Sequence[Selector], group: int | None
) -> Iterator[DeviceNotFoundError]:
    """Each device and group that was asked for and does not exist."""
    try:
        if group is not None:
            pci.group_members(kernel, group)
    except DeviceNotFoundError as error:
        yield error
    for selector in selectors:
        if any(selector(device) for device in every):
            continue
        try:
            if selector.bdf is not None:
                pci.read_device(kernel, selector.bdf)
                continue  # it has come meanwhile
        except DeviceNotFoundError as error:
            yield error
        else:
            yield DeviceNotFoundError(f"there is no PCI device {selector.text}", hint="Without arguments all are shown")


if __name__ == "__main__":
    run(main, name=NAME)
