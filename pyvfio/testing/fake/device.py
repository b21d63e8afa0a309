"""A PCI device bound to a VFIO driver: what a test declares, and what its descriptors answer.

`FakeDevice` and `Bar` are declarations. `PciDevice` is the live thing behind all descriptors of one device. A device
that does something, with registers, interrupts and DMA, is a `FakePciDevice` (`pci_device`).

Source: drivers/vfio/pci/vfio_pci_core.c, vfio_pci_rdwr.c, vfio_pci_config.c.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from pyvfio import ioctls
from pyvfio.kernel import LinuxKernel, Registers
from pyvfio.testing.fake.irqs import Irqs
from pyvfio.testing.fake.power import Power
from pyvfio.testing.fake.process import DEVICE_MEMORY, Argument, refuse
from pyvfio.testing.fake.type1 import info_write_back
from pyvfio.testing.fake.versions import KernelVersion
from pyvfio.units import MIB, PAGE_SIZE, align_up, is_power_of_two

_BDF = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_REGION_SHIFT = 40  # VFIO_PCI_OFFSET_SHIFT
_ROM = int(ioctls.VFIO_PCI_ROM_REGION_INDEX)
_CONFIG = int(ioctls.VFIO_PCI_CONFIG_REGION_INDEX)
_COMMAND = 4
_COMMAND_MEMORY = 2
_COMMAND_MASTER = 4
_COMMAND_INTX_DISABLE = 0x400
_COMMAND_BITS = 0x77F  # the others are reserved (PCI 3.0, 6.2.2); a device may have fewer
_BARS_AT = 0x10
_IO_BAR = 1
# Bytes of the configuration header that a user may change: command, cache line and latency, BARs, interrupt line.
_WRITABLE = frozenset((4, 5, 0x0C, 0x0D, *range(0x10, 0x28), 0x3C))
_READ_WRITE = int(ioctls.VFIO_REGION_INFO_FLAG_READ | ioctls.VFIO_REGION_INFO_FLAG_WRITE)
_MMAP = int(ioctls.VFIO_REGION_INFO_FLAG_MMAP)
_CAPS = int(ioctls.VFIO_REGION_INFO_FLAG_CAPS)
_MSIX_ENTRY = 16
_REGION = struct.Struct("=IIIIQQ")
_IRQ = struct.Struct("=IIII")
_SPARSE = struct.Struct("=HHIII")
_STATUS = 6
_STATUS_CAP_LIST = 0x10
_CAPABILITY_LIST = 0x34
_PM = 1
_PM_CONTROL = 4
_D3HOT = 3
# What the kernel answers itself, and a device that has gone keeps: vendor, device, BARs, the list, the interrupt.
_VIRTUAL = frozenset((*range(4), *range(0x10, 0x28), *range(0x2C, 0x34), 0x34, 0x3C, 0x3D))

_Read = Callable[[int, int], int]
_Write = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True)
class Bar:
    """A BAR of `size` bytes (a power of two), of memory or (`io`) of I/O ports. Plain memory, unless
    `read(offset, width)` and `write(offset, width, value)` are given: then every register access calls them.

    `own_page`: nothing else is in the page of a BAR that is smaller, so that the kernel maps it. `sparse`: the parts
    that may be mapped, as (offset, size); None: all of it. Some drivers beside vfio-pci name parts.
    """

    size: int
    read: _Read | None = None
    write: _Write | None = None
    io: bool = False
    own_page: bool = False
    sparse: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if not is_power_of_two(self.size):
            raise ValueError(f"a BAR's size is a power of two, not {self.size:#x}")
        for offset, size in self.sparse or ():
            if not 0 <= offset <= self.size - size or size < 0:
                raise ValueError(f"{size:#x} bytes at {offset:#x} cannot be mapped of a BAR of {self.size:#x}")
        if self.io and (self.own_page or self.sparse is not None):
            raise ValueError("I/O ports cannot be mapped")
        if (self.read is None) != (self.write is None):
            raise ValueError("a BAR has both callbacks, read and write, or none")


@dataclass(frozen=True)
class FakeDevice:
    """A PCI device to be declared to a FakeKernel; as it stands, it looks like QEMU's edu, with memory in its BAR.

    `driver` is what it is bound to (None: nothing); `intx` whether it has a pin; `msi` and `msix` count vectors, and
    `msix_bar` is where the MSI-X table lies, at `msix_offset` (None: where no access meets it). `reset` is called after
    VFIO_DEVICE_RESET, and when a `resettable` device is opened, as VFIO does. `config` has read-only bytes of
    configuration space by offset. `sriov`: it is a physical function with SR-IOV; `pf`: it is a virtual function of the
    device at that address. ValueError for what no device can be.
    """

    bdf: str
    driver: str | None = "vfio-pci"
    vendor: int = 0x1234
    device: int = 0x11E8
    class_code: int = 0x00FF00
    bars: Mapping[int, Bar] = field(default_factory=lambda: {0: Bar(MIB)})
    intx: bool = True
    msi: int = 1
    msix: int = 0
    msix_bar: int | None = None
    msix_offset: int | None = None
    resettable: bool = False
    reset: Callable[[], None] | None = None
    pcie: bool = False
    numa_node: int = -1
    config: Mapping[int, bytes] = field(default_factory=dict)
    sriov: bool = False
    pf: str | None = None

    def __post_init__(self) -> None:
        if not _BDF.fullmatch(self.bdf):
            raise ValueError(f"{self.bdf!r} is not a PCI address like 0000:00:02.0")
        for name, value, bits in (
            ("vendor", self.vendor, 16),
            ("device", self.device, 16),
            ("class", self.class_code, 24),
        ):
            if not 0 <= value < 1 << bits:
                raise ValueError(f"{self.bdf}: {value:#x} is no {name}, which has {bits} bits")
        self._check_bars()
        self._check_vectors()
        for (before, data), (offset, _data) in pairwise(sorted(self.config.items())):
            if before + len(data) > offset:
                raise ValueError(
                    f"{self.bdf}: {len(data)} bytes of configuration space at {before:#x} reach {offset:#x}"
                )
        for offset, data in self.config.items():
            if not 0 <= offset <= self.config_size - len(data) or _WRITABLE & set(range(offset, offset + len(data))):
                raise ValueError(f"{self.bdf}: {len(data)} bytes of configuration space at {offset:#x} cannot be given")

    def _check_bars(self) -> None:
        if not set(self.bars) <= set(range(_ROM)):
            raise ValueError(f"{self.bdf}: BARs are numbered 0 to 5, not {sorted(self.bars)}")
        for number, bar in self.bars.items():
            if not isinstance(bar, Bar) or bar.size > 1 << _REGION_SHIFT:
                raise ValueError(f"{self.bdf}: BAR {number} is a Bar of at most 2^{_REGION_SHIFT} bytes, not {bar!r}")

    def _check_vectors(self) -> None:
        if self.msi and (not is_power_of_two(self.msi) or self.msi > 32):
            raise ValueError(f"{self.bdf}: a device has 1, 2, 4 … 32 MSI vectors, not {self.msi}")
        if not 0 <= self.msix <= 2048:
            raise ValueError(f"{self.bdf}: a device has at most 2048 MSI-X vectors, not {self.msix}")
        if self.msix_bar is None and self.msix_offset is not None:
            raise ValueError(f"{self.bdf}: an MSI-X table at {self.msix_offset:#x} of no BAR: say msix_bar")
        if self.msix_bar is None:
            return
        if not self.msix:
            raise ValueError(f"{self.bdf}: an MSI-X table in BAR {self.msix_bar}, and no MSI-X vectors")
        if self.msix_bar not in self.bars:
            raise ValueError(f"{self.bdf}: the MSI-X table is in BAR {self.msix_bar}, which is not there")
        end, size = (self.msix_offset or 0) + _MSIX_ENTRY * self.msix, self.bars[self.msix_bar].size
        if end > size:
            raise ValueError(
                f"{self.bdf}: an MSI-X table of {self.msix} vectors ends at {end:#x}, and BAR {self.msix_bar} "
                f"at {size:#x}"
            )

    @property
    def config_size(self) -> int:
        """How many bytes of configuration space it has."""
        return 4096 if self.pcie else 256

    def msix_table(self, bar: int) -> range:
        """Which bytes of a BAR are the MSI-X table, which VFIO keeps for itself."""
        if self.msix_offset is None or bar != self.msix_bar:
            return range(0)
        return range(self.msix_offset, self.msix_offset + _MSIX_ENTRY * self.msix)

    def config_space(self) -> bytearray:
        """Configuration space as it is after VFIO enabled the device: memory decoding on, bus master off."""
        space = bytearray(self.config_size)
        struct.pack_into("<HHH", space, 0, self.vendor, self.device, _COMMAND_MEMORY)
        space[9:12] = self.class_code.to_bytes(3, "little")
        space[0x3D] = int(self.intx)
        for number, bar in self.bars.items():
            space[_BARS_AT + 4 * number] = _IO_BAR if bar.io else 0
        for offset, data in self.config.items():
            space[offset : offset + len(data)] = data
        return space


def is_vfio_driver(driver: str | None) -> bool:
    """Whether a driver gives its devices to user space."""
    return driver is not None and ("vfio-pci" in driver or "vfio_pci" in driver)


class CallbackRegisters:
    """Registers that call a Bar's callbacks; `start` is where the window begins in the BAR.

    Synchronization: `lock` is the fake kernel's, so that no access goes on when `close` has returned.
    """

    def __init__(self, *, start: int, read: _Read, write: _Write, lock: AbstractContextManager[object]) -> None:
        self._start = start
        self._read = read
        self._write = write
        self._lock = lock
        self._closed = False

    def read(self, offset: int, width: int) -> int:
        """Call the BAR's `read`."""
        with self._lock:
            self._check_open()
            return self._read(self._start + offset, width)

    def write(self, offset: int, width: int, value: int) -> None:
        """Call the BAR's `write`."""
        with self._lock:
            self._check_open()
            self._write(self._start + offset, width, value)

    def cell(self, offset: int, width: int) -> None:
        """None: these registers are no memory."""

    def close(self) -> None:
        """Nothing was mapped; each later access is ValueError."""
        with self._lock:
            self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("operation forbidden on a register window that was closed")


class PciDevice:
    """A device while it is there. Its `descriptors` are one memory file, laid out as VFIO lays out a device, a region
    every 2^40 bytes, so that they can be really mapped, read and written."""

    def __init__(self, declared: FakeDevice, version: KernelVersion, lock: threading.RLock) -> None:
        self.declared = declared
        self.driver = declared.driver
        self.descriptors: set[int] = set()
        self.power = Power()
        self.config = declared.config_space()
        self.gone = False
        """Whether it was pulled out."""
        self.vf_token: bytes | None = None
        self.renew_vf_token()
        self._version = version
        has_err = declared.pcie or version.err_irq_always
        counts = (int(declared.intx), declared.msi, declared.msix, int(has_err), 1)
        self._has_err = has_err
        self.irqs = Irqs(version=version, counts=counts, lock=lock)
        self.on_bars_gone: Callable[[str, str], object] = lambda _call, _bdf: None
        """Called with what ends the device's answers in its BARs, and with its address."""
        self.requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_DEVICE_GET_INFO: ("VFIO_DEVICE_GET_INFO", self.get_info),
            ioctls.VFIO_DEVICE_GET_REGION_INFO: ("VFIO_DEVICE_GET_REGION_INFO", self.get_region_info),
            ioctls.VFIO_DEVICE_GET_IRQ_INFO: ("VFIO_DEVICE_GET_IRQ_INFO", self.get_irq_info),
            ioctls.VFIO_DEVICE_SET_IRQS: ("VFIO_DEVICE_SET_IRQS", self.irqs.set_irqs),
            ioctls.VFIO_DEVICE_RESET: ("VFIO_DEVICE_RESET", self.reset),
        }

    @property
    def bdf(self) -> str:
        """Its PCI address."""
        return self.declared.bdf

    @property
    def command(self) -> int:
        """PCI COMMAND."""
        return int.from_bytes(self.config[_COMMAND : _COMMAND + 2], "little")

    @property
    def bus_master(self) -> bool:
        """Whether it may do DMA."""
        return bool(self.command & _COMMAND_MASTER) and not self.gone

    @property
    def decodes(self) -> bool:
        """Whether it answers in its memory BARs, so that the kernel lets them be accessed
        (`__vfio_pci_memory_enabled`)."""
        at = self._power_control()
        powered = not at or self.config[at] & _D3HOT != _D3HOT
        return bool(self.descriptors and self.command & _COMMAND_MEMORY) and powered

    def _power_control(self) -> int:
        """Where the control register of power management is in configuration space; 0 where there is none."""
        space = self.declared.config_space()
        at, seen = space[_CAPABILITY_LIST] if space[_STATUS] & _STATUS_CAP_LIST else 0, set[int]()
        while at and at not in seen:
            if space[at] == _PM:
                return at + _PM_CONTROL
            seen.add(at)
            at = space[at + 1]
        return 0

    def pull_out(self) -> None:
        """The device goes without a word: nothing answers any more."""
        self.gone = True
        for fd in tuple(self.descriptors)[:1]:
            for number, bar in self.declared.bars.items():
                if bar.read is None:  # what is mapped of it is this memory
                    os.pwrite(fd, b"\xff" * min(bar.size, 64 * MIB), number << _REGION_SHIFT)

    def renew_vf_token(self) -> None:
        """A driver has the device anew: its token, where it has one, is random (`vfio_pci_vf_init`)."""
        self.vf_token = os.urandom(16) if self.declared.sriov else None

    def check_vector(self, vector: int) -> None:
        """ValueError when it has no such interrupt."""
        count = max(self.declared.msi, self.declared.msix, 1)
        if not 0 <= vector < count:
            raise ValueError(f"{self.bdf} has interrupt vectors 0 to {count - 1}, not {vector}")

    def open(self) -> int:
        """A new file descriptor, not counted before `hold`; EMFILE."""
        if self.descriptors:
            return os.dup(next(iter(self.descriptors)))
        fd = os.memfd_create(f"{DEVICE_MEMORY} {self.bdf}")
        os.ftruncate(fd, ioctls.VFIO_PCI_NUM_REGIONS << _REGION_SHIFT)
        return fd

    def hold(self, fd: int) -> None:
        """A descriptor was given out. BARs and configuration are fresh at the first, for VFIO resets the device."""
        if not self.descriptors:
            self.config = self.declared.config_space()
            if self.declared.resettable and self.declared.reset is not None:
                self.declared.reset()
        self.descriptors.add(fd)

    def release(self, fd: int) -> None:
        """A descriptor was closed; at the last the device is off the bus (`vfio_pci_core_disable`)."""
        self.descriptors.discard(fd)
        if not self.descriptors:
            self.irqs.release()
            self.power.leave()
            self.config = self.declared.config_space()

    # ---------------------------------------------------------------------------------------------------- ioctls

    def get_info(self, argument: Argument) -> int:
        """`vfio_pci_ioctl_get_info`: EFAULT, EINVAL."""
        (argsz,) = struct.unpack("=I", argument.read(ioctls.VFIO_DEVICE_INFO_MINSZ)[:4])
        if argsz < ioctls.VFIO_DEVICE_INFO_MINSZ:
            refuse(errno.EINVAL)
        flags = int(ioctls.VFIO_DEVICE_FLAGS_PCI)
        if self.declared.resettable:
            flags |= ioctls.VFIO_DEVICE_FLAGS_RESET
        regions, irqs = ioctls.VFIO_PCI_NUM_REGIONS, ioctls.VFIO_PCI_NUM_IRQS
        answer = struct.pack("=IIIIII", argsz, flags, regions, irqs, 0, 0)
        argument.write(answer[: info_write_back(self._version, argsz)])
        return 0

    def get_region_info(self, argument: Argument) -> int:
        """`vfio_pci_ioctl_get_region_info`: EFAULT, EINVAL. `cap_offset` stays the caller's where there is none."""
        argsz, _flags, index, cap_offset, _size, _offset = _REGION.unpack(argument.read(_REGION.size))
        if argsz < _REGION.size or index >= ioctls.VFIO_PCI_VGA_REGION_INDEX:
            refuse(errno.EINVAL)
        flags, size = self._region(index)
        if flags & _CAPS:
            capability = self._capabilities(index)
            if argsz < _REGION.size + len(capability):
                argsz, cap_offset = _REGION.size + len(capability), 0
            else:
                cap_offset = _REGION.size
                argument.write(capability, cap_offset)
        argument.write(_REGION.pack(argsz, flags, index, cap_offset, size, index << _REGION_SHIFT))
        return 0

    def _region(self, index: int) -> tuple[int, int]:
        if index == _CONFIG:
            return _READ_WRITE, self.declared.config_size
        bar = self.declared.bars.get(index)
        if bar is None:
            return 0, 0
        flags = _READ_WRITE
        if (bar.size >= PAGE_SIZE or bar.own_page) and not bar.io:  # vfio_pci_probe_mmaps
            flags |= _MMAP | (_CAPS if self._capabilities(index) else 0)
        return flags, bar.size

    def _capabilities(self, index: int) -> bytes:
        """The chain behind the fixed structure of a BAR: the parts that may be mapped, and the MSI-X table."""
        sparse, chain = self.declared.bars[index].sparse, b""
        has_table = self.declared.msix and self.declared.msix_bar == index
        if sparse is not None:
            end = _REGION.size + _SPARSE.size + 16 * len(sparse)
            number = int(ioctls.VFIO_REGION_INFO_CAP_SPARSE_MMAP)
            chain += _SPARSE.pack(number, 1, end if has_table else 0, len(sparse), 0)
            chain += b"".join(struct.pack("=QQ", *area) for area in sparse)
        if has_table:
            chain += struct.pack("=HHI", ioctls.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, 1, 0)
        return chain

    def get_irq_info(self, argument: Argument) -> int:
        """`vfio_pci_ioctl_get_irq_info`: EFAULT, EINVAL."""
        argsz, _flags, index, _count = _IRQ.unpack(argument.read(_IRQ.size))
        if argsz < _IRQ.size or index >= ioctls.VFIO_PCI_NUM_IRQS:
            refuse(errno.EINVAL)
        if index == ioctls.VFIO_PCI_ERR_IRQ_INDEX and not self._has_err:
            refuse(errno.EINVAL)
        argument.write(_IRQ.pack(argsz, self.irqs.info(index)[0], index, self.irqs.info(index)[1]))
        return 0

    def reset(self, _argument: Argument) -> int:
        """`vfio_pci_ioctl_reset`: EINVAL. BARs are zero afterwards; mappings and interrupts stay."""
        if not self.declared.resettable:
            refuse(errno.EINVAL)
        if self.gone:  # no capability tells of a function-level reset; a bus can be reset all the same
            return refuse(errno.ENOTTY) if self.declared.pcie else 0
        self.clear()
        if at := self._power_control():  # vfio_pci_ioctl_reset wakes the device
            self.config[at] &= ~_D3HOT
        return 0

    def clear(self) -> None:
        """What any reset does to the device. One that nobody has open is fresh in any case when it is opened.

        COMMAND, BAR addresses and what signals which interrupt stay (`pci_dev_save_and_disable`, `pci_dev_restore`).
        """
        if not self.descriptors:
            return
        self.on_bars_gone("a reset", self.bdf)
        self.irqs.quieten()
        memory = next(iter(self.descriptors))
        os.ftruncate(memory, 0)
        os.ftruncate(memory, ioctls.VFIO_PCI_NUM_REGIONS << _REGION_SHIFT)
        if self.declared.reset is not None:
            self.declared.reset()

    # ------------------------------------------------------------------------------------- reading, writing, mmap

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """`vfio_pci_rw`: EINVAL, EIO (memory decoding is off), EFAULT (behind configuration space)."""
        if not size:
            return b""
        self.power.resume()
        index, position = self._locate(offset)
        if index == _CONFIG:
            self._check_config(position, size)
            places = range(position, position + size)
            return bytes(0xFF if self.gone and at not in _VIRTUAL else self.config[at] for at in places)
        bar, size = self._accessible(index, position, size)
        answer = b""
        for at, count, is_table in self._pieces(index, position, size):
            wide = self._version.eight_byte_access
            answer += b"\xff" * count if is_table else self._read(fd, bar, offset - position + at, count, wide=wide)
        return answer

    def _read(self, fd: int, bar: Bar, offset: int, size: int, *, wide: bool) -> bytes:
        if self.gone:
            return b"\xff" * size
        if bar.read is None:
            return os.pread(fd, size, offset)
        answer = b""
        for at, width in _accesses(self._locate(offset)[1], size, wide=wide):
            answer += (bar.read(at, width) & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        return answer

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """As `pread`; how many bytes were taken."""
        if not data:
            return 0
        self.power.resume()
        index, position = self._locate(offset)
        if index == _CONFIG:
            self._check_config(position, len(data))
            decoded = self.decodes
            for at, value in enumerate(data, start=position):
                if at in _WRITABLE:
                    self.config[at] = value
                elif at == self._power_control() and value & _D3HOT in (0, _D3HOT):  # the device has no D1 and no D2
                    self.config[at] = self.config[at] & ~_D3HOT | value & _D3HOT
            self._settle_header()
            if decoded and not self.decodes:
                self.on_bars_gone("a write to COMMAND", self.bdf)
            return len(data)
        bar, size = self._accessible(index, position, len(data))
        for at, count, is_table in self._pieces(index, position, size):
            if not is_table:
                piece = data[at - position : at - position + count]
                self._write(fd, bar, offset - position + at, piece, wide=self._version.eight_byte_access)
        return size

    def _write(self, fd: int, bar: Bar, offset: int, data: bytes, *, wide: bool) -> None:
        if self.gone:
            return
        if bar.write is None:
            os.pwrite(fd, data, offset)
            return
        start = self._locate(offset)[1]
        for at, width in _accesses(start, len(data), wide=wide):
            bar.write(at, width, int.from_bytes(data[at - start : at - start + width], "little"))

    def _pieces(self, index: int, position: int, size: int) -> Iterator[tuple[int, int, bool]]:
        # What lies before, in and behind the MSI-X table: start, size, and whether it is the table.
        table = self.declared.msix_table(index)
        cuts = sorted(
            {position, position + size, *(at for at in (table.start, table.stop) if at - position in range(size))}
        )
        return ((start, end - start, start in table) for start, end in pairwise(cuts))

    def load(self, offset: int, size: int) -> bytes:
        """What another device reads at `offset` of the device's file, in a BAR that may be mapped."""
        return self._read(next(iter(self.descriptors)), self._bar_at(offset), offset, size, wide=True)

    def store(self, offset: int, data: bytes) -> None:
        """What another device writes, as `load`."""
        self._write(next(iter(self.descriptors)), self._bar_at(offset), offset, data, wide=True)

    def _bar_at(self, offset: int) -> Bar:
        return self.declared.bars[self._locate(offset)[0]]

    def _settle_header(self) -> None:
        # What hardware does with bits that are not there, vfio_bar_fixup with those that say a BAR's size, and
        # vfio_basic_config_write with the one that masks INTx.
        struct.pack_into("<H", self.config, _COMMAND, self.command & _COMMAND_BITS)
        for number in range(_ROM):
            at, bar = _BARS_AT + 4 * number, self.declared.bars.get(number)
            (value,) = struct.unpack_from("<I", self.config, at)
            value = 0 if bar is None else value & -bar.size & -4 | (_IO_BAR if bar.io else 0)
            struct.pack_into("<I", self.config, at, value & 0xFFFF_FFFF)
        self.irqs.set_intx_disable(disabled=bool(self.command & _COMMAND_INTX_DISABLE))

    def _locate(self, offset: int) -> tuple[int, int]:
        index = offset >> _REGION_SHIFT
        if index >= ioctls.VFIO_PCI_NUM_REGIONS:
            refuse(errno.EINVAL)
        return index, offset & ((1 << _REGION_SHIFT) - 1)

    def _check_config(self, position: int, size: int) -> None:
        if position + size > self.declared.config_size:
            refuse(errno.EFAULT)

    def _accessible(self, index: int, position: int, size: int) -> tuple[Bar, int]:
        bar = self.declared.bars.get(index)
        if bar is None or position >= bar.size:
            refuse(errno.EINVAL)
        if not bar.io and not self.decodes:
            refuse(errno.EIO)
        return bar, min(size, bar.size - position)

    def check_mmap(self, offset: int, size: int) -> int:
        """`vfio_pci_core_mmap` for a shared mapping: EINVAL unless it lies in a BAR that may be mapped; its index."""
        index, position = self._locate(offset)
        flags, region_size = self._region(index)
        if not flags & _MMAP:
            refuse(errno.EINVAL)
        areas = self.declared.bars[index].sparse
        for start, length in ((0, region_size),) if areas is None else areas:
            if start <= position and position + size <= start + align_up(length, PAGE_SIZE):
                return index
        return refuse(errno.EINVAL)

    def registers(
        self, linux: LinuxKernel, fd: int, offset: int, size: int, *, lock: AbstractContextManager[object]
    ) -> Registers:
        """The BAR's callbacks, or a real mapping of its plain memory; EINVAL as mmap."""
        bar = self.declared.bars[self.check_mmap(offset, size)]
        if bar.read is None or bar.write is None:
            return linux.registers(fd, offset, size)
        start = self._locate(offset)[1]
        return CallbackRegisters(
            start=start, read=partial(self._load, bar.read), write=partial(self._store, bar.write), lock=lock
        )

    def _load(self, read: _Read, offset: int, width: int) -> int:
        self.power.check_touch(f"a BAR of {self.bdf}")
        return (1 << 8 * width) - 1 if self.gone else read(offset, width)

    def _store(self, write: _Write, offset: int, width: int, value: int) -> None:
        self.power.check_touch(f"a BAR of {self.bdf}")
        if not self.gone:
            write(offset, width, value)


def _accesses(position: int, size: int, *, wide: bool) -> list[tuple[int, int]]:
    # vfio_pci_core_do_io_rw takes the widest aligned access that fits.
    widths = (8, 4, 2, 1) if wide else (4, 2, 1)
    done, end = [], position + size
    while position < end:
        width = next(w for w in widths if position % w == 0 and position + w <= end)
        done.append((position, width))
        position += width
    return done
