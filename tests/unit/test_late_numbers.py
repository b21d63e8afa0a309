"""Numbers that are objects of a program's own, which change a block when they are asked for their value."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyvfio
from pyvfio.testing import FakeKernel
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import Rig

LOOKS: dict[str, Callable[[Rig, pyvfio.RamBlock, Shrinking], object]] = {
    "view": lambda _rig, block, size: block.view(0, size),
    "iova": lambda rig, block, size: rig.mapper.iova(block, 0, size),
    "segments": lambda rig, block, size: rig.mapper.segments(block, 0, size),
}


class Shrinking:
    """All that a block has in use, which it loses when this is asked for."""

    def __init__(self, block: pyvfio.RamBlock) -> None:
        self.block = block

    def __index__(self) -> int:
        before = self.block.used_length
        self.block.resize(0)
        return before


@pytest.mark.parametrize("look", LOOKS.values(), ids=list(LOOKS))
def test_a_length_is_compared_with_what_the_block_has_then(
    kernel: FakeKernel, look: Callable[[Rig, pyvfio.RamBlock, Shrinking], object]
) -> None:
    """Else a view would lead to memory that is gone, and an IOVA to nothing."""
    with Rig(kernel) as rig:
        block = rig.add(used=4 * PAGE_SIZE)
        with pytest.raises(ValueError, match="in use"):
            look(rig, block, Shrinking(block))
        rig.check()
