"""Mistakes put in, one at a time: a test has to notice each. `scripts/mutants` runs this.

A mutant is the name of a function, class or constant, a text that occurs in it once, and the text in its place. The
contract has to notice the mutants of the fake kernel. tests/unit/test_failures.py, where each call is made to fail, has
to notice those of the library (`--library`), and the tests of hand-overs, of the dirty log and the like those of these
parts. The tests run on a copy of the checkout, without devices. A mutant under which all pass is a sentence that is
missing.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants import addresses, blocks, fake, fake_iommufd, guarding, library, listeners, windows
from tests.mutants.checkout import borrowed, copies, first_failure, rewritten
from tests.mutants.mutant import Mutant, Suite


def is_caught(checkout: Path, suite: Suite, mutant: Mutant) -> str | None:
    """Return the first test that fails under a mutant, in a copy of the checkout, or None when all pass."""
    path, mutated = mutant.apply(checkout / suite.folder)
    with rewritten(path, mutated):
        witnesses = (first_failure(checkout, arguments) for arguments in suite.rounds(mutant))
        return next((witness for witness in witnesses if witness is not None), None)


def run(suite: Suite, mutants: Sequence[Mutant], *, jobs: int) -> list[Mutant]:
    """Print the test that notices each mutant, and return the mutants that none notices.

    Exits where a test fails without any mistake.
    """
    with copies(jobs) as queue, ThreadPoolExecutor(jobs) as pool:

        def find_fault(arguments: Sequence[str]) -> str | None:
            with borrowed(queue) as pristine:
                return first_failure(pristine, arguments)

        for witness in pool.map(find_fault, {tuple(suite.rounds(mutant)[-1]) for mutant in mutants}):
            if witness is not None:
                sys.exit(f"mutants: {witness} fails without any mistake: repair that first, or no mutant can be judged")

        def judge(mutant: Mutant) -> tuple[Mutant, str | None]:
            with borrowed(queue) as checkout:
                return mutant, is_caught(checkout, suite, mutant)

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
    suites: tuple[Suite, ...] = (fake.SUITE, fake_iommufd.SUITE)
    if options.library:
        suites = (library.SUITE, listeners.SUITE, guarding.SUITE, addresses.SUITE, windows.SUITE, blocks.SUITE)
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
