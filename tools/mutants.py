"""Random mistakes in the package, one at a time, and the test that notices each: `scripts/mutants --random N`.

A seed gives the same mistakes as long as the sources do not change. The name of the mistake's module chooses the tests:
first the files of tests/unit named after the module or its package, then those of `_TESTS`, then those that run for
every module. A mistake that passes all of them is tried on the rest of tests/unit. The tests run on copies of the
checkout. A survivor is printed as one line: either no test covers the statement, or the mistake changes nothing.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.checkout import borrowed, copies, first_failure, rewritten
from tests.mutants.mutant import ROOT
from tools.count import modules
from tools.mutations import Mutation, sample

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
}
# These cover every operation of a mapper and its blocks. The steps of an undo would take minutes for each mistake.
_EVERYWHERE = ("tests/unit/test_failures.py", "tests/property")
_LEFT_OUT = ("-k", "not step_of_the_undo")
_SAMPLES = ("--points=200", "--thread-steps=2000")
# These read the checkout as text, or run the checkout elsewhere, and do not test its behaviour.
_NO_WITNESS = ("linters", "mutants", "random_mutants", "stages", "count", "vm", "series")
_SLACK = 5.0
"""A test hangs if it takes this many times as long as without a mistake, plus 30 seconds: the mistake is noticed."""


def chosen_tests(module: str, root: Path = ROOT) -> list[str]:
    """Return the test files for a mistake in `module`, such as "mapper/window.py", the most likely witness first."""
    path = Path(module)
    names = [path.stem, path.parts[0].removesuffix(".py")]
    units = {file.stem.removeprefix("test_"): file for file in sorted(root.glob("tests/unit/test_*.py"))}
    wanted = [unit for name in names for unit in units if name in (unit, *unit.split("_"))]
    wanted += [unit for unit in _TESTS.get(names[-1], ()) if unit in units]
    found = [str(units[unit].relative_to(root)) for unit in dict.fromkeys(wanted)]
    return list(dict.fromkeys([*found, *(test for test in _EVERYWHERE if (root / test).exists())]))


def all_tests(root: Path = ROOT) -> list[str]:
    """Return the test files of tests/unit that may notice a mistake."""
    files = sorted(root.glob("tests/unit/test_*.py"))
    return [str(file.relative_to(root)) for file in files if file.stem.removeprefix("test_") not in _NO_WITNESS]


def time_tests(checkout: Path, tests: Sequence[str]) -> float:
    """Return the seconds that `tests` take without a mistake. Exits if a test fails, since no verdict is possible."""
    begun = time.monotonic()
    if witness := first_failure(checkout, [*tests, *_LEFT_OUT], timeout=1800):
        sys.exit(f"mutants: {witness} fails without any mistake: repair that first, or no mutant can be judged")
    return time.monotonic() - begun


def witness_of(checkout: Path, mutation: Mutation, tests: Sequence[str], timeout: float) -> str | None:
    """Return the test that fails with one mistake in a copy of the checkout, or None if all pass."""
    path = checkout / "pyvfio" / mutation.module
    with rewritten(path, mutation.apply(path.read_text(encoding="utf-8"))):
        return first_failure(checkout, [*tests, *_LEFT_OUT], timeout=timeout)


def run(mutations: Sequence[Mutation], tests: Mapping[str, Sequence[str]], *, jobs: int) -> list[Mutation]:
    """Print the witness of each mistake, and return the mistakes without one. `tests`: the tests of each module."""
    with copies(jobs) as queue, ThreadPoolExecutor(jobs) as pool:

        def measure(test: str) -> float:
            with borrowed(queue) as checkout:
                return time_tests(checkout, [test, *_SAMPLES])

        rest = all_tests()
        needed = sorted({*rest, *(test for mutation in mutations for test in tests[mutation.module])})
        seconds = dict(zip(needed, pool.map(measure, needed), strict=True))

        def judge(mutation: Mutation) -> tuple[Mutation, str | None]:
            chosen = tests[mutation.module]
            for files in (chosen, [test for test in rest if test not in chosen]):
                timeout = 30 + _SLACK * sum(seconds[test] for test in files)
                with borrowed(queue) as checkout:
                    if witness := witness_of(checkout, mutation, [*files, *_SAMPLES], timeout):
                        return mutation, witness
            return mutation, None

        survivors = []
        for mutation, witness in pool.map(judge, mutations):
            print(f"{'caught  ' if witness else 'SURVIVED'} {mutation}\n         {witness or ''}", flush=True)
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
    tests = {module: chosen_tests(module) for module in {mutation.module for mutation in mutations}}
    survivors = run(mutations, tests, jobs=max(options.jobs, 1))
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
