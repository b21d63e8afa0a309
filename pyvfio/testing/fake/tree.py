"""The part of /sys and /dev that VFIO's users look at, as real files and links in a temporary directory."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

from pyvfio.testing.fake.device import FakeDevice, PciDevice
from pyvfio.testing.fake.group import Group, is_vfio_driver
from pyvfio.testing.fake.iommu import IommuModel

_MSI = "0x00000000fee00000 0x00000000feefffff msi\n"
_REAL = ("bind", "unbind", "new_id", "remove_id")


def _remove(root: Path, owner: int) -> None:
    # A forked child has the finalizer too, and the tree belongs to its parent.
    if os.getpid() == owner:
        shutil.rmtree(root, ignore_errors=True)


def _link(where: Path, target: Path) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    where.symlink_to(os.path.relpath(target, where.parent))


class Tree:
    """Directories `sys` and `dev` below a new temporary one, which goes with `remove` or with the object."""

    def __init__(self, groups: Sequence[Group], model: IommuModel) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="pyvfio-fake-"))
        self._finalizer = weakref.finalize(self, _remove, self._root, os.getpid())
        self.sys = self._root / "sys"
        self.dev = self._root / "dev"
        self._unit = self.sys / "devices/virtual/iommu/iommu0"
        self._nodes = {group.number: self.dev / "vfio" / str(group.number) for group in groups}
        self._build(groups, model)

    def remove(self) -> None:
        """Delete it; twice is fine."""
        self._finalizer()

    def _build(self, groups: Sequence[Group], model: IommuModel) -> None:
        (self.dev / "vfio").mkdir(parents=True)
        (self.dev / "vfio/vfio").touch()
        self._unit.mkdir(parents=True)
        _link(self.sys / "class/iommu/iommu0", self._unit)
        for name in ("vfio-pci", "pcieport"):
            self._driver(name)
        for group in groups:
            self._group(group, model)
            for device in group.devices:
                self._device(group.number, device.declared)
                self.bind(group, device)

    def _group(self, group: Group, model: IommuModel) -> None:
        directory = self.sys / f"kernel/iommu_groups/{group.number}"
        (directory / "devices").mkdir(parents=True)
        (directory / "type").write_text("DMA-FQ\n")
        (directory / "reserved_regions").write_text(_MSI if len(model.ranges) > 1 else "")

    def _driver(self, name: str) -> Path:
        directory = self.sys / "bus/pci/drivers" / name
        directory.mkdir(parents=True, exist_ok=True)
        for file in _REAL:
            (directory / file).touch()
        return directory

    def _home(self, bdf: str) -> Path:
        return self.sys / f"devices/pci{bdf.rsplit(':', 1)[0]}" / bdf

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
        for name, text in files.items():
            (home / name).write_text(text)
        (home / "config").write_bytes(device.config_space())
        _link(home / "subsystem", self.sys / "bus/pci")
        _link(home / "iommu", self._unit)
        _link(home / "iommu_group", self.sys / f"kernel/iommu_groups/{group}")
        _link(self.sys / "bus/pci/devices" / device.bdf, home)
        _link(self.sys / f"kernel/iommu_groups/{group}/devices" / device.bdf, home)

    def bind(self, group: Group, device: PciDevice) -> None:
        """Show the driver that `device` has now; the group's node exists while a VFIO driver has one of its devices."""
        home = self._home(device.bdf)
        link = home / "driver"
        if link.is_symlink():
            (link.resolve() / device.bdf).unlink()
            link.unlink()
        if device.driver is not None:
            directory = self._driver(device.driver)
            _link(link, directory)
            _link(directory / device.bdf, home)
        node = self._nodes[group.number]
        if any(is_vfio_driver(each.driver) for each in group.devices):
            node.touch()
        else:
            node.unlink(missing_ok=True)
