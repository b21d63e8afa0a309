"""Each call of the library that changes state, with its preparation and the legal errors of a second call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import pyvfio
from pyvfio import ioctls
from pyvfio.units import PAGE_SIZE
from tests.interruptions.scene import GROUP, HOT_BDFS, MOST, Kind, Listener, Scene, Update
from tests.spaces import Cut
from tests.unit.fakes import BDF, OTHER_BDF

_Thing = TypeVar("_Thing")
INTX, MSI, MSIX = (
    ioctls.VFIO_PCI_INTX_IRQ_INDEX,
    ioctls.VFIO_PCI_MSI_IRQ_INDEX,
    ioctls.VFIO_PCI_MSIX_IRQ_INDEX,
)


class Operation(NamedTuple):
    """A call that changes state.

    `prepare` makes the preconditions. `makes`: the call returns a new object. If no caller receives the object, nothing
    of the object may be left. `refusals`: the exceptions that a second call may raise after the first one succeeded.
    `tidy`: a call that a program makes between the two, for the remains of a close. `space`: the kind of address space.
    """

    name: str
    prepare: Callable[[Scene], object]
    call: Callable[[Scene], object]
    makes: bool = False
    refusals: tuple[type[Exception], ...] = ()
    tidy: Callable[[Scene], object] | None = None
    space: Kind = "type1"

    def __str__(self) -> str:
        return self.name


def _nothing(scene: Scene) -> None:
    """Prepare nothing: the program has opened nothing yet."""


def _got(thing: _Thing | None) -> _Thing:
    assert thing is not None
    return thing


def _ring(scene: Scene) -> pyvfio.RamBlock:
    return _got(scene.blocks)["ring"]


def _thing(scene: Scene, name: str, kind: type[_Thing]) -> _Thing:
    found = scene.things[name]
    assert isinstance(found, kind)
    return found


# ------------------------------------------------------------------------------------------------ opening and closing


def _container(scene: Scene) -> None:
    scene.space = pyvfio.Container(kernel=scene.kernel)


def _container_and_group(scene: Scene) -> None:
    _container(scene)
    scene.things["group"] = pyvfio.Group(GROUP, kernel=scene.kernel)


def _attached(scene: Scene) -> None:
    _container_and_group(scene)
    _attach(scene)


def _attach(scene: Scene) -> None:
    scene.container.attach(_thing(scene, "group", pyvfio.Group))


def _detach(scene: Scene) -> None:
    scene.container.detach(_thing(scene, "group", pyvfio.Group))


def _device(scene: Scene) -> pyvfio.Device:
    return _thing(scene, "device", pyvfio.Device)


def _busy(scene: Scene) -> None:
    """Open a device with interrupts, a mapped region, and memory of the program in reach."""
    device = scene.open()
    device.irq(MSI).enable(1)
    device.memory_enabled = True
    device.region(0).mmap()
    device.bus_master = True
    scene.mapper = pyvfio.DmaMapper(device.space)
    scene.mapper.map_buffer(scene.buffer("buffer"))


def _region(scene: Scene) -> None:
    scene.open().memory_enabled = True


def _window(scene: Scene) -> None:
    """Make a window of a BAR, and a mapping of the window."""
    _region_map(scene)
    _device(scene).region(0).read32(0)


def _end_decoding(scene: Scene) -> None:
    _device(scene).memory_enabled = False


def _region_map(scene: Scene) -> None:
    _region(scene)
    scene.things["map"] = _device(scene).region(0).mmap()


def _low_power(scene: Scene) -> None:
    _region(scene)
    _device(scene).enter_low_power()


def _interrupts(scene: Scene) -> None:
    scene.open().irq(MSI).enable(1)


class _Eventfd:
    """An eventfd of the program."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close the eventfd, as the program does."""
        os.close(self.fd)


def _own_eventfd(scene: Scene) -> None:
    scene.open()
    scene.things["eventfd"] = _Eventfd()


def _vectors(scene: Scene) -> None:
    _own_eventfd(scene)
    _device(scene).irq(MSIX).enable(2)


def _line(scene: Scene) -> None:
    _own_eventfd(scene)
    _device(scene).irq(INTX).enable(1)


def _add_vectors(scene: Scene) -> None:
    """Add two vectors, one of which replaces an existing one, with an eventfd of the program."""
    _device(scene).irq(MSIX).enable(fds=[_thing(scene, "eventfd", _Eventfd).fd] * 2, start=1)


def _unmask(scene: Scene) -> None:
    _device(scene).irq(INTX).unmask_by(_thing(scene, "eventfd", _Eventfd).fd)


def _interrupts_of() -> Iterator[Operation]:
    yield Operation(
        "enable an interrupt", Scene.open, lambda s: _device(s).irq(MSI).enable(1), refusals=(pyvfio.VfioError,)
    )
    yield Operation("disable an interrupt", _interrupts, lambda s: _device(s).irq(MSI).disable())
    yield Operation("enable vectors with own eventfds", _own_eventfd, _add_vectors)
    yield Operation("add vectors", _vectors, _add_vectors)
    yield Operation("stop a vector", _vectors, lambda s: _device(s).irq(MSIX).disable(1))
    yield Operation("unmask by an eventfd", _line, _unmask, refusals=(OSError,))


def _close(name: str, scene: Scene) -> None:
    scene.things[name].close()


def _opening() -> Iterator[Operation]:
    yield Operation("open a device", _nothing, lambda s: pyvfio.open_device(BDF, kernel=s.kernel), makes=True)
    yield Operation(
        "open a device in a container",
        _container,
        lambda s: pyvfio.open_device(BDF, space=s.space),
        makes=True,
    )
    yield Operation("Container()", _nothing, lambda s: pyvfio.Container(kernel=s.kernel), makes=True)
    yield Operation("Group()", _nothing, lambda s: pyvfio.Group(GROUP, kernel=s.kernel), makes=True)
    yield Operation("attach", _container_and_group, _attach, refusals=(OSError, ValueError))
    yield Operation("detach", _attached, _detach, refusals=(ValueError,))
    yield Operation("close a group", _attached, partial(_close, "group"))
    yield Operation("close a container", _busy, lambda s: _got(s.space).close())
    yield Operation("close a device", _busy, partial(_close, "device"))
    yield Operation("map a region", _region, lambda s: _device(s).region(0).mmap(), makes=True)
    yield Operation("close a mapped region", _region_map, partial(_close, "map"))
    yield Operation("make a DMA-buf", _region, lambda s: _device(s).dma_buf(_device(s).region(0)), makes=True)
    yield Operation("enter low power", _region, lambda s: _device(s).enter_low_power(), refusals=(OSError,))
    yield Operation("leave low power", _low_power, lambda s: _device(s).exit_low_power())
    yield Operation("reset", _busy, lambda s: _device(s).reset())
    yield Operation("access a register", _region, lambda s: _device(s).region(0).register32(0).read())
    yield Operation("access a register again", _window, lambda s: _device(s).region(0).register32(0).read())
    yield Operation("end memory decoding", _window, _end_decoding)
    yield Operation("drop windows", _window, lambda s: _device(s).drop_windows())


# ------------------------------------------------------------------------------------------------ blocks


def _mixed(block: pyvfio.RamBlock | pyvfio.BlockShape) -> pyvfio.Policy | None:
    """Give granules to one block, and remap all others."""
    return pyvfio.Policy("extend", granule=PAGE_SIZE) if block.idstr == "ring" else None


def _blocks(scene: Scene, policy: str) -> None:
    if policy == "mixed":
        scene.fill(policy_of=_mixed)
        return
    scene.fill(resize="remap" if policy == "remap" else "extend", granule=PAGE_SIZE if policy == "granule" else None)


def _unfollowed(scene: Scene) -> None:
    """Make blocks, and a container whose mapper does not follow the blocks yet."""
    scene.open()
    scene.blocks = pyvfio.RamBlockList(kernel=scene.kernel)
    for name in ("ring", "other"):
        scene.blocks.add(name, used_length=2 * PAGE_SIZE, max_length=MOST)


def _follow(scene: Scene) -> object:
    return pyvfio.DmaMapper(_got(scene.space), scene.blocks)


def _listened(scene: Scene) -> None:
    _blocks(scene, "remap")
    scene.listener = Listener()
    _got(scene.blocks).add_notifier(scene.listener)


def _unheard(scene: Scene) -> None:
    _blocks(scene, "remap")
    scene.listener = Listener()


def _add(scene: Scene) -> pyvfio.RamBlock:
    return _got(scene.blocks).add("new", used_length=2 * PAGE_SIZE, max_length=MOST)


def _changes() -> Iterator[Operation]:
    gone = (ValueError, pyvfio.ClosedError)
    calls: dict[str, tuple[Callable[[Scene], object], tuple[type[Exception], ...]]] = {
        "add": (_add, (ValueError,)),
        "grow": (lambda s: _ring(s).resize(9 * PAGE_SIZE), ()),
        "shrink": (lambda s: _ring(s).resize(2 * PAGE_SIZE), ()),
        "discard": (lambda s: _ring(s).discard(0, PAGE_SIZE), ()),
        "populate": (lambda s: _ring(s).populate(3 * PAGE_SIZE, PAGE_SIZE), ()),
        "replace pages": (lambda s: _ring(s).remap(0, 2 * PAGE_SIZE), ()),
        "remove": (lambda s: _got(s.blocks).remove(_got(s.blocks)["other"]), (KeyError, *gone)),
        "close the mapper": (lambda s: _got(s.mapper).close(), ()),
        "close the list": (lambda s: _got(s.blocks).close(), ()),
    }
    policies: tuple[Literal["remap", "extend", "granule", "mixed"], ...] = ("remap", "extend", "granule", "mixed")
    for name, (call, refusals) in calls.items():
        for policy in policies if name in ("add", "grow", "shrink", "remove") else policies[:-1]:
            yield Operation(f"{name}, {policy}", partial(_blocks, policy=policy), call, refusals=refusals)
    yield Operation("follow blocks", _unfollowed, _follow, makes=True)
    yield Operation(
        "add a notifier", _unheard, lambda s: _got(s.blocks).add_notifier(_got(s.listener)), refusals=(ValueError,)
    )
    yield Operation(
        "remove a notifier",
        _listened,
        lambda s: _got(s.blocks).remove_notifier(_got(s.listener)),
        refusals=(ValueError,),
    )


# ------------------------------------------------------------------------------------------------ buffers


def _mapper(scene: Scene) -> None:
    scene.mapper = pyvfio.DmaMapper(scene.open().space)
    for name in ("buffer", "first", "second", "third"):
        scene.buffer(name)


def _mapped(scene: Scene) -> None:
    _mapper(scene)
    scene.things["mapping"] = _got(scene.mapper).map_buffer(scene.buffer("buffer"))


def _temporary(scene: Scene) -> None:
    """Make two temporary mappings that are closed and not adjacent, and an open one."""
    _mapper(scene)
    first, second, third = (
        _got(scene.mapper).map_temporary(scene.buffer(name)) for name in ("first", "second", "third")
    )
    first.close()
    third.close()
    scene.things["temporary"] = second


def _raw(scene: Scene) -> None:
    scene.open()
    scene.buffer("buffer")


def _map(scene: Scene) -> None:
    _got(scene.space).map(vaddr=scene.places["buffer"], iova=MOST, size=2 * PAGE_SIZE)


def _raw_mapped(scene: Scene) -> None:
    _raw(scene)
    _map(scene)


def _unmap(scene: Scene) -> None:
    _got(scene.space).unmap(iova=MOST, size=2 * PAGE_SIZE)


def _map_dma(scene: Scene) -> object:
    return _got(scene.mapper).map_dma(vaddr=scene.places["buffer"], size=2 * PAGE_SIZE)


def _buffers() -> Iterator[Operation]:
    yield Operation("map", _raw, _map, refusals=(OSError,))
    yield Operation("unmap", _raw_mapped, _unmap, refusals=(pyvfio.VfioError, OSError))
    yield Operation("unmap all", _raw_mapped, lambda s: _got(s.space).unmap_all())
    yield Operation("map_dma", _mapper, _map_dma, makes=True)
    yield Operation("map_buffer", _mapper, lambda s: _got(s.mapper).map_buffer(s.buffer("buffer")), makes=True)
    yield Operation(
        "map_buffer a second time", _mapped, lambda s: _got(s.mapper).map_buffer(s.buffer("buffer")), makes=True
    )
    yield Operation(
        "map_temporary",
        _mapper,
        lambda s: _got(s.mapper).map_temporary(s.buffer("buffer")),
        makes=True,
        tidy=lambda s: _got(s.mapper).reset_temporary(),
    )
    yield Operation(
        "map_temporary at an IOVA of the caller's own",
        _mapper,
        lambda s: _got(s.mapper).map_temporary(s.buffer("buffer"), iova=1 << 38),
        makes=True,
        tidy=lambda s: _got(s.mapper).reset_temporary(),
    )
    yield Operation("reset_temporary", _temporary, lambda s: _got(s.mapper).reset_temporary())
    yield Operation("close a mapping", _mapped, partial(_close, "mapping"))
    yield Operation("close a temporary mapping", _temporary, partial(_close, "temporary"))
    yield Operation("close a mapper of buffers", _temporary, lambda s: _got(s.mapper).close())


# ------------------------------------------------------------------------------------------------ devices beside it


def _beside(scene: Scene) -> None:
    """Make a mapper, and another device with a region."""
    scene.mapper = pyvfio.DmaMapper(scene.open().space)
    scene.things["other"] = other = pyvfio.open_device(HOT_BDFS[0], kernel=scene.kernel)
    other.memory_enabled = True


def _other(scene: Scene) -> pyvfio.Device:
    return _thing(scene, "other", pyvfio.Device)


def _map_region(scene: Scene) -> pyvfio.DmaMapping:
    return _got(scene.mapper).map_region(_other(scene).region(0))


def _beside_mapped(scene: Scene) -> None:
    _beside(scene)
    scene.things["mapping"] = _map_region(scene)


def _hot(scene: Scene) -> None:
    """Open two devices of one bus, both bus masters. One device reaches a BAR of the other."""
    scene.things["first"] = first = pyvfio.open_device(HOT_BDFS[0], kernel=scene.kernel)
    scene.things["second"] = second = pyvfio.open_device(HOT_BDFS[1], space=first.space)
    scene.mapper = pyvfio.DmaMapper(scene.open().space)
    for device in (first, second):
        device.memory_enabled = True
        device.bus_master = True
        scene.mapper.map_region(device.region(0))


def _beside_each_other() -> Iterator[Operation]:
    yield Operation("map_region", _beside, _map_region, makes=True)
    yield Operation("close a mapping of a BAR", _beside_mapped, partial(_close, "mapping"))
    calls: dict[str, Callable[[Scene], object]] = {
        "close a device": lambda s: _other(s).close(),
        "close a group": lambda s: _other(s).group.close(),
        "close a container": lambda s: _other(s).container.close(),
        "close a region": lambda s: _other(s).region(0).close(),
        "reset": lambda s: _other(s).reset(),
        "close the mapper": lambda s: _got(s.mapper).close(),
    }
    for name, call in calls.items():
        refusals = (pyvfio.ClosedError,) if name == "close a container" else ()
        yield Operation(f"{name}, with a BAR that is mapped", _beside_mapped, call, refusals=refusals)
    yield Operation("hot_reset", _hot, lambda s: _thing(s, "first", pyvfio.Device).hot_reset())


# ------------------------------------------------------------------------------------------------ dirty pages


def _tracked(scene: Scene) -> None:
    _raw_mapped(scene)
    _track(scene)


def _track(scene: Scene) -> None:
    scene.things["tracking"] = pyvfio.DirtyTracking(scene.container)


def _logged(scene: Scene) -> None:
    _blocks(scene, "remap")
    scene.things["log"] = pyvfio.DirtyLog(_got(scene.blocks))


def _dirty() -> Iterator[Operation]:
    yield Operation("DirtyTracking()", _raw_mapped, lambda s: pyvfio.DirtyTracking(s.container), makes=True)
    yield Operation("close a DirtyTracking", _tracked, partial(_close, "tracking"))
    yield Operation(
        "DirtyLog()", partial(_blocks, policy="remap"), lambda s: pyvfio.DirtyLog(_got(s.blocks)), makes=True
    )
    yield Operation("close a DirtyLog", _logged, partial(_close, "log"))
    claims: dict[str, Callable[[Scene], object]] = {
        "forbid discards": lambda s: _got(s.blocks).discards.disable(),
        "require discards": lambda s: _got(s.blocks).discards.require_coordinated(),
    }
    for name, claim in claims.items():
        yield Operation(name, partial(_blocks, policy="remap"), claim, makes=True)


# ------------------------------------------------------------------------------------------------ live update


def _portable(scene: Scene) -> None:
    scene.fill(resize="extend", memory=pyvfio.Memfd())
    _device(scene).irq(MSI).enable(1)
    scene.portable = True


def _handing(scene: Scene) -> None:
    _portable(scene)
    scene.things["update"] = Update(pyvfio.hand_over(_got(scene.mapper)))


def _sent(scene: Scene) -> None:
    _handing(scene)
    scene.fds = tuple(map(scene.kernel.dup, _update(scene).fds))


def _take(scene: Scene) -> object:
    return pyvfio.take_over(_update(scene).state, scene.fds, kernel=scene.kernel)


def _update(scene: Scene) -> pyvfio.HandOver:
    return _thing(scene, "update", Update).update


def _live_update() -> Iterator[Operation]:
    yield Operation("hand_over", _portable, lambda s: pyvfio.hand_over(_got(s.mapper)), makes=True)
    yield Operation("cancel", _handing, lambda s: _update(s).cancel())
    yield Operation("finish", _handing, lambda s: _update(s).finish())
    yield Operation("take_over", _sent, _take, makes=True)


# ------------------------------------------------------------------------------------------------ iommufd


def _space(scene: Scene) -> None:
    scene.space = pyvfio.Ioas(kernel=scene.kernel)


def _two_spaces(scene: Scene) -> None:
    """Map a buffer in the space of a device, and make a second space."""
    _raw_mapped(scene)
    scene.things["second"] = pyvfio.Ioas(scene.ioas.iommufd)


def _second(scene: Scene) -> pyvfio.Ioas:
    return _thing(scene, "second", pyvfio.Ioas)


def _two_used_spaces(scene: Scene) -> None:
    """Give the second space a device of its own, since nothing is mapped in a space without a device."""
    _two_spaces(scene)
    scene.things["other"] = pyvfio.open_device(OTHER_BDF, space=_second(scene))


def _copy(scene: Scene) -> None:
    _second(scene).copy(scene.ioas, iova=MOST, size=2 * PAGE_SIZE)


def _cutting(scene: Scene, cut: Cut) -> None:
    scene.space = pyvfio.Ioas(kernel=scene.kernel, cut=cut)
    scene.open()
    scene.fill(resize="cut")


def _detached(scene: Scene) -> None:
    _raw_mapped(scene)
    _device(scene).detach()


def _of_iommufd() -> Iterator[Operation]:
    yield Operation("Iommufd()", _nothing, lambda s: pyvfio.Iommufd(kernel=s.kernel), makes=True)
    yield Operation("Ioas()", _nothing, lambda s: pyvfio.Ioas(kernel=s.kernel), makes=True)
    yield Operation("Ioas() that cuts", _nothing, lambda s: pyvfio.Ioas(kernel=s.kernel, cut="pages"), makes=True)
    yield Operation("a second Ioas()", _space, lambda s: pyvfio.Ioas(s.ioas.iommufd), makes=True)
    yield Operation("open a device", _nothing, lambda s: pyvfio.open_device(BDF, kernel=s.kernel), makes=True)
    yield Operation("open a device in a space", _space, lambda s: pyvfio.open_device(BDF, space=s.space), makes=True)
    yield Operation("close a device", _busy, partial(_close, "device"))
    yield Operation("close a space", _busy, lambda s: s.ioas.close())
    yield Operation("close an iommufd", _busy, lambda s: s.ioas.iommufd.close())
    yield Operation("close a space without a device", _two_spaces, partial(_close, "second"))
    yield Operation("move a device", _two_spaces, lambda s: _device(s).attach(_second(s)))
    yield Operation("detach a device", _raw_mapped, lambda s: _device(s).detach())
    yield Operation("attach a device", _detached, lambda s: _device(s).attach(s.ioas))
    yield Operation("copy", _two_used_spaces, _copy, refusals=(OSError,))
    cuts: dict[str, Callable[[Scene], object]] = {
        "shrink": lambda s: _ring(s).resize(2 * PAGE_SIZE),
        "grow": lambda s: _ring(s).resize(9 * PAGE_SIZE),
        "discard": lambda s: _ring(s).discard(0, PAGE_SIZE),
        "replace pages": lambda s: _ring(s).remap(0, 2 * PAGE_SIZE),
    }
    kinds: tuple[Cut, ...] = ("pages", "replace")
    for name, call in cuts.items():
        for kind in kinds:
            yield Operation(f"{name}, cut by {kind}", partial(_cutting, cut=kind), call)


def _on_iommufd(operations: Iterable[Operation]) -> Iterator[Operation]:
    for operation in operations:
        yield operation._replace(name=f"{operation.name}, iommufd", space="iommufd")


OPERATIONS = (
    *_opening(),
    *_interrupts_of(),
    *_changes(),
    *_buffers(),
    *_beside_each_other(),
    *_dirty(),
    *_live_update(),
    *_on_iommufd((*_of_iommufd(), *_changes(), *_buffers())),
)
