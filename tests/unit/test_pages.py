"""README.md and the pages it links to: what is copied from them runs, and what is followed is there."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.cli import bind, unbind
from pyvfio.cli import list as list_command
from pyvfio.testing import FakeKernel
from pyvfio.testing.fake import VERSIONS, FakeDevice
from tests.mutants.mutant import definitions
from tests.unit.sysfs import SysfsTree

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FIRST = """with pyvfio.open_device("0000:00:02.0") as device, pyvfio.RamBlockList() as blocks:\n"""
INSIDE = 8 * " "


def programs(page: str) -> list[str]:
    """What is written in Python on it."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    """Those within the repository."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_page_on_architecture_names_what_the_package_has() -> None:
    """Each file, and each class, method and function, of the sections that lead a newcomer to the place of a change."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = text[text.index("## Where to change") : text.index("## The guard")]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "pyvfio").rglob("*.py")]
    defined = {name for source in sources for name, _node in definitions(ast.parse(source))}
    defined |= {name.split(".")[-1] for name in defined}
    attributes = {
        node.attr for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
    }
    named = set(re.findall(r"`([^`]+)`", section))
    assert len(named) > 30
    for name in named - {"hints=", "operator.index", "used_length", "table", "trace"}:
        if name.endswith(".py"):
            assert list((ROOT / "pyvfio").rglob(name)) or (ROOT / "pyvfio" / name).is_file(), name
        elif not (ROOT / name).exists():
            owner, _, last = name.removesuffix("()").removeprefix("units.").rpartition(".")
            assert f"{owner}.{last}".strip(".") in defined or (owner in defined and last in attributes), name


@pytest.mark.parametrize("page", ["docs/addresses.md", "docs/memory.md", "docs/resizing.md"])
def test_the_programs_of_the_pages_go_on_from_that_of_the_readme(page: str) -> None:
    """One after the other, with the objects that they take for granted; the fake in place of the running kernel."""
    first = next(program for program in programs("README.md") if FIRST in program)
    program = first.replace(
        FIRST, FIRST.replace('2.0"', '2.0", kernel=kernel').replace("List()", "List(kernel=kernel)")
    )
    for more in programs(page):
        program += "".join(INSIDE + line for line in more.splitlines(keepends=True))
    with FakeKernel() as kernel:
        names: dict[str, object] = {"kernel": kernel}
        exec(program, names)  # noqa: S102
        assert isinstance(names["ring"], pyvfio.RamBlock)
        assert kernel.mappings() == ()
        kernel.check()


def test_the_commands_and_the_program_of_the_page_on_binding_run(tmp_path: Path) -> None:
    """One after the other, on a tree that looks like sysfs."""
    tree = SysfsTree(tmp_path)
    tree.add_device("0000:00:02.0", driver="e1000e", group=7)
    mains = {"bind": bind.main, "unbind": unbind.main}
    page = (ROOT / "docs/binding.md").read_text(encoding="utf-8")
    lines = re.findall(r"^scripts/(\w+) ?([^#\n]*)", page, re.MULTILINE)
    assert {name for name, _arguments in lines} == {"list", *mains}
    for name, words in lines:
        if name == "list":
            assert list_command.main(words.split(), kernel=tree.kernel) == 0
        else:
            assert mains[name](words.split(), kernel=tree.kernel, write=tree.write) == 0
    assert tree.driver_of("0000:00:02.0") is None
    (program,) = programs("docs/binding.md")
    names: dict[str, object] = {"tree": tree}
    for before, after in (("pyvfio.LinuxKernel()", "tree.kernel"), ("(kernel, ", "(kernel, write=tree.write, bdf=")):
        program = program.replace(before, after)
    exec(program.replace("bdf=binding", "binding=binding"), names)  # noqa: S102
    assert isinstance(names["binding"], pci.Binding)
    assert names["binding"].driver == "vfio-pci"
    assert tree.driver_of("0000:00:02.0") is None


def test_the_programs_of_the_page_on_resets_run(capsys: pytest.CaptureFixture[str]) -> None:
    """On the fake, with the devices that they name."""
    groups = [(2, ["0000:01:00.0"]), (3, ["0000:01:00.1"]), (4, ["0000:00:03.0"]), (5, ["0000:00:04.0"])]
    with FakeKernel(groups=[(number, [FakeDevice(bdf) for bdf in bdfs]) for number, bdfs in groups]) as kernel:
        for program in programs("docs/reset.md"):
            with_kernel = re.sub(r'open_device\("([^"]+)"\)', r'open_device("\1", kernel=kernel)', program)
            exec(with_kernel, {"pyvfio": pyvfio, "kernel": kernel})  # noqa: S102
        assert "VFIO_DEVICE_PCI_HOT_RESET" in [call.request for call in kernel.trace]
        assert "the card's registers at IOVA 0x" in capsys.readouterr().out
        assert kernel.mappings() == ()
        kernel.check()


def test_the_programs_of_the_page_on_registers_run_on_a_device() -> None:
    """One after the other, on an edu."""
    with FakeKernel() as kernel, pyvfio.open_device("0000:00:02.0", kernel=kernel) as device:
        names: dict[str, object] = {"device": device, "pyvfio": pyvfio}
        for program in programs("docs/registers.md"):
            exec(program, names)  # noqa: S102
        assert not device.closed
        assert device.memory_enabled


@pytest.mark.parametrize("version", VERSIONS)
def test_the_programs_of_the_page_on_interrupts_run_one_after_the_other(version: str) -> None:
    """On each kernel: what only some can do, they ask first."""
    program = "".join(programs("docs/interrupts.md")).replace('2.0"', '2.0", kernel=kernel')
    assert program.count("kernel=kernel") == 1
    devices = [FakeDevice("0000:00:02.0", msi=0, msix=16)]
    with FakeKernel(version, groups=[(2, devices)]) as kernel:
        names: dict[str, object] = {"kernel": kernel}
        exec(program, names)  # noqa: S102
        assert isinstance(names["irq"], pyvfio.Irq)
        assert (names["irq"].can_grow, names["times"]) == (version != "6.1", 1)
        assert kernel.descriptors == ()


def test_the_programs_of_the_page_on_opening_run_one_after_the_other() -> None:
    """On the fake kernel that the page makes, with the changes that it lists; all is closed at the end."""
    fake, *others = programs("docs/opening.md")
    names: dict[str, object] = {"pyvfio": pyvfio}
    exec(fake, names)  # noqa: S102
    program = "".join(others)
    makers = r"(open_device\(\"[^\"]+\"|Container\(|Container\.from_fd\([^)]+|Group\.from_fd\([^)]+)"
    program = re.sub(makers, lambda made: f"{made[0]}{'' if made[0].endswith('(') else ', '}kernel=kernel", program)
    kernel = names["kernel"]
    assert isinstance(kernel, FakeKernel)
    with kernel:
        exec(program, names)  # noqa: S102
        assert kernel.descriptors == ()
        made = {call.request for call in kernel.trace}
        assert made >= {"VFIO_DEVICE_FEATURE", "VFIO_GROUP_GET_STATUS", "VFIO_DEVICE_GET_INFO"}
        kernel.check()


def run_the_first_driver(directory: Path, *changes: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Write the files of docs/first-driver.md, each under its name and with the changes, and run the program."""
    text = (ROOT / "docs/first-driver.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL | re.MULTILINE))
    assert list(files) == ["inverter.py", "fake_inverter.py", "run.py"]
    for before, after in changes:
        assert sum(before in program for program in files.values()) == 1, before
        files = {name: program.replace(before, after) for name, program in files.items()}
    for name, program in files.items():
        (directory / name).write_text(program, encoding="utf-8")
    command = [sys.executable, "-W", "error", "run.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_first_driver_runs_on_the_fake_device_beside_it(tmp_path: Path, version: str) -> None:
    """On each kernel, with the output that the page shows."""
    done = run_the_first_driver(tmp_path, ('"6.12"', f'"{version}"'))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("fff000\n")


def test_the_first_driver_gets_no_message_without_bus_mastering(tmp_path: Path) -> None:
    """The page says where the device may begin to send messages."""
    done = run_the_first_driver(
        tmp_path,
        ("self.device.bus_master = True", "pass"),
        ("self.irq.wait(0, timeout=1.0)", "self.irq.wait(0, timeout=0)"),
    )
    assert done.returncode == 1
    assert "TimeoutError: 0000:01:00.0 sent no message" in done.stderr


def test_the_first_driver_hands_an_entry_over_by_its_last_store(tmp_path: Path) -> None:
    """The fake does not complete an entry without it."""
    done = run_the_first_driver(
        tmp_path,
        ("words[at // 4 + 3] = OWNED", "pass"),
        ("self.irq.wait(0, timeout=1.0)", "self.irq.wait(0, timeout=0)"),
    )
    assert "TimeoutError: 0000:01:00.0 sent no message" in done.stderr


def test_the_first_driver_closes_when_its_device_has_gone(tmp_path: Path) -> None:
    """Without an error."""
    done = run_the_first_driver(
        tmp_path,
        ("    inverter.data.resize(0)\n", '    kernel.pull_out("0000:01:00.0")\n'),
        ("except ValueError", "except OSError"),
    )
    assert done.returncode == 0, done.stderr
