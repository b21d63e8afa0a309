"""What the machine is doing with a device: network interfaces that are up, disks that are in use, shared file systems.

A device is never taken for idle because this process cannot see what uses it: a network interface may be in another
network namespace, a disk may be mounted in another mount namespace.
"""

from __future__ import annotations

import errno as errnos
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from pyvfio.errors import VfioError
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import holders_of, process_ids
from pyvfio.pci.sysfs import device_path, link_name, list_names, printable, read_number, read_text

_IFF_UP = 1  # linux/if.h


def uses_of(kernel: Kernel, bdf: str) -> list[str]:
    """What depends on a PCI function, each in words; empty when nothing does.

    Cost: a walk through the device's directory, and for a disk the mount table of each mount namespace.
    """
    return [*_interfaces_up(kernel, bdf), *_disks_in_use(kernel, bdf), *_shared_file_systems(kernel, bdf)]


# --- Network interfaces ------------------------------------------------------------------------------------------


def _interfaces_up(kernel: Kernel, bdf: str) -> Iterator[str]:
    for path in _class_devices(kernel, "net", bdf):
        if (read_number(path / "flags", 16) or 0) & _IFF_UP or read_text(path / "operstate") == "up":
            yield f"network interface {printable(path.name)} is up"
    hidden = sum(_hidden_in(Path(place)) for place in _net_directories(device_path(kernel, bdf).resolve()))
    if hidden:
        yield (
            f"{hidden} network interface{'s' if hidden > 1 else ''} of it {'are' if hidden > 1 else 'is'} in another "
            "network namespace, and may be up"
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
    except OSError:  # it has gone meanwhile
        return 0


def hidden_interfaces(*, links: int, visible: int) -> int:
    """How many interfaces a `net` directory has that are in other network namespaces.

    The kernel makes the directory with a device's first interface, in whatever namespace, and removes it with the last
    (`get_device_parent` and `cleanup_glue_dir` in drivers/base/core.c). It lists those of sysfs's own namespace, and
    counts all of them as links (`kernfs_iop_getattr`); a directory has two of its own.
    """
    return max(links - 2 - visible, 0 if visible else 1)


# --- Disks -------------------------------------------------------------------------------------------------------


def _disks_in_use(kernel: Kernel, bdf: str) -> Iterator[str]:
    paths = [path for path in _class_devices(kernel, "block", bdf) if read_text(path / "dev") is not None]
    if not paths:
        return
    mounted = _mounted(kernel)
    swaps = (read_text(kernel.proc / "swaps") or "").split()
    for path in paths:
        if reason := _use_of_disk(kernel, path, mounted, swaps):
            yield f"{printable(path.name)} {reason}"


def _use_of_disk(kernel: Kernel, path: Path, mounted: Mapping[str, str], swaps: list[str]) -> str:
    name = path.name.replace("!", "/")  # as sysfs writes cciss/c0d0
    where = mounted.get(read_text(path / "dev") or "") or mounted.get(f"/dev/{name}")
    if where is not None:
        return f"is mounted at {where}"
    if f"/dev/{name}" in swaps:
        return "is swapped to"
    if holders := list_names(path / "holders"):
        return f"is part of {', '.join(map(printable, sorted(holders)))}"
    return _claim_of(kernel, kernel.dev / name, read_text(path / "dev") or "")


def _claim_of(kernel: Kernel, node: Path, number: str) -> str:
    """Who has a disk, as the kernel says: a mount, a swap or a volume, in whatever namespace, claims it, and then
    O_EXCL is EBUSY (`bd_prepare_to_claim`; of a disk also when a partition of it is claimed)."""
    if (refusal := _ask(kernel, node, number)) is None:
        holders = [f"{holder.command} (pid {holder.pid})" for holder in holders_of(kernel, node)]
        return f"is open in {', '.join(holders)}" if holders else ""
    if refusal.errno == errnos.EBUSY:
        return "is claimed: it is mounted in a namespace that is not seen from here, swapped to, or part of a volume"
    nothing_there = refusal.errno in {errnos.ENOMEDIUM, errnos.ENXIO}
    if nothing_there or (refusal.errno == errnos.EACCES and os.geteuid() != 0):
        return ""  # a user who may not ask may not bind either
    return f"may be in use, which cannot be asked: {node} cannot be opened ({refusal.strerror})"


def _ask(kernel: Kernel, node: Path, number: str) -> OSError | None:
    try:
        status = os.stat(node)
        if stat.S_ISBLK(status.st_mode) and f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" != number:
            return OSError(errnos.ESTALE, f"it is {os.major(status.st_rdev)}:{os.minor(status.st_rdev)}, not {number}")
        kernel.close(kernel.open(str(node), os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK))
    except OSError as error:
        return error
    return None


def _mounted(kernel: Kernel) -> dict[str, str]:
    """Where block devices are mounted in any namespace that a process is in, by number (`8:1`) and by source: btrfs
    mounts have numbers of their own. Places in this namespace come first."""
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
            places.setdefault(device, f"{place} in the mount namespace of {command} (pid {pid})")
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
                    f"{mountinfo} has a line that is no mount: {line[:40]!r}", hint="See what is mounted at /proc"
                ) from error
    return places


def _shared_file_systems(kernel: Kernel, bdf: str) -> Iterator[str]:
    """Those of a virtual machine's host (9p). While one is mounted, `p9_virtio_remove` waits and cannot be killed; and
    whether it is cannot be seen: the root may be one, below an overlay, in no mount table of this process."""
    for path in sorted(device_path(kernel, bdf).glob("virtio*/mount_tag")):
        tag = printable((read_text(path) or "").rstrip("\0"))
        yield f"the host shares file system '{tag}' through it, which may be mounted"


# --- Both --------------------------------------------------------------------------------------------------------


def _class_devices(kernel: Kernel, subsystem: str, bdf: str) -> Iterator[Path]:
    """The network interfaces or block devices that stand on a PCI function, however deep, partitions included."""
    root = device_path(kernel, bdf).resolve()
    for name in sorted(list_names(kernel.sysfs / "class" / subsystem)):
        path = (kernel.sysfs / "class" / subsystem / name).resolve()
        if any(root in place.parents for place in (path, *_nvme_controllers(path))):
            yield path


def _nvme_controllers(disk: Path) -> list[Path]:
    # With native multipath a namespace belongs to its subsystem, below devices/virtual, which links to its controllers.
    for place in disk.parents:
        if place.parent.name == "nvme-subsystem":
            return [(place / name).resolve() for name in list_names(place) if (place / name).is_symlink()]
    return []
