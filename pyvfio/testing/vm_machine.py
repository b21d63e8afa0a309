"""The virtual machine's hardware: IOMMUs, devices, disks, and the command line of QEMU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Iommu:
    """Describe an IOMMU that QEMU emulates.

    With ``unsafe_interrupts``, the IOMMU does not remap interrupts, and VFIO must be told to allow that.
    """

    device: str
    parameters: str = ""
    unsafe_interrupts: bool = False


IOMMUS: Mapping[str, Iommu] = {
    "intel": Iommu("intel-iommu,intremap=on,caching-mode=on", "intel_iommu=on"),
    "intel48": Iommu("intel-iommu,intremap=on,caching-mode=on,aw-bits=48", "intel_iommu=on"),
    "amd": Iommu("amd-iommu", "", unsafe_interrupts=True),
    "virtio": Iommu("virtio-iommu-pci", "", unsafe_interrupts=True),
}
"""IOMMUs by name: 39 bits of IOVA, 48 bits, 64 bits with a hole below 2^40, and 64 bits."""

NO_IOMMU = "none"
"""In place of an IOMMU's name: a machine without an IOMMU, where VFIO can open no device.

The modules of the kernels with iommufd have no-IOMMU mode. Root turns the mode on in the machine, before a device is
bound: ``echo 1 >/sys/module/vfio/parameters/enable_unsafe_noiommu_mode``. The packaged kernels lack the parameter."""

IOMMU_CHOICES: Mapping[str, Iommu] = {**IOMMUS, NO_IOMMU: Iommu("")}

CPUS: Mapping[str, str] = {
    # Under emulation, five levels of page tables cost a twentieth of the time. "rep movsb" and "rep stosb" as the fast
    # way to copy and to zero double the time to zero a page, because the emulation executes them byte by byte.
    "tcg": "max,la57=off,erms=off,fsrm=off",
    # Some hosts of nested machines offer MSR 0x10a and refuse to set the register, whereupon QEMU 7.2 aborts.
    "kvm": "max,la57=off,arch-capabilities=off",
}
"""The processor's model, by accelerator."""

# Without the mask, edu silently cuts addresses to 28 bits and accesses other memory.
_EDU = ("edu,dma_mask=0xffffffffffffffff",) * 2

DEVICES: Mapping[str, Sequence[str]] = {
    "edu": _EDU,
    "contract": (
        *_EDU,
        "nec-usb-xhci",
        "pci-testdev,multifunction=on,addr=10.0",
        "pci-testdev,addr=10.1,membar=128M",
        "pcie-pci-bridge,id=bridge,addr=11",
        "pci-testdev,bus=bridge,addr=1",
        "virtio-rng-pci,bus=bridge,addr=2",
        "pcie-root-port,id=above,addr=12,disable-acs=on,x-speed=2_5,x-width=1",
        "e1000e,bus=above,romfile=",
        "pcie-root-port,id=socket,addr=13,chassis=1",
        "rtl8139,bus=socket,romfile=",
        "nvme-subsys,id=functions,nqn=pyvfio",
        "pcie-root-port,id=beside,addr=14,chassis=2",
        "nvme,serial=pyvfio,bus=beside,subsys=functions,sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
    ),
    "virtio-rng": (*_EDU, "virtio-rng-pci,disable-legacy=on,iommu_platform=on,max-bytes=4096,period=100"),
    "nvme": (
        *_EDU,
        "nvme-subsys,id=subsystem,nqn=pyvfio",
        "pcie-root-port,id=above,addr=10",
        "nvme,id=controller,bus=above,serial=pyvfio,subsys=subsystem,max_ioqpairs=6,msix_qsize=7,"
        "sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
        "nvme-ns,drive=disk,bus=controller,nsid=1",
    ),
}
"""Lists of QEMU's devices by name.

``edu``: two devices ``edu`` (1234:11e8), each an IOMMU group alone.

``contract``, for ``tests/contract``: the devices of ``edu`` first, then

* ``nec-usb-xhci`` (1033:0194): 16 vectors of MSI and of MSI-X, no reset, a group alone;
* two functions of one ``pci-testdev`` (1b36:0005) in one group: a page of memory and I/O ports each, and 128 MiB of
  memory in the second;
* a conventional bridge with a ``pci-testdev`` and a ``virtio-rng`` (1af4:1005) behind the bridge, all three in one
  group. The driver of the ``virtio-rng`` keeps the group from being viable;
* an ``e1000e`` (8086:10d3), which can be reset, in one group with the root port above;
* an ``rtl8139`` (10ec:8139) below another root port, which can be unplugged: 256 bytes of memory in a page of their
  own;
* an ``nvme`` (1b36:0010) without a disk, which makes up to two virtual functions, below a root port.

The ``virtio-rng`` and the root ports are bound to the kernel's drivers, the other devices to none.

``virtio-rng``, for ``examples/virtio_rng.py``: the devices of ``edu`` first, then a ``virtio-rng`` (1af4:1044) of
virtio 1.x behind the IOMMU, in a group alone and bound to the kernel's driver. The device is slow, 4096 bytes in
100 ms, so that a driver has requests in flight.

``nvme``, for ``examples/nvme.py``: the devices of ``edu`` first, then an ``nvme`` (1b36:0010) in a group alone below a
root port. The machine does not load the kernel's driver, so the device is unbound. The device has one namespace of
512-byte blocks, on the disk of :data:`DISKS`, and two virtual functions that a driver can enable."""


@dataclass(frozen=True)
class Disk:
    """Describe a disk of one machine: ``size`` bytes, all zero at the start.

    The disk completes at most ``iops`` commands a second, so that a driver has commands in flight.
    """

    size: int
    iops: int


DISKS: Mapping[str, Disk] = {"nvme": Disk(16 << 20, iops=40)}
"""The disk of a list of devices, which refer to the disk by ``drive=disk``. The disk is memory without a name in any
file system, so the disk ends with the machine."""


@dataclass(frozen=True)
class Machine:
    """Describe a machine without the kernel. ``accel`` is ``kvm`` or ``tcg``."""

    iommu: str = "intel"
    memory: str = "2G"
    cpus: int = 1
    icount: bool = False
    devices: str = "edu"
    qemu_args: tuple[str, ...] = ()
    accel: str = "tcg"


def qemu_command(
    qemu: str,
    machine: Machine,
    image: Path,
    *,
    initrd: str,
    log: str,
    streams: Sequence[int],
    disk: str = "",
    verbose: bool = False,
) -> list[str]:
    """Return the command line of QEMU.

    ``streams`` are the sockets of stdout, stderr and status. ``log`` is the file of the kernel's log. ``disk`` is the
    file of the machine's disk, for devices that have one. ``verbose`` as for :func:`kernel_parameters`.
    """
    iommu = IOMMU_CHOICES[machine.iommu]
    devices: list[str] = [*filter(None, [iommu.device]), "virtio-serial-pci"]
    words = [qemu, "-machine", "q35,kernel-irqchip=split", "-accel", machine.accel, "-cpu", CPUS[machine.accel]]
    words += ["-m", machine.memory, "-smp", str(machine.cpus)]
    words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    if machine.icount:
        words += ["-icount", "shift=0,sleep=off"]
    words += ["-kernel", str(image), "-initrd", initrd, "-append", kernel_parameters(iommu, verbose=verbose)]
    words += ["-chardev", f"file,id=log,path={log}", "-serial", "chardev:log"]
    words += ["-virtfs", "local,path=/,mount_tag=hostroot,security_model=none,readonly=on,multidevs=remap"]
    for name, descriptor in zip(("stdout", "stderr", "status"), streams, strict=True):
        words += ["-chardev", f"socket,id={name},fd={descriptor}"]
        devices.append(f"virtserialport,chardev={name},name=pyvfio.{name}")
    if machine.devices in DISKS:
        words += _disk_words(disk, DISKS[machine.devices])
    devices += DEVICES[machine.devices]
    for device in devices:
        words += ["-device", device]
    return [*words, *machine.qemu_args]


def _disk_words(file: str, disk: Disk) -> list[str]:
    # Only this machine opens the file, so a lock protects against nobody.
    return [
        *("-object", f"throttle-group,id=pace,x-iops-total={disk.iops}"),
        *("-blockdev", f"driver=file,node-name=file,filename={file},locking=off"),
        *("-blockdev", "driver=throttle,node-name=disk,throttle-group=pace,file=file"),
    ]


def kernel_parameters(iommu: Iommu, *, verbose: bool = False) -> str:
    """Return the kernel's command line. With ``verbose``, the kernel logs all messages, from the first instant."""
    # The timer check sometimes fails on a busy host. panic=-1 reboots at once, and -no-reboot ends QEMU then.
    words = ["console=ttyS0", *(["earlyprintk=ttyS0", "loglevel=8"] if verbose else ["loglevel=5"])]
    words += ["panic=-1", "oops=panic", "iommu=nopt", iommu.parameters]
    words += ["no_timer_check", "tsc=reliable", "nokaslr", "mitigations=off", "audit=0", "cryptomgr.notests"]
    return " ".join(filter(None, words))
