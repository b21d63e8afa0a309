"""Builds the site of docs/: `python -m tools.site [FOLDER]`, build/site by default. A warning is an error.

docs/conf.py takes from here the reference of public names, and the markup of docstrings. A docstring is written for
`help()`: names stand between single backticks, an indented paragraph is code, and a paragraph can begin with one of
`SECTIONS`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs"
BUILT = ROOT / "build/site"
MODULES = ("pyvfio", "pyvfio.pci", "pyvfio.testing")
SECTIONS = ("Args", "Raises", "Synchronization", "Cost", "Source", "Example", "Units")

FOREIGN = [
    (r"py:.*", r"(?!pyvfio\.)[\w.~]+"),  # the standard library's, and short names in annotations
    (r"py:.*", r"pyvfio\.\w+\.[\w.]+"),  # names of modules that are not public
]
"""Names that a signature mentions and no page describes."""

HEADERS = {"pyvfio.ioctls": "linux/vfio.h", "pyvfio.iommufd_ioctls": "linux/iommufd.h"}
"""The headers of the kernel, by the module with the C names."""
REFERENCE: dict[str, tuple[str, ...]] = {
    "devices": ("pyvfio.device", "pyvfio.container", "pyvfio.ioas", "pyvfio.iommufd", "pyvfio.info"),
    "memory": ("pyvfio.ramblock", "pyvfio.blocks", "pyvfio.memory", "pyvfio.extents"),
    "mapping": ("pyvfio.dma", "pyvfio.mapper", "pyvfio.iommu"),
    "dirty": ("pyvfio.dirty", "pyvfio.live_update"),
    "errors": ("pyvfio.errors",),
}
"""The public names of `pyvfio` on a page of docs/reference, by the modules that define them. `other` has the rest."""


def group_of(home: str) -> str:
    """Return the page of the reference for the names that the module `home` defines."""
    for group, modules in REFERENCE.items():
        if any(home == module or home.startswith(f"{module}.") for module in modules):
            return group
    return "other"


def _home(module: ModuleType, name: str) -> str:
    # Numbers and type aliases do not know their module; the table of `pyvfio` does.
    homes: dict[str, str] = getattr(module, "_HOMES", {})
    return f"pyvfio.{homes[name]}" if name in homes else str(getattr(module, name).__module__)


def names_of(module_name: str, group: str = "") -> Iterator[str]:
    """Yield the public names of a module, those of one page of the reference where `group` names a page."""
    module = import_module(module_name)
    for name in module.__all__:
        if not group or group_of(_home(module, name)) == group:
            yield name


# ---------------------------------------------------------------------------------------------------- docstrings


def _markup(line: str) -> str:
    # reST takes a star and a final underscore for markup, Markdown and `help()` do not.
    parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
    plain = (re.sub(r"(\*|\||_(?=\W|$))", r"\\\1", part) for part in parts[::2])
    code = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(text + (code[at] if at < len(code) else "") for at, text in enumerate(plain))


def _paragraph(lines: Sequence[str]) -> Iterator[str]:
    if lines[0].startswith(" "):
        yield from ("::", "", *(f"    {line}" for line in lines), "")
        return
    for at, line in enumerate(lines):
        bullet = line.startswith("* ")
        if bullet and at and not lines[at - 1].startswith(("* ", "  ")):
            yield ""
        text = f"* {_markup(line[2:])}" if bullet else _markup(line)
        yield re.sub(rf"^({'|'.join(SECTIONS)}):", r"**\1:**", text) if not at else text
    yield ""


def _as_blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in lines:
        if line.strip():
            if block and line.startswith(tuple(f"{section}:" for section in SECTIONS)):
                yield block
                block = []
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def to_rest(lines: Sequence[str]) -> list[str]:
    """Return a docstring in the markup of Sphinx."""
    found: list[str] = []
    for block in _as_blocks(lines):
        found += _paragraph(block)
    return found


def _process_docstring(*event: object) -> None:
    lines = cast(list[str], event[-1])
    lines[:] = to_rest(lines)


# ----------------------------------------------------------------------------------------------------- reference


def _described_elsewhere(kind: type) -> str:
    """Return the names of ancestors whose members the description of `kind` leaves out: public or foreign ones."""
    names = [(import_module(module), name) for module in MODULES for name in names_of(module)]
    public = [getattr(module, name) for module, name in names]
    above = [each for each in kind.__mro__[1:] if each in public or not each.__module__.startswith("pyvfio.")]
    return ",".join(each.__name__ for each in above)


def _describe(module: str, name: str) -> Iterator[str]:
    thing = getattr(import_module(module), name)
    if inspect.isclass(thing):
        kind = "autoexception" if issubclass(thing, BaseException) else "autoclass"
        yield from (
            f".. {kind}:: {module}.{name}",
            "   :members:",
            f"   :inherited-members: {_described_elsewhere(thing)}",
        )
        if thing.__bases__ != (object,):
            yield "   :show-inheritance:"
        yield ""
    elif inspect.isroutine(thing):
        yield from (f".. autofunction:: {module}.{name}", "")
    else:
        yield from (f".. autodata:: {module}.{name}", "")


def _constants(module: ModuleType, names: Iterable[str]) -> Iterator[str]:
    """Yield a table of numbers and texts, which have no docstrings."""
    yield from (".. list-table::", "   :widths: auto", "")
    for name in names:
        value = getattr(module, name)
        shown = f"{value:#x}" if isinstance(value, int) and value > 255 else repr(value)
        yield from (f"   * - ``{name}``", f"     - ``{shown}``")
    yield ""


def _is_constant(thing: object) -> bool:
    return type(thing) in {int, str}


def _header(module: ModuleType) -> Iterator[str]:
    """Yield the reference of a header of the kernel: functions, flags and indexes, structures, and numbers."""
    own = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == module.__name__]
    classes = [thing for thing in own if inspect.isclass(thing) and not thing.__name__.startswith("_")]
    functions = [thing.__name__ for thing in own if inspect.isfunction(thing) and not thing.__name__.startswith("_")]
    header = HEADERS[module.__name__]
    for what, names, options in (
        ("Functions", functions, ()),
        ("Flags and indexes", [each.__name__ for each in classes if issubclass(each, Enum)], (":undoc-members:",)),
        ("Structures", [each.__name__ for each in classes if not issubclass(each, Enum)], (":undoc-members:",)),
    ):
        if not names:
            continue
        title = f"{what} of {header}"  # a page of another header has the same parts, and no two parts have one name
        yield from (title, "-" * len(title), "")
        kind = "autofunction" if what == "Functions" else "autoclass"
        for name in names:
            yield f".. {kind}:: {module.__name__}.{name}"
            yield from (f"   {option}" for option in ((":members:", *options) if kind == "autoclass" else ()))
            yield ""
    constants = [name for name, value in vars(module).items() if name.isupper() and _is_constant(value)]
    title = f"Numbers and texts of {header}"
    yield from (title, "-" * len(title), "", *_constants(module, constants))


def reference(module: str, group: str = "") -> Iterator[str]:
    """Yield the reference of a module's public names, functions first, in the markup of Sphinx."""
    found = import_module(module)
    if module in HEADERS:
        yield from _header(found)
        return
    names = sorted(names_of(module, group), key=lambda name: not inspect.isroutine(getattr(found, name)))
    constants = [name for name in names if _is_constant(getattr(found, name))]
    for name in names:
        if name not in constants:
            yield from _describe(module, name)
    if constants:
        yield from _constants(found, constants)


class PublicNames(Directive):
    """`public MODULE [GROUP]`: the reference of a module's public names, made from docstrings."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the described names."""
        lines = list(reference(*self.arguments))
        node = nodes.section()
        node.document = self.state.document
        # The pages are Markdown; docstrings and what Sphinx makes of them are reST.
        lines = ["``````{eval-rst}", *lines, "``````"]
        self.state.nested_parse(StringList(lines, f"<{self.arguments[0]}>"), 0, node)
        return node.children


def setup(app: Sphinx) -> None:
    """Extend Sphinx by the directive `public` and by the markup of docstrings."""
    app.add_directive("public", PublicNames)
    app.connect("autodoc-process-docstring", _process_docstring)


# --------------------------------------------------------------------------------------------------------- build


def command(target: Path) -> list[str]:
    """Return the command that builds all pages into `target`."""
    options = ("-q", "-W", "--keep-going", "-n", "-E", "-j", "1", "-d", str(target / ".doctrees"))
    return [sys.executable, "-m", "sphinx", "-b", "html", *options, str(PAGES), str(target)]


def main() -> int:
    """Build the site. Return 0 when no warning was given."""
    parser = argparse.ArgumentParser(prog="site", description="Build the site of docs/.", allow_abbrev=False)
    parser.add_argument("target", nargs="?", type=Path, default=BUILT, help="the folder to build into (build/site)")
    done = subprocess.run(command(parser.parse_args().target), cwd=ROOT, check=False)  # noqa: S603 (Python's own)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
