"""The worlds of the contract: the fake as each kernel, or, with `--device`, the running one with that device."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pyvfio import ioctls
from pyvfio.kernel import LinuxKernel
from pyvfio.testing.fake import VERSIONS, FakeDevice, FakeKernel
from pyvfio.testing.fake.iommu import iommu_model
from tests.contract.world import Attached, World, real_memlock

ENTRIES = 64  # a kernel has 65535, which cost seconds to fill


def _devices(config: pytest.Config) -> list[str]:
    return list(config.getoption("--device", default=None) or [])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of the contract runs on each fake, or on the running kernel; one about `fake` on each fake in any case."""
    if "world_name" in metafunc.fixturenames:
        metafunc.parametrize("world_name", _devices(metafunc.config) or list(VERSIONS))
    if "fake_name" in metafunc.fixturenames:
        metafunc.parametrize("fake_name", list(VERSIONS))


@contextlib.contextmanager
def _fake_memlock(kernel: FakeKernel, limit: int) -> Iterator[None]:
    kernel.memlock_limit = limit
    yield
    kernel.memlock_limit = None


def _fake_world(kernel: FakeKernel) -> World:
    major, minor = kernel.version.number
    return World(kernel, "0000:00:02.0", 2, (major, minor), lambda limit: _fake_memlock(kernel, limit))


def _find(kernel: LinuxKernel, name: str) -> str:
    """The address of a device that is called by its address or as vendor:device."""
    for home in sorted((kernel.sysfs / "bus/pci/devices").iterdir()):
        ids = ":".join((home / file).read_text().strip()[2:] for file in ("vendor", "device"))
        if name.lower() in (home.name, ids):
            return home.name
    raise LookupError(f"no PCI device {name}")


def _running_world(name: str) -> World:
    kernel = LinuxKernel()
    bdf = _find(kernel, name)
    group = int((kernel.sysfs / "bus/pci/devices" / bdf / "iommu_group").resolve().name)
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return World(kernel, bdf, group, (int(found[1]), int(found[2])), real_memlock)


@pytest.fixture
def world(world_name: str) -> Iterator[World]:
    """A kernel with a device; what a test leaves open is closed."""
    if world_name not in VERSIONS:
        world = _running_world(world_name)
        yield world
        world.end()
        return
    model = replace(iommu_model("intel", VERSIONS[world_name]), dma_entry_limit=ENTRIES)
    with FakeKernel(world_name, iommu=model) as kernel:
        world = _fake_world(kernel)
        yield world
        world.end()
        assert kernel.descriptors == ()
        assert kernel.memlock().used == 0
        kernel.check()


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
