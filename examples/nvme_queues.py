"""Commands and queues of NVMe controllers: the part of the driver in nvme.py that writes and reads shared memory.

§ is "NVM Express Base Specification 1.4".
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import pyvfio

PAGE = pyvfio.PAGE_SIZE  # of the controller too: CC.MPS is 0
MAX_TRANSFER = 32 * PAGE  # bytes of one command
LIST_SIZE = MAX_TRANSFER // PAGE * 8  # bytes of a PRP list; a power of two, so that no list crosses a page
ENTRIES = 64  # of a queue: its submission entries fill a page

Doorbell = Callable[[int], object]  # writes one: `Register.write`

SUBMISSION = struct.Struct("<BxHI16xQQ6I")  # §4.2: opcode, identifier, namespace, PRP 1, PRP 2, dwords 10 to 15
COMPLETION = struct.Struct("<I4xHHHH")  # §4.6: result, head and number of the submission queue, identifier, status


class Admin(IntEnum):
    """Opcodes of admin commands, §5."""

    CREATE_SUBMISSION_QUEUE = 0x01
    CREATE_COMPLETION_QUEUE = 0x05
    IDENTIFY = 0x06
    SET_FEATURES = 0x09


class Opcode(IntEnum):
    """Opcodes of the NVM command set, §6."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02


STATUS_NAMES = {  # status code type and status code, §4.6.1: those that a driver's faults lead to
    0x001: "invalid opcode",
    0x002: "invalid field",
    0x004: "data transfer error",
    0x00B: "invalid namespace or format",
    0x013: "invalid PRP offset",
    0x080: "LBA out of range",
    0x101: "invalid queue identifier",
    0x102: "invalid queue size",
    0x108: "invalid interrupt vector",
    0x280: "write fault",
    0x281: "unrecovered read error",
}


# ---------------------------------------------------------------------------------------------------------- errors


class CommandError(pyvfio.VfioError):
    """The controller refused a command or failed to execute it. `status`: status code type and status code, §4.6.1."""

    def __init__(self, message: str, *, status: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


class AbortedError(pyvfio.VfioError):
    """The controller was reset or closed before it completed a command."""


class ControllerFailedError(pyvfio.VfioError):
    """The controller does not work: it is in its fatal state, does not change its state, or answers no command."""


# ---------------------------------------------------------------------------------------------------------- queues


@dataclass(eq=False)
class Request:
    """A command, from its submission on. The controller accesses the bytes from `start` to `end` of the data block."""

    what: str
    start: int = 0
    end: int = 0
    submitted: float = field(default_factory=time.monotonic)
    done: bool = False
    value: int = 0
    error: pyvfio.VfioError | None = None

    def result(self) -> int:
        """Return dword 0 of the completion. Raises CommandError, AbortedError; VfioError before it is done."""
        if not self.done:
            raise pyvfio.VfioError(f"{self.what} is not done", hint="Call wait() first")
        if self.error is not None:
            raise self.error
        return self.value

    def complete(self, status: int, value: int) -> None:
        """Take the answer of the controller."""
        self.done, self.value = True, value
        if status:
            name = STATUS_NAMES.get(status, "see the specification")
            self.error = CommandError(f"{self.what} failed: {name} (status {status:#x})", status=status)

    def abort(self, why: str) -> None:
        """End without an answer."""
        self.done, self.error = True, AbortedError(f"{self.what} was aborted: {why}")


class Command(NamedTuple):
    """The fields of a command that drivers of this kind use, §4.2."""

    opcode: int
    namespace: int = 0
    prps: tuple[int, ...] = ()
    dwords: tuple[int, ...] = ()


class QueueLayout(NamedTuple):
    """Offsets of the parts of a queue pair in the block of queues. A PRP list for each entry follows the two rings."""

    submissions: int
    completions: int
    lists: int
    end: int

    @classmethod
    def of(cls, number: int) -> QueueLayout:
        """The layout of the queue pair with that number; pair 0 is at the start."""
        size = 2 * PAGE + ENTRIES * LIST_SIZE
        start = number * size
        return cls(start, start + PAGE, start + 2 * PAGE, start + size)


class QueuePair:
    """A submission queue and its completion queue, in memory that starts at `iova`.

    Its commands have the identifiers 0 to `entries` - 2. So neither ring can overflow: a ring is full with one entry
    less than it has. On x86 the controller sees stores to memory and to doorbells in program order. Other processors
    need a barrier before each doorbell.
    """

    def __init__(
        self, number: int, *, memory: memoryview, iova: int, entries: int, doorbells: tuple[Doorbell, Doorbell]
    ) -> None:
        self.number = number
        self.entries = entries
        self.requests: dict[int, Request] = {}
        self._memory = memory
        self._layout = QueueLayout.of(number)
        self._iova = iova
        self._free = list(range(entries - 1))
        self._tail = self._head = 0
        self._phase = 1
        self._submitted, self._completed = doorbells
        # An answer that is left from before a reset could have the phase of a new one.
        memory[self._layout.submissions : self._layout.lists] = bytes(2 * PAGE)

    @property
    def submissions(self) -> int:
        """The IOVA of the submission queue."""
        return self._iova + self._layout.submissions

    @property
    def completions(self) -> int:
        """The IOVA of the completion queue."""
        return self._iova + self._layout.completions

    @property
    def full(self) -> bool:
        """Whether no command can be submitted."""
        return not self._free

    @property
    def oldest(self) -> float:
        """When the oldest request was submitted, or infinity. The dict has them in that order."""
        return next((request.submitted for request in self.requests.values()), math.inf)

    @property
    def unanswered(self) -> int:
        """How many requests the controller has not answered yet. Answers need not have been reaped."""
        answered, head, phase = 0, self._head, self._phase
        while self._entry(head)[4] & 1 == phase:
            answered, head = answered + 1, (head + 1) % self.entries
            phase ^= head == 0
        return len(self.requests) - answered

    def submit(self, command: Command, request: Request) -> None:
        """Put a command into the submission queue and ring its doorbell. The queue must not be full."""
        identifier = self._free.pop()
        self.requests[identifier] = request
        prp1, prp2 = self._prps(identifier, command.prps)
        dwords = (*command.dwords, 0, 0, 0, 0, 0, 0)[:6]
        place = self._layout.submissions + SUBMISSION.size * self._tail
        SUBMISSION.pack_into(self._memory, place, command.opcode, identifier, command.namespace, prp1, prp2, *dwords)
        self._tail = (self._tail + 1) % self.entries
        self._submitted(self._tail)

    def _prps(self, identifier: int, prps: Sequence[int]) -> tuple[int, int]:
        """Return PRP 1 and PRP 2, §4.3: up to two pages themselves, or the first and the list of the others."""
        if len(prps) <= 2:
            first, second = (*prps, 0, 0)[:2]
            return first, second
        place = self._layout.lists + LIST_SIZE * identifier
        struct.pack_into(f"<{len(prps) - 1}Q", self._memory, place, *prps[1:])
        return prps[0], self._iova + place

    def reap(self) -> list[Request]:
        """Take the answers out of the completion queue and return their requests, which are done."""
        done: list[Request] = []
        while True:
            value, _head, _queue, identifier, status = self._entry(self._head)
            if status & 1 != self._phase:
                break
            request = self.requests.pop(identifier, None)
            if request is None:
                raise ControllerFailedError(f"queue {self.number}: no command has identifier {identifier}")
            self._free.append(identifier)
            self._head = (self._head + 1) % self.entries
            self._phase ^= self._head == 0
            request.complete(status >> 1 & 0x7FF, value)
            done.append(request)
        if done:
            self._completed(self._head)
        return done

    def _entry(self, index: int) -> tuple[int, ...]:
        """Return an answer, which is there if its phase is the one that is due. The phase is read first, §4.6."""
        place = self._layout.completions + COMPLETION.size * index
        phase = self._memory[place + 14] & 1
        *fields, status = COMPLETION.unpack_from(self._memory, place)
        return (*fields, status & ~1 | phase)

    def abort(self, why: str) -> list[Request]:
        """End all requests. The controller must have been disabled."""
        aborted, self.requests = list(self.requests.values()), {}
        for request in aborted:
            request.abort(why)
        return aborted
