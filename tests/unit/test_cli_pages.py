"""The completions and the manual page of `pyvfio`, as the build of a wheel makes them."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from pyvfio.cli.main import COMMANDS, load
from tools.cli_pages import MAN_PAGE, PLACES, completion, man_page, write_pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, in their places."""
    directory = tmp_path_factory.mktemp("share")
    write_pages(directory)
    return directory


def completed(share: Path, line: str) -> list[str]:
    """The replies of bash's completion at the end of a command line."""
    words = line.split(" ")
    script = f"""
        source "$1"
        shift
        COMP_LINE=$1 COMP_POINT=${{#1}}
        shift
        COMP_WORDS=("$@") COMP_CWORD={len(words) - 1}
        _shtab_pyvfio
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script, "-", share / PLACES["bash"], line, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_each_shell_that_is_installed_accepts_its_completion(share: Path) -> None:
    """bash is in any case."""
    found = [shell for shell in PLACES if shutil.which(shell)]
    assert "bash" in found
    for shell in found:
        done = subprocess.run([shell, "-n", share / PLACES[shell]], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "replies"),
    [
        ("pyvfio bi", ["bind"]),
        ("pyvfio un", ["unbind"]),
        ("pyvfio bind --dry", ["--dry-run"]),
        ("pyvfio list --c", ["--color"]),
        ("pyvfio list --color a", ["auto", "always"]),
        ("pyvfio vm --iommu am", ["amd"]),
        ("pyvfio vm --kernel 6", ["6.1", "6.12", "6.12+iommufd"]),
        ("pyvfio vm --kernel 6.12+", ["6.12+iommufd"]),
        ("pyvfio demo --kernel 7", ["7", "7+iommufd"]),
        ("pyvfio vm --kernel pyproj", ["pyproject.toml"]),
        ("pyvfio help unb", ["unbind"]),
        ("pyvfio --v", ["--version"]),
    ],
)
def test_bash_completes_commands_options_and_values(share: Path, line: str, replies: list[str]) -> None:
    assert completed(share, line) == replies


def test_bash_completes_every_command_and_each_of_its_options(share: Path) -> None:
    """A new command is completed without a further word."""
    assert set(completed(share, "pyvfio ")) == {*COMMANDS, "help"}
    for name in COMMANDS:
        shown = [action for action in load(name).make_parser()._actions if action.help != argparse.SUPPRESS]
        options = {option for action in shown for option in action.option_strings}
        assert options <= set(completed(share, f"pyvfio {name} -"))


@pytest.mark.parametrize("command", ["bind", "unbind", "info", "list"])
def test_bash_completes_the_addresses_of_this_machine(share: Path, command: str) -> None:
    """For readline, the colons of an address end words: a reply is the text behind the last one."""
    directory = Path("/sys/bus/pci/devices")
    found = sorted(os.listdir(directory)) if directory.is_dir() else []
    assert sorted(completed(share, f"pyvfio {command} ")) == found
    script = f'source "$1"; COMP_LINE="pyvfio {command} 0000:0" COMP_POINT=${{#COMP_LINE}}; _pyvfio_bdfs'
    done = subprocess.run(
        ["bash", "-c", script, "-", share / PLACES["bash"]], capture_output=True, text=True, check=True
    )
    assert sorted(done.stdout.split()) == [name.partition(":")[2] for name in found if name.startswith("0000:0")]


def test_each_completion_names_every_command() -> None:
    for shell in PLACES:
        text = completion(shell)
        assert all(name in text for name in COMMANDS), shell


# --- The manual page


def rendered(share: Path) -> str:
    """The page as a reader sees it, by whichever formatter is installed; its source where none is."""
    for formatter in (["mandoc", "-T", "ascii"], ["groff", "-man", "-T", "ascii", "-ww"]):
        if shutil.which(formatter[0]):
            done = subprocess.run(
                [*formatter, share / MAN_PAGE],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "GROFF_NO_SGR": "1"},
            )
            assert done.stderr == ""
            return re.sub(".\b", "", done.stdout)  # bold and underlined characters are struck twice
    return (share / MAN_PAGE).read_text().replace("\\-", "-")


def test_the_manual_page_shows_every_command_with_its_options_and_examples(share: Path) -> None:
    """A formatter finds nothing to complain of."""
    text = " ".join(rendered(share).split())
    for name in COMMANDS:
        parser = load(name).make_parser()
        assert f"PYVFIO {name.upper()}" in text
        for example in parser.format_help().partition("\nexamples:\n")[2].splitlines():
            assert " ".join(example.split()) in text
        for action in parser._actions:
            assert (
                action.help == "==SUPPRESS=="
                or "-h" in action.option_strings
                or all(option in text for option in action.option_strings)
            )


def test_the_manual_page_has_the_line_that_apropos_shows() -> None:
    lines = man_page().splitlines()
    assert lines[lines.index(".SH NAME") + 1].startswith("pyvfio \\- Linux VFIO for user\\-space drivers")


def test_the_pages_do_not_depend_on_the_terminal_or_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds of one source are the same."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    monkeypatch.setenv("COLUMNS", "60")
    narrow = man_page(), completion("bash")
    monkeypatch.setenv("COLUMNS", "200")
    assert (man_page(), completion("bash")) == narrow
    assert '.TH PYVFIO 1 "1970-01-02"' in narrow[0]


def test_a_wheel_takes_each_page_to_its_place(share: Path) -> None:
    """pyproject.toml and the generator say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = {
        Path(source).parent.relative_to("build") / "*": Path(place)
        for place, sources in project["tool"]["setuptools"]["data-files"].items()
        for source in sources
    }
    made = {Path("share") / page.relative_to(share).parent for page in share.rglob("*") if page.is_file()}
    assert {source.parent for source in named} == set(named.values()) == made
