"""How the machine uses a device: network interfaces that are up, disks in use, shared file systems.

A use that this process cannot see still counts: a network interface can be in another network namespace, and a disk can
be mounted in another mount namespace.
"""

from __future__ import annotations

import errno as errnos
import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from pyvfio.errors import VfioError
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import holders_of, process_ids
from pyvfio.pci.sysfs import device_path, link_name, list_names, printable, read_number, read_text

_IFF_UP = 1  # linux/if.h
_ELSEWHERE = " in the mount namespace of "


class Use(NamedTuple):
    """One use of a device in words, and the shell command that ends the use; empty where no command is known.

    `loss`: the loss if the driver of the device changes during the use.
    """

    text: str
    command: str = ""
    loss: str = "data"


def find_uses(kernel: Kernel, bdf: str) -> list[Use]:
    """Return the uses of a PCI function by this machine.

    Cost: a walk through the device's directory; for a disk, also the mount table of each mount namespace.
    """
    return [*_interfaces_up(kernel, bdf), *_disks_in_use(kernel, bdf), *_shared_file_systems(kernel, bdf)]


def uses_of(kernel: Kernel, bdf: str) -> list[str]:
    """Return all uses of a PCI function in words; an empty list for an idle function. Cost: as `find_uses`."""
    return [use.text for use in find_uses(kernel, bdf)]


# --- Network interfaces ------------------------------------------------------------------------------------------


def _interfaces_up(kernel: Kernel, bdf: str) -> Iterator[Use]:
    for path in _class_devices(kernel, "net", bdf):
        if (read_number(path / "flags", 16) or 0) & _IFF_UP or read_text(path / "operstate") == "up":
            yield Use(
                f"network interface {printable(path.name)} is up",
                _command("ip", "link", "set", "dev", path.name, "down"),
                "connections",
            )
    hidden = sum(_hidden_in(Path(place)) for place in _net_directories(device_path(kernel, bdf).resolve()))
    if hidden:
        yield Use(
            f"{hidden} network interface{'s' if hidden > 1 else ''} of the device {'are' if hidden > 1 else 'is'} in "
            "another network namespace, and may be up",
            loss="connections",
        )


def _net_directories(device: Path) -> Iterator[str]:
    for place, names, _files in os.walk(device):
        if os.path.basename(place) == "net":
            yield place
            names.clear()


def _hidden_in(directory: Path) -> int:
    visible = len(list_names(directory))
    try:
        return hidden_interfaces(links=os.stat(directory).st_nlink, visible=visible)
    except OSError:  # the directory was removed meanwhile
        return 0


def hidden_interfaces(*, links: int, visible: int) -> int:
    """Return the number of interfaces of a `net` directory that are in other network namespaces.

    The kernel makes the directory with the first interface of a device, in any namespace, and removes the directory
    with the last interface (`get_device_parent` and `cleanup_glue_dir` in drivers/base/core.c). The directory lists
    only the interfaces of sysfs's own namespace, and counts all interfaces as links (`kernfs_iop_getattr`). Two more
    links belong to the directory itself.
    """
    return max(links - 2 - visible, 0 if visible else 1)


# --- Disks -------------------------------------------------------------------------------------------------------


def _disks_in_use(kernel: Kernel, bdf: str) -> Iterator[Use]:
    paths = [path for path in _class_devices(kernel, "block", bdf) if read_text(path / "dev") is not None]
    if not paths:
        return
    mounted = _mounted(kernel)
    swaps = (read_text(kernel.proc / "swaps") or "").split()
    for path in paths:
        if (use := _use_of_disk(kernel, path, mounted, swaps)).text:
            yield Use(f"{printable(path.name)} {use.text}", use.command)


def _use_of_disk(kernel: Kernel, path: Path, mounted: Mapping[str, str], swaps: list[str]) -> Use:
    name = path.name.replace("!", "/")  # as sysfs writes cciss/c0d0
    where = mounted.get(read_text(path / "dev") or "") or mounted.get(f"/dev/{name}")
    if where is not None:
        return Use(f"is mounted at {where}", "" if _ELSEWHERE in where else _command("umount", where))
    if f"/dev/{name}" in swaps:
        return Use("is swapped to", _command("swapoff", f"/dev/{name}"))
    if holders := list_names(path / "holders"):
        return Use(f"is part of {', '.join(map(printable, sorted(holders)))}")
    return Use(_claim_of(kernel, kernel.dev / name, read_text(path / "dev") or ""))


def _claim_of(kernel: Kernel, node: Path, number: str) -> str:
    """Return the claim on a disk in words; an empty string for a free disk.

    A mount, a swap or a volume claims the disk, in any namespace. Opening with O_EXCL then fails with EBUSY
    (`bd_prepare_to_claim`), for a whole disk also if a partition is claimed.
    """
    if (refusal := _ask(kernel, node, number)) is None:
        holders = [f"{holder.command} (pid {holder.pid})" for holder in holders_of(node, kernel=kernel)]
        return f"is open in {', '.join(holders)}" if holders else ""
    if refusal.errno == errnos.EBUSY:
        return "is claimed: mounted in a namespace that this process cannot see, swapped to, or part of a volume"
    nothing_there = refusal.errno in {errnos.ENOMEDIUM, errnos.ENXIO}
    if nothing_there or (refusal.errno == errnos.EACCES and os.geteuid() != 0):
        return ""  # a user who is not allowed to open the disk is not allowed to bind the device
    return f"may be in use: {node} cannot be opened ({refusal.strerror})"


def _ask(kernel: Kernel, node: Path, number: str) -> OSError | None:
    try:
        status = os.stat(node)
        if stat.S_ISBLK(status.st_mode) and f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" != number:
            return OSError(
                errnos.ESTALE, f"the node is {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}, not {number}"
            )
        kernel.close(kernel.open(str(node), os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK))
    except OSError as error:
        return error
    return None


def _mounted(kernel: Kernel) -> dict[str, str]:
    """Return the mount points of block devices in the mount namespaces of all processes.

    The keys are numbers (`8:1`) and sources: btrfs mounts have numbers of their own. A mount point in the namespace of
    this process takes precedence.
    """
    own = link_name(kernel.proc / "self/ns/mnt")
    places = _mounts_of(kernel.proc / "self/mountinfo")
    seen = {own} - {None}
    for pid in process_ids(kernel.proc):
        process = kernel.proc / str(pid)
        namespace = link_name(process / "ns/mnt")
        if namespace is not None and namespace in seen:
            continue
        seen.add(namespace)
        for device, place in _mounts_of(process / "mountinfo").items():
            command = printable(read_text(process / "comm") or "?")
            places.setdefault(device, f"{place}{_ELSEWHERE}{command} (pid {pid})")
    return places


def _mounts_of(mountinfo: Path) -> dict[str, str]:
    places = {}
    for line in (read_text(mountinfo) or "").split("\n"):
        fields = line.split(" ")
        try:
            source = fields[fields.index("-") + 2]
            places[fields[2]] = places[source] = printable(fields[4])
        except (ValueError, IndexError) as error:
            if line:
                raise VfioError(
                    f"{mountinfo} has a line that describes no mount: {line[:40]!r}",
                    hint="Check the mount at /proc: findmnt /proc",
                ) from error
    return places


def _shared_file_systems(kernel: Kernel, bdf: str) -> Iterator[Use]:
    """Yield the file systems that a virtual machine's host shares (9p).

    While such a file system is mounted, `p9_virtio_remove` waits and cannot be killed. No mount table of this process
    need show the mount: the root below an overlay can be one.
    """
    for path in sorted(device_path(kernel, bdf).glob("virtio*/mount_tag")):
        tag = printable((read_text(path) or "").rstrip("\0"))
        yield Use(f"the host shares file system '{tag}' through the device, and the file system may be mounted")


# --- Both --------------------------------------------------------------------------------------------------------


def _command(*words: str) -> str:
    """A shell command. Empty where a word has other characters than it is shown with, as a mount point with a space."""
    return shlex.join(words) if all("\\" not in word and word.isprintable() for word in words) else ""


def _class_devices(kernel: Kernel, subsystem: str, bdf: str) -> Iterator[Path]:
    """Yield all network interfaces or block devices below a PCI function at any depth, partitions included."""
    root = device_path(kernel, bdf).resolve()
    for name in sorted(list_names(kernel.sysfs / "class" / subsystem)):
        path = (kernel.sysfs / "class" / subsystem / name).resolve()
        if any(root in place.parents for place in (path, *_nvme_controllers(path))):
            yield path


def _nvme_controllers(disk: Path) -> list[Path]:
    # With native multipath a namespace is below its subsystem in devices/virtual. The subsystem links to the
    # controllers.
    for place in disk.parents:
        if place.parent.name == "nvme-subsystem":
            return [(place / name).resolve() for name in list_names(place) if (place / name).is_symlink()]
    return []
