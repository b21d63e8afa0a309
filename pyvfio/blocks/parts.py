"""Parts of a RAM block: discard parts, populate parts again, and replace failed pages by fresh pages.

`pyvfio.blocks.state` has the steps. This module decides which notifiers may refuse a step, and the order of calls.
Notifiers release a part before the memory of the part is dropped. Notifiers are called for a populated part after the
part has its pages.

A failed page is removed from the process, but not from a device. The device's mapping has pinned the page, and reaches
the page until the unmap. No kernel can unmap a single page of a larger mapping. Therefore each notifier unmaps whole
pieces, and maps the pieces again after the pages are replaced.

Source: `ram_block_discard_range`, `qemu_ram_remap` and `ram_block_remapped` (system/physmem.c, hw/core/ramlist.c of
QEMU); RamDiscardManager (include/exec/memory.h); `memory_failure` in mm/memory-failure.c.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.change import Discarded, Populated, Remapping
from pyvfio.blocks.discards import DiscardGuard
from pyvfio.blocks.notifier import RamBlockNotifier, holds_pages, reaches_whole_blocks
from pyvfio.errors import DiscardError, RollbackError, UnsupportedError
from pyvfio.extents import Extent
from pyvfio.guard import close_now, undoing

logger = logging.getLogger(__name__)


def cannot_follow(notifier: RamBlockNotifier, why: str) -> DiscardError:
    """Return the error for a notifier that would continue to reach a discarded part."""
    return DiscardError(
        f"{notifier!r} reaches whole blocks and cannot follow discards, {why}",
        hint="Add the hooks ram_block_discarded and ram_block_populated to the notifier, or populate everything",
    )


def discard(
    block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier], claims: DiscardGuard
) -> list[OSError]:
    """Discard `wanted`, as `RamBlock.discard`. Return the errors that kept memory from being released."""
    state = block.state
    parts = state.populated_in(*wanted)
    if not parts:
        return []
    if not state.memory.can_drop:
        raise DiscardError(
            f"RAM block '{block.idstr}' is a file of the caller that must not be punched",
            hint="Add the block with memory=File(fd, punch=True), if the file may get holes",
        )
    for notifier in notifiers:
        if reaches_whole_blocks(notifier):
            raise cannot_follow(notifier, f"so no part of RAM block '{block.idstr}' can be discarded")
    claim = claims.require_coordinated()
    try:
        kept = state.discard(parts, Discarded(block, parts, notifiers[::-1]))
    finally:
        close_now(claim)
    logger.debug("discarded %s of %s", wanted, block)
    return kept


def populate(block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier]) -> None:
    """Populate `wanted`, as `RamBlock.populate`."""
    if parts := block.state.discarded.clip(*wanted):
        block.state.populate(parts, Populated(block, parts, notifiers))
        logger.debug("populated %s of %s", wanted, block)


def remap(block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier]) -> None:
    """Replace the pages of `wanted`, and let `notifiers` take the new pages. As `RamBlock.remap`."""
    parts, gone = block.state.populated_in(*wanted), block.state.discarded.clip(*wanted)
    told = notifiers if parts else ()
    for notifier in told:
        if holds_pages(notifier):
            raise UnsupportedError(
                f"{notifier!r} cannot follow replaced pages, and may hold pages of RAM block '{block.idstr}'",
                hint="Add the hooks ram_block_remapping and ram_block_remapped; without pinned pages they may be empty",
            )
    block.state.check_out_of_reach(gone)
    # The undo also calls ram_block_remapped: a notifier that failed there is called once more.
    change = Remapping(block, parts, told[::-1])

    def replace() -> None:
        block.state.replace_pages(parts, gone)
        with undoing:  # the pages are replaced, so a signal handler can no longer refuse
            change.revoke_all()

    try:
        change(replace)
    except RollbackError as error:
        raise RollbackError(
            f"{change} failed, and devices reach less of the block than the block has",
            error.exceptions,
            hint="When the cause is removed, remap the part once more, or resize the block",
        ) from error
    logger.debug("remapped %s of %s", wanted, block)
