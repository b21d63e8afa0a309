"""A tree that looks like sysfs, and what the kernel does when its files are written.

A plain directory does not react to writes, so `SysfsTree.write` is handed to pyvfio.pci in the place of `write_sysfs`:
it does to the tree what drivers/base/bus.c and drivers/pci/pci-sysfs.c do to sysfs, keeps a list of all writes, and can
be told to fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from pyvfio.kernel import LinuxKernel

NETWORK, DISK, BRIDGE, HOST_BRIDGE, ISA_BRIDGE = 0x020000, 0x010802, 0x060400, 0x060000, 0x060100


class SysfsTree:
    """Devices, drivers and groups below a directory. `kernel` is the real one with its roots there."""

    def __init__(self, root: Path) -> None:
        self.sysfs, self.dev, self.proc = root / "sys", root / "dev", root / "proc"
        self.kernel = LinuxKernel(sysfs=self.sysfs, dev=self.dev, proc=self.proc)
        self.writes: list[tuple[str, str]] = []
        self.fail: Callable[[str, str], OSError | None] = lambda _path, _value: None
        self.unwilling: set[str] = set()
        """Drivers whose probe fails."""
        self.probes_ignored = 0
        """How many writes to drivers_probe to come do nothing."""
        self._matches: dict[str, str] = {}
        self._late: dict[str, int] = {}
        for place in (self.pci / "devices", self.pci / "drivers", self.dev / "vfio", self.proc / "self"):
            os.makedirs(place)
        (self.pci / "drivers_probe").touch()
        self.add_driver("vfio-pci")

    def use_real_proc(self) -> None:
        """The processes are this machine's, this one among them."""
        self.proc = Path("/proc")
        self.kernel = LinuxKernel(sysfs=self.sysfs, dev=self.dev, proc=self.proc)

    @property
    def pci(self) -> Path:
        return self.sysfs / "bus/pci"

    def add_driver(self, name: str) -> None:
        directory = self.pci / "drivers" / name
        make_directory(str(directory))
        (directory / "bind").touch()
        (directory / "unbind").touch()

    def add_device(
        self,
        bdf: str,
        *,
        driver: str | None = None,
        matches: str | None = None,
        group: int | None = None,
        class_code: int = NETWORK,
        override: str | None = None,
        numa_node: int = -1,
        device_id: int = 0x10D3,
        late_group: int | None = None,
        behind: str | None = None,
    ) -> Path:
        """A device that has `driver`, and that `matches` (by default the same) takes when nothing overrides it. It gets
        its `late_group` when a driver probes it. `behind`: the bridge whose secondary bus it is on."""
        bus = self.sysfs / f"devices/pci{bdf[:7]}" if behind is None else (self.pci / "devices" / behind).resolve()
        directory = bus / bdf
        directory.mkdir(parents=True)
        files = {
            "vendor": "0x8086",
            "device": f"{device_id:#06x}",
            "class": f"{class_code:#08x}",
            "numa_node": str(numa_node),
            "driver_override": override or "(null)",
        }
        for name, content in files.items():
            write_file(f"{directory}/{name}", content + "\n")
        link(self.pci / "devices" / bdf, directory)
        if group is not None:
            self._join(bdf, group)
        if late_group is not None:
            self._late[bdf] = late_group
        own = matches or driver
        if own is not None:
            self.add_driver(own)
            self._matches[bdf] = own
        if driver is not None:
            self.add_driver(driver)
            self._attach(bdf, driver)
        return directory

    def add_interface(self, bdf: str, name: str, *, up: bool) -> None:
        """A network interface, below a virtio device as virtio-net has it."""
        directory = (self.pci / "devices" / bdf).resolve() / "virtio0/net" / name
        directory.mkdir(parents=True)
        (directory / "flags").write_text("0x1003\n" if up else "0x1002\n")
        (directory / "operstate").write_text("unknown\n")
        link(self.sysfs / "class/net" / name, directory)

    def add_disk(self, directory: Path, name: str, number: str) -> Path:
        """A block device in `directory`, with a node: a file, which O_EXCL opens as it does a disk that is free."""
        disk = directory / name
        (disk / "holders").mkdir(parents=True)
        (disk / "dev").write_text(number + "\n")
        (self.dev / name).touch()
        link(self.sysfs / "class/block" / name, disk)
        return disk

    def add_group_node(self, group: int) -> Path:
        node = self.dev / "vfio" / str(group)
        node.touch()
        return node

    def add_cdev(self, bdf: str, name: str, *, node: bool = True) -> Path:
        """Give a bound device a node of its own, as kernels with CONFIG_VFIO_DEVICE_CDEV do, and the machine iommufd.

        Other kernels have the directory, without `dev`. `node`: this /dev has the nodes."""
        number = int(name.removeprefix("vfio"))
        place = (self.pci / "devices" / bdf).resolve() / "vfio-dev" / name
        place.mkdir(parents=True)
        (place / "dev").write_text(f"243:{number}\n")
        link(self.sysfs / "class/vfio-dev" / name, place)
        self.add_iommufd(node=node)
        path = self.dev / "vfio/devices" / name
        if node:
            path.parent.mkdir(exist_ok=True)
            path.touch(0o600)
        return path

    def add_iommufd(self, *, node: bool = True) -> Path:
        """Load iommufd."""
        directory = self.sysfs / "class/misc/iommu"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "dev").write_text("10:260\n")
        parameters = self.sysfs / "module/iommufd/parameters"
        parameters.mkdir(parents=True, exist_ok=True)
        (parameters / "allow_unsafe_interrupts").write_text("N\n")
        path = self.dev / "iommu"
        if node and not path.exists():
            path.touch()
            path.chmod(0o660)
        return path

    def place_holder(self, pid: int, node: Path, command: str = "qemu") -> None:
        """Let a process of this procfs have a node open."""
        directory = self.proc / str(pid) / "fd"
        directory.mkdir(parents=True, exist_ok=True)
        (self.proc / str(pid) / "comm").write_text(command + "\n")
        (directory / "3").symlink_to(node)

    def driver_of(self, bdf: str) -> str | None:
        place = self.pci / "devices" / bdf / "driver"
        return os.readlink(place).rpartition("/")[2] if place.is_symlink() else None

    def override_of(self, bdf: str) -> str | None:
        text = (self.pci / "devices" / bdf / "driver_override").read_text().strip()
        return None if text == "(null)" else text

    def write(self, path: Path, value: str) -> None:
        """What the kernel does when `value` is written to a file of the tree."""
        name = str(path.relative_to(self.sysfs))
        self.writes.append((name, value))
        failure = self.fail(name, value)
        if failure is not None:
            raise failure
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        word = value.removesuffix("\n")
        if path.name == "driver_override":
            path.write_text((word or "(null)") + "\n")
        elif path.name == "drivers_probe":
            self._probe(word)
        elif path.name == "unbind":
            self._detach(word, path.parent.name)
        elif path.name == "bind":
            self._bind(word, path.parent.name)

    def _probe(self, bdf: str) -> None:
        wanted = self.override_of(bdf) or self._matches.get(bdf)
        if self.probes_ignored:
            self.probes_ignored -= 1
        elif self.driver_of(bdf) is None and wanted and (self.pci / "drivers" / wanted).is_dir():
            self._attach(bdf, wanted)

    def _bind(self, bdf: str, driver: str) -> None:
        if self.driver_of(bdf) is not None or (self.override_of(bdf) or self._matches.get(bdf)) != driver:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self._attach(bdf, driver)

    def _join(self, bdf: str, group: int) -> None:
        directory = (self.pci / "devices" / bdf).resolve()
        members = self.sysfs / "kernel/iommu_groups" / str(group) / "devices"
        members.mkdir(parents=True, exist_ok=True)
        link(members / bdf, directory)
        link(directory / "iommu_group", members.parent)

    def _attach(self, bdf: str, driver: str) -> None:
        if bdf in self._late:  # pci_dma_configure, before probe
            self._join(bdf, self._late.pop(bdf))
        grouped = (self.pci / "devices" / bdf / "iommu_group").is_symlink()
        unsafe = (self.sysfs / "module/vfio/parameters/enable_unsafe_noiommu_mode").exists()
        if driver == "vfio-pci" and not grouped and not unsafe:
            return  # vfio_group_find_or_alloc: EINVAL
        if driver not in self.unwilling:
            link(self.pci / "devices" / bdf / "driver", self.pci / "drivers" / driver)

    def _detach(self, bdf: str, driver: str) -> None:
        if self.driver_of(bdf) != driver:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        (self.pci / "devices" / bdf / "driver").unlink()


# Each test makes a tree, which can be most of its time: pathlib takes twice as long.


def write_file(name: str, text: str) -> None:
    """A file with that text."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def make_directory(name: str) -> None:
    """A directory, and those above, unless it is there."""
    if not os.path.isdir(name):
        os.makedirs(name, exist_ok=True)


def link(place: Path, target: Path) -> None:
    """A relative symbolic link, as sysfs has them."""
    above = str(place.parent)
    make_directory(above)
    os.symlink(os.path.relpath(target, os.path.realpath(above)), place)


def place_process(
    proc: Path,
    *,
    user: int = 0,
    container: bool = False,
    cgroup: str = "0::/",
    environ: str = "",
    uid_map: str = "0 0 4294967295",
) -> None:
    """Let a procfs say who this process is, and where it runs."""
    own = proc / "self"
    (own / "root").mkdir(parents=True, exist_ok=True)
    if container:
        (own / "root/.dockerenv").touch()
    (own / "status").write_text(f"Name:\tpython\nUid:\t1\t{user}\t1\t1\nGroups:\t{user} 27 \n")
    (own / "cgroup").write_text(cgroup + "\n")
    (own / "environ").write_text(environ)
    (own / "uid_map").write_text(uid_map + "\n")
