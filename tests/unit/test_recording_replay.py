"""A record drives tests of a driver without a kernel, and says where a driver departs from the record."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import e1000e
import pyvfio
from pyvfio import ioctls
from pyvfio.recording.format import parse
from pyvfio.testing import DepartureError, FakeKernel, RecordedDevice
from pyvfio.testing.fake import Bar, FakeDevice, FakePciDevice
from pyvfio.testing.fake.replay import OrderName

BDF = "0000:00:02.0"
HEADER = """pyvfio-record 1
device 1234:0001 class 000000
region bar0 size 0x1000 read write mmap
region config size 0x100 read write
vectors intx 1
vectors msix 4
config 0x000 34 12 01 00 02 00 10 00 00 00 00 00 00 00 00 00
begin
"""
FIRST = 9
"""The line of the first event behind HEADER."""


@contextmanager
def opened(recorded: RecordedDevice, *, check: bool = True) -> Iterator[tuple[pyvfio.Device, pyvfio.Region]]:
    """The device on a fake kernel, and BAR 0; at the end the driver must have gone through the record."""
    with FakeKernel(groups=[(2, [recorded])]) as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        yield device, device.region(0)
        if check:
            recorded.check()


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[..., RecordedDevice]:
    """Makes a device of the events of a record, each a line."""

    def make(*events: str, order: OrderName = "strict", **options: object) -> RecordedDevice:
        file = tmp_path / "hand.record"
        file.write_text(HEADER + "".join(f"{event}\n" for event in events), encoding="utf-8")
        return RecordedDevice(BDF, file, order=order, **options)  # type: ignore[arg-type]

    return make


# -------------------------------------------------------------------------------------------------- a real controller


def replay(driver: Callable[[pyvfio.Device], object], order: OrderName = "strict") -> RecordedDevice:
    """Run a driver on the record of the e1000e that was made in a virtual machine."""
    device = RecordedDevice(BDF, e1000e.RECORD, order=order)
    with opened(device) as (there, _bar):
        driver(there)
    return device


@pytest.mark.parametrize("order", ["strict", "registers"])
def test_the_record_of_a_network_controller_drives_its_driver_without_a_kernel(order: OrderName) -> None:
    """Address, reset, link status and an MSI-X interrupt are those of the controller."""
    reports: list[e1000e.Report] = []
    replay(lambda device: reports.append(e1000e.drive(device)), order)
    (report,) = reports
    assert report.ok
    assert (report.mac, report.link_up, report.interrupts) == ("525400123456", True, 1)


def test_a_replay_that_is_recorded_gives_the_same_record(tmp_path: Path) -> None:
    """Header and events, byte for byte: the fake has all that the record has of the device."""
    file = tmp_path / "again.record"

    def driver(device: pyvfio.Device) -> None:
        with device.record(file):
            e1000e.drive(device)

    replay(driver)
    assert file.read_text(encoding="ascii") == e1000e.RECORD.read_text(encoding="ascii")


def line_of(event: str, nth: int = 0) -> int:
    """The number of a line of the record of the controller."""
    lines = e1000e.RECORD.read_text(encoding="ascii").splitlines()
    return [number for number, line in enumerate(lines, 1) if line == event][nth]


class WrongRegister(e1000e.E1000e):
    """IVAR is at 0xe4."""

    def route(self) -> None:
        """One register too far."""
        self.bar.write32(0xE8, 0x80000)


class MissingWrite(e1000e.E1000e):
    """No cause is unmasked."""

    def unmask(self) -> None:
        """Nothing."""


def test_a_driver_with_a_wrong_register_departs_at_the_line_of_the_right_one() -> None:
    """With the expected and the actual access, and the last ones before."""
    with pytest.raises(DepartureError) as caught:
        replay(lambda device: e1000e.drive(device, WrongRegister))
    line = line_of("w32 bar0 0x000e4 0x00080000")
    assert caught.value.line == line
    assert caught.value.before[-1] == f"line {line - 1}: w16 config 0x00004 0x0107"
    assert len(caught.value.before) == 5
    text = str(caught.value)
    assert text.startswith(f"e1000e.record:{line}: the driver departs from the record")
    assert "\n  expected: w32 bar0 0x000e4 0x00080000\n  actual: w32 bar0 0x000e8 0x00080000\n  before:\n" in text


def test_a_driver_that_leaves_out_a_write_departs_at_the_line_of_the_write() -> None:
    """The interrupt is not unmasked: IMS."""
    with pytest.raises(DepartureError) as caught:
        replay(lambda device: e1000e.drive(device, MissingWrite))
    assert caught.value.line == line_of("w32 bar0 0x000d0 0x01000004")
    assert caught.value.actual == "w32 bar0 0x000c8 0x01000004"


def test_a_driver_that_ends_early_is_told_the_next_line() -> None:
    """By `check`."""
    with pytest.raises(DepartureError, match="ended before the record") as caught:
        replay(lambda device: e1000e.E1000e(device).reset())
    assert caught.value.line == line_of("r32 bar0 0x05400 0x12005452")
    assert caught.value.actual == ""


# ----------------------------------------------------------------------------------------------------- line by line


@pytest.mark.parametrize(
    "act",
    [
        lambda device: device.region(0).write32(0x10, 2),
        lambda device: device.region(0).write32(0x14, 1),
        lambda device: device.region(0).write16(0x10, 1),
        lambda device: device.region(0).read32(0x10),
        lambda device: device.region(0).write(0x10, bytes(3)),
        lambda device: device.config.write32(0x10, 1),
        lambda device: device.region(0).register32(0x10).write(2),
    ],
    ids=["value", "offset", "width", "direction", "bytes", "region", "register object"],
)
def test_an_access_that_differs_in_anything_departs(
    recorded: Callable[..., RecordedDevice], act: Callable[[pyvfio.Device], object]
) -> None:
    """And a later access of a BAR raises the same error, which `check` has, too: it cannot be swallowed."""
    device = recorded("w32 bar0 0x10 1", "r32 bar0 0x10 1", "end")
    with opened(device, check=False) as (there, bar):
        with pytest.raises(DepartureError) as caught:
            act(there)
        assert caught.value.line == FIRST
        with pytest.raises(DepartureError) as again:
            bar.write32(0x10, 1)
        assert again.value is caught.value
    with pytest.raises(DepartureError) as checked:
        device.check()
    assert checked.value is caught.value


def test_an_access_behind_the_end_departs(recorded: Callable[..., RecordedDevice]) -> None:
    """There is no further one to answer."""
    with opened(recorded("r8 bar0 0x0 7", "end"), check=False) as (_device, bar):
        assert bar.read8(0) == 7
        with pytest.raises(DepartureError, match="expected: no further access"):
            bar.read8(0)


def test_a_driver_that_closes_the_device_when_the_record_has_ended_does_not_depart(
    recorded: Callable[..., RecordedDevice],
) -> None:
    """Bus mastering goes off, which is not in the record."""
    device = recorded("w16 config 0x4 0x0006", "w8 bar0 0x0 1", "end")
    with opened(device) as (there, bar):
        there.memory_enabled = True
        there.bus_master = True
        bar.write8(0, 1)
    device.check()


def test_reads_of_configuration_space_are_answered_and_not_compared(recorded: Callable[..., RecordedDevice]) -> None:
    """The value is that of this place of the record, whether the driver reads it or not."""
    events = ("r8 bar0 0x0 1", "r8 config 0x40 0x11", "r8 config 0x40 0x22", "r8 bar0 0x0 2", "end")
    with opened(recorded(*events)) as (device, bar):
        assert device.config.read8(0x40) == 0
        assert bar.read8(0) == 1
        assert device.config.read16(0x40) == 0
        assert [device.config.read8(0x40) for _ in range(3)] == [0x11, 0x22, 0x22]
        assert bar.read8(0) == 2
    with opened(recorded(*events)) as (device, bar):
        assert (bar.read8(0), bar.read8(0), device.config.read8(0x40)) == (1, 2, 0x22)


def test_a_write_of_configuration_space_is_compared(recorded: Callable[..., RecordedDevice]) -> None:
    """But one that leaves COMMAND as it is."""
    with opened(recorded("w8 config 0x3c 5", "end")) as (device, _bar):
        device.memory_enabled = True
        device.config.write8(0x3C, 5)
        assert device.config.read8(0x3C) == 5
    with opened(recorded("w8 config 0x3c 5", "end"), check=False) as (device, _bar), pytest.raises(DepartureError):
        device.config.write8(0x3C, 6)


def test_a_reset_is_compared(tmp_path: Path) -> None:
    """The driver's own, and not that of the kernel when the device is opened."""
    file = tmp_path / "x.record"
    text = HEADER.replace("class 000000", "class 000000 resettable")
    file.write_text(f"{text}w8 bar0 0x0 1\nreset\nw8 bar0 0x0 2\nend\n", encoding="ascii")
    with opened(RecordedDevice(BDF, file)) as (device, bar):
        bar.write8(0, 1)
        device.reset()
        bar.write8(0, 2)
    other = RecordedDevice(BDF, file)
    with opened(other, check=False) as (device, _bar), pytest.raises(DepartureError, match="actual: reset"):
        device.reset()


def test_interrupts_come_where_they_were_recorded(recorded: Callable[..., RecordedDevice]) -> None:
    """With their counts, not before, and each once."""
    events = ("w8 bar0 0x0 1", "irq msix 2 times 3", "irq msix 0 times 1", "w8 bar0 0x0 2", "end")
    with opened(recorded(*events)) as (device, bar):
        irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        irq.enable(4)
        assert irq.wait_any(timeout=0) == {}
        bar.write8(0, 1)
        assert irq.wait_any(timeout=0) == {0: 1, 2: 3}
        bar.write8(0, 2)
        assert irq.wait_any(timeout=0) == {}


def test_an_interrupt_waits_until_its_vector_is_enabled(recorded: Callable[..., RecordedDevice]) -> None:
    """The record does not say when a vector is enabled."""
    with opened(recorded("irq msix 0 times 1", "w8 bar0 0x0 1", "irq msix 1 times 1", "end")) as (device, bar):
        irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        bar.write8(0, 1)
        irq.enable(2)
        assert irq.wait_any(timeout=0) == {0: 1, 1: 1}
        assert irq.wait_any(timeout=0) == {}


def test_intx_comes_also_while_it_is_masked(recorded: Callable[..., RecordedDevice]) -> None:
    """The record has the interrupt, so it was not masked when it came."""
    events = ("w8 bar0 0x0 1", "irq intx 0 times 1", "w8 bar0 0x0 2", "irq intx 0 times 1", "end")
    with opened(recorded(*events)) as (device, bar):
        irq = device.irq(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
        irq.enable(1)
        for value in (1, 2):
            bar.write8(0, value)
            assert irq.wait(timeout=0) == 1
        irq.unmask()
        assert irq.wait(timeout=0) == 0


def test_an_interrupt_wakes_a_thread_that_waits(recorded: Callable[..., RecordedDevice]) -> None:
    """As a device's does."""
    with opened(recorded("w8 bar0 0x0 1", "irq msix 0 times 2", "end")) as (device, bar):
        irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        irq.enable(1)
        counts: list[int] = []
        thread = threading.Thread(target=lambda: counts.append(irq.wait(timeout=60)))
        thread.start()
        bar.write8(0, 1)
        thread.join()
        assert counts == [2]


def test_any_value_is_taken_for_the_registers_that_are_named(recorded: Callable[..., RecordedDevice]) -> None:
    """The address of a ring, for instance; another register's value is compared."""
    device = recorded("w64 bar0 0x20 0x1000", "w32 bar0 0x28 1", "end", any_value=[(0, 0x20)])
    with opened(device, check=False) as (_device, bar):
        bar.write64(0x20, 0xABCD000)
        with pytest.raises(DepartureError):
            bar.write32(0x28, 2)


def test_opening_the_device_begins_the_record_anew(recorded: Callable[..., RecordedDevice]) -> None:
    """A test may open it twice."""
    device = recorded("w8 bar0 0x0 1", "end")
    with FakeKernel(groups=[(2, [device])]) as kernel:
        for _ in range(2):
            with pyvfio.open_device(BDF, kernel=kernel) as there:
                there.region(0).write8(0, 1)
                device.check()


def test_accesses_of_any_size_are_replayed_as_one(recorded: Callable[..., RecordedDevice]) -> None:
    """Whatever widths a kernel would choose."""
    with opened(recorded("read bar0 0x1 9 010203040506070809", "write bar0 0x3 aabbcc", "end")) as (_device, bar):
        assert bar.read(1, 9) == bytes(range(1, 10))
        bar.write(3, b"\xaa\xbb\xcc")


def test_an_access_that_the_kernel_refused_has_no_place_in_the_replay(recorded: Callable[..., RecordedDevice]) -> None:
    """The fake refuses it by itself, where the device is as the recorded one was."""
    with opened(recorded("r32 bar0 0x0 EIO", "r32 bar0 0x0 5", "end")) as (_device, bar):
        assert bar.read32(0) == 5


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("r8 rom 0x0 1", "has no rom"),
        ("reset now", "no such"),
        ("w8 bar3 0x0 1", "no region bar3"),
        ("r32 bar0 -0x4 1", "no 0x4 at -0x4"),
        ("w32 bar0 0x10000000 1", "no 0x4 at 0x10000000"),
        ("w8 config 0x1000 1", "no 0x1 at 0x1000"),
        ("irq msix 99 times 1", "no vector 99"),
        ("irq msix -1 times 1", "no vector -1"),
        ("irq irq-1 0 times 1", "no such name"),
        ("irq msix 0 times 0", "0 times"),
        ("irq msix 0 times -5", "-5 times"),
        (f"irq msix 0 times {1 << 64}", f"{1 << 64} times"),
        ("r32 bar0 0x0 ü", "not ASCII"),
    ],
)
def test_a_record_that_cannot_be_replayed_is_refused_with_the_line(
    recorded: Callable[..., RecordedDevice], line: str, why: str
) -> None:
    """When the device is made."""
    with pytest.raises(ValueError, match=rf"^hand\.record:{FIRST}: .*{why}"):
        recorded(line)


def test_a_device_that_is_pulled_out_answers_no_more(recorded: Callable[..., RecordedDevice]) -> None:
    """The record is left alone."""
    device = recorded("r32 bar0 0x0 5", "r32 bar0 0x0 6", "end")
    with FakeKernel(groups=[(2, [device])]) as kernel, pyvfio.open_device(BDF, kernel=kernel) as there:
        assert there.region(0).read32(0) == 5
        kernel.pull_out(BDF)
        with pytest.raises(pyvfio.DeviceGoneError):
            there.region(0).read32(0)


# ---------------------------------------------------------------------------------------------- the order of registers


def test_registers_may_be_accessed_in_any_order(recorded: Callable[..., RecordedDevice]) -> None:
    """The writes of one register keep theirs."""
    events = ("w32 bar0 0x0 1", "w32 bar0 0x4 2", "w32 bar0 0x0 3", "end")
    with opened(recorded(*events, order="registers")) as (_device, bar):
        for offset, value in ((4, 2), (0, 1), (0, 3)):
            bar.write32(offset, value)
    with opened(recorded(*events, order="registers"), check=False) as (_device, bar):
        with pytest.raises(DepartureError, match="expected: w32 bar0 0x00000 0x00000001") as caught:
            bar.write32(0, 3)
        assert caught.value.line == FIRST


def test_a_register_that_has_not_changed_may_be_read_again_or_not_at_all(
    recorded: Callable[..., RecordedDevice],
) -> None:
    """A value is there when all writes before it in the record were made, and is replaced by a newer one."""
    events = ("r8 bar0 0x0 1", "w8 bar0 0x4 1", "r8 bar0 0x0 2", "w8 bar0 0x4 2", "r8 bar0 0x0 3", "end")
    with opened(recorded(*events, order="registers")) as (_device, bar):
        assert [bar.read8(0) for _ in range(3)] == [1, 1, 1]
        bar.write8(4, 1)
        bar.write8(4, 2)
        assert [bar.read8(0) for _ in range(2)] == [3, 3]


def test_polls_collapse_to_the_values_that_were_seen(recorded: Callable[..., RecordedDevice]) -> None:
    """A driver that polls less often sees each value once."""
    events = (*["r32 bar0 0x8 0"] * 50, "r32 bar0 0x8 1", "end")
    with opened(recorded(*events, order="registers")) as (_device, bar):
        assert [bar.read32(8) for _ in range(3)] == [0, 1, 1]


def test_a_value_that_follows_a_write_is_not_there_before_the_write(recorded: Callable[..., RecordedDevice]) -> None:
    """The error has the line of the write."""
    events = ("w8 bar0 0x4 1", "r8 bar0 0x0 2", "end")
    with opened(recorded(*events, order="registers"), check=False) as (_device, bar):
        with pytest.raises(DepartureError, match=f"first in line {FIRST + 1}") as caught:
            bar.read8(0)
        assert caught.value.line == FIRST


def test_an_access_that_the_record_does_not_have_departs_in_any_order(recorded: Callable[..., RecordedDevice]) -> None:
    """A register that was never accessed, and one write too many."""
    acts: list[Callable[[pyvfio.Region], object]] = [
        lambda bar: bar.read8(1),
        lambda bar: bar.write8(1, 1),
        lambda bar: bar.write8(0, 2),
    ]
    for act in acts:
        device = recorded("w8 bar0 0x0 1", "end", order="registers")
        with opened(device, check=False) as (_device, bar):
            bar.write8(0, 1)
            with pytest.raises(DepartureError):
                act(bar)


def test_a_write_that_was_left_out_is_named_at_the_end(recorded: Callable[..., RecordedDevice]) -> None:
    """Reads may be left out."""
    device = recorded("r8 bar0 0x0 1", "w8 bar0 0x0 1", "w8 bar0 0x4 1", "r8 bar0 0x0 2", "end", order="registers")
    with opened(device, check=False) as (_device, bar):
        bar.write8(0, 1)
        with pytest.raises(DepartureError) as caught:
            device.check()
        assert caught.value.line == FIRST + 2
        bar.write8(4, 1)
        device.check()


def test_in_any_order_interrupts_come_when_all_writes_before_were_made(
    recorded: Callable[..., RecordedDevice],
) -> None:
    """Whichever is the last."""
    events = ("w8 bar0 0x0 1", "w8 bar0 0x4 1", "r8 bar0 0x8 1", "irq msix 0 times 1", "w8 bar0 0x0 2", "end")
    with opened(recorded(*events, order="registers")) as (device, bar):
        irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        irq.enable(1)
        bar.write8(4, 1)
        assert irq.wait(timeout=0) == 0
        bar.write8(0, 1)
        assert irq.wait(timeout=0) == 1
        bar.write8(0, 2)


def test_an_order_that_does_not_exist_is_refused(recorded: Callable[..., RecordedDevice]) -> None:
    """Before anything is read."""
    with pytest.raises(ValueError, match="'strict' or 'registers'"):
        recorded("end", order="random")


# ------------------------------------------------------------------------------------------------------- any driver


class Scratch(FakePciDevice):
    """Registers that count their reads, and an interrupt for each write of register 0."""

    vendor, device = 0x1234, 0xBEEF
    bar_sizes = {0: 64}  # noqa: RUF012 (the base class says that it is a class's)
    msi = 1

    def reset(self) -> None:
        """All zero."""
        self.values = dict.fromkeys(range(64), 0)

    def read_register(self, _bar: int, offset: int, width: int, /) -> int:
        """Each read changes the next one."""
        self.values[offset] += 1
        return self.values[offset] >> 1 << 8 * (width - 1)

    def write_register(self, _bar: int, offset: int, _width: int, value: int, /) -> None:
        """As written."""
        self.values[offset] = value & 0x7F
        if offset == 0:
            self.raise_interrupt()


_STEPS = st.lists(
    st.tuples(st.sampled_from(["read", "write", "wait", "block"]), st.integers(0, 7), st.sampled_from([1, 2, 4, 8])),
    max_size=30,
)


def run_steps(device: pyvfio.Device, steps: list[tuple[str, int, int]]) -> list[object]:
    """A driver made of steps; what it has seen."""
    device.memory_enabled = device.bus_master = True
    irq, bar, seen = device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX), device.region(0), list[object]()
    irq.enable(1)
    for kind, number, width in steps:
        if kind == "read":
            seen.append(getattr(bar, f"read{8 * width}")(8 * number))
        elif kind == "write":
            getattr(bar, f"write{8 * width}")(8 * number, number + width)
        elif kind == "block":
            seen.append(bar.read(8 * number, 7))
        else:
            seen.append(irq.wait(timeout=0))
    device.bus_master = False
    return seen


@pytest.mark.long
@settings(max_examples=50)
@given(steps=_STEPS)
def test_a_driver_sees_in_the_replay_what_it_saw_on_the_device(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Any driver; and the record of the replay is the record, up to the interrupts that nobody waited for."""
    first, second = (tmp_path_factory.mktemp("records") / name for name in ("first", "second"))
    with (
        FakeKernel(groups=[(2, [Scratch(BDF)])]) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
        device.record(first),
    ):
        seen = run_steps(device, steps)
    recorded = RecordedDevice(BDF, first)
    with opened(recorded) as (device, _bar), device.record(second):
        assert run_steps(device, steps) == seen
    assert (
        parse(second.read_text(encoding="ascii"), name="").lines
        == parse(first.read_text(encoding="ascii"), name="").lines
    )


def test_regions_that_are_no_windows_are_replayed_as_they_were(tmp_path: Path) -> None:
    """I/O ports, and a BAR of which the kernel maps a part."""
    file = tmp_path / "x.record"
    bars = {0: Bar(0x4000, sparse=((0x1000, 0x1000),)), 2: Bar(32, io=True)}

    def driver(device: pyvfio.Device) -> list[int]:
        device.region(0).write32(0, 1)
        device.region(0).write32(0x1000, 2)
        device.region(2).write8(1, 3)
        return [device.region(0).read32(0), device.region(0).read32(0x1000), device.region(2).read8(1)]

    with (
        FakeKernel(groups=[(2, [FakeDevice(BDF, bars=bars)])]) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
        device.record(file),
    ):
        assert driver(device) == [1, 2, 3]
    with opened(RecordedDevice(BDF, file)) as (device, bar):
        assert bar.mappable == ((0x1000, 0x1000),)
        assert driver(device) == [1, 2, 3]


# --------------------------------------------------------------------------------------------------------- the page


PAGE = (Path(__file__).resolve().parents[2] / "docs/recording.md").read_text(encoding="utf-8")


def test_the_programs_of_the_page_on_recordings_run_and_print_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record, and the error of a driver that departs."""
    blocks: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    record, replayed, fixture = [text for language, text in blocks if language == "python"]
    shown, error = [text for language, text in blocks if not language]
    file = tmp_path / "edu.record"
    names: dict[str, object] = {}
    with FakeKernel() as kernel:
        names["kernel"] = kernel
        program = record.replace('2.0")', '2.0", kernel=kernel)').replace('"edu.record"', repr(str(file)))
        exec(program, names)  # noqa: S102
    assert capsys.readouterr().out == "5\n"
    assert file.read_text(encoding="ascii").partition("begin\n")[2] == shown
    program = replayed.replace('"edu.record"', repr(str(file)))
    exec(program, names)  # noqa: S102
    wrong = record.partition("with ")[0].replace("causes)  #", "causes & 0b100)  #")
    exec(wrong, names)  # noqa: S102
    with pytest.raises(DepartureError) as caught:
        exec(program, names)  # noqa: S102
    assert f"{caught.value}\n" == error
    exec(fixture, {})  # noqa: S102


def test_the_page_has_each_kind_of_line() -> None:
    """Each line of the tables is one that the parser takes."""
    lines: list[str] = re.findall(r"^\| (`[^|]*`) \|", PAGE, re.MULTILINE)
    lines = lines[lines.index("`pyvfio-record 1`") :]
    header = [line.strip("`") for line in lines[: lines.index("`begin`")]]
    events = [word for line in lines[lines.index("`begin`") + 1 :] for word in line.replace("`", "").split(", ")]
    facts = [fact.replace("…", "00") for fact in header if not fact.startswith("vectors")]
    regions = ["region config size 0x100 read write"]
    text = "\n".join([*facts, *regions, "vectors msix 5", "begin", *events, ""])
    record = parse(text, name="page")
    assert [type(line.event).__name__ for line in record.lines] == [
        *["Access"] * 5,
        "Interrupt",
        "Reset",
        "Reset",
        "Mmap",
    ]
    assert record.complete
