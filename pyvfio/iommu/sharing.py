"""Spaces of one iommufd that map the same memory and share the pages."""

from __future__ import annotations

from typing import Generic, TypeVar

from pyvfio.iommu.iova_space import IovaSpace

_Space = TypeVar("_Space", bound=IovaSpace)
_FEW = 64
"""The entries of mappings that are gone, and that are kept in any case."""


class Sharing(Generic[_Space]):
    """The spaces that share pages, and where each has mapped memory, by the address of the process.

    Synchronization: none; the spaces have one lock. An entry can be of a mapping that is gone: the reader looks into
    the table of the space. Entries are counted, and those that are gone are dropped when they are the larger half.
    """

    __slots__ = ("_places",)

    def __init__(self, first: _Space) -> None:
        self._places: dict[_Space, dict[int, int]] = {}
        self.add(first)

    def add(self, space: _Space) -> None:
        """Add a space, with all mappings."""
        self._places[space] = {mapping.vaddr: mapping.iova for mapping in space.table}

    def remove(self, space: _Space) -> None:
        """Forget a space that is closed."""
        self._places.pop(space, None)

    def note(self, space: _Space, vaddr: int, iova: int) -> None:
        """Note a mapping of the space."""
        places = self._places[space]
        places[vaddr] = iova
        if len(places) > 2 * len(space.table) + _FEW:
            self.add(space)

    def places_of(self, vaddr: int) -> list[tuple[_Space, int]]:
        """Return the spaces that may have mapped `vaddr` at the start of a mapping, each with the IOVA."""
        return [(space, places[vaddr]) for space, places in self._places.items() if vaddr in places]
