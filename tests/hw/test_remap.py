"""Memory that has failed: the device keeps the failed page until it is moved to a fresh one."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

import pyvfio
from pyvfio import Anonymous, File, Memfd, MemorySettings
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.memory import MemoryKind
from pyvfio.units import MIB, PAGE_SIZE
from tests.hw.rig import SIZE, Rig, pattern
from tests.hw.test_kinds import huge_pages
from tests.unit.processes import areas

pytestmark = pytest.mark.one_iommu

MADV_HWPOISON = 100
EHWPOISON = 133  # Python 3.11 has no name for it
POLICIES: dict[str, Callable[..., Rig]] = {
    "remap": Rig,
    "extend": partial(Rig, resize="extend"),
    "granule": partial(Rig, resize="extend", granule=2 * MIB),
}
KINDS = ["anonymous", "transparent huge page", "memfd", "huge pages", "punched file", "private file"]
LENGTH = 6 * MIB
OFFSET = 2 * MIB + 5 * PAGE_SIZE  # in the second of three huge pages
FILLING = 0x33


@pytest.fixture(params=POLICIES)
def rig(request: pytest.FixtureRequest, engine_bdfs: tuple[str, ...], kernel: Kernel) -> Iterator[Rig]:
    """A mapper under each policy."""
    with POLICIES[request.param](engine_bdfs[0], kernel=kernel) as made:
        yield made


@contextmanager
def block_of(rig: Rig, name: str) -> Iterator[pyvfio.RamBlock]:
    """LENGTH bytes of that kind of memory, written all over; files hold what is written there."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    os.ftruncate(fd, 16 * MIB)
    os.pwrite(fd, bytes([FILLING]) * LENGTH, 0)
    kinds: dict[str, MemoryKind] = {
        "anonymous": Anonymous(),
        "transparent huge page": Anonymous(),
        "memfd": Memfd(),
        "punched file": File(fd, punch=True),
        "kept file": File(fd),
        "private file": File(fd, shared=False),
    }
    memory = kinds.get(name) or Memfd(hugetlb=2 * MIB)
    settings = MemorySettings(hugepage=name == "transparent huge page")
    block = rig.blocks.add("ring", used_length=0, max_length=16 * MIB, memory=memory, settings=settings)
    if name == "anonymous":  # small pages, also where the machine gives huge ones unasked
        rig.blocks.kernel.madvise(block.vaddr, 16 * MIB, mmap.MADV_NOHUGEPAGE)
    block.resize(LENGTH)
    ctypes.memset(block.vaddr, FILLING, LENGTH)
    yield block
    block.remove()
    os.close(fd)


def readable(vaddr: int) -> bool:
    """Whether the process may touch a page; a touch that fails would be SIGBUS."""
    reader, writer = os.pipe()
    libc = ctypes.CDLL(None)
    written: int = libc.write(writer, ctypes.c_void_p(vaddr), ctypes.c_size_t(8))
    os.close(reader)
    os.close(writer)
    return written == 8


def fail_page(vaddr: int) -> None:
    """Let the kernel handle a failure of the page there, as the machine would report it.

    EBUSY and EHWPOISON: of memory that a device has pinned the kernel can leave some where it is.
    """
    former = signal.signal(signal.SIGBUS, lambda *_: None)
    try:
        LinuxKernel().madvise(vaddr, PAGE_SIZE, MADV_HWPOISON)
    except OSError as error:
        if error.errno not in (errno.EBUSY, EHWPOISON):
            raise
    finally:
        signal.signal(signal.SIGBUS, former)


def put(block: pyvfio.RamBlock, offset: int) -> bytes:
    """What no other call has written."""
    data = pattern()
    with block.view() as view:
        view[offset : offset + SIZE] = data
    return data


def contents(block: pyvfio.RamBlock, offset: int) -> bytes:
    """SIZE bytes."""
    with block.view() as view:
        return bytes(view[offset : offset + SIZE])


def check_moved(rig: Rig, block: pyvfio.RamBlock, kept: dict[int, bytes], name: str) -> None:
    """Fresh at OFFSET, for both; the same IOVA; what lies around is what it was."""
    fresh = bytes([FILLING if name == "private file" else 0]) * SIZE
    iova = rig.mapper.iova(block)
    assert contents(block, OFFSET) == fresh
    assert rig.reaches(block, OFFSET)
    assert {offset: contents(block, offset) for offset in kept} == kept
    assert rig.device_reads(iova + max(kept)) == kept[max(kept)]
    rig.mapper._check()
    rig.blocks._check()


@pytest.mark.real_kernel("no memory fails on a fake")
@pytest.mark.parametrize("name", KINDS)
def test_a_device_is_moved_off_a_page_that_has_failed(rig: Rig, throwaway: None, name: str) -> None:
    """Until then it goes on reading the old one; the process and all other pages are as they were."""
    with huge_pages(8 if name == "huge pages" else 0), block_of(rig, name) as block:
        page = block.page_size
        around = (0, OFFSET // page * page - SIZE, OFFSET // page * page + page)
        kept = {offset: put(block, offset) for offset in around}
        old = put(block, OFFSET)
        fail_page(block.vaddr + OFFSET)
        assert rig.device_reads(rig.mapper.iova(block) + OFFSET) == old, "what is mapped stays where it is"
        block.remap(OFFSET // page * page, page)
        check_moved(rig, block, kept, name)
        block.resize(8 * MIB)
        block.resize(4 * MIB)
        rig.mapper._check()


@pytest.mark.parametrize("name", ["anonymous", "memfd"])
def test_pages_are_replaced_that_have_not_failed(rig: Rig, name: str) -> None:
    """The device is moved as well: what the process writes into the fresh page, it reads."""
    with block_of(rig, name) as block:
        kept = {offset: put(block, offset) for offset in (0, OFFSET - SIZE, OFFSET + PAGE_SIZE)}
        put(block, OFFSET)
        block.remap(OFFSET, PAGE_SIZE)
        check_moved(rig, block, kept, name)


@pytest.mark.real_kernel("no memory fails on a fake")
def test_a_page_of_a_file_that_is_not_to_be_punched_stays_failed_and_the_error_says_why(
    rig: Rig, throwaway: None
) -> None:
    """Nobody else can put another one there; the device goes without it, or with the old one, and that is said, too."""
    with block_of(rig, "kept file") as block:
        put(block, OFFSET)
        fail_page(block.vaddr + OFFSET)
        assert not readable(block.vaddr + OFFSET)
        with pytest.raises(pyvfio.RollbackError) as caught:
            block.remap(OFFSET, PAGE_SIZE)
        assert "must not be punched; allow that with memory=File(fd, punch=True)" in str(caught.value)
        block.resize(2 * MIB)  # what is left of it is well
        rig.mapper._check()


@pytest.mark.real_kernel("no memory fails on a fake")
@pytest.mark.parametrize("name", ["anonymous", "memfd"])
def test_settings_of_a_block_hold_for_a_page_that_was_replaced(rig: Rig, throwaway: None, name: str) -> None:
    """And it is one area with its neighbours, as before."""
    with block_of(rig, name) as block:
        before = flags_of(block.vaddr, LENGTH)
        fail_page(block.vaddr + OFFSET)
        block.remap(OFFSET, PAGE_SIZE)
        ctypes.memset(block.vaddr, 1, LENGTH)
        assert flags_of(block.vaddr, LENGTH) == before
        assert len(before) == 1


def flags_of(vaddr: int, size: int) -> list[tuple[int, int, frozenset[str]]]:
    """Start, end and VmFlags of each area, in the words of /proc/self/smaps."""
    return [(area.start, area.end, area.flags) for area in areas(vaddr, size)]


@pytest.mark.parametrize("prealloc", [0, 1])
def test_a_device_that_only_reads_reads_what_is_written_to_pages_that_were_replaced(rig: Rig, prealloc: int) -> None:
    """Pages that nobody had touched would be mapped for reading as the page of zeros, and stay that for the device."""
    block = rig.blocks.add("rom", used_length=LENGTH, max_length=16 * MIB, readonly=True, prealloc=prealloc)
    block.remap(2 * MIB, 2 * MIB)
    for offset in (0, OFFSET, 4 * MIB):
        there = put(block, offset)
        assert rig.device_reads(rig.mapper.iova(block) + offset) == there
    block.remove()
