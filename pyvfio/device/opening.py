"""The one call that opens a device, and all that it is in: its group, and a container with an IOMMU."""

from __future__ import annotations

import logging
from uuid import UUID

from pyvfio import ioctls, pci
from pyvfio.container import Container
from pyvfio.device.device import Device
from pyvfio.errors import NotBoundError
from pyvfio.guard import close_now, guarded, uninterrupted
from pyvfio.kernel import Kernel, LinuxKernel

logger = logging.getLogger(__name__)


@uninterrupted(Device.close)
def open_device(
    bdf: str,
    *,
    container: Container | None = None,
    kernel: Kernel | None = None,
    iommu_type: ioctls.VfioExtension | None = None,
    vf_token: UUID | str | None = None,
) -> Device:
    """Open a PCI device that is bound to vfio-pci: its group, a container with the IOMMU set, the device itself.

    `container`: put it there, beside what is in it (several groups, several devices of a group); else a new container
    is opened, and closed with the device. A group that this call opened leaves a shared container with the last of its
    devices, unless it is the container's last group and memory is mapped. `kernel` is inherited from the container, or
    is the running one.

    `vf_token`: a UUID, or its text. A virtual function whose physical function is bound to vfio-pci is opened with the
    token of that one. A physical function takes the token as the new one, unless virtual functions of it are open; then
    it wants the token that they were opened with.

    Raises TypeError and ValueError (no BDF, no UUID), DeviceNotFoundError, NotBoundError, GroupNotViableError,
    GroupBusyError, AccessDeniedError, UnavailableError, UnsupportedError, IoctlError (EACCES: another VF token is
    wanted; EINVAL: none is), VfioError (the container has an open Device of that address); nothing is left open then.

    Synchronization: any thread; calls that share a container are made one after the other.
    Cost: some twenty system calls.
    """
    bdf = pci.parse_bdf(bdf)
    token = None if vf_token is None else pci.parse_vf_token(vf_token)
    if not isinstance(container, Container | None):
        raise TypeError(f"container must be a Container, not {type(container).__name__}")
    if container is not None and iommu_type not in (None, container.iommu_type):
        raise ValueError(f"the container has {container.iommu_type.name}, so it cannot be {iommu_type!r}")
    kernel = container.kernel if container is not None else kernel or LinuxKernel()
    number = _group_of(kernel, bdf)
    if container is not None:
        device = _open_in(container, number, bdf, token)
    else:
        container = Container(kernel=kernel, iommu_type=iommu_type)
        try:
            device = _open_in(container, number, bdf, token)
        except BaseException:
            close_now(container)
            raise
        device.opened_with = container
    logger.debug("opened %s in group %d", bdf, number)
    return device


def _group_of(kernel: Kernel, bdf: str) -> int:
    found = pci.read_device(kernel, bdf)
    number = pci.group_of(kernel, bdf) if found.iommu_group is None else found.iommu_group
    if not found.is_vfio:
        error = NotBoundError(
            f"{bdf} is bound to {found.driver or 'no driver'}, not to vfio-pci", hint=f"scripts/bind {bdf}"
        )
        error.driver = found.driver
        raise error
    return number


@guarded
def _open_in(container: Container, number: int, bdf: str, token: UUID | None) -> Device:
    """Open a device, and its group unless that is open. One call: the group may not leave in between."""
    opened = container.group(number)
    if opened is not None:
        return Device(opened, bdf, vf_token=token)
    group = container.open_group(number)
    try:
        device = Device(group, bdf, vf_token=token)
    except BaseException:
        close_now(group)
        raise
    group.leaves = True
    return device
