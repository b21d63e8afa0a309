"""What memory of each kind does when a block is made of it, grows, shrinks, is discarded and goes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import pyvfio
from pyvfio import Anonymous, File, Memfd, RamBlock, RamBlockList
from pyvfio.kernel import (
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_WRITE,
    HUGETLBFS_MAGIC,
    MADV_POPULATE_READ,
    MAP_SHARED,
    MAP_SHARED_VALIDATE,
    MAP_SYNC,
    TMPFS_MAGIC,
    FileStatus,
)
from pyvfio.memory import MemoryKind, Received, Reservation
from pyvfio.testing.fake import DmaFault, FakeDevice
from pyvfio.units import MIB, PAGE_SIZE, Vaddr
from tests.unit.fakes import BDF, Rig, SpecialKernel
from tests.unit.processes import open_fds

DATA = bytes(range(1, 256))
F_ADD_SEALS = 1033  # linux/fcntl.h


@pytest.fixture
def blocks(kernel: SpecialKernel) -> Iterator[RamBlockList]:
    """A list of blocks on it."""
    with RamBlockList(kernel=kernel) as made:
        yield made


@pytest.fixture
def fd() -> Iterator[int]:
    """An empty file of the caller's, in memory."""
    made = os.memfd_create("caller's", os.MFD_CLOEXEC)
    yield made
    os.close(made)


@contextmanager
def kinds(name: str) -> Iterator[MemoryKind]:
    """A kind by a name; a file has the page before the block's first byte, too, and is as long as it must be."""
    without_file: dict[str, MemoryKind] = {
        "anonymous": Anonymous(),
        "noreserve": Anonymous(noreserve=True),
        "memfd": Memfd(),
    }
    if name in without_file:
        yield without_file[name]
        return
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, MIB + PAGE_SIZE)
        yield File(fd, PAGE_SIZE, shared=name != "file private", punch=name == "file punched")
    finally:
        os.close(fd)


NAMES = ("anonymous", "noreserve", "memfd", "file shared", "file private", "file punched")


def contents(block: RamBlock) -> bytes:
    """All of it."""
    with block.view() as view:
        return bytes(view)


def write(block: RamBlock, offset: int = 0) -> None:
    """DATA, at an offset."""
    with block.view() as view:
        view[offset : offset + len(DATA)] = DATA


# ---------------------------------------------------------------------------------------------------------- all kinds


@pytest.mark.parametrize("name", NAMES)
def test_what_is_below_stays_and_the_device_follows(kernel: SpecialKernel, name: str) -> None:
    """Through growing, shrinking to nothing and back; whatever kind of memory it is."""
    with kinds(name) as kind, Rig(kernel) as rig:
        block = rig.blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=kind)
        write(block)
        for length in (8, 1, 8, 3):
            block.resize(length * PAGE_SIZE)
            assert contents(block)[: len(DATA)] == DATA
            assert rig.reached() == rig.expected()
            rig.check()
        block.resize(0)
        block.resize(MIB)
        rig.check()
        assert rig.reached() == rig.expected()
    kernel.check()


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_comes_back_reads_zero_or_what_the_file_holds(blocks: RamBlockList, name: str) -> None:
    """A file that is not punched keeps what it had; private pages of it, and all other memory, are gone."""
    with kinds(name) as kind:
        block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=kind)
        write(block, PAGE_SIZE)
        block.resize(PAGE_SIZE)
        block.resize(2 * PAGE_SIZE)
        expected = DATA if name == "file shared" else bytes(len(DATA))
        assert contents(block)[PAGE_SIZE : PAGE_SIZE + len(DATA)] == expected
        blocks.close()


@pytest.mark.parametrize("name", NAMES)
def test_address_space_and_descriptors_are_as_before_when_it_goes(blocks: RamBlockList, name: str) -> None:
    """Nothing of it stays mapped, and a caller's descriptor stays open."""
    with kinds(name) as kind:
        before = set(os.listdir("/proc/self/fd"))
        block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=kind)
        start, end = block.vaddr, block.vaddr + MIB
        block.remove()
        assert set(os.listdir("/proc/self/fd")) == before
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        assert not any(start <= int(line.split("-")[0], 16) < end for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_cannot_be_made_leaves_nothing_behind(
    kernel: SpecialKernel, blocks: RamBlockList, name: str
) -> None:
    """Whichever of the calls fails that make it."""
    with kinds(name) as kind:
        kernel.clear_trace()
        block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=kind)
        made = [call.call for call in kernel.trace]
        block.remove()
        assert {"mmap", "mprotect", "madvise", "munmap"} <= set(made)
        assert ("memfd_create" in made, "file_status" in made) == (name == "memfd", name.startswith("file"))
        for position, call in enumerate(made):
            fds, maps = set(os.listdir("/proc/self/fd")), areas()
            kernel.fail(call=call, errno=errno.EIO, nth=made[: position + 1].count(call))
            with pytest.raises(pyvfio.IoctlError) as caught:
                blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=kind)
            assert (caught.value.errno, kernel.planned_failures) == (errno.EIO, ())
            assert (set(os.listdir("/proc/self/fd")), len(blocks)) == (fds, 0)
            if call != "munmap":  # address space that could not be given back is lost
                assert areas() == maps


CHANGES: dict[str, Callable[[RamBlock], object]] = {
    "grow": lambda block: block.resize(16 * PAGE_SIZE),
    "shrink": lambda block: block.resize(PAGE_SIZE),
    "discard": lambda block: block.discard(0, PAGE_SIZE),
    "populate": lambda block: block.populate(2 * PAGE_SIZE, PAGE_SIZE),
    "remap": lambda block: block.remap(0, PAGE_SIZE),
    "remove": lambda block: block.remove(),
}


@pytest.mark.filterwarnings("ignore::pyvfio.MemoryNotReturnedWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_fails_is_never_a_bare_error(
    kernel: SpecialKernel, blocks: RamBlockList, name: str, change: str
) -> None:
    """IoctlError has the call and its arguments, whichever call of the block's life it was."""

    def live() -> None:
        block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=kind, prealloc=1)
        with suppress(pyvfio.DiscardError):  # of a file that is not to be punched
            block.discard(2 * PAGE_SIZE, PAGE_SIZE)
            CHANGES[change](block)

    with kinds(name) as kind:
        kernel.clear_trace()
        live()
        for call, count in Counter(call.call for call in kernel.trace).items():
            for nth in range(1, count + 1):
                for block in tuple(blocks):
                    block.remove()
                kernel.fail(call=call, errno=errno.EIO, nth=nth)
                try:
                    live()
                except OSError as error:
                    assert isinstance(error, pyvfio.IoctlError), (call, nth)  # noqa: PT017 (all others are fine)
                kernel.clear_failures()
        blocks.close()


def areas() -> int:
    """How much address space there is that nobody can touch, which is what a reservation leaves if it leaves any."""
    spans = [line.split()[:2] for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()]
    sizes = [int(span.split("-")[1], 16) - int(span.split("-")[0], 16) for span, rights in spans if rights[:3] == "---"]
    return sum(size for size in sizes if MIB <= size <= 4 * MIB)


@pytest.mark.parametrize("call", ["munmap", "close"])
def test_a_memfd_is_closed_with_its_block_though_a_call_of_its_end_fails(
    kernel: SpecialKernel, blocks: RamBlockList, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    """close(2) has closed the descriptor when it reports an error, so that nothing is said to have stayed. Address
    space that stays is said to, and does not keep the file."""
    before = set(os.listdir("/proc/self/fd"))
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=Memfd())
    vaddr = block.vaddr
    kernel.fail(call=call, errno=errno.EINTR, after=call == "close")
    block.remove()
    assert not kernel.planned_failures
    assert (set(os.listdir("/proc/self/fd")), len(blocks)) == (before, 0)
    assert ("could not be unmapped" in caplog.text) == (call == "munmap")
    if call == "munmap":
        kernel.munmap(vaddr, MIB + PAGE_SIZE)


# -------------------------------------------------------------------------------------------------------------- memfd


def test_the_length_of_a_memfd_follows_that_of_the_block(blocks: RamBlockList) -> None:
    """It is as long as what is used, and has pages for all of that before anybody touches it."""
    block = blocks.add("ring", used_length=0, max_length=MIB, memory=Memfd())
    assert block.file is not None
    fd = block.file.fd
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:ring")
    for length in (4, 16, 2, 0, 3):
        block.resize(length * PAGE_SIZE)
        status = os.fstat(fd)
        assert (status.st_size, status.st_blocks * 512) == (length * PAGE_SIZE, length * PAGE_SIZE)
        assert block.file == (fd, 0, block.vaddr, length * PAGE_SIZE)


def test_others_see_a_memfds_memory(blocks: RamBlockList) -> None:
    """Whoever maps the descriptor."""
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=Memfd())
    assert block.file is not None
    with mmap.mmap(block.file.fd, PAGE_SIZE) as theirs:
        theirs[: len(DATA)] = DATA
        assert contents(block)[: len(DATA)] == DATA


def test_growing_a_memfd_without_memory_changes_nothing(kernel: SpecialKernel, blocks: RamBlockList) -> None:
    """fallocate says so, before anybody could be killed for touching it."""
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=Memfd())
    assert block.file is not None
    kernel.fail(call="fallocate", errno=errno.ENOSPC)
    with pytest.raises(pyvfio.IoctlError, match="more memory could not be allocated"):
        block.resize(4 * PAGE_SIZE)
    assert (block.used_length, os.fstat(block.file.fd).st_size) == (PAGE_SIZE, PAGE_SIZE)
    block._check()
    block.resize(4 * PAGE_SIZE)


def test_pages_of_a_growth_that_is_refused_go_back(kernel: SpecialKernel, blocks: RamBlockList) -> None:
    """mprotect fails when there were pages already."""
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=Memfd())
    assert block.file is not None
    kernel.fail(call="mprotect", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.IoctlError):
        block.resize(4 * PAGE_SIZE)
    assert os.fstat(block.file.fd).st_size == PAGE_SIZE
    block._check()


def test_a_memfd_that_cannot_be_cut_is_a_warning_and_reads_zero_later(
    kernel: SpecialKernel, blocks: RamBlockList
) -> None:
    """As with any memory that could not be given back."""
    block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=Memfd())
    write(block, PAGE_SIZE)
    kernel.fail(call="ftruncate", errno=errno.EIO)
    with pytest.warns(pyvfio.MemoryNotReturnedWarning):
        block.resize(PAGE_SIZE)
    block._check()
    block.resize(2 * PAGE_SIZE)
    assert not any(contents(block)[PAGE_SIZE:])
    block._check()


def test_discarded_parts_of_a_memfd_are_holes_until_they_are_populated(blocks: RamBlockList) -> None:
    """The pages go and come; nobody finds out by touching that there are none."""
    block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=Memfd())
    assert block.file is not None
    write(block, PAGE_SIZE)
    block.discard(PAGE_SIZE, 2 * PAGE_SIZE)
    assert os.fstat(block.file.fd).st_blocks * 512 == 2 * PAGE_SIZE
    block.populate(PAGE_SIZE, 2 * PAGE_SIZE)
    assert os.fstat(block.file.fd).st_blocks * 512 == 4 * PAGE_SIZE
    assert not any(contents(block))


def test_a_discard_that_cannot_be_populated_again_stays_one(kernel: SpecialKernel, blocks: RamBlockList) -> None:
    """No memory for it: the block is as it was before the attempt."""
    block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=Memfd())
    block.discard(0, PAGE_SIZE)
    kernel.fail(call="fallocate", errno=errno.ENOSPC)
    with pytest.raises(pyvfio.IoctlError):
        block.populate(0, PAGE_SIZE)
    assert list(block.discarded) == [(0, PAGE_SIZE)]
    block.populate(0, PAGE_SIZE)
    assert list(block.discarded) == []


@pytest.mark.parametrize("size", [0, 1000, PAGE_SIZE, 3 * MIB])
def test_huge_pages_have_a_size_that_pages_can_have(blocks: RamBlockList, size: int) -> None:
    """Anything else is refused before the kernel is asked."""
    with pytest.raises(ValueError, match="huge pages"):
        blocks.add("ring", used_length=0, max_length=4 * MIB, memory=Memfd(hugetlb=size))


def test_huge_pages_that_the_kernel_does_not_have_are_said_to_be_missing(blocks: RamBlockList) -> None:
    """128 MiB is none that x86 has."""
    with pytest.raises(pyvfio.IoctlError, match=r"memfd_create.*no huge pages of 128 MiB"):
        blocks.add("ring", used_length=0, max_length=128 * MIB, memory=Memfd(hugetlb=128 * MIB))


def test_lengths_are_multiples_of_huge_pages(blocks: RamBlockList) -> None:
    """All of them: where a block is made, when it is resized, and where it is discarded."""
    huge = Memfd(hugetlb=2 * MIB)
    for used, maximum in ((0, 3 * MIB), (MIB, 4 * MIB)):
        with pytest.raises(ValueError, match="multiple of"):
            blocks.add("ring", used_length=used, max_length=maximum, memory=huge)
    block = blocks.add("ring", used_length=0, max_length=4 * MIB, memory=huge)
    assert (block.page_size, block.vaddr % (2 * MIB)) == (2 * MIB, 0)
    with pytest.raises(ValueError, match="multiple of 2097152"):
        block.resize(MIB)
    with pytest.raises(ValueError, match="multiple of 2097152"):
        block.discard(0, PAGE_SIZE)


def test_a_huge_page_pool_that_is_too_small_is_an_error_and_nothing_else(
    kernel: SpecialKernel, blocks: RamBlockList
) -> None:
    """The errno that fallocate has for it, and a hint that names the pool; no process is killed."""
    block = blocks.add("ring", used_length=0, max_length=4 * MIB, memory=Memfd(hugetlb=2 * MIB))
    kernel.fail(call="fallocate", errno=errno.ENOSPC)
    with pytest.raises(pyvfio.IoctlError, match="pool of huge pages of 2 MiB may be too small"):
        block.resize(2 * MIB)
    block._check()


# --------------------------------------------------------------------------------------------------------------- files


def test_a_callers_file_is_never_changed_in_length_unless_asked(blocks: RamBlockList, fd: int) -> None:
    """Nor punched: it is the same file when the block is gone."""
    os.ftruncate(fd, MIB)
    os.pwrite(fd, DATA, 3 * PAGE_SIZE)
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd))
    for length in (8, 1, 0):
        block.resize(length * PAGE_SIZE)
        assert (os.fstat(fd).st_size, os.pread(fd, len(DATA), 3 * PAGE_SIZE)) == (MIB, DATA)


def test_a_file_that_may_grow_does_when_the_block_does(blocks: RamBlockList, fd: int) -> None:
    """By as much as is needed; it stays as long as it was when the block shrinks."""
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd, PAGE_SIZE, grow=True))
    lengths = []
    for length in (4, 1):
        block.resize(length * PAGE_SIZE)
        lengths.append(os.fstat(fd).st_size)
    assert lengths == [5 * PAGE_SIZE, 5 * PAGE_SIZE]


def test_a_file_that_may_be_punched_gives_its_pages_back(blocks: RamBlockList, fd: int) -> None:
    """Its length stays."""
    os.ftruncate(fd, MIB)
    block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=File(fd, punch=True))
    with block.view() as view:
        view[:] = b"x" * len(view)
    block.resize(PAGE_SIZE)
    status = os.fstat(fd)
    assert (status.st_size, status.st_blocks * 512) == (MIB, PAGE_SIZE)


@pytest.mark.parametrize("way", ["drop", "deactivate", "replace"])
def test_exactly_the_pages_that_are_released_are_punched_out_of_a_file(
    kernel: SpecialKernel, fd: int, way: str
) -> None:
    """Not those beside them, and nothing of the file before the block or behind it."""
    os.pwrite(fd, b"\x5a" * 64 * PAGE_SIZE, 0)
    memory = Reservation(kernel, max_length=8 * PAGE_SIZE, kind=File(fd, 4 * PAGE_SIZE, punch=True))
    memory.activate(8 * PAGE_SIZE)
    start, end = (5, 8) if way == "deactivate" else (2, 4)
    if way == "deactivate":
        memory.deactivate(start * PAGE_SIZE)
    elif way == "drop":
        memory.drop(start * PAGE_SIZE, end * PAGE_SIZE)
    else:
        memory.replace(start * PAGE_SIZE, end * PAGE_SIZE, provide=False)
    assert os.fstat(fd).st_blocks * 512 == (64 - end + start) * PAGE_SIZE
    hole = bytes((end - start) * PAGE_SIZE)
    assert os.pread(fd, 65 * PAGE_SIZE, 0) == (
        b"\x5a" * (4 + start) * PAGE_SIZE + hole + b"\x5a" * (64 - 4 - end) * PAGE_SIZE
    )
    memory.release()


def test_what_a_grow_adds_to_a_retained_tail_shows_the_file(kernel: SpecialKernel, fd: int) -> None:
    """Only the tail, which the block had before, reads zeros."""
    os.pwrite(fd, b"\x5a" * 8 * PAGE_SIZE, 0)
    memory = Reservation(kernel, max_length=8 * PAGE_SIZE, kind=File(fd, punch=True))
    memory.activate(2 * PAGE_SIZE)
    memory.retain(PAGE_SIZE)
    memory.let_go()
    memory.activate(8 * PAGE_SIZE)
    assert os.pread(fd, 8 * PAGE_SIZE, 0) == b"\x5a" * PAGE_SIZE + bytes(PAGE_SIZE) + b"\x5a" * 6 * PAGE_SIZE
    memory.release()


def test_private_pages_of_a_file_are_not_the_files(blocks: RamBlockList, fd: int) -> None:
    """What is written stays with the process."""
    os.ftruncate(fd, MIB)
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd, shared=False))
    write(block)
    assert os.pread(fd, len(DATA), 0) == bytes(len(DATA))


def test_a_file_that_is_too_short_is_refused_when_the_block_is_made(blocks: RamBlockList, fd: int) -> None:
    """Not when it is grown."""
    os.ftruncate(fd, MIB)
    with pytest.raises(ValueError, match=r"ends 1020 KiB behind offset 0x1000.*set grow=True"):
        blocks.add("ring", used_length=0, max_length=MIB, memory=File(fd, PAGE_SIZE))


@pytest.mark.parametrize("shared", [True, False])
def test_a_descriptor_that_the_caller_closes_is_never_another_file(blocks: RamBlockList, *, shared: bool) -> None:
    """Whatever is done with the block; its own file is used throughout."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * PAGE_SIZE)
    kind = File(fd, grow=True, shared=shared, punch=shared)
    block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=kind)
    os.close(fd)
    stranger = os.memfd_create("stranger", os.MFD_CLOEXEC)
    os.ftruncate(stranger, 4 * PAGE_SIZE)
    os.pwrite(stranger, DATA, 0)
    assert stranger == fd
    write(block)
    if shared:
        block.discard(PAGE_SIZE, 2 * PAGE_SIZE)
        block.populate(PAGE_SIZE, 2 * PAGE_SIZE)
    block.resize(16 * PAGE_SIZE)
    block.remap(8 * PAGE_SIZE, PAGE_SIZE)
    block.resize(PAGE_SIZE)
    assert contents(block)[: len(DATA)] == DATA
    block.remove()
    status = os.fstat(stranger)
    assert (status.st_size, status.st_blocks * 512, os.pread(stranger, len(DATA), 0)) == (
        4 * PAGE_SIZE,
        PAGE_SIZE,
        DATA,
    )
    os.close(stranger)


def test_numbers_of_numpy_are_numbers(blocks: RamBlockList, fd: int) -> None:
    """They are plain ints in what was made of them."""
    np = pytest.importorskip("numpy")
    os.ftruncate(fd, 4 * PAGE_SIZE)
    kind = File(np.int64(fd), np.uint64(PAGE_SIZE))
    assert (type(kind.fd), type(kind.offset), type(Memfd(np.int64(2 * MIB)).hugetlb)) == (int, int, int)
    page = np.uint64(PAGE_SIZE)
    block = blocks.add("ring", used_length=page, max_length=np.uint64(2 * PAGE_SIZE), memory=kind, prealloc=np.uint8(1))
    block.resize(np.uint64(2 * PAGE_SIZE))
    assert [type(length) for length in (block.used_length, block.max_length, block.prealloc)] == [int] * 3
    memory = blocks.add("memory", used_length=page, max_length=np.uint64(2 * PAGE_SIZE))
    memory.discard(np.uint64(0), page)
    assert [type(number) for number in memory.discarded[0]] == [int, int]
    blocks.close()


def test_a_file_that_has_become_too_short_is_refused_when_the_block_grows(blocks: RamBlockList, fd: int) -> None:
    """Somebody else has cut it; touching it would kill."""
    os.ftruncate(fd, MIB)
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd))
    os.ftruncate(fd, 2 * PAGE_SIZE)
    with pytest.raises(pyvfio.IoctlError, match="the file has become too short"):
        block.resize(4 * PAGE_SIZE)
    assert block.used_length == PAGE_SIZE
    block.resize(2 * PAGE_SIZE)


def test_a_file_that_is_not_to_be_punched_cannot_be_discarded_in_part(blocks: RamBlockList, fd: int) -> None:
    """It would not read zeros."""
    os.ftruncate(fd, MIB)
    block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=File(fd))
    with pytest.raises(pyvfio.DiscardError, match="must not be punched"):
        block.discard(0, PAGE_SIZE)
    assert block.discarded == ()


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"offset": 1}, "offset"), ({"offset": -PAGE_SIZE}, "offset"), ({"shared": False, "punch": True}, "private")],
)
def test_what_does_not_go_together_is_refused(
    blocks: RamBlockList, fd: int, changed: dict[str, int], what: str
) -> None:
    """Before anything is mapped."""
    os.ftruncate(fd, 2 * MIB)
    with pytest.raises(ValueError, match=what):
        blocks.add("ring", used_length=0, max_length=MIB, memory=File(fd, **changed))  # type: ignore[arg-type]


def test_a_descriptor_that_is_open_for_reading_makes_a_block_that_is_read(kernel: SpecialKernel, fd: int) -> None:
    """By the process and by devices; it can be neither made longer nor punched."""
    os.ftruncate(fd, MIB)
    os.pwrite(fd, DATA, 0)
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Rig(kernel) as rig:
            for changed in ({"grow": True}, {"punch": True}):
                with pytest.raises(ValueError, match="open for reading only"):
                    rig.blocks.add("ring", used_length=0, max_length=MIB, memory=File(reading, **changed))
            block = rig.blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=File(reading))
            assert block.readonly
            assert contents(block)[: len(DATA)] == DATA
            assert [mapping.flags for mapping in kernel.mappings(BDF)] == [1]
            block.resize(4 * PAGE_SIZE)
            rig.check()
    finally:
        os.close(reading)


def test_a_bad_descriptor_is_the_kernels_refusal(blocks: RamBlockList) -> None:
    """EBADF, with what a block needs."""
    with pytest.raises(
        pyvfio.IoctlError, match=r"fd=0x.*EBADF.*Bad file descriptor.*open until the block is added"
    ) as raised:
        blocks.add("ring", used_length=0, max_length=MIB, memory=File(987654))
    assert raised.value.errno == errno.EBADF


def test_a_file_on_a_disk_warns_that_no_device_can_be_let_write_to_it(blocks: RamBlockList) -> None:
    """When the block is made; one that is read, or private, does not."""
    places = [Path(__file__).parent, Path.home(), Path("/")]
    directory = next(place for place in places if os.access(place, os.W_OK) and file_system(place) != TMPFS_MAGIC)
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(MIB)
        with pytest.warns(pyvfio.CannotBePinnedWarning, match=r"since Linux 6\.5.*readonly=True") as caught:
            blocks.add("ring", used_length=0, max_length=MIB, memory=File(file.fileno()))
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            blocks.add("private", used_length=0, max_length=MIB, memory=File(file.fileno(), shared=False))
            blocks.add("read", used_length=0, max_length=MIB, memory=File(file.fileno()), readonly=True)
        blocks.close()


def file_system(path: Path) -> int:
    """Its magic number."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return pyvfio.LinuxKernel().file_status(fd).file_system
    finally:
        os.close(fd)


def test_memory_that_is_not_persistent_is_said_not_to_be(blocks: RamBlockList, fd: int) -> None:
    """MAP_SYNC is refused for it; the block is made all the same."""
    os.ftruncate(fd, MIB)
    with pytest.warns(pyvfio.PersistenceWarning, match="MAP_SYNC") as caught:
        block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd, pmem=True))
    assert caught[0].filename == __file__
    write(block)
    assert os.pread(fd, len(DATA), 0) == DATA


class PersistentKernel(SpecialKernel):
    """Of whom files are persistent memory: it maps them with MAP_SYNC."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronous: list[bool] = []

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """As if it were; whether it was asked to is written down."""
        if fd >= 0:
            self.synchronous.append(flags & MAP_SYNC != 0 and flags & MAP_SHARED_VALIDATE == MAP_SHARED_VALIDATE)
        if flags & MAP_SYNC:
            flags = flags & ~(MAP_SYNC | MAP_SHARED_VALIDATE) | MAP_SHARED
        return super().mmap(vaddr, size, protection, flags, fd=fd, offset=offset)


def test_persistent_memory_is_mapped_synchronously(fd: int) -> None:
    """Each time, also what a shrink maps anew; and no warning says otherwise."""
    os.ftruncate(fd, MIB)
    with PersistentKernel() as kernel, RamBlockList(kernel=kernel) as blocks, warnings.catch_warnings():
        warnings.simplefilter("error")
        block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=File(fd, pmem=True))
        probe = next(call for call in kernel.trace if call.call == "mmap")
        assert next(call.given for call in kernel.trace if call.call == "munmap") == (probe.result, PAGE_SIZE)
        block.resize(PAGE_SIZE)
        assert kernel.synchronous == [True] * 3  # a probe, the reservation, the shrink
        block.resize(2 * PAGE_SIZE)
        write(block)


class HugeKernel(SpecialKernel):
    """For whom each file is one of huge pages."""

    def file_status(self, fd: int) -> FileStatus:
        """As if it were."""
        return replace(super().file_status(fd), file_system=HUGETLBFS_MAGIC, block_size=2 * MIB)


def test_lengths_are_multiples_of_the_pages_of_a_callers_file(fd: int) -> None:
    """Whatever its file system has them at: a length that is none is refused before anything is made."""
    os.ftruncate(fd, 8 * MIB)
    with HugeKernel() as kernel, RamBlockList(kernel=kernel) as blocks:
        for used, maximum in ((MIB, 4 * MIB), (2 * MIB, 5 * MIB)):
            with pytest.raises(ValueError, match="multiple of"):
                blocks.add("ring", used_length=used, max_length=maximum, memory=File(fd))
        block = blocks.add("ring", used_length=2 * MIB, max_length=8 * MIB, memory=File(fd))
        assert block.page_size == 2 * MIB
        kernel.clear_trace()
        with pytest.raises(ValueError, match="multiple of 2097152"):
            block.resize(3 * MIB)
        assert not kernel.trace
        block.resize(4 * MIB)


def test_memory_that_may_be_unreserved_is_marked_so_and_other_memory_is_not(blocks: RamBlockList) -> None:
    """VM_NORESERVE in /proc/self/smaps, on all that is in use: it is not charged."""
    for idstr, kind in (("reserved", Anonymous()), ("unreserved", Anonymous(noreserve=True))):
        block = blocks.add(idstr, used_length=PAGE_SIZE, max_length=MIB, memory=kind)
        for length in (8, 2, 16):
            block.resize(length * PAGE_SIZE)
            assert ("nr" in flags_at(block.vaddr)) == (idstr == "unreserved")


def flags_at(vaddr: int) -> list[str]:
    """VmFlags of the area that begins there."""
    lines = iter(Path("/proc/self/smaps").read_text(errors="replace").splitlines())
    next(line for line in lines if line.startswith(f"{vaddr:x}-"))
    return next(line for line in lines if line.startswith("VmFlags:")).split()[1:]


# ----------------------------------------------------------------------------------------------------------- read-only


def test_a_device_may_only_read_a_readonly_block(kernel: SpecialKernel) -> None:
    """The process goes on writing it; and each page is the process's own before the device has it."""
    with Rig(kernel) as rig:
        block = rig.blocks.add("rom", used_length=2 * PAGE_SIZE, max_length=MIB, readonly=True)
        assert [mapping.flags for mapping in kernel.mappings(BDF)] == [1]
        assert kernel.memlock().used == 2 * PAGE_SIZE
        write(block)
        assert kernel.dma_read(BDF, rig.mapper.iova(block), len(DATA)) == DATA
        with pytest.raises(DmaFault):
            kernel.dma_write(BDF, rig.mapper.iova(block), b"x")
        block.resize(4 * PAGE_SIZE)
        assert {mapping.flags for mapping in kernel.mappings(BDF)} == {1}
        rig.check()


@pytest.mark.parametrize("version", ["6.1", "6.12"])
def test_what_is_written_after_the_map_is_what_a_reading_device_sees(version: str) -> None:
    """Though nothing had been written before, where a kernel pins the page of zeros."""
    with SpecialKernel(version, groups=[(2, [FakeDevice(BDF)])]) as kernel, Rig(kernel) as rig:
        rig.blocks.add("rom", used_length=PAGE_SIZE, max_length=MIB, readonly=True)
        assert kernel.memlock().used == PAGE_SIZE  # 6.1 charges nobody for the page of zeros


# ----------------------------------------------------------------------------------------------- the fake sees files go


def test_a_fake_kernel_sees_that_a_file_was_cut_under_a_device(kernel: SpecialKernel) -> None:
    """What the device still reaches is a violation, with both addresses; so is a hole."""
    with Rig(kernel) as rig:
        block = rig.blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=Memfd())
        assert block.file is not None
        kernel.fallocate(block.file.fd, 3, PAGE_SIZE, PAGE_SIZE)
        kernel.ftruncate(block.file.fd, 3 * PAGE_SIZE)
        found = [(each.call, each.vaddr - block.vaddr, each.size) for each in kernel.violations]
        assert found == [("fallocate", PAGE_SIZE, PAGE_SIZE), ("ftruncate", 3 * PAGE_SIZE, PAGE_SIZE)]


def test_a_reservation_of_a_file_is_address_space_of_that_file(kernel: SpecialKernel, fd: int) -> None:
    """Inaccessible where it is not used, and nothing charged: a growth needs no new mapping, which could fail half
    way."""
    memory = Reservation(kernel, max_length=MIB, kind=Memfd(), idstr="x")
    try:
        kernel.clear_trace()
        memory.activate(4 * PAGE_SIZE)
        assert [call.call for call in kernel.trace] == ["fallocate", "mprotect"]
    finally:
        memory.release()


# ------------------------------------------------------------------------------------- what is the caller's stays so


class OnDisk(SpecialKernel):
    """In which every file is on a disk."""

    def file_status(self, fd: int) -> FileStatus:
        """As it is, but for the file system."""
        return replace(super().file_status(fd), file_system=0xEF53)  # EXT4_SUPER_MAGIC

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """What a C library may do in place of a call that a file system has not."""
        for page in range(offset, offset + size, PAGE_SIZE):
            os.pwrite(fd, b"\0", page)


def test_a_callers_file_is_never_written_to_have_pages(fd: int) -> None:
    """Where the file system cannot say whether there are any, it is only made long enough."""
    os.pwrite(fd, b"x" * 2 * PAGE_SIZE, 0)
    with OnDisk(groups=[(2, [FakeDevice(BDF)])]) as kernel, RamBlockList(kernel=kernel) as blocks:
        with pytest.warns(pyvfio.CannotBePinnedWarning):
            block = blocks.add("ring", used_length=0, max_length=MIB, memory=File(fd, grow=True))
        kernel.fail(call="fallocate", errno=errno.EOPNOTSUPP)
        block.resize(4 * PAGE_SIZE)
        assert os.fstat(fd).st_blocks * 512 == 2 * PAGE_SIZE
        assert contents(block) == b"x" * 2 * PAGE_SIZE + bytes(2 * PAGE_SIZE)


def test_a_disk_that_is_full_refuses_the_growth(fd: int) -> None:
    """A file that was made longer all the same would be a signal that ends the process, at the first touch."""
    with OnDisk(groups=[(2, [FakeDevice(BDF)])]) as kernel, RamBlockList(kernel=kernel) as blocks:
        with pytest.warns(pyvfio.CannotBePinnedWarning):
            block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd, grow=True))
        kernel.fail(call="fallocate", errno=errno.ENOSPC)
        with pytest.raises(pyvfio.IoctlError) as caught:
            block.resize(4 * PAGE_SIZE)
        assert caught.value.errno == errno.ENOSPC
        assert (block.used_length, os.fstat(fd).st_size) == (PAGE_SIZE, PAGE_SIZE)
        block.resize(4 * PAGE_SIZE)
        status = os.fstat(fd)
        assert (status.st_size, status.st_blocks * 512) == (4 * PAGE_SIZE, 4 * PAGE_SIZE)


@pytest.mark.parametrize("call", ["mprotect", "fallocate", "notifier"])
def test_a_growth_that_is_refused_leaves_a_callers_file_as_it_was(
    kernel: SpecialKernel, blocks: RamBlockList, fd: int, call: str
) -> None:
    """Also where it may be punched: what the block never had is not its to punch."""

    class Refuses:
        """Every growth."""

        def ram_block_resized(self, block: RamBlock, old: int, new: int) -> None:
            """No."""
            assert block.max_length == MIB
            if new > old and call == "notifier":
                raise PermissionError

    os.ftruncate(fd, MIB)
    os.pwrite(fd, b"x" * MIB, 0)
    blocks.add_notifier(Refuses())
    block = blocks.add("ring", used_length=0, max_length=MIB, memory=File(fd, punch=True, grow=True))
    if call != "notifier":
        kernel.fail(call=call, errno=errno.ENOMEM)
    with pytest.raises(PermissionError if call == "notifier" else pyvfio.IoctlError) as caught:
        block.resize(8 * PAGE_SIZE)
    assert getattr(caught.value, "request", "notifier") == call
    assert block.used_length == 0
    assert os.pread(fd, MIB, 0) == b"x" * MIB
    blocks.close()


def test_what_could_not_be_punched_reads_zeros_all_the_same(
    kernel: SpecialKernel, blocks: RamBlockList, fd: int
) -> None:
    """When it is seen again, as the punched file would."""
    os.ftruncate(fd, MIB)
    block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=File(fd, punch=True))
    write(block, PAGE_SIZE)
    kernel.fail(call="fallocate", errno=errno.EIO)
    with pytest.warns(pyvfio.MemoryNotReturnedWarning):
        block.resize(PAGE_SIZE)
    block.resize(2 * PAGE_SIZE)
    assert not any(contents(block)[PAGE_SIZE:])


def test_memory_that_cannot_be_written_is_not_by_a_view_nor_by_prealloc(blocks: RamBlockList, fd: int) -> None:
    """TypeError in place of a signal that ends the process."""
    os.ftruncate(fd, MIB)
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(reading), prealloc=1)
    with block.view() as view, pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    blocks.close()
    os.close(reading)


@pytest.mark.parametrize("wrong", [7, Memfd, "memfd"])
def test_what_is_no_kind_of_memory_is_refused(blocks: RamBlockList, wrong: object) -> None:
    """With those that there are."""
    with pytest.raises(TypeError, match=r"Anonymous\(\), Memfd\(\) or File\(fd\)"):
        blocks.add("ring", used_length=0, max_length=MIB, memory=wrong)  # type: ignore[arg-type]


def test_an_offset_that_no_file_has_is_refused(blocks: RamBlockList, fd: int) -> None:
    """Before it is cut to 64 bits."""
    with pytest.raises(ValueError, match="no file can hold"):
        blocks.add("ring", used_length=0, max_length=MIB, memory=File(fd, (1 << 64) + PAGE_SIZE, grow=True))


def test_a_name_that_is_too_long_for_a_memfd_is_cut(blocks: RamBlockList) -> None:
    """Not in the middle of a letter."""
    block = blocks.add("ü" * 200, used_length=0, max_length=MIB, memory=Memfd())
    assert block.file is not None
    assert os.readlink(f"/proc/self/fd/{block.file.fd}").startswith("/memfd:" + "ü" * 100)


def test_a_warning_that_is_an_error_leaves_no_block(blocks: RamBlockList, fd: int) -> None:
    """As any other error does."""
    os.ftruncate(fd, MIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(pyvfio.PersistenceWarning):
            blocks.add("ring", used_length=0, max_length=MIB, memory=File(fd, pmem=True))
    assert len(blocks) == 0


def test_a_device_is_not_let_write_a_readonly_block_by_another_way(kernel: SpecialKernel) -> None:
    """It is mapped already, but for less."""
    with Rig(kernel) as rig:
        block = rig.blocks.add("rom", used_length=PAGE_SIZE, max_length=MIB, readonly=True)
        with pytest.raises(ValueError, match="with less access than was asked for"):
            rig.mapper.map_dma(vaddr=block.vaddr, size=PAGE_SIZE)
        assert rig.mapper.map_dma(vaddr=block.vaddr, size=PAGE_SIZE, write=False).iova == rig.mapper.iova(block)


def test_memory_that_is_kept_for_ever_keeps_no_descriptor(kernel: SpecialKernel) -> None:
    """A second mapper came half, and could not go: the memory stays, for a device may reach it."""
    before = set(os.listdir("/proc/self/fd"))
    rig = Rig(kernel, memory=Memfd())
    for name in ("a", "b"):
        rig.add(name)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO, nth=2)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.RollbackError):
        pyvfio.DmaMapper(rig.container, rig.blocks)
    kernel.clear_failures()
    rig.close()
    assert set(os.listdir("/proc/self/fd")) == before


# ----------------------------------------------------------------------------------------------------------- bad input


@contextmanager
def descriptor(what: str) -> Iterator[int]:
    """Of something that is no regular file, or that is not open in the right way."""
    with ExitStack() as stack, tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * MIB)
        if what == "a socket":
            yield stack.enter_context(socket.socket()).fileno()
            return
        ours: tuple[int, ...]
        match what:
            case "a pipe":
                ours = os.pipe()
            case "a directory":
                ours = (os.open("/", os.O_RDONLY | os.O_DIRECTORY),)
            case "a character device":
                ours = (os.open("/dev/zero", os.O_RDWR),)
            case "such as an eventfd":
                ours = (os.eventfd(0, os.EFD_CLOEXEC),)
            case _:
                ours = (os.open(file.name, os.O_PATH if what == "O_PATH" else os.O_WRONLY),)
        try:
            yield ours[-1]
        finally:
            for fd in ours:
                os.close(fd)


@pytest.mark.parametrize("grow", [False, True])
@pytest.mark.parametrize(
    "what",
    ["a socket", "a pipe", "a directory", "a character device", "such as an eventfd", "O_PATH", "for writing only"],
)
def test_what_cannot_be_mapped_is_refused_with_what_it_is(
    kernel: SpecialKernel, blocks: RamBlockList, what: str, *, grow: bool
) -> None:
    """Before any address space is asked for."""
    with descriptor(what) as fd:
        with pytest.raises(ValueError, match=rf"descriptor {fd} is .*{what}"):
            blocks.add("ring", used_length=0, max_length=MIB, memory=File(fd, grow=grow))
        assert [call.call for call in kernel.trace] == ["dup", "file_status", "close"]


@pytest.mark.parametrize(
    ("changed", "error", "what"),
    [
        ({"fd": None}, TypeError, "fd must be a whole number, not None"),
        ({"fd": "3"}, TypeError, "fd must be a whole number"),
        ({"fd": 3.0}, TypeError, "fd must be a whole number"),
        ({"fd": True}, TypeError, "fd must be a whole number"),
        ({"fd": sys.__stdout__}, TypeError, r"such as file.fileno\(\)"),
        ({"fd": -1}, ValueError, "no descriptor has the number -1"),
        ({"fd": 1 << 31}, ValueError, "no descriptor"),
        ({"offset": None}, TypeError, "offset must be a whole number"),
        ({"offset": 0.0}, TypeError, "offset must be a whole number"),
        ({"offset": False}, TypeError, "offset must be a whole number"),
        ({"offset": -PAGE_SIZE}, ValueError, "not negative, not -0x1000"),
        ({"offset": 1}, ValueError, "multiple of 0x1000"),
        ({"shared": None}, TypeError, "shared must be True or False, not None"),
        ({"grow": 1}, TypeError, "grow must be True or False"),
        ({"punch": "no"}, TypeError, "punch must be True or False"),
        ({"pmem": 0}, TypeError, "pmem must be True or False"),
        ({"shared": False, "pmem": True}, ValueError, "set neither punch nor pmem"),
        ({"shared": False, "punch": True}, ValueError, "set neither punch nor pmem"),
    ],
)
def test_a_file_that_nothing_can_be_is_refused_where_it_is_named(
    changed: dict[str, object], error: type[Exception], what: str
) -> None:
    """With the argument that is wrong."""
    with pytest.raises(error, match=what):
        File(**{"fd": 3, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [None, "2M", 2.0 * MIB, True, 0, -2 * MIB, PAGE_SIZE, 3 * MIB, 1 << 63, 1 << 64])
def test_a_size_that_no_huge_page_has_is_refused_where_it_is_named(size: object) -> None:
    """None is no size, but ordinary pages."""
    if size is None:
        assert Memfd(hugetlb=None).page_size == PAGE_SIZE
        return
    with pytest.raises((TypeError, ValueError), match="huge"):
        Memfd(hugetlb=size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "error", "what"),
    [
        ({"used_length": None}, TypeError, "used_length must be a whole number of bytes, not None"),
        ({"max_length": float(MIB)}, TypeError, "max_length must be a whole number of bytes, not 1048576.0"),
        ({"max_length": "1M"}, TypeError, "max_length must be a whole number of bytes"),
        ({"max_length": True}, ValueError, "max_length must be a multiple of 4096"),
        ({"used_length": -PAGE_SIZE}, ValueError, "used_length must be a multiple of 4096 bytes and not negative"),
        ({"used_length": 2 * MIB}, ValueError, "at most max_length"),
        ({"max_length": 0, "used_length": 0}, ValueError, "must not be 0"),
        ({"max_length": 1 << 64}, ValueError, "more than an address space can hold"),
        ({"memory": 0}, TypeError, r"Anonymous\(\), Memfd\(\) or File\(fd\), not 0"),
        ({"memory": Memfd}, TypeError, r"Anonymous\(\), Memfd\(\) or File\(fd\)"),
        ({"memory": Memfd(hugetlb=2 * MIB)}, ValueError, "used_length must be a multiple of 2097152"),
        ({"memory": Memfd(hugetlb=2 * MIB), "used_length": 0}, ValueError, "max_length must be a multiple of 2097152"),
        ({"readonly": "no"}, TypeError, "readonly must be True or False"),
        ({"prealloc": True}, TypeError, "prealloc must be a whole number, not True"),
        ({"prealloc": 1.0}, TypeError, "prealloc must be a whole number"),
        ({"prealloc": -1}, ValueError, "prealloc must be a number of threads from 0 to 1024, not -1"),
        ({"prealloc": 10**6}, ValueError, "prealloc must be a number of threads from 0 to 1024, not 1000000"),
        ({"progress": 3}, TypeError, "must be callable"),
        ({"resized": "print"}, TypeError, "must be callable"),
        ({"settings": {}}, TypeError, r"settings must be a MemorySettings\(\), not {}"),
        ({"settings": pyvfio.MemorySettings}, TypeError, r"settings must be a MemorySettings\(\)"),
        ({"idstr": None}, TypeError, "idstr must be text, not None"),
        ({"idstr": b"ring"}, TypeError, "idstr must be text"),
        ({"idstr": "a\0b", "memory": Memfd()}, ValueError, "must not contain NUL"),
    ],
)
def test_what_can_never_be_right_is_refused_before_any_system_call(
    kernel: SpecialKernel, blocks: RamBlockList, changed: dict[str, object], error: type[Exception], what: str
) -> None:
    """With the argument that is wrong; nothing is left of it."""
    kernel.clear_trace()
    with pytest.raises(error, match=what):
        blocks.add(**{"idstr": "ring", "used_length": PAGE_SIZE, "max_length": MIB, **changed})  # type: ignore[arg-type]
    assert (list(kernel.trace), len(blocks)) == ([], 0)


@pytest.mark.parametrize("name", ["dontfork", "hugepage", "dontdump", "mergeable"])
def test_a_setting_is_on_or_off(name: str) -> None:
    """And so is whether memory is reserved."""
    with pytest.raises(TypeError, match=f"{name} must be True or False, not 'no'"):
        pyvfio.MemorySettings(**{name: "no"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="noreserve must be True or False"):
        Anonymous(noreserve=None)  # type: ignore[arg-type]


def test_more_address_space_than_there_is_is_the_kernels_refusal(blocks: RamBlockList) -> None:
    """With how much a process has; nothing stays mapped or open."""
    fds = set(os.listdir("/proc/self/fd"))
    for kind in (Anonymous(), Memfd()):
        with pytest.raises(pyvfio.IoctlError, match=r"8 EiB of address space.*a process has 128 TiB at most") as raised:
            blocks.add("ring", used_length=0, max_length=1 << 63, memory=kind)
        assert raised.value.errno == errno.ENOMEM
    assert set(os.listdir("/proc/self/fd")) == fds


def test_huge_pages_that_are_missing_are_said_with_those_that_there_are(blocks: RamBlockList) -> None:
    """By their sizes, as /sys/kernel/mm/hugepages has them."""
    there = sorted(path.name for path in Path("/sys/kernel/mm/hugepages").glob("hugepages-*"))
    with pytest.raises(pyvfio.IoctlError, match=r"no huge pages of 128 MiB\. Available sizes: ") as raised:
        blocks.add("ring", used_length=0, max_length=128 * MIB, memory=Memfd(hugetlb=128 * MIB))
    assert ("2 MiB" in raised.value.hint) == ("hugepages-2048kB" in there)


def sealed(size: int, seals: int) -> int:
    """A memfd of that size that is sealed."""
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def test_a_file_that_cannot_grow_says_so_when_the_block_is_made(kernel: SpecialKernel, blocks: RamBlockList) -> None:
    """Sealed against it: not when the block is grown. One that is long enough already is as good as any."""
    short, long = sealed(PAGE_SIZE, F_SEAL_GROW), sealed(MIB, F_SEAL_GROW)
    with pytest.raises(ValueError, match=r"ends 4 KiB behind offset 0x0.*cannot be extended.*F_SEAL_GROW"):
        blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(short, grow=True))
    assert [call.call for call in kernel.trace] == ["dup", "file_status", "close"]
    block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(long, grow=True))
    block.resize(MIB)
    blocks.close()
    for fd in (short, long):
        os.close(fd)


@pytest.mark.parametrize("seal", [F_SEAL_WRITE, F_SEAL_FUTURE_WRITE], ids=["write", "future write"])
def test_a_file_that_is_sealed_against_writing_makes_a_block_that_is_read(kernel: SpecialKernel, seal: int) -> None:
    """As one that is open for reading only does; a private mapping of it can be written, and no hole can be made."""
    fd = sealed(MIB, seal)
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # older kernels map nothing else of it
    with Rig(kernel) as rig:
        block = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(reading))
        assert block.readonly
        assert [mapping.flags for mapping in kernel.mappings(BDF)] == [1]
        with block.view() as view, pytest.raises(TypeError, match="read-only"):
            view[0] = 1
        block.resize(3 * PAGE_SIZE)
        rig.check()
        with pytest.raises(ValueError, match="sealed against writing"):
            rig.blocks.add("holes", used_length=0, max_length=MIB, memory=File(fd, punch=True))
        write(rig.blocks.add("private", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd, shared=False)))
    os.close(fd)
    os.close(reading)


def test_a_writable_descriptor_of_a_sealed_file_makes_a_block_that_is_read_or_says_how(blocks: RamBlockList) -> None:
    """Kernels before 6.7 map none that could be written."""
    fd = sealed(MIB, F_SEAL_WRITE)
    try:
        block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd))
    except pyvfio.IoctlError as error:
        assert (error.errno, "open for reading only" in error.hint) == (errno.EPERM, True)  # noqa: PT017
    else:
        assert block.readonly
    blocks.close()
    os.close(fd)


@pytest.mark.parametrize(
    ("number", "what"),
    [
        (errno.EPERM, "may have been sealed meanwhile"),
        (errno.EFBIG, "RLIMIT_FSIZE"),
        (errno.EAGAIN, "RLIMIT_MEMLOCK"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENOSPC, "Free memory"),
        (errno.ENOMEM, "vm.max_map_count"),
    ],
)
def test_a_refused_growth_says_what_its_errno_means(
    kernel: SpecialKernel, blocks: RamBlockList, number: int, what: str
) -> None:
    """Not always a want of memory."""
    block = blocks.add("ring", used_length=0, max_length=MIB, memory=Memfd())
    kernel.fail(call="fallocate", errno=number)
    with pytest.raises(pyvfio.IoctlError) as raised:
        block.resize(PAGE_SIZE)
    assert what in raised.value.hint


def test_a_name_that_no_file_can_have_is_replaced(blocks: RamBlockList) -> None:
    """Half a surrogate, as an undecodable file name has it."""
    block = blocks.add("\udcff", used_length=0, max_length=MIB, memory=Memfd())
    assert block.file is not None
    assert os.readlink(f"/proc/self/fd/{block.file.fd}").startswith("/memfd:?")


# ------------------------------------------------------------------------------------------------- reservations of each


SHARED = "the descriptor"


@pytest.mark.parametrize(
    ("name", "charged", "by_file", "can_drop"),
    [
        ("anonymous", "touched", None, True),
        ("noreserve", "touched", None, True),
        ("memfd", "provided", SHARED, True),
        ("file shared", "never", SHARED, False),
        ("file punched", "never", SHARED, True),
        ("file private", "touched", None, False),
    ],
)
def test_each_kind_says_when_its_pages_are_charged_and_whether_a_device_has_them_by_the_descriptor(
    kernel: SpecialKernel, name: str, charged: str, by_file: str | None, *, can_drop: bool
) -> None:
    """A private copy is not what the file has."""
    with kinds(name) as kind:
        memory = Reservation(kernel, max_length=MIB, kind=kind)
        assert (memory.charged, memory.can_drop, memory.readable_only) == (charged, can_drop, False)
        assert memory.page_size == kind.page_size == PAGE_SIZE
        assert memory.shared_file == (memory.file if by_file else None)
        assert (memory.file is None) == (name in {"anonymous", "noreserve"})
        assert memory.kind is kind
        memory.release()


@pytest.mark.parametrize("shared", [True, False])
def test_pages_of_a_pool_are_not_charged_as_memory(fd: int, *, shared: bool) -> None:
    """Neither those of a memfd, nor those of a file, copied or not."""
    os.ftruncate(fd, 4 * MIB)
    with HugeKernel() as kernel:
        for kind in (File(fd, shared=shared), Memfd(hugetlb=2 * MIB)):
            memory = Reservation(kernel, max_length=2 * MIB, kind=kind)
            assert (memory.charged, memory.page_size) == ("never", 2 * MIB)
            assert memory.shared_file == (memory.file if shared or isinstance(kind, Memfd) else None)
            memory.release()
    with OnDisk() as kernel:
        memory = Reservation(kernel, max_length=2 * MIB, kind=File(fd, shared=shared))
        assert memory.shared_file is None
        memory.release()


@contextmanager
def no_standard_input() -> Iterator[None]:
    """The next descriptor has the number 0, as in a program that was started with its input closed."""
    saved = os.dup(0)
    os.close(0)
    try:
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def test_descriptor_0_is_one_like_any_other(kernel: SpecialKernel) -> None:
    """Memory of it grows, shrinks, is cleared and replaced, and closes it."""
    with no_standard_input():
        memory = Reservation(kernel, max_length=MIB, kind=Memfd())
        assert memory.file == memory.shared_file == (0, 0)
        memory.activate(4 * PAGE_SIZE)
        ctypes.memset(memory.vaddr, 0x5A, 4 * PAGE_SIZE)
        assert os.pread(0, 4 * PAGE_SIZE, 0) == b"\x5a" * 4 * PAGE_SIZE
        memory.retain(3 * PAGE_SIZE)
        memory.let_go()
        memory.activate(4 * PAGE_SIZE)
        status = os.fstat(0)
        assert (status.st_size, status.st_blocks * 512) == (4 * PAGE_SIZE, 4 * PAGE_SIZE)
        assert os.pread(0, PAGE_SIZE, 3 * PAGE_SIZE) == bytes(PAGE_SIZE)
        memory.deactivate(PAGE_SIZE)
        assert os.fstat(0).st_size == PAGE_SIZE
        kernel.fail(call="mprotect", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError):
            memory.activate(2 * PAGE_SIZE)
        assert os.fstat(0).st_size == PAGE_SIZE
        kernel.fail(call="fallocate", errno=errno.ENOSPC)
        with pytest.raises(pyvfio.IoctlError) as caught:
            memory.replace(0, PAGE_SIZE, provide=True)
        assert caught.value.request == "fallocate"
        memory.release()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
        memory = Reservation(kernel, max_length=MIB, kind=Memfd())
        kernel.clear_trace()
        memory.activate_whole(PAGE_SIZE)
        assert kernel.trace[-1].given == (memory.vaddr, MIB, 3)  # the page behind still guards
        memory._check()
        with Rig(kernel) as rig:
            block = rig.blocks.add("file", used_length=PAGE_SIZE, max_length=MIB, memory=File(0))
            write(block)
            assert os.pread(0, len(DATA), 0) == DATA
        memory.release()


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("is_memfd", [True, False])
def test_memory_that_was_received_is_as_it_was_left_and_owns_its_descriptor_if_it_is_told_to(
    kernel: SpecialKernel, fd: int, *, is_memfd: bool, owned: bool
) -> None:
    """No call changes the file; a part that is not in use stays out of reach."""
    os.ftruncate(fd, MIB + PAGE_SIZE)
    os.pwrite(fd, b"x" * MIB, 0)
    received, start = os.dup(fd), 0 if is_memfd else PAGE_SIZE
    kind = Memfd() if is_memfd else File(7, PAGE_SIZE)  # the number in the other process
    came = Received(received, kind)
    assert came.page_size == PAGE_SIZE
    memory = Reservation(kernel, max_length=MIB, kind=came)
    assert (memory.kind, memory.file) == (kind, (received, start))
    kernel.clear_trace()
    memory.resume(0)
    assert kernel.trace == []
    memory.resume(2 * PAGE_SIZE)
    assert [(call.call, call.given) for call in kernel.trace] == [("mprotect", (memory.vaddr, 2 * PAGE_SIZE, 3))]
    assert (memory.length, memory.retained) == (2 * PAGE_SIZE, 0)
    memory._check()
    assert ctypes.string_at(memory.vaddr, 2 * PAGE_SIZE) == b"x" * 2 * PAGE_SIZE
    assert os.fstat(fd).st_size == MIB + PAGE_SIZE
    memory.own()
    if not owned:
        memory.disown()
    memory.release()
    memory.abandon()
    assert (received in open_fds()) != owned
    if not owned:
        os.close(received)


def test_memory_that_was_received_stays_its_senders_until_it_is_told_otherwise(kernel: SpecialKernel, fd: int) -> None:
    """Also if it cannot be mapped, or made accessible."""
    os.ftruncate(fd, MIB)
    for kind in (Memfd(), File(0)):
        kernel.fail(call="mmap", errno=errno.ENOMEM, nth=2)
        with pytest.raises(pyvfio.IoctlError, match="could not be mapped"):
            Reservation(kernel, max_length=MIB, kind=Received(fd, kind))
        memory = Reservation(kernel, max_length=MIB, kind=Received(fd, kind))
        kernel.fail(call="mprotect", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError, match="8 KiB more memory could not be allocated") as caught:
            memory.resume(2 * PAGE_SIZE)
        assert (caught.value.request, caught.value.arguments) == (
            "mprotect",
            {"vaddr": memory.vaddr, "size": 2 * PAGE_SIZE},
        )
        memory.release()
        assert fd in open_fds()


@pytest.mark.parametrize("name", ["anonymous", "memfd", "file shared", "file punched"])
def test_memory_that_is_allocated_in_full_is_usable_to_its_end(kernel: SpecialKernel, name: str) -> None:
    """Its guard page is only where the kernel needs no mapping more for it; of a memfd only a part has pages."""
    with kinds(name) as kind:
        memory = Reservation(kernel, max_length=MIB, kind=kind)
        kernel.clear_trace()
        kernel.fail(call="mprotect", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError, match="1 MiB more memory could not be allocated") as caught:
            memory.activate_whole(2 * PAGE_SIZE)
        assert (caught.value.request, caught.value.arguments) == ("mprotect", {"vaddr": memory.vaddr, "size": MIB})
        assert (memory.length, memory.retained) == (0, 0)
        memory._check()
        if name == "memfd":
            assert memory.file is not None
            assert os.fstat(memory.file[0]).st_size == 0
        memory.activate_whole(2 * PAGE_SIZE)
        assert (memory.length, memory.retained) == (MIB, 0)
        memory._check()
        guard = 0 if memory.file else PAGE_SIZE
        assert kernel.trace[-1].given == (memory.vaddr, MIB + guard, 3)
        if name == "memfd":
            assert memory.file is not None
            status = os.fstat(memory.file[0])
            assert (status.st_size, status.st_blocks * 512) == (MIB, 2 * PAGE_SIZE)
        ctypes.memset(memory.vaddr, 1, MIB)
        with pytest.raises(ValueError, match="0x100000 bytes are active already"):
            memory.activate_whole(MIB)
        memory.release()


@pytest.mark.parametrize("name", ["anonymous", "memfd", "file punched", "file private", "file shared"])
@pytest.mark.parametrize("provide", [True, False])
def test_replaced_pages_are_new_and_a_refusal_says_which_were_not(
    kernel: SpecialKernel, name: str, *, provide: bool
) -> None:
    """They read zeros, or what the file has; pages of a memfd are there at once if that is asked for."""
    with kinds(name) as kind:
        memory = Reservation(kernel, max_length=MIB, kind=kind)
        memory.activate(MIB)
        ctypes.memset(memory.vaddr, 0x5A, MIB)
        memory.replace(PAGE_SIZE, 3 * PAGE_SIZE, provide=provide)
        if name == "memfd":
            assert memory.file is not None
            assert MIB - os.fstat(memory.file[0]).st_blocks * 512 == (0 if provide else 2 * PAGE_SIZE)
        kept = name == "file shared"
        if kept:  # a page that has failed and cannot be read again is an error here, and no SIGBUS later
            assert kernel.trace[-1].given == (memory.vaddr + PAGE_SIZE, 2 * PAGE_SIZE, MADV_POPULATE_READ)
        new = b"\x5a" * 2 * PAGE_SIZE if kept else bytes(2 * PAGE_SIZE)
        found = ctypes.string_at(memory.vaddr, MIB)
        assert found == b"\x5a" * PAGE_SIZE + new + b"\x5a" * (MIB - 3 * PAGE_SIZE)
        by_call = "fallocate" if name in {"memfd", "file punched"} else "madvise"
        for number in (errno.ENOMEM, errno.EPERM):
            kernel.fail(call=by_call, errno=number)
            with pytest.raises(pyvfio.IoctlError, match="new pages for 8 KiB could not be allocated") as caught:
                memory.replace(PAGE_SIZE, 3 * PAGE_SIZE, provide=provide)
            error = caught.value
            assert (error.request, error.errno) == (by_call, number)
            assert error.arguments == {"vaddr": memory.vaddr + PAGE_SIZE, "size": 2 * PAGE_SIZE}
            if not memory.can_drop:
                assert error.hint.startswith("The pages belong to a file that must not be punched")
            else:
                assert error.hint.startswith("Free memory" if number == errno.ENOMEM else "The file may have been")
        memory.release()


def test_pages_that_could_not_be_given_back_after_a_refused_growth_read_zeros_later(kernel: SpecialKernel) -> None:
    """They were allocated, and another process may have written to them; what was retained before is not cut."""
    memory = Reservation(kernel, max_length=MIB, kind=Memfd())
    memory.activate(PAGE_SIZE)
    assert memory.file is not None
    kernel.fail(call="mprotect", errno=errno.ENOMEM)
    kernel.fail(call="ftruncate", errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError, match="12 KiB more memory could not be allocated") as caught:
        memory.activate(4 * PAGE_SIZE)
    assert caught.value.arguments == {"vaddr": memory.vaddr + PAGE_SIZE, "size": 3 * PAGE_SIZE}
    assert (memory.length, memory.retained) == (PAGE_SIZE, 3 * PAGE_SIZE)
    os.pwrite(memory.file[0], b"x" * 3 * PAGE_SIZE, PAGE_SIZE)
    kernel.fail(call="mprotect", errno=errno.ENOMEM)
    kernel.clear_trace()
    with pytest.raises(pyvfio.IoctlError):
        memory.activate(4 * PAGE_SIZE)
    assert [call.call for call in kernel.trace] == ["fallocate", "mprotect"]
    memory.activate(4 * PAGE_SIZE)
    assert not any(ctypes.string_at(memory.vaddr, 4 * PAGE_SIZE))
    assert os.fstat(memory.file[0]).st_blocks * 512 == 4 * PAGE_SIZE
    kernel.fail(call="fallocate", errno=errno.ENOSPC)
    with pytest.raises(pyvfio.IoctlError, match="8 KiB more memory") as caught:
        memory.provide(2 * PAGE_SIZE, 4 * PAGE_SIZE)
    assert (caught.value.request, caught.value.arguments) == (
        "fallocate",
        {"vaddr": memory.vaddr + 2 * PAGE_SIZE, "size": 2 * PAGE_SIZE},
    )
    memory.release()


@pytest.mark.parametrize("name", ["anonymous", "memfd", "file shared", "file punched"])
def test_cleared_memory_reads_zeros_unless_it_shows_a_file(kernel: SpecialKernel, name: str) -> None:
    """Which the caller wants to see; and its pages stay."""
    with kinds(name) as kind:
        memory = Reservation(kernel, max_length=MIB, kind=kind)
        memory.activate(4 * PAGE_SIZE)
        ctypes.memset(memory.vaddr, 0x5A, 4 * PAGE_SIZE)
        kernel.clear_trace()
        memory.clear(PAGE_SIZE, 3 * PAGE_SIZE)
        inside = b"\x5a" if name == "file shared" else b"\0"
        page = b"\x5a" * PAGE_SIZE
        assert ctypes.string_at(memory.vaddr, 4 * PAGE_SIZE) == page + inside * 2 * PAGE_SIZE + page
        assert kernel.trace == []
        memory.release()


@pytest.mark.parametrize(
    ("number", "hugetlb", "hint"),
    [
        (errno.EMFILE, None, "Close descriptors, or raise RLIMIT_NOFILE (ulimit -n)"),
        (errno.EMFILE, 2 * MIB, "Close descriptors, or raise RLIMIT_NOFILE (ulimit -n)"),
        (errno.ENOMEM, None, ""),
        (errno.ENODEV, None, ""),
        (errno.ENOMEM, 2 * MIB, ""),
    ],
)
def test_a_memfd_that_cannot_be_made_is_refused_with_what_helps(
    kernel: SpecialKernel, number: int, hugetlb: int | None, hint: str
) -> None:
    """Nothing is said of huge pages where it is not for want of them."""
    kernel.fail(call="memfd_create", errno=number)
    with pytest.raises(pyvfio.IoctlError, match="no memfd could be made for RAM block 'ring'") as caught:
        Reservation(kernel, max_length=2 * MIB, kind=Memfd(hugetlb=hugetlb), idstr="ring")
    assert (caught.value.request, caught.value.errno, caught.value.hint) == ("memfd_create", number, hint)


@pytest.mark.parametrize(("policy", "is_refused"), [("2\n", True), ("0\n", False), ("1\n", False), (None, False)])
def test_memory_cannot_be_unreserved_where_the_kernel_never_overcommits(
    kernel: SpecialKernel, tmp_path: Path, policy: str | None, *, is_refused: bool
) -> None:
    """The kernel would charge it all the same; without /proc nobody can tell."""
    kernel.own_proc = tmp_path
    if policy is not None:
        (tmp_path / "sys/vm").mkdir(parents=True)
        (tmp_path / "sys/vm/overcommit_memory").write_text(policy)
    Reservation(kernel, max_length=MIB, kind=Anonymous()).release()
    if is_refused:
        with pytest.raises(ValueError, match=r"noreserve has no effect if vm\.overcommit_memory is 2"):
            Reservation(kernel, max_length=MIB, kind=Anonymous(noreserve=True))
    else:
        Reservation(kernel, max_length=MIB, kind=Anonymous(noreserve=True)).release()
