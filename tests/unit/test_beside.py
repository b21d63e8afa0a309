"""BARs as DMA targets on a fake kernel: what is refused, and that each ends before its BAR does."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.device import PCI_COMMAND
from pyvfio.kernel import IoctlArgument, Kernel, LinuxKernel, Registers
from pyvfio.mapper.regions import MappedRegion
from pyvfio.testing.edu import Edu
from pyvfio.testing.fake import Bar, DmaFault, FakeDevice, FakeEdu, FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.contract.devices import POWER_MANAGEMENT
from tests.unit.fakes import BDF, OTHER_BDF, PRIVATE, READ_WRITE, nothing_left, requests
from tests.unit.processes import in_child

PLAIN = "0000:01:00.0"
LIVENESS = 4
PM_CONTROL, D3HOT = 0xC8 + 4, 3  # of POWER_MANAGEMENT
UNMAP, RESET, HOT_RESET = "VFIO_IOMMU_UNMAP_DMA", "VFIO_DEVICE_RESET", "VFIO_DEVICE_PCI_HOT_RESET"


class Between(FakeKernel):
    """Calls `between` once, in the ioctl `at` (a map for DMA) or where registers are mapped.

    Another thread may come there, and a finalizer that a collection calls.
    """

    between: Callable[[], object] | None = None
    at = int(ioctls.VFIO_IOMMU_MAP_DMA)

    def _call(self) -> None:
        call, self.between = self.between, None
        if call is not None:
            call()

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0, /) -> int:
        if request == self.at:
            self._call()
        return super().ioctl(fd, request, argument)

    def registers(self, fd: int, offset: int, size: int) -> Registers:
        self._call()
        return super().registers(fd, offset, size)


class Pair(NamedTuple):
    """A device and its mapper; and another device, in a container of its own."""

    kernel: Between
    device: pyvfio.Device
    mapper: pyvfio.DmaMapper
    other: pyvfio.Device

    @property
    def reach(self) -> list[int]:
        """The IOVAs at which the first device reaches something."""
        return [entry.iova for entry in self.kernel.mappings(BDF)]


@pytest.fixture
def kernel() -> Iterator[Between]:
    """Two edu devices; and a device that can be reset, with memory in BAR 0, I/O ports in BAR 1."""
    bars = {0: Bar(4 * PAGE_SIZE), 1: Bar(256, io=True)}
    plain = FakeDevice(PLAIN, bars=bars, resettable=True, config=POWER_MANAGEMENT)
    with Between(groups=[(2, [FakeEdu(BDF)]), (3, [FakeEdu(OTHER_BDF)]), (4, [plain])]) as made, nothing_left(made):
        yield made


def _pair(kernel: Between, bdf: str) -> Iterator[Pair]:
    with (
        pyvfio.open_device(BDF, kernel=kernel) as device,
        pyvfio.open_device(bdf, kernel=kernel) as other,
        pyvfio.DmaMapper(device.container) as mapper,
    ):
        device.memory_enabled = other.memory_enabled = True
        device.bus_master = True
        yield Pair(kernel, device, mapper, other)
        mapper._check()


@pytest.fixture
def edus(kernel: Between) -> Iterator[Pair]:
    """Both edu devices."""
    yield from _pair(kernel, OTHER_BDF)


@pytest.fixture
def pair(kernel: Between) -> Iterator[Pair]:
    """An edu, and the device that can be reset."""
    yield from _pair(kernel, PLAIN)


# --------------------------------------------------------------------------------------------------- what is reached


def test_a_device_writes_and_reads_the_registers_of_another(edus: Pair) -> None:
    """Each access has the width of the transfer, where the registers take that."""
    buffer = mmap.mmap(-1, PAGE_SIZE)
    engine = Edu(edus.device.region(0))
    with edus.mapper.map_buffer(buffer) as desk, edus.mapper.map_region(edus.other.region(0)) as mapping:
        assert mapping.size == MIB
        buffer[:4] = (0x12345678).to_bytes(4, "little")
        engine.read_memory(desk.iova, 4)
        engine.write_memory(mapping.iova + LIVENESS, 4)
        assert edus.other.region(0).read32(LIVENESS) == ~0x12345678 & 0xFFFF_FFFF
        engine.read_memory(mapping.iova, 4)
        engine.write_memory(desk.iova, 4)
        assert buffer[:4] == b"\xed\x00\x00\x01"


def test_plain_memory_of_a_bar_is_reached_at_its_offset(pair: Pair) -> None:
    """A part of the BAR alone."""
    region = pair.other.region(0)
    with pair.mapper.map_region(region, PAGE_SIZE, 2 * PAGE_SIZE) as mapping:
        assert not mapping.closed
        pair.kernel.dma_write(BDF, mapping.iova + 8, b"registers")
        assert region.read(PAGE_SIZE + 8, 9) == b"registers"
        assert pair.kernel.dma_read(BDF, mapping.iova + 8, 9) == b"registers"
        for iova in (mapping.iova - 1, mapping.iova + 2 * PAGE_SIZE):
            with pytest.raises(DmaFault):
                pair.kernel.dma_read(BDF, iova, 1)


def test_a_transfer_goes_from_memory_into_the_bar_behind_it(pair: Pair) -> None:
    """Where one raw mapping has both."""
    vaddr = pair.kernel.mmap(0, 2 * PAGE_SIZE, READ_WRITE, PRIVATE)
    region = pair.other.region(0)
    fixed = pair.kernel.mmap(
        vaddr + PAGE_SIZE, PAGE_SIZE, READ_WRITE, 0x11, fd=pair.other.fd, offset=region.info.offset
    )
    assert fixed == vaddr + PAGE_SIZE
    pair.device.container.map(vaddr=vaddr, iova=MIB, size=2 * PAGE_SIZE)
    pair.kernel.dma_write(BDF, MIB + PAGE_SIZE - 4, b"halfhalf")
    assert region.read(0, 4) == b"half"
    assert pair.kernel.dma_read(BDF, MIB + PAGE_SIZE - 4, 8) == b"halfhalf"
    pair.device.container.unmap(iova=MIB, size=2 * PAGE_SIZE)
    pair.kernel.munmap(vaddr, 2 * PAGE_SIZE)


def test_a_bar_that_is_not_decoded_stops_the_access_and_is_a_mistake(pair: Pair) -> None:
    """Of a program that maps it by hand; the mapper does not let it come to that."""
    vaddr = pair.kernel.mmap(0, PAGE_SIZE, READ_WRITE, 1, fd=pair.other.fd, offset=pair.other.region(0).info.offset)
    pair.device.container.map(vaddr=vaddr, iova=MIB, size=PAGE_SIZE)
    pair.other.memory_enabled = False
    with pytest.raises(DmaFault, match=f"{PLAIN} does not decode"):
        pair.kernel.dma_write(BDF, MIB, b"x")
    assert [violation.call for violation in pair.kernel.violations] == ["a write to COMMAND"]
    pair.device.container.unmap(iova=MIB, size=PAGE_SIZE)
    pair.kernel.munmap(vaddr, PAGE_SIZE)
    pair.kernel.violations.clear()


@pytest.mark.parametrize(("read", "write"), [(True, False), (False, True)])
def test_a_bar_may_be_mapped_for_less(pair: Pair, *, read: bool, write: bool) -> None:
    """The kernel is given those flags."""
    with pair.mapper.map_region(pair.other.region(0), read=read, write=write):
        (entry,) = pair.kernel.mappings(BDF)
        assert entry.flags == read * 1 + write * 2


def test_a_bar_is_charged_to_nobody(pair: Pair) -> None:
    """Where nothing may be locked at all."""
    pair.kernel.memlock_limit = 0
    with pair.mapper.map_region(pair.other.region(0)) as mapping:
        assert pair.mapper.translate_vaddr(mapping.vaddr, mapping.size) == mapping.iova
        assert pair.kernel.memlock().used == 0


def test_a_device_may_be_in_the_same_container_and_the_iova_the_callers_own(kernel: FakeKernel) -> None:
    """Then both devices reach the BAR."""
    with (
        pyvfio.open_device(BDF, kernel=kernel) as device,
        pyvfio.open_device(PLAIN, container=device.container) as other,
        pyvfio.DmaMapper(device.container) as mapper,
    ):
        other.memory_enabled = True
        with mapper.map_region(other.region(0), iova=MIB) as mapping:
            assert mapping.iova == MIB
            kernel.dma_write(PLAIN, MIB, b"self")
            assert kernel.dma_read(BDF, MIB, 4) == b"self"


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((object(),), {}),
        ((b"region",), {}),
        ((None, "0"), {}),
        ((None, 0, 4096.0), {}),
        ((None,), {"iova": "0"}),
        ((None,), {"read": 1}),
        ((None,), {"write": 1}),
        ((None,), {"write": None}),
    ],
)
def test_arguments_of_another_class_are_type_errors(
    pair: Pair, arguments: tuple[object, ...], keywords: dict[str, object]
) -> None:
    """Before any call of the kernel. None stands for the region."""
    region = pair.other.region(0)
    pair.kernel.clear_trace()
    given = tuple(region if argument is None else argument for argument in arguments)
    call: Callable[..., object] = pair.mapper.map_region
    with pytest.raises(TypeError):
        call(*given, **keywords)
    assert not pair.kernel.trace


@pytest.mark.parametrize(
    "keywords",
    [
        {"offset": 1},
        {"offset": -PAGE_SIZE},
        {"size": 0},
        {"size": PAGE_SIZE + 1},
        {"offset": PAGE_SIZE, "size": 4 * PAGE_SIZE},
        {"offset": 4 * PAGE_SIZE},
        {"read": False, "write": False},
        {"iova": 1},
        {"iova": -PAGE_SIZE},
    ],
)
def test_values_that_can_never_be_right_are_value_errors(pair: Pair, keywords: dict[str, int]) -> None:
    """And nothing is left."""
    call: Callable[..., object] = pair.mapper.map_region
    with pytest.raises(ValueError, match=r"\d|read or write"):
        call(pair.other.region(0), **keywords)
    assert pair.reach == []
    assert not pair.other.region(0).maps
    assert not pair.other.region(0).dependents


def test_a_device_of_another_kernel_is_a_value_error(pair: Pair) -> None:
    """Its descriptors are nothing to this one."""
    with FakeKernel() as stranger, pyvfio.open_device(BDF, kernel=stranger) as device:
        device.memory_enabled = True
        of_the_machine = ClosedMeanwhile(pair.other.region(0))
        of_the_machine.kernel = LinuxKernel()
        for region in (device.region(0), of_the_machine):
            with pytest.raises(ValueError, match="same kernel="):
                pair.mapper.map_region(region)


def test_a_region_that_cannot_be_mapped_is_unsupported(pair: Pair) -> None:
    """I/O ports, and configuration space."""
    for region in (pair.other.region(1), pair.other.config):
        with pytest.raises(pyvfio.UnsupportedError, match="cannot be mapped"):
            pair.mapper.map_region(region)


@pytest.mark.parametrize("version", ["6.12", "7.3"])
def test_in_an_ioas_a_bar_is_refused_before_any_call_with_the_other_way(version: str) -> None:
    """The kernel would say EFAULT, as for memory that is not there. A map by the address names a BAR as a reason."""
    with (
        FakeKernel(version, iommufd=True) as kernel,
        pyvfio.open_device(BDF, iommu="iommufd", kernel=kernel) as device,
        pyvfio.open_device(OTHER_BDF, space=device.space) as other,
        pyvfio.DmaMapper(device.space) as mapper,
    ):
        other.memory_enabled = True
        kernel.clear_trace()
        with pytest.raises(pyvfio.UnsupportedError, match=r"BAR .*by address.*type1.*ioas_map_file.*dma_buf"):
            mapper.map_region(other.region(0))
        assert "IOMMU_IOAS_MAP" not in requests(kernel.trace)
        assert not other.region(0).maps
        assert device.space.reserved_iova == ()
        with other.region(0).mmap() as mapped, pytest.raises(pyvfio.IoctlError, match="does not map a BAR") as raised:
            device.space.map(vaddr=mapped.vaddr, iova=MIB, size=PAGE_SIZE)
        assert raised.value.errno == errno.EFAULT


def test_a_device_that_does_not_decode_memory_is_refused(pair: Pair) -> None:
    """As by `Region.mmap`."""
    pair.other.memory_enabled = False
    with pytest.raises(pyvfio.VfioError, match="does not decode memory"):
        pair.mapper.map_region(pair.other.region(0))


def test_closed_devices_and_mappers_are_refused(pair: Pair) -> None:
    """ClosedError."""
    region = pair.other.region(0)
    pair.other.close()
    with pytest.raises(pyvfio.ClosedError):
        pair.mapper.map_region(region)
    pair.mapper.close()
    with pytest.raises(pyvfio.ClosedError, match="DmaMapper"):
        pair.mapper.map_region(pair.device.region(0))


class ClosedMeanwhile:
    """A region a part of which another thread closes as soon as the part is mapped."""

    def __init__(self, region: pyvfio.Region) -> None:
        self._region = region
        self.kernel: Kernel = region.kernel
        self.dependents: list[Callable[[], object]] = []

    def mmap(self, offset: int = 0, size: int | None = None) -> MappedRegion:
        """Map a part, which does not stay."""
        mapped = self._region.mmap(offset, size)
        thread = threading.Thread(target=mapped.close)
        thread.start()
        thread.join()
        return mapped

    def add_dependent(self, close: Callable[[], object]) -> None:
        """Too late."""
        self.dependents.append(close)


def test_a_part_that_another_thread_closes_meanwhile_is_not_mapped(pair: Pair) -> None:
    """And nothing of the mapping stays with the region."""
    region = ClosedMeanwhile(pair.other.region(0))
    with pytest.raises(pyvfio.ClosedError):
        pair.mapper.map_region(region)
    assert not region.dependents
    assert pair.reach == []


@pytest.mark.parametrize("request_", ["mmap", "VFIO_IOMMU_MAP_DMA"])
def test_a_map_that_fails_leaves_nothing(pair: Pair, request_: str) -> None:
    """Neither in this process nor with the region."""
    region = pair.other.region(0)
    if request_ == "mmap":
        pair.kernel.fail(call="mmap", errno=errno.ENOMEM)
    else:
        pair.kernel.fail(request=request_, errno=errno.EIO)
    with pytest.raises(pyvfio.IoctlError):
        pair.mapper.map_region(region)
    assert not region.maps
    assert not region.dependents
    assert pair.device.container.reserved_iova == ()


def test_a_log_that_raises_behind_the_map_leaves_nothing(pair: Pair) -> None:
    """Its filter is the program's own code."""

    class Refuse(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            if record.getMessage().startswith("mapped"):
                raise RuntimeError("filtered")
            return True

    logger, refuse = logging.getLogger("pyvfio.iommu.iova_space"), Refuse()
    before = logger.level
    logger.addFilter(refuse)
    logger.setLevel(logging.DEBUG)
    try:
        with pytest.raises(RuntimeError, match="filtered"):
            pair.mapper.map_region(pair.other.region(0))
    finally:
        logger.removeFilter(refuse)
        logger.setLevel(before)
    assert pair.reach == []
    assert not pair.other.region(0).maps
    assert not pair.other.region(0).dependents


# ------------------------------------------------------------------------------------------------ the end of the BAR


def _stop_decoding(pair: Pair) -> None:
    pair.other.memory_enabled = False


ENDS: dict[str, Callable[[Pair], object]] = {
    "decoding stops": _stop_decoding,
    "COMMAND is written": lambda pair: pair.other.config.write16(PCI_COMMAND, 0),
    "power is lowered": lambda pair: pair.other.config.write8(PM_CONTROL, D3HOT),
    "low power is entered": lambda pair: pair.other.enter_low_power(),
    "reset": lambda pair: pair.other.reset(),
    "hot reset": lambda pair: pair.other.hot_reset(),
    "the region closes": lambda pair: pair.other.region(0).close(),
    "the device closes": lambda pair: pair.other.close(),
    "the group closes": lambda pair: pair.other.group.close(),
    "the container closes": lambda pair: pair.other.container.close(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_bar_is_unmapped_before_it_goes(pair: Pair, end: Callable[[Pair], object]) -> None:
    """Two mappings of it; what the fake finds otherwise is a violation. Closing them then does nothing."""
    region = pair.other.region(0)
    first, second = pair.mapper.map_region(region), pair.mapper.map_region(region, 0, PAGE_SIZE)
    end(pair)
    assert pair.reach == []
    assert pair.device.container.reserved_iova == ()
    pair.kernel.check()
    assert first.closed
    assert second.closed
    pair.kernel.clear_trace()
    first.close()
    second.close()
    assert not pair.kernel.trace


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_where_it_cannot_be_unmapped_the_bar_does_not_go(pair: Pair, end: Callable[[Pair], object]) -> None:
    """Nothing has changed, the error says why, and the next try succeeds."""
    region = pair.other.region(0)
    mapping = pair.mapper.map_region(region)
    pair.kernel.fail(request=UNMAP, errno=errno.EIO)
    with pytest.raises(pyvfio.VfioError) as caught:
        end(pair)
    assert UNMAP in str(caught.value) or "mapped for the DMA of another device" in str(caught.value)
    assert pair.reach == [mapping.iova]
    assert not pair.other.closed
    assert pair.other.memory_enabled
    assert not {RESET, HOT_RESET} & set(requests(pair.kernel.trace))
    pair.kernel.dma_write(BDF, mapping.iova, b"still")
    assert region.read(0, 5) == b"still"
    end(pair)
    assert pair.reach == []


def test_a_bar_is_reached_until_the_last_holder_of_the_mapping_closes(pair: Pair) -> None:
    """Its addresses are memory of this process to `map_dma`, too."""
    mapping = pair.mapper.map_region(pair.other.region(0))
    held = pair.mapper.map_dma(vaddr=mapping.vaddr, size=PAGE_SIZE)
    assert held.iova == mapping.iova
    mapping.close()
    assert pair.reach == [held.iova]
    held.close()
    assert pair.reach == []
    assert pair.other.region(0).maps == []


def test_a_bar_goes_whoever_holds_the_mapping(pair: Pair) -> None:
    """The device is more than the mapping."""
    mapping = pair.mapper.map_region(pair.other.region(0))
    held = pair.mapper.map_dma(vaddr=mapping.vaddr, size=PAGE_SIZE)
    _stop_decoding(pair)
    assert pair.reach == []
    held.close()
    mapping.close()


def test_closing_the_mapper_ends_the_mappings(pair: Pair) -> None:
    """The region is free then."""
    region = pair.other.region(0)
    pair.mapper.map_region(region)
    pair.mapper.close()
    assert not region.maps
    assert not region.dependents


def test_a_view_of_the_region_keeps_device_and_mapping(pair: Pair) -> None:
    """BufferError, and nothing has been closed."""
    region = pair.other.region(0)
    mapping = pair.mapper.map_region(region)
    with region.mmap() as mapped:
        view = mapped.view()
        with pytest.raises(BufferError):
            pair.other.close()
        assert pair.reach == [mapping.iova]
        view.release()
    pair.other.close()


def test_a_mapping_that_has_ended_has_no_segments_though_its_addresses_are_used_again(pair: Pair) -> None:
    """Those of a buffer are the buffer's."""
    ended = pair.mapper.map_region(pair.other.region(0), 0, PAGE_SIZE)
    pair.other.memory_enabled = False
    with mmap.mmap(-1, PAGE_SIZE) as memory, pair.mapper.map_buffer(memory, iova=ended.iova) as buffer:
        assert pair.mapper.segments(buffer) == [(ended.iova, PAGE_SIZE)]
        with pytest.raises(pyvfio.ClosedError, match="has been closed"):
            pair.mapper.segments(ended)
    assert "closed" in repr(ended)


def test_a_device_closes_though_its_bar_is_mapped_once_more_meanwhile(pair: Pair) -> None:
    """By another thread, when the mappings that there were have been closed."""
    region = pair.other.region(0)
    mapped: list[pyvfio.DmaMapping] = []

    def another_thread() -> None:
        region.dependents.remove(another_thread)
        mapped.append(pair.mapper.map_region(region))

    region.dependents.append(another_thread)
    pair.other.close()
    assert pair.other.closed
    assert mapped[0].closed
    assert pair.reach == []


def test_a_device_that_closes_its_space_ends_what_reaches_the_others_there(kernel: Between) -> None:
    """The space was opened for that device; the other devices go with it, and their BARs with them."""
    with pyvfio.open_device(BDF, kernel=kernel) as device, pyvfio.DmaMapper(device.container) as mapper:
        owner = pyvfio.open_device(OTHER_BDF, kernel=kernel)
        other = pyvfio.open_device(PLAIN, space=owner.container)
        owner.memory_enabled = other.memory_enabled = True
        mappings = [mapper.map_region(each.region(0)) for each in (owner, other)]
        container = owner.container
        owner.close()
        assert (owner.closed, other.closed, container.closed) == (True, True, True)
        assert all(mapping.closed for mapping in mappings)
        assert not kernel.mappings(BDF)
        kernel.check()


def test_a_device_whose_bar_is_mapped_again_and_again_stays_open(pair: Pair) -> None:
    """The close ends, with an error."""
    region = pair.other.region(0)
    turns: list[int] = []
    region.dependents.append(lambda: turns.append(1))
    with pytest.raises(pyvfio.VfioError, match=r"cannot be closed: a BAR of .* is mapped"):
        pair.other.close()
    assert not pair.other.closed
    assert len(turns) > 1
    region.dependents.clear()


# ------------------------------------------------------------------------------------------------- in finalizers


def test_a_region_that_a_finalizer_closes_while_it_is_mapped_goes_when_that_call_ends(pair: Pair) -> None:
    """Nothing is half done then; until that, no lock is taken that is above."""
    region = pair.other.region(0)
    open_then: list[int] = []

    def finalizer() -> None:
        region.close()
        open_then.append(len(region.dependents))

    pair.kernel.between = finalizer
    mapping = pair.mapper.map_region(region)
    assert mapping.closed
    mapping = pair.mapper.map_region(region)
    pair.kernel.between = finalizer
    region.read32(0)
    assert mapping.closed
    assert open_then == [1, 1]
    assert pair.reach == []
    assert region.read32(0) == 0


def test_what_is_just_being_mapped_cannot_be_unmapped(pair: Pair) -> None:
    """Whoever waits for its end hears of it, and does not wait for ever."""
    region = pair.other.region(0)
    refused: list[str] = []

    def close_at_once() -> None:
        try:
            region.close_dependents()
        except pyvfio.VfioError as error:
            refused.append(str(error))

    pair.kernel.between = close_at_once
    with pair.mapper.map_region(region) as mapping:
        (error,) = refused
        assert "is just being mapped" in error
        assert pair.reach == [mapping.iova]


def test_a_container_that_has_lost_its_mappings_is_no_obstacle(pair: Pair) -> None:
    """The kernel has unmapped the BAR with the last group."""
    pair.mapper.map_region(pair.other.region(0))
    pair.device.container.close()
    pair.other.close()


def test_in_a_child_nothing_happens(pair: Pair) -> None:
    """The kernel's mapping is shared."""
    mapping = pair.mapper.map_region(pair.other.region(0))

    def child() -> None:
        mapping.close()
        with pytest.raises(pyvfio.ForkedError):
            pair.mapper.map_region(pair.other.region(0))
        with pytest.raises(pyvfio.ForkedError):
            pair.other.region(0).close()

    assert in_child(child) == 0
    assert pair.reach == [mapping.iova]


def test_devices_whose_bars_are_reached_are_not_handed_over(kernel: FakeKernel) -> None:
    """Nor is a mapper that reaches others' BARs. Each error names what is to be closed."""
    with (
        pyvfio.open_device(BDF, kernel=kernel) as device,
        pyvfio.open_device(OTHER_BDF, kernel=kernel) as other,
        pyvfio.DmaMapper(device.container) as mapper,
        pyvfio.DmaMapper(other.container) as others,
    ):
        other.memory_enabled = True
        with mapper.map_region(other.region(0)) as mapping:
            with pytest.raises(pyvfio.HandOverError, match=f"part of <Region BAR0.*iova={mapping.iova:#x}"):
                pyvfio.hand_over(mapper)
            with pytest.raises(pyvfio.HandOverError, match=f"a BAR of <Device {OTHER_BDF}.*close that mapping"):
                pyvfio.hand_over(others)


def test_what_is_handed_over_enters_no_low_power_and_lends_no_bar(kernel: FakeKernel) -> None:
    """Until it is taken back: the other process would know of neither."""
    with (
        pyvfio.open_device(OTHER_BDF, kernel=kernel) as device,
        pyvfio.open_device(PLAIN, kernel=kernel) as other,
        pyvfio.DmaMapper(device.container) as mapper,
        pyvfio.DmaMapper(other.container) as others,
    ):
        device.memory_enabled = True
        uses: list[Callable[[], object]] = [
            device.enter_low_power,
            device.low_power().__enter__,
            device.feature(ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY).set,
            lambda: others.map_region(device.region(0)),
        ]
        with pyvfio.hand_over(mapper):
            for use in uses:
                with pytest.raises(pyvfio.HandOverError, match="handed to another process"):
                    use()
            assert not device.windows.low_power
            assert kernel.mappings(PLAIN) == ()
            assert device.config.read16(0) == 0x1234
        others.map_region(device.region(0)).close()
        with device.low_power():
            assert device.windows.low_power


def test_no_device_enters_low_power_once_it_was_looked_at_for_a_hand_over(kernel: Between) -> None:
    """A thread that tries meanwhile waits, and is refused."""
    refused: list[str] = []
    with pyvfio.open_device(OTHER_BDF, kernel=kernel) as device, pyvfio.DmaMapper(device.container) as mapper:

        def enter() -> None:
            try:
                device.enter_low_power()
            except pyvfio.HandOverError as error:
                refused.append(str(error))

        thread = threading.Thread(target=enter)

        def meanwhile() -> None:
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()

        kernel.at, kernel.between = int(ioctls.VFIO_IOMMU_GET_INFO), meanwhile  # of the last obstacle
        with pyvfio.hand_over(mapper):
            thread.join(20)
            assert refused
            assert not device.windows.low_power


def test_the_registers_of_the_mapping_are_those_of_the_process(pair: Pair) -> None:
    """`vaddr` of the mapping is an address that this process may use."""
    with pair.mapper.map_region(pair.other.region(0)) as mapping:
        ctypes.c_uint32.from_address(mapping.vaddr).value = 7
        assert pair.kernel.dma_read(BDF, mapping.iova, 4) == b"\x07\0\0\0"
