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

from tests.mutants import addresses, blocks, fake, fake_iommufd, guarding, library, listeners, windows, witnesses
from tests.mutants.checkout import borrowed, copies, first_failure, rewritten
from tests.mutants.mutant import Mutant, Suite

FAKES: tuple[Suite, ...] = (fake.SUITE, fake_iommufd.SUITE)
LIBRARY = (library.SUITE, listeners.SUITE, guarding.SUITE, addresses.SUITE, windows.SUITE, blocks.SUITE)


def first_witness(checkout: Path, suite: Suite, mutant: Mutant, rounds: Sequence[Sequence[str]]) -> str | None:
    """Return the first test that fails under a mutant, in a copy of the checkout, or None when all pass."""
    path, mutated = mutant.apply(checkout / suite.folder)
    with rewritten(path, mutated):
        witnesses = (first_failure(checkout, arguments) for arguments in rounds)
        return next((witness for witness in witnesses if witness is not None), None)


def run(suite: Suite, mutants: Sequence[Mutant], *, jobs: int, file: Path = witnesses.FILE) -> dict[Mutant, str | None]:
    """Print and return the test that notices each mutant, or None.

    The test that `file` names for a mutant goes first, and then all tests of the mutant. Exits where a test fails
    without any mistake.
    """
    found: dict[Mutant, str | None] = {}
    with copies(jobs) as queue, ThreadPoolExecutor(jobs) as pool:

        def check_pristine(arguments: Sequence[str]) -> None:
            with borrowed(queue) as pristine:
                witness = first_failure(pristine, arguments)
            if witness is not None:
                sys.exit(f"mutants: {witness} fails without any mistake: repair that first, or no mutant can be judged")

        def judge(mutant: Mutant, rounds: Sequence[Sequence[str]]) -> tuple[Mutant, str | None]:
            with borrowed(queue) as checkout:
                return mutant, first_witness(checkout, suite, mutant, rounds)

        def note(mutant: Mutant, witness: str | None) -> None:
            print(f"{'caught ' if witness else 'MISSED '} {mutant.what}\n        {witness or ''}", flush=True)
            found[mutant] = witness

        with borrowed(queue) as checkout:
            known = witnesses.known(mutants, checkout, file)
        if known:
            check_pristine([*dict.fromkeys(known.values())])
        for mutant, witness in pool.map(lambda each: judge(each, [[known[each]]]), known):
            if witness == known[mutant]:
                note(mutant, witness)
        left = [mutant for mutant in mutants if mutant not in found]
        list(pool.map(check_pristine, {tuple(suite.rounds(mutant)[-1]) for mutant in left}))
        for mutant, witness in pool.map(lambda each: judge(each, suite.rounds(each)), left):
            note(mutant, witness)
    return found


def main() -> int:
    """0 when each mutant is caught."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__, allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="so many at once; default: %(default)s")
    parser.add_argument("--only", default="", metavar="WORD", help="those that have this in their line")
    parser.add_argument("--library", action="store_true", help="mistakes in the library, in place of the fake's")
    parser.add_argument("--record", action="store_true", help="write down the test that notices each, for later runs")
    options = parser.parse_args()
    suites = LIBRARY if options.library else FAKES
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # the copies go in any case
    found: dict[str, str | None] = {}
    for suite in suites:
        chosen = [mutant for mutant in suite.mutants if options.only in mutant.what]
        judged = run(suite, chosen, jobs=max(options.jobs, 1)) if chosen else {}
        found |= {mutant.what: witness for mutant, witness in judged.items()}
    caught = {what: witness for what, witness in found.items() if witness is not None}
    if options.record:
        listed = {mutant.what for suite in (*FAKES, *LIBRARY) for mutant in suite.mutants}
        earlier = {what: test for what, test in witnesses.read().items() if what in listed}
        witnesses.write(earlier | caught)
    print(f"{len(caught)} of {len(found)} mutants are caught")
    return 0 if found and len(caught) == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
