"""Which functions of the package some work calls: a cost that a test can compare, as times cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def called(work: Callable[[], object]) -> list[str]:
    """The functions of the package that `work` calls, and those that call one in C; those of the fake do not count."""
    names = []

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        path = frame.f_code.co_filename
        if event in ("call", "c_call") and "/pyvfio/" in path and "/testing/" not in path:
            names.append(frame.f_code.co_qualname)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return names


def python_calls(work: Callable[[], object]) -> int:
    """How many those are."""
    return len(called(work))
