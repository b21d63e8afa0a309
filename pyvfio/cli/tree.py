"""Devices below the bridges that they are behind."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import device_path

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")


class Branch(NamedTuple):
    """A line of a tree: a device, and the signs before the name."""

    signs: str
    bdf: str


def parent_of(kernel: Kernel, bdf: str) -> str | None:
    """Return the bridge that a device is behind; None for a device of a root bus."""
    parent = device_path(kernel, bdf).resolve().parent.name
    return parent if _ADDRESS.fullmatch(parent) else None


def branches(kernel: Kernel, bdfs: Sequence[str]) -> list[Branch]:
    """Return devices in the order of a tree. A device whose bridge is not among them is at the root."""
    below: dict[str | None, list[str]] = {}
    for bdf in sorted(bdfs):
        parent = parent_of(kernel, bdf)
        below.setdefault(parent if parent in bdfs else None, []).append(bdf)
    return [branch for bdf in below.get(None, []) for branch in [Branch("", bdf), *_below(below, bdf, "")]]


def _below(below: Mapping[str | None, Sequence[str]], parent: str, signs: str) -> Iterator[Branch]:
    children = below.get(parent, [])
    for bdf in children:
        last = bdf == children[-1]
        yield Branch(signs + ("└─ " if last else "├─ "), bdf)
        yield from _below(below, bdf, signs + ("   " if last else "│  "))
