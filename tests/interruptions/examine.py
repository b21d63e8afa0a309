"""Runs an operation with an interruption at one of its points, and judges the state afterwards."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import NamedTuple, TypeAlias

from tests.interruptions.operations import Operation
from tests.interruptions.points import Walk
from tests.interruptions.scene import Scene, SeenKernel, State, close_made
from tests.interruptions.victims import hold
from tests.unit.fakes import Interrupt

Victim: TypeAlias = Callable[[Scene], Callable[[], object]]
FIRST, SECOND = signal.SIGUSR1, signal.SIGUSR2
HANDLED = Counter[int]()
"""The number of runs of each signal's handler."""


class Dry(NamedTuple):
    """An undisturbed run of an operation: the number of points, and the state afterwards.

    `closed`: the state after the object that the operation made is closed.
    """

    points: int
    after: State
    closed: State


class Case(NamedTuple):
    """A signal at the point `first`, and perhaps another at the point `second` after that.

    `counted`: the points behind are to be counted too.
    """

    first: int
    second: int | None = None
    counted: bool = False


def press(number: int) -> None:
    """Send a signal to this thread now."""
    signal.raise_signal(number)


@contextmanager
def raising() -> Iterator[None]:
    """Install a Python handler for both signals, which raises Interrupt."""

    def handler(number: int, frame: FrameType | None) -> None:
        del frame
        HANDLED[number] += 1
        raise Interrupt(number)

    before = {number: signal.signal(number, handler) for number in (FIRST, SECOND)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def handlers() -> list[object]:
    """Return the handlers of all signals."""
    return [signal.getsignal(number) for number in signal.valid_signals()]


def difference(found: State, *legal: State) -> str:
    """Describe the difference to the nearest legal state; an empty string if there is none."""
    wrong = [{key: (state[key], found[key]) for key in state if state[key] != found[key]} for state in legal]
    nearest = min(wrong, key=len)
    return "; ".join(f"{key}: {found!r} in place of {wanted!r}" for key, (wanted, found) in nearest.items())


def rehearse(operation: Operation, kernel: SeenKernel) -> Dry:
    """Make the operation twice, undisturbed. Imports and caches of the first run are no points of the operation."""
    for _ in range(2):
        scene = Scene(kernel)
        operation.prepare(scene)
        scene.note_iovas()
        scene.state(checked=False)  # as before each case, because an answer that a block caches is no point either
        walk = Walk()
        scene.made = walk.run(partial(operation.call, scene))
        after = closed = scene.state()
        if operation.makes:
            close_made(scene)
            closed = scene.state()
        scene.close()
    return Dry(walk.count, after, closed)


class Examination:
    """One case of one operation."""

    def __init__(self, operation: Operation, kernel: SeenKernel, dry: Dry, case: Case) -> None:
        self._operation = operation
        self._case = case
        self._after = dry.after
        self._closed = dry.closed
        steps: dict[int, Callable[[], object]] = {case.first: partial(press, FIRST)}
        if case.second is not None:
            steps[case.first + case.second] = partial(press, SECOND)
        self.walk = Walk(steps, to_the_end=case.counted)
        self.interrupted: Interrupt | None = None
        """The exception of a handler, which keeps objects alive that no caller received."""
        self._scene = Scene(kernel)

    def run(self) -> str:
        """Describe the fault in words; an empty string if there is none."""
        scene, operation = self._scene, self._operation
        operation.prepare(scene)
        scene.note_iovas()
        before, installed = scene.state(checked=False), handlers()
        HANDLED.clear()
        try:
            scene.made = self.walk.run(partial(operation.call, scene))
        except Interrupt as error:
            self.interrupted = error
        if self.interrupted is None:
            return self._say("the handler's exception is lost")
        if sum(HANDLED.values()) != len(self.walk.where):
            return self._say(f"the handlers have run {sum(HANDLED.values())} times")
        found = scene.state()
        legal = (before, self._closed) if operation.makes else (before, self._after)
        if wrong := difference(found, *legal):
            return self._say(f"then {wrong}")
        if wrong := self._again(done=found == self._after and not operation.makes):
            return self._say(f"made again, {wrong}")
        if handlers() != installed:
            return self._say("a signal has another handler")
        scene.close()
        return ""

    def _again(self, *, done: bool) -> str:
        scene, operation = self._scene, self._operation
        if operation.tidy is not None:
            operation.tidy(scene)
        try:
            scene.made = operation.call(scene)
        except operation.refusals as error:
            return "" if done else f"it raises {error!r}"
        return difference(scene.state(), self._after)

    def _say(self, what: str) -> str:
        return f"{self._operation.name}, {self._case}, at {' and '.join(self.walk.where)}: {what}"


def examine(operation: Operation, kernel: SeenKernel, dry: Dry, case: Case) -> tuple[str, int]:
    """Return the fault, and the number of points of the call from the first signal on."""
    examination = Examination(operation, kernel, dry, case)
    try:
        wrong = examination.run()
    except (Exception, Interrupt) as error:
        wrong = examination._say(f"{type(error).__name__}: {error}, line {_line(error)}")
    examination.interrupted = None  # the traceback would otherwise keep the scene until the next collection
    return wrong, examination.walk.count - case.first


def _line(error: BaseException) -> int:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None and trace.tb_next.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return 0 if trace is None else trace.tb_lineno


# ------------------------------------------------------------------------------------------------ collections


class Outcome(NamedTuple):
    """The exception that a call raised, by name, and the state afterwards."""

    error: str
    state: State


def _outcome(scene: Scene, call: Callable[[], object]) -> Outcome:
    error = ""
    try:
        scene.made = call()
    except Exception as raised:
        error = type(raised).__name__
    return Outcome(error, scene.state())


def rehearse_collections(operation: Operation, kernel: SeenKernel, victim: Victim) -> tuple[int, list[Outcome]]:
    """Return the number of points, and the legal outcomes: those with a close before and after the operation."""
    outcomes = []
    for first in (True, False):
        scene = Scene(kernel)
        operation.prepare(scene)
        close = victim(scene)
        scene.note_iovas()
        if first:
            close()
        walk = Walk()
        outcome = _outcome(scene, partial(walk.run, partial(operation.call, scene)))
        if not first:
            close()
            outcome = Outcome(outcome.error, scene.state())
        outcomes.append(outcome)
        scene.close()
    return walk.count, outcomes


def examine_collection(
    operation: Operation, kernel: SeenKernel, victim: Victim, at: int, legal: Sequence[Outcome]
) -> str:
    """Describe the fault after an operation during which a victim was collected; an empty string if there is none."""
    scene = Scene(kernel)
    operation.prepare(scene)
    walk = Walk({at: hold(victim(scene))}, to_the_end=False)
    scene.note_iovas()
    try:
        found = _outcome(scene, partial(walk.run, partial(operation.call, scene)))
        same = [outcome.state for outcome in legal if outcome.error == found.error]
        wrong = difference(found.state, *same) if same else f"{found.error or 'nothing'} was raised"
        scene.close()
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}, line {_line(error)}"
    return wrong and f"{operation.name}, point {at}, at {' and '.join(walk.where)}: {wrong}"
