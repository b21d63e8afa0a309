"""Mistakes put in, one at a time: somebody has to notice each. `scripts/mutants` runs this.

A mutant is a file, a piece of it that is there once, and what stands there instead. Those of the fake kernel the
contract has to notice; those of the library (`--library`) tests/unit/test_failures.py, where each call is made to fail,
and those in hand-overs, the dirty log and the like the tests of these. They run on a copy of the checkout, without
devices; a mutant under which all pass is a sentence that is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

from tests.mutants import fake, library, listeners
from tests.mutants.mutant import ROOT, Mutant, Suite

_TIMEOUT = 1500  # a lock that is kept: each run takes at most five minutes where the machine is slow


def is_caught(checkout: Path, suite: Suite, mutant: Mutant) -> str | None:
    """The first test that fails under a mutant, in a copy of the checkout; None when all pass."""
    path = checkout / suite.folder / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.apply(original), encoding="utf-8")
    try:
        witnesses = (_fails(checkout, arguments) for arguments in suite.rounds(mutant))
        return next((witness for witness in witnesses if witness is not None), None)
    finally:
        path.write_text(original, encoding="utf-8")


def _fails(checkout: Path, arguments: Sequence[str]) -> str | None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=no", *arguments]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"not over in {_TIMEOUT} seconds"
    if done.returncode == 0:
        return None
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failures[0].split(" ", 1)[1].split(" - ")[0] if failures else f"pytest ended with {done.returncode}"


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """So many copies of what the tests need."""
    queue: SimpleQueue[Path] = SimpleQueue()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 (a directory of one's own in it)
    with tempfile.TemporaryDirectory(prefix="pyvfio-mutants-", dir=memory) as directory:
        for number in range(count):
            copy = Path(directory) / str(number)
            for name in ("pyvfio", "tests", "examples"):
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy(ROOT / "pyproject.toml", copy)
            queue.put(copy)
        yield queue


def run(suite: Suite, mutants: Sequence[Mutant], *, jobs: int) -> list[Mutant]:
    """Print who notices each mutant; those that nobody does. Exits where somebody notices when there is nothing."""
    with copies(jobs) as queue, ThreadPoolExecutor(jobs) as pool:

        def find_fault(arguments: Sequence[str]) -> str | None:
            pristine = queue.get()
            try:
                return _fails(pristine, arguments)
            finally:
                queue.put(pristine)

        for witness in pool.map(find_fault, {tuple(suite.rounds(mutant)[-1]) for mutant in mutants}):
            if witness is not None:
                sys.exit(f"mutants: without any mistake, {witness} fails: nothing can be said of mutants")

        def judge(mutant: Mutant) -> tuple[Mutant, str | None]:
            checkout = queue.get()
            try:
                return mutant, is_caught(checkout, suite, mutant)
            finally:
                queue.put(checkout)

        survivors = []
        for mutant, witness in pool.map(judge, mutants):
            print(f"{'caught ' if witness else 'MISSED '} {mutant.what}\n        {witness or ''}", flush=True)
            if witness is None:
                survivors.append(mutant)
    return survivors


def main() -> int:
    """0 when each mutant is caught."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__, allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="so many at once; default: %(default)s")
    parser.add_argument("--only", default="", metavar="WORD", help="those that have this in their line")
    parser.add_argument("--library", action="store_true", help="mistakes in the library, in place of the fake's")
    options = parser.parse_args()
    suites = (library.SUITE, listeners.SUITE) if options.library else (fake.SUITE,)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # the copies go in any case
    count, missed = 0, 0
    for suite in suites:
        chosen = [mutant for mutant in suite.mutants if options.only in mutant.what]
        count += len(chosen)
        missed += len(run(suite, chosen, jobs=max(options.jobs, 1))) if chosen else 0
    print(f"{count - missed} of {count} mutants are caught")
    return 1 if missed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
