"""Whoever is told before anything of a RAM block changes, and how all of them are told, or none.

A notifier refuses by raising; those who were told before it are told the reverse, the last told first.

Source: `RAMBlockNotifier` (include/exec/ramlist.h) and RamDiscardListener (include/exec/memory.h) of QEMU, where none
can refuse a resize; here each can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias, TypeGuard, runtime_checkable

from pyvfio.block import RamBlock
from pyvfio.errors import RollbackError, as_exception
from pyvfio.extents import Extent, clip, total
from pyvfio.units import format_size


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

        Raising refuses it, and whoever raises has left everything as it was, unless it raises RollbackError. What a
        signal handler raises (KeyboardInterrupt) may come when all is done, so that the opposite is told then, which
        has to leave alone what is so already. Whoever returns reaches nothing behind `new_length` any more, whatever an
        earlier failure had left: that memory may now be given back.
        """
        ...


@runtime_checkable
class SupportsRamBlockDiscarded(Protocol):
    """A notifier with these hooks lets parts of a block go and come back (coordinated discards).

    Who has none of them, but `ram_block_added`, reaches whole blocks, so that nothing may be discarded while it is
    there. Who comes later finds what is discarded in `block.populated`.
    """

    def ram_block_discarded(self, block: RamBlock, parts: Sequence[Extent]) -> None:
        """`parts`, ascending and all of them populated, are about to be given back. Raising refuses it. Whoever returns
        reaches none of them any more."""
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
        Whoever returns holds none of the present ones any more."""
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
"""Whatever has at least one of the hooks."""

HOOKS = (
    SupportsRamBlockAdded,
    SupportsRamBlockRemoved,
    SupportsRamBlockResized,
    SupportsRamBlockDiscarded,
    SupportsRamBlockRemapped,
)


# Hooks are looked up by name: isinstance() of a protocol costs a hundred times as much, and each resize would pay it.
_Hook: TypeAlias = Callable[[RamBlock, int, int], None]


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
