"""The pytest plugin, and the page about it: what it shows is run as it stands there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def outcome(directory: Path, test: str, *arguments: str) -> str:
    """What pytest says of a test file with that in it."""
    (directory / "test_it.py").write_text(test, encoding="utf-8")
    return run_pytest(directory, "-q", *arguments, ".").stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=["dma", "failure", "own device"])
def test_the_examples_of_the_page_pass_in_an_empty_directory(tmp_path: Path, example: str) -> None:
    """On each version of the fake, and warnings are errors."""
    (tmp_path / "test_it.py").write_text(example, encoding="utf-8")
    (tmp_path / "adder.py").write_text(ADDER, encoding="utf-8")
    for version in _FAKE_VERSIONS:
        done = run_pytest(tmp_path, "-q", "-W", "error", "--vfio-fake-version", version)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 passed" in done.stdout


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


def test_loading_it_imports_nothing_of_pyvfio_but_the_plugin() -> None:
    """pytest loads it in projects that use nothing of it."""
    script = "import sys, pyvfio.testing.plugin; print(sorted(name for name in sys.modules if name[:6] == 'pyvfio'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == ["pyvfio", "pyvfio.testing", "pyvfio.testing.plugin"]


def test_its_options_offer_what_there_is() -> None:
    """Repeated in the plugin, which imports nothing that it could ask."""
    assert sorted(_FAKE_VERSIONS) == sorted(VERSIONS)
    assert list(_WORLDS) == list(WorldName)
