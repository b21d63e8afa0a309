"""A VFIO PCI device: its regions, registers, configuration space and interrupts, and the one call that opens it all.

`device` has the open device, `region` what of it is read, written and mapped, `irq` its interrupts, `hot_reset`
resets of its bus, and `opening` all that comes before.

Source: Documentation/driver-api/vfio.rst; drivers/vfio/pci/vfio_pci_core.c, vfio_pci_rdwr.c and vfio_pci_intrs.c.
"""

from pyvfio.device.device import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, Device
from pyvfio.device.hot_reset import DependentDevice
from pyvfio.device.irq import Irq
from pyvfio.device.opening import open_device
from pyvfio.device.region import Region, RegionMap

__all__ = [
    "PCI_COMMAND",
    "PCI_COMMAND_MASTER",
    "PCI_COMMAND_MEMORY",
    "DependentDevice",
    "Device",
    "Irq",
    "Region",
    "RegionMap",
    "open_device",
]
