"""Parts of a RAM block: discarded, populated again, and given fresh pages when memory has failed.

`pyvfio.blocks.state` has the steps; here is who may refuse them, and who is told in which order. Notifiers let go of a
part before its memory is dropped, and are told of a populated part after it has its pages.

A page that fails is taken from the process, but not from a device: its mapping has pinned the page and reaches it until
the mapping is unmapped. No kernel unmaps a page alone that is mapped in one piece with others. So each notifier unmaps
whole pieces, and maps them again when the pages are replaced.

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
from pyvfio.extents import Extent, clip
from pyvfio.guard import close_now, undoing

logger = logging.getLogger(__name__)


def cannot_follow(notifier: RamBlockNotifier, why: str) -> DiscardError:
    """The error for a notifier that would go on reaching a discarded part."""
    return DiscardError(
        f"{notifier!r} reaches whole blocks and is not told of discarded parts, {why}",
        hint="Give it ram_block_discarded and ram_block_populated, or populate everything",
    )


def discard(
    block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier], claims: DiscardGuard
) -> list[OSError]:
    """Give `wanted` back; the errors that kept memory from being given back. As `RamBlock.discard`."""
    state = block.state
    parts = clip(block.populated, *wanted)
    if not parts:
        return []
    if not state.memory.can_drop:
        raise DiscardError(
            f"RAM block '{block.idstr}' is a file of the caller's that is not to be punched",
            hint="Give it memory=File(fd, punch=True), if holes may be made in the file",
        )
    for notifier in notifiers:
        if reaches_whole_blocks(notifier):
            raise cannot_follow(notifier, f"so that nothing of RAM block '{block.idstr}' may be")
    claim = claims.require_coordinated()
    try:
        kept = state.discard(parts, Discarded(block, parts, notifiers[::-1]))
    finally:
        close_now(claim)
    logger.debug("discarded %s of %s", wanted, block)
    return kept


def populate(block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier]) -> None:
    """Let `wanted` be reached again. As `RamBlock.populate`."""
    if parts := clip(block.discarded, *wanted):
        block.state.populate(parts, Populated(block, parts, notifiers))
        logger.debug("populated %s of %s", wanted, block)


def remap(block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier]) -> None:
    """Replace the pages of `wanted`, and let `notifiers` have the new ones. As `RamBlock.remap`."""
    parts, gone = clip(block.populated, *wanted), clip(block.discarded, *wanted)
    told = notifiers if parts else ()
    for notifier in told:
        if holds_pages(notifier):
            raise UnsupportedError(
                f"{notifier!r} is not told when pages are replaced, and may hold those of RAM block '{block.idstr}'",
                hint="Give it ram_block_remapping and ram_block_remapped, which may do nothing where it pins no pages",
            )
    block.state.check_out_of_reach(gone)
    # To take the pages again is also the undo, so that a notifier that could not is asked once more there.
    change = Remapping(block, parts, told[::-1])

    def replace() -> None:
        block.state.replace_pages(parts, gone)
        with undoing:  # a signal handler comes too late to refuse
            change.revoke_all()

    try:
        change(replace)
    except RollbackError as error:
        raise RollbackError(
            f"{change} has failed, and devices reach less of it than it has",
            error.exceptions,
            hint="Remap the part once more, or resize the block, when the cause is gone",
        ) from error
    logger.debug("remapped %s of %s", wanted, block)
