"""Kernels with iommufd, on real boots. About 90 seconds on two cores, and some minutes once to build the modules."""

import errno
import json
import sys
from typing import NotRequired, TypedDict

import pytest

from pyvfio.testing import vm
from pyvfio.testing.vm_errors import find_tool

# With the standard library alone: the tests judge the machine, not pyvfio.
SCRIPT = r"""
import fcntl, glob, json, os, stat, struct, sys

def write(path, text):
    with open(path, "w") as file:
        file.write(text)

def bind(device):
    write(device + "/driver_override", "vfio-pci")
    write("/sys/bus/pci/drivers_probe", os.path.basename(device))

def nodes():
    found = [os.path.join(root, name) for root, _, names in os.walk("/dev/vfio") for name in names]
    return sorted(name for name in found if stat.S_ISCHR(os.stat(name).st_mode))

ids = sorted(glob.glob("/sys/bus/pci/devices/*/device"))
device = next(os.path.dirname(path) for path in ids if "11e8" in open(path).read())
said = {"release": os.uname().release, "before": nodes()}
if sys.argv[1] == "none":
    bind(device)
    said["refused"] = not os.path.exists(device + "/driver")
    write("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "1")
bind(device)
said["after"] = nodes()
iommufd = os.open("/dev/iommu", os.O_RDWR)
ioas = bytearray(struct.pack("III", 12, 0, 0))
fcntl.ioctl(iommufd, 0x3B81, ioas)  # IOMMU_IOAS_ALLOC
said["ioas"] = struct.unpack("III", ioas)[2]
if sys.argv[1] != "none":
    cdev = os.open("/dev/vfio/devices/" + os.listdir(device + "/vfio-dev")[0], os.O_RDWR)
    bound = bytearray(struct.pack("IIiI", 16, 0, iommufd, 0))
    fcntl.ioctl(cdev, 0x3B76, bound)  # VFIO_DEVICE_BIND_IOMMUFD
    said["device"] = struct.unpack("IIiI", bound)[3]
print(json.dumps(said))
"""


@pytest.fixture(autouse=True, scope="module")
def _machine_can_be_had() -> None:
    try:
        find_tool("qemu-system-x86_64", package="qemu-system-x86")
        find_tool("make", package="make")
    except vm.MissingToolError as error:
        pytest.skip(str(error))


class Report(TypedDict):
    """What a machine says of its nodes, before and after an edu device is bound."""

    release: str
    before: list[str]
    after: list[str]
    refused: NotRequired[bool]
    ioas: int
    device: NotRequired[int]


def report(kernel: str, iommu: str) -> Report:
    result = vm.run([sys.executable, "-c", SCRIPT, iommu], kernel=kernel, iommu=iommu, timeout=600)
    assert result.status == 0, result.stderr.decode()
    said: Report = json.loads(result.stdout)
    return said


# The IOMMU of the second remaps no interrupts, for which iommufd refuses a device unless told otherwise.
@pytest.mark.parametrize(("kernel", "iommu"), [("6.12+iommufd", "intel"), ("7+iommufd", "amd")])
def test_a_bound_device_has_a_cdev_that_iommufd_takes_beside_its_group(kernel: str, iommu: str) -> None:
    said = report(kernel, iommu)
    assert said["release"].startswith(f"{kernel.partition('+')[0]}.")
    assert said["before"] == ["/dev/vfio/vfio"]
    group, *others = said["after"]
    assert others == ["/dev/vfio/devices/vfio0", "/dev/vfio/vfio"]
    assert group.removeprefix("/dev/vfio/").isdigit()
    assert 0 < said["ioas"] < said["device"]


@pytest.mark.parametrize(
    ("kernel", "cdevs"), [("6.12+iommufd", []), ("7+iommufd", ["/dev/vfio/devices/noiommu-vfio0"])]
)
def test_a_machine_without_iommu_gives_a_device_out_once_no_iommu_mode_is_on(kernel: str, cdevs: list[str]) -> None:
    """The mode is off at the start of the machine. Root turns it on."""
    said = report(kernel, vm.NO_IOMMU)
    assert said["refused"]
    assert said["before"] == ["/dev/vfio/vfio"]
    assert said["after"] == [*cdevs, "/dev/vfio/noiommu-0", "/dev/vfio/vfio"]


DIRTY = """
import pyvfio
from pathlib import Path
from pyvfio import pci
from pyvfio import iommufd_ioctls as abi

bdf = next(device.bdf for device in pci.devices() if device.vendor == 0x1234)
pci.bind(bdf)
Path("/sys/module/iommufd/parameters/allow_unsafe_interrupts").write_text("Y")
with pyvfio.open_device(bdf, iommu="iommufd") as device:
    space = device.space
    with pyvfio.RamBlockList() as blocks, pyvfio.DmaMapper(space, blocks):
        block = blocks.add("ring", used_length=8192, max_length=8192)
        first = space.iommufd.hwpt_alloc(device.dev_id, space.id)
        for ask in (
            lambda: pyvfio.DirtyTracking(space),
            lambda: space.iommufd.hwpt_alloc(device.dev_id, space.id, flags=abi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING),
        ):
            try:
                ask()
            except pyvfio.VfioError as error:
                print(type(error).__name__, getattr(error, "errno", 0))
        second = space.iommufd.hwpt_alloc(device.dev_id, space.id)
        print(second - first, len(space.mappings))
        space.iommufd.destroy(first)
        space.iommufd.destroy(second)
"""


@pytest.mark.parametrize(("kernel", "iommu"), [("6.12+iommufd", "amd"), ("7+iommufd", "intel")])
def test_an_iommu_of_qemu_tracks_no_dirty_pages_and_is_told_apart_before_anything_is_made(
    kernel: str, iommu: str
) -> None:
    """As the kernel itself says when asked for such a page table (EOPNOTSUPP). The next page table has the next number:
    none was made."""
    result = vm.run([sys.executable, "-c", DIRTY], kernel=kernel, iommu=iommu, timeout=600)
    assert result.status == 0, result.stderr.decode()
    assert result.stdout.decode().split("\n")[:-1] == ["UnsupportedError 0", f"IoctlError {errno.EOPNOTSUPP}", "1 1"]
