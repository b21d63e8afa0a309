"""Listeners that cannot follow a resize, as they are named in the series: blocks are memory as far as these reach.

SEV and HAX register all of a block once; the Xen map cache has entries of one size and no memory of the process; the
migration listens to resizes alone.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvfio
from pyvfio import RamBlock, RamBlockList
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import MIB, PAGE_SIZE
from tests.unit.fakes import BDF, Rig, SpecialKernel

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


class Migration:
    """Listens to resizes alone: one during the migration cancels it."""

    def __init__(self) -> None:
        self.cancelled = ""

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Whatever the lengths are."""
        assert old_length != new_length
        self.cancelled = f"RAM block '{block.idstr}' resized during precopy"


@pytest.fixture
def kernel() -> Iterator[SpecialKernel]:
    """With one device."""
    with SpecialKernel(groups=[(2, [FakeDevice(BDF)])]) as made:
        yield made


@pytest.fixture
def rig(kernel: SpecialKernel) -> Iterator[Rig]:
    """A device, and blocks that its mapper follows."""
    with Rig(kernel) as made:
        yield made


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
    kernel.fail(call="mprotect", errno=errno.ENOMEM)
    with pytest.raises(pyvfio.IoctlError, match="1 MiB more memory could not be had"):
        rig.add(used=0, maximum=MIB)
    assert (len(rig.blocks), proc_areas()) == (0, before)
    rig.blocks.remove_notifier(listener)


def test_who_cannot_follow_a_resize_cannot_come_where_blocks_can_be_resized(rig: Rig) -> None:
    """It would reach what is no memory, or go on reaching what was given back. It is told nothing."""
    block = rig.add(used=PAGE_SIZE)
    with pytest.raises(pyvfio.UnsupportedError, match=r"cannot follow a resize.*'ring'.*Add it before"):
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


def test_who_listens_to_resizes_alone_changes_nothing_for_others(kernel: SpecialKernel) -> None:
    """A migration is cancelled by one; blocks stay resizable."""
    migration = Migration()
    with RamBlockList(kernel=kernel) as blocks:
        blocks.add_notifier(migration)
        block = blocks.add("ram", used_length=PAGE_SIZE, max_length=MIB)
        assert (block.whole, migration.cancelled) == (False, "")
        block.resize(2 * PAGE_SIZE)
        assert migration.cancelled == "RAM block 'ram' resized during precopy"
