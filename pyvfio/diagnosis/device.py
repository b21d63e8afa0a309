"""The checks of one device: presence, IOMMU group, uses, driver, the other devices of the group, resets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TypedDict

from pyvfio.diagnosis.case import Case, of_error
from pyvfio.errors import DeviceNotFoundError, VfioError
from pyvfio.findings import Command, Finding
from pyvfio.pci.groups import comes_later, group_members, no_group
from pyvfio.pci.iommus import iommu_problems
from pyvfio.pci.sriov import physical_function
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, device_path, printable, read_device, read_text
from pyvfio.pci.usage import find_uses


def check_device(case: Case) -> Iterator[Finding]:
    """Whether the device exists, and VFIO takes devices of that kind."""
    try:
        device = case.device
    except VfioError as error:
        yield of_error("device", error)
        return
    if device is None:
        return
    if device.is_bridge:
        yield Finding(
            "device",
            "wrong",
            f"{device.bdf} is a PCI bridge, and VFIO takes no bridge",
            by_hand="Name a device behind the bridge: pyvfio list shows them",
        )
    else:
        yield Finding("device", "ok", f"{device.bdf} is {device.vendor:04x}:{device.device:04x}")


def check_membership(case: Case) -> Iterator[Finding]:
    """Whether the device is in an IOMMU group; silent where the kernel uses no IOMMU at all."""
    device = case.device
    if device is None:
        return
    if device.iommu_group is not None:
        made_up = read_text(case.kernel.sysfs / f"kernel/iommu_groups/{device.iommu_group}/name") == "vfio-noiommu"
        if made_up:
            yield _made_up(device)
        else:
            yield Finding("group", "ok", f"{device.bdf} is in IOMMU group {device.iommu_group}")
    elif comes_later(device, kernel=case.kernel):
        yield Finding(
            "group", "note", f"{device.bdf} is in no IOMMU group yet: the kernel makes one when a driver is first bound"
        )
    elif not iommu_problems(case.kernel):
        yield of_error("group", no_group(case.kernel, device))


def _made_up(device: PciDevice) -> Finding:
    return Finding(
        "group",
        "wrong",
        f"{device.bdf} is behind no IOMMU: VFIO made up group {device.iommu_group}",
        'Nothing keeps the device out of any memory of this machine. open_device(..., iommu="unsafe-noiommu") alone '
        "opens the device.",
        by_hand="Use the device in another slot, or turn the IOMMU on: pyvfio doctor, without a device, says how",
    )


# --- Drivers -------------------------------------------------------------------------------------------------------


def check_uses(case: Case) -> Iterator[Finding]:
    """Whether this machine uses the device, or another device that keeps the group from being viable."""
    bdfs = [*([case.bdf] if case.bdf else []), *case.blockers]
    for bdf in bdfs:
        with suppress(DeviceNotFoundError, ValueError):  # a blocker is perhaps not PCI, or has gone
            yield from _uses(case, read_device(bdf, kernel=case.kernel))


def _uses(case: Case, device: PciDevice) -> Iterator[Finding]:
    if device.driver is None or device.is_vfio or device.is_bridge:
        return
    for use in find_uses(case.kernel, device.bdf):
        yield Finding(
            "use",
            "wrong",
            f"{device.bdf} is in use through {printable(device.driver)}: {use.text}",
            "Programs that depend on the device lose access when the driver changes.",
            commands=(Command(use.command, "End the use, if nothing needs it", risky=True),) if use.command else (),
            by_hand="" if use.command else "End that use first",
        )


def check_driver(case: Case) -> Iterator[Finding]:
    """Whether a driver of VFIO has the device."""
    device = case.device
    if device is None or device.is_bridge:
        return
    override = device.driver_override
    if device.is_vfio:
        yield Finding("driver", "ok", f"{device.bdf} is bound to {printable(device.driver or '')}")
        if override is not None and override != device.driver:
            yield _override(device, override, "that driver binds when the device is found again")
        return
    if override is not None:
        yield _override(device, override, "pyvfio bind replaces that")
    yield Finding(
        "driver",
        "wrong",
        f"{device.bdf} is bound to {printable(device.driver or 'no driver')}, not to vfio-pci",
        **_bind(case, f"pyvfio bind {device.bdf}"),
    )


def _override(device: PciDevice, override: str, consequence: str) -> Finding:
    return Finding("driver", "note", f"driver_override of {device.bdf} is {printable(override)}", f"So {consequence}.")


class _Fix(TypedDict):
    """The two arguments of a Finding that say how to remove the obstacle."""

    commands: tuple[Command, ...]
    by_hand: str


def _bind(case: Case, command: str) -> _Fix:
    """A change of driver, here or where sysfs can be written."""
    if case.here.container and not os.access(case.kernel.sysfs / "bus/pci/drivers_probe", os.W_OK):
        return {"commands": (), "by_hand": f"sysfs cannot be written in this container. On the host: {command}"}
    return {"commands": (Command(command),), "by_hand": ""}


def check_viability(case: Case) -> Iterator[Finding]:
    """Whether drivers of the kernel keep the group from being viable. A bridge's own driver, pcieport, does not."""
    number = case.group
    if number is None:
        return
    members = group_members(number, kernel=case.kernel)
    blockers = [member for member in members if member.blocks and member.bdf != case.bdf]
    if not blockers:
        yield Finding("viability", "ok", f"no other device keeps IOMMU group {number} from being viable")
    for member in blockers:
        yield Finding(
            "viability",
            "wrong",
            f"{member.bdf} of IOMMU group {number} is bound to {member.driver}",
            f"The IOMMU cannot keep the {len(members)} devices of the group apart, so each of them must be bound to "
            "VFIO or to no driver. In another slot the device may have a separate group (PCIe ACS decides).",
            **_release(case, member.bdf),
        )


def _release(case: Case, bdf: str) -> _Fix:
    try:
        bridge = read_device(bdf, kernel=case.kernel).is_bridge
    except (VfioError, ValueError):
        return {"commands": (), "by_hand": f"Unbind {bdf} from the driver by hand: pyvfio bind takes PCI devices alone"}
    return _bind(case, f"pyvfio bind --driver {NO_DRIVER} {bdf}" if bridge else f"pyvfio bind {bdf}")


# --- Other ---------------------------------------------------------------------------------------------------------


def check_reset(case: Case) -> Iterator[Finding]:
    """The ways in which the device can be reset, and whether its physical function wants a token."""
    device = case.device
    if device is None or device.is_bridge:
        return
    path = device_path(case.kernel, device.bdf)
    methods = read_text(path / "reset_method")
    if methods is None:  # before Linux 5.15 a file says no more than that there is one
        methods = "one that this kernel does not name" if (path / "reset").exists() else ""
    if methods.strip():
        yield Finding("reset", "ok", f"{device.bdf} can be reset: {printable(methods.strip())}")
    else:
        yield Finding(
            "reset",
            "note",
            f"{device.bdf} cannot be reset by itself",
            "A program finds the device as the former program left it.",
        )
    yield from _token(case, device)


def _token(case: Case, device: PciDevice) -> Iterator[Finding]:
    physical = physical_function(device.bdf, kernel=case.kernel)
    if physical is not None and read_device(physical, kernel=case.kernel).is_vfio:
        yield Finding(
            "token",
            "note",
            f"{physical}, whose virtual function {device.bdf} is, is bound to VFIO too",
            "open_device needs vf_token=, the token that the program with the physical function has set.",
        )
