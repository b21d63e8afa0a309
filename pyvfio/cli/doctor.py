"""`pyvfio doctor`: the obstacles between a machine, or a device, and VFIO, and the commands that remove them."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict

from pyvfio.cli.common import FAILED, OK, Json, bdf_argument, complain, print_document, run
from pyvfio.cli.parser import Parser
from pyvfio.diagnosis import Diagnosis, Finding, examine
from pyvfio.diagnosis.examination import ADDRESS_SPACES
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.units import GIB, KIB, MIB, TIB

NAME = "pyvfio doctor"
SCHEMA = "pyvfio.doctor/1"

_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_WIDEST = 100
_EXIT_STATUS = """\
exit status:
  0      there is no obstacle
  1      there are obstacles; stderr has the number in one line
  2      wrong arguments
  128+n  ended by signal n: 130 for Ctrl-C, 141 for a pipe without a reader"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = Parser(
        NAME,
        "Find the obstacles between this machine, or a PCI device, and a program that uses VFIO. Print each obstacle "
        "with the reason and with the commands that remove the obstacle, in the order in which to run them. Change "
        "nothing. Run the command as the user who is going to run the program. Read a script before root runs the "
        "script.",
        notes=_EXIT_STATUS,
        examples=[
            "pyvfio doctor",
            "pyvfio doctor 0000:00:02.0",
            "pyvfio doctor --memory 2G 0000:00:02.0",
            "pyvfio doctor --script 0000:00:02.0",
        ],
    )
    parser.add_argument("bdf", nargs="?", type=bdf_argument, metavar="BDF", help="PCI address, e.g. 0000:00:02.0")
    parser.add_argument(
        "--memory", type=size_argument, metavar="SIZE", help="how much memory the program is going to map, e.g. 2G"
    )
    parser.add_argument(
        "--space",
        "--iommu",
        dest="iommu",
        choices=ADDRESS_SPACES,
        help="judge for a program that uses this; by default type1, or iommufd where the kernel has no type1",
    )
    parser.add_argument("--all", action="store_true", help="print also the checks that are in order")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help=f"print a JSON document with all findings, {SCHEMA}")
    output.add_argument("--script", action="store_true", help="print a script for sh with the commands alone")
    return parser


def size_argument(text: str) -> int:
    """A number of bytes such as 512M, for `type=` of an argument."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size such as 512M or 2G: {text!r}")
    return int(match[1]) * _UNITS[match[2].upper()]


def as_json(finding: Finding) -> Json:
    """A finding for programs. The keys are kept; new ones may come."""
    document: dict[str, Json] = asdict(finding)
    return document


def as_document(diagnosis: Diagnosis) -> dict[str, Json]:
    """The keys of the JSON document but for the schema."""
    return {
        "host": diagnosis.host,
        "kernel": diagnosis.kernel,
        "bdf": diagnosis.bdf,
        "status": diagnosis.status,
        "findings": [as_json(finding) for finding in diagnosis],
    }


def run_pyvfio() -> list[str]:
    """The lines of shell that make `pyvfio` a command, for root's PATH seldom has an environment of Python."""
    python = shlex.quote(sys.executable)
    path = os.environ.get("PYTHONPATH", "")
    setting = f"PYTHONPATH={shlex.quote(path)} " if path else ""
    return [f'command -v pyvfio >/dev/null || pyvfio() {{ {setting}{python} -m pyvfio "$@"; }}']


def main(arguments: Sequence[str] | None = None, *, kernel: Kernel | None = None) -> int:
    """Examine the machine, and print the findings. Return 1, with a line on stderr, if there is an obstacle."""
    options = make_parser().parse_args(arguments)
    # The next program inherits the limit of the shell.
    found = examine(
        options.bdf,
        memory=options.memory,
        kernel=kernel or LinuxKernel(),
        process=os.getppid(),
        iommu=options.iommu,
    )
    if options.json:
        print_document(SCHEMA, **as_document(found))
    elif options.script:
        print(found.script(run_pyvfio=run_pyvfio()), end="", flush=True)
    else:
        width = min(shutil.get_terminal_size().columns, _WIDEST)
        print(found.text(everything=options.all, width=width, verdict=found.ok), flush=True)
    if found.ok:
        return OK
    complain(NAME, found.verdict)
    return FAILED


if __name__ == "__main__":
    run(main, name=NAME)
