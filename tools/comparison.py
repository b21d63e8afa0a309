"""Sequences of VFIO calls, played on any kernel through the seam, and what was seen compared call by call.

A sequence names descriptors and addresses by symbols, so that one sequence means the same on every kernel:

* `c0 c1` containers, `g0 g1` groups, `d0` to `d3` devices, `j0` an eventfd, which is none of these. A slot in which
  nothing is open stands for a number that no open file has.
* `a+N` byte N of the arena, the memory that sequences map; `b+N` of the bitmap area; both end in inaccessible memory.
* `n0 n1` the PCI addresses of the devices, one in each group.

An ioctl's structure is packed into a desk, so that its last accessible byte is the last of a page: how far a kernel
reads and writes shows. `scripts/differential` makes sequences (`tools.sequences`), plays them on a real kernel
and on the fake, and hands back the shortest one that differs.

Synchronization: a stage and its player belong to one thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from pyvfio import ioctls, pci
from pyvfio.kernel import MAP_FIXED, MAP_NORESERVE, PROT_NONE, Kernel, LinuxKernel
from pyvfio.testing.fake import VERSIONS, FakeDevice, FakeKernel
from pyvfio.testing.fake.iommu import iommu_model
from pyvfio.testing.fake.process import read_memory, write_memory
from pyvfio.units import MIB, PAGE_SIZE

ARENA_PAGES = 64
BITMAP_SIZE = 4 * PAGE_SIZE
ROOM = 512
"""Bytes of the desk that a structure has before inaccessible memory, unless a sequence says otherwise."""
FILE_PAGES = 4
"""How much of a file mapping has a file behind it."""

_PRIVATE, _SHARED, _ANONYMOUS = 2, 1, 0x20
_RW = 3
_NOWHERE = 1000  # a descriptor that is never open: this process has few
_BEHIND_BITMAP = 512 * MIB  # the largest bitmap that a kernel takes, and as much again
_FILLER = 0xA5
_CAP_IPC_LOCK = 14
_CAPABILITY_VERSION = 0x20080522
_ENTRY_LIMIT = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")


class Op(NamedTuple):
    """One call. `slot` is the descriptor, `request` an ioctl's name in C or its number in hex; `layout` packs `fields`
    into its structure ("value": the argument itself, "name": a string); `into` takes the descriptor that comes back.
    Other calls have their arguments in `fields`."""

    call: str
    slot: str = ""
    request: str = ""
    layout: str = ""
    fields: tuple[int | str, ...] = ()
    room: int = ROOM
    desk: str = "rw"
    into: str = ""


class Outcome(NamedTuple):
    """What a call did: its value (0 for a descriptor), errno, what it changed in the desk and in the bitmap area as
    (offset, hex) runs, and how many pages are locked afterwards."""

    value: int
    errno: int
    desk: tuple[tuple[int, str], ...]
    bitmap: tuple[tuple[int, str], ...]
    locked: int

    def __str__(self) -> str:
        ended = errno.errorcode.get(self.errno, str(self.errno)) if self.errno else f"{self.value}"
        wrote = "".join(
            f", {name} {list(runs)}" for name, runs in (("wrote", self.desk), ("bitmap", self.bitmap)) if runs
        )
        return f"{ended}, {self.locked} pages locked{wrote}"


class Episode(NamedTuple):
    """Calls from a fresh start, with the module's `dma_entry_limit` set before it."""

    entry_limit: int
    ops: tuple[Op, ...]


class Stage(Protocol):
    """A kernel with two groups, and what sequences change besides calling it."""

    @property
    def kernel(self) -> Kernel:
        """The seam."""
        ...

    @property
    def groups(self) -> tuple[int, ...]:
        """The numbers of the groups."""
        ...

    @property
    def devices(self) -> tuple[str, ...]:
        """A PCI address in each of them."""
        ...

    def begin(self, entry_limit: int) -> None:
        """An episode begins: no limit on locked memory, CAP_IPC_LOCK, so many mappings in each container."""
        ...

    def end(self) -> None:
        """An episode is over, and its descriptors are closed."""
        ...

    def locked(self) -> int:
        """How many pages VFIO has locked for this process."""
        ...

    def limit(self, pages: int) -> None:
        """RLIMIT_MEMLOCK (-1: none)."""
        ...

    def privilege(self, there: int) -> None:
        """CAP_IPC_LOCK (0: not)."""
        ...


class FakeStage:
    """The fake kernel of a version ("6.1", "6.12", "7.3") with an IOMMU by its name, new in each episode."""

    devices = ("0000:00:02.0", "0000:00:03.0")
    groups = (2, 3)

    def __init__(self, version: str, iommu: str) -> None:
        self._version = version
        self._model = iommu_model(iommu, VERSIONS[version])
        self.begin(self._model.dma_entry_limit)

    def begin(self, entry_limit: int) -> None:
        """A new kernel."""
        declared = [(number, [FakeDevice(bdf)]) for number, bdf in zip(self.groups, self.devices, strict=True)]
        model = replace(self._model, dma_entry_limit=entry_limit)
        self.kernel = FakeKernel(self._version, iommu=model, groups=declared)
        self.privilege(1)

    def end(self) -> None:
        """Everything is closed."""
        self.kernel.shutdown()

    def locked(self) -> int:
        """Of the fake's own account."""
        return self.kernel.memlock().used // PAGE_SIZE

    def limit(self, pages: int) -> None:
        """The fake's."""
        self.kernel.memlock_limit = None if pages < 0 else pages * PAGE_SIZE

    def privilege(self, there: int) -> None:
        """The fake's."""
        self.kernel.privileged = bool(there)


class LinuxStage:
    """The running kernel, with the first two devices that are given; for a machine that nobody else uses."""

    def __init__(self, devices: Sequence[str]) -> None:
        self.kernel: Kernel = LinuxKernel()
        self.devices = tuple(devices[:2])
        self.groups = tuple(pci.group_of(self.kernel, bdf) for bdf in self.devices)
        self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._base = 0

    def begin(self, entry_limit: int) -> None:
        """Set the module's parameter; what a kernel never gave back counts no more."""
        _ENTRY_LIMIT.write_text(str(entry_limit), encoding="ascii")
        self.end()
        self._base += self.locked()

    def end(self) -> None:
        """As at first."""
        self.limit(-1)
        self.privilege(1)

    def locked(self) -> int:
        """VmLck, less what was locked when the episode began."""
        _, _, tail = os.pread(self._status, 8192, 0).partition(b"VmLck:")
        return int(tail.split(None, 1)[0]) * 1024 // PAGE_SIZE - self._base

    def limit(self, pages: int) -> None:
        """setrlimit(2)."""
        soft = resource.RLIM_INFINITY if pages < 0 else (pages + self._base) * PAGE_SIZE
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, resource.RLIM_INFINITY))

    def privilege(self, there: int) -> None:
        """capset(2)."""
        header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
        now = ctypes.create_string_buffer(24)
        self._libc.capget(header, now)
        effective, permitted, *rest = struct.unpack("=6I", now.raw)
        bit = 1 << _CAP_IPC_LOCK
        effective = effective | bit if there else effective & ~bit
        self._libc.capset(header, struct.pack("=6I", effective, permitted, *rest))


class _Area:
    """Memory that is followed by inaccessible memory."""

    def __init__(self, size: int, behind: int) -> None:
        self._linux = LinuxKernel()
        self._whole = size + behind
        self.vaddr = self._linux.mmap(0, self._whole, PROT_NONE, _PRIVATE | _ANONYMOUS | MAP_NORESERVE)
        self._linux.mmap(self.vaddr, size, _RW, _PRIVATE | _ANONYMOUS | MAP_FIXED)
        self.size = size

    def close(self) -> None:
        self._linux.munmap(self.vaddr, self._whole)

    def protect(self, protection: int) -> None:
        self._linux.mprotect(self.vaddr, self.size, protection)

    def read(self, start: int = 0) -> bytes:
        return ctypes.string_at(self.vaddr + start, self.size - start)

    def fill(self, data: bytes, start: int = 0) -> None:
        ctypes.memmove(self.vaddr + start, data, len(data))


def changes(before: bytes, after: bytes) -> tuple[tuple[int, str], ...]:
    """The runs of bytes that differ, as (offset, the bytes after in hex)."""
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


class Player:
    """Plays one episode on a stage. As a context manager it leaves nothing open or mapped behind."""

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
        }

    def __enter__(self) -> Player:
        self._fds["j0"] = self._kernel.eventfd(0, 0)
        self._bitmap.fill(bytes([_FILLER]) * BITMAP_SIZE)
        return self

    def __exit__(self, *_: object) -> None:
        for slot in sorted(self._fds, reverse=True):  # devices before containers; the order shows in no outcome
            with contextlib.suppress(OSError):
                self._kernel.close(self._fds[slot])
        os.close(self._file)
        for area in (self._desk, self._bitmap, self._arena):
            area.close()

    def play(self, op: Op) -> Outcome:
        """Make one call. KeyError for a call that there is not."""
        desk = self._prepare(op) if op.call == "ioctl" else b""
        bitmap = self._bitmap.read()
        value, number = 0, 0
        try:
            value = self._calls[op.call](op)
        except OSError as error:
            number = error.errno or 0
        desk_after = self._take(op) if op.call == "ioctl" else b""
        return Outcome(
            value, number, changes(desk, desk_after), changes(bitmap, self._bitmap.read()), self._stage.locked()
        )

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

    def _open(self, op: Op) -> int:
        name = "vfio" if op.slot[0] == "c" else str(self._stage.groups[int(op.slot[1])])
        self._store(op.slot, self._kernel.open(str(self._kernel.dev / "vfio" / name), os.O_RDWR))
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
        number = int(op.request, 16) if op.request.startswith("0x") else int(getattr(ioctls, op.request))
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
    """One line of JSON."""
    return json.dumps(item, separators=(",", ":"))


def decode_episode(line: str) -> Episode:
    """What `encode` made."""
    entry_limit, ops = json.loads(line)
    return Episode(entry_limit, tuple(Op(*op)._replace(fields=tuple(op[4])) for op in ops))


def decode_outcome(line: str) -> Outcome:
    """What `encode` made."""
    value, number, desk, bitmap, locked = json.loads(line)
    return Outcome(value, number, tuple((a, b) for a, b in desk), tuple((a, b) for a, b in bitmap), locked)


def first_difference(ours: Iterable[Outcome], theirs: Iterable[Outcome]) -> tuple[int, Outcome, Outcome] | None:
    """Where two plays of one episode part, and the two outcomes; None when they never do."""
    for number, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return number, one, other
    return None


def shortest(episode: Episode, differs: Callable[[Episode], bool]) -> Episode:
    """Leave out calls as long as the episode `differs`: no single call can be left out of the answer.

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
    """The shortest part of an episode on which two stages differ in its last call, and both outcomes of that; None when
    they do not differ here."""

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


def program(episode: Episode, *, version: str, iommu: str, real: Outcome, fake: Outcome) -> str:
    """A Python program that plays an episode on the running kernel and on the fake and prints what both answer."""
    ops = "".join(f"        {op!r},\n" for op in episode.ops)
    return f'''#!/usr/bin/env python3
"""Linux {version} with the {iommu} IOMMU and its fake differ in the last call:

real: {real}
fake: {fake}

On the fake alone: python3 THIS_FILE --fake. On both, in a machine that nobody else uses:
scripts/vm --kernel {version} --iommu {iommu} -- python3 THIS_FILE
"""

from tools.comparison import replay
from tools.comparison import Episode, Op

EPISODE = Episode(
    entry_limit={episode.entry_limit},
    ops=(
{ops}    ),
)

if __name__ == "__main__":
    replay(EPISODE, version="{version}", iommu="{iommu}")
'''
