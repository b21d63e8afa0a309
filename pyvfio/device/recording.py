"""A recording of an open device: until the close, calls on the device go through `RecordingKernel`.

The seam is replaced under the lock of the regions, and all register windows are dropped in the same step. So no access
goes past the record, and an access costs nothing more while no recording is open.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from pyvfio import ioctls
from pyvfio.device.irq import Irq
from pyvfio.device.region import Region
from pyvfio.device.windows import Windows
from pyvfio.errors import IoctlError, VfioError
from pyvfio.guard import ContextManager, Guard, close_now, closing, constructing, guarded
from pyvfio.info import DeviceInfo, RegionInfo
from pyvfio.kernel import Kernel
from pyvfio.recording.format import CONFIG, Header, RegionShape
from pyvfio.recording.log import EventLog
from pyvfio.recording.seam import RecordingKernel, as_kernel
from pyvfio.unique import Unique
from pyvfio.units import check_bool, check_whole_number

_FLAGS = {
    "read": ioctls.VFIO_REGION_INFO_FLAG_READ,
    "write": ioctls.VFIO_REGION_INFO_FLAG_WRITE,
    "mmap": ioctls.VFIO_REGION_INFO_FLAG_MMAP,
}
_BARS = range(ioctls.VFIO_PCI_BAR0_REGION_INDEX, ioctls.VFIO_PCI_BAR5_REGION_INDEX + 1)
KEPT = 20
"""Events that a recording keeps in memory, unless `keep` says otherwise."""


class Recorded(Protocol):
    """The device that is recorded."""

    bdf: str
    info: DeviceInfo

    @property
    def kernel(self) -> Kernel: ...

    @property
    def seam(self) -> Kernel: ...

    @property
    def windows(self) -> Windows: ...

    @property
    def irqs(self) -> tuple[Irq, ...]: ...

    def check_usable(self) -> None: ...

    def use_fd(self, call: Callable[[int, int, int], bytes], first: int, second: int, /) -> bytes: ...

    def region(self, index: int, /) -> Region: ...

    def irq(self, index: int, /) -> Irq: ...

    def all_regions(self) -> tuple[Region, ...]: ...

    def use_seam(self, seam: Kernel) -> None: ...


class Recording(ContextManager, Unique):
    """An open recording of a device, from `Device.record`. A context manager; `close` ends the recording.

    Recordings of one device may overlap. Each has all events of its time.

    Synchronization: any thread. In a forked child nothing is recorded, and `close` does nothing.
    """

    @constructing(lambda recording: recording.close())
    def __init__(self, device: Recorded, path: Path | str | None, *, times: bool, allow_mmap: bool, keep: int) -> None:
        self._seam: RecordingKernel | None = None
        self._device = device
        self.path = None if path is None else Path(os.fspath(path))
        """The file of the record; None where the events are kept in memory alone."""
        check_bool(times, "times")
        check_bool(allow_mmap, "allow_mmap")
        self.guard = Guard(f"the recording of {device.bdf}", lock=device.windows.guard.lock)
        if not 0 <= check_whole_number(keep, "keep") <= sys.maxsize:
            raise ValueError(f"keep is a number of events from 0 on, not {keep}")
        device.check_usable()
        header = _header(device)
        self._check_mappings(allow_mmap=allow_mmap)  # before the file is replaced, and again under the lock
        self._log = EventLog(self.path, header, times=times, keep=keep)
        try:
            self._begin(header.config, allow_mmap=allow_mmap)
        except BaseException:
            self._log.close()
            raise

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else f"in {self.path}"
        return f"<Recording of {self._device.bdf} {where}{', closed' if self._seam is None else ''}>"

    def _check_mappings(self, *, allow_mmap: bool) -> None:
        mapped = [region for region in self._device.all_regions() if region.maps]
        if mapped and not allow_mmap:
            raise VfioError(
                f"{mapped[0]!r} is mapped by Region.mmap, and accesses through the mapping cannot be recorded",
                hint="close() the mapping first, or record(…, allow_mmap=True)",
            )

    @guarded
    def _begin(self, config: bytes, *, allow_mmap: bool) -> None:
        device = self._device
        self._check_mappings(allow_mmap=allow_mmap)
        places: dict[int, RegionInfo] = {}

        def regions() -> tuple[RegionInfo, ...]:
            if len(places) != len(device.all_regions()):
                places.update({region.info.index: region.info for region in device.all_regions()})
            return tuple(places.values())

        seam = RecordingKernel(device.seam, self._log, regions=regions, config=config, allow_mmap=allow_mmap)
        for irq in device.irqs:
            seam.know(_vectors(irq))
        self._seam = seam
        self._use(as_kernel(seam))

    def _use(self, seam: Kernel) -> None:
        """Make calls on the device through `seam`, and drop the windows, so that each access maps another one."""
        self._device.use_seam(seam)
        for region in self._device.all_regions():
            region.drop(keep="all maps")

    @property
    def last(self) -> tuple[str, ...]:
        """The last events as lines of the record, the oldest first; at most `keep` of `Device.record`."""
        return self._log.tail()

    @closing
    def close(self) -> None:
        """End the recording: write the last line, and make calls on the device as before; twice is fine.

        Register windows are dropped, and mapped again by the next access. Raises OSError if the file cannot be written.
        """
        own, self._seam = self._seam, None
        if own is None:
            return
        own.end()
        try:
            seam = self._device.seam
            while isinstance(seam, RecordingKernel) and seam.ended:  # recordings that began earlier and ended before
                seam = seam.kernel
            self._use(seam)
        finally:
            close_now(self._log)


def _vectors(irq: Irq) -> Mapping[int, tuple[int, int]]:
    """The kind and vector of each eventfd of an interrupt."""
    row = irq.held()[0]
    return {eventfd.fd: (irq.info.index, vector) for vector, eventfd in enumerate(row) if eventfd is not None}


def _header(device: Recorded) -> Header:
    regions: dict[int, RegionShape] = {}
    for index in sorted({*_BARS, CONFIG, *(region.info.index for region in device.all_regions())}):
        info = device.region(index).info
        if info.size:
            flags = frozenset(name for name, flag in _FLAGS.items() if info.flags & flag)
            regions[index] = RegionShape(info.size, flags, info.sparse)
    irqs: dict[int, int] = {}
    for index in range(device.info.num_irqs):
        try:
            irqs[index] = device.irq(index).count
        except IoctlError:  # the error interrupt of a conventional device
            continue
    place = device.region(CONFIG).info
    return Header(
        config=device.use_fd(device.kernel.pread, place.size, place.offset),  # no event of another recording
        resettable=bool(device.info.flags & ioctls.VFIO_DEVICE_FLAGS_RESET),
        regions=regions,
        irqs={index: count for index, count in irqs.items() if count},
    )
