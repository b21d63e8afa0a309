"""Windows of BARs on devices that have power management, small and large BARs, or a slot that they can be taken from.

In a virtual machine these are there with `--devices contract` alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.device import PCI_COMMAND
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.contract.devices import Company, fake_groups, find_company
from tests.spaces import fake_of, linux_of

pytestmark = pytest.mark.one_iommu

PM, EXPRESS = 0x01, 0x10
STATUS = 8  # of an e1000e: link and speed
LOW_POWER_ENTRY, LOW_POWER_EXIT = ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """The running kernel, with the devices bound to vfio-pci."""
    if not request.config.getoption("--throwaway"):
        pytest.skip("this uses devices that --device does not name: only in a virtual machine, with --throwaway")
    with ExitStack() as stack:
        kernel = stack.enter_context(linux_of(request.config))
        if (found := find_company(kernel)) is None:
            pytest.skip("this needs the devices of scripts/vm --devices contract")
        for member in (found.e1000e, found.in_slot, *found.functions):
            stack.callback(pci.restore, pci.bind(member.bdf, kernel=kernel), kernel=kernel)
        yield kernel


@pytest.fixture
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    """The running kernel, or the fake with the same devices."""
    version: str | None = request.config.getoption("--fake")
    if version is None:
        yield request.getfixturevalue("running")
        return
    with fake_of(request.config, fake_groups()) as fake:
        yield fake
        fake.check()
        assert fake.descriptors == ()


@pytest.fixture
def company(kernel: Kernel) -> Company:
    """The devices."""
    found = find_company(kernel)
    assert found is not None
    return found


@pytest.fixture
def nic(kernel: Kernel, company: Company) -> Iterator[pyvfio.Device]:
    """An e1000e, which has power management and a reset."""
    with pyvfio.open_device(company.e1000e.bdf, kernel=kernel) as device:
        device.memory_enabled = True
        yield device


def capability(device: pyvfio.Device, number: int) -> int:
    """Where a capability is."""
    at = device.config.read8(0x34)
    while at and device.config.read8(at) != number:
        at = device.config.read8(at + 1)
    return at


def mapped(kernel: Kernel) -> list[int]:
    """The sizes of what this process has mapped of devices."""
    # A device of a group has no name in the file system, and a device that was opened by its own node has that one.
    names = (
        ("anon_inode:[vfio-device]", "/vfio/devices/") if isinstance(kernel, LinuxKernel) else ("memfd:vfio-device",)
    )
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    lines = [line for line in maps if any(name in line for name in names)]
    return [end - start for start, end in ((int(each, 16) for each in line.split()[0].split("-")) for line in lines)]


@pytest.mark.parametrize("what", ["COMMAND", "PMCSR"])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_after_decoding_or_power_has_ended_registers_raise_until_it_is_back(
    nic: pyvfio.Device, what: str, width: int
) -> None:
    """A touch of the window would be SIGBUS. D3hot, too."""
    region, config = nic.region(0), nic.config
    register = region.register32(STATUS)
    before = register.read()
    at = PCI_COMMAND if what == "COMMAND" else capability(nic, PM) + 4
    for _ in range(2):
        getattr(config, f"write{width}")(at, 0 if what == "COMMAND" else 3)
        for access in (register.read, partial(register.write, 0), partial(region.read32, STATUS), region.mmap):
            with pytest.raises(pyvfio.VfioError, match="does not decode" if what == "COMMAND" else "power state D3"):
                access()
        with pytest.raises(pyvfio.IoctlError, match="EIO"):
            region.read(STATUS, 4)
        config.write16(at, 2 if what == "COMMAND" else 0)
        assert register.read() == region.read32(STATUS) == before


def test_a_view_keeps_decoding_on_unless_forced_and_outlives_resets(nic: pyvfio.Device) -> None:
    """The kernel maps the pages anew at the next touch."""
    region, config = nic.region(0), nic.config
    before = region.read32(STATUS)
    with region.mmap() as mapping, mapping.view() as view, view.cast("I") as words:
        for end in (partial(config.write16, PCI_COMMAND, 0), partial(config.write8, capability(nic, PM) + 4, 3)):
            with pytest.raises(BufferError):
                end()
        nic.reset()
        assert words[STATUS // 4] == region.read32(STATUS) == before
        config.write16(PCI_COMMAND, 0, force=True)
        nic.memory_enabled = True
        config.write8(capability(nic, PM) + 4, 3, force=True)
        config.write8(capability(nic, PM) + 4, 0)
        assert words[STATUS // 4] == region.read32(STATUS) == before


def test_in_a_low_power_state_registers_wake_the_device(nic: pyvfio.Device) -> None:
    """`Windows.change` keeps it from being mapped, where a touch is SIGBUS."""

    def feature(number: int) -> None:
        nic.ioctl("VFIO_DEVICE_FEATURE", ioctls.vfio_device_feature(8, number | ioctls.VFIO_DEVICE_FEATURE_SET))

    region = nic.region(0)
    register = region.register32(STATUS)
    before = register.read()
    nic.windows.change(partial(feature, LOW_POWER_ENTRY), low_power=True)
    assert register.read() == region.read32(STATUS) == before
    with pytest.raises(pyvfio.VfioError, match="low-power"):
        region.mmap()
    nic.windows.change(partial(feature, LOW_POWER_EXIT), keep="all maps", low_power=False)
    assert register.read() == before


def test_threads_that_access_registers_meanwhile_see_values_or_errors(nic: pyvfio.Device) -> None:
    """No signal ends the process, and no memory that is gone is reached."""
    region, config = nic.region(0), nic.config
    register = region.register32(STATUS)
    power = capability(nic, PM) + 4
    right, wrong = {register.read()}, list[object]()
    done = threading.Event()

    def run(access: Callable[[], int]) -> None:
        while not done.is_set():
            try:
                value = access()
            except pyvfio.VfioError:
                continue
            except BaseException as error:
                wrong.append(error)
                return
            if value not in right:
                wrong.append(value)

    threads = [threading.Thread(target=run, args=(each,)) for each in (register.read, partial(region.read32, STATUS))]
    for thread in threads:
        thread.start()
    for _ in range(10):
        nic.memory_enabled = False
        nic.memory_enabled = True
        config.write8(power, 3)
        config.write8(power, 0)
        nic.drop_windows()
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


def test_a_small_bar_is_mapped_and_of_a_large_one_two_mebibytes(kernel: Kernel, company: Company) -> None:
    """256 bytes and 128 MiB."""
    with pyvfio.open_device(company.in_slot.bdf, kernel=kernel) as device:
        device.memory_enabled = True
        region = device.region(1)
        assert (region.size, region.mappable) == (256, ((0, 256),))
        assert region.register32(0).read() == region.read32(0) == int.from_bytes(region.read(0, 4), "little")
        with region.mmap() as mapping, mapping.view() as view:
            assert len(view) == 256
        assert mapped(kernel) == [PAGE_SIZE]
        with pytest.raises(OSError, match="Invalid"):
            kernel.registers(device.fd, region.info.offset, 2 * PAGE_SIZE)
    with pyvfio.open_device(company.functions[1].bdf, kernel=kernel) as device:
        device.memory_enabled = True
        region = device.region(2)
        assert region.size == 128 * MIB
        for offset in (0, 127 * MIB, 127 * MIB + 8):
            region.read32(offset)
            region.register32(offset).read()
        assert mapped(kernel) == [2 * MIB] * 2 or mapped(kernel) == [4 * MIB]  # the two may be neighbours
    assert mapped(kernel) == []


# --------------------------------------------------------------------------------------------------------- removal


def _ask_for(kernel: Kernel, bdf: str) -> Callable[[], None]:
    """What begins a removal in the kernel, which waits until the device is closed."""
    if isinstance(kernel, FakeKernel):
        return partial(kernel.ask_for, bdf)
    return lambda: pci.write_sysfs(kernel.sysfs / "bus/pci/devices" / bdf / "remove", "1")


def test_a_device_that_the_kernel_wants_back_is_asked_for_and_closes(kernel: Kernel, company: Company) -> None:
    """The request interrupt; registers work until the device is closed, and then the removal goes on."""
    bdf = company.in_slot.bdf
    device = pyvfio.open_device(bdf, kernel=kernel)
    device.memory_enabled = True
    register = device.region(1).register32(0)
    before = register.read()
    request = device.irq(ioctls.VFIO_PCI_REQ_IRQ_INDEX)
    request.enable()
    remover = threading.Thread(target=_ask_for(kernel, bdf))
    remover.start()
    assert request.wait(timeout=30) >= 1
    assert register.read() == before
    device.close()
    remover.join(30)
    assert not remover.is_alive()
    if isinstance(kernel, LinuxKernel):
        assert not (kernel.sysfs / "bus/pci/devices" / bdf).exists()
        pci.write_sysfs(kernel.sysfs / "bus/pci/rescan", "1")
        pci.bind(bdf, kernel=kernel)


def _pull_out(kernel: Kernel, slot: str, bdf: str) -> None:
    """Turn off the power of a slot, as when its device is pulled out; for good."""
    if isinstance(kernel, FakeKernel):
        kernel.pull_out(bdf)
        return
    with (kernel.sysfs / "bus/pci/devices" / slot / "config").open("r+b", buffering=0) as config:

        def read(at: int) -> int:
            config.seek(at)
            return int.from_bytes(config.read(2), "little")

        at = read(0x34) & 0xFF
        while read(at) & 0xFF != EXPRESS:
            at = read(at) >> 8
        control = at + 0x18  # Slot Control
        off = read(control) | 0x400 | 0x300  # power and its light
        config.seek(control)
        config.write(off.to_bytes(2, "little"))


def test_a_device_that_is_pulled_out_raises_errors_and_closes(kernel: Kernel, company: Company) -> None:
    """In the middle of accesses, and with memory mapped: nothing hangs. The last test of that device."""
    bdf = company.in_slot.bdf
    device = pyvfio.open_device(bdf, kernel=kernel)
    device.memory_enabled = True
    identity = device.config.read32(0)
    region = device.region(1)
    register = region.register32(0)
    irq = device.irq(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
    irq.enable()
    blocks = pyvfio.RamBlockList(kernel=kernel)
    mapper = pyvfio.DmaMapper(device.space, blocks)
    block = blocks.add("data", used_length=PAGE_SIZE, max_length=MIB)
    ended: list[Exception] = []
    done = threading.Event()

    def run(call: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                call()
        except pyvfio.VfioError as error:
            ended.append(error)

    calls: tuple[Callable[[], object], ...] = (register.read, device.check_present, irq.wait)
    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    _pull_out(kernel, company.slot.bdf, bdf)
    threads[1].join(30)
    assert [type(error) for error in ended] == [pyvfio.DeviceGoneError]
    assert device.config.read32(0) == identity  # the kernel's answer, not the device's
    assert device.config.read32(8) == 0xFFFF_FFFF
    block.resize(MIB)
    block.resize(PAGE_SIZE)
    for access in (device.check_present, region.mmap, partial(setattr, device, "bus_master", True)):  # noqa: FBT003
        with pytest.raises(pyvfio.DeviceGoneError):
            access()
    device.drop_windows()
    threads[0].join(30)  # the device answers no more, so no window is mapped
    mapper.close()
    blocks.close()
    device.close()
    done.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(ended) == 3
    assert mapped(kernel) == []
