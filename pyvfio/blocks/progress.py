"""Progress of a long change of a RAM block: a callback, and an attendant that populates memory and reports progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

from pyvfio.blocks.block import RamBlock
from pyvfio.guard import is_undoing
from pyvfio.kernel import Kernel
from pyvfio.memory import prefault

logger = logging.getLogger(__name__)


class Progress(NamedTuple):
    """The progress of one `step` of a change of `block`: `done` of `total` bytes."""

    block: RamBlock
    step: Literal["prefault", "map", "unmap"]
    done: int
    total: int


ProgressCallback: TypeAlias = Callable[[Progress], None]
"""Called after each piece that was populated, mapped or unmapped, with the lock of the block's list held. The callback
must return soon. An exception of the callback ends the change, and the block is then as before. During an undo or a
close, the exception can end nothing, and is logged."""


class LongWork:
    """The attendant of one block's changes: populates memory before the map, and reports progress to `callback`.

    `threads`: the number of threads that populate; 0: no populating. `touch`: as in `pyvfio.memory.prefault.populate`.
    """

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
        """Populate `parts`, which are about to be mapped. Raises IoctlError."""
        if self._block.state.memory.charged == "touched":
            self.check(parts)
        self.populate(parts)

    def check(self, parts: Sequence[tuple[int, int]]) -> None:
        """Check that `parts` can be allocated. Raises IoctlError if they certainly cannot be. Touches nothing."""
        if self.threads and parts and self._block.state.memory.charged != "never":
            prefault.check_room(self._kernel, parts, vaddr=self._block.vaddr)

    def populate(self, parts: Sequence[tuple[int, int]], *, required: bool = False) -> None:
        """Populate `parts`. Raises IoctlError. `required`: as in `pyvfio.memory.prefault.populate`."""
        if self.threads:
            prefault.populate(
                self._kernel,
                parts,
                vaddr=self._block.vaddr,
                threads=self.threads,
                report=self._prefaulted,
                touch=self._touch,
                required=required,
            )

    def _prefaulted(self, done: int, total: int) -> None:
        self._report("prefault", done, total)

    def report(self, call: Literal["map", "unmap"], done: int, total: int) -> None:
        """Report that `done` of `total` bytes are mapped, or unmapped."""
        self._report(call, done, total)

    def _report(self, step: Literal["prefault", "map", "unmap"], done: int, total: int) -> None:
        if self._callback is None:
            return
        try:
            self._callback(Progress(self._block, step, done, total))
        except BaseException:
            if not is_undoing():
                raise
            logger.exception(
                "a progress callback raised during an undo or close of %r, which must continue", self._block
            )


def preallocate(block: RamBlock, kernel: Kernel, *, threads: int, progress: ProgressCallback | None) -> None:
    """Populate all memory of a new block with `threads` threads when the memory comes into use."""
    if threads:
        touch = not block.state.memory.readable_only
        block.state.prealloc = LongWork(kernel, block, threads=threads, callback=progress, touch=touch)
