"""Memory that is mapped is held: by each open mapping of all or of a part of it, until the last one is closed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.testing.fake import FakeKernel
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, MapperFactory, Rig, nothing_left, requests

POLICIES: dict[str, MapperFactory] = {
    "remap": pyvfio.DmaMapper,
    "extend": partial(pyvfio.DmaMapper, resize="extend"),
    "granule": partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE),
}
KINDS = ("map_dma", "map_buffer", "map_temporary")


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A kernel with a device."""
    with FakeKernel() as made:
        yield made


@pytest.fixture
def rig(kernel: FakeKernel) -> Iterator[Rig]:
    """A mapper that follows a list; nothing is left of it in the end."""
    with nothing_left(kernel), Rig(kernel) as made:
        made.device.bus_master = True
        yield made
        made.check()


def is_exported(memory: mmap.mmap) -> bool:
    """Whether something keeps it from being resized."""
    try:
        memory.resize(len(memory))
    except BufferError:
        return True
    return False


def hold(rig: Rig, block: pyvfio.RamBlock, kind: str, start: int, end: int) -> pyvfio.DmaMapping:
    """Map pages [start, end) of a block once more."""
    if kind == "map_dma":
        return rig.mapper.map_dma(vaddr=block.vaddr + start * PAGE_SIZE, size=(end - start) * PAGE_SIZE)
    with block.view() as view, view[start * PAGE_SIZE : end * PAGE_SIZE] as part:
        return rig.mapper.map_buffer(part) if kind == "map_buffer" else rig.mapper.map_temporary(part)


# ------------------------------------------------------------------------------------------------------- buffers


def open_all(rig: Rig, memory: mmap.mmap) -> list[pyvfio.DmaMapping]:
    """A mapping of all of it, and holders of every kind of all of it and of parts."""
    view = memoryview(memory)
    whole = rig.mapper.map_buffer(view)
    return [
        whole,
        rig.mapper.map_buffer(memory),
        rig.mapper.map_temporary(view[PAGE_SIZE:]),
        rig.mapper.map_dma(vaddr=whole.vaddr + 2 * PAGE_SIZE, size=PAGE_SIZE),
    ]


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_a_buffer_stays_mapped_and_exported_until_its_last_holder_is_closed(rig: Rig, order: tuple[int, ...]) -> None:
    """In whatever order they are closed: all are where the first one is, and none is where another buffer comes."""
    memory, other = mmap.mmap(-1, 3 * PAGE_SIZE), mmap.mmap(-1, 3 * PAGE_SIZE)
    mappings = open_all(rig, memory)
    offsets = [mapping.vaddr - mappings[0].vaddr for mapping in mappings]
    assert [mapping.iova - mappings[0].iova for mapping in mappings] == offsets
    assert len(rig.reached()) == 1
    for count, number in enumerate(order, start=1):
        mappings[number].close()
        mappings[number].close()
        with rig.mapper.map_buffer(other):
            for left in order[count:]:
                rig.kernel.dma_write(BDF, mappings[left].iova, bytes([left + 1]))
                assert memory[offsets[left]] == left + 1
        assert is_exported(memory) == (count < 4)
        assert other[:] == bytes(3 * PAGE_SIZE)
        rig.check()
    assert not rig.reached()
    assert not rig.container.allocator.reservations


def test_a_buffer_that_is_a_part_of_mapped_memory_is_exported_as_long_as_its_own_mapping(rig: Rig) -> None:
    """The whole was mapped by its address, so that nothing else keeps the buffer."""
    memory = mmap.mmap(-1, 2 * PAGE_SIZE)
    with rig.mapper.map_buffer(memory) as found:
        vaddr = found.vaddr
    whole = rig.mapper.map_dma(vaddr=vaddr, size=2 * PAGE_SIZE)
    part = rig.mapper.map_buffer(memoryview(memory)[:PAGE_SIZE])
    assert is_exported(memory)
    part.close()
    assert not is_exported(memory)
    assert len(rig.reached()) == 1
    whole.close()


def test_the_last_holder_can_be_closed_again_where_the_kernel_has_refused(rig: Rig) -> None:
    """It is still mapped, exported and held."""
    memory = mmap.mmap(-1, PAGE_SIZE)
    first, last = rig.mapper.map_buffer(memory), rig.mapper.map_buffer(memory)
    first.close()
    rig.kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", errno=5)
    with pytest.raises(pyvfio.IoctlError):
        last.close()
    assert is_exported(memory)
    assert len(rig.reached()) == 1
    rig.check()
    last.close()
    assert not is_exported(memory)


def test_a_closed_mapper_leaves_no_holder_anything_to_do(rig: Rig) -> None:
    """All are open when it is closed, and closing them afterwards does nothing."""
    memory = mmap.mmap(-1, 3 * PAGE_SIZE)
    mappings = open_all(rig, memory)
    rig.mapper.close()
    assert not rig.reached()
    assert not is_exported(memory)
    rig.kernel.clear_trace()
    for mapping in mappings:
        mapping.close()
    assert not rig.kernel.trace


@pytest.mark.parametrize("unseen", [False, True], ids=["through the container", "unseen"])
def test_memory_that_somebody_else_has_unmapped_can_be_closed(rig: Rig, *, unseen: bool) -> None:
    """Where the container has not seen it the kernel says another size, once; by then that is known."""
    pages = [mmap.mmap(-1, PAGE_SIZE) for _ in range(4)]
    fixed, *temporary = [rig.mapper.map_buffer(pages[0]), *(rig.mapper.map_temporary(page) for page in pages[1:])]
    for mapping in (fixed, temporary[1]):
        if unseen:
            argument = ioctls.vfio_iommu_type1_dma_unmap(24, 0, mapping.iova, mapping.size)
            rig.kernel.ioctl(rig.container.fd, ioctls.VFIO_IOMMU_UNMAP_DMA, argument)
        else:
            rig.container.unmap_dma(iova=mapping.iova, size=mapping.size)
    closes: list[Callable[[], object]] = [fixed.close, rig.mapper.reset_temporary]
    for mapping in temporary:
        mapping.close()
    for close in closes:
        if unseen:
            with pytest.raises(pyvfio.UnmapSizeError):
                close()
        close()
    assert not any(map(is_exported, pages))
    assert not rig.container.allocator.reservations


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_somebody_else_has_unmapped_is_not_said_to_be_mapped(rig: Rig, kind: str) -> None:
    """The device would be stopped there."""
    memory = mmap.mmap(-1, PAGE_SIZE)
    vaddr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    with rig.mapper.map_buffer(memory) as lost:
        rig.container.unmap(iova=lost.iova, size=PAGE_SIZE)
        if kind == "map_temporary":  # has a mapping of its own
            with rig.mapper.map_temporary(memory) as own:
                assert [iova for iova, _vaddr, _size in rig.reached()] == [own.iova]
        else:
            with pytest.raises(ValueError, match="which another user has unmapped; close its DmaMapping first"):
                rig.mapper.map_dma(vaddr=vaddr, size=PAGE_SIZE) if kind == "map_dma" else rig.mapper.map_buffer(memory)
    rig.mapper.reset_temporary()
    with rig.mapper.map_dma(vaddr=vaddr, size=PAGE_SIZE) as again:
        assert [iova for iova, _vaddr, _size in rig.reached()] == [again.iova]


def test_a_temporary_mapping_of_a_fixed_one_leaves_nothing_behind(rig: Rig) -> None:
    """It has the IOVA that is there, without a call, and a reset finds nothing of it."""
    memory = mmap.mmap(-1, PAGE_SIZE)
    with rig.mapper.map_buffer(memory) as fixed:
        rig.kernel.clear_trace()
        with rig.mapper.map_temporary(memory) as temporary:
            assert temporary.iova == fixed.iova
        assert rig.mapper.reset_temporary() == 0
        assert not rig.kernel.trace
    assert not is_exported(memory)


def test_a_temporary_mapping_of_a_part_is_where_the_part_is_and_nowhere_else(rig: Rig) -> None:
    """The IOVA of a block's part may be named, and no other."""
    block = rig.add(used=4 * PAGE_SIZE)
    with block.view(PAGE_SIZE, PAGE_SIZE) as part:
        place = rig.mapper.iova(block, PAGE_SIZE)
        with rig.mapper.map_temporary(part, iova=place) as mapping:
            assert mapping.iova == place
        with pytest.raises(ValueError, match=f"mapped at IOVA {place:#x}, and cannot be mapped at {0:#x}"):
            rig.mapper.map_temporary(part, iova=0)


def test_a_temporary_mapping_for_more_access_than_the_fixed_one_is_one_of_its_own(rig: Rig) -> None:
    """The device may do with each what was asked for there."""
    memory = mmap.mmap(-1, PAGE_SIZE)
    with rig.mapper.map_buffer(memory, write=False) as fixed, rig.mapper.map_temporary(memory) as temporary:
        assert temporary.iova != fixed.iova
        rig.kernel.dma_write(BDF, temporary.iova, b"x")
        assert memory[0] == ord("x")
    rig.mapper.reset_temporary()


# ------------------------------------------------------------------------------------------------------- blocks


LOSSES: dict[str, Callable[[pyvfio.RamBlock], None]] = {
    "shrink": lambda block: block.resize(2 * PAGE_SIZE),
    "shrink to nothing": lambda block: block.resize(0),
    "discard": lambda block: block.discard(2 * PAGE_SIZE, 2 * PAGE_SIZE),
    "discard a page of it": lambda block: block.discard(3 * PAGE_SIZE, PAGE_SIZE),
    "remove": lambda block: block.remove(),
}
OTHERS: dict[str, Callable[[pyvfio.RamBlock], None]] = {
    "grow": lambda block: block.resize(9 * PAGE_SIZE),
    "shrink behind it": lambda block: block.resize(5 * PAGE_SIZE),
    "discard before it": lambda block: block.discard(0, 2 * PAGE_SIZE),
    "discard behind it": lambda block: block.discard(4 * PAGE_SIZE, PAGE_SIZE),
    "populate": lambda block: block.populate(0, 5 * PAGE_SIZE),
    "other pages": lambda block: block.remap(2 * PAGE_SIZE, PAGE_SIZE),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_cannot_lose_bytes_of_an_open_mapping(kernel: FakeKernel, policy: str, kind: str) -> None:
    """The error names the mapping, and no call is made. All else can be done meanwhile, and everything afterwards."""
    with nothing_left(kernel), Rig(kernel, mapper=POLICIES[policy]) as rig:
        for name, lose in LOSSES.items():
            block = rig.add(name, used=8 * PAGE_SIZE)
            with hold(rig, block, kind, 2, 4) as mapping:
                assert mapping.iova == rig.mapper.iova(block) + 2 * PAGE_SIZE
                before = rig.reached()
                kernel.clear_trace()
                with pytest.raises(BufferError, match=f"{mapping!r} of a part of RAM block '{name}'"):
                    lose(block)
                assert not requests(kernel.trace)
                assert (rig.reached(), block.used_length) == (before, 8 * PAGE_SIZE)
                for change in OTHERS.values():
                    change(block)
                    rig.check()
                    assert rig.mapper.translate_vaddr(mapping.vaddr, mapping.size) == mapping.iova
            lose(block)
            rig.check()


def test_each_of_several_open_mappings_keeps_its_own_part(rig: Rig) -> None:
    """The block follows as they are closed."""
    block = rig.add(used=8 * PAGE_SIZE)
    mappings = [hold(rig, block, kind, page, page + 1) for page, kind in enumerate(KINDS)]
    for mapping in reversed(mappings):
        end = mapping.vaddr + mapping.size - block.vaddr
        with pytest.raises(BufferError, match=repr(mapping)):
            block.resize(end - PAGE_SIZE)
        block.resize(end)
        mapping.close()
    block.resize(0)


@pytest.mark.parametrize("end", ["list", "mapper"])
def test_closing_the_list_or_the_mapper_ends_all_mappings_of_parts(rig: Rig, end: str) -> None:
    """Without an error; closing the mappings afterwards does nothing."""
    block = rig.add(used=8 * PAGE_SIZE)
    mappings = [hold(rig, block, kind, 2, 4) for kind in KINDS]
    (rig.blocks if end == "list" else rig.mapper).close()
    assert not rig.reached()
    rig.kernel.clear_trace()
    for mapping in mappings:
        mapping.close()
    assert not rig.kernel.trace


class Refuses:
    """A notifier that refuses removals, as often as it is told to."""

    def __init__(self) -> None:
        self.times = 0

    def ram_block_removed(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """Refuse."""
        del block, used_length, max_length
        self.times -= 1
        if self.times >= 0:
            raise ZeroDivisionError


def test_a_block_that_another_notifier_keeps_in_a_list_that_is_closed_is_still_held(kernel: FakeKernel) -> None:
    """The open mapping is where it was, and the block cannot lose it."""
    with nothing_left(kernel), Rig(kernel) as rig:
        refuses = Refuses()
        rig.mapper.close()
        rig.blocks.add_notifier(refuses)
        rig.mapper = pyvfio.DmaMapper(rig.container, rig.blocks)
        block = rig.add(used=4 * PAGE_SIZE)
        mapping = hold(rig, block, "map_dma", 2, 3)
        refuses.times = 1
        with pytest.raises(ZeroDivisionError):
            rig.blocks.close()
        assert rig.mapper.translate_vaddr(mapping.vaddr) == mapping.iova
        with pytest.raises(BufferError):
            block.resize(PAGE_SIZE)
        mapping.close()
        block.resize(PAGE_SIZE)


def test_a_mapper_with_open_mappings_of_parts_cannot_be_taken_out_of_the_list(rig: Rig) -> None:
    """It can be closed."""
    mapping = hold(rig, rig.add(used=4 * PAGE_SIZE), "map_dma", 2, 3)
    with pytest.raises(BufferError):
        rig.blocks.remove_notifier(rig.mapper)
    assert rig.mapper.translate_vaddr(mapping.vaddr) == mapping.iova


def test_the_device_is_not_let_do_more_with_a_block_for_one_transfer(rig: Rig) -> None:
    """A block that devices may only read, and the tail of one, are refused: a second IOVA of it would outlive it."""
    block = rig.blocks.add("ring", used_length=4 * PAGE_SIZE, max_length=MIB, readonly=True)
    with block.view() as view:
        with pytest.raises(ValueError, match="or add the block with write access"):
            rig.mapper.map_temporary(view)
        with rig.mapper.map_temporary(view, write=False) as mapping:
            assert mapping.iova == rig.mapper.iova(block)
        block.discard(0, PAGE_SIZE)
        with pytest.raises(ValueError, match="reaches into RAM block 'ring'"):
            rig.mapper.map_temporary(view, write=False)


# ------------------------------------------------------------------------------------------------------- the space


def test_a_mapper_whose_space_has_lost_everything_says_so(kernel: FakeKernel) -> None:
    """In each answer. Blocks can be removed, and everything can be closed."""
    with nothing_left(kernel):
        rig = Rig(kernel)
        block, memory = rig.add(), mmap.mmap(-1, PAGE_SIZE)
        kept, mapping = rig.add("kept"), rig.mapper.map_buffer(memory)
        vaddr = block.vaddr
        for start in (vaddr, mapping.vaddr):  # the last answer is kept
            rig.mapper.translate_vaddr(start)
        rig.device.close()
        uses: list[Callable[[], object]] = [
            lambda: rig.mapper.iova(block),
            lambda: rig.mapper.translate_vaddr(mapping.vaddr),
            lambda: rig.mapper.translate_vaddr(vaddr),
            lambda: rig.mapper.translate_iova(mapping.iova),
            lambda: rig.mapper.map_buffer(memory),
            lambda: rig.mapper.map_temporary(memory),
            lambda: rig.mapper.map_dma(vaddr=vaddr, size=PAGE_SIZE),
            lambda: rig.mapper.plan([kept]),
            lambda: block.resize(MIB),
            lambda: rig.add("another"),
        ]
        for use in uses:
            with pytest.raises(pyvfio.VfioError, match="its last group was detached"):
                use()
        block.remove()
        mapping.close()
        assert not is_exported(memory)
        rig.mapper.close()
        rig.blocks.close()
