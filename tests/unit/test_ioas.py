"""An I/O address space of iommufd as an object: its arguments, and the devices that come and go."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest

import pyvfio
from pyvfio.testing import DmaFault, FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE, U64_MAX
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, nothing_left, requests


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"iommufd": 3}, TypeError, "iommufd must be an Iommufd, not int"),
        ({"iommufd": "space"}, TypeError, "iommufd must be an Iommufd, not Ioas"),
        ({"cut": "scissors"}, ValueError, "cut must be None, 'pages' or 'replace', not 'scissors'"),
        ({"cut": ""}, ValueError, "cut must be"),
        ({"dma_bits": 16}, ValueError, "dma_bits must be 17 to 64"),
        ({"dma_bits": "39"}, TypeError, "dma_bits"),
        ({"iommufd": "iommufd", "kernel": "other"}, ValueError, "the iommufd has another kernel: leave kernel= out"),
        ({"shares_with": "space", "kernel": "other"}, ValueError, "the iommufd has another kernel: leave kernel= out"),
    ],
)
def test_arguments_that_can_never_be_right_are_refused_before_any_call(
    arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Nothing is opened, and nothing is left."""
    with (
        FakeKernel("7.3", iommufd=True) as kernel,
        FakeKernel("7.3", iommufd=True) as other,
        nothing_left(kernel),
        pyvfio.Ioas(kernel=kernel) as space,
    ):
        things = {"space": space, "iommufd": space.iommufd, "other": other}
        given: dict[str, Any] = {name: things.get(value, value) for name, value in arguments.items()}
        kernel.clear_trace()
        with pytest.raises(error, match=said):
            pyvfio.Ioas(**{"kernel": kernel, **given})
        assert (kernel.trace, other.trace, space.iommufd.spaces) == ([], [], [space])


def test_the_kernel_of_an_iommufd_can_be_named_again() -> None:
    """It is that of the space in any case."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel), pyvfio.Iommufd(kernel=kernel) as iommufd:
        with pyvfio.Ioas(iommufd, kernel=kernel) as space:
            assert (space.iommufd, space.kernel) == (iommufd, kernel)
        assert not iommufd.closed


def test_a_space_of_a_number_leaves_the_iommufd_open_and_one_that_opened_the_iommufd_does_not() -> None:
    """Whoever passed an iommufd closes the iommufd."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel):
        with pyvfio.Iommufd(kernel=kernel) as iommufd:
            for space in (pyvfio.Ioas.from_id(iommufd, iommufd.ioas_alloc()), pyvfio.Ioas(iommufd)):
                space.close()
                assert (space.closed, iommufd.closed) == (True, False)
        own = pyvfio.Ioas(kernel=kernel)
        own.close()
        assert own.iommufd.closed


def test_without_a_device_the_ranges_are_not_known_unless_iova_is_reserved_in_them() -> None:
    """The next device has other ranges. What is reserved must lie in those, too."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel), pyvfio.Ioas(kernel=kernel) as space:
        assert not list(space.iova_ranges)
        for reserved in (False, True):
            with pyvfio.open_device(BDF, space=space), pyvfio.open_device(OTHER_BDF, space=space) as last:
                ranges = space.iova_ranges
                assert ranges[0].start == 0
                if reserved:
                    space.reserve_iova_at(MIB, PAGE_SIZE)
                last.detach()
                assert (space.takes_mappings, space.iova_ranges) == (True, ranges)
            assert (space.takes_mappings, space.iova_ranges) == (False, ranges if reserved else ())
        space.release_iova(MIB)


# ------------------------------------------------------------------------------------------------ copies


class Pair(NamedTuple):
    """Two spaces of one iommufd, each with a device, and the address of 8 pages."""

    kernel: FakeKernel
    source: pyvfio.Ioas
    target: pyvfio.Ioas
    memory: int

    def reach(self, bdf: str) -> list[tuple[int, int, int]]:
        """What the device reaches: IOVA, size, page of the memory."""
        return [(each.iova, each.size, (each.vaddr - self.memory) // PAGE_SIZE) for each in self.kernel.mappings(bdf)]

    def table(self) -> list[tuple[int, int, int]]:
        """What the target has in its table."""
        return [(each.iova, each.size, (each.vaddr - self.memory) // PAGE_SIZE) for each in self.target.mappings]


@pytest.fixture(params=["6.12", "7.3"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The source maps page 3, then pages 0 and 1, and behind a gap page 5."""
    with FakeKernel(request.param, iommufd=True) as kernel, nothing_left(kernel):
        memory = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, PRIVATE)
        with pyvfio.Ioas(kernel=kernel) as source, pyvfio.Ioas(source.iommufd, cut="replace") as target:
            for bdf, space in ((BDF, source), (OTHER_BDF, target)):
                pyvfio.open_device(bdf, space=space).bus_master = True
            for page, pages, place in ((3, 1, 0), (0, 2, 1), (5, 1, 4)):
                source.map(vaddr=memory + page * PAGE_SIZE, iova=MIB + place * PAGE_SIZE, size=pages * PAGE_SIZE)
            kernel.clear_trace()
            yield Pair(kernel, source, target, memory)
            source._check()
            target._check()
        kernel.munmap(memory, 8 * PAGE_SIZE)


@pytest.mark.parametrize("at", [None, 0, GIB, MIB + PAGE_SIZE])
def test_a_copy_is_the_same_memory_at_the_iova_that_the_caller_names(pair: Pair, at: int | None) -> None:
    """IOVA 0 is one of these. The pages are charged once, and the copy outlives the original, mapping by mapping."""
    place = MIB if at is None else at
    charged = pair.kernel.pinned
    pair.target.copy(pair.source, iova=MIB, size=3 * PAGE_SIZE, at=at)
    assert requests(pair.kernel.trace) == ["IOMMU_IOAS_COPY"]
    assert pair.kernel.pinned == charged
    assert pair.table() == [(place, PAGE_SIZE, 3), (place + PAGE_SIZE, 2 * PAGE_SIZE, 0)]
    pair.source.unmap_all()
    assert pair.kernel.dma_read(OTHER_BDF, place + PAGE_SIZE - 4, 8) == bytes(8)
    pair.kernel.dma_write(OTHER_BDF, place + PAGE_SIZE, b"copy")
    pair.target.unmap(iova=place, size=PAGE_SIZE)
    assert pair.kernel.dma_read(OTHER_BDF, place + PAGE_SIZE, 4) == b"copy"
    pair.target.unmap(iova=place + PAGE_SIZE, size=2 * PAGE_SIZE)
    assert pair.kernel.mappings() == ()


@pytest.mark.parametrize(("read", "write"), [(True, False), (False, True), (True, True)])
def test_a_copy_has_the_access_that_is_asked_for_and_a_cut_leaves_that_to_the_rest(
    pair: Pair,
    *,
    read: bool,
    write: bool,
) -> None:
    """A device reads what may only be written on kernels before 7: the IOMMU has no such pages."""
    pair.target.copy(pair.source, iova=MIB, size=3 * PAGE_SIZE, at=GIB, read=read, write=write)
    pair.target.copy(pair.source, iova=MIB + 4 * PAGE_SIZE, size=PAGE_SIZE)
    refused = pytest.raises(DmaFault, match="does not allow")
    for _ in ("the copy", "the rest of a cut"):
        for iova in (GIB, GIB + PAGE_SIZE):
            with nullcontext() if write else refused:
                pair.kernel.dma_write(OTHER_BDF, iova, b"copy")
            with nullcontext() if read or pair.kernel.version.name == "6.12" else refused:
                pair.kernel.dma_read(OTHER_BDF, iova, 4)
        pair.kernel.dma_write(OTHER_BDF, MIB + 4 * PAGE_SIZE, b"both")
        assert pair.kernel.dma_read(OTHER_BDF, MIB + 4 * PAGE_SIZE, 4) == b"both"
        if pair.target.mappings_in(iova=GIB + 2 * PAGE_SIZE, size=PAGE_SIZE):
            with pair.target.guard.lock:
                pair.target.cut_locked(GIB + 2 * PAGE_SIZE, PAGE_SIZE)
    assert [place for place, _size, _page in pair.table()] == [MIB + 4 * PAGE_SIZE, GIB, GIB + PAGE_SIZE]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"source": 3}, TypeError, "source must be an Ioas, not int"),
        ({"source": "other"}, ValueError, "source must be a space of the same iommufd"),
        ({"iova": MIB + PAGE_SIZE // 2}, ValueError, "multiples of 0x1000"),
        ({"at": GIB + 1}, ValueError, "multiples of 0x1000"),
        ({"at": -PAGE_SIZE}, ValueError, "multiples of 0x1000"),
        ({"at": U64_MAX + 1 - PAGE_SIZE}, ValueError, "multiples of 0x1000"),
        ({"size": 0}, ValueError, "multiples of 0x1000"),
        ({"size": 4096.0}, TypeError, "float"),
        ({"iova": "1"}, TypeError, "str"),
        ({"at": "1"}, TypeError, "str"),
        ({"read": False, "write": False}, ValueError, "read or write must be True"),
        (
            {"iova": MIB, "size": 5 * PAGE_SIZE},
            ValueError,
            "fill 0x5000 bytes at 0x100000; .* 0x100000-0x100fff, 0x101000-0x102fff, 0x104",
        ),
        ({"iova": MIB + PAGE_SIZE, "size": PAGE_SIZE}, ValueError, "there are: 0x101000-0x102fff$"),
        ({"iova": MIB + 2 * PAGE_SIZE, "size": PAGE_SIZE}, ValueError, "there are: 0x101000-0x102fff$"),
        ({"iova": MIB + 3 * PAGE_SIZE, "size": PAGE_SIZE}, ValueError, "there are: none$"),
    ],
)
def test_a_copy_that_can_never_be_made_is_refused_before_any_call(
    pair: Pair, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Of memory that whole mappings of the source do not fill, too."""
    with pyvfio.Ioas(kernel=pair.kernel) as other:
        pair.kernel.clear_trace()
        given: dict[str, Any] = {"source": pair.source, "iova": MIB, "size": 3 * PAGE_SIZE} | arguments
        if given["source"] == "other":
            given["source"] = other
        with pytest.raises(error, match=said):
            pair.target.copy(given.pop("source"), **given)
        assert pair.kernel.trace == []
    assert pair.table() == pair.reach(OTHER_BDF) == []


def test_without_a_device_nothing_is_copied(pair: Pair) -> None:
    """The kernel would check nothing. A space that is closed says so."""
    with pyvfio.Ioas(pair.source.iommufd) as space, pytest.raises(pyvfio.VfioError, match="no device is attached"):
        space.copy(pair.source, iova=MIB, size=3 * PAGE_SIZE)
    with pytest.raises(pyvfio.ClosedError):
        space.copy(pair.source, iova=MIB, size=3 * PAGE_SIZE)
    assert "IOMMU_IOAS_COPY" not in requests(pair.kernel.trace)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EEXIST, "Unmap that part first"),
        (errno.EPERM, "pass write=False"),
        (errno.ENOENT, "does not map all of the range"),
        (errno.EIO, ""),
    ],
)
def test_a_copy_that_the_kernel_refuses_names_both_places_and_changes_nothing(
    pair: Pair, number: int, hint: str
) -> None:
    """With a hint where the caller can do something."""
    pair.kernel.fail(call="ioctl", request="IOMMU_IOAS_COPY", errno=number)
    with pytest.raises(pyvfio.IoctlError, match=pair.target.guard.what) as raised:
        pair.target.copy(pair.source, iova=MIB, size=3 * PAGE_SIZE, at=GIB)
    assert (raised.value.errno, raised.value.request) == (number, "IOMMU_IOAS_COPY")
    assert raised.value.arguments == {"source": pair.source.id, "iova": MIB, "size": 3 * PAGE_SIZE, "at": GIB}
    assert hint in raised.value.hint
    assert bool(hint) == bool(raised.value.hint)
    assert pair.table() == pair.reach(OTHER_BDF) == []


# ------------------------------------------------------------------------------------------------ maps by descriptor


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.EIO, pyvfio.IoctlError, "EIO"),
        (errno.ENOMEM, pyvfio.PinLimitError, "no memory to map 8 KiB"),
        (errno.EEXIST, pyvfio.IovaOverlapError, "by another process or another object"),
        (errno.EINVAL, pyvfio.IoctlError, "EINVAL"),
        (errno.EFAULT, pyvfio.IoctlError, "cannot be pinned for this access"),
        (errno.ENOENT, pyvfio.IoctlError, "the address space does not exist any more"),
    ],
)
def test_a_map_by_descriptor_that_is_refused_maps_nothing_and_says_which_call(
    number: int, kind: type[pyvfio.IoctlError], said: str
) -> None:
    """With the place and the size. The block is not added."""
    with (
        FakeKernel("7.3", iommufd=True) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as device,
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pyvfio.DmaMapper(device.space, blocks, resize="extend") as mapper,
    ):
        assert device.space.maps_files  # after one call that asks the kernel
        kernel.fail(call="ioctl", request="IOMMU_IOAS_MAP_FILE", errno=number)
        with pytest.raises(kind, match=said) as raised:
            blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MIB, memory=pyvfio.Memfd())
        assert (raised.value.request, raised.value.errno) == ("IOMMU_IOAS_MAP_FILE", number)
        given = raised.value.arguments
        assert (given["size"], given["flags"]) == (2 * PAGE_SIZE, 7)
        assert 0 < int(given["iova"]) < GIB < int(given["vaddr"]), "the addresses of a process are higher"
        assert "BAR" not in raised.value.hint, "no descriptor of a file is one of a BAR"
        assert (device.space.mappings, kernel.mappings(BDF), list(blocks)) == ((), (), [])
        mapper._check()


def test_a_map_by_descriptor_without_a_device_is_refused_before_any_call() -> None:
    """As one by address: the pages are not touched. A space that is closed says so."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel), pyvfio.Ioas(kernel=kernel) as space:
        with pyvfio.open_device(BDF, space=space):
            pass
        kernel.clear_trace()
        with pytest.raises(pyvfio.VfioError, match="no device is attached"), space.guard.lock:
            space.map_file_locked((0, 0), GIB, MIB, PAGE_SIZE, 3)
        space.close()
        with pytest.raises(pyvfio.ClosedError), space.guard.lock:
            space.map_file_locked((0, 0), GIB, MIB, PAGE_SIZE, 3)
        assert "madvise" not in {call.call for call in kernel.trace}
        assert "IOMMU_IOAS_MAP_FILE" not in requests(kernel.trace)
