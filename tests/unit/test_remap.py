"""Fresh pages behind memory that has failed: who is told, who may refuse, and what the device reaches meanwhile."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import pytest

import pyvfio
from pyvfio import Anonymous, File, Memfd
from pyvfio.extents import Extent, clip
from pyvfio.kernel import F_SEAL_FUTURE_WRITE
from pyvfio.memory import MemoryKind
from pyvfio.testing.fake import DmaFault, FakeDevice, FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, MapperFactory, Rig, SpecialKernel, nothing_left, requests, small_iommu
from tests.unit.processes import areas

PAGES: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)
GRANULE: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=4 * PAGE_SIZE)
EXTEND: MapperFactory = partial(pyvfio.DmaMapper, resize="extend")
POLICIES: dict[str, MapperFactory] = {
    "remap": pyvfio.DmaMapper,
    "extend": EXTEND,
    "page": PAGES,
    "granule": GRANULE,
}
LENGTH = 16 * PAGE_SIZE


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with a device."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made, nothing_left(made):
        yield made


@pytest.fixture(params=POLICIES)
def rig(request: pytest.FixtureRequest, kernel: SpecialKernel) -> Iterator[Rig]:
    """A mapper under each policy."""
    with Rig(kernel, mapper=POLICIES[request.param]) as made:
        yield made


@pytest.fixture
def file() -> Iterator[int]:
    """One of the caller's, in memory."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    os.ftruncate(fd, MIB)
    yield fd
    os.close(fd)


def filled(rig: Rig, memory: MemoryKind | None = None) -> pyvfio.RamBlock:
    """A block in which each page holds its number, counted from 1."""
    block = rig.blocks.add("ring", used_length=LENGTH, max_length=MIB, memory=memory)
    for page in range(LENGTH // PAGE_SIZE):
        ctypes.memset(block.vaddr + page * PAGE_SIZE, page + 1, PAGE_SIZE)
    return block


def maps_of_a_remap(rig: Rig, block: pyvfio.RamBlock) -> int:
    """How many mappings are made when page 5 is replaced, which has been before."""
    for _ in range(2):
        rig.kernel.clear_trace()
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    return requests(rig.kernel.trace).count("VFIO_IOMMU_MAP_DMA")


def seen(rig: Rig, block: pyvfio.RamBlock) -> list[int]:
    """The first byte of each page, as the device reads it at the block's IOVA."""
    iova = rig.mapper.iova(block)
    return [rig.kernel.dma_read(BDF, iova + at, 1)[0] for at in range(0, block.used_length, PAGE_SIZE)]


class Listener:
    """Follows everything, writes down what it hears of pages, also in a list of several, and refuses what it is told
    to."""

    def __init__(self, name: str = "", together: list[tuple[str, str]] | None = None) -> None:
        self._name, self._together = name, [] if together is None else together
        self.told: list[tuple[str, tuple[Extent, ...]]] = []
        self.refuse: list[str] = []

    def _hear(self, what: str, parts: Sequence[Extent]) -> None:
        self.told.append((what, tuple(parts)))
        self._together.append((self._name, what))
        if what in self.refuse:
            self.refuse.remove(what)
            raise PermissionError(errno.EPERM, what)

    def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """A block."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Another length."""

    def ram_block_remapping(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """Pages are about to be replaced."""
        del block
        self._hear("remapping", parts)

    def ram_block_remapped(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """They can be taken."""
        del block
        self._hear("remapped", parts)


KINDS = ["anonymous", "memfd", "punched file", "private file"]


@pytest.mark.parametrize("name", KINDS)
def test_the_device_and_the_process_have_fresh_pages_where_they_were_replaced(rig: Rig, file: int, name: str) -> None:
    """At the same address and IOVA; all others keep what they hold. A private mapping reads its file again."""
    os.pwrite(file, b"\x77" * MIB, 0)
    kinds: dict[str, MemoryKind] = {
        "anonymous": Anonymous(),
        "memfd": Memfd(),
        "punched file": File(file, punch=True),
        "private file": File(file, shared=False),
    }
    block = filled(rig, kinds[name])
    where = block.vaddr, rig.mapper.iova(block)
    block.remap(5 * PAGE_SIZE, 2 * PAGE_SIZE)
    fresh = 0x77 if name == "private file" else 0
    assert seen(rig, block) == [1, 2, 3, 4, 5, fresh, fresh, *range(8, 17)]
    assert (block.vaddr, rig.mapper.iova(block)) == where
    assert not rig.kernel.violations
    rig.check()
    block.resize(2 * LENGTH)
    block.resize(4 * PAGE_SIZE)
    rig.check()
    block.remove()


def test_no_page_is_replaced_while_a_device_reaches_it(rig: Rig) -> None:
    """Unmapped first, mapped last: the order of calls, as the kernel sees them."""
    block = filled(rig)
    rig.kernel.clear_trace()
    block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    names = requests(rig.kernel.trace)
    gone = next(number for number, call in enumerate(rig.kernel.trace) if call.request == "VFIO_IOMMU_UNMAP_DMA")
    assert gone < names.index("madvise") < len(names) - 1
    assert names[-1] == "VFIO_IOMMU_MAP_DMA"
    assert not rig.kernel.violations


def test_bytes_that_are_mapped_apart_from_the_page_stay_in_reach(kernel: SpecialKernel) -> None:
    """With granules no mapping but those of the page's granules goes, not even for a moment."""
    with Rig(kernel, mapper=GRANULE) as rig:
        block = filled(rig)
        iova = rig.mapper.iova(block)
        kernel.clear_trace()
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
        unmapped = [call.arguments for call in kernel.trace if call.request == "VFIO_IOMMU_UNMAP_DMA"]
        assert [(a["iova"], a["size"]) for a in unmapped] == [(iova + 4 * PAGE_SIZE, 4 * PAGE_SIZE)]
        assert seen(rig, block) == [1, 2, 3, 4, 5, 0, *range(7, 17)]


def test_a_mapper_that_allows_no_gap_replaces_whole_granules_only(kernel: SpecialKernel) -> None:
    """Else GapError before any call, with what to do."""
    mapper: MapperFactory = partial(pyvfio.DmaMapper, resize="extend", granule=4 * PAGE_SIZE, allow_gap=False)
    with Rig(kernel, mapper=mapper) as rig:
        block = filled(rig)
        kernel.clear_trace()
        with pytest.raises(pyvfio.GapError, match=r"12 KiB that stay .*Remap whole granules"):
            block.remap(5 * PAGE_SIZE, PAGE_SIZE)
        assert not kernel.trace
        block.remap(4 * PAGE_SIZE, 4 * PAGE_SIZE)
        assert seen(rig, block) == [1, 2, 3, 4, 0, 0, 0, 0, *range(9, 17)]


def test_discarded_parts_stay_out_of_reach(rig: Rig) -> None:
    """Their pages are replaced, too, and nobody is told of them."""
    if rig.mapper.policy.granule == 4 * PAGE_SIZE:
        start, size = 4 * PAGE_SIZE, 4 * PAGE_SIZE
    else:
        start, size = 5 * PAGE_SIZE, PAGE_SIZE
    block = filled(rig)
    block.discard(start, size)
    ctypes.memset(block.vaddr + start, 9, size)
    block.remap(0, LENGTH)
    assert block.discarded == (Extent(start, start + size),)
    assert ctypes.string_at(block.vaddr + start, 1) == b"\0"
    with pytest.raises(DmaFault):
        rig.kernel.dma_read(BDF, rig.mapper.iova(block) + start, 1)
    rig.check()


def test_whoever_refuses_to_let_go_keeps_the_pages_as_they_are(rig: Rig) -> None:
    """Those who have let go take them again; nothing is replaced."""
    rig.blocks.add_notifier(listener := Listener())
    block = filled(rig)
    before = rig.reached()
    listener.refuse = ["remapping"]  # told last: the mapper, the older one, has let go by then
    with pytest.raises(PermissionError, match="remapping"):
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    assert seen(rig, block) == list(range(1, 17))
    assert sum(size for *_where, size in rig.reached()) == sum(size for *_where, size in before)
    rig.check()
    rig.blocks.remove_notifier(listener)


def test_whoever_fails_to_take_the_new_pages_is_asked_once_more(rig: Rig) -> None:
    """What it raised is told, and the device reaches fresh pages."""
    block = filled(rig)
    maps = maps_of_a_remap(rig, block)
    ctypes.memset(block.vaddr + 5 * PAGE_SIZE, 9, PAGE_SIZE)
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=maps, errno=errno.ENOMEM)
    with pytest.raises(pyvfio.PinLimitError):
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    assert seen(rig, block) == [1, 2, 3, 4, 5, 0, *range(7, 17)]
    rig.check()


def test_a_device_that_cannot_have_the_pages_back_reaches_less_until_the_next_change(rig: Rig) -> None:
    """RollbackError says so. Remapped once more, or resized, it reaches the whole block again."""
    block = filled(rig)
    mends = (partial(block.remap, 5 * PAGE_SIZE, PAGE_SIZE), partial(block.resize, LENGTH + 4 * PAGE_SIZE))
    for mend in mends:
        first = maps_of_a_remap(rig, block)
        for nth in range(first, first + 12):
            rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=nth, errno=errno.ENOMEM)
        with pytest.raises(pyvfio.RollbackError, match="reach less of the block than the block has"):
            block.remap(5 * PAGE_SIZE, PAGE_SIZE)
        rig.kernel.clear_failures()
        rig.mapper._check()
        mend()
        assert seen(rig, block)[:7] == [1, 2, 3, 4, 5, 0, 7]
        rig.check()


def test_who_may_hold_pages_and_is_not_told_keeps_them_from_being_replaced(rig: Rig) -> None:
    """As SEV, which has registered them: refused before anything, with who it is."""

    class Registration:
        def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
            pass

        def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
            pass

    rig.blocks.add_notifier(other := Registration())
    block = filled(rig)
    rig.kernel.clear_trace()
    with pytest.raises(pyvfio.UnsupportedError, match=r"Registration.*may hold pages of RAM block 'ring'"):
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    assert not rig.kernel.trace
    rig.blocks.remove_notifier(other)
    block.remap(5 * PAGE_SIZE, PAGE_SIZE)


def test_a_listener_that_is_told_of_lengths_alone_does_not_keep_pages_from_being_replaced(rig: Rig) -> None:
    """Such a listener is not told of blocks, so it holds no page of them."""

    class Lengths:
        def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
            pass

    rig.blocks.add_notifier(Lengths())
    block = filled(rig)
    block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    assert seen(rig, block)[4:7] == [5, 0, 7]


def test_listeners_are_told_before_and_after_in_the_opposite_order(rig: Rig) -> None:
    """Of populated parts alone; the oldest lets go first, as of what is shrunk, and takes last."""
    told: list[tuple[str, str]] = []
    older, newer = Listener("older", told), Listener("newer", told)
    rig.blocks.add_notifier(older)
    rig.blocks.add_notifier(newer)
    block = filled(rig)
    block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    part = (Extent(5 * PAGE_SIZE, 6 * PAGE_SIZE),)
    assert older.told == newer.told == [("remapping", part), ("remapped", part)]
    assert told == [("older", "remapping"), ("newer", "remapping"), ("newer", "remapped"), ("older", "remapped")]
    rig.blocks.remove_notifier(newer)
    rig.blocks.remove_notifier(older)


@pytest.mark.parametrize(
    ("offset", "size", "words"),
    [
        (1, PAGE_SIZE, "must be a multiple"),
        (0, 1, "must be a multiple"),
        (-PAGE_SIZE, PAGE_SIZE, "must be a multiple of 4096 bytes and not negative"),
        (0, LENGTH + PAGE_SIZE, "not all in use"),
    ],
)
def test_a_part_that_can_never_be_right_is_refused_before_any_call(
    rig: Rig, offset: int, size: int, words: str
) -> None:
    """ValueError; and nothing at all is done for no bytes."""
    block = filled(rig)
    rig.kernel.clear_trace()
    with pytest.raises(ValueError, match=words):
        block.remap(offset, size)
    block.remap(PAGE_SIZE, 0)
    assert not rig.kernel.trace


def test_pages_that_cannot_be_had_are_an_error_with_what_to_do(rig: Rig, file: int) -> None:
    """The pool is empty, say; of a caller's file that is not to be punched nothing can be replaced at all."""
    block = filled(rig, Memfd())
    rig.kernel.fail(call="fallocate", nth=2, errno=errno.ENOSPC)
    with pytest.raises(pyvfio.IoctlError, match=r"4 KiB could not be allocated.*remap the range once more"):
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    rig.check()
    block.remove()
    block = filled(rig, File(file))
    rig.kernel.fail(call="madvise", nth=2, errno=errno.EFAULT)
    with pytest.raises(pyvfio.IoctlError, match=r"must not be punched; allow that with memory=File\(fd, punch=True\)"):
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
    assert seen(rig, block) == list(range(1, 17))
    rig.check()
    block.remove()


def test_a_removed_block_is_not_remapped(rig: Rig) -> None:
    """ClosedError."""
    block = filled(rig)
    block.remove()
    with pytest.raises(pyvfio.ClosedError):
        block.remap(0, PAGE_SIZE)


@pytest.mark.parametrize("memory", [Anonymous(), Memfd()], ids=["anonymous", "memfd"])
def test_what_is_discarded_stays_given_back_when_its_pages_are_replaced(
    kernel: SpecialKernel, memory: MemoryKind
) -> None:
    """A balloon's memory is not taken again from the machine; what is in use has its pages at once, of a memfd."""
    with Rig(kernel) as rig:
        block = filled(rig, memory)
        block.discard(4 * PAGE_SIZE, 4 * PAGE_SIZE)
        block.remap(0, LENGTH)
        there = sum(area.rss for area in areas(block.vaddr, LENGTH))
        if block.file is not None:
            there = os.fstat(block.file.fd).st_blocks * 512
        assert there == LENGTH - 4 * PAGE_SIZE


def test_pages_that_are_replaced_are_allocated_where_all_others_are(kernel: SpecialKernel) -> None:
    """A device that only reads would have the page of zeros, and keep it, whatever the process writes."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("rom", used_length=LENGTH, max_length=MIB, readonly=True, prealloc=1)
        block.remap(4 * PAGE_SIZE, 4 * PAGE_SIZE)
        assert sum(area.rss for area in areas(block.vaddr, LENGTH)) == LENGTH


def _populates_in_vain(rig: Rig, block: pyvfio.RamBlock) -> None:
    """The second page cannot be mapped, and the first not unmapped again."""
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=errno.ENOMEM)
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", nth=1, errno=errno.EIO)
    with pytest.raises(pyvfio.RollbackError):
        block.populate(0, 2 * PAGE_SIZE)
    rig.kernel.clear_failures()


def test_what_is_discarded_and_in_reach_since_an_undo_failed_keeps_its_pages(kernel: SpecialKernel) -> None:
    """Nobody is told of discarded parts, so that nobody would let go. Populated in the end, they can be replaced."""
    with Rig(kernel, mapper=PAGES) as rig:
        block = filled(rig)
        block.discard(0, 4 * PAGE_SIZE)
        _populates_in_vain(rig, block)
        assert len(rig.reached()) == 13
        kernel.clear_trace()
        with pytest.raises(pyvfio.DiscardError, match=r"8 KiB of RAM block 'ring' are discarded.*Populate these parts"):
            block.remap(0, 4 * PAGE_SIZE)
        assert not kernel.trace
        block.remap(2 * PAGE_SIZE, 4 * PAGE_SIZE)
        block.populate(0, 2 * PAGE_SIZE)
        block.discard(PAGE_SIZE, PAGE_SIZE)
        block.remap(0, 4 * PAGE_SIZE)
        assert not kernel.violations
        rig.check()


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_a_shrink_ends_the_doubt_about_the_parts_that_it_removes(kernel: SpecialKernel, pages: int) -> None:
    """No device reaches them any more, and they are not discarded when they come back. The doubt about others stays."""
    with Rig(kernel, mapper=PAGES) as rig:
        block = filled(rig)
        block.discard(0, 4 * PAGE_SIZE)
        _populates_in_vain(rig, block)
        block.resize(pages * PAGE_SIZE)
        rig.check()
        assert block.state.doubtful == tuple(clip([(0, 2 * PAGE_SIZE)], 0, pages * PAGE_SIZE))
        block.resize(8 * PAGE_SIZE)
        block.remap(pages * PAGE_SIZE, (8 - pages) * PAGE_SIZE)
        rig.check()
        with pytest.raises(pyvfio.DiscardError) if pages else nullcontext():
            block.remap(0, 8 * PAGE_SIZE)
        assert not kernel.violations


def test_a_block_whose_grow_could_not_be_undone_is_remapped_where_it_is_in_use(kernel: SpecialKernel) -> None:
    """Memory is held for what a device may reach behind the end; it has let go of all that is replaced."""
    with Rig(kernel, mapper=PAGES) as rig:
        block = filled(rig)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=2, errno=errno.ENOMEM)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", nth=1, errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError):
            block.resize(LENGTH + 4 * PAGE_SIZE)
        kernel.clear_failures()
        block.remap(5 * PAGE_SIZE, PAGE_SIZE)
        assert seen(rig, block) == [1, 2, 3, 4, 5, 0, *range(7, 17)]
        assert not kernel.violations
        rig.check()
        block.resize(LENGTH + 4 * PAGE_SIZE)
        rig.check()


def test_pages_are_replaced_in_a_container_that_takes_no_more_mappings() -> None:
    """The block's one piece goes and comes as a whole, as a resize would have it, unless no gap is allowed."""
    with FakeKernel(iommu=small_iommu(1)) as kernel, nothing_left(kernel):
        with Rig(kernel, mapper=EXTEND) as rig:
            block = filled(rig)
            block.remap(5 * PAGE_SIZE, PAGE_SIZE)
            assert seen(rig, block) == [1, 2, 3, 4, 5, 0, *range(7, 17)]
            assert len(rig.reached()) == 1
            assert not kernel.violations
            rig.check()
        with Rig(kernel, mapper=partial(pyvfio.DmaMapper, resize="extend", allow_gap=False)) as rig:
            block = filled(rig)
            with pytest.raises(pyvfio.GapError):
                block.remap(5 * PAGE_SIZE, PAGE_SIZE)


def test_pages_of_a_file_that_was_sealed_meanwhile_stay_and_the_error_says_why(kernel: SpecialKernel) -> None:
    """More memory would not help."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, MIB)
    with Rig(kernel) as rig:
        block = filled(rig, File(fd, punch=True))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        with pytest.raises(pyvfio.IoctlError, match=r"EPERM.*may have been sealed meanwhile"):
            block.remap(0, PAGE_SIZE)
        assert seen(rig, block) == list(range(1, 17))
        rig.check()
    os.close(fd)
