"""Bindings that survive a reboot: one udev rule file for each device.

A rule file needs neither pyvfio nor Python at boot. udevd applies the rule before 80-drivers.rules loads the module of
the kernel's own driver, and again when such a driver was faster.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pyvfio.arguments import checked_kernel
from pyvfio.errors import UnavailableError, VfioError
from pyvfio.guard import uninterrupted
from pyvfio.kernel import Kernel
from pyvfio.pci.binding import VFIO_PCI
from pyvfio.pci.cdevs import IOMMUFD
from pyvfio.pci.refusals import check_driver
from pyvfio.pci.rights import Rights
from pyvfio.pci.sysfs import NO_DRIVER, link_name, list_names, parse_bdf, read_device, read_text
from pyvfio.units import check_bool

_logger = logging.getLogger(__name__)

ETC = Path("/etc")

_SCHEMA = "pyvfio.rule/1"
_HEAD = re.compile(rf"# {re.escape(_SCHEMA)} (\{{.*\}}) ([0-9a-f]{{16}})")
_NAME = re.compile(r"60-pyvfio-(.+)\.rules")
_DRIVER = re.compile(r"[\w.+-]+", re.ASCII)  # all other characters can have a meaning in a rule


@dataclass(frozen=True, slots=True)
class PersistentBinding:
    """A binding that udevd makes again at each boot.

    The rule applies only to a device with this address, vendor and device id: another device that a change of hardware
    moves to the address keeps the own driver.
    """

    bdf: str
    vendor: int
    device: int
    driver: str
    module: str | None
    rights: Rights | None = None

    @property
    def rule(self) -> str:
        """Return the text of the rule file."""
        body = "\n".join([*_COMMENT, *_node_rules(self), *_driver_rules(self), 'LABEL="pyvfio_end"', ""])
        first = f"# Written by pyvfio bind --persist. Remove with: pyvfio bind --forget {self.bdf}"
        fields = json.dumps(asdict(self))
        return f"{first}\n# {_SCHEMA} {fields} {_digest(first, fields, body)}\n{body}"


@dataclass(frozen=True, slots=True)
class RuleChange:
    """A change of a device's rule file: the path, the binding now, and the former binding. None: no file."""

    path: Path
    now: PersistentBinding | None
    former: PersistentBinding | None


def persist(
    bdf: str,
    driver: str = VFIO_PCI,
    *,
    rights: Rights | None = None,
    dry_run: bool = False,
    kernel: Kernel | None = None,
    etc: Path = ETC,
) -> RuleChange:
    """Write the udev rule that binds a device to `driver`, and gives `rights`, at each boot and each hot-plug.

    The binding of the device now is not changed: call `bind` for that. A former rule file of pyvfio is replaced. The
    file is replaced atomically.

    Args:
        bdf, driver, rights, kernel: as for `bind`.
        dry_run: check, and write nothing.
        etc: the directory that has udev/rules.d, for tests.

    Raises: as `bind` for `bdf` and `driver`; UnavailableError without /etc/udev; VfioError if driverctl has an override
    for the device, if a file of another origin has the name, or if the file cannot be written.
    Synchronization: any thread; as for `bind`. Cost: one file, and two fsync(2).
    Source: udev(7); `pci_match_device` for `driver_override`.

    Example:
        >>> from pyvfio import pci
        >>> from pyvfio.testing import FakeKernel
        >>> import pathlib, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> etc = pathlib.Path(folder.name)  # without etc=: /etc
        >>> (etc / "udev").mkdir()
        >>> change = pci.persist("0000:00:02.0", etc=etc, kernel=FakeKernel())
        >>> change.path.name
        '60-pyvfio-0000:00:02.0.rules'
        >>> pci.forget("0000:00:02.0", etc=etc).now is None
        True
        >>> folder.cleanup()
    """
    check_bool(dry_run, "dry_run")
    kernel = checked_kernel(kernel)
    device = read_device(bdf, kernel=kernel)
    check_driver(kernel, device, driver)
    if _DRIVER.fullmatch(driver) is None:
        raise VfioError(f"the name of this driver cannot stand in a udev rule: {driver!r}")
    _check_udev(etc)
    _check_driverctl(etc, device.bdf)
    module = link_name(kernel.sysfs / "bus/pci/drivers" / driver / "module")
    now = PersistentBinding(device.bdf, device.vendor, device.device, driver, module, rights)
    change = RuleChange(_path(etc, device.bdf), now, _read(_path(etc, device.bdf)))
    return change if dry_run else _write(change)


def forget(bdf: str, *, dry_run: bool = False, etc: Path = ETC) -> RuleChange:
    """Remove the rule file that `persist` has written for a device. The device need not exist.

    The binding of the device now is not changed: call `unbind` for that.

    Raises: ValueError if `bdf` is not a PCI address; VfioError if the device has no rule file of pyvfio, if the file
    was edited, or if the file cannot be removed.
    Synchronization: any thread; as for `bind`. Cost: one file.
    """
    check_bool(dry_run, "dry_run")
    path = _path(etc, parse_bdf(bdf))
    former = _read(path)
    if former is None:
        known = ", ".join(each.bdf for each in persisted(etc=etc)) or "none"
        raise VfioError(f"{parse_bdf(bdf)} has no persistent binding", hint=f"Devices with one: {known}")
    change = RuleChange(path, None, former)
    return change if dry_run else _write(change)


def persisted(*, etc: Path = ETC) -> tuple[PersistentBinding, ...]:
    """Return all persistent bindings in the order of the addresses. The devices need not exist.

    Raises: VfioError if a rule file of pyvfio was edited. Synchronization: any thread. Cost: one file for each.
    """
    rules = etc / "udev/rules.d"
    found = [_read(rules / name) for name in sorted(list_names(rules)) if _NAME.fullmatch(name)]
    return tuple(each for each in found if each is not None)


def restore_rule(change: RuleChange, *, etc: Path = ETC) -> RuleChange:
    """Undo a `persist` or `forget`: write the former rule file again, or remove the file.

    Raises: VfioError if the file was edited, or cannot be changed.
    """
    bdf = next(each.bdf for each in (change.former, change.now) if each is not None)
    path = _path(etc, bdf)
    return _write(RuleChange(path, change.former, _read(path)))


# --- The rule ----------------------------------------------------------------------------------------------------

_COMMENT = (
    "# Nodes: the group's number can differ from boot to boot, so the group is found by the device.",
    "# Driver: the override is set once for each appearance of the device. A later `udevadm trigger` does not take the",
    "# device from the driver that an administrator has bound meanwhile.",
)


def _node_rules(binding: PersistentBinding) -> list[str]:
    if binding.rights is None:
        return []
    user, group = binding.rights.user, binding.rights.group
    # := is final: no later rule file changes the owner again.
    given = ([] if user is None else [f'OWNER:="{user}"']) + (
        [] if group is None else [f'GROUP:="{group}"', 'MODE:="0660"']
    )
    return [
        ", ".join([f'SUBSYSTEM=="vfio", TEST=="/sys/kernel/iommu_groups/%k/devices/{binding.bdf}"', *given]),
        ", ".join([f'SUBSYSTEM=="vfio-dev", KERNELS=="{binding.bdf}"', *given]),
        *_iommufd_rules(binding.rights),
    ]


def _iommufd_rules(rights: Rights) -> list[str]:
    """Return the rules for /dev/iommu, which the rule files of several devices can give to different users.

    The first file gives the node to a user. A file with another user then gives the node to all users, as `shared_on`.
    """
    node, mark = f'SUBSYSTEM=="misc", KERNEL=="{IOMMUFD}"', "ENV{.PYVFIO_IOMMUFD}"
    given = ([] if rights.user is None else [f'OWNER="{rights.user}"']) + (
        [] if rights.group is None else [f'GROUP="{rights.group}"', 'MODE="0660"']
    )
    return [
        f'{node}, {mark}=="?*", {mark}!="{rights}", MODE:="0666"',
        ", ".join([f'{node}, {mark}==""', *given, f'{mark}="{rights}"']),
    ]


def _driver_rules(binding: PersistentBinding) -> list[str]:
    driver = binding.driver
    take = 'ENV{.PYVFIO_TAKE}=="1"'
    rules = [
        f'SUBSYSTEM!="pci", GOTO="pyvfio_end"\nKERNEL!="{binding.bdf}", GOTO="pyvfio_end"',
        f'ATTR{{vendor}}!="{binding.vendor:#06x}", GOTO="pyvfio_end"',
        f'ATTR{{device}}!="{binding.device:#06x}", GOTO="pyvfio_end"',
        # Each event rewrites the properties of the device: the mark is kept in every event.
        'IMPORT{db}="PYVFIO_BOUND"',
        'ACTION!="add|bind", GOTO="pyvfio_end"',
        'ACTION=="add", ENV{PYVFIO_BOUND}!="1", ENV{.PYVFIO_FIRST}="1"',
        f'ENV{{.PYVFIO_FIRST}}=="1", ATTR{{driver_override}}="{driver}", ENV{{PYVFIO_BOUND}}="1"',
        'ENV{.PYVFIO_FIRST}=="1", ENV{.PYVFIO_TAKE}="1"',
        f'ENV{{.PYVFIO_FIRST}}!="1", ATTR{{driver_override}}=="{driver}", ENV{{.PYVFIO_TAKE}}="1"',
        f'{take}, DRIVER!="{driver}", TEST=="driver/unbind", ATTR{{driver/unbind}}="%k"',
    ]
    if driver == NO_DRIVER:
        return rules
    place = f"subsystem/drivers/{driver}"
    if binding.module is not None:
        # Registering the driver binds all devices whose override names the driver.
        rules.append(f'{take}, TEST!="{place}", RUN{{builtin}}+="kmod load {binding.module}"')
    return [*rules, f'{take}, DRIVER!="{driver}", TEST=="{place}", ATTR{{subsystem/drivers_probe}}="%k"']


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# --- The files ---------------------------------------------------------------------------------------------------


def _path(etc: Path, bdf: str) -> Path:
    return etc / "udev/rules.d" / f"60-pyvfio-{bdf}.rules"


def _read(path: Path) -> PersistentBinding | None:
    """Return the binding of a rule file, None without the file. Raises VfioError for a file of any other origin."""
    text = read_text(path)
    if text is None:
        return None
    first, _, rest = text.partition("\n")
    head, _, body = rest.partition("\n")
    match = _HEAD.fullmatch(head)
    if match is not None and _digest(first, match[1], body + "\n") == match[2]:
        with suppress(ValueError, TypeError):
            binding = binding_of(json.loads(match[1]))
            if path.name == _path(path, binding.bdf).name:  # not the copy of another device's rule
                return binding
    raise VfioError(
        f"{path} was not written by pyvfio, or was edited since",
        hint=f"Move the file away, or remove the file: rm {path}",
    )


def binding_of(fields: Mapping[str, object]) -> PersistentBinding:
    """Return the persistent binding with the `fields` of `dataclasses.asdict`. Raises ValueError or TypeError."""
    bdf, vendor, device = fields.get("bdf"), fields.get("vendor"), fields.get("device")
    driver, module, rights = fields.get("driver"), fields.get("module"), fields.get("rights")
    if not (isinstance(bdf, str) and isinstance(vendor, int) and isinstance(device, int)):
        raise TypeError("a persistent binding has a bdf, a vendor and a device")
    names = [driver] if module is None else [driver, module]
    if not all(isinstance(name, str) and _DRIVER.fullmatch(name) for name in names):
        raise ValueError(f"a persistent binding has a driver, not {driver!r} and {module!r}")
    given = Rights(**rights) if isinstance(rights, dict) else None
    return PersistentBinding(
        parse_bdf(bdf), vendor, device, str(driver), None if module is None else str(module), given
    )


def _check_udev(etc: Path) -> None:
    if not (etc / "udev").is_dir():
        raise UnavailableError(
            f"there is no {etc / 'udev'}: this machine has no udev, whose rules bind devices at boot",
            hint="Run pyvfio bind in a start-up script of the machine",
        )


def _check_driverctl(etc: Path, bdf: str) -> None:
    """Refuse a device for which driverctl has an override: at boot, driverctl and udevd would change the driver by
    turns."""
    place = etc / "driverctl.d" / f"pci-{bdf}"
    if place.exists():
        raise VfioError(
            f"driverctl already has a persistent driver for {bdf}, in {place}",
            hint=f"Remove the override first: driverctl --noprobe unset-override {bdf}",
        )


def _unwrite(change: RuleChange) -> None:
    """Undo a change whose caller gets the exception of a signal handler instead. A failure goes to the log."""
    try:
        _put(RuleChange(change.path, change.former, change.now))
    except VfioError:
        _logger.exception("%s was not restored", change.path)


@uninterrupted(_unwrite)
def _write(change: RuleChange) -> RuleChange:
    _put(change)
    return change


def _put(change: RuleChange) -> None:
    """Write the rule file of `change.now`, or remove the file."""
    try:
        change.path.parent.mkdir(exist_ok=True)
        if change.now is None:
            change.path.unlink(missing_ok=True)
        else:
            replace_file(change.path, change.now.rule)
    except OSError as error:
        hint = "Run as root" if os.geteuid() else "Is the file system read-only?"
        raise VfioError(f"{change.path} could not be changed: {error.strerror}", hint=hint) from error


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: a reader finds the former text or the whole new text, also after a power failure."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=".pyvfio-")
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
