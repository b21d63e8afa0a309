"""The register windows of a device, and the one lock under which windows are mapped and dropped.

While the device does not decode memory accesses, or is in D3hot, a load or store through a window of a BAR is SIGBUS
(`vfio_pci_mmap_fault`). So the windows are dropped before a change that ends decoding, and none is mapped until that
change is complete. Accesses take no lock: a dropped window raises ValueError, and the access starts again.

Source: `__vfio_pci_memory_enabled` and `vfio_pci_zap_and_down_write_memory_lock` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, Protocol, TypeAlias, TypeVar

from pyvfio.guard import Guard, guarded
from pyvfio.handle import attempt_all

Keep: TypeAlias = Literal["no maps", "maps in use", "all maps"]
"""The mappings of `Region.mmap` that outlive a drop: none, those with a view, or all."""

_Result = TypeVar("_Result")


class _Mapped(Protocol):
    """A region with windows and mappings."""

    @property
    def has_dependents(self) -> bool: ...

    def close_dependents(self) -> None: ...

    def check_views(self) -> None: ...

    def drop(self, *, keep: Keep) -> None: ...


class Windows:
    """The windows of all regions of one device.

    Synchronization: `guard` has the lock of all regions of the device, below that of the container.
    """

    def __init__(self, bdf: str, regions: Mapping[int, _Mapped], *, check_here: Callable[[], None]) -> None:
        """`check_here` raises HandOverError while the device is handed over to another process."""
        self.guard = Guard(f"the register windows of {bdf}")
        self.low_power = False
        """Whether the kernel may have suspended the device. A window would then be SIGBUS; a system call resumes the
        device.
        """
        self.ended = False
        """Whether no more windows are mapped: the device is being closed."""
        self._regions = regions
        self._check_here = check_here

    def change(
        self,
        change: Callable[[], _Result],
        *,
        keep: Keep = "no maps",
        low_power: bool | None = None,
    ) -> _Result:
        """Drop the windows of all regions, then call `change`. No window is mapped before `change` returns.

        `keep`: the mappings that stay. `low_power`: the new value of `low_power` after `change` has succeeded (None: no
        change). Raises BufferError, before anything is dropped, if a mapping that would be closed has a view. Raises
        HandOverError for low power while the device is handed over, and the errors of `change`.
        """
        while True:
            if keep == "no maps":
                self._check_views()
            # Without the lock: the mapper of such a mapping takes the lock of the mapper, which is above.
            for region in tuple(self._regions.values()):
                region.close_dependents()
            if made := self._change(change, keep=keep, low_power=low_power):
                return made[0]

    @guarded
    def _change(self, change: Callable[[], _Result], *, keep: Keep, low_power: bool | None) -> list[_Result]:
        """Return a list with the result of `change`, or an empty list if `change` was not called."""
        regions = tuple(self._regions.values())
        if any(region.has_dependents for region in regions):  # another thread has mapped a region meanwhile
            return []
        if low_power:
            self._check_here()  # the other process would not know
        if keep == "no maps":
            self._check_views()
        attempt_all("unmapping registers", [partial(region.drop, keep=keep) for region in regions])
        before, self.low_power = self.low_power, bool(self.low_power or low_power)
        try:
            answer = change()
        except BaseException:
            self.low_power = before
            raise
        if low_power is not None:
            self.low_power = low_power
        return [answer]

    @guarded
    def end(self) -> bool:
        """Allow no more windows, unless DMA of another device reaches a region. Return whether none does."""
        self.ended = self.ended or not any(region.has_dependents for region in tuple(self._regions.values()))
        return self.ended

    def _check_views(self) -> None:
        for region in tuple(self._regions.values()):
            region.check_views()
