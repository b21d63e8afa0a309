"""Mistakes in the sets of parts of a block, and in the index of a list's blocks.

Their own tests have to notice each, also where the answer is right and only the cost is not.
"""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_WITNESSES: dict[str, list[list[str]]] = {
    "extents": [["tests/property/test_extents.py"]],
    "parts": [["tests/unit/test_block_index.py", "-k", "parts or part"]],
    "index": [["tests/unit/test_block_index.py"]],
    "pages by threads": [["tests/unit/test_prefault.py"]],
    "hand over": [["tests/unit/test_live_update.py", "-k", "lists or follows or mapped"]],
}

_MUTANTS = (
    # --------------------------------------------------------------------------------------------------------- extents
    Mutant("span", "extents[first - 1][1] > start", "extents[first - 1][0] > start", "extents"),
    Mutant("span", "bisect_left(extents, (end,), first)", "len(extents)", "extents"),
    # A hole that ends behind an extent begins in the next one, too; holes come in any order.
    Mutant("without", "hole[1] > end", "False", "extents"),
    Mutant("without", "iter(sorted(hole for hole in holes if hole[0] < hole[1]))", "iter(holes)", "extents"),
    # Neighbours stay apart.
    Mutant("added", "parts[0][0] - 1, parts[-1][1] + 1", "parts[0][0], parts[-1][1]", "extents"),
    # ----------------------------------------------------------------------------------------------------------- parts
    # An old answer is given.
    Mutant("BlockState.populated", "of is not discarded or length != used", "length != used", "parts"),
    Mutant("BlockState.populated", "of is not discarded or length != used", "of is not discarded", "parts"),
    Mutant("BlockState.populated_in", "        end = min(end, self.used_length)\n", "", "parts"),
    # ----------------------------------------------------------------------------------------------------------- index
    Mutant("BlockIndex.below", "bisect_right(near, vaddr, key=_START) == above - first", "True", "index"),
    Mutant("BlockIndex.add", "bisect_left(self._ascending, _START(block), key=_START)", "0", "index"),
    Mutant("BlockIndex.remove", "        del self._named[_ID(block)]\n", "", "index"),
    Mutant(
        "BlockIndex.remove",
        "bisect_left(self._ascending, _START(block), key=_START)",
        "[_START(other) for other in self._ascending].index(_START(block))",
        "index",
    ),
    Mutant("BlockIndex.__iter__", "iter(tuple(self._ascending))", "iter(self._ascending)", "index"),
    # ------------------------------------------------------------------------------------------------ pages by threads
    # A file of the caller, old contents, a whole block; what threads could not allocate stays; a kernel that cannot.
    Mutant("Reservation.can_extend", "self._store.is_own and ", "", "pages by threads"),
    Mutant("Reservation.can_extend", " and start >= self._touched", "", "pages by threads"),
    Mutant("BlockState._extend", "self.whole or not", "not", "pages by threads"),
    Mutant("BlockState._extend", "            self._take_back()\n", "", "pages by threads"),
    Mutant("BlockState._extend", ", required=True", "", "pages by threads"),
    Mutant("BlockState._spreads", "threads > 1", "threads > 0", "pages by threads"),
    # ------------------------------------------------------------------------------------------------------- hand over
    Mutant("find_obstacles", "block not in followed", "block not in dict(mapper.windows())", "hand over"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return _WITNESSES[mutant.operation]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
