"""A judge runs the tests that reach a mistake, in one process, and says what came of it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tools.judge import Change, JudgeError, Verdict, judged
from tools.replace_code import changed_lines, find_replacement, live_functions, put_in

SOURCE = '''\
"""A package."""

from functools import wraps

FACTOR = 2


def checked(call):
    @wraps(call)
    def wrapper(number):
        if number is None:
            return None
        return call(number)

    return wrapper


@checked
def half(number):
    number = number if number > 0 else 0
    return number // FACTOR


class Row:
    length = 3

    @property
    def doubled(self):
        return [2 * place for place in range(self.length)]

    @doubled.setter
    def doubled(self, value):
        self.length = len(value)


def unused(number):
    return number + 1
'''
TESTS = """\
from pyvfio.small import Row, half


def test_half():
    assert half(8) == 4


def test_none():
    assert half(None) is None


def test_row():
    row = Row()
    row.doubled = [1, 2]
    assert row.doubled == [0, 2]
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one module, and its tests."""
    (tmp_path / "pyvfio").mkdir()
    (tmp_path / "pyvfio" / "__init__.py").touch()
    (tmp_path / "pyvfio" / "small.py").write_text(SOURCE)
    (tmp_path / "test_small.py").write_text(TESTS)
    return tmp_path


def judge(checkout: Path, *replaced: tuple[str, str], limit: float = 60, patience: float = 30) -> list[Verdict]:
    """The verdicts on mistakes that put one text in the place of another, in their order."""
    changes = [Change("pyvfio/small.py", SOURCE.replace(old, new)) for old, new in replaced]
    # The project's own plugin would import the package of this checkout.
    tests = ("-p", "no:pyvfio", "test_small.py")
    return sorted(judged(changes, tests, checkout=checkout, jobs=2, limit=limit, patience=patience))


@pytest.mark.judge
def test_each_mistake_has_its_verdict(checkout: Path) -> None:
    """Also in what a decorator has made, in a property, and if the process ends or a line is gone."""
    verdicts = judge(
        checkout,
        ("number // FACTOR", "number * FACTOR"),
        ("return call(number)", "return call(number) + 1"),
        ("2 * place", "3 * place"),
        ("len(value)", "1 + len(value)"),
        ("        if number is None:\n            return None\n", ""),
        ("number // FACTOR", '__import__("os")._exit(3)'),
        ("number > 0", "number >= 0"),
        ("number + 1", "number - 1"),
        ("FACTOR = 2", "FACTOR = 3"),
        ("    length = 3", "    length = 4"),
    )
    assert [(verdict.kind, verdict.witness.removeprefix("test_small.py::test_")) for verdict in verdicts] == [
        ("caught", "half"),
        ("caught", "half"),
        ("caught", "row"),
        ("caught", "row"),
        ("caught", "none"),
        ("caught", "ends the process with 3"),
        ("survived", ""),
        ("unreached", ""),
        ("imported", ""),
        ("imported", ""),
    ]
    assert (checkout / "pyvfio" / "small.py").read_text() == SOURCE


@pytest.mark.judge
def test_a_test_that_fails_without_any_mistake_judges_none(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And is named; the others judge. A module that cannot be imported is the end."""
    tests = checkout / "test_small.py"
    tests.write_text(f"{TESTS}\n\ndef test_other():\n    assert half(8) == 5\n")
    (verdict,) = judge(checkout, ("number > 0", "number < 0"))
    assert (verdict.kind, verdict.witness, verdict.tests) == ("caught", "test_small.py::test_half", 1)
    assert "test_small.py::test_other fails without any mistake" in capfd.readouterr().err
    tests.write_text("import nothing_of_that_name")
    with pytest.raises(JudgeError, match="ended with"):
        judge(checkout, ("number > 0", "number < 0"))
    assert "nothing_of_that_name" in capfd.readouterr().err


@pytest.mark.judge
def test_a_limit_leaves_the_longer_tests_out(checkout: Path) -> None:
    """The shortest runs in any case."""
    tests = checkout / "test_small.py"
    tests.write_text(f"import time\n\n{TESTS}\n\ndef test_long():\n    time.sleep(0.1)\n    assert half(6) == 3\n")
    counts = [judge(checkout, ("number > 0", "number >= 0"), limit=limit)[0].tests for limit in (60, 0.05, 0)]
    assert counts == [2, 1, 1]


@pytest.mark.judge
def test_a_mistake_that_hangs_is_caught(checkout: Path) -> None:
    """The judge waits for as long as it was told."""
    hangs = ("    number = number if number > 0 else 0\n", "    while number:\n        pass\n")
    (verdict,) = judge(checkout, hangs, patience=1.0)
    assert (verdict.kind, verdict.witness) == ("caught", "hangs")


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("FACTOR = 2", "FACTOR = 3", [5]),
        ("    @wraps(call)\n", "", [9]),
        ("        if number is None:\n            return None\n", "        go()\n", [11, 12]),
        ("    return number + 1\n", "", [37]),
        ("    return number + 1\n", "    return number + 1\n    go()\n", [37]),
    ],
)
def test_the_lines_of_a_mistake_are_those_that_are_not_in_the_other_source(
    old: str, new: str, lines: list[int]
) -> None:
    """Counted from 1."""
    assert list(changed_lines(SOURCE, SOURCE.replace(old, new, 1))) == lines


@pytest.mark.long
def test_a_function_with_other_variables_of_a_closure_cannot_be_replaced(tmp_path: Path) -> None:
    """It keeps its code."""
    before = textwrap.dedent(
        """\
        def outer():
            one = two = 1
            def inner():
                return one
            return inner
        """
    )
    file = tmp_path / "closures.py"
    file.write_text(before)
    names: dict[str, object] = {}
    exec(compile(before, str(file), "exec"), names)  # noqa: S102
    inner = names["outer"]()  # type: ignore[operator]
    live = live_functions(tmp_path)
    changed = find_replacement(str(file), before, before.replace("return one", "return one + two"), live)
    assert not put_in({key: code for key, code in changed.codes.items() if key[1].endswith("inner")}, live)
    assert inner() == 1
    assert put_in({key: code for key, code in changed.codes.items() if key[1] == "outer"}, live)
    assert names["outer"]()() == 2  # type: ignore[operator]
