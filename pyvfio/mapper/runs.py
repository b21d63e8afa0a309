"""Runs of mapped memory, and the translation of many addresses at once. Pure.

`pyvfio.mapper.vectors` has the same translation with numpy.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple, SupportsIndex, TypeAlias, cast

from pyvfio.units import check_whole_number

_INTEGERS = frozenset("bBhHiIlLqQ")

Piece: TypeAlias = tuple[int, int, int, int]
"""vaddr, size, IOVA and owner of mapped memory. A translation may span adjacent pieces of the same owner."""


class Runs(NamedTuple):
    """Runs of bytes, ascending by address, in arrays of type "Q": 24 bytes for each run. Each run has one IOVA."""

    starts: array[int]
    sizes: array[int]
    iovas: array[int]

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> Runs:
        """Join adjacent pieces of one owner. Within one owner, vaddr and IOVA differ by a constant."""
        starts, sizes, iovas = array("Q"), array("Q"), array("Q")
        end, before = -1, -1
        for vaddr, size, iova, owner in sorted(pieces):
            if vaddr == end and owner == before:
                sizes[-1] += size
            else:
                starts.append(vaddr)
                sizes.append(size)
                iovas.append(iova)
            end, before = vaddr + size, owner
        return cls(starts, sizes, iovas)

    def translate(self, vaddrs: Sequence[int], size: int) -> array[int]:
        """Return the IOVA of each `[vaddr, vaddr + size)`. Raises LookupError if no run contains one of them whole.

        Cost: O(log runs) for an address; O(1) if the address is in the same run as the address before, or in the next
        run.
        """
        starts, sizes, iovas = self
        found, missing = array("Q"), list[int]()
        take, count = found.append, len(starts)
        position, first, end, apart = -1, 0, 0, 0  # the current run; ranges of `size` bytes may begin in [first, end)
        for number, vaddr in enumerate(vaddrs):
            if not first <= vaddr < end:
                position += 1
                if not (position < count and 0 <= vaddr - starts[position] <= sizes[position] - size):
                    position = bisect_right(starts, vaddr) - 1
                    if position < 0 or vaddr - starts[position] > sizes[position] - size:
                        missing.append(number)
                        continue
                first = starts[position]
                end, apart = first + sizes[position] - size + 1, iovas[position] - first
            take(vaddr + apart)
        if missing:
            raise not_mapped(len(missing), len(vaddrs), number=missing[0], vaddr=vaddrs[missing[0]], size=size)
        return found


def not_mapped(missing: int, count: int, *, number: int, vaddr: int, size: int) -> LookupError:
    """Return the error for `missing` of `count` addresses. `vaddr` is the first of them, at position `number`."""
    return LookupError(
        f"{missing} of {count} addresses are not mapped for the device with {size:#x} bytes in one piece; the first is "
        f"vaddr {vaddr:#x}, number {number} counted from 0"
    )


def whole_numbers(values: Iterable[SupportsIndex], what: str) -> Sequence[int]:
    """Return `values` as ints: an array of type "Q" if all fit into 64 bits and none is negative, else a list.

    Raises TypeError, with `what` as the name, if a value is not a whole number.
    """
    if isinstance(values, array) and values.typecode in _INTEGERS:
        if values.typecode == "Q":
            return values
        numbers: list[int] = values.tolist()
    else:
        given = list(values)
        plain = set(map(type, given)) <= {int}
        numbers = cast("list[int]", given) if plain else [check_whole_number(value, what) for value in given]
    try:
        return array("Q", numbers)
    except OverflowError:
        return numbers
