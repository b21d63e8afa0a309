"""The listeners that the series names, as models: what each is told, and what it does then.

Source: target/i386/sev.c, target/i386/hax-mem.c, hw/xen/xen-mapcache.c and migration/ram.c of QEMU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import pyvfio
from pyvfio import DirtyLog, File, RamBlock, RamBlockList, UnsupportedError
from pyvfio.extents import Extent
from pyvfio.units import PAGE_SIZE


class Sev:
    """Registers all of `max_length` as encrypted memory, once; here with an IOMMU, so that a device shows its reach.

    The block does not come where that fails. It is told when the block goes, and nothing of resizes.
    """

    def __init__(self, container: pyvfio.Container, iova: int) -> None:
        self._container, self._next = container, iova
        self.registered: dict[str, int] = {}

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION."""
        del used_length
        self._container.map(vaddr=block.vaddr, iova=self._next, size=max_length)
        self.registered[block.idstr] = self._next
        self._next += max_length

    def ram_block_removed(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION."""
        del used_length
        self._container.unmap(iova=self.registered.pop(block.idstr), size=max_length)


class Hax:
    """Has all of `max_length` populated when a block comes, and is told of nothing else."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, int]] = []

    def ram_block_added(self, block: RamBlock, used_length: int, max_length: int) -> None:
        """`hax_populate_ram`."""
        assert used_length <= max_length
        self.blocks.append((block.vaddr, max_length))

    def touch(self) -> None:
        """A guest that reads and writes the first and the last byte of all it was given."""
        for vaddr, size in self.blocks:
            for where in (vaddr, vaddr + size - 1):
                ctypes.memmove(where, ctypes.string_at(where, 1), 1)


class MapCache:
    """Xen's: a guest's memory is not this process's, which maps pieces of it, entries, for as long as it needs them.

    Others are told of entries as of blocks whose `used_length` is their `max_length`. They are never resized, which it
    sees to as a listener; it needs no memory of its own for that. `guest` is a file here.
    """

    ENTRY = 16 * PAGE_SIZE

    def __init__(self, blocks: RamBlockList, guest: int) -> None:
        self._blocks, self._guest = blocks, guest
        self.entries: dict[int, RamBlock] = {}
        blocks.add_notifier(self)

    def map(self, address: int) -> tuple[RamBlock, int]:
        """The entry with that address of the guest, and where in it that is."""
        number, offset = divmod(address, self.ENTRY)
        if number not in self.entries:
            memory = File(self._guest, number * self.ENTRY)
            self.entries[number] = self._blocks.add(
                f"entry {number}", used_length=self.ENTRY, max_length=self.ENTRY, memory=memory
            )
        return self.entries[number], offset

    def invalidate(self) -> None:
        """All entries go; the guest's memory stays."""
        while self.entries:
            self.entries.popitem()[1].remove()

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """Not an entry."""
        del old_length, new_length
        if block in self.entries.values():
            raise UnsupportedError(f"'{block.idstr}' is a piece of a guest's memory, which has one size")


class Page(NamedTuple):
    """What goes over the wire."""

    idstr: str
    offset: int
    data: bytes


class MigrationError(Exception):
    """A migration has come to a bad end."""


class PrecopySource:
    """Sends the pages of all blocks, and again those that were written meanwhile, until few are left.

    idle → active → completed; or cancelled, by a resize while it is active, since the other side has blocks of the
    lengths that it was told at the beginning.
    """

    def __init__(self, blocks: RamBlockList) -> None:
        self.state: Literal["idle", "active", "cancelled", "completed"] = "idle"
        self.error = ""
        self._blocks = blocks
        self._log: DirtyLog | None = None
        blocks.add_notifier(self)

    def start(self) -> dict[str, int]:
        """The lengths, which go first."""
        self._log, self.state, self.error = DirtyLog(self._blocks), "active", ""
        return {block.idstr: block.used_length for block in self._blocks}

    def iterate(self, tracking: pyvfio.DirtyTracking, mapper: pyvfio.DmaMapper) -> list[Page]:
        """What is dirty. Raises MigrationError when it was cancelled."""
        if self._log is None or self.state != "active":
            raise MigrationError(self.error or f"the migration is {self.state}")
        pages = []
        for block in self._blocks:
            self._log.collect(block, tracking, mapper)
            found = self._log.snapshot(block, clear=True)
            with block.view() as view:
                for start, end in found.dirty:
                    pages += [
                        Page(block.idstr, at, bytes(view[at : at + PAGE_SIZE])) for at in range(start, end, PAGE_SIZE)
                    ]
        return pages

    def finish(self) -> None:
        """The other side has it all; or it was cancelled."""
        if self._log is not None:
            self._log.close()
        self.state = "completed" if self.state == "active" else self.state

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """`ram_mig_ram_block_resized`: cancelled, and the resize goes on."""
        del old_length, new_length
        if self.state == "active":
            self.state, self.error = "cancelled", f"RAM block '{block.idstr}' resized during precopy"


class PostcopyTarget:
    """Receives the pages of blocks that have been resized to what the source has, some of them when the guest runs.

    none → advised → running → ended. Once it is advised, a block has no memory that was not received: what it grows by
    is discarded. That is a change of the list, which a hook cannot make: the hook notes it, `settle` does it.
    """

    def __init__(self, blocks: RamBlockList) -> None:
        self.state: Literal["none", "advised", "running", "ended"] = "none"
        self._blocks = blocks
        self._grown: list[tuple[RamBlock, Extent]] = []
        blocks.add_notifier(self)

    def advise(self) -> None:
        """Pages may come late: nothing is there before it is received."""
        self.state = "advised"
        self._grown = [(block, Extent(0, block.used_length)) for block in self._blocks]
        self.settle()

    def ram_block_resized(self, block: RamBlock, old_length: int, new_length: int) -> None:
        """`ram_mig_ram_block_resized`. A guest that runs grows its memory by itself, and none of that was sent."""
        if self.state == "advised" and new_length > old_length:
            self._grown.append((block, Extent(old_length, new_length)))

    def settle(self) -> None:
        """What has come by growing is discarded; what has gone again meanwhile is not."""
        grown, self._grown = self._grown, []
        for block, (start, end) in grown:
            if start < (stop := min(end, block.used_length)):
                block.discard(start, stop - start)

    def run(self) -> None:
        """The guest runs here now, whatever is missing."""
        self.settle()
        self.state = "running"

    def receive(self, page: Page) -> None:
        """Have a page there at once with its contents. Raises MigrationError for one that lies behind the block."""
        if self.state not in ("advised", "running"):
            raise MigrationError(f"a page of '{page.idstr}' has come while postcopy is {self.state}")
        block = self._blocks[page.idstr]
        if page.offset < 0 or page.offset + len(page.data) > block.used_length:
            raise MigrationError(
                f"a page for offset {page.offset:#x} of RAM block '{page.idstr}' has come, which has "
                f"{block.used_length:#x} bytes"
            )
        self.settle()
        with block.view() as view:  # before it is populated: a device sees it with its contents, or not at all
            view[page.offset : page.offset + len(page.data)] = page.data
        block.populate(page.offset, len(page.data))

    @property
    def missing(self) -> dict[str, Sequence[Extent]]:
        """What has not been received."""
        return {block.idstr: block.discarded for block in self._blocks if block.discarded}

    def end(self) -> None:
        """All has been received."""
        if self.missing:
            raise MigrationError(f"pages are missing: {self.missing}")
        self.state = "ended"


def guest_memory(size: int) -> int:
    """Memory that is a guest's: a descriptor of it."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd
