"""The tests for a change: the names of the changed files choose them.

No list of what a test reaches is kept. A test file is chosen if its name has the name of a changed module or of the
module's package. `_TESTS` names the others. The choice is a guess: the tests of the whole project decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.mutants.mutant import ROOT

# Tests whose names do not show the modules that they cover.
_TESTS = {
    "__main__": ("cli_main", "cli_plan"),
    "blocks": ("ramblock", "discards", "remap", "memory", "safety_net", "cgroup", "prefault", "dirty_log"),
    "ramblock": ("memory", "discards", "remap", "safety_net", "listener_models", "prefault"),
    "mapper": ("pieces", "dma", "changes", "plan", "holders"),
    "dma": ("pieces", "plan", "remap"),
    "iommu": ("iova", "space", "container", "dma", "errors", "moving"),
    "container": ("device", "dma", "holders", "live_update"),
    "device": ("container", "dirty", "noiommu"),
    "diagnosis": ("doctor", "doctor_boot_loaders", "doctor_command", "doctor_garbage"),
    "dirty": ("dirty_log",),
    "findings": ("doctor", "doctor_command"),
    "info": ("caps", "container", "device"),
    "memory": ("kinds", "prefault", "locking", "cgroup", "ramblock"),
    "pci": ("cli_admin", "cli_bind", "nodes", "errors", "device", "doctor"),
    "handle": ("container", "device"),
    "kernel": ("fake", "memory", "locking"),
    "errors": ("container", "device", "pci"),
    "extent_set": ("discards", "block_index"),
    "extents": ("discards", "pieces"),
    "fields": ("abi",),
    "guard": ("forks", "collections", "interruptions"),
    "ioctls": ("abi", "container", "device"),
    "ioas": ("address_spaces", "moving"),
    "iommufd": ("iommufd",),
    "iommufd_ioctls": ("abi",),
    "page_tables": ("dirty", "cdev"),
    "testing": ("fake", "fake_notices", "fake_edu"),
    "units": ("arguments",),
}
EVERYWHERE = ("tests/unit/test_failures.py", "tests/property")
"""These cover every operation of a mapper and its blocks."""


def chosen_tests(module: str, root: Path = ROOT) -> list[str]:
    """Return the test files for a mistake in `module`, such as "mapper/window.py", the most likely witness first."""
    path = Path(module)
    package = path.parts[0].removesuffix(".py")
    names = [path.stem, *([] if package == "cli" else [package])]  # each command has tests of its own
    units = {file.stem.removeprefix("test_"): file for file in sorted(root.glob("tests/unit/test_*.py"))}
    wanted = [unit for name in names for unit in units if name in (unit, *unit.split("_"))]
    wanted += [unit for unit in _TESTS.get(package, ()) if unit in units]
    found = [str(units[unit].relative_to(root)) for unit in dict.fromkeys(wanted)]
    return list(dict.fromkeys([*found, *(test for test in EVERYWHERE if (root / test).exists())]))


def witnesses_of(files: Iterable[str], root: Path = ROOT) -> list[str]:
    """Return the test files for changes of `files`, which are paths from `root`. Tests of devices are left out."""
    found = dict.fromkeys(test for file in files for test in _named_after(Path(file), root))
    return [test for test in found if test not in EVERYWHERE]


def _named_after(file: Path, root: Path) -> Iterator[str]:
    if file.suffix != ".py":
        return
    match file.parts:
        case "pyvfio", *_:
            yield from chosen_tests(str(file.relative_to("pyvfio")), root)
        case "tests", "unit" | "property", name if name.startswith("test_") and (root / file).exists():
            yield str(file)
        case "tools" | "examples" | "tests", name:
            unit = name.removesuffix(".py")
            likely = (root / f"tests/unit/test_{prefix}{unit}.py" for prefix in ("", "cli_", "example_"))
            yield from (str(path.relative_to(root)) for path in likely if path.exists())
