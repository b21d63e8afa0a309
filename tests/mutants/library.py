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
        "container.py",
        "            self._iommu_type = self._choose(iommu_type)\n"
        "        except BaseException:\n            self._close_fd()\n            raise\n",
        "            self._iommu_type = self._choose(iommu_type)\n        except BaseException:\n            raise\n",
        "open",
    ),
    Mutant(
        "device/device.py",
        "            self.info = self._get_info()\n"
        "        except BaseException:\n            self._close_fd()\n            raise\n",
        "            self.info = self._get_info()\n        except BaseException:\n            raise\n",
        "open",
    ),
    Mutant("device/opening.py", "            undo.callback(group.close)\n", "", "open"),
    # The undo is registered when it is too late.
    Mutant(
        "device/opening.py",
        "            undo.callback(group.close)\n            container.attach(group)\n",
        "            container.attach(group)\n            undo.callback(group.close)\n",
        "open",
    ),
    # A group that could not be attached stays inside, or nobody hears that it would not leave.
    Mutant(
        "container.py",
        "                attempt(group.unset_container, failures)\n                if failures",
        "                if failures",
        "open",
    ),
    Mutant(
        "container.py",
        "                attempt(group.unset_container, failures)\n                if failures",
        "                group.unset_container()\n                if failures",
        "open",
    ),
    # ----------------------------------------------------------------------------------------------------------- add
    # Memory is given back though a device may still reach it.
    Mutant(
        "ramblock.py",
        "if isinstance(error, REACH_UNKNOWN) or not settled:\n            block._memory.keep()",
        "if False:\n            pass",
        "add",
    ),
    # Address space, and IOVA, of a block that did not come.
    Mutant(
        "ramblock.py",
        "            self._abandon(block, error, settled=change.settled)\n            raise\n",
        "            raise\n",
        "add",
    ),
    Mutant(
        "dma.py",
        "                self._space.release_iova(iova)\n                raise\n",
        "                raise\n",
        "add",
    ),
    Mutant(
        "memory/reservation.py",
        "            for start, stop in ours:\n                if start < stop:\n"
        "                    self._kernel.munmap(start, stop - start)\n            raise\n",
        "            raise\n",
        "add",
    ),
    # A mapping that a signal handler kept from being entered.
    Mutant(
        "container.py",
        "            except BaseException:\n"
        "                self._withdraw(vaddr=vaddr, iova=iova, size=size)\n                raise\n",
        "            except BaseException:\n                raise\n",
        "add",
    ),
    Mutant(
        "container.py",
        "            self._table.add(iova=iova, size=size, vaddr=vaddr)  # so that nobody",
        "            # so that nobody",
        "add",
    ),
    # A mapper that does not come leaves its claim.
    Mutant("dma.py", "                self._claim.close()\n                raise\n", "                raise\n", "add"),
    # ---------------------------------------------------------------------------------------------------------- grow
    # The device is told before the memory is there.
    Mutant(
        "ramblock.py",
        "            self._activate(block, old, new)\n            self._commit(event, self._notifiers)\n",
        "            self._commit(event, self._notifiers)\n            self._activate(block, old, new)\n",
        "grow",
    ),
    # What a failed grow had activated stays.
    Mutant(
        "ramblock.py",
        "                block._give_back()\n            raise\n",
        "                pass\n            raise\n",
        "grow",
    ),
    # It goes though a device may still reach it.
    Mutant(
        "ramblock.py",
        "            raise  # and retain: a device may still reach it\n",
        "            block._give_back()\n            raise\n",
        "grow",
    ),
    # What comes back is not zeroed.
    Mutant(
        "memory/reservation.py",
        "        if self._length < stale and not self._store.holds_contents:\n",
        "        if False:\n",
        "grow",
    ),
    # What was mapped before a resize that failed is not mapped again.
    Mutant(
        "mapper/window.py",
        "        except BaseException as error:\n            self._restore(before, region, error)\n            raise\n",
        "        except BaseException:\n            raise\n",
        "grow",
    ),
    # -------------------------------------------------------------------------------------------------------- shrink
    # Memory goes before the device has lost it.
    Mutant(
        "ramblock.py",
        "        self._commit(Resized(block, old, new), self._notifiers[::-1])\n        try:\n"
        "            block._memory.deactivate(new)\n",
        "        try:\n            block._memory.deactivate(new)\n"
        "            self._commit(Resized(block, old, new), self._notifiers[::-1])\n",
        "shrink",
    ),
    # How much the kernel says it unmapped is not looked at.
    Mutant("container.py", "        if unmapped != size:\n", "        if unmapped > size:\n", "shrink"),
    # A mapping that the kernel refused to unmap is forgotten; one that it unmapped is not.
    Mutant(
        "container.py",
        "        unmapped = self.unmap_dma(iova=iova, size=size, bitmap=bitmap)\n",
        "        self._table.discard(iova=iova, size=size)\n"
        "        unmapped = self.unmap_dma(iova=iova, size=size, bitmap=bitmap)\n",
        "shrink",
    ),
    Mutant(
        "container.py",
        "                    if self.unmap_dma(iova=iova, size=size) in (0, size) and whole:\n"
        "                        self._table.discard(iova=iova, size=size)\n",
        "                    self.unmap_dma(iova=iova, size=size)\n",
        "shrink",
    ),
    # A failure to give memory back is taken for a failure of the shrink.
    Mutant(
        "ramblock.py",
        "            block._memory.deactivate(new)\n        except OSError as error:\n            return error\n",
        "            block._memory.deactivate(new)\n        except OSError:\n            block._used_length = old\n"
        "            raise\n",
        "shrink",
    ),
    # ------------------------------------------------------------------------------------------------------- discard
    # Pages are dropped before the device has lost them; what is discarded is noted before all have agreed.
    Mutant(
        "blocks/parts.py",
        "    with guard.require_coordinated():\n",
        "    with guard.require_coordinated():\n        block._memory.drop(*parts[0])\n",
        "discard",
    ),
    Mutant(
        "blocks/parts.py",
        "discarded, stale),\n        rollback=partial(block._set_discarded, block._discarded, block._stale),\n",
        "discarded, stale),\n        rollback=partial(block._set_discarded, discarded, stale),\n",
        "discard",
    ),
    # What could not be dropped is forgotten before it was tried.
    Mutant(
        "blocks/parts.py",
        "        try:\n            block._memory.drop(*part)\n        except OSError as error:\n"
        "            failures.append(error)\n        block._stale = left\n",
        "        block._stale = left\n        try:\n            block._memory.drop(*part)\n"
        "        except OSError as error:\n            failures.append(error)\n",
        "discard",
    ),
    # It is neither dropped nor written.
    Mutant(
        "memory/reservation.py",
        "        ctypes.memset(self.vaddr + start, 0, end - start)\n        return failure\n",
        "        return failure\n",
        "discard",
    ),
    # ------------------------------------------------------------------------------------------------------ populate
    Mutant(
        "blocks/parts.py",
        "discarded, block._stale),\n        rollback=partial(block._set_discarded, block._discarded, block._stale),\n",
        "discarded, block._stale),\n        rollback=partial(block._set_discarded, discarded, block._stale),\n",
        "populate",
    ),
    # What a signal handler kept a discard from is seen again.
    Mutant(
        "blocks/parts.py",
        "    _drop_stale(block, wanted)  # what a signal handler kept a discard from\n",
        "",
        "populate",
    ),
    # ------------------------------------------------------------------------------------------------- replace pages
    # Pages are replaced while a device reaches them.
    Mutant(
        "blocks/change.py",
        "            notifier.ram_block_remapping(self._block, self._parts)\n",
        "            pass\n",
        "replace pages",
    ),
    # Who has let go takes nothing again.
    Mutant("blocks/parts.py", "            event.revoke(notifier)\n", "            pass\n", "replace pages"),
    # -------------------------------------------------------------------------------------------------------- remove
    # Memory goes before the device has lost it.
    Mutant(
        "ramblock.py",
        "        blocks = tuple(other for other in self._blocks if other is not block)\n",
        "        block._memory.release()\n"
        "        blocks = tuple(other for other in self._blocks if other is not block)\n",
        "remove",
    ),
    # IOVA goes before the mapping.
    Mutant(
        "dma.py",
        "            followed.window.change([])\n"
        '            logger.debug("removed %r from iova=%#x", block, followed.window.iova)\n'
        "            self._former[block] = followed.window.iova\n            self._followed.remove(followed)\n"
        "            self._space.release_iova(followed.window.iova)\n",
        "            self._former[block] = followed.window.iova\n            self._followed.remove(followed)\n"
        "            self._space.release_iova(followed.window.iova)\n            followed.window.change([])\n",
        "remove",
    ),
    Mutant("dma.py", "            self._space.release_iova(followed.window.iova)\n", "", "remove"),
    # A notifier that refuses to go is told nothing any more.
    Mutant(
        "ramblock.py",
        "partial(self._set_notifiers, notifiers), partial(self._set_notifiers, before))",
        "partial(self._set_notifiers, notifiers), partial(self._set_notifiers, notifiers))",
        "remove",
    ),
    # ------------------------------------------------------------------------------------------------- temporary map
    # IOVA goes before the mapping, and what was not unmapped is forgotten.
    Mutant(
        "mapper/buffers.py",
        "        if any(self._size_at(vaddr=mapping.vaddr, iova=mapping.iova) for mapping in run):\n"
        "            self._space.unmap(iova=run[-1].iova, size=sum(mapping.size for mapping in run))\n"
        "        for mapping in run:\n            del self._temporary[mapping.iova]\n"
        "            self._space.release_iova(mapping.iova)\n            mapping._drop()\n",
        "        for mapping in run:\n            del self._temporary[mapping.iova]\n"
        "            self._space.release_iova(mapping.iova)\n            mapping._drop()\n"
        "        if any(self._size_at(vaddr=mapping.vaddr, iova=mapping.iova) for mapping in run):\n"
        "            self._space.unmap(iova=run[-1].iova, size=sum(mapping.size for mapping in run))\n",
        "temporary map",
    ),
    # A map that failed leaves its IOVA reserved.
    Mutant(
        "mapper/buffers.py",
        "                except BaseException as error:\n"
        "                    self._undo(mapping, error, partial(self._unmap_run, [mapping]))\n"
        "                    raise\n",
        "                except BaseException:\n                    raise\n",
        "temporary map",
    ),
    # It is entered when it is too late: nobody knows of what a signal handler leaves mapped.
    Mutant(
        "mapper/buffers.py",
        "                self._temporary[place] = mapping\n                try:\n"
        "                    self._map(vaddr=vaddr, iova=place, size=view.nbytes, read=read, write=write)\n",
        "                try:\n"
        "                    self._map(vaddr=vaddr, iova=place, size=view.nbytes, read=read, write=write)\n"
        "                    self._temporary[place] = mapping\n",
        "temporary map",
    ),
    # The buffer is let go of while a device may still reach it.
    Mutant(
        "mapper/buffers.py",
        "        if all(mapping._buffer is not view for mapping in self._own_mappings()):\n",
        "        if True:\n",
        "temporary map",
    ),
    # --------------------------------------------------------------------------------------------------------- close
    # A step that fails keeps the others from being made.
    Mutant(
        "handle.py",
        "    for step in steps:\n        attempt(step, failures)\n",
        "    for step in steps:\n        step()\n",
        "close",
    ),
    # A descriptor is closed twice where closing reports an error.
    Mutant(
        "handle.py",
        "        fd, self._fd = self._fd, -1  # first: a descriptor is gone even when close(2) reports an error\n"
        "        self._kernel.close(fd)\n",
        "        self._kernel.close(self._fd)\n        self._fd = -1\n",
        "close",
    ),
    # The device may still do DMA while the mappings go.
    Mutant(
        "device/device.py",
        "        steps += [partial(self._set_command, PCI_COMMAND_MASTER, on=False), *([self.reset]",
        "        steps += [*([self.reset]",
        "close",
    ),
    # The interrupts' descriptors.
    Mutant(
        "device/irq.py",
        '        attempt_all(f"disabling {self._name}", [stop, '
        "*(partial(self._device.kernel.close, fd) for fd in fds)])\n",
        "        stop()\n        for fd in fds:\n            self._device.kernel.close(fd)\n",
        "close",
    ),
    # Mappings that are left go with the last group, unseen; and are taken for mapped when they are gone.
    Mutant(
        "container.py",
        "                attempt(self._unmap_everything, failures)  # the kernel would",
        "                pass  # the kernel would",
        "close",
    ),
    Mutant(
        "container.py",
        "                self._table.clear()  # whatever could not be unmapped went now\n",
        "                pass\n",
        "close",
    ),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return [[_ALL, "-k", _FIRST[mutant.operation]], [_ALL]]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
