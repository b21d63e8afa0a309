"""PCI devices in sysfs: devices, drivers, IOMMU groups and nodes; changes of driver, of rights, and udev rules.

All functions that read or change the machine take `kernel=`; without the argument, they act on the running kernel. All
paths are below `kernel.sysfs`, `kernel.dev` and `kernel.proc`. pyudev is used only on the running machine's own sysfs,
to enumerate devices and to receive events (`monitor`), and is imported on first use.

Drivers are changed through `driver_override` and `drivers_probe` (Documentation/ABI/testing/sysfs-bus-pci). Each change
is read back, and undone if the driver does not bind: see `bind`.

Synchronization: stateless; any thread can call any function. sysfs has no lock: two processes that change the driver of
one device at the same time can see each other's intermediate states.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from pyvfio.pci.cdevs import cdev_node
from pyvfio.pci.groups import comes_later, group_members, group_node, group_of, holders_of
from pyvfio.pci.sriov import is_physical_function, parse_vf_token, physical_function
from pyvfio.pci.sysfs import NO_DRIVER, PciDevice, devices, parse_bdf, read_device

if TYPE_CHECKING:
    from pyvfio.pci.binding import VFIO_PCI, Binding, Step, SysfsWriter, bind, restore, unbind, write_sysfs
    from pyvfio.pci.events import PciEvent, monitor
    from pyvfio.pci.persistence import PersistentBinding, RuleChange, forget, persist, persisted, restore_rule
    from pyvfio.pci.rights import NodeChange, NodeOwner, Ownership, Rights, set_ownership
else:
    # Opening a device requires none of these modules.
    _LATER = {
        "binding": ("VFIO_PCI", "Binding", "Step", "SysfsWriter", "bind", "restore", "unbind", "write_sysfs"),
        "events": ("PciEvent", "monitor"),
        "persistence": ("PersistentBinding", "RuleChange", "forget", "persist", "persisted", "restore_rule"),
        "rights": ("NodeChange", "NodeOwner", "Ownership", "Rights", "set_ownership"),
    }

    def __getattr__(name):
        for module, names in _LATER.items():
            if name in names:
                found = globals()[name] = getattr(import_module(f"pyvfio.pci.{module}"), name)
                return found
        raise AttributeError(f"module 'pyvfio.pci' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


__all__ = [
    "NO_DRIVER",
    "VFIO_PCI",
    "Binding",
    "NodeChange",
    "NodeOwner",
    "Ownership",
    "PciDevice",
    "PciEvent",
    "PersistentBinding",
    "Rights",
    "RuleChange",
    "Step",
    "SysfsWriter",
    "bind",
    "cdev_node",
    "comes_later",
    "devices",
    "forget",
    "group_members",
    "group_node",
    "group_of",
    "holders_of",
    "is_physical_function",
    "monitor",
    "parse_bdf",
    "parse_vf_token",
    "persist",
    "persisted",
    "physical_function",
    "read_device",
    "restore",
    "restore_rule",
    "set_ownership",
    "unbind",
    "write_sysfs",
]
