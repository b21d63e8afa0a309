"""Objects that own something of the kernel, of which no second object may exist."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex


class Unique:
    """The base of classes whose objects cannot be copied or pickled: a copy would close the original's descriptors."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        """Raise TypeError: copy.copy, copy.deepcopy and pickle all begin here."""
        raise TypeError(
            f"{self!r} cannot be copied or pickled: two objects would own the same descriptors or memory. "
            "Use the object itself. Another process opens the device itself, or takes over the device: pyvfio.hand_over"
        )
