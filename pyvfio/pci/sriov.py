"""Virtual functions of SR-IOV: the physical function, and the token that physical and virtual function share.

Source: Documentation/PCI/pci-iov-howto.rst; `vfio_pci_validate_vf_token` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyvfio.arguments import checked_kernel
from pyvfio.errors import VfioError
from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import NO_SYSFS, device_path, parse_bdf

if TYPE_CHECKING:
    import uuid


def parse_vf_token(token: uuid.UUID | str) -> uuid.UUID:
    """Return a VF token as a UUID.

    Raises: ValueError if the text is not a UUID; TypeError if `token` is neither a UUID nor a string.
    """
    import uuid  # noqa: PLC0415 (few devices have a token, and `uuid` imports `platform`)

    if isinstance(token, uuid.UUID):
        return token
    if not isinstance(token, str):
        raise TypeError(f"a VF token is a uuid.UUID or its text, not {type(token).__name__}")
    try:
        return uuid.UUID(token)
    except ValueError as error:
        raise ValueError(f"a VF token is a UUID such as {uuid.UUID(int=0)}, not {token!r}") from error


def physical_function(bdf: str, *, kernel: Kernel | None = None) -> str | None:
    """Return the address of the physical function of the virtual function `bdf`; None for any other device.

    Raises: ValueError if `bdf` is not a PCI address; TypeError if `bdf` is not a string; VfioError if the link in sysfs
    names no PCI address.
    Synchronization: any thread. Cost: one link.
    """
    link = device_path(checked_kernel(kernel), parse_bdf(bdf)) / "physfn"
    if not link.is_symlink():
        return None
    name = link.resolve().name
    try:
        return parse_bdf(name)
    except ValueError as error:
        raise VfioError(f"{link} names {name!r}, which is not a PCI address", hint=NO_SYSFS) from error


def is_physical_function(bdf: str, *, kernel: Kernel | None = None) -> bool:
    """Return whether the device has SR-IOV.

    Raises: ValueError if `bdf` is not a PCI address; TypeError if `bdf` is not a string.
    Synchronization: any thread. Cost: one file.
    """
    return (device_path(checked_kernel(kernel), parse_bdf(bdf)) / "sriov_totalvfs").is_file()
