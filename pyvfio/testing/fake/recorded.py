"""`RecordedDevice`: a fake device made of a record. A driver that departs from the record gets an error."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from functools import partial
from pathlib import Path

from pyvfio.recording.format import (
    COMMAND,
    CONFIG,
    Access,
    Interrupt,
    Line,
    Record,
    Reset,
    is_block,
    parse,
    region_name,
)
from pyvfio.testing.fake.device import Bar, FakeDevice
from pyvfio.testing.fake.pci_device import FakePciDevice
from pyvfio.testing.fake.replay import Action, Mismatch, OrderName, Register, make_order
from pyvfio.units import PAGE_SIZE

_BARS = range(6)
_BARS_AT = 0x10
_IO_BAR = 1
_INTX, _MSI, _MSIX = range(3)
_MSIX_CAPABILITY = 0x11
_FULL = 4096  # bytes of configuration space of a PCI Express device
_GIVEN = ((0x06, 0x0C), (0x28, 0x3C), (0x3D, 0x100), (0x100, _FULL))  # parts that FakeDevice takes
_SHOWN = 5  # accesses before a departure that an error has


class DepartureError(AssertionError):
    """A driver made an access that differs from the record.

    `line`: the number of the line in the record. `expected`: the recorded access (empty: the record has ended).
    `actual`: the access of the driver (empty: the driver has ended). `before`: the last accesses that agreed with the
    record, the oldest first.
    """

    def __init__(
        self, record: str, line: int, *, expected: str, actual: str, before: tuple[str, ...], why: str = ""
    ) -> None:
        listed = "".join(f"\n    {each}" for each in before) or " none"
        super().__init__(
            f"{record}:{line}: the driver departs from the record{': ' * bool(why)}{why}"
            f"\n  expected: {expected or 'no further access'}\n  actual: {actual or 'the driver has ended'}"
            f"\n  before:{listed}"
        )
        self.record = record
        self.line = line
        self.expected = expected
        self.actual = actual
        self.before = before


class RecordedDevice(FakePciDevice):
    """A fake device made of a record of `Device.record`: `FakeKernel(groups=[(2, [RecordedDevice(bdf, file)])])`.

    Reads return the recorded values, writes are compared with the record, and interrupts come where the record has
    them. `order`: "strict" compares line by line. "registers" keeps the order of the writes of each register alone,
    repeats the value of a register that has not changed, and collapses polls. `any_value`: pairs of a BAR and an
    offset whose writes may have any value, such as the addresses of buffers.

    The first access that differs, and each later access of a BAR, raise DepartureError. Call `check()` at the end of
    the test, as the pytest plugin does: a driver that has ended before the record is an error, too. Each open of the
    device restarts the record. When the record has ended, writes of configuration space and resets are ignored.

    The record has no data that the device wrote to memory, so a replayed device does no DMA.

    Raises ValueError for a file in another format, with the number of the line; OSError.

    Synchronization: as `FakePciDevice`.
    """

    def __init__(
        self,
        bdf: str,
        record: Path | str,
        *,
        order: OrderName = "strict",
        any_value: Collection[Register] = (),
        driver: str | None = "vfio-pci",
    ) -> None:
        if order not in ("strict", "registers"):
            raise ValueError(f"order is 'strict' or 'registers', not {order!r}")
        path = Path(record)
        self.bdf = bdf
        self.record: Record = parse(path.read_text(encoding="utf-8", errors="replace"), name=path.name)
        """The record that was read."""
        self._slot = None
        self._order_name: OrderName = order
        self._any_value = frozenset(any_value)
        self._check_replayable()
        self._begin()
        self.declaration = self._declare(driver)

    def _begin(self) -> None:
        self._order = make_order(self._order_name, self.record, self._any_value)
        self._before: deque[str] = deque(maxlen=_SHOWN)
        self._departure: DepartureError | None = None
        self._owed: list[Interrupt] = []

    def _check_replayable(self) -> None:
        for line in self.record.lines:
            region = getattr(line.event, "region", CONFIG)
            if region not in (*_BARS, CONFIG):
                name = region_name(region)
                raise ValueError(f"{self.record.name}:{line.number}: a fake device has no {name} to replay")

    def _declare(self, driver: str | None) -> FakeDevice:
        header = self.record.header
        config, bars = header.config, {number: self._make_bar(number) for number in _BARS if number in header.regions}
        table = next((at for at, number in header.capabilities() if number == _MSIX_CAPABILITY), None)
        msix = header.irqs.get(_MSIX, 0)
        msix_bar = config[table + 4] & 7 if table and msix else None
        return FakeDevice(
            self.bdf,
            driver=driver,
            vendor=header.vendor,
            device=header.device,
            class_code=header.class_code,
            bars=bars,
            intx=bool(header.irqs.get(_INTX, 0)),
            msi=header.irqs.get(_MSI, 0),
            msix=msix,
            msix_bar=msix_bar if msix_bar in bars else None,
            resettable=header.resettable,
            pcie=len(config) == _FULL,
            config={start: config[start:end] for start, end in _GIVEN if config[start:end]},
            follower=self,
        )

    def _make_bar(self, number: int) -> Bar:
        shape, config = self.record.header.regions[number], self.record.header.config
        io, mapped = bool(config[_BARS_AT + 4 * number] & _IO_BAR), "mmap" in shape.flags
        sparse = None if io else shape.sparse if mapped else ()
        return Bar(
            shape.size,
            read=partial(self._read, number),
            write=partial(self._write, number),
            io=io,
            own_page=mapped and shape.size < PAGE_SIZE,
            sparse=sparse,
        )

    def check(self) -> None:
        """Raise DepartureError if the driver has departed from the record, or has ended too early.

        With order="registers" the driver may leave out reads.
        """
        if self._departure is not None:
            raise self._departure
        if (line := self._order.left()) is not None:
            raise self._error(line, None, "the driver has ended before the record")

    # ---------------------------------------------------------------------------------------------- the fake's calls

    def reset(self) -> None:
        """Nothing: `was_reset` compares resets with the record."""

    def read_register(self, bar: int, offset: int, width: int, /) -> int:
        """Return the recorded value. Raises DepartureError."""
        return int.from_bytes(self._take(Access(False, bar, offset, width, None)), "little")  # noqa: FBT003 (a read)

    def write_register(self, bar: int, offset: int, width: int, value: int, /) -> None:
        """Compare with the record. Raises DepartureError."""
        self._take(Access(True, bar, offset, width, value.to_bytes(width, "little")))  # noqa: FBT003 (a write)

    def read_block(self, bar: int, offset: int, size: int, /) -> bytes:
        """As `read_register`, of any size."""
        block = is_block(offset, size)
        return self._take(Access(write=False, region=bar, offset=offset, width=size, data=None, block=block))

    def write_block(self, bar: int, offset: int, data: bytes, /) -> None:
        """As `write_register`, of any size."""
        block = is_block(offset, len(data))
        self._take(Access(write=True, region=bar, offset=offset, width=len(data), data=data, block=block))

    def read_config(self, offset: int, data: bytes, /) -> bytes:
        """Return configuration space at this place of the record."""
        self._order.look_at_config(offset, len(data))
        self._signal()
        return bytes(self._order.config[offset : offset + len(data)])

    def wrote_config(self, offset: int, data: bytes, /) -> None:
        """Compare with the record, unless COMMAND stays the same. Raises DepartureError."""
        config = self._order.config
        if offset == COMMAND and config[offset : offset + len(data)] == data:
            return
        actual = Access(
            write=True, region=CONFIG, offset=offset, width=len(data), data=data, block=is_block(offset, len(data))
        )
        if self._has_ended:
            config[offset : offset + len(data)] = data
        else:
            self._take(actual)

    def was_reset(self, *, hot: bool) -> None:
        """Compare with the record. Raises DepartureError."""
        if not self._has_ended:
            self._take(Reset(hot=hot))

    def opened(self) -> None:
        """Restart the record."""
        self._begin()

    def set_irqs(self) -> None:
        """Signal the interrupts that had no eventfd before."""
        self._signal()

    # --------------------------------------------------------------------------------------------------------- inside

    @property
    def _has_ended(self) -> bool:
        """Whether the driver is past the record, or was found to depart: a close must not raise more errors."""
        return self._departure is not None or self._order.left() is None

    def _take(self, actual: Action) -> bytes:
        if self._departure is not None:
            raise self._departure
        try:
            line = self._order.take(actual)
        except Mismatch as mismatch:
            self._departure = self._error(mismatch.expected, actual, mismatch.why)
            raise self._departure from None
        self._before.append(str(line))
        self._signal()
        return (isinstance(line.event, Access) and line.event.data) or b""

    def _error(self, expected: Line | None, actual: Action | None, why: str) -> DepartureError:
        lines = self.record.lines
        return DepartureError(
            self.record.name,
            expected.number if expected is not None else lines[-1].number if lines else 0,
            expected="" if expected is None else str(expected.event),
            actual="" if actual is None else str(actual),
            before=tuple(self._before),
            why=why,
        )

    def _signal(self) -> None:
        self._owed += self._order.due()
        if self._owed and self._slot is not None:
            slot = self._slot
            self._owed = [each for each in self._owed if not slot.signal(each.index, each.vector, each.times)]
