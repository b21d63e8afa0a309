"""Objects whose last reference disappears in the middle of an operation, and whose finalizer closes them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import pyvfio
from pyvfio.units import PAGE_SIZE
from tests.interruptions.scene import HOT_BDFS, MOST, Closable, Scene
from tests.unit.fakes import OTHER_BDF


class Holder:
    """An object of the program that holds an object of the library, and closes that object when collected."""

    def __init__(self, close: Callable[[], object]) -> None:
        weakref.finalize(self, close)


def _free_bdf(scene: Scene) -> str:
    """Return the address of a device that the operation has not opened."""
    taken = any(isinstance(thing, pyvfio.Device) and thing.bdf == OTHER_BDF for thing in scene.things.values())
    return HOT_BDFS[0] if taken else OTHER_BDF


def _other_device(scene: Scene) -> pyvfio.Device:
    """Return a device that is not part of the operation."""
    found = scene.things.get("other device")
    if found is None:
        found = scene.things["other device"] = pyvfio.open_device(_free_bdf(scene), kernel=scene.kernel)
    assert isinstance(found, pyvfio.Device)
    return found


def _mapper(scene: Scene) -> pyvfio.DmaMapper:
    """Return the mapper of the operation, or another one."""
    if scene.mapper is not None and not scene.handing:
        return scene.mapper
    mapper = pyvfio.DmaMapper(_other_device(scene).space)
    scene.things["other mapper"] = mapper
    return mapper


def _mapping(scene: Scene) -> Callable[[], object]:
    return _mapper(scene).map_buffer(scene.buffer("victim")).close


def _temporary(scene: Scene) -> Callable[[], object]:
    return _mapper(scene).map_temporary(scene.buffer("victim")).close


def _view(scene: Scene) -> Callable[[], object]:
    blocks = scene.blocks
    if blocks is None:
        scene.things["other blocks"] = blocks = pyvfio.RamBlockList(kernel=scene.kernel)
        blocks.add("ring", used_length=PAGE_SIZE, max_length=MOST)
    return blocks["ring"].view().release


def _region_map(scene: Scene) -> Callable[[], object]:
    device = scene.things.get("device")
    if not isinstance(device, pyvfio.Device) or scene.handing or device.windows.low_power:
        device = _other_device(scene)
    device.memory_enabled = True
    return device.region(0).mmap().close


def _device(scene: Scene) -> Callable[[], object]:
    return _other_device(scene).close


def _device_beside(scene: Scene) -> Callable[[], object]:
    """Return the close of a device in the operation's space, if that has a device."""
    if scene.portable or not isinstance(scene.things.get("device"), pyvfio.Device):
        return _device(scene)
    beside: Closable = pyvfio.open_device(_free_bdf(scene), space=scene.space)
    scene.things["other device"] = beside
    return beside.close


VICTIMS: dict[str, Callable[[Scene], Callable[[], object]]] = {
    "mapping": _mapping,
    "temporary mapping": _temporary,
    "view": _view,
    "mapped region": _region_map,
    "device": _device,
    "device beside": _device_beside,
}


def hold(close: Callable[[], object]) -> Callable[[], None]:
    """Return a step that drops the last reference to a holder."""
    holders = [Holder(close)]
    return partial(holders.clear)
