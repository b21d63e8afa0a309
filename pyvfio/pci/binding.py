"""Changes of driver, in steps that are read back, and undone if the driver does not bind."""

from __future__ import annotations

import errno as errnos
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, SupportsFloat, SupportsIndex, TypeAlias

from pyvfio.arguments import checked_kernel
from pyvfio.errors import AccessDeniedError, RollbackError, VfioError
from pyvfio.guard import checkpoint, uninterrupted
from pyvfio.kernel import Kernel
from pyvfio.pci.refusals import check_driver, check_idle, check_loaded, checked_name, without_group
from pyvfio.pci.rights import NodeChange, NodeOwner, Rights, give, set_ownership, take_back
from pyvfio.pci.surroundings import Surroundings, look_around
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, device_path, read_device
from pyvfio.units import check_bool

_logger = logging.getLogger(__name__)

VFIO_PCI = "vfio-pci"

SysfsWriter: TypeAlias = Callable[[Path, str], None]
"""A function that writes a value to a file of sysfs; raises OSError."""

_PROBE_PAUSE = 0.1  # seconds between two attempts, as in SPDK's setup.sh


@dataclass(frozen=True, slots=True)
class Step:
    """One write to sysfs. `str(step)` is the equivalent shell command."""

    path: Path
    value: str

    def __str__(self) -> str:
        return f"echo {self.value} > {self.path}" if self.value else f"echo > {self.path}"


@dataclass(frozen=True, slots=True)
class Binding:
    """A completed change of driver, or with `dry_run` a planned one. `restore` undoes the change.

    * `driver` is the driver after the change; None if a dry run leaves the choice to the kernel.
    * `former_driver` and `former_override` are the state before the change.
    * `steps` are the writes to sysfs, empty if the device had the driver already.
    * `nodes` are the changes of ownership that the rights have made.
    """

    bdf: str
    driver: str | None
    former_driver: str | None
    former_override: str | None
    steps: tuple[Step, ...]
    nodes: tuple[NodeChange, ...] = ()


def write_sysfs(path: Path, value: str) -> None:
    """Write `value` to a file of sysfs in one write(2), as the kernel requires; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


class _Options(NamedTuple):
    """The options that all changes of driver have."""

    dry_run: bool
    force: bool
    patience: float
    write: SysfsWriter
    own: NodeOwner = set_ownership
    rights: Rights | None = None


def _writer(kernel: Kernel, write: SysfsWriter | None) -> SysfsWriter:
    """Return who writes to sysfs: by default a fake kernel itself, whose files have no effect."""
    return getattr(kernel, "write_sysfs", write_sysfs) if write is None else write


def _check_flags(*, dry_run: object, force: object) -> None:
    check_bool(dry_run, "dry_run")
    check_bool(force, "force")


def _checked_patience(patience: object) -> float:
    """Return `patience` in seconds as a float."""
    if isinstance(patience, str | bytes) or not isinstance(
        patience, SupportsFloat | SupportsIndex
    ):  # float() takes text
        raise TypeError(f"patience is a number of seconds, not {type(patience).__name__}")
    seconds = float(patience)
    if not seconds >= 0:
        raise ValueError(f"patience is a number of seconds, 0 or more, not {seconds}")
    return seconds


class _Change(NamedTuple):
    """A completed change, and the call that undoes the change and returns the failures."""

    binding: Binding
    undo: Callable[[], list[Exception]]


def _undo_unheard(change: _Change) -> None:
    """Undo a change whose caller gets the exception of a signal handler instead. Failures go to the log."""
    for failure in change.undo():
        _logger.error("%s was not restored: %s", change.binding.bdf, failure)


def bind(
    bdf: str,
    driver: str = VFIO_PCI,
    *,
    rights: Rights | None = None,
    dry_run: bool = False,
    force: bool = False,
    patience: float = 1.0,
    kernel: Kernel | None = None,
    write: SysfsWriter | None = None,
    own: NodeOwner = set_ownership,
) -> Binding:
    """Unbind a device from the current driver, if any, and bind the device to `driver`.

    If a step fails, the former driver, override and rights are restored and the error is raised. If the restore fails
    too, RollbackError is raised and lists all failures. The driver of a device that has `driver` already is not
    changed.

    If the kernel has an IOMMU, a device without an IOMMU group is bound too: some IOMMUs make the group when a driver
    is first bound. If no group appears, the driver does not bind.

    Args:
        bdf: the PCI address.
        driver: the name of a loaded driver; `NO_DRIVER` leaves the device without a driver.
        rights: the user or group that can open the device's nodes afterwards.
        dry_run: check and plan, and write nothing.
        force: bind although a network interface is up or a disk is in use.
        patience: seconds to wait for the driver, and for the nodes if `rights` are given.
        kernel: the running kernel by default.
        write, own: replacements for writes to sysfs and changes of ownership. A FakeKernel has its own `write_sysfs`.

    Raises:
        ValueError: `bdf` is not an address, `driver` is not a name, or `patience` is negative.
        TypeError: an argument has the wrong class.
        DeviceNotFoundError: no such device exists, or the device has no IOMMU group.
        UnavailableError: the driver is not loaded, or a node is missing after `patience` seconds.
        GroupBusyError: the group is open, and the kernel would wait for the close (`vfio_unregister_group_dev`).
        AccessDeniedError: the caller is not root.
        VfioError: the device is a bridge, the driver does not bind, or a right cannot be given.
        VfioError: sysfs has a text in place of a number, or, unless `force`, the device is in use in any namespace.

    Synchronization: any thread. Signal handlers that are Python functions run after the change, or while the driver is
    awaited. If a handler raises, the former driver is restored. A signal without a handler ends the process at once,
    and the device stays in the state of that moment.
    Cost: the remove of the former driver and the probe of the new driver.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> kernel = FakeKernel()  # without kernel=: the running kernel
        >>> plan = pci.bind("0000:00:02.0", "pcieport", dry_run=True, kernel=kernel)
        >>> [step.path.name for step in plan.steps]
        ['driver_override', 'unbind', 'drivers_probe']
    """
    if not isinstance(rights, Rights | None):
        raise TypeError(f"rights are Rights, such as Rights.parse('alice'), not {type(rights).__name__}")
    _check_flags(dry_run=dry_run, force=force)
    kernel = checked_kernel(kernel)
    options = _Options(dry_run, force, _checked_patience(patience), _writer(kernel, write), own, rights)
    return _bind(kernel, bdf, driver, options).binding


@uninterrupted(_undo_unheard)
def _bind(kernel: Kernel, bdf: str, driver: str, options: _Options) -> _Change:
    change = _bound(kernel, bdf, driver, options)
    if (rights := options.rights) is None or options.dry_run:
        return change
    return _then_own(
        change,
        lambda: give(kernel, read_device(bdf, kernel=kernel), rights, own=options.own, patience=options.patience),
        options.own,
    )


def _bound(kernel: Kernel, bdf: str, driver: str, options: _Options) -> _Change:
    wanted = None if checked_name(driver) == NO_DRIVER else driver
    device = read_device(bdf, kernel=kernel)
    if device.driver == wanted:
        return _nothing_to_do(device)
    check_driver(kernel, device, driver)
    check_idle(kernel, device, force=options.force)
    plan = [_override_step(kernel, device.bdf, driver), *_unbind_steps(kernel, device)]
    if wanted is not None:
        plan.append(_probe_step(kernel, device.bdf))
    return _change(kernel, device, plan, _Goal(wanted), options)


def unbind(
    bdf: str,
    *,
    to: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    patience: float = 1.0,
    kernel: Kernel | None = None,
    write: SysfsWriter | None = None,
) -> Binding:
    """Clear the override of a device, unbind the device, and let the kernel bind the matching driver, if any.

    With `to`, bind the device to that driver as `bind` does. A device without an override, with a driver that is not a
    driver of VFIO, is not changed.

    Args: as for `bind`.

    Raises: as `bind`; VfioError also if the former driver binds the device again.
    Synchronization: as for `bind`. Cost: as for `bind`.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> plan = pci.unbind("0000:00:02.0", dry_run=True, kernel=FakeKernel())
        >>> print(plan.former_driver, len(plan.steps))
        vfio-pci 3
    """
    if to is not None:
        return bind(bdf, to, dry_run=dry_run, force=force, patience=patience, kernel=kernel, write=write)
    _check_flags(dry_run=dry_run, force=force)
    kernel = checked_kernel(kernel)
    options = _Options(dry_run, force, _checked_patience(patience), _writer(kernel, write))
    return _unbind(kernel, bdf, options).binding


@uninterrupted(_undo_unheard)
def _unbind(kernel: Kernel, bdf: str, options: _Options) -> _Change:
    device = read_device(bdf, kernel=kernel)
    if device.driver is not None and device.driver_override is None and not device.is_vfio:
        return _nothing_to_do(device)
    check_idle(kernel, device, force=options.force)
    plan = [
        _override_step(kernel, device.bdf, None),
        *_unbind_steps(kernel, device),
        _probe_step(kernel, device.bdf),
    ]
    return _change(kernel, device, plan, _Goal(None, kernel_decides=True), options)


def restore(
    binding: Binding,
    *,
    dry_run: bool = False,
    force: bool = False,
    kernel: Kernel | None = None,
    write: SysfsWriter | None = None,
    own: NodeOwner = set_ownership,
) -> Binding:
    """Undo a `bind` or `unbind`: restore the former driver, override and rights.

    The returned change can be undone in turn. A node whose ownership somebody has changed since is not changed.

    Args: as for `bind`.

    Raises: as `bind`. Synchronization: as for `bind`. Cost: as for `bind`.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> kernel = FakeKernel()
        >>> change = pci.bind("0000:00:02.0", kernel=kernel)  # the device has vfio-pci already
        >>> pci.restore(change, kernel=kernel).steps
        ()
    """
    _check_flags(dry_run=dry_run, force=force)
    kernel = checked_kernel(kernel)
    options = _Options(dry_run, force, 0.0, _writer(kernel, write), own)
    return _restore(kernel, binding, options).binding


@uninterrupted(_undo_unheard)
def _restore(kernel: Kernel, binding: Binding, options: _Options) -> _Change:
    change = _driver_restored(kernel, binding, options)
    if options.dry_run or not binding.nodes:
        return change
    return _then_own(change, lambda: take_back(binding.nodes, options.own), options.own)


def _driver_restored(kernel: Kernel, binding: Binding, options: _Options) -> _Change:
    device = read_device(binding.bdf, kernel=kernel)
    target = replace(device, driver=binding.former_driver, driver_override=binding.former_override)
    if target.driver is not None:
        check_loaded(kernel, target.driver, device.bdf)
    plan = _plan_back(kernel, device, target)
    if device.driver != target.driver:
        check_idle(kernel, device, force=options.force)
    if not plan:
        return _nothing_to_do(device)
    return _change(kernel, device, plan, _Goal(target.driver), options)


# --- Carrying out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Goal:
    """The driver to reach: `driver`, or with `kernel_decides` any driver except the former one, or none."""

    driver: str | None
    kernel_decides: bool = False

    def reached(self, driver: str | None, *, former: str | None) -> bool:
        if self.kernel_decides:
            return driver is None or driver != former
        return driver == self.driver

    def __str__(self) -> str:
        if self.kernel_decides:
            return "a driver of the kernel's choice"
        return "no driver" if self.driver is None else f"driver {self.driver}"


def _nothing_to_do(device: PciDevice) -> _Change:
    return _Change(Binding(device.bdf, device.driver, device.driver, device.driver_override, ()), list)


def _change(kernel: Kernel, device: PciDevice, plan: Sequence[Step], goal: _Goal, options: _Options) -> _Change:
    if options.dry_run:
        planned = Binding(device.bdf, goal.driver, device.driver, device.driver_override, tuple(plan))
        return _Change(planned, list)
    driver = _carry_out(kernel, device, plan, goal, options)
    _logger.info("%s: driver %s, was %s", device.bdf, driver, device.driver)
    binding = Binding(device.bdf, driver, device.driver, device.driver_override, tuple(plan))
    return _Change(binding, partial(_undo, kernel, device, options.write))


def _then_own(change: _Change, step: Callable[[], tuple[NodeChange, ...]], own: NodeOwner) -> _Change:
    """Add changes of ownership to a change of driver. If they fail, the driver is restored too."""
    try:
        nodes = step()
    except BaseException as first:
        _raise_with(change.undo(), first, change.binding)
        raise

    def undo() -> list[Exception]:
        failures: list[Exception] = []
        try:
            take_back(nodes, own)
        except VfioError as error:
            failures.append(error)
        return [*failures, *change.undo()]

    return _Change(replace(change.binding, nodes=nodes), undo)


def _raise_with(failures: list[Exception], first: BaseException, former: Binding) -> None:
    """Raise RollbackError if the undo has failed too. An exit or interrupt is kept, with a note."""
    if not failures:
        return
    message = f"{former.bdf} was not restored to driver {former.former_driver}, override {former.former_override}"
    if isinstance(first, Exception):
        hint = f"See the current driver with: pyvfio list {former.bdf}"
        raise RollbackError(message, [first, *failures], hint=hint) from first
    first.add_note("; then ".join([message, *map(str, failures)]))


def _carry_out(kernel: Kernel, device: PciDevice, plan: Sequence[Step], goal: _Goal, options: _Options) -> str | None:
    """Make all steps, or undo all steps. Return the driver of the device."""
    try:
        for step in plan:
            _write(kernel, step, options.write)
        return _await_driver(kernel, device, plan[-1], goal=goal, options=options)
    except BaseException as first:
        former = Binding(device.bdf, None, device.driver, device.driver_override, ())
        _raise_with(_undo(kernel, device, options.write), first, former)
        raise


def _await_driver(kernel: Kernel, device: PciDevice, last: Step, *, goal: _Goal, options: _Options) -> str | None:
    # A write to drivers_probe succeeds even if no driver binds: `__device_attach_driver` ignores the result of probe.
    # The link `driver` shows the result. The probe is repeated: the former driver may not have finished its remove yet.
    deadline = time.monotonic() + options.patience
    while not goal.reached(driver := read_device(device.bdf, kernel=kernel).driver, former=device.driver):
        if time.monotonic() >= deadline:
            raise _did_not_take(kernel, device, goal, driver)
        checkpoint()
        time.sleep(min(_PROBE_PAUSE, options.patience))
        if last.path.name == "drivers_probe":
            _write(kernel, last, options.write)
    return driver


def _did_not_take(kernel: Kernel, device: PciDevice, goal: _Goal, driver: str | None) -> VfioError:
    if driver is None and (missing := without_group(kernel, device.bdf, goal.driver)) is not None:
        return missing
    if driver is not None and driver == device.driver:
        reason = f"{driver} has bound the device again"
        hint = (
            f"{driver} matches the device, perhaps by an ids= parameter or new_id. Name the driver to bind to, "
            f"or {NO_DRIVER}"
        )
    elif driver is not None:
        reason, hint = (
            f"{driver} has bound the device instead",
            "Another program, such as driverctl or a udev rule, binds the device too",
        )
    else:
        reason, hint = (
            "no driver has bound the device",
            "The probe failed; the kernel may have logged the reason: dmesg | tail",
        )
    return VfioError(f"{device.bdf} was to have {goal}, and {reason}", hint=hint)


def _undo(kernel: Kernel, former: PciDevice, write: SysfsWriter) -> list[Exception]:
    """Restore the device to `former` from any state. Return the failures."""
    failures: list[Exception] = []
    try:
        for step in _plan_back(kernel, read_device(former.bdf, kernel=kernel), former):
            try:
                _write(kernel, step, write)
            except VfioError as error:
                failures.append(error)
        now = read_device(former.bdf, kernel=kernel)
        if (now.driver, now.driver_override) != (former.driver, former.driver_override) and not failures:
            failures.append(VfioError(f"the device now has driver {now.driver} and override {now.driver_override}"))
    except VfioError as error:
        failures.append(error)
    return failures


# --- Steps -------------------------------------------------------------------------------------------------------


def _plan_back(kernel: Kernel, now: PciDevice, then: PciDevice) -> list[Step]:
    plan = []
    override = now.driver_override
    if now.driver != then.driver:
        if then.driver is not None and override != then.driver:
            # The kernel binds a device with an override to the named driver only (`pci_match_device`). Without an
            # override, the former driver may not match: the override that bound the driver was cleared later.
            override = then.driver
            plan.append(_override_step(kernel, now.bdf, override))
        plan += _unbind_steps(kernel, now)
        if then.driver is not None:
            # Not drivers_probe: several drivers can match the device, and only this one is the former driver.
            plan.append(Step(kernel.sysfs / "bus/pci/drivers" / then.driver / "bind", now.bdf))
    if override != then.driver_override:
        plan.append(_override_step(kernel, now.bdf, then.driver_override))
    return plan


def _override_step(kernel: Kernel, bdf: str, driver: str | None) -> Step:
    return Step(device_path(kernel, bdf) / "driver_override", driver or "")


def _unbind_steps(kernel: Kernel, device: PciDevice) -> list[Step]:
    if device.driver is None:
        return []
    return [Step(kernel.sysfs / "bus/pci/drivers" / device.driver / "unbind", device.bdf)]


def _probe_step(kernel: Kernel, bdf: str) -> Step:
    return Step(kernel.sysfs / "bus/pci/drivers_probe", bdf)


def _write(kernel: Kernel, step: Step, write: SysfsWriter) -> None:
    """Make one write to sysfs. Without the newline, which the kernel ignores, an empty value would be no write."""
    _logger.debug("%s", step)
    try:
        write(step.path, step.value + "\n")
    except OSError as error:
        if error.errno in {errnos.EACCES, errnos.EPERM, errnos.EROFS}:
            raise explain_refusal(step.path, error.errno, look_around(kernel)) from error
        name = errnos.errorcode.get(error.errno or 0, str(error.errno))
        raise VfioError(
            f"the kernel refused {step.value!r} written to {step.path}: {name}, {error.strerror}",
            hint="The kernel may have logged the reason: dmesg | tail",
        ) from error


def explain_refusal(path: Path, number: int, here: Surroundings) -> AccessDeniedError:
    """Return the error for a failed write to sysfs, with a remedy for these surroundings."""
    if number == errnos.EROFS or here.container:
        hint = "sysfs cannot be written in this container" if here.container else "sysfs is mounted read-only"
        hint += ": bind the device outside, on the host" if here.container else ": mount -o remount,rw /sys"
    elif not here.root:
        hint = "Changing drivers requires root: run as root"
    elif here.user_namespace:
        hint = "This is root of a user namespace: changing drivers requires root outside of the namespace"
    else:
        hint = "A security module or lockdown refuses root: see dmesg | tail"
    return AccessDeniedError(str(path), number=number, hint=hint)
