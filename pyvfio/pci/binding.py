"""From driver to driver, as steps that are read back, and undone when they do not come true."""

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

from pyvfio.errors import AccessDeniedError, RollbackError, VfioError
from pyvfio.guard import checkpoint, uninterrupted
from pyvfio.kernel import Kernel
from pyvfio.pci.refusals import check_driver, check_idle, check_loaded, checked_name, without_group
from pyvfio.pci.surroundings import Surroundings, look_around
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, device_path, read_device

_logger = logging.getLogger(__name__)

VFIO_PCI = "vfio-pci"

SysfsWriter: TypeAlias = Callable[[Path, str], None]
"""What writes a value to a file of sysfs; raises OSError."""

_PROBE_PAUSE = 0.1  # seconds between two attempts, as SPDK's setup.sh paces them


@dataclass(frozen=True, slots=True)
class Step:
    """One write to sysfs. `str()` of it is the shell command that does the same."""

    path: Path
    value: str

    def __str__(self) -> str:
        return f"echo {self.value} > {self.path}" if self.value else f"echo > {self.path}"


@dataclass(frozen=True, slots=True)
class Binding:
    """A change of driver that came true (or, of a dry run, would): what was written, and what was there before.

    `driver` is the driver now. Of a dry run that leaves the choice to the kernel it is None. `restore` goes back.
    """

    bdf: str
    driver: str | None
    former_driver: str | None
    former_override: str | None
    steps: tuple[Step, ...]


def write_sysfs(path: Path, value: str) -> None:
    """Write `value` to a file of sysfs in one write(2), as the kernel requires; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


class _Options(NamedTuple):
    """Those that each change of driver has."""

    dry_run: bool
    force: bool
    patience: float
    write: SysfsWriter


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
    """A change that came true, and the call that undoes it when nobody receives it."""

    binding: Binding
    take_back: Callable[[], object]


def _take_back(change: _Change) -> None:
    change.take_back()


def bind(
    kernel: Kernel,
    bdf: str,
    driver: str = VFIO_PCI,
    *,
    dry_run: bool = False,
    force: bool = False,
    patience: float = 1.0,
    write: SysfsWriter = write_sysfs,
) -> Binding:
    """Take a device from its driver, if it has one, and bind it to `driver`; `NO_DRIVER` leaves it without.

    When anything fails, or the driver has not taken the device after `patience` seconds, the former driver and override
    are put back and the error is raised; RollbackError says what could not be put back. A device that has the driver
    already is left alone. `dry_run` checks and plans all the same and writes nothing.

    A device that has no IOMMU group yet is bound all the same where the kernel has an IOMMU: some make the group of a
    device when a driver is first bound to it. Where none comes, the driver does not take the device.

    Raises ValueError for what is no address or no name, and for `patience` below 0 or not a number; TypeError for an
    argument of another class; DeviceNotFoundError, also where there is no IOMMU group for the
    device; UnavailableError when the driver is not loaded; GroupBusyError when the group is open (taking a device from
    VFIO would then wait in the kernel until its user closes it: `vfio_unregister_group_dev`); AccessDeniedError without
    root; VfioError when the device is a bridge, when the driver does not take it, when sysfs says no number where it
    should, and, unless `force` is given, when a network interface that is up or a disk that is in use depends on it,
    in any namespace.

    Synchronization: handlers of signals that are Python functions run when the device has its new driver or its former
    one again, or while the driver is waited for; where one raises, the device has its former driver. A process that a
    signal ends meanwhile, because it has no handler, leaves the device as it is at that moment.
    Cost: the two drivers' remove and probe.
    """
    return _bind(kernel, bdf, driver, _Options(dry_run, force, _checked_patience(patience), write)).binding


@uninterrupted(_take_back)
def _bind(kernel: Kernel, bdf: str, driver: str, options: _Options) -> _Change:
    wanted = None if checked_name(driver) == NO_DRIVER else driver
    device = read_device(kernel, bdf)
    if device.driver == wanted:
        return _nothing_to_do(device)
    check_driver(kernel, device, driver)
    check_idle(kernel, device, force=options.force)
    plan = [_override_step(kernel, device.bdf, driver), *_unbind_steps(kernel, device)]
    if wanted is not None:
        plan.append(_probe_step(kernel, device.bdf))
    return _change(kernel, device, plan, _Goal(wanted), options)


def unbind(
    kernel: Kernel,
    bdf: str,
    *,
    to: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    patience: float = 1.0,
    write: SysfsWriter = write_sysfs,
) -> Binding:
    """Give a device back: clear its override and let the kernel's own driver for it, if any, take it; or bind it to
    `to` as `bind` does.

    Refuses, fails and undoes as `bind` does. It is a failure when the driver that it was taken from takes
    it again. A device that is at home, without an override and with a driver that is not VFIO's, is left alone.
    """
    if to is not None:
        return bind(kernel, bdf, to, dry_run=dry_run, force=force, patience=patience, write=write)
    return _unbind(kernel, bdf, _Options(dry_run, force, _checked_patience(patience), write)).binding


@uninterrupted(_take_back)
def _unbind(kernel: Kernel, bdf: str, options: _Options) -> _Change:
    device = read_device(kernel, bdf)
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
    kernel: Kernel,
    binding: Binding,
    *,
    dry_run: bool = False,
    force: bool = False,
    write: SysfsWriter = write_sysfs,
) -> Binding:
    """Undo a `bind` or `unbind`: the former driver and override again. Returns the change, which can be undone in turn.

    Refuses, fails and undoes as `bind` does.
    """
    return _restore(kernel, binding, _Options(dry_run, force, 0.0, write)).binding


@uninterrupted(_take_back)
def _restore(kernel: Kernel, binding: Binding, options: _Options) -> _Change:
    device = read_device(kernel, binding.bdf)
    target = replace(device, driver=binding.former_driver, driver_override=binding.former_override)
    if target.driver is not None:
        check_loaded(kernel, target.driver)
    plan = _plan_back(kernel, device, target)
    if device.driver != target.driver:
        check_idle(kernel, device, force=options.force)
    if not plan:
        return _nothing_to_do(device)
    return _change(kernel, device, plan, _Goal(target.driver), options)


# --- Carrying out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Goal:
    """What shall be true of the driver in the end: that it is `driver`, or (unbind) not the one that it was."""

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
    return _Change(Binding(device.bdf, device.driver, device.driver, device.driver_override, ()), lambda: None)


def _change(kernel: Kernel, device: PciDevice, plan: Sequence[Step], goal: _Goal, options: _Options) -> _Change:
    if options.dry_run:
        planned = Binding(device.bdf, goal.driver, device.driver, device.driver_override, tuple(plan))
        return _Change(planned, lambda: None)
    driver = _carry_out(kernel, device, plan, goal, options)
    _logger.info("%s: driver %s, was %s", device.bdf, driver, device.driver)
    binding = Binding(device.bdf, driver, device.driver, device.driver_override, tuple(plan))
    return _Change(binding, partial(_undo_unheard, kernel, device, options.write))


def _undo_unheard(kernel: Kernel, former: PciDevice, write: SysfsWriter) -> None:
    """Undo a change that is done, when a signal handler raises: its exception goes on, and the log has the rest."""
    for failure in _undo(kernel, former, write):
        _logger.error("%s was not brought back: %s", former.bdf, failure)


def _carry_out(kernel: Kernel, device: PciDevice, plan: Sequence[Step], goal: _Goal, options: _Options) -> str | None:
    """Make all steps, or undo them; the driver that the device has then."""
    try:
        for step in plan:
            _write(kernel, step, options.write)
        return _await_driver(kernel, device, plan[-1], goal=goal, options=options)
    except BaseException as first:
        failures = _undo(kernel, device, options.write)
        if not failures:
            raise
        message = f"{device.bdf} was not brought back to driver {device.driver}, override {device.driver_override}"
        if not isinstance(first, Exception):
            first.add_note("; then ".join([message, *map(str, failures)]))
            raise
        raise RollbackError(message, [first, *failures], hint="scripts/list shows where it is now") from first


def _await_driver(kernel: Kernel, device: PciDevice, last: Step, *, goal: _Goal, options: _Options) -> str | None:
    # drivers_probe succeeds whether or not a driver took the device (`__device_attach_driver` ignores what probe
    # returned), and a former driver may still be on its way out: so the link decides, and asking again may help.
    deadline = time.monotonic() + options.patience
    while not goal.reached(driver := read_device(kernel, device.bdf).driver, former=device.driver):
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
        reason = f"{driver} took it again"
        hint = (
            "It matches the device by itself, perhaps by an ids= parameter or new_id; name the driver to bind to, "
            f"or {NO_DRIVER}"
        )
    elif driver is not None:
        reason, hint = f"{driver} took it instead", "Something else, such as driverctl or a udev rule, binds it too"
    else:
        reason, hint = "no driver took it", "The driver's probe failed; the kernel may have logged why: dmesg | tail"
    return VfioError(f"{device.bdf} was to have {goal}, and {reason}", hint=hint)


def _undo(kernel: Kernel, former: PciDevice, write: SysfsWriter) -> list[Exception]:
    """Bring the device back to `former` from wherever it is; what could not be done."""
    failures: list[Exception] = []
    try:
        for step in _plan_back(kernel, read_device(kernel, former.bdf), former):
            try:
                _write(kernel, step, write)
            except VfioError as error:
                failures.append(error)
        now = read_device(kernel, former.bdf)
        if (now.driver, now.driver_override) != (former.driver, former.driver_override) and not failures:
            failures.append(VfioError(f"it has driver {now.driver} and override {now.driver_override} now"))
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
            # Not drivers_probe: of several drivers that match, this one had it.
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
    """The one place that writes to sysfs. The newline makes an empty value a write, and the kernel ignores it."""
    _logger.debug("%s", step)
    try:
        write(step.path, step.value + "\n")
    except OSError as error:
        if error.errno in {errnos.EACCES, errnos.EPERM, errnos.EROFS}:
            raise explain_refusal(step.path, error.errno, look_around(kernel)) from error
        name = errnos.errorcode.get(error.errno or 0, str(error.errno))
        raise VfioError(
            f"the kernel refused {step.value!r} written to {step.path}: {name}, {error.strerror}",
            hint="It may have logged why: dmesg | tail",
        ) from error


def explain_refusal(path: Path, number: int, here: Surroundings) -> AccessDeniedError:
    """The error for a file of sysfs that could not be written, with what helps in these surroundings."""
    if number == errnos.EROFS or here.container:
        hint = "sysfs cannot be written in this container" if here.container else "sysfs is mounted read-only"
        hint += ": bind the device outside, on the host" if here.container else ": mount -o remount,rw /sys"
    elif not here.root:
        hint = "Drivers are changed by root: run as root"
    elif here.user_namespace:
        hint = "This is root of a user namespace, and drivers are changed by root outside of it"
    else:
        hint = "Root is refused by a security module or by lockdown: see dmesg | tail"
    return AccessDeniedError(str(path), number=number, hint=hint)
