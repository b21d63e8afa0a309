"""A VFIO-bound device for the tests: `--device BDF` or `--device VENDOR:DEVICE`, with `--bind` bound for their time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.kernel import LinuxKernel
from tests.hw.rig import Rig, has_engine


def _matches(device: pci.PciDevice, wanted: str) -> bool:
    if wanted.count(":") == 1 and "." not in wanted:
        vendor, _, number = wanted.partition(":")
        return (device.vendor, device.device) == (int(vendor, 16), int(number, 16))
    return device.bdf == pci.parse_bdf(wanted)


@pytest.fixture(scope="session")
def kernel() -> LinuxKernel:
    """The running kernel."""
    return LinuxKernel()


@pytest.fixture(scope="session")
def bdfs(request: pytest.FixtureRequest, kernel: LinuxKernel) -> Iterator[tuple[str, ...]]:
    """The devices that the command line names, bound to vfio-pci."""
    wanted: list[str] = request.config.getoption("--device")
    if not wanted:
        pytest.skip("no --device was given")
    devices = pci.enumerate_devices(kernel)
    found = tuple(device.bdf for name in wanted for device in devices if _matches(device, name))
    assert found, f"no device is {' or '.join(wanted)}; there are {', '.join(device.bdf for device in devices)}"
    with ExitStack() as stack:
        if request.config.getoption("--bind"):
            for bdf in found:
                stack.callback(pci.restore, kernel, pci.bind(kernel, bdf))
        yield found


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
