"""Random lives of blocks, listeners, mappers and a device, against a model: `tests.life.machine`."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from pyvfio.testing.world import World
from tests.life.machine import live

STEPS, A_TIME, TRANSFERS = 600, 40, 5  # a transfer takes a real edu 100 ms, and each question two to five of them


@pytest.mark.usefixtures("engine_bdfs")
def test_whatever_happens_the_device_reaches_what_is_populated_and_nothing_else(
    world: World, random_seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the kernel refuses to lock more memory or to take more mappings, and listeners refuse what they like."""
    tally = live(
        [lambda: nullcontext(world)], steps=STEPS, seed=random_seed, transfers=TRANSFERS, a_time=A_TIME, shrink=False
    )
    assert tally.steps >= STEPS
    assert tally["dma: arrived"]
    assert tally["dma: stopped"]
    with capsys.disabled():
        print(tally)
