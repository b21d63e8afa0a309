"""Memory in the order of its addresses."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvfio.mapper.by_address import ByAddress
from pyvfio.units import Vaddr


class Thing(NamedTuple):
    """Memory, as far as the order asks for it."""

    vaddr: Vaddr


@pytest.mark.long
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "remove", "ask", "clear"]), st.integers(0, 30)), min_size=1, max_size=60
    )
)
def test_the_thing_below_an_address_is_the_one_that_a_walk_finds(steps: list[tuple[str, int]]) -> None:
    """After any changes, each of which is counted. The last answer is never one that was removed."""
    things, model = ByAddress[Thing](), dict[int, Thing]()
    for action, number in steps:
        before = things.changes, dict(model)
        if action == "ask":
            wanted = max((vaddr for vaddr in model if vaddr <= number), default=None)
            assert things.below(number) is (None if wanted is None else model[wanted])
        elif action == "clear":
            things.clear()
            model.clear()
        elif action == "add" and number not in model:
            model[number] = Thing(Vaddr(number))
            things.add(model[number])
        elif action == "remove" and number in model:
            things.remove(number)
            del model[number]
        things._check()
        assert things.changes > before[0] or model == before[1]
        assert list(things) == [model[vaddr] for vaddr in sorted(model)]
        assert len(things) == len(model)
