"""Addresses of mappings, which one process gives up and another sets; the IOMMU and the pages stay as they are."""

from __future__ import annotations

import errno

from pyvfio import ioctls
from pyvfio.container import Container
from pyvfio.errors import HandOverError, IoctlError
from pyvfio.iommu.space import Mapping
from pyvfio.units import format_size

_UNMAP_VADDR = int(ioctls.VFIO_DMA_UNMAP_FLAG_VADDR)
_UNMAP_ALL = int(ioctls.VFIO_DMA_UNMAP_FLAG_ALL)
_MAP_VADDR = int(ioctls.VFIO_DMA_MAP_FLAG_VADDR)


def give_up_vaddr(container: Container, mapping: Mapping) -> None:
    """It has no address any more, or had none. IoctlError."""
    try:
        container.unmap_dma(iova=mapping.iova, size=mapping.size, flags=_UNMAP_VADDR)
    except IoctlError as error:
        if error.errno != errno.EINVAL:
            raise


def set_vaddr(container: Container, mapping: Mapping) -> None:
    """It has that address, in this process, which is charged for it from now on. IoctlError, PinLimitError."""
    container.map_dma(vaddr=mapping.vaddr, iova=mapping.iova, size=mapping.size, flags=_MAP_VADDR)


def give_up_all(container: Container) -> None:
    """No mapping has an address any more. IoctlError; HandOverError where others are mapped than are known here."""
    expected = sum(mapping.size for mapping in container.table)
    if container.check_extension(ioctls.VFIO_UNMAP_ALL):
        given_up = container.unmap_dma(iova=0, size=0, flags=_UNMAP_VADDR | _UNMAP_ALL)
    else:
        given_up = sum(
            container.unmap_dma(iova=mapping.iova, size=mapping.size, flags=_UNMAP_VADDR) for mapping in container.table
        )
    if given_up != expected:
        raise HandOverError(
            f"{format_size(expected)} are known to be mapped, and the kernel has {format_size(given_up)}",
            hint="Somebody else maps through the same container",
        )
