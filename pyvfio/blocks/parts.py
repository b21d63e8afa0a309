"""Parts of a RAM block: given back for a while, taken again, and given fresh pages when memory has failed.

All of it in the order that keeps devices away from what is not theirs. What is given back is first out of everybody's
reach, then known to be gone, and then dropped; what is taken again has its pages before anybody is told.

A page that fails is taken from the process, but not from a device, whose mapping has pinned it and reaches it until it
is unmapped. No kernel unmaps a page alone that is mapped in one piece with others, so that each notifier lets go of
what it has to, and takes it all again when the pages have been replaced.

Who makes these changes is `pyvfio.ramblock.RamBlockList`, one at a time.

Source: `ram_block_discard_range`, `qemu_ram_remap` and `ram_block_remapped` (system/physmem.c, hw/core/ramlist.c of
QEMU); RamDiscardManager (include/exec/memory.h); `memory_failure` in mm/memory-failure.c.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.change import Bookkeeping, Discarded, Populated, Remapping, tell_all
from pyvfio.blocks.discards import DiscardGuard
from pyvfio.blocks.notifier import RamBlockNotifier, holds_pages, reaches_whole_blocks
from pyvfio.errors import REACH_UNKNOWN, DiscardError, RollbackError, UnsupportedError
from pyvfio.extents import Extent, clip, runs, without

logger = logging.getLogger(__name__)


def cannot_follow(notifier: RamBlockNotifier, why: str) -> DiscardError:
    """It would go on reaching what is given back."""
    return DiscardError(
        f"{notifier!r} reaches whole blocks and is not told of discarded parts, {why}",
        hint="Give it ram_block_discarded and ram_block_populated, or populate everything",
    )


def discard(
    block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier], guard: DiscardGuard
) -> list[OSError]:
    """Give `wanted` back; what kept memory from being given back. As `RamBlock.discard`."""
    parts = clip(block._populated(block._used_length), *wanted)
    if not parts:
        return []
    if not block._memory.can_drop:
        raise DiscardError(
            f"RAM block '{block.idstr}' is a file of the caller's that is not to be punched",
            hint="Give it memory=File(fd, punch=True), if holes may be made in the file",
        )
    for notifier in notifiers:
        if reaches_whole_blocks(notifier):
            raise cannot_follow(notifier, f"so that nothing of RAM block '{block.idstr}' may be")
    discarded = tuple(runs(sorted((*block._discarded, *parts))))
    stale = tuple(sorted((*block._stale, *parts)))
    event = Discarded(block, parts)
    change = Bookkeeping(
        event,
        commit=partial(block._set_discarded, discarded, stale),
        rollback=partial(block._set_discarded, block._discarded, block._stale),
    )
    with guard.require_coordinated():
        tell_all(notifiers[::-1], [event] * len(notifiers), change)
    block._doubtful = tuple(without(block._doubtful, *parts))
    logger.debug("discarding %s of %s", wanted, block)
    return _drop_stale(block, wanted)


def _drop_stale(block: RamBlock, wanted: Extent) -> list[OSError]:
    """Nobody reaches it any more, and it is known to be gone: what fails now costs memory, and nothing else."""
    failures = []
    for part in clip(block._stale, *wanted):
        left = tuple(without(block._stale, part))
        try:
            block._memory.drop(*part)
        except OSError as error:
            failures.append(error)
        block._stale = left
    return failures


def populate(block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier]) -> None:
    """Let `wanted` be reached again. As `RamBlock.populate`."""
    parts = clip(block._discarded, *wanted)
    if not parts:
        return
    discarded = tuple(without(block._discarded, *parts))
    _drop_stale(block, wanted)  # what a signal handler kept a discard from
    if block._prealloc is not None:
        block._prealloc.check(parts)
    for part in parts:
        block._memory.provide(*part)
    if block._prealloc is not None:
        block._prealloc.populate(parts)
    before, block._doubtful = block._doubtful, (*block._doubtful, *parts)
    event = Populated(block, parts)
    change = Bookkeeping(
        event,
        commit=partial(block._set_discarded, discarded, block._stale),
        rollback=partial(block._set_discarded, block._discarded, block._stale),
    )
    try:
        tell_all(notifiers, [event] * len(notifiers), change)
    except BaseException as error:
        if change.settled and not isinstance(error, REACH_UNKNOWN):
            block._doubtful = before
        raise
    block._doubtful = tuple(without(before, *parts))
    logger.debug("populated %s of %s", wanted, block)


def remap(block: RamBlock, wanted: Extent, notifiers: Sequence[RamBlockNotifier]) -> None:
    """Replace the pages of `wanted`, and let `notifiers` have the new ones. As `RamBlock.remap`."""
    parts = clip(block.populated, *wanted)
    told = notifiers if parts else ()
    for notifier in told:
        if holds_pages(notifier):
            raise UnsupportedError(
                f"{notifier!r} is not told when pages are replaced, and may hold those of RAM block '{block.idstr}'",
                hint="Give it ram_block_remapping and ram_block_remapped, which may do nothing where it pins no pages",
            )
    gone = clip(block.discarded, *wanted)
    block._check_out_of_reach(gone)
    event = Remapping(block, parts)

    def replace() -> None:
        for part in parts:
            block._memory.replace(*part, provide=True)
        for part in gone:  # which nobody is told of, and which stays given back
            block._memory.replace(*part, provide=False)
        if parts and block._prealloc is not None:
            # As of all that is in use, and so that a device that only reads does not have the page of zeros.
            block._prealloc.populate(parts)
        for notifier in told:
            event.revoke(notifier)

    # To take again is also what the undo does, so that whoever was kept from it here tries it once more there.
    change = Bookkeeping(event, commit=replace, rollback=lambda: None)
    try:
        tell_all(told[::-1], [event] * len(told), change)
    except RollbackError as error:
        raise RollbackError(
            f"{event} has failed, and devices reach less of it than it has",
            error.exceptions,
            hint="Remap the part once more, or resize the block, when what stood in the way is gone",
        ) from error
    logger.debug("remapped %s of %s", wanted, block)
