"""Progress of a long change of a RAM block: a callback, and the attendant that populates memory and calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from pyvfio.blocks.block import RamBlock
from pyvfio.kernel import Kernel
from pyvfio.memory import prefault


class Progress(NamedTuple):
    """`step` of a change of `block` has come to `done` of `total` bytes."""

    block: RamBlock
    step: Literal["prefault", "map", "unmap"]
    done: int
    total: int


ProgressCallback: TypeAlias = Callable[[Progress], None]
"""Called after each piece that was populated, mapped or unmapped, under the lock of the block's list: it must return
soon. An exception of the callback ends the change, and the block is as it was before."""


class LongWork:
    """The attendant of one block's changes: populates memory by `threads` threads before it is mapped (0: not at all),
    and tells `callback` how far things have come. `touch`: as `pyvfio.memory.prefault.populate`."""

    def __init__(
        self,
        kernel: Kernel,
        block: RamBlock,
        *,
        threads: int,
        callback: ProgressCallback | None,
        touch: bool = False,
    ) -> None:
        self._kernel = kernel
        self._block = block
        self.threads = threads
        self._callback = callback
        self._touch = touch

    def prepare(self, parts: Sequence[tuple[int, int]]) -> None:
        """`parts` are about to be mapped: see that there are pages behind them. Raises IoctlError."""
        if self._block.state.memory.charged == "touched":
            self.check(parts)
        self.populate(parts)

    def check(self, parts: Sequence[tuple[int, int]]) -> None:
        """`parts` are about to be provided: raises IoctlError where that certainly cannot be; nothing is touched."""
        if self.threads and parts and self._block.state.memory.charged != "never":
            prefault.check_room(self._kernel, parts, vaddr=self._block.vaddr)

    def populate(self, parts: Sequence[tuple[int, int]]) -> None:
        """Have pages behind `parts`. Raises IoctlError."""
        if self.threads:
            prefault.populate(
                self._kernel,
                parts,
                vaddr=self._block.vaddr,
                threads=self.threads,
                report=self._prefaulted,
                touch=self._touch,
            )

    def _prefaulted(self, done: int, total: int) -> None:
        self._report("prefault", done, total)

    def report(self, call: Literal["map", "unmap"], done: int, total: int) -> None:
        """`done` of `total` bytes are mapped, or unmapped."""
        self._report(call, done, total)

    def _report(self, step: Literal["prefault", "map", "unmap"], done: int, total: int) -> None:
        if self._callback is not None:
            self._callback(Progress(self._block, step, done, total))


def preallocate(block: RamBlock, kernel: Kernel, *, threads: int, progress: ProgressCallback | None) -> None:
    """Let `threads` threads populate all memory of a new block that comes into use."""
    if threads:
        touch = not block.state.memory.readable_only
        block.state.prealloc = LongWork(kernel, block, threads=threads, callback=progress, touch=touch)
