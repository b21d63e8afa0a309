"""A region of a device: registers and configuration space, by accesses of one width, and what of it can be mapped.

Source: drivers/vfio/pci/vfio_pci_rdwr.c; `vfio_pci_core_mmap`.
"""

from __future__ import annotations

import errno
from bisect import bisect, insort
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from operator import index
from typing import Protocol, TypeAlias, TypeVar, TypeVarTuple

from pyvfio import ioctls
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
from pyvfio.kernel import Cell, Kernel, Registers
from pyvfio.memory import Exports
from pyvfio.units import MIB, PAGE_SIZE, align_down, align_up, is_aligned

_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1
_WHOLE_MAX = 64 * MIB
_WINDOW_SIZE = 2 * MIB  # of a larger region, mapped where an access needs it: an entry of a middle page table
_ALL_ONES = (0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)  # what a load gets that no device answers
_GONE = (errno.EIO, errno.ENODEV, errno.ENXIO)
_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")
_Window: TypeAlias = tuple[int, int, Registers]  # start and end in the region


class _Group(Protocol):
    """The group of the device."""

    def check_here(self) -> None: ...


class RegionOwner(Protocol):
    """The device that a region is of."""

    bdf: str

    @property
    def group(self) -> _Group: ...

    @property
    def kernel(self) -> Kernel: ...

    @property
    def fd(self) -> int: ...

    @property
    def windows(self) -> Windows: ...

    def use_fd(self, call: Callable[[int, *_Arguments], _Result], /, *arguments: *_Arguments) -> _Result: ...

    def check_usable(self) -> None: ...

    def check_decoding(self, what: str) -> None: ...

    def check_present(self) -> None: ...

    def all_regions(self) -> tuple[Region, ...]: ...


class RegionMap(ContextManager):
    """A part of a region mapped into this process: the result of `Region.mmap`.

    Loads and stores through `view()` have whatever width Python chooses to copy with; use `Region.register32` and the
    like for registers. On a fake device this is memory without side effects.

    A change that ends memory decoding (`Device.memory_enabled`, `Device.config`, a low-power state) closes the mapping.
    While a view lives, that change raises BufferError; with `force=True` the mapping stays. A touch of the view is then
    SIGBUS, which ends the program, until the device decodes memory again. A reset leaves the mapping as it is.

    Synchronization: any thread; the lock is the region's.
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
        """The address of its first byte in this process. Raises ClosedError, and ForkedError in a child."""
        self._region.check_usable()
        if self._vaddr == 0:
            raise ClosedError("this mapping of a region has been closed")
        return self._vaddr

    @reading
    def view(self) -> memoryview:
        """A writable memoryview of it; while one lives, `close` raises BufferError."""
        return self._exports.view(self.vaddr, self.size)

    @closing
    def close(self) -> None:
        """Unmap it; twice is fine, and in a forked child nothing happens. Raises BufferError while a view lives."""
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
            raise BufferError(f"a view of {self._region!r} is still alive; release it first")


class Region:
    """A region of a device: a BAR, the ROM, configuration space, or one of the driver's own.

    `read32` and its kin make one access of exactly that width: a load or store where the region can be mapped, else one
    pread or pwrite. Numbers are little-endian, as PCI is; offsets are in bytes and multiples of the width. `register32`
    and its kin are faster for a register that is used often.

    The first access maps a window: all of the region, and of a region above 64 MiB the 2 MiB around the access. The
    window is dropped when the device stops to decode memory, and at a reset. The next access maps another one.

    Raises TypeError, and ValueError for offsets outside and misaligned ones, before any system call; IoctlError when
    the kernel refuses (EIO: memory decoding is off), VfioError where the device does not decode memory; DeviceGoneError
    where 32 or 64 bits are all ones, and the status in configuration space is, too.

    Synchronization: any thread; each access is one instruction or one system call, and takes no lock.
    """

    def __init__(self, device: RegionOwner, info: RegionInfo) -> None:
        self._device = device
        self.info = info
        self._windows: list[_Window] = []  # by their starts; replaced as a whole
        self.guard = Guard(self._name, lock=device.windows.guard.lock)
        self.maps: list[RegionMap] = []
        """The mappings that are open; each keeps the device's group open in the kernel. Read only."""
        self.dependents: list[Callable[[], object]] = []
        """The closes of what must end before the region is unmapped: mappings of the region for another device's DMA.
        Each removes itself, and is called with no lock held. For the library; `add_dependent` adds one."""

    @property
    def kernel(self) -> Kernel:
        """The device's."""
        return self._device.kernel

    def check_usable(self) -> None:
        """Raise as `Device.fd` does."""
        self._device.check_usable()

    @property
    def size(self) -> int:
        """In bytes; 0 for a BAR that the device does not have."""
        return self.info.size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes, in accesses whose width the kernel chooses."""
        offset, size = index(offset), index(size)
        self._check_span(offset, size)
        try:
            data = self._device.use_fd(self._device.kernel.pread, size, self.info.offset + offset)
        except OSError as error:
            raise self._explain(error, "pread", offset, size) from error
        if len(data) != size:
            raise VfioError(f"{self._name} gave {len(data)} of {size} bytes at {offset:#x}")
        return data

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """All of `data`, in accesses whose width the kernel chooses."""
        offset, data = self._checked(offset, data)
        try:
            written = self._device.use_fd(self._device.kernel.pwrite, data, self.info.offset + offset)
        except OSError as error:
            raise self._explain(error, "pwrite", offset, len(data)) from error
        if written != len(data):
            raise VfioError(f"{self._name} took {written} of {len(data)} bytes at {offset:#x}")

    def read8(self, offset: int) -> int:
        """One byte."""
        return self._load(offset, 1)

    def read16(self, offset: int) -> int:
        """Two bytes in one access."""
        return self._load(offset, 2)

    def read32(self, offset: int) -> int:
        """Four bytes in one access."""
        return self._load(offset, 4)

    def read64(self, offset: int) -> int:
        """Eight bytes in one access. Through pread, kernels before 6.10 make two of it."""
        return self._load(offset, 8)

    def write8(self, offset: int, value: int) -> None:
        """One byte."""
        self._store(offset, 1, value)

    def write16(self, offset: int, value: int) -> None:
        """Two bytes in one access."""
        self._store(offset, 2, value)

    def write32(self, offset: int, value: int) -> None:
        """Four bytes in one access."""
        self._store(offset, 4, value)

    def write64(self, offset: int, value: int) -> None:
        """Eight bytes in one access. Through pwrite, kernels before 6.10 make two of it."""
        self._store(offset, 8, value)

    def poll32(
        self, offset: int, *, mask: int = 0xFFFF_FFFF, value: int, timeout: float | None, interval: float = 0.0
    ) -> int:
        """Read four bytes again and again until `register & mask` is `value`; the whole of the last value read.

        `timeout` in seconds (None: no end); the register is read at least once, and once more when the time is over.
        `interval` in seconds between two reads; with 0 other threads run in between.

        Raises RegisterTimeoutError, which is a TimeoutError, with the last value read; ValueError where `value` has
        bits outside `mask`; and as `read32`. Synchronization: any thread; no lock.
        """
        what = f"{self._name}, offset {index(offset):#x}"
        return poll(partial(self.read32, offset), what, mask=mask, value=value, timeout=timeout, interval=interval)

    def register8(self, offset: int) -> Register:
        """One byte as an object."""
        return self._register(offset, 1)

    def register16(self, offset: int) -> Register:
        """Two bytes as an object."""
        return self._register(offset, 2)

    def register32(self, offset: int) -> Register:
        """Four bytes as an object, whose `read` and `write` are one access of that width.

        Raises TypeError, ValueError. Cost: the first access maps a window; each other one takes a fifth of the time of
        `read32`.
        """
        return self._register(offset, 4)

    def register64(self, offset: int) -> Register:
        """Eight bytes as an object. Through pread and pwrite, kernels before 6.10 make two accesses of one."""
        return self._register(offset, 8)

    def _register(self, offset: int, width: int) -> Register:
        offset = index(offset)
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
        """Set or clear bits of two bytes: a read and a write, between which no other `change16` comes."""
        offset, bits = self._check_value(offset, 2, bits)
        value = self.read16(offset)
        self.write16(offset, value | bits if on else value & ~bits)

    def _load(self, offset: int, width: int) -> int:
        offset = index(offset)
        self._check_access(offset, width)
        while (window := self._window(offset, width)) is not None:
            try:
                value = window[2].read(offset - window[0], width)
            except ValueError:
                if window in self._windows:
                    raise
            else:
                break
        else:
            value = int.from_bytes(self.read(offset, width), "little")
        if value in _ALL_ONES and self.info.index <= ioctls.VFIO_PCI_BAR5_REGION_INDEX:
            self._device.check_present()
        return value

    def _store(self, offset: int, width: int, value: int) -> None:
        offset, value = self._check_value(offset, width, value)
        while (window := self._window(offset, width)) is not None:
            try:
                window[2].write(offset - window[0], width, value)
            except ValueError:
                if window in self._windows:
                    raise
            else:
                return
        self.write(offset, value.to_bytes(width, "little"))

    def _window(self, offset: int, width: int) -> _Window | None:
        self.check_usable()  # also where the window would still be there
        if windows := self._windows:
            window = windows[0 if len(windows) == 1 else bisect(windows, offset, key=_start) - 1]
            if window[0] <= offset and offset + width <= window[1]:
                return window
        if (part := self._part(offset, width)) is None:
            return None
        return self._open_window(*part)

    def _part(self, offset: int, width: int) -> tuple[int, int] | None:
        """What is mapped for an access: start and size; None where the kernel maps nothing there."""
        for start, size in self.mappable:
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
            if window[0] == start:  # another thread was first
                return window
        if self._device.windows.low_power:
            return None
        self._check_decoding()
        fd, kernel = self._device.fd, self._device.kernel
        try:
            registers = kernel.registers(fd, self.info.offset + start, align_up(size, PAGE_SIZE))
        except OSError as error:
            raise self._explain(error, "mmap", start, size) from error
        window, windows = (start, start + size, registers), [*self._windows]
        insort(windows, window, key=_start)
        self._windows = windows
        return window

    @guarded
    def _cell(self, offset: int, width: int) -> Cell | None:
        """A register in a window, which is mapped for it; None where no memory can be mapped."""
        window = self._window(offset, width)
        return None if window is None else window[2].cell(offset - window[0], width)

    @property
    def mappable(self) -> tuple[tuple[int, int], ...]:
        """The parts that can be mapped, each (offset, size) in whole pages: all of it, or what the kernel lists.

        A BAR smaller than a page is one part where the kernel maps it: where nothing else is in that page
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
        """Map `[offset, offset + size)` into this process; both multiples of the page size; default: all of it.

        A region smaller than a page is mapped as a whole. Closing the device closes the mapping, too.
        Raises UnsupportedError when that part cannot be mapped, VfioError when the device does not answer (memory
        decoding is off: a touch would be SIGBUS).
        """
        if offset == 0 and size is None and not self.mappable:
            raise UnsupportedError(f"{self._name}, of {self.size:#x} bytes, cannot be mapped; use read32 and its kin")
        offset = index(offset)
        size = self.size - offset if size is None else index(size)
        self._check_span(offset, size)
        if (not is_aligned(offset | size, PAGE_SIZE) and size != self.size) or size == 0:
            raise ValueError(f"offset and size must be multiples of {PAGE_SIZE} bytes, not {offset:#x} and {size:#x}")
        if not any(start <= offset and offset + size <= start + length for start, length in self.mappable):
            raise UnsupportedError(f"{self._name} cannot be mapped at {offset:#x}-{offset + size - 1:#x}")
        self._check_decoding()
        if self._device.windows.low_power:
            raise VfioError(
                f"{self._device.bdf} is in a low-power state, so {self._name} cannot be mapped",
                hint="Leave the low-power state first; read32 and its kin wake the device for each access",
            )
        mapped = RegionMap(self, vaddr=self._mmap(offset, size), size=size)
        self.maps.append(mapped)
        return mapped

    def _mmap(self, offset: int, size: int) -> int:
        flags = self.info.flags
        protection = bool(flags & ioctls.VFIO_REGION_INFO_FLAG_READ) * _PROT_READ
        protection |= bool(flags & ioctls.VFIO_REGION_INFO_FLAG_WRITE) * _PROT_WRITE
        fd, kernel = self._device.fd, self._device.kernel
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
        names = [index.name for index in ioctls.VfioPciRegionIndex]
        index = self.info.index
        name = names[index].removeprefix("VFIO_PCI_").removesuffix("_REGION_INDEX") if index < len(names) else "region"
        return f"{name} (region {index}) of {self._device.bdf}"

    def __repr__(self) -> str:
        return f"<Region {self._name} size={self.size:#x} {self.info.flags!s}>"

    def _check_decoding(self) -> None:
        if self._device.windows.ended:
            raise ClosedError(f"device {self._device.bdf} is being closed")
        if self.info.index <= ioctls.VFIO_PCI_BAR5_REGION_INDEX:
            self._device.check_decoding(self._name)

    def _check_span(self, offset: int, size: int) -> None:
        if self.size == 0:
            raise ValueError(f"{self.info.index} is a region that {self._device.bdf} does not have: it has 0 bytes")
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"{self._name} has {self.size:#x} bytes: no {size:#x} at {offset:#x}")

    def _check_access(self, offset: int, width: int) -> None:
        self._check_span(offset, width)
        if offset % width:
            raise ValueError(f"an access of {width} bytes at {offset:#x} is misaligned")

    def _check_value(self, offset: int, width: int, value: int) -> tuple[int, int]:
        offset, value = index(offset), index(value)
        self._check_access(offset, width)
        if not 0 <= value < 1 << 8 * width:
            raise ValueError(f"{value:#x} does not fit {width} bytes")
        return offset, value

    def _checked(self, offset: int, data: bytes | bytearray | memoryview) -> tuple[int, bytes]:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data must be bytes, not {type(data).__name__}")
        offset, data = index(offset), bytes(data)
        self._check_span(offset, len(data))
        return offset, data

    @property
    def in_use(self) -> bool:
        """Whether a view of a mapping of it lives."""
        return any(mapped.in_use for mapped in tuple(self.maps))

    def check_views(self) -> None:
        """Raise BufferError while a view of a mapping of it lives."""
        for mapped in tuple(self.maps):
            mapped.check_views()

    @guarded
    def add_dependent(self, close: Callable[[], object]) -> None:
        """Have `close` called before the region goes. For the library.

        Raises VfioError where the device does not answer (memory decoding is off), ClosedError; HandOverError while the
        device is handed over, since the other process would not know.
        """
        self._device.group.check_here()
        self._check_decoding()
        self.dependents.append(close)

    @property
    def has_dependents(self) -> bool:
        """Whether another device's DMA reaches the region through a mapping."""
        return bool(self.dependents)

    @uninterrupted()
    def close_dependents(self) -> None:
        """End the DMA of other devices to the region. For the library; the caller holds no lock, since those of mappers
        are above.

        Raises what the closes raise, after all were tried.
        """
        attempt_all(f"unmapping {self._name} from other devices", tuple(reversed(self.dependents)))

    def close(self) -> None:
        """Unmap it from other devices and from this process, all its mappings included.

        It can be used again. Where another device cannot be kept from the region, nothing else is unmapped, and the
        error is raised. Raises BufferError while a view lives, after the rest has been unmapped.

        Synchronization: any thread, and a finalizer, whose close is put off until the call that it came into ends.
        """
        run_outside_or_in_hook(self._close)

    def _close(self) -> None:
        self.close_dependents()
        while not self._drop_unless_reached():
            self.close_dependents()  # another thread has mapped it meanwhile

    @guarded
    def _drop_unless_reached(self) -> bool:
        if self.dependents:
            return False
        self.drop(keep="no maps")
        return True

    @guarded
    def drop(self, *, keep: Keep) -> None:
        """Drop the windows, and close all mappings but those to keep: the one place where windows are dropped.

        Raises BufferError where one that has a view is not kept, after the rest has been unmapped.
        """
        windows, self._windows = self._windows, []
        closes = [registers.close for _start, _end, registers in windows]
        maps = [] if keep == "all maps" else [each for each in self.maps if keep == "no maps" or not each.in_use]
        attempt_all(f"unmapping {self._name}", [*closes, *(partial(close_now, mapped) for mapped in maps)])


def _start(window: _Window) -> int:
    return window[0]
