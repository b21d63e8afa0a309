"""examples/kvm_slots.py: the slots of /dev/kvm are what blocks hold, whoever refuses, and a guest reaches just that.

What only says in which order slots are set and taken back is held to a book that refuses on demand, by itself and in
front of the running kernel's KVM; what a slot is, only the running kernel says.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ParamSpec

import pytest

import kvm_ioctls
import pyvfio
from kvm_machine import CODE, DEV_KVM, Gpa, Mmio, Vcpu, Vm
from kvm_slots import GUEST_PHYSICAL, KvmSlots, Story, obstacle, probe_by_slot, show
from pyvfio import Extent
from pyvfio.kernel import IoctlArgument
from pyvfio.testing import FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE, Vaddr
from tests.unit.fakes import BDF, Interrupt
from tests.unit.processes import in_child, open_fds

ROOT = Path(__file__).resolve().parents[2]
PAGES = 16
MAX = PAGES * PAGE_SIZE
MOST_CALLS = 20  # of one change
Region = tuple[int, int, int]
"""gpa, vaddr and size of a slot."""


class Book:
    """Writes down which slots are set, and passes it on to `vm` if there is one. Refuses what `refuse` says: the first
    call that it is true of raises its error, before (or `after`) it took effect."""

    def __init__(self, vm: Vm | None = None, *, slot_count: int = 64) -> None:
        self.vm = vm
        self.slot_count = vm.slot_count if vm else slot_count
        self.regions: dict[int, Region] = {}
        self.calls: list[str] = []
        self._plan: dict[int, tuple[BaseException, bool]] = {}

    def refuse(self, *nth: int, error: BaseException | None = None, after: bool = False) -> None:
        """These calls from now on (1: the next)."""
        planned = error or OSError(errno.ENOMEM, "as planned")
        self._plan = {len(self.calls) + number: (planned, after) for number in nth}

    def set_region(self, *, slot: int, gpa: int, vaddr: int, size: int) -> None:
        """As asked."""
        self.calls.append(f"{'make' if size else 'delete'} {slot}")
        error, after = self._plan.get(len(self.calls), (None, False))
        if error is not None and not after:
            raise error
        if self.vm is not None:
            self.vm.set_region(slot=slot, gpa=gpa, vaddr=vaddr, size=size)
        if size:
            self.regions[slot] = gpa, vaddr, size
        elif self.regions.pop(slot, None) is None:
            raise OSError(errno.EINVAL, "no such slot")
        if error is not None:
            raise error


@pytest.fixture
def vm() -> Iterator[Vm]:
    """A virtual machine of the running kernel, without memory."""
    with Vm() as made:
        yield made


@pytest.fixture(params=["a book", pytest.param("the kernel", marks=pytest.mark.kvm)])
def book(request: pytest.FixtureRequest) -> Book:
    """By itself, and in front of the running kernel."""
    return Book(request.getfixturevalue("vm") if request.param == "the kernel" else None)


@pytest.fixture
def blocks() -> Iterator[pyvfio.RamBlockList]:
    """An empty list, which is in order at the end of each test."""
    with pyvfio.RamBlockList() as made:
        yield made
        made._check()


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    """The machine's CPU, where KVM can run it."""
    with Vcpu(vm) as made:
        yield made


def add(blocks: pyvfio.RamBlockList, pages: int = 4, idstr: str = "ram", maximum: int = MAX) -> pyvfio.RamBlock:
    """A block of so many pages."""
    return blocks.add(idstr, used_length=pages * PAGE_SIZE, max_length=maximum)


def expected(slots: KvmSlots, blocks: pyvfio.RamBlockList) -> list[Region]:
    """What there is to be: a slot for each populated run of each block."""
    return sorted(
        (slots.gpa(block) + part.start, block.vaddr + part.start, part.size)
        for block in blocks
        for part in block.populated
    )


def check(book: Book, slots: KvmSlots, blocks: pyvfio.RamBlockList) -> None:
    """The slots that are set are those, also where only the kernel can say so."""
    slots._check()
    blocks._check()
    assert sorted(book.regions.values()) == expected(slots, blocks)
    assert [(slot.gpa, slot.vaddr, slot.size) for slot in slots.slots] == expected(slots, blocks)
    if book.vm is not None:
        for block in blocks:
            assert pages_with_slots(book.vm, block, slots) == pages_of(block)
        for number, (gpa, vaddr, size) in book.regions.items():
            book.vm.set_region(slot=number, gpa=gpa, vaddr=vaddr, size=size)  # EINVAL, were it any other


def pages_with_slots(vm: Vm, block: pyvfio.RamBlock, slots: KvmSlots) -> list[int]:
    """Of the first pages that the block may have, those where the kernel has a slot."""
    probe = probe_by_slot(vm)
    return [page for page in range(PAGES) if probe(block, slots.gpa(block), page * PAGE_SIZE)]


def pages_of(block: pyvfio.RamBlock) -> list[int]:
    """Those that are populated."""
    return [page for part in block.populated for page in range(part.start // PAGE_SIZE, part.end // PAGE_SIZE)]


# -------------------------------------------------------------------------------------- what is set, and in which order


def test_a_block_has_one_slot_of_its_length_and_none_when_it_is_empty(book: Book, blocks: pyvfio.RamBlockList) -> None:
    """Through growing, shrinking and 0, at one guest physical address, until it is removed."""
    with KvmSlots(book, blocks) as slots:
        block = add(blocks, 0)
        gpa = slots.gpa(block)
        for pages in (0, 4, 16, 1, 0, 2):
            block.resize(pages * PAGE_SIZE)
            assert list(book.regions.values()) == ([(gpa, block.vaddr, pages * PAGE_SIZE)] if pages else [])
            check(book, slots, blocks)
        block.remove()
        assert book.regions == {}
        assert slots.slots == ()


def test_a_resize_deletes_the_slot_and_makes_it_anew_under_its_number(book: Book, blocks: pyvfio.RamBlockList) -> None:
    """Both ways, for KVM changes no slot in place."""
    with KvmSlots(book, blocks, first_slot=7):
        block = add(blocks, 4)
        block.resize(8 * PAGE_SIZE)
        block.resize(2 * PAGE_SIZE)
        assert book.calls == ["make 7", "delete 7", "make 7", "delete 7", "make 7"]


def test_blocks_that_are_there_already_get_their_slots_too(book: Book, blocks: pyvfio.RamBlockList) -> None:
    """Less the parts that are discarded; and when the notifier goes, all slots go."""
    holed = add(blocks, 8)
    add(blocks, 0, "empty")
    holed.discard(2 * PAGE_SIZE, PAGE_SIZE)
    with KvmSlots(book, blocks) as slots:
        check(book, slots, blocks)
        assert len(book.regions) == 2
    assert book.regions == {}
    slots.close()


def test_each_populated_run_is_a_slot_and_neighbours_are_one(book: Book, blocks: pyvfio.RamBlockList) -> None:
    """Cut by a discard, joined by a populate, and clipped by a shrink."""
    with KvmSlots(book, blocks) as slots:
        block = add(blocks, 16)
        for change, first, pages, runs in (
            (block.discard, 4, 4, 2),
            (block.discard, 10, 2, 3),
            (block.populate, 6, 2, 3),
            (block.populate, 4, 2, 2),
            (block.discard, 0, 1, 2),
        ):
            change(first * PAGE_SIZE, pages * PAGE_SIZE)
            check(book, slots, blocks)
            assert len(book.regions) == runs
        block.resize(11 * PAGE_SIZE)
        check(book, slots, blocks)
        assert len(book.regions) == 1


def test_blocks_have_guest_physical_addresses_for_all_that_they_may_hold(blocks: pyvfio.RamBlockList) -> None:
    """Apart, multiples of 2 MiB, where the guest has no devices; above 4 GiB when there is no room below."""
    with KvmSlots(Book(), blocks) as slots:
        made = [add(blocks, 1, f"{size}", size) for size in (MIB, 5 * MIB, GIB, 2 * GIB, 2 * MIB)]
        places = sorted(Extent(slots.gpa(block), slots.gpa(block) + block.max_length) for block in made)
        assert all(one.end <= other.start for one, other in itertools.pairwise(places))
        assert all(place.start % (2 * MIB) == 0 for place in places)
        assert all(any(w.start <= place.start and place.end <= w.end for w in GUEST_PHYSICAL) for place in places)
        assert slots.gpa(made[3]) >= 1 << 32
        slots._check()


def test_a_block_for_which_there_are_no_addresses_is_refused(blocks: pyvfio.RamBlockList) -> None:
    """ENOSPC, and what a removed block had is given out again."""
    with KvmSlots(Book(), blocks) as slots:
        first = add(blocks, 1, "first", 40 * GIB)
        gpa = slots.gpa(first)
        with pytest.raises(pyvfio.IoctlError, match="no 40 GiB of guest physical addresses") as caught:
            add(blocks, 1, "second", 40 * GIB)
        assert caught.value.errno == errno.ENOSPC
        first.remove()
        assert slots.gpa(add(blocks, 1, "second", 40 * GIB)) == gpa


def test_a_change_for_which_there_are_not_enough_slots_is_refused(blocks: pyvfio.RamBlockList) -> None:
    """And the block keeps what it has."""
    book = Book(slot_count=3)
    with KvmSlots(book, blocks, first_slot=1) as slots:
        block = add(blocks, 8)
        block.discard(2 * PAGE_SIZE, PAGE_SIZE)
        with pytest.raises(pyvfio.IoctlError, match="all 2 slots are taken") as caught:
            block.discard(5 * PAGE_SIZE, PAGE_SIZE)
        assert caught.value.errno == errno.ENOSPC
        check(book, slots, blocks)
        assert len(book.regions) == 2


# ---------------------------------------------------------------------------------------------------- what is refused

_Given = ParamSpec("_Given")


def refusal(action: Callable[_Given, None], *args: _Given.args, **kwargs: _Given.kwargs) -> BaseException | None:
    """What it raises of all that was planned."""
    try:
        action(*args, **kwargs)
    except (OSError, Interrupt, pyvfio.RollbackError) as error:
        return error
    return None


CHANGES: dict[str, Callable[[pyvfio.RamBlock], None]] = {
    "grow": lambda block: block.resize(12 * PAGE_SIZE),
    "shrink": lambda block: block.resize(7 * PAGE_SIZE),
    "shrink below the hole": lambda block: block.resize(PAGE_SIZE),
    "empty": lambda block: block.resize(0),
    "discard": lambda block: block.discard(6 * PAGE_SIZE, PAGE_SIZE),
    "populate": lambda block: block.populate(0, 8 * PAGE_SIZE),
    "remove": lambda block: block.remove(),
}
"""Of a block of eight pages, the third and fourth of which are discarded."""


def holed(blocks: pyvfio.RamBlockList) -> pyvfio.RamBlock:
    """That block."""
    block = add(blocks, 8)
    block.discard(2 * PAGE_SIZE, 2 * PAGE_SIZE)
    return block


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["refused", "interrupted before", "interrupted after"])
def test_whichever_call_of_a_change_fails_everything_is_as_it_was(
    book: Book, blocks: pyvfio.RamBlockList, change: str, how: str
) -> None:
    """Each of them once, refused by the kernel or ended by a signal handler on either side of it; and then it works."""
    error = Interrupt() if "interrupted" in how else OSError(errno.ENOMEM, "as planned")
    with KvmSlots(book, blocks) as slots:
        block = holed(blocks)
        before, gpa, parts = sorted(book.regions.values()), slots.gpa(block), block.populated
        for nth in range(1, MOST_CALLS):
            book.refuse(nth, error=error, after=how.endswith("after"))
            if (failure := refusal(CHANGES[change], block)) is None:
                break
            assert failure is error
            assert (sorted(book.regions.values()), slots.gpa(block), block.populated) == (before, gpa, parts)
            check(book, slots, blocks)
        assert 1 < nth < MOST_CALLS - 1
        book.refuse()
        check(book, slots, blocks)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_change_that_cannot_be_undone_either_is_mended_by_the_next(
    book: Book, blocks: pyvfio.RamBlockList, change: str, *, after: bool
) -> None:
    """RollbackError has both failures, whichever call and which call of its undo fail; a resize sets all right."""
    for nth in range(1, MOST_CALLS):
        with KvmSlots(book, blocks) as slots:
            block = holed(blocks)
            book.refuse(nth, nth + 1, after=after)
            failure = refusal(CHANGES[change], block)
            if failure is None:
                book.refuse()
                break
            assert isinstance(failure, pyvfio.RollbackError)
            assert [str(each) for each in failure.exceptions] == ["[Errno 12] as planned"] * 2
            for pages in (9, 3):
                block.resize(pages * PAGE_SIZE)
                check(book, slots, blocks)
            block.remove()
    assert 1 < nth < MOST_CALLS - 1


def test_a_block_that_is_refused_leaves_neither_slot_nor_addresses(book: Book, blocks: pyvfio.RamBlockList) -> None:
    """The next one has both."""
    with KvmSlots(book, blocks) as slots:
        book.refuse(1)
        with pytest.raises(OSError, match="as planned"):
            add(blocks)
        assert (book.regions, slots.slots) == ({}, ())
        block = add(blocks)
        assert book.calls[-1] == "make 1"
        assert slots.gpa(block) == GUEST_PHYSICAL[0].start
        check(book, slots, blocks)


def test_a_slot_that_cannot_be_taken_back_is_nobody_elses_until_it_is_deleted(
    book: Book, blocks: pyvfio.RamBlockList
) -> None:
    """Its number and its addresses stay with the block that did not come."""
    with KvmSlots(book, blocks) as slots:
        book.refuse(1, error=Interrupt(), after=True)
        book._plan[2] = OSError(errno.ENOMEM, "as planned"), False
        with pytest.raises(pyvfio.RollbackError):
            add(blocks, idstr="lost")
        assert len(book.regions) == 1
        block = add(blocks)
        assert book.calls[-1] == "make 2"
        assert slots.gpa(block) == GUEST_PHYSICAL[0].start + 2 * MIB
    assert book.regions == {}


class Stubborn:
    """A notifier that lets no block go while `refuses`."""

    refuses = False

    def ram_block_removed(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """A block is about to go."""
        if self.refuses:
            raise PermissionError(f"'{block.idstr}' stays, {used_length:#x} of {max_length:#x} bytes")


def test_a_removal_that_another_refuses_leaves_the_block_where_it_was(book: Book, blocks: pyvfio.RamBlockList) -> None:
    """Though there is room further down meanwhile."""
    stubborn = Stubborn()
    blocks.add_notifier(stubborn)  # older, so that it is told when the slots are gone
    with KvmSlots(book, blocks) as slots:
        lower, upper = add(blocks, idstr="lower"), add(blocks, idstr="upper")
        assert slots.gpa(lower) < (gpa := slots.gpa(upper))
        lower.remove()
        stubborn.refuses = True
        with pytest.raises(PermissionError):
            upper.remove()
        assert slots.gpa(upper) == gpa
        check(book, slots, blocks)
        stubborn.refuses = False


def test_blocks_are_where_they_were_for_a_notifier_that_comes_back(book: Book, blocks: pyvfio.RamBlockList) -> None:
    """Unless another block, which it is told of first, has their place now."""
    with KvmSlots(book, blocks) as slots:
        gpas = {block: slots.gpa(block) for block in (add(blocks, idstr="one"), add(blocks, idstr="other"))}
        blocks.remove_notifier(slots)
        assert book.regions == {}
        blocks.add_notifier(slots)
        assert {block: slots.gpa(block) for block in blocks} == gpas
        blocks.remove_notifier(slots)
        while min(blocks, key=lambda block: block.vaddr) in gpas:
            add(blocks, idstr=f"new {len(blocks)}")
        blocks.add_notifier(slots)
        check(book, slots, blocks)


# ------------------------------------------------------------------------------------------- beside VFIO, on one block


class Beside:
    """A list that slots and a mapper of a fake VFIO kernel follow; the `older` of them is told last of a grow."""

    def __init__(self, book: Book, kernel: FakeKernel, stack: ExitStack, *, older: str) -> None:
        self.book, self.kernel = book, kernel
        device = stack.enter_context(pyvfio.open_device(BDF, kernel=kernel))
        self.blocks = stack.enter_context(pyvfio.RamBlockList(kernel=kernel))
        if older == "KVM":
            self.slots = stack.enter_context(KvmSlots(book, self.blocks))
        self.mapper = stack.enter_context(pyvfio.DmaMapper(device.container, self.blocks))
        if older == "VFIO":
            self.slots = stack.enter_context(KvmSlots(book, self.blocks))
        self.block = holed(self.blocks)

    def state(self) -> tuple[object, ...]:
        """What the guest and the device reach, and what there is."""
        mappings = [(m.iova, m.vaddr, m.size) for m in self.kernel.mappings()]
        return sorted(self.book.regions.values()), mappings, self.block.populated, self.slots.gpa(self.block)

    def check(self) -> None:
        """Each has what the block has, and no memory went before a device had lost it."""
        check(self.book, self.slots, self.blocks)
        self.mapper._check()
        self.kernel.check()

    def refuse(self, who: str, nth: int) -> None:
        """The nth call from now of that one."""
        if who == "KVM":
            self.book.refuse(nth)
        else:
            self.kernel.fail(call="ioctl", nth=nth, errno=errno.ENOMEM)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("refuses", ["KVM", "VFIO"])
@pytest.mark.parametrize("older", ["KVM", "VFIO"])
def test_what_kvm_or_vfio_refuses_happens_to_neither(book: Book, older: str, refuses: str, change: str) -> None:
    """Whichever of them came first and whichever call it is; then it happens to both."""
    with ExitStack() as stack:
        world = Beside(book, stack.enter_context(FakeKernel()), stack, older=older)
        before = world.state()
        for nth in range(1, MOST_CALLS):
            world.refuse(refuses, nth)
            if refusal(CHANGES[change], world.block) is None:
                break
            assert world.state() == before
            world.check()
        assert 1 < nth < MOST_CALLS - 1
        world.book.refuse()
        world.kernel.clear_failures()
        world.check()


@pytest.mark.kvm
@pytest.mark.parametrize("older", ["KVM", "VFIO"])
def test_a_grow_into_another_slot_is_refused_by_the_kernel_and_vfio_is_as_it_was(vm: Vm, older: str) -> None:
    """EEXIST of the running kernel, when the old slot is gone already; and a guest stores into the old one again."""
    with ExitStack() as stack:
        vcpu = stack.enter_context(Vcpu(vm))
        world = Beside(Book(vm), stack.enter_context(FakeKernel()), stack, older=older)
        before, gpa = world.state(), world.slots.gpa(world.block)
        with obstacle(vm, gpa + 12 * PAGE_SIZE, world.block.vaddr), pytest.raises(pyvfio.IoctlError) as caught:
            world.block.resize(PAGES * PAGE_SIZE)
        assert caught.value.errno == errno.EEXIST
        assert world.state() == before
        world.check()
        assert vcpu.store(gpa + 8 * PAGE_SIZE - 1, 0x5A) is None
        with world.block.view() as memory:
            assert memory[-1] == 0x5A


# ---------------------------------------------------------------------------------------------------- a random life


def random_change(rng: random.Random, blocks: pyvfio.RamBlockList) -> None:
    """Any that a block can have."""
    block = rng.choice(list(blocks)) if blocks else None
    if block is None or (len(blocks) < 3 and rng.random() < 0.1):
        add(blocks, rng.randint(0, PAGES), str(rng.random()))
    elif rng.random() < 0.1:
        block.remove()
    elif rng.random() < 0.4 or not block.used_length:
        block.resize(rng.randint(0, PAGES) * PAGE_SIZE)
    else:
        first, last = sorted(rng.sample(range(block.used_length // PAGE_SIZE + 1), k=2))
        rng.choice((block.discard, block.populate))(first * PAGE_SIZE, (last - first) * PAGE_SIZE)


def test_whatever_happens_and_fails_the_slots_are_what_the_blocks_hold(
    book: Book, blocks: pyvfio.RamBlockList, random_seed: int
) -> None:
    """Three hundred changes of up to three blocks, in which calls are refused and interrupted here and there."""
    rng = random.Random(random_seed)  # noqa: S311
    refused = 0
    with KvmSlots(book, blocks) as slots:
        for _ in range(300):
            error = rng.choice((OSError(errno.ENOMEM, "as planned"), Interrupt()))
            book.refuse(*rng.choice(((), (1,), (2,), (3,))), error=error, after=rng.random() < 0.5)
            failure = refusal(random_change, rng, blocks)
            assert failure in (None, error)
            refused += failure is not None
            book.refuse()
            check(book, slots, blocks)
    assert refused > 10
    assert book.regions == {}


# ------------------------------------------------------------------------------------------------- the running kernel


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("what", "region", "number"),
    [
        ("another size", (1, 0, 0, 8), errno.EINVAL),
        ("a smaller size", (1, 0, 0, 2), errno.EINVAL),
        ("another vaddr", (1, 0, 4, 4), errno.EINVAL),
        ("a second slot over its end", (2, 3, 0, 4), errno.EEXIST),
        ("deleting what is not there", (2, 0, 0, 0), errno.EINVAL),
    ],
)
def test_a_slot_can_neither_be_changed_in_place_nor_overlapped(
    vm: Vm, blocks: pyvfio.RamBlockList, what: str, region: tuple[int, int, int, int], number: int
) -> None:
    """Which is why a resize deletes it first; the slot is as it was, for setting that once more is no change."""
    block, base = add(blocks, 8), GUEST_PHYSICAL[0].start
    slot, gpa, vaddr, size = region
    vm.set_region(slot=1, gpa=base, vaddr=block.vaddr, size=4 * PAGE_SIZE)
    with pytest.raises(pyvfio.IoctlError, match="KVM_SET_USER_MEMORY_REGION") as caught:
        vm.set_region(
            slot=slot, gpa=base + gpa * PAGE_SIZE, vaddr=block.vaddr + vaddr * PAGE_SIZE, size=size * PAGE_SIZE
        )
    assert caught.value.errno == number, what
    assert caught.value.hint
    vm.set_region(slot=1, gpa=base, vaddr=block.vaddr, size=4 * PAGE_SIZE)


@pytest.mark.kvm
def test_a_guest_stores_into_what_is_in_use_and_into_nothing_else(
    vm: Vm, vcpu: Vcpu, blocks: pyvfio.RamBlockList
) -> None:
    """Behind the end its store is KVM_EXIT_MMIO; when the block has grown it lands, and after a shrink no more."""
    with KvmSlots(vm, blocks) as slots:
        block = add(blocks, 4)
        gpa = slots.gpa(block)
        for value, pages in enumerate((4, 16, 1, 8), start=1):
            block.resize(pages * PAGE_SIZE)
            end = pages * PAGE_SIZE
            for offset in (0, end - 1):
                assert vcpu.store(gpa + offset, value) is None
                with block.view() as memory:
                    assert memory[offset] == value
            for offset in {end, MAX - 1, MAX} - {end - 1}:
                assert vcpu.store(gpa + offset, value) == Mmio(gpa + offset, bytes([value]))
        block.remove()
        assert vcpu.store(gpa, 1) == Mmio(gpa, b"\x01")


@pytest.mark.kvm
def test_a_guest_loads_what_the_block_holds_and_zeros_where_it_grew(
    vm: Vm, vcpu: Vcpu, blocks: pyvfio.RamBlockList
) -> None:
    """Of what was given back nothing is left."""
    with KvmSlots(vm, blocks) as slots:
        block = add(blocks, 8)
        gpa, last = slots.gpa(block), 8 * PAGE_SIZE - 1
        with block.view() as memory:
            memory[0], memory[last] = 0x11, 0x22
        assert (vcpu.load(gpa), vcpu.load(gpa + last)) == (0x11, 0x22)
        block.resize(4 * PAGE_SIZE)
        assert vcpu.load(gpa + last) == Mmio(gpa + last, None)
        block.resize(8 * PAGE_SIZE)
        assert (vcpu.load(gpa), vcpu.load(gpa + last)) == (0x11, 0)


@pytest.mark.kvm
def test_a_guest_does_not_reach_what_is_discarded(vm: Vm, vcpu: Vcpu, blocks: pyvfio.RamBlockList) -> None:
    """But what lies around it, and when it is populated again zeros."""
    with KvmSlots(vm, blocks) as slots:
        block = add(blocks, 8)
        first, end = slots.gpa(block) + 2 * PAGE_SIZE, slots.gpa(block) + 4 * PAGE_SIZE
        assert [vcpu.store(gpa, 7) for gpa in (first - 1, first, end - 1, end)] == [None] * 4
        block.discard(2 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert [vcpu.load(gpa) for gpa in (first - 1, end)] == [7, 7]
        assert [vcpu.load(gpa) for gpa in (first, end - 1)] == [Mmio(first, None), Mmio(end - 1, None)]
        block.populate(2 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert [vcpu.load(gpa) for gpa in (first - 1, first, end - 1, end)] == [7, 0, 0, 7]


@pytest.mark.kvm
def test_a_guest_has_fresh_pages_as_soon_as_they_are_there(vm: Vm, vcpu: Vcpu, blocks: pyvfio.RamBlockList) -> None:
    """KVM hears of it without any slot being touched."""
    with KvmSlots(vm, blocks) as slots:
        block = add(blocks, 8)
        first, end = slots.gpa(block) + 2 * PAGE_SIZE, slots.gpa(block) + 3 * PAGE_SIZE
        assert [vcpu.store(gpa, 7) for gpa in (first - 1, first, end)] == [None] * 3
        block.remap(2 * PAGE_SIZE, PAGE_SIZE)
        assert [vcpu.load(gpa) for gpa in (first - 1, first, end)] == [7, 0, 7]
        assert vcpu.store(first, 9) is None
        with block.view() as memory:
            assert memory[2 * PAGE_SIZE] == 9


@pytest.mark.kvm
def test_a_slot_that_stays_behind_a_shrunk_end_reaches_no_memory(
    vm: Vm, vcpu: Vcpu, blocks: pyvfio.RamBlockList
) -> None:
    """KVM follows this process's memory: EFAULT, or KVM_EXIT_MMIO where it emulates the store. The slot is left."""
    block, gpa = add(blocks, 4), GUEST_PHYSICAL[0].start
    vm.set_region(slot=1, gpa=gpa, vaddr=block.vaddr, size=4 * PAGE_SIZE)
    behind = gpa + 3 * PAGE_SIZE
    assert vcpu.store(behind, 1) is None
    block.resize(2 * PAGE_SIZE)
    outcome: list[Mmio | None] = []
    failure = refusal(lambda: outcome.append(vcpu.store(behind, 1)))
    assert outcome == [Mmio(behind, b"\x01")] or getattr(failure, "errno", 0) == errno.EFAULT
    assert probe_by_slot(vm)(block, Gpa(gpa), 3 * PAGE_SIZE)
    assert vcpu.store(gpa + PAGE_SIZE, 2) is None


@pytest.mark.kvm
def test_a_guest_stores_above_the_code_that_it_runs_and_below_4_gib_only(vcpu: Vcpu) -> None:
    """ValueError elsewhere; and the last of these addresses are nobody's."""
    assert vcpu.load(CODE) == 0x88
    assert vcpu.store((1 << 32) - 1, 3) is not None
    for gpa in (-1, 1 << 32):
        with pytest.raises(ValueError, match="4 GiB"):
            vcpu.store(gpa, 3)


@pytest.mark.kvm
def test_a_child_can_neither_set_slots_nor_run_the_guest(vm: Vm, vcpu: Vcpu) -> None:
    """A machine belongs to the process that made it, for the kernel (EIO) and here; closing it changes nothing."""

    fd = vm.fd

    def child() -> None:
        region = kvm_ioctls.kvm_userspace_memory_region(slot=1, guest_phys_addr=GUEST_PHYSICAL[0].start)
        with pytest.raises(OSError, match="Errno 5"):
            pyvfio.LinuxKernel().ioctl(fd, kvm_ioctls.KVM_SET_USER_MEMORY_REGION, region)
        with pytest.raises(pyvfio.ForkedError):
            vm.set_region(slot=1, gpa=GUEST_PHYSICAL[0].start, vaddr=0, size=0)
        with pytest.raises(pyvfio.ForkedError):
            vcpu.store(CODE, 0)
        vcpu.close()
        vm.close()

    assert in_child(child) == 0
    assert vcpu.load(CODE) == 0x88


@pytest.mark.kvm
def test_nothing_is_left_of_a_machine_that_is_closed(blocks: pyvfio.RamBlockList) -> None:
    """No descriptor and no memory, in whichever order it is closed, and its slot of code goes with the CPU."""
    before = open_fds()
    for first in ("vcpu", "vm"):
        kernel = Counting()
        vm = Vm(kernel)
        vcpu = Vcpu(vm)
        with KvmSlots(vm, blocks):
            with pytest.raises(pyvfio.IoctlError, match="EEXIST"), obstacle(vm, CODE, add(blocks, idstr=first).vaddr):
                pass
            blocks[first].remove()
        (vcpu if first == "vcpu" else vm).close()
        if first == "vcpu":
            with obstacle(vm, CODE, 0x10000):
                pass
        vcpu.close()
        vm.close()
        vm.close()
        assert kernel.mapped == {}
        assert open_fds() == before


# ---------------------------------------------------------------------------------------------- kernels that differ


class Counting(pyvfio.LinuxKernel):
    """The running kernel; `mapped` is what it has mapped, `answers` what it answers instead, by request, and `spoil` is
    given each slot that is set."""

    def __init__(self) -> None:
        super().__init__()
        self.mapped: dict[int, int] = {}
        self.answers: dict[int, list[int | OSError]] = {}
        self.refusal: OSError | None = None
        self.spoil: Callable[[kvm_ioctls.kvm_userspace_memory_region], None] = lambda _region: None

    def open(self, path: str, flags: int) -> int:
        """As `refusal` says."""
        if self.refusal is not None:
            raise self.refusal
        return super().open(path, flags)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """As `answers` say."""
        if isinstance(argument, kvm_ioctls.kvm_userspace_memory_region):
            self.spoil(argument)
        if not (planned := self.answers.get(request, [])):
            return super().ioctl(fd, request, argument)
        if isinstance(answer := planned.pop(0), OSError):
            raise answer
        return answer

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """Written down."""
        got = super().mmap(vaddr, size, protection, flags, fd=fd, offset=offset)
        self.mapped[got] = size
        return got

    def munmap(self, vaddr: int, size: int) -> None:
        """Written down."""
        super().munmap(vaddr, size)
        assert self.mapped.pop(vaddr) == size


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOENT, pyvfio.UnavailableError), (errno.EACCES, pyvfio.AccessDeniedError)]
)
def test_without_dev_kvm_there_is_no_machine(number: int, error: type[Exception]) -> None:
    """The error says what is missing."""
    kernel = Counting()
    kernel.refusal = OSError(number, os.strerror(number))
    with pytest.raises(error, match=DEV_KVM):
        Vm(kernel)


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("request_name", "answers", "message"),
    [
        ("KVM_GET_API_VERSION", [11], "API version 11"),
        ("KVM_CHECK_EXTENSION", [1, 0], "KVM_CAP_SYNC_MMU"),
        ("KVM_CREATE_VM", [OSError(errno.ENOMEM, "no memory")], "KVM_CREATE_VM"),
    ],
)
def test_a_kvm_that_lacks_something_is_refused_and_closed(
    request_name: str, answers: list[int | OSError], message: str
) -> None:
    """Before there is a machine."""
    before, kernel = open_fds(), Counting()
    kernel.answers[vars(kvm_ioctls)[request_name]] = answers
    with pytest.raises(pyvfio.VfioError, match=message):
        Vm(kernel)
    assert open_fds() == before


@pytest.mark.kvm
@pytest.mark.parametrize("name", ["KVM_SET_USER_MEMORY_REGION", "KVM_GET_SREGS", "KVM_SET_SREGS"])
def test_a_cpu_that_cannot_be_made_leaves_nothing(name: str) -> None:
    """Neither its descriptor nor its memory nor its slot."""
    before, kernel = open_fds(), Counting()
    with Vm(kernel) as vm:
        kernel.answers[vars(kvm_ioctls)[name]] = [OSError(errno.ENOMEM, "no memory")]
        with pytest.raises(pyvfio.IoctlError, match=name):
            Vcpu(vm)
        assert kernel.mapped == {}
        with obstacle(vm, CODE, 0x10000):
            pass
    assert open_fds() == before


@pytest.mark.kvm
def test_a_signal_that_ends_a_run_lets_the_guest_run_on() -> None:
    """EINTR is no failure; an exit that nobody understands is one."""
    kernel = Counting()
    with Vm(kernel) as vm, Vcpu(vm) as vcpu:
        kernel.answers[kvm_ioctls.KVM_RUN] = [OSError(errno.EINTR, "a signal")] * 2
        assert vcpu.load(CODE) == 0x88
        assert vcpu.load(0) == Mmio(0, None)
        vcpu._run.exit_reason = 17
        kernel.answers[kvm_ioctls.KVM_RUN] = [0]
        with pytest.raises(pyvfio.UnsupportedError, match="exit reason 17"):
            vcpu.load(CODE)


# ---------------------------------------------------------------------------------------------- numbers, the program

STRUCTS = {
    name: struct
    for name, struct in vars(kvm_ioctls).items()
    if isinstance(struct, type) and issubclass(struct, ctypes.Structure)
}
IN_UNION = "kvm_run_mmio"  # has no name of its own in C


def described() -> dict[str, int]:
    """Every number, size and offset of kvm_ioctls, by the C expression that has it."""
    found = {name: value for name, value in vars(kvm_ioctls).items() if name.startswith("KVM")}
    for name, struct in STRUCTS.items():
        c_name, prefix = ("struct kvm_run", "mmio.") if name == IN_UNION else (f"struct {name}", "")
        outer = kvm_ioctls.kvm_run.mmio.offset if prefix else 0
        if name not in (IN_UNION, "kvm_run"):  # the latter is only its beginning
            found[f"sizeof({c_name})"] = ctypes.sizeof(struct)
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            found[f"offsetof({c_name}, {prefix}{field})"] = outer + place.offset
            found[f"sizeof((({c_name} *)0)->{prefix}{field})"] = place.size
    return found


def test_every_number_size_and_offset_is_that_of_the_header(tmp_path: Path) -> None:
    """The C compiler reads linux/kvm.h."""
    expressions = described()
    del expressions["sizeof(((struct kvm_run *)0)->mmio)"]  # padded in C to a multiple of 8, as here
    lines = "".join(f'printf("%llu\\n", (unsigned long long)({text}));\n' for text in expressions)
    source = (
        f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {{\n{lines}return 0; }}\n"
    )
    (tmp_path / "print.c").write_text(source)
    subprocess.run(["cc", "-o", "print", "print.c"], cwd=tmp_path, check=True)
    printed = subprocess.run(["./print"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    assert dict(zip(expressions, map(int, printed), strict=True)) == expressions


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python examples/kvm_slots.py`."""
    command = [sys.executable, "examples/kvm_slots.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.kvm
@pytest.mark.parametrize(("arguments", "columns"), [((), 1), (("--no-run",), 0)])
def test_the_program_shows_that_guest_and_device_reach_the_same(
    vcpu: Vcpu, arguments: tuple[str, ...], columns: int
) -> None:
    """Whether a guest runs or the kernel is only asked."""
    assert not vcpu.closed  # so that one runs here
    done = program(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("reached by stores") == columns
    assert done.stdout.endswith("Every step held.\n")
    assert len(re.findall(r" ok$", done.stdout, re.MULTILINE)) == 9
    assert "VFIO refused a grow (ENOMEM)  0-6 MiB            0-6 MiB" in done.stdout
    assert "KVM refused a grow (EEXIST)   0-6 MiB            0-6 MiB" in done.stdout


@pytest.mark.kvm
def test_where_no_guest_runs_the_program_says_why_and_asks_the_kernel_only(capsys: pytest.CaptureFixture[str]) -> None:
    """And what it shows is still true."""
    kernel = Counting()
    kernel.answers[kvm_ioctls.KVM_RUN] = [OSError(errno.EINVAL, "not here")]
    assert show(execute=True, kernel=kernel) == 0
    out, err = capsys.readouterr()
    assert err == "kvm_slots: no guest is run: KVM_RUN(): EINVAL, not here\n"
    assert out.endswith("Every step held.\n")
    assert "reached by stores" not in out


def ends_too_early(region: kvm_ioctls.kvm_userspace_memory_region) -> None:
    """A slot of the block lacks its last page."""
    if PAGE_SIZE < region.memory_size < Story.maximum:
        region.memory_size -= PAGE_SIZE


def refuses_for_another_reason() -> Callable[[kvm_ioctls.kvm_userspace_memory_region], None]:
    """The second grow to all that the block may have is EBUSY."""
    wanted = iter([False, True])

    def spoil(region: kvm_ioctls.kvm_userspace_memory_region) -> None:
        if region.memory_size == Story.maximum and next(wanted):
            raise OSError(errno.EBUSY, "as planned")

    return spoil


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [(ends_too_early, 8), (refuses_for_another_reason(), 0)],  # all steps but the one in which the block is empty; none
    ids=["slots that end too early", "a refusal for another reason"],
)
def test_the_program_notices_when_its_story_does_not_hold(
    capsys: pytest.CaptureFixture[str], spoil: Callable[[kvm_ioctls.kvm_userspace_memory_region], None], wrong: int
) -> None:
    """Its status is 1 for any step that is not as told."""
    kernel = Counting()
    kernel.spoil = spoil
    assert show(execute=False, kernel=kernel) == 1
    out = capsys.readouterr().out
    assert out.endswith("NOT every step held.\n")
    assert len(re.findall(r" WRONG$", out, re.MULTILINE)) == wrong


def test_the_program_says_how_it_is_used() -> None:
    """Without /dev/kvm, too."""
    done = program("--help")
    assert done.returncode == 0
    assert "--no-run" in done.stdout
    assert program("--nonsense").returncode == 2
