"""Replaces a program or its process, while its devices continue to reach the memory of the RAM blocks.

In the old process:                                   In the new process:

    with hand_over(mapper) as update:
        send(update.state, update.fds)        ──▸     taken = take_over(state, fds)
        wait_for("taken")                     ◂──     say("taken")
        update.finish()                               taken.blocks["ring"].resize(...)

The memory is a memfd or a file, which both processes can map. The mappings stay in the IOMMU with their pages pinned.
In a container, the new process sets their new virtual addresses. In an Ioas, the new process has the memory charged to
itself. Nothing is unmapped, mapped or reset, so no device access fails at any time.

The invariant, at every instant, after any failure, and whichever process dies:

    what the device can reach  =  what it could reach before `hand_over`, until the new process resizes a block

Between `hand_over` and `cancel` or `finish`, the old process can change none of the mappings. One process must not
release pages of a block while the other relies on them. The old process may use the memory of the blocks, and the
registers and interrupts of the devices.

A hand-over has exactly one end. Call `finish` after the new process has confirmed that the take-over is complete. Call
`cancel` if the new process has died or has reported a failure. A process that dies loses its descriptors. After the
last descriptor is closed, the kernel unmaps everything and disables bus mastering of the device.

`handing_over` is the side of the old process, `taking_over` the side of the new process. `state` is the message between
them (pure). `obstacles` lists everything that cannot be handed over. `ways` has the steps that depend on the kind of
address space: `type1`, whose calls are in `vaddr`, and `iommufd`, whose processes know of each other by an `agreement`.

Source: VFIO_DMA_UNMAP_FLAG_VADDR and VFIO_DMA_MAP_FLAG_VADDR, `vfio_dma_do_unmap`, `vfio_dma_do_map` and
`vfio_change_dma_owner` in drivers/vfio/vfio_iommu_type1.c; IOMMU_IOAS_CHANGE_PROCESS, `iommufd_ioas_change_process` in
drivers/iommu/iommufd/ioas.c; cpr-exec and cpr-transfer of QEMU.
"""

from pyvfio.live_update.handing_over import HandOver, hand_over
from pyvfio.live_update.taking_over import TakenOver, take_over

__all__ = ["HandOver", "TakenOver", "hand_over", "take_over"]
