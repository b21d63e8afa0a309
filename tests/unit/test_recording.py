"""A recording of a device: which accesses are in the file, when they are there, and what a recording leaves alone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.device import PCI_COMMAND
from pyvfio.kernel import LinuxKernel
from pyvfio.recording.format import Access, Header, Interrupt, Record, RegionShape, irq_name, parse, region_name
from pyvfio.recording.log import EventLog
from pyvfio.recording.seam import RecordingKernel
from pyvfio.testing import FakeEdu, FakeKernel
from pyvfio.testing.edu import Edu
from pyvfio.testing.fake import Bar, FakeDevice
from pyvfio.testing.fake.process import DEVICE_MEMORY
from tests.unit.processes import in_child, open_fds

ROOT = Path(__file__).resolve().parents[2]
BDF = "0000:00:02.0"
EDU = "0000:00:03.0"
_LIVENESS, _RAISE = 4, 0x60


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A device whose BAR is plain memory, with 8 MSI-X vectors, and an edu."""
    plain = FakeDevice(BDF, msi=0, msix=8, resettable=True, pcie=True)
    with FakeKernel(groups=[(2, [plain]), (3, [FakeEdu(EDU)])]) as made:
        yield made


@pytest.fixture
def device(kernel: FakeKernel) -> Iterator[pyvfio.Device]:
    """The device with plain memory."""
    with pyvfio.open_device(BDF, kernel=kernel) as opened:
        yield opened


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file of the record."""
    return tmp_path / "device.record"


def record_of(file: Path) -> Record:
    """The record that a file has."""
    return parse(file.read_text(encoding="ascii"), name=file.name)


def events(file: Path) -> list[str]:
    """The events of a record, as lines."""
    return [str(line.event) for line in record_of(file).lines]


def device_areas() -> int:
    """How many mappings of devices this process has."""
    return Path("/proc/self/maps").read_bytes().count(DEVICE_MEMORY.encode())


def test_each_access_is_a_line_with_its_width(device: pyvfio.Device, file: Path) -> None:
    """Methods of the region, registers as objects, and accesses whose widths the kernel chooses."""
    bar = device.region(0)
    with device.record(file):
        bar.write8(0x10, 0x12)
        bar.write16(0x12, 0x3456)
        register = bar.register32(0x14)
        for value in (6, 7):
            register.write(value)
        bar.write64(0x18, 1 << 40)
        assert [bar.read8(0x10), bar.read16(0x12)] == [0x12, 0x3456]
        assert [register.read(), register.read(), bar.read64(0x18)] == [7, 7, 1 << 40]
        bar.write(0x21, b"\1\2\3")
        assert bar.read(0x20, 5) == b"\0\1\2\3\0"
    assert events(file) == [
        "w8 bar0 0x00010 0x12",
        "w16 bar0 0x00012 0x3456",
        "w32 bar0 0x00014 0x00000006",
        "w32 bar0 0x00014 0x00000007",
        "w64 bar0 0x00018 0x0000010000000000",
        "r8 bar0 0x00010 0x12",
        "r16 bar0 0x00012 0x3456",
        "r32 bar0 0x00014 0x00000007",
        "r32 bar0 0x00014 0x00000007",
        "r64 bar0 0x00018 0x0000010000000000",
        "write bar0 0x00021 010203",
        "read bar0 0x00020 5 0001020300",
    ]
    assert record_of(file).complete


def test_an_access_of_no_bytes_is_not_in_the_record(device: pyvfio.Device, file: Path) -> None:
    """The kernel does not call the driver for such an access, and a record with one could not be read."""
    with device.record(file):
        assert device.region(0).read(0x10, 0) == b""
        device.region(0).write(0x10, b"")
        device.region(0).write8(0x10, 1)
    assert events(file) == ["w8 bar0 0x00010 0x01"]


def test_an_errno_without_a_name_is_read_as_an_errno() -> None:
    """ENOTSUPP (524) reaches user space from some drivers, and has no name in Python: the number is no value."""
    refused = Access(write=False, region=0, offset=8, width=4, data=None, errno=524)
    header = Header(bytes(256), resettable=False, regions={each: RegionShape(256, frozenset()) for each in (0, 7)})
    assert [line.event for line in parse(f"{header}{refused}\n", name="r").lines] == [refused]
    (line,) = parse(f"{header}w8 bar0 0x0 0x1 E5\n", name="r").lines
    assert str(line.event) == "w8 bar0 0x00000 0x01 EIO"


def test_a_file_that_another_recording_writes_is_refused_and_kept(device: pyvfio.Device, file: Path) -> None:
    """Two recordings in one file would write over each other's lines."""
    with device.record(file):
        device.region(0).read8(0)
        before = open_fds()
        with pytest.raises(BlockingIOError, match="another recording writes this file") as caught:
            device.record(file)
        assert (caught.value.errno, caught.value.filename) == (errno.EWOULDBLOCK, str(file))
        assert open_fds() == before
        device.region(0).read8(1)
    assert events(file) == ["r8 bar0 0x00000 0x00", "r8 bar0 0x00001 0x00"]
    device.record(file).close()
    assert not events(file)


def test_a_recording_that_is_refused_leaves_an_existing_file(device: pyvfio.Device, file: Path) -> None:
    """A region is mapped: the former record is not lost."""
    file.write_text("former")
    with device.region(0).mmap(), pytest.raises(pyvfio.VfioError, match="is mapped"):
        device.record(file)
    assert file.read_text() == "former"


def test_a_child_that_has_the_descriptor_keeps_the_file_from_no_other_recording(
    device: pyvfio.Device, file: Path
) -> None:
    """The child may live for long, and the record is at its end."""
    recording = device.record(file)
    until, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(end)
        os.read(until, 1)
        os._exit(0)
    try:
        recording.close()
        device.record(file).close()
    finally:
        os.close(end)
        os.waitpid(pid, 0)
        os.close(until)


def test_a_file_of_descriptor_0_is_written_to_its_end(file: Path) -> None:
    """A daemon that closed its standard input has the file there."""

    def record() -> None:
        with FakeKernel() as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
            os.close(0)
            with device.record(file):
                assert os.path.samestat(os.fstat(0), file.stat())
                device.region(0).write8(0, 1)
            assert 0 not in open_fds()

    assert in_child(record) == 0
    assert events(file) == ["w8 bar0 0x00000 0x01"]
    assert record_of(file).complete


def test_the_file_is_one_that_others_may_read_and_nobody_may_execute(device: pyvfio.Device, file: Path) -> None:
    """As far as the umask lets them."""
    former = os.umask(0)
    try:
        device.record(file).close()
    finally:
        os.umask(former)
    assert file.stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("keep", [-1, 1 << 64])
def test_a_number_of_events_that_no_list_can_keep_is_refused(device: pyvfio.Device, file: Path, keep: int) -> None:
    """Before the file is made."""
    with pytest.raises(ValueError, match=f"from 0 on, not {keep}"):
        device.record(file, keep=keep)
    assert not file.exists()


def test_a_fifo_without_a_reader_is_an_error(device: pyvfio.Device, file: Path) -> None:
    """Ctrl-C could not end a wait for the reader."""
    os.mkfifo(file)
    with pytest.raises(OSError, match="No such device or address"):
        device.record(file)


def test_a_slow_reader_of_a_fifo_makes_the_accesses_wait(device: pyvfio.Device, file: Path) -> None:
    """No event is lost, and no access fails: only the open of the FIFO does not wait."""
    os.mkfifo(file)
    reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        before = open_fds()
        with device.record(file):
            (writer,) = open_fds().keys() - before.keys()
            assert os.get_blocking(writer)
            device.region(0).write8(0, 1)
        assert os.read(reader, 1 << 16).endswith(b"begin\nw8 bar0 0x00000 0x01\nend\n")
        assert open_fds() == before
    finally:
        os.close(reader)


def test_the_header_describes_the_device(device: pyvfio.Device, file: Path) -> None:
    """Vendor, device, class, regions, vectors, capabilities, and configuration space as it is at the start."""
    device.record(file).close()
    header = record_of(file).header
    assert (header.vendor, header.device, header.class_code, header.resettable) == (0x1234, 0x11E8, 0x00FF00, True)
    assert {index: region.size for index, region in header.regions.items()} == {0: pyvfio.MIB, 7: 4096}
    assert header.irqs == {0: 1, 2: 8, 3: 1, 4: 1}
    assert header.config == device.config.read(0, 4096)
    with pyvfio.open_device(EDU, kernel=device.kernel) as edu:
        edu.record(file).close()
    assert record_of(file).header.capabilities() == [(0x40, 5)]
    assert not record_of(file).header.resettable


def test_numbers_of_the_header_are_those_bytes_of_configuration_space() -> None:
    """Whatever stands beside them; the last line, too, is read as it was printed."""
    header = Header(bytes(range(256)), resettable=False, regions={7: RegionShape(256, frozenset())})
    assert (header.vendor, header.device, header.class_code) == (0x0100, 0x0302, 0x0B0A09)
    assert parse(str(header), name="r").header == header


@pytest.mark.parametrize(
    ("status", "bytes_", "found"),
    [
        (0x10, {0x34: 0x43, 0x40: 5, 0x41: 0x53, 0x50: 0x10, 0x51: 0}, [(0x40, 5), (0x50, 0x10)]),
        (0x10, {0x34: 0x44, 0x44: 5, 0x45: 0x44}, [(0x44, 5)]),
        (0x10, {0x34: 0x40, 0x40: 5, 0x41: 0x50, 0x50: 9, 0x51: 0x42}, [(0x40, 5), (0x50, 9)]),
        (0x10, {0x34: 0x03}, []),
        (0xEF, {0x34: 0x40, 0x40: 5}, []),
        (0x00, {0x34: 0x40, 0x40: 5}, []),
    ],
    ids=["low bits", "itself", "a loop", "none", "no list", "no status"],
)
def test_capabilities_are_a_chain_of_aligned_pointers(
    status: int, bytes_: dict[int, int], found: list[tuple[int, int]]
) -> None:
    """The two low bits of a pointer are reserved. A chain that comes back to itself ends there."""
    config = bytearray(256)
    for at, value in {0x06: status, **bytes_}.items():
        config[at] = value
    assert Header(bytes(config), resettable=False).capabilities() == found


def test_regions_and_interrupts_of_the_drivers_own_have_a_number_for_a_name() -> None:
    """From the first one on that VFIO gives no name."""
    assert [region_name(index) for index in (0, 5, 8, 9, 12)] == ["bar0", "bar5", "vga", "region9", "region12"]
    assert [irq_name(index) for index in (0, 4, 5, 11)] == ["intx", "req", "irq5", "irq11"]
    text = f"{HEADER}region region9 size 0x20\nvectors irq5 2\nbegin\nr32 region9 0x1c 1\nirq irq5 1 times 3\n"
    record = parse(text, name="r")
    assert (record.header.regions[9].size, record.header.irqs) == (0x20, {5: 2})
    assert [line.event for line in record.lines] == [
        Access(write=False, region=9, offset=0x1C, width=4, data=b"\1\0\0\0"),
        Interrupt(5, 1, 3),
    ]
    assert parse(str(record.header), name="r").header == record.header


def test_a_record_that_is_printed_again_is_the_same_text(device: pyvfio.Device, file: Path) -> None:
    """Header and events: what is parsed loses nothing."""
    with device.record(file):
        device.region(0).write(0, b"abc")
        device.reset()
        device.bus_master = True
    record = record_of(file)
    text = str(record.header) + "".join(f"{line.event}\n" for line in record.lines) + "end\n"
    assert text == file.read_text(encoding="ascii")


def test_an_access_is_in_the_file_before_it_returns(device: pyvfio.Device, file: Path) -> None:
    """No buffer of the process holds a line back."""
    with device.record(file):
        for value in range(3):
            device.region(0).write32(0, value)
            assert file.read_text(encoding="ascii").endswith(f"w32 bar0 0x00000 {value:#010x}\n")


@pytest.mark.long
def test_a_program_that_is_killed_leaves_all_accesses_in_the_file(file: Path) -> None:
    """SIGKILL, which nobody can handle. The record says that the end is missing."""
    script = (
        "import os, sys, pyvfio\n"
        "from pyvfio.testing import FakeKernel\n"
        f"device = pyvfio.open_device({BDF!r}, kernel=FakeKernel())\n"
        "recording = device.record(sys.argv[1])\n"
        "for value in range(100): device.region(0).write32(4, value)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    record = record_of(file)
    assert [line.event.data for line in record.lines if isinstance(line.event, Access)] == [
        value.to_bytes(4, "little") for value in range(100)
    ]
    assert not record.complete


def test_a_line_that_was_cut_off_is_left_out() -> None:
    """A line ends with a newline, or was being written when the program died."""
    text = "pyvfio-record 1\ndevice 0000:0000 class 000000\nregion config size 0x100\nregion bar0 size 0x1000\nbegin\n"
    whole = parse(f"{text}r32 bar0 0x0 0x1\nr32 bar0 0x0 0x12", name="x")
    assert [str(line) for line in whole.lines] == ["line 6: r32 bar0 0x00000 0x00000001"]


def test_configuration_space_is_recorded_where_it_changes(device: pyvfio.Device, file: Path) -> None:
    """Each write, but one that leaves COMMAND as it is; a read only where it returns something new."""
    with device.record(file):
        device.config.read32(0)
        device.memory_enabled = True
        device.bus_master = True
        device.config.write8(0x3C, 5)
        device.config.write8(0x3C, 5)
    assert events(file) == ["w16 config 0x00004 0x0006", "w8 config 0x0003c 0x05", "w8 config 0x0003c 0x05"]


def test_a_register_of_configuration_space_that_changes_by_itself_is_seen(kernel: FakeKernel, file: Path) -> None:
    """The first read that returns the new value, and no later one."""
    with pyvfio.open_device(EDU, kernel=kernel) as edu, edu.record(file):
        edu.config.read16(PCI_COMMAND)
        kernel.pull_out(EDU)
        for _ in range(3):
            edu.config.read8(0x08)
    assert events(file) == ["r8 config 0x00008 0xff"]


def test_an_access_that_the_kernel_refuses_is_recorded_with_its_errno(device: pyvfio.Device, file: Path) -> None:
    """Memory decoding is off: EIO."""
    device.memory_enabled = False
    with device.record(file):
        with pytest.raises(pyvfio.IoctlError):
            device.region(0).read(0, 4)
        with pytest.raises(pyvfio.IoctlError):
            device.region(0).write(0, b"1234")
    assert events(file) == ["r32 bar0 0x00000 EIO", "w32 bar0 0x00000 0x34333231 EIO"]


# --------------------------------------------------------------------------------------------------------- interrupts


def test_an_interrupt_is_recorded_where_a_wait_returns_it(
    device: pyvfio.Device, kernel: FakeKernel, file: Path
) -> None:
    """With vector and count; whether the vectors were enabled before or while the device is recorded."""
    irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
    irq.enable(2)
    with device.record(file):
        kernel.interrupt(BDF, 1)
        kernel.interrupt(BDF, 1)
        device.region(0).read32(0)
        assert irq.wait(1, timeout=0) == 2
        irq.enable(2, start=2)
        kernel.interrupt(BDF, 0)
        kernel.interrupt(BDF, 3)
        assert irq.wait_any(timeout=0) == {0: 1, 3: 1}
    assert events(file) == [
        "r32 bar0 0x00000 0x00000000",
        "irq msix 1 times 2",
        "irq msix 0 times 1",
        "irq msix 3 times 1",
    ]


def test_each_vector_of_a_change_is_recorded_with_its_number(
    device: pyvfio.Device, kernel: FakeKernel, file: Path
) -> None:
    """First, middle and last; a vector left out has no eventfd, and the others keep their numbers."""
    irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
    with device.record(file):
        irq.enable(3, start=2)
        for vector in (2, 3, 4):
            kernel.interrupt(BDF, vector)
            assert irq.wait(vector, timeout=0) == 1
    assert events(file) == [f"irq msix {vector} times 1" for vector in (2, 3, 4)]


def test_a_signal_of_the_program_is_the_one_of_its_vector(
    device: pyvfio.Device, kernel: FakeKernel, file: Path
) -> None:
    """The other vectors are the device's alone."""
    irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
    with device.record(file):
        irq.enable(3)
        irq.trigger(1)
        for vector in range(3):
            kernel.interrupt(BDF, vector)
        assert irq.wait_any(timeout=0) == {0: 1, 1: 2, 2: 1}
    assert events(file) == [f"irq msix {vector} times 1" for vector in range(3)]


def test_masking_and_unmasking_are_no_signals(kernel: FakeKernel, file: Path) -> None:
    """The interrupts behind them are the device's, and an eventfd that unmasks is that of no vector."""
    with pyvfio.open_device(EDU, kernel=kernel) as device, device.record(file):
        irq, bar = device.irq(ioctls.VFIO_PCI_INTX_IRQ_INDEX), device.region(0)
        irq.enable(1)
        irq.mask()
        irq.unmask()
        unmasking = os.eventfd(0, os.EFD_NONBLOCK)
        irq.unmask_by(unmasking)
        bar.write32(_RAISE, 1)
        assert irq.wait(timeout=0) == 1
        assert events(file)[-1] == "irq intx 0 times 1"
        os.close(unmasking)


def test_signals_of_the_program_are_not_the_devices(device: pyvfio.Device, kernel: FakeKernel, file: Path) -> None:
    """`trigger` adds to the counter, and the record has the rest."""
    irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
    with device.record(file):
        irq.enable(1)
        irq.trigger()
        assert irq.wait(timeout=0) == 1
        irq.trigger()
        kernel.interrupt(BDF)
        assert irq.wait(timeout=0) == 2
    assert events(file) == ["irq msix 0 times 1"]


def test_interrupts_go_on_when_the_recording_has_ended(device: pyvfio.Device, kernel: FakeKernel, file: Path) -> None:
    """Vectors that were enabled while the device was recorded."""
    irq = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
    with device.record(file):
        irq.enable(1)
    kernel.interrupt(BDF)
    assert irq.wait(timeout=0) == 1
    assert events(file) == []


class SignallingKernel(FakeKernel):
    """Sends this process SIGUSR1 when an eventfd has been read, once."""

    armed = False

    def eventfd_read(self, fd: int) -> int:
        """As of the fake."""
        count = super().eventfd_read(fd)
        if self.armed:
            self.armed = False
            os.kill(os.getpid(), signal.SIGUSR1)
        return count


class InterruptionError(Exception):
    """Raised by a signal handler."""


@pytest.mark.parametrize("later", [0, 1, 3])
def test_a_signal_handler_that_raises_loses_no_interrupt(file: Path, later: int) -> None:
    """The next wait returns the count with all that came since, and the record has each interrupt once."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise InterruptionError

    former = signal.signal(signal.SIGUSR1, handler)
    try:
        with SignallingKernel() as kernel, pyvfio.open_device(BDF, kernel=kernel) as device, device.record(file):
            irq = device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
            irq.enable(1)
            kernel.interrupt(BDF)
            kernel.armed = True
            with pytest.raises(InterruptionError):
                irq.wait(timeout=0)
            for _ in range(later):
                kernel.interrupt(BDF)
            assert irq.wait(timeout=0) == 1 + later
    finally:
        signal.signal(signal.SIGUSR1, former)
    times = [1, *([later] if later else [])]
    assert [line.event for line in record_of(file).lines] == [Interrupt(1, 0, each) for each in times]


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_mapping_cannot_be_recorded_unless_the_caller_says_so(device: pyvfio.Device, file: Path) -> None:
    """Loads and stores through a view are seen by nobody, so the mapping alone is noted."""
    with device.record(file), pytest.raises(pyvfio.UnsupportedError, match="allow_mmap"):
        device.region(0).mmap()
    with device.region(0).mmap():
        with pytest.raises(pyvfio.VfioError, match="allow_mmap"):
            device.record(file)
        device.record(file, allow_mmap=True).close()
    with device.record(file, allow_mmap=True), device.region(0).mmap(0x1000, 0x2000) as mapped, mapped.view() as view:
        view[0] = 1
    assert events(file) == ["mmap bar0 0x01000 size 0x2000"]


def test_windows_of_a_recording_are_unmapped_with_it(kernel: FakeKernel, file: Path) -> None:
    """And the file is closed: a program that records a device for each of a thousand tests keeps nothing."""
    before = open_fds()
    with pyvfio.open_device(BDF, kernel=kernel) as device:
        memory = device_areas()
        for _ in range(2):
            with device.record(file):
                device.region(0).write8(0, 1)
                assert device_areas() == memory + 1
            assert device_areas() == memory
    assert open_fds() == before


@pytest.mark.parametrize("order", ["first", "second"])
def test_recordings_may_overlap(device: pyvfio.Device, kernel: FakeKernel, tmp_path: Path, order: str) -> None:
    """Each has the events of its time, interrupts too, and the device goes on when both have ended."""
    irq, bar = device.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX), device.region(0)
    first = device.record(tmp_path / "first")
    bar.write8(0, 1)
    second = device.record(tmp_path / "second")
    irq.enable(1)
    kernel.interrupt(BDF)
    assert irq.wait(timeout=0) == 1
    ends = [first, second] if order == "first" else [second, first]
    ends[0].close()
    last = ends[0].last
    bar.write8(0, 2)
    bar.read(0, 3)
    assert ends[0].last == last
    ends[1].close()
    bar.write8(0, 3)
    assert device.seam is kernel
    common, one = "irq msix 0 times 1", "w8 bar0 0x00000 0x01"
    late = ["w8 bar0 0x00000 0x02", "read bar0 0x00000 3 020000"]
    assert events(tmp_path / "first") == [one, common, *([] if order == "first" else late)]
    assert events(tmp_path / "second") == [common, *(late if order == "first" else [])]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"path": b"bytes"}, TypeError),
        ({"path": 3}, TypeError),
        ({"times": 1}, TypeError),
        ({"allow_mmap": "yes"}, TypeError),
        ({"keep": 1.5}, TypeError),
        ({"keep": -1}, ValueError),
        ({"path": "/nowhere/at/all"}, OSError),
    ],
)
def test_arguments_that_can_never_be_right_start_no_recording(
    device: pyvfio.Device, arguments: dict[str, object], error: type[Exception]
) -> None:
    """Another recording can be started afterwards."""
    with pytest.raises(error):
        device.record(**arguments)  # type: ignore[arg-type]
    device.record().close()


def test_the_last_events_are_kept_without_a_file(device: pyvfio.Device) -> None:
    """As many as `keep` says, the oldest first."""
    with device.record(keep=2) as recording:
        for value in range(4):
            device.region(0).write8(0, value)
        assert recording.last == ("w8 bar0 0x00000 0x02", "w8 bar0 0x00000 0x03")


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (1, [3]), (4, [0, 1, 2, 3]), (sys.maxsize, [0, 1, 2, 3])])
def test_a_recording_keeps_any_number_of_events(device: pyvfio.Device, keep: int, kept: list[int]) -> None:
    """From none to all of them."""
    with device.record(keep=keep) as recording:
        for value in range(4):
            device.region(0).write8(0, value)
        assert recording.last == tuple(f"w8 bar0 0x00000 {value:#04x}" for value in kept)


def test_a_closed_device_is_not_recorded(kernel: FakeKernel, file: Path) -> None:
    """And no file is made."""
    device = pyvfio.open_device(BDF, kernel=kernel)
    device.record().close()
    device.close()
    with pytest.raises(pyvfio.ClosedError):
        device.record(file)
    assert not file.exists()


def test_a_mapping_that_another_thread_makes_while_a_recording_begins_is_seen(
    device: pyvfio.Device, kernel: FakeKernel, file: Path
) -> None:
    """The recording does not begin, and its file is closed."""
    device.record().close()
    before, heard = open_fds(), list[str]()

    def record() -> None:
        try:
            device.record(file).close()
        except pyvfio.VfioError as error:
            heard.append(str(error))

    thread = threading.Thread(target=record, daemon=True)
    with device.windows.guard.lock:
        thread.start()
        while not file.exists():
            assert thread.is_alive()
        mapped = device.region(0).mmap()
    thread.join(20)
    assert [text for text in heard if "is mapped by Region.mmap" in text] == heard != []
    assert (open_fds(), device.seam) == (before, kernel)
    mapped.close()
    device.record(file).close()


def test_times_are_relative_to_the_first_event(device: pyvfio.Device, file: Path) -> None:
    """They ascend, and the record is read as one without times."""
    with device.record(file, times=True):
        for _ in range(3):
            device.region(0).read8(0)
    lines = [line for line in file.read_text(encoding="ascii").splitlines() if line.startswith("r8")]
    times = [float(line.partition("@")[2]) for line in lines]
    assert times == sorted(times)
    assert times[0] == 0
    assert events(file) == ["r8 bar0 0x00000 0x00"] * 3


def test_the_kernel_of_the_device_is_the_same_while_it_is_recorded(device: pyvfio.Device, kernel: FakeKernel) -> None:
    """Blocks and mappers take it, and compare it."""
    with (
        device.record(),
        pyvfio.RamBlockList(kernel=device.kernel) as blocks,
        pyvfio.DmaMapper(device.container, blocks) as mapper,
    ):
        assert device.kernel is kernel
        assert device.region(0).kernel is kernel
        mapper.iova(blocks.add("ring", used_length=4096, max_length=4096))


def calls_of(region: pyvfio.Region, register: pyvfio.Register, count: int) -> int:
    """How many functions in Python run for so many reads and writes of a register."""
    seen = 0

    def count_calls(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal seen
        seen += event == "call"

    sys.setprofile(count_calls)
    try:
        for _ in range(count):
            region.read32(0)
            register.read()
            region.write32(0, 1)
            register.write(1)
    finally:
        sys.setprofile(None)
    return seen


def test_a_device_that_is_not_recorded_pays_nothing(device: pyvfio.Device) -> None:
    """One function for each access, before a recording and after: no look at whether there is a recorder."""
    region, register = device.region(0), device.region(0).register32(0)
    region.read32(0)
    register.read()
    assert calls_of(region, register, 100) == 400
    with device.record():
        assert calls_of(region, register, 100) > 400
    region.read32(0)
    register.read()
    assert calls_of(region, register, 100) == 400


def test_a_recording_that_outlives_the_device_can_be_closed(kernel: FakeKernel, file: Path) -> None:
    """The end of the device is in the record."""
    device = pyvfio.open_device(BDF, kernel=kernel)
    recording = device.record(file)
    device.bus_master = True
    device.close()
    recording.close()
    recording.close()
    assert events(file) == ["w16 config 0x00004 0x0006", "w16 config 0x00004 0x0002", "reset"]


def test_threads_write_whole_lines_in_the_order_of_their_accesses(device: pyvfio.Device, file: Path) -> None:
    """Each line is one access; each thread's are in its order; the last value in the file is the register's."""
    bar, most = device.region(0), 200

    def work(number: int) -> None:
        for value in range(most):
            bar.write32(8 * number, value)
            bar.write32(0x100, number)

    with device.record(file):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    accesses = [line.event for line in record_of(file).lines if isinstance(line.event, Access)]
    assert len(accesses) == 2 * 4 * most
    for number in range(4):
        own = [each.data for each in accesses if each.offset == 8 * number]
        assert own == [value.to_bytes(4, "little") for value in range(most)]
    shared = [each.data for each in accesses if each.offset == 0x100]
    assert shared[-1] == bar.read32(0x100).to_bytes(4, "little")


def test_a_child_writes_nothing_into_the_record_of_its_parent(device: pyvfio.Device, file: Path) -> None:
    """Accesses are ForkedError, and the end of the child closes nothing."""
    with device.record(file) as recording:
        device.region(0).write8(0, 1)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                recording.close()
                _ = recording.last
            except pyvfio.ForkedError as error:
                with pytest.raises(pyvfio.ForkedError):
                    device.region(0).read8(0)
                status = 1 - (f"the record {file} belongs to process" in str(error))
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        device.region(0).write8(0, 2)
    assert events(file) == ["w8 bar0 0x00000 0x01", "w8 bar0 0x00000 0x02"]


@dataclass
class Region:
    """Where a region is in the descriptor of a device."""

    index: int
    offset: int
    size: int


def test_an_access_is_in_the_region_that_has_its_first_byte(tmp_path: Path) -> None:
    """Also where one region is directly behind another. Elsewhere in the descriptor nothing is reported."""
    contents = tmp_path / "device"
    contents.write_bytes(bytes(range(0x40)))
    fd = os.open(contents, os.O_RDWR)
    with EventLog(None, None, times=False, keep=9) as log:
        seam = RecordingKernel(
            LinuxKernel(),
            log,
            regions=lambda: (Region(0, 0x10, 0x10), Region(9, 0x20, 0x10)),
            config=b"",
            allow_mmap=False,
        )
        for at in (0xF, 0x10, 0x1F, 0x20, 0x2F, 0x30):
            assert seam.pread(fd, 1, at) == bytes([at])
        assert log.tail() == (
            "r8 bar0 0x00000 0x10",
            "r8 bar0 0x0000f 0x1f",
            "r8 region9 0x00000 0x20",
            "r8 region9 0x0000f 0x2f",
        )
    os.close(fd)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENXIO, errno.EINVAL])
def test_the_errno_of_a_refused_access_is_the_one_of_the_kernel(
    device: pyvfio.Device, kernel: FakeKernel, file: Path, number: int
) -> None:
    """A later access of the same place is recorded with its value."""
    bar, name = device.region(0), errno.errorcode[number]
    with device.record(file):
        for call, act in (("pread", lambda: bar.read(0, 3)), ("pwrite", lambda: bar.write(0, b"abc"))):
            kernel.fail(call=call, errno=number)
            with pytest.raises(pyvfio.VfioError):
                act()
            act()
    assert events(file) == [
        f"read bar0 0x00000 3 {name}",
        "read bar0 0x00000 3 000000",
        f"write bar0 0x00000 616263 {name}",
        "write bar0 0x00000 616263",
    ]


def test_a_driver_with_dma_is_recorded_as_it_runs(kernel: FakeKernel, file: Path) -> None:
    """Transfers of an edu, whose data is not in the record."""
    with (
        pyvfio.open_device(EDU, kernel=kernel) as device,
        device.record(file),
        pyvfio.RamBlockList(kernel=kernel) as blocks,
        pyvfio.DmaMapper(device.container, blocks) as mapper,
    ):
        block = blocks.add("ring", used_length=4096, max_length=4096)
        device.bus_master = True
        with block.view() as view:
            view[:5] = b"hello"
        Edu(device.region(0)).read_memory(mapper.iova(block), 5)
    assert any(line.startswith("w64 bar0 0x00080") for line in events(file))
    assert b"hello".hex() not in file.read_text(encoding="ascii")


HEADER = "pyvfio-record 1\ndevice 0000:0000 class 000000\nregion bar0 size 0x1000\nregion config size 0x100\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 0),
        ("pyvfio-record 2\n", 1),
        (f"pyvfio-record 2\n{HEADER.partition(chr(10))[2]}begin\n", 1),
        ("pyvfio-record 1\nregion config size 0x100\nbegin\n", 3),
        (f"{HEADER}nonsense\nbegin\n", 5),
        (f"{HEADER}region config size 0x200\nbegin\n", 6),
        (f"{HEADER}vectors msi many\nbegin\n", 5),
        (f"{HEADER}begin\nirq msi 0 times 1\n", 6),
        (f"{HEADER}vectors msi 4\nbegin\nirq msi 4 times 1\n", 7),
        (f"{HEADER}begin\nread bar0 0x10 -4 EIO\n", 6),
        (f"{HEADER}begin\nmmap bar0 0x1000 size 0x1000\n", 6),
        (HEADER, 4),
        (f"{HEADER}nonsense\n", 5),
        (f"{HEADER}config 0xff 01 02\nbegin\n", 6),
        (f"{HEADER}config 0x0 34 12\nbegin\n", 6),
        (f"{HEADER}begin\nr32 bar1 0x0 0x1\n", 6),
        (f"{HEADER}begin\nr32 bar0 0x0\n", 6),
        (f"{HEADER}begin\nr33 bar0 0x0 0x1\n", 6),
        (f"{HEADER}begin\nw8 bar0 0x0 0x100\n", 6),
        (f"{HEADER}begin\nr32 bar0 zero 0x1\n", 6),
        (f"{HEADER}begin\nr32 bar0 0x0 0x1 0x2\n", 6),
        (f"{HEADER}begin\nirq lost 0 times 1\n", 6),
        (f"{HEADER}begin\nread bar0 0x0 4 0102\n", 6),
        (f"{HEADER}begin\nend\nreset\n", 7),
        ("pyvfio-record 1\ndevice 0000:0000 class 000000\nbegin\n", 3),
    ],
)
def test_a_file_in_another_format_is_refused_with_the_line(text: str, line: int) -> None:
    """Not half read."""
    with pytest.raises(ValueError, match=rf"^x\.record:{line}: "):
        parse(text, name="x.record")


def test_a_mapping_of_a_region_that_is_smaller_than_a_page_is_read() -> None:
    """Its size is one of whole pages."""
    text = f"{HEADER}region bar2 size 0x1\nbegin\nmmap bar2 0x0 size 0x1000\n"
    assert [str(line.event) for line in parse(text, name="x").lines] == ["mmap bar2 0x00000 size 0x1000"]


def test_comments_and_empty_lines_may_stand_anywhere() -> None:
    """For whoever keeps a record beside a test."""
    record = parse(f"{HEADER}# by hand\n\nbegin\nreset  # the first\n", name="x")
    assert [str(line) for line in record.lines] == ["line 8: reset"]


def test_a_device_with_io_ports_and_unmappable_parts_is_recorded(file: Path) -> None:
    """Accesses that are system calls, and those of windows, look the same."""
    bars = {0: Bar(0x4000, sparse=((0x1000, 0x1000),)), 2: Bar(32, io=True), 3: Bar(0x1000)}
    with (
        FakeKernel(groups=[(2, [FakeDevice(BDF, bars=bars)])]) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
        device.record(file),
    ):
        device.region(0).write32(0x0, 1)
        device.region(0).write32(0x1000, 2)
        device.region(2).write16(4, 3)
        assert device.region(2).read8(5) == 0
        device.region(3).write64(8, (1 << 64) - 1)
        assert device.region(3).read8(15) == 0xFF
    assert events(file) == [
        "w32 bar0 0x00000 0x00000001",
        "w32 bar0 0x01000 0x00000002",
        "w16 bar2 0x00004 0x0003",
        "r8 bar2 0x00005 0x00",
        "w64 bar3 0x00008 0xffffffffffffffff",
        "r8 bar3 0x0000f 0xff",
    ]
    assert record_of(file).header.regions[0].sparse == ((0x1000, 0x1000),)
