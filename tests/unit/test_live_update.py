"""A hand-over on the fake kernel, both processes in this one: the new one has duplicates of the descriptors.

`tests/hw/test_live_update.py` has two processes, and a device at work.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import pytest

import pyvfio
from pyvfio import Anonymous, File, HandOver, HandOverError, Memfd, TakenOver, hand_over, ioctls, take_over
from pyvfio.kernel import HUGETLBFS_MAGIC, FileStatus, IoctlArgument, Memlock
from pyvfio.live_update.handed_space import HandedContainer
from pyvfio.live_update.state import State
from pyvfio.live_update.vaddr import explain_limit
from pyvfio.mapper.window import Window
from pyvfio.memory import MemoryKind
from pyvfio.testing.fake import FakeDevice
from pyvfio.testing.probe import pattern
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import (
    BDF,
    OTHER_BDF,
    Interrupt,
    Rig,
    SpecialKernel,
    nothing_left,
    proc_maps_has,
    requests,
    small_iommu,
)
from tests.unit.processes import in_child, open_fds
from tests.unit.test_failures import cases, end

SIZE = 64


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """Nothing is left in it at the end."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF, resettable=True)])]) as made, nothing_left(made):
        yield made


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """The old process: two blocks, one with holes, in pieces."""
    with old(kernel) as made:
        yield made


def old(kernel: SpecialKernel, resize: Literal["remap", "extend"] = "extend") -> Rig:
    """Of memfds."""
    rig = Rig(kernel, memory=Memfd(), mapper=lambda space, blocks: pyvfio.DmaMapper(space, blocks, resize=resize))
    rig.add("ring")
    rig.blocks["ring"].resize(4 * PAGE_SIZE)
    rig.add("holes", used=8 * PAGE_SIZE)
    rig.blocks["holes"].discard(2 * PAGE_SIZE, PAGE_SIZE)
    return rig


def duplicates(kernel: SpecialKernel, update: HandOver) -> list[int]:
    """As they come over a socket."""
    return [kernel.dup(fd) for fd in update.fds]


def close(kernel: SpecialKernel, fds: list[int]) -> None:
    """As a process that dies does."""
    for fd in fds:
        kernel.close(fd)


def both_ways(rig: Rig, blocks: pyvfio.RamBlockList, iovas: dict[str, int]) -> None:
    """The device reads what the process has written to each block, and the process what the device has."""
    for block in blocks:
        for part in block.populated:
            there, sent = pattern(SIZE), pattern(SIZE)
            with block.view() as view:
                view[part.start : part.start + SIZE] = there
            assert rig.kernel.dma_read(BDF, iovas[block.idstr] + part.start, SIZE) == there
            rig.kernel.dma_write(BDF, iovas[block.idstr] + part.start, sent)
            with block.view() as view:
                assert bytes(view[part.start : part.start + SIZE]) == sent


def iovas(rig: Rig) -> dict[str, int]:
    """By the names of the blocks."""
    return {block.idstr: rig.mapper.iova(block) for block in rig.blocks}


def layout(rig: Rig) -> list[tuple[int, int]]:
    """Where the device reaches how much, whatever is behind it."""
    return [(mapping.iova, mapping.size) for mapping in rig.kernel.mappings(BDF)]


def has_addresses(rig: Rig) -> None:
    """No mapping waits for one: each refuses another."""
    for iova, vaddr, size in rig.reached():
        with pytest.raises(pyvfio.IoctlError) as caught:
            rig.container.map_dma(vaddr=vaddr, iova=iova, size=size, flags=int(ioctls.VFIO_DMA_MAP_FLAG_VADDR))
        assert caught.value.errno == errno.EINVAL


# ------------------------------------------------------------------------------------------- the three that matter


def test_a_new_process_has_the_blocks_where_the_device_has_them_and_nothing_was_unmapped(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """The device reaches the same bytes all the while, and afterwards what the new process makes of the blocks."""
    before, places = layout(rig), iovas(rig)
    written = pattern(SIZE)
    kernel.dma_write(BDF, places["ring"], written)
    kernel.clear_trace()
    with hand_over(rig.mapper) as update:
        both_ways(rig, rig.blocks, places)
        kernel.dma_write(BDF, places["ring"] + PAGE_SIZE, written)
        taken = take_over(update.state, duplicates(kernel, update), kernel=kernel)
        assert layout(rig) == before
        update.finish()
    assert not {"pwrite", "VFIO_DEVICE_RESET", "VFIO_GROUP_UNSET_CONTAINER"} & set(requests(kernel.trace))
    with taken:
        taken.mapper._check()
        taken.container._check()
        taken.blocks._check()
        assert taken.container.why == "the former process had this address space"
        assert layout(rig) == before
        ring = taken.blocks["ring"]
        with ring.view() as view:
            assert bytes(view[PAGE_SIZE : PAGE_SIZE + SIZE]) == written
        both_ways(rig, taken.blocks, places)
        assert {block.idstr: taken.mapper.iova(block) for block in taken.blocks} == places
        ring.resize(64 * PAGE_SIZE)
        assert set(before) < set(layout(rig))
        both_ways(rig, taken.blocks, places)
        ring.resize(PAGE_SIZE)
        taken.blocks["holes"].populate(0, 8 * PAGE_SIZE)
        with taken.blocks["holes"].view() as view:
            assert bytes(view[2 * PAGE_SIZE : 3 * PAGE_SIZE]) == bytes(PAGE_SIZE)
        both_ways(rig, taken.blocks, places)
        taken.mapper._check()


def test_what_is_cancelled_is_as_it_was(kernel: SpecialKernel, rig: Rig) -> None:
    """Though the new process had all of it already, and died."""
    before, places = rig.reached(), iovas(rig)
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        taken = take_over(update.state, fds, kernel=kernel)
        assert rig.reached() != before
        forget(taken, kernel, fds)
    assert rig.reached() == before
    rig.check()
    both_ways(rig, rig.blocks, places)
    rig.blocks["ring"].resize(16 * PAGE_SIZE)
    both_ways(rig, rig.blocks, places)


def test_a_hand_over_that_the_program_has_lost_is_got_back_as_the_error_says(rig: Rig) -> None:
    """Neither the collection of the object nor anything else decides which process owns the blocks."""
    hand_over(rig.mapper)
    gc.collect()
    for change in (partial(rig.blocks["ring"].resize, PAGE_SIZE), rig.mapper.close):
        with pytest.raises(HandOverError, match=r"which hand_over\(mapper\) returns again"):
            change()
    hand_over(rig.mapper).cancel()
    rig.blocks["ring"].resize(PAGE_SIZE)
    rig.check()


def forget(taken: TakenOver, kernel: SpecialKernel, fds: list[int]) -> None:
    """It dies: its memory and descriptors go, and nothing else happens."""
    areas = [(block.vaddr, block.max_length + PAGE_SIZE) for block in taken.blocks]
    taken.mapper.forget()
    for handle in (taken.container, *taken.container.groups.values(), *taken.devices.values()):
        handle.release_fd()
    for block in taken.blocks:
        block.state.memory.disown()
    close(kernel, fds)
    with suppress(AssertionError):
        for vaddr, size in areas:
            kernel._linux.munmap(vaddr, size)


@pytest.mark.parametrize("stubborn", [False, True], ids=["then cancel", "then once more"])
def test_whichever_call_of_a_take_over_fails_the_device_reaches_the_same_and_it_can_be_cancelled(
    kernel: SpecialKernel, rig: Rig, *, stubborn: bool
) -> None:
    """Or tried once more, by the new process, with the same descriptors."""
    before, places, shape = rig.reached(), iovas(rig), layout(rig)
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.clear_trace()
        forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
        calls = list(kernel.trace)
    assert requests(calls).count("VFIO_IOMMU_MAP_DMA") >= len(before)
    count = 0
    for case in cases(calls[: requests(calls).index("close")]):
        with hand_over(rig.mapper) as update:
            fds = duplicates(kernel, update)
            case.plan(kernel)
            lost = False
            try:
                taken = take_over(update.state, fds, kernel=kernel)
                forget(taken, kernel, fds)  # a setting that may be missing
                fds = []
            except (HandOverError, pyvfio.RollbackError):
                lost = case.name == "VFIO_IOMMU_MAP_DMA"  # as after a cancel, which leaves nothing to take over
            except (OSError, pyvfio.VfioError, Interrupt):
                pass
            end(kernel)
            assert set(fds) <= set(open_fds())
            assert layout(rig) == shape
            if stubborn and fds and not lost:
                forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
                fds = []
            close(kernel, fds)
        assert rig.reached() == before
        rig.check()
        count += 1
    assert count > 100
    both_ways(rig, rig.blocks, places)


def test_a_handler_that_raises_at_the_end_of_either_call_leaves_everything_as_it_was(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """Nobody receives the object: the hand-over is cancelled, and what was taken over is given back."""
    before, places = rig.reached(), iovas(rig)
    kernel.interrupt_at(1, after=True)
    with pytest.raises(Interrupt):
        hand_over(rig.mapper)
    has_addresses(rig)
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.interrupt_at(1, after=True)
        with pytest.raises(Interrupt):
            take_over(update.state, fds, kernel=kernel)
        assert set(fds) <= set(open_fds())
        forget(take_over(update.state, fds, kernel=kernel), kernel, fds)
    assert rig.reached() == before
    rig.check()
    both_ways(rig, rig.blocks, places)


# ---------------------------------------------------------------------------------------------- the old process


def test_whichever_call_of_a_hand_over_fails_everything_is_as_it_was(kernel: SpecialKernel, rig: Rig) -> None:
    """A signal handler may raise in any of them, too. What has failed to be undone can be cancelled once more."""
    before = rig.reached()
    kernel.clear_trace()
    hand_over(rig.mapper).cancel()
    for case in cases(list(kernel.trace)):
        case.plan(kernel)
        try:
            update = hand_over(rig.mapper)
            update.cancel()
        except pyvfio.RollbackError:
            end(kernel)
            hand_over(rig.mapper).cancel()
        except (OSError, pyvfio.VfioError, Interrupt):
            end(kernel)
            if rig.container.handing is not None:  # it was `cancel` that failed
                hand_over(rig.mapper).cancel()
        end(kernel)
        has_addresses(rig)
        assert rig.reached() == before
        rig.check()
        rig.blocks["ring"].resize(5 * PAGE_SIZE)
        rig.blocks["ring"].resize(4 * PAGE_SIZE)
        assert rig.reached() == before


def test_a_cancel_that_the_kernel_refuses_leaves_it_handed_over_and_can_be_made_again(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """All that could be given an address has it; nothing can change until the rest has."""
    before = rig.reached()
    update = hand_over(rig.mapper)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=2)
    with pytest.raises(pyvfio.PinLimitError):
        update.cancel()
    with pytest.raises(HandOverError):
        rig.blocks["ring"].resize(PAGE_SIZE)
    with pytest.raises(HandOverError):
        rig.container.unmap(iova=before[0][0], size=before[0][2])
    update.cancel()
    assert rig.reached() == before
    has_addresses(rig)
    rig.blocks["ring"].resize(8 * PAGE_SIZE)


def test_a_cancel_that_may_not_lock_as_much_names_all_of_it(kernel: SpecialKernel) -> None:
    """In one error, however many mappings are refused: the limit that it advises is enough for the rest."""
    with granules(kernel) as rig, hand_over(rig.mapper) as update:
        kernel.memlock_limit = 4 * PAGE_SIZE
        for nth in (5, 7, 16):
            kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=nth)
        with pytest.raises(pyvfio.PinLimitError, match=r"64 KiB were asked for.*ulimit -l 76 ") as caught:
            update.cancel()
        # The fake charges this process for the three, too: 12 KiB by others, and so 76 KiB in all.
        assert (caught.value.asked, caught.value.used) == (16 * PAGE_SIZE, 3 * PAGE_SIZE)
        kernel.clear_failures()
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=1)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO, nth=2)
        with pytest.raises(pyvfio.RollbackError) as both:
            update.cancel()
        assert [(type(each), getattr(each, "errno", 0)) for each in both.value.exceptions] == [
            (pyvfio.PinLimitError, errno.ENOMEM),
            (pyvfio.IoctlError, errno.EIO),
        ]


def granules(kernel: SpecialKernel) -> Rig:
    """A block in 16 mappings."""
    rig = Rig(kernel, memory=Memfd(), mapper=partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE))
    rig.add(used=16 * PAGE_SIZE)
    return rig


@pytest.mark.parametrize("flag", ["grow", "punch", "pmem"])
def test_each_flag_of_a_file_is_told_to_the_other_process(rig: Rig, flag: str) -> None:
    """And no other."""
    with hand_over(rig.mapper) as update:
        told = json.loads(update.state)
    flags = {name: name == flag for name in ("grow", "punch", "pmem")}
    told["blocks"][0]["memory"] = {"kind": "file", "offset": 0, **flags}
    kind = State.load(json.dumps(told).encode()).blocks[0].memory
    assert {name: getattr(kind, name) for name in flags} == flags
    again = State.load(State.load(json.dumps(told).encode()).dump()).blocks[0].memory
    assert again == kind


def test_a_mapper_that_follows_no_list_has_nothing_but_its_container_to_hand_over(kernel: SpecialKernel) -> None:
    """And ends here."""
    device = pyvfio.open_device(BDF, kernel=kernel)
    update = hand_over(pyvfio.DmaMapper(device.container))
    fds = duplicates(kernel, update)
    update.finish()
    assert device.closed
    close(kernel, fds)


def test_a_kernel_that_gives_up_more_or_less_than_is_known_is_not_trusted(kernel: SpecialKernel, rig: Rig) -> None:
    """Everything has its address then, as before."""
    kernel.fall_short_at(1)
    with pytest.raises(HandOverError, match="44 KiB are known to be mapped, but the kernel has 0 bytes"):
        hand_over(rig.mapper)
    has_addresses(rig)
    rig.check()


def test_between_the_two_ends_nothing_can_change_and_what_is_tried_does_nothing(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """Of the blocks, the mapper, the container, the group and the device, which can be read and written."""
    before = rig.reached()
    memory = rig.memory()
    uses: list[Callable[[], object]] = [
        lambda: rig.blocks["ring"].resize(PAGE_SIZE),
        lambda: rig.blocks["ring"].discard(0, PAGE_SIZE),
        lambda: rig.blocks["holes"].populate(2 * PAGE_SIZE, PAGE_SIZE),
        rig.blocks["ring"].remove,
        lambda: rig.add("another"),
        rig.blocks.close,
        lambda: rig.blocks.remove_notifier(rig.mapper),
        lambda: rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE),
        rig.mapper.close,
        lambda: rig.container.map(vaddr=memory, iova=0, size=PAGE_SIZE),
        lambda: rig.container.unmap(iova=before[0][0], size=before[0][2]),
        lambda: rig.container.detach(rig.group),
        rig.container.close,
        rig.group.close,
        rig.device.close,
        lambda: pyvfio.open_device(BDF, container=rig.container),
        rig.device.enter_low_power,
    ]
    with hand_over(rig.mapper) as update:
        for use in uses:
            with pytest.raises((HandOverError, pyvfio.RollbackError), match="another process"):
                use()
        assert rig.device.config.read16(0) == 0x1234
        rig.device.exit_low_power()
        rig.device.drop_windows()
        assert hand_over(rig.mapper) is update
        assert not rig.container.closed
        assert rig.reached() == before
    rig.free(memory)
    rig.check()
    for use in uses[:3]:
        use()


def test_what_is_finished_is_closed_and_closing_it_reaches_nothing(kernel: SpecialKernel, rig: Rig) -> None:
    """Twice is fine; the old objects say that they are closed."""
    ring, vaddr = rig.blocks["ring"], rig.blocks["ring"].vaddr
    update = hand_over(rig.mapper)
    with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
        before = layout(rig)
        with ring.view(), pytest.raises(BufferError, match="ring"):
            update.finish()
        update.finish()
        update.finish()
        update.cancel()
        with pytest.raises(pyvfio.ClosedError, match="finished"):
            update.make_inheritable()
        rig.blocks.add("another", used_length=0, max_length=PAGE_SIZE).remove()
        kernel.clear_trace()
        rig.close()
        assert kernel.trace == []
        assert layout(rig) == before
        assert not proc_maps_has(vaddr)
        for use in (lambda: ring.resize(0), rig.container.get_info, rig.device.reset):
            with pytest.raises(pyvfio.ClosedError):
                use()
        with pytest.raises(pyvfio.ClosedError):
            hand_over(rig.mapper)
        both_ways(rig, taken.blocks, {block.idstr: taken.mapper.iova(block) for block in taken.blocks})


def test_finishing_closes_the_eventfds_and_the_device_goes_on_signalling_them(kernel: SpecialKernel, rig: Rig) -> None:
    """The new process may have duplicates; the list of the old one is free of the mapper's claim."""
    fds = rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
    theirs = os.dup(fds[0])
    update = hand_over(rig.mapper)
    with take_over(update.state, duplicates(kernel, update), kernel=kernel):
        update.finish()
        assert not set(fds) & set(open_fds())
        kernel.interrupt(BDF)
        assert os.eventfd_read(theirs) == 1
        rig.blocks.discards.require().close()
    os.close(theirs)


def test_what_is_cancelled_cannot_be_finished_and_what_is_closed_cannot_be_handed_over(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """Everything stays with this process, and nothing is asked of the kernel."""
    update = hand_over(rig.mapper)
    update.cancel()
    for use in (update.finish, update.make_inheritable):
        with pytest.raises(pyvfio.ClosedError, match="cancelled"):
            use()
    assert rig.container.handing is None
    rig.blocks["ring"].resize(5 * PAGE_SIZE)
    rig.mapper.close()
    kernel.clear_trace()
    with pytest.raises(pyvfio.ClosedError):
        hand_over(rig.mapper)
    assert kernel.trace == []
    assert rig.container.handing is None


@pytest.mark.parametrize("what", ["a byte of a block", "a region"])
def test_the_smallest_view_keeps_a_hand_over_from_being_finished(kernel: SpecialKernel, rig: Rig, what: str) -> None:
    """Nothing is closed then. Afterwards the space has no mapping that this process would know of."""
    rig.device.memory_enabled = True
    view = rig.blocks["ring"].view(0, 1) if what == "a byte of a block" else rig.device.region(0).mmap().view()
    update = hand_over(rig.mapper)
    with take_over(update.state, duplicates(kernel, update), kernel=kernel):
        with pytest.raises(BufferError):
            update.finish()
        assert len(rig.container.mappings) == len(layout(rig)) > 0
        rig.device.config.read16(0)
        view.release()
        update.finish()
        assert rig.device.closed
        assert rig.container.mappings == ()


def test_many_obstacles_are_counted_and_the_first_are_named(rig: Rig) -> None:
    """Eight of them: more say nothing that helps."""
    for index in range(9):
        rig.blocks.add(f"private{index}", used_length=0, max_length=MIB, memory=Anonymous())
    with pytest.raises(HandOverError, match="9 things cannot be handed over: ") as caught:
        hand_over(rig.mapper)
    assert sum(f"'private{index}'" in str(caught.value) for index in range(9)) == 8


def test_memory_that_is_not_as_long_as_it_is_used_is_not_handed_over(kernel: SpecialKernel, rig: Rig) -> None:
    """A block that is allocated in full, and one of which a part could not be given back, until it could."""
    kernel.fail(call="mprotect", errno=errno.ENOMEM)
    rig.add("whole")
    refused(rig, "'whole' is allocated in full, so no process can resize it elsewhere")
    rig.blocks["whole"].remove()
    kernel.fail(call="ftruncate", errno=errno.EIO)
    with pytest.warns(pyvfio.MemoryNotReturnedWarning):
        rig.blocks["holes"].resize(4 * PAGE_SIZE)
    refused(rig, "'holes' has memory that an earlier change could not release: resize the block once more")
    rig.blocks["holes"].resize(3 * PAGE_SIZE)
    hand_over(rig.mapper).cancel()


def test_a_hand_over_that_fails_and_cannot_be_undone_tells_both_and_can_be_cancelled_later(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """Until then it is in progress."""
    before = rig.reached()
    kernel.fall_short_at(1)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.RollbackError, match="could not begin, and the undo failed too") as caught:
        hand_over(rig.mapper)
    begin, undo = caught.value.exceptions
    assert (type(begin), getattr(undo, "errno", 0)) == (HandOverError, errno.EIO)
    assert "hand_over(mapper) returns a HandOver that can be cancelled" in caught.value.hint
    with pytest.raises(HandOverError):
        rig.blocks["ring"].resize(PAGE_SIZE)
    hand_over(rig.mapper).cancel()
    assert rig.reached() == before
    has_addresses(rig)
    rig.blocks["ring"].resize(PAGE_SIZE)


class _Signalling(pyvfio.DmaMapper):
    """A signal arrives when it is asked for its windows."""

    pressed = False

    def __getattribute__(self, name: str) -> object:
        if name == "space" and object.__getattribute__(self, "pressed"):
            self.pressed = False
            signal.raise_signal(signal.SIGUSR1)
        return super().__getattribute__(name)


def test_a_handler_that_raises_in_a_second_call_does_not_cancel_the_first(kernel: SpecialKernel) -> None:
    """Somebody has that hand-over."""
    with Rig(kernel, memory=Memfd(), mapper=_Signalling) as rig:
        rig.add()
        with hand_over(rig.mapper) as update:
            kernel.interrupt_at(0, after=False)  # a handler that raises
            assert isinstance(rig.mapper, _Signalling)
            rig.mapper.pressed = True
            with pytest.raises(Interrupt):
                hand_over(rig.mapper)
            assert not rig.mapper.pressed
            assert rig.container.handing is update
            assert hand_over(rig.mapper) is update
            with pytest.raises(HandOverError):
                rig.blocks["ring"].resize(PAGE_SIZE)


def test_memory_that_is_kept_for_ever_is_not_handed_over(kernel: SpecialKernel, rig: Rig) -> None:
    """A second mapper came half, and could not go: a device may reach more than the first one tells of."""
    ours = rig.reached()
    kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.EIO, nth=2)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.RollbackError):
        pyvfio.DmaMapper(rig.container, rig.blocks)
    kernel.clear_failures()
    for iova, _vaddr, size in set(rig.reached()) - set(ours):
        rig.container.unmap(iova=iova, size=size)
    refused(rig, "could not release")


def test_without_a_kernel_it_is_the_running_one_that_takes_over(kernel: SpecialKernel, rig: Rig) -> None:
    """The descriptors are the fake's, so the running kernel refuses them, and the fake is not asked."""
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.clear_trace()
        with pytest.raises(HandOverError, match="not those that the state describes"):
            take_over(update.state, fds)
        assert not kernel.trace
        close(kernel, fds)


def test_a_finish_that_is_interrupted_can_be_made_again(kernel: SpecialKernel) -> None:
    """Wherever a signal handler raises in it, or a call of it fails."""
    with old(kernel) as rig:
        update = hand_over(rig.mapper)
        taken = take_over(update.state, duplicates(kernel, update), kernel=kernel)
        kernel.clear_trace()
        update.finish()
        calls = list(kernel.trace)
        taken.close()
    for case in cases(calls):
        with old(kernel) as rig:
            update = hand_over(rig.mapper)
            with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
                case.plan(kernel)
                with suppress(OSError, pyvfio.VfioError, Interrupt):
                    update.finish()
                end(kernel)
                update.cancel()  # as the end of a `with` does
                update.finish()
                taken.mapper._check()
                both_ways(rig, taken.blocks, {block.idstr: taken.mapper.iova(block) for block in taken.blocks})
        for area in list(kernel.areas):  # address space of which a signal handler left nobody to know whose it is
            with suppress(OSError):
                kernel._linux.munmap(area.start, area.size)
        kernel.areas = []


def test_in_a_child_neither_end_does_anything(kernel: SpecialKernel, rig: Rig) -> None:
    """The parent's hand-over goes on."""
    before = rig.reached()
    with hand_over(rig.mapper) as update:

        def child() -> None:
            for end_it in (update.cancel, update.finish, update.make_inheritable, lambda: hand_over(rig.mapper)):
                with pytest.raises(pyvfio.ForkedError):
                    end_it()
            with update:
                pass

        assert in_child(child) == 0
    assert rig.reached() == before


def test_descriptors_are_inheritable_when_that_is_asked_for_and_not_afterwards(rig: Rig) -> None:
    """All of them, for execve."""
    with hand_over(rig.mapper) as update:
        assert not any(os.get_inheritable(fd) for fd in update.fds)
        assert update.make_inheritable() == update.fds
        assert all(os.get_inheritable(fd) for fd in update.fds)
    assert not any(os.get_inheritable(fd) for fd in update.fds)


@pytest.mark.parametrize(
    ("memory", "reason"),
    [(Anonymous(), "'private'.*memory=Memfd"), (File(0, shared=False), "'private'.*memory=Memfd")],
    ids=["anonymous", "private file"],
)
def test_private_memory_is_refused_by_name_before_anything_is_touched(
    kernel: SpecialKernel, rig: Rig, memory: MemoryKind, reason: str
) -> None:
    """With what to do."""
    fd = os.memfd_create("caller's")
    os.ftruncate(fd, MIB)
    if isinstance(memory, File):
        memory = File(fd, shared=False)
    block = rig.blocks.add("private", used_length=PAGE_SIZE, max_length=MIB, memory=memory)
    refused(rig, reason)
    block.remove()
    hand_over(rig.mapper).cancel()
    os.close(fd)


def refused(rig: Rig, reason: str) -> None:
    """Nothing is touched, and all goes on."""
    rig.kernel.clear_trace()
    with pytest.raises((HandOverError, pyvfio.UnsupportedError), match=reason):
        hand_over(rig.mapper)
    assert not {"VFIO_IOMMU_UNMAP_DMA", "VFIO_IOMMU_MAP_DMA"} & set(requests(rig.kernel.trace))
    rig.check()
    rig.blocks["ring"].resize(5 * PAGE_SIZE)
    rig.blocks["ring"].resize(4 * PAGE_SIZE)


class _Listener:
    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Nothing."""


def test_buffers_listeners_and_mappings_of_others_are_refused_by_name(kernel: SpecialKernel, rig: Rig) -> None:
    """Of this process, or of another that has the container."""
    memory, listener = rig.memory(), _Listener()
    mapping = rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
    refused(rig, f"vaddr={memory:#x}.*close that mapping")
    mapping.close()
    rig.blocks.add_notifier(listener)
    refused(rig, "_Listener.*remove_notifier")
    rig.blocks.remove_notifier(listener)
    rig.container.map(vaddr=memory, iova=0, size=PAGE_SIZE)
    refused(rig, "IOVA 0x0-0xfff is mapped")
    rig.container.unmap(iova=0, size=PAGE_SIZE)
    fd, stranger = rig.container.fd, struct.pack("=2I3Q", 32, 3, memory, 0, PAGE_SIZE)
    kernel.ioctl(fd, ioctls.VFIO_IOMMU_MAP_DMA, bytearray(stranger))
    refused(rig, "this process knows only")
    rig.container.unmap_dma(iova=0, size=PAGE_SIZE)
    hand_over(rig.mapper).cancel()
    rig.free(memory)


def test_iova_that_is_reserved_for_others_is_refused_by_name(kernel: SpecialKernel, rig: Rig) -> None:
    """The new process would give it out again: the caller's own, and that of an empty block of another mapper."""
    own = rig.container.reserve_iova(MIB, alignment=PAGE_SIZE, offset=0)
    refused(rig, f"IOVA {own:#x}-{own + MIB - 1:#x} is reserved outside of this mapper.*release_iova")
    others = pyvfio.RamBlockList(kernel=kernel)
    with others, pyvfio.DmaMapper(rig.container, others) as mapper:
        empty = mapper.iova(others.add("empty", used_length=0, max_length=MIB))
        for iova in sorted((own, empty)):
            refused(rig, f"{iova:#x}-{iova + MIB - 1:#x}.* is reserved outside")
        rig.container.release_iova(own)
        refused(rig, f"IOVA {empty:#x}-{empty + MIB - 1:#x} is reserved outside of this mapper")
    more = [rig.container.reserve_iova(PAGE_SIZE, alignment=2 * PAGE_SIZE, offset=0) for _ in range(9)]
    refused(rig, f"{more[7]:#x}-{more[7] + PAGE_SIZE - 1:#x}, … is reserved outside")
    for iova in more:
        rig.container.release_iova(iova)
    with hand_over(rig.mapper), pytest.raises(HandOverError):
        rig.container.reserve_iova(MIB, alignment=PAGE_SIZE, offset=0)


def test_a_kernel_without_it_is_told_apart(kernel: SpecialKernel, rig: Rig) -> None:
    """VFIO_UPDATE_VADDR says so."""
    kernel.answers["VFIO_CHECK_EXTENSION"] = 0
    refused(rig, "VFIO_UPDATE_VADDR.*5.12")
    kernel.answers.clear()


def test_from_inside_a_hook_nothing_is_handed_over(rig: Rig) -> None:
    """The change that is being made comes first."""

    def resized(_idstr: str, _length: int) -> None:
        with pytest.raises(pyvfio.ReentrancyError):
            hand_over(rig.mapper)

    block = rig.blocks.add("called", used_length=0, max_length=MIB, memory=Memfd(), resized=resized)
    block.resize(PAGE_SIZE)
    rig.check()


def test_wrong_arguments_are_told_at_once(kernel: SpecialKernel, rig: Rig) -> None:
    """Neither a container nor a block can be handed over alone."""
    for wrong in (rig.container, rig.blocks["ring"]):
        with pytest.raises(TypeError, match="DmaMapper"):
            hand_over(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"only a mapper of a Container or of an Ioas .*, not of .*Rig"):
        hand_over(_Elsewhere(rig.container))


class _Elsewhere(pyvfio.DmaMapper):
    """Its space is of the program's own class."""

    @property
    def space(self) -> Rig:  # type: ignore[override]
        """None that pyvfio knows."""
        return Rig.__new__(Rig)


# ---------------------------------------------------------------------------------------------- the new process


def test_a_block_comes_with_all_that_it_was_made_of(kernel: SpecialKernel) -> None:
    """Settings, rights, prealloc, the policy of its mapper; a file's descriptor is the new process's own."""
    fd = os.memfd_create("caller's", os.MFD_CLOEXEC)
    settings = pyvfio.MemorySettings(dontdump=True, hugepage=False)

    def mapper(space: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        return pyvfio.DmaMapper(
            space, blocks, resize="extend", granule=2 * PAGE_SIZE, allow_gap=False, prefault=2, dma_bits=32
        )

    called: list[int] = []
    with Rig(kernel, mapper=mapper) as rig:
        file = File(fd, PAGE_SIZE, grow=True, punch=True)
        rig.blocks.add("file", used_length=2 * PAGE_SIZE, max_length=MIB, memory=file, readonly=True)
        rig.blocks.add(
            "other", used_length=4 * PAGE_SIZE, max_length=MIB, memory=Memfd(), settings=settings, prealloc=2
        )
        with rig.blocks["file"].view() as view:
            view[:4] = b"file"
        update = hand_over(rig.mapper)
        resized = {"other": lambda _idstr, length: called.append(length)}
        with take_over(update.state, duplicates(kernel, update), kernel=kernel, resized=resized) as taken:
            update.finish()
            os.close(fd)
            policy = taken.mapper.policy
            assert (policy.resize, policy.granule, policy.allow_gap) == ("extend", 2 * PAGE_SIZE, False)
            assert (taken.mapper.dma_bits, taken.container.dma_bits) == (32, 39)
            of_file, other = taken.blocks["file"], taken.blocks["other"]
            assert of_file.readonly
            assert (other.settings, other.prealloc, other.readonly) == (settings, 2, False)
            assert kernel.dma_read(BDF, taken.mapper.iova(of_file), 4) == b"file"
            of_file.resize(4 * PAGE_SIZE)
            other.resize(8 * PAGE_SIZE)
            assert called == [8 * PAGE_SIZE]
            taken.mapper._check()


def test_a_mapper_that_remaps_does_so_in_the_new_process(kernel: SpecialKernel) -> None:
    """One mapping for each block, whatever its lengths were."""
    with old(kernel, "remap") as rig:
        update = hand_over(rig.mapper)
        with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
            update.finish()
            assert taken.mapper.policy.resize == "remap"
            taken.blocks["holes"].populate(0, 8 * PAGE_SIZE)
            for block, pages in ((taken.blocks["ring"], 6), (taken.blocks["holes"], 3)):
                block.resize(pages * PAGE_SIZE)
            assert sorted(size for _iova, size in layout(rig)) == [3 * PAGE_SIZE, 6 * PAGE_SIZE]


def test_a_container_that_is_full_can_be_handed_over(kernel: SpecialKernel) -> None:
    """Whoever takes it over has the same promise for each block, and no more."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as narrow, nothing_left(narrow):
        narrow._machine.iommu = small_iommu(8)

        def mapper(space: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
            return pyvfio.DmaMapper(space, blocks, resize="extend", granule=PAGE_SIZE)

        with Rig(narrow, mapper=mapper, memory=Memfd()) as rig:
            rig.add(used=6 * PAGE_SIZE, maximum=8 * PAGE_SIZE)
            update = hand_over(rig.mapper)
            with take_over(update.state, duplicates(narrow, update), kernel=narrow) as taken:
                update.finish()
                taken.blocks["ring"].resize(8 * PAGE_SIZE)
                assert taken.container.entries_left == 0
                with pytest.raises(pyvfio.EntryLimitError):
                    taken.blocks.add("more", used_length=0, max_length=PAGE_SIZE)
                again = hand_over(taken.mapper)
                with take_over(again.state, duplicates(narrow, again), kernel=narrow) as once_more:
                    again.finish()
                    assert once_more.container.entry_limit == 8
                    assert once_more.container.entries_left == 0


def test_what_was_taken_over_can_be_handed_over_again(kernel: SpecialKernel, rig: Rig) -> None:
    """And the place of new blocks is the caller's to choose there."""
    update = hand_over(rig.mapper)
    first = take_over(update.state, duplicates(kernel, update), kernel=kernel, place=lambda _block: 1 << 32)
    update.finish()
    again = hand_over(first.mapper)
    with take_over(again.state, duplicates(kernel, again), kernel=kernel, place=lambda _block: 1 << 33) as second:
        again.finish()
        first.close()
        new = second.blocks.add("new", used_length=PAGE_SIZE, max_length=MIB)
        assert second.mapper.iova(new) == 1 << 33
        both_ways(rig, second.blocks, {block.idstr: second.mapper.iova(block) for block in second.blocks})


def test_a_list_without_blocks_and_an_empty_block_are_handed_over(kernel: SpecialKernel) -> None:
    """The device alone is something."""
    for used in (None, 0):
        with Rig(kernel, memory=Memfd()) as rig:
            if used is not None:
                rig.add(used=used)
            update = hand_over(rig.mapper)
            with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
                update.finish()
                for block in taken.blocks:
                    block.resize(PAGE_SIZE)
                assert len(layout(rig)) == len(taken.blocks)


def test_two_groups_go_together_and_one_container_with_them(kernel: SpecialKernel) -> None:
    """With all their devices, by their addresses."""
    with SpecialKernel() as two, nothing_left(two), Rig(two, memory=Memfd()) as rig:
        pyvfio.open_device(OTHER_BDF, container=rig.container)
        rig.add()
        update = hand_over(rig.mapper)
        with take_over(update.state, duplicates(two, update), kernel=two) as taken:
            update.finish()
            assert set(taken.devices) == {BDF, OTHER_BDF}
            assert taken.devices[OTHER_BDF].container is taken.container


def test_pins_that_the_new_process_may_not_have_are_told_with_the_limit(kernel: SpecialKernel, rig: Rig) -> None:
    """And the old process has everything still."""
    before = rig.reached()
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=2)
        kernel.memlock_limit = kernel.memlock().used
        with pytest.raises(pyvfio.PinLimitError, match="RLIMIT_MEMLOCK lets this process lock"):
            take_over(update.state, fds, kernel=kernel)
        close(kernel, fds)
    assert rig.reached() == before


def test_pins_that_the_new_process_may_not_have_are_told_for_the_whole_change(kernel: SpecialKernel) -> None:
    """Not for the one mapping that was refused: a limit for that one would be too small for the next."""
    with granules(kernel) as rig, hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=5)
        kernel.memlock_limit = 4 * PAGE_SIZE
        with pytest.raises(pyvfio.PinLimitError, match="64 KiB were asked for") as caught:
            take_over(update.state, fds, kernel=kernel)
        # Of the 16 pages that the fake has charged, four have come before the fifth was refused.
        assert (caught.value.asked, caught.value.used) == (16 * PAGE_SIZE, 12 * PAGE_SIZE)
        kernel.memlock_limit = None
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=5)
        with pytest.raises(pyvfio.PinLimitError, match="the kernel has no memory to map 4 KiB"):
            take_over(update.state, fds, kernel=kernel)
        close(kernel, fds)


def test_descriptors_that_are_not_what_they_should_be_are_refused(kernel: SpecialKernel, rig: Rig) -> None:
    """One too few, the same twice, two exchanged, one that is closed, memory that has become too short."""
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        closed = os.dup(fds[-1])
        os.close(closed)
        exchanged = [*fds[:-2], fds[-1], fds[-2]]
        for wrong, reason in (
            (fds[:-1], "the VFIO container, IOMMU group 2, device .*, the memory of RAM block"),
            ([*fds[:-1], fds[0]], "different ones"),
            (exchanged, "should be the memory of RAM block '(ring|holes)', but is another file"),
            ([*fds[:-1], closed], "Bad file descriptor.*send_fds"),
        ):
            kernel.clear_trace()
            with pytest.raises(HandOverError, match=reason):
                take_over(update.state, wrong, kernel=kernel)
            assert "ioctl" not in [call.call for call in kernel.trace]
        state = json.loads(update.state)
        state["blocks"][0].update(used_length=MIB, pieces=[[0, MIB]], discarded=[])
        with pytest.raises(HandOverError, match=r"has (16|32) KiB, but 1 MiB are in use"):
            take_over(json.dumps(state).encode(), fds, kernel=kernel)
        close(kernel, fds)


def test_what_was_cancelled_cannot_be_taken_over(kernel: SpecialKernel, rig: Rig) -> None:
    """Nor can what another has taken over, and it loses nothing by that."""
    update = hand_over(rig.mapper)
    fds = duplicates(kernel, update)
    update.cancel()
    before = rig.reached()
    with pytest.raises(HandOverError, match="has cancelled"):
        take_over(update.state, fds, kernel=kernel)
    close(kernel, fds)
    hand_over(rig.mapper).cancel()
    assert rig.reached() == before


def one_iova(state: bytes) -> bytes:
    """The second block reaches into the first one."""
    told = json.loads(state)
    first, second = told["blocks"]
    second["iova"] = first["iova"] + first["max_length"] - PAGE_SIZE
    return json.dumps(told).encode()


@pytest.mark.parametrize("gone", [True, False], ids=["unmapped since", "mapped in other pieces since"])
def test_a_state_of_an_earlier_hand_over_is_refused_and_what_has_come_is_told(
    kernel: SpecialKernel, rig: Rig, *, gone: bool
) -> None:
    """The first mappings have an address here by then, and the other process may have given them one of its own."""
    stale = hand_over(rig.mapper)
    fds = duplicates(kernel, stale)
    stale.cancel()
    last = rig.blocks["holes"] if rig.blocks["holes"].vaddr > rig.blocks["ring"].vaddr else rig.blocks["ring"]
    last.discard(last.used_length - PAGE_SIZE, PAGE_SIZE)
    if gone:
        last.discard(0, last.used_length - PAGE_SIZE)
    before = rig.reached()
    with hand_over(rig.mapper) as update:
        with pytest.raises(pyvfio.RollbackError, match="some mappings may still have an address") as caught:
            take_over(stale.state, fds, kernel=kernel)
        (cause,) = caught.value.exceptions
        assert isinstance(cause, HandOverError)
        assert ("is not mapped" in str(cause)) == gone
        assert set(fds) <= set(open_fds())
        close(kernel, fds)
        assert [each[::2] for each in rig.reached()] == [each[::2] for each in before]
        kept = {vaddr for _iova, vaddr, _size in rig.reached()} - {vaddr for _iova, vaddr, _size in before}
        assert kept
        assert all(map(proc_maps_has, kept))
        assert update.fds
    assert rig.reached() == before
    rig.check()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state[:100], "or are incomplete"),
        (lambda _state: b"\xff\0", "not the state"),
        (lambda _state: b"[]", "not a JSON object"),
        (lambda _state: b"{}", "not the state of a HandOver"),
        (lambda state: state.replace(b'"version":2', b'"version":1'), "version 1, .*versions 2 and 3: .*same release"),
        (lambda state: state.replace(b'"version":2', b'"version":[]'), "version"),
        (lambda state: state.replace(b'"mapper_bits":39', b'"mapper_bits":65'), "dma_bits must be 17 to 64"),
        (lambda state: state.replace(b'"container_bits":39', b'"container_bits":null'), "'container_bits'"),
        (lambda state: state.replace(b'"iommu_type":3', b'"iommu_type":7'), "type 7"),
        (lambda state: state.replace(b'"groups":[2]', b'"groups":[3]'), "group that the state does not list"),
        (lambda state: state.replace(b'"groups":[2]', b'"groups":["2"]'), "'groups'"),
        (lambda state: state.replace(b'"bdf"', b'"fdb"'), "'bdf'"),
        (lambda state: state.replace(b'"pieces":[[', b'"pieces":[[4096,'), "'pieces'"),
        (lambda state: state.replace(b'"pieces":[[0,', b'"pieces":[[4096,'), "contradict each other"),
        (lambda state: state.replace(b'"idstr":"holes"', b'"idstr":"ring"'), "two RAM blocks of one name"),
        (lambda state: state.replace(b'"max_length":1048576', b'"max_length":-1'), "'max_length'"),
        (lambda state: state.replace(b'"readonly":false', b'"readonly":0'), "'readonly'"),
        (lambda state: state.replace(b'"identities":[', b'"identities":[[1,2],'), "5 descriptors, but 6 identities"),
        (lambda state: state.replace(b'"granule":null', b'"granule":3'), "power of two"),
        (
            lambda state: state.replace(b'"resize":"extend"', b'"resize":"rubbish"'),
            "'remap', 'extend' or 'cut', not 'rubbish'",
        ),
        (lambda state: state.replace(b'"prefault":0', b'"prefault":1000000'), "prefault must be a number of threads"),
        (lambda state: state.replace(b'"prealloc":0', b'"prealloc":1000000'), "prealloc must be a number of threads"),
        (one_iova, "two RAM blocks at one IOVA"),
    ],
)
def test_a_state_that_is_none_is_refused_with_what_is_wrong_with_it(
    kernel: SpecialKernel, rig: Rig, change: Callable[[bytes], bytes], reason: str
) -> None:
    """Cut off, of another version, not JSON, or with lengths that no block has: no call is made."""
    with hand_over(rig.mapper) as update:
        wrong = change(update.state)
        assert wrong != update.state
        kernel.clear_trace()
        with pytest.raises(ValueError, match=reason):
            take_over(wrong, update.fds, kernel=kernel)
        assert kernel.trace == []
        with pytest.raises(ValueError, match="no RAM block 'other'"):
            take_over(update.state, update.fds, kernel=kernel, resized={"other": lambda _idstr, _length: None})


@pytest.mark.parametrize(
    ("wrong", "error", "reason"),
    [
        ({"state": 10}, TypeError, "state must be bytes.*not int"),
        ({"state": 1 << 63}, TypeError, "state must be bytes.*not int"),
        ({"state": "{}"}, TypeError, "state must be bytes.*not str"),
        ({"fds": [1.5]}, TypeError, "a descriptor must be a whole number, not 1.5"),
        ({"fds": [1 << 70]}, ValueError, "no descriptor has the number 1180591620717411303424"),
        ({"fds": [-1]}, ValueError, "no descriptor has the number -1"),
        ({"fds": [1 << 31]}, ValueError, "no descriptor has the number 2147483648"),
        ({"fds": [(1 << 31) - 1]}, HandOverError, "^1 descriptors were passed"),
        ({"fds": 3}, TypeError, "fds must be a list or another iterable, not int"),
        ({"place": 5}, TypeError, "must be callable"),
        ({"policy_of": "x"}, TypeError, "must be callable"),
        ({"progress": 5}, TypeError, "must be callable"),
        ({"resized": {"ring": 5}}, TypeError, "must be callable"),
        ({"resized": ["ring"]}, TypeError, "resized must be a mapping"),
        ({"resized": 0}, TypeError, "resized must be a mapping"),
        ({"resized": {"ring": print, 5: print}}, ValueError, "no RAM block '5'"),
    ],
)
def test_arguments_that_can_never_be_right_are_told_before_any_call(
    kernel: SpecialKernel, rig: Rig, wrong: dict[str, object], error: type[Exception], reason: str
) -> None:
    """Then the same descriptors can be taken over by a call that is right, numpy's numbers among them."""
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.clear_trace()
        right: dict[str, object] = {"state": update.state, "fds": fds, "kernel": kernel}
        with pytest.raises(error, match=reason):
            take_over(**(right | wrong))  # type: ignore[arg-type]
        assert kernel.trace == []
        numbers: list[int] = list(np.array(fds))
        forget(take_over(update.state, numbers, kernel=kernel), kernel, fds)


def test_descriptors_can_have_any_number_that_the_kernel_gives(kernel: SpecialKernel, rig: Rig) -> None:
    """Also 0, in a program that was started without standard input."""
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        saved = os.dup(0)
        os.close(0)
        try:
            first = kernel.dup(update.fds[0])
            assert first == 0
            with take_over(update.state, [0, *fds[1:]], kernel=kernel):
                update.finish()
        finally:
            os.dup2(saved, 0)
            os.close(saved)
        kernel.close(fds[0])


class _HugeKernel(SpecialKernel):
    """In which each file is of huge pages of that size; the rest as in another one."""

    size = 2 * MIB

    def __init__(self, kernel: SpecialKernel) -> None:
        self.__dict__ = kernel.__dict__.copy()

    def file_status(self, fd: int) -> FileStatus:
        """As if it were."""
        return replace(super().file_status(fd), file_system=HUGETLBFS_MAGIC, block_size=self.size)


def test_memory_of_huge_pages_is_taken_over_as_such_and_no_other(kernel: SpecialKernel) -> None:
    """Neither small pages nor those of another size."""
    with Rig(kernel, memory=Memfd()) as rig:
        rig.add(used=2 * MIB, maximum=4 * MIB)
        update = hand_over(rig.mapper)
        fds, told = duplicates(kernel, update), json.loads(update.state)
        told["blocks"][0]["memory"] = {"kind": "memfd", "hugetlb": 2 * MIB}
        state, huge = json.dumps(told).encode(), _HugeKernel(kernel)
        huge.size = 1 << 30
        for wrong in (kernel, huge):
            with pytest.raises(HandOverError, match="'ring' does not consist of huge pages of 2 MiB"):
                take_over(state, fds, kernel=wrong)
        huge.size = 2 * MIB
        with take_over(state, fds, kernel=huge) as taken:
            assert (taken.blocks["ring"].page_size, taken.blocks["ring"].used_length) == (2 * MIB, 2 * MIB)
            update.finish()


def test_the_callers_choices_hold_for_blocks_of_the_new_process(kernel: SpecialKernel, rig: Rig) -> None:
    """Each of the callbacks is what it was given as."""
    asked: list[str] = []
    reported: list[str] = []

    def policy_of(block: pyvfio.RamBlock | pyvfio.BlockShape) -> pyvfio.Policy:
        asked.append(block.idstr)
        return pyvfio.Policy("extend", granule=PAGE_SIZE)

    update = hand_over(rig.mapper)
    with take_over(
        update.state,
        duplicates(kernel, update),
        kernel=kernel,
        policy_of=policy_of,
        place=lambda _block: 1 << 32,
        progress=lambda step: reported.append(step.block.idstr),
    ) as taken:
        update.finish()
        assert (asked, reported) == ([], [])
        taken.blocks["ring"].resize(5 * PAGE_SIZE)
        assert (asked, set(reported)) == ([], {"ring"})
        before = len(layout(rig))
        new = taken.blocks.add("new", used_length=3 * PAGE_SIZE, max_length=MIB)
        assert set(asked) == {"new"}
        assert len(layout(rig)) == before + 3
        assert taken.mapper.iova(new) == 1 << 32


def test_a_take_over_that_fails_leaves_no_address_space_behind(kernel: SpecialKernel, rig: Rig) -> None:
    """Nor a block that anybody could use."""
    with hand_over(rig.mapper) as update:
        fds, before = duplicates(kernel, update), kernel.areas
        for nth in (1, 2):
            kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM, nth=nth)
            with pytest.raises(pyvfio.PinLimitError):
                take_over(update.state, fds, kernel=kernel)
            assert kernel.areas == before
        close(kernel, fds)


class _DetachedKernel(SpecialKernel):
    """In which no group is in a container; the rest as in another one."""

    def __init__(self, kernel: SpecialKernel) -> None:
        self.__dict__ = kernel.__dict__.copy()

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """As the fake's, but for that."""
        answer = super().ioctl(fd, request, argument)
        if request == ioctls.VFIO_GROUP_GET_STATUS and not isinstance(argument, int):
            told = memoryview(argument).cast("B")
            (flags,) = struct.unpack_from("=I", told, 4)
            struct.pack_into("=I", told, 4, flags & ~int(ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET))
        return answer


def test_a_group_that_was_detached_since_is_refused_before_any_mapping_is_changed(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """The other process has ended, or has taken the group out."""
    with hand_over(rig.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.clear_trace()
        with pytest.raises(HandOverError, match="IOMMU group 2 is in no container: the other process has detached it"):
            take_over(update.state, fds, kernel=_DetachedKernel(kernel))
        assert "VFIO_IOMMU_MAP_DMA" not in requests(kernel.trace)
        close(kernel, fds)


def test_a_cancel_that_the_kernel_refuses_for_another_reason_is_told_by_its_errno(
    kernel: SpecialKernel, rig: Rig
) -> None:
    """EINVAL alone says that a mapping has no address."""
    before = rig.reached()
    update = hand_over(rig.mapper)
    kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError) as caught:
        update.cancel()
    assert (caught.value.request, caught.value.errno) == ("VFIO_IOMMU_UNMAP_DMA", errno.EIO)
    with pytest.raises(HandOverError):
        rig.blocks["ring"].resize(PAGE_SIZE)
    update.cancel()
    assert rig.reached() == before
    has_addresses(rig)


class _BlindKernel(SpecialKernel):
    """That cannot read /proc."""

    def memlock(self) -> Memlock:
        """EMFILE."""
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_limit_is_explained_with_what_is_locked_by_others_if_that_can_be_read() -> None:
    """Which is none where more is charged to the change than is locked: the two were read one after the other."""
    limit = pyvfio.PinLimitError(errno.ENOMEM, "x", request="VFIO_IOMMU_MAP_DMA", arguments={"size": PAGE_SIZE})
    limit.limit = MIB
    with SpecialKernel() as kernel, Rig(kernel, memory=Memfd()) as rig:
        rig.add(used=4 * PAGE_SIZE)
        for locked, used in ((PAGE_SIZE, 3 * PAGE_SIZE), (4 * PAGE_SIZE, 0), (5 * PAGE_SIZE, 0)):
            error = explain_limit(limit, rig.container, size=2 * MIB, locked=locked)
            assert (error.limit, error.used, error.asked, error.mapped) == (MIB, used, 2 * MIB, 0)
            assert (error.request, error.arguments) == ("VFIO_IOMMU_MAP_DMA", {"size": PAGE_SIZE})
    with _BlindKernel() as kernel, Rig(kernel) as rig:
        assert explain_limit(limit, rig.container, size=2 * MIB, locked=0) is limit


def test_a_state_says_the_same_after_it_has_travelled(kernel: SpecialKernel, rig: Rig) -> None:
    """To the last field."""
    with hand_over(rig.mapper) as update:
        state = State.load(update.state)
        assert State.load(state.dump()) == state
        assert [block.idstr for block in state.blocks] == [block.idstr for block in rig.blocks]
        assert state.space == HandedContainer(ioctls.VFIO_TYPE1v2_IOMMU, (2,))


class _PiecemealKernel(SpecialKernel):
    """One without VFIO_UNMAP_ALL."""

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """As the fake's, but for that."""
        if request == ioctls.VFIO_CHECK_EXTENSION and argument == ioctls.VFIO_UNMAP_ALL:
            return 0
        return super().ioctl(fd, request, argument)


@pytest.mark.parametrize("iommu_type", [ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU])
@pytest.mark.parametrize("version", ["6.1", "6.12", "7.3"])
def test_every_kernel_and_both_types_of_iommu_hand_over(version: str, iommu_type: ioctls.VfioExtension) -> None:
    """By one call where it takes all mappings at once, else by one for each."""
    for at_once in (True, False):
        kernel = SpecialKernel(version) if at_once else _PiecemealKernel(version)
        with kernel, nothing_left(kernel), Rig(kernel, memory=Memfd(), iommu_type=iommu_type) as rig:
            rig.add(used=4 * PAGE_SIZE)
            rig.add("other")
            places = iovas(rig)
            kernel.clear_trace()
            update = hand_over(rig.mapper)
            assert requests(kernel.trace).count("VFIO_IOMMU_UNMAP_DMA") == (1 if at_once else 2)
            with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
                update.finish()
                both_ways(rig, taken.blocks, places)


def test_blocks_of_a_list_that_the_mapper_was_taken_out_of_are_not_handed_over(rig: Rig) -> None:
    """They would be in no state, and finish() would let go of their memory."""
    rig.blocks.remove_notifier(rig.mapper)
    with pytest.raises(HandOverError, match=r"2 things .*'ring' is no longer followed by this mapper"):
        hand_over(rig.mapper)
    rig.blocks["ring"].resize(MIB)


def test_a_hand_over_that_another_thread_has_only_begun_is_nobody_elses_to_cancel(rig: Rig) -> None:
    """It would go on behind the cancel, and nobody could end it any more."""
    made: list[HandOver] = []
    with rig.blocks.guard.lock:  # as a change that is under way
        first = threading.Thread(target=lambda: made.append(hand_over(rig.mapper)))
        first.start()
        while rig.container.handing is None:
            time.sleep(0.001)
        with pytest.raises(HandOverError, match="another thread has just begun to hand over"):
            hand_over(rig.mapper)
    first.join()
    assert hand_over(rig.mapper) is made[0]
    made[0].cancel()
    rig.blocks["ring"].resize(MIB)
    rig.check()


class _Refusing(_Listener):
    """Told last, as the oldest."""

    def ram_block_discarded(self, block: pyvfio.RamBlock, parts: object) -> None:
        """Nothing."""

    def ram_block_populated(self, block: pyvfio.RamBlock, parts: object) -> None:
        """No."""
        raise PermissionError(block.idstr, parts)


def test_discarded_parts_that_a_device_may_reach_are_not_handed_over(kernel: SpecialKernel) -> None:
    """The other process would take them for given back. Populated once more, all of it can go."""
    other = _Refusing()

    def late(space: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        blocks.add_notifier(other)
        return pyvfio.DmaMapper(space, blocks, resize="extend")

    with Rig(kernel, memory=Memfd(), mapper=late) as rig:
        block = rig.add("holes", used=8 * PAGE_SIZE)
        block.discard(2 * PAGE_SIZE, PAGE_SIZE)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError):
            block.populate(2 * PAGE_SIZE, PAGE_SIZE)
        rig.blocks.remove_notifier(other)
        with pytest.raises(HandOverError, match=r"'holes' has discarded parts that a device may reach: populate them"):
            hand_over(rig.mapper)
        block.populate(2 * PAGE_SIZE, PAGE_SIZE)
        hand_over(rig.mapper).cancel()
        rig.check()


# ----------------------------------------------------------------------------------------------------- interrupts

MSI = ioctls.VFIO_PCI_MSI_IRQ_INDEX
INTX = ioctls.VFIO_PCI_INTX_IRQ_INDEX


@pytest.fixture
def interrupts() -> Iterator[Rig]:
    """A device with eight vectors of MSI, of which the first signals an eventfd of the library, the third one of the
    program's, and the others none."""
    with (
        SpecialKernel(groups=[(2, [FakeDevice(BDF, msi=8, resettable=True)])]) as kernel,
        nothing_left(kernel),
        old(kernel) as rig,
    ):
        irq = rig.device.irq(MSI)
        irq.enable(1)
        irq.disable()
        own = os.eventfd(0, os.EFD_NONBLOCK)
        irq.enable(fds=[None, None, own, None])
        irq.enable(1)
        yield rig
        os.close(own)


def test_no_interrupt_is_lost_while_it_is_handed_over_and_the_new_process_has_its_eventfds(
    interrupts: Rig,
) -> None:
    """Raised before, between and after; no call is made for it; the gaps are gaps, and can be filled."""
    kernel, old_irq = special(interrupts), interrupts.device.irq(MSI)
    own = old_irq.fds[2]
    assert own is not None
    kernel.interrupt(BDF, 0)
    update = hand_over(interrupts.mapper)
    kernel.interrupt(BDF, 2)
    kernel.clear_trace()
    with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
        irq = taken.devices[BDF].irq(MSI)
        assert "VFIO_DEVICE_SET_IRQS" not in requests(kernel.trace)
        kernel.interrupt(BDF, 2)
        update.finish()
        assert own in open_fds()
        assert [fd is None for fd in irq.fds] == [False, True, False, True]
        assert not {fd for fd in irq.fds if fd is not None} & {own}
        kernel.interrupt(BDF, 0)
        assert irq.wait_any(timeout=0) == {0: 2, 2: 2}
        irq.enable(1, start=3)
        kernel.interrupt(BDF, 3)
        assert irq.wait_any(timeout=0) == {3: 1}
        with pytest.raises(pyvfio.UnsupportedError, match="4 of 8 vectors are enabled"):
            irq.enable(1, start=4)
        irq.disable()
        assert own in open_fds()


def test_vectors_that_share_an_eventfd_share_it_in_the_new_process(interrupts: Rig) -> None:
    """Descriptors that came are several, of one eventfd."""
    kernel, irq = special(interrupts), interrupts.device.irq(MSI)
    irq.enable(fds=[irq.fds[2], irq.fds[2]], start=1)
    update = hand_over(interrupts.mapper)
    with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
        update.finish()
        kernel.interrupt(BDF, 1)
        assert taken.devices[BDF].irq(MSI).wait_any(timeout=0) == {1: 1, 2: 1}


def test_an_eventfd_that_unmasks_intx_goes_along(kernel: SpecialKernel, rig: Rig) -> None:
    """And another can take its place in the new process, which knows of it."""
    unmask = os.eventfd(0, os.EFD_NONBLOCK)
    rig.device.irq(INTX).enable()
    rig.device.irq(INTX).unmask_by(unmask)
    update = hand_over(rig.mapper)
    with take_over(update.state, duplicates(kernel, update), kernel=kernel) as taken:
        update.finish()
        irq = taken.devices[BDF].irq(INTX)
        for _ in range(2):
            kernel.interrupt(BDF)
            assert irq.wait(timeout=60) == 1
            os.eventfd_write(unmask, 1)
        with pytest.raises(pyvfio.IoctlError, match="EBUSY"):
            irq.unmask_by(unmask)
        irq.unmask_by(None)
        irq.unmask_by(unmask)
    os.close(unmask)


def test_a_cancelled_hand_over_leaves_interrupts_as_they_were(interrupts: Rig) -> None:
    """Though the new process had them; until then the old one can wait, and change nothing."""
    kernel, irq = special(interrupts), interrupts.device.irq(MSI)
    before = irq.fds
    with hand_over(interrupts.mapper) as update:
        fds = duplicates(kernel, update)
        forget_interrupts(take_over(update.state, fds, kernel=kernel), kernel, fds)
        changes: tuple[Callable[[], object], ...] = (
            irq.disable,
            lambda: irq.disable(0),
            lambda: irq.enable(1, start=1),
            lambda: irq.enable(fds=[None]),
            lambda: interrupts.device.irq(INTX).unmask_by(None),
            interrupts.device.irq(INTX).enable,
        )
        for change in changes:
            with pytest.raises(HandOverError, match="another process"):
                change()
        kernel.interrupt(BDF, 2)
        assert irq.wait_any(timeout=0) == {2: 1}
    assert irq.fds == before
    kernel.interrupt(BDF, 0)
    assert irq.wait_any(timeout=0) == {0: 1}
    irq.disable(0)


def special(rig: Rig) -> SpecialKernel:
    """Its kernel."""
    assert isinstance(rig.kernel, SpecialKernel)
    return rig.kernel


def forget_interrupts(taken: TakenOver, kernel: SpecialKernel, fds: list[int]) -> None:
    """The new process dies, with interrupts."""
    for device in taken.devices.values():
        for irq in device.irqs:
            irq.give_up()
    forget(taken, kernel, fds)


def test_eventfds_that_came_are_the_callers_again_where_it_could_not_be_taken_over(interrupts: Rig) -> None:
    """Whichever call fails, also those for the interrupts; and the second time it succeeds."""
    kernel = special(interrupts)
    calls = (("eventfd", ""), ("ioctl", "VFIO_DEVICE_GET_IRQ_INFO"), ("ioctl", "VFIO_IOMMU_MAP_DMA"))
    with hand_over(interrupts.mapper) as update:
        fds = duplicates(kernel, update)
        kernel.clear_trace()
        taken = take_over(update.state, fds, kernel=kernel)
        last = sum(call.call in SpecialKernel.INTERRUPTIBLE for call in kernel.trace)
        forget_interrupts(taken, kernel, fds)
    with hand_over(interrupts.mapper) as update:
        fds = duplicates(kernel, update)
        before = open_fds()
        for call, request in calls:
            kernel.fail(call=call, request=request or None, errno=errno.EMFILE)
            with pytest.raises(pyvfio.IoctlError):
                take_over(update.state, fds, kernel=kernel)
            assert open_fds() == before
        for nth in (1, last):  # the last call is for the interrupts, and the signal is handled when all is done
            kernel.interrupt_at(nth, after=True)
            with pytest.raises(Interrupt):
                take_over(update.state, fds, kernel=kernel)
            gc.collect()  # nothing that was made closes what is the caller's
            assert open_fds() == before
        forget_interrupts(take_over(update.state, fds, kernel=kernel), kernel, fds)


def test_eventfds_in_another_order_are_refused(interrupts: Rig) -> None:
    """All of them are one file to fstat(2)."""
    kernel = special(interrupts)
    with hand_over(interrupts.mapper) as update:
        fds = duplicates(kernel, update)
        with pytest.raises(HandOverError, match="should be the eventfd of vector 0 of VFIO_PCI_MSI_IRQ_INDEX"):
            take_over(update.state, [*fds[:-2], fds[-1], fds[-2]], kernel=kernel)
        with pytest.raises(HandOverError, match="the eventfd of vector 2"):
            take_over(update.state, fds[:-1], kernel=kernel)
        close(kernel, fds)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bdf", "0000:00:07.0", "device that the state does not list"),
        ("index", 5, "contradict each other"),
        ("index", -1, "'index'"),
        ("count", 2, "contradict each other"),
        ("count", 0, "contradict each other"),
        ("count", 1 << 40, "contradict each other"),
        ("vectors", [2, 0], "contradict each other"),
        ("vectors", [0, 0], "contradict each other"),
        ("vectors", "02", "'vectors'"),
        ("eventfds", [1], "contradict each other"),
        ("unmasked", True, "contradict each other"),
        ("unmasked", 0, "'unmasked'"),
    ],
)
def test_interrupts_that_none_can_have_are_refused(interrupts: Rig, field: str, value: object, says: str) -> None:
    """Before any call."""
    with hand_over(interrupts.mapper) as update:
        told = json.loads(update.state)
        told["irqs"][0][field] = value
        interrupts.kernel.clear_trace()
        with pytest.raises(ValueError, match=says):
            take_over(json.dumps(told).encode(), update.fds, kernel=interrupts.kernel)
        told = json.loads(update.state)
        told["irqs"] *= 2
        with pytest.raises(ValueError, match="twice"):
            take_over(json.dumps(told).encode(), update.fds, kernel=interrupts.kernel)
        assert interrupts.kernel.trace == []


# ---------------------------------------------------------------------------------------------------------- its cost


class Listing(pyvfio.DmaMapper):
    """A mapper that counts how many windows it has listed."""

    listed = 0

    def windows(self) -> list[tuple[pyvfio.RamBlock, Window]]:
        found = super().windows()
        self.listed += len(found)
        return found


def test_a_hand_over_lists_the_blocks_as_often_among_many_as_among_few(kernel: SpecialKernel) -> None:
    rounds = []
    for number in (2, 20):
        with Rig(kernel, memory=Memfd(), mapper=Listing) as rig:
            for index in range(number):
                rig.add(f"b{index}")
            hand_over(rig.mapper).cancel()
            assert isinstance(rig.mapper, Listing)
            rounds.append(rig.mapper.listed / number)
    assert rounds[0] == rounds[1]
