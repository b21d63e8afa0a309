"""Each command in circumstances that it was not made for: one line on stderr, a documented status, no traceback,
nothing half done.

The commands are those of `COMMANDS`, so that a new one is held to the same. Where a command takes a kernel, that is a
tree that looks like sysfs, whose writes react.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pyvfio.cli import common, main
from pyvfio.cli.main import COMMANDS, load
from tests.unit.sysfs import SysfsTree, place_process

ROOT = Path(__file__).resolve().parents[2]
NIC, ABSENT = "0000:01:00.0", "0000:ff:1f.7"
NOBODY = 65534

WITHOUT_DEVICE = {"demo": ["--fake"], "vm": ["--list"]}
"""Arguments of the commands that need neither a device nor much time; others are given a device or nothing."""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SysfsTree:
    """A network card with its own driver, alone in its group."""
    monkeypatch.delenv("COLUMNS", raising=False)
    return make_tree(tmp_path / "tree")


def make_tree(root: Path) -> SysfsTree:
    tree = SysfsTree(root)
    tree.add_device(NIC, driver="e1000e", group=7)
    place_process(tree.proc)
    return tree


def bdf_arguments(name: str) -> list[argparse.Action]:
    """The arguments of a command that are the address of a device."""
    actions = load(name).make_parser()._actions
    return [each for each in actions if isinstance(each.metavar, str) and "BDF" in each.metavar.split("|")]


def arguments(name: str, bdf: str | None = NIC) -> list[str]:
    """Arguments with which a command does its work at once, on a device if it takes one."""
    if name in WITHOUT_DEVICE:
        return WITHOUT_DEVICE[name]
    takes_device = any(not action.option_strings for action in bdf_arguments(name))
    return [bdf] if takes_device and bdf is not None else []


def with_bdf(name: str, bdf: str) -> list[str] | None:
    """Arguments that name a device; None for a command that takes none."""
    for action in bdf_arguments(name):
        return [*action.option_strings[:1], bdf]
    return None


def run_on(tree: SysfsTree, name: str, words: Sequence[str], before: Callable[[], object] = lambda: None) -> int:
    """The status of a command as `pyvfio` ends with it. `before` is called as the first thing of the command."""
    module: Any = load(name)
    taken = inspect.signature(module.main).parameters
    given = {key: value for key, value in {"kernel": tree.kernel, "write": tree.write}.items() if key in taken}

    def command() -> int:
        before()
        return common.guard(lambda: module.main(words, **given), name=module.NAME)

    try:  # pytest.raises() is made of functions of Python, in which a Ctrl-C would be the test's own
        common.run(command, name=module.NAME)
    except SystemExit as ended:
        code = ended.code
    assert isinstance(code, int)
    return code


def check_stderr(text: str, name: str, *, status: int) -> None:
    """A failure is one line that names the command. A success can be silent."""
    assert "Traceback" not in text
    lines = text.splitlines()
    assert len(lines) == 1 if status in {1, 2} else len(lines) <= 1, text
    assert all(line.startswith(f"pyvfio {name}: ") for line in lines)


def check_whole(tree: SysfsTree) -> None:
    """The device is as it was, or wholly with VFIO."""
    assert (tree.driver_of(NIC), tree.override_of(NIC)) in {("e1000e", None), ("vfio-pci", "vfio-pci")}


# --- Arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line_and_status_2(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_on(tree, name, ["--no-such-option", *arguments(name)]) == 2
    out, err = capsys.readouterr()
    assert (out, tree.writes) == ("", [])
    check_stderr(err, name, status=2)
    assert "--no-such-option" in err
    assert err.endswith(f"ee pyvfio {name} --help\n")


@pytest.mark.parametrize("bdf", ["eth0", "00:20.0", "../../etc", "", "0000:00:02.0\n", "é"])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_address_is_one_line_and_status_2(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], name: str, bdf: str
) -> None:
    """White space around an address is none of it."""
    words = with_bdf(name, bdf)
    status = 2 if words is None else run_on(tree, name, words)
    out, err = capsys.readouterr()
    if bdf.strip() == "0000:00:02.0":
        assert status in {0, 1, 2}
    else:
        assert status == 2
        assert out == ""
    if words is not None:
        check_stderr(err, name, status=status)
    assert tree.writes == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_device_that_is_not_there_is_one_line_and_status_1(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = with_bdf(name, ABSENT)
    if words is not None:
        assert run_on(tree, name, words) in {1, 2}
        check_stderr(capsys.readouterr().err, name, status=1)
    assert tree.writes == []


# --- The machine


def without_sysfs(tree: SysfsTree) -> None:
    for path in (tree.sysfs, tree.dev, tree.proc):
        path.rename(path.with_name(f"no-{path.name}"))


def without_vfio(tree: SysfsTree) -> None:
    (tree.pci / "drivers/vfio-pci").rename(tree.pci / "drivers/other")
    (tree.dev / "vfio").rmdir()


@pytest.mark.parametrize("take", [without_sysfs, without_vfio])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_machine_without_what_a_command_needs_is_one_line(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], name: str, take: Callable[[SysfsTree], None]
) -> None:
    """Without sysfs, as in a container; without VFIO, as on most machines."""
    take(tree)
    status = run_on(tree, name, arguments(name))
    assert status in {0, 1, 2}
    check_stderr(capsys.readouterr().err, name, status=status)
    assert tree.writes == []


CHILD = """
import inspect, sys
from pathlib import Path
from pyvfio.cli import common
from pyvfio.cli.main import load
from pyvfio.kernel import LinuxKernel

root, name, *words = sys.argv[1:]
module = load(name)
kernel = LinuxKernel(sysfs=Path(root) / "sys", dev=Path(root) / "dev", proc=Path(root) / "proc")
given = {"kernel": kernel} if "kernel" in inspect.signature(module.main).parameters else {}
common.run(lambda: module.main(words, **given), name=module.NAME)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_without_root_a_command_does_its_work_or_says_what_it_needs(tree: SysfsTree, name: str) -> None:
    """The child is nobody, and can read what root can: nobody may have no Python otherwise."""
    words = [sys.executable, "-c", CHILD, str(tree.sysfs.parent), name, *arguments(name)]
    if os.geteuid() == 0:
        ids = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        capabilities = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
        words = ["setpriv", *ids, *capabilities, *words]
    (tree.proc / "self/status").write_text(f"Name:\tpython\nUid:\t1\t{NOBODY}\t1\t1\nGroups:\t\n")
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode in {0, 1, 2}
    check_stderr(done.stderr, name, status=done.returncode)
    assert (tree.driver_of(NIC), tree.override_of(NIC)) == ("e1000e", None)
    if name == "bind":
        assert (done.returncode, "run as root" in done.stderr) == (1, True)


# --- Output


def buffering(*, on: bool) -> dict[str, str]:
    """An environment in which Python buffers its output, as it does by default, or does not."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return environment if on else {**environment, "PYTHONUNBUFFERED": "1"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("stdout", "statuses"), [(">&-", {0, 1, 2}), (">/dev/full", {1, 2}), (">&0", {1, 2, 128 + signal.SIGPIPE})]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_stdout_that_cannot_be_written_is_no_traceback(name: str, stdout: str, statuses: set[int]) -> None:
    """Closed, on a full disk, or a pipe that nobody reads. The command is the installed one."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "pyvfio", name, *arguments(name, ABSENT)]
    try:
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {stdout}', "-", *words],
            stdin=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            cwd=ROOT,
            env=buffering(on=True),
        )
    finally:
        os.close(writer)
    assert done.returncode in statuses
    check_stderr(done.stderr, name, status=done.returncode)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["help"], ["list", "--help"]])
def test_a_help_that_cannot_be_written_is_a_failure(words: list[str], *, buffered: bool) -> None:
    """It is no success with half a text, whether Python buffers the output or not."""
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >/dev/full', "-", sys.executable, "-m", "pyvfio", *words],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        cwd=ROOT,
        env=buffering(on=buffered),
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("pyvfio")
    assert "No space left on device" in done.stderr


# --- Ctrl-C


class CtrlC:
    """SIGINT at the n-th call of a function, or the next one. `sent`: whether it came to that.

    A generator is no function here: one that is closed while others are asked no more loses what a handler raises.
    """

    def __init__(self, at: int) -> None:
        self.sent = False
        self._left = at

    def _profile(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or self.sent:
            return
        self._left -= 1
        if self._left <= 0 and not frame.f_code.co_flags & inspect.CO_GENERATOR:
            self.sent = True
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    def start(self) -> None:
        """Count from here on."""
        sys.setprofile(self._profile)


@pytest.mark.parametrize("at", [10, 100, 1000, 10_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_ends_a_command_with_status_130(
    tree: SysfsTree, capsys: pytest.CaptureFixture[str], name: str, at: int
) -> None:
    """At whichever call it comes. A device is not left between two drivers."""
    interrupt = CtrlC(at)
    gc.disable()  # Ctrl-C in a finalizer of what earlier tests left would be lost
    try:
        status = run_on(tree, name, arguments(name), interrupt.start)
    finally:
        sys.setprofile(None)
        gc.enable()
    check_whole(tree)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    if interrupt.sent:
        assert status == 128 + signal.SIGINT
    else:
        check_stderr(err, name, status=status)


def test_ctrl_c_while_the_command_is_imported_ends_it_with_status_130() -> None:
    """The first module that `entry` imports finds the signal raised."""
    script = """
import signal, sys
from pyvfio.cli import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pyvfio.cli.common":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
main.entry()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_imports_little_before_it_can_be_interrupted() -> None:
    """argparse and its like: a traceback of these would need Ctrl-C within milliseconds."""
    script = "import sys; before = set(sys.modules); import pyvfio.cli.main; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    own = {name for name in done.stdout.split() if name.startswith("pyvfio")}
    assert own == {"pyvfio", "pyvfio.cli", "pyvfio.cli.main"}
    assert main.__name__ in own
