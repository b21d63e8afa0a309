"""`pyvfio` itself: its commands, their helps, and the page that documents them. Each test goes over `COMMANDS`, so a
new command is held to the same."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.cli import bind, changes, demo, doctor, draw, info, main, plan, vm
from pyvfio.cli import list as list_command
from pyvfio.cli.main import COMMANDS, load
from pyvfio.cli.parser import nearest
from pyvfio.cli.state import STATES
from pyvfio.diagnosis.examination import ADDRESS_SPACES
from pyvfio.extents import Extent
from pyvfio.picture import SCHEMA as PICTURE
from pyvfio.picture import Picture, Span
from pyvfio.units import Iova, IovaRange
from tests.unit.sysfs import SysfsTree, link

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
NIC, VF = "0000:01:00.0", "0000:01:10.0"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyvfio", *words], capture_output=True, text=True, check=False, cwd=ROOT
    )


# --- The commands


def test_the_version_is_the_packages() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"pyvfio {pyvfio.__version__}\n", "")


@pytest.mark.long
def test_the_help_lists_each_command() -> None:
    """`pyvfio help` is the same."""
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name:<10}{command.summary}\n" in done.stdout for name, command in COMMANDS.items())
    assert run("help").stdout == done.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_can_be_asked_for_in_two_ways(name: str) -> None:
    done = run("help", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: pyvfio {name} ")
    assert run(name, "--help").stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lsit"], "pyvfio: there is no command 'lsit'; did you mean list? See pyvfio --help\n"),
        (["help", "unbnd"], "pyvfio: there is no command 'unbnd'; did you mean unbind? See pyvfio --help\n"),
        ([""], "pyvfio: there is no command ''; see pyvfio --help\n"),
        (["zzz"], "pyvfio: there is no command 'zzz'; see pyvfio --help\n"),
        (["--verison"], "pyvfio: unrecognized arguments: --verison; did you mean --version? See pyvfio --help\n"),
        (
            ["list", "--jsn"],
            "pyvfio list: unrecognized arguments: --jsn; did you mean --json? See pyvfio list --help\n",
        ),
        (
            ["list", "--js=x"],
            "pyvfio list: unrecognized arguments: --js=x; did you mean --json? See pyvfio list --help\n",
        ),
        (["list", "--abc"], "pyvfio list: unrecognized arguments: --abc; see pyvfio list --help\n"),
        (
            ["doctor", "--spac", "iommufd"],
            "pyvfio doctor: unrecognized arguments: --spac; did you mean --space? See pyvfio doctor --help\n",
        ),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest_one(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main.main(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else -1
    assert status == 2
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "--fake"], "demo and pyvfio plan can run on the fake kernel"),
        (["info", "--fake=7"], "demo and pyvfio plan can run on the fake kernel"),
        (["list", "--space", "iommufd"], "pyvfio demo, doctor, draw and plan have --space"),
        (["vm", "--space", "iommufd", "--", "ls"], "pyvfio vm has --kernel 7+iommufd"),
        (["info", "--iommu", "iommufd", "0000:00:02.0"], "plan choose the address space"),
        (["plan", "--fake", "--kernel", "7", "ring=4K"], "pyvfio plan has --fake KERNEL"),
        (["demo", "--iommu", "iommufd"], "iommufd is an address space, not an IOMMU: use pyvfio demo --space iommufd"),
        (["vm", "--iommu", "iommufd", "--", "ls"], "pyvfio vm --kernel 7+iommufd"),
    ],
)
def test_an_option_of_another_command_is_answered_with_that_command(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The value behind the option is not taken for a wrong argument of the command."""
    with suppress(SystemExit):
        main.main(words)
    answer = capsys.readouterr()
    assert (answer.out, answer.err.count("\n")) == ("", 1)
    assert said in answer.err


@pytest.mark.parametrize("name", ["demo", "doctor", "draw", "plan"])
def test_each_command_with_a_kind_of_address_space_has_it_as_space(name: str) -> None:
    option = load(name).make_parser()._option_string_actions["--space"]
    assert option.choices == ADDRESS_SPACES


def test_without_a_command_the_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main([])
    names = ", ".join([*COMMANDS, "help"])
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"pyvfio: no command is named; the commands are {names}; see pyvfio --help\n")


def test_a_word_that_is_like_nothing_has_no_nearest_one() -> None:
    assert (nearest("q", ["list"]), nearest("lst", ["list", "bind"])) == ("", "; did you mean list?")


# --- Helps


def examples(name: str) -> list[list[str]]:
    """The arguments of each example in the help of a command."""
    text = load(name).make_parser().format_help()
    _, found, lines = text.partition("\nexamples:\n")
    assert found, f"the help of {name} has no examples"
    words = [shlex.split(line, comments=True) for line in lines.splitlines() if line.startswith("  ")]
    assert all(each[:2] == ["pyvfio", name] for each in words)
    return [each[2:] for each in words]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_has_examples_that_its_parser_accepts(name: str) -> None:
    found = examples(name)
    assert found
    for arguments in found:
        load(name).make_parser().parse_args(arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_says_the_exit_statuses(name: str) -> None:
    assert "\nexit status:" in load(name).make_parser().format_help()


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_json(name: str) -> None:
    options = {option for action in load(name).make_parser()._actions for option in action.option_strings}
    assert "--json" in options


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_cannot_be_abbreviated(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A later option would change the meaning of an abbreviation in a script."""
    with pytest.raises(SystemExit) as caught:
        load(name).make_parser().parse_args(["--jso"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- The page


def sections() -> dict[str, str]:
    """The parts of the page, by their headings."""
    parts = re.split(r"^#{2,3} (.+)$", PAGE, flags=re.MULTILINE)
    return {heading.strip("`"): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


def full_tree(root: Path) -> SysfsTree:
    """A virtual function behind an IOMMU, open in this process, with as many facts as there are."""
    tree = SysfsTree(root)
    tree.use_real_proc()
    physical = tree.add_device(NIC, driver="vfio-pci", group=7)
    virtual = tree.add_device(VF, driver="vfio-pci", group=7)
    link(virtual / "physfn", physical)
    (virtual / "resource").write_text("0x00000000febc0000 0x00000000febdffff 0x0000000000040200\n")
    (virtual / "current_link_speed").write_text("8.0 GT/s PCIe\n")
    config = bytearray(0x1000)
    config[6], config[0x34] = 0x10, 0x40
    at = 0x40
    for start, size in (("11", 12), ("01", 8), ("10", 20), ("09", 4)):  # MSI-X, power, express, a vendor's
        config[at] = int(start, 16)
        config[at + 1] = 0 if start == "09" else at + size
        at += size
    config[at - 2] = 4
    config[0x100:0x108] = bytes.fromhex("0b00010034128000")
    (virtual / "config").write_bytes(config)
    return tree


def open_list(tree: SysfsTree, command: Any, *words: str) -> None:
    with tree.add_group_node(7).open():
        assert command.main([*words, "--json"], kernel=tree.kernel) == 0


def run_demo(_tree: SysfsTree) -> None:
    assert demo.main(["--fake", "--resize", "extend", "--json"]) == 0


def list_kernels(tree: SysfsTree) -> None:
    assert vm.main(["--list", "--json", "--cache", str(tree.sysfs)]) == 0


def bind_for_ever(tree: SysfsTree) -> None:
    etc = tree.sysfs / "etc"
    (etc / "udev/rules.d").mkdir(parents=True)
    words = ["--driver", "none", "--persist", "--json", VF]
    assert bind.main(words, kernel=tree.kernel, write=tree.write, etc=etc) == 0


def examine(tree: SysfsTree) -> None:
    assert doctor.main([VF, "--json"], kernel=tree.kernel) == 1


def make_plan() -> None:
    assert plan.main(["--fake", "6.12", "ring=4K:8K", "--json"]) == 0


def draw_saved(tree: SysfsTree) -> None:
    space = (IovaRange(Iova(0), Iova(0xFFFF)),)
    span = Span("block", "ring", 0x1000, 0x2000, 0x1000, (Extent(0, 0x1000),))
    saved = tree.sysfs / "picture.json"
    saved.write_text(json.dumps(Picture("a picture", space, (span,), 39).to_json()))
    assert draw.main([str(saved), "--json"]) == 0


def list_persisted(tree: SysfsTree) -> None:
    etc = tree.sysfs / "etc"
    (etc / "udev/rules.d").mkdir(parents=True)
    pci.persist(NIC, kernel=tree.kernel, etc=etc)
    assert bind.main(["--persisted", "--json"], kernel=tree.kernel, etc=etc) == 0


SAMPLES: dict[str, Callable[[SysfsTree], None]] = {
    list_command.SCHEMA: lambda tree: open_list(tree, list_command),
    info.SCHEMA: lambda tree: open_list(tree, info, VF),
    changes.SCHEMA: bind_for_ever,
    bind.PERSISTED_SCHEMA: list_persisted,
    doctor.SCHEMA: examine,
    demo.SCHEMA: run_demo,
    plan.SCHEMA: lambda _tree: make_plan(),
    PICTURE: draw_saved,
    "pyvfio.vm-list/1": list_kernels,
}
"""For each schema a command that prints a document with all keys."""


INCLUDED = {info.SCHEMA: list_command.SCHEMA, plan.SCHEMA: PICTURE}
"""Documents that have another one inside, whose keys the page has in another section."""


def keys(value: object) -> Iterator[str]:
    """All keys of a document, those of its objects included."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def schemas() -> set[str]:
    """The schemas that the sources name, docstrings aside."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pyvfio").rglob("*.py"))
    return set(re.findall(r'(?:\b(?:PERSISTED_)?SCHEMA = |print_document\(\s*)"(pyvfio\.[a-z-]+/\d+)"', text))


def test_the_page_has_a_section_for_each_schema() -> None:
    """And each schema has a sample here, whose keys are looked up."""
    assert schemas() == set(SAMPLES) == {name for name in sections() if name.startswith("pyvfio.")}


@pytest.mark.long
@pytest.mark.parametrize("schema", SAMPLES)
def test_the_page_names_each_key_of_a_document(schema: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And no key that no document has."""
    SAMPLES[schema](full_tree(tmp_path))
    document = json.loads(capsys.readouterr().out)
    assert next(iter(document.items())) == ("schema", schema)
    found = set(keys(document)) - {"schema"}
    text = sections()[schema]
    text += sections()[INCLUDED[schema]] if schema in INCLUDED else ""
    named = set(re.findall(r"`(\w+)`", text))
    assert found - named == set()
    first = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE))))
    assert first - found == set()


def test_the_page_explains_each_state() -> None:
    """In the words of the help."""
    assert all(f"| {word} | {meaning} |\n" in PAGE for word, meaning in STATES.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_names_each_command_with_what_it_does(name: str) -> None:
    assert re.search(rf"^\| \[`pyvfio {name}\b.* \| {re.escape(COMMANDS[name].summary)} \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize("status", [vm.STATUS_PANIC, vm.STATUS_LOST, vm.STATUS_TIMEOUT, vm.STATUS_NO_MACHINE])
def test_the_page_has_each_status_of_a_virtual_machine(status: int) -> None:
    assert f"\n| {status} | " in PAGE
