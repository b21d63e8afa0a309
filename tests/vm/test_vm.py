"""What the virtual machine promises, on real boots. About 80 seconds on two cores."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from pyvfio.testing import kernels, vm
from pyvfio.testing.vm_errors import find_tool

# Asks type 1 for the IOVA ranges with nothing but the standard library: what is tested is the machine, not pyvfio.
RANGES = r"""
import fcntl, glob, os, struct
devices = [os.path.dirname(path) for path in glob.glob("/sys/bus/pci/devices/*/device") if "11e8" in open(path).read()]
device = devices[0]
open(device + "/driver_override", "w").write("vfio-pci")
open("/sys/bus/pci/drivers_probe", "w").write(os.path.basename(device))
container = os.open("/dev/vfio/vfio", os.O_RDWR)
group = os.open("/dev/vfio/" + os.path.basename(os.readlink(device + "/iommu_group")), os.O_RDWR)
fcntl.ioctl(group, 0x3B68, struct.pack("i", container))  # VFIO_GROUP_SET_CONTAINER
fcntl.ioctl(container, 0x3B66, 1)  # VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU
info = bytearray(struct.pack("IIQI", 1000, 0, 0, 0).ljust(1000, b"\0"))
fcntl.ioctl(container, 0x3B70, info)  # VFIO_IOMMU_GET_INFO
offset = struct.unpack_from("I", info, 16)[0]
while offset:
    kind, _, following = struct.unpack_from("HHI", info, offset)
    if kind == 1:  # VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE
        for index in range(struct.unpack_from("I", info, offset + 8)[0]):
            print("%#x-%#x" % struct.unpack_from("QQ", info, offset + 16 + 16 * index))
    offset = following
print(len(devices), "devices")
"""

HOLE_BELOW_4G = ["0x0-0xfedfffff"]
RANGES_OF = {
    "intel": [*HOLE_BELOW_4G, "0xfef00000-0x7fffffffff"],
    "intel48": [*HOLE_BELOW_4G, "0xfef00000-0xffffffffffff"],
    "amd": [*HOLE_BELOW_4G, "0xfef00000-0xfcffffffff", "0x10000000000-0xffffffffffffffff"],
    "virtio": [*HOLE_BELOW_4G, "0xfef00000-0xffffffffffffffff"],
}


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("busybox", package="busybox-static")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


def run_script(words: Sequence[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "pyvfio.cli.vm", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def children(process: "subprocess.Popen[bytes]") -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def test_the_machine_is_the_host_with_another_kernel(tmp_path: Path) -> None:
    written, data = tmp_path / "written", os.urandom(1 << 20)
    (tmp_path / "data").write_bytes(data)
    script = 'cat data; echo "$PWD|$ADDED|$(uname -r)" >&2; echo guest > written; cat written >/dev/stderr; exit 77'
    written.write_text("host\n")
    result = vm.run(["sh", "-c", script], cwd=tmp_path, env={"ADDED": "a b"}, timeout=600)
    assert result.stdout == data
    assert result.stderr.decode() == f"{tmp_path}|a b|{result.kernel_release}\nguest\n"
    assert result.status == 77
    assert written.read_text() == "host\n"
    assert result.kernel_release.startswith("6.12.")


def test_a_command_that_leaves_others_running_is_over_when_it_ends() -> None:
    result = vm.run(["sh", "-c", "setsid sleep 1000 & echo out; kill -TERM $$"], timeout=600)
    assert (result.status, result.stdout) == (128 + signal.SIGTERM, b"out\n")


def test_a_panic_is_a_failure_that_shows_the_end_of_the_log() -> None:
    # What was written is on its way through a pipe and a port; a panic waits for neither.
    process = run_script(["--", "sh", "-c", "echo before; sleep 2; echo c > /proc/sysrq-trigger"])
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (240, b"before\n")
    assert b"Kernel panic - not syncing: sysrq triggered crash" in err


def test_a_time_out_is_a_failure() -> None:
    with pytest.raises(vm.VmTimeoutError):
        vm.run(["sleep", "1000"], timeout=9)


def test_an_interrupt_ends_the_machine_too() -> None:
    process = run_script(["--", "sleep", "1000"])
    while not (machines := children(process)):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100) == (b"", b"")
    assert process.returncode == 128 + signal.SIGINT
    assert [pid for pid in machines if Path("/proc", pid).exists()] == []


@pytest.mark.parametrize("iommu", vm.IOMMUS)
def test_each_iommu_has_its_own_reach(iommu: str) -> None:
    result = vm.run(["/usr/bin/python3", "-c", RANGES], iommu=iommu, timeout=600)
    assert result.status == 0, result.stderr.decode()
    assert result.stdout.decode().splitlines() == [*RANGES_OF[iommu], "2 devices"]


def test_the_machine_runs_under_kvm_exactly_where_kvm_works(tmp_path: Path) -> None:
    """With an empty cache, so that each verdict is of a probe boot of its own."""
    guest = kernels.find_kernel("6.12")
    run = partial(vm.run, kernel=str(guest.image), modules=guest.modules, cache=tmp_path, timeout=600)
    first = run(["uname", "-r"])
    assert (first.status, first.stdout.decode().strip()) == (0, guest.release)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("accel/*.json")}
    again = run(["true"])
    assert (again.accel, again.accel_reason) == (first.accel, first.accel_reason)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("accel/*.json")} == before
    if first.accel == "kvm":
        assert run(["true"], accel="kvm").accel == "kvm"
    else:
        with pytest.raises(vm.KvmUnavailableError, match="KVM does not work here"):
            run(["true"], accel="kvm")


def test_arguments_for_qemu_work_as_they_are_typed() -> None:
    """In one word or in two, with a dash in front, commas and spaces."""
    words = ["--qemu-arg", "-device", "--qemu-arg", "pci-testdev,addr=1c.0", "--qemu-arg=-name", "--qemu-arg=guest=a b"]
    process = run_script([*words, "--", "cat", "/sys/bus/pci/devices/0000:00:1c.0/device"])
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (0, b"0x0005\n"), err
