"""Each call that an operation makes is made to fail, or a signal handler to raise in it: nothing leaks or dangles.

The calls are found by making the operation once. What failed is then made again, or says clearly why it cannot be.
"""

from __future__ import annotations

import ctypes
import errno
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.extents import Extent
from pyvfio.mapper.held import OwnMemory
from pyvfio.memory import MemoryKind
from pyvfio.testing.fake import Call, FakeDevice, FakeKernel
from pyvfio.units import PAGE_SIZE
from tests.spaces import Cut
from tests.unit.fakes import BDF, Interrupt, MapperFactory, Rig, SpecialKernel, nothing_left, requests

ERRNOS = (errno.ENOMEM, errno.EINVAL, errno.EFAULT, errno.EINTR, errno.EIO)
STUBBORN = (errno.ENOMEM, errno.EIO)
SHORT = 0  # in place of an errno: the call succeeds, and the kernel says that it has unmapped nothing
DEVICE = FakeDevice(BDF, resettable=True)
# Failing after they have made a descriptor they would leak it, whoever calls them; no kernel does.
GIVES_A_DESCRIPTOR = ("open", "VFIO_GROUP_GET_DEVICE_FD", "eventfd", "memfd_create", "dup")
# These fail and have done nothing (vfio_dma_do_map, as tests/contract shows; test_memory): only a signal comes after.
MEMORY = ("mmap", "mprotect", "madvise", "munmap", "fallocate", "ftruncate")
ALL_OR_NOTHING = ("VFIO_IOMMU_MAP_DMA", "IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_COPY", "mprotect")
UNMAPS = ("VFIO_IOMMU_UNMAP_DMA", "IOMMU_IOAS_UNMAP")


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[SpecialKernel]:
    """A kernel with a device that can be reset, and with the kind of address space that the policy needs."""
    callspec = getattr(request.node, "callspec", None)
    iommufd = callspec is not None and callspec.params.get("policy") in IOMMUFD
    with SpecialKernel(
        "7.3" if iommufd else "6.12", groups=[(2, [DEVICE])], iommufd=iommufd, type1=not iommufd
    ) as made:
        yield made


@dataclass(frozen=True)
class Case:
    """One call of an operation, the `index`th, and how it fails.

    `number` is None where a signal handler raises in place of that, at the `position`th of the calls in which it can.
    `times`: so do the next calls of that name, those of the undo among them.
    """

    index: int
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
        elif self.number == SHORT:
            kernel.fall_short_at(self.nth)
        else:
            request = self.name if self.name.startswith(("VFIO", "IOMMU")) else None
            call = "ioctl" if request else self.name
            for nth in range(self.nth, self.nth + self.times):
                kernel.fail(call=call, request=request, nth=nth, errno=self.number, after=self.after)


def cases(trace: list[Call]) -> Iterator[Case]:
    """Every call, each errno, before and after it took effect."""
    seen: dict[str, int] = {}
    position = 0
    for index, call in enumerate(trace):
        name = call.request or call.call
        seen[name] = seen.get(name, 0) + 1
        interruptible = call.call in SpecialKernel.INTERRUPTIBLE
        position += interruptible
        if name in UNMAPS:
            yield Case(index, position, name, seen[name], SHORT, after=False)
        for number in (*([None] if interruptible else []), *ERRNOS):
            for after in (False, True):
                if after and name in GIVES_A_DESCRIPTOR:
                    continue
                if after and name in ALL_OR_NOTHING and number is not None:
                    continue
                yield Case(index, position, name, seen[name], number, after)


def end(kernel: SpecialKernel) -> None:
    """Nothing fails any more."""
    kernel.clear_failures()
    kernel.interrupt_at(0, after=False)
    kernel.fall_short_at(0)


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
                Case(0, 0, name, names[: position + 1].count(name), errno.EIO, name == "close").plan(kernel)
                with pytest.raises((OSError, pyvfio.VfioError)):
                    pyvfio.open_device(BDF, kernel=kernel)
                end(kernel)
                assert kernel.descriptors == (), (first, name)
                count += 1
    assert count >= 10
    print(f"{count} cases")


def test_a_group_that_cannot_be_attached_is_outside_as_before(kernel: SpecialKernel) -> None:
    """Or, where it would not leave, RollbackError says so; closing it takes it out in any case."""

    def attach(container: pyvfio.Container, group: pyvfio.Group) -> BaseException | None:
        try:
            container.attach(group)
        except (OSError, pyvfio.VfioError, Interrupt) as error:
            return error
        return None

    with nothing_left(kernel):
        with pyvfio.Container(kernel=kernel) as container, pyvfio.Group(2, kernel=kernel) as group:
            kernel.clear_trace()
            assert attach(container, group) is None
            calls = list(kernel.trace)
        for case in cases(calls):
            if case.number is None:
                continue  # whether the kernel has taken it nobody knows then
            for stubborn in (False, True):
                with pyvfio.Container(kernel=kernel) as container, pyvfio.Group(2, kernel=kernel) as group:
                    case.plan(kernel)
                    if stubborn:
                        kernel.fail(call="ioctl", request="VFIO_GROUP_UNSET_CONTAINER", errno=errno.EIO)
                    error = attach(container, group)
                    end(kernel)
                    assert error is not None, case
                    inside = bool(group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET)
                    taken_and_refused = case.name == "VFIO_GROUP_SET_CONTAINER" and case.after
                    assert inside == isinstance(error, pyvfio.RollbackError) or taken_and_refused, case
                    assert container.group(2) is None, case


# ---------------------------------------------------------------------------------------------------- closing


def _busy_device(kernel: FakeKernel) -> Rig:
    rig = Rig(kernel, container=pyvfio.Container(kernel=kernel))
    rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
    rig.device.region(0).read32(0)
    rig.device.bus_master = True
    rig.add("one")
    rig.add("two", used=PAGE_SIZE)
    return rig


# What is closed first; the container follows.
CLOSES: dict[str, Callable[[Rig], object]] = {
    "device": lambda rig: rig.device.close(),
    "container": lambda rig: rig.container.close(),
}
# What is not asked or written where this has failed.
DEPENDS = {
    "pread": "pwrite",
    "VFIO_CHECK_EXTENSION": "VFIO_IOMMU_UNMAP_DMA",
    "VFIO_DEVICE_GET_REGION_INFO": "pread pwrite",
}


def _close(rig: Rig, close: Callable[[Rig], object]) -> bool:
    """And the container; whether either said that something failed."""
    failed = False
    for step in (close, CLOSES["container"]):
        try:
            step(rig)
        except (pyvfio.VfioError, OSError):
            failed = True
    return failed


@pytest.mark.parametrize("what", CLOSES)
def test_nothing_is_under_way_when_mappings_go_and_none_is_left_to_the_kernel(kernel: SpecialKernel, what: str) -> None:
    """The device is kept from the bus, then reset; mappings are taken away before the group leaves."""
    with nothing_left(kernel):
        rig = _busy_device(kernel)
        kernel.clear_trace()
        assert not _close(rig, CLOSES[what])
        made = requests(kernel.trace)
        steps = ["pwrite", "VFIO_DEVICE_RESET", "VFIO_IOMMU_UNMAP_DMA", "VFIO_GROUP_UNSET_CONTAINER"]
        assert sorted(steps, key=made.index) == steps
        rig.close()


@pytest.mark.parametrize("what", CLOSES)
def test_a_step_of_closing_that_fails_does_not_keep_the_others_from_being_made(
    kernel: SpecialKernel, what: str
) -> None:
    """The caller hears of it, and all is closed and unmapped nevertheless."""
    with nothing_left(kernel):
        rig = _busy_device(kernel)
        kernel.clear_trace()
        assert not _close(rig, CLOSES[what])
        calls = list(kernel.trace)
        rig.close()
        once = [case for case in cases(calls) if case.number in (errno.EINTR, errno.EIO)]
        stubborn = [replace(case, times=5) for case in once if "UNMAP" in case.name and not case.after]
        for case in once + stubborn:
            if case.name == "close" and not case.after:
                continue  # close(2) closes, whatever it says
            with nothing_left(kernel):
                rig = _busy_device(kernel)
                case.plan(kernel)
                kernel.clear_trace()
                # Another process's device may keep a group in its container, so that this one is let pass.
                assert _close(rig, CLOSES[what]) == (case.name != "VFIO_GROUP_UNSET_CONTAINER"), case
                end(kernel)
                made = requests(kernel.trace)
                for name in requests(calls):
                    assert name in made or name in DEPENDS.get(case.name, ""), (case, name)
                assert rig.container.mappings == (), (case, "what went with the group is taken for mapped")
                rig.mapper.close()
                rig.blocks.close()
    print(f"{len(once + stubborn)} cases")


# ---------------------------------------------------------------------------------------------------- the mapper


class Scene:
    """Two blocks, one of them empty, mappings of the caller's own, and temporary ones that have been given up."""

    def __init__(
        self,
        kernel: SpecialKernel,
        make_mapper: MapperFactory = pyvfio.DmaMapper,
        memory: MemoryKind | None = None,
        cut: Cut = None,
    ) -> None:
        self.kernel = kernel
        self.stack = ExitStack()
        space = None if cut is None else pyvfio.Ioas(kernel=kernel, cut=cut)
        self.rig = Rig(kernel, mapper=make_mapper, container=space, memory=memory)
        if space is not None:
            self.stack.callback(space.close)
        self.block = self.rig.add("ring", used=2 * PAGE_SIZE)
        self.empty = self.rig.add("empty", used=0)
        self.holed = self.rig.add("holed", used=4 * PAGE_SIZE)
        for block in (self.block, self.holed):
            with block.view() as view:
                view[:] = b"\xaa" * len(view)
        self.holed.discard(PAGE_SIZE, PAGE_SIZE)
        self.memory = self.rig.memory(8 * PAGE_SIZE)
        self.mapping = self.rig.mapper.map_dma(vaddr=self.memory, size=PAGE_SIZE)
        self.buffers = [page_of_a_bytearray() for _ in range(3)]
        for buffer in self.buffers[:2]:
            self.rig.mapper.map_temporary(buffer).close()
        self.late: pyvfio.DmaMapper | None = None

    def late_mapper(self) -> None:
        """A second one for the same container, which is told of the blocks that there are."""
        self.late = pyvfio.DmaMapper(self.rig.space, self.rig.blocks)

    def own(self) -> object:
        """One more mapping of the caller's own."""
        return self.rig.mapper.map_dma(vaddr=self.memory + 4 * PAGE_SIZE, size=PAGE_SIZE)

    def known(self) -> set[tuple[int, int, int]]:
        """All that a device may reach: iova, vaddr, size."""
        found = set(self.rig.expected())
        mappers = [self.rig.mapper] + ([self.late] if self.late is not None else [])
        for mapper in mappers:
            found |= {(own.iova, own.vaddr, own.size) for own in mapper.buffers()}
        if self.late is not None:
            found |= {
                (self.late.iova(block) + part.start, block.vaddr + part.start, part.size)
                for block in self.rig.blocks
                for part in block.populated
            }
        return found

    def blocks(self) -> dict[str, tuple[int, tuple[Extent, ...]]]:
        """What there is, by its id string: length, discarded parts."""
        return {block.idstr: (block.used_length, block.discarded) for block in self.rig.blocks}

    def reserved(self) -> list[tuple[int, int]]:
        """The IOVA that must be taken: iova, size."""
        following = [mapper for mapper in (self.rig.mapper, self.late) if mapper is not None and mapper.blocks]
        windows = [(mapper.iova(block), block.max_length) for mapper in following for block in self.rig.blocks]
        return sorted([*windows, *((own.iova, own.size) for own in self.own_mappings())])

    def own_mappings(self) -> list[OwnMemory]:
        """Those that are no blocks'."""
        return [own for mapper in (self.rig.mapper, self.late) if mapper is not None for own in mapper.buffers()]

    def check(self, error: BaseException | None, *, exact: bool = True) -> None:
        """The invariant; unless it is `exact`, the kernel may have taken away what it said it had not."""
        self.kernel.check()
        self.rig.blocks._check()
        self.rig.space._check()
        if not keeps_memory(error):
            self.rig.mapper._check()
        reached = joined(self.rig.reached())
        for iova, _vaddr, size in reached:  # that its memory is there, the kernel's own check has seen
            # DmaFault or AssertionError where the memory is gone.
            self.kernel.dma_write(BDF, iova + size - 1, b"\1")
        taken = self.rig.space.allocator.reservations
        for iova, _vaddr, size in self.rig.reached():
            assert any(place.start <= iova and iova + size - 1 <= place.last for place in taken), "IOVA was given back"
        for own in self.own_mappings():
            view = own.export if isinstance(own.export, memoryview | None) else own.export.view
            assert view is None or view.nbytes >= own.size, "a buffer was given back"
        if keeps_memory(error):
            return
        assert all(any(map(lies_in(one), self.known())) for one in reached), "the device reaches what is not in use"
        if exact:
            assert set(self.rig.expected()) <= reached, "the device does not reach what is in use"
        if exact and not isinstance(error, Interrupt):
            for own in self.own_mappings():
                assert any(map(lies_in((own.iova, own.vaddr, own.size)), reached)), "what is known is not there"
        assert [(place.start, place.size) for place in taken] == self.reserved(), "IOVA is lost"

    def renew_buffer(self) -> None:
        """Another one in place of the buffer that was not mapped."""
        self.buffers[2].release()
        self.buffers[2] = page_of_a_bytearray()

    def check_buffer(self) -> None:
        """The buffer that was not mapped is not exported, though the exception is still there."""
        backing = self.buffers[2].obj
        assert isinstance(backing, bytearray)
        self.renew_buffer()
        backing.append(0)

    def check_memory(self) -> None:
        """What blocks are grown by, and what is populated again, reads zeros, whatever was there."""
        for block in tuple(self.rig.blocks):
            length, parts = block.used_length, block.discarded
            if _attempt(lambda _scene: block.resize(8 * PAGE_SIZE), self) is not None:  # noqa: B023
                continue  # RollbackError leaves some that only go
            block.populate(0, length)
            with block.view() as view:
                for start, end in (*parts, (length, 8 * PAGE_SIZE)):
                    zeros = bytes(end - start)
                    assert bytes(view[start:end]) == zeros, (block.idstr, hex(start), "holds what was there before")

    def close(self) -> None:
        """Everything; and all that was lent is back."""
        self.rig.close()
        if self.late is not None:
            self.late.close()
        self.kernel.munmap(self.memory, 8 * PAGE_SIZE)
        for buffer in self.buffers:
            buffer.release()  # BufferError while it is exported
        for claim in (self.rig.blocks.discards.disable, self.rig.blocks.discards.require):
            claim().close()  # DiscardError where another one stands
        self.stack.close()


def keeps_memory(error: BaseException | None) -> bool:
    """Whether nobody knows what a device still reaches."""
    return isinstance(error, pyvfio.RollbackError | pyvfio.UnmapSizeError)


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
    "replace pages": lambda scene: scene.holed.remap(0, 3 * PAGE_SIZE),
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
    "prefault": partial(pyvfio.DmaMapper, prefault=1),
    "memfd": pyvfio.DmaMapper,
    "iommufd": pyvfio.DmaMapper,
    "cut": partial(pyvfio.DmaMapper, resize="cut"),
    "cut by replacing": partial(pyvfio.DmaMapper, resize="cut"),
}
MEMORIES = {"memfd": pyvfio.Memfd()}
IOMMUFD: dict[str, Cut] = {"iommufd": None, "cut": "pages", "cut by replacing": "replace"}
# Those in which a policy shows; the others do the same under each.
RESIZES = (
    *("add", "grow", "shrink", "shrink to nothing", "grow from nothing"),
    *("discard", "populate", "replace pages", "remove", "leave"),
)


POPULATES = ("add", "grow", "populate")
CUTS = ("shrink", "shrink to nothing", "discard", "replace pages", "remove", "leave")
SHOWN_BY = {
    "remap": tuple(OPERATIONS),
    **dict.fromkeys(("extend", "granule", "memfd"), RESIZES),
    "prefault": POPULATES,
    "iommufd": tuple(OPERATIONS),
    **dict.fromkeys(("cut", "cut by replacing"), CUTS),
}
SCENES = [(policy, name) for policy, names in SHOWN_BY.items() for name in names]


def _trace_of(kernel: SpecialKernel, policy: str, name: str) -> list[Call]:
    """What an operation calls when nothing fails."""
    scene = Scene(kernel, POLICIES[policy], MEMORIES.get(policy), IOMMUFD.get(policy))
    kernel.clear_trace()
    OPERATIONS[name](scene)
    calls = list(kernel.trace)
    scene.check(None)
    scene.close()
    return calls


def _is_exact(plans: Sequence[Case]) -> bool:
    """Whether what is known to be mapped is; not where the kernel refused and did it, nor where it was asked after a
    signal whether it had done it, and refused to say."""
    lied = any(plan.name in UNMAPS and plan.after and plan.number for plan in plans)
    return not lied and not (plans[0].number is None and len(plans) > 1)


def _check_refusal(scene: Scene, before: object, error: BaseException | None, plans: Sequence[Case]) -> None:
    """What was refused has changed nothing."""
    if error is None or keeps_memory(error):
        return
    if isinstance(error, Interrupt):
        scene.renew_buffer()
        return  # it may have come when all was done
    scene.check_buffer()
    assert scene.blocks() == before, (plans, "the blocks are not as they were")
    if not any(plan.name in MEMORY for plan in plans):
        assert all(block.state.memory.retained == 0 for block in scene.rig.blocks), (plans, "memory is kept")


_MADE: dict[tuple[str, str, Case], tuple[str, ...]] = {}
"""The calls, by name, of operations in which that alone failed, and of which all has been looked at."""


def _fail_once(kernel: SpecialKernel, policy: str, name: str, case: Case) -> tuple[str, ...]:
    """As `_fail`, unless another test has."""
    if (policy, name, case) not in _MADE:
        _MADE[policy, name, case] = _fail(kernel, policy, name, case)
    return _MADE[policy, name, case]


def _fail(kernel: SpecialKernel, policy: str, name: str, *plans: Case) -> tuple[str, ...]:
    """Make an operation while that fails, and look at what it leaves; the calls that it made, by name."""
    operation, areas, exact = OPERATIONS[name], list(kernel.areas), _is_exact(plans)
    scene = Scene(kernel, POLICIES[policy], MEMORIES.get(policy), IOMMUFD.get(policy))
    before = scene.blocks()
    kernel.clear_trace()
    for plan in plans:
        plan.plan(kernel)
    error = _attempt(operation, scene)
    names = tuple(requests(kernel.trace))
    end(kernel)
    scene.check(error, exact=exact)
    _check_refusal(scene, before if name != "close blocks" else scene.blocks(), error, plans)
    if error is not None:
        again = _attempt(operation, scene)
        assert again is None or isinstance(again, pyvfio.VfioError | OSError | ValueError), (plans, again)
        scene.check(error if again is None else again, exact=exact)
    if plans[-1].number is None and name not in ("remove", "close blocks"):
        assert _attempt(lambda scene: scene.block.resize(6 * PAGE_SIZE), scene) is None, plans
    scene.check_memory()
    scene.close()
    kernel.check()
    # What a signal handler ended may be given back or not, so that nobody may give it back; so it is with an errno.
    if not keeps_memory(error) and not any(plan.number is None or plan.name in ("mmap", "munmap") for plan in plans):
        assert kernel.areas == areas, (plans, "address space is lost")
    kernel.areas = areas
    return names


@pytest.mark.scene
@pytest.mark.parametrize(("policy", "name"), SCENES)
def test_the_device_never_reaches_too_much_whichever_call_fails(kernel: SpecialKernel, policy: str, name: str) -> None:
    """The operation is made or is not; after RollbackError memory is kept; what comes next works or says why not."""
    with nothing_left(kernel):
        count = 0
        for case in cases(_trace_of(kernel, policy, name)):
            later = _fail_once(kernel, policy, name, case)[case.index + 1 :]
            count += 1
            # Without another call of that name, there is none to fail a second time.
            if case.number in STUBBORN and not case.after and case.name in later:
                _fail(kernel, policy, name, replace(case, times=5))
                count += 1
    print(f"{policy}, {name}: {count} cases")


@pytest.mark.parametrize(("policy", "name"), SCENES)
def test_the_device_never_reaches_too_much_when_a_step_of_the_undo_fails_too(
    kernel: SpecialKernel, policy: str, name: str
) -> None:
    """Each call that is made after the one that failed, those in which nothing is undone among them."""
    count = 0
    with nothing_left(kernel):
        for first in cases(_trace_of(kernel, policy, name)):
            if first.number not in (None, errno.EIO):
                continue
            names = _fail_once(kernel, policy, name, first)
            undo = first.index + (first.number is not None or first.after)
            for position in range(undo, len(names)):
                nth = names[: position + 1].count(names[position])
                second = Case(position, 0, names[position], nth, errno.EIO, after=False)
                later = _fail(kernel, policy, name, first, second)[position + 1 :]
                count += 1
                if second.name in UNMAPS and second.name in later:
                    _fail(kernel, policy, name, first, replace(second, times=5))
                    count += 1
    print(f"{policy}, {name}: {count} cases")
