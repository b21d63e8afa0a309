"""The promises about pinned and locked memory (`pfn_reader_user_update_pinned` in drivers/iommu/iommufd/pages.c).

By default iommufd compares RLIMIT_MEMLOCK with the pages of all processes of the user, which are not part of VmLck.
With RLIMIT_MODE 1 the limit is that of the process, as with type1.
"""

from __future__ import annotations

import errno

import pytest

from tests.contract.iommufd import OPTION_SET, READABLE, RLIMIT_MODE, VFIO_SET, Cdev, Iommufd, Rig
from tests.contract.world import BASE, NONE, PAGE, World, refused

pytestmark = pytest.mark.iommufd

MODES = pytest.mark.parametrize("mode", [0, 1], ids=["by user", "by process"])


def rig_of(world: World, mode: int) -> Rig:
    """Open an iommufd with that RLIMIT_MODE, and attach the device."""
    iommufd = Iommufd.of(world)
    iommufd.option(RLIMIT_MODE, OPTION_SET, 0, mode)
    return Rig.of(iommufd)


def limit(world: World, mode: int, size: int) -> int:
    """Return the limit with which `size` bytes can be pinned: locked memory counts where the limit is a process's."""
    return size + (world.kernel.memlock().used if mode else 0)


@MODES
def test_pinned_pages_are_counted_as_vmpin_and_as_vmlck_by_process_only(world: World, mode: int) -> None:
    rig, kernel = rig_of(world, mode), world.kernel
    pinned, locked = world.pinned(), kernel.memlock().used
    with world.memlock(limit(world, mode, 16 * PAGE)):
        rig.map(size=4 * PAGE)
        assert world.pinned() == pinned + 4 * PAGE
        assert kernel.memlock().used == locked + (4 * PAGE if mode else 0)
        rig.unmap(size=4 * PAGE)
        assert (world.pinned(), kernel.memlock().used) == (pinned, locked)


@MODES
def test_who_may_lock_any_amount_is_charged_nothing(world: World, mode: int) -> None:
    rig, locked, pinned = rig_of(world, mode), world.kernel.memlock().used, world.pinned()
    with world.memlock(0, privileged=True):
        rig.map(size=4 * PAGE)
        assert (world.pinned(), world.kernel.memlock().used) == (pinned + 4 * PAGE, locked)
    with world.memlock(limit(world, mode, PAGE)):
        rig.map(iova=0)
        assert rig.unmap(size=4 * PAGE) == 4 * PAGE
        with refused(errno.ENOMEM):
            rig.map()


@MODES
def test_the_limit_itself_is_reached_and_one_page_more_is_enomem(world: World, mode: int) -> None:
    rig, pinned = rig_of(world, mode), world.pinned()
    with world.memlock(limit(world, mode, 4 * PAGE)):
        rig.map(size=3 * PAGE)
        with refused(errno.ENOMEM):
            rig.map(iova=0, size=2 * PAGE)
        assert world.pinned() == pinned + 3 * PAGE
        rig.map(iova=0)
        assert rig.unmap_all() == 4 * PAGE
        rig.map(size=4 * PAGE)


@MODES
def test_a_limit_counts_whole_pages(world: World, mode: int) -> None:
    rig = rig_of(world, mode)
    with world.memlock(limit(world, mode, 2 * PAGE - 1)):
        with refused(errno.ENOMEM):
            rig.map(size=2 * PAGE)
        rig.map()


@MODES
def test_bad_memory_is_found_before_the_limit_wherever_it_is(world: World, mode: int) -> None:
    rig = rig_of(world, mode)
    vaddr = world.memory(8 * PAGE)
    world.kernel.mprotect(vaddr + 7 * PAGE, PAGE, NONE)
    with world.memlock(limit(world, mode, PAGE)), refused(errno.EFAULT):
        rig.map(vaddr=vaddr, size=8 * PAGE)


@MODES
def test_a_refused_map_is_wholly_undone(world: World, mode: int) -> None:
    rig, pinned, locked = rig_of(world, mode), world.pinned(), world.kernel.memlock().used
    with world.memlock(limit(world, mode, 4 * PAGE)):
        with refused(errno.ENOMEM):
            rig.map(size=64 * PAGE)
        assert (world.pinned(), world.kernel.memlock().used) == (pinned, locked)
        rig.map(size=4 * PAGE)


@MODES
def test_a_copy_is_charged_once(world: World, mode: int) -> None:
    rig = rig_of(world, mode)
    with world.memlock(limit(world, mode, 4 * PAGE)):
        rig.map(size=4 * PAGE)
        rig.iommufd.copy(rig.ioas, rig.ioas, iova=0, size=4 * PAGE)
        rig.unmap(size=4 * PAGE)
        with refused(errno.ENOMEM):
            rig.map(iova=2 * BASE)


@MODES
def test_the_same_memory_mapped_twice_is_charged_twice(world: World, mode: int) -> None:
    rig = rig_of(world, mode)
    vaddr = world.memory()
    with world.memlock(limit(world, mode, PAGE)):
        rig.map(vaddr=vaddr)
        with refused(errno.ENOMEM):
            rig.map(iova=0, vaddr=vaddr)


@MODES
def test_memory_is_charged_when_a_device_is_attached_and_no_longer_when_it_leaves(world: World, mode: int) -> None:
    rig, pinned = rig_of(world, mode), world.pinned()
    rig.cdev.detach()
    with world.memlock(limit(world, mode, 3 * PAGE)):
        rig.map(size=4 * PAGE)
        with refused(errno.ENOMEM):
            rig.cdev.attach(rig.ioas)
        assert world.pinned() == pinned
        rig.unmap(size=4 * PAGE)
        rig.map(size=3 * PAGE)
        rig.cdev.attach(rig.ioas)
        assert world.pinned() == pinned + 3 * PAGE
        with refused(errno.ENOMEM):
            rig.map(iova=0)
        rig.cdev.detach()
        assert world.pinned() == pinned


def test_whether_memory_is_charged_is_decided_by_the_map_and_not_by_the_attach(iommufd: Iommufd, cdev: Cdev) -> None:
    world, ioas = iommufd.world, iommufd.ioas()
    with world.memlock(0, privileged=True):
        iommufd.map(ioas, size=4 * PAGE)
    with world.memlock(0):
        cdev.attach(ioas)
        with refused(errno.ENOMEM):
            iommufd.map(ioas, iova=0)


@MODES
def test_memory_that_is_only_read_is_charged_too(world: World, mode: int) -> None:
    rig, pinned = rig_of(world, mode), world.pinned()
    with world.memlock(limit(world, mode, 2 * PAGE)):
        rig.map(size=2 * PAGE, flags=READABLE)
        assert world.pinned() == pinned + 2 * PAGE
        with refused(errno.ENOMEM):
            rig.map(iova=0, flags=READABLE)


def test_a_replace_needs_room_for_both_sides(world: World) -> None:
    rig, pinned = rig_of(world, 0), world.pinned()
    other = rig.iommufd.ioas()
    with world.memlock(3 * PAGE):
        rig.map(size=2 * PAGE)
        rig.iommufd.map(other, size=2 * PAGE)
        with refused(errno.ENOMEM):
            rig.cdev.attach(other)
        assert world.pinned() == pinned + 2 * PAGE
        rig.iommufd.unmap(other, size=2 * PAGE)
        rig.iommufd.copy(other, rig.ioas, size=2 * PAGE)
        rig.cdev.attach(other)
        assert world.pinned() == pinned + 2 * PAGE


def test_the_limit_of_a_user_counts_all_iommufds(world: World, other: World) -> None:
    first = Rig.of(Iommufd.of(world))
    second = Rig.of(Iommufd.of(other))
    with world.memlock(3 * PAGE):
        first.map(size=2 * PAGE)
        with refused(errno.ENOMEM):
            second.map(size=2 * PAGE)
        second.map()


def test_a_cut_gives_back_the_pages_that_are_cut_out(world: World) -> None:
    iommufd = Iommufd.of(world)
    ioas = iommufd.ioas()
    iommufd.set_huge_pages(ioas, 0)
    iommufd.vfio_ioas(VFIO_SET, ioas)
    rig = Rig.of(iommufd, ioas=ioas)
    with world.memlock(4 * PAGE):
        rig.map(size=4 * PAGE)
        assert iommufd.compat_unmap(iova=BASE + PAGE, size=2 * PAGE) == 2 * PAGE
        rig.map(iova=0, size=2 * PAGE)
        with refused(errno.ENOMEM):
            rig.map(iova=8 * PAGE)
