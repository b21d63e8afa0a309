"""The cost of the hot paths of a driver: pyvfio beside plain Python, and beside `bare_calls.c`.

`bare_calls.c` makes the same system calls and nothing else. Each cost is the time of a statement, repeated by `timeit`,
less the time of the empty loop. The least of several measurements counts. In a virtual machine whose clock counts
instructions, that is a measurement without the timer's interrupt.
"""

from __future__ import annotations

import array
import bisect
import ctypes
import fcntl
import mmap
import os
import select
import struct
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, TypeAlias

from pyvfio import ioctls
from pyvfio import iommufd_ioctls as abi
from pyvfio.container import Container
from pyvfio.device import Device
from pyvfio.dma import DmaMapper
from pyvfio.mapper.buffers import DmaMapping
from pyvfio.units import PAGE_SIZE
from tools.report import PathRow

COUNTS = (16, 1000, 16384)
"""The numbers of existing mappings while one more is measured."""
MOST = COUNTS[-1]
TEMPORARY = 64
"""The temporary mappings that one reset unmaps."""
IOVA = 0x1000_0000
"""The IOVA of the mapping whose IOVA the caller chooses; the mapper chooses lower IOVAs."""
LIVENESS = 4
"""A register of QEMU's edu that holds the number written to it, inverted."""
REPEAT = 9

_Clock: TypeAlias = Callable[[], float]
_Names: TypeAlias = dict[str, object]


class Path(NamedTuple):
    """A hot path. `bare`: the name of the path in `bare_calls.c`. `libvfn`: microseconds of libvfn, measured once."""

    key: str
    name: str
    bare: str | None = None
    libvfn: float | None = None


PATHS = (
    Path("container", "map + unmap of the address space, 4 KiB", "map"),
    Path("map_dma", "map_dma + close", "map", 15.0),
    Path("map_buffer", "map_buffer + close", "map", 15.0),
    *(
        Path(f"{call}_{count}", f"{call} + close, among {count:,}", f"map_{count}")
        for count in (COUNTS[0], MOST)
        for call in ("map_dma", "map_buffer")
    ),
    Path("temporary", f"map_temporary, {TEMPORARY} and one reset, each", "temporary", 14.5),
    *(
        Path(f"translate_{count}", f"vaddr to IOVA, among {count:,}", f"translate_{count}", libvfn)
        for count, libvfn in zip(COUNTS, (0.33, 0.62, 2.02), strict=True)
    ),
    Path("translate_all", f"vaddr to IOVA, {MOST:,} at once, each", "translate_all", 2.02),
    Path("translate_numpy", "the same, in an array of numpy's", "translate_all", 2.02),
    Path("read32", "Region.read32", "load", 0.003),
    Path("write32", "Region.write32", "store", 0.003),
    Path("register_read", "register object, read", "load", 0.003),
    Path("register_write", "register object, write", "store", 0.003),
    Path("view", "item of a view of the BAR", "load", 0.003),
    Path("config", "config.read32", "config"),
    Path("interrupt", "irq.wait for an interrupt that is there", "interrupt"),
)
"""In the order of the table."""

LIBVFN = (
    "libvfn 5, measured once on Linux 6.1 in the same virtual machine, and not fetched here. It maps one page among "
    "60,000 in 61 µs (on the host)."
)
"""The source of `Path.libvfn`."""


class Stopwatch(NamedTuple):
    """Measures statements by a clock that returns seconds."""

    clock: _Clock
    repeat: int

    def each(self, statement: str, names: _Names, *, number: int, apart: str = "pass", part: int = 1) -> float:
        """Return the microseconds of one operation, less those of `apart`. A statement makes `part` operations."""
        return (self._least(statement, names, number) - self._least(apart, names, number)) / number / part * 1e6

    def _least(self, statement: str, names: _Names, number: int) -> float:
        return min(timeit.repeat(statement, timer=self.clock, repeat=self.repeat, number=number, globals=names))


def clock_of(*, fake: bool) -> _Clock:
    """Return the processor time of this thread on the host, which has other work; in a virtual machine, the clock."""
    return time.thread_time if fake else time.perf_counter


def measure(device: Device, bare: Mapping[str, float], *, fake: bool, repeat: int = REPEAT) -> list[PathRow]:
    """Measure all paths with `device`, which must have the registers of QEMU's edu. Turns memory decoding on."""
    watch = Stopwatch(clock_of(fake=fake), repeat)
    own: dict[str, float] = {}
    plain: dict[str, float] = {}
    with ExitStack() as stack:
        memory = stack.enter_context(_Memory())
        for key, pair in [*_mappings(device, memory, watch, fake=fake), *_accesses(device, watch, fake=fake)]:
            own |= {key: pair.own} if pair.own is not None else {}
            plain |= {key: pair.plain} if pair.plain is not None else {}
    return rows(own, bare, plain)


def rows(own: Mapping[str, float], bare: Mapping[str, float], plain: Mapping[str, float]) -> list[PathRow]:
    """Put the figures side by side. The figures of `bare` have the names of `bare_calls.c`."""
    return [PathRow(path.key, own.get(path.key), bare.get(path.bare or ""), plain.get(path.key)) for path in PATHS]


class _Pair(NamedTuple):
    """The cost with pyvfio and in plain Python."""

    own: float | None
    plain: float | None


_Pairs: TypeAlias = Iterator[tuple[str, _Pair]]


class _Memory:
    """Populated pages of this process, for mapping."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, (MOST + 1) * PAGE_SIZE)

    def __enter__(self) -> _Memory:
        first = ctypes.c_char.from_buffer(self._memory)
        self.vaddr = ctypes.addressof(first)
        del first
        ctypes.memset(self.vaddr, 1, (MOST + 1) * PAGE_SIZE)
        self._view = memoryview(self._memory)
        return self

    def page(self, index: int) -> memoryview:
        return self._view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]

    def __exit__(self, *_exception: object) -> None:
        self._view.release()
        self._memory.close()


# ---------------------------------------------------------------------------------------------------------- mappings


class _Plain(NamedTuple):
    """The plain calls of an address space: layouts of structures, and statements."""

    map_layout: str
    map: str
    unmap: str


_TYPE1 = _Plain(
    "=IIQQQ",
    "ioctl(fd, MAP, bytearray(pack_map(32, 3, vaddr, iova, size)))",
    "ioctl(fd, UNMAP, bytearray(pack_unmap(24, 0, iova, size)))",
)
_IOMMUFD = _Plain(
    "=4I3Q",
    "ioctl(fd, MAP, bytearray(pack_map(40, 7, ioas, 0, vaddr, size, iova)))",
    "ioctl(fd, UNMAP, bytearray(pack_unmap(24, ioas, iova, size)))",
)


def _plain_of(device: Device) -> _Plain:
    return _TYPE1 if isinstance(device.space, Container) else _IOMMUFD


def _names(device: Device, memory: _Memory) -> _Names:
    space = device.space
    requests = (abi.IOMMU_IOAS_MAP, abi.IOMMU_IOAS_UNMAP)
    if isinstance(space, Container):
        requests = (ioctls.VFIO_IOMMU_MAP_DMA, ioctls.VFIO_IOMMU_UNMAP_DMA)
    return {
        "space": space,
        "fd": space.fd,
        "ioas": None if isinstance(space, Container) else space.id,
        "ioctl": fcntl.ioctl,
        "pack_map": struct.Struct(_plain_of(device).map_layout).pack,
        "pack_unmap": struct.Struct("=IIQQ").pack,
        "MAP": int(requests[0]),
        "UNMAP": int(requests[1]),
        "iova": IOVA,
        "size": PAGE_SIZE,
        "vaddr": memory.vaddr + MOST * PAGE_SIZE,
        "page": memory.page(MOST),
    }


def _mappings(device: Device, memory: _Memory, watch: Stopwatch, *, fake: bool) -> _Pairs:
    names, calls = _names(device, memory), _plain_of(device)

    def plain() -> float | None:  # a fake's descriptor is not an address space
        return None if fake else watch.each(f"{calls.map}; {calls.unmap}", names, number=20)

    call = "space.map(vaddr=vaddr, iova=iova, size=size); space.unmap(iova=iova, size=size)"
    yield "container", _Pair(watch.each(call, names, number=20), plain())
    with DmaMapper(device.space) as mapper:
        names["mapper"] = mapper
        yield from _one_more(watch, names, plain(), "")
        yield "temporary", _temporary(memory, watch, names, None if fake else calls)
        held: list[DmaMapping] = []
        starts = array.array("Q")
        for count in COUNTS:
            for index in range(len(held), count):
                held.append(mapper.map_dma(vaddr=memory.vaddr + index * PAGE_SIZE, size=PAGE_SIZE))
                starts.append(held[-1].vaddr)
            if count in (COUNTS[0], MOST):
                yield from _one_more(watch, names, plain(), f"_{count}")
            iovas = array.array("Q", [mapping.iova for mapping in held])
            yield f"translate_{count}", _translation(watch, names, starts, iovas)
        yield from _bulk(watch, names, starts)
        for mapping in reversed(held):
            mapping.close()


def _one_more(watch: Stopwatch, names: _Names, plain: float | None, among: str) -> _Pairs:
    """Measure one page more among the existing mappings."""
    call = "mapper.map_dma(vaddr=vaddr, size=size).close()"
    yield f"map_dma{among}", _Pair(watch.each(call, names, number=15), plain)
    yield f"map_buffer{among}", _Pair(watch.each("mapper.map_buffer(page).close()", names, number=15), plain)


def _temporary(memory: _Memory, watch: Stopwatch, names: _Names, plain: _Plain | None) -> _Pair:
    names |= {
        "pages": [memory.page(index) for index in range(TEMPORARY)],
        "places": [(memory.vaddr + at, IOVA + at) for at in range(0, TEMPORARY * PAGE_SIZE, PAGE_SIZE)],
    }
    call = "for each in pages: mapper.map_temporary(each).close()\nmapper.reset_temporary()"
    own = watch.each(call, names, number=2, apart="for each in pages: pass", part=TEMPORARY)
    if plain is None:
        return _Pair(own, None)
    call = f"for vaddr_, iova_ in places: {plain.map.replace('vaddr', 'vaddr_').replace('iova', 'iova_')}\n"
    call += plain.unmap.replace("size", f"{TEMPORARY} * size")
    apart = "for vaddr_, iova_ in places: pass"
    return _Pair(own, watch.each(call, names, number=2, apart=apart, part=TEMPORARY))


def _translation(watch: Stopwatch, names: _Names, starts: array.array[int], iovas: array.array[int]) -> _Pair:
    names |= {"wanted": starts[len(starts) // 2] + 8, "starts": starts, "iovas": iovas, "right": bisect.bisect_right}
    own = watch.each("mapper.translate_vaddr(wanted)", names, number=100)
    plain = "at = right(starts, wanted) - 1; iovas[at] + wanted - starts[at]"
    return _Pair(own, watch.each(plain, names, number=100))


def _bulk(watch: Stopwatch, names: _Names, vaddrs: array.array[int]) -> _Pairs:
    """Measure an array of addresses in one call, without numpy and then with numpy."""
    few = watch._replace(repeat=3)

    def each(statement: str) -> float:
        return few.each(statement, names, number=1, part=len(vaddrs))

    names |= {"vaddrs": vaddrs}
    there = hasattr(names["mapper"], "translate_vaddrs")
    plain = each("[iovas[right(starts, each) - 1] + each % 4096 for each in vaddrs]")
    yield "translate_all", _Pair(each("mapper.translate_vaddrs(vaddrs)") if there else None, plain)
    if find_spec("numpy") is None:
        return
    numpy = import_module("numpy")
    names |= {
        "numpy": numpy,
        "vector": numpy.array(vaddrs),
        "first": numpy.array(vaddrs),
        "numbers": numpy.array(names["iovas"]),
    }
    plain = each("at = numpy.searchsorted(first, vector, 'right') - 1; numbers[at] + vector - first[at]")
    yield "translate_numpy", _Pair(each("mapper.translate_vaddrs(vector)") if there else None, plain)


# ---------------------------------------------------------------------------------------------------------- accesses


def _accesses(device: Device, watch: Stopwatch, *, fake: bool) -> _Pairs:
    device.memory_enabled = True
    region, config = device.region(0), device.config
    with region.mmap() as mapping, mapping.view() as whole, whole.cast("I") as view:
        names: _Names = {
            "region": region,
            "register": region.register32(LIVENESS),
            "view": view,
            "config": config,
            "pread": os.pread,
            "fd": device.fd,
            "offset": device.region(ioctls.VFIO_PCI_CONFIG_REGION_INDEX).info.offset,
        }

        def each(statement: str, number: int = 200) -> float:
            return watch.each(statement, names, number=number)

        store = each(f"view[{LIVENESS // 4}] = 1")
        load = each(f"view[{LIVENESS // 4}]")  # not all ones, which would make `read32` check the device
        yield "read32", _Pair(each(f"region.read32({LIVENESS})"), load)
        yield "write32", _Pair(each(f"region.write32({LIVENESS}, 1)"), store)
        yield "register_read", _Pair(each("register.read()"), load)
        yield "register_write", _Pair(each("register.write(1)"), store)
        yield "view", _Pair(load, load)
        plain = None if fake else each("int.from_bytes(pread(fd, 4, offset), 'little')", 50)
        yield "config", _Pair(each("config.read32(0)", 50), plain)
    yield "interrupt", _interrupt(device, watch)


def _interrupt(device: Device, watch: Stopwatch) -> _Pair:
    """Measure an interrupt. This process writes the eventfd: neither the write nor the device counts."""
    irq = next(irq for irq in (device.irq(1), device.irq(0)) if irq.count)
    (fd,) = irq.enable(1)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    names: _Names = {"irq": irq, "write": os.eventfd_write, "poller": poller, "read": os.read, "fd": fd}
    apart = "write(fd, 1)"
    try:
        own = watch.each(f"{apart}; irq.wait(0)", names, number=50, apart=apart)
        plain = watch.each(f"{apart}; poller.poll(0); read(fd, 8)", names, number=50, apart=apart)
    finally:
        irq.disable()
    return _Pair(own, plain)
