"""A program that closes the eventfds of `enable`, which are not the program's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pyvfio
from pyvfio.testing import FakeKernel
from pyvfio.testing.fake import FakeDevice
from tests.unit.fakes import BDF

LOST = r"the program has closed descriptor \d+ of an eventfd .* Leave the eventfds of enable\(\) to disable\(\)"


@pytest.fixture
def irq() -> Iterator[pyvfio.Irq]:
    """Four vectors of MSI-X, enabled."""
    with (
        FakeKernel(groups=[(2, [FakeDevice(BDF, msi=0, msix=8)])]) as kernel,
        pyvfio.open_device(BDF, kernel=kernel) as device,
    ):
        made = device.irq(pyvfio.ioctls.VFIO_PCI_MSIX_IRQ_INDEX)
        made.enable(4)
        yield made


def _close(irq: pyvfio.Irq, vector: int) -> int:
    fd = irq.fds[vector]
    assert fd is not None
    os.close(fd)
    return fd


@pytest.mark.parametrize(
    "wait",
    [
        lambda irq: irq.wait(1, timeout=1),
        lambda irq: irq.wait_any(timeout=1),
        lambda irq: irq.wait_any([0, 1], timeout=1),
    ],
)
def test_a_wait_names_the_descriptor_that_the_program_has_closed(
    irq: pyvfio.Irq, wait: Callable[[pyvfio.Irq], object]
) -> None:
    """And not only EBADF."""
    fd = _close(irq, 1)
    with pytest.raises(pyvfio.VfioError, match=LOST) as found:
        wait(irq)
    assert f"descriptor {fd} " in str(found.value)
    with pytest.raises(pyvfio.VfioError, match=LOST):
        irq.disable()


def test_disable_closes_all_others_and_leaves_another_file_with_the_number_open(
    irq: pyvfio.Irq, tmp_path: Path
) -> None:
    """The number of a closed descriptor belongs to the next file that is opened."""
    path = tmp_path / "mine"
    path.write_text("mine")
    others = [fd for vector, fd in enumerate(irq.fds) if vector != 2]
    number = _close(irq, 2)
    with path.open() as file:
        assert file.fileno() == number
        with pytest.raises(pyvfio.VfioError, match=LOST):
            irq.disable()
        assert file.read() == "mine"
    for fd in others:
        assert fd is not None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    irq.enable(1)  # the interrupt is disabled, and can be enabled again
    irq.disable()


def test_the_end_of_a_device_names_the_descriptor_too() -> None:
    """All else is closed."""
    with FakeKernel() as kernel:
        device = pyvfio.open_device(BDF, kernel=kernel)
        irq = device.irq(pyvfio.ioctls.VFIO_PCI_MSI_IRQ_INDEX)
        irq.enable(1)
        _close(irq, 0)
        with pytest.raises(pyvfio.VfioError, match=LOST):
            device.close()
        assert device.closed
        assert kernel.descriptors == ()
