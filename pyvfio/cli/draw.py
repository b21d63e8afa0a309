"""`pyvfio draw`: the IOVA space of a device, in the terminal or as SVG."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal, cast

import pyvfio
from pyvfio.cli.common import OK, Json, complain, print_json
from pyvfio.cli.parser import Parser
from pyvfio.diagnosis.examination import ADDRESS_SPACES
from pyvfio.errors import VfioError
from pyvfio.kernel import Kernel
from pyvfio.pci import parse_bdf
from pyvfio.picture import SCHEMA, Picture, svg_of
from pyvfio.units import MIB, format_size

NAME = "pyvfio draw"
_LONGEST = 64 * MIB  # characters of a document; 10,000 spans have 1 MiB


def _is_bdf(text: str) -> bool:
    with suppress(ValueError):
        return bool(parse_bdf(text))
    return False


def _is_source(text: str) -> bool:
    return _is_bdf(text) or text == "-" or (Path(text).exists() and not Path(text).is_dir())


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = Parser(
        NAME,
        "Draw the IOVA space of a device: the ranges of the IOMMU, RAM blocks with used and reserved bytes, "
        "pieces, buffers and temporary mappings.\n\n"
        "A program saves a picture with json.dump(mapper.picture().to_json(), file). The documents of `pyvfio plan "
        "--json` and `pyvfio demo --json` have pictures, too.",
        examples=["pyvfio draw 0000:00:02.0", "pyvfio draw picture.json --svg picture.svg"],
    )
    parser.add_argument(
        "source",
        metavar="BDF|FILE|-",
        help="a device, whose address space is empty when the device is opened; a saved picture; or stdin",
    )
    parser.add_argument(
        "--space",
        "--iommu",
        dest="iommu",
        choices=ADDRESS_SPACES,
        help="with a BDF: the address space; by default type1, or iommufd where the machine has no type1",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw into FILE as SVG, not in the terminal")
    parser.add_argument("--ascii", action="store_true", help="draw with ASCII characters")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows of spans; default: %(default)s")
    parser.add_argument(
        "--json", action="store_true", help=f"print a {SCHEMA} document, an array where there are several"
    )
    return parser


def read_pictures(text: str) -> list[Picture]:
    """Return the pictures of a document: a picture, or another document with "picture" or "pictures".

    Raises VfioError for other text.
    """
    try:
        return [Picture.from_json(each) for each in _documents(_parsed(text))]
    except (ValueError, RecursionError) as error:
        raise VfioError(f"no picture can be read: {error}", hint=f"{NAME} reads {SCHEMA} documents") from error


def _parsed(text: str) -> object:
    if len(text) > _LONGEST:
        raise ValueError(f"the document has more than {format_size(_LONGEST)}")
    return json.loads(text)


def _documents(document: object) -> Sequence[Mapping[str, object]]:
    several = document if isinstance(document, list) else [document]
    if isinstance(document, Mapping) and document.get("schema") != SCHEMA:
        several = document.get("pictures", [document["picture"]] if "picture" in document else [])
    found = [each for each in several if isinstance(each, Mapping)] if isinstance(several, list) else []
    if not found or len(found) != len(several):
        raise ValueError('the document has no "picture"')
    return found


def pictures_of(source: str, kernel: Kernel | None, iommu: Literal["type1", "iommufd"] | None = None) -> list[Picture]:
    """Return the pictures of a source: those of a file, or of stdin, or of the address space of a device."""
    if source == "-":
        return read_pictures(_read_stdin())
    if Path(source).exists():
        with Path(source).open(encoding="utf-8", errors="replace") as file:
            return read_pictures(file.read(_LONGEST + 1))
    with pyvfio.open_device(source, iommu=iommu, kernel=kernel) as device:
        return [device.space.picture()]


def _read_stdin() -> str:
    try:
        return sys.stdin.read(_LONGEST + 1)
    except AttributeError:  # sys.stdin is None
        raise VfioError("stdin is closed", hint="Name a file, or pipe a document into the command") from None
    except UnicodeDecodeError as error:
        raise VfioError(f"no picture can be read: {error}", hint=f"{NAME} reads {SCHEMA} documents") from error


def main(arguments: Sequence[str] | None = None, *, kernel: Kernel | None = None) -> int:
    """Draw, and return 0."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.rows < 1:
        parser.error("--rows must be 1 at least")
    if not _is_source(options.source):
        parser.error(f"neither the PCI address of a device nor a file: {options.source!r}")
    if options.iommu is not None and not _is_bdf(options.source):
        parser.error("--space chooses the address space of a device: leave it out with a document")
    pictures = pictures_of(options.source, kernel, options.iommu)
    if options.svg is not None:
        options.svg.write_text(svg_of(pictures, rows=options.rows), encoding="utf-8")
        complain(NAME, f"{options.svg} has {len(pictures)} picture{'s' * (len(pictures) != 1)}")
    if options.json:
        documents = [cast(Json, picture.to_json()) for picture in pictures]
        print_json(documents[0] if len(documents) == 1 else documents)
    elif options.svg is None:
        width = shutil.get_terminal_size().columns
        ascii_only = options.ascii or not _can_print_blocks()
        drawn = [picture.text(width=width, rows=options.rows, ascii_only=ascii_only) for picture in pictures]
        print("\n\n".join(drawn))
    return OK


def _can_print_blocks() -> bool:
    return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
