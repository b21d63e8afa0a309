"""The obstacles to handing over the mappings of a mapper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvfio.blocks.block import RamBlock
from pyvfio.container import Container
from pyvfio.device import Device
from pyvfio.device.attachment import devices_of
from pyvfio.dma import DmaMapper
from pyvfio.extents import clip
from pyvfio.iommu.table import describe_mappings
from pyvfio.memory import File, Memfd
from pyvfio.ramblock import RamBlockList
from pyvfio.units import IovaRange, format_ranges

if TYPE_CHECKING:
    from pyvfio.ioas import Ioas
    from pyvfio.live_update.ways import Giving


def find_obstacles(mapper: DmaMapper, blocks: RamBlockList | None, way: Giving) -> list[str]:
    """Describe the obstacles in words; an empty list: none. The locks of the mapper and the space must be held."""
    found = [
        f"{mapping!r} is a buffer of this process: close that mapping (and reset_temporary(), if temporary)"
        for mapping in mapper.buffers()
    ]
    followed = dict(mapper.windows())
    for block in blocks or ():
        found += _obstacles_of(block)
        if block not in followed:  # the block was removed from the list
            found.append(f"RAM block '{block.idstr}' is no longer followed by this mapper: make another mapper")
    for notifier in blocks.notifiers if blocks is not None else ():
        if notifier is not mapper:
            found.append(f"{notifier!r} also follows the blocks: remove_notifier() that one first, or close it")
    found += [
        f"a change of RAM block '{block.idstr}' failed, and the undo failed too: resize the block once more"
        for block, window in followed.items()
        if not window.settled
    ]
    found += [
        f"a BAR of {device!r} is mapped for the DMA of another device: close that mapping"
        for device in devices_of(way.space)
        if device.has_dependents
    ]
    found += [
        f"{device!r} is in low power, and the other process would not know: exit_low_power() first"
        for device in devices_of(way.space)
        if isinstance(device, Device) and device.windows.low_power
    ]
    if not found:  # a block of private memory is not told twice
        found += way.obstacles(mapper)
    return found or _strangers(mapper, way.space) or way.strangers() or _reservations(mapper, way.space)


def _strangers(mapper: DmaMapper, space: Container | Ioas) -> list[str]:
    """Find mappings of this process other than those of the blocks."""
    windows = [window for _block, window in mapper.windows()]
    ours = sum(len(window.pieces()) for window in windows)
    mappings = list(space.table)
    if ours < len(mappings):
        places = sorted((int(window.iova), window.iova + window.size) for window in windows)
        others = [mapping for mapping in mappings if not clip(places, mapping.iova, mapping.iova + 1)]
        return [f"IOVA {describe_mappings(others)} is mapped by another user than this mapper: unmap that range first"]
    return []


def _reservations(mapper: DmaMapper, space: Container | Ioas) -> list[str]:
    """Find IOVA that the other process would allocate again: reserved by the caller or for another mapper's blocks."""
    ours = {IovaRange.of(iova=window.iova, size=window.size) for _block, window in mapper.windows()}
    others = [reserved for reserved in space.reserved_iova if reserved not in ours]
    if not others:
        return []
    return [
        f"IOVA {format_ranges(others[:8])}{', …' if others[8:] else ''} is reserved outside of this mapper: "
        "release_iova() the range, or remove the other mapper's block"
    ]


def _obstacles_of(block: RamBlock) -> list[str]:
    memory = block.state.memory
    name = f"RAM block '{block.idstr}'"
    if not (isinstance(memory.kind, Memfd) or (isinstance(memory.kind, File) and memory.kind.shared)):
        return [f"the memory of {name} is private to this process ({memory.kind}): add it with memory=Memfd()"]
    if block.whole:
        return [f"{name} is allocated in full, so no process can resize it elsewhere: add the block again later"]
    if block.state.doubtful:
        return [f"{name} has discarded parts that a device may reach: populate them once more"]
    if memory.retained or memory.held > block.used_length:
        return [f"{name} has memory that an earlier change could not release: resize the block once more"]
    return []
