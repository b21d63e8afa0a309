"""The sampler of random mutants makes the mistakes that it names, and a test that notices one is its witness."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest

from tools.count import modules
from tools.mutants import main, witness_of
from tools.mutations import Mutation, mutations, sample


def changes(source: str) -> list[tuple[str, str]]:
    """The kind of each mistake in a source, and what the mistake puts there."""
    return [(mutation.kind, mutation.new) for mutation in mutations("m.py", textwrap.dedent(source))]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a < b", [("comparison", "(a <= b)"), ("comparison", "(a >= b)")]),
        ("x = a is None", [("comparison", "(a is not None)")]),
        ("x = not a", [("removed not", "(a)")]),
        ("x = a or b", [("operator", "(a and b)")]),
        ("x = a + b", [("operator", "(a - b)")]),
        ("x = 7", [("constant", "(8)")]),
        ("x = True", [("constant", "(False)")]),
        ("if a: pass", [("negated condition", "(not a)")]),
        ("go(a, b)", [("swapped arguments", "(go(b, a))")]),
        ("go(iova=a, vaddr=b)", [("swapped arguments", "(go(iova=b, vaddr=a))")]),
        ("def f():\n    return a", [("return value", "return None")]),
        ("def f():\n    go()", [("removed statement", "pass")]),
        ("def f(self):\n    self.a = b", [("removed statement", "pass")]),
        ("def f():\n    raise", [("removed statement", "pass")]),
        ("def f():\n    a = b", []),
        ("go(a, a)", []),
        ("x = max(a, b)", []),
        ('def f():\n    """A docstring."""\n    logger.debug(a, b)', []),
        ("x = f'{a + 1}'", []),
        ("x: Literal[1]", []),
        ("def __repr__(self):\n    return go(a, b)", []),
        ("if TYPE_CHECKING:\n    x = 1", []),
    ],
)
def test_each_kind_of_mistake_is_made(source: str, expected: list[tuple[str, str]]) -> None:
    """Docstrings, logging, messages, reprs and annotations have none."""
    assert changes(source) == expected


def test_a_mistake_changes_its_place_alone() -> None:
    """Also behind letters of more than one byte, and over several lines."""
    source = 'x = "é" if (a\n    < b) else "é"  # why\ny = 1\n'
    first, *_, last = mutations("m.py", source)
    assert first.apply(source) == 'x = "é" if ((a <= b)) else "é"  # why\ny = 1\n'
    assert last.apply(source) == source.replace("y = 1", "y = (2)")
    assert str(last) == "m.py:3 (constant): 1  ->  (2)"


def test_a_mistake_in_the_package_is_still_python_and_another_program() -> None:
    """For a sample of them."""
    sources = {str(path): source for path, source, counted in modules() if counted}
    chosen = sample(sources, 60, seed=1)
    assert len(set(chosen)) == 60
    for mutation in chosen:
        before = sources[mutation.module]
        assert ast.dump(ast.parse(mutation.apply(before))) != ast.dump(ast.parse(before)), mutation


def test_a_seed_gives_one_sample() -> None:
    """Another seed another one; a sample is no longer than the list of all."""
    sources = {"a.py": "x = 1 + 2 - 3", "b.py": "y = 4 < 5"}
    assert sample(sources, 4, seed=1) == sample(sources, 4, seed=1) != sample(sources, 4, seed=2)
    assert len(sample(sources, 100, seed=1)) == 9


def test_a_test_that_notices_is_the_witness(tmp_path: Path) -> None:
    """A mistake that none notices has no witness, one that hangs is noticed, and the source is as before."""
    module = tmp_path / "pyvfio" / "half.py"
    module.parent.mkdir()
    source = "def half(n):\n    n = n if n > 0 else 0\n    return n // 2\n"
    module.write_text(source)
    tests = tmp_path / "test_half.py"
    tests.write_text("from pyvfio.half import half\n\n\ndef test_half():\n    assert half(8) == 4\n")

    def witness(new: str, old: str = "n // 2", timeout: float = 60) -> str | None:
        start = source.index(old)
        mutation = Mutation("half.py", 3, "half", "", start, start + len(old), old, new)
        return witness_of(tmp_path, mutation, [tests.name], timeout)

    assert witness("n * 2") == "test_half.py::test_half"
    assert witness("n >= 0", "n > 0") is None
    assert witness("half(n)", timeout=0) == "not over in 0 seconds"
    assert module.read_text() == source


def test_a_list_of_the_sample_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """And a module that is not there is said so."""
    assert main(["--random=3", "--seed=1", "--module=mapper/", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("mapper/") for line in lines)
    assert main(["--random=3", "--module=nowhere"]) == 1
