"""Imports go downwards only, and importing pyvfio needs nothing of the machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pyvfio

PACKAGE = Path(pyvfio.__file__).parent
ROOF = "pyvfio"

FLOORS = {
    **dict.fromkeys(
        (
            *("fields", "ioctls", "iommufd_ioctls", "kernel", "errors", "units", "extents", "extent_set", "handle"),
            *("info", "guard", "findings", "unique", "arguments"),
        ),
        0,
    ),
    **dict.fromkeys(("memory", "pci", "iommu", "blocks", "picture", "recording"), 1),
    **dict.fromkeys(("container", "ioas", "iommufd", "noiommu", "page_tables", "ramblock", "mapper"), 2),
    **dict.fromkeys(("dma", "device"), 3),
    **dict.fromkeys(("live_update", "dirty", "diagnosis"), 4),
}
# What a module may not import though it is on the same floor.
APART = {
    ("ramblock", "container"),
    ("container", "ramblock"),
    ("mapper", "container"),
    ("dma", "device"),
    ("device", "dma"),
    ("memory", "blocks"),
    ("iommu", "blocks"),
    ("blocks", "iommu"),
}
# Of `testing`, what runs beside the house and may use all of it. The rest sees floors 0 and 1.
ROOFED = {"testing.plugin"}


def modules(root: Path = PACKAGE) -> dict[str, Path]:
    """Every module by its name below pyvfio; the roof is `__init__`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = path
    return found


@cache
def _import_nodes(source: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))


def imports(source: str, name: str, known: set[str], *, is_package: bool = False) -> Iterator[str]:
    """The modules of pyvfio that `source`, the module `name`, imports, wherever in it the import stands."""
    package = f"pyvfio.{name}".split(".") if is_package else f"pyvfio.{name}".split(".")[:-1]
    for node in _import_nodes(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "pyvfio":
                    yield alias.name.removeprefix("pyvfio").removeprefix(".") or "__init__"
        else:
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] != "pyvfio":
                continue
            inside = base.removeprefix("pyvfio").removeprefix(".")
            for alias in node.names:
                deeper = f"{inside}.{alias.name}".removeprefix(".")
                yield deeper if deeper in known else inside or "__init__"


def floor(name: str) -> int | None:
    """0 to 4; None for the roof and the cellar."""
    return FLOORS.get(name.split(".", maxsplit=1)[0])


def allowed(importer: str, imported: str) -> bool:
    """Whether one module may import another."""
    home, target = importer.split(".", maxsplit=1)[0], imported.split(".", maxsplit=1)[0]
    if home == target and home != "__init__":
        return True
    if home in ("cli", "__main__"):
        return True
    if target == "cli" or (target == "testing" and home != "__init__"):
        return False
    if home == "testing":
        below = floor(imported)
        return importer in ROOFED or (below is not None and below <= 1)
    if home == "__init__":
        return True
    own, below = floor(importer), floor(imported)
    return own is not None and below is not None and below <= own and (home, target) not in APART


def breaches(sources: dict[str, str], packages: set[str]) -> list[str]:
    """Every import that goes upwards."""
    return [
        f"{name} imports {imported}"
        for name, source in sources.items()
        for imported in imports(source, name, set(sources), is_package=name in packages)
        if not allowed(name, imported)
    ]


SOURCES = {name: path.read_text(encoding="utf-8") for name, path in modules().items()}
PACKAGES = {name for name, path in modules().items() if path.name == "__init__.py" and name != "__init__"}


def test_every_module_has_its_place() -> None:
    """One that has none is not judged, so it must be given one here and in docs/architecture.md."""
    homes = {name.split(".")[0] for name in SOURCES} - {"__init__", "__main__", "cli", "testing"}
    assert homes == set(FLOORS)


@pytest.mark.long
def test_imports_go_downwards_only() -> None:
    """A breach is an arrow from a floor to one above it, or from the house into the cellar."""
    assert breaches(SOURCES, PACKAGES) == []


def test_one_import_goes_upwards_and_only_when_it_is_asked_for() -> None:
    """By name, so that the other tests do not see it: an error has the checks of the examination."""
    named = {
        (name, argument)
        for name, source in SOURCES.items()
        if floor(name) is not None
        for argument in re.findall(r"import_module\(\"(pyvfio[^\"]*)\"\)", source)
    }
    assert named == {("errors", "pyvfio.diagnosis")}


def test_no_two_modules_import_each_other() -> None:
    """Not on one floor either, in however many steps."""
    graph = {name: set(imports(source, name, set(SOURCES))) - {name} for name, source in SOURCES.items()}
    graph = {name: below for name, below in graph.items() if floor(name) is not None}
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if (graph[name] & graph.keys()) <= done}:
        done |= ready
    assert done == graph.keys()


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("units", "import pyvfio.memory"),
        ("units", "from pyvfio import errors, memory"),
        ("kernel", "import pyvfio"),
        ("memory", "from pyvfio import RamBlock"),
        ("errors", "def late():\n    from pyvfio.iommu.iova import IovaAllocator"),
        ("memory", "from pyvfio.ramblock import RamBlock"),
        ("memory", "from .. import container"),
        ("iommu.space", "from ..dma import DmaMapper"),
        ("ramblock", "from pyvfio.dma import DmaMapper"),
        ("ramblock", "from pyvfio.container import Container"),
        ("container", "import pyvfio.ramblock"),
        ("device", "if TYPE_CHECKING:\n    from pyvfio.dma import DmaMapper"),
        ("dma", "from pyvfio.testing import FakeKernel"),
        ("dma", "from pyvfio import cli"),
        ("dma", "import pyvfio"),
        ("__init__", "import pyvfio.cli.list"),
        ("testing", "from pyvfio.ramblock import RamBlock"),
        ("testing.fake.kernel", "from pyvfio.container import Container"),
        ("testing.fake.kernel", "from ...dma import DmaMapper"),
        ("testing.vm", "import pyvfio"),
        ("testing.vm", "from pyvfio.cli import common"),
    ],
)
def test_a_breach_is_found_wherever_it_hides(importer: str, source: str) -> None:
    """In a function, under TYPE_CHECKING, relative, or through the roof."""
    assert breaches({**dict.fromkeys(SOURCES, ""), importer: source}, PACKAGES), source


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("errors", "from pyvfio.units import IovaRange\nimport os\nfrom pathlib import Path"),
        ("container", "from pyvfio import ioctls"),
        ("device", "from pyvfio.container import Container"),
        ("testing.fake.kernel", "from pyvfio.kernel import LinuxKernel\nfrom . import tree"),
        ("cli.vm", "from pyvfio.testing import vm\nimport pyvfio\nfrom pyvfio.dma import DmaMapper"),
        ("__init__", "from pyvfio.dma import DmaMapper"),
    ],
)
def test_what_is_allowed_is_no_breach(importer: str, source: str) -> None:
    """Downwards, along a floor, and from the commands anywhere."""
    assert breaches({**dict.fromkeys(SOURCES, ""), importer: source}, PACKAGES) == []


@pytest.mark.long
def test_importing_needs_neither_root_nor_vfio_nor_libudev() -> None:
    """Without any capability and without shared libraries of others; nothing in /dev/vfio or /sys is looked at."""
    script = textwrap.dedent(
        """
        import ctypes, ctypes.util, struct, sys
        # capset(2): no capability is left, which is all that root is more than others.
        assert ctypes.CDLL(None).capset(struct.pack("=Ii", 0x20080522, 0), bytes(24)) == 0
        real = ctypes.CDLL.__init__
        def refuse(self, name, *args, **kwargs):
            if name is not None:
                raise OSError(f"{name} is not here")
            real(self, name, *args, **kwargs)
        ctypes.CDLL.__init__ = refuse
        ctypes.util.find_library = lambda name: None
        opened = []
        sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
        import pyvfio
        for name in pyvfio.__all__:
            getattr(pyvfio, name)
        assert not [path for path in opened if path.startswith(("/dev/vfio", "/sys/"))], opened
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("names", [("open_device", "Container"), ("DmaMapper", "RamBlockList"), ("pci", "ioctls")])
def test_a_program_that_opens_a_device_imports_no_more_than_it_needs(names: tuple[str, ...]) -> None:
    """Each module costs at every start: those here are for errors, commands, changes of drivers, numpy, live update."""
    unneeded = {"asyncio", "concurrent", "difflib", "json", "numpy", "platform"}
    unneeded |= {"pyudev", "socket", "statistics", "subprocess", "tempfile", "uuid"}
    unneeded |= {"pyvfio.cli", "pyvfio.dirty", "pyvfio.live_update", "pyvfio.pci.binding", "pyvfio.pci.events"}
    unneeded |= {"pyvfio.testing"}
    script = f"import pyvfio\nfor name in {names!r}: getattr(pyvfio, name)\nimport sys; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # -S: what the environment's own .pth files import is none of pyvfio's.
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], env=environment, capture_output=True, text=True, check=True, cwd="/"
    )
    assert "pyvfio.pci.groups" in done.stdout or "pyvfio.dma" in done.stdout
    assert unneeded & set(done.stdout.split()) == set()


def test_a_name_that_is_imported_later_is_there_all_the_same() -> None:
    """Whether it has been asked for or not, and no other name is."""
    assert {"bind", "monitor", *pyvfio.pci.__all__} <= set(dir(pyvfio.pci))
    assert all(hasattr(pyvfio.pci, name) for name in pyvfio.pci.__all__)
    assert not hasattr(pyvfio.pci, "unheard_of")


def assertions(tree: ast.AST, inside: str = "") -> Iterator[str]:
    """The functions of a module that have an assertion, each by its name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Assert):
            yield inside
        yield from assertions(node, node.name if isinstance(node, ast.FunctionDef) else inside)


@pytest.mark.long
def test_only_a_check_of_the_state_asserts() -> None:
    """`python -O` takes assertions away: nothing that a program depends on may be one."""
    found = {name for path in modules().values() for name in assertions(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == {"_check", "_check_state"}
