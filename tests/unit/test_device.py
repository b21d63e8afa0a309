"""Device, Region, Irq and open_device on a fake kernel: registers at their width, interrupts, resets, every refusal."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.device import PCI_COMMAND, DependentDevice, Region
from pyvfio.info import RegionInfo
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import VERSIONS, Bar, FakeDevice, FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, SpecialKernel, nothing_left, proc_maps_has, requests
from tests.unit.processes import in_child, open_fds

MSI, MSIX, INTX = ioctls.VFIO_PCI_MSI_IRQ_INDEX, ioctls.VFIO_PCI_MSIX_IRQ_INDEX, ioctls.VFIO_PCI_INTX_IRQ_INDEX
V1 = ioctls.VFIO_TYPE1_IOMMU
SIBLING = "0000:00:02.1"


class Registers:
    """What a BAR's callbacks were asked, and what they answer."""

    def __init__(self) -> None:
        self.accesses: list[tuple[int, ...]] = []

    def read(self, offset: int, width: int) -> int:
        """All ones, so that a width shows."""
        self.accesses.append((offset, width))
        return (1 << 8 * width) - 1 - offset

    def write(self, offset: int, width: int, value: int) -> None:
        """Remember it."""
        self.accesses.append((offset, width, value))


@pytest.fixture
def registers() -> Registers:
    """Behind BAR 0 and, too small to be mapped, BAR 1."""
    return Registers()


@pytest.fixture
def kernel(registers: Registers) -> Iterator[SpecialKernel]:
    """A device with registers, plain memory in BAR 2 and the MSI-X table in it, and a sibling in its group."""
    bars = {
        0: Bar(MIB, registers.read, registers.write),
        1: Bar(256, registers.read, registers.write),
        2: Bar(4 * PAGE_SIZE),
    }
    device = FakeDevice(BDF, bars=bars, msi=4, msix=8, msix_bar=2, resettable=True)
    with SpecialKernel(groups=[(2, [device, FakeDevice(SIBLING)]), (3, [FakeDevice(OTHER_BDF)])]) as made:
        yield made


@pytest.fixture
def device(kernel: SpecialKernel) -> Iterator[pyvfio.Device]:
    """Open; nothing is left of it in the end."""
    with nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as opened:
        yield opened


# ----------------------------------------------------------------------------------------------------- open_device


def test_a_device_is_opened_with_all_that_it_needs(kernel: SpecialKernel) -> None:
    """Group, container with the IOMMU set, the device itself; by an address in any spelling."""
    with nothing_left(kernel), pyvfio.open_device("00:02.0", kernel=kernel) as device:
        assert device.bdf == BDF
        assert device.group.number == 2
        assert device.container.group(2) is device.group
        assert device.kernel is device.container.kernel is kernel
        assert device.info.num_regions == 9
        assert device.can_reset
        container = device.container
    assert container.closed
    with pytest.raises(pyvfio.ClosedError):
        _ = device.container
    with pytest.raises(pyvfio.ClosedError):
        device.config.read16(0)


@pytest.mark.parametrize("bdf", ["", "nonsense", "0000:00:02", "0000:00:02.8"])
def test_what_is_no_address_is_refused_before_any_call(kernel: SpecialKernel, bdf: str) -> None:
    """ValueError."""
    with pytest.raises(ValueError, match="not a PCI address"):
        pyvfio.open_device(bdf, kernel=kernel)
    assert not kernel.trace


def test_a_device_that_is_not_there_is_refused(kernel: SpecialKernel) -> None:
    """By its address."""
    with nothing_left(kernel), pytest.raises(pyvfio.DeviceNotFoundError, match=r"0000:00:1f\.0"):
        pyvfio.open_device("0000:00:1f.0", kernel=kernel)


def test_a_device_without_a_group_is_refused(kernel: SpecialKernel) -> None:
    """No IOMMU is behind it."""
    (kernel.sysfs / "bus/pci/devices" / BDF / "iommu_group").unlink()
    with nothing_left(kernel), pytest.raises(pyvfio.DeviceNotFoundError, match="is in no IOMMU group"):
        pyvfio.open_device(BDF, kernel=kernel)


@pytest.mark.parametrize(("driver", "said"), [("e1000e", "e1000e"), (None, "no driver")])
def test_a_device_of_another_driver_is_refused_with_its_name(
    kernel: SpecialKernel, driver: str | None, said: str
) -> None:
    """And the command that binds it."""
    kernel.bind(BDF, driver)
    with (
        nothing_left(kernel),
        pytest.raises(pyvfio.NotBoundError, match=rf"bound to {said}.*pyvfio bind {BDF}") as one,
    ):
        pyvfio.open_device(BDF, kernel=kernel)
    assert one.value.driver == driver


def test_a_group_that_is_not_viable_is_refused_with_those_that_block_it(kernel: SpecialKernel) -> None:
    """A sibling of the device belongs to a kernel driver."""
    kernel.bind(SIBLING, "e1000e")
    with nothing_left(kernel), pytest.raises(pyvfio.GroupNotViableError, match=f"{SIBLING} \\(e1000e\\)"):
        pyvfio.open_device(BDF, kernel=kernel)


def test_a_group_that_is_open_is_refused_with_its_holder(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """This process itself, for instance."""
    del device
    with pytest.raises(pyvfio.GroupBusyError, match=f"pid {os.getpid()}"):
        pyvfio.open_device(BDF, kernel=kernel)


def test_a_device_that_went_meanwhile_is_refused(kernel: SpecialKernel) -> None:
    """ENODEV of VFIO_GROUP_GET_DEVICE_FD, with what to look at; nothing is left open."""
    kernel.fail(call="ioctl", request="VFIO_GROUP_GET_DEVICE_FD", errno=errno.ENODEV)
    with nothing_left(kernel), pytest.raises(pyvfio.IoctlError, match="not in group 2, or not bound") as caught:
        pyvfio.open_device(BDF, kernel=kernel)
    assert caught.value.arguments == {"name": BDF}


def test_several_devices_of_a_group_share_its_descriptor(kernel: SpecialKernel) -> None:
    """The group is opened once, and leaves a shared container with the last of them."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        one = pyvfio.open_device(BDF, container=container)
        two = pyvfio.open_device(SIBLING, container=container)
        assert one.group is two.group
        one.close()
        assert two.config.read16(0) == 0x1234
        assert container.group(2) is two.group
        two.close()
        assert container.group(2) is None
        assert two.group.closed
        pyvfio.Group(2, kernel=kernel).close()
        pyvfio.open_device(OTHER_BDF, container=container)


@pytest.mark.parametrize("request_name", ["VFIO_GROUP_GET_DEVICE_FD", "VFIO_DEVICE_GET_INFO"])
def test_a_device_that_cannot_be_opened_in_a_container_leaves_no_group_there(
    kernel: SpecialKernel, request_name: str
) -> None:
    """A group that was open before stays."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        for shared in (False, True):
            if shared:
                pyvfio.open_device(SIBLING, container=container)
            before = kernel.descriptors
            kernel.fail(call="ioctl", request=request_name, errno=errno.EIO)
            with pytest.raises(pyvfio.IoctlError):
                pyvfio.open_device(BDF, container=container)
            assert kernel.descriptors == before
            assert list(container.groups) == [2] * shared


class _Between(SpecialKernel):
    """Another thread does something while the kernel opens a device."""

    between: Callable[[], object] | None = None

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Once."""
        between, result = self.between, super().ioctl(fd, request, argument)
        if between is not None and request == ioctls.VFIO_GROUP_GET_DEVICE_FD:
            self.between = None
            thread = threading.Thread(target=between)
            thread.start()
            thread.join()
        return result


def test_of_two_threads_that_open_a_device_at_once_one_has_it() -> None:
    """The kernel gives a descriptor to each."""
    with (
        _Between(groups=[(2, [FakeDevice(BDF)])]) as kernel,
        nothing_left(kernel),
        pyvfio.Container(kernel=kernel) as container,
    ):
        group, opened = container.open_group(2), list[pyvfio.Device]()
        kernel.between = lambda: opened.append(pyvfio.Device(group, BDF))
        with pytest.raises(pyvfio.VfioError, match=f"device {BDF} is open already"):
            pyvfio.Device(group, BDF)
        assert group.devices == opened
        assert opened[0].config.read16(0) == 0x1234


def test_a_device_is_opened_once_at_a_time(kernel: SpecialKernel) -> None:
    """Neither of two objects would see what the other changes. The descriptor stays the caller's, and is open."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        device = pyvfio.open_device(BDF, container=container)
        fd = kernel.dup(device.fd)
        kernel.clear_trace()
        again: list[Callable[[], object]] = [
            lambda: pyvfio.open_device(BDF, container=container),
            lambda: pyvfio.Device(device.group, BDF),
            lambda: pyvfio.Device.from_fd(device.group, BDF, fd),
        ]
        for call in again:
            with pytest.raises(
                pyvfio.VfioError, match=r"open already in IOMMU group 2\. Use the Device in group\.devices"
            ):
                call()
        assert not requests(kernel.trace)
        assert device.group.devices == [device]
        device.close()
        kernel.close(fd)
        with pyvfio.open_device(BDF, container=container) as other:
            assert other.config.read16(0) == 0x1234


def test_a_group_that_the_caller_opened_stays_when_its_last_device_goes(kernel: SpecialKernel) -> None:
    """It is the caller's to close."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        group = pyvfio.Group(2, kernel=kernel)
        container.attach(group)
        pyvfio.open_device(BDF, container=container).close()
        assert container.group(2) is group
        assert not group.closed


def test_the_last_group_stays_while_memory_is_mapped(kernel: SpecialKernel) -> None:
    """The kernel would unmap it; another group leaves all the same, and this one with a device that is closed later."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        memory = kernel.mmap(0, PAGE_SIZE, READ_WRITE, PRIVATE)
        one, other = (pyvfio.open_device(bdf, container=container) for bdf in (BDF, OTHER_BDF))
        container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
        other.close()
        assert list(container.groups) == [2]
        one.close()
        assert list(container.groups) == [2]
        assert len(kernel.mappings()) == 1
        container.unmap_all()
        pyvfio.open_device(BDF, container=container).close()
        assert container.groups == {}
        kernel.munmap(memory, PAGE_SIZE)


class SlowKernel(SpecialKernel):
    """Another thread is always in the middle when a node is opened."""

    def open(self, path: str, flags: int) -> int:
        """After a while."""
        time.sleep(0.01)
        return super().open(path, flags)


def test_threads_may_open_and_close_devices_of_one_group(kernel: SpecialKernel) -> None:
    """With one container: the group is opened by one of them, and never leaves under another."""
    del kernel
    devices = [FakeDevice(BDF), FakeDevice(SIBLING)]
    with SlowKernel(groups=[(2, devices)]) as slow, nothing_left(slow), pyvfio.Container(kernel=slow) as container:
        failures: list[BaseException] = []

        def use(bdf: str) -> None:
            try:
                for _ in range(20):
                    with pyvfio.open_device(bdf, container=container) as device:
                        assert device.config.read16(0) == 0x1234
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(bdf,)) for bdf in (BDF, SIBLING)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert container.groups == {}


@pytest.mark.parametrize("closed", ["container", "group", "device"])
def test_what_could_not_be_closed_can_be_closed_later(kernel: SpecialKernel, closed: str) -> None:
    """A view of a region lives: the device stays open until then, with its group and container."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        device = pyvfio.open_device(BDF, container=container)
        other = pyvfio.open_device(OTHER_BDF, container=container)
        view = device.region(2).mmap().view()
        close = {"container": container.close, "group": device.group.close, "device": device.close}[closed]
        for _ in range(2):
            with pytest.raises(BufferError, match="a view of"):
                close()
            assert not device.closed
            assert not device.group.closed
            assert not container.closed
            assert device.config.read16(0) == 0x1234
        assert other.closed == (closed == "container")
        view.release()
        close()
        assert device.closed
        assert device.group.closed
        assert container.closed == (closed == "container")


@pytest.mark.parametrize("bdf", [2, None, b"0000:00:02.0"])
def test_a_wrong_class_is_a_type_error(kernel: SpecialKernel, device: pyvfio.Device, bdf: object) -> None:
    """Of an address, a group, a container, a number."""
    kernel.clear_trace()
    calls: list[Callable[[], object]] = [
        lambda: pyvfio.open_device(bdf, kernel=kernel),  # type: ignore[arg-type]
        lambda: pyvfio.open_device(BDF, container=bdf or 1),  # type: ignore[arg-type]
        lambda: pyvfio.Device(bdf, BDF),  # type: ignore[arg-type]
        lambda: pyvfio.Device.from_fd(bdf, BDF, 1),  # type: ignore[arg-type]
        lambda: device.container.attach(bdf),  # type: ignore[arg-type]
        lambda: device.container.detach(bdf),  # type: ignore[arg-type]
        lambda: pyvfio.Container.from_fd(3, groups=[bdf], kernel=kernel),  # type: ignore[list-item]
        lambda: pyvfio.Container.from_fd("3", kernel=kernel),  # type: ignore[arg-type]
        lambda: pyvfio.Group.from_fd(3, number="2", kernel=kernel),  # type: ignore[arg-type]
        lambda: pyvfio.Group("2", kernel=kernel),  # type: ignore[arg-type]
        lambda: device.container.map_dma(vaddr=None, iova=0, size=PAGE_SIZE),  # type: ignore[arg-type]
        lambda: device.container.map(vaddr=0.0, iova=0, size=PAGE_SIZE),  # type: ignore[arg-type]
        lambda: device.container.unmap(iova=b"", size=PAGE_SIZE),  # type: ignore[arg-type]
        lambda: device.container.unmap_dma(iova=0, size=1.5),  # type: ignore[arg-type]
        lambda: device.container.check_extension(1.0),  # type: ignore[arg-type]
        lambda: device.container.reserve_and_map(vaddr="0", size=PAGE_SIZE),  # type: ignore[arg-type]
        lambda: device.container.unmap_and_release(iova=None, size=PAGE_SIZE, vaddr=0),  # type: ignore[arg-type]
        lambda: device.region("2"),  # type: ignore[arg-type]
        lambda: device.irq(1.0),  # type: ignore[arg-type]
        lambda: device.config.read16("4"),  # type: ignore[arg-type]
        lambda: device.config.write16(4, 1.0),  # type: ignore[arg-type]
        lambda: device.config.write(4, "ab"),  # type: ignore[arg-type]
        lambda: device.irq(MSI).wait("0"),  # type: ignore[arg-type]
        lambda: device.irq(MSI).wait(timeout="0"),  # type: ignore[arg-type]
        lambda: device.irq(MSI).enable("1"),  # type: ignore[call-overload]
    ]
    device.irq(MSI).enable()
    assert device.config
    kernel.clear_trace()
    for call in calls:
        with pytest.raises(TypeError):
            call()
    assert not kernel.trace


# ------------------------------------------------------------------------- descriptors that somebody else has opened


def _launcher(kernel: SpecialKernel) -> dict[str, int]:
    """What a launcher with more rights has opened for another program: a descriptor of each kind, by its kind."""
    device = pyvfio.open_device(BDF, kernel=kernel)
    fds = {
        "a VFIO container": device.container.release_fd(),
        "an IOMMU group": device.group.release_fd(),
        "a VFIO device": device.release_fd(),
    }
    device.opened_with = None
    fds["an eventfd"] = kernel.eventfd(0, 0)
    fds["a file"] = os.open("/dev/null", os.O_RDWR)
    fds["closed"] = os.dup(fds["a file"])
    os.close(fds["closed"])
    return fds


def test_a_launchers_descriptors_are_used_as_ones_own(kernel: SpecialKernel) -> None:
    """Registers, memory, interrupts; and they are closed with the objects."""
    fds = _launcher(kernel)
    group = pyvfio.Group.from_fd(fds["an IOMMU group"], number=2, kernel=kernel)
    container = pyvfio.Container.from_fd(fds["a VFIO container"], groups=[group], kernel=kernel)
    device = pyvfio.Device.from_fd(group, BDF, fds["a VFIO device"])
    assert (container.fd, group.fd, device.fd) == tuple(fds.values())[:3]
    assert device.container is container
    assert container.groups == {2: group}
    assert container.iommu_type == ioctls.VFIO_TYPE1v2_IOMMU
    assert device.config.read16(0) == 0x1234
    with pyvfio.RamBlockList(kernel=kernel) as blocks, pyvfio.DmaMapper(container, blocks):
        blocks.add("ring", used_length=PAGE_SIZE, max_length=MIB)
        assert len(kernel.mappings(BDF)) == 1
    device.irq(MSI).enable()
    other = pyvfio.open_device(OTHER_BDF, container=container)
    container.close()
    assert device.closed
    assert group.closed
    assert other.closed
    assert kernel.descriptors == ()
    for kind in ("an eventfd", "a file"):
        os.close(fds[kind])


def test_a_container_without_a_group_may_come_too(kernel: SpecialKernel) -> None:
    """The IOMMU is then set with the first group."""
    fd = kernel.open(str(kernel.dev / "vfio/vfio"), os.O_RDWR)
    group = kernel.open(str(kernel.dev / "vfio/2"), os.O_RDWR)
    with pyvfio.Container.from_fd(fd, iommu_type=V1, kernel=kernel) as container:
        container.attach(pyvfio.Group.from_fd(group, number=2, kernel=kernel))
        assert container.iommu_type == V1
        assert pyvfio.open_device(BDF, container=container).config.read16(0) == 0x1234


def test_a_descriptor_of_another_kind_is_refused_and_stays_the_callers(kernel: SpecialKernel) -> None:
    """Of each kind for each: ValueError says what it is not."""
    fds = _launcher(kernel)
    group = pyvfio.Group.from_fd(fds["an IOMMU group"], number=2, kernel=kernel)
    container = pyvfio.Container.from_fd(fds["a VFIO container"], groups=[group], kernel=kernel)
    makers: dict[str, Callable[[int], object]] = {
        "a VFIO container": lambda fd: pyvfio.Container.from_fd(fd, kernel=kernel),
        "an IOMMU group": lambda fd: pyvfio.Group.from_fd(fd, number=2, kernel=kernel),
        "a VFIO device": lambda fd: pyvfio.Device.from_fd(group, BDF, fd),
    }
    before, refused = open_fds(), 0
    for wanted, make in makers.items():
        for kind, fd in fds.items():
            if kind != wanted:
                with pytest.raises(ValueError, match=f"descriptor {fd} is not {wanted}"):
                    make(fd)
                refused += 1
        with pytest.raises(ValueError, match="-1 is no file descriptor"):
            make(-1)
    assert refused == 15
    gc.collect()
    assert open_fds() == before
    assert group.devices == []
    with pytest.raises(ValueError, match="in another container"):
        pyvfio.Container.from_fd(fds["a VFIO container"], groups=[group], kernel=kernel)
    container.close()
    for kind in ("a VFIO device", "an eventfd", "a file"):
        kernel.close(fds[kind])


def test_a_group_that_is_in_no_container_is_refused(kernel: SpecialKernel) -> None:
    """For a container that is said to have it, and for a device of it."""
    with nothing_left(kernel), pyvfio.Container(kernel=kernel) as made, pyvfio.Group(2, kernel=kernel) as group:
        with pytest.raises(ValueError, match=r"group 2 is in no container: use attach"):
            pyvfio.Container.from_fd(made.fd, groups=[group], kernel=kernel)
        with pytest.raises(ValueError, match=r"group 2 is in no Container: attach"):
            pyvfio.Device.from_fd(group, BDF, made.fd)
        assert made.get_api_version() == 0


@pytest.mark.parametrize("nth", range(1, 7))
def test_a_descriptor_stays_the_callers_where_a_call_fails(kernel: SpecialKernel, nth: int) -> None:
    """Whichever of the calls: nothing is closed, and it can be tried again."""
    fds = _launcher(kernel)
    before = open_fds()

    def take() -> tuple[pyvfio.Container, pyvfio.Device]:
        group = pyvfio.Group.from_fd(fds["an IOMMU group"], number=2, kernel=kernel)
        try:
            container = pyvfio.Container.from_fd(fds["a VFIO container"], groups=[group], kernel=kernel)
            try:
                return container, pyvfio.Device.from_fd(group, BDF, fds["a VFIO device"])
            except BaseException:
                container.release_fd()
                raise
        except BaseException:
            group.release_fd()
            raise

    kernel.fail(call="ioctl", errno=errno.EIO, nth=nth)
    with pytest.raises(pyvfio.IoctlError):
        take()
    gc.collect()
    assert open_fds() == before
    container, _device = take()
    container.close()
    for kind in ("an eventfd", "a file"):
        os.close(fds[kind])


def test_each_object_shows_its_numbers_as_the_field_writes_them(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Addresses and sizes in hexadecimal, and whether it is closed."""
    memory = kernel.mmap(0, PAGE_SIZE, READ_WRITE, PRIVATE)
    device.container.map(vaddr=memory, iova=MIB, size=PAGE_SIZE)
    mapped = device.region(2).mmap()
    shown = {
        repr(device.container.mappings[0]): f"Mapping(iova=0x100000, size=0x1000, vaddr={memory:#x})",
        repr(device.container.mappings[0].range): "IovaRange(start=0x100000, last=0x100fff)",
        repr(device.container): "<Container VFIO_TYPE1v2_IOMMU groups [2], 1 mapping>",
        repr(device.group): "<Group 2 in a container, open devices: 1>",
        repr(device): f"<Device {BDF} in group 2>",
        repr(device.region(2))[:61]: f"<Region BAR2 (region 2) of {BDF} size=0x4000",
        repr(mapped).partition("> ")[2]: f"vaddr={mapped.vaddr:#x} size=0x4000>",
        repr(kernel): "<SpecialKernel 6.12: 3 devices, 3 descriptors, 1 mapping of 0x1000 bytes>",
    }
    assert all(found.startswith(wanted) for found, wanted in shown.items()), shown
    device.container.unmap_all()
    kernel.munmap(memory, PAGE_SIZE)
    own = Region(device, RegionInfo(9, _MMAP, PAGE_SIZE, 0))  # of the driver of the device, behind those of PCI
    assert repr(own).startswith(f"<Region region (region 9) of {BDF} size=0x1000")
    vga = Region(device, RegionInfo(8, _MMAP, PAGE_SIZE, 0))
    assert repr(vga).startswith(f"<Region VGA (region 8) of {BDF}")
    device.close()
    assert repr(device) == f"<Device {BDF} in group 2, closed>"
    assert "closed" in repr(device.group)
    assert "closed" in repr(mapped)


def test_the_iommu_type_is_the_callers_to_choose(kernel: SpecialKernel) -> None:
    """It goes to the container that is opened."""
    with (
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel, iommu_type=ioctls.VFIO_TYPE1_IOMMU) as device,
    ):
        assert device.container.iommu_type == ioctls.VFIO_TYPE1_IOMMU
        container = device.container
        with pytest.raises(ValueError, match=r"the container has VFIO_TYPE1_IOMMU, so it cannot be .*TYPE1v2"):
            pyvfio.open_device(OTHER_BDF, container=container, iommu_type=ioctls.VFIO_TYPE1v2_IOMMU)
        with pyvfio.open_device(OTHER_BDF, container=container, iommu_type=ioctls.VFIO_TYPE1_IOMMU) as other:
            assert other.container is container


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_s_answers_are_understood(version: str) -> None:
    """Whatever length of structure they know."""
    with FakeKernel(version) as kernel, nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as device:
        assert (device.info.num_regions, device.info.num_irqs) == (9, 5)
        assert device.region(0).size == MIB
        assert device.irq(MSI).count == 1
        assert not device.can_reset


# ------------------------------------------------------------------------------------------------------ registers


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("bar", [0, 1], ids=["mapped", "by pread"])
def test_registers_are_accessed_once_and_at_their_width(
    device: pyvfio.Device, registers: Registers, bar: int, width: int
) -> None:
    """Load and store, little-endian."""
    region = device.region(bar)
    loads: dict[int, Callable[[int], int]] = {1: region.read8, 2: region.read16, 4: region.read32, 8: region.read64}
    stores: dict[int, Callable[[int, int], None]] = {
        1: region.write8,
        2: region.write16,
        4: region.write32,
        8: region.write64,
    }
    value = int.from_bytes(bytes(range(1, width + 1)), "little")
    assert loads[width](0x40) == (1 << 8 * width) - 1 - 0x40
    stores[width](0x48, value)
    assert registers.accesses == [(0x40, width), (0x48, width, value)]


def test_a_mapped_register_costs_no_system_call(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """After the first: the window is mapped once."""
    region = device.region(0)
    region.read32(0)
    kernel.clear_trace()
    region.read32(MIB - 4)
    region.write8(3, 1)
    assert not kernel.trace


@pytest.mark.parametrize("bar", [0, 1])
def test_what_is_misaligned_or_outside_is_refused_before_any_call(
    kernel: SpecialKernel, device: pyvfio.Device, registers: Registers, bar: int
) -> None:
    """ValueError, with the numbers."""
    region = device.region(bar)
    region.read8(0)
    registers.accesses.clear()
    kernel.clear_trace()
    for access in (region.read16, region.read32, region.read64, lambda at: region.write32(at, 0)):
        with pytest.raises(ValueError, match="misaligned"):
            access(1)
    size = region.size
    for outside in (
        lambda: region.read8(size),
        lambda: region.read32(-4),
        lambda: region.write64(size, 0),
        lambda: region.read(size - 2, 3),
        lambda: region.read(0, -1),
        lambda: region.write(size - 1, b"ab"),
        lambda: region.mmap(0, size + PAGE_SIZE),
        lambda: region.mmap(size + PAGE_SIZE),
    ):
        with pytest.raises(ValueError, match=rf"BAR{bar} \(region {bar}\) of {BDF} has {size:#x} bytes"):
            outside()
    for value in (-1, 1 << 16):
        with pytest.raises(ValueError, match="does not fit 2 bytes"):
            region.write16(0, value)
    assert not kernel.trace
    assert not registers.accesses


def test_bytes_are_read_and_written_as_they_are(device: pyvfio.Device) -> None:
    """Plain memory in a BAR."""
    region = device.region(2)
    region.write(5, b"hello")
    assert region.read(4, 7) == b"\0hello\0"
    assert region.read(0, 0) == b""
    assert region.read32(4) == int.from_bytes(b"\0hel", "little")


def test_a_short_answer_is_an_error(kernel: SpecialKernel) -> None:
    """Half a register is none."""

    class Short(FakeKernel):
        def pread(self, fd: int, size: int, offset: int) -> bytes:
            return super().pread(fd, size, offset)[:1]

        def pwrite(self, fd: int, data: bytes, offset: int) -> int:
            return min(super().pwrite(fd, data, offset), 1)

    with Short() as short, nothing_left(short):
        device = pyvfio.open_device(BDF, kernel=short)
        with pytest.raises(pyvfio.VfioError, match="returned 1 of 2 bytes at 0x4"):
            device.config.read16(4)
        with pytest.raises(pyvfio.VfioError, match="accepted 1 of 2 bytes at 0x4"):
            device.config.write16(4, 0)
        with pytest.raises(pyvfio.VfioError, match="returned 1 of 2"):
            device.close()
        assert device.closed


def test_a_bar_that_the_device_has_not_is_empty(device: pyvfio.Device) -> None:
    """No byte can be read, no part mapped; an index that the device has not is refused."""
    region = device.region(5)
    assert (region.size, region.mappable) == (0, ())
    with pytest.raises(ValueError, match="does not have"):
        region.read8(0)
    with pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped"):
        region.mmap()
    with pytest.raises(ValueError, match="has regions 0 to 8, not 99"):
        device.region(99)
    with pytest.raises(ValueError, match="has regions 0 to 8, not 9"):
        device.region(9)
    for index in (-1, 5):
        with pytest.raises(ValueError, match=f"kinds of interrupt 0 to 4, not {index}"):
            device.irq(index)


def test_a_region_without_memory_decoding_is_an_error_and_works_again_with_it(device: pyvfio.Device) -> None:
    """A touch would be SIGBUS; windows do not outlive the bit."""
    region = device.region(0)
    region.read32(0)
    device.memory_enabled = False
    for use in (lambda: region.read32(0), lambda: region.write32(0, 0), region.mmap):
        with pytest.raises(pyvfio.VfioError, match=r"device\.memory_enabled = True"):
            use()
    with pytest.raises(OSError, match="Input/output"):
        device.region(1).read32(0)
    device.memory_enabled = True
    assert region.read32(0) == 0xFFFF_FFFF


# --------------------------------------------------------------------------------------------------- parts of BARs

_MMAP = ioctls.VfioRegionInfoFlags(
    ioctls.VFIO_REGION_INFO_FLAG_MMAP | ioctls.VFIO_REGION_INFO_FLAG_READ | ioctls.VFIO_REGION_INFO_FLAG_WRITE
)


@pytest.mark.parametrize(
    ("sparse", "mappable"),
    [
        (None, ((0, 4),)),
        ((), ()),
        (((0, 1),), ((0, 1),)),
        (((0, 1), (2, 2)), ((0, 1), (2, 2))),
        (((0.5, 1),), ()),
        (((0.5, 2),), ((1, 1),)),
        (((0, 2.5),), ((0, 2),)),
    ],
)
def test_what_can_be_mapped_are_the_whole_pages_of_what_the_kernel_lists(
    device: pyvfio.Device,
    sparse: tuple[tuple[float, float], ...] | None,
    mappable: tuple[tuple[int, int], ...],
) -> None:
    """In pages here; all of it, where the kernel lists nothing."""
    areas = None if sparse is None else tuple((int(at * PAGE_SIZE), int(size * PAGE_SIZE)) for at, size in sparse)
    info = RegionInfo(2, _MMAP, 4 * PAGE_SIZE, device.region(2).info.offset, sparse=areas)
    expected = tuple((at * PAGE_SIZE, size * PAGE_SIZE) for at, size in mappable)
    assert Region(device, info).mappable == expected


@pytest.mark.parametrize(("lacks", "protection"), [(0, 3), ("WRITE", 1), ("READ", 2)])
def test_a_region_is_mapped_for_what_the_kernel_lets_be_done_with_it(
    kernel: SpecialKernel, device: pyvfio.Device, lacks: str | int, protection: int
) -> None:
    """PROT_READ and PROT_WRITE, where VFIO_REGION_INFO_FLAG_READ and _WRITE are."""
    flags = _MMAP & ~vars(ioctls)[f"VFIO_REGION_INFO_FLAG_{lacks}"] if lacks else _MMAP
    flags = ioctls.VfioRegionInfoFlags(flags)
    region = Region(device, RegionInfo(0, flags, PAGE_SIZE, device.region(0).info.offset))
    kernel.clear_trace()
    with region.mmap():
        (made,) = [call for call in kernel.trace if call.call == "mmap"]
    assert made.given[2] == protection


def test_between_the_mappable_parts_registers_are_reached_by_pread(
    kernel: SpecialKernel, device: pyvfio.Device
) -> None:
    """And each part is one window; no access is over an edge."""
    offset = device.region(0).info.offset
    info = RegionInfo(0, _MMAP, 4 * PAGE_SIZE, offset, sparse=((0, PAGE_SIZE), (2 * PAGE_SIZE, 2 * PAGE_SIZE)))
    region = Region(device, info)
    config = device.config.info.offset  # looked at before a window is made
    kernel.clear_trace()
    for at in (0, PAGE_SIZE, 2 * PAGE_SIZE, PAGE_SIZE - 8, 4 * PAGE_SIZE - 8):
        region.read64(at)
    made = [(call.call, call.given[1:]) for call in kernel.trace if call.given[-1] not in range(config, config + 256)]
    assert made == [
        ("registers", (offset, PAGE_SIZE)),
        ("pread", (8, offset + PAGE_SIZE)),
        ("registers", (offset + 2 * PAGE_SIZE, 2 * PAGE_SIZE)),
    ]
    kernel.clear_trace()
    for at in (0, 2 * PAGE_SIZE, PAGE_SIZE - 8, 4 * PAGE_SIZE - 8):  # the first and the last of each: it is there
        region.read64(at)
    assert [call.given[1:] for call in kernel.trace] == [(2, config + 6)]  # all ones at 0: is the device still there?
    with pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped at 0x1000-0x1fff"):
        region.mmap(PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped"):
        region.mmap()
    region.mmap(2 * PAGE_SIZE).close()
    region.close()


def test_a_mapped_part_shows_what_is_there_and_stays_while_it_is_looked_at(device: pyvfio.Device) -> None:
    """BufferError while a view lives; afterwards it is gone."""
    region = device.region(2)
    region.write32(PAGE_SIZE, 0x1234)
    mapping = region.mmap(PAGE_SIZE, PAGE_SIZE)
    assert mapping.size == PAGE_SIZE
    view = mapping.view()
    part = view.cast("I")
    assert part[0] == 0x1234
    part[1] = 7
    assert region.read32(PAGE_SIZE + 4) == 7
    view.release()
    with pytest.raises(BufferError, match="still alive"):
        mapping.close()
    part.release()
    assert ctypes.string_at(mapping.vaddr, 2) == b"\x34\x12"
    mapping.close()
    mapping.close()
    with pytest.raises(pyvfio.ClosedError):
        mapping.view()
    with pytest.raises(pyvfio.ClosedError):
        _ = mapping.vaddr


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE_SIZE), (0, 100), (0, 0)])
def test_only_whole_pages_are_mapped(kernel: SpecialKernel, device: pyvfio.Device, offset: int, size: int) -> None:
    """ValueError before any call."""
    region = device.region(2)
    kernel.clear_trace()
    with pytest.raises(ValueError, match="multiples of 4096"):
        region.mmap(offset, size)
    assert not kernel.trace


# ----------------------------------------------------------------------------------------------- configuration space


def test_configuration_space_is_read_and_written(device: pyvfio.Device) -> None:
    """Identity, and a register that may be changed."""
    config = device.config
    assert (config.read16(0), config.read16(2), config.read32(0), config.read8(1)) == (0x1234, 0x11E8, 0x11E81234, 0x12)
    config.write8(0x3C, 0x5A)
    assert config.read8(0x3C) == 0x5A
    assert config is device.config
    assert config.read64(0) == int.from_bytes(config.read(0, 8), "little")
    writes: list[Callable[[int], object]] = [
        lambda value: config.write(0x3C, bytes([value])),
        lambda value: config.write8(0x3C, value),
        lambda value: config.write16(0x3C, config.read16(0x3C) & 0xFF00 | value),
        lambda value: config.write32(0x3C, config.read32(0x3C) & 0xFFFF_FF00 | value),
        lambda value: config.write64(0x38, config.read64(0x38) & ~(0xFF << 32) | value << 32),
        lambda value: config.change16(0x3C, 0xFF ^ value, on=False),
        lambda value: config.register32(0x3C).write(config.register32(0x3C).read() & 0xFFFF_FF00 | value),
    ]
    for value, write in enumerate(writes, 1):
        config.write8(0x3C, 0xFF)
        before = bytearray(config.read(0, 0x40))
        write(value)
        before[0x3C] = value
        assert config.read(0, 0x40) == before


def test_configuration_space_cannot_be_mapped() -> None:
    """Even where it is a page long."""
    with (
        FakeKernel(groups=[(2, [FakeDevice(BDF, pcie=True)])]) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel) as device,
        pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped"),
    ):
        device.config.mmap()


def test_the_command_bits_are_switched_one_at_a_time(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """The others stay as they are; bus mastering is off at first."""
    assert not device.bus_master
    assert device.memory_enabled
    device.config.write16(PCI_COMMAND, 0x442)
    device.bus_master = True
    assert device.config.read16(PCI_COMMAND) == 0x446
    device.memory_enabled = False
    assert device.config.read16(PCI_COMMAND) == 0x444
    assert (device.bus_master, device.memory_enabled) == (True, False)
    device.bus_master = False
    device.memory_enabled = True
    assert device.config.read16(PCI_COMMAND) == 0x442


# ------------------------------------------------------------------------------------------------------ interrupts


def test_an_interrupt_is_counted_until_it_is_waited_for(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Each vector by itself; nothing is left of those that were told."""
    irq = device.irq(MSI)
    assert irq.count == 4
    fds = irq.enable(2)
    assert irq.fds == fds
    kernel.interrupt(BDF, 1)
    kernel.interrupt(BDF, 1)
    assert irq.wait(0, timeout=0) == 0
    assert irq.wait(1, timeout=1) == 2
    assert irq.wait(1, timeout=0) == 0
    kernel.interrupt(BDF)
    assert irq.wait() == 1
    irq.trigger(1)
    assert irq.wait(1, timeout=1) == 1


def test_a_disabled_interrupt_is_not_signalled_and_leaves_no_descriptor(
    kernel: SpecialKernel, device: pyvfio.Device
) -> None:
    """Twice is fine, and it can be enabled again."""
    before = open_fds()
    irq = device.irq(MSIX)
    irq.enable(8)
    kernel.clear_trace()
    irq.disable()
    irq.disable()
    assert requests(kernel.trace) == ["VFIO_DEVICE_SET_IRQS", *["close"] * 9]
    assert irq.fds == ()
    kernel.interrupt(BDF)
    assert open_fds() == before
    irq.enable(1)
    kernel.interrupt(BDF)
    assert irq.wait(timeout=1) == 1


@pytest.mark.parametrize("vector", [2, -1])
def test_waiting_for_a_vector_that_is_not_enabled_is_an_error(device: pyvfio.Device, vector: int) -> None:
    """It would last for ever."""
    irq = device.irq(MSI)
    with pytest.raises(pyvfio.VfioError, match=r"VFIO_PCI_MSI_IRQ_INDEX .* is not enabled"):
        irq.wait()
    irq.enable(2)
    with pytest.raises(ValueError, match=f"vectors 0 to 1 are enabled, not {vector}"):
        irq.wait(vector)
    with pytest.raises(ValueError, match=f"not {vector}"):
        irq.trigger(vector)


def test_where_another_thread_has_read_first_a_wait_looks_again(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Between the poll and the read. It returns what is there then, and nothing twice."""
    irq = device.irq(MSI)
    irq.enable()
    kernel.interrupt(BDF)
    for nth in (1, 2):  # it is read before the poll, too
        kernel.fail(call="eventfd_read", errno=errno.EAGAIN, nth=nth)
    assert irq.wait(timeout=0) == 1
    assert irq.wait(timeout=0) == 0


@pytest.mark.parametrize("ended", ["disabled", "closed", "forgotten"])
@pytest.mark.parametrize("waiting", [1, 3])
def test_a_waiting_thread_hears_that_the_interrupt_has_ended(
    kernel: SpecialKernel, device: pyvfio.Device, ended: str, waiting: int
) -> None:
    """Every one of them, for ever as they would have waited; and no descriptor is left."""
    before = open_fds()
    irq = device.irq(MSI)
    irq.enable(2)
    heard: list[pyvfio.VfioError] = []

    def wait(vector: int) -> None:
        try:
            irq.wait(vector)
        except pyvfio.VfioError as error:
            heard.append(error)

    threads = [threading.Thread(target=wait, args=(number % 2,)) for number in range(waiting)]
    kernel.clear_trace()
    for thread in threads:
        thread.start()
    while len([name for name in threading.enumerate() if name in threads and _is_in_poll(name)]) < waiting:
        time.sleep(0.001)
    {"disabled": irq.disable, "closed": device.close, "forgotten": irq.forget}[ended]()
    for thread in threads:
        thread.join()
    assert len(heard) == waiting
    assert all(isinstance(error, pyvfio.ClosedError) == (ended != "disabled") for error in heard)
    assert all(BDF in str(error) for error in heard)
    heard.clear()
    device.close()  # the fake has copies of the eventfds until then, as the kernel has the files
    assert set(open_fds().items()) <= set(before.items())


def _is_in_poll(thread: threading.Thread) -> bool:
    frame = sys._current_frames().get(thread.ident or 0)
    return frame is not None and frame.f_code.co_name == "poll"


def test_while_a_thread_waits_no_other_file_gets_the_number(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Disabled between the look at the descriptor and the poll: the thread hears of it, and reads from nothing else."""
    irq = device.irq(MSI)

    class Late(SpecialKernel):
        """Another thread disables the interrupt before each poll, and opens files."""

        def poll(self, fd: int, timeout: float | None, *others: int) -> tuple[int, ...]:
            """See above."""
            irq.disable()
            opened = [os.eventfd(1) for _ in range(8)]
            try:
                assert fd not in opened
                return FakeKernel.poll(kernel, fd, timeout, *others)
            finally:
                for each in opened:
                    os.close(each)

    kernel.__class__ = Late
    irq.enable(1)
    with pytest.raises(pyvfio.VfioError, match="was disabled"):
        irq.wait(timeout=5)
    kernel.__class__ = SpecialKernel


@pytest.mark.parametrize("call", ["pread", "pwrite", "registers", "mmap", "eventfd"])
def test_a_refusal_names_the_device_the_region_and_the_offset(
    kernel: SpecialKernel, device: pyvfio.Device, call: str
) -> None:
    """No bare OSError leaves a region or an interrupt."""
    uses: dict[str, Callable[[], object]] = {
        "pread": lambda: device.config.read16(0x34),
        "pwrite": lambda: device.config.write16(0x34, 0),
        "registers": lambda: device.region(0).read32(0x34),
        "mmap": lambda: device.region(2).mmap(2 * PAGE_SIZE, PAGE_SIZE),
        "eventfd": lambda: device.irq(MSI).enable(2),
    }
    asked = {
        "pread": ("pread", ioctls.VFIO_PCI_CONFIG_REGION_INDEX, 0x34, 2),
        "pwrite": ("pwrite", ioctls.VFIO_PCI_CONFIG_REGION_INDEX, 0x34, 2),
        "registers": ("mmap", 0, 0, device.region(0).size),
        "mmap": ("mmap", 2, 2 * PAGE_SIZE, PAGE_SIZE),
    }
    before = open_fds()
    for nth in (1, 2) if call == "eventfd" else (1,):
        kernel.fail(call=call, errno=errno.EIO, nth=nth)
        with pytest.raises(pyvfio.IoctlError, match=BDF) as caught:
            uses[call]()
        assert caught.value.errno == errno.EIO
        assert caught.value.arguments["device"] == BDF
        if call in asked:
            names = ("region", "offset", "size")
            assert (caught.value.request, *(caught.value.arguments[name] for name in names)) == asked[call]
    assert open_fds() == before


def test_numbers_of_numpy_are_numbers(device: pyvfio.Device) -> None:
    """Also small ones, whose sums would not fit them."""
    numpy = pytest.importorskip("numpy")
    config, region = device.config, device.region(2)
    assert config.read8(numpy.uint8(0x34)) == config.read8(0x34)
    region.write16(numpy.int64(8), numpy.uint16(0xFFFF))
    assert region.read16(8) == 0xFFFF
    assert region.read(numpy.uint8(8), numpy.uint8(2)) == b"\xff\xff"
    with region.mmap(numpy.uint32(2 * PAGE_SIZE), numpy.uint32(PAGE_SIZE)) as mapped:
        assert type(mapped.size) is int
    irq = device.irq(numpy.int8(MSI))
    assert irq is device.irq(MSI)
    assert len(irq.enable(numpy.int64(2))) == 2
    assert irq.wait(numpy.int64(1), timeout=numpy.float32(0)) == 0


def test_intx_is_masked_and_unmasked(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """By the kernel at each interrupt, and by the caller."""
    irq = device.irq(INTX)
    irq.enable()
    for _ in range(2):
        kernel.interrupt(BDF)
        kernel.interrupt(BDF)
        assert irq.wait(timeout=1) == 1
        assert irq.wait(timeout=0) == 0
        irq.unmask()
        assert irq.wait(timeout=1) == 1
        irq.unmask()
    irq.mask()
    kernel.interrupt(BDF)
    assert irq.wait(timeout=0) == 0
    irq.unmask()
    assert irq.wait(timeout=1) == 1


def test_messages_cannot_be_masked(device: pyvfio.Device) -> None:
    """ENOTTY of the kernel."""
    irq = device.irq(MSI)
    irq.enable()
    for use in (irq.mask, irq.unmask):
        with pytest.raises(pyvfio.IoctlError) as caught:
            use()
        assert caught.value.errno == errno.ENOTTY


def test_more_vectors_than_there_are_are_refused_before_any_call(device: pyvfio.Device) -> None:
    """With what the device has of each kind; less than one can never be right."""
    irq = device.irq(MSI)
    with pytest.raises(pyvfio.UnsupportedError, match=r"has 4 vectors.*1 INTx, 4 MSI, 8 MSI-X"):
        irq.enable(5)
    for vectors in (0, -1):
        with pytest.raises(ValueError, match="at least one"):
            irq.enable(vectors)


@pytest.mark.parametrize("timeout", [0, -1.0, 1e-9])
def test_waiting_with_no_time_left_asks_once(device: pyvfio.Device, timeout: float) -> None:
    """A deadline that has passed does not become a wait for ever."""
    irq = device.irq(MSI)
    irq.enable(1)
    assert irq.wait(timeout=timeout) == 0
    irq.trigger()
    assert irq.wait(timeout=timeout) == 1


def test_waiting_may_be_for_ever_but_not_for_no_number(device: pyvfio.Device) -> None:
    """Infinity and more than poll(2) can count are fine."""
    irq = device.irq(MSI)
    irq.enable(1)
    for timeout in (float("inf"), 1e12):
        irq.trigger()
        assert irq.wait(timeout=timeout) == 1
    with pytest.raises(ValueError, match="not a number"):
        irq.wait(timeout=float("nan"))


def test_a_child_cannot_take_an_interrupt_or_a_register_from_its_parent(device: pyvfio.Device) -> None:
    """It shares the eventfd and the mapping, so using them is an error."""
    irq = device.irq(MSI)
    irq.enable(1)
    irq.trigger()
    mapped = device.region(2).mmap()

    def use() -> None:
        for attempt in (lambda: irq.wait(timeout=0), mapped.view, irq.disable, device.reset):
            with pytest.raises(pyvfio.ForkedError):
                attempt()
        mapped.close()

    assert in_child(use) == 0
    assert irq.wait(timeout=0) == 1
    mapped.close()


def test_a_mapped_region_that_was_forgotten_goes_with_its_device(kernel: SpecialKernel) -> None:
    """It keeps the group open in the kernel."""
    device = pyvfio.open_device(BDF, kernel=kernel)
    vaddr = device.region(2).mmap().vaddr
    assert proc_maps_has(vaddr)
    device.close()
    assert not proc_maps_has(vaddr)


def test_a_device_under_a_live_view_of_a_region_stays_open_until_it_is_released(kernel: SpecialKernel) -> None:
    """Nothing is closed half, and the next close does all."""
    with nothing_left(kernel):
        device = pyvfio.open_device(BDF, kernel=kernel)
        view = device.region(2).mmap().view()
        with pytest.raises(BufferError, match=f"BAR2 .* of {BDF}"):
            device.close()
        assert not device.closed
        assert device.config.read16(0) != 0
        view.release()
        device.close()


def test_interrupts_of_a_device_that_was_forgotten_close_their_descriptors(kernel: SpecialKernel) -> None:
    """As the device does, with a ResourceWarning."""
    with nothing_left(kernel):
        pyvfio.open_device(BDF, kernel=kernel).irq(MSI).enable(2)
        with pytest.warns(ResourceWarning, match="never closed"):
            gc.collect()


def test_an_interrupt_is_enabled_once(device: pyvfio.Device) -> None:
    """Another kind at the same time is the kernel's EINVAL; no eventfd stays."""
    device.irq(MSI).enable(1)
    before = open_fds()
    with pytest.raises(pyvfio.VfioError, match=r"enabled already.*disable\(\)"):
        device.irq(MSI).enable(1)
    with pytest.raises(pyvfio.IoctlError, match=r"Only one kind .*device.irq\(VFIO_PCI_MSI_IRQ_INDEX\).disable\(\)"):
        device.irq(INTX).enable(1)
    assert open_fds() == before
    assert device.irq(INTX).fds == ()


def test_fewer_vectors_than_asked_for_are_an_error_with_both_numbers(kernel: SpecialKernel) -> None:
    """The kernel returns how many it could have had, and has enabled none."""
    with nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as device:
        irq = device.irq(MSIX)
        before = open_fds()
        kernel.answers["VFIO_DEVICE_SET_IRQS"] = 3
        with pytest.raises(pyvfio.UnsupportedError, match="only 3 of 8 vectors are available"):
            irq.enable(8)
        kernel.answers.clear()
        assert irq.fds == ()
        assert open_fds() == before


def test_an_eventfd_that_cannot_be_had_leaves_none(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Those before it are closed."""
    irq, before = device.irq(MSIX), open_fds()
    kernel.fail(call="eventfd", nth=4, errno=errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        irq.enable(8)
    assert open_fds() == before
    assert irq.fds == ()


def test_every_eventfd_is_closed_though_closing_one_fails(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """And though the kernel would not disable."""
    irq = device.irq(MSIX)
    fds = irq.enable(4)
    kernel.fail(call="ioctl", request="VFIO_DEVICE_SET_IRQS", errno=errno.EIO)
    kernel.fail(call="close", nth=2, errno=errno.EIO, after=True)
    with pytest.raises(pyvfio.RollbackError, match="disabling VFIO_PCI_MSIX") as caught:
        irq.disable()
    assert len(caught.value.exceptions) == 2
    assert not set(fds) & set(open_fds())


# ----------------------------------------------------------------------------------------------------------- resets


def test_a_reset_is_made(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Where the device has one."""
    device.region(2).write32(0, 5)
    device.reset()
    assert requests(kernel.trace)[-1] == "VFIO_DEVICE_RESET"
    assert device.region(2).read32(0) == 0


def test_a_device_without_a_reset_says_so_and_what_to_do_instead(kernel: SpecialKernel) -> None:
    """A hot reset is no help on a root bus."""
    with nothing_left(kernel), pyvfio.open_device(OTHER_BDF, kernel=kernel) as device:
        kernel.clear_trace()
        with pytest.raises(pyvfio.UnsupportedError, match=r"no reset of its own.*bus_master to stop DMA$"):
            device.reset()
        assert requests(kernel.trace) == ["VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"]


class HotKernel(FakeKernel):
    """A device whose slot can be reset, with those in `reached`, as `vfio_pci_ioctl_get_pci_hot_reset_info` tells."""

    reached: tuple[tuple[int, int, int, int], ...] = ()
    error = 0

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, which the fake has not; all else as it is."""
        hot = request == ioctls.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO and self._machine.container(fd) is None
        if not hot or isinstance(argument, int):
            return super().ioctl(fd, request, argument)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        with memoryview(argument) as view, view.cast("B") as answer:
            (argsz,) = struct.unpack_from("=I", answer)
            assert argsz <= len(answer)
            struct.pack_into("=II", answer, 4, 0, len(self.reached))
            if argsz < 12 + 8 * len(self.reached):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            for number, (group, segment, bus, devfn) in enumerate(self.reached):
                struct.pack_into("=IHBB", answer, 12 + 8 * number, group, segment, bus, devfn)
        return 0


@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_the_devices_that_a_hot_reset_reaches_are_listed_however_many_they_are(count: int) -> None:
    """ENOSPC says how much room they need."""
    with HotKernel() as kernel, nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as device:
        kernel.reached = tuple((7 + number, 1, 0x3A, 0x0A) for number in range(count))
        expected = tuple(DependentDevice(7 + number, "0001:3a:01.2") for number in range(count))
        assert device.get_pci_hot_reset_info() == expected


def test_a_device_whose_bus_cannot_be_reset_says_so() -> None:
    """ENODEV; any other refusal stays what it is, also an ENOSPC that asks for no more room."""
    with HotKernel() as kernel, nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as device:
        kernel.error = errno.ENODEV
        with pytest.raises(pyvfio.UnsupportedError, match=f"slot nor the bus of {BDF} can be reset"):
            device.get_pci_hot_reset_info()
        for number in (errno.EPERM, errno.ENOSPC):
            kernel.error = number
            with pytest.raises(pyvfio.IoctlError) as caught:
                device.get_pci_hot_reset_info()
            assert caught.value.errno == number


# ---------------------------------------------------------------------------------------------------------- closing


def test_closing_stops_dma_though_one_step_of_it_fails(kernel: SpecialKernel) -> None:
    """A device whose configuration space does not answer is reset nevertheless."""
    with nothing_left(kernel):
        device = pyvfio.open_device(BDF, kernel=kernel)
        kernel.fail(call="pread", errno=errno.EIO)
        kernel.clear_trace()
        with pytest.raises(OSError, match="Input/output"):
            device.close()
        assert "VFIO_DEVICE_RESET" in requests(kernel.trace)
        device.close()


def test_a_device_that_asks_for_more_and_more_room_is_refused(kernel: SpecialKernel) -> None:
    """A kernel is trusted no further than a megabyte."""

    class Greedy(FakeKernel):
        def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
            result = super().ioctl(fd, request, argument)
            if self.trace[-1].request == "VFIO_DEVICE_GET_INFO" and isinstance(argument, bytearray):
                argument[:4] = (2 * len(argument)).to_bytes(4, "little")
            return result

    with Greedy() as greedy, nothing_left(greedy), pytest.raises(pyvfio.VfioError, match="needs a buffer of"):
        pyvfio.open_device(BDF, kernel=greedy)


class PausingKernel(SpecialKernel):
    """A kernel in which a system call of the thread "driver" goes on when `go_on` says so. `seen`: whether the
    descriptor was open then."""

    def __init__(self) -> None:
        super().__init__(groups=[(2, [FakeDevice(BDF, bars={4: Bar(256, io=True)})])])
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.seen: list[bool] = []

    def _pause(self, fd: int) -> None:
        if threading.current_thread().name == "driver":
            self.begun.set()
            self.go_on.wait(10)
            self.seen.append(os.path.exists(f"/proc/self/fd/{fd}"))

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Wait first."""
        self._pause(fd)
        return super().pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Wait first."""
        self._pause(fd)
        return super().pwrite(fd, data, offset)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Wait first."""
        self._pause(fd)
        return super().ioctl(fd, request, argument)


@pytest.mark.parametrize("access", ["read", "write", "check", "ioctl"])
def test_a_close_waits_for_an_access_that_is_a_system_call(access: str) -> None:
    """A descriptor that is closed meanwhile could be another file's, and the access would reach that."""
    with PausingKernel() as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        ports = device.region(4)
        calls: dict[str, Callable[[], object]] = {
            "read": lambda: ports.read32(0),
            "write": lambda: ports.write32(0, 1),
            "check": device.config.check_present,
            "ioctl": lambda: device.ioctl("VFIO_DEVICE_GET_INFO", ioctls.vfio_device_info(argsz=20)),
        }
        driver = threading.Thread(target=calls[access], name="driver")
        closer = threading.Thread(target=device.close)
        driver.start()
        kernel.begun.wait(10)
        closer.start()
        closer.join(0.1)
        kernel.go_on.set()
        driver.join()
        closer.join()
        assert kernel.seen == [True]
        assert device.closed


@pytest.mark.parametrize("fd", [1 << 31, 1 << 64, -1])
def test_a_number_that_no_descriptor_has_is_a_value_error(device: pyvfio.Device, fd: int) -> None:
    """Before any system call: the kernel takes an int in C."""
    kernel = device.kernel
    for call in (
        lambda: pyvfio.Container.from_fd(fd, kernel=kernel),
        lambda: pyvfio.Group.from_fd(fd, number=2, kernel=kernel),
        lambda: pyvfio.Device.from_fd(device.group, BDF, fd),
    ):
        with pytest.raises(ValueError, match=f"{fd} is no file descriptor"):
            call()


@pytest.mark.parametrize("bits", [-1, 1 << 16])
@pytest.mark.parametrize("index", [0, ioctls.VFIO_PCI_CONFIG_REGION_INDEX])
def test_bits_that_do_not_fit_are_refused_before_a_system_call(
    kernel: SpecialKernel, device: pyvfio.Device, bits: int, index: int
) -> None:
    """Set or cleared."""
    region = device.region(index)
    kernel.clear_trace()
    for on in (True, False):
        with pytest.raises(ValueError, match="does not fit 2 bytes"):
            region.change16(4, bits, on=on)
    assert not kernel.trace
