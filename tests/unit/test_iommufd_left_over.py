"""Objects of an iommufd that the kernel does not destroy: no number is forgotten before the object is gone."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import suppress

import pytest

import pyvfio
from pyvfio.dirty import DirtyTracking
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, nothing_left, requests
from tests.unit.tracking import BusyKernel, tracked_kernel

REFUSALS = [errno.EBUSY, errno.ENOMEM]


@pytest.fixture
def kernel() -> Iterator[BusyKernel]:
    """One whose IOMMU records writes."""
    with tracked_kernel("iommufd") as made, nothing_left(made):
        yield made


@pytest.fixture
def iommufd(kernel: BusyKernel) -> Iterator[pyvfio.Iommufd]:
    """One that outlives its spaces, so that the end of a space destroys objects one by one."""
    with pyvfio.Iommufd(kernel=kernel) as made:
        yield made


def refuse_destroy(kernel: BusyKernel, number: int, *, nth: int = 1) -> None:
    """From now on, let one destruction fail."""
    kernel.fail(call="ioctl", request="IOMMU_DESTROY", errno=number, nth=nth)


def next_number(iommufd: pyvfio.Iommufd) -> int:
    """The number of the next object: the kernel's lowest that is free."""
    number = iommufd.ioas_alloc()
    iommufd.destroy(number)
    return number


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("again", ["stop", "close"])
def test_a_page_table_that_was_not_destroyed_is_destroyed_later(
    kernel: BusyKernel, iommufd: pyvfio.Iommufd, again: str, number: int
) -> None:
    """By a second stop, or with the space. The devices are back already, and the space is tracked no more."""
    first = next_number(iommufd)
    space = pyvfio.Ioas(iommufd)
    with pyvfio.open_device(BDF, space=space):
        left = next_number(iommufd)  # behind the page table that the kernel made
        tracking = DirtyTracking(space)
        refuse_destroy(kernel, number)
        with pytest.raises(pyvfio.IoctlError):
            tracking.close()
        if again == "stop":
            space.stop_dirty_tracking()
            assert next_number(iommufd) == left
        with DirtyTracking(space):  # with a page table of its own
            pass
    space.close()
    assert space.closed
    assert next_number(iommufd) == first


def test_a_space_stays_open_until_the_kernel_has_destroyed_all_of_it(
    kernel: BusyKernel, iommufd: pyvfio.Iommufd
) -> None:
    """A page table that is left, or the space itself: the next close does the rest, and memory is unmapped at once."""
    first, space = next_number(iommufd), pyvfio.Ioas(iommufd)
    memory = kernel.mmap(0, PAGE_SIZE, READ_WRITE, PRIVATE)
    with pyvfio.open_device(BDF, space=space):
        space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        tracking = DirtyTracking(space)
        refuse_destroy(kernel, errno.EBUSY)
        with pytest.raises(pyvfio.IoctlError):
            tracking.close()
    for _ in ("page table", "space"):
        refuse_destroy(kernel, errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError, match="IOMMU_DESTROY"):
            space.close()
        refused = [call.errno for call in kernel.trace if call.request == "IOMMU_DESTROY"][-1]
        assert (refused, space.closed, space.mappings, iommufd.spaces) == (errno.ENOMEM, False, (), [space])
        with suppress(pyvfio.VfioError):
            space.stop_dirty_tracking()
    space.close()
    kernel.munmap(memory, PAGE_SIZE)
    assert (space.closed, iommufd.spaces) == (True, [])
    assert next_number(iommufd) == first


def test_what_is_gone_already_is_no_failure(kernel: BusyKernel, iommufd: pyvfio.Iommufd) -> None:
    """A destruction that failed after it was made: of a page table, and of a space. The second one is ENOENT."""
    first, space = next_number(iommufd), pyvfio.Ioas(iommufd)
    with pyvfio.open_device(BDF, space=space):
        tracking = DirtyTracking(space)
        kernel.fail(call="ioctl", request="IOMMU_DESTROY", errno=errno.EINTR, after=True)
        with pytest.raises(pyvfio.IoctlError):
            tracking.close()
    kernel.fail(call="ioctl", request="IOMMU_DESTROY", errno=errno.EINTR, after=True, nth=2)
    with pytest.raises(pyvfio.IoctlError):
        space.close()
    kernel.clear_trace()
    space.close()
    assert [call.errno for call in kernel.trace if call.request == "IOMMU_DESTROY"] == [errno.ENOENT]
    assert space.closed
    assert next_number(iommufd) == first


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_replacement_that_failed_leaves_a_copy_to_the_next_cut(
    kernel: BusyKernel,
    iommufd: pyvfio.Iommufd,
    *,
    moved: bool,
    tracked: bool,
) -> None:
    """The error is that of the move, since all devices are where they were: the reach is known. So is a device that
    the kernel has moved, though it said that it had not."""
    first = next_number(iommufd)
    with pyvfio.Ioas(iommufd, cut="replace") as space, pyvfio.open_device(BDF, space=space):
        pyvfio.open_device(OTHER_BDF, space=space)
        tracking = DirtyTracking(space) if tracked else None
        memory = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, PRIVATE)
        space.map(vaddr=memory, iova=MIB, size=8 * PAGE_SIZE)
        before = space.id, space.mappings
        kernel.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=errno.EFAULT, after=moved)
        refuse_destroy(kernel, errno.ENOMEM)
        refuse_destroy(kernel, errno.ENOMEM, nth=2)
        with pytest.raises(pyvfio.IoctlError, match="EFAULT"), space.guard.lock:
            space.cut_locked(MIB, PAGE_SIZE)
        assert (space.id, space.mappings) == before
        assert [place.size for place in kernel.mappings(BDF)] == [8 * PAGE_SIZE]
        with space.guard.lock:
            space.cut_locked(MIB, PAGE_SIZE)
        assert [mapping.size for mapping in space.mappings] == [7 * PAGE_SIZE]
        if tracking is not None:
            tracking.close()
        space.unmap_all()
        kernel.munmap(memory, 8 * PAGE_SIZE)
    assert next_number(iommufd) == first


@pytest.mark.parametrize("moved", [False, True])
def test_a_replacement_that_failed_leaves_no_copy(kernel: BusyKernel, iommufd: pyvfio.Iommufd, *, moved: bool) -> None:
    """Not even where the kernel moved the device that it refused: the device moves back first."""
    with pyvfio.Ioas(iommufd, cut="replace") as space, pyvfio.open_device(BDF, space=space):
        memory = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, PRIVATE)
        space.map(vaddr=memory, iova=MIB, size=8 * PAGE_SIZE)
        number = next_number(iommufd)
        kernel.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=errno.EFAULT, after=moved)
        with pytest.raises(pyvfio.IoctlError, match="EFAULT"), space.guard.lock:
            space.cut_locked(MIB, PAGE_SIZE)
        assert next_number(iommufd) == number
        assert [place.size for place in kernel.mappings(BDF)] == [8 * PAGE_SIZE]
        space.unmap_all()
        kernel.munmap(memory, 8 * PAGE_SIZE)


def test_a_device_that_cannot_move_back_from_a_copy_is_told_with_both_reasons(
    kernel: BusyKernel, iommufd: pyvfio.Iommufd
) -> None:
    """That of the cut and that of the way back. With the devices, all of it ends."""
    first = next_number(iommufd)
    with pyvfio.Ioas(iommufd, cut="replace") as space, pyvfio.open_device(BDF, space=space):
        pyvfio.open_device(OTHER_BDF, space=space)
        memory = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, PRIVATE)
        space.map(vaddr=memory, iova=MIB, size=8 * PAGE_SIZE)
        for nth, number in ((2, errno.EFAULT), (3, errno.ENOMEM)):
            kernel.fail(call="ioctl", request="VFIO_DEVICE_ATTACH_IOMMUFD_PT", errno=number, nth=nth)
        refused = pytest.raises(pyvfio.RollbackError, match=f"^{space.guard.what} could not be replaced")
        with refused as raised, space.guard.lock:
            space.cut_locked(MIB, PAGE_SIZE)
        assert [each.errno for each in raised.value.exceptions if isinstance(each, OSError)] == [
            errno.EFAULT,
            errno.ENOMEM,
        ]
        assert [mapping.size for mapping in space.mappings] == [8 * PAGE_SIZE]
        space.close()
        kernel.munmap(memory, 8 * PAGE_SIZE)
    assert next_number(iommufd) == first


def test_a_space_that_could_not_be_made_is_destroyed_with_the_next(kernel: BusyKernel, iommufd: pyvfio.Iommufd) -> None:
    first = next_number(iommufd)
    for _ in range(2):
        kernel.fail(call="ioctl", request="IOMMU_OPTION", errno=errno.ENOMEM)
        refuse_destroy(kernel, errno.EBUSY)
        with pytest.raises(pyvfio.IoctlError, match="IOMMU_OPTION"):
            pyvfio.Ioas(iommufd, cut="pages")
        kernel.clear_failures()
    kernel.fail(call="ioctl", request="IOMMU_OPTION", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.IoctlError, match="IOMMU_OPTION"):
        pyvfio.Ioas(iommufd, cut="pages")
    assert next_number(iommufd) == first


def test_the_number_of_a_space_that_is_gone_can_be_that_of_another_object(
    kernel: BusyKernel, iommufd: pyvfio.Iommufd
) -> None:
    """Which is not destroyed with the next space that could not be made, nor with the next replacement."""

    def fail() -> None:
        kernel.fail(call="ioctl", request="IOMMU_OPTION", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError, match="IOMMU_OPTION"):
            pyvfio.Ioas(iommufd, cut="pages")

    memory = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, PRIVATE)
    with pyvfio.Ioas(iommufd, cut="replace") as space, pyvfio.open_device(BDF, space=space):
        fail()
        others = [iommufd.ioas_alloc()]
        fail()
        space.map(vaddr=memory, iova=MIB, size=8 * PAGE_SIZE)
        for page in range(3):
            with space.guard.lock:
                space.cut_locked(MIB + 2 * page * PAGE_SIZE, PAGE_SIZE)
            others.append(iommufd.ioas_alloc())
        for number in others:
            assert iommufd.ioas_iova_ranges(number)[1] == 1
            iommufd.destroy(number)
        space.unmap_all()
    kernel.munmap(memory, 8 * PAGE_SIZE)


@pytest.mark.parametrize("handle", ["iommufd", "space"])
def test_with_the_iommufd_all_of_it_ends_whatever_the_kernel_refuses(kernel: BusyKernel, handle: str) -> None:
    """An iommufd that is closed, and one that is closed with its last space."""
    if handle == "iommufd":
        iommufd = pyvfio.Iommufd(kernel=kernel)
        spaces = [pyvfio.Ioas(iommufd), pyvfio.Ioas(iommufd)]
    else:
        spaces = [pyvfio.Ioas(kernel=kernel)]
        iommufd = spaces[0].iommufd
    refuse_destroy(kernel, errno.ENOMEM)
    with pytest.raises(pyvfio.IoctlError, match="IOMMU_DESTROY"):
        (iommufd if handle == "iommufd" else spaces[0]).close()
    assert [each.closed for each in (iommufd, *spaces)] == [True] * (len(spaces) + 1)
    assert requests(kernel.trace).count("IOMMU_DESTROY") == len(spaces)
