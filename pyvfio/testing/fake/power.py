"""Whether a device of a fake kernel may be suspended, and what wakes it up.

Source: `vfio_pci_core_pm_entry`, `vfio_pci_core_pm_entry_with_wakeup`, `vfio_pci_core_pm_exit` and
`vfio_pci_core_runtime_resume` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import errno
import os

from pyvfio.testing.fake.process import refuse


class Power:
    """Low power of one device. The fake suspends it at once, where a kernel takes some milliseconds."""

    def __init__(self) -> None:
        self.low = False
        self._wake: int | None = None

    def enter(self, wake: int | None = None) -> None:
        """Enter low power; EINVAL where the device is there. `wake`: an eventfd of its own, which it closes."""
        if self.low:
            if wake is not None:
                os.close(wake)
            refuse(errno.EINVAL)
        self.low, self._wake = True, wake

    def leave(self) -> None:
        """Leave low power; nothing outside of it."""
        self.low = False
        if self._wake is not None:
            os.close(self._wake)
            self._wake = None

    def resume(self) -> None:
        """The device is woken up by an access: where somebody wants to know, low power is over."""
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)
            self.leave()

    def check_touch(self, what: str) -> None:
        """AssertionError where a load or store on a mapping of a BAR comes in low power."""
        if self.low:
            raise AssertionError(f"{what} was touched in low power: SIGBUS on a kernel")
