"""A driver for QEMU's `edu` device (1234:11e8): a DMA engine that proves which memory a device can reach.

A transfer moves at most `LIMIT` bytes between memory and a buffer in the device, and takes 100 ms of guest time. The
device does not report whether the IOMMU stopped a transfer. Check the data.

Source: docs/specs/edu.rst and hw/misc/edu.c of QEMU.
"""

from __future__ import annotations

import time
from typing import Protocol

from pyvfio.errors import UnsupportedError, VfioError

EDU_ID = (0x1234, 0x11E8)
"""The PCI vendor and device."""

LIMIT = 2048
"""The most bytes of a transfer. QEMU 7.2 aborts when a transfer reaches the last byte of the 4096-byte buffer, so half
of the buffer is used.
"""

_IDENTIFICATION, _LIVENESS = 0x00, 0x04
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACKNOWLEDGE = 0x24, 0x60, 0x64
_SOURCE, _DESTINATION, _COUNT, _COMMAND = 0x80, 0x88, 0x90, 0x98
_BUFFER = 0x40000
_START, _TO_MEMORY, _INTERRUPT = 1, 2, 4
_TRANSFER = 0.1
_TIMEOUT = 300.0


class _Bar(Protocol):
    """The methods of `pyvfio.Region` that the driver needs."""

    def read32(self, offset: int) -> int: ...

    def read64(self, offset: int) -> int: ...

    def write32(self, offset: int, value: int) -> None: ...

    def write64(self, offset: int, value: int) -> None: ...


class Edu:
    """The device behind `bar`, which is BAR 0 of the device. Enable memory decoding and bus mastering first.

    Raises UnsupportedError if the device is no edu. Synchronization: none; one transfer at a time.
    """

    def __init__(self, bar: _Bar) -> None:
        self._bar = bar
        identification = bar.read32(_IDENTIFICATION)
        if identification & 0xFF != 0xED:
            raise UnsupportedError(
                f"this is no edu device: the low byte of the identification register {identification:#x} is not 0xed"
            )

    def invert(self, value: int) -> int:
        """Return the 32-bit complement of `value`, computed by the liveness register."""
        self._bar.write32(_LIVENESS, value)
        return self._bar.read32(_LIVENESS)

    def read_memory(self, iova: int, size: int, *, interrupt: bool = False) -> None:
        """Have the device read `size` bytes at `iova` into the buffer. Returns after the transfer."""
        self._transfer(source=iova, destination=_BUFFER, size=size, command=_START | interrupt * _INTERRUPT)

    def write_memory(self, iova: int, size: int, *, interrupt: bool = False) -> None:
        """Have the device write `size` bytes of the buffer to `iova`. Returns after the transfer."""
        command = _START | _TO_MEMORY | interrupt * _INTERRUPT
        self._transfer(source=_BUFFER, destination=iova, size=size, command=command)

    def start_read(self, iova: int, size: int) -> None:
        """Start a transfer as `read_memory` does, and return at once. Call `wait_idle` before the next transfer."""
        self._start(source=iova, destination=_BUFFER, size=size, command=_START)

    def start_write(self, iova: int, size: int) -> None:
        """Start a transfer as `write_memory` does, and return at once. Call `wait_idle` before the next transfer."""
        self._start(source=_BUFFER, destination=iova, size=size, command=_START | _TO_MEMORY)

    @property
    def idle(self) -> bool:
        """Whether no transfer is in progress."""
        return not self._bar.read64(_COMMAND) & _START

    def _transfer(self, *, source: int, destination: int, size: int, command: int) -> None:
        self._start(source=source, destination=destination, size=size, command=command)
        self.wait_idle()

    def _start(self, *, source: int, destination: int, size: int, command: int) -> None:
        if not 0 < size <= LIMIT:
            raise ValueError(f"a transfer moves 1 to {LIMIT} bytes, not {size}")
        self._bar.write64(_SOURCE, source)
        self._bar.write64(_DESTINATION, destination)
        self._bar.write64(_COUNT, size)
        self._bar.write64(_COMMAND, command)

    def wait_idle(self) -> None:
        """Wait until no transfer is in progress. Raises VfioError after five minutes."""
        deadline = time.monotonic() + _TIMEOUT
        pause = _TRANSFER
        while not self.idle:
            if time.monotonic() > deadline:
                raise VfioError(f"the edu device did not finish a transfer in {_TIMEOUT:.0f} seconds")
            # The tests of interrupts use this driver, so an interrupt must not end the wait. On an emulated machine
            # fifty early reads cost more than the rest of a transfer.
            time.sleep(pause)
            pause = 0.002

    def raise_interrupt(self, value: int = 1) -> None:
        """Have the device raise the interrupt, with `value` in the interrupt status."""
        self._bar.write32(_IRQ_RAISE, value)

    def acknowledge_interrupt(self) -> int:
        """Return the interrupt status, and clear the status, which lowers INTx."""
        status = self._bar.read32(_IRQ_STATUS)
        self._bar.write32(_IRQ_ACKNOWLEDGE, status)
        return status
