"""Choose the pieces of a RAM block: the fewest calls that turn the mapped pieces into the wanted extents. Pure.

A *piece* is one kernel mapping of a block. The kernel unmaps whole mappings only (VFIO_TYPE1v2_IOMMU refuses to cut
one, EINVAL), so the way a block was mapped decides what a later resize can keep:

* remap, in one piece: a resize unmaps and remaps the whole block. All of it is out of reach until the remap completes.
* extend: a grow maps the difference, as a piece. A shrink unmaps whole pieces. The piece that straddles the new end is
  unmapped, and its head is mapped again. Everything else that stays is in reach throughout.
* extend with a granule: a grow maps the difference, a piece for each granule, and a shrink unmaps granules. Everything
  that stays is in reach throughout.

Source: `vfio_dma_do_map`, `vfio_dma_do_unmap` in drivers/vfio/vfio_iommu_type1.c. Granules are what QEMU's
RamDiscardManager listener maps, so that each can be unmapped alone (hw/vfio/common.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pyvfio.errors import GapError
from pyvfio.extents import Extent, Part, clip, runs, total, without
from pyvfio.units import align_down, align_up, check_bool, check_whole_number, format_size, is_power_of_two

Step: TypeAlias = tuple[Literal["map", "unmap"], Part]
"""One call: a piece that is mapped, or a run of whole pieces that is unmapped; an Extent, or as plain a pair."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a block's mapping follows its length; `DmaMapper` says what each option does. `granule` in bytes, with
    "extend" only. `allow_gap`: whether bytes that survive a resize may be out of the device's reach for a moment.

    Raises ValueError for options that exclude each other, TypeError for a value of the wrong class.
    """

    resize: Literal["remap", "extend"] = "remap"
    granule: int | None = None
    allow_gap: bool = True

    def __post_init__(self) -> None:
        check_bool(self.allow_gap, "allow_gap")
        if self.granule is not None:
            object.__setattr__(self, "granule", check_whole_number(self.granule, "granule"))
        if not isinstance(self.resize, str):
            raise TypeError(f"resize must be 'remap' or 'extend', not {self.resize!r}")
        if self.resize not in ("remap", "extend"):
            raise ValueError(f"resize must be 'remap' or 'extend', not {self.resize!r}")
        if self.resize == "remap" and self.granule is not None:
            raise ValueError("a granule goes with resize='extend': a remap maps a block in one piece")
        if self.resize == "remap" and not self.allow_gap:
            raise ValueError("resize='remap' unmaps a block each time; allow_gap=False goes with resize='extend'")
        if self.granule is not None and not is_power_of_two(self.granule):
            raise ValueError(f"a granule must be a power of two, not {self.granule:#x}")

    def check_length(self, length: int, what: str) -> None:
        """ValueError when granules do not make up `length`."""
        if self.granule is not None and length & (self.granule - 1):
            raise ValueError(f"{what} must be a multiple of the granule {self.granule:#x}, not {length:#x}")

    @property
    def joins(self) -> bool:
        """Whether the pieces of a block may be joined, where the container takes no more mappings."""
        return self.resize == "extend" and self.granule is None and self.allow_gap

    def round_out(self, parts: Sequence[Part], page_size: int) -> list[Extent]:
        """The whole granules, or pages of the IOMMU, that `parts`, which ascend, have a byte of. GapError: more than
        that, and not allowed."""
        granule = self.granule or page_size
        rounded: list[Extent] = []
        for start, end in parts:
            first = max(align_down(start, granule), rounded[-1].end if rounded else 0)
            if first < end:
                rounded.append(Extent(first, align_up(end, granule)))
        rounded = runs(rounded)
        if not self.allow_gap and rounded != runs(parts):
            piece = "granule" if self.granule else "IOMMU page"
            raise GapError(
                f"{format_size(total(rounded) - total(parts))} that stay would be out of the device's reach for a "
                f"moment: they are in one {piece} of {granule:#x} bytes with pages that are to be replaced",
                hint=f"Remap whole {piece}s, whose contents are lost then, or let allow_gap be True",
            )
        return rounded

    def maps(self, start: int, end: int) -> list[Step]:
        """The calls that map [start, end), a piece each."""
        if self.granule is None or end - start == self.granule:
            return [("map", (start, end))]
        return [("map", (piece, piece + self.granule)) for piece in range(start, end, self.granule)]

    def entries(self, length: int) -> int:
        """How many mappings a block may need that is at most `length` long and never discarded in part: one, where
        pieces can be joined."""
        return -(-length // self.granule) if self.granule else min(length, 1)


def steps(mapped: Sequence[Part], wanted: Sequence[Part], policy: Policy) -> list[Step]:
    """The calls that make `mapped`, the pieces there are, cover exactly `wanted`; both ascend and are disjoint.

    Raises GapError when bytes of both would be unmapped and `policy` allows no gap.
    """
    calls: list[Step] = []
    if policy.resize == "remap":
        if list(mapped) != list(wanted):
            calls.extend(("unmap", run) for run in runs(mapped))
            calls.extend(("map", extent) for extent in wanted)
        return calls
    gone: list[Part] = []
    for piece in mapped:
        inside = clip(wanted, *piece)
        if inside == [piece]:
            continue
        if not inside:
            gone.append(piece)
            continue
        if not policy.allow_gap:
            raise _gap(piece, inside)
        # Each head again at once, so that it is out of reach for no longer than its own map takes.
        calls.append(("unmap", piece))
        calls.extend(("map", extent) for extent in inside)
    calls.extend(("unmap", run) for run in runs(gone))
    for extent in without(wanted, *mapped):
        calls += policy.maps(*extent)
    return calls


def _gap(piece: Part, inside: Sequence[Part]) -> GapError:
    return GapError(
        f"{format_size(total(inside))} that stay would be out of the device's reach for a moment: they are mapped in "
        f"one piece, bytes {piece[0]:#x}-{piece[1] - 1:#x} of the block, with what is to go",
        hint="Shrink to where a piece begins, map with granule=, or let allow_gap be True and quiesce the device",
    )
