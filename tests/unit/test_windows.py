"""Windows of BARs: dropped before the device stops to decode memory, mapped where an access needs them, and raced."""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.device import PCI_COMMAND, PCI_COMMAND_MASTER, PCI_COMMAND_MEMORY, Region
from pyvfio.device.register import Register
from pyvfio.kernel import Cell, IoctlArgument, LinuxKernel
from pyvfio.testing.fake import Bar, FakeDevice, FakeKernel, FakePciDevice
from pyvfio.testing.fake.declaration import GroupDeclaration
from pyvfio.testing.fake.process import DEVICE_MEMORY
from pyvfio.units import KIB, MIB, PAGE_SIZE
from tests.unit.processes import in_child

BDF = "0000:00:02.0"
SIBLING = "0000:00:02.1"
PM = 0xC8
PMCSR = PM + 4
LIST = {6: b"\x10\x00", 0x34: bytes([PM]), PM: b"\x01\xd0\x22\x00\x00\x00"}
EXPRESS = {0xD0: b"\x10\xe0\x02\x00\x00\x00\x00\x10\x00\x00"}
AF = {0xE0: b"\x13\x00\x06\x03\x00\x00"}
BIG = 128 * MIB


class Nic(FakePciDevice):
    """A register that counts its reads; memory decoding and power have to be on for each access."""

    bar_sizes: ClassVar = {0: 128 * KIB}
    config: ClassVar = LIST | EXPRESS | AF

    def reset(self) -> None:
        """Nothing was read."""
        self.reads = 0

    def read_register(self, bar: int, offset: int, width: int, /) -> int:
        """How many reads there were; all ones at 8, whatever the width."""
        del bar, width
        self.reads += 1
        return -1 if offset == 8 else self.reads

    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """Nothing."""


def groups() -> list[tuple[int, list[FakeDevice | FakePciDevice]]]:
    """The NIC, and a device with plain memory: 128 KiB, a page-sized hole, less than a page, and more than 64 MiB."""
    bars = {
        0: Bar(128 * KIB),
        1: Bar(256, own_page=True),
        2: Bar(BIG),
        3: Bar(16 * KIB, sparse=((0, PAGE_SIZE), (8 * KIB, 8 * KIB))),
        4: Bar(256),
        5: Bar(16 * KIB, sparse=((PAGE_SIZE, 12 * KIB),)),
    }
    plain = FakeDevice(SIBLING, bars=bars, config=LIST, resettable=True)
    return [(2, [Nic(BDF), plain])]


class WatchedKernel(FakeKernel):
    """A fake kernel that counts what is mapped of its devices at each change, and from which a device is pulled out
    before a pread of one's choice."""

    def __init__(self, *, groups: Sequence[GroupDeclaration]) -> None:
        super().__init__(groups=groups)
        self._others = mapped_areas()
        self.mapped: list[int] = []
        self.preads_left = -1

    @property
    def areas(self) -> int:
        """How many mappings of devices the process has beside those that there were before this kernel."""
        return mapped_areas() - self._others

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Pull the device out first, when it is time for that."""
        self.preads_left -= 1
        if self.preads_left == 0:
            self.pull_out(SIBLING)
        return super().pread(fd, size, offset)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """Count first."""
        self.mapped.append(self.areas)
        return super().pwrite(fd, data, offset)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """Count first, at a reset."""
        if request == ioctls.VFIO_DEVICE_RESET:
            self.mapped.append(self.areas)
        return super().ioctl(fd, request, argument)


def mapped_areas() -> int:
    """How many mappings of a device this process has."""
    return Path("/proc/self/maps").read_bytes().count(DEVICE_MEMORY.encode())


@pytest.fixture
def kernel() -> Iterator[WatchedKernel]:
    """A fake kernel with both."""
    gc.collect()  # devices of other tests, which nobody has, may still be mapped
    with WatchedKernel(groups=groups()) as kernel:
        yield kernel
        assert kernel.descriptors == ()


@pytest.fixture
def nic(kernel: FakeKernel) -> Iterator[pyvfio.Device]:
    """The device that is strict: a touch that would be SIGBUS is an AssertionError."""
    with pyvfio.open_device(BDF, kernel=kernel) as device:
        yield device


@pytest.fixture
def plain(kernel: FakeKernel) -> Iterator[pyvfio.Device]:
    """The device with memory in its BARs."""
    with pyvfio.open_device(SIBLING, kernel=kernel) as device:
        yield device


def made(kernel: FakeKernel) -> list[tuple[int, int]]:
    """Offset and size of each window that was mapped."""
    return [(int(call.given[1]), int(call.given[2])) for call in kernel.trace if call.call == "registers"]


# ------------------------------------------------------------------------------------------- writes that end decoding

STOPS: dict[str, tuple[int, bytes]] = {
    "COMMAND, 8 bits": (PCI_COMMAND, b"\0"),
    "COMMAND, 16 bits": (PCI_COMMAND, b"\4\0"),
    "COMMAND, 32 bits": (PCI_COMMAND, b"\5\0\0\0"),
    "COMMAND, from before": (0, bytes(8)),
    "COMMAND, the last of many": (PCI_COMMAND - 1, bytes(2)),
    "PMCSR, 8 bits": (PMCSR, b"\3"),
    "PMCSR, 16 bits": (PMCSR, b"\3\0"),
    "PMCSR, 32 bits": (PMCSR, b"\3\0\0\0"),
    "PMCSR, from before": (PM, b"\0\0\0\0\3\0"),
    "COMMAND, and D0": (PCI_COMMAND, bytes(PMCSR + 2 - PCI_COMMAND)),
    "PMCSR, and decoding": (PCI_COMMAND, b"\2".ljust(PMCSR - PCI_COMMAND, b"\0") + b"\3\0"),
    "PMCSR, and a reset": (PMCSR, b"\3".ljust(0xE5 - PMCSR, b"\1")),
}
RESUMES = ((PCI_COMMAND, b"\2\0"), (PMCSR, b"\0\0"))


@pytest.mark.parametrize("what", STOPS)
def test_after_a_write_that_ends_decoding_registers_raise_and_later_work_again(
    kernel: FakeKernel, nic: pyvfio.Device, what: str
) -> None:
    """With any width and offset; the fake raises AssertionError for a touch."""
    region = nic.region(0)
    register = region.register32(0)
    assert (register.read(), region.read32(0)) == (1, 2)
    nic.config.write(*STOPS[what])
    why = (
        r"does not decode memory.*device\.memory_enabled = True"
        if "COMMAND" in what
        else r"is in power state D3.*Write 0 \(D0\)"
    )
    for access in (register.read, partial(register.write, 1), partial(region.read32, 0), partial(region.write8, 0, 1)):
        with pytest.raises(pyvfio.VfioError, match=why):
            access()
    for write in RESUMES:
        nic.config.write(*write)
    assert (register.read(), region.read32(0)) == (3, 4)


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("change", [(PCI_COMMAND, 0, 2), (PMCSR, 3, 0)], ids=["COMMAND", "PMCSR"])
def test_a_register_of_configuration_space_drops_windows_as_its_width_does(
    kernel: WatchedKernel, plain: pyvfio.Device, width: int, change: tuple[int, int, int]
) -> None:
    """Before the write; and a view of a mapping refuses it."""
    offset, off, on = change
    registers: dict[int, Callable[[int], Register]] = {
        8: plain.config.register8,
        16: plain.config.register16,
        32: plain.config.register32,
        64: plain.config.register64,
    }
    register = registers[width](offset // (width // 8) * (width // 8))
    at = offset % (width // 8) * 8
    plain.region(0).read32(0)
    with plain.region(0).mmap() as mapped:
        view, kernel.mapped = mapped.view(), []
        with pytest.raises(BufferError, match="view"):
            register.write(off << at)
        assert kernel.mapped == []
        view.release()
    register.write(off << at)
    assert kernel.mapped == [0]
    with pytest.raises(pyvfio.VfioError):
        plain.region(0).read32(0)
    register.write(on << at)
    plain.memory_enabled = True
    plain.region(0).read32(0)


@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("offset", [PCI_COMMAND, PMCSR])
def test_each_width_of_a_write_is_looked_at(nic: pyvfio.Device, width: int, offset: int) -> None:
    """`write8` and its kin, and what they take."""
    for _ in range(2):  # before and after the capabilities are known
        nic.region(0).read32(0)
        getattr(nic.config, f"write{width}")(offset, 0 if offset == PCI_COMMAND else 3)
        with pytest.raises(pyvfio.VfioError, match="cannot be reached"):
            nic.region(0).read32(0)
        nic.memory_enabled = True
        nic.config.write16(PMCSR, 0)
    for wrong in (1 << width, -1):
        with pytest.raises(ValueError, match="does not fit"):
            getattr(nic.config, f"write{width}")(offset, wrong)


HARMLESS: dict[str, tuple[int, bytes]] = {
    "bus master": (PCI_COMMAND, b"\6\0"),
    "up to COMMAND": (0, bytes(4)),
    "up to PMCSR": (PM, b"\x01\xd0\x22\x00"),
    "COMMAND, the upper byte": (PCI_COMMAND + 1, b"\0"),
    "PMCSR, D0": (PMCSR, b"\0\0"),
    "PMCSR, the upper byte": (PMCSR + 1, b"\3"),
    "cache line": (0x0C, b"\0"),
    "PCI Express, no reset": (0xD0 + 8, b"\0\0"),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_other_writes_drop_no_window(kernel: FakeKernel, nic: pyvfio.Device, what: str) -> None:
    """Nor a mapping with a view."""
    region = nic.region(0)
    region.read32(0)
    with region.mmap() as mapped, mapped.view():
        kernel.clear_trace()
        nic.config.write(*HARMLESS[what])
        region.read32(0)
        assert not made(kernel)
        assert mapped.vaddr


def test_to_set_bus_master_is_one_read_and_one_write(kernel: FakeKernel, nic: pyvfio.Device) -> None:
    """As before there were windows to drop."""
    nic.region(0).read32(0)
    kernel.clear_trace()
    nic.bus_master = True
    assert [call.call for call in kernel.trace] == ["pread", "pwrite"]


@pytest.mark.parametrize("write", [(0xD0 + 8, b"\0\x80"), (0xE0 + 4, b"\1")], ids=["PCI Express", "AF"])
def test_a_function_level_reset_through_configuration_space_drops_windows_and_keeps_mappings(
    kernel: FakeKernel, nic: pyvfio.Device, write: tuple[int, bytes]
) -> None:
    """As `reset` does."""
    region = nic.region(0)
    region.read32(0)
    with region.mmap() as mapped, mapped.view() as view:
        kernel.clear_trace()
        nic.config.write(*write)
        region.read32(0)
        assert made(kernel) == [(0, 128 * KIB)]
        assert len(view) == mapped.size


def test_a_reset_drops_windows_and_keeps_mappings(kernel: WatchedKernel, plain: pyvfio.Device) -> None:
    """The kernel lets a touch wait for the end of the reset."""
    region = plain.region(0)
    register = region.register32(0)
    register.write(7)
    with region.mmap() as mapped, mapped.view() as view:
        kernel.clear_trace()
        kernel.mapped.clear()
        plain.reset()
        assert kernel.mapped == [1]
        assert (register.read(), view[0]) == (0, 0)
        assert made(kernel) == [(0, 128 * KIB)]


def test_windows_are_dropped_before_the_write(kernel: WatchedKernel, plain: pyvfio.Device) -> None:
    """All of them, in all BARs."""
    for index in (0, 1):
        plain.region(index).read32(0)
    mapped = plain.region(0).mmap()
    assert kernel.areas == 3
    kernel.mapped.clear()
    plain.memory_enabled = False
    assert kernel.mapped == [0]
    with pytest.raises(pyvfio.ClosedError):
        mapped.view()


def test_pointers_have_reserved_bits_and_of_two_capabilities_the_first_counts() -> None:
    """The list may begin at the first place. The upper bits of the byte of the power state say nothing of the state."""
    config = {
        6: b"\x10\0",
        0x34: b"\x43",
        0x40: b"\x09\x4b",
        0x48: b"\x01\xfe\x22\0\x08\0",
        0xFC: b"\x01\0\x22\0",
    }
    with (
        WatchedKernel(groups=[(2, [FakeDevice(BDF, bars={0: Bar(PAGE_SIZE)}, config=config)])]) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        region = device.region(0)
        region.read32(0)
        kernel.mapped.clear()
        device.config.write8(0x50, 3)
        device.config.write8(0x4C, 0x08)
        assert kernel.mapped == [1, 1]
        device.config.write8(0x4C, 0x0B)
        assert kernel.mapped == [1, 1, 0]


def test_a_device_without_capabilities_has_no_power_to_lower() -> None:
    """A walk that finds nothing; and lists that lead in a circle or nowhere end, too."""
    circle = {6: b"\x10\0", 0x34: b"\x40", 0x40: b"\x09\x48", 0x48: b"\x09\x50", 0x50: b"\x09\x48"}
    for config in ({}, {6: b"\x10\0"}, circle):
        kernel = FakeKernel(groups=[(2, [FakeDevice(BDF, config=config)])])
        with kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
            device.region(0).read32(0)
            device.config.write(0x44, b"\3\3\3\3")
            kernel.clear_trace()
            device.region(0).read32(0)
            assert not kernel.trace


# ---------------------------------------------------------------------------------------------------- views that live


def changes(device: pyvfio.Device) -> dict[str, Callable[[], object]]:
    """What ends decoding, unless a view lives."""
    return {
        "memory_enabled": lambda: setattr(device, "memory_enabled", False),
        "write16": lambda: device.config.write16(PCI_COMMAND, 0),
        "write": lambda: device.config.write(PMCSR, b"\3"),
        "change16": lambda: device.config.change16(PCI_COMMAND, PCI_COMMAND_MEMORY, on=False),
        "drop_windows": device.drop_windows,
    }


@pytest.mark.parametrize("what", ["memory_enabled", "write16", "write", "change16", "drop_windows"])
def test_while_a_view_lives_decoding_cannot_be_ended_and_nothing_changes(
    kernel: FakeKernel, plain: pyvfio.Device, what: str
) -> None:
    """BufferError, and every window is as it was."""
    region = plain.region(0)
    register = region.register32(4)
    register.write(5)
    other = plain.region(1).mmap()
    ended: list[object] = []
    with region.mmap() as mapped, mapped.view() as view:
        region.dependents.append(partial(ended.append, None))
        kernel.clear_trace()
        with pytest.raises(BufferError, match="still alive"):
            changes(plain)[what]()
        region.dependents.clear()
        assert not ended
        assert not [call for call in kernel.trace if call.call in ("pwrite", "munmap")]
        assert (register.read(), view[4], plain.memory_enabled) == (5, 5, True)
    assert other.vaddr
    changes(plain)[what]()
    with pytest.raises(pyvfio.ClosedError):
        _ = other.vaddr


FORCED: dict[str, Callable[[pyvfio.ConfigSpace], object]] = {
    "write8": lambda config: config.write8(PCI_COMMAND, 0, force=True),
    "write16": lambda config: config.write16(PCI_COMMAND, 0, force=True),
    "write32": lambda config: config.write32(PCI_COMMAND, 0, force=True),
    "write64": lambda config: config.write64(0, 0, force=True),
    "write": lambda config: config.write(PCI_COMMAND, bytes(2), force=True),
    "change16": lambda config: config.change16(PCI_COMMAND, PCI_COMMAND_MEMORY, on=False, force=True),
}


@pytest.mark.parametrize("what", FORCED)
def test_by_force_the_mapping_with_a_view_stays_and_is_good_again_later(plain: pyvfio.Device, what: str) -> None:
    """Windows and other mappings are dropped; what has ended may be written again without force."""
    region = plain.region(0)
    other = region.mmap(0, PAGE_SIZE)
    region.write32(0, 0x55)
    with region.mmap() as mapped, mapped.view() as view:
        FORCED[what](plain.config)
        with pytest.raises(pyvfio.VfioError, match="does not decode"):
            region.read32(0)
        with pytest.raises(pyvfio.ClosedError):
            _ = other.vaddr
        plain.bus_master = False
        plain.memory_enabled = False
        plain.memory_enabled = True
        assert (view[0], region.read32(0)) == (0x55, 0x55)


def test_drop_windows_by_force_keeps_the_mapping_with_a_view(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """And nothing else."""
    region = plain.region(0)
    region.read32(0)
    other = region.mmap(0, PAGE_SIZE)
    with region.mmap() as mapped, mapped.view():
        plain.drop_windows(force=True)
        assert mapped.vaddr
    with pytest.raises(pyvfio.ClosedError):
        _ = other.vaddr
    kernel.clear_trace()
    region.read32(0)
    assert made(kernel) == [(0, 128 * KIB)]


@pytest.mark.parametrize("what", FORCED)
def test_by_force_only_the_mappings_of_other_devices_end(plain: pyvfio.Device, what: str) -> None:
    """With a view; without force nothing of another device ends either."""
    region = plain.region(0)
    ended: list[int] = []

    def end() -> None:
        ended.append(1)
        region.dependents.clear()

    region.dependents.append(end)
    with region.mmap() as mapped, mapped.view():
        with pytest.raises(BufferError):
            plain.memory_enabled = False
        assert not ended
        FORCED[what](plain.config)
        assert (ended, bool(mapped.vaddr), plain.memory_enabled) == ([1], True, False)
        region.dependents.append(end)
        plain.config.write16(PCI_COMMAND, 0)  # which ends nothing more
        assert ended == [1, 1]
        plain.memory_enabled = True


@pytest.mark.parametrize("how", ["write16", "change16", "reset"])
def test_a_reset_under_a_view_ends_the_mappings_of_other_devices_alone(nic: pyvfio.Device, how: str) -> None:
    """Without the lock of the registers. A mapping waits for the end of the reset."""
    region, config = nic.region(0), nic.config
    config.read8(0)
    seen: list[bool] = []

    def look() -> None:
        seen.append(region.guard.lock.acquire(timeout=10))
        region.guard.lock.release()

    def end() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(20)
        region.dependents.clear()

    region.dependents.append(end)
    with region.mmap() as mapped, mapped.view():
        {
            "write16": lambda: config.write16(0xD8, 0x8000),
            "change16": lambda: config.change16(0xD8, 0x8000, on=True),
            "reset": lambda: nic.windows.change(lambda: None, keep="all maps"),
        }[how]()
        assert (seen, bool(mapped.vaddr)) == ([True], True)


# ------------------------------------------------------------------------------------------------------- low power


def test_in_a_low_power_state_registers_are_reached_by_system_calls(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """The kernel wakes the device for each; a window would be SIGBUS."""
    region = plain.region(0)
    register = region.register32(0)
    register.write(1)
    plain.windows.change(lambda: None, low_power=True)
    kernel.clear_trace()
    assert (register.read(), region.read32(0)) == (1, 1)
    register.write(2)
    assert [call.call for call in kernel.trace] == ["pread", "pread", "pwrite"]
    with pytest.raises(pyvfio.VfioError, match="low-power state"):
        region.mmap()
    plain.windows.change(lambda: None, keep="all maps", low_power=False)
    kernel.clear_trace()
    assert register.read() == 2
    assert made(kernel) == [(0, 128 * KIB)]


def test_low_power_begins_before_the_entry_and_ends_with_the_exit_alone(
    kernel: FakeKernel, plain: pyvfio.Device
) -> None:
    """Another thread may ask meanwhile. A reset, and the end of memory decoding, leave the device in low power."""
    windows, region, seen = plain.windows, plain.region(0), list[bool]()
    windows.change(lambda: seen.append(windows.low_power), low_power=True)
    plain.reset()
    plain.memory_enabled = False
    plain.memory_enabled = True
    kernel.clear_trace()
    region.read32(0)
    assert not made(kernel)
    windows.change(lambda: seen.append(windows.low_power), keep="all maps", low_power=False)
    assert (seen, windows.low_power) == ([True, True], False)
    assert windows.change(lambda: "the result") == "the result"


def test_a_view_that_another_thread_makes_while_dependents_end_is_seen_before_anything_is_dropped(
    kernel: FakeKernel, plain: pyvfio.Device
) -> None:
    """The close of a mapping of another device takes a while, and holds no lock."""
    region = plain.region(0)
    other = plain.region(1).mmap()
    views: list[memoryview] = []

    def another_thread() -> None:
        region.dependents.clear()
        views.append(region.mmap().view())

    for change in (plain.drop_windows, partial(plain.windows.change, views.clear)):
        region.dependents.append(another_thread)
        region.read32(0)
        kernel.clear_trace()
        with pytest.raises(BufferError, match="still alive"):
            change()
        region.read32(0)
        assert not made(kernel)
        assert other.vaddr
        views.pop().release()
    plain.drop_windows()


def test_a_low_power_state_that_was_refused_is_none(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """The windows come back."""

    def refuse() -> None:
        raise OSError(22, "Invalid argument")

    for low_power in (True, False):
        with pytest.raises(OSError, match="Invalid"):
            plain.windows.change(refuse, low_power=low_power)
        assert not plain.windows.low_power
    plain.region(0).read32(0)
    assert made(kernel) == [(0, 128 * KIB)]


# ------------------------------------------------------------------------------------------------ dependents of a BAR


def test_what_depends_on_a_bar_ends_before_its_windows_and_without_its_lock(
    kernel: FakeKernel, plain: pyvfio.Device
) -> None:
    """Each change closes it; another thread may take the lock meanwhile. What was added since is closed, too."""
    region = plain.region(0)
    order: list[str] = []

    def end(name: str) -> None:
        thread = threading.Thread(target=lambda: order.append(f"{name} {region.read32(0)}"))
        thread.start()
        thread.join(10)
        region.dependents.remove(closes[name])
        if name == "first":
            region.dependents.append(closes["late"])

    closes = {name: partial(end, name) for name in ("first", "second", "late")}
    for change in (plain.reset, changes(plain)["memory_enabled"], changes(plain)["change16"], plain.drop_windows):
        plain.memory_enabled = True
        order.clear()
        region.dependents[:] = [closes["first"], closes["second"]]
        change()
        assert order == ["second 0", "first 0", "late 0"]


def test_a_device_that_is_being_closed_gets_no_window_and_no_dependent_any_more(plain: pyvfio.Device) -> None:
    """Unless another device reaches a region: then the close has to wait."""
    region = plain.region(0)
    region.dependents.append(region.dependents.clear)
    assert not plain.windows.end()
    region.read32(0)
    region.close_dependents()
    assert plain.windows.end()
    region.read32(0)
    plain.drop_windows()
    for use in (partial(region.read32, 0), partial(region.add_dependent, region.dependents.clear), region.mmap):
        with pytest.raises(pyvfio.ClosedError, match="is being closed"):
            use()


# --------------------------------------------------------------------------------------------------------- parts


def test_a_bar_below_a_page_is_mapped_where_the_kernel_maps_it(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """One page is mapped, and no byte behind the BAR is reached."""
    region = plain.region(1)
    assert region.mappable == ((0, 256),)
    region.write32(0xFC, 0x12345678)
    assert made(kernel) == [(1 << 40, PAGE_SIZE)]
    with region.mmap() as mapped, mapped.view() as view:
        assert (mapped.size, len(view), bytes(view[0xFC:])) == (256, 256, b"\x78\x56\x34\x12")
    with region.mmap(0, 256):
        pass
    for wrong in ((0, 128), (128, 128)):
        with pytest.raises(ValueError, match="multiples of 4096"):
            region.mmap(*wrong)
    with pytest.raises(ValueError, match="0x100 bytes"):
        region.read32(0x100)
    kernel.clear_trace()
    assert plain.region(4).read32(0) == 0
    with pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped"):
        plain.region(4).mmap()
    assert not made(kernel)


def test_of_a_bar_above_64_mib_the_2_mib_around_an_access_are_mapped(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """Each once; `mmap` is not affected."""
    region, start = plain.region(2), 2 << 40
    for offset in (5 * MIB, 5 * MIB + 4, 6 * MIB - 4, 6 * MIB, 0, BIG - 4, 2 * MIB - 4, 5 * MIB):
        region.write32(offset, offset)
    windows = [(start + at, 2 * MIB) for at in (4 * MIB, 6 * MIB, 0, BIG - 2 * MIB)]
    assert made(kernel) == windows
    for offset in (5 * MIB, 6 * MIB - 4, 6 * MIB, BIG - 4):
        assert region.read32(offset) == region.register32(offset).read() == offset
    assert made(kernel) == windows
    with region.mmap() as mapped:
        assert mapped.size == BIG
    plain.drop_windows()
    kernel.clear_trace()
    region.read32(6 * MIB)
    assert made(kernel) == [(start + 6 * MIB, 2 * MIB)]


def test_a_bar_of_64_mib_is_one_window_and_parts_of_a_larger_one_end_windows() -> None:
    """A window has no byte outside of its part, and none of another 2 MiB."""
    bars = {0: Bar(64 * MIB), 1: Bar(BIG, sparse=((MIB, 4 * MIB), (6 * MIB, MIB)))}
    with (
        WatchedKernel(groups=[(2, [FakeDevice(BDF, bars=bars)])]) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        device.region(0).write32(64 * MIB - 4, 7)
        assert (device.region(0).read32(0), device.region(0).read32(64 * MIB - 4)) == (0, 7)
        assert made(kernel) == [(0, 64 * MIB)]
        kernel.clear_trace()
        region, start = device.region(1), 1 << 40
        for offset in (
            MIB,
            2 * MIB - 4,
            2 * MIB,
            4 * MIB,
            5 * MIB - 4,
            6 * MIB,
            7 * MIB - 4,
            5 * MIB,
            MIB - 4,
            7 * MIB,
        ):
            region.write32(offset, offset + 1)
            assert region.read32(offset) == offset + 1
        windows = ((MIB, MIB), (2 * MIB, 2 * MIB), (4 * MIB, MIB), (6 * MIB, MIB))
        assert made(kernel) == [(start + at, size) for at, size in windows]


@pytest.mark.parametrize(("bar", "offset"), [(0, 0), (1, 0), (2, 0), (3, 0), (5, PAGE_SIZE)])
def test_no_bar_is_mapped_while_the_device_does_not_decode_memory(
    kernel: WatchedKernel, plain: pyvfio.Device, bar: int, offset: int
) -> None:
    """A touch would be SIGBUS. All ones of a device that has gone are found out in each BAR."""
    region = plain.region(bar)
    uses: tuple[Callable[[], object], ...] = (
        partial(region.read32, offset),
        partial(region.register32(offset).write, 1),
        partial(region.mmap, offset, min(region.size, PAGE_SIZE)),
    )
    plain.memory_enabled = False
    for use in uses:
        with pytest.raises(pyvfio.VfioError, match="does not decode"):
            use()
    with pytest.raises(pyvfio.VfioError, match="does not decode"):
        region.add_dependent(lambda: None)
    assert (made(kernel), kernel.areas, region.has_dependents) == ([], 0, False)
    plain.memory_enabled = True
    region.write32(offset, 0xFFFF_FFFF)
    assert region.read32(offset) == 0xFFFF_FFFF
    kernel.pull_out(SIBLING)
    with pytest.raises(pyvfio.DeviceGoneError):
        region.read32(offset)


def test_of_a_bar_that_names_its_parts_each_part_is_a_window(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """VFIO_REGION_INFO_CAP_SPARSE_MMAP; between them pread."""
    region, start = plain.region(3), 3 << 40
    assert region.info.sparse == region.mappable == ((0, PAGE_SIZE), (8 * KIB, 8 * KIB))
    for offset in (0, PAGE_SIZE, 8 * KIB, 16 * KIB - 4):
        region.write32(offset, offset + 1)
        assert region.read32(offset) == region.register32(offset).read() == offset + 1
    assert made(kernel) == [(start, PAGE_SIZE), (start + 8 * KIB, 8 * KIB)]
    with pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped"):
        region.mmap()
    with pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped at 0x1000-0x1fff"):
        region.mmap(PAGE_SIZE, PAGE_SIZE)
    region.mmap(8 * KIB, PAGE_SIZE).close()


# --------------------------------------------------------------------------------------------------------- registers


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("bar", [0, 4], ids=["mapped", "by pread"])
def test_a_register_is_read_and_written_at_its_width(
    kernel: FakeKernel, plain: pyvfio.Device, bar: int, width: int
) -> None:
    """Little-endian; the first access maps a window, and later ones make no system call."""
    region = plain.region(bar)
    register = getattr(region, f"register{8 * width}")(0x10)
    value = int.from_bytes(bytes(range(1, width + 1)), "little")
    register.write(value)
    assert region.read(0x10, 16) == bytes(range(1, width + 1)).ljust(16, b"\0")
    assert register.read() == value
    kernel.clear_trace()
    register.write(value - 1)
    assert register.read() == value - 1
    assert len(kernel.trace) == (0 if bar == 0 else 2)
    assert repr(register) == f"<Register {width} bytes at 0x10 of BAR{bar} (region {bar}) of {SIBLING}>"


@pytest.mark.parametrize("bar", [0, 4], ids=["mapped", "by pread"])
def test_bits_of_a_register_are_set_and_cleared_and_no_other(plain: pyvfio.Device, bar: int) -> None:
    """Of two bytes; those beside them stay."""
    region = plain.region(bar)
    region.write64(8, 0x1111_2222_0F0F_4444)
    region.change16(10, 0x00FF, on=True)
    assert region.read64(8) == 0x1111_2222_0FFF_4444
    region.change16(10, 0x0F01, on=False)
    assert region.read64(8) == 0x1111_2222_00FE_4444


def test_a_register_takes_numbers_that_fit(plain: pyvfio.Device) -> None:
    """Others are refused before any access, whether or not its window is there."""
    register = plain.region(0).register16(0)
    for _ in range(2):
        for wrong in (-1, 1 << 16):
            with pytest.raises(ValueError, match="does not fit 2 bytes"):
                register.write(wrong)
        for other in ("1", None, 1.0, b"1"):
            with pytest.raises(TypeError):
                register.write(other)  # type: ignore[arg-type]
        register.write(ctypes.c_uint16(7).value)
        assert register.read() == 7
    for offset in (1, 128 * KIB, -2):
        with pytest.raises(ValueError, match=r"misaligned|bytes"):
            plain.region(0).register16(offset)
    with pytest.raises(TypeError):
        plain.region(0).register16("0")  # type: ignore[arg-type]


def test_a_register_whose_window_is_dropped_at_once_is_reached_all_the_same(plain: pyvfio.Device) -> None:
    """Another thread drops the window when it has just been mapped, each time."""
    region = plain.region(0)

    def open_cell() -> Cell:
        cell = memoryview(bytes(4)).cast("I", [])
        cell.release()
        return cell

    register = Register(
        "dropped", region.guard, open_cell, load=partial(region.read32, 0), store=partial(region.write32, 0)
    )
    register.write(5)
    assert register.read() == 5


def test_a_register_is_looked_up_once_for_each_window(plain: pyvfio.Device) -> None:
    """Later accesses are those of the window, whichever came first."""
    region, calls = plain.region(0), list[str]()
    region.write32(8, 7)

    def open_cell() -> Cell | None:
        calls.append("open")
        return region._cell(8, 4)

    def load() -> int:
        calls.append("load")
        return region.read32(8)

    def store(value: int) -> None:
        calls.append("store")
        region.write32(8, value)

    def use(register: Register, access: str) -> None:
        if access == "store":
            register.write(7)
        else:
            assert register.read() == 7

    for first, other in (("load", "store"), ("store", "load")):
        for _ in range(2):
            plain.drop_windows()
            register = Register("watched", region.guard, open_cell, load, store)
            for access in (first, other, first):
                use(register, access)
            assert calls == ["open", first]
            calls.clear()


def test_a_register_of_a_closed_device_raises(kernel: FakeKernel) -> None:
    """And in a child ForkedError, though the child has the mapping."""
    device = pyvfio.open_device(SIBLING, kernel=kernel)
    register = device.region(0).register32(0)
    register.write(1)

    def in_the_child() -> None:
        for access in (register.read, partial(register.write, 2)):
            with pytest.raises(pyvfio.ForkedError):
                access()

    assert in_child(in_the_child) == 0
    assert register.read() == 1
    device.close()
    for access in (register.read, partial(register.write, 1)):
        with pytest.raises(pyvfio.ClosedError):
            access()


# ------------------------------------------------------------------------------------------ accesses of the last window


class _At(IntEnum):
    """An offset as drivers name theirs."""

    CONTROL = 8


_LOADS = {1: Region.read8, 2: Region.read16, 4: Region.read32, 8: Region.read64}
_STORES = {1: Region.write8, 2: Region.write16, 4: Region.write32, 8: Region.write64}


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("bar", [0, 1, 3, 4], ids=["whole", "below a page", "in parts", "by pread"])
def test_what_is_no_offset_is_refused_before_and_after_a_window_is_there(
    plain: pyvfio.Device, bar: int, width: int
) -> None:
    """Negative ones, those behind the end and between, and what is no whole number; nothing is stored."""
    region = plain.region(bar)
    size = region.size
    for _ in range(2):
        for offset in (-1, -width, -size, -(1 << 70), size, size - width + 1, 1 << 64, 1 << 70):
            with pytest.raises(ValueError, match=r"bytes: no|misaligned"):
                _LOADS[width](region, offset)
            with pytest.raises(ValueError, match=r"bytes: no|misaligned"):
                _STORES[width](region, offset, 0xFF)
        for wrong in (8.0, "8", None, Fraction(8)):
            with pytest.raises(TypeError):
                _LOADS[width](region, wrong)  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                _STORES[width](region, wrong, 0xFF)  # type: ignore[arg-type]
        for value in (-1, 1 << 8 * width):
            with pytest.raises(ValueError, match="does not fit"):
                _STORES[width](region, 0, value)
        with pytest.raises(TypeError):
            _STORES[width](region, 0, 1.0)  # type: ignore[arg-type]
        assert region.read(0, size) == bytes(size)
        assert _LOADS[width](region, 0) == 0  # which maps a window
        assert _LOADS[width](region, False) == 0  # noqa: FBT003 (a number, by accident)


def test_an_offset_of_any_kind_of_number_is_that_register(plain: pyvfio.Device) -> None:
    """Numbers of numpy, whose differences would wrap, and of an enumeration; in a window that does not begin at 0, too.

    The last access was elsewhere in the BAR each time.
    """
    numpy = pytest.importorskip("numpy")
    region = plain.region(3)
    for start in (0, 8 * KIB, 3 * PAGE_SIZE):
        region.write(start, bytes(8) + (start + 7).to_bytes(4, "little"))
    for last in (8 * KIB + 16, 16):
        for kind in (numpy.uint8, numpy.uint16, numpy.int64, _At, int):
            region.read32(last)
            assert region.read32(kind(8)) == 7
            region.read32(last)
            region.write32(kind(8), numpy.uint8(7))
        for kind in (numpy.uint16, numpy.uint64, int):
            assert region.read32(kind(8 * KIB + 8)) == 8 * KIB + 7
    assert region.read(0, 12) == bytes(8) + b"\7\0\0\0"


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("bar", [3, 5])
def test_accesses_in_turn_of_all_parts_of_a_bar_reach_their_registers(
    plain: pyvfio.Device, bar: int, width: int
) -> None:
    """In windows, between them, and over their ends; the memory of the device says what was stored."""
    region = plain.region(bar)
    model = bytearray(region.size)
    chance = random.Random(width)  # noqa: S311 (no secret)
    for _ in range(300):
        offset = chance.randrange(0, region.size, width)
        value = chance.getrandbits(8 * width)
        _STORES[width](region, offset, value)
        model[offset : offset + width] = value.to_bytes(width, "little")
        other = chance.randrange(0, region.size, width)
        assert _LOADS[width](region, other) == int.from_bytes(model[other : other + width], "little")
    assert region.read(0, region.size) == model


def test_all_ones_of_mapped_memory_are_looked_at_and_returned(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """A read of configuration space more, each time; no second load of the register."""
    region = plain.region(0)
    region.write64(8, (1 << 64) - 1)
    kernel.clear_trace()
    assert (region.read32(8), region.read64(8)) == ((1 << 32) - 1, (1 << 64) - 1)
    assert [call.call for call in kernel.trace] == ["pread", "pread"]
    kernel.pull_out(SIBLING)
    for load in (region.read32, region.read64):
        with pytest.raises(pyvfio.DeviceGoneError):
            load(8)


def test_in_a_child_no_access_of_any_kind_reaches_the_device(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """Memory, callbacks, ports, configuration space, descriptors; also where the parent has used them last."""
    nic = pyvfio.open_device(BDF, container=plain.container, kernel=kernel)
    regions = (nic.region(0), plain.region(0), plain.region(4), plain.config, nic.config)
    for region in (*regions, *regions):
        region.read32(4)

    def in_the_child() -> None:
        for region in regions:
            for access in (partial(region.read32, 4), partial(region.read8, 4), partial(region.write32, 4, 0)):
                with pytest.raises(pyvfio.ForkedError):
                    access()
        for use in (plain.check_usable, lambda: plain.fd, partial(plain.ioctl, "VFIO_DEVICE_RESET")):
            with pytest.raises(pyvfio.ForkedError):
                use()
        assert not plain.closed

    kernel.clear_trace()
    assert in_child(in_the_child) == 0
    assert plain.region(0).read32(4) == 0
    assert not kernel.trace
    nic.close()


def test_a_write_beside_what_ends_decoding_costs_one_system_call(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """Also among the capabilities, once these are known; and one that ends decoding is known all the same."""
    plain.config.write8(PMCSR + 1, 0)
    region = plain.region(0)
    region.read32(0)
    kernel.clear_trace()
    for offset in (0x0C, PM, PMCSR + 2, 0xF0, 0x3C):
        plain.config.write16(offset, 0)
    assert [call.call for call in kernel.trace] == ["pwrite"] * 5
    region.read32(0)
    assert not made(kernel)
    plain.config.write16(PMCSR, 3)
    with pytest.raises(pyvfio.VfioError, match="D3"):
        region.read32(0)


# -------------------------------------------------------------------------------------------------------------- races


@pytest.fixture
def busy_switching() -> Iterator[None]:
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.long
@pytest.mark.usefixtures("busy_switching")
@pytest.mark.parametrize("bdf", [BDF, SIBLING], ids=["callbacks", "memory"])
def test_threads_that_access_registers_while_windows_are_dropped_see_values_or_errors(
    kernel: FakeKernel, bdf: str
) -> None:
    """Never memory that is gone, and never another error."""
    wrong: list[BaseException] = []
    done = threading.Event()
    counts = {"value": 0, "error": 0}

    def access(call: Callable[[], object]) -> None:
        while not done.is_set():
            try:
                call()
                counts["value"] += 1
            except pyvfio.VfioError:
                counts["error"] += 1
            except BaseException as error:
                wrong.append(error)
                return

    with pyvfio.open_device(bdf, kernel=kernel) as device:
        region = device.region(0)
        register = region.register32(0)
        calls = (register.read, partial(register.write, 1), partial(region.read32, 4), partial(region.write32, 4, 1))
        threads = [threading.Thread(target=access, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        for _ in range(50):
            device.memory_enabled = False
            device.memory_enabled = True
            device.reset()
            device.config.write16(PMCSR, 3)
            device.config.write16(PMCSR, 0)
            device.drop_windows()
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong
    assert min(counts.values()) > 0, counts


def test_no_window_is_mapped_between_the_drop_and_the_change(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """A thread that accesses a register meanwhile waits."""
    region = plain.region(0)
    region.read32(0)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(region.read32(0)))

    def change() -> None:
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not answers

    kernel.clear_trace()
    plain.windows.change(change)
    thread.join()
    assert answers == [0]
    assert made(kernel) == [(0, 128 * KIB)]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_access_of_what_is_mapped_waits_for_no_other_thread(plain: pyvfio.Device, width: int) -> None:
    """The first and the last register of each window, after an access of another window."""
    for bar, offsets in {
        0: (0, 128 * KIB - 8),
        1: (0, 256 - 8),
        2: (0, 2 * MIB - 8, 2 * MIB, 4 * MIB - 8, BIG - 2 * MIB, BIG - 8),
        3: (0, PAGE_SIZE - 8, 8 * KIB, 16 * KIB - 8),
    }.items():
        region, seen = plain.region(bar), list[int]()
        registers = [getattr(region, f"register{8 * width}")(offset + 8 - width) for offset in offsets]
        places = [offset + place for offset in offsets for place in (0, 8 - width)]
        places = [*places, *places[::-1], *places[::3], *places[::5]]
        for place in places:
            _STORES[width](region, place, place >> 3 & 0x7F)
        assert [register.read() for register in registers] == [offset >> 3 & 0x7F for offset in offsets]

        def access(region: Region, places: Sequence[int], registers: Sequence[Register], seen: list[int]) -> None:
            for place in places:
                _STORES[width](region, place, _LOADS[width](region, place) + 1)
            seen.extend(register.read() for register in registers)

        thread = threading.Thread(target=access, args=(region, places, registers, seen), daemon=True)
        with region.guard.lock:
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
        assert seen == [(offset >> 3 & 0x7F) + places.count(offset + 8 - width) for offset in offsets]


def test_a_thread_that_waited_while_another_mapped_the_window_uses_that_window(
    kernel: FakeKernel, plain: pyvfio.Device
) -> None:
    """There is one, and no system call in its place."""
    region = plain.region(0)
    plain.config.read8(0)
    answers: list[int] = []
    thread = threading.Thread(target=lambda: answers.append(region.read32(8)), daemon=True)
    kernel.clear_trace()
    with region.guard.lock:
        thread.start()
        while (frame := sys._current_frames().get(thread.ident or 0)) is None or frame.f_code.co_name != "_wait_for":
            assert thread.is_alive()
        region.write32(8, 5)
    thread.join(10)
    assert answers == [5]
    assert made(kernel) == [(0, 128 * KIB)]
    size = region.size
    assert not [call for call in kernel.trace if call.call == "pread" and int(call.given[2]) < size]


# ------------------------------------------------------------------------------------------------- a device that goes


def test_a_device_that_was_pulled_out_is_told_apart_and_closes(kernel: FakeKernel) -> None:
    """Registers, configuration space, interrupts, memory: errors, no hang; what is no device's goes on."""
    device = pyvfio.open_device(SIBLING, kernel=kernel)
    region = device.region(0)
    register = region.register32(0)
    register.write(7)
    request = device.irq(ioctls.VFIO_PCI_REQ_IRQ_INDEX)
    request.enable()
    blocks = pyvfio.RamBlockList(kernel=kernel)
    mapper = pyvfio.DmaMapper(device.container, blocks)
    block = blocks.add("data", used_length=PAGE_SIZE, max_length=MIB)
    kernel.pull_out(SIBLING)
    kernel.ask_for(SIBLING)
    assert request.wait(timeout=0) == 1
    assert register.read() == 0xFFFF_FFFF
    gone: tuple[Callable[[], object], ...] = (
        partial(region.read32, 0),
        partial(region.read64, 0),
        partial(device.region(4).read32, 0),
        region.register32(4).read,
        partial(region.poll32, 0, value=7, timeout=None),
        lambda: device.config.change16(PCI_COMMAND, PCI_COMMAND_MASTER, on=True),
        lambda: device.bus_master,
        lambda: device.memory_enabled,
        device.check_present,
        partial(region.mmap),
    )
    for access in gone:
        with pytest.raises(pyvfio.DeviceGoneError, match=f"{SIBLING} may be gone"):
            access()
    assert device.config.read16(0) == 0x1234
    region.write32(0, 1)
    block.resize(MIB)
    block.resize(PAGE_SIZE)
    mapper.close()
    blocks.close()
    kernel.clear_trace()
    device.close()
    assert device.closed
    assert "VFIO_DEVICE_RESET" not in [call.request for call in kernel.trace]  # which would take seconds
    with pyvfio.open_device(SIBLING, kernel=kernel) as again, pytest.raises(pyvfio.DeviceGoneError):
        again.memory_enabled = True


def test_a_device_that_goes_in_the_middle_of_accesses_ends_them(kernel: FakeKernel) -> None:
    """A thread that polls, and one that waits for an interrupt until the device is closed."""
    ended: list[type[BaseException]] = []
    waiting = threading.Event()

    def run(call: Callable[[], object]) -> None:
        try:
            waiting.set()
            call()
        except pyvfio.VfioError as error:
            ended.append(type(error))

    device = pyvfio.open_device(SIBLING, kernel=kernel)
    irq = device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable()
    poller = threading.Thread(target=run, args=(partial(device.region(0).poll32, 0, value=7, timeout=None),))
    waiter = threading.Thread(target=run, args=(irq.wait,))
    poller.start()
    waiting.wait()
    kernel.pull_out(SIBLING)
    poller.join(10)
    assert ended == [pyvfio.DeviceGoneError]
    waiter.start()
    device.close()
    waiter.join(10)
    assert ended[0] is pyvfio.DeviceGoneError
    assert issubclass(ended[1], pyvfio.VfioError)


@pytest.mark.parametrize("preads", [1, 2])
def test_a_device_that_goes_while_it_is_asked_for_its_state_has_gone(kernel: WatchedKernel, preads: int) -> None:
    """COMMAND, and then its power state, which reads D3 of a device that has gone."""
    with pyvfio.open_device(SIBLING, kernel=kernel) as device:
        device.memory_enabled = True
        device.check_decoding("BAR 0")
        kernel.preads_left = preads
        with pytest.raises(pyvfio.DeviceGoneError):
            device.region(0).read32(0)


def test_a_system_call_that_finds_no_device_says_that_it_has_gone(kernel: FakeKernel, plain: pyvfio.Device) -> None:
    """ENODEV of an access and of the look that follows."""
    plain.config  # noqa: B018 (its description is asked for once)
    for number, kind in ((19, pyvfio.DeviceGoneError), (5, pyvfio.IoctlError)):
        kernel.fail(call="pread", errno=number)
        kernel.fail(call="pread", errno=number, nth=2)
        with pytest.raises(kind):
            plain.region(4).read32(0)
    kernel.fail(call="pread", errno=5)
    with pytest.raises(
        pyvfio.IoctlError,
        match=rf"device={SIBLING}, region=0x4, offset=0x8, size=0x4.*EIO, BAR4 .*Memory decoding may be off",
    ):
        plain.region(4).read32(8)
    kernel.fail(call="pwrite", errno=1)
    with pytest.raises(pyvfio.IoctlError, match=rf"^pwrite\(device={SIBLING}, region=0x4, offset=0x8, size=0x2") as one:
        plain.region(4).write16(8, 1)
    assert one.value.hint == ""
    kernel.fail(call="pread", errno=5)
    with pytest.raises(pyvfio.IoctlError, match=f"whether {SIBLING} has gone is unknown") as one:
        plain.check_present()
    assert (one.value.request, one.value.errno) == ("pread", 5)
    assert one.value.arguments == {"device": SIBLING, "region": 7, "offset": 6, "size": 2}
    for number in (6, 19):
        kernel.fail(call="pread", errno=number)
        with pytest.raises(pyvfio.DeviceGoneError, match="the STATUS register is unreadable"):
            plain.check_present()


def test_a_close_that_a_removal_waits_for_ignores_that_the_reset_cannot_be_had(kernel: FakeKernel) -> None:
    """EAGAIN: the removal holds the device. The kernel resets it later."""
    device = pyvfio.open_device(SIBLING, kernel=kernel)
    kernel.fail(call="ioctl", request="VFIO_DEVICE_RESET", errno=11)
    device.close()
    device = pyvfio.open_device(SIBLING, kernel=kernel)
    kernel.fail(call="ioctl", request="VFIO_DEVICE_RESET", errno=5)
    with pytest.raises(pyvfio.IoctlError, match="EIO"):
        device.close()


# ---------------------------------------------------------------------------------------------------------- poll32


def test_poll_returns_the_value_that_it_waited_for(nic: pyvfio.Device) -> None:
    """The whole register, as soon as its masked bits are right; the register counts reads."""
    region = nic.region(0)
    assert region.poll32(0, value=3, timeout=10) == 3
    assert region.poll32(0, mask=0xC, value=0xC, timeout=None, interval=0.0001) == 0xC
    assert region.poll32(0, mask=0, value=0, timeout=0) == 0xD
    assert region.poll32(0, mask=0xFFFF_FFFF, value=0xE, timeout=0) == 0xE


def test_poll_reads_once_at_least_and_says_what_it_saw(nic: pyvfio.Device) -> None:
    """A TimeoutError, with the last value read, the mask and the wanted value."""
    region = nic.region(0)
    with pytest.raises(TimeoutError) as caught:
        region.poll32(0, mask=0xF0, value=0x10, timeout=0)
    error = caught.value
    assert isinstance(error, pyvfio.RegisterTimeoutError)
    assert (error.last, error.mask, error.value) == (1, 0xF0, 0x10)
    assert str(error) == f"BAR0 (region 0) of {BDF}, offset 0x0 is 0x1 after 0 s: & 0xf0 gives 0x0, not 0x10"
    with pytest.raises(pyvfio.RegisterTimeoutError, match=r"after 0\.01 s"):
        region.poll32(4, value=0, timeout=0.01, interval=0.001)
    with pytest.raises(pyvfio.RegisterTimeoutError, match=r"after 0\.01 s"):
        region.poll32(4, value=0, timeout=0.01, interval=1e6)


def test_poll_refuses_what_can_never_be(kernel: FakeKernel, nic: pyvfio.Device) -> None:
    """Before the first read."""
    region = nic.region(0)
    poll = partial(region.poll32, 0, value=0)
    kernel.clear_trace()
    for wrong in ({"mask": 1, "value": 2}, {"value": -1}, {"mask": 1 << 32, "value": 0}, {"mask": -1, "value": 0}):
        with pytest.raises(ValueError, match="can never be"):
            region.poll32(0, timeout=1, **wrong)
    for name in ("timeout", "interval"):
        for seconds in (-1, float("nan")):
            with pytest.raises(ValueError, match=f"{name} is a number of seconds"):
                poll(**({"timeout": 1.0} | {name: seconds}))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"{name} is a number of seconds"):
            poll(**({"timeout": 1} | {name: "1"}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="misaligned"):
        region.poll32(1, value=0, timeout=1)
    with pytest.raises(TypeError):
        region.poll32(0, value="0", timeout=1)  # type: ignore[arg-type]
    assert not kernel.trace


def test_a_register_that_is_all_ones_is_looked_at_twice_and_returned(kernel: FakeKernel, nic: pyvfio.Device) -> None:
    """While the device is there: one read of configuration space more."""
    region = nic.region(0)
    region.read32(0)
    kernel.clear_trace()
    assert (region.read32(8), region.read64(8)) == (0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)
    assert [call.call for call in kernel.trace] == ["pread", "pread"]
    assert region.read16(8) == 0xFFFF
    assert len(kernel.trace) == 2


def test_a_mapped_window_that_was_closed_raises_and_reaches_no_memory() -> None:
    """Also its cells; twice is fine."""
    kernel = LinuxKernel()
    fd = kernel.memfd_create("window", 0)
    kernel.ftruncate(fd, PAGE_SIZE)
    window = kernel.registers(fd, 0, PAGE_SIZE)
    cell = window.cell(8, 4)
    assert cell is not None
    assert cell is window.cell(8, 4)
    cell[()] = 5
    numbers = window.numbers(4, 16)
    assert numbers is not None
    assert (cell[()], window.read(8, 4), numbers[2]) == (5, 5, 5)
    with pytest.raises(IndexError):
        numbers[4]
    window.close()
    window.close()
    kernel.close(fd)
    for access in (lambda: cell[()], lambda: numbers[2], lambda: window.read(8, 4), lambda: window.write(8, 4, 1)):
        with pytest.raises(ValueError, match="released"):
            access()


def test_master_and_memory_are_the_bits_of_the_command_register(nic: pyvfio.Device) -> None:
    """PCI 3.0, 6.2.2."""
    nic.config.write16(PCI_COMMAND, PCI_COMMAND_MASTER | PCI_COMMAND_MEMORY)
    assert (nic.bus_master, nic.memory_enabled) == (True, True)


class EnablingKernel(WatchedKernel):
    """In which a thread makes `step` when COMMAND is read the first time after that was set."""

    step: Callable[[], object] | None = None
    thread: threading.Thread | None = None

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read first."""
        data = super().pread(fd, size, offset)
        if self.step is not None and offset & 0xFFFF == PCI_COMMAND:
            self.thread, self.step = threading.Thread(target=self.step), None
            self.thread.start()
            self.thread.join(0.1)  # as far as it comes
        return data


@pytest.mark.parametrize("how", ["change", "write"])
def test_no_thread_begins_decoding_between_the_look_and_the_write_that_ends_it(how: str) -> None:
    """A view stays where decoding has ended already, and must not where another thread has begun decoding again."""
    with EnablingKernel(groups=groups()) as kernel, pyvfio.open_device(SIBLING, kernel=kernel) as device:
        device.memory_enabled = True
        config = device.config
        with device.region(0).mmap() as mapped, mapped.view():
            config.write16(PCI_COMMAND, 0, force=True)
            begin = {
                "change": partial(config.change16, PCI_COMMAND, PCI_COMMAND_MEMORY, on=True),
                "write": partial(config.write16, PCI_COMMAND, PCI_COMMAND_MEMORY),
            }
            kernel.step = begin[how]
            config.write16(PCI_COMMAND, 0)
            assert kernel.thread is not None
            kernel.thread.join()
            assert device.memory_enabled
