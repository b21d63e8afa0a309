"""The names of changed files choose tests, and git names the changed files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.mutants.mutant import ROOT
from tests.stages import changed_files
from tools.choice import EVERYWHERE, chosen_tests, witnesses_of
from tools.count import modules


def test_each_module_has_tests_before_those_of_all_modules() -> None:
    """At least one file that is named after the module or the package."""
    for path, _source, counted in modules():
        if counted and path.name != "__init__.py":
            tests = chosen_tests(str(path))
            assert tests[0] not in EVERYWHERE, path
            assert all((ROOT / test).exists() for test in tests)
    assert chosen_tests("device/irq.py")[0] == "tests/unit/test_irq.py"
    assert chosen_tests("device/region.py")[0] == "tests/unit/test_device.py"


@pytest.mark.parametrize(
    ("changed", "chosen"),
    [
        ("pyvfio/iommu/buckets.py", "test_buckets.py"),
        ("pyvfio/cli/plan.py", "test_cli_plan.py"),
        ("pyvfio/testing/fake/kernel.py", "test_fake.py"),
        ("tools/bench.py", "test_cli_bench.py"),
        ("tools/choice.py", "test_choice.py"),
        ("examples/intx.py", "test_example_intx.py"),
        ("tests/stages.py", "test_stages.py"),
        ("tests/unit/test_dma.py", "test_dma.py"),
    ],
)
def test_a_changed_file_chooses_the_tests_of_its_name(changed: str, chosen: str) -> None:
    """Of the package, of the tools, of the examples and of the tests."""
    assert f"tests/unit/{chosen}" in witnesses_of([changed])


@pytest.mark.parametrize(
    "changed", ["README.md", "docs/costs.md", "pyvfio/py.typed", "tests/unit/test_gone.py", "tests/hw/test_dma.py"]
)
def test_a_page_a_file_that_is_gone_and_a_test_on_devices_choose_none(changed: str) -> None:
    """A device is for the later stages."""
    assert witnesses_of([changed]) == []


def test_a_command_does_not_choose_the_tests_of_the_other_commands() -> None:
    """They have hardly any code in common."""
    assert "tests/unit/test_cli_bind.py" not in witnesses_of(["pyvfio/cli/plan.py"])


def test_tests_of_several_files_are_named_once_and_those_of_all_modules_not_at_all() -> None:
    """The later stages run these."""
    both = witnesses_of(["pyvfio/dma.py", "pyvfio/mapper/window.py"])
    assert len(set(both)) == len(both)
    assert not set(both) & set(EVERYWHERE)


def test_changed_files_are_those_that_differ_from_the_last_commit(tmp_path: Path) -> None:
    """Staged, not staged, and new; not what git ignores. None outside of a repository."""

    def git(*words: str) -> None:
        identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    names = ("same", "changed", "staged")
    for name in names:
        (tmp_path / name).write_text("1")
    (tmp_path / ".gitignore").write_text("ignored\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    for name in ("changed", "staged", "new", "ignored"):
        (tmp_path / name).write_text("2")
    git("add", "staged")
    assert sorted(changed_files(tmp_path)) == ["changed", "new", "staged"]


def test_without_a_repository_nothing_has_changed(tmp_path: Path) -> None:
    assert changed_files(tmp_path) == []
