"""A device and memory of each kind: it reaches what is in use, and no more, whatever the pages are."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvfio
from pyvfio import Anonymous, File, Memfd
from pyvfio.memory import MemoryKind
from pyvfio.testing.probe import PageWitness
from pyvfio.testing.world import World
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig, pattern
from tests.hw.test_machine import strict_overcommit
from tests.unit.processes import mappings_left

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


@contextmanager
def kind(name: str) -> Iterator[MemoryKind]:
    """By its name; files are in memory, where a device may write to them."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * MIB)
    kinds: dict[str, MemoryKind] = {
        "noreserve": Anonymous(noreserve=True),
        "memfd": Memfd(),
        "file": File(fd, PAGE_SIZE, grow=True, punch=True),
        "private file": File(fd, shared=False),
    }
    yield kinds[name]
    os.close(fd)


@pytest.mark.parametrize("name", ["noreserve", "memfd", "file", "private file"])
def test_the_device_follows_memory_of_any_kind(rig: Rig, name: str) -> None:
    """Through growing, shrinking and growing back; behind the end it is stopped."""
    with kind(name) as memory:
        block = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=16 * MIB, memory=memory)
        assert rig.reaches(block, PAGE_SIZE - SIZE)
        block.resize(4 * MIB)
        assert rig.reaches(block, 0)
        assert rig.reaches(block, 4 * MIB - SIZE)
        block.resize(2 * MIB)
        assert rig.device_reads(rig.mapper.iova(block) + 2 * MIB) is None
        block.resize(3 * MIB)
        assert rig.reaches(block, 3 * MIB - SIZE)
        rig.mapper._check()
        block.remove()


def test_what_a_device_writes_is_in_the_file(rig: Rig) -> None:
    """Another mapping of it sees that, as a process would that was handed the descriptor."""
    block = rig.blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=Memfd())
    sent = pattern()
    rig.device_writes(rig.mapper.iova(block) + PAGE_SIZE, sent)
    assert block.file is not None
    assert os.pread(block.file.fd, SIZE, PAGE_SIZE) == sent


def test_a_block_is_its_part_of_a_file_and_so_is_what_the_device_reaches(rig: Rig) -> None:
    """From the offset on, byte by byte, also in what the block has grown by; nothing before it is touched."""
    with kind("file") as memory:
        assert isinstance(memory, File)
        block = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=4 * MIB, memory=memory)
        for length in (PAGE_SIZE, 3 * PAGE_SIZE, 4 * MIB, 2 * PAGE_SIZE):
            block.resize(length)
            theirs, ours = pattern(), pattern()
            os.pwrite(memory.fd, theirs, memory.offset + length - SIZE)
            assert rig.device_reads(rig.mapper.iova(block) + length - SIZE) == theirs
            rig.device_writes(rig.mapper.iova(block) + length - SIZE, ours)
            assert os.pread(memory.fd, SIZE, memory.offset + length - SIZE) == ours
        assert os.pread(memory.fd, PAGE_SIZE, 0) == bytes(PAGE_SIZE)
        block.remove()


@pytest.mark.real_kernel("a fake reaches memory by virtual address and pins no physical page")
@pytest.mark.parametrize("name", ["memfd", "file"])
def test_a_page_of_a_file_that_was_given_back_is_out_of_the_devices_reach(rig: Rig, name: str) -> None:
    """Cut off or punched out of the file, and held by a pipe: the device writes to its address in vain."""
    with kind(name) as memory:
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=16 * MIB, memory=memory)
        iova, before = rig.mapper.iova(block) + MIB, pattern()
        with block.view() as view:
            view[MIB : MIB + SIZE] = before
        witness = PageWitness(block.vaddr + MIB)
        block.resize(MIB)
        rig.device_writes(iova, pattern())
        assert witness.look()[:SIZE] == before
        block.remove()


def test_a_device_may_read_a_readonly_block_and_not_write_it(rig: Rig) -> None:
    """What it writes is stopped, judged by the data; what the process writes later is what it reads."""
    block = rig.blocks.add("rom", used_length=2 * PAGE_SIZE, max_length=MIB, readonly=True)
    iova, first = rig.mapper.iova(block), pattern()
    with block.view() as view:
        view[:SIZE] = first  # for the first time, when it is mapped already
    assert rig.device_reads(iova) == first
    rig.device_writes(iova, pattern())
    with block.view() as view:
        assert bytes(view[:SIZE]) == first
    block.resize(4 * PAGE_SIZE)
    later = pattern()
    with block.view() as view:
        view[3 * PAGE_SIZE : 3 * PAGE_SIZE + SIZE] = later
    assert rig.device_reads(iova + 3 * PAGE_SIZE) == later


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """So many free ones in the machine's pool, beside those that have failed, which stay in it."""
    former = POOL.read_text(encoding="ascii")
    taken = int(former) - _free_huge_pages()
    POOL.write_text(str(taken + count), encoding="ascii")
    assert _free_huge_pages() >= count, "this machine has no memory in one piece"
    try:
        yield
    finally:
        POOL.write_text(former, encoding="ascii")


def _free_huge_pages() -> int:
    return int((POOL.parent / "free_hugepages").read_text(encoding="ascii"))


@pytest.mark.real_kernel("the pool of huge pages belongs to the machine")
def test_huge_pages_are_grown_to_the_end_of_their_pool_and_no_further(rig: Rig, world: World, throwaway: None) -> None:
    """The device reaches all of them; beyond, fallocate says that there are none, and nothing has changed."""
    with huge_pages(4):
        block = rig.blocks.add("ring", used_length=0, max_length=GIB, memory=Memfd(hugetlb=2 * MIB))
        free = Path(POOL.parent / "free_hugepages")
        assert int(free.read_text(encoding="ascii")) == 4, "a reservation takes none of the pool"
        block.resize(8 * MIB)
        assert rig.reaches(block, 8 * MIB - SIZE)
        locked = world.locked_bytes()
        with pytest.raises(pyvfio.IoctlError, match="pool of huge pages of 2 MiB may be too small") as caught:
            block.resize(10 * MIB)
        assert caught.value.errno in (errno.ENOSPC, errno.ENOMEM)
        assert (block.used_length, world.locked_bytes()) == (8 * MIB, locked)
        block.resize(4 * MIB)
        assert int(free.read_text(encoding="ascii")) == 2
        assert rig.reaches(block, 4 * MIB - SIZE)
        block.remove()


@pytest.mark.real_kernel("the pool of huge pages belongs to the machine")
def test_the_page_size_of_a_callers_file_is_found_out(rig: Rig, throwaway: None) -> None:
    """One on hugetlbfs has huge pages, of which lengths are multiples then."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC | os.MFD_HUGETLB)
    os.ftruncate(fd, 8 * MIB)
    with huge_pages(4):
        block = rig.blocks.add("ring", used_length=2 * MIB, max_length=8 * MIB, memory=File(fd))
        assert block.page_size == 2 * MIB
        with pytest.raises(ValueError, match="multiple of 2097152"):
            block.resize(3 * MIB)
        block.resize(4 * MIB)
        assert rig.reaches(block, 4 * MIB - SIZE)
        block.remove()
    os.close(fd)


@pytest.mark.real_kernel("the charges under strict overcommit are those of the machine")
def test_a_memfd_that_would_grow_beyond_the_commit_limit_is_refused(rig: Rig, world: World, throwaway: None) -> None:
    """By fallocate, before anybody touches what is not there; nothing has changed."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=64 * GIB, memory=Memfd())
    assert block.file is not None
    with strict_overcommit():
        before = (os.fstat(block.file.fd).st_size, world.locked_bytes(), rig.space.mappings)
        with pytest.raises(pyvfio.IoctlError, match="more memory could not be allocated"):
            block.resize(32 * GIB)
        assert (os.fstat(block.file.fd).st_size, world.locked_bytes(), rig.space.mappings) == before
    assert rig.reaches(block, 2 * MIB - SIZE)


@pytest.mark.real_kernel("the charges under strict overcommit are those of the machine")
def test_memory_is_not_left_unreserved_where_the_machine_reserves_all(throwaway: None) -> None:
    """It would be charged nevertheless: refused, with the reason."""
    refused = pytest.raises(ValueError, match=r"vm\.overcommit_memory is 2")
    with strict_overcommit(), pyvfio.RamBlockList() as blocks, refused:
        blocks.add("ring", used_length=0, max_length=MIB, memory=Anonymous(noreserve=True))


@pytest.mark.long
@pytest.mark.parametrize("memory", [Anonymous(), Memfd()], ids=["anonymous", "memfd"])
def test_a_block_that_is_whole_for_want_of_mappings_is_reached_as_far_as_it_is_used(
    rig: Rig, memory: MemoryKind
) -> None:
    """The process may have no more of them (vm.max_map_count), and a part of a block would be one."""
    with pyvfio.RamBlockList() as blocks:
        with mappings_left(2):  # a fake kernel has no memory then to read the list of all mappings
            block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=4 * MIB, memory=memory)
        assert block.whole
        blocks.kernel = rig.space.kernel
        with pyvfio.DmaMapper(rig.space, blocks) as mapper:
            iova = mapper.iova(block)
            for length in (20, 2):
                block.resize(length * PAGE_SIZE)
                sent = pattern()
                rig.device_writes(iova + length * PAGE_SIZE - SIZE, sent)
                with block.view() as view:
                    assert bytes(view[-SIZE:]) == sent
                assert rig.device_reads(iova + length * PAGE_SIZE) is None
            blocks._check()
            mapper._check()
