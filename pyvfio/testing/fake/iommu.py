"""What an IOMMU offers: ranges, page sizes, how many mappings. The ready-made ones are those of QEMU 7.2."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import PAGE_SIZE, U64_MAX, Iova, IovaRange

_BELOW_MSI = IovaRange(Iova(0), Iova(0xFEDF_FFFF))
_ABOVE_MSI = Iova(0xFEF0_0000)  # 0xfee00000-0xfeefffff is where interrupts are written to


@dataclass(frozen=True, slots=True)
class IommuModel:
    """An IOMMU as VFIO shows it.

    `ranges` ascend and do not overlap; `iova_pgsizes` has a bit for each page size in bytes; `dma_entry_limit` is the
    module parameter of vfio_iommu_type1. `write_is_readable`: the page table cannot say "write only" (Intel's), so that
    kernels up to 6.12 leave such memory readable. `nests`: the IOMMU takes type 6, where the kernel has it.
    `dma_is_coherent`: the answer to VFIO_DMA_CC_IOMMU. ValueError when the ranges or sizes cannot be.
    """

    ranges: tuple[IovaRange, ...]
    iova_pgsizes: int = PAGE_SIZE
    dma_entry_limit: int = 65535
    write_is_readable: bool = False
    nests: bool = False
    dma_is_coherent: bool = False

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
        """The page sizes as VFIO reports them: those below a CPU page count as one (`vfio_update_pgsize_bitmap`)."""
        small = self.iova_pgsizes & (PAGE_SIZE - 1)
        return (self.iova_pgsizes - small) | (PAGE_SIZE if small else 0)


def _intel(last: int) -> IommuModel:
    above = IovaRange(_ABOVE_MSI, Iova(last))
    return IommuModel((_BELOW_MSI, above), iova_pgsizes=0x4020_1000, write_is_readable=True)


def _amd(version: KernelVersion) -> IommuModel:
    # 7.3 knows how many bits the page table has; 6.1 excluded the sizes it cannot map, 6.12 also the upper bits.
    sizes = {(6, 1): 0xFFFF_FF7F_FFFF_F000, (6, 12): 0xF_FF7F_FFFF_F000}.get(version.number, 0x7F7F_FFFF_F000)
    last = U64_MAX if version.number < (7, 0) else 0xFFFF_FFFF_FFFF
    hypertransport = Iova(0x100_0000_0000)  # 0xfd00000000 up to here is HyperTransport's
    return IommuModel(
        (_BELOW_MSI, IovaRange(_ABOVE_MSI, Iova(0xFC_FFFF_FFFF)), IovaRange(hypertransport, Iova(last))),
        iova_pgsizes=sizes,
        dma_is_coherent=True,
    )


def iommu_model(name: str, version: KernelVersion) -> IommuModel:
    """A ready-made IOMMU as `version` shows it: "intel" (39 bits), "intel48", "amd" or "virtio"; else ValueError."""
    match name:
        case "intel":
            return _intel(0x7F_FFFF_FFFF)
        case "intel48":
            return _intel(0xFFFF_FFFF_FFFF)
        case "amd":
            return _amd(version)
        case "virtio":
            return IommuModel((_BELOW_MSI, IovaRange(_ABOVE_MSI, Iova(U64_MAX))), iova_pgsizes=0xFFFF_FFFF_FFFF_F000)
    raise ValueError(f"unknown IOMMU {name!r}: intel, intel48, amd, virtio or an IommuModel")
