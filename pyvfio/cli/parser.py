"""The parser of a command's arguments: wrong usage is one line on stderr, and each help ends with examples."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from pyvfio.cli.common import WRONG_USAGE, complain

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

EXIT_STATUS = """\
exit status:
  0      all was done
  1      something failed or does not exist; stderr has a line for each
  2      wrong arguments
  128+n  ended by signal n: 130 for Ctrl-C, 141 for a pipe without a reader"""


class Format(argparse.RawDescriptionHelpFormatter):
    """Fill a paragraph of one line to the width of the terminal. Leave a paragraph of several lines as written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            textwrap.indent(each, indent)
            if "\n" in each
            else textwrap.fill(each, width, initial_indent=indent, subsequent_indent=indent)
            for each in text.split("\n\n")
        )


_ELSEWHERE = {
    "--fake": "pyvfio demo and pyvfio plan can run on the fake kernel",
    "--kernel": "pyvfio demo and pyvfio vm have --kernel; pyvfio plan has --fake KERNEL",
    "--space": "pyvfio demo, doctor, draw and plan have --space; pyvfio vm has --kernel 7+iommufd",
    "--iommu": "pyvfio demo and vm choose the IOMMU; pyvfio doctor, draw and plan choose the address space",
}
"""Options that users know from another command, and where such an option is."""


def iommu_argument(text: str) -> str:
    """Return the word for an IOMMU, which may be unknown. For `type=` of an argument.

    Refuses address spaces, which other commands, and `open_device(iommu=)`, choose by the same word.
    """
    if text in {"type1", "iommufd"}:
        raise argparse.ArgumentTypeError(
            f"{text} is an address space, not an IOMMU: use pyvfio demo --space {text}, or for a kernel with iommufd "
            "pyvfio vm --kernel 7+iommufd"
        )
    return text


class Parser(argparse.ArgumentParser):
    """The parser of a command.

    `examples` are command lines, shown at the end of the help. `notes` are paragraphs that the help shows before the
    examples. An option cannot be abbreviated: a later option could change the meaning of an abbreviation in a script.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        *,
        examples: Sequence[str],
        usage: str | None = None,
        notes: str = EXIT_STATUS,
    ) -> None:
        lines = "\n".join(f"  {line}" for line in examples)
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=f"{notes}\n\nexamples:\n{lines}",
            formatter_class=Format,
            allow_abbrev=False,
        )
        self._words: Sequence[str] = ()

    def parse_known_args(  # type: ignore[override]  # argparse's own is declared for namespaces of any class
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's own. Keeps the words for `error`."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, argparse.Namespace() if namespace is None else namespace)

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help. Unlike argparse's own, raise OSError if the help cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Write `message` to stderr as one line, with the option that an unknown one resembles. Exit with status 2."""
        # argparse refuses the word behind an unknown option first, as a wrong argument of the command.
        early = re.match(r"the following arguments are required|argument [^-]|argument -\S+: expected", message)
        if early and (option := self._unknown_option()) is not None:
            message = f"unrecognized arguments: {option}"
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            message += self._instead_of(unknown[1])
        complain(self.prog, f"{message}{' See' if message.endswith('?') else '; see'} {self.prog} --help")
        self.exit(WRONG_USAGE)

    def _unknown_option(self) -> str | None:
        for word in self._words:
            if word == "--":
                return None
            if word.startswith("--") and word.partition("=")[0] not in self._option_string_actions:
                return word
        return None

    def _instead_of(self, unknown: str) -> str:
        """Return the command that has an option, or a question that names the option that `unknown` resembles."""
        if unknown in _ELSEWHERE:
            return f": {_ELSEWHERE[unknown]}"
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = {name.lstrip("-"): name for action in shown for name in action.option_strings}
        return _did_you_mean(known.get(_most_like(unknown.lstrip("-"), known)))


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question that names the known word that is most like `word`; nothing if none is."""
    return _did_you_mean(_most_like(word, known))


def _did_you_mean(word: str | None) -> str:
    return f"; did you mean {word}?" if word else ""


def _most_like(word: str, known: Iterable[str]) -> str:
    import difflib  # noqa: PLC0415 (an error alone needs it)

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return found[0] if found else ""
