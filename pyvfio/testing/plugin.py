"""The pytest plugin: fixtures for tests of drivers, on the fake kernel, in a virtual machine and on hardware.

    def test_the_device_says_hello(vfio_device):
        assert vfio_device.config.read16(0) == 0x1234

Fixtures: `fake_kernel`, `vfio_world`, `vfio_device`, and `vfio_groups`, to be overridden with devices of one's own.
Options: `--vfio-world`, `--vfio-fake-version`, `--vfio-device`. docs/testing-without-hardware.md shows them.

Nothing of pyvfio is imported before a fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyvfio import Device
    from pyvfio.testing.fake import FakeKernel
    from pyvfio.testing.fake.declaration import GroupDeclaration
    from pyvfio.testing.world import World

_WORLDS = ("fake", "vm", "hardware")
_FAKE_VERSIONS = ("6.1", "6.12", "7.3")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--vfio-world`, `--vfio-fake-version`, `--vfio-device`."""
    group = parser.getgroup("vfio", "tests of VFIO drivers")
    group.addoption(
        "--vfio-world",
        action="append",
        choices=_WORLDS,
        help="where tests with vfio_world or vfio_device run: on the fake kernel (default), on the edu devices of the "
        "virtual machine that this is, or on the hardware of --vfio-device; may be given more than once",
    )
    group.addoption(
        "--vfio-fake-version", choices=_FAKE_VERSIONS, default="6.12", help="which kernel the fake is; default: 6.12"
    )
    group.addoption(
        "--vfio-device",
        action="append",
        default=[],
        metavar="BDF",
        help="a PCI device that is bound to vfio-pci, for --vfio-world hardware; may be given more than once",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that uses `vfio_world` runs in each world that was asked for."""
    own: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        own |= {name.strip() for name in (names.split(",") if isinstance(names, str) else names)}
    if "vfio_world" in metafunc.fixturenames and "vfio_world" not in own:
        worlds: list[str] = metafunc.config.getoption("--vfio-world") or ["fake"]
        metafunc.parametrize("vfio_world", list(dict.fromkeys(worlds)), indirect=True)


@pytest.fixture
def vfio_groups() -> list[GroupDeclaration]:
    """The IOMMU groups of `fake_kernel`, as FakeKernel takes them: two `edu`, a group each. Override it for others."""
    from pyvfio.testing.fake import FakeEdu  # noqa: PLC0415 (a fixture that is not used costs nothing)

    return [(2, [FakeEdu("0000:00:02.0")]), (3, [FakeEdu("0000:00:03.0")])]


@pytest.fixture
def fake_kernel(request: pytest.FixtureRequest, vfio_groups: list[GroupDeclaration]) -> Iterator[FakeKernel]:
    """A FakeKernel, new for each test: version `--vfio-fake-version`, devices of `vfio_groups`.

    The test fails when memory went away while a device could reach it, and when a failure that it had planned with
    `fail` never happened.
    """
    from pyvfio.testing.fake import FakeKernel  # noqa: PLC0415

    with FakeKernel(str(request.config.getoption("--vfio-fake-version")), groups=vfio_groups) as kernel:
        yield kernel
        kernel.check()
        if kernel.planned_failures:
            raise AssertionError(f"never happened: {'; '.join(kernel.planned_failures)}")


@pytest.fixture
def vfio_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """The world of `--vfio-world` (`pyvfio.testing.world.World`): a kernel, and the devices to be used on it.

    On the fake its kernel is `fake_kernel`. In a virtual machine the edu devices are bound to vfio-pci for the time of
    the test; it fails where there are none. On hardware it fails where no `--vfio-device` was given.
    """
    from pyvfio.testing.world import FakeWorld, LinuxWorld  # noqa: PLC0415

    match request.param:
        case "fake":
            yield FakeWorld(request.getfixturevalue("fake_kernel"))
        case "vm":
            with ExitStack() as stack:
                yield _virtual_machine(stack)
        case _:
            bdfs: list[str] = request.config.getoption("--vfio-device") or []
            if not bdfs:
                pytest.fail("--vfio-world hardware needs --vfio-device BDF, bound to vfio-pci", pytrace=False)
            yield LinuxWorld(bdfs)


def _virtual_machine(stack: ExitStack) -> World:
    from pyvfio import pci  # noqa: PLC0415
    from pyvfio.kernel import LinuxKernel  # noqa: PLC0415
    from pyvfio.testing.edu import EDU_ID  # noqa: PLC0415
    from pyvfio.testing.world import LinuxWorld, WorldName  # noqa: PLC0415

    kernel = LinuxKernel()
    found = [device.bdf for device in pci.enumerate_devices(kernel) if (device.vendor, device.device) == EDU_ID]
    if not found:
        pytest.fail("there is no edu device here; run: python -m pyvfio.cli.vm -- python -m pytest …", pytrace=False)
    for bdf in found:
        stack.callback(pci.restore, kernel, pci.bind(kernel, bdf))
    return LinuxWorld(found, name=WorldName.VM)


@pytest.fixture
def vfio_device(vfio_world: World) -> Iterator[Device]:
    """The first device of `vfio_world`, open in a container of its own; memory decoding is on, bus mastering is off."""
    import pyvfio  # noqa: PLC0415

    with pyvfio.open_device(vfio_world.bdfs[0], kernel=vfio_world.kernel) as device:
        device.memory_enabled = True
        yield device
