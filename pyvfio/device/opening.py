"""The one call that opens a device, and all that it is in: its group, and a container with an IOMMU."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from pyvfio import ioctls, pci
from pyvfio.container import Container, Group
from pyvfio.device.device import Device
from pyvfio.errors import NotBoundError
from pyvfio.kernel import Kernel, LinuxKernel

logger = logging.getLogger(__name__)


def open_device(
    bdf: str,
    *,
    container: Container | None = None,
    kernel: Kernel | None = None,
    iommu_type: ioctls.VfioExtension | None = None,
) -> Device:
    """Open a PCI device that is bound to vfio-pci: its group, a container with the IOMMU set, the device itself.

    `container`: put it there, beside what is in it (several groups, several devices of a group); else a new container
    is opened, and closed with the device. `kernel` is inherited from the container, or is the running one.

    Raises ValueError (no BDF), DeviceNotFoundError, NotBoundError, GroupNotViableError, GroupBusyError,
    AccessDeniedError, UnavailableError, UnsupportedError, IoctlError; nothing is left open then.

    Cost: some twenty system calls.
    """
    bdf = pci.parse_bdf(bdf)
    if not isinstance(container, Container | None):
        raise TypeError(f"container must be a Container, not {type(container).__name__}")
    if container is not None and iommu_type not in (None, container.iommu_type):
        raise ValueError(f"the container has {container.iommu_type.name}, so it cannot be {iommu_type!r}")
    kernel = container.kernel if container is not None else kernel or LinuxKernel()
    found = pci.read_device(kernel, bdf)
    number = pci.group_of(kernel, bdf)
    if not found.is_vfio:
        error = NotBoundError(
            f"{bdf} is bound to {found.driver or 'no driver'}, not to vfio-pci", hint=f"scripts/bind {bdf}"
        )
        error.driver = found.driver
        raise error
    with ExitStack() as undo:
        mine = container is None
        if container is None:
            container = undo.enter_context(Container(kernel=kernel, iommu_type=iommu_type))
        group = container.group(number)
        if group is None:
            group = Group(number, kernel=kernel)
            undo.callback(group.close)
            container.attach(group)
        device = Device(group, bdf)
        if mine:
            device._stack.callback(container.close)
        undo.pop_all()
    logger.debug("opened %s in group %d", bdf, number)
    return device
