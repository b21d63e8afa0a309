"""A register as an object, and the wait for a value of a register."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from pyvfio.errors import RegisterTimeoutError
from pyvfio.guard import Guard
from pyvfio.kernel import Cell
from pyvfio.unique import Unique
from pyvfio.units import as_number

_CLOSED = memoryview(b"\0")
_CLOSED.release()


class Register(Unique):
    """A register of a region, from `Region.register32` and the like: `read()` and `write(value)` make one access each.

    Numbers are little-endian, as in PCI. If the region is mapped, an access is one load or store, without a lock and
    without a system call. Otherwise an access is one pread or pwrite. The window of a register is dropped when the
    device stops decoding memory, is reset or is closed. The next access then maps another window or raises as
    `Region.read32`.

    Synchronization: any thread. Cost: at most 1.5 times an item of a ctypes array, and half of `Region.read32`. A
    mapped register that reads all ones is returned unchecked; `Region.read32` checks whether the device is gone.

    Example:
        >>> import pyvfio
        >>> kernel = pyvfio.testing.FakeKernel()
        >>> device = pyvfio.open_device("0000:00:02.0", kernel=kernel)
        >>> register = device.region(0).register32(4)
        >>> register.write(0xFF)
        >>> f"{register.read():#x}"  # this device, QEMU's edu, stores the complement
        '0xffffff00'
    """

    __slots__ = ("_cell", "_load", "_name", "_open", "_store", "guard")

    def __init__(
        self,
        name: str,
        guard: Guard,
        open_cell: Callable[[], Cell | None],
        load: Callable[[], int],
        store: Callable[[int], None],
    ) -> None:
        """`guard`: the guard of the region. `open_cell` maps the register; `load` and `store` need no cell."""
        self.guard = guard
        self._name = name
        self._open = open_cell
        self._load = load
        self._store = store
        self._cell: Cell = _CLOSED

    def __repr__(self) -> str:
        return f"<Register {self._name}>"

    def read(self) -> int:
        """Load the register. Raises as `Region.read32`."""
        try:
            return self._cell[()]
        except ValueError:
            return self._read_anew()

    def write(self, value: int) -> None:
        """Store `value`. Raises as `Region.write32`."""
        try:
            self._cell[()] = value
        except (ValueError, TypeError):
            self._write_anew(value)

    def _read_anew(self) -> int:
        self._find_cell()
        return self._load()

    def _write_anew(self, value: int) -> None:
        self._find_cell()
        self._store(value)

    def _find_cell(self) -> None:
        # Another thread may drop the new window at once. Then every access to the cell raises ValueError.
        cell = self._open()
        self._cell = _CLOSED if cell is None else cell


def poll(read: Callable[[], int], what: str, *, mask: int, value: int, timeout: float | None, interval: float) -> int:
    """Wait as `Region.poll32`, for any register."""
    mask, value = as_number(mask, "mask"), as_number(value, "value")
    if not 0 <= mask <= 0xFFFF_FFFF or value & ~mask:
        raise ValueError(f"a register of 32 bits & {mask:#x} can never be {value:#x}")
    seconds, pause = _seconds("timeout", timeout), _seconds("interval", interval)
    end = time.monotonic() + seconds
    while True:
        late = time.monotonic() >= end  # before the read, so that the last read is after the end
        last = read()
        if last & mask == value:
            return last
        if late:
            raise RegisterTimeoutError(
                f"{what} is {last:#x} after {seconds:g} s: & {mask:#x} gives {last & mask:#x}, not {value:#x}",
                last=last,
                mask=mask,
                value=value,
            )
        time.sleep(min(pause, max(end - time.monotonic(), 0)))


def _seconds(name: str, seconds: float | None) -> float:
    if isinstance(seconds, str | bytes):  # float() would accept text
        raise TypeError(f"{name} is a number of seconds, not {type(seconds).__name__}")
    try:
        seconds = math.inf if seconds is None else float(seconds)
    except TypeError:
        raise TypeError(f"{name} is a number of seconds, not {type(seconds).__name__}") from None
    if not seconds >= 0:
        raise ValueError(f"{name} is a number of seconds, 0 or more, not {seconds}")
    return seconds
