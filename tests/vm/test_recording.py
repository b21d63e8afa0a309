"""A recording on a real kernel, replayed in the same run: the format, the recorder and the fake go together."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

import e1000e
from pyvfio.recording.format import parse
from pyvfio.testing import vm
from pyvfio.testing.vm_errors import find_tool
from tests.vm.plugin_case import UNMAPPED

PROGRAM = Path(__file__).resolve().parents[2] / "examples/e1000e.py"
CASE = Path(__file__).with_name("plugin_case.py")


@pytest.fixture(scope="module")
def machine() -> vm.VmResult:
    """What a machine with an e1000e has printed: the record, and on stderr a run of pytest and the driver's report."""
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("busybox", package="busybox-static")
    except vm.MissingToolError as error:
        pytest.skip(str(error))
    case = shlex.join([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASE), "--vfio-world", "vm"])
    record = shlex.join([sys.executable, str(PROGRAM), "--bind", "--record", "/tmp/fresh.record"])  # noqa: S108
    command = ["sh", "-ec", f"{case} >&2 || test $? = 1; {record} >&2; cat /tmp/fresh.record"]
    result = vm.run(command, qemu_args=["-device", "e1000e,romfile="], timeout=900)
    assert result.status == 0, result.stderr.decode()
    return result


def test_a_record_that_is_made_afresh_drives_the_driver_without_the_kernel(
    machine: vm.VmResult, tmp_path: Path
) -> None:
    """The driver reports the same on the controller, on the fresh record, and on the record in the repository."""
    fresh = tmp_path / "fresh.record"
    fresh.write_bytes(machine.stdout)
    seen = json.loads(machine.stderr.decode().splitlines()[-1])
    for file in (fresh, e1000e.RECORD):
        with e1000e.replayed(file) as device:
            report = e1000e.drive(device)
        assert report.ok
        assert (report.mac, report.link_up) == (seen["mac"], seen["link_up"])
    record_of_fresh = parse(fresh.read_text(encoding="ascii"), name=fresh.name)
    assert record_of_fresh.complete
    assert (record_of_fresh.header.vendor, record_of_fresh.header.device) == e1000e.E1000E_ID


def test_a_failure_on_a_real_device_is_told_with_its_accesses_and_the_faults_of_the_iommu(machine: vm.VmResult) -> None:
    """The device is bound, locked and given back by the plugin. The fault is a line of the kernel's log."""
    output = machine.stderr.decode()
    assert "1 failed" in output
    assert f"w64 bar0 0x00080 {UNMAPPED:#018x}" in output
    assert re.search(rf"IOMMU faults[- ]*\n.*DMAR: .*fault addr {UNMAPPED:#x}", output)
