"""The bytes of Python objects for one of many mappings and for one of many blocks, as tracemalloc counts them."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TypeAlias

from pyvfio.dma import DmaMapper
from pyvfio.iommu.space import AddressSpace
from pyvfio.ramblock import RamBlockList
from pyvfio.units import PAGE_SIZE
from tools.report import MemoryRow

COUNT = 500
_Make: TypeAlias = Callable[[ExitStack, AddressSpace, int], object]
_TOOLS = (tracemalloc.__file__, __file__)
_FRAMES = 2  # a named tuple of the fake is made in a frame without a file, below a frame with one


def measure(space: AddressSpace, *, count: int = COUNT) -> list[MemoryRow]:
    """Make `count` of each kind, and return the bytes for each. Only objects of pyvfio count, not those of the fake."""
    makes: dict[str, _Make] = {
        "a mapping by map_dma": _dma,
        "a mapping by map_buffer": _buffers,
        "a temporary mapping": _temporary,
        "a block": _blocks,
        "a block that a mapper follows": _followed,
    }
    return [MemoryRow(name, _of(make, space, count) / count) for name, make in makes.items()]


def _of(make: _Make, space: AddressSpace, count: int) -> int:
    """Return the bytes of objects that are alive after `make` but were not before."""
    with ExitStack() as stack:
        gc.collect()
        tracemalloc.start(_FRAMES)
        stack.callback(tracemalloc.stop)
        kept = make(stack, space, count)
        gc.collect()
        found = tracemalloc.take_snapshot()
        del kept
        return counted(found)


def counted(snapshot: tracemalloc.Snapshot) -> int:
    """Return the bytes of the objects that the library made, which were traced with `_FRAMES` frames."""
    return sum(trace.size for trace in snapshot.traces if _counts(trace.traceback))


def _counts(traceback: tracemalloc.Traceback) -> bool:
    """Return whether the library made the object. `Snapshot.filter_traces` takes fifty times as long."""
    files = [frame.filename for frame in traceback]
    return files[-1] not in _TOOLS and not any(map(_is_fake, files))


@cache
def _is_fake(file: str) -> bool:
    return f"{os.sep}testing{os.sep}" in file


@contextmanager
def _pages(count: int) -> Iterator[list[memoryview]]:
    """Yield pages that are not adjacent. The pages are not counted, because this module makes them."""
    memory = mmap.mmap(-1, 2 * count * PAGE_SIZE)
    view = memoryview(memory)
    pages = [view[start : start + PAGE_SIZE] for start in range(0, len(memory), 2 * PAGE_SIZE)]
    try:
        yield pages
    finally:
        for page in pages:
            page.release()
        view.release()
        memory.close()


def _dma(stack: ExitStack, space: AddressSpace, count: int) -> object:
    pages = stack.enter_context(_pages(count))
    mapper = stack.enter_context(DmaMapper(space))
    return [mapper.map_dma(vaddr=ctypes.addressof(ctypes.c_char.from_buffer(page)), size=PAGE_SIZE) for page in pages]


def _buffers(stack: ExitStack, space: AddressSpace, count: int) -> object:
    pages = stack.enter_context(_pages(count))
    mapper = stack.enter_context(DmaMapper(space))
    return [mapper.map_buffer(page) for page in pages]


def _temporary(stack: ExitStack, space: AddressSpace, count: int) -> object:
    pages = stack.enter_context(_pages(count))
    mapper = stack.enter_context(DmaMapper(space))
    for page in pages:
        mapper.map_temporary(page).close()
    return mapper


def _blocks(stack: ExitStack, space: AddressSpace, count: int) -> object:
    return _add(stack.enter_context(RamBlockList(kernel=space.kernel)), count)


def _followed(stack: ExitStack, space: AddressSpace, count: int) -> object:
    blocks = stack.enter_context(RamBlockList(kernel=space.kernel))
    stack.enter_context(DmaMapper(space, blocks))
    return _add(blocks, count)


def _add(blocks: RamBlockList, count: int) -> object:
    return [blocks.add(f"{index}", used_length=PAGE_SIZE, max_length=2 * PAGE_SIZE) for index in range(count)]
