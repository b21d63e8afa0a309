"""The cost of one access of a mapped register: `Region.register32` beside an item of a ctypes array and `read32`.

The clock is the running kernel's. In a virtual machine with `icount` it counts instructions, and the figures repeat.
"""

from __future__ import annotations

import ctypes
import timeit
from typing import NamedTuple

from pyvfio.device import Device

COUNT = 200
"""Accesses in one measurement."""
_REPEAT = 7


class RegisterCost(NamedTuple):
    """Nanoseconds of one access, the least of some measurements: load and store of an item, and of a register."""

    item_load: float
    item_store: float
    load: float
    store: float
    read32: float

    @property
    def added(self) -> float:
        """What a register's access takes more than that of an item, of load and store the larger."""
        return max(self.load - self.item_load, self.store - self.item_store)

    @property
    def part(self) -> float:
        """What part of `Region.read32` a register's load takes."""
        return self.load / self.read32


def measure(device: Device, offset: int) -> RegisterCost:
    """Measure with 32 bits at `offset` of BAR 0, which takes zeros. Turns memory decoding on."""
    device.memory_enabled = True
    region = device.region(0)
    with region.mmap() as mapping:
        array = (ctypes.c_uint32 * (mapping.size // 4)).from_address(mapping.vaddr)
        names = {"array": array, "register": region.register32(offset), "region": region, "at": offset // 4}
        statements = (
            *("array[at]", "array[at] = 0", "register.read()", "register.write(0)"),
            f"region.read32({offset})",
        )
        best = [
            min(timeit.repeat(statement, number=COUNT, repeat=_REPEAT, globals=names)) / COUNT * 1e9
            for statement in statements
        ]
    return RegisterCost(*best)
