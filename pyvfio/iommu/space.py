"""The I/O address space of an IOMMU, as DmaMapper uses it.

`Container` (VFIO type1) and `Ioas` (iommufd) implement it. No module above this one depends on the implementation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from pyvfio.errors import PinLimitError
from pyvfio.guard import Guard
from pyvfio.kernel import Kernel, Memlock
from pyvfio.units import Iova, IovaRange, Vaddr

CountsBy: TypeAlias = Literal["process", "user"]


class Mapping(NamedTuple):
    """One kernel mapping: `size` bytes at `vaddr` of this process, reached by the device at `iova`."""

    iova: Iova
    size: int
    vaddr: Vaddr

    @property
    def range(self) -> IovaRange:
        """The IOVAs of the mapping."""
        return IovaRange.of(iova=self.iova, size=self.size)

    def __repr__(self) -> str:
        return f"Mapping(iova={self.iova:#x}, size={self.size:#x}, vaddr={self.vaddr:#x})"


class DirtyRecord(Protocol):
    """The pages of an address space that devices may have written since the last look, as the kernel recorded them.

    A kernel reports too many pages at times, never too few: type1 reports all mapped pages of a PCI device each time,
    and a large page of an IOMMU's page table counts as a whole. `dirty_page_size` is the unit of the answers.
    """

    @property
    def dirty_page_size(self) -> int:
        """The size of a page in the answers, in bytes. Raises UnsupportedError if the kernel records nothing."""
        ...

    def start_dirty_tracking(self) -> None:
        """Let the kernel record the writes of devices. Does nothing if the kernel does so already.

        Raises UnsupportedError, before any change, if an IOMMU or the kernel cannot. Raises VfioError without a device.
        Raises IoctlError; nothing is recorded then.
        """
        ...

    def stop_dirty_tracking(self) -> None:
        """End the record. Does nothing if the space is closed. Raises IoctlError; the record then goes on."""
        ...

    def dirty_ranges(self, *, iova: int, size: int, clear: bool = True) -> tuple[IovaRange, ...]:
        """Return the dirty pages of the mappings in `[iova, iova + size)`, ascending, with gaps between the ranges.

        `clear`: the pages are clean from now on, until devices write them again. Raises ValueError if the range cuts a
        mapping. Raises IoctlError; no page is forgotten then.
        """
        ...

    def unmap_dirty(self, *, iova: int, size: int) -> tuple[IovaRange, ...]:
        """Unmap the mappings in `[iova, iova + size)`, and return the pages that were dirty at the last look.

        Raises as `dirty_ranges` and `AddressSpace.unmap`.
        """
        ...

    def keep_dirty(self, ranges: Iterable[IovaRange]) -> None:
        """Report `ranges`, ascending and disjoint, with the next answer too: nobody received the last one."""
        ...


class AddressSpace(DirtyRecord, Protocol):
    """An I/O address space. All sizes and addresses are multiples of `page_size`; every argument is keyword-only.

    Synchronization: implementations serialize calls. Any thread may call any method.
    """

    @property
    def kernel(self) -> Kernel:
        """The kernel that receives the system calls."""
        ...

    @property
    def guard(self) -> Guard:
        """The guard of the address space. A mapper's lock is taken before this guard's lock."""
        ...

    @property
    def closed(self) -> bool:
        """Whether the space has been closed. All mappings are then unmapped, unless `unmap` raises."""
        ...

    def keep(self, memory: Iterable[object]) -> None:
        """Keep objects alive until everything has been unmapped.

        For memory that a mapper left mapped and that nothing else refers to. Takes no lock, because a finalizer calls
        this method.
        """
        ...

    @property
    def lost(self) -> bool:
        """Whether all mappings were removed with the last group or by `close`. Never becomes False again."""
        ...

    @property
    def counts_by(self) -> CountsBy:
        """Whose pinned memory RLIMIT_MEMLOCK limits: of the process, or of all processes of the user together."""
        ...

    def memlock(self) -> Memlock:
        """Return the limit of locked memory. `used` by user: the part of this space, since no file shows the sum."""
        ...

    def pin_shortage(self, size: int) -> PinLimitError | None:
        """Return the error of a map of `size` further bytes, or None if the known numbers leave room."""
        ...

    @property
    def takes_mappings(self) -> bool:
        """Whether a device uses the space. Without one, mappings can be removed, but not added."""
        ...

    def check_takes_mappings(self) -> None:
        """Raise VfioError unless `takes_mappings`. Raises ClosedError."""
        ...

    @property
    def changes(self) -> int:
        """The number of times that mappings were added or removed. A look-up is valid until this number changes."""
        ...

    @property
    def page_size(self) -> int:
        """The smallest page of the IOMMU, in bytes."""
        ...

    @property
    def iova_ranges(self) -> tuple[IovaRange, ...]:
        """The ranges for mappings, ascending. A mapping lies wholly within one range."""
        ...

    @property
    def dma_bits(self) -> int:
        """The number of address bits of the devices. IOVAs chosen by the space lie below 2^`dma_bits`."""
        ...

    @property
    def reserved_iova(self) -> tuple[IovaRange, ...]:
        """The reserved parts of `iova_ranges`, ascending."""
        ...

    @property
    def entries_left(self) -> int | None:
        """The number of further mappings that the kernel accepts; None: no limit."""
        ...

    def reserve_iova(
        self, size: int, *, alignment: int, offset: int, top_down: bool = False, dma_bits: int | None = None
    ) -> Iova:
        """Reserve as `IovaAllocator.reserve` does. `dma_bits` None: the limit of the space."""
        ...

    def reserve_iova_at(self, iova: int, size: int) -> Iova:
        """Reserve as `IovaAllocator.reserve_at` does."""
        ...

    def release_iova(self, iova: int) -> None:
        """Release as `IovaAllocator.release` does. Does nothing if the space is closed."""
        ...

    def map(self, *, vaddr: int, iova: int, size: int, read: bool = True, write: bool = True) -> None:
        """Let the device read (`read`) and write (`write`) `[vaddr, vaddr + size)` at `iova`.

        Maps all of the range or nothing. Raises IoctlError, or a subclass with a hint for the case.
        """
        ...

    def unmap(self, *, iova: int, size: int) -> None:
        """Unmap one or several whole mappings.

        When the call returns, the device cannot reach any of those `size` bytes, and nothing else was unmapped. Does
        nothing if the space is closed or its last device was detached, and none of the mappings is left. Raises
        UnmapSizeError or IoctlError.
        """
        ...

    def reserve_and_map_locked(  # noqa: PLR0917
        self,
        vaddr: int,
        size: int,
        iova: int | None,
        alignment: int,
        top_down: bool,  # noqa: FBT001
        access: int,
        dma_bits: int,
    ) -> Iova:
        """Reserve IOVA and map, or do neither.

        `iova`: the IOVA to use; None: an IOVA found for `alignment` below 2^`dma_bits`. `access`: 1 for reading, 2 for
        writing, 3 for both. Raises as `reserve_iova`, `reserve_iova_at` and `map`.

        For a mapper, inside a guarded call of the mapper and with `guard.lock` held: a second guarded call would
        double the cost. Arguments are positional, all ints.
        """
        ...

    def map_locked(self, vaddr: int, iova: int, size: int, access: int, /) -> None:
        """Map whole pages as `map` does. For a mapper, as `reserve_and_map_locked`."""
        ...

    @property
    def maps_files(self) -> bool:
        """Whether `map_file_locked` works."""
        ...

    def map_file_locked(self, file: tuple[int, int], vaddr: int, iova: int, size: int, access: int) -> None:
        """Map whole pages as `map` does, by the descriptor and the offset `file`, which has the pages of `vaddr`.

        For memfds, and files on tmpfs and hugetlbfs. The mapping does not depend on this process's address space. For a
        mapper, as `reserve_and_map_locked`.
        """
        ...

    def check_maps_bars(self) -> None:
        """Raise UnsupportedError unless a BAR of a device can be mapped by its address in this process."""
        ...

    def unmap_locked(self, iova: int, size: int) -> None:
        """Unmap whole pages as `unmap` does. For a mapper, as `reserve_and_map_locked`."""
        ...

    def unmap_and_release_locked(self, iova: int, size: int, vaddr: int) -> None:
        """Unmap that mapping, if it still exists, and release its IOVA.

        Raises as `unmap`; on an error nothing changes. For a mapper, as `reserve_and_map_locked`.
        """
        ...

    def unmap_neighbours_locked(self, iovas: Sequence[int], vaddrs: Sequence[int], size: int) -> bool:
        """Unmap adjacent mappings in one call, and release their IOVA.

        `iovas`, ascending, and `vaddrs`: the starts of the mappings, which fill `size` bytes without a gap. Returns
        False, and does nothing, if other mappings are found there. Raises as `unmap`. For a mapper, as
        `reserve_and_map_locked`.
        """
        ...

    @property
    def can_cut(self) -> bool:
        """Whether `cut_locked` works."""
        ...

    @property
    def cut_opens_gap(self) -> bool:
        """Whether a device can lose an access to memory that stays, while `cut_locked` runs."""
        ...

    def cut_locked(self, iova: int, size: int) -> None:
        """Unmap `[iova, iova + size)`, and nothing else, of mappings that may begin before and end behind.

        The rest of a mapping stays in reach, throughout if not `cut_opens_gap`. Raises as `unmap`; UnsupportedError if
        not `can_cut`. For a mapper, as `reserve_and_map_locked`.
        """
        ...

    def is_mapped_locked(self, iova: int, size: int, vaddr: int) -> bool:
        """Return whether exactly that mapping exists. `guard.lock` must be held. Cost: O(log n)."""
        ...

    def mapping_at(self, iova: int) -> Mapping | None:
        """Return the mapping that covers `iova`. Cost: O(log n)."""
        ...

    def mappings_in(self, *, iova: int, size: int) -> list[Mapping]:
        """Return the mappings that share an address with `[iova, iova + size)`, ascending. Cost: O(log n + results)."""
        ...
