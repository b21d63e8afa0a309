"""A device that is in use in another namespace, on a real kernel. Some thirty seconds."""

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
    "disk, mounted for nobody": "nvme0n1 is claimed: it is mounted in a namespace that is not seen from here",
    "disk, swapped to": "nvme0n1 is swapped to",
    "disk, open": "nvme0n1 is open in python",
    "disk, idle again": FREE,
    "disk, bound": "nvme vfio-pci False",
    "interface, down": FREE,
    "interface, up": "network interface eth0 is up",
    "interface, elsewhere": "1 network interface of it is in another network namespace, and may be up",
    "interface, elsewhere and forced": "vfio-pci",
    "interface, back": FREE,
}


def test_a_device_that_is_in_use_in_another_namespace_is_not_taken_from_its_driver() -> None:
    """A disk that is mounted where this process does not see it, or for nobody; an interface that was moved."""
    command = [sys.executable, "-m", "tests.vm.in_use"]
    nic = ("-device", "e1000e,romfile=")
    result = vm.run(command, kernel="7", devices="nvme", qemu_args=nic, timeout=900)
    assert result.status == 0, result.stderr.decode()
    said = json.loads(result.stdout)
    assert said.keys() == EXPECTED.keys()
    for name, words in EXPECTED.items():
        assert words in said[name] if words else said[name] == FREE, name
