"""A change of a RAM block: the events that notifiers are told, and how all of them accept it, or none.

A notifier refuses by raising. The notifiers that were told before it are then told the reverse, the last one first.

Source: `RAMBlockNotifier` (include/exec/ramlist.h) and RamDiscardListener (include/exec/memory.h) of QEMU, where no
notifier can refuse a resize. Here each can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.notifier import RamBlockNotifier, follows_pages, follows_parts
from pyvfio.errors import RollbackError, as_exception
from pyvfio.extents import Extent, total
from pyvfio.guard import Guard, called_out, checkpoint, undoing
from pyvfio.units import format_size

# Hooks are looked up by name: isinstance() of a protocol costs a hundred times as much, and each resize would pay it.
_Hook: TypeAlias = Callable[[RamBlock, int, int], None]


class Event(Protocol):
    """A change that a notifier is told of, and its reverse. As a string it names the change, for an error."""

    def tell(self, notifier: RamBlockNotifier) -> None:
        """Say that it happens."""
        ...

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """Say that it does not, after all."""
        ...


class Added:
    """A block comes."""

    def __init__(self, block: RamBlock) -> None:
        self._block = block

    def __str__(self) -> str:
        return f"adding RAM block '{self._block.idstr}'"

    def tell(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_added`."""
        hook: _Hook | None = getattr(notifier, "ram_block_added", None)
        if hook is not None:
            hook(self._block, self._block.used_length, self._block.max_length)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_removed`."""
        hook: _Hook | None = getattr(notifier, "ram_block_removed", None)
        if hook is not None:
            hook(self._block, self._block.used_length, self._block.max_length)


class Removed(Added):
    """A block goes."""

    tell, revoke = Added.revoke, Added.tell

    def __str__(self) -> str:
        return f"removing RAM block '{self._block.idstr}'"


class Resized:
    """A block changes its length."""

    def __init__(self, block: RamBlock, old: int, new: int) -> None:
        self._block, self._old, self._new = block, old, new

    def __str__(self) -> str:
        return f"resizing RAM block '{self._block.idstr}' from {format_size(self._old)} to {format_size(self._new)}"

    def tell(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_resized`."""
        hook: _Hook | None = getattr(notifier, "ram_block_resized", None)
        if hook is not None:
            hook(self._block, self._old, self._new)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_resized`."""
        hook: _Hook | None = getattr(notifier, "ram_block_resized", None)
        if hook is not None:
            hook(self._block, self._new, self._old)


class Discarded:
    """Parts of a block that were populated go."""

    def __init__(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        self._block, self._parts = block, parts

    def __str__(self) -> str:
        return f"discarding {format_size(total(self._parts))} of RAM block '{self._block.idstr}'"

    def tell(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_discarded`."""
        if follows_parts(notifier):
            notifier.ram_block_discarded(self._block, self._parts)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_populated`."""
        if follows_parts(notifier):
            notifier.ram_block_populated(self._block, self._parts)


class Populated(Discarded):
    """Parts of a block that were discarded come back."""

    tell, revoke = Discarded.revoke, Discarded.tell

    def __str__(self) -> str:
        return f"populating {format_size(total(self._parts))} of RAM block '{self._block.idstr}'"


class Remapping(Discarded):
    """Pages behind parts of a block are replaced."""

    def __str__(self) -> str:
        return f"putting other pages behind {format_size(total(self._parts))} of RAM block '{self._block.idstr}'"

    def tell(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_remapping`."""
        if follows_pages(notifier):
            notifier.ram_block_remapping(self._block, self._parts)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """`ram_block_remapped`."""
        if follows_pages(notifier):
            notifier.ram_block_remapped(self._block, self._parts)


def tell_all(event: Event, notifiers: Sequence[RamBlockNotifier], commit: Callable[[], None]) -> None:
    """Tell all `notifiers` of `event` and then call `commit`, which changes nothing where it raises.

    When one of these raises, the notifiers that were told are told the reverse, the last one first.
    """
    told = 0
    try:
        for notifier in notifiers:
            if isinstance(getattr(notifier, "guard", None), Guard):  # the library's own, which each resize tells
                event.tell(notifier)
            else:
                _call_out(event.tell, notifier)
            told += 1
        checkpoint()
        commit()
    except BaseException as error:
        _undo([(notifier, event) for notifier in notifiers[:told]], error, event)
        raise


def tell_each(notifier: RamBlockNotifier, events: Sequence[Event], change: object, commit: Callable[[], None]) -> None:
    """Tell one notifier of all `events`, as `tell_all`; `change` names the whole, for an error."""
    told = 0
    try:
        for event in events:
            _call_out(event.tell, notifier)
            told += 1
        checkpoint()
        commit()
    except BaseException as error:
        _undo([(notifier, event) for event in events[:told]], error, change)
        raise


def _call_out(hook: Callable[[RamBlockNotifier], None], notifier: RamBlockNotifier) -> None:
    """Call a hook, which may refuse, and so may a signal handler before it."""
    checkpoint()
    with called_out:
        hook(notifier)


def _undo(told: Sequence[tuple[RamBlockNotifier, Event]], cause: BaseException, change: object) -> None:
    """Tell all the reverse, also when some of them raise; RollbackError with all of that."""
    failures: list[Exception] = []
    for notifier, event in reversed(told):
        try:
            with undoing:
                _call_out(event.revoke, notifier)
        except BaseException as error:
            failures.append(as_exception(error))
    if failures:
        raise RollbackError(
            f"{change} failed, and so did its undo",
            [as_exception(cause), *failures],
            hint="The memory in question is kept, since a device may still reach it",
        ) from cause
