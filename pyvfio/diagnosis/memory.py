"""The checks of memory: how much this process may lock, its control group, huge pages, and limits of the kernel.

Source: `vfio_lock_acct` and `dma_entry_limit` in drivers/vfio/vfio_iommu_type1.c;
Documentation/admin-guide/sysctl/vm.rst.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pyvfio.diagnosis.case import LEAST_MEMORY, Case, write_line
from pyvfio.errors import EntryLimitError
from pyvfio.findings import Command, Finding, Status
from pyvfio.memory.cgroup import memory_room
from pyvfio.memory.locking import raise_limit, suffices
from pyvfio.pci.sysfs import list_names, printable, read_text
from pyvfio.units import KIB, format_size

_USUAL_ENTRIES = 65535
_USUAL_MAPS = 65530
_NO_LIMIT = 1 << 60  # control groups of version 1 have a number for "none"
_ENTRIES = "module/vfio_iommu_type1/parameters/dma_entry_limit"


def check_memlock(case: Case) -> Iterator[Finding]:
    """Whether RLIMIT_MEMLOCK lets this process map the memory that the program needs."""
    lock = case.kernel.memlock()
    if lock.limit is None or lock.privileged:
        reason = "this process has CAP_IPC_LOCK" if lock.privileged else "RLIMIT_MEMLOCK is unlimited"
        yield Finding("memlock", "ok", f"any amount of memory can be mapped: {reason}")
        return
    wanted = LEAST_MEMORY if case.memory is None else case.memory
    summary = f"RLIMIT_MEMLOCK lets this process map {format_size(max(lock.limit - lock.used, 0))}"
    if suffices(lock, wanted):
        status: Status = "note" if case.memory is None else "ok"
        yield Finding("memlock", status, summary, "Each byte that is mapped for a device is charged to that limit.")
        return
    yield Finding(
        "memlock",
        "wrong",
        f"{summary}, and {format_size(wanted)} {'are wanted' if case.memory is not None else 'is little for a driver'}",
        "Each byte that is mapped for a device is charged to that limit.",
        commands=tuple(_raise(case, lock.used + wanted)),
        by_hand=raise_limit(lock.used + wanted),
    )


def _raise(case: Case, needed: int) -> Iterator[Command]:
    if case.here.container or case.here.service is not None:
        return
    limit = "unlimited" if case.memory is None else str(-(-needed // KIB))
    if case.has("etc/security/limits.d"):
        line = f"{_user(case)} - memlock {limit}"
        yield write_line(f"'{line}'", "/etc/security/limits.d/90-pyvfio.conf", "for the logins to come")
    if case.process is not None:
        size = limit if limit == "unlimited" else str(int(limit) * KIB)
        comment = f"for process {case.process}, and its children from now on"
        yield Command(f"prlimit --pid {case.process} --memlock={size}:{size}", comment)


def _user(case: Case) -> str:
    """As limits.conf(5) names a user."""
    user = case.here.user
    for line in (read_text(case.root / "etc/passwd") or "").split("\n"):
        name, *fields = line.split(":")
        if fields[1:2] == [str(user)] and re.fullmatch(r"[\w.-]+\$?", name):
            return name
    return f"{user}:{user}"


def check_room(case: Case) -> Iterator[Finding]:
    """The room that this process's control groups leave."""
    room = memory_room(case.kernel, proc=case.kernel.proc)
    if room is None or room.limit > _NO_LIMIT:
        yield Finding("room", "ok", "no control group limits the memory of this process")
    elif case.memory is not None and room.size < case.memory:
        yield Finding(
            "room",
            "wrong",
            f"{format_size(case.memory)} are wanted, and this process's control group has room for "
            f"{format_size(room.size)}: {room}",
            "The kernel kills a process of the group when more is needed.",
            by_hand="Raise that limit: MemoryMax= in a systemd unit, --memory for a container",
        )
    else:
        yield Finding("room", "ok", f"the control group of this process has room for {format_size(room.size)}")


def check_huge_pages(case: Case) -> Iterator[Finding]:
    """The pools of huge pages, which only memory of the kind hugetlb takes."""
    directory = case.kernel.sysfs / "kernel/mm/hugepages"
    pools = []
    for name in sorted(list_names(directory)):
        count, free = (_number(directory / name / file) for file in ("nr_hugepages", "free_hugepages"))
        match = re.fullmatch(r"hugepages-(\d{1,12})kB", name)
        if count and match:
            pools.append((format_size(int(match[1]) * KIB), count, free or 0))
    said = ", ".join(f"{free} of {count} pages of {size} are free" for size, count, free in pools)
    used_up = pools and not any(free for _size, _count, free in pools)
    yield Finding(
        "hugepages",
        "note" if used_up else "ok",
        said or "no huge pages are reserved; nothing but blocks with huge_page_size= need them",
        "A block with huge_page_size= cannot grow before others give pages back." if used_up else "",
    )


def check_limits(case: Case) -> Iterator[Finding]:
    """Limits of the kernel that long lists of blocks reach."""
    vm = case.kernel.proc / "sys/vm"
    overcommit, maps = _number(vm / "overcommit_memory"), _number(vm / "max_map_count")
    if overcommit == 2:
        yield Finding(
            "overcommit",
            "note",
            "vm.overcommit_memory is 2: all memory of blocks counts against CommitLimit of /proc/meminfo",
            commands=(Command("sysctl -w vm.overcommit_memory=0", "Only if blocks cannot grow", risky=True),),
        )
    else:
        yield Finding("overcommit", "ok", f"vm.overcommit_memory is {_said(overcommit)}")
    few = maps is not None and maps < _USUAL_MAPS
    yield Finding(
        "maps",
        "note" if few else "ok",
        f"vm.max_map_count is {_said(maps)}{f', fewer than the usual {_USUAL_MAPS}' if few else ''}",
        "Each discarded or populated part of a block can need a mapping of its own." if few else "",
        commands=(Command(f"sysctl -w vm.max_map_count={_USUAL_MAPS}"),) if few else (),
    )


def check_entries(case: Case) -> Iterator[Finding]:
    """How many mappings a container may hold."""
    place = case.kernel.sysfs / _ENTRIES
    limit = _number(place)
    if limit is None or case.on_iommufd:  # type1 is not loaded, or is not used: iommufd has no such limit
        return
    full = isinstance(case.error, EntryLimitError)
    few = limit < _USUAL_ENTRIES
    yield Finding(
        "entries",
        "wrong" if full or limit == 0 else "note" if few else "ok",
        f"a container may hold {limit} mappings (dma_entry_limit){' and all are in use' if full else ''}",
        "Each piece of a block is a mapping. A container reads the limit when its first group is attached."
        if few or full
        else "",
        commands=(Command(f"echo {max(limit * 4, _USUAL_ENTRIES)} > {place}"),) if few or full else (),
    )


def _number(path: Path) -> int | None:
    """A number of a small file; None where there is none."""
    text = (read_text(path) or "").strip()
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _said(number: int | None) -> str:
    return "not told" if number is None else printable(str(number))
