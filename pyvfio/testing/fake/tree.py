"""The part of /sys and /dev that users of VFIO read, as real files and links in a temporary directory."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pyvfio.testing.fake.device import FakeDevice, PciDevice, is_vfio_driver
from pyvfio.testing.fake.group import Group
from pyvfio.testing.fake.iommu import IommuModel
from pyvfio.testing.fake.noiommu import PARAMETERS, NoIommu

_MSI = b"0x00000000fee00000 0x00000000feefffff msi\n"
_MEMORY = "/dev/shm"  # noqa: S108 (a new directory is made there)
_UNIT = "devices/virtual/iommu/iommu0"
_PARAMETERS = "module/iommufd/parameters"
_REAL = ("bind", "unbind", "new_id", "remove_id")


def _remove(root: Path, owner: int) -> None:
    # A forked child has the finalizer too, but the tree belongs to the parent.
    if os.getpid() == owner:
        with contextlib.suppress(OSError):
            _empty(str(root))


# Each test makes a fake, and this code can be most of the time of the test: pathlib, shutil and relpath take three
# times as long.


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


class Nodes(Protocol):
    """The machine whose devices and nodes are shown."""

    @property
    def iommu(self) -> IommuModel:
        """The IOMMU in front of all devices."""
        ...

    @property
    def groups(self) -> Mapping[int, Group]:
        """The groups, by number."""
        ...

    @property
    def places(self) -> Mapping[int, tuple[Group, PciDevice]]:
        """The group and the device behind each device node, by the number of the node."""
        ...

    @property
    def has_groups(self) -> bool:
        """Whether there are containers and nodes of groups."""
        ...

    @property
    def has_device_nodes(self) -> bool:
        """Whether there are iommufd and device nodes."""
        ...

    @property
    def shows_device_nodes(self) -> bool:
        """Whether devices have nodes of their own."""
        ...

    @property
    def device_prefix(self) -> str:
        """The name of the node of a device, without the number."""
        ...

    @property
    def noiommu(self) -> NoIommu | None:
        """No-IOMMU mode of a machine without an IOMMU."""
        ...

    @property
    def allow_unsafe_interrupts(self) -> bool:
        """The module parameter of iommufd."""
        ...


class Tree:
    """The directories `sys` and `dev` below a new temporary directory, which `remove` or the finalizer deletes.

    `sys` is made at the first access: most tests know the device, and use only the device node. The tree is in memory
    if the machine has such a file system: on a disk, the tree takes as long as the test.
    """

    def __init__(self, machine: Nodes) -> None:
        self._machine = machine
        self._groups = tuple(machine.groups.values())
        self._root = Path(tempfile.mkdtemp(prefix="pyvfio-fake-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))
        self._finalizer = weakref.finalize(self, _remove, self._root, os.getpid())
        self.dev = self._root / "dev"
        self._sys = self._root / "sys"
        self._built = False
        (self.dev / "vfio").mkdir(parents=True)
        if machine.has_groups:
            (self.dev / "vfio/vfio").touch(0o666)
        if machine.has_device_nodes:
            (self.dev / "iommu").touch(0o660)
        if machine.shows_device_nodes:
            (self.dev / "vfio/devices").mkdir()
        for group in self._groups:
            self._show_node(group)
        for number, (_group, device) in machine.places.items():
            self._show_device_node(number, device)

    @property
    def sys(self) -> Path:
        """The directory that stands for /sys, made at the first access."""
        if not self._built:
            self._build()
            self._built = True
        return self._sys

    def remove(self) -> None:
        """Delete the tree; twice is fine."""
        self._finalizer()

    def _build(self) -> None:
        self._directory("bus/pci/devices")
        for name in ("class/iommu", "class/vfio", "class/vfio-dev", "class/misc"):
            self._directory(name)
        if self._machine.has_groups:
            self._class_node("misc", "vfio", b"10:196\n")
        if self._machine.has_device_nodes:
            self._class_node("misc", "iommu", b"10:125\n")
            self._directory(_PARAMETERS)
            self.show_parameter(allow=self._machine.allow_unsafe_interrupts)
        self._show_unit(self._machine.noiommu)
        for name in ("vfio-pci", "pcieport"):
            self._driver(name)
        for group in self._groups:
            self._show_group(group)
            for device in group.devices:
                self._device(device.declared)
            if self._machine.noiommu is None:
                self._group(group, self._machine.iommu)
            for device in group.devices:
                self._show_driver(device)
            self._functions(group)
        for number, (_group, device) in self._machine.places.items():
            self._show_device_record(number, device)

    def _show_unit(self, noiommu: NoIommu | None) -> None:
        if noiommu is None:
            self._directory(_UNIT)
            self._link("class/iommu/iommu0", _UNIT)
        else:
            self._directory(PARAMETERS)
            noiommu.show(self._sys)

    def _functions(self, group: Group) -> None:
        """Show how many virtual functions each physical one has."""
        virtual = [device.declared.pf for each in self._groups for device in each.devices]
        for device in group.devices:
            if device.declared.sriov:
                count = f"{virtual.count(device.bdf)}\n".encode()
                _fill(f"{self._sys}/{self._home(device.bdf)}", {"sriov_totalvfs": count, "sriov_numvfs": count})

    def _group(self, group: Group, model: IommuModel) -> None:
        """Show a group of an IOMMU. `_show_made_up` shows the others."""
        name = f"kernel/iommu_groups/{group.number}"
        self._directory(f"{name}/devices")
        _fill(f"{self._sys}/{name}", {"type": b"DMA-FQ\n", "reserved_regions": _MSI if len(model.ranges) > 1 else b""})
        for device in group.devices:
            self._enter_group(group.number, device.bdf)

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
        """Show or hide the record of the group's node, as the kernel does."""
        link = f"{self._sys}/class/vfio/{group.node}"
        if not self._machine.has_groups:
            return
        if _has_node(group) and not os.path.islink(link):
            self._class_node("vfio", group.node, f"511:{group.number}\n".encode())
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

    def _enter_group(self, group: int, bdf: str) -> None:
        self._link(f"{self._home(bdf)}/iommu", _UNIT)
        self._link(f"{self._home(bdf)}/iommu_group", f"kernel/iommu_groups/{group}")
        self._link(f"kernel/iommu_groups/{group}/devices/{bdf}", self._home(bdf))

    def _show_made_up(self, group: Group, device: PciDevice) -> None:
        """Show the group that VFIO makes for a device without an IOMMU, while a VFIO driver has the device."""
        name, link = f"kernel/iommu_groups/{group.number}", f"{self._home(device.bdf)}/iommu_group"
        shown = os.path.islink(f"{self._sys}/{link}")
        if is_vfio_driver(device.driver) and not shown:
            self._directory(f"{name}/devices")
            _fill(f"{self._sys}/{name}", {"name": b"vfio-noiommu\n", "type": b"unknown\n", "reserved_regions": b""})
            self._link(link, name)
            self._link(f"{name}/devices/{device.bdf}", self._home(device.bdf))
        elif not is_vfio_driver(device.driver) and shown:
            os.unlink(f"{self._sys}/{link}")
            _empty(f"{self._sys}/{name}")

    def _device(self, device: FakeDevice) -> None:
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
        self._link(f"bus/pci/devices/{device.bdf}", home)
        if device.pf is not None:
            self._link(f"{home}/physfn", self._home(device.pf))

    def bind(self, group: Group, device: PciDevice) -> None:
        """Show the new driver of `device`. The node of the group exists while a VFIO driver has one of the devices."""
        number = next(number for number, place in self._machine.places.items() if place[1] is device)
        self._show_node(group)
        self._show_device_node(number, device)
        if self._built:
            self._show_group(group)
            self._show_driver(device)
            self._show_device_record(number, device)

    def show_parameter(self, *, allow: bool) -> None:
        """Show the parameter `allow_unsafe_interrupts` of iommufd."""
        if os.path.isdir(f"{self._root}/sys/{_PARAMETERS}"):
            _fill(f"{self._root}/sys/{_PARAMETERS}", {"allow_unsafe_interrupts": b"Y\n" if allow else b"N\n"})

    def _show_node(self, group: Group) -> None:
        node = self.dev / "vfio" / group.node
        if _has_node(group) and self._machine.has_groups:
            node.touch(0o600)
        else:
            node.unlink(missing_ok=True)

    def _show_device_node(self, number: int, device: PciDevice) -> None:
        if not self._machine.shows_device_nodes:
            return
        node = self.dev / f"vfio/devices/{self._machine.device_prefix}{number}"
        if is_vfio_driver(device.driver):
            node.touch(0o600)
        else:
            node.unlink(missing_ok=True)

    def _show_device_record(self, number: int, device: PciDevice) -> None:
        """Show or hide the device of the VFIO driver. Kernels without device nodes have the directory too."""
        name = f"{self._home(device.bdf)}/vfio-dev"
        node = f"{self._machine.device_prefix}{number}"
        link = f"class/vfio-dev/{node}"
        if is_vfio_driver(device.driver) and not os.path.isdir(f"{self._sys}/{name}"):
            files = {"dev": f"510:{number}\n".encode()} if self._machine.shows_device_nodes else {}
            _fill(self._directory(f"{name}/{node}"), files)
            self._link(link, f"{name}/{node}")
        elif not is_vfio_driver(device.driver) and os.path.isdir(f"{self._sys}/{name}"):
            os.unlink(f"{self._sys}/{link}")
            _empty(f"{self._sys}/{name}")

    def _show_driver(self, device: PciDevice) -> None:
        home = self._home(device.bdf)
        if self._machine.noiommu is not None:
            self._show_made_up(next(group for group in self._groups if device in group.devices), device)
        link = f"{self._sys}/{home}/driver"
        if os.path.islink(link):
            os.unlink(f"{link}/{device.bdf}")
            os.unlink(link)
        if device.driver is not None:
            name = self._driver(device.driver)
            self._link(f"{home}/driver", name)
            self._link(f"{name}/{device.bdf}", home)
