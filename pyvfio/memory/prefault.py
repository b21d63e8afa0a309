"""Populating memory before it is mapped, by several threads.

Mapping memory pins it, and pages that are not there yet are then zeroed one after the other by the one thread that
maps: most of what a first map takes. Populated beforehand they are zeroed by as many threads as are wanted, and the
map finds them in place.

Source: MADV_POPULATE_WRITE (madvise(2), Linux 5.14), which QEMU's `os_mem_prealloc` (util/oslib-posix.c) uses the same
way.
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
"""What one call populates: long enough to be worth a call, short enough for Ctrl-C and for a bar that moves."""

MOST_THREADS = 1024
"""More than this many threads can only be a mistake."""


def check_threads(value: object, what: str) -> int:
    """Return `value` as a number of threads. Raises TypeError and ValueError, with `what` in it."""
    threads = check_whole_number(value, what)
    if not 0 <= threads <= MOST_THREADS:
        raise ValueError(f"{what} is a number of threads, not {value}, and at most {MOST_THREADS}")
    return threads


class Report(Protocol):
    """Told how far a change has come: `done` of `total` bytes."""

    def __call__(self, done: int, total: int) -> None: ...


def populate(
    kernel: Kernel,
    parts: Sequence[tuple[int, int]],
    *,
    vaddr: Vaddr,
    threads: int,
    report: Report | None = None,
    touch: bool = False,
) -> None:
    """Have pages behind all `parts`, (start, end) in bytes from `vaddr` on, by `threads` threads.

    Where the kernel cannot (EINVAL: before 5.14, or memory of a kind that has no pages) each page is touched, if
    `touch`, and else left to the map to populate. Raises IoctlError when there are no pages, and what `report` raises,
    which is called by the caller's own thread; calls that are under way are waited for. What has been populated by then
    stays.
    """
    slices = [piece for part in parts for piece in _slices(*part)]
    total, done = sum(end - start for start, end in slices), 0
    calls = [partial(_populate, kernel, vaddr + start, end - start) for start, end in slices]
    with closing(_made(calls, threads)) as answers:  # what is under way is waited for, whoever raises
        for where, size, populated in answers:
            if touch and not populated:
                _touch(where, size)
            done += size
            if report is not None:
                report(done, total)


def check_room(kernel: Kernel, parts: Sequence[tuple[int, int]], *, vaddr: Vaddr) -> None:
    """Raises IoctlError (ENOMEM) where a control group's limit certainly has no room for the pages that `parts` lack:
    the kernel would kill a process of it. Some 100 µs, and 1 ms for 1 GiB where it is close."""
    asked = sum(end - start for start, end in parts)
    room = memory_room(kernel)
    if room is None or asked <= room.size:
        return
    missing = asked - _resident(kernel, parts, vaddr)
    if missing > room.size:
        raise IoctlError(
            errno.ENOMEM,
            f"{format_size(missing)} of memory are to be populated, {format_size(missing - room.size)} more than "
            f"there is room for in this process's control group: {room}",
            request="madvise",
            arguments={"vaddr": vaddr + parts[0][0], "size": asked, "advice": MADV_POPULATE_WRITE},
            hint="Raise that limit (MemoryMax= in a systemd unit, --memory for a container), or free memory of the "
            "group; the kernel answers what goes beyond it by killing a process, now or when the memory is touched",
        )


def _resident(kernel: Kernel, parts: Sequence[tuple[int, int]], vaddr: int) -> int:
    """How many bytes have pages already; none where the kernel does not tell."""
    try:
        return sum(kernel.resident(vaddr + start, end - start) for start, end in parts)
    except OSError as error:
        logger.debug("%#x: the kernel does not tell which pages are there: %s", vaddr, error)
        return 0


def _slices(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min(align_down(start + SLICE, SLICE), end)
        yield start, stop
        start = stop


def _populate(kernel: Kernel, vaddr: int, size: int) -> tuple[int, int, bool]:
    """Where, how much, and whether that could be done."""
    try:
        kernel.madvise(vaddr, size, MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise IoctlError.of(
                error,
                f"{format_size(size)} of memory could not be populated",
                request="madvise",
                arguments={"vaddr": vaddr, "size": size, "advice": MADV_POPULATE_WRITE},
                hint="Free memory, look at the cgroup's limit (memory.max) and, for huge pages, at the pool "
                "(vm.nr_hugepages)",
            ) from error
        logger.debug("%#x-%#x cannot be populated by madvise: %s", vaddr, vaddr + size - 1, error)
        return vaddr, size, False
    return vaddr, size, True


def _touch(vaddr: int, size: int) -> None:
    """Write the first byte of each page, as it is."""
    with memoryview((ctypes.c_ubyte * size).from_address(vaddr)).cast("B") as view:
        view[::PAGE_SIZE] = view[::PAGE_SIZE]


_Answer: TypeAlias = tuple[int, int, bool]


def _made(calls: Sequence[Callable[[], _Answer]], threads: int) -> Generator[_Answer, None, None]:
    """Make the calls, by several threads, and yield what they return, in the order in which they end."""
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
