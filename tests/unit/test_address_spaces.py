"""What every address space does, of type1 and of iommufd: one suite for `Container` and `Ioas`."""

from __future__ import annotations

import errno
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import GIB, MIB, PAGE_SIZE, U64_MAX
from tests.unit.fakes import BDF, PRIVATE, READ_WRITE, nothing_left, requests
from tests.unit.processes import in_child

ROOM = 16 * PAGE_SIZE


class Number(int):
    """A number of another class than int, as numpy's are: no other number can be combined with it."""

    def __or__(self, other: object) -> int:
        """None of both."""
        return NotImplemented

    __ror__ = __or__


Space: TypeAlias = pyvfio.Container | pyvfio.Ioas


@dataclass(frozen=True)
class Kind:
    """A kind of address space: the kernel, and the names of its calls."""

    version: str
    iommufd: bool

    @property
    def map_request(self) -> str:
        """The call that maps."""
        return "IOMMU_IOAS_MAP" if self.iommufd else "VFIO_IOMMU_MAP_DMA"

    def make(self, kernel: FakeKernel, cut: str | None = None) -> Space:
        """A space without a device."""
        if not self.iommufd:
            return pyvfio.Container(kernel=kernel)
        return pyvfio.Ioas(kernel=kernel, cut=cut)  # type: ignore[arg-type]

    def unmap_behind_its_back(self, kernel: FakeKernel, space: Space, *, iova: int, size: int) -> None:
        """As another holder of the descriptor would."""
        if isinstance(space, pyvfio.Ioas):
            space.iommufd.ioas_unmap(space.id, iova=iova, size=size)
        else:
            argument = ioctls.vfio_iommu_type1_dma_unmap(24, 0, iova, size)
            kernel.ioctl(space.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)

    def map_behind_its_back(self, kernel: FakeKernel, space: Space, *, vaddr: int, iova: int) -> None:
        """A page, as another holder of the descriptor would."""
        if isinstance(space, pyvfio.Ioas):
            space.iommufd.ioas_map(space.id, vaddr=vaddr, size=PAGE_SIZE, iova=iova)
        else:
            argument = ioctls.vfio_iommu_type1_dma_map(32, ioctls.VFIO_DMA_MAP_FLAG_READ, vaddr, iova, PAGE_SIZE)
            kernel.ioctl(space.fd, ioctls.VFIO_IOMMU_MAP_DMA, argument)


KINDS = {
    "type1, 6.12": Kind("6.12", iommufd=False),
    "type1, 7.3": Kind("7.3", iommufd=False),
    "iommufd, 6.12": Kind("6.12", iommufd=True),
    "iommufd, 7.3": Kind("7.3", iommufd=True),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each kind of address space."""
    return KINDS[request.param]


@pytest.fixture
def kernel(kind: Kind) -> Iterator[FakeKernel]:
    """A kernel with two devices, in two groups."""
    with FakeKernel(kind.version, iommufd=kind.iommufd) as made:
        yield made


@pytest.fixture
def memory(kernel: FakeKernel) -> Iterator[int]:
    """Memory to map, by its address; `ROOM` bytes."""
    vaddr = kernel.mmap(0, ROOM, READ_WRITE, PRIVATE)
    yield vaddr
    kernel.munmap(vaddr, ROOM)


@pytest.fixture
def space(kind: Kind, kernel: FakeKernel, memory: int) -> Iterator[Space]:
    """One with a device; nothing is left of it in the end, while memory is still there."""
    with nothing_left(kernel), kind.make(kernel) as made:
        pyvfio.open_device(BDF, space=made)
        yield made
        made._check()


# ------------------------------------------------------------------------------------------------ without a device


@pytest.mark.parametrize("left", [False, True], ids=["before the first device", "after the last one"])
def test_nothing_is_mapped_where_no_device_uses_the_space(
    kind: Kind, kernel: FakeKernel, memory: int, *, left: bool
) -> None:
    """Nor reserved: nobody knows the ranges, and iommufd would neither check nor pin anything."""
    with nothing_left(kernel), kind.make(kernel) as space:
        if left:
            pyvfio.open_device(BDF, space=space).close()
        assert space.iova_ranges == ()
        uses = (
            partial(space.reserve_iova, PAGE_SIZE, alignment=PAGE_SIZE, offset=0),
            partial(space.reserve_iova_at, MIB, PAGE_SIZE),
            partial(space.map, vaddr=memory, iova=MIB, size=PAGE_SIZE),
            partial(space.reserve_and_map, vaddr=memory, size=PAGE_SIZE),
            partial(space.reserve_and_map, vaddr=memory, size=PAGE_SIZE, iova=MIB),
            partial(space.reserve_and_map_locked, memory, PAGE_SIZE, None, 1, False, 3, 39),  # noqa: FBT003
            partial(space.reserve_and_map_locked, memory, PAGE_SIZE, MIB, 1, False, 3, 39),  # noqa: FBT003
            space.check_takes_mappings,
            space.picture,
        )
        for use in uses:
            with pytest.raises(pyvfio.VfioError, match=r"no group|no device|attach one first"):
                use()
        with pytest.raises(pyvfio.VfioError) as caught:
            space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        assert ("Open a device first" if kind.iommufd else "has no group yet: attach one first") in caught.value.hint
        assert (space.takes_mappings, space._repr_svg_()) == (False, None)
        assert space.unmap_all() == 0
        assert (space.mappings, space.reserved_iova) == ((), ())
    for use in uses:
        with pytest.raises(pyvfio.ClosedError):
            use()
    assert space._repr_svg_() is None


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("number", [np.int32, np.int64, np.uint32, np.uint64])
def test_numbers_of_numpy_are_numbers(space: Space, memory: int, number: Callable[[int], int]) -> None:
    """Whatever their width: what is done with an IOVA of 39 bits does not overflow."""
    space.reserve_iova_at(0x10000, space.iova_ranges[0].size - 0x10000)
    iova = space.reserve_iova(number(MIB), alignment=number(1 << 30), offset=number(PAGE_SIZE), top_down=True)
    assert iova == (1 << 39) - GIB + PAGE_SIZE
    own = space.reserve_iova_at(number(2 * PAGE_SIZE), number(PAGE_SIZE))
    assert [type(each) for each in (iova, own, space.reserved_iova[0].start)] == [int, int, int]
    mapped = space.reserve_and_map(vaddr=memory, size=PAGE_SIZE, iova=number(PAGE_SIZE), alignment=number(1))
    space.unmap_and_release(iova=mapped, size=PAGE_SIZE, vaddr=memory)
    space.release_iova(number(2 * PAGE_SIZE))
    assert {type(start) for start, _last in space.allocator._free} == {int}


@pytest.mark.parametrize(
    ("vaddr", "iova", "size"),
    [
        (np.uint64, np.int64, int),
        (np.int64, np.uint64, np.uint64),
        (int, np.uint64, np.int32),
        (int, np.uint32, int),
        (int, int, np.int32),
        (np.int64, np.int32, np.uint32),
    ],
)
def test_numbers_of_different_width_and_sign_are_numbers(
    space: Space, memory: int, vaddr: Callable[[int], int], iova: Callable[[int], int], size: Callable[[int], int]
) -> None:
    """numpy combines no signed number with an unsigned one, nor a narrow one with a wider one of Python."""
    place = iova(MIB)
    space.map(vaddr=vaddr(memory), iova=place, size=size(PAGE_SIZE))
    assert space.mappings == ((MIB, PAGE_SIZE, memory),)
    assert {type(number) for number in space.mappings[0]} == {int}
    space.unmap(iova=place, size=size(PAGE_SIZE))
    assert not list(space.mappings)


def test_numbers_of_another_class_are_told_before_anything_is_reserved(space: Space, memory: int) -> None:
    """Nothing is reserved."""
    for use in (
        partial(space.reserve_iova, 4096.0, alignment=PAGE_SIZE, offset=0),  # type: ignore[arg-type]
        partial(space.reserve_iova, PAGE_SIZE, alignment="4096", offset=0),  # type: ignore[arg-type]
        partial(space.reserve_iova, PAGE_SIZE, alignment=PAGE_SIZE, offset=None),  # type: ignore[arg-type]
        partial(space.reserve_iova_at, 4096.0, PAGE_SIZE),  # type: ignore[arg-type]
        partial(space.reserve_iova_at, MIB, "4096"),  # type: ignore[arg-type]
        partial(space.release_iova, "4096"),  # type: ignore[arg-type]
        partial(space.reserve_and_map, vaddr=memory, size=PAGE_SIZE, iova=4096.0),  # type: ignore[arg-type]
        partial(space.reserve_and_map, vaddr=memory, size=PAGE_SIZE, alignment=1.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError):
            use()
    assert space.reserved_iova == ()


def test_what_is_mapped_is_known(space: Space, memory: int) -> None:
    """By IOVA, in order, and no longer when it is unmapped: one mapping or several in one call."""
    for number in (2, 0, 1):
        space.map(vaddr=memory + number * PAGE_SIZE, iova=MIB + number * PAGE_SIZE, size=PAGE_SIZE)
    assert [mapping.iova - MIB for mapping in space.mappings] == [0, PAGE_SIZE, 2 * PAGE_SIZE]
    found = space.mapping_at(MIB + PAGE_SIZE + 5)
    assert found == (MIB + PAGE_SIZE, PAGE_SIZE, memory + PAGE_SIZE)
    assert space.mapping_at(MIB + 3 * PAGE_SIZE) is None
    space.unmap(iova=MIB + PAGE_SIZE, size=2 * PAGE_SIZE)
    assert [mapping.iova for mapping in space.mappings] == [MIB]
    space.unmap(iova=MIB, size=PAGE_SIZE)
    assert space.mappings == ()


@pytest.mark.parametrize(
    ("vaddr", "iova", "size", "words"),
    [
        (1, MIB, PAGE_SIZE, "no process has"),
        (MIB + PAGE_SIZE // 2, MIB, 2 * PAGE_SIZE, "no process has"),
        (MIB, 1, PAGE_SIZE, "multiples of 0x1000"),
        (MIB, MIB + PAGE_SIZE // 2, 2 * PAGE_SIZE, "multiples of 0x1000"),
        (MIB, MIB, 1, "multiples of 0x1000"),
        (MIB, MIB, 2 * PAGE_SIZE + PAGE_SIZE // 2, "multiples of 0x1000"),
        (MIB, MIB, 0, "multiples of 0x1000"),
        (MIB, MIB, -PAGE_SIZE, "multiples of 0x1000"),
        (MIB, -PAGE_SIZE, PAGE_SIZE, "multiples of 0x1000"),
        (-PAGE_SIZE, MIB, PAGE_SIZE, "no process has"),
        (1 << 64, MIB, PAGE_SIZE, "no process has"),
        (MIB, 1 << 64, PAGE_SIZE, "multiples of 0x1000"),
        (MIB, U64_MAX + 1 - PAGE_SIZE, 2 * PAGE_SIZE, "multiples of 0x1000"),
        (U64_MAX + 1 - PAGE_SIZE, MIB, 2 * PAGE_SIZE, "no process has"),
    ],
)
def test_what_can_never_be_mapped_is_refused_before_any_call(
    kernel: FakeKernel, space: Space, vaddr: int, iova: int, size: int, *, words: str
) -> None:
    """Misaligned, empty, negative, behind the end of all addresses. As numbers of Python, and of another class."""
    said = {
        "no process has": " {size:#x} bytes at vaddr {vaddr:#x} ",
        "multiples of 0x1000": ".*: iova {iova:#x}, size {size:#x}$",
    }
    kernel.clear_trace()
    for number in (int, Number):
        with pytest.raises(ValueError, match=words + said[words].format(vaddr=vaddr, iova=iova, size=size)):
            space.map(vaddr=number(vaddr), iova=number(iova), size=number(size))
    assert not kernel.trace


@pytest.mark.parametrize(
    ("iova", "size"),
    [
        (1, PAGE_SIZE),
        (MIB + PAGE_SIZE // 2, 2 * PAGE_SIZE),
        (MIB, 1),
        (MIB, 2 * PAGE_SIZE + PAGE_SIZE // 2),
        (MIB, 0),
        (0, 0),
        (MIB, -PAGE_SIZE),
        (-PAGE_SIZE, PAGE_SIZE),
        (1 << 64, PAGE_SIZE),
        (U64_MAX + 1 - PAGE_SIZE, 2 * PAGE_SIZE),
    ],
)
def test_what_can_never_be_unmapped_is_refused_before_any_call(
    kernel: FakeKernel, space: Space, iova: int, size: int
) -> None:
    """As what can never be mapped. The last page of all is none of these: nothing is mapped there."""
    kernel.clear_trace()
    for number in (int, Number):
        with pytest.raises(ValueError, match=f"multiples of 0x1000.*: iova {iova:#x}, size {size:#x}$"):
            space.unmap(iova=number(iova), size=number(size))
        with pytest.raises(pyvfio.UnmapSizeError, match=r"0xfffffffffffff000-0xffffffffffffffff cannot be .*: none"):
            space.unmap(iova=number(U64_MAX + 1 - PAGE_SIZE), size=number(PAGE_SIZE))
    assert not kernel.trace


def test_a_mapping_that_nobody_may_use_is_refused(kernel: FakeKernel, space: Space, memory: int) -> None:
    """Neither read nor write."""
    kernel.clear_trace()
    with pytest.raises(ValueError, match="read or write"):
        space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE, read=False, write=False)
    assert not kernel.trace


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ({}, 0x10000),
        ({"top_down": True}, (1 << 39) - 2 * PAGE_SIZE),
        ({"top_down": True, "dma_bits": 32}, (1 << 32) - 2 * PAGE_SIZE),
        ({"dma_bits": 17}, 0x10000),
        ({"iova": 0}, 0),
        ({"iova": GIB, "top_down": True, "dma_bits": 17}, GIB),
    ],
)
@pytest.mark.parametrize(("read", "write"), [(True, True), (True, False), (False, True)])
def test_memory_is_mapped_where_iova_is_reserved_in_one_call(
    kernel: FakeKernel,
    space: Space,
    memory: int,
    choice: dict[str, Any],
    wanted: int,
    *,
    read: bool,
    write: bool,
) -> None:
    """At the place that `reserve_iova` would choose, or at that of the caller, with the access that is asked for."""
    place = space.reserve_and_map(vaddr=memory, size=2 * PAGE_SIZE, read=read, write=write, **choice)
    assert place == wanted
    assert [(each.start, each.size) for each in space.reserved_iova] == [(place, 2 * PAGE_SIZE)]
    (mapped,) = kernel.mappings(BDF)
    assert mapped[:3] == space.mappings[0] == (place, 2 * PAGE_SIZE, memory)
    flags = (ioctls.VFIO_DMA_MAP_FLAG_READ if read else 0) | (ioctls.VFIO_DMA_MAP_FLAG_WRITE if write else 0)
    assert mapped.flags == flags
    space.unmap_and_release(iova=place, size=2 * PAGE_SIZE, vaddr=memory)
    assert (space.reserved_iova, kernel.mappings(BDF)) == ((), ())


@pytest.mark.parametrize("alignment", [1, PAGE_SIZE, MIB, GIB])
def test_an_iova_that_is_reserved_for_memory_has_the_remainder_of_its_address(
    space: Space, memory: int, alignment: int
) -> None:
    """So that the IOMMU can use large pages: of memory that begins at a page of its own."""
    vaddr = memory + PAGE_SIZE
    place = space.reserve_and_map(vaddr=vaddr, size=PAGE_SIZE, alignment=alignment)
    assert (place - vaddr) % alignment == 0
    assert place - 0x10000 < max(alignment, PAGE_SIZE)
    space.unmap_and_release(iova=place, size=PAGE_SIZE, vaddr=vaddr)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"vaddr": 1}, ValueError, "no process has 0x1000 bytes at vaddr 0x1 in pages of 0x1000"),
        ({"vaddr": MIB + PAGE_SIZE // 2}, ValueError, "no process has 0x1000 bytes at vaddr 0x100800 in"),
        ({"vaddr": -PAGE_SIZE}, ValueError, "no process has"),
        ({"vaddr": 1 << 64}, ValueError, "no process has"),
        ({"vaddr": U64_MAX + 1 - PAGE_SIZE, "size": 2 * PAGE_SIZE}, ValueError, "no process has"),
        ({"read": False, "write": False}, ValueError, "read or write must be True"),
        ({"size": 0}, ValueError, "a size of IOVA must be a positive multiple"),
        ({"size": 1}, ValueError, "a size of IOVA must be a positive multiple"),
        ({"alignment": 3}, ValueError, "alignment must be a power of two"),
        ({"iova": 1}, ValueError, "an IOVA must be a multiple"),
        ({"iova": -PAGE_SIZE}, ValueError, "an IOVA must be a multiple"),
        ({"dma_bits": 16}, ValueError, "dma_bits must be 17 to 64"),
        ({"dma_bits": 65}, ValueError, "dma_bits must be 17 to 64"),
        ({"dma_bits": "39"}, TypeError, "dma_bits"),
        ({"vaddr": "1"}, TypeError, "str"),
        ({"size": "1"}, TypeError, "str"),
    ],
)
def test_what_can_never_be_reserved_and_mapped_is_refused_before_any_call(
    kernel: FakeKernel, space: Space, arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Nothing is reserved either."""
    kernel.clear_trace()
    with pytest.raises(error, match=said):
        space.reserve_and_map(**({"vaddr": MIB, "size": PAGE_SIZE} | arguments))
    assert not kernel.trace
    assert space.reserved_iova == ()


@pytest.mark.parametrize("iova", [None, GIB])
def test_iova_stays_reserved_while_memory_is_mapped_there_though_the_call_raised(
    kernel: FakeKernel, space: Space, memory: int, iova: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A filter of the program's log raises behind the map: the IOVA would otherwise be given to a second mapping."""

    def refuse(record: logging.LogRecord) -> bool:
        raise ValueError(record.getMessage())

    log = logging.getLogger("pyvfio.iommu.iova_space")
    log.addFilter(refuse)
    try:
        with caplog.at_level(logging.DEBUG, log.name), pytest.raises(ValueError, match="mapped") as raised:
            space.reserve_and_map(vaddr=memory, size=2 * PAGE_SIZE, iova=iova)
    finally:
        log.removeFilter(refuse)
    ((place, size, vaddr),) = space.mappings
    assert (size, vaddr) == (2 * PAGE_SIZE, memory)
    assert str(raised.value).startswith(f"mapped iova={place:#x} vaddr={memory:#x} size=0x2000 ")
    assert [tuple(each[:3]) for each in kernel.mappings(BDF)] == [(place, size, vaddr)]
    assert [(each.start, each.size) for each in space.reserved_iova] == [(place, size)]
    space.unmap_and_release(iova=place, size=size, vaddr=vaddr)


@pytest.mark.parametrize("iova", [None, GIB])
def test_a_map_that_is_refused_leaves_nothing_reserved(
    kind: Kind, kernel: FakeKernel, space: Space, memory: int, iova: int | None
) -> None:
    """And an IOVA that is reserved already is not mapped."""
    kernel.fail(call="ioctl", request=kind.map_request, errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError, match="EIO"):
        space.reserve_and_map(vaddr=memory, size=PAGE_SIZE, iova=iova)
    assert (space.reserved_iova, space.mappings) == ((), ())
    space.reserve_iova_at(GIB, PAGE_SIZE)
    with pytest.raises(pyvfio.IovaOverlapError):
        space.reserve_and_map(vaddr=memory, size=PAGE_SIZE, iova=GIB)
    assert space.mappings == ()


@pytest.mark.parametrize("why", ["unlimited", "privileged"])
def test_a_lack_of_memory_that_is_not_the_limits_doing_is_not_blamed_on_it(
    kind: Kind, kernel: FakeKernel, space: Space, memory: int, why: str
) -> None:
    """`limit` is None, and the text says so."""
    kernel.memlock_limit = {"unlimited": None, "privileged": PAGE_SIZE}[why]
    kernel.privileged = why == "privileged"
    kernel.fail(call="ioctl", request=kind.map_request, errno=errno.ENOMEM)
    with pytest.raises(pyvfio.PinLimitError, match="RLIMIT_MEMLOCK is not the cause") as caught:
        space.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE)
    assert caught.value.limit is None
    assert "missing" not in str(caught.value)


def test_an_overlap_is_told_with_what_is_there(space: Space, memory: int) -> None:
    """Every mapping that shares an address."""
    for number in (-128, 0, 1, 5):
        space.map(vaddr=memory, iova=MIB + number * PAGE_SIZE, size=PAGE_SIZE)
    with pytest.raises(pyvfio.IovaOverlapError, match="mapped already: 0x100000-0x100fff, 0x101000-0x101fff") as caught:
        space.map(vaddr=memory, iova=MIB, size=3 * PAGE_SIZE)
    assert caught.value.errno == errno.EEXIST
    assert caught.value.existing == tuple(mapping.range for mapping in space.mappings[1:3])


def test_an_overlap_with_a_mapping_of_another_object_says_whose_it_can_be(
    kind: Kind, kernel: FakeKernel, space: Space, memory: int
) -> None:
    """A launcher's and a driver's object of one descriptor do not know of each other's mappings."""
    kind.map_behind_its_back(kernel, space, vaddr=memory, iova=MIB)
    with pytest.raises(pyvfio.IovaOverlapError, match="by another process or another object") as caught:
        space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    assert caught.value.existing == ()
    kind.unmap_behind_its_back(kernel, space, iova=MIB, size=PAGE_SIZE)


@pytest.mark.parametrize("iova", [0xFEE00000, 0xFEDFF000, 1 << 39], ids=["interrupts", "across", "above"])
def test_addresses_outside_the_ranges_are_told_with_the_ranges(space: Space, memory: int, iova: int) -> None:
    """As attribute and in the text."""
    with pytest.raises(pyvfio.IovaRangeError, match=r"The IOMMU offers 0x0-0xfedfffff, 0xfef00000-0x7f") as caught:
        space.map(vaddr=memory, iova=iova, size=2 * PAGE_SIZE)
    assert caught.value.ranges == space.iova_ranges
    assert caught.value.errno == errno.EINVAL
    last = iova + 2 * PAGE_SIZE - 1
    assert caught.value.message == f"IOVA {iova:#x}-{last:#x} does not lie in one range of the IOMMU"


def test_memory_that_cannot_be_pinned_is_told_with_what_the_process_has_there(kernel: FakeKernel, space: Space) -> None:
    """Its rights, or that there is nothing."""
    vaddr = kernel.mmap(0, 2 * PAGE_SIZE, 0, 0x22)
    with pytest.raises(pyvfio.IoctlError, match=rf"cannot be pinned.*{vaddr:#x}.* ---p") as caught:
        space.map(vaddr=vaddr, iova=MIB, size=2 * PAGE_SIZE)
    assert caught.value.errno == errno.EFAULT
    kernel.munmap(vaddr, 2 * PAGE_SIZE)
    with pytest.raises(pyvfio.IoctlError, match="nothing mapped at 0x1000-0x1fff"):
        space.map(vaddr=PAGE_SIZE, iova=MIB, size=PAGE_SIZE)


@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR])
def test_other_refusals_are_told_as_they_are(
    kind: Kind, kernel: FakeKernel, space: Space, memory: int, number: int
) -> None:
    """With the arguments; nothing is recorded."""
    kernel.fail(call="ioctl", request=kind.map_request, errno=number)
    with pytest.raises(pyvfio.IoctlError, match=errno.errorcode[number]) as caught:
        space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    assert caught.value.errno == number
    assert caught.value.request == kind.map_request
    assert (type(caught.value), caught.value.hint) == (pyvfio.IoctlError, "")
    assert space.mappings == ()


@pytest.mark.parametrize(
    ("number", "error", "message", "hint"),
    [
        (
            errno.ENOMEM,
            pyvfio.PinLimitError,
            "the kernel has no memory to map 4 KiB",
            "RLIMIT_MEMLOCK is not the cause",
        ),
        (errno.EEXIST, pyvfio.IovaOverlapError, "part of the range is mapped already", "Unmap that part first"),
        (errno.EINVAL, pyvfio.IoctlError, "Invalid argument", "Addresses and size must be multiples of 0x1000"),
        (errno.EOVERFLOW, pyvfio.IoctlError, "Value too large", "Addresses and size must be multiples of 0x1000"),
        (errno.EFAULT, pyvfio.IoctlError, "the memory cannot be pinned", "The memory must be mapped and accessible"),
    ],
)
@pytest.mark.parametrize("iova", [0, MIB, 0xFEDFF000, (1 << 39) - PAGE_SIZE])
def test_a_refusal_says_what_failed_in_the_message_and_what_to_do_in_the_hint(  # noqa: PLR0917
    kind: Kind,
    kernel: FakeKernel,
    space: Space,
    memory: int,
    iova: int,
    number: int,
    error: type[pyvfio.IoctlError],
    message: str,
    hint: str,
) -> None:
    """At the ends of the ranges, too, where EINVAL has another reason than the place."""
    kernel.memlock_limit = None
    kernel.fail(call="ioctl", request=kind.map_request, errno=number)
    with pytest.raises(error) as caught:
        space.map(vaddr=memory, iova=iova, size=PAGE_SIZE, write=False)
    assert type(caught.value) is error
    assert caught.value.message.startswith(message)
    assert hint in caught.value.hint
    assert ("iommufd does not map a BAR" in caught.value.hint) == (kind.iommufd and number == errno.EFAULT)
    given = {"vaddr": memory, "iova": iova, "size": PAGE_SIZE}
    assert {name: caught.value.arguments[name] for name in given} == given


@pytest.mark.parametrize(
    ("number", "message", "hint"),
    [
        (errno.ENOENT, "the address space does not exist any more", "destroyed the space"),
        (errno.EADDRINUSE, "IOMMU_IOAS_ALLOW_IOVAS does not allow that range", "in the allowed ranges"),
    ],
)
def test_a_refusal_that_iommufd_alone_has_says_what_failed_and_what_to_do(number: int, message: str, hint: str) -> None:
    """The one in the message, the other in the hint."""
    with FakeKernel("7.3", iommufd=True) as kernel, pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as device:
        kernel.fail(call="ioctl", request="IOMMU_IOAS_MAP", errno=number)
        with pytest.raises(pyvfio.IoctlError) as caught:
            device.space.map(vaddr=MIB, iova=MIB, size=PAGE_SIZE)
        assert caught.value.message == message
        assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOMEM, "Free memory or huge pages"), (errno.EFAULT, "Free memory or huge pages"), (errno.EINTR, "")],
)
def test_pages_of_a_file_that_cannot_be_populated_are_not_mapped(number: int, hint: str) -> None:
    """Free memory is the advice where memory is missing, and nowhere else."""
    with FakeKernel("7.3", iommufd=True) as kernel, pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as device:
        kernel.fail(call="madvise", errno=number)
        with pytest.raises(pyvfio.IoctlError, match="could not be populated") as caught, device.space.guard.lock:
            device.space.map_file_locked((0, 0), MIB, MIB, PAGE_SIZE, 3)
        assert (caught.value.errno, caught.value.hint) == (number, hint)
        assert device.space.mappings == ()
        assert "IOMMU_IOAS_MAP_FILE" not in requests(kernel.trace)


def test_after_an_unmap_of_another_size_the_table_is_what_the_kernel_has(
    kind: Kind, kernel: FakeKernel, space: Space, memory: int
) -> None:
    """Another holder of the descriptor has unmapped it: the error comes once, and close succeeds.

    A mapping below has no part in it.
    """
    space.map(vaddr=memory, iova=MIB // 2, size=PAGE_SIZE)
    for number in range(3):
        space.map(vaddr=memory, iova=MIB + number * PAGE_SIZE, size=PAGE_SIZE)
    kind.unmap_behind_its_back(kernel, space, iova=MIB + PAGE_SIZE, size=PAGE_SIZE)
    with pytest.raises(pyvfio.UnmapSizeError) as caught:
        space.unmap(iova=MIB, size=2 * PAGE_SIZE)
    assert (caught.value.asked, caught.value.unmapped) == (2 * PAGE_SIZE, PAGE_SIZE)
    assert "Known mappings in this range: 0x100000-0x100fff, 0x101000-0x101fff. " in caught.value.hint
    left = [MIB // 2, MIB + 2 * PAGE_SIZE]
    assert [m.iova for m in space.mappings] == [m.iova for m in kernel.mappings(BDF)] == left
    kind.unmap_behind_its_back(kernel, space, iova=MIB + 2 * PAGE_SIZE, size=PAGE_SIZE)
    for use in (
        partial(space.unmap, iova=MIB + 2 * PAGE_SIZE, size=PAGE_SIZE),
        partial(space.unmap, iova=MIB, size=3 * PAGE_SIZE),
    ):
        with pytest.raises(pyvfio.UnmapSizeError) as caught:
            use()
        assert caught.value.unmapped == 0
        assert [m.iova for m in space.mappings] == [MIB // 2]


def test_an_unmap_with_its_reservation_ends_both_or_nothing(kernel: FakeKernel, space: Space, memory: int) -> None:
    """A mapping without a reservation stays, and so does one of other memory. One that is gone is no error."""
    space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    with pytest.raises(KeyError, match="0x100000"):
        space.unmap_and_release(iova=MIB, size=PAGE_SIZE, vaddr=memory)
    assert [m.iova for m in kernel.mappings(BDF)] == [m.iova for m in space.mappings] == [MIB]
    space.reserve_iova_at(MIB, PAGE_SIZE)
    space.unmap_and_release(iova=MIB, size=PAGE_SIZE, vaddr=memory + PAGE_SIZE)
    assert (len(kernel.mappings(BDF)), len(space.mappings), space.reserved_iova) == (1, 1, ())
    for _ in ("mapped", "gone"):
        space.reserve_iova_at(MIB, PAGE_SIZE)
        space.unmap_and_release(iova=MIB, size=PAGE_SIZE, vaddr=memory)
        assert (kernel.mappings(BDF), space.mappings, space.reserved_iova) == ((), (), ())
    place = space.reserve_and_map(vaddr=memory, size=PAGE_SIZE)
    kernel.fail(call="ioctl", request=space._unmap_request, errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError, match="EIO"):
        space.unmap_and_release(iova=place, size=PAGE_SIZE, vaddr=memory)
    assert [each.start for each in space.reserved_iova] == [m.iova for m in kernel.mappings(BDF)] == [place]
    space.unmap_and_release(iova=place, size=PAGE_SIZE, vaddr=memory)


def test_an_unmap_that_can_only_fail_is_refused_before_the_call(kernel: FakeKernel, space: Space, memory: int) -> None:
    """A range that cuts a mapping, has a gap, or has nothing: the error names both boundaries, and nothing changes.

    iommufd would unmap the mappings before the one that is cut, and then fail.
    """
    space.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE)
    space.map(vaddr=memory, iova=MIB + 3 * PAGE_SIZE, size=3 * PAGE_SIZE)
    before = space.mappings
    kernel.clear_trace()
    whole = ((0, 2), (3, 6))
    for start, end in (pair for pair in itertools.combinations(range(-1, 8), 2) if pair not in whole):
        iova, size = MIB + start * PAGE_SIZE, (end - start) * PAGE_SIZE
        known = ", ".join(str(m.range) for m in space.mappings_in(iova=iova, size=size)) or "none"
        with pytest.raises(
            pyvfio.UnmapSizeError, match=f"{iova:#x}-{iova + size - 1:#x} cannot .* are: {known}"
        ) as caught:
            space.unmap(iova=iova, size=size)
        assert (caught.value.iova, caught.value.asked, caught.value.unmapped) == (iova, size, 0)
    assert not kernel.trace
    assert space.mappings == before
    for start, end in whole:
        space.unmap(iova=MIB + start * PAGE_SIZE, size=(end - start) * PAGE_SIZE)
    for start, end in whole:
        space.map(vaddr=memory, iova=MIB + start * PAGE_SIZE, size=(end - start) * PAGE_SIZE)
    space.map(vaddr=memory, iova=MIB + 2 * PAGE_SIZE, size=PAGE_SIZE)
    space.unmap(iova=MIB, size=6 * PAGE_SIZE)


def test_everything_can_be_unmapped_at_once(kind: Kind, kernel: FakeKernel, space: Space, memory: int) -> None:
    """IOVA stays reserved; a size that is too small is an error, and the table is empty all the same."""
    iova = space.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
    space.map(vaddr=memory, iova=iova, size=PAGE_SIZE)
    space.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE)
    assert space.unmap_all() == 3 * PAGE_SIZE
    assert (space.mappings, kernel.mappings()) == ((), ())
    assert [r.start for r in space.reserved_iova] == [iova]
    assert space.unmap_all() == 0
    space.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE)
    kind.unmap_behind_its_back(kernel, space, iova=MIB, size=2 * PAGE_SIZE)
    call = space._unmap_request
    with pytest.raises(
        pyvfio.UnmapSizeError, match=f"^{call} was asked for 0x2000 .* IOVA 0x0 and unmapped 0x0"
    ) as caught:
        space.unmap_all()
    assert (caught.value.iova, caught.value.asked, caught.value.unmapped) == (0, 2 * PAGE_SIZE, 0)
    assert space.mappings == ()


@pytest.mark.parametrize("count", [8, 9])
def test_of_all_mappings_that_were_to_be_unmapped_eight_are_named(
    kind: Kind, kernel: FakeKernel, space: Space, memory: int, count: int
) -> None:
    """More than these are too many for a message, which says that there are more."""
    for number in range(count):
        space.map(vaddr=memory, iova=MIB + number * MIB, size=PAGE_SIZE)
    kind.unmap_behind_its_back(kernel, space, iova=MIB, size=PAGE_SIZE)
    with pytest.raises(pyvfio.UnmapSizeError) as caught:
        space.unmap_all()
    assert (caught.value.asked, caught.value.unmapped) == (count * PAGE_SIZE, (count - 1) * PAGE_SIZE)
    named = ", ".join(f"{number * MIB:#x}-{number * MIB + PAGE_SIZE - 1:#x}" for number in range(1, 9))
    assert f"Known mappings in this range: {named}{', …' * (count > 8)}. " in caught.value.hint
    assert (space.mappings, kernel.mappings(BDF)) == ((), ())


def test_a_refused_unmap_changes_nothing(kind: Kind, kernel: FakeKernel, space: Space, memory: int) -> None:
    """The mapping is where it was, and the next attempt succeeds."""
    space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    request = "IOMMU_IOAS_UNMAP" if kind.iommufd else "VFIO_IOMMU_UNMAP_DMA"
    kernel.fail(call="ioctl", request=request, errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError, match=f"{request}.*EIO"):
        space.unmap(iova=MIB, size=PAGE_SIZE)
    assert [m.iova for m in space.mappings] == [m.iova for m in kernel.mappings(BDF)] == [MIB]
    space.unmap(iova=MIB, size=PAGE_SIZE)


# ------------------------------------------------------------------------------------------------ any calls at all


@pytest.mark.parametrize("seed", range(4))
def test_after_random_calls_the_table_is_what_the_kernel_has(
    kernel: FakeKernel, space: Space, memory: int, seed: int
) -> None:
    """Whatever was refused in between; nothing that is reserved is given out twice."""
    chance, reserved = random.Random(seed), list[int]()  # noqa: S311
    for _ in range(200):
        page, pages = chance.randrange(64), chance.randrange(1, 5)
        iova, size = MIB + page * PAGE_SIZE, pages * PAGE_SIZE
        try:
            match chance.randrange(4):
                case 0:
                    space.map(vaddr=memory + chance.randrange(12) * PAGE_SIZE, iova=iova, size=size)
                case 1:
                    space.unmap(iova=iova, size=size)
                case 2:
                    reserved.append(space.reserve_and_map(vaddr=memory, size=size, top_down=chance.random() < 0.5))
                case _ if reserved:
                    found = space.mapping_at(reserved[-1])
                    assert found is not None
                    space.unmap_and_release(iova=reserved.pop(), size=found.size, vaddr=found.vaddr)
        except (pyvfio.UnmapSizeError, pyvfio.IovaOverlapError):
            pass
        assert [tuple(m)[:3] for m in space.mappings] == [tuple(m)[:3] for m in kernel.mappings(BDF)]
        space._check()
    assert sorted(set(reserved)) == sorted(reserved)


# ------------------------------------------------------------------------------------------------ the end


def test_a_closed_space_says_so(kind: Kind, kernel: FakeKernel, memory: int) -> None:
    """To whoever wants to map; unmapping what it had is done already."""
    with nothing_left(kernel), kind.make(kernel) as space:
        pyvfio.open_device(BDF, space=space)
        space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        space.close()
        with pytest.raises(pyvfio.ClosedError):
            space.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
        with pytest.raises(pyvfio.ClosedError):
            space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        with pytest.raises(pyvfio.ClosedError):
            space.unmap_all()
        space.unmap(iova=MIB, size=PAGE_SIZE)


def test_in_a_forked_child_a_space_is_an_error_and_closing_it_does_nothing(
    kernel: FakeKernel, space: Space, memory: int
) -> None:
    """What the child did would happen to its parent."""
    space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)

    def child() -> None:
        for use in (
            partial(space.map, vaddr=memory, iova=GIB, size=PAGE_SIZE),
            partial(space.unmap, iova=MIB, size=PAGE_SIZE),
            partial(space.reserve_iova, PAGE_SIZE, alignment=PAGE_SIZE, offset=0),
            space.unmap_all,
        ):
            with pytest.raises(pyvfio.ForkedError):
                use()
        space.close()

    assert in_child(child) == 0
    assert len(kernel.mappings(BDF)) == 1


# ------------------------------------------------------------------------------------------------ parts of a mapping


CUTS = [(version, cut) for version in ("6.12", "7.3") for cut in ("pages", "replace")]


@pytest.fixture(params=CUTS, ids=lambda pair: f"{pair[0]}, {pair[1]}")
def cutting(request: pytest.FixtureRequest) -> Iterator[tuple[FakeKernel, pyvfio.Ioas]]:
    """A space that cuts, with a device."""
    version, cut = request.param
    with (
        FakeKernel(version, iommufd=True) as kernel,
        nothing_left(kernel),
        pyvfio.Ioas(kernel=kernel, cut=cut) as space,
    ):
        pyvfio.open_device(BDF, space=space)
        yield kernel, space


def reached(kernel: FakeKernel, base: int) -> list[int]:
    """The pages from `base` on that the device can reach, by number."""
    return sorted(
        (start - base) // PAGE_SIZE
        for mapping in kernel.mappings(BDF)
        for start in range(mapping.iova, mapping.iova + mapping.size, PAGE_SIZE)
    )


@pytest.mark.parametrize("part", [(0, 3), (5, 8), (2, 6), (3, 4), (6, 10), (0, 8), (0, 12)])
def test_a_part_is_cut_out_and_nothing_else_is_lost(
    cutting: tuple[FakeKernel, pyvfio.Ioas], part: tuple[int, int]
) -> None:
    """Head, tail, middle, all; across two mappings, too. The data that stays is the same memory."""
    kernel, space = cutting
    memory = kernel.mmap(0, 12 * PAGE_SIZE, READ_WRITE, PRIVATE)
    space.map(vaddr=memory, iova=MIB, size=8 * PAGE_SIZE)
    space.map(vaddr=memory + 8 * PAGE_SIZE, iova=MIB + 8 * PAGE_SIZE, size=4 * PAGE_SIZE, write=False)
    start, end = part
    with space.guard.lock:
        space.cut_locked(MIB + start * PAGE_SIZE, (end - start) * PAGE_SIZE)
    assert reached(kernel, MIB) == [page for page in range(12) if not start <= page < end]
    assert [tuple(m)[:3] for m in space.mappings] == [tuple(m)[:3] for m in kernel.mappings(BDF)]
    assert all(m.vaddr - m.iova == memory - MIB for m in kernel.mappings(BDF))
    first, last = MIB + start * PAGE_SIZE, MIB + end * PAGE_SIZE - 1
    with pytest.raises(pyvfio.UnmapSizeError, match=f"IOVA {first:#x}-{last:#x} cannot"), space.guard.lock:
        space.cut_locked(MIB + start * PAGE_SIZE, (end - start) * PAGE_SIZE)
    space.unmap_all()
    kernel.munmap(memory, 12 * PAGE_SIZE)


def test_a_space_that_does_not_cut_says_how_one_is_made(space: Space, memory: int) -> None:
    """Nothing has changed."""
    space.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE)
    assert (space.can_cut, space.cut_opens_gap) == (False, False)
    words = rf"{space.guard.what} cannot unmap part of a mapping: 0x1000 bytes at 0x100000\. .*Ioas\(cut='pages'\)"
    with pytest.raises(pyvfio.UnsupportedError, match=words), space.guard.lock:
        space.cut_locked(MIB, PAGE_SIZE)
    assert [m.size for m in space.mappings] == [2 * PAGE_SIZE]


@pytest.mark.parametrize(
    "request_name",
    ["IOMMU_IOAS_ALLOC", "IOMMU_IOAS_COPY", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"],
)
def test_a_replacement_that_fails_leaves_everything_as_it_was(request_name: str) -> None:
    """The device stays in the old space, and the new one is gone."""
    with (
        FakeKernel("7.3", iommufd=True) as kernel,
        nothing_left(kernel),
        pyvfio.Ioas(kernel=kernel, cut="replace") as space,
    ):
        pyvfio.open_device(BDF, space=space)
        pyvfio.open_device("0000:00:03.0", space=space)
        memory = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, PRIVATE)
        space.map(vaddr=memory, iova=MIB, size=8 * PAGE_SIZE)
        number = space.id
        for nth in (1, 2) if request_name == "VFIO_DEVICE_ATTACH_IOMMUFD_PT" else (1,):
            kernel.fail(call="ioctl", request=request_name, nth=nth, errno=errno.ENOMEM)
            with pytest.raises(pyvfio.IoctlError), space.guard.lock:
                space.cut_locked(MIB, PAGE_SIZE)
            assert space.id == number
            assert [m.size for m in space.mappings] == [8 * PAGE_SIZE]
            assert reached(kernel, MIB) == list(range(8))
            assert len(kernel.mappings("0000:00:03.0")) == 1
        space.unmap_all()
        kernel.munmap(memory, 8 * PAGE_SIZE)


def test_a_mapper_that_is_to_cut_is_refused_at_once_where_the_space_cannot() -> None:
    """Without any block, too: the first one would only come later."""
    with (
        FakeKernel("7.3", iommufd=True) as kernel,
        pyvfio.Ioas(kernel=kernel) as space,
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pytest.raises(pyvfio.UnsupportedError, match="unmap part of a mapping"),
    ):
        pyvfio.DmaMapper(space, blocks, resize="cut")


def test_a_space_that_replaces_destroys_a_former_space_later_if_the_kernel_refuses() -> None:
    """The cut is made, and the mappings are what the kernel has. The next cut tries again."""
    with FakeKernel("7.3", iommufd=True) as kernel, pyvfio.Ioas(kernel=kernel, cut="replace") as space:
        pyvfio.open_device(BDF, space=space)
        with pyvfio.RamBlockList(kernel=kernel) as blocks, pyvfio.DmaMapper(space, blocks, resize="cut"):
            block = blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB)
            kernel.fail(call="ioctl", request="IOMMU_DESTROY", errno=errno.EBUSY)
            block.resize(3 * PAGE_SIZE)
            assert [mapping.size for mapping in kernel.mappings(BDF)] == [3 * PAGE_SIZE]
            assert [mapping.size for mapping in space.mappings] == [3 * PAGE_SIZE]
            assert kernel.pinned == 3 * PAGE_SIZE
            block.resize(2 * PAGE_SIZE)
            assert [call.errno for call in kernel.trace if call.request == "IOMMU_DESTROY"] == [errno.EBUSY, 0, 0]
            block.resize(PAGE_SIZE)  # and not once more: the number may be that of another object by then
            assert [call.errno for call in kernel.trace if call.request == "IOMMU_DESTROY"] == [errno.EBUSY, 0, 0, 0]
