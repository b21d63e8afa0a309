"""The checks of the kernel and of the IOMMU: options of the build, firmware, command line, interrupt remapping."""

from __future__ import annotations

import errno as errnos
import re
from collections.abc import Iterator
from dataclasses import replace

from pyvfio.diagnosis.boot_loader import change_arguments
from pyvfio.diagnosis.case import IOMMUFD_OPTIONS, Case, of_error, write_line
from pyvfio.errors import IoctlError
from pyvfio.findings import Command, Finding
from pyvfio.pci.boot import command_line
from pyvfio.pci.iommus import IommuProblem, iommu_problems, iommu_units, is_virtual_machine
from pyvfio.pci.sysfs import list_names, printable, read_text

UNSAFE = "allow_unsafe_interrupts"


_NEEDED = (
    ("VFIO", "VFIO itself"),
    ("VFIO_PCI", "the driver vfio-pci"),
)
_NEEDED_BY_TYPE1 = (
    ("VFIO_GROUP", "the nodes of groups, /dev/vfio/N"),
    ("VFIO_IOMMU_TYPE1", "the IOMMU driver of VFIO's containers"),
)
_NEEDED_BY_IOMMUFD = (
    ("IOMMUFD", "the node /dev/iommu"),
    ("VFIO_DEVICE_CDEV", "the nodes of devices, /dev/vfio/devices/vfioN"),
)
_REMAPPED = re.compile(r"\bIR-(?:PCI|IO-APIC|HPET|DMAR)|\bITS-(?:p?MSI|PCI-MSI)", re.IGNORECASE)
_NOT_REMAPPED = re.compile(r"\b(?:IO-APIC|PCI-MSIX?)\b")
_AGAINST = re.compile(r"nointremap|intremap=(?:\S*,)?off(?:,\S*)?|noapic|nolapic|nox2apic")


def check_kernel(case: Case) -> Iterator[Finding]:
    """The options that the running kernel was built with."""
    options, missing = case.options, _missing_options(case)
    for name, thing in missing:
        yield Finding(
            "kernel",
            "wrong",
            f"Linux {case.release or '(of unknown release)'} is built without CONFIG_{name}",
            f"pyvfio needs {thing}.",
            by_hand=f"For the next boot, choose a kernel with CONFIG_{name}, such as the distribution's own",
            reboot=True,
        )
    if not missing:
        known = "with the options that pyvfio needs" if options else "whose options cannot be read here"
        yield Finding("kernel", "ok", f"Linux {case.release or '(of unknown release)'}, {known}")


def _missing_options(case: Case) -> list[tuple[str, str]]:
    """Return the options that the program needs and the kernel was built without, each with its use.

    An option whose effect is seen counts as present: modules can be built for a kernel that was built without them.
    """
    options = case.options
    if case.on_iommufd:
        seen = {"IOMMUFD"} if (case.kernel.sysfs / "class/misc/iommu").exists() else set()
        seen |= {"VFIO_DEVICE_CDEV"} if any(case.kernel.sysfs.glob("class/vfio-dev/*/dev")) else set()
        # VFIO_DEVICE_CDEV depends on IOMMUFD: a configuration without the one has no line for the other.
        absent = {name for name in IOMMUFD_OPTIONS if options and options.get(name, "n") == "n"}
        needed = (*_NEEDED, *_NEEDED_BY_IOMMUFD)
    else:
        seen = {"VFIO", "VFIO_IOMMU_TYPE1"} if case.works else set()
        absent = set()
        needed = (*_NEEDED, *_NEEDED_BY_TYPE1)
    missing = [
        (name, thing) for name, thing in needed if (options.get(name) == "n" or name in absent) and name not in seen
    ]
    if case.on_iommufd or case.works:
        return missing
    if options.get("VFIO_CONTAINER") == "n" and options.get("IOMMUFD_VFIO_CONTAINER") != "y":
        missing.append(("VFIO_CONTAINER", "the node /dev/vfio/vfio"))
    return missing


# --- IOMMU ---------------------------------------------------------------------------------------------------------


def check_iommu(case: Case) -> Iterator[Finding]:
    """Check whether the kernel uses an IOMMU, with a finding for each obstacle."""
    problems = iommu_problems(case.kernel)
    for problem in problems:
        yield _iommu_finding(case, problem)
    if not problems:
        units = ", ".join(map(printable, iommu_units(case.kernel)))
        groups = len(list_names(case.kernel.sysfs / "kernel/iommu_groups"))
        yield Finding("iommu", "ok", f"the kernel uses {units} and has made {groups} group{'' if groups == 1 else 's'}")


def _iommu_finding(case: Case, problem: IommuProblem) -> Finding:
    commands, in_words = change_arguments(case, problem.add, problem.remove)
    if problem.driver:
        commands += _into_initramfs(case, problem.driver)
    # The hint names the change of the command line too: `step` leaves out the words that the commands repeat.
    by_hand = in_words if problem.only_line else ". ".join(filter(None, (problem.step or problem.hint, in_words)))
    return Finding(
        "iommu",
        "wrong",
        problem.reason,
        "VFIO gives a device to a program only behind an IOMMU, which keeps the device out of all other memory.",
        commands=commands,
        by_hand=by_hand,
        reboot=True,
        add_arguments=problem.add,
        remove_arguments=problem.remove,
    )


def _into_initramfs(case: Case, module: str) -> tuple[Command, ...]:
    """The module has to be there before the kernel probes the devices behind the IOMMU."""
    why = f"{module} has to be loaded before the devices are found"
    if case.here.container:
        return ()
    if case.has("etc/initramfs-tools/modules") and case.has_program("update-initramfs"):
        place = "/etc/initramfs-tools/modules"
        line = f"grep -qx {module} {place} || printf '%s\\n' {module} >> {place}"
        return Command(line, why), Command("update-initramfs -u")
    if case.has("etc/dracut.conf.d") and case.has_program("dracut"):
        return (
            write_line(f"'force_drivers+=\" {module} \"'", "/etc/dracut.conf.d/pyvfio.conf", why),
            Command("dracut --force"),
        )
    return ()


# --- Interrupt remapping -------------------------------------------------------------------------------------------


def check_interrupts(case: Case) -> Iterator[Finding]:
    """Whether interrupts are remapped. Otherwise type1 refuses a group (EPERM of VFIO_SET_IOMMU), and iommufd a device
    (EPERM of VFIO_DEVICE_BIND_IOMMUFD)."""
    module = _module(case)
    allowed = read_text(case.kernel.sysfs / f"module/{module}/parameters/{UNSAFE}") in {"Y", "1"}
    remapped, refusal = _remapped(case), _refusal(case)
    if refusal is not None and (remapped or allowed):
        yield of_error("interrupts", refusal)
    elif remapped or (case.taken and not allowed):
        yield Finding("interrupts", "ok", "interrupts are remapped")
    elif allowed and (case.taken or remapped is False):
        yield Finding(
            "interrupts",
            "note",
            f"interrupts are not remapped, and {module} was told to accept that ({UNSAFE})",
            "A device can write to any interrupt vector of this machine: use devices that are trusted.",
        )
    elif remapped is False or refusal is not None:
        yield _unsafe_interrupts(case)
    else:
        yield Finding("interrupts", "ok", "/proc/interrupts does not say whether interrupts are remapped")


def _module(case: Case) -> str:
    """Return the module whose parameter accepts interrupts that are not remapped. Each has a parameter of its own."""
    return "iommufd" if case.on_iommufd else "vfio_iommu_type1"


def _refusal(case: Case) -> IoctlError | None:
    """The EPERM of a container that took no group, or of an iommufd that took no device."""
    error = case.error
    return error if isinstance(error, IoctlError) and error.errno == errnos.EPERM else None


def _remapped(case: Case) -> bool | None:
    """Return whether interrupts are remapped, by the names of the interrupt controllers; None if unknown."""
    text = read_text(case.kernel.proc / "interrupts") or ""
    if _REMAPPED.search(text):
        return True
    return False if _NOT_REMAPPED.search(text) else None


def _unsafe_interrupts(case: Case) -> Finding:
    against = tuple(word for word in command_line(case.kernel) if _AGAINST.fullmatch(word))
    refuses = "iommufd refuses every device" if case.on_iommufd else "VFIO refuses every group"
    summary = f"interrupts are not remapped, so {refuses}"
    why = "Without remapping a device can forge any interrupt of this machine."
    if against:
        commands, by_hand = change_arguments(case, (), against)
        return Finding(
            "interrupts",
            "wrong",
            f"{summary}: the kernel was told so ({', '.join(map(printable, against))})",
            why,
            commands=commands,
            by_hand=by_hand,
            reboot=True,
            remove_arguments=against,
        )
    by_hand = "Turn interrupt remapping on in the firmware (x2APIC; QEMU: intel-iommu,intremap=on)"
    if case.here.container:
        return Finding("interrupts", "wrong", summary, why, by_hand=f"{by_hand}, or on the host allow {UNSAFE}")
    module = _module(case)
    option = f"options {module} {UNSAFE}=1"
    # A device of a virtual machine can forge interrupts of that machine alone: the host has a separate IOMMU.
    risky = not is_virtual_machine(case.kernel)
    commands = (
        Command(
            f"echo Y > /sys/module/{module}/parameters/{UNSAFE}", "Accept the risk until the next boot", risky=risky
        ),
        replace(write_line(f"'{option}'", "/etc/modprobe.d/pyvfio.conf", "and from the next boot on"), risky=risky),
    )
    return Finding("interrupts", "wrong", summary, why, commands=commands, by_hand=f"{by_hand}. Or accept the risk")
