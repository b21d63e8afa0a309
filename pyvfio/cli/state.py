"""Whether a device can be opened through VFIO now, in a word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyvfio import pci
from pyvfio.cli.terminal import Style
from pyvfio.errors import DeviceNotFoundError, GroupMember, Holder
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import has_iommus, holders_of_group

READY = "ready"
STATES = {
    READY: "bound to a VFIO driver, in a viable group that no process has open",
    "in use": "a process has the group, or a device of the group, open",
    "not bound": "no VFIO driver has the device",
    "blocked": "the driver of another device keeps the group from being viable",
    "no group yet": "the IOMMU makes a group when a driver is first bound to the device",
    "no group": "no IOMMU of this machine covers the device",
    "no IOMMU": "the kernel has no IOMMU",
    "unsafe": "bound to a VFIO driver in no-IOMMU mode, without protection",
    "bridge": "a PCI bridge, which VFIO does not take, or a host, ISA or other bridge without a VFIO driver",
}
"""The words, and the meaning of each."""

_BRIDGES = 0x06  # the base class of PCI. VFIO can bind a host or ISA bridge, but the machine needs the bridge.

STYLES = {READY: Style.GOOD, "in use": Style.BAD, "blocked": Style.BAD, "unsafe": Style.BAD, "bridge": Style.DIM}


@dataclass(frozen=True, slots=True)
class GroupState:
    """A snapshot of an IOMMU group.

    `node`: None if /dev/vfio has no node of the group. `holders`: the processes that have the node, or the own node of
    a member, open. `made_up`: VFIO made the group for a device without an IOMMU.
    """

    members: tuple[GroupMember, ...]
    node: Path | None
    holders: tuple[Holder, ...]
    made_up: bool

    @property
    def blockers(self) -> tuple[GroupMember, ...]:
        """The members whose drivers keep the group from being viable."""
        return tuple(member for member in self.members if member.blocks)

    @property
    def viable(self) -> bool:
        """Whether pyvfio can use the group in the present state."""
        return not self.blockers and not self.made_up


def group_state(kernel: Kernel, group: int | None) -> GroupState | None:
    """Return the state of a group, None if the group does not exist."""
    if group is None:
        return None
    try:
        members = pci.group_members(group, kernel=kernel)
    except DeviceNotFoundError:
        return None
    node = pci.group_node(group, kernel=kernel)
    made_up = node.name.startswith("noiommu-")
    return GroupState(members, node if node.exists() else None, holders_of_group(kernel, group), made_up)


def holder_names(group: GroupState) -> str:
    """Return the processes that have a group open, with their numbers."""
    return ", ".join(f"{holder.command} ({holder.pid})" for holder in group.holders)


def device_state(kernel: Kernel, device: pci.PciDevice, group: GroupState | None) -> tuple[str, str]:
    """Return one word of `STATES`, and the devices or processes concerned, if any."""
    if device.is_bridge or (device.class_code >> 16 == _BRIDGES and not device.is_vfio):
        return "bridge", ""
    if group is not None and group.holders:
        return "in use", holder_names(group)
    if group is not None and group.made_up and device.is_vfio:
        return "unsafe", "no IOMMU"
    if group is None or group.made_up:
        return _state_without_group(kernel, device)
    if others := [member.bdf for member in group.blockers if member.bdf != device.bdf]:
        return "blocked", ", ".join(others)
    return (READY if device.is_vfio else "not bound"), ""


def _state_without_group(kernel: Kernel, device: pci.PciDevice) -> tuple[str, str]:
    if pci.comes_later(device, kernel=kernel):
        return "no group yet", "after the first bind"
    return ("no group" if has_iommus(kernel) else "no IOMMU"), ""
