"""The examples of drivers on real kernels, with QEMU's virtio-rng and NVMe controller behind an IOMMU."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from pyvfio.testing import vm
from pyvfio.testing.vm_errors import find_tool

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("busybox", package="busybox-static")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("kernel", "space"), [("6.12", "type1"), ("7+iommufd", "iommufd")])
def test_the_driver_loses_nothing_while_its_buffers_come_and_go_and_reaches_nothing_behind_them(
    kernel: str, space: str
) -> None:
    """The device is slow, so that it has requests to answer in resizes; in how many is the host's business."""
    program = [sys.executable, str(EXAMPLES / "virtio_rng.py"), "--bind", "--json", "--iommu", space]
    result = vm.run([*program, "--bytes", "100000"], kernel=kernel, devices="virtio-rng", timeout=900)
    assert result.status == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert (report["ok"], report["bytes"], report["lost"], report["stopped"]) == (True, 100000, 0, True)
    assert report["resizes"] >= 4
    assert report["at_work"] > 0


@pytest.mark.parametrize(("kernel", "space"), [("6.1", "type1"), ("7", "type1"), ("7+iommufd", "iommufd")])
def test_the_disk_loses_no_block_through_a_hundred_resizes_of_the_memory_for_its_data(kernel: str, space: str) -> None:
    """With "extend" the controller has commands in flight during resizes; with "remap" it is quiesced before each.

    The disk is paced, so that there are commands in flight; in how many resizes is the host's business.
    """
    program = [sys.executable, str(EXAMPLES / "nvme.py"), "--bind", "--overwrite", "--json", "--iommu", space]
    moves = [
        ["--policy=extend", "--blocks=10000", "--resizes=100"],
        ["--policy=remap", "--blocks=1000", "--resizes=10"],
    ]
    command = "; ".join(shlex.join([*program, *each]) for each in moves)
    result = vm.run(["sh", "-ec", command], kernel=kernel, devices="nvme", timeout=900)
    assert result.status == 0, result.stderr.decode()
    extend, remap = map(json.loads, result.stdout.splitlines())
    assert (extend["lost"], extend["stray"], extend["resizes"]) == (0, 0, 100)
    assert (remap["lost"], remap["stray"], remap["resizes"]) == (0, 0, 10)
    assert extend["blocks"] >= 10000
    assert remap["blocks"] >= 1000
    assert extend["at_work"] > 0
    assert remap["at_work"] == 0
