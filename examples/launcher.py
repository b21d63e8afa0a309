#!/usr/bin/env python3
"""Two processes: a launcher that may open VFIO devices, and a driver of an `edu` that may not.

The driver is forked before anything is opened, and gives up its rights. The launcher opens the container, the group and
the device, and sends the three descriptors over a Unix socket (SCM_RIGHTS). The driver makes objects of them, maps
memory and does DMA, within its own RLIMIT_MEMLOCK. The launcher waits, and closes the device when the driver has ended,
however it ended.

    examples/launcher.py --fake                              without any device: both parts in one process
    examples/launcher.py --bind --uid 1000 0000:00:03.0      as root, on this machine's edu
    scripts/vm -- .venv/3.11/bin/python examples/launcher.py --bind --uid 1000
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.cli.common import FAILED, OK, guard, run, selector_argument
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.testing import FakeKernel, probe
from pyvfio.testing.edu import LIMIT, Edu
from pyvfio.units import KIB, MIB, PAGE_SIZE

NAME = "launcher"
USED, MOST = 256 * KIB, 64 * MIB
DESCRIPTORS = 3


@dataclass(frozen=True)
class Offer:
    """What a driver has to know besides the descriptors of container, group and device."""

    bdf: str
    group: int


@dataclass(frozen=True)
class Report:
    """What the driver saw. `moved`: the device read memory and wrote the same bytes elsewhere. `refused`: a block could
    not grow beyond RLIMIT_MEMLOCK."""

    uid: int
    moved: bool
    refused: bool

    @property
    def ok(self) -> bool:
        """Whether all is as it should be."""
        return self.moved and self.refused


# ----------------------------------------------------------------------------------------------------------- launcher


def offer(device: pyvfio.Device) -> tuple[Offer, tuple[int, int, int]]:
    """What is sent to the driver."""
    fds = (device.container.fd, device.group.fd, device.fd)
    return Offer(device.bdf, device.group.number), fds


def start_driver(*, uid: int, memlock: int) -> tuple[int, socket.socket]:
    """Fork a driver that is user `uid` and may lock `memlock` bytes; its pid, and the socket to it.

    No object of pyvfio is open yet. One that is belongs to the process that has opened it, and not to a child.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = FAILED
    try:
        ours.close()
        become(uid, memlock)
        status = guard(partial(run_driver, theirs), name=f"{NAME}, the driver")
    finally:
        os._exit(status)


def become(uid: int, memlock: int) -> None:
    """Be another user from here on, who may lock so many bytes."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)


def serve(device: pyvfio.Device, driver: socket.socket) -> Report:
    """Give the driver what it needs, and wait for what it saw.

    The device stays open here. So closing it stops its DMA, and resets it where it can, whatever the driver did.
    """
    message, fds = offer(device)
    socket.send_fds(driver, [json.dumps(asdict(message)).encode()], fds)
    if not (said := driver.recv(4096)):
        raise pyvfio.VfioError("the driver ended without a word")
    return Report(**json.loads(said))


# ------------------------------------------------------------------------------------------------------------- driver


def receive(connection: socket.socket) -> tuple[Offer, list[int]]:
    """What the launcher has sent. The descriptors are this process's own from here on."""
    message, fds, _flags, _address = socket.recv_fds(connection, 4096, DESCRIPTORS)
    for fd in fds:  # Python 3.11 passes no flags on, such as MSG_CMSG_CLOEXEC
        os.set_inheritable(fd, False)  # noqa: FBT003 (as os has it)
    return Offer(**json.loads(message)), fds


def accept(offered: Offer, fds: Sequence[int], *, kernel: Kernel) -> pyvfio.Device:
    """Make a device, with its group and container, of descriptors. Closing `device.container` closes all three."""
    container_fd, group_fd, device_fd = fds
    group = pyvfio.Group.from_fd(group_fd, number=offered.group, kernel=kernel)
    pyvfio.Container.from_fd(container_fd, groups=[group], kernel=kernel)
    return pyvfio.Device.from_fd(group, offered.bdf, device_fd)


def drive(device: pyvfio.Device) -> Report:
    """Have the device copy memory, and try to give it more than this user may lock."""
    device.memory_enabled = True
    device.bus_master = True
    engine = Edu(device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
    with (
        pyvfio.RamBlockList(kernel=device.kernel) as blocks,
        pyvfio.DmaMapper(device.space, blocks, resize="extend") as mapper,
    ):
        ring = blocks.add("ring", used_length=USED, max_length=MOST)
        sent = probe.pattern(LIMIT)
        with ring.view() as view:
            view[:LIMIT] = sent
        engine.read_memory(mapper.iova(ring), LIMIT)
        engine.write_memory(mapper.iova(ring) + PAGE_SIZE, LIMIT)
        with ring.view() as view:
            moved = bytes(view[PAGE_SIZE : PAGE_SIZE + LIMIT]) == sent
        try:
            ring.resize(MOST)
        except pyvfio.PinLimitError as error:
            refused = ring.used_length == USED and error.limit is not None
        else:
            refused = False
    return Report(os.getuid(), moved, refused)


def run_driver(launcher: socket.socket) -> int:
    """The driver's process."""
    offered, fds = receive(launcher)
    device = accept(offered, fds, kernel=LinuxKernel())
    with device.container:
        report = drive(device)
    launcher.sendall(json.dumps(asdict(report)).encode())
    return OK


# ------------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog=NAME, description="Has an ordinary user drive a device that root has opened.")
    made.add_argument(
        "device",
        nargs="?",
        default="1234:11e8",
        type=selector_argument,
        metavar="BDF",
        help="bound to vfio-pci; default: the first edu (1234:11e8)",
    )
    made.add_argument("--uid", type=int, default=os.getuid(), metavar="N", help="the driver's; default: this one")
    made.add_argument("--memlock", type=int, default=MIB, metavar="BYTES", help="the driver's; default: %(default)s")
    made.add_argument("--bind", action="store_true", help="bind the device to vfio-pci first, and give it back after")
    made.add_argument("--fake", action="store_true", help="on the fake kernel, both parts in this process")
    return made


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[pyvfio.Device]:
    """The device that the command line means."""
    kernel = LinuxKernel()
    found = [device.bdf for device in pci.devices(kernel=kernel) if options.device(device)]
    if not found:
        raise pyvfio.DeviceNotFoundError("there is no such device", hint="pyvfio list shows all there are")
    with ExitStack() as stack:
        if options.bind:
            stack.callback(pci.restore, pci.bind(found[0], kernel=kernel), kernel=kernel)
        yield stack.enter_context(pyvfio.open_device(found[0], iommu="type1", kernel=kernel))


def play(memlock: int) -> Report:
    """Both parts on a fake kernel, whose descriptors no other process can use."""
    with FakeKernel() as kernel, pyvfio.open_device(kernel.bdfs[0], iommu="type1", kernel=kernel) as device:
        kernel.memlock_limit = memlock
        message, fds = offer(device)
        driven = accept(message, [kernel.dup(fd) for fd in fds], kernel=kernel)
        with driven.container:
            return drive(driven)


def main() -> int:
    """Launch, and say what the driver saw; status 1 when that is not as it should be."""
    options = parser().parse_args()
    rehearsal = play(options.memlock)  # all modules are loaded now: the driver may not be allowed to read them
    if options.fake:
        report = rehearsal
    else:
        pid, driver = start_driver(uid=options.uid, memlock=options.memlock)
        try:
            with driver, opened(options) as device:
                report = serve(device, driver)
        finally:
            os.waitpid(pid, 0)
    print(json.dumps({"ok": report.ok, **asdict(report)}))
    return OK if report.ok else FAILED


if __name__ == "__main__":
    run(main, name=NAME)
