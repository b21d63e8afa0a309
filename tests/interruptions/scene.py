"""A device, blocks, a mapper and buffers, and all that can be seen of them, so that two moments can be compared."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, Protocol, TypeAlias

import pyvfio
from pyvfio import ioctls
from pyvfio.extents import Extent, runs
from pyvfio.kernel import MAP_FIXED
from pyvfio.memory import MemoryKind
from pyvfio.testing.fake import FakeDevice
from pyvfio.units import PAGE_SIZE, Vaddr
from tests.unit.fakes import BDF, OTHER_BDF, SpecialKernel
from tests.unit.processes import open_fds

State: TypeAlias = dict[str, object]
GROUP, OTHER_GROUP, HOT_GROUP = 2, 3, 4
HOT_BDFS = ("0000:01:00.0", "0000:01:00.1")
"""Two functions of one device, whose bus can be reset."""
MOST = 16 * PAGE_SIZE
_START = int(ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
_STOP = int(ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)


class Closable(Protocol):
    """An object with a `close` of its own."""

    def close(self) -> None:
        """Close it."""
        ...


class SeenKernel(SpecialKernel):
    """A kernel with two devices, each in a group of its own, and two on one bus. `areas` has the memory of devices,
    too."""

    def __init__(self) -> None:
        first, second = FakeDevice(BDF, msix=4, resettable=True), FakeDevice(OTHER_BDF, resettable=True)
        hot = [FakeDevice(bdf, resettable=True) for bdf in HOT_BDFS]
        super().__init__("7.3", groups=[(GROUP, [first]), (OTHER_GROUP, [second]), (HOT_GROUP, hot)])

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """Note where it is."""
        got = super().mmap(vaddr, size, protection, flags, fd=fd, offset=offset)
        if fd >= 0 and not flags & MAP_FIXED:
            self.areas = sorted([*self.areas, Extent(got, got + size)])
        return got

    @property
    def tracks(self) -> bool:
        """Whether dirty pages are tracked, as far as the trace shows."""
        flags = [call.arguments["flags"] for call in self.trace if call.request == "VFIO_IOMMU_DIRTY_PAGES"]
        switches = [flag for flag in flags if flag in (_START, _STOP)]
        return bool(switches) and switches[-1] == _START


def exported(buffer: mmap.mmap) -> bool:
    """Whether somebody holds the memory of a buffer, which can then be neither resized nor closed."""
    try:
        buffer.resize(len(buffer))
    except BufferError:
        return True
    return False


def descriptors() -> Counter[str]:
    """The open descriptors, by the kind of file."""
    return Counter(re.sub(r"\d+|pyvfio-fake-\w+", "#", target) for target in open_fds().values())


class Listener:
    """A notifier that follows everything, and knows the blocks of which it was told."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """One more."""
        del used_length, max_length
        self.known.add(block.idstr)

    def ram_block_removed(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """One less."""
        del used_length, max_length
        self.known.remove(block.idstr)

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Nothing."""

    def ram_block_discarded(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """Nothing."""

    def ram_block_populated(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """Nothing."""


class Update:
    """A HandOver, whose close is a cancel."""

    def __init__(self, update: pyvfio.HandOver) -> None:
        self.update = update

    def close(self) -> None:
        """The process has it as before."""
        self.update.cancel()


class Scene:
    """What an operation begins with. A test adds to it; `close` closes all of it.

    `made` is the result of the operation, where it makes an object. `portable`: the container goes to another process,
    so that no device of anybody else's can be in it.
    """

    def __init__(self, kernel: SeenKernel) -> None:
        kernel.clear_trace()
        self.kernel = kernel
        self.before = descriptors()
        self.container: pyvfio.Container | None = None
        self.blocks: pyvfio.RamBlockList | None = None
        self.mapper: pyvfio.DmaMapper | None = None
        self.listener: Listener | None = None
        self.buffers: dict[str, mmap.mmap] = {}
        self.places: dict[str, int] = {}
        self.things: dict[str, Closable] = {}
        self.iovas: dict[str, int] = {}
        self.fds: tuple[int, ...] = ()
        self.made: object = None
        self.portable = False

    # ------------------------------------------------------------------------------------------------ what there is

    def open(self) -> pyvfio.Device:
        """The device, in a container of its own."""
        device = pyvfio.open_device(BDF, kernel=self.kernel)
        self.things["device"] = device
        self.container = device.container
        return device

    def fill(
        self,
        *,
        resize: Literal["remap", "extend"] = "remap",
        granule: int | None = None,
        memory: MemoryKind | None = None,
        policy_of: Callable[[pyvfio.RamBlock | pyvfio.BlockShape], pyvfio.Policy | None] | None = None,
    ) -> None:
        """Three blocks, one of them empty and one in pieces with a hole, and a mapper that follows them."""
        container = self.container if self.container is not None else self.open().container
        self.blocks = blocks = pyvfio.RamBlockList(kernel=self.kernel)
        self.mapper = pyvfio.DmaMapper(container, blocks, resize=resize, granule=granule, policy_of=policy_of)
        for name, pages in (("ring", 4), ("other", 2), ("empty", 0)):
            blocks.add(name, used_length=pages * PAGE_SIZE, max_length=MOST, memory=memory)
        ring = blocks["ring"]
        ring.resize(6 * PAGE_SIZE)
        for block in blocks:
            with block.view() as view:
                view[:] = b"x" * len(view)
        ring.discard(3 * PAGE_SIZE, PAGE_SIZE)
        self.note_iovas()

    def note_iovas(self) -> None:
        """From here on the blocks stay where they are."""
        if self.mapper is not None:
            self.iovas = {block.idstr: self.mapper.iova(block) for block in self.blocks or ()}

    def buffer(self, name: str, pages: int = 2) -> mmap.mmap:
        """Memory of the program's own, made when it is first asked for."""
        if name not in self.buffers:
            self.buffers[name] = mmap.mmap(-1, pages * PAGE_SIZE)
            self.places[name] = address(self.buffers[name])
        return self.buffers[name]

    # ------------------------------------------------------------------------------------------------ what can be seen

    def state(self, *, checked: bool = True) -> State:
        """All that a program can see, with names in place of addresses and numbers of descriptors. `checked`: and all
        holds that has to."""
        if checked:
            self.check()
        container = self.container
        usable = container is not None and not container.closed and not self.handing
        return {
            "reach": self._reach(),
            "blocks": {block.idstr: self._look_at(block) for block in self.blocks or ()},
            "moved": self._moved(),
            "free": container.allocator.free_ranges if container is not None and usable and self._attached else None,
            "claims": self._claims(),
            "masters": self._masters(),
            "exported": {name: exported(buffer) for name, buffer in self.buffers.items()},
            "descriptors": descriptors() - self.before,
            "told": sorted(listener.known) if (listener := self.listener) is not None else [],
            "tracked": self.kernel.tracks,
            "locked": self.kernel.memlock().used,
            "memory": sum(area.size for area in self.kernel.areas),
        }

    @property
    def handing(self) -> bool:
        """Whether the container is being handed to another process, so that it cannot be asked."""
        try:
            return self.container is not None and not self.container.closed and self.container.fd < 0
        except pyvfio.HandOverError:
            return True

    @property
    def _attached(self) -> bool:
        """Whether the container has a group, and so an address space."""
        return self.container is not None and any(self.container.group(n) for n in (GROUP, OTHER_GROUP))

    def _reach(self) -> list[tuple[str, int, int, int]]:
        """The memory that devices reach: its name, the offset there, the IOVA less that of its owner, the size."""
        if self.handing:  # addresses are on their way to another process
            return _join([("handed", 0, entry.iova, entry.size) for entry in self.kernel.mappings()])
        owners = {name: (self.places[name], len(buffer)) for name, buffer in self.buffers.items()}
        owners |= {block.idstr: (block.vaddr, block.max_length) for block in self.blocks or ()}
        found: list[tuple[str, int, int, int]] = []
        for entry in self.kernel.mappings():
            for name, (vaddr, size) in owners.items():
                if vaddr <= entry.vaddr < vaddr + size:
                    offset = entry.vaddr - vaddr
                    found.append((name, offset, entry.iova - self.iovas.get(name, entry.iova), entry.size))
                    break
            else:
                found.append(("nobody's", 0, 0, entry.size))
        return _join(sorted(found))

    @staticmethod
    def _look_at(block: pyvfio.RamBlock) -> tuple[int, object, bytes]:
        with block.view() as view:
            contents = b"".join(
                bytes(view[offset : offset + 1])
                for part in block.populated
                for offset in range(part.start, part.end, PAGE_SIZE)
            )
        return block.used_length, tuple(runs(block.discarded)), contents

    def _moved(self) -> list[str]:
        """The blocks that have another IOVA than before."""
        if self.mapper is None or self.blocks is None:
            return []
        found = []
        for block in self.blocks:
            with suppress(ValueError, pyvfio.ClosedError):  # the mapper does not follow it
                if self.mapper.iova(block) != self.iovas.get(block.idstr, self.mapper.iova(block)):
                    found.append(block.idstr)
        return found

    def _masters(self) -> list[str]:
        """The devices that may do DMA."""
        devices = [thing for thing in self.things.values() if isinstance(thing, pyvfio.Device)]
        return [device.bdf for device in devices if not (device.closed or self.handing) and device.bus_master]

    def _claims(self) -> list[str]:
        """The claims on discards that could be made now."""
        if self.blocks is None:
            return []
        discards = self.blocks.discards
        found = []
        for kind in ("disable", "disable_uncoordinated", "require", "require_coordinated"):
            with suppress(pyvfio.DiscardError):
                getattr(discards, kind)().close()
                found.append(kind)
        return found

    def check(self) -> None:
        """All that has to hold at any time."""
        self.kernel.check()
        for structure in (self.blocks, self.mapper, self.container):
            if structure is not None:
                structure._check()
        if self.blocks is not None:
            self.blocks.discards._check()
        if self.container is not None and not self.container.closed and not self.handing:
            known = [(entry.iova, entry.vaddr, entry.size) for entry in self.container.mappings]
            real = [(entry.iova, entry.vaddr, entry.size) for entry in self.kernel.mappings(BDF)]
            assert known == real, "the table of mappings is not what the kernel has"

    # ------------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Everything, in an order that a program might have; then nothing is left."""
        close_made(self)
        for thing in (*reversed(self.things.values()), self.mapper, self.blocks, self.container):
            if thing is not None:
                thing.close()
        for fd in self.fds:
            with suppress(OSError):
                self.kernel.close(fd)
        for buffer in self.buffers.values():
            buffer.close()
        self.made = None
        assert self.kernel.mappings() == ()
        assert self.kernel.descriptors == ()
        assert self.kernel.memlock().used == 0
        assert not self.kernel.areas, "address space is left"
        assert descriptors() == self.before
        self.kernel.check()


def close_made(scene: Scene) -> None:
    """Close the object that an operation has made, if it has one."""
    made, scene.made = scene.made, None
    if isinstance(made, pyvfio.TakenOver):  # the old process forgets it
        made.close()
        scene.fds = ()
        update = scene.things.pop("update")
        assert isinstance(update, Update)
        update.update.finish()
    elif (close := getattr(made, "close", None)) is not None:
        close()


def address(buffer: mmap.mmap) -> int:
    """Where the memory of a buffer begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _join(found: list[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    """Pieces that are neighbours as one: how many there are is the mapper's own affair."""
    joined: list[tuple[str, int, int, int]] = []
    for name, offset, place, size in found:
        if joined and joined[-1][0] == name:
            _name, start, first, length = joined[-1]
            if (start + length, first + length) == (offset, place):
                joined[-1] = (name, start, first, length + size)
                continue
        joined.append((name, offset, place, size))
    return joined
