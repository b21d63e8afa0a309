"""Virtual addresses of mappings: one process gives them up, another sets them; IOMMU and pages stay unchanged."""

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
    """Remove the virtual address of a mapping. A mapping without an address is no error. Raises IoctlError."""
    try:
        container.unmap_dma(iova=mapping.iova, size=mapping.size, flags=_UNMAP_VADDR)
    except IoctlError as error:
        if error.errno != errno.EINVAL:
            raise


def set_vaddr(container: Container, mapping: Mapping) -> None:
    """Set the virtual address of a mapping, in this process. Raises IoctlError, PinLimitError.

    From now on, the memory is charged to this process.
    """
    container.map_dma(vaddr=mapping.vaddr, iova=mapping.iova, size=mapping.size, flags=_MAP_VADDR)


def explain_limit(error: PinLimitError, container: Container, *, size: int, locked: int) -> PinLimitError:
    """Return the error for a change that charges `size` bytes to this process, instead of the error for one mapping.

    `locked`: how many of the bytes are charged to this process already.
    """
    if error.limit is None:
        return error
    kernel = container.kernel
    with suppress(OSError):  # /proc cannot be read if no file descriptor is left
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
    """Return the `failures` of a change that charges all mappings to this process, with one PinLimitError for all."""
    limits = [each for each in failures if isinstance(each, PinLimitError) and each.limit is not None]
    if not limits:
        return list(failures)
    size = container.table.mapped
    refused = sum(each.asked for each in limits)
    whole = explain_limit(limits[-1], container, size=size, locked=size - refused)
    return [whole, *(each for each in failures if each not in limits)]


def give_up_all(container: Container) -> None:
    """Remove the virtual addresses of all mappings. Raises IoctlError; HandOverError if the kernel knows of others."""
    expected = sum(mapping.size for mapping in container.table)
    if container.check_extension(ioctls.VFIO_UNMAP_ALL):
        given_up = container.unmap_dma(iova=0, size=0, flags=_UNMAP_VADDR | _UNMAP_ALL)
    else:
        given_up = sum(
            container.unmap_dma(iova=mapping.iova, size=mapping.size, flags=_UNMAP_VADDR) for mapping in container.table
        )
    if given_up != expected:
        raise HandOverError(
            f"{format_size(expected)} are known to be mapped, but the kernel has {format_size(given_up)}",
            hint="Another user of the same container maps or unmaps: let that user finish first",
        )
