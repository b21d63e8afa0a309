"""The example of a level-triggered loop, examples/intx.py, on the fake kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import intx
import pyvfio
from pyvfio.testing import FakeEdu, FakeKernel
from tests.unit.fakes import BDF, nothing_left

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/intx.py"


@pytest.mark.long
def test_the_program_runs_without_any_device() -> None:
    """And says that each cause was met by an interrupt."""
    command = [sys.executable, str(EXAMPLE), "--fake", "--json", "--rounds", "20"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"ok": True, "rounds": 20, "signals": 40, "causes": 40, "left": 0}


def test_a_cause_that_is_not_dealt_with_brings_the_interrupt_again() -> None:
    """The line stays up, so that each unmask is another signal; nothing is left at the end."""
    with (
        FakeKernel(groups=[(2, [FakeEdu(BDF)])]) as kernel,
        nothing_left(kernel),
        pyvfio.open_device(BDF, kernel=kernel) as device,
        intx.Line(device) as line,
    ):
        line.raise_causes(0b11)
        assert [line.wait(60), line.handle_one()] == [1, 0b01]
        assert [line.wait(60), line.handle_one()] == [1, 0b10]
        assert [line.wait(0.05), line.handle_one()] == [0, 0]


def test_an_interrupt_too_few_or_too_many_is_no_success() -> None:
    """Whatever else was right."""
    assert intx.Report(rounds=2, signals=4, causes=4).ok
    assert not intx.Report(rounds=2, signals=3, causes=4).ok
    assert not intx.Report(rounds=2, signals=4, causes=3).ok
    assert not intx.Report(rounds=2, signals=4, causes=4, left=1).ok
