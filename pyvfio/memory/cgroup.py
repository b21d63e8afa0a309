"""The memory that this process's control groups leave.

Beyond the limit of a group, populating memory does not return an errno: the OOM killer kills a process. A program that
needs all pages must check first. The room of a group is the sum of three parts: the rest of the limit, reclaimable page
cache, and memory that can be swapped out. The sum is an upper bound: no more could be allocated at that moment.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst; `try_charge_memcg` in mm/memcontrol.c.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pyvfio.kernel import Kernel
from pyvfio.units import format_size

_SWAP_FREE = re.compile(rb"^SwapFree:\s+([0-9]{1,15}) kB$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MemoryRoom:
    """A control group with a limit. All sizes are in bytes.

    `limited_by`: the file with the limit. `used` of `limit` bytes are in use, and `reclaimable` of these are page
    cache. `swap`: the bytes that can be swapped out.
    """

    limited_by: Path
    limit: int
    used: int
    reclaimable: int
    swap: int

    @property
    def size(self) -> int:
        """The most bytes that can be allocated."""
        return max(self.limit - self.used + self.reclaimable + self.swap, 0)

    def __str__(self) -> str:
        return (
            f"{self.limited_by} is {format_size(self.limit)}; {format_size(self.used)} are in use, of which "
            f"{format_size(self.reclaimable)} can be reclaimed, and {format_size(self.swap)} can be swapped out"
        )


class _Files(NamedTuple):
    """The file names and keys of one version of control groups."""

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
    """Return the group with the least room, among this process's own group and its ancestors.

    Returns None if no group has a limit, or if the files cannot be read. Cost: about 100 µs.
    """
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
    """Return the file names, the mount point of the groups, and this process's group below the mount point."""
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
    """Yield the groups from the mounted root to `own`. For a process outside the mounted tree (..), yield the root."""
    yield base
    if ".." not in own.parts:
        for depth in range(1, len(own.parts) + 1):
            yield base.joinpath(*own.parts[:depth])


def _number(path: Path) -> int | None:
    """Read a number. Return None for other contents, such as "max", and for a file that cannot be read."""
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
        match = _SWAP_FREE.search((proc / "meminfo").read_bytes())
    except OSError:
        return None
    return None if match is None else int(match[1]) * 1024
