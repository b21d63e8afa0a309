"""The choices that all authors of random sequences share: addresses, sizes, slots, memory and limits.

An author believes that each call succeeds. The belief only steers the author towards calls that have an effect; nothing
else depends on it. An episode never pins more than the arena. The choice is weighted towards edges at which kernels
surprise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pyvfio.units import PAGE_SIZE, IovaRange
from tools.comparison import ARENA_PAGES, ROOM, Episode, Op

LENGTH = 100
"""The number of calls of an episode."""

_P = PAGE_SIZE
TOP = 1 << 64
BASE = 0x10_0000
U32 = (1 << 32) - 1
BAD_ADDRESSES = (0, 0x1000, 1 << 47, 1 << 62, 0xFFFF_8000_0000_0000, TOP - _P, TOP - 1)


class Author:
    """Writes one episode. A subclass has the calls, with their weights, and the calls at the beginning."""

    def __init__(self, chance: random.Random, ranges: Sequence[IovaRange]) -> None:
        self._chance = chance
        self._ranges = ranges
        self._believed: list[tuple[int, int]] = []
        self._open: set[str] = set()
        self.ops: list[Op] = []

    def _calls(self) -> dict[Callable[[], None], int]:
        raise NotImplementedError

    def _prologue(self) -> None:
        raise NotImplementedError

    def write(self, length: int) -> tuple[Op, ...]:
        """Return so many calls."""
        self._prologue()
        weighted = self._calls()
        calls, weights = list(weighted), list(weighted.values())
        while len(self.ops) < length:
            self._chance.choices(calls, weights)[0]()
        return tuple(self.ops[:length])

    # ------------------------------------------------------------------------------------------------ choices

    def _often(self, chance: float) -> bool:
        return self._chance.random() < chance

    def _one(self, *choices: int) -> int:
        return self._chance.choice(choices)

    def _edge(self, good: int, *bad: int, chance: float = 0.06) -> int:
        return self._one(*bad) if self._often(chance) else good

    def _slot(self, kind: str, count: int = 2) -> str:
        there = sorted(slot for slot in self._open if slot[0] == kind)
        if there and self._often(0.96):
            return there[0] if self._often(0.8) else self._chance.choice(there)
        return f"{kind}{self._chance.randrange(count)}"

    def _iova(self) -> int:
        kind = self._chance.random()
        if kind < 0.55 or (kind < 0.85 and not self._believed):
            return BASE + self._chance.randrange(24) * _P
        if kind < 0.85:
            start, size = self._chance.choice(self._believed)
            return (
                self._one(start, start, start + size, start - _P, start + size - _P, start + size // 2 // _P * _P) % TOP
            )
        if kind < 0.95:
            span = self._chance.choice(self._ranges)
            return (
                self._one(span.start, span.start - _P, span.last + 1 - _P, span.last + 1, span.last + 1 - 2 * _P) % TOP
            )
        return self._one(0, TOP - _P, TOP - 2 * _P, 1 << 63, BASE + 1, BASE + _P // 2, TOP - 1)

    def _size(self, iova: int) -> int:
        kind = self._chance.random()
        if kind < 0.8:
            return self._chance.randint(1, 4) * _P
        if kind < 0.87 and self._believed:
            return self._chance.choice(self._believed)[1]
        if kind < 0.94:
            return self._chance.randint(5, 70) * _P
        to_end = TOP - iova
        return (
            self._one(0, 1, _P - 1, _P + 1, 1 << 30, 1 << 39, to_end, to_end - _P, to_end + _P, TOP - _P, TOP - 1) % TOP
        )

    def _vaddr(self) -> int | str:
        if self._often(0.06):
            return self._one(*BAD_ADDRESSES)
        offset = self._chance.randrange(ARENA_PAGES) * _P
        return f"a+{self._edge(offset, offset + 1, offset + _P // 2, offset + ARENA_PAGES * _P, chance=0.04)}"

    def _argsz(self, size: int) -> int:
        return self._edge(size, size - 1, size + 1, size + 100, 0, U32, chance=0.08)

    def _ioctl(self, slot: str, request: str, layout: str, *fields: int | str, size: int = 0, into: str = "") -> None:
        if layout != "value" and self._often(0.02):
            self.ops.append(Op("ioctl", slot, request, "value", (self._one(*BAD_ADDRESSES),), into=into))
            return
        room = self._edge(ROOM, size, size - 1, size // 2, 8, 4, chance=0.04) if size else ROOM
        desk = "ro" if layout != "value" and self._often(0.02) else "rw"
        self.ops.append(Op("ioctl", slot, request, layout, fields, room, desk, into))

    def _open_slot(self, slot: str) -> None:
        self._open.add(slot)
        self.ops.append(Op("open", slot))

    def _close_slot(self, slot: str) -> None:
        self._open.discard(slot)
        self.ops.append(Op("close", slot))

    # ------------------------------------------------------------------------------------------------- memory

    def _span(self) -> tuple[int, int]:
        first = self._chance.randrange(ARENA_PAGES)
        return first, min(self._chance.choice([1, 1, 2, 4, 16]), ARENA_PAGES - first)

    def _memory(self) -> None:
        span = self._span()
        match self._chance.randrange(8):
            case 0 | 1 | 2:
                self.ops.append(Op("protect", fields=(*span, self._one(0, 1, 2, 3, 3, 3))))
            case 3:
                self.ops.append(Op("unmap", fields=span))
            case 4 | 5:
                kind = self._chance.choice(["private", "private", "shared", "shared file", "private file"])
                self.ops.append(Op("map", fields=(*span, kind, self._one(3, 3, 3, 1, 2, 0))))
            case 6:
                self.ops.append(Op("touch", fields=span))
            case _:
                self.ops.append(Op("look", fields=span))

    def _limits(self) -> None:
        if self._often(0.4):
            self.ops.append(Op("privilege", fields=(self._one(0, 0, 1),)))
        else:
            self.ops.append(Op("limit", fields=(self._one(-1, 0, 1, 2, 5, 10, 20, 40, 80),)))


def write_episodes(
    make: Callable[[random.Random], Author], *, seed: int, ops: int, entry_limits: Sequence[int] = (65535,)
) -> list[Episode]:
    """Return `ops` calls in episodes of `LENGTH`, each by an author of its own, made from `seed`."""
    found = []
    for number, start in enumerate(range(0, ops, LENGTH)):
        chance = random.Random(f"{seed}/{number}")  # noqa: S311 (nothing secret)
        entry_limit = chance.choice(entry_limits)
        found.append(Episode(entry_limit, make(chance).write(min(LENGTH, ops - start))))
    return found
