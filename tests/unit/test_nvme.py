"""The example of a driver for a disk, examples/nvme.py, on the fake kernel with its fake controller."""

from __future__ import annotations

import ast
import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import pytest

import pyvfio
from fake_nvme import SUCCESS, TRANSFER_ERROR, Entry, FakeNvme
from nvme import BUFFER, REMAP, CommandTimeoutError, Exercise, Nvme, find
from nvme_queues import (
    LIST_SIZE,
    PAGE,
    AbortedError,
    Command,
    CommandError,
    ControllerFailedError,
    QueueLayout,
    QueuePair,
    Request,
)
from pyvfio.iommufd_ioctls import IOMMU_IOAS_MAP
from pyvfio.kernel import IoctlArgument
from pyvfio.pci import PciDevice
from pyvfio.testing import FakeEdu, FakeKernel, FakePciDevice

BDF = "0000:01:00.0"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples/nvme.py"
IOVA = 0x12_3456_7000

Iommu = Literal["type1", "iommufd"]


# ------------------------------------------------------------------------------------------------------------- queues


class Rings:
    """A queue pair whose controller is the test: it reads entries, writes answers and sees the doorbells."""

    def __init__(self, *, entries: int = 4, number: int = 0) -> None:
        self.memory = bytearray(QueueLayout.of(number).end)
        self.layout = QueueLayout.of(number)
        self.rung: list[tuple[str, int]] = []
        self.pair = QueuePair(
            number,
            memory=memoryview(self.memory),
            iova=IOVA,
            entries=entries,
            doorbells=(lambda tail: self.rung.append(("tail", tail)), lambda head: self.rung.append(("head", head))),
        )
        self._answered = 0

    def entry(self, slot: int) -> Entry:
        """A submission entry."""
        at = self.layout.submissions + 64 * slot
        return Entry.parse(bytes(self.memory[at : at + 64]))

    def answer(self, identifier: int, *, status: int = 0, value: int = 0) -> None:
        """Put an answer into the completion queue."""
        turn, slot = divmod(self._answered, self.pair.entries)
        data = struct.pack("<IIHHHH", value, 0, 0, 0, identifier, status << 1 | (turn + 1) % 2)
        at = self.layout.completions + 16 * slot
        self.memory[at : at + 16] = data
        self._answered += 1


def test_a_command_has_its_fields_where_the_specification_has_them() -> None:
    """§4.2; the fields are read with other code than they were written with."""
    rings = Rings()
    rings.pair.submit(Command(2, 7, (0x1000,), (0xA, 0xB, 0xC)), Request("read"))
    at = rings.layout.submissions
    assert rings.memory[at] == 2
    assert struct.unpack_from("<I", rings.memory, at + 4) == (7,)
    assert struct.unpack_from("<QQIII", rings.memory, at + 24) == (0x1000, 0, 0xA, 0xB, 0xC)
    assert rings.rung == [("tail", 1)]


def test_up_to_two_pages_are_named_in_the_command_and_more_in_a_list() -> None:
    """§4.3: PRP 2 is a page, or where the list of all pages but the first is."""
    rings = Rings(number=2)
    rings.pair.submit(Command(1, 1, (0x1200, 0x2000)), Request("two"))
    rings.pair.submit(Command(1, 1, (0x1200, 0x2000, 0x9000)), Request("three"))
    two, three = rings.entry(0), rings.entry(1)
    assert (two.prp1, two.prp2) == (0x1200, 0x2000)
    assert three.prp1 == 0x1200
    assert struct.unpack_from("<2Q", rings.memory, three.prp2 - IOVA) == (0x2000, 0x9000)


def test_no_prp_list_crosses_a_page_and_none_is_anothers() -> None:
    """The controller reads a list up to the end of its page, and what follows is a pointer to another list."""
    starts = [QueueLayout.of(number).lists + LIST_SIZE * slot for number in range(3) for slot in range(64)]
    assert all(start // PAGE == (start + LIST_SIZE - 1) // PAGE for start in starts)
    assert len({start // LIST_SIZE for start in starts}) == len(starts)


def test_the_parts_of_queue_pairs_are_pages_of_their_own() -> None:
    """§5.3 and §5.4: queues that are contiguous begin at a page."""
    ends = [0]
    for number in range(3):
        layout = QueueLayout.of(number)
        assert layout.submissions == ends[-1]
        assert layout.completions - layout.submissions >= 64 * 64
        assert layout.lists - layout.completions >= 16 * 64
        assert not any(place % PAGE for place in layout)
        ends.append(layout.end)


def test_a_queue_goes_on_when_its_rings_have_come_round() -> None:
    """The phase changes with each round; identifiers are used again."""
    rings = Rings(entries=4)
    for turn in range(50):
        request = Request(f"{turn}")
        rings.pair.submit(Command(1), request)
        assert rings.pair.reap() == []
        assert rings.pair.unanswered == 1
        (identifier,) = rings.pair.requests
        rings.answer(identifier, value=turn)
        assert rings.pair.unanswered == 0
        assert rings.pair.reap() == [request]
        assert request.result() == turn
        assert rings.rung[-2:] == [("tail", (turn + 1) % 4), ("head", (turn + 1) % 4)]


def test_answers_are_counted_across_the_end_of_the_ring() -> None:
    """Before they are reaped."""
    rings = Rings(entries=4)
    for _ in range(3):
        rings.pair.submit(Command(1), Request("before"))
        rings.answer(*rings.pair.requests)
        rings.pair.reap()
    for left in (3, 2, 1):
        rings.pair.submit(Command(1), Request(f"{left}"))
    for number, identifier in enumerate(list(rings.pair.requests)):
        assert rings.pair.unanswered == 3 - number
        rings.answer(identifier)
    assert rings.pair.unanswered == 0
    assert [request.what for request in rings.pair.reap()] == ["3", "2", "1"]


def test_a_queue_is_full_with_one_command_less_than_it_has_entries() -> None:
    """A ring whose tail is at its head is empty."""
    rings = Rings(entries=4)
    for number in range(3):
        assert not rings.pair.full
        rings.pair.submit(Command(1), Request(f"{number}"))
    assert rings.pair.full
    rings.answer(1)
    assert [request.what for request in rings.pair.reap()] != []
    assert not rings.pair.full


def test_an_answer_to_no_command_is_an_error() -> None:
    """Not a KeyError: the controller is at fault."""
    rings = Rings()
    rings.answer(2)
    with pytest.raises(ControllerFailedError, match="queue 0: no command has identifier 2"):
        rings.pair.reap()


def test_a_request_that_is_not_done_has_no_result() -> None:
    """The bytes of a read are not there yet."""
    with pytest.raises(pyvfio.VfioError, match="is not done"):
        Request("read of 8 blocks at LBA 0").result()


# --------------------------------------------------------------------------------------------------------- the driver

Opens = Callable[[FakePciDevice], pyvfio.Device]


@pytest.fixture
def kernels() -> Iterator[list[FakeKernel]]:
    """Those that a test has opened; when the test ends no memory has gone while a device could reach it."""
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


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two blocks are alike."""
    return b"".join(struct.pack("<II", seed, number) for number in range(size // 8))


def put(disk: Nvme, offset: int, data: bytes) -> None:
    """Into the data block."""
    with disk.data.view() as view:
        view[offset : offset + len(data)] = data


def get(disk: Nvme, offset: int, size: int) -> bytes:
    """From the data block."""
    with disk.data.view() as view:
        return bytes(view[offset : offset + size])


def serve_all(fake: FakeNvme) -> None:
    """Have it execute all that it has."""
    while fake.serve():
        pass


@pytest.mark.parametrize("block_size", [512, 4096])
@pytest.mark.parametrize("offset", [0, 512, PAGE - 512, 3 * PAGE + 1024])
@pytest.mark.parametrize("size", [PAGE, 2 * PAGE, 3 * PAGE, 32 * PAGE])
def test_blocks_are_written_and_read_back_wherever_they_lie_in_their_pages(
    opened: Opens, block_size: int, offset: int, size: int
) -> None:
    """One page, two, and lists of up to 32; bytes beside them stay as they were."""
    fake = FakeNvme(BDF, block_size=block_size)
    blocks, data = size // block_size, pattern(size)
    with Nvme(opened(fake)) as disk:
        disk.resize(4 * BUFFER)
        put(disk, offset, data)
        disk.finish(disk.write(5, blocks, offset=offset))
        assert fake.storage[5 * block_size : 5 * block_size + size] == data
        put(disk, 0, b"\xff" * 4 * BUFFER)
        disk.finish(disk.read(5, blocks, offset=offset))
        assert get(disk, 0, 4 * BUFFER) == b"\xff" * offset + data + b"\xff" * (4 * BUFFER - offset - size)


def test_the_disk_says_what_it_is(opened: Opens) -> None:
    """Its texts, without the blanks that fill them up, and its size."""
    with Nvme(opened(FakeNvme(BDF, blocks=5000, block_size=4096))) as disk:
        assert disk.identity == ("pyvfio fake NVMe", "fake", "1", 1, 5000, 4096, 32 * PAGE)


@pytest.mark.parametrize(("mdts", "pages"), [(0, 32), (3, 8), (5, 32), (9, 32)])
def test_a_command_moves_no_more_than_the_controller_and_a_prp_list_take(opened: Opens, mdts: int, pages: int) -> None:
    """MDTS is an exponent, and 0 is no limit."""
    fake = FakeNvme(BDF)
    fake.mdts = mdts
    with Nvme(opened(fake)) as disk:
        assert disk.identity.max_transfer == pages * PAGE


def test_commands_are_spread_over_the_queues(opened: Opens) -> None:
    """Evenly."""
    with Nvme(opened(FakeNvme(BDF, pause=None))) as disk:
        disk.resize(BUFFER)
        for lba in range(6):
            disk.read(lba, 1, offset=0)
        assert [len(pair.requests) for pair in disk.queues] == [0, 3, 3]


def test_more_commands_than_fit_into_the_queues_wait_for_room(opened: Opens) -> None:
    """Two queues of 63 commands each."""
    fake = FakeNvme(BDF)
    with Nvme(opened(fake)) as disk:
        disk.resize(BUFFER)
        requests = [disk.read(number, 1, offset=0) for number in range(300)]
        done = []
        while found := disk.wait():
            done += found
        assert set(done) == set(requests)
        assert len(done) == 300
        assert {request.result() for request in done} == {0}


class Modest(FakeNvme):
    """It has one I/O queue and one vector."""

    io_queues = 1
    msix = 1


def test_a_controller_with_fewer_queues_and_vectors_than_asked_for_works(opened: Opens) -> None:
    """What there is is used."""
    with Nvme(opened(Modest(BDF)), queues=4) as disk:
        assert len(disk.queues) == 2
        disk.resize(BUFFER)
        disk.finish(disk.write(0, 8, offset=0))


@pytest.mark.parametrize(
    ("lba", "blocks", "offset"), [(-1, 1, 0), (0, 0, 0), (16384, 1, 0), (16380, 5, 0), (0, 257, 0), (0, 1, 2)]
)
def test_blocks_that_can_never_be_moved_are_refused_before_the_controller_sees_them(
    opened: Opens, lba: int, blocks: int, offset: int
) -> None:
    """Not on the disk, too many for a command, or where no PRP can begin."""
    fake = FakeNvme(BDF)
    with Nvme(opened(fake)) as disk:
        disk.resize(8 * BUFFER)
        before = fake.executed
        with pytest.raises(ValueError, match=r"the disk has 16384 blocks of 512 bytes.*131072 bytes"):
            disk.read(lba, blocks, offset=offset)
        with pytest.raises(ValueError, match="outside"):
            disk.read(0, 2, offset=8 * BUFFER - 512)
        assert (fake.executed, disk.outstanding) == (before, [])


def test_a_flush_reaches_the_disk(opened: Opens) -> None:
    """It has no data."""
    fake = FakeNvme(BDF)
    with Nvme(opened(fake)) as disk:
        disk.finish(disk.flush())
    assert fake.flushed == 1


# ------------------------------------------------------------------------------------------------------------ failures


class Worn(FakeNvme):
    """Its block 3 cannot be read."""

    def execute(self, entry: Entry) -> tuple[int, int] | None:
        """Unrecovered read error."""
        return (0x281, 0) if (entry.opcode, entry.cdw10) == (2, 3) else super().execute(entry)


def test_an_error_of_the_controller_is_raised_for_its_command_and_no_other(opened: Opens) -> None:
    """It says which command, and the status."""
    with Nvme(opened(Worn(BDF))) as disk:
        disk.resize(BUFFER)
        requests = [disk.read(lba, 1, offset=512 * lba) for lba in range(8)]
        while disk.wait():
            pass
        with pytest.raises(
            CommandError, match=r"read of 1 blocks at LBA 3 failed: unrecovered read error.*0x281"
        ) as it:
            requests.pop(3).result()
        assert it.value.status == 0x281
        assert [request.result() for request in requests] == [0] * 7


class Refusing(FakeNvme):
    """It has no room for an I/O queue."""

    def execute_admin(self, entry: Entry) -> tuple[int, int] | None:
        """Invalid queue size."""
        return (0x102, 0) if entry.opcode == 1 else super().execute_admin(entry)


def test_an_admin_command_that_fails_leaves_nothing_behind(opened: Opens) -> None:
    """No mapping, no interrupt: it can be opened and closed."""
    device = opened(Refusing(BDF))
    with pytest.raises(CommandError, match="create submission queue failed: invalid queue size"):
        Nvme(device)
    assert device.space.mappings == ()
    assert not device.irq(pyvfio.ioctls.VFIO_PCI_MSIX_IRQ_INDEX).fds
    assert not device.bus_master


class Forgetful(FakeNvme):
    """It never completes a read of block 3."""

    def execute(self, entry: Entry) -> tuple[int, int] | None:
        """Nothing."""
        return None if (entry.opcode, entry.cdw10) == (2, 3) else super().execute(entry)


def wait_for_ever(disk: Nvme) -> None:
    """For what is outstanding."""
    while True:
        disk.wait()


def write_for_ever(disk: Nvme) -> None:
    """Each of the writes completes."""
    while True:
        disk.finish(disk.write(8, 1, offset=512))


@pytest.mark.parametrize("meanwhile", [wait_for_ever, write_for_ever])
def test_a_command_that_never_completes_times_out_also_while_others_complete(
    opened: Opens, meanwhile: Callable[[Nvme], None]
) -> None:
    """The error has what was outstanding; a reset aborts it, and the disk works again."""
    with Nvme(opened(Forgetful(BDF)), timeout=0.2) as disk:
        disk.resize(BUFFER)
        stuck = disk.read(3, 1, offset=0)
        with pytest.raises(CommandTimeoutError, match=r"outstanding: .*read of 1 blocks at LBA 3") as it:
            meanwhile(disk)
        assert stuck in it.value.outstanding
        disk.reset()
        assert stuck in disk.wait()
        with pytest.raises(AbortedError, match=r"LBA 3 was aborted: the controller was reset"):
            stuck.result()
        disk.finish(disk.read(4, 1, offset=0))


def test_a_controller_in_its_fatal_state_is_an_error_until_it_is_reset(opened: Opens) -> None:
    """It comes at once, and not when the time is over; data that was written is there."""
    fake = FakeNvme(BDF, pause=None)
    with Nvme(opened(fake), timeout=1e6) as disk:
        disk.resize(BUFFER)
        put(disk, 0, pattern(PAGE))
        written, lost = disk.write(0, 8, offset=0), disk.write(8, 8, offset=PAGE)
        assert fake.serve()
        fake.fail()
        assert disk.wait() == [written]
        with pytest.raises(ControllerFailedError, match=r"fatal state \(CSTS is 0x3\), with 1 outstanding: write of 8"):
            disk.wait()
        disk.reset()
        assert disk.wait() == [lost]
        read = disk.read(0, 8, offset=PAGE)
        serve_all(fake)
        disk.finish(read)
        assert get(disk, PAGE, PAGE) == pattern(PAGE)


class Stubborn(FakeNvme):
    """Once it is stubborn, a write to CC has no effect: only a reset of the function has."""

    stubborn = False

    def reset(self) -> None:
        """As it was."""
        self.stubborn = False
        super().reset()

    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """CC."""
        if offset != 0x14 or not self.stubborn:
            super().write_register(bar, offset, width, value)


def test_a_controller_that_cannot_be_disabled_is_reset_by_its_function(
    opened: Opens, kernels: list[FakeKernel]
) -> None:
    """VFIO_DEVICE_RESET; the disk works again."""
    fake = Stubborn(BDF, pause=None)
    with Nvme(opened(fake)) as disk:
        disk.resize(BUFFER)
        aborted = disk.read(0, 1, offset=0)
        fake.stubborn = True
        disk.reset()
        assert [call.request for call in kernels[0].trace].count("VFIO_DEVICE_RESET") == 1
        assert disk.wait() == [aborted]
        read = disk.read(0, 1, offset=0)
        serve_all(fake)
        disk.finish(read)


def test_a_disk_that_is_pulled_out_is_an_error_and_can_be_closed(opened: Opens, kernels: list[FakeKernel]) -> None:
    """No wait is without end; what the controller had is aborted, and nothing is left."""
    with Nvme(opened(FakeNvme(BDF, pause=None))) as disk:
        disk.resize(BUFFER)
        request = disk.read(0, 8, offset=0)
        kernels[0].pull_out(BDF)
        for call in (disk.wait, disk.reset, disk.quiesce, partial(disk.finish, request)):
            with pytest.raises(pyvfio.DeviceGoneError):
                call()
        disk.resize(2 * BUFFER)
    with pytest.raises(AbortedError):
        request.result()
    assert kernels[0].mappings() == ()


class Simple(FakeNvme):
    """It has no NVM command set."""

    def reset(self) -> None:
        """CAP.CSS."""
        super().reset()
        self._registers[4] = 0


class Empty(FakeNvme):
    """It has no namespace."""

    def _identify(self, entry: Entry) -> int:
        if entry.cdw10 == 2:
            self.dma_write(entry.prp1, bytes(PAGE))
            return SUCCESS
        return super()._identify(entry)


class Annotated(FakeNvme):
    """Its blocks have metadata."""

    def dma_write(self, iova: int, data: bytes) -> None:
        """Whatever is a page in which a format stands."""
        if len(data) == PAGE and data[130]:
            data = data[:128] + b"\x08" + data[129:]
        super().dma_write(iova, data)


class Dead(FakeNvme):
    """It never becomes ready."""

    def _enable(self) -> None:
        self.fail()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FakeEdu, "is not an NVMe controller"),
        (Simple, "no NVM command set"),
        (Empty, "no namespace"),
        (Annotated, "8 bytes of metadata"),
        (Dead, "did not change its state"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_device_that_will_not_do_is_refused_and_nothing_is_left(
    opened: Opens, kind: type[FakePciDevice], message: str
) -> None:
    """No mapping, no interrupt, no DMA."""
    device = opened(kind(BDF))
    with pytest.raises(pyvfio.VfioError, match=message):
        Nvme(device)
    assert device.space.mappings == ()
    assert not device.irq(pyvfio.ioctls.VFIO_PCI_MSIX_IRQ_INDEX).fds
    assert not device.bus_master


# ------------------------------------------------------------------------------------------------------------- resizes


def test_the_data_block_grows_and_shrinks_while_commands_are_unanswered_and_none_is_lost(
    opened: Opens, kernels: list[FakeKernel]
) -> None:
    """Of a granule in which the controller has work, not a byte is unmapped."""
    fake = FakeNvme(BDF, pause=None)
    with Nvme(opened(fake)) as disk:
        disk.resize(BUFFER)
        put(disk, 0, pattern(BUFFER))
        first = disk.write(0, 128, offset=0)
        disk.resize(8 * BUFFER)
        second = disk.write(128, 128, offset=7 * BUFFER)
        assert disk.unanswered == 2
        with pytest.raises(ValueError, match=r"too short for write of 128 blocks at LBA 128"):
            disk.resize(7 * BUFFER)
        fake.serve()
        fake.serve()
        assert disk.unanswered == 0
        disk.finish(second)
        third = disk.read(0, 128, offset=BUFFER)
        disk.resize(2 * BUFFER)
        assert disk.unanswered == 1
        serve_all(fake)
        assert set(disk.wait()) == {first, third}
        assert get(disk, BUFFER, BUFFER) == pattern(BUFFER)
    assert unmapped(kernels[0])[0] == 6 * BUFFER
    assert not kernels[0].faults


def test_with_remap_all_commands_are_done_before_a_resize_and_returned_after_it(opened: Opens) -> None:
    """None is lost, and none has to be asked for again."""
    with Nvme(opened(FakeNvme(BDF)), policy=REMAP) as disk:
        disk.resize(BUFFER)
        requests = [disk.write(lba, 8, offset=0) for lba in range(0, 80, 8)]
        disk.resize(2 * BUFFER)
        assert disk.outstanding == []
        assert set(disk.wait()) == set(requests)
        assert [request.result() for request in requests] == [0] * 10


class Hasty(Nvme):
    """A driver that waits for nothing before it resizes."""

    def quiesce(self) -> None:
        """Nothing."""


class Eventful(FakeKernel):
    """A kernel on which something happens before each mapping is made."""

    happens: Callable[[], object] = staticmethod(lambda: None)

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """It does."""
        if request in (pyvfio.ioctls.VFIO_IOMMU_MAP_DMA, IOMMU_IOAS_MAP):
            self.happens()
        return super().ioctl(fd, request, argument)


@pytest.mark.parametrize("kind", [Nvme, Hasty])
def test_a_remap_without_the_wait_stops_a_command_and_with_it_none(
    kernels: list[FakeKernel], kind: type[Nvme], iommu: Iommu
) -> None:
    """The controller works in the middle of the resize, where no byte of the block is mapped."""
    fake = FakeNvme(BDF, pause=None)
    kernels.append(kernel := Eventful("7.3", groups=[(4, [fake])], iommufd=True))
    with pyvfio.open_device(BDF, iommu=iommu, kernel=kernel) as device, kind(device, policy=REMAP) as disk:
        disk.resize(BUFFER)
        request = disk.read(0, 8, offset=0)
        kernel.happens = fake.serve
        if kind is Nvme:
            fake.serve()  # so that the wait ends
        disk.resize(2 * BUFFER)
        assert disk.wait() == [request]
        assert (request.error is None, bool(kernel.faults)) == ((True, False) if kind is Nvme else (False, True))
        if isinstance(request.error, CommandError):
            assert request.error.status == TRANSFER_ERROR


def test_a_driver_that_ends_with_commands_in_flight_leaves_nothing_in_reach(
    opened: Opens, kernels: list[FakeKernel]
) -> None:
    """The controller has stopped before memory goes, and what it had is aborted."""
    fake = FakeNvme(BDF, pause=None)
    device = opened(fake)
    with Nvme(device) as disk:
        disk.resize(BUFFER)
        requests = [disk.write(lba, 8, offset=0) for lba in range(0, 80, 8)]
    assert not fake.serve()
    assert not kernels[0].faults
    assert device.space.mappings == ()
    assert not device.bus_master
    for request in requests:
        with pytest.raises(AbortedError, match="was aborted: the driver was closed"):
            request.result()


def test_a_controller_that_works_is_shut_down(opened: Opens) -> None:
    """§7.6.2: so that it need not recover at its next start."""
    seen: list[int] = []

    class Watching(FakeNvme):
        def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
            if offset == 0x14:
                seen.append(value >> 14 & 3)
            super().write_register(bar, offset, width, value)

    with Nvme(opened(Watching(BDF))):
        pass
    assert seen == [0, 0, 1, 0]


# --------------------------------------------------------------------------------------------------------- the program


class Stepping(Nvme):
    """A driver whose controller executes one command when it is waited for, and none before."""

    def __init__(self, device: pyvfio.Device, fake: FakeNvme) -> None:
        self._fake = fake
        super().__init__(device)

    def wait(self) -> list[Request]:
        """As it is, after an answer."""
        self._fake.serve()
        return super().wait()

    def finish(self, request: Request) -> int:
        """Likewise, after all."""
        serve_all(self._fake)
        return super().finish(request)


@pytest.mark.parametrize("block_size", [512, 4096])
def test_the_exercise_moves_all_blocks_through_all_resizes_and_loses_none(
    opened: Opens, kernels: list[FakeKernel], block_size: int
) -> None:
    """All but a few resizes are made while the controller has commands to answer."""
    fake = FakeNvme(BDF, blocks=8 * BUFFER // block_size, block_size=block_size, pause=None)
    with Stepping(opened(fake), fake) as disk:
        report = Exercise(disk, blocks=3000, resizes=30, seed=1).run()
        assert not disk.outstanding
    assert report.ok
    assert report.blocks >= 3000
    assert (report.resizes, report.lost, report.stray) == (30, 0, 0)
    assert report.at_work >= 25
    assert (fake.flushed, report.block_size) == (1, block_size)
    assert not kernels[0].faults


class Lossy(FakeNvme):
    """It says that it has written, and now and then has not."""

    def execute(self, entry: Entry) -> tuple[int, int] | None:
        """Each fifth write."""
        return (SUCCESS, 0) if entry.opcode == 1 and self.executed % 5 == 0 else super().execute(entry)


class Misplacing(FakeNvme):
    """It writes a block to where the next one belongs."""

    def execute(self, entry: Entry) -> tuple[int, int] | None:
        """Each fifth write."""
        wrong = entry.opcode == 1 and self.executed % 5 == 0
        return super().execute(entry._replace(cdw10=entry.cdw10 + 1) if wrong else entry)


class Generous(FakeNvme):
    """It reads more than it was asked for."""

    def execute(self, entry: Entry) -> tuple[int, int] | None:
        """A block more, where that is in the same page."""
        more = entry.opcode == 2 and entry.prp1 % PAGE + (entry.cdw12 + 2) * 512 <= PAGE
        return super().execute(entry._replace(cdw12=entry.cdw12 + 1) if more else entry)


@pytest.mark.parametrize("kind", [Lossy, Misplacing, Generous])
def test_what_a_disk_loses_or_misplaces_is_counted(opened: Opens, kind: type[FakeNvme]) -> None:
    """By the contents of the blocks."""
    fake = kind(BDF, pause=None)
    with Stepping(opened(fake), fake) as disk:
        report = Exercise(disk, blocks=5000, resizes=3, seed=1).run()
    assert not report.ok
    assert (report.lost > 0, report.stray > 0) == (kind is not Generous, kind is Generous)


def test_a_disk_that_is_too_small_is_refused(opened: Opens) -> None:
    """Each buffer has a part of it for itself."""
    with Nvme(opened(FakeNvme(BDF, blocks=1000))) as disk, pytest.raises(pyvfio.UnsupportedError, match="too small"):
        Exercise(disk, blocks=1, resizes=1, seed=1)


def pci_device(bdf: str, *, class_code: int = 0x010802, driver: str | None = None) -> PciDevice:
    """As sysfs shows it."""
    return PciDevice(
        bdf, 0x1B36, 0x10, class_code, driver, None, 1, None, is_bridge=False, is_vfio=driver == "vfio-pci"
    )


def test_a_disk_that_the_kernel_drives_is_never_chosen_by_itself() -> None:
    """Only what has no driver, or vfio-pci's; and only where there is one."""
    system, other = pci_device("0000:01:00.0", driver="nvme"), pci_device("0000:02:00.0", class_code=0x020000)
    free, bound = pci_device("0000:03:00.0"), pci_device("0000:04:00.0", driver="vfio-pci")
    assert find([system, other, free]) == free.bdf
    assert find([system, bound]) == bound.bdf
    for devices in ([system, other], [free, bound]):
        with pytest.raises(pyvfio.DeviceNotFoundError, match="NVMe controllers without a driver"):
            find(devices)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """As a program."""
    return subprocess.run([sys.executable, EXAMPLE, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("policy", ["extend", "remap"])
def test_the_program_moves_blocks_on_the_fake_and_says_what_it_saw(policy: str, iommu: Iommu) -> None:
    """For programs: JSON; in an address space of either kind."""
    done = run("--fake", "--json", "--blocks", "3000", "--resizes", "20", "--policy", policy, "--iommu", iommu)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["ok"], report["resizes"], report["lost"], report["policy"]) == (True, 20, 0, policy)
    assert report["blocks"] >= 3000
    assert (report["at_work"] > 0) == (policy == "extend")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["0000:ff:1f.7"], 1, "nvme: "),
        (["nonsense"], 2, "invalid parse_bdf value"),
        (["--fake", "--blocks", "0"], 2, "invalid positive value: '0'"),
    ],
)
def test_what_a_user_can_cause_is_one_line(words: list[str], status: int, message: str) -> None:
    """No traceback."""
    done = run(*words)
    assert done.returncode == status
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_driver_uses_only_what_the_package_hands_on() -> None:
    """`pyvfio`, `pyvfio.ioctls`, `pyvfio.pci` and `pyvfio.testing`: a driver that is copied goes on working."""
    public = {"pyvfio", "pyvfio.ioctls", "pyvfio.pci", "pyvfio.testing"}
    for name in ("nvme.py", "nvme_queues.py", "fake_nvme.py"):
        tree = ast.parse((ROOT / "examples" / name).read_text(encoding="utf-8"))
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
        assert {module for module in imported if module.startswith("pyvfio")} <= public


def test_the_program_of_the_page_runs() -> None:
    """docs/nvme.md, on the fake."""
    page = (ROOT / "docs/nvme.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with FakeKernel(groups=[(4, [FakeNvme(BDF)])]) as kernel:
        exec(program.replace(f'"{BDF}"', f'"{BDF}", kernel=kernel'), {"kernel": kernel})  # noqa: S102
        assert kernel.mappings() == ()
        kernel.check()
