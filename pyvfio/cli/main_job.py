"""The main job, step by step: a block that grows and shrinks in a VFIO container while a device tries to reach it.

Each step says what it saw and whether that is what must be. A device without a DMA engine that pyvfio can drive shows
the steps that need none.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.kernel import Kernel
from pyvfio.testing.edu import EDU_ID, LIMIT, Edu
from pyvfio.testing.probe import DmaProbe, PageWitness, pattern
from pyvfio.testing.world import World, WorldName
from pyvfio.units import GIB, MIB, PAGE_SIZE, align_up, format_size


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step: whether it held, how long the call that it is about took, what was seen."""

    name: str
    ok: bool
    microseconds: float
    seen: str


@dataclass(slots=True)
class Facts:
    """What is known before the first step; filled when the device is open."""

    kernel: str
    iommu: str
    iova_ranges: list[tuple[int, int]] = field(default_factory=list)
    block: dict[str, int | str] = field(default_factory=dict)


class Clock:
    """Adds up what is done while it is running."""

    def __init__(self) -> None:
        self.microseconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """From here to the end of the block."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.microseconds += (time.perf_counter_ns() - start) / 1000


def iommu_name(kernel: Kernel) -> str:
    """What drives the machine's IOMMUs, by the names under class/iommu in sysfs."""
    names = sorted(path.name for path in (kernel.sysfs / "class" / "iommu").glob("*"))
    known = {"dmar": "intel", "ivhd": "amd", "virtio": "virtio", "smmu": "arm-smmu"}
    return next(
        (word for name in names for prefix, word in known.items() if prefix in name), ", ".join(names) or "none"
    )


class Leftovers:
    """What this process holds of the machine, from now on: locked bytes and descriptors."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._former = (world.locked_bytes(), _open_fds())

    def step(self, clock: Clock) -> tuple[bool, str]:
        """The last step of a job: whether it holds no more than at first."""
        with clock.running():
            locked, fds = self._world.locked_bytes(), _open_fds()
        seen = f"{locked} bytes locked, {len(fds)} descriptors open, as before"
        return (locked, fds) == self._former, seen


Step: TypeAlias = Callable[[Clock], tuple[bool, str]]
"""Runs the clock while it does what it is about; whether that held, and what was seen."""


def carry_out(name: str, step: Step) -> StepResult:
    """Make one step."""
    clock = Clock()
    ok, seen = step(clock)
    return StepResult(name, ok, round(clock.microseconds, 1), seen)


class MainJob:
    """Runs the job on `bdf` of `world`. `steps()` yields each step's result as it is there; `facts` fills up meanwhile.

    A step that fails ends the job, since the next ones build on it. Whatever happens, everything is closed in the end.
    """

    def __init__(self, bdf: str, *, world: World, iommu: str | None = None) -> None:
        self._bdf = bdf
        self._world = world
        self._kernel = world.kernel
        self._stack = ExitStack()
        self._leftovers = Leftovers(world)
        self._witness: PageWitness | None = None
        self.facts = Facts(kernel=world.release, iommu=iommu or iommu_name(world.kernel))
        identity = pci.read_device(world.kernel, bdf)
        self.has_engine = (identity.vendor, identity.device) == EDU_ID
        self.notes = [] if self.has_engine else ["pyvfio cannot drive this device's DMA: what needs that is left out"]

    def steps(self) -> Iterator[StepResult]:
        """Carry the steps out. Raises VfioError where the device cannot be opened."""
        with self._stack:
            for name, needs_engine, step in self._plan():
                if needs_engine and not self.has_engine:
                    continue
                yield (result := carry_out(name, step))
                if not result.ok:
                    return
        yield carry_out("nothing is left", self._leftovers.step)

    def _plan(self) -> list[tuple[str, bool, Step]]:
        return [
            ("open the device", False, self._open),
            ("reserve and map a block", False, self._add),
            ("the device reads and writes it", True, lambda clock: self._dma(clock, self._block.used_length - LIMIT)),
            ("grow from 2 to 4 MiB", False, lambda clock: self._resize(clock, 4 * MIB)),
            ("the device writes into the grown part", True, lambda clock: self._dma(clock, 4 * MIB - LIMIT)),
            ("shrink from 4 to 2 MiB", False, self._shrink_under_watch),
            ("one byte outside is stopped", True, self._blocked),
            ("grow to 3 MiB again", False, lambda clock: self._resize(clock, 3 * MIB)),
            ("the device reaches it again", True, lambda clock: self._dma(clock, 2 * MIB)),
            ("shrink to nothing and grow back", False, self._to_nothing),
            ("every IOVA range is reached", True, self._ranges),
            ("remove the block", False, self._remove),
        ]

    def _open(self, clock: Clock) -> tuple[bool, str]:
        with clock.running():
            device = self._stack.enter_context(pyvfio.open_device(self._bdf, kernel=self._kernel))
        self._container = device.container
        self._blocks = self._stack.enter_context(pyvfio.RamBlockList(kernel=self._kernel))
        self._mapper = self._stack.enter_context(pyvfio.DmaMapper(self._container, self._blocks))
        ranges = self._container.info.iova_ranges or ()
        self.facts.iova_ranges = [(offered.start, offered.last) for offered in ranges]
        if self.has_engine:
            self._prepare_engine(device)
        seen = f"group {device.group.number}, {self._container.iommu_type.name}, room for "
        return True, f"{seen}{self._container.entries_left} mappings"

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
        seen = f"1 GiB reserved at vaddr {self._block.vaddr:#x} and IOVA {self._iova:#x}, 2 MiB of it mapped"
        return self._is_mapped(2 * MIB), seen

    def _is_mapped(self, length: int) -> bool:
        mapping = self._container.mapping_at(self._iova)
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

    def _shrink_under_watch(self, clock: Clock) -> tuple[bool, str]:
        with self._block.view() as view:
            view[2 * MIB :][:8] = b"witness!"
        # Before the block shrinks, so that it can be seen whether anything still gets at the page afterwards. A fake
        # pins no page and reaches memory by its address, so that a witness would say nothing there.
        if self.has_engine and self._world.name != WorldName.FAKE:
            self._witness = PageWitness(self._block.vaddr + 2 * MIB)
        return self._resize(clock, 2 * MIB)

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
        return page == b"witness!" and read is None, f"the page given back still holds {held!r}; {seen}"

    def _to_nothing(self, clock: Clock) -> tuple[bool, str]:
        with clock.running():
            self._block.resize(0)
        empty = self._is_mapped(0)
        self._block.resize(2 * MIB)
        with self._block.view() as view:
            zero = not any(view)
        return empty and zero and self._is_mapped(2 * MIB), "0 bytes is a length too; what grew back reads zero"

    def _ranges(self, clock: Clock) -> tuple[bool, str]:
        ok, words = True, []
        for number, (start, last) in enumerate(self.facts.iova_ranges, 1):
            # In the middle, and where the block itself is not.
            iova = align_up(start + (last - start) // 2, PAGE_SIZE)
            there = pattern(LIMIT)
            with self._block.view() as view:
                view[:LIMIT] = there
            with clock.running():
                self._container.map(vaddr=self._block.vaddr, iova=iova, size=PAGE_SIZE)
            reached = self._probe.read(iova, LIMIT) == there
            self._container.unmap(iova=iova, size=PAGE_SIZE)
            ok = ok and reached and self._probe.read(iova, LIMIT) is None
            words.append(f"{number}: DMA at {iova:#x}")
        if self.facts.iova_ranges[-1][1] >= 1 << self._mapper.dma_bits:
            reached, seen = self._reach_the_top(clock)
            ok = ok and reached
            words.append(seen)
        return ok, "; ".join(words)

    def _reach_the_top(self, clock: Clock) -> tuple[bool, str]:
        """The device reaches an IOVA that pyvfio chooses above 39 bits, because this mapper lifts the limit."""
        with mmap.mmap(-1, PAGE_SIZE) as buffer, pyvfio.DmaMapper(self._container, dma_bits=64) as wide:
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
        gone = self._container.mapping_at(self._iova) is None
        if not self.has_engine:
            return gone, "unmapped, its IOVA is free again"
        return gone and self._probe.read(self._iova, LIMIT) is None, "unmapped, and out of the device's reach"


def _open_fds() -> set[str]:
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
