"""The points of a call at which CPython can run a signal handler or a finalizer of the program.

CPython checks for signals when a function begins, when a C function returns, and when a loop jumps back. A point is one
of these places, or the beginning of a line, which includes the loops. A system call of a fake kernel is a function in
Python: its return counts as that of a C function. `eventfd_read` is an exception, as `Kernel` promises. The lines of
guard.py are no points, nor are those of `Vectors._read_one`: they decide by assignments, and CPython does not check
between these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import pyvfio

if TYPE_CHECKING:
    from _typeshed import TraceFunction

HOUSE = Path(pyvfio.__file__).parent
_GUARD = str(HOUSE / "guard.py")
_Result = TypeVar("_Result")


@cache
def _is_own(file: str) -> bool:
    """Return whether the file belongs to the library; `testing` is the environment of the library."""
    path = Path(file)
    return HOUSE in path.parents and HOUSE / "testing" not in path.parents


class Walk:
    """Counts the points that a call passes. At some of them, the walk makes a step, which may raise.

    `to_the_end`: points behind the last step are counted too, which costs time.
    """

    def __init__(self, steps: Mapping[int, Callable[[], object]] | None = None, *, to_the_end: bool = True) -> None:
        self._steps = steps or {}
        self._last = 0 if to_the_end else max(self._steps)
        self.count = 0
        self.where: list[str] = []
        """The place of each step that was made: file, line, and kind of the point."""

    def run(self, call: Callable[[], _Result]) -> _Result:
        """Make the call. Must run in the main thread, where Python runs signal handlers."""
        sys.setprofile(self._profile)
        sys.settrace(self._trace)
        try:
            return call()
        finally:
            stop()

    def _pass(self, frame: FrameType, kind: str) -> None:
        self.count += 1
        if self.count == self._last:
            stop()
        if (step := self._steps.get(self.count)) is not None:
            self.where.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {kind}")
            step()

    def _trace(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        del event, argument
        if not _is_own(frame.f_code.co_filename):
            return None
        self._pass(frame, "call")
        return self._line

    def _line(self, frame: FrameType, event: str, argument: object) -> TraceFunction:
        del argument
        if event == "line" and frame.f_code.co_filename != _GUARD and frame.f_code.co_name != "_read_one":
            self._pass(frame, "line")
        return self._line

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        caller = frame.f_back
        if event == "c_return" and _is_own(frame.f_code.co_filename):
            self._pass(frame, f"return of {getattr(argument, '__name__', argument)}")
        elif (
            event == "return"
            and caller
            and _is_own(caller.f_code.co_filename)
            and not _is_own(frame.f_code.co_filename)
            and frame.f_code.co_name != "eventfd_read"
        ):
            self._pass(caller, f"return of {frame.f_code.co_name}")


def stop() -> None:
    """Stop counting points."""
    sys.settrace(None)
    sys.setprofile(None)
