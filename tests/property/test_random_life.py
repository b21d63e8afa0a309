"""Random lives of blocks, listeners, mappers and a device on fake kernels, against a model: `tests.life.machine`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from pyvfio.testing import FakeKernel
from pyvfio.testing.world import FakeWorld, World
from tests.life.machine import REFUSED, live

MANY = 10_000
"""Steps from which on every refusal that there is has to be met."""


@contextmanager
def fake(version: str, iommu: str, space: str = "type1") -> Iterator[World]:
    """A new one for each life."""
    with FakeKernel(version, iommu=iommu, iommufd=space == "iommufd", type1=space == "type1") as kernel:
        yield FakeWorld(kernel)


WORLDS = [
    partial(fake, "6.1", "intel"),
    partial(fake, "6.12", "virtio"),
    partial(fake, "7.3", "amd"),
    partial(fake, "6.12", "intel", "iommufd"),
    partial(fake, "7.3", "virtio", "iommufd"),
    partial(fake, "7.3", "amd", "iommufd"),
]


def test_whatever_happens_the_device_reaches_what_is_populated_and_nothing_else(
    request: pytest.FixtureRequest, random_seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """And all else is as the model says, through failures, refusals and a change of mappers."""
    steps: int = request.config.getoption("--random-steps")
    refusals = REFUSED if steps >= MANY else ()
    tally = live(WORLDS, steps=steps, seed=random_seed, until=refusals)
    assert tally.steps >= steps
    assert tally["dma: arrived"]
    assert tally["dma: stopped"]
    assert {refusal.__name__ for refusal in refusals} <= tally.ends()
    with capsys.disabled():
        print(tally)
