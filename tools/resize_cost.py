"""The cost of growing a RAM block in a device's reach by 2 MiB, and of shrinking the block, for each policy.

The block can have any length. Populating the new memory is the kernel's work, and the same for all policies. Therefore
a notifier, called before the mapper, populates the memory, and its time is taken separately. Only the pages of a file
are allocated in the resize, by fallocate(2), and so in the bare calls too. The clock is the running kernel's. In a
virtual machine with `icount`, the clock counts instructions, and its figures repeat.

`bare_resize.c` makes the same system calls and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from pyvfio.dma import DmaMapper
from pyvfio.iommu.space import AddressSpace
from pyvfio.kernel import MADV_POPULATE_WRITE, Kernel
from pyvfio.memory import Anonymous, File, Memfd, MemoryKind
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.units import MIB, format_size
from tools.bare import least
from tools.report import Cost

MEMORIES = ("anonymous", "memfd", "hugetlb", "file")
"""The kinds of memory of a block: private memory, a memfd, a memfd of huge pages, and a memfd of the caller that is
extended and punched."""

STEP = 2 * MIB
"""The bytes by which a block grows."""


class Policy(NamedTuple):
    """The mapper of a policy, and the way in which the space cuts a mapping."""

    make: Callable[[AddressSpace, RamBlockList], DmaMapper]
    cut: Literal["pages", "replace"] | None = None


POLICIES: Mapping[str, Policy] = {
    "remap": Policy(DmaMapper),
    "extend": Policy(partial(DmaMapper, resize="extend")),
    "granule": Policy(partial(DmaMapper, resize="extend", granule=STEP)),
    "cut-pages": Policy(partial(DmaMapper, resize="cut"), "pages"),
    "cut-replace": Policy(partial(DmaMapper, resize="cut"), "replace"),
}


def policies_of(space: str) -> list[str]:
    """Return the policies for "type1" or "iommufd"."""
    return [name for name, policy in POLICIES.items() if policy.cut is None or space == "iommufd"]


class _Prefault:
    """The notifier that populates the new memory of a block, and measures the time."""

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
    """Provide `size` bytes of that memory in pages of 2 MiB, so that the kernel's work is the same each time.

    Smaller pages of a file would lie at random places. Raises OSError if there are not enough pages of 2 MiB.
    """
    if memory == "anonymous":  # transparent huge pages are on already
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
    """Return the number in a file, or the word in brackets among several words."""
    text = path.read_text(encoding="ascii").strip()
    return text.partition("[")[2].partition("]")[0] or text


def measure(space: AddressSpace, policy: str, *, memory: str, size: int, repeat: int) -> Cost:
    """Grow a populated block of `size` bytes `repeat` times, and shrink the block in between. Return the least costs.

    `memory`: one of MEMORIES. A shrink of a policy that cuts leaves the head of the last mapping.
    """
    kernel, chosen = space.kernel, POLICIES[policy]
    one = _grow if chosen.cut is None else _grow_and_cut
    with _kind(memory) as kind, RamBlockList(kernel=kernel) as blocks, chosen.make(space, blocks):
        block = blocks.add("measured", used_length=size, max_length=size + 2 * STEP, memory=kind)
        prefault = _Prefault(kernel)
        blocks.add_notifier(prefault)  # the newest notifier is called first: after activation, before the map
        one(block, prefault)  # the first grow loads code and data
        return least([one(block, prefault) for _ in range(repeat)])


def _grow(block: RamBlock, prefault: _Prefault) -> tuple[int, int, int]:
    former = block.used_length
    start = time.monotonic_ns()
    block.resize(former + STEP)
    total = time.monotonic_ns() - start
    populating = prefault.nanoseconds
    start = time.monotonic_ns()
    block.resize(former)
    return total - populating, populating, time.monotonic_ns() - start


def _grow_and_cut(block: RamBlock, prefault: _Prefault) -> tuple[int, int, int]:
    grown, populating, _whole = _grow(block, prefault)
    former = block.used_length
    block.resize(former + 2 * STEP)  # one mapping, of which the next shrink cuts a half
    start = time.monotonic_ns()
    block.resize(former + STEP)
    cut = time.monotonic_ns() - start
    block.resize(former)
    return grown, populating, cut
