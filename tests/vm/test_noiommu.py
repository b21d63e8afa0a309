"""Devices without an IOMMU on real boots: DMA both ways by physical addresses. About 60 seconds on two cores."""

import json
import sys
from pathlib import Path
from typing import TypedDict

import pytest

from pyvfio.testing import vm
from pyvfio.testing.vm_errors import find_tool

GUEST = Path(__file__).with_name("noiommu_guest.py")
TEXT = "physical addresses go both ways"


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("make", package="make")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


class Transfer(TypedDict):
    """What the device wrote after it had read, and the class that looked the addresses up."""

    received: str
    way: str


Report = TypedDict(
    "Report",
    {
        "off": str,
        "not bound": str,
        "by default": str,
        "iommufd": str,
        "warnings": list[str],
        "refused": dict[str, str],
        "hidden": str,
        "first": Transfer,
        "by group": Transfer,
        "free huge pages": int,
    },
)


@pytest.mark.parametrize(("kernel", "way"), [("6.12+iommufd", "UnsafeByGroup"), ("7+iommufd", "UnsafeByIommufd")])
def test_a_device_without_an_iommu_moves_data_by_physical_addresses_if_that_is_asked_for(kernel: str, way: str) -> None:
    """By GET_PA where the kernel has that, and by the pagemap on both. Each refusal comes first."""
    result = vm.run([sys.executable, str(GUEST)], kernel=kernel, iommu=vm.NO_IOMMU, timeout=600)
    assert result.status == 0, result.stderr.decode()
    said: Report = json.loads(result.stdout)
    assert "no-IOMMU mode is off" in said["off"]
    assert said["not bound"].startswith("NotBoundError")
    assert said["by default"].startswith("UnsupportedError")
    assert said["iommufd"].startswith("UnsupportedError")
    assert "unsafe-noiommu" in said["iommufd"]
    assert said["warnings"] == [f"UnsafeNoIommuWarning {GUEST.name}"]
    assert set(said["refused"]) == {"space", "container"}
    assert said["first"] == {"received": TEXT, "way": way}
    assert said["by group"] == {"received": TEXT, "way": "UnsafeByGroup"}
    assert "hides physical addresses" in said["hidden"]
    assert said["free huge pages"] == 8
