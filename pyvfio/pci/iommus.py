"""The reasons why the kernel uses no IOMMU, in the order in which a person has to remove the reasons.

Source: `detect_intel_iommu` and `intel_iommu_setup` in drivers/iommu/intel, `amd_iommu_detect` in drivers/iommu/amd,
`iommu_setup` in arch/x86/kernel/pci-dma.c.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pyvfio.kernel import Kernel
from pyvfio.pci.boot import build_options, command_line
from pyvfio.pci.sysfs import list_names, printable, read_text

INTEL, AMD, ARM, VIRTIO = "DMAR", "IVRS", "IORT", "VIOT"
TABLES = frozenset({INTEL, AMD, ARM, VIRTIO})
"""ACPI's tables with IOMMUs."""

_ON = "intel_iommu=on"
_IN_FIRMWARE = "Enable the IOMMU in the firmware's setup (Intel: VT-d, AMD: IOMMU or AMD-Vi)"
_ADD_IOMMU = (
    "Add an IOMMU to the virtual machine; for QEMU: -machine q35,kernel-irqchip=split "
    "-device intel-iommu,intremap=on,caching-mode=on, or -device virtio-iommu-pci"
)


@dataclass(frozen=True, slots=True)
class IommuProblem:
    """One reason why the kernel uses no IOMMU, and the remedy.

    `add` and `remove`: words of the kernel's command line. `driver`: a module that has to be in the initramfs.
    `only_line`: a change of the command line, and a boot, fix the problem.
    `step`: the part of the remedy before the change of the command line; empty: the hint.
    """

    reason: str
    hint: str
    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    driver: str = ""
    only_line: bool = False
    step: str = ""


class _Machine(NamedTuple):
    """A snapshot of the facts that decide whether the kernel uses an IOMMU."""

    tables: frozenset[str]
    words: Sequence[str]
    virtual: bool
    xen: bool
    intel: bool
    device_tree: bool


def iommu_units(kernel: Kernel) -> list[str]:
    """Return the names of the IOMMUs that the kernel uses."""
    return sorted(list_names(kernel.sysfs / "class/iommu"))


def iommu_problems(kernel: Kernel) -> tuple[IommuProblem, ...]:
    """Return the reasons why the kernel uses no IOMMU, the first to remove first; empty if it uses one.

    Cost: some small files, and the kernel's configuration where an Intel IOMMU is off.
    """
    if units := iommu_units(kernel):
        return () if list_names(kernel.sysfs / "kernel/iommu_groups") else (_no_groups(units),)
    machine = _look_at(kernel)
    if machine.xen:
        return (_XEN,)
    problems = []
    off = _words_off(machine)
    if not machine.tables and not machine.device_tree and not any(word.startswith("acpi=") for word in off):
        problems.append(_absent(machine))
    if off:
        problems.append(_told_not_to(machine, off))
    elif machine.tables or machine.device_tree:
        problems.append(_not_used(kernel, machine))
    return tuple(problems)


def _look_at(kernel: Kernel) -> _Machine:
    return _Machine(
        tables=TABLES & list_names(kernel.sysfs / "firmware/acpi/tables"),
        words=command_line(kernel),
        virtual=is_virtual_machine(kernel),
        xen=read_text(kernel.sysfs / "hypervisor/type") == "xen",
        intel=re.search(r"^vendor_id\s*:\s*GenuineIntel", _processors(kernel), re.MULTILINE) is not None,
        device_tree=bool(list_names(kernel.sysfs / "firmware/devicetree/base")),
    )


def is_virtual_machine(kernel: Kernel) -> bool:
    """Return whether this machine is virtual: a flag of the processors or the vendor of the firmware shows this."""
    flags = re.search(r"^flags\s*:.*\bhypervisor\b", _processors(kernel), re.MULTILINE)
    return flags is not None or read_text(kernel.sysfs / "class/dmi/id/sys_vendor") == "QEMU"


def _processors(kernel: Kernel) -> str:
    return read_text(kernel.proc / "cpuinfo") or ""


def _values(word: str) -> tuple[str, list[str]]:
    """Split `intel_iommu=on,sm_on` into the name and the values."""
    name, _, values = word.partition("=")
    return name, values.split(",")


def _words_off(machine: _Machine) -> list[str]:
    """Return the words of the command line that turn the IOMMU off.

    The last word for Intel decides. No later word reverts `off` for all IOMMUs or for AMD.
    """
    intel: list[str] = []
    others: list[str] = []
    for word in machine.words:
        name, values = _values(word)
        decided = [value for value in values if value in {"on", "off"}]
        if name == "intel_iommu" and AMD not in machine.tables and decided:
            intel = [*intel, word] if decided[-1] == "off" else []
        if _is_against_all(name, values) or (name == "amd_iommu" and "off" in values and INTEL not in machine.tables):
            others.append(word)
    return [*others, *intel]


def _is_against_all(name: str, values: Collection[str]) -> bool:
    return name in {"iommu", "acpi"} and "off" in values


def _told_on(words: Collection[str]) -> bool:
    return any(name == "intel_iommu" and "on" in values for name, values in map(_values, words))


def _told_not_to(machine: _Machine, off: Sequence[str]) -> IommuProblem:
    kept = [word for word in machine.words if word not in off]
    rest = [value for word in off for value in _others_than_off(word)]
    add = ""
    if INTEL in machine.tables and not _told_on(kept):
        add = ",".join([_ON, *rest])
    elif rest:
        add = f"intel_iommu={','.join(rest)}"
    shown = ", ".join(map(printable, off))
    options = "option" if len(set(off)) == 1 else "options"
    return IommuProblem(
        f"the kernel was told not to use the IOMMU ({shown})",
        f"Remove the {options} from the kernel command line{f', add {add},' if add else ''} and reboot",
        add=(add,) if add else (),
        remove=tuple(dict.fromkeys(off)),
        only_line=True,
    )


def _others_than_off(word: str) -> list[str]:
    name, values = _values(word)
    return [value for value in values if value not in {"off", "on", ""}] if name == "intel_iommu" else []


def _absent(machine: _Machine) -> IommuProblem:
    if machine.virtual:
        return IommuProblem(
            "this virtual machine has no IOMMU of its own",
            f"{_ADD_IOMMU}. With intel-iommu, also add {_ON} to the kernel command line of the virtual machine",
            add=() if _told_on(machine.words) else (_ON,),
            step=_ADD_IOMMU,
        )
    return IommuProblem(
        "the firmware announces no IOMMU",
        f"{_IN_FIRMWARE}; on Intel, then add {_ON} to the kernel command line",
        add=(_ON,) if machine.intel and not _told_on(machine.words) else (),
        step=_IN_FIRMWARE,
    )


def _not_used(kernel: Kernel, machine: _Machine) -> IommuProblem:
    """Return the reason why the kernel does not use an IOMMU that no word of the command line turns off."""
    options = build_options(kernel)
    for table, option in ((INTEL, "INTEL_IOMMU"), (AMD, "AMD_IOMMU")):
        if table in machine.tables and options.get(option) == "n":
            return IommuProblem(
                f"the firmware announces an IOMMU ({table}), and this kernel is built without CONFIG_{option}",
                f"For the next boot, choose a kernel that has CONFIG_{option}, such as the distribution's own",
            )
    if INTEL in machine.tables and not _told_on(machine.words) and options.get("INTEL_IOMMU_DEFAULT_ON") != "y":
        default = " (CONFIG_INTEL_IOMMU_DEFAULT_ON is not set)" if "INTEL_IOMMU_DEFAULT_ON" in options else ""
        return IommuProblem(
            f"the firmware announces an IOMMU, and the kernel was not told to use the IOMMU{default}",
            f"Add {_ON} to the kernel command line and reboot",
            add=(_ON,),
            only_line=True,
        )
    tables = ", ".join(sorted(machine.tables)) or "the device tree may have one"
    waits = machine.tables <= {VIRTIO} and machine.tables and not (kernel.sysfs / "module/virtio_iommu").exists()
    return IommuProblem(
        f"the firmware announces an IOMMU ({tables}), and the kernel has not initialized the IOMMU",
        "Read dmesg | grep -i -e dmar -e iommu; the driver may be missing (virtio_iommu is often a module)",
        driver="virtio_iommu" if waits else "",
    )


def _no_groups(units: Sequence[str]) -> IommuProblem:
    return IommuProblem(
        f"the kernel has this machine's IOMMUs ({', '.join(map(printable, units))}), and has made no group for any "
        "device",
        "The kernel has logged the reason: dmesg | grep -i iommu",
    )


_XEN = IommuProblem(
    "the hypervisor Xen has this machine's IOMMU, and this kernel is a guest of Xen",
    "For the next boot, choose an entry without Xen; VFIO needs a kernel that has the IOMMU itself",
)
