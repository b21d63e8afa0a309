"""What it costs to grow a RAM block that a device reaches by 2 MiB, for each way of resizing, at any length.

Populating the new memory is the kernel's work and the same for all, so that it is done before the memory is mapped, by
a notifier that is told before the mapper, and its time is taken apart. Only a file's pages are had in the resize, by
fallocate(2), and in the bare calls, too. The clock is the running kernel's: in a virtual
machine with `icount` it counts instructions, and what it says repeats.

`bare_resize.c` makes the same system calls and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyvfio.container import Container
from pyvfio.dma import DmaMapper
from pyvfio.kernel import MADV_POPULATE_WRITE, Kernel
from pyvfio.memory import Anonymous, File, Memfd, MemoryKind
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.testing.vm_errors import find_tool
from pyvfio.units import MIB, format_size

MEMORIES = ("anonymous", "memfd", "hugetlb", "file")
"""What a block may be of: private memory, a memfd of its own, one of huge pages, a memfd of the caller's that is made
longer and punched."""

STEP = 2 * MIB
"""A block grows by as much, in bytes."""

SOURCE = Path(__file__).with_name("bare_resize.c")

POLICIES: dict[str, Callable[[Container, RamBlockList], DmaMapper]] = {
    "remap": DmaMapper,
    "extend": partial(DmaMapper, resize="extend"),
    "granule": partial(DmaMapper, resize="extend", granule=STEP),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """In microseconds, the least of some: of growing by 2 MiB without `prefault`, which is populating those 2 MiB. Any
    more is the timer's interrupt, which comes every 4 ms, and so into most of the calls that fill pages with zeros."""

    resize: float
    prefault: float


class _Prefault:
    """The notifier that populates what a block grows by, and knows how long that took."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.nanoseconds = 0

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        start = time.monotonic_ns()
        if new_length > old_length:
            self._kernel.madvise(block.vaddr + old_length, new_length - old_length, MADV_POPULATE_WRITE)
        self.nanoseconds = time.monotonic_ns() - start


@contextmanager
def _kind(memory: str) -> Iterator[MemoryKind]:
    own: dict[str, MemoryKind] = {"anonymous": Anonymous(), "memfd": Memfd(), "hugetlb": Memfd(hugetlb=STEP)}
    if memory in own:
        yield own[memory]
        return
    fd = os.memfd_create("measured", os.MFD_CLOEXEC)
    try:
        yield File(fd, grow=True, punch=True)
    finally:
        os.close(fd)


@contextmanager
def large_pages(memory: str, *, size: int, settings: Path = Path("/sys/kernel/mm")) -> Iterator[None]:
    """Let `size` bytes of that memory be had in pages of 2 MiB on this machine, so that the kernel's work is the same
    each time: what its files get of smaller pages lies here and there. Raises OSError where there are none."""
    if memory == "anonymous":  # has them
        yield
        return
    path, value = settings / "transparent_hugepage" / "shmem_enabled", "always"
    if memory == "hugetlb":
        path, value = settings / "hugepages" / "hugepages-2048kB" / "nr_hugepages", str(size // STEP)
    former = _setting(path)
    path.write_text(value, encoding="ascii")
    try:
        if _setting(path) != value:
            raise OSError(f"this machine has no {format_size(size)} of memory in pages of {format_size(STEP)}")
        yield
    finally:
        path.write_text(former, encoding="ascii")


def _setting(path: Path) -> str:
    """A number, or of several words the one in brackets."""
    text = path.read_text(encoding="ascii").strip()
    return text.partition("[")[2].partition("]")[0] or text


def measure(container: Container, policy: str, *, memory: str, size: int, repeat: int) -> Cost:
    """Grow a block of `size` bytes, all of which is populated, `repeat` times, and shrink it again in between.
    `memory`: one of MEMORIES."""
    kernel = container.kernel
    with _kind(memory) as kind, RamBlockList(kernel=kernel) as blocks, POLICIES[policy](container, blocks):
        block = blocks.add("measured", used_length=size, max_length=size + STEP, memory=kind)
        prefault = _Prefault(kernel)
        blocks.add_notifier(prefault)  # the newest is told first, when memory is there and before it is mapped
        _grow(block, prefault)  # the first time, what it takes is loaded
        return _least([_grow(block, prefault) for _ in range(repeat)])


def _grow(block: RamBlock, prefault: _Prefault) -> tuple[int, int]:
    former = block.used_length
    start = time.monotonic_ns()
    block.resize(former + STEP)
    total = time.monotonic_ns() - start
    populating = prefault.nanoseconds
    block.resize(former)
    return total - populating, populating


def _least(samples: Iterable[tuple[int, int]]) -> Cost:
    resizes, prefaults = zip(*samples, strict=True)
    return Cost(min(resizes) / 1000, min(prefaults) / 1000)


# --------------------------------------------------------------------------------------------------- bare system calls


def compile_bare(directory: Path) -> Path:
    """Compile `bare_resize.c` into `directory`. Raises MissingToolError where there is no C compiler."""
    compiler, program = find_tool("gcc", package="gcc"), directory / "bare_resize"
    command = [compiler, "-O2", "-Wall", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise OSError(f"{SOURCE.name} could not be compiled: {done.stderr}")
    return program


def measure_bare(
    program: Path, group_node: Path, *, memory: str, sizes: Sequence[int], repeat: int
) -> Iterator[tuple[str, int, Cost]]:
    """What the same costs in system calls alone: policy, size, cost. Nobody else may have the group open."""
    command = [str(program), str(group_node), str(repeat), memory, *(str(size // MIB) for size in sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise OSError(f"the bare calls failed: {done.stderr}")
    yield from parse_bare(done.stdout)


def parse_bare(text: str) -> Iterator[tuple[str, int, Cost]]:
    """What `bare_resize` printed."""
    samples: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for line in text.splitlines():
        size, policy, total, prefault = line.split()
        samples.setdefault((policy, int(size) * MIB), []).append((int(total), int(prefault)))
    for (policy, size_in_bytes), found in samples.items():
        yield policy, size_in_bytes, _least(found)
