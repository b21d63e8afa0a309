"""Memory is populated before it is mapped, by several threads, and whoever waits is told how far it has come."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from functools import partial

import pytest

import pyvfio
from pyvfio import Progress
from pyvfio.kernel import MADV_POPULATE_WRITE
from pyvfio.memory.prefault import SLICE, check_threads, populate
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, PRIVATE, READ_WRITE, Interrupt, Rig, SpecialKernel

PREFAULTS = partial(pyvfio.DmaMapper, prefault=1)
IN_GRANULES = partial(pyvfio.DmaMapper, resize="extend", granule=2 * MIB)


class PopulatingKernel(SpecialKernel):
    """Knows what it was told to populate, and by which thread. With `together`, two such calls wait for each other."""

    def __init__(self, *, together: bool = False) -> None:
        super().__init__(groups=[(2, [FakeDevice(BDF)])])
        self.populated: list[tuple[int, int]] = []
        self.done: list[tuple[int, int]] = []
        self.threads: set[int] = set()
        self._barrier = threading.Barrier(2) if together else None

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """As told."""
        if advice == MADV_POPULATE_WRITE:
            self.populated.append((vaddr, size))
            self.threads.add(threading.get_ident())
            if self._barrier is not None:
                self._barrier.wait(timeout=300)
        super().madvise(vaddr, size, advice)
        if advice == MADV_POPULATE_WRITE:
            self.done.append((vaddr, size))


@pytest.fixture
def kernel() -> Iterator[PopulatingKernel]:
    """With one device."""
    with PopulatingKernel() as made:
        yield made


def calls(kernel: SpecialKernel) -> list[str]:
    """What was populated and mapped, in order."""
    names = {"VFIO_IOMMU_MAP_DMA": "map", "VFIO_IOMMU_UNMAP_DMA": "unmap"}
    found = []
    for call in kernel.trace:
        if call.request in names:
            found.append(names[call.request])
        elif call.call == "madvise" and MADV_POPULATE_WRITE in call.arguments.values():
            found.append("populate")
    return found


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, ["populate", "unmap", "map"]),
        ({"resize": "extend"}, ["populate", "map"]),
        ({"resize": "extend", "granule": 2 * MIB}, ["populate", "map", "map"]),
    ],
    ids=["remap", "extend", "granule"],
)
def test_what_is_new_is_populated_before_anything_is_unmapped_or_mapped(
    kernel: PopulatingKernel, policy: dict[str, object], expected: list[str]
) -> None:
    """Not what was mapped before, and not what is given back: so that a remap's gap is no longer than it must be."""
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, prefault=1, **policy)) as rig:  # type: ignore[arg-type]
        block = rig.add(used=4 * MIB, maximum=64 * MIB)
        kernel.clear_trace()
        kernel.populated.clear()
        block.resize(8 * MIB)
        assert calls(kernel) == expected
        assert kernel.populated == [(block.vaddr + 4 * MIB, 4 * MIB)]
        block.resize(2 * MIB)
        assert kernel.populated == [(block.vaddr + 4 * MIB, 4 * MIB)]
        rig.check()


def test_what_was_discarded_is_populated_when_it_comes_back(kernel: PopulatingKernel) -> None:
    """And nothing else of the block."""
    with Rig(kernel, mapper=partial(PREFAULTS, resize="extend", granule=PAGE_SIZE)) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        block.discard(PAGE_SIZE, PAGE_SIZE)
        kernel.populated.clear()
        block.populate(0, 4 * PAGE_SIZE)
        assert kernel.populated == [(block.vaddr + PAGE_SIZE, PAGE_SIZE)]


def test_without_prefault_nothing_is_populated(kernel: PopulatingKernel) -> None:
    """The map does it."""
    with Rig(kernel) as rig:
        rig.add(used=4 * MIB, maximum=64 * MIB)
        assert kernel.populated == []


@pytest.mark.long
def test_several_threads_populate_at_once() -> None:
    """Two calls that wait for each other both come to their end; the slices make up what is new, each once."""
    two = partial(pyvfio.DmaMapper, prefault=2)
    with PopulatingKernel(together=True) as kernel, Rig(kernel, mapper=two) as rig:
        block = rig.add(used=2 * SLICE, maximum=4 * SLICE)
        assert sorted(kernel.populated) == [(block.vaddr, SLICE), (block.vaddr + SLICE, SLICE)]
        assert len(kernel.threads) == 2
        rig.check()


def test_slices_begin_at_multiples_of_their_size(kernel: PopulatingKernel) -> None:
    """So that no large page is cut in two."""
    with Rig(kernel, mapper=PREFAULTS) as rig:
        block = rig.add(used=PAGE_SIZE, maximum=4 * SLICE)
        kernel.populated.clear()
        block.resize(2 * SLICE + PAGE_SIZE)
        start = block.vaddr
        assert kernel.populated == [
            (start + PAGE_SIZE, SLICE - PAGE_SIZE),
            (start + SLICE, SLICE),
            (start + 2 * SLICE, PAGE_SIZE),
        ]


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_cannot_be_had_is_an_error_before_anything_is_mapped(
    kernel: PopulatingKernel, threads: int
) -> None:
    """With a hint; the block is as it was, and grows when there is memory again."""
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, prefault=threads)) as rig:
        block = rig.add(used=2 * MIB, maximum=4 * SLICE)
        kernel.clear_trace()
        kernel.fail(call="madvise", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError, match=r"madvise.*ENOMEM.*could not be populated.*memory\.max"):
            block.resize(3 * SLICE)
        assert block.used_length == 2 * MIB
        assert "map" not in calls(kernel)
        rig.check()
        block.resize(3 * SLICE)
        assert rig.reached() == rig.expected()


def test_a_kernel_that_cannot_populate_maps_all_the_same(kernel: PopulatingKernel) -> None:
    """EINVAL, before 5.14: the map zeroes the pages then."""
    with Rig(kernel, mapper=PREFAULTS) as rig:
        block = rig.add(used=2 * MIB, maximum=64 * MIB)
        kernel.fail(call="madvise", errno=errno.EINVAL)
        block.resize(8 * MIB)
        assert rig.reached() == rig.expected()
        rig.check()


def test_a_negative_number_of_threads_is_refused(kernel: PopulatingKernel) -> None:
    """Before anything is mapped."""
    with Rig(kernel) as rig, pytest.raises(ValueError, match="a number of threads from 0 to 1024, not -1"):
        pyvfio.DmaMapper(rig.container, prefault=-1)


# ------------------------------------------------------------------------------------------------------- progress


def test_each_piece_is_reported_when_it_is_done(kernel: PopulatingKernel) -> None:
    """Populated, mapped and unmapped bytes, each from what it begins with to the whole."""
    told: list[Progress] = []
    with Rig(kernel, mapper=partial(IN_GRANULES, prefault=1, progress=told.append)) as rig:
        block = rig.add(used=0, maximum=64 * MIB)
        block.resize(6 * MIB)
        assert told == [
            Progress(block, "prefault", 6 * MIB, 6 * MIB),
            *(Progress(block, "map", done * 2 * MIB, 6 * MIB) for done in (1, 2, 3)),
        ]
        told.clear()
        block.resize(2 * MIB)
        assert told == [Progress(block, "unmap", 4 * MIB, 4 * MIB)]
        told.clear()
        block.remove()
        assert told == [Progress(block, "unmap", 2 * MIB, 2 * MIB)]


@pytest.mark.parametrize("by", ["list", "mapper"])
def test_populated_memory_is_reported_part_by_part(kernel: PopulatingKernel, by: str) -> None:
    """The bytes that have pages by then, and the bytes of all parts; by whoever populates them."""
    told: list[Progress] = []
    mapper = partial(PREFAULTS, progress=told.append) if by == "mapper" else pyvfio.DmaMapper
    with Rig(kernel, mapper=mapper) as rig:
        block = rig.blocks.add(
            "ring",
            used_length=8 * PAGE_SIZE,
            max_length=MIB,
            prealloc=int(by == "list"),
            progress=told.append if by == "list" else None,
        )
        for offset, size in ((0, PAGE_SIZE), (3 * PAGE_SIZE, 3 * PAGE_SIZE)):
            block.discard(offset, size)
        told.clear()
        block.populate(0, 8 * PAGE_SIZE)
        assert [progress for progress in told if progress.step == "prefault"] == [
            Progress(block, "prefault", PAGE_SIZE, 4 * PAGE_SIZE),
            Progress(block, "prefault", 4 * PAGE_SIZE, 4 * PAGE_SIZE),
        ]


def test_a_callback_that_raises_ends_the_change_between_pieces(kernel: PopulatingKernel) -> None:
    """Two of four pieces were mapped, and are unmapped again; the block is as it was."""

    def enough(progress: Progress) -> None:
        if progress.done == 4 * MIB:
            raise Interrupt

    with Rig(kernel, mapper=partial(IN_GRANULES, progress=enough)) as rig:
        block = rig.add(used=0, maximum=64 * MIB)
        kernel.clear_trace()
        with pytest.raises(Interrupt):
            block.resize(8 * MIB)
        assert calls(kernel) == ["map", "map", "unmap"]
        assert (block.used_length, rig.reached()) == (0, [])
        rig.check()
        block.resize(2 * MIB)
        assert rig.reached() == rig.expected()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_callback_that_raises_while_memory_is_populated_leaves_the_block_as_it_was(
    kernel: PopulatingKernel, threads: int
) -> None:
    """Calls that are under way come to their end first; those that are not are never made."""

    def enough(progress: Progress) -> None:
        raise Interrupt

    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, prefault=threads, progress=enough)) as rig:
        block = rig.add(used=0, maximum=16 * SLICE)
        with pytest.raises(Interrupt):
            block.resize(16 * SLICE)
        made = len(kernel.populated)
        assert 1 <= made < 16
        assert sorted(kernel.done) == sorted(kernel.populated), "a call is still under way"
        assert (block.used_length, rig.reached()) == (0, [])
        rig.check()
        assert resident(block.vaddr, 16 * SLICE) == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_a_signal_ends_preallocation_after_the_slice(kernel: PopulatingKernel, threads: int) -> None:
    """The handler runs between two slices, and what it raises is undone as a refusal."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=MIB, max_length=16 * SLICE, prealloc=threads)
        kernel.interrupt_at(2, after=False)  # the first slice, behind the mprotect
        with pytest.raises(Interrupt):
            block.resize(16 * SLICE)
        assert 2 <= len(kernel.populated) < 16
        assert sorted(kernel.done) == sorted(kernel.populated), "a call is still under way"
        assert (block.used_length, resident(block.vaddr, 16 * SLICE)) == (MIB, MIB)
        block._check()


@pytest.mark.parametrize("touch", [True, False])
def test_memory_that_cannot_be_populated_at_once_is_touched_if_that_is_asked_for(
    kernel: PopulatingKernel, *, touch: bool
) -> None:
    """EINVAL is what kernels before 5.14 say. Contents stay, each part is counted, and each slice reported."""
    vaddr = kernel.mmap(0, 3 * SLICE, READ_WRITE, PRIVATE)
    kernel.madvise(vaddr, 3 * SLICE, mmap.MADV_NOHUGEPAGE)
    ctypes.memset(vaddr + MIB, 0x5A, 1)
    for nth in (1, 2):
        kernel.fail(call="madvise", errno=errno.EINVAL, nth=nth)
    reported: list[tuple[int, int]] = []
    parts = [(0, 2 * MIB), (SLICE, SLICE + MIB), (2 * SLICE, 2 * SLICE + 4 * PAGE_SIZE)]
    populate(
        kernel,
        parts,
        vaddr=vaddr,
        threads=1,
        report=lambda done, total: reported.append((done, total)),
        touch=touch,
    )
    total = 3 * MIB + 4 * PAGE_SIZE
    assert reported == [(2 * MIB, total), (3 * MIB, total), (total, total)]
    assert [resident(vaddr + start, end - start) for start, end in parts] == (
        [2 * MIB, MIB, 4 * PAGE_SIZE] if touch else [PAGE_SIZE, 0, 4 * PAGE_SIZE]
    )
    assert ctypes.string_at(vaddr + MIB, 2) == b"\x5a\0"
    kernel.munmap(vaddr, 3 * SLICE)


@pytest.mark.parametrize(("threads", "slices", "own"), [(0, 2, True), (1, 2, True), (8, 1, True), (2, 2, False)])
def test_threads_are_made_only_where_there_is_work_for_two(
    kernel: PopulatingKernel, threads: int, slices: int, *, own: bool
) -> None:
    """Else the caller's does it."""
    vaddr = kernel.mmap(0, 2 * SLICE, READ_WRITE, PRIVATE)
    parts = [(index * SLICE, index * SLICE + PAGE_SIZE) for index in range(slices)]
    populate(kernel, parts, vaddr=vaddr, threads=threads)
    assert (kernel.threads == {threading.get_ident()}) == own
    assert sorted(kernel.done) == [(vaddr + start, PAGE_SIZE) for start, _end in parts]
    kernel.munmap(vaddr, 2 * SLICE)


@pytest.mark.parametrize("threads", [0, 1, 1024])
def test_a_number_of_threads_can_be_none_and_has_a_limit(threads: int) -> None:
    """Beyond which it can only be a mistake."""
    assert check_threads(threads, "prefault") == threads
    for wrong in (-1, 1025):
        with pytest.raises(ValueError, match=f"prefault must be a number of threads from 0 to 1024, not {wrong}"):
            check_threads(wrong, "prefault")


def resident(vaddr: int, size: int) -> int:
    """Return how many bytes of this process's memory there have pages (/proc/self/pagemap).

    Bit 63 is for a page that is present. Bit 62 is for a page that is swapped out, or that the kernel is migrating at
    this moment: compaction moves pages whenever another process needs contiguous memory.
    """
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(vaddr // PAGE_SIZE * 8)
        entries = memoryview(pagemap.read(size // PAGE_SIZE * 8)).cast("Q")
        return sum(entry >> 62 != 0 for entry in entries) * PAGE_SIZE


def test_populated_memory_has_pages(kernel: PopulatingKernel) -> None:
    """The kernel says so, and that the memory of a block in no mapper has none."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=4 * MIB, max_length=64 * MIB)
        assert resident(block.vaddr, 4 * MIB) == 0
        with pyvfio.open_device(BDF, kernel=kernel) as device, PREFAULTS(device.container, blocks):
            assert resident(block.vaddr, 4 * MIB) == 4 * MIB


# ------------------------------------------------------------------------------------------------------- prealloc


def test_preallocated_memory_has_pages_before_anybody_is_told(kernel: PopulatingKernel) -> None:
    """When the block is made, when it grows and when a part comes back; whoever waits hears how far it is."""
    told: list[Progress] = []

    class Listener:
        """Looks whether there are pages."""

        def ram_block_resized(self, block: pyvfio.RamBlock, old: int, new: int) -> None:
            """They are there already."""
            assert resident(block.vaddr, max(old, new)) == max(old, new)

    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        blocks.add_notifier(Listener())
        block = blocks.add("ring", used_length=MIB, max_length=64 * MIB, prealloc=1, progress=told.append)
        assert resident(block.vaddr, MIB) == MIB
        block.resize(4 * MIB)
        assert told == [Progress(block, "prefault", MIB, MIB), Progress(block, "prefault", 3 * MIB, 3 * MIB)]
        block.discard(0, MIB)
        assert resident(block.vaddr, MIB) == 0
        block.populate(0, MIB)
        assert resident(block.vaddr, MIB) == MIB
        block.resize(2 * MIB)


def test_several_threads_preallocate_at_once() -> None:
    """Two calls that wait for each other both come to their end."""
    with PopulatingKernel(together=True) as kernel, pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=2 * SLICE, max_length=4 * SLICE, prealloc=2)
        assert len(kernel.threads) == 2
        block.resize(4 * SLICE)
        assert sorted(kernel.populated) == [(block.vaddr + number * SLICE, SLICE) for number in range(4)]


@pytest.mark.parametrize("memory", [pyvfio.Anonymous(), pyvfio.Memfd()], ids=["anonymous", "memfd"])
def test_nothing_is_kept_of_pages_that_were_not_all_to_be_had(
    kernel: PopulatingKernel, memory: pyvfio.Anonymous | pyvfio.Memfd
) -> None:
    """The second of three slices fails: the first is given back, and nobody was told."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=MIB, max_length=4 * SLICE, memory=memory, prealloc=1)
        kernel.fail(call="madvise", errno=errno.ENOMEM, nth=2)
        with pytest.raises(pyvfio.IoctlError, match="could not be populated"):
            block.resize(3 * SLICE)
        assert block.used_length == MIB
        assert resident(block.vaddr, 4 * SLICE) == MIB
        block._check()
        block.resize(2 * SLICE)
        assert resident(block.vaddr, 2 * SLICE) == 2 * SLICE


def made_of(kernel: SpecialKernel) -> list[str]:
    """The calls that allocate memory and give it back, in order, without the settings of a block."""
    names = ("fallocate", "ftruncate", "mprotect")
    return [call.call for call in kernel.trace if call.call in names or MADV_POPULATE_WRITE in call.arguments.values()]


@pytest.mark.long
def test_several_threads_allocate_the_pages_of_a_memfd() -> None:
    """The file is extended, and each slice is populated by itself: fallocate would allocate all in one thread."""
    with PopulatingKernel(together=True) as kernel, pyvfio.RamBlockList(kernel=kernel) as blocks:
        memory = pyvfio.Memfd()
        block = blocks.add("ring", used_length=2 * SLICE, max_length=4 * SLICE, memory=memory, prealloc=2)
        assert len(kernel.threads) == 2
        assert made_of(kernel) == ["ftruncate", "mprotect", "madvise", "madvise"]
        kernel.clear_trace()
        block.resize(4 * SLICE)
        assert made_of(kernel) == ["ftruncate", "mprotect", "madvise", "madvise"]
        assert resident(block.vaddr, 4 * SLICE) == 4 * SLICE
        assert block.file is not None
        assert os.fstat(block.file.fd).st_size == 4 * SLICE
        block._check()


@pytest.mark.parametrize("number", [None, errno.EFAULT], ids=["populated", "not populated"])
def test_a_memfd_that_is_whole_is_allocated_by_fallocate(kernel: PopulatingKernel, number: int | None) -> None:
    """Its memory is never given back, so threads must not leave a part without pages."""

    class Fixed:
        """Cannot follow a resize."""

        def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
            """Nothing."""

    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        blocks.add_notifier(Fixed())
        if number is not None:
            kernel.fail(call="madvise", errno=number, nth=3)  # after the settings of the block
        memory = pyvfio.Memfd()
        add = partial(blocks.add, "ring", used_length=SLICE, max_length=2 * SLICE, memory=memory, prealloc=2)
        if number is None:
            assert add().whole
            assert made_of(kernel)[:2] == ["fallocate", "mprotect"]
        else:
            with pytest.raises(pyvfio.IoctlError, match="could not be populated"):
                add()
            assert not kernel.planned_failures
            assert len(blocks) == 0


def test_pages_of_a_file_of_a_caller_are_allocated_by_fallocate(kernel: PopulatingKernel) -> None:
    """What threads had allocated before a failure would stay in the file, which is not the block's to punch."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        memory = pyvfio.File(fd, grow=True)
        block = blocks.add("ring", used_length=SLICE, max_length=2 * SLICE, memory=memory, prealloc=2)
        block.resize(2 * SLICE)
        assert [name for name in made_of(kernel) if name != "madvise"] == ["fallocate", "mprotect"] * 2
        assert resident(block.vaddr, 2 * SLICE) == 2 * SLICE
    os.close(fd)


def test_one_thread_allocates_the_pages_of_a_memfd_by_fallocate(kernel: PopulatingKernel) -> None:
    """Extending the file and touching each page takes one thread longer."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        blocks.add("ring", used_length=SLICE, max_length=SLICE, memory=pyvfio.Memfd(), prealloc=1)
        assert made_of(kernel) == ["fallocate", "mprotect", "madvise"]


@pytest.mark.long
@pytest.mark.parametrize("number", [errno.EFAULT, errno.ENOMEM, errno.EINVAL], ids=errno.errorcode.get)
def test_pages_of_a_memfd_that_threads_cannot_allocate_are_allocated_by_fallocate(
    kernel: PopulatingKernel, number: int
) -> None:
    """Whatever the reason: missing pages (EFAULT), a kernel that cannot populate. The first slice is given back."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        memory = pyvfio.Memfd()
        block = blocks.add("ring", used_length=MIB, max_length=4 * SLICE, memory=memory, prealloc=2)
        kernel.clear_trace()
        kernel.fail(call="madvise", errno=number, nth=2)
        block.resize(3 * SLICE)
        assert kernel.planned_failures == ()
        assert [name for name in made_of(kernel) if name != "madvise"] == [
            *("ftruncate", "mprotect"),
            "ftruncate",
            *("fallocate", "mprotect"),
        ]
        assert resident(block.vaddr, 3 * SLICE) == 3 * SLICE
        block._check()


def test_what_fallocate_says_of_missing_pages_is_the_error(kernel: PopulatingKernel) -> None:
    """A fault says nothing of the reason. The block is as before."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        memory = pyvfio.Memfd()
        block = blocks.add("ring", used_length=MIB, max_length=4 * SLICE, memory=memory, prealloc=2)
        kernel.fail(call="madvise", errno=errno.EFAULT, nth=1)
        kernel.fail(call="fallocate", errno=errno.ENOSPC, nth=1)
        with pytest.raises(pyvfio.IoctlError) as caught:
            block.resize(3 * SLICE)
        assert (caught.value.errno, caught.value.request) == (errno.ENOSPC, "fallocate")
        assert block.used_length == MIB
        assert resident(block.vaddr, 4 * SLICE) == MIB
        assert block.file is not None
        assert os.fstat(block.file.fd).st_size == MIB
        block._check()


def test_memory_that_threads_could_not_allocate_nor_give_back_is_allocated_by_fallocate(
    kernel: PopulatingKernel,
) -> None:
    """What was not given back counts as old contents, and is cleared after fallocate: a clear of no page is SIGBUS."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        memory = pyvfio.Memfd()
        block = blocks.add("ring", used_length=MIB, max_length=4 * SLICE, memory=memory, prealloc=2)
        kernel.fail(call="madvise", errno=errno.EFAULT, nth=1)
        kernel.fail(call="mmap", errno=errno.ENOMEM, nth=1)
        block.resize(3 * SLICE)
        assert kernel.planned_failures == ()
        with block.view() as view:
            assert not any(view[::PAGE_SIZE])
        block._check()


@pytest.mark.long
@pytest.mark.parametrize("operation", ["add", "grow"])
def test_a_callback_that_ends_an_allocation_by_threads_leaves_nothing(kernel: PopulatingKernel, operation: str) -> None:
    """After the first slice."""
    ending = operation == "add"

    def tell(_progress: Progress) -> None:
        if ending:
            raise Interrupt

    memory = pyvfio.Memfd()
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        add = partial(blocks.add, "ring", max_length=4 * SLICE, memory=memory, prealloc=2, progress=tell)
        if operation == "add":
            with pytest.raises(Interrupt):
                add(used_length=3 * SLICE)
            assert len(blocks) == 0
            return
        block = add(used_length=MIB)
        ending = True
        with pytest.raises(Interrupt):
            block.resize(3 * SLICE)
        assert block.used_length == MIB
        assert resident(block.vaddr, 4 * SLICE) == MIB
        block._check()
        ending = False
        block.resize(3 * SLICE)


@pytest.mark.long
def test_pages_that_a_shrink_has_left_are_zeros_again_when_threads_allocate(kernel: PopulatingKernel) -> None:
    """The file cannot be truncated, so what is behind the block holds old contents."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        memory = pyvfio.Memfd()
        block = blocks.add("ring", used_length=2 * SLICE, max_length=4 * SLICE, memory=memory, prealloc=2)
        with block.view() as view:
            view[SLICE : SLICE + 4] = b"left"
        kernel.fail(call="ftruncate", errno=errno.EPERM, nth=1)
        with pytest.warns(pyvfio.MemoryNotReturnedWarning):
            block.resize(MIB)
        assert kernel.planned_failures == ()
        kernel.clear_trace()
        block.resize(4 * SLICE)
        assert "fallocate" in made_of(kernel)  # clearing memory without pages would be SIGBUS where memory is short
        with block.view() as view:
            assert bytes(view[SLICE : SLICE + 4]) == bytes(4)
        block._check()


@pytest.mark.long
def test_a_kernel_that_cannot_populate_has_each_page_touched(kernel: PopulatingKernel) -> None:
    """And what is in a page stays."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=64 * MIB, prealloc=1)
        with block.view() as view:
            view[:] = b"x" * len(view)
        for nth in range(1, 3):
            kernel.fail(call="madvise", errno=errno.EINVAL, nth=nth)
        block.resize(2 * SLICE)
        kernel.clear_failures()
        assert resident(block.vaddr, 2 * SLICE) == 2 * SLICE
        with block.view() as view:
            assert bytes(view[: 2 * PAGE_SIZE]) == b"x" * 2 * PAGE_SIZE
            assert not any(view[2 * PAGE_SIZE :])


def test_a_page_that_is_touched_goes_on_holding_what_its_file_holds(kernel: PopulatingKernel) -> None:
    """It is written, with what is in it: it was another's before the block came."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    os.pwrite(fd, b"x" * 4 * PAGE_SIZE, 0)
    with pyvfio.RamBlockList(kernel=kernel) as blocks:
        kernel.fail(call="madvise", nth=3, errno=errno.EINVAL)  # after the settings of the block
        memory = pyvfio.File(fd)
        block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=4 * PAGE_SIZE, memory=memory, prealloc=1)
        assert not kernel.planned_failures
        with block.view() as view:
            assert bytes(view) == b"x" * 2 * PAGE_SIZE
    os.close(fd)


def test_a_negative_number_of_threads_preallocates_nothing(kernel: PopulatingKernel) -> None:
    """Refused."""
    with (
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pytest.raises(ValueError, match="number of threads from 0 to 1024, not -2"),
    ):
        blocks.add("ring", used_length=0, max_length=MIB, prealloc=-2)
