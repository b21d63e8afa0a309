"""Options that all tests share: which device to use, and whether its absence is a failure."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack

import hypothesis
import pytest

from pyvfio import pci
from pyvfio.cli.common import selector_argument
from pyvfio.kernel import LinuxKernel

# A machine that is busy is not a bug, so how long an example takes is not looked at.
hypothesis.settings.register_profile("pyvfio", deadline=None)
hypothesis.settings.load_profile("pyvfio")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device`, `--bind`, `--throwaway`, `--hw-required`."""
    group = parser.getgroup("pyvfio")
    group.addoption(
        "--device",
        action="append",
        default=[],
        metavar="BDF|VENDOR:DEVICE",
        help="a PCI device for the tests in tests/hw and tests/contract; may be given more than once",
    )
    group.addoption(
        "--bind", action="store_true", help="bind the devices to vfio-pci before the tests and give them back after"
    )
    group.addoption(
        "--throwaway",
        action="store_true",
        help="this machine is a throw-away virtual machine, whose settings the tests may change",
    )
    group.addoption(
        "--hw-required", action="store_true", help="a test that lacks what it needs fails, where it would be skipped"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With --hw-required a skip is a failure: CI must not pass because something is missing."""
    report = yield
    if report.skipped and item.config.getoption("--hw-required"):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def kernel() -> LinuxKernel:
    """The running kernel."""
    return LinuxKernel()


@pytest.fixture(scope="session")
def bdfs(request: pytest.FixtureRequest, kernel: LinuxKernel) -> Iterator[tuple[str, ...]]:
    """The devices that `--device` names, bound to vfio-pci; with `--bind`, for the time of the tests."""
    wanted: list[str] = request.config.getoption("--device")
    if not wanted:
        pytest.skip("no --device was given")
    devices = pci.enumerate_devices(kernel)
    found = tuple(device.bdf for name in wanted for device in devices if selector_argument(name)(device))
    assert found, f"no device is {' or '.join(wanted)}; there are {', '.join(device.bdf for device in devices)}"
    with ExitStack() as stack:
        if request.config.getoption("--bind"):
            for bdf in found:
                stack.callback(pci.restore, kernel, pci.bind(kernel, bdf))
        yield found
