"""Drivers of devices that `--device` does not name, on a machine that may be thrown away."""

from __future__ import annotations

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.cli import list as list_command
from pyvfio.errors import DeviceNotFoundError, RollbackError, VfioError
from pyvfio.kernel import LinuxKernel

pytestmark = [pytest.mark.usefixtures("throwaway")]

SATA = (0x8086, 0x2922)
"""The controller that QEMU's q35 has built in; the virtual machine's kernel has no driver for it loaded."""
REFUSING = "pcieport"
"""A driver that each kernel has built in, and whose probe fails on a device that is no port (`pcie_portdrv_probe`)."""


@pytest.mark.real_kernel("when a device gets its group is the machine's: a fake device has it from the start")
def test_a_device_whose_group_comes_with_the_first_driver_is_bound_and_opened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Behind virtio-iommu before Linux 6.15 no other device than those with drivers has a group; elsewhere all do."""
    kernel = LinuxKernel()
    found = [each for each in pci.enumerate_devices(kernel) if (each.vendor, each.device) == SATA]
    if not found:
        pytest.skip("this needs the SATA controller of a q35 machine")
    sata = found[0]
    assert list_command.main([sata.bdf], kernel=kernel) == 0
    listed = capsys.readouterr().out
    later = pci.comes_later(kernel, sata)
    assert later == ("after the first bind" in listed) == (sata.iommu_group is None)
    if later:
        with pytest.raises(DeviceNotFoundError, match=f"no IOMMU group yet.*scripts/bind {sata.bdf}"):
            pyvfio.open_device(sata.bdf)
    binding = pci.bind(kernel, sata.bdf)
    try:
        with pyvfio.open_device(sata.bdf) as device:
            assert device.config.read16(0) == SATA[0]
        assert not pci.comes_later(kernel, pci.read_device(kernel, sata.bdf))
    finally:
        pci.restore(kernel, binding)
    assert pci.read_device(kernel, sata.bdf).driver is None


@pytest.mark.real_kernel("which driver takes a device is the machine's: a fake device has one from the start")
@pytest.mark.parametrize("override", [None, REFUSING])
def test_a_device_whose_override_does_not_name_its_driver_is_brought_back(override: str | None) -> None:
    """The kernel binds a device to the driver that the override names, and to no other."""
    kernel = LinuxKernel()
    found = [each for each in pci.enumerate_devices(kernel) if (each.vendor, each.device) == SATA]
    if not found:
        pytest.skip("this needs the SATA controller of a q35 machine")
    bdf = found[0].bdf
    first = pci.bind(kernel, bdf)
    try:
        pci.write_sysfs(kernel.sysfs / "bus/pci/devices" / bdf / "driver_override", f"{override or ''}\n")
        before = pci.read_device(kernel, bdf)
        assert (before.driver, before.driver_override) == (pci.VFIO_PCI, override)
        with pytest.raises(VfioError, match=f"{REFUSING}, and no driver took it") as caught:
            pci.bind(kernel, bdf, REFUSING, patience=0)
        assert not isinstance(caught.value, RollbackError)
        assert pci.read_device(kernel, bdf) == before
        pci.restore(kernel, pci.bind(kernel, bdf, pci.NO_DRIVER))
        assert pci.read_device(kernel, bdf) == before
    finally:
        pci.restore(kernel, first)
    after = pci.read_device(kernel, bdf)
    assert (after.driver, after.driver_override) == (found[0].driver, found[0].driver_override)
