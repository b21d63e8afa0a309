"""A user's program with every row of the table of docs/at-a-glance.md, for type checkers: it is read, and not run.

The first line of each function's docstring is the row's first column.
"""

from __future__ import annotations

import sys
from array import array
from uuid import UUID

import pyvfio


def open_devices(bdf: str, other: str) -> pyvfio.AddressSpace:
    """a device, the group of the device and a container in one call"""
    device = pyvfio.open_device(bdf)
    return pyvfio.open_device(other, space=device.space).space


def open_through_iommufd(bdf: str) -> pyvfio.Device:
    """iommufd in place of type1"""
    return pyvfio.open_device(bdf, iommu="iommufd")


def cut(bdf: str, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
    """resizes at any length that stop no DMA"""
    space = pyvfio.Ioas(cut="pages")
    with pyvfio.open_device(bdf, space=space):
        return pyvfio.DmaMapper(space, blocks, resize="cut")


def share(device: pyvfio.Device, space: pyvfio.Ioas) -> pyvfio.Ioas:
    """a second address space that shares memory with the first; to move a device there"""
    other = pyvfio.Ioas(shares_with=space)
    device.attach(other)
    return other


def resize(blocks: pyvfio.RamBlockList, idstr: str, n: int) -> pyvfio.RamBlock:
    """resizable memory"""
    block = blocks.add(idstr, used_length=pyvfio.MIB, max_length=pyvfio.GIB)
    block.resize(n)
    block.remove()
    return block


def give_reach(device: pyvfio.Device, blocks: pyvfio.RamBlockList, block: pyvfio.RamBlock) -> pyvfio.Iova:
    """the device to reach that memory"""
    with pyvfio.DmaMapper(device.space, blocks) as mapper:
        return mapper.iova(block)


def adopt(fd: int, device_fd: int, bdf: str, n: int) -> pyvfio.Device:
    """a device that a launcher with more rights has opened"""
    group = pyvfio.Group.from_fd(fd, number=n)
    container = pyvfio.Container.from_fd(fd, groups=[group])
    assert container.group(n) is group
    return pyvfio.Device.from_fd(group, bdf, device_fd)


def open_virtual(physical: pyvfio.Device, bdf: str, token: UUID) -> pyvfio.Device:
    """a virtual function"""
    physical.set_vf_token(token)
    return pyvfio.open_device(bdf, vf_token=token)


def map_own(mapper: pyvfio.DmaMapper, buffer: bytearray, vaddr: pyvfio.Vaddr) -> list[pyvfio.Iova]:
    """the device to reach a buffer of your own"""
    with mapper.map_buffer(buffer) as own, mapper.map_temporary(buffer) as temporary:
        return [own.iova, temporary.iova, mapper.map_dma(vaddr=vaddr, size=pyvfio.PAGE_SIZE).iova]


def limit_addresses(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
    """IOVAs below the address bits of a device"""
    return pyvfio.DmaMapper(container, blocks, dma_bits=32)


def gather(mapper: pyvfio.DmaMapper, block: pyvfio.RamBlock, offset: int, size: int) -> list[tuple[pyvfio.Iova, int]]:
    """entries of a scatter-gather or PRP list"""
    return mapper.segments(block, offset, size, max_segment=pyvfio.MIB, boundary=4096)


def list_many(mapper: pyvfio.DmaMapper, block: pyvfio.RamBlock, offsets: array[int], size: int) -> array[int]:
    """the same for thousands of addresses or parts in one call"""
    mapper.segment_arrays(block, offsets, size, boundary=4096)
    return mapper.translate_vaddrs(array("Q", [block.vaddr + offset for offset in offsets]))


def choose_policies(container: pyvfio.Container, blocks: pyvfio.RamBlockList, n: int) -> pyvfio.DmaMapper:
    """another policy for some blocks"""
    policy = pyvfio.Policy("extend", granule=n)
    return pyvfio.DmaMapper(container, blocks, policy_of=lambda block: policy if block.idstr == "data" else None)


def reach_other(mapper: pyvfio.DmaMapper, other: pyvfio.Device) -> pyvfio.Iova:
    """a BAR of another device as the target of DMA"""
    return mapper.map_region(other.region(0)).iova


def use_registers(device: pyvfio.Device, offset: int, value: int) -> memoryview:
    """registers"""
    bar: pyvfio.Region = device.region(0)
    bar.write64(offset, value | bar.read32(offset))
    doorbell: pyvfio.Register = bar.register32(offset)
    doorbell.write(bar.poll32(offset, mask=value, value=value, timeout=1.0))
    return bar.mmap().view()


def configure(device: pyvfio.Device) -> int:
    """configuration space"""
    device.bus_master = True
    device.memory_enabled = True
    return device.config.read16(0)


def list_capabilities(device: pyvfio.Device) -> list[int]:
    """PCI capabilities"""
    if (msix := device.capabilities.msix) is not None:
        return [msix.vectors]
    return [capability.offset for capability in device.capabilities.standard]


def use_features(device: pyvfio.Device, number: int) -> tuple[int, object]:
    """low power, DMA-bufs and other features"""
    with device.low_power():
        pass
    return device.dma_buf(device.region(0)).fd, device.feature(number).probe()


def reset(device: pyvfio.Device) -> None:
    """a reset"""
    if device.can_reset:
        device.reset()
    else:
        device.hot_reset()


def wait(device: pyvfio.Device) -> tuple[int, tuple[int, ...]]:
    """interrupts"""
    irq: pyvfio.Irq = device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable(1)
    print(irq.wait_any(timeout=0.5))
    return irq.wait(0, timeout=0.5), tuple(fd for fd in irq.fds if fd is not None)


class Listener:
    """A notifier, as a user writes it."""

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Refuse what is too long."""
        if new_length > pyvfio.TIB:
            raise ValueError(f"{block.idstr} has {old_length} bytes, and {new_length} are too many")


def listen(blocks: pyvfio.RamBlockList) -> None:
    """to follow resizes, and to refuse them"""
    blocks.add_notifier(Listener())


def add_other_kinds(blocks: pyvfio.RamBlockList, fd: int, offset: int) -> None:
    """memory of another kind"""
    blocks.add("shared", used_length=pyvfio.MIB, max_length=pyvfio.GIB, memory=pyvfio.Memfd())
    blocks.add("huge", used_length=0, max_length=pyvfio.GIB, memory=pyvfio.Memfd(hugetlb=2 * pyvfio.MIB))
    blocks.add("file", used_length=pyvfio.MIB, max_length=pyvfio.GIB, memory=pyvfio.File(fd, offset))
    blocks.add("large", used_length=0, max_length=pyvfio.TIB, memory=pyvfio.Anonymous(noreserve=True))


def add_with_settings(blocks: pyvfio.RamBlockList) -> None:
    """whether memory goes into forked children, core dumps, huge pages or KSM"""
    settings = pyvfio.MemorySettings(dontdump=True)
    blocks.add("ring", used_length=pyvfio.MIB, max_length=pyvfio.GIB, settings=settings)


def add_readonly(blocks: pyvfio.RamBlockList) -> None:
    """a device that only reads; pages allocated beforehand"""
    blocks.add("firmware", used_length=pyvfio.MIB, max_length=pyvfio.MIB, readonly=True)
    blocks.add("ring", used_length=pyvfio.MIB, max_length=pyvfio.GIB, prealloc=4)


def lock() -> None:
    """no memory swapped out, now or later"""
    pyvfio.lock_all_memory()
    pyvfio.unlock_all_memory()


def plan(mapper: pyvfio.DmaMapper, used_length: int, max_length: int) -> None:
    """to know beforehand whether blocks fit"""
    print(mapper.plan([pyvfio.BlockShape("next", used_length, max_length)]))


def prefault(container: pyvfio.Container, blocks: pyvfio.RamBlockList) -> pyvfio.DmaMapper:
    """long work faster, and with progress shown"""

    def tell(progress: pyvfio.Progress) -> None:
        print(progress.block.idstr, progress.step, progress.done, progress.total, file=sys.stderr)

    return pyvfio.DmaMapper(container, blocks, prefault=4, progress=tell)


def track(device: pyvfio.Device, iova: pyvfio.Iova, size: int) -> None:
    """the pages that a device may have written"""
    with pyvfio.DirtyTracking(device.space) as tracking:
        print(tracking.read(iova=iova, size=size))


def copy_again(
    blocks: pyvfio.RamBlockList, block: pyvfio.RamBlock, tracking: pyvfio.DirtyTracking, mapper: pyvfio.DmaMapper
) -> list[tuple[int, int]]:
    """the parts of a block that must be copied again"""
    log = pyvfio.DirtyLog(blocks)
    log.mark(block, 0, pyvfio.PAGE_SIZE)
    log.collect(block, tracking, mapper)
    found = log.snapshot(block, clear=True)
    return [(start, end) for start, end in found.dirty]


def replace_process(mapper: pyvfio.DmaMapper) -> pyvfio.TakenOver:
    """to replace the process while the device works"""
    with pyvfio.hand_over(mapper) as update:
        return pyvfio.take_over(update.state, update.fds)


def give_back(blocks: pyvfio.RamBlockList, block: pyvfio.RamBlock, offset: int, size: int) -> None:
    """to return part of a block for a while"""
    block.discard(offset, size)
    block.populate(offset, size)
    with blocks.discards.disable():
        pass


def renew(block: pyvfio.RamBlock, offset: int, size: int) -> None:
    """fresh pages in place of failed memory"""
    block.remap(offset, size)


def use_the_kernel(container: pyvfio.Container, vaddr: pyvfio.Vaddr, iova: pyvfio.Iova) -> bool:
    """the kernel's own interface"""
    container.map_dma(vaddr=vaddr, iova=iova, size=pyvfio.PAGE_SIZE, flags=pyvfio.ioctls.VFIO_DMA_MAP_FLAG_READ)
    container.unmap_dma(iova=iova, size=pyvfio.PAGE_SIZE)
    container.unmap_all()
    return container.get_info().iova_pgsizes & pyvfio.PAGE_SIZE != 0


def use_the_modules(kernel: pyvfio.Kernel, bdf: str) -> str:
    """Read the modules that `import pyvfio` alone hands on; no row of the table."""
    found: pyvfio.pci.PciDevice = pyvfio.pci.read_device(bdf, kernel=kernel)
    with pyvfio.testing.FakeKernel() as fake:
        fake.check()
    return found.bdf
