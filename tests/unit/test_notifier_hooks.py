"""Objects that no change could call are refused when they are added."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

import pyvfio

HOOKS = {
    "ram_block_added",
    "ram_block_removed",
    "ram_block_resized",
    "ram_block_discarded",
    "ram_block_populated",
    "ram_block_remapping",
    "ram_block_remapped",
}


class Watcher:
    """A notifier with all hooks."""

    def ram_block_added(self, *_: object) -> None:
        """Do nothing."""

    ram_block_removed = ram_block_resized = ram_block_discarded = ram_block_populated = ram_block_added
    ram_block_remapping = ram_block_remapped = ram_block_added


async def _late(*_: object) -> None:
    """Would run in an event loop only."""


@pytest.fixture
def blocks() -> Iterator[pyvfio.RamBlockList]:
    """A list with a block."""
    with pyvfio.RamBlockList() as made:
        made.add("ring", used_length=4096, max_length=8192)
        yield made


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_hook_that_is_a_coroutine_function_is_refused(blocks: pyvfio.RamBlockList, hook: str) -> None:
    """Its call returns at once: memory would be returned that the notifier has not unmapped."""
    watcher = Watcher()
    setattr(watcher, hook, _late)
    with pytest.raises(TypeError, match=f"{hook} must be a function, not a coroutine function"):
        blocks.add_notifier(watcher)
    blocks["ring"].resize(0)


def test_a_class_in_place_of_an_object_is_refused(blocks: pyvfio.RamBlockList) -> None:
    """Each later change would fail."""
    with pytest.raises(TypeError, match="is a class: add an object of the class"):
        blocks.add_notifier(Watcher)  # type: ignore[arg-type]
    blocks.add_notifier(Watcher())
    blocks["ring"].resize(8192)


@pytest.mark.parametrize("name", ["progress", "resized"])
def test_a_callback_of_a_block_is_no_coroutine_function_either(blocks: pyvfio.RamBlockList, name: str) -> None:
    """`resized` can refuse a change."""
    add = partial(blocks.add, "next", used_length=0, max_length=4096)
    with pytest.raises(TypeError, match="progress or resized must be a function, not a coroutine function"):
        add(**{name: _late})  # type: ignore[arg-type]
    assert "next" not in blocks
