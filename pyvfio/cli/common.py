"""What the commands share: their end (errors, exit status), their arguments and their output."""

from __future__ import annotations

import argparse
import io
import json
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

OK, FAILED = 0, 1

_Handler: TypeAlias = Callable[[int, FrameType | None], object] | int | None


def run(main: Callable[[], int], *, name: str) -> NoReturn:
    """Run a command and exit with its status. What a user can cause is one line on stderr and status 1, never a
    traceback; argparse has its own status 2 for wrong usage. Interrupted, and cut off by a closed pipe, it ends as a
    shell expects."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no µ shows something else
    try:
        status = guard(lambda: _written(main()), name=name)
    except BrokenPipeError:
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    for stream in (sys.stdout, sys.stderr):
        _drop_unwritable(stream)
    sys.exit(status)


def _written(status: int) -> int:
    """Write the rest of the output, and return `status`."""
    if sys.stdout is not None:  # None where the caller closed stdout
        sys.stdout.flush()
    return status


def _drop_unwritable(stream: object) -> None:
    """Drop the text that a stream cannot write: the interpreter would complain when it flushes the stream at its end,
    and exit with status 120."""
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def guard(main: Callable[[], int], *, name: str) -> int:
    """The exit status of `main`, with VfioError and OSError as one line on stderr and status 1."""
    try:
        return main()
    except BrokenPipeError:
        raise
    except (VfioError, OSError) as error:
        complain(name, error)
        return FAILED


def complain(name: str, what: object) -> None:
    """Write one line to stderr, as other commands write theirs. The command goes on where stderr cannot be written."""
    if sys.stderr is None:  # the caller closed stderr: print() would write to stdout
        return
    with suppress(OSError):
        print(f"{name}: {printable(' '.join(str(what).split()))}", file=sys.stderr, flush=True)


class Interruptions:
    """While this is entered, Ctrl-C, SIGTERM and SIGHUP are noted and end nothing, however often they come: a command
    looks at `signal` between two changes, each of which is then made wholly or not at all.

    A signal that the caller ignores (nohup) stays ignored. Synchronization: the main thread only.
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
        """Raise VfioError for a device whose turn does not come any more."""
        if self.signal is not None:
            raise VfioError(f"{bdf} was left as it was: {self.signal.name} came first")

    def status(self, otherwise: int) -> int:
        """The exit status as a shell expects it: of the signal that came first, or else another."""
        return otherwise if self.signal is None else 128 + self.signal


def bdf_argument(text: str) -> str:
    """A PCI address, for `type=` of an argument."""
    try:
        return parse_bdf(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Selector:
    """Which devices are meant by what a user typed; `bdf` where that is an address."""

    text: str
    bdf: str | None
    matches: Callable[[PciDevice], bool]

    def __call__(self, device: PciDevice) -> bool:
        """Whether a device is meant."""
        return self.matches(device)


def selector_argument(text: str) -> Selector:
    """Which devices are meant by a PCI address, or by vendor and device such as 8086:10d3; for `type=`."""
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
    """The name of a driver, for `type=` of an argument."""
    try:
        return checked_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def print_json(value: Json) -> None:
    """A value for programs, indented so that a person can read it too. It is written when this returns: a signal that
    ends the process later loses nothing."""
    print(json.dumps(value, indent=2), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, each as wide as its widest cell; an empty cell is a dash, so that columns can be counted. Control
    characters are escaped."""
    lines = [header, *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
