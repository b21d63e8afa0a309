"""Addresses of mappings, which one process gives up and another sets; the IOMMU and the pages stay as they are."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from pyvfio import ioctls
from pyvfio.container import Container
from pyvfio.errors import HandOverError, IoctlError, PinLimitError
from pyvfio.iommu.space import Mapping
from pyvfio.memory.locking import limit_error
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


def explain_limit(error: PinLimitError, container: Container, *, size: int, locked: int) -> PinLimitError:
    """Return the error for a change that has `size` bytes charged to this process, in place of that for one mapping.
    This process is charged for `locked` of them already."""
    if error.limit is None:
        return error
    kernel = container.kernel
    with suppress(OSError):  # no descriptor is left to read /proc with
        now = kernel.memlock()
        return limit_error(
            error,
            replace(now, limit=error.limit, used=max(0, now.used - locked)),
            size,
            kernel=kernel,
            request=error.request,
            arguments=error.arguments,
            mapped=0,
        )
    return error


def join_limits(failures: Sequence[Exception], container: Container) -> list[Exception]:
    """Return `failures` of a change that has all mappings charged to this process, with one PinLimitError for all."""
    limits = [each for each in failures if isinstance(each, PinLimitError) and each.limit is not None]
    if not limits:
        return list(failures)
    size = container.table.mapped
    refused = sum(each.asked for each in limits)
    whole = explain_limit(limits[-1], container, size=size, locked=size - refused)
    return [whole, *(each for each in failures if each not in limits)]


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
