"""Segments of mapped memory for scatter-gather and PRP lists, and the IOVA of a part of a block."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvfio
from pyvfio.mapper.segments import Limits, Segment, cut, join
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import KIB, MIB, PAGE_SIZE
from tests.unit.fakes import Rig, SpecialKernel, nothing_left

HIGH = 5 << 30


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with two devices, in two groups."""
    with SpecialKernel() as made:
        yield made


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """A mapper that follows a list, in the container of a device; nothing is left of it in the end."""
    with nothing_left(kernel), Rig(kernel) as made:
        yield made
        made.check()


def granular(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
    """A mapper whose pieces are pages."""
    return pyvfio.DmaMapper(container, blocks, resize="extend", granule=PAGE_SIZE)


# ------------------------------------------------------------------------------------------------------------- cutting


@given(
    iova=st.integers(0, 1 << 14),
    size=st.integers(1, 1 << 12),
    max_segment=st.none() | st.integers(1, 1 << 11),
    boundary=st.none() | st.sampled_from([1 << bit for bit in range(2, 13)]),
)
def test_segments_cover_the_range_within_both_limits_and_are_the_fewest(
    iova: int, size: int, max_segment: int | None, boundary: int | None
) -> None:
    """Greedy cutting byte by byte is the model."""
    model: list[tuple[int, int]] = []
    for address in range(iova, iova + size):
        full = not model or model[-1][1] == max_segment or (boundary is not None and address % boundary == 0)
        if full:
            model.append((address, 1))
        else:
            model[-1] = (model[-1][0], model[-1][1] + 1)
    assert cut(iova, size, Limits.checked(max_segment, boundary)) == model


def test_ranges_that_are_neighbours_in_iova_are_one() -> None:
    """In the order of the bytes, not of the IOVAs."""
    assert join([(0x1000, 0x1000), (0x2000, 0x800), (0x9000, 1), (0x8000, 0x1000)]) == [
        (0x1000, 0x1800),
        (0x9000, 1),
        (0x8000, 0x1000),
    ]


def test_a_range_that_ends_at_2_64_is_cut_as_any_other() -> None:
    """Python's numbers do not wrap."""
    assert cut((1 << 64) - 0x1800, 0x1800, Limits(None, 0x1000)) == [
        ((1 << 64) - 0x1800, 0x800),
        ((1 << 64) - 0x1000, 0x1000),
    ]


# ---------------------------------------------------------------------------------------------------- of mapped memory


def test_a_block_is_one_segment_however_many_pieces_it_has(kernel: FakeKernel) -> None:
    """Its IOVA has no gaps."""
    with nothing_left(kernel), Rig(kernel, mapper=granular) as rig:
        block = rig.add(used=16 * PAGE_SIZE)
        assert len(rig.reached()) == 16
        assert rig.mapper.segments(block) == [(rig.mapper.iova(block), 16 * PAGE_SIZE)]


def test_a_prp_list_has_an_entry_for_each_page(rig: Rig) -> None:
    """The first may begin inside of a page, and the last end there."""
    block = rig.add(used=64 * PAGE_SIZE)
    iova = rig.mapper.iova(block)
    assert rig.mapper.segments(block, 0x1080, 2 * PAGE_SIZE, boundary=PAGE_SIZE) == [
        (iova + 0x1080, 0xF80),
        (iova + 0x2000, PAGE_SIZE),
        (iova + 0x3000, 0x80),
    ]


def test_a_mapping_a_buffer_and_a_part_of_either_have_the_same_segments(rig: Rig) -> None:
    """A part by offset and size, or as a slice."""
    memory = mmap.mmap(-1, 8 * PAGE_SIZE)
    with rig.mapper.map_buffer(memory) as mapping:
        wanted = [(mapping.iova + 3 * KIB, 5 * KIB)]
        part = memoryview(memory)[3 * KIB : 8 * KIB]
        assert rig.mapper.segments(mapping, 3 * KIB, 5 * KIB) == wanted
        assert rig.mapper.segments(memory, 3 * KIB, 5 * KIB) == wanted
        assert rig.mapper.segments(part) == wanted
        assert rig.mapper.segments(np.frombuffer(part, dtype=np.uint32).data, np.uint8(0)) == wanted
        part.release()
    memory.close()


def test_a_temporary_mapping_has_segments_until_it_is_closed(rig: Rig) -> None:
    """Given as itself: its memory may be mapped more than once."""
    with mmap.mmap(-1, 2 * PAGE_SIZE) as memory:
        mapping = rig.mapper.map_temporary(memory)
        assert rig.mapper.segments(mapping, PAGE_SIZE) == [(mapping.iova + PAGE_SIZE, PAGE_SIZE)]
        with pytest.raises(LookupError, match="pass the DmaMapping itself"):
            rig.mapper.segments(memory)
        mapping.close()
        with pytest.raises(pyvfio.ClosedError, match=r"DmaMapping.*closed"):
            rig.mapper.segments(mapping)
        rig.mapper.reset_temporary()


@pytest.mark.parametrize("places", [(HIGH, HIGH + PAGE_SIZE), (HIGH + PAGE_SIZE, HIGH)], ids=["in order", "swapped"])
def test_memory_of_two_mappings_is_walked(rig: Rig, places: tuple[int, int]) -> None:
    """Neighbours in IOVA are one segment, others stay two, in the order of the bytes."""
    memory = mmap.mmap(-1, 2 * PAGE_SIZE)
    halves = [memoryview(memory)[:PAGE_SIZE], memoryview(memory)[PAGE_SIZE:]]
    held = [rig.mapper.map_buffer(half, iova=iova) for half, iova in zip(halves, places, strict=True)]
    first, second = (mapping.iova for mapping in held)
    assert (first, second) == places
    one = [(first, 2 * PAGE_SIZE)]
    assert rig.mapper.segments(memory) == (one if first < second else [(first, PAGE_SIZE), (second, PAGE_SIZE)])
    held[1].close()
    with pytest.raises(LookupError, match="0x1000 bytes at vaddr"):
        rig.mapper.segments(memory)
    held[0].close()
    for half in halves:
        half.release()
    memory.close()


def test_a_view_of_a_block_and_its_neighbour_that_is_mapped_are_walked(kernel: FakeKernel) -> None:
    """A block whose middle is discarded has segments on both sides, and none across."""
    with nothing_left(kernel), Rig(kernel, mapper=granular) as rig:
        block = rig.add(used=8 * PAGE_SIZE)
        iova = rig.mapper.iova(block)
        block.discard(2 * PAGE_SIZE, PAGE_SIZE)
        view = block.view()
        assert rig.mapper.segments(view[3 * PAGE_SIZE :]) == [(iova + 3 * PAGE_SIZE, 5 * PAGE_SIZE)]
        with pytest.raises(LookupError, match="not mapped for the device"):
            rig.mapper.segments(view)
        view.release()


# ------------------------------------------------------------------------------------------------- the IOVA of a part


def test_the_iova_of_a_part_is_as_far_from_the_start_as_the_part(rig: Rig) -> None:
    """Whatever the length of the block, its own IOVA is known."""
    block, empty = rig.add(used=2 * PAGE_SIZE), rig.add("empty", used=0)
    iova = rig.mapper.iova(block)
    assert rig.mapper.iova(block, 0x123) == iova + 0x123
    assert rig.mapper.iova(block, PAGE_SIZE, PAGE_SIZE) == iova + PAGE_SIZE
    assert rig.mapper.iova(block, size=2 * PAGE_SIZE) == rig.mapper.iova(block, np.int64(0)) == iova
    assert rig.mapper.iova(empty) > iova


Use = Callable[..., object]


@pytest.fixture(params=["iova", "segments"])
def use(request: pytest.FixtureRequest, rig: Rig) -> Use:
    """Both calls refuse the same parts of a block."""
    call: Use = getattr(rig.mapper, request.param)
    return call


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (2 * PAGE_SIZE, 1, "bytes 0x2000-0x2000 are outside of the 0x2000 bytes of RAM block 'ring' that are in use"),
        (PAGE_SIZE, PAGE_SIZE + 1, "bytes 0x1000-0x2000 are outside"),
        (-1, 1, "offset must be at least 0"),
        (0, 0, "size at least 1 byte, not 0 and 0"),
        (0, -1, "size at least 1 byte, not 0 and -1"),
        (MIB, None, "0x100000.* (are outside|is behind the last) of the 0x2000 bytes"),
    ],
)
def test_a_part_that_is_not_in_use_is_refused(rig: Rig, use: Use, offset: int, size: int | None, message: str) -> None:
    """ValueError with the numbers, and no system call."""
    block = rig.add(used=2 * PAGE_SIZE)
    rig.kernel.clear_trace()
    with pytest.raises(ValueError, match=message):
        use(block, offset, size)
    assert not rig.kernel.trace


def test_a_part_that_is_discarded_is_refused(rig: Rig, use: Use) -> None:
    """No device reaches it. Next to it there are IOVAs."""
    block = rig.add(used=4 * PAGE_SIZE)
    block.discard(PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(ValueError, match=r"bytes 0x1000-0x1fff of RAM block 'ring' are discarded.*populate"):
        use(block, 0, 3 * PAGE_SIZE)
    assert use(block, 2 * PAGE_SIZE, 2 * PAGE_SIZE)


def test_a_part_that_a_failed_change_has_left_unmapped_is_refused(rig: Rig, use: Use) -> None:
    """The block has it, and the device does not reach it."""
    block = rig.add()
    for nth in (1, 2):
        rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=nth, errno=errno.EFAULT)
    with pytest.raises(pyvfio.RollbackError):
        block.resize(4 * PAGE_SIZE)
    with pytest.raises(LookupError, match="resize the block again"):
        use(block, 0, PAGE_SIZE)
    block.resize(4 * PAGE_SIZE)
    assert use(block, 0, PAGE_SIZE)


@pytest.mark.parametrize("wrong", ["1", 1.0, True, object()], ids=["str", "float", "bool", "object"])
def test_numbers_of_the_wrong_class_are_type_errors(rig: Rig, wrong: object) -> None:
    """Each of them by its name."""
    block = rig.add()
    for name in ("offset", "size"):
        for call in (rig.mapper.iova, rig.mapper.segments):
            with pytest.raises(TypeError, match=f"{name} must be a whole number"):
                partial(call, block, **{name: wrong})()  # type: ignore[arg-type]
    for name in ("max_segment", "boundary"):
        with pytest.raises(TypeError, match=f"{name} must be a whole number"):
            partial(rig.mapper.segments, block, **{name: wrong})()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_segment": 0}, "max_segment must be at least 1 byte, not 0"),
        ({"max_segment": -4096}, "max_segment must be at least 1 byte"),
        ({"boundary": 0}, "boundary must be a power of two, not 0"),
        ({"boundary": 3}, "boundary must be a power of two, not 3"),
        ({"boundary": -2}, "boundary must be a power of two"),
    ],
)
def test_limits_that_can_never_be_right_are_value_errors(rig: Rig, limits: dict[str, int], message: str) -> None:
    """Also where the memory would be one segment."""
    with pytest.raises(ValueError, match=message):
        rig.mapper.segments(rig.add(), **limits)


def test_memory_that_has_no_segments_here_is_refused(rig: Rig) -> None:
    """Each kind with its own reason."""
    segments = rig.mapper.segments
    with pytest.raises(TypeError):
        segments(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="read-only"):
        segments(bytes(16))
    with pytest.raises(LookupError):
        segments(bytearray(PAGE_SIZE))
    with pytest.raises(ValueError, match=r"offset 0x0 is behind the last of the 0x0 bytes"):
        segments(rig.add("empty", used=0))
    with pyvfio.DmaMapper(rig.container) as other, mmap.mmap(-1, PAGE_SIZE) as memory:
        with other.map_buffer(memory) as mapping, pytest.raises(ValueError, match="another mapper has made"):
            segments(mapping)
        with pytest.raises(ValueError, match="this mapper does not follow"):
            other.segments(rig.add())


def test_a_mapping_that_another_user_of_the_space_has_unmapped_has_no_segments(rig: Rig) -> None:
    """Its IOVA leads nowhere."""
    with mmap.mmap(-1, PAGE_SIZE) as memory:
        mapping = rig.mapper.map_buffer(memory)
        rig.container.unmap(iova=mapping.iova, size=PAGE_SIZE)
        with pytest.raises(LookupError, match="another user of the space"):
            rig.mapper.segments(mapping)
        mapping.close()


@pytest.mark.parametrize("lost", [False, True], ids=["closed", "lost"])
def test_a_mapper_that_is_closed_has_no_segments(kernel: SpecialKernel, *, lost: bool) -> None:
    """Nor has one whose container lost its group: of a block, of a buffer, and of no part at all."""
    with nothing_left(kernel), mmap.mmap(-1, PAGE_SIZE) as memory:
        rig = Rig(kernel)
        block, mapping = rig.add(), rig.mapper.map_buffer(memory)
        vaddr = block.vaddr
        (rig.device.close if lost else rig.mapper.close)()
        uses: list[Callable[[], object]] = [
            lambda: rig.mapper.segments(block),
            lambda: rig.mapper.segments(mapping),
            lambda: rig.mapper.segments(memory),
            lambda: rig.mapper.segment_arrays(block, [0], PAGE_SIZE),
            lambda: rig.mapper.segment_arrays(mapping, [0], PAGE_SIZE),
            lambda: rig.mapper.segment_arrays(memory, [0], PAGE_SIZE),
            lambda: rig.mapper.segment_arrays(memory, []),
            lambda: rig.mapper.translate_vaddrs([vaddr]),
            lambda: rig.mapper.translate_vaddrs(np.array([vaddr])),
            lambda: rig.mapper.translate_vaddrs([]),
        ]
        for use in uses:
            with pytest.raises(pyvfio.VfioError, match="its last group was detached" if lost else "has been closed"):
                use()
        rig.close()


def test_segments_are_pairs_of_plain_numbers(rig: Rig) -> None:
    """As struct.pack and ctypes take them."""
    found: list[Segment] = rig.mapper.segments(rig.add(), boundary=PAGE_SIZE)
    assert {type(number) for pair in found for number in pair} == {int}
    assert {type(pair) for pair in found} == {tuple}
