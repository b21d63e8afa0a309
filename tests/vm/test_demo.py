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


def test_a_device_at_work_loses_no_copy_under_cuts_of_its_mappings() -> None:
    """Of an I/O address space of iommufd; and under granules neither."""
    words = ["--vm", "--space", "iommufd", "--resize", "cut", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "pyvfio.cli.demo", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["space"], report["why"]) == ("iommufd", "the program asked for iommufd")
    remap, extend, cut = report["policies"]
    # A copy is lost under a remap only if the device meets the moment: by chance, among so few copies.
    assert remap["out_of_reach_bytes"] > 0
    for one in (extend, cut):
        assert (one["copies_lost"], one["out_of_reach_bytes"]) == (0, 0)
        assert one["copies"] >= 20


def test_the_main_job_holds_on_iommufd() -> None:
    """Every step, with DMA; the IOMMU stops the device at the end of the block."""
    command = [sys.executable, "-m", "pyvfio.cli.demo", "--vm", "--space", "iommufd", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["ok"], report["space"], len(report["steps"])) == (True, "iommufd", 13)
