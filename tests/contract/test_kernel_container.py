"""The promises of a container (kernel: drivers/vfio/container.c)."""

from __future__ import annotations

import errno

import pytest

from pyvfio import ioctls
from tests.contract.world import BAD_ADDRESS, NULL, Attached, World, refused

UNKNOWN = 0x3B64 + 90
IOMMU_REQUESTS = [
    ioctls.VFIO_IOMMU_GET_INFO,
    ioctls.VFIO_IOMMU_MAP_DMA,
    ioctls.VFIO_IOMMU_UNMAP_DMA,
    ioctls.VFIO_IOMMU_DIRTY_PAGES,
]
ALWAYS = [ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU, ioctls.VFIO_UNMAP_ALL]


def test_the_api_version_is_0(world: World) -> None:
    assert world.ioctl(world.open("vfio"), ioctls.VFIO_GET_API_VERSION) == 0


@pytest.mark.parametrize("extension", ALWAYS)
def test_type1_and_unmap_all_are_announced_before_and_after_an_iommu_is_set(v2: Attached, extension: int) -> None:
    fresh = v2.world.open("vfio")
    assert [v2.world.ioctl(fd, ioctls.VFIO_CHECK_EXTENSION, extension) for fd in (fresh, v2.container)] == [1, 1]


@pytest.mark.parametrize("extension", [0, 2, 5, 7, 8, 11, 99])
def test_what_type1_is_not_is_answered_with_0(v2: Attached, extension: int) -> None:
    fresh = v2.world.open("vfio")
    assert [v2.world.ioctl(fd, ioctls.VFIO_CHECK_EXTENSION, extension) for fd in (fresh, v2.container)] == [0, 0]


def test_nesting_is_gone_in_7_3(v2: Attached) -> None:
    fresh, nesting = v2.world.open("vfio"), ioctls.VFIO_TYPE1_NESTING_IOMMU
    answers = [v2.world.ioctl(fd, ioctls.VFIO_CHECK_EXTENSION, nesting) for fd in (fresh, v2.container)]
    assert answers == [0 if v2.world.since(7, 0) else 1] * 2


def test_qemus_intel_iommu_does_not_enforce_coherence(v2: Attached) -> None:
    fresh, coherent = v2.world.open("vfio"), ioctls.VFIO_DMA_CC_IOMMU
    assert [v2.world.ioctl(fd, ioctls.VFIO_CHECK_EXTENSION, coherent) for fd in (fresh, v2.container)] == [0, 0]


def test_an_extension_is_compared_in_all_its_64_bits(world: World) -> None:
    assert world.ioctl(world.open("vfio"), ioctls.VFIO_CHECK_EXTENSION, 1 << 32 | 1) == 0


def test_an_unknown_request_is_einval_before_an_iommu_is_set(world: World) -> None:
    with refused(errno.EINVAL):
        world.ioctl(world.open("vfio"), UNKNOWN)


@pytest.mark.parametrize("request_", [UNKNOWN, ioctls.VFIO_IOMMU_ENABLE, ioctls.VFIO_IOMMU_DISABLE])
def test_an_unknown_request_is_enotty_with_type1(v2: Attached, request_: int) -> None:
    with refused(errno.ENOTTY):
        v2.world.ioctl(v2.container, request_)


@pytest.mark.parametrize("request_", IOMMU_REQUESTS)
def test_without_an_iommu_its_requests_are_einval_and_the_argument_is_not_looked_at(
    world: World, request_: int
) -> None:
    with refused(errno.EINVAL):
        world.ioctl(world.open("vfio"), request_, BAD_ADDRESS)


@pytest.mark.parametrize("request_", IOMMU_REQUESTS)
@pytest.mark.parametrize("address", [NULL, BAD_ADDRESS, 1 << 63, (1 << 64) - 8])
def test_a_bad_pointer_is_efault(v2: Attached, request_: int, address: int) -> None:
    with refused(errno.EFAULT):
        v2.world.ioctl(v2.container, request_, address)


def test_an_iommu_cannot_be_set_without_a_group(world: World) -> None:
    with refused(errno.EINVAL):
        world.ioctl(world.open("vfio"), ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU)


@pytest.mark.parametrize("kind", [0, 2, 4, 5, 7, 8, 10, 11, 99])
def test_an_iommu_that_nobody_knows_is_enodev(world: World, kind: int) -> None:
    container, group = world.open("vfio"), world.open(str(world.group))
    world.set_container(group, container)
    with refused(errno.ENODEV):
        world.ioctl(container, ioctls.VFIO_SET_IOMMU, kind)
    world.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1_IOMMU)


def test_unmap_all_is_an_extension_but_no_iommu(world: World) -> None:
    container, group = world.open("vfio"), world.open(str(world.group))
    world.set_container(group, container)
    with refused(errno.EINVAL):
        world.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_UNMAP_ALL)


@pytest.mark.parametrize("kind", [1, 3])
def test_an_iommu_is_set_once(v2: Attached, kind: int) -> None:
    with refused(errno.EINVAL):
        v2.world.ioctl(v2.container, ioctls.VFIO_SET_IOMMU, kind)


def test_nested_type1_is_einval_where_the_iommu_does_not_nest_and_unknown_since_7_3(world: World) -> None:
    # Seen on each of QEMU's IOMMUs: the extension is announced nevertheless.
    container, group = world.open("vfio"), world.open(str(world.group))
    world.set_container(group, container)
    with refused(errno.ENODEV if world.since(7, 0) else errno.EINVAL):
        world.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1_NESTING_IOMMU)
    world.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU)


def test_a_new_vaddr_can_be_given_once_an_iommu_is_set(v2: Attached) -> None:
    fresh = v2.world.open("vfio")
    answers = [
        v2.world.ioctl(fd, ioctls.VFIO_CHECK_EXTENSION, ioctls.VFIO_UPDATE_VADDR) for fd in (fresh, v2.container)
    ]
    assert answers == [0, 1]


@pytest.mark.parametrize("kind", [ioctls.VFIO_UPDATE_VADDR, 1 << 32 | 1])
def test_an_extension_or_more_than_32_bits_are_no_iommu(world: World, kind: int) -> None:
    container, group = world.open("vfio"), world.open(str(world.group))
    world.set_container(group, container)
    with refused(errno.ENODEV):
        world.ioctl(container, ioctls.VFIO_SET_IOMMU, kind)
