"""What a DmaMapper sees of an IOMMU: an address space that memory can be mapped into.

`Container` (VFIO type1) is the first implementation. Nothing above this module may know which one it talks to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from pyvfio.kernel import Kernel
from pyvfio.units import Iova, IovaRange, Vaddr


class Mapping(NamedTuple):
    """One kernel mapping: `size` bytes at `vaddr` of this process, reached by the device at `iova`."""

    iova: Iova
    size: int
    vaddr: Vaddr

    @property
    def range(self) -> IovaRange:
        """The IOVAs that it covers."""
        return IovaRange.of(iova=self.iova, size=self.size)

    def __repr__(self) -> str:
        return f"Mapping(iova={self.iova:#x}, size={self.size:#x}, vaddr={self.vaddr:#x})"


class AddressSpace(Protocol):
    """An I/O address space. All sizes and addresses are multiples of `page_size`; every argument is keyword-only.

    Synchronization: implementations serialize calls; any thread may call anything.
    """

    @property
    def kernel(self) -> Kernel:
        """Who makes the system calls."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it has been closed; what it had mapped is unmapped then, or `unmap` says otherwise."""
        ...

    def keep(self, memory: Iterable[object]) -> None:
        """Keep objects until everything has been unmapped: memory that a mapper has left mapped which nobody has any
        more. Takes no lock: a finalizer calls it."""
        ...

    @property
    def lost(self) -> bool:
        """Whether everything that was mapped has gone with the last group, or with `close`. It stays so."""
        ...

    @property
    def page_size(self) -> int:
        """The smallest page of the IOMMU, in bytes."""
        ...

    @property
    def iova_pgsizes(self) -> int:
        """Bitmap of the page sizes that the IOMMU knows."""
        ...

    @property
    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """Where mappings may lie, ascending; a mapping lies wholly within one."""
        ...

    @property
    def dma_bits(self) -> int:
        """How many address bits its devices have: IOVAs that it chooses lie below 2^`dma_bits`."""
        ...

    @property
    def reserved_iova(self) -> tuple[IovaRange, ...]:
        """Of `iova_ranges`, what has been reserved, ascending."""
        ...

    @property
    def entries_left(self) -> int:
        """How many more mappings it takes."""
        ...

    def reserve_iova(
        self, size: int, *, alignment: int, offset: int, top_down: bool = False, dma_bits: int | None = None
    ) -> Iova:
        """As `IovaAllocator.reserve`. `dma_bits` None: those of the space."""
        ...

    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """As `IovaAllocator.reserve_at`."""
        ...

    def release_iova(self, iova: int) -> None:
        """As `IovaAllocator.release`; nothing happens when the space is closed."""
        ...

    def map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        """Let the device read (`read`) and write (`write`) `[vaddr, vaddr + size)` at `iova`.

        All or nothing. Raises IoctlError, or the subclass of it that says what to do.
        """
        ...

    def unmap(self, *, iova: int, size: int) -> None:
        """Take one or several whole mappings away. When it returns, exactly those `size` bytes are out of the device's
        reach; on a closed space, and on one whose last device has left, it does nothing when none of them is left.
        Raises UnmapSizeError or IoctlError."""
        ...

    def reserve_and_map(
        self,
        *,
        vaddr: int,
        size: int,
        iova: int | None,
        alignment: int,
        top_down: bool,
        read: bool,
        write: bool,
        dma_bits: int | None,
    ) -> Iova:
        """Reserve IOVA, `iova` or else what is found for that `alignment` below 2^`dma_bits`, and map; or neither.
        Raises as those."""
        ...

    def unmap_and_release(self, *, iova: int, size: int, vaddr: int) -> None:
        """Unmap that mapping, unless somebody has done so already, and release its IOVA. Raises as `unmap`, and then
        nothing has changed."""
        ...

    def mapping_at(self, iova: int) -> Mapping | None:
        """The mapping that covers `iova`. O(log n)."""
        ...

    def mappings_in(self, *, iova: int, size: int) -> list[Mapping]:
        """The mappings that share an address with `[iova, iova + size)`, ascending. O(log n) and their number."""
        ...
