"""`scripts/bench` without a machine: what it prints, what it refuses, and what it makes of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvfio.device import open_device
from pyvfio.testing import FakeKernel
from pyvfio.units import MIB
from tools import bench, register_cost, resize_cost
from tools.bench import Row, judge, judge_registers
from tools.register_cost import RegisterCost
from tools.resize_cost import Cost

SOURCE = Path(bench.__file__).with_name("bare_resize.c")
COSTS = {"remap": (900.0, 60_000.0), "extend": (200.0, 205.0), "granule": (201.0, 203.0)}


def rows(**changed: tuple[float, float]) -> list[Row]:
    """At 2 and 512 MiB; the bare calls take 150 µs in each."""
    return [
        Row(policy, size, Cost(resize=cost, prefault=100.0), Cost(resize=150.0, prefault=100.0))
        for policy, costs in {**COSTS, **changed}.items()
        for size, cost in zip((2 * MIB, 512 * MIB), costs, strict=True)
    ]


def failing(memory: str = "anonymous", **changed: tuple[float, float]) -> list[str]:
    """What does not hold."""
    return [verdict.what for verdict in judge(rows(**changed), memory=memory) if not verdict.ok]


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


@pytest.mark.parametrize(
    ("cost", "failing"),
    [
        (RegisterCost(400, 500, 800, 900, 4000), [False, False]),
        (RegisterCost(400, 500, 801, 900, 9000), [True, False]),
        (RegisterCost(400, 500, 800, 901, 9000), [True, False]),
        (RegisterCost(400, 500, 800, 900, 3999), [False, True]),
    ],
)
def test_a_register_is_judged_beside_an_item_and_read32(cost: RegisterCost, failing: list[bool]) -> None:
    """Loads and stores; each limit by itself."""
    assert [not verdict.ok for verdict in judge_registers(cost)] == failing


def test_registers_of_the_fake_can_be_measured_too() -> None:
    """Which shows that the statements run; the figures say nothing."""
    with FakeKernel() as kernel, open_device(kernel.bdfs[0], kernel=kernel) as device:
        assert all(nanoseconds > 0 for nanoseconds in register_cost.measure(device, 4))


@pytest.mark.parametrize("memory", ["memfd", "hugetlb", "file"])
def test_memory_of_every_kind_is_held_to_the_same_limit(memory: str) -> None:
    """But not to be cheaper than a remap by so much: filling the pages with zeros is part of both."""
    assert failing(memory, remap=(900.0, 30_000.0)) == []
    assert failing(memory, extend=(231.0, 231.0)) == ["extend: pyvfio adds at most 80 µs to the system calls"]


@pytest.mark.parametrize("memory", ["anonymous", "memfd", "file"])
def test_it_measures_memory_of_the_kind_that_is_asked_for(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And says which, to persons and to programs."""
    given = ["--fake", "--sizes", "2", "--repeat", "1", "--memory", memory]
    assert bench.main([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] == memory
    assert bench.main(given) == 0
    assert f"memory: {memory}" in capsys.readouterr().out


def test_several_kinds_of_memory_are_measured_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    """Each at the lengths that are given with it, or at those that are given for all."""
    given = ["--fake", "--sizes", "4", "--repeat", "1", "--memory", "anonymous=2,8", "--memory", "memfd"]
    assert bench.main([*given, "--json"]) == 0
    found = [
        (one["memory"], {row["size"] // MIB for row in one["rows"]}) for one in json.loads(capsys.readouterr().out)
    ]
    assert found == [("anonymous", {2, 8}), ("memfd", {4})]
    assert bench.main(given) == 0
    printed = capsys.readouterr().out
    assert printed.index("memory: anonymous") < printed.index("memory: memfd")


@pytest.mark.parametrize("memory", ["ram", "memfd=", "memfd=3", "=2"])
def test_a_kind_of_memory_that_there_is_not_is_wrong_usage(memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Or a length of it that cannot be."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--fake", "--memory", memory])
    assert ended.value.code == 2
    assert "--memory" in capsys.readouterr().err


def test_huge_pages_are_not_measured_on_the_fake(capsys: pytest.CaptureFixture[str]) -> None:
    """It would take them from this machine's pool."""
    with pytest.raises(SystemExit) as ended:
        bench.main(["--fake", "--memory", "hugetlb"])
    assert ended.value.code == 2
    assert "hugetlb" in capsys.readouterr().err


# The calls that bare_resize.c makes: to grow, and to shrink again.
FILE_GROWS = ["fallocate", "mprotect", "madvise", "VFIO_IOMMU_MAP_DMA"]
SHRINKS = ["VFIO_IOMMU_UNMAP_DMA", "mmap", "madvise", "madvise"]
BARE = {
    "anonymous": (FILE_GROWS[1:], SHRINKS),
    "memfd": (FILE_GROWS, [*SHRINKS, "ftruncate"]),
    "file": (FILE_GROWS, [*SHRINKS, "fallocate"]),
}


@pytest.mark.parametrize("policy", ["extend", "granule"])
@pytest.mark.parametrize("memory", list(BARE))
def test_a_resize_makes_the_calls_of_the_program_in_c_and_no_others(memory: str, policy: str) -> None:
    """So that what it takes beyond them is this package's own."""
    with FakeKernel() as kernel, open_device(kernel.bdfs[0], kernel=kernel) as device:
        resize_cost.measure(device.container, policy, memory=memory, size=4 * MIB, repeat=1)
        made = [call.request or call.call for call in kernel.trace]
    grows, shrinks = BARE[memory]
    once = "".join(f" {name}" for name in [*grows, *shrinks])
    assert 2 * once in "".join(f" {name}" for name in made)  # the first time is not counted


@pytest.mark.parametrize(
    ("memory", "setting", "former", "value"),
    [
        ("memfd", "transparent_hugepage/shmem_enabled", "always within_size [never] deny", "always"),
        ("file", "transparent_hugepage/shmem_enabled", "always within_size [never] deny", "always"),
        ("hugetlb", "hugepages/hugepages-2048kB/nr_hugepages", "1\n", "5"),
    ],
)
def test_the_machine_has_large_pages_while_it_is_measured(
    tmp_path: Path, memory: str, setting: str, former: str, value: str
) -> None:
    """And what it had before, afterwards."""
    path = tmp_path / setting
    path.parent.mkdir(parents=True)
    path.write_text(former)
    with resize_cost.large_pages(memory, size=10 * MIB, settings=tmp_path):
        assert path.read_text() == value
    assert path.read_text() == ("1" if memory == "hugetlb" else "never")


def test_a_machine_that_gives_no_large_pages_is_an_error(tmp_path: Path) -> None:
    """The figures would say nothing."""
    (tmp_path / "hugepages" / "hugepages-2048kB").mkdir(parents=True)
    (tmp_path / "hugepages" / "hugepages-2048kB" / "nr_hugepages").symlink_to("/dev/null")
    with (
        pytest.raises(OSError, match="no 10 MiB"),
        resize_cost.large_pages("hugetlb", size=10 * MIB, settings=tmp_path),
    ):
        pass


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
    command = [sys.executable, "-m", "tools.bench", "--fake", "--sizes", "2", "--repeat", "1"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"remap" in done.stdout
