"""Declarations of a fake machine that are not as the pages show them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyvfio
from pyvfio.testing import FakeKernel, FakePciDevice


class Device(FakePciDevice):
    """A device with registers that read ones."""

    def reset(self) -> None:
        """There is no state."""

    def read_register(self, bar: int, offset: int, width: int) -> int:
        """No register."""
        del bar, offset, width
        return -1

    def write_register(self, bar: int, offset: int, width: int, value: int) -> None:
        """No register."""


class WithoutSuper(Device):
    """A class whose `__init__` sets the address itself."""

    def __init__(self, bdf: str) -> None:
        self.bdf = bdf


class ListOfBars(Device):
    """A class with sizes in a list."""

    bar_sizes = [4096]  # type: ignore[assignment]  # noqa: RUF012


class OtherNames(Device):
    """A class with the names of other libraries, which declare nothing."""

    vendor_id = 0x10DE
    bars = {0: 1 << 16}  # noqa: RUF012


class BothNames(Device):
    """A class with names of its own beside the declarations."""

    vendor = vendor_id = 0x10DE
    bar_sizes = {0: 1 << 16}  # noqa: RUF012
    bars = ("registers",)


BDF = "0000:01:00.0"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Device(BDF), r"groups are a list of \(number, \[devices\]\), not "),
        (lambda: 7, r"groups are a list of \(number, \[devices\]\), not 7"),
        (lambda: [Device(BDF)], r"a group is declared as \(number, \[devices\]\), not "),
        (lambda: (7, [Device(BDF)]), r"a group is declared as \(number, \[devices\]\), not 7"),
        (lambda: {7: [Device(BDF)]}, r"a group is declared as \(number, \[devices\]\), not 7"),
        (lambda: [(7, Device(BDF))], r"IOMMU group 7: the devices are a list, \[device\], not "),
        (lambda: [(7, [Device])], "IOMMU group 7: ABCMeta is neither a FakeDevice nor a FakePciDevice"),
        (lambda: [(7, [WithoutSuper(BDF)])], r"IOMMU group 7: WithoutSuper did not call super\(\).__init__\(bdf\)"),
        (lambda: [(7, [OtherNames(BDF)])], "OtherNames.bars declares nothing; you mean bar_sizes"),
        (lambda: [(7, [ListOfBars(BDF)])], r"bar_sizes is a dict of sizes by BAR, such as \{0: 4096\}, not \[4096\]"),
    ],
)
def test_a_declaration_that_is_no_machine_is_refused_with_the_form(make: Callable[[], object], said: str) -> None:
    """And not with an error from deep inside."""
    with pytest.raises(ValueError, match=said):
        FakeKernel(groups=make())  # type: ignore[arg-type]


def test_a_class_may_have_such_names_beside_the_declarations() -> None:
    """They are then the class's own."""
    with FakeKernel(groups=[(7, [BothNames(BDF)])]) as kernel, pyvfio.open_device(BDF, kernel=kernel) as device:
        assert device.config.read16(0) == 0x10DE
        assert repr(device.region(0)) == f"<Region BAR0 (region 0) of {BDF} size=0x10000 read write mmap>"
        assert repr(device.region(1)).endswith(" size=0x0 no access>")
