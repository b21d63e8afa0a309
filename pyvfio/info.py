"""Parsers of VFIO's INFO answers: device, region, interrupt and type1 IOMMU, as frozen dataclasses.

An answer is a fixed structure, and a chain of capabilities may follow (see ``vfio_info_cap_header`` in
``<linux/vfio.h>``). The parsers are pure. Each takes a buffer with the whole answer, `argsz` bytes or more, and returns
a dataclass. A malformed answer raises CapabilityError with the reason and the offset. The parsers do not trust the
kernel: no chain makes them loop or read outside the buffer.

Synchronization: none needed. Cost: linear in the length of the answer.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from pyvfio import ioctls
from pyvfio.errors import CapabilityError
from pyvfio.units import Iova, IovaRange

Buffer = bytes | bytearray | memoryview

DEFAULT_DMA_AVAIL = 65535
"""The default of `dma_entry_limit`. Kernels from 5.1 to 5.9 have that limit, but no capability that reports it."""

DEFAULT_IOVA_PGSIZES = 0x1000
"""Assumed when the flag of `iova_pgsizes` is not set: every IOMMU under type1 has pages of 4 KiB."""

_Header = ioctls.vfio_info_cap_header
_HEADER_SIZE = ctypes.sizeof(_Header)
_Struct = TypeVar("_Struct", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class RawCapability:
    """A capability of an answer: `offset` counts from the start of the answer, `data` begins with the header.

    A header has no length: `data` ends at the next header or at the end of the answer, and may include padding.
    """

    id: int
    version: int
    offset: int
    data: bytes

    def __str__(self) -> str:
        return f"capability {self.id} at offset {self.offset}"


@dataclass(frozen=True, slots=True)
class MigrationCapability:
    """Dirty page tracking of a type1 IOMMU: a bitmap of page sizes, and the size in bytes of the largest bitmap."""

    flags: int
    pgsize_bitmap: int
    max_dirty_bitmap_size: int


@dataclass(frozen=True, slots=True)
class IommuInfo:
    """`VFIO_IOMMU_GET_INFO`: `iova_pgsizes` is a bitmap of page sizes in bytes, `dma_avail` counts mappings.

    `iova_ranges` is ascending and without overlap. None: the kernel reports no ranges, as before 5.4, and for a
    container with only mediated devices (``vfio_iommu_iova_build_caps``).
    """

    iova_pgsizes: int
    iova_ranges: tuple[IovaRange, ...] | None
    dma_avail: int
    migration: MigrationCapability | None
    unknown: tuple[RawCapability, ...] = ()


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """`VFIO_DEVICE_GET_REGION_INFO`: `size` in bytes, `offset` in the device's descriptor.

    `sparse` lists the parts that can be mapped, as (offset in the region, size) in bytes. None: the whole region can be
    mapped, if `flags` has VFIO_REGION_INFO_FLAG_MMAP. `type` and `subtype` identify a region without a fixed index.
    """

    index: int
    flags: ioctls.VfioRegionInfoFlags
    size: int
    offset: int
    sparse: tuple[tuple[int, int], ...] | None = None
    type: int | None = None
    subtype: int | None = None
    msix_mappable: bool = False
    unknown: tuple[RawCapability, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """`VFIO_DEVICE_GET_INFO`; `atomic_comp` is None before 6.5, and where AtomicOps are not supported."""

    flags: ioctls.VfioDeviceFlags
    num_regions: int
    num_irqs: int
    atomic_comp: ioctls.VfioPciAtomicCompFlags | None = None
    unknown: tuple[RawCapability, ...] = ()


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """`VFIO_DEVICE_GET_IRQ_INFO`: `count` vectors in `index`."""

    index: int
    flags: ioctls.VfioIrqInfoFlags
    count: int


def walk(buffer: Buffer, first: int, minimum_offset: int) -> Iterator[RawCapability]:
    """Yield the capabilities of the chain that begins at `first` (0: no chain), in the order of the chain.

    `minimum_offset` is the size of the fixed structure, which no capability may overlap. Offsets need not be aligned:
    up to 6.5 the kernel packs capabilities of 12 bytes (``vfio_info_cap_add``).

    Raises CapabilityError if a header lies outside the buffer, in the fixed structure or in another header, or if the
    chain has a loop. The error is raised before the first capability is yielded.
    """
    answer = bytes(buffer)
    headers = _headers(answer, first, minimum_offset)
    ends = dict(itertools.pairwise([*sorted(headers), len(answer)]))
    for offset, header in headers.items():
        if ends[offset] - offset < _HEADER_SIZE:
            raise CapabilityError(
                f"capability {header.id} at offset {offset}: another one begins inside its header, at {ends[offset]}"
            )
    for offset, header in headers.items():
        yield RawCapability(header.id, header.version, offset, answer[offset : ends[offset]])


def parse_iommu_info(buffer: Buffer) -> IommuInfo:
    """Parse the answer to `VFIO_IOMMU_GET_INFO`. Raises CapabilityError."""
    answer, fixed = _fixed(buffer, ioctls.vfio_iommu_type1_info, ioctls.VFIO_IOMMU_TYPE1_INFO_MINSZ)
    has_caps = bool(fixed.flags & ioctls.VFIO_IOMMU_INFO_CAPS)
    known, unknown = _chain(
        answer, fixed.cap_offset if has_caps else 0, ctypes.sizeof(fixed), ioctls.VfioIommuType1InfoCap
    )
    pgsizes = fixed.iova_pgsizes if fixed.flags & ioctls.VFIO_IOMMU_INFO_PGSIZES else DEFAULT_IOVA_PGSIZES
    if pgsizes == 0:
        raise CapabilityError("the IOMMU's bitmap of page sizes is empty")
    avail = known.get(ioctls.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)
    ranges = known.get(ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)
    migration = known.get(ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION)
    return IommuInfo(
        iova_pgsizes=pgsizes,
        iova_ranges=_iova_ranges(ranges) if ranges else None,
        dma_avail=_body(avail, ioctls.vfio_iommu_type1_info_dma_avail).avail if avail else DEFAULT_DMA_AVAIL,
        migration=_migration(migration) if migration else None,
        unknown=unknown,
    )


def parse_region_info(buffer: Buffer) -> RegionInfo:
    """Parse the answer to `VFIO_DEVICE_GET_REGION_INFO`. Raises CapabilityError."""
    size = ctypes.sizeof(ioctls.vfio_region_info)
    answer, fixed = _fixed(buffer, ioctls.vfio_region_info, size)
    # Without the flag, cap_offset has the caller's bytes: the kernel copies the field in and out unchanged.
    has_caps = bool(fixed.flags & ioctls.VFIO_REGION_INFO_FLAG_CAPS)
    known, unknown = _chain(answer, fixed.cap_offset if has_caps else 0, size, ioctls.VfioRegionInfoCap)
    sparse = known.get(ioctls.VFIO_REGION_INFO_CAP_SPARSE_MMAP)
    type_ = known.get(ioctls.VFIO_REGION_INFO_CAP_TYPE)
    what = _body(type_, ioctls.vfio_region_info_cap_type) if type_ else None
    return RegionInfo(
        index=fixed.index,
        flags=ioctls.VfioRegionInfoFlags(fixed.flags),
        size=fixed.size,
        offset=fixed.offset,
        sparse=_sparse(sparse, fixed.size) if sparse else None,
        type=what.type if what else None,
        subtype=what.subtype if what else None,
        msix_mappable=ioctls.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE in known,
        unknown=unknown,
    )


def parse_device_info(buffer: Buffer) -> DeviceInfo:
    """Parse the answer to `VFIO_DEVICE_GET_INFO`. Raises CapabilityError."""
    answer, fixed = _fixed(buffer, ioctls.vfio_device_info, ioctls.VFIO_DEVICE_INFO_MINSZ)
    has_caps = bool(fixed.flags & ioctls.VFIO_DEVICE_FLAGS_CAPS)
    # Before 6.6 the structure had 20 bytes, and the chain begins there.
    known, unknown = _chain(answer, fixed.cap_offset if has_caps else 0, 20, ioctls.VfioDeviceInfoCap)
    atomic = known.pop(ioctls.VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP, None)
    widths = _body(atomic, ioctls.vfio_device_info_cap_pci_atomic_comp).flags if atomic else None
    return DeviceInfo(
        flags=ioctls.VfioDeviceFlags(fixed.flags),
        num_regions=fixed.num_regions,
        num_irqs=fixed.num_irqs,
        atomic_comp=None if widths is None else ioctls.VfioPciAtomicCompFlags(widths),
        unknown=(*known.values(), *unknown),
    )


def parse_irq_info(buffer: Buffer) -> IrqInfo:
    """Parse the answer to `VFIO_DEVICE_GET_IRQ_INFO`, which has no chain. Raises CapabilityError if it is too short."""
    _, fixed = _fixed(buffer, ioctls.vfio_irq_info, ctypes.sizeof(ioctls.vfio_irq_info))
    return IrqInfo(index=fixed.index, flags=ioctls.VfioIrqInfoFlags(fixed.flags), count=fixed.count)


def _headers(answer: bytes, first: int, minimum_offset: int) -> Mapping[int, ioctls.vfio_info_cap_header]:
    """Return the headers of a chain by offset, in the order of the chain.

    Each offset is visited at most once, so the walk ends.
    """
    headers: dict[int, ioctls.vfio_info_cap_header] = {}
    offset, named_by = first, "the answer"
    while offset:
        if offset in headers:
            raise CapabilityError(f"{named_by} names offset {offset} as the next capability, so the chain is a loop")
        if offset < minimum_offset:
            raise CapabilityError(
                f"{named_by} names a capability at offset {offset}, inside the structure of {minimum_offset} bytes"
            )
        if offset + _HEADER_SIZE > len(answer):
            raise CapabilityError(
                f"{named_by} names a capability at offset {offset}, whose header does not fit {len(answer)} bytes"
            )
        header = headers[offset] = _Header.from_buffer_copy(answer, offset)
        named_by = f"capability {header.id} at offset {offset}"
        offset = header.next
    return headers


def _chain(
    answer: bytes, first: int, minimum_offset: int, ids: type[enum.IntEnum]
) -> tuple[dict[int, RawCapability], tuple[RawCapability, ...]]:
    """Return the capabilities whose ids are in `ids`, by id, and the others.

    Raises CapabilityError for an id that occurs twice, and for a version other than 1. A kernel that changed the layout
    under the same id would break every program.
    """
    known: dict[int, RawCapability] = {}
    unknown = []
    for capability in walk(answer, first, minimum_offset):
        if capability.id not in frozenset(ids):
            unknown.append(capability)
            continue
        if capability.id in known:
            raise CapabilityError(f"{capability} repeats the one at offset {known[capability.id].offset}")
        if capability.version != 1:
            raise CapabilityError(f"{capability} has version {capability.version}, and only version 1 is known")
        known[capability.id] = capability
    return known, tuple(unknown)


def _fixed(buffer: Buffer, struct: type[_Struct], minimum: int) -> tuple[bytes, _Struct]:
    """Return the answer, cut to `argsz`, and the fixed structure. Fields that an older kernel lacks are zero."""
    answer = bytes(buffer)
    if len(answer) < minimum:
        raise CapabilityError(f"{struct.__name__} is {len(answer)} bytes long, and the shortest is {minimum}")
    argsz = int.from_bytes(answer[:4], sys.byteorder)
    if argsz > len(answer):
        # The kernel accepts a buffer that is too small and leaves the chain out, as if there were no capabilities.
        raise CapabilityError(f"{struct.__name__} needs {argsz} bytes and the buffer holds {len(answer)}")
    if argsz < minimum:
        raise CapabilityError(f"{struct.__name__} says that it is {argsz} bytes long, and the shortest is {minimum}")
    answer = answer[:argsz]
    return answer, struct.from_buffer_copy(answer.ljust(ctypes.sizeof(struct), b"\0"))


def _body(capability: RawCapability, struct: type[_Struct]) -> _Struct:
    if len(capability.data) < ctypes.sizeof(struct):
        raise CapabilityError(
            f"{capability} has {len(capability.data)} bytes, and {struct.__name__} has {ctypes.sizeof(struct)}"
        )
    return struct.from_buffer_copy(capability.data)


def _pairs(capability: RawCapability, struct: type[ctypes.Structure], count: int) -> list[tuple[int, int]]:
    """Return the `count` pairs of u64 that follow `struct`."""
    start, end = ctypes.sizeof(struct), ctypes.sizeof(struct) + 16 * count
    if end > len(capability.data):
        raise CapabilityError(f"{capability} has {len(capability.data)} bytes, and its {count} entries end at {end}")
    words = memoryview(capability.data[start:end]).cast("Q")
    return list(zip(words[::2], words[1::2], strict=True))


def _iova_ranges(capability: RawCapability) -> tuple[IovaRange, ...]:
    struct = ioctls.vfio_iommu_type1_info_cap_iova_range
    pairs = sorted(_pairs(capability, struct, _body(capability, struct).nr_iovas))
    previous = -1
    for start, last in pairs:
        if last < start:
            raise CapabilityError(f"{capability}: the range from {start:#x} ends before its start, at {last:#x}")
        if start <= previous:
            raise CapabilityError(f"{capability}: the range from {start:#x} overlaps one that ends at {previous:#x}")
        previous = last
    return tuple(IovaRange(Iova(start), Iova(last)) for start, last in pairs)


def _migration(capability: RawCapability) -> MigrationCapability:
    body = _body(capability, ioctls.vfio_iommu_type1_info_cap_migration)
    return MigrationCapability(
        flags=body.flags, pgsize_bitmap=body.pgsize_bitmap, max_dirty_bitmap_size=body.max_dirty_bitmap_size
    )


def _sparse(capability: RawCapability, region_size: int) -> tuple[tuple[int, int], ...]:
    struct = ioctls.vfio_region_info_cap_sparse_mmap
    areas = _pairs(capability, struct, _body(capability, struct).nr_areas)
    for offset, size in areas:
        if offset + size > region_size:
            raise CapabilityError(
                f"{capability}: {size:#x} bytes at {offset:#x} do not lie in a region of {region_size:#x}"
            )
    # Drivers report that no part can be mapped by an area of 0 bytes.
    return tuple((offset, size) for offset, size in areas if size)
