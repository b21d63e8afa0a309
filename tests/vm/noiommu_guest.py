"""In a machine without an IOMMU: DMA both ways with physical addresses. Run by test_noiommu.py; prints JSON."""

import ctypes
import json
import os
import sys
import warnings
from pathlib import Path

import pyvfio
from pyvfio import pci
from pyvfio.device import Device
from pyvfio.kernel import LinuxKernel
from pyvfio.noiommu import UnsafeByGroup
from pyvfio.testing.edu import Edu

PARAMETER = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
TEXT = b"physical addresses go both ways"
_CAP_SYS_ADMIN = 1 << 21
_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3


def transfer(device: Device) -> dict[str, str]:
    """Let the device read from memory by a physical address, and write the same to another one."""
    memory = device.unsafe_noiommu.allocate(4 * pyvfio.MIB)
    device.memory_enabled = device.bus_master = True
    edu = Edu(device.region(0))
    there, back = 0x1234, memory.size - 4096
    with memory.view() as view:
        view[there : there + len(TEXT)] = TEXT
        edu.read_memory(memory.physical(there, len(TEXT)), len(TEXT))
        edu.write_memory(memory.physical(back, len(TEXT)), len(TEXT))
        received = bytes(view[back : back + len(TEXT)])
    memory.check_unmoved()
    return {"received": received.decode(), "way": type(device.unsafe_noiommu).__name__}


def refusals(device: Device) -> dict[str, str]:
    """The errors of calls that keep promises."""
    said = {}
    for name in ("space", "container"):
        try:
            getattr(device, name)
        except pyvfio.UnsupportedError as error:
            said[name] = str(error)
    return said


def opened(bdf: str, iommu: str | None) -> str:
    """The error of an open."""
    try:
        pyvfio.open_device(bdf, iommu=iommu).close()  # type: ignore[arg-type]
    except pyvfio.VfioError as error:
        return f"{type(error).__name__}: {error}"
    return "opened"


def without_admin(bdf: str) -> str:
    """The error of a process that may open the device, and may not know physical addresses: a child of this one."""
    reader, writer = os.pipe()
    if not os.fork():
        header, rights = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        libc.capget(header, rights)
        rights[0] &= ~_CAP_SYS_ADMIN
        libc.capset(header, rights)
        _device, space = open_by_group(bdf)
        try:
            space.allocate(2 * pyvfio.MIB)
        except pyvfio.VfioError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with open(reader, "rb") as pipe:
        return pipe.read().decode()


def open_by_group(bdf: str) -> tuple[Device, UnsafeByGroup]:
    """Open a device through the group, also on a kernel that has a node of the device."""
    space = UnsafeByGroup(LinuxKernel(), pci.group_of(bdf))
    return Device(space, bdf), space


def main() -> dict[str, object]:
    """Make all transfers."""
    bdf = next(device.bdf for device in pci.devices() if (device.vendor, device.device) == (0x1234, 0x11E8))
    Path("/proc/sys/vm/nr_hugepages").write_text("8", encoding="ascii")
    said: dict[str, object] = {"off": opened(bdf, "unsafe-noiommu")}
    PARAMETER.write_text("1", encoding="ascii")
    said["not bound"] = opened(bdf, "unsafe-noiommu")
    pci.bind(bdf)
    said["by default"] = opened(bdf, None)
    said["iommufd"] = opened(bdf, "iommufd")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        device = pyvfio.open_device(bdf, iommu="unsafe-noiommu")
    said["warnings"] = [f"{each.category.__name__} {Path(each.filename).name}" for each in caught]
    with device:
        said["first"] = transfer(device)
        said["refused"] = refusals(device)
    device, space = open_by_group(bdf)
    said["by group"] = transfer(device)
    device.close()
    space.close()
    said["hidden"] = without_admin(bdf)
    fields = [line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()]
    said["free huge pages"] = next(int(field[1]) for field in fields if field[0] == "HugePages_Free:")
    return said


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
