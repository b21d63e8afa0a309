"""The examples in docstrings run as they stand, on the fake kernel, and can be pasted into an interpreter."""

from __future__ import annotations

import ast
import doctest
import inspect
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

import pyvfio
from pyvfio.testing import FakeKernel
from tests.unit.processes import open_fds

PACKAGE = Path(pyvfio.__file__).parent

FIRST = (
    *("open_device", "Device", "Region", "Register", "Irq", "ConfigSpace", "Capabilities"),
    *("RamBlockList", "RamBlockList.add", "RamBlock", "RamBlock.resize", "RamBlock.view"),
    *("DmaMapper", "DmaMapper.iova", "DmaMapper.plan", "DmaMapper.segments", "Policy", "Container"),
    *("DmaMapper.map_dma", "DmaMapper.map_buffer", "DmaMapper.map_temporary"),
    *("DirtyTracking", "DirtyLog", "hand_over", "take_over", "testing.FakeKernel"),
)
"""The names that users meet first: each has an example."""


CLOSED = (
    *(pyvfio.Device, pyvfio.Container, pyvfio.Ioas, pyvfio.Iommufd),
    *(pyvfio.RamBlockList, pyvfio.DmaMapper, pyvfio.HandOver, pyvfio.TakenOver),
)
"""What an example leaves open is closed."""


def documented(node: ast.AST, outer: str = "") -> Iterator[str]:
    """Yield the name of each class, method and function with an example."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            name = f"{outer}.{child.name}".strip(".")
            if ">>>" in (ast.get_docstring(child) or ""):
                yield name
            yield from documented(child, name)


def examples() -> Iterator[str]:
    """Yield the module and the name of everything in the package that has an example."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        yield from (f"{module}:{name}" for name in documented(ast.parse(path.read_text(encoding="utf-8"))))


def close_all(names: dict[str, object]) -> None:
    """Close everything that an example has left open, the newest object first."""
    for made in reversed(list(names.values())):
        if isinstance(made, FakeKernel):
            made.check()
            made.shutdown()
        elif isinstance(made, CLOSED):
            made.close()


@pytest.mark.parametrize("place", list(examples()))
def test_an_example_runs_as_it_stands(place: str) -> None:
    """In an empty namespace, with the output that it shows; and what it opens can be closed."""
    module, name = place.split(":")
    docstring = inspect.getdoc(attrgetter(name)(import_module(module)))
    assert docstring is not None
    names: dict[str, object] = {}
    before = open_fds()
    example = doctest.DocTestParser().get_doctest(docstring, names, place, None, 0)
    first = [each.source.split()[:2] for each in example.examples[:2]]
    assert ["import", "pyvfio"] in first or ["from", "pyvfio"] in first, "it can be pasted"
    said: list[str] = []
    try:
        failed = doctest.DocTestRunner().run(example, out=said.append, clear_globs=False).failed
    finally:
        close_all(example.globs)
    assert not failed, "".join(said)
    example.globs.clear()
    assert open_fds() == before


@pytest.mark.parametrize("name", FIRST)
def test_the_names_that_users_meet_first_have_an_example(name: str) -> None:
    """`help()` shows it."""
    docstring = inspect.getdoc(attrgetter(name)(pyvfio))
    assert docstring is not None
    assert "\nExample:\n    >>> " in docstring
