"""An object is collected at any point of any operation, and its finalizer closes one of the library's: both are done.

The points are those of tests/unit/test_interruptions.py. With `--all-points` all of them are examined.
"""

from __future__ import annotations

import gc
import random
import secrets
from collections.abc import Iterator

import pytest

from tests.interruptions.examine import examine_collection, rehearse_collections
from tests.interruptions.operations import OPERATIONS, Operation
from tests.interruptions.scene import SeenKernel
from tests.interruptions.victims import VICTIMS

SHARE = 80  # one point in so many, of each operation with each victim, where 5000 points are interrupted
ENOUGH = 5  # failures of one operation


@pytest.fixture(scope="module")
def chance(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    """Nothing else is collected by chance."""
    given = request.config.getoption("--hypothesis-seed")
    seed = secrets.randbits(32) if given is None else int(given)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{len(OPERATIONS)} operations: --hypothesis-seed={seed}", flush=True)
    gc.disable()
    yield random.Random(seed)  # noqa: S311 (nothing secret)
    gc.enable()


@pytest.mark.long
@pytest.mark.each_operation
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_what_a_finalizer_closes_in_the_middle_of_an_operation_is_closed_before_or_after_it(
    request: pytest.FixtureRequest, chance: random.Random, operation: Operation, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mapping, a temporary one, a view, a mapped region, a device: the operation is made, too."""
    failures, points, count = list[str](), 0, 0
    option = request.config.getoption
    kernel = SeenKernel(operation.space)
    for name, victim in VICTIMS.items():
        passed, legal = rehearse_collections(operation, kernel, victim)
        points += passed
        share = passed if option("--all-points") else passed * option("--points") // (5000 * SHARE) + 1
        for at in sorted(chance.sample(range(1, passed + 1), share)):
            wrong = examine_collection(operation, kernel, victim, at, legal)
            count += 1
            if wrong:
                failures.append(f"{name}, {wrong}")
                kernel.shutdown()
                kernel = SeenKernel(operation.space)
            if len(failures) == ENOUGH:
                break
    kernel.shutdown()
    gc.collect()
    with capsys.disabled():
        print(f" {operation}: {points} points, {count} examined", flush=True)
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)
