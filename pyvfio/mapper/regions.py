"""BARs as DMA targets: a region of one device, mapped into the address space of others.

The kernel does not look after such a mapping: it stays when the BAR goes (`vfio_iommu_map` maps the page frames that a
VM_PFNMAP area has, and nothing tells type1 that vfio-pci revokes them). A device that writes there then writes to
whatever has the address, or raises a bus error. So the region keeps the close of each such mapping, and calls it first.

Source: `follow_fault_pfn` in drivers/vfio/vfio_iommu_type1.c; `vfio_pci_core_mmap`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from typing import Protocol, SupportsIndex

from pyvfio.errors import UnsupportedError, VfioError
from pyvfio.guard import Guard, close_now, closing, making
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.mapper.buffers import BufferMapper, DmaMapping, OwnMemory
from pyvfio.mapper.window import READ, WRITE
from pyvfio.units import PAGE_SIZE, Iova, Vaddr, align_up, check_bool, check_whole_number


class MappedRegion(Protocol):
    """A part of a region that is mapped into this process."""

    size: int

    @property
    def guard(self) -> Guard:
        """Its guard."""
        ...

    @property
    def vaddr(self) -> int:
        """The address of its first byte."""
        ...

    def close(self) -> None:
        """Unmap it from this process."""
        ...


class MappableRegion(Protocol):
    """A region of a device, as far as `map_region` needs it: `pyvfio.Region`."""

    dependents: list[Callable[[], object]]

    @property
    def kernel(self) -> Kernel:
        """Its device's."""
        ...

    def mmap(self, offset: int = 0, size: int | None = None) -> MappedRegion:
        """Map a part of it into this process."""
        ...

    def add_dependent(self, close: Callable[[], object]) -> None:
        """Have `close` called before the region goes."""
        ...


class Dropper(Protocol):
    """The mapper that has mapped a region."""

    @property
    def guard(self) -> Guard:
        """Its guard."""
        ...

    def drop(self, memory: OwnMemory) -> None:
        """Unmap memory, whoever holds it."""
        ...


class RegionMemory(OwnMemory):
    """A part of a region that a mapper has mapped for other devices.

    `close` is for the region: it unmaps the part whoever holds it, and takes the mapper's lock.
    """

    __slots__ = ("_close", "_mapped", "_mapper", "_region", "guard")

    def __init__(self, mapper: Dropper, region: MappableRegion, mapped: MappedRegion, *, access: int) -> None:
        size = align_up(mapped.size, PAGE_SIZE)  # a BAR smaller than a page has that page for itself
        super().__init__(vaddr=Vaddr(0), iova=Iova(0), size=size, access=access, view=None)
        self.guard = mapper.guard
        self._mapper = mapper
        self._region = region
        self._mapped = mapped
        self._close = partial(close_now, self)
        region.add_dependent(self._close)
        try:
            self.vaddr = Vaddr(mapped.vaddr)  # ClosedError where the region was closed before that
        except BaseException:
            region.dependents.remove(self._close)
            raise

    @closing
    def close(self) -> None:
        """Unmap it for the other devices, whoever holds it, and from this process."""
        self._mapper.drop(self)
        if self._close in self._region.dependents:  # a caller that waits for its end would try for ever
            raise VfioError(
                f"{self!r} is just being mapped, and cannot be unmapped",
                hint="Close the region when map_region has ended",
            )

    def release(self) -> None:
        """Unmap it from this process: other devices reach it no more."""
        self.ended = True
        if self._close in self._region.dependents:
            self._region.dependents.remove(self._close)
            close_now(self._mapped)

    def __repr__(self) -> str:
        return f"<part of {self._region!r} iova={self.iova:#x} size={self.size:#x} holders={self.holders}>"


class RegionMapper(BufferMapper):
    """Maps regions of devices, too, so that other devices reach them."""

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
        """Let the devices of this address space reach `[offset, offset + size)` of another device's BAR.

        Both are multiples of the page size; default: all of the region. `iova`: the caller's own choice, else one is
        found. The device of `region` decodes memory, and may be in any container, or in the same. Nothing is pinned,
        and RLIMIT_MEMLOCK does not count it.

        The mapping ends before the BAR does: when the device stops to decode memory, is reset or enters low power, and
        when the device, the region or this mapper is closed. Where it cannot be unmapped, that change raises the error
        and is not made. Closing a mapping that has ended does nothing.

        Raises TypeError; ValueError (misaligned, outside, no access, another kernel's device); UnsupportedError where
        the region cannot be mapped; VfioError where the device does not decode memory; HandOverError while its device
        is handed over; ClosedError; otherwise as `map_dma`.
        Cost: an mmap, an ioctl and three reads of configuration space.
        Source: `vaddr_get_pfns`, `follow_fault_pfn`.
        """
        if not hasattr(region, "add_dependent"):
            raise TypeError(f"region must be a Region, not {type(region).__name__}")
        check_bool(read, "read")
        check_bool(write, "write")
        access = READ * read | WRITE * write
        if not access:
            raise ValueError("the device must be let read or write")
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
        mapped = region.mmap(offset, size)
        try:
            memory = RegionMemory(self, region, mapped, access=access)
        except BaseException:
            close_now(mapped)
            raise
        try:
            self._check_whole_pages(memory)
            memory.iova = self._map(memory.vaddr, memory.size, wanted, access, None).iova
        except BaseException:
            self._take_back(memory)
            raise
        self._fixed.insert(bisect_right(self._fixed, memory.vaddr, key=lambda each: each.vaddr), memory)
        return DmaMapping(self, memory, vaddr=memory.vaddr, size=mapped.size, view=None)

    def _check_whole_pages(self, memory: RegionMemory) -> None:
        if (memory.vaddr | memory.size) % self._space.page_size:
            raise UnsupportedError(f"{memory!r} is not whole pages of the IOMMU, {self._space.page_size:#x}")

    def _take_back(self, memory: RegionMemory) -> None:
        """Undo a map that has raised, which a filter of the log does when the kernel has mapped already."""
        for mapping in self._space.mappings_in(iova=0, size=1 << 64):
            if mapping.vaddr == memory.vaddr:
                self._space.unmap_and_release(iova=mapping.iova, size=mapping.size, vaddr=mapping.vaddr)
        memory.release()

    def drop(self, memory: OwnMemory) -> None:
        """Unmap memory, whoever holds it; a holder's close does nothing then. For RegionMemory.close."""
        self._unmap(memory)


def _same_kernel(one: Kernel, other: Kernel) -> bool:
    return one is other or (isinstance(one, LinuxKernel) and isinstance(other, LinuxKernel))
