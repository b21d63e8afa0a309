"""BARs as DMA targets: a region of one device, mapped into the address space of other devices.

The kernel does not remove such a mapping when the BAR goes away. `vfio_iommu_map` maps the page frames of a VM_PFNMAP
area, and vfio-pci does not notify type1 when it revokes them. A device that writes there then writes to the new owner
of the address, or causes a bus error. Therefore the region keeps a close function for each such mapping, and calls the
function first.

Source: `follow_fault_pfn` in drivers/vfio/vfio_iommu_type1.c; `vfio_pci_core_mmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol, SupportsIndex

from pyvfio.errors import UnsupportedError, VfioError
from pyvfio.guard import Guard, close_now, closing, making
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.mapper.buffers import BufferMapper, DmaMapping
from pyvfio.mapper.held import OwnMemory
from pyvfio.mapper.window import READ, WRITE
from pyvfio.units import PAGE_SIZE, Iova, Vaddr, align_up, check_bool, check_whole_number


class MappedRegion(Protocol):
    """A part of a region, mapped into this process."""

    size: int

    @property
    def guard(self) -> Guard:
        """The guard of the mapping."""
        ...

    @property
    def vaddr(self) -> int:
        """The address of the first byte."""
        ...

    def close(self) -> None:
        """Unmap the part from this process."""
        ...


class MappableRegion(Protocol):
    """A region of a device, as `map_region` uses the region: `pyvfio.Region`."""

    dependents: list[Callable[[], object]]

    @property
    def kernel(self) -> Kernel:
        """The kernel of the region's device."""
        ...

    def mmap(self, offset: int = 0, size: int | None = None) -> MappedRegion:
        """Map a part of the region into this process."""
        ...

    def add_dependent(self, close: Callable[[], object]) -> None:
        """Register `close`, to be called before the region goes away."""
        ...


class Dropper(Protocol):
    """The mapper that mapped a region."""

    @property
    def guard(self) -> Guard:
        """The guard of the mapper."""
        ...

    def drop(self, memory: OwnMemory) -> None:
        """Unmap memory, regardless of its holders."""
        ...


class RegionMemory(OwnMemory):
    """A part of a region that a mapper has mapped for other devices.

    The region calls `close`, which takes the mapper's lock and unmaps the part regardless of its holders.
    """

    __slots__ = ("_close", "_mapped", "_mapper", "_region", "ended", "guard")

    def __init__(self, mapper: Dropper, region: MappableRegion, mapped: MappedRegion, *, access: int) -> None:
        size = align_up(mapped.size, PAGE_SIZE)  # a BAR smaller than a page shares the page with no other BAR
        super().__init__(Vaddr(0), Iova(0), size, access)
        self.ended = False
        self.holders = 0  # until the part is mapped
        self.guard = mapper.guard
        self._mapper = mapper
        self._region = region
        self._mapped = mapped
        self._close = partial(close_now, self)
        region.add_dependent(self._close)
        try:
            self.vaddr = Vaddr(mapped.vaddr)  # raises ClosedError if the region was closed before add_dependent()
        except BaseException:
            region.dependents.remove(self._close)
            raise

    @closing
    def close(self) -> None:
        """Unmap the part for other devices, regardless of its holders, and from this process."""
        self._mapper.drop(self)
        if self._close in self._region.dependents:  # without this error, a caller that retries would never end
            raise VfioError(
                f"{self!r} is just being mapped, and cannot be unmapped",
                hint="Close the region after map_region has returned",
            )

    def release(self) -> None:
        """Unmap the part from this process. Other devices can no longer reach the part."""
        self.ended = True
        if self._close in self._region.dependents:
            self._region.dependents.remove(self._close)
            close_now(self._mapped)

    def __repr__(self) -> str:
        return f"<part of {self._region!r} iova={self.iova:#x} size={self.size:#x} holders={self.holders}>"


class RegionMapper(BufferMapper):
    """Maps regions of devices too, so that other devices can reach them."""

    def map_region(
        self,
        region: MappableRegion,
        offset: SupportsIndex = 0,
        size: SupportsIndex | None = None,
        *,
        iova: SupportsIndex | None = None,
        read: bool = True,
        write: bool = True,
    ) -> DmaMapping:
        """Map `[offset, offset + size)` of another device's BAR for the devices of this address space.

        `offset` and `size` are multiples of the page size; default: the whole region. `iova`: an IOVA chosen by the
        caller; None: the mapper chooses. The device of `region` must decode memory, and may be in any container, also
        in this one. Nothing is pinned or charged to RLIMIT_MEMLOCK.

        The mapping ends before the BAR does: when the device stops decoding memory, is reset, enters low power or is
        closed, and when the region or this mapper is closed. If the kernel refuses the unmap, that change raises the
        error and is not made. Closing a mapping that has ended does nothing.

        Raises TypeError. ValueError if the range is misaligned or outside the region, if neither `read` nor `write` is
        set, or if the region belongs to another kernel. UnsupportedError if the region cannot be mapped, and for an
        Ioas, which maps no BAR by address. VfioError if the device does not decode memory. HandOverError while the
        device is being handed over. ClosedError; otherwise as `map_dma`.
        Cost: an mmap, an ioctl and three reads of configuration space.
        Source: `vaddr_get_pfns`, `follow_fault_pfn`.
        """
        if not hasattr(region, "add_dependent"):
            raise TypeError(f"region must be a Region, not {type(region).__name__}")
        check_bool(read, "read")
        check_bool(write, "write")
        access = READ * read | WRITE * write
        if not access:
            raise ValueError("read and write are both False: the device must be allowed to read or write")
        offset = check_whole_number(offset, "offset")
        length = None if size is None else check_whole_number(size, "size")
        wanted = None if iova is None else check_whole_number(iova, "iova")
        if not _same_kernel(region.kernel, self._space.kernel):
            raise ValueError(
                f"{region!r} is on {region.kernel!r} and the address space on {self._space.kernel!r}; give both the "
                "same kernel="
            )
        return self._map_region(region, offset, length, wanted, access)

    @making(DmaMapping.close)
    def _map_region(
        self, region: MappableRegion, offset: int, size: int | None, wanted: int | None, access: int
    ) -> DmaMapping:
        self.check_open()
        self._space.check_maps_bars()
        mapped = region.mmap(offset, size)
        try:
            memory = RegionMemory(self, region, mapped, access=access)
        except BaseException:
            close_now(mapped)
            raise
        try:
            self._check_whole_pages(memory)
            memory.iova = self._map(memory.vaddr, memory.size, wanted, access, None, OwnMemory).iova
        except BaseException:
            self._take_back(memory)
            raise
        self._fixed.add(memory)
        memory.holders = 1
        return DmaMapping(self, memory, memory.vaddr, mapped.size)

    def _check_whole_pages(self, memory: RegionMemory) -> None:
        if (memory.vaddr | memory.size) % self._space.page_size:
            raise UnsupportedError(f"{memory!r} is not whole pages of the IOMMU, {self._space.page_size:#x}")

    def _take_back(self, memory: RegionMemory) -> None:
        """Undo a map that raised. A filter of the log may raise after the kernel has mapped."""
        for mapping in self._space.mappings_in(iova=0, size=1 << 64):
            if mapping.vaddr == memory.vaddr:
                with self._space.guard.lock:
                    self._space.unmap_and_release_locked(mapping.iova, mapping.size, mapping.vaddr)
        memory.release()

    def drop(self, memory: OwnMemory) -> None:
        """Unmap memory, regardless of its holders, whose close then does nothing. For RegionMemory.close."""
        self._unmap(memory)


def _same_kernel(one: Kernel, other: Kernel) -> bool:
    return one is other or (isinstance(one, LinuxKernel) and isinstance(other, LinuxKernel))
