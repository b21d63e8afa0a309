"""The choice of the pieces of a RAM block: the fewest calls that turn the mapped pieces into the wanted extents. Pure.

A *piece* is one kernel mapping of a block. The kernel unmaps whole mappings only (VFIO_TYPE1v2_IOMMU refuses to cut
one, EINVAL). The pieces of a block therefore decide which bytes a later resize can keep mapped:

* remap, in one piece: a resize unmaps and remaps the whole block. All of it is out of reach until the remap completes.
* extend: a grow maps the difference, as a piece. A shrink unmaps whole pieces. The piece that straddles the new end is
  unmapped, and its head is mapped again. Everything else that stays is in reach throughout.
* extend with a granule: a grow maps the difference, a piece for each granule, and a shrink unmaps granules. Everything
  that stays is in reach throughout.
* cut: a grow maps the difference as a piece, and a shrink or discard cuts the bytes that leave out of the pieces.
  Everything that stays remains mapped, at any length. Only an `Ioas` made with `cut` can do this.

Source: `vfio_dma_do_map`, `vfio_dma_do_unmap` in drivers/vfio/vfio_iommu_type1.c. QEMU's
RamDiscardManager listener maps granules too, so that each can be unmapped alone (hw/vfio/common.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pyvfio.errors import GapError
from pyvfio.extents import Extent, Part, clip, runs, total, without
from pyvfio.units import align_down, align_up, check_bool, check_whole_number, format_size, is_power_of_two

Step: TypeAlias = tuple[Literal["map", "unmap", "cut"], Part]
"""One call: map a piece, unmap a run of whole pieces, or cut bytes out of a piece. The part is an Extent or a pair."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The way that a block's mapping follows the block's length. `DmaMapper` explains each option.

    `granule`: in bytes, with "extend" only. `allow_gap`: whether bytes that survive a resize may be out of the device's
    reach for a moment.

    Raises ValueError for options that exclude each other, and TypeError for a value of the wrong class.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> blocks = pyvfio.RamBlockList(kernel=kernel)
        >>> data = pyvfio.Policy("extend", granule=2 * pyvfio.MIB)
        >>> mapper = pyvfio.DmaMapper(
        ...     device.space, blocks, policy_of=lambda block: data if block.idstr == "data" else None
        ... )
        >>> ring = blocks.add("ring", used_length=4096, max_length=pyvfio.MIB)
        >>> cache = blocks.add("data", used_length=4 * pyvfio.MIB, max_length=pyvfio.GIB)
        >>> [hex(mapping.size) for mapping in device.space.mappings]
        ['0x1000', '0x200000', '0x200000']
    """

    resize: Literal["remap", "extend", "cut"] = "remap"
    granule: int | None = None
    allow_gap: bool = True

    def __post_init__(self) -> None:
        check_bool(self.allow_gap, "allow_gap")
        if self.granule is not None:
            object.__setattr__(self, "granule", check_whole_number(self.granule, "granule"))
        if not isinstance(self.resize, str):
            raise TypeError(f"resize must be 'remap', 'extend' or 'cut', not {self.resize!r}")
        if self.resize not in ("remap", "extend", "cut"):
            raise ValueError(f"resize must be 'remap', 'extend' or 'cut', not {self.resize!r}")
        if self.resize != "extend" and self.granule is not None:
            raise ValueError(f"granule= needs resize='extend': resize='{self.resize}' has pieces of any size")
        if self.resize == "remap" and not self.allow_gap:
            raise ValueError("allow_gap=False needs resize='extend': resize='remap' unmaps the whole block each time")
        if self.granule is not None and not is_power_of_two(self.granule):
            raise ValueError(f"a granule must be a power of two, not {self.granule:#x}")

    def check_length(self, length: int, what: str) -> None:
        """Raise ValueError if `length` is not a multiple of the granule."""
        if self.granule is not None and length & (self.granule - 1):
            raise ValueError(f"{what} must be a multiple of the granule {self.granule:#x}, not {length:#x}")

    @property
    def joins(self) -> bool:
        """Whether the pieces of a block may be joined when the container accepts no more mappings."""
        return self.resize == "extend" and self.granule is None and self.allow_gap

    def round_out(self, parts: Sequence[Part], page_size: int) -> list[Extent]:
        """Round `parts`, ascending, out to whole granules or IOMMU pages.

        Raises GapError if that adds bytes and `allow_gap` is False.
        """
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
                f"moment: they share one {piece} of {granule:#x} bytes with pages that are to be replaced",
                hint=f"Remap whole {piece}s, which loses their contents, or set allow_gap=True",
            )
        return rounded

    def maps(self, start: int, end: int) -> list[Step]:
        """Return the calls that map [start, end), one for each piece."""
        if self.granule is None or end - start == self.granule:
            return [("map", (start, end))]
        return [("map", (piece, piece + self.granule)) for piece in range(start, end, self.granule)]

    def entries(self, length: int) -> int:
        """Return the number of mappings for a block of at most `length` bytes that is never discarded in part.

        One mapping is enough if pieces can be joined.
        """
        return -(-length // self.granule) if self.granule else min(length, 1)


def steps(mapped: Sequence[Part], wanted: Sequence[Part], policy: Policy) -> list[Step]:
    """Return the calls that turn `mapped`, the existing pieces, into exactly `wanted`. Both ascend and are disjoint.

    Raises GapError if bytes of both would be unmapped and `policy` allows no gap. Cost: linear.
    """
    calls: list[Step] = []
    if policy.resize == "remap":
        if list(mapped) != list(wanted):
            calls.extend(("unmap", run) for run in runs(mapped))
            calls.extend(("map", extent) for extent in wanted)
        return calls
    gone: list[Part] = []
    ahead = 0  # the first extent of `wanted` that does not end before the piece
    for piece in mapped:
        start, end = piece
        while ahead < len(wanted) and wanted[ahead][1] <= start:
            ahead += 1
        behind = ahead
        while behind < len(wanted) and wanted[behind][0] < end:
            behind += 1
        inside = clip(wanted[ahead:behind], start, end)
        if inside == [piece]:
            continue
        if not inside:
            gone.append(piece)
            continue
        calls += _shorten(piece, inside, policy)
    calls.extend(("unmap", run) for run in runs(gone))
    for extent in without(wanted, *mapped):
        calls += policy.maps(*extent)
    return calls


def _shorten(piece: Part, inside: Sequence[Part], policy: Policy) -> list[Step]:
    """Return the calls that leave only `inside` of a piece. Raises GapError."""
    if policy.resize == "cut":
        return [("cut", part) for part in without([piece], *inside)]
    if not policy.allow_gap:
        raise _gap(piece, inside)
    # Each head is mapped again at once, to be out of reach for no longer than one map takes.
    return [("unmap", piece), *(("map", extent) for extent in inside)]


def _gap(piece: Part, inside: Sequence[Part]) -> GapError:
    return GapError(
        f"{format_size(total(inside))} that stay would be out of the device's reach for a moment: they are mapped in "
        f"one piece, bytes {piece[0]:#x}-{piece[1] - 1:#x} of the block, with bytes that are to be unmapped",
        hint="Shrink to the start of a piece, map with granule= or resize='cut', or set allow_gap=True and quiesce the "
        "device",
    )
