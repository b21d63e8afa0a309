"""Each class keeps to itself: private attributes of others are counted, and their number has a limit."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tools.count import count, modules, per_thousand, reaches

LIMIT = 1.0
"""So many private attributes of others may be used in 1,000 lines of the package without testing/ and cli/."""


@pytest.mark.long
def test_private_attributes_of_others_are_rare() -> None:
    """A class whose state others need gets a public method for them."""
    counts = count()
    places = [
        f"pyvfio/{path}:{node.lineno} {ast.unparse(node)}"
        for path, source, counted in modules()
        if counted
        for node in reaches(ast.parse(source))
    ]
    assert len(places) == counts.reaches
    assert per_thousand(counts.reaches, counts.lines) <= LIMIT, "\n".join(places)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("block._memory.drop()", ["block._memory"]),
        ("self.block._memory", ["self.block._memory"]),
        ("import errors\nerrors._HINTS", ["errors._HINTS"]),
        ("self._memory, cls._made, super().__init__, block.memory", []),
        ("class A:\n    def __eq__(self, other):\n        return self._x == other._x", []),
        ("def _undo(): ...\ntaking._undo()", []),
    ],
)
def test_a_private_attribute_of_another_is_seen(source: str, found: list[str]) -> None:
    """An attribute is a module's own where the module uses it on `self` or defines a function of that name."""
    assert [ast.unparse(node) for node in reaches(ast.parse(source))] == found


def test_testing_and_the_commands_count_for_the_words_alone(tmp_path: Path) -> None:
    """Their lines do not."""
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "list.py").write_text('"""What it is: whatever its name says."""\nblock._memory\n')
    (tmp_path / "block.py").write_text('def add():\n    """A block."""\n    block._memory\n')
    assert count(tmp_path) == (3, 1, 9, 2, 2)
