"""What of a block has to be copied again, on the fake kernel: too much at times, never too little."""

from __future__ import annotations

import errno
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal, SupportsIndex

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyvfio
from pyvfio import DirtyBlock, DirtyLog, DirtyTracking, Memfd, RamBlock, RamBlockList
from pyvfio.extents import Extent
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.counting import called
from tests.unit.fakes import BDF, Interrupt, MapperFactory, Rig, SpecialKernel
from tests.unit.processes import in_child
from tests.unit.tracking import KINDS, READS, Kind, tracked_kernel, tracked_rig

if TYPE_CHECKING:
    from _typeshed import TraceFunction

ROOT = Path(pyvfio.__file__).parent
POLICIES: dict[str, MapperFactory] = {
    "remap": pyvfio.DmaMapper,
    "extend": partial(pyvfio.DmaMapper, resize="extend"),
    "granule": partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE),
}


@pytest.fixture
def log(rig: Rig) -> Iterator[DirtyLog]:
    """Of the rig's blocks."""
    with DirtyLog(rig.blocks) as made:
        yield made
        made._check()


def pages(found: DirtyBlock) -> list[int]:
    """The dirty ones, by their numbers."""
    return [page for start, end in found.dirty for page in range(start // PAGE_SIZE, end // PAGE_SIZE)]


def dirty(log: DirtyLog, block: RamBlock) -> list[int]:
    """What is dirty now."""
    log._check()
    return pages(log.snapshot(block))


class Clears:
    """Takes what is dirty in the middle of a discard."""

    def __init__(self, log: DirtyLog) -> None:
        self._log = log

    def ram_block_discarded(self, block: RamBlock, parts: object) -> None:
        """All of it."""
        del parts
        self._log.snapshot(block, clear=True)

    def ram_block_populated(self, block: RamBlock, parts: object) -> None:
        """Not here."""


class Refuses:
    """Whatever happens to a block, once it is told to; it is told before whoever was there earlier, or after."""

    def __init__(self) -> None:
        self.armed = False

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """No."""
        del block, old_length, new_length
        if self.armed:
            raise PermissionError

    def ram_block_discarded(self, block: RamBlock, parts: object) -> None:
        """No."""
        del block, parts
        if self.armed:
            raise PermissionError

    def ram_block_populated(self, block: RamBlock, parts: object) -> None:
        """No."""
        self.ram_block_discarded(block, parts)


# ------------------------------------------------------------------------------------------------- what happens to it


def test_a_block_that_comes_is_dirty_as_a_whole_and_clean_when_that_was_taken(rig: Rig, log: DirtyLog) -> None:
    """One that was there already, too. What is not cleared stays dirty, however often it is looked at."""
    block = rig.add(used=3 * PAGE_SIZE)
    for _ in range(2):
        assert dirty(log, block) == [0, 1, 2]
    assert pages(log.snapshot(block, clear=True)) == [0, 1, 2]
    assert dirty(log, block) == []
    with DirtyLog(rig.blocks) as late:
        assert dirty(late, block) == [0, 1, 2]
    assert dirty(log, block) == []


@pytest.mark.parametrize("length", [5, 2, 0])
def test_a_resize_clears_what_was_and_sets_all_of_the_new_length(rig: Rig, log: DirtyLog, length: int) -> None:
    """Everything has to be copied again, and nothing behind the end."""
    block = rig.add(used=3 * PAGE_SIZE)
    log.snapshot(block, clear=True)
    block.resize(length * PAGE_SIZE)
    assert dirty(log, block) == list(range(length))
    block.resize(3 * PAGE_SIZE)
    assert dirty(log, block) == [0, 1, 2]


def test_an_empty_block_has_nothing_to_copy(rig: Rig, log: DirtyLog) -> None:
    """Until it is grown."""
    block = rig.add(used=0)
    found = log.snapshot(block, clear=True)
    assert (found.pages, found.count, found.dirty) == (0, 0, ())
    log.mark(block, 0, 0)
    block.resize(PAGE_SIZE)
    assert dirty(log, block) == [0]


def test_discarded_parts_are_not_dirty_and_populated_ones_are(rig: Rig, log: DirtyLog) -> None:
    """Whatever they were before, or were marked meanwhile; also where nobody has taken anything meanwhile."""
    block = rig.add(used=6 * PAGE_SIZE)
    block.discard(PAGE_SIZE, 2 * PAGE_SIZE)
    assert dirty(log, block) == [0, 3, 4, 5]
    log.snapshot(block, clear=True)
    block.discard(4 * PAGE_SIZE, PAGE_SIZE)
    log.mark(block, 2 * PAGE_SIZE, PAGE_SIZE)
    assert dirty(log, block) == []
    log.snapshot(block, clear=True)
    block.populate(0, 6 * PAGE_SIZE)
    assert dirty(log, block) == [1, 2, 4]
    log.snapshot(block, clear=True)
    block.discard(3 * PAGE_SIZE, PAGE_SIZE)
    block.populate(3 * PAGE_SIZE, PAGE_SIZE)
    assert dirty(log, block) == [3]


def test_parts_whose_pages_were_replaced_are_dirty(rig: Rig, log: DirtyLog) -> None:
    """They read zeros now. Also to another one that looks in the middle of it, and has taken what was dirty."""
    taken: list[list[int]] = []

    class Takes:
        def ram_block_remapping(self, block: RamBlock, parts: object) -> None:
            pass

        def ram_block_remapped(self, block: RamBlock, parts: object) -> None:
            del parts
            taken.append(pages(log.snapshot(block, clear=True)))

    block = rig.add(used=6 * PAGE_SIZE)
    log.snapshot(block, clear=True)
    block.remap(2 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert dirty(log, block) == [2, 3]
    rig.blocks.add_notifier(Takes())
    block.remap(4 * PAGE_SIZE, PAGE_SIZE)
    assert taken == [[2, 3, 4]]
    assert dirty(log, block) == [4]


def test_what_a_hook_has_cleared_in_the_middle_of_a_discard_is_dirty_when_it_comes_back(rig: Rig) -> None:
    """It was still there then."""

    block = rig.add()
    with DirtyLog(rig.blocks) as log:
        rig.blocks.add_notifier(Clears(log))
        block.discard(0, PAGE_SIZE)
        assert dirty(log, block) == []
        block.populate(0, PAGE_SIZE)
        assert dirty(log, block) == [0]


def test_nothing_is_discarded_that_the_log_is_not_told_of(rig: Rig) -> None:
    """A discard by the list goes on while it is there; a claim to others waits until it has gone."""
    rig.mapper.close()
    block = rig.add(used=2 * PAGE_SIZE)
    with DirtyLog(rig.blocks) as log:
        log.snapshot(block, clear=True)
        block.discard(0, PAGE_SIZE)
        block.populate(0, PAGE_SIZE)
        assert dirty(log, block) == [0]
        with pytest.raises(pyvfio.DiscardError, match="disable_uncoordinated"):
            rig.blocks.discards.require()
    with rig.blocks.discards.require(), pytest.raises(pyvfio.DiscardError):
        DirtyLog(rig.blocks)


def test_blocks_stay_resizable_for_it(rig: Rig, log: DirtyLog) -> None:
    """It follows resizes, so that nothing is allocated in full for its sake."""
    block = rig.add()
    assert not block.whole
    assert dirty(log, block) == [0, 1]


def test_a_block_that_was_removed_is_forgotten(rig: Rig, log: DirtyLog) -> None:
    """Another one by the same name is dirty."""
    block = rig.add()
    log.snapshot(block, clear=True)
    block.remove()
    for ask in (log.snapshot, partial(log.mark, offset=0, size=1)):
        with pytest.raises(pyvfio.ClosedError):
            ask(block)
    assert dirty(log, rig.add()) == [0, 1]


# ----------------------------------------------------------------------------------------------- what did not happen


@pytest.mark.parametrize("first", [False, True], ids=["told later", "told first"])
@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.resize(6 * PAGE_SIZE),
        lambda block: block.resize(PAGE_SIZE),
        lambda block: block.discard(0, PAGE_SIZE),
        lambda block: block.populate(3 * PAGE_SIZE, PAGE_SIZE),
    ],
    ids=["grow", "shrink", "discard", "populate"],
)
def test_a_change_that_was_refused_leaves_too_much_dirty_and_never_too_little(
    rig: Rig, change: Callable[[RamBlock], None], *, first: bool
) -> None:
    """Whether the log had been told of it or not."""
    block = rig.add(used=4 * PAGE_SIZE)
    block.discard(3 * PAGE_SIZE, PAGE_SIZE)
    refuses = Refuses()
    if first:
        rig.blocks.add_notifier(refuses)
    with DirtyLog(rig.blocks) as log:
        if not first:
            rig.blocks.add_notifier(refuses)
        log.snapshot(block, clear=True)
        log.mark(block, PAGE_SIZE, 1)
        refuses.armed = True
        with pytest.raises(PermissionError):
            change(block)
        assert 1 in dirty(log, block)
        assert 3 not in dirty(log, block)


def test_a_block_whose_removal_was_refused_is_still_known(rig: Rig, kernel: SpecialKernel, log: DirtyLog) -> None:
    """Dirty as a whole, as one that has come."""
    block = rig.add()
    log.snapshot(block, clear=True)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError):
        block.remove()
    assert dirty(log, block) == [0, 1]


# ------------------------------------------------------------------------------------------------ what was written


def test_what_the_process_says_it_wrote_is_dirty_by_whole_pages(rig: Rig, log: DirtyLog) -> None:
    """Each page of which a byte was written, and no other."""
    block = rig.add(used=8 * PAGE_SIZE)
    log.snapshot(block, clear=True)
    log.mark(block, PAGE_SIZE - 1, 2)
    log.mark(block, 5 * PAGE_SIZE, 0)
    log.mark(block, 8 * PAGE_SIZE - 1, 1)
    assert dirty(log, block) == [0, 1, 7]
    log.mark(block, 4 * PAGE_SIZE, PAGE_SIZE)
    assert log.snapshot(block, clear=True).dirty == (
        (0, 2 * PAGE_SIZE),
        (4 * PAGE_SIZE, 5 * PAGE_SIZE),
        (7 * 4096, 8 * 4096),
    )
    assert dirty(log, block) == []


def test_what_is_written_through_a_view_is_not_seen(rig: Rig, log: DirtyLog) -> None:
    """As its docstring says: whoever writes says so."""
    block = rig.add()
    log.snapshot(block, clear=True)
    with block.view() as view:
        view[0] = 1
    assert dirty(log, block) == []


@pytest.mark.parametrize(
    ("offset", "size"), [(-1, 1), (0, -1), (2 * PAGE_SIZE, 1), (0, 2 * PAGE_SIZE + 1), (1 << 70, 0)]
)
def test_what_lies_outside_of_the_block_was_not_written(rig: Rig, log: DirtyLog, offset: int, size: int) -> None:
    """Whoever says so has the wrong block."""
    block = rig.add()
    with pytest.raises(ValueError, match="do not lie in RAM block 'ring', whose used_length is 0x2000"):
        log.mark(block, offset, size)


def test_pages_are_as_large_as_those_of_the_blocks_memory(kernel: SpecialKernel) -> None:
    """Huge ones are told apart as such."""
    with RamBlockList(kernel=kernel) as blocks, DirtyLog(blocks) as log:
        block = blocks.add("huge", used_length=0, max_length=8 * MIB, memory=Memfd(hugetlb=2 * MIB))
        found = log.snapshot(block)
        assert (found.page_size, found.pages) == (2 * MIB, 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_devices_may_have_written_is_collected_mapping_by_mapping(kind: Kind, policy: str) -> None:
    """What is mapped of the block, wherever that lies in IOVA; not what is discarded, nor what others have."""
    with (
        tracked_kernel(kind) as kernel,
        tracked_rig(kernel, kind, mapper=POLICIES[policy]) as rig,
        DirtyLog(rig.blocks) as log,
    ):
        rig.add("before")
        block, other = rig.add(used=2 * PAGE_SIZE), rig.add("other")
        block.resize(6 * PAGE_SIZE)
        block.discard(PAGE_SIZE, PAGE_SIZE)
        with DirtyTracking(rig.space) as tracking:
            for each in (block, other):
                log.snapshot(each, clear=True)
            for page in (0, 2, 3, 4, 5):
                kernel.dma_write(BDF, rig.mapper.iova(block) + page * PAGE_SIZE, b"written")
            kernel.dma_write(BDF, rig.mapper.iova(other), b"written")
            log.collect(block, tracking, rig.mapper)
            assert dirty(log, block) == [0, 2, 3, 4, 5]
            assert dirty(log, other) == []
            block.resize(0)
            log.collect(block, tracking, rig.mapper)
            assert dirty(log, block) == []


def test_only_what_the_kernel_names_becomes_dirty() -> None:
    """Where it knows what was written. What it knows of other blocks is still to be collected."""
    with (
        tracked_kernel("iommufd") as kernel,
        tracked_rig(kernel, "iommufd") as rig,
        DirtyLog(rig.blocks) as log,
        DirtyTracking(rig.space) as tracking,
    ):
        below, block, above = rig.add("below"), rig.add(used=6 * PAGE_SIZE), rig.add("above")
        for each in (below, block, above):
            log.snapshot(each, clear=True)
            kernel.dma_write(BDF, rig.mapper.iova(each) + PAGE_SIZE, b"written")
        kernel.dma_write(BDF, rig.mapper.iova(block) + 3 * PAGE_SIZE - 1, b"of two pages")
        log.collect(block, tracking, rig.mapper)
        assert dirty(log, block) == [1, 2, 3]
        for other in (below, above):
            assert dirty(log, other) == []
            log.collect(other, tracking, rig.mapper)
            assert dirty(log, other) == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_that_could_not_be_asked_for_is_dirty(kind: Kind) -> None:
    """The kernel may have forgotten what it was about to tell; what was read before it is kept, too."""
    with (
        tracked_kernel(kind) as kernel,
        tracked_rig(kernel, kind, mapper=POLICIES["granule"]) as rig,
        DirtyLog(rig.blocks) as log,
    ):
        block = rig.add(used=4 * PAGE_SIZE)
        with DirtyTracking(rig.space) as tracking:
            log.snapshot(block, clear=True)
            for page in (0, 1):
                kernel.dma_write(BDF, rig.mapper.iova(block) + page * PAGE_SIZE, b"written")
            kernel.fail(call="ioctl", request=READS[kind], nth=3, errno=errno.EFAULT, after=True)
            with pytest.raises(pyvfio.IoctlError):
                log.collect(block, tracking, rig.mapper)
            assert dirty(log, block) == [0, 1, 2]


class Copying:
    """A copy of a block, of nothing but what snapshots name, and everybody who disturbs it meanwhile."""

    def __init__(self, rig: Rig, log: DirtyLog, tracking: DirtyTracking) -> None:
        self._rig, self._log, self._tracking = rig, log, tracking
        self._chance = random.Random(5)  # noqa: S311
        self.block = rig.add(used=8 * PAGE_SIZE)
        self.copy = bytearray(MIB)

    def device_writes(self) -> None:
        """A byte, somewhere in its reach."""
        if self.block.populated:
            start, end = self._chance.choice(self.block.populated)
            iova = self._rig.mapper.iova(self.block) + self._chance.randrange(start, end)
            self._rig.kernel.dma_write(BDF, iova, bytes([self._chance.randrange(256)]))

    def change(self) -> None:
        """Its length, what of it is populated, or what the process writes."""
        page = self._chance.randrange(2) * PAGE_SIZE
        match self._chance.randrange(4):
            case 0:
                self.block.resize(self._chance.randrange(4, 12) * PAGE_SIZE)
            case 1:
                self.block.discard(page, 2 * PAGE_SIZE)
            case 2:
                self.block.populate(page, 3 * PAGE_SIZE)
            case _:
                with self.block.view() as view:
                    view[page] = self._chance.randrange(256)
                self._log.mark(self.block, page, 1)

    def step(self, disturb: Callable[[], None]) -> None:
        """Copy what is dirty."""
        self._log.collect(self.block, self._tracking, self._rig.mapper)
        disturb()
        found = self._log.snapshot(self.block, clear=True)
        disturb()
        with self.block.view() as view:
            for start, end in found.dirty:
                self.copy[start:end] = view[start:end]
        disturb()


CUTS: dict[str, Literal["pages", "replace"]] = {"cut, pages": "pages", "cut, replace": "replace"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "policy"),
    [*((kind, policy) for kind in KINDS for policy in POLICIES), *(("iommufd", cut) for cut in CUTS)],
)
def test_a_copy_that_is_made_in_that_order_misses_no_transfer(kind: Kind, policy: str) -> None:
    """A device writes between any two steps, the block is resized, parts of it go and come: in the end the copy is the
    block."""
    mapper = POLICIES.get(policy, partial(pyvfio.DmaMapper, resize="cut"))
    with (
        tracked_kernel(kind) as kernel,
        tracked_rig(kernel, kind, mapper=mapper, cut=CUTS.get(policy)) as rig,
        DirtyLog(rig.blocks) as log,
        DirtyTracking(rig.space) as tracking,
    ):
        copying = Copying(rig, log, tracking)
        for _ in range(200):
            copying.change()
            copying.step(copying.device_writes)
        copying.step(lambda: None)
        with copying.block.view() as view:
            for start, end in copying.block.populated:
                assert copying.copy[start:end] == view[start:end]


# ------------------------------------------------------------------------------------------------ signals and others


OPERATIONS: dict[str, Callable[[Rig, DirtyLog, DirtyTracking], object]] = {
    "grow": lambda rig, _log, _tracking: rig.blocks["ring"].resize(6 * PAGE_SIZE),
    "shrink": lambda rig, _log, _tracking: rig.blocks["ring"].resize(3 * PAGE_SIZE),
    "discard": lambda rig, _log, _tracking: rig.blocks["ring"].discard(0, PAGE_SIZE),
    "populate": lambda rig, _log, _tracking: rig.blocks["ring"].populate(3 * PAGE_SIZE, PAGE_SIZE),
    "remove": lambda rig, _log, _tracking: rig.blocks["ring"].remove(),
    "mark": lambda rig, log, _tracking: log.mark(rig.blocks["ring"], 0, PAGE_SIZE),
    "collect": lambda rig, log, tracking: log.collect(rig.blocks["ring"], tracking, rig.mapper),
    "look": lambda rig, log, _tracking: log.snapshot(rig.blocks["ring"]),
    "clear": lambda rig, log, _tracking: log.snapshot(rig.blocks["ring"], clear=True),
}


def must_be_dirty(name: str, block: RamBlock) -> set[int]:
    """Page 2 was written before; what a change that was made has brought, and what was asked for and forgotten."""
    length = block.used_length // PAGE_SIZE
    if name in ("grow", "shrink"):
        return set(range(length)) - {3} if length != 4 else {2}
    if name == "populate" and not block.discarded:
        return {2, 3}
    return {2}


@cache
def is_counted(file: str) -> bool:
    """Whether lines of the file are those of the package."""
    name = Path(file)
    return name.is_relative_to(ROOT) and "testing" not in name.parts and name.name != "guard.py"


class Signaller:
    """Counts the lines of the package that run, and has a signal come at one of them."""

    def __init__(self, at: int) -> None:
        self.lines = 0
        self.where = ""
        self._at = at

    def _global(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        del event, argument
        return self._local if is_counted(frame.f_code.co_filename) else None

    def _local(self, frame: FrameType, event: str, argument: object) -> TraceFunction:
        del argument
        self.lines += event == "line"
        if event == "line" and self.lines == self._at:
            self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            signal.raise_signal(signal.SIGUSR1)
        return self._local

    def run(self, action: Callable[[], object]) -> None:
        """Make the action, with a handler that raises Interrupt."""

        def handle(number: int, frame: FrameType | None) -> None:
            raise Interrupt

        before = signal.signal(signal.SIGUSR1, handle)
        sys.settrace(self._global)
        try:
            action()
        finally:
            sys.settrace(None)
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), [*((name, "type1") for name in OPERATIONS), ("collect", "iommufd")])
def test_never_is_too_little_dirty_wherever_a_signal_handler_raises(name: str, kind: Kind) -> None:
    """In the log, in the list, in the mapper: what had been dirty and nobody was told of still is."""
    with tracked_kernel(kind) as kernel:
        at, lines = 0, 1
        while at <= lines:
            with (
                tracked_rig(kernel, kind) as rig,
                DirtyLog(rig.blocks) as log,
                DirtyTracking(rig.space) as tracking,
            ):
                block = rig.add("ring", used=4 * PAGE_SIZE)
                block.discard(3 * PAGE_SIZE, PAGE_SIZE)
                log.snapshot(block, clear=True)
                log.mark(block, 2 * PAGE_SIZE, 1)
                kernel.dma_write(BDF, rig.mapper.iova(block) + PAGE_SIZE, b"written")
                interrupter = Signaller(at)
                ended = False
                with suppress(Interrupt, pyvfio.RollbackError):
                    interrupter.run(partial(OPERATIONS[name], rig, log, tracking))
                    ended = True
                if at == 0:
                    lines = interrupter.lines
                if not (ended and name == "clear") and "ring" in [each.idstr for each in rig.blocks]:
                    assert must_be_dirty(name, block) <= set(dirty(log, block)), interrupter.where
                    log.collect(block, tracking, rig.mapper)
                    assert 1 in dirty(log, block), interrupter.where
                log._check()
            at += 1
    print(f"{name}: {lines} lines")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_failed_ioctl_kept_from_being_told_is_dirty(kind: Kind) -> None:
    """The kernel may have told it, and forgotten it."""
    with (
        tracked_kernel(kind) as kernel,
        tracked_rig(kernel, kind) as rig,
        DirtyLog(rig.blocks) as log,
        DirtyTracking(rig.space) as tracking,
    ):
        block = rig.add(used=4 * PAGE_SIZE)
        log.snapshot(block, clear=True)
        kernel.fail(call="ioctl", request=READS[kind], errno=errno.EFAULT)
        with pytest.raises(pyvfio.IoctlError):
            log.collect(block, tracking, rig.mapper)
        assert dirty(log, block) == [0, 1, 2, 3]


def asks(log: DirtyLog, tracking: DirtyTracking, mapper: pyvfio.DmaMapper) -> list[Callable[[RamBlock], object]]:
    """All that a log is asked or told of a block."""
    return [
        log.snapshot,
        lambda block: log.mark(block, 0, 1),
        lambda block: log.collect(block, tracking, mapper),
    ]


def test_a_log_and_a_mapper_and_a_tracking_belong_together(kernel: SpecialKernel, rig: Rig, log: DirtyLog) -> None:
    """Others have other blocks, other IOVA: what they say would be of something else."""
    block = rig.add()
    with RamBlockList(kernel=kernel) as blocks, pyvfio.Container(kernel=kernel) as container:
        stranger = blocks.add("ring", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
        with DirtyTracking(rig.space) as tracking:
            for ask in asks(log, tracking, rig.mapper):
                with pytest.raises(ValueError, match="not in the list that this log follows"):
                    ask(stranger)
                with pytest.raises(TypeError, match="block must be a RamBlock, not 'ring'"):
                    ask("ring")  # type: ignore[arg-type]
            for wrong in ((rig.mapper, rig.mapper), (tracking, tracking)):
                with pytest.raises(TypeError, match=r"collect\(\) needs a"):
                    log.collect(block, *wrong)
        with DirtyTracking(rig.space) as tracking, pytest.raises(ValueError, match="another address space"):
            log.collect(block, tracking, pyvfio.DmaMapper(container))
        with DirtyTracking(rig.space) as tracking, pytest.raises(ValueError, match="does not follow"):
            log.collect(block, tracking, pyvfio.DmaMapper(rig.space))
    with pytest.raises(TypeError, match="RamBlockList"):
        DirtyLog([])  # type: ignore[arg-type]


def test_it_ends_with_its_close(rig: Rig) -> None:
    """Twice is fine; the list and its blocks go on, and tell it no more."""
    block = rig.add()
    log = DirtyLog(rig.blocks)
    assert repr(log) == "<DirtyLog of 1 blocks>"
    log.close()
    log.close()
    assert rig.blocks.notifiers == (rig.mapper,)
    assert repr(log) == "<DirtyLog closed>"
    with DirtyTracking(rig.space) as tracking:
        for ask in asks(log, tracking, rig.mapper):
            with pytest.raises(pyvfio.ClosedError, match="this log has been closed"):
                ask(block)
    block.resize(PAGE_SIZE)
    rig.mapper.close()  # which has a claim of its own
    rig.blocks.discards.require().close()


def test_who_takes_it_out_of_its_list_ends_it(rig: Rig) -> None:
    """It would not hear of a resize. Put in again it finds everything dirty."""
    block = rig.add()
    with DirtyLog(rig.blocks) as log:
        log.snapshot(block, clear=True)
        rig.blocks.remove_notifier(log)
        with pytest.raises(pyvfio.ClosedError, match="removed from its list"):
            log.snapshot(block)
        rig.blocks.add_notifier(log)
        assert dirty(log, block) == [0, 1]


def test_a_forked_child_neither_asks_nor_ends_it(rig: Rig, log: DirtyLog) -> None:
    """It is the parent's."""
    block = rig.add()
    log.snapshot(block, clear=True)

    def child() -> None:
        with pytest.raises(pyvfio.ForkedError):
            log.snapshot(block)
        log.close()

    assert in_child(child) == 0
    assert dirty(log, block) == []


def test_a_snapshot_can_be_read() -> None:
    """By a person; and is what it was, whatever happens to the block."""
    found = DirtyBlock("ring", 512 * 4096, 4096, (Extent(0, 4096), Extent(0x5000, 0x10000)))
    assert str(found) == "12 of 512 pages of 4 KiB of RAM block 'ring' are dirty: 0x0-0xfff, 0x5000-0xffff"
    assert str(DirtyBlock("ring", 0, 4096, ())) == "0 of 0 pages of 4 KiB of RAM block 'ring' are dirty: none"
    many = DirtyBlock("ring", MIB, 4096, tuple(Extent(page * 8192, page * 8192 + 4096) for page in range(9)))
    assert str(many).endswith("0xe000-0xefff, …")
    with pytest.raises(AttributeError):
        found.dirty = ()  # type: ignore[misc]


PAGES = 12
_ranges_of_pages = st.tuples(st.integers(0, PAGES - 1), st.integers(0, PAGES)).map(lambda pair: range(*pair))
_steps = st.lists(
    st.tuples(
        st.sampled_from(["mark", "clear", "discard", "populate", "collect", "remap", "resize"]), _ranges_of_pages
    ),
    max_size=20,
)


class Told(DirtyTracking):
    """Of an IOMMU that knows what was written, and is told here: pages from BASE on."""

    written: frozenset[int] = frozenset()
    base = 0

    def read(self, *, iova: SupportsIndex, size: SupportsIndex, clear: bool = True) -> pyvfio.DirtyPages:
        found = super().read(iova=iova, size=size, clear=clear)
        asked = pyvfio.IovaRange.of(iova=int(iova), size=int(size))
        pages = [
            pyvfio.IovaRange.of(iova=self.base + page * PAGE_SIZE, size=PAGE_SIZE) for page in sorted(self.written)
        ]
        return pyvfio.DirtyPages(found.page_size, found.pages, tuple(page for page in pages if asked.contains(page)))


@pytest.mark.long
@given(st.sampled_from(sorted(POLICIES)), _steps)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_log_is_a_set_of_pages(policy: str, life: list[tuple[str, range]]) -> None:
    """Whatever happens, in whichever order."""
    with (
        SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as kernel,
        Rig(kernel, mapper=POLICIES[policy]) as rig,
        DirtyLog(rig.blocks) as log,
        Told(rig.space) as tracking,
    ):
        block = rig.add(used=PAGES * PAGE_SIZE)
        tracking.base = rig.mapper.iova(block)
        length, clean, discarded = PAGES, set[int](), set[int]()
        for kind, part in life:
            pages = {page for page in part if page < length}
            offset, size = min(pages, default=0) * PAGE_SIZE, len(pages) * PAGE_SIZE
            match kind:
                case "mark":
                    log.mark(block, offset, size)
                    clean -= pages
                case "clear":
                    log.snapshot(block, clear=True)
                    clean = set(range(length)) - discarded
                case "discard":
                    block.discard(offset, size)
                    discarded |= pages
                case "populate":
                    block.populate(offset, size)
                    clean -= pages & discarded
                    discarded -= pages
                case "remap":
                    block.remap(offset, size)
                    clean -= pages - discarded
                case "collect":
                    tracking.written = frozenset(pages)
                    log.collect(block, tracking, rig.mapper)
                    clean -= pages - discarded
                case "resize":
                    length = part.stop or length
                    if length != block.used_length // PAGE_SIZE:
                        clean = set()
                    block.resize(length * PAGE_SIZE)
                    discarded = {page for page in discarded if page < length}
            log._check()
            assert dirty(log, block) == sorted(set(range(length)) - clean - discarded)


def test_a_page_is_marked_without_a_look_at_the_other_clean_parts(rig: Rig, log: DirtyLog) -> None:
    """Among 300 as among three."""
    block = rig.add(used=1000 * PAGE_SIZE, maximum=1000 * PAGE_SIZE)
    log.snapshot(block, clear=True)
    takes = []
    for first, end in ((0, 6), (6, 600)):
        for page in range(first, end, 2):
            log.mark(block, page * PAGE_SIZE, PAGE_SIZE)
        takes.append(called(partial(log.mark, block, (900 + first) * PAGE_SIZE, PAGE_SIZE)))
    assert takes[0] == takes[1]
    assert log.snapshot(block).count == 302
    log._check()
