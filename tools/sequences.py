"""Random episodes of calls on containers and groups, for `tools.comparison`.

The same seed makes the same calls on every machine, with any answers of kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pyvfio.units import PAGE_SIZE, IovaRange
from tools.author import BAD_ADDRESSES, BASE, TOP, U32, Author, write_episodes
from tools.comparison import ARENA_PAGES, BITMAP_SIZE, Episode, Op

_P = PAGE_SIZE
_MAP, _UNMAP, _INFO, _DIRTY = "=IIQQQ", "=IIQQ", "=IIQII", "=IIQQQQQ"
_GET_DIRTY, _ALL, _VADDR = 1, 2, 4
_CONTAINERS: tuple[str | int, ...] = ("c0", "c0", "c0", "c1", "g0", "g1", "d0", "j0", -1, 1 << 20)
_EVENTFDS: tuple[str | int, ...] = ("j0", "j0", "j0", "c0", -1, -2, 1 << 20)


class _Author(Author):
    def __init__(self, chance: random.Random, ranges: Sequence[IovaRange], top: int) -> None:
        super().__init__(chance, ranges)
        self._top = top

    def _calls(self) -> dict[Callable[[], None], int]:
        return {
            self._map_dma: 28,
            self._unmap_dma: 18,
            self._unmap_with_bitmap: 4,
            self._update_vaddr: 5,
            self._dirty_pages: 8,
            self._get_info: 4,
            self._memory: 10,
            self._limits: 5,
            self._container_calls: 5,
            self._group_calls: 6,
            self._device_calls: 9,
            self._opens_and_closes: 4,
            self._start_again: 2,
            self._nonsense: 3,
        }

    # ------------------------------------------------------------------------------------------- the container

    def _prologue(self) -> None:
        if self._often(0.05):
            return
        self._open_slot("c0")
        self._open_slot("g0")
        self._attach("g0", "c0")
        self._set_iommu("c0")
        if self._often(0.5):
            self._open_device("g0", "d0")
        if self._often(0.3):
            self._open_slot("g1")
            self._attach("g1", "c0")
        if self._often(0.3):
            self._ioctl("c0", "VFIO_IOMMU_DIRTY_PAGES", "=II", 8, 1, size=8)

    def _attach(self, group: str, container: str) -> None:
        self._ioctl(group, "VFIO_GROUP_SET_CONTAINER", "=i", container, size=4)

    def _set_iommu(self, container: str) -> None:
        kind = self._one(3, 3, 3, 3, 3, 3, 1, 1, 6)
        self._ioctl(
            container, "VFIO_SET_IOMMU", "value", self._edge(kind, 0, 2, 4, 7, 8, 9, 10, 99, 1 << 32 | 1, chance=0.03)
        )

    def _open_device(self, group: str, slot: str) -> None:
        name = f"n{group[1]}"
        tail = self._chance.choice([*[""] * 20, "x", " ", "  ", " x", " vf_token=1"])
        self._ioctl(group, "VFIO_GROUP_GET_DEVICE_FD", "name", name, tail, into=slot)
        self._open.add(slot)

    def _map_dma(self) -> None:
        iova = self._iova()
        size = self._size(iova)
        flags = self._edge(self._one(3, 3, 3, 1, 2), 0, 4, 5, 7, 8, 1 << 31)
        self._map(iova, size, flags)

    def _map(self, iova: int, size: int, flags: int) -> None:
        if self._top < iova + size <= TOP:
            size = _P
            iova = BASE
        fields = (self._argsz(32), flags, self._vaddr(), iova, size)
        self._ioctl(self._slot("c"), "VFIO_IOMMU_MAP_DMA", _MAP, *fields, size=32)
        if size <= ARENA_PAGES * _P and not (size | iova) % _P:
            self._believed = [*self._believed[-20:], (iova, size)]

    def _target(self) -> tuple[int, int]:
        if self._believed and self._often(0.45):
            return self._chance.choice(self._believed)
        if self._often(0.15):
            return BASE - _P, 64 * _P
        iova = self._iova()
        return iova, self._size(iova)

    def _unmap_dma(self) -> None:
        flags, (iova, size) = 0, self._target()
        if self._often(0.12):
            flags, iova, size = _ALL, self._edge(0, iova), self._edge(0, size)
        flags = self._edge(flags, 8, _GET_DIRTY | _ALL, _GET_DIRTY | _VADDR, 1 << 31, chance=0.03)
        self._ioctl(self._slot("c"), "VFIO_IOMMU_UNMAP_DMA", _UNMAP, self._argsz(24), flags, iova, size, size=24)

    def _data(self) -> int | str:
        if self._often(0.08):
            return self._one(*BAD_ADDRESSES)
        return f"b+{self._one(0, 0, 0, 0, 8, 1, 4, BITMAP_SIZE - 8, BITMAP_SIZE - 16, BITMAP_SIZE - 4)}"

    def _bitmap(self, size: int) -> tuple[int, int, int | str]:
        pages = size // _P
        need = (pages + 63) // 64 * 8
        page = self._edge(_P, 1, 0, 2 * _P, 1 << 21, 3 * _P)
        size = self._edge(self._one(need, need, BITMAP_SIZE), 0, need - 8, need + 8, 1 << 28, (1 << 28) + 8, TOP - 1)
        return page, size % TOP, self._data()

    def _unmap_with_bitmap(self) -> None:
        iova, size = self._target()
        fields = (self._argsz(48), _GET_DIRTY, iova, size, *self._bitmap(size))
        self._ioctl("c0", "VFIO_IOMMU_UNMAP_DMA", _DIRTY, *fields, size=48)

    def _update_vaddr(self) -> None:
        iova, size = self._target()
        if self._often(0.6):
            flags = _VADDR
            if self._often(0.3):
                flags, iova, size = _VADDR | _ALL, 0, 0
            self._ioctl("c0", "VFIO_IOMMU_UNMAP_DMA", _UNMAP, self._argsz(24), flags, iova, size, size=24)
        else:
            self._map(iova, size, _VADDR)

    def _dirty_pages(self) -> None:
        slot = self._slot("c")
        if self._often(0.4):
            flags = self._one(1, 1, 1, 2, 2, 0, 3, 6, 8)
            self._ioctl(slot, "VFIO_IOMMU_DIRTY_PAGES", "=II", self._argsz(8), flags, size=8)
            return
        iova, size = self._target()
        if self._often(0.5):
            iova, size = (iova - self._chance.randrange(80) * _P) % TOP, size + self._chance.randrange(90) * _P
        fields = (self._argsz(48), self._edge(4, 5, 6, 12), iova, size % TOP, *self._bitmap(size % TOP))
        self._ioctl(slot, "VFIO_IOMMU_DIRTY_PAGES", _DIRTY, *fields, size=48)
        if self._often(0.2):
            self.ops.append(Op("fill", fields=(self._one(0, 0xA5, 0xFF),)))

    def _get_info(self) -> None:
        argsz = self._edge(
            512, *range(15, 26), 56, 67, 68, 72, 100, 115, 116, 119, 120, 132, 136, 152, 0, U32, chance=0.7
        )
        self._ioctl(self._slot("c"), "VFIO_IOMMU_GET_INFO", _INFO, argsz, self._one(0, 3, U32), 0, 7, 7, size=24)

    def _container_calls(self) -> None:
        slot = self._slot("c")
        match self._chance.randrange(4):
            case 0:
                self._ioctl(slot, "VFIO_GET_API_VERSION", "value", self._one(0, 1))
            case 1 | 2:
                extension = self._one(*range(14), 99, 1 << 32 | 1, TOP - 1)
                self._ioctl(slot, "VFIO_CHECK_EXTENSION", "value", extension)
            case _:
                self._set_iommu(slot)

    # ------------------------------------------------------------------------------------ the group, the device

    def _group_calls(self) -> None:
        slot = self._slot("g")
        match self._chance.randrange(8):
            case 0 | 1 | 2:
                argsz = self._one(8, 8, 7, 9, 0, U32)
                self._ioctl(slot, "VFIO_GROUP_GET_STATUS", "=II", argsz, self._one(0, U32), size=8)
            case 3 | 4:
                target: str | int = self._chance.choice(_CONTAINERS)
                self._ioctl(slot, "VFIO_GROUP_SET_CONTAINER", "=i", target, size=4)
            case 5:
                self._ioctl(slot, "VFIO_GROUP_UNSET_CONTAINER", "value", 0)
            case _:
                self._open_device(slot, f"d{self._chance.randrange(3)}")

    def _device_calls(self) -> None:
        slot = self._slot("d", 3)
        if slot not in self._open and self._often(0.7):
            self._open_device("g0", slot)
        match self._chance.randrange(10):
            case 5:
                self._feature(slot)
            case 6:
                self._ioeventfd(slot)
            case 7:
                self._hot_reset(slot)
            case 0:
                argsz = self._one(24, 24, *range(14, 27), 64)
                self._ioctl(slot, "VFIO_DEVICE_GET_INFO", "=IIIIII", argsz, 0, 9, 9, 9, 9, size=24)
            case 1:
                index = self._edge(self._chance.randrange(9), 9, 10, U32, chance=0.15)
                fields = (self._argsz(32), 0, index, self._one(0, 0xAA), 7, 7)
                self._ioctl(slot, "VFIO_DEVICE_GET_REGION_INFO", "=IIIIQQ", *fields, size=32)
            case 2:
                index = self._edge(self._chance.randrange(5), 5, 6, U32, chance=0.15)
                self._ioctl(slot, "VFIO_DEVICE_GET_IRQ_INFO", "=IIII", self._argsz(16), 7, index, 7, size=16)
            case 3:
                self._ioctl(slot, "VFIO_DEVICE_RESET", "value", 0)
            case _:
                self._set_irqs(slot)

    def _set_irqs(self, slot: str) -> None:
        data = self._edge(self._one(1, 2, 4, 4), 0, 3, 7)
        action = self._edge(self._one(8, 16, *[32] * 10), 0, 24, 40, 64)
        index = self._edge(self._one(0, 0, 0, 1, 1, 1, 1, 3, 4, 4, 2), 5, U32)
        start = self._edge(0, 1, 2, U32, chance=0.03)
        count = self._edge(self._one(0, 1, 1, 1, 1), 2, 3, U32, chance=0.03)
        head = (index, start, count)
        match data:
            case 2:
                self._ioctl(
                    slot, "VFIO_DEVICE_SET_IRQS", "=IIIIIB", self._argsz(21), data | action, *head, self._one(0, 1)
                )
            case 4:
                fd: str | int = self._chance.choice(_EVENTFDS)
                # INTx and UNMASK with an eventfd asks a real device for its line.
                self._ioctl(slot, "VFIO_DEVICE_SET_IRQS", "=IIIIIi", self._argsz(24), data | action, *head, fd, size=24)
            case _:
                self._ioctl(slot, "VFIO_DEVICE_SET_IRQS", "=IIIII", self._argsz(20), data | action, *head, size=20)

    def _feature(self, slot: str) -> None:
        # Value 4 is left out with a good eventfd: the time at which the device wakes up is a race.
        number = self._chance.choice([*range(4), 3, 5, 5, *range(5, 16), 99, 0xFFFF])
        flags = self._one(1 << 17, 1 << 17, 1 << 17, 1 << 16, 1 << 18, 3 << 16, 7 << 16, 6 << 16, 5 << 16, 0, 1 << 19)
        if self._often(0.1):
            self._ioctl(slot, "VFIO_DEVICE_FEATURE", "=IIiI", self._argsz(16), 4 | flags, self._one(-1, 1 << 20), 0)
        elif number != 4:
            self._ioctl(slot, "VFIO_DEVICE_FEATURE", "=IIQQ", self._argsz(8), number | flags, 0, 0, size=8)

    def _ioeventfd(self, slot: str) -> None:
        flags = self._edge(self._one(1, 2, 4, 8), 0, 3, 15, 16, 1 << 31, chance=0.15)
        offset = self._edge(
            self._one(0x10, 0x18), 1 << 20, (1 << 20) - 4, 1 << 40, 6 << 40, 7 << 40, (1 << 63) - 1, chance=0.2
        )
        fd = self._chance.choice(_EVENTFDS)
        fields = (self._argsz(28), flags, offset, self._one(0, 0, 1), fd)
        self._ioctl(slot, "VFIO_DEVICE_IOEVENTFD", "=IIQQi", *fields, size=28)

    def _hot_reset(self, slot: str) -> None:
        argsz, flags = self._argsz(12), self._edge(0, 1)
        if self._often(0.5):
            self._ioctl(slot, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", "=III", argsz, flags, 7, size=12)
        else:
            fields = (argsz, flags, self._one(0, 1, 2), "g0", "c0")
            self._ioctl(slot, "VFIO_DEVICE_PCI_HOT_RESET", "=IIIii", *fields, size=12)

    def _opens_and_closes(self) -> None:
        if self._often(0.5) and self._open:
            slot = self._chance.choice(sorted(self._open))
            self._open.discard(slot)
            self.ops.append(Op("close", slot))
        else:
            self._open_slot(self._chance.choice(["c0", "c1", "c1", "g0", "g1", "g1"]))

    def _start_again(self) -> None:
        for slot in sorted(self._open, key=lambda _: self._chance.random()):
            if slot[0] in "dg" or self._often(0.5):
                self.ops.append(Op("close", slot))
                self._open.discard(slot)
        self._believed = []
        self._prologue()

    def _nonsense(self) -> None:
        slot = self._chance.choice(["c0", "c1", "g0", "g1", "d0", "j0", "d2"])
        # VFIO_GROUP_SET_CONTAINER is left out: the kernel would take a random number for a descriptor of this process.
        number = hex(self._chance.choice([*range(0x3B64, 0x3B68), *range(0x3B69, 0x3B84), 0x3BBE, 0, 0x80003B64 + 12]))
        if self._often(0.5):
            self._ioctl(slot, number, "value", self._one(0, 1, 3, 0x1000))
        else:
            self._ioctl(slot, number, "=IIQQQQ", self._one(0, 8, 24, 32, 64), self._one(0, 1, 4), 0, 0, 0, 0, size=40)


def episodes(*, seed: int, ops: int, ranges: Sequence[IovaRange], top: int = TOP) -> list[Episode]:
    """Return `ops` calls in episodes, made from `seed`. `ranges`: those of the IOMMU, whose ends are edges.

    Nothing is mapped in [`top`, 2^64): kernels up to 6.12 lose a mapping that ends there, and never unpin its memory.
    """
    return write_episodes(
        lambda chance: _Author(chance, ranges, top), seed=seed, ops=ops, entry_limits=[*[65535] * 12, 8, 8, 5, 3, 1, 0]
    )
