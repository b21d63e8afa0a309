"""A region of a device: registers and configuration space, by accesses of one width, and mappings of the region.

Source: drivers/vfio/pci/vfio_pci_rdwr.c; `vfio_pci_core_mmap`.
"""

from __future__ import annotations

import errno
from bisect import bisect, insort
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeAlias, TypeVar

from pyvfio import ioctls
from pyvfio.device.attachment import DmaOwner
from pyvfio.device.register import Register, poll
from pyvfio.device.windows import Keep, Windows
from pyvfio.errors import ClosedError, IoctlError, UnsupportedError, VfioError
from pyvfio.guard import (
    ContextManager,
    Guard,
    close_now,
    closing,
    guarded,
    making,
    reading,
    run_outside_or_in_hook,
    uninterrupted,
)
from pyvfio.handle import attempt_all
from pyvfio.info import RegionInfo
from pyvfio.kernel import Cell, Kernel, Numbers, Registers
from pyvfio.memory import Exports
from pyvfio.unique import Unique
from pyvfio.units import MIB, PAGE_SIZE, align_down, align_up, as_number, check_bool, is_aligned

_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_WHOLE_MAX = 64 * MIB
_RIGHTS = (
    (ioctls.VFIO_REGION_INFO_FLAG_READ, "read"),
    (ioctls.VFIO_REGION_INFO_FLAG_WRITE, "write"),
    (ioctls.VFIO_REGION_INFO_FLAG_MMAP, "mmap"),
)
_WINDOW_SIZE = 2 * MIB  # of larger regions, the part around an access is mapped: one entry of a middle page table
_ALL_ONES = (0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)  # a load reads ones if no device answers
_from_bytes = int.from_bytes  # half the cost of the attribute
_GONE = (errno.EIO, errno.ENODEV, errno.ENXIO)
_NAMES = tuple(
    index.name.removeprefix("VFIO_PCI_").removesuffix("_REGION_INDEX") for index in ioctls.VfioPciRegionIndex
)
_First = TypeVar("_First")
_Second = TypeVar("_Second")
_Result = TypeVar("_Result")
_Views: TypeAlias = Mapping[int, tuple[int, Numbers]]
"""A window by the width of an access: the offset in the region where the numbers begin, and the numbers."""
_Window: TypeAlias = tuple[int, int, Registers, _Views | None]  # start and end in the region; None: no memory
_NO_VIEWS: _Views = dict.fromkeys((1, 2, 4, 8), (1 << 64, memoryview(b"")))  # start is beyond the end of each region


class RegionOwner(Protocol):
    """The device of a region."""

    bdf: str

    @property
    def owner(self) -> DmaOwner: ...

    @property
    def kernel(self) -> Kernel: ...

    @property
    def seam(self) -> Kernel: ...

    @property
    def fd(self) -> int: ...

    @property
    def windows(self) -> Windows: ...

    def use_fd(self, call: Callable[[int, _First, _Second], _Result], first: _First, second: _Second, /) -> _Result: ...

    def check_usable(self) -> None: ...

    def check_decoding(self, what: str) -> None: ...

    def check_present(self) -> None: ...

    def all_regions(self) -> tuple[Region, ...]: ...


class RegionMap(ContextManager, Unique):
    """A part of a region mapped into this process: the result of `Region.mmap`.

    Python chooses the width of loads and stores through `view()`. Use `Region.register32` and the like for registers.
    On a fake device, the mapping is memory without side effects.

    A change that ends memory decoding (`Device.memory_enabled`, `Device.config`, a low-power state) closes the mapping.
    While a view lives, that change raises BufferError. With `force=True` the mapping stays. Until the device decodes
    memory again, an access to the view is SIGBUS, which ends the program. A reset does not change the mapping.

    Synchronization: any thread, under the lock of the region.
    """

    def __init__(self, region: Region, *, vaddr: int, size: int) -> None:
        self._region = region
        self._exports = Exports()
        self._vaddr = vaddr
        self.guard = region.guard
        self.size = size

    def __repr__(self) -> str:
        where = "closed" if self._vaddr == 0 else f"vaddr={self._vaddr:#x}"
        return f"<RegionMap of {self._region!r} {where} size={self.size:#x}>"

    @property
    @reading
    def vaddr(self) -> int:
        """The address of the first byte in this process. Raises ClosedError, and ForkedError in a child."""
        self._region.check_usable()
        if self._vaddr == 0:
            raise ClosedError("this mapping of a region has been closed")
        return self._vaddr

    @reading
    def view(self) -> memoryview:
        """Return a writable memoryview of the mapping. While a view lives, `close` raises BufferError."""
        return self._exports.view(self.vaddr, self.size)

    @closing
    def close(self) -> None:
        """Unmap the part; twice is fine. Does nothing in a forked child. Raises BufferError while a view lives."""
        if self._vaddr == 0:
            return
        self.check_views()
        vaddr, self._vaddr = self._vaddr, 0
        self._region.maps.remove(self)
        self._region.kernel.munmap(vaddr, align_up(self.size, PAGE_SIZE))

    @property
    def in_use(self) -> bool:
        """Whether a view lives."""
        return bool(self._exports.end())

    def check_views(self) -> None:
        """Raise BufferError while a view lives."""
        if self.in_use:
            raise BufferError(f"a view of {self._region!r} is still alive: release the view first")


class Region(Unique):
    """A region of a device: a BAR, the ROM, configuration space, or a region that the device's driver adds.

    `read32` and the like make one access of exactly that width: a load or store if the region can be mapped, otherwise
    one pread or pwrite. Numbers are little-endian, as in PCI. Offsets are in bytes, and multiples of the width. For a
    register in frequent use, `register32` and the like are faster.

    The first access maps a window: the whole region, or 2 MiB around the access if the region has more than 64 MiB. The
    window is dropped when the device stops decoding memory, and at a reset. The next access maps a new window.

    Raises TypeError, and ValueError for offsets that are outside or misaligned, before any system call. Raises
    IoctlError if the kernel refuses (EIO: memory decoding is off), and VfioError if the device does not decode memory.
    Raises DeviceGoneError if a read of 32 or 64 bits, and STATUS in configuration space, return all ones.

    Synchronization: any thread. Each access is one instruction or one system call, and takes no lock.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> bar = device.region(0)
        >>> f"{bar.read32(0):#x}"
        '0x10000ed'
        >>> bar.write32(4, 0xFF)
        >>> f"{bar.read32(4):#x}"  # this device, QEMU's edu, stores the complement
        '0xffffff00'
    """

    def __init__(self, device: RegionOwner, info: RegionInfo) -> None:
        self._device = device
        self.kernel = device.kernel
        """The kernel of the device."""
        self.seam = device.seam
        """Who makes the calls on the device: `kernel`, or a recorder of these calls. For the library."""
        self.info = info
        self._at, self._size = info.offset, info.size  # the place of the region in the descriptor
        self._parts = self.mappable
        self._windows: list[_Window] = []  # sorted by start; replaced as a whole
        self._use(_NO_VIEWS)  # the window of the last access
        self.guard = Guard(self._name, lock=device.windows.guard.lock)
        self.maps: list[RegionMap] = []
        """The open mappings. Each keeps the group of the device open in the kernel. Read only."""
        self.dependents: list[Callable[[], object]] = []
        """Closes of the mappings for DMA of other devices, which must end before the region is unmapped.

        Each close removes itself, and is called without a lock. For the library; `add_dependent` adds one.
        """

    def check_usable(self) -> None:
        """Raise as `Device.fd`."""
        self._device.check_usable()

    @property
    def size(self) -> int:
        """The size in bytes; 0 for a BAR that the device does not have."""
        return self.info.size

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes. The kernel chooses the width of the accesses."""
        offset, size = as_number(offset, "offset"), as_number(size, "size")
        self._check_span(offset, size)
        return self._pread(offset, size)

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            data = self._device.use_fd(self.seam.pread, size, self._at + offset)
        except OSError as error:
            raise self._explain(error, "pread", offset, size) from error
        if len(data) != size:
            raise VfioError(f"{self._name} returned {len(data)} of {size} bytes at {offset:#x}")
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`. The kernel chooses the width of the accesses."""
        self._pwrite(*self._checked(offset, data))

    def _pwrite(self, offset: int, data: bytes) -> None:
        try:
            written = self._device.use_fd(self.seam.pwrite, data, self._at + offset)
        except OSError as error:
            raise self._explain(error, "pwrite", offset, len(data)) from error
        if written != len(data):
            raise VfioError(f"{self._name} accepted {written} of {len(data)} bytes at {offset:#x}")

    def read8(self, offset: int) -> int:
        """Read one byte."""
        return self._load(offset, 1)

    def read16(self, offset: int) -> int:
        """Read two bytes in one access."""
        return self._load(offset, 2)

    def read32(self, offset: int) -> int:
        """Read four bytes in one access."""
        if type(offset) is int:  # `_load` inlined, for the width that drivers use: two thirds of the cost
            start, numbers = self._numbers32
            if offset >= start and not offset & 3:
                try:
                    value = numbers[offset - start >> 2]
                except (IndexError, ValueError):
                    pass
                else:
                    if value == _ALL_ONES[0]:
                        self._check_ones()
                    return value
        return self._load(offset, 4)

    def read64(self, offset: int) -> int:
        """Read eight bytes in one access. Through pread, kernels before 6.10 make two accesses."""
        return self._load(offset, 8)

    def write8(self, offset: int, value: int) -> None:
        """Write one byte."""
        self._store(offset, 1, value)

    def write16(self, offset: int, value: int) -> None:
        """Write two bytes in one access."""
        self._store(offset, 2, value)

    def write32(self, offset: int, value: int) -> None:
        """Write four bytes in one access."""
        if type(offset) is int:  # as in `read32`
            start, numbers = self._numbers32
            if offset >= start and not offset & 3:
                try:
                    numbers[offset - start >> 2] = value
                except (IndexError, ValueError, TypeError):
                    pass
                else:
                    return
        self._store(offset, 4, value)

    def write64(self, offset: int, value: int) -> None:
        """Write eight bytes in one access. Through pwrite, kernels before 6.10 make two accesses."""
        self._store(offset, 8, value)

    def poll32(
        self, offset: int, *, mask: int = 0xFFFF_FFFF, value: int, timeout: float | None, interval: float = 0.0
    ) -> int:
        """Read four bytes repeatedly until `register & mask` is `value`. Returns the whole last value.

        `timeout`: seconds, or None for no limit. The register is read at least once, and once more after the timeout.
        `interval`: seconds between two reads. With 0, other threads run between two reads.

        Raises RegisterTimeoutError, a TimeoutError with the last value; ValueError if `value` has bits outside `mask`;
        and the errors of `read32`. Synchronization: any thread; no lock.
        """
        offset = as_number(offset, "offset")
        what = f"{self._name}, offset {offset:#x}"
        return poll(partial(self.read32, offset), what, mask=mask, value=value, timeout=timeout, interval=interval)

    def register8(self, offset: int) -> Register:
        """Return one byte as an object."""
        return self._register(offset, 1)

    def register16(self, offset: int) -> Register:
        """Return two bytes as an object."""
        return self._register(offset, 2)

    def register32(self, offset: int) -> Register:
        """Return four bytes as an object, whose `read` and `write` make one access of that width.

        Raises TypeError, ValueError. Cost: the first access maps a window. Each other access takes less than half the
        time of `read32`.
        """
        return self._register(offset, 4)

    def register64(self, offset: int) -> Register:
        """Return eight bytes as an object. Through pread and pwrite, kernels before 6.10 make two accesses."""
        return self._register(offset, 8)

    def _register(self, offset: int, width: int) -> Register:
        offset = as_number(offset, "offset")
        self._check_access(offset, width)
        return Register(
            f"{width} bytes at {offset:#x} of {self._name}",
            self.guard,
            open_cell=partial(self._cell, offset, width),
            load=partial(self._load, offset, width),
            store=partial(self._store, offset, width),
        )

    @guarded
    def change16(self, offset: int, bits: int, *, on: bool) -> None:
        """Set or clear bits of two bytes by a read and a write, with no other `change16` in between."""
        check_bool(on, "on")
        offset, bits = self._check_value(offset, 2, bits)
        value = self.read16(offset)
        self.write16(offset, value | bits if on else value & ~bits)

    def _load(self, offset: int, width: int) -> int:
        if type(offset) is not int:
            offset = as_number(offset, "offset")
        start, numbers = self._views[width]
        if offset < start or offset % width:
            value = self._load_anew(offset, width)
        else:
            try:
                value = numbers[(offset - start) // width]
            except (IndexError, ValueError):  # the offset is in another window, or the window was dropped
                value = self._load_anew(offset, width)
        if value in _ALL_ONES:
            self._check_ones()
        return value

    def _check_ones(self) -> None:
        """Raise DeviceGoneError if a load of a BAR read ones because no device answers."""
        if self.info.index <= ioctls.VFIO_PCI_BAR5_REGION_INDEX:
            self._device.check_present()

    def _load_anew(self, offset: int, width: int) -> int:
        if not self._parts:
            return self._load_by_pread(offset, width)
        if offset < 0 or offset % width or offset + width > self._size:
            self._check_access(offset, width)
        while (window := self._window(offset, width)) is not None:
            try:
                return window[2].read(offset - window[0], width)
            except ValueError:
                self._check_dropped(window)
        return self._load_by_pread(offset, width)

    def _load_by_pread(self, offset: int, width: int) -> int:
        if type(offset) is not int:
            offset = as_number(offset, "offset")
        if offset < 0 or offset % width or offset + width > self._size:
            self._check_access(offset, width)
        return _from_bytes(self._pread(offset, width), "little")

    def _store(self, offset: int, width: int, value: int) -> None:
        if type(offset) is not int:
            offset = as_number(offset, "offset")
        start, numbers = self._views[width]
        if offset >= start and not offset % width:
            try:
                numbers[(offset - start) // width] = value
            except (IndexError, ValueError, TypeError):  # TypeError: the value is no number
                pass
            else:
                return
        self._store_anew(offset, width, value)

    def _store_anew(self, offset: int, width: int, value: int) -> None:
        offset, value = self._check_value(offset, width, value)
        while (window := self._window(offset, width)) is not None:
            try:
                window[2].write(offset - window[0], width, value)
            except ValueError:
                self._check_dropped(window)
            else:
                return
        self._pwrite(offset, value.to_bytes(width, "little"))

    def _check_dropped(self, window: _Window) -> None:
        """Raise the ValueError of an access, unless the window was dropped.

        Raises ForkedError in a child, which has no windows.
        """
        self.check_usable()
        if window in self._windows:
            raise  # noqa: PLE0704 (the exception of the caller)

    def _window(self, offset: int, width: int) -> _Window | None:
        """Return the window for an access, mapping one if necessary, or None if the kernel cannot map that part."""
        if windows := self._windows:
            window = windows[0 if len(windows) == 1 else bisect(windows, offset, key=_start) - 1]
            if window[0] <= offset and offset + width <= window[1]:
                self._use(window[3] or _NO_VIEWS)
                return window
        if not self._parts:
            return None
        self.check_usable()
        if (part := self._part(offset, width)) is None:
            return None
        return self._open_window(*part)

    def _use(self, views: _Views) -> None:
        """Make `views` the first to be tried. Views may have been dropped meanwhile: accesses then raise ValueError."""
        self._views, self._numbers32 = views, views[4]

    def _part(self, offset: int, width: int) -> tuple[int, int] | None:
        """Return start and size of the window for an access, or None if the kernel cannot map that part."""
        for start, size in self._parts:
            if start <= offset and offset + width <= start + size:
                if self.size <= _WHOLE_MAX:
                    return start, size
                window = align_down(offset, _WINDOW_SIZE)
                first = max(start, window)
                return first, min(start + size, window + _WINDOW_SIZE) - first
        return None

    @guarded
    def _open_window(self, start: int, size: int) -> _Window | None:
        for window in self._windows:
            if window[0] == start:  # another thread mapped the window first
                return window
        if self._device.windows.low_power:
            return None
        self._check_decoding()
        fd, kernel = self._device.fd, self.seam
        try:
            registers = kernel.registers(fd, self.info.offset + start, align_up(size, PAGE_SIZE))
        except OSError as error:
            raise self._explain(error, "mmap", start, size) from error
        window, windows = (start, start + size, registers, _views(registers, start, size)), [*self._windows]
        insort(windows, window, key=_start)
        self._windows = windows
        return window

    @guarded
    def _cell(self, offset: int, width: int) -> Cell | None:
        """Return a register in a window, mapping one if necessary, or None if no memory can be mapped."""
        window = self._window(offset, width)
        return None if window is None else window[2].cell(offset - window[0], width)

    @property
    def mappable(self) -> tuple[tuple[int, int], ...]:
        """The parts that can be mapped, as (offset, size) in whole pages: the whole region, or the parts of the
        kernel's list.

        A BAR smaller than a page is one part if the kernel maps the page: no other BAR shares the page
        (`vfio_pci_probe_mmaps`).
        """
        if not self.info.flags & ioctls.VFIO_REGION_INFO_FLAG_MMAP:
            return ()
        if self.size < PAGE_SIZE and self.info.sparse is None:
            return ((0, self.size),)
        areas = ((0, self.size),) if self.info.sparse is None else self.info.sparse
        pages = ((align_up(start, PAGE_SIZE), align_down(start + size, PAGE_SIZE)) for start, size in areas)
        return tuple((start, end - start) for start, end in pages if start < end)

    @making(RegionMap.close)
    def mmap(self, offset: int = 0, size: int | None = None) -> RegionMap:
        """Map `[offset, offset + size)` into this process, in multiples of the page size. Default: to the region's end.

        A region smaller than a page is mapped as a whole. Closing the device also closes the mapping. Raises
        UnsupportedError if that part cannot be mapped. Raises VfioError if the device does not answer (memory decoding
        is off, so that an access would be SIGBUS).
        """
        if offset == 0 and size is None and not self.mappable:
            raise UnsupportedError(f"{self._name}, of {self.size:#x} bytes, cannot be mapped: use read32 and the like")
        offset = as_number(offset, "offset")
        size = self.size - offset if size is None else as_number(size, "size")
        self._check_span(offset, size)
        if (not is_aligned(offset | size, PAGE_SIZE) and size != self.size) or size == 0:
            raise ValueError(f"offset and size must be multiples of {PAGE_SIZE} bytes, not {offset:#x} and {size:#x}")
        if not any(start <= offset and offset + size <= start + length for start, length in self.mappable):
            raise UnsupportedError(f"{self._name} cannot be mapped at {offset:#x}-{offset + size - 1:#x}")
        self._check_decoding()
        if self._device.windows.low_power:
            raise VfioError(
                f"{self._device.bdf} is in a low-power state, so {self._name} cannot be mapped",
                hint="Leave the low-power state first; read32 and the like resume the device for each access",
            )
        mapped = RegionMap(self, vaddr=self._mmap(offset, size), size=size)
        self.maps.append(mapped)
        return mapped

    def _mmap(self, offset: int, size: int) -> int:
        flags = self.info.flags
        protection = bool(flags & ioctls.VFIO_REGION_INFO_FLAG_READ) * _PROT_READ
        protection |= bool(flags & ioctls.VFIO_REGION_INFO_FLAG_WRITE) * _PROT_WRITE
        fd, kernel = self._device.fd, self.seam
        try:
            return kernel.mmap(
                0, align_up(size, PAGE_SIZE), protection, _MAP_SHARED, fd=fd, offset=self.info.offset + offset
            )
        except OSError as error:
            raise self._explain(error, "mmap", offset, size) from error

    def _explain(self, error: OSError, request: str, offset: int, size: int) -> VfioError:
        if error.errno in _GONE:
            with suppress(IoctlError):
                self._device.check_present()
        return IoctlError.of(
            error,
            f"{self._name}: {error.strerror}",
            request=request,
            arguments={"device": self._device.bdf, "region": self.info.index, "offset": offset, "size": size},
            hint="Memory decoding may be off, or the device in a low-power state" if error.errno == errno.EIO else "",
        )

    @property
    def _name(self) -> str:
        index = self.info.index
        name = _NAMES[index] if index < len(_NAMES) else "region"
        return f"{name} (region {index}) of {self._device.bdf}"

    def __repr__(self) -> str:
        flags = self.info.flags
        rights = [word for bit, word in _RIGHTS if flags & bit]
        return f"<Region {self._name} size={self.size:#x} {' '.join(rights) or 'no access'}>"

    def _check_decoding(self) -> None:
        if self._device.windows.ended:
            raise ClosedError(f"device {self._device.bdf} is being closed")
        if self.info.index <= ioctls.VFIO_PCI_BAR5_REGION_INDEX:
            self._device.check_decoding(self._name)

    def _check_span(self, offset: int, size: int) -> None:
        if self.size == 0:
            raise ValueError(f"region {self.info.index} has 0 bytes: {self._device.bdf} does not have that region")
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"{self._name} has {self.size:#x} bytes: no {size:#x} at {offset:#x}")

    def _check_access(self, offset: int, width: int) -> None:
        self._check_span(offset, width)
        if offset % width:
            raise ValueError(f"an access of {width} bytes at {offset:#x} is misaligned")

    def _check_value(self, offset: int, width: int, value: int) -> tuple[int, int]:
        offset, value = as_number(offset, "offset"), as_number(value, "value")
        if offset < 0 or offset % width or offset + width > self._size:
            self._check_access(offset, width)
        if value >> 8 * width:
            raise ValueError(f"{value:#x} does not fit {width} bytes")
        return offset, value

    def _checked(self, offset: int, data: bytes | bytearray | memoryview) -> tuple[int, bytes]:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be bytes, not {type(data).__name__}")
        offset, data = as_number(offset, "offset"), bytes(data)
        self._check_span(offset, len(data))
        return offset, data

    @property
    def in_use(self) -> bool:
        """Whether a view of a mapping of the region lives."""
        return any(mapped.in_use for mapped in tuple(self.maps))

    def check_views(self) -> None:
        """Raise BufferError while a view of a mapping of the region lives."""
        for mapped in tuple(self.maps):
            mapped.check_views()

    @guarded
    def add_dependent(self, close: Callable[[], object]) -> None:
        """Call `close` before the region is unmapped. For the library.

        Raises VfioError if the device does not answer (memory decoding is off), ClosedError. Raises HandOverError while
        the device is handed over: the other process would not know of the mapping.
        """
        self._device.owner.check_here()
        self._check_decoding()
        self.dependents.append(close)

    @property
    def has_dependents(self) -> bool:
        """Whether DMA of another device reaches the region through a mapping."""
        return bool(self.dependents)

    @uninterrupted()
    def close_dependents(self) -> None:
        """End the DMA of other devices to the region. For the library.

        The caller holds no lock, since the locks of mappers are above. Raises the errors of the closes, after all were
        called.
        """
        attempt_all(f"unmapping {self._name} from other devices", tuple(reversed(self.dependents)))

    def close(self) -> None:
        """Unmap the region from other devices and from this process, with all mappings.

        The region can be used again. If the region cannot be unmapped from another device, nothing else is unmapped,
        and the error is raised. Raises BufferError while a view lives, after the rest has been unmapped.

        Synchronization: any thread. A finalizer may close too; inside another call, the close is deferred to the end of
        that call.
        """
        run_outside_or_in_hook(self._close)

    def _close(self) -> None:
        while not self._drop_unless_reached():
            self.close_dependents()  # and once more if another thread maps the region meanwhile

    @guarded
    def _drop_unless_reached(self) -> bool:
        if self.dependents:
            return False
        self.drop(keep="no maps")
        return True

    @guarded
    def drop(self, *, keep: Keep) -> None:
        """Drop the windows, and close all mappings but those to keep. No other function drops windows.

        Raises BufferError if a mapping with a view is not kept, after the rest has been unmapped.
        """
        windows, self._windows = self._windows, []
        self._use(_NO_VIEWS)
        closes = [registers.close for _start, _end, registers, _numbers in windows]
        maps = [] if keep == "all maps" else [each for each in self.maps if keep == "no maps" or not each.in_use]
        attempt_all(f"unmapping {self._name}", [*closes, *(partial(close_now, mapped) for mapped in maps)])


def _start(window: _Window) -> int:
    return window[0]


def _views(registers: Registers, start: int, size: int) -> _Views | None:
    views = {width: (start, numbers) for width in _NO_VIEWS if (numbers := registers.numbers(width, size)) is not None}
    return views or None
