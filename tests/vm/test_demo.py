"""`scripts/demo --resize` on a real kernel: what a device at work loses, and what it does not. About a minute."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pyvfio.testing import vm
from pyvfio.testing.vm_errors import find_tool


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("busybox", package="busybox-static")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


def test_a_device_at_work_loses_copies_under_a_remap_and_none_under_granules() -> None:
    """On the same kernel, in the same container."""
    command = [sys.executable, "-m", "pyvfio.cli.demo", "--vm", "--resize", "extend", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    remap, extend = json.loads(done.stdout)["policies"]
    assert remap["copies_lost"] > 0
    assert (extend["copies_lost"], extend["out_of_reach_bytes"]) == (0, 0)
    assert min(remap["copies"], extend["copies"]) >= 20
