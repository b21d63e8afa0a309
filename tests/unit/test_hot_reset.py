"""Resets of a whole bus on a fake kernel: what is missing is said before, and each device concerned is right after."""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.device import PCI_COMMAND
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import FakeDevice, FakeEdu, FakeKernel, FakePciDevice
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import nothing_left, requests
from tests.unit.processes import in_child

MSI = ioctls.VFIO_PCI_MSI_IRQ_INDEX
ROOT = "0000:00:02.0"
FIRST, SECOND, THIRD = "0000:01:00.0", "0000:01:00.1", "0000:01:00.2"
HOT_RESET = "VFIO_DEVICE_PCI_HOT_RESET"


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A device on a root bus; and a bus with two devices of one group, and one of another group."""
    groups: Sequence[tuple[int, Sequence[FakeDevice | FakePciDevice]]] = [
        (2, [FakeEdu(ROOT)]),
        (4, [FakeEdu(FIRST), FakeDevice(SECOND)]),
        (5, [FakeDevice(THIRD, resettable=True)]),
    ]
    with FakeKernel(groups=groups) as made, nothing_left(made):
        yield made


@pytest.fixture
def devices(kernel: FakeKernel) -> Iterator[tuple[pyvfio.Device, ...]]:
    """All three devices of the bus, in one container; they decode memory and are bus masters."""
    with pyvfio.Container(kernel=kernel) as container:
        found = tuple(pyvfio.open_device(bdf, container=container) for bdf in (FIRST, SECOND, THIRD))
        for device in found:
            device.memory_enabled = True
            device.bus_master = True
        yield found


# --------------------------------------------------------------------------------------------------- what is missing


def test_a_device_on_a_root_bus_has_no_hot_reset(kernel: FakeKernel) -> None:
    """And `reset` does not name it."""
    with pyvfio.open_device(ROOT, kernel=kernel) as device:
        for call in (device.hot_reset, lambda: device.hot_reset_groups):
            with pytest.raises(pyvfio.UnsupportedError, match="neither the slot nor the bus"):
                call()
        with pytest.raises(pyvfio.UnsupportedError) as caught:
            device.reset()
        assert "hot_reset" not in str(caught.value)
        assert HOT_RESET not in requests(kernel.trace)


def test_reset_names_hot_reset_and_the_devices_that_it_would_reset_too(devices: tuple[pyvfio.Device, ...]) -> None:
    """Of a device without a reset of its own, on a bus that can be reset."""
    with pytest.raises(pyvfio.UnsupportedError, match=rf"hot_reset\(\), which resets the bus with {SECOND}, {THIRD}"):
        devices[0].reset()
    devices[2].reset()


def test_reset_names_hot_reset_of_a_device_that_is_alone_on_its_bus() -> None:
    """And no other device."""
    with FakeKernel(groups=[(4, [FakeDevice(FIRST)])]) as kernel, pyvfio.open_device(FIRST, kernel=kernel) as device:
        with pytest.raises(pyvfio.UnsupportedError) as caught:
            device.reset()
        assert caught.value.hint == "Clear bus_master to stop DMA, or use hot_reset(), which resets the bus"
        device.hot_reset()


def test_the_groups_that_a_hot_reset_needs_are_told(devices: tuple[pyvfio.Device, ...]) -> None:
    """Each once, ascending."""
    assert devices[2].hot_reset_groups == (4, 5)


def test_groups_and_devices_that_are_missing_are_named_before_the_call(kernel: FakeKernel) -> None:
    """By number and address, with what to do about them."""
    kernel.bind(SECOND, None)
    with pyvfio.open_device(FIRST, kernel=kernel) as device:
        device.bus_master = True
        with pytest.raises(pyvfio.VfioError) as caught:
            device.hot_reset()
        message = str(caught.value)
        assert "reaches 3 devices" in message
        assert f"IOMMU group 5 ({THIRD}) is not in the container of the device" in message
        assert f"{SECOND} is not bound to vfio-pci" in message
        assert f"pyvfio bind {SECOND}; open_device('{THIRD}', container=device.container)" in message
        assert device.bus_master
        assert HOT_RESET not in requests(kernel.trace)


def test_a_group_in_another_container_is_missing(kernel: FakeKernel) -> None:
    """Its descriptor is another object's."""
    with (
        pyvfio.open_device(FIRST, kernel=kernel) as device,
        pyvfio.open_device(THIRD, kernel=kernel),
        pytest.raises(pyvfio.VfioError, match=r"^a hot reset of 0000:01:00.0 reaches 3 devices.*group 5 \("),
    ):
        device.hot_reset()


def test_devices_that_are_bound_but_not_open_are_reset_all_the_same(kernel: FakeKernel) -> None:
    """Their group is what counts."""
    with pyvfio.open_device(THIRD, kernel=kernel) as device:
        device.container.open_group(4)
        device.hot_reset()
    assert requests(kernel.trace).count(HOT_RESET) == 1


# ------------------------------------------------------------------------------------------------------ what is after


def test_after_a_hot_reset_each_device_decodes_memory_and_is_no_bus_master(devices: tuple[pyvfio.Device, ...]) -> None:
    """Its registers are zero; DMA is for the driver to allow again."""
    for device in devices[1:]:
        device.region(0).write32(0, 5)
    devices[0].region(0).write32(4, 0)
    devices[0].hot_reset()
    for device in devices:
        assert device.config.read16(PCI_COMMAND) == 2
        assert device.region(0).read32(4) == 0
    assert [device.region(0).read32(0) for device in devices] == [0x010000ED, 0, 0]


def test_memory_that_was_not_decoded_is_not_decoded_after(devices: tuple[pyvfio.Device, ...]) -> None:
    """COMMAND is kept but for bus mastering."""
    devices[1].memory_enabled = False
    devices[0].hot_reset()
    assert [device.memory_enabled for device in devices] == [True, False, True]


def test_enabled_interrupts_are_signalled_after_a_hot_reset(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]
) -> None:
    """Without enabling them again."""
    irq = devices[1].irq(MSI)
    fds = irq.enable(1)
    devices[0].hot_reset()
    assert irq.fds == fds
    kernel.interrupt(SECOND)
    assert irq.wait(timeout=1) == 1


def test_mappings_of_regions_and_windows_are_dropped_before(devices: tuple[pyvfio.Device, ...]) -> None:
    """Of siblings, too."""
    mapped = devices[2].region(0).mmap()
    devices[0].hot_reset()
    with pytest.raises(pyvfio.ClosedError):
        _ = mapped.vaddr
    assert devices[2].region(0).maps == []


def test_a_view_of_a_siblings_region_refuses_a_hot_reset(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]
) -> None:
    """Nothing has changed then."""
    with devices[1].region(0).mmap() as mapped:
        view = mapped.view()
        with pytest.raises(BufferError):
            devices[0].hot_reset()
        assert [device.bus_master for device in devices] == [True] * 3
        assert HOT_RESET not in requests(kernel.trace)
        view.release()
    devices[0].hot_reset()


def test_dma_mappings_stay(kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]) -> None:
    """The IOMMU's table is nothing of the bus."""
    buffer = mmap.mmap(-1, PAGE_SIZE)
    with pyvfio.DmaMapper(devices[0].container) as mapper, mapper.map_buffer(buffer) as mapping:
        devices[0].hot_reset()
        kernel.dma_write(FIRST, mapping.iova, b"after")
    assert buffer[:5] == b"after"


def test_a_siblings_bar_that_another_device_reaches_is_unmapped_before(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]
) -> None:
    """And where it cannot be, no bus is reset."""
    with pyvfio.open_device(ROOT, kernel=kernel) as root, pyvfio.DmaMapper(root.container) as mapper:
        mapping = mapper.map_region(devices[1].region(0))
        kernel.fail(request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
        with pytest.raises(pyvfio.IoctlError, match="VFIO_IOMMU_UNMAP_DMA"):
            devices[0].hot_reset()
        assert HOT_RESET not in requests(kernel.trace)
        assert root.container.mapping_at(mapping.iova) is not None
        assert devices[0].bus_master
        devices[0].hot_reset()
        assert root.container.mapping_at(mapping.iova) is None
        calls = requests(kernel.trace)
        assert calls.index("VFIO_IOMMU_UNMAP_DMA") < calls.index(HOT_RESET)


def test_a_device_that_another_thread_opens_meanwhile_is_made_ready_too(kernel: FakeKernel) -> None:
    """It is opened when the devices have been listed: while a mapping of a BAR of the first one is closed."""
    with (
        pyvfio.open_device(FIRST, kernel=kernel) as first,
        pyvfio.open_device(ROOT, kernel=kernel) as root,
        pyvfio.DmaMapper(root.container) as mapper,
    ):
        first.memory_enabled = True
        first.container.open_group(5)
        dependents = first.region(0).dependents
        mapped: list[pyvfio.DmaMapping] = []

        def another_thread() -> None:
            dependents.remove(another_thread)
            third = pyvfio.open_device(THIRD, container=first.container)
            third.memory_enabled = third.bus_master = True
            mapped.append(mapper.map_region(third.region(0)))

        dependents.append(another_thread)
        first.hot_reset()
        assert root.container.mapping_at(mapped[0].iova) is None
        (third,) = first.container.groups[5].devices
        assert isinstance(third, pyvfio.Device)
        assert not third.bus_master
        kernel.check()
        calls = requests(kernel.trace)
        assert calls.index("VFIO_IOMMU_UNMAP_DMA") < calls.index(HOT_RESET)
        third.close()


def test_a_bar_that_another_thread_maps_meanwhile_is_unmapped_before_the_reset(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]
) -> None:
    """For the DMA of a device on another bus, while a mapping of the same BAR is closed. The bus is reset once."""
    with pyvfio.open_device(ROOT, kernel=kernel) as root, pyvfio.DmaMapper(root.container) as mapper:
        region = devices[2].region(0)
        mapped: list[pyvfio.DmaMapping] = []

        def another_thread() -> None:
            region.dependents.remove(another_thread)
            mapped.append(mapper.map_region(region))

        region.dependents.append(another_thread)
        devices[0].hot_reset()
        assert root.container.mapping_at(mapped[0].iova) is None
        calls = requests(kernel.trace)
        assert calls.count(HOT_RESET) == 1
        assert calls.index("VFIO_IOMMU_UNMAP_DMA") < calls.index(HOT_RESET)


def test_a_view_that_another_thread_makes_meanwhile_is_seen_before_anything_is_dropped(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]
) -> None:
    """While a mapping of a BAR for the DMA of another device is closed."""
    region, views = devices[2].region(0), list[memoryview]()
    other = devices[1].region(0).mmap()

    def another_thread() -> None:
        region.dependents.remove(another_thread)
        views.append(region.mmap().view())

    region.dependents.append(another_thread)
    with pytest.raises(BufferError, match=f"of {THIRD}"):
        devices[0].hot_reset()
    assert HOT_RESET not in requests(kernel.trace)
    assert other.vaddr
    assert [device.bus_master for device in devices] == [True] * 3
    views.pop().release()
    devices[0].hot_reset()


class _Resetting(FakeKernel):
    """Calls `between` while the bus is reset."""

    between: Callable[[], object] = staticmethod(lambda: None)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0, /) -> int:
        if request == ioctls.VFIO_DEVICE_PCI_HOT_RESET:
            self.between()
        return super().ioctl(fd, request, argument)


def test_a_device_that_another_thread_opens_during_the_reset_is_had_after_it() -> None:
    """Nobody maps a BAR of it while the bus is being reset."""
    groups = [(4, [FakeDevice(FIRST)]), (5, [FakeDevice(THIRD)])]
    with _Resetting(groups=groups) as kernel, nothing_left(kernel), pyvfio.Container(kernel=kernel) as container:
        first = pyvfio.open_device(FIRST, container=container)
        group = container.open_group(5)
        opened: list[pyvfio.Device] = []
        thread = threading.Thread(target=lambda: opened.append(pyvfio.Device(group, THIRD)))

        def another_thread() -> None:
            thread.start()
            thread.join(0.3)
            assert not opened
            assert not group.devices

        kernel.between = another_thread
        first.hot_reset()
        thread.join(20)
        assert group.devices == opened


def test_where_a_view_refuses_the_reset_no_bar_is_unmapped_from_another_device(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]
) -> None:
    """Nothing has changed."""
    with pyvfio.open_device(ROOT, kernel=kernel) as root, pyvfio.DmaMapper(root.container) as mapper:
        mapping = mapper.map_region(devices[0].region(0))
        with devices[2].region(0).mmap() as mapped:
            view = mapped.view()
            with pytest.raises(BufferError):
                devices[0].hot_reset()
            assert root.container.mapping_at(mapping.iova) is not None
            view.release()


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOTTY, "x-speed=2_5"), (errno.EAGAIN, "try again"), (errno.EINVAL, "vfio-pci")]
)
def test_where_the_kernel_refuses_bus_mastering_is_as_before(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...], number: int, hint: str
) -> None:
    """And the error says what may be done."""
    devices[1].bus_master = False
    kernel.fail(request=HOT_RESET, errno=number)
    with pytest.raises(pyvfio.IoctlError, match=hint) as caught:
        devices[0].hot_reset()
    assert caught.value.errno == number
    assert [device.bus_master for device in devices] == [True, False, True]


def test_each_group_is_given_once(kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]) -> None:
    """The kernel takes no more groups than there are devices."""
    devices[0].hot_reset()
    (call,) = [call for call in kernel.trace if call.request == HOT_RESET]
    assert isinstance(call.given[2], bytes)
    groups = devices[0].container.groups
    assert struct.unpack("=5I", call.given[2]) == (20, 0, 2, groups[4].fd, groups[5].fd)


def test_a_closed_device_is_not_reset(kernel: FakeKernel) -> None:
    """Nor is one of a parent's."""
    device = pyvfio.open_device(THIRD, kernel=kernel)

    def refused() -> None:
        with pytest.raises(pyvfio.ForkedError):
            device.hot_reset()

    assert in_child(refused) == 0
    device.close()
    with pytest.raises(pyvfio.ClosedError):
        device.hot_reset()


# ------------------------------------------------------------------------------------------------ a reset of its own


def test_a_reset_keeps_command_interrupts_and_mapped_regions(
    kernel: FakeKernel, devices: tuple[pyvfio.Device, ...]
) -> None:
    """As the kernel does; see the contract."""
    device = devices[2]
    irq = device.irq(MSI)
    irq.enable(1)
    with device.region(0).mmap() as mapped:
        device.region(0).write32(0, 5)
        device.reset()
        assert ctypes.c_uint32.from_address(mapped.vaddr).value == 0
    assert device.config.read16(PCI_COMMAND) == 6
    kernel.interrupt(THIRD)
    assert irq.wait(timeout=1) == 1
