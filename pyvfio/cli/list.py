"""`pyvfio list`: the PCI devices of the machine, and whether each can be opened through VFIO. Needs no root."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence

from pyvfio import pci
from pyvfio.cli.common import FAILED, OK, Json, Selector, complain, print_document, run, selector_argument
from pyvfio.cli.names import HardwareDatabase, Names
from pyvfio.cli.parser import EXIT_STATUS, Parser
from pyvfio.cli.pci_words import class_name
from pyvfio.cli.state import STATES, STYLES, GroupState, device_state, group_state
from pyvfio.cli.terminal import add_colour_option, find_terminal, fitting_table
from pyvfio.cli.tree import Branch, branches, parent_of
from pyvfio.errors import DeviceNotFoundError, VfioError
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.sriov import physical_function

NAME = "pyvfio list"
SCHEMA = "pyvfio.list/1"

HEADER = ("BDF", "ID", "DEVICE", "DRIVER", "GROUP", "CDEV", "NUMA", "STATE")
_ELASTIC = ("DEVICE", "DRIVER", "STATE")
_DROPPED = ("NUMA", "CDEV")
_DROPPED_OF_TREE = ("NUMA", "CDEV", "ID", "DEVICE", "DRIVER")
_ONLY_WITH_VALUES = "CDEV"
"""A column that is left out of a list in which no device has a value: most kernels make no nodes of devices."""

_Groups = Mapping[int | None, GroupState | None]


def state_text(kernel: Kernel, device: pci.PciDevice, group: GroupState | None) -> str:
    """Return the state of a device, with the devices or processes that it is about."""
    return ": ".join(filter(None, device_state(kernel, device, group)))


def as_row(kernel: Kernel, device: pci.PciDevice, group: GroupState | None, names: Names) -> list[str]:
    """Return the cells of a device in the table."""
    return [
        device.bdf,
        f"{device.vendor:04x}:{device.device:04x}",
        names.device or class_name(device.class_code),
        device.driver or "",
        "" if device.iommu_group is None else str(device.iommu_group),
        device.cdev or "",
        "" if device.numa_node is None else str(device.numa_node),
        state_text(kernel, device, group),
    ]


def as_json(kernel: Kernel, device: pci.PciDevice, group: GroupState | None, names: Names) -> dict[str, Json]:
    """Return a device for programs. Keys are kept; later versions of pyvfio can add keys."""
    return {
        "bdf": device.bdf,
        "vendor": f"{device.vendor:04x}",
        "device": f"{device.device:04x}",
        "class": f"{device.class_code:06x}",
        "class_name": class_name(device.class_code),
        "vendor_name": names.vendor,
        "device_name": names.device,
        "state": device_state(kernel, device, group)[0],
        "driver": device.driver,
        "driver_override": device.driver_override,
        "is_bridge": device.is_bridge,
        "is_vfio": device.is_vfio,
        "numa_node": device.numa_node,
        "parent": parent_of(kernel, device.bdf),
        "physical_function": physical_function(device.bdf, kernel=kernel),
        "iommu_group": device.iommu_group,
        "group_after_bind": pci.comes_later(device, kernel=kernel),
        "group_viable": None if group is None else group.viable,
        "group_blockers": [] if group is None else [member.bdf for member in group.blockers],
        "group_node": None if group is None or group.node is None else str(group.node),
        "group_holders": []
        if group is None
        else [
            {"pid": holder.pid, "command": holder.command, "is_this_process": holder.is_this_process}
            for holder in group.holders
        ],
        "cdev": device.cdev,
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    states = "\n".join(f"  {word:<13} {meaning}" for word, meaning in STATES.items())
    parser = Parser(
        NAME,
        "List PCI devices with name, driver, IOMMU group and state. A device without a known name is shown by "
        "class. Only root sees the processes of other users. `pyvfio info BDF` shows more of a device. "
        "`pyvfio doctor BDF` shows how to make a device ready.",
        notes=f"states:\n{states}\n\n{EXIT_STATUS}",
        examples=[
            "pyvfio list",
            "pyvfio list --tree",
            "pyvfio list 8086:10d3 --json",
            "pyvfio list --driver vfio-pci",
        ],
    )
    parser.add_argument(
        "device", nargs="*", type=selector_argument, metavar="BDF|VENDOR:DEVICE", help="only these, e.g. 8086:10d3"
    )
    parser.add_argument("--group", type=int, metavar="N", help="only the devices of this IOMMU group")
    parser.add_argument("--driver", metavar="D", help=f"only those bound to this driver ({pci.NO_DRIVER}: to none)")
    parser.add_argument("--tree", action="store_true", help="show each device below the upstream bridge")
    parser.add_argument("--json", action="store_true", help="print a JSON document, pyvfio.list/1")
    add_colour_option(parser)
    return parser


def _selected(device: pci.PciDevice, options: argparse.Namespace) -> bool:
    return (
        (not options.device or any(selector(device) for selector in options.device))
        and (options.group is None or device.iommu_group == options.group)
        and (options.driver is None or (device.driver or pci.NO_DRIVER) == options.driver)
    )


def main(
    arguments: Sequence[str] | None = None, *, kernel: Kernel | None = None, database: HardwareDatabase | None = None
) -> int:
    """Print the devices that the options select.

    Return 1 if a device or a group that was named does not exist. Options that select no device are no failure.
    """
    options = make_parser().parse_args(arguments)
    kernel = kernel or LinuxKernel()
    database = database or HardwareDatabase(kernel)
    try:
        every = pci.devices(kernel=kernel)
        missing = list(_missing(kernel, every, options.device, options.group))
        devices = [device for device in every if _selected(device, options)]
        groups = {group: group_state(kernel, group) for group in {device.iommu_group for device in devices}}
    except VfioError:
        if options.json:
            print_document(SCHEMA, devices=[])
        raise
    if options.json:
        rows = [as_json(kernel, one, groups[one.iommu_group], database.names(one)) for one in devices]
        print_document(SCHEMA, devices=rows)
    elif devices or not missing:
        print(*_lines(kernel, devices, groups, database, options), sep="\n")
    for error in missing:
        complain(NAME, error)
    return FAILED if missing else OK


def _lines(
    kernel: Kernel,
    devices: Sequence[pci.PciDevice],
    groups: _Groups,
    database: HardwareDatabase,
    options: argparse.Namespace,
) -> list[str]:
    """The table, or the tree."""
    terminal = find_terminal(options.color)
    rows = {one.bdf: as_row(kernel, one, groups[one.iommu_group], database.names(one)) for one in devices}
    styles = {one.bdf: STYLES.get(device_state(kernel, one, groups[one.iommu_group])[0]) for one in devices}
    shown = branches(kernel, list(rows)) if options.tree else [Branch("", bdf) for bdf in rows]
    header, cells = _without_empty([[signs + bdf, *rows[bdf][1:]] for signs, bdf in shown])
    return fitting_table(
        header,
        cells,
        terminal,
        elastic=_ELASTIC,
        drop=_DROPPED_OF_TREE if options.tree else _DROPPED,
        styles=[styles[bdf] for _signs, bdf in shown],
    )


def _without_empty(rows: list[list[str]]) -> tuple[Sequence[str], list[list[str]]]:
    """Return the header and the rows, without the column that only some kernels fill if no row has a value there."""
    place = HEADER.index(_ONLY_WITH_VALUES)
    if any(row[place] for row in rows):
        return HEADER, rows
    return (*HEADER[:place], *HEADER[place + 1 :]), [row[:place] + row[place + 1 :] for row in rows]


def _missing(
    kernel: Kernel, every: Sequence[pci.PciDevice], selectors: Sequence[Selector], group: int | None
) -> Iterator[DeviceNotFoundError]:
    """Each device and group that was named and does not exist."""
    try:
        if group is not None:
            pci.group_members(group, kernel=kernel)
    except DeviceNotFoundError as error:
        yield error
    for selector in selectors:
        if any(selector(device) for device in every):
            continue
        try:
            if selector.bdf is not None:
                pci.read_device(selector.bdf, kernel=kernel)
                continue  # the device has appeared meanwhile
        except DeviceNotFoundError as error:
            yield error
        else:
            yield DeviceNotFoundError(f"there is no PCI device {selector.text}", hint="Without arguments all are shown")


if __name__ == "__main__":
    run(main, name=NAME)
