"""Interrupts of a device arrive through eventfds."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

import intx
import pyvfio
from pyvfio import ioctls, pci
from pyvfio.kernel import Kernel, LinuxKernel
from pyvfio.units import GIB, MIB
from tests.contract.devices import E1000E, XHCI, Id, fake_groups
from tests.hw.rig import SIZE, Rig
from tests.spaces import fake_of, linux_of

MSIX_CAPABILITY = 0x11  # linux/pci_regs.h: PCI_CAP_ID_MSIX


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
    with pytest.raises(pyvfio.UnsupportedError, match=rf"has {irq.count} vectors?\b"):
        irq.enable(irq.count + 1)


def test_the_loop_of_the_example_for_intx_meets_each_cause_once(rig: Rig) -> None:
    """Two causes at once are two interrupts: the line is still up when an eventfd unmasks it after the first."""
    assert intx.serve(rig.device, rounds=10) == intx.Report(rounds=10, signals=20, causes=20)


def test_own_eventfds_are_signalled_by_the_device_and_stay_open(rig: Rig, kernel: Kernel) -> None:
    """Also when another one takes the place of the first; the device signals the last one."""
    irq = rig.device.irq(ioctls.VFIO_PCI_MSI_IRQ_INDEX)
    fds = [kernel.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    for fd in fds:
        irq.enable(fds=[fd])
        rig.engine.raise_interrupt()
        assert irq.wait_any(timeout=60) == {0: 1}
        rig.engine.acknowledge_interrupt()
    rig.engine.raise_interrupt()
    assert kernel.poll(fds[1], 60) == (fds[1],)
    irq.disable()
    assert kernel.eventfd_read(fds[1]) == 1
    for fd in fds:
        kernel.close(fd)


# ------------------------------------------------------------------------------------------------ a device with many


@contextmanager
def _bound(kernel: Kernel, identity: Id) -> Iterator[str]:
    """A device of `scripts/vm --devices contract`, bound to vfio-pci."""
    found = [device.bdf for device in pci.devices(kernel=kernel) if (device.vendor, device.device) == identity]
    if not found:
        pytest.skip("this needs the devices of scripts/vm --devices contract")
    change = pci.bind(found[0], kernel=kernel)
    yield found[0]
    pci.restore(change, kernel=kernel)


@contextmanager
def _opened(request: pytest.FixtureRequest, identity: Id) -> Iterator[pyvfio.Device]:
    version: str | None = request.config.getoption("--fake")
    with ExitStack() as stack:
        kernel: Kernel
        if version is None:
            request.getfixturevalue("throwaway")
            kernel = stack.enter_context(linux_of(request.config))
        else:
            kernel = stack.enter_context(fake_of(request.config, fake_groups()))
        yield stack.enter_context(pyvfio.open_device(stack.enter_context(_bound(kernel, identity)), kernel=kernel))


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Iterator[pyvfio.Device]:
    """A device with 16 vectors of MSI and 16 of MSI-X."""
    with _opened(request, XHCI) as device:
        yield device


@pytest.fixture
def resettable(request: pytest.FixtureRequest) -> Iterator[pyvfio.Device]:
    """A device with 5 vectors of MSI-X that can be reset."""
    with _opened(request, E1000E) as device:
        yield device


@contextmanager
def triggered(irq: pyvfio.Irq, vectors: int) -> Iterator[list[int]]:
    """How often each of the first vectors is signalled while this lasts, by a thread that does nothing else."""
    times, over = [0] * vectors, threading.Event()

    def run() -> None:
        while not over.is_set():
            for vector in range(vectors):
                irq.trigger(vector)
                times[vector] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield times
    finally:
        over.set()
        thread.join()


@pytest.mark.one_iommu
def test_vectors_that_come_and_go_lose_no_signal_of_the_others(many: pyvfio.Device) -> None:
    """Behind the enabled ones, where the kernel adds MSI-X vectors (6.5 on), and else in their place among those."""
    irq = many.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
    first = irq.enable(fds=[*(None,) * 8]) if not irq.can_grow else ()
    irq.enable(2)
    with triggered(irq, 2) as times:
        for _ in range(20):
            own = irq.enable(3, start=4)
            irq.trigger(5)
            irq.disable(4, 6)
            assert irq.wait(5, timeout=60) == 1
            irq.disable(5)
    assert len(own) == 3
    assert irq.wait_any(timeout=0) == dict(enumerate(times))
    assert len(irq.fds) == (len(first) or 7)


@pytest.mark.one_iommu
@pytest.mark.parametrize("index", [ioctls.VFIO_PCI_MSI_IRQ_INDEX, ioctls.VFIO_PCI_MSIX_IRQ_INDEX], ids=["msi", "msix"])
def test_where_no_vector_can_be_added_the_error_says_so_and_nothing_has_changed(
    many: pyvfio.Device, index: int
) -> None:
    """MSI on all kernels, and MSI-X before 6.5; elsewhere it is added."""
    irq = many.irq(index)
    irq.enable(2)
    if irq.can_grow:
        irq.enable(1, start=12)
        irq.trigger(12)
        assert irq.wait_any(timeout=60) == {12: 1}
        return
    with pytest.raises(pyvfio.UnsupportedError, match=r"2 of 16 vectors are enabled, and vector 12 cannot be added"):
        irq.enable(1, start=12)
    irq.trigger(1)
    assert irq.wait_any(timeout=60) == {1: 1}


@pytest.mark.one_iommu
def test_vectors_stay_enabled_when_the_device_is_reset(resettable: pyvfio.Device) -> None:
    """With the eventfds that they had; the kernel writes MSI-X back, as configuration space shows."""
    irq = resettable.irq(ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
    fds = irq.enable(3)
    before = _msix_control(resettable)
    resettable.reset()
    assert _msix_control(resettable) == before
    irq.trigger(2)
    assert irq.wait_any(timeout=60) == {2: 1}
    assert irq.fds == fds


def _msix_control(device: pyvfio.Device) -> bytes:
    """Message Control of MSI-X as the device has it, by sysfs; nothing on the fake, which has no such file."""
    file = device.kernel.sysfs / "bus/pci/devices" / device.bdf / "config"
    space = file.read_bytes() if isinstance(device.kernel, LinuxKernel) else bytes(256)
    at = space[0x34]
    while at and space[at] != MSIX_CAPABILITY:
        at = space[at + 1]
    control = space[at + 2 : at + 4] if at else b""
    assert not at or control[1] & 0x80, "MSI-X is not enabled"
    return control
