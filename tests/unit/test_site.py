"""The site of docs/ is built without a warning, has each public name, and shows commands that exist."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import pyvfio
from pyvfio.cli import main as cli
from pyvfio.cli import vm
from tests.unit.test_pages import PAGES, anchors
from tools import site

ROOT = Path(__file__).resolve().parents[2]
BASH = re.compile(r"```sh\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the site. A warning of Sphinx is a failure."""
    target = tmp_path_factory.mktemp("site")
    done = subprocess.run(site.command(target), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return target


def test_each_page_is_in_the_site(built: Path) -> None:
    """As HTML, in the place of its source."""
    for page in (ROOT / "docs").rglob("*.md"):
        assert (built / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page


def test_each_public_name_is_in_the_reference(built: Path) -> None:
    """Of each public module, once; each class with its methods."""
    inventory = InventoryFile.loads((built / "objects.inv").read_bytes(), uri="").data
    described = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    for module_name in site.MODULES:
        module = importlib.import_module(module_name)
        for name in vars(module)["__all__"]:
            if type(getattr(module, name)) not in {int, str}:
                assert f"{module_name}.{name}" in described
    assert {"pyvfio.RamBlock.resize", "pyvfio.DmaMapper.map_buffer", "pyvfio.Irq.wait_any"} <= described
    assert "pyvfio.ioctls.vfio_iommu_type1_dma_map" in described
    other = (built / "reference/other.html").read_text(encoding="utf-8")
    assert all(name in other for name in ("GIB", "PAGE_SIZE"))


def test_each_name_of_the_package_is_on_one_page_of_the_reference() -> None:
    """The groups share out all names, and each group has a page."""
    groups = [*site.REFERENCE, "other"]
    shared = [name for group in groups for name in site.names_of("pyvfio", group)]
    assert sorted(shared) == sorted(vars(pyvfio)["__all__"])
    for group in groups:
        assert f"{{public}} pyvfio {group}\n" in (ROOT / f"docs/reference/{group}.md").read_text(encoding="utf-8")


def test_no_page_of_the_site_names_another_host(built: Path) -> None:
    """But that of the theme in the footer: a page is read without a network."""
    for page in built.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r'(?:src|href)="(https?://[^"]+)"', text)) <= {
            "https://github.com/pradyunsg/furo",
            "https://pradyunsg.me",
        }, page


def test_docstrings_become_the_markup_of_the_site() -> None:
    """Names between backticks, code that is indented, lists, sections; stars are no markup."""
    text = ["Map `n` bytes of *args.", "", "    mapper.map(1)", "", "Two:", "* one_", "  more", "Raises: `E`."]
    assert site.to_rest(text) == [
        r"Map ``n`` bytes of \*args.",
        "",
        "::",
        "",
        "        mapper.map(1)",
        "",
        "Two:",
        "",
        r"* one\_",
        "  more",
        "",
        "**Raises:** ``E``.",
        "",
    ]


def test_each_error_has_a_section_of_the_page_on_troubleshooting() -> None:
    """Each exception and warning of the package, under its name; of others, those that pages speak of."""
    found = anchors(ROOT / "docs/troubleshooting.md")
    errors = {name for name in vars(pyvfio)["__all__"] if name.endswith(("Error", "Warning"))}
    assert {name.lower() for name in errors} <= found
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    named = re.findall(r"^### (\w+(?:Error|Warning))$", text, re.MULTILINE)
    assert set(named) - errors == {"BufferError", "ImportError"}


def test_terms_of_the_glossary_are_in_order_and_linked_from_pages() -> None:
    """No term is explained twice, and those that a newcomer meets first are linked from the tutorial."""
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert terms == sorted(set(terms), key=str.lower)
    assert {"IOVA", "IOMMU group", "Viable", "Granule", "RAM block", "edu"} <= set(terms)
    linked = {
        anchor for page in PAGES for anchor in re.findall(r"glossary\.md#([\w-]+)", page.read_text(encoding="utf-8"))
    }
    assert {"iova", "iommu-group", "viable", "granule", "ram-block", "edu", "pin", "bar"} <= linked


# -------------------------------------------------------------------------------------------------------- commands


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command of a page's shell, without comments, and up to a redirection or a pipe."""
    for block in BASH.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                ends = [at for at, word in enumerate(words) if word in {">", ">>", "<", "|", ";", "&&", "||"}]
                yield words[: min(ends, default=None)]


def check(words: list[str]) -> bool:
    """Fail where a command of pyvfio, or a program of the clone, would not start. Return whether this is one."""
    program, *rest = words
    name = program.removeprefix("scripts/")
    if program == "sh" and rest[0] == "-c":
        return all(check(shlex.split(part)) for part in rest[1].split("&&"))
    if program.endswith("python") and rest and rest[0].endswith(".py"):
        assert "/" not in rest[0] or (ROOT / rest[0]).is_file(), words
    elif program == "pyvfio":
        check_command(*rest)
    elif program.startswith("scripts/"):
        assert (ROOT / program).is_file(), words
        if name in cli.COMMANDS:
            check_command(name, *rest)
    else:
        return False
    return True


def check_command(name: str, *words: str) -> None:
    """Fail where `pyvfio` has no such subcommand, or the subcommand does not take the words."""
    if name == "vm":
        if inside := vm.parse(words).command:
            check(inside)
    elif not name.startswith("-"):
        assert name in cli.COMMANDS, name
        cli.load(name).make_parser().parse_args(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_pages_have_the_options_that_are_shown(page: Path) -> None:
    """Each `pyvfio …` and `scripts/…` is parsed, also inside of a virtual machine; programs exist."""
    for words in commands(page):
        check(words)


@pytest.mark.parametrize("line", ["pyvfio lost", "pyvfio bind --by-force 0000:00:02.0", "python examples/none.py"])
def test_a_command_that_does_not_exist_is_found(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also within the command for a virtual machine."""
    for words in (shlex.split(line), ["pyvfio", "vm", "--", *shlex.split(line)]):
        with pytest.raises((AssertionError, SystemExit)):
            check(words)
    capsys.readouterr()


def test_pages_show_commands() -> None:
    """At least those of the README: so the pages are read as they are written."""
    shown = [words for words in commands(ROOT / "README.md") if check(words)]
    assert len(shown) >= 9
