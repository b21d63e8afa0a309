#!/usr/bin/env python3
"""A driver for virtio-rng, the random number generator of virtual machines, and a program that draws bytes with it.

The driver's virtqueue is in a RAM block, its buffers are in another one that is resized while the device writes to it,
and an MSI-X vector wakes it through an eventfd. § is "Virtual I/O Device (VIRTIO) Version 1.2".

    examples/virtio_rng.py --fake                            without any device: on the fake kernel, with a fake of it
    examples/virtio_rng.py --bind                            as root, on this machine's virtio-rng
    scripts/vm --devices virtio-rng -- .venv/3.11/bin/python examples/virtio_rng.py --bind
    scripts/vm --kernel 7+iommufd --devices virtio-rng -- .venv/3.11/bin/python examples/virtio_rng.py --bind \
        --iommu iommufd
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import BinaryIO, Self

import pyvfio
import virtio
from fake_virtio_rng import FakeVirtioRng
from pyvfio import ioctls, pci
from pyvfio.cli.common import FAILED, OK, run, selector_argument
from pyvfio.kernel import LinuxKernel
from pyvfio.testing import FakeKernel
from pyvfio.testing.probe import PageWitness
from pyvfio.units import KIB, PAGE_SIZE
from virtio import Status

NAME = "virtio_rng"
BUFFER = PAGE_SIZE
LOW = 2  # buffers when there is little to do; when there is much, as many as the queue takes
CELL = b"not random bytes"
FILL = CELL * (BUFFER // len(CELL))


class NeedsResetError(pyvfio.VfioError):
    """The device has met what it cannot go on from; opened anew it works again."""


class VirtioRng:
    """A virtio entropy device, §5.4. Its buffers lie in `pool`, `BUFFER` bytes each, and have numbers from 0 on.

    With granules each buffer has a mapping of its own, so that a resize touches no other: the device may be writing
    there. `in_flight` has the numbers of those that the device has, with their lengths. Synchronization: none.
    """

    def __init__(self, device: pyvfio.Device) -> None:
        self.bdf = device.bdf
        self.in_flight: dict[int, int] = {}
        self._registers = virtio.Transport(device)
        self._registers.negotiate()
        with ExitStack() as stack:
            self._irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
            self._irq.enable(1)
            stack.callback(self._irq.disable)
            blocks = stack.enter_context(pyvfio.RamBlockList(kernel=device.kernel))
            self._mapper = pyvfio.DmaMapper(device.space, blocks, resize="extend", granule=BUFFER)
            stack.enter_context(self._mapper)
            ring = blocks.add("ring", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
            self._queue = virtio.Queue(ring, min(self._registers.queue_size(0), 64))
            stack.callback(self._queue.close)
            self._registers.enable_queue(0, self._queue, iova=self._mapper.iova(ring), vector=0)
            # The same vector, so that whoever waits for buffers hears it too when there will be none.
            self._registers.set_vector(virtio.CONFIG_MSIX_VECTOR, 0)
            self.most = self._queue.size
            self.pool = blocks.add("pool", used_length=LOW * BUFFER, max_length=self.most * BUFFER)
            stack.callback(self._registers.reset)  # called first of all: the device lets go before memory goes
            device.bus_master = True
            self._registers.add_status(Status.DRIVER_OK)
            self._stack = stack.pop_all()

    @property
    def buffers(self) -> int:
        """How many buffers there are."""
        return self.pool.used_length // BUFFER

    @property
    def unanswered(self) -> int:
        """How many requests the device has not answered, at this moment."""
        return self._queue.unanswered

    def resize(self, buffers: int) -> None:
        """Have another number of buffers; those in flight stay so, and have to be among them."""
        if gone := [number for number in self.in_flight if number >= buffers]:
            raise ValueError(f"the device still has the buffers {gone}, so {buffers} are too few")
        self.pool.resize(buffers * BUFFER)

    def request(self, number: int, length: int = BUFFER) -> None:
        """Have the device write up to `length` random bytes to a buffer; where there is none, the IOMMU stops it."""
        self.in_flight[number] = length
        self._queue.post(number, iova=self._mapper.iova(self.pool) + number * BUFFER, length=length)
        self._registers.notify(0)

    def wait(self) -> dict[int, int]:
        """Wait for an interrupt; how many bytes the device says it wrote to which buffers, which it has no more.

        Raises NeedsResetError; VfioError when none comes for `virtio.TIMEOUT`, and when the device says what cannot be.
        """
        if not self._irq.wait(timeout=virtio.TIMEOUT):
            raise pyvfio.VfioError(f"{self.bdf} raised no interrupt in {virtio.TIMEOUT:.0f} seconds")
        if self._registers.status & Status.DEVICE_NEEDS_RESET:
            raise NeedsResetError(f"{self.bdf} needs a reset: it met an address or a ring that it cannot use")
        done = dict(self._queue.reap())
        for number, written in done.items():
            if not 0 < written <= self.in_flight.pop(number, 0):
                raise pyvfio.VfioError(f"{self.bdf} says that it wrote {written} bytes to buffer {number}")
        return done

    def close(self) -> None:
        """Stop the device; take its memory and its interrupt away."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------- the program


@dataclass
class Report:
    """What was seen. `lost` counts requests whose buffer does not hold what the device says it wrote, `at_work` resizes
    during which the device had requests to answer; `stopped`: whether a write behind the end was."""

    bytes: int = 0
    ones: int = 0
    requests: int = 0
    lost: int = 0
    resizes: int = 0
    at_work: int = 0
    stopped: bool = False

    @property
    def ok(self) -> bool:
        """Nothing was lost, and nothing written that may not be."""
        return not self.lost and self.stopped


def draw(rng: VirtioRng, size: int, sink: BinaryIO | None, report: Report) -> None:
    """Draw `size` bytes, while the pool breathes: up to as many buffers as there can be, down to `LOW`, and again."""
    target = rng.most
    while report.bytes < size:
        wanted = size - report.bytes - sum(rng.in_flight.values())
        for number in range(min(target, rng.buffers)):
            if wanted > 0 and number not in rng.in_flight:
                fill(rng, number)
                rng.request(number, min(BUFFER, wanted))
                wanted -= BUFFER
        if rng.buffers == target:
            target = rng.most + LOW - target
        grow = rng.buffers < target and wanted > 0
        shrink = rng.buffers > target > max(rng.in_flight, default=0)
        if grow or shrink:
            resize(rng, target, report)
        for number, written in rng.wait().items():
            take(rng, number, written, sink, report)


def fill(rng: VirtioRng, number: int) -> None:
    """Fill a buffer with what 4 KiB of random bytes hold in one of 2^116 cases."""
    with rng.pool.view() as view:
        view[number * BUFFER : (number + 1) * BUFFER] = FILL


def resize(rng: VirtioRng, buffers: int, report: Report) -> None:
    """Grow or shrink. What is unanswered now was so before: the device had it all the while."""
    rng.resize(buffers)
    report.resizes += 1
    report.at_work += rng.unanswered > 0


def take(rng: VirtioRng, number: int, written: int, sink: BinaryIO | None, report: Report) -> None:
    """Look at a buffer that came back: what was in it is overwritten as far as the device says, and no further."""
    with rng.pool.view() as view:
        buffer = bytes(view[number * BUFFER : (number + 1) * BUFFER])
    data, rest = buffer[:written], buffer[written:]
    report.requests += 1
    report.lost += CELL in data or rest != FILL[written:]
    report.bytes += written
    report.ones += int.from_bytes(data, "little").bit_count()
    if sink is not None:
        sink.write(data)


def try_behind_the_end(rng: VirtioRng) -> bool:
    """Whether the IOMMU stops a write to a buffer that a shrink has given back: its page, which a pipe has kept, tells.

    The device may find that it needs a reset, or notice nothing, as QEMU's.
    """
    rng.resize(LOW)
    fill(rng, LOW - 1)
    witness = PageWitness(rng.pool.vaddr + (LOW - 1) * BUFFER)
    try:
        rng.resize(LOW - 1)
        rng.request(LOW - 1)
        with suppress(NeedsResetError):
            rng.wait()
    finally:
        page = witness.look()
    return page == FILL


def positive(text: str) -> int:
    """A number from 1 on, for `type=`."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=NAME, description="Draws random bytes with a virtio-rng, whose buffers come and go while it works."
    )
    made.add_argument(
        "device",
        nargs="?",
        default="1af4:1044",
        type=selector_argument,
        metavar="BDF",
        help="bound to vfio-pci; default: the first virtio-rng (1af4:1044)",
    )
    made.add_argument("--bytes", type=positive, default=64 * KIB, metavar="N", help="default: %(default)s")
    made.add_argument("--output", metavar="FILE", help="write them there; default: nowhere")
    made.add_argument("--bind", action="store_true", help="bind the device to vfio-pci first, and give it back after")
    made.add_argument(
        "--iommu", choices=["type1", "iommufd"], help="the address space; default: as open_device() chooses"
    )
    made.add_argument("--fake", action="store_true", help="on the fake kernel, with a fake device")
    made.add_argument("--json", action="store_true", help="for programs")
    return made


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[pyvfio.Device]:
    """The device that the command line means."""
    with ExitStack() as stack:
        if options.fake:
            fake = stack.enter_context(FakeKernel("7.3", groups=[(4, [FakeVirtioRng("0000:00:04.0")])], iommufd=True))
            yield stack.enter_context(pyvfio.open_device(fake.bdfs[0], iommu=options.iommu, kernel=fake))
            return
        kernel = LinuxKernel()
        found = [device.bdf for device in pci.devices(kernel=kernel) if options.device(device)]
        if not found:
            raise pyvfio.DeviceNotFoundError("there is no such device", hint="pyvfio list shows all there are")
        if options.bind:
            stack.callback(pci.restore, pci.bind(found[0], kernel=kernel), kernel=kernel)
        yield stack.enter_context(pyvfio.open_device(found[0], iommu=options.iommu, kernel=kernel))


def main() -> int:
    """Draw, and say what was seen; status 1 when anything was lost, or written that may not be."""
    options = parser().parse_args()
    report = Report()
    with opened(options) as device, VirtioRng(device) as rng:
        with nullcontext() if options.output is None else open(options.output, "wb") as sink:
            draw(rng, options.bytes, sink, report)
        report.stopped = try_behind_the_end(rng)
    if options.json:
        print(json.dumps({"ok": report.ok, **asdict(report)}))
    else:
        ones = report.ones / (8 * report.bytes)
        print(f"{report.bytes} bytes in {report.requests} requests; {ones:.2%} of their bits are 1")
        print(f"{report.lost} lost, in {report.resizes} resizes, {report.at_work} of them with the device at work")
        print(f"a write behind the end {'was stopped' if report.stopped else 'was NOT stopped'}")
    return OK if report.ok else FAILED


if __name__ == "__main__":
    run(main, name=NAME)
