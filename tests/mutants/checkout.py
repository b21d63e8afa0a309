"""Copies of the checkout in which mistakes are made, and the first test that fails there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutant import ROOT

TIMEOUT = 1500  # a lock that is kept: a run takes five minutes at most where the machine is slow
"""Seconds that a run of pytest may take by default. A mistake may keep a lock for ever."""


def first_failure(checkout: Path, arguments: Sequence[str], *, timeout: float = TIMEOUT) -> str | None:
    """Run pytest in a copy until a test fails, and return that test, or None when all pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", *arguments]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"not over in {timeout:.0f} seconds"
    if done.returncode == 0:
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0].split(" ", 1)[1].split(" - ")[0] if failures else f"pytest ended with {done.returncode}"


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """Yield a queue of `count` copies of the files that the tests need; the copies are removed at the end."""
    queue: SimpleQueue[Path] = SimpleQueue()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 (a directory of one's own in it)
    with tempfile.TemporaryDirectory(prefix="pyvfio-mutants-", dir=memory) as directory:
        for number in range(count):
            copy = Path(directory) / str(number)
            for name in ("pyvfio", "tests", "tools", "examples", "docs", "scripts"):
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            for page in (ROOT / "pyproject.toml", *ROOT.glob("*.md")):
                shutil.copy(page, copy)
            queue.put(copy)
        yield queue


@contextmanager
def borrowed(queue: SimpleQueue[Path]) -> Iterator[Path]:
    """Yield a copy that no other thread uses meanwhile."""
    checkout = queue.get()
    try:
        yield checkout
    finally:
        queue.put(checkout)


@contextmanager
def rewritten(path: Path, source: str) -> Iterator[None]:
    """Let `path` hold `source` for the length of the block."""
    original = path.read_text(encoding="utf-8")
    path.write_text(source, encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(original, encoding="utf-8")
