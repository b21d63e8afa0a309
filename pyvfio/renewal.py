"""Fresh pages behind memory that has failed: notifiers let go of the old ones, and take the new.

A page that fails is taken from the process, but not from a device, whose mapping has pinned it and reaches it until it
is unmapped. No kernel unmaps a page alone that is mapped in one piece with others, so that each notifier lets go of
what it has to, and takes it all again when the pages have been replaced.

Source: `qemu_ram_remap` and `ram_block_remapped` (system/physmem.c, hw/core/ramlist.c of QEMU), where a notifier hears
of it afterwards; `memory_failure` in mm/memory-failure.c.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvfio.block import RamBlock
from pyvfio.errors import RollbackError, UnsupportedError
from pyvfio.extents import Extent, clip
from pyvfio.notifier import Bookkeeping, RamBlockNotifier, Remapping, holds_pages, tell_all


def renew(block: RamBlock, part: Extent, notifiers: Sequence[RamBlockNotifier]) -> None:
    """Replace the pages of `part`, and let `notifiers` have the new ones; as `RamBlock.remap`."""
    parts = clip(block.populated, *part)
    told = notifiers if parts else ()
    for notifier in told:
        if holds_pages(notifier):
            raise UnsupportedError(
                f"{notifier!r} is not told when pages are replaced, and may hold those of RAM block '{block.idstr}'",
                hint="Give it ram_block_remapping and ram_block_remapped, which may do nothing where it pins no pages",
            )
    gone = clip(block.discarded, *part)
    block._check_out_of_reach(gone)
    event = Remapping(block, parts)

    def replace() -> None:
        for one in parts:
            block._memory.replace(*one, provide=True)
        for one in gone:  # which nobody is told of, and which stays given back
            block._memory.replace(*one, provide=False)
        if parts and block._prealloc is not None:
            block._prealloc.populate(
                parts
            )  # as of all that is in use, and so that a device that only reads has those pages
        for notifier in told:
            event.revoke(notifier)

    # To take again is also what the undo does, so that whoever was kept from it here tries it once more there.
    change = Bookkeeping(event, replace, lambda: None)
    try:
        tell_all(told[::-1], [event] * len(told), change)
    except RollbackError as error:
        raise RollbackError(
            f"{event} has failed, and devices reach less of it than it has",
            error.exceptions,
            hint="Remap the part once more, or resize the block, when what stood in the way is gone",
        ) from error
