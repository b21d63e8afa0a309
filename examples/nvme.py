#!/usr/bin/env python3
"""A driver for NVMe disks, and a program that moves blocks with it while its data block is resized.

The driver's queues and PRP lists are in one RAM block, the data is in another. The data block is resized while the
disk reads and writes it. Each queue has an MSI-X vector of its own. § is "NVM Express Base Specification 1.4".

    examples/nvme.py --fake                       without any disk: on the fake kernel, with a fake controller
    examples/nvme.py 0000:01:00.0                 show the disk, which is bound to vfio-pci; nothing is written
    examples/nvme.py 0000:01:00.0 --overwrite     write blocks, read them back, compare: destroys the disk's data
    scripts/vm --devices nvme -- .venv/3.11/bin/python examples/nvme.py --bind --overwrite
    scripts/vm --kernel 7+iommufd --devices nvme -- .venv/3.11/bin/python examples/nvme.py --bind --iommu iommufd
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from types import TracebackType
from typing import NamedTuple, Self

import pyvfio
from fake_nvme import FakeNvme
from nvme_queues import (
    ENTRIES,
    MAX_TRANSFER,
    PAGE,
    Admin,
    Command,
    ControllerFailedError,
    Opcode,
    QueueLayout,
    QueuePair,
    Request,
)
from pyvfio import ioctls, pci
from pyvfio.testing import FakeKernel

EXTEND, REMAP = pyvfio.Policy("extend", granule=64 * pyvfio.KIB), pyvfio.Policy("remap")  # of the data block
PULSE = 1.0  # seconds between two looks at the controller's status while no interrupt arrives


class Register(IntEnum):
    """Offsets in BAR 0, §3.1."""

    CAP = 0x00
    CC = 0x14
    CSTS = 0x1C
    AQA = 0x24
    ASQ = 0x28
    ACQ = 0x30
    DOORBELLS = 0x1000


CC_ENABLE, CC_SHUTDOWN, CC_ENTRY_SIZES = 1, 1 << 14, 6 << 16 | 4 << 20  # entries of 2^6 and 2^4 bytes
CSTS_READY, CSTS_FATAL, CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE = 1, 2, 3 << 2, 2 << 2
NUMBER_OF_QUEUES = 0x07  # a feature, §5.21.1.7


class CommandTimeoutError(pyvfio.VfioError):
    """Commands did not complete in time. `outstanding` has their requests, which the controller may still execute."""

    def __init__(self, message: str, *, outstanding: Sequence[Request], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.outstanding = tuple(outstanding)


# ------------------------------------------------------------------------------------------------------ the driver


class Identity(NamedTuple):
    """A disk: the controller's texts, and its first namespace."""

    model: str
    serial: str
    firmware: str
    namespace: int
    blocks: int
    block_size: int
    max_transfer: int
    """In bytes, for one command."""


class Nvme:
    """An NVMe controller and its first namespace. Commands move blocks between the disk and `data`, a RAM block.

    `policy` says how the mapper follows the length of `data`. With granules the controller goes on with its commands
    during a resize. Without granules the driver waits for all commands before a resize. The length of `data` is 0 at
    first and at most `max_length` bytes.

    `queues`: I/O queue pairs, if the controller has so many. `timeout`: seconds that a command takes at most.

    `read`, `write` and `flush` submit a command and return its `Request`. `wait` returns the requests that are done.
    Raises UnsupportedError for a device that this driver cannot drive. Synchronization: none.
    """

    def __init__(
        self,
        device: pyvfio.Device,
        *,
        policy: pyvfio.Policy = EXTEND,
        max_length: int = pyvfio.MIB,
        queues: int = 2,
        timeout: float = 30.0,
    ) -> None:
        self.bdf = device.bdf
        self.timeout = timeout
        self.queues: list[QueuePair] = []
        """The admin queue pair, and the I/O queue pairs."""
        self._device = device
        self._keeps_going = policy.granule is not None
        self._wanted = queues
        self._done: list[Request] = []
        if device.config.read32(0x08) >> 8 != 0x010802:
            raise pyvfio.UnsupportedError(f"{device.bdf} is not an NVMe controller: its class is not 01:08:02")
        device.memory_enabled = True
        self._bar = device.region(0)
        self._capabilities = self._check_capabilities()
        with ExitStack() as stack:
            blocks = stack.enter_context(pyvfio.RamBlockList(kernel=device.kernel))
            # The queues keep their length, so that one mapping will do.
            self._mapper = pyvfio.DmaMapper(
                device.space, blocks, policy_of=lambda block: policy if block.idstr == "data" else None
            )
            stack.enter_context(self._mapper)
            length = QueueLayout.of(queues).end + PAGE  # the last page is for answers to "identify"
            self._ring_block = blocks.add("queues", used_length=length, max_length=length)
            self.data = blocks.add("data", used_length=0, max_length=max_length)
            self._memory = stack.enter_context(self._ring_block.view())
            self._irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
            self._vectors = max(1, min(1 + queues, self._irq.count))
            self._irq.enable(self._vectors)
            stack.callback(self._irq.disable)
            # These run first of all, in reverse order: the controller stops before its memory is unmapped.
            stack.callback(self._abort, "the driver was closed")
            stack.callback(self._end_dma)
            stack.callback(self._stop)
            self._start()
            self.identity = self._identify()
            self._stack = stack.pop_all()

    def _check_capabilities(self) -> int:
        capabilities = self._bar.read64(Register.CAP)
        if not capabilities >> 37 & 1 or capabilities >> 48 & 0xF:
            raise pyvfio.UnsupportedError(
                f"{self.bdf} has no NVM command set, or no pages of 4 KiB (CAP is {capabilities:#x})"
            )
        return capabilities

    # -------------------------------------------------------------------------------------- the controller's state

    def _start(self) -> None:
        """Bring the controller from any state to one in which it takes I/O commands, §7.6.1."""
        self._disable()
        self.queues = [self._queue_pair(0)]
        admin = self.queues[0]
        self._bar.write32(Register.AQA, (admin.entries - 1) << 16 | (admin.entries - 1))
        self._bar.write64(Register.ASQ, admin.submissions)
        self._bar.write64(Register.ACQ, admin.completions)
        self._device.bus_master = True
        self._bar.write32(Register.CC, CC_ENTRY_SIZES | CC_ENABLE)
        self._await_status(CSTS_READY, CSTS_READY)
        asked = (self._wanted - 1) << 16 | (self._wanted - 1)  # of either kind, from 0 on
        given = self._admin(Admin.SET_FEATURES, dwords=(NUMBER_OF_QUEUES, asked))
        for number in range(1, 1 + min(self._wanted, (given & 0xFFFF) + 1, (given >> 16) + 1)):
            self._create(self._queue_pair(number))

    def _queue_pair(self, number: int) -> QueuePair:
        entries = min(ENTRIES, (self._capabilities & 0xFFFF) + 1)
        stride = 4 << (self._capabilities >> 32 & 0xF)
        first = Register.DOORBELLS + 2 * number * stride
        return QueuePair(
            number,
            memory=self._memory,
            iova=self._mapper.iova(self._ring_block),
            entries=entries,
            doorbells=(self._bar.register32(first).write, self._bar.register32(first + stride).write),
        )

    def _create(self, pair: QueuePair) -> None:
        """Create the completion queue, which raises an MSI-X vector, and the submission queue, §5.3 and §5.4."""
        size = (pair.entries - 1) << 16 | pair.number
        vector = min(pair.number, self._vectors - 1)
        for opcode, iova, flags in (
            (Admin.CREATE_COMPLETION_QUEUE, pair.completions, vector << 16 | 0b11),  # contiguous, with interrupts
            (Admin.CREATE_SUBMISSION_QUEUE, pair.submissions, pair.number << 16 | 0b01),
        ):
            self._admin(opcode, prps=(iova,), dwords=(size, flags))
        self.queues.append(pair)

    def _disable(self) -> None:
        """Have the controller drop all its queues. After this, it accesses no memory."""
        self._bar.write32(Register.CC, 0)
        self._await_status(CSTS_READY, 0)

    def _await_status(self, mask: int, value: int) -> None:
        """Wait until the bits of CSTS in `mask` are `value`. Raises ControllerFailedError."""
        longest = max(1, self._capabilities >> 24 & 0xFF) / 2  # CAP.TO is in units of 500 ms
        try:
            self._bar.poll32(Register.CSTS, mask=mask, value=value, timeout=longest)
        except pyvfio.RegisterTimeoutError as error:
            raise ControllerFailedError(f"{self.bdf} did not change its state: {error}") from error

    def _check_alive(self) -> None:
        status = self._bar.read32(Register.CSTS)
        if status & CSTS_FATAL:
            raise ControllerFailedError(
                f"{self.bdf} is in its fatal state (CSTS is {status:#x}), with {self.describe_outstanding()}",
                hint="Call reset(), which aborts these commands",
            )

    def reset(self) -> None:
        """Reset the controller and make it ready again. Requests that are outstanding are done, with AbortedError.

        The next `wait` returns them. The driver does not submit them again. The data block keeps its length.
        Raises ControllerFailedError.
        """
        self._halt()
        self._abort("the controller was reset")
        self._start()

    def _halt(self) -> None:
        """Disable the controller; or reset the function, where the controller does not react."""
        try:
            self._disable()
        except ControllerFailedError:
            self._device.reset()

    def _stop(self) -> None:
        """Shut the controller down, §7.6.2, or reset it where commands are outstanding."""
        with suppress(pyvfio.DeviceGoneError):  # it accesses no memory any more
            with suppress(ControllerFailedError):
                if not self.outstanding and not self._bar.read32(Register.CSTS) & CSTS_FATAL:
                    self._bar.write32(Register.CC, CC_ENTRY_SIZES | CC_ENABLE | CC_SHUTDOWN)
                    self._await_status(CSTS_SHUTDOWN, CSTS_SHUTDOWN_COMPLETE)
            self._halt()

    def _end_dma(self) -> None:
        """Keep the device from the bus, whether the controller has stopped or not."""
        with suppress(pyvfio.DeviceGoneError):
            self._device.bus_master = False

    def _abort(self, why: str) -> None:
        for pair in self.queues:
            self._done += pair.abort(why)

    # -------------------------------------------------------------------------------------------------- commands

    def _admin(
        self, opcode: Admin, *, namespace: int = 0, prps: tuple[int, ...] = (), dwords: tuple[int, ...] = ()
    ) -> int:
        """Execute an admin command and return dword 0 of its completion."""
        request = Request(opcode.name.lower().replace("_", " "))
        self.queues[0].submit(Command(opcode, namespace, prps, dwords), request)
        return self.finish(request)

    def _identify(self) -> Identity:
        """§5.15: the controller, the list of namespaces, and the first of these."""
        controller = self._identify_page(1)
        (namespace,) = struct.unpack_from("<I", self._identify_page(2))
        if not namespace:
            raise pyvfio.UnsupportedError(f"{self.bdf} has no namespace that is attached and active")
        page = self._identify_page(0, namespace=namespace)
        (blocks,) = struct.unpack_from("<Q", page)
        metadata, order = struct.unpack_from("<HB", page, 128 + 4 * (page[26] & 0xF))
        if metadata:
            raise pyvfio.UnsupportedError(f"the blocks of {self.bdf} have {metadata} bytes of metadata each")
        serial, model, firmware = (
            controller[start:end].decode("ascii", "replace").strip() for start, end in ((4, 24), (24, 64), (64, 72))
        )
        limit = PAGE << controller[77] if controller[77] else MAX_TRANSFER
        return Identity(model, serial, firmware, namespace, blocks, 1 << order, min(limit, MAX_TRANSFER))

    def _identify_page(self, structure: int, *, namespace: int = 0) -> bytes:
        place = self._ring_block.used_length - PAGE
        iova = self._mapper.iova(self._ring_block, place, PAGE)
        self._admin(Admin.IDENTIFY, namespace=namespace, prps=(iova,), dwords=(structure,))
        return bytes(self._memory[place : place + PAGE])

    def read(self, lba: int, blocks: int, *, offset: int) -> Request:
        """Have the disk read `blocks` blocks from `lba` on into the data block at `offset`. Raises as `write`."""
        return self._transfer(Opcode.READ, lba, blocks, offset)

    def write(self, lba: int, blocks: int, *, offset: int) -> Request:
        """Have the disk write `blocks` blocks from `lba` on. Their data starts at `offset` in the data block.

        The bytes must not be changed until the request is done. Where all queues are full, waits for an answer.
        Raises ValueError for blocks that the disk or the data block does not have, or too many for one command.
        """
        return self._transfer(Opcode.WRITE, lba, blocks, offset)

    def flush(self) -> Request:
        """Have the disk put all blocks, whose writes are done, where they survive a loss of power."""
        request = Request("flush")
        self._submit(Command(Opcode.FLUSH, self.identity.namespace), request)
        return request

    def _transfer(self, opcode: Opcode, lba: int, blocks: int, offset: int) -> Request:
        disk, size = self.identity, blocks * self.identity.block_size
        what = f"{opcode.name.lower()} of {blocks} blocks at LBA {lba}"
        if not (lba >= 0 and 1 <= blocks <= disk.blocks - lba and size <= disk.max_transfer) or offset % 4:
            raise ValueError(
                f"{what}: the disk has {disk.blocks} blocks of {disk.block_size} bytes, and a command moves at most "
                f"{disk.max_transfer} bytes, at a multiple of 4 bytes"
            )
        prps = tuple(iova for iova, _size in self._mapper.segments(self.data, offset, size, boundary=PAGE))
        dwords = (lba & 0xFFFF_FFFF, lba >> 32, blocks - 1)
        request = Request(what, offset, offset + size)
        self._submit(Command(opcode, disk.namespace, prps, dwords), request)
        return request

    def _submit(self, command: Command, request: Request) -> None:
        """Use the queue with the fewest commands."""
        pair = min(self.queues[1:], key=lambda each: len(each.requests))
        while pair.full:
            self._collect()
        pair.submit(command, request)

    # ------------------------------------------------------------------------------------------------------ waiting

    @property
    def outstanding(self) -> list[Request]:
        """The requests that are not done."""
        return [request for pair in self.queues for request in pair.requests.values()]

    @property
    def unanswered(self) -> int:
        """How many requests the controller has not answered, at this moment."""
        return sum(pair.unanswered for pair in self.queues)

    def describe_outstanding(self) -> str:
        """Say what is outstanding, in words."""
        found = [request.what for request in self.outstanding]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return f"{len(found)} outstanding: {', '.join(found[:5]) or 'nothing'}{more}"

    def wait(self) -> list[Request]:
        """Wait until at least one request is done, and return all that are, each of them once.

        Returns an empty list when nothing is outstanding. A request that failed is returned as the others are:
        `Request.result` raises its error. Raises CommandTimeoutError, ControllerFailedError.
        """
        self._reap()
        if not self._done and self.outstanding:
            self._collect()
        done, self._done = self._done, []
        return done

    def finish(self, request: Request) -> int:
        """Wait for one request and return its result. The next `wait` returns the others that are done meanwhile."""
        while not request.done:
            self._collect()
        if request in self._done:
            self._done.remove(request)
        return request.result()

    def quiesce(self) -> None:
        """Wait until nothing is outstanding. The next `wait` returns the requests."""
        while self.outstanding:
            self._collect()

    def _collect(self) -> None:
        """Wait until there are answers, and take them. Queues come first: one interrupt may stand for many answers."""
        while not self._reap():
            self._check_alive()
            self._irq.wait_any(timeout=min(PULSE, self.timeout))

    def _reap(self) -> bool:
        """Take the answers that are there. Return whether there were any. Raises as `wait`."""
        done = [request for pair in self.queues for request in pair.reap()]
        self._done += done
        self._check_overdue()
        return bool(done)

    def _check_overdue(self) -> None:
        oldest = min((pair.oldest for pair in self.queues), default=math.inf)
        if time.monotonic() - oldest > self.timeout:
            self._check_alive()
            raise CommandTimeoutError(
                f"{self.bdf} did not complete a command in {self.timeout:g} s, with {self.describe_outstanding()}",
                outstanding=self.outstanding,
                hint="Call reset(), which aborts these commands",
            )

    # ------------------------------------------------------------------------------------------------------- the end

    def resize(self, length: int) -> None:
        """Make the data block `length` bytes long.

        The controller must have no command for bytes behind the new end: ValueError. Their IOVA is unmapped, so the
        commands would fail, and their memory is returned. Without granules, bytes that stay are unmapped for a moment.
        So this waits for all commands first; the next `wait` returns them. Raises as `RamBlock.resize`.
        """
        if beyond := [request.what for request in self.outstanding if request.end > length]:
            raise ValueError(f"a data block of {length} bytes is too short for {', '.join(beyond)}")
        if not self._keeps_going:
            self.quiesce()
        self.data.resize(length)

    def close(self) -> None:
        """Stop the controller, abort what is outstanding, and return memory and interrupts. Twice is fine."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------------ the program

NAME = "nvme"
BUFFER = 64 * pyvfio.KIB  # a granule of the data block
POLICIES = {"extend": EXTEND, "remap": REMAP}
LOW, MOST = 1, 8  # buffers that the data block has
POISON = b"\xa5" * BUFFER


@dataclass
class Report:
    """The figures of a run. `blocks` were written, read back and compared; of these, `lost` were not as written.

    `stray` counts reads that changed bytes beside those that were read. `at_work` counts resizes during which the
    controller had commands to answer.
    """

    block_size: int = 0
    blocks: int = 0
    commands: int = 0
    lost: int = 0
    stray: int = 0
    resizes: int = 0
    at_work: int = 0
    flushes: int = 0

    @property
    def ok(self) -> bool:
        """Whether no data was lost or misplaced."""
        return not self.lost and not self.stray


@dataclass(eq=False)
class Job:
    """Blocks on their way to the disk and back, through a part of a buffer of the data block."""

    lba: int
    blocks: int
    start: int
    pattern: bytes
    written: bool = False


class Exercise:
    """Writes blocks, reads them back and compares them, while the data block is resized."""

    def __init__(self, disk: Nvme, *, blocks: int, resizes: int, seed: int) -> None:
        self.report = Report(disk.identity.block_size)
        self._disk = disk
        self._blocks = blocks
        self._resizes = resizes
        self._random = random.Random(seed)  # noqa: S311 (no secret)
        self._started = 0
        self._jobs: dict[int, Job] = {}  # by the number of the buffer
        self._buffers: dict[Request, int] = {}
        self._target = MOST
        # Each buffer has a part of the disk for itself, so that no two commands at a time are for the same block.
        self._share = disk.identity.blocks // MOST
        self._lbas = [number * self._share for number in range(MOST)]
        if self._share * disk.identity.block_size < BUFFER:
            raise pyvfio.UnsupportedError(f"{disk.bdf} is too small: it has {disk.identity.blocks} blocks")

    def run(self) -> Report:
        """Move the blocks."""
        self._resize()
        while self._more or self._jobs:
            self._start_jobs()
            if self.report.resizes < self._resizes:
                self._breathe()
            for request in self._disk.wait():
                request.result()
                self._advance(self._buffers.pop(request))
        self._disk.finish(self._disk.flush())
        self.report.flushes += 1
        return self.report

    @property
    def _more(self) -> bool:
        return self._started < self._blocks or self.report.resizes < self._resizes

    def _start_jobs(self) -> None:
        """Fill and write each buffer that is idle and will stay."""
        for number in range(min(self._target, self._disk.data.used_length // BUFFER)):
            if number not in self._jobs and self._more:
                self._jobs[number] = job = self._next_job(number)
                self._store(number, job.start, job.pattern)
                self._submit(self._disk.write, number, job)

    def _next_job(self, number: int) -> Job:
        disk = self._disk.identity
        most = min(BUFFER, disk.max_transfer) // disk.block_size
        blocks = self._random.randint(1, most)
        if self._started < self._blocks:
            blocks = min(blocks, self._blocks - self._started)
        lba = self._lbas[number]
        if lba + blocks > (number + 1) * self._share:
            lba = number * self._share
        self._lbas[number] = lba + blocks
        start = self._random.randint(0, BUFFER // disk.block_size - blocks) * disk.block_size
        # A block that is lost, or comes from another place or time, differs: each block of each job has its own cell.
        cells = (struct.pack("<QQ", lba + block, self._started + block) for block in range(blocks))
        pattern = b"".join(cell * (disk.block_size // len(cell)) for cell in cells)
        self._started += blocks
        return Job(lba, blocks, start, pattern)

    def _submit(self, command: Callable[..., Request], number: int, job: Job) -> None:
        request = command(job.lba, job.blocks, offset=number * BUFFER + job.start)
        self._buffers[request] = number
        self.report.commands += 1

    def _store(self, number: int, start: int, data: bytes) -> None:
        with self._disk.data.view(number * BUFFER + start, len(data)) as view:
            view[:] = data

    def _advance(self, number: int) -> None:
        """Read what was written; compare what was read."""
        job = self._jobs[number]
        if not job.written:
            job.written = True
            self._store(number, 0, POISON)
            self._submit(self._disk.read, number, job)
            return
        del self._jobs[number]
        self.report.blocks += job.blocks
        end = job.start + len(job.pattern)
        with self._disk.data.view(number * BUFFER, BUFFER) as view:
            if view[job.start : end] != job.pattern:
                self.report.lost += self._count_lost(bytes(view[job.start : end]), job.pattern)
            self.report.stray += view[: job.start] != POISON[: job.start] or view[end:] != POISON[end:]

    def _count_lost(self, found: bytes, wanted: bytes) -> int:
        size = self.report.block_size
        return sum(found[at : at + size] != wanted[at : at + size] for at in range(0, len(wanted), size))

    def _breathe(self) -> None:
        """Resize, when it is time for it and no buffer behind the new end is at work."""
        if any(number >= self._target for number in self._jobs):
            return
        if self._disk.data.used_length != self._target * BUFFER:
            self._resize()
            self.report.resizes += 1
        if self.report.blocks * self._resizes >= self._blocks * self.report.resizes:
            present = self._disk.data.used_length // BUFFER
            self._target = self._random.choice([n for n in range(LOW, MOST + 1) if n != present])

    def _resize(self) -> None:
        self._disk.resize(self._target * BUFFER)
        # Unanswered now, and so before: the controller had these commands throughout the resize.
        self.report.at_work += self._disk.unanswered > 0


def positive(text: str) -> int:
    """A number from 1 on, for `type=`."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog=NAME,
        description="Shows an NVMe disk. With --overwrite: writes blocks, reads them back and compares them, while the "
        "memory for their data is resized.",
    )
    add = made.add_argument
    add("device", nargs="?", type=pci.parse_bdf, metavar="BDF", help="default: the only NVMe controller that is unused")
    add("--overwrite", action="store_true", help="move blocks: DESTROYS the data that is on the disk")
    add("--blocks", type=positive, default=10000, metavar="N", help="to write and read back; default: %(default)s")
    add("--resizes", type=positive, default=100, metavar="N", help="of the data block; default: %(default)s")
    add("--policy", choices=POLICIES, default="extend", help="of the mapper; default: %(default)s")
    add("--seed", type=int, default=1, metavar="N", help="of lengths, places and sizes; default: %(default)s")
    add("--bind", action="store_true", help="bind the device to vfio-pci first, and to its former driver at the end")
    add("--iommu", choices=["type1", "iommufd"], help="the address space; default: as open_device() chooses")
    add("--fake", action="store_true", help="on the fake kernel, with a fake controller")
    add("--json", action="store_true", help="for programs")
    return made


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[pyvfio.Device]:
    """Open the device of the command line."""
    with ExitStack() as stack:
        if options.fake:
            fake = stack.enter_context(FakeKernel("7.3", groups=[(4, [FakeNvme("0000:01:00.0")])], iommufd=True))
            yield stack.enter_context(pyvfio.open_device(fake.bdfs[0], iommu=options.iommu, kernel=fake))
            return
        kernel = pyvfio.LinuxKernel()
        bdf = options.device or find(pci.devices(kernel=kernel))
        if options.bind:
            stack.callback(pci.restore, pci.bind(bdf, kernel=kernel), kernel=kernel)
        yield stack.enter_context(pyvfio.open_device(bdf, iommu=options.iommu, kernel=kernel))


def find(devices: Iterable[pci.PciDevice]) -> str:
    """Return the address of the only NVMe controller without a driver of the kernel. Raises DeviceNotFoundError."""
    found = [each.bdf for each in devices if each.class_code == 0x010802 and (each.driver is None or each.is_vfio)]
    if len(found) != 1:
        raise pyvfio.DeviceNotFoundError(
            f"there are {len(found)} NVMe controllers without a driver of the kernel", hint="Give the BDF of one"
        )
    return found[0]


def describe(identity: Identity) -> str:
    """The disk in one line."""
    size = identity.blocks * identity.block_size
    return (
        f"{identity.model}, serial {identity.serial}, firmware {identity.firmware}: {identity.blocks} blocks of "
        f"{identity.block_size} bytes, {size / pyvfio.GIB:.2f} GiB"
    )


def main() -> int:
    """Show the disk, or move blocks and show the figures; status 1 when blocks were lost."""
    options = parser().parse_args()
    with opened(options) as device, Nvme(device, policy=POLICIES[options.policy]) as disk:
        identity = disk.identity
        if not (options.overwrite or options.fake):
            print(json.dumps(identity._asdict()) if options.json else describe(identity))
            return 0
        report = Exercise(disk, blocks=options.blocks, resizes=options.resizes, seed=options.seed).run()
    if options.json:
        print(json.dumps({"ok": report.ok, "policy": options.policy, **asdict(report)}))
    else:
        print(describe(identity))
        print(f"{report.blocks} blocks written and read back by {report.commands} commands, {report.lost} lost")
        print(f"{report.resizes} resizes, {report.at_work} of them with the controller at work")
    return 0 if report.ok else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (pyvfio.VfioError, OSError) as error:
        sys.exit(f"{NAME}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
