"""What stands in the way of handing over what a mapper has mapped."""

from __future__ import annotations

from pyvfio.blocks.block import RamBlock
from pyvfio.container import Container
from pyvfio.device import Device
from pyvfio.dma import DmaMapper
from pyvfio.iommu.type1_errors import describe_mappings
from pyvfio.memory import File, Memfd
from pyvfio.ramblock import RamBlockList
from pyvfio.units import IovaRange, format_ranges


def find_obstacles(mapper: DmaMapper, blocks: RamBlockList | None, container: Container) -> list[str]:
    """In words, one by one; none: it can be handed over. The mapper's and the container's locks are held."""
    found = [
        f"{mapping!r} is a buffer of this process's own: close it (and reset_temporary(), if it is temporary)"
        for mapping in mapper.buffers()
    ]
    for block in blocks or ():
        found += _obstacles_of(block)
        if block not in dict(mapper.windows()):  # it was taken out of the list
            found.append(f"RAM block '{block.idstr}' is not followed by this mapper any more: make another")
    for notifier in blocks.notifiers if blocks is not None else ():
        if notifier is not mapper:
            found.append(f"{notifier!r} follows the blocks, too: remove_notifier() it first, or close it")
    found += [
        f"a change of RAM block '{block.idstr}' failed, and so did its undo: resize it once more"
        for block, window in mapper.windows()
        if not window.settled
    ]
    found += [
        f"a BAR of {device!r} is mapped for the DMA of another device: close that mapping"
        for group in container.groups.values()
        for device in group.devices
        if device.has_dependents
    ]
    found += [
        f"{device!r} is in low power, which the other process does not know: exit_low_power() first"
        for group in container.groups.values()
        for device in group.devices
        if isinstance(device, Device) and device.windows.low_power
    ]
    return found or _strangers(mapper, container) or _reservations(mapper, container)


def _strangers(mapper: DmaMapper, container: Container) -> list[str]:
    """Mappings that are none of the blocks': of this process, or of another that has the container."""
    windows = [window for _block, window in mapper.windows()]
    ours = sum(len(window.pieces()) for window in windows)
    mappings = list(container.table)
    if ours < len(mappings):
        others = [m for m in mappings if not any(w.iova <= m.iova < w.iova + w.size for w in windows)]
        return [f"IOVA {describe_mappings(others)} is mapped, by whom this mapper does not know: unmap it first"]
    there = container.entry_limit - container.get_info().dma_avail
    if there != len(mappings):
        return [f"the container has {there} mappings, of which {len(mappings)} are known here: unmap the others"]
    return []


def _reservations(mapper: DmaMapper, container: Container) -> list[str]:
    """IOVA that the other process would give out again: the caller's own, and that of another mapper's blocks."""
    ours = {IovaRange.of(iova=window.iova, size=window.size) for _block, window in mapper.windows()}
    others = [reserved for reserved in container.reserved_iova if reserved not in ours]
    if not others:
        return []
    return [
        f"IOVA {format_ranges(others[:8])}{', …' if others[8:] else ''} is reserved outside of this mapper: "
        "release_iova() it, or remove the block of another mapper that has it"
    ]


def _obstacles_of(block: RamBlock) -> list[str]:
    memory = block.state.memory
    name = f"RAM block '{block.idstr}'"
    if not (isinstance(memory.kind, Memfd) or (isinstance(memory.kind, File) and memory.kind.shared)):
        return [f"the memory of {name} is this process's alone ({memory.kind}): add it with memory=Memfd()"]
    if block.whole:
        return [f"{name} is allocated in full, and cannot be resized elsewhere: add it again when nothing calls for it"]
    if block.state.doubtful:
        return [f"{name} has discarded parts that a device may reach: populate them once more"]
    if memory.retained or memory.held > block.used_length:
        return [f"{name} has memory that an earlier change could not give back: resize it once more"]
    return []
