"""`pyvfio doctor` names obstacles that are made on a real kernel, and its commands remove them. About 40 seconds.

Three boots: without an IOMMU; with one that the kernel's command line has off; and as the commands of these two say.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from pyvfio.testing import vm, vm_machine
from pyvfio.testing.vm_errors import find_tool

INTEL = vm.IOMMUS["intel"]


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("busybox", package="busybox-static")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


def boot(part: str, *, iommu: str = "intel", devices: str = "edu", line: str = "") -> Any:
    """The answers of a part of `obstacles`, on a machine with another command line of its kernel."""
    command = [sys.executable, "-m", "tests.vm.obstacles", part]
    arguments = ("-append", line) if line else ()  # the last one counts
    result = vm.run(command, iommu=iommu, devices=devices, qemu_args=arguments, timeout=900)
    assert result.status == 0, result.stderr.decode()
    return json.loads(result.stdout)


def wrong(said: dict[str, Any]) -> list[str]:
    """The checks that found an obstacle."""
    return [finding["check"] for finding in said["wrong"]]


@pytest.fixture(scope="module")
def off() -> dict[str, Any]:
    """The answers where the kernel was told not to use the IOMMU."""
    line = vm_machine.kernel_parameters(INTEL).replace("intel_iommu=on", "intel_iommu=off")
    said: dict[str, Any] = boot("off", line=line)
    return said


def test_an_iommu_that_the_command_line_has_off_is_named_and_the_script_changes_the_line(off: dict[str, Any]) -> None:
    """Nothing can be opened before the next boot, which `on` makes."""
    assert (off["before"], off["status"], wrong(off)) == ("DeviceNotFoundError", 1, ["iommu"])
    (found,) = off["wrong"]
    assert (found["add_arguments"], found["remove_arguments"]) == (["intel_iommu=on"], ["intel_iommu=off"])
    assert found["reboot"]
    assert (off["after"], off["status after"]) == ("DeviceNotFoundError", 1)
    assert sorted(off["next"].split()) == sorted(vm_machine.kernel_parameters(INTEL).split())


def test_a_machine_without_an_iommu_is_told_how_to_have_one() -> None:
    """In the words with which the other machines are started."""
    said = boot("none", iommu=vm.NO_IOMMU)
    assert (said["before"], said["status"], wrong(said)) == ("DeviceNotFoundError", 1, ["iommu"])
    (found,) = said["wrong"]
    assert f"-device {INTEL.device}" in found["by_hand"]
    assert found["add_arguments"] == [INTEL.parameters]


@pytest.fixture(scope="module")
def on(off: dict[str, Any]) -> dict[str, Any]:
    """The answers with the command line that the script of `off` made."""
    said: dict[str, Any] = boot("on", devices="contract", line=off["next"])
    return said


def test_modules_that_are_not_loaded_are_loaded_and_the_device_is_bound(on: dict[str, Any]) -> None:
    """After the boot that the script asked for; the device can be opened then."""
    said = on["modules"]
    assert (said["before"], said["status"], wrong(said)) == ("NotBoundError", 1, ["modules", "driver"])
    assert (said["after"], said["status after"]) == ("works", 0)


def test_a_foreign_driver_in_the_group_is_named_and_replaced(on: dict[str, Any]) -> None:
    """The bridge above both is not."""
    said = on["foreign driver"]
    assert (said["before"], said["status"], wrong(said)) == ("NotBoundError", 1, ["driver", "viability"])
    assert "virtio-pci" in said["wrong"][1]["summary"]
    assert (said["after"], said["status after"]) == ("works", 0)


def test_an_ordinary_user_gets_the_node_and_memory_to_lock(on: dict[str, Any]) -> None:
    """Each by the commands of its finding; the error of the second explains itself as the doctor does."""
    rights, memory, end = on["user"]
    assert (rights["outcome"], rights["wrong"]) == ("AccessDeniedError", ["group-node"])
    assert (memory["outcome"], memory["wrong"]) == ("PinLimitError", ["memlock"])
    assert (end["outcome"], end["wrong"]) == ("works", [])
