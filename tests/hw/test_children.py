"""Children of a process that has a device: what they get of it, and what the parent keeps."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB
from tests.hw.rig import SIZE, Rig
from tests.spaces import descriptors_of
from tests.unit.processes import in_child, open_fds

# What it has open, a line each, and an empty one; then it waits until its input ends.
PROGRAM = """
import os, sys
for name in os.listdir("/proc/self/fd"):
    if os.path.lexists(f"/proc/self/fd/{name}"):
        print(os.readlink(f"/proc/self/fd/{name}"))
print(flush=True)
sys.stdin.read()
"""
COMMAND = (sys.executable, "-I", "-S", "-c", PROGRAM)  # it needs no more, and starts in a third of the time


@contextmanager
def by_subprocess() -> Iterator[Callable[[], str]]:
    """fork and exec, with every descriptor that is not close-on-exec."""
    with subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, close_fds=False) as child:
        assert child.stdout is not None
        yield child.stdout.readline
    assert child.returncode == 0


@contextmanager
def by_spawn() -> Iterator[Callable[[], str]]:
    """posix_spawn(3), which takes every descriptor along that is not close-on-exec."""
    (stdin, tell), (hear, stdout) = os.pipe(), os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)]
    pid = os.posix_spawn(COMMAND[0], COMMAND, os.environ, file_actions=actions)
    os.close(stdin)
    os.close(stdout)
    with open(hear, encoding="utf-8") as said:
        yield said.readline
    os.close(tell)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("start", [by_subprocess, by_spawn])
def test_a_program_that_is_started_gets_no_descriptor_and_the_device_goes_on(
    engine_bdfs: tuple[str, ...], world: World, start: Callable[[], AbstractContextManager[Callable[[], str]]]
) -> None:
    """Not of the address space, its owner, the device or an interrupt; one that is inheritable it does get."""
    before = set(open_fds().values())
    with Rig(engine_bdfs[0], kernel=world.kernel) as rig, tempfile.NamedTemporaryFile() as inheritable:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
        fds = rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
        mine = {open_fds()[fd] for fd in (*descriptors_of(rig.device), *fds)}
        os.set_inheritable(inheritable.fileno(), True)  # noqa: FBT003
        with start() as read_line:
            theirs = set(iter(lambda: read_line().rstrip("\n"), ""))
            assert inheritable.name in theirs
            assert not theirs & (mine - before)
            assert mine - before
            block.resize(4 * MIB)
            assert rig.reaches(block, 4 * MIB - SIZE)
        assert rig.reaches(block, 0)


@pytest.mark.real_kernel("a fake refuses all calls in a child")
def test_a_child_reaches_neither_the_memory_nor_the_device_and_takes_nothing_with_it(rig: Rig) -> None:
    """Closing does nothing there: the parent's device goes on."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    mappings = rig.space.mappings

    def child() -> None:
        for use in (
            lambda: block.resize(4 * MIB),
            lambda: rig.space.unmap(iova=rig.mapper.iova(block), size=2 * MIB),
            lambda: rig.device.region(0).read32(0),
            block.view,
        ):
            with pytest.raises(pyvfio.ForkedError, match=f"{os.getppid()}.*{os.getpid()}"):
                use()
        rig.mapper.close()
        rig.blocks.close()
        rig.space.close()

    assert in_child(child) == 0
    assert in_child(lambda: os.pread(os.open("/proc/self/mem", os.O_RDONLY), 1, block.vaddr)) == 1
    assert rig.space.mappings == mappings
    assert rig.reaches(block, 2 * MIB - SIZE)
    block.resize(4 * MIB)
    assert rig.reaches(block, 4 * MIB - SIZE)


def test_finalizers_in_a_child_close_and_unmap_nothing(engine_bdfs: tuple[str, ...], world: World) -> None:
    """Though nobody has closed anything there, and nobody can any more."""
    rigs = [Rig(engine_bdfs[0], kernel=world.kernel)]
    rigs[0].blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    mine = set(descriptors_of(rigs[0].device))

    def child() -> None:
        device = weakref.ref(rigs[0].device)
        rigs.clear()
        gc.collect()
        assert device() is None
        assert mine <= set(open_fds())

    assert in_child(child) == 0
    with rigs[0] as rig:
        assert rig.reaches(rig.blocks["ring"], 2 * MIB - SIZE)
        rig.blocks["ring"].resize(4 * MIB)
        assert rig.reaches(rig.blocks["ring"], 4 * MIB - SIZE)


@pytest.mark.real_kernel("the group of a fake is in one process, and no child keeps the group")
def test_a_child_that_lives_keeps_the_device_from_others_and_nothing_else(
    engine_bdfs: tuple[str, ...], world: World
) -> None:
    """It is named as the holder; what was mapped is unmapped and unlocked nevertheless."""
    locked = world.locked_bytes()
    with Rig(engine_bdfs[0], kernel=world.kernel) as rig:
        rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
        pid = os.fork()
        if not pid:
            try:
                signal.pause()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    try:
        assert world.locked_bytes() == locked
        with pytest.raises(pyvfio.GroupBusyError) as caught:
            pyvfio.open_device(engine_bdfs[0], kernel=world.kernel)
        assert [holder.pid for holder in caught.value.holders] == [pid]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with Rig(engine_bdfs[0], kernel=world.kernel) as rig:
        assert rig.reaches(rig.blocks.add("ring", used_length=MIB, max_length=MIB), 0)
