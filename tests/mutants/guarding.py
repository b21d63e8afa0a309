"""Mistakes in each rule of guard.py: its own tests, or those that interrupt, collect and fork, have to notice them."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_GUARD = "tests/unit/test_guard.py"
_WITNESSES: dict[str, list[list[str]]] = {
    "forks": [[_GUARD], ["tests/unit/test_forks.py"]],
    "finalizers": [[_GUARD], ["tests/unit/test_collections.py", "-k", "grow"]],
    "signals": [[_GUARD], ["tests/unit/test_interruptions.py", "-k", "map_buffer or granule"]],
    "locks": [[_GUARD], ["tests/unit/test_many_threads.py", "--thread-steps=2000"]],
}

_MUTANTS = (
    # ----------------------------------------------------------------------------------------------------------- forks
    Mutant("_enclosed", "            guard.check()\n", "            pass\n", "forks"),
    # A child takes itself for its parent.
    Mutant(
        "_Signals.after_fork",
        "        self.main, self.process = get_ident(), os.getpid()\n",
        "        self.main = get_ident()\n",
        "forks",
    ),
    Mutant("reading", "            guard.check()\n", "            pass\n", "forks"),
    # A child waits for a lock that nobody releases.
    Mutant(
        "_enclosed",
        "        if guard.pid != _signals.process:\n            guard.check()\n",
        "        with lock:\n            guard.check()\n",
        "forks",
    ),
    Mutant("closing", "        if guard.pid != _signals.process:\n", "        if False:\n", "forks"),
    Mutant("closing_in_hooks", "        if guard.pid != _signals.process:\n", "        if False:\n", "forks"),
    Mutant("closing_in_one_step", "self.guard.pid == _signals.process", "True", "forks"),
    # The child of a hook counts as inside of the call.
    Mutant("_after_fork", "    _thread.place = _Place()\n", "", "forks"),
    # The child of a hook makes the closes that its parent has put off.
    Mutant("_after_fork", "    _thread.place.put_off.clear()  # these belong to the parent\n", "", "forks"),
    # The child handles the signals of its parent.
    Mutant("_Signals.after_fork", "        self.noted.clear()\n", "", "forks"),
    # The child of another thread handles no signal.
    Mutant(
        "_Signals.after_fork",
        "        self.main, self.process = get_ident(), os.getpid()\n",
        "        self.process = os.getpid()\n",
        "forks",
    ),
    # ------------------------------------------------------------------------------------------------------ finalizers
    Mutant("run_outside", "    if place.inside or place.looking:\n", "    if False:\n", "finalizers"),
    Mutant("closing", "        if place.inside or place.looking:\n", "        if False:\n", "finalizers"),
    Mutant("closing", "        if place.inside or place.looking:\n", "        if place.inside:\n", "finalizers"),
    Mutant("_handle", "        if place.put_off:\n            _catch_up(place)\n", "", "finalizers"),
    Mutant(
        "reading",
        "                _run(place, None, None, _nothing, (), {})\n",
        "                pass\n",
        "finalizers",
    ),
    Mutant("closing_in_hooks", "if place.busy or", "if place.inside or", "finalizers"),
    Mutant("_catch_up", "except Exception:", "except ValueError:", "finalizers"),
    # --------------------------------------------------------------------------------------------------------- signals
    Mutant("_Signals.replace", "(found := _set_handler(number, route))", "(found := handler)", "signals"),
    # A handler that is equal to the one before is another.
    Mutant("_Signals.replace", "                self._learn(number, found)\n", "                pass\n", "signals"),
    Mutant("_undo", "            undo()\n", "            pass\n", "signals"),
    # A handler that is set between two calls is not put off.
    Mutant("_Signals.replace", "            self._look(seen)\n", "            pass\n", "signals"),
    # What nobody puts off leaves the lock behind, or the state.
    Mutant("_enclosed", "            place.lock = lock\n", "            place.lock = None\n", "signals"),
    Mutant("_enclosed", "            _abandon(place, undo, result)\n", "            pass\n", "signals"),
    Mutant(
        "_abandon",
        "            if place.inside:  # an exception set by another thread interrupted the first `_leave`\n"
        "                _leave(place)\n",
        "            pass\n",
        "signals",
    ),
    # The handlers of signals that came in the last steps of a call wait for the next call.
    Mutant("_Signals.put_back", "        if self.noted:\n            self.deliver()\n", "", "signals"),
    # What a handler changes in a look-up is taken for a step of it.
    Mutant("reading", "            place.looking = True\n", "            place.inside = True\n", "signals"),
    # The handler that a program keeps and sets again is the guard's own, and leads nowhere.
    Mutant(
        "_Signals._look",
        "        self._known = {**self._known, **handlers}\n",
        "        self._known = handlers\n",
        "signals",
    ),
    # An undo is skipped where a second handler raises when it begins.
    Mutant(
        "_undo",
        "    finally:\n        with undoing:\n            undo()\n",
        "    except ValueError:\n        raise\n    undo()\n",
        "signals",
    ),
    # The handler is lost that a replacement stands for which was left behind.
    Mutant(
        "_Signals._look",
        "                if number in self._known:\n",
        "                if False:\n",
        "signals",
    ),
    Mutant("checkpoint", "        _signals.deliver()\n", "        pass\n", "signals"),
    Mutant(
        "checkpoint",
        "(place := _thread.place).signals is not None and not place.undoing",
        "not _thread.place.undoing",
        "signals",
    ),
    Mutant("checkpoint", " and not place.undoing", "", "signals"),
    # A handler that raises keeps the next one from running.
    Mutant(
        "_handle_each",
        "        if len(due) > 1:\n            _handle_each(due[1:], frame)\n",
        "        pass\n",
        "signals",
    ),
    # The handler that the program has set meanwhile is lost.
    Mutant("_Signals.put_back", "                _set_handler(number, other)\n", "                pass\n", "signals"),
    # A handler that is inside of no call waits for the next one.
    Mutant(
        "_Signals.route",
        "        if not _thread.place.inside:\n",
        "        if False:\n",
        "signals",
    ),
    # ----------------------------------------------------------------------------------------------------------- locks
    Mutant("_enclosed", "        lock = guard.lock\n", "        lock = RLock()\n", "locks"),
    Mutant("reading", "            with guard.lock:", "            if True:", "locks"),
    Mutant("_close", "uppermost(thing).lock", "None", "locks"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return _WITNESSES[mutant.operation]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
