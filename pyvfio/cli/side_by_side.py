"""The ways of resizing side by side, step by step: what a resize costs, what of the block is out of the device's reach
meanwhile, and whether a device that is at work all the while loses anything.

Both blocks are in one container, so that the kernel, the IOMMU and the device are the same. What was out of reach is
the kernel's word: what it says it unmapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import median
from typing import Literal

from pyvfio import ioctls, pci
from pyvfio.cli.main_job import Clock, Facts, Leftovers, Step, StepResult, carry_out, iommu_name
from pyvfio.container import Container
from pyvfio.device import Device, open_device
from pyvfio.dma import DmaMapper
from pyvfio.extents import Extent, total, without
from pyvfio.kernel import Kernel
from pyvfio.ramblock import RamBlockList
from pyvfio.testing.edu import EDU_ID, LIMIT, Edu
from pyvfio.testing.under_fire import Copies, copy_meanwhile
from pyvfio.testing.world import World, WorldName
from pyvfio.units import MIB, format_size

LENGTH, STEP = 256 * MIB, 2 * MIB
"""How long a block is, and by how much it grows and shrinks. A granule is as long as that, too."""

_REPEAT = 5  # of which the median counts
_COPIES = 20

Policy = Literal["remap", "extend"]


class WatchedContainer(Container):
    """Knows what its kernel has said it unmapped: `unmapped`, parts of the IOVA."""

    def __init__(self, *, kernel: Kernel) -> None:
        super().__init__(kernel=kernel)
        self.unmapped: list[Extent] = []

    def unmap(self, *, iova: int, size: int, bitmap: ioctls.vfio_bitmap | None = None) -> None:
        """As Container has it; and noted."""
        super().unmap(iova=iova, size=size, bitmap=bitmap)
        self.unmapped.append(Extent(iova, iova + size))


@dataclass(slots=True)
class Figures:
    """What one way of resizing was seen to do. Medians of microseconds; `out_of_reach`: of the bytes that a resize
    leaves in use, how many the kernel unmapped at most; `copies`: None where no device was at work."""

    policy: str
    grow: float = 0.0
    shrink: float = 0.0
    mappings: int = 0
    out_of_reach: int = 0
    copies: Copies | None = None


class _Side:
    """A block that is resized in one way."""

    def __init__(self, container: WatchedContainer, resize: Policy, stack: ExitStack) -> None:
        granule = STEP if resize == "extend" else None
        self.keeps_reach = granule is not None
        name = f"{resize}, granule={format_size(STEP)}" if granule else resize
        self.figures = Figures(name)
        self._container = container
        self._blocks = stack.enter_context(RamBlockList(kernel=container.kernel))
        self._mapper = stack.enter_context(DmaMapper(container, self._blocks, resize=resize, granule=granule))

    def add(self, clock: Clock) -> tuple[bool, str]:
        """Reserve and map it."""
        with clock.running():
            self.block = self._blocks.add("block", used_length=LENGTH, max_length=2 * LENGTH)
        self.iova = self._mapper.iova(self.block)
        return self._is_mapped(), f"{format_size(LENGTH)} in {self._count_mappings()}, at IOVA {self.iova:#x}"

    def _is_mapped(self) -> bool:
        found = self._container.mappings_in(iova=self.iova, size=self.block.max_length)
        self.figures.mappings = len(found)
        whole = sum(mapping.size for mapping in found) == self.block.used_length
        return whole and self._mapper.iova(self.block) == self.iova

    def _count_mappings(self) -> str:
        return "1 mapping" if self.figures.mappings == 1 else f"{self.figures.mappings} mappings"

    def resize(self, clock: Clock, old: int, new: int) -> tuple[bool, str]:
        """From one length to the other, some times."""
        samples, held, lost = [], True, 0
        for _ in range(_REPEAT):
            self.block.resize(old)
            self._container.unmapped.clear()
            clock.microseconds = 0.0
            with clock.running():
                self.block.resize(new)
            samples.append(clock.microseconds)
            lost = max(lost, self._unmapped_of(min(old, new)))
            held = held and self._is_mapped()
        clock.microseconds = median(samples)
        self.figures.out_of_reach = max(self.figures.out_of_reach, lost)
        if new > old:
            self.figures.grow = clock.microseconds
        else:
            self.figures.shrink = clock.microseconds
        seen = f"{format_size(lost)} of {format_size(min(old, new))} that stay were out of the device's reach meanwhile"
        return held and not (self.keeps_reach and lost), f"{self._count_mappings()}; {seen}"

    def _unmapped_of(self, length: int) -> int:
        stays = Extent(self.iova, self.iova + length)
        return length - total(without([stays], *self._container.unmapped))

    def under_fire(self, engine: Edu, clock: Clock) -> tuple[bool, str]:
        """The device copies inside of it while it is resized without a pause; the time is that of one resize."""
        lengths = cycle((LENGTH + STEP, LENGTH))

        def resize() -> None:
            with clock.running():
                self.block.resize(next(lengths))

        copies = copy_meanwhile(
            engine,
            self.block,
            iova=self.iova,
            size=LIMIT,
            meanwhile=resize,
            copies=_COPIES,
        )
        self.block.resize(LENGTH)
        self.figures.copies = copies
        clock.microseconds /= copies.calls or 1
        seen = f"{copies.lost or 'none'} of {copies.made} copies lost, in {copies.calls} resizes"
        return self._is_mapped() and not (self.keeps_reach and copies.lost), seen

    def remove(self, clock: Clock) -> tuple[bool, str]:
        """And its IOVA is free."""
        with clock.running():
            self.block.remove()
        left = self._container.mappings_in(iova=self.iova, size=2 * LENGTH)
        return not left, f"{len(left)} mappings left"


class SideBySide:
    """Resizes a block on `bdf` of `world` in each of `ways`; otherwise as `MainJob`.

    That something is lost under a remap is to be expected, not certain, and no step fails for it. `figures` are there
    when the steps have been made.
    """

    def __init__(self, bdf: str, *, world: World, ways: Sequence[Policy], iommu: str | None = None) -> None:
        self._bdf = bdf
        self._kernel = world.kernel
        self._ways = ways
        self._leftovers = Leftovers(world)
        self._sides: list[_Side] = []
        self._stack = ExitStack()
        self.facts = Facts(kernel=world.release, iommu=iommu or iommu_name(world.kernel))
        self.facts.block = {"used_length": LENGTH, "step": STEP}
        identity = pci.read_device(world.kernel, bdf)
        has_engine = (identity.vendor, identity.device) == EDU_ID
        self._is_at_work = has_engine and world.name != WorldName.FAKE
        self.notes: list[str] = []
        if not has_engine:
            self.notes.append("pyvfio cannot drive this device's DMA: whether it would lose anything is left out")
        elif not self._is_at_work:
            self.notes.append("a fake device's transfer is over at once: whether one would be lost is left out")
        if world.name == WorldName.FAKE:
            self.notes.append("the fake kernel maps nothing: its microseconds say nothing of a kernel")

    @property
    def figures(self) -> list[Figures]:
        """What was seen of each way."""
        return [side.figures for side in self._sides]

    def steps(self) -> Iterator[StepResult]:
        """Carry the steps out. Raises VfioError where the device cannot be opened."""
        with self._stack:
            yield carry_out("open the device", self._open)
            for name, step in self._plan():
                yield (result := carry_out(name, step))
                if not result.ok:
                    return
        yield carry_out("nothing is left", self._leftovers.step)

    def _plan(self) -> Iterator[tuple[str, Step]]:
        """A pair for each step, so that what belongs together stands together."""
        grown, step = LENGTH + STEP, format_size(STEP)
        for side in self._sides:
            yield f"{side.figures.policy}: map {format_size(LENGTH)}", side.add
        for side in self._sides:
            yield f"{side.figures.policy}: grow by {step}", partial(side.resize, old=LENGTH, new=grown)
        for side in self._sides:
            yield f"{side.figures.policy}: shrink by {step}", partial(side.resize, old=grown, new=LENGTH)
        for side in self._sides if self._is_at_work else ():
            yield f"{side.figures.policy}: resize while the device copies", partial(side.under_fire, self._engine)
        for side in self._sides:
            yield f"{side.figures.policy}: remove the block", side.remove

    def _open(self, clock: Clock) -> tuple[bool, str]:
        with clock.running():
            container = self._stack.enter_context(WatchedContainer(kernel=self._kernel))
            device = self._stack.enter_context(open_device(self._bdf, container=container, kernel=self._kernel))
        self.facts.iova_ranges = [(offered.start, offered.last) for offered in container.info.iova_ranges or ()]
        if self._is_at_work:
            self._prepare_engine(device)
        self._sides = [_Side(container, way, self._stack) for way in self._ways]
        return True, f"group {device.group.number}, {container.iommu_type.name}, one container for all"

    def _prepare_engine(self, device: Device) -> None:
        device.memory_enabled = True
        device.bus_master = True
        self._engine = Edu(device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
