"""The message of a hand-over: which values can be one state, and which cannot. No call is made for any of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pyvfio import ioctls
from pyvfio.extents import Extent
from pyvfio.live_update.handed_space import HandedContainer, HandedDevice, HandedIoas
from pyvfio.live_update.state import State
from pyvfio.mapper.policy import Policy
from pyvfio.memory import File, Memfd, MemorySettings
from pyvfio.units import MIB, PAGE_SIZE, TIB

BDF = "0000:00:02.0"
POLICY = {"resize": "extend", "granule": 2 * PAGE_SIZE, "allow_gap": False}
SETTINGS = {"dontfork": True, "hugepage": False, "dontdump": True, "mergeable": False}
TOP = 1 << 64
MSI, MSIX = int(ioctls.VFIO_PCI_MSI_IRQ_INDEX), int(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
MOST_KINDS = int(ioctls.VFIO_PCI_NUM_IRQS)

Told = dict[str, Any]


def message() -> Told:
    """As it is sent: a container with two groups, a device in each, two blocks, an interrupt."""
    return {
        "format": "pyvfio live update",
        "version": 2,
        "iommu_type": 3,
        "groups": [2, 5],
        "devices": [{"bdf": BDF, "group": 2}, {"bdf": "0000:00:03.0", "group": 5}],
        "policy": dict(POLICY),
        "prefault": 3,
        "container_bits": 39,
        "mapper_bits": 32,
        "blocks": [
            {
                "idstr": "ring",
                "used_length": 8 * PAGE_SIZE,
                "max_length": MIB,
                "iova": 0x10_0000,
                "memory": {"kind": "memfd", "hugetlb": None},
                "readonly": False,
                "prealloc": 4,
                "settings": dict(SETTINGS),
                "discarded": [[0, PAGE_SIZE], [3 * PAGE_SIZE, 4 * PAGE_SIZE]],
                "pieces": [[PAGE_SIZE, 3 * PAGE_SIZE], [4 * PAGE_SIZE, 6 * PAGE_SIZE], [6 * PAGE_SIZE, 8 * PAGE_SIZE]],
                "policy": dict(POLICY),
            },
            {
                "idstr": "file",
                "used_length": 0,
                "max_length": MIB,
                "iova": 0x20_0000,
                "memory": {"kind": "file", "offset": PAGE_SIZE, "grow": True, "punch": False, "pmem": False},
                "readonly": True,
                "prealloc": 0,
                "settings": dict(SETTINGS),
                "discarded": [],
                "pieces": [],
                "policy": {"resize": "remap", "granule": None, "allow_gap": True},
            },
        ],
        "irqs": [
            {
                "bdf": BDF,
                "index": MSI,
                "count": 4,
                "vectors": [0, 3],
                "unmasked": False,
                "eventfds": [0, 12],
            }
        ],
        "identities": [[1, number] for number in range(9)],
    }


def load(told: Told) -> State:
    """Read it, and see that it says the same when it is sent on."""
    state = State.load(json.dumps(told).encode())
    assert json.loads(state.dump()) == told
    return state


def test_a_message_says_what_it_says() -> None:
    """Field by field; a process with an earlier release wrote it."""
    state = load(message())
    assert state.space == HandedContainer(ioctls.VFIO_TYPE1v2_IOMMU, (2, 5))
    assert state.devices == (HandedDevice(BDF, 2), HandedDevice("0000:00:03.0", 5))
    assert state.policy == Policy("extend", 2 * PAGE_SIZE, allow_gap=False)
    assert (state.prefault, state.container_bits, state.mapper_bits) == (3, 39, 32)
    ring, file = state.blocks
    assert (ring.idstr, ring.used_length, ring.max_length, ring.iova) == ("ring", 8 * PAGE_SIZE, MIB, 0x10_0000)
    assert (ring.memory, ring.readonly, ring.prealloc) == (Memfd(), False, 4)
    assert ring.settings == MemorySettings(dontfork=True, hugepage=False, dontdump=True, mergeable=False)
    assert ring.discarded == (Extent(0, PAGE_SIZE), Extent(3 * PAGE_SIZE, 4 * PAGE_SIZE))
    assert [piece.size // PAGE_SIZE for piece in ring.pieces] == [2, 2, 2]
    assert isinstance(file.memory, File)
    assert (file.memory.offset, file.memory.grow, file.memory.punch, file.memory.shared) == (
        PAGE_SIZE,
        True,
        False,
        True,
    )
    assert (file.readonly, file.used_length, file.policy) == (True, 0, Policy())
    (irq,) = state.irqs
    assert (irq.bdf, irq.index, irq.count, irq.vectors, irq.unmasked) == (BDF, MSI, 4, (0, 3), False)
    assert irq.eventfds == (None, 11)
    assert state.mapped == 6 * PAGE_SIZE


def test_descriptors_are_told_apart_by_their_order() -> None:
    """The space, the devices, the memory of the blocks, the eventfds; and each has a name that a user knows."""
    state, fds = load(message()), range(100, 109)
    assert state.handles == 5
    assert [(device.bdf, fd) for device, fd in state.device_fds(fds)] == [(BDF, 103), ("0000:00:03.0", 104)]
    assert list(state.block_fds(fds)) == [105, 106]
    assert [(irq.index, list(held)) for irq, held in state.irq_fds(fds)] == [(MSI, [107, 108])]
    assert state.names == (
        "the VFIO container",
        "IOMMU group 2",
        "IOMMU group 5",
        f"device {BDF}",
        "device 0000:00:03.0",
        "the memory of RAM block 'ring'",
        "the memory of RAM block 'file'",
        f"the eventfd of vector 0 of VFIO_PCI_MSI_IRQ_INDEX of {BDF}",
        f"the eventfd of vector 3 of VFIO_PCI_MSI_IRQ_INDEX of {BDF}",
    )


def test_the_eventfds_of_one_interrupt_end_where_those_of_the_next_begin() -> None:
    """Also if the first one unmasks an INTx by an eventfd of its own, or has none at all."""
    told = message()
    intx = {"bdf": BDF, "index": 0, "count": 1, "vectors": [0], "unmasked": True, "eventfds": [1, 2]}
    none = {"bdf": BDF, "index": MSIX, "count": 1, "vectors": [], "unmasked": False, "eventfds": []}
    told["irqs"] = [intx, none, *told["irqs"]]
    told["identities"] += [[1, 9], [1, 10]]
    state = load(told)
    assert [list(fds) for _irq, fds in state.irq_fds(range(11))] == [[7, 8], [], [9, 10]]
    assert state.names[7:9] == (
        f"the eventfd of vector 0 of VFIO_PCI_INTX_IRQ_INDEX of {BDF}",
        f"the eventfd that unmasks VFIO_PCI_INTX_IRQ_INDEX of {BDF}",
    )
    assert state.irqs[0].eventfds == (0, 1)


def of_block(**changes: object) -> Callable[[Told], None]:
    """A change of the first block."""
    return lambda told: told["blocks"][0].update(changes)


def of_irq(**changes: object) -> Callable[[Told], None]:
    """A change of the interrupt."""
    return lambda told: told["irqs"][0].update(changes)


def of_device(**changes: object) -> Callable[[Told], None]:
    """A change of the second device."""
    return lambda told: told["devices"][1].update(changes)


def of_all(**changes: object) -> Callable[[Told], None]:
    """A change of the message itself."""
    return lambda told: told.update(changes)


def without(name: str, *path: str | int) -> Callable[[Told], None]:
    """A field that is missing."""

    def remove(told: Told) -> None:
        part: Any = told
        for step in path:
            part = part[step]
        del part[name]

    return remove


@pytest.mark.parametrize(
    "change",
    [
        of_block(used_length=0, discarded=[], pieces=[]),
        of_block(used_length=PAGE_SIZE, max_length=PAGE_SIZE, discarded=[], pieces=[[0, PAGE_SIZE]]),
        of_block(used_length=PAGE_SIZE, discarded=[[0, PAGE_SIZE]], pieces=[]),
        of_block(iova=0),
        of_block(iova=TOP - MIB),
        of_block(iova=0x20_0000 - MIB),  # as near to the other block as it can be
        of_irq(count=2048, vectors=[0, 2047]),
        of_irq(vectors=[0], eventfds=[5]),
        of_irq(index=MOST_KINDS - 1),
        of_irq(index=0, count=1, vectors=[0], unmasked=True, eventfds=[5, 6]),
        lambda told: told["irqs"].append({**told["irqs"][0], "bdf": "0000:00:03.0"}),
        of_all(iommu_type=1),
        of_all(prefault=1024),
        of_all(container_bits=64),
        of_all(prefault=0),
    ],
)
def test_the_least_and_the_most_that_can_be_is_read(change: Callable[[Told], None]) -> None:
    """An empty block, one that is full, one at either end of the IOVA space, the last vector of the last kind."""
    told = message()
    change(told)
    told["identities"] = [[1, 1]] * (7 + sum(len(irq["eventfds"]) for irq in told["irqs"]))
    load(told)


CONTRADICT = "contradict each other"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_block(used_length=0, max_length=0, discarded=[], pieces=[]), f"of RAM block 'ring' {CONTRADICT}"),
        (of_block(max_length=7 * PAGE_SIZE), CONTRADICT),
        (of_block(max_length=MIB + 1), CONTRADICT),
        (of_block(iova=1), CONTRADICT),
        (of_block(iova=TOP - MIB + PAGE_SIZE), CONTRADICT),
        (of_block(iova=TOP), CONTRADICT),
        (of_block(iova=TIB, max_length=TOP), CONTRADICT),
        (of_block(used_length=PAGE_SIZE + 1, discarded=[], pieces=[[0, PAGE_SIZE + 1]]), CONTRADICT),
        (of_block(discarded=[]), CONTRADICT),
        (of_block(discarded=[[0, PAGE_SIZE], [3 * PAGE_SIZE, 5 * PAGE_SIZE]]), CONTRADICT),
        (
            of_block(discarded=[[0, PAGE_SIZE], [PAGE_SIZE, 2 * PAGE_SIZE]], pieces=[[2 * PAGE_SIZE, 8 * PAGE_SIZE]]),
            CONTRADICT,
        ),
        (of_block(discarded=[[8 * PAGE_SIZE, 9 * PAGE_SIZE]], pieces=[[0, 8 * PAGE_SIZE]]), CONTRADICT),
        (of_block(discarded=[], pieces=[[0, 8 * PAGE_SIZE], [8 * PAGE_SIZE, 9 * PAGE_SIZE]]), CONTRADICT),
        (of_block(discarded=[], pieces=[[0, 5 * PAGE_SIZE], [4 * PAGE_SIZE, 8 * PAGE_SIZE]]), CONTRADICT),
        (of_block(discarded=[], pieces=[[4 * PAGE_SIZE, 8 * PAGE_SIZE], [0, 4 * PAGE_SIZE]]), CONTRADICT),
        (of_block(discarded=[[3 * PAGE_SIZE, 4 * PAGE_SIZE], [0, PAGE_SIZE]]), CONTRADICT),  # not ascending
        (of_block(discarded=[[0, 0]]), "'discarded'"),
        (of_block(discarded=[[PAGE_SIZE, 0]]), "'discarded'"),
        (of_block(pieces=[[0, 0]]), "'pieces'"),
        (of_block(pieces=[[0]]), "'pieces'"),
        (of_block(pieces=[[0, PAGE_SIZE, 0]]), "'pieces'"),
        (of_block(pieces=[[0, "1"]]), "'pieces'"),
        (of_block(pieces=[0]), "'pieces'"),
        (of_block(iova=0x20_0000 - MIB + PAGE_SIZE), "two RAM blocks at one IOVA"),
        (of_block(iova=0x20_0000), "two RAM blocks at one IOVA"),
        (of_block(idstr="file"), "two RAM blocks of one name"),
        (of_block(idstr=5), "'idstr' of 'blocks' of the state"),
        (of_block(used_length=True), "'used_length'"),
        (of_block(used_length=-PAGE_SIZE), "'used_length'"),
        (of_block(used_length=1.5), "'used_length'"),
        (of_block(iova=-1), "'iova'"),
        (of_block(prealloc=1025), "prealloc must be a number of threads"),
        (of_block(prealloc=True), "'prealloc'"),
        (of_block(memory=[]), "'memory' of 'blocks' of the state is not a JSON object"),
        (of_block(memory={"kind": "memfd"}), "'hugetlb'"),
        (of_block(memory={"kind": "memfd", "hugetlb": 3}), "power of two"),
        (of_block(memory={"kind": "file"}), "'offset'"),
        (of_block(settings={**SETTINGS, "mergeable": 1}), "'mergeable' of 'settings'"),
        (without("dontfork", "blocks", 0, "settings"), "'dontfork'"),
        (without("granule", "policy"), "'granule'"),
        (without("policy"), "'policy' of the state is not a JSON object"),
        (without("irqs"), "'irqs'"),
        (of_irq(count=0, vectors=[], eventfds=[]), f"of interrupt 1 of {BDF} {CONTRADICT}"),
        (of_irq(count=3), CONTRADICT),
        (of_irq(count=2049), CONTRADICT),
        (of_irq(index=MOST_KINDS), CONTRADICT),
        (of_irq(vectors=[3, 0]), CONTRADICT),
        (of_irq(vectors=[3, 3]), CONTRADICT),
        (of_irq(vectors=[-1, 0]), "'vectors'"),
        (of_irq(vectors=[0, True]), "'vectors'"),
        (of_irq(eventfds=[0]), CONTRADICT),
        (of_irq(eventfds=[0, 1, 2]), CONTRADICT),
        (of_irq(unmasked=True, eventfds=[0, 1, 2]), CONTRADICT),
        (of_irq(bdf="0000:00:04.0"), "interrupt of a device that the state does not list"),
        (lambda told: told["irqs"].append(told["irqs"][0]), "one interrupt of a device twice"),
        (of_device(bdf=BDF), "one device twice"),
        (of_device(group=3), "a group that the state does not list"),
        (of_device(group=None), "'group' of 'devices' of the state"),
        (of_all(identities=[[1, 1]] * 8), "9 descriptors, but 8 identities"),
        (of_all(identities=[[1, 1]] * 10), "9 descriptors, but 10 identities"),
        (of_all(identities={}), "'identities'"),
        (of_all(prefault=1025), "prefault must be a number of threads"),
        (of_all(container_bits=65), "dma_bits"),
        (of_all(iommu_type=4), "type 4, which is not type1"),
        (of_all(format="another"), "not the state of a HandOver"),
        (of_all(version=4), "version 4, but this pyvfio reads versions 2 and 3"),
        (of_all(version=3), "'space' of the state is not a JSON object"),
        (of_all(blocks=[5]), "'blocks' of the state is not a JSON object"),
    ],
)
def test_values_that_no_block_and_no_device_can_have_are_refused(change: Callable[[Told], None], reason: str) -> None:
    """With the name of the field, or of the block; however near to a right value they are."""
    told = message()
    change(told)
    with pytest.raises(ValueError, match=reason):
        State.load(json.dumps(told).encode())


def of_iommufd(**changes: object) -> Told:
    """The same for an Ioas, whose devices have numbers in the iommufd."""
    told = message()
    told["version"] = 3
    told["space"] = {"kind": "iommufd", "id": 1, "cut": "pages", "charge_moves": False} | changes
    del told["iommu_type"], told["groups"]
    told["devices"] = [{"bdf": BDF, "dev_id": 7}, {"bdf": "0000:00:03.0", "dev_id": None}]
    told["identities"].pop()
    return told


def test_a_message_of_an_iommufd_says_what_it_says() -> None:
    """A device may have no number: an earlier release of Linux did not tell."""
    state = load(of_iommufd())
    assert state.space == HandedIoas(1, "pages", charge_moves=False)
    assert state.devices == (HandedDevice(BDF, None, 7), HandedDevice("0000:00:03.0", None, None))
    assert state.names[:3] == ("the iommufd", "the agreement of the two processes", f"device {BDF}")
    assert [fd for _device, fd in state.device_fds(range(8))] == [2, 3]
    for space in ({"id": (1 << 32) - 1}, {"cut": "replace", "charge_moves": True}, {"cut": None}):
        load(of_iommufd(**space))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": 0}, "address space of number 0"),
        ({"id": 1 << 32}, "address space of number 4294967296"),
        ({"cut": "whole"}, "cut='whole'"),
        ({"charge_moves": None}, "'charge_moves' of 'space'"),
        ({"kind": "container"}, "kind 'container'"),
    ],
)
def test_an_address_space_of_an_iommufd_that_cannot_be_is_refused(change: dict[str, object], reason: str) -> None:
    """Numbers of objects are positive, and have 32 bits."""
    with pytest.raises(ValueError, match=reason):
        State.load(json.dumps(of_iommufd(**change)).encode())


@pytest.mark.parametrize("dev_id", [-1, "7", True])
def test_a_device_has_a_number_or_none(dev_id: object) -> None:
    """Nothing else."""
    told = of_iommufd()
    told["devices"][0]["dev_id"] = dev_id
    with pytest.raises(ValueError, match="'dev_id' of 'devices'"):
        State.load(json.dumps(told).encode())
