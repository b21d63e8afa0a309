"""A picture as text: a line with a bar for each span, all bars on one logarithmic scale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from pyvfio.pci.sysfs import printable
from pyvfio.picture.rows import Row, ruler

_UNICODE: Mapping[str, str] = {"mapped": "█", "used": "▒", "reserved": "░", "closed": "▚", "free": "·"}
_ASCII: Mapping[str, str] = {"mapped": "#", "used": "o", "reserved": ".", "closed": "x", "free": " "}
_LEGEND = "{mapped} mapped  {used} used, not mapped  {reserved} reserved  (logarithmic)"
_NARROW = 60
_LONGEST_NAME = 24
_SHORTEST_BAR = 20


def to_text(title: str, rows: Sequence[Row], *, width: int = 80, ascii_only: bool = False) -> str:
    """Return a picture as lines of at most `width` columns; below 60 columns each bar has a separate line.

    Control characters in names are escaped.
    """
    width = max(width, 30)
    title = printable(title)
    rows = [replace(row, name=printable(row.name), label=printable(row.label)) for row in rows]
    marks = _ASCII if ascii_only else _UNICODE
    lines = _wide(rows, marks, width) if width >= _NARROW else _narrow(rows, marks, width)
    legend = _LEGEND.format(**marks)
    text = "\n".join([title, *lines, legend if len(legend) <= width else legend.replace("  ", "\n")])
    if ascii_only:
        text = text.replace("…", "~").encode("ascii", "replace").decode()
    return "\n".join(_shortened(line, width, "~" if ascii_only else "…") for line in text.split("\n"))


def _bars(rows: Sequence[Row], marks: Mapping[str, str], longest: int) -> list[str]:
    length = ruler(rows, 3, longest)
    return [_bar(row, length, marks) for row in rows]


def _bar(row: Row, length: Callable[[int], float], marks: Mapping[str, str]) -> str:
    cells = round(length(row.size))
    bar = [marks.get(row.style, marks["reserved"])] * cells
    for style, start, end in row.parts:
        first = min(round(length(start)), cells - 1)
        last = min(max(round(length(end)), first + 1), cells)
        bar[first:last] = marks[style] * (last - first)
    return "".join(bar)


def _wide(rows: Sequence[Row], marks: Mapping[str, str], width: int) -> list[str]:
    address = _widest(f"{row.start:#x}" for row in rows)
    name = min(_widest(row.name for row in rows), _LONGEST_NAME)
    label = _widest(row.label for row in rows)
    longest = max(width - address - name - label - 6, _SHORTEST_BAR)
    return [
        f"{row.start:>#{address}x}  {_shortened(row.name, name):<{name}}  {bar:<{longest}}  {row.label}"
        for row, bar in zip(rows, _bars(rows, marks, longest), strict=True)
    ]


def _widest(words: Iterable[str]) -> int:
    return max(map(len, words), default=0)


def _narrow(rows: Sequence[Row], marks: Mapping[str, str], width: int) -> list[str]:
    lines = []
    for row, bar in zip(rows, _bars(rows, marks, width - 2), strict=True):
        lines.append(f"{row.start:#x} {row.name}: {row.label}")
        if row.parts:
            lines.append(f"  {bar}")
    return lines


def _shortened(text: str, width: int, mark: str = "…") -> str:
    text = text.rstrip()
    return text if len(text) <= width else text[: width - 1] + mark
