"""A fake NVMe controller for `pyvfio.testing.FakeKernel`: it runs the driver in nvme.py in milliseconds.

The numbers are those of "NVM Express Base Specification 1.4", §, and are written here a second time on purpose: the
fake checks the driver's numbers. QEMU's controller checks the fake, because the driver runs on both.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

from pyvfio.testing import DmaFault, FakePciDevice

_PAGE = 4096
_MQES = 63  # queues have at most 64 entries
_CAP = _MQES | 1 << 16 | 1 << 24 | 1 << 37  # CQR: queues are contiguous; TO: 500 ms; CSS: the NVM command set
_CC, _CSTS, _AQA, _ASQ, _ACQ, _DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000
_READY, _FATAL, _SHUTDOWN_COMPLETE = 1, 2, 2 << 2

SUCCESS, INVALID_OPCODE, INVALID_FIELD, TRANSFER_ERROR, INVALID_NAMESPACE = 0x000, 0x001, 0x002, 0x004, 0x00B
INVALID_PRP_OFFSET, LBA_OUT_OF_RANGE = 0x013, 0x080
INVALID_COMPLETION_QUEUE, INVALID_QUEUE, INVALID_QUEUE_SIZE, INVALID_VECTOR = 0x100, 0x101, 0x102, 0x108


class Entry(NamedTuple):
    """A submission queue entry, §4.2."""

    opcode: int
    cid: int
    nsid: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int

    @classmethod
    def parse(cls, data: bytes) -> Entry:
        """Of 64 bytes."""
        opcode, cid, nsid, prp1, prp2, *words = struct.unpack("<BxHI16xQQ3I12x", data)
        return cls(opcode, cid, nsid, prp1, prp2, *words)


@dataclass
class _Completions:
    base: int
    entries: int
    vector: int | None
    head: int = 0
    tail: int = 0
    phase: int = 1

    @property
    def full(self) -> bool:
        return (self.tail + 1) % self.entries == self.head


@dataclass
class _Submissions:
    base: int
    entries: int
    completions: int
    head: int = 0
    tail: int = 0


class FakeNvme(FakePciDevice):
    """An NVMe controller with one namespace of `blocks` blocks of `block_size` bytes.

    A thread of its own executes a command every `pause` seconds while there is one. With `pause=None` admin commands
    are executed at once, and each call of `serve` executes one other command. `executed` counts all of them.

    Where the IOMMU stops the DMA of a transfer, the command fails with Data Transfer Error. Where it stops the DMA to
    a queue, the controller sets CSTS.CFS and executes nothing until it is reset.
    """

    vendor, device, class_code = 0x1B36, 0x0010, 0x010802
    bar_sizes = {0: 0x2000, 4: 0x1000}  # noqa: RUF012 (the base class says that it is a class's)
    msi, msix, msix_bar = 0, 5, 4
    pcie = True
    mdts = 5  # transfers have at most 2^5 pages
    io_queues = 2

    def __init__(self, bdf: str, *, blocks: int = 16384, block_size: int = 512, pause: float | None = 0.0005) -> None:
        """`pause` in seconds."""
        self.block_size = block_size
        self.storage = mmap.mmap(-1, blocks * block_size)  # zeros, of which a page is there once it is written
        self.executed = 0
        self.flushed = 0
        self._pause = pause
        self._working = False
        super().__init__(bdf)

    @property
    def blocks(self) -> int:
        """The capacity."""
        return len(self.storage) // self.block_size

    # ------------------------------------------------------------------------------------------------- registers

    def reset(self) -> None:
        """Forget the queues and set all registers to zero. The namespace keeps its data."""
        self._registers = bytearray(0x40)
        struct.pack_into("<QI", self._registers, 0, _CAP, 0x10400)
        self._forget_queues()

    def _forget_queues(self) -> None:
        self._submissions: dict[int, _Submissions] = {}
        self._completions: dict[int, _Completions] = {}
        self._turn = 0

    def read_register(self, bar: int, offset: int, width: int, /) -> int:
        """§3.1. Doorbells read as zero."""
        if bar != 0 or offset + width > len(self._registers):
            return 0
        return int.from_bytes(self._registers[offset : offset + width], "little")

    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """CC, the addresses of the admin queues, and the doorbells. All other registers are read-only."""
        if bar != 0:
            return
        if offset >= _DOORBELLS:
            self._ring(*divmod((offset - _DOORBELLS) // 4, 2), value)
        elif offset == _CC:
            self._configure(self._u32(_CC), value)
        elif offset >= _AQA and offset + width <= _ACQ + 8:
            self._registers[offset : offset + width] = value.to_bytes(width, "little")

    def _configure(self, old: int, new: int) -> None:
        struct.pack_into("<I", self._registers, _CC, new)
        if new & ~old & 1:
            self._enable()
        elif old & ~new & 1:
            self._forget_queues()
            self._set_status(0)
        if new >> 14 & 3:
            self._set_status(self._status | _SHUTDOWN_COMPLETE)

    def _enable(self) -> None:
        """§7.6.1. Entries of 64 and 16 bytes, pages of 4 KiB; anything else is fatal."""
        sizes, (asq, acq) = self._u32(_AQA), struct.unpack_from("<QQ", self._registers, _ASQ)
        if self._u32(_CC) & 0xFF_07F0 != 4 << 20 | 6 << 16 or (asq | acq) % _PAGE:
            self.fail()
            return
        self._submissions[0] = _Submissions(asq, (sizes & 0xFFF) + 1, 0)
        self._completions[0] = _Completions(acq, (sizes >> 16 & 0xFFF) + 1, 0)
        self._set_status(_READY)

    def fail(self) -> None:
        """Set CSTS.CFS: a fatal state, which only a reset ends."""
        self._set_status(self._status | _FATAL)

    def _set_status(self, status: int) -> None:
        struct.pack_into("<I", self._registers, _CSTS, status)

    @property
    def _status(self) -> int:
        return self._u32(_CSTS)

    def _u32(self, offset: int) -> int:
        return int.from_bytes(self._registers[offset : offset + 4], "little")

    def _ring(self, number: int, is_completion: int, value: int) -> None:
        if is_completion and number in self._completions:
            self._completions[number].head = value
        elif not is_completion and number in self._submissions:
            self._submissions[number].tail = value
        if self._pause is None:
            if number == 0 and not is_completion:
                self.serve()
        elif not self._working:
            self._working = True
            threading.Thread(target=self._work, args=(self._pause,), daemon=True).start()

    # -------------------------------------------------------------------------------------------------- commands

    def _work(self, pause: float) -> None:
        while self._working:
            time.sleep(pause)
            with self.lock:
                self._working = self.serve()

    def serve(self) -> bool:
        """Execute one command and return whether there was one. The queues take turns, §4.13.1."""
        with self.lock:
            if self._status & (_READY | _FATAL) != _READY:
                return False
            waiting = [number for number, queue in self._submissions.items() if self._can_step(queue)]
            if not waiting:
                return False
            self._turn = min(waiting, key=lambda number: (number <= self._turn, number))
            try:
                self._step(self._turn, self._submissions[self._turn])
            except DmaFault:
                self.fail()
            return True

    def _can_step(self, queue: _Submissions) -> bool:
        return queue.head != queue.tail and not self._completions[queue.completions].full

    def _step(self, number: int, queue: _Submissions) -> None:
        entry = Entry.parse(self.dma_read(queue.base + 64 * queue.head, 64))
        queue.head = (queue.head + 1) % queue.entries
        try:
            answer = self.execute_admin(entry) if number == 0 else self.execute(entry)
        except DmaFault:
            answer = TRANSFER_ERROR, 0
        self.executed += 1
        if answer is not None and number in self._submissions:
            self._complete(number, queue, entry.cid, *answer)

    def _complete(self, number: int, queue: _Submissions, cid: int, status: int, result: int) -> None:
        """Post a completion queue entry, §4.6."""
        to = self._completions[queue.completions]
        data = struct.pack("<IIHHHH", result, 0, queue.head, number, cid, status << 1 | to.phase)
        self.dma_write(to.base + 16 * to.tail, data)
        to.tail = (to.tail + 1) % to.entries
        to.phase ^= to.tail == 0
        if to.vector is not None:
            self.raise_interrupt(to.vector)

    def execute_admin(self, entry: Entry) -> tuple[int, int] | None:
        """Execute an admin command, §5. Return the status and dword 0, or None for a command that never completes."""
        match entry.opcode:
            case 0x01:
                return self._create_submissions(entry), 0
            case 0x05:
                return self._create_completions(entry), 0
            case 0x06:
                return self._identify(entry), 0
            case 0x09 if entry.cdw10 & 0xFF == 7:
                return SUCCESS, (self.io_queues - 1) << 16 | (self.io_queues - 1)
        return INVALID_OPCODE, 0

    def _create_completions(self, entry: Entry) -> int:
        number, entries, vector = entry.cdw10 & 0xFFFF, (entry.cdw10 >> 16) + 1, entry.cdw11 >> 16
        if not 1 <= number <= self.io_queues or number in self._completions:
            return INVALID_QUEUE
        if not 2 <= entries <= _MQES + 1:
            return INVALID_QUEUE_SIZE
        if vector >= self.msix:
            return INVALID_VECTOR
        if entry.prp1 % _PAGE or not entry.cdw11 & 1:
            return INVALID_FIELD
        self._completions[number] = _Completions(entry.prp1, entries, vector if entry.cdw11 & 2 else None)
        return SUCCESS

    def _create_submissions(self, entry: Entry) -> int:
        number, entries, completions = entry.cdw10 & 0xFFFF, (entry.cdw10 >> 16) + 1, entry.cdw11 >> 16
        if not 1 <= number <= self.io_queues or number in self._submissions:
            return INVALID_QUEUE
        if completions not in self._completions:
            return INVALID_COMPLETION_QUEUE
        if not 2 <= entries <= _MQES + 1:
            return INVALID_QUEUE_SIZE
        if entry.prp1 % _PAGE or not entry.cdw11 & 1:
            return INVALID_FIELD
        self._submissions[number] = _Submissions(entry.prp1, entries, completions)
        return SUCCESS

    def _identify(self, entry: Entry) -> int:
        page = bytearray(_PAGE)
        match entry.cdw10 & 0xFF:
            case 0 if entry.nsid == 1:
                struct.pack_into("<Q", page, 0, self.blocks)
                page[128 + 2] = self.block_size.bit_length() - 1
            case 0:
                return INVALID_NAMESPACE
            case 1:
                page[4:72] = f"{'fake':20}{'pyvfio fake NVMe':40}{'1':8}".encode()
                page[77] = self.mdts
                page[525] = 1  # a volatile write cache, which a flush empties
            case 2:
                struct.pack_into("<I", page, 0, 1)
            case _:
                return INVALID_FIELD
        self.dma_write(entry.prp1, bytes(page))
        return SUCCESS

    def execute(self, entry: Entry) -> tuple[int, int] | None:
        """Execute a flush, a write or a read, §6. Return as `execute_admin`."""
        if entry.nsid != 1:
            return INVALID_NAMESPACE, 0
        match entry.opcode:
            case 0x00:
                self.flushed += 1
                return SUCCESS, 0
            case 0x01 | 0x02:
                return self._transfer(entry), 0
        return INVALID_OPCODE, 0

    def _transfer(self, entry: Entry) -> int:
        start = (entry.cdw10 | entry.cdw11 << 32) * self.block_size
        size = ((entry.cdw12 & 0xFFFF) + 1) * self.block_size
        if start + size > len(self.storage):
            return LBA_OUT_OF_RANGE
        if size > _PAGE << self.mdts:
            return INVALID_FIELD
        parts = self._parts(entry, size)
        if parts is None:
            return INVALID_PRP_OFFSET
        if entry.opcode == 0x01:
            self.storage[start : start + size] = b"".join(self.dma_read(iova, count) for iova, count in parts)
            return SUCCESS
        for iova, count in parts:
            self.dma_write(iova, self.storage[start : start + count])
            start += count
        return SUCCESS

    def _parts(self, entry: Entry, size: int) -> list[tuple[int, int]] | None:
        """The memory of a transfer, §4.3: at most a page at each PRP. None: a PRP has an offset where none may be."""
        first = min(size, _PAGE - entry.prp1 % _PAGE)
        pages = -((first - size) // _PAGE)
        following = [entry.prp2]
        if pages == 0:
            following = []
        elif pages > 1:
            if entry.prp2 % 8 or entry.prp2 % _PAGE + 8 * pages > _PAGE:
                return None
            following = list(struct.unpack(f"<{pages}Q", self.dma_read(entry.prp2, 8 * pages)))
        if entry.prp1 % 4 or any(prp % _PAGE for prp in following):
            return None
        parts = [(entry.prp1, first)]
        left = size - first
        for prp in following:
            parts.append((prp, min(left, _PAGE)))
            left -= _PAGE
        return parts
