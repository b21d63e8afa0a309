"""The call that opens a device, with an address space: a container of type1, or an I/O address space of iommufd."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from pyvfio import ioctls, pci
from pyvfio.arguments import checked_kernel
from pyvfio.container import Container
from pyvfio.device.device import Device
from pyvfio.errors import NotBoundError, VfioError
from pyvfio.guard import close_now, guarded, uninterrupted
from pyvfio.ioas import Ioas
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.pci.cdevs import cdev_node, iommufd_node, no_cdev

if TYPE_CHECKING:
    from uuid import UUID

logger = logging.getLogger(__name__)

_UNSAFE = "unsafe-noiommu"
_KINDS = ("type1", "iommufd", _UNSAFE)


@uninterrupted(Device.close)
def open_device(
    bdf: str,
    *,
    iommu: Literal["type1", "iommufd", "unsafe-noiommu"] | None = None,
    space: Container | Ioas | None = None,
    container: Container | None = None,
    kernel: Kernel | None = None,
    iommu_type: ioctls.VfioExtension | None = None,
    vf_token: UUID | str | None = None,
) -> Device:
    """Open a PCI device that is bound to vfio-pci, in an address space for DMA.

    `iommu`: "type1" opens the device through the IOMMU group, in a container whose IOMMU is set. "iommufd" opens the
    node of the device, and attaches the device to an I/O address space. An explicit choice never falls back. None: the
    kind of `space`; without a space "type1", or "iommufd" where the machine has no node of a container or of the group.

    "unsafe-noiommu" opens a device that has no IOMMU, WITHOUT PROTECTION, and warns UnsafeNoIommuWarning. The device
    has no `space`, and `Device.unsafe_noiommu` in place of it. No other value of `iommu` opens such a device.

    `space`: open the device there, beside other devices. None: make a new space, which is closed with the device.
    `container`: a `space` of type1. `iommu_type`: for a new container. `kernel`: by default, the kernel of the space,
    or the running one.

    If this call opened a group, the group leaves a shared container when the last device of the group is closed. The
    last group of a container stays while memory is mapped.

    `vf_token`: a UUID, or the text of one. If the physical function of a virtual function is bound to vfio-pci, the
    virtual function needs the token of the physical function. A physical function takes the token as the new one. While
    virtual functions are open, the physical function needs the token with which they were opened. Through iommufd,
    tokens need Linux 6.17.

    Raises TypeError and ValueError (no BDF, no UUID, arguments of two kinds of space), DeviceNotFoundError,
    NotBoundError, GroupNotViableError, GroupBusyError, AccessDeniedError, UnavailableError, UnsupportedError,
    IoctlError (EACCES: wrong or missing VF token; EINVAL: the device takes no token; EPERM: interrupts are not
    remapped), VfioError (the space has an open Device of that address). After an error, nothing is left open.

    Synchronization: any thread. Calls that share a space run one after the other.
    Cost: some twenty system calls.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel("7.3", iommufd=True)
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)  # on hardware: without kernel=
        >>> device
        <Device 0000:00:02.0 in group 2>
        >>> other = pyvfio.open_device("0000:00:03.0", space=device.space)
        >>> other.space is device.space
        True
        >>> device.close()
        >>> device = pyvfio.open_device("0000:00:02.0", iommu="iommufd", kernel=kernel)
        >>> device
        <Device 0000:00:02.0 in I/O address space 1>
    """
    bdf = pci.parse_bdf(bdf)
    token = None if vf_token is None else pci.parse_vf_token(vf_token)
    given = _checked_space(space, container)
    kind = _checked_kind(iommu, given)
    if iommu_type is not None:
        _check_type(kind, given, iommu_type)
    kernel = _kernel_of(given, kernel)
    try:
        device = _open_with(kernel, kind, given, bdf, token, iommu_type)
    except VfioError as error:
        error.bdf = bdf  # for `explain`
        raise
    logger.debug("opened %s %s", bdf, device.attachment.place)
    return device


def _kernel_of(given: Container | Ioas | None, kernel: Kernel | None) -> Kernel:
    if given is None:
        return checked_kernel(kernel)
    both_running = isinstance(kernel, LinuxKernel) and isinstance(given.kernel, LinuxKernel)
    if kernel is None or kernel is given.kernel or both_running:
        return given.kernel
    raise ValueError(f"the space uses {given.kernel!r}, and kernel= is {checked_kernel(kernel)!r}: leave kernel= out")


def _checked_space(space: Container | Ioas | None, container: Container | None) -> Container | Ioas | None:
    if not isinstance(space, Container | Ioas | None):
        raise TypeError(f"space must be a Container or an Ioas, not {type(space).__name__}")
    if not isinstance(container, Container | None):
        raise TypeError(f"container must be a Container, not {type(container).__name__}")
    if space is not None and container not in (None, space):
        raise ValueError("space and container are two address spaces: leave container out")
    return container if space is None else space


def _checked_kind(iommu: str | None, space: Container | Ioas | None) -> str | None:
    """Return the kind of address space that the caller asked for, or None."""
    if iommu is not None and iommu not in _KINDS:
        raise ValueError(f"iommu must be 'type1', 'iommufd', 'unsafe-noiommu' or None, not {iommu!r}")
    if space is None:
        return iommu
    kind = "iommufd" if isinstance(space, Ioas) else "type1"
    if iommu not in (None, kind):
        given = "an Ioas" if isinstance(space, Ioas) else "a Container"
        raise ValueError(f"{given} is an address space of {kind}, so iommu cannot be {iommu!r}: leave iommu out")
    return kind


def _check_type(kind: str | None, space: Container | Ioas | None, iommu_type: ioctls.VfioExtension) -> None:
    if kind in ("iommufd", _UNSAFE):
        raise ValueError(f"iommu_type is for containers of type1: leave iommu_type out for {kind}")
    if isinstance(space, Container) and iommu_type != space.iommu_type:
        raise ValueError(f"the container has {space.iommu_type.name}, so it cannot be {iommu_type!r}")


def _open_with(  # noqa: PLR0917 (as `open_device`)
    kernel: Kernel,
    kind: str | None,
    space: Container | Ioas | None,
    bdf: str,
    token: UUID | None,
    iommu_type: ioctls.VfioExtension | None,
) -> Device:
    if isinstance(space, Ioas):
        return Device(space, bdf, vf_token=token)
    why = f"the program asked for {kind or 'type1'}"
    if kind is None and iommu_type is None:
        kind, why = _available(kernel, bdf)
    if kind == "iommufd":
        return _open_node(kernel, bdf, token, why)
    if kind == _UNSAFE:
        return _open_unprotected(kernel, bdf, token)
    number = _group_of(kernel, bdf)
    if space is not None:
        return _open_in(space, number, bdf, token)
    space = Container(kernel=kernel, iommu_type=iommu_type)
    try:
        device = _open_in(space, number, bdf, token)
    except BaseException:
        close_now(space)
        raise
    space.why = why
    device.opened_with = space
    return device


def _available(kernel: Kernel, bdf: str) -> tuple[str, str]:
    """Return the kind of address space for a device, and the reason. Without any node: type1, for the error."""
    found = pci.read_device(bdf, kernel=kernel)
    nodes = [kernel.dev / "vfio/vfio"]
    if found.iommu_group is not None:
        nodes.append(pci.group_node(found.iommu_group, kernel=kernel))
    missing = [str(node) for node in nodes if not node.exists()]
    cdev = cdev_node(bdf, kernel=kernel) if missing else None
    if cdev is None or not cdev.exists() or not iommufd_node(kernel).exists():
        return "type1", "the kernel has type1, which is the first choice"
    return "iommufd", f"type1 cannot be used without {' and '.join(missing)}"


def _open_node(kernel: Kernel, bdf: str, token: UUID | None, why: str) -> Device:
    if cdev_node(bdf, kernel=kernel) is None:
        raise no_cdev(kernel, bdf)  # before /dev/iommu is opened: the reason is the device
    space = Ioas(kernel=kernel)
    try:
        device = Device(space, bdf, vf_token=token)
    except BaseException:
        close_now(space)
        raise
    space.why = why
    device.opened_with = space
    return device


def _open_unprotected(kernel: Kernel, bdf: str, token: UUID | None) -> Device:
    from pyvfio.device.noiommu import open_space  # noqa: PLC0415 (few programs give up protection)

    unsafe = open_space(kernel, bdf)
    try:
        device = Device(unsafe, bdf, vf_token=token)
    except BaseException:
        close_now(unsafe)
        raise
    device.opened_with = unsafe
    return device


def _group_of(kernel: Kernel, bdf: str) -> int:
    found = pci.read_device(bdf, kernel=kernel)
    number = pci.group_of(bdf, kernel=kernel) if found.iommu_group is None else found.iommu_group
    if not found.is_vfio:
        error = NotBoundError(
            f"{bdf} is bound to {found.driver or 'no driver'}, not to vfio-pci", hint=f"pyvfio bind {bdf}"
        )
        error.driver = found.driver
        raise error
    return number


@guarded
def _open_in(container: Container, number: int, bdf: str, token: UUID | None) -> Device:
    """Open a device, and the group unless the group is open. The lock keeps the group from leaving in between."""
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
