"""A change of a RAM block: what notifiers are told of it, and how all of them accept it, or none.

A notifier refuses by raising. The notifiers that were told before it are then told the reverse, the last one first.

Source: `RAMBlockNotifier` (include/exec/ramlist.h) and RamDiscardListener (include/exec/memory.h) of QEMU, where no
notifier can refuse a resize. Here each can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.notifier import RamBlockNotifier, follows_pages, follows_parts
from pyvfio.errors import RollbackError, as_exception
from pyvfio.extents import Extent, total
from pyvfio.guard import call_out, checkpoint, undoing
from pyvfio.units import format_size


class Change:
    """A change of one block, which `notifiers` are told in their order. As a string it names the change, for an error.

    Calling it tells all of them, and then calls `commit`, which changes nothing where it raises. When one of these
    raises, the notifiers that were told are told the reverse, the last one first.
    """

    __slots__ = ("_arguments", "_block", "_notifiers")
    _arguments: tuple[Any, ...]
    _hook: ClassVar[str]
    _reverse: ClassVar[str]
    """The hooks' names: isinstance() of a protocol costs a hundred times as much as a look-up."""

    def __init__(self, block: RamBlock, notifiers: Iterable[RamBlockNotifier], *arguments: object) -> None:
        self._block, self._notifiers = block, tuple(notifiers)
        self._arguments = (block, *arguments)

    def __call__(self, commit: Callable[[], None]) -> None:
        """Tell, and commit."""
        told, name, arguments = 0, self._hook, self._arguments
        try:
            for notifier in self._notifiers:
                hook = getattr(notifier, name, None)
                if hook is not None:
                    call_out(hook, arguments)
                told += 1
            checkpoint()
            commit()
        except BaseException as error:
            _undo([(notifier, self) for notifier in self._notifiers[:told]], error, self)
            raise

    def tell(self, notifier: RamBlockNotifier) -> None:
        """Tell one more."""
        if (hook := getattr(notifier, self._hook, None)) is not None:
            call_out(hook, self._arguments)

    def settle(self, notifier: RamBlockNotifier) -> None:
        """Tell one that the change is final, where that makes a difference."""

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """Tell one the reverse."""
        if (hook := getattr(notifier, self._reverse, None)) is not None:
            call_out(hook, self._reversed())

    def _reversed(self) -> tuple[Any, ...]:
        return self._arguments


class Added(Change):
    """A block comes."""

    __slots__ = ()
    _hook, _reverse = "ram_block_added", "ram_block_removed"

    def __init__(self, block: RamBlock, notifiers: Iterable[RamBlockNotifier] = ()) -> None:
        super().__init__(block, notifiers, block.used_length, block.max_length)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """Tell one that the block is gone, which is final."""
        super().revoke(notifier)
        _tell_gone(notifier, self._block)

    def __str__(self) -> str:
        return f"adding RAM block '{self._block.idstr}'"


class Removed(Change):
    """A block goes. `ram_block_gone` is for mappers: until it is called, another notifier may refuse the removal, and
    the block has to come back to where it was."""

    __slots__ = ()
    _hook, _reverse = Added._reverse, Added._hook

    def __init__(self, block: RamBlock, notifiers: Iterable[RamBlockNotifier] = ()) -> None:
        super().__init__(block, notifiers, block.used_length, block.max_length)

    def __call__(self, commit: Callable[[], None]) -> None:
        """Tell, commit, and tell that it is final."""
        super().__call__(commit)
        for notifier in self._notifiers:
            self.settle(notifier)

    def settle(self, notifier: RamBlockNotifier) -> None:
        """Tell one that the block does not come back."""
        _tell_gone(notifier, self._block)

    def __str__(self) -> str:
        return f"removing RAM block '{self._block.idstr}'"


def _tell_gone(notifier: RamBlockNotifier, block: RamBlock) -> None:
    # Not by `call_out`: the change is made, so no signal handler may raise here. This is no hook of a program's own.
    if (settle := getattr(notifier, "ram_block_gone", None)) is not None:
        settle(block)


class Resized(Change):
    """A block changes its length."""

    __slots__ = ()
    _hook = _reverse = "ram_block_resized"

    def __init__(self, block: RamBlock, old: int, new: int, notifiers: tuple[RamBlockNotifier, ...]) -> None:
        self._block, self._notifiers, self._arguments = block, notifiers, (block, old, new)

    def _reversed(self) -> tuple[Any, ...]:
        block, old, new = self._arguments
        return block, new, old

    def __str__(self) -> str:
        _block, old, new = self._arguments
        return f"resizing RAM block '{self._block.idstr}' from {format_size(old)} to {format_size(new)}"


class Discarded(Change):
    """Parts of a block that were populated go."""

    __slots__ = ()
    _hook, _reverse = "ram_block_discarded", "ram_block_populated"
    _verb = "discarding"

    def __init__(self, block: RamBlock, parts: Sequence[Extent], notifiers: Iterable[RamBlockNotifier]) -> None:
        super().__init__(block, filter(follows_parts, notifiers), parts)

    def __str__(self) -> str:
        _block, parts = self._arguments
        return f"{self._verb} {format_size(total(parts))} of RAM block '{self._block.idstr}'"


class Populated(Discarded):
    """Parts of a block that were discarded come back."""

    __slots__ = ()
    _hook, _reverse = Discarded._reverse, Discarded._hook
    _verb = "populating"


class Remapping(Discarded):
    """Pages behind parts of a block are replaced."""

    __slots__ = ()
    _hook, _reverse = "ram_block_remapping", "ram_block_remapped"
    _verb = "putting other pages behind"

    def __init__(self, block: RamBlock, parts: Sequence[Extent], notifiers: Iterable[RamBlockNotifier]) -> None:
        Change.__init__(self, block, filter(follows_pages, notifiers), parts)

    def revoke_all(self) -> None:
        """Tell all the reverse, the last one first."""
        for notifier in reversed(self._notifiers):
            self.revoke(notifier)


def tell_each(notifier: RamBlockNotifier, changes: Sequence[Change], what: object, commit: Callable[[], None]) -> None:
    """Tell one notifier of all `changes` and then commit, or neither; `what` names the whole, for an error."""
    told = 0
    try:
        for change in changes:
            change.tell(notifier)
            told += 1
        checkpoint()
        commit()
    except BaseException as error:
        _undo([(notifier, change) for change in changes[:told]], error, what)
        raise
    for change in changes:
        change.settle(notifier)


def _undo(told: Sequence[tuple[RamBlockNotifier, Change]], cause: BaseException, what: object) -> None:
    """Tell all the reverse, also when some of them raise; RollbackError with all of that."""
    failures: list[Exception] = []
    for notifier, change in reversed(told):
        try:
            with undoing:
                change.revoke(notifier)
        except BaseException as error:
            failures.append(as_exception(error))
    if failures:
        raise RollbackError(
            f"{what} failed, and so did its undo",
            [as_exception(cause), *failures],
            hint="The memory in question is kept, since a device may still reach it",
        ) from cause
