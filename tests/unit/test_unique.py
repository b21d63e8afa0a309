"""Objects that own something of the kernel have no copies."""

from __future__ import annotations

import copy
import gc
import mmap
import pickle
from collections.abc import Callable, Iterator

import pytest

import pyvfio
from pyvfio.testing import FakeKernel
from pyvfio.unique import Unique
from tests.interruptions.public import stateful
from tests.unit.fakes import BDF

COPIES: tuple[Callable[[object], object], ...] = (copy.copy, copy.deepcopy, pickle.dumps)


@pytest.fixture
def device() -> Iterator[pyvfio.Device]:
    """An open device on a fake kernel."""
    with FakeKernel() as kernel, pyvfio.open_device(BDF, kernel=kernel) as opened:
        yield opened


@pytest.mark.parametrize("kind", list(stateful()))
def test_each_public_class_with_a_state_refuses_copies(kind: type) -> None:
    """Found by inspection, so that a new class is not forgotten."""
    assert issubclass(kind, Unique)


@pytest.mark.parametrize("duplicate", COPIES)
def test_a_refused_copy_names_the_object_and_leaves_it_as_it_was(
    device: pyvfio.Device, duplicate: Callable[[object], object]
) -> None:
    """A copy that is collected would close the descriptors of the original, which other files get then."""
    with pyvfio.RamBlockList(kernel=device.kernel) as blocks, pyvfio.DmaMapper(device.space, blocks) as mapper:
        ring = blocks.add("ring", used_length=mmap.PAGESIZE, max_length=mmap.PAGESIZE)
        irq = device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
        irq.enable(1)
        register = device.region(0).register32(4)
        handles = (device, device.group, device.space, device.kernel, blocks, ring, irq, register, blocks.discards)
        for original in handles:
            with pytest.raises(TypeError, match="cannot be copied or pickled") as refused:
                duplicate(original)
            assert repr(original) in str(refused.value)
        gc.collect()
        irq.trigger(0)
        assert irq.wait(0, timeout=1) == 1
        register.write(1)
        assert register.read() == 0xFFFFFFFE
        assert mapper.iova(ring) == device.space.mappings[0].iova


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_snapshots_and_errors_can_be_copied(device: pyvfio.Device, duplicate: Callable[[object], object]) -> None:
    """They own nothing."""
    error = pyvfio.VfioError("text", hint="do this")
    snapshots = (device.info, device.capabilities, pyvfio.Policy("extend"), pyvfio.Memfd(), device.space.iova_ranges)
    for original in snapshots:
        assert duplicate(original) == original
    assert str(duplicate(error)) == str(error)
