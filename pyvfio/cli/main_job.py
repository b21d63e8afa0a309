"""The main job, step by step: a block grows and shrinks in an address space, and a device accesses the block.

Each step returns an observation, and whether the observation is correct. pyvfio can drive the DMA engine of an edu
device only. With another device, the steps with DMA are left out.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.kernel import Kernel
from pyvfio.picture import Picture
from pyvfio.testing.edu import EDU_ID, LIMIT, Edu
from pyvfio.testing.probe import DmaProbe, PageWitness, pattern
from pyvfio.testing.world import World, WorldName
from pyvfio.units import GIB, MIB, PAGE_SIZE, align_up, format_size


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step: whether the step held, the time of the measured calls, and the observation in words."""

    name: str
    ok: bool
    microseconds: float
    seen: str


@dataclass(slots=True)
class Facts:
    """Facts about the kernel, the IOMMU, the address space and the block. The first steps fill in all but two fields.

    `space`: "type1" or "iommufd". `why`: the reason for this kind of address space.
    """

    kernel: str
    iommu: str
    space: str = ""
    why: str = ""
    iova_ranges: list[tuple[int, int]] = field(default_factory=list)
    block: dict[str, int | str] = field(default_factory=dict)


class Clock:
    """A stopwatch: adds up the time of the measured blocks."""

    def __init__(self) -> None:
        self.microseconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the `with` block."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.microseconds += (time.perf_counter_ns() - start) / 1000


def iommu_name(kernel: Kernel) -> str:
    """Return the kind of the machine's IOMMUs, from the names under class/iommu in sysfs; `none` without an IOMMU."""
    names = sorted(path.name for path in (kernel.sysfs / "class" / "iommu").glob("*"))
    known = {"dmar": "intel", "ivhd": "amd", "virtio": "virtio", "smmu": "arm-smmu"}
    return next(
        (word for name in names for prefix, word in known.items() if prefix in name), ", ".join(names) or "none"
    )


Space: TypeAlias = Literal["type1", "iommufd"]
"""The kinds of address spaces, as for `open_device(iommu=)`."""


def note_space(device: pyvfio.Device, facts: Facts, wanted: Space | None) -> str:
    """Fill in the address space of an open device, and return the words for the space. `wanted`: the choice, if any."""
    space, group = device.space, f"group {device.group_number}"
    if isinstance(space, pyvfio.Ioas):
        facts.space, facts.why = "iommufd", space.why
        return f"{group}, I/O address space {space.id} of iommufd, no limit of mappings; {facts.why}"
    facts.space = "type1"
    facts.why = "the program asked for type1" if wanted else "type1 is the default where the machine has type1"
    return f"{group}, {space.iommu_type.name}, room for {space.entries_left} mappings; {facts.why}"


class Leftovers:
    """A snapshot of the locked bytes and the open descriptors of this process, to find leaks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._former = (world.locked_bytes(), _open_fds())

    def step(self, clock: Clock) -> tuple[bool, str]:
        """Carry out the last step of a job: compare locked bytes and descriptors with the snapshot."""
        with clock.running():
            locked, fds = self._world.locked_bytes(), _open_fds()
        seen = f"{locked} bytes locked, {len(fds)} descriptors open, as before"
        return (locked, fds) == self._former, seen


Step: TypeAlias = Callable[[Clock], tuple[bool, str]]
"""Carries out a step and measures the calls of interest. Returns whether the step held, and the observation."""


def carry_out(name: str, step: Step) -> StepResult:
    """Carry out one step."""
    clock = Clock()
    ok, seen = step(clock)
    return StepResult(name, ok, round(clock.microseconds, 1), seen)


class MainJob:
    """The main job on device `bdf` of `world`. `steps()` yields each result at once, and fills in `facts`.

    `iommu`: the kind of IOMMU, if known. `space`: the kind of address space; None: as `open_device` chooses.

    A step that fails ends the job, since later steps build on earlier ones. The end of `steps()` closes all objects.
    """

    def __init__(self, bdf: str, *, world: World, iommu: str | None = None, space: Space | None = None) -> None:
        self._bdf = bdf
        self._wanted: Space | None = space
        self._world = world
        self._kernel = world.kernel
        self._stack = ExitStack()
        self._leftovers = Leftovers(world)
        self._witness: PageWitness | None = None
        self.pictures: list[Picture] = []
        """The IOVA space after the first map, after a grow and after a shrink."""
        self.facts = Facts(kernel=world.release, iommu=iommu or iommu_name(world.kernel))
        identity = pci.read_device(bdf, kernel=world.kernel)
        self.has_engine = (identity.vendor, identity.device) == EDU_ID
        self.notes = [] if self.has_engine else ["pyvfio cannot drive this device's DMA: steps with DMA are left out"]

    def steps(self) -> Iterator[StepResult]:
        """Carry out the steps, and yield the results. Raises VfioError if the device cannot be opened."""
        with self._stack:
            for name, needs_engine, step in self._plan():
                if needs_engine and not self.has_engine:
                    continue
                yield (result := carry_out(name, step))
                if not result.ok:
                    return
        yield carry_out("no locked memory and no descriptor is left", self._leftovers.step)

    def _plan(self) -> list[tuple[str, bool, Step]]:
        return [
            ("open the device", False, self._open),
            ("reserve and map a block", False, self._add),
            (
                "the device reads and writes the block",
                True,
                lambda clock: self._dma(clock, self._block.used_length - LIMIT),
            ),
            ("grow from 2 to 4 MiB", False, self._grow),
            ("the device writes into the grown part", True, lambda clock: self._dma(clock, 4 * MIB - LIMIT)),
            ("shrink from 4 to 2 MiB", False, self._shrink_under_watch),
            ("the IOMMU stops a write one byte outside", True, self._blocked),
            ("grow to 3 MiB again", False, lambda clock: self._resize(clock, 3 * MIB)),
            ("the device reaches the grown part again", True, lambda clock: self._dma(clock, 2 * MIB)),
            ("shrink to nothing and grow back", False, self._to_nothing),
            ("the device reaches every IOVA range", True, self._ranges),
            ("remove the block", False, self._remove),
        ]

    def _open(self, clock: Clock) -> tuple[bool, str]:
        with clock.running():
            device = self._stack.enter_context(pyvfio.open_device(self._bdf, iommu=self._wanted, kernel=self._kernel))
        self._space = device.space
        self._blocks = self._stack.enter_context(pyvfio.RamBlockList(kernel=self._kernel))
        self._mapper = self._stack.enter_context(pyvfio.DmaMapper(self._space, self._blocks))
        self.facts.iova_ranges = [(offered.start, offered.last) for offered in self._space.iova_ranges]
        if self.has_engine:
            self._prepare_engine(device)
        return True, note_space(device, self.facts, self._wanted)

    def _prepare_engine(self, device: pyvfio.Device) -> None:
        device.memory_enabled = True
        device.bus_master = True
        desk = self._blocks.add("desk", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
        engine = Edu(device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
        self._probe = DmaProbe(engine, desk=desk, iova=self._mapper.iova(desk))

    def _add(self, clock: Clock) -> tuple[bool, str]:
        with clock.running():
            self._block = self._blocks.add("demo", used_length=2 * MIB, max_length=GIB)
        self._iova = self._mapper.iova(self._block)
        self.facts.block = {
            "idstr": self._block.idstr,
            "vaddr": self._block.vaddr,
            "iova": self._iova,
            "used_length": self._block.used_length,
            "max_length": self._block.max_length,
        }
        seen = f"1 GiB reserved at vaddr {self._block.vaddr:#x} and IOVA {self._iova:#x}, 2 MiB mapped"
        self._keep_picture("a block of 2 MiB that can grow to 1 GiB")
        return self._is_mapped(2 * MIB), seen

    def _keep_picture(self, title: str) -> None:
        self.pictures.append(self._mapper.picture().titled(title))

    def _is_mapped(self, length: int) -> bool:
        mapping = self._space.mapping_at(self._iova)
        return self._mapper.iova(self._block) == self._iova and (mapping.size if mapping else 0) == length

    def _dma(self, clock: Clock, offset: int) -> tuple[bool, str]:
        there, sent = pattern(LIMIT), pattern(LIMIT)
        with self._block.view() as view:
            view[offset : offset + LIMIT] = there
        with clock.running():
            read = self._probe.read(self._iova + offset, LIMIT)
            self._probe.write(self._iova + offset, sent)
        with self._block.view() as view:
            written = bytes(view[offset : offset + LIMIT])
        words = f"read {there[:4].hex(' ')} …, wrote {written[:4].hex(' ')} …, {LIMIT} bytes each at {offset:#x}"
        return read == there and written == sent, words

    def _resize(self, clock: Clock, length: int) -> tuple[bool, str]:
        with clock.running():
            self._block.resize(length)
        return self._is_mapped(length), f"{format_size(length)} mapped, still at IOVA {self._iova:#x}"

    def _grow(self, clock: Clock) -> tuple[bool, str]:
        grown = self._resize(clock, 4 * MIB)
        self._keep_picture("the block after a grow to 4 MiB")
        return grown

    def _shrink_under_watch(self, clock: Clock) -> tuple[bool, str]:
        with self._block.view() as view:
            view[2 * MIB :][:8] = b"witness!"
        # The witness takes the page before the shrink, and shows afterwards whether a device still writes to the page.
        # A fake pins no page and reaches memory by virtual address, so a witness proves nothing there.
        if self.has_engine and self._world.name != WorldName.FAKE:
            self._witness = PageWitness(self._block.vaddr + 2 * MIB)
        shrunk = self._resize(clock, 2 * MIB)
        self._keep_picture("the block after a shrink to 2 MiB")
        return shrunk

    def _blocked(self, clock: Clock) -> tuple[bool, str]:
        outside = self._iova + self._block.used_length
        with self._world.watch_faults() as log:
            with clock.running():
                self._probe.write(outside, b"X")
            read = self._probe.read(outside, LIMIT)
            page = None if self._witness is None else self._witness.look()[:8]
            lines = log.lines(timeout=0)
        seen = f"in the kernel's log: {lines[0] if lines else 'nothing'}"
        if page is None:
            return read is None and bool(lines), seen
        held = page.decode(errors="replace")
        return page == b"witness!" and read is None, f"the released page still holds {held!r}; {seen}"

    def _to_nothing(self, clock: Clock) -> tuple[bool, str]:
        with clock.running():
            self._block.resize(0)
        empty = self._is_mapped(0)
        self._block.resize(2 * MIB)
        with self._block.view() as view:
            zero = not any(view)
        return empty and zero and self._is_mapped(
            2 * MIB
        ), "0 bytes is a valid length; the memory reads zero after the grow"

    def _ranges(self, clock: Clock) -> tuple[bool, str]:
        ok, words = True, []
        for number, (start, last) in enumerate(self.facts.iova_ranges, 1):
            # In the middle of the range, apart from the block.
            iova = align_up(start + (last - start) // 2, PAGE_SIZE)
            there = pattern(LIMIT)
            with self._block.view() as view:
                view[:LIMIT] = there
            with clock.running():
                self._space.map(vaddr=self._block.vaddr, iova=iova, size=PAGE_SIZE)
            reached = self._probe.read(iova, LIMIT) == there
            self._space.unmap(iova=iova, size=PAGE_SIZE)
            ok = ok and reached and self._probe.read(iova, LIMIT) is None
            words.append(f"{number}: DMA at {iova:#x}")
        if self.facts.iova_ranges[-1][1] >= 1 << self._mapper.dma_bits:
            reached, seen = self._reach_the_top(clock)
            ok = ok and reached
            words.append(seen)
        return ok, "; ".join(words)

    def _reach_the_top(self, clock: Clock) -> tuple[bool, str]:
        """Map memory above 39 bits by a mapper without the limit, and read the memory by DMA."""
        with mmap.mmap(-1, PAGE_SIZE) as buffer, pyvfio.DmaMapper(self._space, dma_bits=64) as wide:
            there = buffer[:LIMIT] = pattern(LIMIT)
            with clock.running():
                mapping = wide.map_temporary(buffer)
            reached = self._probe.read(mapping.iova, LIMIT) == there
            mapping.close()
            wide.reset_temporary()
            return reached, f"dma_bits=64: DMA at {mapping.iova:#x}"

    def _remove(self, clock: Clock) -> tuple[bool, str]:
        with clock.running():
            self._block.remove()
        gone = self._space.mapping_at(self._iova) is None
        if not self.has_engine:
            return gone, "unmapped; the IOVA is free again"
        return gone and self._probe.read(self._iova, LIMIT) is None, "unmapped; the device cannot reach the IOVA"


def _open_fds() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
