"""Virtual functions of SR-IOV: the physical function of one, and the token that both share.

Source: Documentation/PCI/pci-iov-howto.rst; `vfio_pci_validate_vf_token` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import uuid

from pyvfio.kernel import Kernel
from pyvfio.pci.sysfs import device_path, parse_bdf


def parse_vf_token(token: uuid.UUID | str) -> uuid.UUID:
    """Return a VF token as a UUID.

    Raises ValueError for text that is no UUID, TypeError for anything else.
    """
    if isinstance(token, uuid.UUID):
        return token
    if not isinstance(token, str):
        raise TypeError(f"a VF token is a uuid.UUID or its text, not {type(token).__name__}")
    try:
        return uuid.UUID(token)
    except ValueError as error:
        raise ValueError(f"a VF token is a UUID such as {uuid.UUID(int=0)}, not {token!r}") from error


def physical_function(kernel: Kernel, bdf: str) -> str | None:
    """Return the address of the physical function that `bdf` is a virtual function of; None for any other device.

    Raises ValueError for text that is no PCI address, TypeError for anything else.
    """
    link = device_path(kernel, parse_bdf(bdf)) / "physfn"
    return link.resolve().name if link.is_symlink() else None


def is_physical_function(kernel: Kernel, bdf: str) -> bool:
    """Return whether the device has SR-IOV.

    Raises ValueError for text that is no PCI address, TypeError for anything else.
    """
    return (device_path(kernel, parse_bdf(bdf)) / "sriov_totalvfs").is_file()
