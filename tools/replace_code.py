"""Give the functions of a running process the code of another source, without an import."""

from __future__ import annotations

import gc
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from inspect import CO_OPTIMIZED
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple, TypeAlias

Key: TypeAlias = tuple[str, str, int]
"""The file, the qualified name and the first line of a function: what its code is known by."""

Live: TypeAlias = Mapping[Key, Sequence[FunctionType]]
"""The functions that exist in this process. A decorator and a closure can make several of one code."""


class Replacement(NamedTuple):
    """The new code of each function that differs between two sources of a file.

    `whole`: no other code differs. A constant of a module and a decorator are executed once, at the import.
    """

    codes: dict[Key, CodeType]
    whole: bool


def live_functions(package: Path) -> dict[Key, list[FunctionType]]:
    """Return all functions of the files below `package` that exist in this process."""
    gc.unfreeze()  # frozen objects are not among those that the collector names
    prefix, found = f"{package}{os.sep}", defaultdict[Key, list[FunctionType]](list)
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename.startswith(prefix):
            found[_key(thing.__code__)].append(thing)
    return found


def nested(code: CodeType) -> list[CodeType]:
    """Return the code objects of the functions and classes that `code` makes."""
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def find_replacement(file: str, before: str, after: str, live: Live) -> Replacement:
    """Return the replacement that makes the functions of `file`, with the source `before`, those of `after`."""
    codes: dict[Key, CodeType] = {}

    def look(old: CodeType, new: CodeType, *, held: bool) -> bool:
        """Return whether all that differs is in functions. `held`: an outer function gets new code in any case."""
        held = held or _key(old) in live
        if _key(old) in live and _differs(old, new):
            codes[_key(old)] = new
        inner = [look(*pair, held=held) for pair in _pairs(old, new)]
        return (held or _own(old) == _own(new)) and all(inner)

    sources = [compile(source, file, "exec", dont_inherit=True) for source in (before, after)]
    whole = look(sources[0], sources[1], held=False)
    return Replacement(codes, whole and bool(codes))


def put_in(codes: Mapping[Key, CodeType], live: Live) -> bool:
    """Give each function its new code. Return False if a function cannot have it, for want of a variable."""
    for key, code in codes.items():
        for function in live[key]:
            try:
                function.__code__ = code
            except ValueError:
                return False
    return True


def changed_lines(before: str, after: str) -> range:
    """Return the lines of `before`, counted from 1, from the first that differs to the last. At least one."""
    old, new = before.splitlines(), after.splitlines()
    first = min(_equal(old, new), len(old) - 1)
    behind = min(_equal(old[::-1], new[::-1]), len(old) - first - 1)
    return range(first + 1, len(old) - behind + 1)


def _equal(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = enumerate(zip_longest(one, other))
    return next((at for at, (line, changed) in pairs if line != changed), 0)


def _key(code: CodeType) -> Key:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _own(code: CodeType) -> tuple[object, ...]:
    """Return what a code object executes, without nested code and without line numbers."""
    constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
    if not code.co_flags & CO_OPTIMIZED:  # a class; from Python 3.13 on, its first line is among the constants
        constants = [constant for constant in constants if constant != code.co_firstlineno]
    return (
        *(code.co_code, code.co_exceptiontable, code.co_flags, code.co_names, code.co_varnames),
        *(code.co_freevars, code.co_cellvars),
        [(type(constant), constant) for constant in constants],
    )


def _pairs(before: CodeType, after: CodeType) -> Iterator[tuple[CodeType, CodeType]]:
    """Yield each code object that `before` makes, and the one of `after` in its place."""
    places = defaultdict[str, list[CodeType]](list)
    for code in nested(after):
        places[code.co_name].append(code)
    for code in nested(before):
        if others := places[code.co_name]:
            yield code, others.pop(0)


def _differs(old: CodeType, new: CodeType) -> bool:
    return _own(old) != _own(new) or any(_differs(*pair) for pair in _pairs(old, new))
