"""What one process tells another of memory that it hands over: plain facts, as JSON, which are checked when they come.

Nothing here makes a system call. Descriptors travel beside it, in the order of `State.identities`: the container's,
those of the groups, of the devices, of the blocks and of the interrupts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal, cast

from pyvfio import ioctls
from pyvfio.extents import Extent, clip, runs, total, without
from pyvfio.iommu.iova import check_dma_bits
from pyvfio.mapper.policy import Policy
from pyvfio.memory import File, Memfd, MemoryKind, MemorySettings
from pyvfio.memory.prefault import check_threads
from pyvfio.units import PAGE_SIZE, U64_MAX, is_aligned

FORMAT, VERSION = "pyvfio live update", 2
_INTX = int(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
_KINDS = int(ioctls.VFIO_PCI_NUM_IRQS)
_MOST_VECTORS = 2048  # PCI 3.0, 6.8.2: the size of an MSI-X table
_UNKNOWN = 0  # for the identity of an eventfd; others are the kernel's number of it and 1
_ELSEWHERE = 0  # a descriptor's number is each process's own


@dataclass(frozen=True, slots=True)
class HandedDevice:
    """A device, and the number of its group."""

    bdf: str
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedBlock:
    """A RAM block that devices reach at `iova`: what it is made of, and which mappings it has, the `pieces`, under its
    `policy`; all extents in bytes of the block, ascending."""

    idstr: str
    used_length: int
    max_length: int
    iova: int
    memory: MemoryKind
    readonly: bool
    prealloc: int
    settings: MemorySettings
    discarded: tuple[Extent, ...]
    pieces: tuple[Extent, ...]
    policy: Policy

    def __post_init__(self) -> None:
        """ValueError for what no block is."""
        populated = without([Extent(0, self.used_length)], *self.discarded)
        if not (
            0 <= self.used_length <= self.max_length
            and self.max_length > 0
            and 0 <= self.iova <= U64_MAX - self.max_length + 1
            and is_aligned(self.used_length | self.max_length | self.iova, PAGE_SIZE)
            and list(self.discarded) == runs(clip(self.discarded, 0, self.used_length))
            and runs(self.pieces) == populated
            and all(one.end <= other.start for one, other in zip(self.pieces, self.pieces[1:], strict=False))
        ):
            raise ValueError(f"the lengths and parts of RAM block '{self.idstr}' do not go together")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedIrq:
    """A kind of interrupt that is enabled, of the device at `bdf`: `vectors` of its `count` signal an eventfd each,
    ascending; `unmasked`: one more unmasks INTx. `eventfds` has the identity of each of them, in that order."""

    bdf: str
    index: int
    count: int
    vectors: tuple[int, ...]
    unmasked: bool
    eventfds: tuple[int | None, ...]

    def __post_init__(self) -> None:
        """ValueError for what no interrupt is."""
        if not (
            0 < self.count <= _MOST_VECTORS
            and self.index < _KINDS
            and list(self.vectors) == sorted(set(self.vectors))
            and all(0 <= vector < self.count for vector in self.vectors)
            and len(self.eventfds) == len(self.vectors) + self.unmasked
            and (self.index == _INTX or not self.unmasked)
        ):
            raise ValueError(f"the vectors of interrupt {self.index} of {self.bdf} do not go together")

    @property
    def names(self) -> tuple[str, ...]:
        """What each eventfd is, in words."""
        kind = ioctls.VfioPciIrqIndex(self.index).name
        unmask = (f"the eventfd that unmasks {kind} of {self.bdf}",) if self.unmasked else ()
        return (*(f"the eventfd of vector {vector} of {kind} of {self.bdf}" for vector in self.vectors), *unmask)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All of it; `identities` (st_dev, st_ino) tell whether a descriptor is the one that was meant. `container_bits`
    and `mapper_bits`: the `dma_bits` of both."""

    iommu_type: ioctls.VfioExtension
    groups: tuple[int, ...]
    devices: tuple[HandedDevice, ...]
    policy: Policy
    prefault: int
    container_bits: int
    mapper_bits: int
    blocks: tuple[HandedBlock, ...]
    irqs: tuple[HandedIrq, ...]
    identities: tuple[tuple[int, int], ...]

    def block_fds(self, fds: Sequence[int]) -> Sequence[int]:
        """Those of the blocks' memory, of all descriptors."""
        first = 1 + len(self.groups) + len(self.devices)
        return fds[first : first + len(self.blocks)]

    def irq_fds(self, fds: Sequence[int]) -> Iterator[tuple[HandedIrq, Sequence[int]]]:
        """Those of each interrupt, of all descriptors."""
        first = 1 + len(self.groups) + len(self.devices) + len(self.blocks)
        for irq in self.irqs:
            yield irq, fds[first : first + len(irq.eventfds)]
            first += len(irq.eventfds)

    @property
    def mapped(self) -> int:
        """How many bytes devices reach."""
        return sum(total(block.pieces) for block in self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """What each descriptor is, in words."""
        return (
            "the VFIO container",
            *(f"IOMMU group {number}" for number in self.groups),
            *(f"device {device.bdf}" for device in self.devices),
            *(f"the memory of RAM block '{block.idstr}'" for block in self.blocks),
            *(name for irq in self.irqs for name in irq.names),
        )

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "iommu_type": int(self.iommu_type),
                "groups": self.groups,
                "devices": [{"bdf": device.bdf, "group": device.group} for device in self.devices],
                "policy": _dump_policy(self.policy),
                "prefault": self.prefault,
                "container_bits": self.container_bits,
                "mapper_bits": self.mapper_bits,
                "blocks": [_dump_block(block) for block in self.blocks],
                "irqs": [_dump_irq(irq) for irq in self.irqs],
                "identities": self.identities,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def load(cls, data: bytes) -> State:
        """What `dump` has written. ValueError, with what is wrong."""
        try:
            top = _Fields(json.loads(data), "the state")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"these {len(data)} bytes are not the state of a HandOver, or not all of it: {error}"
            ) from error
        if top.find("format") != FORMAT:
            raise ValueError("this is not the state of a HandOver, but something else in JSON")
        if top.find("version") != VERSION:
            raise ValueError(
                f"the state is of version {top.find('version')}, and this pyvfio knows version {VERSION}: let both "
                "processes run pyvfio of one release"
            )
        return cls._of(top)

    @classmethod
    def _of(cls, top: _Fields) -> State:
        number = top.number("iommu_type")
        if number not in (ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU):
            raise ValueError(f"the state has an IOMMU of type {number}, which is none of type1")
        state = cls(
            iommu_type=ioctls.VfioExtension(number),
            groups=tuple(top.numbers("groups")),
            devices=tuple(HandedDevice(row.text("bdf"), row.number("group")) for row in top.rows("devices")),
            policy=_load_policy(top.inside("policy")),
            prefault=check_threads(top.number("prefault"), "prefault"),
            container_bits=check_dma_bits(top.number("container_bits")),
            mapper_bits=check_dma_bits(top.number("mapper_bits")),
            blocks=tuple(_load_block(row) for row in top.rows("blocks")),
            irqs=tuple(_load_irq(row) for row in top.rows("irqs")),
            identities=tuple(top.pairs("identities")),
        )
        if not {device.group for device in state.devices} <= set(state.groups):
            raise ValueError("the state has a device of a group that it has not")
        if not {irq.bdf for irq in state.irqs} <= {device.bdf for device in state.devices}:
            raise ValueError("the state has an interrupt of a device that it has not")
        if len({(irq.bdf, irq.index) for irq in state.irqs}) < len(state.irqs):
            raise ValueError("the state has one interrupt of a device twice")
        if len({block.idstr for block in state.blocks}) < len(state.blocks):
            raise ValueError("the state has two RAM blocks of one name")
        placed = sorted((block.iova, block.iova + block.max_length) for block in state.blocks)
        if any(end > start for (_start, end), (start, _end) in pairwise(placed)):
            raise ValueError("the state has two RAM blocks at one IOVA")
        if len(state.identities) != len(state.names):
            raise ValueError("the state does not tell of each descriptor what it is")
        return state


def _dump_block(block: HandedBlock) -> dict[str, object]:
    memory: dict[str, object] = {"kind": "memfd"}
    if isinstance(block.memory, Memfd):
        memory["hugetlb"] = block.memory.hugetlb
    elif isinstance(block.memory, File):
        of_file = block.memory
        memory = {"kind": "file", "offset": of_file.offset, "grow": of_file.grow, "punch": of_file.punch}
        memory["pmem"] = of_file.pmem
    return {
        "idstr": block.idstr,
        "used_length": block.used_length,
        "max_length": block.max_length,
        "iova": block.iova,
        "memory": memory,
        "readonly": block.readonly,
        "prealloc": block.prealloc,
        "settings": {field.name: getattr(block.settings, field.name) for field in fields(MemorySettings)},
        "discarded": block.discarded,
        "pieces": block.pieces,
        "policy": _dump_policy(block.policy),
    }


def _dump_policy(policy: Policy) -> dict[str, object]:
    return {"resize": policy.resize, "granule": policy.granule, "allow_gap": policy.allow_gap}


def _load_policy(row: _Fields) -> Policy:
    resize = cast('Literal["remap", "extend"]', row.text("resize"))  # Policy looks
    return Policy(resize, row.number_or_none("granule"), row.flag("allow_gap"))


def _dump_irq(irq: HandedIrq) -> dict[str, object]:
    return {
        "bdf": irq.bdf,
        "index": irq.index,
        "count": irq.count,
        "vectors": irq.vectors,
        "unmasked": irq.unmasked,
        "eventfds": [_UNKNOWN if identity is None else identity + 1 for identity in irq.eventfds],
    }


def _load_irq(row: _Fields) -> HandedIrq:
    return HandedIrq(
        bdf=row.text("bdf"),
        index=row.number("index"),
        count=row.number("count"),
        vectors=tuple(row.numbers("vectors")),
        unmasked=row.flag("unmasked"),
        eventfds=tuple(None if number == _UNKNOWN else number - 1 for number in row.numbers("eventfds")),
    )


def _load_block(row: _Fields) -> HandedBlock:
    settings = row.inside("settings")
    return HandedBlock(
        idstr=row.text("idstr"),
        used_length=row.number("used_length"),
        max_length=row.number("max_length"),
        iova=row.number("iova"),
        memory=_load_memory(row.inside("memory")),
        readonly=row.flag("readonly"),
        prealloc=check_threads(row.number("prealloc"), "prealloc"),
        settings=MemorySettings(**{field.name: settings.flag(field.name) for field in fields(MemorySettings)}),
        discarded=row.extents("discarded"),
        pieces=row.extents("pieces"),
        policy=_load_policy(row.inside("policy")),
    )


def _load_memory(row: _Fields) -> MemoryKind:
    if row.text("kind") == "memfd":
        return Memfd(hugetlb=row.number_or_none("hugetlb"))
    return File(_ELSEWHERE, row.number("offset"), grow=row.flag("grow"), punch=row.flag("punch"), pmem=row.flag("pmem"))


class _Fields:
    """An object of JSON, of which each field has to be there and what is wanted; ValueError says which is not."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no JSON object")  # noqa: TRY004 (a value, whatever its type)
        self._values: dict[str, object] = value
        self._where = where

    def find(self, name: str) -> object:
        """Whatever it is; None where it is not there."""
        return self._values.get(name)

    def _wrong(self, name: str) -> ValueError:
        return ValueError(f"'{name}' of {self._where} is missing, or not what a HandOver writes")

    def number(self, name: str) -> int:
        """Not negative."""
        value = self.find(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(name)
        return value

    def number_or_none(self, name: str) -> int | None:
        """As `number`."""
        return None if name in self._values and self.find(name) is None else self.number(name)

    def text(self, name: str) -> str:
        """A string."""
        if not isinstance(value := self.find(name), str):
            raise self._wrong(name)
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        if not isinstance(value := self.find(name), bool):
            raise self._wrong(name)
        return value

    def _items(self, name: str) -> Sequence[object]:
        if not isinstance(value := self.find(name), list):
            raise self._wrong(name)
        return value

    def numbers(self, name: str) -> list[int]:
        """A list of them."""
        items = self._items(name)
        found = [item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0]
        if len(found) < len(items):
            raise self._wrong(name)
        return found

    def pairs(self, name: str) -> list[tuple[int, int]]:
        """A list of two numbers each."""
        rows = [_Fields({name: item}, self._where).numbers(name) for item in self._items(name)]
        if any(len(row) != 2 for row in rows):
            raise self._wrong(name)
        return [(row[0], row[1]) for row in rows]

    def extents(self, name: str) -> tuple[Extent, ...]:
        """A list of start and end."""
        found = tuple(Extent(*pair) for pair in self.pairs(name))
        if any(extent.start >= extent.end for extent in found):
            raise self._wrong(name)
        return found

    def inside(self, name: str) -> _Fields:
        """An object in it."""
        return _Fields(self.find(name), f"'{name}' of {self._where}")

    def rows(self, name: str) -> list[_Fields]:
        """A list of objects in it."""
        return [_Fields(item, f"'{name}' of {self._where}") for item in self._items(name)]
