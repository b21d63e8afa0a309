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
from typing import NoReturn, TypeAlias

from pyvfio.errors import VfioError
from pyvfio.pci import PciDevice, parse_bdf

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"

OK, FAILED = 0, 1


def run(main: Callable[[], int], *, name: str) -> NoReturn:
    """Run a command and exit with its status. What a user can cause is one line on stderr and status 1, never a
    traceback; argparse has its own status 2 for wrong usage. Interrupted, and cut off by a closed pipe, it ends as a
    shell expects."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no µ shows something else
    try:
        status = guard(main, name=name)
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter would complain again when it flushes stdout at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


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
    """One line on stderr, as other commands write theirs."""
    print(f"{name}: {' '.join(str(what).split())}", file=sys.stderr, flush=True)


def bdf_argument(text: str) -> str:
    """A PCI address, for `type=` of an argument."""
    try:
        return parse_bdf(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def selector_argument(text: str) -> Callable[[PciDevice], bool]:
    """Which devices are meant by a PCI address, or by vendor and device such as 8086:10d3; for `type=`."""
    if match := re.fullmatch(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})", text):
        wanted = (int(match[1], 16), int(match[2], 16))
        return lambda device: (device.vendor, device.device) == wanted
    try:
        bdf = parse_bdf(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"neither a PCI address nor vendor:device, such as 0000:00:02.0 or 8086:10d3: {text!r}"
        ) from error
    return lambda device: device.bdf == bdf


def driver_argument(text: str) -> str:
    """The name of a driver, for `type=` of an argument."""
    if not text or "/" in text:
        raise argparse.ArgumentTypeError(f"not the name of a driver: {text!r}")
    return text


def print_json(value: Json) -> None:
    """A value for programs, indented so that a person can read it too."""
    print(json.dumps(value, indent=2))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, each as wide as its widest cell; an empty cell is a dash, so that columns can be counted."""
    lines = [header, *([cell or "-" for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
