"""Machines of several shapes, each a tree of sysfs, procfs and the distribution's files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pyvfio.findings import Finding
from pyvfio.kernel import Kernel
from tests.unit.fakes import PlacedKernel
from tests.unit.sysfs import BRIDGE, DISK, NETWORK, SysfsTree, link, make_directory, place_process, write_file

NIC, SOUND, SSD, PORT = "0000:01:00.0", "0000:00:1f.3", "0000:02:00.0", "0000:00:1c.0"
RELEASE = "6.12.9-amd64"
INTEL, AMD = "vendor_id\t: GenuineIntel\n", "vendor_id\t: AuthenticAMD\n"
BARE, VIRTUAL = "flags\t\t: fpu vmx lahf_lm\n", "flags\t\t: fpu hypervisor lahf_lm\n"
DRIVERS = ("vfio.ko", "vfio_iommu_type1.ko", "pci/vfio-pci-core.ko", "pci/vfio-pci.ko")
REMAPPED = "  0:   9   IR-IO-APIC   2-edge   timer\n 24:   7   IR-PCI-MSI-0000:01:00.0   0-edge   eth0\n"
PLAIN = "  0:   9   IO-APIC   2-edge   timer\n 24:   7   PCI-MSI-0000:01:00.0   0-edge   eth0\n"


def told(found: Sequence[Finding]) -> list[tuple[str, str]]:
    """The status and the summary of each finding."""
    return [(each.status, each.summary) for each in found]


def texts(found: Sequence[Finding]) -> list[str]:
    """All commands of findings."""
    return [command.text for each in found for command in each.commands]


@contextmanager
def program_of_root(proc: Path) -> Iterator[PlacedKernel]:
    """A fake kernel whose program is root, in no container and no service. The program closes all descriptors."""
    place_process(proc)
    with PlacedKernel() as kernel:
        kernel.own_proc = proc
        yield kernel
        assert kernel.descriptors == ()


class KernelOnTree(PlacedKernel):
    """A fake kernel, which has the nodes of VFIO, on a tree's sysfs and procfs."""

    def __init__(self, tree: MachineTree) -> None:
        self._sysfs, self.own_proc = tree.sysfs, tree.proc
        super().__init__()

    @property
    def sysfs(self) -> Path:
        """The tree's."""
        return self._sysfs


class MachineTree(SysfsTree):
    """A machine whose processes' root is `root`: Debian with GRUB, and a kernel with VFIO's modules, none loaded."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.machine: Kernel = self.kernel
        """The kernel to examine."""
        (self.pci / "drivers/vfio-pci/bind").unlink()
        (self.pci / "drivers/vfio-pci/unbind").unlink()
        (self.pci / "drivers/vfio-pci").rmdir()
        place_process(self.proc)
        self.root = self.proc / "self/root"
        self.put("proc/sys/kernel/osrelease", RELEASE + "\n")
        self.put("proc/sys/kernel/hostname", "box\n")
        self.put("proc/cpuinfo", INTEL + BARE)
        self.put("proc/interrupts", PLAIN)
        self.cmdline("quiet")
        self.file("etc/os-release", "ID=debian\n")
        self.file("etc/default/grub", 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\n')
        self.put("proc/meminfo", "MemTotal:  1024 kB\nSwapFree:  512 kB\n")
        self.put("proc/swaps", "Filename Type Size Used Priority\n/dev/sda2 partition 512 0 -2\n")
        self.put("proc/sys/vm/overcommit_memory", "0\n")
        self.put("proc/sys/vm/max_map_count", "65530\n")
        self.put("sys/fs/cgroup/memory.max", "1073741824\n")
        self.put("sys/fs/cgroup/memory.current", "4096\n")
        self.put("sys/fs/cgroup/memory.stat", "active_file 4096\ninactive_file 4096\nslab_reclaimable 0\n")
        self.put("sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages", "0\n")
        self.put("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "0\n")
        for program in ("usr/sbin/update-grub", "usr/sbin/modprobe", "etc/modules-load.d/.keep"):
            self.file(program, "")
        lines = "".join(f"kernel/drivers/vfio/{driver}: kernel/other.ko\n" for driver in DRIVERS)
        self.file(f"lib/modules/{RELEASE}/modules.dep", lines)
        self.file(f"lib/modules/{RELEASE}/modules.builtin", "kernel/drivers/iommu/iommu.ko\n")

    def put(self, name: str, text: str) -> None:
        """Write a file below the parent of sys, dev and proc."""
        path = f"{self.sysfs.parent}/{name}"
        make_directory(os.path.dirname(path))
        write_file(path, text)

    def file(self, name: str, text: str) -> None:
        """Write a file of the distribution, named from the root."""
        self.put("/".join(("proc/self/root", name)), text)

    def cmdline(self, words: str) -> None:
        """Give the kernel a command line."""
        self.put("proc/cmdline", f"BOOT_IMAGE=/vmlinuz root=/dev/sda1 {words}\n")

    def tables(self, *names: str) -> None:
        """Give the firmware ACPI tables."""
        for name in ("FACP", "APIC", *names):
            self.put(f"sys/firmware/acpi/tables/{name}", "")

    def load_vfio(self) -> None:
        """Load VFIO's modules; the node of containers is not made."""
        self.add_driver("vfio-pci")
        for name in ("vfio", "vfio_pci", "vfio_iommu_type1"):
            (self.sysfs / "module" / name).mkdir(parents=True)
        self.put("sys/module/vfio_iommu_type1/parameters/dma_entry_limit", "65535\n")
        self.put("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N\n")
        self.put("sys/class/misc/vfio/dev", "10:196\n")

    def add_node(self) -> None:
        """Give the machine a node of containers, with type1 behind it."""
        self.machine = KernelOnTree(self)

    def use_iommu(self, *units: str, remapped: bool = True) -> None:
        """Let the kernel use IOMMUs."""
        for unit in units:
            (self.sysfs / "class/iommu" / unit).mkdir(parents=True)
        self.put("proc/interrupts", REMAPPED if remapped else PLAIN)


def intel_off(tree: MachineTree) -> None:
    """An Intel server whose kernel was told not to use the IOMMU."""
    tree.tables("DMAR")
    tree.cmdline("quiet intel_iommu=off,sm_on")
    tree.add_device(NIC, driver="e1000e")


def intel_default(tree: MachineTree) -> None:
    """A laptop whose kernel uses no Intel IOMMU unless it is told to."""
    tree.tables("DMAR")
    tree.file(f"boot/config-{RELEASE}", "CONFIG_INTEL_IOMMU=y\n# CONFIG_INTEL_IOMMU_DEFAULT_ON is not set\n")
    tree.add_device(NIC, driver="iwlwifi")


def amd_off(tree: MachineTree) -> None:
    """An AMD workstation whose kernel was told not to use the IOMMU, on Fedora."""
    tree.tables("IVRS")
    tree.put("proc/cpuinfo", AMD + BARE)
    tree.cmdline("rhgb amd_iommu=off")
    tree.file("etc/os-release", "ID=fedora\n")
    tree.file("usr/sbin/grubby", "")
    tree.add_device(NIC, driver="igb")


def all_off(tree: MachineTree) -> None:
    """An Intel machine with no IOMMU for any maker's."""
    tree.tables("DMAR")
    tree.cmdline("intel_iommu=on iommu=off")
    tree.add_device(NIC, driver="e1000e")


def no_table(tree: MachineTree) -> None:
    """A machine whose firmware has the IOMMU off."""
    tree.tables()
    tree.add_device(NIC, driver="e1000e")


def firmware_and_line(tree: MachineTree) -> None:
    """The firmware has the IOMMU off, and the kernel was told not to use one, either."""
    tree.tables()
    tree.cmdline("intel_iommu=off")
    tree.add_device(NIC, driver="e1000e")


def virtual_without(tree: MachineTree) -> None:
    """A virtual machine without an IOMMU."""
    tree.tables()
    tree.put("proc/cpuinfo", AMD + VIRTUAL)
    tree.add_device(NIC, driver="virtio-pci")


def virtual_late(tree: MachineTree) -> None:
    """A virtual machine with virtio-iommu, which makes the group of a device when a driver is first bound to it."""
    tree.tables("VIOT")
    tree.put("proc/cpuinfo", INTEL + VIRTUAL)
    tree.load_vfio()
    tree.add_node()
    tree.add_device(PORT, driver="pcieport", group=0, class_code=BRIDGE)
    tree.add_device(NIC, matches="e1000e", late_group=4)
    tree.use_iommu("0000:00:03.0", remapped=False)


def virtual_early(tree: MachineTree) -> None:
    """The same machine where the driver of virtio-iommu was not in the initramfs."""
    tree.tables("VIOT")
    tree.put("proc/cpuinfo", INTEL + VIRTUAL)
    tree.file("etc/initramfs-tools/modules", "")
    tree.file("usr/sbin/update-initramfs", "")
    tree.add_device(NIC, driver="e1000e")


def acs_trouble(tree: MachineTree) -> None:
    """A server whose root port has no ACS: a disk in use, a sound card and a bridge are in the card's group."""
    tree.tables("DMAR")
    tree.load_vfio()
    tree.add_node()
    tree.add_device(PORT, driver="pcieport", group=7, class_code=BRIDGE)
    tree.add_device(NIC, driver="e1000e", group=7, class_code=NETWORK)
    tree.add_interface(NIC, "eth0", up=True)
    directory = tree.add_device(SSD, driver="nvme", group=7, class_code=DISK)
    tree.add_disk(directory / "nvme/nvme0", "nvme0n1", "259:0")
    tree.put("proc/self/mountinfo", "36 25 259:0 / /data rw - ext4 /dev/nvme0n1 rw\n")
    tree.add_device(SOUND, driver="snd_hda_intel", group=7)
    tree.use_iommu("dmar0", "dmar1")


def in_container(tree: MachineTree) -> None:
    """A container that was not given the nodes of VFIO; the device is bound, on the host."""
    tree.tables("DMAR")
    tree.load_vfio()
    tree.add_device(NIC, driver="vfio-pci", matches="e1000e", override="vfio-pci", group=7)
    tree.put("sys/class/vfio/7/dev", "243:0\n")
    place_process(tree.proc, container=True)
    tree.use_iommu("dmar0")


def plain_root(tree: MachineTree) -> None:
    """A chroot, whose /dev has no node of VFIO."""
    in_container(tree)
    (tree.root / ".dockerenv").unlink()


def arm_server(tree: MachineTree) -> None:
    """An arm64 server whose firmware has an IORT, and whose device's group comes with its first driver."""
    tree.tables("IORT")
    tree.put("proc/cpuinfo", "processor\t: 0\nCPU implementer\t: 0x41\n")
    tree.load_vfio()
    tree.add_node()
    tree.add_device(PORT, driver="pcieport", group=0, class_code=BRIDGE)
    tree.add_device(NIC, matches="mlx5_core", late_group=12)
    tree.use_iommu("smmu3.0x000000002b400000")
    tree.put("proc/interrupts", " 13:  5   ITS-MSI 524288 Edge  nvme0q0\n")


def after_update(tree: MachineTree) -> None:
    """A machine that has not been booted since its kernel was updated."""
    tree.tables("IVRS")
    tree.put("proc/sys/kernel/osrelease", "6.12.8-amd64\n")
    tree.add_device(NIC, driver="e1000e", group=3)
    tree.use_iommu("ivhd0")


def not_loaded(tree: MachineTree) -> None:
    """A machine with everything, whose modules are not loaded, and one of them diverted."""
    tree.tables("DMAR")
    tree.file("etc/modprobe.d/harden.conf", "# no DMA\ninstall vfio-pci /bin/false\nblacklist e1000e\n")
    tree.add_device(NIC, driver="e1000e", group=3)
    tree.use_iommu("dmar0")


def small_cloud(tree: MachineTree) -> None:
    """A cloud's kernel, which comes without VFIO's modules, on Ubuntu."""
    tree.tables("DMAR")
    tree.file("etc/os-release", 'NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n')
    tree.file(f"lib/modules/{RELEASE}/modules.dep", "kernel/drivers/net/e1000e.ko:\n")
    tree.add_device(NIC, driver="e1000e", group=3)
    tree.use_iommu("dmar0")


def without_groups(tree: MachineTree) -> None:
    """A kernel that was built for iommufd alone."""
    tree.tables("DMAR")
    tree.load_vfio()
    tree.file(f"boot/config-{RELEASE}", "CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\n# CONFIG_VFIO_GROUP is not set\n")
    tree.add_device(NIC, driver="vfio-pci", group=3)
    tree.use_iommu("dmar0")


def iommufd_alone(tree: MachineTree) -> None:
    """A kernel with iommufd and no type1. Another process has the device open, and nothing else is wrong."""
    tree.tables("DMAR")
    tree.load_vfio()
    for name in ("class/misc/vfio/dev", "module/vfio_iommu_type1/parameters/dma_entry_limit"):
        (tree.sysfs / name).unlink()
    (tree.sysfs / "class/misc/vfio").rmdir()
    words = "CONFIG_VFIO=m\nCONFIG_VFIO_PCI=m\nCONFIG_IOMMUFD=m\nCONFIG_VFIO_DEVICE_CDEV=y\n"
    off = "".join(f"# CONFIG_{name} is not set\n" for name in ("VFIO_GROUP", "VFIO_CONTAINER", "VFIO_IOMMU_TYPE1"))
    tree.file(f"boot/config-{RELEASE}", words + off)
    tree.add_device(NIC, driver="vfio-pci", matches="e1000e", group=3)
    tree.use_iommu("dmar0")
    tree.place_holder(41, tree.add_cdev(NIC, "vfio0"))


def forgeable_iommufd(tree: MachineTree) -> None:
    """The same kernel with an IOMMU that remaps no interrupts. No process has the device open."""
    iommufd_alone(tree)
    (tree.proc / "41/fd/3").unlink()
    tree.put("proc/interrupts", PLAIN)
    tree.put("proc/cpuinfo", AMD + VIRTUAL)


def forgeable(tree: MachineTree) -> None:
    """An IOMMU that remaps no interrupts, as QEMU's for AMD."""
    tree.tables("IVRS")
    tree.put("proc/cpuinfo", AMD + VIRTUAL)
    tree.load_vfio()
    tree.add_node()
    tree.add_device(NIC, matches="e1000e", group=3)
    tree.use_iommu("ivhd0", remapped=False)


def virtual_function(tree: MachineTree) -> None:
    """A virtual function whose physical one is bound to VFIO too."""
    tree.tables("DMAR")
    tree.load_vfio()
    tree.add_node()
    physical = tree.add_device(SSD, driver="vfio-pci", group=4)
    directory = tree.add_device(NIC, group=3)
    link(directory / "physfn", physical)
    (directory / "reset_method").write_text("flr bus\n")
    tree.use_iommu("dmar0")


MACHINES = (
    intel_off,
    intel_default,
    amd_off,
    all_off,
    no_table,
    firmware_and_line,
    virtual_without,
    virtual_late,
    virtual_early,
    acs_trouble,
    in_container,
    plain_root,
    arm_server,
    after_update,
    not_loaded,
    small_cloud,
    without_groups,
    iommufd_alone,
    forgeable_iommufd,
    forgeable,
    virtual_function,
)
