"""A device, blocks, a mapper and buffers, with all of their visible state, so that two moments can be compared."""

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
from tests.spaces import AddressSpace
from tests.unit.fakes import BDF, OTHER_BDF, SpecialKernel
from tests.unit.processes import open_fds

State: TypeAlias = dict[str, object]
Kind: TypeAlias = Literal["type1", "iommufd"]
GROUP, OTHER_GROUP, HOT_GROUP = 2, 3, 4
HOT_BDFS = ("0000:01:00.0", "0000:01:00.1")
"""Two functions of one device whose bus can be reset."""
MOST = 16 * PAGE_SIZE
_START = int(ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_START)
_STOP = int(ioctls.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP)


class Closable(Protocol):
    """An object with a `close` method."""

    def close(self) -> None:
        """Close the object."""
        ...


class SeenKernel(SpecialKernel):
    """A kernel with two devices in separate groups, and two on one bus. `areas` includes the memory of devices.

    `space`: the kind of address space that operations use. With "iommufd", the kernel has no other.
    """

    def __init__(self, space: Kind = "type1") -> None:
        first, second = FakeDevice(BDF, msix=4, resettable=True), FakeDevice(OTHER_BDF, resettable=True)
        hot = [FakeDevice(bdf, resettable=True) for bdf in HOT_BDFS]
        super().__init__(
            "7.3",
            groups=[(GROUP, [first]), (OTHER_GROUP, [second]), (HOT_GROUP, hot)],
            iommufd=True,
            type1=space == "type1",
        )

    def mmap(self, vaddr: int, size: int, protection: int, flags: int, *, fd: int = -1, offset: int = 0) -> Vaddr:
        """Record the place of the mapping."""
        got = super().mmap(vaddr, size, protection, flags, fd=fd, offset=offset)
        if fd >= 0 and not flags & MAP_FIXED:
            self.areas = sorted([*self.areas, Extent(got, got + size)])
        return got

    @property
    def tracks(self) -> bool:
        """Return whether dirty pages are tracked, according to the trace."""
        flags = [call.arguments["flags"] for call in self.trace if call.request == "VFIO_IOMMU_DIRTY_PAGES"]
        switches = [flag for flag in flags if flag in (_START, _STOP)]
        return bool(switches) and switches[-1] == _START


def exported(buffer: mmap.mmap) -> bool:
    """Return whether the memory of a buffer is exported. Such a buffer can be neither resized nor closed."""
    try:
        buffer.resize(len(buffer))
    except BufferError:
        return True
    return False


def descriptors() -> Counter[str]:
    """Return the open descriptors by kind of file."""
    return Counter(re.sub(r"\d+|pyvfio-fake-\w+", "#", target) for target in open_fds().values())


class Listener:
    """A notifier that follows everything, and records the blocks."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def ram_block_added(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """Record a block."""
        del used_length, max_length
        self.known.add(block.idstr)

    def ram_block_removed(self, block: pyvfio.RamBlock, used_length: int, max_length: int) -> None:
        """Forget a block."""
        del used_length, max_length
        self.known.remove(block.idstr)

    def ram_block_resized(self, block: pyvfio.RamBlock, old_length: int, new_length: int) -> None:
        """Accept."""

    def ram_block_discarded(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """Accept."""

    def ram_block_populated(self, block: pyvfio.RamBlock, parts: Sequence[Extent]) -> None:
        """Accept."""


class Update:
    """A HandOver whose close is a cancel."""

    def __init__(self, update: pyvfio.HandOver) -> None:
        self.update = update

    def close(self) -> None:
        """Cancel: the process owns everything as before."""
        self.update.cancel()


class Scene:
    """The preconditions of an operation. A test adds to them; `close` closes everything.

    `made`: the result of the operation, if that is an object. `portable`: the space goes to another process, and
    must contain no other devices.
    """

    def __init__(self, kernel: SeenKernel) -> None:
        kernel.clear_trace()
        self.kernel = kernel
        self.before = descriptors()
        self.space: AddressSpace | None = None
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
        """Open the device, in a space of its own, or in the one that is there."""
        device = pyvfio.open_device(BDF, space=self.space, kernel=self.kernel)
        self.things["device"] = device
        self.space = device.space
        return device

    def fill(
        self,
        *,
        resize: Literal["remap", "extend", "cut"] = "remap",
        granule: int | None = None,
        memory: MemoryKind | None = None,
        policy_of: Callable[[pyvfio.RamBlock | pyvfio.BlockShape], pyvfio.Policy | None] | None = None,
    ) -> None:
        """Make three blocks, one empty and one in pieces with a hole, and a mapper that follows them."""
        space = self.space if self.space is not None and self._attached else self.open().space
        self.blocks = blocks = pyvfio.RamBlockList(kernel=self.kernel)
        self.mapper = pyvfio.DmaMapper(space, blocks, resize=resize, granule=granule, policy_of=policy_of)
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
        """Record the IOVAs: from now on, the blocks must keep them."""
        if self.mapper is not None:
            self.iovas = {block.idstr: self.mapper.iova(block) for block in self.blocks or ()}

    def buffer(self, name: str, pages: int = 2) -> mmap.mmap:
        """Return memory of the program, made on first use."""
        if name not in self.buffers:
            self.buffers[name] = mmap.mmap(-1, pages * PAGE_SIZE)
            self.places[name] = address(self.buffers[name])
        return self.buffers[name]

    # ------------------------------------------------------------------------------------------------ what can be seen

    def state(self, *, checked: bool = True) -> State:
        """Return all state that a program can see, with names in place of addresses and descriptor numbers.

        `checked`: check all invariants first.
        """
        if checked:
            self.check()
        space = self.space
        usable = space is not None and not space.closed and not self.handing
        return {
            "reach": self._reach(),
            "blocks": {block.idstr: self._look_at(block) for block in self.blocks or ()},
            "moved": self._moved(),
            "free": space.allocator.free_ranges if space is not None and usable and self._attached else None,
            "claims": self._claims(),
            "masters": self._masters(),
            "exported": {name: exported(buffer) for name, buffer in self.buffers.items()},
            "descriptors": descriptors() - self.before,
            "told": sorted(listener.known) if (listener := self.listener) is not None else [],
            "tracked": self.kernel.tracks,
            "locked": self.kernel.memlock().used + self.kernel.pinned,
            "memory": sum(area.size for area in self.kernel.areas),
        }

    @property
    def handing(self) -> bool:
        """Whether the space is being handed to another process, and cannot be asked."""
        try:
            return self.space is not None and not self.space.closed and self.space.fd < 0
        except pyvfio.HandOverError:
            return True

    @property
    def _attached(self) -> bool:
        """Return whether the space has a device, or the container a group, and so ranges of IOVA."""
        space = self.space
        if isinstance(space, pyvfio.Container):
            return any(space.group(number) for number in (GROUP, OTHER_GROUP))
        return space is not None and bool(space.devices)

    @property
    def _is_there(self) -> bool:
        """Return whether the first device is in the space."""
        if isinstance(self.space, pyvfio.Ioas):
            return any(isinstance(device, pyvfio.Device) and device.bdf == BDF for device in self.space.devices)
        return self._attached

    @property
    def container(self) -> pyvfio.Container:
        """The space, for an operation of type1 alone."""
        assert isinstance(self.space, pyvfio.Container)
        return self.space

    @property
    def ioas(self) -> pyvfio.Ioas:
        """The space, for an operation of iommufd alone."""
        assert isinstance(self.space, pyvfio.Ioas)
        return self.space

    def _reach(self) -> list[tuple[str, int, int, int]]:
        """Return the memory in reach of devices: name, offset, IOVA less that of the owner, size."""
        if self.handing:  # the addresses belong to no process at this time
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
        """Return the blocks whose IOVA has changed."""
        if self.mapper is None or self.blocks is None:
            return []
        found = []
        for block in self.blocks:
            with suppress(ValueError, pyvfio.ClosedError):  # the mapper does not follow the block
                if self.mapper.iova(block) != self.iovas.get(block.idstr, self.mapper.iova(block)):
                    found.append(block.idstr)
        return found

    def _masters(self) -> list[str]:
        """Return the devices that may do DMA."""
        devices = [thing for thing in self.things.values() if isinstance(thing, pyvfio.Device)]
        return [device.bdf for device in devices if not (device.closed or self.handing) and device.bus_master]

    def _claims(self) -> list[str]:
        """Return the claims on discards that could be made now."""
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
        """Check all invariants."""
        self.kernel.check()
        for structure in (self.blocks, self.mapper, self.space):
            if structure is not None:
                structure._check()
        if self.blocks is not None:
            self.blocks.discards._check()
        # Mappings of an I/O address space stay without the device, which then reaches none of them.
        if self.space is not None and not self.space.closed and not self.handing and self._is_there:
            known = [(entry.iova, entry.vaddr, entry.size) for entry in self.space.mappings]
            real = [(entry.iova, entry.vaddr, entry.size) for entry in self.kernel.mappings(BDF)]
            assert known == real, "the table of mappings is not what the kernel has"

    # ------------------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Close everything, in an order that a program might choose. Nothing is left afterwards."""
        close_made(self)
        for thing in (*reversed(self.things.values()), self.mapper, self.blocks, self.space):
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
        assert self.kernel.memlock().used + self.kernel.pinned == 0
        assert not self.kernel.areas, "address space is left"
        assert descriptors() == self.before
        self.kernel.check()


def close_made(scene: Scene) -> None:
    """Close the object that an operation has made, if there is one."""
    made, scene.made = scene.made, None
    if isinstance(made, pyvfio.TakenOver):  # the old process forgets its objects
        made.close()
        scene.fds = ()
        update = scene.things.pop("update")
        assert isinstance(update, Update)
        update.update.finish()
    elif (close := getattr(made, "close", None)) is not None:
        close()


def address(buffer: mmap.mmap) -> int:
    """Return the address of a buffer's memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _join(found: list[tuple[str, int, int, int]]) -> list[tuple[str, int, int, int]]:
    """Join adjacent pieces: the number of pieces is an internal matter of the mapper."""
    joined: list[tuple[str, int, int, int]] = []
    for name, offset, place, size in found:
        if joined and joined[-1][0] == name:
            _name, start, first, length = joined[-1]
            if (start + length, first + length) == (offset, place):
                joined[-1] = (name, start, first, length + size)
                continue
        joined.append((name, offset, place, size))
    return joined
