"""Checks of arguments that many calls share."""

from __future__ import annotations

from pyvfio.kernel import Kernel, LinuxKernel


def checked_kernel(kernel: Kernel | None) -> Kernel:
    """Return the kernel of an argument `kernel=`, and the running kernel for None. Raises TypeError for another object.

    A version, and the class FakeKernel without parentheses, are likely slips.
    """
    if kernel is None:
        return LinuxKernel()
    if isinstance(kernel, type) or not hasattr(kernel, "ioctl"):
        raise TypeError(f"kernel must be a Kernel, such as FakeKernel(), or None for the running one, not {kernel!r}")
    return kernel
