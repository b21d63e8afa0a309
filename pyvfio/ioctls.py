"""`<linux/vfio.h>` with C names: the requests, flags, indexes and structures of container, group and PCI device.

Structures, constants and flags have the names of the C header, so that the kernel's documentation applies to this file.
Other names are in CamelCase (the classes that group flags and indexes), end in ``_MINSZ``, or belong to the functions
at the end. Where kernels differ, this file has the newest layout, and a comment names the first kernel with each part.
A caller passes the whole structure, and an older kernel ignores the fields that it does not have. A flexible array at
the end is not part of a structure, so that `ctypes.sizeof` equals C's ``sizeof``.

Left out: the migration interface that was withdrawn before 5.18, and spapr, EEH, ccw, ap, zPCI and FSL. Numbers of the
latter that a PCI driver can meet are included, since these numbers are taken.

This module makes no system call. ``tests/unit/test_abi.py`` checks every name, number, size and offset twice. The C
compiler reads the header of the machine, and a table that was not made from this file confirms the values.
"""

from __future__ import annotations

import ctypes
import enum
import functools
from collections.abc import Sequence
from typing import TypeVar, cast

from pyvfio.fields import io as _request
from pyvfio.fields import s32 as _s32
from pyvfio.fields import u8 as _u8
from pyvfio.fields import u16 as _u16
from pyvfio.fields import u32 as _u32
from pyvfio.fields import u64 as _u64

_Structure = TypeVar("_Structure", bound=ctypes.Structure)

VFIO_API_VERSION = 0
VFIO_TYPE = ";"
VFIO_BASE = 100


def _io(number: int) -> int:
    return _request(VFIO_TYPE, VFIO_BASE + number)


# Container and device share numbers: the meaning of a request depends on the kind of the descriptor.

# --- container, /dev/vfio/vfio
VFIO_GET_API_VERSION = _io(0)
VFIO_CHECK_EXTENSION = _io(1)  # the extension by value
VFIO_SET_IOMMU = _io(2)  # the IOMMU type by value

# --- group, /dev/vfio/N
VFIO_GROUP_GET_STATUS = _io(3)
VFIO_GROUP_SET_CONTAINER = _io(4)  # pointer to the container's fd, s32
VFIO_GROUP_UNSET_CONTAINER = _io(5)
VFIO_GROUP_GET_DEVICE_FD = _io(6)  # pointer to the device's name, NUL-terminated

# --- device
VFIO_DEVICE_GET_INFO = _io(7)
VFIO_DEVICE_GET_REGION_INFO = _io(8)
VFIO_DEVICE_GET_IRQ_INFO = _io(9)
VFIO_DEVICE_SET_IRQS = _io(10)
VFIO_DEVICE_RESET = _io(11)
VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = _io(12)
VFIO_DEVICE_PCI_HOT_RESET = _io(13)
VFIO_DEVICE_QUERY_GFX_PLANE = _io(14)
VFIO_DEVICE_GET_GFX_DMABUF = _io(15)
VFIO_DEVICE_IOEVENTFD = _io(16)
VFIO_DEVICE_FEATURE = _io(17)

# --- device opened as /dev/vfio/devices/vfioN (6.6)
VFIO_DEVICE_BIND_IOMMUFD = _io(18)
VFIO_DEVICE_ATTACH_IOMMUFD_PT = _io(19)
VFIO_DEVICE_DETACH_IOMMUFD_PT = _io(20)

# --- the data fd of a migration (6.2)
VFIO_MIG_GET_PRECOPY_INFO = _io(21)

# --- container with a type1 IOMMU
VFIO_IOMMU_GET_INFO = _io(12)
VFIO_IOMMU_MAP_DMA = _io(13)
VFIO_IOMMU_UNMAP_DMA = _io(14)
VFIO_IOMMU_ENABLE = _io(15)
VFIO_IOMMU_DISABLE = _io(16)
VFIO_IOMMU_DIRTY_PAGES = _io(17)


# ------------------------------------------------------------------------------------------------ capability chains


class vfio_info_cap_header(ctypes.Structure):
    """The header of each capability; `next` counts from the start of the answer, 0 ends the chain."""

    id: int
    version: int
    next: int
    _fields_ = [*_u16("id", "version"), *_u32("next")]


# ------------------------------------------------------------------------------------------------ container and group


class VfioExtension(enum.IntEnum):
    """The arguments of `VFIO_CHECK_EXTENSION`. `VFIO_SET_IOMMU` takes those that are IOMMU types."""

    VFIO_TYPE1_IOMMU = 1
    VFIO_SPAPR_TCE_IOMMU = 2
    VFIO_TYPE1v2_IOMMU = 3
    VFIO_DMA_CC_IOMMU = 4
    VFIO_EEH = 5
    VFIO_TYPE1_NESTING_IOMMU = 6  # gone since 6.13, whose header only reserves the number
    VFIO_SPAPR_TCE_v2_IOMMU = 7
    VFIO_NOIOMMU_IOMMU = 8
    VFIO_UNMAP_ALL = 9
    VFIO_UPDATE_VADDR = 10


(
    VFIO_TYPE1_IOMMU,
    VFIO_SPAPR_TCE_IOMMU,
    VFIO_TYPE1v2_IOMMU,
    VFIO_DMA_CC_IOMMU,
    VFIO_EEH,
    VFIO_TYPE1_NESTING_IOMMU,
    VFIO_SPAPR_TCE_v2_IOMMU,
    VFIO_NOIOMMU_IOMMU,
    VFIO_UNMAP_ALL,
    VFIO_UPDATE_VADDR,
) = VfioExtension


class VfioGroupFlags(enum.IntFlag):
    """`vfio_group_status.flags`."""

    VFIO_GROUP_FLAGS_VIABLE = 1 << 0
    VFIO_GROUP_FLAGS_CONTAINER_SET = 1 << 1


VFIO_GROUP_FLAGS_VIABLE, VFIO_GROUP_FLAGS_CONTAINER_SET = VfioGroupFlags


class vfio_group_status(ctypes.Structure):
    """`VFIO_GROUP_GET_STATUS`."""

    argsz: int
    flags: int
    _fields_ = _u32("argsz", "flags")


# ------------------------------------------------------------------------------------------------ device: info


class VfioDeviceFlags(enum.IntFlag):
    """`vfio_device_info.flags`."""

    VFIO_DEVICE_FLAGS_RESET = 1 << 0
    VFIO_DEVICE_FLAGS_PCI = 1 << 1
    VFIO_DEVICE_FLAGS_PLATFORM = 1 << 2
    VFIO_DEVICE_FLAGS_AMBA = 1 << 3
    VFIO_DEVICE_FLAGS_CCW = 1 << 4
    VFIO_DEVICE_FLAGS_AP = 1 << 5
    VFIO_DEVICE_FLAGS_FSL_MC = 1 << 6
    VFIO_DEVICE_FLAGS_CAPS = 1 << 7
    VFIO_DEVICE_FLAGS_CDX = 1 << 8  # 6.5


(
    VFIO_DEVICE_FLAGS_RESET,
    VFIO_DEVICE_FLAGS_PCI,
    VFIO_DEVICE_FLAGS_PLATFORM,
    VFIO_DEVICE_FLAGS_AMBA,
    VFIO_DEVICE_FLAGS_CCW,
    VFIO_DEVICE_FLAGS_AP,
    VFIO_DEVICE_FLAGS_FSL_MC,
    VFIO_DEVICE_FLAGS_CAPS,
    VFIO_DEVICE_FLAGS_CDX,
) = VfioDeviceFlags


# The kinds of device in sysfs of a mediated device: `mdev_supported_types/*/device_api`.
VFIO_DEVICE_API_PCI_STRING = "vfio-pci"
VFIO_DEVICE_API_PLATFORM_STRING = "vfio-platform"
VFIO_DEVICE_API_AMBA_STRING = "vfio-amba"
VFIO_DEVICE_API_CCW_STRING = "vfio-ccw"
VFIO_DEVICE_API_AP_STRING = "vfio-ap"


class vfio_device_info(ctypes.Structure):
    """`VFIO_DEVICE_GET_INFO`."""

    argsz: int
    flags: int
    num_regions: int
    num_irqs: int
    cap_offset: int
    pad: int
    _fields_ = [
        *_u32("argsz", "flags", "num_regions", "num_irqs", "cap_offset"),
        *_u32("pad"),  # 6.6; before, the structure was 20 bytes
    ]


VFIO_DEVICE_INFO_MINSZ = 16  # before cap_offset (4.20)


class VfioDeviceInfoCap(enum.IntEnum):
    """The ids in the chain of `VFIO_DEVICE_GET_INFO`."""

    VFIO_DEVICE_INFO_CAP_ZPCI_BASE = 1
    VFIO_DEVICE_INFO_CAP_ZPCI_GROUP = 2
    VFIO_DEVICE_INFO_CAP_ZPCI_UTIL = 3
    VFIO_DEVICE_INFO_CAP_ZPCI_PFIP = 4
    VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP = 5  # 6.5


(
    VFIO_DEVICE_INFO_CAP_ZPCI_BASE,
    VFIO_DEVICE_INFO_CAP_ZPCI_GROUP,
    VFIO_DEVICE_INFO_CAP_ZPCI_UTIL,
    VFIO_DEVICE_INFO_CAP_ZPCI_PFIP,
    VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP,
) = VfioDeviceInfoCap


class VfioPciAtomicCompFlags(enum.IntFlag):
    """The widths of PCIe AtomicOps that the root port completes: `vfio_device_info_cap_pci_atomic_comp.flags`."""

    VFIO_PCI_ATOMIC_COMP32 = 1 << 0
    VFIO_PCI_ATOMIC_COMP64 = 1 << 1
    VFIO_PCI_ATOMIC_COMP128 = 1 << 2


VFIO_PCI_ATOMIC_COMP32, VFIO_PCI_ATOMIC_COMP64, VFIO_PCI_ATOMIC_COMP128 = VfioPciAtomicCompFlags


class vfio_device_info_cap_pci_atomic_comp(ctypes.Structure):
    """Capability `VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP` (6.5)."""

    header: vfio_info_cap_header
    flags: int
    reserved: int
    _fields_ = [("header", vfio_info_cap_header), *_u32("flags", "reserved")]


# ------------------------------------------------------------------------------------------------ device: regions


class VfioPciRegionIndex(enum.IntEnum):
    """The regions of a vfio-pci device. Device-specific regions begin at `VFIO_PCI_NUM_REGIONS`."""

    VFIO_PCI_BAR0_REGION_INDEX = 0
    VFIO_PCI_BAR1_REGION_INDEX = 1
    VFIO_PCI_BAR2_REGION_INDEX = 2
    VFIO_PCI_BAR3_REGION_INDEX = 3
    VFIO_PCI_BAR4_REGION_INDEX = 4
    VFIO_PCI_BAR5_REGION_INDEX = 5
    VFIO_PCI_ROM_REGION_INDEX = 6
    VFIO_PCI_CONFIG_REGION_INDEX = 7
    VFIO_PCI_VGA_REGION_INDEX = 8


(
    VFIO_PCI_BAR0_REGION_INDEX,
    VFIO_PCI_BAR1_REGION_INDEX,
    VFIO_PCI_BAR2_REGION_INDEX,
    VFIO_PCI_BAR3_REGION_INDEX,
    VFIO_PCI_BAR4_REGION_INDEX,
    VFIO_PCI_BAR5_REGION_INDEX,
    VFIO_PCI_ROM_REGION_INDEX,
    VFIO_PCI_CONFIG_REGION_INDEX,
    VFIO_PCI_VGA_REGION_INDEX,
) = VfioPciRegionIndex
VFIO_PCI_NUM_REGIONS = 9


class VfioRegionInfoFlags(enum.IntFlag):
    """`vfio_region_info.flags`."""

    VFIO_REGION_INFO_FLAG_READ = 1 << 0
    VFIO_REGION_INFO_FLAG_WRITE = 1 << 1
    VFIO_REGION_INFO_FLAG_MMAP = 1 << 2
    VFIO_REGION_INFO_FLAG_CAPS = 1 << 3


(
    VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
    VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS,
) = VfioRegionInfoFlags


class vfio_region_info(ctypes.Structure):
    """`VFIO_DEVICE_GET_REGION_INFO`; `size` in bytes, `offset` in the device's descriptor."""

    argsz: int
    flags: int
    index: int
    cap_offset: int
    size: int
    offset: int
    _fields_ = [*_u32("argsz", "flags", "index", "cap_offset"), *_u64("size", "offset")]


class VfioRegionInfoCap(enum.IntEnum):
    """The ids in the chain of `VFIO_DEVICE_GET_REGION_INFO`."""

    VFIO_REGION_INFO_CAP_SPARSE_MMAP = 1
    VFIO_REGION_INFO_CAP_TYPE = 2
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE = 3  # a header and nothing else
    VFIO_REGION_INFO_CAP_NVLINK2_SSATGT = 4  # in no kernel since 5.13
    VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD = 5  # in no kernel since 5.13


(
    VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_CAP_TYPE,
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE,
    VFIO_REGION_INFO_CAP_NVLINK2_SSATGT,
    VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD,
) = VfioRegionInfoCap


class vfio_region_sparse_mmap_area(ctypes.Structure):
    """A part of a region that can be mapped. Both fields are in bytes; `offset` from the start of the region."""

    offset: int
    size: int
    _fields_ = _u64("offset", "size")


class vfio_region_info_cap_sparse_mmap(ctypes.Structure):
    """Capability `VFIO_REGION_INFO_CAP_SPARSE_MMAP`; `nr_areas` of `vfio_region_sparse_mmap_area` follow."""

    header: vfio_info_cap_header
    nr_areas: int
    reserved: int
    _fields_ = [("header", vfio_info_cap_header), *_u32("nr_areas", "reserved")]


class vfio_region_info_cap_type(ctypes.Structure):
    """Capability `VFIO_REGION_INFO_CAP_TYPE`: the type of a region without a fixed index."""

    header: vfio_info_cap_header
    type: int
    subtype: int
    _fields_ = [("header", vfio_info_cap_header), *_u32("type", "subtype")]


class vfio_region_info_cap_nvlink2_ssatgt(ctypes.Structure):
    """Capability `VFIO_REGION_INFO_CAP_NVLINK2_SSATGT`, which no kernel has reported since 5.13."""

    header: vfio_info_cap_header
    tgt: int
    _fields_ = [("header", vfio_info_cap_header), *_u64("tgt")]


class vfio_region_info_cap_nvlink2_lnkspd(ctypes.Structure):
    """Capability `VFIO_REGION_INFO_CAP_NVLINK2_LNKSPD`, which no kernel has reported since 5.13."""

    header: vfio_info_cap_header
    link_speed: int
    _fields_ = [("header", vfio_info_cap_header), *_u32("link_speed", "__pad")]


VFIO_REGION_TYPE_PCI_VENDOR_TYPE = 1 << 31
VFIO_REGION_TYPE_PCI_VENDOR_MASK = 0xFFFF
VFIO_REGION_TYPE_GFX = 1
VFIO_REGION_TYPE_CCW = 2
VFIO_REGION_TYPE_MIGRATION_DEPRECATED = 3
VFIO_REGION_SUBTYPE_INTEL_IGD_OPREGION = 1
VFIO_REGION_SUBTYPE_INTEL_IGD_HOST_CFG = 2
VFIO_REGION_SUBTYPE_INTEL_IGD_LPC_CFG = 3
VFIO_REGION_SUBTYPE_NVIDIA_NVLINK2_RAM = 1
VFIO_REGION_SUBTYPE_IBM_NVLINK2_ATSD = 1
VFIO_REGION_SUBTYPE_GFX_EDID = 1
VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED = 1

VFIO_DEVICE_GFX_LINK_STATE_UP = 1
VFIO_DEVICE_GFX_LINK_STATE_DOWN = 2


class vfio_region_gfx_edid(ctypes.Structure):
    """The start of a region of subtype `VFIO_REGION_SUBTYPE_GFX_EDID`; `edid_offset` in bytes from the start."""

    edid_offset: int
    edid_max_size: int
    edid_size: int
    max_xres: int
    max_yres: int
    link_state: int
    _fields_ = _u32("edid_offset", "edid_max_size", "edid_size", "max_xres", "max_yres", "link_state")


# ------------------------------------------------------------------------------------------------ device: interrupts


class VfioPciIrqIndex(enum.IntEnum):
    """The kinds of interrupts of a vfio-pci device."""

    VFIO_PCI_INTX_IRQ_INDEX = 0
    VFIO_PCI_MSI_IRQ_INDEX = 1
    VFIO_PCI_MSIX_IRQ_INDEX = 2
    VFIO_PCI_ERR_IRQ_INDEX = 3
    VFIO_PCI_REQ_IRQ_INDEX = 4


(
    VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
) = VfioPciIrqIndex
VFIO_PCI_NUM_IRQS = 5


class VfioIrqInfoFlags(enum.IntFlag):
    """`vfio_irq_info.flags`."""

    VFIO_IRQ_INFO_EVENTFD = 1 << 0
    VFIO_IRQ_INFO_MASKABLE = 1 << 1
    VFIO_IRQ_INFO_AUTOMASKED = 1 << 2
    VFIO_IRQ_INFO_NORESIZE = 1 << 3


VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_NORESIZE = VfioIrqInfoFlags


class vfio_irq_info(ctypes.Structure):
    """`VFIO_DEVICE_GET_IRQ_INFO`; `count` is the number of vectors of the index."""

    argsz: int
    flags: int
    index: int
    count: int
    _fields_ = _u32("argsz", "flags", "index", "count")


class VfioIrqSetFlags(enum.IntFlag):
    """`vfio_irq_set.flags`: one DATA flag and one ACTION flag."""

    VFIO_IRQ_SET_DATA_NONE = 1 << 0
    VFIO_IRQ_SET_DATA_BOOL = 1 << 1
    VFIO_IRQ_SET_DATA_EVENTFD = 1 << 2
    VFIO_IRQ_SET_ACTION_MASK = 1 << 3
    VFIO_IRQ_SET_ACTION_UNMASK = 1 << 4
    VFIO_IRQ_SET_ACTION_TRIGGER = 1 << 5


(
    VFIO_IRQ_SET_DATA_NONE,
    VFIO_IRQ_SET_DATA_BOOL,
    VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_ACTION_MASK,
    VFIO_IRQ_SET_ACTION_UNMASK,
    VFIO_IRQ_SET_ACTION_TRIGGER,
) = VfioIrqSetFlags
VFIO_IRQ_SET_DATA_TYPE_MASK = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD
VFIO_IRQ_SET_ACTION_TYPE_MASK = VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_ACTION_TRIGGER


class vfio_irq_set(ctypes.Structure):
    """`VFIO_DEVICE_SET_IRQS`; `count` u8 (DATA_BOOL) or s32 (DATA_EVENTFD) follow, see `irq_set_eventfds`."""

    argsz: int
    flags: int
    index: int
    start: int
    count: int
    _fields_ = _u32("argsz", "flags", "index", "start", "count")


# ------------------------------------------------------------------------------------------------ device: hot reset

VFIO_PCI_DEVID_OWNED = 0  # 6.6
VFIO_PCI_DEVID_NOT_OWNED = 0xFFFFFFFF  # 6.6; the header says -1, the field is unsigned


class _vfio_pci_dependent_device_id(ctypes.Union):
    _fields_ = _u32("group_id", "devid")


class vfio_pci_dependent_device(ctypes.Structure):
    """A device that a hot reset affects; `devid` (6.6) replaces `group_id` if it was opened without a group."""

    group_id: int
    devid: int
    segment: int
    bus: int
    devfn: int
    _anonymous_ = ("_id",)
    _fields_ = [("_id", _vfio_pci_dependent_device_id), *_u16("segment"), *_u8("bus", "devfn")]


class VfioPciHotResetFlags(enum.IntFlag):
    """`vfio_pci_hot_reset_info.flags` (6.6): set only for a device that was opened without a group."""

    VFIO_PCI_HOT_RESET_FLAG_DEV_ID = 1 << 0
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = 1 << 1


VFIO_PCI_HOT_RESET_FLAG_DEV_ID, VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED = VfioPciHotResetFlags


class vfio_pci_hot_reset_info(ctypes.Structure):
    """`VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`; `devices` exists in structures that `pci_hot_reset_info` made."""

    argsz: int
    flags: int
    count: int
    devices: ctypes.Array[vfio_pci_dependent_device]
    _fields_ = _u32("argsz", "flags", "count")


class vfio_pci_hot_reset(ctypes.Structure):
    """`VFIO_DEVICE_PCI_HOT_RESET`; `count` s32 descriptors of groups follow, see `pci_hot_reset`."""

    argsz: int
    flags: int
    count: int
    _fields_ = _u32("argsz", "flags", "count")


# ------------------------------------------------------------------------------------------------ device: display


class VfioGfxPlaneType(enum.IntFlag):
    """`vfio_device_gfx_plane_info.flags`: how the device provides the display."""

    VFIO_GFX_PLANE_TYPE_PROBE = 1 << 0
    VFIO_GFX_PLANE_TYPE_DMABUF = 1 << 1
    VFIO_GFX_PLANE_TYPE_REGION = 1 << 2


VFIO_GFX_PLANE_TYPE_PROBE, VFIO_GFX_PLANE_TYPE_DMABUF, VFIO_GFX_PLANE_TYPE_REGION = VfioGfxPlaneType


class _vfio_device_gfx_plane_id(ctypes.Union):
    _fields_ = _u32("region_index", "dmabuf_id")


class vfio_device_gfx_plane_info(ctypes.Structure):
    """`VFIO_DEVICE_QUERY_GFX_PLANE` of a mediated device; `width`, `height` and positions in pixels, `stride` and
    `size` in bytes."""

    argsz: int
    flags: int
    drm_plane_type: int
    drm_format: int
    drm_format_mod: int
    width: int
    height: int
    stride: int
    size: int
    x_pos: int
    y_pos: int
    x_hot: int
    y_hot: int
    region_index: int
    dmabuf_id: int
    reserved: int
    _anonymous_ = ("_id",)
    _fields_ = [
        *_u32("argsz", "flags", "drm_plane_type", "drm_format"),
        *_u64("drm_format_mod"),
        *_u32("width", "height", "stride", "size", "x_pos", "y_pos", "x_hot", "y_hot"),
        ("_id", _vfio_device_gfx_plane_id),
        *_u32("reserved"),  # 6.6; before, padding of the same size
    ]


# ------------------------------------------------------------------------------------------------ device: ioeventfd


class VfioDeviceIoeventfdFlags(enum.IntFlag):
    """`vfio_device_ioeventfd.flags`: the width of the write in bits."""

    VFIO_DEVICE_IOEVENTFD_8 = 1 << 0
    VFIO_DEVICE_IOEVENTFD_16 = 1 << 1
    VFIO_DEVICE_IOEVENTFD_32 = 1 << 2
    VFIO_DEVICE_IOEVENTFD_64 = 1 << 3


(
    VFIO_DEVICE_IOEVENTFD_8,
    VFIO_DEVICE_IOEVENTFD_16,
    VFIO_DEVICE_IOEVENTFD_32,
    VFIO_DEVICE_IOEVENTFD_64,
) = VfioDeviceIoeventfdFlags
VFIO_DEVICE_IOEVENTFD_SIZE_MASK = 0xF


class vfio_device_ioeventfd(ctypes.Structure):
    """`VFIO_DEVICE_IOEVENTFD`; `offset` in the device's descriptor; `fd` -1 removes the ioeventfd."""

    argsz: int
    flags: int
    offset: int
    data: int
    fd: int
    reserved: int
    _fields_ = [
        *_u32("argsz", "flags"),
        *_u64("offset", "data"),
        *_s32("fd"),
        *_u32("reserved"),  # 6.6; before, padding of the same size
    ]


VFIO_DEVICE_IOEVENTFD_MINSZ = 28  # up to fd, on every kernel


# ------------------------------------------------------------------------------------------------ device: features


class VfioDeviceFeatureFlags(enum.IntFlag):
    """The operation on the feature whose number is in the low bits of `vfio_device_feature.flags`."""

    VFIO_DEVICE_FEATURE_GET = 1 << 16
    VFIO_DEVICE_FEATURE_SET = 1 << 17
    VFIO_DEVICE_FEATURE_PROBE = 1 << 18


VFIO_DEVICE_FEATURE_MASK = 0xFFFF
VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_SET, VFIO_DEVICE_FEATURE_PROBE = VfioDeviceFeatureFlags


class VfioDeviceFeature(enum.IntEnum):
    """The numbers of the features, which determine the structure after `vfio_device_feature`."""

    VFIO_DEVICE_FEATURE_PCI_VF_TOKEN = 0  # 16 bytes of a UUID
    VFIO_DEVICE_FEATURE_MIGRATION = 1
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE = 2
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY = 3  # nothing follows
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP = 4
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT = 5  # nothing follows
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START = 6
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP = 7  # nothing follows
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT = 8
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE = 9  # 6.2
    VFIO_DEVICE_FEATURE_BUS_MASTER = 10  # 6.7; CDX only: PCI has the command register
    VFIO_DEVICE_FEATURE_DMA_BUF = 11  # 6.19
    VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 = 12  # 7.1; nothing follows


(
    VFIO_DEVICE_FEATURE_PCI_VF_TOKEN,
    VFIO_DEVICE_FEATURE_MIGRATION,
    VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
    VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    VFIO_DEVICE_FEATURE_MIG_DATA_SIZE,
    VFIO_DEVICE_FEATURE_BUS_MASTER,
    VFIO_DEVICE_FEATURE_DMA_BUF,
    VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2,
) = VfioDeviceFeature


class vfio_device_feature(ctypes.Structure):
    """`VFIO_DEVICE_FEATURE`; the feature's own structure follows."""

    argsz: int
    flags: int
    _fields_ = _u32("argsz", "flags")


class VfioMigrationFlags(enum.IntFlag):
    """`vfio_device_feature_migration.flags`."""

    VFIO_MIGRATION_STOP_COPY = 1 << 0
    VFIO_MIGRATION_P2P = 1 << 1
    VFIO_MIGRATION_PRE_COPY = 1 << 2  # 6.2


VFIO_MIGRATION_STOP_COPY, VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY = VfioMigrationFlags


class vfio_device_feature_migration(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_MIGRATION`."""

    flags: int
    _fields_ = _u64("flags")


class vfio_device_mig_state(enum.IntEnum):
    """`vfio_device_feature_mig_state.device_state`."""

    VFIO_DEVICE_STATE_ERROR = 0
    VFIO_DEVICE_STATE_STOP = 1
    VFIO_DEVICE_STATE_RUNNING = 2
    VFIO_DEVICE_STATE_STOP_COPY = 3
    VFIO_DEVICE_STATE_RESUMING = 4
    VFIO_DEVICE_STATE_RUNNING_P2P = 5
    VFIO_DEVICE_STATE_PRE_COPY = 6  # 6.2
    VFIO_DEVICE_STATE_PRE_COPY_P2P = 7  # 6.2


(
    VFIO_DEVICE_STATE_ERROR,
    VFIO_DEVICE_STATE_STOP,
    VFIO_DEVICE_STATE_RUNNING,
    VFIO_DEVICE_STATE_STOP_COPY,
    VFIO_DEVICE_STATE_RESUMING,
    VFIO_DEVICE_STATE_RUNNING_P2P,
    VFIO_DEVICE_STATE_PRE_COPY,
    VFIO_DEVICE_STATE_PRE_COPY_P2P,
) = vfio_device_mig_state
VFIO_DEVICE_STATE_NR = len(vfio_device_mig_state)  # 6.8; an enumerator in C, but not a state


class vfio_device_feature_mig_state(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`."""

    device_state: int
    data_fd: int
    _fields_ = [*_u32("device_state"), *_s32("data_fd")]


class vfio_device_feature_mig_data_size(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_MIG_DATA_SIZE` (6.2), in bytes."""

    stop_copy_length: int
    _fields_ = _u64("stop_copy_length")


VFIO_PRECOPY_INFO_REINIT = 1 << 0  # 7.1, and only after VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2


class vfio_precopy_info(ctypes.Structure):
    """`VFIO_MIG_GET_PRECOPY_INFO` (6.2), in bytes."""

    argsz: int
    flags: int
    initial_bytes: int
    dirty_bytes: int
    _fields_ = [*_u32("argsz", "flags"), *_u64("initial_bytes", "dirty_bytes")]


class vfio_device_low_power_entry_with_wakeup(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP`."""

    wakeup_eventfd: int
    reserved: int
    _fields_ = [*_s32("wakeup_eventfd"), *_u32("reserved")]


VFIO_DEVICE_FEATURE_CLEAR_MASTER = 0  # 6.7
VFIO_DEVICE_FEATURE_SET_MASTER = 1  # 6.7


class vfio_device_feature_bus_master(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_BUS_MASTER` (6.7)."""

    op: int
    _fields_ = _u32("op")


class vfio_device_feature_dma_logging_range(ctypes.Structure):
    """An element of the array to which `vfio_device_feature_dma_logging_control.ranges` points."""

    iova: int
    length: int
    _fields_ = _u64("iova", "length")


class vfio_device_feature_dma_logging_control(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`."""

    page_size: int
    num_ranges: int
    ranges: int
    _fields_ = [*_u64("page_size"), *_u32("num_ranges", "__reserved"), *_u64("ranges")]


class vfio_device_feature_dma_logging_report(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`."""

    iova: int
    length: int
    page_size: int
    bitmap: int
    _fields_ = _u64("iova", "length", "page_size", "bitmap")


class vfio_region_dma_range(ctypes.Structure):
    """A slice of a region, in bytes (6.19)."""

    offset: int
    length: int
    _fields_ = _u64("offset", "length")


class vfio_device_feature_dma_buf(ctypes.Structure):
    """Feature `VFIO_DEVICE_FEATURE_DMA_BUF` (6.19); `nr_ranges` of `vfio_region_dma_range` follow, see
    `feature_dma_buf`."""

    region_index: int
    open_flags: int
    flags: int
    nr_ranges: int
    _fields_ = _u32("region_index", "open_flags", "flags", "nr_ranges")


# ------------------------------------------------------------------------------------------------ device: iommufd


VFIO_DEVICE_BIND_FLAG_TOKEN = 1 << 0  # 6.17
VFIO_DEVICE_ATTACH_PASID = 1 << 0  # 6.15
VFIO_DEVICE_DETACH_PASID = 1 << 0  # 6.15


class vfio_device_bind_iommufd(ctypes.Structure):
    """`VFIO_DEVICE_BIND_IOMMUFD` (6.6)."""

    argsz: int
    flags: int
    iommufd: int
    out_devid: int
    token_uuid_ptr: int
    _fields_ = [
        *_u32("argsz", "flags"),
        *_s32("iommufd"),
        *_u32("out_devid"),
        *_u64("token_uuid_ptr"),  # 6.17
    ]


VFIO_DEVICE_BIND_IOMMUFD_MINSZ = 16  # before token_uuid_ptr


class vfio_device_attach_iommufd_pt(ctypes.Structure):
    """`VFIO_DEVICE_ATTACH_IOMMUFD_PT` (6.6)."""

    argsz: int
    flags: int
    pt_id: int
    pasid: int
    _fields_ = [
        *_u32("argsz", "flags", "pt_id"),
        *_u32("pasid"),  # 6.15
    ]


VFIO_DEVICE_ATTACH_IOMMUFD_PT_MINSZ = 12  # before pasid


class vfio_device_detach_iommufd_pt(ctypes.Structure):
    """`VFIO_DEVICE_DETACH_IOMMUFD_PT` (6.6)."""

    argsz: int
    flags: int
    pasid: int
    _fields_ = [
        *_u32("argsz", "flags"),
        *_u32("pasid"),  # 6.15
    ]


VFIO_DEVICE_DETACH_IOMMUFD_PT_MINSZ = 8  # before pasid


# ------------------------------------------------------------------------------------------------ type1: info


class VfioIommuInfoFlags(enum.IntFlag):
    """`vfio_iommu_type1_info.flags`."""

    VFIO_IOMMU_INFO_PGSIZES = 1 << 0
    VFIO_IOMMU_INFO_CAPS = 1 << 1


VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_INFO_CAPS = VfioIommuInfoFlags


class vfio_iommu_type1_info(ctypes.Structure):
    """`VFIO_IOMMU_GET_INFO`; each bit of `iova_pgsizes` is a page size in bytes."""

    argsz: int
    flags: int
    iova_pgsizes: int
    cap_offset: int
    pad: int
    _fields_ = [
        *_u32("argsz", "flags"),
        *_u64("iova_pgsizes"),
        *_u32("cap_offset"),
        *_u32("pad"),  # 6.6; before, padding that the kernel never writes
    ]


VFIO_IOMMU_TYPE1_INFO_MINSZ = 16  # before cap_offset (5.4)


class VfioIommuType1InfoCap(enum.IntEnum):
    """The ids in the chain of `VFIO_IOMMU_GET_INFO`."""

    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3  # the name in the header has no CAP


(
    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE,
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION,
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
) = VfioIommuType1InfoCap


class vfio_iova_range(ctypes.Structure):
    """A range of IOVAs that can be mapped; `end` is inclusive."""

    start: int
    end: int
    _fields_ = _u64("start", "end")


class vfio_iommu_type1_info_cap_iova_range(ctypes.Structure):
    """Capability `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`; `nr_iovas` of `vfio_iova_range` follow."""

    header: vfio_info_cap_header
    nr_iovas: int
    reserved: int
    _fields_ = [("header", vfio_info_cap_header), *_u32("nr_iovas", "reserved")]


class vfio_iommu_type1_info_cap_migration(ctypes.Structure):
    """Capability `VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION`; the largest bitmap in bytes."""

    header: vfio_info_cap_header
    flags: int
    pgsize_bitmap: int
    max_dirty_bitmap_size: int
    _fields_ = [("header", vfio_info_cap_header), *_u32("flags"), *_u64("pgsize_bitmap", "max_dirty_bitmap_size")]


class vfio_iommu_type1_info_dma_avail(ctypes.Structure):
    """Capability `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`: how many more mappings the container accepts."""

    header: vfio_info_cap_header
    avail: int
    _fields_ = [("header", vfio_info_cap_header), *_u32("avail")]


# ------------------------------------------------------------------------------------------------ type1: mappings


class VfioDmaMapFlags(enum.IntFlag):
    """`vfio_iommu_type1_dma_map.flags`: the access of the device."""

    VFIO_DMA_MAP_FLAG_READ = 1 << 0
    VFIO_DMA_MAP_FLAG_WRITE = 1 << 1
    VFIO_DMA_MAP_FLAG_VADDR = 1 << 2


VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_DMA_MAP_FLAG_VADDR = VfioDmaMapFlags


class vfio_iommu_type1_dma_map(ctypes.Structure):
    """`VFIO_IOMMU_MAP_DMA`; `size` in bytes."""

    argsz: int
    flags: int
    vaddr: int
    iova: int
    size: int
    _fields_ = [*_u32("argsz", "flags"), *_u64("vaddr", "iova", "size")]


class VfioDmaUnmapFlags(enum.IntFlag):
    """`vfio_iommu_type1_dma_unmap.flags`."""

    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1 << 0
    VFIO_DMA_UNMAP_FLAG_ALL = 1 << 1
    VFIO_DMA_UNMAP_FLAG_VADDR = 1 << 2


VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, VFIO_DMA_UNMAP_FLAG_ALL, VFIO_DMA_UNMAP_FLAG_VADDR = VfioDmaUnmapFlags


class vfio_bitmap(ctypes.Structure):
    """A bitmap of dirty pages: `size` bytes at `data`, with a bit for each `pgsize` bytes."""

    pgsize: int
    size: int
    data: int | None
    _fields_ = [*_u64("pgsize", "size"), ("data", ctypes.c_void_p)]


class vfio_iommu_type1_dma_unmap(ctypes.Structure):
    """`VFIO_IOMMU_UNMAP_DMA`; the kernel stores the number of unmapped bytes in `size`."""

    argsz: int
    flags: int
    iova: int
    size: int
    _fields_ = [*_u32("argsz", "flags"), *_u64("iova", "size")]


class DmaUnmapWithBitmap(vfio_iommu_type1_dma_unmap):
    """`vfio_iommu_type1_dma_unmap`, with the `data` for `VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP`."""

    bitmap: vfio_bitmap
    _fields_ = [("bitmap", vfio_bitmap)]


# ------------------------------------------------------------------------------------------------ type1: dirty pages


class VfioIommuDirtyPagesFlags(enum.IntFlag):
    """`vfio_iommu_type1_dirty_bitmap.flags`: exactly one flag."""

    VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1 << 0
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 1 << 1
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 1 << 2


(
    VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
) = VfioIommuDirtyPagesFlags


class vfio_iommu_type1_dirty_bitmap(ctypes.Structure):
    """`VFIO_IOMMU_DIRTY_PAGES`."""

    argsz: int
    flags: int
    _fields_ = [*_u32("argsz", "flags")]


class vfio_iommu_type1_dirty_bitmap_get(ctypes.Structure):
    """The `data` for `VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP`; `size` is the size of the IOVA range in bytes."""

    iova: int
    size: int
    bitmap: vfio_bitmap
    _fields_ = [*_u64("iova", "size"), ("bitmap", vfio_bitmap)]


class DirtyBitmapWithRange(vfio_iommu_type1_dirty_bitmap):
    """`vfio_iommu_type1_dirty_bitmap`, with `vfio_iommu_type1_dirty_bitmap_get` in `data`."""

    get: vfio_iommu_type1_dirty_bitmap_get
    _fields_ = [("get", vfio_iommu_type1_dirty_bitmap_get)]


# ------------------------------------------------------------------------------------------------ flexible arrays


@functools.lru_cache(maxsize=64)
def _with_array(
    header: type[_Structure], name: str, element: type[ctypes.Structure] | type[ctypes.c_int32], count: int
) -> type[_Structure]:
    # Each count has a class. Classes are cached, since making one costs more than the ioctl.
    made = type(f"{header.__name__}_{count}", (header,), {"_fields_": [(name, element * count)]})
    return cast("type[_Structure]", made)


def irq_set_eventfds(*, flags: int, index: int, start: int, eventfds: Sequence[int]) -> vfio_irq_set:
    """Return a `vfio_irq_set` with one s32 for each of `eventfds` (-1: none), and with `argsz` and `count`."""
    answer: vfio_irq_set = _with_array(vfio_irq_set, "data", ctypes.c_int32, len(eventfds))(
        flags=flags, index=index, start=start, count=len(eventfds), data=tuple(eventfds)
    )
    answer.argsz = ctypes.sizeof(answer)
    return answer


def feature_dma_buf(
    *, region_index: int, open_flags: int, ranges: Sequence[tuple[int, int]]
) -> vfio_device_feature_dma_buf:
    """Return a `vfio_device_feature_dma_buf` with `dma_ranges`: pairs of an offset in the region and a length, in
    bytes."""
    answer: vfio_device_feature_dma_buf = _with_array(
        vfio_device_feature_dma_buf, "dma_ranges", vfio_region_dma_range, len(ranges)
    )(region_index=region_index, open_flags=open_flags, nr_ranges=len(ranges), dma_ranges=tuple(ranges))
    return answer


def pci_hot_reset(*, group_fds: Sequence[int]) -> vfio_pci_hot_reset:
    """Return a `vfio_pci_hot_reset` with the descriptors of all groups that the reset affects.

    The list is empty for a device that was opened without a group.
    """
    answer: vfio_pci_hot_reset = _with_array(vfio_pci_hot_reset, "group_fds", ctypes.c_int32, len(group_fds))(
        count=len(group_fds), group_fds=tuple(group_fds)
    )
    answer.argsz = ctypes.sizeof(answer)
    return answer


def pci_hot_reset_info(*, count: int) -> vfio_pci_hot_reset_info:
    """Return a `vfio_pci_hot_reset_info` for up to `count` devices.

    If there are more devices, the ioctl fails with ENOSPC and sets `count`.
    """
    answer: vfio_pci_hot_reset_info = _with_array(
        vfio_pci_hot_reset_info, "devices", vfio_pci_dependent_device, count
    )()
    answer.argsz = ctypes.sizeof(answer)
    return answer
