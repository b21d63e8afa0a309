"""Fake devices that do something: QEMU's edu, and those that a test writes on the base class."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import LinuxKernel
from pyvfio.testing.edu import Edu
from pyvfio.testing.fake import VERSIONS, DmaFault, FakeEdu, FakeKernel, FakePciDevice
from pyvfio.testing.probe import pattern
from pyvfio.testing.world import FakeWorld
from pyvfio.units import GIB, MIB, PAGE_SIZE, Vaddr
from tests.unit.test_fake import attach, open_device

BDF = "0000:00:02.0"
INTX, MSI = ioctls.VFIO_PCI_INTX_IRQ_INDEX, ioctls.VFIO_PCI_MSI_IRQ_INDEX
IOVA = 0x10_0000
BUFFER = 0x40000


@dataclass
class Bench:
    """An open device on a fake kernel, with two pages of memory at `IOVA` that it may read and write."""

    kernel: FakeKernel
    device: pyvfio.Device
    vaddr: Vaddr

    @property
    def bar(self) -> pyvfio.Region:
        """BAR 0."""
        return self.device.region(0)

    def put(self, data: bytes, offset: int = 0) -> None:
        """Into memory."""
        self.kernel.dma_write(BDF, IOVA + offset, data)

    def get(self, size: int, offset: int = 0) -> bytes:
        """From memory."""
        return self.kernel.dma_read(BDF, IOVA + offset, size)

    def copy(self, *, source: int, destination: int, count: int, command: int) -> None:
        """Program edu's engine."""
        for register, value in ((0x80, source), (0x88, destination), (0x90, count), (0x98, command)):
            self.bar.write64(register, value)


def bench_of(kernel: FakeKernel) -> Iterator[Bench]:
    """Open, map, switch on; and all back."""
    vaddr = LinuxKernel().mmap(0, 2 * PAGE_SIZE, 3, 0x22)
    with kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        device.container.map_dma(vaddr=vaddr, iova=IOVA, size=2 * PAGE_SIZE)
        device.memory_enabled = True
        device.bus_master = True
        yield Bench(kernel, device, vaddr)
    LinuxKernel().munmap(vaddr, 2 * PAGE_SIZE)


@pytest.fixture(params=list(VERSIONS))
def edu(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """With an edu, as each kernel."""
    yield from bench_of(FakeKernel(request.param))


# ------------------------------------------------------------------------------------------------------ edu: registers


def test_it_identifies_itself_and_its_liveness_register_inverts(edu: Bench) -> None:
    assert edu.bar.read32(0) == 0x010000ED
    edu.bar.write32(4, 0x12345678)
    assert edu.bar.read32(4) == 0xEDCBA987


@pytest.mark.parametrize("number", [0, 1, 12, 13, 33, 34, 0xFFFF_FFFF])
def test_its_factorial_is_that_of_32_bits(edu: Bench, number: int) -> None:
    edu.bar.write32(8, number)
    assert edu.bar.read32(8) == math.factorial(min(number, 40)) & 0xFFFF_FFFF
    assert edu.bar.read32(0x20) & 1 == 0


def test_a_factorial_raises_an_interrupt_when_that_is_asked_for(edu: Bench) -> None:
    edu.bar.write32(8, 5)
    assert edu.bar.read32(0x24) == 0
    edu.bar.write32(0x20, 0x80)
    edu.bar.write32(8, 5)
    assert (edu.bar.read32(0x20), edu.bar.read32(0x24)) == (0x80, 1)


def test_what_is_no_register_reads_all_ones_and_takes_nothing(edu: Bench) -> None:
    assert edu.bar.read32(0x40) == 0xFFFF_FFFF
    edu.bar.write32(0x40, 1)
    assert edu.bar.read32(0x40) == 0xFFFF_FFFF


@pytest.mark.parametrize("width", [1, 2, 8])
def test_a_register_below_0x80_takes_four_bytes_at_a_time_only(edu: Bench, width: int) -> None:
    registers = edu.kernel.registers(edu.device.fd, 0, PAGE_SIZE)
    registers.write(4, width, 0) if width < 8 else registers.write(0, width, 0)
    assert registers.read(0, width) == (1 << 8 * width) - 1
    assert registers.read(4, 4) == 0


def test_registers_are_the_same_through_a_window_and_through_pread(edu: Bench) -> None:
    edu.bar.write32(4, 7)
    assert edu.bar.read(4, 4) == edu.bar.read32(4).to_bytes(4, "little")
    edu.bar.write(0x80, (5 * GIB).to_bytes(8, "little"))
    expected = 5 * GIB if edu.kernel.version.eight_byte_access else 5 * GIB & 0xFFFF_FFFF
    assert edu.bar.read64(0x80) == expected


# ------------------------------------------------------------------------------------------------------------ edu: DMA


def test_it_carries_memory_into_its_buffer_and_back_to_memory(edu: Bench) -> None:
    sent = pattern(4096)
    edu.put(sent)
    edu.copy(source=IOVA, destination=BUFFER, count=4096, command=1)
    edu.copy(source=BUFFER, destination=IOVA + PAGE_SIZE, count=4096, command=3)
    assert edu.get(4096, PAGE_SIZE) == sent
    assert edu.bar.read64(0x98) & 1 == 0
    assert edu.kernel.faults == []


def test_a_part_of_the_buffer_goes_to_where_it_is_sent_and_nowhere_else(edu: Bench) -> None:
    before, sent = pattern(256), pattern(64)
    edu.put(sent, PAGE_SIZE)
    edu.put(before)
    edu.copy(source=IOVA + PAGE_SIZE, destination=BUFFER + 100, count=64, command=1)
    edu.copy(source=BUFFER + 110, destination=IOVA + 50, count=20, command=3)
    assert edu.get(256) == before[:50] + sent[10:30] + before[70:]


def test_a_command_without_the_start_bit_moves_nothing(edu: Bench) -> None:
    before = pattern(64)
    edu.put(before)
    edu.copy(source=BUFFER, destination=IOVA, count=64, command=2)
    assert edu.get(64) == before


@pytest.mark.parametrize("write", [False, True])
def test_a_stopped_transfer_leaves_buffer_and_memory_alone_and_is_on_record(edu: Bench, *, write: bool) -> None:
    kept, told = pattern(64), list[DmaFault]()
    edu.put(kept)
    edu.copy(source=IOVA, destination=BUFFER, count=64, command=1)
    edu.kernel.on_fault = told.append
    if write:
        edu.copy(source=BUFFER, destination=9 * MIB, count=64, command=3)
    else:
        edu.copy(source=9 * MIB, destination=BUFFER, count=64, command=1)
    (fault,) = edu.kernel.faults
    assert (fault.bdf, fault.iova, fault.write, fault.reason) == (BDF, 9 * MIB, write, "nothing is mapped there")
    assert told == [fault]
    edu.copy(source=BUFFER, destination=IOVA + 64, count=64, command=3)
    assert edu.get(128) == kept + kept


def test_what_is_mapped_for_reading_is_not_written(edu: Bench) -> None:
    edu.device.container.map_dma(vaddr=edu.vaddr, iova=9 * MIB, size=PAGE_SIZE, flags=ioctls.VFIO_DMA_MAP_FLAG_READ)
    kept = pattern(64)
    edu.put(kept)
    edu.copy(source=BUFFER, destination=9 * MIB, count=64, command=3)
    assert [(fault.iova, fault.reason) for fault in edu.kernel.faults] == [
        (9 * MIB, "the mapping does not allow the access")
    ]
    assert edu.get(64) == kept


@pytest.mark.parametrize("write", [False, True])
def test_without_bus_mastering_nothing_is_moved_and_the_fault_says_so(edu: Bench, *, write: bool) -> None:
    edu.device.bus_master = False
    kept = pattern(64)
    edu.put(kept)
    edu.copy(
        source=BUFFER if write else IOVA, destination=IOVA if write else BUFFER, count=64, command=3 if write else 1
    )
    assert [fault.reason for fault in edu.kernel.faults] == ["bus mastering is off"]
    edu.device.bus_master = True
    edu.copy(source=BUFFER, destination=IOVA + 64, count=64, command=3)
    assert edu.get(128) == kept + bytes(64)


@pytest.mark.parametrize(("start", "count"), [(BUFFER - 1, 1), (BUFFER, 4097), (BUFFER + 4096, 1), (0, 8)])
def test_a_transfer_that_leaves_the_buffer_is_a_value_error_where_qemu_ends(edu: Bench, start: int, count: int) -> None:
    with pytest.raises(ValueError, match="0x40000-0x40fff"):
        edu.copy(source=IOVA, destination=start, count=count, command=1)


def test_a_transfer_into_memory_that_the_process_took_away_is_an_assertion_with_both_addresses(edu: Bench) -> None:
    edu.kernel.mprotect(edu.vaddr, PAGE_SIZE, 0)
    with pytest.raises(AssertionError, match=f"{IOVA:#x}.*{edu.vaddr:#x}"):
        edu.copy(source=BUFFER, destination=IOVA, count=64, command=3)
    with pytest.raises(AssertionError, match="mprotect took"):
        edu.kernel.check()


# ----------------------------------------------------------------------------------------------------- edu: interrupts


def test_the_end_of_a_transfer_is_an_interrupt_only_when_asked_for(edu: Bench) -> None:
    irq = edu.device.irq(MSI)
    irq.enable(1)
    edu.copy(source=IOVA, destination=BUFFER, count=8, command=1)
    assert irq.wait(timeout=0) == 0
    edu.copy(source=IOVA, destination=BUFFER, count=8, command=5)
    assert irq.wait(timeout=0) == 1
    assert Edu(edu.bar).acknowledge_interrupt() == 0x100
    assert edu.bar.read32(0x24) == 0


def test_a_message_is_a_write_and_lost_without_bus_mastering(edu: Bench) -> None:
    irq = edu.device.irq(MSI)
    irq.enable(1)
    edu.device.bus_master = False
    edu.bar.write32(0x60, 1)
    assert irq.wait(timeout=0) == 0


def test_intx_comes_again_after_an_unmask_until_it_is_acknowledged(edu: Bench) -> None:
    irq = edu.device.irq(INTX)
    irq.enable(1)
    edu.bar.write32(0x60, 3)
    assert irq.wait(timeout=0) == 1
    irq.unmask()
    assert irq.wait(timeout=0) == 1, "the line is still up"
    edu.bar.write32(0x64, 1)
    irq.unmask()
    assert irq.wait(timeout=0) == 1, "one cause is left"
    edu.bar.write32(0x64, 2)
    irq.unmask()
    assert irq.wait(timeout=0) == 0


def test_an_intx_that_was_up_before_it_is_enabled_comes_at_once(edu: Bench) -> None:
    edu.bar.write32(0x60, 1)
    irq = edu.device.irq(INTX)
    irq.enable(1)
    assert irq.wait(timeout=0) == 1


# ----------------------------------------------------------------------------------------- a device of a test's own


class Summer(FakePciDevice):
    """Adds up the bytes at the IOVA that is written to its doorbell, by vector 1, and in a BAR of its own number 2."""

    vendor, device = 0xABCD, 0x0001
    bar_sizes = {0: PAGE_SIZE, 2: 16}  # noqa: RUF012
    msi = 4
    config = {0x08: b"\x07", 0x2C: b"\x34\x12"}  # noqa: RUF012

    def reset(self) -> None:
        """Nothing was added up."""
        self.total = 0

    def read_register(self, bar: int, _offset: int, _width: int, /) -> int:
        """BAR 0: the sum; BAR 2: too much for its width."""
        return self.total if bar == 0 else (1 << 70) - 1

    def write_register(self, _bar: int, _offset: int, _width: int, value: int, /) -> None:
        """The doorbell."""
        self.total += sum(self.dma_read(value, 16))
        self.raise_interrupt(1)


@pytest.fixture
def summer() -> Iterator[Bench]:
    """With a Summer."""
    yield from bench_of(FakeKernel(groups=[(2, [Summer(BDF)])]))


def test_a_device_of_ones_own_reads_memory_and_raises_its_second_vector(summer: Bench) -> None:
    irq = summer.device.irq(MSI)
    irq.enable(2)
    summer.put(bytes(range(16)))
    summer.bar.write64(0, IOVA)
    assert summer.bar.read32(0) == sum(range(16))
    assert (irq.wait(0, timeout=0), irq.wait(1, timeout=0)) == (0, 1)


def test_it_looks_as_its_class_says(summer: Bench) -> None:
    config = summer.device.config
    assert (config.read16(0), config.read16(2)) == (0xABCD, 1)
    assert (config.read8(8), config.read16(0x2C)) == (7, 0x1234)
    config.write8(8, 1)
    assert config.read8(8) == 7, "read-only"
    assert [summer.device.region(bar).size for bar in range(3)] == [PAGE_SIZE, 0, 16]
    assert summer.device.irq(MSI).count == 4
    assert summer.device.region(2).read16(0) == 0xFFFF


def test_it_is_reset_by_its_driver_and_by_the_next_that_opens_it(summer: Bench) -> None:
    summer.put(b"\1" * 16)
    summer.bar.write64(0, IOVA)
    assert summer.bar.read32(0) == 16
    summer.device.reset()
    assert summer.bar.read32(0) == 0
    summer.bar.write64(0, IOVA)
    second = summer.device.group.get_device_fd(BDF)
    assert summer.bar.read32(0) == 16, "one that is open is not reset by a second descriptor"
    summer.device.kernel.close(second)
    assert summer.bar.read32(0) == 16


def test_closing_its_last_descriptor_takes_it_off_the_bus() -> None:
    device = Summer(BDF)
    with FakeKernel(groups=[(2, [device])]) as kernel:
        fd = open_device(kernel, attach(kernel)[1])
        kernel.pwrite(fd, b"\6", (ioctls.VFIO_PCI_CONFIG_REGION_INDEX << 40) + 4)
        states = [device.bus_master]
        kernel.close(fd)
        states.append(device.bus_master)
        assert states == [True, False]
        with pytest.raises(DmaFault, match="bus mastering is off"):
            device.dma_read(IOVA, 1)


def test_one_without_a_reset_keeps_its_registers_from_one_driver_to_the_next() -> None:
    with FakeKernel() as kernel:
        with pyvfio.open_device(BDF, kernel=kernel) as first:
            first.region(0).write32(4, 1)
        with pyvfio.open_device(BDF, kernel=kernel) as second:
            assert second.region(0).read32(4) == 0xFFFF_FFFE


def test_a_fault_that_a_device_does_not_catch_comes_out_of_the_drivers_write(summer: Bench) -> None:
    with pytest.raises(DmaFault, match="stopped at IOVA 0x900000: nothing is mapped there"):
        summer.bar.write64(0, 9 * MIB)


def test_without_memory_decoding_a_window_is_a_bus_error_in_words(summer: Bench) -> None:
    window = summer.kernel.registers(summer.device.fd, 0, PAGE_SIZE)
    assert window.read(0, 4) == 0
    summer.device.memory_enabled = False
    with pytest.raises(AssertionError, match="SIGBUS"):
        window.read(0, 4)
    with pytest.raises(AssertionError, match="SIGBUS"):
        window.write(0, 4, 0)


def test_a_raw_mapping_of_its_bar_is_memory_without_side_effects(summer: Bench) -> None:
    summer.put(b"\1" * 16)
    with summer.bar.mmap() as mapped, mapped.view() as view:
        view[:8] = IOVA.to_bytes(8, "little")
    assert summer.bar.read32(0) == 0


def test_a_thread_of_the_devices_own_may_do_all_that_its_registers_may(summer: Bench) -> None:
    device = Summer("0000:00:04.0")
    with FakeKernel(groups=[(4, [device])]) as kernel, pyvfio.open_device(device.bdf, kernel=kernel) as opened:
        opened.bus_master = True
        irq = opened.irq(INTX)
        irq.enable(1)
        thread = threading.Thread(target=device.raise_interrupt)
        with device.lock:
            device.total = 1
        thread.start()
        assert irq.wait(timeout=60) == 1
        thread.join()
        device.lower_interrupt()


def test_a_device_is_in_one_kernel_and_in_no_other() -> None:
    device = FakeEdu(BDF)
    with pytest.raises(RuntimeError, match="in no fake kernel"):
        device.dma_read(IOVA, 1)
    with FakeKernel(groups=[(2, [device])]), pytest.raises(ValueError, match="make another FakeEdu"):
        FakeKernel(groups=[(2, [device])])


def test_configuration_space_that_cannot_be_given_is_a_value_error() -> None:
    class Greedy(Summer):
        config = {4: b"\0\0"}  # noqa: RUF012 (COMMAND is the driver's)

    class Long(Summer):
        config = {255: b"\0\0"}  # noqa: RUF012

    for kind, words in ((Greedy, "at 0x4"), (Long, "at 0xff")):
        with pytest.raises(ValueError, match=words):
            kind(BDF)


def test_a_watch_sees_the_faults_from_its_beginning_on(edu: Bench) -> None:
    world = FakeWorld(edu.kernel)
    edu.copy(source=9 * MIB, destination=BUFFER, count=64, command=1)
    with world.watch_faults() as log:
        assert log.lines(timeout=0) == []
        edu.copy(source=8 * MIB, destination=BUFFER, count=64, command=1)
        (line,) = log.lines(timeout=0)
    assert f"{8 * MIB:#x}" in line


def test_the_limit_of_mappings_is_that_of_containers_opened_later(edu: Bench) -> None:
    edu.kernel.dma_entry_limit = 3
    assert edu.device.container.entries_left == 65534
    with pyvfio.open_device("0000:00:03.0", kernel=edu.kernel) as other:
        assert other.container.entries_left == 3
