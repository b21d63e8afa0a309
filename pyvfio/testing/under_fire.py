"""A device that copies inside a block while another change is made to the block, and the number of lost copies.

A transfer of QEMU's `edu` takes 100 ms, and moves all bytes at one instant of that time. The data shows whether the
transfer was stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from pyvfio.testing.probe import pattern
from pyvfio.units import PAGE_SIZE


class SlowEngine(Protocol):
    """A device whose transfers take some time, as those of `pyvfio.testing.edu.Edu` do."""

    @property
    def idle(self) -> bool:
        """Whether no transfer is in progress."""
        ...

    def start_read(self, iova: int, size: int) -> None:
        """Start a transfer from memory to the buffer."""
        ...

    def start_write(self, iova: int, size: int) -> None:
        """Start a transfer from the buffer to memory."""
        ...


class _Viewable(Protocol):
    def view(self) -> memoryview: ...


class Copies(NamedTuple):
    """The result: `lost` of `made` copies, of two transfers each, were lost. `calls`: the calls during transfers."""

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
    """Copy `size` bytes by DMA within `block` again and again, and call `meanwhile` during the transfers.

    The device copies new bytes from the first page of `block`, at `iova`, to the second page. `meanwhile` is called
    repeatedly while a transfer is in progress. The function returns after `copies` copies and `calls` calls.

    If the transfers of a device complete at once, the function returns only if `calls` is 0. Raises the errors of
    `meanwhile`.
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
