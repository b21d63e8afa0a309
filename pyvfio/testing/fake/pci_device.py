"""The base class for a fake PCI device that does something: registers with effects, interrupts, DMA.

`FakeDevice` declares what a device looks like; a `FakePciDevice` declares that and behaves. `edu` is one, and another,
of thirty lines, is in docs/testing-without-hardware.md.
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
    """Where a device is plugged in: what it needs of the machine around it."""

    @property
    def lock(self) -> contextlib.AbstractContextManager[object]:
        """The fake kernel's, which any thread may take again while it has it."""
        ...

    @property
    def command(self) -> int:
        """PCI COMMAND, 16 bits, as the driver wrote it."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether a memory BAR may be accessed."""
        ...

    def dma_read(self, *, iova: int, size: int) -> bytes:
        """Memory through the IOMMU; DmaFault."""
        ...

    def dma_write(self, *, iova: int, data: bytes) -> None:
        """Memory through the IOMMU; DmaFault."""
        ...

    def raise_interrupt(self, vector: int) -> None:
        """A message, or the INTx line up."""
        ...

    def lower_interrupt(self) -> None:
        """The INTx line down."""
        ...


class FakePciDevice(ABC):
    """A PCI device on a fake kernel: subclass it, and give an instance to `FakeKernel(groups=[(2, [Mine(bdf)])])`.

    Class attributes say what it is: `vendor`, `device`, `class_code`; `bar_sizes`, bytes by number of the BAR (powers
    of two); `intx`, and how many `msi` and `msix` vectors (with `msix_bar`, where their table lies); `resettable`,
    whether VFIO_DEVICE_RESET is there, which is also done when a driver opens the device; `pcie`; `config`, read-only
    bytes of configuration space by offset (revision, subsystem, capabilities). ValueError for what no device can be.

    Define `reset`, `read_register` and `write_register`. In them call `dma_read`, `dma_write`, `raise_interrupt` and
    `lower_interrupt`; they may be called from a thread of the device's own as well. What the device does in
    `write_register` is over before the driver's write returns: a transfer may complete at once.

    A raw mapping of a BAR (`Region.mmap`) is memory without side effects: none of this is called for it.

    Synchronization: the overridden methods are called with the fake kernel's lock held, one at a time. A thread of the
    device's own takes no lock for `dma_read` and its kin, which have it already, and `self.lock` for its own state.
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

    # ----------------------------------------------------------------------------------------- what a device defines

    @abstractmethod
    def reset(self) -> None:
        """Back to the state after power-on. Called when the device is made, by VFIO_DEVICE_RESET, and (where
        `resettable`) when a driver opens it. Set up the device's state here."""

    @abstractmethod
    def read_register(self, bar: int, offset: int, width: int, /) -> int:
        """What a load of `width` bytes (1, 2, 4, 8) at `offset` of a BAR gets. What does not fit is cut off, so that
        -1 is all ones, as where no register is."""

    @abstractmethod
    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """A store of `width` bytes at `offset` of a BAR."""

    # ----------------------------------------------------------------------------------------- what a device can do

    @property
    def lock(self) -> contextlib.AbstractContextManager[object]:
        """The fake kernel's lock, for threads of the device's own; may be taken again by who has it."""
        return self._plugged.lock

    @property
    def bus_master(self) -> bool:
        """Whether the driver lets it do DMA and send messages (PCI COMMAND, bit 2)."""
        return bool(self._plugged.command & 4)

    def dma_read(self, iova: int, size: int) -> bytes:
        """`size` bytes of memory at `iova`.

        Raises DmaFault where it is stopped: the IOMMU has nothing there, or nothing that may be read, or bus mastering
        is off. A device catches it and does what it does then; the fault is in `FakeKernel.faults` in any case. Raises
        AssertionError when the process took mapped memory away, which no device can be meant to survive.
        """
        return self._plugged.dma_read(iova=iova, size=size)

    def dma_write(self, iova: int, data: bytes) -> None:
        """Put `data` into memory at `iova`; as `dma_read`. What lies before the byte that is stopped has been
        written, as of a transfer that crosses into a page which is not mapped."""
        self._plugged.dma_write(iova=iova, data=data)

    def raise_interrupt(self, vector: int = 0) -> None:
        """Send the message of `vector`, where the driver enabled MSI or MSI-X (lost when bus mastering is off, for a
        message is a write); else pull up INTx, which stays up until `lower_interrupt`."""
        self._plugged.raise_interrupt(vector)

    def lower_interrupt(self) -> None:
        """Let INTx go down: the driver has dealt with the cause. Nothing for messages."""
        self._plugged.lower_interrupt()

    # --------------------------------------------------------------------------------------------------- inside

    @property
    def _plugged(self) -> Slot:
        if self._slot is None:
            raise RuntimeError(f"{self.bdf} is in no fake kernel: FakeKernel(groups=[(2, [device])])")
        return self._slot

    def _plug(self, slot: Slot) -> None:
        if self._slot is not None:
            raise ValueError(f"{self.bdf} is in a fake kernel already; make another {type(self).__name__}")
        self._slot = slot

    def _bar(self, number: int, size: int) -> Bar:
        return Bar(size, read=partial(self._read, number), write=partial(self._write, number))

    def _read(self, bar: int, offset: int, width: int) -> int:
        with self._plugged.lock:
            self._check_decoding(bar)
            value = self.read_register(bar, offset, width)
            if not isinstance(value, int):
                raise TypeError(
                    f"{type(self).__name__}.read_register({bar}, {offset:#x}, {width}) returned {value!r}, and a load "
                    "gets a number; -1 where no register is"
                )
            return value & ((1 << 8 * width) - 1)

    def _write(self, bar: int, offset: int, width: int, value: int) -> None:
        with self._plugged.lock:
            self._check_decoding(bar)
            self.write_register(bar, offset, width, value)

    def _check_decoding(self, bar: int) -> None:
        # pread and pwrite have refused it with EIO by now; what comes here is a load or store on a mapping.
        if not self._plugged.decodes:
            raise AssertionError(f"BAR {bar} of {self.bdf} was touched with memory decoding off: SIGBUS on a kernel")
