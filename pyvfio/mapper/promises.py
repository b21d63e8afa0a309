"""The remaining mappings of a container, and how many of them are promised to blocks.

While a block has granules, each block of the mapper is promised all mappings that the block may need. The number is a
running sum: each `pyvfio.mapper.window.Window` updates the sum when more or fewer bytes of its block are mapped.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvfio.errors import EntryLimitError
from pyvfio.iommu.space import AddressSpace
from pyvfio.mapper.plan import Budget
from pyvfio.mapper.policy import Policy


class Promises:
    """The mappings that the blocks of one mapper may still need.

    Synchronization: none; the mapper serializes calls. Cost: O(1), and a system call to read the remaining mappings.
    """

    __slots__ = ("_space", "made", "total")

    def __init__(self, space: AddressSpace, *, made: bool) -> None:
        self._space = space
        self.made = made
        """Whether a block has or had granules, so that mappings are promised."""
        self.total = 0
        """The number of mappings that all blocks together may still need."""

    def left(self, *, made: bool) -> int | None:
        """Return the number of remaining mappings; with `made`, without those that are promised. None: no limit."""
        left = self._space.entries_left
        return None if left is None else left - (self.total if made else 0)

    def check(
        self, idstr: str, policy: Policy, *, needed: int, max_length: int, make_room: Callable[[EntryLimitError], bool]
    ) -> None:
        """Raise EntryLimitError if one more block could need more mappings than are left, and a block has granules.

        Raises ValueError for a granule below the page size of the IOMMU. `make_room` returns whether a second attempt
        makes sense.
        """
        granule = policy.granule
        if granule is not None and granule % self._space.page_size:
            raise ValueError(
                f"a granule must be at least the IOMMU's page, {self._space.page_size:#x}, not {granule:#x}"
            )
        if granule is None and not self.made:
            return
        error = self._take(idstr, granule, needed, max_length)
        if error is not None and make_room(error):
            error = self._take(idstr, granule, needed, max_length)
        if error is not None:
            raise error

    def _take(self, idstr: str, granule: int | None, needed: int, max_length: int) -> EntryLimitError | None:
        return Budget(self.left(made=True)).take(idstr, granule, needed=needed, max_length=max_length)
