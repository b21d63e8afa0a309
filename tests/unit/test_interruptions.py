"""A signal handler raises between any two lines of an operation: memory that a device reaches is never given back.

The lines are found by making the operation once. Python runs signal handlers between the instructions of a line, too,
but never in the middle of a call into C.
"""

from __future__ import annotations

import linecache
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import pytest

import pyvfio
from pyvfio.testing.fake import FakeDevice, FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, Interrupt, MapperFactory, Rig, interrupt

if TYPE_CHECKING:
    from _typeshed import TraceFunction

ROOT = Path(pyvfio.__file__).parent
# The floors that change what a device reaches. What these call, the fake for instance, is a kernel's part.
HOUSE = {
    str(ROOT / name)
    for name in (
        "dma.py",
        "pieces.py",
        "notifier.py",
        "ramblock.py",
        "block.py",
        "parts.py",
        "memory/reservation.py",
        "memory/kinds.py",
        "container.py",
        "buffers.py",
    )
}


# Signals are looked for at calls and jumps, not before an assignment that ends a try.
CALM = ("self._changing = False",)


class Interrupter:
    """Counts the lines of the house that run; at one of them a signal arrives whose handler raises."""

    def __init__(self, at: int = 0, *, house: Collection[str] = HOUSE) -> None:
        self.lines = 0
        self.where = ""
        self._at = at
        self._house = house

    def _global(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        del event, argument
        return self._local if frame.f_code.co_filename in self._house else None

    def _local(self, frame: FrameType, event: str, argument: object) -> TraceFunction:
        del argument
        if event == "line":
            self.lines += 1
            if (
                self.lines == self._at
                and linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() not in CALM
            ):
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGUSR1)
        return self._local

    def run(self, action: Callable[[], object]) -> None:
        """The action, for as long as it lasts."""
        signal.signal(signal.SIGUSR1, interrupt)
        sys.settrace(self._global)
        try:
            action()
        finally:
            sys.settrace(None)


POLICIES: dict[str, MapperFactory] = {
    "remap": pyvfio.DmaMapper,
    "extend": partial(pyvfio.DmaMapper, resize="extend"),
    "granule": partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE),
}
OPERATIONS: dict[str, Callable[[Rig], object]] = {
    "add": lambda rig: rig.add("new", used=2 * PAGE_SIZE),
    "grow": lambda rig: rig.blocks["ring"].resize(6 * PAGE_SIZE),
    "shrink": lambda rig: rig.blocks["ring"].resize(PAGE_SIZE),
    "discard": lambda rig: rig.blocks["ring"].discard(0, PAGE_SIZE),
    "populate": lambda rig: rig.blocks["ring"].populate(3 * PAGE_SIZE, PAGE_SIZE),
    "replace pages": lambda rig: rig.blocks["ring"].remap(0, 2 * PAGE_SIZE),
    "remove": lambda rig: rig.blocks["ring"].remove(),
    "leave": lambda rig: rig.mapper.close(),
}


def _scene(kernel: FakeKernel, policy: str) -> Rig:
    rig = Rig(kernel, mapper=POLICIES[policy])
    rig.add("ring", used=4 * PAGE_SIZE, maximum=MIB).discard(3 * PAGE_SIZE, PAGE_SIZE)
    return rig


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_memory_that_a_device_reaches_stays_wherever_a_signal_handler_raises(name: str, policy: str) -> None:
    """No violation, then nor later: whatever can still be made is made, and all of it can be closed."""
    with FakeKernel(groups=[(2, [FakeDevice(BDF)])]) as kernel:
        with _scene(kernel, policy) as rig:
            count = Interrupter()
            count.run(partial(OPERATIONS[name], rig))
        for at in range(1, count.lines + 1):
            rig = _scene(kernel, policy)
            interrupter = Interrupter(at)
            with suppress(Interrupt, pyvfio.RollbackError):
                interrupter.run(partial(OPERATIONS[name], rig))
            assert not kernel.violations, (interrupter.where, kernel.violations)
            for block in rig.blocks:
                block.resize(8 * PAGE_SIZE)
                block.resize(2 * PAGE_SIZE)
            if rig.blocks.knows(rig.mapper):
                total = sum(part.size for block in rig.blocks for part in block.populated)
                assert sum(size for _iova, _vaddr, size in rig.reached()) == total, interrupter.where
                rig.mapper._check()
            rig.close()
            assert not kernel.violations, (interrupter.where, kernel.violations)
            assert not kernel.mappings(), interrupter.where
    print(f"{policy}, {name}: {count.lines} lines")


def test_what_the_mapper_says_is_mapped_is_mapped_wherever_a_signal_handler_raised() -> None:
    """Memory of the caller's own, when it is mapped once more."""
    with FakeKernel(groups=[(2, [FakeDevice(BDF)])]) as kernel:
        with Rig(kernel) as rig:
            memory = rig.memory()
            count = Interrupter()
            count.run(partial(rig.mapper.map_dma, vaddr=memory, size=PAGE_SIZE))
        for at in range(1, count.lines + 1):
            rig = Rig(kernel)
            interrupter = Interrupter(at)
            with suppress(Interrupt, pyvfio.RollbackError):
                interrupter.run(partial(rig.mapper.map_dma, vaddr=memory, size=PAGE_SIZE))
            mapping = rig.mapper.map_dma(vaddr=memory, size=PAGE_SIZE)
            assert rig.reached() == [(mapping.iova, memory, PAGE_SIZE)], interrupter.where
            rig.mapper._check()
            rig.close()
            assert not kernel.mappings(), interrupter.where
        kernel.munmap(memory, PAGE_SIZE)
