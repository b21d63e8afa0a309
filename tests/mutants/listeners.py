"""Mistakes in what is told to listeners and other processes: `DirtyLog`, hand-overs, whole blocks, pages replaced.

The tests of each part have to notice its mistakes; tests/unit/test_failures.py does not reach them.
"""

from __future__ import annotations

from pathlib import Path

from tests.mutants.mutant import Mutant, Suite

_NODES = "nodes of devices"
_REGION = "region of another device"
_HAND_OVER = "tests/unit/test_live_update.py"
_IOAS = "hand-over of an Ioas"
# Which tests have to notice the mistakes in a part. What is noticed soon is asked first; the last is all who may.
_WITNESSES: dict[str, list[list[str]]] = {
    "whole block": [["tests/unit/test_safety_net.py"]],
    "dirty log": [["tests/unit/test_dirty_log.py", "-k", "not never_is_too_little"], ["tests/unit/test_dirty_log.py"]],
    "dirty pages": [["tests/unit/test_dirty.py"]],
    "pages replaced": [["tests/unit/test_remap.py"]],
    "held memory": [["tests/unit/test_holders.py"]],
    "interrupts": [["tests/unit/test_irq.py"]],
    "hot reset": [["tests/unit/test_hot_reset.py"]],
    "nodes of devices": [["tests/unit/test_cdev.py"]],
    _REGION: [["tests/unit/test_beside.py"]],
    "hand-over": [[_HAND_OVER, "-k", "not whichever and not interrupted"], [_HAND_OVER]],
    _IOAS: [["tests/unit/test_live_update_iommufd.py", "-k", "not whichever"]],
}

_MUTANTS = (
    # ------------------------------------------------------------------------------------------------------ interrupts
    # A vector that stays as it is is disconnected for a moment.
    Mutant("Irq._change", "if new is not before[v] and not", "if True or not", "interrupts"),
    # What the kernel has disconnected stays so, or the table says that it is connected.
    Mutant("Irq._change", "            self._put_back(tried, before, wake, error)\n", "", "interrupts"),
    Mutant("Irq._put_back", "                lost |= set(run)\n", "", "interrupts"),
    # A program's own descriptor is closed, or waited for when it may be another file's.
    Mutant("Making._duplicate", "            own = self._kernel.dup(fd)", "            own = fd", "interrupts"),
    # A duplicate has the number of a descriptor that is closed.
    Mutant("Making.duplicate", "                check_open(fd, self._what)\n", "                pass\n", "interrupts"),
    # Whoever waits does not hear of a vector that was added, or stopped.
    Mutant("Irq._replace", "            old.end(None, successor=new)\n", "            pass\n", "interrupts"),
    # The eventfds that stay are closed with the others.
    Mutant("Irq._replace", "old.end(None, successor=new)", "old.end(None)", "interrupts"),
    # One that several vectors share is read for each.
    Mutant("Vectors._take", "if self._may_share else None", "if False else None", "interrupts"),
    # A thread that waits keeps no descriptor open.
    Mutant("Vectors.wait_one", "            self._waiting[turn] = None\n", "", "interrupts"),
    # A signal handler that raises loses what was read, or its undo writes to a descriptor that is closed.
    Mutant("_put_back", "    taken[1].put_back(taken[2])\n", "    del taken\n", "interrupts"),
    Mutant("Vectors.put_back", "eventfd.fd >= 0", "True", "interrupts"),
    # The duplicates that nobody needs stay open.
    Mutant("Irq._enable", "            making.close()\n            raise\n", "            raise\n", "interrupts"),
    # An interrupt is handed over without its gaps, or can be changed meanwhile.
    Mutant("_Taking._adopt_irqs", "for vector in range(described.count)]", "for vector in of_vector]", "hand-over"),
    Mutant("ContainerGiving.begin", "            group.set_aside()  #", "            pass  #", "hand-over"),
    Mutant("_Taking.give_back", "            attempt(irq.give_up, failures)\n", "            pass\n", "hand-over"),
    Mutant("_check_eventfds", "and found != identity:", "and False:", "hand-over"),
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
        "        self._soil(block, [part])\n        found = tracking.read(iova=mapping.iova, size=mapping.size)\n",
        "        found = tracking.read(iova=mapping.iova, size=mapping.size)\n        self._soil(block, [part])\n",
        "dirty log",
    ),
    # A page beside those that were written is clean no more, or one that was written stays clean.
    Mutant("DirtyLog._soil", "without(clean[first:behind], *parts)", "[]", "dirty log"),
    Mutant("DirtyLog._collect", "*without(before, *written)]", "*before]", "dirty log"),
    Mutant("DirtyLog._collect", "[*clean[first:behind], *without", "[*without", "dirty log"),
    # A bit behind the end of a mapping is a page; a run that goes on in the next byte is two; one is lost.
    Mutant("_runs", "    if count % 8:\n", "    if False:\n", "dirty pages"),
    Mutant("_runs", "bits[: -(-count // 8)]", "bits[: count // 8 + 1]", "dirty pages"),
    Mutant("_runs", "if 8 * at + start > end:", "if 8 * at + start >= end:", "dirty pages"),
    Mutant("_runs", "                first = 8 * at + start\n", "", "dirty pages"),
    Mutant("_BYTES", ", re.DOTALL", "", "dirty pages"),
    # Page tables of iommufd: a device writes to one that records nothing, or its record is lost with a mapping.
    Mutant(
        "PageTables._attach_to_new",
        "            self._iommufd.hwpt_set_dirty_tracking(hwpt_id, enabled=True)",
        "            pass",
        "dirty pages",
    ),
    Mutant("PageTables.attach", "if error.errno != errno.EINVAL:", "if True:", "dirty pages"),
    Mutant("Ioas._unmap_in_kernel", "self._keep_dirty([Extent(iova, iova + size)])", "pass", "dirty pages"),
    Mutant("Ioas._replace_without", "        self._keep_all_dirty()", "        pass", "dirty pages"),
    Mutant("Ioas._replace_without", "tracks=self._tables.tracks", "tracks=False", "dirty pages"),
    Mutant("Ioas._read_dirty", "            self._keep_dirty(found.extents)", "            pass", "dirty pages"),
    Mutant(
        "TrackedSpace.dirty_ranges",
        "            self._keep_dirty(found)\n            raise",
        "            raise",
        "dirty pages",
    ),
    # Nobody got to know what was dirty, and it is clean.
    Mutant(
        "_put_back",
        "    taken.log.soil(taken.block, taken.found.dirty)\n",
        "    pass\n",
        "dirty log",
    ),
    # What was cleared in the middle of a replacement stays so.
    Mutant(
        "DirtyLog.ram_block_remapped",
        "        self._soil(block, parts)\n",
        "        pass\n",
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
    Mutant("remap", "Remapping(block, parts, told[::-1])", "Remapping(block, parts, told)", "pages replaced"),
    # A granule is cut.
    Mutant("DmaMapper._replaced", "policy.round_out(parts, self._space.page_size)", "parts", "pages replaced"),
    # ----------------------------------------------------------------------------------------------------- held memory
    # The first holder that is closed unmaps it, or the last does not.
    Mutant("BufferMapper.let_go", "memory.holders > 1", "False", "held memory"),
    Mutant("BufferMapper.let_go", "memory.holders > 1", "memory.holders", "held memory"),
    # It is let go of though the kernel has refused to unmap it.
    Mutant(
        "BufferMapper._unmap",
        "        space = self._space\n",
        "        memory.holders = 0\n        space = self._space\n",
        "held memory",
    ),
    # The buffer of a part is let go of where nothing else keeps it.
    Mutant("BufferMapper._hold", "isinstance(memory, OwnMemory) and memory.export is None", "False", "held memory"),
    # A block loses what is held: a page of it, by a shrink, by a discard, when it is removed.
    Mutant("Holders.find", "bisect_right(self._ends, start)", "bisect_right(self._ends, end)", "held memory"),
    Mutant("Holders.find", "bisect_left(self._starts, end)", "bisect_left(self._starts, start)", "held memory"),
    Mutant("DmaMapper._alter", "                window.check_held(parts)\n", "", "held memory"),
    Mutant(
        "DmaMapper._alter",
        "                    window.check_held(without([(0, window.size)], *wanted))\n",
        "                    pass\n",
        "held memory",
    ),
    Mutant(
        "DmaMapper.ram_block_removed",
        "            window.check_held([(0, window.size)])\n",
        "            pass\n",
        "held memory",
    ),
    # Without a device, a block is unmapped by a change that cannot map it again.
    Mutant("DmaMapper.ram_block_resized", " or not self._space.takes_mappings:", ":", _NODES),
    Mutant(
        "DmaMapper._window_to_change", "            self._space.check_takes_mappings()\n", "            pass\n", _NODES
    ),
    # It is refused after the block has been unmapped.
    Mutant(
        "DmaMapper._alter",
        "                window.check_held(parts)\n                window.unmap(parts)\n",
        "                window.unmap(parts)\n                window.check_held(parts)\n",
        "held memory",
    ),
    # Holders keep a list, or a mapper, from being closed.
    Mutant("DmaMapper.ram_block_removed", "self.blocks.closing", "False", "held memory"),
    Mutant("DmaMapper._leave", "            self._leaving = True\n", "", "held memory"),
    # They are forgotten where the block stays after all.
    Mutant(
        "DmaMapper.ram_block_added",
        "            del self._departing[block]\n",
        "            del self._departing[block]\n            departing._holders = None\n",
        "held memory",
    ),
    # A temporary mapping is asked for more than the block allows.
    Mutant("BufferMapper._map_for_once", "if isinstance(known, Window):", "if False:", "held memory"),
    Mutant(
        "DmaMapper._block_of", "            self._check_no_block(vaddr, size)\n", "            pass\n", "held memory"
    ),
    # A mapper that has lost everything answers.
    Mutant("BufferMapper.check_open", "self._space.lost", "False", "held memory"),
    # ------------------------------------------------------------------------------------------------------- hot reset
    # Transfers are under way when the bus goes, or the caller's setting is lost where the kernel refuses.
    Mutant("_reset_bus", "            each.bus_master = False", "            pass", "hot reset"),
    Mutant(
        "_reset_bus",
        "attempt(partial(_resume, each), [])",
        "pass",
        "hot reset",
    ),
    # A mapping of a region outlives the reset of a sibling, or a view of one does not keep the bus.
    Mutant("_reset_bus", '            region.drop(keep="no maps")\n', "            pass\n", "hot reset"),
    Mutant(
        "attempt_reset",
        "    for each in devices:\n        each.check_views()\n    for each",
        "    for each",
        "hot reset",
    ),
    # Siblings are nobody's affair.
    Mutant("_opened", "each.bdf in bdfs]", "each.bdf == device.bdf]", "hot reset"),
    # Nor is one that another thread has opened meanwhile.
    Mutant(
        "_change_apart",
        "    if _opened(device, reached) != devices:\n",
        "    if False:\n",
        "hot reset",
    ),
    # The kernel is left to say what is missing.
    Mutant(
        "check_complete", "        elif group not in device.container.groups:\n", "        elif False:\n", "hot reset"
    ),
    Mutant("check_complete", "if not _is_vfio(kernel, each.bdf)]", "if False]", "hot reset"),
    # ------------------------------------------------------------------------------------------------ nodes of devices
    # A descriptor that could not be bound, or a space that could not be used, stays open.
    Mutant("CdevAttachment.open", "            kernel.close(fd)\n", "            pass\n", _NODES),
    Mutant("_open_node", "        close_now(space)\n        raise\n", "        raise\n", _NODES),
    Mutant("_open_node", "    device.opened_with = space\n", "    pass\n", _NODES),
    # A device that left is counted, or one that stayed is not.
    Mutant("CdevAttachment.leave", "            space.note_detached(device)\n", "            pass\n", _NODES),
    Mutant("CdevAttachment.attach", "former.note_detached(each)", "pass", _NODES),
    # A refused move leaves the device in the new space.
    Mutant("CdevAttachment.attach", "            self._return(device, space, moved, error)\n", "", _NODES),
    # The siblings stay behind in the table of spaces, or their space is nobody's affair.
    Mutant("CdevAttachment.attach", "(self._siblings() if self.space is not None else [])", "[]", _NODES),
    Mutant("CdevAttachment.enter", "        self._check_siblings(space)\n", "", _NODES),
    # An explicit choice falls back.
    Mutant("_open_with", "    if kind is None and iommu_type is None:\n", "    if iommu_type is None:\n", _NODES),
    # A kernel without tokens is taken for one that refuses this token.
    Mutant("_knows_tokens", "error.errno == errno.E2BIG", "True", _NODES),
    # A device of another iommufd, or of another descriptor, is taken for one's own.
    Mutant("CdevAttachment.attach", "if space.iommufd is not self.iommufd:", "if False:", _NODES),
    Mutant("CdevAttachment._is_here", "self.dev_id is not None or", "True or", _NODES),
    # The kernel is left to say which group the iommufd lacks.
    Mutant("check_complete", "            if not all(each.owned", "            if False and all(each.owned", _NODES),
    # ---------------------------------------------------------------------------------------- region of another device
    # The BAR goes while another device reaches it.
    Mutant("RegionMemory.__init__", "        region.add_dependent(self._close)\n", "        pass\n", _REGION),
    Mutant("_close_both", "        thing.close_dependents()\n", "", _REGION),
    # A close gives up where another thread maps it meanwhile.
    Mutant("_close_both", "range(_TURNS)", "range(_TURNS - 15)", _REGION),
    # A finalizer closes it in the middle of a change.
    Mutant("Region.close", "        run_outside_or_in_hook(self._close)\n", "        self._close()\n", _REGION),
    # A mapping that has ended says that it is open.
    Mutant("RegionMemory.release", "        self.ended = True\n", "        pass\n", _REGION),
    # And though it could not be unmapped.
    Mutant("Device.close", "            self._check_no_dependents()\n", "", _REGION),
    # What was mapped stays, or what was not is known.
    Mutant(
        "RegionMapper._map_region",
        "            self._take_back(memory)\n            raise",
        "            raise",
        _REGION,
    ),
    Mutant(
        "RegionMapper._take_back", "            if mapping.vaddr == memory.vaddr:\n", "            if False:\n", _REGION
    ),
    Mutant("RegionMemory.release", "            close_now(self._mapped)\n", "            pass\n", _REGION),
    # It goes to another process.
    Mutant("find_obstacles", "        if device.has_dependents\n", "        if False\n", _REGION),
    # ------------------------------------------------------------------------------------------------------- hand-over
    # It is not known whether addresses were given up when a signal handler ends the call.
    Mutant(
        "ContainerGiving.give_up",
        "        self._given_up = True\n        give_up_all(self._container)\n",
        "        give_up_all(self._container)\n        self._given_up = True\n",
        "hand-over",
    ),
    # What the kernel gave up is not compared with what is known.
    Mutant("give_up_all", "    if given_up != expected:\n", "    if False:\n", "hand-over"),
    # An address that the other process has given stays.
    Mutant(
        "ContainerGiving._restore_one",
        "        give_up_vaddr(self._container, mapping)\n        set_vaddr(self._container, mapping)\n",
        "        set_vaddr(self._container, mapping)\n",
        "hand-over",
    ),
    # After a cancel that the kernel has refused the container can be used, and closed, though mappings wait.
    Mutant(
        "ContainerGiving.restore",
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
    # An Ioas that the old process has back is taken, by a process that then has it, too.
    Mutant(
        "IoasTaking.conclude",
        "            _check_not_cancelled(agreement)\n            _check_charge",
        "            _check_charge",
        _IOAS,
    ),
    Mutant("IoasTaking._join", "        if not agreement.hold():\n", "        if False:\n", _IOAS),
    # An undo in the new process stops the device of the old one.
    Mutant("ResumedAttachment.retract", "        self.leave(device)", "        self.detach(device)", _IOAS),
    # The kernel is asked for what it would not forgive.
    Mutant("_check_charge", "(ended or agreement.is_alone) and", "False and", _IOAS),
    Mutant("IoasGiving._take_charge_back", "        if lost:\n", "        if False:\n", _IOAS),
    Mutant("IoasGiving.begin", "        self._iommufd.set_aside()  #", "        pass  #", _IOAS),
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
