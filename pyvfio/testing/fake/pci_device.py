"""The base class of fake PCI devices with behaviour: registers with effects, interrupts, DMA.

A `FakeDevice` declares a device; a `FakePciDevice` also behaves as one. `edu` is an example, and
docs/testing-without-hardware.md has another, of thirty lines.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Protocol

from pyvfio.testing.fake.device import Bar, FakeDevice
from pyvfio.units import PAGE_SIZE


class Slot(Protocol):
    """The place of a device in the fake machine: the services that a device needs."""

    @property
    def lock(self) -> contextlib.AbstractContextManager[object]:
        """The lock of the fake kernel, which is reentrant."""
        ...

    @property
    def command(self) -> int:
        """PCI COMMAND, 16 bits, as the driver wrote the register."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether a memory BAR may be accessed."""
        ...

    def dma_read(self, *, iova: int, size: int) -> bytes:
        """Read memory through the IOMMU. Raises DmaFault."""
        ...

    def dma_write(self, *, iova: int, data: bytes) -> None:
        """Write memory through the IOMMU. Raises DmaFault."""
        ...

    def raise_interrupt(self, vector: int) -> None:
        """Send a message, or raise the INTx line."""
        ...

    def lower_interrupt(self) -> None:
        """Lower the INTx line."""
        ...

    def signal(self, index: int, vector: int, times: int) -> bool:
        """Add to the eventfd of a vector, also of a masked INTx; whether the vector has one."""
        ...


_LIKELY = {"bars": "bar_sizes", "bar_size": "bar_sizes", "vendor_id": "vendor", "device_id": "device"}
"""Names that are likely to be taken for those of declarations."""


class FakePciDevice(ABC):
    """The base class of a PCI device on a fake kernel.

    Make a subclass and pass an instance: `FakeKernel(groups=[(2, [Mine(bdf)])])`. Class attributes declare the device:

    * `vendor`, `device`, `class_code`, `pcie`: the identity.
    * `bar_sizes`: bytes (powers of two) by the number of the BAR.
    * `intx`: whether the device has a pin. `msi`, `msix`: the numbers of vectors. `msix_bar`: the BAR of the MSI-X
      table.
    * `resettable`: whether VFIO_DEVICE_RESET works. VFIO then also resets the device when a driver opens the device.
    * `config`: read-only bytes of configuration space by offset (revision, subsystem, capabilities).

    Raises ValueError for attributes that no device can have.

    Define `reset`, `read_register` and `write_register`. These methods, and threads of the device, can call `dma_read`,
    `dma_write`, `raise_interrupt` and `lower_interrupt`. Effects of `write_register` complete before the write of the
    driver returns: a transfer may complete at once.

    A raw mapping of a BAR (`Region.mmap`) is memory without side effects: accesses through the mapping call no method.

    Synchronization: the fake calls the overridden methods one at a time, under the lock of the fake kernel. `dma_read`,
    `dma_write` and the interrupt methods take that lock. A thread of the device takes `self.lock` to access the state
    of the device.
    """

    vendor: ClassVar[int] = 0x1234
    device: ClassVar[int] = 0x0001
    class_code: ClassVar[int] = 0x00FF00
    bar_sizes: ClassVar[Mapping[int, int]] = {0: PAGE_SIZE}
    intx: ClassVar[bool] = True
    msi: ClassVar[int] = 1
    msix: ClassVar[int] = 0
    msix_bar: ClassVar[int | None] = None
    resettable: ClassVar[bool] = True
    pcie: ClassVar[bool] = False
    config: ClassVar[Mapping[int, bytes]] = {}

    def __init__(self, bdf: str, *, driver: str | None = "vfio-pci") -> None:
        if not isinstance(sizes := self.bar_sizes, Mapping):
            raise ValueError(f"{bdf}: bar_sizes is a dict of sizes by BAR, such as {{0: 4096}}, not {sizes!r}")  # noqa: TRY004
        self._check_names(bdf)
        self.bdf = bdf
        self._slot: Slot | None = None
        self.declaration = FakeDevice(
            bdf,
            driver=driver,
            vendor=self.vendor,
            device=self.device,
            class_code=self.class_code,
            bars={number: self._bar(number, size) for number, size in self.bar_sizes.items()},
            intx=self.intx,
            msi=self.msi,
            msix=self.msix,
            msix_bar=self.msix_bar,
            resettable=self.resettable,
            reset=self.reset,
            pcie=self.pcie,
            config=self.config,
        )
        self.reset()

    def _check_names(self, bdf: str) -> None:
        """Raise ValueError for a class that declares nothing by a likely name of another declaration."""
        own = {name for kind in type(self).__mro__ if kind not in FakePciDevice.__mro__ for name in vars(kind)}
        for name, meant in _LIKELY.items():
            if name in own and meant not in own:
                raise ValueError(f"{bdf}: {type(self).__name__}.{name} declares nothing; you mean {meant}")

    # ----------------------------------------------------------------------------------------- what a device defines

    @abstractmethod
    def reset(self) -> None:
        """Set the state after power-on. Set up the attributes of the device here.

        Called when the device is made, by VFIO_DEVICE_RESET, and (if `resettable`) when a driver opens the device.
        """

    @abstractmethod
    def read_register(self, bar: int, offset: int, width: int, /) -> int:
        """Return the result of a load of `width` bytes (1, 2, 4, 8) at `offset` of a BAR.

        Bits above `width` bytes are cut off: return -1 for all ones, as where no register is.
        """

    @abstractmethod
    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """Handle a store of `width` bytes at `offset` of a BAR."""

    # ----------------------------------------------------------------------------------------- what a device can do

    @property
    def lock(self) -> contextlib.AbstractContextManager[object]:
        """The lock of the fake kernel, for threads of the device. The lock is reentrant."""
        return self._plugged.lock

    @property
    def bus_master(self) -> bool:
        """Whether the driver allows DMA and messages (PCI COMMAND, bit 2)."""
        return bool(self._plugged.command & 4)

    def dma_read(self, iova: int, size: int) -> bytes:
        """Return `size` bytes of memory at `iova`.

        Raises DmaFault if the access is stopped: the IOMMU has no mapping there, or none that allows reads, or bus
        mastering is off. The device catches the fault and reacts as hardware does. `FakeKernel.faults` has the fault in
        any case. Raises AssertionError if the process released mapped memory, which no device can handle.
        """
        return self._plugged.dma_read(iova=iova, size=size)

    def dma_write(self, iova: int, data: bytes) -> None:
        """Write `data` to memory at `iova`. Raises as `dma_read`.

        Bytes before the stopped byte are written, as in a transfer that crosses into an unmapped page.
        """
        self._plugged.dma_write(iova=iova, data=data)

    def raise_interrupt(self, vector: int = 0) -> None:
        """Send the message of `vector` if MSI or MSI-X is enabled; otherwise raise INTx until `lower_interrupt`.

        If bus mastering is off, the message is lost, because a message is a memory write.
        """
        self._plugged.raise_interrupt(vector)

    def lower_interrupt(self) -> None:
        """Lower INTx: the driver has handled the cause. Has no effect on messages."""
        self._plugged.lower_interrupt()

    # --------------------------------------------------------------------------------------------------- inside

    @property
    def _plugged(self) -> Slot:
        if self._slot is None:
            raise RuntimeError(f"{self.bdf} is in no fake kernel: FakeKernel(groups=[(2, [device])])")
        return self._slot

    def _plug(self, slot: Slot) -> None:
        if self._slot is not None:
            raise ValueError(f"{self.bdf} is in a fake kernel already: make another {type(self).__name__}")
        self._slot = slot

    def _bar(self, number: int, size: int) -> Bar:
        return Bar(size, read=partial(self._read, number), write=partial(self._write, number))

    def _read(self, bar: int, offset: int, width: int) -> int:
        with self._plugged.lock:
            self._check_decoding(bar)
            value = self.read_register(bar, offset, width)
            if not isinstance(value, int):
                raise TypeError(
                    f"{type(self).__name__}.read_register({bar}, {offset:#x}, {width}) returned {value!r}, which is no "
                    "number: return -1 where no register is"
                )
            return value & ((1 << 8 * width) - 1)

    def _write(self, bar: int, offset: int, width: int, value: int) -> None:
        with self._plugged.lock:
            self._check_decoding(bar)
            self.write_register(bar, offset, width, value)

    def _check_decoding(self, bar: int) -> None:
        # pread and pwrite have raised EIO before, so this is a load or store on a mapping.
        if not self._plugged.decodes:
            raise AssertionError(
                f"BAR {bar} of {self.bdf} was accessed with memory decoding off, which is SIGBUS on a kernel"
            )
