"""The checks of VFIO's nodes: each is opened, for the kernel alone knows modes, device cgroups and security modules.

An open container, an open group and an open node of a device change no device: a device is opened when the device is
bound to an iommufd. The group is attached to the container for a moment, so that the
kernel says whether the group is viable and interrupts are remapped. A program that opens the group in that moment gets
EBUSY.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pyvfio.container import Container
from pyvfio.diagnosis.case import Case, of_error
from pyvfio.errors import (
    AccessDeniedError,
    GroupBusyError,
    GroupNotViableError,
    IoctlError,
    UnavailableError,
    VfioError,
)
from pyvfio.findings import Command, Finding
from pyvfio.pci.binding import VFIO_PCI
from pyvfio.pci.cdevs import cdev_node, explain_cdev, explain_iommufd, how_to_free, iommufd_node, no_cdev
from pyvfio.pci.groups import group_members, group_node, holders_of_group
from pyvfio.pci.nodes import explain_rights, give_command, mknod_command
from pyvfio.pci.refusals import is_open_somewhere
from pyvfio.pci.sysfs import CDEVS, PciDevice, read_device

RIGHTS = "rights-to-come"
"""The name of a check without findings of this name: the findings name the node that the bind makes."""
CONTAINER, GROUP, IOMMUFD, CDEV = "container-node", "group-node", "iommufd-node", "device-node"


def check_container(case: Case) -> Iterator[Finding]:
    """Whether this user may open /dev/vfio/vfio, and whether the kernel has type1 behind the node."""
    if case.on_iommufd:
        return
    path = case.kernel.dev / "vfio/vfio"
    try:
        if not case.works:
            Container(kernel=case.kernel).close()
    except VfioError as error:
        yield _refused(case, CONTAINER, path, error)
    else:
        yield Finding(CONTAINER, "ok", f"{path} can be opened, and has type1")


def check_group(case: Case) -> Iterator[Finding]:
    """Whether this user may open the group, and whether a container takes the group."""
    if (number := case.group) is None or case.on_iommufd:
        return
    path = group_node(number, kernel=case.kernel)
    try:
        with Container(kernel=case.kernel) as container:
            container.open_group(number)
    except VfioError as error:
        yield from _refused_group(case, path, error)
    else:
        case.taken = True
        yield Finding(GROUP, "ok", f"{path} can be opened, and a container takes the group")


def check_iommufd(case: Case) -> Iterator[Finding]:
    """Whether this user may open /dev/iommu: an obstacle where the program uses iommufd, else a note."""
    path = iommufd_node(case.kernel)
    if not case.on_iommufd and (case.error is not None or not (case.kernel.sysfs / "class/misc/iommu").exists()):
        return
    try:
        case.kernel.close(case.kernel.open(str(path), os.O_RDWR))
    except OSError as error:
        yield _as_note(case, _refused(case, IOMMUFD, path, explain_iommufd(case.kernel, path, error)))
    else:
        yield Finding(IOMMUFD, "ok", f"{path} can be opened")


def check_cdev(case: Case) -> Iterator[Finding]:
    """Whether this user may open the device's own node, and no other process has the device or the group."""
    device = case.device
    if device is None or (not case.on_iommufd and (case.error is not None or device.cdev is None)):
        return
    path = cdev_node(device.bdf, kernel=case.kernel)
    if path is None:
        yield of_error(CDEV, no_cdev(case.kernel, device.bdf))
        return
    try:
        case.kernel.close(case.kernel.open(str(path), os.O_RDWR))
    except OSError as error:
        found = _refused(case, CDEV, path, explain_cdev(case.kernel, device.bdf, path, error))
        yield _as_note(case, found)
        return
    if (busy := _group_in_use(case, device)) is not None and case.on_iommufd:
        yield _busy(busy, CDEV)
    else:
        yield Finding(CDEV, "ok", f"{path} can be opened")


def _as_note(case: Case, finding: Finding) -> Finding:
    """Return a refusal as a note where the program uses type1."""
    return finding if case.on_iommufd else replace(finding, status="note")


def _group_in_use(case: Case, device: PciDevice) -> GroupBusyError | None:
    """Return the error that a bind to an iommufd would raise because of another process, as far as can be seen.

    The kernel lets several processes open the node of a device, and refuses the second bind.
    """
    number = device.iommu_group
    if number is None:
        return None
    holders = holders_of_group(case.kernel, number)
    if not holders and not is_open_somewhere(case.kernel, group_node(number, kernel=case.kernel)):
        return None
    return GroupBusyError(number, holders, hint=how_to_free(holders))


def check_rights_to_come(case: Case) -> Iterator[Finding]:
    """The rights on a node that appears when the device is bound: root's, unless a udev rule says otherwise."""
    if case.here.root:
        return
    number = case.group
    path = case.kernel.dev / "vfio" / ("N" if number is None else str(number))
    if case.on_iommufd:
        path = case.kernel.dev / CDEVS / "vfioN"
    commands = _give(case)
    yield Finding(
        CDEV if case.on_iommufd else GROUP,
        "wrong",
        f"{path} appears when the device is bound, and belongs to root unless a udev rule gives rights",
        f"{explain_rights(path, case.here, case.bdf or 'BDF')}.",
        commands=commands,
        by_hand="" if commands else "Run pyvfio doctor again when the device is bound",
    )


def _refused_group(case: Case, path: Path, error: VfioError) -> Iterator[Finding]:
    if isinstance(error, GroupBusyError):
        yield _busy(error, GROUP)
    elif isinstance(error, GroupNotViableError):
        yield of_error("viability", error, by_hand="Bind each of them to vfio-pci or to no driver at all")
    elif isinstance(error, IoctlError) and error.errno == errnos.EPERM:
        case.error = error  # for the check of interrupts
    else:
        yield _refused(case, GROUP, path, error)


def _busy(error: GroupBusyError, check: str) -> Finding:
    return Finding(
        check,
        "wrong",
        error.message,
        commands=tuple(
            Command(f"kill {holder.pid}", f"{holder.command} has the group open", risky=True)
            for holder in error.holders
            if not holder.is_this_process
        ),
        by_hand=error.hint,
    )


def _refused(case: Case, check: str, path: Path, error: VfioError) -> Finding:
    found = of_error(check, error)
    return Finding(check, "wrong", found.summary, commands=_fix(case, path, error), by_hand=found.by_hand)


def _fix(case: Case, path: Path, error: VfioError) -> tuple[Command, ...]:
    if case.here.container or case.here.user_namespace:
        return ()
    if isinstance(error, AccessDeniedError):
        if error.errno != errnos.EACCES or case.here.root:
            return ()
        return (Command(f"chmod 666 {path}"),) if path.name == "vfio" else _give(case)
    if isinstance(error, UnavailableError):
        command = mknod_command(case.kernel, path)
        return (Command(f"mkdir -p {path.parent} && {command}"),) if command else ()
    return ()


def _give(case: Case) -> tuple[Command, ...]:
    """Return the command that gives this user the nodes of the device, or of a bound device of the group."""
    device = case.device or _bound_member(case)
    if device is None or case.here.container or case.here.user_namespace:
        return ()
    driver = device.driver if device.is_vfio and device.driver != VFIO_PCI else None
    return (
        Command(
            give_command(case.here.user, device.bdf, driver),
            "The rights last until the device is unbound; --persist renews the rights at each boot",
        ),
    )


def _bound_member(case: Case) -> PciDevice | None:
    """Return a device of the group that has a driver of VFIO."""
    if case.group is None:
        return None
    for member in group_members(case.group, kernel=case.kernel):
        with suppress(VfioError, ValueError):  # a member is perhaps not PCI, or is removed meanwhile
            device = read_device(member.bdf, kernel=case.kernel)
            if device.is_vfio:
                return device
    return None
