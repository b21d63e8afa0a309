"""VFIO's no-IOMMU mode: whether the mode is on, which devices are concerned, and the reasons for which none opens.

A device in this mode reads and writes all memory of the machine. Root turns the mode on with a parameter of the module
vfio. VFIO then makes a group for each device without an IOMMU.

Source: `vfio_noiommu_group_alloc` in drivers/vfio/group.c; drivers/vfio/container.c; drivers/vfio/vfio_main.c.
"""

from __future__ import annotations

from pyvfio.errors import NotBoundError, UnavailableError, UnsupportedError, VfioError
from pyvfio.kernel import Kernel
from pyvfio.pci.groups import group_node
from pyvfio.pci.surroundings import look_around
from pyvfio.pci.sysfs import PciDevice, printable, read_text

PARAMETER = "module/vfio/parameters/enable_unsafe_noiommu_mode"
"""The parameter below sysfs that turns the mode on."""

PREFIX = "noiommu-"
"""The beginning of the names of the nodes, of groups and of devices."""

RISK = "the device then reads and writes any memory of this machine, and one wrong address corrupts the kernel"


def is_enabled(kernel: Kernel) -> bool:
    """Return whether the mode is on."""
    return read_text(kernel.sysfs / PARAMETER) in {"Y", "1"}


def is_unprotected(kernel: Kernel, device: PciDevice) -> bool:
    """Return whether VFIO has the device in no-IOMMU mode. Cost: one small file."""
    if device.cdev is not None and device.cdev.startswith(PREFIX):
        return True
    group = device.iommu_group
    return group is not None and group_node(group, kernel=kernel).name.startswith(PREFIX)


def no_protection(bdf: str, refused: str) -> UnsupportedError:
    """Return the error for a call that keeps a promise, on a device in no-IOMMU mode."""
    return UnsupportedError(
        f"{bdf} has no IOMMU (no-IOMMU mode), so {refused}: the device can access all memory of the machine",
        hint="Enable the IOMMU: pyvfio doctor says how. Or open the device with open_device(..., "
        'iommu="unsafe-noiommu"), and take memory from device.unsafe_noiommu',
    )


def not_unprotected(kernel: Kernel, device: PciDevice) -> VfioError:
    """Return the error for a device that VFIO does not have in no-IOMMU mode.

    * UnsupportedError: the device has an IOMMU.
    * NotBoundError: the mode is on, and no driver of VFIO has the device.
    * UnavailableError: the mode is off, or the kernel was built without the mode.
    """
    bdf = device.bdf
    if device.iommu_group is not None or device.is_vfio:
        return UnsupportedError(
            f"{bdf} has an IOMMU, so the device cannot be opened without one",
            hint="Leave iommu= out. The IOMMU confines the device to memory that the program maps",
        )
    if is_enabled(kernel):
        error = NotBoundError(
            f"{bdf} is bound to {printable(device.driver or 'no driver')}, not to vfio-pci", hint=f"pyvfio bind {bdf}"
        )
        error.driver = device.driver
        return error
    path = kernel.sysfs / PARAMETER
    better = "An IOMMU is better: pyvfio doctor says how to enable one"
    if not path.exists():
        loaded = (kernel.sysfs / "module/vfio").exists()
        reason = "was built without CONFIG_VFIO_NOIOMMU" if loaded else "has not loaded the module vfio: modprobe vfio"
        return UnavailableError(f"{bdf} cannot be opened without an IOMMU: the kernel {reason}", hint=better)
    here = look_around(kernel)
    where = ", on the host" if here.container else "" if here.root else ", as root"
    return UnavailableError(
        f"{bdf} cannot be opened without an IOMMU: no-IOMMU mode is off",
        hint=f"{better}. To accept that {RISK}: echo 1 >{path}{where}, then pyvfio bind {bdf}",
    )
