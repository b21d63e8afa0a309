"""Where a driver is in a record: each access that the driver makes is compared with the record, in one of two orders.

`StrictOrder` follows the record line by line. `RegisterOrder` keeps the order of the writes of each register, and lets
the driver choose the order between registers. Both know nothing of a fake kernel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from pyvfio.recording.format import CONFIG, Access, Event, Interrupt, Line, Record, Reset, is_block

OrderName: TypeAlias = Literal["strict", "registers"]
Action: TypeAlias = Access | Reset
"""An event that a driver makes."""
Register: TypeAlias = tuple[int, int]
"""A region and an offset."""
_Key: TypeAlias = tuple[object, ...]


class Mismatch(Exception):  # noqa: N818 (RecordedDevice raises the error that users see)
    """The driver made another access than `expected`; None: the record has no further one. `why` explains."""

    def __init__(self, expected: Line | None, why: str = "") -> None:
        super().__init__(why)
        self.expected = expected
        self.why = why


class Order(Protocol):
    """The rest of a record, and the contents of configuration space at this place of the record."""

    config: bytearray

    def take(self, actual: Action) -> Line:
        """Go past an action of the driver, and return the line of the record. Raises Mismatch."""
        ...

    def look_at_config(self, offset: int, size: int) -> None:
        """Go past a read of configuration space, which is never a mismatch."""
        ...

    def due(self) -> list[Interrupt]:
        """Return the interrupts that come now, each once."""
        ...

    def left(self) -> Line | None:
        """Return the next line that the driver has to make."""
        ...


def make_order(name: OrderName, record: Record, any_value: Collection[Register]) -> Order:
    """Begin at the first line of a record. `any_value`: registers whose writes may have any value."""
    return StrictOrder(record, any_value) if name == "strict" else RegisterOrder(record, any_value)


def _is_config_read(event: Event) -> bool:
    return isinstance(event, Access) and event.region == CONFIG and not event.write


class _Base:
    """The common part of both orders."""

    def __init__(self, record: Record, any_value: Collection[Register]) -> None:
        self.config = bytearray(record.header.config)
        self._any_value = any_value
        self._due: list[Interrupt] = []
        # The fake refuses by itself the accesses that the kernel has refused.
        self._lines = [line for line in record.lines if not (isinstance(line.event, Access) and line.event.errno)]

    def due(self) -> list[Interrupt]:
        """As `Order.due`."""
        due, self._due = self._due, []
        return due

    def _apply(self, event: Event) -> None:
        """Take in bytes of configuration space that an access has shown."""
        if isinstance(event, Access) and event.region == CONFIG and event.data is not None:
            self.config[event.offset : event.offset + event.width] = event.data

    def _match(self, expected: Event, actual: Action) -> bool:
        if isinstance(expected, Reset) or isinstance(actual, Reset):
            return expected == actual
        if not isinstance(expected, Access) or not expected.is_same_place(actual):
            return False
        return not actual.write or actual.data == expected.data or (actual.region, actual.offset) in self._any_value


class StrictOrder(_Base):
    """Line by line. Reads of configuration space are optional: the library and the kernel answer some from memory."""

    def __init__(self, record: Record, any_value: Collection[Register]) -> None:
        super().__init__(record, any_value)
        self._rest = deque(self._lines)
        self._settle()

    def _settle(self) -> None:
        """Go past the lines that no action of a driver stands for."""
        while self._rest and not isinstance(self._rest[0].event, Access | Reset):
            event = self._rest.popleft().event
            if isinstance(event, Interrupt):
                self._due.append(event)

    def _pass(self) -> Line:
        line = self._rest.popleft()
        self._apply(line.event)
        self._settle()
        return line

    def take(self, actual: Action) -> Line:
        """As `Order.take`."""
        while self._rest and _is_config_read(self._rest[0].event):
            self._pass()
        if not self._rest:
            raise Mismatch(None, "the record has ended")
        if not self._match(self._rest[0].event, actual):
            raise Mismatch(self._rest[0])
        return self._pass()

    def look_at_config(self, offset: int, size: int) -> None:
        """As `Order.look_at_config`."""
        event = self._rest[0].event if self._rest else None
        if isinstance(event, Access) and event.is_same_place(_config_read(offset, size)):
            self._pass()

    def left(self) -> Line | None:
        """As `Order.left`."""
        return next((line for line in self._rest if _is_action(line.event)), None)


def _config_read(offset: int, size: int) -> Access:
    return Access(False, CONFIG, offset, size, None, block=is_block(offset, size))  # noqa: FBT003 (a read)


def _is_action(event: Event) -> bool:
    return isinstance(event, Access | Reset) and not _is_config_read(event)


@dataclass(frozen=True, slots=True)
class _Run:
    """Reads of a register that returned the same bytes, with no write between them. `epoch`: the writes before."""

    position: int
    epoch: int
    line: Line


class RegisterOrder(_Base):
    """The writes of each register in their order; registers in any order.

    A read returns a recorded value when the driver has made all writes that precede the value in the record. Later
    reads return the same value until the next value is due. An interrupt is raised when all preceding writes were made.
    """

    def __init__(self, record: Record, any_value: Collection[Register]) -> None:
        super().__init__(record, any_value)
        self._writes: dict[_Key, deque[int]] = {}
        self._undone: dict[int, None] = {}  # the positions of writes that the driver has not made, ascending
        self._runs: dict[_Key, list[_Run]] = {}
        self._given: dict[_Key, int] = {}
        self._later: deque[tuple[int, Event]] = deque()  # interrupts, and reads of configuration space
        epoch = 0
        for position, line in enumerate(self._lines):
            epoch += self._add(position, epoch, line)
        self._settle()

    def _add(self, position: int, epoch: int, line: Line) -> int:
        """Add a line. Return the number of writes in the line."""
        event = line.event
        if isinstance(event, Interrupt) or _is_config_read(event):
            self._later.append((position, event))
        elif isinstance(event, Reset) or (isinstance(event, Access) and event.write):
            self._writes.setdefault(_key(event), deque()).append(position)
            self._undone[position] = None
            return 1
        elif isinstance(event, Access):
            runs = self._runs.setdefault(_key(event), [])
            if not runs or runs[-1].epoch != epoch or runs[-1].line.event != event:
                runs.append(_Run(position, epoch, line))
        return 0

    @property
    def _frontier(self) -> int:
        """The position of the first write that the driver has not made."""
        return next(iter(self._undone), len(self._lines))

    def _settle(self) -> None:
        frontier = self._frontier
        while self._later and self._later[0][0] < frontier:
            event = self._later.popleft()[1]
            if isinstance(event, Interrupt):
                self._due.append(event)
            else:
                self._apply(event)

    def take(self, actual: Action) -> Line:
        """As `Order.take`."""
        if isinstance(actual, Access) and not actual.write:
            return self._read(_key(actual))
        queue = self._writes.get(_key(actual)) or deque()
        if not queue:
            raise Mismatch(None, "the record has no such access here, before or later")
        line = self._lines[queue[0]]
        if not self._match(line.event, actual):
            raise Mismatch(line)
        del self._undone[queue.popleft()]
        self._apply(actual)
        self._settle()
        return line

    def _read(self, key: _Key) -> Line:
        runs, given = self._runs.get(key, []), self._given.get(key, -1)
        if not runs:
            raise Mismatch(None, "the record has no read of this register")
        there = [number for number, run in enumerate(runs) if run.position < self._frontier]
        if not there:
            raise Mismatch(
                self._lines[self._frontier],
                f"the record reads this register after this line, first in line {runs[0].line.number}",
            )
        newest = runs[there[-1]].epoch
        first = next(number for number in there if runs[number].epoch == newest)
        self._given[key] = min(max(given + 1, first), there[-1])
        return runs[self._given[key]].line

    def look_at_config(self, offset: int, size: int) -> None:
        """As `Order.look_at_config`: `config` is as new as the writes that were made."""

    def left(self) -> Line | None:
        """As `Order.left`. Reads may be left out."""
        return self._lines[self._frontier] if self._undone else None


def _key(event: Action) -> _Key:
    return ("reset",) if isinstance(event, Reset) else (event.block, *event.register)
