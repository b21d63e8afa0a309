"""A VFIO PCI device: its regions, registers, configuration space and interrupts, and the one call that opens it all.

`device` has the open device, `region` what of it is read, written and mapped, `config` the region that is configuration
space, `register` one register as an object, `windows` what is mapped when, `irq` its interrupts, `hot_reset` resets of
its bus, and `opening` all that comes before. `capabilities` are the PCI ones, as snapshots, and `features` what the
kernel offers besides.

Source: Documentation/driver-api/vfio.rst; drivers/vfio/pci/vfio_pci_core.c, vfio_pci_rdwr.c and vfio_pci_intrs.c.
"""

from pyvfio.device.capabilities import (
    Capabilities,
    Capability,
    ExtendedVendorCapability,
    MsixCapability,
    PcieCapability,
    PowerCapability,
    VendorCapability,
)
from pyvfio.device.config import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, ConfigSpace
from pyvfio.device.device import Device
from pyvfio.device.features import DmaBuf, Feature, FeatureAnswer
from pyvfio.device.hot_reset import DependentDevice
from pyvfio.device.irq import Irq
from pyvfio.device.opening import open_device
from pyvfio.device.region import Region, RegionMap
from pyvfio.device.register import Register

__all__ = [
    "PCI_COMMAND",
    "PCI_COMMAND_MASTER",
    "PCI_COMMAND_MEMORY",
    "Capabilities",
    "Capability",
    "ConfigSpace",
    "DependentDevice",
    "Device",
    "DmaBuf",
    "ExtendedVendorCapability",
    "Feature",
    "FeatureAnswer",
    "Irq",
    "MsixCapability",
    "PcieCapability",
    "PowerCapability",
    "Region",
    "RegionMap",
    "Register",
    "VendorCapability",
    "open_device",
]
