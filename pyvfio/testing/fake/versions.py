"""In which numbers and rules the kernels differ that the fake can be; nothing else in the fake knows a version.

Source: drivers/vfio/ of 6.1, 6.12 and 7.3, and what those kernels answered in a virtual machine.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelVersion:
    """What tells one kernel from another. Sizes are in bytes."""

    name: str
    number: tuple[int, int]
    nesting: bool
    """Extension 6 exists, and so does the IOMMU type (`vfio_iommu_type1_open`)."""
    info_tail: int
    """Where `vfio_iommu_type1_info` and `vfio_device_info` end for the write-back: after cap_offset, or after pad."""
    info_whole_tail: bool
    """The write-back stops at cap_offset or behind it, never inside (up to 6.4)."""
    capability_alignment: int
    """How `vfio_info_cap_add` rounds up each capability's size."""
    not_a_container: int
    """errno of VFIO_GROUP_SET_CONTAINER for a file that is no container."""
    overflow: int
    """errno for `iova + size` beyond 2^64 in map and unmap; EOVERFLOW is also found earlier in map."""
    unmaps_end_of_u64: bool
    """A range that ends at 2^64 finds its mappings (`vfio_find_dma_first_node` compares inclusive ends)."""
    dynamic_msix: bool
    """MSI-X vectors may be added while others are enabled."""
    err_irq_always: bool
    """VFIO_PCI_ERR_IRQ_INDEX exists on conventional PCI too."""
    write_is_readable: bool
    """A mapping with WRITE alone can be read by the device, where the IOMMU's format allows it."""
    hot_reset_counts_first: bool
    """VFIO_DEVICE_PCI_HOT_RESET without a group is EINVAL before it is known whether the bus can be reset."""
    dma_buf: bool
    """The feature VFIO_DEVICE_FEATURE_DMA_BUF is known (6.19)."""
    precopy_info_v2: bool
    """The feature VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 is known."""
    zero_page_is_free: bool
    """Never-written private memory is mapped for reading as the page of zeros, and charged to nobody (up to 6.1)."""
    refuses_tracked_files: bool
    """A shared writable file on a disk cannot be mapped for writing (since 6.5)."""
    eight_byte_access: bool
    """pread and pwrite on a BAR make 8-byte accesses (`vfio_pci_core_do_io_rw`)."""


VERSIONS = {
    version.name: version
    for version in (
        KernelVersion(
            name="6.1",
            number=(6, 1),
            nesting=True,
            info_tail=20,
            info_whole_tail=True,
            capability_alignment=1,
            not_a_container=errno.EINVAL,
            overflow=errno.EINVAL,
            unmaps_end_of_u64=False,
            dynamic_msix=False,
            err_irq_always=False,
            write_is_readable=True,
            hot_reset_counts_first=False,
            dma_buf=False,
            precopy_info_v2=False,
            zero_page_is_free=True,
            refuses_tracked_files=False,
            eight_byte_access=False,
        ),
        KernelVersion(
            name="6.12",
            number=(6, 12),
            nesting=True,
            info_tail=24,
            info_whole_tail=False,
            capability_alignment=8,
            not_a_container=errno.EBADFD,
            overflow=errno.EINVAL,
            unmaps_end_of_u64=False,
            dynamic_msix=True,
            err_irq_always=False,
            write_is_readable=True,
            hot_reset_counts_first=True,
            dma_buf=False,
            precopy_info_v2=False,
            zero_page_is_free=False,
            refuses_tracked_files=True,
            eight_byte_access=True,
        ),
        KernelVersion(
            name="7.3",
            number=(7, 3),
            nesting=False,
            info_tail=24,
            info_whole_tail=False,
            capability_alignment=8,
            not_a_container=errno.EBADFD,
            overflow=errno.EOVERFLOW,
            unmaps_end_of_u64=True,
            dynamic_msix=True,
            err_irq_always=True,
            write_is_readable=False,
            hot_reset_counts_first=True,
            dma_buf=True,
            precopy_info_v2=True,
            zero_page_is_free=False,
            refuses_tracked_files=True,
            eight_byte_access=True,
        ),
    )
}


# The lines that scripts/vm boots have these names; 6.1 and 6.12 are called the same there.
_LINES = {"7": "7.3"}


def kernel_version(name: str) -> KernelVersion:
    """The kernel of that name, or of that line of scripts/vm; ValueError when there is none."""
    found = VERSIONS.get(_LINES.get(name, name))
    if found is None:
        raise ValueError(f"unknown kernel version {name!r}: the fake can be {', '.join(VERSIONS)}")
    return found
