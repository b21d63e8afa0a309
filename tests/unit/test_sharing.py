"""Spaces of one iommufd that share the pages of what both have mapped: one list of blocks for several devices."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import pyvfio
from pyvfio.memory import Memfd
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, nothing_left


@dataclass
class Two:
    """Two devices, each in a space of its own, and two mappers that follow one list."""

    kernel: FakeKernel
    blocks: pyvfio.RamBlockList
    mappers: tuple[pyvfio.DmaMapper, pyvfio.DmaMapper]
    spaces: tuple[pyvfio.Ioas, pyvfio.Ioas]

    def reach(self, block: pyvfio.RamBlock) -> list[list[int]]:
        """The pages of the block that each device reaches, by number."""
        found = []
        for mapper, bdf in zip(self.mappers, (BDF, OTHER_BDF), strict=True):
            iova = mapper.iova(block)
            pages = [
                (start - iova) // PAGE_SIZE
                for mapping in self.kernel.mappings(bdf)
                for start in range(mapping.iova, mapping.iova + mapping.size, PAGE_SIZE)
            ]
            found.append(sorted(page for page in pages if 0 <= page < block.max_length // PAGE_SIZE))
        return found

    def calls(self, name: str) -> int:
        """How often an ioctl was made."""
        return [call.request for call in self.kernel.trace].count(name)


@pytest.fixture(params=[("6.12", "remap"), ("7.3", "extend"), ("7.3", "cut")], ids=" ".join)
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    """Nothing is left of them in the end."""
    version, resize = request.param
    with FakeKernel(version, iommufd=True) as kernel, nothing_left(kernel):
        kernel.memlock_limit = GIB
        first = pyvfio.Ioas(kernel=kernel, cut="pages")
        second = pyvfio.Ioas(shares_with=first, cut="pages")
        pyvfio.open_device(BDF, space=first)
        pyvfio.open_device(OTHER_BDF, space=second)
        with pyvfio.RamBlockList(kernel=kernel) as blocks:
            one = pyvfio.DmaMapper(first, blocks, resize=resize)
            other = pyvfio.DmaMapper(second, blocks, resize=resize)
            yield Two(kernel, blocks, (one, other), (first, second))
            one._check()
            other._check()
            one.close()
            other.close()
        second.close()
        first.close()


@pytest.mark.parametrize("memory", [None, Memfd()], ids=["anonymous", "memfd"])
def test_both_devices_reach_a_block_that_is_charged_once(two: Two, memory: Memfd | None) -> None:
    """However it grows and shrinks: what the second space maps is a copy of what the first has."""
    block = two.blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, memory=memory)
    for pages in (4, 9, 2, 0, 7, 7, 1, 16):
        block.resize(pages * PAGE_SIZE)
        assert two.reach(block) == [list(range(pages))] * 2
        assert two.kernel.charged_to_user == pages * PAGE_SIZE
    assert two.calls("IOMMU_IOAS_COPY")


def test_a_part_that_is_discarded_leaves_both_and_comes_back_to_both(two: Two) -> None:
    """With the pages that are there then, and not with those of before."""
    block = two.blocks.add("ring", used_length=8 * PAGE_SIZE, max_length=MIB)
    block.discard(2 * PAGE_SIZE, 3 * PAGE_SIZE)
    kept = [0, 1, 5, 6, 7]
    assert two.reach(block) == [kept] * 2
    block.populate(2 * PAGE_SIZE, 3 * PAGE_SIZE)
    with block.view(0, 8 * PAGE_SIZE) as view:
        view[3 * PAGE_SIZE : 3 * PAGE_SIZE + 4] = b"page"
    for mapper, bdf, space in zip(two.mappers, (BDF, OTHER_BDF), two.spaces, strict=True):
        (device,) = space.devices
        assert isinstance(device, pyvfio.Device)
        device.bus_master = True
        assert two.kernel.dma_read(bdf, mapper.iova(block) + 3 * PAGE_SIZE, 4) == b"page"


def test_a_copy_that_is_refused_changes_nothing_in_either(two: Two) -> None:
    """Neither the block nor what the devices reach."""
    block = two.blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB)
    two.kernel.fail(call="ioctl", request="IOMMU_IOAS_COPY", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.IoctlError):
        block.resize(6 * PAGE_SIZE)
    assert (block.used_length, two.reach(block)) == (4 * PAGE_SIZE, [list(range(4))] * 2)


def test_memory_with_less_access_is_not_copied_to_one_with_more(two: Two) -> None:
    """It is mapped anew: the kernel would refuse to write through a copy of what is read only."""
    memory = two.kernel.mmap(0, 2 * PAGE_SIZE, READ_WRITE, PRIVATE)
    first, second = two.spaces
    two.kernel.clear_trace()
    first.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE, write=False)
    second.map(vaddr=memory, iova=GIB, size=2 * PAGE_SIZE)
    assert (two.calls("IOMMU_IOAS_COPY"), two.calls("IOMMU_IOAS_MAP")) == (0, 2)
    first.unmap(iova=MIB, size=2 * PAGE_SIZE)
    first.map(vaddr=memory, iova=MIB, size=PAGE_SIZE, write=False)
    assert two.calls("IOMMU_IOAS_COPY") == 1
    for space in two.spaces:
        space.unmap_all()
    two.kernel.munmap(memory, 2 * PAGE_SIZE)


def test_what_is_no_longer_mapped_is_not_copied(two: Two) -> None:
    """A space that has mapped a thousand buffers and unmapped them keeps no account of them."""
    memory = two.kernel.mmap(0, 1000 * PAGE_SIZE, READ_WRITE, PRIVATE)
    first, second = two.spaces
    for number in range(1000):
        first.map(vaddr=memory + number * PAGE_SIZE, iova=GIB, size=PAGE_SIZE)
        first.unmap(iova=GIB, size=PAGE_SIZE)
    two.kernel.clear_trace()
    second.map(vaddr=memory + 999 * PAGE_SIZE, iova=GIB, size=PAGE_SIZE)
    assert two.calls("IOMMU_IOAS_COPY") == 0
    assert first._sharing is not None
    assert sum(map(len, first._sharing._places.values())) < 100
    second.unmap_all()
    two.kernel.munmap(memory, 1000 * PAGE_SIZE)


def test_the_entries_of_mappings_that_are_gone_are_never_the_larger_half_but_for_64() -> None:
    """Of 100 that stay, and of 300 that come and go, each at another address."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel), pyvfio.Ioas(kernel=kernel) as space:
        pyvfio.open_device(BDF, space=space)
        memory = kernel.mmap(0, 400 * PAGE_SIZE, READ_WRITE, PRIVATE)
        with pyvfio.Ioas(shares_with=space):
            assert space._sharing is not None
            most = 0
            for page in range(400):
                space.map(vaddr=memory + page * PAGE_SIZE, iova=MIB + page * PAGE_SIZE, size=PAGE_SIZE)
                if page >= 100:
                    most = max(most, len(space._sharing._places[space]))
                    space.unmap(iova=MIB + page * PAGE_SIZE, size=PAGE_SIZE)
            assert most == 2 * 101 + 64
        space.unmap_all()
        kernel.munmap(memory, 400 * PAGE_SIZE)


def test_a_space_that_is_closed_is_forgotten_by_those_that_share_with_it() -> None:
    """A program that makes and closes spaces again and again keeps none of them."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel), pyvfio.Ioas(kernel=kernel) as space:
        for _ in range(3):
            with pyvfio.Ioas(shares_with=space) as other:
                assert space._sharing is not None
                assert set(space._sharing._places) == {space, other}
            assert set(space._sharing._places) == {space}


def test_a_space_of_another_iommufd_cannot_share() -> None:
    """Pages can only be copied within one."""
    with (
        FakeKernel("7.3", iommufd=True) as kernel,
        nothing_left(kernel),
        pyvfio.Ioas(kernel=kernel) as one,
        pyvfio.Iommufd(kernel=kernel) as other,
    ):
        with pytest.raises(ValueError, match="same iommufd"):
            pyvfio.Ioas(other, shares_with=one)
        with pytest.raises(TypeError, match="must be an Ioas"):
            pyvfio.Ioas(other, shares_with=other)  # type: ignore[arg-type]


def test_a_space_that_is_closed_cannot_share() -> None:
    """It has no pages to share, and nobody would ever remove it from those that share."""
    with FakeKernel("7.3", iommufd=True) as kernel, pyvfio.Iommufd(kernel=kernel) as iommufd:
        closed = pyvfio.Ioas(iommufd)
        closed.close()
        kernel.clear_trace()
        with pytest.raises(pyvfio.ClosedError):
            pyvfio.Ioas(shares_with=closed)
        assert (kernel.trace, iommufd.spaces) == ([], [])


def test_pages_of_a_file_are_touched_before_devices_reach_them() -> None:
    """fallocate leaves them as they are, and the first touch zeroes them: behind a map, with the data of the device."""
    with (
        FakeKernel("7.3", iommufd=True) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as device,
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pyvfio.DmaMapper(device.space, blocks, resize="extend"),
    ):
        kernel.clear_trace()
        block = blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=Memfd())
        block.resize(5 * PAGE_SIZE)
        calls = [(call.call, call.request) for call in kernel.trace if not call.errno]
        maps = [number for number, call in enumerate(calls) if call[1] == "IOMMU_IOAS_MAP_FILE"]
        assert len(maps) == 2
        assert [calls[number - 1][0] for number in maps] == ["madvise", "madvise"]
