"""A change of a RAM block: the hooks of the notifiers, and the rule that all notifiers accept the change or none.

A notifier refuses by raising. The notifiers called before are then called with the reverse, the last one first.

Source: `RAMBlockNotifier` (include/exec/ramlist.h) and RamDiscardListener (include/exec/memory.h) of QEMU. In QEMU, no
notifier can refuse a resize; in pyvfio, each can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from pyvfio.blocks.block import RamBlock
from pyvfio.blocks.notifier import RamBlockNotifier, follows_pages, follows_parts
from pyvfio.errors import RollbackError, as_exception
from pyvfio.extents import Extent, total
from pyvfio.guard import call_out, call_out_each, checkpoint, undoing
from pyvfio.units import format_size


class Change:
    """A change of one block, announced to `notifiers` in their order. `str()` names the change, for an error.

    A call of the change calls the hook of each notifier, and then `commit`. A `commit` that raises must have changed
    nothing. If a hook or `commit` raises, the notifiers called before are called with the reverse, the last one first.
    """

    __slots__ = ("_arguments", "_block", "_notifiers")
    _arguments: tuple[Any, ...]
    _hook: ClassVar[str]
    _reverse: ClassVar[str]
    """The names of the hooks. isinstance() of a protocol costs a hundred times as much as a look-up by name."""

    def __init__(self, block: RamBlock, notifiers: Iterable[RamBlockNotifier], *arguments: object) -> None:
        self._block, self._notifiers = block, tuple(notifiers)
        self._arguments = (block, *arguments)

    def __call__(self, commit: Callable[[], None]) -> None:
        """Call the hooks, and commit."""
        told: list[RamBlockNotifier] = []
        try:
            call_out_each(self._notifiers, self._hook, self._arguments, told)
            commit()
        except BaseException as error:
            _undo([(notifier, self) for notifier in told], error, self)
            raise

    def tell(self, notifier: RamBlockNotifier) -> None:
        """Call the hook of one more notifier."""
        if (hook := getattr(notifier, self._hook, None)) is not None:
            call_out(hook, self._arguments)

    def settle(self, notifier: RamBlockNotifier) -> None:
        """Tell one notifier that the change is final, if that makes a difference."""

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """Call one notifier with the reverse."""
        if (hook := getattr(notifier, self._reverse, None)) is not None:
            call_out(hook, self._reversed())

    def _reversed(self) -> tuple[Any, ...]:
        return self._arguments


class Added(Change):
    """A block is added."""

    __slots__ = ()
    _hook, _reverse = "ram_block_added", "ram_block_removed"

    def __init__(self, block: RamBlock, notifiers: Iterable[RamBlockNotifier] = ()) -> None:
        super().__init__(block, notifiers, block.used_length, block.max_length)

    def revoke(self, notifier: RamBlockNotifier) -> None:
        """Tell one notifier that the block is gone, which is final."""
        super().revoke(notifier)
        _tell_gone(notifier, self._block)

    def __str__(self) -> str:
        return f"adding RAM block '{self._block.idstr}'"


class Removed(Change):
    """A block is removed.

    `ram_block_gone` is a hook for mappers. Before this hook is called, another notifier may still refuse the removal,
    and the block must then return to its old place.
    """

    __slots__ = ()
    _hook, _reverse = Added._reverse, Added._hook

    def __init__(self, block: RamBlock, notifiers: Iterable[RamBlockNotifier] = ()) -> None:
        super().__init__(block, notifiers, block.used_length, block.max_length)

    def __call__(self, commit: Callable[[], None]) -> None:
        """Call the hooks, commit, and tell that the removal is final."""
        super().__call__(commit)
        for notifier in self._notifiers:
            self.settle(notifier)

    def settle(self, notifier: RamBlockNotifier) -> None:
        """Tell one notifier that the block will not return."""
        _tell_gone(notifier, self._block)

    def __str__(self) -> str:
        return f"removing RAM block '{self._block.idstr}'"


def _tell_gone(notifier: RamBlockNotifier, block: RamBlock) -> None:
    # Not by `call_out`: the change is made, so no signal handler may raise here. No program implements this hook.
    if (settle := getattr(notifier, "ram_block_gone", None)) is not None:
        settle(block)


class Resized(Change):
    """The length of a block changes."""

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
    """Populated parts of a block are discarded."""

    __slots__ = ()
    _hook, _reverse = "ram_block_discarded", "ram_block_populated"
    _verb = "discarding"

    def __init__(self, block: RamBlock, parts: Sequence[Extent], notifiers: Iterable[RamBlockNotifier]) -> None:
        super().__init__(block, filter(follows_parts, notifiers), parts)

    def __str__(self) -> str:
        _block, parts = self._arguments
        return f"{self._verb} {format_size(total(parts))} of RAM block '{self._block.idstr}'"


class Populated(Discarded):
    """Discarded parts of a block are populated."""

    __slots__ = ()
    _hook, _reverse = Discarded._reverse, Discarded._hook
    _verb = "populating"


class Remapping(Discarded):
    """The pages of parts of a block are replaced."""

    __slots__ = ()
    _hook, _reverse = "ram_block_remapping", "ram_block_remapped"
    _verb = "replacing the pages of"

    def __init__(self, block: RamBlock, parts: Sequence[Extent], notifiers: Iterable[RamBlockNotifier]) -> None:
        Change.__init__(self, block, filter(follows_pages, notifiers), parts)

    def revoke_all(self) -> None:
        """Call all notifiers with the reverse, the last one first."""
        for notifier in reversed(self._notifiers):
            self.revoke(notifier)


def tell_each(notifier: RamBlockNotifier, changes: Sequence[Change], what: object, commit: Callable[[], None]) -> None:
    """Call the hooks of one notifier for all `changes`, and then commit; or do neither. `what` names all of them."""
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
    """Call the reverse of each, even if some raise. Raises RollbackError with all errors."""
    failures: list[Exception] = []
    for notifier, change in reversed(told):
        try:
            with undoing:
                change.revoke(notifier)
        except BaseException as error:
            failures.append(as_exception(error))
    if failures:
        raise RollbackError(
            f"{what} failed, and the undo failed too",
            [as_exception(cause), *failures],
            hint="The memory in question is kept, because a device may still reach it",
        ) from cause
