"""The protocols of notifiers: objects called before a RAM block changes. A notifier can refuse a change by raising.

Each notifier has at least one hook, or pair of hooks. `pyvfio.blocks.change` calls the hooks.

Source: `RAMBlockNotifier` (include/exec/ramlist.h) and RamDiscardListener (include/exec/memory.h) of QEMU. In QEMU, no
notifier can refuse a resize; in pyvfio, each can.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import iscoroutinefunction
from typing import Protocol, TypeAlias, TypeGuard, runtime_checkable

from pyvfio.blocks.block import RamBlock
from pyvfio.extents import Extent


@runtime_checkable
class SupportsRamBlockAdded(Protocol):
    """A notifier with this hook is called for every block, also for those that exist when the notifier is added.

    A notifier without `ram_block_resized` is assumed to reach all of `max_length`. Blocks added after that notifier are
    allocated in full (`RamBlock.whole`). The notifier cannot be added while resizable blocks exist.
    """

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Take note of `block`, which is new or existed before the notifier. Raise to refuse the block."""
        ...


@runtime_checkable
class SupportsRamBlockRemoved(Protocol):
    """A notifier with this hook is called for every removed block, and for all blocks when the notifier is removed."""

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """Drop `block`, which is about to be removed. Raise to keep the block."""
        ...


@runtime_checkable
class SupportsRamBlockResized(Protocol):
    """A notifier with this hook is called for every change of `used_length`."""

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Follow the change of `block` from `old_length` to `new_length`. Memory of both lengths is accessible.

        Raise to refuse the change. A notifier that raises must have left everything as before, unless the exception is
        RollbackError. A notifier that returns must reach nothing behind `new_length`, also after earlier failures: the
        list may now release that memory.

        Signal handlers run after the hook, not during the hook: see `pyvfio.guard`.
        """
        ...


@runtime_checkable
class SupportsRamBlockDiscarded(Protocol):
    """A notifier with these hooks follows parts of a block that are discarded and populated (coordinated discards).

    A notifier that has `ram_block_added` but not these hooks reaches whole blocks: nothing can be discarded while that
    notifier is in the list. A notifier that is added later finds the parts in `block.populated`.
    """

    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Unmap `parts`, ascending and all populated, which are about to be discarded. Raise to refuse the change.

        A notifier that returns must no longer reach any of the parts.
        """
        ...

    def ram_block_populated(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Map `parts`, ascending and all discarded, which will be in use again. Raise to refuse the change."""
        ...


@runtime_checkable
class SupportsRamBlockRemapped(Protocol):
    """A notifier with these hooks releases pages that are about to be replaced, and takes the new pages.

    A notifier that has `ram_block_added` but not these hooks may hold old pages permanently. No pages can be replaced
    while that notifier is in the list. A notifier that reaches memory through this process's page tables can leave the
    hooks empty.
    """

    def ram_block_remapping(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Release the pages of `parts`, ascending and all populated, which are about to be replaced. Raise to refuse.

        A notifier that returns must not hold any of the old pages.
        """
        ...

    def ram_block_remapped(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """Take the pages of `parts`: new pages, or the old pages if the change was refused."""
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


def check_hooks(notifier: object) -> None:
    """Raise TypeError for an object that no change could call: one without hooks, a class, or coroutine functions."""
    if isinstance(notifier, type):
        raise TypeError(f"{notifier!r} is a class: add an object of the class")
    if not isinstance(notifier, HOOKS):
        raise TypeError(
            f"{notifier!r} has none of ram_block_added, _removed and _resized, and not both of _discarded and "
            "_populated"
        )
    for name in (name for protocol in HOOKS for name in vars(protocol) if name.startswith("ram_block_")):
        check_called(getattr(notifier, name, None), name)


def check_called(hook: object, name: str) -> None:
    """Raise TypeError for a coroutine function: a call would return, and the body would never run."""
    if iscoroutinefunction(hook):
        raise TypeError(f"{name} must be a function, not a coroutine function (async def): the call must do the work")


def follows_parts(notifier: object) -> TypeGuard[SupportsRamBlockDiscarded]:
    """Return whether `notifier` has both hooks for discarded and populated parts."""
    return all(getattr(notifier, name, None) is not None for name in ("ram_block_discarded", "ram_block_populated"))


def follows_pages(notifier: object) -> TypeGuard[SupportsRamBlockRemapped]:
    """Return whether `notifier` has both hooks for replaced pages."""
    return all(getattr(notifier, name, None) is not None for name in ("ram_block_remapping", "ram_block_remapped"))


def holds_pages(notifier: object) -> bool:
    """Return whether `notifier` may hold pages that are to be replaced.

    A notifier without `ram_block_added` holds no pages.
    """
    return getattr(notifier, "ram_block_added", None) is not None and not follows_pages(notifier)


def reaches_whole_blocks(notifier: object) -> bool:
    """Return whether nothing can be discarded while `notifier` is in the list.

    A notifier without `ram_block_added` reaches no blocks.
    """
    return getattr(notifier, "ram_block_added", None) is not None and not follows_parts(notifier)


def reaches_for_good(notifier: object) -> bool:
    """Return whether `notifier` is called for blocks but cannot follow a resize.

    Such a notifier may reach all of `max_length` permanently.
    """
    return (
        getattr(notifier, "ram_block_added", None) is not None and getattr(notifier, "ram_block_resized", None) is None
    )
