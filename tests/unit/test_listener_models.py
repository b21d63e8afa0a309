"""The listeners that the series names, beside a mapper: what each is told, and what a device reaches meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio import DirtyTracking, Memfd, RamBlock
from pyvfio.memory import MemoryKind
from pyvfio.testing import DmaFault
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, Rig, SpecialKernel
from tests.unit.listener_models import (
    Hax,
    MapCache,
    MigrationError,
    Page,
    PostcopyTarget,
    PrecopySource,
    Sev,
    guest_memory,
)

IOVA = 0x4_0000_0000


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """A device, and blocks that its mapper follows."""
    with Rig(kernel) as made:
        yield made
        made.check()


def reaches(rig: Rig, block: RamBlock, page: int) -> bool:
    """Whether the device reads and writes a page through the mapper, as the process sees it."""
    iova = rig.mapper.iova(block) + page * PAGE_SIZE
    sent = os.urandom(16)
    try:
        rig.kernel.dma_write(BDF, iova, sent)
    except DmaFault:
        return False
    with block.view() as view:
        assert bytes(view[page * PAGE_SIZE : page * PAGE_SIZE + 16]) == sent
    assert rig.kernel.dma_read(BDF, iova, 16) == sent
    return True


def reached_pages(rig: Rig, block: RamBlock) -> list[int]:
    """All of them, up to `max_length`."""
    return [page for page in range(block.max_length // PAGE_SIZE) if reaches(rig, block, page)]


# --------------------------------------------------------------------------------------------------------------- SEV


def test_sev_reaches_all_of_a_block_for_good_and_the_mapper_what_is_used(rig: Rig, kernel: SpecialKernel) -> None:
    """Through every resize, and neither when the block is gone."""
    sev = Sev(rig.container, IOVA)
    rig.blocks.add_notifier(sev)
    block = rig.add(used=2 * PAGE_SIZE, maximum=8 * PAGE_SIZE)
    iova = rig.mapper.iova(block)
    for length in (2, 5, 0, 8, 1):
        block.resize(length * PAGE_SIZE)
        assert reached_pages(rig, block) == list(range(length))
        for page in range(8):
            kernel.dma_write(BDF, IOVA + page * PAGE_SIZE, b"sev")
        kernel.check()
    block.remove()
    assert sev.registered == {}
    for gone in (iova, IOVA):
        with pytest.raises(DmaFault):
            kernel.dma_read(BDF, gone, 1)
    rig.blocks.remove_notifier(sev)


@pytest.mark.parametrize("first", [False, True], ids=["told first", "told after the mapper"])
def test_a_block_that_sev_cannot_register_does_not_come(rig: Rig, kernel: SpecialKernel, *, first: bool) -> None:
    """In place of the end of the program; the mapper, told before it or not at all, reaches nothing."""
    sev = Sev(rig.container, IOVA)
    rig.blocks.add_notifier(sev)
    if first:  # whoever comes last is told first
        rig.blocks.remove_notifier(rig.mapper)
        rig.blocks.add_notifier(rig.mapper)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=1 + first)
    with pytest.raises(pyvfio.PinLimitError):
        rig.add(used=PAGE_SIZE, maximum=8 * PAGE_SIZE)
    assert (len(rig.blocks), rig.reached(), sev.registered) == (0, [], {})
    block = rig.add(used=PAGE_SIZE, maximum=8 * PAGE_SIZE)
    assert reached_pages(rig, block) == [0]
    rig.blocks.remove_notifier(sev)


def test_nothing_is_discarded_under_sev(rig: Rig) -> None:
    """It reaches whole blocks."""
    sev = Sev(rig.container, IOVA)
    rig.blocks.add_notifier(sev)
    block = rig.add(used=2 * PAGE_SIZE, maximum=8 * PAGE_SIZE)
    with pytest.raises(pyvfio.DiscardError, match="Sev"):
        block.discard(0, PAGE_SIZE)
    assert reached_pages(rig, block) == [0, 1]
    rig.blocks.remove_notifier(sev)


# --------------------------------------------------------------------------------------------------------------- HAX


@pytest.mark.parametrize("memory", [None, Memfd()], ids=["anonymous", "memfd"])
def test_hax_can_touch_all_it_was_given_and_is_told_nothing_more(rig: Rig, memory: MemoryKind | None) -> None:
    """The mapper beside it reaches what is used."""
    hax = Hax()
    rig.blocks.add_notifier(hax)
    rig.memory_kind = memory
    block = rig.add(used=2 * PAGE_SIZE, maximum=8 * PAGE_SIZE)
    assert block.whole
    for length in (5, 0, 8, 1):
        block.resize(length * PAGE_SIZE)
        hax.touch()
        assert reached_pages(rig, block) == list(range(length))
    assert len(hax.blocks) == 1


def test_hax_hears_nothing_of_a_block_that_goes_or_did_not_come(rig: Rig, kernel: SpecialKernel) -> None:
    """It has no hook for that: its accelerator must not be asked to touch what it had. The others are as they were."""
    hax = Hax()
    rig.blocks.add_notifier(hax)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.PinLimitError):
        rig.add(maximum=MIB)
    rig.add(maximum=MIB).remove()
    assert len(hax.blocks) == 2
    assert (len(rig.blocks), rig.reached()) == (0, [])
    kernel.check()
    rig.blocks.remove_notifier(hax)
    assert not rig.add("resizable").whole


# ----------------------------------------------------------------------------------------------------- Xen's map cache


def test_a_device_reaches_a_guests_memory_by_the_entries_of_the_map_cache(rig: Rig, kernel: SpecialKernel) -> None:
    """As long as they are mapped. The memory is the guest's before, meanwhile and after; entries have one size."""
    guest = guest_memory(MIB)
    cache = MapCache(rig.blocks, guest)
    own = rig.add("own", used=PAGE_SIZE)
    entry, offset = cache.map(MapCache.ENTRY + 5 * PAGE_SIZE)
    assert (entry.used_length, entry.max_length, entry.whole) == (MapCache.ENTRY, MapCache.ENTRY, False)
    iova = rig.mapper.iova(entry) + offset
    kernel.dma_write(BDF, iova, b"for the guest")
    assert os.pread(guest, 13, MapCache.ENTRY + 5 * PAGE_SIZE) == b"for the guest"
    assert cache.map(MapCache.ENTRY)[0] is entry
    for length in (0, PAGE_SIZE):
        with pytest.raises(pyvfio.UnsupportedError, match="has one size"):
            entry.resize(length)
    with pytest.raises(ValueError, match="above max_length"):
        entry.resize(2 * MapCache.ENTRY)
    assert reached_pages(rig, entry) == list(range(16))
    own.resize(3 * PAGE_SIZE)
    assert reached_pages(rig, own) == [0, 1, 2]
    os.pwrite(guest, b"from the guest", MapCache.ENTRY + 5 * PAGE_SIZE)
    assert kernel.dma_read(BDF, iova, 14) == b"from the guest"
    cache.invalidate()
    with pytest.raises(DmaFault):
        kernel.dma_read(BDF, iova, 1)
    assert os.pread(guest, 14, MapCache.ENTRY + 5 * PAGE_SIZE) == b"from the guest"
    os.close(guest)


def test_entries_are_as_good_for_sev_as_blocks_are(rig: Rig, kernel: SpecialKernel) -> None:
    """All of one is memory in any case, so that nothing has to be allocated for it."""
    guest = guest_memory(MIB)
    rig.blocks.add_notifier(sev := Sev(rig.container, IOVA))
    cache = MapCache(rig.blocks, guest)
    entry, _ = cache.map(0)
    kernel.dma_write(BDF, sev.registered[entry.idstr] + MapCache.ENTRY - 4, b"last")
    assert os.pread(guest, 4, MapCache.ENTRY - 4) == b"last"
    assert os.fstat(guest).st_size == MIB
    cache.invalidate()
    rig.blocks.remove_notifier(sev)
    os.close(guest)


# ----------------------------------------------------------------------------------------------- migration: the source


def test_a_migration_that_nothing_is_resized_under_completes(rig: Rig, kernel: SpecialKernel) -> None:
    """What a device wrote while it was under way is on the other side."""
    block, migration = rig.add(used=4 * PAGE_SIZE), PrecopySource(rig.blocks)
    with DirtyTracking(rig.container) as tracking:
        assert migration.start() == {"ring": 4 * PAGE_SIZE}
        arrived: dict[int, bytes] = {}
        for turn in range(4):
            arrived |= {page.offset: page.data for page in migration.iterate(tracking, rig.mapper)}
            if turn < 3:
                kernel.dma_write(BDF, rig.mapper.iova(block) + turn * PAGE_SIZE, b"written late")
        migration.finish()
    with block.view() as view:
        assert b"".join(arrived[offset] for offset in sorted(arrived)) == view
    assert (migration.state, migration.error) == ("completed", "")
    block.resize(PAGE_SIZE)
    assert migration.state == "completed"


@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_resize_during_precopy_cancels_it_and_names_the_block(rig: Rig, length: int) -> None:
    """The resize itself is made, and the device follows; another migration may be started."""
    other, block, migration = rig.add("other"), rig.add(used=4 * PAGE_SIZE), PrecopySource(rig.blocks)
    other.resize(PAGE_SIZE)
    assert migration.error == ""
    with DirtyTracking(rig.container) as tracking:
        migration.start()
        migration.iterate(tracking, rig.mapper)
        block.resize(length * PAGE_SIZE)
        assert not block.whole
        other.resize(2 * PAGE_SIZE)  # the first one is the reason
        with pytest.raises(MigrationError, match=r"^RAM block 'ring' resized during precopy$"):
            migration.iterate(tracking, rig.mapper)
        migration.finish()
        assert [page for page in range(10) if reaches(rig, block, page)] == list(range(length))
        assert migration.start() == {"other": 2 * PAGE_SIZE, "ring": length * PAGE_SIZE}
        assert len(migration.iterate(tracking, rig.mapper)) == 2 + length
        migration.finish()
    assert migration.state == "completed"


def test_a_resize_that_was_refused_cancels_it_as_well(rig: Rig, kernel: SpecialKernel) -> None:
    """It cannot tell whether the length has been another one for a moment."""
    block, migration = rig.add(), PrecopySource(rig.blocks)
    migration.start()
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.PinLimitError):
        block.resize(4 * PAGE_SIZE)
    migration.finish()
    assert (migration.state, block.used_length) == ("cancelled", 2 * PAGE_SIZE)
    assert [page for page in range(4) if reaches(rig, block, page)] == [0, 1]


# ----------------------------------------------------------------------------------------------- migration: the target


def test_received_growth_is_discarded_and_populated_when_its_pages_are_received(
    rig: Rig, kernel: SpecialKernel
) -> None:
    """A device reaches a page from then on, with what was sent."""
    block, target = rig.add(used=2 * PAGE_SIZE), PostcopyTarget(rig.blocks)
    target.advise()
    assert reached_pages(rig, block) == []
    for page in (0, 1):
        target.receive(Page("ring", page * PAGE_SIZE, b"a" * PAGE_SIZE))
    block.resize(5 * PAGE_SIZE)
    target.settle()
    assert list(block.discarded) == [(2 * PAGE_SIZE, 5 * PAGE_SIZE)]
    assert reached_pages(rig, block) == [0, 1]
    target.receive(Page("ring", 3 * PAGE_SIZE, b"b" * PAGE_SIZE))
    assert kernel.dma_read(BDF, rig.mapper.iova(block) + 3 * PAGE_SIZE, PAGE_SIZE) == b"b" * PAGE_SIZE
    assert reached_pages(rig, block) == [0, 1, 3]
    target.run()
    with pytest.raises(MigrationError, match="pages are missing"):
        target.end()
    for page in (4, 2):
        target.receive(Page("ring", page * PAGE_SIZE, b"c" * PAGE_SIZE))
    target.end()
    assert reached_pages(rig, block) == [0, 1, 2, 3, 4]


def test_the_growth_is_discarded_even_when_a_page_comes_first(rig: Rig) -> None:
    """Whoever receives settles before."""
    block, target = rig.add(used=0), PostcopyTarget(rig.blocks)
    target.advise()
    block.resize(3 * PAGE_SIZE)
    target.receive(Page("ring", PAGE_SIZE, b"a" * PAGE_SIZE))
    assert reached_pages(rig, block) == [1]


def test_data_that_arrives_behind_a_block_is_an_error(rig: Rig) -> None:
    """And touches nothing: neither memory nor what a device reaches."""
    block, target = rig.add(used=2 * PAGE_SIZE), PostcopyTarget(rig.blocks)
    target.advise()
    for offset in (2 * PAGE_SIZE, 2 * PAGE_SIZE - 1, -PAGE_SIZE, block.max_length):
        with pytest.raises(MigrationError, match=r"of RAM block 'ring' has come, which has 0x2000 bytes"):
            target.receive(Page("ring", offset, b"a" * PAGE_SIZE))
    assert reached_pages(rig, block) == []
    block.resize(PAGE_SIZE)
    with pytest.raises(MigrationError, match="which has 0x1000 bytes"):
        target.receive(Page("ring", PAGE_SIZE, b"a" * PAGE_SIZE))


def test_growth_that_was_refused_or_taken_back_is_not_discarded(rig: Rig, kernel: SpecialKernel) -> None:
    """It is not there."""
    block, target = rig.add(used=2 * PAGE_SIZE), PostcopyTarget(rig.blocks)
    target.state = "advised"
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.PinLimitError):
        block.resize(4 * PAGE_SIZE)
    block.resize(6 * PAGE_SIZE)
    block.resize(3 * PAGE_SIZE)
    target.settle()
    assert list(block.discarded) == [(2 * PAGE_SIZE, 3 * PAGE_SIZE)]
    assert reached_pages(rig, block) == [0, 1]


@pytest.mark.parametrize("state", ["none", "running", "ended"])
def test_a_guest_that_runs_grows_its_own_memory(rig: Rig, state: str) -> None:
    """None of it was sent, so that all of it is there at once."""
    block, target = rig.add(used=PAGE_SIZE), PostcopyTarget(rig.blocks)
    target.state = state  # type: ignore[assignment]
    block.resize(3 * PAGE_SIZE)
    target.settle()
    assert reached_pages(rig, block) == [0, 1, 2]


def test_a_hook_cannot_discard_by_itself(rig: Rig) -> None:
    """ReentrancyError, and the resize is refused with it: the target leaves it until the hook has returned."""

    class Impatient(PostcopyTarget):
        """Does it at once."""

        def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
            """In the middle of the change."""
            block.discard(0, min(old_length, new_length))

    block = rig.add(used=4 * PAGE_SIZE)
    Impatient(rig.blocks)
    with pytest.raises(pyvfio.ReentrancyError, match="make the second change afterwards"):
        block.resize(6 * PAGE_SIZE)
    assert (block.used_length, block.discarded) == (4 * PAGE_SIZE, ())
    assert reached_pages(rig, block) == [0, 1, 2, 3]
