"""Blocks and devices in a process that locks all of its memory: what counts, what is there, and what is refused.

Each test does it in a child, since mlockall(2) is for the whole process and not inherited.
"""

from __future__ import annotations

import ctypes
import errno
import resource
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import pyvfio
from pyvfio import Anonymous, Memfd
from pyvfio.memory import MemoryKind
from pyvfio.testing.world import World
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig
from tests.unit.processes import areas, in_child

pytestmark = pytest.mark.one_iommu

NOISE = MIB  # what Python itself takes and gives back meanwhile
Inside = Callable[[Callable[[Rig], None]], None]


@pytest.fixture
def inside(engine_bdfs: tuple[str, ...], world: World) -> Inside:
    """Run a test with a rig of its own in a child that may raise its limits."""

    def run(test: Callable[[Rig], None]) -> None:
        def child() -> None:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            warnings.simplefilter("error")
            roomy = with_free_memory()
            with Rig(engine_bdfs[0], kernel=world.kernel) as rig:
                test(rig)
            del roomy

        assert in_child(child) == 0

    return run


def with_free_memory() -> list[bytes]:
    """Return objects that keep arenas of Python's allocator with free pools, while they live.

    An arena is 1 MiB. Without a free pool, the test's own objects can take a new arena between two measurements.
    """
    made = [bytes(400) for _ in range(20_000)]
    return made[::500]


@contextmanager
def room_for(world: World, size: int) -> Iterator[int]:
    """This process may lock `size` bytes more than it has; the limit."""
    limit = world.locked_bytes() + size
    with world.memlock_limit(limit):
        yield limit // PAGE_SIZE * PAGE_SIZE


def resident(block: pyvfio.RamBlock) -> int:
    """Bytes of it that are there for this process."""
    return sum(area.rss for area in areas(block.vaddr, block.max_length))


def locked(block: pyvfio.RamBlock) -> set[bool]:
    """Whether its areas are locked, in use or not."""
    return {"lo" in area.flags for area in areas(block.vaddr, block.max_length)}


@pytest.mark.real_kernel("the machine limits locked memory, and a fake does not count locked memory")
@pytest.mark.parametrize("memory", [Anonymous(), Memfd()], ids=["anonymous", "memfd"])
def test_what_is_locked_and_mapped_counts_twice(inside: Inside, world: World, memory: MemoryKind) -> None:
    """All of max_length is charged to mlockall when it is reserved, and used_length once more to the mapping."""

    def test(rig: Rig) -> None:
        pyvfio.lock_all_memory()
        before, pinned = world.locked_bytes(), world.locked_bytes() - world.kernel.mlocked()
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=64 * MIB, memory=memory)
        for length in (2 * MIB, 8 * MIB, PAGE_SIZE, 4 * MIB):
            block.resize(length)
            assert abs(world.locked_bytes() - before - 64 * MIB - length) < NOISE
            assert world.locked_bytes() - world.kernel.mlocked() - pinned == length
            assert locked(block) == {True}
            assert rig.reaches(block, length - SIZE)
        pyvfio.unlock_all_memory()
        assert locked(block) == {False}
        assert world.kernel.mlocked() == 0
        assert world.locked_bytes() - pinned == 4 * MIB
        assert rig.reaches(block, 4 * MIB - SIZE)

    inside(test)


@pytest.mark.real_kernel("the machine limits locked memory, and a fake does not count locked memory")
@pytest.mark.parametrize("on_fault", [False, True], ids=["at once", "on fault"])
def test_locked_memory_is_there_when_a_block_has_grown_or_when_it_is_touched(inside: Inside, on_fault: bool) -> None:  # noqa: FBT001
    """For the process alone; a device's mapping has pages in any case."""

    def test(rig: Rig) -> None:
        pyvfio.lock_all_memory(on_fault=on_fault)
        with pyvfio.RamBlockList(kernel=rig.space.kernel) as unmapped:
            block = unmapped.add("ring", used_length=0, max_length=64 * MIB)
            assert resident(block) == 0
            block.resize(8 * MIB)
            assert resident(block) == (0 if on_fault else 8 * MIB)
            ctypes.memset(block.vaddr, 1, 8 * MIB)
            assert resident(block) == 8 * MIB
            block.resize(4 * MIB)
            assert resident(block) == 4 * MIB
            assert locked(block) == {True}

    inside(test)


@pytest.mark.real_kernel("the machine limits locked memory, and a fake does not count locked memory")
@pytest.mark.parametrize("memory", [Anonymous(), Memfd()], ids=["anonymous", "memfd"])
def test_locked_memory_that_is_discarded_is_given_back(inside: Inside, memory: MemoryKind) -> None:
    """MADV_DONTNEED is EINVAL there; MADV_DONTNEED_LOCKED is not. It stays locked, and comes back with zeros."""

    def test(rig: Rig) -> None:
        pyvfio.lock_all_memory()
        block = rig.blocks.add("ring", used_length=8 * MIB, max_length=64 * MIB, memory=memory)
        ctypes.memset(block.vaddr, 1, 8 * MIB)
        block.discard(2 * MIB, 4 * MIB)
        assert resident(block) == 4 * MIB
        assert locked(block) == {True}
        assert rig.device_reads(rig.mapper.iova(block) + 2 * MIB) is None
        block.populate(2 * MIB, 4 * MIB)
        assert ctypes.string_at(block.vaddr + 2 * MIB, 4 * MIB) == bytes(4 * MIB)
        assert rig.reaches(block, 4 * MIB)

    inside(test)


@pytest.mark.real_kernel("the machine limits locked memory, and a fake does not count locked memory")
@pytest.mark.parametrize("memory", [Anonymous(), Memfd()], ids=["anonymous", "memfd"])
def test_a_block_is_made_and_shrinks_in_what_room_the_limit_leaves_it(
    inside: Inside, world: World, memory: MemoryKind
) -> None:
    """A mapping in place of another is held against the limit beside it, and refused (EAGAIN): so the old one is
    unlocked first. Nothing is retained, and what comes after it is locked."""

    def test(rig: Rig) -> None:
        pyvfio.lock_all_memory()
        with room_for(world, 48 * MIB):
            block = rig.blocks.add("ring", used_length=0, max_length=24 * MIB, memory=memory)
            for length in (18 * MIB, MIB, 18 * MIB):
                block.resize(length)
                assert rig.reaches(block, length - SIZE)
            assert world.locked_bytes() - world.kernel.mlocked() == 18 * MIB + PAGE_SIZE
            block.remove()
            with pyvfio.RamBlockList(kernel=rig.space.kernel) as unmapped:
                block = unmapped.add("ring", used_length=36 * MIB, max_length=36 * MIB, memory=memory)
                ctypes.memset(block.vaddr, 1, 36 * MIB)
                block.resize(MIB)
                assert (resident(block), block.state.memory.retained) == (MIB, 0)
                assert locked(block) == {True}

    inside(test)


@pytest.mark.real_kernel("the machine limits locked memory, and a fake does not count locked memory")
def test_address_space_that_may_not_be_locked_is_refused_with_the_numbers(inside: Inside, world: World) -> None:
    """max_length counts where mlockall holds what is to come, though nothing of it is memory yet."""

    def test(rig: Rig) -> None:
        pyvfio.lock_all_memory()
        with room_for(world, 32 * MIB) as limit:
            with pytest.raises(pyvfio.PinLimitError, match="64 MiB of address space could not be reserved") as caught:
                rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=64 * MIB)
            assert caught.value.errno == errno.EAGAIN
            assert caught.value.limit == limit
            assert "under mlockall, future memory is locked too" in str(caught.value)
            assert "are missing" in str(caught.value)
            pyvfio.unlock_all_memory()
            assert rig.reaches(rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=64 * MIB), 0)

    inside(test)


@pytest.mark.only_type1("iommufd counts pinned memory by user, apart from mlock")
@pytest.mark.real_kernel("the machine limits locked memory, and a fake does not count locked memory")
def test_a_refused_mapping_says_what_mlockall_holds_and_what_mappings_hold(inside: Inside, world: World) -> None:
    """With what munlockall gives back the same resize goes through."""

    def test(rig: Rig) -> None:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=64 * MIB)
        pyvfio.lock_all_memory()
        with room_for(world, 8 * MIB) as limit:
            with pytest.raises(pyvfio.PinLimitError) as caught:
                block.resize(16 * MIB)
            said = str(caught.value)
            assert (caught.value.errno, caught.value.limit) == (errno.ENOMEM, limit)
            assert abs(caught.value.mlocked - world.kernel.mlocked()) < NOISE
            assert "by mlock or mlockall" in said
            assert "elsewhere" not in said
            assert "munlockall (pyvfio.unlock_all_memory) frees" in said
            assert "which is enough" in said
            assert block.used_length == 2 * MIB
            pyvfio.unlock_all_memory()
            block.resize(16 * MIB)
        assert rig.reaches(block, 16 * MIB - SIZE)

    inside(test)


@pytest.mark.only_type1("iommufd counts pinned memory by user, apart from mlock")
@pytest.mark.real_kernel("the machine limits locked memory, and a fake does not count locked memory")
def test_locking_more_than_may_be_locked_is_refused_and_locks_nothing(inside: Inside, world: World) -> None:
    """The whole address space is held against the limit, and what blocks have reserved is part of it."""

    def test(rig: Rig) -> None:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=1024 * MIB)
        before = world.locked_bytes()
        with world.memlock_limit(512 * MIB):
            with pytest.raises(pyvfio.PinLimitError, match="address space, the reserved parts of RAM blocks") as caught:
                pyvfio.lock_all_memory()
            assert (caught.value.errno, caught.value.limit) == (errno.ENOMEM, 512 * MIB)
            assert caught.value.asked > 1024 * MIB
            assert f"{pyvfio.units.format_size(before)} mapped for devices" in str(caught.value)
        with world.memlock_limit(0):
            with pytest.raises(pyvfio.PinLimitError) as caught:
                pyvfio.lock_all_memory()
            assert caught.value.errno == errno.EPERM
        assert (world.locked_bytes(), world.kernel.mlocked()) == (before, 0)
        assert locked(block) == {False}

    inside(test)
