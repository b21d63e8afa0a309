"""The part of /sys and /dev that VFIO's users look at, as real files and links in a temporary directory."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from pyvfio.testing.fake.device import FakeDevice, PciDevice, is_vfio_driver
from pyvfio.testing.fake.group import Group
from pyvfio.testing.fake.iommu import IommuModel

_MSI = b"0x00000000fee00000 0x00000000feefffff msi\n"
_MEMORY = "/dev/shm"  # noqa: S108 (a directory of one's own in it)
_UNIT = "devices/virtual/iommu/iommu0"
_REAL = ("bind", "unbind", "new_id", "remove_id")


def _remove(root: Path, owner: int) -> None:
    # A forked child has the finalizer too, and the tree belongs to its parent.
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            _empty(str(root))


# Each test makes a fake, and this can be most of its time: pathlib, shutil and relpath cost three times as much.


def _empty(directory: str) -> None:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _empty(entry.path)
            else:
                os.unlink(entry.path)
    os.rmdir(directory)


def _make(directory: str) -> None:
    try:
        os.mkdir(directory)
    except FileNotFoundError:
        _make(directory[: directory.rindex("/")])
        os.mkdir(directory)
    except FileExistsError:
        pass


def _fill(directory: str, files: Mapping[str, bytes | bytearray]) -> None:
    for name, data in files.items():
        fd = os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        if data:
            os.write(fd, data)
        os.close(fd)


def _has_node(group: Group) -> bool:
    return any(is_vfio_driver(each.driver) for each in group.devices)


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
        self._built = False
        (self.dev / "vfio").mkdir(parents=True)
        (self.dev / "vfio/vfio").touch()
        for group in groups:
            self._show_node(group)

    @property
    def sys(self) -> Path:
        """Its sysfs."""
        if not self._built:
            self._build()
            self._built = True
        return self._sys

    def remove(self) -> None:
        """Delete it; twice is fine."""
        self._finalizer()

    def _build(self) -> None:
        self._directory(_UNIT)
        self._directory("bus/pci/devices")
        for name in ("class/iommu", "class/vfio", "class/misc"):
            self._directory(name)
        self._class_node("misc", "vfio", b"10:196\n")
        self._link("class/iommu/iommu0", _UNIT)
        for name in ("vfio-pci", "pcieport"):
            self._driver(name)
        for group in self._groups:
            self._group(group, self._model)
            self._show_group(group)
            for device in group.devices:
                self._device(group.number, device.declared)
                self._show_driver(device)
            self._functions(group)

    def _functions(self, group: Group) -> None:
        """Show how many virtual functions each physical one has."""
        virtual = [device.declared.pf for each in self._groups for device in each.devices]
        for device in group.devices:
            if device.declared.sriov:
                count = f"{virtual.count(device.bdf)}\n".encode()
                _fill(f"{self._sys}/{self._home(device.bdf)}", {"sriov_totalvfs": count, "sriov_numvfs": count})

    def _group(self, group: Group, model: IommuModel) -> None:
        name = f"kernel/iommu_groups/{group.number}"
        self._directory(f"{name}/devices")
        _fill(f"{self._sys}/{name}", {"type": b"DMA-FQ\n", "reserved_regions": _MSI if len(model.ranges) > 1 else b""})

    # Names below are relative to `sys`.

    def _directory(self, name: str) -> str:
        directory = f"{self._sys}/{name}"
        _make(directory)
        return directory

    def _link(self, name: str, target: str) -> None:
        os.symlink("../" * name.count("/") + target, f"{self._sys}/{name}")

    def _class_node(self, kind: str, name: str, number: bytes) -> None:
        home = f"devices/virtual/{kind}/{name}"
        _fill(self._directory(home), {"dev": number})
        self._link(f"class/{kind}/{name}", home)

    def _show_group(self, group: Group) -> None:
        """The kernel's own record of the group's node."""
        link = f"{self._sys}/class/vfio/{group.number}"
        if _has_node(group) and not os.path.islink(link):
            self._class_node("vfio", str(group.number), f"511:{group.number}\n".encode())
        elif not _has_node(group) and os.path.islink(link):
            os.unlink(link)

    def _driver(self, driver: str) -> str:
        name = f"bus/pci/drivers/{driver}"
        if not os.path.exists(f"{self._sys}/{name}"):
            _fill(self._directory(name), dict.fromkeys(_REAL, b""))
        return name

    @staticmethod
    def _home(bdf: str) -> str:
        return f"devices/pci{bdf.rsplit(':', 1)[0]}/{bdf}"

    def _device(self, group: int, device: FakeDevice) -> None:
        home = self._home(device.bdf)
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
            **({"sriov_totalvfs": "0\n", "sriov_numvfs": "0\n"} if device.sriov else {}),
        }
        texts = {name: text.encode() for name, text in files.items()}
        _fill(self._directory(home), texts | {"config": device.config_space()})
        self._link(f"{home}/subsystem", "bus/pci")
        self._link(f"{home}/iommu", _UNIT)
        self._link(f"{home}/iommu_group", f"kernel/iommu_groups/{group}")
        self._link(f"bus/pci/devices/{device.bdf}", home)
        self._link(f"kernel/iommu_groups/{group}/devices/{device.bdf}", home)
        if device.pf is not None:
            self._link(f"{home}/physfn", self._home(device.pf))

    def bind(self, group: Group, device: PciDevice) -> None:
        """Show the driver that `device` has now; the group's node exists while a VFIO driver has one of its devices."""
        self._show_node(group)
        if self._built:
            self._show_group(group)
            self._show_driver(device)

    def _show_node(self, group: Group) -> None:
        node = self.dev / "vfio" / str(group.number)
        if _has_node(group):
            node.touch()
        else:
            node.unlink(missing_ok=True)

    def _show_driver(self, device: PciDevice) -> None:
        home = self._home(device.bdf)
        link = f"{self._sys}/{home}/driver"
        if os.path.islink(link):
            os.unlink(f"{link}/{device.bdf}")
            os.unlink(link)
        if device.driver is not None:
            name = self._driver(device.driver)
            self._link(f"{home}/driver", name)
            self._link(f"{name}/{device.bdf}", home)
