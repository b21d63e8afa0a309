"""A device at work while an address space of iommufd goes to another process: what is lost of its transfers, and to
which process the memory is charged.

Collected on kernels with IOMMU_IOAS_CHANGE_PROCESS alone: `scripts/vm --kernel 7+iommufd`.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, Self

import pytest

import pyvfio
from pyvfio import Memfd, hand_over, ioctls, take_over
from pyvfio import iommufd_ioctls as abi
from pyvfio.kernel import IoctlArgument, Kernel, LinuxKernel
from pyvfio.testing.edu import Edu
from pyvfio.testing.probe import DmaProbe, pattern
from pyvfio.testing.world import LinuxWorld, World
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import SIZE
from tests.hw.successor import USED, Taker, charged
from tests.hw.test_live_update import Helper, Witness

Cut = Literal["pages", "replace"] | None
MODES = pytest.mark.parametrize("by_process", [False, True], ids=["by user", "by process"])
WARNED = 1 << 9
"""The bit of /proc/sys/kernel/tainted that a WARNING of the kernel sets."""


def changes_process() -> bool:
    """Whether the running kernel has the call."""
    try:
        with pyvfio.Iommufd() as iommufd:
            iommufd.ioas_change_process()
    except pyvfio.VfioError:
        return False
    return True


__test__ = changes_process()
pytestmark = pytest.mark.real_kernel("a fake is in one process, and other processes have no access")


@contextmanager
def without_warning() -> Iterator[None]:
    """The kernel warns of nothing meanwhile."""
    tainted = Path("/proc/sys/kernel/tainted")
    before = int(tainted.read_text(encoding="ascii")) & WARNED
    yield
    assert int(tainted.read_text(encoding="ascii")) & WARNED == before


class Rig:
    """A device in an address space of an iommufd, a desk to look at its buffer, and a block in three pieces."""

    def __init__(self, bdf: str, kernel: Kernel, *, by_process: bool, cut: Cut = None) -> None:
        with ExitStack() as stack:
            iommufd = stack.enter_context(pyvfio.Iommufd(kernel=kernel))
            iommufd.set_counts_by_process(enabled=by_process)
            self.iommufd = iommufd
            self.space = stack.enter_context(pyvfio.Ioas(iommufd, cut=cut))
            self.device = stack.enter_context(pyvfio.open_device(bdf, space=self.space))
            self.device.memory_enabled = True
            self.device.bus_master = True
            self.engine = Edu(self.device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
            self.blocks = stack.enter_context(pyvfio.RamBlockList(kernel=kernel))
            resize: Literal["cut", "extend"] = "cut" if cut else "extend"
            self.mapper = stack.enter_context(pyvfio.DmaMapper(self.space, self.blocks, resize=resize))
            desk = self.blocks.add("desk", used_length=PAGE_SIZE, max_length=PAGE_SIZE, memory=Memfd())
            self._probe = DmaProbe(self.engine, desk=desk, iova=self.mapper.iova(desk))
            self.ring = self.blocks.add("ring", used_length=MIB, max_length=64 * MIB, memory=Memfd())
            self.ring.resize(2 * MIB)
            self.ring.resize(USED)
            self.iova = self.mapper.iova(self.ring)
            self._stack = stack.pop_all()

    def reaches(self, offset: int) -> bool:
        """Whether the device reads what is written at `offset` of the block."""
        there = pattern(SIZE)
        with self.ring.view() as view:
            view[offset : offset + SIZE] = there
        return self._probe.read(self.iova + offset, SIZE) == there

    def is_stopped(self, offset: int) -> bool:
        """Whether the device is stopped there."""
        return self._probe.read(self.iova + offset, SIZE) is None

    def witness(self) -> Witness:
        """The device at work inside the block."""
        assert self.ring.file is not None
        return Witness(self.space.kernel, device_fd=self.device.fd, memory_fd=self.ring.file.fd, iova=self.iova)

    def check(self) -> None:
        """The block can be resized as ever, and the device with it."""
        self.mapper._check()
        self.ring.resize(8 * MIB)
        assert self.reaches(8 * MIB - SIZE)
        self.ring.resize(PAGE_SIZE)
        assert self.reaches(0)
        assert self.is_stopped(PAGE_SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """One in which memory is charged: nothing is, for a process that may lock any amount."""
    former = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (GIB, GIB))
    try:
        with world.memlock_limit(GIB):
            yield world
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, former)


# ------------------------------------------------------------------------------------------------------ two processes


def _takes_all(helper: Helper, state: bytes, fds: list[int]) -> None:
    assert charged() == (0, 0)
    with take_over(state, fds) as taken:
        helper.say(repr(charged()).encode())
        iova = int(helper.ask())  # the old process has closed everything
        assert Taker(taken).hears(raised=2)
        Taker(taken).check(iova)
        helper.say(b"checked")
    assert charged() == (0, 0)


@MODES
@pytest.mark.parametrize("cut", [None, "pages", "replace"])
def test_another_process_takes_over_and_no_transfer_is_lost(
    engine_bdfs: tuple[str, ...], world: World, cut: Cut, *, by_process: bool
) -> None:
    """It is charged for what is pinned, and the old process no more; it hears of interrupts, grows, shrinks, closes."""
    helper, before = Helper(_takes_all), charged()
    with without_warning(), Rig(engine_bdfs[0], world.kernel, by_process=by_process, cut=cut) as rig:
        pinned, locked = (now - then for now, then in zip(charged(), before, strict=True))
        assert (pinned, locked) == (USED + PAGE_SIZE, (USED + PAGE_SIZE) * by_process)
        own = os.eventfd(0, os.EFD_NONBLOCK)
        rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(fds=[own])
        rig.engine.raise_interrupt()
        witness = rig.witness()
        try:
            with hand_over(rig.mapper) as update:
                rig.engine.raise_interrupt()
                helper.send(update)
                assert helper.hear() == repr((pinned, locked)).encode()
                witness.wait()
                assert charged() == before
                update.finish()
                rig.blocks.close()
                rig.space.close()
                rig.iommufd.close()
                witness.wait()
        finally:
            copies = witness.stop()
        assert copies.lost == 0
        assert copies.made > 5
        os.close(own)
        helper.tell(b"%d" % rig.iova)
        assert helper.hear() == b"checked"
    assert helper.ended() == 0
    assert charged() == before
    with pyvfio.open_device(engine_bdfs[0], iommu="iommufd"):
        pass


class _Mortal(LinuxKernel):
    """The process dies in IOMMU_IOAS_CHANGE_PROCESS, before or after it."""

    def __init__(self, *, after: bool) -> None:
        super().__init__()
        self._after = after

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        if request != abi.IOMMU_IOAS_CHANGE_PROCESS:
            return super().ioctl(fd, request, argument)
        if self._after:
            super().ioctl(fd, request, argument)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


@MODES
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_new_process_that_dies_takes_nothing_with_it(
    engine_bdfs: tuple[str, ...], world: World, *, after: bool, by_process: bool
) -> None:
    """No transfer, and by user not the charge either. By process the memory stays without one, and without a warning of
    the kernel; it can be handed over nevertheless."""
    helper = Helper(lambda _helper, state, fds: take_over(state, fds, kernel=_Mortal(after=after)).close())
    second = Helper(_takes_rest)
    with without_warning(), Rig(engine_bdfs[0], world.kernel, by_process=by_process) as rig:
        before, witness = charged(), rig.witness()
        try:
            with hand_over(rig.mapper) as update:
                helper.send(update)
                assert helper.hear() == b""
                assert helper.ended() == -signal.SIGKILL
                assert (charged() == before) == (not after)
                witness.wait()
            witness.wait()
        finally:
            copies = witness.stop()
        assert copies.lost == 0
        assert (charged() == before) == (not (after and by_process))
        rig.ring.resize(8 * MIB)
        assert rig.reaches(8 * MIB - SIZE)
        with hand_over(rig.mapper) as update:
            second.send(update)
            assert second.hear() == b"taken"
            update.finish()
        second.tell(b"go")
        assert second.ended() == 0


def _takes_rest(helper: Helper, state: bytes, fds: list[int]) -> None:
    with take_over(state, fds) as taken:
        helper.say(b"taken")
        assert helper.ask() == b"go"
        assert Taker(taken).reaches(8 * MIB - SIZE)


def _may_lock_too_little(helper: Helper, state: bytes, fds: list[int]) -> None:
    with LinuxWorld(()).memlock_limit(2 * MIB), pytest.raises(pyvfio.PinLimitError) as caught:
        take_over(state, fds)
    helper.say(str(caught.value).encode())
    assert charged() == (0, 0)
    with take_over(state, fds) as taken:
        helper.say(b"taken")
        Taker(taken).check(int(helper.ask()))


@MODES
def test_a_new_process_that_may_pin_too_little_says_so_and_can_try_again(
    engine_bdfs: tuple[str, ...], world: World, *, by_process: bool
) -> None:
    """With the same descriptors; and no transfer is lost."""
    helper = Helper(_may_lock_too_little)
    with without_warning(), Rig(engine_bdfs[0], world.kernel, by_process=by_process) as rig:
        before, witness = charged(), rig.witness()
        try:
            with hand_over(rig.mapper) as update:
                helper.send(update)
                assert b"RLIMIT_MEMLOCK lets" in helper.hear()
                assert helper.hear() == b"taken"
                assert charged() != before
                update.finish()
                witness.wait()
        finally:
            copies = witness.stop()
        assert copies.lost == 0
        helper.tell(b"%d" % rig.iova)
        assert helper.ended() == 0


# --------------------------------------------------------------------------------------- an old process that is no more


def _hands_over_and_dies(bdf: str, said: socket.socket, *, by_process: bool) -> None:
    with LinuxWorld(()).memlock_limit(GIB), Rig(bdf, LinuxKernel(), by_process=by_process) as rig:
        update = hand_over(rig.mapper)
        socket.send_fds(said, [b"%d " % rig.iova + update.state], update.fds)
        said.recv(10)
        os.kill(os.getpid(), signal.SIGKILL)


@MODES
def test_an_old_process_that_died_can_be_taken_over_and_the_kernel_has_nothing_to_warn_of(
    engine_bdfs: tuple[str, ...], world: World, *, by_process: bool
) -> None:
    """By user this process is charged. By process, where the kernel would warn and charge for ever, nobody is."""
    pid, mine = _forked(_hands_over_and_dies, engine_bdfs[0], by_process=by_process)
    said, fds, _flags, _address = socket.recv_fds(mine, 1 << 16, 64)
    iova, _space, state = said.partition(b" ")
    mine.send(b"die")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    before = charged()
    with without_warning():
        with take_over(state, fds, kernel=world.kernel) as taken:
            assert charged()[0] - before[0] == (USED + PAGE_SIZE) * (not by_process)
            Taker(taken).check(int(iova))
        assert charged() == before
    mine.close()


PROGRAM = "from tests.hw.successor import after_exec_of_ioas; after_exec_of_ioas()"


def _becomes_another_program(bdf: str, said: socket.socket, *, by_process: bool) -> None:
    with LinuxWorld(()).memlock_limit(GIB), Rig(bdf, LinuxKernel(), by_process=by_process) as rig:
        update = hand_over(rig.mapper)
        state = os.memfd_create("state")
        os.write(state, update.state)
        assert rig.ring.file is not None
        socket.send_fds(said, [b"%d" % rig.iova], [rig.device.fd, rig.ring.file.fd])
        assert said.recv(10) == b"go"
        numbers = (said.fileno(), state, rig.iova, *update.make_inheritable())
        for fd in (said.fileno(), state):
            os.set_inheritable(fd, True)  # noqa: FBT003
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        os.execve(sys.executable, [sys.executable, "-S", "-c", PROGRAM, *map(str, numbers)], environment)


@MODES
def test_a_process_that_executes_another_program_hands_over_to_that(
    engine_bdfs: tuple[str, ...], world: World, *, by_process: bool
) -> None:
    """By inheritance; seen from another process, which has the device work all the while."""
    with without_warning():
        pid, mine = _forked(_becomes_another_program, engine_bdfs[0], by_process=by_process)
        iova, fds, _flags, _address = socket.recv_fds(mine, 100, 2)
        witness = Witness(world.kernel, device_fd=fds[0], memory_fd=fds[1], iova=int(iova))
        for fd in fds:
            os.close(fd)
        try:
            mine.send(b"go")
            assert int(mine.recv(100)) == (USED + PAGE_SIZE) * (not by_process)
            witness.wait()
        finally:
            copies = witness.stop()
        assert copies.lost == 0
        assert copies.made > 5
        mine.send(b"go")
        assert mine.recv(100) == b"checked"
        mine.close()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _forked(act: object, bdf: str, *, by_process: bool) -> tuple[int, socket.socket]:
    """A process that does `act`, and a socket to it."""
    assert callable(act)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if pid := os.fork():
        theirs.close()
        return pid, mine
    try:
        mine.close()
        act(bdf, theirs, by_process=by_process)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)
