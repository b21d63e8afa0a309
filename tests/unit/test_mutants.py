"""The lists of `scripts/mutants` fit the sources as they are; that each is caught is for the script to show."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.mutants import addresses, blocks, fake, fake_iommufd, guarding, library, listeners, windows, witnesses
from tests.mutants.__main__ import FAKES, LIBRARY, run
from tests.mutants.mutant import ROOT, Mutant, Suite

OPERATIONS = (
    *("open", "add", "grow", "shrink", "discard", "populate", "replace pages"),
    *("remove", "temporary map", "close"),
)


def dump(definition: str, after: str) -> str:
    """The definition, at whichever depth it stands, without its layout and comments. Something follows, as in `after`:
    the last line has to end, and the depth to be the same again."""
    depth = definition[: len(definition) - len(definition.lstrip(" "))]
    blank = after[: len(after) - len(after.lstrip("\n"))]
    return ast.dump(ast.parse(f"{'if True:' if depth else ''}\n{definition}{blank}{depth}pass\n"))


@cache
def lines(path: Path) -> list[str]:
    """Of a file."""
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


@pytest.mark.parametrize(
    ("suite", "mutant"),
    [(suite, mutant) for suite in (*FAKES, *LIBRARY) for mutant in suite.mutants],
    ids=lambda given: given.what[:60] if isinstance(given, Mutant) else "",
)
def test_each_mutant_changes_one_place_and_is_still_python(suite: Suite, mutant: Mutant) -> None:
    """And is another program than the one it was made of; what stands outside of the definition is as it was."""
    path, mutated = mutant.apply(ROOT / suite.folder)
    _path, first, end = mutant.find(ROOT / suite.folder)
    before, after = "".join(lines(path)[:first]), "".join(lines(path)[end:])
    assert mutated.startswith(before)
    assert mutated.endswith(after)
    definition = mutated[len(before) : len(mutated) - len(after)]
    assert dump(definition, after) != dump("".join(lines(path)[first:end]), after)


def test_there_are_enough_of_them() -> None:
    """Of each kind."""
    assert len(fake.SUITE.mutants) >= 25
    assert len(fake_iommufd.SUITE.mutants) >= 25
    assert len(library.SUITE.mutants) >= 20
    assert len(listeners.SUITE.mutants) >= 15
    assert len(guarding.SUITE.mutants) >= 20
    assert len(addresses.SUITE.mutants) >= 15
    assert len(windows.SUITE.mutants) >= 24
    assert len(blocks.SUITE.mutants) >= 14


def test_each_operation_has_a_mistake_of_its_own() -> None:
    """And there is no operation beside those."""
    assert {mutant.operation for mutant in library.SUITE.mutants} == set(OPERATIONS)


def test_each_part_that_listens_or_hands_over_has_a_mistake_of_its_own() -> None:
    """And tests that there are have to notice it."""
    parts = {mutant.operation: listeners.SUITE.rounds(mutant) for mutant in listeners.SUITE.mutants}
    assert set(parts) == {
        *("whole block", "dirty log", "dirty pages", "pages replaced", "held memory", "interrupts"),
        *("hot reset", "region of another device", "hand-over", "nodes of devices", "hand-over of an Ioas"),
    }
    assert all((ROOT / arguments[0]).is_file() for rounds in parts.values() for arguments in rounds)


def test_each_rule_of_the_guard_has_a_mistake_of_its_own() -> None:
    """And tests that there are have to notice it."""
    rules = {mutant.operation: guarding.SUITE.rounds(mutant) for mutant in guarding.SUITE.mutants}
    assert set(rules) == {"forks", "finalizers", "signals", "locks"}
    assert all((ROOT / arguments[0]).is_file() for rounds in rules.values() for arguments in rounds)


def test_a_mutant_finds_its_function_in_whichever_file_it_stands(tmp_path: Path) -> None:
    """The same text in another function stays."""
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms" / "list.py").write_text(
        "class List:\n    def add(self):\n        go()\n\n    @held\n    def close(self):\n        go()\n"
    )
    path, mutated = Mutant("List.close", "        go()\n", "        stop()\n").apply(tmp_path)
    assert path == tmp_path / "rooms" / "list.py"
    assert mutated.splitlines()[2::4] == ["        go()", "        stop()"]


@pytest.mark.parametrize("text", ["b = 1", "a = 'a'", "def b(a): return 1", "def f():\n    a = 1"])
def test_a_list_that_is_out_of_date_says_so(text: str, tmp_path: Path) -> None:
    """In place of a mistake that nobody made."""
    (tmp_path / "module.py").write_text(text)
    with pytest.raises(ValueError, match="out of date"):
        Mutant("a", "a", "b").apply(tmp_path)


# ------------------------------------------------------------------------------------------------------ known witnesses

UNITS = "tests/unit/test_units.py"
NOTICED = f"{UNITS}::test_other_numbers_are_no_powers_of_two[0]"
NAMED = {
    Mutant("is_power_of_two", "number > 0", "number >= 0"): NOTICED,
    Mutant("is_power_of_two", "number > 0 and ", ""): f"{UNITS}::test_units_are_powers_of_1024",  # passes
    Mutant("is_power_of_two", "number > 0", "True"): f"{UNITS}::test_that_is_gone",
}


def test_witnesses_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Sorted; what is no name of a test is left out, as are lines that are wrong. Without the file there are none."""
    file = tmp_path / "witnesses.txt"
    assert witnesses.read(file) == {}
    witnesses.write({"b": "t.py::b[1 2]", "a": "t.py::a", "c": "not over in 3 seconds"}, file)
    assert file.read_text() == "a\tt.py::a\nb\tt.py::b[1 2]\n"
    file.write_text(file.read_text() + "no tab\n")
    assert witnesses.read(file) == {"a": "t.py::a", "b": "t.py::b[1 2]"}


def test_a_known_witness_decides_only_where_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise all tests of the mutant run, after it."""
    file = tmp_path / "witnesses.txt"
    witnesses.write({mutant.what: test for mutant, test in NAMED.items()}, file)
    suite = Suite(Path("pyvfio"), tuple(NAMED), lambda _mutant: [[UNITS, "-k", "powers_of_two"]])
    assert run(suite, suite.mutants, jobs=1, file=file) == dict.fromkeys(NAMED, NOTICED)
    assert capsys.readouterr().out.count("caught") == len(NAMED)


def test_the_file_names_tests_of_listed_mutants() -> None:
    """A mutant that was renamed or removed leaves no line."""
    assert set(witnesses.read()) <= {mutant.what for suite in (*FAKES, *LIBRARY) for mutant in suite.mutants}
