"""Container and Group on a fake kernel: opening, attaching, mapping, closing, and what every refusal says."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.container import Container, Group
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import VERSIONS, FakeDevice, FakeKernel
from pyvfio.testing.fake.iommu import iommu_model
from pyvfio.units import GIB, MIB, PAGE_SIZE, U64_MAX
from tests.unit.fakes import (
    BDF,
    OTHER_BDF,
    PRIVATE,
    READ_WRITE,
    Rig,
    SpecialKernel,
    nothing_left,
    requests,
    small_iommu,
)
from tests.unit.processes import in_child
from tests.unit.sysfs import place_process

V1, V2 = ioctls.VFIO_TYPE1_IOMMU, ioctls.VFIO_TYPE1v2_IOMMU
ROOM = 16 * PAGE_SIZE


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel with two devices, in two groups."""
    with SpecialKernel() as made:
        yield made


@pytest.fixture
def container(kernel: SpecialKernel, memory: int) -> Iterator[Container]:
    """One with a group in it; nothing is left of it in the end, while memory is still there."""
    with nothing_left(kernel), Container(kernel=kernel) as made:
        made.attach(Group(2, kernel=kernel))
        yield made
        made._check()


@pytest.fixture
def memory(kernel: SpecialKernel) -> Iterator[int]:
    """Memory to map, by its address; `ROOM` bytes."""
    vaddr = kernel.mmap(0, ROOM, 3, 0x22)
    yield vaddr
    kernel.munmap(vaddr, ROOM)


# -------------------------------------------------------------------------------------------------------- opening


def test_a_machine_without_vfio_is_told_so(kernel: SpecialKernel, tmp_path: Path) -> None:
    """With what to load; on the host, where this is a container. Root is not told to be root."""
    kernel.own_proc = tmp_path
    (kernel.dev / "vfio/vfio").unlink()
    (kernel.sysfs / "class/misc/vfio").unlink()
    for place, said in (
        (partial(place_process, tmp_path, user=1000), "modprobe -a vfio-pci vfio_iommu_type1, as root$"),
        (partial(place_process, tmp_path), "modprobe -a vfio-pci vfio_iommu_type1$"),
        (partial(place_process, tmp_path, container=True), "on the host, then start the container with --device"),
    ):
        place()
        with pytest.raises(pyvfio.UnavailableError, match=f"there is no .*/vfio/vfio.*has no VFIO.*{said}"):
            Container(kernel=kernel)


@pytest.mark.parametrize("node", ["vfio", "2"])
def test_a_node_that_may_not_be_opened_is_named_with_its_mode_and_a_rule(
    kernel: SpecialKernel, tmp_path: Path, node: str
) -> None:
    """Who it belongs to, who asks, and a ready-made udev rule. tests/unit/test_nodes.py has other places."""
    kernel.own_proc = tmp_path
    place_process(tmp_path, user=1000)
    kernel.fail(call="open", errno=errno.EACCES)
    opened: Callable[[], object] = partial(Container if node == "vfio" else partial(Group, 2), kernel=kernel)
    said = r"-rw.*owner \d+:\d+.*user 1000 with groups \[27, 1000\]\. Run as root, or .*udev rule"
    with pytest.raises(pyvfio.AccessDeniedError, match=said) as caught:
        opened()
    assert caught.value.path == str(kernel.dev / "vfio" / node)
    assert isinstance(caught.value, PermissionError)


def test_another_version_of_the_api_is_refused(kernel: SpecialKernel) -> None:
    """With both numbers."""
    kernel.answers["VFIO_GET_API_VERSION"] = 7
    with nothing_left(kernel), pytest.raises(pyvfio.UnsupportedError, match=r"version 7 .* version 0"):
        Container(kernel=kernel)


@pytest.mark.parametrize("wanted", [None, V1, V2])
def test_a_kernel_without_the_iommu_type_is_refused(kernel: SpecialKernel, wanted: ioctls.VfioExtension | None) -> None:
    """With its name in C, and the module that has it."""
    kernel.answers["VFIO_CHECK_EXTENSION"] = 0
    names = "VFIO_TYPE1v2_IOMMU nor VFIO_TYPE1_IOMMU" if wanted is None else wanted.name
    with nothing_left(kernel), pytest.raises(pyvfio.UnsupportedError, match=f"no {names}.*modprobe vfio_iommu_type1"):
        Container(kernel=kernel, iommu_type=wanted)


def test_type1v2_is_preferred_and_v1_is_had_for_the_asking(kernel: SpecialKernel) -> None:
    """And what is neither is refused before any call."""
    for wanted, had in ((None, V2), (V2, V2), (V1, V1)):
        with nothing_left(kernel), Container(kernel=kernel, iommu_type=wanted) as container:
            assert container.iommu_type == had
            kernel.clear_trace()
            container.attach(Group(2, kernel=kernel))
            assert [c.arguments["argument"] for c in kernel.trace if c.request == "VFIO_SET_IOMMU"] == [int(had)]
    kernel.clear_trace()
    with pytest.raises(ValueError, match="must be"):
        Container(kernel=kernel, iommu_type=ioctls.VFIO_UNMAP_ALL)
    assert not kernel.trace


def test_v1_is_taken_where_there_is_no_v2() -> None:
    """A kernel of before 2013."""

    class Old(FakeKernel):
        def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
            if request == ioctls.VFIO_CHECK_EXTENSION and argument == int(V2):
                return 0
            return super().ioctl(fd, request, argument)

    with Old() as kernel, nothing_left(kernel), Container(kernel=kernel) as container:
        assert container.iommu_type == V1


# --------------------------------------------------------------------------------------------------------- groups


def test_a_group_of_which_no_device_is_bound_is_refused_with_its_devices(kernel: SpecialKernel) -> None:
    """And the command that binds them."""
    kernel.bind(BDF, None)
    with nothing_left(kernel), pytest.raises(pyvfio.NotBoundError, match=f"IOMMU group 2.*pyvfio bind {BDF}"):
        Group(2, kernel=kernel)


def test_a_group_that_is_not_there_is_refused_with_those_that_are(kernel: SpecialKernel) -> None:
    """By number."""
    with nothing_left(kernel), pytest.raises(pyvfio.DeviceNotFoundError, match=r"no IOMMU group 99.*2, 3"):
        Group(99, kernel=kernel)


def test_a_group_that_is_open_is_refused_with_its_holders(kernel: SpecialKernel) -> None:
    """By pid and name; when nobody is found, with where to look."""
    with nothing_left(kernel), Group(2, kernel=kernel) as group:
        with pytest.raises(pyvfio.GroupBusyError, match=f"group 2 is already open in .*pid {os.getpid()}") as caught:
            Group(2, kernel=kernel)
        assert [holder.pid for holder in caught.value.holders] == [os.getpid()]
        assert caught.value.group == group.number


def test_a_group_with_a_device_of_a_kernel_driver_is_refused_with_those_that_block_it() -> None:
    """Each member is listed, only those that block are to be bound."""
    devices = [FakeDevice(BDF), FakeDevice("0000:00:02.1", driver="e1000e"), FakeDevice("0000:00:02.2", driver=None)]
    with FakeKernel(groups=[(2, devices)]) as kernel, nothing_left(kernel), Container(kernel=kernel) as container:
        with Group(2, kernel=kernel) as group, pytest.raises(pyvfio.GroupNotViableError) as caught:
            container.attach(group)
        assert "kernel drivers own 1 of 3 devices: 0000:00:02.1 (e1000e)" in str(caught.value)
        assert str(caught.value).endswith("pyvfio bind 0000:00:02.1")
        assert [(member.bdf, member.blocks) for member in caught.value.members] == [
            (BDF, False),
            ("0000:00:02.1", True),
            ("0000:00:02.2", False),
        ]
        assert container.group(2) is None


def test_no_interrupt_remapping_is_explained(kernel: SpecialKernel) -> None:
    """EPERM of VFIO_SET_IOMMU; the group is outside again."""
    with nothing_left(kernel), Container(kernel=kernel) as container, Group(2, kernel=kernel) as group:
        kernel.fail(call="ioctl", request="VFIO_SET_IOMMU", errno=errno.EPERM)
        with pytest.raises(
            pyvfio.IoctlError, match=r"VFIO_SET_IOMMU\(iommu=.*interrupt remapping.*allow_unsafe"
        ) as one:
            container.attach(group)
        assert one.value.errno == errno.EPERM
        assert not group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET
        container.attach(group)


@pytest.mark.parametrize(
    ("first", "request_name"),
    [
        (True, "VFIO_GROUP_SET_CONTAINER"),
        (True, "VFIO_SET_IOMMU"),
        (True, "VFIO_IOMMU_GET_INFO"),
        (False, "VFIO_GROUP_SET_CONTAINER"),  # the IOMMU is set already
        (False, "VFIO_IOMMU_GET_INFO"),
    ],
)
def test_a_group_that_cannot_be_attached_is_outside_as_before(
    kernel: SpecialKernel, request_name: str, *, first: bool
) -> None:
    """Whichever step fails; and can be attached then."""
    with nothing_left(kernel), Container(kernel=kernel) as container, Group(2, kernel=kernel) as group:
        if not first:
            container.attach(Group(3, kernel=kernel))
        kernel.fail(call="ioctl", request=request_name, errno=errno.EIO)
        with pytest.raises(pyvfio.IoctlError):
            container.attach(group)
        assert not group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET
        assert container.group(2) is None
        container.attach(group)
        assert container.group(2) is group
        container._check()


def test_a_group_that_can_neither_be_used_nor_taken_out_is_said_to_be(kernel: SpecialKernel) -> None:
    """Both failures; closing the group takes it out."""
    with nothing_left(kernel), Container(kernel=kernel) as container:
        group = Group(2, kernel=kernel)
        for request in ("VFIO_SET_IOMMU", "VFIO_GROUP_UNSET_CONTAINER"):
            kernel.fail(call="ioctl", request=request, errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError, match="could not be removed") as caught:
            container.attach(group)
        assert len(caught.value.exceptions) == 2
        group.close()
        container.attach(Group(2, kernel=kernel))


def test_a_group_is_attached_once(container: Container) -> None:
    """The kernel says EINVAL; the error says why."""
    group = container.group(2)
    assert group is not None
    with pytest.raises(pyvfio.IoctlError, match="already has a container"):
        container.attach(group)


def test_only_a_group_is_attached_or_detached(kernel: SpecialKernel, container: Container) -> None:
    """The number of one is none."""
    kernel.clear_trace()
    for call in (container.attach, container.detach):
        with pytest.raises(TypeError, match="group must be a Group, not int"):
            call(2)  # type: ignore[arg-type]
    assert kernel.trace == []


def test_several_groups_share_a_container(kernel: SpecialKernel, memory: int) -> None:
    """The IOMMU is set once, mappings count for all, and stay until the last group has left."""
    with nothing_left(kernel), Container(kernel=kernel) as container:
        one, two = Group(2, kernel=kernel), Group(3, kernel=kernel)
        container.attach(one)
        container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        container.attach(two)
        assert requests(kernel.trace).count("VFIO_SET_IOMMU") == 1
        assert kernel.mappings(BDF) == kernel.mappings(OTHER_BDF) != ()
        container.detach(one)
        assert container.group(2) is None
        assert kernel.mappings(BDF) == ()
        assert kernel.mappings(OTHER_BDF) != ()
        with pytest.raises(pyvfio.VfioError, match="with 1 mapping left"):
            container.detach(two)
        with pytest.raises(ValueError, match="group 2 is not in this container"):
            container.detach(one)
        container.unmap(iova=MIB, size=PAGE_SIZE)
        container.detach(two)
        with pytest.raises(pyvfio.VfioError, match="no group yet"):
            _ = container.info
        container.attach(one)
        two.close()


def test_a_group_with_an_open_device_cannot_be_detached(kernel: SpecialKernel, container: Container) -> None:
    """EBUSY, with what to do; it is still in."""
    group = container.group(2)
    assert group is not None
    with (
        pyvfio.open_device(BDF, container=container) as device,
        pytest.raises(pyvfio.IoctlError, match="Close the group's devices first"),
    ):
        container.detach(group)
    assert device.closed
    assert container.group(2) is group
    container.detach(group)
    group.close()


def test_ranges_are_read_anew_when_a_group_comes_and_goes(kernel: SpecialKernel, container: Container) -> None:
    """They are what all groups' IOMMUs offer together."""
    top = container.iova_ranges[-1].last
    kernel.top = 256 * GIB - 1
    group = Group(3, kernel=kernel)
    container.attach(group)
    assert container.iova_ranges[-1].last == 256 * GIB - 1
    kernel.top = None
    container.detach(group)
    assert container.iova_ranges[-1].last == top
    group.close()


def test_a_group_that_makes_a_reservation_unusable_is_refused(kernel: SpecialKernel, container: Container) -> None:
    """The kernel looks at live mappings alone; a block's reserved tail would fail much later, when it grows."""
    before = container.iova_ranges
    container.reserve_iova(GIB, alignment=PAGE_SIZE, offset=0, top_down=True)
    kernel.top = 256 * GIB - 1
    with Group(3, kernel=kernel) as group:
        with pytest.raises(pyvfio.IovaRangeError, match="1 reserved ranges of IOVA have become unusable") as caught:
            container.attach(group)
        assert caught.value.ranges[-1].last == 256 * GIB - 1
        assert not group.get_status() & ioctls.VFIO_GROUP_FLAGS_CONTAINER_SET
        assert container.group(3) is None
        assert container.iova_ranges == before


# ---------------------------------------------------------------------------------------------------- information


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("iommu", ["intel", "intel48", "amd", "virtio"])
def test_info_is_asked_for_until_all_of_it_fits(version: str, iommu: str) -> None:
    """argsz grows to what the kernel says, and is never more than the buffer; then everything is known."""
    with (
        FakeKernel(version, iommu=iommu) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        asked = [c.arguments["argsz"] for c in kernel.trace if c.request == "VFIO_IOMMU_GET_INFO"]
        assert len(asked) == 2
        assert asked[0] == 24
        container = device.container
        assert container.info.iova_ranges == kernel.iommu.ranges
        assert container.iova_pgsizes == kernel.iommu.reported_pgsizes
        assert container.page_size == PAGE_SIZE
        assert container.entries_left == kernel.iommu.dma_entry_limit
        last = kernel.iommu.ranges[-1].last
        refuses = last == U64_MAX and version != "7.3"
        assert container.iova_ranges[-1].last == (last - PAGE_SIZE if refuses else last)


@pytest.mark.parametrize("version", ["6.1", "6.12"])
def test_the_last_page_of_64_bits_is_not_mapped_where_it_could_not_be_unmapped(version: str) -> None:
    """The kernel maps it, and then UNMAP_ALL finds nothing at all: ordinary mappings would stay, too."""
    with FakeKernel(version, iommu="virtio") as kernel, nothing_left(kernel), Rig(kernel) as rig:
        container, memory = rig.container, rig.memory(2 * PAGE_SIZE)
        assert container.iova_ranges[-1].last == U64_MAX - PAGE_SIZE
        container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        kernel.clear_trace()
        for iova, size in ((U64_MAX + 1 - PAGE_SIZE, PAGE_SIZE), (U64_MAX + 1 - 2 * PAGE_SIZE, 2 * PAGE_SIZE)):
            with pytest.raises(pyvfio.IovaRangeError, match="can map but not unmap") as caught:
                container.map(vaddr=memory, iova=iova, size=size)
            assert caught.value.ranges == container.iova_ranges
            with pytest.raises(pyvfio.IovaRangeError):
                rig.mapper.map_dma(vaddr=memory, size=size, iova=iova)
        assert not kernel.trace
        assert container.unmap_all() == PAGE_SIZE
        rig.free(memory, 2 * PAGE_SIZE)


def test_the_last_page_of_64_bits_is_mapped_where_the_kernel_can_unmap_it() -> None:
    """The kernel tells by the errno of an unmap that wraps; only an IOMMU that has the page is asked."""
    with FakeKernel("7.3", iommu="virtio") as kernel, nothing_left(kernel), Rig(kernel) as rig:
        container, memory, last = rig.container, rig.memory(), U64_MAX + 1 - PAGE_SIZE
        assert container.iova_ranges[-1].last == U64_MAX
        container.map(vaddr=memory, iova=last, size=PAGE_SIZE)
        rig.check()
        container.unmap(iova=last, size=PAGE_SIZE)
        with pyvfio.DmaMapper(container, dma_bits=64) as wide, mmap.mmap(-1, PAGE_SIZE) as buffer:
            with wide.map_temporary(buffer) as mapping:
                assert mapping.iova == last
                assert wide.translate_iova(last, PAGE_SIZE) == mapping.vaddr
                wide._check()
            wide.reset_temporary()
        container.map(vaddr=memory, iova=last, size=PAGE_SIZE)
        assert container.unmap_all() == PAGE_SIZE
        rig.free(memory)
    with FakeKernel("6.12") as kernel, pyvfio.open_device(BDF, kernel=kernel):
        assert "VFIO_IOMMU_UNMAP_DMA" not in [call.request for call in kernel.trace]


def test_an_answer_that_wants_more_and_more_room_is_refused(kernel: SpecialKernel) -> None:
    """A kernel is trusted no further than a megabyte."""

    class Greedy(FakeKernel):
        def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
            result = super().ioctl(fd, request, argument)
            if self.trace[-1].request == "VFIO_IOMMU_GET_INFO" and isinstance(argument, bytearray):
                argument[:4] = (2 * len(argument)).to_bytes(4, "little")
            return result

    with Greedy() as greedy, nothing_left(greedy), pytest.raises(pyvfio.CapabilityError, match="wants a buffer of"):
        pyvfio.open_device(BDF, kernel=greedy)


def test_nothing_can_be_reserved_before_there_is_a_group(kernel: SpecialKernel) -> None:
    """Nor mapped: the errors say what is missing."""
    with nothing_left(kernel), Container(kernel=kernel) as container:
        for use in (
            partial(container.reserve_iova, PAGE_SIZE, alignment=PAGE_SIZE, offset=0),
            partial(container.reserve_iova_at, MIB, PAGE_SIZE),
        ):
            with pytest.raises(pyvfio.VfioError, match="no group yet"):
                use()
        with pytest.raises(pyvfio.IoctlError, match="attach one first"):
            container.map(vaddr=MIB, iova=MIB, size=PAGE_SIZE)


# -------------------------------------------------------------------------------------------------------- mapping


@pytest.mark.parametrize(("limit", "lock"), [(3 * PAGE_SIZE, 2), (PAGE_SIZE, 0)])
def test_the_pin_limit_is_told_with_all_numbers(
    kernel: SpecialKernel, container: Container, memory: int, limit: int, lock: int
) -> None:
    """Limit, used, asked, missing, and what to set it to."""
    if lock:
        container.map(vaddr=memory, iova=GIB, size=lock * PAGE_SIZE)
    kernel.memlock_limit = limit
    with pytest.raises(pyvfio.PinLimitError) as caught:
        container.map(vaddr=memory, iova=MIB, size=4 * PAGE_SIZE)
    error = caught.value
    assert (error.errno, error.limit, error.used, error.asked) == (
        errno.ENOMEM,
        limit,
        lock * PAGE_SIZE,
        4 * PAGE_SIZE,
    )
    missing = lock * 4 + 16 - limit // 1024
    for part in (
        f"lets this process lock {limit // 1024} KiB",
        f"{lock * 4} KiB are locked" if lock else "0 bytes are locked",
        "16 KiB were asked for",
        f"{missing} KiB are missing",
        f"ulimit -l {lock * 4 + 16} ",
        f"iova={MIB:#x}",
    ):
        assert part in str(error)
    kernel.memlock_limit = None


def test_the_entry_limit_is_told_with_how_many_are_in_use() -> None:
    """And the parameter that raises it."""
    with FakeKernel(iommu=small_iommu(3)) as kernel, nothing_left(kernel), Rig(kernel) as rig:
        memory = rig.memory()
        for number in range(3):
            rig.container.map(vaddr=memory, iova=MIB + number * PAGE_SIZE, size=PAGE_SIZE)
        assert rig.container.entries_left == 0
        with pytest.raises(pyvfio.EntryLimitError, match=r"all 3 mappings .* 3 of them.*dma_entry_limit") as caught:
            rig.container.map(vaddr=memory, iova=GIB, size=PAGE_SIZE)
        assert (caught.value.errno, caught.value.used, caught.value.limit) == (errno.ENOSPC, 3, 3)
        rig.device.close()
        rig.free(memory)


def test_the_entry_limit_is_what_it_was_when_the_iommu_was_set(kernel: SpecialKernel) -> None:
    """A container with one mapping more or less still says the same limit."""
    model = replace(iommu_model("intel", VERSIONS["6.12"]), dma_entry_limit=7)
    with FakeKernel(iommu=model) as other, nothing_left(other), Rig(other) as rig:
        rig.add()
        assert rig.container.entries_left == 6
        rig.container.attach(Group(3, kernel=other))
        other.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOSPC)
        with pytest.raises(pyvfio.EntryLimitError) as caught:
            rig.add("second")
        assert (caught.value.used, caught.value.limit) == (1, 7)


def test_an_einval_that_is_not_about_the_range_is_not_blamed_on_it(kernel: SpecialKernel, container: Container) -> None:
    """The lower call checks nothing itself."""
    with pytest.raises(pyvfio.IoctlError, match="multiples of 0x1000") as caught:
        container.map_dma(vaddr=1, iova=MIB, size=PAGE_SIZE)
    assert not isinstance(caught.value, pyvfio.IovaRangeError)
    assert caught.value.arguments == {"vaddr": 1, "iova": MIB, "size": PAGE_SIZE, "flags": 3}


# ------------------------------------------------------------------------------------------------------ unmapping


@pytest.mark.parametrize("iommu_type", [V1, V2])
@pytest.mark.parametrize("version", ["6.12", "7.3"])
def test_after_each_raw_call_the_table_is_what_the_kernel_has(version: str, iommu_type: ioctls.VfioExtension) -> None:
    """Also where v1 unmaps more than it was asked to, or nothing; a new address is in the table, too."""
    with SpecialKernel(version) as kernel, Container(kernel=kernel, iommu_type=iommu_type) as container:
        memory = kernel.mmap(0, 8 * PAGE_SIZE, READ_WRITE, PRIVATE)
        container.attach(Group(2, kernel=kernel))

        def check() -> None:
            container._check()
            assert [(m.iova, m.size, m.vaddr) for m in container.mappings] == [
                (m.iova, m.size, m.vaddr) for m in kernel.mappings()
            ]

        for start, end in itertools.combinations(range(-1, 5), 2):
            for at in (0, 2):
                with suppress(pyvfio.IovaOverlapError):
                    container.map_dma(vaddr=memory, iova=MIB + at * PAGE_SIZE, size=2 * PAGE_SIZE)
                check()
            with suppress(pyvfio.IoctlError):
                container.unmap_dma(iova=MIB + start * PAGE_SIZE, size=(end - start) * PAGE_SIZE)
            check()
        container.unmap_all()
        for iova in (0, MIB // 2, MIB):
            container.map_dma(vaddr=memory, iova=iova, size=PAGE_SIZE)
        assert container.unmap_dma(iova=MIB, size=PAGE_SIZE, flags=int(ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)) == PAGE_SIZE
        check()
        vaddr = memory + 4 * PAGE_SIZE
        container.map_dma(vaddr=vaddr, iova=MIB, size=PAGE_SIZE, flags=int(ioctls.VFIO_DMA_MAP_FLAG_VADDR))
        check()
        assert container.mapping_at(MIB) == (MIB, PAGE_SIZE, vaddr)
        for number, hint in ((errno.EINVAL, f"mappings in this range are: {MIB:#x}"), (errno.ENOMEM, "")):
            kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=number)
            with pytest.raises(pyvfio.IoctlError) as caught:
                container.unmap_dma(iova=MIB, size=PAGE_SIZE)
            error = caught.value
            assert (error.errno, hint in error.hint, bool(error.hint)) == (number, True, bool(hint))
        container.unmap_dma(iova=0, size=0, flags=int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL))
        check()
        assert container.mappings == ()
        kernel.munmap(memory, 8 * PAGE_SIZE)


@pytest.mark.parametrize("name", ["vaddr", "iova", "size", "flags"])
def test_numbers_that_a_raw_call_cannot_hold_are_refused_before_the_call(
    kernel: SpecialKernel, container: Container, memory: int, name: str
) -> None:
    """The highest that it can hold are the kernel's to refuse."""
    top = (1 << 32) - 1 if name == "flags" else U64_MAX
    good = {"iova": MIB, "size": PAGE_SIZE, "flags": 3}
    calls: list[tuple[Callable[..., object], dict[str, int]]] = [(container.map_dma, {"vaddr": memory, **good})]
    if name != "vaddr":
        calls.append((container.unmap_dma, {**good, "flags": 0}))
    for call, arguments in calls:
        kernel.clear_trace()
        for number in (-1, top + 1):
            with pytest.raises(ValueError, match="64 bits, flags has 32"):
                call(**{**arguments, name: number})
        assert not kernel.trace
        with pytest.raises(pyvfio.VfioError):
            call(**{**arguments, name: top})
        assert len(requests(kernel.trace)) == 1
    assert container.mappings == ()


@pytest.mark.parametrize("has_the_flag", [True, False])
def test_everything_can_be_unmapped_at_once(
    kernel: SpecialKernel, container: Container, memory: int, *, has_the_flag: bool
) -> None:
    """IOVA stays reserved; a size that is too small is an error, and the table is empty all the same."""
    if not has_the_flag:
        kernel.answers["VFIO_CHECK_EXTENSION"] = 0
    iova = container.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
    container.map(vaddr=memory, iova=iova, size=PAGE_SIZE)
    container.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE)
    assert container.unmap_all() == 3 * PAGE_SIZE
    assert (container.mappings, kernel.mappings()) == ((), ())
    assert [r.start for r in container.reserved_iova] == [iova]
    assert container.unmap_all() == 0
    container.map(vaddr=memory, iova=MIB, size=2 * PAGE_SIZE)
    kernel.ioctl(
        container.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, ioctls.vfio_iommu_type1_dma_unmap(24, 0, MIB, 2 * PAGE_SIZE)
    )
    with pytest.raises(pyvfio.UnmapSizeError, match=r"asked for 0x2000 .* unmapped 0x0"):
        container.unmap_all()
    assert container.mappings == ()


# -------------------------------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("closed", ["device", "container"])
def test_the_tear_down_goes_from_the_top_down(kernel: SpecialKernel, closed: str) -> None:
    """Interrupts, bus master, reset, device; mappings; group out of the container, group, container. Whichever of them
    is told to close."""
    with FakeKernel(groups=[(2, [FakeDevice(BDF, resettable=True)])]) as other, nothing_left(other):
        device = pyvfio.open_device(BDF, kernel=other)
        names = {device.container.fd: "container", device.group.fd: "group", device.fd: "device"}
        device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
        device.bus_master = True
        with pyvfio.RamBlockList(kernel=other) as blocks:
            mapper = pyvfio.DmaMapper(device.container, blocks)
            blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB)
            closes = {"device": device.close, "container": device.container.close}
            other.clear_trace()
            closes[closed]()
            steps = [call.request or f"{call.call} {names.get(int(call.given[0]), 'eventfd')}" for call in other.trace]
            assert steps == [
                "VFIO_DEVICE_SET_IRQS",
                "close eventfd",
                "close eventfd",
                "pread device",
                "pwrite device",
                "pread device",  # is it still there?
                "VFIO_DEVICE_RESET",
                "close device",
                "VFIO_CHECK_EXTENSION",
                "VFIO_IOMMU_UNMAP_DMA",
                "VFIO_GROUP_UNSET_CONTAINER",
                "close group",
                "close container",
            ]
            assert other.trace[4].given[1] == b"\2\0"
            mapper.close()


def _closers(rig: Rig) -> dict[str, Callable[[], None]]:
    return {
        "device": rig.device.close,
        "group": rig.group.close,
        "container": rig.container.close,
        "mapper": rig.mapper.close,
        "blocks": rig.blocks.close,
    }


@pytest.mark.long
@pytest.mark.parametrize("shared", [False, True], ids=["the device's own container", "a container of several"])
def test_everything_may_be_closed_in_every_order_and_twice(kernel: SpecialKernel, *, shared: bool) -> None:
    """No step raises, no memory goes while a device reaches it, and at the end nothing is left."""
    orders = list(itertools.permutations(("device", "group", "container", "mapper", "blocks")))
    for order in orders:
        with nothing_left(kernel), ExitStack() as stack:
            if shared:
                common = stack.enter_context(Container(kernel=kernel))
                stack.enter_context(pyvfio.open_device(OTHER_BDF, container=common))
                rig = Rig(kernel, container=common)
            else:
                rig = Rig(kernel)
            memory = rig.memory(2 * PAGE_SIZE)
            mapping = rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
            rig.mapper.map_temporary(_page()).close()
            rig.add("one")
            rig.add("none", used=0)
            rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
            closers = _closers(rig)
            for name in order:
                if name == "group" and rig.container.must_stay(rig.group):
                    with pytest.raises(pyvfio.VfioError, match=r"last group of the container, with .* left"):
                        closers[name]()
                    continue
                closers[name]()
                kernel.check()
                closers[name]()
            rig.group.close()
            mapping.close()
            rig.free(memory, 2 * PAGE_SIZE)
    print(f"{len(orders)} orders")


def _page() -> memoryview:
    return memoryview(mmap.mmap(-1, PAGE_SIZE))


@pytest.mark.parametrize("leave", ["close", "detach"])
def test_the_last_group_does_not_leave_while_memory_is_mapped(
    kernel: SpecialKernel, container: Container, memory: int, leave: str
) -> None:
    """Neither it nor its devices are closed; without mappings it leaves, and the container can be used again."""
    group = container.group(2)
    assert group is not None
    device = pyvfio.Device(group, BDF)
    container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    ways: dict[str, Callable[[], None]] = {"close": group.close, "detach": partial(container.detach, group)}
    with pytest.raises(pyvfio.VfioError, match=r"group 2 is the last group .* 1 mapping left.*unmap_all"):
        ways[leave]()
    assert len(kernel.mappings(BDF)) == len(container.mappings) == 1
    assert not device.closed
    device.close()
    container.unmap_all()
    ways[leave]()
    assert not container.lost
    assert container.groups == {}
    group.close()
    container.attach(Group(2, kernel=kernel))
    container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)


def test_a_last_group_that_leaves_past_the_container_is_noticed(
    kernel: SpecialKernel, container: Container, memory: int
) -> None:
    """By the raw call: the kernel unmaps everything, and the container says so for good."""
    group = container.group(2)
    assert group is not None
    container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    group.unset_container()
    assert container.lost
    assert (container.mappings, kernel.mappings()) == ((), ())
    container.unmap(iova=MIB, size=PAGE_SIZE)
    container.attach(group)
    assert container.lost


def test_closing_a_group_that_is_not_the_last_unmaps_nothing(
    kernel: SpecialKernel, container: Container, memory: int
) -> None:
    """The others still need it."""
    other = Group(3, kernel=kernel)
    container.attach(other)
    container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    other.close()
    assert len(kernel.mappings(BDF)) == len(container.mappings) == 1


def test_a_group_that_is_closed_is_not_in_the_container_though_another_process_keeps_it_there(
    kernel: SpecialKernel, container: Container, memory: int
) -> None:
    """By a device that is open there, for which the kernel refuses. The kernel removes the group with that device."""
    other = Group(3, kernel=kernel)
    container.attach(other)
    container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    stranger = other.get_device_fd(OTHER_BDF)
    other.close()
    assert (other.closed, other.container, sorted(container.groups)) == (True, None, [2])
    assert len(container.mappings) == 1
    kernel.close(stranger)


@pytest.mark.parametrize("number", [-1, -(1 << 40)])
def test_a_number_that_no_group_has_is_refused_before_any_call(kernel: SpecialKernel, number: int) -> None:
    """0 is the number of a group."""
    kernel.clear_trace()
    makers: tuple[Callable[[Any], object], ...] = (
        lambda number: Group(number, kernel=kernel),
        lambda number: Group.from_fd(0, number=number, kernel=kernel),
    )
    for make in makers:
        with pytest.raises(ValueError, match=f"0 or more, not {number}$"):
            make(number)
        with pytest.raises(TypeError):
            make("2")
    assert kernel.trace == []
    with pytest.raises(pyvfio.DeviceNotFoundError, match="no IOMMU group 0"):
        Group(0, kernel=kernel)


@pytest.mark.parametrize(
    ("number", "token", "hint"),
    [
        (errno.ENODEV, None, f"pyvfio bind {BDF}"),
        (errno.EINVAL, None, ""),
        (errno.EMFILE, None, "ulimit -n"),
        (errno.EIO, "00112233-4455-6677-8899-aabbccddeeff", ""),
    ],
)
def test_a_device_that_a_group_does_not_open_is_named_and_no_token_is_told(
    kernel: SpecialKernel, container: Container, number: int, token: str | None, hint: str
) -> None:
    """A token is a secret: the error says whether one was given."""
    group = container.group(2)
    assert group is not None
    before = kernel.descriptors
    kernel.fail(call="ioctl", request="VFIO_GROUP_GET_DEVICE_FD", errno=number)
    with pytest.raises(pyvfio.IoctlError, match=errno.errorcode[number]) as caught:
        group.get_device_fd(BDF, vf_token=token)
    assert (caught.value.errno, caught.value.request) == (number, "VFIO_GROUP_GET_DEVICE_FD")
    assert caught.value.arguments == {"name": BDF, **({} if token is None else {"vf_token": "given"})}
    assert caught.value.message.startswith("IOMMU group 2: ")
    assert hint in caught.value.hint
    assert (kernel.descriptors, group.devices) == (before, [])


def test_where_no_group_is_nothing_is_unmapped(kernel: SpecialKernel) -> None:
    """Nor asked for."""
    with nothing_left(kernel), Container(kernel=kernel) as container:
        kernel.clear_trace()
        assert container.unmap_all() == 0
        assert kernel.trace == []


def test_a_kernel_without_unmap_all_is_asked_for_each_mapping(memory: int, kernel: SpecialKernel) -> None:
    """Before 5.12; all are tried, whatever one of them says."""
    with nothing_left(kernel):
        container = Container(kernel=kernel)
        container.attach(Group(2, kernel=kernel))
        for number in range(3):
            container.map(vaddr=memory, iova=MIB + 2 * number * PAGE_SIZE, size=PAGE_SIZE)
        kernel.answers["VFIO_CHECK_EXTENSION"] = 0
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        kernel.clear_trace()
        with pytest.raises(pyvfio.IoctlError):
            container.close()
        assert requests(kernel.trace).count("VFIO_IOMMU_UNMAP_DMA") >= 3


def test_what_close_could_not_unmap_went_with_the_last_group(kernel: SpecialKernel) -> None:
    """So that blocks can be removed, and their memory given back."""
    with nothing_left(kernel):
        rig = Rig(kernel)
        rig.add()
        for nth in (1, 2):
            kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", nth=nth, errno=errno.EIO)
        with pytest.raises(pyvfio.IoctlError):
            rig.device.close()
        rig.blocks.close()
        rig.mapper.close()


def test_memory_is_kept_while_another_process_keeps_the_group_in(kernel: SpecialKernel) -> None:
    """Nothing could be unmapped, and the group would not leave: nobody knows that the device does not reach it."""
    rig = Rig(kernel)
    block = rig.add()
    stranger = rig.group.get_device_fd(BDF)
    for nth in (1, 2):
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", nth=nth, errno=errno.EIO)
    with pytest.raises((pyvfio.IoctlError, pyvfio.RollbackError)):
        rig.device.close()
    assert len(kernel.mappings(BDF)) == 1
    with pytest.raises(pyvfio.ClosedError):
        block.remove()
    kernel.check()
    kernel.close(stranger)
    assert kernel.mappings() == ()


@pytest.mark.long
def test_without_assertions_each_refusal_stays() -> None:
    """`python -O` changes nothing."""
    program = """
        import pyvfio
        from pyvfio.testing import FakeKernel
        with FakeKernel() as kernel, pyvfio.open_device("0000:00:02.0", kernel=kernel) as device:
            container, irq, config = device.container, device.irq(1), device.config
            irq.enable(1)
            uses = [(ValueError, lambda: irq.trigger(7)), (ValueError, lambda: config.read16(1))]
            uses += [(ValueError, lambda: irq.wait(7)), (ValueError, lambda: container.map(vaddr=1, iova=0, size=4096))]
            closed = [lambda: container.reserve_iova(4096, alignment=4096, offset=0), lambda: container.entries_left]
            closed += [lambda: container.detach(device.group), device.reset, lambda: config.read16(0), irq.wait]
            def refused(expected, use):
                try:
                    use()
                except expected:
                    print("refused")
            for expected, use in uses:
                refused(expected, use)
            device.close()
            for use in closed:
                refused(pyvfio.ClosedError, use)
        """
    command = [sys.executable, "-O", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 10, done.stderr


def test_a_closed_container_says_so(kernel: SpecialKernel) -> None:
    """To whoever wants to map; unmapping what it had is done already."""
    with nothing_left(kernel), Container(kernel=kernel) as container:
        group = Group(2, kernel=kernel)
        container.attach(group)
        container.close()
        with pytest.raises(pyvfio.ClosedError):
            container.detach(group)
        with pytest.raises(pyvfio.ClosedError):
            container.reserve_iova(PAGE_SIZE, alignment=PAGE_SIZE, offset=0)
        with pytest.raises(pyvfio.ClosedError):
            container.map(vaddr=MIB, iova=MIB, size=PAGE_SIZE)
        container.unmap(iova=MIB, size=PAGE_SIZE)


def test_in_a_forked_child_a_container_is_an_error_and_closing_it_does_nothing(
    kernel: SpecialKernel, container: Container, memory: int
) -> None:
    """What the child did would happen to its parent."""
    container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    group = container.group(2)
    assert group is not None

    def child() -> None:
        for use in (
            partial(container.map, vaddr=memory, iova=GIB, size=PAGE_SIZE),
            partial(container.unmap, iova=MIB, size=PAGE_SIZE),
            partial(container.reserve_iova, PAGE_SIZE, alignment=PAGE_SIZE, offset=0),
            container.get_info,
            group.get_status,
            partial(group.get_device_fd, BDF),
        ):
            with pytest.raises(pyvfio.ForkedError):
                use()
        group.close()
        container.close()

    assert in_child(child) == 0
    assert len(kernel.mappings(BDF)) == 1


def test_a_device_node_is_found_by_the_groups_number(kernel: SpecialKernel) -> None:
    """The file that is opened is the group's."""
    with nothing_left(kernel), Group(3, kernel=kernel) as group:
        assert str(kernel.trace[0].given[0]) == str(pci.group_node(3, kernel=kernel))
        assert group.number == 3
