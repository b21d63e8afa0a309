"""What this process's control groups leave it of memory.

Populating memory beyond the limit of a group is not answered by an errno but by the OOM killer, so that whoever wants
all of it has to look beforehand. What a group has room for is what its limit leaves, what of its page cache can be
reclaimed, and what of its memory can be swapped out: never less than could be had at that moment.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; `try_charge_memcg` in mm/memcontrol.c.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pyvfio.kernel import Kernel
from pyvfio.units import format_size


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """A group with a limit, in bytes: of `limit`, `used` are in use, of those `reclaimable` are page cache; `swap` is
    what may be swapped out. `limited_by` is the file that has the limit."""

    limited_by: Path
    limit: int
    used: int
    reclaimable: int
    swap: int

    @property
    def size(self) -> int:
        """Bytes that could be had."""
        return max(self.limit - self.used + self.reclaimable + self.swap, 0)

    def __str__(self) -> str:
        return (
            f"{self.limited_by} is {format_size(self.limit)}; {format_size(self.used)} are in use, of which "
            f"{format_size(self.reclaimable)} can be reclaimed, and {format_size(self.swap)} can be swapped out"
        )


class _Files(NamedTuple):
    """What a version of control groups calls what is read."""

    limit: str
    used: str
    reclaimable: tuple[str, ...]
    swap_limit: str
    swap_used: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"), "", "")
_V2 = _Files(
    "memory.max",
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
    "memory.swap.max",
    "memory.swap.current",
)


def memory_room(kernel: Kernel, *, proc: Path = Path("/proc")) -> MemoryRoom | None:
    """The group that leaves this process least, of its own and those above; None where none has a limit, or nothing of
    them can be read. Some 100 µs."""
    place = _own_group(kernel, proc)
    if place is None:
        return None
    files, base, own = place
    swap = _free_swap(proc)
    if swap is None:
        return None
    rooms = []
    for group in _downwards(base, own):
        if files.swap_limit:
            swap = min(swap, _left(group / files.swap_limit, group / files.swap_used, otherwise=swap))
        if (room := _room(files, group, swap)) is not None:
            rooms.append(room)
    return min(rooms, key=lambda room: room.size, default=None)


def _own_group(kernel: Kernel, proc: Path) -> tuple[_Files, Path, Path] | None:
    """The files to read, where the groups are mounted, and the own one there."""
    try:
        lines = os.fsdecode((proc / "self/cgroup").read_bytes()).split("\n")
    except OSError:
        return None
    base = kernel.sysfs / "fs/cgroup"
    found = None
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return _V1, base / "memory", Path(path.lstrip("/"))
        if path and not controllers:
            found = _V2, base, Path(path.lstrip("/"))
    return found


def _downwards(base: Path, own: Path) -> Iterator[Path]:
    """From the root of what is mounted to the own group. A process that is outside of it (..) has that root at most."""
    yield base
    if ".." not in own.parts:
        for depth in range(1, len(own.parts) + 1):
            yield base.joinpath(*own.parts[:depth])


def _number(path: Path) -> int | None:
    """None where there is none, as for "max" and what cannot be read."""
    try:
        return int(path.read_bytes())
    except (OSError, ValueError):
        return None


def _left(limit: Path, used: Path, *, otherwise: int) -> int:
    most, now = _number(limit), _number(used)
    return otherwise if most is None or now is None else max(most - now, 0)


def _room(files: _Files, group: Path, swap: int) -> MemoryRoom | None:
    limit, used = _number(group / files.limit), _number(group / files.used)
    if limit is None or used is None:
        return None
    try:
        stat = dict(line.split(b" ", 1) for line in (group / "memory.stat").read_bytes().splitlines())
        reclaimable = sum(int(stat.get(name.encode(), 0)) for name in files.reclaimable)
    except (OSError, ValueError):
        return None
    return MemoryRoom(group / files.limit, limit, used, reclaimable, swap)


def _free_swap(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_bytes().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(b"SwapFree:")), None)
