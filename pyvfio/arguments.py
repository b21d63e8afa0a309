"""Checks of arguments that many calls share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from pyvfio.kernel import Kernel, LinuxKernel

_Item = TypeVar("_Item")


def checked_items(items: Iterable[_Item], what: str) -> list[_Item]:
    """Return the items of an argument that takes several. Raises TypeError, which names the argument as `what`."""
    if not isinstance(items, Iterable):
        raise TypeError(f"{what} must be a list or another iterable, not {type(items).__name__}")
    return list(items)


def checked_kernel(kernel: Kernel | None) -> Kernel:
    """Return the kernel of an argument `kernel=`, and the running kernel for None. Raises TypeError for another object.

    A version, and the class FakeKernel without parentheses, are likely slips.
    """
    if kernel is None:
        return LinuxKernel()
    if isinstance(kernel, type) or not hasattr(kernel, "ioctl"):
        raise TypeError(f"kernel must be a Kernel, such as FakeKernel(), or None for the running one, not {kernel!r}")
    return kernel
