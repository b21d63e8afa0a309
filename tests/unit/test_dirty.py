"""What devices may have written, on the fake kernel: all that is mapped, mapping by mapping."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio import DirtyTracking, ioctls
from pyvfio.kernel import IoctlArgument
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import Rig, SpecialKernel, requests

BASE = 0x10_0000


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """Three mappings: four pages, three, and, behind a hole, one."""
    with Rig(kernel) as made:
        memory = made.memory(16 * PAGE_SIZE)
        for page, count in ((0, 4), (4, 3), (10, 1)):
            made.container.map(vaddr=memory + page * PAGE_SIZE, iova=BASE + page * PAGE_SIZE, size=count * PAGE_SIZE)
        yield made
        made.device.close()
        made.free(memory, 16 * PAGE_SIZE)


def spans(pages: pyvfio.DirtyPages) -> list[tuple[int, int]]:
    """First page and how many."""
    return [((found.start - BASE) // PAGE_SIZE, found.size // PAGE_SIZE) for found in pages.dirty]


def test_all_that_is_mapped_may_have_been_written(rig: Rig) -> None:
    """Each time it is asked; neighbours are one range, and what is not mapped is no page."""
    with DirtyTracking(rig.container) as tracking:
        for _ in range(2):
            found = tracking.read(iova=BASE, size=16 * PAGE_SIZE)
            assert spans(found) == [(0, 7), (10, 1)]
            assert (found.pages, found.count, found.page_size) == (8, 8, PAGE_SIZE)
        assert spans(tracking.read(iova=BASE + 4 * PAGE_SIZE, size=3 * PAGE_SIZE)) == [(4, 3)]
        nothing = tracking.read(iova=BASE + 8 * PAGE_SIZE, size=PAGE_SIZE)
        assert (nothing.pages, nothing.dirty) == (0, ())


def test_a_snapshot_can_be_read(rig: Rig) -> None:
    """By a person."""
    with DirtyTracking(rig.container) as tracking:
        found = tracking.read(iova=BASE, size=16 * PAGE_SIZE)
    assert str(found) == "8 of 8 pages of 4 KiB are dirty: 0x100000-0x106fff, 0x10a000-0x10afff"


def test_what_is_unmapped_says_at_the_last_moment_what_was_written(rig: Rig) -> None:
    """And is out of reach then."""
    with DirtyTracking(rig.container) as tracking:
        assert spans(tracking.unmap(iova=BASE, size=7 * PAGE_SIZE)) == [(0, 7)]
    assert [mapping.iova for mapping in rig.container.mappings] == [BASE + 10 * PAGE_SIZE]
    rig.container._check()


def test_a_mapping_that_is_cut_is_refused_before_the_kernel_is_asked(rig: Rig, kernel: SpecialKernel) -> None:
    """With the mapping."""
    with DirtyTracking(rig.container) as tracking:
        kernel.clear_trace()
        for ask in (tracking.read, tracking.unmap):
            with pytest.raises(ValueError, match="cuts the mapping 0x100000-0x103fff"):
                ask(iova=BASE + PAGE_SIZE, size=4 * PAGE_SIZE)
        assert requests(kernel.trace) == []


def test_tracking_ends_with_its_close(rig: Rig, kernel: SpecialKernel) -> None:
    """Once; what is asked then is an error, and a closed container is none."""
    tracking = DirtyTracking(rig.container)
    tracking.close()
    kernel.clear_trace()
    tracking.close()
    assert requests(kernel.trace) == []
    with pytest.raises(pyvfio.ClosedError):
        tracking.read(iova=BASE, size=PAGE_SIZE)
    late = DirtyTracking(rig.container)
    rig.container.close()
    late.close()


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


def test_a_failing_answer_is_an_error_with_its_errno(rig: Rig, kernel: SpecialKernel) -> None:
    """And changes nothing."""
    with DirtyTracking(rig.container) as tracking:
        kernel.fail(call="ioctl", request="VFIO_IOMMU_DIRTY_PAGES", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError) as raised:
            tracking.read(iova=BASE, size=4 * PAGE_SIZE)
        assert raised.value.errno == errno.ENOMEM
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.IoctlError):
            tracking.unmap(iova=BASE, size=4 * PAGE_SIZE)
        assert len(rig.container.mappings) == 3
