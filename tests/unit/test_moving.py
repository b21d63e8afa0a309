"""Devices that cannot move: behind an IOMMU that completes a page table only by an attach, and behind any other one.

The kernel says EADDRINUSE for both, and for a move to an empty space it says nothing at all.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

import pyvfio
from pyvfio.device.cdev import CdevAttachment
from pyvfio.iommu.space import Mapping
from pyvfio.testing.fake import FakeKernel, Mapped
from pyvfio.units import GIB, MIB, PAGE_SIZE, Iova, Vaddr
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, nothing_left, requests

MSI = 0xFEE0_0000
ADVICE = r"cannot move to .*the IOMMU completes a page table when .*Ioas\(cut='pages'\).*detach\(\) the device before"
_ATTACH, _DETACH = "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "VFIO_DEVICE_DETACH_IOMMUFD_PT"


@pytest.fixture
def late() -> Iterator[FakeKernel]:
    """A machine that moves no device."""
    with FakeKernel("6.12", iommu="virtio", iommufd=True) as kernel, nothing_left(kernel):
        yield kernel


@pytest.fixture
def able() -> Iterator[FakeKernel]:
    """A machine that moves devices."""
    with FakeKernel("6.12", iommufd=True) as kernel, nothing_left(kernel):
        yield kernel


@contextmanager
def mapped(kernel: FakeKernel, *spaces: pyvfio.Ioas, iova: int = MIB) -> Iterator[int]:
    """A page, at one IOVA of all `spaces`, which may have no device."""
    page = kernel.mmap(0, PAGE_SIZE, READ_WRITE, PRIVATE)
    for space in spaces:
        space.iommufd.ioas_map(space.id, vaddr=page, size=PAGE_SIZE, iova=iova)
        space.adopt(Mapping(Iova(iova), PAGE_SIZE, Vaddr(page)), write=True)
    yield page
    for space in spaces:
        space.unmap_all()
    kernel.munmap(page, PAGE_SIZE)


def places(mappings: Iterable[Mapping | Mapped]) -> list[tuple[int, int]]:
    """Where something is mapped: IOVA and size."""
    return [(each.iova, each.size) for each in mappings]


def next_number(iommufd: pyvfio.Iommufd) -> int:
    """The number that the next object gets: the same as before if no object was left behind."""
    number = iommufd.ioas_alloc()
    iommufd.destroy(number)
    return number


@pytest.mark.parametrize("others", [0, 1])
def test_a_cut_by_replacing_is_refused_with_block_and_space_as_before(late: FakeKernel, others: int) -> None:
    """By a resize and by a discard, with one device and with two. Changes that cut no mapping are made."""
    with (
        pyvfio.Ioas(kernel=late, cut="replace") as space,
        pyvfio.open_device(BDF, space=space) as device,
        pyvfio.RamBlockList(kernel=late) as blocks,
        pyvfio.DmaMapper(space, blocks, resize="cut") as mapper,
    ):
        for _ in range(others):
            pyvfio.open_device(OTHER_BDF, space=space)
        device.bus_master = True
        block = blocks.add("ring", used_length=4 * MIB, max_length=GIB)
        last, number = mapper.iova(block) + 4 * MIB - 4, next_number(space.iommufd)
        before = (space.id, space.mappings, space.iova_ranges, block.used_length, tuple(block.populated))
        for change in (partial(block.resize, MIB), partial(block.discard, MIB, MIB)):
            late.clear_trace()
            with pytest.raises(pyvfio.UnsupportedError, match=ADVICE) as raised:
                change()
            copy = f"a copy of {space.guard.what} without the part to unmap"
            assert raised.value.message.startswith(f"{device.guard.what} cannot move to {copy}: the IOMMU")
            assert (space.id, space.mappings, space.iova_ranges, block.used_length, tuple(block.populated)) == before
            assert places(late.mappings(BDF)) == places(before[1])
            assert next_number(space.iommufd) == number
            assert _DETACH not in requests(late.trace)
            late.dma_write(BDF, last, b"last")
            mapper._check()
        block.resize(5 * MIB)
        block.resize(4 * MIB)
        block.resize(0)
        assert places(space.mappings) == places(late.mappings(BDF)) == []
        block.resize(MIB)
        late.dma_write(BDF, mapper.iova(block) + MIB - 4, b"last")


def test_a_cut_of_whole_mappings_is_an_unmap(late: FakeKernel) -> None:
    """Also of all that there is: a copy without mappings would be a space in which nothing can be mapped."""
    with pyvfio.Ioas(kernel=late, cut="replace") as space, pyvfio.open_device(BDF, space=space):
        memory = late.mmap(0, 2 * PAGE_SIZE, READ_WRITE, PRIVATE)
        for _ in range(2):
            for offset in (0, PAGE_SIZE):
                space.map(vaddr=memory + offset, iova=MIB + offset, size=PAGE_SIZE)
            late.clear_trace()
            with space.guard.lock:
                space.cut_locked(MIB, 2 * PAGE_SIZE)
            assert requests(late.trace) == ["IOMMU_IOAS_UNMAP"]
            assert places(space.mappings) == places(late.mappings(BDF)) == []
        late.munmap(memory, 2 * PAGE_SIZE)


def test_a_device_that_cannot_move_stays_and_moves_when_it_is_detached_first(late: FakeKernel) -> None:
    """To a space with mappings, and to one without, in which nothing could be mapped then."""
    with (
        pyvfio.open_device(BDF, iommu="iommufd", kernel=late) as device,
        pyvfio.Ioas(_iommufd(device)) as full,
        pyvfio.Ioas(_iommufd(device)) as empty,
    ):
        home = device.space
        assert isinstance(home, pyvfio.Ioas)
        device.bus_master = True
        with mapped(late, home, full) as page:
            number = next_number(home.iommufd)
            for away in (full, empty):
                late.clear_trace()
                with pytest.raises(pyvfio.UnsupportedError, match=ADVICE) as raised:
                    device.attach(away)
                names = f"{device.guard.what} cannot move to {away.guard.what}"
                assert raised.value.message.startswith(f"{names}: the IOMMU")
                assert (device.space, home.devices, away.devices) == (home, [device], [])
                assert _DETACH not in requests(late.trace)
                assert next_number(home.iommufd) == number
                late.dma_write(BDF, MIB, b"here")
                assert home.iova_ranges[0].size > MIB
            for away in (full, empty):
                device.detach()
                device.attach(away)
                assert len(late.mappings(BDF)) == len(away.mappings)
            empty.map(vaddr=page, iova=MIB, size=PAGE_SIZE)
            late.dma_write(BDF, MIB, b"away")
            device.detach()
            empty.unmap_all()


def test_a_device_moves_to_a_space_that_has_a_complete_page_table(late: FakeKernel) -> None:
    """That of another device. No question is asked then."""
    with (
        pyvfio.open_device(BDF, iommu="iommufd", kernel=late) as device,
        pyvfio.Ioas(_iommufd(device)) as away,
        pyvfio.open_device(OTHER_BDF, space=away),
    ):
        late.clear_trace()
        device.attach(away)
        assert requests(late.trace) == [_ATTACH, "IOMMU_IOAS_IOVA_RANGES"]
        assert sorted(each.bdf for each in away.devices if isinstance(each, pyvfio.Device)) == [BDF, OTHER_BDF]


@pytest.mark.parametrize("known", [True, False])
def test_a_mapping_where_the_device_needs_iova_is_named(able: FakeKernel, known: bool) -> None:  # noqa: FBT001
    """The IOMMU is not the reason, and so is not blamed."""
    with pyvfio.open_device(BDF, iommu="iommufd", kernel=able) as device, pyvfio.Ioas(_iommufd(device)) as away:
        home = device.space
        with mapped(able, away), mapped(able, away, iova=MSI):
            if not known:
                away.table.clear()
            with pytest.raises(pyvfio.IoctlError) as raised:
                device.attach(away)
            said = str(raised.value)
            assert ("IOVA 0xfee00000-0xfee00fff lies in IOVA that" in said) == known
            assert ("a mapping that this process does not know" in said) != known
            assert "virtio" not in said
            assert raised.value.errno == errno.EADDRINUSE
            assert f"{device.guard.what} cannot move to {away.guard.what}: " in raised.value.message
            assert raised.value.hint.startswith("Unmap that memory" if known else "The allowed ranges")
            assert device.space is home
            if not known:  # so that the end unmaps it
                away.adopt(Mapping(Iova(MIB), PAGE_SIZE, Vaddr(0)), write=True)


@pytest.mark.parametrize("attached", [True, False])
def test_where_the_reason_cannot_be_known_both_are_named_and_one_that_cannot_be_is_not(
    able: FakeKernel,
    attached: bool,  # noqa: FBT001
) -> None:
    """A descriptor that was bound elsewhere has no number for the question. A device that is not attached is refused
    for a mapping alone."""
    with pyvfio.open_device(BDF, iommu="iommufd", kernel=able) as device, pyvfio.Ioas(_iommufd(device)) as away:
        assert isinstance(device.attachment, CdevAttachment)
        device.attachment.dev_id = None
        with mapped(able, away, iova=MSI):
            away.table.clear()
            if not attached:
                device.detach()
            with pytest.raises(pyvfio.IoctlError, match="MSI window") as raised:
                device.attach(away)
            assert ("virtio-iommu before Linux 7" in raised.value.hint) == attached
            assert (f"{device.guard.what} cannot move to {away.guard.what}" in raised.value.message) == attached
            assert ("unmap that memory" if attached else "unmap that mapping first") in raised.value.hint
            assert attached or f"A mapping of {away.guard.what} lies in IOVA" in raised.value.hint


def _iommufd(device: pyvfio.Device) -> pyvfio.Iommufd:
    assert device.iommufd is not None
    return device.iommufd
