"""The message from the old process to the new process: plain facts as JSON, checked when they are read.

This module makes no system call. The descriptors are sent separately, in the order of `State.identities`:

* of the address space: container and groups, or iommufd and agreement;
* of devices, of the memory of the blocks, and of the eventfds of the interrupts.

A state of a container has version 2, so that earlier releases of pyvfio can read the state. A state of an Ioas has
version 3, the kind of the space included.
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
from pyvfio.live_update.handed_space import (
    OF_CONTAINERS,
    VERSION,
    HandedContainer,
    HandedDevice,
    HandedSpace,
    dump_device,
    dump_space,
    load_device,
    load_space,
)
from pyvfio.live_update.json_fields import Fields
from pyvfio.mapper.policy import Policy
from pyvfio.memory import File, Memfd, MemoryKind, MemorySettings
from pyvfio.memory.prefault import check_threads
from pyvfio.units import PAGE_SIZE, U64_MAX, is_aligned

FORMAT = "pyvfio live update"
_INTX = int(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
_KINDS = int(ioctls.VFIO_PCI_NUM_IRQS)
_MOST_VECTORS = 2048  # PCI 3.0, 6.8.2: the size of an MSI-X table
_UNKNOWN = 0  # an eventfd without a known identity; other values are the kernel's number of the eventfd plus 1
_ELSEWHERE = 0  # each process has its own number for a descriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedBlock:
    """A RAM block that devices reach at `iova`: its memory, lengths and settings, and its mappings.

    `pieces`: the mappings, made under `policy`. All extents are in bytes of the block, ascending.
    """

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
        """Raise ValueError if the values cannot belong to one block."""
        populated = without([Extent(0, self.used_length)], *self.discarded)
        if not (
            self.used_length <= self.max_length
            and self.max_length > 0
            and self.iova <= U64_MAX - self.max_length + 1
            and is_aligned(self.used_length | self.max_length | self.iova, PAGE_SIZE)
            and list(self.discarded) == runs(clip(sorted(self.discarded), 0, self.used_length))
            and runs(self.pieces) == populated
        ):
            raise ValueError(f"the lengths and parts of RAM block '{self.idstr}' contradict each other")


@dataclass(frozen=True, slots=True, kw_only=True)
class HandedIrq:
    """A kind of interrupt that is enabled, of the device at `bdf`.

    Of the `count` vectors, each of `vectors`, ascending, signals an eventfd. `unmasked`: one more eventfd unmasks INTx.
    `eventfds`: the identity of each eventfd, in this order.
    """

    bdf: str
    index: int
    count: int
    vectors: tuple[int, ...]
    unmasked: bool
    eventfds: tuple[int | None, ...]

    def __post_init__(self) -> None:
        """Raise ValueError if the values cannot belong to one interrupt."""
        if not (
            0 < self.count <= _MOST_VECTORS
            and self.index < _KINDS
            and list(self.vectors) == sorted(set(self.vectors))
            and all(vector < self.count for vector in self.vectors)
            and len(self.eventfds) == len(self.vectors) + self.unmasked
            and (self.index == _INTX or not self.unmasked)
        ):
            raise ValueError(f"the vectors of interrupt {self.index} of {self.bdf} contradict each other")

    @property
    def names(self) -> tuple[str, ...]:
        """A description of each eventfd, in words."""
        kind = ioctls.VfioPciIrqIndex(self.index).name
        unmask = (f"the eventfd that unmasks {kind} of {self.bdf}",) if self.unmasked else ()
        return (*(f"the eventfd of vector {vector} of {kind} of {self.bdf}" for vector in self.vectors), *unmask)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The whole message.

    `identities` (st_dev, st_ino) tell whether a descriptor is the expected one. `container_bits` and `mapper_bits`: the
    `dma_bits` of the address space and of the mapper.
    """

    space: HandedSpace
    devices: tuple[HandedDevice, ...]
    policy: Policy
    prefault: int
    container_bits: int
    mapper_bits: int
    blocks: tuple[HandedBlock, ...]
    irqs: tuple[HandedIrq, ...]
    identities: tuple[tuple[int, int], ...]

    @property
    def handles(self) -> int:
        """The number of descriptors before those of the blocks' memory."""
        return len(self.space.names) + len(self.devices)

    def device_fds(self, fds: Sequence[int]) -> Iterator[tuple[HandedDevice, int]]:
        """Yield each device with the descriptor, out of all descriptors."""
        return zip(self.devices, fds[len(self.space.names) : self.handles], strict=True)

    def block_fds(self, fds: Sequence[int]) -> Sequence[int]:
        """Return the descriptors of the blocks' memory, out of all descriptors."""
        return fds[self.handles : self.handles + len(self.blocks)]

    def irq_fds(self, fds: Sequence[int]) -> Iterator[tuple[HandedIrq, Sequence[int]]]:
        """Yield each interrupt with its descriptors, out of all descriptors."""
        first = self.handles + len(self.blocks)
        for irq in self.irqs:
            yield irq, fds[first : first + len(irq.eventfds)]
            first += len(irq.eventfds)

    @property
    def mapped(self) -> int:
        """The number of bytes that devices reach."""
        return sum(total(block.pieces) for block in self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """A description of each descriptor, in words."""
        return (
            *self.space.names,
            *(f"device {device.bdf}" for device in self.devices),
            *(f"the memory of RAM block '{block.idstr}'" for block in self.blocks),
            *(name for irq in self.irqs for name in irq.names),
        )

    def dump(self) -> bytes:
        """Return the message as JSON."""
        return json.dumps(
            {
                "format": FORMAT,
                **dump_space(self.space),
                "devices": [dump_device(device) for device in self.devices],
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
        """Parse a message that `dump` wrote. Raises ValueError, with the reason."""
        try:
            top = Fields(json.loads(data), "the state")
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"these {len(data)} bytes are not the state of a HandOver, or are incomplete: {error}"
            ) from error
        if top.find("format") != FORMAT:
            raise ValueError("this JSON is not the state of a HandOver")
        if top.find("version") not in (OF_CONTAINERS, VERSION):
            raise ValueError(
                f"the state has version {top.find('version')}, but this pyvfio reads versions {OF_CONTAINERS} and "
                f"{VERSION}: run the same release of pyvfio in both processes"
            )
        return cls._of(top)

    @classmethod
    def _of(cls, top: Fields) -> State:
        space = load_space(top)
        state = cls(
            space=space,
            devices=tuple(load_device(row, space) for row in top.rows("devices")),
            policy=_load_policy(top.inside("policy")),
            prefault=check_threads(top.number("prefault"), "prefault"),
            container_bits=check_dma_bits(top.number("container_bits")),
            mapper_bits=check_dma_bits(top.number("mapper_bits")),
            blocks=tuple(_load_block(row) for row in top.rows("blocks")),
            irqs=tuple(_load_irq(row) for row in top.rows("irqs")),
            identities=tuple(top.pairs("identities")),
        )
        if isinstance(space, HandedContainer) and not {device.group for device in state.devices} <= set(space.groups):
            raise ValueError("the state has a device in a group that the state does not list")
        if len({device.bdf for device in state.devices}) < len(state.devices):
            raise ValueError("the state has one device twice")
        if not {irq.bdf for irq in state.irqs} <= {device.bdf for device in state.devices}:
            raise ValueError("the state has an interrupt of a device that the state does not list")
        if len({(irq.bdf, irq.index) for irq in state.irqs}) < len(state.irqs):
            raise ValueError("the state has one interrupt of a device twice")
        if len({block.idstr for block in state.blocks}) < len(state.blocks):
            raise ValueError("the state has two RAM blocks of one name")
        placed = sorted((block.iova, block.iova + block.max_length) for block in state.blocks)
        if any(end > start for (_start, end), (start, _end) in pairwise(placed)):
            raise ValueError("the state has two RAM blocks at one IOVA")
        if len(state.identities) != len(state.names):
            raise ValueError(f"the state has {len(state.names)} descriptors, but {len(state.identities)} identities")
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


def _load_policy(row: Fields) -> Policy:
    resize = cast('Literal["remap", "extend", "cut"]', row.text("resize"))  # Policy checks the value
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


def _load_irq(row: Fields) -> HandedIrq:
    return HandedIrq(
        bdf=row.text("bdf"),
        index=row.number("index"),
        count=row.number("count"),
        vectors=tuple(row.numbers("vectors")),
        unmasked=row.flag("unmasked"),
        eventfds=tuple(None if number == _UNKNOWN else number - 1 for number in row.numbers("eventfds")),
    )


def _load_block(row: Fields) -> HandedBlock:
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


def _load_memory(row: Fields) -> MemoryKind:
    if row.text("kind") == "memfd":
        return Memfd(hugetlb=row.number_or_none("hugetlb"))
    return File(_ELSEWHERE, row.number("offset"), grow=row.flag("grow"), punch=row.flag("punch"), pmem=row.flag("pmem"))
