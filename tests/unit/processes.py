"""What tests see of this process's memory, and children to do in what would end the process or spoil it."""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pyvfio.kernel import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    LinuxKernel,
)
from pyvfio.units import PAGE_SIZE


class Area(NamedTuple):
    """A part of /proc/self/smaps: `rss` and `huge` in bytes, `flags` as VmFlags has them."""

    start: int
    end: int
    permissions: str
    rss: int
    huge: int
    flags: frozenset[str]


def _lines(path: str) -> list[str]:
    # A path in it may hold a carriage return, which reading it as text would take for the end of a line.
    return Path(path).read_bytes().decode("ascii", "replace").split("\n")[:-1]


def areas(vaddr: int, size: int) -> list[Area]:
    """All that lies in `[vaddr, vaddr + size)`."""
    found: list[Area] = []
    # VmFlags is the last line of each: thousands of lines are cut there, and only those that matter are read.
    flags = b"\nVmFlags:"
    cuts = Path("/proc/self/smaps").read_bytes().split(flags)
    for number, text in enumerate(cuts[:-1]):
        header = text.index(b"\n") + 1 if number else 0  # behind the flags of the one before
        start, end = (int(part, 16) for part in text[header : text.index(b" ", header)].split(b"-"))
        if start < vaddr + size and vaddr < end:
            lines = text[header:].split(b"\n")
            values = dict(line.split(b":", 1) for line in lines[1:])
            found.append(
                Area(
                    start,
                    end,
                    lines[0].split(b" ", 2)[1].decode("ascii"),
                    int(values[b"Rss"].split()[0]) * 1024,
                    int(values[b"AnonHugePages"].split()[0]) * 1024,
                    frozenset(cuts[number + 1].split(b"\n", 1)[0].decode("ascii").split()),
                )
            )
    return found


def maps(vaddr: int, size: int) -> list[str]:
    """The lines of /proc/self/maps that lie in `[vaddr, vaddr + size)`."""
    found = []
    for line in _lines("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
        if start < vaddr + size and vaddr < end:
            found.append(line)
    return found


def in_child(action: Callable[[], object]) -> int:
    """Do it in a forked child: 0, 1 when it raised (the traceback is on stderr), -N when signal N ended it."""
    with warnings.catch_warnings():
        # From 3.12 on Python warns of other threads; those of numpy's BLAS sleep, and the child does not use them.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def limit_memory(kind: int, *, headroom: int) -> None:
    """Let this process have `headroom` bytes more than it has now, of RLIMIT_AS or RLIMIT_DATA."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    if kind == resource.RLIMIT_AS:
        used = int(pages[0]) * PAGE_SIZE
    else:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        used = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(kind, (used + headroom, resource.RLIM_INFINITY))


@contextmanager
def mappings_left(count: int) -> Iterator[None]:
    """This process has as many mappings as it may (vm.max_map_count), less `count`. 0.3 s, and no large lists then."""
    kernel = LinuxKernel()
    limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))
    size = (limit + 1) * PAGE_SIZE
    vaddr = kernel.mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)
    others: list[int] = []  # whose neighbours are not alike: each is a mapping
    pages = iter(range(vaddr + PAGE_SIZE, vaddr + size, 2 * PAGE_SIZE))
    try:
        with suppress(OSError):
            for page in pages:
                kernel.mprotect(page, PAGE_SIZE, PROT_READ)  # two mappings more
        with suppress(OSError):
            while True:
                others.append(kernel.mmap(0, PAGE_SIZE, PROT_READ, MAP_SHARED | MAP_ANONYMOUS))
        for page in range(vaddr + PAGE_SIZE, vaddr + (2 * count + 1) * PAGE_SIZE, 2 * PAGE_SIZE):
            kernel.munmap(page, PAGE_SIZE)
        yield
    finally:
        kernel.munmap(vaddr, size)
        for other in others:
            kernel.munmap(other, PAGE_SIZE)


def open_fds() -> dict[int, str]:
    """What this process has open."""
    found = {}
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # its names are looked up faster
    try:
        for name in os.listdir(listing):
            with suppress(FileNotFoundError):  # listdir has a descriptor of its own
                found[int(name)] = os.readlink(name, dir_fd=listing)
    finally:
        os.close(listing)
    del found[listing]
    return found
