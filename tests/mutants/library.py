"""Mistakes in each operation of the library: tests/unit/test_failures.py, where each call fails, has to notice each."""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_ALL = "tests/unit/test_failures.py"
# Which of its tests come first, as pytest's -k has it, so that most mutants are caught soon.
_FIRST = {
    "open": "opening",
    "add": "add or late",
    "grow": "grow",
    "shrink": "shrink",
    "discard": "discard",
    "populate": "populate",
    "replace pages": "replace",
    "remove": "remove or leave",
    "temporary map": "temporary or reset",
    "close": "closing or close or leave",
}

_MUTANTS = (
    # ---------------------------------------------------------------------------------------------------------- open
    # A descriptor stays open: the container's, the device's, the group's.
    Mutant(
        "Container.__init__",
        "            self._iommu_type = self._choose(wanted)\n"
        "        except BaseException:\n            self.close_fd()\n            raise\n",
        "            self._iommu_type = self._choose(wanted)\n        except BaseException:\n            raise\n",
        "open",
    ),
    Mutant(
        "Device.__init__",
        "            self.info = self._get_info()\n            self._join()\n"
        "        except BaseException:\n            self.close_fd()\n            raise\n",
        "            self.info = self._get_info()\n            self._join()\n"
        "        except BaseException:\n            raise\n",
        "open",
    ),
    Mutant("_open_in", "        close_now(group)\n        raise\n", "        raise\n", "open"),
    Mutant("_open_with", "        close_now(space)\n        raise\n", "        raise\n", "open"),
    Mutant("Container.open_group", "            group.close_fd()\n            raise\n", "            raise\n", "open"),
    # A group that could not be attached stays inside, or nobody hears that it would not leave.
    Mutant(
        "Container.attach",
        "            attempt(group.unset_container, failures)\n            if failures",
        "            if failures",
        "open",
    ),
    Mutant(
        "Container.attach",
        "            attempt(group.unset_container, failures)\n            if failures",
        "            group.unset_container()\n            if failures",
        "open",
    ),
    # ----------------------------------------------------------------------------------------------------------- add
    # Memory is given back though a device may still reach it.
    Mutant("RamBlockList._begin", "                block.state.keep()\n", "                pass\n", "add"),
    # Address space, and IOVA, of a block that did not come.
    Mutant(
        "RamBlockList._begin", "            block.state.release()\n            raise\n", "            raise\n", "add"
    ),
    Mutant(
        "DmaMapper.ram_block_added",
        "            self._space.release_iova(iova)\n            raise\n",
        "            raise\n",
        "add",
    ),
    Mutant("Reservation._reserve", "            self._abort(start, end)\n", "", "add"),
    # A mapping that the kernel refused is in the table.
    Mutant(
        "Container.map_locked",
        "        except OSError as error:\n",
        "        except OSError as error:\n            self.table.add(iova, size, vaddr)\n",
        "add",
    ),
    # A mapper that does not come leaves its claim.
    Mutant(
        "DmaMapper._follow",
        "            close_now(self._claim)\n            raise\n",
        "            raise\n",
        "add",
    ),
    # ---------------------------------------------------------------------------------------------------------- grow
    # The device is told before the memory is there.
    Mutant(
        "BlockState.grow",
        "                self.memory.activate(length)\n                if self.prealloc is not None:\n"
        "                    self.prealloc.populate([(old, length)])\n            self._relabel(length, tell)\n",
        "                self._relabel(length, tell)\n                self.memory.activate(length)\n",
        "grow",
    ),
    # Memory that a failed grow has activated stays.
    Mutant("BlockState.grow", "            self._take_back()\n            raise\n", "            raise\n", "grow"),
    # It goes though a device may still reach it.
    Mutant(
        "BlockState.grow",
        "                self.memory.retain(old)  # a device",
        "                self._take_back()  # a device",
        "grow",
    ),
    # What comes back is not zeroed.
    Mutant(
        "Reservation.activate",
        "        if start < stale and not store.holds_contents:\n",
        "        if False:\n",
        "grow",
    ),
    # What was mapped before a resize that failed is not mapped again.
    Mutant(
        "Window._undo",
        "        self._restore(before, concerned, whole or error)\n",
        "",
        "grow",
    ),
    # -------------------------------------------------------------------------------------------------------- shrink
    # Memory goes before the device has lost it.
    Mutant(
        "BlockState.shrink",
        "        self._relabel(length, tell)\n",
        "        self.memory.deactivate(length)\n        self._relabel(length, tell)\n        return None\n",
        "shrink",
    ),
    # How much the kernel says it unmapped is not looked at.
    Mutant("IovaSpace.unmap_locked", "unmapped == size and place", "place", "shrink"),
    Mutant("IovaSpace._note_unmap", "        if unmapped != size:\n", "        if unmapped > size:\n", "shrink"),
    # A mapping that the kernel refused to unmap is forgotten, or one of which it unmapped nothing.
    Mutant(
        "IovaSpace.unmap_locked",
        "        unmapped = self._unmap_in_kernel(",
        "        self.table.discard(iova=iova, size=size)\n        unmapped = self._unmap_in_kernel(",
        "shrink",
    ),
    Mutant("Container._is_gone", "error.errno == errno.ENOENT", "error.errno == errno.EINVAL", "shrink"),
    # A failure to give memory back is taken for a failure of the shrink.
    Mutant("BlockState.shrink", "            return error\n", "            raise error\n", "shrink"),
    # ------------------------------------------------------------------------------------------------------- discard
    # Pages are dropped before the device has lost them; what is discarded is noted before all have agreed.
    Mutant(
        "BlockState.discard",
        "        tell(commit)\n",
        "        self.memory.drop(*parts[0])\n        tell(commit)\n",
        "discard",
    ),
    Mutant("BlockState.discard", "        tell(commit)\n", "        commit()\n        tell(lambda: None)\n", "discard"),
    # The claim of a discard that is refused stays.
    Mutant("discard", "        close_now(claim)\n", "        pass\n", "discard"),
    # It is neither dropped nor written.
    Mutant(
        "Reservation._zero",
        "        ctypes.memset(self.vaddr + start, 0, end - start)\n        return failure\n",
        "        return failure\n",
        "discard",
    ),
    # ------------------------------------------------------------------------------------------------------ populate
    Mutant(
        "BlockState.populate",
        "            tell(commit)\n",
        "            commit()\n            tell(lambda: None)\n",
        "populate",
    ),
    # ------------------------------------------------------------------------------------------------- replace pages
    # Pages are replaced while a device reaches them.
    Mutant(
        "Remapping",
        '    _hook, _reverse = "ram_block_remapping"',
        '    _hook, _reverse = "nothing"',
        "replace pages",
    ),
    # Who has let go takes nothing again.
    Mutant("remap.replace", "            change.revoke_all()\n", "            pass\n", "replace pages"),
    # -------------------------------------------------------------------------------------------------------- remove
    # Memory goes before the device has lost it.
    Mutant(
        "RamBlockList.remove",
        "            Removed(block, self._notifiers)(commit)\n            block.state.release()\n",
        "            block.state.release()\n            Removed(block, self._notifiers)(commit)\n",
        "remove",
    ),
    # IOVA goes before the mapping, or never.
    Mutant(
        "DmaMapper.ram_block_removed",
        "        window.change([])\n        self._departing[block] = window\n",
        "        self._space.release_iova(window.iova)\n        window.change([])\n"
        "        self._departing[block] = window\n",
        "remove",
    ),
    Mutant("DmaMapper.ram_block_gone", "            self._space.release_iova(window.iova)\n", "", "remove"),
    # A notifier that refuses to go is told nothing any more.
    Mutant(
        "RamBlockList._replay",
        "        tell_each(notifier",
        "        self._set_notifiers(notifiers)\n        tell_each(notifier",
        "remove",
    ),
    # ------------------------------------------------------------------------------------------------- temporary map
    # A map that failed leaves its IOVA reserved, or its buffer exported.
    Mutant(
        "IovaSpace.reserve_and_map_locked",
        "                allocator.release(place)\n",
        "                pass\n",
        "temporary map",
    ),
    # --------------------------------------------------------------------------------------------------------- close
    # A step that fails keeps the others from being made.
    Mutant(
        "attempt_all",
        "    for step in steps:\n        attempt(step, failures)\n",
        "    for step in steps:\n        step()\n",
        "close",
    ),
    # A descriptor is closed twice where closing reports an error.
    Mutant(
        "Handle.close_fd",
        "        fd = self.release_fd()\n",
        "        fd = max(self._fd, self._aside)\n",
        "close",
    ),
    # The device may still do DMA while the mappings go.
    Mutant(
        "Device.close",
        "            steps += [self._stop_dma, *([self._last_reset]",
        "            steps += [*([self._last_reset]",
        "close",
    ),
    # The interrupts' descriptors.
    Mutant(
        "Vectors._close",
        '        attempt_all("closing eventfds", [eventfd.close for eventfd in gone])\n',
        "        for eventfd in gone:\n            eventfd.close()\n",
        "close",
    ),
    # Mappings that are left go with the last group, unseen; and are taken for mapped when they are gone.
    Mutant(
        "Container.close",
        "                attempt(self._unmap_everything, failures)\n",
        "                pass\n",
        "close",
    ),
    Mutant("Container.note_left", "            self.table.clear()\n", "            pass\n", "close"),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return [[_ALL, "-k", _FIRST[mutant.operation]], [_ALL]]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
