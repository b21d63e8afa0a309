"""`pyvfio info`: all that the kernel says of a PCI device. Needs no root, but for the capabilities."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pyvfio import pci
from pyvfio.cli import list as list_command
from pyvfio.cli.common import FAILED, OK, Json, bdf_argument, complain, print_document, run
from pyvfio.cli.facts import (
    MODULES,
    Bar,
    Link,
    Modules,
    Power,
    Sriov,
    find_capabilities,
    find_modules,
    read_bars,
    read_link,
    read_power,
    read_reset_methods,
    read_sriov,
)
from pyvfio.cli.names import HardwareDatabase, Names
from pyvfio.cli.parser import Parser
from pyvfio.cli.pci_words import capability_name, class_name
from pyvfio.cli.state import READY, STYLES, GroupState, device_state, group_state, holder_names
from pyvfio.cli.terminal import Style, Terminal, add_colour_option, field_lines, find_terminal
from pyvfio.cli.tree import parent_of
from pyvfio.device.capabilities import Capabilities, Capability, MsixCapability, PcieCapability, PowerCapability
from pyvfio.errors import VfioError
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.sysfs import device_path, link_name, list_names, printable, read_number, read_text
from pyvfio.pci.usage import uses_of
from pyvfio.units import format_size

NAME = "pyvfio info"
SCHEMA = "pyvfio.info/1"

_COLUMN = 16


@dataclass(frozen=True, slots=True)
class Facts:
    """All facts of a device."""

    device: pci.PciDevice
    names: Names
    group: GroupState | None
    state: tuple[str, str]
    parent: str | None
    subsystem: str | None
    revision: str | None
    label: str | None
    modalias: str | None
    modules: Modules | None
    iommu: str | None
    group_type: str | None
    cdev: Path | None
    uses: tuple[str, ...]
    irq: int | None
    msi_vectors: int
    reset_methods: tuple[str, ...] | None
    bars: tuple[Bar, ...]
    link: Link | None
    sriov: Sriov | None
    power: Power
    capabilities: Capabilities | str


def gather(kernel: Kernel, bdf: str, database: HardwareDatabase, modules: Path = MODULES) -> Facts:
    """Return all facts of a device. Raises DeviceNotFoundError for a device that is not there."""
    device = pci.read_device(bdf, kernel=kernel)
    group = group_state(kernel, device.iommu_group)
    path = device_path(kernel, device.bdf)
    subsystem = [read_number(path / f"subsystem_{name}", 16) or 0 for name in ("vendor", "device")]
    revision = read_number(path / "revision", 16)
    number = device.iommu_group
    return Facts(
        device=device,
        names=database.names(device),
        group=group,
        state=device_state(kernel, device, group),
        parent=parent_of(kernel, device.bdf),
        subsystem=":".join(f"{each:04x}" for each in subsystem) if any(subsystem) else None,
        revision=None if revision is None else f"{revision:02x}",
        label=read_text(path / "label"),
        modalias=read_text(path / "modalias"),
        modules=find_modules(kernel, device.bdf, modules),
        iommu=link_name(path / "iommu"),
        group_type=None if number is None else read_text(kernel.sysfs / f"kernel/iommu_groups/{number}/type"),
        cdev=_existing(pci.cdev_node(device.bdf, kernel=kernel)),
        uses=tuple(uses_of(kernel, device.bdf)),
        irq=read_number(path / "irq", 10) or None,
        msi_vectors=len(list_names(path / "msi_irqs")),
        reset_methods=read_reset_methods(kernel, device.bdf),
        bars=read_bars(kernel, device.bdf),
        link=read_link(kernel, device.bdf),
        sriov=read_sriov(kernel, device.bdf),
        power=read_power(kernel, device.bdf),
        capabilities=find_capabilities(kernel, device.bdf),
    )


def _existing(node: Path | None) -> Path | None:
    """The device's own node; None if this /dev does not have the node."""
    return node if node is not None and node.exists() else None


# --- JSON --------------------------------------------------------------------------------------------------------


def as_json(kernel: Kernel, facts: Facts) -> Json:
    """Return a device for programs. Keys are kept; later versions of pyvfio can add keys."""
    group = facts.group
    return {
        **list_command.as_json(kernel, facts.device, group, facts.names),
        "state_detail": facts.state[1] or None,
        "subsystem": facts.subsystem,
        "revision": facts.revision,
        "label": facts.label,
        "modalias": facts.modalias,
        "modules": None if facts.modules is None else list(facts.modules.kernel),
        "vfio_modules": None if facts.modules is None else list(facts.modules.vfio),
        "group_members": [] if group is None else [asdict(member) for member in group.members],
        "group_type": facts.group_type,
        "iommu": facts.iommu,
        "vfio_node": None if facts.cdev is None else str(facts.cdev),
        "uses": list(facts.uses),
        "irq": facts.irq,
        "msi_vectors": facts.msi_vectors,
        "reset_methods": None if facts.reset_methods is None else list(facts.reset_methods),
        "bars": [asdict(bar) for bar in facts.bars],
        "link": None if facts.link is None else asdict(facts.link),
        "sriov": None if facts.sriov is None else asdict(facts.sriov),
        "power": asdict(facts.power),
        "capabilities": None if isinstance(facts.capabilities, str) else _capabilities_json(facts.capabilities),
        "capabilities_error": facts.capabilities if isinstance(facts.capabilities, str) else None,
    }


def _capabilities_json(found: Capabilities) -> list[Json]:
    return [
        _capability_json(each, extended=extended)
        for extended, capabilities in ((False, found.standard), (True, found.extended))
        for each in capabilities
    ]


def _capability_json(capability: Capability, *, extended: bool) -> Json:
    return {
        "name": capability_name(capability.id, extended=extended),
        "extended": extended,
        **{name: value.hex() if isinstance(value, bytes) else value for name, value in asdict(capability).items()},
    }


# --- Text --------------------------------------------------------------------------------------------------------


def fields(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the lines of a device: a name and a value each."""
    device = facts.device
    word, about = facts.state
    yield "state", f"{word}: {about}" if about else word
    if word not in {READY, "bridge"}:
        yield "", f"pyvfio doctor {device.bdf} says how to make it ready"
    yield "id", f"{device.vendor:04x}:{device.device:04x}"
    yield "subsystem", facts.subsystem or ""
    yield "revision", facts.revision or ""
    yield "class", f"{class_name(device.class_code)} ({device.class_code:06x})"
    yield "label", facts.label or ""
    yield "driver", device.driver or "none"
    yield "override", device.driver_override or ""
    if facts.modules is not None:
        yield "modules", ", ".join(facts.modules.kernel)
        yield "vfio modules", ", ".join(facts.modules.vfio)
    for use in facts.uses:
        yield "in use", use
    yield from _group_fields(facts)
    yield "behind", facts.parent or ""
    yield "NUMA node", "" if device.numa_node is None else str(device.numa_node)
    yield from _hardware_fields(facts)


def _group_fields(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "IOMMU", facts.iommu or ""
    group = facts.group
    if group is not None:
        kind = f" ({facts.group_type})" if facts.group_type else ""
        state = "made by VFIO, WITHOUT an IOMMU" if group.made_up else "viable" if group.viable else "not viable"
        yield "group", f"{facts.device.iommu_group}{kind}, {state}"
        for member in group.members:
            yield (
                "member",
                f"{member.bdf}: {member.driver or 'no driver'}{', blocks the group' if member.blocks else ''}",
            )
        yield "group node", "" if group.node is None else str(group.node)
        yield "open in", holder_names(group)
    yield "device node", "" if facts.cdev is None else str(facts.cdev)


def _hardware_fields(facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.reset_methods is not None:
        yield "reset", ", ".join(facts.reset_methods) or "none"
    interrupts = [
        f"INTx {facts.irq}" if facts.irq else "",
        f"{facts.msi_vectors} MSI or MSI-X" if facts.msi_vectors else "",
    ]
    yield "interrupts", ", ".join(filter(None, interrupts))
    for bar in facts.bars:
        yield bar.name, _bar_words(bar)
    if facts.link is not None:
        now, most = (facts.link.speed, facts.link.width), (facts.link.max_speed, facts.link.max_width)
        yield "link", f"{_link_words(*now)}; at most {_link_words(*most)}"
    if facts.sriov is not None:
        yield from _sriov_fields(facts.sriov)
    power = facts.power
    yield (
        "power",
        ", ".join(filter(None, [power.state, power.runtime, "no D3cold" if power.d3cold_allowed is False else ""])),
    )
    if isinstance(facts.capabilities, str):
        yield "capabilities", facts.capabilities
    else:
        for extended, found in ((False, facts.capabilities.standard), (True, facts.capabilities.extended)):
            for each in found:
                yield f"cap {each.offset:#x}", f"{capability_name(each.id, extended=extended)}{_details(each)}"


def _sriov_fields(sriov: Sriov) -> Iterator[tuple[str, str]]:
    if sriov.physical_function:
        yield "VF of", sriov.physical_function
    else:
        yield "SR-IOV", f"{len(sriov.virtual_functions)} of {sriov.total} virtual functions"
        yield "VFs", ", ".join(sriov.virtual_functions)


def _link_words(speed: str | None, width: int | None) -> str:
    return f"{speed or 'no speed'} x{width}" if width else speed or "no link"


def _bar_words(bar: Bar) -> str:
    address = "no address" if bar.start is None else f"at {bar.start:#x}"
    kind = "I/O ports" if bar.kind == "io" else f"{bar.width}-bit memory"
    return f"{format_size(bar.size)} {address}, {kind}{', prefetchable' if bar.prefetchable else ''}"


def _details(capability: Capability) -> str:
    match capability:
        case MsixCapability():
            return (
                f": {capability.vectors} vectors, {'on' if capability.enabled else 'off'}, table in BAR "
                f"{capability.table_bar} at {capability.table_offset:#x}, PBA in BAR {capability.pba_bar} at "
                f"{capability.pba_offset:#x}"
            )
        case PcieCapability():
            return ": function-level reset" if capability.can_flr else ": no function-level reset"
        case PowerCapability():
            return f": D{capability.state} of {', '.join(f'D{state}' for state in capability.states)}"
    return ""


def lines(facts: Facts, terminal: Terminal) -> list[str]:
    """Return the text of a device. A field without a value is left out."""
    names = " ".join(filter(None, [facts.names.vendor, facts.names.device])) or class_name(facts.device.class_code)
    heading = field_lines(facts.device.bdf, printable(names), terminal, indent=0, column=_COLUMN)
    found = [terminal.paint(line, Style.HEADING) for line in heading]
    for name, value in fields(facts):
        if value:
            text = _folded(name, printable(value), terminal)
            style = STYLES.get(facts.state[0]) if name == "state" else None
            found += [terminal.paint(line, style) for line in text]
    return found


def _folded(name: str, value: str, terminal: Terminal) -> list[str]:
    return field_lines(name, value, terminal, indent=2, column=_COLUMN)


# --- The command -------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = Parser(
        NAME,
        "Show all that the kernel says of PCI devices: names, drivers, IOMMU group, BARs, link, SR-IOV, reset, power "
        "and capabilities. Root alone can read the capabilities.",
        examples=["pyvfio info 0000:00:02.0", "pyvfio info 0000:00:02.0 --json"],
    )
    parser.add_argument("bdf", nargs="+", type=bdf_argument, metavar="BDF", help="PCI address, e.g. 0000:00:02.0")
    parser.add_argument("--json", action="store_true", help="print a JSON document, pyvfio.info/1")
    add_colour_option(parser)
    return parser


def main(
    arguments: Sequence[str] | None = None,
    *,
    kernel: Kernel | None = None,
    database: HardwareDatabase | None = None,
    modules: Path = MODULES,
) -> int:
    """Print the devices that exist. Return 1 if one does not."""
    options = make_parser().parse_args(arguments)
    kernel = kernel or LinuxKernel()
    database = database or HardwareDatabase(kernel)
    found, failures = [], []
    for bdf in dict.fromkeys(options.bdf):
        try:
            found.append(gather(kernel, bdf, database, modules))
        except VfioError as error:
            failures.append(error)
    if options.json:
        print_document(SCHEMA, devices=[as_json(kernel, facts) for facts in found])
    elif found:
        terminal = find_terminal(options.color)
        print("\n\n".join("\n".join(lines(facts, terminal)) for facts in found))
    for failure in failures:
        complain(NAME, failure)
    return FAILED if failures else OK


if __name__ == "__main__":
    run(main, name=NAME)
