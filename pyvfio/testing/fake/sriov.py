"""Virtual functions of devices of a fake kernel, and the token that opening a virtual function requires.

Source: `vfio_pci_core_match`, `vfio_pci_validate_vf_token` and `vfio_pci_core_feature_token` in
drivers/vfio/pci/vfio_pci_core.c; `uuid_parse` in lib/uuid.c.
"""

from __future__ import annotations

import errno
import re
from typing import Protocol

from pyvfio.testing.fake.device import PciDevice, is_vfio_driver
from pyvfio.testing.fake.process import refuse

_OPTION = "vf_token="
_TOKEN_LENGTH = 36  # UUID_STRING_LEN
_TOKEN = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


class Functions(Protocol):
    """All devices of the machine."""

    def device_at(self, bdf: str) -> PciDevice | None:
        """Return the device at an address, or None."""
        ...

    def virtual_functions(self, bdf: str) -> list[PciDevice]:
        """Return the virtual functions of a physical function."""
        ...


def parse_options(text: str) -> bytes | None:
    """Return the token in the text behind the name of a device, or None. EINVAL for other text, and for two tokens."""
    token: bytes | None = None
    while text := text.lstrip(" "):
        if token is not None or not text.startswith(_OPTION):
            refuse(errno.EINVAL)
        word, text = text[len(_OPTION) :][:_TOKEN_LENGTH], text[len(_OPTION) + _TOKEN_LENGTH :]
        if not _TOKEN.fullmatch(word):
            refuse(errno.EINVAL)
        token = bytes.fromhex(word.replace("-", ""))
    return token


def check_token(device: PciDevice, token: bytes | None, functions: Functions) -> None:
    """Check the token for opening a device. EINVAL for an unexpected token, EACCES for a missing or wrong token.

    A physical function whose virtual functions are not open takes the token as the new one.
    """
    if device.declared.pf is not None:
        _check_virtual(functions.device_at(device.declared.pf), token)
    elif device.vf_token is not None:
        used = any(each.descriptors for each in functions.virtual_functions(device.bdf))
        if used and token != device.vf_token:
            refuse(errno.EACCES)
        if token is not None:
            device.vf_token = token
    elif token is not None:
        refuse(errno.EINVAL)


def _check_virtual(physical: PciDevice | None, token: bytes | None) -> None:
    if physical is None or not is_vfio_driver(physical.driver):
        if token is not None:
            refuse(errno.EINVAL)
    elif token is None or token != physical.vf_token:
        refuse(errno.EACCES)
