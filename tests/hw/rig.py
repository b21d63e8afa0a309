"""What the tests on a device share: the whole set-up in one object, and what this process has open."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Self

import pytest

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.kernel import Kernel
from pyvfio.memory import MemoryKind
from pyvfio.testing import probe
from pyvfio.testing.edu import EDU_ID, LIMIT, Edu
from pyvfio.units import PAGE_SIZE
from tests.spaces import AddressSpace, Cut, moves_devices, new_space

SIZE = LIMIT


def has_engine(device: pci.PciDevice) -> bool:
    """Whether it is a device whose DMA engine the tests can drive."""
    return (device.vendor, device.device) == EDU_ID


def pattern() -> bytes:
    """`SIZE` bytes that no other call has returned."""
    return probe.pattern(SIZE)


class Rig:
    """A device, blocks, a mapper that follows them, and a page through which the device's buffer can be looked at."""

    def __init__(
        self,
        bdf: str,
        *,
        kernel: Kernel,
        space: AddressSpace | None = None,
        cut: Cut = None,
        iommu_type: ioctls.VfioExtension | None = None,
        place: int | None = None,
        resize: Literal["remap", "extend", "cut"] = "remap",
        granule: int | None = None,
        memory: MemoryKind | None = None,
        dma_bits: int | None = None,
        policy_of: Callable[[pyvfio.RamBlock | pyvfio.BlockShape], pyvfio.Policy | None] | None = None,
    ) -> None:
        with ExitStack() as stack:
            if cut is not None:
                space = new_space(kernel, cut)
                stack.enter_context(space)
            self.device = stack.enter_context(
                pyvfio.open_device(bdf, kernel=kernel, space=space, iommu_type=iommu_type)
            )
            self.device.memory_enabled = True
            self.device.bus_master = True
            self.engine = Edu(self.device.region(ioctls.VFIO_PCI_BAR0_REGION_INDEX))
            self.space = self.device.space
            self.blocks = stack.enter_context(pyvfio.RamBlockList(kernel=kernel))
            self.mapper = stack.enter_context(
                pyvfio.DmaMapper(
                    self.space,
                    self.blocks,
                    resize=resize,
                    granule=granule,
                    place=lambda block: place if block.idstr != "desk" else None,
                    dma_bits=dma_bits,
                    policy_of=policy_of,
                )
            )
            room = granule or PAGE_SIZE
            desk = self.blocks.add("desk", used_length=room, max_length=room, memory=memory)
            self._probe = probe.DmaProbe(self.engine, desk=desk, iova=self.mapper.iova(desk))
            self._stack = stack.pop_all()

    @property
    def container(self) -> pyvfio.Container:
        """The container of the device, for a test of type1 alone."""
        return self.device.container

    def device_reads(self, iova: int, size: int = SIZE) -> bytes | None:
        """What the device gets when it reads `size` bytes at `iova`; None when it is stopped."""
        return self._probe.read(iova, size)

    def device_writes(self, iova: int, data: bytes) -> None:
        """Have the device write `data` at `iova`, whether or not it is stopped."""
        self._probe.write(iova, data)

    def reaches(self, block: pyvfio.RamBlock, offset: int) -> bool:
        """Whether the device reads and writes `SIZE` bytes at `offset` of `block`, in use: both, or neither."""
        iova, there, sent = self.mapper.iova(block) + offset, pattern(), pattern()
        with block.view() as view:
            view[offset : offset + SIZE] = there
        read = self.device_reads(iova) == there
        self.device_writes(iova, sent)
        with block.view() as view:
            written = bytes(view[offset : offset + SIZE])
        assert written in (there, sent)
        assert read == (written == sent), "the device could do one of reading and writing, but not the other"
        return read

    def refuses(self, block: pyvfio.RamBlock, change: Callable[[], object]) -> None:
        """Where a space cannot cut (`can_replace`): a cut is refused, and leaves block, mappings and reach."""
        before = (block.used_length, block.populated, self.space.mappings)
        with pytest.raises(pyvfio.UnsupportedError, match=r"Ioas\(cut='pages'\)"):
            change()
        assert (block.used_length, block.populated, self.space.mappings) == before
        self.mapper._check()
        if not block.readonly:
            assert self.reaches(block, block.used_length - SIZE)

    def move(self, space: pyvfio.Ioas) -> None:
        """Attach the device to another space; where the IOMMU moves no device, by a detach, and a refusal before."""
        before = self.device.space
        try:
            self.device.attach(space)
        except pyvfio.UnsupportedError:
            assert self.device.space is before
            assert isinstance(before, pyvfio.Ioas)
            assert not moves_devices(before)
            self.device.detach()
            self.device.attach(space)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
