"""`scripts/test` runs each stage, kills one that hangs, and says where the time went."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import series, stages
from tests.stages import Outcome, Runner, Stage


def python(name: str, script: str, weight: int = 1) -> Stage:
    """A stage that runs a script."""
    return Stage(name, weight, (sys.executable, "-c", script))


def test_a_stage_fails_when_its_command_does_and_the_others_run(tmp_path: Path) -> None:
    """The last one runs when all others are over, and may read their output."""
    made = [python("good", "print(1)"), python("bad / worse", "print(2); raise SystemExit(3)", weight=2)]
    last = python(
        "last", f"import pathlib; assert pathlib.Path({str(tmp_path / made[1].file)!r}).read_text() == '2\\n'"
    )
    found = {outcome.stage.name: outcome.ok for outcome in stages.run(made, last, Runner(tmp_path))}
    assert found == {"good": True, "bad / worse": False, "last": True}
    assert list(found)[-1] == "last"


def test_a_stage_that_runs_alone_begins_when_the_others_have_ended(tmp_path: Path) -> None:
    """However heavy it is; and the last one begins after it."""
    trace = tmp_path / "trace"
    write = "import pathlib, time; file = pathlib.Path({!r}).open('a'); {}; file.write({!r})"
    script = {name: write.format(str(trace), "time.sleep(0.2)" if name == "a" else "1", name) for name in "abc"}
    made = [python("b", script["b"], weight=9)._replace(alone=True), python("a", script["a"])]
    outcomes = stages.run(made, python("c", script["c"]), Runner(tmp_path))
    assert (trace.read_text(), [outcome.stage.name for outcome in outcomes]) == ("abc", ["a", "b", "c"])


@pytest.mark.long
def test_the_processor_time_of_a_stage_includes_its_children(tmp_path: Path) -> None:
    """Those that it has waited for."""
    spin = "import time\nwhile time.process_time() < 0.3: pass"
    outcome = Runner(tmp_path).run(
        python("parent", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])")
    )
    assert outcome.cpu >= 0.3


def test_a_stage_that_prints_nothing_is_killed_and_the_output_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its children. How long a stage takes has no limit."""
    outcome = Runner(tmp_path, silence=0.2).run(
        python("silent", "import subprocess; subprocess.run(['sleep', '1000'])")
    )
    assert not outcome.ok
    assert "Nothing was printed for 0.2 seconds: the stage was killed." in capsys.readouterr().out


def test_the_table_has_a_line_for_each_stage_and_the_sums() -> None:
    """Seconds of wall time and of processor time."""
    outcomes = [Outcome(python("one", ""), True, 1.5, 2.25), Outcome(python("two", ""), False, 3, 0.5)]  # noqa: FBT003
    lines = [line.split() for line in stages.table(outcomes, 4.0)]
    assert lines[1:] == [
        ["passed", "1.5", "2.2", "one"],
        ["FAILED", "3.0", "0.5", "two"],
        ["4.0", "2.8", "all", "of", "them"],
    ]


def test_the_machines_have_each_kernel_that_the_page_promises() -> None:
    """And the contract runs on each, once."""
    assert {kernel for kernel, _iommu in stages.MATRIX} == set(series.KERNELS)
    contracts = [kernel for (kernel, _iommu), devices in stages.MATRIX.items() if devices == "contract"]
    assert sorted(contracts) == sorted(series.KERNELS)


def test_on_each_interpreter_each_unit_test_is_in_one_stage() -> None:
    """A file that one stage ignores is named by another."""
    commands = [stage.command for stage in stages.host_stages([sys.executable])]
    (unit,) = [words for words in commands if "tests/unit" in words]
    ignored = [word.removeprefix("--ignore=") for word in unit if word.startswith("--ignore=")]
    assert set(ignored) == {*stages.TOOLS, *stages.LINTERS, stages.FAILURES, stages.SITE, stages.MANY_THREADS}
    for name in ignored:
        assert sum(name in words for words in commands) == 1, name


def test_stages_keep_their_output_apart() -> None:
    """Each has a name of its own."""
    all_of_them = [*stages.host_stages([sys.executable]), *stages.machine_stages(sys.executable)]
    assert len({stage.file for stage in all_of_them}) == len(all_of_them)


def test_machines_with_packaged_kernels_leave_out_the_tests_of_iommufd() -> None:
    for stage in stages.machine_stages(sys.executable):
        if "--device" in stage.command and "+iommufd" not in stage.name:
            assert "not iommufd" in " ".join(stage.command)


def test_each_pair_of_the_random_calls_is_played_once_and_in_a_machine_of_the_matrix_where_there_is_one() -> None:
    """The tests of that machine run in the same boot."""
    players = [
        stage.command for stage in stages.machine_stages(sys.executable) if "tools.differential" in stage.command
    ]
    pairs = [(words[words.index("--kernel") + 1], words[words.index("--iommu") + 1]) for words in players]
    assert sorted(pairs) == sorted(stages.DIFFERENTIAL + stages.IOMMUFD_CALLS)
    with_tests = {pair for pair, words in zip(pairs, players, strict=True) if "tests/hw" in words}
    assert with_tests == set(stages.DIFFERENTIAL) & set(stages.MATRIX)
    for words in players:
        assert words[words.index("--ops") + 1] == str(stages.RANDOM_CALLS)


def test_only_the_quick_stages_take_smaller_samples_and_leave_tests_out() -> None:
    """A tenth of the points and steps wherever these tests run; pyright and the tests marked as long."""
    quick = [stage.command for stage in stages.quick_stages([sys.executable])]
    for words in quick:
        if any(word.startswith("tests/unit") for word in words) and not {*stages.LINTERS, stages.FAILURES} & set(words):
            assert set(stages.SAMPLES) <= set(words)
    assert sum("not pyright" in words for words in quick) == 1
    assert sum("not long" in words for words in quick) == len(quick) - 2  # the linters and the failing calls
    for stage in stages.host_stages([sys.executable]):
        assert not {"not pyright", "not long", f"--scenes={stages.SCENES}", *stages.SAMPLES} & set(stage.command)


def test_the_quick_stages_have_each_test_file_of_the_package_once() -> None:
    """The tests of the testing tools and of the site are for the full run."""
    files = [
        word
        for stage in stages.quick_stages([sys.executable])
        for word in stage.command
        if word.startswith("tests/unit/")
    ]
    there = {f"tests/unit/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert sorted(files) == sorted(there - {*stages.TOOLS, stages.SITE})


def test_both_halves_have_about_as_many_bytes(tmp_path: Path) -> None:
    """Each file is in one of them."""
    sizes = {"a": 50, "b": 30, "c": 25, "d": 5}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    one, other = stages.halves(list(sizes), tmp_path)
    assert sorted([*one, *other]) == list(sizes)
    assert {sum(sizes[name] for name in part) for part in (one, other)} == {55}


def test_a_quick_run_begins_with_the_tests_for_the_changed_files() -> None:
    """None where nothing has changed that a test is named after."""
    first = stages.first_stage(sys.executable, ["pyvfio/dma.py", "README.md"])
    assert first is not None
    assert "tests/unit/test_dma.py" in first.command
    assert stages.first_stage(sys.executable, ["README.md"]) is None
