"""What it costs to grow a RAM block that a device reaches by 2 MiB, for each way of resizing, at any length.

Populating the new memory is the kernel's work and the same for all, so that it is done before the memory is mapped, by
a notifier that is told before the mapper, and its time is taken apart. The clock is the running kernel's: in a virtual
machine with `icount` it counts instructions, and what it says repeats.

`bare_resize.c` makes the same system calls and nothing else.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from pyvfio.container import Container
from pyvfio.dma import DmaMapper
from pyvfio.kernel import MADV_POPULATE_WRITE, Kernel
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.testing.vm_errors import find_tool
from pyvfio.units import MIB

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
    """Medians, in microseconds: of growing by 2 MiB without `prefault`, which is populating those 2 MiB."""

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


def measure(container: Container, policy: str, *, size: int, repeat: int) -> Cost:
    """Grow a block of `size` bytes, all of which is populated, `repeat` times, and shrink it again in between."""
    kernel = container.kernel
    with RamBlockList(kernel=kernel) as blocks, POLICIES[policy](container, blocks):
        block = blocks.add("measured", used_length=size, max_length=size + STEP)
        prefault = _Prefault(kernel)
        blocks.add_notifier(prefault)  # the newest is told first, when memory is there and before it is mapped
        _grow(block, prefault)  # the first time, what it takes is loaded
        return _median([_grow(block, prefault) for _ in range(repeat)])


def _grow(block: RamBlock, prefault: _Prefault) -> tuple[int, int]:
    former = block.used_length
    start = time.monotonic_ns()
    block.resize(former + STEP)
    total = time.monotonic_ns() - start
    populating = prefault.nanoseconds
    block.resize(former)
    return total - populating, populating


def _median(samples: Iterable[tuple[int, int]]) -> Cost:
    resizes, prefaults = zip(*samples, strict=True)
    return Cost(median(resizes) / 1000, median(prefaults) / 1000)


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
    program: Path, group_node: Path, *, sizes: Sequence[int], repeat: int
) -> Iterator[tuple[str, int, Cost]]:
    """What the same costs in system calls alone: policy, size, cost. Nobody else may have the group open."""
    command = [str(program), str(group_node), str(repeat), *(str(size // MIB) for size in sizes)]
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
        yield policy, size_in_bytes, _median(found)
