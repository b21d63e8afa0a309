"""Rights on the device nodes of VFIO: the user and the group that can open a device without root."""

from __future__ import annotations

import errno as errnos
import grp
import logging
import os
import pwd
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypeAlias

from pyvfio.errors import UnavailableError, VfioError
from pyvfio.guard import checkpoint
from pyvfio.kernel import Kernel
from pyvfio.pci.cdevs import IOMMUFD, has_group_nodes, iommufd_node
from pyvfio.pci.groups import group_node
from pyvfio.pci.nodes import not_passed_in, place_in_sysfs
from pyvfio.pci.sysfs import CDEVS, PciDevice, device_path, is_running, list_names, printable

_logger = logging.getLogger(__name__)

_EVERYBODY = 0o666  # the mode of /dev/vfio/vfio: neither node gives a device
_NO_ID = 0xFFFF_FFFF  # (uid_t)-1: chown(2) leaves the owner unchanged
_PAUSE = 0.02  # seconds between two looks for a node
_UDEVD = Path("/run/udev/control")


class Ownership(NamedTuple):
    """The owner, the group and the mode of a node. The mode has permission bits only."""

    user: int
    group: int
    mode: int


NodeOwner: TypeAlias = Callable[[Path, Ownership], None]
"""A function that sets the ownership of a node; raises OSError."""


def set_ownership(path: Path, ownership: Ownership) -> None:
    """Set the owner, the group and the mode of a node; raises OSError."""
    os.chown(path, ownership.user, ownership.group)
    os.chmod(path, ownership.mode)


@dataclass(frozen=True, slots=True)
class Rights:
    """The user, the group, or both, that can open a node. Numbers are ids of the machine's user database.

    Raises: ValueError if both are None, or if a number is not an id; TypeError if a value is not an int.

    Example:
        >>> from pyvfio import pci
        >>> pci.Rights.parse("1000:36")
        Rights(user=1000, group=36)
        >>> print(pci.Rights(user=1000))
        1000
    """

    user: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        if self.user is None and self.group is None:
            raise ValueError("rights name a user, a group, or both")
        for kind, number in (("user", self.user), ("group", self.group)):
            if number is None:
                continue
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"the {kind} is the number of a {kind}, not {type(number).__name__}")
            if not 0 <= number < _NO_ID:
                raise ValueError(f"the number of a {kind} is 0 to {_NO_ID - 1}, not {number}")

    def __str__(self) -> str:
        """Return the rights as chown(1) takes them."""
        user = "" if self.user is None else str(self.user)
        return user if self.group is None else f"{user}:{self.group}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the rights for `USER`, `USER:GROUP` or `:GROUP`, each a name or a number.

        Raises: ValueError if the text has another form; VfioError if the machine has no such user or group.
        """
        if not isinstance(text, str):
            raise TypeError(f"rights are text, such as 'alice' or 'alice:kvm', not {type(text).__name__}")
        user, _, group = text.partition(":")
        if ":" in group or not (user or group) or not text.isprintable() or " " in text:
            raise ValueError(f"not USER, USER:GROUP or :GROUP: {text!r}")
        return cls(_number("user", user), _number("group", group))

    def applied_to(self, former: Ownership) -> Ownership:
        """Return the ownership after the rights are added. No existing right of user, group or others is removed."""
        user = former.user if self.user is None else self.user
        group = former.group if self.group is None else self.group
        return Ownership(user, group, former.mode | 0o600 | (0 if self.group is None else 0o060))

    def shared_on(self, former: Ownership) -> Ownership:
        """Return the ownership of a node that several users need, after the rights are added.

        Where another user or group than root's has the node already, all users get the node, and nobody loses rights.
        """
        now = self.applied_to(former)
        if former.mode & _EVERYBODY == _EVERYBODY:
            return former
        loses_user = now.user != former.user != 0
        loses_group = now.group != former.group != 0 and former.mode & 0o060
        if loses_user or loses_group:
            return Ownership(former.user, former.group, former.mode | _EVERYBODY)
        return now

    def commands(self, path: Path) -> tuple[str, str]:
        """Return the shell commands that give the rights on a node."""
        return f"chown {self} {path}", f"chmod {'u+rw' if self.group is None else 'ug+rw'} {path}"


def _number(kind: str, name: str) -> int | None:
    if not name:
        return None
    if name.isascii() and name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid if kind == "user" else grp.getgrnam(name).gr_gid
    except KeyError as error:
        database = "passwd" if kind == "user" else "group"
        raise VfioError(
            f"there is no {kind} {name!r} on this machine", hint=f"List the {kind}s with: getent {database}"
        ) from error


@dataclass(frozen=True, slots=True)
class NodeChange:
    """A change of the ownership of a node: the path, the ownership now, and the former ownership."""

    path: Path
    now: Ownership
    former: Ownership


def nodes_of(kernel: Kernel, device: PciDevice) -> tuple[Path, ...]:
    """Return the paths of the nodes that a user needs for a device.

    * The node of the group; not on a kernel that makes none, because of CONFIG_VFIO_GROUP.
    * The device's own node and the node of iommufd, if the kernel made the first, and this /dev has the second.
    """
    if device.iommu_group is None:
        return ()
    group = group_node(device.iommu_group, kernel=kernel)
    if device.cdev is None:
        return (group,)
    iommufd = iommufd_node(kernel)
    own = (kernel.dev / CDEVS / device.cdev, *([iommufd] if iommufd.exists() else []))
    return (group, *own) if has_group_nodes(kernel) else own


def commands_for(kernel: Kernel, device: PciDevice, rights: Rights) -> list[str]:
    """Return the shell commands that give the rights on all nodes of a device, which need not be bound yet."""
    iommufd = iommufd_node(kernel)
    paths = [path for path in nodes_of(kernel, device) if path != iommufd] or [kernel.dev / "vfio/GROUP"]
    if device.cdev is None and not device.is_vfio and iommufd.exists():
        # The kernel chooses the name when the device is bound.
        paths.append(kernel.dev / CDEVS / f"$(ls {device_path(kernel, device.bdf) / 'vfio-dev'})")
    found = [command for path in paths for command in rights.commands(path)]
    return [*found, *_shared_commands(iommufd, rights)] if len(paths) > 1 or device.cdev else found


def _shared_commands(path: Path, rights: Rights) -> Sequence[str]:
    try:
        former = _ownership(path)
    except OSError:
        return ()
    now = rights.shared_on(former)
    if now == former:
        return ()
    return rights.commands(path) if now == rights.applied_to(former) else (f"chmod a+rw {path}",)


def give(
    kernel: Kernel, device: PciDevice, rights: Rights, *, own: NodeOwner, patience: float
) -> tuple[NodeChange, ...]:
    """Give the rights on all nodes of a device, or on none. A missing node is waited for, up to `patience` seconds."""
    paths = nodes_of(kernel, device)
    if not device.is_vfio or not paths:
        raise VfioError(
            f"{device.bdf} has {printable(device.driver or 'no driver')}: without a VFIO driver there is no node to "
            f"give to {rights}",
            hint=f"Bind the device first: pyvfio bind {device.bdf}",
        )
    deadline = time.monotonic() + patience
    for path in paths:
        _await_node(kernel, path, deadline)
    try:
        shared = iommufd_node(kernel)
        wanted = [
            (path, (rights.shared_on if path == shared else rights.applied_to)(_ownership(path))) for path in paths
        ]
    except OSError as error:
        raise VfioError(f"the owner of a node of {device.bdf} could not be read: {error}") from error
    return change_nodes(wanted, own)


def take_back(changes: Sequence[NodeChange], own: NodeOwner) -> tuple[NodeChange, ...]:
    """Set the former ownership again, in reverse order.

    Skipped: a node that no longer exists, a node whose ownership has changed since, and the node of iommufd while the
    same user or group has the node of another device.
    """
    wanted = []
    for change in reversed(changes):
        with suppress(FileNotFoundError):
            if _ownership(change.path) == change.now and not _is_needed(change, changes):
                wanted.append((change.path, change.former))
    return change_nodes(wanted, own)


def _is_needed(change: NodeChange, changes: Sequence[NodeChange]) -> bool:
    """Return whether the user or group that got the node of iommufd has the own node of a device not in `changes`."""
    directory = change.path.parent / CDEVS
    if change.path.name != IOMMUFD:
        return False
    for path in {directory / name for name in list_names(directory)} - {each.path for each in changes}:
        with suppress(OSError):
            other, now = _ownership(path), change.now
            if other.user == now.user != 0 or (other.group == now.group and other.mode & 0o060 == 0o060):
                return True
    return False


def change_nodes(wanted: Sequence[tuple[Path, Ownership]], own: NodeOwner) -> tuple[NodeChange, ...]:
    """Set the ownership of all nodes, or of none."""
    done: list[NodeChange] = []
    try:
        for path, ownership in wanted:
            _set(path, ownership, own, done)
    except BaseException as first:
        for change in reversed(done):
            try:
                own(change.path, change.former)
            except OSError as error:
                first.add_note(f"{change.path} was not restored to {change.former}: {error}")
        raise
    return tuple(done)


def _set(path: Path, ownership: Ownership, own: NodeOwner, done: list[NodeChange]) -> None:
    try:
        former = _ownership(path)
        if former != ownership:
            done.append(NodeChange(path, ownership, former))
            own(path, ownership)
    except OSError as error:
        hint = ""
        if error.errno in {errnos.EPERM, errnos.EACCES, errnos.EROFS}:
            hint = "Run as root" if os.geteuid() else "A mount, a user namespace or a security module refuses root"
        raise VfioError(f"the owner of {path} could not be changed: {error.strerror}", hint=hint) from error


def _ownership(path: Path) -> Ownership:
    status = os.stat(path)
    return Ownership(status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode))


# --- Waiting -----------------------------------------------------------------------------------------------------


def _await_node(kernel: Kernel, path: Path, deadline: float) -> None:
    while not path.exists():
        if time.monotonic() >= deadline:
            raise _missing(kernel, path)
        checkpoint()
        time.sleep(_PAUSE)
    # udevd applies the machine's own rules to a new node. A rule that came later would replace the rights given here.
    while is_running(kernel) and _UDEVD.exists() and not _is_initialized(path):
        if time.monotonic() >= deadline:
            _logger.warning("udevd has not finished with %s: a rule of the machine can still change the owner", path)
            return
        checkpoint()
        time.sleep(_PAUSE)


def _missing(kernel: Kernel, path: Path) -> UnavailableError:
    return not_passed_in(kernel, path, "although the device is bound to a VFIO driver", place_in_sysfs(path))


def _is_initialized(path: Path) -> bool:
    """Return whether udevd has run all rules for a node; True without libudev."""
    try:
        import pyudev  # noqa: PLC0415 (importing pyvfio must not require libudev)
    except ImportError:
        return True
    try:
        return bool(pyudev.Devices.from_device_file(pyudev.Context(), str(path)).is_initialized)
    except pyudev.DeviceNotFoundError:
        return False
