"""A program is replaced, or its process, and its devices go on reaching the memory of its RAM blocks all the while.

In the old process:                                   In the new one:

    with hand_over(mapper) as update:
        send(update.state, update.fds)        ──▸     taken = take_over(state, fds)
        wait_for("taken")                     ◂──     say("taken")
        update.finish()                               taken.blocks["ring"].resize(...)

The memory is a memfd (or a file), which both can map; the mappings stay in the IOMMU, pages pinned, and are told a new
address in a new process. Nothing is unmapped, mapped or reset, so that no access of a device is stopped at any time.

What holds at every instant, whatever fails, and whichever process dies:

    what the device can reach  =  what it could reach before `hand_over`, until the new process resizes a block

Between `hand_over` and `cancel` or `finish` the old process can change none of it: a block whose pages would be given
back by one process while another counts on them is what must not be. It may use the blocks' memory, the devices'
registers and interrupts. Only one of the two ends: `finish` where the new process has said that it has everything,
`cancel` where it has died, or has said that it could not. A process that dies takes its descriptors with it; when the
last has gone, the kernel unmaps everything and the device is off the bus.

`handing_over` is the old process's side and `taking_over` the new one's, `state` what the one tells the other (pure),
`obstacles` what cannot be handed over, and `vaddr` the two calls that take a mapping's address and give it another.

Source: VFIO_DMA_UNMAP_FLAG_VADDR and VFIO_DMA_MAP_FLAG_VADDR, `vfio_dma_do_unmap`, `vfio_dma_do_map` and
`vfio_change_dma_owner` in drivers/vfio/vfio_iommu_type1.c; cpr-exec and cpr-transfer of QEMU.
"""

from pyvfio.live_update.handing_over import HandOver, hand_over
from pyvfio.live_update.taking_over import TakenOver, take_over

__all__ = ["HandOver", "TakenOver", "hand_over", "take_over"]
