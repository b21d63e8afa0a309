"""PCI configuration space: a region, some of whose bytes end the device's answers in all of its BARs.

Source: `vfio_basic_config_write`, `vfio_pm_config_write`, `vfio_exp_config_write` and `vfio_af_config_write` in
drivers/vfio/pci/vfio_pci_config.c; linux/pci_regs.h.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from functools import partial

from pyvfio.device.region import Region
from pyvfio.device.windows import Keep
from pyvfio.errors import DeviceGoneError, IoctlError
from pyvfio.guard import guarded

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
_NO_DEVICE = 0xFFFF  # what 16 bits read where no device answers
_COMMAND_RESERVED = 0xF800


class _Effect(IntEnum):
    """What a write does to accesses of BARs."""

    NONE = 0
    START = 1
    """They may begin again."""
    RESET = 2
    """They wait, and go on."""
    STOP = 3
    """They end, until another write."""


_BYTES = (
    (_PM, _PM_CONTROL, _PM_STATE, _Effect.STOP),
    (_EXPRESS, _EXPRESS_CONTROL_HIGH, _EXPRESS_FLR, _Effect.RESET),
    (_AF, _AF_CONTROL, _AF_FLR, _Effect.RESET),
)
"""Capability, byte in it, bits of that byte, and what a write that sets one of them does."""


class ConfigSpace(Region):
    """PCI configuration space, as the kernel shows it to users.

    A write that ends memory decoding (COMMAND) or lowers power (the control register of power management), whatever its
    width and offset, first drops the windows of all BARs and closes the mappings of `Region.mmap`. Where one of these
    has a view, the write raises BufferError, and nothing has changed; with `force=True` that mapping stays, and a touch
    of the view is SIGBUS, which ends the program, until the device decodes memory again. A write that starts a
    function-level reset drops the windows alone. Other writes drop nothing.
    """

    _capabilities: dict[int, int] | None = None  # offsets by number

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, force: bool = False) -> None:
        """As `Region.write`. Raises BufferError where decoding would end under a view, unless `force`."""
        offset, data = self._checked(offset, data)
        effect = self._effect(offset, data)
        if effect is _Effect.NONE:
            super().write(offset, data)
        elif effect is _Effect.START:
            self._start(offset, data)
        elif effect is _Effect.RESET:
            self._device.windows.change(partial(super().write, offset, data), keep="all maps")
        else:
            while not self._stop(offset, data, force=force):
                self._close_dependents(effect, force=force)

    @guarded
    def _start(self, offset: int, data: bytes) -> None:
        """Write what may begin decoding: not between the look of a `_stop` and its write."""
        super().write(offset, data)

    @guarded
    def _stop(self, offset: int, data: bytes, *, force: bool) -> bool:
        """Write what ends decoding, unless other devices reach BARs that it takes away. Return whether it was written.

        The regions' lock is held from the look at the device to the write.
        """
        if any(region.has_dependents for region in self._device.all_regions()):
            return False
        keep: Keep = "maps in use" if force or self._has_ended() else "no maps"
        self._device.windows.change(partial(super().write, offset, data), keep=keep)
        return True

    def _close_dependents(self, effect: _Effect, *, force: bool) -> None:
        """Keep other devices from the BARs; without the lock, below which a mapper's must not be taken."""
        regions = self._device.all_regions()
        for region in regions if effect is _Effect.STOP and not (force or self._has_ended()) else ():
            region.check_views()
        for region in regions:
            region.close_dependents()

    def _has_ended(self) -> bool:
        """Whether views live, and the device does not decode memory: a write that ends decoding ends nothing then."""
        return any(region.in_use for region in self._device.all_regions()) and bool(self.why_silent())

    def write8(self, offset: int, value: int, *, force: bool = False) -> None:
        """One byte; `force` as for `write`."""
        self._put(offset, 1, value, force=force)

    def write16(self, offset: int, value: int, *, force: bool = False) -> None:
        """Two bytes in one access; `force` as for `write`."""
        self._put(offset, 2, value, force=force)

    def write32(self, offset: int, value: int, *, force: bool = False) -> None:
        """Four bytes in one access; `force` as for `write`."""
        self._put(offset, 4, value, force=force)

    def write64(self, offset: int, value: int, *, force: bool = False) -> None:
        """Eight bytes, of which the kernel makes two accesses; `force` as for `write`."""
        self._put(offset, 8, value, force=force)

    def change16(self, offset: int, bits: int, *, on: bool, force: bool = False) -> None:
        """As `Region.change16`; `force` as for `write`."""
        offset, bits = self._check_value(offset, 2, bits)
        while effect := self._change16(offset, bits, on=on, force=force):
            self._close_dependents(effect, force=force)

    @guarded
    def _change16(self, offset: int, bits: int, *, on: bool, force: bool) -> _Effect:
        """Make the change, unless other devices reach BARs that it takes away: return its effect then, else NONE."""
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

    def _put(self, offset: int, width: int, value: int, *, force: bool) -> None:
        offset, value = self._check_value(offset, width, value)
        self.write(offset, value.to_bytes(width, "little"), force=force)

    def _effect(self, offset: int, data: bytes) -> _Effect:
        """What a write of `data` at `offset` does to accesses of BARs."""
        end = offset + len(data)
        effect = _Effect.NONE
        if offset <= PCI_COMMAND < end:
            effect = _Effect.START if data[PCI_COMMAND - offset] & PCI_COMMAND_MEMORY else _Effect.STOP
        if end <= _CAPABILITIES_AT or offset >= _CAPABILITIES_END:
            return effect
        for number, byte, bits, its_effect in _BYTES:
            at = self._find(number) + byte
            if at > byte and offset <= at < end:
                otherwise = _Effect.START if number == _PM else _Effect.NONE
                effect = max(effect, its_effect if data[at - offset] & bits else otherwise)
        return effect

    def _find(self, number: int) -> int:
        """Where a capability is; 0 where the device has none of that number."""
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
                raise DeviceGoneError(self._device.bdf, f"a capability at {at:#x} of it reads {header:#x}")
            found.setdefault(header & 0xFF, at)
            at = header >> 8 & ~3
        return found

    def why_silent(self) -> str:
        """Why the device answers no access of a memory BAR, in words; empty where it does. Raises DeviceGoneError."""
        command = self.read_command()
        if not command & PCI_COMMAND_MEMORY:
            return "does not decode memory accesses"
        if (power := self._find(_PM)) and (state := self.read8(power + _PM_CONTROL) & _PM_STATE):
            return f"is in power state D{state}"
        return ""

    def read_command(self) -> int:
        """COMMAND. Raises DeviceGoneError where the bits are set that are reserved and zero."""
        command = self.read16(PCI_COMMAND)
        if command & _COMMAND_RESERVED == _COMMAND_RESERVED:
            raise DeviceGoneError(self._device.bdf, f"its COMMAND register reads {command:#x}")
        return command

    def check_present(self) -> None:
        """Raise DeviceGoneError where STATUS reads all ones, or no such device is left; IoctlError where it cannot be
        read.

        The vendor would not tell: the kernel answers for it from what it has read when the device was opened.
        """
        try:
            data = self._device.use_fd(self._device.kernel.pread, 2, self.info.offset + _STATUS)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.ENXIO):
                why = f"its STATUS register is unreadable: {error.strerror}"
                raise DeviceGoneError(self._device.bdf, why) from error
            raise IoctlError.of(
                error,
                f"whether {self._device.bdf} has gone is unknown: {error.strerror}",
                request="pread",
                arguments={"device": self._device.bdf, "region": self.info.index, "offset": _STATUS, "size": 2},
            ) from error
        status = int.from_bytes(data, "little")
        if status | _STATUS_CAP_LIST == _NO_DEVICE:
            raise DeviceGoneError(self._device.bdf, f"its STATUS register reads {status:#x}")
