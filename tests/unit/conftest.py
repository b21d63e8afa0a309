"""What most tests of blocks and what follows them begin with; a module that wants another one has its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyvfio.testing.fake import FakeDevice
from tests.unit.fakes import BDF, Rig, SpecialKernel


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """With one device."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made:
        yield made


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """A device, and blocks that its mapper follows."""
    with Rig(kernel) as made:
        yield made
