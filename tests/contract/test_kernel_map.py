"""The promises of VFIO_IOMMU_MAP_DMA: refusals, their order, and locked memory (kernel: `vfio_dma_do_map`)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest

from pyvfio import ioctls
from pyvfio.kernel import Kernel
from pyvfio.units import MIB, U64_MAX, align_up
from tests.contract.world import (
    BASE,
    BOTH,
    NONE,
    NULL,
    PAGE,
    PRIVATE,
    READ,
    WRITE,
    Attached,
    World,
    refused,
)

VADDR_FLAG = 4
MAP_SHARED = 1
MAP_FIXED = 0x10
MADV_DONTNEED = 4
MADV_HUGEPAGE = 14
LAST_PAGE = U64_MAX - PAGE + 1


def overflow(world: World) -> int:
    """Return the errno for iova + size beyond 2^64."""
    return errno.EOVERFLOW if world.since(7, 0) else errno.EINVAL


def test_iova_0_can_be_mapped(v2: Attached) -> None:
    v2.map(iova=0)
    assert v2.unmap(iova=0) == PAGE


def test_v1_maps_and_unmaps_as_v2(v1: Attached) -> None:
    v1.map(size=2 * PAGE)
    assert v1.unmap(size=2 * PAGE) == 2 * PAGE


@pytest.mark.parametrize("argsz", [0, 31])
def test_a_short_argsz_is_einval(v2: Attached, argsz: int) -> None:
    with refused(errno.EINVAL):
        v2.map(argsz=argsz)


def test_a_longer_argsz_is_fine(v2: Attached) -> None:
    v2.map(argsz=1 << 20)


@pytest.mark.parametrize("flags", [0, 8, 1 << 31, READ | 8, READ | VADDR_FLAG, BOTH | VADDR_FLAG])
def test_other_flags_than_read_and_write_are_einval(v2: Attached, flags: int) -> None:
    with refused(errno.EINVAL):
        v2.map(flags=flags)


@pytest.mark.parametrize("flags", [READ, WRITE, BOTH])
def test_reading_writing_and_both_can_be_had(v2: Attached, flags: int) -> None:
    v2.map(flags=flags)


def test_size_0_is_einval(v2: Attached) -> None:
    with refused(errno.EINVAL):
        v2.map(size=0, vaddr=v2.world.memory())


@pytest.mark.parametrize(("iova", "shift", "size"), [(1, 0, 0), (0, 1, 0), (0, 0, 1), (PAGE // 2, 0, 0)])
def test_addresses_and_size_are_multiples_of_the_smallest_page(v2: Attached, iova: int, shift: int, size: int) -> None:
    with refused(errno.EINVAL):
        v2.map(iova=BASE + iova, vaddr=v2.world.memory(3 * PAGE) + shift, size=PAGE + size)


def test_an_iova_that_wraps_is_einval_and_eoverflow_in_7_3(v2: Attached) -> None:
    with refused(overflow(v2.world)):
        v2.map(iova=LAST_PAGE, size=2 * PAGE)


def test_a_vaddr_that_wraps_is_einval_and_eoverflow_in_7_3(v2: Attached) -> None:
    with refused(overflow(v2.world)):
        v2.map(vaddr=LAST_PAGE, size=2 * PAGE)


def test_7_3_finds_the_wrap_before_flags_and_alignment(v2: Attached) -> None:
    for flags, iova in ((0, LAST_PAGE), (READ, LAST_PAGE + 1)):
        with refused(overflow(v2.world)):
            v2.map(iova=iova, flags=flags, size=2 * PAGE)


@pytest.mark.parametrize(("start", "pages"), [(0, 4), (-1, 2), (3, 2), (1, 1), (-1, 6), (0, 1), (3, 1)])
def test_any_overlap_is_eexist(v2: Attached, start: int, pages: int) -> None:
    v2.map(size=4 * PAGE)
    with refused(errno.EEXIST):
        v2.map(iova=BASE + start * PAGE, size=pages * PAGE)


def test_neighbours_do_not_overlap(v2: Attached) -> None:
    for page in (1, 0, 2):
        v2.map(iova=BASE + page * PAGE)
    assert v2.unmap(size=3 * PAGE) == 3 * PAGE


def test_the_same_memory_can_be_mapped_twice(v2: Attached) -> None:
    v2.map(vaddr=v2.map(), iova=0)


def test_a_mapping_ends_where_its_range_ends(v2: Attached) -> None:
    for span in v2.ranges():
        last_page = span.last - PAGE + 1
        with refused(errno.EINVAL, errno.EOVERFLOW):
            v2.map(iova=last_page, size=2 * PAGE)
        v2.map(iova=last_page)


def test_a_mapping_does_not_span_the_hole_between_two_ranges(v2: Attached) -> None:
    first, second = v2.ranges()[:2]
    with refused(errno.EINVAL):
        v2.map(iova=first.last + 1)
    with refused(errno.EINVAL):
        v2.map(iova=first.last + 1 - PAGE, size=second.start - first.last - 1 + 2 * PAGE, vaddr=v2.world.memory())
    v2.map(iova=second.start)


def test_a_full_table_is_enospc_until_a_mapping_goes(v2: Attached) -> None:
    vaddr = v2.world.memory()
    avail = v2.avail()
    for entry in range(avail):
        v2.map(iova=BASE + entry * PAGE, vaddr=vaddr)
    assert v2.avail() == 0
    with refused(errno.ENOSPC):
        v2.map(iova=0)
    v2.unmap()
    v2.map(iova=0)


def test_eexist_comes_before_enospc_and_enospc_before_a_bad_range_and_that_before_efault(v2: Attached) -> None:
    vaddr = v2.world.memory()
    hole = v2.ranges()[0].last + 1
    with refused(errno.EINVAL):
        v2.map(iova=hole, vaddr=NULL)
    for entry in range(v2.avail()):
        v2.map(iova=BASE + entry * PAGE, vaddr=vaddr)
    with refused(errno.ENOSPC):
        v2.map(iova=hole)
    with refused(errno.EEXIST):
        v2.map(iova=BASE, vaddr=NULL)
    with refused(errno.EINVAL):
        v2.map(iova=BASE, flags=0)


# ------------------------------------------------------------------------------------------------ memory: EFAULT


@pytest.mark.parametrize("vaddr", [NULL, PAGE, 1 << 47, 1 << 62, 0xFFFF_8000_0000_0000, LAST_PAGE])
def test_memory_that_is_not_this_process_s_is_efault(v2: Attached, vaddr: int) -> None:
    with refused(errno.EFAULT):
        v2.map(vaddr=vaddr)


@pytest.mark.parametrize(
    ("protection", "flags"), [(NONE, READ), (NONE, WRITE), (READ, WRITE), (READ, BOTH), (WRITE, READ)]
)
def test_the_process_needs_the_rights_that_the_device_gets(v2: Attached, protection: int, flags: int) -> None:
    with refused(errno.EFAULT):
        v2.map(vaddr=v2.world.memory(protection=protection), flags=flags)


@pytest.mark.parametrize(("protection", "flags"), [(READ, READ), (WRITE, WRITE), (WRITE, BOTH), (BOTH, READ)])
def test_no_more_rights_than_those_are_needed(v2: Attached, protection: int, flags: int) -> None:
    v2.map(vaddr=v2.world.memory(protection=protection), flags=flags)


def test_a_hole_in_the_memory_is_efault_and_nothing_stays_mapped_or_locked(v2: Attached) -> None:
    vaddr, before, avail = v2.world.memory(4 * PAGE), v2.locked(), v2.avail()
    v2.world.kernel.munmap(vaddr + 2 * PAGE, PAGE)
    with refused(errno.EFAULT):
        v2.map(vaddr=vaddr, size=4 * PAGE)
    assert (v2.locked(), v2.avail()) == (before, avail)
    v2.map(vaddr=vaddr, size=2 * PAGE)


def test_a_shared_file_is_mapped_up_to_its_end_and_no_further(v2: Attached) -> None:
    kernel = v2.world.kernel
    fd = os.memfd_create("contract")
    os.ftruncate(fd, PAGE)
    vaddr = kernel.mmap(0, 2 * PAGE, BOTH, MAP_SHARED, fd=fd)
    os.close(fd)
    with refused(errno.EFAULT):
        v2.map(vaddr=vaddr, size=2 * PAGE)
    v2.map(vaddr=vaddr)
    v2.unmap()
    kernel.munmap(vaddr, 2 * PAGE)


def test_memory_may_have_been_joined_from_several_areas(v2: Attached) -> None:
    vaddr = v2.world.memory(2 * PAGE)
    v2.world.kernel.mmap(vaddr + PAGE, PAGE, BOTH, MAP_SHARED | 0x20 | 0x10)
    v2.map(vaddr=vaddr, size=2 * PAGE)


# ------------------------------------------------------------------------------------------------ memory: the limit


def test_each_mapping_is_charged_and_unmapping_gives_it_back(v2: Attached) -> None:
    before = v2.locked()
    vaddr = v2.map(size=4 * PAGE)
    v2.map(iova=0, vaddr=vaddr, size=4 * PAGE)
    assert v2.locked() == before + 8 * PAGE
    assert v2.unmap(iova=0, size=4 * PAGE) == 4 * PAGE
    assert v2.locked() == before + 4 * PAGE


def test_the_limit_itself_is_reached_and_one_page_more_is_enomem(v2: Attached) -> None:
    with v2.world.memlock(v2.locked() + 4 * PAGE):
        v2.map(size=3 * PAGE)
        with refused(errno.ENOMEM):
            v2.map(iova=0, size=2 * PAGE)
        v2.map(iova=0)


def test_a_limit_counts_whole_pages(v2: Attached) -> None:
    with v2.world.memlock(v2.locked() + 2 * PAGE - 1):
        with refused(errno.ENOMEM):
            v2.map(size=2 * PAGE)
        v2.map()


def test_what_was_refused_for_the_limit_is_wholly_undone(v2: Attached) -> None:
    before, avail = v2.locked(), v2.avail()
    with v2.world.memlock(before + 4 * PAGE):
        with refused(errno.ENOMEM):
            v2.map(size=64 * PAGE)
        assert (v2.locked(), v2.avail()) == (before, avail)
        v2.map(size=4 * PAGE)


def test_a_mapping_beyond_a_lowered_limit_is_refused_and_those_that_are_there_stay(v2: Attached) -> None:
    v2.map(size=4 * PAGE)
    with v2.world.memlock(PAGE):
        with refused(errno.ENOMEM):
            v2.map(iova=0)
        assert v2.unmap(size=4 * PAGE) == 4 * PAGE


@pytest.mark.parametrize("limit", [2 * PAGE, 3 * PAGE - 1])
@pytest.mark.parametrize(("bad", "expected"), [(1, errno.EFAULT), (2, errno.EFAULT), (3, errno.ENOMEM)])
def test_whichever_page_comes_first_decides_between_enomem_and_efault(
    v2: Attached, bad: int, expected: int, limit: int
) -> None:
    vaddr = v2.world.memory(8 * PAGE)
    v2.world.kernel.mprotect(vaddr + bad * PAGE, PAGE, NONE)
    with v2.world.memlock(v2.locked() + limit), refused(expected):
        v2.map(vaddr=vaddr, size=8 * PAGE)


def test_a_file_descriptor_is_not_memory(v2: Attached) -> None:
    with refused(errno.EBADF):
        v2.world.kernel.mmap(0, PAGE, BOTH, PRIVATE & ~0x20, fd=1000)


def test_who_may_lock_any_amount_is_charged_all_the_same(v2: Attached) -> None:
    before = v2.locked()
    with v2.world.memlock(PAGE, privileged=True):
        v2.map(size=4 * PAGE)
    assert v2.locked() == before + 4 * PAGE


def test_a_mapping_of_who_might_lock_any_amount_is_unmapped_by_who_may_not(v2: Attached) -> None:
    before = v2.locked()
    v2.map(size=4 * PAGE)
    with v2.world.memlock(before):
        assert v2.unmap(size=4 * PAGE) == 4 * PAGE
        with refused(errno.ENOMEM):
            v2.map()
    assert v2.locked() == before


def test_two_mib_of_huge_pages_are_charged_as_512_pages_and_not_unmapped_in_part(v2: Attached) -> None:
    before = v2.locked()
    memory = v2.world.memory(4 * MIB)
    vaddr = align_up(memory, 2 * MIB)
    v2.world.kernel.madvise(vaddr, 2 * MIB, MADV_HUGEPAGE)
    ctypes.memset(vaddr, 1, 2 * MIB)
    v2.map(iova=2 * MIB, vaddr=vaddr, size=2 * MIB)
    assert v2.locked() == before + 2 * MIB
    with refused(errno.EINVAL):
        v2.unmap(iova=2 * MIB)
    assert v2.unmap(iova=2 * MIB, size=2 * MIB) == 2 * MIB
    assert v2.locked() == before


# -------------------------------------------------------------------------------------------- memory: that of a device


@pytest.fixture
def bar(v2: Attached) -> Iterator[int]:
    """Four pages of the device's BAR 0 in this process's memory, between two pages of the process."""
    device = v2.world.open_device(v2.group)
    kernel, size = v2.world.kernel, 6 * PAGE
    vaddr = kernel.mmap(0, size, BOTH, PRIVATE)
    kernel.mmap(vaddr + PAGE, 4 * PAGE, BOTH, MAP_SHARED | MAP_FIXED, fd=device, offset=0)
    yield vaddr + PAGE
    kernel.munmap(vaddr, size)
    v2.world.forgive()


@pytest.mark.parametrize("flags", [READ, WRITE, BOTH])
def test_a_bar_can_be_mapped_and_is_charged_to_nobody(v2: Attached, bar: int, flags: int) -> None:
    before = v2.locked()
    with v2.world.memlock(before):
        v2.map(vaddr=bar, size=4 * PAGE, flags=flags)
    assert v2.locked() == before
    assert v2.unmap(size=4 * PAGE) == 4 * PAGE
    assert v2.locked() == before


def test_of_memory_and_a_bar_in_one_mapping_the_memory_is_charged(v2: Attached, bar: int) -> None:
    before = v2.locked()
    with v2.world.memlock(before + 2 * PAGE):
        v2.map(vaddr=bar - PAGE, size=6 * PAGE)
        assert v2.locked() == before + 2 * PAGE
        with refused(errno.ENOMEM):
            v2.map(iova=0)
    assert v2.unmap(size=6 * PAGE) == 6 * PAGE
    assert v2.locked() == before


def test_a_bar_does_not_hide_the_limit_from_the_memory_behind_it(v2: Attached, bar: int) -> None:
    before, avail = v2.locked(), v2.avail()
    with v2.world.memlock(before + PAGE), refused(errno.ENOMEM):
        v2.map(vaddr=bar - PAGE, size=6 * PAGE)
    assert (v2.locked(), v2.avail()) == (before, avail)


def test_a_bar_needs_the_rights_that_the_device_gets(v2: Attached, bar: int) -> None:
    v2.world.kernel.mprotect(bar, PAGE, READ)
    with refused(errno.EFAULT):
        v2.map(vaddr=bar)
    v2.map(vaddr=bar, flags=READ)
    assert v2.unmap() == PAGE


# --------------------------------------------------------------------------------------- memory: what nobody wrote yet


def test_never_written_memory_that_is_only_read_is_charged_since_6_2(v2: Attached) -> None:
    # Before that, the device gets the shared zero page, which belongs to nobody.
    before = v2.locked()
    charged = 4 * PAGE if v2.world.since(6, 2) else 0
    v2.map(size=4 * PAGE, flags=READ)
    assert v2.locked() == before + charged
    assert v2.unmap(size=4 * PAGE) == 4 * PAGE
    assert v2.locked() == before


def test_what_was_written_is_charged_page_by_page(v2: Attached) -> None:
    before = v2.locked()
    vaddr = v2.world.memory(4 * PAGE)
    ctypes.memset(vaddr + PAGE, 1, 2 * PAGE)
    v2.map(vaddr=vaddr, size=4 * PAGE, flags=READ)
    assert v2.locked() == before + (4 if v2.world.since(6, 2) else 2) * PAGE
    ctypes.memset(vaddr, 1, PAGE)
    v2.unmap(size=4 * PAGE)
    assert v2.locked() == before


def test_what_is_not_charged_does_not_count_towards_the_limit(v2: Attached) -> None:
    with v2.world.memlock(v2.locked()):
        if v2.world.since(6, 2):
            with refused(errno.ENOMEM):
                v2.map(size=4 * PAGE, flags=READ)
        else:
            v2.map(size=4 * PAGE, flags=READ)


def test_a_mapping_that_was_refused_for_the_limit_has_written_its_memory_all_the_same(v2: Attached) -> None:
    # Pages are pinned 512 at a time and counted afterwards. The bytes beyond the limit have pages of their own now.
    before = v2.locked()
    vaddr = v2.world.memory(16 * PAGE)
    with v2.world.memlock(before), refused(errno.ENOMEM):
        v2.map(vaddr=vaddr, size=16 * PAGE)
    v2.map(vaddr=vaddr + 8 * PAGE, size=8 * PAGE, flags=READ)
    assert v2.locked() == before + 8 * PAGE


def test_memory_that_can_only_be_read_is_not_written_back_to(v2: Attached) -> None:
    # The mapping is gone although the call returns EFAULT, because the answer is written last.
    v2.map()
    page = v2.world.memory()
    ctypes.memmove(page, struct.pack("=IIQQ", 24, 0, BASE, 2 * PAGE), 24)
    v2.world.kernel.mprotect(page, PAGE, READ)
    with refused(errno.EFAULT):
        v2.world.ioctl(v2.container, ioctls.VFIO_IOMMU_UNMAP_DMA, page)
    assert v2.unmap_all() == 0


# -------------------------------------------------------------------------------- memory: what happens to it afterwards


def put_anew(kernel: Kernel, vaddr: int, size: int) -> None:
    """Map other memory at the same address."""
    kernel.mmap(vaddr, size, BOTH, PRIVATE | MAP_FIXED)


@pytest.mark.parametrize(
    "take",
    [
        lambda kernel, vaddr, size: kernel.madvise(vaddr, size, MADV_DONTNEED),
        lambda kernel, vaddr, size: kernel.mprotect(vaddr, size, NONE),
        put_anew,
        lambda kernel, vaddr, size: kernel.munmap(vaddr, size),
    ],
    ids=["discarded", "protected", "replaced", "unmapped"],
)
def test_memory_that_goes_stays_charged_until_it_is_unmapped(
    v2: Attached, take: Callable[[Kernel, int, int], None]
) -> None:
    before, kernel = v2.locked(), v2.world.kernel
    vaddr = kernel.mmap(0, 2 * PAGE, BOTH, PRIVATE)
    v2.map(vaddr=vaddr, size=2 * PAGE)
    take(kernel, vaddr, 2 * PAGE)
    v2.world.forgive()
    assert v2.locked() == before + 2 * PAGE
    assert v2.unmap(size=2 * PAGE) == 2 * PAGE
    assert v2.locked() == before
    kernel.munmap(vaddr, 2 * PAGE)


def test_a_file_that_is_cut_stays_charged_until_it_is_unmapped(v2: Attached) -> None:
    before, kernel = v2.locked(), v2.world.kernel
    fd = v2.world.keep(os.memfd_create("contract"))
    os.ftruncate(fd, 2 * PAGE)
    vaddr = kernel.mmap(0, 2 * PAGE, BOTH, MAP_SHARED, fd=fd)
    v2.map(vaddr=vaddr, size=2 * PAGE)
    os.ftruncate(fd, 0)
    assert v2.locked() == before + 2 * PAGE
    with refused(errno.EFAULT):
        v2.map(vaddr=vaddr, iova=0)
    assert v2.unmap(size=2 * PAGE) == 2 * PAGE
    assert v2.locked() == before
    kernel.munmap(vaddr, 2 * PAGE)
