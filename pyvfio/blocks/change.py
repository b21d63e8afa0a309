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
from pyvfio.extents import Extent, clip, total
from pyvfio.units import format_size

# Hooks are looked up by name: isinstance() of a protocol costs a hundred times as much, and each resize would pay it.
_Hook: TypeAlias = Callable[[RamBlock, int, int], None]


class Event(Protocol):
    """Something a notifier is told, and its opposite; its string says what was tried, for the error."""

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
        self.settled = True
        self._parts = block._discarded, block._stale

    def commit(self) -> None:
        """All have been told: the block has that length, and its callback is called."""
        block, new = self._block, self._new
        if new < self._old:
            block._check_views(new)  # a hook may have taken one
            block._set_discarded(*(tuple(clip(parts, 0, new)) for parts in self._parts))
        block._used_length = new
        if block._resized is not None:
            block._resized(block.idstr, new)

    def rollback(self) -> None:
        """It has the former one."""
        self._block._used_length = self._old
        self._block._set_discarded(*self._parts)

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


class Change(Protocol):
    """What all of it is for: made when everybody has been told. Its string says what was tried, for the error."""

    settled: bool
    """False while somebody may have been told, and not yet the opposite: nothing may be given back then."""

    def commit(self) -> None:
        """Make it; may refuse by raising."""
        ...

    def rollback(self) -> None:
        """Take back what `commit` may have done."""
        ...


class Bookkeeping:
    """A change that is a matter of setting something, and of setting what was there before."""

    def __init__(self, what: object, commit: Callable[[], None], rollback: Callable[[], None]) -> None:
        self._what = what
        self.settled = True
        self.commit, self.rollback = commit, rollback

    def __str__(self) -> str:
        return str(self._what)


def tell_all(notifiers: Sequence[RamBlockNotifier], events: Sequence[Event], change: Change) -> None:
    """Tell each its event and then make the change, or nothing of it: when one raises, those before it are told the
    opposite, the last told first.

    Nothing that belongs to the change stands outside of this, for a signal handler may raise between any two lines. It
    may also have ended a hook that had done its part, so that this one, too, is told the opposite.
    """
    told = 0
    change.settled = False
    try:
        for notifier in notifiers:
            events[told].tell(notifier)
            told += 1
        change.commit()
    except BaseException as error:
        change.rollback()
        count = told if isinstance(error, Exception) else told + 1
        undo_all(list(zip(notifiers, events, strict=True))[:count], error, change)
        change.settled = True
        raise


def undo_all(told: Sequence[tuple[RamBlockNotifier, Event]], cause: BaseException, what: object) -> None:
    """Tell the opposite to all who were told of `what`, whatever some of them raise; RollbackError with all of that."""
    failures: list[Exception] = []
    for notifier, event in reversed(told):
        try:
            event.revoke(notifier)
        except BaseException as error:  # a KeyboardInterrupt, too, must not end the undo in the middle
            failures.append(as_exception(error))
    if failures:
        raise RollbackError(
            f"{what} failed, and so did its undo",
            [as_exception(cause), *failures],
            hint="The memory in question is kept, since a device may still reach it",
        ) from cause
