"""Mistakes in what is told to listeners and other processes: `DirtyLog`, hand-overs, whole blocks, pages replaced.

The tests of each part have to notice its mistakes; tests/unit/test_failures.py does not reach them.
"""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_HAND_OVER = "tests/unit/test_live_update.py"
# Which tests have to notice the mistakes in a part. What is noticed soon is asked first; the last is all who may.
_WITNESSES: dict[str, list[list[str]]] = {
    "whole block": [["tests/unit/test_safety_net.py"]],
    "dirty log": [["tests/unit/test_dirty_log.py", "-k", "not never_is_too_little"], ["tests/unit/test_dirty_log.py"]],
    "pages replaced": [["tests/unit/test_remap.py"]],
    "hand-over": [[_HAND_OVER, "-k", "not whichever and not interrupted"], [_HAND_OVER]],
}

_MUTANTS = (
    # ----------------------------------------------------------------------------------------------------- whole block
    # The guard page is a mapping of its own then, of which the process has none left.
    Mutant(
        "Reservation.activate_whole",
        "self.max_length + (PAGE_SIZE if anonymous else 0), self._store.protection",
        "self.max_length, self._store.protection",
        "whole block",
    ),
    # There are no pages behind what is used: a touch is SIGBUS where the machine has none.
    Mutant("Reservation.activate_whole", "            self._store.provide(0, provided)\n", "", "whole block"),
    Mutant(
        "BlockState.grow",
        "                self.memory.provide(old, length)  # a block that",
        "                # a block that",
        "whole block",
    ),
    # What comes back is not zeroed.
    Mutant("BlockState.grow", "                self.memory.clear(old, length)\n", "", "whole block"),
    # ------------------------------------------------------------------------------------------------------- dirty log
    # What the kernel forgets as it tells is not dirty when the telling fails.
    Mutant(
        "DirtyLog._collect",
        "        self._soil(block, [_pages(block, mapping.iova - iova, mapping.iova - iova + mapping.size)])\n"
        "        found = tracking.read(iova=mapping.iova, size=mapping.size)\n",
        "        found = tracking.read(iova=mapping.iova, size=mapping.size)\n"
        "        self._soil(block, [_pages(block, mapping.iova - iova, mapping.iova - iova + mapping.size)])\n",
        "dirty log",
    ),
    # Nobody got to know what was dirty, and it is clean.
    Mutant(
        "DirtyLog.snapshot",
        "                self._soil(block, dirty)\n            raise\n",
        "                pass\n            raise\n",
        "dirty log",
    ),
    # What was cleared in the middle of a replacement stays so.
    Mutant(
        "DirtyLog.ram_block_remapped",
        '        """And stay so, whatever was cleared meanwhile."""\n        self._soil(block, parts)\n',
        '        """And stay so, whatever was cleared meanwhile."""\n',
        "dirty log",
    ),
    # Only what a block has grown by has to be copied.
    Mutant(
        "DirtyLog.ram_block_resized",
        "        del old_length, new_length\n        self._clean.pop(block, None)\n",
        "        if old_length < new_length:\n            self._soil(block, [Extent(old_length, new_length)])\n",
        "dirty log",
    ),
    # -------------------------------------------------------------------------------------------------- pages replaced
    # The newest lets go first.
    Mutant("remap", "tell_all(event, told[::-1], replace)", "tell_all(event, told, replace)", "pages replaced"),
    # A granule is cut.
    Mutant("DmaMapper.ram_block_remapping", "*self._policy.round_out(parts)", "*parts", "pages replaced"),
    # ------------------------------------------------------------------------------------------------------- hand-over
    # It is not known whether addresses were given up when a signal handler ends the call.
    Mutant(
        "HandOver.begin",
        "            self._given_up = True\n            give_up_all(container)\n",
        "            give_up_all(container)\n            self._given_up = True\n",
        "hand-over",
    ),
    # What the kernel gave up is not compared with what is known.
    Mutant("give_up_all", "    if given_up != expected:\n", "    if False:\n", "hand-over"),
    # An address that the other process has given stays.
    Mutant(
        "HandOver._restore_one",
        "        give_up_vaddr(self._container, mapping)\n        set_vaddr(self._container, mapping)\n",
        "        set_vaddr(self._container, mapping)\n",
        "hand-over",
    ),
    # After a cancel that the kernel has refused the container can be used, and closed, though mappings wait.
    Mutant(
        "HandOver._restore",
        "            for handle in handles:\n                handle.set_aside()\n            raise\n",
        "            raise\n",
        "hand-over",
    ),
    # What could not be handed over stays half handed over.
    Mutant(
        "hand_over",
        "            update.cancel()\n        except Exception",
        "            pass\n        except Exception",
        "hand-over",
    ),
    # The same, where it could not be taken over; and the caller's descriptors are closed.
    Mutant("take_over", "        taking.give_back(error)\n        raise\n", "        raise\n", "hand-over"),
    Mutant(
        "_Taking.give_back",
        "            block.state.memory.disown()\n",
        "            block.state.memory.own()\n",
        "hand-over",
    ),
    # An address that was just told is not known to have been.
    Mutant(
        "_Taking._tell",
        "        self._told.append(mapping)\n        try:\n            set_vaddr(container, mapping)\n",
        "        try:\n            set_vaddr(container, mapping)\n            self._told.append(mapping)\n",
        "hand-over",
    ),
    # Memory under a live view goes.
    Mutant(
        "HandOver.finish",
        "                block.state.check_views(0)\n            for device",
        "                pass\n            for device",
        "hand-over",
    ),
    # The memory of blocks stays mapped in a process that has them no more.
    Mutant(
        "HandOver._forget",
        "steps += [self._blocks.forget, partial(self._blocks.resume, self)]",
        "steps += [partial(self._blocks.resume, self)]",
        "hand-over",
    ),
)


def _rounds(mutant: Mutant) -> list[list[str]]:
    return _WITNESSES[mutant.operation]


SUITE = Suite(Path("pyvfio"), _MUTANTS, _rounds)
