"""The guard: one place with the rules for threads, finalizers, signals and forks. All calls with state go through it.

Python can run code of the program in the middle of almost any line of this package. A signal handler runs in the main
thread, a finalizer in any thread. A child can be forked while any lock is held. Four rules keep the address space, the
table of mappings and the blocks consistent:

1. *Forks* are checked before a lock is taken. In a child of the process that made the object, a call raises ForkedError
   and a close does nothing. Parent and child share the kernel object, and the child would change the state of the
   parent. `os.register_at_fork` reports forks, so that no call asks the kernel for the pid.
2. *Finalizers.* The garbage collector can finalize an object in a thread that holds any lock, in the middle of any
   change. Inside a guarded call, a close by the same thread is deferred to the end of the call. Therefore no structure
   changes during a search, and the order in which locks are taken is fixed. A finalizer must make no call but a close.
   Hooks of notifiers are code of the program that runs between two steps: `call_out` lets a hook close a mapping at
   once. A close in one step (`closing_in_one_step`) is never deferred: nothing can run in the middle of the step.
3. *Signals.* A handler that raises must not run between a change that the kernel made and the record of the change.
   Python runs handlers in the main thread only. During a guarded call of the main thread, signals whose handlers are
   Python functions are noted. The handlers run at `checkpoint`, between the pieces of a long change, and at the end of
   the call. An exception from a checkpoint counts as a refusal, and the change is undone. A call that makes an
   object names an undo. If a handler raises at the end of such a call, the caller never receives the object, and the
   undo disposes of the object. A look-up defers no handler, since an interrupted look-up leaves no partial change. A
   change that a handler makes during a look-up is a separate guarded call.
4. *Locks.* Each object has one lock. Locks are taken downwards: list of blocks, mapper, container, group, device. A
   guarded call waits for no code of the program except hooks and progress callbacks. Waiting for an interrupt takes no
   lock.

How signals are deferred: the outermost guarded call of the main thread replaces each handler that is a Python function
by `_Signals.route`. While `inside` is set, `route` notes the signal; otherwise `route` calls the handler. Only the
assignment to `inside` switches between the two, so there is no intermediate state. If an exception leaves a replacement
in place, the next signal or call removes the replacement. A signal mask cannot be used: the kernel then delivers the
signal to another thread, and Python still runs the handler in the main thread. Ten signals are deferred (`_NAMES`), the
ones whose handlers raise in practice. Checking all signals would cost more than the rest of the guard.

If `signal.siginterrupt` has set a flag for one of these signals, the flag is lost. Python's own calls do not depend on
that flag. docs/architecture.md has the costs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from importlib import import_module
from logging import getLogger
from threading import RLock, get_ident, main_thread
from types import FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeAlias, TypeVar, TypeVarTuple
from weakref import WeakSet

from pyvfio.errors import ForkedError


def check_gil(*, enabled: bool) -> None:
    """Raise ImportError if Python runs without the GIL.

    Rule 3 relies on handlers that run between two bytecodes of the main thread. Register accesses rely on an item
    access of a memoryview that no other thread interrupts. Without the GIL, Python guarantees neither.
    """
    if not enabled:
        raise ImportError(
            "pyvfio needs the global interpreter lock (GIL), and this Python runs without it. Start Python with "
            "PYTHON_GIL=1 or with -X gil=1"
        )


check_gil(enabled=getattr(sys, "_is_gil_enabled", lambda: True)())  # Python 3.13 is the first without a GIL

_logger = getLogger(__name__)

_Given = ParamSpec("_Given")
_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")
_Thing = TypeVar("_Thing")
_Handler: TypeAlias = Callable[[int, FrameType | None], object]

_TURNS = 16  # rounds of closing dependents; after the last one, the close itself decides
_PATIENCE = 0.05  # seconds between two checkpoints of the main thread while waiting for a lock


class Guard:
    """The lock of one object, the pid of the process that made the object, and `what`: the object's name in errors.

    Synchronization: any thread. Cost: two calls of sigaction(2) per replaced handler, for each outermost call of the
    main thread.
    """

    __slots__ = ("lock", "pid", "what")

    def __init__(self, what: str, *, lock: RLock | None = None) -> None:
        """Make a guard with a new lock, or with the `lock` of another object that shares its lock with this one."""
        self.what = what
        self.pid = _signals.process
        self.lock = RLock() if lock is None else lock

    @property
    def forked(self) -> bool:
        """Whether this process is a forked child of the process that made the object."""
        return self.pid != _signals.process

    def check(self) -> None:
        """Raise ForkedError in a forked child of the process that made the object."""
        if self.pid != _signals.process:
            raise ForkedError(self.what, owner=self.pid, child=_signals.process)


class Guarded(Protocol):
    """An object with a guard."""

    @property
    def guard(self) -> Guard:
        """The guard of the object."""
        ...


class Source(Guarded, Protocol):
    """An object with dependents, which are closed before the object."""

    def close_dependents(self) -> None:
        """Close all dependents. The caller holds no lock."""
        ...

    def end_dependents(self) -> bool:
        """Refuse new dependents from now on. Return whether none is left. The caller holds the lock."""
        ...


_Self = TypeVar("_Self", bound=Guarded)
_Source = TypeVar("_Source", bound=Source)
_Made = TypeVar("_Made")


class ContextManager:
    """The base of all classes with `close()`: the end of a `with` block closes the object.

    If the block raises, the exception is never replaced: an error of the close is added as a note. If the block does
    not raise, `with` raises the error of the close.
    """

    __slots__ = ()

    def close(self) -> None:
        """Close the object."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            with suppress(Exception):  # an exception class can refuse new attributes
                error.add_note(f"{type(self).__name__} could not be closed: {failure}")


class _Place:
    """The state of a thread.

    * `inside`: in a guarded call. `busy`: in a guarded call, and not in a hook that the call makes.
    * `looking`: in a look-up outside of guarded calls. `undoing`: the number of nested undos in progress.
    * `lock`: the lock of the outermost call. `put_off`: the closes that are deferred to the end of that call.
    * `signals`: the handlers, in the main thread; None in other threads.
    """

    __slots__ = ("busy", "inside", "lock", "looking", "put_off", "signals", "undoing")

    def __init__(self) -> None:
        self.signals = _signals if get_ident() == _signals.main else None
        self.inside = self.busy = self.looking = False
        self.undoing = 0
        self.lock: RLock | None = None
        self.put_off: deque[Callable[[], object]] = deque()


class _Thread(threading.local):
    """The place of each thread. Access to a thread-local attribute costs eight times an access to the place."""

    def __init__(self) -> None:
        self.place = _Place()


_NAMES = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM", "SIGVTALRM", "SIGPROF", "SIGXCPU")
_ALL = tuple(int(getattr(signal, name)) for name in _NAMES)
"""The deferred signals: requests to terminate, timers, and SIGUSR1 and SIGUSR2."""

_functions = import_module("_signal")  # the wrappers in `signal` make enums of numbers, at ten times the cost
_get: Callable[[int], object] = _functions.getsignal
_set_handler: Callable[[int, _Handler], _Handler] = _functions.signal
_A, _B, _C, _D, _E, _F, _G, _H, _I, _J = _ALL


class _Signals:
    """The handlers of the main thread: those that `route` replaces, and the noted signals.

    No loop here is in a `try` whose cleanup matters. CPython 3.12 and 3.13 run handlers at the jump back to the start
    of a loop, and that point does not belong to the `try`.
    """

    def __init__(self) -> None:
        self._route: _Handler = self.route
        self._seen: tuple[object, ...] = ()
        # The handlers that were Python functions at the last check. A walk over a dict costs twice as much.
        self._handlers: tuple[tuple[int, _Handler], ...] = ()
        self._known: dict[int, _Handler] = {}  # the last such handler of each signal: a program may have saved `route`
        self.noted: dict[int, _Handler] = {}  # each signal once, as a pending signal in the kernel; in order of arrival
        self.main: int | None = main_thread().ident
        self.process = os.getpid()

    def replace(self) -> None:
        """Replace each handler that is a Python function by `route`."""
        get, route = _get, self._route
        # A loop would take twice the time, and each outermost call begins here.
        seen = get(_A), get(_B), get(_C), get(_D), get(_E), get(_F), get(_G), get(_H), get(_I), get(_J)
        if seen != self._seen:
            self._look(seen)
        for number, handler in self._handlers:
            if (found := _set_handler(number, route)) is not handler and found is not route:
                self._learn(number, found)

    def _learn(self, number: int, handler: _Handler) -> None:
        """Record a handler that compares equal to the previous one but is another object."""
        self._known = {**self._known, number: handler}
        self._handlers = tuple({**dict(self._handlers), number: handler}.items())
        self._seen = ()
        if number in self.noted:
            self.noted[number] = handler

    def _look(self, seen: tuple[object, ...]) -> None:
        handlers: dict[int, _Handler] = {}
        for number, handler in zip(_ALL, seen, strict=True):
            if handler is self._route:  # not restored yet, or set again by a program that had saved `route`
                if number in self._known:
                    handlers[number] = self._known[number]
            elif callable(handler):
                handlers[number] = handler
        # One assignment each: a signal can reach `route` during any call above.
        self._known = {**self._known, **handlers}
        self._handlers, self._seen = tuple(handlers.items()), seen

    def put_back(self) -> None:
        """Restore the handler of each signal, and run the handlers of noted signals.

        A handler that the program has set in between stays. If a handler raises, the caller must call `deliver`.
        """
        for number, handler in self._handlers:
            if (other := _set_handler(number, handler)) is not self._route:
                _set_handler(number, other)
        if self.noted:
            self.deliver()

    def deliver(self) -> None:
        """Run the handlers of all noted signals. If one handler raises, the later ones run too."""
        due, self.noted = self.noted, {}
        if due:
            _handle_each(list(due.items()), sys._getframe(1))

    def route(self, number: int, frame: FrameType | None) -> None:
        """Note a signal during a guarded call; otherwise run the handler at once."""
        del frame
        if number in self._known:
            self.noted[number] = self._known[number]
        if not _thread.place.inside:
            try:
                self.put_back()
            finally:
                self.deliver()

    def after_fork(self) -> None:
        """Reset the state in a forked child: this thread is the main thread, and noted signals are the parent's."""
        self.main, self.process = get_ident(), os.getpid()
        self.noted.clear()
        self.put_back()


def _handle_each(due: Sequence[tuple[int, _Handler]], frame: FrameType) -> None:
    number, handler = due[0]
    try:
        handler(number, frame)
    finally:
        if len(due) > 1:
            _handle_each(due[1:], frame)


_signals = _Signals()
_thread = _Thread()

_MISSING: Any = object()
"""In place of the result of a call that has not returned."""


# --------------------------------------------------------------------------------------------------------- decorators


def guarded(call: Callable[Concatenate[_Self, _Given], _Result]) -> Callable[Concatenate[_Self, _Given], _Result]:
    """Decorate a method that changes state: all four rules apply. Raises ForkedError in a child."""
    return _enclosed(call, None)


def making(
    undo: Callable[[_Result], object],
) -> Callable[[Callable[Concatenate[_Self, _Given], _Result]], Callable[Concatenate[_Self, _Given], _Result]]:
    """Decorate a method that returns a new object. Otherwise as `guarded`.

    If a signal handler raises after the object is made and before the caller receives it, `undo(object)` is called.
    """

    def decorate(
        call: Callable[Concatenate[_Self, _Given], _Result],
    ) -> Callable[Concatenate[_Self, _Given], _Result]:
        return _enclosed(call, undo)

    return decorate


def _enclosed(call: Callable[..., _Result], undo: Callable[[_Result], object] | None) -> Callable[..., _Result]:
    # The code of `_within` and `_run`, inlined: one more call would add a tenth to the cost.
    @wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> _Result:  # passing on a tuple with `self` in it costs half as much
        place, guard = _thread.place, args[0].guard
        lock = guard.lock
        if guard.pid != _signals.process:
            guard.check()
        if place.inside:
            busy = place.busy
            lock.acquire(busy) or _wait_for(lock)
            place.busy = True
            try:
                return call(*args, **kwargs) if kwargs else call(*args)  # passing on no names costs less
            finally:
                place.busy = busy
                lock.release()
        begun, result = False, _MISSING
        try:
            place.inside = place.busy = True
            if place.signals is not None:
                place.signals.replace()
            place.lock = lock
            lock.acquire(False) or _wait_for(lock)  # noqa: FBT003 (a keyword argument costs as much as the lock)
            begun = True
            result = call(*args, **kwargs) if kwargs else call(*args)
            lock.release()
            place.lock = None
            if place.put_off or _signals.noted:
                _handle(place)
            place.inside = place.busy = False
            if place.signals is not None:
                place.signals.put_back()
        except BaseException:
            if not begun:  # a handler that is not replaced can raise during a call above
                place.inside = place.busy = False
            _abandon(place, undo, result)
            raise
        return result

    return wrapper


def constructing(
    undo: Callable[..., object],
) -> Callable[[Callable[Concatenate[_Made, _Given], None]], Callable[Concatenate[_Made, _Given], None]]:
    """Decorate `__init__`: all rules but the lock apply. Forks are checked on the arguments that have a guard.

    `undo(self)` is called as for `making`.
    """

    def decorate(call: Callable[Concatenate[_Made, _Given], None]) -> Callable[Concatenate[_Made, _Given], None]:
        @wraps(call)
        def wrapper(self: _Made, /, *args: _Given.args, **kwargs: _Given.kwargs) -> None:
            _check_given(args, kwargs)
            _run(_thread.place, None, lambda _: undo(self), call, (self, *args), kwargs)

        return wrapper

    return decorate


def uninterrupted(
    undo: Callable[..., object] | None = None,
) -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """Decorate a function without a guard: all rules but the lock apply.

    Forks are checked on the arguments that have a guard. `undo(answer)` is called as for `making`.
    """

    def decorate(call: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        @wraps(call)
        def wrapper(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
            _check_given(args, kwargs)
            answer: _Result = _run(_thread.place, None, undo, call, args, kwargs)
            return answer

        return wrapper

    return decorate


def reading(call: Callable[Concatenate[_Self, _Given], _Result]) -> Callable[Concatenate[_Self, _Given], _Result]:
    """Decorate a look-up: the rules for forks, finalizers and locks apply. A signal handler can raise at any point."""

    @wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> _Result:
        place, guard = _thread.place, args[0].guard
        looking = place.looking
        if guard.pid != _signals.process:
            guard.check()
        try:
            place.looking = True
            with guard.lock:  # no handler can raise between the acquisition and the `with` block
                return call(*args, **kwargs)
        finally:
            place.looking = looking
            if (place.put_off or _signals.noted) and not (looking or place.inside):
                _run(place, None, None, _nothing, (), {})

    return wrapper


def closing(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
    """Decorate a close: does nothing in a child, is deferred inside a guarded call, and is otherwise as `guarded`."""

    @wraps(call)
    def wrapper(self: _Self, /) -> None:
        place, guard = _thread.place, self.guard
        if guard.pid != _signals.process:
            return
        if place.inside or place.looking:
            place.put_off.append(partial(_close, self, call, _own))
        else:
            _run(place, guard.lock, None, call, (self,), {})

    return wrapper


def closing_in_one_step(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
    """Decorate a close that only records that the object is closed: does nothing in a child, and is never deferred.

    `call` makes its changes in one statement without a call, such as an assignment to a dict of the owner: no handler,
    finalizer or thread comes in between. A guarded call of the owner does the rest.
    """

    @wraps(call)
    def wrapper(self: _Self, /) -> None:
        if self.guard.pid == _signals.process:
            call(self)

    return wrapper


def closing_after_dependents(call: Callable[[_Source], None]) -> Callable[[_Source], None]:
    """Decorate a close as `closing`, and call `close_dependents` first.

    `close_dependents` runs with no lock held, since the locks of the dependents are above this one. An exception of
    `close_dependents` ends the close. `close_now` does not call `close_dependents`.
    """

    @wraps(call)
    def wrapper(self: _Source, /) -> None:
        if not self.guard.forked:
            run_outside(partial(_close_after_dependents, self, call))

    return wrapper


def closing_under(
    uppermost: Callable[[_Self], Guard],
) -> Callable[[Callable[[_Self], None]], Callable[[_Self], None]]:
    """Decorate a close as `closing`, but under the lock of another object.

    That lock is above the object's own lock, and the close needs both.
    """

    def decorate(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
        @wraps(call)
        def wrapper(self: _Self, /) -> None:
            if not self.guard.forked:
                run_outside(partial(_close, self, call, uppermost))

        wrapper.uppermost = uppermost  # type: ignore[attr-defined]
        return wrapper

    return decorate


def closing_in_hooks(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
    """Decorate a close as `closing`, except that a close in a hook is not deferred.

    For objects whose lock is below the lock of the list of blocks: the caller of the hook holds the list's lock.
    """

    @wraps(call)
    def wrapper(self: _Self, /) -> None:
        place, guard = _thread.place, self.guard
        if guard.pid != _signals.process:
            return
        if place.busy or place.looking:
            place.put_off.append(partial(_close, self, call, _own))
        else:
            _run(place, guard.lock, None, call, (self,), {})

    return wrapper


# --------------------------------------------------------------------------------------------------- inside a call


def call_out(hook: Callable[[*_Arguments], _Result], arguments: tuple[*_Arguments]) -> _Result:
    """Call code of the program, such as a notifier's hook, inside a guarded call.

    The call is a checkpoint, and the hook can close a mapping at once. The only lock held is that of the list.
    """
    if _signals.noted:
        checkpoint()
    place = _thread.place
    place.busy = False
    try:
        return hook(*arguments)
    finally:
        place.busy = place.inside


def call_out_each(things: Sequence[_Thing], name: str, arguments: tuple[Any, ...], called: list[_Thing]) -> None:
    """Call the hook `name` of each of `things` that has one, as `call_out` does. Make a checkpoint at the end.

    `called` receives each of `things` whose hook has returned or is missing.
    """
    place = _thread.place
    for thing in things:
        hook = getattr(thing, name, None)
        if hook is not None:
            if _signals.noted:
                checkpoint()
            place.busy = False
            try:
                hook(*arguments)
            finally:
                place.busy = place.inside
        called.append(thing)
    if _signals.noted:
        checkpoint()


class _Undoing:
    """The class of `undoing`. One object serves all threads, since it has no state."""

    def __enter__(self) -> None:
        _thread.place.undoing += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place = _thread.place
        place.undoing = max(place.undoing - 1, 0)  # a child that the undo forked begins with 0


undoing = _Undoing()
"""A context for an undo or a close that runs code with checkpoints, such as a notifier's hook. No checkpoint in the
context runs a signal handler."""


def is_undoing() -> bool:
    """Return whether this thread is in the context `undoing`, where no step can be refused."""
    return _thread.place.undoing > 0


def checkpoint() -> None:
    """Run the handlers of noted signals. Does nothing in an undo. Raises the exceptions of the handlers.

    A guarded call makes checkpoints between the pieces of its work. An exception there leads to the ordinary undo.
    Cost: the read of one attribute, if no signal is noted.
    """
    if _signals.noted and (place := _thread.place).signals is not None and not place.undoing:
        _signals.deliver()


def run_outside(step: Callable[[], object]) -> None:
    """Call `step` at once, or, inside a guarded call of this thread, at the end of that call.

    For finalizers. An exception of a deferred step is logged, since no caller can receive it.
    """
    place = _thread.place
    if place.inside or place.looking:
        place.put_off.append(step)
    else:
        step()


def run_outside_or_in_hook(step: Callable[[], object]) -> None:
    """Call `step` as `run_outside`, except that a hook does not defer the step."""
    place = _thread.place
    if place.busy or place.looking:
        place.put_off.append(step)
    else:
        step()


@contextmanager
def holding(*things: Guarded) -> Iterator[None]:
    """Hold the locks of several objects, in the order of rule 4. For use inside a guarded call."""
    with ExitStack() as stack:
        for thing in things:
            stack.enter_context(thing.guard.lock)
        yield


def close_now(thing: Guarded) -> None:
    """Close `thing` at once, under its lock, inside the guarded call that owns `thing`.

    Raises the exceptions of the close.
    """
    close = type(thing).close  # type: ignore[attr-defined]
    with getattr(close, "uppermost", _own)(thing).lock:
        close.__wrapped__(thing)


# ------------------------------------------------------------------------------------------------------------ internals


def _check_given(args: Iterable[object], kwargs: Mapping[str, object]) -> None:
    """Raise ForkedError if an argument is an object that a parent of this process made."""
    if _thread.place.busy:
        return
    for given in (*args, *kwargs.values()):
        if isinstance(guard := getattr(given, "guard", None), Guard):
            guard.check()


def _own(thing: Guarded) -> Guard:
    return thing.guard


def _close(thing: _Self, call: Callable[[_Self], None], uppermost: Callable[[_Self], Guard]) -> None:
    """Close `thing` outside of all guarded calls, or at the end of one. No lock is held there."""
    _run(_thread.place, uppermost(thing).lock, None, call, (thing,), {})


def _close_after_dependents(thing: _Source, call: Callable[[_Source], None]) -> None:
    _run(_thread.place, None, None, _close_both, (thing, call), {})


def _close_both(thing: _Source, call: Callable[[_Source], None]) -> None:
    lock = thing.guard.lock
    for turn in range(_TURNS):
        thing.close_dependents()
        if not lock.acquire(blocking=False):
            _wait_for(lock)
        try:
            if thing.end_dependents() or turn == _TURNS - 1:  # otherwise another thread made a dependent in between
                call(thing)
                return
        finally:
            lock.release()


def _nothing() -> None:
    """Do nothing: `_run` then runs only deferred closes and handlers."""


def _run(  # noqa: PLR0917 (see below)
    place: _Place,
    lock: RLock | None,
    undo: Callable[[_Result], object] | None,
    call: Callable[..., _Result],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> _Result:
    """Make a call, inside another or as the outermost. If a handler raises at the end, `undo` gets the call's result.

    Do not call this with `*args`: CPython 3.11 runs handlers after such a call, before the result is stored.
    """
    if place.inside:
        return _within(place, lock, call, args, kwargs)
    begun, result = False, _MISSING
    try:
        place.inside = place.busy = True  # defers closes of finalizers: an outermost call would restore the handlers
        if place.signals is not None:
            place.signals.replace()  # signals are noted from here on
        if lock is not None:
            place.lock = lock  # before acquire(): if a handler raises in between, `_abandon` still releases the lock
            lock.acquire(False) or _wait_for(lock)  # noqa: FBT003 (a keyword argument costs as much as the lock)
        begun = True
        result = call(*args, **kwargs) if kwargs else call(*args)
        if lock is not None:
            lock.release()
            place.lock = None
        if place.put_off or _signals.noted:
            _handle(place)  # before handlers are restored: a signal that arrives during the undo is noted
        place.inside = place.busy = False  # handlers run at once from here on
        if place.signals is not None:
            place.signals.put_back()
    except BaseException:
        if not begun:  # a handler that is not replaced can raise during a call above
            place.inside = place.busy = False
        _abandon(place, undo, result)
        raise
    return result


def _within(
    place: _Place, lock: RLock | None, call: Callable[..., _Result], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Result:
    busy = place.busy
    if lock is not None and not lock.acquire(busy):  # a hook leaves no partial change, so a handler can raise
        _wait_for(lock)
    place.busy = True
    try:
        return call(*args, **kwargs)
    finally:
        place.busy = busy
        if lock is not None:
            lock.release()


def _abandon(place: _Place, undo: Callable[[_Result], object] | None, result: _Result) -> None:
    """End an outermost call that raised, or whose handlers raised. `undo` gets the result of the call, if any."""
    try:
        _unlock(place)
        if undo is not None and result is not _MISSING:
            _undo(place, partial(undo, result))
    finally:
        try:
            _leave(place)
        finally:
            if place.inside:  # an exception set by another thread interrupted the first `_leave`
                _leave(place)


def _undo(place: _Place, undo: Callable[[], object]) -> None:
    """Run the undo as a separate outermost call: a second handler can raise after the end of the first call."""
    try:
        if not place.inside:
            place.inside = place.busy = True
            if place.signals is not None:
                place.signals.replace()
    finally:
        with undoing:
            undo()


def _leave(place: _Place) -> None:
    """End an outermost call: run the deferred closes and the handlers of noted signals."""
    _unlock(place)
    try:
        if place.put_off or _signals.noted:
            _handle(place)
    finally:
        place.inside = place.busy = False
        if place.signals is not None:
            try:
                place.signals.put_back()
            finally:
                if _signals.noted:
                    _signals.deliver()


def _unlock(place: _Place) -> None:
    lock = place.lock
    if lock is not None:
        try:  # noqa: SIM105 (suppress() would cost as much as another method call)
            lock.release()
        except RuntimeError:  # the lock was not acquired yet
            pass
        place.lock = None


def _handle(place: _Place) -> None:
    """Run the handlers of noted signals, then the deferred closes.

    A signal that arrives during this is noted, so that each handler runs once.
    """
    try:
        if _signals.noted and place.signals is not None:
            place.busy = False  # a handler can close a mapping, as a hook can
            _signals.deliver()
    finally:
        place.busy = place.inside
        if place.put_off:
            _catch_up(place)


def _wait_for(lock: RLock) -> bool:
    while not lock.acquire(timeout=_PATIENCE):
        checkpoint()
    return True


def _catch_up(place: _Place) -> None:
    while place.put_off and not place.looking:
        try:
            with undoing:  # an interrupted close would never be finished
                place.put_off.popleft()()
        except Exception:
            _logger.exception("a close that a finalizer requested during another call failed")


class Forgettable(Protocol):
    """An object that a forked child must not use, and whose calls are too short for a check of the process."""

    def forget(self) -> None:
        """Make each later use raise, without a system call."""
        ...


_forgettable: WeakSet[Forgettable] = WeakSet()


def forget_in_child(thing: Forgettable) -> None:
    """Call `thing.forget()` in each child that is forked while `thing` exists."""
    _forgettable.add(thing)


def _after_fork() -> None:
    for thing in tuple(_forgettable):
        thing.forget()
    _thread.place.put_off.clear()  # these belong to the parent
    _signals.after_fork()
    _thread.place = _Place()


os.register_at_fork(after_in_child=_after_fork)
