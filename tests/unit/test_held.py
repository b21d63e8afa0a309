"""Buffers stay exported as long as one of their mappings needs them, and one export does for many."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

import pyvfio
from pyvfio.mapper.held import Exports, export_buffer
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import PAGE_SIZE
from tests.unit.fakes import Rig, nothing_left
from tests.unit.test_buckets import count_lines


@pytest.fixture
def rig() -> Iterator[Rig]:
    """A mapper without blocks."""
    with FakeKernel() as kernel, nothing_left(kernel), Rig(kernel) as made:
        yield made


def is_exported(memory: mmap.mmap) -> bool:
    """Whether somebody has a view of it."""
    try:
        memory.resize(len(memory))
    except BufferError:
        return True
    return False


def slices(memory: mmap.mmap, count: int) -> list[memoryview]:
    """A page each."""
    view = memoryview(memory)
    return [view[number * PAGE_SIZE : (number + 1) * PAGE_SIZE] for number in range(count)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("temporary", [False, True])
def test_slices_of_one_buffer_share_an_export_until_the_last_is_unmapped(
    rig: Rig, order: tuple[int, ...], *, temporary: bool
) -> None:
    """In whatever order they go; the program's own views may go before."""
    memory = mmap.mmap(-1, 3 * PAGE_SIZE)
    parts = slices(memory, 3)
    mappings = [rig.mapper.map_temporary(part) if temporary else rig.mapper.map_buffer(part) for part in parts]
    for part in parts:
        part.release()
    for number in order:
        assert is_exported(memory)
        mappings[number].close()
        rig.mapper._check()
    assert is_exported(memory) == temporary
    rig.mapper.reset_temporary()
    assert not is_exported(memory)


def test_a_map_that_fails_leaves_the_shared_export_to_the_others(rig: Rig) -> None:
    """Its own view is released."""
    memory = mmap.mmap(-1, 3 * PAGE_SIZE)
    parts = slices(memory, 3)
    held = [rig.mapper.map_buffer(part) for part in parts[:2]]
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=5)
    with pytest.raises(pyvfio.IoctlError):
        rig.mapper.map_buffer(parts[2])
    rig.mapper._check()
    for part in parts:
        part.release()
    for mapping in held:
        assert is_exported(memory)
        mapping.close()
    assert not is_exported(memory)


def test_a_view_of_other_memory_of_the_same_object_has_an_export_of_its_own() -> None:
    """Whether an export covers a view is seen from addresses alone: an object may export what it likes."""
    exports, memory = Exports(), mmap.mmap(-1, 4 * PAGE_SIZE)
    first, start = export_buffer(memoryview(memory)[:PAGE_SIZE])
    one = exports.keep(*export_buffer(memoryview(memory)[PAGE_SIZE : 2 * PAGE_SIZE]))
    two = exports.keep(*export_buffer(memoryview(memory)[2 * PAGE_SIZE :]))
    assert one is not two
    assert exports.keep(*export_buffer(memoryview(memory)[3 * PAGE_SIZE :])) is two
    assert exports.keep(*export_buffer(memoryview(memory)[:PAGE_SIZE])) is two
    other, _ = export_buffer(memoryview(memory)[:PAGE_SIZE])
    own = exports.keep(other, start + (1 << 40))  # as if it were elsewhere
    assert own is other
    size = len(memory)
    for vaddr in (start - PAGE_SIZE, start - 1, start + size - PAGE_SIZE + 1, start + size):  # or in part
        beside, _ = export_buffer(memoryview(memory)[:PAGE_SIZE])
        assert exports.keep(beside, vaddr) is beside
        exports.release(beside)
    first.release()
    exports._check([one, two, two, two, own])
    for export in (two, own, one, two, two):
        exports.release(export)
    exports._check([])


def test_buffers_of_different_objects_share_nothing() -> None:
    """Each is released by itself."""
    exports = Exports()
    arrays = [(ctypes.c_char * PAGE_SIZE)() for _ in range(3)]
    kept = [exports.keep(*export_buffer(array)) for array in arrays]
    exports._check(kept)
    assert len({id(export) for export in kept}) == 3
    for number, export in enumerate(kept):
        exports.release(export)
        exports._check(kept[number + 1 :])


def _measure(rig: Rig, use: Callable[[int], object], count: int) -> float:
    """Bytes that each of `count` uses leaves in the package without testing/."""
    names = ("*/testing/*", "<string>", __file__)
    filters = [tracemalloc.Filter(inclusive=False, filename_pattern=name) for name in names]
    for number in range(count, count + 64):  # what is allocated once
        use(number)
    tracemalloc.start()
    before = tracemalloc.take_snapshot().filter_traces(filters)
    for number in range(count):
        use(number)
        rig.kernel.clear_trace()
    after = tracemalloc.take_snapshot().filter_traces(filters)
    tracemalloc.stop()
    return sum(difference.size_diff for difference in after.compare_to(before, "filename")) / count


@pytest.mark.long
@pytest.mark.parametrize("kind", ["map_buffer", "map_temporary"])
def test_a_mapping_of_a_slice_costs_at_most_300_bytes(rig: Rig, kind: str) -> None:
    """A temporary one that was closed, too."""
    count = 2_000
    memory = mmap.mmap(-1, (count + 64) * PAGE_SIZE)
    view = memoryview(memory)

    def use(number: int) -> None:
        part = view[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
        mapping = rig.mapper.map_buffer(part) if kind == "map_buffer" else rig.mapper.map_temporary(part)
        if kind == "map_temporary":
            mapping.close()

    assert _measure(rig, use, count) <= 300
    rig.mapper.close()


@pytest.mark.parametrize("kind", ["map_buffer", "map_temporary", "reset"])
def test_a_mapping_among_many_costs_what_it_costs_among_few(rig: Rig, kind: str) -> None:
    """In lines of Python, and those of the fake's own book among them: open temporaries, given-up ones apart."""
    count = 1_500
    memory = mmap.mmap(-1, (count + 4) * PAGE_SIZE)
    parts = slices(memory, count + 4)
    held = [rig.mapper.map_temporary(parts[0])]
    uses: dict[str, Callable[[], object]] = {
        "map_buffer": lambda: rig.mapper.map_buffer(parts[-1]).close(),
        "map_temporary": lambda: rig.mapper.map_temporary(parts[-1]).close(),
        "reset": lambda: (rig.mapper.map_temporary(parts[-1]).close(), rig.mapper.reset_temporary()),
    }
    uses[kind]()
    few = count_lines(uses[kind])
    held += [rig.mapper.map_temporary(part) for part in parts[1:count]]
    many = count_lines(uses[kind])
    assert many < 2 * few
    rig.mapper.close()
    for mapping in held:
        mapping.close()


def test_a_temporary_mapping_that_cannot_be_unmapped_keeps_its_buffer_exported(rig: Rig) -> None:
    """A device still reaches the memory. The next reset unmaps it."""
    memory = mmap.mmap(-1, 2 * PAGE_SIZE)
    for part in slices(memory, 2):
        rig.mapper.map_temporary(part).close()
        part.release()
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=errno.EIO)
    with pytest.raises(OSError, match="EIO"):
        rig.mapper.reset_temporary()
    gc.collect()
    assert is_exported(memory)
    rig.mapper._check()
    assert rig.mapper.reset_temporary() == 0
    gc.collect()
    assert not is_exported(memory)


@pytest.mark.parametrize("name", ["map_buffer", "map_temporary"])
def test_a_buffer_that_is_refused_is_not_exported_while_the_error_lives(rig: Rig, name: str) -> None:
    """Whose traceback has the frames that had a view of it."""
    memory = mmap.mmap(-1, PAGE_SIZE)
    with memoryview(memory)[1:] as part, pytest.raises(ValueError, match="multiples") as caught:
        getattr(rig.mapper, name)(part)
    assert not is_exported(memory)
    assert caught.value.__traceback__ is not None
