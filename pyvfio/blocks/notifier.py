"""The protocols of notifiers: objects that are told before a RAM block changes, and that may refuse by raising.

Each notifier has at least one hook, or pair of hooks. `pyvfio.blocks.change` calls them.

Source: `RAMBlockNotifier` (include/exec/ramlist.h) and RamDiscardListener (include/exec/memory.h) of QEMU, where no
notifier can refuse a resize. Here each can.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, TypeGuard, runtime_checkable

from pyvfio.blocks.block import RamBlock
from pyvfio.extents import Extent


@runtime_checkable
class SupportsRamBlockAdded(Protocol):
    """A notifier with this hook is told of every block, also of those that exist when it comes.

    One that has no `ram_block_resized` is taken to reach all of `max_length`: blocks that come after it are allocated
    in full, and it cannot come where others are (`RamBlock.whole`).
    """

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """`block` has come, or was there already. Raising refuses it."""
        ...


@runtime_checkable
class SupportsRamBlockRemoved(Protocol):
    """A notifier with this hook is told of every block that goes, and of all that remain when it goes itself."""

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """`block` is about to go. Raising keeps it."""
        ...


@runtime_checkable
class SupportsRamBlockResized(Protocol):
    """A notifier with this hook is told of every change of `used_length`."""

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """`block` changes from `old_length` to `new_length`; memory of both lengths is there.

        Raising refuses the change. A notifier that raises has left everything as it was, unless it raises
        RollbackError. A notifier that returns reaches nothing behind `new_length` any more, whatever an earlier failure
        had left: that memory may now be given back.

        Signal handlers run after the hook, not in it: see `pyvfio.guard`.
        """
        ...


@runtime_checkable
class SupportsRamBlockDiscarded(Protocol):
    """A notifier with these hooks lets parts of a block go and come back (coordinated discards).

    Who has none of them, but `ram_block_added`, reaches whole blocks, so that nothing may be discarded while it is
    there. A notifier that is added later finds the parts in `block.populated`.
    """

    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """`parts`, ascending and all of them populated, are about to be given back. Raising refuses the change. A
        notifier that returns reaches none of them any more."""
        ...

    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """`parts`, ascending and all of them discarded, are to be in use again. Raising refuses it."""
        ...


@runtime_checkable
class SupportsRamBlockRemapped(Protocol):
    """A notifier with these hooks lets go of pages that are about to be replaced, and takes the new ones.

    Who has none of them, but `ram_block_added`, may hold the old pages for ever, so that none can be replaced while it
    is there. Who reaches memory through this process's page tables has nothing to do in them.
    """

    def ram_block_remapping(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Other pages are about to be put behind `parts`, ascending and all of them populated. Raising refuses it.
        A notifier that returns holds none of the present ones any more."""
        ...

    def ram_block_remapped(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Pages of `parts` can be taken: other ones, or those from before where the change was refused."""
        ...


RamBlockNotifier: TypeAlias = (
    SupportsRamBlockAdded
    | SupportsRamBlockRemoved
    | SupportsRamBlockResized
    | SupportsRamBlockDiscarded
    | SupportsRamBlockRemapped
)
"""An object with at least one of the hooks."""

HOOKS = (
    SupportsRamBlockAdded,
    SupportsRamBlockRemoved,
    SupportsRamBlockResized,
    SupportsRamBlockDiscarded,
    SupportsRamBlockRemapped,
)


def follows_parts(notifier: object) -> TypeGuard[SupportsRamBlockDiscarded]:
    """Whether it has both hooks for parts that go and come back."""
    return all(getattr(notifier, name, None) is not None for name in ("ram_block_discarded", "ram_block_populated"))


def follows_pages(notifier: object) -> TypeGuard[SupportsRamBlockRemapped]:
    """Whether it has both hooks for pages that are replaced."""
    return all(getattr(notifier, name, None) is not None for name in ("ram_block_remapping", "ram_block_remapped"))


def holds_pages(notifier: object) -> bool:
    """Whether it may hold pages that are to be replaced, and would go on to; who is not told of blocks holds none."""
    return getattr(notifier, "ram_block_added", None) is not None and not follows_pages(notifier)


def reaches_whole_blocks(notifier: object) -> bool:
    """Whether nothing may be discarded while it is there; who is not told of blocks reaches none."""
    return getattr(notifier, "ram_block_added", None) is not None and not follows_parts(notifier)


def reaches_for_good(notifier: object) -> bool:
    """Whether it is told of blocks and cannot follow a resize: it may reach all of `max_length`, and goes on to."""
    return (
        getattr(notifier, "ram_block_added", None) is not None and getattr(notifier, "ram_block_resized", None) is None
    )
