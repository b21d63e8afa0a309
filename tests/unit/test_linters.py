"""The linters and the type checker are ordinary tests; one that is missing is a failure that says what to install."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def scripts(*interpreters: str) -> list[str]:
    """The files in scripts/ and .ci/ whose first line names one of `interpreters`."""
    found = []
    for path in sorted([*ROOT.glob("scripts/*"), *ROOT.glob(".ci/*")]):
        if path.is_file():
            first = path.read_bytes().split(b"\n", 1)[0].decode("utf-8", "replace")
            if first.startswith("#") and any(name in first.replace("/", " ").split() for name in interpreters):
                found.append(str(path.relative_to(ROOT)))
    return found


SHELL = scripts("bash", "sh", "dash", "shell=bash", "shell=sh")
PYTHON = scripts("python", "python3")


def run(*command: str) -> None:
    """At the root of the project; what it prints is the failure's message."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command[:6])}\n{done.stdout}{done.stderr}"


def module(name: str) -> tuple[str, ...]:
    """How to run a tool of this Python."""
    if importlib.util.find_spec(name) is None:
        pytest.fail(f"{name} is not installed: pip install '.[dev]', or the package {name}")
    return (sys.executable, "-m", name)


def test_ruff_finds_nothing() -> None:
    """In all Python there is, scripts without a suffix included."""
    run(*module("ruff"), "check", ".", *PYTHON)


def test_everything_is_formatted_as_ruff_formats_it() -> None:
    """`ruff format pyvfio tests tools examples` would change nothing."""
    run(*module("ruff"), "format", "--check", "pyvfio", "tests", "tools", "examples", *PYTHON)


def test_mypy_finds_nothing() -> None:
    """With --strict, in the package, the tests, the tools and the examples."""
    run(*module("mypy"), "--strict")


def test_pyright_finds_nothing() -> None:
    """In the package, and in a user's script on it, which sees the names as a user's editor does."""
    run(*module("pyright"), "--pythonpath", sys.executable)


def test_shellcheck_finds_nothing() -> None:
    """In every script of scripts/ and .ci/, those that are sourced included."""
    if shutil.which("shellcheck") is None:
        pytest.fail("shellcheck is not installed: apt-get install shellcheck, or the package ShellCheck")
    assert "scripts/bind" in SHELL
    run("shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *SHELL)
