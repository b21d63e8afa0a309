"""A device at work while its memory goes to another process: what is lost of its transfers, and who has what then.

A `Witness` has the device copy inside a block all the while, by a window on its registers and a view of the memory that
are its own, so that it goes on whoever has the rest.
"""

from __future__ import annotations

import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import pyvfio
from pyvfio import HandOver, Memfd, hand_over, ioctls, take_over
from pyvfio.kernel import IoctlArgument, Kernel, LinuxKernel, Registers
from pyvfio.testing.edu import Edu
from pyvfio.testing.under_fire import Copies, copy_meanwhile
from pyvfio.testing.world import LinuxWorld, World
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig
from tests.hw.successor import USED, Taker, locked

pytestmark = pytest.mark.only_type1(
    "VFIO_UPDATE_VADDR, by which mappings go to another process, is of containers alone"
)

ROOT = Path(__file__).parents[2]
BAR_SIZE = MIB


def duplicate(kernel: Kernel, fd: int) -> int:
    """A descriptor of the same open file."""
    return kernel.dup(fd)


class _Bar:
    def __init__(self, window: Registers) -> None:
        self._window = window

    def read32(self, offset: int) -> int:
        return self._window.read(offset, 4)

    def read64(self, offset: int) -> int:
        return self._window.read(offset, 8)

    def write32(self, offset: int, value: int) -> None:
        self._window.write(offset, 4, value)

    def write64(self, offset: int, value: int) -> None:
        self._window.write(offset, 8, value)


class _Memory:
    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, 2 * PAGE_SIZE)

    def view(self) -> memoryview:
        return memoryview(self._map)

    def close(self) -> None:
        self._map.close()


class Witness:
    """Has an edu copy from the first page of a memfd, at `iova`, to the second until `stop`: in a thread, and by
    descriptors that the caller may close at once."""

    def __init__(self, kernel: Kernel, *, device_fd: int, memory_fd: int, iova: int) -> None:
        self._kernel = kernel
        self._fd = duplicate(kernel, device_fd)
        self._window = kernel.registers(self._fd, 0, BAR_SIZE)
        self._memory = _Memory(memory_fd)
        self._iova = iova
        self._enough = threading.Event()
        self._some = threading.Event()
        self._copies = Copies(0, 0, 0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.wait()

    def _run(self) -> None:
        engine = Edu(_Bar(self._window))
        while not self._enough.is_set():
            done = copy_meanwhile(
                engine, self._memory, iova=self._iova, size=SIZE, meanwhile=lambda: self._enough.wait(0.002), copies=1
            )
            self._copies = Copies(*(old + new for old, new in zip(self._copies, done, strict=True)))
            self._some.set()

    def wait(self) -> None:
        """Until one more copy has come to its end, of which a part may have been before."""
        for _ in range(2):
            self._some.clear()
            assert self._some.wait(300), "the device does not work any more"

    def stop(self) -> Copies:
        """Of all that it made; twice is fine."""
        if not self._enough.is_set():
            self._enough.set()
            self._thread.join()
            self._window.close()
            self._memory.close()
            self._kernel.close(self._fd)
            print(self._copies)
        return self._copies


@contextmanager
def watched(rig: Rig, block: pyvfio.RamBlock) -> Iterator[Witness]:
    """While this lasts the device copies in `block`."""
    assert block.file is not None
    witness = Witness(rig.space.kernel, device_fd=rig.device.fd, memory_fd=block.file.fd, iova=rig.mapper.iova(block))
    try:
        yield witness
    finally:
        witness.stop()


def add(rig: Rig) -> pyvfio.RamBlock:
    """What is handed over: a block in three pieces."""
    block = rig.blocks.add("ring", used_length=MIB, max_length=64 * MIB, memory=Memfd())
    block.resize(2 * MIB)
    block.resize(USED)
    return block


@pytest.fixture
def rig(engine_bdfs: tuple[str, ...], kernel: Kernel) -> Iterator[Rig]:
    """Blocks in pieces, and a desk that can be handed over with them."""
    with Rig(engine_bdfs[0], kernel=kernel, resize="extend", memory=Memfd()) as made:
        yield made


def test_a_process_hands_over_to_itself_and_no_transfer_is_lost(rig: Rig, world: World) -> None:
    """Objects that know nothing of the old ones have the same memory at other addresses; it is locked once."""
    block = add(rig)
    iova, locked = rig.mapper.iova(block), world.locked_bytes()
    with watched(rig, block) as witness, hand_over(rig.mapper) as update:
        witness.wait()
        fds = [duplicate(world.kernel, fd) for fd in update.fds]
        with take_over(update.state, fds, kernel=world.kernel) as taken:
            witness.wait()
            assert taken.blocks["ring"].vaddr != block.vaddr
            update.finish()
            witness.wait()
            assert world.locked_bytes() == locked
            assert witness.stop().lost == 0
            Taker(taken).check(iova)


def test_no_interrupt_is_lost_while_it_is_handed_over(rig: Rig, world: World) -> None:
    """Those that were raised before, in between and afterwards are told by the new object, which nobody has enabled."""
    own = enable(rig)
    add(rig)
    rig.blocks["ring"].resize(MIB)
    rig.engine.raise_interrupt()
    with hand_over(rig.mapper) as update:
        rig.engine.raise_interrupt()
        fds = [duplicate(world.kernel, fd) for fd in update.fds]
        with take_over(update.state, fds, kernel=world.kernel) as taken:
            rig.engine.raise_interrupt()
            update.finish()
            os.close(own)
            assert Taker(taken).hears(raised=3)


def test_a_hand_over_that_is_cancelled_loses_no_transfer(rig: Rig, world: World) -> None:
    """And the block can be resized as before."""
    block = add(rig)
    before = rig.space.mappings
    with watched(rig, block) as witness:
        with hand_over(rig.mapper):
            witness.wait()
        witness.wait()
        assert witness.stop().lost == 0
    assert rig.space.mappings == before
    rig.mapper._check()
    block.resize(8 * MIB)
    assert rig.reaches(block, 8 * MIB - SIZE)


# ------------------------------------------------------------------------------------------------------ two processes


class Helper:
    """A process that was forked before a device was opened: it waits for what is handed over, and `act`s on it. It says
    "taken", and then 0 or 1 for how it ended."""

    def __init__(self, act: Callable[[Helper, bytes, list[int]], None]) -> None:
        self._mine, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid:
            self.theirs.close()
            return
        status = 1
        try:
            self._mine.close()
            state, fds, _flags, _address = socket.recv_fds(self.theirs, 1 << 16, 64)
            if state:
                act(self, state, fds)
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def send(self, update: HandOver) -> None:
        """The state and the descriptors, as another program would get them."""
        socket.send_fds(self._mine, [update.state], update.fds)

    def say(self, what: bytes) -> None:
        """To the old process."""
        self.theirs.send(what)

    def hear(self) -> bytes:
        """What it says; nothing when it has ended."""
        return self._mine.recv(4096)

    def tell(self, what: bytes) -> None:
        """To the new process."""
        self._mine.send(what)

    def ask(self) -> bytes:
        """What the old process says."""
        return self.theirs.recv(4096)

    def ended(self) -> int:
        """How."""
        self._mine.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def enable(rig: Rig) -> int:
    """Enable the interrupt of the device, with an eventfd of the program's own, which is returned."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(fds=[fd])
    return fd


def _takes_all(helper: Helper, state: bytes, fds: list[int]) -> None:
    assert locked() == 0
    with take_over(state, fds) as taken:
        helper.say(b"%d" % locked())
        iova = int(helper.ask())  # the old process has closed everything
        assert Taker(taken).hears(raised=2)
        Taker(taken).check(iova)
        helper.say(b"checked")
    assert locked() == 0


@pytest.mark.real_kernel("a fake is in one process, and other processes have no access")
def test_another_process_takes_over_and_no_transfer_is_lost(engine_bdfs: tuple[str, ...], world: World) -> None:
    """It has what is locked, sees what the device writes, grows and shrinks the block, and closes it; by that time the
    old process has closed all that it had."""
    helper, before = Helper(_takes_all), world.locked_bytes()
    with Rig(engine_bdfs[0], kernel=world.kernel, resize="extend", memory=Memfd()) as rig:
        block = add(rig)
        iova, locked = rig.mapper.iova(block), world.locked_bytes()
        own = enable(rig)
        rig.engine.raise_interrupt()
        with watched(rig, block) as witness, hand_over(rig.mapper) as update:
            rig.engine.raise_interrupt()
            helper.send(update)
            assert int(helper.hear()) == locked - before
            witness.wait()
            assert world.locked_bytes() == before
            update.finish()
            rig.blocks.close()
            rig.space.close()
            witness.wait()
            assert witness.stop().lost == 0
        os.close(own)
        helper.tell(b"%d" % iova)
        assert helper.hear() == b"checked"
    assert helper.ended() == 0
    with pyvfio.open_device(engine_bdfs[0], kernel=world.kernel):
        pass


class _Mortal(LinuxKernel):
    """The process dies in the second VFIO_IOMMU_MAP_DMA, before or after it."""

    def __init__(self, *, after: bool) -> None:
        super().__init__()
        self._after, self._count = after, 0

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        # The number is also VFIO_DEVICE_PCI_HOT_RESET's, which nobody asks for here.
        self._count += request == ioctls.VFIO_IOMMU_MAP_DMA
        if self._count == 2 and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super().ioctl(fd, request, argument)
        if self._count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


@pytest.mark.one_iommu
@pytest.mark.real_kernel("a fake is in one process, and other processes have no access")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_new_process_that_dies_in_the_middle_takes_nothing_with_it(
    engine_bdfs: tuple[str, ...], world: World, *, after: bool
) -> None:
    """Of the transfers none; what was locked for it is this process's again, and so is the block."""
    helper = Helper(lambda _helper, state, fds: take_over(state, fds, kernel=_Mortal(after=after)).close())
    with Rig(engine_bdfs[0], kernel=world.kernel, resize="extend", memory=Memfd()) as rig:
        block = add(rig)
        locked, before = world.locked_bytes(), rig.space.mappings
        with watched(rig, block) as witness:
            with hand_over(rig.mapper) as update:
                helper.send(update)
                assert helper.hear() == b""
                assert helper.ended() == -signal.SIGKILL
                assert world.locked_bytes() < locked
                witness.wait()
            witness.wait()
            assert witness.stop().lost == 0
        assert (world.locked_bytes(), rig.space.mappings) == (locked, before)
        block.resize(8 * MIB)
        assert rig.reaches(block, 8 * MIB - SIZE)
        block.resize(PAGE_SIZE)
        assert rig.device_reads(rig.mapper.iova(block) + PAGE_SIZE) is None


def _may_lock_too_little(helper: Helper, state: bytes, fds: list[int]) -> None:
    with LinuxWorld(()).memlock_limit(2 * MIB), pytest.raises(pyvfio.PinLimitError) as caught:
        take_over(state, fds)
    helper.say(str(caught.value).encode())
    with take_over(state, fds) as taken:
        helper.say(b"taken")
        Taker(taken).check(int(helper.ask()))


@pytest.mark.one_iommu
@pytest.mark.real_kernel("a fake counts for one process, which has the memory already")
def test_a_new_process_that_may_lock_too_little_says_so_and_can_try_again(
    engine_bdfs: tuple[str, ...], world: World
) -> None:
    """With the same descriptors; and no transfer is lost."""
    helper = Helper(_may_lock_too_little)
    with Rig(engine_bdfs[0], kernel=world.kernel, resize="extend", memory=Memfd()) as rig:
        block = add(rig)
        iova = rig.mapper.iova(block)
        with watched(rig, block) as witness, hand_over(rig.mapper) as update:
            helper.send(update)
            assert b"RLIMIT_MEMLOCK lets this process lock 2 MiB" in helper.hear()
            assert helper.hear() == b"taken"
            update.finish()
            witness.wait()
            assert witness.stop().lost == 0
        helper.tell(b"%d" % iova)
        assert helper.ended() == 0


# --------------------------------------------------------------------------------------------------------- one, anew

PROGRAM = "from tests.hw.successor import after_exec; after_exec()"


def _becomes_another_program(bdf: str, said: socket.socket) -> None:
    with ExitStack() as stack:
        rig = stack.enter_context(Rig(bdf, kernel=LinuxKernel(), resize="extend", memory=Memfd()))
        block = add(rig)
        assert block.file is not None
        iova = rig.mapper.iova(block)
        enable(rig)
        rig.engine.raise_interrupt()
        socket.send_fds(said, [b"%d" % iova], [rig.device.fd, block.file.fd])
        assert said.recv(10) == b"go"
        update = stack.enter_context(hand_over(rig.mapper))
        state = os.memfd_create("state")
        os.write(state, update.state)
        numbers = (said.fileno(), state, iova, *update.make_inheritable())
        os.set_inheritable(said.fileno(), True)  # noqa: FBT003
        os.set_inheritable(state, True)  # noqa: FBT003
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # in place of site's work
        os.execve(sys.executable, [sys.executable, "-S", "-c", PROGRAM, *map(str, numbers)], environment)


@pytest.mark.one_iommu
@pytest.mark.real_kernel("a fake ends with the program")
def test_a_process_that_executes_another_program_hands_over_to_that(engine_bdfs: tuple[str, ...], world: World) -> None:
    """By inheritance; seen from another process, which has the device work all the while."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            mine.close()
            os.chdir(ROOT)
            try:
                _becomes_another_program(engine_bdfs[0], theirs)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
        os._exit(1)
    theirs.close()
    iova, fds, _flags, _address = socket.recv_fds(mine, 100, 2)
    witness = Witness(world.kernel, device_fd=fds[0], memory_fd=fds[1], iova=int(iova))
    for fd in fds:
        os.close(fd)
    try:
        mine.send(b"go")
        assert int(mine.recv(100)) == USED + PAGE_SIZE
        witness.wait()
    finally:
        copies = witness.stop()
    assert copies.lost == 0
    assert copies.made > 5
    mine.send(b"go")
    assert mine.recv(100) == b"checked"
    mine.close()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with pyvfio.open_device(engine_bdfs[0], kernel=world.kernel):
        pass


@pytest.mark.one_iommu
@pytest.mark.real_kernel("a fake is in one process, and other processes have no access")
def test_the_programs_of_the_page_do_what_it_says(bdf: str, tmp_path: Path) -> None:
    """Word for word, but for the device's address."""
    text = (ROOT / "docs/live-update.md").read_text(encoding="utf-8")
    old, new, _in_one_process = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for name, program in (("old.py", old), ("new.py", new)):
        (tmp_path / name).write_text(program.replace("0000:00:02.0", bdf), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "old.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'hello'\n", "")
