"""The examination: which checks are made, in which order, and which of them wait for others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias, cast

from pyvfio.arguments import checked_kernel
from pyvfio.diagnosis import device, machine, memory, modules, nodes
from pyvfio.diagnosis.case import Case, of_error
from pyvfio.diagnosis.report import Diagnosis
from pyvfio.errors import (
    AccessDeniedError,
    DeviceNotFoundError,
    EntryLimitError,
    GroupBusyError,
    GroupNotViableError,
    IoctlError,
    NotBoundError,
    PinLimitError,
    RollbackError,
    UnavailableError,
    UnsupportedError,
    VfioError,
)
from pyvfio.findings import Finding
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.groups import this_process
from pyvfio.pci.sysfs import CDEVS, parse_bdf
from pyvfio.units import check_whole_number

_Make: TypeAlias = Callable[[Case], Iterator[Finding]]


class _Check(NamedTuple):
    """A check, and the names of those that have to be right before this one can be made.

    `only_if`: made only where that one is wrong.
    """

    name: str
    make: _Make
    after: frozenset[str] = frozenset()
    only_if: str = ""


_DEVICE = frozenset({"iommu", "device"})
_BOUND = _DEVICE | {"kernel", "modules", nodes.CONTAINER, "group", "driver", "viability"}

_CHECKS = (
    _Check("kernel", machine.check_kernel),
    _Check("iommu", machine.check_iommu),
    _Check("modules", modules.check_modules, frozenset({"kernel"})),
    _Check(nodes.CONTAINER, nodes.check_container, frozenset({"kernel", "modules"})),
    _Check(nodes.IOMMUFD, nodes.check_iommufd, frozenset({"kernel", "modules"})),
    _Check("device", device.check_device),
    _Check("group", device.check_membership, _DEVICE),
    _Check("use", device.check_uses, _DEVICE),
    _Check("driver", device.check_driver, _DEVICE | {"group"}),
    _Check("viability", device.check_viability, _DEVICE | {"group"}),
    _Check(nodes.GROUP, nodes.check_group, _BOUND),
    _Check(nodes.CDEV, nodes.check_cdev, _BOUND),
    _Check(nodes.RIGHTS, nodes.check_rights_to_come, _DEVICE, only_if="driver"),
    _Check("interrupts", machine.check_interrupts, frozenset({"iommu"})),
    _Check("reset", device.check_reset, frozenset({"device"})),
    _Check("memlock", memory.check_memlock),
    _Check("room", memory.check_room),
    _Check("hugepages", memory.check_huge_pages),
    _Check("limits", memory.check_limits),
    _Check("entries", memory.check_entries),
)
_LOST_AT_BOOT = frozenset({"use", "driver", "viability", nodes.GROUP, nodes.CDEV, nodes.RIGHTS})
"""Checks that wait for a boot: the next boot undoes the effect of their commands."""

_FIXED_AFTER = {"interrupts": "modules"}
"""Interrupts are judged after the group was tried, and fixed before any device."""

_FITTING: tuple[tuple[type[VfioError], frozenset[str]], ...] = (
    (DeviceNotFoundError, frozenset({"iommu", "device", "group"})),
    (NotBoundError, frozenset({"modules", "device", "use", "driver"})),
    (GroupNotViableError, frozenset({"use", "viability"})),
    (GroupBusyError, frozenset({nodes.GROUP, nodes.CDEV})),
    (AccessDeniedError, frozenset({nodes.CONTAINER, nodes.GROUP, nodes.IOMMUFD, nodes.CDEV})),
    (PinLimitError, frozenset({"memlock", "room"})),
    (EntryLimitError, frozenset({"entries"})),
    (
        UnavailableError,
        frozenset({"kernel", "iommu", "modules", nodes.CONTAINER, nodes.GROUP, nodes.IOMMUFD, nodes.CDEV}),
    ),
    (UnsupportedError, frozenset({"kernel", "modules", "reset"})),
)
_FITTING_REQUESTS = {
    "VFIO_SET_IOMMU": frozenset({"modules", "interrupts", "viability"}),
    "VFIO_GROUP_SET_CONTAINER": frozenset({"interrupts", "viability"}),
    "VFIO_GROUP_GET_DEVICE_FD": frozenset({"device", "driver", "reset"}),
    "VFIO_DEVICE_BIND_IOMMUFD": frozenset({"interrupts", "viability", nodes.CDEV}),
    "mmap": frozenset({"hugepages", "limits"}),
    "mprotect": frozenset({"limits"}),
    "madvise": frozenset({"room", "hugepages", "limits"}),
    "mlockall": frozenset({"memlock"}),
}


_REQUESTS_OF_IOMMUFD = frozenset({"VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"})
ADDRESS_SPACES = ("type1", "iommufd")


def doctor(
    bdf: str | None = None, *, memory: int | None = None, kernel: Kernel | None = None, iommu: str | None = None
) -> Diagnosis:
    """Find the obstacles between this machine, or one device, and `open_device`.

    The findings are in the order in which to fix them. `memory`: bytes that the program is going to map, for the
    limits; None: not known. `iommu`: "type1" or "iommufd", as for `open_device`; None: type1 if the kernel has type1.
    Nothing is changed. The nodes of VFIO and of iommufd are opened and closed. A free group is attached to a container
    for a moment; another program that opens the group in that moment gets GroupBusyError. No device is bound to an
    iommufd, for that resets the device.

    Raises ValueError for text that is no PCI address, for a negative `memory` and for another `iommu`, TypeError for an
    argument of another class. Files that are missing or hold garbage are findings, and raise nothing.

    Synchronization: any thread.
    Cost: some 10 ms, and a look at each process where a group is in use.
    """
    kernel = checked_kernel(kernel)
    return examine(bdf, memory=memory, kernel=kernel, process=this_process(kernel.proc) or None, iommu=iommu)


def examine(
    bdf: str | None,
    *,
    memory: int | None,
    kernel: Kernel | None = None,
    process: int | None = None,
    iommu: str | None = None,
) -> Diagnosis:
    """As `doctor`. `process`: whose limit of locked memory the commands raise, such as the shell of a user."""
    address = None if bdf is None else parse_bdf(bdf)
    size = None if memory is None else check_whole_number(memory, "memory")
    if size is not None and size < 0:
        raise ValueError(f"memory is a number of bytes, 0 or more, not {size}")
    if iommu not in {None, *ADDRESS_SPACES}:
        raise ValueError(f"iommu is {' or '.join(map(repr, ADDRESS_SPACES))}, not {iommu!r}")
    case = Case(checked_kernel(kernel), bdf=address, memory=size, process=process, iommu=iommu)
    findings = _run(case, _CHECKS)
    return Diagnosis(address, case.host, case.release, tuple(sorted(findings, key=_place)))


def explain(error: VfioError, *, kernel: object = None) -> tuple[Finding, ...]:
    """As `VfioError.explain`."""
    if not isinstance(error, VfioError):
        raise TypeError(f"explain() takes a VfioError, not {type(error).__name__}")
    names = _fitting(error)
    seam = cast(Kernel, kernel) if kernel is not None else LinuxKernel()
    case = Case(
        seam,
        bdf=error.bdf,
        memory=error.asked if isinstance(error, PinLimitError) else None,
        process=this_process(seam.proc) or None,
        number=_group_of(error),
        error=error,
        iommu="iommufd" if _is_of_iommufd(error) else None,
    )
    findings = _run(case, [check for check in _CHECKS if check.name in names])
    return tuple(finding for finding in sorted(findings, key=_place) if finding.status != "ok")


def _fitting(error: VfioError) -> frozenset[str]:
    for kind, names in _FITTING:
        if isinstance(error, kind):
            return names
    if isinstance(error, RollbackError):
        return frozenset().union(*(_fitting(each) for each in error.exceptions if isinstance(each, VfioError)))
    return _FITTING_REQUESTS.get(error.request, frozenset()) if isinstance(error, IoctlError) else frozenset()


def _is_of_iommufd(error: VfioError) -> bool:
    """Return whether an error can only come from the way through iommufd."""
    if isinstance(error, RollbackError):
        return any(_is_of_iommufd(each) for each in error.exceptions if isinstance(each, VfioError))
    if isinstance(error, AccessDeniedError):
        return error.path.endswith("/iommu") or f"/{CDEVS}/" in error.path
    return isinstance(error, IoctlError) and error.request in _REQUESTS_OF_IOMMUFD


def _group_of(error: VfioError) -> int | None:
    if isinstance(error, GroupNotViableError | GroupBusyError):
        return error.group
    name = os.path.basename(error.path) if isinstance(error, AccessDeniedError) else ""
    return int(name) if name.isascii() and name.isdecimal() else None


def _place(finding: Finding) -> int:
    """Where a finding stands in the order in which to fix them."""
    order = {check.name: index for index, check in enumerate(_CHECKS)}
    return order.get(_FIXED_AFTER.get(finding.check, finding.check), order["limits"])


def _run(case: Case, checks: Iterable[_Check]) -> list[Finding]:
    """Make the checks that wait for none that is wrong."""
    findings: list[Finding] = []
    for check in checks:
        wrong = {finding.check for finding in findings if finding.status == "wrong"}
        boot = any(finding.reboot for finding in findings)
        if check.after & wrong or (boot and check.name in _LOST_AT_BOOT):
            continue
        if not check.only_if or check.only_if in wrong:
            findings += _made(check, case)
    return findings


def _made(check: _Check, case: Case) -> list[Finding]:
    try:
        return list(check.make(case))
    except (VfioError, OSError) as error:
        return [of_error(check.name, error)]
