"""`pyvfio plan`: whether RAM blocks will fit into the address space of a device, before a program allocates them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import pyvfio
from pyvfio.cli.common import FAILED, OK, Json, bdf_argument, print_document
from pyvfio.cli.parser import Parser
from pyvfio.diagnosis.examination import ADDRESS_SPACES
from pyvfio.kernel import Kernel
from pyvfio.mapper.plan import BlockShape, Plan
from pyvfio.testing.fake import VERSIONS, FakeKernel
from pyvfio.testing.fake.versions import KernelVersion, kernel_version

NAME = "pyvfio plan"
SCHEMA = "pyvfio.plan/1"

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def size_argument(text: str) -> int:
    """Return bytes, given a number with or without a unit: 4096, 64K, 2M, 2MiB, 1G. For `type=` of an argument."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)\s*(?:([KMGT])(?:iB)?)?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size such as 4096, 64K, 2M or 1G: {text!r}")
    return int(match[1], 0) * _UNITS[match[2] or ""]


def block_argument(text: str) -> BlockShape:
    """Return the shape of a block, given NAME=USED:MAX or NAME=USED. For `type=` of an argument."""
    name, equals, lengths = text.rpartition("=")
    used, _colon, most = lengths.partition(":")
    if not (equals and name and used):
        raise argparse.ArgumentTypeError(f"not a block such as ring=64K:1M: {text!r}")
    used_length = size_argument(used)
    return BlockShape(name, used_length, size_argument(most) if most else used_length)


def fake_argument(text: str) -> KernelVersion:
    """Return the version of a fake kernel, given the name or a line of `pyvfio vm`. For `type=` of an argument."""
    try:
        return kernel_version(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _word_argument(text: str) -> BlockShape | str:
    return block_argument(text) if "=" in text else bdf_argument(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    parser = Parser(
        NAME,
        "Tell whether RAM blocks fit into the address space of a device: IOVA, mappings, locked memory, roughly the "
        "time. The device is opened and closed. Nothing is mapped.",
        examples=[
            "pyvfio plan 0000:00:02.0 ring=64K:1M data=2G:64G --resize extend --granule 64K",
            "pyvfio plan --fake 6.12 ring=64K:1M --json",
            "pyvfio plan --fake 7.3 --space iommufd data=2G:64G --resize cut",
        ],
    )
    parser.add_argument(
        "words",
        type=_word_argument,
        nargs="+",
        metavar="BDF|NAME=USED:MAX",
        help="a device bound to vfio-pci; used_length and max_length of each block",
    )
    parser.add_argument(
        "--fake", type=fake_argument, metavar="KERNEL", help=f"a fake kernel: {', '.join(VERSIONS)}, or 7 for the last"
    )
    parser.add_argument(
        "--space",
        "--iommu",
        dest="iommu",
        choices=ADDRESS_SPACES,
        help="the address space; by default type1, or iommufd where the machine has no type1",
    )
    parser.add_argument(
        "--resize",
        choices=("remap", "extend", "cut"),
        default="remap",
        help="default: %(default)s; cut needs --space iommufd",
    )
    parser.add_argument(
        "--granule", type=size_argument, metavar="SIZE", help="with --resize extend: size of the pieces"
    )
    parser.add_argument("--dma-bits", type=int, metavar="N", help="address bits of the device, 17 to 64; default: 39")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw the plan into FILE")
    parser.add_argument("--json", action="store_true", help=f"print a {SCHEMA} document")
    return parser


def as_json(plan: Plan, space: str) -> dict[str, Json]:
    """Return a plan for programs; lengths in bytes. `space`: "type1" or "iommufd"."""
    return {
        "fits": plan.fits,
        "space": space,
        "blocks": [
            {
                "idstr": block.idstr,
                "used_length": block.used_length,
                "max_length": block.max_length,
                "populated": block.populated,
                "iova": block.iova,
                "entries": block.entries,
                "entries_most": block.entries_most,
            }
            for block in plan.blocks
        ],
        "entries": plan.entries,
        "entries_most": plan.entries_most,
        "entries_left": plan.entries_left,
        "locked": plan.locked,
        "locked_most": plan.locked_most,
        "memlock_used": plan.memlock.used,
        "memlock_counts_by": plan.counts_by,
        "memlock_limit": None if plan.memlock.privileged else plan.memlock.limit,
        "iova_ranges": [{"start": each.start, "last": each.last} for each in plan.iova_ranges],
        "seconds": plan.seconds if plan.seconds == plan.seconds else None,  # nan is no JSON
        "shortages": [str(error) for error in plan.shortages],
        "shortages_when_grown": [str(error) for error in plan.shortages_when_grown],
        "picture": cast(Json, plan.picture().to_json()),
    }


def make_plan(
    options: argparse.Namespace, bdf: str | None, blocks: Sequence[BlockShape], kernel: Kernel | None
) -> tuple[Plan, str]:
    """Open the device, plan the blocks and close the device. Without a BDF the device is a fake one.

    Returns the plan, and the kind of the address space.
    """
    with ExitStack() as stack:
        if bdf is None:
            fake = kernel = stack.enter_context(FakeKernel(options.fake.name, iommufd=options.iommu == "iommufd"))
            bdf = fake.bdfs[0]
        space = None
        if options.resize == "cut":
            space = stack.enter_context(pyvfio.Ioas(kernel=kernel, cut="pages"))
        device = stack.enter_context(pyvfio.open_device(bdf, iommu=options.iommu, space=space, kernel=kernel))
        mapper = stack.enter_context(
            pyvfio.DmaMapper(device.space, resize=options.resize, granule=options.granule, dma_bits=options.dma_bits)
        )
        return mapper.plan(blocks), "iommufd" if isinstance(device.space, pyvfio.Ioas) else "type1"


def main(arguments: Sequence[str] | None = None, *, kernel: Kernel | None = None) -> int:
    """Print the plan. Return 0 where all blocks fit, and 1 where one does not."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    bdfs = [word for word in options.words if isinstance(word, str)]
    blocks = [word for word in options.words if not isinstance(word, str)]
    if len(bdfs) != (0 if options.fake else 1) or not blocks:
        parser.error("name one device by its BDF, or --fake KERNEL, and one block at least")
    if options.resize == "cut" and options.iommu != "iommufd":
        parser.error("--resize cut needs --space iommufd: type1 cannot unmap part of a mapping")
    try:
        plan, space = make_plan(options, next(iter(bdfs), None), blocks, kernel)
    except (ValueError, TypeError) as error:  # lengths that are no multiples of a page, options that contradict
        parser.error(str(error))
    if options.json:
        print_document(SCHEMA, **as_json(plan, space))
    else:
        print(plan, plan.picture(), sep="\n\n")
    if options.svg is not None:
        options.svg.write_text(plan.picture().svg(), encoding="utf-8")
    return OK if plan.fits else FAILED
