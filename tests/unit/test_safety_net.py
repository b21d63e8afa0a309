"""Blocks that are memory altogether: for a listener that cannot follow a resize, or since a part could not be had.

The listeners that the series names are in tests/unit/test_listener_models.py.
"""

from __future__ import annotations

import errno
import logging
import os
import resource
from functools import partial
from pathlib import Path

import pytest

import pyvfio
from pyvfio import Anonymous, Memfd, RamBlock, RamBlockList
from pyvfio.memory import MemoryKind
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, Rig, SpecialKernel
from tests.unit.processes import in_child, limit_memory, mappings_left, open_fds

IOVA = 0x40_0000_0000 >> 4


class Registration:
    """As SEV has it: registers `max_length` when a block comes, and knows nothing of resizes. Here with an IOMMU."""

    def __init__(self, container: pyvfio.Container) -> None:
        self.container = container

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """All of it, whatever is used."""
        assert used_length <= max_length
        self.container.map(vaddr=block.vaddr, iova=IOVA, size=max_length)

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """All of it."""
        assert used_length <= block.max_length == max_length
        self.container.unmap(iova=IOVA, size=max_length)


def proc_areas() -> int:
    """How much address space nobody can touch."""
    spans = [line.split()[:2] for line in Path("/proc/self/maps").read_text(errors="replace").splitlines()]
    return sum(int(span.split("-")[1], 16) - int(span.split("-")[0], 16) for span, rights in spans if rights == "---p")


def contents(block: RamBlock) -> bytes:
    """All of it."""
    with block.view() as view:
        return bytes(view)


def test_blocks_are_allocated_in_full_for_who_cannot_follow_a_resize(
    rig: Rig, kernel: SpecialKernel, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is said, with who is the reason. What was registered stays memory through every resize."""
    listener = Registration(rig.container)
    rig.blocks.add_notifier(listener)
    with caplog.at_level(logging.WARNING, "pyvfio"):
        block = rig.add(used=PAGE_SIZE, maximum=MIB)
    assert "allocated in full, 1 MiB" in caplog.text
    assert "Registration" in caplog.text
    assert block.whole
    for length in (4, 0, 2):
        block.resize(length * PAGE_SIZE)
        rig.blocks._check()
        assert kernel.dma_read(BDF, IOVA + MIB - 16, 16) == bytes(16)
    kernel.check()
    assert not kernel.violations
    rig.blocks.remove_notifier(listener)


def test_others_follow_the_length_of_such_a_block_as_that_of_any(rig: Rig) -> None:
    """The mapper reaches what is used."""
    rig.blocks.add_notifier(listener := Registration(rig.container))
    block = rig.add(used=PAGE_SIZE, maximum=MIB)
    iova = rig.mapper.iova(block)
    for length in (4, 2):
        block.resize(length * PAGE_SIZE)
        assert (iova, block.vaddr, length * PAGE_SIZE) in rig.reached()
    rig.blocks.remove_notifier(listener)


def test_such_a_block_has_memory_from_the_beginning_and_grows_without_any_call(rig: Rig, kernel: SpecialKernel) -> None:
    """What comes back reads zeros nevertheless."""
    rig.blocks.add_notifier(listener := Registration(rig.container))
    block = rig.add(used=2 * PAGE_SIZE, maximum=MIB)
    with block.view() as view:
        view[:] = b"x" * len(view)
    kernel.clear_trace()
    block.resize(PAGE_SIZE)
    block.resize(2 * PAGE_SIZE)
    assert {call.call for call in kernel.trace} == {"ioctl"}
    assert contents(block) == b"x" * PAGE_SIZE + bytes(PAGE_SIZE)
    rig.blocks.remove_notifier(listener)


def test_a_block_that_cannot_be_had_in_full_is_refused(rig: Rig, kernel: SpecialKernel) -> None:
    """Nothing is left of it."""
    rig.blocks.add_notifier(listener := Registration(rig.container))
    before = proc_areas()
    for nth in (1, 2):
        kernel.fail(call="mprotect", errno=errno.ENOMEM, nth=nth)
    with pytest.raises(pyvfio.IoctlError, match="1 MiB more memory could not be allocated"):
        rig.add(used=0, maximum=MIB)
    assert (len(rig.blocks), proc_areas()) == (0, before)
    rig.blocks.remove_notifier(listener)


def test_who_cannot_follow_a_resize_cannot_come_where_blocks_can_be_resized(rig: Rig) -> None:
    """It would reach what is no memory, or go on reaching what was given back. It is told nothing."""
    block = rig.add(used=PAGE_SIZE)
    with pytest.raises(pyvfio.UnsupportedError, match=r"not resizes.*'ring'.*Add the notifier before"):
        rig.blocks.add_notifier(Registration(rig.container))
    block.resize(2 * PAGE_SIZE)
    assert rig.reached() == rig.expected()


def test_when_it_has_gone_blocks_are_resizable_again(rig: Rig) -> None:
    """Those that come then; the others stay as they are."""
    rig.blocks.add_notifier(listener := Registration(rig.container))
    whole = rig.add("whole", maximum=MIB)
    rig.blocks.remove_notifier(listener)
    assert [whole.whole, rig.add("new").whole] == [True, False]
    rig.blocks._check()


def test_a_refused_resize_leaves_such_a_block_as_it_was(rig: Rig, kernel: SpecialKernel) -> None:
    """As any other."""
    rig.blocks.add_notifier(listener := Registration(rig.container))
    block = rig.add(used=2 * PAGE_SIZE, maximum=MIB)
    for length in (4, 1):
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", errno=errno.ENOMEM)
        with pytest.raises(pyvfio.PinLimitError):
            block.resize(length * PAGE_SIZE)
        assert block.used_length == 2 * PAGE_SIZE
        rig.blocks._check()
    rig.blocks.remove_notifier(listener)


# ------------------------------------------------------------------------------------------ a part that cannot be had


KINDS = pytest.mark.parametrize("kind", [Anonymous(), Memfd()], ids=["anonymous", "memfd"])


def nothing_but_the_whole(kernel: SpecialKernel) -> None:
    """What a kernel says where a process has as many mappings as it may: the first mprotect would make one more."""
    kernel.fail(call="mprotect", errno=errno.ENOMEM)


@pytest.mark.long
@KINDS
def test_a_process_that_has_no_mapping_left_gets_a_block_in_full(kind: MemoryKind) -> None:
    """Where the kernel refuses a part, for real: two mappings are left, of which the block's address space takes one
    or both. It is resized there and back, and its memory reads zeros when it comes back."""

    written = b"x" * 2 * PAGE_SIZE

    def child() -> None:
        with RamBlockList() as blocks:
            with mappings_left(2):  # nor is there any for more memory of Python's own
                block = blocks.add("ram", used_length=2 * PAGE_SIZE, max_length=4 * MIB, memory=kind)
                with block.view() as view:
                    view[:] = written
                for length in (1, 900, 2):
                    block.resize(length * PAGE_SIZE)
            assert block.whole
            assert contents(block) == written[:PAGE_SIZE] + bytes(PAGE_SIZE)
            blocks._check()
            assert not blocks.add("ordinary", used_length=PAGE_SIZE, max_length=MIB, memory=kind).whole
            blocks._check()

    assert in_child(child) == 0


@KINDS
def test_a_block_of_which_a_part_could_not_be_had_is_allocated_in_full(
    kernel: SpecialKernel, caplog: pytest.LogCaptureFixture, kind: MemoryKind
) -> None:
    """And it is said, with the kernel's reason. A device reaches what is used of it, all the same."""
    with Rig(kernel, memory=kind) as rig:
        nothing_but_the_whole(kernel)
        with caplog.at_level(logging.WARNING, "pyvfio"):
            block = rig.add(used=2 * PAGE_SIZE, maximum=MIB)
        assert (
            "RAM block 'ring' is allocated in full, 1 MiB: a part could not be allocated alone: mprotect" in caplog.text
        )
        assert block.whole
        for length in (4, 0, 256, 1):
            block.resize(length * PAGE_SIZE)
            assert not any(contents(block)[PAGE_SIZE:])
            with block.view() as view:
                view[:] = b"x" * len(view)
            rig.check()
            assert rig.reached() == rig.expected()
        block.resize(2 * PAGE_SIZE)
        assert kernel.dma_read(BDF, rig.mapper.iova(block), 2 * PAGE_SIZE) == b"x" * PAGE_SIZE + bytes(PAGE_SIZE)
        block.discard(0, PAGE_SIZE)
        block.populate(0, PAGE_SIZE)
        rig.check()
        assert not any(contents(block))


def test_pages_of_such_a_memfd_come_when_it_grows(kernel: SpecialKernel) -> None:
    """So that a machine is not filled with what may never be used, nor a process killed for touching what is not
    there: that there are none is an error."""
    with RamBlockList(kernel=kernel) as blocks:
        nothing_but_the_whole(kernel)
        block = blocks.add("ram", used_length=PAGE_SIZE, max_length=MIB, memory=Memfd())
        assert block.file is not None
        assert [os.fstat(block.file.fd).st_size, os.fstat(block.file.fd).st_blocks * 512] == [MIB, PAGE_SIZE]
        kernel.fail(call="fallocate", errno=errno.ENOSPC)
        with pytest.raises(pyvfio.IoctlError, match="more memory could not be allocated"):
            block.resize(3 * PAGE_SIZE)
        block.resize(4 * PAGE_SIZE)
        assert os.fstat(block.file.fd).st_blocks * 512 == 4 * PAGE_SIZE


def test_such_a_block_may_be_reached_behind_its_end_where_an_undo_has_failed(kernel: SpecialKernel) -> None:
    """Nothing is ever given back there, so that nothing has to be held; the next change puts it right."""
    with Rig(kernel, mapper=partial(pyvfio.DmaMapper, resize="extend", granule=PAGE_SIZE)) as rig:
        nothing_but_the_whole(kernel)
        block = rig.add(used=PAGE_SIZE)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_MAP_DMA", nth=3, errno=errno.ENOMEM)
        kernel.fail(call="ioctl", request="VFIO_IOMMU_UNMAP_DMA", nth=1, errno=errno.EIO)
        with pytest.raises(pyvfio.RollbackError):
            block.resize(4 * PAGE_SIZE)
        kernel.clear_failures()
        assert sum(size for *_where, size in rig.reached()) == 3 * PAGE_SIZE
        rig.mapper._check()
        block.remap(0, PAGE_SIZE)
        assert rig.reached() == rig.expected()
        rig.check()


def test_pages_of_such_a_block_are_there_before_they_are_used_where_that_was_asked(kernel: SpecialKernel) -> None:
    """By prealloc, as of any."""
    with RamBlockList(kernel=kernel) as blocks:
        nothing_but_the_whole(kernel)
        block = blocks.add("ram", used_length=PAGE_SIZE, max_length=MIB, prealloc=1)
        kernel.clear_trace()
        block.resize(4 * PAGE_SIZE)
        assert [(call.call, *call.given[:2]) for call in kernel.trace] == [
            ("madvise", block.vaddr + PAGE_SIZE, 3 * PAGE_SIZE)
        ]


@pytest.mark.parametrize(
    ("kind", "call"),
    [(Anonymous(), "mprotect"), *((Memfd(), call) for call in ("mprotect", "ftruncate", "fallocate"))],
)
def test_when_not_even_the_whole_can_be_had_the_first_refusal_is_what_is_heard(
    kernel: SpecialKernel, kind: MemoryKind, call: str
) -> None:
    """Nothing is left behind: no address space, no descriptor, no block; and one can be made at once."""
    with RamBlockList(kernel=kernel) as blocks:
        before, fds, areas = proc_areas(), open_fds(), list(kernel.areas)
        nothing_but_the_whole(kernel)
        # The first fallocate is that of the part, and the first ftruncate gives that back.
        kernel.fail(call=call, errno=errno.EIO, nth=2)
        with pytest.raises(pyvfio.IoctlError, match=r"mprotect.* 8 KiB more memory could not be allocated") as raised:
            blocks.add("ram", used_length=2 * PAGE_SIZE, max_length=MIB, memory=kind)
        assert raised.value.errno == errno.ENOMEM
        assert (len(blocks), proc_areas(), open_fds(), kernel.areas) == (0, before, fds, areas)
        assert not kernel.planned_failures
        assert not blocks.add("ram", used_length=2 * PAGE_SIZE, max_length=MIB, memory=kind).whole


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
def test_what_is_no_lack_of_memory_is_not_tried_again(kernel: SpecialKernel, number: int) -> None:
    """The whole would be refused as well."""
    with RamBlockList(kernel=kernel) as blocks:
        kernel.fail(call="mprotect", errno=number)
        with pytest.raises(pyvfio.IoctlError):
            blocks.add("ram", used_length=PAGE_SIZE, max_length=MIB)
        assert len([call for call in kernel.trace if call.call == "mprotect"]) == 1


def test_a_commit_limit_refuses_the_whole_as_well() -> None:
    """RLIMIT_DATA, for real: the caller hears of the part, and there is no block."""

    def child() -> None:
        limit_memory(resource.RLIMIT_DATA, headroom=8 * MIB)
        with RamBlockList() as blocks:
            with pytest.raises(pyvfio.IoctlError, match="32 MiB more memory could not be allocated"):
                blocks.add("ram", used_length=32 * MIB, max_length=64 * MIB)
            assert len(blocks) == 0

    assert in_child(child) == 0


def test_who_cannot_follow_may_come_where_blocks_are_whole_for_another_reason(kernel: SpecialKernel) -> None:
    """All of them; it reaches all of each."""
    with Rig(kernel) as rig:
        nothing_but_the_whole(kernel)
        block = rig.add(maximum=MIB)
        rig.blocks.add_notifier(listener := Registration(rig.container))
        assert kernel.dma_read(BDF, IOVA + MIB - 16, 16) == bytes(16)
        block.resize(0)
        assert kernel.dma_read(BDF, IOVA + MIB - 16, 16) == bytes(16)
        rig.blocks.remove_notifier(listener)
        rig.add("resizable")
        with pytest.raises(pyvfio.UnsupportedError, match="'resizable'"):
            rig.blocks.add_notifier(listener)
