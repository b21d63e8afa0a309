"""Linux VFIO for Python: resizable RAM blocks, of which a device reaches exactly the part in use.

    with pyvfio.open_device("0000:00:02.0") as device, pyvfio.RamBlockList() as blocks:
        with pyvfio.DmaMapper(device.space, blocks) as mapper:
            ring = blocks.add("ring", used_length=2 * pyvfio.MIB, max_length=pyvfio.GIB)
            device.bus_master = True
            program(device, mapper.iova(ring))
            ring.resize(4 * pyvfio.MIB)

The import needs neither root nor VFIO, and loads no module before the first use of a name. `pyvfio.ioctls` and
`pyvfio.iommufd_ioctls` have `linux/vfio.h` and `linux/iommufd.h` with C names.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pyvfio import ioctls as ioctls
    from pyvfio import iommufd_ioctls as iommufd_ioctls
    from pyvfio import pci as pci
    from pyvfio import testing as testing
    from pyvfio.blocks.progress import Progress as Progress
    from pyvfio.container import Container as Container
    from pyvfio.container import Group as Group
    from pyvfio.device import Capabilities as Capabilities
    from pyvfio.device import Capability as Capability
    from pyvfio.device import ConfigSpace as ConfigSpace
    from pyvfio.device import Device as Device
    from pyvfio.device import DmaBuf as DmaBuf
    from pyvfio.device import ExtendedVendorCapability as ExtendedVendorCapability
    from pyvfio.device import Feature as Feature
    from pyvfio.device import FeatureAnswer as FeatureAnswer
    from pyvfio.device import Irq as Irq
    from pyvfio.device import MsixCapability as MsixCapability
    from pyvfio.device import PcieCapability as PcieCapability
    from pyvfio.device import PowerCapability as PowerCapability
    from pyvfio.device import Region as Region
    from pyvfio.device import RegionMap as RegionMap
    from pyvfio.device import Register as Register
    from pyvfio.device import VendorCapability as VendorCapability
    from pyvfio.device import open_device as open_device
    from pyvfio.diagnosis import Diagnosis as Diagnosis
    from pyvfio.diagnosis import doctor as doctor
    from pyvfio.dirty.log import DirtyBlock as DirtyBlock
    from pyvfio.dirty.log import DirtyLog as DirtyLog
    from pyvfio.dirty.tracking import DirtyPages as DirtyPages
    from pyvfio.dirty.tracking import DirtyTracking as DirtyTracking
    from pyvfio.dma import DmaMapper as DmaMapper
    from pyvfio.errors import AccessDeniedError as AccessDeniedError
    from pyvfio.errors import CannotBePinnedWarning as CannotBePinnedWarning
    from pyvfio.errors import CapabilityError as CapabilityError
    from pyvfio.errors import ClosedError as ClosedError
    from pyvfio.errors import DeviceGoneError as DeviceGoneError
    from pyvfio.errors import DeviceNotFoundError as DeviceNotFoundError
    from pyvfio.errors import DiscardError as DiscardError
    from pyvfio.errors import EntryLimitError as EntryLimitError
    from pyvfio.errors import ForkedError as ForkedError
    from pyvfio.errors import GapError as GapError
    from pyvfio.errors import GroupBusyError as GroupBusyError
    from pyvfio.errors import GroupMember as GroupMember
    from pyvfio.errors import GroupNotViableError as GroupNotViableError
    from pyvfio.errors import HandOverError as HandOverError
    from pyvfio.errors import Holder as Holder
    from pyvfio.errors import IoctlError as IoctlError
    from pyvfio.errors import IovaOverlapError as IovaOverlapError
    from pyvfio.errors import IovaRangeError as IovaRangeError
    from pyvfio.errors import MemoryNotReturnedWarning as MemoryNotReturnedWarning
    from pyvfio.errors import NotBoundError as NotBoundError
    from pyvfio.errors import PersistenceWarning as PersistenceWarning
    from pyvfio.errors import PinLimitError as PinLimitError
    from pyvfio.errors import ReentrancyError as ReentrancyError
    from pyvfio.errors import RegisterTimeoutError as RegisterTimeoutError
    from pyvfio.errors import RollbackError as RollbackError
    from pyvfio.errors import UnavailableError as UnavailableError
    from pyvfio.errors import UnmapSizeError as UnmapSizeError
    from pyvfio.errors import UnsafeNoIommuWarning as UnsafeNoIommuWarning
    from pyvfio.errors import UnsupportedError as UnsupportedError
    from pyvfio.errors import VfioError as VfioError
    from pyvfio.extents import Extent as Extent
    from pyvfio.findings import Command as Command
    from pyvfio.findings import Finding as Finding
    from pyvfio.info import DeviceInfo as DeviceInfo
    from pyvfio.info import IommuInfo as IommuInfo
    from pyvfio.info import IrqInfo as IrqInfo
    from pyvfio.info import RegionInfo as RegionInfo
    from pyvfio.ioas import Ioas as Ioas
    from pyvfio.iommu.iova import IovaAllocator as IovaAllocator
    from pyvfio.iommu.space import AddressSpace as AddressSpace
    from pyvfio.iommu.space import Mapping as Mapping
    from pyvfio.iommufd import HwInfo as HwInfo
    from pyvfio.iommufd import Iommufd as Iommufd
    from pyvfio.kernel import Kernel as Kernel
    from pyvfio.kernel import LinuxKernel as LinuxKernel
    from pyvfio.kernel import Memlock as Memlock
    from pyvfio.live_update import HandOver as HandOver
    from pyvfio.live_update import TakenOver as TakenOver
    from pyvfio.live_update import hand_over as hand_over
    from pyvfio.live_update import take_over as take_over
    from pyvfio.mapper.buffers import DmaMapping as DmaMapping
    from pyvfio.mapper.plan import BlockShape as BlockShape
    from pyvfio.mapper.plan import Plan as Plan
    from pyvfio.mapper.plan import PlannedBlock as PlannedBlock
    from pyvfio.mapper.policy import Policy as Policy
    from pyvfio.memory import Anonymous as Anonymous
    from pyvfio.memory import File as File
    from pyvfio.memory import Memfd as Memfd
    from pyvfio.memory import MemorySettings as MemorySettings
    from pyvfio.memory import lock_all_memory as lock_all_memory
    from pyvfio.memory import unlock_all_memory as unlock_all_memory
    from pyvfio.noiommu import PhysicalMemory as PhysicalMemory
    from pyvfio.noiommu import PhysicalRange as PhysicalRange
    from pyvfio.ramblock import RamBlock as RamBlock
    from pyvfio.ramblock import RamBlockList as RamBlockList
    from pyvfio.ramblock import RamBlockNotifier as RamBlockNotifier
    from pyvfio.units import GIB as GIB
    from pyvfio.units import KIB as KIB
    from pyvfio.units import MIB as MIB
    from pyvfio.units import PAGE_SIZE as PAGE_SIZE
    from pyvfio.units import TIB as TIB
    from pyvfio.units import Iova as Iova
    from pyvfio.units import IovaRange as IovaRange
    from pyvfio.units import Vaddr as Vaddr
else:
    # pytest imports this package at every start, since the package has a plugin. Therefore a module is imported only
    # when one of its names is used.
    _NAMES = {
        "blocks.progress": "Progress",
        "container": "Container Group",
        "device": """
            Capabilities Capability ConfigSpace Device DmaBuf ExtendedVendorCapability Feature FeatureAnswer Irq
            MsixCapability PcieCapability PowerCapability Region RegionMap Register VendorCapability open_device
        """,
        "diagnosis": "Diagnosis doctor",
        "dirty.log": "DirtyBlock DirtyLog",
        "dirty.tracking": "DirtyPages DirtyTracking",
        "dma": "DmaMapper",
        "errors": """
            AccessDeniedError CannotBePinnedWarning CapabilityError ClosedError DeviceGoneError DeviceNotFoundError
            DiscardError EntryLimitError ForkedError GapError GroupBusyError GroupMember GroupNotViableError
            HandOverError Holder IoctlError IovaOverlapError IovaRangeError MemoryNotReturnedWarning NotBoundError
            PersistenceWarning PinLimitError ReentrancyError RegisterTimeoutError RollbackError UnavailableError
            UnmapSizeError UnsafeNoIommuWarning UnsupportedError VfioError
        """,
        "extents": "Extent",
        "findings": "Command Finding",
        "info": "DeviceInfo IommuInfo IrqInfo RegionInfo",
        "ioas": "Ioas",
        "iommu.iova": "IovaAllocator",
        "iommu.space": "AddressSpace Mapping",
        "iommufd": "HwInfo Iommufd",
        "kernel": "Kernel LinuxKernel Memlock",
        "live_update": "HandOver TakenOver hand_over take_over",
        "mapper.buffers": "DmaMapping",
        "mapper.plan": "BlockShape Plan PlannedBlock",
        "mapper.policy": "Policy",
        "memory": "Anonymous File Memfd MemorySettings lock_all_memory unlock_all_memory",
        "noiommu": "PhysicalMemory PhysicalRange",
        "ramblock": "RamBlock RamBlockList RamBlockNotifier",
        "units": "GIB KIB MIB PAGE_SIZE TIB Iova IovaRange Vaddr",
    }
    _HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
    _MODULES = ("ioctls", "iommufd_ioctls", "pci", "testing")
    __all__ = sorted(_HOMES)  # noqa: PLE0605 (type checkers do not read this branch)

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"pyvfio.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module 'pyvfio' has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"pyvfio.{_HOMES[name]}"), name)
        return found

    def __dir__():
        return sorted({*globals(), *_MODULES, *__all__})
