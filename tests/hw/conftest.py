"""What the tests do with the devices of `--device`: one that is open, and one whose DMA engine they can drive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.kernel import LinuxKernel
from tests.hw.rig import Rig, has_engine


@pytest.fixture(scope="session")
def bdf(bdfs: tuple[str, ...]) -> str:
    """The first device."""
    return bdfs[0]


@pytest.fixture(scope="session")
def engine_bdfs(bdfs: tuple[str, ...], kernel: LinuxKernel) -> tuple[str, ...]:
    """Those that are `edu` devices."""
    found = tuple(bdf for bdf in bdfs if has_engine(pci.read_device(kernel, bdf)))
    if not found:
        pytest.skip("this needs the DMA engine of an edu device")
    return found


@pytest.fixture
def device(bdf: str) -> Iterator[pyvfio.Device]:
    """The first device, open in a container of its own."""
    with pyvfio.open_device(bdf) as opened:
        yield opened


@pytest.fixture
def rig(engine_bdfs: tuple[str, ...]) -> Iterator[Rig]:
    """A device with a DMA engine, a list of blocks and a mapper that follows it."""
    with Rig(engine_bdfs[0]) as made:
        yield made
