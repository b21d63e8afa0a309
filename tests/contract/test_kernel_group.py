"""The promises of a group, and the lifetimes of its objects (kernel: drivers/vfio/group.c)."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from pyvfio import ioctls, pci
from tests.contract.devices import RNG_DRIVER, VFIO, Company
from tests.contract.world import BAD_ADDRESS, PAGE, Attached, World, refused

VIABLE, CONTAINER_SET = 1, 2


def test_a_group_is_open_once(world: World) -> None:
    world.open(str(world.group))
    with refused(errno.EBUSY):
        world.open(str(world.group))


def test_a_group_can_be_opened_again_after_it_was_closed(world: World) -> None:
    world.close(world.open(str(world.group)))
    world.open(str(world.group))


def test_a_group_stays_busy_while_a_device_of_it_is_open(v2: Attached) -> None:
    device = v2.world.open_device(v2.group)
    v2.world.close(v2.group)
    with refused(errno.EBUSY):
        v2.world.open(str(v2.world.group))
    v2.world.close(device)
    v2.world.open(str(v2.world.group))


def test_a_refused_open_leaves_no_descriptor(world: World) -> None:
    world.open(str(world.group))
    before = sorted(os.listdir("/proc/self/fd"))
    with refused(errno.EBUSY):
        world.open(str(world.group))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_an_unknown_request_on_a_group_is_enotty(world: World) -> None:
    with refused(errno.ENOTTY):
        world.ioctl(world.open(str(world.group)), ioctls.VFIO_IOMMU_MAP_DMA, BAD_ADDRESS)


def test_the_status_says_viable_and_whether_there_is_a_container(world: World) -> None:
    container, group = world.open("vfio"), world.open(str(world.group))
    assert world.status(group) == VIABLE
    world.set_container(group, container)
    assert world.status(group) == VIABLE | CONTAINER_SET


def test_a_short_status_is_einval_and_nothing_is_written(world: World) -> None:
    argument = ioctls.vfio_group_status(argsz=7, flags=0xAA)
    with refused(errno.EINVAL):
        world.ioctl(world.open(str(world.group)), ioctls.VFIO_GROUP_GET_STATUS, argument)
    assert argument.flags == 0xAA


@pytest.mark.parametrize("request_", [ioctls.VFIO_GROUP_GET_STATUS, ioctls.VFIO_GROUP_SET_CONTAINER])
def test_a_bad_pointer_is_efault_on_a_group_too(world: World, request_: int) -> None:
    with refused(errno.EFAULT):
        world.ioctl(world.open(str(world.group)), request_, BAD_ADDRESS)


@pytest.mark.parametrize("fd", [-1, 1000])
def test_a_container_that_is_not_open_is_ebadf_even_for_a_group_that_has_one(v2: Attached, fd: int) -> None:
    with refused(errno.EBADF):
        v2.world.set_container(v2.group, fd)


def test_a_file_that_is_no_container_is_einval_before_6_2_and_ebadfd_since(world: World) -> None:
    group, junk = world.open(str(world.group)), world.keep(world.kernel.eventfd(0, 0))
    with refused(errno.EBADFD if world.since(6, 2) else errno.EINVAL):
        world.set_container(group, junk)


def test_a_second_container_is_einval_whatever_file_it_is(v2: Attached) -> None:
    junk = v2.world.keep(v2.world.kernel.eventfd(0, 0))
    for fd in (junk, v2.container, v2.world.open("vfio")):
        with refused(errno.EINVAL):
            v2.world.set_container(v2.group, fd)


def test_a_group_without_a_container_has_none_to_leave(world: World) -> None:
    with refused(errno.EINVAL):
        world.ioctl(world.open(str(world.group)), ioctls.VFIO_GROUP_UNSET_CONTAINER)


def test_a_group_cannot_leave_while_a_device_is_open(v2: Attached) -> None:
    device = v2.world.open_device(v2.group)
    with refused(errno.EBUSY):
        v2.world.ioctl(v2.group, ioctls.VFIO_GROUP_UNSET_CONTAINER)
    v2.world.close(device)
    v2.world.ioctl(v2.group, ioctls.VFIO_GROUP_UNSET_CONTAINER)
    assert v2.world.status(v2.group) == VIABLE


def test_the_last_group_that_leaves_takes_mappings_charge_and_iommu_with_it(v2: Attached) -> None:
    before = v2.locked()
    v2.map(size=4 * PAGE)
    assert v2.locked() == before + 4 * PAGE
    v2.world.ioctl(v2.group, ioctls.VFIO_GROUP_UNSET_CONTAINER)
    assert v2.locked() == before
    with refused(errno.EINVAL):
        v2.unmap()
    v2.world.set_container(v2.group, v2.container)
    v2.world.ioctl(v2.container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1_IOMMU)
    assert v2.unmap() == 0


def test_closing_the_container_alone_unmaps_nothing(v2: Attached) -> None:
    before = v2.locked()
    v2.map()
    v2.world.close(v2.container)
    assert v2.locked() == before + PAGE
    v2.world.close(v2.group)
    assert v2.locked() == before


def test_closing_the_group_with_a_device_open_leaves_everything_live(v2: Attached) -> None:
    before = v2.locked()
    device = v2.world.open_device(v2.group)
    v2.map()
    v2.world.close(v2.group)
    v2.map(iova=0)
    assert v2.locked() == before + 2 * PAGE
    v2.world.close(device)
    assert v2.locked() == before


def test_each_descriptor_of_a_device_holds_its_group(v2: Attached) -> None:
    first, second = v2.world.open_device(v2.group), v2.world.open_device(v2.group)
    v2.map()
    v2.world.close(v2.group)
    v2.world.close(first)
    assert v2.unmap() == PAGE
    v2.world.close(second)
    with refused(errno.EINVAL):
        v2.unmap()


def test_a_device_descriptor_is_closed_on_exec(v2: Attached) -> None:
    assert not os.get_inheritable(v2.world.open_device(v2.group))


@pytest.mark.parametrize("suffix", ["", " ", "   "])
def test_a_device_is_opened_by_its_name_and_spaces_behind_it_do_no_harm(v2: Attached, suffix: str) -> None:
    v2.world.open_device(v2.group, v2.world.bdf + suffix)


def test_an_unknown_device_is_enodev(v2: Attached) -> None:
    for name in ("ffff:ff:1f.7", "x", v2.world.bdf[:-1], v2.world.bdf + "x"):
        with refused(errno.ENODEV):
            v2.world.open_device(v2.group, name)


@pytest.mark.parametrize("options", ["x", "vf_token=", "vf_token=00000000-0000-0000-0000-000000000001"])
def test_options_that_a_plain_device_does_not_have_are_einval(v2: Attached, options: str) -> None:
    with refused(errno.EINVAL):
        v2.world.open_device(v2.group, f"{v2.world.bdf} {options}")


def test_a_name_without_an_end_is_einval_and_one_behind_a_bad_pointer_efault(v2: Attached) -> None:
    with refused(errno.EINVAL):
        v2.world.ioctl(v2.group, ioctls.VFIO_GROUP_GET_DEVICE_FD, bytearray(b"x" * PAGE))
    with refused(errno.EFAULT):
        v2.world.ioctl(v2.group, ioctls.VFIO_GROUP_GET_DEVICE_FD, BAD_ADDRESS)


def test_a_device_cannot_be_opened_without_a_container_or_an_iommu_and_its_name_is_looked_at_first(
    world: World,
) -> None:
    group, container = world.open(str(world.group)), world.open("vfio")
    for has_container in (False, True):
        if has_container:
            world.set_container(group, container)
        with refused(errno.EINVAL):
            world.open_device(group)
        with refused(errno.ENODEV):
            world.open_device(group, "x")


# ------------------------------------------------------------------------------------------------- groups of several


def members(world: World) -> set[str]:
    """Return the members of the world's group, according to sysfs."""
    return {member.bdf for member in pci.group_members(world.group, kernel=world.kernel)}


def test_devices_behind_one_bridge_and_functions_of_one_device_share_a_group(
    functions: tuple[World, World], bridged: World, e1000e: World, company: Company
) -> None:
    assert members(functions[0]) == members(functions[1]) == {each.bdf for each in company.functions}
    assert members(bridged) == {company.bridge.bdf, company.bridged.bdf, company.rng.bdf}
    assert members(e1000e) == {company.root_port.bdf, company.e1000e.bdf}


def test_a_device_of_one_function_on_a_root_bus_has_a_group_of_its_own(other: World, xhci: World) -> None:
    assert (members(other), members(xhci)) == ({other.bdf}, {xhci.bdf})


def test_a_sibling_with_a_kernel_driver_makes_a_group_unusable(bridged: World) -> None:
    group = bridged.open(str(bridged.group))
    assert bridged.status(group) == 0
    with refused(errno.EPERM):
        bridged.set_container(group, bridged.open("vfio"))
    assert bridged.status(group) == 0


@pytest.mark.parametrize("driver", [None, VFIO])
def test_a_sibling_without_a_kernel_driver_does_no_harm(bridged: World, company: Company, driver: str | None) -> None:
    bridged.bind(company.rng.bdf, driver)
    group = bridged.open(str(bridged.group))
    assert bridged.status(group) == VIABLE
    bridged.set_container(group, bridged.open("vfio"))


def test_the_driver_of_a_root_port_does_no_harm(e1000e: World, company: Company) -> None:
    assert e1000e.driver_of(company.root_port.bdf) == "pcieport"
    group = e1000e.open(str(e1000e.group))
    assert e1000e.status(group) == VIABLE
    e1000e.set_container(group, e1000e.open("vfio"))


def test_a_group_is_viable_as_soon_as_the_kernel_driver_lets_go(bridged: World, company: Company) -> None:
    group = bridged.open(str(bridged.group))
    for driver, status in ((None, VIABLE), (RNG_DRIVER, 0), (VFIO, VIABLE)):
        bridged.bind(company.rng.bdf, driver)
        assert bridged.status(group) == status


def test_no_kernel_driver_gets_a_device_of_a_group_in_use(bridged: World, company: Company) -> None:
    bridged.bind(company.rng.bdf, None)
    attached = Attached.of(bridged, ioctls.VFIO_TYPE1v2_IOMMU)
    bridged.bind(company.rng.bdf, RNG_DRIVER)
    assert bridged.driver_of(company.rng.bdf) is None
    assert bridged.status(attached.group) == VIABLE | CONTAINER_SET


def test_vfio_gets_a_device_of_a_group_in_use_which_can_then_be_opened(bridged: World, company: Company) -> None:
    bridged.bind(company.rng.bdf, None)
    attached = Attached.of(bridged, ioctls.VFIO_TYPE1v2_IOMMU)
    with refused(errno.ENODEV):
        bridged.open_device(attached.group, company.rng.bdf)
    bridged.bind(company.rng.bdf, VFIO)
    bridged.open_device(attached.group, company.rng.bdf)
    bridged.open_device(attached.group)


def test_a_group_that_left_its_container_is_free_for_kernel_drivers_again(bridged: World, company: Company) -> None:
    bridged.bind(company.rng.bdf, None)
    attached = Attached.of(bridged, ioctls.VFIO_TYPE1v2_IOMMU)
    bridged.ioctl(attached.group, ioctls.VFIO_GROUP_UNSET_CONTAINER)
    bridged.bind(company.rng.bdf, RNG_DRIVER)
    assert bridged.driver_of(company.rng.bdf) == RNG_DRIVER
    assert bridged.status(attached.group) == 0


def test_a_device_that_is_not_bound_to_vfio_cannot_be_opened(functions: tuple[World, World]) -> None:
    first, second = functions
    first.bind(second.bdf, None)
    attached = Attached.of(first, ioctls.VFIO_TYPE1v2_IOMMU)
    with refused(errno.ENODEV):
        first.open_device(attached.group, second.bdf)


def test_a_device_is_opened_through_its_own_group_only(v2: Attached, other: World) -> None:
    with refused(errno.ENODEV):
        v2.world.open_device(v2.group, other.bdf)


def test_each_device_of_a_group_holds_it(functions: tuple[World, World]) -> None:
    first, second = functions
    attached = Attached.of(first, ioctls.VFIO_TYPE1v2_IOMMU)
    fds = [first.open_device(attached.group), second.open_device(attached.group)]
    attached.map()
    first.close(attached.group)
    first.close(fds[0])
    assert attached.unmap() == PAGE
    with refused(errno.EBUSY):
        first.open(str(first.group))
    first.close(fds[1])
    first.open(str(first.group))


# -------------------------------------------------------------------------------------------------- containers of two


def test_a_second_group_shares_the_mappings_and_nothing_is_charged_again(v2: Attached, other: World) -> None:
    before = v2.locked()
    v2.map(size=4 * PAGE)
    group = other.open(str(other.group))
    other.set_container(group, v2.container)
    assert v2.locked() == before + 4 * PAGE
    with refused(errno.EEXIST):
        v2.map()
    other.open_device(group)


def test_a_second_group_may_come_before_the_iommu_is_set(world: World, other: World) -> None:
    container = world.open("vfio")
    groups = [each.open(str(each.group)) for each in (world, other)]
    for group in groups:
        world.set_container(group, container)
    world.ioctl(container, ioctls.VFIO_SET_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU)
    for each, group in zip((world, other), groups, strict=True):
        each.open_device(group)


def test_mappings_stay_while_another_group_is_in_the_container(v2: Attached, other: World) -> None:
    group = other.open(str(other.group))
    other.set_container(group, v2.container)
    v2.map()
    v2.world.ioctl(v2.group, ioctls.VFIO_GROUP_UNSET_CONTAINER)
    assert v2.unmap() == PAGE
    v2.map()
    other.close(group)
    with refused(errno.EINVAL):
        v2.unmap()


def test_no_group_joins_while_a_mapping_has_no_vaddr(v2: Attached, other: World) -> None:
    group = other.open(str(other.group))
    v2.map()
    v2.unmap(flags=ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)
    with refused(errno.EBUSY):
        other.set_container(group, v2.container)
    v2.map(flags=ioctls.VFIO_DMA_MAP_FLAG_VADDR)
    other.set_container(group, v2.container)


def test_the_argument_of_set_container_is_a_pointer_to_the_number(world: World) -> None:
    group, container = world.open(str(world.group)), world.open("vfio")
    with refused(errno.EFAULT):
        world.ioctl(group, ioctls.VFIO_GROUP_SET_CONTAINER, container)
    world.ioctl(group, ioctls.VFIO_GROUP_SET_CONTAINER, bytearray(struct.pack("=i", container)))
