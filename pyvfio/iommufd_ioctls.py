"""`<linux/iommufd.h>` with C names: the requests, flags and structures of /dev/iommu.

Structures, enumerations, constants and flags have the names of the C header, so that the kernel's documentation applies
to this file. `IommufdCmd` is the only other name: in C, this enumeration has none. This file has the layout of 7.3. A
comment names the first kernel with each part; everything without one is as old as iommufd (6.2).

Each structure of a request begins with `size`, in bytes. A caller passes the whole structure. An older kernel ignores
the fields that it does not have while these are zero; otherwise the call fails with E2BIG. Fields whose names begin
with two underscores must be zero. Pointers are numbers of 64 bits, also in programs of 32 bits.

The structures of /dev/vfio/devices/vfioN (bind, attach, detach) are in `pyvfio.ioctls`, as in the headers.

This module makes no system call. ``tests/unit/test_abi.py`` checks every name, number, size and offset, with the C
compiler and with a table that was not made from this file.
"""

from __future__ import annotations

import ctypes
import enum

from pyvfio.fields import io as _request
from pyvfio.fields import s32 as _s32
from pyvfio.fields import u8 as _u8
from pyvfio.fields import u16 as _u16
from pyvfio.fields import u32 as _u32
from pyvfio.fields import u64 as _u64

IOMMUFD_TYPE = ";"
IOMMUFD_CMD_BASE = 0x80  # an enumerator in C, and the number of IOMMUFD_CMD_DESTROY


class IommufdCmd(enum.IntEnum):
    """The numbers of the requests. The first one is `IOMMUFD_CMD_BASE`."""

    IOMMUFD_CMD_DESTROY = 0x80
    IOMMUFD_CMD_IOAS_ALLOC = 0x81
    IOMMUFD_CMD_IOAS_ALLOW_IOVAS = 0x82
    IOMMUFD_CMD_IOAS_COPY = 0x83
    IOMMUFD_CMD_IOAS_IOVA_RANGES = 0x84
    IOMMUFD_CMD_IOAS_MAP = 0x85
    IOMMUFD_CMD_IOAS_UNMAP = 0x86
    IOMMUFD_CMD_OPTION = 0x87
    IOMMUFD_CMD_VFIO_IOAS = 0x88
    IOMMUFD_CMD_HWPT_ALLOC = 0x89  # 6.6
    IOMMUFD_CMD_GET_HW_INFO = 0x8A  # 6.6
    IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING = 0x8B  # 6.7
    IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP = 0x8C  # 6.7
    IOMMUFD_CMD_HWPT_INVALIDATE = 0x8D  # 6.8
    IOMMUFD_CMD_FAULT_QUEUE_ALLOC = 0x8E  # 6.11
    IOMMUFD_CMD_IOAS_MAP_FILE = 0x8F  # 6.13
    IOMMUFD_CMD_VIOMMU_ALLOC = 0x90  # 6.13
    IOMMUFD_CMD_VDEVICE_ALLOC = 0x91  # 6.13
    IOMMUFD_CMD_IOAS_CHANGE_PROCESS = 0x92  # 6.13
    IOMMUFD_CMD_VEVENTQ_ALLOC = 0x93  # 6.15
    IOMMUFD_CMD_HW_QUEUE_ALLOC = 0x94  # 6.17
    IOMMUFD_CMD_IOAS_NOIOMMU_GET_PA = 0x95  # 7.3


(
    IOMMUFD_CMD_DESTROY,
    IOMMUFD_CMD_IOAS_ALLOC,
    IOMMUFD_CMD_IOAS_ALLOW_IOVAS,
    IOMMUFD_CMD_IOAS_COPY,
    IOMMUFD_CMD_IOAS_IOVA_RANGES,
    IOMMUFD_CMD_IOAS_MAP,
    IOMMUFD_CMD_IOAS_UNMAP,
    IOMMUFD_CMD_OPTION,
    IOMMUFD_CMD_VFIO_IOAS,
    IOMMUFD_CMD_HWPT_ALLOC,
    IOMMUFD_CMD_GET_HW_INFO,
    IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING,
    IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP,
    IOMMUFD_CMD_HWPT_INVALIDATE,
    IOMMUFD_CMD_FAULT_QUEUE_ALLOC,
    IOMMUFD_CMD_IOAS_MAP_FILE,
    IOMMUFD_CMD_VIOMMU_ALLOC,
    IOMMUFD_CMD_VDEVICE_ALLOC,
    IOMMUFD_CMD_IOAS_CHANGE_PROCESS,
    IOMMUFD_CMD_VEVENTQ_ALLOC,
    IOMMUFD_CMD_HW_QUEUE_ALLOC,
    IOMMUFD_CMD_IOAS_NOIOMMU_GET_PA,
) = IommufdCmd


def _io(command: IommufdCmd) -> int:
    return _request(IOMMUFD_TYPE, command)


IOMMU_DESTROY = _io(IOMMUFD_CMD_DESTROY)
IOMMU_IOAS_ALLOC = _io(IOMMUFD_CMD_IOAS_ALLOC)
IOMMU_IOAS_ALLOW_IOVAS = _io(IOMMUFD_CMD_IOAS_ALLOW_IOVAS)
IOMMU_IOAS_COPY = _io(IOMMUFD_CMD_IOAS_COPY)
IOMMU_IOAS_IOVA_RANGES = _io(IOMMUFD_CMD_IOAS_IOVA_RANGES)
IOMMU_IOAS_MAP = _io(IOMMUFD_CMD_IOAS_MAP)
IOMMU_IOAS_UNMAP = _io(IOMMUFD_CMD_IOAS_UNMAP)
IOMMU_OPTION = _io(IOMMUFD_CMD_OPTION)
IOMMU_VFIO_IOAS = _io(IOMMUFD_CMD_VFIO_IOAS)
IOMMU_HWPT_ALLOC = _io(IOMMUFD_CMD_HWPT_ALLOC)
IOMMU_GET_HW_INFO = _io(IOMMUFD_CMD_GET_HW_INFO)
IOMMU_HWPT_SET_DIRTY_TRACKING = _io(IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING)
IOMMU_HWPT_GET_DIRTY_BITMAP = _io(IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP)
IOMMU_HWPT_INVALIDATE = _io(IOMMUFD_CMD_HWPT_INVALIDATE)
IOMMU_FAULT_QUEUE_ALLOC = _io(IOMMUFD_CMD_FAULT_QUEUE_ALLOC)
IOMMU_IOAS_MAP_FILE = _io(IOMMUFD_CMD_IOAS_MAP_FILE)
IOMMU_VIOMMU_ALLOC = _io(IOMMUFD_CMD_VIOMMU_ALLOC)
IOMMU_VDEVICE_ALLOC = _io(IOMMUFD_CMD_VDEVICE_ALLOC)
IOMMU_IOAS_CHANGE_PROCESS = _io(IOMMUFD_CMD_IOAS_CHANGE_PROCESS)
IOMMU_VEVENTQ_ALLOC = _io(IOMMUFD_CMD_VEVENTQ_ALLOC)
IOMMU_HW_QUEUE_ALLOC = _io(IOMMUFD_CMD_HW_QUEUE_ALLOC)
IOMMU_IOAS_NOIOMMU_GET_PA = _io(IOMMUFD_CMD_IOAS_NOIOMMU_GET_PA)


# ------------------------------------------------------------------------------------------------ objects


class iommu_destroy(ctypes.Structure):
    """`IOMMU_DESTROY`: an object of any kind but a device, by its id."""

    size: int
    id: int
    _fields_ = _u32("size", "id")


# ------------------------------------------------------------------------------------------------ I/O address spaces


class iommu_ioas_alloc(ctypes.Structure):
    """`IOMMU_IOAS_ALLOC`."""

    size: int
    flags: int
    out_ioas_id: int
    _fields_ = _u32("size", "flags", "out_ioas_id")


class iommu_iova_range(ctypes.Structure):
    """A range of IOVAs; `last` is inclusive."""

    start: int
    last: int
    _fields_ = _u64("start", "last")


class iommu_ioas_iova_ranges(ctypes.Structure):
    """`IOMMU_IOAS_IOVA_RANGES`. `allowed_iovas` points to `num_iovas` of `iommu_iova_range`.

    The kernel stores the number of all ranges in `num_iovas`, also if the call fails with EMSGSIZE.
    """

    size: int
    ioas_id: int
    num_iovas: int
    allowed_iovas: int
    out_iova_alignment: int
    _fields_ = [*_u32("size", "ioas_id", "num_iovas", "__reserved"), *_u64("allowed_iovas", "out_iova_alignment")]


class iommu_ioas_allow_iovas(ctypes.Structure):
    """`IOMMU_IOAS_ALLOW_IOVAS`. `allowed_iovas` points to `num_iovas` of `iommu_iova_range`."""

    size: int
    ioas_id: int
    num_iovas: int
    allowed_iovas: int
    _fields_ = [*_u32("size", "ioas_id", "num_iovas", "__reserved"), *_u64("allowed_iovas")]


class iommufd_ioas_map_flags(enum.IntFlag):
    """The `flags` of `iommu_ioas_map`, `iommu_ioas_map_file` and `iommu_ioas_copy`."""

    IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0  # without: the kernel chooses the IOVA
    IOMMU_IOAS_MAP_WRITEABLE = 1 << 1
    IOMMU_IOAS_MAP_READABLE = 1 << 2


IOMMU_IOAS_MAP_FIXED_IOVA, IOMMU_IOAS_MAP_WRITEABLE, IOMMU_IOAS_MAP_READABLE = iommufd_ioas_map_flags


class iommu_ioas_map(ctypes.Structure):
    """`IOMMU_IOAS_MAP`; `length` in bytes. The kernel stores the IOVA in `iova`."""

    size: int
    flags: int
    ioas_id: int
    user_va: int
    length: int
    iova: int
    _fields_ = [*_u32("size", "flags", "ioas_id", "__reserved"), *_u64("user_va", "length", "iova")]


class iommu_ioas_noiommu_get_pa(ctypes.Structure):
    """`IOMMU_IOAS_NOIOMMU_GET_PA` (7.3), for devices without an IOMMU.

    `length`: the most bytes to look at; the kernel stores the number of bytes from `out_phys` that are contiguous.
    """

    size: int
    flags: int
    ioas_id: int
    iova: int
    length: int
    out_phys: int
    _fields_ = [*_u32("size", "flags", "ioas_id", "__reserved"), *_u64("iova", "length", "out_phys")]


class iommu_ioas_map_file(ctypes.Structure):
    """`IOMMU_IOAS_MAP_FILE` (6.13); `start`, in the file, and `length` in bytes."""

    size: int
    flags: int
    ioas_id: int
    fd: int
    start: int
    length: int
    iova: int
    _fields_ = [*_u32("size", "flags", "ioas_id"), *_s32("fd"), *_u64("start", "length", "iova")]


class iommu_ioas_copy(ctypes.Structure):
    """`IOMMU_IOAS_COPY`; `length` in bytes. The kernel stores the IOVA in `dst_iova`."""

    size: int
    flags: int
    dst_ioas_id: int
    src_ioas_id: int
    length: int
    dst_iova: int
    src_iova: int
    _fields_ = [*_u32("size", "flags", "dst_ioas_id", "src_ioas_id"), *_u64("length", "dst_iova", "src_iova")]


class iommu_ioas_unmap(ctypes.Structure):
    """`IOMMU_IOAS_UNMAP`; the kernel stores the number of unmapped bytes in `length`.

    `iova` 0 with a `length` of 2^64-1 unmaps everything.
    """

    size: int
    ioas_id: int
    iova: int
    length: int
    _fields_ = [*_u32("size", "ioas_id"), *_u64("iova", "length")]


class iommu_ioas_change_process(ctypes.Structure):
    """`IOMMU_IOAS_CHANGE_PROCESS` (6.13): charge the pinned pages of all spaces to the calling process."""

    size: int
    _fields_ = _u32("size", "__reserved")


# ------------------------------------------------------------------------------------------------ options


class iommufd_option(enum.IntEnum):
    """`iommu_option.option_id`."""

    IOMMU_OPTION_RLIMIT_MODE = 0  # of the whole iommufd: charge pinned pages to the user (0) or to the process (1)
    IOMMU_OPTION_HUGE_PAGES = 1  # of a space: use large pages in the page table (1, the default) or not (0)


IOMMU_OPTION_RLIMIT_MODE, IOMMU_OPTION_HUGE_PAGES = iommufd_option


class iommufd_option_ops(enum.IntEnum):
    """`iommu_option.op`."""

    IOMMU_OPTION_OP_SET = 0
    IOMMU_OPTION_OP_GET = 1


IOMMU_OPTION_OP_SET, IOMMU_OPTION_OP_GET = iommufd_option_ops


class iommu_option(ctypes.Structure):
    """`IOMMU_OPTION`; `object_id` is 0 for an option of the whole iommufd."""

    size: int
    option_id: int
    op: int
    object_id: int
    val64: int
    _fields_ = [*_u32("size", "option_id"), *_u16("op", "__reserved"), *_u32("object_id"), *_u64("val64")]


class iommufd_vfio_ioas_op(enum.IntEnum):
    """`iommu_vfio_ioas.op`."""

    IOMMU_VFIO_IOAS_GET = 0
    IOMMU_VFIO_IOAS_SET = 1
    IOMMU_VFIO_IOAS_CLEAR = 2


IOMMU_VFIO_IOAS_GET, IOMMU_VFIO_IOAS_SET, IOMMU_VFIO_IOAS_CLEAR = iommufd_vfio_ioas_op


class iommu_vfio_ioas(ctypes.Structure):
    """`IOMMU_VFIO_IOAS`: the space that the ioctls of a type1 container use when made on an iommufd."""

    size: int
    ioas_id: int
    op: int
    _fields_ = [*_u32("size", "ioas_id"), *_u16("op", "__reserved")]


# ------------------------------------------------------------------------------------------------ page tables


class iommufd_hwpt_alloc_flags(enum.IntFlag):
    """`iommu_hwpt_alloc.flags`."""

    IOMMU_HWPT_ALLOC_NEST_PARENT = 1 << 0  # 6.7
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING = 1 << 1  # 6.7
    IOMMU_HWPT_FAULT_ID_VALID = 1 << 2  # 6.11
    IOMMU_HWPT_ALLOC_PASID = 1 << 3  # 6.13


(
    IOMMU_HWPT_ALLOC_NEST_PARENT,
    IOMMU_HWPT_ALLOC_DIRTY_TRACKING,
    IOMMU_HWPT_FAULT_ID_VALID,
    IOMMU_HWPT_ALLOC_PASID,
) = iommufd_hwpt_alloc_flags


class iommu_hwpt_vtd_s1_flags(enum.IntFlag):
    """`iommu_hwpt_vtd_s1.flags` (6.7)."""

    IOMMU_VTD_S1_SRE = 1 << 0  # supervisor requests
    IOMMU_VTD_S1_EAFE = 1 << 1  # extended access flags
    IOMMU_VTD_S1_WPE = 1 << 2  # write protection


IOMMU_VTD_S1_SRE, IOMMU_VTD_S1_EAFE, IOMMU_VTD_S1_WPE = iommu_hwpt_vtd_s1_flags


class iommu_hwpt_vtd_s1(ctypes.Structure):
    """The data of a first-stage page table of Intel VT-d (6.7); `addr_width` in bits."""

    flags: int
    pgtbl_addr: int
    addr_width: int
    _fields_ = [*_u64("flags", "pgtbl_addr"), *_u32("addr_width", "__reserved")]


class iommu_hwpt_arm_smmuv3(ctypes.Structure):
    """The data of a nested page table of Arm SMMUv3 (6.13): two words of a stream table entry, little-endian."""

    ste: ctypes.Array[ctypes.c_uint64]
    _fields_ = [("ste", ctypes.c_uint64 * 2)]


class iommu_hwpt_amd_guest(ctypes.Structure):
    """The data of a nested page table of AMD (7.0): the guest's device table entry."""

    dte: ctypes.Array[ctypes.c_uint64]
    _fields_ = [("dte", ctypes.c_uint64 * 4)]


class iommu_hwpt_data_type(enum.IntEnum):
    """`iommu_hwpt_alloc.data_type` (6.7)."""

    IOMMU_HWPT_DATA_NONE = 0
    IOMMU_HWPT_DATA_VTD_S1 = 1
    IOMMU_HWPT_DATA_ARM_SMMUV3 = 2  # 6.13
    IOMMU_HWPT_DATA_AMD_GUEST = 3  # 7.0


(
    IOMMU_HWPT_DATA_NONE,
    IOMMU_HWPT_DATA_VTD_S1,
    IOMMU_HWPT_DATA_ARM_SMMUV3,
    IOMMU_HWPT_DATA_AMD_GUEST,
) = iommu_hwpt_data_type


class iommu_hwpt_alloc(ctypes.Structure):
    """`IOMMU_HWPT_ALLOC` (6.6). `pt_id`: an IOAS, a nesting parent or a virtual IOMMU."""

    size: int
    flags: int
    dev_id: int
    pt_id: int
    out_hwpt_id: int
    data_type: int
    data_len: int
    data_uptr: int
    fault_id: int
    _fields_ = [
        *_u32("size", "flags", "dev_id", "pt_id", "out_hwpt_id", "__reserved"),
        *_u32("data_type", "data_len"),  # 6.7
        *_u64("data_uptr"),  # 6.7
        *_u32("fault_id", "__reserved2"),  # 6.11
    ]


class iommufd_hwpt_set_dirty_tracking_flags(enum.IntFlag):
    """`iommu_hwpt_set_dirty_tracking.flags` (6.7)."""

    IOMMU_HWPT_DIRTY_TRACKING_ENABLE = 1  # without: stop


(IOMMU_HWPT_DIRTY_TRACKING_ENABLE,) = iommufd_hwpt_set_dirty_tracking_flags


class iommu_hwpt_set_dirty_tracking(ctypes.Structure):
    """`IOMMU_HWPT_SET_DIRTY_TRACKING` (6.7)."""

    size: int
    flags: int
    hwpt_id: int
    _fields_ = _u32("size", "flags", "hwpt_id", "__reserved")


class iommufd_hwpt_get_dirty_bitmap_flags(enum.IntFlag):
    """`iommu_hwpt_get_dirty_bitmap.flags` (6.7)."""

    IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR = 1


(IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,) = iommufd_hwpt_get_dirty_bitmap_flags


class iommu_hwpt_get_dirty_bitmap(ctypes.Structure):
    """`IOMMU_HWPT_GET_DIRTY_BITMAP` (6.7). `data` points to a bitmap with a bit for each `page_size` bytes.

    `length` in bytes of IOVA. The kernel sets bits, and leaves the others as they are.
    """

    size: int
    hwpt_id: int
    flags: int
    iova: int
    length: int
    page_size: int
    data: int
    _fields_ = [*_u32("size", "hwpt_id", "flags", "__reserved"), *_u64("iova", "length", "page_size", "data")]


class iommu_hwpt_invalidate_data_type(enum.IntEnum):
    """`iommu_hwpt_invalidate.data_type` (6.8)."""

    IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 = 0
    IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = 1  # 6.13


IOMMU_HWPT_INVALIDATE_DATA_VTD_S1, IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3 = iommu_hwpt_invalidate_data_type


class iommu_hwpt_vtd_s1_invalidate_flags(enum.IntFlag):
    """`iommu_hwpt_vtd_s1_invalidate.flags` (6.8)."""

    IOMMU_VTD_INV_FLAGS_LEAF = 1 << 0


(IOMMU_VTD_INV_FLAGS_LEAF,) = iommu_hwpt_vtd_s1_invalidate_flags


class iommu_hwpt_vtd_s1_invalidate(ctypes.Structure):
    """An entry of `IOMMU_HWPT_INVALIDATE_DATA_VTD_S1` (6.8). `npages` 2^64-1 with `addr` 0: all of the page table."""

    addr: int
    npages: int
    flags: int
    _fields_ = [*_u64("addr", "npages"), *_u32("flags", "__reserved")]


class iommu_viommu_arm_smmuv3_invalidate(ctypes.Structure):
    """An entry of `IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3` (6.13): a command of SMMUv3, little-endian."""

    cmd: ctypes.Array[ctypes.c_uint64]
    _fields_ = [("cmd", ctypes.c_uint64 * 2)]


class iommu_hwpt_invalidate(ctypes.Structure):
    """`IOMMU_HWPT_INVALIDATE` (6.8). `data_uptr` points to `entry_num` entries of `entry_len` bytes.

    The kernel stores the number of handled entries in `entry_num`.
    """

    size: int
    hwpt_id: int
    data_uptr: int
    data_type: int
    entry_len: int
    entry_num: int
    _fields_ = [
        *_u32("size", "hwpt_id"),
        *_u64("data_uptr"),
        *_u32("data_type", "entry_len", "entry_num", "__reserved"),
    ]


# ------------------------------------------------------------------------------------------------ IOMMU of a device


class iommu_hw_info_vtd_flags(enum.IntFlag):
    """`iommu_hw_info_vtd.flags` (6.7)."""

    IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17 = 1 << 0


(IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17,) = iommu_hw_info_vtd_flags


class iommu_hw_info_vtd(ctypes.Structure):
    """The answer of Intel VT-d to `IOMMU_GET_HW_INFO` (6.6): the capability registers."""

    flags: int
    cap_reg: int
    ecap_reg: int
    _fields_ = [*_u32("flags", "__reserved"), *_u64("cap_reg", "ecap_reg")]


class iommu_hw_info_arm_smmuv3_flags(enum.IntFlag):
    """`iommu_hw_info_arm_smmuv3.flags` (7.3)."""

    IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI = 1 << 0


(IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI,) = iommu_hw_info_arm_smmuv3_flags


class iommu_hw_info_arm_smmuv3(ctypes.Structure):
    """The answer of Arm SMMUv3 to `IOMMU_GET_HW_INFO` (6.13): the identification registers."""

    flags: int
    idr: ctypes.Array[ctypes.c_uint32]
    iidr: int
    aidr: int
    _fields_ = [*_u32("flags", "__reserved"), ("idr", ctypes.c_uint32 * 6), *_u32("iidr", "aidr")]


class iommu_hw_info_tegra241_cmdqv(ctypes.Structure):
    """The answer of Tegra241 CMDQV to `IOMMU_GET_HW_INFO` (6.17). Two fields are logarithms to base 2."""

    flags: int
    version: int
    log2vcmdqs: int
    log2vsids: int
    _fields_ = [*_u32("flags"), *_u8("version", "log2vcmdqs", "log2vsids", "__reserved")]


class iommu_hw_info_amd(ctypes.Structure):
    """The answer of AMD's IOMMU to `IOMMU_GET_HW_INFO` (7.0): the extended feature registers."""

    efr: int
    efr2: int
    _fields_ = _u64("efr", "efr2")


class iommu_hw_info_type(enum.IntEnum):
    """The kind of IOMMU: `iommu_hw_info.out_data_type` (6.6) and `in_data_type` (6.17)."""

    IOMMU_HW_INFO_TYPE_NONE = 0
    IOMMU_HW_INFO_TYPE_DEFAULT = IOMMU_HW_INFO_TYPE_NONE  # 6.17
    IOMMU_HW_INFO_TYPE_INTEL_VTD = 1
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3 = 2  # 6.13
    IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV = 3  # 6.17
    IOMMU_HW_INFO_TYPE_AMD = 4  # 7.0


(
    IOMMU_HW_INFO_TYPE_NONE,
    IOMMU_HW_INFO_TYPE_INTEL_VTD,
    IOMMU_HW_INFO_TYPE_ARM_SMMUV3,
    IOMMU_HW_INFO_TYPE_TEGRA241_CMDQV,
    IOMMU_HW_INFO_TYPE_AMD,
) = iommu_hw_info_type
IOMMU_HW_INFO_TYPE_DEFAULT = iommu_hw_info_type.IOMMU_HW_INFO_TYPE_DEFAULT


class iommufd_hw_capabilities(enum.IntFlag):
    """`iommu_hw_info.out_capabilities` (6.7)."""

    IOMMU_HW_CAP_DIRTY_TRACKING = 1 << 0
    IOMMU_HW_CAP_PCI_PASID_EXEC = 1 << 1  # 6.15
    IOMMU_HW_CAP_PCI_PASID_PRIV = 1 << 2  # 6.15
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED = 1 << 3  # 7.2 or before


(
    IOMMU_HW_CAP_DIRTY_TRACKING,
    IOMMU_HW_CAP_PCI_PASID_EXEC,
    IOMMU_HW_CAP_PCI_PASID_PRIV,
    IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED,
) = iommufd_hw_capabilities


class iommufd_hw_info_flags(enum.IntFlag):
    """`iommu_hw_info.flags` (6.17)."""

    IOMMU_HW_INFO_FLAG_INPUT_TYPE = 1 << 0


(IOMMU_HW_INFO_FLAG_INPUT_TYPE,) = iommufd_hw_info_flags


class _iommu_hw_info_data_type(ctypes.Union):
    _fields_ = _u32("in_data_type", "out_data_type")


class iommu_hw_info(ctypes.Structure):
    """`IOMMU_GET_HW_INFO` (6.6). `data_uptr` points to `data_len` bytes, and the structure depends on the data type.

    The kernel stores the length of its structure in `data_len`, and fills a longer buffer with zeros.
    """

    size: int
    flags: int
    dev_id: int
    data_len: int
    data_uptr: int
    in_data_type: int
    out_data_type: int
    out_max_pasid_log2: int
    out_capabilities: int
    _anonymous_ = ("_data_type",)
    _fields_ = [
        *_u32("size", "flags", "dev_id", "data_len"),
        *_u64("data_uptr"),
        ("_data_type", _iommu_hw_info_data_type),  # in_data_type: 6.17
        *_u8("out_max_pasid_log2"),  # 6.15; before, __reserved had 32 bits
        ("__reserved", ctypes.c_uint8 * 3),
        *_u64("out_capabilities"),  # 6.7
    ]


# ------------------------------------------------------------------------------------------------ page faults


class iommu_hwpt_pgfault_flags(enum.IntFlag):
    """`iommu_hwpt_pgfault.flags` (6.11)."""

    IOMMU_PGFAULT_FLAGS_PASID_VALID = 1 << 0
    IOMMU_PGFAULT_FLAGS_LAST_PAGE = 1 << 1


IOMMU_PGFAULT_FLAGS_PASID_VALID, IOMMU_PGFAULT_FLAGS_LAST_PAGE = iommu_hwpt_pgfault_flags


class iommu_hwpt_pgfault_perm(enum.IntFlag):
    """`iommu_hwpt_pgfault.perm` (6.11): the access that the device requests."""

    IOMMU_PGFAULT_PERM_READ = 1 << 0
    IOMMU_PGFAULT_PERM_WRITE = 1 << 1
    IOMMU_PGFAULT_PERM_EXEC = 1 << 2
    IOMMU_PGFAULT_PERM_PRIV = 1 << 3


(
    IOMMU_PGFAULT_PERM_READ,
    IOMMU_PGFAULT_PERM_WRITE,
    IOMMU_PGFAULT_PERM_EXEC,
    IOMMU_PGFAULT_PERM_PRIV,
) = iommu_hwpt_pgfault_perm


class iommu_hwpt_pgfault(ctypes.Structure):
    """A page fault that is read from the descriptor of a fault queue (6.11); `length` in bytes, a hint."""

    flags: int
    dev_id: int
    pasid: int
    grpid: int
    perm: int
    addr: int
    length: int
    cookie: int
    _fields_ = [
        *_u32("flags", "dev_id", "pasid", "grpid", "perm", "__reserved"),
        *_u64("addr"),
        *_u32("length", "cookie"),
    ]


class iommufd_page_response_code(enum.IntEnum):
    """`iommu_hwpt_page_response.code` (6.11)."""

    IOMMUFD_PAGE_RESP_SUCCESS = 0
    IOMMUFD_PAGE_RESP_INVALID = 1


IOMMUFD_PAGE_RESP_SUCCESS, IOMMUFD_PAGE_RESP_INVALID = iommufd_page_response_code


class iommu_hwpt_page_response(ctypes.Structure):
    """The answer to the page fault with this `cookie`, written to the descriptor of the fault queue (6.11)."""

    cookie: int
    code: int
    _fields_ = _u32("cookie", "code")


class iommu_fault_alloc(ctypes.Structure):
    """`IOMMU_FAULT_QUEUE_ALLOC` (6.11)."""

    size: int
    flags: int
    out_fault_id: int
    out_fault_fd: int
    _fields_ = _u32("size", "flags", "out_fault_id", "out_fault_fd")


# ------------------------------------------------------------------------------------------------ virtual IOMMUs


class iommu_viommu_type(enum.IntEnum):
    """`iommu_viommu_alloc.type` (6.13)."""

    IOMMU_VIOMMU_TYPE_DEFAULT = 0
    IOMMU_VIOMMU_TYPE_ARM_SMMUV3 = 1
    IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV = 2  # 6.17


IOMMU_VIOMMU_TYPE_DEFAULT, IOMMU_VIOMMU_TYPE_ARM_SMMUV3, IOMMU_VIOMMU_TYPE_TEGRA241_CMDQV = iommu_viommu_type


class iommu_viommu_tegra241_cmdqv(ctypes.Structure):
    """The data of a virtual IOMMU of Tegra241 CMDQV (6.17): a range of the iommufd that mmap takes, in bytes."""

    out_vintf_mmap_offset: int
    out_vintf_mmap_length: int
    _fields_ = _u64("out_vintf_mmap_offset", "out_vintf_mmap_length")


class iommu_viommu_alloc(ctypes.Structure):
    """`IOMMU_VIOMMU_ALLOC` (6.13). `hwpt_id`: the nesting parent."""

    size: int
    flags: int
    type: int
    dev_id: int
    hwpt_id: int
    out_viommu_id: int
    data_len: int
    data_uptr: int
    _fields_ = [
        *_u32("size", "flags", "type", "dev_id", "hwpt_id", "out_viommu_id"),
        *_u32("data_len", "__reserved"),  # 6.17
        *_u64("data_uptr"),  # 6.17
    ]


class iommu_vdevice_alloc(ctypes.Structure):
    """`IOMMU_VDEVICE_ALLOC` (6.13). `virt_id`: the number of the device in the guest's IOMMU."""

    size: int
    viommu_id: int
    dev_id: int
    out_vdevice_id: int
    virt_id: int
    _fields_ = [*_u32("size", "viommu_id", "dev_id", "out_vdevice_id"), *_u64("virt_id")]


class iommu_veventq_flag(enum.IntFlag):
    """`iommufd_vevent_header.flags` (6.15)."""

    IOMMU_VEVENTQ_FLAG_LOST_EVENTS = 1 << 0


(IOMMU_VEVENTQ_FLAG_LOST_EVENTS,) = iommu_veventq_flag


class iommufd_vevent_header(ctypes.Structure):
    """The header of an event that is read from the descriptor of an event queue (6.15); `sequence` shows losses."""

    flags: int
    sequence: int
    _fields_ = _u32("flags", "sequence")


class iommu_veventq_type(enum.IntEnum):
    """`iommu_veventq_alloc.type` (6.15)."""

    IOMMU_VEVENTQ_TYPE_DEFAULT = 0
    IOMMU_VEVENTQ_TYPE_ARM_SMMUV3 = 1
    IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV = 2  # 6.17


IOMMU_VEVENTQ_TYPE_DEFAULT, IOMMU_VEVENTQ_TYPE_ARM_SMMUV3, IOMMU_VEVENTQ_TYPE_TEGRA241_CMDQV = iommu_veventq_type


class iommu_vevent_arm_smmuv3(ctypes.Structure):
    """An event of Arm SMMUv3 (6.15): a record of the event queue, little-endian."""

    evt: ctypes.Array[ctypes.c_uint64]
    _fields_ = [("evt", ctypes.c_uint64 * 4)]


class iommu_vevent_tegra241_cmdqv(ctypes.Structure):
    """An event of Tegra241 CMDQV (6.17): a map of the queues with errors, little-endian."""

    lvcmdq_err_map: ctypes.Array[ctypes.c_uint64]
    _fields_ = [("lvcmdq_err_map", ctypes.c_uint64 * 2)]


class iommu_veventq_alloc(ctypes.Structure):
    """`IOMMU_VEVENTQ_ALLOC` (6.15). `veventq_depth`: the number of events that the queue keeps."""

    size: int
    flags: int
    viommu_id: int
    type: int
    veventq_depth: int
    out_veventq_id: int
    out_veventq_fd: int
    _fields_ = [
        *_u32("size", "flags", "viommu_id", "type", "veventq_depth", "out_veventq_id", "out_veventq_fd", "__reserved"),
    ]


class iommu_hw_queue_type(enum.IntEnum):
    """`iommu_hw_queue_alloc.type` (6.17)."""

    IOMMU_HW_QUEUE_TYPE_DEFAULT = 0
    IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = 1


IOMMU_HW_QUEUE_TYPE_DEFAULT, IOMMU_HW_QUEUE_TYPE_TEGRA241_CMDQV = iommu_hw_queue_type


class iommu_hw_queue_alloc(ctypes.Structure):
    """`IOMMU_HW_QUEUE_ALLOC` (6.17); `length` in bytes, of the guest memory at `nesting_parent_iova`."""

    size: int
    flags: int
    viommu_id: int
    type: int
    index: int
    out_hw_queue_id: int
    nesting_parent_iova: int
    length: int
    _fields_ = [
        *_u32("size", "flags", "viommu_id", "type", "index", "out_hw_queue_id"),
        *_u64("nesting_parent_iova", "length"),
    ]
