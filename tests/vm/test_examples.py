"""The example of a driver on a real kernel, with QEMU's virtio-rng behind an IOMMU. Some twenty seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pyvfio.testing import vm
from pyvfio.testing.vm_errors import find_tool

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/virtio_rng.py"


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("busybox", package="busybox-static")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


def test_the_driver_loses_nothing_while_its_buffers_come_and_go_and_reaches_nothing_behind_them() -> None:
    """The device is slow, so that it has requests to answer in resizes; in how many is the host's business."""
    command = [sys.executable, str(EXAMPLE), "--bind", "--json", "--bytes", "100000"]
    result = vm.run(command, devices="virtio-rng", timeout=900)
    assert result.status == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert (report["ok"], report["bytes"], report["lost"], report["stopped"]) == (True, 100000, 0, True)
    assert report["resizes"] >= 4
    assert report["at_work"] > 0
