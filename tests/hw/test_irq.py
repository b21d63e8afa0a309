"""Interrupts of a device arrive through eventfds."""

from __future__ import annotations

import threading

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.units import GIB, MIB
from tests.hw.rig import SIZE, Rig


def test_an_msi_of_the_device_arrives_through_its_eventfd(rig: Rig) -> None:
    """Raised by register, it is counted once, and none is left behind."""
    irq = rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable(1)
    assert irq.wait(timeout=0.05) == 0
    rig.engine.raise_interrupt()
    assert irq.wait(timeout=60) == 1
    assert rig.engine.acknowledge_interrupt() == 1
    assert irq.wait(timeout=0.05) == 0
    irq.disable()
    assert irq.fds == ()


def test_the_end_of_a_transfer_arrives_as_an_msi(rig: Rig) -> None:
    """The engine raises its interrupt when a transfer into a block is done."""
    block = rig.blocks.add("ring", used_length=2 * MIB, max_length=GIB)
    irq = rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable(1)
    rig.engine.write_memory(rig.mapper.iova(block), SIZE, interrupt=True)
    assert irq.wait(timeout=60) == 1
    assert rig.engine.acknowledge_interrupt() == 0x100


def test_intx_is_masked_after_each_interrupt_and_comes_again_when_unmasked(rig: Rig) -> None:
    """A level interrupt is held by the kernel until the driver has dealt with it."""
    irq = rig.device.irq(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
    irq.enable(1)
    for _ in range(2):
        rig.engine.raise_interrupt()
        assert irq.wait(timeout=60) == 1
        rig.engine.acknowledge_interrupt()
        irq.unmask()
    assert irq.wait(timeout=0.05) == 0


def test_a_vector_can_be_signalled_as_if_by_the_device(rig: Rig) -> None:
    """The loopback of VFIO_DEVICE_SET_IRQS with no data."""
    irq = rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable(1)
    irq.trigger()
    irq.trigger()
    assert irq.wait(timeout=60) == 2


@pytest.mark.parametrize("closed", [False, True], ids=["disabled", "closed"])
def test_a_waiting_thread_hears_that_the_interrupt_has_ended(rig: Rig, *, closed: bool) -> None:
    """However long it would have waited."""
    irq = rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    irq.enable(1)
    heard: list[pyvfio.VfioError] = []

    def wait() -> None:
        try:
            while True:
                irq.wait()
        except pyvfio.VfioError as error:
            heard.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    rig.engine.raise_interrupt()
    rig.engine.acknowledge_interrupt()
    (rig.device.close if closed else irq.disable)()
    thread.join()
    assert isinstance(heard[0], pyvfio.ClosedError) == closed or "is not enabled" in str(heard[0])


def test_two_kinds_of_interrupt_at_once_are_refused_and_nothing_leaks(rig: Rig) -> None:
    """The kernel says EINVAL; the error says why; no eventfd stays."""
    rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX).enable(1)
    intx = rig.device.irq(ioctls.VFIO_PCI_INTX_IRQ_INDEX)
    with pytest.raises(pyvfio.IoctlError, match="one kind of interrupt"):
        intx.enable(1)
    assert intx.fds == ()


def test_more_vectors_than_the_device_has_are_refused_with_the_numbers(device: pyvfio.Device) -> None:
    """Before any system call, and the error says what the device has."""
    irq = device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    with pytest.raises(pyvfio.UnsupportedError, match=f"has {irq.count} vectors"):
        irq.enable(irq.count + 1)
