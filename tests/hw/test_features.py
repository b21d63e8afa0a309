"""Low power, DMA-bufs, capabilities and VF tokens of a device, and a driver that its launcher gives descriptors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

import pyvfio
from pyvfio import ioctls
from pyvfio.kernel import Kernel
from pyvfio.units import PAGE_SIZE
from tests.hw.rig import Rig
from tests.unit.processes import open_fds

LAUNCHER = Path(__file__).resolve().parents[2] / "examples/launcher.py"
BAR = ioctls.VFIO_PCI_BAR0_REGION_INDEX

pytestmark = pytest.mark.one_iommu


def test_registers_answer_in_low_power_and_after_it_and_dma_goes_on(rig: Rig) -> None:
    """Where a window stayed, the kernel would end this program with SIGBUS."""
    ring = rig.blocks.add("ring", used_length=PAGE_SIZE, max_length=PAGE_SIZE)
    assert rig.engine.invert(1) == 0xFFFFFFFE
    for _ in range(2):
        with rig.device.low_power():
            assert rig.engine.invert(2) == 0xFFFFFFFD
            assert rig.device.config.read16(0) == 0x1234
        assert rig.engine.invert(3) == 0xFFFFFFFC
    assert rig.reaches(ring, 0)


def test_low_power_is_refused_while_a_view_of_a_bar_lives_and_then_closes_its_mapping(rig: Rig) -> None:
    """With a view nothing has changed."""
    mapped = rig.device.region(BAR).mmap()
    with mapped.view() as view:
        with pytest.raises(BufferError, match="a view of"):
            rig.device.enter_low_power()
        assert view[0] in (0xED, 0)  # a load, which would be SIGBUS; a fake has no registers in a raw mapping
    with rig.device.low_power(), pytest.raises(pyvfio.ClosedError):
        mapped.view()


def test_a_device_that_wakes_up_tells_its_eventfd(rig: Rig, kernel: Kernel) -> None:
    """Any access wakes it, also one of this program."""
    event = kernel.eventfd(0, os.EFD_NONBLOCK)
    try:
        with rig.device.low_power(wakeup_fd=event):
            while not kernel.poll(event, 0.1):
                assert rig.engine.invert(4) == 0xFFFFFFFB
        assert rig.engine.invert(5) == 0xFFFFFFFA
    finally:
        kernel.close(event)


def test_a_device_that_is_closed_in_low_power_can_be_opened_again(engine_bdfs: tuple[str, ...], kernel: Kernel) -> None:
    """It is awake then."""
    with pyvfio.open_device(engine_bdfs[0], kernel=kernel) as device:
        device.enter_low_power()
    with Rig(engine_bdfs[0], kernel=kernel) as rig:
        assert rig.engine.invert(6) == 0xFFFFFFF9


def test_a_dma_buf_of_a_bar_is_made_where_the_kernel_can(device: pyvfio.Device) -> None:
    """Of all of it, or of pages of it; else UnsupportedError says which kernel can."""
    before, bar = open_fds(), device.region(BAR)
    if device.feature(ioctls.VFIO_DEVICE_FEATURE_DMA_BUF).probe():
        with (
            device.dma_buf(bar) as whole,
            device.dma_buf(bar, [(0, PAGE_SIZE), (bar.size - PAGE_SIZE, PAGE_SIZE)]) as two,
        ):
            assert [os.lseek(each.fd, 0, os.SEEK_END) for each in (whole, two)] == [bar.size, 2 * PAGE_SIZE]
    else:
        with pytest.raises(pyvfio.UnsupportedError, match=r"Linux 6\.19"):
            device.dma_buf(bar)
    assert open_fds() == before


def test_the_capabilities_of_an_edu_are_msi_and_nothing_else(rig: Rig) -> None:
    """It is a conventional device, without power management."""
    found = rig.device.capabilities
    assert [(each.id, each.offset) for each in found.standard] == [(5, 0x40)]
    assert found.extended == ()
    assert (found.msix, found.power, found.pcie) == (None, None, None)


def test_features_that_the_device_has_not_say_what_they_need(device: pyvfio.Device) -> None:
    """Migration, bus mastering by a feature, a VF token."""
    for number in (ioctls.VFIO_DEVICE_FEATURE_MIGRATION, ioctls.VFIO_DEVICE_FEATURE_BUS_MASTER):
        assert not device.feature(number).probe()
        with pytest.raises(pyvfio.UnsupportedError, match="has no VFIO_DEVICE_FEATURE_"):
            device.feature(number).get(bytes(8))
    with pytest.raises(pyvfio.UnsupportedError, match="Only a physical function with SR-IOV"):
        device.set_vf_token(uuid.uuid4())
    assert device.feature(ioctls.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT).probe() == ioctls.VFIO_DEVICE_FEATURE_SET


def test_a_token_for_a_device_without_sriov_is_refused_with_the_reason(bdf: str, kernel: Kernel) -> None:
    """And nothing is left open."""
    before = open_fds()
    # The first kernel whose nodes of devices take a token is 6.17.
    with pytest.raises(pyvfio.VfioError, match=r"EINVAL.*Leave vf_token out|takes no VF token for a node"):
        pyvfio.open_device(bdf, kernel=kernel, vf_token=uuid.uuid4())
    assert open_fds() == before


@pytest.mark.usefixtures("throwaway")
@pytest.mark.real_kernel("a fake is in one process, and other processes have no access")
def test_an_ordinary_user_drives_a_device_that_a_launcher_has_opened(engine_bdfs: tuple[str, ...]) -> None:
    """By descriptors that come over a socket; within the user's own RLIMIT_MEMLOCK."""
    command = [sys.executable, str(LAUNCHER), engine_bdfs[0], "--uid=1000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"ok": True, "uid": 1000, "moved": True, "refused": True}
