"""The test that noticed each listed mutant in an earlier run. That test runs first: most mutants then take a second.

`witnesses.txt` has a line for each mutant: the mutant, a tab, and the test. A line that is wrong or missing costs time
and decides nothing: where the test is gone, or passes under the mutant, all tests of the mutant run.
`scripts/mutants --library --record` writes the file.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.mutants.mutant import Mutant

FILE = Path(__file__).with_name("witnesses.txt")


def read(file: Path = FILE) -> dict[str, str]:
    """Return the test for each mutant, by `Mutant.what`."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return dict(line.split("\t") for line in lines if line.count("\t") == 1)


def write(witnesses: Mapping[str, str], file: Path = FILE) -> None:
    """Write the test for each mutant, sorted by mutant. Names that are no names of tests are left out."""
    lines = [
        f"{what}\t{test}\n" for what, test in sorted(witnesses.items()) if "::" in test and "\t" not in what + test
    ]
    file.write_text("".join(lines), encoding="utf-8")


def known(mutants: Iterable[Mutant], checkout: Path, file: Path = FILE) -> dict[Mutant, str]:
    """Return the tests of `mutants` that the file names and pytest finds in the checkout."""
    named = read(file)
    found = {mutant: named[mutant.what] for mutant in mutants if mutant.what in named}
    files = sorted({test.split("::")[0] for test in found.values()})
    if not files:
        return {}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    there = set(done.stdout.splitlines())
    return {mutant: test for mutant, test in found.items() if test in there}
