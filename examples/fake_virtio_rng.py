"""A fake virtio-rng for `pyvfio.testing.FakeKernel`: what the driver in virtio_rng.py can be tested on, in
milliseconds.

The numbers are those of "Virtual I/O Device (VIRTIO) Version 1.2", §, and of hw/virtio/virtio-pci.c of QEMU.
"""

from __future__ import annotations

import os
import struct
import threading
import time

from pyvfio.testing import DmaFault, FakePciDevice

_NOTIFY_AT, _NOTIFY_MULTIPLIER, _NOTIFY_OFF = 0x3000, 4, 3
_QUEUES_MOST = 8
_DRIVER_OK, _FEATURES_OK, _NEEDS_RESET = 4, 8, 64


def _capability(following: int, kind: int, offset: int, multiplier: int = 0) -> bytes:
    """struct virtio_pci_notify_cap, §4.1.4.4: the others are as long, their last field means nothing."""
    return struct.pack("<8B3I", 0x09, following, 20, kind, 4, 0, 0, 0, offset, 0x1000, multiplier)


class FakeVirtioRng(FakePciDevice):
    """A virtio entropy device with one queue of 8 buffers.

    It answers a request every `pause` seconds, in a thread of its own; with None, one for each call of `serve`. Where
    the IOMMU stops it, it needs a reset, as §2.1.2 has it.
    """

    vendor, device = 0x1AF4, 0x1044
    bar_sizes = {1: 0x1000, 4: 0x4000}  # noqa: RUF012 (the base class says that it is a class's)
    msi, msix, msix_bar = 0, 2, 1
    config = {  # noqa: RUF012
        0x06: b"\x10",
        0x34: b"\x98",
        0x98: b"\x11\x40",  # MSI-X, which is no business of a virtio driver's
        0x40: _capability(0x54, 1, 0x0000),
        0x54: _capability(0x68, 3, 0x1000),
        0x68: _capability(0x7C, 4, 0x2000),
        0x7C: _capability(0x00, 2, _NOTIFY_AT, _NOTIFY_MULTIPLIER),
    }
    features = 1 << 32 | 1 << 33  # VERSION_1, ACCESS_PLATFORM

    def __init__(self, bdf: str, *, pause: float | None = 0.001) -> None:
        self._pause = pause
        self._working = False
        super().__init__(bdf)

    def reset(self) -> None:
        """All registers as at first, the rings forgotten."""
        self._registers = bytearray(56)
        struct.pack_into("<HH", self._registers, 16, 0xFFFF, 1)  # config_msix_vector, num_queues
        struct.pack_into("<HHH", self._registers, 24, _QUEUES_MOST, 0xFFFF, 0)  # queue_size, queue_msix_vector
        struct.pack_into("<H", self._registers, 30, _NOTIFY_OFF)
        self._accepted = 0
        self._answered = 0

    def read_register(self, bar: int, offset: int, width: int, /) -> int:
        """§4.1.4.3: device_feature shows the half that was selected; all else reads as it was written."""
        if bar != 4 or offset + width > len(self._registers):
            return -1
        if offset == 4:
            return self.features >> 32 * self._u32(0) & 0xFFFF_FFFF
        return int.from_bytes(self._registers[offset : offset + width], "little")

    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """Registers, and the doorbell of queue 0."""
        if (bar, offset) == (4, _NOTIFY_AT + _NOTIFY_OFF * _NOTIFY_MULTIPLIER):
            self._ring()
        elif (bar, offset) == (4, 20):
            self._set_status(value)
        elif bar == 4 and offset + width <= len(self._registers):
            self._registers[offset : offset + width] = value.to_bytes(width, "little")
            if offset == 12:
                half = self._u32(8)
                self._accepted |= value << 32 * half

    def _set_status(self, status: int) -> None:
        if not status:
            self.reset()
            return
        if self._accepted != self.features:  # §3.1.1; and QEMU insists on ACCESS_PLATFORM where it offers it
            status &= ~_FEATURES_OK
        self._registers[20] = status

    def _ring(self) -> None:
        if self._pause is not None and not self._working:
            self._working = True
            threading.Thread(target=self._work, args=(self._pause,), daemon=True).start()

    def _work(self, pause: float) -> None:
        while self._working:
            time.sleep(pause)
            with self.lock:
                self._working = self.serve()

    def serve(self) -> bool:
        """Answer the oldest request; whether there was one."""
        with self.lock:
            if self._registers[20] & (_DRIVER_OK | _NEEDS_RESET) != _DRIVER_OK:
                return False
            try:
                answered = self._answer()
            except DmaFault:
                self._registers[20] |= _NEEDS_RESET
                self._interrupt(16)
                return False
            if answered:
                self._interrupt(26)
            return answered

    def _answer(self) -> bool:
        size, (table, driver, device) = self._u16(24), struct.unpack_from("<3Q", self._registers, 32)
        (posted,) = struct.unpack("<H", self.dma_read(driver + 2, 2))
        if posted == self._answered & 0xFFFF:
            return False
        slot = self._answered % size
        (number,) = struct.unpack("<H", self.dma_read(driver + 4 + 2 * slot, 2))
        iova, length, _flags, _next = struct.unpack("<QIHH", self.dma_read(table + 16 * number, 16))
        self.dma_write(iova, os.urandom(length))
        self.dma_write(device + 4 + 8 * slot, struct.pack("<II", number, length))
        self._answered += 1
        self.dma_write(device + 2, struct.pack("<H", self._answered & 0xFFFF))
        return True

    def _interrupt(self, vector_register: int) -> None:
        vector = self._u16(vector_register)
        if vector != 0xFFFF:
            self.raise_interrupt(vector)

    def _u16(self, offset: int) -> int:
        return int.from_bytes(self._registers[offset : offset + 2], "little")

    def _u32(self, offset: int) -> int:
        return int.from_bytes(self._registers[offset : offset + 4], "little")
