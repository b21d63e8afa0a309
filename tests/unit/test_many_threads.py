"""Eight threads make every public call on two mappers of two containers, with collections and a signal all the while.

In a child, so that a deadlock ends with the stacks of all threads, and not with the test run.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import mmap
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.testing.fake import FakeDevice, FakeKernel
from pyvfio.units import PAGE_SIZE
from tests.interruptions.public import PLAIN, calls
from tests.interruptions.scene import MOST, Listener
from tests.unit.fakes import Interrupt
from tests.unit.processes import in_child

THREADS = 8
PATIENCE = 60.0  # seconds without any call that has returned, before it counts as a deadlock
RAW = 0x70_0000_0000  # reserved in each container, for raw calls
BDFS = tuple(f"0000:00:{slot:02x}.0" for slot in range(2, 2 + 2 + THREADS))
REFUSALS = (pyvfio.VfioError, ValueError, LookupError, BufferError)
LEFT_OUT = {
    "the list of blocks calls these": """
        ram_block_added ram_block_removed ram_block_resized ram_block_discarded ram_block_populated
        ram_block_remapping ram_block_remapped
    """,
    "these take away what other threads count on": """
        unmap_all set_container unset_container set_iommu detach release_iova
    """,
    "each worker makes these with an object of its own": """
        close add remove add_notifier remove_notifier attach get_device_fd wait wait_any map_dma
        map_buffer map_region
        map_temporary mmap view disable disable_uncoordinated require require_coordinated reserve_iova reserve_iova_at
    """,
}
_left_out = {name for names in LEFT_OUT.values() for name in names.split()}


class Side:
    """A device, its container, and a mapper of its own."""

    def __init__(self, kernel: FakeKernel, bdf: str, blocks: pyvfio.RamBlockList, *, extend: bool) -> None:
        self.device = pyvfio.open_device(bdf, kernel=kernel)
        self.device.memory_enabled = True
        self.container = self.device.container
        self.container.reserve_iova_at(RAW, MOST)
        self.mapper = pyvfio.DmaMapper(self.container, blocks, resize="extend" if extend else "remap")
        self.tracking = pyvfio.DirtyTracking(self.container)
        self.irq = self.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)

    def objects(self) -> list[object]:
        """All of them."""
        return [
            self.device,
            self.container,
            self.device.group,
            self.mapper,
            self.tracking,
            self.irq,
            self.device.region(0),
        ]


class World:
    """Two sides, and one list of blocks that both follow."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.blocks = pyvfio.RamBlockList(kernel=kernel)
        self.sides = [Side(kernel, BDFS[0], self.blocks, extend=False), Side(kernel, BDFS[1], self.blocks, extend=True)]
        self.shared = [self.blocks.add(f"shared{n}", used_length=PAGE_SIZE, max_length=MOST) for n in range(2)]
        self.memory = mmap.mmap(-1, PAGE_SIZE)
        self.made = Counter[str]()
        """How often each call, and each action, was begun."""
        self.done = Counter[str]()
        """How often each action was not refused."""

    def objects(self) -> list[object]:
        """What any thread may call anything of."""
        return [*self.sides[0].objects(), *self.sides[1].objects(), self.blocks, self.blocks.discards, *self.shared]

    def check(self) -> None:
        """All that has to hold at any time."""
        self.blocks._check()
        self.blocks.discards._check()
        for side in self.sides:
            side.mapper._check()
            side.container._check()
        self.kernel.check()
        assert not self.kernel.violations

    def close(self) -> None:
        """Everything."""
        for side in self.sides:
            side.tracking.close()
            side.mapper.close()
            side.device.close()
        self.blocks.close()
        self.memory.close()


class Forgotten:
    """A buffer that a collection takes; its finalizer closes the mapping. A cycle, so that it needs one."""

    def __init__(self, mapping: pyvfio.DmaMapping) -> None:
        self.me = self
        weakref.finalize(self, mapping.close)


class Worker:
    """Makes calls at random, on the objects that all share and on its own."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        self._number = number
        self._chance = random.Random(number)  # noqa: S311 (nothing secret)
        self._block: pyvfio.RamBlock | None = None
        self._memory = mmap.mmap(-1, 8 * PAGE_SIZE)
        self.error: BaseException | None = None
        self._calls = [
            call
            for thing in world.objects()
            for call in calls(thing, {**PLAIN, **self._arguments()})
            if call.name.rpartition(".")[2] not in _left_out
        ]
        self._share = self._calls[number::THREADS]  # so that each is made, however few there are of them
        self._actions: list[Callable[[], object]] = [
            *(self._any,) * 5,
            self._resize,
            self._change,
            self._shared,
            self._map,
            self._temporary,
            self._region,
            self._forget,
            self._log,
            self._claim,
            self._raw,
            self._interrupts,
        ]

    @property
    def names(self) -> set[str]:
        """The calls that it may make."""
        return {call.name for call in self._calls}

    @property
    def actions(self) -> set[str]:
        """The actions that it may take."""
        return {"_devices", *(action.__name__ for action in self._actions)}

    def _arguments(self) -> dict[str, object]:
        world = self._world
        return {
            "block": world.shared[0],
            "buffer": world.memory,
            "tracking": world.sides[0].tracking,
            "container": world.sides[0].container,
            "group": world.sides[0].device.group,
            "iova": RAW,
            "mapper": world.sides[0].mapper,
            "memory": world.shared[0],
            "notifier": Listener(),
            "region": world.sides[0].device.region(0),
            "space": world.sides[0].container,
            "used_length": 2 * PAGE_SIZE,
            "vaddr": ctypes.addressof(ctypes.c_char.from_buffer(world.memory)),
        }

    @property
    def _side(self) -> Side:
        return self._chance.choice(self._world.sides)

    def step(self) -> None:
        """One action; what is refused is refused."""
        action = self._chance.choice(self._actions)
        self._world.made[action.__name__] += 1
        with suppress(*REFUSALS):
            action()
            self._world.done[action.__name__] += 1

    def take_steps(self, left: Iterator[int]) -> None:
        """As many as are left.

        No `try` is around the loop: CPython 3.12 and 3.13 run signal handlers where a loop begins anew, and do not
        count that place as a part of a `try` in the same function.
        """
        for _ in left:
            self.step()

    def run(self, count: int) -> None:
        """So many; what goes wrong is in `error`."""
        try:
            for _ in range(count):
                self.step()
                if self._chance.random() < 0.02:
                    self._devices()
        except BaseException as error:
            self.error = error

    # ------------------------------------------------------------------------------------------------ actions

    def _any(self) -> None:
        call = self._share.pop() if self._share else self._chance.choice(self._calls)
        self._world.made[call.name] += 1
        call.make()

    def _own(self) -> pyvfio.RamBlock:
        if self._block is None or self._block not in list(self._world.blocks):
            name = f"own{self._number}"
            found = [block for block in self._world.blocks if block.idstr == name]  # a signal came behind an add
            self._block = found[0] if found else self._world.blocks.add(name, used_length=PAGE_SIZE, max_length=MOST)
        return self._block

    def _resize(self) -> None:
        self._own().resize(self._chance.randint(0, 16) * PAGE_SIZE)

    def _change(self) -> None:
        block = self._own()
        change = self._chance.choice((block.discard, block.populate, block.remap))
        change(0, PAGE_SIZE)
        with block.view() as view:
            assert len(view) == block.used_length
        if self._chance.random() < 0.2:
            block.remove()

    def _shared(self) -> None:
        block = self._chance.choice(self._world.shared)
        block.resize(self._chance.randint(1, 16) * PAGE_SIZE)
        change = self._chance.choice((block.discard, block.populate, block.remap))
        change(0, PAGE_SIZE)

    def _part(self, page: int) -> memoryview:
        return memoryview(self._memory)[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]

    def _map(self) -> None:
        mapper = self._side.mapper
        with mapper.map_buffer(self._part(self._chance.randint(0, 3))) as mapping:
            assert mapper.translate_iova(mapping.iova, PAGE_SIZE) == mapping.vaddr
            with mapper.map_dma(vaddr=mapping.vaddr, size=PAGE_SIZE) as again:
                assert again.iova == mapping.iova

    def _temporary(self) -> None:
        mapper = self._side.mapper
        mapper.map_temporary(self._part(self._chance.randint(4, 7))).close()
        if self._chance.random() < 0.3:
            mapper.reset_temporary()

    def _region(self) -> None:
        side = self._side
        side.device.memory_enabled = True
        with self._side.mapper.map_region(side.device.region(0), 0, PAGE_SIZE) as mapping:
            assert mapping.size == PAGE_SIZE
            if self._chance.random() < 0.3:
                side.device.region(0).close()

    def _forget(self) -> None:
        Forgotten(self._side.mapper.map_buffer(mmap.mmap(-1, PAGE_SIZE)))

    def _log(self) -> None:
        blocks = self._world.blocks
        with pyvfio.DirtyLog(blocks) as log:
            block = self._chance.choice(self._world.shared)
            log.mark(block, 0, 1)
            log.snapshot(block, clear=True)
        listener = Listener()
        blocks.add_notifier(listener)
        blocks.remove_notifier(listener)

    def _claim(self) -> None:
        discards = self._world.blocks.discards
        for kind in ("disable", "disable_uncoordinated", "require", "require_coordinated"):
            with suppress(pyvfio.DiscardError):
                getattr(discards, kind)().close()

    def _raw(self) -> None:
        container = self._side.container
        container.release_iova(container.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0))
        iova = RAW + MOST * (1 + self._number)
        container.reserve_iova_at(iova, PAGE_SIZE)
        container.release_iova(iova)

    def _interrupts(self) -> None:
        irq = self._side.irq
        irq.enable(1)
        irq.trigger()
        irq.wait(timeout=0)
        irq.wait_any(timeout=0)
        irq.enable(fds=[None])
        irq.disable(0)
        irq.disable()

    def _devices(self) -> None:
        """A device of the worker's own, in a container of its own or in another's."""
        bdf = BDFS[2 + self._number]
        container = self._chance.choice((None, self._side.container))
        kernel = self._world.kernel
        self._world.made["_devices"] += 1
        with suppress(*REFUSALS), pyvfio.open_device(bdf, container=container, kernel=kernel) as device:
            device.memory_enabled = True
            with device.region(0).mmap() as mapped, mapped.view() as view:
                view[0] = 1
            self._side.mapper.map_region(device.region(0))
            device.group.check_viable()
            kernel.close(device.group.get_device_fd(bdf))
            device.reset()
            self._world.done["_devices"] += 1

    def close(self) -> None:
        """What is its own."""
        for block in list(self._world.blocks):
            if block is self._block:
                block.remove()


def _watch(world: World, over: threading.Event) -> None:
    """End the process with all stacks when no call returns any more."""
    last, since = -1, time.monotonic()
    while not over.wait(1):
        if (done := sum(world.made.values())) != last:
            last, since = done, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            print(f"no call has returned for {PATIENCE} s: a deadlock, after {done}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=2)
            os._exit(3)


class Timer:
    """A signal every 2 ms, whose handler raises once each time that it is armed."""

    def __init__(self) -> None:
        self.raised = 0
        self.armed = False
        signal.signal(signal.SIGALRM, self._handle)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.armed:
            self.armed = False
            self.raised += 1
            raise Interrupt(number)


def _work_interrupted(worker: Worker, count: int) -> int:
    """Work in the main thread. Return how often a handler has raised."""
    left, timer, working = iter(range(count)), Timer(), True
    while working:
        try:
            timer.armed = True
            worker.take_steps(left)
            working = timer.armed = False
        except Interrupt:
            continue
        except BaseException as error:
            timer.armed = False
            worker.error = error
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    return timer.raised


def _live(steps: int) -> None:
    gc.set_threshold(100)
    sys.unraisablehook = lambda _unraisable: None  # a handler may raise in a finalizer, where Python drops it
    sys.setswitchinterval(1e-4)
    groups = [(number, [FakeDevice(bdf, resettable=True)]) for number, bdf in enumerate(BDFS)]
    with FakeKernel(groups=groups) as kernel:
        world, over = World(kernel), threading.Event()
        threading.Thread(target=_watch, args=(world, over), daemon=True).start()
        workers = [Worker(world, number) for number in range(THREADS)]
        threads = [threading.Thread(target=worker.run, args=(steps // THREADS,)) for worker in workers[1:]]
        for thread in threads:
            thread.start()
        raised = _work_interrupted(workers[0], steps // THREADS)
        for thread in threads:
            thread.join()
        over.set()
        errors = [worker.error for worker in workers if worker.error is not None]
        print(f"{sum(world.made.values())} calls of {len(world.made)} kinds, {raised} interruptions", flush=True)
        if errors:
            raise ExceptionGroup("workers", [e if isinstance(e, Exception) else RuntimeError(repr(e)) for e in errors])
        assert world.made.keys() >= workers[0].names, "a call was never made"
        assert world.done.keys() >= workers[0].actions, "an action was always refused"
        world.check()
        for worker in workers:
            worker.close()
        gc.collect()
        world.check()
        world.close()
        assert kernel.mappings() == ()
        assert kernel.descriptors == ()


@pytest.mark.long
def test_eight_threads_make_every_call_and_all_is_as_it_should_be(request: pytest.FixtureRequest) -> None:
    """Also when a collection closes mappings in any of them, and a handler raises in the main thread."""
    steps = request.config.getoption("--thread-steps")
    assert in_child(lambda: _live(steps)) == 0
