"""Features of a device: by number, low power, DMA-bufs, and the token of virtual functions."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.testing.fake import Bar, FakeDevice
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, OTHER_BDF, SpecialKernel, nothing_left
from tests.unit.processes import open_fds

GET, SET = ioctls.VFIO_DEVICE_FEATURE_GET, ioctls.VFIO_DEVICE_FEATURE_SET
DMA_BUF, MIGRATION = ioctls.VFIO_DEVICE_FEATURE_DMA_BUF, ioctls.VFIO_DEVICE_FEATURE_MIGRATION
ENTRY, EXIT = ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT
PF, VF = "0000:01:00.0", "0000:01:00.1"
TOKEN, OTHER = (uuid.UUID(f"bd8d9d2b-5a5f-4f5a-a211-f591514ba1f{last}") for last in (3, 4))


def registers() -> Bar:
    """A BAR of registers that are 7, whatever is written."""
    return Bar(MIB, read=lambda _offset, _width: 7, write=lambda _offset, _width, _value: None)


def make_kernel(version: str) -> SpecialKernel:
    """A kernel with a device that has registers, I/O ports and plain memory, another device, and one with SR-IOV."""
    bars = {0: registers(), 1: Bar(256, io=True), 2: Bar(2 * PAGE_SIZE), 5: Bar(PAGE_SIZE)}
    groups = [
        (2, [FakeDevice(BDF, bars=bars)]),
        (3, [FakeDevice(OTHER_BDF)]),
        (4, [FakeDevice(PF, sriov=True)]),
        (5, [FakeDevice(VF, pf=PF)]),
    ]
    return SpecialKernel(version, groups=groups)


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """A kernel that has all features."""
    with make_kernel("7.3") as made, nothing_left(made):
        yield made


@pytest.fixture
def device(kernel: SpecialKernel) -> Iterator[pyvfio.Device]:
    """The device with registers."""
    with pyvfio.open_device(BDF, kernel=kernel) as opened:
        opened.memory_enabled = True
        yield opened


# ------------------------------------------------------------------------------------------------ by number


def test_a_probe_says_which_of_get_and_set_the_kernel_can_do(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Nothing for what it does not have, or not for this device."""
    assert device.feature(ENTRY).probe() == SET
    assert device.feature(DMA_BUF).probe() == GET
    for number in (0, MIGRATION, ioctls.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, 13, 0xFFFF):
        assert not device.feature(number).probe()
    kernel.fail(call="ioctl", request=ioctls.VFIO_DEVICE_FEATURE, errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError, match="EIO"):
        device.feature(ENTRY).probe()


@pytest.mark.parametrize(
    ("number", "named", "needs"),
    [
        (ioctls.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, "VFIO_DEVICE_FEATURE_PCI_VF_TOKEN", "physical function"),
        (MIGRATION, "VFIO_DEVICE_FEATURE_MIGRATION", "mlx5_vfio_pci"),
        (ioctls.VFIO_DEVICE_FEATURE_BUS_MASTER, "VFIO_DEVICE_FEATURE_BUS_MASTER", r"Device\.bus_master"),
        (ioctls.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2", "mlx5_vfio_pci"),
        (0x1234, "feature 4660", "Another kernel"),
    ],
)
def test_a_feature_that_is_not_there_says_what_it_needs(
    device: pyvfio.Device, number: int, named: str, needs: str
) -> None:
    """For a read and for a change alike."""
    feature = device.feature(number)
    assert repr(feature) == f"<Feature {named} of {BDF}>"
    for call in (lambda: feature.get(bytes(8)), lambda: feature.set(bytes(16))):
        with pytest.raises(pyvfio.UnsupportedError, match=f"{named}.*{needs}"):
            call()


def test_what_can_be_set_only_is_not_read_and_the_other_way_round(device: pyvfio.Device) -> None:
    """The kernel says EINVAL, as for any mistake."""
    with pytest.raises(pyvfio.UnsupportedError, match=r"ENTRY of .* cannot be read\. The feature can only be set"):
        device.feature(ENTRY).get(b"")
    with pytest.raises(pyvfio.UnsupportedError, match=r"DMA_BUF of .* cannot be set\. The feature can only be read"):
        device.feature(DMA_BUF).set(bytes(32))
    with pytest.raises(pyvfio.IoctlError, match="EINVAL"):
        device.feature(DMA_BUF).get(bytes(15))


def test_data_are_bytes_or_a_structure_and_come_back_as_what_was_given(
    kernel: SpecialKernel, device: pyvfio.Device
) -> None:
    """The caller's own are as before."""
    given = ioctls.feature_dma_buf(region_index=2, open_flags=os.O_CLOEXEC, ranges=[(0, PAGE_SIZE)])
    before = bytes(given)
    structure, plain = device.feature(DMA_BUF).get(given), device.feature(DMA_BUF).get(before)
    assert type(structure.data) is type(given)
    assert structure.data.nr_ranges == 1
    assert plain.data == before == bytes(given)
    assert [os.fstat(answer.value).st_size for answer in (structure, plain)] == [PAGE_SIZE, PAGE_SIZE]
    for answer in (structure, plain):
        kernel.close(answer.value)


def test_a_number_is_of_16_bits_and_data_are_data(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Before any system call."""
    kernel.clear_trace()
    for number in (-1, 0x10000):
        with pytest.raises(ValueError, match="from 0 to 0xffff"):
            device.feature(number)
    wrong: list[Callable[[], object]] = [
        lambda: device.feature("3"),  # type: ignore[arg-type]
        lambda: device.feature(3).set(5),  # type: ignore[arg-type]
        lambda: device.feature(3).get("abc"),  # type: ignore[call-overload]
        lambda: device.enter_low_power(wakeup_fd="1"),  # type: ignore[arg-type]
        lambda: device.set_vf_token(b"x" * 16),  # type: ignore[arg-type]
        lambda: device.dma_buf(0),  # type: ignore[arg-type]
    ]
    for call in wrong:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="-1 is no file descriptor"):
        device.enter_low_power(wakeup_fd=-1)
    assert not kernel.trace


def test_a_closed_device_has_no_features(kernel: SpecialKernel) -> None:
    """ClosedError, whatever is asked."""
    device = pyvfio.open_device(BDF, kernel=kernel)
    feature, region = device.feature(ENTRY), device.region(2)
    device.close()
    calls: list[Callable[[], object]] = [feature.probe, feature.set, lambda: feature.get(b""), device.enter_low_power]
    calls += [device.exit_low_power, lambda: device.dma_buf(region), lambda: device.set_vf_token(TOKEN)]
    for call in calls:
        with pytest.raises(pyvfio.ClosedError):
            call()


# ------------------------------------------------------------------------------------------------ low power


def test_in_low_power_no_register_is_read_through_a_window(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """The fake says SIGBUS where one is: the window is dropped, and none is made before the end."""
    bar = device.region(0)
    assert bar.read32(0) == 7
    with device.low_power():
        assert bar.read32(4) == 7
        bar.write32(4, 1)
        assert device.config.read16(0) == 0x1234
        assert [call.call for call in kernel.trace if call.call == "registers"] == ["registers"]
    assert bar.read32(8) == 7
    assert [call.call for call in kernel.trace if call.call == "registers"] == ["registers", "registers"]


@pytest.mark.parametrize("enter", ["method", "number"])
def test_low_power_closes_mappings_and_is_refused_under_a_view(device: pyvfio.Device, enter: str) -> None:
    """By either way in; with a view nothing has changed."""
    mapped = device.region(2).mmap()
    view, results = mapped.view(), list[int]()
    ways: dict[str, Callable[[], object]] = {
        "method": device.enter_low_power,
        "number": lambda: results.append(device.feature(ENTRY).set()),
    }
    go = ways[enter]
    with pytest.raises(BufferError, match="a view of"):
        go()
    view[0] = 1
    view.release()
    go()
    with pytest.raises(pyvfio.ClosedError):
        _ = mapped.vaddr
    results.append(device.feature(EXIT).set())
    assert set(results) == {0}
    device.region(2).mmap().close()


def test_low_power_is_entered_once_and_left_at_the_end_of_a_block_that_raises(device: pyvfio.Device) -> None:
    """A second entry says why it is refused; the first one stays."""

    def enter_twice() -> None:
        with device.low_power():
            device.enter_low_power()

    for _ in range(2):
        with pytest.raises(pyvfio.IoctlError, match=r"EINVAL.*in low power already"):
            enter_twice()
    with device.low_power():
        pass
    device.exit_low_power()
    device.exit_low_power()


def test_an_error_of_the_block_is_not_replaced_by_that_of_its_end(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """It gets a note; without one of its own the block raises that of the end."""

    def spoil() -> None:
        kernel.fail(call="ioctl", request=ioctls.VFIO_DEVICE_FEATURE, errno=errno.EIO)

    def raise_in_the_block() -> None:
        with device.low_power():
            spoil()
            raise KeyError

    with pytest.raises(KeyError) as caught:
        raise_in_the_block()
    assert "could not leave low power" in caught.value.__notes__[0]
    device.exit_low_power()
    with pytest.raises(pyvfio.IoctlError, match="EIO"), device.low_power():
        spoil()
    spoil()
    with pytest.raises(pyvfio.IoctlError, match="EIO"):
        device.exit_low_power()
    assert device.region(0).read32(0) == 7  # by a system call, for it is in low power still
    device.exit_low_power()


def test_a_device_that_is_closed_in_low_power_is_closed(kernel: SpecialKernel) -> None:
    """And the block ends in peace."""
    with pyvfio.open_device(BDF, kernel=kernel) as device, device.low_power():
        device.close()
    assert device.closed


def test_an_access_of_the_programs_own_ends_low_power_where_it_wants_to_be_told(
    kernel: SpecialKernel, device: pyvfio.Device
) -> None:
    """The eventfd is signalled once."""
    event = kernel.eventfd(0, os.EFD_NONBLOCK)
    with device.low_power(wakeup_fd=event):
        assert not kernel.poll(event, 0)
        assert device.region(0).read32(0) == 7
        assert kernel.eventfd_read(event) == 1
        device.enter_low_power()
    kernel.close(event)


def test_a_wakeup_fd_that_is_no_eventfd_is_refused_with_the_reason(device: pyvfio.Device) -> None:
    """One that is closed, another file's, a number that ctypes would cut to that of an eventfd. Mappings stay."""
    event = os.eventfd(0)
    with device.region(2).mmap() as mapped, open(os.devnull, encoding="utf-8") as file:
        for wrong, why in (
            (file.fileno(), f"descriptor {file.fileno()} is no eventfd"),
            (10_000, "descriptor 10000 is closed, and cannot be used for the low power"),
            ((1 << 32) + event, "is no file descriptor"),
            (1 << 64, "is no file descriptor"),
        ):
            with pytest.raises(ValueError, match=why):
                device.enter_low_power(wakeup_fd=wrong)
        with pytest.raises(TypeError, match="wakeup_fd must be a whole number, not True"):
            device.enter_low_power(wakeup_fd=True)
        assert mapped.vaddr
    device.enter_low_power()
    with pytest.raises(pyvfio.IoctlError, match="already"):
        device.enter_low_power(wakeup_fd=event)
    os.close(event)


@pytest.mark.parametrize("low_power", [False, True])
@pytest.mark.parametrize("waked", [False, True])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBADF, errno.EIO])
def test_a_refused_entry_names_what_can_be_wrong(
    kernel: SpecialKernel, device: pyvfio.Device, number: int, *, waked: bool, low_power: bool
) -> None:
    """Only one who passes an eventfd can have passed a wrong one; and no reason is invented for other errors."""
    event = os.eventfd(0)
    if low_power:
        device.enter_low_power()
    kernel.fail(call="ioctl", request=ioctls.VFIO_DEVICE_FEATURE, errno=number)
    with pytest.raises(pyvfio.IoctlError) as caught:
        device.enter_low_power(wakeup_fd=event if waked else None)
    assert caught.value.errno == number
    name = "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY" + "_WITH_WAKEUP" * waked
    assert caught.value.arguments == {"feature": name, "flags": int(SET), "argsz": 16 if waked else 8}
    wrong = f"wakeup_fd, {event}, is no eventfd" if waked and not low_power else "The device is in low power already"
    assert caught.value.hint == ("" if number == errno.EIO else wrong)
    os.close(event)


def test_where_an_entry_fails_windows_are_made_as_before(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """Since the device answers as before."""
    bar = device.region(0)
    bar.read32(0)
    kernel.fail(call="ioctl", request=ioctls.VFIO_DEVICE_FEATURE, errno=errno.ENOTTY)
    with pytest.raises(pyvfio.UnsupportedError, match=r"The feature needs Linux 6\.1"):
        device.enter_low_power()
    bar.read32(0)
    assert [call.call for call in kernel.trace if call.call == "registers"] == ["registers", "registers"]


def test_a_device_that_is_handed_over_drops_nothing(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """The other process may have it by now: neither mappings nor windows end for a change that is refused."""
    bar, ended = device.region(0), list[int]()
    bar.read32(0)
    mapped = device.region(2).mmap()
    bar.dependents.append(lambda: ended.append(1))
    calls = (device.feature(ENTRY).set, device.enter_low_power, device.exit_low_power, device.reset, device.hot_reset)
    device.set_aside()
    kernel.clear_trace()
    for call in calls:
        with pytest.raises(pyvfio.HandOverError):
            call()
    assert (ended, kernel.trace) == ([], [])
    device.take_back()
    bar.dependents.clear()
    assert mapped.vaddr
    mapped.close()


def test_a_device_in_low_power_is_not_handed_to_another_process(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """The other one would map a window, and a touch of it is SIGBUS."""
    with pyvfio.RamBlockList(kernel=kernel) as blocks, pyvfio.DmaMapper(device.container, blocks) as mapper:
        with (
            device.low_power(),
            pytest.raises(pyvfio.HandOverError, match=r"in low power, .*: exit_low_power\(\) first"),
        ):
            pyvfio.hand_over(mapper)
        pyvfio.hand_over(mapper).cancel()


# ------------------------------------------------------------------------------------------------ DMA-bufs


def test_a_dma_buf_is_a_descriptor_of_the_size_of_its_parts(device: pyvfio.Device) -> None:
    """All of a BAR, or some of its pages; closed with the object, or given up by it."""
    before = open_fds()
    with device.dma_buf(device.region(5)) as last:
        assert (last.bar, last.size, last.ranges) == (5, PAGE_SIZE, ((0, PAGE_SIZE),))
    with device.dma_buf(device.region(0)) as whole, device.dma_buf(device.region(2), [(PAGE_SIZE, PAGE_SIZE)]) as part:
        assert [os.lseek(each.fd, 0, os.SEEK_END) for each in (whole, part)] == [MIB, PAGE_SIZE]
        assert [each.size for each in (whole, part)] == [MIB, PAGE_SIZE]
        assert not os.get_inheritable(whole.fd)
        assert repr(part) == f"<DmaBuf of BAR 2 of {BDF} size=0x1000>"
    assert repr(part) == f"<DmaBuf of BAR 2 of {BDF} size=0x1000, closed>"
    with pytest.raises(pyvfio.ClosedError, match="a DMA-buf of BAR 2"):
        _ = part.fd
    assert open_fds() == before


def test_a_dma_buf_outlives_its_device(kernel: SpecialKernel) -> None:
    """The kernel revokes it; the descriptor is the program's."""
    with pyvfio.open_device(BDF, kernel=kernel) as device:
        made = device.dma_buf(device.region(2))
    assert os.lseek(made.fd, 0, os.SEEK_END) == 2 * PAGE_SIZE
    made.close()


def test_a_dma_buf_is_of_whole_pages_of_a_bar_of_the_device(kernel: SpecialKernel, device: pyvfio.Device) -> None:
    """ValueError before any system call."""
    with pyvfio.open_device(OTHER_BDF, kernel=kernel) as other:
        regions = (other.region(0), device.region(ioctls.VFIO_PCI_ROM_REGION_INDEX), device.config)
        bar = device.region(2)
        kernel.clear_trace()
        for region in regions:
            with pytest.raises(ValueError, match="is no BAR of"):
                device.dma_buf(region)
        for part in ((0, 1), (1, PAGE_SIZE), (0, 0), (-PAGE_SIZE, PAGE_SIZE), (PAGE_SIZE, 2 * PAGE_SIZE)):
            with pytest.raises(ValueError, match="whole pages"):
                device.dma_buf(bar, [part])
        with pytest.raises(ValueError, match="one part at least"):
            device.dma_buf(bar, [])
        with pytest.raises(TypeError):
            device.dma_buf(bar, [("0", PAGE_SIZE)])  # type: ignore[list-item]
        assert not kernel.trace


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EINVAL, errno.EIO])
def test_a_bar_that_the_kernel_refuses_is_explained(kernel: SpecialKernel, device: pyvfio.Device, number: int) -> None:
    """Some BARs of memory cannot be targets of DMA. No reason is invented for other errors."""
    kernel.fail(call="ioctl", request=ioctls.VFIO_DEVICE_FEATURE, errno=number)
    with pytest.raises(pyvfio.IoctlError) as caught:
        device.dma_buf(device.region(2))
    assert (caught.value.errno, caught.value.request) == (number, "VFIO_DEVICE_FEATURE")
    assert caught.value.arguments["feature"] == "VFIO_DEVICE_FEATURE_DMA_BUF"
    assert caught.value.hint == ("" if number == errno.EIO else "BAR 2 is not memory, or cannot be a target of DMA")


def test_an_older_kernel_makes_no_dma_buf() -> None:
    """UnsupportedError says which one does."""
    with make_kernel("6.12") as kernel, nothing_left(kernel), pyvfio.open_device(BDF, kernel=kernel) as device:
        bar = device.region(2)
        with pytest.raises(pyvfio.UnsupportedError, match=r"Linux 6\.19, built with CONFIG_VFIO_PCI_DMABUF"):
            device.dma_buf(bar)


# ------------------------------------------------------------------------------------------------ VF tokens


@pytest.mark.parametrize("token", [TOKEN, str(TOKEN), str(TOKEN).upper(), f"{{{TOKEN}}}"])
def test_a_virtual_function_is_opened_with_the_token_of_its_physical_one(
    kernel: SpecialKernel, token: uuid.UUID | str
) -> None:
    """As a UUID or as any text that is one."""
    with pyvfio.open_device(PF, kernel=kernel, vf_token=token):
        opened = pyvfio.open_device(VF, kernel=kernel, vf_token=token)
        assert opened.config.read16(0) == 0x1234
        opened.close()


def test_the_token_can_be_set_later_and_replaces_the_one_before(kernel: SpecialKernel) -> None:
    """What is open stays open."""
    with pyvfio.open_device(PF, kernel=kernel) as physical:
        physical.set_vf_token(str(TOKEN))
        with pyvfio.open_device(VF, kernel=kernel, vf_token=TOKEN) as opened:
            physical.set_vf_token(OTHER)
            assert opened.config.read16(0) == 0x1234
        pyvfio.open_device(VF, kernel=kernel, vf_token=OTHER).close()
        with pytest.raises(pyvfio.IoctlError, match="EACCES"):
            pyvfio.open_device(VF, kernel=kernel, vf_token=TOKEN)


def test_eacces_says_whose_token_is_wanted_and_how_it_is_set(kernel: SpecialKernel) -> None:
    """Without one, and with another one, which no message repeats."""
    for given, wanted in ((None, "asks for a vf_token: the token"), (TOKEN, "asks for another vf_token")):
        with pytest.raises(pyvfio.IoctlError) as caught:
            pyvfio.open_device(VF, kernel=kernel, vf_token=given)
        text = str(caught.value)
        assert f"EACCES, IOMMU group 5: Permission denied. vfio-pci also drives {PF}, the physical" in text
        assert wanted in text
        assert f"open_device('{PF}', vf_token=)" in text
        assert "set_vf_token()" in text
        assert str(TOKEN) not in text
    with pyvfio.open_device(PF, kernel=kernel, vf_token=TOKEN), pyvfio.Container(kernel=kernel) as container:
        pyvfio.open_device(VF, container=container, vf_token=TOKEN)
    with pyvfio.Container(kernel=kernel) as container:
        physical = pyvfio.open_device(PF, container=container, vf_token=TOKEN)
        pyvfio.open_device(VF, container=container, vf_token=TOKEN)
        physical.close()
        with pytest.raises(
            pyvfio.IoctlError, match=r"EACCES.*Virtual functions of .* are open: pass the token .* vf_token"
        ):
            pyvfio.open_device(PF, container=container)
        assert pyvfio.open_device(PF, container=container, vf_token=TOKEN).bdf == PF


def test_a_token_that_nobody_wants_is_refused_with_the_reason(kernel: SpecialKernel) -> None:
    """Of a device without SR-IOV, and of a virtual function whose physical one another driver has."""
    with pytest.raises(pyvfio.IoctlError, match=r"EINVAL.*Leave vf_token out: .* is neither"):
        pyvfio.open_device(BDF, kernel=kernel, vf_token=TOKEN)
    kernel.bind(PF, "nvme")
    with pytest.raises(pyvfio.IoctlError, match=f"EINVAL.*Leave vf_token out: {PF}"):
        pyvfio.open_device(VF, kernel=kernel, vf_token=TOKEN)
    pyvfio.open_device(VF, kernel=kernel).close()
    with pyvfio.Group(2, kernel=kernel) as group, pytest.raises(pyvfio.IoctlError, match=r"EINVAL.*Container\.attach"):
        group.get_device_fd(BDF)


def test_a_driver_that_comes_anew_has_a_new_token(kernel: SpecialKernel) -> None:
    """As long as a driver stays, so does the token."""
    pyvfio.open_device(PF, kernel=kernel, vf_token=TOKEN).close()
    pyvfio.open_device(VF, kernel=kernel, vf_token=TOKEN).close()
    kernel.bind(PF, None)
    kernel.bind(PF, "vfio-pci")
    with pytest.raises(pyvfio.IoctlError, match="EACCES"):
        pyvfio.open_device(VF, kernel=kernel, vf_token=TOKEN)


def test_a_token_is_a_uuid(kernel: SpecialKernel) -> None:
    """ValueError or TypeError before any system call."""
    kernel.clear_trace()
    with pytest.raises(ValueError, match="a VF token is a UUID such as 00000000-"):
        pyvfio.open_device(VF, kernel=kernel, vf_token="bd8d9d2b")  # noqa: S106
    for wrong in (b"x" * 16, 5):
        with pytest.raises(TypeError, match=r"a VF token is a uuid\.UUID or its text"):
            pyvfio.open_device(VF, kernel=kernel, vf_token=wrong)  # type: ignore[arg-type]
    assert not kernel.trace


def test_only_a_physical_function_has_a_token_to_set(device: pyvfio.Device) -> None:
    """UnsupportedError says so."""
    with pytest.raises(pyvfio.UnsupportedError, match="Only a physical function with SR-IOV has a VF token"):
        device.set_vf_token(TOKEN)


def test_a_virtual_function_has_a_physical_one_on_the_fake() -> None:
    """ValueError otherwise."""
    for groups in ([(2, [FakeDevice(VF, pf=PF)])], [(2, [FakeDevice(VF, pf=PF)]), (3, [FakeDevice(PF)])]):
        with pytest.raises(ValueError, match=f"{VF} is a virtual function, and {PF} no physical one"):
            SpecialKernel(groups=groups)
