"""`scripts/bench` without a machine: what it prints, what it refuses, and what it makes of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvfio.cli import bench
from pyvfio.cli.bench import Row, judge
from pyvfio.cli.resize_cost import Cost
from pyvfio.units import MIB

SOURCE = Path(bench.__file__).with_name("bare_resize.c")
COSTS = {"remap": (900.0, 60_000.0), "extend": (200.0, 205.0), "granule": (201.0, 203.0)}


def rows(**changed: tuple[float, float]) -> list[Row]:
    """At 2 and 512 MiB; the bare calls take 150 µs in each."""
    return [
        Row(policy, size, Cost(resize=cost, prefault=100.0), Cost(resize=150.0, prefault=100.0))
        for policy, costs in {**COSTS, **changed}.items()
        for size, cost in zip((2 * MIB, 512 * MIB), costs, strict=True)
    ]


def failing(**changed: tuple[float, float]) -> list[str]:
    """What does not hold."""
    return [verdict.what for verdict in judge(rows(**changed)) if not verdict.ok]


def test_on_the_fake_it_prints_a_row_for_each_policy_and_length(capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON, and nothing of the calls that a fake does not make."""
    assert bench.main(["--fake", "--json", "--sizes", "2,4", "--repeat", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["world"], answer["step"]) == ("fake", 2 * MIB)
    found = [(row["policy"], row["size"]) for row in answer["rows"]]
    assert found == [(policy, size * MIB) for policy in ("remap", "extend", "granule") for size in (2, 4)]
    assert all(row["system_calls_us"] is None for row in answer["rows"])


def test_a_table_says_that_a_fake_says_nothing_of_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """So that nobody quotes it."""
    assert bench.main(["--fake", "--sizes", "2", "--repeat", "1"]) == 0
    assert "say nothing of a kernel" in capsys.readouterr().out


@pytest.mark.parametrize("sizes", ["x", "3", "0", "", "-2", "1" + 40 * "0"])
def test_lengths_that_cannot_be_are_wrong_usage(sizes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the word that is wrong."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--fake", f"--sizes={sizes}"])
    assert ended.value.code == 2
    assert "--sizes" in capsys.readouterr().err


def test_what_must_hold_is_judged_by_the_rows() -> None:
    """Flat, two hundred times cheaper, and little added; each by itself."""
    assert failing() == []
    assert failing(granule=(201.0, 260.0)) == [
        "granule: the same at every length within 5%",
        "granule: pyvfio adds at most 80 µs to the system calls",
    ]
    assert failing(remap=(900.0, 30_000.0)) == [
        f"{policy}: 200 times cheaper than remap at 512 MiB" for policy in ("extend", "granule")
    ]


def test_the_program_in_c_is_compiled_without_a_warning(tmp_path: Path) -> None:
    """On the compiler of this machine."""
    done = subprocess.run(
        ["gcc", "-Wall", "-Wextra", "-Werror", "-O2", "-o", tmp_path / "bare", SOURCE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_terminal_that_has_not_all_letters_shows_others() -> None:
    """A µ is none of ASCII; the command goes on."""
    command = [sys.executable, "-m", "pyvfio.cli.bench", "--fake", "--sizes", "2", "--repeat", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"remap" in done.stdout
