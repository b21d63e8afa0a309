"""Pictures as SVG: the same rows as the text, one document for one or several pictures below each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from pyvfio.picture.rows import Row, ruler

_WIDTH, _ROW, _BAR, _TOP = 930, 22, 14, 34
_ADDRESS, _NAME, _BARS, _LABEL = 10, 150, 300, 620
_LONGEST = _LABEL - _BARS - 12
_MOST_NAME, _MOST_TITLE = 22, 100
_APART = 5.0  # pieces that are narrower have no line between them
_COLOURS = {
    "block": "#2563a8",
    "planned": "#2563a8",
    "buffer": "#2e7d4f",
    "temporary": "#b3731a",
    "other": "#6b5b95",
    "closed": "#999999",
}
_STYLE = (
    "text{font:12px ui-monospace,Menlo,Consolas,monospace;fill:#222}"
    ".t{font-weight:bold}.f{fill:#777}.u{opacity:.45}.r{fill:none;stroke-width:1}"
)


def to_svg(pictures: Sequence[tuple[str, Sequence[Row]]]) -> str:
    """Return one SVG document with the pictures, each a title and rows, below each other.

    The same pictures give the same bytes.
    """
    lines: list[str] = []
    top = 0
    for title, rows in pictures:
        lines += _drawn(title, rows, top)
        top += _TOP + _ROW * len(rows) + 12
    top += 2 * _ROW
    titles = escape(_printable("; ".join(title for title, _rows in pictures)))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="100%" role="img">',
            f"<title>{titles}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{top}" fill="white"/>',
            *lines,
            *_legend(top - 2 * _ROW),
            "</svg>",
            "",
        ]
    )


def _drawn(title: str, rows: Sequence[Row], top: int) -> list[str]:
    lines = [_text(_ADDRESS, top + 20, _cut(title, _MOST_TITLE), "t")]
    length = ruler(rows, 24, _LONGEST)
    for index, row in enumerate(rows):
        y = top + _TOP + index * _ROW
        quiet = "f" if row.style in ("free", "closed") else ""
        lines.append(_text(_ADDRESS, y + 11, f"{row.start:#x}", quiet))
        lines.append(_text(_NAME, y + 11, _cut(row.name, _MOST_NAME), quiet))
        lines += _bar(row, length, y)
        lines.append(_text(_LABEL, y + 11, row.label, quiet))
    return lines


def _bar(row: Row, length: Callable[[int], float], y: int) -> list[str]:
    whole = length(row.size)
    if row.style == "free":
        return [f'<path d="M{_BARS} {y + _BAR // 2}h{whole:.1f}" stroke="#bbb" stroke-dasharray="2 3"/>']
    colour = _COLOURS[row.style]
    tip = escape(_printable(f"{row.name} at {row.start:#x}: {row.label}"))
    lines = [f"<g><title>{tip}</title>"]
    for style, start, end in row.parts:
        width = max(length(end) - length(start), 1.5)  # a page at the end of a TiB shows, too
        x = _BARS + min(length(start), whole - width)
        apart = ' stroke="white" stroke-width=".5"' if width >= _APART else ""
        kind = ' class="u"' if style == "used" else apart
        lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{colour}"{kind}/>')
    dashes = ' stroke-dasharray="3 2"' if row.style in ("planned", "closed") else ""
    frame = f'<rect class="r" x="{_BARS}" y="{y}" width="{whole:.1f}" height="{_BAR}" stroke="{colour}"{dashes}/>'
    return [*lines, frame, "</g>"]


def _legend(y: int) -> list[str]:
    lines, x = [], _ADDRESS
    for name in ("block", "buffer", "temporary", "other"):
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_COLOURS[name]}"/>')
        lines.append(_text(x + 17, y + 11, name, ""))
        x += 110
    words = "full: mapped · pale: used, not mapped · empty: reserved · lengths are logarithmic"
    return [*lines, _text(_ADDRESS, y + 11 + _ROW, words, "f")]


def _text(x: int, y: int, words: str, kind: str) -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{name}>{escape(_printable(words))}</text>'


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else words[: most - 1] + "…"


def _printable(words: str) -> str:
    """XML 1.0 has no control characters, and no lone surrogates."""
    return "".join(each if each.isprintable() else "�" for each in words)
