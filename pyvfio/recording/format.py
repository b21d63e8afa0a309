"""The text of a record: one line for each fact about the device, then one line for each event.

`Header` and the events print themselves with `str`, and `parse` reads a whole record. docs/recording.md describes each
line. The module is pure: no file is opened here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

VERSION = 1
CONFIG = 7  # VFIO_PCI_CONFIG_REGION_INDEX
COMMAND = 4  # linux/pci_regs.h
WIDTHS = (1, 2, 4, 8)
_MAGIC = "pyvfio-record"
_BEGIN, _END = "begin", "end"
_ROW = 16  # bytes of configuration space on a line
_STATUS, _STATUS_CAP_LIST, _CAPABILITY_LIST = 0x06, 0x10, 0x34
_REGIONS = ("bar0", "bar1", "bar2", "bar3", "bar4", "bar5", "rom", "config", "vga")
_IRQS = ("intx", "msi", "msix", "err", "req")
_BARS = range(6)
_CONFIG_SIZES = (256, 4096)
_COUNTS = range(1, (1 << 64) - 1)  # eventfd(2): the values that can be added
_FLAGS = ("read", "write", "mmap")
_RESETS = ("reset", "hot-reset")


def region_name(index: int) -> str:
    """Return the name of a region in a record: `bar0`, `config`, or `region9` for a region of the driver's own."""
    return _REGIONS[index] if index < len(_REGIONS) else f"region{index}"


def irq_name(index: int) -> str:
    """Return the name of a kind of interrupt in a record."""
    return _IRQS[index] if index < len(_IRQS) else f"irq{index}"


def is_block(offset: int, size: int) -> bool:
    """Return whether a system call for so many bytes is no single access of a register."""
    return size not in WIDTHS or bool(offset % size)


# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Access:
    """A read or write of a region.

    `width` is the number of bytes. `data` are the bytes, little-endian, or None if the kernel refused the access with
    `errno`. `block`: the kernel chose the widths (`Region.read`, `Region.write`).
    """

    write: bool
    region: int
    offset: int
    width: int
    data: bytes | None
    errno: int = 0
    block: bool = False

    @property
    def register(self) -> tuple[int, int, int]:
        """The region, offset and width."""
        return self.region, self.offset, self.width

    def is_same_place(self, other: Access) -> bool:
        """Return whether both have the same direction, region, offset and width."""
        return (self.write, self.block, self.register) == (other.write, other.block, other.register)

    def __str__(self) -> str:
        where = f"{region_name(self.region)} {self.offset:#07x}"
        if self.block:
            size = "" if self.data is not None and self.write else f" {self.width}"
            return f"{'write' if self.write else 'read'} {where}{size}{self._outcome(block=True)}"
        return f"{'w' if self.write else 'r'}{8 * self.width} {where}{self._outcome(block=False)}"

    def _outcome(self, *, block: bool) -> str:
        name = f" {errno.errorcode.get(self.errno, f'E{self.errno}')}" if self.errno else ""
        if self.data is None:
            return name
        value = self.data.hex() if block else f"{int.from_bytes(self.data, 'little'):#0{2 * self.width + 2}x}"
        return f" {value}{name}"


@dataclass(frozen=True, slots=True)
class Interrupt:
    """`times` signals of a vector, as one read of the eventfd returned them. `index` is the kind of interrupt."""

    index: int
    vector: int
    times: int

    def __str__(self) -> str:
        return f"irq {irq_name(self.index)} {self.vector} times {self.times}"


@dataclass(frozen=True, slots=True)
class Reset:
    """VFIO_DEVICE_RESET, or with `hot` VFIO_DEVICE_PCI_HOT_RESET."""

    hot: bool = False

    def __str__(self) -> str:
        return _RESETS[self.hot]


@dataclass(frozen=True, slots=True)
class Mmap:
    """A mapping of `Region.mmap`. Accesses through the mapping are not in the record."""

    region: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"mmap {region_name(self.region)} {self.offset:#07x} size {self.size:#x}"


Event: TypeAlias = Access | Interrupt | Reset | Mmap


# ------------------------------------------------------------------------------------------------------------- header


@dataclass(frozen=True, slots=True)
class RegionShape:
    """A region of the recorded device: `size` in bytes; `sparse`: the parts that can be mapped, None for all."""

    size: int
    flags: frozenset[str]
    sparse: tuple[tuple[int, int], ...] | None = None

    def __str__(self) -> str:
        words = [f"size {self.size:#x}", *(flag for flag in _FLAGS if flag in self.flags)]
        words += [f"part {offset:#x}+{size:#x}" for offset, size in self.sparse or ()]
        return " ".join(words)


@dataclass(frozen=True)
class Header:
    """The recorded device. `regions` and `irqs` (numbers of vectors) go by index; absent ones are left out.

    `config` is configuration space at the start of the recording, as the kernel shows it to users.
    """

    config: bytes
    resettable: bool
    regions: Mapping[int, RegionShape] = field(default_factory=dict)
    irqs: Mapping[int, int] = field(default_factory=dict)

    @property
    def vendor(self) -> int:
        """The PCI vendor, from configuration space."""
        return int.from_bytes(self.config[0:2], "little")

    @property
    def device(self) -> int:
        """The PCI device, from configuration space."""
        return int.from_bytes(self.config[2:4], "little")

    @property
    def class_code(self) -> int:
        """The PCI class of 24 bits, from configuration space."""
        return int.from_bytes(self.config[9:12], "little")

    def capabilities(self) -> list[tuple[int, int]]:
        """Return the standard capabilities of configuration space: offset and number of each."""
        found: list[tuple[int, int]] = []
        at = self.config[_CAPABILITY_LIST] & ~3 if self.config[_STATUS] & _STATUS_CAP_LIST else 0
        while at and at not in dict(found):
            found.append((at, self.config[at]))
            at = self.config[at + 1] & ~3
        return found

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{_MAGIC} {VERSION}"
        flags = " resettable" * self.resettable
        yield f"device {self.vendor:04x}:{self.device:04x} class {self.class_code:06x}{flags}"
        for index, region in sorted(self.regions.items()):
            yield f"region {region_name(index)} {region}"
        for index, count in sorted(self.irqs.items()):
            yield f"vectors {irq_name(index)} {count}"
        for at, number in self.capabilities():
            yield f"capability {at:#04x} id {number:#04x}"
        for at in range(0, len(self.config), _ROW):
            row = self.config[at : at + _ROW]
            if any(row):
                yield f"config {at:#05x} {row.hex(' ')}"
        yield _BEGIN


@dataclass(frozen=True)
class Line:
    """An event and the number of its line in the file, from 1 on."""

    number: int
    event: Event

    def __str__(self) -> str:
        return f"line {self.number}: {self.event}"


@dataclass(frozen=True)
class Record:
    """A whole record. `name` is the file in errors. `complete`: the last line is `end`."""

    name: str
    header: Header
    lines: tuple[Line, ...]
    complete: bool


# ------------------------------------------------------------------------------------------------------------ parsing


class _Reader:
    """The parser of one record; `number` is the line that is being read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.device: dict[str, str] = {}
        self.regions: dict[int, RegionShape] = {}
        self.irqs: dict[int, int] = {}
        self.config: dict[int, bytes] = {}
        self.resettable = False
        self.lines: list[Line] = []
        self.begun = self.ended = False

    def refuse(self, why: str) -> NoReturn:
        raise ValueError(f"{self.name}:{self.number}: {why}; docs/recording.md has the format")

    def read(self, text: str) -> None:
        words = text.partition("#")[0].partition("@")[0].split()
        if not words:
            return
        try:
            if self.ended:
                self.refuse("a line behind the line 'end'")
            if self.begun:
                self._read_event(words)
            else:
                self._read_fact(words)
        except (ValueError, IndexError, OverflowError, AttributeError) as error:
            if str(error).startswith(f"{self.name}:"):
                raise
            self.refuse(f"cannot read {text.strip()!r}")

    def _read_fact(self, words: list[str]) -> None:
        match words:
            case ["device", ids, "class", _, *flags]:
                self.device["ids"], self.resettable = ids, "resettable" in flags
            case ["region", name, "size", size, *rest]:
                self.regions[self._index(name, _REGIONS, "region")] = _shape(int(size, 0), rest)
            case ["vectors", name, count]:
                self.irqs[self._index(name, _IRQS, "irq")] = int(count)
            case ["capability", _, "id", _]:
                pass  # configuration space has the same
            case ["config", at, *row]:
                self.config[int(at, 0)] = bytes.fromhex("".join(row))
            case ["begin"]:
                self._begin()
            case _:
                self.refuse(f"no such line in a header: {' '.join(words)!r}")

    def _begin(self) -> None:
        if CONFIG not in self.regions:
            self.refuse("the header has no line 'region config size …'")
        if (size := self.regions[CONFIG].size) not in _CONFIG_SIZES:
            self.refuse(f"configuration space has 0x100 or 0x1000 bytes, not {size:#x}")
        self.begun = True

    def _read_event(self, words: list[str]) -> None:
        if words == [_END]:
            self.ended = True
            return
        event = self._event(words)
        if isinstance(event, Interrupt):
            self._check_interrupt(event)
        elif isinstance(event, Access | Mmap):
            # The size of a mapping is one of whole pages, and may be above that of the region.
            self._check_place(event.region, event.offset, event.width if isinstance(event, Access) else 1)
        self.lines.append(Line(self.number, event))

    def _check_interrupt(self, event: Interrupt) -> None:
        count = self.irqs.get(event.index, 0)
        if not 0 <= event.vector < count:
            self.refuse(f"{irq_name(event.index)} has {count} vectors, and no vector {event.vector}")
        if event.times not in _COUNTS:
            self.refuse(f"no vector is raised {event.times} times")

    def _check_place(self, index: int, offset: int, size: int) -> None:
        """Refuse an access outside the region. A region that no fake device has can be missing in the header."""
        region = self.regions.get(index)
        if region is None and index in _BARS:
            self.refuse(f"the header has no region {region_name(index)}")
        if region is not None and not 0 <= offset <= offset + size <= region.size:
            self.refuse(f"{region_name(index)} has {region.size:#x} bytes: no {size:#x} at {offset:#x}")

    def _event(self, words: list[str]) -> Event:
        match words:
            case ["irq", name, vector, "times", times]:
                return Interrupt(self._index(name, _IRQS, "irq"), int(vector), int(times))
            case ["reset" | "hot-reset"]:
                return Reset(hot=words[0] == _RESETS[1])
            case ["mmap", name, offset, "size", size]:
                return Mmap(self._index(name, _REGIONS, "region"), int(offset, 0), int(size, 0))
            case [kind, name, offset, *outcome]:
                return self._access(*self._width(kind, outcome), name, offset, outcome)
            case _:
                return self.refuse(f"no such event: {' '.join(words)!r}")

    def _width(self, kind: str, outcome: list[str]) -> tuple[bool, bool, int]:
        """Whether an access is a write, whether the kernel chose the widths, and the number of bytes."""
        if kind == "read":
            return False, True, int(outcome.pop(0))
        if kind == "write":
            return True, True, len(bytes.fromhex(outcome[0]))
        if kind[0] not in "rw" or kind[1:] not in [str(8 * width) for width in WIDTHS]:
            self.refuse(f"no such event: {kind!r}")
        return kind[0] == "w", False, int(kind[1:]) // 8

    def _access(self, write: bool, block: bool, width: int, name: str, offset: str, outcome: list[str]) -> Access:  # noqa: FBT001, PLR0917 (what `_width` returns)
        region = self._index(name, _REGIONS, "region")
        number = 0
        if outcome and outcome[-1].startswith("E"):
            number = _errno_of(outcome.pop())
        data = None
        if outcome:
            data = bytes.fromhex(outcome[0]) if block else int(outcome[0], 0).to_bytes(width, "little")
        if (
            len(outcome) > 1
            or (data is None and not (number and not write))
            or (data is not None and len(data) != width)
        ):
            self.refuse(f"an access of {width} bytes without a value of {width} bytes")
        return Access(write, region, int(offset, 0), width, data, number, block)

    def _index(self, name: str, names: tuple[str, ...], prefix: str) -> int:
        if name in names:
            return names.index(name)
        if name.startswith(prefix) and name.removeprefix(prefix).isdecimal():
            return int(name.removeprefix(prefix))
        return self.refuse(f"no such name: {name!r}")

    def record(self) -> Record:
        """The whole. Raises ValueError for a record without a header."""
        if not self.begun:
            self.refuse("the header has no line 'begin'")
        config = bytearray(self.regions[CONFIG].size)
        for at, row in self.config.items():
            if at + len(row) > len(config):
                self.refuse(f"configuration space has {len(config):#x} bytes, and a line goes beyond")
            config[at : at + len(row)] = row
        header = Header(bytes(config), self.resettable, self.regions, self.irqs)
        if self.device.get("ids") != f"{header.vendor:04x}:{header.device:04x}":
            self.refuse(
                f"the device is {self.device.get('ids')}, and configuration space says {header.vendor:04x}:"
                f"{header.device:04x}"
            )
        return Record(self.name, header, tuple(self.lines), self.ended)


def _errno_of(name: str) -> int:
    """Return the number of `EIO`, or of `E524`: the kernel has numbers without a name."""
    return int(name[1:]) if name[1:].isdecimal() else int(getattr(errno, name))


def _shape(size: int, words: Iterable[str]) -> RegionShape:
    parts = [word for word in words if "+" in word]
    flags = frozenset(word for word in words if word in _FLAGS)
    sparse = tuple((int(at, 0), int(length, 0)) for at, length in (part.split("+") for part in parts))
    return RegionShape(size, flags, sparse or None)


def parse(text: str, *, name: str) -> Record:
    """Read a record. `name` is the name of the file in errors.

    The last line is ignored if the newline is missing: the recorded program died while the line was written. Raises
    ValueError, with the number of the line, for text in another format.
    """
    reader = _Reader(name)
    whole = text[: text.rfind("\n") + 1]
    for reader.number, line in enumerate(whole.splitlines(), 1):
        if not line.isascii():
            reader.refuse("the line is not ASCII text")
        if reader.number == 1:
            if line.split() != [_MAGIC, str(VERSION)]:
                reader.refuse(f"the first line is not '{_MAGIC} {VERSION}'")
        else:
            reader.read(line)
    return reader.record()
