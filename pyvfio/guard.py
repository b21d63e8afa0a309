"""Threads, finalizers, signals and forks: the one place with the rules, which every call that has state goes through.

Python can run code of the program's in the middle of almost any line of this package: a signal handler in the main
thread, a finalizer in any thread. A child can be forked while any lock is held. Four rules keep an address space, its
table and the blocks right all the same:

1. *Forks* are decided before a lock is taken. In a child of the process that made the object a call raises ForkedError,
   and a close does nothing: the kernel's object is shared, so the child would act on its parent.
2. *Finalizers.* A collection can finalize an object in a thread that holds any lock and is in the middle of any change.
   A close that arrives while its thread is inside a guarded call is put off until that call ends. So no structure
   changes under a search, and no lock is taken in an order that nobody planned. A finalizer must call nothing but a
   close. Hooks of notifiers are the program's own code, called between two steps: `call_out` lets a hook close a
   mapping at once.
3. *Signals.* A handler that raises must not come between a change that the kernel made and its record here. Python runs
   handlers in the main thread only. There the handlers that are Python functions are noted for the time of a guarded
   call. They run at `checkpoint`, between the pieces of a long change, and when the call ends. An exception that a
   checkpoint raises is a refusal like any other, and the ordinary undo follows. A call that makes an object names its
   undo, for the object that nobody receives because a handler raises at the end. A look-up puts no handler off, since
   it leaves nothing half done; a change that a handler makes meanwhile is a guarded call of its own.
4. *Locks.* Each object has one, and they are taken downwards: list of blocks, mapper, container, group, device. A
   guarded call waits for no code of the program's but hooks and progress callbacks. A wait for an interrupt takes none.

How signals are put off: for the outermost guarded call of the main thread each handler that is a Python function is
replaced by `_Signals.route`, which notes the signal while `inside` is set and calls the handler otherwise. The
replacement only leads here, and the one assignment to `inside` decides. So half of it never holds, and a replacement
that an exception left behind is undone by the next signal or call. A signal mask would not do: the kernel then delivers
a signal to another thread, and Python still runs its handler in the main thread. Ten signals are put off (`_NAMES`),
those whose handlers raise: a look at all of them would cost more than the rest of the guard.

A flag that `signal.siginterrupt` has set for one of them is lost, which Python's own calls do not notice. The page on
architecture has the cost.
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
from os import getpid
from threading import RLock, get_ident, main_thread
from types import FrameType, TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeAlias, TypeVar, TypeVarTuple
from weakref import WeakSet

from pyvfio.errors import ForkedError

_logger = getLogger(__name__)

_Given = ParamSpec("_Given")
_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")
_Handler: TypeAlias = Callable[[int, FrameType | None], object]

_TURNS = 16  # of closing dependents before the close of what they depend on gives up
_PATIENCE = 0.05  # seconds between two checkpoints of the main thread while it waits for a lock


class Guard:
    """The lock of one object, the process that made it, and `what` an error calls it.

    Synchronization: any thread. Cost: one system call (getpid) for each outermost call.
    """

    __slots__ = ("lock", "pid", "what")

    def __init__(self, what: str, *, lock: RLock | None = None) -> None:
        """`lock`: of the object that this one is a part of, where one lock is for both."""
        self.what = what
        self.pid = os.getpid()
        self.lock = RLock() if lock is None else lock

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the process that made the object."""
        return os.getpid() != self.pid

    def check(self) -> None:
        """Raise ForkedError in a child of the process that made the object.

        Inside of a call this process is known: a system call less for each step.
        """
        here = _signals.process if _thread.place.inside else os.getpid()
        if here != self.pid:
            raise ForkedError(self.what, owner=self.pid, child=here)


class Guarded(Protocol):
    """An object with a guard."""

    @property
    def guard(self) -> Guard:
        """Its guard."""
        ...


class Source(Guarded, Protocol):
    """An object with dependents, which end before it does."""

    def close_dependents(self) -> None:
        """Close them, with no lock held."""
        ...

    def end_dependents(self) -> bool:
        """Let none come any more, under the lock. Return whether there is none."""
        ...


_Self = TypeVar("_Self", bound=Guarded)
_Source = TypeVar("_Source", bound=Source)
_Made = TypeVar("_Made")


class ContextManager:
    """A base of each class with `close()`: leaving a `with` block closes the object.

    An exception of the block's own is never replaced: an error of the close is added to it as a note. Where the block
    raises nothing, `with` raises the error of the close.
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
            with suppress(Exception):  # an exception may be frozen
                error.add_note(f"{type(self).__name__} could not be closed: {failure}")


class _Place:
    """Where a thread is. `inside`: in a guarded call. `busy`: and not in a hook that the call has called. `looking`: in
    a look-up that no guarded call makes. `undoing`: in so many undos. `lock`: of the outermost call. `put_off`: the
    closes for its end. `signals`: the handlers, in the main thread."""

    __slots__ = ("busy", "inside", "lock", "looking", "put_off", "signals", "undoing")

    def __init__(self) -> None:
        self.signals = _signals if get_ident() == _signals.main else None
        self.inside = self.busy = self.looking = False
        self.undoing = 0
        self.lock: RLock | None = None
        self.put_off: deque[Callable[[], object]] = deque()


class _Thread(threading.local):
    """Each thread's place: a look-up here costs as much as eight in a place."""

    def __init__(self) -> None:
        self.place = _Place()


_NAMES = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM", "SIGVTALRM", "SIGPROF", "SIGXCPU")
_ALL = tuple(int(getattr(signal, name)) for name in _NAMES)
"""The signals that are put off: those by which a program is asked to end or told the time, and its own."""

_functions = import_module("_signal")  # `signal` wraps them to make enums of numbers, at ten times their cost
_get_handler: Callable[[int], object] = _functions.getsignal
_set_handler: Callable[[int, _Handler], _Handler] = _functions.signal


class _Signals:
    """The handlers of the main thread: which ones `route` stands for, and which signals are to be handled.

    No loop here is in a `try` whose end matters: CPython 3.12 and 3.13 run handlers where a loop begins anew, and do
    not count that place as a part of the `try`.
    """

    def __init__(self) -> None:
        self._route: _Handler = self.route
        self._seen: tuple[object, ...] = ()
        self._handlers: dict[int, _Handler] = {}  # of the signals that a function handled when it was last looked
        self._known: dict[int, _Handler] = {}  # the last such handler of each: a program may have kept `route` for it
        self.noted: dict[int, _Handler] = {}  # in their order, each once, as the kernel keeps them
        self.main: int | None = main_thread().ident
        self.process = os.getpid()

    def replace(self) -> None:
        """Let `route` stand in the place of each handler that is a function."""
        seen = tuple(map(_get_handler, _ALL))
        if seen != self._seen:
            self._look(seen)
        for number in self._handlers:
            _set_handler(number, self._route)

    def _look(self, seen: tuple[object, ...]) -> None:
        handlers: dict[int, _Handler] = {}
        for number, handler in zip(_ALL, seen, strict=True):
            if handler is self._route:  # not put back yet, or put there by a handler that found it
                if number in self._known:
                    handlers[number] = self._known[number]
            elif callable(handler):
                handlers[number] = handler
        # In one step each: a signal may come to `route` at any call above.
        self._known = {**self._known, **handlers}
        self._handlers, self._seen = handlers, seen

    def put_back(self) -> None:
        """Give each signal its handler back, unless the program has set another one. `deliver` has to follow."""
        for number, handler in self._handlers.items():
            if (other := _set_handler(number, handler)) is not self._route:
                _set_handler(number, other)

    def deliver(self) -> None:
        """Run the handlers of the signals that came until now, also those behind one that raises."""
        due, self.noted = self.noted, {}
        if due:
            _handle_each(list(due.items()), sys._getframe(1))

    def route(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, or handle it at once where no guarded call is under way."""
        del frame
        if number in self._known:
            self.noted[number] = self._known[number]
        if not _thread.place.inside:
            try:
                self.put_back()
            finally:
                self.deliver()

    def after_fork(self) -> None:
        """In a child: this is the main thread, and what the parent had noted is the parent's."""
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


# --------------------------------------------------------------------------------------------------------- decorators


def guarded(call: Callable[Concatenate[_Self, _Given], _Result]) -> Callable[Concatenate[_Self, _Given], _Result]:
    """Decorate a method that changes state: all four rules. Raises ForkedError in a child."""

    @wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> _Result:  # a tuple that has `self` is handed on at half the cost
        place, guard = _thread.place, args[0].guard
        lock = guard.lock
        if place.inside:  # as `_within`, in one piece: each call more would cost a tenth of all of it
            if guard.pid != _signals.process:
                guard.check()
            busy = place.busy
            if busy:
                lock.acquire()
            elif not lock.acquire(False):  # noqa: FBT003 (a keyword costs as much as the lock)
                _wait_for(lock)
            place.busy = True
            try:
                return call(*args, **kwargs)
            finally:
                place.busy = busy
                lock.release()
        if getpid() != guard.pid:
            guard.check()
        try:  # around `_enter`, too: what is not put off may raise when it returns
            _enter(place, lock)
            return call(*args, **kwargs)
        finally:
            try:
                _leave(place)
            finally:
                if place.inside:  # an exception that another thread has set came when it began
                    _leave(place)  # type: ignore[unreachable]

    return wrapper


def making(
    undo: Callable[[_Result], object],
) -> Callable[[Callable[Concatenate[_Self, _Given], _Result]], Callable[Concatenate[_Self, _Given], _Result]]:
    """Decorate a method that returns a new object, as `guarded`. `undo(object)` is called where a signal handler raises
    when the object is made and not yet returned."""

    def decorate(
        call: Callable[Concatenate[_Self, _Given], _Result],
    ) -> Callable[Concatenate[_Self, _Given], _Result]:
        @wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> _Result:
            place, guard = _thread.place, args[0].guard
            if guard.pid != (_signals.process if place.inside else getpid()):
                guard.check()
            return _run(place, guard.lock, undo, call, args, kwargs)

        return wrapper

    return decorate


def constructing(
    undo: Callable[..., object],
) -> Callable[[Callable[Concatenate[_Made, _Given], None]], Callable[Concatenate[_Made, _Given], None]]:
    """Decorate `__init__`: all but the lock; forks by the arguments that have a guard. `undo(self)` as for `making`."""

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
    """Decorate a function that has no guard: all but the lock; forks by the arguments that have one. `undo` as for
    `making`."""

    def decorate(call: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        @wraps(call)
        def wrapper(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
            _check_given(args, kwargs)
            answer: _Result = _run(_thread.place, None, undo, call, args, kwargs)
            return answer

        return wrapper

    return decorate


def reading(call: Callable[Concatenate[_Self, _Given], _Result]) -> Callable[Concatenate[_Self, _Given], _Result]:
    """Decorate a method that only looks: forks, finalizers and the lock. A signal handler may raise in the middle."""

    @wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> _Result:
        place, guard = _thread.place, args[0].guard
        looking = place.looking
        if guard.pid != (_signals.process if place.inside else getpid()):
            guard.check()
        try:
            place.looking = True
            with guard.lock:  # no handler can raise between these two words
                return call(*args, **kwargs)
        finally:
            place.looking = looking
            if (place.put_off or _signals.noted) and not (looking or place.inside):
                _run(place, None, None, _nothing, (), {})

    return wrapper


def closing(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
    """Decorate a close: nothing in a child, put off inside of a guarded call, else as `guarded`."""

    @wraps(call)
    def wrapper(self: _Self, /) -> None:
        if not self.guard.forked:
            run_outside(partial(_close, self, call, _own))

    return wrapper


def closing_after_dependents(call: Callable[[_Source], None]) -> Callable[[_Source], None]:
    """Decorate a close as `closing`, with `close_dependents` before it, which runs with no lock held: the locks of the
    dependents are above. What it raises ends the close. `close_now` makes no such step."""

    @wraps(call)
    def wrapper(self: _Source, /) -> None:
        if not self.guard.forked:
            run_outside(partial(_close_after_dependents, self, call))

    return wrapper


def closing_under(
    uppermost: Callable[[_Self], Guard],
) -> Callable[[Callable[[_Self], None]], Callable[[_Self], None]]:
    """Decorate a close as `closing`, but under the lock of another object: the one that is above this object's own, and
    that the close has to take as well."""

    def decorate(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
        @wraps(call)
        def wrapper(self: _Self, /) -> None:
            if not self.guard.forked:
                run_outside(partial(_close, self, call, uppermost))

        wrapper.uppermost = uppermost  # type: ignore[attr-defined]
        return wrapper

    return decorate


def closing_in_hooks(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
    """Decorate a close as `closing`, but a hook may call it and have it done at once: only for an object whose lock is
    below that of the list of blocks, which the caller of the hook holds."""

    @wraps(call)
    def wrapper(self: _Self, /) -> None:
        place, guard = _thread.place, self.guard
        if place.busy or place.looking:
            if not guard.forked:
                place.put_off.append(partial(_close, self, call, _own))
        elif not guard.forked:
            _run(place, guard.lock, None, call, (self,), {})

    return wrapper


# ------------------------------------------------------------------------------------------------- inside of a call


def call_out(hook: Callable[[*_Arguments], _Result], arguments: tuple[*_Arguments]) -> _Result:
    """Call code of the program's, such as a notifier's hook, from inside of a guarded call, with no lock held but that
    of the list. It is a checkpoint, and the hook may close a mapping at once."""
    if _signals.noted:
        checkpoint()
    place = _thread.place
    place.busy = False
    try:
        return hook(*arguments)
    finally:
        place.busy = place.inside


class _Undoing:
    """See `undoing`. One for all: it has no state of its own."""

    def __enter__(self) -> None:
        _thread.place.undoing += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place = _thread.place
        place.undoing = max(place.undoing - 1, 0)  # 0 in a child that the undo has forked


undoing = _Undoing()
"""Enter it around an undo, or a close, that runs code with checkpoints, such as a notifier's hook: no handler runs
meanwhile."""


def checkpoint() -> None:
    """Run the handlers of signals that came meanwhile; raises what they raise. In an undo nothing happens.

    For a guarded call between two pieces of its work, where an exception is undone like any other. Cost: a look-up.
    """
    if _signals.noted and (place := _thread.place).signals is not None and not place.undoing:
        _signals.deliver()


def run_outside(step: Callable[[], object]) -> None:
    """Call `step` at once, or, where this thread is inside of a guarded call, when that ends.

    For finalizers. What a step raises that was put off is logged: nobody is there to receive it.
    """
    place = _thread.place
    if place.inside or place.looking:
        place.put_off.append(step)
    else:
        step()


def run_outside_or_in_hook(step: Callable[[], object]) -> None:
    """As `run_outside`, but a hook has it done at once."""
    place = _thread.place
    if place.busy or place.looking:
        place.put_off.append(step)
    else:
        step()


@contextmanager
def holding(*things: Guarded) -> Iterator[None]:
    """Hold the locks of several objects, in the order of rule 4; inside of a guarded call."""
    with ExitStack() as stack:
        for thing in things:
            stack.enter_context(thing.guard.lock)
        yield


def close_now(thing: Guarded) -> None:
    """Close `thing` from inside of the guarded call that owns it, at once, under its lock. Raises what the close
    raises."""
    close = type(thing).close  # type: ignore[attr-defined]
    with getattr(close, "uppermost", _own)(thing).lock:
        close.__wrapped__(thing)


# --------------------------------------------------------------------------------------------------------------- below


def _check_given(args: Iterable[object], kwargs: Mapping[str, object]) -> None:
    """Raise ForkedError where an argument is an object of a parent of this process."""
    if _thread.place.busy:
        return
    for given in (*args, *kwargs.values()):
        if isinstance(guard := getattr(given, "guard", None), Guard):
            guard.check()


def _own(thing: Guarded) -> Guard:
    return thing.guard


def _close(thing: _Self, call: Callable[[_Self], None], uppermost: Callable[[_Self], Guard]) -> None:
    """Close `thing`, outside of every call or at the end of one, where no lock is held."""
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
            if thing.end_dependents() or turn == _TURNS - 1:  # else another thread has made one meanwhile
                call(thing)
                return
        finally:
            lock.release()


def _nothing() -> None:
    """Do what was put off, and nothing else."""


def _enter(place: _Place, lock: RLock | None) -> None:
    """Begin an outermost call: nothing of the program's comes into it, but at a checkpoint."""
    try:
        place.inside = place.busy = True  # from here on finalizers are put off: a call of theirs would put back
        if place.signals is not None:
            place.signals.replace()  # and signals are noted
        if lock is not None:
            place.lock = lock  # before it is had: what raises in between leaves nothing behind
            if not lock.acquire(False):  # noqa: FBT003 (a keyword costs as much as the lock)
                _wait_for(lock)
    except BaseException:
        place.inside = place.busy = False  # first: a handler that is not replaced may raise at the next call
        _leave(place)
        raise


def _leave(place: _Place) -> None:
    """End an outermost call: what was put off is done, and the handlers of the signals that came are called."""
    lock = place.lock
    if lock is not None:
        try:  # noqa: SIM105 (suppress() costs as much as a call of another object)
            lock.release()
        except RuntimeError:  # it was not had yet
            pass
        place.lock = None
    try:
        if place.put_off or _signals.noted:
            _handle(place)
    finally:
        place.inside = place.busy = False  # from here on a handler runs at once
        if place.signals is not None:
            try:
                place.signals.put_back()
            finally:
                if _signals.noted:
                    _signals.deliver()


def _run(  # noqa: PLR0917 (see below)
    place: _Place,
    lock: RLock | None,
    undo: Callable[[_Result], object] | None,
    call: Callable[..., _Result],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> _Result:
    """Make a call, inside of another or as the outermost. `undo` is for what it has made, which nobody receives when a
    handler raises.

    Not called with `*args`: CPython 3.11 runs handlers behind such a call, where the result is nobody's yet.
    """
    if place.inside:
        return _within(place, lock, call, args, kwargs)
    made: list[_Result] = []
    try:
        _enter(place, lock)
        made.append(call(*args, **kwargs))
        _unlock(place)
        if place.put_off or _signals.noted:
            _handle(place)  # before handlers are put back: a signal that comes during the undo is noted
        _leave(place)
    except BaseException:
        _unmake(place, made, undo)
        raise
    return made[0]


def _within(
    place: _Place, lock: RLock | None, call: Callable[..., _Result], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> _Result:
    busy = place.busy
    if lock is not None and not lock.acquire(busy):  # a hook has nothing half done: a handler may refuse there
        _wait_for(lock)
    place.busy = True
    try:
        return call(*args, **kwargs)
    finally:
        place.busy = busy
        if lock is not None:
            lock.release()


def _unmake(place: _Place, made: Sequence[_Result], undo: Callable[[_Result], object] | None) -> None:
    """End an outermost call that raises, or whose handlers do when it has made something."""
    try:
        _unlock(place)
        if made and undo is not None:
            try:
                if not place.inside:
                    _enter(place, None)  # where another handler raises, the undo is an outermost call of its own
            finally:
                with undoing:
                    undo(*made)
    finally:
        if place.inside:
            _leave(place)


def _unlock(place: _Place) -> None:
    lock = place.lock
    if lock is not None:
        with suppress(RuntimeError):  # as above
            lock.release()
        place.lock = None


def _handle(place: _Place) -> None:
    """Run the handlers of signals, then the closes that finalizers asked for.

    Another signal that comes meanwhile is noted, so that each handler runs once.
    """
    try:
        if _signals.noted and place.signals is not None:
            place.busy = False  # as in a hook
            _signals.deliver()
    finally:
        place.busy = place.inside
        if place.put_off:
            _catch_up(place)


def _wait_for(lock: RLock) -> None:
    while not lock.acquire(timeout=_PATIENCE):
        checkpoint()


def _catch_up(place: _Place) -> None:
    while place.put_off and not place.looking:
        try:
            with undoing:  # a close that is interrupted would never be finished
                place.put_off.popleft()()
        except Exception:
            _logger.exception("a close that a finalizer had asked for in the middle of another call failed")


class Forgettable(Protocol):
    """An object that a child must not use, and whose calls are too short to ask for the process."""

    def forget(self) -> None:
        """Raise at each use from now on, without a system call."""
        ...


_forgettable: WeakSet[Forgettable] = WeakSet()


def forget_in_child(thing: Forgettable) -> None:
    """Call `thing.forget()` in each child that is forked while `thing` exists."""
    _forgettable.add(thing)


def _after_fork() -> None:
    for thing in tuple(_forgettable):
        thing.forget()
    _thread.place.put_off.clear()  # the parent's
    _signals.after_fork()
    _thread.place = _Place()


os.register_at_fork(after_in_child=_after_fork)
