"""Resets of a whole slot or bus: which devices and groups they reach, and what a process lacks to make one.

Source: `vfio_pci_ioctl_get_pci_hot_reset_info` and `vfio_pci_ioctl_pci_hot_reset` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import errno
from collections.abc import Container as Collection
from collections.abc import Sequence
from dataclasses import dataclass

from pyvfio import ioctls, pci
from pyvfio.errors import DeviceNotFoundError, UnsupportedError, VfioError
from pyvfio.handle import Handle
from pyvfio.kernel import Kernel

_HINTS = {
    errno.EINVAL: "A device of the bus is not bound to vfio-pci, or a bridge, or in a group that was not given",
    errno.EAGAIN: "A device of the bus is in the middle of another reset: try again",
    errno.EBUSY: "A device of the bus is in use by another call or process: try again",
    errno.ENOTTY: "The bus was reset, and a device on it did not answer in time: see the kernel's log. Under QEMU, give"
    " the pcie-root-port x-speed=2_5,x-width=1: it never reports its link as active",
}


@dataclass(frozen=True, slots=True)
class DependentDevice:
    """A device that a hot reset reaches besides the one that was asked."""

    group: int
    bdf: str


def get_info(device: Handle, bdf: str) -> tuple[DependentDevice, ...]:
    """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, asked again until all devices fit. Raises UnsupportedError, IoctlError."""
    count = 0
    while True:
        answer = ioctls.pci_hot_reset_info(count=count)
        try:
            device.ioctl("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", answer, count=count)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise UnsupportedError(
                    f"neither the slot nor the bus of {bdf} can be reset",
                    hint="A device on a root bus cannot be: it has no bridge or port above it whose bus is reset",
                ) from error
            if error.errno != errno.ENOSPC or answer.count <= count:
                raise
            count = answer.count
            continue
        found: Sequence[ioctls.vfio_pci_dependent_device] = getattr(answer, "devices", ())
        return tuple(map(_dependent, found[: answer.count]))


def _dependent(found: ioctls.vfio_pci_dependent_device) -> DependentDevice:
    slot, function = found.devfn >> 3, found.devfn & 7
    return DependentDevice(found.group_id, f"{found.segment:04x}:{found.bus:02x}:{slot:02x}.{function}")


def groups_of(reached: Sequence[DependentDevice]) -> tuple[int, ...]:
    """The numbers of the groups, ascending."""
    return tuple(sorted({each.group for each in reached}))


def check_complete(kernel: Kernel, bdf: str, reached: Sequence[DependentDevice], *, attached: Collection[int]) -> None:
    """Raise VfioError, with all that is missing, where the kernel would refuse the hot reset of `bdf`.

    `attached`: the groups of the container. Reads sysfs. The kernel judges a device that sysfs does not show.
    """
    missing, hints = [], []
    for group in groups_of(reached):
        if group not in attached:
            bdfs = [each.bdf for each in reached if each.group == group]
            missing.append(f"IOMMU group {group} ({', '.join(bdfs)}) is not in the device's container")
            hints.append(f"open_device({bdfs[0]!r}, container=device.container)")
    unbound = [each.bdf for each in reached if not _is_vfio(kernel, each.bdf)]
    missing += [f"{each} is not bound to vfio-pci" for each in unbound]
    if unbound:
        hints.insert(0, f"scripts/bind {' '.join(unbound)}")
    if missing:
        raise VfioError(
            f"a hot reset of {bdf} reaches {len(reached)} device{'s' * (len(reached) != 1)}, and not all are this "
            f"process's: {'; '.join(missing)}",
            hint="; ".join(hints),
        )


def _is_vfio(kernel: Kernel, bdf: str) -> bool:
    try:
        return pci.read_device(kernel, bdf).is_vfio
    except DeviceNotFoundError:
        return True


def reset(device: Handle, group_fds: Sequence[int]) -> None:
    """VFIO_DEVICE_PCI_HOT_RESET with the descriptors of all groups that it reaches. Raises IoctlError."""
    argument = ioctls.pci_hot_reset(group_fds=group_fds)
    device.ioctl("VFIO_DEVICE_PCI_HOT_RESET", argument, hints=_HINTS, groups=len(group_fds))
