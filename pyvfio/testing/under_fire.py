"""A device that copies inside a block all the while something else is done to it, and how much did not arrive.

A transfer of QEMU's `edu` takes 100 ms, and moves all of its bytes at one instant of them. Whether it was stopped is
judged by the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from pyvfio.testing.probe import pattern
from pyvfio.units import PAGE_SIZE


class SlowEngine(Protocol):
    """A device whose transfers are under way for a while, as those of `pyvfio.testing.edu.Edu` are."""

    @property
    def idle(self) -> bool:
        """Whether no transfer is under way."""
        ...

    def start_read(self, iova: int, size: int) -> None:
        """Memory to buffer; returns at once."""
        ...

    def start_write(self, iova: int, size: int) -> None:
        """Buffer to memory; returns at once."""
        ...


class _Viewable(Protocol):
    def view(self) -> memoryview: ...


class Copies(NamedTuple):
    """`lost` of `made` copies, each of which is two transfers, did not arrive; `calls`: how often something else was
    done while a transfer was under way."""

    made: int
    lost: int
    calls: int

    def __str__(self) -> str:
        return f"{self.lost or 'none'} of {self.made} copies lost, {self.calls} calls meanwhile"


def copy_meanwhile(
    engine: SlowEngine,
    block: _Viewable,
    *,
    iova: int,
    size: int,
    meanwhile: Callable[[], object],
    copies: int,
    calls: int = 0,
) -> Copies:
    """Have the device copy `size` new bytes from the first page of `block`, which it reaches at `iova`, to the second,
    again and again, and call `meanwhile` as long as a transfer is under way: until there are so many of both.

    A device whose transfers are over at once never gets there, unless `calls` is 0. Raises what `meanwhile` raises.
    """
    made, lost, called = 0, 0, 0
    while made < copies or called < calls:
        sent = pattern(size)
        with block.view() as view:
            view[:size] = sent
            view[PAGE_SIZE : PAGE_SIZE + size] = bytes(size)
        for start, where in ((engine.start_read, iova), (engine.start_write, iova + PAGE_SIZE)):
            start(where, size)
            while not engine.idle:
                meanwhile()
                called += 1
        made += 1
        with block.view() as view:
            lost += bytes(view[PAGE_SIZE : PAGE_SIZE + size]) != sent
    return Copies(made, lost, called)
