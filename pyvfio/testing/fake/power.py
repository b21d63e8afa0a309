"""The low-power state of a device of a fake kernel, and the accesses that end the state.

Source: `vfio_pci_core_pm_entry`, `vfio_pci_core_pm_entry_with_wakeup`, `vfio_pci_core_pm_exit` and
`vfio_pci_core_runtime_resume` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

import errno
import os

from pyvfio.testing.fake.process import refuse


class Power:
    """Low power of one device. The fake suspends the device at once; a kernel takes some milliseconds."""

    def __init__(self) -> None:
        self.low = False
        self._wake: int | None = None

    def enter(self, wake: int | None = None) -> None:
        """Enter low power. EINVAL in low power. `wake`: an eventfd to signal at the wake-up, owned by this object."""
        if self.low:
            if wake is not None:
                os.close(wake)
            refuse(errno.EINVAL)
        self.low, self._wake = True, wake

    def leave(self) -> None:
        """Leave low power, if the device is in low power."""
        self.low = False
        if self._wake is not None:
            os.close(self._wake)
            self._wake = None

    def resume(self) -> None:
        """Resume the device for an access. If an eventfd waits for the wake-up, low power ends."""
        if self._wake is not None:
            os.eventfd_write(self._wake, 1)
            self.leave()

    def check_touch(self, what: str) -> None:
        """Raise AssertionError for a load or store on a mapped BAR in low power."""
        if self.low:
            raise AssertionError(f"{what} was accessed in low power, which is SIGBUS on a kernel")
