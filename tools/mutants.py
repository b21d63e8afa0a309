"""Random mistakes in the package, one at a time, and the test that notices each: `scripts/mutants --random N`.

A seed gives the same mistakes as long as the sources do not change. From Python 3.12 on, tools/judge.py tries each
mistake on the tests that reach it, in one process: a hundred mistakes a minute. What is left, and everything on Python
3.11, runs on copies of the checkout, where the name of the mistake's module chooses the tests: first the files of
tests/unit named after the module or its package, then those of `_TESTS`, then those that run for every module. A
mistake that no test has reached is tried on the rest of tests/unit. A survivor is printed as one line: either no test
covers the statement, or the mistake changes nothing.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.checkout import borrowed, copies, first_failure, rewritten
from tests.mutants.mutant import ROOT
from tools.choice import EVERYWHERE, chosen_tests
from tools.count import modules
from tools.judge import AVAILABLE, Change, JudgeError, Verdict, judged
from tools.mutations import Mutation, sample

# The steps of an undo would take minutes for each mistake.
_LEFT_OUT = ("-k", "not step_of_the_undo")
_SAMPLES = ("--points=200", "--thread-steps=2000")
# These read the checkout as text, or run the checkout elsewhere, and do not test its behaviour.
_NO_WITNESS = (
    *("linters", "language", "site", "series", "count", "stages", "setup", "vm", "cli_bench"),
    *("mutants", "random_mutants", "judge"),
)
_PATIENCE = 300.0
"""Seconds that a test file may take. A file that takes longer hangs, and the mistake is noticed."""
_LIMIT = 60.0
"""Seconds of tests that the judge runs for one mistake. A line that all tests reach would take minutes."""


def all_tests(root: Path = ROOT) -> list[str]:
    """Return the test files of tests/unit that may notice a mistake."""
    files = sorted(root.glob("tests/unit/test_*.py"))
    return [str(file.relative_to(root)) for file in files if file.stem.removeprefix("test_") not in _NO_WITNESS]


def witness_of(checkout: Path, mutation: Mutation, tests: Sequence[str], timeout: float) -> str | None:
    """Return the test that fails with one mistake in a copy of the checkout, or None if all pass."""
    path = checkout / "pyvfio" / mutation.module
    with rewritten(path, mutation.apply(path.read_text(encoding="utf-8"))):
        return first_failure(checkout, [*tests, *_LEFT_OUT], timeout=timeout)


def find_caught(mutations: Sequence[Mutation], *, jobs: int) -> Iterator[tuple[Mutation, Verdict]]:
    """Yield each mistake and the verdict of a judge, which runs all tests that reach the mistake, up to a limit."""
    changes = []
    for mutation in mutations:
        path = ROOT / "pyvfio" / mutation.module
        changes.append(Change(f"pyvfio/{mutation.module}", mutation.apply(path.read_text(encoding="utf-8"))))
    tests = [*all_tests(), "tests/property", *_LEFT_OUT, *_SAMPLES]
    for verdict in judged(changes, tests, checkout=ROOT, jobs=jobs, limit=_LIMIT):
        yield mutations[verdict.at], verdict


def run(mutations: Sequence[Mutation], *, jobs: int, in_process: bool = AVAILABLE) -> list[Mutation]:
    """Print the witness of each mistake, and return the mistakes without one.

    `in_process`: a judge goes first. Mistakes that it does not find caught run in processes of their own, with the
    tests that the name of the module chooses, and, if the judge has run none, with the rest too.
    """

    def show(mutation: Mutation, witness: str | None) -> None:
        print(f"{'caught  ' if witness else 'SURVIVED'} {mutation}\n         {witness or ''}", flush=True)

    left = dict.fromkeys(mutations, True)  # whether the judge has run no test
    for mutation, verdict in find_caught(mutations, jobs=jobs) if in_process else ():
        left[mutation] = not verdict.tests
        if verdict.kind == "caught":
            show(mutation, verdict.witness)
            del left[mutation]
    rest = all_tests()
    survivors = []
    with copies(jobs) as queue, ThreadPoolExecutor(jobs) as pool:

        def judge(mutation: Mutation) -> tuple[Mutation, str | None]:
            chosen = chosen_tests(mutation.module)
            if not left[mutation]:
                chosen = [test for test in chosen if test not in EVERYWHERE]  # the judge has run those
            for files in (chosen, [test for test in rest if test not in chosen] if left[mutation] else []):
                tests, patience = [*files, *_SAMPLES], _PATIENCE * len(files)
                with borrowed(queue) as checkout:
                    if files and (witness := witness_of(checkout, mutation, tests, patience)):
                        return mutation, witness
            return mutation, None

        for mutation, witness in pool.map(judge, list(left)):
            show(mutation, witness)
            if witness is None:
                survivors.append(mutation)
    return survivors


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 after the sample was judged, even if mistakes survived: a person must look at each survivor."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__, allow_abbrev=False)
    parser.add_argument("--random", type=int, required=True, metavar="N", help="the number of mistakes")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="default: a new one")  # noqa: S311
    parser.add_argument("--module", default="", metavar="M", help='prefix of the modules: "mapper", "dma.py"')
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at the same time; default: %(default)s")
    parser.add_argument("--list", action="store_true", help="print the sample and run nothing")
    options = parser.parse_args(arguments)
    sources = {str(path): source for path, source, counted in modules() if counted}
    mutations = sample({m: s for m, s in sources.items() if m.startswith(options.module)}, options.random, options.seed)
    if options.list or not mutations:
        print("\n".join(map(str, mutations)) or f"no module begins with {options.module}")
        return 0 if mutations else 1
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # removes the copies
    try:
        survivors = run(mutations, jobs=max(options.jobs, 1))
    except JudgeError as error:
        sys.exit(f"mutants: {error}")
    print_summary(mutations, survivors, options.seed)
    return 0


def print_summary(mutations: Sequence[Mutation], survivors: Sequence[Mutation], seed: int) -> None:
    """Print the survivors, a count for each kind, and the seed."""
    for survivor in survivors:
        print(f"survived: {survivor}")
    alive = Counter(survivor.kind for survivor in survivors)
    for kind, number in sorted(Counter(mutation.kind for mutation in mutations).items()):
        print(f"{kind}: {number - alive[kind]} of {number} caught")
    print(f"{len(mutations) - len(survivors)} of {len(mutations)} random mutants are caught (--seed {seed})")


if __name__ == "__main__":
    sys.exit(main())
