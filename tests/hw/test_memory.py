"""What a block's memory is while a device has it mapped: what /proc says of it, and what children that touch it do."""

from __future__ import annotations

import ctypes
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvfio
from pyvfio import MemorySettings
from pyvfio.kernel import Kernel
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig
from tests.unit.processes import areas, in_child

pytestmark = pytest.mark.one_iommu

INHERITED = MemorySettings(dontfork=False)


def _address_space() -> int:
    """How much this process has, of whatever kind, in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * PAGE_SIZE


def _resident(block: pyvfio.RamBlock) -> int:
    return sum(area.rss for area in areas(block.vaddr, block.max_length))


def _touched_in_child(vaddr: int) -> int:
    """How a child that reads a byte ends, which one that writes it agrees with."""
    (end,) = {in_child(lambda: ctypes.string_at(vaddr, 1)), in_child(lambda: ctypes.memset(vaddr, 1, 1))}
    return end


def test_a_block_is_memory_and_behind_it_address_space_that_nobody_can_touch(rig: Rig) -> None:
    """Two areas through every resize, from a multiple of 2 MiB to a page behind the longest that it can be."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=64 * MIB)
    vaddr = block.vaddr
    assert vaddr % (2 * MIB) == 0
    for length in (2 * MIB, 8 * MIB, PAGE_SIZE, 3 * MIB):
        block.resize(length)
        used, rest = areas(vaddr, block.max_length + PAGE_SIZE)
        assert (used.start, used.end, used.permissions) == (vaddr, vaddr + length, "rw-p")
        assert (rest.start, rest.permissions) == (vaddr + length, "---p")
        assert rest.end >= vaddr + block.max_length + PAGE_SIZE
        assert ("ac" in used.flags, "ac" in rest.flags) == (True, False), "what is charged, and what is not"
    assert block.vaddr == vaddr


def test_blocks_are_aligned_and_take_no_more_address_space_than_their_longest_and_a_page(kernel: Kernel) -> None:
    """What was taken to find a multiple of 2 MiB is not kept, of sixty-four blocks."""
    size = 6 * MIB + PAGE_SIZE
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        before = _address_space()
        for number in range(64):
            assert blocks.add(f"b{number}", used_length=PAGE_SIZE, max_length=size).vaddr % (2 * MIB) == 0
        taken = _address_space() - before
    # Python takes some for itself meanwhile; untrimmed, each block had 2 MiB more.
    assert 0 <= taken - 64 * (size + PAGE_SIZE) < 16 * MIB


def test_who_touches_what_is_not_in_use_is_ended_by_a_signal(rig: Rig) -> None:
    """Reading or writing: behind the end, in the last page, in the guard page; and what was given back."""
    block = rig.blocks.add("ring", used_length=4 * MIB, max_length=8 * MIB, settings=INHERITED)
    end = block.vaddr + block.max_length
    assert _touched_in_child(block.vaddr + 4 * MIB - 1) == 0
    for vaddr in (block.vaddr + 4 * MIB, end - 1, end):
        assert _touched_in_child(vaddr) == -signal.SIGSEGV, hex(vaddr)
    block.resize(2 * MIB)
    assert _touched_in_child(block.vaddr + 2 * MIB) == -signal.SIGSEGV
    block.resize(8 * MIB)
    assert _touched_in_child(end - 1) == 0
    assert _touched_in_child(end) == -signal.SIGSEGV


def test_what_is_below_a_length_stays_and_what_comes_reads_zeros(rig: Rig) -> None:
    """Every byte of it, through growing, shrinking and growing back."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=16 * MIB)
    ctypes.memset(block.vaddr, 0x5A, 2 * MIB)
    for low, high in ((2 * MIB, 4 * MIB), (MIB, 8 * MIB), (PAGE_SIZE, 2 * MIB)):
        if low < block.used_length:
            block.resize(low)
        block.resize(high)
        with block.view() as view:
            assert view[:low] == b"\x5a" * low
            assert view[low:] == bytes(high - low)
        ctypes.memset(block.vaddr + low, 0x5A, high - low)


def test_a_shrink_gives_its_pages_back(rig: Rig) -> None:
    """All of them, at once, though a device had them pinned."""
    block = rig.blocks.add("ring", used_length=0, max_length=GIB)
    for length in (16 * MIB, 2 * MIB, 3 * MIB, PAGE_SIZE, 0):
        block.resize(length)
        if length:
            ctypes.memset(block.vaddr, 1, length)
        assert _resident(block) == length


@contextmanager
def _no_more_areas() -> Iterator[None]:
    """The kernel makes no new mapping for any process, for each has as many as it may."""
    with Path("/proc/sys/vm/max_map_count").open("r+b", buffering=0) as limit:
        former = limit.read()
        os.pwrite(limit.fileno(), b"1", 0)
        try:
            yield
        finally:
            os.pwrite(limit.fileno(), former, 0)


@pytest.mark.real_kernel("the machine limits the number of memory areas of a process")
def test_a_shrink_whose_memory_the_kernel_does_not_take_back_is_a_warning(rig: Rig, throwaway: None) -> None:
    """The block has its new length, the device reaches that, and what stayed reads zeros when it is used again."""
    block = rig.blocks.add("ring", used_length=4 * MIB, max_length=8 * MIB)
    ctypes.memset(block.vaddr, 0x5A, 4 * MIB)
    iova = rig.mapper.iova(block)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _no_more_areas():
            block.resize(2 * MIB)
    assert [warning.category for warning in caught] == [pyvfio.MemoryNotReturnedWarning]
    assert "shrank to 2 MiB, but 2 MiB could not be released" in str(caught[0].message)
    assert block.used_length == 2 * MIB
    assert rig.reaches(block, 2 * MIB - SIZE)
    assert rig.device_reads(iova + 2 * MIB) is None
    block.resize(4 * MIB)
    with block.view() as view:
        assert view[2 * MIB :] == bytes(2 * MIB)
    assert rig.reaches(block, 4 * MIB - SIZE)


@pytest.mark.parametrize("memory", [pyvfio.Anonymous(), pyvfio.Memfd()], ids=["anonymous", "memfd"])
def test_preallocated_memory_has_its_pages_before_anybody_touches_it(
    kernel: Kernel, memory: pyvfio.Anonymous | pyvfio.Memfd
) -> None:
    """When a block is made and when it grows, by two threads; without being asked for there are none."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=2 * MIB, max_length=64 * MIB, memory=memory, prealloc=2)
        assert _resident(block) == 2 * MIB
        block.resize(32 * MIB)
        assert _resident(block) == 32 * MIB
        plain = blocks.add("plain", used_length=2 * MIB, max_length=64 * MIB, memory=memory)
        assert _resident(plain) == 0
