"""Mistakes in the IOVAs that are chosen and told, in policies of single blocks, and in limits that are checked first.

The tests of each part have to notice its mistakes.
"""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_WITNESSES: dict[str, list[list[str]]] = {
    "leaving": [["tests/unit/test_leaving.py"]],
    "address bits": [["tests/unit/test_dma_bits.py"], ["tests/unit/test_iova.py", "tests/unit/test_live_update.py"]],
    # hypothesis may take minutes to find the smallest of the examples that fail.
    "segments": [["tests/unit/test_segments.py", "-k", "not fewest"], ["tests/unit/test_segments.py"]],
    "policies": [["tests/unit/test_policies.py"]],
    "IOMMU pages": [["tests/unit/test_iommu_pages.py"]],
    "pin limit": [["tests/unit/test_pieces.py", "-k", "pin_limit or limits"]],
    "views": [["tests/unit/test_ramblock.py", "-k", "view"]],
    "last page": [["tests/unit/test_container.py", "-k", "last_page or fits"]],
}

_MUTANTS = (
    # ---------------------------------------------------------------------------------------------------- address bits
    # A block begins below the limit, and ends above it.
    Mutant("IovaAllocator._find", "min(last, highest)", "last", "address bits"),
    # The mapper's own limit is not asked for: of blocks, of buffers, of plans.
    Mutant(
        "DmaMapper._find_place", "            dma_bits=self.dma_bits,\n", "            dma_bits=64,\n", "address bits"
    ),
    Mutant("BufferMapper._map", "dma_bits=self.dma_bits", "dma_bits=None", "address bits"),
    Mutant("Rehearsal.reserve_iova", "dma_bits=dma_bits", "dma_bits=64", "address bits"),
    Mutant(
        "IovaAllocator._exhausted", "        if self.largest_free >= size:\n", "        if False:\n", "address bits"
    ),
    # The new process forgets it.
    Mutant("_Taking.take", "            dma_bits=state.mapper_bits,\n", "", "address bits"),
    # A temporary mapping that was closed stays in the way.
    Mutant("BufferMapper._recycle", "taken.start == memory.iova", "False", "address bits"),
    # -------------------------------------------------------------------------------------------------------- segments
    Mutant("cut", "(iova | boundary - 1) + 1", "iova + boundary", "segments"),
    Mutant("cut", "boundary is None or longest < boundary", "boundary is None", "segments"),
    Mutant("_steps", "    if last < end:\n        found.append((last, end - last))\n", "", "segments"),
    Mutant("join", "sum(joined[-1]) == iova", "True", "segments"),
    Mutant("DmaMapper._part", "if state.discarded and", "if False and", "segments"),
    Mutant("DmaMapper._part", "if not window.settled and", "if False and", "segments"),
    Mutant("BufferMapper._ranges", "            memory.check_made_by(self)\n", "", "segments"),
    Mutant("check_part", "start + count > length", "start + count > length + 1", "segments"),
    # -------------------------------------------------------------------------------------------------------- policies
    # A block that stays after all is placed anew.
    Mutant("DmaMapper.ram_block_added", "departing = self._departing.get(block)", "departing = None", "leaving"),
    Mutant(
        "DmaMapper.ram_block_removed",
        "        del self._windows[block]\n",
        "        del self._windows[block]\n        self.ram_block_gone(block)\n",
        "leaving",
    ),
    # Another list is followed; mappings that were given up keep blocks out.
    Mutant("DmaMapper._check_list", "block.guard.lock is not self._list_guard.lock", "False", "leaving"),
    Mutant("DmaMapper._check_budget", "if error is not None and self._recycle(error):", "if False:", "leaving"),
    Mutant("DmaMapper._reserve_own", "if not self._recycle(error):", "if True:", "leaving"),
    # Memory goes with a mapper that nobody closed; a hole is not seen.
    Mutant("BufferMapper.__del__", "        self._space.keep(left)\n", "", "leaving"),
    Mutant("BufferMapper._ranges", "min(each.iova + each.size, end) - max(each.iova, first)", "each.size", "leaving"),
    Mutant("DmaMapper.take_in", "policies[block.idstr]", "self.policy", "policies"),
    # A mapping that is promised to one block is taken by another.
    Mutant("DmaMapper._check_budget", "if granule is None and not self._promises:", "if granule is None:", "policies"),
    Mutant("DmaMapper._joinable", " if each.policy.joins]", "]", "policies"),
    Mutant(
        "DmaMapper._change",
        "                other.change(runs(other.pieces()), join=True)\n",
        "                pass\n",
        "policies",
    ),
    # ----------------------------------------------------------------------------------------------------- IOMMU pages
    Mutant(
        "DmaMapper.ram_block_resized",
        '        self._check_length(window.policy, new_length, "used_length")\n',
        "",
        "IOMMU pages",
    ),
    Mutant(
        "DmaMapper._check_parts", "        for start, end in parts:\n", "        for start, end in ():\n", "IOMMU pages"
    ),
    Mutant("Policy.round_out", "self.granule or page_size", "self.granule or 4096", "IOMMU pages"),
    # ------------------------------------------------------------------------------------------------------- pin limit
    Mutant("Window._whole_limit", "len(maps) < 2", "True", "pin limit"),
    Mutant("Window._whole_limit", "made + leaving", "made", "pin limit"),
    Mutant("Window._whole_limit", "made + leaving", "leaving", "pin limit"),
    # ----------------------------------------------------------------------------------------------------------- views
    Mutant("BlockState.view", "self.start + offset, size", "self.start, self.used_length", "views"),
    Mutant("BlockState.check_part", "start + count > used", "start + count > self.max_length", "views"),
    # ------------------------------------------------------------------------------------------------------- last page
    Mutant("Container.map", "self._refuses_last_page and", "False and", "last page"),
    Mutant("Container._unmaps_last_page", "error.errno == errno.EOVERFLOW", "True", "last page"),
    Mutant("Container._unmaps_last_page", "error.errno == errno.EOVERFLOW", "False", "last page"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return _WITNESSES[mutant.operation]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
