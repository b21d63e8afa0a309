"""Linux VFIO for Python: resizable RAM blocks that a real device reaches exactly as far as it may.

    with pyvfio.open_device("0000:00:02.0") as device, pyvfio.RamBlockList() as blocks:
        with pyvfio.DmaMapper(device.container, blocks) as mapper:
            ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
            device.bus_master = True
            program(device, mapper.iova(ring))
            ring.resize(4 * pyvfio.MIB)

Importing it needs neither root nor VFIO, and costs nothing before the first name is used. `linux/vfio.h` in its own
names is in `pyvfio.ioctls`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvfio.buffers import DmaMapping
    from pyvfio.caps import DeviceInfo, IommuInfo, IrqInfo, RegionInfo
    from pyvfio.container import Container, Group
    from pyvfio.device import Device, Irq, Region, RegionMap, open_device
    from pyvfio.dirty import DirtyPages, DirtyTracking
    from pyvfio.dirty_log import DirtyBlock, DirtyLog
    from pyvfio.dma import DmaMapper
    from pyvfio.errors import (
        AccessDeniedError,
        CannotBePinnedWarning,
        CapabilityError,
        ClosedError,
        DeviceNotFoundError,
        DiscardError,
        EntryLimitError,
        ForkedError,
        GapError,
        GroupBusyError,
        GroupMember,
        GroupNotViableError,
        HandOverError,
        Holder,
        IoctlError,
        IovaOverlapError,
        IovaRangeError,
        MemoryNotReturnedWarning,
        NotBoundError,
        PersistenceWarning,
        PinLimitError,
        ReentrancyError,
        RollbackError,
        UnavailableError,
        UnmapSizeError,
        UnsupportedError,
        VfioError,
    )
    from pyvfio.extents import Extent
    from pyvfio.iova import IovaAllocator
    from pyvfio.kernel import Kernel, LinuxKernel, Memlock
    from pyvfio.live_update import HandOver, TakenOver, hand_over, take_over
    from pyvfio.memory import Anonymous, File, Memfd, MemorySettings, lock_all_memory, unlock_all_memory
    from pyvfio.plan import BlockShape, Plan, PlannedBlock
    from pyvfio.progress import Progress
    from pyvfio.ramblock import RamBlock, RamBlockList, RamBlockNotifier
    from pyvfio.space import AddressSpace, Mapping
    from pyvfio.units import GIB, KIB, MIB, PAGE_SIZE, TIB, Iova, IovaRange, Vaddr
else:
    # pytest imports this package whenever it starts, for the plugin is in it: whoever uses no name pays for none.
    _HOMES = (
        "buffers",
        "caps",
        "container",
        "device",
        "dirty",
        "dirty_log",
        "dma",
        "errors",
        "extents",
        "iova",
        "kernel",
        "live_update",
        "memory",
        "plan",
        "progress",
        "ramblock",
        "space",
        "units",
    )
    _MODULES = frozenset(
        (
            *_HOMES,
            *("block", "cgroup", "discards", "handle", "ioctls", "notifier", "pci", "pieces", "prefault"),
            "type1_errors",
        )
    )

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"pyvfio.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'pyvfio' has no attribute {name!r}")
        for home in _HOMES:
            found = vars(import_module(f"pyvfio.{home}"))
            globals().update({each: found[each] for each in __all__ if each in found})
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *_MODULES, *__all__})


__version__ = "0.1.0"

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "PAGE_SIZE",
    "TIB",
    "AccessDeniedError",
    "AddressSpace",
    "Anonymous",
    "BlockShape",
    "CannotBePinnedWarning",
    "CapabilityError",
    "ClosedError",
    "Container",
    "Device",
    "DeviceInfo",
    "DeviceNotFoundError",
    "DirtyBlock",
    "DirtyLog",
    "DirtyPages",
    "DirtyTracking",
    "DiscardError",
    "DmaMapper",
    "DmaMapping",
    "EntryLimitError",
    "Extent",
    "File",
    "ForkedError",
    "GapError",
    "Group",
    "GroupBusyError",
    "GroupMember",
    "GroupNotViableError",
    "HandOver",
    "HandOverError",
    "Holder",
    "IoctlError",
    "IommuInfo",
    "Iova",
    "IovaAllocator",
    "IovaOverlapError",
    "IovaRange",
    "IovaRangeError",
    "Irq",
    "IrqInfo",
    "Kernel",
    "LinuxKernel",
    "Mapping",
    "Memfd",
    "Memlock",
    "MemoryNotReturnedWarning",
    "MemorySettings",
    "NotBoundError",
    "PersistenceWarning",
    "PinLimitError",
    "Plan",
    "PlannedBlock",
    "Progress",
    "RamBlock",
    "RamBlockList",
    "RamBlockNotifier",
    "ReentrancyError",
    "Region",
    "RegionInfo",
    "RegionMap",
    "RollbackError",
    "TakenOver",
    "UnavailableError",
    "UnmapSizeError",
    "UnsupportedError",
    "Vaddr",
    "VfioError",
    "hand_over",
    "lock_all_memory",
    "open_device",
    "take_over",
    "unlock_all_memory",
]
