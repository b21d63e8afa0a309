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
    Mutant("_method", "            guard.check()\n", "            pass\n", "forks"),
    Mutant("reading", "        guard.check()\n", "", "forks"),
    # A child waits for a lock that nobody releases.
    Mutant(
        "_method",
        "        if getpid() != guard.pid:\n            guard.check()\n",
        "        with lock:\n            guard.check()\n",
        "forks",
    ),
    Mutant("closing", "        if not self.guard.forked:\n", "        if True:\n", "forks"),
    Mutant("closing_in_hooks", "        if guard.forked:\n            return\n", "", "forks"),
    # The child of a hook counts as inside of the call.
    Mutant("_after_fork", "    _thread.place = _Place()\n", "", "forks"),
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
    Mutant("run_outside", "    if _thread.place.inside:\n", "    if False:\n", "finalizers"),
    Mutant("closing", "run_outside(partial(_close, self, call))", "_close(self, call)", "finalizers"),
    Mutant("_handle", "        if thread.put_off:\n            _catch_up(thread)\n", "        pass\n", "finalizers"),
    Mutant(
        "reading",
        "            if thread.put_off and not was:\n                _run(None, _nothing, None)\n",
        "",
        "finalizers",
    ),
    Mutant("closing_in_hooks", "if _thread.place.busy:", "if _thread.place.inside:", "finalizers"),
    Mutant("_catch_up", "except Exception:", "except ValueError:", "finalizers"),
    # --------------------------------------------------------------------------------------------------------- signals
    Mutant("_Signals.replace", "            self._set(number, self._route)\n", "            pass\n", "signals"),
    Mutant("_make", "                    undo(*made)\n", "                    pass\n", "signals"),
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
        "_Signals.deliver",
        "            if self.noted:\n                self.deliver()\n",
        "            pass\n",
        "signals",
    ),
    # The handler that the program has set meanwhile is lost.
    Mutant(
        "_Signals.put_back", "                    self._set(number, other)\n", "                    pass\n", "signals"
    ),
    # A handler that is inside of no call waits for the next one.
    Mutant(
        "_Signals.route",
        "        if not _thread.place.inside:\n            self.put_back()\n",
        "",
        "signals",
    ),
    # ----------------------------------------------------------------------------------------------------------- locks
    Mutant("_method", "        lock = guard.lock\n", "        lock = RLock()\n", "locks"),
    Mutant("reading", "                with guard.lock:\n", "                if True:\n", "locks"),
    Mutant("_close", "        with lock:\n", "        if True:\n", "locks"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return _WITNESSES[mutant.operation]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
