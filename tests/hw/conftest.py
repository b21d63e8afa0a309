"""What the tests do with the devices of `--device` or of `--fake`: the world that they are in, one device that is open,
and one whose DMA engine they can drive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.kernel import Kernel
from pyvfio.testing.world import FakeWorld, LinuxWorld, World
from tests.hw.rig import Rig, has_engine
from tests.spaces import AddressSpace, charged, fake_of, linux_of, new_space


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A fake kernel, new for each test, with `--fake`; else the running one with the devices of `--device`. Each shows
    the kind of address space that `--space` names."""
    config = request.config
    if not config.getoption("--fake"):
        with (
            linux_of(config) as linux,
            charged(config, LinuxWorld(request.getfixturevalue("bdfs"), kernel=linux)) as made,
        ):
            yield made
        return
    with fake_of(config) as kernel, charged(config, FakeWorld(kernel)) as made:
        yield made
        kernel.check()
        assert kernel.descriptors == ()
        assert made.locked_bytes() == 0


@pytest.fixture
def throwaway(request: pytest.FixtureRequest) -> None:
    """Nobody minds what happens to this machine."""
    if not request.config.getoption("--throwaway"):
        pytest.skip("this changes settings of the machine; say --throwaway where nobody minds")


@pytest.fixture
def kernel(world: World) -> Kernel:
    """The world's kernel."""
    return world.kernel


@pytest.fixture
def bdf(world: World) -> str:
    """The first device."""
    return world.bdfs[0]


@pytest.fixture
def engine_bdfs(world: World) -> tuple[str, ...]:
    """Those that are `edu` devices."""
    found = tuple(bdf for bdf in world.bdfs if has_engine(pci.read_device(bdf, kernel=world.kernel)))
    if not found:
        pytest.skip("this needs the DMA engine of an edu device")
    return found


@pytest.fixture
def space(kernel: Kernel) -> Iterator[AddressSpace]:
    """An address space without a device."""
    with new_space(kernel) as made:
        yield made


@pytest.fixture
def device(bdf: str, kernel: Kernel) -> Iterator[pyvfio.Device]:
    """The first device, open in an address space of its own."""
    with pyvfio.open_device(bdf, kernel=kernel) as opened:
        yield opened


@pytest.fixture
def rig(engine_bdfs: tuple[str, ...], kernel: Kernel) -> Iterator[Rig]:
    """A device with a DMA engine, a list of blocks and a mapper that follows it."""
    with Rig(engine_bdfs[0], kernel=kernel) as made:
        yield made
