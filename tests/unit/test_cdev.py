"""Devices on their own nodes, bound to an iommufd: opened, moved among address spaces, and closed."""

from __future__ import annotations

import errno
import gc
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import permutations
from typing import Literal
from uuid import UUID, uuid4

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.ioas import Ioas
from pyvfio.iommufd import Iommufd
from pyvfio.testing.fake import FakeDevice, FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, nothing_left, requests
from tests.unit.processes import in_child

FIRST, SECOND = "0000:01:00.0", "0000:01:00.1"
ROOT = "0000:00:04.0"
PF, VF = "0000:00:06.0", "0000:00:06.1"
BOTH = ["6.12", "7.3"]
_ATTACH = "VFIO_DEVICE_ATTACH_IOMMUFD_PT"
_DETACH = "VFIO_DEVICE_DETACH_IOMMUFD_PT"
_BIND = "VFIO_DEVICE_BIND_IOMMUFD"


@pytest.fixture(params=BOTH)
def kernel(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    """A kernel with iommufd beside type1. Each test leaves nothing open."""
    with FakeKernel(request.param, iommufd=True) as made, nothing_left(made):
        yield made


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    """A kernel with iommufd and without type1."""
    with FakeKernel("7.3", iommufd=True, type1=False) as made, nothing_left(made):
        yield made


@pytest.fixture
def device(kernel: FakeKernel) -> Iterator[pyvfio.Device]:
    """A device with a space of its own."""
    with pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as made:
        yield made


@pytest.fixture(params=BOTH)
def siblings(request: pytest.FixtureRequest) -> Iterator[FakeKernel]:
    """Two devices of one group on a bus that can be reset, and one that is alone."""
    groups = [(4, [FakeDevice(FIRST), FakeDevice(SECOND)]), (5, [FakeDevice(ROOT)])]
    with FakeKernel(request.param, iommufd=True, groups=groups) as made, nothing_left(made):
        yield made


def space_of(device: pyvfio.Device) -> Ioas:
    """The address space of a device, which is an Ioas."""
    space = device.space
    assert isinstance(space, Ioas)
    return space


def iommufd_of(device: pyvfio.Device) -> Iommufd:
    """The iommufd of a device."""
    assert device.iommufd is not None
    return device.iommufd


# ------------------------------------------------------------------------------------------------------------ open


@pytest.mark.parametrize(
    ("type1", "iommu", "words"),
    [
        (True, None, "the kernel has type1, which is the first choice"),
        (True, "type1", "the program asked for type1"),
        (True, "iommufd", "the program asked for iommufd"),
        (False, None, "type1 cannot be used without .*/dev/vfio/vfio and .*/dev/vfio/2"),
    ],
)
def test_a_space_says_why_it_is_of_that_kind(
    *, type1: bool, iommu: Literal["type1", "iommufd"] | None, words: str
) -> None:
    """Whoever chose it."""
    with FakeKernel("7.3", iommufd=True, type1=type1) as kernel, nothing_left(kernel):
        with pyvfio.open_device(BDF, iommu=iommu, kernel=kernel) as device:
            assert re.fullmatch(words, device.space.why)
        with pyvfio.Ioas(kernel=kernel) as space:
            assert space.why == "the program made this object"


@pytest.mark.parametrize("node", ["vfio/vfio", "vfio/2"])
def test_the_reason_names_the_node_that_is_missing_alone(node: str) -> None:
    """A container is of no use without the group, nor the other way round."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel):
        (kernel.dev / node).unlink()
        with pyvfio.open_device(BDF, kernel=kernel) as device:
            assert space_of(device).why == f"type1 cannot be used without {kernel.dev / node}"


def test_a_type_of_container_is_a_choice_of_type1_and_a_given_space_keeps_its_reason(kernel: FakeKernel) -> None:
    """Whichever device comes in later, and whatever is said then."""
    with pyvfio.open_device(BDF, kernel=kernel, iommu_type=ioctls.VFIO_TYPE1_IOMMU) as device:
        assert device.space.why == "the program asked for type1"
    kinds: tuple[Literal["type1", "iommufd"] | None, ...] = ("type1", "iommufd", None)
    for iommu in kinds:
        with pyvfio.open_device(BDF, kernel=kernel, iommu=iommu) as device:
            before = device.space.why
            with pyvfio.open_device(OTHER_BDF, space=device.space):
                assert device.space.why == before
        for made in (pyvfio.Container(kernel=kernel), pyvfio.Ioas(kernel=kernel)):
            with made, pyvfio.open_device(BDF, space=made):
                assert made.why == "the program made this object"


def test_an_iommufd_of_open_device_is_closed_with_the_last_space_whatever_the_order() -> None:
    """A device that has moved to a second space keeps the iommufd open, and no longer than that."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel):
        first = pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
        space = first.space
        assert isinstance(space, pyvfio.Ioas)
        beside = pyvfio.Ioas(space.iommufd)
        other = pyvfio.open_device(OTHER_BDF, space=beside)
        first.close()
        assert space.closed
        assert not space.iommufd.closed
        other.bus_master = True
        other.close()
        beside.close()
        assert space.iommufd.closed


@pytest.mark.parametrize("order", [*permutations(("device", "space", "beside"))], ids="-".join)
def test_an_iommufd_of_a_space_is_closed_with_the_last_thing_whatever_the_order(order: Sequence[str]) -> None:
    """Also if that is a device without a space, which belongs to the iommufd alone."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel):
        space = pyvfio.Ioas(kernel=kernel)
        things = {"space": space, "beside": pyvfio.Ioas(space.iommufd)}
        with pyvfio.open_device(BDF, space=space) as device:
            device.detach()
            for name in order[:-1]:
                (things | {"device": device})[name].close()
                assert not space.iommufd.closed
            (things | {"device": device})[order[-1]].close()
            assert space.iommufd.closed
            assert kernel.descriptors == ()


def test_a_device_is_opened_bound_and_attached_in_one_call(kernel: FakeKernel) -> None:
    kernel.clear_trace()
    with pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as device:
        made = requests(kernel.trace)
        steps = ["IOMMU_IOAS_ALLOC", _BIND, _ATTACH, "IOMMU_IOAS_IOVA_RANGES"]
        assert sorted(steps, key=made.index) == steps
        assert repr(device) == f"<Device {BDF} in I/O address space {space_of(device).id}>"
        assert repr(space_of(device)) == f"<Ioas {space_of(device).id} with 1 device, 0 mappings>"
        assert (device.group_number, space_of(device).devices) == (2, [device])
        assert device.config.read16(0) == 0x1234


def test_memory_that_is_mapped_in_its_space_is_reached(kernel: FakeKernel, device: pyvfio.Device) -> None:
    with (
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pyvfio.DmaMapper(device.space, blocks) as mapper,
    ):
        block = blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB)
        device.bus_master = True
        kernel.dma_write(BDF, mapper.iova(block), b"from the device")
        with block.view() as view:
            assert bytes(view[:15]) == b"from the device"


def test_a_second_device_is_opened_in_the_same_space(kernel: FakeKernel, device: pyvfio.Device) -> None:
    with pyvfio.open_device(OTHER_BDF, space=device.space) as other:
        assert other.space is device.space
        assert iommufd_of(other) is device.iommufd
        assert space_of(device).devices == [device, other]
    assert not device.closed
    assert space_of(device).devices == [device]


def test_a_space_that_the_caller_made_outlives_its_devices(kernel: FakeKernel) -> None:
    with Ioas(kernel=kernel) as space:
        for _ in range(2):
            with pyvfio.open_device(BDF, space=space) as device:
                assert device.space is space
        assert (space.closed, space.devices) == (False, [])


def test_a_device_on_iommufd_has_no_group_and_no_container(device: pyvfio.Device) -> None:
    with pytest.raises(pyvfio.VfioError, match=r"without the IOMMU group\. device\.group_number"):
        _ = device.group
    with pytest.raises(pyvfio.VfioError, match=r"no container of type1\. device\.space"):
        _ = device.container


def test_a_closed_device_through_a_group_has_no_space_though_the_group_stays_in_the_container(
    kernel: FakeKernel,
) -> None:
    with pyvfio.Container(kernel=kernel) as container, Ioas(kernel=kernel) as space:
        container.attach(pyvfio.Group(2, kernel=kernel))
        device = pyvfio.open_device(BDF, container=container)
        device.close()
        assert device.group.container is container
        for use in (lambda: device.container, lambda: device.space, device.detach, partial(device.attach, space)):
            with pytest.raises(pyvfio.ClosedError, match=f"{BDF} has been closed"):
                use()


def test_a_device_through_a_group_has_no_iommufd_and_stays_in_its_container(kernel: FakeKernel) -> None:
    with pyvfio.open_device(BDF, kernel=kernel) as device, Ioas(kernel=kernel) as space:
        assert device.iommufd is None
        assert device.space is device.container
        for call in (device.detach, partial(device.attach, space)):
            with pytest.raises(pyvfio.UnsupportedError, match=r'through an IOMMU group.*iommu="iommufd"'):
                call()
        assert device.space is device.container


def test_a_device_is_opened_once_at_a_time(kernel: FakeKernel, device: pyvfio.Device) -> None:
    kernel.clear_trace()
    with pytest.raises(pyvfio.VfioError, match=r"open already in the iommufd\. Use the Device in iommufd\.devices"):
        pyvfio.open_device(BDF, space=device.space)
    assert _BIND not in requests(kernel.trace)


def test_a_device_is_bound_to_one_iommufd(kernel: FakeKernel, device: pyvfio.Device) -> None:
    """procfs names the holder."""
    with pytest.raises(pyvfio.GroupBusyError, match="bound to one iommufd, through one descriptor") as caught:
        pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
    assert [holder.pid for holder in caught.value.holders] == [os.getpid()]
    assert not device.closed


def test_a_group_that_is_open_keeps_the_node_from_being_bound_and_the_reverse(kernel: FakeKernel) -> None:
    for first, second in (("type1", "iommufd"), ("iommufd", "type1")):
        with (
            pyvfio.open_device(BDF, iommu=first, kernel=kernel),  # type: ignore[arg-type]
            pytest.raises(pyvfio.GroupBusyError),
        ):
            pyvfio.open_device(BDF, iommu=second, kernel=kernel)  # type: ignore[arg-type]


def test_interrupts_that_are_not_remapped_are_named_with_the_parameter_of_iommufd(kernel: FakeKernel) -> None:
    kernel.fail(call="ioctl", request=_BIND, errno=errno.EPERM)
    with pytest.raises(pyvfio.IoctlError, match=r"could not be bound to the iommufd.*interrupt") as caught:
        pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
    assert (caught.value.errno, caught.value.bdf) == (errno.EPERM, BDF)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_rights_on_either_node_are_named(kernel: FakeKernel, number: int) -> None:
    for nth, node in ((1, "iommu"), (2, "vfio/devices/vfio")):
        kernel.fail(call="open", errno=number, nth=nth)
        with pytest.raises(pyvfio.AccessDeniedError, match=node):
            pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
        kernel.clear_failures()


def test_an_explicit_choice_never_falls_back(alone: FakeKernel) -> None:
    with pytest.raises(pyvfio.VfioError):
        pyvfio.open_device(BDF, iommu="type1", kernel=alone)
    with FakeKernel("6.12") as old, nothing_left(old), pytest.raises(pyvfio.UnavailableError, match="no node below"):
        pyvfio.open_device(BDF, iommu="iommufd", kernel=old)


def test_a_device_that_is_not_bound_to_vfio_is_said_to_be(kernel: FakeKernel) -> None:
    other = "0000:00:05.0"
    with (
        FakeKernel("7.3", iommufd=True, groups=[(9, [FakeDevice(other, driver="e1000e")])]) as plain,
        pytest.raises(pyvfio.NotBoundError, match="e1000e"),
    ):
        pyvfio.open_device(other, iommu="iommufd", kernel=plain)
    with pytest.raises(pyvfio.DeviceNotFoundError):
        pyvfio.open_device("0000:7f:00.0", iommu="iommufd", kernel=kernel)


def test_a_device_without_a_node_is_not_opened_in_a_space_that_there_is(kernel: FakeKernel) -> None:
    """The error names the driver of the device, and not a file that cannot be found."""
    with Ioas(kernel=kernel) as space:
        kernel.bind(BDF, "e1000e")
        kernel.clear_trace()
        with pytest.raises(pyvfio.NotBoundError, match=f"^{BDF} .*e1000e"):
            pyvfio.open_device(BDF, space=space)
        assert "open" not in requests(kernel.trace)
        assert space.devices == []


# ------------------------------------------------------------------------------------------------------- the choice


def test_type1_is_used_while_there_is_one_and_iommufd_where_there_is_none(
    kernel: FakeKernel, alone: FakeKernel
) -> None:
    with pyvfio.open_device(BDF, kernel=kernel) as device:
        assert isinstance(device.space, pyvfio.Container)
    with pyvfio.open_device(BDF, kernel=alone) as device:
        assert space_of(device).why.startswith("type1 cannot be used without /")


def test_the_reason_of_an_explicit_choice_is_that_it_was_made(device: pyvfio.Device) -> None:
    assert space_of(device).why == "the program asked for iommufd"


def test_an_iommu_type_is_a_choice_of_type1(kernel: FakeKernel, alone: FakeKernel) -> None:
    with pyvfio.open_device(BDF, kernel=kernel, iommu_type=ioctls.VFIO_TYPE1_IOMMU) as device:
        assert device.container.iommu_type == ioctls.VFIO_TYPE1_IOMMU
    with pytest.raises(pyvfio.UnavailableError):
        pyvfio.open_device(BDF, kernel=alone, iommu_type=ioctls.VFIO_TYPE1_IOMMU)


def test_arguments_of_two_kinds_are_refused_before_any_call(kernel: FakeKernel) -> None:
    with pyvfio.Container(kernel=kernel) as container, Ioas(kernel=kernel) as space:
        kernel.clear_trace()
        refused: list[tuple[type[Exception], str, Callable[[], object]]] = [
            (ValueError, "'type1', 'iommufd', 'unsafe-noiommu' or None", lambda: pyvfio.open_device(BDF, iommu="vt-d")),  # type: ignore[arg-type]
            (ValueError, "^a Container is .* type1", lambda: pyvfio.open_device(BDF, iommu="iommufd", space=container)),
            (
                ValueError,
                "^a Container is .* type1",
                lambda: pyvfio.open_device(BDF, iommu="iommufd", container=container),
            ),
            (ValueError, "^an Ioas is .* iommufd", lambda: pyvfio.open_device(BDF, iommu="type1", space=space)),
            (ValueError, "two address spaces", lambda: pyvfio.open_device(BDF, space=space, container=container)),
            (
                ValueError,
                "iommu_type is for containers",
                lambda: pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel, iommu_type=ioctls.VFIO_TYPE1_IOMMU),
            ),
            (
                ValueError,
                "iommu_type is for containers",
                lambda: pyvfio.open_device(BDF, space=space, iommu_type=ioctls.VFIO_TYPE1_IOMMU),
            ),
            (TypeError, "space must be a Container or an Ioas", lambda: pyvfio.open_device(BDF, space=kernel)),  # type: ignore[arg-type]
            (TypeError, "container must be a Container", lambda: pyvfio.open_device(BDF, container=space)),  # type: ignore[arg-type]
            (TypeError, "through a Group or an Ioas", lambda: pyvfio.Device(container, BDF)),  # type: ignore[arg-type]
        ]
        for kind, match, call in refused:
            with pytest.raises(kind, match=match):
                call()
        assert not kernel.trace


# ------------------------------------------------------------------------------------------------------------- tokens


def _pair(version: str) -> FakeKernel:
    return FakeKernel(version, iommufd=True, groups=[(6, [FakeDevice(PF, sriov=True)]), (7, [FakeDevice(VF, pf=PF)])])


def test_a_virtual_function_is_opened_with_the_token_of_its_physical_one() -> None:
    token = uuid4()
    with (
        _pair("7.3") as kernel,
        nothing_left(kernel),
        pyvfio.open_device(PF, iommu="iommufd", kernel=kernel, vf_token=token),
    ):
        with pyvfio.open_device(VF, iommu="iommufd", kernel=kernel, vf_token=str(token)) as virtual:
            assert virtual.group_number == 7
        for given, words in ((None, "asks for a vf_token"), (UUID(int=3), "asks for another vf_token")):
            with pytest.raises(pyvfio.IoctlError, match=f"drives {PF}, the .* of {VF}, and so {words}.*{PF}") as caught:
                pyvfio.open_device(VF, iommu="iommufd", kernel=kernel, vf_token=given)
            assert caught.value.errno == errno.EACCES
            assert caught.value.request == _BIND
            assert caught.value.arguments == {"device": VF} | ({} if given is None else {"vf_token": "given"})


def test_a_physical_function_needs_the_token_of_its_open_virtual_ones() -> None:
    token = uuid4()
    with _pair("7.3") as kernel, nothing_left(kernel):
        physical = partial(pyvfio.open_device, PF, iommu="iommufd", kernel=kernel)
        physical(vf_token=token).close()
        with pyvfio.open_device(VF, iommu="iommufd", kernel=kernel, vf_token=token):
            for given in (None, uuid4()):
                with pytest.raises(pyvfio.IoctlError, match=f"functions of {PF} are open: pass the token") as caught:
                    physical(vf_token=given)
                assert caught.value.errno == errno.EACCES
            physical(vf_token=token).close()


def test_a_device_that_takes_no_token_says_so() -> None:
    with (
        FakeKernel("7.3", iommufd=True) as kernel,
        nothing_left(kernel),
        pytest.raises(pyvfio.IoctlError, match="Leave vf_token out") as caught,
    ):
        pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel, vf_token=uuid4())
    assert caught.value.errno == errno.EINVAL


def test_a_kernel_whose_nodes_take_no_token_is_told_apart() -> None:
    with (
        _pair("6.12") as kernel,
        nothing_left(kernel),
        pytest.raises(pyvfio.UnsupportedError, match=r'Linux 6\.17 is the first.*iommu="type1"'),
    ):
        pyvfio.open_device(VF, iommu="iommufd", kernel=kernel, vf_token=uuid4())


# ------------------------------------------------------------------------------------------------- attach and detach


def _mapped(kernel: FakeKernel, space: Ioas, stack: ExitStack, content: bytes) -> pyvfio.RamBlock:
    """A page at IOVA 1 MiB of a space to which a device is attached."""
    blocks = stack.enter_context(pyvfio.RamBlockList(kernel=kernel))
    block = blocks.add("page", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
    with block.view() as view:
        view[: len(content)] = content
    space.map(vaddr=block.vaddr, iova=MIB, size=PAGE_SIZE)
    stack.callback(lambda: None if space.closed else space.unmap(iova=MIB, size=PAGE_SIZE))
    return block


def test_a_device_moves_to_another_space_in_one_call(kernel: FakeKernel, device: pyvfio.Device) -> None:
    """The same IOVA is other memory from then on; each space has the device once."""
    first = space_of(device)
    with Ioas(device.iommufd) as second, ExitStack() as stack:
        device.bus_master = True
        _mapped(kernel, first, stack, b"first")
        with pyvfio.open_device(OTHER_BDF, space=second):
            _mapped(kernel, second, stack, b"second")
            kernel.clear_trace()
            device.attach(second)
            assert requests(kernel.trace).count(_ATTACH) == 1
            assert _DETACH not in requests(kernel.trace)
            assert device.space is second
            assert (device in first.devices, device in second.devices) == (False, True)
            assert kernel.dma_read(BDF, MIB, 6) == b"second"
            device.attach(first)
            assert kernel.dma_read(BDF, MIB, 5) == b"first"
            assert device.space is first


def test_a_detached_device_reaches_nothing_until_it_is_attached(kernel: FakeKernel, device: pyvfio.Device) -> None:
    space = space_of(device)
    with ExitStack() as stack:
        device.bus_master = True
        _mapped(kernel, space, stack, b"there")
        device.detach()
        device.detach()
        assert kernel.mappings(BDF) == ()
        assert repr(device) == f"<Device {BDF} in no address space>"
        with pytest.raises(pyvfio.VfioError, match=r"attached to no address space\. Call device\.attach\(space\)"):
            _ = device.space
        with pytest.raises(pyvfio.VfioError, match="no device is attached"):
            space.map(vaddr=0x10000, iova=2 * MIB, size=PAGE_SIZE)
        device.attach(space)
        assert kernel.dma_read(BDF, MIB, 5) == b"there"


_CHANGES: dict[str, Callable[[pyvfio.RamBlock], None]] = {
    "grow": lambda block: block.resize(8 * PAGE_SIZE),
    "shrink": lambda block: block.resize(2 * PAGE_SIZE),
    "discard": lambda block: block.discard(PAGE_SIZE, PAGE_SIZE),
    "populate": lambda block: block.populate(4 * PAGE_SIZE, PAGE_SIZE),
    "replace pages": lambda block: block.remap(0, PAGE_SIZE),
}


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("policy", ["remap", "extend", "granule", "cut"])
def test_without_a_device_no_block_changes_and_none_loses_a_mapping(
    kernel: FakeKernel, policy: str, change: str
) -> None:
    """An undo of the change would have to map. The change works with a device, and a removal without one."""
    resize = "extend" if policy == "granule" else policy
    granule = PAGE_SIZE if policy == "granule" else None
    space = Ioas(kernel=kernel, cut="pages" if policy == "cut" else None)
    with space, pyvfio.open_device(BDF, space=space) as device, pyvfio.RamBlockList(kernel=kernel) as blocks:
        mapper = pyvfio.DmaMapper(space, blocks, resize=resize, granule=granule)  # type: ignore[arg-type]
        block, other = (blocks.add(name, used_length=6 * PAGE_SIZE, max_length=MIB) for name in ("ring", "other"))
        block.discard(4 * PAGE_SIZE, PAGE_SIZE)
        before = (space.mappings, block.used_length, block.discarded)
        device.detach()
        kernel.clear_trace()
        with pytest.raises(pyvfio.VfioError, match=r"^no device is attached to .*\. Open a device first") as caught:
            _CHANGES[change](block)
        assert type(caught.value) is pyvfio.VfioError
        assert not [name for name in requests(kernel.trace) if "MAP" in name]
        assert (space.mappings, block.used_length, block.discarded) == before
        mapper._check()
        blocks._check()
        other.remove()
        device.attach(space)
        _CHANGES[change](block)
        mapper._check()
        device.detach()
        mapper.close()
        assert not space.mappings


def test_a_space_of_another_iommufd_or_one_that_is_closed_is_refused(kernel: FakeKernel, device: pyvfio.Device) -> None:
    former = space_of(device)
    closed = Ioas(device.iommufd)
    closed.close()
    with Ioas(kernel=kernel) as foreign:
        kernel.clear_trace()
        with pytest.raises(ValueError, match=r"another iommufd.*Ioas\(device\.iommufd\)"):
            device.attach(foreign)
        with pytest.raises(pyvfio.ClosedError):
            device.attach(closed)
        with pytest.raises(TypeError, match="space must be an Ioas"):
            device.attach(kernel)  # type: ignore[arg-type]
        assert not kernel.trace
    assert device.space is former


def test_a_move_that_is_refused_leaves_the_device_where_it_was(kernel: FakeKernel, device: pyvfio.Device) -> None:
    first = space_of(device)
    with Ioas(device.iommufd) as second, ExitStack() as stack:
        device.bus_master = True
        _mapped(kernel, first, stack, b"first")
        # The first question for ranges is about a page table that is made to find out whether the device can move.
        for request, nth in (
            ("IOMMU_HWPT_ALLOC", 1),
            ("IOMMU_IOAS_IOVA_RANGES", 1),
            (_ATTACH, 1),
            ("IOMMU_IOAS_IOVA_RANGES", 2),
        ):
            kernel.fail(call="ioctl", request=request, errno=errno.ENOMEM, nth=nth)
            with pytest.raises(pyvfio.IoctlError):
                device.attach(second)
            kernel.clear_failures()
            assert device.space is first
            assert (first.devices, second.devices) == ([device], [])
            assert kernel.dma_read(BDF, MIB, 5) == b"first"
            with pytest.raises(pyvfio.VfioError, match="no device is attached"):
                second.map(vaddr=0x10000, iova=2 * MIB, size=PAGE_SIZE)


def test_a_move_that_cannot_be_taken_back_is_a_rollback_error_and_the_device_reaches_nothing(
    kernel: FakeKernel, device: pyvfio.Device
) -> None:
    """Rather than the memory of a space that does not know the device."""
    first = space_of(device)
    with Ioas(device.iommufd) as second, ExitStack() as stack:
        _mapped(kernel, first, stack, b"first")
        kernel.fail(call="ioctl", request="IOMMU_IOAS_IOVA_RANGES", errno=errno.EIO, nth=2)  # behind the attach
        kernel.fail(call="ioctl", request=_ATTACH, errno=errno.EIO, nth=2)
        with pytest.raises(pyvfio.RollbackError, match=f"{BDF} could not be attached, and could not be put back"):
            device.attach(second)
        kernel.clear_failures()
        assert kernel.mappings(BDF) == ()
        assert (first.devices, second.devices) == ([], [])
        with pytest.raises(pyvfio.VfioError, match="attached to no address space"):
            assert device.space
        device.attach(first)
        assert kernel.dma_read(BDF, MIB, 5) == b"first"


def test_a_device_that_has_left_is_no_longer_in_the_space_though_the_ranges_cannot_be_read(
    kernel: FakeKernel, device: pyvfio.Device
) -> None:
    """The kernel has detached the device by then, so neither a detach nor a move nor a close fails."""
    space = space_of(device)
    ranges = space.iova_ranges
    with Ioas(device.iommufd) as second, ExitStack() as stack:
        _mapped(kernel, space, stack, b"first")
        leaves: dict[Callable[[pyvfio.Device], object], int] = {
            pyvfio.Device.detach: 1,
            lambda other: other.attach(second): 3,  # after a look before the move, and one into the new space
            pyvfio.Device.close: 1,
        }
        for leave, nth in leaves.items():
            with pyvfio.open_device(OTHER_BDF, space=space) as other:
                kernel.fail(call="ioctl", request="IOMMU_IOAS_IOVA_RANGES", errno=errno.ENOMEM, nth=nth)
                leave(other)
                assert kernel.planned_failures == ()
                assert (space.devices, space.iova_ranges) == ([device], ranges)
                assert kernel.mappings(OTHER_BDF) == ()
                assert other.closed or (other in second.devices) == (other.attachment.space is second)


@pytest.mark.parametrize("behind", [1, 2])
def test_a_move_of_a_group_that_is_refused_leaves_each_device_where_it_was(siblings: FakeKernel, behind: int) -> None:
    """The ranges are read for each device behind the move: whichever cannot be had, no device is in two spaces."""
    with pyvfio.open_device(FIRST, iommu="iommufd", kernel=siblings) as first:
        space = space_of(first)
        with pyvfio.open_device(SECOND, space=space) as second, Ioas(first.iommufd) as other, ExitStack() as stack:
            _mapped(siblings, space, stack, b"there")
            siblings.clear_trace()
            first.attach(other)
            first.attach(space)
            asked = requests(siblings.trace)
            before = asked[: asked.index(_ATTACH)].count("IOMMU_IOAS_IOVA_RANGES")
            siblings.fail(call="ioctl", request="IOMMU_IOAS_IOVA_RANGES", errno=errno.ENOMEM, nth=before + behind)
            with pytest.raises(pyvfio.IoctlError):
                first.attach(other)
            assert siblings.planned_failures == ()
            assert (first.space, second.space) == (space, space)
            assert (sorted(map(id, space.devices)), other.devices) == (sorted(map(id, (first, second))), [])
            first.bus_master = True
            assert siblings.dma_read(FIRST, MIB, 5) == b"there"


def test_a_detached_device_whose_attach_is_refused_reaches_nothing(kernel: FakeKernel, device: pyvfio.Device) -> None:
    """The kernel has attached the device by then, and memory is mapped in the space."""
    with Ioas(device.iommufd) as space, pyvfio.open_device(OTHER_BDF, space=space), ExitStack() as stack:
        _mapped(kernel, space, stack, b"theirs")
        device.detach()
        kernel.fail(call="ioctl", request="IOMMU_IOAS_IOVA_RANGES", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError):
            device.attach(space)
        assert kernel.planned_failures == ()
        assert kernel.mappings(BDF) == ()
        assert device not in space.devices
        with pytest.raises(pyvfio.VfioError, match="attached to no address space"):
            _ = device.space
        device.attach(space)
        assert len(kernel.mappings(BDF)) == 1


def test_a_device_that_moves_to_its_own_space_stays_there_once(siblings: FakeKernel) -> None:
    """The space still has each device of the group, and no device twice."""
    with pyvfio.open_device(FIRST, iommu="iommufd", kernel=siblings) as first:
        space = space_of(first)
        with pyvfio.open_device(SECOND, space=space) as second:
            first.attach(space)
            assert (space.devices, first.space, second.space) == ([first, second], space, space)


def test_the_devices_of_a_group_move_together(siblings: FakeKernel) -> None:
    """The kernel has one page table for a group."""
    with pyvfio.open_device(FIRST, iommu="iommufd", kernel=siblings) as first:
        space = space_of(first)
        with pyvfio.open_device(SECOND, space=space) as second, Ioas(first.iommufd) as other:
            first.attach(other)
            assert (first.space, second.space) == (other, other)
            assert (space.devices, sorted(map(id, other.devices))) == ([], sorted(map(id, (first, second))))
            second.attach(space)
            assert (first.space, second.space) == (space, space)


def test_a_device_whose_sibling_is_in_another_space_is_refused_with_both_names(siblings: FakeKernel) -> None:
    with (
        pyvfio.open_device(FIRST, iommu="iommufd", kernel=siblings) as first,
        Ioas(first.iommufd) as other,
        pytest.raises(pyvfio.VfioError, match=f"{SECOND} cannot be attached.*{FIRST}, of the same IOMMU group 4"),
    ):
        pyvfio.open_device(SECOND, space=other)


def test_a_device_whose_sibling_another_iommufd_has_is_refused(siblings: FakeKernel) -> None:
    with (
        pyvfio.open_device(FIRST, iommu="iommufd", kernel=siblings),
        pytest.raises(pyvfio.GroupBusyError, match="All devices of a group are bound to one iommufd"),
    ):
        pyvfio.open_device(SECOND, iommu="iommufd", kernel=siblings)


# ------------------------------------------------------------------------------------------------------------ closing


Order = Literal["device", "space", "iommufd"]


@pytest.mark.parametrize("made", ["by open_device", "by the program"])
@pytest.mark.parametrize("first", ["device", "space", "iommufd"])
def test_whichever_is_closed_first_the_rest_follows(kernel: FakeKernel, first: Order, made: str) -> None:
    """With an interrupt enabled and memory mapped."""
    own = None if made == "by open_device" else Ioas(kernel=kernel)
    device = pyvfio.open_device(BDF, iommu="iommufd", space=own, kernel=kernel)
    space, iommufd = space_of(device), iommufd_of(device)
    device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
    with ExitStack() as stack:
        _mapped(kernel, space, stack, b"x")
        handles: dict[Order, pyvfio.Device | Ioas | Iommufd] = {"device": device, "space": space, "iommufd": iommufd}
        handles[first].close()
        assert device.closed
        assert space.closed == (first != "device" or own is None)
        for handle in handles.values():
            handle.close()


def test_at_a_close_dma_stops_before_the_device_is_detached_and_memory_is_unmapped_last(kernel: FakeKernel) -> None:
    device = pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
    device.bus_master = True
    kernel.clear_trace()
    device.close()
    made = requests(kernel.trace)
    steps = ["pwrite", "close", "IOMMU_DESTROY"]
    assert sorted(steps, key=made.index) == steps


def test_a_view_of_a_region_keeps_device_space_and_iommufd_open(kernel: FakeKernel, device: pyvfio.Device) -> None:
    device.memory_enabled = True
    space, iommufd = space_of(device), iommufd_of(device)
    with device.region(0).mmap() as mapping:
        view = mapping.view()
        for handle in (device, space, iommufd):
            with pytest.raises(BufferError):
                handle.close()
        assert (device.closed, space.closed, iommufd.closed) == (False, False, False)
        view.release()


def test_a_closed_device_has_no_space(kernel: FakeKernel) -> None:
    device = pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
    with Ioas(device.iommufd) as other:
        device.close()
        for call in (lambda: device.space, lambda: device.attach(other), device.detach):
            with pytest.raises(pyvfio.ClosedError):
                call()
        other.close()


def test_in_a_forked_child_the_device_is_not_usable_and_a_close_does_nothing(
    kernel: FakeKernel, device: pyvfio.Device
) -> None:
    space = space_of(device)

    def child() -> None:
        for call in (device.detach, partial(device.attach, space), partial(pyvfio.open_device, OTHER_BDF, space=space)):
            with pytest.raises(pyvfio.ForkedError):
                call()
        device.close()
        space.close()

    assert in_child(child) == 0
    assert not device.closed
    assert device.config.read16(0) == 0x1234


def test_a_device_that_is_collected_closes_its_descriptor_and_says_so(kernel: FakeKernel) -> None:
    device = pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
    del device
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gc.collect()
    assert {f"device {BDF} was never closed", "the iommufd was never closed"} <= {str(each.message) for each in caught}
    assert kernel.descriptors == ()


# ----------------------------------------------------------------------------------------------------- calls that fail


@pytest.mark.parametrize("shared", [False, True], ids=["own space", "given space"])
def test_opening_leaves_nothing_open_whichever_call_fails(kernel: FakeKernel, *, shared: bool) -> None:
    """Descriptors and spaces are as before, and the device can be opened at once."""
    with ExitStack() as stack:
        space = stack.enter_context(Ioas(kernel=kernel)) if shared else None
        open_device = partial(pyvfio.open_device, BDF, iommu="iommufd", space=space, kernel=kernel)
        kernel.clear_trace()
        with open_device():
            calls = list(kernel.trace)
        before, count = kernel.descriptors, 0
        seen: dict[str, int] = {}
        for call in calls:
            name = call.request or call.call
            seen[name] = seen.get(name, 0) + 1
            for after in (False,) if name in {"open", "dup", "eventfd"} else (False, True):
                if name == "IOMMU_IOAS_ALLOC" and after:
                    continue  # a space that nobody knows goes with the iommufd
                kernel.fail(call=call.call, request=call.request or None, nth=seen[name], errno=errno.EIO, after=after)
                with pytest.raises((OSError, pyvfio.VfioError)):
                    open_device()
                kernel.clear_failures()
                assert kernel.descriptors == before, (name, after)
                assert space is None or space.devices == [], (name, after)
                with open_device() as device:
                    assert device.info.num_regions >= 9
                count += 1
    assert count >= 9


def test_a_space_for_which_no_descriptor_is_left_is_refused_with_the_limit(kernel: FakeKernel) -> None:
    """Each space has a descriptor of its own. The iommufd stays as it was."""
    with Iommufd(kernel=kernel) as iommufd:
        identity = iommufd.ioas_alloc()
        for make in (partial(Ioas, iommufd), partial(Ioas, kernel=kernel), partial(Ioas.from_id, iommufd, identity)):
            before = kernel.descriptors
            kernel.fail(call="dup", errno=errno.EMFILE)
            with pytest.raises(pyvfio.IoctlError, match=r"no descriptor for another I/O .*ulimit -n"):
                make()
            assert (iommufd.spaces, kernel.descriptors) == ([], before)


def test_a_close_goes_through_all_steps_whichever_fails(kernel: FakeKernel) -> None:
    with pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel):
        kernel.clear_trace()
    calls = [call for call in kernel.trace if call.call in {"ioctl", "pwrite", "close"}]
    seen: dict[str, int] = {}
    for call in calls:
        name = call.request or call.call
        seen[name] = seen.get(name, 0) + 1
        device = pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel)
        kernel.clear_failures()
        # close(2) closes whatever it returns.
        kernel.fail(
            call=call.call, request=call.request or None, nth=seen[name], errno=errno.EIO, after=name == "close"
        )
        with suppress(pyvfio.VfioError, OSError):
            device.close()
        kernel.clear_failures()
        assert device.closed, name
        assert kernel.descriptors == (), name


# --------------------------------------------------------------------------------------------------------- from_fd


def _node(kernel: FakeKernel, bdf: str) -> int:
    path = pyvfio.pci.cdev_node(bdf, kernel=kernel)
    assert path is not None
    return kernel.open(str(path), os.O_RDWR)


def test_a_descriptor_of_the_node_is_bound_and_attached(kernel: FakeKernel) -> None:
    """As a launcher hands it on; a second time for the program that comes after."""
    with Iommufd(kernel=kernel) as iommufd:
        fd = _node(kernel, BDF)
        with Ioas(iommufd) as space:
            device = pyvfio.Device.from_fd(space, BDF, fd)
            assert (device.space, device.config.read16(0)) == (space, 0x1234)
            assert device.release_fd() == fd
            with pyvfio.Device.from_fd(space, BDF, fd) as device:
                assert (device.space, device.group_number) == (space, 2)
                assert space.devices == [device]


def test_a_descriptor_of_another_kind_is_refused_and_stays_the_callers(kernel: FakeKernel) -> None:
    with Ioas(kernel=kernel) as space, pyvfio.Container(kernel=kernel) as container:
        with pytest.raises(ValueError, match="is not a VFIO device"):
            pyvfio.Device.from_fd(space, BDF, container.fd)
        with pyvfio.open_device(BDF, kernel=kernel) as device:
            with pytest.raises(pyvfio.IoctlError, match="through an IOMMU group, not by the node"):
                pyvfio.Device.from_fd(space, BDF, device.fd)
            assert not device.closed
        assert (space.devices, space.iommufd.devices) == ([], [])


def test_a_descriptor_that_another_iommufd_has_is_refused(kernel: FakeKernel) -> None:
    with pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as device, Ioas(kernel=kernel) as space:
        with pytest.raises(ValueError, match="bound to another iommufd"):
            pyvfio.Device.from_fd(space, BDF, device.fd)
        assert (space.devices, space.iommufd.devices) == ([], [])


def test_a_device_of_a_descriptor_that_is_refused_reaches_nothing(kernel: FakeKernel) -> None:
    """Though the descriptor stays open: the kernel has attached the device before the ranges are read."""
    with Ioas(kernel=kernel) as space, pyvfio.open_device(OTHER_BDF, space=space), ExitStack() as stack:
        _mapped(kernel, space, stack, b"theirs")
        fd = _node(kernel, BDF)
        kernel.fail(call="ioctl", request="IOMMU_IOAS_IOVA_RANGES", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.IoctlError):
            pyvfio.Device.from_fd(space, BDF, fd)
        assert kernel.planned_failures == ()
        assert kernel.mappings(BDF) == ()
        kernel.fail(call="ioctl", request="IOMMU_IOAS_IOVA_RANGES", errno=errno.ENOMEM)
        kernel.fail(call="ioctl", request=_DETACH, errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError, match=f"^{BDF} could not be attached, and could not be put back"):
            pyvfio.Device.from_fd(space, BDF, fd)
        with pyvfio.Device.from_fd(space, BDF, fd) as device:
            assert device in space.devices
            assert len(kernel.mappings(BDF)) == 1


def test_from_fd_leaves_the_descriptor_to_the_caller_whichever_call_fails(kernel: FakeKernel) -> None:
    with Ioas(kernel=kernel) as space:
        for request in (_BIND, _ATTACH, "IOMMU_IOAS_IOVA_RANGES", "VFIO_DEVICE_GET_INFO"):
            fd = _node(kernel, BDF)
            nth = 2 if request == "VFIO_DEVICE_GET_INFO" else 1  # the first asks whether the descriptor is bound
            kernel.fail(call="ioctl", request=request, nth=nth, errno=errno.EIO)
            with pytest.raises((OSError, pyvfio.VfioError)):
                pyvfio.Device.from_fd(space, BDF, fd)
            kernel.clear_failures()
            assert (space.devices, space.iommufd.devices) == ([], [])
            kernel.close(fd)


# --------------------------------------------------------------------------------------------------------- hot reset


def test_a_bus_is_reset_without_groups_where_the_iommufd_owns_its_devices(siblings: FakeKernel) -> None:
    """A sibling that is not open belongs to the iommufd with its group."""
    with pyvfio.open_device(FIRST, iommu="iommufd", kernel=siblings) as first:
        assert first.hot_reset_groups == (4,)
        with pyvfio.open_device(SECOND, space=first.space) as second:
            for device in (first, second):
                device.bus_master = True
            first.hot_reset()
            assert (first.bus_master, second.bus_master) == (False, False)
        first.hot_reset()


@pytest.mark.parametrize("lacks", ["the group", "the device"])
def test_a_device_that_a_reset_reaches_and_that_is_in_no_group_has_no_number_of_one(
    siblings: FakeKernel, lacks: str
) -> None:
    """Also a device that sysfs does not show, which is left to the kernel."""
    with pyvfio.open_device(FIRST, iommu="iommufd", kernel=siblings) as first:
        place = siblings.sysfs / "bus/pci/devices" / SECOND
        gone = place / "iommu_group" if lacks == "the group" else place
        gone.rename(gone.with_name("gone"))
        found = first.get_pci_hot_reset_info()
        assert [(each.bdf, each.group, each.owned) for each in found] == [(FIRST, 4, True), (SECOND, -1, True)]
        assert first.hot_reset_groups == (-1, 4)
        first.hot_reset()
        gone.with_name("gone").rename(gone)


def test_a_group_on_the_bus_that_the_iommufd_lacks_is_named_before_the_call() -> None:
    third = "0000:01:01.0"
    groups = [(4, [FakeDevice(FIRST)]), (5, [FakeDevice(third)])]
    with (
        FakeKernel("7.3", iommufd=True, groups=groups) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(FIRST, iommu="iommufd", kernel=kernel) as device,
    ):
        kernel.clear_trace()
        words = rf"IOMMU group 5 \({third}\) is not bound to the iommufd.*open_device\('{third}', space=device\.space\)"
        with pytest.raises(pyvfio.VfioError, match=words):
            device.hot_reset()
        assert "VFIO_DEVICE_PCI_HOT_RESET" not in requests(kernel.trace)
        with pyvfio.open_device(third, space=device.space):
            device.hot_reset()


def test_a_device_that_is_closed_reaches_nothing_though_a_child_has_the_descriptor_too() -> None:
    """A forked child shares the open file, so that the close of the parent alone would end nothing."""
    with FakeKernel("7.3", iommufd=True) as kernel, nothing_left(kernel):
        space = pyvfio.Ioas(kernel=kernel)
        memory = kernel.mmap(0, PAGE_SIZE, READ_WRITE, PRIVATE)
        device = pyvfio.open_device(BDF, space=space)
        other = pyvfio.open_device(OTHER_BDF, space=space)
        space.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        childs = kernel.dup(device.fd)
        device.close()
        assert kernel.mappings(BDF) == ()
        assert len(kernel.mappings(OTHER_BDF)) == 1
        other.close()
        space.close()
        assert space.closed
        kernel.close(childs)
        kernel.munmap(memory, PAGE_SIZE)
