"""Resets of a bus: of an e1000e alone on its bus, and of two devices behind one bridge.

In a virtual machine these are there with `--devices contract` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import pytest

import pyvfio
from pyvfio import ioctls, pci
from pyvfio.kernel import Kernel
from pyvfio.testing.fake import FakeKernel
from tests.contract.devices import RNG_DRIVER, VFIO, Company, fake_groups, find_company
from tests.contract.world import real_message, real_rebind
from tests.spaces import AddressSpace, fake_of, linux_of

pytestmark = pytest.mark.one_iommu

MSI = ioctls.VFIO_PCI_MSI_IRQ_INDEX
RING = 0x2800  # of an e1000e: where its receive ring lies, 0 after power-on
STATUS = 0x14  # of a virtio device, in BAR 4: what its driver has got to, 0 after power-on


class Bench(NamedTuple):
    """A kernel, the devices, one of them on a root bus, and how one is given to another driver."""

    kernel: Kernel
    company: Company
    on_root: str
    rebind: Callable[[str, str | None], None]

    def open(self, bdf: str, *, space: AddressSpace | None = None) -> pyvfio.Device:
        """A device that decodes memory and is a bus master."""
        device = pyvfio.open_device(bdf, space=space, kernel=self.kernel)
        device.memory_enabled = True
        device.bus_master = True
        return device


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The running machine, with all that has no driver bound to vfio-pci; or a fake with the same devices."""
    version: str | None = request.config.getoption("--fake")
    kernel: Kernel
    with ExitStack() as stack:
        if version is not None:
            kernel = fake = stack.enter_context(fake_of(request.config, fake_groups()))
            rebind = fake.bind
        elif request.config.getoption("--throwaway"):
            kernel = stack.enter_context(linux_of(request.config))
            rebind = partial(real_rebind, kernel)
        else:
            pytest.skip("this uses devices that --device does not name: only in a virtual machine, with --throwaway")
        if (company := find_company(kernel)) is None:
            pytest.skip("this needs the devices of scripts/vm --devices contract")
        on_root = company.edu.bdf
        if version is None:
            on_root = request.getfixturevalue("bdfs")[0]
            for member in (company.e1000e, company.bridged):
                stack.callback(pci.restore, pci.bind(member.bdf, kernel=kernel), kernel=kernel)
        stack.callback(rebind, company.rng.bdf, RNG_DRIVER)
        rebind(company.rng.bdf, VFIO)
        yield Bench(kernel, company, on_root, rebind)
        if version is not None:
            fake.check()
            assert fake.descriptors == ()


def _have_raised(kernel: Kernel, nic: pyvfio.Device) -> None:
    """Have the e1000e raise its interrupt."""
    if isinstance(kernel, FakeKernel):
        kernel.interrupt(nic.bdf)
    else:
        real_message(kernel, nic.fd, nic.bdf)


def test_after_a_hot_reset_a_device_is_as_after_power_on_and_its_interrupts_are_enabled(bench: Bench) -> None:
    """It decodes memory, and is no bus master. A driver lets it send its messages again."""
    with bench.open(bench.company.e1000e.bdf) as nic:
        irq, bar = nic.irq(MSI), nic.region(0)
        irq.enable(1)
        bar.write32(RING, 0x12345000)
        assert nic.hot_reset_groups == (bench.company.e1000e.group,)
        nic.hot_reset()
        assert (nic.memory_enabled, nic.bus_master) == (True, False)
        assert bar.read32(RING) == 0
        nic.bus_master = True
        _have_raised(bench.kernel, nic)
        assert irq.wait(timeout=5) == 1


def test_a_reset_of_its_own_keeps_bus_mastering_and_interrupts(bench: Bench) -> None:
    """As the kernel has them."""
    with bench.open(bench.company.e1000e.bdf) as nic:
        irq = nic.irq(MSI)
        irq.enable(1)
        nic.reset()
        assert (nic.memory_enabled, nic.bus_master) == (True, True)
        _have_raised(bench.kernel, nic)
        assert irq.wait(timeout=5) == 1


def test_a_hot_reset_puts_right_every_device_that_it_reaches(bench: Bench) -> None:
    """The sibling behind the bridge, too."""
    company = bench.company
    with bench.open(company.bridged.bdf) as bridged, bench.open(company.rng.bdf, space=bridged.space) as rng:
        for status in (1, 3):  # acknowledged, and driven
            rng.region(4).write8(STATUS, status)
        assert rng.region(4).read8(STATUS) == 3
        with pytest.raises(pyvfio.UnsupportedError, match=rf"hot_reset\(\), which resets the bus with {rng.bdf}"):
            bridged.reset()
        bridged.hot_reset()
        for device in (bridged, rng):
            assert (device.memory_enabled, device.bus_master) == (True, False)
        assert rng.region(4).read8(STATUS) == 0


@pytest.mark.only_type1("iommufd maps no BAR by address: EFAULT")
def test_a_hot_reset_ends_the_reach_of_other_devices_into_the_bars(bench: Bench) -> None:
    """Of the sibling, which a third device reaches."""
    with (
        bench.open(bench.on_root) as edu,
        pyvfio.DmaMapper(edu.space) as mapper,
        bench.open(bench.company.bridged.bdf) as bridged,
        bench.open(bench.company.rng.bdf, space=bridged.space) as rng,
    ):
        mapping = mapper.map_region(rng.region(4))
        bridged.hot_reset()
        assert edu.space.mapping_at(mapping.iova) is None


def test_a_device_that_is_missing_is_named_before_the_bus_is_reset(bench: Bench) -> None:
    """Without a driver it belongs to nobody, and the kernel would say EINVAL."""
    company = bench.company
    bench.rebind(company.rng.bdf, None)
    with bench.open(company.bridged.bdf) as bridged:
        with pytest.raises(pyvfio.VfioError, match=f"{company.rng.bdf} is not bound to vfio-pci"):
            bridged.hot_reset()
        assert bridged.bus_master


def test_a_device_on_a_root_bus_has_no_hot_reset(bench: Bench) -> None:
    """And its reset does not name one."""
    with bench.open(bench.on_root) as edu:
        with pytest.raises(pyvfio.UnsupportedError, match="neither the slot nor the bus"):
            edu.hot_reset()
        with pytest.raises(pyvfio.UnsupportedError, match=r"bus_master to stop DMA$"):
            edu.reset()
