"""Memory that is to be there beforehand, where the machine has none: refused, with nothing taken and nobody killed."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvfio
from pyvfio import Anonymous, Memfd
from pyvfio.kernel import MADV_POPULATE_WRITE, Kernel
from pyvfio.memory import MemoryKind
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB
from tests.hw.rig import SIZE, Rig
from tests.hw.test_kinds import POOL, huge_pages
from tests.unit.processes import areas, in_child

pytestmark = pytest.mark.one_iommu

GROUPS = Path("/sys/fs/cgroup")


@contextmanager
def group_of(limit: int) -> Iterator[Path]:
    """A control group of version 2 with a limit of memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = not (GROUPS / "cgroup.controllers").exists()
    if mounted and libc.mount(b"none", os.fsencode(GROUPS), b"cgroup2", 0, None) != 0:
        pytest.fail(f"{GROUPS} cannot be mounted: {os.strerror(ctypes.get_errno())}")
    group = GROUPS / "test_prealloc"
    try:
        (GROUPS / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
        group.mkdir()
        (group / "memory.max").write_text(str(limit), encoding="ascii")
        yield group
    finally:
        if group.exists():
            group.rmdir()
        if mounted:
            libc.umount(os.fsencode(GROUPS))


@pytest.mark.real_kernel("the limit of a control group belongs to the machine")
@pytest.mark.parametrize("memory", [Anonymous(), Memfd()], ids=["anonymous", "memfd"])
def test_what_the_limit_of_a_control_group_has_no_room_for_is_refused_and_nobody_is_killed(
    kernel: Kernel, throwaway: None, memory: MemoryKind
) -> None:
    """Where the same without a look beforehand ends the process, which is the control."""
    with group_of(64 * MIB) as group:

        def enter() -> pyvfio.RamBlockList:
            (group / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
            return pyvfio.RamBlockList(kernel=kernel)

        def refused() -> None:
            with enter() as blocks:
                with pytest.raises(pyvfio.IoctlError, match="256 MiB of memory are to be populated") as caught:
                    blocks.add("ring", used_length=256 * MIB, max_length=GIB, memory=memory, prealloc=1)
                assert f"{group}/memory.max is 64 MiB" in str(caught.value)
                assert len(blocks) == 0
                block = blocks.add("ring", used_length=16 * MIB, max_length=GIB, memory=memory, prealloc=1)
                with pytest.raises(pyvfio.IoctlError, match="control group"):
                    block.resize(256 * MIB)
                assert block.used_length == 16 * MIB
                assert sum(area.rss for area in areas(block.vaddr, GIB)) == 16 * MIB
                block.resize(32 * MIB)

        def killed() -> None:
            with enter() as blocks:
                block = blocks.add("ring", used_length=256 * MIB, max_length=GIB, memory=memory)
                kernel.madvise(block.vaddr, 256 * MIB, MADV_POPULATE_WRITE)

        assert in_child(refused) == 0
        assert in_child(killed) == -signal.SIGKILL


@pytest.mark.real_kernel("the pool of huge pages belongs to the machine")
def test_huge_pages_that_are_not_in_the_pool_are_refused_and_none_is_kept(
    rig: Rig, world: World, throwaway: None
) -> None:
    """An errno of fallocate: all that were free before are again, and what the block had it has."""
    with huge_pages(4):
        free = POOL.parent / "free_hugepages"
        memory = Memfd(hugetlb=2 * MIB)
        with pytest.raises(pyvfio.IoctlError, match="pool of huge pages of 2 MiB may be too small"):
            rig.blocks.add("ring", used_length=16 * MIB, max_length=GIB, memory=memory, prealloc=2)
        assert int(free.read_text(encoding="ascii")) == 4
        block = rig.blocks.add("ring", used_length=4 * MIB, max_length=GIB, memory=memory, prealloc=2)
        locked = world.locked_bytes()
        with pytest.raises(pyvfio.IoctlError, match="pool of huge pages of 2 MiB may be too small"):
            block.resize(16 * MIB)
        assert (block.used_length, world.locked_bytes(), block.page_size) == (4 * MIB, locked, 2 * MIB)
        assert int(free.read_text(encoding="ascii")) == 2
        assert rig.reaches(block, 4 * MIB - SIZE)
        block.remove()
        assert int(free.read_text(encoding="ascii")) == 4
