"""QEMU's `edu` device (1234:11e8), register by register, for a fake kernel.

Source: hw/misc/edu.c and docs/specs/edu.rst of QEMU.
"""

from __future__ import annotations

import contextlib
import math

from pyvfio.testing.fake.dma import DmaFault
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.units import MIB

_IDENTIFICATION, _LIVENESS, _FACTORIAL, _STATUS = 0x00, 0x04, 0x08, 0x20
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACKNOWLEDGE = 0x24, 0x60, 0x64
_SOURCE, _DESTINATION, _COUNT, _COMMAND = 0x80, 0x88, 0x90, 0x98
_DMA_REGISTERS = (_SOURCE, _DESTINATION, _COUNT, _COMMAND)
_BUFFER, _BUFFER_SIZE = 0x40000, 4096
_START, _TO_MEMORY, _INTERRUPT = 1, 2, 4
_STATUS_INTERRUPT = 0x80
_FACTORIAL_DONE, _DMA_DONE = 0x001, 0x100
_U32 = (1 << 32) - 1
_VANISHES = 34  # 34! is a multiple of 2^32


class FakeEdu(FakePciDevice):
    """An `edu`. `pyvfio.testing.edu.Edu` drives this device and the one of QEMU.

    The differences to QEMU:

    * A transfer or factorial completes before the starting write returns. QEMU needs 100 ms for a transfer.
    * A stopped transfer leaves `buffer` unchanged. In QEMU the buffer may be filled with zeros or ones.
      `FakeKernel.faults` has the stopped accesses.
    * A transfer beyond the buffer raises ValueError. QEMU aborts; 7.2 aborts at the last byte of the buffer already.

    DMA addresses have 64 bits, as with `dma_mask=0xffffffffffffffff` of QEMU.
    """

    vendor, device = 0x1234, 0x11E8
    class_code = 0x00FF00
    bar_sizes = {0: MIB}  # noqa: RUF012 (a ClassVar of the base class)
    resettable = False
    config = {0x06: b"\x10\x00", 0x34: b"\x40", 0x40: b"\x05\x00\x80\x00"}  # noqa: RUF012 (MSI, of 64 bits)

    def reset(self) -> None:
        """Clear all registers and the buffer."""
        self.buffer = bytearray(_BUFFER_SIZE)
        self._liveness = 0
        self._factorial = 0
        self._status = 0
        self._interrupts = 0
        self._dma = dict.fromkeys(_DMA_REGISTERS, 0)

    def read_register(self, _bar: int, offset: int, width: int, /) -> int:
        """`edu_mmio_read`: all ones where no register is, and for widths that the register does not accept."""
        if not _accepts(offset, width):
            return -1
        if offset in self._dma:
            return self._dma[offset]
        registers = {
            _IDENTIFICATION: 0x010000ED,
            _LIVENESS: self._liveness,
            _FACTORIAL: self._factorial,
            _STATUS: self._status,
            _IRQ_STATUS: self._interrupts,
        }
        return registers.get(offset, -1)

    def write_register(self, _bar: int, offset: int, width: int, value: int, /) -> None:
        """`edu_mmio_write`."""
        if not _accepts(offset, width):
            return
        effects = {
            _LIVENESS: self._invert,
            _FACTORIAL: self._compute,
            _STATUS: self._set_status,
            _IRQ_RAISE: self._raise,
            _IRQ_ACKNOWLEDGE: self._acknowledge,
            _COMMAND: self._start,
        }
        if offset in effects:
            effects[offset](value)
        elif offset in self._dma:
            self._dma[offset] = value

    def _invert(self, value: int) -> None:
        self._liveness = ~value & _U32

    def _set_status(self, value: int) -> None:
        self._status = value & _STATUS_INTERRUPT

    def _compute(self, value: int) -> None:
        self._factorial = math.factorial(value) & _U32 if value < _VANISHES else 0
        if self._status & _STATUS_INTERRUPT:
            self._raise(_FACTORIAL_DONE)

    def _raise(self, causes: int) -> None:
        self._interrupts |= causes
        if self._interrupts:
            self.raise_interrupt()

    def _acknowledge(self, causes: int) -> None:
        self._interrupts &= ~causes
        if not self._interrupts:
            self.lower_interrupt()

    def _start(self, command: int) -> None:
        if not command & _START:
            return
        self._dma[_COMMAND] = command & ~_START  # the driver can read the register only after the transfer
        with contextlib.suppress(DmaFault):  # `edu` does not report a stopped transfer
            self._transfer(to_memory=bool(command & _TO_MEMORY))
        if command & _INTERRUPT:
            self._raise(_DMA_DONE)

    def _transfer(self, *, to_memory: bool) -> None:
        source, destination, count = (self._dma[name] for name in (_SOURCE, _DESTINATION, _COUNT))
        start = (source if to_memory else destination) - _BUFFER
        if start < 0 or start + count > _BUFFER_SIZE:
            raise ValueError(f"{count:#x} bytes at {start + _BUFFER:#x} exceed the buffer of edu, 0x40000-0x40fff")
        if to_memory:
            self.dma_write(destination, bytes(self.buffer[start : start + count]))
        else:
            self.buffer[start : start + count] = self.dma_read(source, count)


def _accepts(offset: int, width: int) -> bool:
    return width == 4 or (width == 8 and offset >= _SOURCE)
