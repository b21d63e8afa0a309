"""The programs in C that make the bare system calls: compile them, run them, and read their output."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pyvfio.testing.vm_errors import find_tool
from pyvfio.units import MIB
from tools.report import Cost

RESIZES = Path(__file__).with_name("bare_resize.c")
PATHS = Path(__file__).with_name("bare_calls.c")


def compile_all(directory: Path) -> None:
    """Compile both programs into `directory`. Raises MissingToolError without a C compiler; OSError."""
    compiler = find_tool("gcc", package="gcc")
    for source in (RESIZES, PATHS):
        _run([compiler, "-O2", "-Wall", "-o", str(directory / source.stem), str(source)], f"{source.name} not compiled")


def _run(command: Sequence[str], failed: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise OSError(f"{failed}: {done.stderr}")
    return done.stdout


def measure_resizes(
    directory: Path, node: Path, bdf: str, *, memory: str, sizes: Sequence[int], repeat: int
) -> dict[tuple[str, int], Cost]:
    """Return the cost of the system calls alone by policy and size. The device must not be open elsewhere.

    `node`: of the group, for type1, or of the device, for iommufd.
    """
    words = [str(node), bdf, str(repeat), memory, *(str(size // MIB) for size in sizes)]
    return dict(parse_resizes(_run([str(directory / RESIZES.stem), *words], "the bare resizes failed")))


def measure_paths(directory: Path, node: Path, bdf: str, *, repeat: int) -> dict[str, float]:
    """Return the microseconds of one operation by row. `node`: as for `measure_resizes`."""
    return parse_paths(_run([str(directory / PATHS.stem), str(node), bdf, str(repeat)], "the bare calls failed"))


def parse_resizes(text: str) -> Iterator[tuple[tuple[str, int], Cost]]:
    """Yield policy and size with the least cost, from the output of `bare_resize`."""
    samples: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for line in text.splitlines():
        size, policy, grow, prefault, shrink = line.split()
        samples.setdefault((policy, int(size) * MIB), []).append((int(grow), int(prefault), int(shrink)))
    for key, found in samples.items():
        yield key, least(found)


def least(samples: Iterable[tuple[int, int, int]]) -> Cost:
    """Return the least of grows, populations and shrinks, given in nanoseconds, each separately."""
    grows, prefaults, shrinks = zip(*samples, strict=True)
    return Cost(min(grows) / 1000, min(prefaults) / 1000, min(shrinks) / 1000)


def parse_paths(text: str) -> dict[str, float]:
    """Return the least microseconds by row, from the output of `bare_calls`."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, nanoseconds = line.split()
        found[name] = min(found.get(name, float("inf")), float(nanoseconds) / 1000)
    return found
