"""Findings of `pyvfio.doctor` and of `VfioError.explain`: frozen snapshots, each the result of one check."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "note", "wrong"]
"""`wrong` is an obstacle; `note` is good to know; `ok` is in order."""

_INDENT = " " * 4


@dataclass(frozen=True, slots=True)
class Command:
    """A line of shell that removes an obstacle.

    `needs_root`: only root can run the line. `risky`: other programs, or the machine's safety, lose something; a
    script has the line as a comment.
    """

    text: str
    comment: str = ""
    needs_root: bool = True
    risky: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    `summary` is the finding, with numbers. `why` gives the reason or the consequence. `commands` remove the
    obstacle, in order; `by_hand` is a step that no command on this machine can do. Where `reboot` is set, the commands
    have no effect before the next boot. `add_arguments` and `remove_arguments` are words of the kernel's command line.
    """

    check: str
    status: Status
    summary: str
    why: str = ""
    commands: tuple[Command, ...] = ()
    by_hand: str = ""
    reboot: bool = False
    add_arguments: tuple[str, ...] = ()
    remove_arguments: tuple[str, ...] = ()

    def lines(self, width: int = 80) -> Iterator[str]:
        """Yield the finding as lines of text of at most `width` columns; a command is never broken."""
        yield from wrapped(f"{self.status:<5} {self.check}: {self.summary}", width, later=" " * 6)
        for text in (self.why, self.by_hand):
            if text:
                yield from wrapped(_INDENT + text, width, later=_INDENT)
        for command in self.commands:
            if command.comment:
                yield from wrapped(f"{_INDENT}# {command.comment}", width, later=f"{_INDENT}# ")
            yield f"{_INDENT}{'# ' if command.risky else ''}{command.text}"
        if self.reboot:
            yield f"{_INDENT}Then reboot."

    def __str__(self) -> str:
        return "\n".join(self.lines())


def wrapped(text: str, width: int, *, later: str = "") -> list[str]:
    """Return `text` in lines of at most `width` columns, those after the first with `later` before them."""
    return textwrap.wrap(text, max(width, 20), subsequent_indent=later, break_long_words=False, break_on_hyphens=False)
