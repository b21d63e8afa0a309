"""`scripts/setup.sh` makes environments, by uv where pip can install uv; no test here asks a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = ".".join(map(str, sys.version_info[:2]))


def shell(checkout: Path, words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Source setup.sh of that checkout, and run a command with functions of it."""
    names = [name for name in os.environ if name.startswith(("PIP_", "UV_"))] + ["SSL_CERT_FILE", "ALL_PROXY"]
    kept = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        ["bash", "-c", f'source "$0/scripts/setup.sh"; {words}', checkout],
        env={**kept, **environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that has no environment."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def settings(folder: Path, text: str, **environ: str) -> dict[str, str]:
    """The settings of uv that pip's configuration file `text` leads to. The configuration of the machine counts too."""
    (folder / "pip.conf").write_text(text)
    done = shell(ROOT, 'setup_uv_settings "$PYTHON"', PIP_CONFIG_FILE=str(folder / "pip.conf"), **environ)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


@pytest.mark.long
def test_uv_asks_the_indexes_that_pip_asks(tmp_path: Path) -> None:
    """With pip's certificates and constraints. As pip does, uv takes the newest release of all of them."""
    found = settings(
        tmp_path,
        "[global]\nindex-url = http://one.invalid/simple\ncert = /c.pem\nconstraint = /c.txt\n"
        "find-links =\n    /a\n    /b\n[install]\nextra-index-url = http://two.invalid/simple http://three.invalid\n",
    )
    assert found["UV_DEFAULT_INDEX"] == "http://one.invalid/simple"
    assert found["UV_INDEX"] == "http://two.invalid/simple http://three.invalid"
    assert (found["UV_FIND_LINKS"], found["UV_CONSTRAINT"], found["SSL_CERT_FILE"]) == ("/a /b", "/c.txt", "/c.pem")
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match"


@pytest.mark.long
def test_pips_sections_and_variables_prevail_in_the_order_in_which_they_do_for_pip(tmp_path: Path) -> None:
    """Global, install, environment. A variable of uv that the user has set stays."""
    text = "[install]\nindex-url = http://install.invalid\n[global]\nindex-url = http://global.invalid\n"
    assert settings(tmp_path, text)["UV_DEFAULT_INDEX"] == "http://install.invalid"
    with_variable = settings(tmp_path, text, PIP_INDEX_URL="http://variable.invalid")
    assert with_variable["UV_DEFAULT_INDEX"] == "http://variable.invalid"
    assert "UV_DEFAULT_INDEX" not in settings(tmp_path, text, UV_DEFAULT_INDEX="http://own.invalid")


def make(checkout: Path, name: str) -> Path:
    """Make an environment without packages, with the stamp of one that is ready."""
    venv = checkout / ".venv" / name
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    stamp = shell(checkout, 'setup_stamp "$PYTHON"').stdout
    (venv / ".pyvfio-stamp").write_text(stamp)
    return venv


@pytest.mark.long
def test_an_environment_that_is_ready_is_taken_as_it_is(checkout: Path) -> None:
    """Nothing is installed again."""
    venv = make(checkout, VERSION)
    assert shell(checkout, 'ensure_venv "$PYTHON"').stdout == f"{venv}/bin/python\n"


@pytest.mark.long
def test_an_environment_is_ready_for_the_same_project_only(checkout: Path) -> None:
    """A changed pyproject.toml may have other dependencies. An environment that is half made is not ready."""
    venv = make(checkout, VERSION)
    ready = f'setup_is_current "$PYTHON" {venv}'
    assert shell(checkout, ready).returncode == 0
    (venv / ".pyvfio-unfinished").touch()
    assert shell(checkout, ready).returncode == 1
    (venv / ".pyvfio-unfinished").unlink()
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert shell(checkout, ready).returncode == 1


def test_an_interpreter_that_is_too_old_or_none_is_refused(checkout: Path) -> None:
    """In one line on stderr, with nothing made."""
    done = shell(checkout, "ensure_venv /bin/false")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "setup: /bin/false is not a Python >= 3.11 that runs here\n"
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--kernel 7+iommufd -- true", 0),
        ("--iommu amd --kernel=6.12+iommufd", 0),
        ("--kernel 7 -- true", 1),
        ("-- pyvfio vm --kernel 7+iommufd", 1),
        ("--kernel", 1),
        ("", 1),
    ],
)
def test_a_compiler_is_needed_only_for_a_machine_whose_kernel_has_iommufd(words: str, status: int) -> None:
    assert shell(ROOT, f"setup_builds_modules {words}").returncode == status
