"""Devices beside each other: one reads and writes the registers of another, until these go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

import pyvfio
from pyvfio.kernel import Kernel
from pyvfio.testing.world import World
from tests.hw.rig import Rig

pytestmark = pytest.mark.only_type1("iommufd maps no BAR by address: EFAULT")

IDENTIFICATION, LIVENESS = 0x00, 0x04
"""Registers of `edu`: 0x010000ed, and what was written to it, inverted."""


class Beside(NamedTuple):
    """A device with a DMA engine, and another one."""

    rig: Rig
    other: pyvfio.Device

    def write(self, iova: int, value: int) -> None:
        """Have the first device write four bytes."""
        self.rig.device_writes(iova, value.to_bytes(4, "little"))

    def liveness(self) -> int:
        """What was last written to that register of the other device."""
        return ~self.other.region(0).read32(LIVENESS) & 0xFFFF_FFFF


@pytest.fixture(params=["one container", "two containers"])
def beside(request: pytest.FixtureRequest, engine_bdfs: tuple[str, ...], kernel: Kernel) -> Iterator[Beside]:
    """Two devices, in one address space or each in one of its own."""
    if len(engine_bdfs) < 2:
        pytest.skip("this needs two edu devices")
    with Rig(engine_bdfs[0], kernel=kernel) as rig:
        container = rig.container if request.param == "one container" else None
        with pyvfio.open_device(engine_bdfs[1], container=container, kernel=kernel) as other:
            other.memory_enabled = True
            yield Beside(rig, other)


def test_a_device_reads_and_writes_the_registers_of_another(beside: Beside, world: World) -> None:
    """Through a mapping of its BAR, which is charged to nobody."""
    locked = world.locked_bytes()
    with beside.rig.mapper.map_region(beside.other.region(0)) as mapping:
        assert mapping.size == beside.other.region(0).size
        assert world.locked_bytes() == locked
        beside.write(mapping.iova + LIVENESS, 0x12345678)
        assert beside.liveness() == 0x12345678
        assert beside.rig.device_reads(mapping.iova + IDENTIFICATION, 4) == b"\xed\x00\x00\x01"
        beside.rig.mapper._check()


def _stop_decoding(beside: Beside) -> None:
    beside.other.memory_enabled = False


def _close_region(beside: Beside) -> None:
    beside.other.region(0).close()


ENDS = {"decoding stops": _stop_decoding, "the region is closed": _close_region}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_no_device_reaches_a_bar_any_more_when_it_has_gone(beside: Beside, end: Callable[[Beside], None]) -> None:
    """The mapping is taken away before, and comes back by another `map_region` alone."""
    mapping = beside.rig.mapper.map_region(beside.other.region(0))
    beside.write(mapping.iova + LIVENESS, 0x11111111)
    end(beside)
    assert beside.rig.space.mapping_at(mapping.iova) is None
    beside.other.memory_enabled = True
    beside.write(mapping.iova + LIVENESS, 0x22222222)
    assert beside.liveness() == 0x11111111
    mapping.close()
    with beside.rig.mapper.map_region(beside.other.region(0), iova=mapping.iova) as again:
        beside.write(again.iova + LIVENESS, 0x33333333)
        assert beside.liveness() == 0x33333333


def test_no_device_reaches_the_bar_of_one_that_was_closed(beside: Beside, kernel: Kernel) -> None:
    """Also when another opens it then."""
    mapping = beside.rig.mapper.map_region(beside.other.region(0))
    beside.write(mapping.iova + LIVENESS, 0x11111111)
    beside.other.close()
    assert beside.rig.space.mapping_at(mapping.iova) is None
    with pyvfio.open_device(beside.other.bdf, kernel=kernel) as again:
        again.memory_enabled = True
        again.region(0).write32(LIVENESS, 0x22222222)
        beside.write(mapping.iova + LIVENESS, 0x33333333)
        assert again.region(0).read32(LIVENESS) == ~0x22222222 & 0xFFFF_FFFF
