"""README.md and the pages of docs/: programs that are copied from them run, and links lead to files that exist."""

from __future__ import annotations

import ast
import code
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
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
INSIDE = 8 * " "


def programs(page: str) -> list[str]:
    """What is written in Python on it."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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


def test_the_programs_of_each_page_run_in_a_test() -> None:
    """A page with Python on it is named, by its path, in a file of tests."""
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    named = {name for test in tests for name in re.findall(r"docs/[\w/-]+\.md|README\.md", test)}
    with_programs = {name for page in PAGES if programs(name := str(page.relative_to(ROOT)))}
    assert len(with_programs) > 10
    assert with_programs <= named


def test_the_first_program_of_the_readme_is_that_of_the_start_page(capsys: pytest.CaptureFixture[str]) -> None:
    """It runs, and prints one IOVA for two lengths."""
    assert programs("README.md")[0] == programs("docs/index.md")[0]
    names: dict[str, object] = {}
    exec(programs("docs/index.md")[0], names)  # noqa: S102
    large, small = capsys.readouterr().out.splitlines()
    assert (large.split()[0], small.split()[0]) == ("4", "1")
    assert large.split()[1:] == small.split()[1:]
    assert isinstance(names["kernel"], FakeKernel)
    names["kernel"].check()


def test_the_test_that_the_readme_shows_passes(tmp_path: Path) -> None:
    """With the plugin, in a file of its own."""
    (tmp_path / "test_mine.py").write_text(programs("README.md")[1], encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


@pytest.mark.parametrize("page", ["docs/addresses.md", "docs/memory.md", "docs/resizing.md"])
def test_the_programs_of_the_pages_go_on_from_the_first_one(page: str) -> None:
    """One after the other, with the objects that they take for granted."""
    program = programs("docs/index.md")[0]
    for more in programs(page):
        program += "".join(INSIDE + line for line in more.splitlines(keepends=True))
    names: dict[str, object] = {}
    exec(program, names)  # noqa: S102
    assert isinstance(names["ring"], pyvfio.RamBlock)
    assert isinstance(names["kernel"], FakeKernel)
    assert names["kernel"].mappings() == ()
    names["kernel"].check()


def test_the_steps_of_the_tutorial_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    """With the assertions that they make, and the output that the page speaks of."""
    *steps, _whole = programs("docs/tutorial/fake.md")
    names: dict[str, object] = {}
    for step in steps:
        exec(step, names)  # noqa: S102
    said = capsys.readouterr().out
    assert "vendor 0x1234, device 0x11e8" in said
    assert "1 interrupt\n" in said
    assert isinstance(names["kernel"], FakeKernel)
    assert names["kernel"].descriptors == ()


def test_the_steps_of_the_tutorial_can_be_typed_at_the_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    """Line by line, as Python's own prompt takes them: without an error, and without an echo of a value."""
    *steps, _whole = programs("docs/tutorial/fake.md")
    names: dict[str, object] = {}
    for step in steps:
        exec(step, names)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    console = code.InteractiveConsole()
    for step in steps:
        waits = False
        for line in step.splitlines():
            waits = console.push(line)
        if waits:
            assert not console.push("")  # the empty line that ends an indented block
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == len(printed)


def test_only_the_tutorial_asks_the_reader_to_type_at_the_prompt() -> None:
    """Another page that asks for that needs the test above."""
    pages = [page for page in PAGES if "prompt of Python" in page.read_text(encoding="utf-8")]
    assert [str(page.relative_to(ROOT)) for page in pages] == ["docs/tutorial/fake.md"]


def test_the_pages_make_one_environment() -> None:
    """Under one name, so that a reader who goes from page to page needs no second one."""
    made = re.findall(
        r"^python3 -m venv (\S+)$", "".join(page.read_text(encoding="utf-8") for page in PAGES), re.MULTILINE
    )
    assert len(made) >= 3
    assert set(made) == {".venv/mine"}


def test_no_command_of_a_page_takes_the_user_from_the_environment() -> None:
    """A shell of root has no USER, or root's."""
    assert [page.name for page in PAGES if "$USER" in page.read_text(encoding="utf-8")] == []


def test_the_table_of_the_page_on_virtual_machines_has_the_columns_of_list() -> None:
    page = (ROOT / "docs/tutorial/vm.md").read_text(encoding="utf-8")
    header = re.search(r"^BDF .*$", page, re.MULTILINE)
    assert header is not None
    # The kernel of the page is a packaged one, which makes no nodes of devices.
    assert header[0].split() == [name for name in list_command.HEADER if name != "CDEV"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_whole_driver_of_the_tutorial_runs(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On each kernel; nothing stays mapped."""
    names: dict[str, object] = {"__name__": "copier"}
    exec(programs("docs/tutorial/fake.md")[-1], names)  # noqa: S102
    main = names["main"]
    assert callable(main)
    with FakeKernel(version) as kernel:
        main("0000:00:02.0", kernel)
        assert kernel.mappings() == ()
        assert kernel.descriptors == ()
        kernel.check()
    assert capsys.readouterr().out == "hello\n"


def test_the_program_of_the_page_on_hardware_opens_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    """On the fake, with the address of the page."""
    (program,) = programs("docs/tutorial/hardware.md")
    with FakeKernel(groups=[(7, [FakeDevice("0000:01:00.0")])]) as kernel:
        exec(program.replace('0.0"', '0.0", kernel=kernel'), {"kernel": kernel})  # noqa: S102
    assert "9 regions" in capsys.readouterr().out


def test_the_commands_and_the_program_of_the_page_on_binding_run(tmp_path: Path) -> None:
    """One after the other, on a tree that looks like sysfs."""
    tree = SysfsTree(tmp_path)
    tree.add_device("0000:00:02.0", driver="e1000e", group=7)
    mains = {"bind": bind.main, "unbind": unbind.main}
    page = (ROOT / "docs/binding.md").read_text(encoding="utf-8")
    lines = re.findall(r"^pyvfio (\w+) ?([^#\n]*)", page[: page.index("## ")], re.MULTILINE)
    assert {name for name, _arguments in lines} == {"list", *mains}
    for name, words in lines:
        if name == "list":
            assert list_command.main(words.split(), kernel=tree.kernel) == 0
        else:
            assert mains[name](words.split(), kernel=tree.kernel, write=tree.write) == 0
    assert tree.driver_of("0000:00:02.0") is None
    (program,) = programs("docs/binding.md")
    names: dict[str, object] = {"tree": tree}
    exec(re.sub(r"(pci\.\w+\([^()]*)\)", r"\1, kernel=tree.kernel, write=tree.write)", program), names)  # noqa: S102
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


def test_the_programs_of_the_page_on_iommufd_run_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    """On the fake kernel that the page makes; all is closed at the end."""
    names: dict[str, object] = {}
    exec("".join(programs("docs/iommufd.md")), names)  # noqa: S102
    kernel = names["kernel"]
    assert isinstance(kernel, FakeKernel)
    with kernel:
        assert kernel.descriptors == ()
        kernel.check()
    assert capsys.readouterr().out.split("\n")[1:] == ["['0x101000']", "True", "2 0", "8388608 16777216 4194304", ""]


def test_the_program_of_the_page_on_devices_without_an_iommu_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """On the fake kernel that the page names."""
    (program,) = programs("docs/noiommu.md")
    with FakeKernel("7.3", iommu="none") as kernel:
        with pytest.warns(pyvfio.UnsafeNoIommuWarning):
            exec(program.replace('noiommu")', 'noiommu", kernel=kernel)'), {"kernel": kernel})  # noqa: S102
        assert kernel.descriptors == ()
    assert "0x200000 bytes at physical address" in capsys.readouterr().out


def test_the_program_of_the_page_on_live_update_runs_on_a_fake_kernel() -> None:
    """Both programs of a hand-over in one process. All is closed at the end."""
    names: dict[str, object] = {}
    exec(programs("docs/live-update.md")[-1], names)  # noqa: S102
    kernel = names["kernel"]
    assert isinstance(kernel, FakeKernel)
    with kernel:
        assert kernel.descriptors == ()
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
