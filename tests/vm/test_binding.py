"""A device in use in another namespace, and bindings that survive a reboot, on real kernels. One minute."""

from __future__ import annotations

import json
import sys

import pytest

from pyvfio.testing import vm
from pyvfio.testing.vm_errors import find_tool

FREE = ""


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("busybox", package="busybox-static")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


EXPECTED = {
    "disk, idle": FREE,
    "disk, mounted elsewhere": "nvme0n1 is mounted at /tmp/there in the mount namespace of sleep (pid PID)",
    "disk, mounted for nobody": "nvme0n1 is claimed: mounted in a namespace that this process cannot see",
    "disk, swapped to": "nvme0n1 is swapped to",
    "disk, open": "nvme0n1 is open in python",
    "disk, idle again": FREE,
    "disk, bound": "nvme vfio-pci False",
    "interface, down": FREE,
    "interface, up": "network interface eth0 is up",
    "interface, elsewhere": "1 network interface of the device is in another network namespace, and may be up",
    "interface, elsewhere and forced": "vfio-pci",
    "interface, back": FREE,
}


def test_a_device_that_is_in_use_in_another_namespace_is_not_taken_from_its_driver() -> None:
    """A disk that is mounted where this process cannot see the mount, or for nobody; an interface that was moved."""
    command = [sys.executable, "-m", "tests.vm.in_use"]
    nic = ("-device", "e1000e,romfile=")
    result = vm.run(command, kernel="7", devices="nvme", qemu_args=nic, timeout=900)
    assert result.status == 0, result.stderr.decode()
    said = json.loads(result.stdout)
    assert said.keys() == EXPECTED.keys()
    for name, words in EXPECTED.items():
        assert words in said[name] if words else said[name] == FREE, name


def booted(*words: str) -> dict[str, object]:
    """Return the answers of `tests/vm/persisted.py` on a machine with a network device."""
    command = [sys.executable, "-m", "tests.vm.persisted", *words]
    result = vm.run(command, kernel="7", qemu_args=("-device", "e1000e,romfile="), timeout=900)
    assert result.status == 0, result.stderr.decode()
    said: dict[str, object] = json.loads(result.stdout)
    return said


@pytest.fixture(scope="module")
def boots() -> tuple[dict[str, object], dict[str, object]]:
    """Two boots: the second has nothing of the first but the rule files."""
    try:
        find_tool("udevadm", package="udev")
    except vm.MissingToolError as error:
        pytest.skip(str(error))
    first = booted("first")
    return first, booted("second", json.dumps(first["rules"]))


Boots = tuple[dict[str, object], dict[str, object]]
BOUND = ["vfio-pci", "vfio-pci"]
OPENED = ["0x8086", "0x1234"]
"""The vendor ids that an ordinary user reads from the network device and from edu."""


def test_a_user_and_a_group_open_devices_that_were_bound_for_them(boots: Boots) -> None:
    """Without any right of root. udevd had given the network device to e1000e, and leaves the new nodes alone."""
    first, _second = boots
    assert first["nic"] == ["e1000e", None]
    assert first["edu"] == [None, None]
    assert first["opened"] == OPENED


def test_a_persistent_binding_and_the_rights_survive_a_reboot(boots: Boots) -> None:
    """vfio-pci is not loaded when udevd starts; e1000e, which fits the network device, is a module that udevd loads."""
    _first, second = boots
    assert second["nic at first"] == second["edu at first"] == [None, None]
    assert second["vfio-pci at first"] is False
    assert second["nic"] == second["edu"] == BOUND
    assert second["nodes"] == [[1000, 0, 0o600], [0, 1001, 0o660]]
    assert second["opened"] == OPENED
    assert [line.split()[1:] for line in str(second["persisted"]).splitlines()] == [
        ["ID", "DRIVER", "USER", "GROUP", "NOW"],
        ["1234:11e8", "vfio-pci", "-", "1001", "vfio-pci"],
        ["8086:10d3", "vfio-pci", "1000", "-", "vfio-pci"],
        [],
    ]


def test_a_driver_that_was_faster_than_udevd_is_unbound(boots: Boots) -> None:
    """As a driver is that an initramfs has loaded."""
    _first, second = boots
    assert second["nic before the rules"] == ["e1000e", None]
    assert second["nic after a faster driver"] == BOUND


def test_an_event_after_an_unbind_does_not_bind_the_device_again(boots: Boots) -> None:
    """The rule acts once for each appearance of the device; the unbind warns of the next boot."""
    _first, second = boots
    assert "will be bound to vfio-pci at the next boot" in str(second["unbind"])
    assert second["nic after unbind and trigger"] == ["e1000e", None]


def test_forget_removes_the_rule_files_and_nothing_else(boots: Boots) -> None:
    """The drivers stay as they are until the next boot."""
    first, second = boots
    assert isinstance(first["rules"], dict)
    assert len(first["rules"]) == 2
    assert second["left"] is True
    assert second["nic after forget"] == BOUND
