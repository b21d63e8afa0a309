"""The worlds of the contract: the fake as each kernel, or, with `--device`, the running kernel with that device.

A test that needs other devices takes a fixture named after the device. On a running kernel, these devices exist only in
a virtual machine with `--devices contract`, and are used only with `--throwaway`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pyvfio import ioctls, pci
from pyvfio.kernel import LinuxKernel
from pyvfio.testing.fake import VERSIONS, FakeKernel
from pyvfio.testing.fake.iommu import iommu_model
from pyvfio.testing.world import dma_entry_limit
from tests.contract.devices import (
    FAKE,
    TO_BIND,
    Company,
    Id,
    Member,
    fake_groups,
    find_company,
    find_functions,
)
from tests.contract.iommufd import Cdev, Iommufd, Rig
from tests.contract.world import Attached, Sriov, World, real_memlock, real_message, real_pinned, real_rebind

ENTRIES = 64  # a kernel has 65535, which cost seconds to fill
RUNNING = "running"
FIRST_IOMMUFD = (6, 12)
"""The first kernel of the contract with iommufd and cdevs."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of the contract on each fake, or, with `--device`, on the running kernel instead."""
    if "world_name" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("iommufd")
        fakes = [name for name in VERSIONS if marker is None or _has_iommufd(VERSIONS[name].number, marker)]
        metafunc.parametrize("world_name", [RUNNING] if metafunc.config.getoption("--device") else fakes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that the world of this run cannot judge: there is nothing to skip.

    On fakes, these are the tests of behaviours that a fake lacks. On the running kernel, these are the tests of iommufd
    calls that the kernel is too old for.
    """
    left_out = [item for item in items if _left_out(item, running=bool(config.getoption("--device")))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _left_out(item: pytest.Item, *, running: bool) -> bool:
    if item.path.parent != Path(__file__).parent:
        return False
    if not running:
        return item.get_closest_marker("real_kernel") is not None
    marker = item.get_closest_marker("iommufd")
    return marker is not None and not _has_iommufd(running_version(), marker)


def _has_iommufd(version: tuple[int, ...], marker: pytest.Mark) -> bool:
    since: tuple[int, int] = marker.kwargs.get("since", FIRST_IOMMUFD)
    return tuple(version) >= since


@contextlib.contextmanager
def _fake_memlock(kernel: FakeKernel, limit: int, *, privileged: bool) -> Iterator[None]:
    kernel.memlock_limit, kernel.privileged = limit, privileged
    yield
    kernel.memlock_limit, kernel.privileged = None, False


def _fake_world(kernel: FakeKernel) -> World:
    major, minor = kernel.version.number
    return World(
        kernel,
        *FAKE,
        (major, minor),
        partial(_fake_memlock, kernel),
        kernel.bind,
        kernel.violations.clear,
        lambda _fd, bdf: kernel.interrupt(bdf),
        lambda: kernel.pinned,
    )


def running_version() -> tuple[int, int]:
    """Return the version of the running kernel."""
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    assert found is not None
    return int(found[1]), int(found[2])


def _running_world(bdf: str) -> World:
    kernel = LinuxKernel()
    group = pci.group_of(bdf, kernel=kernel)
    return World(
        kernel,
        bdf,
        group,
        running_version(),
        real_memlock,
        partial(real_rebind, kernel),
        lambda: None,
        partial(real_message, kernel),
        real_pinned,
    )


@contextlib.contextmanager
def _running(request: pytest.FixtureRequest) -> Iterator[World]:
    bdfs: tuple[str, ...] = request.getfixturevalue("bdfs")
    few = dma_entry_limit(ENTRIES) if request.config.getoption("--throwaway") else contextlib.nullcontext()
    with few:
        yield _running_world(bdfs[0])


@contextlib.contextmanager
def _fake(name: str, *, iommufd: bool) -> Iterator[World]:
    model = replace(iommu_model("intel", VERSIONS[name]), dma_entry_limit=ENTRIES)
    with FakeKernel(name, iommu=model, groups=fake_groups(), iommufd=iommufd) as kernel:
        yield _fake_world(kernel)
        assert kernel.descriptors == ()
        assert kernel.memlock().used == 0
        kernel.check()


@pytest.fixture
def world(world_name: str, request: pytest.FixtureRequest) -> Iterator[World]:
    """A kernel with a device. At the end, open descriptors are closed, and devices are bound back."""
    iommufd = request.node.get_closest_marker("iommufd") is not None
    with _running(request) if world_name == RUNNING else _fake(world_name, iommufd=iommufd) as world:
        if iommufd and not (world.kernel.dev / "iommu").exists():
            pytest.skip(
                "this kernel has no /dev/iommu: packaged kernels have none, `scripts/vm --kernel 7+iommufd` has"
            )
        yield world
        world.end()


@pytest.fixture
def v2(world: World) -> Attached:
    """A container with VFIO_TYPE1v2_IOMMU."""
    return Attached.of(world, ioctls.VFIO_TYPE1v2_IOMMU)


@pytest.fixture
def v1(world: World) -> Attached:
    """A container with VFIO_TYPE1_IOMMU."""
    return Attached.of(world, ioctls.VFIO_TYPE1_IOMMU)


@pytest.fixture
def iommufd(world: World) -> Iommufd:
    """An open /dev/iommu."""
    return Iommufd.of(world)


@pytest.fixture
def cdev(iommufd: Iommufd) -> Cdev:
    """A cdev that is bound to the iommufd, and not attached."""
    cdev = Cdev.of(iommufd.world)
    cdev.bind(iommufd.fd)
    return cdev


@pytest.fixture
def rig(iommufd: Iommufd) -> Rig:
    """A device that is attached to an IOAS of the iommufd."""
    return Rig.of(iommufd)


# ------------------------------------------------------------------------------------------------------ other devices


@pytest.fixture(scope="session")
def running_company(request: pytest.FixtureRequest) -> Iterator[Company]:
    """The other devices of the running machine, bound to vfio-pci."""
    if not request.config.getoption("--throwaway"):
        pytest.skip("this uses devices that --device does not name: only in a virtual machine, with --throwaway")
    kernel = LinuxKernel()
    company = find_company(kernel)
    if company is None:
        pytest.skip("this needs the devices of scripts/vm --devices contract")
    with ExitStack() as stack:
        for device in pci.devices(kernel=kernel):
            if Id(device.vendor, device.device) in TO_BIND:
                stack.callback(pci.restore, pci.bind(device.bdf, kernel=kernel), kernel=kernel)
        yield company


@pytest.fixture(scope="session")
def fake_company() -> Company:
    """The other devices of each fake."""
    with FakeKernel(groups=fake_groups()) as kernel:
        company = find_company(kernel)
    assert company is not None
    return company


@pytest.fixture
def company(world_name: str, request: pytest.FixtureRequest) -> Company:
    """The other devices."""
    found: Company = request.getfixturevalue("running_company" if world_name == RUNNING else "fake_company")
    return found


@pytest.fixture(scope="session")
def running_function(request: pytest.FixtureRequest) -> Iterator[Member]:
    """A physical function of the running machine, bound to vfio-pci, which can make virtual functions."""
    if not request.config.getoption("--throwaway"):
        pytest.skip("this makes virtual functions: only in a virtual machine, with --throwaway")
    kernel = LinuxKernel()
    found = find_functions(kernel)
    if not found:
        pytest.skip("this needs the devices of scripts/vm --devices contract")
    with ExitStack() as stack:
        stack.callback(pci.restore, pci.bind(found[0].bdf, kernel=kernel), kernel=kernel)
        pci.write_sysfs(kernel.sysfs / "module/vfio_pci/parameters/enable_sriov", "1")
        yield found[0]


@pytest.fixture
def sriov(world_name: str, world: World, request: pytest.FixtureRequest) -> Iterator[Sriov]:
    """The world around a physical function, and a call that makes a virtual one.

    A test opens the physical function first, and keeps it open. If its reset came later, QEMU's virtual functions would
    disappear, and kernels before 7 would wait a minute for each.
    """
    if world_name != RUNNING:
        physical, virtual = (world.around(*each) for each in find_functions(world.kernel))
        yield Sriov(physical, lambda: virtual)
        return
    own, member = world.apart(), request.getfixturevalue("running_function")
    count = own.kernel.sysfs / "bus/pci/devices" / member.bdf / "sriov_numvfs"

    def make() -> World:
        pci.write_sysfs(count, "1")
        return own.around(*find_functions(own.kernel)[1])

    yield Sriov(own.around(*member), make)
    own.end()
    pci.write_sysfs(count, "0")


@pytest.fixture
def other(world: World, company: Company) -> World:
    """The world around a second device like the first, in a group of its own."""
    return world.around(*company.edu)


@pytest.fixture
def xhci(world: World, company: Company) -> World:
    """The world around a device with INTx, 16 vectors of MSI and 16 of MSI-X, PCI Express, and no reset."""
    return world.around(*company.xhci)


@pytest.fixture
def functions(world: World, company: Company) -> tuple[World, World]:
    """The worlds around two functions of one device, in one group: no interrupts, a page of memory, I/O ports."""
    return world.around(*company.functions[0]), world.around(*company.functions[1])


@pytest.fixture
def bridged(world: World, company: Company) -> World:
    """The world around a device behind a bridge. The sibling there, `company.rng`, has a kernel driver."""
    return world.around(*company.bridged)


@pytest.fixture
def e1000e(world: World, company: Company) -> World:
    """The world around a device that can be reset, alone on its bus and in one group with its root port."""
    return world.around(*company.e1000e)
