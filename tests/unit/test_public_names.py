"""The names that pyvfio hands on: type checkers and the running program see the same, and none costs before its use."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import pyvfio

ROOT = Path(__file__).resolve().parents[2]
NAMES: list[str] = vars(pyvfio)["__all__"]
MODULES = {"ioctls", "iommufd_ioctls", "pci", "testing"}
SCRIPT = ROOT / "tests/unit/user_script.py"
PATH = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def run(program: str) -> str:
    """The output of a program in a process of its own, which has imported nothing yet."""
    done = subprocess.run([sys.executable, "-c", program], env=PATH, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_for_type_checkers() -> dict[str, str]:
    """The module of each name that is imported under TYPE_CHECKING."""
    tree = ast.parse(Path(pyvfio.__file__).read_text(encoding="utf-8"))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(branch.body)
    assert all(alias.name == alias.asname for node in imports for alias in node.names), "not handed on without `as`"
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_type_checkers_see_the_names_that_a_program_gets() -> None:
    """Each from the same module, and no other."""
    seen = imported_for_type_checkers()
    assert {name for name, module in seen.items() if module == "pyvfio"} == MODULES
    assert set(seen) - MODULES == set(NAMES)
    for name in NAMES:
        assert getattr(pyvfio, name) is getattr(import_module(seen[name]), name), name


@pytest.mark.long
def test_the_modules_are_there_after_a_bare_import() -> None:
    """And hand on what the pages name; help() and completion show them."""
    run("import pyvfio; pyvfio.testing.FakePciDevice; pyvfio.pci.read_device; pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX")
    assert set(dir(pyvfio)) >= {*NAMES, *MODULES}
    assert set(dir(pyvfio.testing)) >= {"DmaFault", "FakeEdu", "FakeKernel", "FakePciDevice"}


@pytest.mark.parametrize("module", ["pyvfio", "pyvfio.testing"])
def test_a_name_that_is_not_there_is_an_attribute_error(module: str) -> None:
    """As for every module, with the name."""
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'RamBlok'"):
        import_module(module).RamBlok  # noqa: B018


@pytest.mark.long
def test_a_name_imports_its_module_and_no_other() -> None:
    """Nor does importing the package import one."""
    loaded = "import sys, pyvfio; {}; print(*sorted(name for name in sys.modules if name.startswith('pyvfio')))"
    assert run(loaded.format("pass")).split() == ["pyvfio"]
    assert run(loaded.format("pyvfio.MIB")) == run(loaded.format("import pyvfio.units"))
    assert run(loaded.format("pyvfio.pci")) == run(loaded.format("import pyvfio.pci"))


def rows() -> list[tuple[str, str]]:
    """The two columns of the table of docs/at-a-glance.md."""
    page = (ROOT / "docs/at-a-glance.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (.*?) \| (.*) \|$", page.partition("## Rules")[0], re.MULTILINE)
    assert table[0] == ("you want", "you write")
    return table[2:]


def names(tree: ast.AST) -> Iterator[str]:
    """The attributes that a program uses, and the keywords of its calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call):
            yield from (f"{keyword.arg}=" for keyword in node.keywords)


def written(column: str) -> set[str]:
    """The attributes and keywords in the code of a row's second column; no ioctl's own name is left out."""
    found: set[str] = set()
    for code in re.findall(r"`([^`]+)`", column):
        program = code.replace("…", "...")
        if program.endswith("="):
            found.add(program)
        elif re.fullmatch(r"\(.*\)|\w+|\w+\(\w+(, \w+)*\)", program) is None:
            found |= set(names(ast.parse(f"{program} pass" if program.endswith(":") else program)))
    return found


def test_the_script_for_type_checkers_has_every_row_of_the_table() -> None:
    """A function for each row, which makes each call of the row's second column."""
    functions = [
        node for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
    ]
    of_rows = {ast.get_docstring(function): set(names(function)) for function in functions}
    assert [row for row in of_rows if row in dict(rows())] == [wanted for wanted, _ in rows()]
    for wanted, column in rows():
        assert written(column) <= of_rows[wanted], wanted


def test_the_rows_name_something() -> None:
    """In each a call, an attribute or a module."""
    assert all(written(column) for _, column in rows())
    assert written("`blocks.add(…, prealloc=4)`, by `f`, with `irq.fds` and `container=`") == {
        *("add", "prealloc=", "fds", "container="),
    }
