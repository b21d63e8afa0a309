"""A process that takes over a device and its memory: what it does with them. The program of a process that does so by
execve(2) is here, too, and imports nothing else: in a virtual machine importing pytest takes seconds.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

from pyvfio import TakenOver, ioctls, take_over
from pyvfio.kernel import LinuxKernel
from pyvfio.testing.edu import Edu
from pyvfio.testing.probe import DmaProbe, pattern
from pyvfio.units import MIB
from tests.hw.rig import SIZE

USED = 4 * MIB


class Taker:
    """What the new process does with what it has taken over."""

    def __init__(self, taken: TakenOver) -> None:
        (self.device,) = taken.devices.values()
        self.blocks, self.mapper = taken.blocks, taken.mapper
        desk = taken.blocks["desk"]
        self.engine = Edu(self.device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
        self._probe = DmaProbe(self.engine, desk=desk, iova=taken.mapper.iova(desk))

    def reaches(self, offset: int) -> bool:
        """Whether the device reads what is written at `offset` of the block through this process's mapping, and this
        process sees what the device writes there."""
        block, there, sent = self.blocks["ring"], pattern(SIZE), pattern(SIZE)
        iova = self.mapper.iova(block) + offset
        with block.view() as view:
            view[offset : offset + SIZE] = there
        read = self._probe.read(iova, SIZE) == there
        self._probe.write(iova, sent)
        with block.view() as view:
            return read and bytes(view[offset : offset + SIZE]) == sent

    def is_stopped(self, offset: int) -> bool:
        """Whether the device is stopped when it reads there."""
        return self._probe.read(self.mapper.iova(self.blocks["ring"]) + offset, SIZE) is None

    def hears(self, raised: int) -> bool:
        """Whether MSI is enabled, and those interrupts that nobody has read are told, and then one that is new."""
        irq = self.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
        told = irq.wait(timeout=60)
        self.engine.raise_interrupt()
        new = irq.wait_any(timeout=60)
        self.engine.acknowledge_interrupt()
        return (told, new) == (raised, {0: 1})

    def check(self, iova: int) -> None:
        """That all of the block is where it was, that it grows and shrinks, and the device with it."""
        block = self.blocks["ring"]
        self.mapper._check()
        assert self.mapper.iova(block) == iova
        assert self.reaches(USED - SIZE)
        assert self.is_stopped(USED)
        block.resize(8 * MIB)
        assert self.reaches(8 * MIB - SIZE)
        block.resize(MIB)
        assert self.reaches(MIB - SIZE)
        assert self.is_stopped(MIB)
        assert self.is_stopped(USED - SIZE)
        self.mapper._check()
        assert self.mapper.iova(block) == iova


def locked() -> int:
    """The bytes that are locked for this process."""
    return LinuxKernel().memlock().used


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    found = re.search(rf"^{name}:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def charged() -> tuple[int, int]:
    """What is pinned and what is locked for this process, in bytes."""
    return _status("VmPin"), _status("VmLck")


def after_exec() -> None:
    """What the program does that a process has become."""
    said_fd, state, iova, *fds = (int(argument) for argument in sys.argv[1:])
    said = socket.socket(fileno=said_fd)
    assert locked() == 0
    with take_over(os.pread(state, 1 << 20, 0), fds) as taken:
        assert not any(os.get_inheritable(fd) for fd in fds)
        said.send(b"%d" % locked())
        assert said.recv(10) == b"go"
        assert Taker(taken).hears(raised=1)
        Taker(taken).check(iova)
    said.send(b"checked")


def after_exec_of_ioas() -> None:
    """The same, for an address space of iommufd. It says what is pinned for this process."""
    said_fd, state, iova, *fds = (int(argument) for argument in sys.argv[1:])
    said = socket.socket(fileno=said_fd)
    with take_over(os.pread(state, 1 << 20, 0), fds) as taken:
        said.send(b"%d" % charged()[0])
        assert said.recv(10) == b"go"
        Taker(taken).check(iova)
    assert charged() == (0, 0)
    said.send(b"checked")
