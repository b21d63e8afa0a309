"""`pyvfio`: one command with a subcommand for each task.

A subcommand is a module of this package with `NAME`, `make_parser()` and `main(arguments) -> int`, imported when the
subcommand is called. A new subcommand needs a line in `COMMANDS` and nothing else here.

Nothing but argparse is imported until `entry` runs: Ctrl-C in the middle of an import would show a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn, Protocol, cast

PROGRAM = "pyvfio"


class Command(NamedTuple):
    """A subcommand: the module in `pyvfio.cli`, and one line for the list of subcommands."""

    module: str
    summary: str


class CommandModule(Protocol):
    """The public names of a subcommand's module: a parser of the arguments, and `main`, with the exit status."""

    NAME: str

    def make_parser(self) -> argparse.ArgumentParser: ...

    def main(self, arguments: Sequence[str] | None = None) -> int: ...


COMMANDS = {
    "list": Command("list", "list PCI devices, their drivers and IOMMU groups"),
    "info": Command("info", "show all that the kernel says of a device"),
    "bind": Command("bind", "bind devices to vfio-pci"),
    "unbind": Command("unbind", "return devices to the kernel's own drivers"),
    "doctor": Command("doctor", "find the obstacles between a machine, or a device, and VFIO"),
    "demo": Command("demo", "show a device stopped at the end of a block that shrank"),
    "plan": Command("plan", "tell whether RAM blocks fit into the address space of a device"),
    "draw": Command("draw", "draw the IOVA space of a device"),
    "vm": Command("vm", "run a command on a real kernel in a virtual machine"),
}

HELP = "help"
_HELP_SUMMARY = "describe a command"


def load(name: str) -> CommandModule:
    """Import the module of a subcommand. Raises KeyError for an unknown name."""
    return cast(CommandModule, importlib.import_module(f"pyvfio.cli.{COMMANDS[name].module}"))


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of `pyvfio` itself, which knows the names of the subcommands and not their arguments."""
    from pyvfio.cli.parser import EXIT_STATUS, Parser  # noqa: PLC0415 (see the top of this module)

    summaries = {**{name: command.summary for name, command in COMMANDS.items()}, HELP: _HELP_SUMMARY}
    rows = "\n".join(f"  {name:<10}{summary}" for name, summary in summaries.items())
    parser = Parser(
        PROGRAM,
        "Linux VFIO for user-space drivers, hardware tests and admin scripts.",
        usage="%(prog)s COMMAND [options]",
        notes=f"commands:\n{rows}\n\n`{PROGRAM} help COMMAND` describes a command.\n\n{EXIT_STATUS}",
        examples=["pyvfio list", "pyvfio help bind", "pyvfio --version"],
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    # Not `choices`: an unknown command is answered with the nearest one.
    parser.add_argument("command", nargs="?", metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `pyvfio` and return the exit status."""
    from pyvfio import __version__  # noqa: PLC0415 (see the top of this module)
    from pyvfio.cli.common import OK, guard  # noqa: PLC0415

    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = parser.parse_args(words[:1])
    if options.version:
        print(f"{PROGRAM} {__version__}")
        return OK
    if words == [HELP]:
        parser.print_help()
        return OK
    name, rest = _command(parser, options.command, words[1:])
    module = load(name)
    return guard(lambda: module.main(rest), name=module.NAME)


def _command(parser: argparse.ArgumentParser, name: str | None, rest: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Return the name of the command to run, and the arguments."""
    from pyvfio.cli.parser import nearest  # noqa: PLC0415 (see the top of this module)

    if name == HELP:
        name, rest = rest[0], ["--help"]
    if name is None:
        parser.error(f"no command is named; the commands are {', '.join([*COMMANDS, HELP])}")
    if name not in COMMANDS:
        parser.error(f"there is no command {name!r}{nearest(name, [*COMMANDS, HELP])}")
    return name, rest


def entry() -> NoReturn:
    """Run `pyvfio` and exit: the entry point of the installed command."""
    try:
        from pyvfio.cli.common import run  # noqa: PLC0415 (see the top of this module)

        run(main, name=PROGRAM)
    except KeyboardInterrupt:
        sys.exit(130)  # while a module was imported
