"""The mapped windows of a device's regions, and the one lock under which they are made and dropped.

A load or store through a window of a BAR is SIGBUS while the device does not decode memory accesses, or is in D3hot
(`vfio_pci_mmap_fault`). So the windows are dropped before a change that ends decoding, and none is made until that
change is over. Accesses take no lock: a window that is dropped raises ValueError, and the access begins anew.

Source: `__vfio_pci_memory_enabled` and `vfio_pci_zap_and_down_write_memory_lock` in drivers/vfio/pci/vfio_pci_core.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, Protocol, TypeAlias, TypeVar

from pyvfio.guard import Guard, guarded
from pyvfio.handle import attempt_all

Keep: TypeAlias = Literal["no maps", "maps in use", "all maps"]
"""Which mappings of `Region.mmap` outlive a drop: none, those with a view, or all of them."""

_Result = TypeVar("_Result")


class _Mapped(Protocol):
    """A region, as far as it is mapped."""

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
        """`check_here` raises where the device is being handed to another process."""
        self.guard = Guard(f"the register windows of {bdf}")
        self.low_power = False
        """Whether the kernel may have suspended the device: a window would be SIGBUS, and a system call wakes it."""
        self.ended = False
        """Whether no window is made any more: the device is being closed."""
        self._regions = regions
        self._check_here = check_here

    def change(
        self,
        change: Callable[[], _Result],
        *,
        keep: Keep = "no maps",
        low_power: bool | None = None,
    ) -> _Result:
        """Drop the windows of all regions, then call `change`; no window is made before `change` returns.

        `keep`: which mappings stay. `low_power`: what `low_power` is when `change` has succeeded (None: as before).
        Raises BufferError, before anything is dropped, where a mapping that would go has a view; HandOverError for low
        power while the device is handed over; and what `change` raises.
        """
        while True:
            if keep == "no maps":
                self._check_views()
            # Without the lock: the mapper of such a mapping takes its own, which is above.
            for region in tuple(self._regions.values()):
                region.close_dependents()
            if made := self._change(change, keep=keep, low_power=low_power):
                return made[0]

    @guarded
    def _change(self, change: Callable[[], _Result], *, keep: Keep, low_power: bool | None) -> list[_Result]:
        """What `change` returns; nothing, where it was not called."""
        regions = tuple(self._regions.values())
        if any(region.has_dependents for region in regions):  # of another thread, meanwhile
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
        """Let no window be made any more, and no other device reach a region. Return whether none does."""
        self.ended = self.ended or not any(region.has_dependents for region in tuple(self._regions.values()))
        return self.ended

    def _check_views(self) -> None:
        for region in tuple(self._regions.values()):
            region.check_views()
