"""The differences between the kernels that the fake models. No other module of the fake tests a version.

Source: drivers/vfio/ of 6.1, 6.12 and 7.3, and the answers of these kernels in a virtual machine.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelVersion:
    """The properties of a kernel. Sizes are in bytes."""

    name: str
    number: tuple[int, int]
    nesting: bool
    """Extension 6 and the IOMMU type of that number exist (`vfio_iommu_type1_open`)."""
    info_tail: int
    """The end of `vfio_iommu_type1_info` and `vfio_device_info` for the write-back: after cap_offset, or after pad."""
    info_whole_tail: bool
    """The write-back ends before or behind cap_offset, never inside (up to 6.4)."""
    capability_alignment: int
    """The alignment of capability sizes in `vfio_info_cap_add`."""
    not_a_container: int
    """errno of VFIO_GROUP_SET_CONTAINER for a file that is no container."""
    overflow: int
    """errno for `iova + size` beyond 2^64 in map and unmap. In map, EOVERFLOW is also checked earlier."""
    unmaps_end_of_u64: bool
    """An unmap of a range that ends at 2^64 finds the mappings (`vfio_find_dma_first_node` compares inclusive ends)."""
    dynamic_msix: bool
    """MSI-X vectors can be added while other vectors are enabled."""
    err_irq_always: bool
    """VFIO_PCI_ERR_IRQ_INDEX exists on conventional PCI too."""
    write_is_readable: bool
    """A device can read through a mapping with WRITE alone, if the format of the IOMMU allows reads."""
    hot_reset_counts_first: bool
    """VFIO_DEVICE_PCI_HOT_RESET without a group is EINVAL before the bus is checked."""
    dma_buf: bool
    """The feature VFIO_DEVICE_FEATURE_DMA_BUF is known (6.19)."""
    precopy_info_v2: bool
    """The feature VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2 is known."""
    zero_page_is_free: bool
    """Never-written private memory is mapped for reading as the page of zeros, which is not charged (up to 6.1)."""
    refuses_tracked_files: bool
    """A shared writable file on a disk cannot be mapped for writing (since 6.5)."""
    eight_byte_access: bool
    """pread and pwrite on a BAR make 8-byte accesses (`vfio_pci_core_do_io_rw`)."""
    iommufd_last: int
    """The number of the last ioctl of iommufd; 0 on kernels without iommufd and device nodes."""
    bind_structs: bool
    """VFIO_DEVICE_BIND_IOMMUFD takes a token and refuses trailing bytes, and attach and detach take a PASID."""


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
            iommufd_last=0,
            bind_structs=False,
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
            iommufd_last=0x8E,
            bind_structs=False,
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
            iommufd_last=0x95,
            bind_structs=True,
        ),
    )
}


# The kernel lines that scripts/vm boots have these names. 6.1 and 6.12 have the same name there.
_LINES = {"7": "7.3"}


def kernel_version(name: str) -> KernelVersion:
    """Return the kernel of a name, or of a line of scripts/vm. Raises ValueError for an unknown name."""
    found = VERSIONS.get(_LINES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"unknown kernel version {name!r}: the fake can be {', '.join(VERSIONS)}")
    return found
