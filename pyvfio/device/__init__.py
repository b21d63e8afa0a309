"""A VFIO PCI device: regions, registers, configuration space, interrupts, and `open_device`.

`device` has the open device. `region` has the reads, writes and mappings of a region, `config` the region of
configuration space, `register` a register as an object. `windows` drops and maps register windows. `irq` has
interrupts, `hot_reset` has resets of a bus, `opening` has `open_device`. `capabilities` are snapshots of PCI
capabilities, and `features` are the features of VFIO_DEVICE_FEATURE.

Source: Documentation/driver-api/vfio.rst; drivers/vfio/pci/vfio_pci_core.c, vfio_pci_rdwr.c and vfio_pci_intrs.c.
"""

from typing import TYPE_CHECKING

from pyvfio.device.config import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, ConfigSpace
from pyvfio.device.device import Device
from pyvfio.device.features import DmaBuf, Feature, FeatureAnswer
from pyvfio.device.hot_reset import DependentDevice
from pyvfio.device.irq import Irq
from pyvfio.device.opening import open_device
from pyvfio.device.region import Region, RegionMap
from pyvfio.device.register import Register

if TYPE_CHECKING:
    from pyvfio.device.capabilities import (
        Capabilities,
        Capability,
        ExtendedVendorCapability,
        MsixCapability,
        PcieCapability,
        PowerCapability,
        VendorCapability,
    )
else:

    def __getattr__(name):
        """Import `capabilities` when one of its names is used: few programs look at them."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pyvfio.device import capabilities  # noqa: PLC0415

        return getattr(capabilities, name)


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
