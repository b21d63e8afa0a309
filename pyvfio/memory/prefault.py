"""Populates memory before the memory is mapped, with several threads.

Mapping memory pins the pages. If pages are not populated yet, the one thread that maps must zero them one after the
other. That takes most of the time of a first map. If the memory is populated first, several threads zero the pages, and
the map finds them in place.

Source: MADV_POPULATE_WRITE (madvise(2), Linux 5.14), used in the same way by `os_mem_prealloc` of QEMU
(util/oslib-posix.c).
"""

from __future__ import annotations

import ctypes
import errno
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Protocol, TypeAlias

from pyvfio.errors import IoctlError
from pyvfio.guard import checkpoint
from pyvfio.kernel import MADV_POPULATE_WRITE, Kernel
from pyvfio.memory.cgroup import memory_room
from pyvfio.units import MIB, PAGE_SIZE, Vaddr, align_down, check_whole_number, format_size

logger = logging.getLogger(__name__)

SLICE = 32 * MIB
"""The bytes that one call populates: enough to be worth a call, and few enough for Ctrl-C and a smooth progress bar."""

MOST_THREADS = 1024
"""The most threads: a larger number can only be a mistake."""


def check_threads(value: object, what: str) -> int:
    """Return `value` as a number of threads. Raises TypeError and ValueError, with `what` as the name."""
    threads = check_whole_number(value, what)
    if not 0 <= threads <= MOST_THREADS:
        raise ValueError(f"{what} must be a number of threads from 0 to {MOST_THREADS}, not {value}")
    return threads


class Report(Protocol):
    """Receives the progress of a change: `done` of `total` bytes."""

    def __call__(self, done: int, total: int) -> None: ...


def populate(
    kernel: Kernel,
    parts: Sequence[tuple[int, int]],
    *,
    vaddr: Vaddr,
    threads: int,
    report: Report | None = None,
    touch: bool = False,
    required: bool = False,
) -> None:
    """Populate all `parts`, (start, end) in bytes from `vaddr` on, with `threads` threads.

    If the kernel returns EINVAL (before 5.14, or for memory without pages of its own), the pages are touched if `touch`
    is set; else the map populates them later. `required`: EINVAL is an error too.

    The caller's thread calls `report`. Raises IoctlError if no pages are left, and any exception from `report`; calls
    in progress end first, and the pages populated by then stay.
    """
    slices = [piece for part in parts for piece in _slices(*part)]
    total, done = sum(end - start for start, end in slices), 0
    calls = [partial(_populate, kernel, vaddr + start, end - start, required=required) for start, end in slices]
    with closing(_made(calls, threads)) as answers:  # waits for the calls in progress, also after an exception
        for where, size, populated in answers:
            if touch and not populated:
                _touch(where, size)
            done += size
            if report is not None:
                report(done, total)


def check_room(kernel: Kernel, parts: Sequence[tuple[int, int]], *, vaddr: Vaddr) -> None:
    """Raise IoctlError (ENOMEM) if a control group's limit certainly cannot hold the pages that `parts` lack.

    Without this check, the kernel would kill a process of the group. Cost: about 100 µs, and 1 ms for each GiB if the
    limit is close.
    """
    asked = sum(end - start for start, end in parts)
    room = memory_room(kernel)
    if room is None or asked <= room.size:
        return
    missing = asked - _resident(kernel, parts, vaddr)
    if missing > room.size:
        raise IoctlError(
            errno.ENOMEM,
            f"{format_size(missing)} of memory are to be populated, {format_size(missing - room.size)} more than "
            f"this process's control group has room for: {room}",
            request="madvise",
            arguments={"vaddr": vaddr + parts[0][0], "size": asked, "advice": MADV_POPULATE_WRITE},
            hint="Raise that limit (MemoryMax= in a systemd unit, --memory for a container), or free memory of the "
            "group; beyond the limit, the kernel kills a process, now or when the memory is touched",
        )


def _resident(kernel: Kernel, parts: Sequence[tuple[int, int]], vaddr: int) -> int:
    """Return the number of bytes that have pages already; 0 if the kernel does not tell."""
    try:
        return sum(kernel.resident(vaddr + start, end - start) for start, end in parts)
    except OSError as error:
        logger.debug("%#x: the kernel does not tell which pages are resident: %s", vaddr, error)
        return 0


def _slices(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min(align_down(start + SLICE, SLICE), end)
        yield start, stop
        start = stop


def _populate(kernel: Kernel, vaddr: int, size: int, *, required: bool) -> tuple[int, int, bool]:
    """Populate one range. Return its address and size, and whether madvise was able to populate the range."""
    try:
        kernel.madvise(vaddr, size, MADV_POPULATE_WRITE)
    except OSError as error:
        if required or error.errno != errno.EINVAL:
            raise IoctlError.of(
                error,
                f"{format_size(size)} of memory could not be populated",
                request="madvise",
                arguments={"vaddr": vaddr, "size": size, "advice": MADV_POPULATE_WRITE},
                hint="Free memory, check the cgroup's limit (memory.max) and, for huge pages, the pool "
                "(vm.nr_hugepages)",
            ) from error
        logger.debug("%#x-%#x cannot be populated by madvise: %s", vaddr, vaddr + size - 1, error)
        return vaddr, size, False
    return vaddr, size, True


def _touch(vaddr: int, size: int) -> None:
    """Write the first byte of each page unchanged."""
    with memoryview((ctypes.c_ubyte * size).from_address(vaddr)).cast("B") as view:
        view[::PAGE_SIZE] = view[::PAGE_SIZE]


_Answer: TypeAlias = tuple[int, int, bool]


def _made(calls: Sequence[Callable[[], _Answer]], threads: int) -> Generator[_Answer, None, None]:
    """Make the calls with several threads. Yield their results in the order of completion."""
    if threads < 2 or len(calls) < 2:
        for call in calls:
            checkpoint()
            yield call()
        return
    from concurrent.futures import ThreadPoolExecutor, as_completed  # noqa: PLC0415 (half the cost of importing pyvfio)

    with ThreadPoolExecutor(min(threads, len(calls))) as workers:
        made = [workers.submit(call) for call in calls]
        try:
            for each in as_completed(made):
                checkpoint()
                yield each.result()
        finally:
            for each in made:
                each.cancel()
