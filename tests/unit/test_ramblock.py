"""RAM blocks and their notifiers: who is told what and when, and what is left of a change that somebody refuses."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pyvfio.errors import (
    ClosedError,
    ForkedError,
    IoctlError,
    MemoryNotReturnedWarning,
    ReentrancyError,
    RollbackError,
    UnmapSizeError,
    VfioError,
)
from pyvfio.memory import MemorySettings
from pyvfio.ramblock import RamBlock, RamBlockList
from pyvfio.testing import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import Interrupt, interrupt
from tests.unit.processes import areas, in_child

MAX = 8 * MIB
Event = tuple[str, ...]


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """It keeps a trace of calls and lets some of them fail; memory is the real one."""
    with FakeKernel() as fake:
        yield fake


@pytest.fixture
def blocks(kernel: FakeKernel) -> Iterator[RamBlockList]:
    """An empty list, which is in order at the end of each test."""
    made = RamBlockList(kernel=kernel)
    yield made
    made._check()


class Notifier:
    """Writes down what it is told, with what is usable and what is used at that time, and refuses when asked to.

    It knows how much it was told of each block, and holds that to what the list's module promises: it never is more
    than what is active.
    """

    def __init__(self, name: str = "", log: list[str] | None = None) -> None:
        self.name = name
        self.log: list[str] = [] if log is None else log
        self.known: dict[str, int] = {}
        self.refuse: dict[str, list[BaseException]] = {}
        self.hook: Callable[[RamBlock], object] = lambda _block: None

    def _note(self, what: str, block: RamBlock, *lengths: int) -> None:
        sizes = " ".join(str(length // MIB) for length in lengths)
        self.log.append(f"{self.name}{what} {block.idstr} {sizes}")
        assert max(self.known.get(block.idstr, 0), lengths[-1] if what == "resized" else 0) <= block.state.memory.length
        self.hook(block)
        self._refuse(what, sizes)

    def _refuse(self, what: str, sizes: str) -> None:
        for refusal in (what, f"{what} {sizes}"):
            if self.refuse.get(refusal):
                raise self.refuse[refusal].pop(0)

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """A block has come."""
        assert block.idstr not in self.known
        self._note("added", block, used_length, max_length)
        self.known[block.idstr] = used_length

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """A block goes."""
        assert self.known[block.idstr] == used_length
        self._note("removed", block, used_length, max_length)
        self.known.pop(block.idstr, None)

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """A block changes."""
        assert self.known[block.idstr] == old_length
        self._note("resized", block, old_length, new_length)
        self.known[block.idstr] = new_length


class OnlyResized:
    """A notifier without the other hooks."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """A block changes."""
        assert block.max_length >= max(old_length, new_length)
        self.told.append((old_length, new_length))


class OnlyAdded:
    """A notifier that hears of blocks that come."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """A block has come."""
        self.told.append((block.idstr, used_length, max_length))


class OnlyRemoved:
    """A notifier that hears of blocks that go."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """A block goes."""
        self.told.append((block.idstr, used_length, max_length))


class RefusalError(Exception):
    """What a hook refuses with."""


def three(blocks: RamBlockList) -> tuple[list[str], dict[str, Notifier]]:
    """Notifiers a, b and c, in the order of their coming, and what all of them were told."""
    log: list[str] = []
    notifiers = {name: Notifier(f"{name} ", log) for name in "abc"}
    for notifier in notifiers.values():
        blocks.add_notifier(notifier)
    return log, notifiers


def ram(blocks: RamBlockList, used_length: int = 4 * MIB, idstr: str = "ram") -> RamBlock:
    """A block of 8 MiB at most."""
    return blocks.add(idstr, used_length=used_length, max_length=MAX)


def filled(block: RamBlock) -> bytes:
    """Write something everywhere, and say what."""
    data = bytes(range(256)) * (block.used_length // 256)
    with block.view() as view:
        view[:] = data
    return data


def contents(block: RamBlock) -> bytes:
    """All that is used."""
    with block.view() as view:
        return bytes(view)


# --------------------------------------------------------------------------------------------------------- blocks


def test_a_block_is_what_it_was_asked_to_be(blocks: RamBlockList) -> None:
    """Its lengths, its name, its settings; its memory reads zero and can be written."""
    settings = MemorySettings(dontdump=True)
    block = blocks.add("ram", used_length=4 * MIB, max_length=MAX, settings=settings)
    assert (block.idstr, block.used_length, block.max_length) == ("ram", 4 * MIB, MAX)
    assert (block.settings, block.page_size, block.vaddr % (2 * MIB)) == (settings, PAGE_SIZE, 0)
    assert contents(block) == bytes(4 * MIB)
    assert contents(block) != filled(block) == contents(block)
    assert "'ram'" in repr(block)
    blocks.close()


def test_blocks_are_found_by_name_and_by_address(blocks: RamBlockList) -> None:
    """An address in the reserved tail belongs to the block, the guard page does not."""
    made = [ram(blocks, idstr=name) for name in "abcd"]
    assert [block.vaddr for block in blocks] == sorted(block.vaddr for block in made)
    assert len(blocks) == 4
    for block in made:
        assert blocks[block.idstr] is block
        for offset in (0, 4 * MIB - 1, MAX - 1):
            assert blocks.block_at(block.vaddr + offset) is block
        assert blocks.block_at(block.vaddr - 1) is not block
        assert blocks.block_at(block.vaddr + MAX) is not block
    assert blocks.block_at(0) is None
    with pytest.raises(KeyError, match=r"no RAM block is named .*; the list has .*d.*c.*b.*a"):
        blocks["e"]
    blocks.close()
    assert len(blocks) == 0


def test_blocks_are_kept_in_order_when_some_go_and_others_come(blocks: RamBlockList) -> None:
    """By address, whatever gaps the kernel fills."""
    chance = random.Random(3)  # noqa: S311
    for number in range(24):
        blocks.add(str(number), used_length=0, max_length=chance.randrange(1, 40) * PAGE_SIZE)
        if number % 3 == 2:
            chance.choice(tuple(blocks)).remove()
        blocks._check()
    for block in blocks:
        assert blocks.block_at(block.vaddr + block.max_length - 1) is block
    blocks.close()


def test_a_name_is_taken_once(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """ValueError before any system call; free again once the block has gone."""
    ram(blocks)
    kernel.clear_trace()
    with pytest.raises(ValueError, match="already has a RAM block 'ram'"):
        ram(blocks)
    assert kernel.trace == []
    blocks["ram"].remove()
    ram(blocks).remove()


@pytest.mark.parametrize(
    ("used_length", "max_length"),
    [
        (-PAGE_SIZE, MAX),
        (1, MAX),
        (PAGE_SIZE, MAX + 1),
        (MAX + PAGE_SIZE, MAX),
        (0, 0),
        (0, -PAGE_SIZE),
        (0, 1 << 64),
        (PAGE_SIZE, 1 << 80),
    ],
)
def test_lengths_that_can_never_be_right_make_no_block(
    kernel: FakeKernel, blocks: RamBlockList, used_length: int, max_length: int
) -> None:
    """Refused before any system call, and nobody is told."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    with pytest.raises(ValueError, match="length"):
        blocks.add("ram", used_length=used_length, max_length=max_length)
    assert (kernel.trace, notifier.log, len(blocks)) == ([], [], 0)


def test_a_block_for_which_there_is_no_memory_is_not_made(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """Its address space is given back, and nobody is told."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    for nth in (1, 2):  # nor is there for all of it
        kernel.fail(call="mprotect", errno=errno.ENOMEM, nth=nth)
    with pytest.raises(IoctlError, match="more memory could not be allocated"):
        ram(blocks)
    assert kernel.trace[-1].call == "munmap"
    assert kernel.trace[-1].given[1] == MAX + PAGE_SIZE
    assert (notifier.log, len(blocks)) == ([], 0)


def test_a_removed_block_cannot_be_used(blocks: RamBlockList) -> None:
    """ClosedError for each use, also for removing it from the list once more."""
    block = ram(blocks)
    block.remove()
    uses: list[Callable[[], object]] = [lambda: block.vaddr, block.view, lambda: block.resize(0), block.remove]
    uses.append(lambda: blocks.remove(block))
    for use in uses:
        with pytest.raises(ClosedError, match="'ram' has been removed"):
            use()
    assert block.used_length == 0
    assert "removed" in repr(block)


def test_a_list_knows_its_blocks_and_their_names(blocks: RamBlockList) -> None:
    """Those of other lists it does not, nor names that are no text."""
    block, other = ram(blocks), RamBlockList()
    stranger = ram(other, idstr="stranger")
    assert block in blocks
    assert "ram" in blocks
    for absent in (stranger, "stranger", b"ram", None, 0, np.zeros(2)):
        assert absent not in blocks
    block.remove()
    assert block not in blocks
    assert "ram" not in blocks
    other.close()


def test_a_closed_list_takes_neither_a_block_nor_a_notifier(kernel: FakeKernel) -> None:
    """ClosedError before any call; a notifier that it has can leave."""
    blocks, notifier = RamBlockList(kernel=kernel), Notifier()
    blocks.add_notifier(notifier)
    blocks.close()
    kernel.clear_trace()
    for use in (lambda: ram(blocks), lambda: blocks.add_notifier(Notifier())):
        with pytest.raises(ClosedError, match="has been closed"):
            use()
    blocks.remove_notifier(notifier)
    assert kernel.trace == []
    assert "closed" in repr(blocks)


@pytest.mark.parametrize(
    "use",
    [
        lambda blocks: blocks.remove("ram"),
        lambda blocks: blocks.remove(None),
        lambda blocks: blocks.resize("ram", 0),
        lambda blocks: blocks.discard(5, 0, 0),
        lambda blocks: blocks["ram"].resize("1"),
        lambda blocks: blocks["ram"].resize(1.0),
        lambda blocks: blocks["ram"].populate(None, 0),
        lambda blocks: blocks.block_at("ram"),
        lambda blocks: blocks.add_notifier(5),
        lambda blocks: blocks.add("new", used_length=None, max_length=PAGE_SIZE),
        lambda blocks: blocks.add("new", used_length=0, max_length=PAGE_SIZE, prealloc=1.0),
        lambda blocks: blocks.add("new", used_length=0, max_length=PAGE_SIZE, memory=5),
    ],
)
def test_an_argument_of_the_wrong_class_is_a_type_error(
    kernel: FakeKernel, blocks: RamBlockList, use: Callable[[RamBlockList], object]
) -> None:
    """Before any system call."""
    ram(blocks)
    kernel.clear_trace()
    with pytest.raises(TypeError):
        use(blocks)
    assert kernel.trace == []
    assert [block.used_length for block in blocks] == [4 * MIB]
    blocks.close()


def test_a_list_and_its_blocks_show_themselves(blocks: RamBlockList) -> None:
    """In hex, and with the number of notifiers, of holes and of claims."""
    block = ram(blocks)
    assert repr(block) == f"<RamBlock 'ram' vaddr={block.vaddr:#x} used=0x400000 max=0x800000>"
    assert repr(blocks) == f"<RamBlockList 1 block: 'ram' {block.vaddr:#x}+0x400000, 0 notifiers>"
    block.discard(0, PAGE_SIZE)
    assert "discarded=0x1000" in repr(block)
    with blocks.discards.require_coordinated() as claim:
        assert repr(blocks.discards) == "<DiscardGuard 1 require_coordinated>"
        assert repr(claim) == "<DiscardClaim 'require_coordinated'>"
    assert repr(claim) == "<DiscardClaim 'require_coordinated' closed>"
    blocks.close()
    assert (repr(blocks), repr(blocks.discards)) == ("<RamBlockList closed, 0 notifiers>", "<DiscardGuard no claims>")


def test_a_block_belongs_to_one_list(blocks: RamBlockList) -> None:
    """Another one refuses it."""
    block, other = ram(blocks), RamBlockList()
    uses: list[Callable[[], object]] = [
        lambda: other.remove(block),
        lambda: other.resize(block, 0),
        lambda: other.discard(block, 0, PAGE_SIZE),
        lambda: other.populate(block, 0, PAGE_SIZE),
        lambda: other.remap(block, 0, PAGE_SIZE),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="not in this list"):
            use()
    block.remove()


def test_removing_gives_everything_back(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """After everybody was told: one munmap, the guard page with it."""
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    vaddr = block.vaddr
    kernel.clear_trace()
    notifier.hook = lambda _block: kernel.trace and pytest.fail("memory went before the notifier was told")
    block.remove()
    assert [(call.call, call.given) for call in kernel.trace] == [("munmap", (vaddr, MAX + PAGE_SIZE))]


def test_address_space_that_cannot_be_given_back_does_not_keep_the_block(
    kernel: FakeKernel, blocks: RamBlockList, caplog: pytest.LogCaptureFixture
) -> None:
    """It is gone for everybody; the loss is logged."""
    block = ram(blocks)
    kernel.fail(call="munmap", errno=errno.ENOMEM)
    block.remove()
    assert len(blocks) == 0
    assert "could not be unmapped" in caplog.text


def test_the_end_of_a_with_statement_removes_all_blocks(kernel: FakeKernel) -> None:
    """And closing once more does nothing."""
    with RamBlockList(kernel=kernel) as blocks:
        made = [ram(blocks, idstr=name) for name in "ab"]
    assert len(blocks) == 0
    kernel.clear_trace()
    blocks.close()
    assert kernel.trace == []
    assert all(block.used_length == 0 for block in made)


def test_a_signal_while_a_list_is_closed_leaves_no_block_behind(blocks: RamBlockList) -> None:
    """Its handler runs when all blocks are removed."""

    def press(_block: RamBlock) -> None:
        signal.raise_signal(signal.SIGUSR1)

    notifier = Notifier()
    blocks.add_notifier(notifier)
    for name in "abc":
        ram(blocks, idstr=name)
    notifier.hook = press
    before = signal.signal(signal.SIGUSR1, interrupt)
    with pytest.raises(Interrupt):
        blocks.close()
    signal.signal(signal.SIGUSR1, before)
    assert (len(blocks), notifier.known) == (0, {})


def test_closing_removes_what_it_can_and_raises_the_rest(blocks: RamBlockList) -> None:
    """One failure as it is, several as a group; then it may be tried again."""
    for name in "abc":
        ram(blocks, idstr=name)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    notifier.refuse["removed"] = [RefusalError(), RefusalError()]
    with pytest.raises(RollbackError, match="2 RAM blocks could not be removed") as raised:
        blocks.close()
    assert [type(error) for error in raised.value.exceptions] == [RefusalError, RefusalError]
    assert len(blocks) == 2
    notifier.refuse["removed"] = [RefusalError()]
    with pytest.raises(RefusalError):
        blocks.close()
    assert len(blocks) == 1
    blocks.close()
    assert not notifier.known


def test_huge_pages_back_a_block_where_the_machine_has_them(blocks: RamBlockList) -> None:
    """By default, from its first byte, and what it has grown by as well."""
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    available = modes.exists() and "[never]" not in modes.read_text(encoding="ascii")
    block = ram(blocks, 2 * MIB)
    block.resize(6 * MIB)
    filled(block)
    assert (sum(area.huge for area in areas(block.vaddr, MAX)) > 2 * MIB) == available
    block.remove()


# ------------------------------------------------------------------------------------------------------- resizing


def test_resizing_keeps_what_is_below_and_new_memory_reads_zero(blocks: RamBlockList) -> None:
    """At an address that never changes."""
    block = ram(blocks)
    vaddr, data = block.vaddr, filled(block)
    block.resize(6 * MIB)
    assert contents(block) == data + bytes(2 * MIB)
    block.resize(MIB)
    assert contents(block) == data[:MIB]
    block.resize(MAX)
    assert contents(block) == data[:MIB] + bytes(7 * MIB)
    assert block.vaddr == vaddr
    block.remove()


def test_nothing_is_a_legal_length_both_ways(blocks: RamBlockList) -> None:
    """From 0, to 0 and from 0 again; everybody is told each time."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    block = ram(blocks, 0)
    blocks._check()
    assert len(block.view()) == 0
    for length in (2 * MIB, 0, MAX, 0):
        block.resize(length)
        blocks._check()
    assert notifier.log == [
        "added ram 0 8",
        "resized ram 0 2",
        "resized ram 2 0",
        "resized ram 0 8",
        "resized ram 8 0",
    ]
    block.remove()


@pytest.mark.parametrize("length", [-PAGE_SIZE, -1, 1, 4 * MIB + 1, MAX + PAGE_SIZE, 1 << 64])
def test_a_length_that_can_never_be_right_is_refused_first(
    kernel: FakeKernel, blocks: RamBlockList, length: int
) -> None:
    """Before any system call and before anybody is told."""
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    notifier.log.clear()
    kernel.clear_trace()
    with pytest.raises(ValueError, match="used_length"):
        block.resize(length)
    assert (kernel.trace, notifier.log, block.used_length) == ([], [], 4 * MIB)
    block.remove()


@pytest.mark.parametrize("length", ["4096", 4096.0, None])
def test_a_length_is_a_whole_number(blocks: RamBlockList, length: object) -> None:
    """Anything else is a TypeError; numpy's integers are whole numbers."""
    block = ram(blocks)
    with pytest.raises(TypeError):
        block.resize(length)  # type: ignore[arg-type]
    block.resize(np.int64(MIB))  # type: ignore[arg-type]
    assert block.used_length == MIB
    block.remove()


def test_the_present_length_does_nothing_at_all(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """No system call, no notification, no callback."""
    called: list[int] = []
    block = blocks.add("ram", used_length=4 * MIB, max_length=MAX, resized=lambda _idstr, new: called.append(new))
    notifier = Notifier()
    blocks.add_notifier(notifier)
    notifier.log.clear()
    kernel.clear_trace()
    block.resize(4 * MIB)
    assert (kernel.trace, notifier.log, called) == ([], [], [])
    block.remove()


def observed(kernel: FakeKernel, blocks: RamBlockList, used_length: int) -> tuple[RamBlock, list[str]]:
    """A block, and a log of hook, callback and memory calls with the used_length that each of them found."""
    log: list[str] = []

    def callback(idstr: str, new_length: int) -> None:
        flush()
        log.append(f"callback {idstr} {new_length // MIB} used={block.used_length // MIB}")

    def flush() -> None:
        log.extend(call.call for call in kernel.trace)
        kernel.clear_trace()

    def hook(block: RamBlock) -> None:
        flush()
        log.append(f"hook used={block.used_length // MIB}")

    block = blocks.add("ram", used_length=used_length, max_length=MAX, resized=callback)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    kernel.clear_trace()
    notifier.hook = hook
    return block, log


def test_a_block_that_grows_gets_its_memory_first_and_calls_back_last(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """Activate, notify, used_length, callback."""
    block, log = observed(kernel, blocks, 2 * MIB)
    block.resize(4 * MIB)
    assert log == ["mprotect", "hook used=2", "callback ram 4 used=4"]
    assert kernel.trace == []
    block.remove()


def test_a_block_that_shrinks_gives_its_memory_back_last(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """Notify, used_length, callback, deactivate."""
    block, log = observed(kernel, blocks, 4 * MIB)
    block.resize(2 * MIB)
    assert log == ["hook used=4", "callback ram 2 used=2"]
    assert [call.call for call in kernel.trace] == ["mmap", "madvise", "madvise"]
    block.remove()


def test_a_growth_for_which_there_is_no_memory_is_told_to_nobody(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """The block is as it was."""
    block, log = observed(kernel, blocks, 2 * MIB)
    data = filled(block)
    kernel.fail(call="mprotect", errno=errno.ENOMEM)
    with pytest.raises(IoctlError, match="2 MiB more memory could not be allocated") as raised:
        block.resize(4 * MIB)
    assert raised.value.errno == errno.ENOMEM
    assert (log, block.used_length, contents(block)) == ([], 2 * MIB, data)
    blocks._check()
    block.remove()


# ------------------------------------------------------------------------------------------------------ notifiers


def test_the_newest_notifier_is_told_first_and_on_a_shrink_last(blocks: RamBlockList) -> None:
    """Undoing runs against doing."""
    log, _ = three(blocks)
    block = ram(blocks)
    block.resize(6 * MIB)
    block.resize(2 * MIB)
    block.remove()
    assert log == [
        *("c added ram 4 8", "b added ram 4 8", "a added ram 4 8"),
        *("c resized ram 4 6", "b resized ram 4 6", "a resized ram 4 6"),
        *("a resized ram 6 2", "b resized ram 6 2", "c resized ram 6 2"),
        *("c removed ram 2 8", "b removed ram 2 8", "a removed ram 2 8"),
    ]


def test_a_late_notifier_is_told_of_every_block_and_a_leaving_one_that_all_are_gone(blocks: RamBlockList) -> None:
    """With their present lengths; afterwards it is told nothing more."""
    for length, name in ((2 * MIB, "a"), (0, "b"), (MAX, "c")):
        ram(blocks, length, name)
    blocks["a"].resize(4 * MIB)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    assert sorted(notifier.log) == ["added a 4 8", "added b 0 8", "added c 8 8"]
    blocks["b"].resize(MIB)
    notifier.log.clear()
    blocks.remove_notifier(notifier)
    assert sorted(notifier.log) == ["removed a 4 8", "removed b 1 8", "removed c 8 8"]
    notifier.log.clear()
    blocks["a"].resize(0)
    blocks.close()
    assert notifier.log == []


def test_each_hook_is_optional(blocks: RamBlockList) -> None:
    """A notifier is told what it has a hook for."""
    added, removed, resized = OnlyAdded(), OnlyRemoved(), OnlyResized()
    for notifier in (added, removed, resized):
        blocks.add_notifier(notifier)
    block = ram(blocks)
    block.resize(6 * MIB)
    block.remove()
    assert added.told == [("ram", 4 * MIB, MAX)]
    assert removed.told == [("ram", 6 * MIB, MAX)]
    assert resized.told == [(4 * MIB, 6 * MIB)]


def test_what_has_no_hook_is_no_notifier(blocks: RamBlockList) -> None:
    """TypeError: it would never be told anything."""
    with pytest.raises(TypeError, match="none of ram_block_added"):
        blocks.add_notifier(object())  # type: ignore[arg-type]


def test_a_notifier_is_in_a_list_once(blocks: RamBlockList) -> None:
    """It cannot come twice or go twice; another that is equal to it is another."""

    class Equal(OnlyResized):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    one, other = Equal(), Equal()
    blocks.add_notifier(one)
    with pytest.raises(ValueError, match="already"):
        blocks.add_notifier(one)
    blocks.add_notifier(other)
    blocks.remove_notifier(one)
    with pytest.raises(ValueError, match="not a notifier"):
        blocks.remove_notifier(one)
    ram(blocks).resize(0)
    assert (one.told, other.told) == ([], [(4 * MIB, 0)])
    blocks.close()


# ----------------------------------------------------------------------------------------------------------- veto


@pytest.mark.parametrize("refusal", [RefusalError, KeyboardInterrupt])
@pytest.mark.parametrize("new_length", [0, 2 * MIB, 6 * MIB])
@pytest.mark.parametrize("who", ["a", "b", "c"])
def test_a_notifier_that_refuses_a_resize_leaves_the_block_as_it_was(
    kernel: FakeKernel, blocks: RamBlockList, who: str, new_length: int, refusal: type[BaseException]
) -> None:
    """Those told before it are told the reverse, the last told first; lengths, contents and memory are as before."""
    log, notifiers = three(blocks)
    block = ram(blocks)
    data = filled(block)
    log.clear()
    notifiers[who].refuse["resized"] = [refusal()]
    with pytest.raises(refusal):
        block.resize(new_length)
    order = "cba" if new_length > 4 * MIB else "abc"
    told = order[: order.index(who) + 1]
    new = new_length // MIB
    undone = told[-2::-1]
    assert log == [f"{n} resized ram 4 {new}" for n in told] + [f"{n} resized ram {new} 4" for n in undone]
    assert (block.used_length, contents(block)) == (4 * MIB, data)
    assert {n.known["ram"] for n in notifiers.values()} == {4 * MIB}
    assert (block.state.memory.length, block.state.memory.retained) == (4 * MIB, 0)
    blocks._check()
    block.resize(new_length)
    block.remove()


@pytest.mark.parametrize("refusal", [RefusalError, KeyboardInterrupt])
@pytest.mark.parametrize("new_length", [0, 2 * MIB, 6 * MIB])
def test_a_callback_that_raises_undoes_the_resize(
    blocks: RamBlockList, new_length: int, refusal: type[BaseException]
) -> None:
    """All notifiers are told the reverse, the last told first."""
    log, _ = three(blocks)

    def callback(_idstr: str, _new_length: int) -> None:
        assert block.used_length == new_length
        raise refusal

    block = blocks.add("ram", used_length=4 * MIB, max_length=MAX, resized=callback)
    data = filled(block)
    log.clear()
    with pytest.raises(refusal):
        block.resize(new_length)
    order = "cba" if new_length > 4 * MIB else "abc"
    assert [line[0] for line in log] == [*order, *order[::-1]]
    assert (block.used_length, block.state.memory.retained, contents(block)) == (4 * MIB, 0, data)
    blocks._check()
    block.remove()


@pytest.mark.parametrize("refusal", [RefusalError, KeyboardInterrupt])
@pytest.mark.parametrize("who", ["a", "b", "c"])
def test_a_block_that_a_notifier_refuses_never_was(
    kernel: FakeKernel, blocks: RamBlockList, who: str, refusal: type[BaseException]
) -> None:
    """Those told of it are told that it is gone, and its memory is given back."""
    log, notifiers = three(blocks)
    notifiers[who].refuse["added"] = [refusal()]
    with pytest.raises(refusal):
        ram(blocks)
    told = "cba"["cba".index(who) :: -1][1:]
    assert [line[:9] for line in log if "removed" in line] == [f"{n} removed" for n in told]
    assert not any(n.known for n in notifiers.values())
    assert (len(blocks), kernel.trace[-1].call) == (0, "munmap")
    ram(blocks).remove()


@pytest.mark.parametrize("refusal", [RefusalError, KeyboardInterrupt])
def test_a_block_that_a_notifier_wants_kept_stays(blocks: RamBlockList, refusal: type[BaseException]) -> None:
    """Those told that it is gone are told that it is there."""
    log, notifiers = three(blocks)
    block = ram(blocks)
    data = filled(block)
    log.clear()
    notifiers["a"].refuse["removed"] = [refusal()]
    with pytest.raises(refusal):
        block.remove()
    assert [line[:7] for line in log] == ["c remov", "b remov", "a remov", "b added", "c added"]
    assert (blocks["ram"], contents(block)) == (block, data)
    blocks._check()
    block.resize(MAX)
    block.remove()


@pytest.mark.parametrize("refusal", [RefusalError, KeyboardInterrupt])
def test_a_notifier_that_refuses_a_block_does_not_come(blocks: RamBlockList, refusal: type[BaseException]) -> None:
    """It has been told that the blocks it knew are gone, the last told first."""
    for name in "abc":
        ram(blocks, idstr=name)
    notifier = Notifier()
    names = [block.idstr for block in blocks]
    refusals = [refusal]
    notifier.hook = lambda block: _raise_for(block, names[2], refusals)
    with pytest.raises(refusal):
        blocks.add_notifier(notifier)
    assert [line[:-4] for line in notifier.log] == [
        *(f"added {name}" for name in names),
        f"removed {names[1]}",
        f"removed {names[0]}",
    ]
    assert not notifier.known
    notifier.hook = lambda _block: None
    blocks.add_notifier(notifier)
    blocks.close()


def _raise_for(block: RamBlock, idstr: str, refusals: list[type[BaseException]]) -> None:
    if block.idstr == idstr and refusals:
        raise refusals.pop()


def test_a_notifier_that_refuses_to_go_stays(blocks: RamBlockList) -> None:
    """It is told again of the blocks that it was told are gone."""
    for name in "abc":
        ram(blocks, idstr=name)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    names = [block.idstr for block in blocks]
    notifier.log.clear()
    refusals: list[type[BaseException]] = [RefusalError]
    notifier.hook = lambda block: _raise_for(block, names[0], refusals)
    with pytest.raises(RefusalError):
        blocks.remove_notifier(notifier)
    notifier.hook = lambda _block: None
    assert notifier.known.keys() == set(names)
    assert [line[0] for line in notifier.log] == [*"rrr", *"aa"]
    blocks[names[1]].resize(0)
    assert notifier.known[names[1]] == 0
    blocks.close()


# -------------------------------------------------------------------------------------------- an undo that fails


@pytest.mark.parametrize("failure", [RefusalError, KeyboardInterrupt])
@pytest.mark.parametrize("cause", [RefusalError, KeyboardInterrupt])
def test_an_undo_that_fails_is_told_with_its_cause_and_the_rest_is_undone(
    blocks: RamBlockList, cause: type[BaseException], failure: type[BaseException]
) -> None:
    """Nothing ends the undo in the middle; the first exception is the cause, then those of the undo."""
    log, notifiers = three(blocks)
    block = ram(blocks)
    log.clear()
    notifiers["a"].refuse["resized"] = [cause("why")]
    notifiers["b"].refuse["resized 6 4"] = [failure("undo")]
    with pytest.raises(RollbackError, match="from 4 MiB to 6 MiB failed, and the undo failed too") as raised:
        block.resize(6 * MIB)
    assert [line[0] for line in log] == ["c", "b", "a", "b", "c"]
    first, second = raised.value.exceptions
    assert isinstance(first, RefusalError if cause is RefusalError else VfioError)
    assert isinstance(second, RefusalError if failure is RefusalError else VfioError)
    assert isinstance(raised.value.__cause__, cause)
    assert block.used_length == 4 * MIB
    assert notifiers["b"].known["ram"] == 6 * MIB


@pytest.mark.parametrize("length", [0, 2 * MIB, 6 * MIB, MAX])
def test_what_a_failed_undo_has_kept_is_let_go_by_the_next_resize_that_succeeds(
    blocks: RamBlockList, length: int
) -> None:
    """All listeners have told then that they reach what is in use, and no more: parts can be given back again."""
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    notifier.refuse["resized"] = [RollbackError("broken", [RefusalError()])]
    with pytest.raises(RollbackError):
        block.resize(6 * MIB)
    assert block.state.memory.held == 6 * MIB
    block.resize(length)
    assert block.state.memory.held == 0
    blocks.remove_notifier(notifier)
    block.resize(2 * MIB)
    filled(block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block.discard(0, MIB)
    assert contents(block)[:MIB] == bytes(MIB)
    block.remove()


@pytest.mark.parametrize(
    "refusal",
    [RollbackError("broken", [RefusalError()]), UnmapSizeError(iova=0, asked=1, unmapped=0)],
    ids=["rollback", "unmap size"],
)
def test_memory_that_a_device_may_still_reach_is_kept_when_a_growth_is_refused(
    kernel: FakeKernel, blocks: RamBlockList, refusal: VfioError
) -> None:
    """No call takes it away, the block has its old length, and growing again finds zeros in the same pages."""
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    data = filled(block)
    kernel.clear_trace()
    notifier.refuse["resized"] = [refusal]
    notifier.hook = lambda block: ctypes.memset(block.vaddr + 4 * MIB, 0xEE, 2 * MIB) and None
    with pytest.raises(type(refusal)):
        block.resize(6 * MIB)
    notifier.hook = lambda _block: None
    assert (block.used_length, block.state.memory.retained) == (4 * MIB, 2 * MIB)
    assert contents(block) == data
    assert ctypes.string_at(block.vaddr + 6 * MIB - 1, 1) == b"\xee"
    blocks._check()
    block.resize(MAX)
    assert contents(block) == data + bytes(4 * MIB)
    assert {call.call for call in kernel.trace} == {"mprotect"}
    block.remove()


def test_memory_of_a_block_that_never_was_is_kept_when_a_device_may_reach_it(
    kernel: FakeKernel, blocks: RamBlockList
) -> None:
    """Nothing is unmapped, though there is no such block."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    notifier.refuse["added"] = [UnmapSizeError(iova=0, asked=1, unmapped=0)]
    with pytest.raises(UnmapSizeError):
        ram(blocks)
    assert "munmap" not in [call.call for call in kernel.trace[-2:]]
    assert len(blocks) == 0
    gc.collect()
    assert kernel.trace[-1].call == "mprotect"


def test_a_shrink_whose_undo_fails_gives_nothing_back(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """Old length, all of the memory."""
    _, notifiers = three(blocks)
    block = ram(blocks)
    data = filled(block)
    kernel.clear_trace()
    notifiers["b"].refuse["resized"] = [RefusalError()]
    notifiers["a"].refuse["resized 2 4"] = [RefusalError()]
    with pytest.raises(RollbackError):
        block.resize(2 * MIB)
    assert (block.used_length, contents(block), kernel.trace) == (4 * MIB, data, [])
    blocks._check()


def test_a_notifier_that_came_half_and_could_not_go_keeps_all_memory_for_ever(
    kernel: FakeKernel, blocks: RamBlockList
) -> None:
    """It is in no list, so that nobody would hear when its device lets go."""
    made = [ram(blocks, idstr=name) for name in "ab"]
    notifier = Notifier()
    last = tuple(blocks)[-1].idstr
    notifier.hook = lambda block: _raise_for(block, last, [RefusalError])
    notifier.refuse["removed"] = [RefusalError()]
    with pytest.raises(RollbackError):
        blocks.add_notifier(notifier)
    kernel.clear_trace()
    made[0].resize(0)
    made[0].resize(2 * MIB)
    assert contents(made[0]) == bytes(2 * MIB)
    blocks._check()
    blocks.close()
    assert {call.call for call in kernel.trace} == {"mprotect"}


# ------------------------------------------------------------------------------------- memory that does not come back


def test_a_shrink_whose_memory_stays_is_a_warning(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """At the line that asked for it, with the numbers; the block has its new length."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    block = ram(blocks)
    data = filled(block)
    kernel.fail(call="mmap", errno=errno.ENOMEM)
    with pytest.warns(MemoryNotReturnedWarning, match="shrank to 1 MiB, but 3 MiB could not be released") as caught:
        block.resize(MIB)
    assert caught[0].filename == __file__
    assert (block.used_length, notifier.known["ram"], contents(block)) == (MIB, MIB, data[:MIB])
    blocks._check()
    block.resize(MAX)
    assert contents(block) == data[:MIB] + bytes(7 * MIB)
    block.remove()


def test_where_warnings_are_errors_everything_is_in_order_first(kernel: FakeKernel, blocks: RamBlockList) -> None:
    """The resize is complete when the warning is raised."""
    called: list[int] = []
    block = blocks.add("ram", used_length=4 * MIB, max_length=MAX, resized=lambda _idstr, new: called.append(new))
    notifier = Notifier()
    blocks.add_notifier(notifier)
    kernel.fail(call="mmap", errno=errno.ENOMEM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MemoryNotReturnedWarning):
            block.resize(MIB)
    assert (block.used_length, notifier.known["ram"], called) == (MIB, MIB, [MIB])
    blocks._check()
    block.resize(2 * MIB)
    block.remove()


@pytest.mark.parametrize("discard_fails", [False, True])
def test_what_stayed_reads_zero_when_it_is_seen_again(
    kernel: FakeKernel, blocks: RamBlockList, *, discard_fails: bool
) -> None:
    """Also where MADV_DONTNEED fails."""
    block = ram(blocks)
    data = filled(block)
    kernel.fail(call="mmap", errno=errno.ENOMEM)
    with pytest.warns(MemoryNotReturnedWarning):
        block.resize(MIB)
    if discard_fails:
        kernel.fail(call="madvise", errno=errno.ENOMEM, nth=len(block.settings.advices) + 1)
    block.resize(3 * MIB)
    assert contents(block) == data[:MIB] + bytes(2 * MIB)
    block.remove()


def test_a_refused_growth_whose_memory_stays_is_no_further_failure(
    kernel: FakeKernel, blocks: RamBlockList, caplog: pytest.LogCaptureFixture
) -> None:
    """The refusal is what is raised; the loss is logged, and what stayed reads zero."""
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    notifier.refuse["resized"] = [RefusalError()]
    notifier.hook = lambda block: ctypes.memset(block.vaddr + 4 * MIB, 0xEE, 2 * MIB) and None
    kernel.fail(call="mmap", errno=errno.ENOMEM)
    with pytest.raises(RefusalError):
        block.resize(6 * MIB)
    notifier.hook = lambda _block: None
    assert "keeps the memory of a refused grow" in caplog.text
    assert (block.used_length, block.state.memory.retained) == (4 * MIB, 2 * MIB)
    block.resize(6 * MIB)
    assert contents(block) == bytes(6 * MIB)
    block.remove()


def test_a_refused_block_whose_address_space_stays_is_no_further_failure(
    kernel: FakeKernel, blocks: RamBlockList, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller hears why there is no block."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    notifier.refuse["added"] = [RefusalError()]
    notifier.hook = lambda _block: kernel.fail(call="munmap", errno=errno.ENOMEM)
    with pytest.raises(RefusalError):
        ram(blocks)
    assert "could not be unmapped" in caplog.text


# ---------------------------------------------------------------------------------------------------------- views


def test_a_view_is_of_what_is_used_and_can_be_written(blocks: RamBlockList) -> None:
    """numpy takes it as it is, and sees what the block has."""
    block = ram(blocks)
    with block.view() as view:
        assert (len(view), view.format, view.readonly) == (4 * MIB, "B", False)
        array = np.frombuffer(view, dtype=np.uint32)
        array[:] = 0x01020304
        del array
    assert contents(block) == b"\x04\x03\x02\x01" * MIB
    block.remove()


def test_a_block_itself_is_a_buffer(blocks: RamBlockList) -> None:
    """`__buffer__` is what memoryview(block) calls from Python 3.12 on."""
    block = ram(blocks)
    filled(block)
    view = memoryview(block) if sys.version_info >= (3, 12) else block.__buffer__(0)
    assert isinstance(view, memoryview)
    assert bytes(view) == contents(block)
    with pytest.raises(BufferError):
        block.resize(0)
    view.release()
    block.remove()


def of_slice(view: memoryview) -> object:
    """The end of it, while the whole is released."""
    part = view[4 * MIB - 16 :]
    view.release()
    return part


Keep = Callable[[memoryview], object]
KEEPERS: list[Keep] = [
    lambda view: view,
    of_slice,
    lambda view: np.frombuffer(view, dtype=np.uint8),
    lambda view: np.frombuffer(view, dtype=np.uint8)[:8],
    lambda view: view.cast("Q")[::2],
    (ctypes.c_char * 8).from_buffer,
]


@pytest.mark.parametrize("keep", KEEPERS, ids=["view", "slice", "array", "part of array", "cast", "ctypes"])
def test_a_block_does_not_shrink_or_go_under_a_live_view(kernel: FakeKernel, blocks: RamBlockList, keep: Keep) -> None:
    """BufferError before anybody is told and before any system call; growing is fine; later all is possible."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    block = ram(blocks)
    kept = keep(block.view())
    notifier.log.clear()
    kernel.clear_trace()
    changes: list[Callable[[], None]] = [
        lambda: block.resize(4 * MIB - PAGE_SIZE),
        lambda: block.resize(0),
        block.remove,
    ]
    for refused in changes:
        with pytest.raises(BufferError, match="a live view reaches 4 MiB"):
            refused()
    assert (notifier.log, kernel.trace, block.used_length) == ([], [], 4 * MIB)
    block.resize(6 * MIB)
    block.resize(4 * MIB)
    del kept
    block.resize(2 * MIB)
    block.remove()


def test_a_view_holds_what_it_reaches_and_no_more(blocks: RamBlockList) -> None:
    """A view of 2 MiB lets the block shrink to 2 MiB, and an empty one to nothing."""
    block = ram(blocks, 2 * MIB)
    view = block.view()
    block.resize(MAX)
    with block.view(), pytest.raises(BufferError, match="view reaches 8 MiB"):
        block.resize(6 * MIB)
    block.resize(2 * MIB)
    with pytest.raises(BufferError, match="shrunk to 1 MiB"):
        block.resize(MIB)
    view.release()
    block.resize(0)
    empty = block.view()
    block.remove()
    assert len(empty) == 0


@pytest.mark.parametrize("keep", KEEPERS, ids=["view", "slice", "array", "part of array", "cast", "ctypes"])
def test_a_view_of_a_part_lets_the_block_shrink_to_the_end_of_the_part(blocks: RamBlockList, keep: Keep) -> None:
    """A queue at the start of a block stays in view while the rest comes and goes. The last part of several decides."""
    block = ram(blocks)
    data = filled(block)
    kept = [keep(block.view(PAGE_SIZE, PAGE_SIZE)), keep(block.view(offset=0, size=PAGE_SIZE))]
    block.resize(2 * PAGE_SIZE)
    changes: list[Callable[[], None]] = [lambda: block.resize(PAGE_SIZE), block.remove]
    for refused in changes:
        with pytest.raises(BufferError, match="a live view reaches 8 KiB"):
            refused()
    block.resize(4 * MIB)
    assert contents(block)[: 2 * PAGE_SIZE] == data[: 2 * PAGE_SIZE]
    del kept[0]
    block.resize(PAGE_SIZE)
    with pytest.raises(BufferError, match="cannot be emptied or removed: a live view reaches 4 KiB"):
        block.resize(0)
    kept.clear()
    block.remove()


def test_a_view_of_a_part_has_the_bytes_of_the_part(blocks: RamBlockList) -> None:
    """Also one that begins and ends inside of a page, and one of a part that is empty."""
    block = ram(blocks)
    data = filled(block)
    for start, size in ((0, 1), (5, PAGE_SIZE), (4 * MIB - 3, 3), (4 * MIB, 0), (7, 0)):
        with block.view(start, size) as view:
            assert (bytes(view), view.readonly) == (data[start : start + size], False)
    with block.view(np.int64(4 * MIB - 8)) as view:
        assert bytes(view) == data[-8:]
        view[0] = 1
    assert contents(block)[-8] == 1


@pytest.mark.parametrize(
    ("offset", "size", "error"),
    [
        (0, 4 * MIB + 1, ValueError),
        (4 * MIB, 1, ValueError),
        (4 * MIB + 1, None, ValueError),
        (-1, 1, ValueError),
        (0, -1, ValueError),
        (1 << 70, None, ValueError),
        ("0", 1, TypeError),
        (0, 1.0, TypeError),
        (True, None, TypeError),
        (0, False, TypeError),
    ],
)
def test_a_view_of_bytes_that_are_not_in_use_is_refused(
    blocks: RamBlockList, offset: int, size: int | None, error: type[Exception]
) -> None:
    """The memory behind used_length cannot be touched."""
    block = ram(blocks)
    with pytest.raises(error):
        block.view(offset, size)
    block.resize(0)


@pytest.mark.parametrize("keep", KEEPERS, ids=["view", "slice", "array", "part of array", "cast", "ctypes"])
def test_closing_the_list_leaves_memory_under_a_live_view(kernel: FakeKernel, keep: Keep) -> None:
    """All are told that the block is gone; the last view that goes gives the memory back, and not before."""
    notifier = Notifier()
    with RamBlockList(kernel=kernel) as blocks:
        blocks.add_notifier(notifier)
        block = ram(blocks)
        data = filled(block)
        vaddr, empty = block.vaddr, block.view()[:0]
        kept = [keep(block.view()), keep(block.view())]
    assert (len(blocks), notifier.known) == (0, {})
    with pytest.raises(ClosedError):
        block.view()
    del block
    del empty
    kept.pop()
    assert ctypes.string_at(vaddr, 4 * MIB) == data
    kernel.clear_trace()
    kept.pop()
    assert [(call.call, call.given) for call in kernel.trace] == [("munmap", (vaddr, MAX + PAGE_SIZE))]


def test_a_view_that_goes_in_the_middle_of_a_change_gives_memory_back_at_its_end(
    kernel: FakeKernel, blocks: RamBlockList
) -> None:
    """No address space goes while another block is being changed."""
    other = RamBlockList(kernel=kernel)
    views = [ram(other).view()]
    other.close()
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)

    def forget(_block: RamBlock) -> None:
        views.clear()
        kernel.clear_trace()

    notifier.hook = forget
    block.resize(2 * MIB)
    assert [call.call for call in kernel.trace][-1] == "munmap"
    assert [call.call for call in kernel.trace].count("munmap") == 1


def test_a_view_that_goes_in_a_child_leaves_the_parents_memory(kernel: FakeKernel) -> None:
    """The child makes no call."""
    with RamBlockList(kernel=kernel) as blocks:
        settings = MemorySettings(dontfork=False)
        views = [blocks.add("ram", used_length=MIB, max_length=MAX, settings=settings).view()]

    def use() -> None:
        kernel.clear_trace()
        views.clear()
        assert not kernel.trace

    assert in_child(use) == 0
    assert views[0][0] == 0


def test_an_error_of_the_program_is_never_replaced_by_one_of_the_close(kernel: FakeKernel) -> None:
    """It leaves the with block as it is; what could not be removed is a note on it."""
    notifier = Notifier()
    notifier.refuse["removed"] = [RefusalError("stays")]
    blocks = RamBlockList(kernel=kernel)
    blocks.add_notifier(notifier)
    ram(blocks)
    with pytest.raises(RuntimeError, match="mine") as caught, blocks:
        raise RuntimeError("mine")
    assert "stays" in caught.value.__notes__[0]
    blocks.close()


@pytest.mark.parametrize("change", ["shrink", "remove"])
def test_a_view_that_a_hook_has_taken_meanwhile_refuses_the_change(
    kernel: FakeKernel, blocks: RamBlockList, change: str
) -> None:
    """All are told the reverse: memory does not go under it."""
    _, notifiers = three(blocks)
    block = ram(blocks)
    data = filled(block)
    views: list[memoryview] = []
    notifiers["b"].hook = lambda block: views.append(block.view())
    with pytest.raises(BufferError, match="a live view reaches 4 MiB"):
        block.remove() if change == "remove" else block.resize(0)
    assert {n.known["ram"] for n in notifiers.values()} == {4 * MIB}
    assert bytes(views[0]) == contents(block) == data
    notifiers["b"].hook = lambda _block: None
    blocks._check()
    views.clear()
    block.resize(0)
    block.remove()


def test_memory_stays_under_a_view_that_a_callback_took_before_it_refused(blocks: RamBlockList) -> None:
    """The growth is undone, but what the view reaches can still be read; later it is given back."""
    views: list[memoryview] = []

    def callback(_idstr: str, new_length: int) -> None:
        if new_length == 6 * MIB:
            views.append(block.view())
            raise RefusalError

    block = blocks.add("ram", used_length=4 * MIB, max_length=MAX, resized=callback)
    with pytest.raises(RefusalError):
        block.resize(6 * MIB)
    assert (block.used_length, block.state.memory.retained) == (4 * MIB, 2 * MIB)
    assert views[0][6 * MIB - 1] == 0
    blocks._check()
    with pytest.raises(BufferError):
        block.remove()
    views.clear()
    block.resize(2 * MIB)
    assert block.state.memory.retained == 0
    block.remove()


def test_memory_of_a_refused_block_stays_under_a_view_that_a_hook_has_taken(
    kernel: FakeKernel, blocks: RamBlockList
) -> None:
    """There is no such block, but the view can still be read."""
    views: list[memoryview] = []
    _, notifiers = three(blocks)
    notifiers["c"].hook = lambda block: views.append(block.view())
    notifiers["a"].refuse["added"] = [RefusalError()]
    with pytest.raises(RefusalError):
        ram(blocks)
    assert views[0][4 * MIB - 1] == 0
    assert len(blocks) == 0


# ------------------------------------------------------------------------------------------------------ reentrancy


@pytest.mark.parametrize("event", ["added", "removed", "resized", "callback"])
def test_a_hook_that_changes_the_list_is_told_so(blocks: RamBlockList, event: str) -> None:
    """ReentrancyError for each kind of change, in place of a deadlock; looking is allowed."""
    notifier = Notifier()
    refused: list[str] = []

    def change(_block: RamBlock) -> None:
        changes: dict[str, Callable[[], object]] = {
            "add": lambda: ram(blocks, idstr="new"),
            "remove": other.remove,
            "resize": lambda: other.resize(0),
            "resize back": lambda: other.resize(other.used_length + MIB),
            "add notifier": lambda: blocks.add_notifier(OnlyAdded()),
            "remove notifier": lambda: blocks.remove_notifier(notifier),
        }
        for name, action in changes.items():
            with pytest.raises(ReentrancyError):
                action()
            refused.append(name)
        assert blocks["other"] is other
        assert blocks.block_at(other.vaddr) is other
        assert len(other.view()) == 4 * MIB

    other = ram(blocks, idstr="other")
    blocks.add_notifier(notifier)
    callback = (lambda _idstr, _new: change(other)) if event == "callback" else None
    if event in ("added", "callback"):
        notifier.hook = change if event == "added" else notifier.hook
        block = blocks.add("ram", used_length=4 * MIB, max_length=MAX, resized=callback)
    else:
        block = ram(blocks)
        notifier.hook = change
    if event in ("resized", "callback"):
        block.resize(6 * MIB)
    if event == "removed":
        block.remove()
    notifier.hook = lambda _block: None
    assert len(refused) == 6
    assert other.used_length == 4 * MIB
    blocks.close()


def test_a_list_that_a_hook_closes_is_closed_after_the_change(blocks: RamBlockList) -> None:
    """The block has its new length first."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    block = ram(blocks)
    notifier.hook = lambda _block: blocks.close()
    block.resize(2 * MIB)
    assert [line.split()[0] for line in notifier.log][-2:] == ["resized", "removed"]
    assert len(blocks) == 0


def test_after_a_refused_change_the_list_can_be_changed(blocks: RamBlockList) -> None:
    """ReentrancyError does not stick."""
    notifier = Notifier()
    blocks.add_notifier(notifier)
    block = ram(blocks)
    notifier.hook = lambda block: block.resize(0)
    with pytest.raises(ReentrancyError):
        block.resize(6 * MIB)
    notifier.hook = lambda _block: None
    blocks._check()
    block.resize(6 * MIB)
    blocks.close()


# ------------------------------------------------------------------------------------------------------- children


def test_a_child_cannot_use_a_block_or_its_list(blocks: RamBlockList) -> None:
    """ForkedError that names both processes; closing does nothing, and the parent's block stays as it is."""
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    data = filled(block)
    parent = os.getpid()

    def use() -> None:
        notifier.log.clear()
        uses: list[Callable[[], object]] = [
            lambda: block.resize(0),
            lambda: block.resize(4 * MIB),
            block.remove,
            block.view,
            lambda: block.__buffer__(0),
            lambda: blocks.remove(block),
            lambda: ram(blocks, idstr="new"),
            lambda: blocks.add_notifier(OnlyAdded()),
            lambda: blocks.remove_notifier(notifier),
        ]
        for each in uses:
            with pytest.raises(ForkedError, match=f"process {parent}, and this is its child {os.getpid()}"):
                each()
        blocks.close()
        with blocks:
            pass
        assert (len(blocks), block.used_length, notifier.log) == (1, 4 * MIB, [])

    assert in_child(use) == 0
    assert contents(block) == data
    block.remove()


def test_a_child_of_a_thread_that_holds_the_lock_does_not_wait_for_it(blocks: RamBlockList) -> None:
    """It would wait for ever: that thread is not there."""
    block = ram(blocks)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    inside, go_on = threading.Event(), threading.Event()

    def hook(_block: RamBlock) -> None:
        inside.set()
        assert go_on.wait(60)

    def use() -> None:
        signal.alarm(5)
        with pytest.raises(ForkedError):
            block.resize(0)
        with pytest.raises(ForkedError):
            block.view()
        blocks.close()

    notifier.hook = hook
    thread = threading.Thread(target=block.resize, args=(6 * MIB,))
    thread.start()
    assert inside.wait(60)
    try:
        status = in_child(use)
    finally:
        notifier.hook = lambda _block: None
        go_on.set()
        thread.join()
    assert status == 0
    blocks.close()


# -------------------------------------------------------------------------------------------------------- threads


def test_eight_threads_resize_and_look_at_the_same_time(kernel: FakeKernel) -> None:
    """Notifiers are told one change after the other, each from where the last ended; the list is in order after."""
    blocks = RamBlockList(kernel=kernel)
    notifier = Notifier()
    blocks.add_notifier(notifier)
    shared = ram(blocks, idstr="shared")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        chance = random.Random(number)  # noqa: S311
        own = blocks.add(str(number), used_length=0, max_length=MAX)
        try:
            for turn in range(40):
                for block in (own, shared):
                    with suppress(BufferError):
                        block.resize(chance.randrange(MAX // PAGE_SIZE) * PAGE_SIZE)
                with shared.view() as view:
                    if view:
                        view[-1] = view[0] = number
                assert blocks.block_at(own.vaddr + MAX - 1) is own
                assert blocks[own.idstr] is own
                assert own in tuple(blocks)
                if turn % 10 == 9:
                    own.remove()
                    own = blocks.add(str(number), used_length=MIB, max_length=MAX)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failures == []
    blocks._check()
    assert len(blocks) == 9
    assert notifier.known == {block.idstr: block.used_length for block in blocks}
    blocks.close()
    assert not notifier.known


# ------------------------------------------------------------------------------------------------------ interrupts


@pytest.mark.long
def test_a_signal_handler_that_raises_at_any_time_leaves_the_list_in_order() -> None:
    """Whenever it comes: what the notifier knows is what is used, and everything can be changed again."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    def resize_and_be_interrupted() -> None:
        blocks = RamBlockList()
        notifier = Quick()
        blocks.add_notifier(notifier)
        block = blocks.add("ram", used_length=MIB, max_length=4 * MIB)
        signal.signal(signal.SIGALRM, interrupt)
        chance = random.Random(5)  # noqa: S311
        interrupted = 0
        while interrupted < 100:
            length = chance.randrange(1 + 4 * MIB // PAGE_SIZE) * PAGE_SIZE
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 1.5e-4))
                block.resize(length)
                time.sleep(2e-4)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            blocks._check()
            assert notifier.known == block.used_length
            assert contents(block) == bytes(block.used_length)
            ctypes.memset(block.vaddr, 0, block.used_length)
        blocks.close()

    assert in_child(resize_and_be_interrupted) == 0


class Quick:
    """A notifier that does as good as nothing, in one operation that cannot be interrupted in the middle."""

    def __init__(self) -> None:
        self.known = MIB

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """A block changes."""
        del block, old_length
        self.known = new_length


def test_the_lengths_of_a_block_cannot_be_assigned() -> None:
    """They are what the memory is."""
    with RamBlockList() as blocks:
        block = blocks.add("ram", used_length=MIB, max_length=4 * MIB)
        for name in ("max_length", "used_length", "vaddr"):
            with pytest.raises(AttributeError):
                setattr(block, name, 8 * MIB)
