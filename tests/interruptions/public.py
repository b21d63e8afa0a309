"""Every public call of every stateful class, found by inspection of the classes, with arguments by parameter name."""

from __future__ import annotations

import ctypes
import inspect
import mmap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import pyvfio
from pyvfio import ioctls
from pyvfio.extents import Extent
from pyvfio.units import PAGE_SIZE
from tests.interruptions.scene import MOST, Listener, SeenKernel
from tests.unit.fakes import BDF, OTHER_BDF

STATELESS = {
    "protocols, which have no code": "AddressSpace Kernel RamBlockNotifier",
    "snapshots, which do not change": """
        Anonymous BlockShape Capabilities Capability Command DeviceInfo Diagnosis DirtyBlock DirtyPages
        ExtendedVendorCapability Extent FeatureAnswer File Finding GroupMember Holder HwInfo IommuInfo IovaRange IrqInfo
        Mapping Memfd Memlock MemorySettings MsixCapability PcieCapability PhysicalMemory
        PhysicalRange Plan PlannedBlock Policy PowerCapability
        Progress RegionInfo VendorCapability
    """,
    "system calls alone, without a state": "Feature LinuxKernel",
    "pure, and documented to be the caller's to lock": "IovaAllocator",
    "numbers": "Iova Vaddr",
}
PLAIN: Mapping[str, object] = {
    "alignment": PAGE_SIZE,
    "bdf": BDF,
    "bitmap": None,
    "bits": 0,
    "blocks": [],
    "data": bytes(4),
    "dev_id": 1,
    "discarded": (),
    "dst_ioas_id": 1,
    "enabled": False,
    "fd": None,
    "hwpt_id": 1,
    "ioas_id": 1,
    "object_id": 1,
    "page_size": PAGE_SIZE,
    "pt_id": 1,
    "ranges": (),
    "src_ioas_id": 1,
    "src_iova": 0,
    "start": 0,
    "extension": ioctls.VFIO_TYPE1v2_IOMMU,
    "idstr": "new",
    "index": 0,
    "iommu_type": ioctls.VFIO_TYPE1v2_IOMMU,
    "iova": 0,
    "max_length": MOST,
    "new_length": PAGE_SIZE,
    "number": 2,
    "offset": 0,
    "old_length": 2 * PAGE_SIZE,
    "on": False,
    "parts": [Extent(0, PAGE_SIZE)],
    "places": {},
    "request": "VFIO_GET_API_VERSION",
    "token": "00000000-0000-0000-0000-000000000000",
    "size": PAGE_SIZE,
    "timeout": 0,
    "stale": (),
    "used_length": PAGE_SIZE,
    "vaddrs": (),
    "value": 0,
}
"""Arguments by parameter name. A new parameter name must be added here."""
OWN = frozenset(
    name
    for names in (
        "add_dependent adopt all_regions attach_device begin begun buffers check_decoding check_made_by",
        "check_maps_bars check_open check_present check_stays check_unchanging close_dependents close_fd cut_locked",
        "drop end_dependents end_unused follow forget give_up has_dependents has_in_kernel held in_use",
        "is_mapped_locked keep let_go map_file_locked map_locked must_stay note_attached note_detached note_left",
        "read_command receive release_fd requests reserve_and_map_locked resume set_aside share soil suspend take_back",
        "take_in unmap_and_release_locked unmap_locked unmap_neighbours_locked use_fd use_seam why_silent",
    )
    for name in names.split()
)
"""Methods that one part of the library calls on an object of another part: no public calls."""
_SETTERS = {"bus_master", "memory_enabled"}


class Call(NamedTuple):
    """A public call on one object."""

    name: str
    make: Callable[[], object]


def stateful() -> list[type]:
    """Return the classes that the package exports, without exceptions and without those of STATELESS."""
    names: list[str] = vars(pyvfio)["__all__"]
    exported = {name: getattr(pyvfio, name) for name in names}
    left_out = {name for names in STATELESS.values() for name in names.split()}
    classes = [kind for name, kind in exported.items() if inspect.isclass(kind) and name not in left_out]
    return [kind for kind in classes if not issubclass(kind, BaseException)]


class World:
    """One object of each stateful class. `close` closes all of them."""

    def __init__(self, kernel: SeenKernel, *, progress: Callable[[pyvfio.Progress], None] | None = None) -> None:
        self.kernel = kernel
        self.listener = Listener()
        self.device = device = pyvfio.open_device(BDF, kernel=kernel)
        self.container = device.container
        device.memory_enabled = True
        self.irq = device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
        self.irq.enable(1)
        self.blocks = pyvfio.RamBlockList(kernel=kernel)
        self.blocks.add_notifier(self.listener)
        self.mapper = pyvfio.DmaMapper(self.container, self.blocks, prefault=1, progress=progress)
        self.ring = self.blocks.add("ring", used_length=2 * PAGE_SIZE, max_length=MOST)
        self.memory = mmap.mmap(-1, 4 * PAGE_SIZE)
        self.buffer = mmap.mmap(-1, PAGE_SIZE)
        self.mapping = self.mapper.map_buffer(self.memory)
        self.dma_buf = device.dma_buf(device.region(0))
        self.region_map = device.region(0).mmap()
        self.register = device.region(0).register32(0)
        self.log = pyvfio.DirtyLog(self.blocks)
        self.tracking = pyvfio.DirtyTracking(self.container)
        self.iommufd = pyvfio.Iommufd(kernel=kernel)
        self.ioas = pyvfio.Ioas(self.iommufd)
        self.claim = self.blocks.discards.require_coordinated()
        self._hand_over()

    def _hand_over(self) -> None:
        """Hand over another device and its blocks to another process: in this test, the same process."""
        kernel = self.kernel
        self.other = pyvfio.open_device(OTHER_BDF, kernel=kernel)
        self.old_blocks = pyvfio.RamBlockList(kernel=kernel)
        self.old_mapper = pyvfio.DmaMapper(self.other.container, self.old_blocks)
        self.old_blocks.add("sent", used_length=PAGE_SIZE, max_length=MOST, memory=pyvfio.Memfd())
        self.update = pyvfio.hand_over(self.old_mapper)
        fds = [kernel.dup(fd) for fd in self.update.fds]
        self.taken = pyvfio.take_over(self.update.state, fds, kernel=kernel)

    def objects(self) -> list[object]:
        """Return one object of each class."""
        blocks, device = self.blocks, self.device
        group = device.group
        mine: list[object] = [device, self.container, group, self.irq, device.region(0), self.region_map, blocks]
        mine += [device.config, self.register, self.iommufd, self.ioas]
        mine += [self.mapper, self.ring, self.mapping, self.log, self.tracking, blocks.discards, self.claim]
        return [*mine, self.dma_buf, self.update, self.taken]

    def close(self) -> None:
        """Close everything, including objects that are closed already."""
        self.taken.close()
        self.update.finish()
        closes = (self.tracking, self.log, self.claim, self.region_map, self.mapping, self.mapper, self.blocks)
        for thing in (self.dma_buf, *closes, self.old_mapper, self.old_blocks, self.device, self.other, self.iommufd):
            thing.close()
        self.memory.close()
        self.buffer.close()

    def arguments(self) -> dict[str, object]:
        """Return arguments by parameter name."""
        return {
            **PLAIN,
            "block": self.ring,
            "buffer": self.buffer,
            "by": self.update,
            "container": self.container,
            "group": self.device.group,
            "region": self.device.region(0),
            "source": self.ioas,
            "space": self.container,
            "mapper": self.mapper,
            "memory": self.mapping,
            "notifier": self.listener,
            "tracking": self.tracking,
            "vaddr": ctypes.addressof(ctypes.c_char.from_buffer(self.memory)),
        }

    def calls(self) -> list[Call]:
        """Return every public call on each object, then each function that takes such objects."""
        arguments = self.arguments()
        own: Mapping[type, Mapping[str, object]] = {
            pyvfio.ConfigSpace: {"size": 4},  # configuration space is smaller than a page
            pyvfio.Iommufd: {"fd": 0},
        }
        found = [call for thing in self.objects() for call in calls(thing, {**arguments, **own.get(type(thing), {})})]
        functions: dict[str, Callable[[], object]] = {
            "open_device": lambda: pyvfio.open_device(BDF, container=self.container),
            "hand_over": lambda: pyvfio.hand_over(self.mapper),
            "Device": lambda: pyvfio.Device(self.device.group, BDF),
            "DmaMapper": lambda: pyvfio.DmaMapper(self.container, self.blocks),
            "DirtyTracking": lambda: pyvfio.DirtyTracking(self.container),
            "DirtyLog": lambda: pyvfio.DirtyLog(self.blocks),
        }
        return [*found, *(Call(name, make) for name, make in functions.items())]


def calls(thing: object, arguments: Mapping[str, object]) -> Iterator[Call]:
    """Yield the public calls of an object: methods, properties, setters, and `repr`. `close` comes last."""
    kind = type(thing)
    names = sorted(
        (name for name in dir(kind) if not name.startswith("_") and name not in OWN),
        key=lambda name: (name == "close", name),
    )
    yield Call(f"repr({kind.__name__})", partial(repr, thing))
    for name in names:
        member = inspect.getattr_static(kind, name)
        if isinstance(member, classmethod | staticmethod):  # these make new objects, which a child may use
            continue
        full = f"{kind.__name__}.{name}"
        if isinstance(member, property) or not callable(member):
            yield Call(full, partial(getattr, thing, name))
            if isinstance(member, property) and member.fset is not None:
                assert name in _SETTERS, f"{full} can be set: say how in {__name__}"
                yield Call(f"{full} = False", partial(setattr, thing, name, False))  # noqa: FBT003
        else:
            yield Call(full, _bound(getattr(thing, name), arguments, full))


def _bound(method: Callable[..., object], arguments: Mapping[str, object], what: str) -> Callable[[], object]:
    """Return the method with an argument for each parameter without a default."""
    keywords, positional = dict[str, object](), list[object]()
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            continue
        assert name in arguments, f"{what} takes {name!r}: say which in {__name__}"
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(arguments[name])
        else:
            keywords[name] = arguments[name]
    return partial(method, *positional, **keywords)
