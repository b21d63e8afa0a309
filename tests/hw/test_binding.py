"""Drivers of devices that `--device` does not name, on a throwaway machine."""

from __future__ import annotations

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.cli import list as list_command
from pyvfio.errors import DeviceNotFoundError, RollbackError, VfioError
from pyvfio.kernel import LinuxKernel

pytestmark = [pytest.mark.usefixtures("throwaway")]

SATA = (0x8086, 0x2922)
"""The built-in controller of QEMU's q35. The virtual machine's kernel has no driver for SATA loaded."""
REFUSING = "pcieport"
"""A built-in driver of each kernel. The probe fails for all devices except ports (`pcie_portdrv_probe`)."""


@pytest.mark.real_kernel("the machine decides when a device gets a group: a fake device has a group from the start")
def test_a_device_whose_group_comes_with_the_first_driver_is_bound_and_opened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Behind virtio-iommu before Linux 6.15, only devices with drivers have a group; elsewhere all devices have one."""
    kernel = LinuxKernel()
    found = [each for each in pci.devices(kernel=kernel) if (each.vendor, each.device) == SATA]
    if not found:
        pytest.skip("this needs the SATA controller of a q35 machine")
    sata = found[0]
    assert list_command.main([sata.bdf], kernel=kernel) == 0
    listed = capsys.readouterr().out
    later = pci.comes_later(sata, kernel=kernel)
    assert later == ("after the first bind" in listed) == (sata.iommu_group is None)
    if later:
        with pytest.raises(DeviceNotFoundError, match=f"no IOMMU group yet.*pyvfio bind {sata.bdf}"):
            pyvfio.open_device(sata.bdf)
    binding = pci.bind(sata.bdf, kernel=kernel)
    try:
        with pyvfio.open_device(sata.bdf) as device:
            assert device.config.read16(0) == SATA[0]
        assert not pci.comes_later(pci.read_device(sata.bdf, kernel=kernel), kernel=kernel)
    finally:
        pci.restore(binding, kernel=kernel)
    assert pci.read_device(sata.bdf, kernel=kernel).driver is None


@pytest.mark.real_kernel("the machine decides which driver binds: a fake device has a driver from the start")
@pytest.mark.parametrize("override", [None, REFUSING])
def test_a_device_whose_override_does_not_name_its_driver_is_brought_back(override: str | None) -> None:
    """The kernel binds a device with an override to the named driver only."""
    kernel = LinuxKernel()
    found = [each for each in pci.devices(kernel=kernel) if (each.vendor, each.device) == SATA]
    if not found:
        pytest.skip("this needs the SATA controller of a q35 machine")
    bdf = found[0].bdf
    first = pci.bind(bdf, kernel=kernel)
    try:
        pci.write_sysfs(kernel.sysfs / "bus/pci/devices" / bdf / "driver_override", f"{override or ''}\n")
        before = pci.read_device(bdf, kernel=kernel)
        assert (before.driver, before.driver_override) == (pci.VFIO_PCI, override)
        with pytest.raises(VfioError, match=f"{REFUSING}, and no driver has bound the device") as caught:
            pci.bind(bdf, REFUSING, patience=0, kernel=kernel)
        assert not isinstance(caught.value, RollbackError)
        assert pci.read_device(bdf, kernel=kernel) == before
        pci.restore(pci.bind(bdf, pci.NO_DRIVER, kernel=kernel), kernel=kernel)
        assert pci.read_device(bdf, kernel=kernel) == before
    finally:
        pci.restore(first, kernel=kernel)
    after = pci.read_device(bdf, kernel=kernel)
    assert (after.driver, after.driver_override) == (found[0].driver, found[0].driver_override)
