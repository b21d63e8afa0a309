"""Shared by the commands: errors and exit statuses, types of arguments, output."""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import NoReturn, Self, TypeAlias

from pyvfio.errors import VfioError
from pyvfio.pci import PciDevice, parse_bdf
from pyvfio.pci.refusals import checked_name
from pyvfio.pci.sysfs import printable

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"

OK, FAILED, WRONG_USAGE = 0, 1, 2  # argparse has 2

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


def run(main: Callable[[], int], *, name: str) -> NoReturn:
    """Run a command and exit with its status.

    VfioError and OSError become one line on stderr and status 1. Wrong arguments have status 2 from argparse. Ctrl-C
    ends the command with 130 and a pipe without a reader with 141, as shells expect. Any other exception is a bug, and
    shows a traceback.
    """
    try:
        status = _run(main, name)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


def _run(main: Callable[[], int], name: str) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no µ shows something else
    try:
        status = guard(main, name=name)
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    for stream in (sys.stdout, sys.stderr):
        _drop_unwritable(stream)
    return status


def _status_of(main: Callable[[], int]) -> int:
    """Run `main`, write the rest of the output, and return the exit status.

    argparse exits after a help, whose text can still be unwritten.
    """
    try:
        status = main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        status = end.code
    if sys.stdout is not None:  # None where the caller closed stdout
        sys.stdout.flush()
    return status


def _drop_unwritable(stream: object) -> None:
    """Drop the text that a stream cannot write.

    Otherwise the interpreter would report the error when it flushes the stream, and exit with status 120.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def guard(main: Callable[[], int], *, name: str) -> int:
    """Return the exit status of `main`. VfioError and OSError become one line on stderr and status 1.

    All output is written when this returns.
    """
    try:
        return _status_of(main)
    except BrokenPipeError:
        raise
    except (VfioError, OSError) as error:
        complain(name, error)
        _drop_unwritable(sys.stdout)  # the same error would be reported again when the rest is written
        return FAILED


def complain(name: str, message: object) -> None:
    """Write one line to stderr: the name of the command and a message. Ignore a stderr that cannot be written."""
    if sys.stderr is None:  # the caller closed stderr: print() would write to stdout
        return
    with suppress(OSError):
        print(f"{name}: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)


class Interruptions:
    """Note Ctrl-C, SIGTERM and SIGHUP while this is entered. None of them ends the process, however often they come.

    A command looks at `signal` between two changes, so each change is made wholly or not at all. A signal that the
    caller ignores (nohup) stays ignored. Synchronization: the main thread only.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._former: dict[signal.Signals, _Handler] = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def check(self, bdf: str) -> None:
        """Raise VfioError for a device that is not changed because a signal came first."""
        if self.signal is not None:
            raise VfioError(f"{bdf} was not changed: {self.signal.name} came first")

    def status(self, otherwise: int) -> int:
        """Return 128 and the number of the first signal; `otherwise` where none came."""
        return otherwise if self.signal is None else 128 + self.signal


def bdf_argument(text: str) -> str:
    """Return a PCI address in canonical form; for `type=` of an argument."""
    try:
        return parse_bdf(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Selector:
    """A predicate of devices that a user typed as `text`. `bdf` is the address where `text` is one."""

    text: str
    bdf: str | None
    matches: Callable[[PciDevice], bool]

    def __call__(self, device: PciDevice) -> bool:
        """Return whether the selector matches a device."""
        return self.matches(device)


def selector_argument(text: str) -> Selector:
    """Return the selector for a PCI address, or for vendor and device such as 8086:10d3; for `type=`."""
    if match := re.fullmatch(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})", text):
        wanted = (int(match[1], 16), int(match[2], 16))
        return Selector(text, None, lambda device: (device.vendor, device.device) == wanted)
    try:
        bdf = parse_bdf(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"neither a PCI address nor vendor:device, such as 0000:00:02.0 or 8086:10d3: {text!r}"
        ) from error
    return Selector(text, bdf, lambda device: device.bdf == bdf)


def driver_argument(text: str) -> str:
    """Return the name of a driver; for `type=` of an argument."""
    try:
        return checked_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def print_json(value: Json) -> None:
    """Print a value as JSON, indented for people.

    The text is written when this returns: a signal that ends the process later loses nothing.
    """
    import json  # noqa: PLC0415 (few outputs are JSON)

    print(json.dumps(value, indent=2), flush=True)


def print_document(schema: str, **content: Json) -> None:
    """Print the JSON document of a command.

    `schema` is the document's name and version, such as "pyvfio.list/1", and the first key of the document. A version
    can gain keys; a key that is removed or changes its meaning makes a new version.
    """
    print_json({"schema": schema, **content})


def cells_of(row: Sequence[str]) -> list[str]:
    """Return the cells of a row as printed: control characters escaped, and a dash for an empty cell.

    The dash lets awk count columns.
    """
    return [printable(cell) or "-" for cell in row]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table. Each column is as wide as its widest cell."""
    lines = [header, *map(cells_of, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; see `format_table`."""
    print(*format_table(header, rows), sep="\n")
