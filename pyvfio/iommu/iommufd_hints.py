"""Hints for each errno of each request of /dev/iommu.

Each table is complete for the errnos that a caller can act upon. Source: drivers/iommu/iommufd.
"""

from __future__ import annotations

import errno

_NO_SPACE = "The iommufd has no I/O address space with this id"
_PINNED = (
    "Pinned memory counts against RLIMIT_MEMLOCK (ulimit -l), by default that of all processes of the user together: "
    "raise the limit, or run with CAP_IPC_LOCK. If the limit suffices, the machine is out of memory"
)
MAP = {
    errno.EADDRINUSE: "The range overlaps IOVA that an attached device reserves, such as the MSI window",
    errno.EEXIST: "The range overlaps a mapping of the space: unmap that mapping, or choose another IOVA",
    errno.EINVAL: "The IOVA is reserved or outside of ioas_iova_ranges(), or an address or the size is not a multiple "
    "of the alignment that ioas_iova_ranges() returns",
    errno.EOVERFLOW: "The range ends above 2^64",
    errno.ENOENT: _NO_SPACE,
    errno.ENOMEM: _PINNED,
    errno.ENOSPC: "No free run of IOVA is long enough: unmap memory, or widen the ranges of ioas_allow_iovas()",
    errno.EOPNOTSUPP: "This kernel does not know one of the flags",
}
IOAS_MAP = {
    **MAP,
    errno.EFAULT: "The memory is not mapped in this process, is not writable (pass write=False), or is a BAR of a "
    "device, which iommufd does not map by address",
}
IOAS_MAP_FILE = {
    **MAP,
    errno.EBADF: "The descriptor of the file is closed",
    errno.EINVAL: "The file is none of memfd, tmpfs, hugetlbfs and a VFIO device's DMA-buf, or the range is not within "
    f"the file. Otherwise: {MAP[errno.EINVAL]}",
    errno.ENOTTY: "This kernel has no IOMMU_IOAS_MAP_FILE (Linux 6.13): map by address, with ioas_map()",
}
IOAS_COPY = {
    **MAP,
    errno.ENOENT: "The source range is not mapped from end to end, or the iommufd has no I/O address space with one of "
    "the ids",
    errno.EPERM: "The source is mapped read-only: pass write=False",
}
IOAS_UNMAP = {
    errno.ENOENT: "Nothing is mapped in the range, the range begins or ends within a mapping, or the iommufd has no "
    "I/O address space with this id. Whole mappings before the one that the range cuts can be unmapped",
    errno.EOVERFLOW: "The range ends above 2^64",
    errno.EBUSY: "A driver in the kernel uses the mapping",
    errno.EDEADLK: "A driver in the kernel uses pages of the range, and does not release the pages",
}
DESTROY = {
    errno.ENOENT: "The iommufd has no object with this id",
    errno.EBUSY: "The object is in use. Close or detach the devices that are attached, and destroy the page tables "
    "of the I/O address space first. A device is closed instead",
}
IOVA_RANGES = {errno.ENOENT: _NO_SPACE}
ALLOW_IOVAS = {
    errno.ENOENT: _NO_SPACE,
    errno.EINVAL: "Ranges must not overlap, and must have more than one byte",
    errno.EADDRINUSE: "A range overlaps IOVA that an attached device reserves: take the ranges of ioas_iova_ranges()",
}
HUGE_PAGES = {
    errno.ENOENT: _NO_SPACE,
    errno.EINVAL: "Large pages cannot be switched off while a device is attached and memory is mapped",
    errno.EADDRINUSE: "A mapping is not aligned to the pages that the IOMMU would then need",
    errno.EOPNOTSUPP: "This kernel does not know the option",
}
RLIMIT_MODE = {
    errno.EPERM: "Only a process with CAP_SYS_RESOURCE may change how pinned memory is counted",
    errno.EBUSY: "The iommufd has objects: change the mode before the first I/O address space is made and before a "
    "device is bound",
    errno.EOPNOTSUPP: "This kernel does not know the option",
}
VFIO_IOAS = {errno.ENOENT: _NO_SPACE, errno.ENODEV: "No I/O address space is set"}
CHANGE_PROCESS = {
    errno.EINVAL: "A mapping is not of a file (ioas_map_file), or the process to which the memory was charged ended "
    "before this call",
    errno.ENOMEM: _PINNED,
    errno.ENOTTY: "This kernel has no IOMMU_IOAS_CHANGE_PROCESS (Linux 6.13)",
}
HWPT_ALLOC = {
    errno.ENOENT: "The iommufd has no device with this id",
    errno.EINVAL: "pt_id is no I/O address space, or the IOMMU of the device cannot have a mapping of the space",
    errno.EADDRINUSE: "A mapping of the space overlaps IOVA that the device reserves",
    errno.EOPNOTSUPP: "The IOMMU of the device, or this kernel, has no page tables with these flags",
    errno.ENOMEM: _PINNED,
    errno.ENOTTY: "This kernel has no IOMMU_HWPT_ALLOC (Linux 6.6)",
}
DIRTY = {
    errno.ENOENT: "The iommufd has no page table with this id. The page table of an attached device is not for this "
    "call: make one with hwpt_alloc()",
    errno.EINVAL: "The range or the page size does not suit the page table, or dirty tracking is not enabled",
    errno.EOPNOTSUPP: "The IOMMU does not track dirty pages, or the page table was not made with "
    "IOMMU_HWPT_ALLOC_DIRTY_TRACKING",
    errno.ENOTTY: "This kernel has no dirty tracking by page tables (Linux 6.7)",
}
HW_INFO = {
    errno.ENOENT: "The iommufd has no device with this id",
    errno.EOPNOTSUPP: "The device has no IOMMU, or the driver of the IOMMU has no description",
    errno.ENOTTY: "This kernel has no IOMMU_GET_HW_INFO (Linux 6.6)",
}
GET_PA = {
    errno.ENOENT: "Nothing is mapped at the IOVA, or the iommufd has no I/O address space with this id",
    errno.EOPNOTSUPP: "This kernel was built without CONFIG_IOMMUFD_NOIOMMU, or no device without an IOMMU is attached",
    errno.ENOTTY: "This kernel has no IOMMU_IOAS_NOIOMMU_GET_PA (Linux 7.3)",
    errno.EPERM: "Only a process with CAP_SYS_RAWIO may know physical addresses",
}
