"""Resets of a slot or bus: the devices and groups that a reset reaches, the reasons for a refusal, and the reset.

Source: `vfio_pci_ioctl_get_pci_hot_reset_info` and `vfio_pci_ioctl_pci_hot_reset` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pyvfio import ioctls, pci
from pyvfio.container import Container
from pyvfio.device.region import Region
from pyvfio.device.windows import Windows
from pyvfio.errors import DeviceNotFoundError, UnsupportedError, VfioError
from pyvfio.guard import Guarded, guarded, holding
from pyvfio.handle import attempt
from pyvfio.iommufd import Iommufd
from pyvfio.kernel import IoctlArgument, Kernel

_HINTS = {
    errno.EINVAL: "A device on the bus is not bound to vfio-pci, is a bridge, or is in a group that was not passed",
    errno.EAGAIN: "A device on the bus is being reset by another call: try again",
    errno.EBUSY: "A device on the bus is in use by another call or process: try again",
    errno.ENOTTY: "The bus was reset, and a device on the bus did not answer in time: see the kernel's log. Under QEMU,"
    " set x-speed=2_5,x-width=1 on the pcie-root-port, which otherwise never reports an active link",
}


@dataclass(frozen=True, slots=True)
class DependentDevice:
    """A device that a hot reset reaches. `group`: the number of the IOMMU group, -1 for a device without a group.

    `owned`: False if the device that is reset is bound to an iommufd, and this device does not belong to the iommufd.
    """

    group: int
    bdf: str
    owned: bool = True


class _Asked(Protocol):
    """A device that makes ioctls."""

    bdf: str

    @property
    def kernel(self) -> Kernel: ...

    def ioctl(
        self,
        request: str,
        argument: IoctlArgument = 0,
        /,
        *,
        hints: Mapping[int, str] | None = None,
        **given: int | str,
    ) -> int: ...


class _Resettable(_Asked, Guarded, Protocol):
    """An open device, as a reset of its bus needs the device."""

    @property
    def bus_master(self) -> bool: ...

    @bus_master.setter
    def bus_master(self, on: bool, /) -> None: ...

    @property
    def container(self) -> Container: ...

    @property
    def iommufd(self) -> Iommufd | None: ...

    @property
    def windows(self) -> Windows: ...

    @property
    def has_dependents(self) -> bool: ...

    def all_regions(self) -> tuple[Region, ...]: ...

    def check_views(self) -> None: ...

    def close_dependents(self) -> None: ...

    def get_pci_hot_reset_info(self) -> tuple[DependentDevice, ...]: ...

    def open_neighbours(self) -> Sequence[_Resettable]: ...


def get_info(device: _Asked) -> tuple[DependentDevice, ...]:
    """Return the devices of VFIO_DEVICE_GET_PCI_HOT_RESET_INFO. Raises UnsupportedError, IoctlError."""
    count = 0
    while True:
        answer = ioctls.pci_hot_reset_info(count=count)
        try:
            device.ioctl("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", answer, count=count)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise UnsupportedError(
                    f"neither the slot nor the bus of {device.bdf} can be reset",
                    hint="A device on a root bus has no bridge or port above, whose bus could be reset",
                ) from error
            if error.errno != errno.ENOSPC or answer.count <= count:
                raise
            count = answer.count
            continue
        found: Sequence[ioctls.vfio_pci_dependent_device] = getattr(answer, "devices", ())
        by_group = not answer.flags & ioctls.VFIO_PCI_HOT_RESET_FLAG_DEV_ID
        return tuple(_dependent(each, device.kernel, by_group=by_group) for each in found[: answer.count])


def _dependent(found: ioctls.vfio_pci_dependent_device, kernel: Kernel, *, by_group: bool) -> DependentDevice:
    slot, function = found.devfn >> 3, found.devfn & 7
    bdf = f"{found.segment:04x}:{found.bus:02x}:{slot:02x}.{function}"
    if by_group:
        return DependentDevice(found.group_id, bdf)
    return DependentDevice(_group_of(bdf, kernel), bdf, owned=found.devid != ioctls.VFIO_PCI_DEVID_NOT_OWNED)


def _group_of(bdf: str, kernel: Kernel) -> int:
    try:
        number = pci.read_device(bdf, kernel=kernel).iommu_group
    except DeviceNotFoundError:
        number = None
    return -1 if number is None else number


def groups_of(reached: Sequence[DependentDevice]) -> tuple[int, ...]:
    """Return the numbers of the groups, ascending."""
    return tuple(sorted({each.group for each in reached}))


def check_complete(device: _Resettable, reached: Sequence[DependentDevice]) -> None:
    """Raise VfioError, with all missing groups and devices, if the kernel would refuse the hot reset of the device.

    Reads sysfs. A device that sysfs does not show is left to the kernel.
    """
    kernel, bdf = device.kernel, device.bdf
    missing, hints = [], []
    for group in groups_of(reached):
        bdfs = [each.bdf for each in reached if each.group == group]
        if device.iommufd is not None:
            if not all(each.owned for each in reached if each.group == group):
                missing.append(f"IOMMU group {group} ({', '.join(bdfs)}) is not bound to the iommufd of the device")
                hints.append(f"open_device({bdfs[0]!r}, space=device.space)")
        elif group not in device.container.groups:
            missing.append(f"IOMMU group {group} ({', '.join(bdfs)}) is not in the container of the device")
            hints.append(f"open_device({bdfs[0]!r}, container=device.container)")
    unbound = [each.bdf for each in reached if not _is_vfio(kernel, each.bdf)]
    missing += [f"{each} is not bound to vfio-pci" for each in unbound]
    if unbound:
        hints.insert(0, f"pyvfio bind {' '.join(unbound)}")
    if missing:
        raise VfioError(
            f"a hot reset of {bdf} reaches {len(reached)} device{'s' * (len(reached) != 1)}, and not all belong to "
            f"this process: {'; '.join(missing)}",
            hint="; ".join(hints),
        )


def _is_vfio(kernel: Kernel, bdf: str) -> bool:
    try:
        return pci.read_device(bdf, kernel=kernel).is_vfio
    except DeviceNotFoundError:
        return True


def attempt_reset(device: _Resettable) -> bool:
    """Reset the bus of the device, as `Device.hot_reset`.

    Returns whether the bus was reset: not if another thread has opened or closed a device on the bus, or mapped a BAR.
    """
    reached = device.get_pci_hot_reset_info()
    check_complete(device, reached)
    devices = _opened(device, reached)
    for each in devices:
        each.check_views()
    for each in devices:
        each.close_dependents()
    # A device that was opened without a group passes none, and the kernel looks at the iommufd of the others.
    fds = [] if device.iommufd else [device.container.groups[number].fd for number in groups_of(reached)]
    return _change_apart(device, reached, devices, partial(_reset_bus, device, devices, fds))


def _opened(device: _Resettable, reached: Sequence[DependentDevice]) -> list[_Resettable]:
    """Return the devices that the reset reaches and that are open beside `device`, with `device`."""
    bdfs = {each.bdf for each in reached}
    return [each for each in device.open_neighbours() if each.bdf in bdfs]


@guarded
def _change_apart(
    device: _Resettable,
    reached: Sequence[DependentDevice],
    devices: Sequence[_Resettable],
    change: Callable[[], object],
) -> bool:
    """Make a change during which no other device may reach the BARs of `devices`. Returns as `attempt_reset`."""
    if _opened(device, reached) != devices:
        return False
    with holding(*(each.windows for each in devices)):
        if any(each.has_dependents for each in devices):
            return False
        change()
        return True


def _reset_bus(device: _Resettable, devices: Sequence[_Resettable], group_fds: Sequence[int]) -> None:
    for each in devices:
        each.check_views()
    masters = [each for each in devices if each.bus_master]
    try:
        for each in masters:
            each.bus_master = False  # no transfer may be in progress during the reset of the bus
        for region in [region for each in devices for region in each.all_regions()]:
            region.drop(keep="no maps")
        _reset(device, group_fds)
    except BaseException:
        for each in masters:
            attempt(partial(_resume, each), [])
        raise


def _resume(device: _Resettable) -> None:
    device.bus_master = True


def _reset(device: _Resettable, group_fds: Sequence[int]) -> None:
    """Reset the bus: VFIO_DEVICE_PCI_HOT_RESET with the descriptors of all groups on the bus. Raises IoctlError."""
    argument = ioctls.pci_hot_reset(group_fds=group_fds)
    device.ioctl("VFIO_DEVICE_PCI_HOT_RESET", argument, hints=_HINTS, groups=len(group_fds))
