"""Threads, finalizers, signals and forks: the one place with the rules, which every call that has state goes through.

Python can run code of the program's in the middle of almost any line of this package: a signal handler in the main
thread, a finalizer in any thread. A child can be forked while any lock is held. Four rules keep an address space, its
table and the blocks right all the same:

1. *Forks* are decided before a lock is taken. In a child of the process that made the object a call raises ForkedError,
   and a close does nothing: the kernel's object is shared, so the child would act on its parent.
2. *Finalizers.* A collection can finalize an object in a thread that holds any lock and is in the middle of any change.
   A close that arrives while its thread is inside a guarded call is put off until that call ends. So no structure
   changes under a search, and no lock is taken in an order that nobody planned. A finalizer must call nothing but a
   close. Hooks of notifiers are the program's
   own code, called between two steps: `called_out` lets a hook close a mapping at once.
3. *Signals.* A handler that raises must not come between a change that the kernel made and its record here. Python runs
   handlers in the main thread only. There the handlers that are Python functions are noted for the time of a guarded
   call. They run at `checkpoint`, between the pieces of a long change, and when the call ends. An exception that a
   checkpoint raises is a refusal like any other, and the ordinary undo follows. A call that makes an object names its
   undo, for the object that nobody receives because a handler raises at the end.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial, wraps
from importlib import import_module
from logging import getLogger
from os import getpid
from threading import RLock, get_ident, main_thread
from types import FrameType, TracebackType
from typing import Concatenate, ParamSpec, Protocol, Self, TypeAlias, TypeVar

from pyvfio.errors import ForkedError

_logger = getLogger(__name__)

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_Handler: TypeAlias = Callable[[int, FrameType | None], object]

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


_Self = TypeVar("_Self", bound=Guarded)
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
    """Where a thread is. `inside`: in a guarded call. `busy`: and not in a hook that the call has called. `undoing`: in
    so many undos. `put_off`: the closes for the end of the call. `signals`: the handlers, in the main thread."""

    __slots__ = ("busy", "inside", "put_off", "signals", "undoing")

    def __init__(self) -> None:
        self.signals = _signals if get_ident() == _signals.main else None
        self.inside = self.busy = False
        self.undoing = 0
        self.put_off: deque[Callable[[], object]] = deque()


class _Thread(threading.local):
    """Each thread's place: a look-up here costs as much as eight in a place."""

    def __init__(self) -> None:
        self.place = _Place()


_NAMES = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGTERM", "SIGVTALRM", "SIGPROF", "SIGXCPU")
_ALL = tuple(int(getattr(signal, name)) for name in _NAMES)
"""The signals that are put off: those by which a program is asked to end or told the time, and its own."""


class _Signals:
    """The handlers of the main thread: which ones `route` stands for, and which signals are to be handled.

    `signal` wraps these two functions to make enums of numbers, at ten times their cost.
    """

    def __init__(self) -> None:
        functions = import_module("_signal")
        self._get: Callable[[int], object] = functions.getsignal
        self._set: Callable[[int, _Handler], _Handler] = functions.signal
        self._route: _Handler = self.route
        self._seen: tuple[object, ...] = ()
        self._handlers: dict[int, _Handler] = {}  # of the signals that a function handled when it was last looked
        self.noted: dict[int, _Handler] = {}  # in their order, each once, as the kernel keeps them
        self.main: int | None = main_thread().ident
        self.process = os.getpid()

    def replace(self) -> None:
        """Let `route` stand in the place of each handler that is a function."""
        seen = tuple(map(self._get, _ALL))
        if seen != self._seen:
            self._look(seen)
        for number in self._handlers:
            self._set(number, self._route)

    def _look(self, seen: tuple[object, ...]) -> None:
        handlers: dict[int, _Handler] = {}
        for number, handler in zip(_ALL, seen, strict=True):
            if handler is self._route:  # not put back yet
                if number in self._handlers:
                    handlers[number] = self._handlers[number]
            elif callable(handler):
                handlers[number] = handler
        self._handlers, self._seen = handlers, seen  # in one step: a signal may come to `route` at any call above

    def put_back(self) -> None:
        """Give each signal its handler back, unless the program has set another one, and run the handlers due."""
        try:
            for number, handler in self._handlers.items():
                if (other := self._set(number, handler)) is not self._route:
                    self._set(number, other)
        finally:
            if self.noted:
                try:
                    self.deliver()
                finally:
                    self.deliver()  # another signal's handler may have raised when it was called

    def deliver(self) -> None:
        """Run the handlers of the signals that came meanwhile, also those behind one that raises."""
        frame = sys._getframe(1)
        try:
            while self.noted:
                number = next(iter(self.noted))
                handler = self.noted[number]
                del self.noted[number]  # no call lies between, at which another signal's handler could raise
                handler(number, frame)
        finally:
            if self.noted:
                self.deliver()

    def route(self, number: int, frame: FrameType | None) -> None:
        """Note a signal, or handle it at once where no guarded call is under way."""
        del frame
        if number in self._handlers:
            self.noted[number] = self._handlers[number]
        if not _thread.place.inside:
            self.put_back()

    def after_fork(self) -> None:
        """In a child: this is the main thread, and what the parent had noted is the parent's."""
        self.main, self.process = get_ident(), os.getpid()
        self.noted.clear()
        self.put_back()


_signals = _Signals()
_thread = _Thread()


# --------------------------------------------------------------------------------------------------------- decorators


def guarded(call: Callable[Concatenate[_Self, _Given], _Result]) -> Callable[Concatenate[_Self, _Given], _Result]:
    """Decorate a method that changes state: all four rules. Raises ForkedError in a child."""
    return _method(call, None)


def making(
    undo: Callable[[_Result], object],
) -> Callable[[Callable[Concatenate[_Self, _Given], _Result]], Callable[Concatenate[_Self, _Given], _Result]]:
    """Decorate a method that returns a new object, as `guarded`. `undo(object)` is called where a signal handler raises
    when the object is made and not yet returned."""

    def decorate(
        call: Callable[Concatenate[_Self, _Given], _Result],
    ) -> Callable[Concatenate[_Self, _Given], _Result]:
        return _method(call, undo)

    return decorate


def _method(
    call: Callable[Concatenate[_Self, _Given], _Result], undo: Callable[[_Result], object] | None
) -> Callable[Concatenate[_Self, _Given], _Result]:
    # As `_run`, but in one piece: each call more would cost a tenth of all of it.
    @wraps(call)
    def wrapper(self: _Self, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        guard, thread = self.guard, _thread.place
        lock = guard.lock
        if thread.busy:
            lock.acquire()
            try:
                return call(self, *args, **kwargs)
            finally:
                lock.release()
        if getpid() != guard.pid:
            guard.check()
        if undo is not None or thread.inside:
            return _run(lock, partial(call, self, *args, **kwargs), undo)
        signals, ready = thread.signals, False
        try:
            thread.inside = thread.busy = True
            if signals is not None:
                signals.replace()
            ready = True
            if not lock.acquire(False):  # noqa: FBT003 (a keyword costs as much as the lock)
                _wait_for(lock)
            try:
                return call(self, *args, **kwargs)
            finally:
                lock.release()
        finally:
            if not ready:  # before any call: a handler that is not replaced may raise at the next one
                thread.inside = thread.busy = False
            if thread.put_off or _signals.noted:
                _leave(thread, signals)
            else:
                thread.inside = thread.busy = False
                if signals is not None:
                    signals.put_back()

    return wrapper


def constructing(
    undo: Callable[..., object],
) -> Callable[[Callable[Concatenate[_Made, _Given], None]], Callable[Concatenate[_Made, _Given], None]]:
    """Decorate `__init__`: all but the lock; forks by the arguments that have a guard. `undo(self)` as for `making`."""

    def decorate(call: Callable[Concatenate[_Made, _Given], None]) -> Callable[Concatenate[_Made, _Given], None]:
        @wraps(call)
        def wrapper(self: _Made, /, *args: _Given.args, **kwargs: _Given.kwargs) -> None:
            if _thread.place.busy:
                return call(self, *args, **kwargs)
            _check_given(args, kwargs)
            return _run(None, partial(call, self, *args, **kwargs), lambda _: undo(self))

        return wrapper

    return decorate


def reading(call: Callable[Concatenate[_Self, _Given], _Result]) -> Callable[Concatenate[_Self, _Given], _Result]:
    """Decorate a method that only looks: forks, finalizers and the lock. A signal handler may raise in the middle."""

    @wraps(call)
    def wrapper(self: _Self, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        guard, thread = self.guard, _thread.place
        if thread.busy:
            with guard.lock:
                return call(self, *args, **kwargs)
        guard.check()
        was = thread.inside
        try:
            try:
                thread.inside = thread.busy = True
                with guard.lock:
                    return call(self, *args, **kwargs)
            finally:
                thread.busy, thread.inside = False, was
        finally:  # once more: a tracer lets a handler raise between any two lines
            thread.busy, thread.inside = False, was
            if thread.put_off and not was:
                _run(None, _nothing, None)

    return wrapper


def closing(call: Callable[[_Self], None]) -> Callable[[_Self], None]:
    """Decorate a close: nothing in a child, put off inside of a guarded call, else as `guarded`."""

    @wraps(call)
    def wrapper(self: _Self, /) -> None:
        if not self.guard.forked:
            run_outside(partial(_close, self, call))

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
        guard = self.guard
        if guard.forked:
            return
        if _thread.place.busy:
            _thread.place.put_off.append(partial(_close, self, call))
        else:
            _run(guard.lock, partial(call, self), None)

    return wrapper


def uninterrupted(
    undo: Callable[..., object] | None = None,
) -> Callable[[Callable[_Given, _Result]], Callable[_Given, _Result]]:
    """Decorate a function that has no guard: all but the lock; forks by the arguments that have one. `undo` as for
    `making`."""

    def decorate(call: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
        @wraps(call)
        def wrapper(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
            if _thread.place.busy:
                return call(*args, **kwargs)
            _check_given(args, kwargs)
            return _run(None, partial(call, *args, **kwargs), undo)

        return wrapper

    return decorate


# ------------------------------------------------------------------------------------------------- inside of a call


class _CalledOut:
    """See `called_out`. One for all: it has no state of its own."""

    def __enter__(self) -> None:
        _thread.place.busy = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        place = _thread.place
        place.busy = place.inside  # not in a child that the hook has forked


called_out = _CalledOut()
"""Enter it around a call of a notifier's hook, inside of a guarded call, with no lock held but that of the list."""


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
    if _thread.place.inside:
        _thread.place.put_off.append(step)
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
    for given in (*args, *kwargs.values()):
        if isinstance(guard := getattr(given, "guard", None), Guard):
            guard.check()


def _own(thing: Guarded) -> Guard:
    return thing.guard


def _close(thing: _Self, call: Callable[[_Self], None], uppermost: Callable[[_Self], Guard] = _own) -> None:
    """Close `thing`, outside of every call or at the end of one, where no lock is held."""
    lock = uppermost(thing).lock
    if _thread.place.inside:
        with lock:
            call(thing)
    else:
        _run(lock, partial(call, thing), None)


def _nothing() -> None:
    """Do what was put off, and nothing else."""


def _run(lock: RLock | None, call: Callable[[], _Result], undo: Callable[..., object] | None) -> _Result:
    """Make an outermost call, or one from a hook, which finds the signals put off already."""
    thread = _thread.place
    if thread.inside:
        try:
            thread.busy = True
            return call() if lock is None else _locked(lock, call)
        finally:
            thread.busy = False
    signals = thread.signals
    if signals is not None and undo is not None:
        return _make(thread, signals, lock, call, undo)
    ready = False
    try:
        thread.inside = thread.busy = True  # from here on finalizers are put off: a call of theirs would put back
        if signals is not None:
            signals.replace()  # and signals are noted
        ready = True
        return call() if lock is None else _locked(lock, call)
    finally:
        if not ready:  # before any call: a handler that is not replaced may raise at the next one
            thread.inside = thread.busy = False
        _leave(thread, signals)


def _leave(thread: _Place, signals: _Signals | None) -> None:
    try:
        if thread.put_off or _signals.noted:
            _handle(thread, signals)
    finally:
        thread.inside = thread.busy = False  # from here on a handler runs at once
        if signals is not None:
            signals.put_back()


def _make(
    thread: _Place,
    signals: _Signals,
    lock: RLock | None,
    call: Callable[[], _Result],
    undo: Callable[..., object],
) -> _Result:
    """Make an outermost call of the main thread that makes an object, which is undone when a handler raises."""
    made: tuple[_Result] | None = None
    try:
        thread.inside = thread.busy = True
        signals.replace()
        made = (call() if lock is None else _locked(lock, call),)
        _handle(thread, signals)  # before handlers are put back: a signal that comes during the undo is noted
        signals.put_back()
        thread.inside = thread.busy = False
        if thread.put_off:  # a finalizer came while handlers were put back
            _run(None, _nothing, None)
        return made[0]
    except BaseException:
        try:
            thread.inside = thread.busy = True
            if made is not None:
                signals.replace()
                with undoing:
                    undo(*made)
            _handle(thread, signals)
            raise
        finally:
            thread.inside = thread.busy = False
            signals.put_back()


def _handle(thread: _Place, signals: _Signals | None) -> None:
    """Run the handlers of signals, then the closes that finalizers asked for.

    Another signal that comes meanwhile is noted, so that each handler runs once.
    """
    try:
        if signals is not None and signals.noted:
            with called_out:
                signals.deliver()
    finally:
        if thread.put_off:
            _catch_up(thread)


def _locked(lock: RLock, call: Callable[[], _Result]) -> _Result:
    if not lock.acquire(False):  # noqa: FBT003 (as above)
        _wait_for(lock)
    try:
        return call()
    finally:
        lock.release()


def _wait_for(lock: RLock) -> None:
    while not lock.acquire(timeout=_PATIENCE):
        checkpoint()


def _catch_up(thread: _Place) -> None:
    while thread.put_off:
        try:
            with undoing:  # a close that is interrupted would never be finished
                thread.put_off.popleft()()
        except Exception:
            _logger.exception("a close that a finalizer had asked for in the middle of another call failed")


def _after_fork() -> None:
    _signals.after_fork()
    _thread.place = _Place()


os.register_at_fork(after_in_child=_after_fork)
