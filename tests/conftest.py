"""Options that all tests share: which device to use, or which fake, and whether its absence is a failure."""

from __future__ import annotations

import gc
import os
import random
import secrets
from collections.abc import Generator, Iterator
from contextlib import ExitStack

import hypothesis
import pytest

import pyvfio
from kvm_machine import CODE, Vcpu, Vm
from pyvfio import pci
from pyvfio.cli.common import selector_argument
from pyvfio.kernel import LinuxKernel
from pyvfio.testing.fake import VERSIONS
from tests import series
from tools.judge import AVAILABLE

pytest.register_assert_rewrite("tests.life")

FEW_POINTS = 2000
"""With fewer not all operations are interrupted."""

LEFT_OUT = pytest.StashKey[int]()
OUTCOMES = pytest.StashKey[dict[str, bool]]()

# A machine that is busy is not a bug, so how long an example takes is not looked at.
hypothesis.settings.register_profile("pyvfio", deadline=None)
hypothesis.settings.load_profile("pyvfio")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this project's tests, and of no others'."""
    group = parser.getgroup("pyvfio")
    group.addoption(
        "--device",
        action="append",
        default=[],
        metavar="BDF|VENDOR:DEVICE",
        help="a PCI device for the tests in tests/hw and tests/contract; may be given more than once",
    )
    group.addoption(
        "--fake",
        nargs="?",
        const="6.12",
        choices=list(VERSIONS),
        help="run the tests in tests/hw on a fake kernel of that version (without one: 6.12)",
    )
    group.addoption(
        "--space",
        choices=["type1", "iommufd"],
        default="type1",
        help="the kind of address space in which the tests in tests/hw open devices (default: type1)",
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
        "--random-steps",
        type=int,
        default=1500,
        metavar="N",
        help="how many steps the random lives in tests/property take (default: 1500)",
    )
    group.addoption(
        "--all-points",
        action="store_true",
        help="interrupt every operation at each of its points, in place of --points (some minutes)",
    )
    group.addoption(
        "--points",
        type=int,
        default=5000,
        metavar="N",
        help="about how many points are interrupted; collections are in proportion. Below 2000 not all operations are "
        "taken, since to find their points takes as long (default: 5000)",
    )
    group.addoption(
        "--scenes",
        type=int,
        metavar="N",
        help="of how many operations under a policy each call is made to fail, chosen at random (default: all)",
    )
    group.addoption(
        "--thread-steps",
        type=int,
        default=100_000,
        metavar="N",
        help="how many steps eight threads take together (default: 100000)",
    )
    group.addoption(
        "--hw-required", action="store_true", help="a test that lacks what it needs fails, where it would be skipped"
    )
    group.addoption(
        "--report-documented",
        action="store_true",
        help="print at the end which tests of docs/series.md and docs/reports.md passed, and on what",
    )


def pytest_configure(config: pytest.Config) -> None:
    """`--fake` and `--device` exclude each other; the marker of what a fake does not show."""
    fake, iommufd = config.getoption("--fake"), config.getoption("--space") == "iommufd"
    if fake and config.getoption("--device"):
        raise pytest.UsageError("--fake is in place of --device")
    if fake and iommufd and not VERSIONS[fake].iommufd_last:
        raise pytest.UsageError(f"no fake of {fake} has iommufd")
    config.addinivalue_line("markers", "real_kernel(reason): what a fake kernel does not show, and why")
    config.addinivalue_line("markers", "only_type1(reason): what address spaces of iommufd do not have, and why")
    config.addinivalue_line("markers", "only_iommufd(reason): what containers of type1 do not have, and why")
    config.addinivalue_line(
        "markers", "one_iommu: what no IOMMU makes a difference to, so that one on a kernel will do"
    )
    config.addinivalue_line(
        "markers", "iommufd(since=(6, 12)): what needs /dev/iommu and cdevs, which packaged kernels do not have"
    )
    config.addinivalue_line("markers", "each_operation: made for each of tests/interruptions/operations.py")
    config.addinivalue_line("markers", "scene: made for each operation under each policy; --scenes takes some")
    config.addinivalue_line("markers", "judge: what needs Python 3.12, as tools/judge.py does")
    config.addinivalue_line("markers", "long: takes a tenth of a second or more; scripts/test --quick leaves it out")
    config.addinivalue_line("markers", "kvm: what needs a /dev/kvm that this user may open")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --fake, what a fake does not show is left out; docs/testing-without-hardware.md lists it. So is what needs
    the other kind of address space, what needs a newer Python, and what needs /dev/kvm on a machine that has none, or
    none that runs a guest: no set-up can provide it."""
    absent = ["real_kernel"] if config.getoption("--fake") else []
    absent.append("only_type1" if config.getoption("--space") == "iommufd" else "only_iommufd")
    if any(item.get_closest_marker("kvm") for item in items) and not kvm_runs():
        absent.append("kvm")
    if not AVAILABLE:
        absent.append("judge")
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    chance = random.Random(config.getoption("--hypothesis-seed"))  # noqa: S311 (nothing secret)
    if not config.getoption("--all-points"):
        left_out += _other_operations(items, config.getoption("--points"), chance)
    if (scenes := config.getoption("--scenes")) is not None:
        marked = [item for item in items if item.get_closest_marker("scene")]
        left_out += chance.sample(marked, max(len(marked) - scenes, 0))
    config.stash[LEFT_OUT] = sum(item.get_closest_marker("kvm") is not None for item in left_out)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _other_operations(items: list[pytest.Item], points: int, chance: random.Random) -> list[pytest.Item]:
    """What is not taken where few points are examined: each operation that is gets a fair number of them."""
    marked = [item for item in items if item.get_closest_marker("each_operation")]
    return chance.sample(marked, len(marked) - min(-(-len(marked) * points // FEW_POINTS), len(marked)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out for want of /dev/kvm, so that nobody takes it for passed; and what was documented."""
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{count} tests left out: /dev/kvm is not there, not for this user, or runs no guest"
        )
    if config.getoption("--report-documented"):
        outcomes = config.stash.get(OUTCOMES, {})
        documented = {test for _page, rows in series.documented() for row in rows for test in row.tests}
        for test in sorted(documented & outcomes.keys()):
            terminalreporter.write_line(series.report(test, _where(config), passed=outcomes[test]))


def _where(config: pytest.Config) -> str:
    """What tests/hw and tests/contract run on, as the pages promise it."""
    if config.getoption("--device"):
        return f"kernel {os.uname().release}"
    return f"fake {fake}" if (fake := config.getoption("--fake")) else "here"


def kvm_runs() -> bool:
    """Whether there is a /dev/kvm, for this user, and a guest of three instructions runs in it."""
    try:
        with Vm() as machine, Vcpu(machine) as cpu:
            cpu.load(CODE)
    except (OSError, pyvfio.VfioError):
        return False
    return True


def pytest_collection_finish() -> None:
    """What pytest and hypothesis have made by now stays: collections in tests need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file has left, such as sources that were parsed once for all tests, stays too."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With --hw-required a skip is a failure: CI must not pass because something is missing. A test with parameters has
    passed when it has with all of them, set-up and tear-down included."""
    report = yield
    if report.skipped and item.config.getoption("--hw-required"):
        report.outcome = "failed"
    outcomes = item.config.stash.setdefault(OUTCOMES, {})
    test = item.nodeid.partition("[")[0]
    outcomes[test] = outcomes.get(test, True) and report.passed
    return report


@pytest.fixture
def random_seed(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> int:
    """What random steps begin with: `--hypothesis-seed`, else another number each time; it is printed."""
    given = request.config.getoption("--hypothesis-seed")
    seed = secrets.randbits(32) if given is None else int(given)
    with capsys.disabled():
        print(f"\n{request.node.name}: --hypothesis-seed={seed}", flush=True)
    return seed


@pytest.fixture(scope="session")
def bdfs(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """The devices that `--device` names, bound to vfio-pci; with `--bind`, for the time of the tests."""
    wanted: list[str] = request.config.getoption("--device")
    if not wanted:
        pytest.skip("no --device was given")
    kernel = LinuxKernel()
    devices = pci.devices(kernel=kernel)
    found = tuple(device.bdf for name in wanted for device in devices if selector_argument(name)(device))
    assert found, f"no device is {' or '.join(wanted)}; there are {', '.join(device.bdf for device in devices)}"
    with ExitStack() as stack:
        if request.config.getoption("--bind"):
            for bdf in found:
                stack.callback(pci.restore, pci.bind(bdf, kernel=kernel), kernel=kernel)
        yield found
