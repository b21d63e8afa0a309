"""Fields of C structures for ctypes: a list of pairs for each width, and `io`, the number of a request."""

from __future__ import annotations

import ctypes

import ioctl_opt


def u8(*names: str) -> list[tuple[str, type[ctypes.c_uint8]]]:
    """Return fields of type ``__u8``."""
    return [(name, ctypes.c_uint8) for name in names]


def u16(*names: str) -> list[tuple[str, type[ctypes.c_uint16]]]:
    """Return fields of type ``__u16``."""
    return [(name, ctypes.c_uint16) for name in names]


def u32(*names: str) -> list[tuple[str, type[ctypes.c_uint32]]]:
    """Return fields of type ``__u32``."""
    return [(name, ctypes.c_uint32) for name in names]


def u64(*names: str) -> list[tuple[str, type[ctypes.c_uint64]]]:
    """Return fields of type ``__u64``."""
    return [(name, ctypes.c_uint64) for name in names]


def s32(*names: str) -> list[tuple[str, type[ctypes.c_int32]]]:
    """Return fields of type ``__s32``."""
    return [(name, ctypes.c_int32) for name in names]


def io(kind: str, number: int) -> int:
    """Return the request ``_IO(kind, number)``.

    No direction and no size: the structure says the size, and can grow under the same request.
    """
    return int(ioctl_opt.IO(ord(kind), number))
