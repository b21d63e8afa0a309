"""The errors of an attach that the kernel refused with EADDRINUSE.

The kernel returns EADDRINUSE for two reasons, which need different steps of the program:

* A mapping, or a range of IOMMU_IOAS_ALLOW_IOVAS, lies where the device needs IOVA of its own, or where the IOMMU has
  none. Source: `iopt_table_enforce_dev_resv_regions`, `iopt_table_add_domain`.
* The driver of the IOMMU completes a page table when a device is attached to the table. To move a device, iommufd maps
  the memory in the new page table before the attach. The table then has IOVA 0 alone, and refuses each mapping. Source:
  `viommu_domain_finalise` of Linux 6.12, `immediate_attach` in `iommufd_device_auto_get_domain`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyvfio.errors import IoctlError, UnsupportedError, VfioError
from pyvfio.iommu.space import Mapping
from pyvfio.iommu.table import MappingTable, describe_mappings
from pyvfio.units import IovaRange

_KNOWN = "virtio-iommu before Linux 7 is such an IOMMU"
_OVERLAP = "lies in IOVA that the device or the IOMMU reserves, such as the MSI window, or outside of the IOMMU's range"
_INSTEAD = (
    "To cut mappings, use Ioas(cut='pages'). To move a device, detach() the device before attach(): DMA is stopped in "
    "between. Another IOMMU or a newer kernel has no such limit"
)


def cannot_move(device: str, space: str) -> UnsupportedError:
    """Return the error for a device behind an IOMMU that completes a page table only by the attach of a device."""
    return UnsupportedError(
        f"{device} cannot move to {space}: the IOMMU completes a page table when a device without one is attached, and "
        f"a device that moves has one. {_KNOWN}",
        hint=_INSTEAD,
    )


def explain_in_use(
    error: IoctlError,
    *,
    device: str,
    space: str,
    table: MappingTable,
    offered: Sequence[IovaRange] | None,
    moves: bool | None,
) -> VfioError:
    """Return the error for EADDRINUSE.

    `offered`: the ranges that the device has in the present space; None: the device is attached to no space.
    `moves`: whether a device behind the IOMMU can move; None: not known.
    """
    if offered is None:
        return _said(error, error.message, f"A mapping of {space} {_OVERLAP}: unmap that mapping first")
    if moves is False:
        return cannot_move(device, space)
    outside = _outside(table, offered)
    if outside:
        message = f"{device} cannot move to {space}: IOVA {describe_mappings(outside)} {_OVERLAP}"
        return _said(error, message, "Unmap that memory, or map the memory at another IOVA")
    if moves:
        return _said(
            error,
            f"{device} cannot move to {space}: a mapping that this process does not know, or an allowed range, "
            f"{_OVERLAP}",
            "The allowed ranges are those of ioas_allow_iovas()",
        )
    return _said(
        error,
        f"{device} cannot move to {space}: {error.strerror}",
        f"Either memory that another process mapped {_OVERLAP}: unmap that memory. Or the IOMMU cannot move a device; "
        f"{_KNOWN}. {_INSTEAD}",
    )


def _outside(table: MappingTable, offered: Sequence[IovaRange]) -> list[Mapping]:
    return [mapping for mapping in table if not any(each.contains(mapping.range) for each in offered)]


def _said(error: IoctlError, message: str, hint: str) -> IoctlError:
    return IoctlError.of(error, message, request=error.request, arguments=error.arguments, hint=hint)
