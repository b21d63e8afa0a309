"""scripts/list and its like: which Python runs the pyvfio of the checkout.

Each Python here is a shell script that answers as a Python with or without the dependencies of pyvfio would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pyvfio.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
WRAPPERS = ("list", "bind", "unbind", "demo", "vm")

# $1 is -c for questions: those about the dependencies name ioctl_opt.
PYTHON = """#!/bin/sh
case "$*" in
    "-c "*ioctl_opt*) exit {status} ;;
    "-c "*ensurepip*) exit 0 ;;
    "-c "*) echo 3.11 ;;
    "-m pyvfio "*) echo "{name}: $*, PYTHONPATH=$PYTHONPATH" ;;
    *) echo "{name}: $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts alone, in a folder of their own."""
    shutil.copytree(ROOT / "scripts", tmp_path / "checkout/scripts")
    return tmp_path / "checkout"


def add_python(path: Path, name: str, *, ready: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PYTHON.format(name=name, status=int(not ready)))
    path.chmod(0o755)
    return path


def run(checkout: Path, command: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{checkout / 'bin'}:{os.defpath}", "HOME": str(checkout), **variables}
    return subprocess.run(
        [checkout / "scripts" / command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd="/",
    )


def everywhere(checkout: Path) -> dict[str, str]:
    """A Python in each place, all with the dependencies. Returns the variables that name two of them."""
    add_python(checkout / "bin/python3", "the system's")
    add_python(checkout / ".venv/3.11/bin/python", "of the checkout")
    active = add_python(checkout / "active/bin/python", "active")
    named = add_python(checkout / "named", "named")
    return {"PYTHON": str(named), "VIRTUAL_ENV": str(active.parents[1])}


def test_the_python_that_is_named_runs_pyvfio_before_all_others(checkout: Path) -> None:
    """Then the active environment, one of the checkout, the system's."""
    variables = everywhere(checkout)
    found = [run(checkout, "list", **variables).stdout]
    del variables["PYTHON"]
    found.append(run(checkout, "list", **variables).stdout)
    found.append(run(checkout, "list").stdout)
    shutil.rmtree(checkout / ".venv")
    found.append(run(checkout, "list").stdout)
    assert [line.partition(":")[0] for line in found] == ["named", "active", "of the checkout", "the system's"]


def test_a_python_without_the_dependencies_is_passed_over(checkout: Path) -> None:
    """So is an environment that was left half made."""
    everywhere(checkout)
    add_python(checkout / ".venv/3.11/bin/python", "of the checkout", ready=False)
    add_python(checkout / ".venv/3.12/bin/python", "unfinished")
    (checkout / ".venv/3.12/.pyvfio-unfinished").touch()
    done = run(checkout, "list", VIRTUAL_ENV=str(checkout / "nowhere"))
    assert done.stdout.startswith("the system's: ")
    named = add_python(checkout / "named", "named", ready=False)
    add_python(checkout / ".venv/run-3.11/bin/python", "made from the named one")
    assert run(checkout, "list", PYTHON=str(named)).stdout.startswith("made from the named one: ")


@pytest.mark.parametrize("command", WRAPPERS)
def test_each_script_runs_the_command_of_the_same_name_with_its_arguments(checkout: Path, command: str) -> None:
    """The package of the checkout is found wherever the caller is."""
    everywhere(checkout)
    done = run(checkout, command, "--help", "two words", PYTHONPATH="/elsewhere")
    assert done.stdout == f"of the checkout: -m pyvfio {command} --help two words, PYTHONPATH={checkout}:/elsewhere\n"
    assert done.stderr == ""
    assert command in COMMANDS


@pytest.mark.parametrize("python", ["/bin/false", "no-such-python"])
def test_a_python_that_cannot_run_pyvfio_is_named_in_one_line(checkout: Path, python: str) -> None:
    """No environment is made then."""
    done = run(checkout, "list", PYTHON=python)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"{python} is not a Python >= 3.11" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_environment_that_cannot_be_made_leaves_nothing_that_looks_like_one(checkout: Path) -> None:
    """The next call tries again."""
    named = add_python(checkout / "named", "named", ready=False)
    for _ in range(2):
        done = run(checkout, "list", PYTHON=str(named))
        assert done.returncode == 1
        assert "making .venv/run-3.11 with ioctl-opt and pyudev, once" in done.stderr
        assert "cannot make an environment" in done.stderr
        assert not (checkout / ".venv/run-3.11").exists()


def test_the_scripts_install_the_dependencies_that_the_package_names() -> None:
    """pyproject.toml and scripts/find-pyvfio.sh say the same."""
    import tomllib  # noqa: PLC0415 (this test alone reads TOML)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = (ROOT / "scripts/find-pyvfio.sh").read_text()
    assert " ".join(f'"{each}"' for each in project["dependencies"]) in script
