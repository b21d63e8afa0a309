"""A comparison of the resize policies: the time of a resize, the bytes that are unmapped meanwhile, and lost copies.

All blocks are in one address space, so the kernel, the IOMMU and the device are the same. The unmapped bytes are those
of the kernel's answers to unmap calls.
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
from pyvfio.cli.main_job import Clock, Facts, Leftovers, Space, Step, StepResult, carry_out, iommu_name, note_space
from pyvfio.container import Container
from pyvfio.device import Device, open_device
from pyvfio.dma import DmaMapper
from pyvfio.extents import Extent, total, without
from pyvfio.ioas import Ioas
from pyvfio.iommu.iova_space import IovaSpace
from pyvfio.kernel import Kernel
from pyvfio.ramblock import RamBlockList
from pyvfio.testing.edu import EDU_ID, LIMIT, Edu
from pyvfio.testing.under_fire import Copies, copy_meanwhile
from pyvfio.testing.world import World, WorldName
from pyvfio.units import MIB, format_size

LENGTH, STEP = 256 * MIB, 2 * MIB
"""The length of a block, and the bytes of a resize. A granule has STEP bytes, too."""

_REPEAT = 5  # the median counts
_COPIES = 20

Policy = Literal["remap", "extend", "cut"]


class _Watched(IovaSpace):
    """An address space with a list, `unmapped`, of the IOVA ranges that the kernel has unmapped."""

    unmapped: list[Extent]

    def unmap(self, *, iova: int, size: int) -> None:
        """Unmap, and note the range."""
        super().unmap(iova=iova, size=size)
        self.unmapped.append(Extent(iova, iova + size))

    def unmap_locked(self, iova: int, size: int) -> None:
        """Unmap, and note the range."""
        super().unmap_locked(iova, size)
        self.unmapped.append(Extent(iova, iova + size))

    def cut_locked(self, iova: int, size: int) -> None:
        """Cut, and note the range."""
        super().cut_locked(iova, size)
        self.unmapped.append(Extent(iova, iova + size))


class WatchedContainer(_Watched, Container):
    """A container with a list of the unmapped ranges."""

    def __init__(self, *, kernel: Kernel) -> None:
        super().__init__(kernel=kernel)
        self.unmapped = []


class WatchedIoas(_Watched, Ioas):
    """An I/O address space with a list of the unmapped ranges. `cut`: whether mappings can be cut, by pages."""

    def __init__(self, *, kernel: Kernel, cut: bool) -> None:
        super().__init__(kernel=kernel, cut="pages" if cut else None)
        self.unmapped = []


@dataclass(slots=True)
class Figures:
    """The measurements of one policy.

    `grow`, `shrink`: medians in microseconds. `out_of_reach`: the largest number of bytes that one resize unmapped
    although the bytes stay in use. `copies`: None if no device copied.
    """

    policy: str
    grow: float = 0.0
    shrink: float = 0.0
    mappings: int = 0
    out_of_reach: int = 0
    copies: Copies | None = None


class _Side:
    """A block under one policy."""

    def __init__(self, space: WatchedContainer | WatchedIoas, resize: Policy, stack: ExitStack) -> None:
        granule = STEP if resize == "extend" else None
        self.keeps_reach = resize != "remap"
        self._cuts = resize == "cut"
        name = f"{resize}, granule={format_size(STEP)}" if granule else resize
        self.figures = Figures(name)
        self._space = space
        self._blocks = stack.enter_context(RamBlockList(kernel=space.kernel))
        self._mapper = stack.enter_context(DmaMapper(space, self._blocks, resize=resize, granule=granule))

    def add(self, clock: Clock) -> tuple[bool, str]:
        """Reserve and map the block."""
        with clock.running():
            self.block = self._blocks.add("block", used_length=LENGTH, max_length=2 * LENGTH)
        self.iova = self._mapper.iova(self.block)
        return self._is_mapped(), f"{format_size(LENGTH)} in {self._count_mappings()}, at IOVA {self.iova:#x}"

    def _is_mapped(self) -> bool:
        found = self._space.mappings_in(iova=self.iova, size=self.block.max_length)
        self.figures.mappings = len(found)
        whole = sum(mapping.size for mapping in found) == self.block.used_length
        return whole and self._mapper.iova(self.block) == self.iova

    def _count_mappings(self) -> str:
        return "1 mapping" if self.figures.mappings == 1 else f"{self.figures.mappings} mappings"

    def resize(self, clock: Clock, old: int, new: int) -> tuple[bool, str]:
        """Resize the block from `old` to `new` several times."""
        samples, held, lost = [], True, 0
        for _ in range(_REPEAT):
            if self._cuts and new < old:
                self.block.resize(new - STEP)  # the next grow is one mapping, of which the shrink cuts a half
            self.block.resize(old)
            self._space.unmapped.clear()
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
        seen = f"{format_size(lost)} of the {format_size(min(old, new))} that stay were unmapped during a resize"
        return held and not (self.keeps_reach and lost), f"{self._count_mappings()}; {seen}"

    def _unmapped_of(self, length: int) -> int:
        stays = Extent(self.iova, self.iova + length)
        return length - total(without([stays], *self._space.unmapped))

    def under_fire(self, engine: Edu, clock: Clock) -> tuple[bool, str]:
        """Resize the block without a pause while the device copies inside the block. The time is that of one resize."""
        lengths = cycle((LENGTH + STEP, LENGTH, LENGTH - STEP) if self._cuts else (LENGTH + STEP, LENGTH))

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
        """Remove the block, and check that nothing of the IOVA range is mapped."""
        with clock.running():
            self.block.remove()
        left = self._space.mappings_in(iova=self.iova, size=2 * LENGTH)
        return not left, f"{len(left)} mappings left"


class SideBySide:
    """The comparison on device `bdf` of `world`: a block for each policy in `ways`. Otherwise as `MainJob`.

    Under remap, lost copies are likely but not certain, and no step fails for a lost copy. Under granules and cuts, a
    step with a lost copy fails. Cuts need `space` "iommufd". `figures` are complete when `steps()` has ended.
    """

    def __init__(
        self,
        bdf: str,
        *,
        world: World,
        ways: Sequence[Policy],
        iommu: str | None = None,
        space: Space | None = None,
    ) -> None:
        self._bdf = bdf
        self._wanted: Space | None = space
        self._kernel = world.kernel
        self._ways = ways
        self._leftovers = Leftovers(world)
        self._sides: list[_Side] = []
        self._stack = ExitStack()
        self.facts = Facts(kernel=world.release, iommu=iommu or iommu_name(world.kernel))
        self.facts.block = {"used_length": LENGTH, "step": STEP}
        identity = pci.read_device(bdf, kernel=world.kernel)
        has_engine = (identity.vendor, identity.device) == EDU_ID
        self._is_at_work = has_engine and world.name != WorldName.FAKE
        self.notes: list[str] = []
        if not has_engine:
            self.notes.append("pyvfio cannot drive this device's DMA: lost copies are not measured")
        elif not self._is_at_work:
            self.notes.append("a fake device completes a copy at once: lost copies are not measured")
        if "cut" in ways:
            self.notes.append("the IOMMU maps pages of 4 KiB alone in this space, so that mappings can be cut")
        if world.name == WorldName.FAKE:
            self.notes.append("the fake kernel maps nothing: the microseconds are not those of a real kernel")

    @property
    def figures(self) -> list[Figures]:
        """The measurements of each policy."""
        return [side.figures for side in self._sides]

    def steps(self) -> Iterator[StepResult]:
        """Carry out the steps, and yield the results. Raises VfioError if the device cannot be opened."""
        with self._stack:
            yield carry_out("open the device", self._open)
            for name, step in self._plan():
                yield (result := carry_out(name, step))
                if not result.ok:
                    return
        yield carry_out("no locked memory and no descriptor is left", self._leftovers.step)

    def _plan(self) -> Iterator[tuple[str, Step]]:
        """Yield the name and the call of each step. Equal steps of all policies follow each other."""
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
            space: WatchedContainer | WatchedIoas
            if self._wanted == "iommufd":
                space = WatchedIoas(kernel=self._kernel, cut="cut" in self._ways)
                space.why = "the program asked for iommufd"
            else:
                space = WatchedContainer(kernel=self._kernel)
            self._stack.enter_context(space)
            device = self._stack.enter_context(open_device(self._bdf, space=space, kernel=self._kernel))
        self.facts.iova_ranges = [(offered.start, offered.last) for offered in space.iova_ranges]
        if self._is_at_work:
            self._prepare_engine(device)
        self._sides = [_Side(space, way, self._stack) for way in self._ways]
        return True, note_space(device, self.facts, self._wanted)

    def _prepare_engine(self, device: Device) -> None:
        device.memory_enabled = True
        device.bus_master = True
        self._engine = Edu(device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
