"""The pytest plugin: fixtures for tests of drivers, on the fake kernel, in a virtual machine and on hardware.

    def test_the_device_says_hello(vfio_device):
        assert vfio_device.config.read16(0) == 0x1234

Fixtures: `fake_kernel`, `vfio_world`, `vfio_device`, and `vfio_groups`, which a test overrides with devices of its own.
Options: `--vfio-world`, `--vfio-fake-version`, `--vfio-space`, `--vfio-device`, `--vfio-record`, `--vfio-no-reset`,
`--vfio-lock-timeout`, `--vfio-last`. Marker: `vfio_devices(count)`. docs/testing-without-hardware.md has examples.

No other module of pyvfio is imported before a fixture is used.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import pytest

if TYPE_CHECKING:
    from pyvfio import Device
    from pyvfio.testing.fake import FakeKernel
    from pyvfio.testing.fake.declaration import GroupDeclaration
    from pyvfio.testing.world import World

logger = logging.getLogger(__name__)

_WORLDS = ("fake", "vm", "hardware")
_FAKE_VERSIONS = ("6.1", "6.12", "7.3")
_SPACES = ("type1", "iommufd")
_LOCK_TIMEOUT = 600.0
_LAST = 20
_LONGEST_NAME = 200  # characters of a file name, before the digest and the suffix
_Witness: TypeAlias = Callable[[], tuple[str, str]]
"""Returns the heading and the text of a section for the report of a failure."""
_WITNESSES = pytest.StashKey[list[_Witness]]()
_FAILED = pytest.StashKey[bool]()
_RECORDED = pytest.StashKey[dict[Path, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the plugin."""
    group = parser.getgroup("vfio", "tests of VFIO drivers")
    group.addoption(
        "--vfio-world",
        action="append",
        choices=_WORLDS,
        help="where tests with vfio_world or vfio_device run: on the fake kernel (default), on the edu devices of the "
        "virtual machine that this is, or on the hardware of --vfio-device; may be given more than once",
    )
    group.addoption(
        "--vfio-fake-version", choices=_FAKE_VERSIONS, default="6.12", help="the version of the fake; default: 6.12"
    )
    group.addoption(
        "--vfio-space",
        choices=_SPACES,
        help="the address space in which vfio_device is opened; with iommufd, the fake kernel has iommufd in place of "
        "type1; default: the choice of open_device, which is type1 where the kernel has type1",
    )
    group.addoption(
        "--vfio-device",
        action="append",
        default=[],
        metavar="BDF",
        help="a PCI device that is bound to vfio-pci, for --vfio-world hardware; may be given more than once",
    )
    group.addoption(
        "--vfio-record",
        metavar="DIR|FILE",
        help="record the accesses of vfio_device: a file for each test in a directory (an existing one, or with / at "
        "the end), or one file for one test",
    )
    group.addoption(
        "--vfio-no-reset",
        action="store_true",
        help="do not reset a real device before each test (the kernel resets a device that is opened or closed)",
    )
    group.addoption(
        "--vfio-lock-timeout",
        type=float,
        default=_LOCK_TIMEOUT,
        metavar="SECONDS",
        help=f"how long a test waits for a device that another process tests; default: {_LOCK_TIMEOUT:g}",
    )
    group.addoption(
        "--vfio-last",
        type=int,
        default=_LAST,
        metavar="N",
        help=f"show the last N accesses of vfio_device when a test fails; 0: none, and no cost; default: {_LAST}",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker. Refuse a fake that cannot be, and options that are never right or have no effect."""
    if config.getoption("--vfio-space") == "iommufd" and config.getoption("--vfio-fake-version") == "6.1":
        raise pytest.UsageError("--vfio-space iommufd: Linux 6.1 has no iommufd; use --vfio-fake-version 6.12 or 7.3")
    _check_numbers(config)
    _check_devices(config)
    config.addinivalue_line(
        "markers", "vfio_devices(count): how many devices of --vfio-device or of the virtual machine the test needs"
    )


def _check_numbers(config: pytest.Config) -> None:
    for option in ("--vfio-last", "--vfio-lock-timeout"):
        if not (config.getoption(option) or 0) >= 0:  # nor is nan
            raise pytest.UsageError(f"{option} must not be negative, and must be a number")


def _check_devices(config: pytest.Config) -> None:
    named: list[str] = config.getoption("--vfio-device") or []
    if not named:
        return
    if "hardware" not in (config.getoption("--vfio-world") or []):
        raise pytest.UsageError(
            "--vfio-device names hardware, and the tests would run elsewhere: add --vfio-world hardware"
        )
    from pyvfio.pci import parse_bdf  # noqa: PLC0415

    for bdf in named:
        try:
            parse_bdf(bdf)
        except ValueError as error:
            raise pytest.UsageError(f"--vfio-device: {error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that uses `vfio_world` in each world of `--vfio-world`."""
    own: set[str] = set()
    for mark in metafunc.definition.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        own |= {name.strip() for name in (names.split(",") if isinstance(names, str) else names)}
    if "vfio_world" in metafunc.fixturenames and "vfio_world" not in own:
        worlds: list[str] = metafunc.config.getoption("--vfio-world") or ["fake"]
        metafunc.parametrize("vfio_world", list(dict.fromkeys(worlds)), indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the last register accesses and the faults of devices to the report of a test that failed."""
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
        report.sections += [witness() for witness in item.stash.get(_WITNESSES, [])]
    return report


# ------------------------------------------------------------------------------------------------------ fake kernel


@pytest.fixture
def vfio_groups() -> list[GroupDeclaration]:
    """The IOMMU groups of `fake_kernel`, as FakeKernel takes them: two `edu`, a group each. A test can override it."""
    from pyvfio.testing.fake import FakeEdu  # noqa: PLC0415 (a fixture that is not used costs nothing)

    return [(2, [FakeEdu("0000:00:02.0")]), (3, [FakeEdu("0000:00:03.0")])]


def _space(request: pytest.FixtureRequest) -> Literal["type1", "iommufd"] | None:
    chosen: Literal["type1", "iommufd"] | None = request.config.getoption("--vfio-space")
    return chosen


@pytest.fixture
def fake_kernel(request: pytest.FixtureRequest, vfio_groups: list[GroupDeclaration]) -> Iterator[FakeKernel]:
    """A FakeKernel, new for each test: version `--vfio-fake-version`, devices of `vfio_groups`.

    With `--vfio-space iommufd`, the kernel has no type1, so that `open_device` chooses iommufd.

    The test fails if memory was released while a device could reach it, if a failure that the test has planned with
    `fail` has not happened, and if a `RecordedDevice` was not driven to the end of its record.
    """
    from pyvfio.testing.fake import FakeKernel, RecordedDevice  # noqa: PLC0415

    version, iommufd = str(request.config.getoption("--vfio-fake-version")), _space(request) == "iommufd"
    with FakeKernel(version, groups=vfio_groups, iommufd=iommufd, type1=not iommufd) as kernel:
        yield kernel
        kernel.check()
        if kernel.planned_failures:
            raise AssertionError(f"never happened: {'; '.join(kernel.planned_failures)}")
        if not request.node.stash.get(_FAILED, False):  # a test that failed has ended before the record
            for device in [device for _number, devices in vfio_groups for device in devices]:
                if isinstance(device, RecordedDevice):
                    device.check()


# ------------------------------------------------------------------------------------------------------------ worlds


@pytest.fixture
def vfio_world(request: pytest.FixtureRequest) -> Iterator[World]:
    """The world of `--vfio-world` (`pyvfio.testing.world.World`): a kernel, and the devices of the test.

    On the fake the kernel is `fake_kernel`. In a virtual machine the edu devices are bound to vfio-pci while the test
    runs; the test fails if there are none. On hardware the test fails without `--vfio-device`.

    Real devices are locked while the test runs (`pyvfio.testing.device_lock`), so that another process waits: one
    device for a test that asks for `vfio_device` alone, as many as the marker `vfio_devices` says, else all.
    """
    from pyvfio.testing.world import FakeWorld, LinuxWorld  # noqa: PLC0415

    with ExitStack() as stack:
        world: World
        match _world_name(request):
            case "fake":
                world = FakeWorld(request.getfixturevalue("fake_kernel"))
            case "vm":
                world = _virtual_machine(request, stack)
            case _:
                named: list[str] = request.config.getoption("--vfio-device") or []
                if not named:
                    pytest.fail("--vfio-world hardware needs --vfio-device BDF, bound to vfio-pci", pytrace=False)
                world = LinuxWorld(_locked(request, stack, list(dict.fromkeys(named))))
        _watch_faults(request, stack, world)
        yield world


def _world_name(request: pytest.FixtureRequest) -> str:
    """The world of a test. pytest gives a method of unittest.TestCase, and a late getfixturevalue, no parameter."""
    worlds: list[str] = request.config.getoption("--vfio-world") or ["fake"]
    if not hasattr(request, "param") and len(set(worlds)) > 1:
        pytest.fail(
            "a method of unittest.TestCase, or a test that calls getfixturevalue, runs once: give --vfio-world once, "
            "or name the fixture as an argument of a test function",
            pytrace=False,
        )
    name: str = getattr(request, "param", worlds[0])
    return name


def _virtual_machine(request: pytest.FixtureRequest, stack: ExitStack) -> World:
    from pyvfio import pci  # noqa: PLC0415
    from pyvfio.kernel import LinuxKernel  # noqa: PLC0415
    from pyvfio.testing.edu import EDU_ID  # noqa: PLC0415
    from pyvfio.testing.world import LinuxWorld, WorldName  # noqa: PLC0415

    kernel = LinuxKernel()
    found = [device.bdf for device in pci.devices(kernel=kernel) if (device.vendor, device.device) == EDU_ID]
    if not found:
        pytest.fail("there is no edu device here; run: python -m pyvfio.cli.vm -- python -m pytest …", pytrace=False)
    found = _locked(request, stack, found)
    for bdf in found:
        stack.callback(pci.restore, pci.bind(bdf, kernel=kernel), kernel=kernel)
    return LinuxWorld(found, name=WorldName.VM)


def _locked(request: pytest.FixtureRequest, stack: ExitStack, bdfs: Sequence[str]) -> list[str]:
    """Lock as many of the devices as the test needs, until the end of the test."""
    from pyvfio.testing.device_lock import LockTimeoutError, take_locks  # noqa: PLC0415

    count = _devices_needed(request, len(bdfs))
    if count > len(bdfs):
        pytest.fail(f"the test needs {count} devices, and there are {len(bdfs)}", pytrace=False)

    def say(message: str) -> None:
        logger.warning("%s: %s", request.node.nodeid, message)
        capture = request.config.pluginmanager.get_plugin("capturemanager")
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:  # a worker of pytest-xdist has none
            with nullcontext() if capture is None else capture.global_and_fixture_disabled():
                reporter.write_line(f"{request.node.nodeid}: {message}")
                reporter.flush()

    timeout: float = request.config.getoption("--vfio-lock-timeout") or 0.0
    try:
        locks = take_locks(bdfs, count, timeout=timeout, waiting=say)
    except LockTimeoutError as error:
        pytest.fail(str(error), pytrace=False)
    for lock in locks:
        stack.callback(lock.release)
    return [lock.bdf for lock in locks]


def _devices_needed(request: pytest.FixtureRequest, there: int) -> int:
    mark = request.node.get_closest_marker("vfio_devices")
    if mark is not None:
        if not (mark.args and isinstance(mark.args[0], int)):
            pytest.fail("the marker takes a number: @pytest.mark.vfio_devices(2)", pytrace=False)
        return mark.args[0]
    own = inspect.signature(request.function).parameters
    return 1 if "vfio_device" in request.fixturenames and "vfio_world" not in own else there


def _watch_faults(request: pytest.FixtureRequest, stack: ExitStack, world: World) -> None:
    log = stack.enter_context(world.watch_faults())
    last: list[list[str]] = []  # the lines of the log when it was closed
    stack.callback(lambda: last.append(log.lines(timeout=0)))

    def tell() -> tuple[str, str]:
        lines = last[0] if last else log.lines(timeout=0)
        if lines:
            text = "\n".join(lines)
        elif log.unreadable:
            text = f"unknown: {log.unreadable}"
        else:
            text = "none" if world.logs_faults else "unknown: this IOMMU does not report faults"
        return "IOMMU faults", text

    _witnesses(request).append(tell)


def _witnesses(request: pytest.FixtureRequest) -> list[_Witness]:
    node: pytest.Item = request.node
    return node.stash.setdefault(_WITNESSES, [])


# ------------------------------------------------------------------------------------------------------------ devices


@pytest.fixture
def vfio_device(request: pytest.FixtureRequest, vfio_world: World) -> Iterator[Device]:
    """The first device of `vfio_world`, open in an address space of its own, of the kind of `--vfio-space`.

    Memory decoding is on, bus mastering is off.

    A real device that has a reset is reset before the test, and by `Device.close` after the test. With
    `--vfio-record` the accesses are recorded. If the test fails, the report has the last accesses.
    """
    import pyvfio  # noqa: PLC0415
    from pyvfio.testing.world import WorldName  # noqa: PLC0415

    with ExitStack() as stack:
        if not _witnesses(request):  # the test has a vfio_world of its own
            _watch_faults(request, stack, vfio_world)
        opened = pyvfio.open_device(vfio_world.bdfs[0], iommu=_space(request), kernel=vfio_world.kernel)
        device = stack.enter_context(opened)
        is_real = vfio_world.name is not WorldName.FAKE
        if is_real and device.can_reset and not request.config.getoption("--vfio-no-reset"):
            device.reset()
        _record(request, stack, device)
        device.memory_enabled = True
        yield device


def _record(request: pytest.FixtureRequest, stack: ExitStack, device: Device) -> None:
    keep: int = request.config.getoption("--vfio-last") or 0
    file = _record_file(request)
    if file is None and not keep:
        return
    recording = stack.enter_context(device.record(file, allow_mmap=file is None, keep=keep))

    def tell() -> tuple[str, str]:
        lines = recording.last
        return f"last accesses of {device.bdf}", "\n".join(lines) or "none"

    if keep:
        _witnesses(request).append(tell)


def _file_name(nodeid: str) -> str:
    """Return the name of a record. A digest keeps apart parameters such as `a/b` and `a:b`, and names that are cut."""
    name = re.sub(r"[^\w.-]+", "_", nodeid).strip("_")
    parameters = nodeid.partition("[")[2].removesuffix("]")
    if re.fullmatch(r"[\w.-]*", parameters) and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(nodeid.encode()).hexdigest()[:8]}"


def _record_file(request: pytest.FixtureRequest) -> Path | None:
    """The file for the record of a test; None where none is wanted."""
    named: str | None = request.config.getoption("--vfio-record")
    if named is None:
        return None
    wanted = Path(named)
    if wanted.is_dir() or named.endswith("/"):
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted / f"{_file_name(request.node.nodeid)}.record"
    if not wanted.parent.is_dir():
        pytest.fail(f"--vfio-record {wanted}: there is no directory {wanted.parent}", pytrace=False)
    written = request.config.stash.setdefault(_RECORDED, {})
    if other := written.get(wanted):
        pytest.fail(f"--vfio-record {wanted} has the record of {other}; name a directory for several", pytrace=False)
    written[wanted] = request.node.nodeid
    return wanted
