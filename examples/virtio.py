"""What drivers of virtio devices on PCI have in common: capabilities, registers, set-up, and the split virtqueue.

Names are those of "Virtual I/O Device (VIRTIO) Version 1.2", whose sections are given as §, and of linux/virtio_pci.h.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from enum import IntEnum, IntFlag
from typing import NamedTuple

import pyvfio
from pyvfio.units import align_up

VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM = 1 << 32, 1 << 33  # §6
VIRTIO_MSI_NO_VECTOR = 0xFFFF
VIRTQ_DESC_F_WRITE = 2
TIMEOUT = 30.0  # seconds: what takes a device longer will never be


class CfgType(IntEnum):
    """VIRTIO_PCI_CAP_*, §4.1.4: the structures that a capability can point to."""

    COMMON_CFG = 1
    NOTIFY_CFG = 2
    ISR_CFG = 3
    DEVICE_CFG = 4


class Status(IntFlag):
    """Bits of device_status, §2.1."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64


class Field(NamedTuple):
    """A field of struct virtio_pci_common_cfg, §4.1.4.3."""

    offset: int
    width: int


DEVICE_FEATURE_SELECT, DEVICE_FEATURE = Field(0, 4), Field(4, 4)
DRIVER_FEATURE_SELECT, DRIVER_FEATURE = Field(8, 4), Field(12, 4)
CONFIG_MSIX_VECTOR, DEVICE_STATUS = Field(16, 2), Field(20, 1)
QUEUE_SELECT, QUEUE_SIZE, QUEUE_MSIX_VECTOR = Field(22, 2), Field(24, 2), Field(26, 2)
QUEUE_ENABLE, QUEUE_NOTIFY_OFF = Field(28, 2), Field(30, 2)
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 32, 40, 48  # 64 bits each, written in two halves


class Capability(NamedTuple):
    """struct virtio_pci_cap, §4.1.4: where a structure begins; the multiplier is of NOTIFY_CFG, and 0 elsewhere."""

    bar: int
    offset: int
    notify_off_multiplier: int = 0


def find_capabilities(config: bytes) -> dict[int, Capability]:
    """The first capability of each type in 256 bytes of configuration space."""
    found: dict[int, Capability] = {}
    at = config[0x34] if config[0x06] & 0x10 else 0  # PCI_CAPABILITY_LIST, PCI_STATUS_CAP_LIST
    config += bytes(20)  # so that the last one, cut off, is not read beyond the end
    for _ in range(48):  # no more have room, so a chain that bites its tail ends too
        at &= 0xFC
        if at < 0x40:
            break
        cap_vndr, cap_next, _cap_len, cfg_type, bar = struct.unpack_from("<5B", config, at)
        if cap_vndr == 0x09 and bar <= 5:  # PCI_CAP_ID_VNDR; higher BARs are reserved, and to be passed over
            offset, _length, multiplier = struct.unpack_from("<3I", config, at + 8)
            is_notify = cfg_type == CfgType.NOTIFY_CFG
            found.setdefault(cfg_type, Capability(bar, offset, multiplier if is_notify else 0))
        at = cap_next
    return found


class RingLayout(NamedTuple):
    """Where the parts of a split virtqueue lie, §2.7: the descriptor table at 0, the other two here, `size` in all."""

    driver: int
    device: int
    size: int


def ring_layout(queue_size: int) -> RingLayout:
    """One part behind the other, each aligned as it must be: to 16, 2 and 4 bytes."""
    driver = 16 * queue_size
    device = align_up(driver + 6 + 2 * queue_size, 4)
    return RingLayout(driver, device, device + 6 + 8 * queue_size)


class Queue:
    """The driver's side of a split virtqueue whose requests are one buffer each, for the device to write, §2.7.

    Items of a memoryview are stored in one piece, as indices must be that a device reads meanwhile; and on x86 nobody
    sees stores in another order than they were made in. Elsewhere there would be a barrier before each index.
    """

    def __init__(self, block: pyvfio.RamBlock, size: int) -> None:
        self.size = size
        self.layout = ring_layout(size)
        self._posted = self._reaped = 0
        with block.view() as memory:
            self._u16, self._u32, self._u64 = memory.cast("H"), memory.cast("I"), memory.cast("Q")

    def post(self, number: int, *, iova: int, length: int) -> None:
        """Offer the device a buffer; its descriptor has the buffer's number."""
        self._u64[2 * number] = iova
        self._u32[4 * number + 2] = length
        self._u32[4 * number + 3] = VIRTQ_DESC_F_WRITE
        ring = self.layout.driver // 2
        self._u16[ring + 2 + self._posted % self.size] = number
        self._posted += 1
        self._u16[ring + 1] = self._posted & 0xFFFF

    @property
    def unanswered(self) -> int:
        """How many buffers the device still has, as the ring says now; not all others need have been reaped."""
        return (self._posted - self._u16[self.layout.device // 2 + 1]) & 0xFFFF

    def reap(self) -> Iterator[tuple[int, int]]:
        """What the device has returned since the last time: number of the buffer, and how many bytes it wrote."""
        for _ in range(self._posted - self.unanswered - self._reaped):
            element = self.layout.device // 4 + 1 + 2 * (self._reaped % self.size)
            self._reaped += 1
            yield self._u32[element], self._u32[element + 1]

    def close(self) -> None:
        """Let go of the block."""
        for view in (self._u16, self._u32, self._u64):
            view.release()


class Transport:
    """A virtio device's registers on PCI, and what every driver does with them to begin and to end, §3.1.1.

    Raises UnsupportedError when it is no virtio 1.x device behind the IOMMU. Synchronization: none.
    """

    def __init__(self, device: pyvfio.Device) -> None:
        self._device = device
        device.memory_enabled = True
        capabilities = find_capabilities(device.config.read(0, 256))
        if not {CfgType.COMMON_CFG, CfgType.NOTIFY_CFG} <= capabilities.keys():
            raise pyvfio.UnsupportedError(f"{device.bdf} does not have the capabilities of a virtio 1.x device")
        self._common, self._notify = capabilities[CfgType.COMMON_CFG], capabilities[CfgType.NOTIFY_CFG]
        self._doorbells: dict[int, int] = {}

    def read(self, field: Field) -> int:
        """A field of the common configuration."""
        region, at = self._device.region(self._common.bar), self._common.offset + field.offset
        return {1: region.read8, 2: region.read16, 4: region.read32}[field.width](at)

    def write(self, field: Field, value: int) -> None:
        """Likewise."""
        region, at = self._device.region(self._common.bar), self._common.offset + field.offset
        {1: region.write8, 2: region.write16, 4: region.write32}[field.width](at, value)

    @property
    def status(self) -> Status:
        """Where the set-up is, and whether the device needs a reset."""
        return Status(self.read(DEVICE_STATUS))

    def add_status(self, bit: Status) -> None:
        """The driver has come so far."""
        self.write(DEVICE_STATUS, self.status | bit)

    def reset(self) -> None:
        """Back to the beginning; when this returns, the device has let go of all memory."""
        self.write(DEVICE_STATUS, 0)
        deadline = time.monotonic() + TIMEOUT
        while self.read(DEVICE_STATUS):  # §4.1.4.3.2
            if time.monotonic() > deadline:
                raise pyvfio.VfioError(f"{self._device.bdf} was not reset in {TIMEOUT:.0f} seconds")

    def negotiate(self, features: int = 0) -> None:
        """Steps 1 to 6: a device that uses the IOMMU, and `features` besides. Raises UnsupportedError."""
        self.reset()
        self.add_status(Status.ACKNOWLEDGE)
        self.add_status(Status.DRIVER)
        wanted, offered = features | VIRTIO_F_VERSION_1 | VIRTIO_F_ACCESS_PLATFORM, 0
        for half in (0, 1):
            self.write(DEVICE_FEATURE_SELECT, half)
            offered |= self.read(DEVICE_FEATURE) << 32 * half
            self.write(DRIVER_FEATURE_SELECT, half)
            self.write(DRIVER_FEATURE, wanted >> 32 * half & 0xFFFF_FFFF)
        if not offered & VIRTIO_F_ACCESS_PLATFORM:
            raise pyvfio.UnsupportedError(
                f"{self._device.bdf} does not offer VIRTIO_F_ACCESS_PLATFORM: its DMA would go past the IOMMU",
                hint="QEMU: the device's options disable-legacy=on,iommu_platform=on",
            )
        self.add_status(Status.FEATURES_OK)
        if not self.status & Status.FEATURES_OK:
            raise pyvfio.UnsupportedError(f"{self._device.bdf} offers features {offered:#x}, and refuses {wanted:#x}")

    def set_vector(self, field: Field, vector: int) -> None:
        """What `field` tells of shall raise that MSI-X vector, §4.1.5.1.2. VfioError: the device could not do it."""
        self.write(field, vector)
        if self.read(field) != vector:
            raise pyvfio.VfioError(f"{self._device.bdf} did not take MSI-X vector {vector}")

    def queue_size(self, number: int) -> int:
        """How many buffers the device takes in a queue at most: a power of two, 0 where there is no such queue."""
        self.write(QUEUE_SELECT, number)
        return self.read(QUEUE_SIZE)

    def enable_queue(self, number: int, queue: Queue, *, iova: int, vector: int) -> None:
        """Tell the device of a queue whose block begins at `iova`, §4.1.5.1.3."""
        self.write(QUEUE_SELECT, number)
        self.write(QUEUE_SIZE, queue.size)
        parts = ((QUEUE_DESC, 0), (QUEUE_DRIVER, queue.layout.driver), (QUEUE_DEVICE, queue.layout.device))
        for register, offset in parts:
            self.write(Field(register, 4), iova + offset & 0xFFFF_FFFF)
            self.write(Field(register + 4, 4), iova + offset >> 32)
        self.set_vector(QUEUE_MSIX_VECTOR, vector)
        place = self.read(QUEUE_NOTIFY_OFF) * self._notify.notify_off_multiplier
        self._doorbells[number] = self._notify.offset + place
        self.write(QUEUE_ENABLE, 1)

    def notify(self, number: int) -> None:
        """Tell the device that there is something new in a queue, §4.1.5.2."""
        self._device.region(self._notify.bar).write16(self._doorbells[number], number)
