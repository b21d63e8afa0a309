"""An admin script on a fake kernel: binds and unbinds act as on a kernel."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

import pyvfio
from pyvfio import pci
from pyvfio.testing import FakeEdu, FakeKernel
from tests.unit.fakes import BDF, OTHER_BDF


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    """A device with a driver of the kernel, and one that is declared with vfio-pci."""
    with FakeKernel(groups=[(2, [FakeEdu(BDF, driver="e1000e")]), (3, [FakeEdu(OTHER_BDF)])]) as made:
        yield made


def _driver(kernel: FakeKernel, bdf: str = BDF) -> str | None:
    return pci.read_device(bdf, kernel=kernel).driver


def test_a_device_is_bound_opened_and_given_back_twice(kernel: FakeKernel) -> None:
    """As a script that is run twice. A second bind or unbind changes nothing."""
    for _ in range(2):
        assert pci.bind(BDF, kernel=kernel).former_driver == "e1000e"
        assert pci.bind(BDF, kernel=kernel).steps == ()
        with pyvfio.open_device(BDF, kernel=kernel), pytest.raises(pyvfio.GroupBusyError, match="this process"):
            pci.unbind(BDF, kernel=kernel)
        pci.unbind(BDF, kernel=kernel)
        assert _driver(kernel) == "e1000e"
        assert pci.read_device(BDF, kernel=kernel).driver_override is None
        assert pci.unbind(BDF, kernel=kernel).steps == ()
        with pytest.raises(pyvfio.NotBoundError):
            pyvfio.open_device(BDF, kernel=kernel)


def test_a_binding_is_restored_and_a_device_can_have_no_driver(kernel: FakeKernel) -> None:
    """`restore` takes the result of `bind`."""
    binding = pci.bind(BDF, kernel=kernel)
    pci.restore(binding, kernel=kernel)
    assert _driver(kernel) == "e1000e"
    pci.bind(BDF, pci.NO_DRIVER, kernel=kernel)
    assert _driver(kernel) is None
    pci.unbind(OTHER_BDF, kernel=kernel)
    assert _driver(kernel, OTHER_BDF) is None  # no driver of the kernel matches


@pytest.mark.parametrize(
    ("name", "number"),
    [
        (f"bus/pci/drivers/vfio-pci/unbind {BDF}", errno.ENODEV),
        (f"bus/pci/drivers/vfio-pci/bind {BDF}", errno.ENODEV),
        (f"bus/pci/drivers/e1000e/bind {BDF}", errno.ENODEV),
        (f"bus/pci/rescan {BDF}", errno.EACCES),
    ],
)
def test_a_write_that_a_kernel_refuses_is_refused(kernel: FakeKernel, name: str, number: int) -> None:
    """Nothing has changed."""
    path, value = name.split()
    with pytest.raises(OSError, match=r"\[Errno") as refused:
        kernel.write_sysfs(kernel.sysfs / path, value)
    assert refused.value.errno == number
    assert _driver(kernel) == "e1000e"
