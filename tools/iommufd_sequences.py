"""Random episodes of calls on /dev/iommu and on cdevs, for `tools.comparison`.

The same seed makes the same calls on every machine, with any answers of kernels. An author numbers objects as kernels
do, by the lowest free number, so that most calls name an object of the right kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pyvfio.units import PAGE_SIZE, IovaRange
from tools.author import BAD_ADDRESSES, BASE, TOP, U32, Author, write_episodes
from tools.comparison import BITMAP_SIZE, FILE_PAGES, Episode, Op

_P = PAGE_SIZE
_FIXED, _WRITEABLE, _READABLE = 1, 2, 4
_BOTH = _WRITEABLE | _READABLE
_ALL = 2  # VFIO_DMA_UNMAP_FLAG_ALL
# No iommufd and no cdev: without a device, IOMMU_IOAS_MAP_FILE takes any file. A mapped cdev that is bound to the same
# iommufd keeps both alive for ever, and the device stays busy.
_FILES: tuple[str | int, ...] = ("f0", "f0", "f0", "f0", "f0", "f1", "f1", "j0", -1, 1 << 20)
# The fake takes no iommufd in place of a container (`pyvfio.testing.fake.unmodelled`).
_CONTAINERS: tuple[str | int, ...] = ("c0", "c1", "v0", -1)
_IOMMUFDS: tuple[str | int, ...] = (*["i0"] * 12, "i1", "i1", "c0", "g0", "v0", "j0", "f0", -1, -2, 1 << 20)


class _Author(Author):
    def __init__(self, chance: random.Random, ranges: Sequence[IovaRange]) -> None:
        super().__init__(chance, ranges)
        self._objects: dict[str, dict[int, str]] = {}  # by iommufd: the kind of each number: ioas, hwpt, or a cdev
        self._attached: dict[str, int] = {}

    def _calls(self) -> dict[Callable[[], None], int]:
        return {
            self._map: 24,
            self._unmap: 14,
            self._copy: 10,
            self._map_file: 6,
            self._compat_unmap: 9,
            self._compat_map: 3,
            self._compat_calls: 4,
            self._ranges_call: 3,
            self._allow: 3,
            self._option: 5,
            self._vfio_ioas: 2,
            self._objects_call: 6,
            self._tables: 3,
            self._attachments: 12,
            self._device_calls: 3,
            self._files: 4,
            self._groups: 4,
            self._opens_and_closes: 4,
            self._memory: 9,
            self._limits: 6,
            self._start_again: 2,
            self._nonsense: 3,
        }

    # ---------------------------------------------------------------------------------------------------- objects

    def _new_object(self, iommufd: str, kind: str) -> int:
        there = self._objects.setdefault(iommufd, {})
        number = next(number for number in range(1, len(there) + 2) if number not in there)
        there[number] = kind
        return number

    def _number(self, kind: str, *, iommufd: str = "i0", chance: float = 0.04) -> int:
        """Return the number of an object of a kind, the first one most of the time, or sometimes any number."""
        there = self._objects.get(iommufd, {})
        found = sorted(
            number for number, each in there.items() if each == kind or (kind == "device" and each[0] == "v")
        )
        if self._often(chance) or not found:
            return self._one(*(sorted(there) or [1]), 0, 1, 2, 3, 9, U32)
        return found[0] if self._often(0.65) else self._chance.choice(found)

    def _iommufd(self) -> str:
        return self._slot("i")

    def _call(self, request: str, layout: str, *fields: int | str, slot: str = "i0") -> None:
        size = {"I": 4, "i": 4, "H": 2, "Q": 8}
        whole = sum(size[letter] for letter in layout)
        given = self._edge(whole, whole - 1, whole - 8, whole + 1, whole + 8, 4, 0, U32, chance=0.03)
        self._ioctl(slot, f"IOMMU_{request}", "=" + layout, given, *fields, size=whole)

    def _prologue(self) -> None:
        self._objects.clear()
        self._attached.clear()
        if self._often(0.03):
            return
        self._open_slot("i0")
        if self._often(0.3):
            self._call("OPTION", "IIHHIQ", 0, 0, 0, 0, 1)
        self._alloc("i0")
        if self._often(0.45):
            self._call("OPTION", "IIHHIQ", 1, 0, 0, 1, 0)
        if self._often(0.6):
            self._call("VFIO_IOAS", "IIHH", 1, 1, 0)
        self._open_slot("v0")
        self._bind("v0", "i0")
        if self._often(0.8):
            self._attach("v0", 1)
        if self._often(0.3):
            self._alloc("i0")
        if self._often(0.3):
            self._open_slot("v1")
            self._bind("v1", "i0")
            self._attach("v1", self._number("ioas", chance=0))
        if self._often(0.5):
            self.ops.append(Op("file", "f0", fields=(FILE_PAGES,)))
            self._open.add("f0")

    def _alloc(self, iommufd: str) -> None:
        flags = self._edge(0, 1, 1 << 31, chance=0.02)
        self._call("IOAS_ALLOC", "III", flags, 0, slot=iommufd)
        if not flags:
            self._new_object(iommufd, "ioas")

    def _objects_call(self) -> None:
        iommufd = self._iommufd()
        if self._often(0.5):
            self._alloc(iommufd)
            return
        kind = self._chance.choice(["ioas", "ioas", "hwpt", "hwpt", "device"])
        number = self._number(kind, iommufd=iommufd, chance=0.1)
        self._call("DESTROY", "II", number, slot=iommufd)
        there = self._objects.get(iommufd, {})
        if there.get(number) in ("ioas", "hwpt") and number not in self._attached.values():
            del there[number]

    # ------------------------------------------------------------------------------------------------- mappings

    def _flags(self) -> int:
        rights = self._edge(self._one(_BOTH, _BOTH, _BOTH, _READABLE, _WRITEABLE), 0, 8 | _BOTH, 1 << 31)
        return rights | (_FIXED if self._often(0.8) else 0)

    def _believe(self, iova: int, size: int) -> None:
        if size <= 64 * _P and not (size | iova) % _P:
            self._believed = [*self._believed[-20:], (iova, size)]

    def _map(self) -> None:
        iova = self._iova()
        size, flags = self._size(iova), self._flags()
        reserved = self._edge(0, 1, chance=0.01)
        fields = (flags, self._number("ioas"), reserved, self._vaddr(), size, iova)
        self._call("IOAS_MAP", "IIIIQQQ", *fields, slot=self._iommufd())
        if flags & _FIXED:
            self._believe(iova, size)

    def _target(self) -> tuple[int, int]:
        kind = self._chance.random()
        if self._believed and kind < 0.4:
            return self._chance.choice(self._believed)
        if self._believed and kind < 0.65:
            start, size = self._chance.choice(self._believed)
            first = self._chance.randrange(-1, size // _P + 1) * _P
            return (start + first) % TOP, self._chance.randint(1, size // _P + 2) * _P
        if kind < 0.75:
            return BASE - _P, 64 * _P
        iova = self._iova()
        return iova, self._size(iova)

    def _unmap(self) -> None:
        iova, size = self._target()
        if self._often(0.08):
            iova, size = 0, TOP - 1
        self._call("IOAS_UNMAP", "IIQQ", self._number("ioas"), iova, size, slot=self._iommufd())

    def _source(self) -> tuple[int, int]:
        if not self._believed or self._often(0.3):
            return self._target()
        start, size = self._chance.choice(self._believed)
        pages = size // _P
        if pages < 2 or self._often(0.4):
            return start, size
        first = self._chance.randrange(pages)
        return (start + first * _P) % TOP, self._chance.randint(1, pages - first) * _P

    def _copy(self) -> None:
        source, size = self._source()
        flags, iova = self._flags(), self._iova()
        fields = (flags, self._number("ioas"), self._number("ioas"), size, iova, source)
        self._call("IOAS_COPY", "IIIIQQQ", *fields, slot=self._iommufd())
        if flags & _FIXED:
            self._believe(iova, size)

    def _map_file(self) -> None:
        iova, flags = self._iova(), self._flags()
        size = self._edge(
            self._one(_P, _P, 2 * _P, 4 * _P), 0, 1, _P + 1, 5 * _P, 1 << 40, TOP - 1, TOP - _P, chance=0.1
        )
        start = self._edge(self._one(0, 0, _P, 3 * _P), 1, FILE_PAGES * _P, 1 << 62, TOP - _P, chance=0.1)
        fd: str | int = self._chance.choice(_FILES)
        fields = (flags, self._number("ioas"), fd, start, size, iova)
        self._call("IOAS_MAP_FILE", "IIIiQQQ", *fields, slot=self._iommufd())
        if flags & _FIXED:
            self._believe(iova, size)

    def _files(self) -> None:
        slot = self._chance.choice(["f0", "f0", "f1"])
        match self._chance.randrange(6):
            case 0 | 1:
                self._open.add(slot)
                self.ops.append(Op("file", slot, fields=(self._one(1, 4, 4, 8),)))
            case 2:
                self.ops.append(Op("resize", slot, fields=(self._one(0, 1, 2, 4, 8),)))
            case 3:
                self._close_slot(slot)
            case _:
                self._call("IOAS_CHANGE_PROCESS", "II", self._edge(0, 1), slot=self._iommufd())

    # ----------------------------------------------------------------------------------- ranges, options, tables

    def _range(self) -> tuple[int, int]:
        if self._often(0.25):
            span = self._chance.choice(self._ranges)
            return span.start, self._one(span.last, span.last, span.last + 1, span.start + 4 * _P) % TOP
        start = self._iova()
        return start, (start + self._one(0, 1, _P - 1, 4 * _P - 1, 4 * _P - 1, (1 << 30) - 1, -1)) % TOP

    def _allow(self) -> None:
        count = self._edge(self._one(0, 0, 1, 1, 2, 3), 0, chance=0.1)
        numbers = [number for _ in range(count) for number in self._range()]
        self.ops.append(Op("poke", fields=(0, *numbers)))
        pointer = self._edge(0, 8, chance=0.02)
        data = self._one(*BAD_ADDRESSES) if self._often(0.03) else f"b+{pointer}"
        fields = (self._number("ioas"), count, self._edge(0, 1, chance=0.02), data)
        self._call("IOAS_ALLOW_IOVAS", "IIIIQ", *fields, slot=self._iommufd())

    def _ranges_call(self) -> None:
        count = self._one(0, 1, 2, 3, 8, 8, 100, U32)
        data = self._one(*BAD_ADDRESSES) if self._often(0.05) else f"b+{self._one(0, 0, 8, BITMAP_SIZE - 16)}"
        fields = (self._number("ioas"), count, self._edge(0, 1, chance=0.03), data, 7)
        self._call("IOAS_IOVA_RANGES", "IIIIQQ", *fields, slot=self._iommufd())

    def _option(self) -> None:
        option, operation = self._edge(self._one(0, 1, 1, 1), 2, U32), self._edge(self._one(0, 0, 1), 2, 0xFFFF)
        number = self._number("ioas") if option or self._often(0.1) else 0
        fields = (option, operation, self._edge(0, 1, chance=0.02), number, self._one(0, 0, 1, 1, 2, TOP - 1))
        self._call("OPTION", "IIHHIQ", *fields, slot=self._iommufd())

    def _vfio_ioas(self) -> None:
        operation = self._edge(self._one(0, 1, 1, 1, 2), 3, 0xFFFF)
        self._call(
            "VFIO_IOAS", "IIHH", self._number("ioas"), operation, self._edge(0, 1, chance=0.02), slot=self._iommufd()
        )

    def _tables(self) -> None:
        device = self._number("device")
        match self._chance.randrange(6):
            case 0 | 1 | 2:
                self._hwpt_alloc(device)
            case 3:
                head = self._edge(0, 1, 2), device, self._one(0, 0, 8, 24, 40)
                self._call("GET_HW_INFO", "IIIIQIIQ", *head, "b+0", 0, 0, 0)
            case 4:
                flags, table, reserved = self._one(0, 1, 1, 2), self._number("hwpt"), self._edge(0, 1)
                self._call("HWPT_SET_DIRTY_TRACKING", "IIII", flags, table, reserved)
            case _:
                head, page = (self._number("hwpt"), self._edge(0, 1, 2), self._edge(0, 1)), self._edge(_P, 0, 1, 3 * _P)
                self._call("HWPT_GET_DIRTY_BITMAP", "IIIIQQQQ", *head, *self._target(), page, "b+0")

    def _hwpt_alloc(self, device: int) -> None:
        flags = self._edge(0, 1, 2, 4, 1 << 31, chance=0.1)
        kind, length = self._edge(0, 1, 9, chance=0.03), self._edge(0, 8, chance=0.03)
        parent = self._number(self._chance.choice(["ioas", "ioas", "ioas", "hwpt"]))
        fields = (flags, device, parent, 0, self._edge(0, 1, chance=0.02), kind, length, "b+0", 0, 0)
        self._call("HWPT_ALLOC", "IIIIIIIIQII", *fields)
        if not flags and not kind and not length:
            self._new_object("i0", "hwpt")

    # -------------------------------------------------------------------------------------------- type1's calls

    def _compat_map(self) -> None:
        iova = self._iova()
        size, flags = self._size(iova), self._edge(self._one(3, 3, 1, 2), 0, 4, 8)
        fields = (self._argsz(32), flags, self._vaddr(), iova, size)
        self._ioctl(self._iommufd(), "VFIO_IOMMU_MAP_DMA", "=IIQQQ", *fields, size=32)
        self._believe(iova, size)

    def _compat_unmap(self) -> None:
        flags, (iova, size) = 0, self._target()
        if self._often(0.1):
            flags, iova, size = _ALL, self._edge(0, iova), self._edge(0, size)
        flags = self._edge(flags, 1, 4, 8, 1 << 31, chance=0.03)
        self._ioctl(self._iommufd(), "VFIO_IOMMU_UNMAP_DMA", "=IIQQ", self._argsz(24), flags, iova, size, size=24)

    def _compat_calls(self) -> None:
        slot = self._iommufd()
        match self._chance.randrange(5):
            case 0:
                self._ioctl(slot, "VFIO_CHECK_EXTENSION", "value", self._one(*range(12), 99, 1 << 32 | 1))
            case 1:
                self._ioctl(slot, "VFIO_SET_IOMMU", "value", self._one(3, 3, 1, 1, 0, 2, 8, 9, 99))
            case 2:
                self._ioctl(slot, self._chance.choice(["VFIO_GET_API_VERSION", "VFIO_IOMMU_DIRTY_PAGES"]), "value", 0)
            case _:
                argsz = self._one(512, 16, 15, *range(16, 112, 4), 23, 25, 0, U32)
                self._ioctl(slot, "VFIO_IOMMU_GET_INFO", "=IIQII", argsz, self._one(0, U32), 0, 7, 7, size=24)

    # ------------------------------------------------------------------------------------------ devices, groups

    def _bind(self, slot: str, iommufd: str | int) -> None:
        argsz, flags = self._edge(16, 15, 0, 24, 32, chance=0.05), self._edge(0, 2, 1 << 31, chance=0.03)
        self._ioctl(slot, "VFIO_DEVICE_BIND_IOMMUFD", "=IIiIQ", argsz, flags, iommufd, 0, 0, size=16)
        bound = any(kind[0] == "v" and int(kind[1]) % 2 == int(slot[1]) % 2 for kind in self._kinds())
        if isinstance(iommufd, str) and iommufd in self._open and iommufd[0] == "i" and not bound and not flags:
            self._new_object(iommufd, slot)

    def _kinds(self) -> list[str]:
        return [kind for there in self._objects.values() for kind in there.values()]

    def _attach(self, slot: str, number: int) -> None:
        argsz, flags = self._edge(12, 11, 0, 16, 24, chance=0.05), self._edge(0, 2, 1 << 31, chance=0.02)
        self._ioctl(slot, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", "=IIII", argsz, flags, number, 0, size=12)
        if slot in self._kinds() and not flags and self._objects.get("i0", {}).get(number) == "ioas":
            self._detached(slot)
            if number not in self._attached.values():
                self._new_object("i0", "hwpt")
            self._attached[slot] = number

    def _detached(self, slot: str) -> None:
        """Forget the automatic page table, which goes with the last device: the last one made, most of the time."""
        old = self._attached.pop(slot, None)
        there = self._objects.get("i0", {})
        tables = [number for number, kind in there.items() if kind == "hwpt"]
        if old is not None and old not in self._attached.values() and tables:
            del there[tables[-1]]

    def _attachments(self) -> None:
        slot = self._slot("v", 4)
        match self._chance.randrange(10):
            case 0 | 1:
                self._bind(slot, self._chance.choice(_IOMMUFDS))
            case 2 | 3:
                argsz, flags = self._edge(8, 7, 0, 16, chance=0.05), self._edge(0, 2, chance=0.03)
                self._ioctl(slot, "VFIO_DEVICE_DETACH_IOMMUFD_PT", "=III", argsz, flags, 0, size=8)
                self._detached(slot)
            case _:
                self._attach(slot, self._number(self._chance.choice(["ioas", "ioas", "ioas", "hwpt", "device"])))

    def _device_calls(self) -> None:
        slot = self._chance.choice(["v0", "v0", "v1", "v2", "d0"])
        match self._chance.randrange(4):
            case 0 | 1:
                self._ioctl(slot, "VFIO_DEVICE_GET_INFO", "=IIIIII", self._one(24, 20, 15), 0, 9, 9, 9, 9, size=24)
            case 2:
                self._ioctl(slot, "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", "=III", self._argsz(12), 0, 7, size=12)
            case _:
                self._ioctl(slot, "VFIO_DEVICE_RESET", "value", 0)

    def _open_device(self, group: str, slot: str) -> None:
        self._ioctl(group, "VFIO_GROUP_GET_DEVICE_FD", "name", f"n{group[1]}", "", into=slot)
        self._open.add(slot)

    def _groups(self) -> None:
        group = f"g{self._chance.randrange(2)}"
        match self._chance.randrange(8):
            case 0 | 1:
                self._open_slot(group)
            case 2:
                self._open_slot("c0")
                self._ioctl(group, "VFIO_GROUP_SET_CONTAINER", "=i", "c0", size=4)
                self._ioctl("c0", "VFIO_SET_IOMMU", "value", 3)
            case 3:
                target: str | int = self._chance.choice(_CONTAINERS)
                self._ioctl(group, "VFIO_GROUP_SET_CONTAINER", "=i", target, size=4)
            case 4:
                self._open_device(group, "d0")
            case 5:
                self._ioctl(group, "VFIO_GROUP_GET_STATUS", "=II", 8, 0, size=8)
            case 6:
                self._ioctl(group, "VFIO_GROUP_UNSET_CONTAINER", "value", 0)
            case _:
                self._close_slot(group)

    # ------------------------------------------------------------------------------------------------ descriptors

    def _opens_and_closes(self) -> None:
        match self._chance.randrange(4):
            case 0 if self._open:
                slot = self._chance.choice(sorted(self._open))
                self._forget(slot)
                self._close_slot(slot)
            case 1:
                source, target = self._chance.choice([("i0", "i1"), ("i0", "i1"), ("i1", "i0"), ("v0", "v2")])
                self.ops.append(Op("dup", source, into=target))
                if source in self._open:
                    self._open.add(target)
                    self._objects[target] = self._objects.setdefault(source, {})
            case _:
                slot = self._chance.choice(["i0", "i1", "v0", "v1", "v2", "v3", "c1"])
                self._forget(slot)
                self._open_slot(slot)

    def _forget(self, slot: str) -> None:
        if slot[0] == "i":
            self._objects.pop(slot, None)
        elif slot[0] == "v":
            self._detached(slot)
            for there in self._objects.values():
                for number in [number for number, kind in there.items() if kind == slot]:
                    del there[number]

    def _start_again(self) -> None:
        for slot in sorted(self._open, key=lambda _: self._chance.random()):
            if slot[0] in "vdgi" or self._often(0.5):
                self._close_slot(slot)
        self._believed = []
        self._prologue()

    def _nonsense(self) -> None:
        slot = self._chance.choice(["i0", "i0", "v0", "i1", "d0", "f0"])
        # IOMMU_FAULT_QUEUE_ALLOC and its kin make objects that the fake does not have: only structures too short.
        number = self._chance.choice(
            [*range(0x3B80, 0x3B8E), 0x3B8F, *range(0x3B64, 0x3B67), *range(0x3B69, 0x3B75), 0x3BC0, 0, 0x13B85]
        )
        if self._often(0.5):
            self._ioctl(slot, hex(number), "value", self._one(0, 1, 3, 0x1000))
        else:
            size = self._one(0, 4, 7, 8)
            self._ioctl(slot, hex(number), "=IIQQQQ", size, self._one(0, 1, 4, U32), 0, 0, 0, 0, size=40)


def episodes(*, seed: int, ops: int, ranges: Sequence[IovaRange]) -> list[Episode]:
    """Return `ops` calls in episodes, made from `seed`. `ranges`: those of the IOMMU, whose ends are edges."""
    return write_episodes(lambda chance: _Author(chance, ranges), seed=seed, ops=ops)
