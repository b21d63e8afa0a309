"""Each call that an operation makes is made to fail, or a signal handler to raise in it: nothing leaks or dangles.

The calls are found by making the operation once. What failed is then made again, or says clearly why it cannot be.
"""

from __future__ import annotations

import ctypes
import errno
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.testing.fake import Call, FakeDevice, FakeKernel
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import BDF, Interrupt, MapperFactory, Rig, SpecialKernel, nothing_left, requests

ERRNOS = (errno.ENOMEM, errno.EINVAL, errno.EFAULT, errno.EINTR, errno.EIO)
STUBBORN = (errno.ENOMEM, errno.EIO)
DEVICE = FakeDevice(BDF, resettable=True)
# Failing after they have made a descriptor they would leak it, whoever calls them; no kernel does.
GIVES_A_DESCRIPTOR = ("open", "VFIO_GROUP_GET_DEVICE_FD", "eventfd")
# These fail and have done nothing (vfio_dma_do_map, as tests/contract shows; test_memory): only a signal comes after.
ALL_OR_NOTHING = ("VFIO_IOMMU_MAP_DMA", "mprotect")


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with a device that can be reset."""
    with SpecialKernel(groups=[(2, [DEVICE])]) as made:
        yield made


@dataclass(frozen=True)
class Case:
    """One call of an operation, and how it fails; `number` is None where a signal handler raises in place of that.

    `times`: so do the next calls of that name, those of the undo among them.
    """

    position: int
    name: str
    nth: int
    number: int | None
    after: bool
    times: int = 1

    def plan(self, kernel: SpecialKernel) -> None:
        """From now on."""
        if self.number is None:
            kernel.interrupt_at(self.position, after=self.after)
        else:
            request = self.name if self.name.startswith("VFIO") else None
            call = "ioctl" if request else self.name
            for nth in range(self.nth, self.nth + self.times):
                kernel.fail(call=call, request=request, nth=nth, errno=self.number, after=self.after)


def cases(trace: list[Call]) -> Iterator[Case]:
    """Every call, each errno, before and after it took effect."""
    seen: dict[str, int] = {}
    position = 0
    for call in trace:
        name = call.request or call.call
        seen[name] = seen.get(name, 0) + 1
        interruptible = call.call in SpecialKernel.INTERRUPTIBLE
        position += interruptible
        for number in (*([None] if interruptible else []), *ERRNOS):
            for after in (False, True):
                if after and name in GIVES_A_DESCRIPTOR:
                    continue
                if after and name in ALL_OR_NOTHING and number is not None:
                    continue
                yield Case(position, name, seen[name], number, after)


def end(kernel: SpecialKernel) -> None:
    """Nothing fails any more."""
    kernel.clear_failures()
    kernel.interrupt_at(0, after=False)


# ---------------------------------------------------------------------------------------------------- open_device


@pytest.mark.parametrize("shared", [False, True], ids=["own container", "given container"])
def test_opening_leaves_nothing_open_whichever_call_fails(kernel: SpecialKernel, *, shared: bool) -> None:
    """Descriptors, mappings, the group: as before, and the device can be opened at once."""
    with nothing_left(kernel), ExitStack() as stack:
        container = stack.enter_context(pyvfio.Container(kernel=kernel)) if shared else None
        open_device = partial(pyvfio.open_device, BDF, container=container, kernel=kernel)
        kernel.clear_trace()
        with open_device():
            calls = list(kernel.trace)
        if container is not None and (group := container.group(2)):
            group.close()
        assert len(calls) >= 7
        before, count = kernel.descriptors, 0
        for case in cases(calls):
            case.plan(kernel)
            with pytest.raises((OSError, pyvfio.VfioError, Interrupt)):
                open_device()
            end(kernel)
            assert kernel.descriptors == before, case
            with open_device() as device:
                assert device.info.num_regions >= 9
            if container is not None and (group := container.group(2)):
                group.close()
            count += 1
    print(f"{count} cases")


def test_opening_leaves_nothing_open_when_a_step_of_the_undo_fails_too(kernel: SpecialKernel) -> None:
    """Whatever fails in taking apart what has been opened so far, the rest is still taken apart."""
    with nothing_left(kernel):
        with pyvfio.open_device(BDF, kernel=kernel):
            calls = list(kernel.trace)
        count = 0
        for first in cases(calls):
            if first.number != errno.EIO or first.after:
                continue
            kernel.clear_trace()
            first.plan(kernel)
            with pytest.raises((OSError, pyvfio.VfioError)):
                pyvfio.open_device(BDF, kernel=kernel)
            names = requests(kernel.trace)
            failed = next(number for number, call in enumerate(kernel.trace) if call.errno)
            for position in range(failed + 1, len(names)):
                first.plan(kernel)
                name = names[position]
                # close(2) closes, whatever it says.
                Case(0, name, names[: position + 1].count(name), errno.EIO, name == "close").plan(kernel)
                with pytest.raises((OSError, pyvfio.VfioError)):
                    pyvfio.open_device(BDF, kernel=kernel)
                end(kernel)
                assert kernel.descriptors == (), (first, name)
                count += 1
    assert count >= 10
    print(f"{count} cases")


# ---------------------------------------------------------------------------------------------------- closing


def _busy_device(kernel: FakeKernel) -> Rig:
    rig = Rig(kernel)
    rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
    rig.device.region(0).read32(0)
    rig.device.bus_master = True
    rig.add("one")
    rig.add("two", used=PAGE_SIZE)
    return rig


def test_a_step_of_closing_that_fails_does_not_keep_the_others_from_being_made(kernel: SpecialKernel) -> None:
    """The caller hears of it, and all is closed and unmapped nevertheless."""
    with nothing_left(kernel):
        rig = _busy_device(kernel)
        kernel.clear_trace()
        rig.device.close()
        calls = list(kernel.trace)
        rig.close()
        count = 0
        for case in cases(calls):
            if case.number not in (errno.EINTR, errno.EIO) or (case.name == "close" and not case.after):
                continue  # close(2) closes, whatever it says
            with nothing_left(kernel):
                rig = _busy_device(kernel)
                case.plan(kernel)
                kernel.clear_trace()
                # Another process's device may keep a group in its container, so that this one is let pass.
                failed = True
                with suppress(pyvfio.VfioError, OSError):
                    rig.device.close()
                    failed = False
                assert failed == (case.name != "VFIO_GROUP_UNSET_CONTAINER"), case
                end(kernel)
                made = [call.request or call.call for call in kernel.trace]
                for call in calls:
                    name = call.request or call.call
                    depends = {"pread": "pwrite", "VFIO_CHECK_EXTENSION": "VFIO_IOMMU_UNMAP_DMA"}.get(case.name)
                    depends = "pread pwrite" if case.name == "VFIO_DEVICE_GET_REGION_INFO" else depends
                    assert name in made or name in (depends or ""), (case, name)
                rig.mapper.close()
                rig.blocks.close()
                count += 1
    print(f"{count} cases")


# ---------------------------------------------------------------------------------------------------- the mapper


class Scene:
    """Two blocks, one of them empty, mappings of the caller's own, and temporary ones that have been given up."""

    def __init__(self, kernel: SpecialKernel, make_mapper: MapperFactory = pyvfio.DmaMapper) -> None:
        self.kernel = kernel
        self.stack = ExitStack()
        self.rig = Rig(kernel, mapper=make_mapper)
        self.block = self.rig.add("ring", used=2 * PAGE_SIZE)
        self.empty = self.rig.add("empty", used=0)
        self.holed = self.rig.add("holed", used=4 * PAGE_SIZE)
        self.holed.discard(PAGE_SIZE, PAGE_SIZE)
        self.memory = self.rig.memory(8 * PAGE_SIZE)
        self.mapping = self.rig.mapper.map_dma(vaddr=self.memory, size=PAGE_SIZE)
        self.buffers = [page_of_a_bytearray() for _ in range(3)]
        for buffer in self.buffers[:2]:
            self.rig.mapper.map_temporary(buffer).close()
        self.late: pyvfio.DmaMapper | None = None

    def late_mapper(self) -> None:
        """A second one for the same container, which is told of the blocks that there are."""
        self.late = pyvfio.DmaMapper(self.rig.container, self.rig.blocks)

    def own(self) -> object:
        """One more mapping of the caller's own."""
        return self.rig.mapper.map_dma(vaddr=self.memory + 4 * PAGE_SIZE, size=PAGE_SIZE)

    def known(self) -> set[tuple[int, int, int]]:
        """All that a device may reach: iova, vaddr, size."""
        found = set(self.rig.expected())
        mappers = [self.rig.mapper] + ([self.late] if self.late is not None else [])
        for mapper in mappers:
            found |= {(own.iova, own.vaddr, own.size) for own in mapper._own_mappings()}
        if self.late is not None:
            found |= {
                (self.late.iova(block) + part.start, block.vaddr + part.start, part.size)
                for block in self.rig.blocks
                for part in block.populated
            }
        return found

    def check(self, error: BaseException | None) -> None:
        """The invariant."""
        self.rig.check()
        reached = joined(self.rig.reached())
        for iova, _vaddr, size in reached:  # that its memory is there, the kernel's own check has seen
            # DmaFault or AssertionError where the memory is gone.
            self.kernel.dma_write(BDF, iova + size - 1, b"\1")
        if not isinstance(error, pyvfio.RollbackError | pyvfio.UnmapSizeError):
            assert all(any(map(lies_in(one), self.known())) for one in reached), "the device reaches what is not in use"
        if error is None:
            assert set(self.rig.expected()) <= reached, "the device does not reach what is in use"

    def close(self) -> None:
        """Everything."""
        self.rig.close()
        if self.late is not None:
            self.late.close()
        self.kernel.munmap(self.memory, 8 * PAGE_SIZE)
        self.stack.close()


def lies_in(part: tuple[int, int, int]) -> Callable[[tuple[int, int, int]], bool]:
    """Whether all of a mapping is part of another: for the device and for the process."""
    iova, vaddr, size = part
    return lambda whole: whole[0] <= iova and iova + size <= whole[0] + whole[2] and vaddr - iova == whole[1] - whole[0]


def joined(mappings: list[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    """Neighbours as one: iova, vaddr, size."""
    runs: list[tuple[int, int, int]] = []
    for iova, vaddr, size in mappings:
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (iova, vaddr):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + size)
        else:
            runs.append((iova, vaddr, size))
    return set(runs)


def page_of_a_bytearray() -> memoryview:
    """A buffer that begins and ends at a page."""
    backing = bytearray(2 * PAGE_SIZE)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(backing)) % PAGE_SIZE
    return memoryview(backing)[offset : offset + PAGE_SIZE]


OPERATIONS: dict[str, Callable[[Scene], object]] = {
    "add": lambda scene: scene.rig.add("new", used=3 * PAGE_SIZE),
    "add an empty block": lambda scene: scene.rig.add("new", used=0),
    "grow": lambda scene: scene.block.resize(5 * PAGE_SIZE),
    "shrink": lambda scene: scene.block.resize(PAGE_SIZE),
    "shrink to nothing": lambda scene: scene.block.resize(0),
    "grow from nothing": lambda scene: scene.empty.resize(PAGE_SIZE),
    "discard": lambda scene: scene.holed.discard(0, 3 * PAGE_SIZE),
    "populate": lambda scene: scene.holed.populate(0, 4 * PAGE_SIZE),
    "remove": lambda scene: scene.block.remove(),
    "map_dma": lambda scene: scene.own(),
    "map_buffer": lambda scene: scene.rig.mapper.map_buffer(scene.buffers[2]),
    "close a mapping": lambda scene: scene.mapping.close(),
    "map_temporary": lambda scene: scene.rig.mapper.map_temporary(scene.buffers[2]),
    "reset": lambda scene: scene.rig.mapper.reset_temporary(),
    "late mapper": lambda scene: scene.late_mapper(),
    "leave": lambda scene: scene.rig.mapper.close(),
    "close blocks": lambda scene: scene.rig.blocks.close(),
}


def _attempt(operation: Callable[[Scene], object], scene: Scene) -> BaseException | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pyvfio.MemoryNotReturnedWarning)
        try:
            operation(scene)
        except (OSError, pyvfio.VfioError, Interrupt) as error:
            return error
    return None


POLICIES: dict[str, MapperFactory] = {
    "remap": pyvfio.DmaMapper,
    "extend": partial(pyvfio.DmaMapper, resize="extend"),
    "granule": partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE),
}
# Those in which a policy shows; the others do the same under each.
RESIZES = ("add", "grow", "shrink", "shrink to nothing", "grow from nothing", "discard", "populate", "remove", "leave")


@pytest.mark.parametrize(
    ("policy", "name"),
    [(policy, name) for policy in POLICIES for name in OPERATIONS if policy == "remap" or name in RESIZES],
)
def test_the_device_never_reaches_too_much_whichever_call_fails(kernel: SpecialKernel, policy: str, name: str) -> None:
    """The operation is made or is not; after RollbackError memory is kept; what comes next works or says why not."""
    operation, count = OPERATIONS[name], 0
    with nothing_left(kernel):
        scene = Scene(kernel, POLICIES[policy])
        kernel.clear_trace()
        operation(scene)
        calls = list(kernel.trace)
        scene.check(None)
        scene.close()
        once = list(cases(calls))
        stubborn = [replace(case, times=5) for case in once if case.number in STUBBORN and not case.after]
        for case in once + stubborn:
            scene = Scene(kernel, POLICIES[policy])
            case.plan(kernel)
            error = _attempt(operation, scene)
            end(kernel)
            scene.check(error)
            if error is not None:
                again = _attempt(operation, scene)
                assert again is None or isinstance(again, pyvfio.VfioError | OSError | ValueError), (case, again)
                scene.check(error if again is None else again)
            if case.number is None:
                assert _attempt(lambda scene: scene.block.resize(6 * PAGE_SIZE), scene) is None or name in (
                    "remove",
                    "close blocks",
                ), case
            scene.close()
            kernel.check()
            count += 1
    print(f"{policy}, {name}: {count} cases")
