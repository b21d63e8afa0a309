"""A picture shows the IOVA space as the kernel has it, fits where it is drawn, and survives JSON."""

from __future__ import annotations

import io
import json
import mmap
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO, cast
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvfio
from pyvfio.cli.guest_pictures import PictureFilter, line_of
from pyvfio.extents import Extent
from pyvfio.picture import SCHEMA, Picture, Span, svg_of
from pyvfio.picture.rows import Row, rows_of, ruler
from pyvfio.units import MIB, PAGE_SIZE, Iova, IovaRange
from tests.unit.fakes import Rig, SpecialKernel

SVG = "{http://www.w3.org/2000/svg}"
WHOLE = (IovaRange(Iova(0), Iova((1 << 39) - 1)),)


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """A block with a hole, a buffer, a temporary mapping that was closed, and a map past the mapper."""
    with Rig(kernel) as made:
        block = made.blocks.add("ring", used_length=4 * MIB, max_length=16 * MIB)
        block.discard(MIB, MIB)
        made.mapper.map_buffer(mmap.mmap(-1, 2 * PAGE_SIZE))
        made.mapper.map_temporary(mmap.mmap(-1, PAGE_SIZE)).close()
        made.container.map(vaddr=block.vaddr, iova=0x7000_0000, size=PAGE_SIZE)
        yield made


def parsed(text: str) -> ET.Element:
    """SVG of our own, parsed."""
    return ET.fromstring(text)  # noqa: S314


def mapped(picture: Picture) -> set[tuple[int, int]]:
    """The pieces of a picture, as (IOVA, size)."""
    return {(span.iova + piece.start, piece.size) for span in picture.spans for piece in span.pieces}


def test_a_picture_has_every_mapping_of_the_kernel_and_no_other(rig: Rig) -> None:
    """Whoever made the mapping: a block, a buffer, a temporary one, `Container.map`."""
    there = {(mapping.iova, mapping.size) for mapping in rig.container.mappings}
    assert mapped(rig.mapper.picture()) == there
    assert mapped(rig.container.picture()) == there


def test_a_mapper_knows_what_the_container_only_sees_as_reserved(rig: Rig) -> None:
    """Kinds and names; used and reserved bytes."""
    spans = {span.kind: span for span in rig.mapper.picture().spans}
    assert spans.keys() == {"block", "buffer", "temporary", "other"}
    ring = spans["block"]
    assert (ring.name, ring.used, ring.size) == ("ring", 4 * MIB, 16 * MIB)
    assert ring.pieces == (Extent(0, MIB), Extent(2 * MIB, 4 * MIB))
    seen = rig.container.picture().spans
    assert {span.kind for span in seen} == {"other"}
    assert [(span.iova, span.size, span.pieces) for span in seen] == [
        (span.iova, span.size, span.pieces) for span in rig.mapper.picture().spans
    ]
    assert [span.used for span in seen] == [span.mapped for span in seen]


def test_a_mapping_beside_a_span_is_one_of_its_own(rig: Rig) -> None:
    """Directly behind the span, and directly before."""
    ring = next(span for span in rig.mapper.picture().spans if span.name == "ring")
    places = [ring.end, ring.iova - PAGE_SIZE] if ring.iova else [ring.end]
    for iova in places:
        if not rig.container.mappings_in(iova=iova, size=PAGE_SIZE):
            rig.container.map(vaddr=rig.blocks["ring"].vaddr, iova=iova, size=PAGE_SIZE)
    for picture in (rig.mapper.picture(), rig.container.picture()):
        assert mapped(picture) == {(mapping.iova, mapping.size) for mapping in rig.container.mappings}
        picture.check()


def test_the_title_of_a_picture_is_in_words(rig: Rig) -> None:
    """The groups and the number of mappings of a container; the contents of a mapper."""
    (group,) = rig.container.groups
    mappings = len(rig.container.mappings)
    assert rig.container.picture().title == f"container of IOMMU group {group}: {mappings} mappings"
    assert rig.mapper.picture().title == "DmaMapper: 1 block, 1 buffer, 1 temporary"


def test_a_picture_is_a_snapshot(rig: Rig) -> None:
    """Later changes are not in it."""
    before = rig.mapper.picture()
    rig.blocks["ring"].resize(8 * MIB)
    assert before != rig.mapper.picture()
    assert next(span for span in before.spans if span.name == "ring").used == 4 * MIB


def test_a_picture_is_the_same_after_json(rig: Rig) -> None:
    """As text, and parsed."""
    picture = rig.mapper.picture()
    assert Picture.from_json(json.dumps(picture.to_json())) == picture
    assert Picture.from_json(picture.to_json()) == picture


def test_a_plan_and_open_objects_show_pictures_in_a_notebook(rig: Rig) -> None:
    """SVG while they are open, and nothing after."""
    plan = rig.mapper.plan([pyvfio.BlockShape("next", MIB, 4 * MIB)])
    (span,) = plan.picture().spans
    assert (span.kind, span.name, span.used, span.size, span.iova) == (
        "planned",
        "next",
        MIB,
        4 * MIB,
        plan.blocks[0].iova,
    )
    for shown in (plan, rig.mapper, rig.container):
        text = shown._repr_svg_()
        assert text is not None
        assert parsed(text).tag == f"{SVG}svg"
    rig.mapper.close()
    rig.container.close()
    assert (rig.mapper._repr_svg_(), rig.container._repr_svg_()) == (None, None)
    with pytest.raises(pyvfio.ClosedError):
        rig.mapper.picture()


# -------------------------------------------------------------------------------------------------------- any picture

names = st.text(max_size=40)


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    """Any spans in 39 bits, in one range or two."""
    at, spans = 0, []
    for _ in range(draw(st.integers(0, 12))):
        at += draw(st.integers(0, 1 << 33))
        size = draw(st.integers(1, 1 << 34))
        used = draw(st.integers(0, size))
        ends = sorted(draw(st.lists(st.integers(0, used), max_size=6, unique=True)))
        pieces = tuple(Extent(start, end) for start, end in zip(ends[::2], ends[1::2], strict=False))
        kind = draw(st.sampled_from(("block", "buffer", "temporary", "planned", "other")))
        spans.append(Span(kind, draw(names), at, size, used, pieces))  # type: ignore[arg-type]
        at += size
    hole = (IovaRange(Iova(0), Iova(0xFEDF_FFFF)), IovaRange(Iova(0xFEF0_0000), Iova((1 << 39) - 1)))
    return Picture(draw(names), draw(st.sampled_from((WHOLE, hole))), tuple(spans), 39)


@pytest.mark.long
@given(picture=pictures(), width=st.integers(1, 200), rows=st.integers(1, 20), ascii_only=st.booleans())
def test_text_fits_its_width(*, picture: Picture, width: int, rows: int, ascii_only: bool) -> None:
    """At any width from 30 columns on; with ASCII alone where that is asked for."""
    text = picture.text(width=width, rows=rows, ascii_only=ascii_only)
    assert max(map(len, text.split("\n"))) <= max(width, 30)
    assert text.isascii() or not ascii_only


@pytest.mark.long
@given(pictures(), st.integers(1, 20))
def test_svg_is_well_formed_and_stays_inside(picture: Picture, rows: int) -> None:
    """Whatever a block is called; and nothing is drawn outside of the document."""
    root = parsed(picture.svg(rows=rows))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for rect in root.iter(f"{SVG}rect"):
        x, y = (float(rect.get(name, "0")) for name in "xy")
        assert 0 <= x <= x + float(rect.attrib["width"]) <= width
        assert 0 <= y <= y + float(rect.attrib["height"]) <= height
    for group in root.iter(f"{SVG}g"):
        *parts, frame = group.iter(f"{SVG}rect")
        start, length = float(frame.attrib["x"]), float(frame.attrib["width"])
        assert len({rect.attrib["y"] for rect in (*parts, frame)}) == 1
        for rect in parts:
            x = float(rect.attrib["x"])
            assert start - 0.1 <= x <= x + float(rect.attrib["width"]) <= start + length + 0.2


@pytest.mark.long
@given(pictures())
def test_rows_cover_the_offered_ranges_without_overlap(picture: Picture) -> None:
    """Spans, free IOVA and IOVA that is not offered, ascending."""
    rows = rows_of(WHOLE, picture.spans, 100)
    at = 0
    for row in rows:
        assert row.start == at
        at += row.size
    assert at >= 1 << 39


@pytest.mark.long
@given(pictures())
def test_any_picture_is_the_same_after_json(picture: Picture) -> None:
    """As `from_json(to_json())`."""
    assert Picture.from_json(json.dumps(picture.to_json())) == picture


@given(st.lists(st.integers(1, 1 << 64), min_size=1), st.integers(1, 1 << 64), st.integers(1, 1 << 64))
def test_more_bytes_are_never_drawn_shorter(sizes: list[int], one: int, other: int) -> None:
    """Rows and parts of rows are on one scale."""
    length = ruler([Row("block", "", "", 0, size) for size in sizes], 3, 100)
    assert length(0) == 0
    assert length(min(one, other)) <= length(max(one, other))
    assert length(max(sizes)) == pytest.approx(100)


RANGES = (IovaRange(Iova(0), Iova(0xFFFF)), IovaRange(Iova(0x20000), Iova(0x3FFFF)))
SPANS = (
    Span("block", "ring", 0x1000, 0x4000, 0x2000, (Extent(0, 0x1000),)),
    Span("buffer", "", 0x5000, 0x3000, 0x3000, (Extent(0, 0x1000), Extent(0x1000, 0x3000))),
    Span("temporary", "t", 0x9000, 0x1000, 0x1000, (Extent(0, 0x1000),)),
    Span("other", "", 0x3F000, 0x1000, 0, ()),
)
SMALL = Picture("two ranges", RANGES, SPANS, 18)
WIDE = """\
two ranges
    0x0  free                                   4 KiB
 0x1000  ring         ###oooo....               8 KiB of 16 KiB (4 KiB mapped)
 0x5000  buffer       ##########                12 KiB (2 pieces)
 0x8000  free                                   4 KiB
 0x9000  t            ###                       4 KiB
 0xa000  free                                   24 KiB
0x10000  not offered  xxxxxxxxxxxxxxxxxxxx      64 KiB
0x20000  free                                   124 KiB
0x3f000  other        ...                       0 bytes of 4 KiB
# mapped  o used, not mapped  . reserved  (logarithmic)"""
NARROW = """\
two ranges
0x0 free: 4 KiB
0x1000 ring: 8 KiB of 16 KiB (4 KiB mapped)
  ###ooooooooooo...........
0x5000 buffer: 12 KiB (2 pieces)
  ####################
0x8000 free: 4 KiB
0x9000 t: 4 KiB
  ###
0xa000 free: 24 KiB
0x10000 not offered: 64 KiB
0x20000 free: 124 KiB
0x3f000 other: 0 bytes of 4 KiB
# mapped  o used, not mapped  . reserved  (logarithmic)"""


def test_a_picture_as_text_is_a_line_for_each_span_and_gap() -> None:
    """From 60 columns on with the bar between name and figures; a bar is as long as its span on a logarithmic scale."""
    assert SMALL.text(width=78, ascii_only=True) == WIDE
    assert SMALL.text(width=59, ascii_only=True) == NARROW
    lines = SMALL.text(width=60).split("\n")
    assert lines[2] == " 0x1000  ring         ███▒▒▒░░░░            8 KiB of 16 KiB…"
    assert SMALL.text(width=60, ascii_only=True).split("\n")[2].endswith("8 KiB of 16 KiB~")
    legend = "# mapped  o used, not mapped  . reserved  (logarithmic)"
    assert SMALL.text(width=len(legend), ascii_only=True).endswith(f"\n{legend}")
    assert SMALL.text(width=len(legend) - 1, ascii_only=True).endswith(legend.replace("  ", "\n"))


@pytest.mark.parametrize("at", [0, 1 << 37, (1 << 38) - PAGE_SIZE])
def test_a_small_part_of_a_row_shows_wherever_it_is(at: int) -> None:
    """As one mark, inside the bar."""
    part = Extent(at, at + PAGE_SIZE)
    page = Span("other", "p", 1 << 38, PAGE_SIZE, PAGE_SIZE, ())
    picture = Picture("", WHOLE, (Span("block", "b", 0, 1 << 38, 1 << 38, (part,)), page), 39)
    (bar,) = re.findall("[o#]{4,}", picture.text(ascii_only=True).split("\n")[1])
    assert bar.count("#") == (1 if at else 3)  # the smallest row, which has the same size, is 3 marks long
    assert bar.startswith("#") == (not at)
    assert bar.endswith("#") == bool(at)  # on a logarithmic scale the middle is at the end


def test_rows_are_the_spans_and_what_is_between() -> None:
    """With their figures, each once, whether a row is for a span or for several."""
    free = [("free", 0, 0x1000), ("free", 0x8000, 0x1000)]
    rows = rows_of(RANGES, SPANS, 4)
    assert [(row.style, row.start, row.size) for row in rows] == [
        free[0],
        ("block", 0x1000, 0x4000),
        ("buffer", 0x5000, 0x3000),
        free[1],
        ("temporary", 0x9000, 0x1000),
        ("free", 0xA000, 0x6000),
        ("closed", 0x10000, 0x10000),
        ("free", 0x20000, 0x1F000),
        ("other", 0x3F000, 0x1000),
    ]
    assert rows[1].parts == (("used", 0, 0x2000), ("mapped", 0, 0x1000))
    assert (rows[2].name, rows[2].label, rows[8].parts) == ("buffer", "12 KiB (2 pieces)", ())
    for most in (2, 3):
        groups = [row for row in rows_of(RANGES, SPANS, most) if row.style == "other"]
        assert groups == [
            Row(
                "other",
                "2 x block/buffer",
                "20 KiB of 28 KiB",
                0x1000,
                0x7000,
                (("mapped", 0, 0x1000), ("mapped", 0x4000, 0x7000)),
            ),
            Row("other", "2 x other/temporary", "4 KiB of 220 KiB", 0x9000, 0x37000, (("mapped", 0, 0x1000),)),
        ]
    (group,) = (row for row in rows_of(RANGES, SPANS[:2], 0) if row.style == "other")
    assert (group.start, group.size) == (0x1000, 0x7000)


@pytest.mark.parametrize(
    ("ranges", "spans", "found"),
    [
        ([(0, 9)], [(9, 1)], [("free", 0, 9), ("other", 9, 1)]),
        ([(0, 9)], [(0, 9)], [("other", 0, 9), ("free", 9, 1)]),
        ([(0, 9)], [(0, 10)], [("other", 0, 10)]),
        ([(5, 9)], [(5, 1), (7, 1)], [("other", 5, 1), ("free", 6, 1), ("other", 7, 1), ("free", 8, 2)]),
        ([(0, 4), (5, 9)], [], [("free", 0, 5), ("free", 5, 5)]),
        ([(0, 4), (6, 9)], [], [("free", 0, 5), ("closed", 5, 1), ("free", 6, 4)]),
        ([(5, 9)], [(0, 2)], [("other", 0, 2), ("free", 5, 5)]),
    ],
)
def test_gaps_are_to_the_byte(
    ranges: list[tuple[int, int]], spans: list[tuple[int, int]], found: list[tuple[str, int, int]]
) -> None:
    """A span outside of all ranges, as of another IOMMU, is drawn, too."""
    rows = rows_of(
        [IovaRange(Iova(start), Iova(last)) for start, last in ranges],
        [Span("other", "", start, size, size, ()) for start, size in spans],
        9,
    )
    assert [(row.style, row.start, row.size) for row in rows] == found


def test_neighbouring_pieces_of_a_group_are_one_part() -> None:
    """Of one span or of two, and only neighbours are."""
    whole = (Extent(0, 4), Extent(4, 8))
    spans = [Span("block", "", at, 8, 8, whole) for at in (0x100, 0x108, 0x118)]
    (group,) = (row for row in rows_of(WHOLE, spans, 1) if row.style == "block")
    assert group.parts == (("mapped", 0, 16), ("mapped", 24, 32))


def test_a_title_is_cut_where_it_does_not_fit() -> None:
    """100 characters do."""
    for length in (99, 100, 101, 200):
        root = parsed(Picture("t" * length, WHOLE, (), 39).svg())
        (title,) = (text.text for text in root.iter(f"{SVG}text") if text.get("class") == "t")
        assert title == ("t" * length if length <= 100 else "t" * 99 + "…")


def test_long_names_are_cut_with_a_mark_of_the_terminals() -> None:
    """At 24 characters; and a name of its own may have the mark."""
    for name, wide, plain in (
        ("n" * 24, "n" * 24, "n" * 24),
        ("n" * 25, "n" * 23 + "…", "n" * 23 + "~"),
        ("…", "…", "~"),
    ):
        picture = Picture("", WHOLE, (Span("block", name, 0, 1 << 38, 0, ()),), 39)
        assert f"  {wide}  " in picture.text(width=90).split("\n")[1]
        assert f"  {plain}  " in picture.text(width=90, ascii_only=True).split("\n")[1]


def test_a_notebook_shows_the_svg_of_a_picture() -> None:
    """As `svg()` returns it."""
    assert SMALL._repr_svg_() == SMALL.svg()
    assert str(SMALL) == SMALL.text()


def test_ten_thousand_spans_are_drawn_in_groups() -> None:
    """A row for each would be a picture of none; the bytes of all are there."""
    spans = tuple(
        Span("buffer", "", index * 2 * PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, (Extent(0, PAGE_SIZE),))
        for index in range(10_000)
    )
    rows = rows_of(WHOLE, spans, 64)
    groups = [row for row in rows if row.style == "buffer"]
    assert len(groups) <= 64
    assert sum(end - start for row in groups for _style, start, end in row.parts) == 10_000 * PAGE_SIZE
    assert len(Picture("", WHOLE, spans, 39).text(rows=20).split("\n")) < 50


GOOD = Picture("t", WHOLE, (Span("block", "a", 0, MIB, MIB, (Extent(0, MIB),)),), 39).to_json()
SPAN = {"kind": "block", "name": "a", "iova": 0, "size": 9, "used": 9, "pieces": [[0, 9]]}


@pytest.mark.parametrize(
    "change",
    [
        {"spans": {}},
        {"spans": [3]},
        {"spans": [SPAN | {"iova": (1 << 64) - 8}]},
        {"spans": [SPAN | {"pieces": {}}]},
        {"spans": [SPAN | {"pieces": [[0, 4, 9]]}]},
        {"spans": [SPAN | {"pieces": [[4, 6], [4, 9]]}]},
        {"spans": [SPAN | {"used": -1}]},
        {"schema": "pyvfio.picture/2"},
        {"spans": [{}]},
        {"spans": 3},
        {"spans": [SPAN, SPAN]},
        {"spans": [SPAN | {"size": 0}]},
        {"spans": [SPAN | {"used": 10}]},
        {"spans": [SPAN | {"iova": -1}]},
        {"spans": [SPAN | {"iova": (1 << 64) - 1}]},
        {"spans": [SPAN | {"pieces": [[0, 10]]}]},
        {"spans": [SPAN | {"pieces": [[4, 4]]}]},
        {"spans": [SPAN | {"pieces": [[4, 6], [5, 9]]}]},
        {"spans": [SPAN | {"pieces": ["ab"]}]},
        {"spans": [SPAN | {"pieces": [[0, "9"]]}]},
        {"spans": [SPAN | {"kind": "ring"}]},
        {"spans": [SPAN | {"size": True}]},
        {"iova_ranges": [{"start": 9, "last": 3}]},
        {"iova_ranges": None},
        {"dma_bits": "39"},
    ],
)
def test_a_document_that_is_no_picture_is_refused(change: dict[str, object]) -> None:
    """With ValueError, before anything is drawn."""
    assert Picture.from_json(GOOD)
    with pytest.raises(ValueError, match=r"."):
        Picture.from_json({**GOOD, **change})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"spans": [3]}, "'spans', a list of objects"),
        ({"iova_ranges": {}}, "'iova_ranges', a list of objects"),
        ({"spans": [SPAN | {"pieces": [[0, 4, 9]]}]}, "'pieces', a list of pairs"),
        ({"spans": [SPAN | {"pieces": ["ab"]}]}, "'pieces', a list of pairs"),
        ({"spans": [SPAN | {"kind": "ring"}]}, "not 'ring'"),
        ({"spans": [SPAN, SPAN]}, "spans overlap or do not ascend: 0x0, 0x0"),
        ({"spans": [{}]}, "'pieces'"),
    ],
)
def test_the_refusal_of_a_document_names_what_is_wrong(change: dict[str, object], why: str) -> None:
    """The field, and the value where it has the right type."""
    with pytest.raises(ValueError, match=re.escape(why)):
        Picture.from_json({**GOOD, **change})


def test_a_span_may_end_with_the_last_address_and_a_picture_of_ones_own_is_checked() -> None:
    """As one that was read."""
    last = SPAN | {"iova": (1 << 64) - 9}
    assert Picture.from_json({**GOOD, "spans": [SPAN, SPAN | {"iova": 9}, last]}).spans[2].end == 1 << 64
    span = Span("ring", "", 0, 1, 0, ())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind of a span is one of block, .* not 'ring'"):
        Picture("", WHOLE, (span,), 39).check()


def test_several_pictures_are_one_document() -> None:
    """Below each other, each with its title."""
    root = parsed(svg_of([Picture("before", WHOLE, (), 39), Picture("after", WHOLE, (), 39)]))
    titles = [(text.text, float(text.attrib["y"])) for text in root.iter(f"{SVG}text") if text.get("class") == "t"]
    assert [title for title, _y in titles] == ["before", "after"]
    assert titles[0][1] < titles[1][1]


@pytest.mark.long
@given(st.lists(st.integers(0, 400)))
def test_a_line_of_pictures_is_kept_back_however_output_is_cut(cuts: list[int]) -> None:
    """All other lines go on, the last one too, which has no end."""
    picture = Picture("p", WHOLE, (), 39)
    whole = f"one\n{line_of([picture])}\ntwo\nlast".encode()
    out = io.BytesIO()
    filtered = PictureFilter(cast(BinaryIO, out))
    marks = [0, *sorted(cuts), len(whole)]
    for start, end in pairwise(marks):
        filtered.write(whole[start:end])
    assert filtered.finish() == [picture]
    assert out.getvalue() == b"one\ntwo\nlast"


def test_the_schema_is_the_one_that_is_documented() -> None:
    """A change of the document is a new number."""
    assert GOOD["schema"] == SCHEMA == "pyvfio.picture/1"
    assert list(GOOD) == ["schema", "title", "dma_bits", "iova_ranges", "spans"]
