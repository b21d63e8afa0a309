"""The pytest plugin, and the page about it: what it shows is run as it stands there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import pyvfio
from pyvfio.testing import FakeKernel
from pyvfio.testing.fake import VERSIONS
from pyvfio.testing.plugin import _FAKE_VERSIONS, _WORLDS
from pyvfio.testing.world import WorldName

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/testing-without-hardware.md"
PYTHON = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
(ADDER,) = [text for text in PYTHON if "class Adder" in text]
EXAMPLES = [text for text in PYTHON if "def test_" in text]
SCRIPTS = [text for text in PYTHON if "def test_" not in text and text != ADDER]
OUTPUTS = [
    "device 0x11e8 of vendor 0x1234\n",
    "(7, 8)\nbus 0 stays as it is\n",
]


def run_pytest(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in another process, with the plugin whether or not this pyvfio is installed."""
    # Without hypothesis, which these tests do not use, it starts in half the time.
    without = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    command = [sys.executable, "-m", "pytest", "-p", "pyvfio.testing.plugin", *without, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


RUNS = """
import sys, pytest
for options in sys.argv[1:]:
    print("ended with", int(pytest.main(options.split())), options, flush=True)
"""


def run_pytest_with_each(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """As `run_pytest`, with the arguments of one run after another: the process starts once."""
    common = "-p pyvfio.testing.plugin -p no:cacheprovider -p no:hypothesispytest"
    command = [sys.executable, "-c", RUNS, *(f"{common} {each}" for each in options)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@contextmanager
def started_pytest(directory: Path, *arguments: str, locks: Path) -> Iterator[subprocess.Popen[str]]:
    """As `run_pytest`, of a test that goes on meanwhile; its locks are in a directory of the test's."""
    command = [sys.executable, "-m", "pytest", "-p", "pyvfio.testing.plugin", "-p", "no:hypothesispytest"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYVFIO_LOCK_DIR": str(locks)}
    with (directory / "output").open("w", encoding="utf-8") as output:
        process = subprocess.Popen([*command, *arguments], cwd=directory, env=environment, stdout=output, text=True)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def outcome(directory: Path, test: str, *arguments: str) -> str:
    """What pytest says of a test file with that in it."""
    (directory / "test_it.py").write_text(test, encoding="utf-8")
    return run_pytest(directory, "-q", *arguments, ".").stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=["dma", "failure", "own device"])
def test_the_examples_of_the_page_pass_in_an_empty_directory(tmp_path: Path, example: str) -> None:
    """On each version of the fake, and warnings are errors."""
    (tmp_path / "test_it.py").write_text(example, encoding="utf-8")
    (tmp_path / "adder.py").write_text(ADDER, encoding="utf-8")
    runs = []
    for version in _FAKE_VERSIONS:
        both = version != "6.1" and "VFIO_IOMMU" not in example  # the call of one space fails there
        for space in ("type1", "iommufd") if both else ("type1",):
            runs.append(f"-q -W error --vfio-fake-version {version} --vfio-space {space}")
    done = run_pytest_with_each(tmp_path, *runs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("1 passed") == done.stdout.count("ended with 0") == len(runs), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("script", "output"), list(zip(SCRIPTS, OUTPUTS, strict=True)), ids=["one device", "three devices"]
)
def test_the_scripts_of_the_page_run_as_they_stand_there(tmp_path: Path, script: str, output: str) -> None:
    """In an interpreter that has imported nothing else."""
    (tmp_path / "adder.py").write_text(ADDER, encoding="utf-8")
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (output, "")


def test_the_page_lists_what_is_left_out_on_a_fake_with_each_reason() -> None:
    """Each test marked `real_kernel` in tests/hw, and no other."""
    marked = set()
    for path in sorted((ROOT / "tests/hw").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                marked |= {
                    (node.name, str(mark.args[0].value))
                    for mark in node.decorator_list
                    if isinstance(mark, ast.Call)
                    and ast.unparse(mark.func) == "pytest.mark.real_kernel"
                    and isinstance(mark.args[0], ast.Constant)
                }
    listed = set(re.findall(r"^\| `(test_\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == marked
    assert marked


def test_a_driver_test_of_the_page_has_at_most_ten_lines() -> None:
    """From the function's first line to its last."""
    (function,) = [node for node in ast.parse(EXAMPLES[0]).body if isinstance(node, ast.FunctionDef)]
    assert function.end_lineno is not None
    assert function.end_lineno - function.lineno + 1 <= 10


def test_memory_released_under_a_device_fails_the_test(tmp_path: Path) -> None:
    """After it, as an error with both addresses."""
    text = outcome(
        tmp_path,
        "def test_it(vfio_device):\n"
        "    kernel = vfio_device.kernel\n"
        "    vaddr = kernel.mmap(0, 4096, 3, 0x22)\n"
        "    vfio_device.container.map_dma(vaddr=vaddr, iova=0x100000, size=4096)\n"
        "    kernel.munmap(vaddr, 4096)\n",
    )
    assert "1 passed, 1 error" in text
    assert "munmap took 0x1000 bytes" in text


def test_a_test_runs_once_in_each_world_that_is_asked_for(tmp_path: Path) -> None:
    """A world that is not there is a failure which says what is missing."""
    text = outcome(
        tmp_path,
        "def test_it(vfio_world):\n    assert vfio_world.name == 'fake'\n    assert len(vfio_world.bdfs) == 2\n",
        *("--vfio-world", "hardware", "--vfio-world", "fake", "--vfio-world", "fake"),
    )
    assert "1 passed, 1 error" in text
    assert "ERROR test_it.py::test_it[hardware]" in text
    assert "--vfio-device" in text


@pytest.mark.parametrize(
    "mark",
    [
        '"vfio_world", ["fake"], indirect=True',
        'argnames="vfio_world", argvalues=["fake"], indirect=True',
        '"number, vfio_world", [(1, "fake")], indirect=["vfio_world"]',
        '["number", "vfio_world"], [(1, "fake")], indirect=["vfio_world"]',
    ],
)
def test_a_test_may_choose_its_worlds_itself(tmp_path: Path, mark: str) -> None:
    """Whichever way it writes that; the option does not add to it."""
    number = "number, " if "number" in mark else ""
    body = f"import pytest\n@pytest.mark.parametrize({mark})\ndef test_it({number}vfio_world):\n    pass\n"
    assert "1 passed" in outcome(tmp_path, body, "--vfio-world", "hardware")


def test_a_failure_that_was_planned_and_never_happened_fails_the_test(tmp_path: Path) -> None:
    """It would have passed without what it is about."""
    text = outcome(tmp_path, "def test_it(fake_kernel):\n    fake_kernel.fail(call='mmap', errno=12, nth=3)\n")
    assert "1 passed, 1 error" in text
    assert "call 3 from now of mmap fails with ENOMEM" in text


@pytest.mark.parametrize(
    ("options", "space"),
    [
        ((), "Container"),
        (("--vfio-space", "type1"), "Container"),
        (("--vfio-space", "iommufd"), "Ioas"),
        (("--vfio-space", "iommufd", "--vfio-fake-version", "7.3"), "Ioas"),
    ],
)
def test_the_space_of_the_devices_is_an_option(tmp_path: Path, options: tuple[str, ...], space: str) -> None:
    """Of `vfio_device`, and of a device of `fake_kernel` that the test opens without a word."""
    body = (
        "import pyvfio\n"
        "def test_it(vfio_device, fake_kernel):\n"
        f"    assert type(vfio_device.space) is pyvfio.{space}\n"
        f"    with pyvfio.open_device(fake_kernel.bdfs[1], kernel=fake_kernel) as other:\n"
        f"        assert type(other.space) is pyvfio.{space}\n"
    )
    assert "1 passed" in outcome(tmp_path, body, *options)


def test_a_fake_that_has_no_iommufd_is_refused_at_the_start(tmp_path: Path) -> None:
    """With the versions that have it."""
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n", encoding="utf-8")
    done = run_pytest(tmp_path, "-q", "--vfio-space", "iommufd", "--vfio-fake-version", "6.1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Linux 6.1 has no iommufd; use --vfio-fake-version 6.12 or 7.3" in done.stderr


def test_the_world_of_a_fake_is_that_of_fake_kernel(tmp_path: Path) -> None:
    """One kernel, whichever fixture it comes from."""
    body = "def test_it(vfio_world, fake_kernel):\n    assert vfio_world.kernel is fake_kernel\n"
    assert "1 passed" in outcome(tmp_path, body)


@pytest.mark.parametrize("extra", [(), ("-p", "pyvfio.testing.plugin"), ("-p", "pyvfio.testing.pytest_plugin")])
def test_it_may_be_asked_for_twice(tmp_path: Path, extra: tuple[str, ...]) -> None:
    """On the command line, in a conftest.py and by its entry point."""
    (tmp_path / "conftest.py").write_text("pytest_plugins = ['pyvfio.testing.plugin']\n", encoding="utf-8")
    if "pyvfio.testing.pytest_plugin" in extra:  # what the entry point names, under a name of its own
        extra = ("-p", "no:pyvfio", *extra)
    assert "1 passed" in outcome(tmp_path, "def test_it(fake_kernel):\n    fake_kernel.check()\n", *extra)


UNITTEST = """
import unittest
import pytest

class TestIt(unittest.TestCase):
    @pytest.fixture(autouse=True)
    def _open(self, vfio_device):
        self.device = vfio_device

    def test_it(self):
        assert self.device.config.read16(0) == 0x1234
"""
LATE = """
def test_it(request):
    assert request.getfixturevalue("vfio_device").config.read16(0) == 0x1234
"""


@pytest.mark.parametrize("test", [UNITTEST, LATE])
def test_a_method_of_a_testcase_and_a_late_request_run_in_the_one_world(tmp_path: Path, test: str) -> None:
    """pytest gives neither a parameter, and runs neither in two worlds."""
    assert "1 passed" in outcome(tmp_path, test)
    assert "give --vfio-world once" in outcome(tmp_path, test, "--vfio-world", "fake", "--vfio-world", "vm")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--vfio-device", "0000:00:02.0"), "add --vfio-world hardware"),
        (("--vfio-device", "0000:00:02.0", "--vfio-world", "fake"), "add --vfio-world hardware"),
        (("--vfio-world", "hardware", "--vfio-device", "00:02"), "not a PCI address: '00:02'"),
        (("--vfio-last", "-1"), "--vfio-last must not be negative"),
        (("--vfio-lock-timeout", "-3"), "--vfio-lock-timeout must not be negative"),
        (("--vfio-lock-timeout", "nan"), "--vfio-lock-timeout must not be negative"),
    ],
)
def test_options_that_would_have_no_effect_or_can_never_be_right_are_refused_at_the_start(
    tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    """A test that runs on the fake unnoticed shows nothing about a device."""
    (tmp_path / "test_it.py").write_text("def test_it(vfio_device): pass", encoding="utf-8")
    done = run_pytest(tmp_path, "-q", *options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr


def test_a_record_in_no_directory_and_a_marker_without_a_number_fail_with_the_remedy(tmp_path: Path) -> None:
    """Without a traceback of the plugin."""
    said = outcome(tmp_path, "def test_it(vfio_device): pass", "--vfio-record", str(tmp_path / "no" / "file"))
    assert f"there is no directory {tmp_path / 'no'}" in said
    marked = "import pytest\n@pytest.mark.vfio_devices\ndef test_it(vfio_world): pass"
    said = outcome(tmp_path, marked, "--vfio-world", "hardware", "--vfio-device", "0000:99:00.0")
    assert "the marker takes a number" in said


def test_loading_it_imports_nothing_of_pyvfio_but_the_plugin() -> None:
    """pytest loads it in projects that use nothing of it."""
    script = "import sys, pyvfio.testing.plugin; print(sorted(name for name in sys.modules if name[:6] == 'pyvfio'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == ["pyvfio", "pyvfio.testing", "pyvfio.testing.plugin"]


def test_its_options_offer_what_there_is() -> None:
    """Repeated in the plugin, which imports nothing that it could ask."""
    assert sorted(_FAKE_VERSIONS) == sorted(VERSIONS)
    assert list(_WORLDS) == list(WorldName)


# ---------------------------------------------------------------------------------------------------- shared hardware


HARDWARE = ("--vfio-world", "hardware", "--vfio-device", "0000:99:00.0", "--vfio-device", "0000:99:01.0")
"""Two devices that no machine has: a test that opens none of them runs all the same."""

HOLDS = """
import pathlib, time
import pytest

MARK
def test_it(vfio_world):
    here = pathlib.Path(__file__).parent
    (here / "devices").write_text(" ".join(vfio_world.bdfs))
    for _ in range(6000):  # then it fails, in place of waiting for ever
        if (here / "go").exists():
            return
        time.sleep(0.01)
    raise AssertionError("nobody has said go")
"""


def holding_test(directory: Path, mark: str) -> Path:
    """A test that writes down which devices it has, and goes on until there is a file "go"."""
    directory.mkdir()
    (directory / "test_it.py").write_text(HOLDS.replace("MARK", mark), encoding="utf-8")
    return directory


def wait_for(file: Path, text: str, process: subprocess.Popen[str]) -> None:
    """Until a file has a text; the process that writes it must not end before."""
    while not file.exists() or text not in file.read_text(encoding="utf-8"):
        assert process.poll() is None, (file.parent / "output").read_text(encoding="utf-8")


def test_two_processes_with_one_device_take_turns(tmp_path: Path) -> None:
    """The second one says which process it waits for, and runs when the first one has ended."""
    first, second = (holding_test(tmp_path / name, "") for name in ("first", "second"))
    with started_pytest(first, *HARDWARE, locks=tmp_path / "locks") as one:
        wait_for(first / "devices", "0000:99:01.0", one)
        with started_pytest(second, *HARDWARE, locks=tmp_path / "locks") as two:
            wait_for(second / "output", "waiting for 2 of 2 devices", two)
            output = (second / "output").read_text(encoding="utf-8")
            assert re.search(rf"0000:99:00\.0 by pid {one.pid} \(.*pytest.*\)", output)
            assert not (second / "devices").exists()
            (first / "go").touch()
            wait_for(second / "devices", "0000:99:01.0", two)
            assert one.wait() == 0
            (second / "go").touch()
            assert two.wait() == 0


def test_several_devices_are_shared_out(tmp_path: Path) -> None:
    """A test that needs one leaves the others to other processes."""
    mark = "@pytest.mark.vfio_devices(1)"
    first, second = (holding_test(tmp_path / name, mark) for name in ("first", "second"))
    with started_pytest(first, *HARDWARE, locks=tmp_path / "locks") as one:
        wait_for(first / "devices", "0000:99:00.0", one)
        with started_pytest(second, *HARDWARE, locks=tmp_path / "locks") as two:
            wait_for(second / "devices", "0000:99:01.0", two)
            for directory, process in ((first, one), (second, two)):
                (directory / "go").touch()
                assert process.wait() == 0


def test_a_process_that_is_killed_leaves_its_device_to_the_next_one(tmp_path: Path) -> None:
    """The kernel gives up the lock, and nobody has to remove a file."""
    first, second = (holding_test(tmp_path / name, "") for name in ("first", "second"))
    with started_pytest(first, *HARDWARE, locks=tmp_path / "locks") as one:
        wait_for(first / "devices", "0000:99:00.0", one)
        one.kill()
        one.wait()
        (second / "go").touch()
        with started_pytest(second, *HARDWARE, locks=tmp_path / "locks") as two:
            assert two.wait() == 0


def test_a_test_that_waits_too_long_fails_with_the_holder(tmp_path: Path) -> None:
    """After `--vfio-lock-timeout`."""
    first, second = (holding_test(tmp_path / name, "") for name in ("first", "second"))
    with started_pytest(first, *HARDWARE, locks=tmp_path / "locks") as one:
        wait_for(first / "devices", "0000:99:00.0", one)
        with started_pytest(second, *HARDWARE, "--vfio-lock-timeout", "0", locks=tmp_path / "locks") as two:
            assert two.wait() == 1
    output = (second / "output").read_text(encoding="utf-8")
    assert "after 0 s devices are still held" in output
    assert f"by pid {one.pid}" in output


def test_a_test_that_asks_for_the_world_has_all_devices(tmp_path: Path) -> None:
    """Unless a marker says how many."""
    directory = holding_test(tmp_path / "one", "")
    (directory / "go").touch()
    with started_pytest(directory, *HARDWARE, locks=tmp_path / "locks") as process:
        assert process.wait() == 0
    assert (directory / "devices").read_text(encoding="utf-8") == "0000:99:00.0 0000:99:01.0"


def test_a_test_that_needs_more_devices_than_there_are_fails(tmp_path: Path) -> None:
    """It would wait for ever."""
    directory = holding_test(tmp_path / "one", "@pytest.mark.vfio_devices(3)")
    with started_pytest(directory, *HARDWARE, locks=tmp_path / "locks") as process:
        assert process.wait() == 1
    assert "the test needs 3 devices, and there are 2" in (directory / "output").read_text(encoding="utf-8")


LIKE_HARDWARE = """
import pytest
from pyvfio.testing.fake import FakeDevice
from pyvfio.testing.world import FakeWorld, WorldName

class Hardware(FakeWorld):
    name = WorldName.HARDWARE

@pytest.fixture
def vfio_groups():
    return [(2, [FakeDevice("0000:00:02.0", resettable=RESETTABLE)])]

@pytest.fixture
def vfio_world(fake_kernel):
    yield Hardware(fake_kernel)
"""


@pytest.mark.parametrize(
    ("resettable", "options", "before"),
    [("True", (), 1), ("True", ("--vfio-no-reset",), 0), ("False", (), 0)],
    ids=["reset", "option", "device without"],
)
def test_a_real_device_is_reset_before_a_test(
    tmp_path: Path, resettable: str, options: tuple[str, ...], before: int
) -> None:
    """Once, where it has a reset; and once more when it is closed after the test."""
    (tmp_path / "conftest.py").write_text(
        LIKE_HARDWARE.replace("RESETTABLE", resettable) + "@pytest.fixture(autouse=True)\n"
        "def after(fake_kernel):\n"
        "    yield\n"
        f"    assert resets(fake_kernel) == {before} + {resettable}\n"
        "def resets(kernel):\n"
        "    return [call.request for call in kernel.trace].count('VFIO_DEVICE_RESET')\n",
        encoding="utf-8",
    )
    body = (
        f"from conftest import resets\ndef test_it(vfio_device):\n    assert resets(vfio_device.kernel) == {before}\n"
    )
    assert "1 passed" in outcome(tmp_path, body, *options)


FAILS = """
import pyvfio
from pyvfio.testing.edu import Edu

def test_it(vfio_device):
    vfio_device.bus_master = True
    Edu(vfio_device.region(0)).read_memory(0x123000, 8)
    assert vfio_device.region(0).read32(0) == 0
"""


def test_a_failure_is_told_with_the_last_accesses_and_the_faults(tmp_path: Path) -> None:
    """As lines of a record, and as the IOMMU reports them."""
    text = outcome(tmp_path, FAILS)
    assert "last accesses of 0000:00:02.0" in text
    assert "w64 bar0 0x00080 0x0000000000123000\n" in text
    assert "r32 bar0 0x00000 0x010000ed\n" in text
    assert "IOMMU faults" in text
    assert "DMA read of 0000:00:02.0 stopped at IOVA 0x123000: nothing is mapped there" in text


def test_as_many_accesses_are_told_as_the_option_says(tmp_path: Path) -> None:
    """0 is none, and then nothing is recorded."""
    two = outcome(tmp_path, FAILS, "--vfio-last", "2")
    assert "r32 bar0 0x00000 0x010000ed\n" in two
    assert "w64 bar0 0x00080" not in two
    none = outcome(tmp_path, FAILS.replace("read32(0) == 0", "seam is not vfio_device.kernel"), "--vfio-last", "0")
    assert "1 failed" in none
    assert "last accesses" not in none


def test_a_log_of_faults_that_cannot_be_read_is_said_to_be(tmp_path: Path) -> None:
    """In place of "none", which would not be known. The world is a test's own."""
    blind = (
        "    name = WorldName.HARDWARE\n"
        "    unreadable = '/dev/kmsg cannot be read: Permission denied'\n"
        "    def watch_faults(self):\n"
        "        return nullcontext(self)\n"
        "    def lines(self, *, timeout):\n"
        "        return []\n"
    )
    conftest = LIKE_HARDWARE.replace("RESETTABLE", "False").replace("    name = WorldName.HARDWARE\n", blind)
    (tmp_path / "conftest.py").write_text(f"from contextlib import nullcontext\n{conftest}", encoding="utf-8")
    text = outcome(tmp_path, "def test_it(vfio_device):\n    assert False\n")
    assert "unknown: /dev/kmsg cannot be read: Permission denied" in text


RECORDS = """
import pytest
from pyvfio import ioctls
REPLAY
def test_one(vfio_device):
    bar = vfio_device.region(0)
    vfio_device.bus_master = True
    irq = vfio_device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable(1)
    bar.write32(0x60, 0b101)
    assert irq.wait(timeout=60) == 1
    assert bar.read32(0x24) == 0b101
    bar.write32(0x64, 0b101)

def test_two(vfio_device):
    vfio_device.region(0).write32(4, 1)
"""


def test_each_parameter_has_a_record_of_its_own(tmp_path: Path) -> None:
    """Parameters that differ in characters that no file name has."""
    program = (
        "import pytest\n@pytest.mark.parametrize('place', ['a/b', 'a:b', 'a b', 'a_b'])\n"
        "def test_place(vfio_device, place):\n    pass\n"
    )
    assert "4 passed" in outcome(tmp_path, program, "--vfio-record", "records/")
    files = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert len(files) == 4
    assert "test_it.py_test_place_fake-a_b.record" in files


def test_an_option_records_each_test_and_the_record_is_replayed_by_the_same_test(tmp_path: Path) -> None:
    """A file for each test in a directory; a driver that has changed since fails with the line."""
    assert "2 passed" in outcome(tmp_path, RECORDS.replace("REPLAY", ""), "--vfio-record", "records/")
    files = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert files == ["test_it.py_test_one_fake.record", "test_it.py_test_two_fake.record"]
    replay = (
        "from pyvfio.testing import RecordedDevice\n"
        "@pytest.fixture\n"
        "def vfio_groups():\n"
        f"    return [(2, [RecordedDevice('0000:00:02.0', 'records/{files[0]}')])]\n"
    )
    one = RECORDS.replace("REPLAY", replay).partition("def test_two")[0]
    assert "1 passed" in outcome(tmp_path, one)
    text = outcome(tmp_path, one.replace("write32(0x64, 0b101)", "write32(0x64, 0b100)"))
    assert "1 failed" in text
    assert "error" not in text.splitlines()[-1]
    (line,) = re.findall(r"DepartureError: test_it\.py_test_one_fake\.record:(\d+): the driver departs", text)[:1]
    lines = (tmp_path / "records" / files[0]).read_text(encoding="ascii").splitlines()
    assert lines[int(line) - 1] == "w32 bar0 0x00064 0x00000005"


def test_a_test_that_ends_before_the_record_fails(tmp_path: Path) -> None:
    """As an error after it, which names the line."""
    with (
        FakeKernel() as kernel,
        pyvfio.open_device("0000:00:02.0", kernel=kernel) as device,
        device.record(tmp_path / "one.record"),
    ):
        device.region(0).write32(4, 1)
    body = (
        "import pytest\n"
        "from pyvfio.testing import RecordedDevice\n"
        "@pytest.fixture\n"
        "def vfio_groups():\n"
        "    return [(2, [RecordedDevice('0000:00:02.0', 'one.record')])]\n"
        "def test_it(vfio_device):\n"
        "    pass\n"
    )
    text = outcome(tmp_path, body)
    assert "1 passed, 1 error" in text
    assert "the driver has ended before the record" in text
    assert "expected: w32 bar0 0x00004 0x00000001" in text


def test_one_file_records_one_test(tmp_path: Path) -> None:
    """A second test would replace it, so it fails and names the first."""
    text = outcome(tmp_path, RECORDS.replace("REPLAY", ""), "--vfio-record", "mine.record")
    assert "1 passed, 1 error" in text
    assert re.search(r"has the record of test_it.py::test_one\[fake\]; name a directory", text)
    assert (tmp_path / "mine.record").read_text(encoding="ascii").endswith("w32 bar0 0x00064 0x00000005\nend\n")
