"""The promises of VFIO_IOMMU_DIRTY_PAGES, and the bytes that it writes (kernel: `vfio_iommu_type1_dirty_pages`)."""

from __future__ import annotations

import ctypes
import errno
import struct

import pytest

from pyvfio import ioctls
from pyvfio.units import U64_MAX
from tests.contract.world import BAD_ADDRESS, BASE, NONE, PAGE, Attached, refused

START, STOP, GET = 1, 2, 4
FILL = 0xA5
KERNEL_ADDRESS = 0xFFFF_8000_0000_0000
NO_ADDRESS = 1 << 62  # between the addresses of a process and those of the kernel
WORDS = 8


class Bitmap:
    """`WORDS` words in this process, `FILL` in each byte."""

    def __init__(self, fill: int = FILL) -> None:
        self._buffer = ctypes.create_string_buffer(bytes([fill]) * WORDS * 8, WORDS * 8)

    @property
    def vaddr(self) -> int:
        """The address of the bitmap."""
        return ctypes.addressof(self._buffer)

    @property
    def words(self) -> tuple[int, ...]:
        """The words of the bitmap."""
        return struct.unpack(f"={WORDS}Q", self._buffer.raw)

    @property
    def untouched(self) -> bool:
        """Whether nobody has written to the bitmap."""
        return self._buffer.raw == bytes([FILL]) * WORDS * 8


def address_of(data: Bitmap | int) -> int:
    """Return the address of a bitmap, which the caller must keep alive."""
    return data if isinstance(data, int) else data.vaddr


UNTOUCHED = int.from_bytes(bytes([FILL]) * 8, "little")


def dirty(attached: Attached, flags: int, argsz: int = 8) -> None:
    """Call VFIO_IOMMU_DIRTY_PAGES with flags alone."""
    argument = bytearray(struct.pack("=II", argsz, flags))
    assert attached.world.ioctl(attached.container, ioctls.VFIO_IOMMU_DIRTY_PAGES, argument) == 0
    assert argument == struct.pack("=II", argsz, flags), "the kernel never writes to this structure"


def get(
    attached: Attached,
    data: Bitmap | int,
    *,
    iova: int = BASE,
    pages: int = 64,
    size: int | None = None,
    pgsize: int = PAGE,
    room: int = WORDS * 8,
    argsz: int = 48,
) -> None:
    """Read the dirty pages of a range into a bitmap of `room` bytes at `data`, by VFIO_IOMMU_DIRTY_PAGES."""
    length = pages * PAGE if size is None else size
    argument = bytearray(struct.pack("=IIQQQQQ", argsz, GET, iova, length, pgsize, room, address_of(data)))
    assert attached.world.ioctl(attached.container, ioctls.VFIO_IOMMU_DIRTY_PAGES, argument) == 0


def unmap_with_bitmap(
    attached: Attached,
    data: Bitmap | int,
    *,
    iova: int = BASE,
    pages: int = 64,
    pgsize: int = PAGE,
    room: int = WORDS * 8,
    argsz: int = 48,
) -> int:
    """Call VFIO_IOMMU_UNMAP_DMA with GET_DIRTY_BITMAP. Return the number of unmapped bytes."""
    argument = bytearray(struct.pack("=IIQQQQQ", argsz, 1, iova, pages * PAGE, pgsize, room, address_of(data)))
    before = bytes(argument)
    try:
        attached.world.ioctl(attached.container, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
    except OSError:
        assert argument == before, "a call that fails writes nothing back"
        raise
    assert bytes(argument[:16] + argument[24:]) == before[:16] + before[24:]
    size: int = struct.unpack_from("=Q", argument, 16)[0]
    return size


@pytest.fixture
def tracking(v2: Attached) -> Attached:
    """A container that tracks dirty pages."""
    dirty(v2, START)
    return v2


# ---------------------------------------------------------------------------------------------------- start and stop


def test_v1_has_no_dirty_tracking_and_says_so_before_it_looks_at_anything(v1: Attached) -> None:
    for argument in (BAD_ADDRESS, bytearray(8)):
        with refused(errno.EACCES):
            v1.world.ioctl(v1.container, ioctls.VFIO_IOMMU_DIRTY_PAGES, argument)


def test_tracking_can_be_started_and_stopped_twice(v2: Attached) -> None:
    for flags in (STOP, START, START, STOP, STOP):
        dirty(v2, flags)


@pytest.mark.parametrize("flags", [0, START | STOP, START | GET, STOP | GET, START | STOP | GET, 8, 1 << 31])
def test_exactly_one_flag_is_given(v2: Attached, flags: int) -> None:
    with refused(errno.EINVAL):
        dirty(v2, flags)


@pytest.mark.parametrize("argsz", [0, 7])
def test_a_short_argsz_is_einval(v2: Attached, argsz: int) -> None:
    with refused(errno.EINVAL):
        dirty(v2, START, argsz)


# ----------------------------------------------------------------------------------------------------- what is dirty


def test_every_mapped_page_is_dirty_each_time(tracking: Attached) -> None:
    tracking.map(size=3 * PAGE)
    for _ in range(2):
        bitmap = Bitmap()
        get(tracking, bitmap)
        assert bitmap.words == (0b111, *[UNTOUCHED] * (WORDS - 1))


def test_what_was_mapped_before_tracking_began_is_dirty_too(v2: Attached) -> None:
    v2.map(size=3 * PAGE)
    dirty(v2, START)
    bitmap = Bitmap()
    get(v2, bitmap)
    assert bitmap.words[0] == 0b111


def test_where_nothing_is_mapped_the_bitmap_is_not_touched(tracking: Attached) -> None:
    bitmap = Bitmap()
    get(tracking, bitmap)
    assert bitmap.untouched


def test_a_mapping_at_the_start_of_a_word_overwrites_it(tracking: Attached) -> None:
    tracking.map(iova=BASE + 64 * PAGE, size=2 * PAGE)
    bitmap = Bitmap()
    get(tracking, bitmap, pages=128)
    assert bitmap.words[:3] == (UNTOUCHED, 0b11, UNTOUCHED)


def test_a_mapping_inside_a_word_keeps_the_bits_that_are_there(tracking: Attached) -> None:
    tracking.map(iova=BASE + 4 * PAGE, size=2 * PAGE)
    bitmap = Bitmap()
    get(tracking, bitmap)
    assert bitmap.words[:2] == (UNTOUCHED | 0b110000, UNTOUCHED)


def test_a_mapping_across_two_words_overwrites_the_second(tracking: Attached) -> None:
    tracking.map(iova=BASE + 60 * PAGE, size=8 * PAGE)
    bitmap = Bitmap(0)
    get(tracking, bitmap, pages=128)
    assert bitmap.words[:3] == (0xF << 60, 0xF, 0)


def test_mappings_in_one_word_add_up(tracking: Attached) -> None:
    for page in (0, 3, 9):
        tracking.map(iova=BASE + page * PAGE)
    bitmap = Bitmap(0)
    get(tracking, bitmap)
    assert bitmap.words[0] == 0b1000001001


def test_bits_that_were_shifted_behind_a_mapping_come_out_again(tracking: Attached) -> None:
    # The kernel shifts the mapping's own bitmap, and clears only as many bits as the mapping has pages.
    tracking.map(iova=BASE + 16 * PAGE, size=4 * PAGE)
    first, second = Bitmap(0), Bitmap(0)
    get(tracking, first)
    get(tracking, second, iova=BASE + 16 * PAGE)
    assert (first.words[0], second.words[0]) == (0xF0000, 0xF000F)


def test_even_the_callers_own_bits_come_out_again(tracking: Attached) -> None:
    tracking.map(iova=BASE + 4 * PAGE, size=2 * PAGE)
    get(tracking, Bitmap())
    bitmap = Bitmap(0)
    get(tracking, bitmap, iova=BASE + 4 * PAGE)
    assert bitmap.words[0] == (UNTOUCHED | 0b110000) & ~0b11 | 0b11


def test_a_new_start_has_forgotten_them(tracking: Attached) -> None:
    tracking.map(iova=BASE + 16 * PAGE, size=4 * PAGE)
    get(tracking, Bitmap(0))
    dirty(tracking, STOP)
    dirty(tracking, START)
    bitmap = Bitmap(0)
    get(tracking, bitmap, iova=BASE + 16 * PAGE)
    assert bitmap.words[0] == 0xF


# ------------------------------------------------------------------------------------------------------- its refusals


def test_without_tracking_there_is_nothing_to_get(v2: Attached) -> None:
    with refused(errno.EINVAL):
        get(v2, Bitmap())


@pytest.mark.parametrize("argsz", [8, 47])
def test_the_range_has_to_be_there(tracking: Attached, argsz: int) -> None:
    with refused(errno.EINVAL):
        get(tracking, Bitmap(), argsz=argsz)


@pytest.mark.parametrize(
    ("pages", "room"), [(64, 0), (65, 8), (64, 7), (1, 7), (129, 16), (64, (1 << 28) + 8), (0, WORDS * 8)]
)
def test_the_bitmap_has_whole_words_enough_and_256_mib_at_most(tracking: Attached, pages: int, room: int) -> None:
    with refused(errno.EINVAL):
        get(tracking, Bitmap(), pages=pages, room=room)


@pytest.mark.parametrize("data", [(1 << 47) - PAGE, 1 << 47, 1 << 62])
def test_the_bitmap_has_an_address_of_a_process(tracking: Attached, data: int) -> None:
    """With page tables of four levels. The last page is no valid address."""
    get(tracking, (1 << 47) - 2 * PAGE)  # nothing is written
    with refused(errno.EINVAL):
        get(tracking, data)


@pytest.mark.parametrize("pgsize", [0, 1, 2 * PAGE, PAGE // 2, 1 << 21, 3 * PAGE])
def test_a_bit_is_the_smallest_page(tracking: Attached, pgsize: int) -> None:
    with refused(errno.EINVAL):
        get(tracking, Bitmap(), pgsize=pgsize)


@pytest.mark.parametrize(("iova", "size"), [(BASE + 1, PAGE), (BASE, PAGE + 1)])
def test_the_range_is_aligned(tracking: Attached, iova: int, size: int) -> None:
    with refused(errno.EINVAL):
        get(tracking, Bitmap(), iova=iova, size=size)


@pytest.mark.parametrize(("first", "pages"), [(1, 9), (0, 3), (2, 1)])
def test_no_mapping_is_cut(tracking: Attached, first: int, pages: int) -> None:
    tracking.map(size=4 * PAGE)
    bitmap = Bitmap()
    with refused(errno.EINVAL):
        get(tracking, bitmap, iova=BASE + first * PAGE, pages=pages)
    assert bitmap.untouched


def test_a_range_that_wraps_is_einval_and_eoverflow_in_7_3(tracking: Attached) -> None:
    with refused(errno.EOVERFLOW if tracking.world.since(7, 0) else errno.EINVAL):
        get(tracking, Bitmap(), iova=U64_MAX - PAGE + 1, pages=2)


def test_a_range_may_end_at_2_to_the_64_in_7_3_only(tracking: Attached) -> None:
    if tracking.world.since(7, 0):
        get(tracking, Bitmap(), iova=U64_MAX - PAGE + 1, pages=1)
        return
    with refused(errno.EINVAL):
        get(tracking, Bitmap(), iova=U64_MAX - PAGE + 1, pages=1)


def test_a_bitmap_at_an_address_of_the_kernel_is_einval_and_one_that_is_nowhere_efault(tracking: Attached) -> None:
    tracking.map()
    for address in (KERNEL_ADDRESS, NO_ADDRESS):
        with refused(errno.EINVAL):
            get(tracking, address)
    with refused(errno.EFAULT):
        get(tracking, BAD_ADDRESS)
    with refused(errno.EFAULT):
        unmap_with_bitmap(tracking, BAD_ADDRESS)
    assert tracking.unmap() == PAGE


def test_a_bitmap_that_is_nowhere_does_no_harm_where_nothing_is_mapped(tracking: Attached) -> None:
    get(tracking, BAD_ADDRESS)
    assert unmap_with_bitmap(tracking, BAD_ADDRESS) == 0


# ------------------------------------------------------------------------------------------------ unmap with a bitmap


def test_unmapping_says_which_pages_were_dirty(tracking: Attached) -> None:
    tracking.map(iova=BASE + PAGE, size=2 * PAGE)
    tracking.map(iova=BASE + 64 * PAGE)
    bitmap = Bitmap(0)
    assert unmap_with_bitmap(tracking, bitmap, pages=128) == 3 * PAGE
    assert bitmap.words[:3] == (0b110, 1, 0)
    assert tracking.unmap_all() == 0


def test_what_was_reported_before_the_bitmap_ended_is_unmapped_though_the_call_fails(tracking: Attached) -> None:
    memory = tracking.world.memory(2 * PAGE)
    tracking.world.kernel.mprotect(memory + PAGE, PAGE, NONE)
    tracking.map()
    tracking.map(iova=BASE + 64 * PAGE)
    with refused(errno.EFAULT):
        unmap_with_bitmap(tracking, memory + PAGE - 8, pages=128)
    assert tracking.unmap_all() == PAGE


@pytest.mark.parametrize("argsz", [24, 47])
def test_unmapping_with_a_bitmap_has_a_longer_structure(tracking: Attached, argsz: int) -> None:
    with refused(errno.EINVAL):
        unmap_with_bitmap(tracking, Bitmap(), argsz=argsz)


def test_unmapping_with_a_bitmap_needs_tracking_and_the_smallest_page(v2: Attached) -> None:
    v2.map()
    with refused(errno.EINVAL):
        unmap_with_bitmap(v2, Bitmap())
    dirty(v2, START)
    with refused(errno.EINVAL):
        unmap_with_bitmap(v2, Bitmap(), pgsize=2 * PAGE)
    with refused(errno.EINVAL):
        unmap_with_bitmap(v2, Bitmap(), room=4)
    with refused(errno.EINVAL):
        unmap_with_bitmap(v2, KERNEL_ADDRESS)
    assert unmap_with_bitmap(v2, Bitmap()) == PAGE
