"""A hand-over of an Ioas on the fake kernel, both processes in this one: the new one has duplicates of the descriptors.

`tests/hw/test_live_update_iommufd.py` has two processes, and a device at work.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import mmap
import os
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import pytest

import pyvfio
from pyvfio import Anonymous, File, HandOver, HandOverError, Ioas, Memfd, RamBlock, TakenOver, hand_over, take_over
from pyvfio.live_update.agreement import Agreement, Side
from pyvfio.live_update.handed_space import HandedIoas
from pyvfio.live_update.state import State
from pyvfio.memory import MemoryKind
from pyvfio.testing.fake import FakeDevice
from pyvfio.testing.probe import pattern
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, Interrupt, SpecialKernel, nothing_left, requests
from tests.unit.processes import open_fds
from tests.unit.test_failures import cases, end
from tests.unit.tracking import tracked_kernel

SIZE = 64
CHANGE = "IOMMU_IOAS_CHANGE_PROCESS"


class Rig:
    """The old process: a device in an Ioas, and two blocks of memfds, of which one has holes."""

    def __init__(
        self,
        kernel: SpecialKernel,
        *,
        resize: Literal["remap", "extend", "cut"] = "extend",
        cut: Literal["pages", "replace"] | None = None,
        by_process: bool = False,
        memory: MemoryKind | None = None,
    ) -> None:
        self.kernel = kernel
        self.iommufd = pyvfio.Iommufd(kernel=kernel)
        if by_process:
            self.iommufd.set_counts_by_process(enabled=True)
        self.space = Ioas(self.iommufd, cut=cut)
        self.device = pyvfio.open_device(BDF, space=self.space)
        self.blocks = pyvfio.RamBlockList(kernel=kernel)
        self.mapper = pyvfio.DmaMapper(self.space, self.blocks, resize=resize)
        self.add("ring", 2 * PAGE_SIZE, memory)
        self.blocks["ring"].resize(4 * PAGE_SIZE)
        self.add("holes", 8 * PAGE_SIZE, memory)
        self.blocks["holes"].discard(2 * PAGE_SIZE, PAGE_SIZE)

    def add(self, idstr: str, used: int, memory: MemoryKind | None = None) -> RamBlock:
        """A block of a memfd."""
        return self.blocks.add(idstr, used_length=used, max_length=MIB, memory=memory or Memfd())

    def places(self) -> dict[str, int]:
        """By the names of the blocks."""
        return {block.idstr: self.mapper.iova(block) for block in self.blocks}

    def reached(self) -> list[tuple[int, int]]:
        """Where the device reaches how much."""
        return [(mapping.iova, mapping.size) for mapping in self.kernel.mappings(BDF)]

    def sent(self, update: HandOver) -> list[int]:
        """Descriptors as they come over a socket."""
        return [self.kernel.dup(fd) for fd in update.fds]

    def check(self) -> None:
        """All that is meant to hold always."""
        self.kernel.check()
        self.mapper._check()
        self.blocks._check()
        self.space._check()

    def close(self) -> None:
        """Everything; twice is fine."""
        self.device.close()
        self.mapper.close()
        self.blocks.close()
        self.iommufd.close()


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """Nothing is left in it at the end."""
    groups = [(2, [FakeDevice(BDF, resettable=True)]), (3, [FakeDevice(OTHER_BDF)])]
    with SpecialKernel("7.3", groups=groups, iommufd=True) as made, nothing_left(made):
        yield made


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """The old process."""
    yield from made(Rig(kernel))


def made(rig: Rig) -> Iterator[Rig]:
    """Closed at the end."""
    try:
        yield rig
    finally:
        rig.close()


def both_ways(kernel: SpecialKernel, blocks: pyvfio.RamBlockList, places: dict[str, int]) -> None:
    """The device reads what the process has written to each block, and the process what the device has."""
    for block in blocks:
        for part in block.populated:
            there, sent = pattern(SIZE), pattern(SIZE)
            with block.view() as view:
                view[part.start : part.start + SIZE] = there
            assert kernel.dma_read(BDF, places[block.idstr] + part.start, SIZE) == there
            kernel.dma_write(BDF, places[block.idstr] + part.start, sent)
            with block.view() as view:
                assert bytes(view[part.start : part.start + SIZE]) == sent


def close(kernel: SpecialKernel, fds: list[int]) -> None:
    """As a process that dies does."""
    for fd in fds:
        kernel.close(fd)


def forget(taken: TakenOver, kernel: SpecialKernel, fds: list[int]) -> None:
    """The new process dies: its memory, descriptors and locks go, and nothing else happens."""
    areas = [(block.vaddr, block.max_length + PAGE_SIZE) for block in taken.blocks]
    taken.mapper.forget()
    taken.taking.way.release()
    for block in taken.blocks:
        block.state.memory.disown()
    close(kernel, fds)
    with suppress(AssertionError):
        for vaddr, size in areas:
            kernel._linux.munmap(vaddr, size)


CALLS_OF_DEVICES = {"VFIO_DEVICE_BIND_IOMMUFD", "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "VFIO_DEVICE_DETACH_IOMMUFD_PT"}
CALLS_OF_MEMORY = {"IOMMU_IOAS_MAP", "IOMMU_IOAS_MAP_FILE", "IOMMU_IOAS_UNMAP", "IOMMU_DESTROY", "IOMMU_IOAS_ALLOC"}


# ------------------------------------------------------------------------------------------------ the three that matter


@pytest.mark.parametrize(
    ("resize", "cut"), [("extend", None), ("remap", None), ("cut", "pages"), ("cut", "replace"), ("extend", "pages")]
)
@pytest.mark.parametrize("by_process", [False, True], ids=["by user", "by process"])
def test_a_new_process_has_the_blocks_where_the_device_has_them_and_nothing_was_mapped_or_attached(
    kernel: SpecialKernel,
    resize: Literal["remap", "extend", "cut"],
    cut: Literal["pages", "replace"] | None,
    *,
    by_process: bool,
) -> None:
    for rig in made(Rig(kernel, resize=resize, cut=cut, by_process=by_process)):
        before, places = rig.reached(), rig.places()
        rig.kernel.dma_write(BDF, places["ring"] + PAGE_SIZE, b"written before")
        kernel.clear_trace()
        with hand_over(rig.mapper) as update:
            both_ways(kernel, rig.blocks, places)
            taken = take_over(update.state, rig.sent(update), kernel=kernel)
            assert rig.reached() == before
            update.finish()
        made_calls = {call.request for call in kernel.trace if not call.errno}
        assert not (CALLS_OF_DEVICES | CALLS_OF_MEMORY | {"VFIO_DEVICE_RESET"}) & made_calls
        assert CHANGE in made_calls
        with taken:
            for part in (taken.mapper, taken.space, taken.blocks):
                part._check()
            assert rig.reached() == before
            assert {block.idstr: taken.mapper.iova(block) for block in taken.blocks} == places
            ring = taken.blocks["ring"]
            with ring.view() as view:
                assert bytes(view[PAGE_SIZE : PAGE_SIZE + 14]) == b"written before"
            both_ways(kernel, taken.blocks, places)
            ring.resize(64 * PAGE_SIZE)
            both_ways(kernel, taken.blocks, places)
            ring.resize(PAGE_SIZE)
            taken.blocks["holes"].populate(0, 8 * PAGE_SIZE)
            both_ways(kernel, taken.blocks, places)
            taken.mapper._check()


def test_a_hand_over_that_is_cancelled_has_changed_nothing_and_makes_no_call(kernel: SpecialKernel, rig: Rig) -> None:
    before, places = rig.reached(), rig.places()
    with hand_over(rig.mapper):
        kernel.clear_trace()
    assert [name for name in requests(kernel.trace) if name.startswith(("IOMMU", "VFIO"))] == []
    assert rig.reached() == before
    rig.check()
    both_ways(kernel, rig.blocks, places)
    rig.blocks["ring"].resize(16 * PAGE_SIZE)
    both_ways(kernel, rig.blocks, places)


@pytest.mark.parametrize("by_process", [False, True], ids=["by user", "by process"])
def test_a_new_process_that_dies_after_it_has_taken_over_takes_nothing_with_it(
    kernel: SpecialKernel, *, by_process: bool
) -> None:
    """By user the memory is charged to the old process again; by process the kernel is not asked, for its own sake."""
    for rig in made(Rig(kernel, by_process=by_process)):
        before, places = rig.reached(), rig.places()
        with hand_over(rig.mapper) as update:
            fds = rig.sent(update)
            forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
            kernel.clear_trace()
        assert requests(kernel.trace).count(CHANGE) == (0 if by_process else 1)
        assert rig.iommufd.charge_moves == (not by_process)
        assert rig.reached() == before
        rig.check()
        both_ways(kernel, rig.blocks, places)
        kernel.clear_trace()
        with hand_over(rig.mapper) as update, take_over(update.state, rig.sent(update), kernel=kernel) as taken:
            update.finish()
            both_ways(kernel, taken.blocks, places)
        assert requests(kernel.trace).count(CHANGE) == (0 if by_process else 2)


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.long
def test_whichever_call_of_a_take_over_fails_the_device_reaches_the_same_and_it_can_be_cancelled_or_tried_again(
    kernel: SpecialKernel, rig: Rig
) -> None:
    before, places = rig.reached(), rig.places()
    with hand_over(rig.mapper) as update:
        fds = rig.sent(update)
        kernel.clear_trace()
        forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
        calls = list(kernel.trace)
    count = 0
    for again in (False, True):
        for case in cases(calls[: requests(calls).index("close")]):
            with hand_over(rig.mapper) as update:
                fds = rig.sent(update)
                case.plan(kernel)
                try:
                    taken = take_over(update.state, fds, kernel=kernel)
                    forget(taken, kernel, fds)  # a setting that may be missing
                    fds = []
                except (OSError, pyvfio.VfioError, Interrupt):
                    pass
                end(kernel)
                assert set(fds) <= set(open_fds())
                assert rig.reached() == before
                if again and fds:
                    forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
                    fds = []
                close(kernel, fds)
            assert rig.reached() == before
            count += 1
        rig.check()
    assert count > 100
    both_ways(kernel, rig.blocks, places)


def test_whichever_call_of_a_hand_over_fails_everything_is_as_it_was(kernel: SpecialKernel, rig: Rig) -> None:
    before, fds = rig.reached(), open_fds()
    kernel.clear_trace()
    hand_over(rig.mapper).cancel()
    for case in cases(list(kernel.trace)):
        case.plan(kernel)
        try:
            hand_over(rig.mapper).cancel()
        except (OSError, pyvfio.VfioError, Interrupt):
            end(kernel)
            if rig.space.handing is not None:  # it was `cancel` that failed
                hand_over(rig.mapper).cancel()
        end(kernel)
        assert rig.reached() == before
        assert open_fds() == fds
        rig.check()
        rig.blocks["ring"].resize(5 * PAGE_SIZE)
        rig.blocks["ring"].resize(4 * PAGE_SIZE)
        assert rig.reached() == before


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """The process can open that many files more."""
    used = set(open_fds())
    free = [number for number in range(len(used) + count + 1) if number not in used]
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


@pytest.mark.parametrize(("count", "call"), [(0, "memfd_create"), (1, "open")])
def test_a_hand_over_for_which_no_descriptor_is_left_says_so_and_changes_nothing(
    rig: Rig, count: int, call: str
) -> None:
    """The memory file of the two processes needs two: the hint names the limit, and not /proc."""
    with (
        descriptors_left(count),
        pytest.raises(pyvfio.IoctlError, match=rf"^{call}\(.*: EMFILE, .*\(ulimit -n\)"),
    ):
        hand_over(rig.mapper)
    rig.blocks["ring"].resize(5 * PAGE_SIZE)
    rig.check()


def test_a_handler_that_raises_at_the_end_of_either_call_leaves_everything_as_it_was(
    kernel: SpecialKernel, rig: Rig
) -> None:
    before, places = rig.reached(), rig.places()
    kernel.interrupt_at(1, after=True)
    with pytest.raises(Interrupt):
        hand_over(rig.mapper)
    assert rig.space.handing is None
    with hand_over(rig.mapper) as update:
        fds = rig.sent(update)
        kernel.interrupt_at(1, after=True)
        with pytest.raises(Interrupt):
            take_over(update.state, fds, kernel=kernel)
        assert set(fds) <= set(open_fds())
        forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
    assert rig.reached() == before
    rig.check()
    both_ways(kernel, rig.blocks, places)


@pytest.mark.parametrize("by_process", [False, True], ids=["by user", "by process"])
def test_a_limit_that_is_too_small_is_told_with_all_of_the_memory_and_the_call_can_be_repeated(
    kernel: SpecialKernel, *, by_process: bool
) -> None:
    for rig in made(Rig(kernel, by_process=by_process)):
        before = rig.reached()
        kernel.privileged, kernel.memlock_limit = False, 16 * PAGE_SIZE
        with hand_over(rig.mapper) as update:
            fds = rig.sent(update)
            kernel.fail(call="ioctl", request=CHANGE, errno=errno.ENOMEM, nth=1)
            whose = "this process lock" if by_process else "the processes of this user pin"
            with pytest.raises(pyvfio.PinLimitError, match=f"RLIMIT_MEMLOCK lets {whose} 64 KiB.*44 KiB"):
                take_over(update.state, fds, kernel=kernel)
            assert rig.reached() == before
            with take_over(update.state, fds, kernel=kernel):
                update.finish()


def test_a_cancel_that_may_not_charge_as_much_leaves_it_handed_over_and_can_be_made_again(
    kernel: SpecialKernel, rig: Rig
) -> None:
    update = hand_over(rig.mapper)
    fds = rig.sent(update)
    taken = take_over(update.state, fds, kernel=kernel)
    kernel.fail(call="ioctl", request=CHANGE, errno=errno.ENOMEM, nth=1)
    kernel.privileged, kernel.memlock_limit = False, MIB
    with pytest.raises(pyvfio.PinLimitError):
        update.cancel()
    with pytest.raises(HandOverError):
        rig.blocks["ring"].resize(PAGE_SIZE)
    with pytest.raises(HandOverError):
        rig.device.detach()
    forget(taken, kernel, fds)
    update.cancel()
    rig.blocks["ring"].resize(PAGE_SIZE)
    rig.check()


def test_a_cancel_says_that_the_other_process_has_unmapped_memory(kernel: SpecialKernel, rig: Rig) -> None:
    update = hand_over(rig.mapper)
    with take_over(update.state, rig.sent(update), kernel=kernel) as taken:
        taken.blocks["ring"].resize(0)
        with pytest.raises(HandOverError, match=r"has unmapped IOVA .*finish\(\)"):
            update.cancel()
        update.finish()
        both_ways(kernel, taken.blocks, {block.idstr: taken.mapper.iova(block) for block in taken.blocks})


# ------------------------------------------------------------------------------------------------ who has it


def test_what_was_cancelled_cannot_be_taken_over_not_even_at_the_last_step(kernel: SpecialKernel, rig: Rig) -> None:
    before = rig.reached()
    update = hand_over(rig.mapper)
    fds = rig.sent(update)
    update.cancel()
    kernel.clear_trace()
    with pytest.raises(HandOverError, match="has cancelled"):
        take_over(update.state, fds, kernel=kernel)
    assert {call.call for call in kernel.trace} == {"file_status"}  # nothing has been mapped for it
    close(kernel, fds)
    update = hand_over(rig.mapper)
    fds = rig.sent(update)
    with pytest.raises(HandOverError, match="has cancelled"):
        take_over(update.state, fds, kernel=_Meanwhile(kernel, update.cancel))
    close(kernel, fds)
    assert requests(kernel.trace).count(CHANGE) == 1  # the one that asks for obstacles
    assert rig.reached() == before
    rig.check()


class _Meanwhile(SpecialKernel):
    """A kernel that does something at the first descriptor whose memory is mapped."""

    def __init__(self, kernel: SpecialKernel, act: Callable[[], object]) -> None:
        self.__dict__ = kernel.__dict__.copy()
        self._act: Callable[[], object] | None = act

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """As the fake's."""
        act, self._act = self._act, None
        if act is not None:
            act()
        super().madvise(vaddr, size, advice)


def test_what_another_process_has_taken_over_cannot_be_taken_over_again(kernel: SpecialKernel, rig: Rig) -> None:
    places = rig.places()
    with hand_over(rig.mapper) as update:
        fds = rig.sent(update)
        with take_over(update.state, rig.sent(update), kernel=kernel) as taken:
            with pytest.raises(HandOverError, match="another process has taken over"):
                take_over(update.state, fds, kernel=kernel)
            update.finish()
            both_ways(kernel, taken.blocks, places)
        close(kernel, fds)


def test_what_was_taken_over_can_be_handed_over_again(kernel: SpecialKernel, rig: Rig) -> None:
    places = rig.places()
    update = hand_over(rig.mapper)
    taken = take_over(update.state, rig.sent(update), kernel=kernel)
    update.finish()
    for _ in range(3):
        with hand_over(taken.mapper) as update:
            new = take_over(update.state, rig.sent(update), kernel=kernel)
            update.finish()
        taken.close()
        taken = new
    both_ways(kernel, taken.blocks, places)
    taken.close()


def test_between_the_two_ends_nothing_can_change(kernel: SpecialKernel, rig: Rig) -> None:
    before = rig.reached()
    tries: list[Callable[[], object]] = [
        lambda: rig.blocks["ring"].resize(PAGE_SIZE),
        lambda: rig.space.map(vaddr=0, iova=0x10000, size=PAGE_SIZE),
        rig.space.unmap_all,
        rig.space.close,
        rig.iommufd.close,
        rig.device.close,
        rig.device.detach,
        lambda: rig.device.attach(rig.space),
        lambda: Ioas(rig.iommufd),
        lambda: pyvfio.open_device(OTHER_BDF, space=rig.space),
        lambda: rig.device.irq(0).enable(),
        rig.mapper.close,
    ]
    with hand_over(rig.mapper):
        for attempt in tries:
            with pytest.raises(HandOverError):
                attempt()
        assert rig.reached() == before
        assert rig.device.config.read16(0) == 0x1234
    rig.check()


def test_what_is_finished_is_closed_and_closing_it_reaches_nothing(kernel: SpecialKernel, rig: Rig) -> None:
    with hand_over(rig.mapper) as update:
        taken = take_over(update.state, rig.sent(update), kernel=kernel)
        update.finish()
        update.finish()
    kernel.clear_trace()
    rig.close()
    assert [name for name in requests(kernel.trace) if name.startswith(("IOMMU", "VFIO"))] == []
    assert rig.device.closed
    assert rig.space.closed
    assert rig.iommufd.closed
    taken.close()


# ------------------------------------------------------------------------------------------------ charges


@pytest.mark.parametrize("by_process", [False, True], ids=["by user", "by process"])
def test_what_a_process_had_taken_over_and_died_can_be_taken_over_by_a_third(
    kernel: SpecialKernel, *, by_process: bool
) -> None:
    """By process, nobody can have the charge of a process that has ended: the kernel is not asked."""
    for rig in made(Rig(kernel, by_process=by_process)):
        places = rig.places()
        with hand_over(rig.mapper) as update:
            fds = rig.sent(update)
            forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
            kernel.clear_trace()
            with take_over(update.state, rig.sent(update), kernel=kernel) as taken:
                assert requests(kernel.trace).count(CHANGE) == (0 if by_process else 1)
                assert isinstance(taken.space, Ioas)
                assert taken.space.iommufd.charge_moves == (not by_process)
                update.finish()
                both_ways(kernel, taken.blocks, places)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO])
def test_a_cancel_takes_the_charge_back_from_whoever_had_it_and_from_nobody_else(
    kernel: SpecialKernel, rig: Rig, number: int
) -> None:
    """A process whose take-over has failed has no charge; one that had taken over before it still counts."""
    for earlier in (False, True):
        with hand_over(rig.mapper) as update:
            fds = rig.sent(update)
            if earlier:
                died = rig.sent(update)
                forget(take_over(update.state, died, kernel=kernel), kernel, died)
            kernel.fail(call="ioctl", request=CHANGE, errno=number)
            with pytest.raises(pyvfio.IoctlError) as caught:
                take_over(update.state, fds, kernel=kernel)
            assert (caught.value.request, caught.value.errno) == (CHANGE, number)
            gc.collect()  # nothing that was made closes what is the caller's
            assert set(fds) <= set(open_fds())
            close(kernel, fds)
            kernel.clear_trace()
        assert requests(kernel.trace).count(CHANGE) == int(earlier)
        rig.check()


@pytest.mark.parametrize("by_process", [False, True], ids=["by user", "by process"])
@pytest.mark.parametrize(
    ("privileged", "limit", "is_limit"), [(False, MIB, True), (True, MIB, False), (False, None, False)]
)
def test_a_charge_that_is_refused_names_the_limit_if_there_is_one(
    kernel: SpecialKernel, *, by_process: bool, privileged: bool, limit: int | None, is_limit: bool
) -> None:
    """Whose it is, what it is, and all that was asked for; a process without a limit is told the kernel's errno."""
    for rig in made(Rig(kernel, by_process=by_process)):
        with hand_over(rig.mapper) as update:
            fds = rig.sent(update)
            kernel.privileged, kernel.memlock_limit = privileged, limit
            used = kernel.memlock().used
            kernel.fail(call="ioctl", request=CHANGE, errno=errno.ENOMEM)
            with pytest.raises(pyvfio.IoctlError) as caught:
                take_over(update.state, fds, kernel=kernel)
            error = caught.value
            assert (error.request, error.errno) == (CHANGE, errno.ENOMEM)
            assert isinstance(error, pyvfio.PinLimitError) == is_limit
            if isinstance(error, pyvfio.PinLimitError):
                size = sum(size for _iova, size in rig.reached())
                assert (error.limit, error.asked, error.by_user) == (MIB, size, not by_process)
                assert (error.used, error.mapped) == ((used, 0) if by_process else (0, None))
                kib = (used + size if by_process else 2 * size) // 1024
                assert f"ulimit -l {kib} (KiB)" in error.hint
            close(kernel, fds)
            kernel.privileged, kernel.memlock_limit = True, None


@pytest.mark.parametrize(
    ("number", "error", "reason"),
    [
        (errno.ENOTTY, pyvfio.UnsupportedError, "IOMMU_IOAS_CHANGE_PROCESS is not supported"),
        (errno.EINVAL, HandOverError, "has a mapping by address that this process does not know"),
        (errno.EIO, pyvfio.IoctlError, "EIO"),
        (errno.ENOMEM, pyvfio.IoctlError, "ENOMEM"),
    ],
)
def test_a_kernel_that_refuses_at_once_is_told_by_its_errno(
    kernel: SpecialKernel, rig: Rig, number: int, error: type[Exception], reason: str
) -> None:
    """And the next attempt asks anew."""
    kernel.fail(call="ioctl", request=CHANGE, errno=number)
    with pytest.raises(error, match=reason):
        hand_over(rig.mapper)
    assert rig.space.handing is None
    hand_over(rig.mapper).cancel()


# ------------------------------------------------------------------------------------------------ the agreement


@pytest.fixture
def agreement(kernel: SpecialKernel) -> Iterator[Agreement]:
    """That of the old process."""
    made = Agreement.make(kernel)
    yield made
    made.close()
    kernel.close(made.shared)


def test_each_process_knows_whether_the_other_one_lives(agreement: Agreement) -> None:
    """By a lock for each, which one process at a time can hold."""
    new, another = Agreement(agreement.shared, Side.NEW), Agreement(agreement.shared, Side.NEW)
    found = [agreement.is_alone, new.hold(), another.hold(), agreement.is_alone, new.is_alone]
    assert found == [True, True, False, False, False]
    for _ in range(2):
        agreement.close()
    assert new.is_alone
    new.close()
    assert another.hold()
    another.close()


def test_both_processes_read_both_flags(agreement: Agreement) -> None:
    """Each by itself; TAKEN can be cleared."""
    new = Agreement(agreement.shared, Side.NEW)

    def told() -> set[tuple[bool, bool]]:
        return {(side.cancelled, side.taken) for side in (agreement, new)}

    assert told() == {(False, False)}
    new.take(value=True)
    assert told() == {(False, True)}
    agreement.cancel()
    assert told() == {(True, True)}
    new.take(value=False)
    assert told() == {(True, False)}
    new.close()


def test_only_one_process_at_a_time_writes_flags(agreement: Agreement) -> None:
    """The lock is held from the beginning to the end of the block, also of one that raises; it is not those of life."""
    fd = os.open(f"/proc/self/fd/{agreement.shared}", os.O_RDWR | os.O_CLOEXEC)

    def can_lock(kind: int, place: int) -> bool:
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", kind, os.SEEK_SET, place, 1, 0))
        except BlockingIOError:
            return False
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
        return True

    def locked() -> list[int]:
        return [place for place in range(8) if not can_lock(fcntl.F_RDLCK, place)]

    assert locked() == [3]
    with suppress(ZeroDivisionError), agreement.in_order():
        assert locked() == [2, 3]
        raise ZeroDivisionError
    assert locked() == [3]
    os.close(fd)


def test_an_agreement_can_have_descriptor_0(agreement: Agreement) -> None:
    """And closes it."""
    saved = os.dup(0)
    os.close(0)
    try:
        new = Agreement(agreement.shared, Side.NEW)
        found = [new.hold(), agreement.is_alone]
        new.close()
        assert [*found, agreement.is_alone] == [True, False, True]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
    finally:
        os.dup2(saved, 0)
        os.close(saved)


def test_an_agreement_that_proc_does_not_show_is_refused(agreement: Agreement) -> None:
    """Of a number that is no descriptor, as where /proc is not mounted."""
    with pytest.raises(pyvfio.UnavailableError, match=r"cannot be opened through /proc.*needs /proc"):
        Agreement(agreement.shared + 1000, Side.NEW)


# ------------------------------------------------------------------------------------------------ obstacles


def refused(rig: Rig, reason: str) -> None:
    """Nothing is touched, and all goes on."""
    before, fds = rig.reached(), open_fds()
    with pytest.raises(HandOverError, match=reason):
        hand_over(rig.mapper)
    assert (rig.reached(), open_fds()) == (before, fds)
    rig.check()
    rig.blocks["ring"].resize(5 * PAGE_SIZE)


def test_private_memory_is_refused_by_name(rig: Rig) -> None:
    rig.add("private", PAGE_SIZE, Anonymous())
    refused(rig, "memory of RAM block 'private' is private")


def test_a_file_that_the_kernel_cannot_map_by_descriptor_is_refused_by_name(rig: Rig, tmp_path: Path) -> None:
    """One on a disk."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, MIB)
    block = rig.blocks.add("disk", used_length=PAGE_SIZE, max_length=MIB, memory=File(fd), readonly=True)
    if block.state.memory.shared_file is None:  # else the directory is on tmpfs
        refused(rig, "'disk' is mapped by address.*memory=Memfd")
    os.close(fd)


def test_buffers_by_address_and_temporary_mappings_are_refused_by_name(kernel: SpecialKernel, rig: Rig) -> None:
    vaddr = kernel.mmap(0, PAGE_SIZE, 3, 0x22)
    with rig.mapper.map_dma(vaddr=vaddr, size=PAGE_SIZE):
        refused(rig, "is a buffer of this process")
    buffer = mmap.mmap(-1, PAGE_SIZE)
    rig.mapper.map_temporary(buffer).close()
    refused(rig, "reset_temporary")
    rig.mapper.reset_temporary()
    buffer.close()
    kernel.munmap(vaddr, PAGE_SIZE)
    hand_over(rig.mapper).cancel()


def test_mappings_and_iova_of_others_are_refused_by_name(kernel: SpecialKernel, rig: Rig) -> None:
    """Also a mapping by address that the process does not know, which the kernel tells."""
    vaddr = kernel.mmap(0, PAGE_SIZE, 3, 0x22)
    rig.space.map(vaddr=vaddr, iova=0x7000_0000, size=PAGE_SIZE)
    refused(rig, "IOVA .*0x70000000.* is mapped by another user")
    rig.space.unmap(iova=0x7000_0000, size=PAGE_SIZE)
    rig.iommufd.ioas_map(rig.space.id, vaddr=vaddr, size=PAGE_SIZE, iova=0x7000_0000)
    refused(rig, "mapping by address that this process does not know")
    rig.iommufd.ioas_unmap(rig.space.id, iova=0x7000_0000, size=PAGE_SIZE)
    rig.space.reserve_iova_at(0x7000_0000, PAGE_SIZE)
    refused(rig, "is reserved outside of this mapper")
    rig.space.release_iova(0x7000_0000)
    hand_over(rig.mapper).cancel()
    kernel.munmap(vaddr, PAGE_SIZE)


def test_other_spaces_and_devices_of_the_iommufd_are_refused_by_name(rig: Rig) -> None:
    other = Ioas(rig.iommufd)
    refused(rig, f"Ioas {other.id} .* is in the same iommufd")
    other.close()
    with pyvfio.open_device(OTHER_BDF, space=rig.space) as second:
        second.detach()
        refused(rig, "not attached to I/O address space")
        second.attach(rig.space)
        hand_over(rig.mapper).cancel()


def test_an_open_record_of_the_writes_of_devices_is_refused() -> None:
    """The other process could neither read the record nor destroy the page tables. It can make a record of its own."""
    with tracked_kernel("iommufd") as kernel, nothing_left(kernel):
        rig = Rig(kernel)
        with pyvfio.DirtyTracking(rig.space):
            before = rig.reached()
            with pytest.raises(
                HandOverError, match=r"1 thing .*writes of devices to I/O address space .*DirtyTracking"
            ):
                hand_over(rig.mapper)
            assert rig.reached() == before
            rig.blocks["ring"].resize(5 * PAGE_SIZE)
        with hand_over(rig.mapper) as update, take_over(update.state, rig.sent(update), kernel=kernel) as taken:
            assert isinstance(taken.space, Ioas)
            with pyvfio.DirtyTracking(taken.space) as tracking:
                rig.device.bus_master = True
                kernel.dma_write(BDF, rig.places()["ring"] + PAGE_SIZE, b"word")
                found = tracking.read(iova=rig.places()["ring"], size=5 * PAGE_SIZE)
                assert found.count == 1
            update.finish()
        rig.close()


def test_a_kernel_without_it_is_told_apart() -> None:
    """Linux 6.12 maps no files, and the reason that is told is the kernel's."""
    with SpecialKernel("6.12", iommufd=True) as kernel, nothing_left(kernel):
        for rig in made(Rig(kernel)):
            with pytest.raises(pyvfio.UnsupportedError, match="IOMMU_IOAS_CHANGE_PROCESS is not supported"):
                hand_over(rig.mapper)
            rig.check()


# ------------------------------------------------------------------------------------------------ the message


def test_a_state_says_the_same_after_it_has_travelled(rig: Rig) -> None:
    with hand_over(rig.mapper) as update:
        state = State.load(update.state)
        assert State.load(state.dump()) == state
        assert state.space == HandedIoas(rig.space.id, None, charge_moves=True)
        assert json.loads(update.state)["version"] == 3
        assert state.devices[0].dev_id is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "vdpa"}, "kind 'vdpa', which this pyvfio does not know"),
        ({"kind": 3}, "'kind' of 'space'"),
        ({"id": 0}, "address space of number 0"),
        ({"id": 1 << 32}, "address space of number"),
        ({"id": None}, "'id' of 'space'"),
        ({"cut": "scissors"}, "cut='scissors'"),
        ({"charge_moves": 1}, "'charge_moves' of 'space'"),
    ],
)
def test_a_space_that_is_none_is_refused_before_any_call(
    kernel: SpecialKernel, rig: Rig, change: dict[str, object], reason: str
) -> None:
    with hand_over(rig.mapper) as update:
        told = json.loads(update.state)
        told["space"].update(change)
        kernel.clear_trace()
        with pytest.raises(ValueError, match=reason):
            take_over(json.dumps(told).encode(), update.fds, kernel=kernel)
        assert kernel.trace == []


def test_an_address_space_or_a_mapping_that_is_not_there_is_refused(kernel: SpecialKernel, rig: Rig) -> None:
    before = rig.reached()
    with hand_over(rig.mapper) as update:
        fds = rig.sent(update)
        told = json.loads(update.state)
        told["space"]["id"] += 100
        with pytest.raises(HandOverError, match="no address space of number"):
            take_over(json.dumps(told).encode(), fds, kernel=kernel)
        told = json.loads(update.state)
        for block in told["blocks"]:
            block["iova"] += 1 << 32
        with pytest.raises(HandOverError, match="is not mapped, and cannot be taken over"):
            take_over(json.dumps(told).encode(), fds, kernel=kernel)
        with pytest.raises(HandOverError, match="should be the iommufd, but is another file"):
            take_over(update.state, [fds[1], fds[0], *fds[2:]], kernel=kernel)
        assert set(fds) <= set(open_fds())
        close(kernel, fds)
    assert rig.reached() == before
    rig.check()


def test_a_taken_space_is_no_container(kernel: SpecialKernel, rig: Rig) -> None:
    with hand_over(rig.mapper) as update, take_over(update.state, rig.sent(update), kernel=kernel) as taken:
        update.finish()
        assert isinstance(taken.space, Ioas)
        assert taken.devices[BDF].space is taken.space
        assert taken.space.why == "the former process had this address space"
        with pytest.raises(pyvfio.VfioError, match="no container"):
            _ = taken.container


def test_a_device_that_nobody_receives_stays_attached(kernel: SpecialKernel, rig: Rig) -> None:
    """A handler that raises at the end undoes the call, and the device still works for the old process."""
    before = rig.reached()
    with hand_over(rig.mapper) as update:
        fds = rig.sent(update)
        iommufd = pyvfio.Iommufd.from_fd(fds[0], kernel=kernel)
        space = Ioas.from_id(iommufd, rig.space.id)
        kernel.interrupt_at(1, after=True)
        with pytest.raises(Interrupt):
            pyvfio.Device.resume(space, BDF, fds[2], dev_id=None)
        assert space.devices == iommufd.devices == []
        assert rig.reached() == before
        resumed = pyvfio.Device.resume(space, BDF, fds[2], dev_id=7)
        assert (resumed.group_number, resumed.dev_id, space.devices) == (2, 7, [resumed])
        assert resumed.release_fd() == fds[2]
        assert space.devices == iommufd.devices == []
        assert rig.reached() == before
        space.close_fd()
        iommufd.release_fd()
        close(kernel, fds)
    assert rig.device in rig.space.devices
    rig.check()


def test_a_space_is_made_of_a_number_that_the_iommufd_has(kernel: SpecialKernel, rig: Rig) -> None:
    """And closing it destroys the space of that number, and no more."""
    number = rig.iommufd.ioas_alloc()
    with pytest.raises(ValueError, match=f"no address space of number {number + 100}"):
        Ioas.from_id(rig.iommufd, number + 100)
    with pytest.raises(ValueError, match="cut must be"):
        Ioas.from_id(rig.iommufd, number, cut="scissors")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be an Iommufd"):
        Ioas.from_id(rig.space, number)  # type: ignore[arg-type]
    with Ioas.from_id(rig.iommufd, number, dma_bits=32, cut="replace") as space:
        assert (space.id, space.dma_bits, space.cut, space.mappings) == (number, 32, "replace", ())
        with pytest.raises(ValueError, match=f"<Ioas {number} .* is open"):
            Ioas.from_id(rig.iommufd, number)
    kernel.clear_trace()
    with pytest.raises(ValueError, match="no address space"):
        Ioas.from_id(rig.iommufd, number)
    rig.check()
