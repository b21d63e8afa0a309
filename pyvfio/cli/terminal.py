"""Text for a terminal: colours, a table that fits, and the signs of a tree.

Without a terminal nothing is coloured, and a table is as wide as its cells, so that grep and awk find whole cells.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TextIO, TypeAlias

from pyvfio.cli.common import cells_of, format_table

When = Literal["auto", "always", "never"]
_Table: TypeAlias = tuple[list[str], list[list[str]]]  # the header, and the cells of each row

_LEAST = 10  # characters that an elastic column keeps
_CUT = "…"


class Style(Enum):
    """A style of text: the parameters of SGR (ECMA-48)."""

    HEADING = "1"
    GOOD = "32"
    BAD = "31"
    DIM = "2"


@dataclass(frozen=True, slots=True)
class Terminal:
    """The output of a command: the `width` in characters, None where nothing limits a line, and whether text has
    colours."""

    width: int | None
    colour: bool

    def paint(self, text: str, style: Style | None) -> str:
        """Return `text` in a style, or unchanged where there are no colours."""
        return f"\x1b[{style.value}m{text}\x1b[0m" if self.colour and style is not None and text else text


def add_colour_option(parser: argparse.ArgumentParser) -> None:
    """Add `--color`, which is None unless given."""
    parser.add_argument(
        "--color",
        choices=["auto", "always", "never"],
        default="auto",
        help="colours; auto: on a terminal, unless NO_COLOR is set or TERM is dumb",
    )


def find_terminal(colour: When = "auto", *, stream: TextIO | None = None) -> Terminal:
    """Return the properties of a stream (default: stdout).

    COLUMNS limits the width also without a terminal. Source: no-color.org; termcap's "dumb".
    """
    stream = sys.stdout if stream is None else stream
    tty = stream is not None and not stream.closed and stream.isatty()
    wanted = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Terminal(_width(stream, tty=tty), wanted if colour == "auto" else colour == "always")


def _width(stream: TextIO | None, *, tty: bool) -> int | None:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    if stream is None or not tty:
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except OSError:
        return None


def fitting_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    terminal: Terminal,
    *,
    elastic: Collection[str] = (),
    drop: Sequence[str] = (),
    styles: Sequence[Style | None] = (),
) -> list[str]:
    """Return the lines of a table that fits the terminal.

    Where the table is too wide, the columns without any value go first, then the `elastic` ones are cut, then those of
    `drop` go one after the other. If that is not enough, each row becomes a paragraph: the first cell, and below it the
    others, whole, with their names. `styles` has the style of each row.
    """
    styles = styles or [None] * len(rows)
    cells = [cells_of(row) for row in rows]
    width = terminal.width
    shown = list(header), cells
    if width is not None and _total(*shown) > width:
        choices = (_cut(*choice, elastic, width) for choice in _choices(header, cells, drop))
        narrow = next((choice for choice in choices if _total(*choice) <= width), None)
        if narrow is None:
            return _paragraphs(header, cells, terminal, styles)
        shown = narrow
    first, *others = format_table(*shown)
    painted = [terminal.paint(line, style) for line, style in zip(others, styles, strict=True)]
    return [terminal.paint(first, Style.HEADING), *painted]


def _choices(header: Sequence[str], cells: Sequence[Sequence[str]], drop: Sequence[str]) -> Iterator[_Table]:
    """The table with the columns that have a value, then with ever fewer."""
    columns = [name for at, name in enumerate(header) if at == 0 or any(row[at] != "-" for row in cells)]
    for name in ["", *(each for each in drop if each in columns)]:
        columns = [each for each in columns if each != name]
        yield columns, [[row[header.index(each)] for each in columns] for row in cells]


def _total(header: Sequence[str], cells: Sequence[Sequence[str]]) -> int:
    return max(map(len, format_table(header, cells)))


def _cut(header: list[str], cells: list[list[str]], elastic: Collection[str], width: int) -> _Table:
    """Cut the elastic columns, the widest first, until the table fits or none can be cut any more."""
    columns = {at: [name, *(row[at] for row in cells)] for at, name in enumerate(header) if name in elastic}
    limits = {at: max(map(len, column)) for at, column in columns.items()}
    for _ in range(_total(header, cells) - width):
        widest = max(limits, key=lambda at: limits[at], default=None)
        if widest is None or limits[widest] <= max(_LEAST, len(header[widest])):
            break
        limits[widest] -= 1
    return header, [[shorten(cell, limits.get(at)) for at, cell in enumerate(row)] for row in cells]


def shorten(text: str, width: int | None) -> str:
    """Return `text`, cut with an ellipsis to `width` characters."""
    return text if width is None or len(text) <= width else text[: max(width - 1, 0)].rstrip() + _CUT


def _paragraphs(
    header: Sequence[str], cells: Sequence[Sequence[str]], terminal: Terminal, styles: Sequence[Style | None]
) -> list[str]:
    lines = []
    for row, style in zip(cells, styles, strict=True):
        lines.append(terminal.paint(row[0], style or Style.HEADING))
        for name, cell in zip(header[1:], row[1:], strict=True):
            if cell != "-":
                lines += field_lines(name.lower(), cell, terminal, indent=2, column=10)
    return lines


def field_lines(name: str, value: str, terminal: Terminal, *, indent: int, column: int) -> list[str]:
    """Return a name and the value beside it, from `column` on, folded to the width of the terminal."""
    first = f"{' ' * indent}{name}".ljust(column) if len(name) + indent < column else f"{' ' * indent}{name} "
    if terminal.width is None:
        return [first + value]
    folded = textwrap.wrap(
        value,
        max(terminal.width, column + _LEAST),
        initial_indent=first,
        subsequent_indent=" " * column,
        break_on_hyphens=False,
    )
    return folded or [first.rstrip()]
