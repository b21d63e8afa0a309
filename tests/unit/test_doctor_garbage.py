"""Whatever files of sysfs and procfs hold, and whichever are missing, an examination ends in findings."""

from __future__ import annotations

import errno
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

import pyvfio
from pyvfio.cli import doctor
from pyvfio.errors import VfioError
from pyvfio.testing import FakeKernel
from tests.unit import machines
from tests.unit.machines import NIC, MachineTree

GARBAGE = (
    b"",
    b"\n",
    b"\xff\xfe\x00garbage",
    b"-1\n",
    b"9" * 5000,
    b"(null)",
    b"0x",
    "\N{ARABIC-INDIC DIGIT THREE}:\u0663\u202e".encode(),
    b"a: b\nc " * 50,
    b"$(reboot)'\"; `x`\n",
)


def spoil(place: Path, how: int) -> None:
    """Take a file or link away, or give it a content that no kernel writes; a directory goes with all that is in it."""
    if place.is_symlink() or not place.exists():
        place.unlink(missing_ok=True)
        if how % 3 == 1:
            place.symlink_to("/nowhere/" + "x" * 200)
        elif how % 3 == 2:
            place.write_bytes(GARBAGE[how % len(GARBAGE)])
    elif place.is_dir():
        shutil.rmtree(place)
        if how % 2:
            place.write_bytes(GARBAGE[how % len(GARBAGE)])
    elif how % 4 == 3:
        place.unlink()
        if how % 8 == 3:
            place.mkdir()
    elif how % 4 == 2:
        place.write_bytes(nearly_right(place.read_bytes(), how))
    else:
        place.write_bytes(GARBAGE[how % len(GARBAGE)])


def nearly_right(content: bytes, how: int) -> bytes:
    """The content of a file with a fault: cut off, or with other numbers than there can be."""
    faults = (
        lambda: content[: len(content) // 2],
        lambda: re.sub(rb"\d+", b"x", content),
        lambda: re.sub(rb"\d+", b"9" * 5000, content),
        lambda: re.sub(rb"\d+", b"-1", content),
        lambda: content.replace(b" ", b"\n").replace(b":", b""),
        lambda: content.replace(b" ", b""),
    )
    return faults[how // 4 % len(faults)]()


@pytest.mark.long
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.sampled_from(machines.MACHINES),
    spoilt=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 200)), min_size=1, max_size=12),
)
def test_garbage_ends_in_findings(shape: Callable[[MachineTree], None], spoilt: list[tuple[int, int]]) -> None:
    """And in a text, a document and a script that sh can read; an error can be explained all the same."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        tree = MachineTree(Path(directory))
        shape(tree)
        for number, how in spoilt:
            places = sorted(each for each in Path(directory).rglob("*") if each != Path(directory) / "dev")
            if places:
                spoil(places[number % len(places)], how)
        try:
            judge(tree)
        finally:
            if isinstance(tree.machine, FakeKernel):
                tree.machine.close()


@pytest.mark.long
@pytest.mark.parametrize("shape", [machines.acs_trouble, machines.in_container, machines.virtual_late])
def test_each_file_with_a_fault_ends_in_findings(tmp_path: Path, shape: Callable[[MachineTree], None]) -> None:
    """One file at a time, with numbers that are none or too large, a line cut off, separators lost."""
    tree = MachineTree(tmp_path)
    shape(tree)
    try:
        for place in [each for each in sorted(tmp_path.rglob("*")) if each.is_file() and not each.is_symlink()]:
            content = place.read_bytes()
            for how in range(0, 24, 4):
                place.write_bytes(nearly_right(content, how))
                assert len(pyvfio.doctor(NIC, memory=1 << 20, kernel=tree.machine)) > 3
            place.write_bytes(content)
    finally:
        if isinstance(tree.machine, FakeKernel):
            tree.machine.close()


def judge(tree: MachineTree) -> None:
    """Examine, and look at each form of the result."""
    diagnosis = pyvfio.doctor(NIC, kernel=tree.machine)
    assert len(diagnosis) > 3
    assert doctor.as_document(diagnosis)["bdf"] == NIC
    assert all(text.isprintable() for text in diagnosis.text(everything=True).split("\n"))
    done = subprocess.run(["sh", "-n"], input=diagnosis.script().encode(), capture_output=True, check=False)
    assert done.returncode == 0, diagnosis.script()
    assert "reboot)" not in "".join(line for line in diagnosis.script().split("\n") if not line.startswith("#"))
    for error in (VfioError("x"), pyvfio.UnavailableError("y"), pyvfio.DeviceNotFoundError("z")):
        error.bdf = NIC
        assert isinstance(error.explain(kernel=tree.machine), tuple)


class Refusing(FakeKernel):
    """A kernel that refuses each call of one kind, with one errno."""

    def refuse(self, number: int) -> None:
        """Every open."""
        self.number = number

    def open(self, path: str, flags: int) -> int:
        """Refuse."""
        del flags
        raise OSError(self.number, "refused", path)


@settings(max_examples=20)
@given(number=st.sampled_from(sorted(errno.errorcode)))
def test_any_errno_of_a_node_is_a_finding(number: int) -> None:
    """With what the kernel said."""
    with Refusing() as kernel:
        kernel.refuse(number)
        diagnosis = pyvfio.doctor("0000:00:02.0", kernel=kernel)
    assert not diagnosis.ok
