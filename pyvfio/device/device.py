"""A VFIO PCI device: its regions, registers, configuration space and interrupts, and the one call that opens it all.

Source: Documentation/driver-api/vfio.rst; drivers/vfio/pci/vfio_pci_core.c, vfio_pci_rdwr.c and vfio_pci_intrs.c.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from pyvfio import caps, ioctls, pci
from pyvfio.container import Container, Group
from pyvfio.errors import ClosedError, NotBoundError, UnsupportedError, VfioError
from pyvfio.handle import Handle, attempt_all
from pyvfio.kernel import Kernel, LinuxKernel, Registers
from pyvfio.memory import Exports
from pyvfio.units import PAGE_SIZE, align_down, align_up, is_aligned

logger = logging.getLogger(__name__)

PCI_COMMAND = 0x04  # linux/pci_regs.h
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4

_INFO_MAX = 1 << 20
_WIDTHS = (1, 2, 4, 8)
_PROT_READ, _PROT_WRITE, _MAP_SHARED = 1, 2, 1


@dataclass(frozen=True, slots=True)
class DependentDevice:
    """A device that a hot reset reaches besides the one that was asked."""

    group: int
    bdf: str


class RegionMap:
    """A part of a region mapped into this process: what `Region.mmap` returns.

    Loads and stores through `view()` have whatever width Python chooses to copy with; use `Region.read32` and the like
    for registers. On a fake device this is memory without side effects.

    Synchronization: none.
    """

    def __init__(self, region: Region, *, vaddr: int, size: int) -> None:
        self._region = region
        self._exports = Exports()
        self._vaddr = vaddr
        self.size = size

    @property
    def vaddr(self) -> int:
        """Where it begins in this process. Raises ClosedError, and ForkedError in a child."""
        assert self._region._device.fd >= 0  # raises where it must not be used
        if self._vaddr == 0:
            raise ClosedError("this mapping of a region has been closed")
        return self._vaddr

    def view(self) -> memoryview:
        """A writable memoryview of it; while one lives, `close` raises BufferError."""
        return self._exports.view(self.vaddr, self.size)

    def close(self) -> None:
        """Unmap it; twice is fine, and in a forked child nothing happens. Raises BufferError while a view lives."""
        if self._vaddr == 0 or self._region._device._forked:
            return
        self._check_views()
        vaddr, self._vaddr = self._vaddr, 0
        self._region._maps.remove(self)
        self._region._device.kernel.munmap(vaddr, self.size)

    def _check_views(self) -> None:
        if self._exports.end():
            raise BufferError(f"a view of {self._region._name} is still alive; release it first")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Region:
    """A region of a device: a BAR, the ROM, configuration space, or one of the driver's own.

    `read32` and its kin make one access of exactly that width: a load or store where the region can be mapped, else one
    pread or pwrite. Numbers are little-endian, as PCI is; offsets are in bytes and multiples of the width.

    Raises ValueError for offsets outside and misaligned ones, before any system call; OSError from the kernel (EIO:
    memory decoding is off).

    Synchronization: none needed; each access is one instruction or one system call.
    """

    def __init__(self, device: Device, info: caps.RegionInfo) -> None:
        self._device = device
        self.info = info
        self._windows: list[tuple[int, int, Registers]] = []  # start, end, registers
        self._maps: list[RegionMap] = []  # each keeps the device's group open in the kernel

    @property
    def size(self) -> int:
        """In bytes; 0 for a BAR that the device does not have."""
        return self.info.size

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes, in accesses whose width the kernel chooses."""
        self._check_span(offset, size)
        data = self._device.kernel.pread(self._device.fd, size, self.info.offset + offset)
        if len(data) != size:
            raise VfioError(f"{self._name} gave {len(data)} of {size} bytes at {offset:#x}")
        return data

    def write(self, offset: int, data: bytes) -> None:
        """All of `data`, in accesses whose width the kernel chooses."""
        self._check_span(offset, len(data))
        written = self._device.kernel.pwrite(self._device.fd, data, self.info.offset + offset)
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

    def _load(self, offset: int, width: int) -> int:
        self._check_access(offset, width)
        if (window := self._window(offset, width)) is not None:
            start, _end, registers = window
            return registers.read(offset - start, width)
        return int.from_bytes(self.read(offset, width), "little")

    def _store(self, offset: int, width: int, value: int) -> None:
        self._check_access(offset, width)
        if not 0 <= value < 1 << 8 * width:
            raise ValueError(f"{value:#x} does not fit {width} bytes")
        if (window := self._window(offset, width)) is not None:
            start, _end, registers = window
            registers.write(offset - start, width, value)
        else:
            self.write(offset, value.to_bytes(width, "little"))

    def _window(self, offset: int, width: int) -> tuple[int, int, Registers] | None:
        fd = self._device.fd  # raises ClosedError or ForkedError, also where the window would still be there
        for window in self._windows:
            if window[0] <= offset and offset + width <= window[1]:
                return window
        for start, size in self.mappable:
            if start <= offset and offset + width <= start + size:
                self._check_decoding()
                registers = self._device.kernel.registers(fd, self.info.offset + start, size)
                self._windows.append((start, start + size, registers))
                return self._windows[-1]
        return None

    @property
    def mappable(self) -> tuple[tuple[int, int], ...]:
        """The parts that can be mapped, each (offset, size) in whole pages: all of it, or what the kernel lists."""
        if not self.info.flags & ioctls.VFIO_REGION_INFO_FLAG_MMAP:
            return ()
        areas = ((0, self.size),) if self.info.sparse is None else self.info.sparse
        pages = ((align_up(start, PAGE_SIZE), align_down(start + size, PAGE_SIZE)) for start, size in areas)
        return tuple((start, end - start) for start, end in pages if start < end)

    def mmap(self, offset: int = 0, size: int | None = None) -> RegionMap:
        """Map `[offset, offset + size)` into this process; both multiples of the page size; default: all of it.

        Closing the device closes it, too. Raises UnsupportedError when that part cannot be mapped, VfioError when the
        device does not answer (memory decoding is off: a touch would be SIGBUS).
        """
        if offset == 0 and size is None and not self.mappable:
            raise UnsupportedError(f"{self._name}, of {self.size:#x} bytes, cannot be mapped; use read32 and its kin")
        size = self.size - offset if size is None else size
        self._check_span(offset, size)
        if not is_aligned(offset | size, PAGE_SIZE) or size == 0:
            raise ValueError(f"offset and size must be multiples of {PAGE_SIZE} bytes, not {offset:#x} and {size:#x}")
        if not any(start <= offset and offset + size <= start + length for start, length in self.mappable):
            raise UnsupportedError(f"{self._name} cannot be mapped at {offset:#x}-{offset + size - 1:#x}")
        self._check_decoding()
        flags = self.info.flags
        protection = bool(flags & ioctls.VFIO_REGION_INFO_FLAG_READ) * _PROT_READ
        protection |= bool(flags & ioctls.VFIO_REGION_INFO_FLAG_WRITE) * _PROT_WRITE
        vaddr = self._device.kernel.mmap(
            0, size, protection, _MAP_SHARED, fd=self._device.fd, offset=self.info.offset + offset
        )
        mapped = RegionMap(self, vaddr=vaddr, size=size)
        self._maps.append(mapped)
        return mapped

    @property
    def _name(self) -> str:
        names = [index.name for index in ioctls.VfioPciRegionIndex]
        index = self.info.index
        name = names[index].removeprefix("VFIO_PCI_").removesuffix("_REGION_INDEX") if index < len(names) else "region"
        return f"{name} (region {index}) of {self._device.bdf}"

    def __repr__(self) -> str:
        return f"<Region {self._name} size={self.size:#x} {self.info.flags!s}>"

    def _check_decoding(self) -> None:
        if self.info.index <= ioctls.VFIO_PCI_BAR5_REGION_INDEX and not self._device.memory_enabled:
            raise VfioError(
                f"{self._device.bdf} does not decode memory accesses, so {self._name} cannot be reached",
                hint="device.memory_enabled = True; if it stays off, the device may be in a low-power state",
            )

    def _check_span(self, offset: int, size: int) -> None:
        if self.size == 0:
            raise ValueError(f"{self.info.index} is a region that {self._device.bdf} does not have: it has 0 bytes")
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"{self._name} has {self.size:#x} bytes: no {size:#x} at {offset:#x}")

    def _check_access(self, offset: int, width: int) -> None:
        self._check_span(offset, width)
        if offset % width:
            raise ValueError(f"an access of {width} bytes at {offset:#x} is misaligned")

    def _close(self) -> None:
        windows, self._windows = self._windows, []
        closes = [registers.close for _start, _end, registers in windows]
        attempt_all(f"unmapping {self._name}", [*closes, *(mapped.close for mapped in tuple(self._maps))])


class Irq:
    """One kind of interrupt of a device: INTx, MSI, MSI-X, error or request; signalled through eventfds.

    Synchronization: `wait` may be called from any thread; enabling and disabling are the caller's to order, and
    disabling does not wake who waits. Cost: an ioctl each; `wait` polls and reads. Source: `vfio_pci_set_irqs_ioctl`.
    """

    def __init__(self, device: Device, info: caps.IrqInfo) -> None:
        self._device = device
        self.info = info
        self.fds: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many vectors the device has of this kind; 0: none."""
        return self.info.count

    def enable(self, vectors: int = 1) -> tuple[int, ...]:
        """Route the first `vectors` vectors to new eventfds, which are returned and closed by `disable`.

        Raises ValueError for less than one, UnsupportedError when the device has fewer, VfioError when it is enabled
        already, IoctlError (EINVAL: another kind is enabled), OSError (EMFILE: no descriptor is left).
        """
        if vectors < 1:
            raise ValueError(f"at least one vector can be enabled, not {vectors}")
        if not 1 <= vectors <= self.count or not self.info.flags & ioctls.VFIO_IRQ_INFO_EVENTFD:
            raise UnsupportedError(
                f"{self._name} has {self.count} vectors, so {vectors} cannot be enabled",
                hint=f"This device has {self._device.describe_irqs()}",
            )
        if self.fds:
            raise VfioError(f"{self._name} is enabled already", hint="Call disable() first")
        kernel, fds = self._device.kernel, list[int]()
        try:
            for _ in range(vectors):
                fds.append(kernel.eventfd(0, os.EFD_NONBLOCK))
            self._route(fds)
        except BaseException:
            for fd in fds:
                kernel.close(fd)
            raise
        self.fds = tuple(fds)
        return self.fds

    def _route(self, fds: Sequence[int]) -> None:
        argument = ioctls.irq_set_eventfds(
            flags=ioctls.VFIO_IRQ_SET_DATA_EVENTFD | ioctls.VFIO_IRQ_SET_ACTION_TRIGGER,
            index=self.info.index,
            start=0,
            eventfds=fds,
        )
        available = self._set_irqs(argument)
        if available > 0:  # vfio_msi_enable: how many vectors there are, and none has been enabled
            raise UnsupportedError(f"{self._name}: only {available} of {len(fds)} vectors are available")

    def disable(self) -> None:
        """Stop all vectors and close the eventfds; twice is fine."""
        if not self.fds:
            return
        fds, self.fds = self.fds, ()
        stop = partial(self._act, ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=0, count=0)
        attempt_all(f"disabling {self._name}", [stop, *(partial(self._device.kernel.close, fd) for fd in fds)])

    def _forget(self) -> None:
        """Close the eventfds and leave the device as it is."""
        fds, self.fds = self.fds, ()
        attempt_all(f"forgetting {self._name}", [partial(self._device.kernel.close, fd) for fd in fds])

    def wait(self, vector: int = 0, *, timeout: float | None = None) -> int:
        """Wait until `vector` has been raised; how often since the last time, 0 when the time has passed.

        `timeout` in seconds; None or infinity: for ever; 0 or less: do not wait. INTx stays masked by the kernel after
        each: `unmask()`. Raises VfioError when that vector is not enabled, or is disabled meanwhile; ForkedError.
        """
        assert self._device.fd >= 0  # raises where it must not be used
        fd = self._eventfd(vector)
        if not self._device.kernel.poll(fd, _checked_timeout(timeout)):
            return 0
        if fd not in self.fds:  # its number may be another's by now
            raise VfioError(f"vector {vector} of {self._name} was disabled while it was waited for")
        try:
            return self._device.kernel.eventfd_read(fd)
        except BlockingIOError:  # another thread has read it
            return 0

    def _eventfd(self, vector: int) -> int:
        if not self.fds:
            raise VfioError(f"{self._name} is not enabled", hint="Call enable() first")
        if not 0 <= vector < len(self.fds):
            raise ValueError(f"of {self._name} vectors 0 to {len(self.fds) - 1} are enabled, not {vector}")
        return self.fds[vector]

    def trigger(self, vector: int = 0) -> None:
        """Signal the eventfd of `vector` as if the device had raised it. Raises as `wait`."""
        assert self._eventfd(vector) >= 0
        self._act(ioctls.VFIO_IRQ_SET_ACTION_TRIGGER, start=vector, count=1)

    def mask(self) -> None:
        """Mask INTx. Raises IoctlError (ENOTTY) for the other kinds."""
        self._act(ioctls.VFIO_IRQ_SET_ACTION_MASK, start=0, count=1)

    def unmask(self) -> None:
        """Unmask INTx, which the kernel masks at each interrupt. Raises IoctlError (ENOTTY) for the other kinds."""
        self._act(ioctls.VFIO_IRQ_SET_ACTION_UNMASK, start=0, count=1)

    @property
    def _name(self) -> str:
        return f"{ioctls.VfioPciIrqIndex(self.info.index).name} of {self._device.bdf}"

    def __repr__(self) -> str:
        return f"<Irq {self._name} {len(self.fds)} of {self.count} enabled>"

    def __del__(self) -> None:
        if getattr(self, "fds", ()) and not self._device._forked:
            for fd in self.fds:  # forgotten with its device, which closes only what is its own
                self._device.kernel.close(fd)

    def _act(self, action: int, *, start: int, count: int) -> None:
        size = ctypes.sizeof(ioctls.vfio_irq_set)
        flags = ioctls.VFIO_IRQ_SET_DATA_NONE | action
        self._set_irqs(ioctls.vfio_irq_set(size, flags, self.info.index, start, count))

    def _set_irqs(self, argument: ioctls.vfio_irq_set) -> int:
        hints = {
            errno.EINVAL: "Only one kind of interrupt can be enabled at a time, and only what is enabled can act",
            errno.ENOTTY: "Only INTx can be masked",
        }
        return self._device._ioctl(
            "VFIO_DEVICE_SET_IRQS",
            argument,
            hints=hints,
            flags=argument.flags,
            index=argument.index,
            start=argument.start,
            count=argument.count,
        )


class Device(Handle):
    """An open VFIO PCI device.

    `group` is attached to a container whose IOMMU is set. Raises IoctlError (ENODEV: not bound to vfio-pci), VfioError.
    `open_device` does all that comes before.

    Synchronization: as its regions and interrupts; opening and closing are the caller's to order.
    """

    def __init__(self, group: Group, bdf: str) -> None:
        bdf = pci.parse_bdf(bdf)
        self._begin(group, bdf, group.get_device_fd(bdf))
        try:
            self.info = self._get_info()
        except BaseException:
            self._close_fd()
            raise
        group.devices.append(self)

    def _begin(self, group: Group, bdf: str, fd: int) -> None:
        super().__init__(group.kernel, fd, f"device {bdf}")
        self.bdf = bdf
        self.group = group
        self._regions: dict[int, Region] = {}
        self._irqs: dict[int, Irq] = {}
        self._stack = ExitStack()  # what open_device opened for this device alone

    def _resume(self) -> None:
        """As another process has left it."""
        self.info = self._get_info()
        self.group.devices.append(self)

    def __repr__(self) -> str:
        return f"<Device {self.bdf} in group {self.group.number}{', closed' if self.closed else ''}>"

    @property
    def container(self) -> Container:
        """The container, which is the device's address space. Raises ClosedError."""
        if self.closed or self.group.container is None:
            raise ClosedError(f"device {self.bdf} has been closed")
        return self.group.container

    def _get_info(self) -> caps.DeviceInfo:
        return caps.parse_device_info(
            self._ask("VFIO_DEVICE_GET_INFO", bytearray(ctypes.sizeof(ioctls.vfio_device_info)))
        )

    def _ask(self, request: str, buffer: bytearray, *, index: int = 0) -> bytearray:
        """Ask until the capabilities fit; argsz is the first word of every structure."""
        while len(buffer) <= _INFO_MAX:
            buffer[:4] = len(buffer).to_bytes(4, "little")
            self._ioctl(request, buffer, index=index)
            needed = int.from_bytes(buffer[:4], "little")
            if needed <= len(buffer):
                return buffer
            buffer.extend(bytes(needed - len(buffer)))
        raise VfioError(f"{request} wants a buffer of {len(buffer)} bytes")

    def region(self, index: int) -> Region:
        """A region by its index (VFIO_PCI_BAR0_REGION_INDEX …). Raises ValueError for an index that the device does
        not have, IoctlError (EINVAL: the VGA region of another device).

        The first call of an index costs an ioctl or two.
        """
        if index not in self._regions:
            if not 0 <= index < self.info.num_regions:
                raise ValueError(f"{self.bdf} has regions 0 to {self.info.num_regions - 1}, not {index}")
            question = ioctls.vfio_region_info(index=index)
            answer = self._ask("VFIO_DEVICE_GET_REGION_INFO", bytearray(question), index=index)
            self._regions[index] = Region(self, caps.parse_region_info(answer))
        return self._regions[index]

    @property
    def config(self) -> Region:
        """PCI configuration space, as the kernel shows it to users."""
        return self.region(ioctls.VFIO_PCI_CONFIG_REGION_INDEX)

    def irq(self, index: int) -> Irq:
        """A kind of interrupt by its index (VFIO_PCI_MSI_IRQ_INDEX …). Raises ValueError for an index that the device
        does not have, IoctlError (EINVAL: the error interrupt of a conventional device)."""
        if index not in self._irqs:
            if not 0 <= index < self.info.num_irqs:
                raise ValueError(f"{self.bdf} has kinds of interrupt 0 to {self.info.num_irqs - 1}, not {index}")
            question = ioctls.vfio_irq_info(index=index)
            answer = self._ask("VFIO_DEVICE_GET_IRQ_INFO", bytearray(question), index=index)
            self._irqs[index] = Irq(self, caps.parse_irq_info(answer))
        return self._irqs[index]

    def describe_irqs(self) -> str:
        """How many vectors of each of the three usual kinds there are, in words."""
        kinds = (ioctls.VFIO_PCI_INTX_IRQ_INDEX, ioctls.VFIO_PCI_MSI_IRQ_INDEX, ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        return ", ".join(
            f"{self.irq(kind).count} {name}" for kind, name in zip(kinds, ("INTx", "MSI", "MSI-X"), strict=True)
        )

    @property
    def bus_master(self) -> bool:
        """Whether the device may do DMA (PCI COMMAND, bit 2). Off when the device is opened; set it to use DMA."""
        return bool(self.config.read16(PCI_COMMAND) & PCI_COMMAND_MASTER)

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self._set_command(PCI_COMMAND_MASTER, on=on)

    @property
    def memory_enabled(self) -> bool:
        """Whether the device answers in its memory BARs (PCI COMMAND, bit 1). A mapped BAR is SIGBUS if not."""
        return bool(self.config.read16(PCI_COMMAND) & PCI_COMMAND_MEMORY)

    @memory_enabled.setter
    def memory_enabled(self, on: bool) -> None:
        if not on:
            for region in self._regions.values():
                region._close()
        self._set_command(PCI_COMMAND_MEMORY, on=on)

    def _set_command(self, bit: int, *, on: bool) -> None:
        command = self.config.read16(PCI_COMMAND)
        self.config.write16(PCI_COMMAND, command | bit if on else command & ~bit)

    @property
    def can_reset(self) -> bool:
        """Whether the device has a reset of its own."""
        return bool(self.info.flags & ioctls.VFIO_DEVICE_FLAGS_RESET)

    def reset(self) -> None:
        """VFIO_DEVICE_RESET: DMA stops, registers go back; configuration space is kept, and so are DMA mappings.

        Raises UnsupportedError when the device has none.
        """
        assert self.fd >= 0  # raises where it must not be used
        if not self.can_reset:
            raise UnsupportedError(
                f"{self.bdf} has no reset of its own", hint="Clear bus_master to stop its DMA, or reset its bus"
            )
        self._ioctl("VFIO_DEVICE_RESET")

    def get_pci_hot_reset_info(self) -> tuple[DependentDevice, ...]:
        """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: all devices that a reset of this one's slot or bus reaches, itself too.

        Raises UnsupportedError when neither can be reset (a device on the root bus).
        """
        count = 0
        while True:
            answer = ioctls.pci_hot_reset_info(count=count)
            try:
                self._ioctl("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", answer, count=count)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise UnsupportedError(f"neither the slot nor the bus of {self.bdf} can be reset") from error
                if error.errno != errno.ENOSPC or answer.count <= count:
                    raise
                count = answer.count
                continue
            found: Sequence[ioctls.vfio_pci_dependent_device] = getattr(answer, "devices", ())
            return tuple(map(_dependent, found[: answer.count]))

    def close(self) -> None:
        """Stop interrupts and DMA, unmap regions, reset, close; then the container, where `open_device` opened it.

        Twice is fine; in a forked child nothing happens. Raises BufferError while a view of a mapped region lives, and
        then nothing has been closed; otherwise what the steps raise, after all of them were tried.
        """
        if self._forked or self.closed:
            return
        self.group._check_here()
        self._check_views()
        steps: list[Callable[[], object]] = [irq.disable for irq in self._irqs.values()]
        # Nothing may be under way when the mappings go: a device without a reset is kept from the bus.
        steps += [partial(self._set_command, PCI_COMMAND_MASTER, on=False), *([self.reset] if self.can_reset else [])]
        steps += [region._close for region in self._regions.values()]
        steps += [self._close_fd, partial(self.group.devices.remove, self), self._stack.close]
        attempt_all(f"closing device {self.bdf}", steps)

    def _check_views(self) -> None:
        for region in self._regions.values():
            for mapped in region._maps:
                mapped._check_views()

    def _forget(self) -> None:
        """Another process has it: nothing here may touch it, and what is closed is this process's share."""
        if self.closed:
            return
        steps: list[Callable[[], object]] = [irq._forget for irq in self._irqs.values()]
        steps += [region._close for region in self._regions.values()]
        steps += [self._close_fd, partial(self.group.devices.remove, self)]
        attempt_all(f"forgetting device {self.bdf}", steps)


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is None or timeout == math.inf:
        return None
    if math.isnan(timeout):
        raise ValueError("timeout is not a number")
    return max(float(timeout), 0.0)


def _dependent(found: ioctls.vfio_pci_dependent_device) -> DependentDevice:
    slot, function = found.devfn >> 3, found.devfn & 7
    return DependentDevice(found.group_id, f"{found.segment:04x}:{found.bus:02x}:{slot:02x}.{function}")


def open_device(
    bdf: str,
    *,
    container: Container | None = None,
    kernel: Kernel | None = None,
    iommu_type: ioctls.VfioExtension | None = None,
) -> Device:
    """Open a PCI device that is bound to vfio-pci: its group, a container with the IOMMU set, the device itself.

    `container`: put it there, beside what is in it (several groups, several devices of a group); else a new container
    is opened, and closed with the device. `kernel` is inherited from the container, or is the running one.

    Raises ValueError (no BDF), DeviceNotFoundError, NotBoundError, GroupNotViableError, GroupBusyError,
    AccessDeniedError, UnavailableError, UnsupportedError, IoctlError; nothing is left open then.

    Cost: some twenty system calls.
    """
    bdf = pci.parse_bdf(bdf)
    if not isinstance(container, Container | None):
        raise TypeError(f"container must be a Container, not {type(container).__name__}")
    if container is not None and iommu_type not in (None, container.iommu_type):
        raise ValueError(f"the container has {container.iommu_type.name}, so it cannot be {iommu_type!r}")
    kernel = container.kernel if container is not None else kernel or LinuxKernel()
    found = pci.read_device(kernel, bdf)
    number = pci.group_of(kernel, bdf)
    if not found.is_vfio:
        error = NotBoundError(
            f"{bdf} is bound to {found.driver or 'no driver'}, not to vfio-pci", hint=f"scripts/bind {bdf}"
        )
        error.driver = found.driver
        raise error
    with ExitStack() as undo:
        mine = container is None
        if container is None:
            container = undo.enter_context(Container(kernel=kernel, iommu_type=iommu_type))
        group = container.group(number)
        if group is None:
            group = Group(number, kernel=kernel)
            undo.callback(group.close)
            container.attach(group)
        device = Device(group, bdf)
        if mine:
            device._stack.callback(container.close)
        undo.pop_all()
    logger.debug("opened %s in group %d", bdf, number)
    return device
