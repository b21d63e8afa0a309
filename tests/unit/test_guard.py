"""The rules for threads, finalizers, signals and forks, each on an object that has nothing but a guard."""

from __future__ import annotations

import linecache
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import pytest

from pyvfio import guard
from pyvfio.errors import ForkedError
from pyvfio.guard import (
    ContextManager,
    Guard,
    call_out,
    call_out_each,
    checkpoint,
    close_now,
    closing,
    closing_after_dependents,
    closing_in_hooks,
    closing_in_one_step,
    closing_under,
    constructing,
    guarded,
    holding,
    is_undoing,
    making,
    reading,
    run_outside,
    run_outside_or_in_hook,
    undoing,
    uninterrupted,
)


class InterruptionError(Exception):
    """Raised by a handler."""


def _undo(thing: Thing) -> None:
    thing.events.append("undone")


@dataclass(frozen=True)
class FrozenError(Exception):
    """An exception with which nothing can be noted."""

    code: int


@dataclass
class Pressed:
    """A handler that is equal to another one until it has run."""

    times: int = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Count."""
        del number, frame
        self.times += 1


class Thing:
    """Notes what happens to it."""

    def __init__(self) -> None:
        self.guard = Guard("this thing")
        self.events: list[str] = []

    @guarded
    def change(self, step: Callable[[], object] = lambda: None) -> None:
        self.events.append("begin")
        step()
        self.events.append("end")

    @reading
    def look(self, step: Callable[[], object] = lambda: None) -> None:
        step()
        self.events.append("looked")

    @making(_undo)
    def make(self, step: Callable[[], object] = lambda: None) -> Thing:
        step()
        self.made = Thing()
        return self.made

    @closing
    def close(self) -> None:
        self.events.append("closed")

    @closing_in_hooks
    def drop(self) -> None:
        self.events.append("dropped")


class Whole(Thing):
    """Has dependents, of which others make `late` while the first ones are closed."""

    def __init__(self, late: int = 0) -> None:
        super().__init__()
        self.late = late
        self.free: list[bool] = []

    def ask(self) -> None:
        """Whether another thread can have the lock now."""
        asker = threading.Thread(target=self.try_it)
        asker.start()
        asker.join()

    def try_it(self) -> None:
        self.free.append(self.guard.lock.acquire(blocking=False))
        if self.free[-1]:
            self.guard.lock.release()

    def close_dependents(self) -> None:
        self.ask()
        self.events.append("dependents")

    def end_dependents(self) -> bool:
        self.ask()
        self.late -= 1
        return self.late < 0

    @closing_after_dependents
    def end(self) -> None:
        self.ask()
        self.events.append("ended")


def each(*steps: Callable[[], object]) -> Callable[[], None]:
    """One step after the other."""

    def all_of_them() -> None:
        for step in steps:
            step()

    return all_of_them


def press(number: int = signal.SIGUSR1) -> None:
    """Have a signal arrive in this thread, now."""
    signal.raise_signal(number)


def _raise_in_line(thing: Thing, name: str, skipped: int) -> bool:
    """Call that method, and raise in a line of the guard's own, after so many others: whether there was another line.

    Lines of a `finally`, and of the return of a result that exists, are left out: to be there is to be at the end.
    """
    method = getattr(Thing, name)
    codes = {method.__code__, guard._run.__code__}
    seen: list[str] = []

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        def each_line(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if (
                event == "line"
                and not line.startswith(("return result", "return made"))
                and "looking" not in line
                and line not in seen
            ):
                seen.append(line)
                if len(seen) > skipped:
                    raise ValueError
            return each_line

        return each_line if frame.f_code in codes else None

    sys.settrace(trace)
    try:
        with suppress(ValueError):
            method(thing)
    finally:
        sys.settrace(None)
    return len(seen) > skipped


def _is_free(lock: threading.RLock) -> bool:
    """Whether another thread can have the lock."""
    taken: list[bool] = []
    asker = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=0.1)))
    asker.start()
    asker.join()
    return taken == [True]


@pytest.fixture
def raising() -> Iterator[None]:
    """SIGUSR1 raises InterruptionError."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise InterruptionError

    before = signal.signal(signal.SIGUSR1, handler)
    yield
    assert signal.getsignal(signal.SIGUSR1) is handler
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.usefixtures("raising")
class TestSignals:
    """Handlers that raise."""

    def test_a_handler_runs_when_the_change_has_ended(self) -> None:
        thing = Thing()
        with pytest.raises(InterruptionError):
            thing.change(press)
        assert thing.events == ["begin", "end"]

    @pytest.mark.parametrize("when", ["within", "behind"])
    def test_a_handler_that_is_equal_to_the_one_before_is_another(self, when: str) -> None:
        thing, old, new = Thing(), Pressed(), Pressed()
        before = signal.signal(signal.SIGUSR1, old)
        try:
            thing.change()
            signal.signal(signal.SIGUSR1, new)
            thing.change(partial(signal.raise_signal, signal.SIGUSR1) if when == "within" else lambda: None)
            found: object = signal.getsignal(signal.SIGUSR1)
            assert found is new
            if when == "behind":
                signal.raise_signal(signal.SIGUSR1)
            assert (old.times, new.times) == (0, 1)
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_a_signal_between_a_handler_and_the_record_of_its_equal_is_the_new_ones(self) -> None:
        """The new one has been replaced by then, and the old one is not set any more."""
        thing, old, new = Thing(), Pressed(), Pressed()
        pressed: list[bool] = []

        def trace(frame: FrameType, event: str, argument: object) -> None:
            if frame.f_code is guard._Signals._learn.__code__ and not pressed:
                pressed.append(True)
                press()

        before = signal.signal(signal.SIGUSR1, old)
        try:
            thing.change()
            signal.signal(signal.SIGUSR1, new)
            sys.settrace(trace)
            try:
                thing.change()
            finally:
                sys.settrace(None)
            assert (pressed, old.times, new.times) == ([True], 0, 1)
        finally:
            signal.signal(signal.SIGUSR1, before)

    def test_a_function_without_a_guard_is_as_whole_as_a_change(self) -> None:
        """Its arguments and its answer are passed on, handlers and closes wait, and calls can be within."""
        thing, below, events = Thing(), Thing(), list[str]()

        @uninterrupted()
        def function(step: Callable[[], object], *, answer: int = 0) -> int:
            step()
            events.append("end")
            return answer

        assert function(lambda: None) == 0
        assert function(lambda: thing.change(lambda: function(lambda: None, answer=3)), answer=5) == 5
        events.clear()
        with pytest.raises(InterruptionError):
            function(each(below.drop, below.close, lambda: events.extend(below.events), press))
        assert (events, below.events) == (["end"], ["dropped", "closed"])

    def test_a_handler_at_the_end_can_close_as_a_hook_can_and_comes_before_what_was_put_off(self) -> None:
        thing, below, seen = Thing(), Thing(), list[str]()

        def handler(number: int, frame: FrameType | None) -> None:
            del number, frame
            below.drop()
            seen.extend(below.events)

        before = signal.signal(signal.SIGUSR1, handler)
        try:
            thing.change(each(below.close, press))
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert (seen, below.events) == (["dropped"], ["dropped", "closed"])

    def test_a_checkpoint_lets_it_refuse(self) -> None:
        thing = Thing()
        with pytest.raises(InterruptionError):
            thing.change(each(press, checkpoint))
        assert thing.events == ["begin"]

    def test_no_hook_is_called_once_a_handler_has_refused(self) -> None:
        thing, called = Thing(), list[Thing]()
        with pytest.raises(InterruptionError):
            thing.change(each(press, partial(call_out, thing.events.append, ("hook",))))
        with pytest.raises(InterruptionError):
            thing.change(each(press, lambda: call_out_each([thing], "drop", (), called)))
        assert (thing.events, called) == (["begin", "begin"], [])

    @pytest.mark.parametrize("last", [False, True])
    def test_a_signal_in_a_hook_is_handled_before_the_next_one_or_before_the_change_goes_on(
        self, *, last: bool
    ) -> None:
        class Hooked(Thing):
            def hook(self) -> None:
                self.events.append("hook")
                if self is pressing:
                    press()

        thing, pressing, called = Hooked(), Hooked(), list[Thing]()
        things = [thing, pressing] if last else [pressing, thing]
        changed = Thing()
        with pytest.raises(InterruptionError):
            changed.change(lambda: call_out_each(things, "hook", (), called))
        assert (changed.events, called) == (["begin"], things if last else [pressing])
        assert thing.events == (["hook"] if last else [])

    def test_a_checkpoint_in_an_undo_runs_no_handler(self) -> None:
        def undo() -> None:
            with undoing:
                call_out(each(press, partial(thing.change, checkpoint)), ())
            thing.events.append("undone")

        thing = Thing()
        with pytest.raises(InterruptionError):
            thing.change(each(undo, checkpoint))
        assert thing.events == ["begin", "begin", "end", "undone"]

    def test_a_checkpoint_in_another_thread_runs_no_handler(self) -> None:
        thing, entered, left = Thing(), threading.Event(), threading.Event()

        def work() -> None:
            thing.change(each(entered.set, left.wait, checkpoint))

        worker = threading.Thread(target=work)
        worker.start()
        entered.wait()
        guard._signals.noted[signal.SIGUSR1] = lambda _number, _frame: thing.events.append("handled")
        left.set()
        worker.join()
        guard._signals.noted.clear()
        assert thing.events == ["begin", "end"]

    def test_an_object_that_nobody_receives_is_undone(self) -> None:
        thing = Thing()
        with pytest.raises(InterruptionError):
            thing.make(press)
        assert thing.made.events == ["undone"]

    def test_an_undo_is_not_ended_by_another_signal(self) -> None:
        def undo(made: Thing) -> None:
            press()
            made.events.append("undone")

        class Maker(Thing):
            @making(undo)
            def make_one(self) -> Thing:
                press()
                self.made = Thing()
                return self.made

        thing = Maker()
        with pytest.raises(InterruptionError):
            thing.make_one()
        assert thing.made.events == ["undone"]

    def test_an_undo_is_made_though_another_handler_raises_when_it_begins(self) -> None:
        class Spiteful:
            """A handler that raises when the guard looks at it for the first time."""

            raised = False

            def __call__(self, number: int, frame: FrameType | None) -> None: ...

            def __eq__(self, other: object) -> bool:
                if not self.raised:
                    self.raised = True
                    raise ValueError
                return self is other

            __hash__ = object.__hash__

        def first(number: int, frame: FrameType | None) -> None:
            press()

        def second(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGUSR2, Spiteful())
            raise InterruptionError

        before = signal.signal(signal.SIGUSR1, second)
        signal.signal(signal.SIGUSR2, first)
        thing = Thing()
        with pytest.raises(ValueError):  # noqa: PT011 (it is the test's own)
            thing.make(partial(press, signal.SIGUSR2))
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, before)
        assert thing.made.events == ["undone"]

    def test_a_call_that_makes_nothing_has_its_handlers_run(self) -> None:
        def fail() -> None:
            press()
            raise ValueError

        with pytest.raises(InterruptionError):
            Thing().make(fail)

    @pytest.mark.parametrize("name", ["change", "make", "look"])
    def test_what_raises_in_any_line_of_an_outermost_call_leaves_nothing_behind(self, name: str) -> None:
        """An exception that another thread has set, or a handler of a signal that is none of the ten."""
        handler, raised = signal.getsignal(signal.SIGUSR1), 0
        while _raise_in_line(thing := Thing(), name, raised):
            raised += 1
            place = guard._thread.place
            assert (place.inside, place.busy, place.looking, place.lock) == (False, False, False, None)
            assert _is_free(thing.guard.lock)
            assert signal.getsignal(signal.SIGUSR1) is handler
            assert not hasattr(thing, "made") or thing.made.events == ["undone"]
        assert raised >= (10 if name == "change" else 5)

    def test_what_raises_where_a_call_begins_to_end_does_not_keep_it_from_ending(self) -> None:
        """An exception that another thread has set, in a call that raises: the call ends all the same."""
        raised: list[bool] = []

        def trace(frame: FrameType, event: str, argument: Any) -> None:
            if frame.f_code is guard._leave.__code__ and not raised:
                raised.append(True)
                raise InterruptionError

        def fail() -> None:
            sys.settrace(trace)
            raise ValueError

        thing = Thing()
        try:
            with pytest.raises(InterruptionError):
                thing.change(fail)
        finally:
            sys.settrace(None)
        place = guard._thread.place
        assert (raised, place.inside, place.busy, place.lock) == ([True], False, False, None)
        assert _is_free(thing.guard.lock)

    def test_a_signal_that_comes_twice_is_handled_once(self) -> None:
        seen: list[int] = []
        signal.signal(signal.SIGUSR2, lambda number, _frame: seen.append(number))
        Thing().change(each(partial(press, signal.SIGUSR2), partial(press, signal.SIGUSR2)))
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        assert seen == [signal.SIGUSR2]

    def test_each_handler_runs_though_one_raises(self) -> None:
        seen: list[int] = []
        signal.signal(signal.SIGUSR2, lambda number, _frame: seen.append(number))
        with pytest.raises(InterruptionError):
            Thing().change(each(press, partial(press, signal.SIGUSR2)))
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        assert seen == [signal.SIGUSR2]

    def test_each_handler_runs_though_all_of_them_raise(self) -> None:
        seen: list[int] = []

        def handler(number: int, frame: FrameType | None) -> None:
            seen.append(number)
            raise InterruptionError

        numbers = [signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT, signal.SIGPROF, signal.SIGALRM, signal.SIGVTALRM]
        before = {number: signal.signal(number, handler) for number in numbers}
        with pytest.raises(InterruptionError):
            Thing().change(each(*(partial(press, number) for number in numbers)))
        for number, old in before.items():
            signal.signal(number, old)
        assert seen == numbers

    def test_a_signal_that_comes_when_a_replacement_was_left_behind_is_handled_at_once(self) -> None:
        guard._signals.replace()
        with pytest.raises(InterruptionError):
            press()

    def test_a_signal_is_handled_though_the_handler_of_another_raises_while_both_are_restored(self) -> None:
        seen, pressed = list[int](), list[bool]()

        def note(number: int, frame: FrameType | None) -> None:
            del frame
            seen.append(number)

        def at_each_line(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            if not pressed and signal.getsignal(signal.SIGUSR1) != guard._signals.route:
                pressed.append(True)
                press()
            return at_each_line

        def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
            return at_each_line if frame.f_code is guard._Signals.put_back.__code__ else None

        before = signal.signal(signal.SIGUSR2, note)
        try:
            guard._signals.replace()  # as an exception in a call of another thread leaves them
            sys.settrace(trace)
            try:
                with pytest.raises(InterruptionError):
                    press(signal.SIGUSR2)
            finally:
                sys.settrace(None)
            assert (pressed, seen) == ([True], [signal.SIGUSR2])
            Thing().change()
            assert signal.getsignal(signal.SIGUSR2) is note
        finally:
            signal.signal(signal.SIGUSR2, before)

    def test_a_replacement_that_was_left_behind_is_undone_where_another_handler_is_new(self) -> None:
        guard._signals.replace()
        signal.signal(signal.SIGUSR2, lambda _number, _frame: None)
        Thing().change()
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        with pytest.raises(InterruptionError):
            press()

    def test_a_handler_that_keeps_what_it_found_and_sets_it_again_loses_no_signal(self) -> None:
        """As a program does that ignores Ctrl-C for a moment."""
        found = list[object]()

        def ignore(number: int, frame: FrameType | None) -> None:
            found.append(signal.signal(signal.SIGUSR1, signal.SIG_IGN))

        before = signal.getsignal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR2, ignore)
        Thing().change(partial(press, signal.SIGUSR2))
        signal.signal(signal.SIGUSR2, signal.SIG_DFL)
        Thing().change()
        signal.signal(signal.SIGUSR1, found[0])  # type: ignore[arg-type]
        with pytest.raises(InterruptionError):
            press()
        with pytest.raises(InterruptionError):
            Thing().change(press)
        signal.signal(signal.SIGUSR1, before)

    def test_a_change_that_a_handler_makes_in_a_look_is_not_interrupted(self) -> None:
        thing, other = Thing(), Thing()

        def handler(number: int, frame: FrameType | None) -> None:
            other.change(press)

        before = signal.signal(signal.SIGUSR2, handler)
        with pytest.raises(InterruptionError):
            thing.look(partial(press, signal.SIGUSR2))
        signal.signal(signal.SIGUSR2, before)
        assert other.events == ["begin", "end"]

    def test_a_close_in_a_change_that_a_handler_makes_in_a_look_waits_for_the_look(self) -> None:
        thing, other, closed = Thing(), Thing(), list[list[str]]()

        def handler(number: int, frame: FrameType | None) -> None:
            other.change(thing.close)
            closed.append(list(thing.events))

        before = signal.signal(signal.SIGUSR2, handler)
        thing.look(partial(press, signal.SIGUSR2))
        signal.signal(signal.SIGUSR2, before)
        assert (closed, thing.events) == ([[]], ["looked", "closed"])

    def test_a_handler_that_the_program_sets_meanwhile_stays(self) -> None:
        def other(number: int, frame: FrameType | None) -> None:
            pass

        before = signal.getsignal(signal.SIGUSR1)
        Thing().change(lambda: signal.signal(signal.SIGUSR1, other))
        assert signal.getsignal(signal.SIGUSR1) is other
        signal.signal(signal.SIGUSR1, before)

    @pytest.mark.parametrize("call", ["change", "make", "close", "end"])
    def test_who_waits_for_a_lock_can_be_interrupted(self, call: str) -> None:
        thing, entered, left = Whole(), threading.Event(), threading.Event()
        worker = threading.Thread(target=lambda: thing.change(each(entered.set, left.wait)))
        worker.start()
        entered.wait()
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(InterruptionError):
            getattr(thing, call)()
        left.set()
        worker.join()
        assert [event for event in thing.events if event != "dependents"] == ["begin", "end"]

    def test_the_error_of_the_call_is_the_context_of_what_a_handler_raises(self) -> None:
        def fail() -> None:
            press()
            raise ValueError

        with pytest.raises(InterruptionError) as caught:
            Thing().change(fail)
        assert isinstance(caught.value.__context__, ValueError)


def _whole(part: Part) -> Guard:
    return part.whole.guard


class Part:
    """Takes the lock of its whole before its own."""

    def __init__(self, whole: Thing) -> None:
        self.guard = Guard("this part")
        self.whole = whole

    @closing_under(_whole)
    def close(self) -> None:
        self.whole.events.append("part closed")


class TestLocks:
    """Calls of two threads."""

    @pytest.mark.parametrize("now", [True, False], ids=["from inside", "from outside"])
    def test_a_part_is_closed_under_the_lock_of_its_whole(self, *, now: bool) -> None:
        whole, entered, left = Thing(), threading.Event(), threading.Event()
        part = Part(whole)
        worker = threading.Thread(target=lambda: whole.change(each(entered.set, left.wait)))
        worker.start()
        entered.wait()
        closer = threading.Thread(target=(lambda: close_now(part)) if now else part.close)
        closer.start()
        closer.join(0.1)
        left.set()
        worker.join()
        closer.join()
        assert whole.events == ["begin", "end", "part closed"]

    @pytest.mark.parametrize("call", ["change", "look", "make"])
    def test_a_call_waits_for_that_of_another_thread(self, call: str) -> None:
        thing, entered, left, begun = Thing(), threading.Event(), threading.Event(), threading.Event()

        def second() -> None:
            begun.set()
            getattr(thing, call)(lambda: thing.events.append("second"))

        workers = [
            threading.Thread(target=lambda: thing.change(each(entered.set, left.wait))),
            threading.Thread(target=second),
        ]
        for worker, event in zip(workers, (entered, begun), strict=True):
            worker.start()
            event.wait()
        time.sleep(0.05)  # for the second to come too early, if it can
        left.set()
        for worker in workers:
            worker.join()
        assert thing.events.index("second") > thing.events.index("end")

    def test_a_close_that_was_put_off_waits_for_the_call_of_another_thread(self) -> None:
        thing, other, entered, left = Thing(), Thing(), threading.Event(), threading.Event()
        workers = [
            threading.Thread(target=lambda: other.change(each(entered.set, left.wait))),
            threading.Thread(target=lambda: thing.change(other.close)),
        ]
        for worker in workers:
            worker.start()
            entered.wait()
        time.sleep(0.05)  # for the close to come too early, if it can
        left.set()
        for worker in workers:
            worker.join()
        assert other.events == ["begin", "end", "closed"]

    @pytest.mark.parametrize("call", ["change", "drop"])
    def test_a_call_in_a_hook_waits_for_that_of_another_thread(self, call: str) -> None:
        thing, other, entered, left = Thing(), Thing(), threading.Event(), threading.Event()
        worker = threading.Thread(target=lambda: other.change(each(entered.set, left.wait)))
        worker.start()
        entered.wait()
        threading.Timer(0.05, left.set).start()
        thing.change(partial(call_out, getattr(other, call), ()))
        worker.join()
        assert other.events == ["begin", "end", *(["dropped"] if call == "drop" else ["begin", "end"])]

    def test_a_call_within_a_call_takes_the_lock_of_its_own_object(self) -> None:
        thing, other = Thing(), Thing()
        free = list[bool]()

        def try_it() -> None:
            free.append(other.guard.lock.acquire(blocking=False))
            if free[-1]:
                other.guard.lock.release()

        def ask() -> None:
            asker = threading.Thread(target=try_it)
            asker.start()
            asker.join()

        thing.change(partial(other.change, ask))
        thing.change(each(partial(thing.look, partial(other.look, ask))))
        assert free == [False, False]

    @pytest.mark.parametrize(("late", "rounds"), [(0, 1), (2, 3), (15, 16), (1000, 16)])
    def test_dependents_are_closed_without_the_lock_until_none_is_left_or_it_is_of_no_use(
        self, late: int, rounds: int
    ) -> None:
        whole = Whole(late)
        whole.end()
        assert whole.events == ["dependents"] * rounds + ["ended"]
        assert whole.free == [True, False] * rounds + [False]
        whole.ask()
        assert whole.free[-1]

    def test_what_is_whole_ends_behind_a_change_and_not_at_all_if_a_dependent_does_not(self) -> None:
        thing, whole = Thing(), Whole()
        thing.change(each(whole.end, lambda: thing.events.extend(whole.events)))
        assert (thing.events, whole.events) == (["begin", "end"], ["dependents", "ended"])

        class Stubborn(Whole):
            def close_dependents(self) -> None:
                raise KeyError

        stubborn = Stubborn()
        with pytest.raises(KeyError):
            stubborn.end()
        assert stubborn.events == []
        stubborn.ask()
        assert stubborn.free == [True]

    @pytest.mark.parametrize("hook", [True, False])
    def test_a_call_within_a_call_has_its_arguments_and_gives_its_lock_back(self, *, hook: bool) -> None:
        thing, whole, given = Thing(), Whole(), list[str]()

        def inner() -> None:
            whole.change(step=partial(given.append, "by name"))
            whole.change(partial(given.append, "by place"))
            with suppress(KeyError):
                whole.change(partial(os.environ.__getitem__, ""))
            whole.look(step=partial(given.append, "in a look"))
            whole.ask()

        thing.change(partial(call_out, inner, ()) if hook else inner)
        assert given == ["by name", "by place", "in a look"]
        whole.ask()
        assert whole.free == [True, True]

    def test_several_locks_are_held_until_the_end_of_the_block(self) -> None:
        thing, first, second = Thing(), Whole(), Whole()

        def ask() -> None:
            first.ask()
            second.ask()

        def step() -> None:
            with suppress(KeyError), holding(first, second):
                ask()
                raise KeyError
            ask()

        thing.change(step)
        assert first.free == second.free == [False, True]

    def test_each_kind_of_close_holds_the_lock_of_its_object_whenever_it_is_made(self) -> None:
        """At once, behind a change or a look that it came in, in a hook, and by the owner."""
        free = list[bool]()

        class Asking(Thing):
            def ask(self) -> None:
                asker = threading.Thread(target=lambda: free.append(self.guard.lock.acquire(blocking=False)))
                asker.start()
                asker.join()

            @closing
            def close(self) -> None:
                self.ask()

            @closing_in_hooks
            def drop(self) -> None:
                self.ask()

        thing, asking = Thing(), Asking()
        for close in (asking.close, asking.drop):
            close()
            thing.change(close)
            thing.change(partial(thing.change, close))
            thing.look(close)
            thing.look(partial(thing.look, close))
            thing.change(partial(call_out, close, ()))
        thing.change(lambda: close_now(asking))
        assert free == [False] * 13
        asking.ask()
        assert free[-1]

    def test_a_close_in_one_step_waits_for_nothing_and_does_nothing_in_a_child(self) -> None:
        class Noting(Thing):
            @closing_in_one_step
            def note(self) -> None:
                self.events.append("noted")

        thing = Noting()
        with thing.guard.lock:
            noting = threading.Thread(target=thing.note)
            noting.start()
            noting.join(5)
            assert thing.events == ["noted"]
        thing.change(each(thing.note, lambda: thing.events.append("after")))
        thing.look(each(thing.note, lambda: thing.events.append("after")))
        assert thing.events == ["noted", "begin", "noted", "after", "end", "noted", "after", "looked"]

        def child() -> None:
            thing.note()
            os._exit(len(thing.events))

        assert in_a_child(child) == len(thing.events)


class TestFinalizers:
    """Closes in the middle of something else."""

    def test_a_step_of_a_finalizer_waits_for_the_end_of_a_change_or_of_a_look(self) -> None:
        thing = Thing()
        thing.change(lambda: run_outside(partial(thing.events.append, "step")))
        thing.look(lambda: run_outside(partial(thing.events.append, "another")))
        assert thing.events == ["begin", "end", "step", "looked", "another"]

    def test_a_close_inside_of_a_change_is_put_off_to_its_end(self) -> None:
        thing, other = Thing(), Thing()
        thing.change(each(other.close, lambda: thing.events.extend(other.events)))
        assert thing.events == ["begin", "end"]
        assert other.events == ["closed"]

    @pytest.mark.parametrize("call", ["change", "make", "function"])
    def test_a_close_inside_of_a_change_that_fails_is_made_at_its_end(self, call: str) -> None:
        thing, other = Thing(), Thing()
        function = uninterrupted()(lambda step: step())
        with pytest.raises(KeyError):
            (function if call == "function" else getattr(thing, call))(
                each(other.close, partial(os.environ.__getitem__, ""))
            )
        assert other.events == ["closed"]

    def test_a_close_inside_of_a_look_is_put_off_to_its_end(self) -> None:
        thing = Thing()
        thing.look(thing.close)
        assert thing.events == ["looked", "closed"]

    def test_a_finalizer_that_closes_is_put_off(self) -> None:
        thing, other = Thing(), Thing()

        def forget() -> None:
            weakref.finalize(Thing(), other.close)
            thing.events.extend(other.events)

        thing.change(forget)
        assert (thing.events, other.events) == (["begin", "end"], ["closed"])

    def test_a_hook_can_close_at_once_what_is_below(self) -> None:
        thing = Thing()

        def hook() -> None:
            thing.drop()
            thing.close()

        thing.change(partial(call_out, hook, ()))
        assert thing.events == ["begin", "dropped", "end", "closed"]

    def test_each_hook_of_a_change_can_close_at_once_what_is_below(self) -> None:
        thing, called = Thing(), list[Thing]()
        thing.change(lambda: call_out_each([thing], "drop", (), called))
        assert (thing.events, called) == (["begin", "dropped", "end"], [thing])

    @pytest.mark.parametrize("nested", ["change", "make", "function"])
    def test_a_change_that_a_hook_makes_is_no_hook_and_behind_it_the_hook_goes_on(self, nested: str) -> None:
        thing, other, below = Thing(), Thing(), Thing()
        function = uninterrupted()(lambda step: step())

        def hook() -> None:
            (function if nested == "function" else getattr(other, nested))(below.drop)
            thing.events.extend(below.events)
            below.drop()
            thing.events.extend(below.events)

        thing.change(partial(call_out, hook, ()))
        assert thing.events == ["begin", "dropped", "end"]
        assert below.events == ["dropped", "dropped"]

    def test_a_step_that_a_hook_may_make_waits_everywhere_else(self) -> None:
        thing = Thing()
        step = partial(run_outside_or_in_hook, partial(thing.events.append, "step"))
        step()
        thing.change(step)
        thing.look(step)
        thing.change(partial(call_out, step, ()))
        thing.look(partial(thing.change, partial(call_out, step, ())))
        changed = ["begin", "end"]
        looked = ["looked", "step"]
        assert thing.events == ["step", *changed, "step", *looked, "begin", "step", "end", *changed, *looked]

    def test_an_undo_is_one_in_its_thread_until_it_ends(self) -> None:
        found = [is_undoing()]
        with undoing:
            with undoing:
                found.append(is_undoing())
                other = threading.Thread(target=lambda: found.append(is_undoing()))
                other.start()
                other.join()
            found.append(is_undoing())
        found.append(is_undoing())
        assert found == [False, True, False, True, False]

    @pytest.mark.parametrize("one", [True, False])
    def test_behind_a_hook_the_change_goes_on(self, *, one: bool) -> None:
        thing, below, seen = Thing(), Thing(), list[int]()

        def hooks() -> None:
            if one:
                call_out(thing.events.append, ("hook",))
            else:
                call_out_each([thing], "look", (), [])

        thing.change(each(hooks, below.drop, lambda: seen.append(len(below.events))))
        assert (seen, below.events) == ([0], ["dropped"])

    def test_an_owner_closes_its_own_at_once(self) -> None:
        thing = Thing()
        thing.change(lambda: close_now(thing))
        assert thing.events == ["begin", "closed", "end"]

    @pytest.mark.usefixtures("raising")
    def test_a_close_that_was_put_off_is_not_interrupted(self) -> None:
        class Slow(Thing):
            @closing
            def close(self) -> None:
                checkpoint()
                self.events.append("closed")

        thing, slow = Thing(), Slow()
        with pytest.raises(InterruptionError):
            thing.change(each(slow.close, press))
        assert slow.events == ["closed"]

    def test_after_a_close_that_ends_the_program_calls_are_made_as_before(self) -> None:
        class Last(Thing):
            @closing
            def close(self) -> None:
                raise SystemExit

        with pytest.raises(SystemExit):
            Thing().change(Last().close)
        thing = Thing()
        thing.close()
        assert thing.events == ["closed"]

    def test_a_finalizer_that_comes_while_handlers_are_replaced_leaves_each_where_it_was(self) -> None:
        """At each point of the change, whatever the finalizer calls."""
        thing, other = Thing(), Thing()
        before = signal.signal(signal.SIGUSR1, lambda number, _frame: thing.events.append(str(number)))
        handler, at, points = signal.getsignal(signal.SIGUSR1), 0, 1

        def finalize(_frame: FrameType, _event: str, _argument: object) -> None:
            nonlocal points
            points += 1
            if points == at:
                other.close()

        while at <= points:
            at, points = at + 1, 0
            sys.setprofile(finalize)
            thing.change()
            sys.setprofile(None)
            assert signal.getsignal(signal.SIGUSR1) is handler
        assert len(other.events) > 10
        signal.signal(signal.SIGUSR1, before)

    def test_a_close_that_was_put_off_and_fails_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(Thing):
            @closing
            def close(self) -> None:
                raise OSError("no")

        Thing().change(Broken().close)
        assert "no" in caplog.text


class TestWith:
    """Leaving a `with` block."""

    class Door(ContextManager):
        """Its close fails with an error."""

        def __init__(self, failure: BaseException | None = None) -> None:
            self.failure = failure
            self.closed = False

        def close(self) -> None:
            self.closed = True
            if self.failure is not None:
                raise self.failure

    def test_leaving_closes(self) -> None:
        with self.Door() as door:
            assert not door.closed
        assert door.closed

    def test_an_error_of_the_close_is_raised(self) -> None:
        with pytest.raises(OSError, match="stuck"), self.Door(OSError("stuck")):
            pass

    @pytest.mark.parametrize("own", [RuntimeError("mine"), KeyboardInterrupt("mine")])
    def test_an_error_of_the_close_is_a_note_on_the_error_of_the_block(self, own: BaseException) -> None:
        with pytest.raises(type(own), match="mine") as caught, self.Door(OSError("stuck")):
            raise own
        assert caught.value is own
        assert own.__notes__ == ["Door could not be closed: stuck"]

    def test_an_interruption_of_the_close_is_no_note(self) -> None:
        with pytest.raises(KeyboardInterrupt), self.Door(KeyboardInterrupt()):
            raise RuntimeError


def in_a_child(step: Callable[[], object]) -> int:
    """The exit status of a child that makes a step: 0 for ForkedError, 1 where it returns, 2 for another error."""
    if (pid := os.fork()) == 0:
        try:
            step()
        except ForkedError:
            os._exit(0)
        except BaseException:
            os._exit(2)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class TestForks:
    """A child, while another thread holds the lock."""

    @pytest.mark.parametrize(("call", "status"), [("change", 0), ("look", 0), ("make", 0), ("close", 1), ("drop", 1)])
    def test_a_child_waits_for_no_lock(self, call: str, status: int) -> None:
        thing, entered, left = Thing(), threading.Event(), threading.Event()
        worker = threading.Thread(target=lambda: thing.change(each(entered.set, left.wait)))
        worker.start()
        entered.wait()
        found = in_a_child(each(partial(signal.alarm, 5), getattr(thing, call)))
        left.set()
        worker.join()
        assert found == status

    def test_a_child_that_returns_from_the_hook_that_forked_it_makes_no_close_of_its_parent(self) -> None:
        thing, other, found = Thing(), Thing(), list[int]()

        def hook() -> None:
            other.close()
            found.append(os.fork())

        thing.change(partial(call_out, hook, ()))
        if found[0] == 0:
            os._exit(len(other.events))
        assert os.waitstatus_to_exitcode(os.waitpid(found[0], 0)[1]) == 0
        assert other.events == ["closed"]

    def test_a_child_that_returns_from_the_hook_that_forked_it_can_change_nothing(self) -> None:
        thing, found = Thing(), list[int]()

        def hook() -> None:
            found.append(os.fork())

        thing.change(partial(call_out, hook, ()))
        if found[0] == 0:
            try:
                thing.change()
            except ForkedError:
                os._exit(0)
            except BaseException:
                os._exit(2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(found[0], 0)[1]) == 0

    def test_a_child_is_told_whose_the_object_is_and_which_process_it_is_itself(self) -> None:
        thing, parent = Thing(), os.getpid()

        def child() -> None:
            try:
                thing.change()
            except ForkedError as error:
                said = str(error).startswith(f"this thing belongs to process {parent}, and this is its child ")
                os._exit(0 if said and f"child {os.getpid()}" in str(error) else 3)

        assert in_a_child(child) == 0

    def test_a_child_that_a_hook_forks_can_change_nothing(self) -> None:
        thing, found = Thing(), list[int]()
        thing.change(lambda: found.append(in_a_child(thing.change)))
        assert found == [0]

    @pytest.mark.parametrize("call", ["change", "make", "look"])
    @pytest.mark.parametrize("hook", [True, False])
    def test_a_call_of_the_childs_own_cannot_change_what_is_its_parents(self, call: str, *, hook: bool) -> None:
        parents = Thing()

        def change() -> None:
            use = partial(getattr(parents, call))
            Thing().change(partial(call_out, use, ()) if hook else use)

        assert in_a_child(change) == 0

    def test_a_child_of_a_hook_leaves_the_signals_of_its_parent_to_the_parent(self) -> None:
        parent, seen = os.getpid(), list[int]()

        def handler(number: int, frame: FrameType | None) -> None:
            if os.getpid() != parent:
                os._exit(7)
            seen.append(number)

        before = signal.signal(signal.SIGUSR2, handler)
        found = list[int]()
        Thing().change(each(partial(press, signal.SIGUSR2), lambda: found.append(in_a_child(lambda: Thing().change()))))
        signal.signal(signal.SIGUSR2, before)
        assert (found, seen) == ([1], [signal.SIGUSR2])

    def test_the_child_of_another_thread_puts_its_own_signals_off(self) -> None:
        def work() -> None:
            def handler(number: int, frame: FrameType | None) -> None:
                raise InterruptionError

            def change() -> None:
                signal.signal(signal.SIGUSR2, handler)
                thing = Thing()
                with suppress(InterruptionError):
                    thing.change(partial(press, signal.SIGUSR2))
                assert thing.events == ["begin", "end"]

            found.append(in_a_child(change))

        found = list[int]()
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        assert found == [1]

    @pytest.mark.parametrize("by_name", [False, True], ids=["by position", "by name"])
    def test_a_function_that_is_given_an_object_of_the_parent_is_refused(self, *, by_name: bool) -> None:
        def undo(made: object) -> None:
            del made

        @uninterrupted()
        def use(thing: Thing) -> None:
            thing.change()

        class User:
            @constructing(undo)
            def __init__(self, thing: Thing) -> None:
                thing.change()

        thing = Thing()
        for call in (use, User):
            given = partial(call, thing=thing) if by_name else partial(call, thing)
            assert in_a_child(given) == 0


def test_an_exception_that_takes_no_note_is_not_replaced() -> None:
    """A frozen dataclass is one."""

    class Broken(Thing, ContextManager):
        @closing
        def close(self) -> None:
            raise OSError("no")

    with pytest.raises(FrozenError), Broken():
        raise FrozenError(3)
