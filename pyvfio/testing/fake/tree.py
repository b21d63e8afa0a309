"""The part of /sys and /dev that VFIO's users look at, as real files and links in a temporary directory."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyvfio.testing.fake.device import FakeDevice, PciDevice, is_vfio_driver
from pyvfio.testing.fake.group import Group
from pyvfio.testing.fake.iommu import IommuModel

_MSI = b"0x00000000fee00000 0x00000000feefffff msi\n"
_MEMORY = "/dev/shm"  # noqa: S108 (a directory of one's own in it)
_REAL = ("bind", "unbind", "new_id", "remove_id")


def _remove(root: Path, owner: int) -> None:
    # A forked child has the finalizer too, and the tree belongs to its parent.
    if os.getpid() == owner:
        shutil.rmtree(root, ignore_errors=True)


def _link(where: Path, target: Path) -> None:
    os.makedirs(where.parent, exist_ok=True)
    os.symlink(os.path.relpath(target, where.parent), where)


def _fill(directory: Path, files: Mapping[str, bytes | bytearray]) -> None:
    # By hand, since most of a test's time can go into it: a fake is made for each.
    for name, data in files.items():
        fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        if data:
            os.write(fd, data)
        os.close(fd)


class Tree:
    """Directories `sys` and `dev` below a new temporary one, which goes with `remove` or with the object.

    `sys` is made when it is first asked for: most tests know their device, and look at no more than its node. In
    memory where the machine has a file system there, for a test's sake: on a disk it costs as much as the test.
    """

    def __init__(self, groups: Sequence[Group], model: IommuModel) -> None:
        self._groups = groups
        self._model = model
        self._root = Path(tempfile.mkdtemp(prefix="pyvfio-fake-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))
        self._finalizer = weakref.finalize(self, _remove, self._root, os.getpid())
        self.dev = self._root / "dev"
        self._sys = self._root / "sys"
        self._unit = self._sys / "devices/virtual/iommu/iommu0"
        (self.dev / "vfio").mkdir(parents=True)
        (self.dev / "vfio/vfio").touch()
        for group in groups:
            self._show_node(group)

    @property
    def sys(self) -> Path:
        """Its sysfs."""
        if not self._sys.exists():
            self._build()
        return self._sys

    def remove(self) -> None:
        """Delete it; twice is fine."""
        self._finalizer()

    def _build(self) -> None:
        self._unit.mkdir(parents=True)
        _link(self._sys / "class/iommu/iommu0", self._unit)
        for name in ("vfio-pci", "pcieport"):
            self._driver(name)
        for group in self._groups:
            self._group(group, self._model)
            for device in group.devices:
                self._device(group.number, device.declared)
                self._show_driver(device)

    def _group(self, group: Group, model: IommuModel) -> None:
        directory = self._sys / f"kernel/iommu_groups/{group.number}"
        (directory / "devices").mkdir(parents=True)
        _fill(directory, {"type": b"DMA-FQ\n", "reserved_regions": _MSI if len(model.ranges) > 1 else b""})

    def _driver(self, name: str) -> Path:
        directory = self._sys / "bus/pci/drivers" / name
        if not directory.exists():
            directory.mkdir(parents=True)
            _fill(directory, dict.fromkeys(_REAL, b""))
        return directory

    def _home(self, bdf: str) -> Path:
        return self._sys / f"devices/pci{bdf.rsplit(':', 1)[0]}" / bdf

    def _device(self, group: int, device: FakeDevice) -> None:
        home = self._home(device.bdf)
        home.mkdir(parents=True)
        files = {
            "vendor": f"{device.vendor:#06x}\n",
            "device": f"{device.device:#06x}\n",
            "subsystem_vendor": "0x0000\n",
            "subsystem_device": "0x0000\n",
            "revision": "0x00\n",
            "class": f"{device.class_code:#08x}\n",
            "numa_node": f"{device.numa_node}\n",
            "driver_override": "(null)\n",
            "enable": "0\n",
            "uevent": f"PCI_ID={device.vendor:04X}:{device.device:04X}\nPCI_SLOT_NAME={device.bdf}\n",
            **({"reset": ""} if device.resettable else {}),
        }
        _fill(home, {name: text.encode() for name, text in files.items()} | {"config": device.config_space()})
        _link(home / "subsystem", self._sys / "bus/pci")
        _link(home / "iommu", self._unit)
        _link(home / "iommu_group", self._sys / f"kernel/iommu_groups/{group}")
        _link(self._sys / "bus/pci/devices" / device.bdf, home)
        _link(self._sys / f"kernel/iommu_groups/{group}/devices" / device.bdf, home)

    def bind(self, group: Group, device: PciDevice) -> None:
        """Show the driver that `device` has now; the group's node exists while a VFIO driver has one of its devices."""
        self._show_node(group)
        if self._sys.exists():
            self._show_driver(device)

    def _show_node(self, group: Group) -> None:
        node = self.dev / "vfio" / str(group.number)
        if any(is_vfio_driver(each.driver) for each in group.devices):
            node.touch()
        else:
            node.unlink(missing_ok=True)

    def _show_driver(self, device: PciDevice) -> None:
        home = self._home(device.bdf)
        link = home / "driver"
        if link.is_symlink():
            (link.resolve() / device.bdf).unlink()
            link.unlink()
        if device.driver is not None:
            directory = self._driver(device.driver)
            _link(link, directory)
            _link(directory / device.bdf, home)
