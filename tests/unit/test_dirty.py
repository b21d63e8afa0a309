"""What devices may have written, on the fake kernel: all that is mapped with type1, what was written with iommufd."""

from __future__ import annotations

import errno
import signal
import struct
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvfio
from pyvfio import DirtyTracking, ioctls
from pyvfio.iommu.dirty_bitmap import _runs
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.counting import called
from tests.unit.fakes import BDF, OTHER_BDF, Interrupt, Rig, SpecialKernel, requests
from tests.unit.tracking import KINDS, READS, UNMAPS, BusyKernel, Kind, tracked_kernel, tracked_rig

BASE = 0x10_0000
ROOM = 16 * PAGE_SIZE


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind of address space."""
    kind: Kind = request.param
    return kind


@pytest.fixture
def busy(kind: Kind) -> Iterator[BusyKernel]:
    """A kernel that tracks."""
    with tracked_kernel(kind) as made:
        yield made


@pytest.fixture
def rig(busy: BusyKernel, kind: Kind) -> Iterator[Rig]:
    """Three mappings: four pages, three, and, behind a hole, one."""
    with tracked_rig(busy, kind) as made:
        memory = fill(made)
        yield made
        made.close()
        made.free(memory, ROOM)


def fill(rig: Rig) -> int:
    """Map as `rig` says; the memory."""
    memory = rig.memory(ROOM)
    for page, count in ((0, 4), (4, 3), (10, 1)):
        rig.space.map(vaddr=memory + page * PAGE_SIZE, iova=BASE + page * PAGE_SIZE, size=count * PAGE_SIZE)
    return memory


@pytest.fixture
def tracks() -> Iterator[BusyKernel]:
    """A kernel with iommufd, whose IOMMU records writes."""
    with tracked_kernel("iommufd") as made:
        yield made


@pytest.fixture
def precise(tracks: BusyKernel) -> Iterator[Rig]:
    """On an Ioas: three mappings, as `rig` has them."""
    with tracked_rig(tracks, "iommufd") as made:
        memory = fill(made)
        yield made
        made.close()
        made.free(memory, ROOM)


def ioas_of(rig: Rig) -> pyvfio.Ioas:
    """The rig's space, which is one."""
    assert isinstance(rig.space, pyvfio.Ioas)
    return rig.space


def write(kernel: FakeKernel, *pages: int, bdf: str = BDF) -> None:
    """A device writes to these pages."""
    for page in pages:
        kernel.dma_write(bdf, BASE + page * PAGE_SIZE, b"written")


def spans(pages: pyvfio.DirtyPages) -> list[tuple[int, int]]:
    """First page and how many."""
    return [((found.start - BASE) // PAGE_SIZE, found.size // PAGE_SIZE) for found in pages.dirty]


def dirty(tracking: DirtyTracking, *, clear: bool = True) -> list[int]:
    """The dirty pages, by their numbers."""
    found = spans(tracking.read(iova=BASE, size=ROOM, clear=clear))
    return [page for first, count in found for page in range(first, first + count)]


# -------------------------------------------------------------------------------------------------------- of both kinds


def test_what_a_device_wrote_is_dirty(rig: Rig, busy: BusyKernel, kind: Kind) -> None:
    """With type1 all that is mapped, each time. What is not mapped is no page."""
    with DirtyTracking(rig.space) as tracking:
        assert dirty(tracking) == ([0, 1, 2, 3, 4, 5, 6, 10] if kind == "type1" else [])
        write(busy, 1, 5, 6, 10)
        found = tracking.read(iova=BASE, size=ROOM)
        assert (found.pages, found.page_size) == (8, PAGE_SIZE)
        assert spans(found) == ([(0, 7), (10, 1)] if kind == "type1" else [(1, 1), (5, 2), (10, 1)])
        nothing = tracking.read(iova=BASE + 8 * PAGE_SIZE, size=PAGE_SIZE)
        assert (nothing.pages, nothing.dirty) == (0, ())
        write(busy, 3, 4)
        behind = spans(tracking.read(iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE))
        assert behind == ([(4, 3)] if kind == "type1" else [(4, 1)])


def test_neighbours_of_two_mappings_are_one_range(rig: Rig, busy: BusyKernel) -> None:
    with DirtyTracking(rig.space) as tracking:
        write(busy, *range(7))
        assert spans(tracking.read(iova=BASE, size=7 * PAGE_SIZE)) == [(0, 7)]


def test_a_snapshot_can_be_read(rig: Rig, busy: BusyKernel) -> None:
    """By a person."""
    with DirtyTracking(rig.space) as tracking:
        write(busy, *range(7), 10)
        found = tracking.read(iova=BASE, size=ROOM)
    assert str(found) == "8 of 8 pages of 4 KiB are dirty: 0x100000-0x106fff, 0x10a000-0x10afff"


def test_a_look_that_does_not_clear_changes_nothing(rig: Rig, busy: BusyKernel, kind: Kind) -> None:
    """However often; the next one that clears has it all."""
    with DirtyTracking(rig.space) as tracking:
        write(busy, 2, 6)
        for clear in (False, False, True):
            assert {2, 6} <= set(dirty(tracking, clear=clear))
        assert dirty(tracking) == ([0, 1, 2, 3, 4, 5, 6, 10] if kind == "type1" else [])


def test_what_is_unmapped_says_at_the_last_moment_what_was_written(rig: Rig, busy: BusyKernel, kind: Kind) -> None:
    """And is out of reach then."""
    with DirtyTracking(rig.space) as tracking:
        write(busy, 1, 6, 10)
        found = tracking.unmap(iova=BASE, size=7 * PAGE_SIZE)
        assert (found.pages, found.page_size) == (7, PAGE_SIZE)
        assert spans(found) == ([(0, 7)] if kind == "type1" else [(1, 1), (6, 1)])
        assert dirty(tracking) == [10]
    assert [mapping.iova for mapping in rig.space.mappings] == [BASE + 10 * PAGE_SIZE]
    assert [mapping.iova for mapping in busy.mappings(BDF)] == [BASE + 10 * PAGE_SIZE]
    rig.space._check()


def test_a_mapping_that_is_cut_is_refused_before_the_kernel_is_asked(rig: Rig, busy: BusyKernel) -> None:
    """With the mapping."""
    with DirtyTracking(rig.space) as tracking:
        busy.clear_trace()
        for ask in (tracking.read, tracking.unmap):
            with pytest.raises(ValueError, match="cuts the mapping 0x100000-0x103fff"):
                ask(iova=BASE + PAGE_SIZE, size=4 * PAGE_SIZE)
        assert requests(busy.trace) == []


def test_tracking_ends_with_its_close(rig: Rig, busy: BusyKernel) -> None:
    """Once; what is asked then is an error, and a closed space is none."""
    tracking = DirtyTracking(rig.space)
    tracking.close()
    busy.clear_trace()
    tracking.close()
    assert requests(busy.trace) == []
    with pytest.raises(pyvfio.ClosedError):
        tracking.read(iova=BASE, size=PAGE_SIZE)
    write(busy, 0)  # the device has gone on meanwhile
    late = DirtyTracking(rig.space)
    rig.space.close()
    late.close()


def test_tracking_that_begins_anew_knows_nothing_of_before(rig: Rig, busy: BusyKernel, kind: Kind) -> None:
    """Whether it was looked at or not."""
    with DirtyTracking(rig.space) as tracking:
        write(busy, 1, 2)
        dirty(tracking, clear=False)
    write(busy, 3)
    with DirtyTracking(rig.space) as tracking:
        assert dirty(tracking) == ([0, 1, 2, 3, 4, 5, 6, 10] if kind == "type1" else [])


def test_a_failing_answer_is_an_error_with_its_errno(rig: Rig, busy: BusyKernel, kind: Kind) -> None:
    """And changes nothing: what was read before it is in the next answer."""
    with DirtyTracking(rig.space) as tracking:
        write(busy, 1, 10)
        busy.fail(call="ioctl", request=READS[kind], errno=errno.ENOMEM, nth=2)
        with pytest.raises(pyvfio.IoctlError) as raised:
            dirty(tracking)
        assert raised.value.errno == errno.ENOMEM
        assert {1, 10} <= set(dirty(tracking, clear=False))
        busy.fail(call="ioctl", request=UNMAPS[kind], errno=errno.EIO)
        with pytest.raises(pyvfio.IoctlError):
            tracking.unmap(iova=BASE, size=4 * PAGE_SIZE)
        assert len(rig.space.mappings) == 3
        assert {1, 10} <= set(dirty(tracking))


def test_an_answer_that_a_signal_handler_kept_from_the_caller_comes_again(rig: Rig, busy: BusyKernel) -> None:
    """The kernel has forgotten it."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with DirtyTracking(rig.space) as tracking:
            write(busy, 4)
            busy.before = dict.fromkeys(READS.values(), partial(signal.raise_signal, signal.SIGUSR1))
            if not isinstance(rig.space, pyvfio.Ioas):
                del busy.before[READS["iommufd"]]
            with pytest.raises(Interrupt):
                dirty(tracking)
            busy.before = {}
            assert 4 in dirty(tracking)
    finally:
        signal.signal(signal.SIGUSR1, before)


# ----------------------------------------------------------------------------------------------------------- of iommufd


def test_a_page_is_clean_until_it_is_written_again(precise: Rig, tracks: BusyKernel) -> None:
    with DirtyTracking(precise.space) as tracking:
        write(tracks, 0, 3)
        assert dirty(tracking) == [0, 3]
        assert dirty(tracking) == []
        write(tracks, 3)
        assert dirty(tracking) == [3]


def test_devices_move_to_tracked_page_tables_and_back(precise: Rig, tracks: BusyKernel) -> None:
    """They reach the same memory all along. What was made for it is gone then, or the space could not be destroyed."""
    reached = tracks.mappings(BDF)
    tracking = DirtyTracking(precise.space)
    assert tracks.mappings(BDF) == reached
    tracking.close()
    assert tracks.mappings(BDF) == reached
    tracks.clear_trace()
    precise.device.close()
    precise.space.close()
    assert requests(tracks.trace).count("IOMMU_DESTROY") == 1


def test_an_iommu_that_does_not_track_is_refused_before_anything_has_changed() -> None:
    """Of QEMU 7.2 none does. The memory is in reach as before."""
    with FakeKernel("7.3", iommufd=True) as kernel, tracked_rig_of(kernel) as rig:
        memory = fill(rig)
        kernel.clear_trace()
        with pytest.raises(pyvfio.UnsupportedError, match=rf"the IOMMU of .*{BDF} does not record the pages") as raised:
            DirtyTracking(rig.space)
        assert "type1" in str(raised.value)
        assert requests(kernel.trace) == ["IOMMU_GET_HW_INFO"]
        write(kernel, 0)
        rig.close()
        rig.free(memory, ROOM)


def tracked_rig_of(kernel: FakeKernel) -> Rig:
    """A rig on an Ioas of any kernel."""
    return Rig(kernel, space=pyvfio.Ioas(kernel=kernel))


def next_number(iommufd: pyvfio.Iommufd) -> int:
    """The number of the next object: the kernel's lowest that is free."""
    number = iommufd.ioas_alloc()
    iommufd.destroy(number)
    return number


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOTTY])
@pytest.mark.parametrize("request_name", ["IOMMU_GET_HW_INFO", "IOMMU_HWPT_ALLOC"])
def test_a_kernel_that_makes_no_such_page_table_is_refused(
    precise: Rig, tracks: BusyKernel, number: int, request_name: str
) -> None:
    """With nothing changed."""
    tracks.fail(call="ioctl", request=request_name, errno=number)
    with pytest.raises(pyvfio.UnsupportedError, match="does not record"):
        DirtyTracking(precise.space)
    assert "VFIO_DEVICE_ATTACH_IOMMUFD_PT" not in requests(tracks.trace)[-2:]
    with DirtyTracking(precise.space) as tracking:
        write(tracks, 0)
        assert dirty(tracking) == [0]


@pytest.mark.parametrize("request_name", ["IOMMU_GET_HW_INFO", "IOMMU_HWPT_ALLOC", "IOMMU_HWPT_SET_DIRTY_TRACKING"])
def test_another_error_of_a_page_table_keeps_its_errno(precise: Rig, tracks: BusyKernel, request_name: str) -> None:
    """It does not say that the IOMMU records nothing. Nothing has changed, and no page table is left."""
    space = ioas_of(precise)
    number = next_number(space.iommufd)
    tracks.fail(call="ioctl", request=request_name, errno=errno.ENOMEM)
    with pytest.raises(pyvfio.IoctlError, match=f"{request_name}.*ENOMEM"):
        DirtyTracking(space)
    assert not space.tracks
    assert "VFIO_DEVICE_ATTACH_IOMMUFD_PT" not in requests(tracks.trace)[-3:]
    assert next_number(space.iommufd) == number


@pytest.mark.parametrize("request_name", ["IOMMU_HWPT_SET_DIRTY_TRACKING", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"])
def test_a_device_that_cannot_enter_a_tracked_space_leaves_no_page_table(
    precise: Rig, tracks: BusyKernel, request_name: str
) -> None:
    """Whose IOMMU would need one of its own: the kernel refuses those that are there with EINVAL. The rest goes on."""
    space = ioas_of(precise)
    with DirtyTracking(space) as tracking:
        number = next_number(space.iommufd)
        tracks.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=errno.EINVAL)
        nth = 2 if request_name == "VFIO_DEVICE_ATTACH_IOMMUFD_PT" else 1
        tracks.fail(call="ioctl", request=request_name, errno=errno.ENOMEM, nth=nth)
        with pytest.raises(pyvfio.IoctlError, match="ENOMEM"):
            pyvfio.open_device(OTHER_BDF, space=space)
        assert tracks.planned_failures == ()
        assert next_number(space.iommufd) == number
        write(tracks, 1)
        assert dirty(tracking) == [1]


def test_all_devices_are_asked_before_one_is_moved(precise: Rig, tracks: BusyKernel) -> None:
    """The IOMMU of the second does not track."""
    with pyvfio.open_device(OTHER_BDF, space=ioas_of(precise)):
        tracks.clear_trace()
        tracks.fail(call="ioctl", request="IOMMU_GET_HW_INFO", errno=errno.EOPNOTSUPP, nth=2)
        with pytest.raises(pyvfio.UnsupportedError, match=OTHER_BDF):
            DirtyTracking(precise.space)
        assert requests(tracks.trace) == ["IOMMU_GET_HW_INFO"] * 2


def test_a_space_without_a_device_is_not_tracked(tracks: BusyKernel) -> None:
    with pyvfio.Ioas(kernel=tracks) as space, pytest.raises(pyvfio.VfioError, match="no device is attached"):
        DirtyTracking(space)


def test_what_each_of_several_devices_writes_is_dirty(precise: Rig, tracks: BusyKernel) -> None:
    """One that came before the tracking, and one that comes while it is on, and goes, and comes back."""
    space = ioas_of(precise)
    with pyvfio.open_device(OTHER_BDF, space=space), DirtyTracking(space) as tracking:
        write(tracks, 0)
        write(tracks, 1, bdf=OTHER_BDF)
        assert dirty(tracking) == [0, 1]
    with DirtyTracking(space) as tracking:
        with pyvfio.open_device(OTHER_BDF, space=space) as late:
            write(tracks, 2, bdf=OTHER_BDF)
            late.detach()
            assert dirty(tracking) == [2]
            late.attach(space)
            write(tracks, 3, bdf=OTHER_BDF)
        write(tracks, 4)
        assert dirty(tracking) == [3, 4]


def test_a_device_that_moves_away_leaves_what_it_wrote(precise: Rig, tracks: BusyKernel) -> None:
    space = ioas_of(precise)
    with pyvfio.open_device(OTHER_BDF, space=space) as other, DirtyTracking(space) as tracking:
        write(tracks, 2, bdf=OTHER_BDF)
        other.attach(pyvfio.Ioas(space.iommufd))
        assert dirty(tracking) == [2]


def test_a_device_whose_iommu_needs_a_page_table_of_its_own_gets_one(precise: Rig, tracks: BusyKernel) -> None:
    """The kernel refuses the first one's with EINVAL."""
    space = ioas_of(precise)
    with pyvfio.open_device(OTHER_BDF, space=space):
        tracks.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=errno.EINVAL, nth=2)
        with DirtyTracking(space) as tracking:
            assert requests(tracks.trace).count("IOMMU_HWPT_ALLOC") == 2
            write(tracks, 0, 1)
            write(tracks, 1, 2, bdf=OTHER_BDF)
            tracks.fail(call="ioctl", request="IOMMU_HWPT_GET_DIRTY_BITMAP", errno=errno.ENOMEM, nth=2)
            with pytest.raises(pyvfio.IoctlError):
                tracking.read(iova=BASE, size=7 * PAGE_SIZE)
            assert dirty(tracking) == [0, 1, 2]
            assert dirty(tracking) == []


@pytest.mark.parametrize("nth", [1, 2])
def test_a_start_that_fails_is_undone(precise: Rig, tracks: BusyKernel, nth: int) -> None:
    """At either device; and a later one works."""
    space = ioas_of(precise)
    with pyvfio.open_device(OTHER_BDF, space=space):
        tracks.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=errno.ENOMEM, nth=nth)
        with pytest.raises(pyvfio.IoctlError, match="ENOMEM"):
            DirtyTracking(space)
        write(tracks, 0)
        write(tracks, 0, bdf=OTHER_BDF)
        with DirtyTracking(space) as tracking:
            assert dirty(tracking) == []


@pytest.mark.parametrize("nth", [1, 2])
def test_an_end_that_fails_leaves_the_tracking_on(precise: Rig, tracks: BusyKernel, nth: int) -> None:
    """It can be closed again."""
    space = ioas_of(precise)
    with pyvfio.open_device(OTHER_BDF, space=space):
        tracking = DirtyTracking(space)
        tracks.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=errno.ENOMEM, nth=nth)
        with pytest.raises(pyvfio.IoctlError):
            tracking.close()
        write(tracks, 0)
        write(tracks, 1, bdf=OTHER_BDF)
        assert dirty(tracking) == [0, 1]
        tracking.close()


@pytest.mark.parametrize("ends", [False, True])
def test_a_device_that_cannot_move_back_to_its_page_table_is_told_with_both_reasons(
    precise: Rig, tracks: BusyKernel, *, ends: bool
) -> None:
    """At a start and at an end: of two devices, the second was refused, and then the first one's way back."""
    space = ioas_of(precise)
    with pyvfio.open_device(OTHER_BDF, space=space):
        change = DirtyTracking(space).close if ends else partial(DirtyTracking, space)
        for nth, number in ((2, errno.EFAULT), (3, errno.ENOMEM)):
            tracks.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=number, nth=nth)
        with pytest.raises(pyvfio.RollbackError, match=r"^a device could not be moved to another page table") as raised:
            change()
        told = [each.errno for each in raised.value.exceptions if isinstance(each, OSError)]
        assert told[:2] == [errno.EFAULT, errno.ENOMEM]
        assert space.tracks == ends


@pytest.mark.parametrize("cut", [None, "replace"])
def test_one_tracking_that_is_closed_ends_the_other(tracks: BusyKernel, cut: Literal["replace"] | None) -> None:
    """Which is told so, and has unmapped nothing."""
    with tracked_rig(tracks, "iommufd", cut=cut) as rig:
        memory = fill(rig)
        with DirtyTracking(rig.space) as other:
            DirtyTracking(rig.space).close()
            for ask in (other.read, other.unmap):
                with pytest.raises(pyvfio.VfioError, match=r"not recorded.*open a new one"):
                    ask(iova=BASE, size=ROOM)
        assert len(rig.space.mappings) == 3
        rig.close()
        rig.free(memory, ROOM)


def test_a_range_that_is_kept_is_reported_once_and_as_it_is(precise: Rig) -> None:
    """By a look or by an unmap. Behind an unmap, the pages that are mapped there are others."""
    space = ioas_of(precise)
    kept = pyvfio.IovaRange(pyvfio.Iova(BASE + PAGE_SIZE), pyvfio.Iova(BASE + 2 * PAGE_SIZE - 1))
    with DirtyTracking(space):
        for ask in (space.dirty_ranges, space.unmap_dirty):
            space.keep_dirty([kept])
            assert space.dirty_ranges(iova=BASE, size=4 * PAGE_SIZE, clear=False) == (kept,)
            assert ask(iova=BASE, size=4 * PAGE_SIZE) == (kept,)
            if ask == space.unmap_dirty:
                vaddr = space.mappings[0].vaddr - 4 * PAGE_SIZE
                space.map(vaddr=vaddr, iova=BASE, size=4 * PAGE_SIZE)
            assert space.dirty_ranges(iova=BASE, size=4 * PAGE_SIZE) == ()


def test_arguments_of_a_look_are_checked_before_any_call(rig: Rig, busy: BusyKernel) -> None:
    """A range without mappings has no dirty pages."""
    with DirtyTracking(rig.space):
        busy.clear_trace()
        with pytest.raises(TypeError, match="clear"):
            rig.space.dirty_ranges(iova=BASE, size=PAGE_SIZE, clear=1)  # type: ignore[arg-type]
        for ask in (rig.space.dirty_ranges, rig.space.unmap_dirty):
            with pytest.raises(TypeError, match="iova"):
                ask(iova="1", size=PAGE_SIZE)  # type: ignore[arg-type]
            with pytest.raises(TypeError, match="size"):
                ask(iova=BASE, size=1.0)  # type: ignore[arg-type]
            assert ask(iova=BASE + 8 * PAGE_SIZE, size=PAGE_SIZE) == ask(iova=BASE, size=0) == ()
        assert not busy.trace
    rig.close()
    for ask in (rig.space.dirty_ranges, rig.space.unmap_dirty):
        with pytest.raises(pyvfio.ClosedError):
            ask(iova=BASE, size=PAGE_SIZE)


def test_what_is_mapped_again_at_its_place_is_dirty(precise: Rig, tracks: BusyKernel) -> None:
    """The record went with the mapping, and nobody had looked."""
    memory = precise.memory(3 * PAGE_SIZE)
    with DirtyTracking(precise.space) as tracking:
        write(tracks, 5)
        precise.space.unmap(iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE)
        assert dirty(tracking) == []
        precise.space.map(vaddr=memory, iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE)
        assert dirty(tracking) == [4, 5, 6]
        assert dirty(tracking) == []
        precise.space.unmap(iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE)
        precise.space.map(vaddr=memory, iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE)
    with DirtyTracking(precise.space) as tracking:  # which begins after that
        assert dirty(tracking) == []
    precise.space.unmap(iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE)
    precise.free(memory, 3 * PAGE_SIZE)


@pytest.mark.parametrize("cut", ["pages", "replace"])
def test_a_cut_leaves_the_record_of_the_rest(tracks: BusyKernel, cut: str) -> None:
    """Also of what is written while devices move to a copy of the space."""
    with tracked_rig(tracks, "iommufd", cut=cut) as rig:  # type: ignore[arg-type]
        memory = fill(rig)
        with DirtyTracking(rig.space) as tracking:
            write(tracks, 0, 1)
            tracks.before = {"VFIO_DEVICE_ATTACH_IOMMUFD_PT": partial(write, tracks, 3)}
            with rig.space.guard.lock:
                rig.space.cut_locked(BASE + PAGE_SIZE, PAGE_SIZE)
            tracks.before = {}
            write(tracks, 5)
            assert dirty(tracking) == ([0, 3, 5] if cut == "replace" else [0, 5])
            write(tracks, 3)
            assert dirty(tracking) == [3]
        rig.space._check()
        rig.close()
        rig.free(memory, ROOM)


@pytest.mark.parametrize("resize", ["cut", "extend", "remap"])
@pytest.mark.parametrize("cut", ["pages", "replace"])
def test_parts_of_a_block_that_left_and_came_back_are_dirty(
    tracks: BusyKernel, cut: Literal["pages", "replace"], resize: Literal["cut", "extend", "remap"]
) -> None:
    """They hold zeros, and not what a reader of the pages has copied: whichever way the mapping follows the block."""

    def mapper(space: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
        return pyvfio.DmaMapper(space, blocks, resize=resize)

    with tracked_rig(tracks, "iommufd", cut=cut, mapper=mapper) as rig:
        block = rig.blocks.add("ring", used_length=8 * PAGE_SIZE, max_length=MIB)
        iova = rig.mapper.iova(block)
        with DirtyTracking(rig.space) as tracking:
            assert tracking.read(iova=iova, size=8 * PAGE_SIZE).count == 0
            block.resize(6 * PAGE_SIZE)
            block.resize(8 * PAGE_SIZE)
            block.discard(2 * PAGE_SIZE, PAGE_SIZE)
            block.populate(2 * PAGE_SIZE, PAGE_SIZE)
            found = {
                page
                for span in tracking.read(iova=iova, size=8 * PAGE_SIZE).dirty
                for page in range((span.start - iova) // PAGE_SIZE, (span.last + 1 - iova) // PAGE_SIZE)
            }
            assert found >= {2, 6, 7}
            assert resize != "cut" or found == {2, 6, 7}
            assert tracking.read(iova=iova, size=8 * PAGE_SIZE).count == 0
        rig.close()


def test_a_space_that_is_replaced_misses_no_write_up_to_an_unmap(tracks: BusyKernel) -> None:
    """The last look comes when nothing reaches the old space any more. What is not unmapped keeps its record."""
    with tracked_rig(tracks, "iommufd", cut="replace") as rig:
        memory = fill(rig)
        with DirtyTracking(rig.space) as tracking:
            write(tracks, 0, 4)
            tracks.before = {"VFIO_DEVICE_ATTACH_IOMMUFD_PT": partial(write, tracks, 2, 10)}
            assert spans(tracking.unmap(iova=BASE, size=7 * PAGE_SIZE)) == [(0, 1), (2, 1), (4, 1)]
            tracks.before = {}
            assert dirty(tracking) == [10]
            assert [mapping.iova for mapping in rig.space.mappings] == [BASE + 10 * PAGE_SIZE]
            assert [mapping.iova for mapping in tracks.mappings(BDF)] == [BASE + 10 * PAGE_SIZE]
        rig.close()
        rig.free(memory, ROOM)


def test_an_unmap_that_replaces_the_space_leaves_what_lies_below_and_above_in_reach(tracks: BusyKernel) -> None:
    """The table and the device agree about what is left."""
    with tracked_rig(tracks, "iommufd", cut="replace") as rig:
        memory = fill(rig)
        with DirtyTracking(rig.space) as tracking:
            tracking.unmap(iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE)
            left = [(BASE, 4 * PAGE_SIZE), (BASE + 10 * PAGE_SIZE, PAGE_SIZE)]
            assert [(mapping.iova, mapping.size) for mapping in rig.space.mappings] == left
            assert [(mapping.iova, mapping.size) for mapping in tracks.mappings(BDF)] == left
        rig.close()
        rig.free(memory, ROOM)


def test_a_record_that_cannot_be_read_at_a_cut_is_all_dirty(tracks: BusyKernel) -> None:
    with tracked_rig(tracks, "iommufd", cut="replace") as rig:
        memory = fill(rig)
        with DirtyTracking(rig.space) as tracking, rig.space.guard.lock:
            tracks.fail(call="ioctl", request="IOMMU_HWPT_GET_DIRTY_BITMAP", errno=errno.ENOMEM)
            rig.space.cut_locked(BASE + PAGE_SIZE, PAGE_SIZE)
            assert dirty(tracking) == [0, 2, 3, 4, 5, 6]
        rig.close()
        rig.free(memory, ROOM)


def test_a_replacement_that_fails_keeps_the_tracking(tracks: BusyKernel) -> None:
    with tracked_rig(tracks, "iommufd", cut="replace") as rig:
        memory = fill(rig)
        with pyvfio.open_device(OTHER_BDF, space=ioas_of(rig)), DirtyTracking(rig.space) as tracking:
            write(tracks, 0)
            tracks.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=errno.ENOMEM, nth=2)
            with pytest.raises(pyvfio.IoctlError):
                tracking.unmap(iova=BASE, size=7 * PAGE_SIZE)
            write(tracks, 5)
            write(tracks, 6, bdf=OTHER_BDF)
            assert dirty(tracking) == [0, 5, 6]
        rig.close()
        rig.free(memory, ROOM)


def test_a_device_that_was_bound_elsewhere_is_not_tracked(precise: Rig, tracks: BusyKernel) -> None:
    """Its number in the iommufd is not known."""
    precise.device.attachment.dev_id = None  # type: ignore[misc]
    with pytest.raises(pyvfio.UnsupportedError, match="bound elsewhere"):
        DirtyTracking(precise.space)
    write(tracks, 0)


# ------------------------------------------------------------------------------------------------------------- of type1


def test_an_old_type1_does_not_track(kernel: SpecialKernel) -> None:
    """The kernel's EACCES, or no capability: an error in any case."""
    refused = pytest.raises((pyvfio.IoctlError, pyvfio.UnsupportedError))
    with Rig(kernel, iommu_type=ioctls.VFIO_TYPE1_IOMMU) as rig, refused:
        DirtyTracking(rig.container)


class ForgetfulKernel(SpecialKernel):
    """Whose IOMMU says nothing of dirty pages, as before 5.8."""

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """As the fake's, but that the capability is one that nobody knows."""
        result = super().ioctl(fd, request, argument)
        if self.trace[-1].request == "VFIO_IOMMU_GET_INFO" and isinstance(argument, bytearray):
            (offset,) = struct.unpack_from("=I", argument, 16)
            while offset:
                identity, _version, following = struct.unpack_from("=HHI", argument, offset)
                if identity == ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION:
                    struct.pack_into("=H", argument, offset, 0x7FFF)
                offset = following
        return result


def test_an_iommu_that_does_not_track_is_told_apart_before_any_call() -> None:
    """By its capabilities, with the kernel that has it."""
    with ForgetfulKernel() as kernel, Rig(kernel) as rig:
        kernel.clear_trace()
        with pytest.raises(pyvfio.UnsupportedError, match=r"does not track.*from Linux 5\.8 on"):
            DirtyTracking(rig.container)
        assert not kernel.trace


OCTETS = st.lists(st.sampled_from([0, 0, 0xFF, 0xFF, 1, 0x0A, 0x80, 0x5A, 0xFE, 0x7F]), min_size=1, max_size=24)


@pytest.mark.long
@given(OCTETS, st.data())
def test_pages_are_found_as_their_bits_are_set(octets: list[int], data: st.DataObject) -> None:
    """Neighbours in one run, and what the kernel has left behind the last page is none."""
    pages = data.draw(st.integers(1, 8 * len(octets)))
    found = list(_runs(bytes(octets), pages))
    dirty = [page for page in range(pages) if octets[page // 8] >> page % 8 & 1]
    assert [page for first, end in found for page in range(first, end)] == dirty
    assert all(one[1] < other[0] for one, other in pairwise(found))


def test_a_mapping_that_is_dirty_as_a_whole_takes_no_more_than_a_page(kernel: SpecialKernel) -> None:
    """The usual answer of type1: all bits. As many functions are called for 4,096 pages as for one."""
    count = 4096
    with Rig(kernel) as rig, DirtyTracking(rig.space) as tracking:
        kernel.privileged = True
        memory = rig.memory(count * PAGE_SIZE)
        calls = []
        for pages in (1, count):
            rig.space.map(vaddr=memory, iova=BASE, size=pages * PAGE_SIZE)
            calls.append(called(partial(tracking.read, iova=BASE, size=count * PAGE_SIZE)))
            assert tracking.read(iova=BASE, size=count * PAGE_SIZE).count == pages
            rig.space.unmap(iova=BASE, size=pages * PAGE_SIZE)
        assert calls[0] == calls[1]
        rig.free(memory, count * PAGE_SIZE)
