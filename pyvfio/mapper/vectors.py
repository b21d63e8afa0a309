"""Translation of many addresses and segments of many parts with numpy: `runs` and `segments` for numpy arrays.

No other module needs numpy. This module is imported only if the program has imported numpy.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeGuard

import numpy as np

from pyvfio.mapper.runs import Runs, not_mapped
from pyvfio.mapper.segments import Limits, Parts, SegmentArrays, cut_all
from pyvfio.units import U64_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector: TypeAlias = NDArray[np.uint64]
    Numbers: TypeAlias = NDArray[np.integer]

_BUCKETS = 4  # at most, for each run
_STEPS = 2  # at most, down from the last run that begins in a bucket to the run of an address


class _Table(NamedTuple):
    """A table from address to run: the addresses from `base` on, in buckets of 2^`shift` bytes.

    `last`: for each bucket, the last run that begins in the bucket or before. The run of an address is that run, or at
    most `steps` runs before.
    """

    base: np.uint64
    shift: np.uint64
    last: NDArray[np.intp]
    steps: int

    @classmethod
    def of(cls, starts: Vector) -> _Table | None:
        """Return None if these buckets would need more steps than `_STEPS`, because the runs lie in clusters."""
        base, span = starts[0], int(starts[-1] - starts[0])
        shift = np.uint64((span // (_BUCKETS * len(starts))).bit_length())
        offsets = starts - base
        buckets = (offsets >> shift).astype(np.intp)
        # Runs that do not begin at the start of a bucket: an address in the bucket may lie below such a run.
        behind = buckets[offsets & ((np.uint64(1) << shift) - np.uint64(1)) != 0]
        steps = int(np.bincount(behind).max()) if len(behind) else 0
        return cls(base, shift, np.bincount(buckets).cumsum() - 1, steps) if steps <= _STEPS else None


class RunVectors:
    """`Runs` as vectors. 40 bytes more for each run.

    Cost for an address: 0.1 µs counted, and 0.02 µs on a CPU.
    """

    def __init__(self, runs: Runs) -> None:
        starts = from_array(runs.starts)
        self._table = _Table.of(starts) if len(starts) else None
        # An empty run at the end, which is also position -1: the result for an address below all runs.
        self._starts, self._sizes, self._iovas = (
            np.append(vector, np.uint64(end))
            for vector, end in ((starts, U64_MAX), (from_array(runs.sizes), 0), (from_array(runs.iovas), 0))
        )

    def translate(self, vaddrs: Vector, size: int) -> Vector:
        """Translate as `Runs.translate` does."""
        position = self._find(vaddrs)
        found = vaddrs - self._starts.take(position)
        wrong = found >= self._usable(size).take(position)
        if wrong.any():
            first = int(wrong.argmax())
            missing = int(np.count_nonzero(wrong))
            raise not_mapped(missing, len(vaddrs), number=first, vaddr=int(vaddrs[first]), size=size)
        found += self._iovas.take(position)
        return found

    def _find(self, vaddrs: Vector) -> NDArray[np.intp]:
        """Return, for each address, the last run that begins at or below the address.

        For an address below all runs, any run is returned: no run contains the address.
        """
        if self._table is None:
            return np.searchsorted(self._starts, vaddrs, side="right") - 1
        base, shift, last, steps = self._table
        position = last.take(((vaddrs - base) >> shift).view(np.intp), mode="clip")
        for _ in range(steps):
            position -= self._starts.take(position) > vaddrs
        return position

    def _usable(self, size: int) -> Vector:
        """Return, for each run, the number of addresses at which `size` bytes of the run begin."""
        if size == 1:
            return self._sizes
        less = np.uint64(min(size - 1, U64_MAX))
        usable: Vector = np.where(self._sizes > less, self._sizes - less, np.uint64(0))
        return usable


def from_array(numbers: array[int]) -> Vector:
    """Return a copy of an array of type "Q"."""
    return np.array(numbers, dtype=np.uint64)


def to_array(vector: Vector) -> array[int]:
    """Return a copy as an array of type "Q"."""
    copy = array("Q")
    copy.frombytes(vector.tobytes())
    return copy


def is_array(value: object) -> TypeGuard[Numbers]:
    """Return whether `value` is a numpy array."""
    return isinstance(value, np.ndarray)


def as_vector(numbers: Numbers, what: str) -> Vector | None:
    """Return numbers of any integer type in one dimension, or None if one of them is negative.

    Raises TypeError, with `what` as the name, for other types.
    """
    if numbers.dtype.kind not in "ui":
        raise TypeError(f"{what} must be whole numbers, not an array of {numbers.dtype}")
    if numbers.dtype.kind == "i" and numbers.size and numbers.min() < 0:
        return None
    return numbers.reshape(-1).astype(np.uint64, copy=False)


# ------------------------------------------------------------------------------------------------------------ segments


def cut_vectors(parts: Parts, offsets: Vector, size: int | None, limits: Limits) -> SegmentArrays[Vector]:
    """Cut as `segments.cut_all` does the parts of `size` bytes (None: up to the end) at `offsets`."""
    if isinstance(parts, list):
        return SegmentArrays(*map(from_array, cut_all(parts, limits)))
    apart, end = parts
    iovas = offsets + np.uint64(apart & U64_MAX)
    sizes = np.uint64(end) - offsets if size is None else np.full(len(offsets), size, dtype=np.uint64)
    counts = np.ones(len(offsets), dtype=np.uint64)
    longest, boundary = (None if limit is None or limit > U64_MAX else np.uint64(limit) for limit in limits)
    if boundary is not None:
        iovas, sizes, counts = _steps(iovas, sizes, boundary, boundary - (iovas & (boundary - np.uint64(1))))
    if longest is not None and (boundary is None or longest < boundary):
        iovas, sizes, more = _steps(iovas, sizes, longest, np.full(len(iovas), longest))
        counts = np.add.reduceat(more, (counts.cumsum() - counts).astype(np.intp)) if len(counts) else counts
    return SegmentArrays(iovas, sizes, counts)


def _steps(iovas: Vector, sizes: Vector, step: np.uint64, heads: Vector) -> tuple[Vector, Vector, Vector]:
    """Cut many ranges as `segments._steps` does. `heads`: the length of the first segment of each range, at most.

    Returns the segments, and the number of segments of each range.
    """
    one = np.uint64(1)
    counts = np.where(sizes <= heads, one, one + (sizes - heads + step - one) // step)
    ranges = np.repeat(np.arange(len(counts)), counts.astype(np.intp))
    numbers = np.arange(len(ranges), dtype=np.uint64) - (counts.cumsum() - counts)[ranges]  # position in the range
    offsets = np.where(numbers == 0, np.uint64(0), heads[ranges] + (numbers - one) * step)
    lengths = np.minimum(np.where(numbers == 0, heads[ranges], step), sizes[ranges] - offsets)
    return iovas[ranges] + offsets, lengths, counts
