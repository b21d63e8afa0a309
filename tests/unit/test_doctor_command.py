"""The command `pyvfio doctor`, and its page."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyvfio.cli import doctor
from pyvfio.diagnosis import examine
from pyvfio.findings import Command, Finding
from pyvfio.testing import FakeKernel
from tests.unit import machines
from tests.unit.fakes import BDF, PlacedKernel
from tests.unit.machines import NIC, MachineTree
from tests.unit.sysfs import place_process

PAGE = Path(__file__).resolve().parents[2] / "docs/doctor.md"


def blocks(language: str) -> list[str]:
    """The blocks of the page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def printed(capsys: pytest.CaptureFixture[str], tree: MachineTree, *arguments: str, status: int) -> str:
    """The output of the command on a machine."""
    try:
        assert doctor.main(arguments, kernel=tree.machine) == status
    finally:
        if isinstance(tree.machine, FakeKernel):
            tree.machine.close()
    return capsys.readouterr().out


def test_obstacles_are_status_1_and_what_is_in_order_is_told_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one text, the first to remove first."""
    tree = MachineTree(tmp_path)
    machines.not_loaded(tree)
    said = printed(capsys, tree, NIC, status=1)
    assert said.index("harden.conf") < said.index("modprobe -a") < said.index(f"pyvfio bind {NIC}")
    assert "ok " not in said
    assert "ok    iommu: the kernel uses dmar0 and has made 1 group\n" in printed(capsys, tree, NIC, "--all", status=1)


def test_no_obstacle_is_status_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A note is no obstacle; the script says so."""
    place_process(tmp_path)
    with PlacedKernel() as kernel:
        kernel.own_proc = tmp_path
        assert doctor.main([BDF], kernel=kernel) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"Nothing stands between {BDF} and pyvfio.open_device."
        assert doctor.main([BDF, "--script"], kernel=kernel) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "# There is no obstacle."


@pytest.mark.parametrize("columns", [40, 80])
def test_the_text_fits_the_terminal_and_commands_stay_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """So that a command can be copied."""
    monkeypatch.setenv("COLUMNS", str(columns))
    tree = MachineTree(tmp_path)
    machines.acs_trouble(tree)
    lines = printed(capsys, tree, NIC, status=1).splitlines()
    assert f"    pyvfio bind {NIC}" in lines
    assert max(map(len, lines)) <= columns


def test_a_finding_is_lines_that_can_be_copied() -> None:
    """Text is broken between words only, and indented; a risky command is a comment; a command is never broken."""
    command = "modprobe a-very-long-name-that-no-narrow-terminal-has"
    finding = Finding(
        check="iommu",
        status="note",
        summary="a device-that-has-no-driver-at-all is here",
        why="as /sys/a/very/long/path says",
        commands=(Command(command, comment="loads a module-with-a-name"), Command("reboot -f", risky=True)),
        by_hand="Turn the key",
        reboot=True,
    )
    assert list(finding.lines(24)) == [
        "note  iommu: a",
        "      device-that-has-no-driver-at-all",
        "      is here",
        "    as",
        "    /sys/a/very/long/path",
        "    says",
        "    Turn the key",
        "    # loads a",
        "    # module-with-a-name",
        f"    {command}",
        "    # reboot -f",
        "    Then reboot.",
    ]
    assert list(finding.lines(1)) == list(finding.lines(20))
    assert list(Finding("iommu", "ok", "four words of text").lines(20)) == ["ok    iommu: four", "      words of text"]
    assert list(Finding("iommu", "ok", "ten char x").lines(20)) == ["ok    iommu: ten", "      char x"]


def test_the_document_has_all_findings_under_these_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/unit/test_cli_main.py compares the keys with the page."""
    tree = MachineTree(tmp_path)
    machines.acs_trouble(tree)
    document: dict[str, Any] = json.loads(printed(capsys, tree, NIC, "--json", status=1))
    found = [each for each in document["findings"] if each["check"] == "use"]
    assert {key: document[key] for key in document if key != "findings"} == {
        "schema": "pyvfio.doctor/1",
        "host": "box",
        "kernel": machines.RELEASE,
        "bdf": NIC,
        "status": "wrong",
    }
    assert found[0] == {
        "check": "use",
        "status": "wrong",
        "summary": f"{NIC} is in use through e1000e: network interface eth0 is up",
        "why": "Programs that depend on the device lose access when the driver changes.",
        "commands": [
            {
                "text": "ip link set dev eth0 down",
                "comment": "End the use, if nothing needs it",
                "needs_root": True,
                "risky": True,
            }
        ],
        "by_hand": "",
        "reboot": False,
        "add_arguments": [],
        "remove_arguments": [],
    }
    assert {"ok", "wrong"} <= {each["status"] for each in document["findings"]}


@pytest.mark.long
def test_the_page_names_each_check(tmp_path: Path) -> None:
    """And no check that is not made."""
    text = PAGE.read_text(encoding="utf-8").partition("## What is checked")[2].partition("The command line is")[0]
    columns = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    named = {name for column in columns for name in re.findall(r"`([\w-]+)`", column)}
    made = set()
    for number, shape in enumerate(machines.MACHINES):
        tree = MachineTree(tmp_path / str(number))
        shape(tree)
        try:
            made |= {finding.check for finding in examine(NIC, memory=None, kernel=tree.machine)}
        finally:
            if isinstance(tree.machine, FakeKernel):
                tree.machine.close()
    place_process(tmp_path)
    with PlacedKernel() as kernel:
        kernel.own_proc = tmp_path
        made |= {finding.check for finding in examine(BDF, memory=None, kernel=kernel)}
    assert made == named


def test_the_script_finds_pyvfio_where_the_path_of_root_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It calls the interpreter that printed the script."""
    tree = MachineTree(tmp_path)
    machines.virtual_function(tree)
    script = printed(capsys, tree, NIC, "--script", status=1)
    assert script.startswith("#!/bin/sh\n")
    call = script.replace(f"pyvfio bind {NIC}", "pyvfio --version")
    done = subprocess.run(["/bin/sh"], input=call, env={"PATH": "/nowhere"}, text=True, capture_output=True, check=True)
    assert re.fullmatch(r"pyvfio \d+\.\d+\.\d+\n", done.stdout)


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64k", 65536), ("2G", 2 << 30), ("2GiB", 2 << 30), ("1T", 1 << 40)]
)
def test_a_size_has_the_usual_units(text: str, size: int) -> None:
    """Powers of 1024."""
    assert doctor.size_argument(text) == size


@pytest.mark.parametrize(
    "words", [["zz"], ["--memory", "much"], ["--memory", "-1"], ["--json", "--script"], ["--frobnicate"], [BDF, BDF]]
)
def test_wrong_usage_is_status_2(words: list[str]) -> None:
    """One line on stderr names the help."""
    done = subprocess.run(
        [sys.executable, "-m", "pyvfio", "doctor", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("pyvfio doctor: ")
    assert done.stderr.endswith("; see pyvfio doctor --help\n")


@pytest.mark.long
def test_the_running_machine_can_be_examined_without_a_traceback_into_a_closed_pipe() -> None:
    """Whatever machine runs the tests."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as file:
        command = [sys.executable, "-m", "pyvfio", "doctor", "--all"]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (128 + 13, b"")


AS_NOBODY = """
import contextlib, gzip, io, os
from pyvfio.cli import common, doctor
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    doctor.main(["--all"])  # imports all modules, which another user perhaps cannot read
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
common.run(lambda: doctor.main(["--all"]), name=doctor.NAME)
"""


@pytest.mark.long
def test_a_user_without_rights_can_examine_the_running_machine() -> None:
    """With findings for the files that this user cannot read. The verdict is on stderr if something is wrong."""
    done = subprocess.run([sys.executable, "-c", AS_NOBODY], capture_output=True, text=True, check=False)
    verdict = {
        0: (r"(.*\n)+.*pyvfio\.open_device\.\n", ""),
        1: (r"(.*\n)+", r"pyvfio doctor: \d+ obstacles? on this machine.*hen run pyvfio doctor again\.\n"),
    }
    out, err = verdict[done.returncode]
    assert re.fullmatch(out, done.stdout)
    assert re.fullmatch(err, done.stderr)


# --- The page


def test_the_programs_of_the_page_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the fake, where the device can be opened; the second on a device that is not there."""
    first, second, _table = blocks("python")
    place_process(tmp_path)
    with PlacedKernel() as kernel:
        kernel.own_proc = tmp_path
        exec(first.replace("memory=64", "kernel=kernel, memory=64"), {"kernel": kernel})  # noqa: S102 (the page's own)
        assert capsys.readouterr().out.startswith("kernel ok Linux")
        program = f"import pyvfio\n{second}".replace('2.0"', '9.0", kernel=kernel').replace("n()", "n(kernel=kernel)")
        exec(program, {"kernel": kernel})  # noqa: S102 (the page's own)
        assert capsys.readouterr().out.startswith("wrong device: there is no PCI device 0000:00:09.0\n")


def test_the_page_shows_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a machine whose modules are not loaded, and a device without a driver. The last line is on stderr."""
    tree = MachineTree(tmp_path)
    tree.add_device("0000:00:03.0", group=3)
    tree.use_iommu("dmar0")
    assert doctor.main(["0000:00:03.0"], kernel=tree.machine) == 1
    out, err = capsys.readouterr()
    assert out + err == blocks("text")[0]
    assert err == blocks("text")[0].splitlines(keepends=True)[-1]


def test_the_table_of_a_fleet_is_made_of_the_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page shows the table of these two machines."""
    (tmp_path / "reports").mkdir()
    for name, shape in (("lab-amd", machines.amd_off), ("lab-intel", machines.acs_trouble)):
        tree = MachineTree(tmp_path / name)
        shape(tree)
        tree.put("proc/sys/kernel/hostname", name + "\n")
        said = printed(capsys, tree, "--json", status=int(name == "lab-amd"))
        (tmp_path / "reports" / f"{name}.json").write_text(said)
    program = blocks("python")[-1]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == blocks("text")[-1]
