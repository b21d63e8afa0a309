"""The worlds of the contract: the fake as each kernel, or, with `--device`, the running one with that device."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pyvfio import ioctls, pci
from pyvfio.kernel import LinuxKernel
from pyvfio.testing.fake import VERSIONS, FakeDevice, FakeKernel
from pyvfio.testing.fake.iommu import iommu_model
from pyvfio.testing.world import dma_entry_limit
from tests.contract.world import Attached, World, real_memlock

ENTRIES = 64  # a kernel has 65535, which cost seconds to fill
RUNNING = "running"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of the contract runs on each fake, or, with `--device`, on the running kernel instead."""
    if "world_name" in metafunc.fixturenames:
        metafunc.parametrize("world_name", [RUNNING] if metafunc.config.getoption("--device") else list(VERSIONS))
    if "fake_name" in metafunc.fixturenames:
        metafunc.parametrize("fake_name", list(VERSIONS))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is about a fake in any case has been said where there is no device."""
    if config.getoption("--device"):
        items[:] = [item for item in items if "fake_name" not in getattr(item, "fixturenames", ())]


@contextlib.contextmanager
def _fake_memlock(kernel: FakeKernel, limit: int) -> Iterator[None]:
    kernel.memlock_limit = limit
    yield
    kernel.memlock_limit = None


def _fake_world(kernel: FakeKernel) -> World:
    major, minor = kernel.version.number
    return World(kernel, "0000:00:02.0", 2, (major, minor), lambda limit: _fake_memlock(kernel, limit))


def _running_world(bdf: str) -> World:
    kernel = LinuxKernel()
    group = pci.group_of(kernel, bdf)
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return World(kernel, bdf, group, (int(found[1]), int(found[2])), real_memlock)


@contextlib.contextmanager
def _running(request: pytest.FixtureRequest) -> Iterator[World]:
    bdfs: tuple[str, ...] = request.getfixturevalue("bdfs")
    few = dma_entry_limit(ENTRIES) if request.config.getoption("--throwaway") else contextlib.nullcontext()
    with few:
        yield _running_world(bdfs[0])


@contextlib.contextmanager
def _fake(name: str) -> Iterator[World]:
    model = replace(iommu_model("intel", VERSIONS[name]), dma_entry_limit=ENTRIES)
    with FakeKernel(name, iommu=model) as kernel:
        yield _fake_world(kernel)
        assert kernel.descriptors == ()
        assert kernel.memlock().used == 0
        kernel.check()


@pytest.fixture
def world(world_name: str, request: pytest.FixtureRequest) -> Iterator[World]:
    """A kernel with a device; what a test leaves open is closed."""
    with _running(request) if world_name == RUNNING else _fake(world_name) as world:
        yield world
        world.end()


@pytest.fixture
def fake(fake_name: str) -> Iterator[FakeKernel]:
    """A fake in any case, for what cannot be arranged elsewhere: group 2 with two devices and group 3 with one."""
    crowd = (2, [FakeDevice("0000:00:02.0"), FakeDevice("0000:00:02.1", msi=4, msix=8, msix_bar=0, resettable=True)])
    with FakeKernel(fake_name, groups=[crowd, (3, [FakeDevice("0000:00:03.0")])]) as kernel:
        yield kernel


@pytest.fixture
def fake_world(fake: FakeKernel) -> Iterator[World]:
    """The world around `fake`."""
    world = _fake_world(fake)
    yield world
    world.end()
    assert fake.memlock().used == 0


@pytest.fixture
def v2(world: World) -> Attached:
    """A container with VFIO_TYPE1v2_IOMMU."""
    return Attached.of(world, ioctls.VFIO_TYPE1v2_IOMMU)


@pytest.fixture
def v1(world: World) -> Attached:
    """A container with VFIO_TYPE1_IOMMU."""
    return Attached.of(world, ioctls.VFIO_TYPE1_IOMMU)
