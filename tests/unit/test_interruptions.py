"""A signal handler raises at any point of any operation, and another one in the undo: all is as before, or as after.

The points are found by making each operation once (tests/interruptions). `--points` is the size of the sample that is
examined, another one each time; with `--all-points` all of them are.
"""

from __future__ import annotations

import gc
import random
import secrets
from collections.abc import Iterator, Sequence
from typing import get_args

import pytest

from tests.interruptions.examine import Case, Dry, examine, raising, rehearse
from tests.interruptions.operations import OPERATIONS, Operation
from tests.interruptions.scene import Kind, SeenKernel

ENOUGH = 5  # failures of one operation


class Laboratory:
    """A kernel of each kind, a new one where a failure has left something, and the cases of each operation."""

    def __init__(self, operations: Sequence[Operation], seed: int, sample: int | None) -> None:
        self.kernels: dict[Kind, SeenKernel] = {kind: SeenKernel(kind) for kind in get_args(Kind)}
        self.chance = random.Random(seed)  # noqa: S311 (nothing secret)
        self.dry = {operation.name: rehearse(operation, self.kernels[operation.space]) for operation in operations}
        self._share = 1.0 if sample is None else min(0.8 * sample / self.points, 1)

    @property
    def points(self) -> int:
        """Of all these operations."""
        return sum(dry.points for dry in self.dry.values())

    def choose(self, dry: Dry) -> list[int]:
        """Points of an operation, ascending. A second signal follows at a third of them."""
        count = min(int(dry.points * self._share) + 1, dry.points)
        return sorted(self.chance.sample(range(1, dry.points + 1), count))

    def examine(self, operation: Operation, case: Case) -> tuple[str, int]:
        """As `examine`."""
        kernel = self.kernels[operation.space]
        wrong, left = examine(operation, kernel, self.dry[operation.name], case)
        if wrong:
            kernel.shutdown()
            gc.collect()
            self.kernels[operation.space] = SeenKernel(operation.space)
        return wrong, left


@pytest.fixture(scope="module")
def laboratory(request: pytest.FixtureRequest) -> Iterator[Laboratory]:
    """Nothing is collected by chance: the points would not be the same each time."""
    given = request.config.getoption("--hypothesis-seed")
    seed = secrets.randbits(32) if given is None else int(given)
    gc.disable()
    option = request.config.getoption
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path]
    wanted = [item.callspec.params["operation"] for item in items]
    taken = [operation for operation in OPERATIONS if operation in wanted]
    made = Laboratory(taken, seed, None if option("--all-points") else option("--points"))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{made.points} points of {len(taken)} operations: --hypothesis-seed={seed}", flush=True)
    with raising():
        yield made
    for kernel in made.kernels.values():
        kernel.shutdown()
    gc.enable()


@pytest.mark.each_operation
@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
def test_an_operation_that_a_signal_handler_interrupts_is_made_or_not_made(
    laboratory: Laboratory, operation: Operation, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reach, IOVA, memory, descriptors, locked bytes, claims and exports are as before or as after. It can be made
    again, and all is closed."""
    dry = laboratory.dry[operation.name]
    failures, count = list[str](), 0
    for first in laboratory.choose(dry):
        twice = laboratory.chance.random() < 1 / 3
        wrong, left = laboratory.examine(operation, Case(first, counted=twice))
        count += 1
        if twice and not wrong and left:
            wrong, _left = laboratory.examine(operation, Case(first, laboratory.chance.randint(1, left)))
            count += 1
        failures += [wrong] if wrong else []
        if len(failures) == ENOUGH:
            break
    gc.collect()
    with capsys.disabled():
        print(f" {operation}: {dry.points} points, {count} examined", flush=True)
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)
