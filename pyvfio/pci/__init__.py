"""PCI devices as sysfs shows them: from a BDF to its IOMMU group, driver and group node, and from driver to driver.

Everything is read below `kernel.sysfs`, `kernel.dev` and `kernel.proc`, so that another root may be given. pyudev is
used where it adds something, on the running machine's own sysfs: to enumerate, and to watch (`monitor`). It is imported
when first needed.

Changes of driver go through `driver_override` and `drivers_probe` (Documentation/ABI/testing/sysfs-bus-pci), are read
back, and are undone when they do not come true: see `bind`.

Synchronization: stateless, any thread may call anything. Two processes that change the driver of one device at the same
time can see each other's half-way states; sysfs has no lock against that.
"""

from pyvfio.pci.binding import VFIO_PCI, Binding, Step, SysfsWriter, bind, restore, unbind, write_sysfs
from pyvfio.pci.events import PciEvent, monitor
from pyvfio.pci.groups import comes_later, group_members, group_node, group_of, holders_of
from pyvfio.pci.sriov import is_physical_function, parse_vf_token, physical_function
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, enumerate_devices, parse_bdf, read_device

__all__ = [
    "NO_DRIVER",
    "VFIO_PCI",
    "Binding",
    "PciDevice",
    "PciEvent",
    "Step",
    "SysfsWriter",
    "bind",
    "comes_later",
    "enumerate_devices",
    "group_members",
    "group_node",
    "group_of",
    "holders_of",
    "is_physical_function",
    "monitor",
    "parse_bdf",
    "parse_vf_token",
    "physical_function",
    "read_device",
    "restore",
    "unbind",
    "write_sysfs",
]
