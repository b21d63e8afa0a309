"""PCI configuration space: a region where some writes end the accesses to all BARs of the device.

Source: `vfio_basic_config_write`, `vfio_pm_config_write`, `vfio_exp_config_write` and `vfio_af_config_write` in
drivers/vfio/pci/vfio_pci_config.c; linux/pci_regs.h.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from functools import partial, reduce
from operator import or_

from pyvfio.device.region import Region
from pyvfio.device.windows import Keep
from pyvfio.errors import DeviceGoneError, IoctlError
from pyvfio.guard import guarded
from pyvfio.units import check_bool

PCI_COMMAND = 0x04  # linux/pci_regs.h
PCI_COMMAND_MEMORY = 0x2
PCI_COMMAND_MASTER = 0x4

_STATUS = 0x06
_STATUS_CAP_LIST = 0x10
_CAPABILITY_LIST = 0x34
_CAPABILITIES_AT = 0x40
_CAPABILITIES_END = 0x100
_PM, _EXPRESS, _AF = 0x01, 0x10, 0x13
_PM_CONTROL = 4
_PM_STATE = 0x3
_EXPRESS_CONTROL_HIGH = 9  # the upper byte of Device Control
_EXPRESS_FLR = 0x80
_AF_CONTROL = 4
_AF_FLR = 0x01
_NO_DEVICE = 0xFFFF  # 16 bits read as this value if no device answers
_COMMAND_RESERVED = 0xF800


class _Effect(IntEnum):
    """The effect of a write on accesses to BARs."""

    NONE = 0
    START = 1
    """Accesses are possible again."""
    RESET = 2
    """Accesses wait for the reset, and continue."""
    STOP = 3
    """Accesses fail until another write."""


_UNKNOWN = 1 << PCI_COMMAND | (1 << _CAPABILITIES_END) - (1 << _CAPABILITIES_AT)
"""The bytes that can have an effect on BARs, one bit each, before the capabilities are read."""

_BYTES = (
    (_PM, _PM_CONTROL, _PM_STATE, _Effect.STOP),
    (_EXPRESS, _EXPRESS_CONTROL_HIGH, _EXPRESS_FLR, _Effect.RESET),
    (_AF, _AF_CONTROL, _AF_FLR, _Effect.RESET),
)
"""The capability, the byte in the capability, the bits of that byte, and the effect of a write that sets one of the
bits.
"""


class ConfigSpace(Region):
    """PCI configuration space, as the kernel shows the space to user space.

    Some writes end memory decoding (COMMAND) or lower power (the control register of power management), at any width
    and offset. Such a write first drops the windows of all BARs and closes the mappings of `Region.mmap`. If one of
    these mappings has a view, the write raises BufferError, and nothing has changed. With `force=True`, that mapping
    stays. Until the device decodes memory again, an access to the view is SIGBUS, which ends the program. A write that
    starts a function-level reset drops only the windows. Other writes drop nothing.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> f"{device.config.read16(0x00):#x}"  # vendor
        '0x1234'
        >>> f"{device.config.read32(0x08) >> 8:#08x}"  # class code
        '0x00ff00'
    """

    _capabilities: dict[int, int] | None = None  # offsets by number
    _watched: tuple[tuple[int, int, _Effect, _Effect], ...] = ()
    _watched_bytes = _UNKNOWN

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, force: bool = False) -> None:
        """Write as `Region.write`. Raises BufferError if decoding would end under a view, unless `force`."""
        check_bool(force, "force")
        self._write(*self._checked(offset, data), force=force)

    def _write(self, offset: int, data: bytes, *, force: bool) -> None:
        effect = self._effect(offset, data)
        if effect is _Effect.NONE:
            self._pwrite(offset, data)
        elif effect is _Effect.START:
            self._start(offset, data)
        elif effect is _Effect.RESET:
            self._device.windows.change(partial(self._pwrite, offset, data), keep="all maps")
        else:
            while not self._stop(offset, data, force=force):
                self._close_dependents(effect, force=force)

    @guarded
    def _start(self, offset: int, data: bytes) -> None:
        """Write data that can start decoding. The lock excludes a `_stop` between the check and the write."""
        self._pwrite(offset, data)

    @guarded
    def _stop(self, offset: int, data: bytes, *, force: bool) -> bool:
        """Write data that ends decoding, unless DMA of other devices reaches the BARs. Return whether it was done.

        The lock of the regions is held from the check to the write.
        """
        if any(region.has_dependents for region in self._device.all_regions()):
            return False
        keep: Keep = "maps in use" if force or self._has_ended() else "no maps"
        self._device.windows.change(partial(self._pwrite, offset, data), keep=keep)
        return True

    def _close_dependents(self, effect: _Effect, *, force: bool) -> None:
        """Unmap the BARs from other devices.

        The caller holds no lock: the lock of a mapper is above the lock of the regions.
        """
        regions = self._device.all_regions()
        for region in regions if effect is _Effect.STOP and not (force or self._has_ended()) else ():
            region.check_views()
        for region in regions:
            region.close_dependents()

    def _has_ended(self) -> bool:
        """Return whether views live and the device does not decode memory, so that a write can end nothing more."""
        return any(region.in_use for region in self._device.all_regions()) and bool(self.why_silent())

    def read8(self, offset: int) -> int:
        """Read one byte."""
        return self._load_by_pread(offset, 1)

    def read16(self, offset: int) -> int:
        """Read two bytes in one access."""
        return self._load_by_pread(offset, 2)

    def read32(self, offset: int) -> int:
        """Read four bytes in one access."""
        return self._load_by_pread(offset, 4)

    def read64(self, offset: int) -> int:
        """Read eight bytes. The kernel makes two accesses."""
        return self._load_by_pread(offset, 8)

    def write8(self, offset: int, value: int, *, force: bool = False) -> None:
        """Write one byte; `force` as for `write`."""
        self._put(offset, 1, value, force=force)

    def write16(self, offset: int, value: int, *, force: bool = False) -> None:
        """Write two bytes in one access; `force` as for `write`."""
        self._put(offset, 2, value, force=force)

    def write32(self, offset: int, value: int, *, force: bool = False) -> None:
        """Write four bytes in one access; `force` as for `write`."""
        self._put(offset, 4, value, force=force)

    def write64(self, offset: int, value: int, *, force: bool = False) -> None:
        """Write eight bytes; `force` as for `write`. The kernel makes two accesses."""
        self._put(offset, 8, value, force=force)

    def change16(self, offset: int, bits: int, *, on: bool, force: bool = False) -> None:
        """Change bits as `Region.change16`; `force` as for `write`."""
        check_bool(on, "on")
        check_bool(force, "force")
        offset, bits = self._check_value(offset, 2, bits)
        while effect := self._change16(offset, bits, on=on, force=force):
            self._close_dependents(effect, force=force)

    @guarded
    def _change16(self, offset: int, bits: int, *, on: bool, force: bool) -> _Effect:
        """Make the change and return NONE. If other devices reach BARs that the change ends, only return the effect."""
        value = self._changed(offset, bits, on=on)
        if (
            any(region.has_dependents for region in self._device.all_regions())
            and (effect := self._effect(offset, value.to_bytes(2, "little"))) >= _Effect.RESET
        ):
            return effect
        self.write16(offset, value, force=force)
        return _Effect.NONE

    def _changed(self, offset: int, bits: int, *, on: bool) -> int:
        value = self.read_command() if offset == PCI_COMMAND else self.read16(offset)
        return value | bits if on else value & ~bits

    def _store(self, offset: int, width: int, value: int) -> None:
        """Store as `Region._store`, for registers as objects."""
        self._put(offset, width, value, force=False)

    def _put(self, offset: int, width: int, value: int, *, force: bool) -> None:
        offset, value = self._check_value(offset, width, value)
        check_bool(force, "force")
        data = value.to_bytes(width, "little")
        if self._watched_bytes >> offset & (1 << width) - 1:
            self._write(offset, data, force=force)
        else:
            self._pwrite(offset, data)

    def _effect(self, offset: int, data: bytes) -> _Effect:
        """Return the effect of a write of `data` at `offset` on accesses to BARs."""
        end = offset + len(data)
        effect = _Effect.NONE
        if offset <= PCI_COMMAND < end:
            effect = _Effect.START if data[PCI_COMMAND - offset] & PCI_COMMAND_MEMORY else _Effect.STOP
        if end <= _CAPABILITIES_AT or offset >= _CAPABILITIES_END:
            return effect
        for at, bits, its_effect, otherwise in self._watched or self._find_watched():
            if offset <= at < end:
                effect = max(effect, its_effect if data[at - offset] & bits else otherwise)
        return effect

    def _find_watched(self) -> tuple[tuple[int, int, _Effect, _Effect], ...]:
        """Return the entries of `_BYTES` that the device has, by offset.

        An entry also has the effect of a write that sets none of the bits.
        """
        self._watched = tuple(
            (at + byte, bits, effect, _Effect.START if number == _PM else _Effect.NONE)
            for number, byte, bits, effect in _BYTES
            if (at := self._find(number))
        )
        self._watched_bytes = reduce(or_, [1 << at for at, *_others in self._watched], 1 << PCI_COMMAND)
        return self._watched

    def _find(self, number: int) -> int:
        """Return the offset of a capability, or 0 if the device does not have that capability."""
        if self._capabilities is None:
            self._capabilities = self._walk()
        return self._capabilities.get(number, 0)

    def _walk(self) -> dict[int, int]:
        found: dict[int, int] = {}
        seen: set[int] = set()
        if not self.read16(_STATUS) & _STATUS_CAP_LIST:
            return found
        at = self.read8(_CAPABILITY_LIST) & ~3
        while at >= _CAPABILITIES_AT and at not in seen:
            seen.add(at)
            header = self.read16(at)
            if header == _NO_DEVICE:
                raise DeviceGoneError(self._device.bdf, f"the capability at {at:#x} reads {header:#x}")
            found.setdefault(header & 0xFF, at)
            at = header >> 8 & ~3
        return found

    def why_silent(self) -> str:
        """Return the reason why memory BARs do not answer, in words, or "" if they answer. Raises DeviceGoneError."""
        command = self.read_command()
        if not command & PCI_COMMAND_MEMORY:
            return "does not decode memory accesses"
        if (power := self._find(_PM)) and (state := self.read8(power + _PM_CONTROL) & _PM_STATE):
            return f"is in power state D{state}"
        return ""

    def read_command(self) -> int:
        """Return COMMAND. Raises DeviceGoneError if the reserved bits, which are zero in a device, are all set."""
        command = self.read16(PCI_COMMAND)
        if command & _COMMAND_RESERVED == _COMMAND_RESERVED:
            raise DeviceGoneError(self._device.bdf, f"the COMMAND register reads {command:#x}")
        return command

    def check_present(self) -> None:
        """Raise DeviceGoneError if STATUS reads all ones or there is no such device; IoctlError if the read fails.

        The vendor is no evidence: the kernel returns the vendor that was read when the device was opened.
        """
        try:
            data = self._device.use_fd(self.seam.pread, 2, self.info.offset + _STATUS)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENXIO):
                why = f"the STATUS register is unreadable: {error.strerror}"
                raise DeviceGoneError(self._device.bdf, why) from error
            raise IoctlError.of(
                error,
                f"whether {self._device.bdf} has gone is unknown: {error.strerror}",
                request="pread",
                arguments={"device": self._device.bdf, "region": self.info.index, "offset": _STATUS, "size": 2},
            ) from error
        status = int.from_bytes(data, "little")
        if status | _STATUS_CAP_LIST == _NO_DEVICE:
            raise DeviceGoneError(self._device.bdf, f"the STATUS register reads {status:#x}")
