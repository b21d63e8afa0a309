"""A PCI device bound to a VFIO driver: the declaration by a test, and the answers of the device's descriptors.

`FakeDevice` and `Bar` are declarations. `PciDevice` is the live object behind all descriptors of one device. A device
with behaviour (registers, interrupts, DMA) is a `FakePciDevice` (`pci_device`).

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
from pyvfio.testing.fake.callbacks import CallbackRegisters, Follower, ReadCallback, WriteCallback
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
# The kernel answers for these bytes, so that they outlive the device: vendor, device, BARs, capability list, interrupt.
_VIRTUAL = frozenset((*range(4), *range(0x10, 0x28), *range(0x2C, 0x34), 0x34, 0x3C, 0x3D))


@dataclass(frozen=True, slots=True)
class Bar:
    """A BAR of `size` bytes (a power of two), of memory or (`io`) of I/O ports.

    `read(offset, width)` and `write(offset, width, value)`: called for each register access. Without both, the BAR is
    plain memory. `own_page`: the page of a smaller BAR has no other BAR, so that the kernel maps the BAR. `sparse`: the
    parts that can be mapped, as (offset, size); None: the whole BAR. Some variant drivers of vfio-pci report parts.
    """

    size: int
    read: ReadCallback | None = None
    write: WriteCallback | None = None
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
    """A declared PCI device of a FakeKernel. With the defaults, the device looks like QEMU's edu with memory in BAR 0.

    `driver`: the driver of the device, or None. `intx`: whether the device has a pin. `msi` and `msix`: the numbers of
    vectors. `msix_bar`: the BAR of the MSI-X table, at `msix_offset` (None: no access hits it). `reset` is called after
    VFIO_DEVICE_RESET, and when a `resettable` device is opened, as VFIO does. `config` has read-only bytes of
    configuration space by offset. `sriov`: the device is a physical function with SR-IOV. `pf`: the address of the
    physical function, if the device is a virtual function. `follower`: an object that answers accesses in place of the
    fake, for `RecordedDevice`.

    Raises ValueError for a declaration that no device can have.
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
    follower: Follower | None = None

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
        """The size of configuration space in bytes."""
        return 4096 if self.pcie else 256

    def msix_table(self, bar: int) -> range:
        """Return the bytes of a BAR that hold the MSI-X table, which VFIO does not let user space access."""
        if self.msix_offset is None or bar != self.msix_bar:
            return range(0)
        return range(self.msix_offset, self.msix_offset + _MSIX_ENTRY * self.msix)

    def config_space(self) -> bytearray:
        """Return configuration space as after VFIO enabled the device: memory decoding on, bus mastering off."""
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
    """Return whether a driver lets user space open devices."""
    return driver is not None and ("vfio-pci" in driver or "vfio_pci" in driver)


class PciDevice:
    """A live device. All `descriptors` are one memory file with the layout of a VFIO device, a region every 2^40 bytes.

    A program can therefore map, read and write the file.
    """

    def __init__(self, declared: FakeDevice, version: KernelVersion, lock: threading.RLock) -> None:
        self.declared = declared
        self.driver = declared.driver
        self.descriptors: set[int] = set()
        self.power = Power()
        self.config = declared.config_space()
        self.gone = False
        """Whether the device was removed by surprise."""
        self.vf_token: bytes | None = None
        self.renew_vf_token()
        self._version = version
        has_err = declared.pcie or version.err_irq_always
        counts = (int(declared.intx), declared.msi, declared.msix, int(has_err), 1)
        self._has_err = has_err
        self.irqs = Irqs(version=version, counts=counts, lock=lock)
        self.on_bars_gone: Callable[[str, str], object] = lambda _call, _bdf: None
        """Called when the BARs of the device stop answering, with the cause and the address of the device."""
        self.requests: dict[int, tuple[str, Callable[[Argument], int]]] = {
            ioctls.VFIO_DEVICE_GET_INFO: ("VFIO_DEVICE_GET_INFO", self.get_info),
            ioctls.VFIO_DEVICE_GET_REGION_INFO: ("VFIO_DEVICE_GET_REGION_INFO", self.get_region_info),
            ioctls.VFIO_DEVICE_GET_IRQ_INFO: ("VFIO_DEVICE_GET_IRQ_INFO", self.get_irq_info),
            ioctls.VFIO_DEVICE_SET_IRQS: ("VFIO_DEVICE_SET_IRQS", self.set_irqs),
            ioctls.VFIO_DEVICE_RESET: ("VFIO_DEVICE_RESET", self.reset),
        }

    @property
    def bdf(self) -> str:
        """The PCI address of the device."""
        return self.declared.bdf

    @property
    def _follower(self) -> Follower | None:
        """The object that answers for the device; none for a device that has gone."""
        return None if self.gone else self.declared.follower

    @property
    def command(self) -> int:
        """The PCI COMMAND register."""
        return int.from_bytes(self.config[_COMMAND : _COMMAND + 2], "little")

    @property
    def bus_master(self) -> bool:
        """Whether the device may do DMA."""
        return bool(self.command & _COMMAND_MASTER) and not self.gone

    @property
    def decodes(self) -> bool:
        """Whether memory BARs answer, so that the kernel lets them be accessed (`__vfio_pci_memory_enabled`)."""
        at = self._power_control()
        powered = not at or self.config[at] & _D3HOT != _D3HOT
        return bool(self.descriptors and self.command & _COMMAND_MEMORY) and powered

    def _power_control(self) -> int:
        """Return the offset of the power management control register in configuration space, or 0."""
        space = self.declared.config_space()
        at, seen = space[_CAPABILITY_LIST] if space[_STATUS] & _STATUS_CAP_LIST else 0, set[int]()
        while at and at not in seen:
            if space[at] == _PM:
                return at + _PM_CONTROL
            seen.add(at)
            at = space[at + 1]
        return 0

    def pull_out(self) -> None:
        """Remove the device without notice: no register answers any more."""
        self.gone = True
        for fd in tuple(self.descriptors)[:1]:
            for number, bar in self.declared.bars.items():
                if bar.read is None:  # mapped parts of the BAR are this memory
                    os.pwrite(fd, b"\xff" * min(bar.size, 64 * MIB), number << _REGION_SHIFT)

    def renew_vf_token(self) -> None:
        """Make a new random token, if the device has one: a driver was bound (`vfio_pci_vf_init`)."""
        self.vf_token = os.urandom(16) if self.declared.sriov else None

    def check_vector(self, vector: int) -> None:
        """Raise ValueError if the device has no such interrupt vector."""
        count = max(self.declared.msi, self.declared.msix, 1)
        if not 0 <= vector < count:
            raise ValueError(f"{self.bdf} has interrupt vectors 0 to {count - 1}, not {vector}")

    def open(self) -> int:
        """Return a new file descriptor, which counts only after `hold`. Raises EMFILE."""
        if self.descriptors:
            return os.dup(next(iter(self.descriptors)))
        fd = os.memfd_create(f"{DEVICE_MEMORY} {self.bdf}")
        os.ftruncate(fd, ioctls.VFIO_PCI_NUM_REGIONS << _REGION_SHIFT)
        return fd

    def hold(self, fd: int) -> None:
        """Count a descriptor. The first one resets BARs and configuration space, since VFIO resets the device."""
        if not self.descriptors:
            self.config = self.declared.config_space()
            if self.declared.resettable and self.declared.reset is not None:
                self.declared.reset()
            if self._follower is not None:
                self._follower.opened()
        self.descriptors.add(fd)

    def release(self, fd: int) -> None:
        """Forget a closed descriptor. The last close takes the device off the bus (`vfio_pci_core_disable`)."""
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
        """`vfio_pci_ioctl_get_region_info`: EFAULT, EINVAL. `cap_offset` is not changed if there is no capability."""
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
        """Return the capability chain of a BAR: the parts that can be mapped, and the MSI-X table."""
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

    def set_irqs(self, argument: Argument) -> int:
        """As `Irqs.set_irqs`."""
        answer = self.irqs.set_irqs(argument)
        if self._follower is not None:
            self._follower.set_irqs()
        return answer

    def reset(self, _argument: Argument) -> int:
        """`vfio_pci_ioctl_reset`: EINVAL. Clears the BARs; mappings and interrupts stay."""
        if not self.declared.resettable:
            refuse(errno.EINVAL)
        if self.gone:  # a removed device shows no capability of a function-level reset; a bus reset still works
            return refuse(errno.ENOTTY) if self.declared.pcie else 0
        self.clear(hot=False)
        if at := self._power_control():  # vfio_pci_ioctl_reset wakes the device
            self.config[at] &= ~_D3HOT
        return 0

    def clear(self, *, hot: bool = True) -> None:
        """Reset the device, for each kind of reset. A closed device is not changed: the next open makes fresh BARs.

        COMMAND, BAR addresses and the eventfds of interrupts stay (`pci_dev_save_and_disable`, `pci_dev_restore`).
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
        if self._follower is not None:
            self._follower.was_reset(hot=hot)

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
            data = bytes(0xFF if self.gone and at not in _VIRTUAL else self.config[at] for at in places)
            return data if self._follower is None else self._follower.read_config(position, data)
        bar, size = self._accessible(index, position, size)
        if self._follower is not None:
            return self._follower.read_block(index, position, size)
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
        """As `pread`. Returns the number of bytes that were written."""
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
            self._end_write(position, data, decoded=decoded)
            return len(data)
        bar, size = self._accessible(index, position, len(data))
        if self._follower is not None:
            self._follower.write_block(index, position, data[:size])
            return size
        for at, count, is_table in self._pieces(index, position, size):
            if not is_table:
                piece = data[at - position : at - position + count]
                self._write(fd, bar, offset - position + at, piece, wide=self._version.eight_byte_access)
        return size

    def _end_write(self, position: int, data: bytes, *, decoded: bool) -> None:
        """Tell of a write of configuration space; `decoded`: whether BARs were accessible before."""
        if decoded and not self.decodes:
            self.on_bars_gone("a write to COMMAND", self.bdf)
        if self._follower is not None:
            self._follower.wrote_config(position, data)

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
        # The pieces before, in and behind the MSI-X table: start, size, and whether the piece is the table.
        table = self.declared.msix_table(index)
        cuts = sorted(
            {position, position + size, *(at for at in (table.start, table.stop) if at - position in range(size))}
        )
        return ((start, end - start, start in table) for start, end in pairwise(cuts))

    def load(self, offset: int, size: int) -> bytes:
        """Return the bytes that another device reads at `offset` of the device's file, in a BAR that can be mapped."""
        return self._read(next(iter(self.descriptors)), self._bar_at(offset), offset, size, wide=True)

    def store(self, offset: int, data: bytes) -> None:
        """Write the bytes that another device writes, as `load` reads."""
        self._write(next(iter(self.descriptors)), self._bar_at(offset), offset, data, wide=True)

    def _bar_at(self, offset: int) -> Bar:
        return self.declared.bars[self._locate(offset)[0]]

    def _settle_header(self) -> None:
        # Hardware clears reserved bits of COMMAND. vfio_bar_fixup clears the size bits of BARs, and
        # vfio_basic_config_write acts on the bit that masks INTx.
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
        """`vfio_pci_core_mmap` for a shared mapping: return the BAR number. EINVAL if the range cannot be mapped."""
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
        """Return the callbacks of the BAR, or a real mapping of plain memory. EINVAL as mmap."""
        bar = self.declared.bars[self.check_mmap(offset, size)]
        if bar.read is None or bar.write is None:
            return linux.registers(fd, offset, size)
        start = self._locate(offset)[1]
        return CallbackRegisters(
            start=start, read=partial(self._load, bar.read), write=partial(self._store, bar.write), lock=lock
        )

    def _load(self, read: ReadCallback, offset: int, width: int) -> int:
        self.power.check_touch(f"a BAR of {self.bdf}")
        return (1 << 8 * width) - 1 if self.gone else read(offset, width)

    def _store(self, write: WriteCallback, offset: int, width: int, value: int) -> None:
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
