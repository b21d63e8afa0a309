"""Judge mistakes in one pytest session, for tools/mutants.py and tests/mutants. In a process of its own.

The session imports the package and collects the tests. A first run finds the lines that each test reaches. Then each
mistake has a forked child: the child gives functions of the package the mistaken code, and runs the tests that reach
the mistaken lines, the shortest first, until a test fails. No file is written and nothing is imported again, so that a
mistake costs little more than the tests that notice it.

Two kinds of mistakes have no verdict here: those in code that only an import executes, and those in lines that only
another process reaches. The judge names both.

Needs `sys.monitoring`, which is new in Python 3.12.
"""

from __future__ import annotations

import gc
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple, TypeAlias

import pytest

from tools.replace_code import Live, Replacement, changed_lines, find_replacement, live_functions, nested, put_in

AVAILABLE = sys.version_info >= (3, 12)
"""Whether this Python has what the judge needs."""

_SLACK = 5.0
"""A mistake is caught if its tests take so many times as long as without it, and `patience` seconds more: it hangs."""

ROOT = Path(__file__).resolve().parents[1]
_TOOL = 3  # of sys.monitoring; the numbers with a name are for debuggers, coverage and profilers


class Change(NamedTuple):
    """A mistake: the file `path`, from the checkout on, has the text `source`."""

    path: str
    source: str


class Verdict(NamedTuple):
    """What came of one mistake, `at` its place among the changes.

    `kind`: "caught" by the test `witness`; "survived" the `tests` that reach its lines; "unreached" by any test;
    "imported": an import alone executes the code.
    """

    at: int
    kind: str
    witness: str = ""
    tests: int = 0


class JudgeError(Exception):
    """The judge ended early, and has said why on standard error."""


def judged(
    changes: Sequence[Change],
    tests: Sequence[str],
    *,
    checkout: Path,
    jobs: int,
    limit: float = math.inf,
    patience: float = 10.0,
) -> Iterator[Verdict]:
    """Yield a verdict for each of `changes`, as soon as there is one.

    `tests`: the arguments of pytest. A test that fails without any mistake judges none, and is named on standard error.
    `jobs`: the number of children at a time. `limit`: the seconds of tests that run for one mistake. A mistake hangs if
    its tests take five times as long as without it, and `patience` seconds more. The package is the folder `pyvfio` of
    the checkout. Raises JudgeError.
    """
    options = {"jobs": jobs, "limit": limit, "patience": patience}
    request = json.dumps({"changes": changes, "tests": tests, "options": options})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (checkout, ROOT)))}
    with subprocess.Popen(
        [sys.executable, "-m", "tools.judge"],
        cwd=checkout,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            if process.stdin is not None:
                process.stdin.write(request)
                process.stdin.close()
            yield from (Verdict(**json.loads(line)) for line in process.stdout or ())
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise JudgeError(f"the judge ended with {process.returncode}")


# ------------------------------------------------------------------------------------------------------- children

_Work: TypeAlias = Callable[[], object]


class _Child:
    """A forked child that does one work, in a process group of its own, without output."""

    def __init__(self, work: _Work, seconds: float) -> None:
        self._answer, writing = os.pipe()
        self._text = bytearray()
        self.end = time.monotonic() + seconds
        self.pid = os.fork()
        if not self.pid:
            _do(work, writing)
        os.close(writing)
        os.set_blocking(self._answer, False)
        self.exited = os.pidfd_open(self.pid)
        self.fds = (self.exited, self._answer)

    def read(self) -> None:
        """Read what the child has written so far. A full pipe would keep the child from its end."""
        try:
            while piece := os.read(self._answer, 1 << 16):
                self._text += piece
        except BlockingIOError:
            pass

    def finish(self, *, kill: bool) -> object:
        """Return the result of the work, or the reason why there is none. Kills what the child has left running."""
        if kill:
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.read()
        for fd in self.fds:
            os.close(fd)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if kill:
            return "hangs"
        code = os.waitstatus_to_exitcode(status)
        return json.loads(self._text) if code == 0 else f"ends the process with {code}"


def _do(work: _Work, writing: int) -> None:
    """Do the work, write the result, and end the process."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(work()).encode())
        os._exit(0)
    finally:
        os._exit(1)


def _in_children(works: Sequence[tuple[_Work, float]], jobs: int) -> Iterator[tuple[int, Any]]:
    """Yield the index of each work and what `_Child.finish` returns. Each work has the seconds that it may take."""
    waiting = list(enumerate(works))[::-1]
    running: dict[int, _Child] = {}
    while running or waiting:
        while waiting and len(running) < jobs:
            index, work = waiting.pop()
            running[index] = _Child(*work)
        with selectors.DefaultSelector() as selector:
            for index, child in running.items():
                for fd in child.fds:
                    selector.register(fd, selectors.EVENT_READ, index)
            ready = {(key.data, key.fd) for key, _ in selector.select(timeout=0.5)}
        for index, child in tuple(running.items()):
            child.read()
            late = time.monotonic() > child.end
            if (index, child.exited) in ready or late:
                del running[index]
                yield index, child.finish(kill=late)


# --------------------------------------------------------------------------------------------------------- pytest


class _Reach(NamedTuple):
    """How many seconds a test takes, and the lines of each file that the test reaches."""

    seconds: float
    lines: dict[str, list[int]]


class Judge:
    """A plugin of pytest that judges mistakes where pytest would run the tests."""

    def __init__(
        self,
        changes: Sequence[Change],
        tell: Callable[[Verdict], object],
        *,
        jobs: int,
        limit: float,
        patience: float,
    ) -> None:
        """`tell` receives each verdict. The others as for `judged`."""
        self._changes, self._tell = changes, tell
        self._jobs, self._limit, self._patience = jobs, limit, patience
        self._checkout = Path.cwd()
        self._failed: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self) -> None:
        """Let hypothesis look for an example that fails, but not for the smallest one: that takes minutes."""
        import hypothesis  # noqa: PLC0415 (pytest has to import its plugins first)

        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("judge", deadline=None, database=None, phases=phases)
        hypothesis.settings.load_profile("judge")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure."""
        if report.failed:
            self._failed.append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Judge all mistakes."""
        if session.testsfailed:
            raise pytest.UsageError("tests cannot be collected")
        for path in sorted({change.path for change in self._changes}):
            import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        live = live_functions(self._checkout / "pyvfio")
        reach = self._find_reach(session.items, live)
        gc.freeze()  # no child's collector copies the pages of objects that all children share
        works, judged = list[tuple[_Work, float]](), list[Verdict]()
        for index, change in enumerate(self._changes):
            file = self._checkout / change.path
            before = file.read_text(encoding="utf-8")
            replacement = find_replacement(str(file), before, change.source, live)
            lines = set(changed_lines(before, change.source))
            tests = self._reaching(session.items, reach, str(file), lines, replacement)
            if not replacement.whole or not tests:
                self._tell(Verdict(index, "unreached" if replacement.whole else "imported"))
                continue
            seconds = sum(reach[test.nodeid].seconds for test in tests)
            works.append((partial(self._try, replacement.codes, live, tests), self._patience + _SLACK * seconds))
            judged.append(Verdict(index, "survived", tests=len(tests)))
        for at, answer in _in_children(works, self._jobs):
            verdict = judged[at]
            if answer is None:
                verdict = Verdict(verdict.at, "imported")
            elif answer:
                verdict = verdict._replace(kind="caught", witness=answer)
            self._tell(verdict)
        return True

    def _try(self, codes: Mapping[Any, CodeType], live: Live, tests: Sequence[pytest.Item]) -> str | None:
        """Return the test that fails with the mistake, or "". None: the mistake cannot be put in."""
        if not put_in(codes, live):
            return None
        for test, following in zip_longest(tests, tests[1:]):
            test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            if self._failed:
                return self._failed[0]
        return ""

    def _reaching(
        self,
        tests: Sequence[pytest.Item],
        reach: Mapping[str, _Reach],
        file: str,
        lines: set[int],
        replacement: Replacement,
    ) -> list[pytest.Item]:
        """Return the tests that reach one of the lines, else one of the functions; the shortest first, up to a limit.

        The interpreter reports no line for some parts of a statement.
        """
        functions = {line for code in replacement.codes.values() for *_, line in code.co_lines() if line is not None}
        for wanted in (lines, functions):
            found = [
                test
                for test in tests
                if test.nodeid in reach and not wanted.isdisjoint(reach[test.nodeid].lines.get(file, ()))
            ]
            if found:
                break
        found.sort(key=lambda test: reach[test.nodeid].seconds)
        total = 0.0
        for count, test in enumerate(found):
            total += reach[test.nodeid].seconds
            if count and total > self._limit:
                return found[:count]
        return found

    def _find_reach(self, tests: Sequence[pytest.Item], live: Live) -> dict[str, _Reach]:
        """Run each test without a mistake."""
        by_file = defaultdict[Path, list[pytest.Item]](list)
        for test in tests:
            by_file[test.path].append(test)
        reach: dict[str, _Reach] = {}
        works = [(partial(self._watch, some, live), 3600.0) for some in by_file.values()]
        for _, answer in _in_children(works, self._jobs):
            if isinstance(answer, str):
                raise pytest.UsageError(f"a test file {answer} without any mistake")
            reach |= {test: _Reach(*row) for test, row in answer["reach"].items()}
            for test in answer["failed"]:
                print(f"judge: {test} fails without any mistake, and judges none", file=sys.stderr)
                reach.pop(test, None)
        return reach

    def _watch(self, tests: Sequence[pytest.Item], live: Live) -> object:
        """Run tests, and note what each reaches."""
        monitoring = sys.monitoring  # type: ignore[attr-defined] # Python 3.12
        reach: dict[str, _Reach] = {}
        seen = defaultdict[str, set[int]](set)

        def line(code: CodeType, number: int) -> object:
            seen[code.co_filename].add(number)
            return monitoring.DISABLE  # until restart_events()

        monitoring.use_tool_id(_TOOL, "judge")
        monitoring.register_callback(_TOOL, monitoring.events.LINE, line)
        codes = [function.__code__ for functions in live.values() for function in functions]
        while codes:
            code = codes.pop()
            monitoring.set_local_events(_TOOL, code, monitoring.events.LINE)
            codes += nested(code)
        for test, following in zip_longest(tests, tests[1:]):
            seen.clear()
            monitoring.restart_events()
            begun = time.monotonic()
            test.config.hook.pytest_runtest_protocol(item=test, nextitem=following)
            lines = {file: sorted(numbers) for file, numbers in seen.items()}
            reach[test.nodeid] = _Reach(time.monotonic() - begun, lines)
        return {"reach": reach, "failed": self._failed}


def main() -> int:
    """Return 0 when each mistake has its verdict. Reads a request, and writes a line for each verdict, as JSON."""
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as answers:
        os.dup2(2, 1)  # what pytest prints is no verdict
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without
        judge = Judge(
            [Change(*change) for change in request["changes"]],
            lambda verdict: answers.write(json.dumps(verdict._asdict()) + "\n"),
            **request["options"],
        )
        with tempfile.TemporaryDirectory(prefix="pyvfio-judge-") as directory:
            os.environ["PYTEST_DEBUG_TEMPROOT"] = directory  # of the children, which end without removing theirs
            options = ("-q", "-s", "--tb=short", "-p", "no:cacheprovider", "-p", "no:faulthandler")
            already = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # this module is in a package
            return int(pytest.main([*options, *already, *request["tests"]], plugins=[judge]))


if __name__ == "__main__":
    sys.exit(main())
