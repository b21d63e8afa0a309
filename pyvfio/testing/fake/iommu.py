"""The properties of an IOMMU: IOVA ranges, page sizes, mapping limit. The predefined models are those of QEMU 7.2."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import PAGE_SIZE, U64_MAX, Iova, IovaRange

_BELOW_MSI = IovaRange(Iova(0), Iova(0xFEDF_FFFF))
_CAPABILITIES = 0xD2_008C_2200_0086  # CAP_REG without the width and the table sizes
_ABOVE_MSI = Iova(0xFEF0_0000)  # 0xfee00000-0xfeefffff is the window for messages (MSI)


@dataclass(frozen=True, slots=True)
class IommuModel:
    """An IOMMU as VFIO reports one.

    `ranges`: ascending and disjoint. `iova_pgsizes`: a bit for each page size in bytes. `dma_entry_limit`: the module
    parameter of vfio_iommu_type1. `write_is_readable`: the page table has no format for "write only" (Intel), so that
    on kernels up to 6.12 devices can read such memory. `nests`: the IOMMU accepts type 6, if the kernel has the type.
    `dma_is_coherent`: the answer to VFIO_DMA_CC_IOMMU. Raises ValueError for impossible ranges or sizes.

    For iommufd: `isolates_msi`: the IOMMU remaps interrupts, so that a device cannot raise those of others.
    `dirty_tracking`: the IOMMU marks the pages that devices write. `hw_type`, `hw_info`: the answer to
    IOMMU_GET_HW_INFO. `allocates_for_users`: the driver makes page tables with flags. `allocates_pasid`: also with
    IOMMU_HWPT_ALLOC_PASID (since 6.13). `needs_rights`: a page that devices can neither read nor write is refused.
    `late_aperture`: a page table that is made before a device is attached has only address 0, and keeps this aperture.
    """

    ranges: tuple[IovaRange, ...]
    iova_pgsizes: int = PAGE_SIZE
    dma_entry_limit: int = 65535
    write_is_readable: bool = False
    nests: bool = False
    dma_is_coherent: bool = False
    isolates_msi: bool = True
    dirty_tracking: bool = False
    hw_type: int = 0
    hw_info: bytes = b""
    allocates_for_users: bool = True
    allocates_pasid: bool = False
    needs_rights: bool = True
    late_aperture: bool = False

    @property
    def iova_alignment(self) -> int:
        """The smallest page in bytes, to which iommufd aligns IOVAs."""
        return self.iova_pgsizes & -self.iova_pgsizes

    def gaps(self) -> list[IovaRange]:
        """Return the reserved ranges between `ranges`, such as the window for messages."""
        return [
            IovaRange(Iova(before.last + 1), Iova(after.start - 1))
            for before, after in pairwise(self.ranges)
            if before.last + 1 < after.start
        ]

    def outside(self, *, attached: bool = True) -> list[IovaRange]:
        """Return the ranges below and above the aperture of a page table. `attached`: made by an attach."""
        if self.late_aperture and not attached:
            return [IovaRange(Iova(1), Iova(U64_MAX))]
        first, last = self.ranges[0].start, self.ranges[-1].last
        below = [IovaRange(Iova(0), Iova(first - 1))] if first else []
        return below + ([IovaRange(Iova(last + 1), Iova(U64_MAX))] if last < U64_MAX else [])

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("an IOMMU has at least one range of addresses")
        for span in self.ranges:
            if span.start % PAGE_SIZE or (span.last + 1) % PAGE_SIZE:
                raise ValueError(f"the IOMMU's range {span} does not begin and end at a page")
        for before, after in pairwise(self.ranges):
            if after.start <= before.last:
                raise ValueError(f"the IOMMU's ranges {before} and {after} overlap or are not in order")
        if not 0 < self.iova_pgsizes <= U64_MAX:
            raise ValueError(f"no page size in iova_pgsizes {self.iova_pgsizes:#x}")
        if self.dma_entry_limit < 0:
            raise ValueError(f"dma_entry_limit {self.dma_entry_limit} is negative")

    @property
    def reported_pgsizes(self) -> int:
        """The page sizes that VFIO reports. Sizes below a CPU page count as one page (`vfio_update_pgsize_bitmap`)."""
        small = self.iova_pgsizes & (PAGE_SIZE - 1)
        return (self.iova_pgsizes - small) | (PAGE_SIZE if small else 0)


def _intel(last: int) -> IommuModel:
    above = IovaRange(_ABOVE_MSI, Iova(last))
    sizes = 2 if last.bit_length() == 39 else 6  # tables of three levels, or also of four
    return IommuModel(
        (_BELOW_MSI, above),
        iova_pgsizes=0x4020_1000,
        write_is_readable=True,
        hw_type=1,
        hw_info=struct.pack("=IIQQ", 1, 0, _CAPABILITIES | last.bit_length() - 1 << 16 | sizes << 8, 0xF00F4A),
        allocates_pasid=True,
    )


def _amd(version: KernelVersion) -> IommuModel:
    # 7.3 knows how many bits the page table has. 6.1 excluded the sizes that the table cannot map, and 6.12 also
    # excluded the upper bits.
    sizes = {(6, 1): 0xFFFF_FF7F_FFFF_F000, (6, 12): 0xF_FF7F_FFFF_F000}.get(version.number, 0x7F7F_FFFF_F000)
    last = U64_MAX if version.number < (7, 0) else 0xFFFF_FFFF_FFFF
    hypertransport = Iova(0x100_0000_0000)  # 0xfd00000000 up to this address belongs to HyperTransport
    return IommuModel(
        (_BELOW_MSI, IovaRange(_ABOVE_MSI, Iova(0xFC_FFFF_FFFF)), IovaRange(hypertransport, Iova(last))),
        iova_pgsizes=sizes,
        dma_is_coherent=True,
        isolates_msi=False,
    )


def iommu_model(name: str, version: KernelVersion) -> IommuModel:
    """Return a predefined IOMMU of `version`: "intel" (39 bits), "intel48", "amd", "virtio" or "none".

    Raises ValueError for any other name.
    """
    match name:
        case "intel":
            return _intel(0x7F_FFFF_FFFF)
        case "intel48":
            return _intel(0xFFFF_FFFF_FFFF)
        case "amd":
            return _amd(version)
        case "virtio":
            return IommuModel(
                (_BELOW_MSI, IovaRange(_ABOVE_MSI, Iova(U64_MAX))),
                iova_pgsizes=0xFFFF_FFFF_FFFF_F000,
                isolates_msi=False,
                allocates_for_users=False,
                needs_rights=False,
                late_aperture=version.number < (7, 0),
            )
        case "none":
            # iommufd keeps what is pinned in a page table that no hardware reads.
            return IommuModel((IovaRange(Iova(0), Iova(U64_MAX)),))
    raise ValueError(f"unknown IOMMU {name!r}: intel, intel48, amd, virtio, none or an IommuModel")
