"""Completions for bash, zsh and fish, and the manual page of `pyvfio`, made from the parsers of the commands.

    python -m tools.cli_pages DIR

writes them below DIR, in the places below `share/` where shells and man look. The build of a wheel does the same
(`tools/build_backend.py`). shtab makes the completions. The manual page is written here: argparse-manpage leaves out
the examples, the exit statuses and the line that apropos shows.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import shtab

from pyvfio import __version__
from pyvfio.cli.main import COMMANDS, HELP, PROGRAM, load, make_parser
from pyvfio.cli.parser import EXIT_STATUS, Format
from pyvfio.testing import kernels

PLACES = {
    "bash": Path("bash-completion/completions/pyvfio"),
    "zsh": Path("zsh/site-functions/_pyvfio"),
    "fish": Path("fish/vendor_completions.d/pyvfio.fish"),
}
MAN_PAGE = Path("man/man1/pyvfio.1")
SUMMARY = "Linux VFIO for user-space drivers, hardware tests and admin scripts"

_BDFS = {
    "bash": "_pyvfio_bdfs",
    "zsh": "_pyvfio_bdfs",
    "fish": "(command ls /sys/bus/pci/devices 2>/dev/null)",
}
_LINES = " ".join(kernels.LINES)
_KERNELS = {
    "bash": "_pyvfio_kernels",
    "zsh": "_pyvfio_kernels",
    "fish": f"{_LINES} {shtab.FILE['fish']}",
}
_PREAMBLE = {
    # The colons of an address end words for readline: a reply replaces the text behind the last one.
    "bash": """\
_pyvfio_bdfs() {
  local line=${COMP_LINE:0:COMP_POINT}
  local word=${line##*[[:space:]]}
  local before=${word%"${word##*:}"}
  [[ $COMP_WORDBREAKS == *:* ]] || before=
  local path
  for path in /sys/bus/pci/devices/"$word"*; do
    [[ -e $path ]] && path=${path##*/} && printf '%s\\n' "${path#"$before"}"
  done
}
"""
    f"""\
_pyvfio_kernels() {{
  compgen -W "{_LINES}" -- "$1"
  _shtab_compgen_files "$1"
}}
""",
    "zsh": """\
_pyvfio_bdfs() {
  local -a found=(/sys/bus/pci/devices/*(N:t))
  compadd -a found
}
"""
    f"""\
_pyvfio_kernels() {{
  _alternative 'lines:Linux:({_LINES})' 'files:file:_files'
}}
""",
    "fish": "",
}


# --- Completions -------------------------------------------------------------------------------------------------


def completion(shell: str) -> str:
    """Return the completion of a shell."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=SUMMARY)
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, command in COMMANDS.items():
        own = load(name).make_parser()
        for action in own._actions:
            _complete(action)
        # A short description: shells show it beside the name.
        commands.add_parser(name, help=command.summary, description=command.summary, parents=[own], add_help=False)
    asked = commands.add_parser(HELP, help="describe a command", description="describe a command", add_help=False)
    asked.add_argument("command", nargs="?", choices=list(COMMANDS))
    return str(shtab.complete(parser, shell, preamble=_PREAMBLE[shell]))


def _complete(action: argparse.Action) -> None:
    """Let shells complete an argument by the kind of value that its metavar names."""
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    completions = {"BDF": _BDFS, "|".join(kernels.LINES): _KERNELS, "FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
    kinds = [metavar.removesuffix("|FILE"), *metavar.split("|")]
    complete = next((each for kind, each in completions.items() if kind in kinds), None)
    if complete is not None:
        action.complete = complete  # type: ignore[attr-defined]  # shtab's own


# --- The manual page ---------------------------------------------------------------------------------------------


def man_page() -> str:
    """Return the manual page, in the macros of man(7). SOURCE_DATE_EPOCH, if set, gives the date."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = time.strftime("%Y-%m-%d", time.gmtime(int(epoch) if epoch else None))
    top = make_parser()
    lines = [
        f'.TH PYVFIO 1 "{date}" "pyvfio {__version__}" "User Commands"',
        ".SH NAME",
        f"{PROGRAM} \\- {_roff(SUMMARY)}",
        ".SH SYNOPSIS",
        f".B {PROGRAM}",
        ".I COMMAND",
        "[options]",
        ".br",
        f".B {PROGRAM} {HELP}",
        "[",
        ".I COMMAND",
        "]",
        ".SH DESCRIPTION",
        _roff(top.description or ""),
        *_epilog(top),
    ]
    for name in COMMANDS:
        lines += _command(load(name).make_parser())
    lines += [".SH SEE ALSO", ".BR lspci (8),", ".BR driverctl (8),", ".BR modprobe (8)"]
    return "\n".join(lines) + "\n"


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f'.SH "{parser.prog.upper()}"'
    # The width of the terminal that builds the page is of no account.
    parser.formatter_class = partial(Format, width=78)
    usage = parser.format_usage().splitlines()
    yield from _verbatim([line[len("usage: ") :] for line in usage if line])
    for paragraph in (parser.description or "").split("\n\n"):
        yield from (".PP", _roff(paragraph))
    for action in parser._actions:
        if action.help not in {argparse.SUPPRESS, None} and "--help" not in action.option_strings:
            yield ".TP"
            yield f"\\fB{_roff(', '.join(action.option_strings) or _value(action))}\\fR{_argument(action)}"
            yield _roff(str(action.help) % {**vars(action), "prog": parser.prog})
    yield from _epilog(parser)


def _value(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _argument(action: argparse.Action) -> str:
    return "" if action.nargs == 0 or not action.option_strings else f" \\fI{_roff(_value(action))}\\fR"


def _epilog(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Paragraphs of one line are filled; others are shown as written, below their first line if that is a heading."""
    for paragraph in (parser.epilog or "").split("\n\n"):
        if paragraph == EXIT_STATUS and parser.prog != PROGRAM:
            continue  # that of every command: at the top of the page alone
        first, *rest = paragraph.splitlines() or [""]
        if rest and first.endswith(":"):
            yield from (f".SS {_roff(first.removesuffix(':').capitalize())}", *_verbatim(rest))
        elif rest:
            yield from (".PP", *_verbatim([first, *rest]))
        elif first:
            yield from (".PP", _roff(first))


def _verbatim(lines: Sequence[str]) -> Iterator[str]:
    yield from (".nf", *map(_roff, lines), ".fi")


def _roff(text: str) -> str:
    """Escape text: hyphens stay hyphens that can be copied, and no line is taken for a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


# --- Files -------------------------------------------------------------------------------------------------------


def write_pages(share: Path) -> list[Path]:
    """Write all pages below `share`. Return their paths."""
    pages = {place: completion(shell) for shell, place in PLACES.items()}
    pages[MAN_PAGE] = man_page()
    for place, text in pages.items():
        (share / place).parent.mkdir(parents=True, exist_ok=True)
        (share / place).write_text(text, encoding="utf-8")
    return [share / place for place in pages]


def main() -> None:
    """Write the pages below the directory that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tools.cli_pages", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="where share/ begins")
    print(*write_pages(parser.parse_args().directory), sep="\n")


if __name__ == "__main__":
    main()
