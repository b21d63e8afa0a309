"""Fake kernels with something particular about them, and all that hangs together on one: a device, blocks, a mapper."""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self, TypeVar

import pyvfio
from pyvfio import ioctls
from pyvfio.extents import Extent, without
from pyvfio.iommufd_ioctls import IOMMU_IOAS_UNMAP
from pyvfio.kernel import MAP_FIXED, IoctlArgument, LinuxKernel
from pyvfio.memory import MemoryKind
from pyvfio.pci import boot
from pyvfio.testing.fake import Call, FakeDevice, FakeKernel, IommuModel
from pyvfio.units import MIB, PAGE_SIZE, Vaddr
from tests.unit.processes import open_fds

BDF = "0000:00:02.0"
OTHER_BDF = "0000:00:03.0"
PRIVATE = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
READ_WRITE = 3

MapperFactory = Callable[[pyvfio.Container, pyvfio.RamBlockList], pyvfio.DmaMapper]
_Answer = TypeVar("_Answer")


@contextmanager
def nothing_left(kernel: FakeKernel) -> Iterator[None]:
    """At the end no descriptor is open that was not at the beginning, nothing is mapped, no memory went too early."""
    before = open_fds()
    yield
    assert open_fds() == before
    assert kernel.descriptors == ()
    assert kernel.mappings() == ()
    assert kernel.memlock().used + kernel.pinned == 0
    kernel.check()


class Interrupt(BaseException):
    """What a signal handler raises; like KeyboardInterrupt no Exception."""


class PlacedKernel(FakeKernel):
    """A fake kernel whose procfs, once `own_proc` is set, says where the program runs: see `sysfs.place_process`."""

    own_proc: Path | None = None

    @property
    def proc(self) -> Path:
        """The machine's own unless it is set."""
        return self.own_proc or super().proc

    @property
    def release(self) -> str:
        """As `own_proc` says."""
        return super().release if self.own_proc is None else boot.release(LinuxKernel(proc=self.own_proc))

    @property
    def build_options(self) -> Mapping[str, str]:
        """As `own_proc` says."""
        return super().build_options if self.own_proc is None else boot.build_options(LinuxKernel(proc=self.own_proc))


def interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a signal by raising."""
    raise Interrupt


class SpecialKernel(PlacedKernel):
    """A fake kernel whose answers can be changed, and in which a signal can arrive.

    `answers`: what an ioctl returns, by its name in C, without being made. `top`: the last IOVA that the IOMMU offers,
    from now on. `interrupt_at`: before or after that call from now, of those that are INTERRUPTIBLE, a signal arrives
    whose handler raises Interrupt. `fall_short_at`: that unmap from now takes nothing away and says so. `areas`: the
    address space that has been asked for and not been given back since, as extents of vaddr.
    """

    INTERRUPTIBLE = ("ioctl", "mmap", "mprotect", "madvise", "munmap", "ftruncate", "fallocate")

    def __init__(
        self,
        version: str = "6.12",
        *,
        groups: Sequence[tuple[int, Sequence[FakeDevice]]] | None = None,
        iommu: IommuModel | str = "intel",
        iommufd: bool = False,
        type1: bool = True,
    ) -> None:
        super().__init__(version, groups=groups, iommu=iommu, iommufd=iommufd, type1=type1)
        self.answers: dict[str, int] = {}
        self.top: int | None = None
        self.areas: list[Extent] = []
        self._due = 0
        self._after = False
        self._short = 0

    def fall_short_at(self, nth: int) -> None:
        """An unmap succeeds then, with a size of 0; 0: at none."""
        self._short = nth

    def interrupt_at(self, nth: int, *, after: bool) -> None:
        """Have a signal arrive at that call whose handler raises; 0: at none."""
        signal.signal(signal.SIGUSR1, interrupt)
        self._due, self._after = nth, after

    def _interrupted(self, action: Callable[[], _Answer]) -> _Answer:
        self._due -= 1
        if self._due == 0 and not self._after:
            signal.raise_signal(signal.SIGUSR1)
        answer = action()
        if self._due == 0 and self._after:
            signal.raise_signal(signal.SIGUSR1)
        return answer

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """As told by `answers`, `top` and `interrupt_at`."""
        for name, answer in self.answers.items():
            if request == vars(ioctls)[name]:
                return answer
        if request in {ioctls.VFIO_IOMMU_UNMAP_DMA, IOMMU_IOAS_UNMAP}:
            self._short -= 1
            if self._short == 0 and not isinstance(argument, int):
                struct.pack_into("=Q", argument, 16, 0)  # the size, or the length
                return 0
        result = self._interrupted(lambda: FakeKernel.ioctl(self, fd, request, argument))
        if self.top is not None and self.trace[-1].request == "VFIO_IOMMU_GET_INFO" and isinstance(argument, bytearray):
            self._lower_the_top(argument, self.top)
        return result

    @staticmethod
    def _lower_the_top(answer: bytearray, top: int) -> None:
        (offset,) = struct.unpack_from("=I", answer, 16)
        while offset:
            identity, _version, following = struct.unpack_from("=HHI", answer, offset)
            if identity == ioctls.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                (count,) = struct.unpack_from("=I", answer, offset + 8)
                struct.pack_into("=Q", answer, offset + 16 * count + 8, top)
            offset = following

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """As told by `interrupt_at`."""
        got = self._interrupted(lambda: FakeKernel.mmap(self, vaddr, size, protection, flags, fd=fd, offset=offset))
        if not flags & MAP_FIXED and fd < 0:
            self.areas = sorted([*self.areas, Extent(got, got + size)])
        return got

    def mprotect(self, vaddr: int, size: int, protection: int) -> None:
        """As told by `interrupt_at`."""
        self._interrupted(lambda: FakeKernel.mprotect(self, vaddr, size, protection))

    def ftruncate(self, fd: int, size: int) -> None:
        """As told by `interrupt_at`."""
        self._interrupted(lambda: FakeKernel.ftruncate(self, fd, size))

    def fallocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        """As told by `interrupt_at`."""
        self._interrupted(lambda: FakeKernel.fallocate(self, fd, mode, offset, size))

    def allocate(self, fd: int, offset: int, size: int) -> None:
        """As told by `interrupt_at`."""
        self._interrupted(lambda: FakeKernel.allocate(self, fd, offset, size))

    def madvise(self, vaddr: int, size: int, advice: int) -> None:
        """As told by `interrupt_at`."""
        self._interrupted(lambda: FakeKernel.madvise(self, vaddr, size, advice))

    def munmap(self, vaddr: int, size: int) -> None:
        """As told by `interrupt_at`."""
        self._interrupted(lambda: self._give_back(vaddr, size))

    def _give_back(self, vaddr: int, size: int) -> None:
        FakeKernel.munmap(self, vaddr, size)
        self.areas = without(self.areas, Extent(vaddr, vaddr + size))


class Rig:
    """A device, in an address space of its own unless one is given, a list of blocks, a mapper that follows it."""

    def __init__(
        self,
        kernel: FakeKernel,
        *,
        mapper: MapperFactory = pyvfio.DmaMapper,
        container: pyvfio.Container | pyvfio.Ioas | None = None,
        space: pyvfio.Ioas | None = None,
        iommu_type: ioctls.VfioExtension | None = None,
        memory: MemoryKind | None = None,
    ) -> None:
        self.kernel = kernel
        self.memory_kind = memory
        self.device = pyvfio.open_device(BDF, space=space or container, kernel=kernel, iommu_type=iommu_type)
        self.space = self.device.space
        self.blocks = pyvfio.RamBlockList(kernel=kernel)
        self.mapper = mapper(self.space, self.blocks)  # type: ignore[arg-type]  # most factories are for containers

    @property
    def container(self) -> pyvfio.Container:
        """The space, for a test of type1 alone."""
        assert isinstance(self.space, pyvfio.Container)
        return self.space

    @property
    def group(self) -> pyvfio.Group:
        """That of the device, for a test of type1 alone."""
        return self.device.group

    def add(self, idstr: str = "ring", *, used: int = 2 * PAGE_SIZE, maximum: int = MIB) -> pyvfio.RamBlock:
        """A block."""
        return self.blocks.add(idstr, used_length=used, max_length=maximum, memory=self.memory_kind)

    def reached(self) -> list[tuple[int, int, int]]:
        """What the device reaches: iova, vaddr and size of each mapping that the kernel has."""
        return [(mapping.iova, mapping.vaddr, mapping.size) for mapping in self.kernel.mappings(BDF)]

    def expected(self) -> list[tuple[int, int, int]]:
        """What it is to reach of the blocks: all that is in use, where the mapper says that it is."""
        followed = self.blocks if self.mapper.blocks is not None else ()
        return sorted(
            (self.mapper.iova(block) + part.start, block.vaddr + part.start, part.size)
            for block in followed
            for part in block.populated
        )

    def memory(self, size: int = PAGE_SIZE) -> int:
        """New memory of the caller's own, by its address; `free` gives it back."""
        return self.kernel.mmap(0, size, READ_WRITE, PRIVATE)

    def free(self, vaddr: int, size: int = PAGE_SIZE) -> None:
        """Give it back."""
        self.kernel.munmap(vaddr, size)

    def check(self) -> None:
        """All that is meant to hold always."""
        self.kernel.check()
        self.mapper._check()
        self.blocks._check()
        self.space._check()

    def close(self) -> None:
        """Everything; twice is fine."""
        self.device.close()
        self.mapper.close()
        self.blocks.close()
        if self.device.iommufd is not None:  # the caller has made the space
            self.device.iommufd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def requests(trace: Sequence[Call]) -> list[str]:
    """The calls by name: an ioctl's in C, else the method's."""
    return [call.request or call.call for call in trace]


def small_iommu(entries: int) -> IommuModel:
    """An IOMMU whose containers hold `entries` mappings."""
    return IommuModel((pyvfio.IovaRange(pyvfio.Iova(0), pyvfio.Iova((1 << 39) - 1)),), dma_entry_limit=entries)


def proc_maps_has(vaddr: int) -> bool:
    """Whether this process has memory there."""
    for line in Path("/proc/self/maps").read_bytes().split(b"\n")[:-1]:
        start, end = (int(part, 16) for part in line.split()[0].split(b"-"))
        if start <= vaddr < end:
            return True
    return False
