"""The parser of a command's arguments: wrong usage is one line on stderr, and each help ends with examples."""

from __future__ import annotations

import argparse
import re
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

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help. Unlike argparse's own, raise OSError if the help cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Write `message` to stderr as one line, with the option that an unknown one resembles. Exit with status 2."""
        if unknown := re.match(r"unrecognized arguments: ([^\s=]+)", message):
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            message += nearest(unknown[1], [name for action in shown for name in action.option_strings])
        complain(self.prog, f"{message}{' See' if message.endswith('?') else '; see'} {self.prog} --help")
        self.exit(WRONG_USAGE)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a question that names the known word that is most like `word`; nothing if none is."""
    import difflib  # noqa: PLC0415 (an error alone needs it)

    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
