"""Plays sequences of VFIO calls on any kernel through the seam, and compares the outcomes call by call.

A sequence names descriptors and addresses by symbols, so that one sequence means the same on every kernel:

* `c0 c1` containers, `g0 g1` groups, `d0` to `d3` devices, `j0` an eventfd, which is none of these. `i0 i1` iommufds,
  `v0` to `v3` cdevs (even numbers: of the first device), `f0 f1` memory files. An empty slot means a number that no
  open file has.
* `a+N` byte N of the arena, the memory that sequences map; `b+N` of the bitmap area; both end in inaccessible memory.
* `n0 n1` the PCI addresses of the devices, one in each group.

The structure of an ioctl is packed into a desk, so that the last byte of the structure is the last byte of a page. The
desk thus shows how far a kernel reads and writes. `scripts/differential` makes sequences (`tools.sequences`), plays
them on a real kernel and on the fake, and returns the shortest sequence with different outcomes.

Synchronization: a stage and its player belong to one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pyvfio import ioctls, iommufd_ioctls
from pyvfio.kernel import MAP_FIXED, MAP_NORESERVE, PROT_NONE, LinuxKernel
from pyvfio.testing.fake.process import read_memory, write_memory
from pyvfio.units import MIB, PAGE_SIZE, align_up
from tools.stage import Space, Stage

ARENA_PAGES = 64
BITMAP_SIZE = 4 * PAGE_SIZE
ROOM = 512
"""The bytes of the desk for a structure before inaccessible memory, unless a sequence sets another number."""
FILE_PAGES = 4
"""The number of pages of a file mapping that the file backs."""

_PRIVATE, _SHARED, _ANONYMOUS = 2, 1, 0x20
_RW = 3
_NOWHERE = 1000  # a descriptor that is never open, because this process has few
_BEHIND_BITMAP = 512 * MIB  # twice the largest bitmap that a kernel accepts
_FILLER = 0xA5
_ALIGNMENT = 2 * MIB


class Op(NamedTuple):
    """One call.

    `slot`: the descriptor. `request`: the name of an ioctl in C, or its number in hex. `layout` packs `fields` into the
    structure ("value": the argument itself, "name": a string). `into`: the slot of the descriptor returned. Other calls
    have their arguments in `fields`.
    """

    call: str
    slot: str = ""
    request: str = ""
    layout: str = ""
    fields: tuple[int | str, ...] = ()
    room: int = ROOM
    desk: str = "rw"
    into: str = ""


class Outcome(NamedTuple):
    """The outcome of a call: value (0 for a descriptor), errno, and changes.

    The changes of the desk and of the bitmap area are (offset, hex) runs. The last numbers are the counts of pages
    locked and pinned after the call.
    """

    value: int
    errno: int
    desk: tuple[tuple[int, str], ...]
    bitmap: tuple[tuple[int, str], ...]
    locked: int
    pinned: int = 0

    def __str__(self) -> str:
        ended = errno.errorcode.get(self.errno, str(self.errno)) if self.errno else f"{self.value}"
        wrote = "".join(
            f", {name} {list(runs)}" for name, runs in (("wrote", self.desk), ("bitmap", self.bitmap)) if runs
        )
        return f"{ended}, {self.locked} pages locked, {self.pinned} pinned{wrote}"


class Episode(NamedTuple):
    """Calls from a fresh start, with the module's `dma_entry_limit` set before the start."""

    entry_limit: int
    ops: tuple[Op, ...]


class _Area:
    """Memory in front of inaccessible memory. Aligned, since iommufd chooses an IOVA as aligned as the address is."""

    def __init__(self, size: int, behind: int) -> None:
        self._linux = LinuxKernel()
        self._whole = size + behind + _ALIGNMENT
        self._start = self._linux.mmap(0, self._whole, PROT_NONE, _PRIVATE | _ANONYMOUS | MAP_NORESERVE)
        self.vaddr = align_up(self._start, _ALIGNMENT)
        self._linux.mmap(self.vaddr, size, _RW, _PRIVATE | _ANONYMOUS | MAP_FIXED)
        self.size = size

    def close(self) -> None:
        self._linux.munmap(self._start, self._whole)

    def protect(self, protection: int) -> None:
        self._linux.mprotect(self.vaddr, self.size, protection)

    def read(self, start: int = 0) -> bytes:
        return ctypes.string_at(self.vaddr + start, self.size - start)

    def fill(self, data: bytes, start: int = 0) -> None:
        ctypes.memmove(self.vaddr + start, data, len(data))


def changes(before: bytes, after: bytes) -> tuple[tuple[int, str], ...]:
    """Return the runs of bytes that differ, as (offset, the bytes after in hex)."""
    if before == after:
        return ()
    runs: list[tuple[int, bytearray]] = []
    for at, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == at:
            runs[-1][1].append(new)
        else:
            runs.append((at, bytearray([new])))
    return tuple((at, run.hex()) for at, run in runs)


def request_number(name: str) -> int:
    """Return the number of an ioctl, by the name in C or in hex."""
    if name.startswith("0x"):
        return int(name, 16)
    return int(getattr(iommufd_ioctls if name.startswith("IOMMU_") else ioctls, name))


class Player:
    """Plays one episode on a stage. At the end of the context manager nothing is open or mapped."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._kernel = stage.kernel
        self._fds: dict[str, int] = {}
        self._desk = _Area(PAGE_SIZE, PAGE_SIZE)
        self._bitmap = _Area(BITMAP_SIZE, _BEHIND_BITMAP)
        self._arena = _Area(ARENA_PAGES * PAGE_SIZE, MIB)
        self._file = os.memfd_create("arena")
        os.ftruncate(self._file, FILE_PAGES * PAGE_SIZE)
        self._calls: dict[str, Callable[[Op], int]] = {
            "open": self._open,
            "close": self._close,
            "ioctl": self._ioctl,
            "map": self._map,
            "protect": self._protect,
            "unmap": self._unmap,
            "touch": self._touch,
            "look": self._look,
            "fill": self._fill,
            "limit": self._limit,
            "privilege": self._privilege,
            "dup": self._dup,
            "file": self._new_file,
            "resize": self._resize,
            "poke": self._poke,
        }

    def __enter__(self) -> Player:
        self._fds["j0"] = self._kernel.eventfd(0, 0)
        self._bitmap.fill(bytes([_FILLER]) * BITMAP_SIZE)
        return self

    def __exit__(self, *_: object) -> None:
        for slot in sorted(self._fds, reverse=True):  # devices before containers; the order is in no outcome
            with contextlib.suppress(OSError):
                self._kernel.close(self._fds[slot])
        os.close(self._file)
        for area in (self._desk, self._bitmap, self._arena):
            area.close()

    def play(self, op: Op) -> Outcome:
        """Make one call. Raises KeyError for an unknown call."""
        desk = self._prepare(op) if op.call == "ioctl" else b""
        bitmap = self._bitmap.read()
        value, number = 0, 0
        try:
            value = self._calls[op.call](op)
        except OSError as error:
            number = error.errno or 0
        desk_after = self._take(op) if op.call == "ioctl" else b""
        wrote = changes(desk, desk_after), changes(bitmap, self._bitmap.read())
        return Outcome(value, number, *wrote, *self._stage.pages())

    # ---------------------------------------------------------------------------------------------- symbols

    def _resolve(self, field: int | str) -> int:
        if isinstance(field, int):
            return field
        if "+" not in field:
            return self._fds.get(field, _NOWHERE)
        area, _, offset = field.partition("+")
        return {"a": self._arena, "b": self._bitmap}[area].vaddr + int(offset)

    def _store(self, slot: str, fd: int) -> None:
        old = self._fds.pop(slot, None)
        self._fds[slot] = fd
        if old is not None:
            self._kernel.close(old)

    # ------------------------------------------------------------------------------------------ descriptors

    def _node(self, slot: str) -> str:
        kind, number = slot[0], int(slot[1:])
        match kind:
            case "c":
                return "vfio/vfio"
            case "i":
                return "iommu"
            case "v":
                return f"vfio/{self._stage.cdevs[number % 2]}"
            case _:
                return f"vfio/{self._stage.groups[number]}"

    def _open(self, op: Op) -> int:
        self._store(op.slot, self._kernel.open(str(self._kernel.dev / self._node(op.slot)), os.O_RDWR))
        return 0

    def _dup(self, op: Op) -> int:
        self._store(op.into, self._kernel.dup(self._fds.get(op.slot, _NOWHERE)))
        return 0

    def _new_file(self, op: Op) -> int:
        self._store(op.slot, self._kernel.memfd_create("sequence", 0))
        return self._resize(op)

    def _resize(self, op: Op) -> int:
        self._kernel.ftruncate(self._fds.get(op.slot, _NOWHERE), int(op.fields[0]) * PAGE_SIZE)
        return 0

    def _close(self, op: Op) -> int:
        fd = self._fds.pop(op.slot, None)
        if fd is None:
            raise OSError(errno.EBADF, "closed")
        self._kernel.close(fd)
        return 0

    def _packed(self, op: Op) -> bytes:
        if op.layout == "name":
            words = [self._stage.devices[int(str(op.fields[0])[1])] if op.fields[0] in ("n0", "n1") else op.fields[0]]
            return "".join(map(str, [*words, *op.fields[1:]])).encode() + b"\0"
        return struct.pack(op.layout, *(self._resolve(field) for field in op.fields))

    def _prepare(self, op: Op) -> bytes:
        if op.layout == "value":
            return b""
        self._desk.fill(bytes([_FILLER]) * PAGE_SIZE)
        self._desk.fill(self._packed(op)[: op.room], PAGE_SIZE - op.room)
        if op.desk == "ro":
            self._desk.protect(1)
        return self._desk.read(PAGE_SIZE - op.room)

    def _take(self, op: Op) -> bytes:
        if op.layout == "value":
            return b""
        if op.desk == "ro":
            self._desk.protect(_RW)
        return self._desk.read(PAGE_SIZE - op.room)

    def _ioctl(self, op: Op) -> int:
        number = request_number(op.request)
        argument = self._resolve(op.fields[0]) if op.layout == "value" else self._desk.vaddr + PAGE_SIZE - op.room
        answer = self._kernel.ioctl(self._fds.get(op.slot, _NOWHERE), number, argument)
        if not op.into:
            return answer
        self._store(op.into, answer)
        return 0

    # ----------------------------------------------------------------------------------------------- memory

    def _range(self, op: Op) -> tuple[int, int]:
        first, pages = int(op.fields[0]), int(op.fields[1])
        return self._arena.vaddr + first * PAGE_SIZE, pages * PAGE_SIZE

    def _map(self, op: Op) -> int:
        vaddr, size = self._range(op)
        kind, protection = str(op.fields[2]), int(op.fields[3])
        flags = (_SHARED if kind.startswith("shared") else _PRIVATE) | MAP_FIXED
        if kind.endswith("file"):
            self._kernel.mmap(vaddr, size, protection, flags, fd=self._file)
        else:
            self._kernel.mmap(vaddr, size, protection, flags | _ANONYMOUS)
        return 0

    def _protect(self, op: Op) -> int:
        self._kernel.mprotect(*self._range(op), int(op.fields[2]))
        return 0

    def _unmap(self, op: Op) -> int:
        self._kernel.munmap(*self._range(op))
        return 0

    def _touch(self, op: Op) -> int:
        vaddr, size = self._range(op)
        for at in range(vaddr, vaddr + size, PAGE_SIZE):
            write_memory(at, b"\1")
        return 0

    def _look(self, op: Op) -> int:
        vaddr, size = self._range(op)
        for at in range(vaddr, vaddr + size, PAGE_SIZE):
            read_memory(at, 1)
        return 0

    def _fill(self, op: Op) -> int:
        self._bitmap.fill(bytes([int(op.fields[0])]) * BITMAP_SIZE)
        return 0

    def _poke(self, op: Op) -> int:
        """Write numbers of 64 bits into the bitmap area."""
        at, *numbers = map(int, op.fields)
        self._bitmap.fill(struct.pack(f"={len(numbers)}Q", *numbers), at)
        return 0

    def _limit(self, op: Op) -> int:
        self._stage.limit(int(op.fields[0]))
        return 0

    def _privilege(self, op: Op) -> int:
        self._stage.privilege(int(op.fields[0]))
        return 0


# ----------------------------------------------------------------------------------------- episodes and outcomes


def play(stage: Stage, episode: Episode) -> Iterator[Outcome]:
    """Play an episode, call by call."""
    stage.begin(episode.entry_limit)
    try:
        with Player(stage) as player:
            for op in episode.ops:
                yield player.play(op)
    finally:
        stage.end()


def encode(item: Episode | Outcome) -> str:
    """Encode as one line of JSON."""
    return json.dumps(item, separators=(",", ":"))


def decode_episode(line: str) -> Episode:
    """Decode an episode that `encode` made."""
    entry_limit, ops = json.loads(line)
    return Episode(entry_limit, tuple(Op(*op)._replace(fields=tuple(op[4])) for op in ops))


def decode_outcome(line: str) -> Outcome:
    """Decode an outcome that `encode` made."""
    value, number, desk, bitmap, *pages = json.loads(line)
    return Outcome(value, number, tuple((a, b) for a, b in desk), tuple((a, b) for a, b in bitmap), *pages)


def first_difference(ours: Iterable[Outcome], theirs: Iterable[Outcome]) -> tuple[int, Outcome, Outcome] | None:
    """Return the first place where two plays of one episode differ, with both outcomes; None if there is none."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return number, one, other
    return None


def shortest(episode: Episode, differs: Callable[[Episode], bool]) -> Episode:
    """Leave out calls as long as the episode `differs`: no single call of the result can be left out.

    Delta debugging: halves, quarters … single calls. Costs O(n log n) plays where few calls matter.
    """
    ops, size = list(episode.ops), max(len(episode.ops) // 2, 1)
    while True:
        start, shrunk = 0, False
        while start < len(ops):
            candidate = ops[:start] + ops[start + size :]
            if candidate and differs(episode._replace(ops=tuple(candidate))):
                ops, shrunk = candidate, True
            else:
                start += size
        if size == 1 and not shrunk:
            return episode._replace(ops=tuple(ops))
        size = max(size // 2, 1)


def reduce(episode: Episode, one: Stage, other: Stage) -> tuple[Episode, Outcome, Outcome] | None:
    """Return the shortest part of an episode on which two stages differ in the last call, and both outcomes.

    Returns None if the stages do not differ here.
    """

    def compare(candidate: Episode) -> tuple[int, Outcome, Outcome] | None:
        return first_difference(list(play(one, candidate)), list(play(other, candidate)))

    found = compare(episode)
    if found is None:
        return None
    signature = (episode.ops[found[0]], found[1].errno, found[2].errno)
    cut = episode._replace(ops=episode.ops[: found[0] + 1])

    def differs(candidate: Episode) -> bool:
        again = compare(candidate)
        return again is not None and (candidate.ops[again[0]], again[1].errno, again[2].errno) == signature

    least = shortest(cut, differs)
    final = compare(least)
    return None if final is None else (least, final[1], final[2])


def program(episode: Episode, *, version: str, iommu: str, real: Outcome, fake: Outcome, space: Space = "type1") -> str:
    """Return a Python program that plays an episode on the running kernel and on the fake, and prints both outcomes."""
    ops = "".join(f"        {op!r},\n" for op in episode.ops)
    return f'''#!/usr/bin/env python3
"""Linux {version} with the {iommu} IOMMU and its fake differ in the last call:

real: {real}
fake: {fake}

On the fake alone: python3 THIS_FILE --fake. On both, in a machine that nobody else uses:
scripts/vm --kernel {version} --iommu {iommu} -- python3 THIS_FILE
"""

from tools.comparison import Episode, Op
from tools.differential import replay

EPISODE = Episode(
    entry_limit={episode.entry_limit},
    ops=(
{ops}    ),
)

if __name__ == "__main__":
    replay(EPISODE, version="{version}", iommu="{iommu}", space="{space}")
'''
