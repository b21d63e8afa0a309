"""A child that is forked while another thread holds a lock: each public call is ForkedError, or does nothing."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import IoctlArgument, Kernel
from pyvfio.units import PAGE_SIZE
from tests.interruptions.public import Call, World, stateful
from tests.interruptions.scene import MOST, Listener, SeenKernel
from tests.unit.processes import in_child

_PATIENCE = 10.0  # seconds before a child counts as waiting for a lock for ever
_CHANGES = frozenset(
    name
    for name in dir(Kernel)
    if not name.startswith("_") and name not in ("dev", "proc", "sysfs", "memlock", "file_status")
)
"""The system calls that a child may not make."""


class Pause:
    """A thread waits here, when it is told to, until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.left = threading.Event()
        self.on = False

    def __call__(self, *_arguments: object) -> None:
        if self.on:
            self.entered.set()
            self.left.wait()


class PausingKernel(SeenKernel):
    """A kernel whose `request` waits. `calls` has the names of the calls that change something."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pause = Pause()
        self.request = 0
        super().__init__()

    def __getattribute__(self, name: str) -> object:
        if name in _CHANGES:
            self.calls.append(name)
        return super().__getattribute__(name)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Wait first."""
        if request == self.request:
            self.pause()
        return super().ioctl(fd, request, argument)


class PausingListener(Listener):
    """A notifier whose hook waits."""

    def __init__(self, pause: Pause) -> None:
        super().__init__()
        self._pause = pause

    def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """Wait."""
        super().ram_block_added(block, used_length, max_length)
        self._pause()


def _hold_list(world: World, kernel: PausingKernel) -> Callable[[], object]:
    """A hook waits."""
    world.blocks.add_notifier(PausingListener(kernel.pause))
    return lambda: world.blocks.add("held", used_length=PAGE_SIZE, max_length=MOST)


def _hold_mapper(world: World, kernel: PausingKernel) -> Callable[[], object]:
    """A progress callback waits."""
    return lambda: world.blocks.add("held", used_length=PAGE_SIZE, max_length=MOST)


def _hold_container(world: World, kernel: PausingKernel) -> Callable[[], object]:
    """A map waits in the kernel."""
    kernel.request = ioctls.VFIO_IOMMU_MAP_DMA
    return lambda: world.mapper.map_buffer(world.buffer)


def _hold_group(world: World, kernel: PausingKernel) -> Callable[[], object]:
    """A look at a group waits in the kernel."""
    kernel.request = ioctls.VFIO_GROUP_GET_STATUS
    return world.device.group.check_viable


def _hold_device(world: World, kernel: PausingKernel) -> Callable[[], object]:
    """Interrupts wait in the kernel."""
    kernel.request = ioctls.VFIO_DEVICE_SET_IRQS
    return world.irq.disable


def _hold_tracking(world: World, kernel: PausingKernel) -> Callable[[], object]:
    """A question for dirty pages waits in the kernel."""
    kernel.request = ioctls.VFIO_IOMMU_DIRTY_PAGES
    return lambda: world.log.collect(world.ring, world.tracking, world.mapper)


HOLDERS = (_hold_list, _hold_mapper, _hold_container, _hold_group, _hold_device, _hold_tracking)


@contextmanager
def held(kernel: PausingKernel, action: Callable[[], object]) -> Iterator[None]:
    """Another thread is in the middle of it."""
    kernel.pause.on = True
    worker = threading.Thread(target=action)
    worker.start()
    assert kernel.pause.entered.wait(_PATIENCE)
    try:
        yield
    finally:
        kernel.pause.on = False
        kernel.pause.left.set()
        worker.join()
        kernel.request = 0


def _judge(call: Call, kernel: PausingKernel) -> str:
    """What is wrong with a call in a child, in words."""
    kernel.calls.clear()
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
    try:
        call.make()
    except pyvfio.ForkedError:
        return ""
    except BaseException as error:
        return f"{call.name}: {type(error).__name__}: {error}\n"
    return f"{call.name}: calls {' '.join(kernel.calls)}\n" if kernel.calls else ""


def failures_in_child(calls: list[Call], kernel: PausingKernel) -> str:
    """What is wrong with the calls in a child. A child that waits for a lock is killed by its alarm."""
    with tempfile.TemporaryFile("w+") as report:

        def child() -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            for call in calls:
                position = report.tell()
                report.write(f"{call.name} waits for ever\n")
                report.flush()
                wrong = _judge(call, kernel)
                report.seek(position)
                report.truncate()
                report.write(wrong)
                report.flush()
            os._exit(0)

        in_child(child)
        report.seek(0)
        return report.read()


@pytest.mark.parametrize("hold", HOLDERS, ids=lambda hold: str(hold.__name__).removeprefix("_hold_"))
def test_in_a_child_each_call_is_refused_or_does_nothing_whatever_lock_is_held(
    hold: Callable[[World, PausingKernel], Callable[[], object]],
) -> None:
    """Also a close, and a look."""
    with PausingKernel() as kernel:
        world = World(kernel, progress=kernel.pause)
        calls = world.calls()
        with held(kernel, hold(world, kernel)):
            wrong = failures_in_child(calls, kernel)
        world.close()
        assert not kernel.mappings()
    print(f"{len(calls)} calls")
    assert not wrong, wrong


def test_there_is_an_object_of_each_class_that_has_state() -> None:
    """A class that is new has to be added to the world, or to those that have none."""
    with PausingKernel() as kernel:
        world = World(kernel)
        kinds = {type(thing) for thing in world.objects()}
        world.close()
    assert {kind.__name__ for kind in stateful()} <= {kind.__name__ for kind in kinds}
