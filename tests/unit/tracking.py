"""Kernels and rigs for dirty tracking, of both kinds of address space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pyvfio
from pyvfio import ioctls
from pyvfio import iommufd_ioctls as abi
from pyvfio.kernel import IoctlArgument
from pyvfio.testing.fake import FakeDevice, IommuModel
from tests.unit.fakes import BDF, OTHER_BDF, MapperFactory, Rig, SpecialKernel

Kind = Literal["type1", "iommufd"]
KINDS: tuple[Kind, ...] = ("type1", "iommufd")
READS: dict[Kind, str] = {"type1": "VFIO_IOMMU_DIRTY_PAGES", "iommufd": "IOMMU_HWPT_GET_DIRTY_BITMAP"}
UNMAPS: dict[Kind, str] = {"type1": "VFIO_IOMMU_UNMAP_DMA", "iommufd": "IOMMU_IOAS_UNMAP"}

_IOMMU = IommuModel(
    (pyvfio.IovaRange(pyvfio.Iova(0), pyvfio.Iova((1 << 39) - 1)),), dirty_tracking=True, dma_entry_limit=65535
)
_NUMBERS = {**vars(ioctls), **vars(abi)}


class BusyKernel(SpecialKernel):
    """A kernel whose IOMMU records writes, and in which a device can do something just before a call.

    `before`: by the name of an ioctl in C, what happens each time before it.
    """

    def __init__(self, *, iommufd: bool) -> None:
        groups = [(2, [FakeDevice(BDF)]), (3, [FakeDevice(OTHER_BDF)])]
        super().__init__("7.3", groups=groups, iommu=_IOMMU, iommufd=iommufd)
        self.before: dict[str, Callable[[], object]] = {}

    def ioctl(self, fd: int, request: int, argument: IoctlArgument = 0) -> int:
        """As the fake's, after what happens before it."""
        for name, happens in self.before.items():
            if request == _NUMBERS[name]:
                happens()
        return super().ioctl(fd, request, argument)


def tracked_kernel(kind: Kind) -> BusyKernel:
    """With two devices, in two groups."""
    return BusyKernel(iommufd=kind == "iommufd")


def tracked_rig(
    kernel: SpecialKernel,
    kind: Kind,
    *,
    cut: Literal["pages", "replace"] | None = None,
    mapper: MapperFactory = pyvfio.DmaMapper,
) -> Rig:
    """A rig on an address space of that kind."""
    if kind == "type1":
        return Rig(kernel, mapper=mapper)
    return Rig(kernel, mapper=mapper, space=pyvfio.Ioas(kernel=kernel, cut=cut))
