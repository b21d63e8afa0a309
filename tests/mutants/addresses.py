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
    "look-ups": [
        ["tests/unit/test_bulk_lookups.py", "-k", "not runs_and_vectors and not many_at_once"],
        ["tests/unit/test_bulk_lookups.py", "tests/unit/test_by_address.py"],
    ],
    "free": [["tests/unit/test_buckets.py"], ["tests/property/test_iova.py"]],
    "temporary": [["tests/unit/test_dma.py", "-k", "temporary or reset"]],
    "shared": [["tests/unit/test_held.py", "tests/unit/test_buckets.py"]],
    "policies": [["tests/unit/test_policies.py"]],
    "changes": [["tests/unit/test_changes.py"]],
    "IOMMU pages": [["tests/unit/test_iommu_pages.py"]],
    "pin limit": [["tests/unit/test_pieces.py", "-k", "pin_limit or limits"]],
    "seam": [["tests/unit/test_kernel.py", "-k", "ioctl"]],
    "views": [["tests/unit/test_ramblock.py", "-k", "view"]],
    "last page": [["tests/unit/test_container.py", "-k", "last_page or fits"]],
}

_MUTANTS = (
    # ---------------------------------------------------------------------------------------------------- address bits
    # A block begins below the limit, and ends above it.
    Mutant("FreeRuns.take_lowest", "if end <= last and end <= highest:", "if end <= last:", "address bits"),
    Mutant(
        "FreeRuns.take_highest",
        "start = (last if last < highest else highest) - least",
        "start = last - least",
        "address bits",
    ),
    # The mapper's own limit is not asked for: of blocks, of buffers, of plans.
    Mutant(
        "DmaMapper._find_place", "            dma_bits=self.dma_bits,\n", "            dma_bits=64,\n", "address bits"
    ),
    Mutant("BufferMapper._map", "kind.temporary, self.dma_bits", "kind.temporary, 64", "address bits"),
    Mutant("Rehearsal.reserve_iova", "dma_bits=dma_bits", "dma_bits=64", "address bits"),
    Mutant(
        "IovaAllocator._exhausted", "        if self.largest_free >= size:\n", "        if False:\n", "address bits"
    ),
    # The new process forgets it.
    Mutant("_Taking.take", "            dma_bits=state.mapper_bits,\n", "", "address bits"),
    # A temporary mapping that was closed stays in the way.
    Mutant("BufferMapper._recycle", "taken.start in closed", "False", "address bits"),
    # ------------------------------------------------------------------------------------------- free IOVA, in buckets
    # The spare place is given out twice, or for another question; a bound hides a run that fits; a bucket's first key
    # is an old one; runs of two ranges are joined.
    Mutant("IovaAllocator.release", "self._spare = iova", "self._spare = iova; self._free.give(iova, iova)", "free"),
    Mutant("IovaAllocator.place", "if wanted == self._wanted and", "if", "free"),
    Mutant(
        "IovaAllocator._runs", "        self._spare = self._answer = None\n", "        self._spare = None\n", "free"
    ),
    # The place below is taken: though it is not free, or too low; and stays among the free runs.
    Mutant("IovaAllocator.place", "elif answer - size >= self._floor:", "elif top_down:", "free"),
    Mutant("IovaAllocator.place", "max(below[0], self._lowest)", "below[0]", "free"),
    Mutant("IovaAllocator._runs", "self._answer < self._top", "False", "free"),
    Mutant("FreeRuns.give", "if last - start > runs.longest:", "if False:", "free"),
    Mutant("FreeRuns._note_longest", "            tree[node] = max(", "            max(", "free"),
    Mutant("FreeRuns._joins_next", "if after in self._seams or ", "if ", "free"),
    Mutant("Buckets._changed", "            firsts[number] = buckets[number].keys[0]\n", "            pass\n", "free"),
    # The method of a kernel of the program's own is passed by.
    Mutant("ioctl_of_buffer", 'getattr(type(kernel), "ioctl", None) is LinuxKernel.ioctl and ', "", "seam"),
    Mutant("ioctl_of_buffer", ' and "ioctl" not in vars(kernel)', "", "seam"),
    # The newest mapping is lost when another one comes; a look-up ignores its size, or moves it.
    Mutant("MappingTable.add", "            self._sort()\n", "            pass\n", "free"),
    Mutant("MappingTable.find", "if newest.sizes[0] == size else None", "", "free"),
    Mutant(
        "MappingTable.overlapping", "        if self._apart:\n", "        if self._apart and self._sort():\n", "free"
    ),
    # A reset takes what somebody else has unmapped for mapped; buffers that share an export are released with the first
    # of them, and a view of other memory shares it.
    Mutant("MappingTable.has_neighbours", ' or vaddrs_there != array("Q", vaddrs)', "", "shared"),
    Mutant("Exports.keep", "            export.shares += 1\n", "            pass\n", "shared"),
    # A temporary mapping is closed, and no reset unmaps it; its mapper has unmapped it before; others lie between.
    Mutant(
        "_TemporaryMapping.close",
        "self._mapper.left[self._memory], self._mapper = None, None",
        "self._mapper = None",
        "temporary",
    ),
    Mutant("BufferMapper._gather", "for memory in left if memory.holders", "for memory in left", "temporary"),
    Mutant("BufferMapper._reset", "memory.iova + memory.size != follows", "False", "temporary"),
    # A buffer goes before its mapping, or stays exported when nothing was mapped.
    Mutant(
        "BufferMapper._unmap_run",
        "        if self._space.unmap_neighbours_locked(",
        "        self._exports.release_each(run)\n        if self._space.unmap_neighbours_locked(",
        "shared",
    ),
    Mutant(
        "BufferMapper._map_for_once",
        "            view.release()\n            raise\n",
        "            raise\n",
        "shared",
    ),
    Mutant("Exports.keep", "export.vaddr <= vaddr and vaddr + view.nbytes <= export.end", "True", "shared"),
    Mutant("_export_whole", "start <= vaddr and vaddr + size <= export.end", "True", "shared"),
    # -------------------------------------------------------------------------------------------------------- segments
    Mutant("cut", "(iova | boundary - 1) + 1", "iova + boundary", "segments"),
    Mutant("cut", "boundary is None or longest < boundary", "boundary is None", "segments"),
    Mutant("_steps", "    if last < end:\n        found.append((last, end - last))\n", "", "segments"),
    Mutant("join", "sum(joined[-1]) == iova", "True", "segments"),
    Mutant("DmaMapper._part", "if state.discarded and", "if False and", "segments"),
    Mutant("DmaMapper._part", "if not window.settled and", "if False and", "segments"),
    Mutant("TranslatingMapper._ranges", "            memory.check_made_by(self)\n", "", "segments"),
    Mutant("check_part", "start + count > length", "start + count > length + 1", "segments"),
    # -------------------------------------------------------------------------------------------------------- look-ups
    # An answer that was kept outlives a change: of the space, of blocks, of buffers.
    Mutant("MappingTable.discard", "        self.changes += 1\n", "", "look-ups"),
    Mutant("TranslatingMapper._changes", "self._space.changes", "0", "look-ups"),
    Mutant("TranslatingMapper._changes", "self._fixed.changes", "0", "look-ups"),
    Mutant("DmaMapper._changes", "self._followed.changes", "0", "look-ups"),
    Mutant("Window.reaches", " and changes == self._space.changes", "", "look-ups"),
    # An answer that was kept is given when its memory has been unmapped.
    Mutant("ByAddress.remove", "        self.changes += 1\n", "", "look-ups"),
    Mutant(
        "TranslatingMapper.translate_vaddr",
        "(changes is None or changes == self._space.changes)",
        "True",
        "look-ups",
    ),
    Mutant("TranslatingMapper.translate_vaddr", "        self.guard.check()\n", "", "look-ups"),
    Mutant("Window.has_seen", " and changes == self._space.changes", "", "look-ups"),
    # The lowest place is missed when it comes back.
    Mutant("FreeRuns.give", "            if floor > start:\n", "            if False:\n", "free"),
    # Mappings of two owners are one; a range ends behind its run.
    Mutant("Runs.of", " and owner == before", "", "look-ups"),
    Mutant("Runs.translate", "first + sizes[position] - size + 1", "first + sizes[position]", "look-ups"),
    Mutant("RunVectors._usable", "self._sizes > less", "self._sizes >= less - np.uint64(1)", "look-ups"),
    # The table of buckets leads to the run behind.
    Mutant("RunVectors._find", "        for _ in range(steps):\n", "        for _ in range(0):\n", "look-ups"),
    # Parts of which one is outside.
    Mutant("TranslatingMapper._parts", " and last < first + whole[0][1]", "", "look-ups"),
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
    Mutant("Promises.check", "if error is not None and make_room(error):", "if False:", "leaving"),
    Mutant("DmaMapper._reserve_own", "if not self._recycle(error):", "if True:", "leaving"),
    # Memory goes with a mapper that nobody closed; a hole is not seen.
    Mutant("BufferMapper.__del__", "        self._space.keep(left)\n", "", "leaving"),
    Mutant(
        "TranslatingMapper._ranges", "min(each.iova + each.size, end) - max(each.iova, first)", "each.size", "leaving"
    ),
    Mutant("DmaMapper.take_in", "policies[block.idstr]", "self.policy", "policies"),
    # A mapping that is promised to one block is taken by another.
    Mutant("Promises.check", "if granule is None and not self.made:", "if granule is None:", "policies"),
    Mutant("DmaMapper._joinable", " and each.policy.joins]", "]", "policies"),
    Mutant(
        "DmaMapper._join_for",
        "            other.change(runs(other.pieces()), join=True)\n",
        "            pass\n",
        "policies",
    ),
    # --------------------------------------------------------------------------------------------------------- changes
    # A part is changed alone though the block differs elsewhere: after half a change, or one that failed.
    Mutant("Window.follows", "        return all(", "        return True or all(", "changes"),
    Mutant("Window.follows", " or not self.settled:", ":", "changes"),
    Mutant("Window._undo", "        self.settled = False\n", "", "changes"),
    # A mapper that has the pages again, and is asked once more, maps them twice.
    Mutant("DmaMapper.ram_block_remapped", "if window.has_just_lost(lost):", "if True:", "changes"),
    # A piece is cut, or what is left of it is not mapped again.
    Mutant("Window.unmap", "if found == parts:", "if True:", "changes"),
    Mutant("steps", "wanted[behind][0] < end:", "wanted[behind][1] < end:", "changes"),
    # The undo maps what is there, or leaves what is new.
    Mutant("Window._restore", " if piece not in there]", "]", "changes"),
    Mutant("Window._restore", "            for run in runs(new):\n", "            for run in ():\n", "changes"),
    # A discarded part of the tail is mapped with it.
    Mutant("DmaMapper.ram_block_resized", "if discarded is not NOTHING:", "if False:", "changes"),
    # What is promised is not what is missing: after a change, after an undo that failed, when the block has gone.
    Mutant("Window.map", "        self._note(self.reached + size)\n", "        self.reached += size\n", "changes"),
    Mutant("Window._recount", "        self.leave()\n", "", "changes"),
    Mutant("DmaMapper.ram_block_removed", "        window.leave()\n", "", "changes"),
    # Pieces that could be joined are not known.
    Mutant("Window.change", "bool(before) and not join", "False", "changes"),
    # Each change looks at all.
    Mutant("Window.follows", " or (gained is not gains and last == parts):", ":", "changes"),
    Mutant("Holders.find", "            return None  # all holders", "            pass  # all holders", "changes"),
    # ----------------------------------------------------------------------------------------------------- IOMMU pages
    Mutant(
        "DmaMapper.ram_block_resized",
        '            self._check_length(window.policy, new_length, "used_length")\n',
        "            pass\n",
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
    Mutant("Container._check_place", "self._refuses_last_page and", "False and", "last page"),
    Mutant("Container._unmaps_last_page", "error.errno == errno.EOVERFLOW", "True", "last page"),
    Mutant("Container._unmaps_last_page", "error.errno == errno.EOVERFLOW", "False", "last page"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return _WITNESSES[mutant.operation]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
