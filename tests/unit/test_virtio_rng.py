"""The example of a driver, examples/virtio_rng.py, on the fake kernel with its fake device; and its pure parts."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

import pyvfio
import virtio
from fake_virtio_rng import FakeVirtioRng
from pyvfio.testing import FakeEdu, FakeKernel, FakePciDevice
from pyvfio.units import PAGE_SIZE
from virtio_rng import BUFFER, FILL, LOW, NeedsResetError, Report, VirtioRng, draw, fill, try_behind_the_end

BDF = "0000:00:04.0"
EXAMPLE = Path(__file__).resolve().parents[2] / "examples/virtio_rng.py"

Iommu = Literal["type1", "iommufd"]


# ------------------------------------------------------------------------------------------------------- capabilities


def config_space(*capabilities: tuple[int, bytes], listed: bool = True) -> bytes:
    """Configuration space with a chain of capabilities, each at its place, the second byte of each left out."""
    space = bytearray(256)
    space[0x06] = 0x10 if listed else 0
    following = 0x34
    for pointer, data in capabilities:
        space[following], at = pointer, pointer & 0xFC
        space[at], space[at + 2 : at + 1 + len(data)] = data[0], data[1:]
        following = at + 1
    return bytes(space)


def capability(kind: int, *, bar: int = 4, offset: int = 0, multiplier: int = 0) -> bytes:
    """struct virtio_pci_notify_cap, without cap_next."""
    return struct.pack("<7B3I", 9, 20, kind, bar, 0, 0, 0, offset, 0x100, multiplier)


def test_structures_are_found_behind_capabilities_of_other_kinds() -> None:
    """Each with its BAR and offset; only that of notifications has a multiplier, where others may have anything."""
    config = config_space(
        (0x9B, b"\x11\x00\x00"),  # the two lowest bits of a pointer are reserved
        (0x40, capability(1, offset=0x1000, multiplier=99)),
        (0xE8, capability(2, bar=2, offset=0x3000, multiplier=4)),
    )
    assert virtio.find_capabilities(config) == {1: (4, 0x1000, 0), 2: (2, 0x3000, 4)}


def test_of_two_structures_of_a_type_the_first_is_taken_and_a_reserved_bar_passed_over() -> None:
    """§4.1.4: a device offers the better one first, and BAR 6 may mean something one day."""
    config = config_space(
        (0x40, capability(1, bar=6)), (0x54, capability(1, offset=0x10)), (0x68, capability(1, offset=0x20))
    )
    assert virtio.find_capabilities(config) == {1: (4, 0x10, 0)}


def test_a_chain_that_bites_its_tail_or_leaves_the_space_ends() -> None:
    """Whatever a device says, looking for its capabilities ends."""
    looped = config_space((0x40, capability(1)), (0x60, capability(2)), (0x40, capability(1)))
    assert set(virtio.find_capabilities(looped)) == {1, 2}
    assert virtio.find_capabilities(config_space((0xFC, b"\x09\x14\x01"))).keys() == {1}


def test_without_the_bit_in_status_there_is_no_list() -> None:
    """What stands at 0x34 then means nothing."""
    assert virtio.find_capabilities(config_space((0x40, capability(1)), listed=False)) == {}


# --------------------------------------------------------------------------------------------------------------- ring


def test_the_parts_of_a_ring_are_aligned_and_do_not_overlap() -> None:
    """§2.7: 16 bytes a descriptor, 6 + 2 and 6 + 8 bytes an entry; aligned to 2 and 4."""
    assert virtio.ring_layout(8) == (128, 152, 222)
    for size in (1 << order for order in range(16)):
        driver, device, end = virtio.ring_layout(size)
        assert driver >= 16 * size
        assert device >= driver + 6 + 2 * size
        assert end == device + 6 + 8 * size
        assert (driver % 2, device % 4) == (0, 0)


@pytest.fixture
def block() -> Iterator[pyvfio.RamBlock]:
    """A page that no device reaches."""
    with pyvfio.RamBlockList() as blocks:
        yield blocks.add("ring", used_length=PAGE_SIZE, max_length=PAGE_SIZE)


def test_a_buffer_is_offered_in_a_descriptor_of_its_number_and_then_in_the_ring(block: pyvfio.RamBlock) -> None:
    """§2.7.5 and §2.7.6: address, length, for the device to write; the index counts what was ever offered."""
    queue = virtio.Queue(block, 8)
    queue.post(5, iova=0x1234_5678_9000, length=100)
    with block.view() as view:
        assert bytes(view[80:96]) == struct.pack("<QIHH", 0x1234_5678_9000, 100, 2, 0)
        assert bytes(view[128:134]) == struct.pack("<HHH", 0, 1, 5)
    queue.close()


def test_a_queue_goes_on_when_its_indices_have_come_round(block: pyvfio.RamBlock) -> None:
    """They have 16 bits."""
    queue = virtio.Queue(block, 2)
    layout = queue.layout
    with block.view() as view:
        indices, used = view.cast("H"), view.cast("I")
        for turn in range((1 << 16) + 10):
            queue.post(turn % 2, iova=0, length=7)
            assert queue.unanswered == 1
            assert list(queue.reap()) == []
            element = layout.device // 4 + 1 + 2 * (turn % 2)
            used[element], used[element + 1] = turn % 2, turn % 7
            indices[layout.device // 2 + 1] = indices[layout.driver // 2 + 1]
            assert list(queue.reap()) == [(turn % 2, turn % 7)]
        assert queue.unanswered == 0
    queue.close()


# -------------------------------------------------------------------------------------------------------- the driver


class Stepping(VirtioRng):
    """A driver whose device answers one request when it is waited for, and none before."""

    def __init__(self, device: pyvfio.Device, fake: FakeVirtioRng) -> None:
        self._fake = fake
        super().__init__(device)

    def wait(self) -> dict[int, int]:
        """As it is, after an answer."""
        self._fake.serve()
        return super().wait()


Opens = Callable[[FakePciDevice], pyvfio.Device]


@pytest.fixture
def kernels() -> Iterator[list[FakeKernel]]:
    """Those that a test has opened; when it ends no memory has gone while a device could reach it."""
    made: list[FakeKernel] = []
    yield made
    for kernel in made:
        with kernel:
            kernel.check()
            assert kernel.descriptors == ()
            assert kernel.memlock().used == 0


@pytest.fixture(params=["type1", "iommufd"])
def iommu(request: pytest.FixtureRequest) -> Iommu:
    """The kind of address space."""
    kind: Iommu = request.param
    return kind


def unmapped(kernel: FakeKernel) -> list[int]:
    """The lengths of all unmaps."""
    fields = {"VFIO_IOMMU_UNMAP_DMA": "size", "IOMMU_IOAS_UNMAP": "length"}
    return [int(call.arguments[fields[call.request]]) for call in kernel.trace if call.request in fields]


@pytest.fixture
def opened(kernels: list[FakeKernel], iommu: Iommu) -> Iterator[Opens]:
    """Opens a device on a fake kernel of its own, in an address space of either kind."""
    devices: list[pyvfio.Device] = []

    def open_it(fake: FakePciDevice) -> pyvfio.Device:
        kernels.append(FakeKernel("7.3", groups=[(4, [fake])], iommufd=True))
        devices.append(pyvfio.open_device(fake.bdf, iommu=iommu, kernel=kernels[-1]))
        return devices[-1]

    yield open_it
    for device in devices:
        device.close()


def test_the_pool_grows_while_requests_are_unanswered_and_all_are_answered(opened: Opens) -> None:
    """Those from before and those into what has come; each buffer is overwritten to its end."""
    fake = FakeVirtioRng(BDF, pause=None)
    with VirtioRng(opened(fake)) as rng:
        for number in range(8):
            if number == LOW:
                rng.resize(8)
                assert rng.unanswered == LOW
            fill(rng, number)
            rng.request(number)
        while fake.serve():
            pass
        assert rng.wait() == dict.fromkeys(range(8), BUFFER)
        with rng.pool.view() as view:
            cells = {bytes(view[at : at + 16]) for at in range(0, 8 * BUFFER, 16)}
        assert len(cells) == 8 * BUFFER // 16
        assert FILL[:16] not in cells


def test_a_resize_takes_nothing_that_stays_out_of_reach(opened: Opens, kernels: list[FakeKernel]) -> None:
    """A grow unmaps nothing, a shrink what goes."""
    with VirtioRng(opened(FakeVirtioRng(BDF, pause=None))) as rng:
        rng.resize(8)
        rng.resize(3)
        assert unmapped(kernels[0]) == [5 * BUFFER]


def test_a_driver_that_ends_has_stopped_the_device_before_memory_goes(opened: Opens, kernels: list[FakeKernel]) -> None:
    """A request that was not answered never is."""
    fake = FakeVirtioRng(BDF, pause=None)
    device = opened(fake)
    with VirtioRng(device) as rng:
        rng.request(0)
    assert not fake.serve()
    assert not kernels[0].faults


def test_a_queue_may_lie_anywhere_in_64_bits(opened: Opens, block: pyvfio.RamBlock) -> None:
    """Each address is written in two halves."""
    registers = virtio.Transport(opened(FakeVirtioRng(BDF)))
    registers.negotiate()
    queue = virtio.Queue(block, registers.queue_size(0))
    registers.enable_queue(0, queue, iova=0x12_3456_7000, vector=0)
    halves = [registers.read(virtio.Field(at, 4)) for at in range(virtio.QUEUE_DESC, virtio.QUEUE_DEVICE + 8, 4)]
    assert halves == [0x3456_7000, 0x12, 0x3456_7080, 0x12, 0x3456_7098, 0x12]
    queue.close()


def test_a_buffer_that_the_device_has_keeps_the_pool_from_shrinking_below_it(opened: Opens) -> None:
    """It shrinks as far as that, and the request goes on."""
    fake = FakeVirtioRng(BDF, pause=None)
    with VirtioRng(opened(fake)) as rng:
        rng.resize(8)
        rng.request(3)
        with pytest.raises(ValueError, match=r"\[3\]"):
            rng.resize(3)
        rng.resize(4)
        assert fake.serve()
        assert rng.wait() == {3: BUFFER}


def test_every_resize_of_a_draw_is_made_while_the_device_has_requests_and_nothing_is_lost(
    opened: Opens, kernels: list[FakeKernel], tmp_path: Path
) -> None:
    """The pool breathes several times; the last request is as long as what is left to draw."""
    fake, report, size = FakeVirtioRng(BDF, pause=None), Report(), 64 * BUFFER + 100
    with Stepping(opened(fake), fake) as rng, (tmp_path / "drawn").open("wb") as sink:
        draw(rng, size, sink, report)
        assert not rng.in_flight
    assert (report.bytes, report.requests, report.lost) == (size, 65, 0)
    assert report.at_work == report.resizes >= 10
    assert (tmp_path / "drawn").stat().st_size == size
    assert not kernels[0].faults


def test_a_write_behind_the_end_is_stopped_and_the_device_needs_a_reset(
    opened: Opens, kernels: list[FakeKernel]
) -> None:
    """The IOMMU has nothing there any more. Opened anew, the device works."""
    fake = FakeVirtioRng(BDF, pause=None)
    device = opened(fake)
    with Stepping(device, fake) as rng:
        assert try_behind_the_end(rng)
    with Stepping(device, fake) as rng:
        rng.request(LOW)
        with pytest.raises(NeedsResetError):
            rng.wait()
    assert [fault.write for fault in kernels[0].faults] == [True, True]
    with Stepping(device, fake) as rng:
        rng.request(0)
        assert rng.wait() == {0: BUFFER}


class Forgetful(Stepping):
    """A driver that says it has shrunk, and has not."""

    def resize(self, buffers: int) -> None:
        """Nothing."""


def test_a_write_that_is_not_stopped_is_noticed(opened: Opens) -> None:
    """The page that a pipe holds is the one that the device writes to."""
    fake = FakeVirtioRng(BDF, pause=None)
    with Forgetful(opened(fake), fake) as rng:
        assert not try_behind_the_end(rng)


class Lazy(FakeVirtioRng):
    """A device that says it has written what it has not."""

    def dma_write(self, iova: int, data: bytes) -> None:
        """But for the ring."""
        if len(data) < 16:
            super().dma_write(iova, data)


def test_what_the_device_says_it_wrote_and_did_not_is_counted_as_lost(opened: Opens) -> None:
    """By what is in the buffer."""
    fake, report = Lazy(BDF, pause=None), Report()
    with Stepping(opened(fake), fake) as rng:
        draw(rng, 3 * BUFFER, None, report)
    assert report.lost == 3
    assert not report.ok


class Misstating(FakeVirtioRng):
    """A device that says another number than that of the bytes it has written."""

    says = 0

    def dma_write(self, iova: int, data: bytes) -> None:
        """An entry of the ring has 8 bytes, of which the second half is the length."""
        super().dma_write(iova, data[:4] + struct.pack("<I", self.says) if len(data) == 8 else data)


def test_what_the_device_wrote_and_does_not_say_is_counted_as_lost(opened: Opens) -> None:
    """A buffer is untouched behind what the device says it wrote, or the device was not where it should be."""
    fake, report = Misstating(BDF, pause=None), Report()
    fake.says = 50
    with Stepping(opened(fake), fake) as rng:
        draw(rng, 50, None, report)
        assert report.lost == 0
        draw(rng, 150, None, report)
    assert report.lost > 0


@pytest.mark.parametrize("says", [0, 101])
def test_a_device_that_says_what_cannot_be_is_an_error(opened: Opens, says: int) -> None:
    """More bytes than it was asked for, or none, which would be without end."""
    fake = Misstating(BDF, pause=None)
    fake.says = says
    with Stepping(opened(fake), fake) as rng:
        rng.request(0, 100)
        with pytest.raises(pyvfio.VfioError, match=f"wrote {says} bytes to buffer 0"):
            rng.wait()


# -------------------------------------------------------------------------------------------------- what it refuses


class Bypassing(FakeVirtioRng):
    """As QEMU's without iommu_platform."""

    features = virtio.VIRTIO_F_VERSION_1


class Demanding(FakeVirtioRng):
    """It wants a feature that the driver does not know."""

    features = FakeVirtioRng.features | 1 << 40


class Poor(FakeVirtioRng):
    """It has no vectors left to give."""

    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """Registers 16 and 26 stay as they are."""
        if offset not in (16, 26):
            super().write_register(bar, offset, width, value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FakeEdu, "capabilities of a virtio 1.x device"),
        (Bypassing, "past the IOMMU"),
        (Demanding, "offers features 0x10300000000, and refuses 0x300000000"),
        (Poor, "did not take MSI-X vector 0"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_device_that_will_not_do_is_refused_and_nothing_is_left(
    opened: Opens, kind: type[FakePciDevice], message: str
) -> None:
    """No mapping, no interrupt: it can be opened and closed."""
    device = opened(kind(BDF))
    with pytest.raises(pyvfio.VfioError, match=message):
        VirtioRng(device)
    assert device.space.mappings == ()
    device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    assert not device.irq(pyvfio.ioctls.VFIO_PCI_MSIX_IRQ_INDEX).fds


# -------------------------------------------------------------------------------------------------------- the program


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """As a program."""
    return subprocess.run([sys.executable, EXAMPLE, *words], capture_output=True, text=True, check=False)


def test_the_program_draws_on_the_fake_and_says_what_it_saw(tmp_path: Path, iommu: Iommu) -> None:
    """For programs: JSON; the bytes in a file. In an address space of either kind."""
    words = ("--json", "--bytes", "100000", "--output", str(tmp_path / "drawn"), "--iommu", iommu)
    done = run("--fake", *words)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["ok"], report["bytes"], report["lost"], report["stopped"]) == (True, 100000, 0, True)
    drawn = (tmp_path / "drawn").read_bytes()
    assert len(drawn) == 100000
    assert int.from_bytes(drawn, "little").bit_count() == report["ones"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["0000:ff:1f.7"], 1, "virtio_rng: there is no such device"),
        (["--fake", "--output", "/nowhere/at/all"], 1, "virtio_rng: [Errno 2] No such file"),
        (["--fake", "--bytes", "0"], 2, "invalid positive value: '0'"),
    ],
)
def test_what_a_user_can_cause_is_one_line(words: list[str], status: int, message: str) -> None:
    """No traceback."""
    done = run(*words)
    assert done.returncode == status
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
