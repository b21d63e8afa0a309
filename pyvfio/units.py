"""Addresses and lengths: two kinds of address that must never be mixed, and the arithmetic on them.

All functions are pure and cost nanoseconds. All lengths are in bytes. `start` and `last` are both inclusive: they name
ranges that can end at 2^64-1, since an exclusive end would not fit the kernel's u64. `end` is always exclusive.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, NewType, SupportsIndex

if TYPE_CHECKING:
    Iova = NewType("Iova", int)
    """An I/O virtual address: the address that a device puts on the bus."""
    Vaddr = NewType("Vaddr", int)
    """A virtual address in this process."""
else:  # for type checkers only: NewType is a Python call at run time, and each mapping would make five of them
    Iova = Vaddr = int

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
U64_MAX = (1 << 64) - 1
_SHOWN = 80  # characters of a wrong argument in an error
PAGE_SIZE = mmap.PAGESIZE
"""The page size of this process's memory, in bytes."""


def is_power_of_two(number: int) -> bool:
    """Return whether `number` is 1, 2, 4, …; zero and negative numbers are not."""
    return number > 0 and number & (number - 1) == 0


def align_down(number: int, alignment: int) -> int:
    """Return the largest multiple of `alignment` (a power of two) that is not above `number`."""
    return number & -alignment


def align_up(number: int, alignment: int) -> int:
    """Return the smallest multiple of `alignment` (a power of two) that is not below `number`."""
    return -(-number & -alignment)


def is_aligned(number: int, alignment: int) -> bool:
    """Return whether `number` is a multiple of `alignment` (a power of two)."""
    return number & (alignment - 1) == 0


def check_whole_number(value: object, what: str) -> int:
    """Return `value` as an int. Integers of numpy are accepted.

    Raises TypeError, which names the argument as `what`, for any other value and for a bool.
    """
    if type(value) is int:  # isinstance() with a protocol costs a microsecond
        return value
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{what} must be a whole number, not {_shown(value)}")
    return index(value)


def as_number(value: SupportsIndex, what: str) -> int:
    """Return `value` as an int, also a bool: registers are often switches.

    Raises TypeError, which names the argument as `what`, for a value that is no whole number.
    """
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{what} must be a whole number, not {_shown(value)}") from None


def _shown(value: object) -> str:
    """Return the repr, or the begin of a long one, such as that of an array."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN else f"{type(value).__name__}: {text[:_SHOWN]}…"


def as_switch(value: object, what: str) -> bool:
    """Return a switch as a bool: True, False, 1 or 0, also numpy's. Raises TypeError, which names the argument."""
    scalar = getattr(value, "shape", ()) == ()  # an array compares to an array
    if scalar and value in (0, 1):
        return bool(value)
    raise TypeError(f"{what} must be True or False, not {_shown(value)}")


def check_bool(value: object, what: str) -> None:
    """Raise TypeError, which names the argument as `what`, unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{what} must be True or False, not {_shown(value)}")


def format_size(size: int) -> str:
    """Return a length for people, in the largest unit that divides `size`: `2 MiB`, `4097 bytes`.

    A length of five digits or more in that unit is rounded: `508.0 GiB`.
    """
    units = ((1 << 60, "EiB"), (1 << 50, "PiB"), (TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
    unit, name = next(((u, n) for u, n in units if size and size % u == 0), (1, "byte" if size == 1 else "bytes"))
    if size // unit < 10_000:
        return f"{size // unit} {name}"
    unit, name = next((u, n) for u, n in units if size >= u)
    return f"{size / unit:.1f} {name}"


@dataclass(frozen=True, slots=True, order=True)
class IovaRange:
    """A range of I/O virtual addresses. Both ends are inclusive, so that a range can end at 2^64-1.

    Raises ValueError when `last` is below `start`, or when either is not a u64.
    """

    start: Iova
    last: Iova

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.last <= U64_MAX:
            raise ValueError(f"not a range of u64: {self.start:#x} to {self.last:#x}")

    @classmethod
    def of(cls, *, iova: int, size: int) -> IovaRange:
        """Return the range of `size` bytes (at least 1) that begins at `iova`."""
        return cls(Iova(iova), Iova(iova + size - 1))

    @property
    def size(self) -> int:
        """The length in bytes: 1 to 2^64."""
        return self.last - self.start + 1

    def contains(self, other: IovaRange) -> bool:
        """Return whether `other` lies wholly inside this range."""
        return self.start <= other.start and other.last <= self.last

    def overlaps(self, other: IovaRange) -> bool:
        """Return whether the two ranges share at least one address."""
        return self.start <= other.last and other.start <= self.last

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.last:#x}"

    def __repr__(self) -> str:
        return f"IovaRange(start={self.start:#x}, last={self.last:#x})"


def format_ranges(ranges: Iterable[IovaRange]) -> str:
    """Return ranges in the form of the kernel's messages: `0x0-0xfedfffff, 0xfef00000-0x7fffffffff`."""
    return ", ".join(map(str, ranges)) or "none"
